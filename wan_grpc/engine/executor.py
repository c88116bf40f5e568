"""One group of ranks, kept alive: runs one generation at a time on it and starts it again when it dies.

Knows groups and their restarts. Does not know queues, watchers or files.
"""

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass

import structlog

from wan_grpc.domain.errors import Reason, ServiceError, UnusableModelError
from wan_grpc.domain.images import InputFrames
from wan_grpc.domain.observations import (
    GroupReady,
    GroupRestarting,
    Observation,
    RankChanged,
    RankMemorySampled,
    RestartCause,
)
from wan_grpc.domain.request import VideoRequest
from wan_grpc.domain.variants import ModelCard
from wan_grpc.engine.bell import Bell, rang
from wan_grpc.engine.group import GroupEvent, GroupPlan, RankGroup, RanksDied, TakeFrame
from wan_grpc.engine.messages import Cancel, LoadFailed, MemoryUse, Ready, Run, RunEnded, StepDone

_BACKOFF_S = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RestartPolicy:
    """When to give up: `max_failures` groups in a row of `window_s` that died before they were ready."""

    max_failures: int = 3
    window_s: float = 600.0
    start_timeout_s: float = 1800.0


class Executor:
    """Runs videos on one rank group. All methods belong to one asyncio loop."""

    def __init__(
        self,
        plan: GroupPlan,
        card: ModelCard,
        *,
        policy: RestartPolicy,
        observe: Callable[[Observation], None],
    ) -> None:
        self.plan = plan
        self._card = card
        self._policy = policy
        self._observe = observe
        self._group: RankGroup | None = None
        self._events: asyncio.Queue[GroupEvent] = asyncio.Queue()
        self._failures: deque[float] = deque()
        self._restart_s: float | None = None
        self._supervisor: asyncio.Task[None] | None = None
        self._on_thread: asyncio.Future[None] | None = None
        self._running: str | None = None
        self._is_cancelled = False
        self.changed = Bell()
        self.detail = "the ranks are starting"
        self.ready: tuple[Ready, ...] = ()
        self.memory: tuple[MemoryUse, ...] = ()
        self.fatal: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    @property
    def is_ready(self) -> bool:
        return bool(self.ready)

    @property
    def pids(self) -> tuple[int, ...]:
        return self._group.pids if self._group else ()

    def start(self) -> None:
        """Begin to start the group; `changed` rings when it is ready."""
        self._supervisor = asyncio.create_task(self._supervise(), name="executor")
        self._supervisor.add_done_callback(self._note_crash)

    async def wait_ready(self) -> None:
        """Return when the group is ready.

        Raises:
            UnusableModelError: it never will be.
        """
        while not self.is_ready:
            if self.fatal.done():
                raise UnusableModelError(self.fatal.result())
            await rang(self.changed.ticket(), None)

    async def run(
        self, generation: str, video: VideoRequest, frames: InputFrames, take_frame: TakeFrame
    ) -> AsyncGenerator[StepDone | RunEnded, None]:
        """Compute one video; ends with RunEnded. Frames go to `take_frame` on another thread.

        Raises:
            ServiceError: RANK_DIED, when the group did not live to the end of it.
        """
        await self.wait_ready()
        assert self._group is not None and self._running is None
        self._running, self._is_cancelled = generation, False
        events = self._events  # of this group: a restart brings its own
        self._group.expect_frames(video.frame_bytes, take_frame)
        self._group.send(Run(generation=generation, video=video, frames=frames))
        while not isinstance(message := await self._next_message(events), RunEnded):
            yield message
        self._running = None  # and not before: whoever leaves early leaves the ranks at work
        self._take_memory(message.memory)
        yield message

    async def _next_message(self, events: "asyncio.Queue[GroupEvent]") -> StepDone | RunEnded:
        event = await events.get()
        if isinstance(event, RanksDied):
            raise self._dead(event)
        assert isinstance(event, StepDone | RunEnded), event
        return event

    def cancel(self, generation: str) -> None:
        """Have the ranks leave this generation at the next step boundary; nothing happens when they do not run it."""
        if self._group is not None and self._running == generation and not self._is_cancelled:
            self._is_cancelled = True  # said once: a rank reads its pipe only between steps, and a pipe can fill
            self._group.send(Cancel(generation=generation))

    async def stop(self) -> None:
        """End the ranks: idle ones are asked to leave, any others are killed."""
        idle = self.is_ready and self._running is None
        if self._supervisor is not None:
            self._supervisor.cancel()
            await asyncio.wait([self._supervisor])
        self._set_ready(())
        if self._on_thread is not None:
            await asyncio.wait([self._on_thread])
        if self._group is not None:
            group, self._group = self._group, None
            await asyncio.to_thread(group.stop if idle else group.kill)

    def _dead(self, event: RanksDied) -> ServiceError:
        sentence = f"the ranks that computed this video ended: {event.detail}; they are being started again"
        return ServiceError(Reason.RANK_DIED, sentence, retry_after_s=max(1.0, self._restart_s or 0.0))

    def _take_memory(self, memory: tuple[MemoryUse, ...]) -> None:
        self.memory = memory
        for rank, use in enumerate(memory):
            self._observe(RankMemorySampled(rank=rank, used_bytes=use.used_bytes, peak_bytes=use.peak_bytes))

    async def _supervise(self) -> None:
        """Keep one group alive until told to stop or until it is clear that none will live."""
        while not self.fatal.done():
            began = time.monotonic()
            try:
                died = await self._start_group()
                self._restart_s = time.monotonic() - began
                event = await died
                cause = RestartCause.RANK_DIED
            except _StartError as error:
                event = RanksDied(detail=str(error))
                cause = RestartCause.START_FAILED
            await self._bury(event, cause)
            if cause is RestartCause.START_FAILED:
                await self._count_failure(event.detail)

    async def _start_group(self) -> asyncio.Future[RanksDied]:
        """Start a group and wait until all its ranks are ready; the future is set when one of them dies."""
        loop = asyncio.get_running_loop()
        events: asyncio.Queue[GroupEvent] = asyncio.Queue()
        died: asyncio.Future[RanksDied] = loop.create_future()

        def deliver(event: GroupEvent) -> None:
            with contextlib.suppress(RuntimeError):  # a loop that a second signal closed has nobody left to tell
                loop.call_soon_threadsafe(take, event)

        def take(event: GroupEvent) -> None:
            if isinstance(event, RanksDied):
                self._set_ready(())  # before anybody hears of it and asks for the next run
                if not died.done():
                    died.set_result(event)
            events.put_nowait(event)

        began = time.monotonic()
        self._events = events
        self._group = RankGroup(self.plan, deliver)
        try:
            await self._to_thread(self._group.start)
        except (OSError, EOFError) as error:
            raise _StartError(f"rank processes cannot be started: {error!r}") from error
        try:
            async with asyncio.timeout(self._policy.start_timeout_s):
                ready = await self._all_ready(events)
        except TimeoutError:
            raise _StartError(f"not ready within {self._policy.start_timeout_s:g} s") from None
        self._announce(ready, time.monotonic() - began)
        return died

    async def _all_ready(self, events: asyncio.Queue[GroupEvent]) -> tuple[Ready, ...]:
        ready: dict[int, Ready] = {}
        while len(ready) < self.plan.topology.world_size:
            event = await events.get()
            if isinstance(event, Ready):
                ready[event.rank] = event
                self._observe(RankChanged(rank=event.rank, up=True))
            elif isinstance(event, LoadFailed):
                self.give_up(event.message)
                raise _StartError(event.message)
            elif isinstance(event, RanksDied):
                raise _StartError(event.detail)
        return tuple(ready[rank] for rank in sorted(ready))

    def _announce(self, ready: tuple[Ready, ...], load_s: float) -> None:
        first = ready[0]
        self._observe(
            GroupReady(
                card=self._card,
                topology=self.plan.topology,
                device=first.device,
                dtype=first.dtype,
                attention=first.attention,
                load_s=load_s,
            )
        )
        self._take_memory(tuple(MemoryUse(used_bytes=r.used_bytes, peak_bytes=r.used_bytes) for r in ready))
        self._set_ready(ready)

    def _set_ready(self, ready: tuple[Ready, ...]) -> None:
        self.ready = ready
        self.detail = "ready" if ready else "the ranks are starting"
        self.changed.ring()

    async def _bury(self, event: RanksDied, cause: RestartCause) -> None:
        self._running = None
        self._set_ready(())
        for rank in range(self.plan.topology.world_size):
            self._observe(RankChanged(rank=rank, up=False))
        if not self.fatal.done():
            self._observe(GroupRestarting(cause=cause, detail=event.detail))
        if self._group is not None:
            group, self._group = self._group, None
            await self._to_thread(group.kill)

    async def _to_thread(self, work: Callable[[], None]) -> None:
        """Run what blocks on a thread. Cancelling this leaves it running; `stop` waits for it."""
        self._on_thread = asyncio.ensure_future(asyncio.to_thread(work))
        await asyncio.shield(self._on_thread)

    async def _count_failure(self, detail: str) -> None:
        now = time.monotonic()
        self._failures.append(now)
        while self._failures[0] < now - self._policy.window_s:
            self._failures.popleft()
        if len(self._failures) >= self._policy.max_failures:
            sentence = f"{len(self._failures)} starts of the ranks failed within {self._policy.window_s:g} s"
            self.give_up(f"{sentence}; the last: {detail}")
        else:
            await asyncio.sleep(_BACKOFF_S * 2 ** (len(self._failures) - 1))

    def _note_crash(self, supervisor: asyncio.Task[None]) -> None:
        if not supervisor.cancelled() and (error := supervisor.exception()) is not None:
            structlog.get_logger().error("the executor failed", exc_info=error)
            self.give_up(f"internal error: {error!r}")

    def give_up(self, detail: str) -> None:
        """Declare that this process cannot serve any more; `fatal` tells whoever waits for it."""
        if not self.fatal.done():
            self.detail = detail
            self.fatal.set_result(detail)
            self.changed.ring()


class _StartError(Exception):
    """A group that did not come to be ready."""
