"""The blocking client: one call that makes a video, and the small ones beside it.

Knows calls, threads and time. What arrives is for following.py to judge.
"""

import contextlib
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import TracebackType
from typing import Any, Final, Self, TypeAlias, TypeVar, Unpack

import grpc

from wan_grpc.v1 import video_generation_service_pb2 as pb
from wan_grpc.v1.video_generation_service_pb2_grpc import VideoGenerationServiceStub
from wan_grpc_client.channel import CHANNEL_OPTIONS
from wan_grpc_client.errors import WanGrpcError, from_rpc
from wan_grpc_client.events import Event, GenerationStatus, Reattaching, read_generation
from wan_grpc_client.following import (
    Deadline,
    Download,
    Fetching,
    Following,
    Patience,
    Video,
    left_early,
    name_in,
)
from wan_grpc_client.request import Options, generate_request, list_request
from wan_grpc_client.sink import Output, Sink

T = TypeVar("T")
Metadata: TypeAlias = Sequence[tuple[str, str | bytes]]

UNARY_TIMEOUT_S: Final = 30.0
CLOSE_TIMEOUT_S: Final = 5.0
"""The longest that leaving a generation waits until the server confirms its cancel, which takes effect in any case."""


class Client:
    """Speaks to one server. Safe to use from several threads."""

    def __init__(
        self,
        target: str | grpc.Channel,
        *,
        credentials: grpc.ChannelCredentials | None = None,
        metadata: Metadata = (),
        patience: Patience | None = None,
    ) -> None:
        """`target` is HOST:PORT, plaintext unless there are `credentials`, or a channel, which stays the caller's."""
        self._owns_channel = isinstance(target, str)
        self._channel = _connect(target, credentials) if isinstance(target, str) else target
        self._stub = VideoGenerationServiceStub(self._channel)
        self._metadata = tuple(metadata)
        self._patience = patience or Patience()

    def generate(
        self, prompt: str, *, output: Output = None, timeout_s: float | None = None, **options: Unpack[Options]
    ) -> "Generation":
        """Begin to make a video. `timeout_s` bounds the whole: when it passes, the generation is cancelled.

        Raises:
            ValueError: naming an option that cannot be sent.
            OSError: an image cannot be read, or `output` cannot be written.
        """
        request = generate_request(prompt, options)
        following = Following(Sink(output), self._patience)
        call = self._stub.Generate(request, timeout=timeout_s, metadata=self._metadata)
        return Generation(self, following, call, request_id=request.request_id, timeout_s=timeout_s)

    def watch(self, name: str, *, output: Output = None, timeout_s: float | None = None) -> "Generation":
        """Watch a generation from its first event and byte on. Leaving it only detaches."""
        following = Following(Sink(output), self._patience, name=name)
        call = self.attach(following, timeout_s)
        return Generation(self, following, call, request_id=None, timeout_s=timeout_s)

    def get_model(self, *, timeout_s: float = UNARY_TIMEOUT_S) -> pb.GetModelResponse:
        """What the server can do, as the API's own message."""
        return self._ask(self._stub.GetModel, pb.GetModelRequest(), timeout_s)

    def get_generation(self, name: str, *, timeout_s: float = UNARY_TIMEOUT_S) -> GenerationStatus:
        request = pb.GetGenerationRequest(name=name)
        return read_generation(self._ask(self._stub.GetGeneration, request, timeout_s).generation)

    def list_generations(
        self, *, states: Iterable[str] = (), timeout_s: float = UNARY_TIMEOUT_S
    ) -> Iterator[GenerationStatus]:
        """All generations in `states` (such as `running`; all when empty), newest first."""
        request = list_request(states)
        while True:
            page = self._ask(self._stub.ListGenerations, request, timeout_s)
            yield from map(read_generation, page.generations)
            if not page.next_page_token:
                return
            request.page_token = page.next_page_token

    def cancel_generation(self, name: str, *, timeout_s: float = UNARY_TIMEOUT_S) -> GenerationStatus:
        """Cancel a generation and wait until it is final."""
        request = pb.CancelGenerationRequest(name=name)
        return read_generation(self._ask(self._stub.CancelGeneration, request, timeout_s).generation)

    def delete_generation(self, name: str, *, timeout_s: float = UNARY_TIMEOUT_S) -> None:
        """Remove a generation that is final, and its video."""
        self._ask(self._stub.DeleteGeneration, pb.DeleteGenerationRequest(name=name), timeout_s)

    def download_video(self, name: str, *, output: Output = None, timeout_s: float | None = None) -> Download:
        """Fetch a finished video, going on from the last byte when the connection is cut."""
        deadline = Deadline(timeout_s)
        sink = Sink(output)
        fetching = Fetching(name, sink, self._patience)
        try:
            while True:
                outcome = self._fetch(fetching, deadline.left_s())
                if isinstance(outcome, Download):
                    return outcome
                time.sleep(outcome.delay_s)
        finally:
            sink.discard()

    def close(self) -> None:
        """Close the channel, unless it is the caller's."""
        if self._owns_channel:
            self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def attach(self, following: Following, timeout_s: float | None) -> Any:
        """A call that brings what has not arrived yet."""
        return self._stub.WatchGeneration(following.next_request(), timeout=timeout_s, metadata=self._metadata)

    def _fetch(self, fetching: Fetching, timeout_s: float | None) -> Reattaching | Download:
        try:
            call = self._stub.DownloadVideo(fetching.next_request(), timeout=timeout_s, metadata=self._metadata)
            for response in call:
                fetching.take(response)
        except grpc.RpcError as error:
            return fetching.after_end(from_rpc(error))
        return fetching.after_end(None)

    def _ask(self, method: Callable[..., T], request: Any, timeout_s: float) -> T:
        try:
            return method(request, timeout=timeout_s, metadata=self._metadata)
        except grpc.RpcError as error:
            raise from_rpc(error) from error


