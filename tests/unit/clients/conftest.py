from collections.abc import Iterator

import pytest

from tests.unit.clients.scripted_server import ScriptedServer


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    """A server that plays what the test puts into its `streams`."""
    server = ScriptedServer()
    server.start()
    yield server
    server.stop()
