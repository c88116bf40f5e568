"""The boundary around every call: gives it an id, bounds how many there are and what they hold, makes errors statuses.

Knows one call from its bytes to its status. Does not know what a method does.
"""

import asyncio
import re
import traceback
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import ExitStack, aclosing, asynccontextmanager
from contextvars import ContextVar
from enum import Enum, auto
from typing import Any, TypeAlias

import grpc
import structlog
from google.protobuf import descriptor_pool
from google.protobuf.message import DecodeError
from grpc_status.rpc_status import to_status as to_grpc_status

from wan_grpc.domain.errors import Reason, ServiceError
from wan_grpc.rpc.errors import bug_status, to_status
from wan_grpc.rpc.wire import MalformedError, check_wire

REQUEST_ID_KEY = "x-request-id"
GENERATION_KEY = "wan-generation"
_METHODS = "/wan_grpc.v1."
_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,64}")
_ROOM_AGAIN_S = 1.0
_ARRIVAL_S = 120.0
"""Within this time a request must have come whole, since others may wait for the room that is kept for it."""
_SMALL_ARRIVAL_S = 10.0
"""The same where a request is small and the only one, so that it comes with the call."""
_SMALL_BYTES = 64 * 1024
"""What a request without a spec needs at most, and what is not worth to be counted once it is here."""
_TAKE_SPECS = frozenset(f"/wan_grpc.v1.VideoGenerationService/{name}" for name in ("Generate", "CreateGeneration"))

Requests: TypeAlias = Any
Context: TypeAlias = grpc.aio.ServicerContext[Any, Any]
Handler: TypeAlias = Any  # grpc.RpcMethodHandler, whose stubs know synchronous servicers only

log = structlog.stdlib.get_logger("wan_grpc.rpc")


_room: ContextVar[ExitStack] = ContextVar("room")
"""The room that the request of this call takes up; closed as soon as the request is not needed any more."""


async def announce(context: Context, generation: str) -> None:
    """Tell the caller, and the log lines of this call, which generation it is about.

    Sent as initial metadata, which stops clients and proxies from retrying the call and so from doubling the work. From
    now on the request takes up no room: whoever has it lets go of it.
    """
    _room.get().close()
    bound = structlog.contextvars.get_contextvars()
    structlog.contextvars.bind_contextvars(generation=generation)
    await context.send_initial_metadata(((REQUEST_ID_KEY, bound["request_id"]), (GENERATION_KEY, generation)))


class _Kind(Enum):
    """Of a request: what it may hold."""

    SPEC = auto()
    NAME = auto()
    PROBE = auto()
    ONE_OF_MANY = auto()


