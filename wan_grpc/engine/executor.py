"""One group of ranks, kept alive: runs one generation at a time on it and starts it again when it dies or hangs.

Knows groups and their restarts. Does not know queues, watchers or files.
"""

import asyncio
import contextlib
import functools
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import TypeAlias

import structlog

from wan_grpc.domain.errors import Reason, ServiceError, UnusableModelError
from wan_grpc.domain.images import InputFrames
from wan_grpc.domain.observations import (
    Exchanged,
    GroupReady,
    GroupRecovered,
    GroupRestarting,
    Observation,
    RankChanged,
    RankFaulted,
    RankMemorySampled,
    RestartCause,
)
from wan_grpc.domain.request import VideoRequest
from wan_grpc.domain.traffic import Traffic, busiest
from wan_grpc.domain.variants import ModelCard
from wan_grpc.engine.bell import Bell, rang
from wan_grpc.engine.group import GroupEvent, GroupPlan, LeftBehindError, RankGroup, RanksDied, TakeFrame
from wan_grpc.engine.messages import (
    Cancel,
    LoadFailed,
    MemoryUse,
    News,
    PreviewMade,
    RankFailed,
    Ready,
    Run,
    RunEnded,
    StepDone,
    ToRank,
)
from wan_grpc.engine.watchdog import Patience, StepTimes, Watchdog

_BACKOFF_S = 1.0

StartGroup: TypeAlias = Callable[[GroupPlan, Callable[[GroupEvent], None]], RankGroup]


