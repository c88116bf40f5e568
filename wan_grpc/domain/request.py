"""What a caller asks for, and what that means once every open value is filled in.

Knows the rules of each field. Does not know protobuf, and does no work.
"""

import math
import re
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, TypeVar

from wan_grpc.domain.errors import InvalidRequestError, Violation
from wan_grpc.domain.formats import FORMATS, Encoding, OutputFormat, encoding_violations, resolve_encoding
from wan_grpc.domain.images import ImageFacts, ImageFit, size_of_same_aspect
from wan_grpc.domain.variants import ModelCard

UNLIMITED_S = math.inf
MAX_SEED = 2**63 - 1
MAX_FPS = 120
MAX_GUIDANCE = 100.0
MAX_FLOW_SHIFT = 100.0
_CONTROL: Final = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")
"""Unicode's category Cc but for tabs and line ends."""
_SURROGATE: Final = re.compile("[\ud800-\udfff]")

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
    preview_every_steps: int | None = None
    image: bytes | None = None
    """The first image, as a file."""
    last_image: bytes | None = None
    image_fit: ImageFit | None = None
    """None: the video has the aspect of its image, and at most as many pixels as `width` times `height`."""
    output_format: OutputFormat | None = None
    encoding: Encoding = Encoding()
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
    encoding: Encoding = Encoding()
    """Every value that applies to the format."""
    image_sha256: str = ""
    """Of the first image as received; empty for none."""
    last_image_sha256: str = ""
    image_fit: ImageFit | None = None
    """How images were brought to the size of the video; None without images."""
    preview_every_steps: int = 0
    """Denoising steps from one preview to the next; 0 for no previews."""

    def shows_preview_after(self, step: int) -> bool:
        """Whether a preview is due when `step` steps are denoised."""
        return step > 0 and self.preview_every_steps > 0 and step % self.preview_every_steps == 0

    @property
    def frame_bytes(self) -> int:
        return self.width * self.height * 3

    @property
    def has_image(self) -> bool:
        return bool(self.image_sha256 or self.last_image_sha256)


def resolve(
    request: GenerationRequest,
    card: ModelCard,
    *,
    fallback_seed: int,
    first: ImageFacts | None = None,
    last: ImageFacts | None = None,
    found: tuple[Violation, ...] = (),
) -> VideoRequest:
    """Fill every open value of `request` from `card` and from what its images turned out to be.

    found: what is wrong with the images, to be told with the rest.

    Raises:
        InvalidRequestError: naming every field that breaks a rule, with the rule.
    """
    asked_width = _either(request.width, card.defaults.width)
    asked_height = _either(request.height, card.defaults.height)
    width, height = asked_width, asked_height
    if first is not None and request.image_fit is None and asked_width > 0 and asked_height > 0:
        width, height = size_of_same_aspect(first, area=asked_width * asked_height, multiple=card.size_multiple)
    video = _filled(request, card, width=width, height=height, fallback_seed=fallback_seed, first=first, last=last)
    violations = (
        *_text_violations(video, card),
        *_size_violations(request, asked_width, asked_height, card),
        *_length_violations(video, card),
        *_number_violations(request, video, card),
        *_image_violations(request, video, card, first=first, last=last, area=asked_width * asked_height),
        *_format_violations(video, card),
        *_job_violations(request),
        *found,
    )
    if violations:
        raise InvalidRequestError(violations)
    return video


def _filled(
    request: GenerationRequest,
    card: ModelCard,
    *,
    width: int,
    height: int,
    fallback_seed: int,
    first: ImageFacts | None,
    last: ImageFacts | None,
) -> VideoRequest:
    defaults = card.defaults
    guidance = _either(request.guidance_scale, defaults.guidance_scale)
    has_own_default = request.guidance_scale is None and card.has_two_experts
    second_default = defaults.guidance_scale_2 if has_own_default else guidance
    output_format = _either(request.output_format, OutputFormat.MP4_H264)
    return VideoRequest(
        prompt=request.prompt,
        negative_prompt=_either(request.negative_prompt, defaults.negative_prompt),
        width=width,
        height=height,
        num_frames=_either(request.num_frames, 1 if FORMATS[output_format].is_picture else defaults.num_frames),
        fps=_either(request.fps, defaults.fps),
        num_inference_steps=_either(request.num_inference_steps, defaults.num_inference_steps),
        guidance_scale=guidance,
        guidance_scale_2=_either(request.guidance_scale_2, second_default),
        flow_shift=_either(request.flow_shift, defaults.flow_shift),
        boundary_ratio=_either(request.boundary_ratio, defaults.boundary_ratio),
        seed=_either(request.seed, fallback_seed),
        output_format=output_format,
        encoding=resolve_encoding(request.encoding, output_format),
        image_sha256=first.sha256 if first else "",
        last_image_sha256=last.sha256 if last else "",
        image_fit=_either(request.image_fit, ImageFit.COVER) if first or last else None,
        preview_every_steps=_either(request.preview_every_steps, 0),
    )


