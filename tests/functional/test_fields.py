"""Every field of a request at, below and above each of its bounds, as a caller of each kind of model meets them."""

import contextlib
import json
import subprocess
import sysconfig
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf import json_format
from google.protobuf.duration_pb2 import Duration
from PIL import Image

from tests import pictures
from tests.functional.live import (
    MAX_IMAGE_BYTES,
    NARROW,
    PATIENT,
    ROOT,
    SERVICE,
    LiveServer,
    generate_request,
    refusal,
    running_server,
    spec,
)
from wan_grpc.domain.formats import FORMATS, MAX_BITRATE_BPS, MIN_BITRATE_BPS, FormatRule, OutputFormat, PixelFormat
from wan_grpc.domain.variants import Task
from wan_grpc.pipeline.tiny import make_tiny_model
from wan_grpc.v1 import generation_pb2 as pb
from wan_grpc.v1 import video_generation_service_pb2 as service_pb2

Changes = dict[str, Any]
INVALID = (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_REQUEST")
UNSERVED = (grpc.StatusCode.UNIMPLEMENTED, "NOT_SUPPORTED")
NAN, INFINITY = float("nan"), float("inf")
LEAST_32, MOST_32, LEAST_64, MOST_64 = -(2**31), 2**31 - 1, -(2**63), 2**63 - 1
PICTURE = pictures.saved(pictures.two_colours(16, 8), "PNG")
LONGEST_S = 315_576_000_000
"""Bound of google.protobuf.Duration."""

# ---- the servers ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def t2v(live: LiveServer) -> Iterator[LiveServer]:
    """A server of a text-to-video model whose ranks are held, so that what is accepted waits, and costs nothing."""
    with held(live):
        yield live


@pytest.fixture(scope="module")
def i2v(live_i2v: LiveServer) -> Iterator[LiveServer]:
    """As above, of an image-to-video model."""
    with held(live_i2v):
        yield live_i2v


@pytest.fixture(scope="module")
def ti2v(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """As above, of a model that makes videos from text with or without an image."""
    directory = tmp_path_factory.mktemp("fields-ti2v")
    make_tiny_model(directory / "model", task=Task.TEXT_IMAGE_TO_VIDEO)
    flags = ("--model-path", str(directory / "model"), *NARROW, *PATIENT)
    with running_server(directory, *flags) as server, held(server):
        yield server


@contextlib.contextmanager
def held(server: LiveServer) -> Iterator[None]:
    """While the block lasts, one generation keeps the ranks, which stand still."""
    ranks = server.ranks()
    for rank in ranks:
        rank.suspend()
    made = spec(width=64, height=64, **({"image": PICTURE} if takes_image(server) else {}))
    server.create(made)
    try:
        yield
    finally:
        for rank in ranks:
            rank.resume()
    assert server.ended(server.create(made).name).state == pb.GENERATION_STATE_SUCCEEDED


def takes_image(server: LiveServer) -> bool:
    return bool(server.stub.GetModel(service_pb2.GetModelRequest()).model.rules.takes_image)


def resolved(server: LiveServer, made: pb.GenerationSpec) -> pb.ResolvedSpec:
    """What an accepted request means. It is cancelled before it costs anything."""
    generation = server.create(made)
    server.cancel(generation.name)
    return generation.resolved


def wrong(server: LiveServer, made: pb.GenerationSpec, request_id: str = "") -> set[tuple[str, str]]:
    """The fields that a request is refused for, each with its rule, by either method that takes it."""
    create = service_pb2.CreateGenerationRequest(spec=made, request_id=request_id)
    endings = [
        refusal(lambda: server.stub.Generate(generate_request(made, request_id))),
        refusal(lambda: server.stub.CreateGeneration(create)),
    ]
    assert {(how.code, how.reason) for how in endings} == {INVALID}
    assert endings[0].fields == endings[1].fields
    return set(zip(endings[0].fields, endings[0].rules, strict=True))


# ---- the table ------------------------------------------------------------------------------------------------------


def duration(seconds: int = 0, nanos: int = 0) -> Duration:
    return Duration(seconds=seconds, nanos=nanos)


def text_cases(name: str) -> dict[str, list[Changes]]:
    return {
        "CONTROL_CHARACTER": [{name: f"a{character}b"} for character in "\x00\x08\x0b\x1f\x7f\x80\x9f"],
        "TOO_LONG": [{name: "x" * 16385}, {name: "é" * 8193}, {name: "🎬" * 4097}],
    }


def range_cases(name: str, below: float, above: float) -> list[Changes]:
    values: list[float] = [below, above]
    if isinstance(below, int):
        values += [LEAST_32, MOST_32] if name != "seed" else [LEAST_64]
    else:
        values += [NAN, INFINITY, -INFINITY, -1.7976931348623157e308, 1.7976931348623157e308]
    return [{name: value} for value in values]


REFUSED: dict[str, dict[str, list[Changes]]] = {
    "prompt": {"REQUIRED": [{"prompt": ""}, {"prompt": " \t\n"}], **text_cases("prompt")},
    "negative_prompt": text_cases("negative_prompt"),
    "width": {
        "NOT_A_MULTIPLE": [{"width": value} for value in (LEAST_32, -16, -1, 0, 1, 15, 17, 1279)],
        "TOO_LARGE": [{"width": 16400, "height": 16}, {"width": 1280, "height": 736}, {"width": MOST_32 - 15}],
    },
    "height": {
        "NOT_A_MULTIPLE": [{"height": value} for value in (LEAST_32, -16, -1, 0, 1, 15, 17, 719)],
        "TOO_LARGE": [{"width": 16, "height": 16400}],
    },
    "num_frames": {
        "NOT_A_MULTIPLE": [{"num_frames": value} for value in (LEAST_32, -3, 0, 2, 4, 158, 160)],
        "TOO_LARGE": [{"num_frames": 165}, {"num_frames": MOST_32 - 2}],
    },
    "num_inference_steps": {"OUT_OF_RANGE": range_cases("num_inference_steps", 0, 201)},
    "fps": {"OUT_OF_RANGE": range_cases("fps", 0, 121)},
    "guidance_scale": {"OUT_OF_RANGE": range_cases("guidance_scale", -5e-324, 100.00000000000001)},
    "guidance_scale_2": {"OUT_OF_RANGE": range_cases("guidance_scale_2", -5e-324, 100.00000000000001)},
    "flow_shift": {"OUT_OF_RANGE": range_cases("flow_shift", 0.0, 100.00000000000001)},
    "boundary_ratio": {"OUT_OF_RANGE": range_cases("boundary_ratio", -5e-324, 1.0000000000000002)},
    "seed": {"OUT_OF_RANGE": [{"seed": -1}, {"seed": LEAST_64}]},
    "preview_every_steps": {"OUT_OF_RANGE": [{"preview_every_steps": value} for value in (LEAST_32, -1, 201, MOST_32)]},
    "image": {"DOES_NOT_APPLY": [{"image": b""}, {"image": PICTURE}, {"image": bytes(2**20)}]},
    "last_image": {"DOES_NOT_APPLY": [{"last_image": b""}, {"last_image": PICTURE}]},
    "image_fit": {
        "DOES_NOT_APPLY": [{"image_fit": value} for value in pb.ImageFit.values() if value],
        "UNKNOWN_VALUE": [{"image_fit": value} for value in (-1, 5, LEAST_32, MOST_32)],
    },
    "output_format": {
        "UNKNOWN_VALUE": [{"output_format": value} for value in (-1, 13, LEAST_32, MOST_32)],
        "DOES_NOT_FIT": [
            {"output_format": pb.OUTPUT_FORMAT_PNG, "num_frames": 5},
            {"output_format": pb.OUTPUT_FORMAT_JPEG, "num_frames": 5},
            {"output_format": pb.OUTPUT_FORMAT_WEBP, "num_frames": 5},
            {"output_format": pb.OUTPUT_FORMAT_GIF, "fps": 51},
            {"output_format": pb.OUTPUT_FORMAT_GIF, "width": 1280, "height": 720, "num_frames": 57},
            {"output_format": pb.OUTPUT_FORMAT_WEBP_ANIMATION, "width": 1280, "height": 720, "num_frames": 57},
            {"output_format": pb.OUTPUT_FORMAT_WEBP, "num_frames": 1, "width": 16384, "height": 16},
            {"output_format": pb.OUTPUT_FORMAT_MP4_H265, "width": 8208, "height": 64},
            {"output_format": pb.OUTPUT_FORMAT_MP4_H265, "width": 64, "height": 16},
            {"output_format": pb.OUTPUT_FORMAT_WEBM_AV1, "width": 48, "height": 64},
        ],
    },
    "max_duration": {
        "OUT_OF_RANGE": [{"max_duration": value} for value in (duration(), duration(-1), duration(0, -1))],
        "NOT_A_DURATION": [
            {"max_duration": value}
            for value in (duration(1, -1), duration(LONGEST_S + 1), duration(0, 10**9), duration(LEAST_64, LEAST_32))
        ],
    },
    "detach_grace": {
        "OUT_OF_RANGE": [{"detach_grace": value} for value in (duration(-1), duration(0, -1))],
        "NOT_A_DURATION": [
            {"detach_grace": value}
            for value in (duration(-1, 1), duration(-LONGEST_S - 1), duration(0, -(10**9)), duration(MOST_64, MOST_32))
        ],
    },
}
ACCEPTED: dict[str, list[Changes]] = {
    "prompt": [
        {"prompt": text} for text in ("x", "x" * 16384, "é" * 8192, "🎬" * 4096, " a\tb\r\n", "\xa0x", "\u200b")
    ],
    "negative_prompt": [{"negative_prompt": text} for text in ("", " ", "x" * 16384)],
    "width": [{"width": 16}, {"width": 1280, "height": 720}, {"width": 16384, "height": 48}],
    "height": [{"height": 16}, {"width": 720, "height": 1280}, {"width": 48, "height": 16384}],
    "num_frames": [{"num_frames": value} for value in (1, 5, 157, 161)],
    "num_inference_steps": [{"num_inference_steps": value} for value in (1, 200)],
    "fps": [{"fps": value} for value in (1, 120)],
    "guidance_scale": [{"guidance_scale": value} for value in (-0.0, 0.0, 5e-324, 1.0, 100.0)],
    "guidance_scale_2": [{"guidance_scale_2": value} for value in (-0.0, 0.0, 5e-324, 1.0, 100.0)],
    "flow_shift": [{"flow_shift": value} for value in (5e-324, 1.0, 100.0)],
    "boundary_ratio": [{"boundary_ratio": value} for value in (-0.0, 0.0, 0.5, 1.0)],
    "seed": [{"seed": value} for value in (0, MOST_64)],
    "preview_every_steps": [{"preview_every_steps": value} for value in (0, 1, 200)],
    "image": [{}],  # of a model that takes images, see below
    "last_image": [{}],
    "image_fit": [{"image_fit": pb.IMAGE_FIT_UNSPECIFIED}],
    "output_format": [
        {"output_format": pb.OUTPUT_FORMAT_UNSPECIFIED},
        {"output_format": pb.OUTPUT_FORMAT_GIF, "fps": 50},
        {"output_format": pb.OUTPUT_FORMAT_GIF, "width": 1280, "height": 720, "num_frames": 53},
        {"output_format": pb.OUTPUT_FORMAT_MP4_H265, "width": 8192, "height": 64},
        *({"output_format": value, "num_frames": 1, "width": 64, "height": 64} for value in pb.OutputFormat.values()),
    ],
    "max_duration": [{"max_duration": value} for value in (duration(0, 1), duration(LONGEST_S))],
    "detach_grace": [{"detach_grace": value} for value in (duration(), duration(0, 1), duration(LONGEST_S))],
    "detach_unlimited": [{"detach_unlimited": value} for value in (False, True)],
}
NOT_SERVED: dict[str, list[Changes]] = {
    "adapters": [{"adapters": [pb.AdapterUse()]}, {"adapters": [pb.AdapterUse(name="adapters/a", scale=NAN)] * 20}],
    "acceleration_profile": [{"acceleration_profile": "x"}, {"acceleration_profile": "x" * 10_000}],
}
NOTHING_SAID: dict[str, list[Changes]] = {
    "adapters": [{"adapters": []}],
    "acceleration_profile": [{"acceleration_profile": ""}],
}


def wire_format(name: OutputFormat) -> int:
    return int(pb.OutputFormat.Value(f"OUTPUT_FORMAT_{name.name}"))


def wire_pixels(name: PixelFormat) -> int:
    return int(pb.PixelFormat.Value(f"PIXEL_FORMAT_{name.name}"))


def option_cases(rule: FormatRule) -> Iterator[tuple[str, Any, str | None]]:
    """Each option of `encoding` with values on either side of its bounds, and the rule that refuses it, if any does."""
    if rule.crf is None:
        yield from (("crf", 20, "DOES_NOT_APPLY"), ("bitrate_bps", 10**6, "DOES_NOT_APPLY"))
    else:
        least, most, _ = rule.crf
        yield from (("crf", value, "OUT_OF_RANGE") for value in (least - 1, most + 1, LEAST_32, MOST_32))
        yield from (("crf", value, None) for value in (least, most))
        outside = (MIN_BITRATE_BPS - 1, MAX_BITRATE_BPS + 1, 0, LEAST_64, MOST_64)
        yield from (("bitrate_bps", value, "OUT_OF_RANGE") for value in outside)
        yield from (("bitrate_bps", value, None) for value in (MIN_BITRATE_BPS, MAX_BITRATE_BPS))
    if rule.default_quality is None:
        yield ("quality", 90, "DOES_NOT_APPLY")
    else:
        yield from (("quality", value, "OUT_OF_RANGE") for value in (0, 101, LEAST_32, MOST_32))
        yield from (("quality", value, None) for value in (1, 100))
    for pixel_format in PixelFormat:
        known = pixel_format in rule.pixel_formats
        yield ("pixel_format", wire_pixels(pixel_format), None if known else "NOT_SERVED")
    yield from (("pixel_format", value, "UNKNOWN_VALUE") for value in (-1, 7, MOST_32))
    yield ("pixel_format", 0, None)


def cases(table: dict[str, list[Changes]]) -> list[tuple[str, Changes]]:
    return [(field, changes) for field, each in table.items() for changes in each]


def test_the_table_is_complete() -> None:
    """Every field of a spec, and of what stands in it, is tried with values that are refused and that are not."""
    fields = set(pb.GenerationSpec.DESCRIPTOR.fields_by_name)
    options = set(pb.EncodingOptions.DESCRIPTOR.fields_by_name)
    assert {*REFUSED, *NOT_SERVED, "encoding", "detach_unlimited"} == fields
    assert {*ACCEPTED, *NOTHING_SAID, "encoding"} == fields
    rules = [case for rule in FORMATS.values() for case in option_cases(rule)]
    assert (
        {name for name, _, refused in rules if refused}
        == {name for name, _, refused in rules if not refused}
        == options
    )
    assert set(WRONG_TYPES) == fields


# ---- text to video --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("field", REFUSED)
def test_refused(t2v: LiveServer, field: str) -> None:
    """A value beyond a bound is refused under the path of its field and of no other, with the rule that it breaks."""
    for rule, each in REFUSED[field].items():
        for changes in each:
            assert wrong(t2v, spec(**changes)) == {(f"spec.{field}", rule)}, changes


@pytest.mark.parametrize("field", ACCEPTED)
def test_accepted(t2v: LiveServer, field: str) -> None:
    """A value at a bound is accepted, and `accepted` repeats it as it was given."""
    for changes in ACCEPTED[field]:
        told = resolved(t2v, spec(**changes))
        for name, value in changes.items():
            if value or name not in ("image_fit", "output_format", "detach_unlimited"):
                assert getattr(told, name) == value, changes


@pytest.mark.parametrize("field", NOT_SERVED)
def test_not_served(t2v: LiveServer, field: str) -> None:
    """A field whose behaviour this server has not is refused by name, and zero or nothing is no use of it."""
    for changes in NOT_SERVED[field]:
        how = refusal(lambda changes=changes: t2v.stub.Generate(generate_request(spec(**changes))))
        assert ((how.code, how.reason), how.fields, how.rules) == (UNSERVED, (f"spec.{field}",), ("NOT_SERVED",))
    for changes in NOTHING_SAID[field]:
        resolved(t2v, spec(**changes))


@pytest.mark.parametrize("output_format", OutputFormat)
def test_encoding(t2v: LiveServer, output_format: OutputFormat) -> None:
    """Each option of each format at, below and above its bounds; what does not apply is refused by its path."""
    for name, value, rule in option_cases(FORMATS[output_format]):
        options = pb.EncodingOptions(**{name: value})
        made = spec(output_format=wire_format(output_format), encoding=options, num_frames=1, width=64, height=64)
        if rule is None:
            told = resolved(t2v, made).encoding
            assert told.pixel_format != 0
            assert value == 0 or getattr(told, name) == value, (name, value)
        else:
            assert wrong(t2v, made) == {(f"spec.encoding.{name}", rule)}, (name, value)


@pytest.mark.parametrize(
    "request_id",
    ["7", "x" * 10_000, str(uuid.uuid1()), uuid.uuid4().hex, f"{{{uuid.uuid4()}}}", f" {uuid.uuid4()}", "é" * 36],
)
def test_request_id(t2v: LiveServer, request_id: str) -> None:
    """What is no UUID of version 4 in its usual form is refused as such."""
    assert wrong(t2v, spec(), request_id) == {("request_id", "NOT_A_UUID4")}


def test_everything_at_once(i2v: LiveServer) -> None:
    """A request that is wrong in every field, in what the wire says, in its values and in its images, hears of all."""
    made = pb.GenerationSpec(
        prompt="\x00",
        negative_prompt="x" * 16385,
        width=7,
        height=-7,
        num_frames=2,
        num_inference_steps=0,
        fps=0,
        guidance_scale=NAN,
        guidance_scale_2=INFINITY,
        flow_shift=0.0,
        boundary_ratio=-1.0,
        seed=-1,
        image=b"GIF89a",
        last_image=bytes(MAX_IMAGE_BYTES + 1),
        image_fit=99,
        output_format=pb.OUTPUT_FORMAT_JPEG,
        encoding=pb.EncodingOptions(bitrate_bps=-1, quality=0, pixel_format=99),
        preview_every_steps=-1,
        adapters=[pb.AdapterUse()],
        acceleration_profile="x",
        max_duration=duration(-1),
        detach_grace=duration(1, -1),
    )
    told = {field for field, _ in wrong(i2v, made, request_id="7")}
    options = {"request_id", *(f"spec.encoding.{name}" for name in ("bitrate_bps", "quality", "pixel_format"))}
    fields = {f"spec.{field.name}" for field, _ in made.ListFields()} - {"spec.encoding"}
    assert told == fields | options


# ---- images ---------------------------------------------------------------------------------------------------------


def padded(size: int) -> bytes:
    """A picture whose file has exactly this many bytes."""
    rows = [[0, 255] * 8] * 8

    def of(length: int) -> bytes:
        return pictures.png(
            rows, bits=8, colour=pictures.GREY, width=16, after=[pictures.chunk(b"tEXt", b"k\0" + b"x" * length)]
        )

    return of(size - len(of(0)))


def flat(width: int, height: int) -> bytes:
    return pictures.saved(Image.new("RGB", (width, height), "teal"), "PNG")


ANIMATION = pictures.saved(
    pictures.two_colours(), "WEBP", save_all=True, append_images=[Image.new("RGB", (16, 8), "green")]
)
BAD_IMAGES: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "NOT_AN_IMAGE"),
    "text": (b"https://example.com/cat.png", "NOT_AN_IMAGE"),
    "a path": (b"/etc/passwd", "NOT_AN_IMAGE"),
    "too many bytes": (padded(MAX_IMAGE_BYTES + 1), "TOO_LARGE"),
    "twice the bytes": (bytes(2 * MAX_IMAGE_BYTES), "TOO_LARGE"),
    "too many pixels": (flat(201, 100), "TOO_LARGE"),
    "a bomb": (
        pictures.png([[0]], bits=1, colour=pictures.GREY, width=1, claimed=(2**31 - 1, 2**31 - 1)),
        "TOO_LARGE",
    ),
    "truncated": (pictures.saved(pictures.two_colours(64, 64), "JPEG")[:-200], "TRUNCATED"),
    "animated": (ANIMATION, "ANIMATED"),
    "GIF": (pictures.saved(pictures.two_colours(), "GIF"), "NOT_SERVED"),
    "TIFF": (pictures.saved(pictures.two_colours(), "TIFF"), "NOT_SERVED"),
}
GOOD_IMAGES = {
    **pictures.every_kind(),
    "as many bytes as may be": padded(MAX_IMAGE_BYTES),
    "as many pixels as may be": flat(200, 100),
}


