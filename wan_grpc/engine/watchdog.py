"""How long the ranks of one group may be silent: a hung rank is a dead rank.

Knows how long steps took, and whether a process is stopped. Does not know pipes, nor what becomes of a hung group.
"""

import asyncio
import contextlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Final

import psutil

from wan_grpc.domain.events import Progress, Stage
from wan_grpc.domain.request import VideoRequest

_FACTOR: Final = 3.0
_TICK_S: Final = 1.0
_LEAST_PAUSE_S: Final = 0.01
_TYPICAL_FROM: Final[Mapping[Stage, int]] = MappingProxyType({Stage.IMAGE: 3, Stage.DENOISE: 1, Stage.DECODE: 2})
"""The first step of a stage that takes as long as the ones after it. Before it come a look at the image and a slice of
one picture, where later ones have four; and each text may or may not be one that was encoded before."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """How long the ranks may be silent: three times as long as the step under way should take, and `grace_s`."""

    grace_s: float = 10.0
    first_step_timeout_s: float = 600.0
    """For a step of which nothing is known."""


@dataclass(slots=True)
class StepTimes:
    """The longest step of each stage, as it was when a group did it for the first time, and as it was last."""

    _longest: dict[tuple[Stage, bool], tuple[float, float]] = field(default_factory=dict)

    def learn(self, stage: Stage, video: VideoRequest, seconds: float, *, is_first: bool) -> None:
        """The longest step of this stage of `video`. `is_first`: on a group that had not done the stage before."""
        is_first = is_first or stage is Stage.TEXT  # a text that was encoded before tells nothing of the next one
        known = self._longest.get((stage, is_first))
        if known is None or seconds > known[1] or not is_first:
            self._longest[stage, is_first] = (_work(stage, video), seconds)

    def expect(self, stage: Stage, video: VideoRequest, *, is_first: bool) -> float | None:
        """Seconds that no step should exceed; None before one was timed.

        More work takes longer by the square of it, as attention does; less is not relied on to be faster.
        """
        is_known = (stage, is_first) in self._longest
        known = self._longest.get((stage, is_first if is_known else True))
        if known is None:
            return None
        work, seconds = known
        return seconds * max(1.0, _work(stage, video) / work) ** 2


def _is_typical(progress: Progress) -> bool:
    """Whether this step took as long as the ones after it will."""
    return progress.step >= _TYPICAL_FROM.get(progress.stage, math.inf)


def _work(stage: Stage, video: VideoRequest) -> float:
    return 1.0 if stage is Stage.TEXT else float(video.width * video.height * video.num_frames)


class Watchdog:
    """Over one group. All methods belong to the loop, but what `watched` returns."""

    def __init__(self, patience: Patience, times: StepTimes, pids: Callable[[], Mapping[int, int]]) -> None:
        """times: what earlier generations took, on any group. pids: the processes on this host, by rank."""
        self._patience = patience
        self._times = times
        self._pids = pids
        self._video: VideoRequest | None = None
        self._last = Progress(stage=Stage.TEXT, step=0, total_steps=1)
        self._last_s = 0.0
        self._longest: dict[Stage, float] = {}
        self._stages_timed: set[Stage] = set()
        self._stages_done: set[Stage] = set()
        self._awaited = ""
        self._since = self._now()
        self._stopped_s: dict[int, float] = {}
        self._is_taking = False
        self._num_taken = 0
        self._num_taken_before = 0

    # ---- what the ranks are at --------------------------------------------------------------------------------------

    def begin(self, video: VideoRequest) -> None:
        """The ranks were told to compute `video`."""
        self._video = video
        self._last = Progress(stage=Stage.TEXT, step=0, total_steps=1)
        self._last_s = 0.0
        self._longest, self._stages_timed = {}, set()
        self._awaited = "step"
        self._since = self._now()

    def take(self, progress: Progress) -> None:
        """The ranks have come this far. It gives them time for the next step, unless they are about to leave."""
        now = self._now()
        silent_s = now - self._since if self._awaited == "step" else 0.0
        # What came late, all at once, tells of this process; the device's own time does not depend on it.
        self._last_s = max(progress.step_time_s or 0.0, silent_s) if progress.step else 0.0
        self._longest[progress.stage] = max(self._last_s, self._longest.get(progress.stage, 0.0))
        if _is_typical(progress) or progress.step == progress.total_steps:
            self._stages_timed.add(progress.stage)
        self._last = progress
        if self._awaited == "step":
            self._since = now

    def leave(self, why: str) -> None:
        """The ranks were told to leave, and have the time of one step for it. `why`: in the words of a sentence."""
        self._awaited = f"end after {why}"
        self._since = self._now()

    def end(self) -> None:
        """The ranks are free: nothing is expected of them."""
        assert self._video is not None
        for stage in self._stages_timed:
            self._times.learn(stage, self._video, self._longest[stage], is_first=stage not in self._stages_done)
        self._stages_done |= self._stages_timed
        self._video = None

    def watched(self, take_frame: Callable[[memoryview], None]) -> Callable[[memoryview], None]:
        """`take_frame`, for the thread that reads the ranks. A frame is progress, and its taking is not their time."""

        def take(frame: memoryview) -> None:
            self._is_taking = True
            try:
                take_frame(frame)
            finally:
                self._num_taken += 1
                self._is_taking = False

        return take

    # ---- the watch --------------------------------------------------------------------------------------------------

    async def until_hung(self) -> str:
        """Return when the ranks hang, with a sentence about it."""
        while True:
            pause_s = max(_LEAST_PAUSE_S, min(_TICK_S, self._bound_s() - self._silent_s()))
            before = self._now()
            await asyncio.sleep(pause_s)
            passed_s = self._now() - before
            if passed_s > pause_s + _TICK_S:  # it was this process that did not run, and there may be much to read
                self._since = min(self._now(), self._since + passed_s)
                continue
            self._look(passed_s)
            if sentence := self._verdict():
                return sentence

    def _look(self, passed_s: float) -> None:
        if self._is_taking or self._num_taken != self._num_taken_before:
            self._num_taken_before = self._num_taken
            self._since = self._now()
        before = self._stopped_s
        stopped = [rank for rank, pid in self._pids().items() if _is_stopped(pid)]
        self._stopped_s = {rank: before[rank] + passed_s if rank in before else 0.0 for rank in stopped}

    def _verdict(self) -> str:
        expected_s, silent_s = self._expected_s(), self._silent_s()
        stopped = [f"rank {rank} (process {self._pids()[rank]})" for rank in self._stopped_s]
        if silent_s >= self._bound_s():
            usual = (
                f"{self._patience.first_step_timeout_s:g} s are allowed for a step that was never timed"
                if expected_s is None
                else f"it was expected within {expected_s:.3g} s"
            )
            named = "".join(f"; {rank} is stopped" for rank in stopped)
            return f"no {self._awaited} came for {silent_s:.3g} s, and {usual}{named}"
        longest_s = max(self._stopped_s.values(), default=0.0)
        if expected_s is None and longest_s >= self._patience.grace_s:
            return f"{' and '.join(stopped)} did not run for {longest_s:.3g} s: stopped by a signal or a debugger"
        return ""

    def _bound_s(self) -> float:
        if self._video is None:
            return math.inf
        expected_s = self._expected_s()
        if expected_s is None:
            return self._patience.first_step_timeout_s
        return _FACTOR * expected_s + self._patience.grace_s

    def _expected_s(self) -> float | None:
        """How long the step under way should take; None while that is not known, and when there is none."""
        if self._video is None:
            return None
        stage = self._last.stage
        if _is_typical(self._last):
            return self._last_s
        known_s = self._times.expect(stage, self._video, is_first=stage not in self._stages_done)
        if self._last.step == self._last.total_steps:
            return max(self._last_s, known_s or 0.0)  # what follows a stage is less than a step of it
        return None if known_s is None else max(self._last_s, known_s)

    def _silent_s(self) -> float:
        return self._now() - self._since

    def _now(self) -> float:
        return asyncio.get_running_loop().time()


def _is_stopped(pid: int) -> bool:
    """Whether a process does not run because of a signal or a debugger."""
    with contextlib.suppress(psutil.Error):  # one that has ended is found by others
        return psutil.Process(pid).status() in (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP)
    return False
