import asyncio
import hashlib
import uuid
from collections.abc import Awaitable
from typing import Any

import google_crc32c
import grpc
import pytest
import structlog
from google.rpc import error_details_pb2, status_pb2
from structlog.testing import capture_logs

from tests.fakes import FakeEngine
from wan_grpc.domain.errors import Failure, Reason, ServiceError
from wan_grpc.domain.events import (
    Chunk,
    Completed,
    Failed,
    Heartbeat,
    Progress,
    Queued,
    Stage,
    VideoInfo,
)
from wan_grpc.domain.formats import OutputFormat
from wan_grpc.domain.request import GenerationRequest
from wan_grpc.rpc import calls, service
from wan_grpc.rpc.server import RpcServer
from wan_grpc.rpc.service import Deadline
from wan_grpc.v1 import adapter_service_pb2 as adapters
from wan_grpc.v1 import generation_pb2 as pb
from wan_grpc.v1 import video_generation_service_pb2 as api
from wan_grpc.v1.adapter_service_pb2_grpc import AdapterServiceStub
from wan_grpc.v1.video_generation_service_pb2_grpc import VideoGenerationServiceStub

SPEC = pb.GenerationSpec(prompt="a raccoon")
GENERATE = api.GenerateRequest(spec=SPEC)
VIDEO = bytes(range(10))
DONE = Completed(size_bytes=len(VIDEO), sha256=hashlib.sha256(VIDEO).hexdigest(), stage_times=(), rank_memory=())
DIED = Failed(failure=Failure(reason=Reason.RANK_DIED, message="rank 1 was killed", retry_after_s=10.0))
INFO = VideoInfo(output_format=OutputFormat.MP4_H264, media_type="video/mp4", width=1, height=1, num_frames=1, fps=1)


async def refusal(call: Awaitable[Any]) -> tuple[grpc.StatusCode, str, dict[str, Any]]:
    """How a call ends that does not succeed: code, sentence, and its details by their names."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    error = caught.value
    details: dict[str, Any] = {}
    for key, value in error.trailing_metadata() or ():
        if key == "grpc-status-details-bin":
            status = status_pb2.Status.FromString(value)
            assert (status.code, status.message) == (error.code().value[0], error.details())
            for packed in status.details:
                name = packed.TypeName().rpartition(".")[2]
                details[name] = getattr(error_details_pb2, name)()
                packed.Unpack(details[name])
    return error.code(), error.details() or "", details


async def rest(call: Any) -> list[pb.GenerationEvent]:
    events = []
    while (response := await call.read()) is not grpc.aio.EOF:
        events.append(response.event)
    return events


async def first(call: Any) -> pb.GenerationEvent:
    return (await call.read()).event


# ---- Generate -------------------------------------------------------------------------------------------------------


async def test_generate_tells_everything_in_order(engine: FakeEngine, stub: VideoGenerationServiceStub) -> None:
    """Every event arrives once, in order and numbered; chunks are exact, with their checksums."""
    call = stub.Generate(GENERATE)
    accepted = await first(call)
    name = accepted.generation
    engine.tell(
        name,
        Queued(position=1, eta_s=None),
        Heartbeat(),
        Progress(stage=Stage.DENOISE, step=1, total_steps=2),
        INFO,
        Chunk(offset=0, data=VIDEO[:6]),
        Chunk(offset=6, data=VIDEO[6:]),
        DONE,
    )
    events = [accepted, *await rest(call)]
    assert [(event.sequence, event.WhichOneof("event")) for event in events] == [
        (1, "accepted"),
        (2, "queued"),
        (2, "heartbeat"),
        (3, "progress"),
        (4, "video_info"),
        (4, "chunk"),
        (4, "chunk"),
        (5, "completed"),
    ]
    assert {event.generation for event in events} == {name}
    chunks = [event.chunk for event in events if event.HasField("chunk")]
    assert [(chunk.offset, chunk.data) for chunk in chunks] == [(0, VIDEO[:6]), (6, VIDEO[6:])]
    assert [chunk.crc32c for chunk in chunks] == [google_crc32c.value(chunk.data) for chunk in chunks]
    assert engine.submitted == [(GenerationRequest(prompt="a raccoon"), True)]
    assert (engine.num_watchers, engine.expired, engine.cancelled) == (0, [], [])


async def test_initial_metadata_goes_out_at_admission(engine: FakeEngine, stub: VideoGenerationServiceStub) -> None:
    """Who asked hears the generation's name and the request id before there is any event to send."""
    await stub.CreateGeneration(api.CreateGenerationRequest(spec=SPEC))
    silent = stub.WatchGeneration(
        api.WatchGenerationRequest(name="generations/1", after_sequence=99), metadata=(("x-request-id", "r-7"),)
    )
    generate = stub.Generate(GENERATE, metadata=(("x-request-id", "r-8"),))
    for call, expected in ((silent, ("r-7", "generations/1")), (generate, ("r-8", "generations/2"))):
        metadata = dict(await call.initial_metadata())
        assert (metadata["x-request-id"], metadata["wan-generation"]) == expected
        call.cancel()


