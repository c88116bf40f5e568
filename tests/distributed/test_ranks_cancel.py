import asyncio
import random

import pytest

from tests.bench import Watcher, eventually
from tests.distributed.live import LONG, Frames, Live, name_of
from wan_grpc.domain.errors import Failure, Reason
from wan_grpc.domain.events import Preview, Progress, Stage, State

pytestmark = pytest.mark.asyncio(loop_scope="session")

CANCELLED = Failure(reason=Reason.CANCELLED_BY_CALLER, message="the generation was cancelled")
MAX_STEPS_AFTER = 3
"""Steps that may be told after a cancel: the one at work, and those that passed each other with it on the way."""
MAX_GROWTH_BYTES = 128 * 1024 * 1024
"""How much more a rank may hold after many cancels than before. One video of this size needs about 100 MB more than the
model, which the allocator gives back or not; a leak of one video a cancel would be ten times that."""


@pytest.fixture(params=["single", "pair"])
def live(request: pytest.FixtureRequest) -> Live:
    """One rank, and two."""
    return request.getfixturevalue(request.param)


async def test_previews_cost_no_video(live: Live, reference: bytes) -> None:
    """With one after every step the video is the same; a cancel among them leaves the same ranks, which go on."""
    pids = live.pids
    watcher = await (await live.begin(preview_every_steps=1)).to_end()
    assert Frames(watcher.video) == reference
    steps = watcher.records[0].event.video.num_inference_steps  # type: ignore[union-attr]
    assert watcher.find(Preview)[-1].step == steps
    watcher = await live.reach(Stage.DENOISE, 2, prompt=f"never seen {random.random()}", preview_every_steps=1)
    await live.engine.cancel(name_of(watcher))
    await watcher.to_end()
    assert watcher.failure == CANCELLED
    assert await live.make() == reference
    assert live.pids == pids


@pytest.mark.parametrize(("stage", "step"), [(Stage.TEXT, 0), (Stage.DENOISE, 2), (Stage.DECODE, 2)])
async def test_a_cancel_in_any_stage(live: Live, reference: bytes, stage: Stage, step: int) -> None:
    """It ends within a few steps as CANCELLED, on the same processes, which compute what is right next."""
    pids = live.pids
    num_steps = 1 if stage is Stage.DECODE else 100
    watcher = await live.reach(stage, step, prompt=f"never seen {random.random()}", num_inference_steps=num_steps)
    at = index_of(watcher.find(Progress)[-1])
    cancelled = await live.engine.cancel(name_of(watcher))
    await watcher.to_end()
    assert (cancelled.state, cancelled.failure, watcher.failure) == (State.CANCELLED, CANCELLED, CANCELLED)
    assert index_of(watcher.find(Progress)[-1]) - at <= MAX_STEPS_AFTER
    assert await live.make() == reference
    assert live.pids == pids


def index_of(progress: Progress) -> int:
    """Which of all steps of a LONG video this is."""
    before = {Stage.TEXT: 0, Stage.DENOISE: 3, Stage.DECODE: 1000}[progress.stage]
    return before + progress.step


async def test_fifty_cancels_at_random_moments(four: Live, reference: bytes) -> None:
    """Wherever they fall on four ranks, each ends, and the next video is right, on the same ranks."""
    chance, pids = random.Random(2), four.pids
    for number in range(50):
        watcher = await four.begin(prompt=f"cat {number}", width=48, height=48, num_frames=17, num_inference_steps=8)
        await come_to(watcher, chance.randrange(18))
        await asyncio.sleep(chance.random() * 0.03)  # somewhere within a step
        ended = await four.engine.cancel(name_of(watcher))
        await watcher.to_end()
        assert ended.state is State.SUCCEEDED or ended.failure == CANCELLED
        assert await four.make() == reference
    assert four.pids == pids


async def come_to(watcher: Watcher, num_steps: int) -> None:
    await eventually(lambda: watcher.has_ended or len(watcher.find(Progress)) >= num_steps)


async def test_memory_comes_back_after_cancels(pair: Live) -> None:
    """Ten videos cancelled in the middle leave no more behind than one that was made to its end."""
    for _ in range(2):
        await pair.make(**{**LONG, "num_frames": 17, "num_inference_steps": 2})
    before = pair.resident_bytes()
    for number in range(10):
        stage = (Stage.TEXT, Stage.DENOISE, Stage.DECODE)[number % 3]
        steps = 1 if stage is Stage.DECODE else 100
        watcher = await pair.reach(stage, 1, prompt=f"cat {number}", num_inference_steps=steps)
        await pair.engine.cancel(name_of(watcher))
        await watcher.to_end()
    grown = [after - held for after, held in zip(pair.resident_bytes(), before, strict=True)]
    assert max(grown) < MAX_GROWTH_BYTES


async def test_a_cancel_in_the_line_leaves_the_ranks_alone(live: Live, reference: bytes) -> None:
    """Those before and behind in line are made as if it had never been there."""
    first = await live.begin()
    waiting = await live.begin(**LONG)
    last = await live.begin()
    assert (await live.engine.cancel(name_of(waiting))).failure == CANCELLED
    assert [(await watcher.to_end()).video for watcher in (first, last)] == [reference, reference]


async def test_a_cancel_overtaken_by_the_end(live: Live, reference: bytes) -> None:
    """A cancel that is sent as the last frames arrive does not touch the generation after it."""
    for number in range(5):
        watcher = await live.begin(seed=number)
        await watcher.saw(Stage.DECODE, 1)
        following = await live.begin()
        await live.engine.cancel(name_of(watcher))
        assert (await following.to_end()).video == reference
