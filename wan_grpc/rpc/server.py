"""The listening server: its services, its limits, and the order in which it starts and stops.

Knows grpc.aio. Does not know the engine beyond its readiness and its drain.
"""

import asyncio
import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import grpc
import structlog
from grpc_channelz.v1 import channelz, channelz_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from wan_grpc.domain.variants import ModelCard
from wan_grpc.rpc.calls import CallBoundary
from wan_grpc.rpc.health import Health
from wan_grpc.rpc.service import AdapterService, VideoGenerationService
from wan_grpc.v1 import adapter_service_pb2, video_generation_service_pb2
from wan_grpc.v1.adapter_service_pb2_grpc import add_AdapterServiceServicer_to_server
from wan_grpc.v1.video_generation_service_pb2_grpc import add_VideoGenerationServiceServicer_to_server

if TYPE_CHECKING:
    from wan_grpc.engine.engine import Engine

MIB = 1024 * 1024
_FOLLOW_AGAIN_S = 0.5
OUR_SERVICES = (
    video_generation_service_pb2.DESCRIPTOR.services_by_name["VideoGenerationService"].full_name,
    adapter_service_pb2.DESCRIPTOR.services_by_name["AdapterService"].full_name,
)
_REFLECTED_SERVICES = (
    *OUR_SERVICES,
    health_pb2.DESCRIPTOR.services_by_name["Health"].full_name,
    channelz_pb2.DESCRIPTOR.services_by_name["Channelz"].full_name,
    reflection.SERVICE_NAME,
)

log = structlog.stdlib.get_logger("wan_grpc.rpc")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerOptions:
    """The operator's choices about connections and calls. Times in seconds."""

    host: str = "127.0.0.1"
    port: int = 0
    """0 lets the system choose; RpcServer.port tells."""
    keepalive_time_s: float = 60.0
    """After this long without traffic, ask a client whether it is still there."""
    keepalive_timeout_s: float = 20.0
    """Close the connection of a client that does not answer within this."""
    min_ping_interval_s: float = 10.0
    """Refuse clients that ping more often; must be below the interval that clients use."""
    max_connection_age_s: float | None = None
    """Ask clients to reconnect after this long, so that load spreads; None for never. Running calls go on."""
    max_connection_age_grace_s: float | None = None
    """Cut what still runs this long after that; None leaves it alone."""
    max_concurrent_calls: int | None = 1024
    """Calls of the API at once, None for any number. Health checks are not counted."""
    max_receive_bytes: int | None = None
    """Largest request. None: what texts and images of the model need, and so much more that what is somewhat too large
    arrives and is refused by the name of its field."""
    max_held_bytes: int = 512 * MIB
    """What requests of one kind may hold before they are accepted; further ones wait with their bytes unread."""
    max_send_bytes: int = 4 * MIB
    """Largest reply, which is what clients take by default."""
    drain_window_s: float = 5.0
    """How long a stopping server still takes requests while health says NOT_SERVING, so that balancers can see it."""
    drain_timeout_s: float = 600.0
    """How long it then waits for generations that were accepted."""
    stop_grace_s: float = 5.0
    """How long it then leaves calls to end by themselves."""


def build_server(engine: "Engine", options: ServerOptions) -> "RpcServer":
    """A server over `engine` that listens once it is started."""
    return RpcServer(engine, options)


class RpcServer:
    """The server, from its start to its end. Belongs to the loop that starts it."""

    def __init__(self, engine: "Engine", options: ServerOptions) -> None:
        self._engine = engine
        self._options = options
        self._receive_bytes = options.max_receive_bytes or largest_request_bytes(engine.card)
        self._boundary = CallBoundary(
            max_calls=options.max_concurrent_calls,
            max_held=max(1, options.max_held_bytes // self._receive_bytes),
        )
        self._health = Health(OUR_SERVICES)
        self._videos = VideoGenerationService(engine)
        self._server: grpc.aio.Server | None = None
        self._following: asyncio.Task[None] | None = None
        self._hurried = asyncio.Event()
        self.port = 0

    async def start(self) -> None:
        """Listen, and begin to tell readiness.

        Raises:
            OSError: the address cannot be had.
        """
        options = _channel_options(self._options, self._receive_bytes)
        server = grpc.aio.server(interceptors=(self._boundary,), options=options)
        self._add_services(server)
        self.port = _listen(server, self._options.host, self._options.port)
        await self._health.begin()
        await server.start()
        self._server = server
        self._following = asyncio.create_task(self._keep_following())

    async def stop(self) -> None:
        """Send callers away, let accepted work end, then close. The engine is drained and not yet stopped."""
        if self._server is None:
            return
        await self._health.leave()
        await self._drain_window()
        await self._engine.drain(self._options.drain_timeout_s)
        await self._health.end_watches()
        await self._server.stop(self._options.stop_grace_s)
        await self._boundary.wait_idle()
        await self._videos.wait_idle()
        await self._end_following()
        self._server = None

    def hurry(self) -> None:
        """Cut short the drain window of the stop that is under way."""
        self._hurried.set()

    async def _drain_window(self) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._options.drain_window_s):
                await self._hurried.wait()

    def _add_services(self, server: grpc.aio.Server) -> None:
        add_VideoGenerationServiceServicer_to_server(self._videos, server)
        add_AdapterServiceServicer_to_server(AdapterService(), server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        channelz.add_channelz_servicer(server)
        reflection.enable_server_reflection(_REFLECTED_SERVICES, server)

    async def _keep_following(self) -> None:
        """Tell readiness for as long as the server runs: a failure is logged, and then it is asked for anew."""
        while True:
            following = self._health.follow(self._engine.status_changes())
            [failure] = await asyncio.gather(following, return_exceptions=True)
            log.error("readiness is not known for now", exc_info=failure)
            await asyncio.sleep(_FOLLOW_AGAIN_S)

    async def _end_following(self) -> None:
        assert self._following is not None
        self._following.cancel()
        await asyncio.wait({self._following})


def largest_request_bytes(card: ModelCard) -> int:
    """What a request for this model may need, twice: what is beyond that, grpc refuses without naming a field."""
    images_bytes = 2 * card.limits.max_image_bytes if card.takes_image else 0
    return MIB + 2 * (images_bytes + 2 * card.limits.max_prompt_bytes)


def _listen(server: grpc.aio.Server, host: str, port: int) -> int:
    address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    try:
        return server.add_insecure_port(address)
    except RuntimeError as error:
        raise OSError(f"cannot listen on {address}: is it in use, or not an address of this machine?") from error


def _channel_options(options: ServerOptions, receive_bytes: int) -> list[tuple[str, int]]:
    maybe_s = {
        "grpc.max_connection_age_ms": options.max_connection_age_s,
        "grpc.max_connection_age_grace_ms": options.max_connection_age_grace_s,
    }
    return [
        ("grpc.so_reuseport", 0),  # a port that another server has is refused, not shared
        ("grpc.keepalive_time_ms", _ms(options.keepalive_time_s)),
        ("grpc.keepalive_timeout_ms", _ms(options.keepalive_timeout_s)),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.http2.min_ping_interval_without_data_ms", _ms(options.min_ping_interval_s)),
        ("grpc.max_receive_message_length", receive_bytes),
        ("grpc.max_send_message_length", options.max_send_bytes),
        *((key, _ms(value)) for key, value in maybe_s.items() if value is not None),
    ]


def _ms(seconds: float) -> int:
    return round(seconds * 1000)
