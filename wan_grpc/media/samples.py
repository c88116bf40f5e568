"""RGB frames become what an encoder takes: planes of luma and chroma, other orders of bytes, palettes.

Knows BT.709 in limited range with chroma sited left, as players assume it. The same samples on every machine.
"""

from fractions import Fraction
from math import isqrt
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from av.filter import Graph
from av.video.frame import PictureType, VideoFrame
from av.video.reformatter import VideoReformatter
from PIL import Image

Rows = npt.NDArray[np.uint8]
"""(height, width, 3) of one frame, RGB."""

_NUM_THREADS = 4
"""Of a conversion. They share a frame row by row, so that their number changes no sample."""

# Accurate and bit-exact: the same rounding with and without vector instructions.
_SCALE = (
    "in_range=full:out_range=limited:out_color_matrix=bt709:out_chroma_loc=left"
    ":flags=bicubic+full_chroma_inp+accurate_rnd+bitexact"
)
_MAX_PALETTE_PIXELS = 2**13
"""Pixels of a frame that its palette is chosen from: more take longer and change next to nothing."""


class Converter(Protocol):
    def convert(self, rows: Rows) -> VideoFrame:
        """Give a frame with memory of its own."""
        ...


class YuvConverter:
    """To planar YUV of any depth and subsampling that FFmpeg knows."""

    def __init__(self, width: int, height: int, pixel_format: str) -> None:
        self._graph = Graph()
        self._graph.threads = _NUM_THREADS
        size = f"video_size={width}x{height}:pixel_aspect=1/1:time_base=1/1"
        self._source = self._graph.add("buffer", f"{size}:pix_fmt=rgb24:colorspace=gbr:range=pc")
        scale = self._graph.add("scale", _SCALE)
        wanted = self._graph.add("format", f"pix_fmts={pixel_format}")
        self._sink = self._graph.add("buffersink")
        self._source.link_to(scale)
        scale.link_to(wanted)
        wanted.link_to(self._sink)
        self._graph.configure()

    def convert(self, rows: Rows) -> VideoFrame:
        self._source.push(VideoFrame.from_numpy_buffer(rows, "rgb24"))
        frame = self._sink.pull()
        assert isinstance(frame, VideoFrame)
        return frame


class BytesConverter:
    """To another order of the same bytes, e.g. `bgr0`: nothing is lost."""

    def __init__(self, pixel_format: str) -> None:
        self._pixel_format = pixel_format
        self._reformatter = VideoReformatter()

    def convert(self, rows: Rows) -> VideoFrame:
        return self._reformatter.reformat(
            VideoFrame.from_numpy_buffer(rows, "rgb24"), format=self._pixel_format, threads=1
        )


class PaletteConverter:
    """To 256 colours, chosen for each frame by itself, with the error of each pixel spread over its neighbours."""

    def convert(self, rows: Rows) -> VideoFrame:
        image = Image.fromarray(rows)
        palette = _fewer_pixels(image).quantize(256, Image.Quantize.MAXCOVERAGE)
        indexed = image.quantize(palette=palette, dither=Image.Dither.FLOYDSTEINBERG)
        pair = (np.asarray(indexed), _argb(indexed))
        return VideoFrame.from_ndarray(pair, format="pal8")  # type: ignore[arg-type]  # the stub knows no pairs


def stamped(frame: VideoFrame, index: int, fps: int) -> VideoFrame:
    """`frame` as number `index` of its video, with the choice of its type left to the encoder."""
    frame.pts, frame.time_base = index, Fraction(1, fps)
    frame.pict_type = PictureType.NONE
    return frame


def _fewer_pixels(image: Image.Image) -> Image.Image:
    factor = isqrt(image.width * image.height // _MAX_PALETTE_PIXELS)
    return image.reduce(min(factor, image.width, image.height)) if factor > 1 else image


def _argb(indexed: Image.Image) -> npt.NDArray[Any]:
    colours = np.frombuffer(bytes(indexed.getpalette() or []), np.uint8).reshape(-1, 3)
    palette = np.zeros((256, 4), np.uint8)
    palette[:, 0] = 255
    palette[: len(colours), 1:] = colours
    return palette
