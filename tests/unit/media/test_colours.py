"""Colours come back right: the standards' formulas, with the tags in the file, give what went in; other tags do not."""

import struct

import numpy as np
import pytest

from tests.unit.media import films
from tests.unit.media.films import YUV_VIDEOS, Frames, Values, encode, of_format, to_rgb
from wan_grpc.domain.formats import FORMATS, OutputFormat, PixelFormat
from wan_grpc.domain.request import VideoRequest
from wan_grpc.media.samples import YuvConverter

BT_709, BT_601, LIMITED, FULL = 1, 5, 1, 2
BARS = [(255, 255, 255), (255, 255, 0), (0, 255, 255), (0, 255, 0), (255, 0, 255), (255, 0, 0), (0, 0, 255), (0, 0, 0)]
MUTED = [(191, 191, 191), (191, 191, 64), (64, 191, 191), (60, 120, 60), (200, 120, 40), (150, 60, 60), (30, 60, 150)]
PICTURED = [*YUV_VIDEOS, OutputFormat.MKV_FFV1, *films.PICTURES, OutputFormat.GIF, OutputFormat.WEBP_ANIMATION]
WITH_YUV = [name for name in PICTURED if name not in (OutputFormat.MKV_FFV1, OutputFormat.PNG, OutputFormat.GIF)]


def finest(name: OutputFormat, **more: object) -> VideoRequest:
    rule = FORMATS[name]
    options = {"crf": max(1, rule.crf[0])} if rule.crf else {"quality": 100} if rule.default_quality else {}
    return of_format(name, **{"width": 256, "height": 64, **options, **more})


