"""From messages to values and back. Refuses what a message can say and a value cannot; decides nothing else.

Knows both vocabularies. Does not know what a model allows: domain/request.py does.
"""

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType
from typing import TypeVar

import google_crc32c
from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from wan_grpc.domain.errors import Failure, InvalidRequestError, Violation
from wan_grpc.domain.events import (
    Accepted,
    Chunk,
    Completed,
    Event,
    Failed,
    Generation,
    Heartbeat,
    Preview,
    Progress,
    Queued,
    RankMemory,
    Record,
    Resumed,
    Stage,
    State,
    VideoInfo,
)
from wan_grpc.domain.formats import Encoding, OutputFormat, PixelFormat
from wan_grpc.domain.images import ImageFit
from wan_grpc.domain.request import UNLIMITED_S, GenerationRequest, VideoRequest
from wan_grpc.domain.variants import Expert
from wan_grpc.rpc.errors import code_number
from wan_grpc.rpc.unserved import UNSERVED_FIELDS
from wan_grpc.v1 import generation_pb2 as pb
from wan_grpc.v1.video_generation_service_pb2 import CreateGenerationRequest, GenerateRequest

EXPERTS: Mapping[Expert, pb.Expert] = MappingProxyType(
    {Expert.HIGH_NOISE: pb.EXPERT_HIGH_NOISE, Expert.LOW_NOISE: pb.EXPERT_LOW_NOISE}
)
STAGES: Mapping[Stage, pb.Stage] = MappingProxyType(
    {
        Stage.TEXT: pb.STAGE_TEXT,
        Stage.IMAGE: pb.STAGE_IMAGE,
        Stage.DENOISE: pb.STAGE_DENOISE,
        Stage.DECODE: pb.STAGE_DECODE,
        Stage.ENCODE: pb.STAGE_ENCODE,
    }
)
STATES: Mapping[State, pb.GenerationState] = MappingProxyType(
    {
        State.QUEUED: pb.GENERATION_STATE_QUEUED,
        State.RUNNING: pb.GENERATION_STATE_RUNNING,
        State.SUCCEEDED: pb.GENERATION_STATE_SUCCEEDED,
        State.FAILED: pb.GENERATION_STATE_FAILED,
        State.CANCELLED: pb.GENERATION_STATE_CANCELLED,
    }
)
OUTPUT_FORMATS: Mapping[OutputFormat, pb.OutputFormat] = MappingProxyType(
    {
        OutputFormat.MP4_H264: pb.OUTPUT_FORMAT_MP4_H264,
        OutputFormat.MP4_H264_PROGRESSIVE: pb.OUTPUT_FORMAT_MP4_H264_PROGRESSIVE,
        OutputFormat.MP4_H265: pb.OUTPUT_FORMAT_MP4_H265,
        OutputFormat.WEBM_VP9: pb.OUTPUT_FORMAT_WEBM_VP9,
        OutputFormat.WEBM_AV1: pb.OUTPUT_FORMAT_WEBM_AV1,
        OutputFormat.MKV_FFV1: pb.OUTPUT_FORMAT_MKV_FFV1,
        OutputFormat.RAW_RGB24: pb.OUTPUT_FORMAT_RAW_RGB24,
        OutputFormat.WEBP_ANIMATION: pb.OUTPUT_FORMAT_WEBP_ANIMATION,
        OutputFormat.GIF: pb.OUTPUT_FORMAT_GIF,
        OutputFormat.PNG: pb.OUTPUT_FORMAT_PNG,
        OutputFormat.JPEG: pb.OUTPUT_FORMAT_JPEG,
        OutputFormat.WEBP: pb.OUTPUT_FORMAT_WEBP,
    }
)
PIXEL_FORMATS: Mapping[PixelFormat, pb.PixelFormat] = MappingProxyType(
    {
        PixelFormat.YUV420P: pb.PIXEL_FORMAT_YUV420P,
        PixelFormat.YUV422P: pb.PIXEL_FORMAT_YUV422P,
        PixelFormat.YUV444P: pb.PIXEL_FORMAT_YUV444P,
        PixelFormat.YUV420P10: pb.PIXEL_FORMAT_YUV420P10,
        PixelFormat.YUV444P10: pb.PIXEL_FORMAT_YUV444P10,
        PixelFormat.RGB24: pb.PIXEL_FORMAT_RGB24,
    }
)
IMAGE_FITS: Mapping[ImageFit, pb.ImageFit] = MappingProxyType(
    {
        ImageFit.COVER: pb.IMAGE_FIT_COVER,
        ImageFit.CONTAIN: pb.IMAGE_FIT_CONTAIN,
        ImageFit.STRETCH: pb.IMAGE_FIT_STRETCH,
        ImageFit.EXACT: pb.IMAGE_FIT_EXACT,
    }
)
_NAME = re.compile(r"generations/[A-Za-z0-9._-]{1,64}")
_MAX_DURATION_S = 315_576_000_000
"""Bound of google.protobuf.Duration, 10,000 years."""
_COPIED_FIELDS = (
    "negative_prompt",
    "width",
    "height",
    "num_frames",
    "num_inference_steps",
    "fps",
    "guidance_scale",
    "guidance_scale_2",
    "flow_shift",
    "boundary_ratio",
    "seed",
    "preview_every_steps",
    "image",
    "last_image",
)
_MAX_STATES = 100
T = TypeVar("T")
R = TypeVar("R")
Word = TypeVar("Word", bound=StrEnum)