@pytest.mark.parametrize("field", ["image", "last_image"])
@pytest.mark.parametrize("kind", BAD_IMAGES)
def test_bad_image(i2v: LiveServer, field: str, kind: str) -> None:
    """What is no picture that the server reads is refused as the first image and as the last one, with the reason."""
    data, rule = BAD_IMAGES[kind]
    assert wrong(i2v, spec(**{"image": PICTURE, field: data})) == {(f"spec.{field}", rule)}


@pytest.mark.parametrize("kind", GOOD_IMAGES)
def test_good_image(i2v: LiveServer, kind: str) -> None:
    """Pictures of every kind are taken: palettes, 16 bits, CMYK, transparency, rotation, and right at the limits."""
    assert len(resolved(i2v, spec(image=GOOD_IMAGES[kind], last_image=GOOD_IMAGES[kind])).last_image_sha256) == 64


UPRIGHT = pictures.jpeg(pictures.two_colours(16, 8), exif=b"Exif\0\0" + pictures.exif(6))


@pytest.mark.parametrize(
    ("changes", "size", "fit"),
    [
        ({}, (144, 64), "COVER"),
        ({"image": UPRIGHT}, (64, 144), "COVER"),
        ({"image": flat(20, 20), "width": 64, "height": 64}, (64, 64), "COVER"),
        ({"width": 16, "height": 32}, (32, 16), "COVER"),
        ({"image_fit": pb.IMAGE_FIT_COVER, "width": 64, "height": 96}, (64, 96), "COVER"),
        ({"image_fit": pb.IMAGE_FIT_CONTAIN}, (128, 96), "CONTAIN"),
        ({"image_fit": pb.IMAGE_FIT_STRETCH}, (128, 96), "STRETCH"),
        ({"image_fit": pb.IMAGE_FIT_EXACT, "width": 64, "height": 32}, (64, 32), "EXACT"),
        ({"image_fit": pb.IMAGE_FIT_COVER, "image": flat(20_000, 1)}, (128, 96), "COVER"),
    ],
    ids=str,
)
def test_size_from_an_image(i2v: LiveServer, changes: Changes, size: tuple[int, int], fit: str) -> None:
    """`accepted` tells the size that follows from the image as it is seen, or the one asked for by a fit."""
    made = pb.GenerationSpec(**{"prompt": "x", "image": PICTURE, **changes})
    told = resolved(i2v, made)
    assert ((told.width, told.height), pb.ImageFit.Name(told.image_fit)) == (size, f"IMAGE_FIT_{fit}")


