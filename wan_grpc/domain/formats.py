"""What each output format can be asked for: options, their ranges and their usual values.

Knows the rules. Does not know how a format is made; media/ does.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType
from typing import Final

from wan_grpc.domain.errors import Violation

MIN_BITRATE_BPS: Final = 10_000
MAX_BITRATE_BPS: Final = 200_000_000
QUALITIES: Final = (1, 100)
"""Least and most, of every format that has this option."""
MAX_SIDE: Final = 16384
"""Pixels of a side that H.264 encoders take."""


class OutputFormat(StrEnum):
    MP4_H264 = "mp4_h264"
    """Fragmented MP4, H.264 High, 4:2:0, BT.709 limited range."""
    MP4_H264_PROGRESSIVE = "mp4_h264_progressive"
    """MP4 with its index in front of the pictures: the first byte comes when the last frame is encoded."""
    MP4_H265 = "mp4_h265"
    WEBM_VP9 = "webm_vp9"
    WEBM_AV1 = "webm_av1"
    MKV_FFV1 = "mkv_ffv1"
    """Lossless."""
    RAW_RGB24 = "raw_rgb24"
    """Frames one after the other, rows top to bottom, 3 bytes a pixel, no header."""
    WEBP_ANIMATION = "webp_animation"
    GIF = "gif"
    PNG = "png"
    JPEG = "jpeg"
    WEBP = "webp"


class PixelFormat(StrEnum):
    """How samples are stored; the names are FFmpeg's, where 10-bit formats end in `10le`."""

    YUV420P = "yuv420p"
    YUV422P = "yuv422p"
    YUV444P = "yuv444p"
    YUV420P10 = "yuv420p10"
    YUV444P10 = "yuv444p10"
    RGB24 = "rgb24"


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoding:
    """How frames become bytes. In a request None leaves a value to the server; resolved, it does not apply."""

    crf: int | None = None
    """Constant quality of a video codec, 0 is best."""
    bitrate_bps: int | None = None
    """Mean bits a second; instead of `crf`."""
    quality: int | None = None
    """Of JPEG and WebP, 1 to 100, 100 is best."""
    pixel_format: PixelFormat | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class FormatRule:
    """What one output format allows."""

    suffix: str
    """Of the names of its files, with the dot."""
    pixel_formats: tuple[PixelFormat, ...]
    """The first is the usual one."""
    crf: tuple[int, int, int] | None = None
    """Least, most and usual value; None where there is no such option. With it, a bit rate may be asked for instead."""
    default_quality: int | None = None
    """None where there is no such option."""
    is_picture: bool = False
    """One picture, so one frame."""
    max_fps: int | None = None
    max_pixels: int | None = None
    """Of all frames together: what the format is good for."""
    max_side: int = MAX_SIDE
    min_side: int = 1


_YUV8 = (PixelFormat.YUV420P, PixelFormat.YUV422P, PixelFormat.YUV444P)
_YUV = (*_YUV8, PixelFormat.YUV420P10, PixelFormat.YUV444P10)
_RGB = (PixelFormat.RGB24,)
_ANIMATION_PIXELS: Final = 50_000_000

FORMATS: Final[Mapping[OutputFormat, FormatRule]] = MappingProxyType(
    {
        OutputFormat.MP4_H264: FormatRule(suffix=".mp4", pixel_formats=_YUV, crf=(0, 51, 18)),
        OutputFormat.MP4_H264_PROGRESSIVE: FormatRule(suffix=".mp4", pixel_formats=_YUV, crf=(0, 51, 18)),
        OutputFormat.MP4_H265: FormatRule(
            suffix=".mp4", pixel_formats=_YUV, crf=(0, 51, 22), max_side=8192, min_side=32
        ),
        OutputFormat.WEBM_VP9: FormatRule(suffix=".webm", pixel_formats=_YUV8, crf=(0, 63, 24)),
        OutputFormat.WEBM_AV1: FormatRule(
            suffix=".webm",
            pixel_formats=(PixelFormat.YUV420P, PixelFormat.YUV420P10),
            crf=(1, 63, 28),
            max_side=8192,
            min_side=64,
        ),
        OutputFormat.MKV_FFV1: FormatRule(suffix=".mkv", pixel_formats=_RGB),
        OutputFormat.RAW_RGB24: FormatRule(suffix=".rgb", pixel_formats=_RGB),
        OutputFormat.WEBP_ANIMATION: FormatRule(
            suffix=".webp",
            pixel_formats=(PixelFormat.YUV420P,),
            default_quality=90,
            max_pixels=_ANIMATION_PIXELS,
            max_side=16383,
        ),
        OutputFormat.GIF: FormatRule(suffix=".gif", pixel_formats=_RGB, max_fps=50, max_pixels=_ANIMATION_PIXELS),
        OutputFormat.PNG: FormatRule(suffix=".png", pixel_formats=_RGB, is_picture=True),
        OutputFormat.JPEG: FormatRule(suffix=".jpg", pixel_formats=_YUV8, default_quality=90, is_picture=True),
        OutputFormat.WEBP: FormatRule(
            suffix=".webp",
            pixel_formats=(PixelFormat.YUV420P,),
            default_quality=90,
            is_picture=True,
            max_side=16383,
        ),
    }
)


def resolve_encoding(asked: Encoding, output_format: OutputFormat) -> Encoding:
    """Every value that applies to `output_format`, as asked or as usual; what does not apply stays as asked."""
    rule = FORMATS[output_format]
    usual_crf = None if rule.crf is None or asked.bitrate_bps is not None else rule.crf[2]
    return Encoding(
        crf=usual_crf if asked.crf is None else asked.crf,
        bitrate_bps=asked.bitrate_bps,
        quality=rule.default_quality if asked.quality is None else asked.quality,
        pixel_format=asked.pixel_format or rule.pixel_formats[0],
    )


def encoding_violations(encoding: Encoding, output_format: OutputFormat) -> Iterator[Violation]:
    """What of a resolved `encoding` the format cannot do."""
    rule = FORMATS[output_format]
    least, most, _ = rule.crf or (0, 0, 0)
    yield from _option("crf", encoding.crf, output_format, None if rule.crf is None else (least, most))
    bitrates = None if rule.crf is None else (MIN_BITRATE_BPS, MAX_BITRATE_BPS)
    yield from _option("bitrate_bps", encoding.bitrate_bps, output_format, bitrates)
    qualities = None if rule.default_quality is None else QUALITIES
    yield from _option("quality", encoding.quality, output_format, qualities)
    if encoding.crf is not None and encoding.bitrate_bps is not None:
        sentence = "crf and bitrate_bps exclude each other"
        yield Violation(field="spec.encoding.bitrate_bps", description=sentence, reason="DOES_NOT_APPLY")
    if encoding.pixel_format is not None and encoding.pixel_format not in rule.pixel_formats:
        sentence = f"{encoding.pixel_format}; {output_format} has {', '.join(rule.pixel_formats)}"
        yield Violation(field="spec.encoding.pixel_format", description=sentence, reason="NOT_SERVED")


def _option(
    name: str, value: int | None, output_format: OutputFormat, bounds: tuple[int, int] | None
) -> Iterator[Violation]:
    field = f"spec.encoding.{name}"
    if value is None:
        return
    if bounds is None:
        yield Violation(field=field, description=f"{output_format} has no such option", reason="DOES_NOT_APPLY")
    elif not bounds[0] <= value <= bounds[1]:
        sentence = f"{value} is not between {bounds[0]} and {bounds[1]}"
        yield Violation(field=field, description=sentence, reason="OUT_OF_RANGE")