# ---- messages to values ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What a message asks for, as far as a value can say it."""

    request: GenerationRequest
    found: tuple[Violation, ...]
    """What the message says and no value can: words that are none, and what this server does not serve."""


def to_domain(message: GenerateRequest | CreateGenerationRequest) -> Asked:
    """The request that a message makes, and what is wrong with it beside the rules for values."""
    spec = message.spec
    found: list[Violation] = list(_unserved(spec))
    output_format = _word(spec.output_format, OUTPUT_FORMATS, "spec.output_format", found)
    encoding = _to_encoding(spec.encoding, found)
    if spec.output_format and output_format is None:
        encoding = Encoding()  # there is no format to judge it by
    request = GenerationRequest(
        prompt=spec.prompt,
        image_fit=_word(spec.image_fit, IMAGE_FITS, "spec.image_fit", found),
        output_format=output_format,
        encoding=encoding,
        request_id=message.request_id.lower() or None,  # the letters of a UUID have no case
        max_duration_s=_duration_s(spec, "max_duration", found),
        detach_grace_s=UNLIMITED_S if spec.detach_unlimited else _duration_s(spec, "detach_grace", found),
        **{name: getattr(spec, name) for name in _COPIED_FIELDS if spec.HasField(name)},
    )
    return Asked(request=request, found=tuple(found))


def check_name(name: str) -> str:
    """`name` when it can be that of a generation. Raises: InvalidRequestError."""
    if not _NAME.fullmatch(name):
        raise InvalidRequestError((_violation("name", "is not of the form generations/{id}", "NOT_A_NAME"),))
    return name


def check_not_negative(**values: int) -> None:
    """Raises: InvalidRequestError: naming every field below zero."""
    wrong = tuple(
        _violation(name, f"{value} is negative", "OUT_OF_RANGE") for name, value in values.items() if value < 0
    )
    if wrong:
        raise InvalidRequestError(wrong)


def to_states(values: Collection[int]) -> frozenset[State]:
    """Raises: InvalidRequestError: for numbers that are no state, and for more than anybody can mean."""
    if len(values) > _MAX_STATES:
        sentence = f"{len(values)} states; at most {_MAX_STATES}"
        raise InvalidRequestError((_violation("states", sentence, "TOO_MANY"),))
    known: dict[int, State] = {wire: state for state, wire in STATES.items()}
    wrong = tuple(
        _violation(f"states[{index}]", f"{value} is not a state", "UNKNOWN_VALUE")
        for index, value in enumerate(values)
        if value not in known
    )
    if wrong:
        raise InvalidRequestError(wrong)
    return frozenset(known[value] for value in values)