I2V_REFUSED: list[tuple[Changes, set[tuple[str, str]]]] = [
    ({"image": None}, {("spec.image", "REQUIRED")}),
    ({"image": None, "last_image": PICTURE}, {("spec.image", "REQUIRED")}),
    (
        {"image": None, "image_fit": pb.IMAGE_FIT_COVER},
        {("spec.image", "REQUIRED"), ("spec.image_fit", "DOES_NOT_APPLY")},
    ),
    ({"last_image": PICTURE, "num_frames": 1}, {("spec.last_image", "DOES_NOT_APPLY")}),
    ({"image_fit": pb.IMAGE_FIT_EXACT}, {("spec.image", "OTHER_ASPECT")}),
    (
        {"image_fit": pb.IMAGE_FIT_EXACT, "width": 64, "height": 32, "last_image": flat(8, 8)},
        {("spec.last_image", "OTHER_ASPECT")},
    ),
    ({"image": flat(2000, 1)}, {("spec.image", "OTHER_ASPECT")}),
    ({"image": flat(1, 20_000)}, {("spec.image", "OTHER_ASPECT")}),
    ({"image": b"x", "last_image": b"y"}, {("spec.image", "NOT_AN_IMAGE"), ("spec.last_image", "NOT_AN_IMAGE")}),
    (
        {"image": b"x", "image_fit": 9, "width": 7},
        {("spec.image", "NOT_AN_IMAGE"), ("spec.image_fit", "UNKNOWN_VALUE"), ("spec.width", "NOT_A_MULTIPLE")},
    ),
]


