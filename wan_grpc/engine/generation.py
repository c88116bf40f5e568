"""One accepted generation: its numbered log, its file, who watches it, and how it ended.

Knows one generation. Does not know the queue, the ranks or other generations.
"""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeVar

from wan_grpc.domain.errors import CANCELLING_REASONS, Failure
from wan_grpc.domain.events import (
    Completed,
    Failed,
    Generation,
    LoggedEvent,
    Preview,
    Progress,
    Queued,
    Record,
    Stage,
    StageTime,
    State,
    VideoInfo,
)
from wan_grpc.domain.images import InputFrames
from wan_grpc.domain.request import GenerationRequest
from wan_grpc.engine.bell import Bell
from wan_grpc.engine.encoding import Encoding
from wan_grpc.engine.intake import Prepared
from wan_grpc.store.artifacts import Artifact

E = TypeVar("E")


@dataclass(slots=True)
class StageClock:
    """Which stage runs, since when, and how long the earlier ones took. Monotonic seconds."""

    stage: Stage | None = None
    began: float = 0.0
    times: tuple[StageTime, ...] = ()
    previews_s: float = 0.0
    """Of the stage that runs, what previews took, which other videos need not have."""

    def enter(self, stage: Stage) -> StageTime | None:
        """Begin `stage`; the time of the one before it, if there was one."""
        ended = self.leave()
        self.stage, self.began, self.previews_s = stage, time.monotonic(), 0.0
        return ended

    def leave(self) -> StageTime | None:
        if self.stage is None:
            return None
        ended = StageTime(stage=self.stage, seconds=self.elapsed_s)
        self.times = (*self.times, ended)
        self.stage = None
        return ended

    @property
    def elapsed_s(self) -> float:
        return time.monotonic() - self.began


class Running:
    """What exists only while a generation is computed or encoded."""

    def __init__(self, encoding: Encoding, leave_ranks: Callable[[], None]) -> None:
        """leave_ranks: has those that compute it leave it at the next step boundary, as long as they are at it."""
        self.encoding = encoding
        self.leave_ranks = leave_ranks
        self.info: asyncio.Future[VideoInfo] | None = None
        self.task: asyncio.Task[None] | None = None
        self.is_encoded = False
        self.is_finishing = False
        self.failure: Failure | None = None

    def stop_with(self, failure: Failure) -> None:
        """The first failure is the one that the caller hears."""
        self.failure = self.failure or failure


class GenerationLog:
    """The record of one generation. Belongs to the engine's loop, but for the artifact, which is thread-safe."""

    def __init__(
        self,
        name: str,
        request: GenerationRequest,
        prepared: Prepared,
        *,
        detach_grace_s: float,
    ) -> None:
        self.name = name
        self.request = request
        """Without the bytes of its images: see intake.fingerprint."""
        self.video = prepared.video
        self.warnings = prepared.warnings
        self._frames = prepared.frames
        self.detach_grace_s = detach_grace_s
        self.state = State.QUEUED
        self.created_s = time.time()
        self.born = time.monotonic()
        self.started_s: float | None = None
        self.ended_s: float | None = None
        self.expires_s: float | None = None
        self.records: list[Record] = []
        self.clock = StageClock()
        self.artifact: Artifact | None = None
        self.num_watchers = 0
        self.num_readers = 0
        self.running: Running | None = None
        self.timers: list[asyncio.TimerHandle] = []
        self.grace: asyncio.TimerHandle | None = None
        self.changed = Bell()
        self.ended = asyncio.Event()

    def log(self, event: LoggedEvent) -> None:
        assert not self.state.is_final or isinstance(event, Completed | Failed)
        if isinstance(event, Preview):
            self._drop_preview()
        self.records.append(Record(sequence=len(self.records) + 1, time_s=time.time(), event=event))
        self.changed.ring()

    def _drop_preview(self) -> None:
        """Forget the picture of the last preview, which a newer one makes pointless: of each log one is kept."""
        for index in reversed(range(len(self.records))):
            if isinstance(old := self.records[index].event, Preview):
                self.records[index] = replace(self.records[index], event=replace(old, data=b""))
                return

    def take_frames(self) -> InputFrames:
        """The pictures for the ranks, which are not kept here any longer."""
        frames, self._frames = self._frames, InputFrames()
        return frames

    def start(self) -> None:
        assert self.state is State.QUEUED
        self.state = State.RUNNING
        self.started_s = time.time()

    def succeed(self, completed: Completed) -> None:
        self._end(State.SUCCEEDED, completed)

    def fail(self, failure: Failure) -> None:
        state = State.CANCELLED if failure.reason in CANCELLING_REASONS else State.FAILED
        self._end(state, Failed(failure=failure))

    def _end(self, state: State, event: Completed | Failed) -> None:
        assert not self.state.is_final, f"{self.name} ended twice"
        self.state = state
        self._frames = InputFrames()
        self.ended_s = time.time()
        for timer in (*self.timers, *([self.grace] if self.grace else [])):
            timer.cancel()
        self.log(event)
        self.ended.set()

    @property
    def last_sequence(self) -> int:
        return len(self.records)

    @property
    def age_s(self) -> float:
        return time.monotonic() - self.born

    @property
    def left_s(self) -> float | None:
        """Seconds until it is complete, as its newest progress tells."""
        told = self.last_record(Progress)
        if told is None or not isinstance(told.event, Progress) or told.event.eta_s is None:
            return None
        return max(0.0, told.event.eta_s - (time.time() - told.time_s))

    @property
    def video_bytes(self) -> int:
        """Bytes of the video that can be read now."""
        return self.artifact.size_bytes if self.artifact is not None else 0

    def after(self, sequence: int) -> tuple[Record, ...]:
        """Records that follow `sequence`, less those that a later one makes pointless.

        Those are old progress, old positions and old previews.
        """
        new = self.records[sequence:]
        kept: list[Record] = []
        following: Record | None = None
        has_preview = False
        for record in reversed(new):
            if isinstance(record.event, Preview):
                if not has_preview:
                    kept.append(record)
                    following = None  # the step that it belongs to stays before it
                has_preview = True
            else:
                if following is None or not _superseded(record, following):
                    kept.append(record)
                following = record
        return tuple(reversed(kept))

    def snapshot(self) -> Generation:
        queued = self._last(Queued) if self.state is State.QUEUED else None
        failed = self._last(Failed)
        return Generation(
            name=self.name,
            state=self.state,
            video=self.video,
            created_s=self.created_s,
            started_s=self.started_s,
            ended_s=self.ended_s,
            expires_s=self.expires_s,
            queue_position=queued.position if queued else None,
            progress=self._last(Progress),
            completed=self._last(Completed),
            failure=failed.failure if failed else None,
            request_id=self.request.request_id,
            warnings=self.warnings,
            max_duration_s=self.request.max_duration_s,
            detach_grace_s=self.detach_grace_s,
        )

    def last_record(self, kind: type[E]) -> Record | None:
        return next((record for record in reversed(self.records) if isinstance(record.event, kind)), None)

    def _last(self, kind: type[E]) -> E | None:
        return next((r.event for r in reversed(self.records) if isinstance(r.event, kind)), None)


def _superseded(record: Record, following: Record) -> bool:
    old, new = record.event, following.event
    if isinstance(old, Queued):
        return isinstance(new, Queued)
    return isinstance(old, Progress) and isinstance(new, Progress) and old.stage is new.stage
