import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
import pytest
from grpc_channelz.v1 import channelz_pb2
from grpc_health.v1 import health_pb2
from structlog.testing import capture_logs

from tests.fakes import FakeEngine
from tests.unit.rpc.test_service import refusal
from wan_grpc.domain.events import Generation
from wan_grpc.rpc import calls
from wan_grpc.rpc.server import MIB, RpcServer, ServerOptions, build_server
from wan_grpc.v1 import generation_pb2 as pb
from wan_grpc.v1 import video_generation_service_pb2 as api
from wan_grpc.v1.video_generation_service_pb2_grpc import VideoGenerationServiceStub

VIDEOS = "/wan_grpc.v1.VideoGenerationService"
LARGE = api.CreateGenerationRequest(spec=pb.GenerationSpec(prompt="x", preview_every_steps=0, image=bytes(100_000)))
SMALL = api.CreateGenerationRequest(spec=pb.GenerationSpec(prompt="x"))
EVERY_METHOD = [
    *(f"{VIDEOS}/{name}" for name in api.DESCRIPTOR.services_by_name["VideoGenerationService"].methods_by_name),
    *(f"/wan_grpc.v1.AdapterService/{name}" for name in ("LoadAdapter", "UnloadAdapter", "ListAdapters")),
    *(f"/grpc.health.v1.Health/{name}" for name in health_pb2.DESCRIPTOR.services_by_name["Health"].methods_by_name),
    *(
        f"/grpc.channelz.v1.Channelz/{name}"
        for name in channelz_pb2.DESCRIPTOR.services_by_name["Channelz"].methods_by_name
    ),
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
]


class HeldEngine(FakeEngine):
    """Looks at each request for as long as the test wants."""

    def __init__(self) -> None:
        super().__init__()
        self.may_go_on = asyncio.Event()
        self.num_held = 0

    async def submit(self, *args: Any, **options: Any) -> Generation:
        self.num_held += 1
        self._wake()
        await self.may_go_on.wait()
        return await super().submit(*args, **options)

    async def until_held(self, count: int) -> None:
        await self._until(lambda: self.num_held == count)


@pytest.fixture
def engine() -> HeldEngine:
    return HeldEngine()


@pytest.fixture
async def server(engine: HeldEngine) -> AsyncIterator[RpcServer]:
    """One that has room for two requests of each kind."""
    options = ServerOptions(drain_window_s=0.0, stop_grace_s=0.2, max_receive_bytes=MIB, max_held_bytes=2 * MIB)
    running = build_server(engine, options)  # type: ignore[arg-type]
    await running.start()
    yield running
    await running.stop()


def raw_call(channel: grpc.aio.Channel, path: str, *requests: bytes, timeout_s: float = 20.0) -> Any:
    """A call of these bytes, none or several where one is due included."""
    return channel.stream_stream(path)(iter(requests), timeout=timeout_s)


def silent_call(channel: grpc.aio.Channel, path: str) -> Any:
    """A call that never brings its request."""

    async def nothing() -> AsyncIterator[bytes]:
        await asyncio.Event().wait()
        yield b""

    return channel.stream_stream(path)(nothing(), timeout=20.0)


async def everything(call: Any) -> list[bytes]:
    return [answer async for answer in call]


# ---- what arrives ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", EVERY_METHOD)
async def test_bytes_that_are_no_message(channel: grpc.aio.Channel, path: str) -> None:
    """Whatever method gets them, health, reflection and channelz included, it is the request that is wrong."""
    with capture_logs() as logged:
        code, sentence, details = await refusal(everything(raw_call(channel, path, b"\xff\xff")))
    assert (code, sentence) == (grpc.StatusCode.INVALID_ARGUMENT, "the bytes are not a message of this method")
    assert details["ErrorInfo"].reason == "INVALID_REQUEST"
    assert [line for line in logged if line["log_level"] == "error"] == []


@pytest.mark.parametrize("path", [path for path in EVERY_METHOD if "Reflection" not in path])
async def test_no_request_at_all(channel: grpc.aio.Channel, path: str) -> None:
    """A call that is closed before it has a request is answered, and not left to hang."""
    code, sentence, _ = await refusal(everything(raw_call(channel, path)))
    assert (code, sentence) == (grpc.StatusCode.INVALID_ARGUMENT, "the call has no request")


async def test_a_reflection_without_questions(channel: grpc.aio.Channel) -> None:
    """A stream of requests may be empty."""
    path = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"
    assert await everything(raw_call(channel, path)) == []


@pytest.mark.parametrize(
    ("path", "raw", "field"),
    [
        (f"{VIDEOS}/Generate", b"\x0a\x03\x0a\x01\xff", "spec.prompt"),
        (f"{VIDEOS}/GetGeneration", b"\x0a\x02\xff\xfe", "name"),
        ("/grpc.health.v1.Health/Check", b"\x0a\x01\xff", "service"),
        ("/grpc.health.v1.Health/Watch", b"\x0a\x01\xff", "service"),
    ],
)
async def test_text_that_is_not_utf8(channel: grpc.aio.Channel, path: str, raw: bytes, field: str) -> None:
    """The caller hears which text it was."""
    code, _, details = await refusal(everything(raw_call(channel, path, raw)))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert [(v.field, v.reason) for v in details["BadRequest"].field_violations] == [(field, "NOT_UTF8")]


