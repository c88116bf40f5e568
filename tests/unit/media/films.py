"""Videos for the tests of encoders, and readers of what encoders made that lean on no library's idea of colour."""

import io
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import av
import numpy as np
import numpy.typing as npt
from av.codec import CodecContext

from wan_grpc.domain.formats import FORMATS, Encoding, OutputFormat
from wan_grpc.domain.request import VideoRequest
from wan_grpc.media.video import open_encoder

Frames = npt.NDArray[np.uint8]
Values = npt.NDArray[np.float64]

PICTURES = [name for name, rule in FORMATS.items() if rule.is_picture]
LASTING = [name for name in OutputFormat if name not in PICTURES]
"""Formats of more than one frame."""
YUV_VIDEOS = [name for name, rule in FORMATS.items() if rule.crf is not None]


def video(
    width: int = 64,
    height: int = 48,
    num_frames: int = 13,
    fps: int = 16,
    output_format: OutputFormat = OutputFormat.MP4_H264,
    **encoding: Any,
) -> VideoRequest:
    return VideoRequest(
        prompt="a lighthouse",
        negative_prompt="",
        width=width,
        height=height,
        num_frames=num_frames,
        fps=fps,
        num_inference_steps=2,
        guidance_scale=1.0,
        guidance_scale_2=1.0,
        flow_shift=3.0,
        boundary_ratio=None,
        seed=0,
        output_format=output_format,
        encoding=Encoding(**encoding),
    )


def of_format(name: OutputFormat, **more: Any) -> VideoRequest:
    """A small video that the format takes."""
    return video(
        **{"width": 96, "height": 80, "num_frames": 1 if name in PICTURES else 5, "output_format": name, **more}
    )


def waves(request: VideoRequest) -> Frames:
    """Smooth colours that move."""
    t, y, x = np.meshgrid(
        np.arange(request.num_frames) / 16,
        np.linspace(0, 3, request.height),
        np.linspace(0, 4, request.width),
        indexing="ij",
    )
    channels = [np.sin(x + t), np.sin(y - 2 * t), np.sin(x + y + 3 * t)]
    return (np.stack(channels, axis=-1) * 100 + 128).round().astype(np.uint8)


def static(request: VideoRequest) -> Frames:
    """Noise in every pixel: the worst that an encoder can be given."""
    size = (request.num_frames, request.height, request.width, 3)
    return np.random.default_rng(0).integers(0, 256, size, np.uint8)


class Sink:
    """Collects what an encoder writes."""

    def __init__(self) -> None:
        self.writes: list[bytes] = []

    def __call__(self, data: bytes) -> None:
        self.writes.append(data)

    @property
    def data(self) -> bytes:
        return b"".join(self.writes)


def encode(request: VideoRequest, frames: Frames) -> Sink:
    sink = Sink()
    encoder = open_encoder(request, sink)
    for frame in frames:
        encoder.add(frame.tobytes())
    encoder.finish()
    return sink


def decode(data: bytes) -> list[av.VideoFrame]:
    with av.open(io.BytesIO(data), "r") as container:
        return list(container.decode(video=0))


def decoded(request: VideoRequest, data: bytes) -> list[av.VideoFrame]:
    """The frames of a file, by a decoder that has nothing from the library that made it."""
    if request.output_format is OutputFormat.WEBP_ANIMATION and request.num_frames > 1:
        return [frame.decoded() for frame in animation(data)]
    return decode(data)


# Colours ------------------------------------------------------------------------------------------------------------

LUMA_WEIGHTS = {1: (0.2126, 0.0722), 5: (0.299, 0.114), 6: (0.299, 0.114)}
"""Of red and blue, by matrix: BT.709, and BT.601 under both of its numbers."""
FULL_RANGE = 2


def to_rgb(frame: av.VideoFrame, matrix: int | None = None, colour_range: int | None = None) -> Values:
    """What a screen shows, 0 to 255, (height, width, 3): the standards' formulas with the tags of the frame.

    Each chroma sample stands for all the pixels that share it. Other tags than those of the frame may be tried.
    """
    if frame.format.is_rgb or frame.format.name == "bgra":
        return _of_rgb(frame)
    luma, blue_difference, red_difference = _levels(frame, colour_range or frame.color_range)
    weight_red, weight_blue = LUMA_WEIGHTS[matrix or frame.colorspace]
    red = luma + 2 * (1 - weight_red) * red_difference
    blue = luma + 2 * (1 - weight_blue) * blue_difference
    green = (luma - weight_red * red - weight_blue * blue) / (1 - weight_red - weight_blue)
    return np.stack([red, green, blue], axis=-1).clip(0, 1) * 255


def _of_rgb(frame: av.VideoFrame) -> Values:
    order = {"rgb24": (0, 1, 2), "bgr0": (2, 1, 0), "bgra": (2, 1, 0)}[frame.format.name]
    plane = frame.planes[0]
    rows = np.frombuffer(plane, np.uint8).reshape(frame.height, plane.line_size)
    num_channels = 3 if frame.format.name == "rgb24" else 4
    pixels = rows[:, : frame.width * num_channels].reshape(frame.height, frame.width, num_channels)
    return pixels[..., order].astype(np.float64)


