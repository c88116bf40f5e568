"""Follows one generation, or one download, across the calls that bring it: what arrived, and what to ask for next.

Knows events, order and patience. Does no input or output but into the sink, so that the blocking and the asyncio
client are two thin loops around it.
"""

import random
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import grpc

from wan_grpc.v1 import generation_pb2 as pb
from wan_grpc.v1 import video_generation_service_pb2 as service_pb
from wan_grpc_client.errors import GenerationCancelledError, ServerError, WanGrpcError
from wan_grpc_client.events import Accepted, Completed, Event, Reattaching, Resolved, VideoInfo, read_event, word
from wan_grpc_client.sink import Sink

_NAME_METADATA: Final = "wan-generation"
_CUT_CODES: Final = frozenset(
    {
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.INTERNAL,  # Envoy and nginx end idle and over-long streams so
        grpc.StatusCode.UNKNOWN,  # HAProxy
        grpc.StatusCode.CANCELLED,  # a reset stream; whoever wished it says so in an ErrorInfo
    }
)
_LONG_LIVED_S: Final = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """How often, and how soon, a client takes up a stream again that was cut. Delays double up to the longest."""

    max_attempts: int = 7
    """In a row, without anything new arriving. 0: never."""
    first_delay_s: float = 0.2
    longest_delay_s: float = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Video:
    """A complete video whose every byte is verified."""

    generation: str
    """Resource name, `generations/{id}`."""
    path: Path | None
    """Where it is; None when it went to memory or to a file object."""
    data: bytes | None
    """Its bytes, when they were collected in memory."""
    size_bytes: int
    sha256: str
    resolved: Resolved
    """Every parameter as computed, seed included."""
    info: VideoInfo
    completed: Completed
    warnings: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Download:
    """A video fetched from the server, every byte verified."""

    generation: str
    path: Path | None
    data: bytes | None
    size_bytes: int
    sha256: str
    output_format: str


class Deadline:
    """A point in time that bounds several calls together."""

    def __init__(self, timeout_s: float | None) -> None:
        self._at = None if timeout_s is None else time.monotonic() + timeout_s

    def left_s(self) -> float | None:
        """Seconds until then, at least 0; None for no bound."""
        return None if self._at is None else max(0.0, self._at - time.monotonic())


class Retries:
    """Counts attempts that brought nothing."""

    def __init__(self, patience: Patience) -> None:
        self._patience = patience
        self._num_failed = 0
        self._is_answered = False
        self._began = time.monotonic()

    def answered(self) -> None:
        """The server itself has spoken in this attempt, if only in a heartbeat."""
        self._is_answered = True

    def brought_something(self) -> None:
        self._num_failed = 0

    def again(self, error: WanGrpcError) -> Reattaching:
        """How long to wait before the next attempt.

        Raises:
            WanGrpcError: `error` itself, when it is no cut or patience has come to its end.
        """
        if self._is_answered and time.monotonic() - self._began >= _LONG_LIVED_S:
            self._num_failed = 0  # a proxy that ends every stream after its own time is no reason to give up
        if not _is_cut(error) or self._num_failed >= self._patience.max_attempts:
            raise error
        delay_s = min(self._patience.first_delay_s * 2**self._num_failed, self._patience.longest_delay_s)
        delay_s = max(delay_s * random.uniform(0.8, 1.2), error.retry_after_s or 0.0)
        self._num_failed += 1
        self._is_answered = False
        self._began = time.monotonic() + delay_s
        return Reattaching(attempt=self._num_failed, delay_s=delay_s, message=error.message)


