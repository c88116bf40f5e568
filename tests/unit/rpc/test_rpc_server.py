import asyncio
from collections.abc import AsyncGenerator

import grpc
import psutil
import pytest
from grpc_channelz.v1 import channelz_pb2, channelz_pb2_grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from structlog.testing import capture_logs

from tests.fakes import FakeEngine
from wan_grpc.domain.events import Heartbeat
from wan_grpc.rpc.health import Health
from wan_grpc.rpc.server import MIB, RpcServer, ServerOptions, _channel_options, build_server
from wan_grpc.v1 import generation_pb2 as pb
from wan_grpc.v1 import video_generation_service_pb2 as api
from wan_grpc.v1.video_generation_service_pb2_grpc import VideoGenerationServiceStub

SERVICE = "wan_grpc.v1.VideoGenerationService"
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
CREATE = api.CreateGenerationRequest(spec=pb.GenerationSpec(prompt="x"))


async def status_of(channel: grpc.aio.Channel, service: str) -> int:
    stub = health_pb2_grpc.HealthStub(channel)
    return (await stub.Check(health_pb2.HealthCheckRequest(service=service))).status


def watch_health(channel: grpc.aio.Channel, service: str) -> grpc.aio.UnaryStreamCall:
    return health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(service=service))


# ---- health ---------------------------------------------------------------------------------------------------------


async def test_liveness_is_not_readiness(engine: FakeEngine, channel: grpc.aio.Channel) -> None:
    """A server whose ranks are not up is alive and not ready; a service that it has not is not found."""
    assert [await status_of(channel, name) for name in ("", SERVICE, "wan_grpc.v1.AdapterService")] == [
        SERVING,
        NOT_SERVING,
        NOT_SERVING,
    ]
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await status_of(channel, "other")
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    listed = (await health_pb2_grpc.HealthStub(channel).List(health_pb2.HealthListRequest())).statuses
    assert {name: each.status for name, each in listed.items()} == {
        "": SERVING,
        SERVICE: NOT_SERVING,
        "wan_grpc.v1.AdapterService": NOT_SERVING,
    }


async def test_health_watch_follows_the_engine(engine: FakeEngine, channel: grpc.aio.Channel) -> None:
    """Who watches health hears of every turn of readiness, and liveness does not turn with it."""
    watch = watch_health(channel, SERVICE)
    told = [(await watch.read()).status]
    for ready in (True, False, True):
        engine.set_ready(ready)
        told.append((await watch.read()).status)
    assert told == [NOT_SERVING, SERVING, NOT_SERVING, SERVING]
    assert await status_of(channel, "") == SERVING
    watch.cancel()


async def test_readiness_that_is_lost_is_asked_for_again() -> None:
    """When the engine cannot say whether it is ready, nobody is sent here, the log says why, and it is asked anew."""

    class LostEngine(FakeEngine):
        num_asked = 0

        async def status_changes(self) -> AsyncGenerator[bool, None]:
            self.num_asked += 1
            yield True
            if self.num_asked == 1:
                await self._until(lambda: self.ready)
                raise RuntimeError("lost")
            await self._until(lambda: not self.ready)

    engine = LostEngine()
    server = build_server(engine, ServerOptions(drain_window_s=0.0, stop_grace_s=0.1))  # type: ignore[arg-type]
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        watch = watch_health(channel, SERVICE)
        told = [(await watch.read()).status]
        while told[-1] != SERVING:
            told.append((await watch.read()).status)
        with capture_logs() as logs:
            engine.set_ready(True)
            async with asyncio.timeout(10):
                told += [(await watch.read()).status, (await watch.read()).status]
        await server.stop()
    assert told[-3:] == [SERVING, NOT_SERVING, SERVING]
    assert [(line["event"], str(line["exc_info"])) for line in logs] == [("readiness is not known for now", "lost")]


async def test_leaving_is_not_overtaken() -> None:
    """A SERVING that is half told when the server begins to leave is not heard after its NOT_SERVING."""
    half_told, may_go_on, fully_told = asyncio.Event(), asyncio.Event(), asyncio.Event()

    class HeldHealth(Health):
        async def set(self, service: str, status: health_pb2.HealthCheckResponse.ServingStatus) -> None:
            is_last = (service, status) == ("second", SERVING)
            if is_last:
                half_told.set()
                await may_go_on.wait()
            await super().set(service, status)
            if is_last:
                fully_told.set()

    async def changes() -> AsyncGenerator[bool, None]:
        yield True
        await asyncio.Event().wait()

    health = HeldHealth(["first", "second"])
    await health.begin()
    following = asyncio.create_task(health.follow(changes()))
    await half_told.wait()
    leaving = asyncio.create_task(health.leave())
    await asyncio.sleep(0)  # it goes as far as it can
    may_go_on.set()
    await fully_told.wait()
    await leaving
    asked = [health_pb2.HealthCheckRequest(service=service) for service in ("first", "second")]
    assert [(await health.Check(request, None)).status for request in asked] == [NOT_SERVING] * 2  # type: ignore[arg-type]
    following.cancel()
    await asyncio.wait({following})