async def test_every_broken_rule_is_told_at_once(stub: VideoGenerationServiceStub) -> None:
    """A request with everything wrong, also what only the wire can say, hears of every field in one answer."""
    spec = pb.GenerationSpec(
        prompt="\x00" + "x" * 20000,
        negative_prompt="\x00" + "x" * 20000,
        width=-(2**31),
        height=2**31 - 1,
        num_frames=-(2**31),
        num_inference_steps=-(2**31),
        fps=-(2**31),
        guidance_scale=-1.7976931348623157e308,
        guidance_scale_2=float("nan"),
        flow_shift=float("-inf"),
        boundary_ratio=-1.7976931348623157e308,
        seed=-(2**63),
        image=b"x",
        last_image=b"x",
        image_fit=99,  # type: ignore[arg-type]
        output_format=pb.OUTPUT_FORMAT_GIF,
        encoding=pb.EncodingOptions(crf=-(2**31), quality=-(2**31), pixel_format=99),  # type: ignore[arg-type]
        preview_every_steps=-1,
        adapters=[pb.AdapterUse()],
        acceleration_profile="fast",
    )
    spec.max_duration.seconds = -(2**63)
    spec.max_duration.nanos = -(2**31)
    spec.detach_grace.seconds = -(2**63)
    spec.detach_grace.nanos = -(2**31)
    code, _, details = await refusal(rest(stub.Generate(api.GenerateRequest(spec=spec, request_id="not a uuid"))))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert details["ErrorInfo"].reason == "INVALID_REQUEST"
    asked = {f"spec.{field.name}" for field, _ in spec.ListFields()}
    asked |= {"request_id", "spec.encoding.crf", "spec.encoding.quality", "spec.encoding.pixel_format"}
    named = {violation.field for violation in details["BadRequest"].field_violations}
    assert named == asked - {"spec.encoding"}
    assert all(violation.description for violation in details["BadRequest"].field_violations)


async def test_what_is_only_not_served_is_unimplemented(stub: VideoGenerationServiceStub) -> None:
    """A request that asks for what this server has not, and is right otherwise, is told from one that is wrong."""
    for changes, expected in (
        ({}, grpc.StatusCode.UNIMPLEMENTED),
        ({"width": 7}, grpc.StatusCode.INVALID_ARGUMENT),
    ):
        spec = pb.GenerationSpec(prompt="x", acceleration_profile="x", adapters=[pb.AdapterUse()], **changes)
        code, sentence, details = await refusal(rest(stub.Generate(api.GenerateRequest(spec=spec))))
        named = [violation.field for violation in details["BadRequest"].field_violations]
        assert (code, set(named)) == (
            expected,
            {"spec.acceleration_profile", "spec.adapters", *(f"spec.{name}" for name in changes)},
        )
        assert "spec.adapters: this server loads no adapters" in sentence


