"""What a caller sees, as frozen values, and how they are read from the messages of the API.

Enumerations are strings: the API's value without its prefix in lower case, such as `denoise`, `high_noise` or
`mp4_h264`, so that a value that a newer server has added does no harm. Times are seconds, points in time Unix times.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Final, TypeAlias, TypeVar

from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp

from wan_grpc.v1 import generation_pb2 as pb

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Resolved:
    """A request with every open value filled in; sent again, these values give the same video."""

    prompt: str
    negative_prompt: str
    width: int
    height: int
    num_frames: int
    num_inference_steps: int
    fps: int
    guidance_scale: float
    guidance_scale_2: float
    flow_shift: float
    boundary_ratio: float | None
    seed: int
    image_sha256: str
    """Of the first image as it was sent, lower-case hexadecimal; empty for none."""
    last_image_sha256: str
    image_fit: str | None
    """How images were brought to the size of the video; None without images."""
    output_format: str
    crf: int | None
    """None, here and below: the format knows no such thing."""
    bitrate_bps: int | None
    quality: int | None
    pixel_format: str | None
    preview_every_steps: int
    """0: no previews."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Accepted:
    """The generation exists and will run."""

    resolved: Resolved
    warnings: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Queued:
    position: int
    """How many generations start before this one."""
    eta_s: float | None
    """Expected seconds until it starts; None until the server can tell."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """A stage began (step 0) or the device finished a step of it."""

    stage: str
    """`text`, `image`, `denoise`, `decode` or `encode`."""
    step: int
    total_steps: int
    expert: str | None
    """`high_noise` or `low_noise`; None outside denoising and for step 0."""
    step_time_s: float | None
    eta_s: float | None
    """Expected seconds until the video is complete; None until the server can tell."""
    slowest_rank: int | None = None
    """The rank that worked longest for this step; None when one rank computes alone, and for step 0."""
    slowest_rank_time_s: float | None = None
    """How long it worked, without its waits for others."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Preview:
    """A small picture of what is being made."""

    step: int
    media_type: str
    data: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Resumed:
    """The server took the work up again after an interruption, from this step on."""

    step: int
    total_steps: int