def _levels(frame: av.VideoFrame, colour_range: int) -> list[Values]:
    """Luma from 0 to 1 and the two differences from -1/2 to 1/2, each of the frame's full size."""
    bits = frame.format.components[0].bits
    black, white, grey, swing = (16, 219, 128, 224) if colour_range != FULL_RANGE else (0, 255, 128, 255)
    unit = 2 ** (bits - 8)
    if colour_range == FULL_RANGE:
        assert bits == 8
    luma, *chroma = (_full_size(plane, frame, bits).astype(np.float64) for plane in range(3))
    return [(luma / unit - black) / white, *((each / unit - grey) / swing for each in chroma)]


def _full_size(index: int, frame: av.VideoFrame, bits: int) -> npt.NDArray[Any]:
    plane = frame.planes[index]
    sample = np.dtype("<u2" if bits > 8 else "u1")
    rows = np.frombuffer(plane, sample).reshape(plane.height, plane.line_size // sample.itemsize)[:, : plane.width]
    down, right = frame.height // plane.height, frame.width // plane.width
    return rows.repeat(down, axis=0).repeat(right, axis=1)


def psnr(frames_decoded: list[av.VideoFrame], frames: Frames) -> float:
    error = np.mean([(to_rgb(got) - want) ** 2 for got, want in zip(frames_decoded, frames, strict=True)])
    return float(10 * np.log10(255**2 / max(error, 1e-9)))


# MP4 ----------------------------------------------------------------------------------------------------------------


def boxes(data: bytes, start: int = 0) -> Iterator[tuple[str, bytes]]:
    """The MP4 boxes that lie one after the other from `start`, each with its content."""
    while start < len(data):
        size, name = struct.unpack_from(">I4s", data, start)
        assert 8 <= size <= len(data) - start
        yield name.decode(), data[start + 8 : start + size]
        start += size


def box(data: bytes, *path: str) -> bytes:
    for name in path:
        data = dict(boxes(data))[name]
    return data


def sample_entry(data: bytes) -> tuple[str, dict[str, bytes]]:
    """Name and boxes of the one kind of picture in an MP4 file."""
    ((name, entry),) = boxes(box(data, "moov", "trak", "mdia", "minf", "stbl", "stsd")[8:])
    return name, dict(boxes(entry, 78))


# Matroska -----------------------------------------------------------------------------------------------------------

SEGMENT, INFO, TRACKS, TRACK, VIDEO, COLOUR, CLUSTER = (
    0x18538067,
    0x1549A966,
    0x1654AE6B,
    0xAE,
    0xE0,
    0x55B0,
    0x1F43B675,
)
TIMESTAMP_SCALE, DURATION, CODEC_ID, CODEC_PRIVATE, DEFAULT_DURATION = 0x2AD7B1, 0x4489, 0x86, 0x63A2, 0x23E383


def elements(data: bytes) -> Iterator[tuple[int, bytes]]:
    """The EBML elements that lie one after the other; one of unknown size goes on to the end."""
    position = 0
    while position < len(data):
        name, position = _number(data, position, keep_marker=True)
        size, position = _number(data, position)
        end = len(data) if size is None else position + size
        assert name is not None and end <= len(data)
        yield name, data[position:end]
        position = end


def element(data: bytes, *path: int) -> bytes:
    for name in path:
        data = next(content for found, content in elements(data) if found == name)
    return data


def numbers(data: bytes) -> dict[int, int]:
    return {name: int.from_bytes(content) for name, content in elements(data)}


def _number(data: bytes, position: int, *, keep_marker: bool = False) -> tuple[int | None, int]:
    length = 9 - data[position].bit_length()
    value = int.from_bytes(data[position : position + length])
    marker = 1 << 7 * length
    if not keep_marker:
        value -= marker
        if value == marker - 1:
            return None, position + length
    return value, position + length


# Animated WebP ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AnimationFrame:
    x: int
    y: int
    width: int
    height: int
    duration_ms: int
    vp8: bytes

    def decoded(self) -> av.VideoFrame:
        """By FFmpeg's own decoder of VP8; it tags nothing, since VP8 has but one kind of colours."""
        (frame,) = CodecContext.create("vp8", "r").decode(av.Packet(self.vp8))
        frame.colorspace, frame.color_range = 5, 1
        return frame


def riff(data: bytes, start: int) -> Iterator[tuple[str, bytes]]:
    while start < len(data):
        name, size = struct.unpack_from("<4sI", data, start)
        assert size <= len(data) - start - 8
        yield name.decode(), data[start + 8 : start + 8 + size]
        start += 8 + size + size % 2


def animation(data: bytes) -> list[AnimationFrame]:
    assert data[:4] + data[8:12] == b"RIFFWEBP"
    assert len(data) == 8 + int.from_bytes(data[4:8], "little")
    return [_animation_frame(content) for name, content in riff(data, 12) if name == "ANMF"]


def _animation_frame(content: bytes) -> AnimationFrame:
    x, y, width, height, duration_ms = (int.from_bytes(content[at : at + 3], "little") for at in range(0, 15, 3))
    ((name, vp8),) = riff(content, 16)
    assert name == "VP8 ", "a whole opaque picture"
    return AnimationFrame(2 * x, 2 * y, width + 1, height + 1, duration_ms, vp8)


def at_times(request: VideoRequest) -> list[Fraction]:
    return [Fraction(index, request.fps) for index in range(request.num_frames)]