async def test_a_full_queue_says_when_to_try_again(engine: FakeEngine, stub: VideoGenerationServiceStub) -> None:
    """A refusal that passes carries the time after which another try makes sense."""
    engine.error = ServiceError(Reason.QUEUE_FULL, "no room", retry_after_s=12.0)
    code, sentence, details = await refusal(rest(stub.Generate(GENERATE)))
    assert (code, sentence) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "no room")
    assert details["ErrorInfo"].reason == "QUEUE_FULL"
    assert details["RetryInfo"].retry_delay.seconds == 12


async def test_an_unsuccessful_end_is_the_status(engine: FakeEngine, stub: VideoGenerationServiceStub) -> None:
    """When the generation fails, its watchers' calls end in the failure's status, told from a failure of the call."""
    call = stub.Generate(GENERATE)
    name = (await first(call)).generation
    engine.tell(name, DIED)
    code, sentence, details = await refusal(rest(call))
    assert (code, sentence) == (grpc.StatusCode.UNAVAILABLE, "rank 1 was killed")
    info = details["ErrorInfo"]
    assert (info.reason, info.domain) == ("RANK_DIED", "wan-grpc")
    assert (info.metadata["generation"], info.metadata["generation_state"]) == (name, "FAILED")
    assert details["RetryInfo"].retry_delay.seconds == 10
    assert engine.expired == []


async def test_a_passed_deadline_expires_the_generation(engine: FakeEngine, stub: VideoGenerationServiceStub) -> None:
    """The deadline of Generate ends the call, detaches it, and then tells the engine."""
    call = stub.Generate(GENERATE, timeout=0.3)
    name = (await first(call)).generation
    code, _, _ = await refusal(rest(call))
    await engine.until_expired(name)
    assert code is grpc.StatusCode.DEADLINE_EXCEEDED
    assert (engine.num_watchers, engine.expired) == (0, [name])


async def test_a_deadline_that_passes_while_the_reader_is_stuck(
    engine: FakeEngine, stub: VideoGenerationServiceStub
) -> None:
    """The engine also hears of the deadline when the call cannot write because nobody reads."""
    call = stub.Generate(GENERATE, timeout=0.5)
    name = (await first(call)).generation
    engine.tell(name, *(Chunk(offset=i * 2**20, data=bytes(2**20)) for i in range(16)))
    await engine.until_expired(name)
    assert engine.num_watchers == 0
    call.cancel()


async def test_a_dropped_stream_only_detaches(engine: FakeEngine, stub: VideoGenerationServiceStub) -> None:
    """A caller that goes away cancels nothing, with or without a deadline: the generation is the engine's to keep."""
    for timeout in (None, 60.0):
        call = stub.Generate(GENERATE, timeout=timeout)
        await first(call)
        await engine.until_watched(by=1)
        call.cancel()
        await engine.until_watched(by=0)
    assert (engine.cancelled, engine.expired) == ([], [])


