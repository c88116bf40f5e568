import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from tests.bench import Bench, open_bench
from wan_grpc.engine import encoding
from wan_grpc.media.video import Encoder


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    """An engine over fake ranks that are ready."""
    async with open_bench(tmp_path) as bench:
        yield bench


@pytest.fixture
async def another(tmp_path: Path) -> AsyncIterator[Callable[..., Awaitable[Bench]]]:
    """Opens an engine with options of its own, and closes it after the test."""
    async with AsyncExitStack() as stack:

        async def open_another(**options: object) -> Bench:
            return await stack.enter_async_context(open_bench(tmp_path, **options))

        yield open_another


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Encoders take no frame until this is set. Set at the latest when the test has ended."""
    gate = threading.Event()

    class Gated(Encoder):
        def add(self, frame: bytes | memoryview) -> None:
            gate.wait()
            super().add(frame)

    monkeypatch.setattr(encoding, "open_encoder", Gated)
    yield gate
    gate.set()
