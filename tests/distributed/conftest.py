from collections.abc import AsyncIterator
from multiprocessing import forkserver
from pathlib import Path

import pytest
import pytest_asyncio

from tests.distributed.live import FOUR, PAIR, Live, live_ranks
from wan_grpc.engine.group import prepare_forkserver
from wan_grpc.pipeline.tiny import make_tiny_model


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with random weights."""
    make_tiny_model(directory := tmp_path_factory.mktemp("model") / "tiny")
    return directory


@pytest.fixture(scope="session", autouse=True)
def _forkserver() -> None:
    """One that has imported what ranks need; a test of another folder may have started one that has not."""
    forkserver._forkserver._stop()  # type: ignore[attr-defined]  # what CPython's own tests use
    prepare_forkserver("tests.distributed.faults")


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def single(tiny: Path) -> AsyncIterator[Live]:
    """One rank. Shared: whoever kills it leaves a ready one."""
    async with live_ranks(tiny) as live:
        yield live


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def pair(tiny: Path) -> AsyncIterator[Live]:
    """Two ranks. Shared: whoever kills one leaves a ready group."""
    async with live_ranks(tiny, topology=PAIR) as live:
        yield live


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def four(tiny: Path) -> AsyncIterator[Live]:
    """Four ranks. Shared likewise."""
    async with live_ranks(tiny, topology=FOUR) as live:
        yield live


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def reference(single: Live) -> bytes:
    """The small video, as one rank computes it that nothing has happened to."""
    return await single.make()
