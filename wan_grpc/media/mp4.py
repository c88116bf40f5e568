"""H.264 in fragmented MP4: playable from its first fragment, and the same bytes on every machine.

Knows FFmpeg's options and why each is set. Does not know who reads, nor what a request may ask for.
"""

from collections.abc import Callable
from contextlib import suppress
from fractions import Fraction

import av
import numpy as np
from av.codec.context import Flags, ThreadType
from av.container import OutputContainer
from av.video.frame import VideoFrame
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc, Interpolation, VideoReformatter
from av.video.stream import VideoStream

from wan_grpc.domain.request import VideoRequest

NUM_THREADS = 4
"""Slices of a frame that are encoded at once. They are in the stream, so their number must not follow the machine."""

_X264 = {
    "preset": "faster",
    "crf": "18",
    # Each frame comes out as it goes in: no B-frames, no lookahead, threads share a frame instead of taking several.
    "tune": "zerolatency",
    # Otherwise x264 takes shortcuts in floating point that differ between processors.
    "x264-params": "cpu-independent=1",
}
# Accurate and bit-exact: the same rounding with and without vector instructions.
_CONVERSION = Interpolation.BICUBIC | Interpolation.FULL_CHR_H_INP | Interpolation.ACCURATE_RND | Interpolation.BITEXACT
_SPS_START = b"\x00\x00\x01\x67"


class Mp4Writer:
    """One MP4 file. Every fragment is one `write`; the first brings the header with it.

    FFmpeg's memory and threads go when the last reference to the writer does.
    """

    def __init__(self, video: VideoRequest, write: Callable[[bytes], None]) -> None:
        self._video = video
        self._write = write
        self._pending = _Pending()
        self._container = _open_container(video, self._pending)
        self._stream = _add_stream(self._container, video)
        self._reformatter = VideoReformatter()
        self._num_added = 0
        self._container.start_encoding()

    @property
    def parameter_sets(self) -> bytes:
        """What a decoder must know first: H.264 NAL units with start codes."""
        return self._stream.codec_context.extradata or b""

    def add(self, pixels: memoryview) -> None:
        size_before = self._pending.num_bytes
        self._container.mux(self._stream.encode(self._to_yuv(pixels)))
        if self._pending.num_bytes > size_before:  # a header alone stays: nobody can play it
            self._write(self._pending.take())

    def finish(self) -> None:
        self._container.mux(self._stream.encode(None))
        self._container.close()
        self._write(self._pending.take())

    def abort(self) -> None:
        with suppress(av.FFmpegError):  # it writes the end of a file that nobody will see
            self._container.close()

    def _to_yuv(self, pixels: memoryview) -> VideoFrame:
        rows = np.frombuffer(pixels, np.uint8).reshape(self._video.height, self._video.width, 3)
        frame = self._reformatter.reformat(
            VideoFrame.from_numpy_buffer(rows, "rgb24"),
            format="yuv420p",
            src_color_range=ColorRange.JPEG,
            dst_color_range=ColorRange.MPEG,
            dst_colorspace=Colorspace.ITU709,
            interpolation=_CONVERSION,
            threads=1,
        )
        frame.pts, frame.time_base = self._num_added, Fraction(1, self._video.fps)
        self._num_added += 1
        return frame


class _Pending:
    """The file that FFmpeg writes into. It has no `seek`, so nothing that was written changes later."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self.num_bytes = 0

    def write(self, data: bytes) -> int:
        self._parts.append(data)
        self.num_bytes += len(data)
        return len(data)

    def take(self) -> bytes:
        data = b"".join(self._parts)
        self._parts.clear()
        self.num_bytes = 0
        return data


def codec_string(video: VideoRequest) -> str:
    """Name the codec as RFC 6381 does, e.g. `avc1.64001f`; profile and level are the encoder's own choice."""
    writer = Mp4Writer(video, lambda _: None)
    try:
        _, _, parameters = writer.parameter_sets.partition(_SPS_START)
        return f"avc1.{parameters[:3].hex()}"
    finally:
        writer.abort()


def _open_container(video: VideoRequest, file: _Pending) -> OutputContainer:
    # FFmpeg closes a fragment when the frame after it arrives: with a quarter of a second in each, a fragment has left
    # before half a second of video went in (from 4 frames a second on; below, every frame is a fragment).
    frames_in_fragment = max(1, video.fps // 4)
    options = {
        "movflags": "empty_moov+default_base_moof",
        "frag_duration": str(frames_in_fragment * 1_000_000 // video.fps),
        "fflags": "+bitexact",  # no times, no versions
    }
    return av.open(file, "w", format="mp4", container_options=options)


def _add_stream(container: OutputContainer, video: VideoRequest) -> VideoStream:
    stream = container.add_stream("libx264", rate=video.fps, width=video.width, height=video.height, options=_X264)
    codec = stream.codec_context
    codec.pix_fmt = "yuv420p"
    codec.gop_size = 2 * video.fps
    codec.thread_count, codec.thread_type = NUM_THREADS, ThreadType.SLICE
    codec.flags |= Flags.bitexact
    codec.color_primaries, codec.color_trc = ColorPrimaries.BT709, ColorTrc.BT709
    codec.colorspace, codec.color_range = Colorspace.ITU709, ColorRange.MPEG
    return stream
