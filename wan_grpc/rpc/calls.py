"""The boundary around every call: gives it an id, bounds how many there are, turns what is raised into a status.

Knows one call from its bytes to its status. Does not know what a method does.
"""

import asyncio
import re
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from typing import Any, TypeAlias

import grpc
import structlog
from google.protobuf.message import DecodeError
from grpc_status.rpc_status import to_status as to_grpc_status

from wan_grpc.domain.errors import Reason, ServiceError
from wan_grpc.rpc.errors import bug_status, to_status

REQUEST_ID_KEY = "x-request-id"
GENERATION_KEY = "wan-generation"
_METHODS = "/wan_grpc.v1."
_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,64}")
_ROOM_AGAIN_S = 1.0

Context: TypeAlias = grpc.aio.ServicerContext[Any, Any]
Handler: TypeAlias = Any  # grpc.RpcMethodHandler, whose stubs know synchronous servicers only

log = structlog.stdlib.get_logger("wan_grpc.rpc")


async def announce(context: Context, generation: str) -> None:
    """Tell the caller, and the log lines of this call, which generation it is about.

    Sent as initial metadata, which stops clients and proxies from retrying the call and so from doubling the work.
    """
    bound = structlog.contextvars.get_contextvars()
    structlog.contextvars.bind_contextvars(generation=generation)
    await context.send_initial_metadata(((REQUEST_ID_KEY, bound["request_id"]), (GENERATION_KEY, generation)))


class CallBoundary(grpc.aio.ServerInterceptor):
    """Wraps the methods of the package. Health, reflection and channelz pass as they are and are not counted."""

    def __init__(self, *, max_calls: int | None) -> None:
        self._max_calls = max_calls
        self._tasks: set[asyncio.Task[Any]] = set()

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler | None:
        handler = await continuation(handler_call_details)
        if handler is None or not handler_call_details.method.startswith(_METHODS):
            return handler
        method = handler_call_details.method.rpartition("/")[2]
        if handler.response_streaming:
            return grpc.unary_stream_rpc_method_handler(
                self._stream(handler, method), response_serializer=handler.response_serializer
            )
        return grpc.unary_unary_rpc_method_handler(
            self._unary(handler, method), response_serializer=handler.response_serializer
        )

    async def wait_idle(self) -> None:
        """Return when no call is left, cleaning up included."""
        while self._tasks:
            await asyncio.wait(self._tasks)

    def _unary(self, handler: Handler, method: str) -> Callable[[bytes, Context], Awaitable[Any]]:
        async def answer(raw: bytes, context: Context) -> Any:
            async with self._call(handler, method, raw, context) as request:
                return await handler.unary_unary(request, context)

        return answer

    def _stream(self, handler: Handler, method: str) -> Callable[[bytes, Context], Awaitable[None]]:
        async def write_all(raw: bytes, context: Context) -> None:
            # grpc.aio never closes a generator whose call ends while it writes; here its `finally` runs in this task.
            async with (
                self._call(handler, method, raw, context) as request,
                aclosing(handler.unary_stream(request, context)) as responses,
            ):
                async for response in responses:
                    await context.write(response)

        return write_all

    @asynccontextmanager
    async def _call(self, handler: Handler, method: str, raw: bytes, context: Context) -> AsyncGenerator[Any, None]:
        task = asyncio.current_task()
        assert task is not None
        header = _header(context)
        structlog.contextvars.bind_contextvars(request_id=header or str(uuid.uuid4()), method=method)
        try:
            self._check_room()
            self._tasks.add(task)
            request = _parse(handler, raw)
            if header is None and _REQUEST_ID.fullmatch(getattr(request, "request_id", "")):
                structlog.contextvars.bind_contextvars(request_id=request.request_id)
            yield request
        except ServiceError as error:
            await context.abort_with_status(to_grpc_status(to_status(error, _told())))
        except grpc.aio.InternalError:
            raise  # the transport has gone; nobody is left to tell
        except asyncio.CancelledError:
            if task.cancelling():
                raise  # the caller left, its deadline passed or the server stops
            await self._abort_for_bug(context)
        except Exception:  # noqa: BLE001  # the boundary: a caller learns of every bug, and nothing of its insides
            await self._abort_for_bug(context)
        finally:
            self._tasks.discard(task)

    async def _abort_for_bug(self, context: Context) -> None:
        log.exception("a call met a bug")
        await context.abort_with_status(to_grpc_status(bug_status(_told())))

    def _check_room(self) -> None:
        if self._max_calls is not None and len(self._tasks) >= self._max_calls:
            sentence = f"the server already has {self._max_calls} calls at once"
            raise ServiceError(Reason.TOO_MANY_CALLS, sentence, retry_after_s=_ROOM_AGAIN_S)


def _parse(handler: Handler, raw: bytes) -> Any:
    try:
        return handler.request_deserializer(raw)
    except DecodeError:
        raise ServiceError(Reason.INVALID_REQUEST, "the bytes are not a message of this method") from None


def _header(context: Context) -> str | None:
    for key, value in context.invocation_metadata() or ():
        if key == REQUEST_ID_KEY and isinstance(value, str) and _REQUEST_ID.fullmatch(value):
            return value
    return None


def _told() -> dict[str, str]:
    """What a status says about its call: the same words that its log lines carry."""
    bound = structlog.contextvars.get_contextvars()
    return {key: bound[key] for key in ("request_id", "generation") if key in bound}