@pytest.mark.parametrize(("changes", "expected"), I2V_REFUSED, ids=str)
def test_image_to_video(i2v: LiveServer, changes: Changes, expected: set[tuple[str, str]]) -> None:
    """An image is needed, a last one goes with a first one, and neither is bent where the caller did not ask for it."""
    small = {"width": 128, "height": 96, "num_frames": 5}
    given = {name: value for name, value in {"image": PICTURE, **small, **changes}.items() if value is not None}
    assert wrong(i2v, pb.GenerationSpec(prompt="x", **given)) == expected


TI2V_REFUSED: list[tuple[Changes, set[tuple[str, str]]]] = [
    ({"width": 48}, {("spec.width", "NOT_A_MULTIPLE")}),
    ({"height": 80}, {("spec.height", "NOT_A_MULTIPLE")}),
    ({"guidance_scale_2": 7.0}, {("spec.guidance_scale_2", "DOES_NOT_APPLY")}),
    ({"boundary_ratio": 0.5}, {("spec.boundary_ratio", "DOES_NOT_APPLY")}),
    ({"last_image": PICTURE}, {("spec.last_image", "DOES_NOT_APPLY")}),
    ({"image_fit": pb.IMAGE_FIT_STRETCH}, {("spec.image_fit", "DOES_NOT_APPLY")}),
    ({"image": b"x"}, {("spec.image", "NOT_AN_IMAGE")}),
]


