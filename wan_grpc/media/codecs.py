"""How each codec is set so that frames leave as they come and the bytes are the same on every machine.

Knows FFmpeg's options and why each is set. Does not know containers.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Final

from av.codec.context import CodecContext, Flags, ThreadType
from av.video.codeccontext import VideoCodecContext
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc

from wan_grpc.domain.formats import Encoding, OutputFormat, PixelFormat, resolve_encoding
from wan_grpc.domain.request import VideoRequest
from wan_grpc.media.samples import BytesConverter, Converter, PaletteConverter, YuvConverter

NUM_THREADS: Final = 4
"""That share a frame of VP9 and FFV1. Slices and tiles are in the stream: they must not follow the machine."""

NUM_H264_THREADS: Final = 8
"""With four, 81 frames of noise at 1280x720 took 2.5 s on 16 cores; with eight 1.4 s, and 1.6% more bytes.

x264 takes fewer for lower pictures, by a rule of its own that knows the height alone.
"""

_RGB_MATRIX: Final = 0
"""Of ISO/IEC 23091-4, where the samples are red, green and blue themselves."""

_AV1_MAX_BITRATE_BPS: Final = 100_000_000
"""What SVT-AV1 takes; with more to spend it would have nothing left to spend it on."""

# SVT-AV1 prints its settings for each video otherwise; it asks for nothing but this variable.
os.environ.setdefault("SVT_LOG", "1")

X264: dict[str, str] = {
    "preset": "faster",
    # Each frame comes out as it goes in: no B-frames, no lookahead, threads share a frame instead of taking several.
    "tune": "zerolatency",
    # Otherwise x264 takes shortcuts in floating point that differ between processors.
    "x264-params": "cpu-independent=1",
}
X265: dict[str, str] = {
    "preset": "veryfast",
    "tune": "zerolatency",
    # One frame at a time, rows of blocks in parallel. That rows are coded for it is in the stream, the number of
    # threads is not; without a number of its own x265 would look at the machine and leave it out on a single core.
    # Every group of pictures stands by itself, and no name or version of the encoder is written.
    "x265-params": "frame-threads=1:pools=8:lookahead-slices=0:open-gop=0:info=0:log-level=error",
}
VP9: dict[str, str] = {
    "deadline": "realtime",
    "cpu-used": "4",
    # No frame waits for later ones.
    "lag-in-frames": "0",
    "auto-alt-ref": "0",
    # Tiles, as many as their least width of 256 pixels allows, are what threads share. Sharing rows (row-mt) burns
    # whole cores in waiting for little gain.
    "tile-columns": "2",
    "row-mt": "0",
}
AV1: dict[str, str] = {
    "preset": "8",
    # pred-struct 1: no frame waits for later ones. lp 4: a level of parallelism that is not asked of the machine.
    "svtav1-params": "pred-struct=1:lp=4",
}
FFV1: dict[str, str] = {"level": "3", "coder": "1", "slicecrc": "1", "slices": "4"}
GIF: dict[str, str] = {
    # Whole frames: each has a palette of its own, so that nothing of the one before can shine through.
    "gifflags": "0",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Codec:
    """One encoder with all its settings for one video."""

    encoder: str
    """As FFmpeg names it."""
    options: Mapping[str, str]
    pixel_format: str = ""
    """As FFmpeg names it; empty for the one that is asked for."""
    num_threads: int = 1
    tag: str | None = None
    """Four characters that a container names the codec by, where FFmpeg would choose others."""
    is_yuv: bool = True
    only_key_frames: bool = False

    def configure(self, context: VideoCodecContext, video: VideoRequest) -> None:
        """Set all but what `options` says."""
        context.width, context.height = video.width, video.height
        context.framerate, context.time_base = Fraction(video.fps), Fraction(1, video.fps)
        context.pix_fmt = self.pixel_format
        context.gop_size = 1 if self.only_key_frames else 2 * video.fps
        context.thread_count, context.thread_type = self.num_threads, ThreadType.SLICE
        context.flags |= Flags.bitexact
        if self.tag is not None:
            context.codec_tag = self.tag
        context.color_primaries = ColorPrimaries.BT709
        if self.is_yuv:
            context.color_trc = ColorTrc.BT709
            context.colorspace, context.color_range = Colorspace.ITU709, ColorRange.MPEG
        else:
            context.color_trc = ColorTrc.IEC61966_2_1
            context.colorspace, context.color_range = _RGB_MATRIX, ColorRange.JPEG


_H264: Final = Codec(encoder="libx264", options=X264, num_threads=NUM_H264_THREADS)
_CODECS: Final = {
    OutputFormat.MP4_H264: _H264,
    OutputFormat.MP4_H264_PROGRESSIVE: _H264,
    OutputFormat.MP4_H265: Codec(encoder="libx265", options=X265, tag="hvc1"),
    OutputFormat.WEBM_VP9: Codec(encoder="libvpx-vp9", options=VP9, num_threads=NUM_THREADS),
    OutputFormat.WEBM_AV1: Codec(encoder="libsvtav1", options=AV1),
    OutputFormat.MKV_FFV1: Codec(
        encoder="ffv1",
        options=FFV1,
        num_threads=NUM_THREADS,
        pixel_format="bgr0",
        is_yuv=False,
        only_key_frames=True,
    ),
    OutputFormat.GIF: Codec(encoder="gif", options=GIF, pixel_format="pal8", is_yuv=False),
}


def codec_of(video: VideoRequest) -> Codec:
    """The encoder for `video`, whose format is one that FFmpeg makes."""
    codec = _CODECS[video.output_format]
    encoding = resolve_encoding(video.encoding, video.output_format)
    pixel_format = codec.pixel_format or _ffmpeg_name(encoding.pixel_format)
    # Where chroma samples of 4:2:0 stand, samples.py decides; in the other formats there is but one place for them.
    sited = {"chroma_sample_location": "left"} if "420" in pixel_format else {}
    options = {**codec.options, **sited, **_asked(encoding, codec.encoder)}
    return replace(codec, pixel_format=pixel_format, options=options)


def converter_of(codec: Codec, video: VideoRequest) -> Converter:
    """What brings RGB frames to the pixel format of `codec`."""
    if codec.pixel_format == "pal8":
        return PaletteConverter()
    if codec.is_yuv:
        return YuvConverter(video.width, video.height, codec.pixel_format)
    return BytesConverter(codec.pixel_format)


def open_codec(codec: Codec, video: VideoRequest) -> VideoCodecContext:
    """The encoder of `codec` by itself, without a container."""
    context = CodecContext.create(codec.encoder, "w")
    assert isinstance(context, VideoCodecContext)
    codec.configure(context, video)
    context.flags |= Flags.global_header
    context.options = dict(codec.options)
    context.open()
    return context


def _asked(encoding: Encoding, encoder: str) -> dict[str, str]:
    if encoding.bitrate_bps is not None:
        return _rate(encoding.bitrate_bps, encoder)
    return {} if encoding.crf is None else {"crf": str(encoding.crf)}


def _rate(bitrate_bps: int, encoder: str) -> dict[str, str]:
    if encoder != "libsvtav1":
        return {"b": str(bitrate_bps)}
    # A rate that holds within each second: without looking ahead SVT-AV1 knows no other.
    rate = str(min(bitrate_bps, _AV1_MAX_BITRATE_BPS))
    return {"b": rate, "maxrate": rate, "bufsize": rate}


def _ffmpeg_name(pixel_format: PixelFormat | None) -> str:
    assert pixel_format is not None, "a resolved encoding has a pixel format"
    return f"{pixel_format}le" if pixel_format.endswith("10") else str(pixel_format)