async def test_a_caller_that_hears_of_its_generation_watches_it(
    engine: FakeEngine, stub: VideoGenerationServiceStub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever leaves as soon as the name is known is missed: the watch began before the name was told."""
    watchers = []

    async def noted(context: Any, generation: str) -> None:
        watchers.append(engine.num_watchers)
        await calls.announce(context, generation)

    monkeypatch.setattr(service, "announce", noted)
    call = stub.Generate(GENERATE)
    await call.initial_metadata()
    call.cancel()
    await engine.until_watched(by=0)
    assert watchers == [1]


async def test_a_reader_that_is_stuck_and_then_drops_detaches(
    engine: FakeEngine, stub: VideoGenerationServiceStub
) -> None:
    """A stream that ends in the middle of a write lets go of its generation at once, not when garbage is collected."""
    call = stub.Generate(GENERATE)
    name = (await first(call)).generation
    taken: list[int] = []
    engine.on_take = taken.append
    engine.tell(name, *(Chunk(offset=i * 2**20, data=bytes(2**20)) for i in range(64)))
    await asyncio.sleep(0.3)  # enough to send all of them, were nothing in the way
    call.cancel()
    await engine.until_watched(by=0)
    assert 0 < len(taken) < 16


# ---- the other calls ------------------------------------------------------------------------------------------------


async def test_create_returns_the_resource(engine: FakeEngine, stub: VideoGenerationServiceStub) -> None:
    """CreateGeneration submits without watching and answers with the generation as it stands."""
    request_id = str(uuid.uuid4())
    request = api.CreateGenerationRequest(spec=SPEC, request_id=request_id)
    generation = (await stub.CreateGeneration(request)).generation
    assert (generation.name, generation.request_id) == ("generations/1", request_id)
    assert generation.state == pb.GENERATION_STATE_QUEUED
    assert generation.resolved.seed == 42
    assert engine.submitted == [(GenerationRequest(prompt="a raccoon", request_id=request_id), False)]
    assert engine.num_watchers == 0


async def test_watch_goes_on_from_where_another_left(engine: FakeEngine, stub: VideoGenerationServiceStub) -> None:
    """WatchGeneration sends what came after a sequence number and from an offset on, and nothing else."""
    await stub.CreateGeneration(api.CreateGenerationRequest(spec=SPEC))
    engine.tell("generations/1", Queued(position=0, eta_s=None), INFO)
    engine.tell("generations/1", Chunk(offset=0, data=VIDEO[:6]), Chunk(offset=6, data=VIDEO[6:]), DONE)
    request = api.WatchGenerationRequest(name="generations/1", after_sequence=2, from_offset=6)
    events = await rest(stub.WatchGeneration(request))
    assert [(event.sequence, event.WhichOneof("event")) for event in events] == [
        (3, "video_info"),
        (3, "chunk"),
        (4, "completed"),
    ]


async def test_the_deadline_of_a_watch_never_cancels(engine: FakeEngine, stub: VideoGenerationServiceStub) -> None:
    """A watcher whose time is up only stops watching."""
    await stub.CreateGeneration(api.CreateGenerationRequest(spec=SPEC))
    call = stub.WatchGeneration(api.WatchGenerationRequest(name="generations/1"), timeout=0.2)
    assert (await refusal(rest(call)))[0] is grpc.StatusCode.DEADLINE_EXCEEDED
    await engine.until_watched(by=0)
    assert (engine.expired, engine.cancelled) == ([], [])


@pytest.mark.parametrize(
    ("method", "request_"),
    [
        ("WatchGeneration", api.WatchGenerationRequest(name="generations/none")),
        ("GetGeneration", api.GetGenerationRequest(name="generations/none")),
        ("CancelGeneration", api.CancelGenerationRequest(name="generations/none")),
        ("DeleteGeneration", api.DeleteGenerationRequest(name="generations/none")),
        ("DownloadVideo", api.DownloadVideoRequest(name="generations/none")),
    ],
)
async def test_names_that_nobody_has(stub: VideoGenerationServiceStub, method: str, request_: Any) -> None:
    """Every method that takes a name says NOT_FOUND for one that is free, and INVALID_ARGUMENT for no name at all."""

    async def ending() -> tuple[grpc.StatusCode, str, dict[str, Any]]:
        call = getattr(stub, method)(request_)
        return await refusal(rest(call) if hasattr(call, "read") else call)

    code, _, details = await ending()
    assert (code, details["ErrorInfo"].reason) == (grpc.StatusCode.NOT_FOUND, "GENERATION_NOT_FOUND")
    assert details["ErrorInfo"].metadata["generation"] == "generations/none"
    request_.name = "x" * 60_000
    code, _, details = await ending()
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert [v.field for v in details["BadRequest"].field_violations] == ["name"]
    request_.name = "generations/none"


async def test_get_cancel_and_delete(engine: FakeEngine, stub: VideoGenerationServiceStub) -> None:
    """A generation is read, refused to be removed while it runs, cancelled and then removed."""
    name = (await stub.CreateGeneration(api.CreateGenerationRequest(spec=SPEC))).generation.name
    engine.tell(name, Progress(stage=Stage.TEXT, step=0, total_steps=1))
    got = (await stub.GetGeneration(api.GetGenerationRequest(name=name))).generation
    assert (got.state, got.progress.stage) == (pb.GENERATION_STATE_RUNNING, pb.STAGE_TEXT)
    refused = await refusal(stub.DeleteGeneration(api.DeleteGenerationRequest(name=name)))
    assert refused[0] is grpc.StatusCode.FAILED_PRECONDITION
    cancelled = (await stub.CancelGeneration(api.CancelGenerationRequest(name=name))).generation
    assert (cancelled.state, cancelled.error.reason) == (pb.GENERATION_STATE_CANCELLED, "CANCELLED_BY_CALLER")
    await stub.DeleteGeneration(api.DeleteGenerationRequest(name=name))
    assert (engine.cancelled, engine.deleted) == ([name], [name])


async def test_lists_in_pages(engine: FakeEngine, stub: VideoGenerationServiceStub) -> None:
    """Pages follow one another newest first until the last, which has no token; a filter keeps to its states."""
    for _ in range(5):
        await stub.CreateGeneration(api.CreateGenerationRequest(spec=SPEC))
    engine.tell("generations/2", DIED)
    pages, token = [], ""
    while not pages or token:
        page = await stub.ListGenerations(api.ListGenerationsRequest(page_size=2, page_token=token))
        pages.append([generation.name for generation in page.generations])
        token = page.next_page_token
    assert pages == [[f"generations/{i}" for i in numbers] for numbers in ((5, 4), (3, 2), (1,))]
    request = api.ListGenerationsRequest(states=[pb.GENERATION_STATE_FAILED])
    assert [g.name for g in (await stub.ListGenerations(request)).generations] == ["generations/2"]


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (api.ListGenerationsRequest(page_size=-1), "page_size"),
        (api.ListGenerationsRequest(page_token="!"), "page_token"),
        (api.ListGenerationsRequest(page_token="Z2VuZXJhdGlvbnMvZ29uZQ=="), "page_token"),
        (api.ListGenerationsRequest(page_token="视频"), "page_token"),
        (api.ListGenerationsRequest(states=[pb.GENERATION_STATE_UNSPECIFIED]), "states[0]"),
    ],
)
async def test_what_cannot_be_listed(stub: VideoGenerationServiceStub, request_: Any, field: str) -> None:
    """A wrong size, token or state is named."""
    code, _, details = await refusal(stub.ListGenerations(request_))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert [v.field for v in details["BadRequest"].field_violations] == [field]


@pytest.mark.parametrize(
    ("offset", "limit", "expected"),
    [(0, 0, VIDEO), (3, 0, VIDEO[3:]), (3, 4, VIDEO[3:7]), (8, 100, VIDEO[8:]), (10, 0, b"")],
)
async def test_download_sends_the_range(
    engine: FakeEngine, stub: VideoGenerationServiceStub, offset: int, limit: int, expected: bytes
) -> None:
    """The first message describes the whole video; the chunks are exactly the bytes that were asked for."""
    engine.video = VIDEO
    name = (await stub.CreateGeneration(api.CreateGenerationRequest(spec=SPEC))).generation.name
    engine.tell(name, DONE)
    request = api.DownloadVideoRequest(name=name, offset=offset, limit=limit)
    header, *parts = [message async for message in stub.DownloadVideo(request)]
    assert header == api.DownloadVideoResponse(
        size_bytes=10, sha256=DONE.sha256, output_format=pb.OUTPUT_FORMAT_MP4_H264
    )
    assert b"".join(part.chunk.data for part in parts) == expected
    assert all(part.chunk.crc32c == google_crc32c.value(part.chunk.data) for part in parts)
    assert [part.chunk.offset for part in parts] == list(range(offset, offset + len(expected), 4))


async def test_downloads_that_are_refused_send_nothing(engine: FakeEngine, stub: VideoGenerationServiceStub) -> None:
    """An unfinished video, an offset past the end and negative numbers end the call before its first message."""
    engine.video = VIDEO
    name = (await stub.CreateGeneration(api.CreateGenerationRequest(spec=SPEC))).generation.name

    async def ending(**numbers: int) -> grpc.StatusCode:
        return (await refusal(stub.DownloadVideo(api.DownloadVideoRequest(name=name, **numbers)).read()))[0]

    assert await ending() is grpc.StatusCode.FAILED_PRECONDITION
    engine.tell(name, DONE)
    assert await ending(offset=11) is grpc.StatusCode.OUT_OF_RANGE
    assert await ending(offset=-1, limit=-1) is grpc.StatusCode.INVALID_ARGUMENT


async def test_get_model(engine: FakeEngine, stub: VideoGenerationServiceStub) -> None:
    """GetModel answers with the engine's model and state."""
    engine.set_ready(True)
    told = await stub.GetModel(api.GetModelRequest())
    assert (told.model.model_id, told.deployment.ready) == ("Wan-AI/Wan2.2-T2V-A14B-Diffusers", True)


@pytest.mark.parametrize(
    ("method", "request_"),
    [
        ("LoadAdapter", adapters.LoadAdapterRequest(name="adapters/a", source="b/c")),
        ("UnloadAdapter", adapters.UnloadAdapterRequest(name="adapters/a")),
        ("ListAdapters", adapters.ListAdaptersRequest()),
    ],
)
async def test_adapters_are_not_served(channel: grpc.aio.Channel, method: str, request_: Any) -> None:
    """Each adapter method says in a sentence that it is not served, and is listed so by GetModel."""
    code, sentence, details = await refusal(getattr(AdapterServiceStub(channel), method)(request_))
    assert (code, sentence) == (grpc.StatusCode.UNIMPLEMENTED, "this server loads no adapters")
    assert details["ErrorInfo"].reason == "NOT_SUPPORTED"
    told = await VideoGenerationServiceStub(channel).GetModel(api.GetModelRequest())
    assert f"wan_grpc.v1.AdapterService/{method}" in {part.rpc for part in told.unserved}


# ---- the boundary ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bug", [RuntimeError("secret of /etc"), asyncio.CancelledError(), TimeoutError("secret")])
@pytest.mark.parametrize("method", ["Generate", "CreateGeneration", "GetModel"])
async def test_a_bug_is_internal_and_silent(
    engine: FakeEngine, stub: VideoGenerationServiceStub, method: str, bug: BaseException
) -> None:
    """Whatever a bug raises, the caller gets INTERNAL and a request id; the log gets the trace under that id."""
    engine.error = bug
    request = api.GetModelRequest() if method == "GetModel" else getattr(api, f"{method}Request")(spec=SPEC)
    call = getattr(stub, method)(request, metadata=(("x-request-id", "r-9"),), timeout=5)
    with capture_logs(processors=[structlog.contextvars.merge_contextvars]) as logs:
        code, sentence, details = await refusal(rest(call) if method == "Generate" else call)
    assert code is grpc.StatusCode.INTERNAL
    assert sentence == "internal error; the server's log has it under request id r-9"
    assert list(details) == ["ErrorInfo"]
    assert dict(details["ErrorInfo"].metadata) == {"request_id": "r-9"}
    assert [(line["event"], line["request_id"], line["method"], line["exc_info"]) for line in logs] == [
        ("a call met a bug", "r-9", method, True)
    ]


async def test_bytes_that_are_no_message(channel: grpc.aio.Channel) -> None:
    """A request that cannot be parsed is the caller's fault, and shows nothing of the parser."""
    call = channel.unary_unary("/wan_grpc.v1.VideoGenerationService/CreateGeneration")(b"\xff\xff\xff")
    code, sentence, details = await refusal(call)
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert sentence == "the bytes are not a message of this method"
    assert details["ErrorInfo"].reason == "INVALID_REQUEST"


@pytest.mark.parametrize(
    ("header", "body", "expected"),
    [("r-1", "", "r-1"), ("r-1", "7c0ee5f6", "r-1"), (None, "7c0ee5f6", "7c0ee5f6"), ("x" * 65, "7c0ee5f6", None)],
)
async def test_each_call_has_a_request_id(
    stub: VideoGenerationServiceStub, header: str | None, body: str, expected: str | None
) -> None:
    """The caller's own id is used where it is fit for a log: the header's, else the body's, else one of ours."""
    request = api.CreateGenerationRequest(spec=pb.GenerationSpec(), request_id=body)
    metadata = () if header is None else (("x-request-id", header),)
    _, _, details = await refusal(stub.CreateGeneration(request, metadata=metadata))
    told = details["ErrorInfo"].metadata["request_id"]
    assert told == (expected or body)


async def test_no_more_calls_than_allowed(
    engine: FakeEngine, server: RpcServer, stub: VideoGenerationServiceStub
) -> None:
    """A call too many hears so at once and when to come again; there is room again when another one ends."""
    await stub.CreateGeneration(api.CreateGenerationRequest(spec=SPEC))
    watches = [stub.WatchGeneration(api.WatchGenerationRequest(name="generations/1")) for _ in range(8)]
    await engine.until_watched(by=8)
    code, _, details = await refusal(stub.GetModel(api.GetModelRequest()))
    assert (code, details["ErrorInfo"].reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "TOO_MANY_CALLS")
    assert details["RetryInfo"].retry_delay.seconds == 1
    watches[0].cancel()
    await engine.until_watched(by=7)
    assert (await stub.GetModel(api.GetModelRequest())).model.model_id


# ---- deadlines ------------------------------------------------------------------------------------------------------


class ContextWithTimeLeft:
    """As much of a call's context as a deadline asks for."""

    def __init__(self, left_s: float | None) -> None:
        self._left_s = left_s

    def time_remaining(self) -> float | None:
        return self._left_s


async def test_work_is_cut_at_the_deadline() -> None:
    """Work that takes longer than the call has ends in DEADLINE_EXCEEDED, on our own clock."""
    deadline = Deadline(ContextWithTimeLeft(0.05))  # type: ignore[arg-type]
    with pytest.raises(ServiceError) as caught:
        await deadline.meet(asyncio.Event().wait())
    assert caught.value.failure.reason is Reason.DEADLINE_EXCEEDED
    assert deadline.is_near()
    await deadline.wait()


async def test_timeouts_of_the_work_itself_are_no_deadline() -> None:
    """A TimeoutError that the work raises is a bug of the work, not the caller's deadline."""

    async def work() -> None:
        raise TimeoutError

    with pytest.raises(TimeoutError):
        await Deadline(ContextWithTimeLeft(60.0)).meet(work())  # type: ignore[arg-type]


@pytest.mark.parametrize(("left_s", "expected"), [(None, False), (60.0, False), (0.0, True), (0.1, True)])
async def test_whether_a_call_ended_at_its_deadline(left_s: float | None, expected: bool) -> None:
    """A call that ends well before its deadline was dropped; one that ends close to it is taken to have reached it."""
    deadline = Deadline(ContextWithTimeLeft(left_s))  # type: ignore[arg-type]
    assert deadline.is_near() is expected
