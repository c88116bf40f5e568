"""The methods of the API over the engine: convert, call, convert back.

Knows which engine call answers which method, and what a passed deadline means. Does not know how a fault is told.
"""

import asyncio
import base64
import binascii
import math
from collections.abc import AsyncIterator, Awaitable
from contextlib import aclosing
from typing import TYPE_CHECKING, TypeVar

import structlog

from wan_grpc.domain.errors import InvalidRequestError, NotSupportedError, Reason, ServiceError, Violation
from wan_grpc.domain.events import Failed, Generation, Record
from wan_grpc.rpc.calls import Context, announce
from wan_grpc.rpc.capabilities import describe
from wan_grpc.rpc.convert import (
    OUTPUT_FORMATS,
    check_name,
    check_not_negative,
    to_chunk,
    to_domain,
    to_event,
    to_generation,
    to_states,
)
from wan_grpc.rpc.errors import UnsuccessfulEndError
from wan_grpc.rpc.unserved import UNSERVED_FIELDS, UNSERVED_METHODS
from wan_grpc.v1 import adapter_service_pb2 as adapters
from wan_grpc.v1 import video_generation_service_pb2 as pb
from wan_grpc.v1.adapter_service_pb2_grpc import AdapterServiceServicer
from wan_grpc.v1.video_generation_service_pb2_grpc import VideoGenerationServiceServicer

if TYPE_CHECKING:
    from wan_grpc.engine.engine import Engine

T = TypeVar("T")

_PAGE_SIZE = 50
_MAX_PAGE_SIZE = 100
_NEAR_DEADLINE_S = 1.0
"""A caller whose deadline passes hangs up; that arrives here up to a trip before our own clock says so."""


class VideoGenerationService(VideoGenerationServiceServicer):
    """Makes videos through the engine."""

    def __init__(self, engine: "Engine") -> None:
        self._engine = engine
        self._expiries: set[asyncio.Task[None]] = set()

    async def wait_idle(self) -> None:
        """Return when the engine has been told of every deadline that passed."""
        while self._expiries:
            await asyncio.wait(self._expiries)

    async def Generate(self, request: pb.GenerateRequest, context: Context) -> AsyncIterator[pb.GenerateResponse]:
        deadline = Deadline(context)
        generation = await deadline.meet(self._submit(request, watched=True))
        del request  # which may hold large images, and the stream may last for hours
        try:
            async with aclosing(self._engine.watch(generation.name)) as records:
                record = await deadline.meet(anext(records, None))  # a caller that leaves from now on is missed
                await announce(context, generation.name)
                while record is not None:
                    yield pb.GenerateResponse(event=to_event(generation.name, _checked(record)))
                    record = await deadline.meet(anext(records, None))
        except UnsuccessfulEndError:
            raise  # the generation is final: there is nothing left to expire
        except BaseException:
            if deadline.is_near():
                self._expire(generation.name, deadline)
            raise

    async def CreateGeneration(
        self, request: pb.CreateGenerationRequest, context: Context
    ) -> pb.CreateGenerationResponse:
        generation = await self._submit(request, watched=False)
        await announce(context, generation.name)
        return pb.CreateGenerationResponse(generation=to_generation(generation))

    async def WatchGeneration(
        self, request: pb.WatchGenerationRequest, context: Context
    ) -> AsyncIterator[pb.WatchGenerationResponse]:
        check_not_negative(after_sequence=request.after_sequence, from_offset=request.from_offset)
        name = self._find(request.name).name
        await announce(context, name)
        watch = self._engine.watch(name, after=request.after_sequence, from_offset=request.from_offset)
        async with aclosing(watch) as records:
            async for record in records:
                yield pb.WatchGenerationResponse(event=to_event(name, _checked(record)))

    async def GetGeneration(self, request: pb.GetGenerationRequest, context: Context) -> pb.GetGenerationResponse:
        return pb.GetGenerationResponse(generation=to_generation(self._find(request.name)))

    async def ListGenerations(self, request: pb.ListGenerationsRequest, context: Context) -> pb.ListGenerationsResponse:
        check_not_negative(page_size=request.page_size)
        page, has_more = self._engine.list(
            page_size=min(request.page_size or _PAGE_SIZE, _MAX_PAGE_SIZE),
            after_name=self._from_token(request.page_token),
            states=to_states(request.states),
        )
        return pb.ListGenerationsResponse(
            generations=[to_generation(generation) for generation in page],
            next_page_token=_to_token(page[-1].name) if has_more else "",
        )

    async def CancelGeneration(
        self, request: pb.CancelGenerationRequest, context: Context
    ) -> pb.CancelGenerationResponse:
        generation = await self._engine.cancel(self._find(request.name).name)
        return pb.CancelGenerationResponse(generation=to_generation(generation))

    async def DeleteGeneration(
        self, request: pb.DeleteGenerationRequest, context: Context
    ) -> pb.DeleteGenerationResponse:
        await self._engine.delete(self._find(request.name).name)
        return pb.DeleteGenerationResponse()

    async def DownloadVideo(
        self, request: pb.DownloadVideoRequest, context: Context
    ) -> AsyncIterator[pb.DownloadVideoResponse]:
        check_not_negative(offset=request.offset, limit=request.limit)
        generation = self._find(request.name)
        video = self._engine.read_video(generation.name, offset=request.offset, limit=request.limit or None)
        async with aclosing(video) as chunks:
            first = await anext(chunks, None)  # refuses before anything is sent
            yield _download_header(generation)
            if first is not None:
                yield pb.DownloadVideoResponse(chunk=to_chunk(first))
            async for chunk in chunks:
                yield pb.DownloadVideoResponse(chunk=to_chunk(chunk))

    async def GetModel(self, request: pb.GetModelRequest, context: Context) -> pb.GetModelResponse:
        return describe(self._engine.card, self._engine.status())

    async def _submit(self, message: pb.GenerateRequest | pb.CreateGenerationRequest, *, watched: bool) -> Generation:
        asked = to_domain(message)
        try:
            return await self._engine.submit(asked.request, watched=watched, found=asked.found)
        except InvalidRequestError as error:
            fields = tuple(violation.field for violation in error.violations)
            if UNSERVED_FIELDS.keys() >= set(fields):  # nothing else is wrong with it
                raise NotSupportedError(str(error), fields=fields) from None
            raise

    def _expire(self, name: str, deadline: "Deadline") -> None:
        """Tell the engine when the deadline is there. A task of its own, for grpc may cancel a call while it ends."""

        async def tell() -> None:
            await deadline.wait()
            await self._engine.expire(name)

        task = asyncio.create_task(tell())
        self._expiries.add(task)
        task.add_done_callback(self._expiries.discard)

    def _find(self, name: str) -> Generation:
        structlog.contextvars.bind_contextvars(generation=check_name(name))
        return self._engine.get(name)

    def _from_token(self, token: str) -> str | None:
        """The name after which the page begins; it must still exist, for else its place in the list is lost."""
        if not token:
            return None
        try:
            return self._engine.get(base64.urlsafe_b64decode(token).decode("ascii")).name
        except (binascii.Error, ValueError, ServiceError):
            sentence = "is not a token of this list any more; begin again without one"
            violation = Violation(field="page_token", description=sentence, reason="NOT_A_TOKEN")
            raise InvalidRequestError((violation,)) from None


