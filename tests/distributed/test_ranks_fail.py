"""One rank of several fails in the middle of its work: the others are called out of what they wait for."""

import time
from typing import Any

import pytest

from tests.bench import Watcher
from tests.distributed import faults
from tests.distributed.live import PAIR, Live, live_ranks, name_of
from wan_grpc.domain.errors import Reason
from wan_grpc.domain.events import Preview, Progress, Stage, State
from wan_grpc.domain.observations import GroupRestarting
from wan_grpc.domain.topology import Topology

pytestmark = pytest.mark.asyncio(loop_scope="session")

ENDED_S = 5.0
"""How soon a request has ended on all ranks."""
STAGES = [("text", 1), ("denoise", 6), ("sent", 5), ("decode", 2)]


def asked(prompt: str) -> dict[str, object]:
    """A video of some length, whose texts no rank remembers."""
    return {"prompt": prompt, "negative_prompt": f"at {time.time()}", "num_frames": 9, "num_inference_steps": 20}


async def ended(watcher: Watcher) -> float:
    began = time.monotonic()
    await watcher.to_end()
    return time.monotonic() - began


@pytest.mark.parametrize(
    ("rank", "what", "reason"),
    [(0, "memory", Reason.OUT_OF_MEMORY), (1, "error", Reason.INTERNAL), (3, "memory", Reason.OUT_OF_MEMORY)],
)
@pytest.mark.parametrize(("stage", "count"), STAGES)
async def test_a_rank_that_fails(
    four: Live, reference: bytes, stage: str, count: int, rank: int, what: str, reason: Reason
) -> None:
    """The caller hears why within 5 s; the same ranks, with new links and old weights, make the next video right."""
    if stage == "text" and rank > 1:
        rank = 1  # two prompts are encoded by two ranks
    pids, restarts = four.pids, len(four.seen(GroupRestarting))
    watcher = await four.begin(**asked(faults.prompt(stage, rank, what, count)))
    assert await ended(watcher) < ENDED_S
    assert watcher.failure.reason is reason  # type: ignore[attr-defined]
    assert four.engine.get(name_of(watcher)).state is State.FAILED
    began = time.monotonic()
    assert await four.make() == reference
    assert time.monotonic() - began < ENDED_S
    assert (four.pids, len(four.seen(GroupRestarting))) == (pids, restarts)


@pytest.mark.parametrize(
    ("what", "reason"),
    [("error", Reason.INTERNAL), ("memory", Reason.OUT_OF_MEMORY), ("kill", Reason.RANK_DIED)],
)
async def test_a_rank_that_fails_at_a_preview(four: Live, reference: bytes, what: str, reason: Reason) -> None:
    """While all of them decode it: as at any other stage, and before the video is denoised."""
    request = {**asked(faults.prompt("decode", 1, what, 2)), "preview_every_steps": 2}
    watcher = await four.begin(**request)
    assert await ended(watcher) < ENDED_S
    assert watcher.failure.reason is reason  # type: ignore[attr-defined]
    assert {event.step for event in watcher.find(Progress) if event.stage is Stage.DENOISE} <= {0, 1, 2}
    assert not watcher.find(Preview)
    assert await four.make() == reference


async def test_ranks_tell_how_long_their_links_took(four: Live) -> None:
    """A time of their own each, which is what they are granted again for new ones."""
    assert all(0.0 < ready.links_s < 60.0 for ready in four.executor.ready)
    assert len({ready.links_s for ready in four.executor.ready}) > 1


@pytest.mark.parametrize(("stage", "count"), STAGES)
async def test_a_rank_that_is_killed(four: Live, reference: bytes, stage: str, count: int) -> None:
    """A rank that dies in any stage is told of, and new ranks make the next video right."""
    pids = four.pids
    watcher = await four.begin(**asked(faults.prompt(stage, 1, "kill", count)))
    assert await ended(watcher) < ENDED_S
    assert watcher.failure.reason is Reason.RANK_DIED  # type: ignore[attr-defined]
    assert "rank 1 was killed by SIGKILL" in watcher.failure.message  # type: ignore[attr-defined]
    assert await four.make() == reference
    assert not set(pids) & set(four.pids)


@pytest.mark.parametrize(
    "topology", [PAIR, Topology(ring=2, num_heads=4), Topology(ulysses=2, num_heads=4)], ids=["cfg", "ring", "ulysses"]
)
async def test_every_kind_of_exchange_breaks_off(tiny: Any, reference: bytes, topology: Topology) -> None:
    """Whatever the other rank waits in, it comes out of it, time after time."""
    async with live_ranks(tiny, topology=topology) as live:
        pids = live.pids
        stages = [("denoise", 1), ("denoise", 5), ("decode", 1)] + ([("sent", 3)] if topology.cfg == 1 else [])
        for stage, count in stages:
            watcher = await live.begin(prompt=faults.prompt(stage, 1, "error", count), num_inference_steps=20)
            assert await ended(watcher) < ENDED_S
            assert watcher.failure.reason is Reason.INTERNAL  # type: ignore[attr-defined]
            assert await live.make() == reference
        assert live.pids == pids
