"""Frames in, the bytes of a video out, while later frames are still to come.

Knows what each format is called and what a frame must look like; streams.py and pictures.py know how files are made.
Does not know threads: one encoder belongs to one thread at a time.
"""

from pathlib import Path
from typing import Protocol

from wan_grpc.domain.events import VideoInfo
from wan_grpc.domain.formats import FORMATS, OutputFormat
from wan_grpc.domain.request import VideoRequest
from wan_grpc.media.codec_names import codec_name
from wan_grpc.media.pictures import PictureWriter, WebpAnimationWriter
from wan_grpc.media.streams import ProgressiveWriter, ScratchError, StreamWriter, Write

__all__ = ["Encoder", "ScratchError", "describe", "open_encoder"]

_MEDIA_TYPES = {
    OutputFormat.MP4_H264: "video/mp4",
    OutputFormat.MP4_H264_PROGRESSIVE: "video/mp4",
    OutputFormat.MP4_H265: "video/mp4",
    OutputFormat.WEBM_VP9: "video/webm",
    OutputFormat.WEBM_AV1: "video/webm",
    OutputFormat.MKV_FFV1: "video/matroska",
    OutputFormat.RAW_RGB24: "application/octet-stream",
    OutputFormat.WEBP_ANIMATION: "image/webp",
    OutputFormat.GIF: "image/gif",
    OutputFormat.PNG: "image/png",
    OutputFormat.JPEG: "image/jpeg",
    OutputFormat.WEBP: "image/webp",
}


class Encoder:
    """One video being made. `write` gets its bytes, in order and as soon as there are any.

    scratch: directory for a file that must be complete before its first byte can be written; None for the system's.

    Raises:
        ScratchError: from every method, when the disk of `scratch` refuses.
    """

    def __init__(self, video: VideoRequest, write: Write, *, scratch: Path | None = None) -> None:
        self._video = video
        self._num_added = 0
        self._writer: _Writer | None = _open_writer(video, write, scratch)

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


def open_encoder(video: VideoRequest, write: Write, *, scratch: Path | None = None) -> Encoder:
    """Begin a video in the format that it asks for. Whoever opens an encoder ends it with `finish` or `abort`."""
    return Encoder(video, write, scratch=scratch)


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
    media_type = _MEDIA_TYPES[video.output_format]
    return f'{media_type}; codecs="{codec_name(video)}"' if media_type.startswith("video/") else media_type


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


def _open_writer(video: VideoRequest, write: Write, scratch: Path | None) -> _Writer:
    match video.output_format:
        case OutputFormat.RAW_RGB24:
            return _RawWriter(video, write)
        case OutputFormat.MP4_H264_PROGRESSIVE:
            return ProgressiveWriter(video, write, scratch)
        case OutputFormat.WEBP_ANIMATION:
            return WebpAnimationWriter(video, write)
        case _ if FORMATS[video.output_format].is_picture:
            return PictureWriter(video, write)
        case _:
            return StreamWriter(video, write)