class AdapterService(AdapterServiceServicer):
    """Says plainly that this server loads no adapters."""

    async def LoadAdapter(self, request: adapters.LoadAdapterRequest, context: Context) -> adapters.LoadAdapterResponse:
        raise _not_served("LoadAdapter")

    async def UnloadAdapter(
        self, request: adapters.UnloadAdapterRequest, context: Context
    ) -> adapters.UnloadAdapterResponse:
        raise _not_served("UnloadAdapter")

    async def ListAdapters(
        self, request: adapters.ListAdaptersRequest, context: Context
    ) -> adapters.ListAdaptersResponse:
        raise _not_served("ListAdapters")


class Deadline:
    """When the deadline of a call passes, on the loop's clock. Kept by us: `context.cancelled()` does not know."""

    def __init__(self, context: Context) -> None:
        left_s: float | None = context.time_remaining()
        self._at = None if left_s is None else asyncio.get_running_loop().time() + left_s

    async def meet(self, work: Awaitable[T]) -> T:
        """What `work` gives, if it does so in time. Raises: ServiceError: DEADLINE_EXCEEDED."""
        try:
            async with asyncio.timeout_at(self._at) as scope:
                return await work
        except TimeoutError:
            if not scope.expired():
                raise
            raise ServiceError(Reason.DEADLINE_EXCEEDED, "the deadline of the call has passed") from None

    def is_near(self) -> bool:
        """Whether a call that ends now is taken to end because of it."""
        return self._left_s() <= _NEAR_DEADLINE_S

    async def wait(self) -> None:
        """Return when it has passed."""
        await asyncio.sleep(max(0.0, self._left_s()))

    def _left_s(self) -> float:
        return math.inf if self._at is None else self._at - asyncio.get_running_loop().time()


def _checked(record: Record) -> Record:
    if isinstance(record.event, Failed):
        raise UnsuccessfulEndError(record.event.failure)
    return record


def _download_header(generation: Generation) -> pb.DownloadVideoResponse:
    assert generation.completed is not None, f"{generation.name} has bytes and no end"
    return pb.DownloadVideoResponse(
        size_bytes=generation.completed.size_bytes,
        sha256=generation.completed.sha256,
        output_format=OUTPUT_FORMATS[generation.video.output_format],
    )


def _to_token(name: str) -> str:
    return base64.urlsafe_b64encode(name.encode("ascii")).decode("ascii")


def _not_served(method: str) -> NotSupportedError:
    return NotSupportedError(UNSERVED_METHODS[f"wan_grpc.v1.AdapterService/{method}"])