class Generation:
    """A generation on its way: an iterator of what happens, to be used in a `with` statement.

    Whoever leaves the statement before the end cancels the generation, unless it was only watched, or `detach` was
    called. A connection that is cut is taken up again where it was.
    """

    def __init__(
        self, client: Client, following: Following, call: Any, *, request_id: str | None, timeout_s: float | None
    ) -> None:
        self.request_id = request_id
        """What makes sending the same request again safe; None for one that is only watched."""
        self.closes_client = False
        self._client = client
        self._following = following
        self._call = call
        self._owns = request_id is not None
        self._deadline = Deadline(timeout_s)
        self._again: Reattaching | None = None
        self._closed = threading.Event()

    @property
    def name(self) -> str | None:
        """Resource name; None until the first event."""
        return self._following.name

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Event:
        """The next event.

        Raises:
            WanGrpcError: the generation, or the way to it, came to an end before the video was complete.
        """
        try:
            event = None if self._closed.is_set() else self._next()
        except BaseException:
            self.close()
            raise
        if event is None:
            self.close()
            raise StopIteration
        return event

    def result(self) -> Video:
        """The video, when all of it is there.

        Raises:
            WanGrpcError: there will be none.
        """
        for _ in self:
            pass
        if self._following.video is None:
            raise left_early(self.name)
        return self._following.video

    def cancel(self) -> None:
        """Cancel the generation. Iterating, here or in another thread, then ends in GenerationCancelledError."""
        if self.name is None:
            self._closed.set()
            self._call.cancel()
        else:
            self._client.cancel_generation(self.name)

    def detach(self) -> None:
        """Leave the generation without cancelling it: the server goes on for the time of its detach grace."""
        self._owns = False
        self.close()

    def close(self) -> None:
        """Leave the generation. One that this client began and that has not ended is cancelled."""
        was_open = not self._closed.is_set()
        self._closed.set()
        try:
            if was_open and self._owns and self.name is not None and not self._following.is_final:
                with contextlib.suppress(WanGrpcError):  # the server cancels it by itself when it is not watched
                    self._client.cancel_generation(self.name, timeout_s=CLOSE_TIMEOUT_S)
        finally:
            self._call.cancel()
            self._following.sink.discard()
            if self.closes_client:
                self._client.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _next(self) -> Event | None:
        """The next event; None after the last one."""
        if self._again is not None:
            self._attach_again(self._again.delay_s)
        while True:
            response, error = self._receive()
            if response is None:
                self._again = self._following.after_end(error, name_in(self._call.initial_metadata()))
                return self._again
            event = self._following.take(response.event)
            if event is not None:
                return event

    def _receive(self) -> tuple[Any, WanGrpcError | None]:
        try:
            return next(self._call, None), None
        except grpc.RpcError as error:
            if self._closed.is_set():
                raise left_early(self.name) from error
            return None, from_rpc(error)

    def _attach_again(self, delay_s: float) -> None:
        if self._closed.wait(delay_s):
            raise left_early(self.name)
        self._again = None
        self._call = self._client.attach(self._following, self._deadline.left_s())


def generate(
    target: str | grpc.Channel,
    prompt: str,
    *,
    output: Output = None,
    timeout_s: float | None = None,
    credentials: grpc.ChannelCredentials | None = None,
    metadata: Metadata = (),
    **options: Unpack[Options],
) -> Generation:
    """Make a video in one call: `Client.generate` with a client of its own."""
    client = Client(target, credentials=credentials, metadata=metadata)
    try:
        generation = client.generate(prompt, output=output, timeout_s=timeout_s, **options)
    except BaseException:
        client.close()
        raise
    generation.closes_client = True
    return generation


def _connect(address: str, credentials: grpc.ChannelCredentials | None) -> grpc.Channel:
    if credentials is None:
        return grpc.insecure_channel(address, options=CHANNEL_OPTIONS)
    return grpc.secure_channel(address, credentials, options=CHANNEL_OPTIONS)
