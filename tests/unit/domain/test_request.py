import math
from dataclasses import fields, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wan_grpc.domain.errors import InvalidRequestError, Reason, Violation
from wan_grpc.domain.formats import OutputFormat
from wan_grpc.domain.request import MAX_SEED, UNLIMITED_S, GenerationRequest, VideoRequest, resolve
from wan_grpc.domain.variants import T2V_A14B, Defaults, Limits, ModelCard, Task

CARD = ModelCard(
    model_id="Wan-AI/Wan2.2-T2V-A14B-Diffusers",
    task=Task.TEXT_TO_VIDEO,
    defaults=T2V_A14B,
    limits=Limits(max_area=1280 * 720, max_num_frames=161, max_inference_steps=100, max_prompt_bytes=20),
    size_multiple=16,
)
ONE_EXPERT = replace(CARD, defaults=replace(T2V_A14B, boundary_ratio=None))
RAW_ONLY = replace(CARD, formats=(OutputFormat.RAW_RGB24,))
ID = "7d9c1f70-4c1e-4b5c-9d5f-0a1b2c3d4e5f"

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
)


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
        ({"output_format": OutputFormat.RAW_RGB24}, {"output_format": OutputFormat.RAW_RGB24}),
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
    )


def test_an_empty_negative_prompt_is_not_an_unset_one() -> None:
    """Who asks for no negative prompt gets none, also where the operator has set one."""
    card = replace(CARD, defaults=replace(T2V_A14B, negative_prompt="worst quality"))
    assert resolve(ask(negative_prompt=""), card, fallback_seed=0).negative_prompt == ""


def test_a_model_with_one_expert_has_no_boundary() -> None:
    """Unset it stays None."""
    assert resolve(ask(), ONE_EXPERT, fallback_seed=42) == replace(DEFAULT, boundary_ratio=None)


def test_the_bytes_of_a_frame() -> None:
    """Three bytes a pixel."""
    assert DEFAULT.frame_bytes == 1280 * 720 * 3


REFUSED = [
    ({"prompt": ""}, "prompt", "must not be empty", "REQUIRED"),
    ({"prompt": " \n\t"}, "prompt", "must not be empty", "REQUIRED"),
    ({"prompt": "x" * 21}, "prompt", "21 bytes of UTF-8; at most 20", "TOO_LONG"),
    ({"prompt": "é" * 11}, "prompt", "22 bytes of UTF-8; at most 20", "TOO_LONG"),
    ({"negative_prompt": "猫" * 7}, "negative_prompt", "21 bytes of UTF-8; at most 20", "TOO_LONG"),
    ({"prompt": "a \ud800 cat"}, "prompt", "holds half of a surrogate pair", "NOT_UNICODE"),
    ({"negative_prompt": "\udfff"}, "negative_prompt", "holds half of a surrogate pair", "NOT_UNICODE"),
    ({"width": 0}, "width", "0 is not a positive multiple of 16", "NOT_A_MULTIPLE"),
    ({"width": -16}, "width", "-16 is not a positive multiple of 16", "NOT_A_MULTIPLE"),
    ({"width": 1279}, "width", "1279 is not a positive multiple of 16", "NOT_A_MULTIPLE"),
    ({"height": 8}, "height", "8 is not a positive multiple of 16", "NOT_A_MULTIPLE"),
    (
        {"width": 1296, "height": 720},
        "width",
        "1296 x 720 = 933120 pixels a frame; at most 921600",
        "TOO_LARGE",
    ),
    ({"width": 16400, "height": 16}, "width", "16400 is more than 16384", "TOO_LARGE"),
    ({"width": 16, "height": 16400}, "height", "16400 is more than 16384", "TOO_LARGE"),
    ({"num_frames": 0}, "num_frames", "0 is not 1 more than a multiple of 4", "NOT_A_MULTIPLE"),
    ({"num_frames": -3}, "num_frames", "-3 is not 1 more than a multiple of 4", "NOT_A_MULTIPLE"),
    ({"num_frames": 80}, "num_frames", "80 is not 1 more than a multiple of 4", "NOT_A_MULTIPLE"),
    ({"num_frames": 165}, "num_frames", "165 is more than 161", "TOO_LARGE"),
    ({"num_inference_steps": 0}, "num_inference_steps", "0 is not between 1 and 100", "OUT_OF_RANGE"),
    ({"num_inference_steps": 101}, "num_inference_steps", "101 is not between 1 and 100", "OUT_OF_RANGE"),
    ({"fps": 0}, "fps", "0 is not between 1 and 120", "OUT_OF_RANGE"),
    ({"fps": 121}, "fps", "121 is not between 1 and 120", "OUT_OF_RANGE"),
    (
        {"guidance_scale": -0.1},
        "guidance_scale",
        "-0.1 is not between 0.0 and 100.0",
        "OUT_OF_RANGE",
    ),
    ({"guidance_scale_2": 100.5}, "guidance_scale_2", "100.5 is not between 0.0 and 100.0", "OUT_OF_RANGE"),
    ({"guidance_scale_2": math.nan}, "guidance_scale_2", "nan is not between 0.0 and 100.0", "OUT_OF_RANGE"),
    ({"guidance_scale_2": math.inf}, "guidance_scale_2", "inf is not between 0.0 and 100.0", "OUT_OF_RANGE"),
    ({"flow_shift": 0.0}, "flow_shift", "0.0 is not above 0 and at most 100.0", "OUT_OF_RANGE"),
    ({"flow_shift": 101.0}, "flow_shift", "101.0 is not above 0 and at most 100.0", "OUT_OF_RANGE"),
    ({"flow_shift": math.nan}, "flow_shift", "nan is not above 0 and at most 100.0", "OUT_OF_RANGE"),
    ({"boundary_ratio": -0.1}, "boundary_ratio", "-0.1 is not between 0.0 and 1.0", "OUT_OF_RANGE"),
    ({"boundary_ratio": 1.1}, "boundary_ratio", "1.1 is not between 0.0 and 1.0", "OUT_OF_RANGE"),
    ({"boundary_ratio": math.nan}, "boundary_ratio", "nan is not between 0.0 and 1.0", "OUT_OF_RANGE"),
    ({"seed": -1}, "seed", f"-1 is not between 0 and {MAX_SEED}", "OUT_OF_RANGE"),
    ({"seed": MAX_SEED + 1}, "seed", f"{MAX_SEED + 1} is not between 0 and {MAX_SEED}", "OUT_OF_RANGE"),
    ({"max_duration_s": 0.0}, "max_duration", "0.0 s is not a positive, finite time", "OUT_OF_RANGE"),
    ({"max_duration_s": -1.0}, "max_duration", "-1.0 s is not a positive, finite time", "OUT_OF_RANGE"),
    ({"max_duration_s": math.inf}, "max_duration", "inf s is not a positive, finite time", "OUT_OF_RANGE"),
    ({"max_duration_s": math.nan}, "max_duration", "nan s is not a positive, finite time", "OUT_OF_RANGE"),
    ({"detach_grace_s": -0.5}, "detach_grace", "-0.5 s is negative", "OUT_OF_RANGE"),
    ({"detach_grace_s": math.nan}, "detach_grace", "nan s is negative", "OUT_OF_RANGE"),
]