@dataclass(frozen=True, slots=True, kw_only=True)
class VideoInfo:
    """What the bytes that follow are."""

    output_format: str
    media_type: str
    width: int
    height: int
    num_frames: int
    fps: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """Bytes that have arrived, are verified, and are already where the caller wanted them."""

    offset: int
    data: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class StageTime:
    stage: str
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class RankMemory:
    rank: int
    peak_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Completed:
    """The generation succeeded. As an event: the video is complete, verified, and in its place."""

    size_bytes: int
    sha256: str
    stage_times: tuple[StageTime, ...]
    """Encoding overlaps decoding, so these may add up to more than the whole."""
    rank_memory: tuple[RankMemory, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Reattaching:
    """The connection was cut; after `delay_s` the client watches on from where it was. Made by the client itself."""

    attempt: int
    delay_s: float
    message: str


Event: TypeAlias = Accepted | Queued | Progress | Preview | Resumed | VideoInfo | Chunk | Completed | Reattaching


@dataclass(frozen=True, slots=True, kw_only=True)
class Ending:
    """Why a generation has no video."""

    reason: str
    """Stable cause in upper case, e.g. `CANCELLED_BY_CALLER`."""
    message: str
    retry_after_s: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationStatus:
    """A generation as it stands on the server."""

    name: str
    """Resource name, `generations/{id}`."""
    request_id: str
    state: str
    """`queued`, `running`, `succeeded`, `failed` or `cancelled`."""
    resolved: Resolved
    warnings: tuple[str, ...]
    create_time_s: float
    start_time_s: float | None
    end_time_s: float | None
    expire_time_s: float | None
    queue_position: int | None
    progress: Progress | None
    completed: Completed | None
    error: Ending | None


def read_event(event: pb.GenerationEvent) -> Event | None:
    """The event as a value; None for a heartbeat, and for kinds that this client does not know."""
    kind = event.WhichOneof("event")
    read = _READERS.get(kind or "")
    return None if read is None else read(getattr(event, str(kind)))


def read_generation(generation: pb.Generation) -> GenerationStatus:
    return GenerationStatus(
        name=generation.name,
        request_id=generation.request_id,
        state=word(pb.GenerationState, generation.state),
        resolved=_read_resolved(generation.resolved),
        warnings=tuple(generation.warnings),
        create_time_s=_unix_s(generation.create_time),
        start_time_s=_if_set(generation, "start_time", _unix_s),
        end_time_s=_if_set(generation, "end_time", _unix_s),
        expire_time_s=_if_set(generation, "expire_time", _unix_s),
        queue_position=_if_set(generation, "queue_position", int),
        progress=_if_set(generation, "progress", _read_progress),
        completed=_if_set(generation, "completed", _read_completed),
        error=_if_set(generation, "error", _read_ending),
    )


def word(enum: Any, number: int) -> str:
    """The name of an enumeration's value without the prefix, in lower case; a number where this client knows none."""
    if number not in enum.values():
        return str(number)
    prefix = enum.Name(0).removesuffix("UNSPECIFIED")
    return str(enum.Name(number)).removeprefix(prefix).lower()


def words(enum: Any, numbers: Iterable[int]) -> tuple[str, ...]:
    return tuple(word(enum, number) for number in numbers)


def _read_resolved(spec: pb.ResolvedSpec) -> Resolved:
    encoding = spec.encoding
    return Resolved(
        prompt=spec.prompt,
        negative_prompt=spec.negative_prompt,
        width=spec.width,
        height=spec.height,
        num_frames=spec.num_frames,
        num_inference_steps=spec.num_inference_steps,
        fps=spec.fps,
        guidance_scale=spec.guidance_scale,
        guidance_scale_2=spec.guidance_scale_2,
        flow_shift=spec.flow_shift,
        boundary_ratio=_if_set(spec, "boundary_ratio", float),
        seed=spec.seed,
        image_sha256=spec.image_sha256,
        last_image_sha256=spec.last_image_sha256,
        image_fit=word(pb.ImageFit, spec.image_fit) if spec.image_fit else None,
        output_format=word(pb.OutputFormat, spec.output_format),
        crf=_if_set(encoding, "crf", int),
        bitrate_bps=_if_set(encoding, "bitrate_bps", int),
        quality=_if_set(encoding, "quality", int),
        pixel_format=word(pb.PixelFormat, encoding.pixel_format) if encoding.pixel_format else None,
        preview_every_steps=spec.preview_every_steps,
    )


def _read_accepted(accepted: pb.Accepted) -> Accepted:
    return Accepted(resolved=_read_resolved(accepted.resolved), warnings=tuple(accepted.warnings))


def _read_queued(queued: pb.Queued) -> Queued:
    return Queued(position=queued.position, eta_s=_if_set(queued, "eta", _seconds))


def _read_progress(progress: pb.Progress) -> Progress:
    return Progress(
        stage=word(pb.Stage, progress.stage),
        step=progress.step,
        total_steps=progress.total_steps,
        expert=word(pb.Expert, progress.expert) if progress.expert else None,
        step_time_s=_if_set(progress, "step_time", _seconds),
        eta_s=_if_set(progress, "eta", _seconds),
        slowest_rank=_if_set(progress, "slowest_rank", int),
        slowest_rank_time_s=_if_set(progress, "slowest_rank_time", _seconds),
    )


def _read_preview(preview: pb.Preview) -> Preview:
    return Preview(step=preview.step, media_type=preview.media_type, data=preview.data)


def _read_resumed(resumed: pb.Resumed) -> Resumed:
    return Resumed(step=resumed.step, total_steps=resumed.total_steps)


def _read_video_info(info: pb.VideoInfo) -> VideoInfo:
    return VideoInfo(
        output_format=word(pb.OutputFormat, info.output_format),
        media_type=info.media_type,
        width=info.width,
        height=info.height,
        num_frames=info.num_frames,
        fps=info.fps,
    )


def _read_chunk(chunk: pb.Chunk) -> Chunk:
    return Chunk(offset=chunk.offset, data=chunk.data)


def _read_completed(completed: pb.Completed) -> Completed:
    return Completed(
        size_bytes=completed.size_bytes,
        sha256=completed.sha256,
        stage_times=tuple(
            StageTime(stage=word(pb.Stage, time.stage), seconds=_seconds(time.duration))
            for time in completed.stage_times
        ),
        rank_memory=tuple(
            RankMemory(rank=memory.rank, peak_bytes=memory.peak_bytes) for memory in completed.rank_memory
        ),
    )


def _read_ending(error: pb.GenerationError) -> Ending:
    return Ending(reason=error.reason, message=error.message, retry_after_s=_if_set(error, "retry_delay", _seconds))


_READERS: Final[dict[str, Callable[[Any], Event]]] = {
    "accepted": _read_accepted,
    "queued": _read_queued,
    "progress": _read_progress,
    "preview": _read_preview,
    "resumed": _read_resumed,
    "video_info": _read_video_info,
    "chunk": _read_chunk,
    "completed": _read_completed,
}


def _if_set(message: Message, field: str, read: Callable[[Any], T]) -> T | None:
    return read(getattr(message, field)) if message.HasField(field) else None


def _seconds(duration: Duration) -> float:
    return duration.seconds + duration.nanos / 1e9


def _unix_s(time: Timestamp) -> float:
    return time.seconds + time.nanos / 1e9