# ---- what tools ask -------------------------------------------------------------------------------------------------


async def reflect(
    channel: grpc.aio.Channel, request: reflection_pb2.ServerReflectionRequest
) -> reflection_pb2.ServerReflectionResponse:
    call = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(iter([request]))
    async for response in call:
        return response
    raise AssertionError("no answer")


async def test_reflection_lists_and_describes(channel: grpc.aio.Channel) -> None:
    """Tools without our protos find every service, and the messages of ours."""
    listed = await reflect(channel, reflection_pb2.ServerReflectionRequest(list_services="*"))
    assert sorted(service.name for service in listed.list_services_response.service) == [
        "grpc.channelz.v1.Channelz",
        "grpc.health.v1.Health",
        "grpc.reflection.v1alpha.ServerReflection",
        "wan_grpc.v1.AdapterService",
        "wan_grpc.v1.VideoGenerationService",
    ]
    symbol = "wan_grpc.v1.GenerationEvent"
    described = await reflect(channel, reflection_pb2.ServerReflectionRequest(file_containing_symbol=symbol))
    assert b"wan_grpc/v1/generation.proto" in described.file_descriptor_response.file_descriptor_proto[0]


async def test_channelz_counts_calls(channel: grpc.aio.Channel) -> None:
    """An operator sees the server and how many calls it has had."""
    stub = channelz_pb2_grpc.ChannelzStub(channel)
    videos = VideoGenerationServiceStub(channel)
    for _ in range(3):
        await videos.GetModel(api.GetModelRequest())
    servers = (await stub.GetServers(channelz_pb2.GetServersRequest())).server
    assert max(server.data.calls_succeeded for server in servers) >= 3
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.GetServer(channelz_pb2.GetServerRequest(server_id=2**40))
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


# ---- connections ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost"])
async def test_listens_where_it_is_told(host: str) -> None:
    """A host of either family, or a name, is listened on; port 0 becomes a port of the system's choice."""
    server = build_server(FakeEngine(), ServerOptions(host=host, drain_window_s=0.0))  # type: ignore[arg-type]
    await server.start()
    address = f"[{host}]:{server.port}" if ":" in host else f"{host}:{server.port}"
    async with grpc.aio.insecure_channel(address) as channel:
        assert await status_of(channel, "") == SERVING
    await server.stop()


async def test_a_port_that_is_taken_is_refused(server: RpcServer) -> None:
    """Two servers never share a port unnoticed: the second one fails to start, and says where."""
    second = build_server(FakeEngine(), ServerOptions(port=server.port))  # type: ignore[arg-type]
    with pytest.raises(OSError, match=f"cannot listen on 127.0.0.1:{server.port}"):
        await second.start()
    await second.stop()


async def test_requests_beyond_the_limit_are_refused() -> None:
    """A request larger than the operator allows ends in RESOURCE_EXHAUSTED before it is read."""
    options = ServerOptions(max_receive_bytes=1000, drain_window_s=0.0)
    server = build_server(FakeEngine(), options)  # type: ignore[arg-type]
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await VideoGenerationServiceStub(channel).CreateGeneration(
                api.CreateGenerationRequest(spec=pb.GenerationSpec(prompt="x" * 1000))
            )
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    await server.stop()