@dataclass(frozen=True, slots=True, kw_only=True)
class RestartPolicy:
    """When to start a group again, and when to give up."""

    max_failures: int = 3
    """Groups that died before they were ready, within `window_s`, after which no more is tried."""
    window_s: float = 600.0
    start_timeout_s: float = 1800.0
    patience: Patience = field(default_factory=Patience)
    """With ranks that are silent."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Loss:
    """A group that is of no use any more."""

    cause: RestartCause
    detail: str
    remark: str = ""
    """For the operator alone."""
    is_counted: bool = False
    """Whether it is one of the failed starts after which no more is tried."""


_Event: TypeAlias = GroupEvent | _Loss


@dataclass(slots=True)
class _Running:
    """The generation that the ranks are at."""

    generation: str
    is_cancelled: bool = False
    has_ended: bool = False
    failures: list[RankFailed] = field(default_factory=list)
    failed_at: float = 0.0
    """Loop time of the first of them."""


class Executor:
    """Runs videos on one rank group. All methods belong to one asyncio loop."""

    def __init__(
        self,
        plan: GroupPlan,
        card: ModelCard,
        *,
        policy: RestartPolicy,
        observe: Callable[[Observation], None],
        make_group: StartGroup = RankGroup,
    ) -> None:
        self.plan = plan
        self.first_rank = plan.first_rank
        self._card = card
        self._policy = policy
        self._observe = observe
        self._make_group = make_group
        self._group: RankGroup | None = None
        self._events: asyncio.Queue[_Event] = asyncio.Queue()
        self._step_times = StepTimes()
        self._watchdog = Watchdog(policy.patience, self._step_times, dict)
        self._failures: deque[float] = deque()
        self._restart_s: float | None = None
        self._trouble: tuple[RestartCause, float] | None = None
        """What the ranks have to recover from, and the loop time at which it began."""
        self._supervisor: asyncio.Task[None] | None = None
        self._on_thread: asyncio.Future[None] | None = None
        # A pipe takes little before its rank reads; pictures for a rank that is stopped must not stop this loop, too.
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="rank-writer")
        self._running: _Running | None = None
        self._left_behind = ""
        """Of processes that do not end."""
        self.changed = Bell()
        self.detail = "the ranks are starting"
        self.ready: tuple[Ready, ...] = ()
        self.memory: tuple[MemoryUse, ...] = ()
        self.fatal: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.is_unusable = False
        """Whether it has given up because the model cannot be loaded, which no other ranks will fare better with."""

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
    ) -> AsyncGenerator[News, None]:
        """Compute one video; ends with RunEnded. Frames go to `take_frame` on another thread.

        RankFailed comes at most once, as soon as it is known; nothing but RunEnded follows, when the ranks have left.

        Raises:
            ServiceError: RANK_DIED, when the group did not live to the end of it.
        """
        await self.wait_ready()
        assert self._group is not None and self._running is None
        run = self._running = _Running(generation)
        events = self._events  # of this group: a restart brings its own
        self._group.expect_frames(video.frame_bytes, self._watchdog.watched(take_frame))
        self._watchdog.begin(video)
        self._send(Run(generation=generation, video=video, frames=frames))
        is_failure_told = False
        while not isinstance(message := await self._next_message(events), RunEnded):
            if not run.failures:
                yield self._with_slowest(message) if isinstance(message, StepDone) else message
            elif not is_failure_told:
                is_failure_told = True
                yield _worst(run.failures)
        self._running = None  # and not before: whoever leaves early leaves the ranks at work
        self._take_memory(message.memory)
        self._tell_traffic(message.traffic)
        yield message

    async def _next_message(self, events: "asyncio.Queue[_Event]") -> News:
        event = await events.get()
        if isinstance(event, _Loss):
            raise self._dead(event)
        assert isinstance(event, News), event
        return event

    def cancel(self, generation: str) -> None:
        """Have the ranks leave this generation at the next step boundary; nothing happens when they do not run it."""
        run = self._running
        if self._group is None or run is None or run.generation != generation or run.is_cancelled or run.failures:
            return
        run.is_cancelled = True  # said once: a rank reads its pipe only between steps, and a pipe can fill
        self._send(Cancel(generation=generation))
        self._watchdog.leave("a cancel")

    def _with_slowest(self, done: StepDone) -> StepDone:
        rank = busiest(done.times)
        if rank is None:
            return done
        progress = replace(
            done.progress, slowest_rank=self.first_rank + rank, slowest_rank_time_s=done.times[rank].busy_s
        )
        return StepDone(progress=progress, times=done.times)

    def _send(self, message: ToRank) -> None:
        assert self._group is not None
        asyncio.get_running_loop().run_in_executor(self._writer, self._group.send, message)

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
            await asyncio.to_thread(self._end, group.stop if idle else group.kill)
        await asyncio.to_thread(self._writer.shutdown)  # now that no pipe can hold it up

    def _dead(self, loss: _Loss) -> ServiceError:
        what = "ended" if loss.cause is RestartCause.RANK_DIED else "hung"
        sentence = f"the ranks that computed this video {what}: {loss.detail}; they are being started again"
        return ServiceError(Reason.RANK_DIED, sentence, retry_after_s=max(1.0, self._restart_s or 0.0))

    def _take_memory(self, memory: tuple[MemoryUse, ...]) -> None:
        self.memory = memory
        for rank, use in enumerate(memory, start=self.first_rank):
            self._observe(RankMemorySampled(rank=rank, used_bytes=use.used_bytes, peak_bytes=use.peak_bytes))

    def _tell_traffic(self, traffic: tuple[tuple[Traffic, ...], ...]) -> None:
        for rank, kinds in enumerate(traffic, start=self.first_rank):
            for each in kinds:
                self._observe(Exchanged(rank=rank, kind=each.kind, seconds=each.seconds, sent_bytes=each.sent_bytes))

    async def _supervise(self) -> None:
        """Keep one group alive until told to stop or until it is clear that none will live."""
        while not self.fatal.done():
            began = time.monotonic()
            try:
                lost = await self._start_group()
                self._restart_s = time.monotonic() - began
                loss = await self._watch(lost)
            except _StartError as error:
                is_counted = not isinstance(error, _AwaitedError)
                loss = _Loss(cause=RestartCause.START_FAILED, detail=str(error), is_counted=is_counted)
            await self._bury(loss)
            if loss.is_counted and not self.fatal.done():
                await self._count_failure(loss.detail)

    async def _watch(self, lost: "asyncio.Future[_Loss]") -> _Loss:
        """Wait until the group is lost: it dies, or it hangs."""
        hung = asyncio.create_task(self._watchdog.until_hung(), name="watchdog")
        try:
            await asyncio.wait((lost, hung), return_when=asyncio.FIRST_COMPLETED)
            if not lost.done():
                has_failed = self._running is not None and self._running.failures
                cause = RestartCause.EXCHANGE_FAILED if has_failed else RestartCause.RANK_HUNG
                hang = hung.result()
                self._lose(_Loss(cause=cause, detail=hang.detail, remark=f" ({hang.setting})"), lost)
        finally:
            hung.cancel()
        return lost.result()

    def _lose(self, loss: _Loss, lost: "asyncio.Future[_Loss]") -> None:
        if not lost.done():
            self._set_ready(())  # before anybody hears of it and asks for the next run
            lost.set_result(loss)
            self._events.put_nowait(loss)

    async def _start_group(self) -> "asyncio.Future[_Loss]":
        """Start a group and wait until all its ranks are ready; the future is set when it is lost."""
        loop = asyncio.get_running_loop()
        events: asyncio.Queue[_Event] = asyncio.Queue()
        lost: asyncio.Future[_Loss] = loop.create_future()

        def deliver(event: GroupEvent) -> None:
            with contextlib.suppress(RuntimeError):  # a loop that a second signal closed has nobody left to tell
                loop.call_soon_threadsafe(take, event)

        def take(event: GroupEvent) -> None:
            if isinstance(event, RanksDied):
                self._lose(_Loss(cause=RestartCause.RANK_DIED, detail=event.detail), lost)
            elif self._is_news(event):
                events.put_nowait(event)

        began = time.monotonic()
        self._events = events
        group = self._group = self._make_group(self.plan, deliver)
        self._watchdog = Watchdog(
            self._policy.patience, self._step_times, lambda: dict(enumerate(group.pids, start=self.first_rank))
        )
        try:
            await self._to_thread(self._group.start)
        except (OSError, EOFError) as error:
            raise _StartError(f"rank processes cannot be started: {error!r}") from error
        try:
            async with asyncio.timeout(self._policy.start_timeout_s):
                ready = await self._all_ready(events)
        except TimeoutError:
            raise self._too_late(group.missing) from None
        if lost.done():  # after the last of them was ready, and before this was told
            raise _StartError(lost.result().detail)
        self._watchdog.set_links(min(each.links_s for each in ready))  # others began to wait earlier
        self._announce(ready, time.monotonic() - began)
        return lost

    def _too_late(self, missing: tuple[int, ...]) -> "_StartError":
        flag = f"--start-timeout-s {self._policy.start_timeout_s:g}"
        if missing:
            return _AwaitedError(f"{_named(missing)} have not joined within {flag}")
        return _StartError(f"not ready within {flag}")

    def _is_news(self, event: GroupEvent) -> bool:
        """Take in what a rank says as soon as it is here; whether anybody else is to hear it."""
        match event:
            case StepDone(progress=progress):
                self._watchdog.take(progress)
            case PreviewMade():
                self._watchdog.take_preview()
            case RankFailed():
                return self._take_failure(event)
            case RunEnded():
                self._watchdog.end()
                self._note_end_of_run()
        return True

    def _take_failure(self, failed: RankFailed) -> bool:
        """Let the other ranks come out of the generation. False when they have come out already."""
        self._observe(RankFaulted(rank=self.first_rank + failed.rank, reason=failed.failure.reason))
        run = self._running
        if run is None or run.has_ended or run.generation != failed.generation:
            return False
        run.failures.append(failed)
        if len(run.failures) == 1:
            assert self._group is not None
            run.failed_at = asyncio.get_running_loop().time()
            self._group.abort(failed.generation)
            self._watchdog.leave("a failure on one rank", with_new_links=True)
        return True

    def _note_end_of_run(self) -> None:
        run = self._running
        if run is not None:
            run.has_ended = True
            if run.failures:
                seconds = asyncio.get_running_loop().time() - run.failed_at
                self._observe(GroupRecovered(cause=None, seconds=seconds))

    async def _all_ready(self, events: "asyncio.Queue[_Event]") -> tuple[Ready, ...]:
        ready: dict[int, Ready] = {}
        while len(ready) < self.plan.topology.world_size:
            event = await events.get()
            if isinstance(event, Ready):
                ready[event.rank] = event
                self._observe(RankChanged(rank=self.first_rank + event.rank, up=True))
            elif isinstance(event, LoadFailed):
                self.is_unusable = True
                self.give_up(event.message)
                raise _StartError(event.message)
            elif isinstance(event, _Loss):
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
        if self._trouble is not None:
            cause, began = self._trouble
            self._observe(GroupRecovered(cause=cause, seconds=asyncio.get_running_loop().time() - began))
            self._trouble = None
        self._set_ready(ready)

    def _set_ready(self, ready: tuple[Ready, ...]) -> None:
        self.ready = ready
        self.detail = "ready" if ready else "the ranks are starting"
        self.changed.ring()

    async def _bury(self, loss: _Loss) -> None:
        run, self._running = self._running, None
        if self._trouble is None:  # else the ranks have not been ready since
            began = run.failed_at if run is not None and run.failures else asyncio.get_running_loop().time()
            self._trouble = (loss.cause, began)
        self._set_ready(())
        for rank in range(self.plan.topology.world_size):
            self._observe(RankChanged(rank=self.first_rank + rank, up=False))
        if not self.fatal.done():
            self._observe(GroupRestarting(cause=loss.cause, detail=loss.detail + loss.remark))
        if self._group is not None:
            group, self._group = self._group, None
            await self._to_thread(functools.partial(self._end, group.kill))
            if self._left_behind:
                self.give_up(self._left_behind)

    def _end(self, end: Callable[[], None]) -> None:
        """On a thread: end a group, or note what does not end."""
        try:
            end()
        except LeftBehindError as error:
            self._left_behind = str(error)
            structlog.get_logger().error("ranks were left behind", detail=self._left_behind)

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
        """Declare that these ranks cannot work any more; `fatal` tells whoever waits for it."""
        if not self.fatal.done():
            self.detail = detail
            self.fatal.set_result(detail)
            self.changed.ring()


def _worst(failures: list[RankFailed]) -> RankFailed:
    """The one to tell the caller: too large a video is what he can do something about."""
    return next((each for each in failures if each.failure.reason is Reason.OUT_OF_MEMORY), failures[0])


def _named(ranks: tuple[int, ...]) -> str:
    """Ranks of other hosts, in their order, in the words of a sentence."""
    first, last = ranks[0], ranks[-1]
    if last - first + 1 > len(ranks) or len(ranks) <= 2:
        return f"ranks of other hosts ({', '.join(map(str, ranks))})"
    return f"ranks {first} to {last} of other hosts"


class _StartError(Exception):
    """A group that did not come to be ready."""


class _AwaitedError(_StartError):
    """A group that is still to be completed by other hosts, which are waited for as long as it takes."""
