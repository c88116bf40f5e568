"""Frames in, the bytes of a video out, while later frames are still to come.

Knows what each format is called and what a frame must look like; mp4.py knows how MP4 is made.
Does not know threads: one encoder belongs to one thread at a time.
"""

from collections.abc import Callable
from typing import Protocol

from wan_grpc.domain.events import VideoInfo
from wan_grpc.domain.formats import OutputFormat
from wan_grpc.domain.request import VideoRequest
from wan_grpc.media.mp4 import Mp4Writer, codec_string

Write = Callable[[bytes], None]


class Encoder:
    """One video being made. `write` gets its bytes, in order and as soon as there are any."""

    def __init__(self, video: VideoRequest, write: Write) -> None:
        self._video = video
        self._num_added = 0
        self._writer: _Writer | None = _WRITERS[video.output_format](video, write)

    def add(self, frame: bytes | memoryview) -> None:
        """Take the next frame: RGB24, rows top to bottom. It is not used after the call.

        Raises:
            ValueError: the frame has another size, or the video has all its frames.
            Exception: whatever `write` raises.
        """
        assert self._writer is not None, "add after finish or abort"
        pixels = memoryview(frame).cast("B")
        if pixels.nbytes != self._video.frame_bytes:
            size = f"{self._video.width} x {self._video.height} x 3 = {self._video.frame_bytes}"
            raise ValueError(f"frame: {pixels.nbytes} bytes; a frame of this video has {size}")
        if self._num_added == self._video.num_frames:
            raise ValueError(f"frame: the video has all its {self._video.num_frames} frames")
        self._writer.add(pixels)
        self._num_added += 1

    def finish(self) -> None:
        """Write what is left of the video.

        Raises:
            ValueError: frames are missing.
            Exception: whatever `write` raises.
        """
        assert self._writer is not None, "finish after finish or abort"
        if self._num_added != self._video.num_frames:
            raise ValueError(f"num_frames: {self._num_added} frames were added; {self._video.num_frames} were promised")
        self._writer.finish()
        self._writer = None

    def abort(self) -> None:
        """Free everything and write nothing more. Does nothing the second time, or after `finish`."""
        if self._writer is not None:
            self._writer.abort()
            self._writer = None


def open_encoder(video: VideoRequest, write: Write) -> Encoder:
    """Begin a video in the format that it asks for. Whoever opens an encoder ends it with `finish` or `abort`."""
    return Encoder(video, write)


def describe(video: VideoRequest) -> VideoInfo:
    """Say what the bytes that an encoder writes for `video` are."""
    return VideoInfo(
        output_format=video.output_format,
        media_type=_media_type(video),
        width=video.width,
        height=video.height,
        num_frames=video.num_frames,
        fps=video.fps,
    )


def _media_type(video: VideoRequest) -> str:
    match video.output_format:
        case OutputFormat.MP4_H264:
            return f'video/mp4; codecs="{codec_string(video)}"'
        case OutputFormat.RAW_RGB24:
            return "application/octet-stream"


class _Writer(Protocol):
    def add(self, pixels: memoryview) -> None: ...

    def finish(self) -> None: ...

    def abort(self) -> None: ...


class _RawWriter:
    def __init__(self, video: VideoRequest, write: Write) -> None:
        self._write = write

    def add(self, pixels: memoryview) -> None:
        self._write(bytes(pixels))

    def finish(self) -> None:
        pass

    def abort(self) -> None:
        pass


_WRITERS: dict[OutputFormat, Callable[[VideoRequest, Write], _Writer]] = {
    OutputFormat.MP4_H264: Mp4Writer,
    OutputFormat.RAW_RGB24: _RawWriter,
}
