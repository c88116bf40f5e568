import math
import sys
import unicodedata
from dataclasses import fields, replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wan_grpc.domain.errors import InvalidRequestError, Reason, Violation
from wan_grpc.domain.formats import (
    FORMATS,
    MAX_BITRATE_BPS,
    MIN_BITRATE_BPS,
    Encoding,
    OutputFormat,
    PixelFormat,
)
from wan_grpc.domain.images import ImageFacts, ImageFit
from wan_grpc.domain.request import MAX_SEED, UNLIMITED_S, GenerationRequest, VideoRequest, resolve
from wan_grpc.domain.variants import I2V_A14B, T2V_A14B, TI2V_5B, Defaults, Limits, ModelCard, Task

CARD = ModelCard(
    model_id="Wan-AI/Wan2.2-T2V-A14B-Diffusers",
    task=Task.TEXT_TO_VIDEO,
    defaults=T2V_A14B,
    limits=Limits(max_area=1280 * 720, max_num_frames=161, max_inference_steps=100, max_prompt_bytes=20),
    size_multiple=16,
)
ONE_EXPERT = replace(CARD, defaults=replace(T2V_A14B, boundary_ratio=None))
I2V = replace(CARD, task=Task.IMAGE_TO_VIDEO, defaults=I2V_A14B, takes_last_image=True)
FIRST_AND_LAST = replace(I2V, needs_last_image=True)
TI2V = replace(CARD, task=Task.TEXT_IMAGE_TO_VIDEO, defaults=TI2V_5B, size_multiple=32)
RAW_ONLY = replace(CARD, formats=(OutputFormat.RAW_RGB24,))
ID = "7d9c1f70-4c1e-4b5c-9d5f-0a1b2c3d4e5f"

H264 = Encoding(crf=18, pixel_format=PixelFormat.YUV420P)
RAW = Encoding(pixel_format=PixelFormat.RGB24)
DEFAULT = VideoRequest(
    prompt="a cat",
    negative_prompt="",
    width=1280,
    height=720,
    num_frames=81,
    fps=16,
    num_inference_steps=40,
    guidance_scale=4.0,
    guidance_scale_2=3.0,
    flow_shift=12.0,
    boundary_ratio=0.875,
    seed=42,
    output_format=OutputFormat.MP4_H264,
    encoding=H264,
)


def facts(width: int, height: int, digit: str = "a") -> ImageFacts:
    return ImageFacts(width=width, height=height, sha256=digit * 64)


