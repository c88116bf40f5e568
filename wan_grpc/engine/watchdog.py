"""How long the ranks of one group may be silent: a hung rank is a dead rank.

Knows how long steps took, and whether a process is stopped. Does not know pipes, nor what becomes of a hung group.
"""

import asyncio
import contextlib
import math
from collections import deque
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
_NUM_REMEMBERED: Final = 3
"""Generations of a size of which the slowest counts; what was slower before is forgotten."""
_NUM_SIZES: Final = 32
_LEAST_TEXT_S: Final = 1.0
"""What takes less may be texts that were encoded before, which tell nothing."""
_SLICE: Final = 4
"""Pictures of one latent frame."""
_SLICES: Final = 3
"""Of the video, that a preview decodes."""
_TYPICAL_FROM: Final[Mapping[Stage, int]] = MappingProxyType({Stage.IMAGE: 3, Stage.DENOISE: 1, Stage.DECODE: 2})
"""The first step of a stage that takes as long as the ones after it. Before it come a look at the image and a slice of
one picture, where later ones have four; and each text may or may not be one that was encoded before."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Expected:
    """What is known of the step under way."""

    seconds: float
    """That it should not exceed."""
    measured_s: float
    """The time, of a step that may have been smaller, from which that follows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """How long the ranks may be silent: three times as long as the step under way should take, and `grace_s`."""

    grace_s: float = 10.0
    first_step_timeout_s: float = 600.0
    """For a step of which nothing is known; what is only guessed from smaller ones grants no more."""

    def bound_s(self, expected: Expected | None) -> float:
        if expected is None:
            return self.first_step_timeout_s
        return min(_FACTOR * expected.seconds, self._most_s(expected)) + self.grace_s

    def is_guess(self, expected: Expected) -> bool:
        """Whether so much is expected that it is not granted."""
        return _FACTOR * expected.seconds > self._most_s(expected)

    def _most_s(self, expected: Expected) -> float:
        return max(self.first_step_timeout_s, _FACTOR * expected.measured_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class Hang:
    """Ranks that are given up."""

    detail: str
    """A sentence for everybody."""
    setting: str
    """What allows more, for the operator."""

    def __str__(self) -> str:
        return f"{self.detail} ({self.setting})"


@dataclass(slots=True)
class StepTimes:
    """The longest steps of the last generations: by stage, whether ranks did such for the first time, and work."""

    _longest: dict[tuple[Stage, bool], dict[float, deque[float]]] = field(default_factory=dict)

    def learn(self, stage: Stage, video: VideoRequest, seconds: float, *, is_first: bool) -> None:
        """The longest step of this stage of `video`. `is_first`: on a group that had not done such a one before."""
        sizes = self._longest.setdefault(_key(stage, is_first=is_first), {})
        work = _work(stage, video)
        last = sizes.pop(work, deque(maxlen=_NUM_REMEMBERED))
        if stage is not Stage.TEXT or seconds >= _LEAST_TEXT_S or not last:
            last.append(seconds)
        sizes[work] = last  # the latest at the end
        if len(sizes) > _NUM_SIZES:
            del sizes[next(iter(sizes))]

    def expect(self, stage: Stage, video: VideoRequest, *, is_first: bool) -> Expected | None:
        """What no step should exceed; None before one was timed.

        More work takes longer by the square of it, as attention does; less is not relied on to be faster. Of all that
        can be concluded so, the least holds.
        """
        sizes = self._longest.get(_key(stage, is_first=is_first)) or self._longest.get(_key(stage, is_first=True), {})
        work = _work(stage, video)
        concluded = (
            Expected(seconds=max(last) * max(1.0, work / known) ** 2, measured_s=max(last))
            for known, last in sizes.items()
        )
        return min(concluded, key=lambda expected: expected.seconds, default=None)


def _key(stage: Stage, *, is_first: bool) -> tuple[Stage, bool]:
    return stage, is_first or stage is Stage.TEXT  # a text that was encoded before tells nothing of the next one


def _is_typical(progress: Progress) -> bool:
    """Whether this step took as long as the ones after it will."""
    return progress.step >= _TYPICAL_FROM.get(progress.stage, math.inf)


def _work(stage: Stage, video: VideoRequest) -> float:
    """Of one step, in whatever unit."""
    area = video.width * video.height
    match stage:
        case Stage.DENOISE:
            return float(area * ((video.num_frames - 1) // _SLICE + 1))
        case Stage.IMAGE | Stage.DECODE:
            return float(area * min(video.num_frames, _SLICE))  # the whole of a single picture is the first slice
    return 1.0


def _shape(stage: Stage, video: VideoRequest) -> tuple[Stage, int, int, int]:
    return stage, video.width, video.height, video.num_frames


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
        self._shapes_done: set[tuple[Stage, int, int, int]] = set()
        self._awaited = ""
        self._links_s = 0.0
        self._extra_s = 0.0
        self._preview_s = 0.0
        self._since = self._now()
        self._stopped_s: dict[int, float] = {}
        self._is_taking = False
        self._num_taken = 0
        self._num_taken_before = 0

    # ---- what the ranks are at --------------------------------------------------------------------------------------

    def set_links(self, links_s: float) -> None:
        """How long the ranks took to make their links to each other."""
        self._links_s = links_s

    def begin(self, video: VideoRequest) -> None:
        """The ranks were told to compute `video`."""
        self._video = video
        self._last = Progress(stage=Stage.TEXT, step=0, total_steps=1)
        self._last_s = 0.0
        self._longest, self._stages_timed = {}, set()
        self._awaited = "step"
        self._extra_s = 0.0
        self._preview_s = 0.0
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
        self._preview_s = self._bound_of_preview_s(progress)
        if self._awaited == "step":
            self._since = now

    def take_preview(self) -> None:
        """It is there, and the time of the next step begins."""
        self._preview_s = 0.0
        if self._awaited == "step":
            self._since = self._now()

    def _bound_of_preview_s(self, progress: Progress) -> float:
        """How long the ranks may be at the preview that follows this step; 0 for none.

        It is some slices of decoding, of which the first is no longer than the others.
        """
        video = self._video
        if video is None or progress.stage is not Stage.DENOISE or not video.shows_preview_after(progress.step):
            return 0.0
        slice_of = self._times.expect(Stage.DECODE, video, is_first=self._is_first(Stage.DECODE, video))
        if slice_of is None:
            return self._patience.bound_s(None)
        taken = {"seconds": _SLICES * slice_of.seconds, "measured_s": _SLICES * slice_of.measured_s}
        return self._patience.bound_s(Expected(**taken))

    def leave(self, why: str, *, with_new_links: bool = False) -> None:
        """The ranks were told to leave, and have the time of one step for it. `why`: in the words of a sentence.

        with_new_links: they make their links anew before they say that they have left.
        """
        self._extra_s = _FACTOR * self._links_s if with_new_links else 0.0
        self._awaited = f"end after {why}"
        self._since = self._now()

    def end(self) -> None:
        """The ranks are free: nothing is expected of them."""
        assert self._video is not None
        for stage in self._stages_timed:
            self._times.learn(stage, self._video, self._longest[stage], is_first=self._is_first(stage, self._video))
        self._shapes_done |= {_shape(stage, self._video) for stage in self._stages_timed}
        self._video = None

    def _is_first(self, stage: Stage, video: VideoRequest) -> bool:
        """Whether these ranks warm up for it: also those that are warm choose kernels for each new shape."""
        return _shape(stage, video) not in self._shapes_done

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

    async def until_hung(self) -> Hang:
        """Return when the ranks hang."""
        while True:
            pause_s = max(_LEAST_PAUSE_S, min(_TICK_S, self._bound_s() - self._silent_s()))
            before = self._now()
            await asyncio.sleep(pause_s)
            passed_s = self._now() - before
            if passed_s > pause_s + _TICK_S:  # it was this process that did not run, and there may be much to read
                self._since = min(self._now(), self._since + passed_s)
                continue
            self._look(passed_s)
            if hang := self._verdict():
                return hang

    def _look(self, passed_s: float) -> None:
        if self._is_taking or self._num_taken != self._num_taken_before:
            self._num_taken_before = self._num_taken
            self._since = self._now()
        before = self._stopped_s
        stopped = [rank for rank, pid in self._pids().items() if is_stopped(pid)]
        self._stopped_s = {rank: before[rank] + passed_s if rank in before else 0.0 for rank in stopped}

    def _verdict(self) -> Hang | None:
        if self._silent_s() >= self._bound_s():
            return self._silence(self._silent_s(), self._expected())
        longest_s = max(self._stopped_s.values(), default=0.0)
        if longest_s >= self._patience.grace_s:
            detail = f"{' and '.join(self._stopped())} did not run for {longest_s:.3g} s"
            return Hang(detail=f"{detail}: stopped by a signal or a debugger", setting=self._grace())
        return None

    def _silence(self, silent_s: float, expected: Expected | None) -> Hang:
        setting = "--first-step-timeout-s"
        if expected is None:
            usual = f"{self._patience.first_step_timeout_s:g} s are allowed for a step that was never timed"
        elif self._patience.is_guess(expected):
            usual = (
                f"{self._patience.bound_s(expected):.3g} s are allowed for a step of which only smaller ones were timed"
            )
        else:
            usual = f"it was expected within {expected.seconds:.3g} s"
            setting = f"allowed are {_FACTOR:g} times that and {self._grace()}"
        if self._extra_s:
            setting += f", and {self._extra_s:.3g} s for new links between the ranks"
        if self._preview_s:
            setting += f", and {self._preview_s:.3g} s for a preview"
        named = "".join(f"; {rank} is stopped" for rank in self._stopped())
        return Hang(detail=f"no {self._awaited} came for {silent_s:.3g} s, and {usual}{named}", setting=setting)

    def _stopped(self) -> list[str]:
        return [f"rank {rank} (process {self._pids()[rank]})" for rank in self._stopped_s]

    def _grace(self) -> str:
        return f"--watchdog-grace-s {self._patience.grace_s:g}"

    def _bound_s(self) -> float:
        if self._video is None:
            return math.inf
        return self._patience.bound_s(self._expected()) + self._extra_s + self._preview_s

    def _expected(self) -> Expected | None:
        """How long the step under way should take; None while that is not known, and when there is none."""
        if self._video is None:
            return None
        stage, last_s = self._last.stage, self._last_s
        if _is_typical(self._last):
            return Expected(seconds=last_s, measured_s=last_s)
        known = self._times.expect(stage, self._video, is_first=self._is_first(stage, self._video))
        if known is None:  # what follows a stage is less than a step of it
            is_over = self._last.step == self._last.total_steps
            return Expected(seconds=last_s, measured_s=last_s) if is_over else None
        return Expected(seconds=max(last_s, known.seconds), measured_s=max(last_s, known.measured_s))

    def _silent_s(self) -> float:
        return self._now() - self._since

    def _now(self) -> float:
        return asyncio.get_running_loop().time()


def is_stopped(pid: int) -> bool:
    """Whether a process does not run because of a signal or a debugger."""
    with contextlib.suppress(psutil.Error):  # one that has ended is found by others
        return psutil.Process(pid).status() in (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP)
    return False