@pytest.mark.parametrize(("changes", "expected"), TI2V_REFUSED, ids=str)
def test_text_and_image_to_video(ti2v: LiveServer, changes: Changes, expected: set[tuple[str, str]]) -> None:
    """A model with one expert has no second guidance and no boundary, and this one takes no last image."""
    made = pb.GenerationSpec(**{"prompt": "x", "width": 64, "height": 64, **changes})
    assert wrong(ti2v, made) == expected


@pytest.mark.parametrize(
    ("changes", "size"),
    [({}, (64, 64)), ({"image": PICTURE}, (64, 32)), ({"image": PICTURE, "image_fit": pb.IMAGE_FIT_COVER}, (64, 64))],
    ids=str,
)
def test_text_with_or_without_an_image(ti2v: LiveServer, changes: Changes, size: tuple[int, int]) -> None:
    """Without an image the size is what was asked for, with one it has its aspect unless a fit is named."""
    told = resolved(ti2v, pb.GenerationSpec(**{"prompt": "x", "width": 64, "height": 64, **changes}))
    assert (told.width, told.height) == size
    assert bool(told.image_sha256) == ("image" in changes)


def test_image_beyond_what_is_received(i2v: LiveServer, t2v: LiveServer) -> None:
    """Both images may be twice as large as allowed and are refused by name; beyond that gRPC refuses, and says so."""
    twice = bytes(2 * MAX_IMAGE_BYTES)
    both = {("spec.image", "TOO_LARGE"), ("spec.last_image", "TOO_LARGE")}
    assert wrong(i2v, spec(image=twice, last_image=twice, prompt="x" * 16384, negative_prompt="x" * 16384)) == both
    for server in (i2v, t2v):
        how = refusal(lambda server=server: server.stub.Generate(generate_request(spec(image=bytes(2 * 2**20)))))
        assert (how.code, how.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "")
        assert "larger than max" in how.message


