"""Groups of ranks beside each other, each with the generation that it computes: what all of them together can do.

Knows executors and when each will be free. Does not know what becomes of a generation.
"""

import asyncio
import contextlib
import functools
import heapq
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import structlog

from wan_grpc.domain.events import RankMemory
from wan_grpc.engine.bell import Bell
from wan_grpc.engine.executor import Executor
from wan_grpc.engine.generation import GenerationLog
from wan_grpc.engine.group import GroupPlan
from wan_grpc.engine.messages import MemoryUse, Ready


@dataclass(slots=True, eq=False)
class Replica:
    """One group of ranks."""

    number: int
    executor: Executor
    job: GenerationLog | None = None
    """What its ranks compute."""

    @property
    def is_given_up(self) -> bool:
        return self.executor.fatal.done()

    @property
    def free_in_s(self) -> float:
        """Seconds until it can begin something; infinite when nobody knows."""
        if self.job is None:
            return 0.0 if self.executor.is_ready else math.inf
        left = self.job.left_s
        return math.inf if left is None else left

    def rank_memory(self, memory: Iterable[MemoryUse]) -> tuple[RankMemory, ...]:
        """Of its ranks in their order, with the numbers that they have outside."""
        numbered = enumerate(memory, start=self.executor.plan.first_rank)
        return tuple(RankMemory(rank=rank, peak_bytes=use.peak_bytes) for rank, use in numbered)


class Replicas:
    """All of them, alike but for their devices. Belongs to one asyncio loop."""

    def __init__(self, executors: Sequence[Executor]) -> None:
        assert executors, "somebody must compute"
        self._all = tuple(Replica(number, executor) for number, executor in enumerate(executors))
        self.changed = Bell()
        self.fatal: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        """Set with a sentence when none of them can work any more, or when it is clear that none ever could."""
        self._have_worked = bool(self.ready)
        for replica in self._all:
            replica.executor.changed.call(self._note_change)
            replica.executor.fatal.add_done_callback(functools.partial(self._note_end, replica))

    def __iter__(self) -> Iterator[Replica]:
        return iter(self._all)

    def start(self) -> None:
        """Begin to start the ranks."""
        for replica in self._all:
            with self.named_in_logs(replica):
                replica.executor.start()

    async def stop(self) -> None:
        """End the ranks."""
        await asyncio.gather(*(replica.executor.stop() for replica in self._all))

    def give_up(self, detail: str) -> None:
        """Declare that none can work any more."""
        for replica in self._all:
            replica.executor.give_up(detail)

    def named_in_logs(self, replica: Replica) -> contextlib.AbstractContextManager[None]:
        """Within the block, and in tasks that it starts, logs tell which one they are about if there are several."""
        names = {"replica": replica.number} if len(self._all) > 1 else {}
        return structlog.contextvars.bound_contextvars(**names)

    # ---- how they stand ---------------------------------------------------------------------------------------------

    @property
    def plan(self) -> GroupPlan:
        """Of the first; those of the others differ in the numbers of their ranks."""
        return self._all[0].executor.plan

    @property
    def count(self) -> int:
        return len(self._all)

    @property
    def num_alive(self) -> int:
        """Those that compute, can, or may be able to later."""
        return sum(not replica.is_given_up for replica in self._all)

    @property
    def num_running(self) -> int:
        return sum(replica.job is not None for replica in self._all)

    @property
    def ready(self) -> tuple[Ready, ...]:
        """The ranks of one that is ready; empty when none is."""
        return next((replica.executor.ready for replica in self._all if replica.executor.is_ready), ())

    @property
    def detail(self) -> str:
        if self.fatal.done():
            return self.fatal.result()
        if len(self._all) == 1:
            return self._all[0].executor.detail
        num_ready = sum(replica.executor.is_ready for replica in self._all)
        ends = {replica.executor.detail: None for replica in self._all if replica.is_given_up}
        return "; ".join([f"{num_ready} of {len(self._all)} replicas are ready", *ends])

    @property
    def rank_memory(self) -> tuple[RankMemory, ...]:
        return tuple(use for replica in self._all for use in replica.rank_memory(replica.executor.memory))

    # ---- when they are free -----------------------------------------------------------------------------------------

    def next_end_s(self) -> float | None:
        """Seconds until the first of them is done with what it computes, as far as that is known."""
        ends = [replica.free_in_s for replica in self._all if replica.job is not None]
        return _if_known(min(ends, default=math.inf))

    def starts_s(self, durations_s: Iterable[float | None]) -> Iterator[float | None]:
        """When each of those that wait will begin, in seconds from now, if each takes so long. None: nobody knows."""
        free = [replica.free_in_s for replica in self._all if not replica.is_given_up] or [math.inf]
        heapq.heapify(free)
        for duration_s in durations_s:
            begin = free[0]
            heapq.heapreplace(free, begin + (math.inf if duration_s is None else duration_s))
            yield _if_known(begin)

    # ---- what happens to them ---------------------------------------------------------------------------------------

    def _note_change(self) -> None:
        self._have_worked = self._have_worked or bool(self.ready)
        self.changed.ring()

    def _note_end(self, replica: Replica, fatal: "asyncio.Future[str]") -> None:
        """One has given up. The others go on, unless what is wrong is wrong with all of them."""
        if fatal.cancelled() or self.fatal.done():
            return
        is_hopeless = replica.executor.is_unusable and not self._have_worked
        if self.num_alive and not is_hopeless:
            told = "a replica cannot work, and starting it again is no use; the others go on"
            structlog.get_logger().error(told, replica=replica.number, detail=fatal.result())
        else:
            self.fatal.set_result(fatal.result())
        self.changed.ring()


def _if_known(seconds: float) -> float | None:
    return seconds if math.isfinite(seconds) else None
