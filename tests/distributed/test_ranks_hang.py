"""Ranks that are stopped instead of dead: they are found by their silence, and new ones take their place."""

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from tests.bench import eventually
from tests.distributed import faults
from tests.distributed.live import PAIR, Live, is_gone, live_ranks, name_of, run, video
from wan_grpc.domain.errors import Failure, Reason
from wan_grpc.domain.events import Progress, Stage, State
from wan_grpc.domain.observations import GroupRecovered, GroupRestarting, RestartCause
from wan_grpc.engine.executor import RestartPolicy
from wan_grpc.engine.watchdog import Patience

pytestmark = pytest.mark.asyncio(loop_scope="session")

GRACE_S = 2.0
LATE_S = 3.0
"""What a look once a second, a kill and a busy machine may add."""


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def impatient(tiny: Path) -> AsyncIterator[Live]:
    """Two ranks that are soon given up, and have made a video before. Whoever has them killed leaves a ready group."""
    async with live_ranks(tiny, topology=PAIR, policy=RestartPolicy(patience=Patience(grace_s=GRACE_S))) as live:
        await live.make()
        yield live


async def left_at_work(live: Live, rank: int, stage: Stage, *, grace_s: float) -> None:
    """Stop a rank in the middle of a stage, and see it found in time, told, and replaced."""
    pids, restarts = live.pids, len(live.seen(GroupRestarting))
    changes = live.engine.status_changes()
    assert await anext(changes)
    running = await live.reach(stage, 3, num_inference_steps=1 if stage is Stage.DECODE else 100)
    waiting = await live.begin()
    os.kill(pids[rank], signal.SIGSTOP)
    began = time.monotonic()
    await running.to_end()
    longest_s = max(progress.step_time_s or 0.0 for progress in running.find(Progress))
    assert grace_s <= time.monotonic() - began + longest_s < 3 * longest_s + grace_s + LATE_S
    failure = running.failure
    assert isinstance(failure, Failure)
    assert failure.reason is Reason.RANK_DIED
    assert failure.retry_after_s is not None and failure.retry_after_s >= 1.0
    assert failure.message.startswith("the ranks that computed this video hung: ")
    assert f"rank {rank} (process {pids[rank]}) " in failure.message
    assert live.engine.get(name_of(running)).state is State.FAILED
    assert [await anext(changes), await anext(changes)] == [False, True]
    await waiting.to_end()
    assert live.engine.get(name_of(waiting)).state is State.SUCCEEDED
    assert all(is_gone(pid) for pid in pids)
    assert [restarting.cause for restarting in live.seen(GroupRestarting)[restarts:]] == [RestartCause.RANK_HUNG]
    assert live.seen(GroupRecovered)[-1].cause is RestartCause.RANK_HUNG


async def test_a_rank_stopped_at_work(tiny: Path, reference: bytes) -> None:
    """With the usual patience it is found within three steps and ten seconds, and the next video is right."""
    async with live_ranks(tiny, topology=PAIR) as live:
        await left_at_work(live, 1, Stage.DENOISE, grace_s=10.0)
        assert await live.make() == reference


@pytest.mark.parametrize(("rank", "stage"), [(0, Stage.DENOISE), (1, Stage.DECODE), (0, Stage.DECODE)])
async def test_any_rank_in_any_stage(impatient: Live, reference: bytes, rank: int, stage: Stage) -> None:
    """Rank 0, which speaks for the others, is found like any other, while denoising and while decoding."""
    await left_at_work(impatient, rank, stage, grace_s=GRACE_S)
    assert await impatient.make() == reference


@pytest.mark.parametrize("rank", [0, 1])
async def test_a_rank_stopped_while_it_reads_a_text(impatient: Live, reference: bytes, rank: int) -> None:
    """In the text stage, too, it is found in time, told by its number, and replaced."""
    pids = impatient.pids
    running = await impatient.begin(prompt=faults.prompt("text", rank, "stop"), negative_prompt=f"at {time.time()}")
    began = time.monotonic()
    await running.to_end()
    assert time.monotonic() - began < 3 * 1.0 + GRACE_S + LATE_S, "no text takes a second here"
    assert isinstance(running.failure, Failure)
    assert running.failure.reason is Reason.RANK_DIED
    assert f"rank {rank} (process {pids[rank]}) " in running.failure.message
    assert await impatient.make() == reference
    assert all(is_gone(pid) for pid in pids)


