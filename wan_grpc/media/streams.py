"""Encoded frames in containers: fragmented and progressive MP4, WebM, Matroska, GIF.

Knows what of a file is written when. Does not know who reads, nor what a request may ask for.
"""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Protocol

import av
import numpy as np
from av.container import OutputContainer
from av.video.stream import VideoStream

from wan_grpc.domain.formats import OutputFormat
from wan_grpc.domain.request import VideoRequest
from wan_grpc.media.codecs import codec_of, converter_of
from wan_grpc.media.samples import stamped

Write = Callable[[bytes], None]

_BLOCK_BYTES = 2**20
"""Of one `write` when a whole file is there to be passed on."""


class ScratchError(OSError):
    """The disk that a file is prepared on did not take or give what it should; most often it is full."""


class _File(Protocol):
    def write(self, data: bytes) -> int: ...


class StreamWriter:
    """One file whose bytes never change once they are written; the first `write` brings the first frame with it.

    FFmpeg's memory and threads go when the last reference to the writer does.
    """

    def __init__(self, video: VideoRequest, write: Write) -> None:
        self._write = write
        self._pending = _Pending()
        self._muxer = _Muxer(video, self._pending, *_streamed(video))

    def add(self, pixels: memoryview) -> None:
        size_before = self._pending.num_bytes
        self._muxer.add(pixels)
        if self._pending.num_bytes > size_before:  # a header alone stays: nobody can play it
            self._write(self._pending.take())

    def finish(self) -> None:
        self._muxer.close()
        self._write(self._pending.take())

    def abort(self) -> None:
        self._muxer.abort()


class ProgressiveWriter:
    """An MP4 file with its index in front of the pictures: prepared on disk, passed on when it is complete."""

    def __init__(self, video: VideoRequest, write: Write, directory: Path | None) -> None:
        self._write = write
        self._file = _Scratch(directory)
        # FFmpeg leaves this room in front and writes the index into it at the end.
        index_bytes = 2048 + 32 * video.num_frames
        options = {"movflags": "write_colr", "moov_size": str(index_bytes), "fflags": "+bitexact"}
        self._muxer = _Muxer(video, self._file, "mp4", options)

    def add(self, pixels: memoryview) -> None:
        self._muxer.add(pixels)

    def finish(self) -> None:
        self._muxer.close()
        for block in self._file.blocks():
            self._write(block)
        self._file.close()

    def abort(self) -> None:
        with suppress(ScratchError):
            self._muxer.abort()
        self._file.close()


class _Muxer:
    """Frames in, a container out, into one file."""

    def __init__(self, video: VideoRequest, file: _File, container: str, options: dict[str, str]) -> None:
        codec = codec_of(video)
        self._video = video
        self._converter = converter_of(codec, video)
        self._container: OutputContainer = av.open(file, "w", format=container, container_options=options)
        if container in ("webm", "matroska"):
            self._container.metadata["DURATION"] = _clock(video)
        stream = self._container.add_stream(codec.encoder, rate=video.fps, options=dict(codec.options))
        assert isinstance(stream, VideoStream)
        codec.configure(stream.codec_context, video)
        self._stream = stream
        self._num_added = 0
        self._container.start_encoding()

    def add(self, pixels: memoryview) -> None:
        frame = stamped(self._converter.convert(_rows(pixels, self._video)), self._num_added, self._video.fps)
        self._container.mux(self._stream.encode(frame))
        self._num_added += 1

    def close(self) -> None:
        self._container.mux(self._stream.encode(None))
        self._container.close()

    def abort(self) -> None:
        with suppress(av.FFmpegError):  # it writes the end of a file that nobody will see
            self._container.close()


class _Pending:
    """The file that FFmpeg writes into. It has no `seek`, so nothing that was written changes later."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self.num_bytes = 0

    def write(self, data: bytes) -> int:
        self._parts.append(bytes(data))
        self.num_bytes += len(data)
        return len(data)

    def take(self) -> bytes:
        data = b"".join(self._parts)
        self._parts.clear()
        self.num_bytes = 0
        return data


class _Scratch:
    """A file without a name, which goes with its last user."""

    def __init__(self, directory: Path | None) -> None:
        with _scratch_errors():
            self._file: IO[bytes] = tempfile.TemporaryFile(dir=directory)  # noqa: SIM115  # `close` closes it

    def write(self, data: bytes) -> int:
        with _scratch_errors():
            return self._file.write(data)

    def seek(self, offset: int, whence: int = 0) -> int:
        with _scratch_errors():
            return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def blocks(self) -> Iterator[bytes]:
        with _scratch_errors():
            self._file.seek(0)
        while block := self._block():
            yield block

    def close(self) -> None:
        with suppress(OSError):  # what is still in its buffer is lost with it
            self._file.close()

    def _block(self) -> bytes:
        with _scratch_errors():
            return self._file.read(_BLOCK_BYTES)


@contextmanager
def _scratch_errors() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ScratchError(error.errno, error.strerror) from error


def _streamed(video: VideoRequest) -> tuple[str, dict[str, str]]:
    """Container and options with which a file is written from front to end."""
    # FFmpeg closes a fragment or cluster when the frame after it arrives: with a quarter of a second in each, it has
    # left before half a second of video went in (from 4 frames a second on; below, every frame is one).
    frames_together = max(1, video.fps // 4)
    duration_us = frames_together * 1_000_000 // video.fps
    bitexact = {"fflags": "+bitexact"}  # no times, no versions
    match video.output_format:
        case OutputFormat.MP4_H264 | OutputFormat.MP4_H265:
            fragments = {"movflags": "empty_moov+default_base_moof", "frag_duration": str(duration_us)}
            return "mp4", bitexact | fragments
        case OutputFormat.WEBM_VP9 | OutputFormat.WEBM_AV1:
            return "webm", bitexact | _clusters(duration_us)
        case OutputFormat.MKV_FFV1:
            return "matroska", bitexact | _clusters(duration_us)
        case OutputFormat.GIF:
            return "gif", bitexact | {"loop": "0"}
        case _:
            raise AssertionError(f"{video.output_format} is not streamed")


def _clusters(duration_us: int) -> dict[str, str]:
    return {"cluster_time_limit": str(duration_us // 1000), "cluster_size_limit": str(2**30), "flush_packets": "1"}


def _clock(video: VideoRequest) -> str:
    """Length of the video as hours, minutes and seconds: what FFmpeg writes to a header that it cannot come back to."""
    milliseconds = round(video.num_frames * 1000 / video.fps)
    minutes, rest = divmod(milliseconds, 60_000)
    return f"{minutes // 60:02}:{minutes % 60:02}:{rest // 1000:02}.{rest % 1000:03}"


def _rows(pixels: memoryview, video: VideoRequest) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    return np.frombuffer(pixels, np.uint8).reshape(video.height, video.width, 3)
