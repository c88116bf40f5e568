"""The asyncio client: the same as client.py with `await`.

Knows calls, tasks and time. What arrives is for following.py to judge, on a thread where that takes a while.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from types import TracebackType
from typing import Any, Self, TypeVar, Unpack

import grpc
import grpc.aio

from wan_grpc.v1 import video_generation_service_pb2 as pb
from wan_grpc.v1.video_generation_service_pb2_grpc import VideoGenerationServiceStub
from wan_grpc_client.channel import CHANNEL_OPTIONS
from wan_grpc_client.client import CLOSE_TIMEOUT_S, UNARY_TIMEOUT_S, Metadata
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


class AsyncClient:
    """Speaks to one server. Belongs to one event loop."""

    def __init__(
        self,
        target: str | grpc.aio.Channel,
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
    ) -> "AsyncGeneration":
        """Begin to make a video. `timeout_s` bounds the whole: when it passes, the generation is cancelled.

        Raises:
            ValueError: naming an option that cannot be sent.
            OSError: an image cannot be read, or `output` cannot be written.
        """
        return self.begin(generate_request(prompt, options), Sink(output), timeout_s)

    def watch(self, name: str, *, output: Output = None, timeout_s: float | None = None) -> "AsyncGeneration":
        """Watch a generation from its first event and byte on. Leaving it only detaches."""
        following = Following(Sink(output), self._patience, name=name)
        call = self.attach(following, timeout_s)
        return AsyncGeneration(self, following, call, request_id=None, timeout_s=timeout_s)

    async def get_model(self, *, timeout_s: float = UNARY_TIMEOUT_S) -> pb.GetModelResponse:
        """What the server can do, as the API's own message."""
        return await self._ask(self._stub.GetModel, pb.GetModelRequest(), timeout_s)

    async def get_generation(self, name: str, *, timeout_s: float = UNARY_TIMEOUT_S) -> GenerationStatus:
        request = pb.GetGenerationRequest(name=name)
        return read_generation((await self._ask(self._stub.GetGeneration, request, timeout_s)).generation)

    async def list_generations(
        self, *, states: Iterable[str] = (), timeout_s: float = UNARY_TIMEOUT_S
    ) -> AsyncIterator[GenerationStatus]:
        """All generations in `states` (such as `running`; all when empty), newest first."""
        request = list_request(states)
        while True:
            page = await self._ask(self._stub.ListGenerations, request, timeout_s)
            for generation in page.generations:
                yield read_generation(generation)
            if not page.next_page_token:
                return
            request.page_token = page.next_page_token

    async def cancel_generation(self, name: str, *, timeout_s: float = UNARY_TIMEOUT_S) -> GenerationStatus:
        """Cancel a generation and wait until it is final."""
        request = pb.CancelGenerationRequest(name=name)
        return read_generation((await self._ask(self._stub.CancelGeneration, request, timeout_s)).generation)

    async def delete_generation(self, name: str, *, timeout_s: float = UNARY_TIMEOUT_S) -> None:
        """Remove a generation that is final, and its video."""
        await self._ask(self._stub.DeleteGeneration, pb.DeleteGenerationRequest(name=name), timeout_s)

    async def download_video(self, name: str, *, output: Output = None, timeout_s: float | None = None) -> Download:
        """Fetch a finished video, going on from the last byte when the connection is cut."""
        deadline = Deadline(timeout_s)
        sink = Sink(output)
        fetching = Fetching(name, sink, self._patience)
        try:
            while True:
                outcome = await self._fetch(fetching, deadline.left_s())
                if isinstance(outcome, Download):
                    return outcome
                await asyncio.sleep(outcome.delay_s)
        finally:
            sink.discard()

    async def close(self) -> None:
        """Close the channel, unless it is the caller's."""
        if self._owns_channel:
            await self._channel.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def attach(self, following: Following, timeout_s: float | None) -> Any:
        """A call that brings what has not arrived yet."""
        return self._stub.WatchGeneration(following.next_request(), timeout=timeout_s, metadata=self._metadata)

    def begin(self, request: pb.GenerateRequest, sink: Sink, timeout_s: float | None) -> "AsyncGeneration":
        """A generation whose request and output are known to be good."""
        following = Following(sink, self._patience)
        call = self._stub.Generate(request, timeout=timeout_s, metadata=self._metadata)
        return AsyncGeneration(self, following, call, request_id=request.request_id, timeout_s=timeout_s)

    async def _fetch(self, fetching: Fetching, timeout_s: float | None) -> Reattaching | Download:
        try:
            call = self._stub.DownloadVideo(fetching.next_request(), timeout=timeout_s, metadata=self._metadata)
            async for response in call:
                await asyncio.to_thread(fetching.take, response)
        except grpc.aio.AioRpcError as error:
            return fetching.after_end(from_rpc(error))
        return await asyncio.to_thread(fetching.after_end, None)

    async def _ask(self, method: Callable[..., Awaitable[T]], request: Any, timeout_s: float) -> T:
        try:
            return await method(request, timeout=timeout_s, metadata=self._metadata)
        except grpc.aio.AioRpcError as error:
            raise from_rpc(error) from error