def _unserved(spec: pb.GenerationSpec) -> Iterator[Violation]:
    """Fields that say something; zero, the empty string and the empty list mean what an unset field does."""
    said = {f"spec.{field.name}" for field, value in spec.ListFields() if value}
    for path, sentence in UNSERVED_FIELDS.items():
        if path in said:
            yield _violation(path, sentence, "NOT_SERVED")


def _word(number: int, words: Mapping[Word, int], field: str, found: list[Violation]) -> Word | None:
    """The value for the number of an enum; None for 0, and for a number that is none, which is then told in `found`."""
    word = next((ours for ours, wire in words.items() if wire == number), None)
    if word is None and number != 0:
        found.append(_violation(field, f"{number} is none of its values", "UNKNOWN_VALUE"))
    return word


def _to_encoding(options: pb.EncodingOptions, found: list[Violation]) -> Encoding:
    rate_control = options.WhichOneof("rate_control")
    return Encoding(
        crf=options.crf if rate_control == "crf" else None,
        bitrate_bps=options.bitrate_bps if rate_control == "bitrate_bps" else None,
        quality=options.quality if options.HasField("quality") else None,
        pixel_format=_word(options.pixel_format, PIXEL_FORMATS, "spec.encoding.pixel_format", found),
    )


def _duration_s(spec: pb.GenerationSpec, name: str, found: list[Violation]) -> float | None:
    if not spec.HasField(name):
        return None
    value: Duration = getattr(spec, name)
    if _is_duration(value):
        return value.seconds + value.nanos / 1e9
    sentence = f"{value.seconds} s and {value.nanos} ns are not a duration of google.protobuf"
    found.append(_violation(f"spec.{name}", sentence, "NOT_A_DURATION"))
    return None


def _is_duration(value: Duration) -> bool:
    same_sign = value.seconds * value.nanos >= 0
    return same_sign and abs(value.seconds) <= _MAX_DURATION_S and abs(value.nanos) < 1_000_000_000


def _violation(field: str, description: str, reason: str) -> Violation:
    return Violation(field=field, description=description, reason=reason)


# ---- values to messages ---------------------------------------------------------------------------------------------


def to_event(name: str, record: Record) -> pb.GenerationEvent:
    """One event of the generation `name`; a Failed record has none, since the call ends in its status instead."""
    message = pb.GenerationEvent(sequence=record.sequence, time=to_timestamp(record.time_s), generation=name)
    _fill_event(message, record.event)
    return message


def _fill_event(message: pb.GenerationEvent, event: Event) -> None:
    match event:
        case Chunk():
            message.chunk.CopyFrom(to_chunk(event))
        case Progress():
            message.progress.CopyFrom(to_progress(event))
        case Heartbeat():
            message.heartbeat.SetInParent()
        case Queued():
            eta = None if event.eta_s is None else to_duration(event.eta_s)
            message.queued.CopyFrom(pb.Queued(position=event.position, eta=eta))
        case Accepted():
            resolved = to_resolved(event.video, event.max_duration_s, event.detach_grace_s)
            message.accepted.CopyFrom(pb.Accepted(resolved=resolved, warnings=event.warnings))
        case Preview():
            message.preview.CopyFrom(pb.Preview(step=event.step, media_type=event.media_type, data=event.data))
        case Resumed():
            message.resumed.CopyFrom(pb.Resumed(step=event.step, total_steps=event.total_steps))
        case VideoInfo():
            message.video_info.CopyFrom(_to_video_info(event))
        case Completed():
            message.completed.CopyFrom(to_completed(event))
        case Failed():
            raise AssertionError("a failure is the status of a call, not an event of it")


def to_generation(generation: Generation) -> pb.Generation:
    """The resource as it stands."""
    return pb.Generation(
        name=generation.name,
        request_id=generation.request_id or "",
        state=STATES[generation.state],
        resolved=to_resolved(generation.video, generation.max_duration_s, generation.detach_grace_s),
        warnings=generation.warnings,
        create_time=to_timestamp(generation.created_s),
        start_time=_maybe(to_timestamp, generation.started_s),
        end_time=_maybe(to_timestamp, generation.ended_s),
        expire_time=_maybe(to_timestamp, generation.expires_s),
        queue_position=generation.queue_position,
        progress=_maybe(to_progress, generation.progress),
        completed=_maybe(to_completed, generation.completed),
        error=_maybe(to_error, generation.failure),
    )