# ---- JSON -----------------------------------------------------------------------------------------------------------

NO_TEXT: list[Any] = [7, True, ["x"], {}]
NO_INTEGER: list[Any] = ["ten", 1.5, True, 2**63, "NaN", [1], {}]
NO_FLOAT: list[Any] = ["four", "", [1.0], {}]
WRONG_TYPES: dict[str, list[Any]] = {
    "prompt": NO_TEXT,
    "negative_prompt": NO_TEXT,
    "width": [*NO_INTEGER, 2**31],
    "height": [*NO_INTEGER, 2**31],
    "num_frames": [*NO_INTEGER, -(2**31) - 1],
    "num_inference_steps": NO_INTEGER,
    "fps": NO_INTEGER,
    "guidance_scale": NO_FLOAT,
    "guidance_scale_2": NO_FLOAT,
    "flow_shift": NO_FLOAT,
    "boundary_ratio": NO_FLOAT,
    "seed": NO_INTEGER,
    "image": ["x", 7, True, [137, 80], {}],
    "last_image": ["xxxxx", 7, True, [137, 80], {}],
    "image_fit": ["COVER", "image_fit_cover", {}],
    "output_format": ["mp4", "OUTPUT_FORMAT_AVI", {}],
    "encoding": ["crf", 20, [20], {"crf": "x"}, {"crf": 1, "bitrateBps": 20_000}, {"quality": 1.5}, {"speed": 1}],
    "preview_every_steps": NO_INTEGER,
    "adapters": ["adapters/a", {"name": "adapters/a"}, [7], [{"name": 7}], [{"scale": "x"}]],
    "acceleration_profile": NO_TEXT,
    "max_duration": [60, "60", "1m", "abcs", {"seconds": 60}, "315576000001s"],
    "detach_grace": [60, "60", "s", {"seconds": 60}],
    "detach_unlimited": ["yes", 1, "true", {}],
}
JSON_NUMBERS: list[tuple[str, Any, str]] = [
    *(
        (name, value, "OUT_OF_RANGE")
        for name in ("guidance_scale", "flow_shift")
        for value in ("NaN", "Infinity", -1e308)
    ),
    ("width", "17", "NOT_A_MULTIPLE"),
    ("image_fit", 99, "UNKNOWN_VALUE"),
    ("seed", "-1", "OUT_OF_RANGE"),
]


