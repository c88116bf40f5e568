"""Liveness and readiness as grpc.health.v1: "" answers while the process does, each service's name while it can work.

Knows the library's servicer. Does not know what readiness depends on; it is told, and never asks a device.
"""

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any

import grpc
from grpc_health.v1 import health_pb2
from grpc_health.v1.health import aio

from wan_grpc.rpc.calls import Context

_SERVING = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


class Health(aio.HealthServicer):
    """The library's servicer, with readiness that follows the engine and watches that end when the server stops."""

    def __init__(self, services: Sequence[str]) -> None:
        super().__init__()
        self._services = tuple(services)
        self._watches: set[asyncio.Task[None]] = set()
        self._is_leaving = False
        self._telling = asyncio.Lock()

    async def begin(self) -> None:
        """Say NOT_SERVING until the engine says otherwise."""
        await self._tell(False)

    async def follow(self, changes: AsyncIterator[bool]) -> None:
        """Repeat readiness as it changes, until cancelled or `changes` fails; then nobody trusts a stale word."""
        try:
            async for ready in changes:
                await self._tell(ready)
        finally:
            await self._tell(False)

    async def leave(self) -> None:
        """Say NOT_SERVING from now on, whatever the engine says. Liveness stays: the process still works."""
        self._is_leaving = True
        await self._tell(False)

    async def end_watches(self) -> None:
        """End every Watch, which would otherwise outlast any grace."""
        for task in self._watches:
            task.cancel()
        if self._watches:
            await asyncio.wait(self._watches)

    async def List(self, request: Any, context: Context) -> Any:
        asked = [health_pb2.HealthCheckRequest(service=service) for service in ("", *self._services)]
        return health_pb2.HealthListResponse(  # type: ignore[attr-defined]  # the stubs do not know it
            statuses={each.service: await self.Check(each, context) for each in asked}
        )

    async def Watch(self, request: health_pb2.HealthCheckRequest, context: Context) -> None:
        watch = asyncio.create_task(super().Watch(request, context))
        self._watches.add(watch)
        try:
            await asyncio.wait({watch})
        finally:
            watch.cancel()
            self._watches.discard(watch)
        if not watch.cancelled():
            watch.result()  # it only ends by itself when it cannot write: grpc knows what that means
        await context.abort(grpc.StatusCode.UNAVAILABLE, "the server is stopping")

    async def _tell(self, is_ready: bool) -> None:
        async with self._telling:  # a SERVING on its way through the services must not come after a NOT_SERVING
            status = _SERVING if is_ready and not self._is_leaving else _NOT_SERVING
            for service in self._services:
                await self.set(service, status)
