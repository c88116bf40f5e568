import asyncio

import pytest

from tests.fake_ranks import CARD, ask
from wan_grpc.domain.images import InputFrames
from wan_grpc.domain.request import resolve
from wan_grpc.engine.generation import GenerationLog
from wan_grpc.engine.intake import Prepared
from wan_grpc.engine.queue import AdmissionQueue


def job(name: str) -> GenerationLog:
    prepared = Prepared(video=resolve(ask(), CARD, fallback_seed=0), frames=InputFrames(), warnings=())
    return GenerationLog(name, ask(), prepared, detach_grace_s=1.0)


def names(queue: AdmissionQueue) -> list[str]:
    return [job.name for job in queue]


async def test_first_in_first_out() -> None:
    """They leave in the order in which they came, whoever went from the middle."""
    queue = AdmissionQueue(16)
    jobs = [job(name) for name in "abcde"]
    for each in jobs:
        queue.push(each)
    queue.remove(jobs[2])
    assert (names(queue), len(queue)) == (["a", "b", "d", "e"], 4)
    assert [queue.pop().name for _ in range(4)] == ["a", "b", "d", "e"]
    assert len(queue) == 0


async def test_waiting_for_somebody() -> None:
    """The wait ends when somebody comes, at once when somebody is there, and not for one who has gone again."""
    queue = AdmissionQueue(16)
    gone = job("a")
    queue.push(gone)
    queue.remove(gone)
    waiting = asyncio.create_task(queue.filled())
    await asyncio.sleep(0)
    assert not waiting.done()
    queue.push(job("b"))
    await waiting
    await queue.filled()
    assert names(queue) == ["b"]


async def test_a_walk_along_the_line_may_change_it() -> None:
    """Removing while walking skips nobody."""
    queue = AdmissionQueue(16)
    for name in "abc":
        queue.push(job(name))
    seen = []
    for each in queue:
        seen.append(each.name)
        queue.remove(each)
    assert (seen, names(queue)) == (["a", "b", "c"], [])


async def test_nobody_leaves_twice() -> None:
    """Removing one who is not there is an error, which would hide a lost generation."""
    queue = AdmissionQueue(16)
    with pytest.raises(ValueError):
        queue.remove(job("a"))