class AsyncGeneration:
    """A generation on its way: an asynchronous iterator of what happens, to be used in an `async with` statement.

    Whoever leaves the statement before the end, or is cancelled while waiting, cancels the generation, unless it was
    only watched, or `detach` was called. A connection that is cut is taken up again where it was.
    """

    def __init__(
        self, client: AsyncClient, following: Following, call: Any, *, request_id: str | None, timeout_s: float | None
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
        self._closed = asyncio.Event()

    @property
    def name(self) -> str | None:
        """Resource name; None until the first event."""
        return self._following.name

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Event:
        """The next event.

        Raises:
            WanGrpcError: the generation, or the way to it, came to an end before the video was complete.
        """
        try:
            event = None if self._closed.is_set() else await self._next()
        except BaseException:
            await self.close()
            raise
        if event is None:
            await self.close()
            raise StopAsyncIteration
        return event

    async def result(self) -> Video:
        """The video, when all of it is there.

        Raises:
            WanGrpcError: there will be none.
        """
        async for _ in self:
            pass
        if self._following.video is None:
            raise left_early(self.name)
        return self._following.video

    async def cancel(self) -> None:
        """Cancel the generation. Iterating, here or in another task, then ends in GenerationCancelledError."""
        if self.name is None:
            self._closed.set()
            self._call.cancel()
        else:
            await self._client.cancel_generation(self.name)

    async def detach(self) -> None:
        """Leave the generation without cancelling it: the server goes on for the time of its detach grace."""
        self._owns = False
        await self.close()

    async def close(self) -> None:
        """Leave the generation. One that this client began and that has not ended is cancelled."""
        was_open = not self._closed.is_set()
        self._closed.set()
        try:
            if was_open and self._owns and self.name is not None and not self._following.is_final:
                with contextlib.suppress(WanGrpcError):  # the server cancels it by itself when it is not watched
                    await self._client.cancel_generation(self.name, timeout_s=CLOSE_TIMEOUT_S)
        finally:
            self._call.cancel()
            self._following.sink.discard()
            if self.closes_client:
                await self._client.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def _next(self) -> Event | None:
        """The next event; None after the last one."""
        if self._again is not None:
            await self._attach_again(self._again.delay_s)
        while True:
            response, error = await self._receive()
            if response is None:
                self._again = self._following.after_end(error, name_in(await self._call.initial_metadata()))
                return self._again
            event = await self._take(response)
            if event is not None:
                return event

    async def _take(self, response: Any) -> Event | None:
        if response.event.HasField("chunk") or response.event.HasField("completed"):
            return await asyncio.to_thread(self._following.take, response.event)  # checksums and files
        return self._following.take(response.event)

    async def _receive(self) -> tuple[Any, WanGrpcError | None]:
        try:
            response = await self._call.read()
        except grpc.aio.AioRpcError as error:
            if self._closed.is_set():
                raise left_early(self.name) from error
            return None, from_rpc(error)
        except asyncio.CancelledError:
            if self._closed.is_set() and not _is_being_cancelled():
                raise left_early(self.name) from None
            raise
        return None if response is grpc.aio.EOF else response, None

    async def _attach_again(self, delay_s: float) -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._closed.wait(), delay_s)
        if self._closed.is_set():
            raise left_early(self.name)
        self._again = None
        self._call = self._client.attach(self._following, self._deadline.left_s())


def generate_async(
    target: str | grpc.aio.Channel,
    prompt: str,
    *,
    output: Output = None,
    timeout_s: float | None = None,
    credentials: grpc.ChannelCredentials | None = None,
    metadata: Metadata = (),
    **options: Unpack[Options],
) -> AsyncGeneration:
    """Make a video in one call: `AsyncClient.generate` with a client of its own."""
    request, sink = generate_request(prompt, options), Sink(output)  # before the channel, which takes an await to close
    client = AsyncClient(target, credentials=credentials, metadata=metadata)
    generation = client.begin(request, sink, timeout_s)
    generation.closes_client = True
    return generation


def _connect(address: str, credentials: grpc.ChannelCredentials | None) -> grpc.aio.Channel:
    if credentials is None:
        return grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS)
    return grpc.aio.secure_channel(address, credentials, options=CHANNEL_OPTIONS)


def _is_being_cancelled() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
