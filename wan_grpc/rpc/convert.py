"""From messages to values and back. Refuses what a message can say and a value cannot; decides nothing else.

Knows both vocabularies. Does not know what a model allows: domain/request.py does.
"""

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from types import MappingProxyType
from typing import Any, TypeVar

import google_crc32c
from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from wan_grpc.domain.errors import Failure, InvalidRequestError, NotSupportedError, Violation
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
from wan_grpc.domain.formats import OutputFormat
from wan_grpc.domain.request import UNLIMITED_S, GenerationRequest, VideoRequest, resolve
from wan_grpc.domain.variants import Expert, ModelCard
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
        OutputFormat.RAW_RGB24: pb.OUTPUT_FORMAT_RAW_RGB24,
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
)
T = TypeVar("T")
R = TypeVar("R")


# ---- messages to values ---------------------------------------------------------------------------------------------


def to_domain(message: GenerateRequest | CreateGenerationRequest, card: ModelCard) -> GenerationRequest:
    """The request that a message makes.

    Raises:
        NotSupportedError: naming every field whose behaviour this server does not have.
        InvalidRequestError: naming every field that breaks a rule, those of `card` included.
    """
    spec = message.spec
    _refuse_unserved(spec)
    request = GenerationRequest(
        prompt=spec.prompt,
        output_format=_output_format(spec.output_format),
        request_id=message.request_id.lower() or None,  # the letters of a UUID have no case
        max_duration_s=_seconds(spec.max_duration) if spec.HasField("max_duration") else None,
        detach_grace_s=_detach_grace_s(spec),
        **{name: getattr(spec, name) for name in _COPIED_FIELDS if spec.HasField(name)},
    )
    if violations := tuple(_wire_violations(spec)):
        raise InvalidRequestError((*violations, *_further_violations(request, card, violations)))
    return request


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
    """Raises: InvalidRequestError: for numbers that are no state."""
    known: dict[int, State] = {wire: state for state, wire in STATES.items()}
    wrong = tuple(
        _violation(f"states[{index}]", f"{value} is not a state", "UNKNOWN_VALUE")
        for index, value in enumerate(values)
        if value not in known
    )
    if wrong:
        raise InvalidRequestError(wrong)
    return frozenset(known[value] for value in values)


def _refuse_unserved(spec: pb.GenerationSpec) -> None:
    said = {f"spec.{field.name}" for field, value in spec.ListFields() if _says_something(value)}
    fields = tuple(path for path in UNSERVED_FIELDS if path in said)
    sentences = [f"{path}: {UNSERVED_FIELDS[path]}" for path in fields]
    number = spec.output_format
    if number in pb.OutputFormat.values() and number not in (*OUTPUT_FORMATS.values(), pb.OUTPUT_FORMAT_UNSPECIFIED):
        fields += ("spec.output_format",)
        sentences.append(f"spec.output_format: this server does not serve {pb.OutputFormat.Name(number)}")
    if fields:
        raise NotSupportedError("; ".join(sentences), fields=fields)


def _says_something(value: Any) -> bool:
    """False for values that mean what an unset field does: zero, the empty string, a message without fields."""
    if isinstance(value, bytes):
        return True
    return bool(value.ListFields()) if hasattr(value, "ListFields") else bool(value)


def _output_format(number: int) -> OutputFormat | None:
    return next((ours for ours, wire in OUTPUT_FORMATS.items() if wire == number), None)


def _detach_grace_s(spec: pb.GenerationSpec) -> float | None:
    if spec.HasField("detach_grace"):
        return _seconds(spec.detach_grace)
    return UNLIMITED_S if spec.detach_unlimited else None


def _wire_violations(spec: pb.GenerationSpec) -> Iterator[Violation]:
    if spec.output_format not in pb.OutputFormat.values():
        yield _violation("spec.output_format", f"{spec.output_format} is not an output format", "UNKNOWN_VALUE")
    for name in ("max_duration", "detach_grace"):
        value: Duration = getattr(spec, name)
        if not _is_duration(value):
            sentence = f"{value.seconds} s and {value.nanos} ns are not a duration of google.protobuf"
            yield _violation(f"spec.{name}", sentence, "NOT_A_DURATION")


def _is_duration(value: Duration) -> bool:
    same_sign = value.seconds * value.nanos >= 0
    return same_sign and abs(value.seconds) <= _MAX_DURATION_S and abs(value.nanos) < 1_000_000_000


def _further_violations(
    request: GenerationRequest, card: ModelCard, told: tuple[Violation, ...]
) -> tuple[Violation, ...]:
    """What the model's own rules would refuse too, so that the caller hears of everything in one answer."""
    try:
        resolve(request, card, fallback_seed=0)
    except InvalidRequestError as error:
        fields = {violation.field for violation in told}
        return tuple(violation for violation in error.violations if violation.field not in fields)
    return ()


def _violation(field: str, description: str, reason: str) -> Violation:
    return Violation(field=field, description=description, reason=reason)


def _seconds(value: Duration) -> float:
    return value.seconds + value.nanos / 1e9


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
        output_format=OUTPUT_FORMATS[video.output_format],
        max_duration=_maybe(to_duration, max_duration_s),
    )
    if detach_grace_s == UNLIMITED_S:
        resolved.detach_unlimited = True
    elif detach_grace_s is not None:
        resolved.detach_grace.CopyFrom(to_duration(detach_grace_s))
    return resolved


def to_progress(progress: Progress) -> pb.Progress:
    return pb.Progress(
        stage=STAGES[progress.stage],
        step=progress.step,
        total_steps=progress.total_steps,
        expert=None if progress.expert is None else EXPERTS[progress.expert],
        step_time=_maybe(to_duration, progress.step_time_s),
        eta=_maybe(to_duration, progress.eta_s),
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