@pytest.mark.parametrize(("asked", "field", "description", "reason"), REFUSED)
def test_what_is_refused(asked: dict[str, object], field: str, description: str, reason: str) -> None:
    """Each rule names its field, the value that was given and the bound, and nothing else is found wrong."""
    with pytest.raises(InvalidRequestError) as caught:
        resolve(ask(**asked), CARD, fallback_seed=0)
    assert caught.value.violations == (Violation(field=f"spec.{field}", description=description, reason=reason),)


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


def test_a_boundary_is_refused_where_there_is_one_expert() -> None:
    """A value that would do nothing is not taken in silence."""
    with pytest.raises(InvalidRequestError) as caught:
        resolve(ask(boundary_ratio=0.5), ONE_EXPERT, fallback_seed=0)
    sentence = "this model has one expert, so there is no boundary between experts"
    assert caught.value.violations == (
        Violation(field="spec.boundary_ratio", description=sentence, reason="DOES_NOT_APPLY"),
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
        "request_id",
        "spec.max_duration",
        "spec.detach_grace",
    ]
    assert caught.value.failure.reason is Reason.INVALID_REQUEST
    assert str(caught.value) == "; ".join(f"{violation.field}: {violation.description}" for violation in found)


@given(
    st.builds(
        GenerationRequest,
        prompt=st.text(max_size=30),
        width=st.none() | st.integers(-(2**31), 2**31 - 1),
        height=st.none() | st.integers(-(2**31), 2**31 - 1),
        num_frames=st.none() | st.integers(-(2**31), 2**31 - 1),
        fps=st.none() | st.integers(-(2**31), 2**31 - 1),
        num_inference_steps=st.none() | st.integers(-(2**31), 2**31 - 1),
        guidance_scale=st.none() | st.floats(),
        guidance_scale_2=st.none() | st.floats(),
        flow_shift=st.none() | st.floats(),
        boundary_ratio=st.none() | st.floats(),
        seed=st.none() | st.integers(-(2**63), 2**63 - 1),
        max_duration_s=st.none() | st.floats(),
        detach_grace_s=st.none() | st.floats(),
    )
)
def test_any_request_is_resolved_or_refused(request: GenerationRequest) -> None:
    """No numbers or texts break the rules in another way than by being refused; what is resolved can be computed."""
    try:
        video = resolve(request, CARD, fallback_seed=0)
    except InvalidRequestError as error:
        assert error.violations
        return
    asked = {field.name: getattr(request, field.name) for field in fields(VideoRequest)}
    assert all(getattr(video, name) == value for name, value in asked.items() if value is not None)
    assert max(video.width, video.height) <= CARD.max_side
    assert 0 < video.width * video.height <= CARD.limits.max_area
    assert (video.width % 16, video.height % 16, video.num_frames % 4) == (0, 0, 1)
    assert all(math.isfinite(value) for value in (video.guidance_scale, video.guidance_scale_2, video.flow_shift))
