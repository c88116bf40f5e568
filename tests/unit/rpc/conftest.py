from collections.abc import AsyncIterator

import grpc
import pytest

from tests.fakes import FakeEngine
from wan_grpc.rpc.server import RpcServer, ServerOptions, build_server
from wan_grpc.v1.video_generation_service_pb2_grpc import VideoGenerationServiceStub

OPTIONS = ServerOptions(drain_window_s=0.0, drain_timeout_s=7.0, stop_grace_s=0.2, max_concurrent_calls=8)


@pytest.fixture
async def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
async def server(engine: FakeEngine) -> AsyncIterator[RpcServer]:
    running = build_server(engine, OPTIONS)  # type: ignore[arg-type]
    await running.start()
    yield running
    await running.stop()


@pytest.fixture
async def channel(server: RpcServer) -> AsyncIterator[grpc.aio.Channel]:
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as opened:
        yield opened


@pytest.fixture
async def stub(channel: grpc.aio.Channel) -> VideoGenerationServiceStub:
    return VideoGenerationServiceStub(channel)
