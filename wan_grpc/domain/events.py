"""What a watcher of a generation sees, in the order in which it happened.

A generation keeps its own numbered log of Records. Chunks and heartbeats are made for each watcher and carry the
number of the last Record before them.
"""

from dataclasses import dataclass
from enum import StrEnum
from typing import TypeAlias

from wan_grpc.domain.errors import Failure
from wan_grpc.domain.formats import OutputFormat
from wan_grpc.domain.request import VideoRequest
from wan_grpc.domain.variants import Expert


class State(StrEnum):
    """Where a generation stands. It ends in exactly one of the last three."""

    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def is_final(self) -> bool:
        return self in (State.SUCCEEDED, State.FAILED, State.CANCELLED)


class Stage(StrEnum):
    """What is being done for a generation. Encoding overlaps decoding and ends after it."""

    TEXT = "text"
    IMAGE = "image"
    DENOISE = "denoise"
    DECODE = "decode"
    ENCODE = "encode"


@dataclass(frozen=True, slots=True, kw_only=True)
class Accepted:
    name: str
    """Resource name, `generations/{id}`."""
    video: VideoRequest
    warnings: tuple[str, ...] = ()
    max_duration_s: float | None = None
    """Bound on the whole job; None for no bound."""
    detach_grace_s: float | None = None
    """How long the job goes on with nobody watching, UNLIMITED_S for ever; None when that is not told."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Queued:
    position: int
    """How many generations start before this one: 0 is next."""
    eta_s: float | None
    """Expected seconds until it starts; None until the server has timed enough work to tell."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """A stage began (step 0) or the device finished a step of it."""

    stage: Stage
    step: int
    """Steps of this stage that are finished, 0 to total_steps."""
    total_steps: int
    expert: Expert | None = None
    """The expert that ran this step; None outside denoising and for step 0."""
    step_time_s: float | None = None
    """How long the device took for this step; None for step 0."""
    eta_s: float | None = None
    """Expected seconds until the video is complete; None until that can be told."""
    slowest_rank: int | None = None
    """The rank that worked longest for this step, waits for others not counted; None for a rank alone and step 0."""
    slowest_rank_time_s: float | None = None
    """How long it worked."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Preview:
    step: int
    media_type: str
    data: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Resumed:
    step: int
    """The first step that is computed again."""
    total_steps: int


@dataclass(frozen=True, slots=True, kw_only=True)
class VideoInfo:
    """What the bytes that follow are. Sent once, before the first chunk."""

    output_format: OutputFormat
    media_type: str
    width: int
    height: int
    num_frames: int
    fps: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RankMemory:
    rank: int
    peak_bytes: int
    """Most memory that this rank held on its device during the generation (resident set size on CPU)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StageTime:
    stage: Stage
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Completed:
    """The generation SUCCEEDED, and every byte before this was sent."""

    size_bytes: int
    sha256: str
    """Of the whole video, lower-case hexadecimal."""
    stage_times: tuple[StageTime, ...]
    rank_memory: tuple[RankMemory, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Failed:
    """The generation ended as FAILED or CANCELLED; `failure.reason` tells which and why."""

    failure: Failure


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    offset: int
    data: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Heartbeat:
    """Nothing happened for a while; the generation is alive."""


LoggedEvent: TypeAlias = Accepted | Queued | Progress | Preview | Resumed | VideoInfo | Completed | Failed
Event: TypeAlias = LoggedEvent | Chunk | Heartbeat


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One event with its place in the generation's log."""

    sequence: int
    """Counts the logged events of a generation from 1; chunks and heartbeats repeat the last one."""
    time_s: float
    """Unix time."""
    event: Event


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """A generation as it stands now."""

    name: str
    state: State
    video: VideoRequest
    created_s: float
    """Unix times, seconds; None while it has not come to that."""
    started_s: float | None = None
    ended_s: float | None = None
    expires_s: float | None = None
    """When a finished generation and its video are removed."""
    queue_position: int | None = None
    progress: Progress | None = None
    completed: Completed | None = None
    failure: Failure | None = None
    request_id: str | None = None
    warnings: tuple[str, ...] = ()
    max_duration_s: float | None = None
    detach_grace_s: float | None = None