@pytest.mark.parametrize("rank", [0, 1])
async def test_an_idle_rank_that_is_stopped(impatient: Live, reference: bytes, rank: int) -> None:
    """It is found and replaced though nobody asks for anything; what is asked then is right."""
    pids = impatient.pids
    changes = impatient.engine.status_changes()
    assert await anext(changes)
    os.kill(pids[rank], signal.SIGSTOP)
    async with asyncio.timeout(GRACE_S + LATE_S):
        assert await anext(changes) is False
    assert f"rank {rank} (process {pids[rank]}) did not run for" in impatient.seen(GroupRestarting)[-1].detail
    assert await anext(changes) is True
    assert await impatient.make() == reference
    assert all(is_gone(pid) for pid in pids)


async def test_a_rank_that_goes_on_in_time(impatient: Live) -> None:
    """A pause that is shorter than the bound costs time and nothing else."""
    pids = impatient.pids
    running = await impatient.reach(Stage.DENOISE, 3, num_inference_steps=30, num_frames=17)
    os.kill(pids[1], signal.SIGSTOP)
    await asyncio.sleep(GRACE_S / 2)
    os.kill(pids[1], signal.SIGCONT)
    await running.to_end()
    assert impatient.engine.get(name_of(running)).state is State.SUCCEEDED
    assert impatient.pids == pids


async def test_a_cancel_that_a_stopped_rank_cannot_heed(impatient: Live, reference: bytes) -> None:
    """Whoever cancels hears so within the bound of the step, and the ranks are replaced."""
    pids = impatient.pids
    running = await impatient.reach(Stage.DENOISE, 3)
    os.kill(pids[1], signal.SIGSTOP)
    began = time.monotonic()
    ended = await impatient.engine.cancel(name_of(running))
    longest_s = max(progress.step_time_s or 0.0 for progress in running.find(Progress))
    assert time.monotonic() - began < 3 * longest_s + GRACE_S + LATE_S
    assert ended.state is State.CANCELLED
    assert await impatient.make() == reference
    assert not set(pids) & set(impatient.pids)


async def test_a_rank_stopped_in_a_video_after_a_picture(tiny: Path) -> None:
    """What a picture took tells little of a video; a rank that is stopped in its first step is found all the same."""
    async with live_ranks(tiny, topology=PAIR, policy=RestartPolicy(patience=Patience(grace_s=GRACE_S))) as live:
        await live.make(num_frames=1)
        pids = live.pids
        running = await live.begin(num_frames=17)
        os.kill(pids[1], signal.SIGSTOP)
        async with asyncio.timeout(2 * GRACE_S + LATE_S):
            await running.to_end()
        assert running.failure.reason is Reason.RANK_DIED  # type: ignore[attr-defined]
        await eventually(lambda: not set(pids) & set(live.pids))


async def test_a_disk_that_is_slower_than_the_patience(tiny: Path) -> None:
    """A full ring, in front of a server that takes longer for each frame than it would wait for one, is no hang."""
    policy = RestartPolicy(patience=Patience(grace_s=0.3))
    async with live_ranks(tiny, topology=PAIR, policy=policy, num_slots=1) as live:
        await live.make()
        frames: list[int] = []

        def write_slowly(frame: memoryview) -> None:
            time.sleep(2.0)
            frames.append(frame.nbytes)

        asked = video(live.executor)
        _, ended = await run(live.executor, asked, write_slowly)
        assert (ended.failure, frames) == (None, [asked.frame_bytes] * asked.num_frames)
        assert live.seen(GroupRestarting) == []


async def test_all_ranks_stopped_before_anything_was_timed(tiny: Path) -> None:
    """Long before the time of a first step is over, ranks that do not run at all are found."""
    policy = RestartPolicy(patience=Patience(grace_s=GRACE_S))
    async with live_ranks(tiny, topology=PAIR, policy=policy) as live:
        pids = live.pids
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        running = await live.begin()
        async with asyncio.timeout(GRACE_S + LATE_S):
            await running.to_end()
        assert running.failure.reason is Reason.RANK_DIED  # type: ignore[attr-defined]
        await eventually(lambda: not set(pids) & set(live.pids))