class Following:
    """Where the watcher of one generation stands."""

    def __init__(self, sink: Sink, patience: Patience, *, name: str | None = None) -> None:
        self.sink = sink
        self.name = name
        self.sequence = 0
        self.video: Video | None = None
        self.is_final = False
        """True when the server has said that the generation has ended."""
        self._retries = Retries(patience)
        self._accepted: Accepted | None = None
        self._info: VideoInfo | None = None

    def take(self, message: pb.GenerationEvent) -> Event | None:
        """What a caller sees of `message`; None when that is nothing, or nothing new.

        Raises:
            CorruptVideoError: a chunk, or the whole, is not what was sent.
        """
        self._retries.answered()
        self.name = message.generation or self.name
        match message.WhichOneof("event"):
            case None | "heartbeat":
                return None
            case "chunk":
                self.sink.take(message.chunk.offset, message.chunk.data, message.chunk.crc32c)
            case _ if message.sequence <= self.sequence:
                return None  # was told before the stream was cut
            case _:
                self.sequence = message.sequence
        self._retries.brought_something()
        event = read_event(message)
        self._note(event)
        return event

    def next_request(self) -> service_pb.WatchGenerationRequest:
        """Asks for all that has not arrived."""
        return service_pb.WatchGenerationRequest(
            name=self.name or "", after_sequence=self.sequence, from_offset=self.sink.num_bytes
        )

    def after_end(self, error: WanGrpcError | None, name: str | None) -> Reattaching | None:
        """What to do when a call has ended, in `error` or well: attach again, or nothing.

        `name` is the generation's as the initial metadata of the call tells it.

        Raises:
            WanGrpcError: the generation, or the patience with its connection, has come to an end.
        """
        if self.video is not None:
            return None
        if name is not None:
            self._retries.answered()
        self.name = self.name or name
        if error is None:
            error = ServerError(grpc.StatusCode.UNAVAILABLE, "the stream ended before the video was complete")
        error.generation = error.generation or self.name
        self.is_final = self.is_final or bool(error.generation_state)
        if self.name is None:
            raise error
        return self._retries.again(error)

    def _note(self, event: Event | None) -> None:
        match event:
            case Accepted():
                self._accepted = event
            case VideoInfo():
                self._info = event
            case Completed():
                self.is_final = True
                self.video = self._finish(event)

    def _finish(self, completed: Completed) -> Video:
        if self._accepted is None or self._info is None:
            raise ServerError(grpc.StatusCode.INTERNAL, "the server sent a video without saying what it is")
        self.sink.finish(completed.size_bytes, completed.sha256)
        return Video(
            generation=self.name or "",
            path=self.sink.path,
            data=self.sink.data,
            size_bytes=completed.size_bytes,
            sha256=completed.sha256,
            resolved=self._accepted.resolved,
            info=self._info,
            completed=completed,
            warnings=self._accepted.warnings,
        )


class Fetching:
    """Where the download of one video stands."""

    def __init__(self, name: str, sink: Sink, patience: Patience) -> None:
        self._name = name
        self._sink = sink
        self._head: service_pb.DownloadVideoResponse | None = None
        self._retries = Retries(patience)

    def take(self, message: service_pb.DownloadVideoResponse) -> None:
        """Raises: CorruptVideoError: a chunk is not what was sent."""
        self._retries.answered()
        if message.HasField("chunk"):
            self._sink.take(message.chunk.offset, message.chunk.data, message.chunk.crc32c)
            self._retries.brought_something()
        else:
            self._head = message

    def next_request(self) -> service_pb.DownloadVideoRequest:
        """Asks for all that has not arrived."""
        return service_pb.DownloadVideoRequest(name=self._name, offset=self._sink.num_bytes)

    def after_end(self, error: WanGrpcError | None) -> Reattaching | Download:
        """The result, or how long to wait before asking for the rest.

        Raises:
            WanGrpcError: there is no video to be had, or not as it should be.
        """
        if error is not None:
            error.generation = error.generation or self._name
            return self._retries.again(error)
        if self._head is None:
            raise ServerError(grpc.StatusCode.INTERNAL, "the server sent a video without its size and checksum")
        self._sink.finish(self._head.size_bytes, self._head.sha256)
        return Download(
            generation=self._name,
            path=self._sink.path,
            data=self._sink.data,
            size_bytes=self._head.size_bytes,
            sha256=self._head.sha256,
            output_format=word(pb.OutputFormat, self._head.output_format),
        )


def _is_cut(error: WanGrpcError) -> bool:
    """Whether the connection or the server failed for now, and not the generation for good."""
    if not error.reason:
        return error.code in _CUT_CODES
    return not error.generation_state and error.retry_after_s is not None


def name_in(metadata: Iterable[tuple[str, str | bytes]] | None) -> str | None:
    """The generation that the initial metadata of a call names."""
    found = next((value for key, value in metadata or () if key == _NAME_METADATA), None)
    return found if isinstance(found, str) else None


def left_early(name: str | None) -> GenerationCancelledError:
    """What somebody hears who waits for a generation that this client itself has left."""
    error = GenerationCancelledError(grpc.StatusCode.CANCELLED, "the generation was left before its end")
    error.generation = name
    return error