def ask(**changes: object) -> GenerationRequest:
    return GenerationRequest(**{"prompt": "a cat", **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("asked", "resolved"),
    [
        ({}, {}),
        ({"prompt": " a  dog "}, {"prompt": " a  dog "}),
        ({"negative_prompt": "blurry"}, {"negative_prompt": "blurry"}),
        ({"width": 480, "height": 832}, {"width": 480, "height": 832}),
        ({"width": 16, "height": 16, "num_frames": 1}, {"width": 16, "height": 16, "num_frames": 1}),
        ({"width": 720, "height": 1280, "num_frames": 161}, {"width": 720, "height": 1280, "num_frames": 161}),
        ({"width": 16384, "height": 48}, {"width": 16384, "height": 48}),
        ({"fps": 1}, {"fps": 1}),
        ({"fps": 120}, {"fps": 120}),
        ({"num_inference_steps": 1}, {"num_inference_steps": 1}),
        ({"num_inference_steps": 100}, {"num_inference_steps": 100}),
        # One guidance given holds for both experts; each can be given by itself.
        ({"guidance_scale": 6.0}, {"guidance_scale": 6.0, "guidance_scale_2": 6.0}),
        ({"guidance_scale_2": 6.0}, {"guidance_scale": 4.0, "guidance_scale_2": 6.0}),
        ({"guidance_scale": 0.0, "guidance_scale_2": 100.0}, {"guidance_scale": 0.0, "guidance_scale_2": 100.0}),
        ({"flow_shift": 100.0}, {"flow_shift": 100.0}),
        ({"flow_shift": 1e-9}, {"flow_shift": 1e-9}),
        ({"boundary_ratio": 0.0}, {"boundary_ratio": 0.0}),
        ({"boundary_ratio": 1.0}, {"boundary_ratio": 1.0}),
        ({"seed": 0}, {"seed": 0}),
        ({"seed": MAX_SEED}, {"seed": MAX_SEED}),
        ({"preview_every_steps": 0}, {"preview_every_steps": 0}),
        ({"preview_every_steps": 100}, {"preview_every_steps": 100}),
        ({"output_format": OutputFormat.RAW_RGB24}, {"output_format": OutputFormat.RAW_RGB24, "encoding": RAW}),
        # What bounds the job does not change the video.
        ({"request_id": ID, "max_duration_s": 1e-9, "detach_grace_s": 0.0}, {}),
        ({"request_id": ID.upper(), "max_duration_s": 1e9, "detach_grace_s": UNLIMITED_S}, {}),
        # The bound of a text is in bytes of UTF-8, and lies on this side of it.
        ({"prompt": "x" * 20}, {"prompt": "x" * 20}),
        ({"prompt": "é" * 10}, {"prompt": "é" * 10}),
        ({"prompt": "🐈" * 5, "negative_prompt": "猫" * 6}, {"prompt": "🐈" * 5, "negative_prompt": "猫" * 6}),
    ],
)
def test_what_a_request_means(asked: dict[str, object], resolved: dict[str, object]) -> None:
    """Values that are given hold, up to and with their bounds; all others are the model's."""
    assert resolve(ask(**asked), CARD, fallback_seed=42) == replace(DEFAULT, **resolved)  # type: ignore[arg-type]


def test_every_default_of_the_model_is_used() -> None:
    """A model with other defaults in every field gives another video in every field."""
    card = replace(
        CARD,
        defaults=Defaults(
            width=832,
            height=480,
            num_frames=5,
            fps=24,
            num_inference_steps=7,
            guidance_scale=5.0,
            guidance_scale_2=6.0,
            flow_shift=3.0,
            boundary_ratio=0.5,
            negative_prompt="worst quality",
        ),
    )
    video = resolve(ask(), card, fallback_seed=7)
    assert video == VideoRequest(
        prompt="a cat",
        negative_prompt="worst quality",
        width=832,
        height=480,
        num_frames=5,
        fps=24,
        num_inference_steps=7,
        guidance_scale=5.0,
        guidance_scale_2=6.0,
        flow_shift=3.0,
        boundary_ratio=0.5,
        seed=7,
        output_format=OutputFormat.MP4_H264,
        encoding=H264,
    )


def test_an_empty_negative_prompt_is_not_an_unset_one() -> None:
    """Who asks for no negative prompt gets none, also where the operator has set one."""
    card = replace(CARD, defaults=replace(T2V_A14B, negative_prompt="worst quality"))
    assert resolve(ask(negative_prompt=""), card, fallback_seed=0).negative_prompt == ""


def test_a_model_with_one_expert_has_one_guidance_and_no_boundary() -> None:
    """Unset the boundary stays None, and the second guidance repeats the first, as who repeats it may too."""
    one = replace(DEFAULT, boundary_ratio=None, guidance_scale_2=4.0)
    assert resolve(ask(), ONE_EXPERT, fallback_seed=42) == one
    assert resolve(ask(guidance_scale_2=4.0), ONE_EXPERT, fallback_seed=42) == one
    six = replace(one, guidance_scale=6.0, guidance_scale_2=6.0)
    assert resolve(ask(guidance_scale=6.0), ONE_EXPERT, fallback_seed=42) == six
    assert resolve(ask(guidance_scale=6.0, guidance_scale_2=6.0), ONE_EXPERT, fallback_seed=42) == six


@pytest.mark.parametrize(
    ("asked", "resolved"),
    [
        (Encoding(), H264),
        (Encoding(crf=0), replace(H264, crf=0)),
        (Encoding(crf=51), replace(H264, crf=51)),
        (Encoding(bitrate_bps=MIN_BITRATE_BPS), replace(H264, crf=None, bitrate_bps=10_000)),
        (Encoding(bitrate_bps=MAX_BITRATE_BPS), replace(H264, crf=None, bitrate_bps=200_000_000)),
        (Encoding(pixel_format=PixelFormat.YUV444P10), replace(H264, pixel_format=PixelFormat.YUV444P10)),
    ],
)
def test_what_encoding_options_mean(asked: Encoding, resolved: Encoding) -> None:
    """A bit rate takes the place of constant quality; all that is open is as usual for the format."""
    video = resolve(ask(encoding=asked), CARD, fallback_seed=42)
    assert video == replace(DEFAULT, encoding=resolved)


def test_a_picture_has_one_frame() -> None:
    """Who asks for a picture need not say that it is one frame."""
    video = resolve(ask(output_format=OutputFormat.JPEG), CARD, fallback_seed=42)
    assert video == replace(
        DEFAULT,
        num_frames=1,
        output_format=OutputFormat.JPEG,
        encoding=Encoding(quality=90, pixel_format=PixelFormat.YUV420P),
    )


IMAGE: dict[str, Any] = {"image": b"cat"}
BOTH: dict[str, Any] = {"image": b"cat", "last_image": b"dog"}


@pytest.mark.parametrize(
    ("asked", "first", "last", "resolved"),
    [
        # No fit named: the frame takes the aspect of the first image, within the pixels asked for.
        (IMAGE, facts(1280, 720), None, {}),
        (IMAGE, facts(4032, 3024), None, {"width": 1104, "height": 816}),
        (IMAGE, facts(3024, 4032), None, {"width": 816, "height": 1104}),
        ({**IMAGE, "width": 832, "height": 480}, facts(500, 500), None, {"width": 624, "height": 624}),
        (BOTH, facts(720, 1280), facts(5, 5, "b"), {"width": 720, "height": 1280}),
        # A fit named: exactly the frame asked for.
        ({**IMAGE, "image_fit": ImageFit.COVER}, facts(5, 5), None, {}),
        ({**IMAGE, "image_fit": ImageFit.CONTAIN}, facts(1, 9999), None, {"image_fit": ImageFit.CONTAIN}),
        (
            {**BOTH, "image_fit": ImageFit.STRETCH, "width": 480, "height": 832},
            facts(16, 9),
            facts(9, 16, "b"),
            {"width": 480, "height": 832, "image_fit": ImageFit.STRETCH},
        ),
        ({**BOTH, "image_fit": ImageFit.EXACT}, facts(16, 9), facts(3840, 2160, "b"), {"image_fit": ImageFit.EXACT}),
    ],
)
def test_what_images_mean(
    asked: dict[str, object], first: ImageFacts, last: ImageFacts | None, resolved: dict[str, object]
) -> None:
    """The size of the video, the fit and the checksums follow from the images and from what was said of them."""
    defaults = replace(DEFAULT, guidance_scale=3.5, guidance_scale_2=3.5, flow_shift=5.0, boundary_ratio=0.9)
    of_images = {"image_sha256": "a" * 64, "last_image_sha256": "b" * 64 if last else "", "image_fit": ImageFit.COVER}
    video = resolve(ask(**asked), I2V, fallback_seed=42, first=first, last=last)
    assert video == replace(defaults, **{**of_images, **resolved})  # type: ignore[arg-type]
    assert video.has_image


def test_an_image_is_optional_where_text_may_stand_alone() -> None:
    """A model of both kinds makes a video without an image in its usual size, and with one in the image's aspect."""
    alone = resolve(ask(), TI2V, fallback_seed=0)
    assert (alone.width, alone.height, alone.image_fit, alone.has_image) == (1280, 704, None, False)
    led = resolve(ask(image=b"cat"), TI2V, fallback_seed=0, first=facts(1, 1))
    assert (led.width, led.height, led.image_fit, led.has_image) == (928, 928, ImageFit.COVER, True)


def test_the_bytes_of_a_frame() -> None:
    """Three bytes a pixel."""
    assert DEFAULT.frame_bytes == 1280 * 720 * 3


# ---- every field, below, at and above its bounds --------------------------------------------------------------------

NO_NUMBER = (math.nan, math.inf, -math.inf)


def number(field: str, *, low: float, high: float, step: float) -> list[tuple[str, object, str | None]]:
    """Values of a field around its bounds, each with the reason for which it is refused or None."""
    wrong = [low - step, high + step, *(NO_NUMBER if isinstance(step, float) else ())]
    return [*((field, value, "OUT_OF_RANGE") for value in wrong), *((field, value, None) for value in (low, high))]


def encoded(name: str, value: object, reason: str | None, **more: Any) -> tuple[str, object, str | None, Any]:
    return f"encoding.{name}", value, reason, more


H265 = {"output_format": OutputFormat.MP4_H265}
PNG, JPEG, WEBP = (
    {"output_format": output_format, "num_frames": 1}
    for output_format in (OutputFormat.PNG, OutputFormat.JPEG, OutputFormat.WEBP)
)
GIF = {"output_format": OutputFormat.GIF, "width": 64, "height": 64, "num_frames": 5}
SMALL = {"width": 64, "height": 64}

EDGES: list[tuple[Any, ...]] = [
    # field, value, reason or None, and what else the request says
    ("prompt", "", "REQUIRED"),
    ("prompt", " \n\t", "REQUIRED"),
    ("prompt", "x", None),
    ("prompt", "x" * 20, None),
    ("prompt", "x" * 21, "TOO_LONG"),
    ("prompt", "猫" * 6, None),
    ("prompt", "猫" * 7, "TOO_LONG"),
    ("prompt", "a \ud800 cat", "NOT_UNICODE"),
    ("prompt", "a\tcat\r\non grass", None),
    ("prompt", "a\x00cat", "CONTROL_CHARACTER"),
    ("prompt", "a\x1bcat", "CONTROL_CHARACTER"),
    ("prompt", "a\x7fcat", "CONTROL_CHARACTER"),
    ("prompt", "a\x85cat", "CONTROL_CHARACTER"),
    ("prompt", "a\u2028cat", None),
    ("negative_prompt", "", None),
    ("negative_prompt", "x" * 20, None),
    ("negative_prompt", "x" * 21, "TOO_LONG"),
    ("negative_prompt", "\udfff", "NOT_UNICODE"),
    ("negative_prompt", "\x07", "CONTROL_CHARACTER"),
    ("width", -16, "NOT_A_MULTIPLE"),
    ("width", 0, "NOT_A_MULTIPLE"),
    ("width", 15, "NOT_A_MULTIPLE"),
    ("width", 16, None),
    ("width", 17, "NOT_A_MULTIPLE"),
    ("width", 1280, None),
    ("width", 1296, "TOO_LARGE"),
    ("width", 16384, None, {"height": 16}),
    ("width", 16400, "TOO_LARGE", {"height": 16}),
    ("height", -16, "NOT_A_MULTIPLE"),
    ("height", 0, "NOT_A_MULTIPLE"),
    ("height", 15, "NOT_A_MULTIPLE"),
    ("height", 16, None),
    ("height", 720, None),
    ("height", 728, "NOT_A_MULTIPLE", {"width": 16}),
    ("height", 736, "TOO_LARGE"),
    ("height", 16384, None, {"width": 16}),
    ("height", 16400, "TOO_LARGE", {"width": 16}),
    ("num_frames", -3, "NOT_A_MULTIPLE"),
    ("num_frames", 0, "NOT_A_MULTIPLE"),
    ("num_frames", 1, None),
    ("num_frames", 2, "NOT_A_MULTIPLE"),
    ("num_frames", 5, None),
    ("num_frames", 160, "NOT_A_MULTIPLE"),
    ("num_frames", 161, None),
    ("num_frames", 165, "TOO_LARGE"),
    *number("fps", low=1, high=120, step=1),
    *number("num_inference_steps", low=1, high=100, step=1),
    *number("guidance_scale", low=0.0, high=100.0, step=0.001),
    *number("guidance_scale_2", low=0.0, high=100.0, step=0.001),
    *((("flow_shift", value, "OUT_OF_RANGE")) for value in (*NO_NUMBER, -1.0, 0.0, -0.0, 100.001)),
    *((("flow_shift", value, None)) for value in (sys.float_info.min, 1.0, 100.0)),
    *number("boundary_ratio", low=0.0, high=1.0, step=0.001),
    *number("seed", low=0, high=MAX_SEED, step=1),
    *number("preview_every_steps", low=0, high=100, step=1),
    ("image", b"cat", "DOES_NOT_APPLY"),
    ("image", b"", "DOES_NOT_APPLY"),
    ("image", None, None),
    ("last_image", b"cat", "DOES_NOT_APPLY"),
    ("last_image", None, None),
    *((("image_fit", fit, "DOES_NOT_APPLY")) for fit in ImageFit),
    ("image_fit", None, None),
    # Formats that do not fit the video.
    *((("output_format", one, None, SMALL)) for one in OutputFormat),
    ("output_format", OutputFormat.MP4_H265, None, {"width": 8192, "height": 32, "num_frames": 1}),
    ("output_format", OutputFormat.MP4_H265, "DOES_NOT_FIT", {"width": 8208, "height": 32, "num_frames": 1}),
    ("output_format", OutputFormat.WEBP, "DOES_NOT_FIT", {"width": 16384, "height": 16}),
    ("output_format", OutputFormat.WEBP, None, {"width": 16368, "height": 16}),
    ("output_format", OutputFormat.PNG, None, {"num_frames": 1}),
    ("output_format", OutputFormat.PNG, "DOES_NOT_FIT", {"num_frames": 5}),
    ("output_format", OutputFormat.JPEG, "DOES_NOT_FIT", {"num_frames": 5}),
    ("output_format", OutputFormat.WEBP, "DOES_NOT_FIT", {"num_frames": 5}),
    ("output_format", OutputFormat.GIF, None, {**SMALL, "fps": 50}),
    ("output_format", OutputFormat.GIF, "DOES_NOT_FIT", {**SMALL, "fps": 51}),
    ("output_format", OutputFormat.GIF, "DOES_NOT_FIT", {}),
    ("output_format", OutputFormat.WEBP_ANIMATION, "DOES_NOT_FIT", {}),
    # What each format can be asked for.
    encoded("crf", -1, "OUT_OF_RANGE"),
    encoded("crf", 0, None),
    encoded("crf", 51, None),
    encoded("crf", 52, "OUT_OF_RANGE"),
    encoded("crf", 51, None, **H265),
    encoded("crf", 52, "OUT_OF_RANGE", **H265),
    encoded("crf", 0, None, output_format=OutputFormat.WEBM_VP9),
    encoded("crf", 63, None, output_format=OutputFormat.WEBM_VP9),
    encoded("crf", 64, "OUT_OF_RANGE", output_format=OutputFormat.WEBM_VP9),
    encoded("crf", 0, "OUT_OF_RANGE", output_format=OutputFormat.WEBM_AV1),
    encoded("crf", 1, None, output_format=OutputFormat.WEBM_AV1),
    encoded("crf", 18, "DOES_NOT_APPLY", output_format=OutputFormat.RAW_RGB24),
    encoded("crf", 18, "DOES_NOT_APPLY", output_format=OutputFormat.MKV_FFV1),
    encoded("crf", 18, "DOES_NOT_APPLY", **JPEG),
    encoded("bitrate_bps", 9_999, "OUT_OF_RANGE"),
    encoded("bitrate_bps", 10_000, None),
    encoded("bitrate_bps", 200_000_000, None),
    encoded("bitrate_bps", 200_000_001, "OUT_OF_RANGE"),
    encoded("bitrate_bps", 1_000_000, "DOES_NOT_APPLY", **GIF),
    encoded("quality", 0, "OUT_OF_RANGE", **JPEG),
    encoded("quality", 1, None, **JPEG),
    encoded("quality", 100, None, **WEBP),
    encoded("quality", 101, "OUT_OF_RANGE", **WEBP),
    encoded("quality", 90, "DOES_NOT_APPLY"),
    encoded("quality", 90, "DOES_NOT_APPLY", **PNG),
    encoded("pixel_format", PixelFormat.YUV444P10, None),
    encoded("pixel_format", PixelFormat.RGB24, "NOT_SERVED"),
    encoded("pixel_format", PixelFormat.YUV444P, "NOT_SERVED", output_format=OutputFormat.WEBM_AV1),
    encoded("pixel_format", PixelFormat.YUV420P, "NOT_SERVED", **PNG),
    encoded("pixel_format", PixelFormat.RGB24, None, **PNG),
    # What bounds the job.
    ("request_id", ID, None),
    ("request_id", "", "NOT_A_UUID4"),
    ("request_id", "cat", "NOT_A_UUID4"),
    *((("max_duration_s", value, "OUT_OF_RANGE")) for value in (-1.0, 0.0, *NO_NUMBER)),
    *((("max_duration_s", value, None)) for value in (1e-9, 1e9)),
    *((("detach_grace_s", value, "OUT_OF_RANGE")) for value in (-1e-9, -math.inf, math.nan)),
    *((("detach_grace_s", value, None)) for value in (0.0, 1e9, UNLIMITED_S)),
]


@pytest.mark.parametrize("edge", EDGES, ids=lambda edge: f"{edge[0]}={str(edge[1])[:20]}")
def test_every_field_at_its_bounds(edge: tuple[Any, ...]) -> None:
    """A value within its bounds is taken; one beyond is refused under its field's path, and nothing else is."""
    (name, value, reason), more = edge[:3], edge[3] if len(edge) > 3 else {}
    group, _, option = name.partition(".")
    asked = {**more, group: Encoding(**{option: value}) if option else value}
    if reason is None:
        resolve(ask(**asked), CARD, fallback_seed=0)
        return
    with pytest.raises(InvalidRequestError) as caught:
        resolve(ask(**asked), CARD, fallback_seed=0)
    field = name.removesuffix("_s") if name in ("max_duration_s", "detach_grace_s") else name
    path = field if field == "request_id" else f"spec.{field}"
    if name in ("height", "width") and reason == "TOO_LARGE" and len(more) == 0:
        assert "pixels a frame; at most 921600" in str(caught.value)
    assert [(one.field, one.reason) for one in caught.value.violations] == [(path, reason)]


def test_every_field_has_its_bounds_tested() -> None:
    """The table above leaves no field of a request out: each has a value that is taken and one that is refused."""
    named = {(edge[0], edge[2] is None) for edge in EDGES}
    names = {field.name for field in fields(GenerationRequest)} - {"encoding"}
    names |= {f"encoding.{field.name}" for field in fields(Encoding)}
    assert named == {(name, taken) for name in names for taken in (True, False)}


def test_what_a_control_character_is() -> None:
    """All of Unicode's category Cc but tab, line feed and carriage return, and nothing else."""
    refused = set()
    for character in map(chr, range(0x3000)):
        try:
            resolve(ask(prompt=f"cat{character}"), CARD, fallback_seed=0)
        except InvalidRequestError:
            refused.add(character)
    assert refused == {c for c in map(chr, range(0x3000)) if unicodedata.category(c) == "Cc"} - set("\t\n\r")


REFUSED = [
    ({"prompt": ""}, "prompt", "must not be empty", "REQUIRED"),
    ({"prompt": "é" * 11}, "prompt", "22 bytes of UTF-8; at most 20", "TOO_LONG"),
    ({"prompt": "a \ud800 cat"}, "prompt", "holds half of a surrogate pair", "NOT_UNICODE"),
    ({"negative_prompt": "\x00"}, "negative_prompt", "holds the control character U+0000", "CONTROL_CHARACTER"),
    ({"width": 1279}, "width", "1279 is not a positive multiple of 16", "NOT_A_MULTIPLE"),
    ({"width": 1296}, "width", "1296 x 720 = 933120 pixels a frame; at most 921600", "TOO_LARGE"),
    ({"height": 736}, "height", "1280 x 736 = 942080 pixels a frame; at most 921600", "TOO_LARGE"),
    ({"width": 736, "height": 1280}, "width", "736 x 1280 = 942080 pixels a frame; at most 921600", "TOO_LARGE"),
    ({"width": 16400, "height": 16}, "width", "16400 is more than 16384", "TOO_LARGE"),
    ({"num_frames": 80}, "num_frames", "80 is not 1 more than a multiple of 4", "NOT_A_MULTIPLE"),
    ({"num_frames": 165}, "num_frames", "165 is more than 161", "TOO_LARGE"),
    ({"num_inference_steps": 101}, "num_inference_steps", "101 is not between 1 and 100", "OUT_OF_RANGE"),
    ({"fps": 0}, "fps", "0 is not between 1 and 120", "OUT_OF_RANGE"),
    ({"guidance_scale": -0.1}, "guidance_scale", "-0.1 is not between 0.0 and 100.0", "OUT_OF_RANGE"),
    ({"guidance_scale_2": math.nan}, "guidance_scale_2", "nan is not between 0.0 and 100.0", "OUT_OF_RANGE"),
    ({"flow_shift": 0.0}, "flow_shift", "0.0 is not above 0 and at most 100.0", "OUT_OF_RANGE"),
    ({"boundary_ratio": 1.1}, "boundary_ratio", "1.1 is not between 0.0 and 1.0", "OUT_OF_RANGE"),
    ({"seed": -1}, "seed", f"-1 is not between 0 and {MAX_SEED}", "OUT_OF_RANGE"),
    ({"image": b"cat"}, "image", "this model makes videos from text alone", "DOES_NOT_APPLY"),
    ({"last_image": b"cat"}, "last_image", "this model takes no last image", "DOES_NOT_APPLY"),
    ({"image_fit": ImageFit.COVER}, "image_fit", "there is no image to fit", "DOES_NOT_APPLY"),
    (
        {"output_format": OutputFormat.PNG, "num_frames": 5},
        "output_format",
        "png is one picture, and num_frames is 5",
        "DOES_NOT_FIT",
    ),
    (
        {**GIF, "fps": 51},
        "output_format",
        "gif has at most 50 frames a second, and fps is 51",
        "DOES_NOT_FIT",
    ),
    (
        {"output_format": OutputFormat.GIF},
        "output_format",
        "gif is for small videos: 74649600 pixels in all frames; at most 50000000",
        "DOES_NOT_FIT",
    ),
    (
        {"output_format": OutputFormat.MP4_H265, "width": 16, "height": 8208},
        "output_format",
        f"mp4_h265 has sides of {FORMATS[OutputFormat.MP4_H265].min_side} to 8192 pixels, not 16 x 8208",
        "DOES_NOT_FIT",
    ),
    (
        {"encoding": Encoding(crf=18, bitrate_bps=10_000)},
        "encoding.bitrate_bps",
        "crf and bitrate_bps exclude each other",
        "DOES_NOT_APPLY",
    ),
    ({"encoding": Encoding(crf=52)}, "encoding.crf", "52 is not between 0 and 51", "OUT_OF_RANGE"),
    ({"encoding": Encoding(quality=9)}, "encoding.quality", "mp4_h264 has no such option", "DOES_NOT_APPLY"),
    (
        {"encoding": Encoding(pixel_format=PixelFormat.RGB24)},
        "encoding.pixel_format",
        "rgb24; mp4_h264 has yuv420p, yuv422p, yuv444p, yuv420p10, yuv444p10",
        "NOT_SERVED",
    ),
    ({"max_duration_s": math.inf}, "max_duration", "inf s is not a positive, finite time", "OUT_OF_RANGE"),
    ({"detach_grace_s": -0.5}, "detach_grace", "-0.5 s is not zero or more", "OUT_OF_RANGE"),
]


@pytest.mark.parametrize(("asked", "field", "description", "reason"), REFUSED)
def test_what_is_refused(asked: dict[str, object], field: str, description: str, reason: str) -> None:
    """Each rule names its field, the value that was given and the bound, and nothing else is found wrong."""
    with pytest.raises(InvalidRequestError) as caught:
        resolve(ask(**asked), CARD, fallback_seed=0)
    assert caught.value.violations == (Violation(field=f"spec.{field}", description=description, reason=reason),)


WRONG_IMAGES: list[tuple[ModelCard, dict[str, Any], ImageFacts | None, ImageFacts | None, str, str, str]] = [
    # A model, what is asked of it, its first and last image, and what is wrong.
    (
        I2V,
        {},
        None,
        None,
        "image",
        "this model makes a video from its first image, which must be given",
        "REQUIRED",
    ),
    (
        I2V,
        {"last_image": b"dog"},
        None,
        facts(16, 9),
        "image",
        "this model makes a video from its first image, which must be given",
        "REQUIRED",
    ),
    (
        FIRST_AND_LAST,
        IMAGE,
        facts(16, 9),
        None,
        "last_image",
        "this model makes a video from its first to its last image, which must be given",
        "REQUIRED",
    ),
    (
        I2V,
        {**BOTH, "num_frames": 1},
        facts(16, 9),
        facts(16, 9),
        "last_image",
        "a video of one frame has no last image beside its first",
        "DOES_NOT_APPLY",
    ),
    (TI2V, BOTH, facts(16, 9), None, "last_image", "this model takes no last image", "DOES_NOT_APPLY"),
    (
        I2V,
        {**IMAGE, "image_fit": ImageFit.EXACT},
        facts(1281, 720),
        None,
        "image",
        "1281 x 720 does not have the aspect of 1280 x 720",
        "OTHER_ASPECT",
    ),
    (
        I2V,
        {**BOTH, "image_fit": ImageFit.EXACT},
        facts(16, 9),
        facts(9, 16),
        "last_image",
        "9 x 16 does not have the aspect of 1280 x 720",
        "OTHER_ASPECT",
    ),
    # The size that is asked for is checked, also where only its area matters.
    (
        I2V,
        {**IMAGE, "width": 1000},
        facts(1, 1),
        None,
        "width",
        "1000 is not a positive multiple of 16",
        "NOT_A_MULTIPLE",
    ),
    (
        I2V,
        {**IMAGE, "width": 1296},
        facts(1, 1),
        None,
        "width",
        "1296 x 720 = 933120 pixels a frame; at most 921600",
        "TOO_LARGE",
    ),
    (
        I2V,
        {**IMAGE, "image_fit": ImageFit.EXACT, "width": 0},
        facts(1, 1),
        None,
        "width",
        "0 is not a positive multiple of 16",
        "NOT_A_MULTIPLE",
    ),
    (
        I2V,
        {**IMAGE, "height": -16},
        facts(1, 1),
        None,
        "height",
        "-16 is not a positive multiple of 16",
        "NOT_A_MULTIPLE",
    ),
    # A frame in the aspect of an image may break rules itself.
    (
        I2V,
        IMAGE,
        facts(10_000, 1),
        None,
        "image",
        "10000 x 1 is too long for a video of the same aspect with at most 921600 pixels a frame and 16384 a side; "
        "name an image_fit and a size",
        "OTHER_ASPECT",
    ),
    (
        I2V,
        {**IMAGE, "width": 16, "height": 16},
        facts(5, 1),
        None,
        "image",
        "5 x 1 is too long for a video of the same aspect with at most 256 pixels a frame and 16384 a side; "
        "name an image_fit and a size",
        "OTHER_ASPECT",
    ),
]


@pytest.mark.parametrize(("card", "asked", "first", "last", "field", "description", "reason"), WRONG_IMAGES)
def test_what_is_refused_of_images(
    card: ModelCard,
    asked: dict[str, object],
    first: ImageFacts | None,
    last: ImageFacts | None,
    field: str,
    description: str,
    reason: str,
) -> None:
    """An image that is missing, of no use, or of an aspect that cannot be kept is told, and nothing else."""
    with pytest.raises(InvalidRequestError) as caught:
        resolve(ask(**asked), card, fallback_seed=0, first=first, last=last)
    assert caught.value.violations == (Violation(field=f"spec.{field}", description=description, reason=reason),)


def test_what_is_wrong_with_an_image_is_told_with_the_rest() -> None:
    """What was found while an image was read stands beside the rules that were broken, and is not told twice."""
    broken = Violation(
        field="spec.image", description="is a PNG that ends too early, after 9 bytes", reason="TRUNCATED"
    )
    with pytest.raises(InvalidRequestError) as caught:
        resolve(ask(image=b"cat", fps=0), I2V, fallback_seed=0, found=(broken,))
    assert [one.field for one in caught.value.violations] == ["spec.fps", "spec.image"]
    assert caught.value.violations[-1] == broken


@pytest.mark.parametrize(
    "request_id",
    [
        "",
        "cat",
        ID.replace("-", ""),
        f"{{{ID}}}",
        f"urn:uuid:{ID}",
        f" {ID}",
        ID.replace("-4b5c", "-1b5c"),
        "7d9c1f70-4c1e-1b5c-9d5f-0a1b2c3d4e5f",
    ],
)
def test_a_request_id_is_a_uuid4(request_id: str) -> None:
    """Other versions and other spellings of a UUID are refused, for two spellings of one id must not be two ids."""
    with pytest.raises(InvalidRequestError) as caught:
        resolve(ask(request_id=request_id), CARD, fallback_seed=0)
    sentence = "is not a UUID of version 4 in its 36-character form"
    assert caught.value.violations == (Violation(field="request_id", description=sentence, reason="NOT_A_UUID4"),)


def test_values_of_a_second_expert_are_refused_where_there_is_one() -> None:
    """A value that would do nothing is not taken in silence."""
    with pytest.raises(InvalidRequestError) as caught:
        resolve(ask(guidance_scale_2=3.0, boundary_ratio=0.5), ONE_EXPERT, fallback_seed=0)
    assert caught.value.violations == (
        Violation(
            field="spec.guidance_scale_2",
            description="this model has one expert: guidance_scale is its guidance",
            reason="DOES_NOT_APPLY",
        ),
        Violation(
            field="spec.boundary_ratio",
            description="this model has one expert, so there is no boundary between experts",
            reason="DOES_NOT_APPLY",
        ),
    )


def test_a_model_with_few_positions_has_short_sides() -> None:
    """The bound of a side is the model's own, and both sides hear of it."""
    with pytest.raises(InvalidRequestError) as caught:
        resolve(ask(width=144, height=160), replace(CARD, max_side=128), fallback_seed=0)
    assert caught.value.violations == (
        Violation(field="spec.width", description="144 is more than 128", reason="TOO_LARGE"),
        Violation(field="spec.height", description="160 is more than 128", reason="TOO_LARGE"),
    )


def test_a_format_that_is_not_served_is_refused() -> None:
    """The refusal names what is served."""
    with pytest.raises(InvalidRequestError) as caught:
        resolve(ask(output_format=OutputFormat.MP4_H264), RAW_ONLY, fallback_seed=0)
    assert caught.value.violations == (
        Violation(field="spec.output_format", description="mp4_h264 is not one of raw_rgb24", reason="NOT_SERVED"),
    )


def test_all_that_is_wrong_is_told_at_once() -> None:
    """A request that breaks every rule hears of every field, in the order of the request, and in one sentence."""
    worst = ask(
        prompt="",
        negative_prompt="x" * 21,
        width=17,
        height=-1,
        num_frames=164,
        fps=0,
        num_inference_steps=0,
        guidance_scale=-1.0,
        flow_shift=0.0,
        boundary_ratio=2.0,
        seed=-1,
        image=b"cat",
        last_image=b"dog",
        output_format=OutputFormat.PNG,
        encoding=Encoding(crf=18, bitrate_bps=1, quality=0, pixel_format=PixelFormat.YUV420P),
        request_id="cat",
        max_duration_s=0.0,
        detach_grace_s=-1.0,
    )
    with pytest.raises(InvalidRequestError) as caught:
        resolve(worst, CARD, fallback_seed=0)
    found = caught.value.violations
    assert [violation.field for violation in found] == [
        "spec.prompt",
        "spec.negative_prompt",
        "spec.width",
        "spec.height",
        "spec.num_frames",
        "spec.num_frames",
        "spec.num_inference_steps",
        "spec.fps",
        "spec.guidance_scale",
        "spec.flow_shift",
        "spec.boundary_ratio",
        "spec.seed",
        "spec.image",
        "spec.last_image",
        "spec.output_format",
        "spec.encoding.crf",
        "spec.encoding.bitrate_bps",
        "spec.encoding.quality",
        "spec.encoding.bitrate_bps",
        "spec.encoding.pixel_format",
        "request_id",
        "spec.max_duration",
        "spec.detach_grace",
    ]
    assert caught.value.failure.reason is Reason.INVALID_REQUEST
    assert str(caught.value) == "; ".join(f"{violation.field}: {violation.description}" for violation in found)


INTS = st.none() | st.integers(-(2**31), 2**31 - 1)
FLOATS = st.none() | st.floats()
SIDES = st.none() | st.integers(1, 90).map(lambda count: count * 16)
REQUESTS = st.builds(
    GenerationRequest,
    prompt=st.text(max_size=30) | st.just("a cat"),
    negative_prompt=st.none() | st.text(max_size=30),
    width=SIDES | INTS,
    height=SIDES | INTS,
    num_frames=st.none() | st.sampled_from([1, 5, 81]) | INTS,
    fps=st.none() | st.integers(1, 120) | INTS,
    num_inference_steps=st.none() | st.integers(1, 100) | INTS,
    guidance_scale=st.none() | st.floats(0, 100) | FLOATS,
    guidance_scale_2=st.none() | st.floats(0, 100) | FLOATS,
    flow_shift=st.none() | st.floats(0.1, 100) | FLOATS,
    boundary_ratio=st.none() | st.floats(0, 1) | FLOATS,
    seed=st.none() | st.integers(0, MAX_SEED) | st.integers(-(2**63), 2**63 - 1),
    image=st.none() | st.just(b"cat"),
    last_image=st.none() | st.just(b"dog"),
    image_fit=st.none() | st.sampled_from(ImageFit),
    output_format=st.none() | st.sampled_from(OutputFormat),
    encoding=st.just(Encoding())
    | st.builds(
        Encoding,
        crf=st.none() | st.integers(0, 63) | INTS,
        bitrate_bps=st.none() | st.integers(10_000, 10**8) | INTS,
        quality=st.none() | st.integers(1, 100) | INTS,
        pixel_format=st.none() | st.sampled_from(PixelFormat),
    ),
    request_id=st.none() | st.just(ID) | st.text(max_size=40),
    max_duration_s=st.none() | st.just(1.0) | st.floats(),
    detach_grace_s=st.none() | st.just(1.0) | st.floats(),
)
LIKELY = st.builds(
    GenerationRequest,
    prompt=st.just("a cat"),
    width=SIDES,
    height=SIDES,
    num_frames=st.none() | st.integers(0, 8).map(lambda count: count * 4 + 1),
    guidance_scale=st.none() | st.floats(0, 100),
    image=st.none() | st.just(b"cat"),
    last_image=st.none() | st.just(b"dog"),
    image_fit=st.none() | st.sampled_from([ImageFit.COVER, ImageFit.STRETCH]),
    output_format=st.none() | st.sampled_from(OutputFormat),
    encoding=st.builds(Encoding, bitrate_bps=st.none() | st.just(10_000)),
)
"""Requests of which most are resolved, so that what follows from images and formats is seen."""
IMAGES = st.builds(facts, st.integers(1, 9999), st.integers(1, 9999)) | st.builds(
    facts, st.integers(1, 2**16), st.integers(1, 2**16)
)
CARDS = [CARD, ONE_EXPERT, I2V, FIRST_AND_LAST, TI2V, replace(I2V, max_side=2048), RAW_ONLY]


@settings(max_examples=400, deadline=None)
@given(REQUESTS | LIKELY, st.sampled_from(CARDS), IMAGES, IMAGES)
def test_any_request_is_resolved_or_refused(
    request: GenerationRequest, card: ModelCard, first: ImageFacts, last: ImageFacts
) -> None:
    """Whatever is asked of whatever model, every value breaks a rule by name or holds, and what holds can be computed.

    What was resolved resolves to itself: a caller may send again what `accepted` has told.
    """
    images = {
        "first": first if request.image is not None and card.takes_image else None,
        "last": last if request.last_image is not None and card.takes_last_image else None,
    }
    try:
        video = resolve(request, card, fallback_seed=0, **images)
    except InvalidRequestError as error:
        assert all(one.field and one.description and one.reason for one in error.violations)
        return
    sized_by_image = images["first"] is not None and request.image_fit is None
    free = {"encoding", "width", "height"} if sized_by_image else {"encoding"}
    for name in {field.name for field in fields(VideoRequest)} & {field.name for field in fields(request)} - free:
        assert getattr(request, name) in (None, getattr(video, name))
    area = (request.width or card.defaults.width) * (request.height or card.defaults.height)
    assert 0 < video.width * video.height <= area <= card.limits.max_area
    assert max(video.width, video.height) <= min(card.max_side, FORMATS[video.output_format].max_side)
    multiple = card.size_multiple
    assert (video.width % multiple, video.height % multiple, video.num_frames % 4) == (0, 0, 1)
    assert all(math.isfinite(value) for value in (video.guidance_scale, video.guidance_scale_2, video.flow_shift))
    again = {field.name: getattr(video, field.name) for field in fields(request) if hasattr(video, field.name)}
    assert resolve(replace(request, **again), card, fallback_seed=1, **images) == video
