import asyncio
import io
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from tests.distributed.live import PAIR, Live, live_ranks, name_of
from tests.tiny_images import picture
from wan_grpc.domain.events import Failed, Progress, Stage, State
from wan_grpc.domain.variants import Task
from wan_grpc.pipeline.tiny import make_tiny_model

pytestmark = pytest.mark.asyncio(loop_scope="session")


def png(seed: int) -> bytes:
    file = io.BytesIO()
    picture(100, 60, seed).save(file, "PNG")
    return file.getvalue()


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def groups(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[tuple[Live, Live]]:
    """One rank, and two, of the tiny image-to-video model."""
    directory: Path = tmp_path_factory.mktemp("i2v") / "model"
    make_tiny_model(directory, task=Task.IMAGE_TO_VIDEO)
    async with live_ranks(directory) as single, live_ranks(directory, topology=PAIR) as pair:
        yield single, pair


async def test_images_reach_every_rank(groups: tuple[Live, Live]) -> None:
    """One rank and two make the same bytes of the same images, and other bytes of others."""
    single, pair = groups
    images = {"image": png(0), "last_image": png(1)}
    first, second = await asyncio.gather(single.make(**images), pair.make(**images))
    assert first == second
    others = [await pair.make(image=png(0)), await pair.make(image=png(0), last_image=png(2))]
    assert len({first, *others}) == 3


async def test_ranks_leave_in_the_middle_of_an_image(groups: tuple[Live, Live]) -> None:
    """A cancel is agreed on between two chunks of pictures, and the next video of the same ranks is right."""
    _, pair = groups
    expected, pids = await pair.make(image=png(0)), pair.pids
    watcher = await pair.reach(Stage.IMAGE, 1, image=png(0), width=128, height=128, num_frames=161)
    ended = await pair.engine.cancel(name_of(watcher))
    await watcher.to_end()
    stages = {step.stage for step in watcher.find(Progress)}
    assert (ended.state, len(watcher.find(Failed)), stages) == (State.CANCELLED, 1, {Stage.TEXT, Stage.IMAGE})
    assert await pair.make(image=png(0)) == expected
    assert pair.pids == pids