def to_resolved(video: VideoRequest, max_duration_s: float | None, detach_grace_s: float | None) -> pb.ResolvedSpec:
    """Every parameter of `video`, and the bounds of its job."""
    resolved = pb.ResolvedSpec(
        prompt=video.prompt,
        negative_prompt=video.negative_prompt,
        width=video.width,
        height=video.height,
        num_frames=video.num_frames,
        num_inference_steps=video.num_inference_steps,
        fps=video.fps,
        guidance_scale=video.guidance_scale,
        guidance_scale_2=video.guidance_scale_2,
        flow_shift=video.flow_shift,
        boundary_ratio=video.boundary_ratio,
        seed=video.seed,
        image_sha256=video.image_sha256,
        last_image_sha256=video.last_image_sha256,
        image_fit=None if video.image_fit is None else IMAGE_FITS[video.image_fit],
        output_format=OUTPUT_FORMATS[video.output_format],
        encoding=_to_encoding_options(video.encoding),
        preview_every_steps=video.preview_every_steps,
        max_duration=_maybe(to_duration, max_duration_s),
    )
    if detach_grace_s == UNLIMITED_S:
        resolved.detach_unlimited = True
    elif detach_grace_s is not None:
        resolved.detach_grace.CopyFrom(to_duration(detach_grace_s))
    return resolved


def _to_encoding_options(encoding: Encoding) -> pb.EncodingOptions:
    """Values that are None stay unset: they do not apply."""
    return pb.EncodingOptions(
        crf=encoding.crf,
        bitrate_bps=encoding.bitrate_bps,
        quality=encoding.quality,
        pixel_format=None if encoding.pixel_format is None else PIXEL_FORMATS[encoding.pixel_format],
    )


def to_progress(progress: Progress) -> pb.Progress:
    return pb.Progress(
        stage=STAGES[progress.stage],
        step=progress.step,
        total_steps=progress.total_steps,
        expert=None if progress.expert is None else EXPERTS[progress.expert],
        step_time=_maybe(to_duration, progress.step_time_s),
        eta=_maybe(to_duration, progress.eta_s),
        slowest_rank=progress.slowest_rank,
        slowest_rank_time=_maybe(to_duration, progress.slowest_rank_time_s),
    )


def to_completed(completed: Completed) -> pb.Completed:
    return pb.Completed(
        size_bytes=completed.size_bytes,
        sha256=completed.sha256,
        stage_times=[
            pb.StageTime(stage=STAGES[time.stage], duration=to_duration(time.seconds)) for time in completed.stage_times
        ],
        rank_memory=[to_rank_memory(memory) for memory in completed.rank_memory],
    )


def to_rank_memory(memory: RankMemory) -> pb.RankMemory:
    return pb.RankMemory(rank=memory.rank, peak_bytes=memory.peak_bytes)


def to_chunk(chunk: Chunk) -> pb.Chunk:
    return pb.Chunk(offset=chunk.offset, data=chunk.data, crc32c=google_crc32c.value(chunk.data))


def to_error(failure: Failure) -> pb.GenerationError:
    return pb.GenerationError(
        reason=failure.reason,
        code=code_number(failure.reason),
        message=failure.message,
        retry_delay=_maybe(to_duration, failure.retry_after_s),
    )


def _to_video_info(info: VideoInfo) -> pb.VideoInfo:
    return pb.VideoInfo(
        output_format=OUTPUT_FORMATS[info.output_format],
        media_type=info.media_type,
        width=info.width,
        height=info.height,
        num_frames=info.num_frames,
        fps=info.fps,
    )


def to_duration(seconds: float) -> Duration:
    duration = Duration()
    duration.FromNanoseconds(round(seconds * 1e9))
    return duration


def to_timestamp(unix_s: float) -> Timestamp:
    timestamp = Timestamp()
    timestamp.FromMicroseconds(round(unix_s * 1e6))  # a float of today's seconds holds no more
    return timestamp


def _maybe(convert: Callable[[T], R], value: T | None) -> R | None:
    return None if value is None else convert(value)
