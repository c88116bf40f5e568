import os
import signal

import pytest

from wan_grpc.config import ENV_PREFIX

# As the ranks have it: threads that spin while they wait take many times as long on machines with few or shared cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# A shell without job control starts what it puts in the background deaf to Ctrl-C, and every child inherits that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True, scope="session")
def _no_settings_from_outside() -> None:
    """A developer's own WAN_GRPC_* variables change no test."""
    for name in [name for name in os.environ if name.startswith(ENV_PREFIX)]:
        del os.environ[name]
