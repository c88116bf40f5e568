"""What a caller asks for, and what that means once every open value is filled in.

Knows the rules of each field. Does not know protobuf, and does no work.
"""

import math
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeVar

from wan_grpc.domain.errors import InvalidRequestError, Violation
from wan_grpc.domain.variants import ModelCard, OutputFormat

UNLIMITED_S = math.inf
MAX_SEED = 2**63 - 1
MAX_FPS = 120
MAX_GUIDANCE = 100.0
MAX_FLOW_SHIFT = 100.0

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRequest:
    """A request as it was made; None where the caller left the value to the server."""

    prompt: str
    negative_prompt: str | None = None
    width: int | None = None
    height: int | None = None
    num_frames: int | None = None
    fps: int | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    guidance_scale_2: float | None = None
    flow_shift: float | None = None
    boundary_ratio: float | None = None
    seed: int | None = None
    output_format: OutputFormat | None = None
    request_id: str | None = None
    """UUID4; the same id and body attaches to the same generation."""
    max_duration_s: float | None = None
    """Bound on the job from acceptance to its last byte; None for no bound."""
    detach_grace_s: float | None = None
    """How long the job goes on with nobody watching; None for the server's default, UNLIMITED_S for ever."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VideoRequest:
    """One video with every value resolved: what the ranks compute and what `accepted` repeats."""

    prompt: str
    negative_prompt: str
    width: int
    height: int
    num_frames: int
    fps: int
    num_inference_steps: int
    guidance_scale: float
    """Of the high-noise expert; 1.0 or less runs no unconditional pass at all."""
    guidance_scale_2: float
    """Of the low-noise expert."""
    flow_shift: float
    boundary_ratio: float | None
    """Share of the training timesteps at and above which the high-noise expert works; None with one expert."""
    seed: int
    output_format: OutputFormat

    @property
    def frame_bytes(self) -> int:
        return self.width * self.height * 3


def resolve(request: GenerationRequest, card: ModelCard, *, fallback_seed: int) -> VideoRequest:
    """Fill every open value of `request` from `card`.

    Raises:
        InvalidRequestError: naming every field that breaks a rule, with the rule.
    """
    defaults = card.defaults
    guidance = _either(request.guidance_scale, defaults.guidance_scale)
    second_default = defaults.guidance_scale_2 if request.guidance_scale is None else guidance
    video = VideoRequest(
        prompt=request.prompt,
        negative_prompt=_either(request.negative_prompt, defaults.negative_prompt),
        width=_either(request.width, defaults.width),
        height=_either(request.height, defaults.height),
        num_frames=_either(request.num_frames, defaults.num_frames),
        fps=_either(request.fps, defaults.fps),
        num_inference_steps=_either(request.num_inference_steps, defaults.num_inference_steps),
        guidance_scale=guidance,
        guidance_scale_2=_either(request.guidance_scale_2, second_default),
        flow_shift=_either(request.flow_shift, defaults.flow_shift),
        boundary_ratio=_either(request.boundary_ratio, defaults.boundary_ratio),
        seed=_either(request.seed, fallback_seed),
        output_format=_either(request.output_format, OutputFormat.MP4_H264),
    )
    violations = (
        *_text_violations(video, card),
        *_size_violations(video, card),
        *_number_violations(request, video, card),
        *_job_violations(request, card),
    )
    if violations:
        raise InvalidRequestError(violations)
    return video


def _either(asked: T | None, default: T) -> T:
    return default if asked is None else asked


def _text_violations(video: VideoRequest, card: ModelCard) -> Iterator[Violation]:
    if not video.prompt.strip():
        yield Violation(field="spec.prompt", description="must not be empty", reason="REQUIRED")
    for field, text in (("spec.prompt", video.prompt), ("spec.negative_prompt", video.negative_prompt)):
        if not _is_unicode(text):
            yield Violation(field=field, description="holds half of a surrogate pair", reason="NOT_UNICODE")
        size = len(text.encode("utf-8", "surrogatepass"))
        if size > card.limits.max_prompt_bytes:
            sentence = f"{size} bytes of UTF-8; at most {card.limits.max_prompt_bytes}"
            yield Violation(field=field, description=sentence, reason="TOO_LONG")


def _size_violations(video: VideoRequest, card: ModelCard) -> Iterator[Violation]:
    for field, value in (("spec.width", video.width), ("spec.height", video.height)):
        if value < card.size_multiple or value % card.size_multiple:
            sentence = f"{value} is not a positive multiple of {card.size_multiple}"
            yield Violation(field=field, description=sentence, reason="NOT_A_MULTIPLE")
        if value > card.max_side:
            sentence = f"{value} is more than {card.max_side}"
            yield Violation(field=field, description=sentence, reason="TOO_LARGE")
    if video.width > 0 and video.height > 0 and video.width * video.height > card.limits.max_area:
        sentence = (
            f"{video.width} x {video.height} = {video.width * video.height} pixels a frame; "
            f"at most {card.limits.max_area}"
        )
        yield Violation(field="spec.width", description=sentence, reason="TOO_LARGE")
    if video.num_frames < 1 or (video.num_frames - 1) % card.temporal_factor:
        sentence = f"{video.num_frames} is not 1 more than a multiple of {card.temporal_factor}"
        yield Violation(field="spec.num_frames", description=sentence, reason="NOT_A_MULTIPLE")
    if video.num_frames > card.limits.max_num_frames:
        sentence = f"{video.num_frames} is more than {card.limits.max_num_frames}"
        yield Violation(field="spec.num_frames", description=sentence, reason="TOO_LARGE")


def _number_violations(request: GenerationRequest, video: VideoRequest, card: ModelCard) -> Iterator[Violation]:
    steps = card.limits.max_inference_steps
    yield from _outside("spec.num_inference_steps", video.num_inference_steps, 1, steps)
    yield from _outside("spec.fps", video.fps, 1, MAX_FPS)
    yield from _outside("spec.guidance_scale", video.guidance_scale, 0.0, MAX_GUIDANCE)
    if request.guidance_scale_2 is not None:  # else it is guidance_scale again, and has been complained about
        yield from _outside("spec.guidance_scale_2", video.guidance_scale_2, 0.0, MAX_GUIDANCE)
    if not 0.0 < video.flow_shift <= MAX_FLOW_SHIFT:
        sentence = f"{video.flow_shift} is not above 0 and at most {MAX_FLOW_SHIFT}"
        yield Violation(field="spec.flow_shift", description=sentence, reason="OUT_OF_RANGE")
    if video.boundary_ratio is not None:
        yield from _outside("spec.boundary_ratio", video.boundary_ratio, 0.0, 1.0)
        if card.defaults.boundary_ratio is None:
            sentence = "this model has one expert, so there is no boundary between experts"
            yield Violation(field="spec.boundary_ratio", description=sentence, reason="DOES_NOT_APPLY")
    yield from _outside("spec.seed", video.seed, 0, MAX_SEED)


def _job_violations(request: GenerationRequest, card: ModelCard) -> Iterator[Violation]:
    if request.output_format is not None and request.output_format not in card.formats:
        sentence = f"{request.output_format} is not one of {', '.join(card.formats)}"
        yield Violation(field="spec.output_format", description=sentence, reason="NOT_SERVED")
    if request.request_id is not None and not _is_uuid4(request.request_id):
        sentence = "is not a UUID of version 4 in its 36-character form"
        yield Violation(field="request_id", description=sentence, reason="NOT_A_UUID4")
    if request.max_duration_s is not None and not 0.0 < request.max_duration_s < math.inf:
        sentence = f"{request.max_duration_s} s is not a positive, finite time"
        yield Violation(field="spec.max_duration", description=sentence, reason="OUT_OF_RANGE")
    if request.detach_grace_s is not None and not request.detach_grace_s >= 0.0:
        sentence = f"{request.detach_grace_s} s is negative"
        yield Violation(field="spec.detach_grace", description=sentence, reason="OUT_OF_RANGE")


def _outside(field: str, value: float, low: float, high: float) -> Iterator[Violation]:
    if not low <= value <= high:  # NaN compares false with everything, so it lands here too
        sentence = f"{value} is not between {low} and {high}"
        yield Violation(field=field, description=sentence, reason="OUT_OF_RANGE")


def _is_unicode(text: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in text)


def _is_uuid4(text: str) -> bool:
    try:
        return str(uuid.UUID(text)) == text.lower() and uuid.UUID(text).version == 4
    except ValueError:
        return False