class CallBoundary(grpc.aio.ServerInterceptor):
    """Wraps every method. Only calls of the API are counted: not health, reflection and channelz.

    max_held: requests that are held at once, from their first byte until they are accepted or refused.

    Each request is received here and not by grpc, which would keep its bytes for as long as the call lasts. On the wire
    a stream of one request is that request.
    """

    def __init__(self, *, max_calls: int | None, max_held: int) -> None:
        self._max_calls = max_calls
        self._tasks: set[asyncio.Task[Any]] = set()
        # Each kind has its own, so that images on their way never keep a generation from being cancelled, and calls
        # that bring nothing never let a live server look dead.
        self._rooms = {kind: asyncio.Semaphore(max_held) for kind in _Kind}

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler | None:
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        path = handler_call_details.method
        if handler.request_streaming:
            return grpc.stream_stream_rpc_method_handler(
                self._exchange(handler, path), response_serializer=handler.response_serializer
            )
        if handler.response_streaming:
            return grpc.stream_stream_rpc_method_handler(
                self._stream(handler, path), response_serializer=handler.response_serializer
            )
        return grpc.stream_unary_rpc_method_handler(
            self._unary(handler, path), response_serializer=handler.response_serializer
        )

    async def wait_idle(self) -> None:
        """Return when no call is left, cleaning up included."""
        while self._tasks:
            await asyncio.wait(self._tasks)

    def _unary(self, handler: Handler, path: str) -> Callable[[Requests, Context], Awaitable[Any]]:
        async def answer(requests: Requests, context: Context) -> Any:
            async with self._call(path, context):
                return await handler.unary_unary(await self._receive_one(handler, path, context), context)

        return answer

    def _stream(self, handler: Handler, path: str) -> Callable[[Requests, Context], Awaitable[None]]:
        async def write_all(requests: Requests, context: Context) -> None:
            async with self._call(path, context):
                answering = handler.unary_stream(await self._receive_one(handler, path, context), context)
                if hasattr(answering, "__aiter__"):
                    await _write(answering, context)
                else:
                    await answering  # which writes by itself

        return write_all

    def _exchange(self, handler: Handler, path: str) -> Callable[[Requests, Context], Awaitable[None]]:
        async def write_all(requests: Requests, context: Context) -> None:
            async with self._call(path, context):
                await _write(handler.stream_stream(self._receive_all(handler, path, context), context), context)

        return write_all

    async def _receive_one(self, handler: Handler, path: str, context: Context) -> Any:
        request = await self._receive(handler, path, context, _kind(path))
        if request is None:
            raise ServiceError(Reason.INVALID_REQUEST, "the call has no request")
        request_id = getattr(request, "request_id", "")
        if _header(context) is None and _REQUEST_ID.fullmatch(request_id):
            structlog.contextvars.bind_contextvars(request_id=request_id)
        return request

    async def _receive_all(self, handler: Handler, path: str, context: Context) -> AsyncGenerator[Any, None]:
        while (request := await self._receive(handler, path, context, _Kind.ONE_OF_MANY)) is not None:
            yield request

    async def _receive(self, handler: Handler, path: str, context: Context, kind: _Kind) -> Any | None:
        """The next request; None when there is no more."""
        await self._rooms[kind].acquire()
        _room.get().callback(self._rooms[kind].release)
        arrival_s = _SMALL_ARRIVAL_S if kind in (_Kind.NAME, _Kind.PROBE) else _ARRIVAL_S
        try:
            async with asyncio.timeout(arrival_s):
                raw = await context.read()
        except TimeoutError:
            sentence = f"no request has arrived within {arrival_s:g} s"
            raise ServiceError(Reason.DEADLINE_EXCEEDED, sentence) from None
        if raw is grpc.aio.EOF:
            return None
        if len(raw) <= _SMALL_BYTES:
            _room.get().close()
        elif kind is not _Kind.SPEC:
            sentence = f"the request has {len(raw)} bytes; at most {_SMALL_BYTES} for this method"
            raise ServiceError(Reason.INVALID_REQUEST, sentence)
        return _parsed(handler, path, raw)

    @asynccontextmanager
    async def _call(self, path: str, context: Context) -> AsyncGenerator[None, None]:
        task = asyncio.current_task()
        assert task is not None
        header = _header(context)
        structlog.contextvars.bind_contextvars(request_id=header or str(uuid.uuid4()), method=path.rpartition("/")[2])
        room = ExitStack()
        _room.set(room)
        try:
            if path.startswith(_METHODS):
                self._check_room()
                self._tasks.add(task)
            yield
        except ServiceError as error:
            status = to_grpc_status(to_status(error, _told()))
            _forget_frames(error)
            await context.abort_with_status(status)
        except (grpc.aio.AbortError, grpc.aio.InternalError):
            raise  # the caller has been told; or the transport has gone, and nobody is left to tell
        except asyncio.CancelledError:
            if task.cancelling():
                raise  # the caller left, its deadline passed or the server stops
            await self._abort_for_bug(context)
        except Exception:  # noqa: BLE001  # the boundary: a caller learns of every bug, and nothing of its insides
            await self._abort_for_bug(context)
        finally:
            room.close()
            self._tasks.discard(task)

    async def _abort_for_bug(self, context: Context) -> None:
        log.exception("a call met a bug")
        await context.abort_with_status(to_grpc_status(bug_status(_told())))

    def _check_room(self) -> None:
        if self._max_calls is not None and len(self._tasks) >= self._max_calls:
            sentence = f"the server already has {self._max_calls} calls at once"
            raise ServiceError(Reason.TOO_MANY_CALLS, sentence, retry_after_s=_ROOM_AGAIN_S)


def _kind(path: str) -> _Kind:
    """Of the one request of a method."""
    if path in _TAKE_SPECS:
        return _Kind.SPEC
    return _Kind.NAME if path.startswith(_METHODS) else _Kind.PROBE


def _forget_frames(error: BaseException | None) -> None:
    """Let go of what the frames behind an error hold, images above all: grpc keeps it in a cycle."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


async def _write(answering: AsyncGenerator[Any, None], context: Context) -> None:
    """All of it. grpc.aio never closes a generator whose call ends while it writes; here its `finally` runs in time."""
    async with aclosing(answering) as responses:
        async for response in responses:
            await context.write(response)


def _parsed(handler: Handler, path: str, raw: bytes) -> Any:
    """The message in `raw`, which is looked at first for what would cost too much, or tell the caller too little."""
    method = descriptor_pool.Default().FindMethodByName(path.removeprefix("/").replace("/", "."))
    try:
        check_wire(raw, method.input_type)
        return handler.request_deserializer(raw)
    except MalformedError as error:
        raise ServiceError(Reason.INVALID_REQUEST, str(error)) from None
    except DecodeError:
        raise ServiceError(Reason.INVALID_REQUEST, str(MalformedError())) from None


def _header(context: Context) -> str | None:
    for key, value in context.invocation_metadata() or ():
        if key == REQUEST_ID_KEY and isinstance(value, str) and _REQUEST_ID.fullmatch(value):
            return value
    return None


def _told() -> dict[str, str]:
    """What a status says about its call: the same words that its log lines carry."""
    bound = structlog.contextvars.get_contextvars()
    return {key: bound[key] for key in ("request_id", "generation") if key in bound}