async def test_a_request_is_no_larger_than_texts_need(stub: VideoGenerationServiceStub) -> None:
    """Of a model without images a request of 2 MiB is refused without being held; the longest texts arrive."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.CreateGeneration(api.CreateGenerationRequest(spec=pb.GenerationSpec(image=bytes(2 * MIB))))
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    longest = pb.GenerationSpec(prompt="x" * 16384, negative_prompt="x" * 16384)
    assert (await stub.CreateGeneration(api.CreateGenerationRequest(spec=longest))).generation.name


def connections(port: int) -> set[int]:
    """Those that the server at `port` of this process has accepted and not left, by the ports of their other ends."""
    every = psutil.Process().net_connections("tcp")
    return {each.raddr.port for each in every if each.status == psutil.CONN_ESTABLISHED and each.laddr.port == port}


async def test_old_connections_are_left_and_their_streams_go_on(engine: FakeEngine) -> None:
    """Past its age a connection takes no new calls: they open another one. The stream on the old one is left alone."""
    options = ServerOptions(max_connection_age_s=0.3, drain_window_s=0.0, stop_grace_s=0.1)
    server = build_server(engine, options)  # type: ignore[arg-type]
    await server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
            stub = VideoGenerationServiceStub(channel)
            name = (await stub.CreateGeneration(CREATE)).generation.name
            stream = stub.WatchGeneration(api.WatchGenerationRequest(name=name))
            await stream.read()
            first = connections(server.port)
            while not (now := connections(server.port)) - first:
                await stub.GetGeneration(api.GetGenerationRequest(name=name))
            engine.tell(name, Heartbeat())
            assert (await stream.read()).event.HasField("heartbeat")
            assert first & now
            stream.cancel()
    finally:
        await server.stop()


def test_options_reach_grpc() -> None:
    """Each option about connections arrives in grpc's own words and units; those that are None are left to grpc."""
    options = ServerOptions(
        keepalive_time_s=1.5,
        keepalive_timeout_s=2.0,
        min_ping_interval_s=3.0,
        max_connection_age_s=4.0,
        max_receive_bytes=5,
        max_send_bytes=6,
    )
    assert _channel_options(options, 5) == [
        ("grpc.so_reuseport", 0),
        ("grpc.keepalive_time_ms", 1500),
        ("grpc.keepalive_timeout_ms", 2000),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.http2.min_ping_interval_without_data_ms", 3000),
        ("grpc.max_receive_message_length", 5),
        ("grpc.max_send_message_length", 6),
        ("grpc.max_connection_age_ms", 4000),
    ]


# ---- the end --------------------------------------------------------------------------------------------------------


async def test_a_server_leaves_in_order(engine: FakeEngine) -> None:
    """NOT_SERVING first while requests are still taken, then the engine drains, then all streams end, health's too."""
    options = ServerOptions(drain_window_s=0.5, drain_timeout_s=7.0, stop_grace_s=60.0)
    server = build_server(engine, options)  # type: ignore[arg-type]
    await server.start()
    engine.set_ready(True)
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        health, stub = watch_health(channel, SERVICE), VideoGenerationServiceStub(channel)
        while (await health.read()).status != SERVING:
            pass
        stopping = asyncio.create_task(server.stop())
        assert (await health.read()).status == NOT_SERVING
        assert await status_of(channel, "") == SERVING
        stream = stub.Generate(api.GenerateRequest(spec=CREATE.spec))
        assert (await stream.read()).event.HasField("accepted")
        assert engine.drained == []
        with pytest.raises(grpc.aio.AioRpcError) as end_of_stream:
            await stream.read()
        with pytest.raises(grpc.aio.AioRpcError) as end_of_health:
            await health.read()
        async with asyncio.timeout(10):  # far below the grace, which nothing needs
            await stopping
        with pytest.raises(grpc.aio.AioRpcError) as no_server:
            await stub.GetModel(api.GetModelRequest())
    ends = (end_of_stream, end_of_health, no_server)
    assert [end.value.code() for end in ends] == [grpc.StatusCode.UNAVAILABLE] * 3
    assert end_of_stream.value.details() == "the server is shutting down"
    assert (engine.drained, engine.num_watchers) == ([7.0], 0)


async def test_what_does_not_end_by_itself_is_cut(engine: FakeEngine) -> None:
    """A stream that outlasts the grace is cut, and its handler has let go of the generation when stop returns."""
    engine.ends_at_drain = False
    server = build_server(engine, ServerOptions(drain_window_s=0.0, stop_grace_s=0.2))  # type: ignore[arg-type]
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        stub = VideoGenerationServiceStub(channel)
        stream = stub.Generate(api.GenerateRequest(spec=CREATE.spec))
        await stream.read()
        await server.stop()
        assert (engine.num_watchers, engine.cancelled, engine.expired) == (0, [], [])
        with pytest.raises((grpc.aio.AioRpcError, asyncio.CancelledError)):
            await stream.read()


async def test_stopping_twice_or_before_the_start_is_nothing(engine: FakeEngine) -> None:
    """A server that is not running has nothing to stop."""
    server = build_server(engine, ServerOptions(drain_window_s=0.0))  # type: ignore[arg-type]
    await server.stop()
    await server.start()
    await server.stop()
    await server.stop()
    assert len(engine.drained) == 1