@pytest.mark.parametrize(
    "path", [path for path in EVERY_METHOD if not path.endswith(("/Generate", "/CreateGeneration"))]
)
async def test_only_specs_may_be_large(channel: grpc.aio.Channel, path: str) -> None:
    """A request of another method has no reason to be larger than a name."""
    raw = b"\x7a\x80\x80\x04" + bytes(65536)
    code, sentence, _ = await refusal(everything(raw_call(channel, path, raw)))
    expected = "the request has 65540 bytes; at most 65536 for this method"
    assert (code, sentence) == (grpc.StatusCode.INVALID_ARGUMENT, expected)


@pytest.mark.parametrize("path", [f"{VIDEOS}/Generate", f"{VIDEOS}/GetModel", "/grpc.health.v1.Health/Watch"])
async def test_a_request_that_does_not_come(
    channel: grpc.aio.Channel, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever opens a call and says nothing does not keep others from their room for long."""
    monkeypatch.setattr(calls, "_ARRIVAL_S", 0.1)
    monkeypatch.setattr(calls, "_SMALL_ARRIVAL_S", 0.1)
    code, sentence, _ = await refusal(everything(silent_call(channel, path)))
    assert (code, sentence) == (grpc.StatusCode.DEADLINE_EXCEEDED, "no request has arrived within 0.1 s")


# ---- what is held ---------------------------------------------------------------------------------------------------


async def begun(calls_: list[Callable[[], Any]]) -> list[asyncio.Task[Any]]:
    async def wait(call: Any) -> Any:
        return await call

    return [asyncio.create_task(wait(call())) for call in calls_]


async def test_large_requests_wait_for_room(engine: HeldEngine, stub: VideoGenerationServiceStub) -> None:
    """Of many large requests two are held; the others come as these are accepted, and nothing else waits for them."""
    tasks = await begun([lambda: stub.CreateGeneration(LARGE)] * 6)
    await engine.until_held(2)
    for _ in range(3):  # time enough for another request to come through, were there room
        await stub.GetModel(api.GetModelRequest())
    assert engine.num_held == 2
    engine.may_go_on.set()
    endings = await asyncio.gather(*tasks, return_exceptions=True)
    assert {ending.code() for ending in endings} == {grpc.StatusCode.INVALID_ARGUMENT}  # the model takes no image
    assert engine.num_held == 6


async def test_silent_calls_hide_no_life(server: RpcServer, channel: grpc.aio.Channel) -> None:
    """Health is told although calls of the API that bring no request have taken all the room of their kind."""
    silent = [silent_call(channel, f"{VIDEOS}/GetModel") for _ in range(3)]
    for call in silent:
        await call.wait_for_connection()
    room = server._boundary._rooms[calls._Kind.NAME]
    while not room.locked():  # noqa: ASYNC110  # a semaphore tells nobody
        await asyncio.sleep(0)
    check = "/grpc.health.v1.Health/Check"
    assert len(await everything(raw_call(channel, check, b"", timeout_s=5.0))) == 1
    for call in silent:
        call.cancel()


async def test_small_requests_take_no_room(engine: HeldEngine, stub: VideoGenerationServiceStub) -> None:
    """However many small requests the engine looks at, a further one comes through."""
    tasks = await begun([lambda: stub.CreateGeneration(SMALL)] * 6)
    await engine.until_held(6)
    engine.may_go_on.set()
    assert len(await asyncio.gather(*tasks)) == 6


async def test_streams_keep_no_room(engine: HeldEngine, stub: VideoGenerationServiceStub) -> None:
    """The room of a request is free again once it is accepted, although its stream goes on."""
    engine.may_go_on.set()
    large = api.GenerateRequest(spec=pb.GenerationSpec(prompt="x" * 16000, negative_prompt="x" * 16000))
    large.spec.MergeFromString(b"\xfa\x3f\x80\x80\x04" + bytes(65536))  # a field of a later version
    streams = [stub.Generate(large) for _ in range(6)]
    for stream in streams:
        assert (await stream.read()).event.HasField("accepted")
    for stream in streams:
        stream.cancel()
    await engine.until_watched(by=0)


async def test_callers_that_leave_free_their_room(engine: HeldEngine, stub: VideoGenerationServiceStub) -> None:
    """A caller that goes away while its request is held, or while it waits for room, leaves nothing behind."""
    tasks = await begun([lambda: stub.CreateGeneration(LARGE)] * 4)
    await engine.until_held(2)
    for task in tasks:
        task.cancel()
    tasks = await begun([lambda: stub.CreateGeneration(LARGE)] * 2)
    await engine.until_held(4)
    for task in tasks:
        task.cancel()