@pytest.mark.parametrize("field", WRONG_TYPES)
def test_wrong_type_in_json(field: str) -> None:
    """A value of another type never becomes a request: JSON that is no message is refused by the name of its field."""
    for value in WRONG_TYPES[field]:
        with pytest.raises(json_format.ParseError, match=json_name(field)):
            json_format.ParseDict({"spec": {json_name(field): value}}, service_pb2.GenerateRequest())


def json_name(field: str) -> str:
    return str(pb.GenerationSpec.DESCRIPTOR.fields_by_name[field].json_name)


@pytest.mark.parametrize(("field", "value", "rule"), JSON_NUMBERS, ids=str)
def test_numbers_in_json(t2v: LiveServer, field: str, value: Any, rule: str) -> None:
    """What JSON can say of numbers and the rules forbid is refused by the server: NaN, infinity, numbers as text."""
    made = json_format.ParseDict({"prompt": "x", field: value}, pb.GenerationSpec())
    assert wrong(t2v, made) == {(f"spec.{field}", rule)} | (
        {("spec.image_fit", rule)} if field == "image_fit" else set()
    )


Grpcurl = Callable[[Any], subprocess.CompletedProcess[str]]


@pytest.fixture
def grpcurl(t2v: LiveServer) -> Grpcurl:
    program = Path(sysconfig.get_path("scripts"), "grpcurl")

    def call(message: Any) -> subprocess.CompletedProcess[str]:
        arguments = ["-plaintext", "-d", json.dumps(message), t2v.address, f"{SERVICE}/CreateGeneration"]
        return subprocess.run([program, *arguments], capture_output=True, text=True, cwd=ROOT, timeout=60, check=False)

    return call


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"width": "wide"}, 'parsing "wide"'),
        ({"guidance_scale": "strong"}, 'parsing "strong"'),
        ({"image": "no base64!"}, "illegal base64 data"),
        ({"image_fit": "COVER"}, "COVER"),
        ({"width": 17}, '"field":"spec.width"'),
        ({"guidance_scale": "NaN"}, '"field":"spec.guidance_scale"'),
    ],
    ids=str,
)
def test_wrong_type_by_grpcurl(grpcurl: Grpcurl, changes: Changes, complaint: str) -> None:
    """Another reader of JSON refuses other types before anything is sent, and shows what the server refuses."""
    done = grpcurl({"spec": {"prompt": "x", **changes}})
    assert (done.returncode != 0, done.stdout) == (True, "")
    assert complaint in done.stderr