def bars(request: VideoRequest) -> Frames:
    """Upright bars 32 pixels wide, saturated in the upper half, muted in the lower."""
    rows = [np.repeat(np.array(colours, np.uint8), 32, axis=0) for colours in (BARS, [*MUTED, (128, 128, 128)])]
    frame = np.repeat(np.stack(rows), request.height // 2, axis=0)
    return np.repeat(frame[None], request.num_frames, axis=0)


def ramps(request: VideoRequest) -> Frames:
    """Every level of grey from left to right, and of red against blue, slowly enough to share chroma."""
    level = np.linspace(0, 255, request.width).round().astype(np.uint8)
    grey = np.stack([level] * 3, axis=-1)
    other = np.stack([level, np.full_like(level, 100), level[::-1]], axis=-1)
    frame = np.repeat(np.stack([grey, other]), request.height // 2, axis=0)
    return np.repeat(frame[None], request.num_frames, axis=0)


def inside_bars(errors: Values) -> float:
    """The largest error away from edges, where neighbours share chroma."""
    halves = errors[8:24], errors[40:56]
    return max(float(half[:, bar * 32 + 8 : bar * 32 + 24].max()) for half in halves for bar in range(8))


def inside_ramps(errors: Values) -> float:
    return max(float(errors[4:28, 4:-4].max()), float(errors[36:60, 4:-4].max()))


def errors_of(name: OutputFormat, frames: Frames, request: VideoRequest, **tags: int) -> Values:
    last = films.decoded(request, encode(request, frames).data)[-1]
    return np.abs(to_rgb(last, **tags) - frames[-1])


def bound_of(name: OutputFormat) -> int:
    """Levels of 255. JPEG and WebP round to whole levels of their own; a palette has 256 colours for 512."""
    return {OutputFormat.MKV_FFV1: 0, OutputFormat.PNG: 0, OutputFormat.GIF: 12}.get(name, 4)


@pytest.mark.parametrize("name", PICTURED)
def test_bars_have_their_colours(name: OutputFormat) -> None:
    """Saturated and muted bars are within a few levels of what went in, read by the tags in the file."""
    request = finest(name)
    assert inside_bars(errors_of(name, bars(request), request)) <= bound_of(name)


@pytest.mark.parametrize("name", PICTURED)
def test_ramps_are_even(name: OutputFormat) -> None:
    """Every level of grey and of red against blue comes back: nothing is clipped, crushed or shifted."""
    request = finest(name)
    assert inside_ramps(errors_of(name, ramps(request), request)) <= bound_of(name)


@pytest.mark.parametrize("name", WITH_YUV)
def test_the_bound_would_see_a_wrong_matrix_or_range(name: OutputFormat) -> None:
    """Read with the other matrix or the other range, the same file is far outside the bound."""
    request = finest(name)
    is_video = name in YUV_VIDEOS
    other_matrix = errors_of(name, bars(request), request, matrix=BT_601 if is_video else BT_709)
    other_range = errors_of(name, bars(request), request, colour_range=LIMITED if name is OutputFormat.JPEG else FULL)
    assert min(inside_bars(other_matrix), inside_bars(other_range)) > 3 * bound_of(name)


@pytest.mark.parametrize(
    ("name", "pixel_format"),
    [(name, pixels) for name in [*YUV_VIDEOS, OutputFormat.JPEG] for pixels in FORMATS[name].pixel_formats[1:]],
)
def test_every_pixel_format_keeps_colours(name: OutputFormat, pixel_format: PixelFormat) -> None:
    """Other subsampling and 10 bits mean the same colours; full chroma keeps them up to the edge of a bar."""
    request = finest(name, pixel_format=pixel_format)
    errors = errors_of(name, bars(request), request)
    assert inside_bars(errors) <= bound_of(name)
    if "444" in pixel_format:
        assert np.percentile(errors, 99) <= 2 * bound_of(name)


@pytest.mark.parametrize("name", YUV_VIDEOS)
def test_videos_are_tagged_in_their_pictures(name: OutputFormat) -> None:
    """A decoder is told BT.709 primaries, transfer and matrix in limited range: by the stream, VP9 in part by WebM."""
    request = of_format(name)
    last = films.decode(encode(request, films.waves(request)).data)[-1]
    assert (last.color_primaries, last.color_trc, last.colorspace, last.color_range) == (1, 1, BT_709, LIMITED)


@pytest.mark.parametrize("name", [OutputFormat.MP4_H264, OutputFormat.MP4_H264_PROGRESSIVE, OutputFormat.MP4_H265])
def test_mp4_names_its_colours(name: OutputFormat) -> None:
    """The sample entry says BT.709, limited, where players look before they decode."""
    request = of_format(name)
    _, found = films.sample_entry(encode(request, films.waves(request)).data)
    assert found["colr"] == b"nclx" + struct.pack(">HHHB", 1, 1, 1, 0)


MATRIX, SITED_ACROSS, SITED_DOWN, RANGE, TRANSFER, PRIMARIES = 0x55B1, 0x55B7, 0x55B8, 0x55B9, 0x55BA, 0x55BB


@pytest.mark.parametrize(
    ("name", "tags"),
    [
        (
            name,
            {MATRIX: 1, TRANSFER: 1, PRIMARIES: 1, RANGE: 1, SITED_ACROSS: 1, SITED_DOWN: 2},
        )
        for name in (OutputFormat.WEBM_VP9, OutputFormat.WEBM_AV1)
    ]
    + [(OutputFormat.MKV_FFV1, {MATRIX: 0, TRANSFER: 13, PRIMARIES: 1, RANGE: 2})],
)
def test_matroska_names_its_colours(name: OutputFormat, tags: dict[int, int]) -> None:
    """BT.709 in limited range with chroma at the left between rows; FFV1 holds sRGB in full range."""
    request = of_format(name)
    data = encode(request, films.waves(request)).data
    colour = films.element(data, films.SEGMENT, films.TRACKS, films.TRACK, films.VIDEO, films.COLOUR)
    assert films.numbers(colour) == tags


def test_pictures_say_what_they_are() -> None:
    """PNG names sRGB, JPEG is JFIF, whose colours are BT.601 in full range."""
    (png,) = encode(of_format(OutputFormat.PNG), films.waves(of_format(OutputFormat.PNG))).writes
    chunks = [png[at + 4 : at + 8] for at in _chunk_starts(png)]
    assert chunks[:2] == [b"IHDR", b"sRGB"]
    (jpeg,) = encode(of_format(OutputFormat.JPEG), films.waves(of_format(OutputFormat.JPEG))).writes
    assert jpeg[:4] + jpeg[6:11] == b"\xff\xd8\xff\xe0JFIF\0"


def _chunk_starts(png: bytes) -> list[int]:
    starts = [8]
    while starts[-1] < len(png):
        starts.append(starts[-1] + 12 + int.from_bytes(png[starts[-1] : starts[-1] + 4]))
    return starts[:-1]


@pytest.mark.parametrize("pixel_format", ["yuv420p", "yuv422p", "yuv444p", "yuv420p10le", "yuv444p10le"])
def test_samples_are_the_nearest_there_are(pixel_format: str) -> None:
    """Luma of noise, and chroma where it is not shared, are within rounding of the formulas of BT.709."""
    rows = np.random.default_rng(3).integers(0, 256, (64, 96, 3), np.uint8)
    frame = YuvConverter(96, 64, pixel_format).convert(rows)
    red, green, blue = np.moveaxis(rows / 255, -1, 0)
    luma = 0.2126 * red + 0.7152 * green + 0.0722 * blue
    found = films._levels(frame, LIMITED)
    unit = 1 / 219 if frame.format.components[0].bits == 8 else 1 / 876
    assert np.abs(found[0] - luma).max() <= 0.56 * unit
    if "444" in pixel_format:
        assert np.abs(found[1] - (blue - luma) / 1.8556).max() <= 0.56 * unit
        assert np.abs(found[2] - (red - luma) / 1.5748).max() <= 0.56 * unit


def test_shared_chroma_stands_at_the_left() -> None:
    """On a slope of chroma, a sample has the value at the left one of its two columns, as players assume."""
    level = np.arange(256)
    rows = np.zeros((16, 256, 3), np.uint8)
    rows[..., 2] = level
    frame = YuvConverter(256, 16, "yuv420p").convert(rows)
    blue_difference = np.frombuffer(frame.planes[1], np.uint8).reshape(8, -1)[0, :128].astype(float)
    wanted = 128 + 224 / 255 * level * (1 - 0.0722) / 1.8556
    inner = slice(8, -8)
    assert abs(np.mean((blue_difference - wanted[0::2])[inner])) < 0.05
    assert abs(np.mean((blue_difference - wanted[1::2])[inner])) > 0.3  # a place one column further would be seen