def _either(asked: T | None, default: T) -> T:
    return default if asked is None else asked


def _text_violations(video: VideoRequest, card: ModelCard) -> Iterator[Violation]:
    if not video.prompt.strip():
        yield Violation(field="spec.prompt", description="must not be empty", reason="REQUIRED")
    for field, text in (("spec.prompt", video.prompt), ("spec.negative_prompt", video.negative_prompt)):
        if _SURROGATE.search(text):
            yield Violation(field=field, description="holds half of a surrogate pair", reason="NOT_UNICODE")
        if control := _CONTROL.search(text):
            sentence = f"holds the control character U+{ord(control[0]):04X}"
            yield Violation(field=field, description=sentence, reason="CONTROL_CHARACTER")
        size = len(text.encode("utf-8", "surrogatepass"))
        if size > card.limits.max_prompt_bytes:
            sentence = f"{size} bytes of UTF-8; at most {card.limits.max_prompt_bytes}"
            yield Violation(field=field, description=sentence, reason="TOO_LONG")


def _size_violations(request: GenerationRequest, width: int, height: int, card: ModelCard) -> Iterator[Violation]:
    for field, value in (("spec.width", width), ("spec.height", height)):
        if value < card.size_multiple or value % card.size_multiple:
            sentence = f"{value} is not a positive multiple of {card.size_multiple}"
            yield Violation(field=field, description=sentence, reason="NOT_A_MULTIPLE")
        if value > card.max_side:
            sentence = f"{value} is more than {card.max_side}"
            yield Violation(field=field, description=sentence, reason="TOO_LARGE")
    if width > 0 and height > 0 and width * height > card.limits.max_area:
        sentence = f"{width} x {height} = {width * height} pixels a frame; at most {card.limits.max_area}"
        field = "spec.height" if request.width is None and request.height is not None else "spec.width"
        yield Violation(field=field, description=sentence, reason="TOO_LARGE")


def _length_violations(video: VideoRequest, card: ModelCard) -> Iterator[Violation]:
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
        # `accepted` tells it nevertheless, and what it tells can be sent again.
        if not card.has_two_experts and video.guidance_scale_2 != video.guidance_scale:
            sentence = "this model has one expert: guidance_scale is its guidance"
            yield Violation(field="spec.guidance_scale_2", description=sentence, reason="DOES_NOT_APPLY")
    if not 0.0 < video.flow_shift <= MAX_FLOW_SHIFT:
        sentence = f"{video.flow_shift} is not above 0 and at most {MAX_FLOW_SHIFT}"
        yield Violation(field="spec.flow_shift", description=sentence, reason="OUT_OF_RANGE")
    if video.boundary_ratio is not None:
        yield from _outside("spec.boundary_ratio", video.boundary_ratio, 0.0, 1.0)
        if not card.has_two_experts:
            sentence = "this model has one expert, so there is no boundary between experts"
            yield Violation(field="spec.boundary_ratio", description=sentence, reason="DOES_NOT_APPLY")
    yield from _outside("spec.seed", video.seed, 0, MAX_SEED)
    yield from _outside("spec.preview_every_steps", video.preview_every_steps, 0, steps)


def _image_violations(
    request: GenerationRequest,
    video: VideoRequest,
    card: ModelCard,
    *,
    first: ImageFacts | None,
    last: ImageFacts | None,
    area: int,
) -> Iterator[Violation]:
    if card.needs_image and request.image is None:
        sentence = "this model makes a video from its first image, which must be given"
        yield Violation(field="spec.image", description=sentence, reason="REQUIRED")
    if request.image is not None and not card.takes_image:
        sentence = "this model makes videos from text alone"
        yield Violation(field="spec.image", description=sentence, reason="DOES_NOT_APPLY")
    if request.last_image is not None and not card.takes_last_image:
        sentence = "this model takes no last image"
        yield Violation(field="spec.last_image", description=sentence, reason="DOES_NOT_APPLY")
    elif request.last_image is None and card.needs_last_image:
        sentence = "this model makes a video from its first to its last image, which must be given"
        yield Violation(field="spec.last_image", description=sentence, reason="REQUIRED")
    elif request.last_image is not None and video.num_frames == 1:
        sentence = "a video of one frame has no last image beside its first"
        yield Violation(field="spec.last_image", description=sentence, reason="DOES_NOT_APPLY")
    if request.image_fit is not None and request.image is None and request.last_image is None:
        sentence = "there is no image to fit"
        yield Violation(field="spec.image_fit", description=sentence, reason="DOES_NOT_APPLY")
    for field, image in (("spec.image", first), ("spec.last_image", last)):
        if image is not None:
            yield from _fit_violations(field, image, video)
    if first is not None and request.image_fit is None:
        yield from _aspect_violations(first, video, card, area=area)


