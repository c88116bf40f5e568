import os

import pytest

from wan_grpc.config import ENV_PREFIX


@pytest.fixture(autouse=True, scope="session")
def _no_settings_from_outside() -> None:
    """A developer's own WAN_GRPC_* variables change no test."""
    for name in [name for name in os.environ if name.startswith(ENV_PREFIX)]:
        del os.environ[name]