def _fit_violations(field: str, image: ImageFacts, video: VideoRequest) -> Iterator[Violation]:
    if min(video.width, video.height) <= 0:
        return  # which has been complained about
    if video.image_fit is ImageFit.EXACT and image.width * video.height != image.height * video.width:
        sentence = f"{image.width} x {image.height} does not have the aspect of {video.width} x {video.height}"
        yield Violation(field=field, description=sentence, reason="OTHER_ASPECT")


def _aspect_violations(image: ImageFacts, video: VideoRequest, card: ModelCard, *, area: int) -> Iterator[Violation]:
    """A size that follows from an image may break rules that the sizes that were asked for keep."""
    if 0 < area < video.width * video.height or max(video.width, video.height) > card.max_side:
        sentence = (
            f"{image.width} x {image.height} is too long for a video of the same aspect with at most {area} pixels a "
            f"frame and {card.max_side} a side; name an image_fit and a size"
        )
        yield Violation(field="spec.image", description=sentence, reason="OTHER_ASPECT")


def _format_violations(video: VideoRequest, card: ModelCard) -> Iterator[Violation]:
    name, rule = video.output_format, FORMATS[video.output_format]
    if name not in card.formats:
        sentence = f"{name} is not one of {', '.join(card.formats)}"
        yield Violation(field="spec.output_format", description=sentence, reason="NOT_SERVED")
    if rule.is_picture and video.num_frames != 1:
        sentence = f"{name} is one picture, and num_frames is {video.num_frames}"
        yield Violation(field="spec.output_format", description=sentence, reason="DOES_NOT_FIT")
    if rule.max_fps is not None and video.fps > rule.max_fps:
        sentence = f"{name} has at most {rule.max_fps} frames a second, and fps is {video.fps}"
        yield Violation(field="spec.output_format", description=sentence, reason="DOES_NOT_FIT")
    pixels = video.width * video.height * video.num_frames
    if rule.max_pixels is not None and pixels > rule.max_pixels:
        sentence = f"{name} is for small videos: {pixels} pixels in all frames; at most {rule.max_pixels}"
        yield Violation(field="spec.output_format", description=sentence, reason="DOES_NOT_FIT")
    longest, shortest = max(video.width, video.height), min(video.width, video.height)
    if rule.max_side < longest <= card.max_side or 0 < shortest < rule.min_side:
        sentence = f"{name} has sides of {rule.min_side} to {rule.max_side} pixels, not {video.width} x {video.height}"
        yield Violation(field="spec.output_format", description=sentence, reason="DOES_NOT_FIT")
    yield from encoding_violations(video.encoding, name)


def _job_violations(request: GenerationRequest) -> Iterator[Violation]:
    if request.request_id is not None and not _is_uuid4(request.request_id):
        sentence = "is not a UUID of version 4 in its 36-character form"
        yield Violation(field="request_id", description=sentence, reason="NOT_A_UUID4")
    if request.max_duration_s is not None and not 0.0 < request.max_duration_s < math.inf:
        sentence = f"{request.max_duration_s} s is not a positive, finite time"
        yield Violation(field="spec.max_duration", description=sentence, reason="OUT_OF_RANGE")
    if request.detach_grace_s is not None and not request.detach_grace_s >= 0.0:
        sentence = f"{request.detach_grace_s} s is not zero or more"
        yield Violation(field="spec.detach_grace", description=sentence, reason="OUT_OF_RANGE")


def _outside(field: str, value: float, low: float, high: float) -> Iterator[Violation]:
    if not low <= value <= high:  # NaN compares false with everything, so it lands here too
        sentence = f"{value} is not between {low} and {high}"
        yield Violation(field=field, description=sentence, reason="OUT_OF_RANGE")


def _is_uuid4(text: str) -> bool:
    try:
        return str(uuid.UUID(text)) == text.lower() and uuid.UUID(text).version == 4
    except ValueError:
        return False
