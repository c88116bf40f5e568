"""What callers may send, and what they are told when they may not."""

import uuid
from collections.abc import Callable
from typing import Any

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from grpc_channelz.v1 import channelz_pb2, channelz_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tests.functional.live import (
    MIB,
    OK,
    SERVICE,
    Ending,
    LiveServer,
    Stream,
    generate_request,
    kind,
    long_spec,
    refusal,
    spec,
    stage,
)
from wan_grpc.v1 import generation_pb2 as pb
from wan_grpc.v1 import video_generation_service_pb2 as service_pb2
from wan_grpc.v1.adapter_service_pb2 import ListAdaptersRequest, LoadAdapterRequest, UnloadAdapterRequest
from wan_grpc.v1.adapter_service_pb2_grpc import AdapterServiceStub

INVALID = (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_REQUEST")
UNKNOWN_NAME = f"generations/{uuid.uuid4()}"
ABSENT = (grpc.StatusCode.NOT_FOUND, "GENERATION_NOT_FOUND")
NAN = float("nan")

WRONG: dict[str, tuple[dict[str, Any], ...]] = {
    "prompt": ({"prompt": ""}, {"prompt": " \n"}, {"prompt": "x" * 16385}),
    "negative_prompt": ({"negative_prompt": "x" * 16385},),
    "width": ({"width": 0}, {"width": 65}, {"width": -16}, {"width": 2**31 - 16}),
    "height": ({"height": 0}, {"height": 47}),
    "num_frames": ({"num_frames": 0}, {"num_frames": 6}, {"num_frames": 165}, {"num_frames": -3}),
    "num_inference_steps": ({"num_inference_steps": 0}, {"num_inference_steps": 201}),
    "fps": ({"fps": 0}, {"fps": 121}),
    "guidance_scale": ({"guidance_scale": -0.1}, {"guidance_scale": 100.5}, {"guidance_scale": NAN}),
    "guidance_scale_2": ({"guidance_scale_2": -1.0}, {"guidance_scale_2": float("inf")}),
    "flow_shift": ({"flow_shift": 0.0}, {"flow_shift": 101.0}, {"flow_shift": NAN}),
    "boundary_ratio": ({"boundary_ratio": -0.1}, {"boundary_ratio": 1.1}, {"boundary_ratio": NAN}),
    "seed": ({"seed": -1},),
    "output_format": ({"output_format": 99},),
    "max_duration": ({"max_duration": Duration()}, {"max_duration": Duration(seconds=-1)}),
    "detach_grace": ({"detach_grace": Duration(seconds=-1)}, {"detach_grace": Duration(seconds=1, nanos=-1)}),
}
LATER: dict[str, dict[str, Any]] = {
    "image": {"image": b"\x89PNG"},
    "last_image": {"last_image": b"\x89PNG"},
    "image_fit": {"image_fit": pb.IMAGE_FIT_COVER},
    "encoding": {"encoding": pb.EncodingOptions(crf=20)},
    "preview_every_steps": {"preview_every_steps": 2},
    "adapters": {"adapters": [pb.AdapterUse(name="adapters/x")]},
    "acceleration_profile": {"acceleration_profile": "fast"},
    "output_format": {"output_format": pb.OUTPUT_FORMAT_WEBM_AV1},
}


def told(how: Ending) -> tuple[grpc.StatusCode, str]:
    return how.code, how.reason


def refuse(live: LiveServer, made: pb.GenerationSpec, request_id: str = "") -> Ending:
    return refusal(lambda: live.stub.Generate(generate_request(made, request_id)))


# ---- what a request says --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "changes"), [(field, changes) for field, each in WRONG.items() for changes in each], ids=str
)
def test_wrong_value(live: LiveServer, field: str, changes: dict[str, Any]) -> None:
    """A value that breaks a rule is refused under the path of its field, and of no other."""
    how = refuse(live, spec(**changes))
    assert (told(how), set(how.fields)) == (INVALID, {f"spec.{field}"})


def test_every_wrong_value_at_once(live: LiveServer) -> None:
    """A request that is wrong everywhere is told so in one answer, of both methods that take it."""
    changes = {name: value for each in WRONG.values() for name, value in each[0].items()}
    paths = {f"spec.{name}" for name in WRONG}
    made = spec(**changes)
    create = service_pb2.CreateGenerationRequest(spec=made, request_id="7")
    for how in (refuse(live, made, request_id="7"), refusal(lambda: live.stub.CreateGeneration(create))):
        assert (told(how), set(how.fields)) == (INVALID, {*paths, "request_id"})


@pytest.mark.parametrize("field", LATER)
def test_field_of_a_later_version(live: LiveServer, field: str) -> None:
    """A field whose behaviour this version has not is refused by name, as GetModel says it will be."""
    how = refuse(live, spec(**LATER[field]))
    assert told(how) == (grpc.StatusCode.UNIMPLEMENTED, "NOT_SUPPORTED")
    assert how.fields == (f"spec.{field}",)


def test_model_lists_what_is_not_served(live: LiveServer) -> None:
    """GetModel names each field and method of a later version, and the formats that are served."""
    answer = live.stub.GetModel(service_pb2.GetModelRequest())
    fields = {part.field for part in answer.unserved if part.field}
    methods = {part.rpc for part in answer.unserved if part.rpc}
    assert fields == {f"spec.{name}" for name in LATER if name != "output_format"}
    adapters = "wan_grpc.v1.AdapterService"
    assert methods == {f"{adapters}/{name}" for name in ("LoadAdapter", "UnloadAdapter", "ListAdapters")}
    assert list(answer.model.output_formats) == [pb.OUTPUT_FORMAT_MP4_H264, pb.OUTPUT_FORMAT_RAW_RGB24]
    assert answer.deployment.ready and answer.deployment.topology.world_size == 1


def test_methods_of_a_later_version(live: LiveServer) -> None:
    """Each method of AdapterService says that it is not served."""
    stub = AdapterServiceStub(live.channel)
    calls: list[Callable[[], object]] = [
        lambda: stub.LoadAdapter(LoadAdapterRequest()),
        lambda: stub.UnloadAdapter(UnloadAdapterRequest()),
        lambda: stub.ListAdapters(ListAdaptersRequest()),
    ]
    assert {told(refusal(call)) for call in calls} == {(grpc.StatusCode.UNIMPLEMENTED, "NOT_SUPPORTED")}


def test_accepted_says_what_is_computed(live: LiveServer) -> None:
    """`accepted` has every value, the server's own among them; sent again, they give the same video."""
    first = live.make(pb.GenerationSpec(prompt="A dog", width=32, height=32, num_frames=1, num_inference_steps=1))
    resolved = first.events[0].accepted.resolved
    told_values = {field.name: value for field, value in resolved.ListFields() if field.name != "detach_grace"}
    again = pb.GenerationSpec(**told_values)
    assert (resolved.guidance_scale, resolved.fps, resolved.boundary_ratio) == (4.0, 16, 0.875)
    assert (again.seed, live.make(again).video) == (resolved.seed, first.video)


# ---- request ids ----------------------------------------------------------------------------------------------------


def test_request_id_attaches(live: LiveServer) -> None:
    """The same id and body is the same generation, while it runs and after, by either method."""
    request_id, made = str(uuid.uuid4()), long_spec(num_inference_steps=10)
    first, second = (live.generate(made, request_id=request_id) for _ in range(2))
    assert (first.finish(), second.finish()) == (OK, OK)
    third = live.create(made, request_id=request_id)
    assert (first.name, first.video) == (second.name, second.video)
    assert (third.name, third.request_id, third.state) == (first.name, request_id, pb.GENERATION_STATE_SUCCEEDED)


def test_request_id_with_another_body(live: LiveServer) -> None:
    """An id that was used for something else is refused, and what it was used for is not touched."""
    request_id = str(uuid.uuid4())
    done = live.create(spec(), request_id=request_id)
    how = refuse(live, spec(seed=8), request_id)
    assert told(how) == (grpc.StatusCode.ALREADY_EXISTS, "REQUEST_ID_REUSED")
    assert live.ended(done.name).state == pb.GENERATION_STATE_SUCCEEDED


# ---- names, pages, bytes --------------------------------------------------------------------------------------------


def by_name(live: LiveServer, name: str) -> dict[str, Callable[[], object]]:
    """Every method that takes the name of a generation."""
    return {
        method: lambda method=method: getattr(live.stub, method)(getattr(service_pb2, f"{method}Request")(name=name))
        for method in (
            "WatchGeneration",
            "GetGeneration",
            "CancelGeneration",
            "DeleteGeneration",
            "DownloadVideo",
        )
    }


def test_unknown_name(live: LiveServer) -> None:
    """Whoever asks for a generation that is not there hears NOT_FOUND, by every method."""
    assert {told(refusal(call)) for call in by_name(live, UNKNOWN_NAME).values()} == {ABSENT}


@pytest.mark.parametrize("name", ["", "generations/", "videos/x", "generations/a/b", "generations/" + "x" * 65])
def test_wrong_name(live: LiveServer, name: str) -> None:
    """What can be no name is refused as such, by every method."""
    endings = [refusal(call) for call in by_name(live, name).values()]
    assert {(told(how), how.fields) for how in endings} == {(INVALID, ("name",))}


def download(
    live: LiveServer, name: str, *, offset: int = 0, limit: int = 0
) -> list[service_pb2.DownloadVideoResponse]:
    return list(live.stub.DownloadVideo(service_pb2.DownloadVideoRequest(name=name, offset=offset, limit=limit)))


@pytest.mark.parametrize(("offset", "limit"), [(0, 0), (0, 1), (100, 0), (100, 57), (100, 10**9), (46080, 0)])
def test_download(live: LiveServer, offset: int, limit: int) -> None:
    """A download has size and checksum of the whole first, then exactly the bytes that were asked for."""
    made = live.make(spec(output_format=pb.OUTPUT_FORMAT_RAW_RGB24))
    assert len(made.video) == 46080
    head, *rest = download(live, made.name, offset=offset, limit=limit)
    assert (head.size_bytes, head.sha256, head.output_format) == (
        made.completed.size_bytes,
        made.completed.sha256,
        pb.OUTPUT_FORMAT_RAW_RGB24,
    )
    assert not head.HasField("chunk")
    assert b"".join(answer.chunk.data for answer in rest) == made.video[offset : offset + limit if limit else None]


def test_download_out_of_range(live: LiveServer) -> None:
    """An offset past the end is OUT_OF_RANGE, of a download and of a watch; a negative one is invalid."""
    made = live.make(spec())
    past = len(made.video) + 1
    watch = service_pb2.WatchGenerationRequest(name=made.name, from_offset=past, after_sequence=made.last_sequence)
    endings = [
        refusal(lambda: download(live, made.name, offset=past)),
        refusal(lambda: live.stub.WatchGeneration(watch)),
    ]
    assert {told(how) for how in endings} == {(grpc.StatusCode.OUT_OF_RANGE, "OFFSET_OUT_OF_RANGE")}
    wrong = refusal(lambda: download(live, made.name, offset=-1, limit=-1))
    assert (told(wrong), wrong.fields) == (INVALID, ("offset", "limit"))


def test_unfinished_video(live: LiveServer) -> None:
    """A generation that runs can be neither downloaded nor deleted; once cancelled it can be deleted."""
    stream = live.generate(long_spec())
    stream.until(stage(pb.STAGE_DENOISE))
    unfinished = (grpc.StatusCode.FAILED_PRECONDITION, "GENERATION_NOT_FINISHED")
    delete = by_name(live, stream.name)["DeleteGeneration"]
    assert told(refusal(lambda: download(live, stream.name))) == told(refusal(delete)) == unfinished
    live.cancel(stream.name)
    assert told(refusal(lambda: download(live, stream.name))) == unfinished
    delete()
    assert told(refusal(lambda: live.get(stream.name))) == ABSENT
    assert stream.name not in live.names()


def test_deleted_video(live: LiveServer) -> None:
    """A deleted generation is gone, and so is its file."""
    made = live.make(spec())
    pattern = f"*/{made.name.rpartition('/')[2]}*"
    assert len(list(live.spool_dir.glob(pattern))) == 1
    by_name(live, made.name)["DeleteGeneration"]()
    assert (list(live.spool_dir.glob(pattern)), told(refusal(lambda: live.get(made.name)))) == ([], ABSENT)


def pages(live: LiveServer, **query: Any) -> list[list[str]]:
    """The names on each page."""
    found = []
    token = ""
    while True:
        page = live.stub.ListGenerations(service_pb2.ListGenerationsRequest(page_token=token, **query))
        found.append([generation.name for generation in page.generations])
        token = page.next_page_token
        if not token:
            return found


def test_pages(live: LiveServer) -> None:
    """Pages are newest first, as long as asked for, and together they are the whole list, once each."""
    made = [live.make(spec(num_frames=1, num_inference_steps=1)).name for _ in range(5)]
    whole = live.names()
    assert whole[:5] == made[::-1]
    by_two = pages(live, page_size=2)
    assert [name for page in by_two for name in page] == whole
    assert {len(page) for page in by_two[:-1]} == {2}


def test_pages_of_a_state(live: LiveServer) -> None:
    """A list of some states has all generations in these, and no others."""
    stream = live.generate(long_spec())
    stream.until(stage(pb.STAGE_DENOISE))
    live.cancel(stream.name)
    live.make(spec())
    wanted = (pb.GENERATION_STATE_CANCELLED, pb.GENERATION_STATE_FAILED)
    found = [name for page in pages(live, page_size=1, states=wanted) for name in page]
    assert found == [name for name in live.names() if live.get(name).state in wanted]
    assert found[0] == stream.name


@pytest.mark.parametrize(
    ("query", "field"),
    [({"page_size": -1}, "page_size"), ({"page_token": "x"}, "page_token"), ({"states": [2, 9]}, "states[1]")],
    ids=str,
)
def test_wrong_page(live: LiveServer, query: dict[str, Any], field: str) -> None:
    """A page that cannot be is refused by the field."""
    how = refusal(lambda: live.stub.ListGenerations(service_pb2.ListGenerationsRequest(**query)))
    assert (told(how), how.fields) == (INVALID, (field,))


# ---- anything at all ------------------------------------------------------------------------------------------------


def test_request_beyond_the_limit(live: LiveServer) -> None:
    """A request of more than 64 MiB is refused without being read, and the server goes on."""
    before = live.rss_bytes()
    how = refuse(live, spec(image=bytes(65 * MIB)))
    assert how.code == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert live.make(spec()).completed.size_bytes
    assert live.rss_bytes() - before < 128 * MIB


METHODS = sorted(service_pb2.DESCRIPTOR.services_by_name["VideoGenerationService"].methods_by_name)
NEVER = (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN)


def send(live: LiveServer, method: str, raw: bytes) -> grpc.StatusCode:
    """Call with these bytes for a request. What was accepted is cancelled."""
    call = live.channel.unary_stream(
        f"/{SERVICE}/{method}",
        request_serializer=lambda given: given,
        response_deserializer=service_pb2.GenerateResponse.FromString if method == "Generate" else None,
    )
    try:
        for answer in call(raw, timeout=60):
            if method == "Generate" and answer.event.HasField("accepted"):
                live.cancel(answer.event.generation)
            if method == "CreateGeneration":
                live.cancel(service_pb2.CreateGenerationResponse.FromString(answer).generation.name)
    except grpc.RpcError as error:
        return error.code()
    return grpc.StatusCode.OK


def damaged(raw: bytes) -> st.SearchStrategy[bytes]:
    """`raw` with some bytes changed, added or left out."""
    place = st.integers(0, len(raw) - 1)
    change = st.tuples(place, st.binary(max_size=3), st.integers(0, 3))

    def apply(changes: list[tuple[int, bytes, int]]) -> bytes:
        result = raw
        for index, put, length in changes:
            result = result[:index] + put + result[index + length :]
        return result

    return st.lists(change, min_size=1, max_size=4).map(apply)


VALID = generate_request(long_spec(detach_grace=Duration(seconds=1)), str(uuid.uuid4())).SerializeToString()


@given(method=st.sampled_from(METHODS), raw=st.one_of(st.binary(max_size=200), damaged(VALID)))
@example(method="Generate", raw=b"")
@example(method="GetGeneration", raw=b"\x0a\x02\xff\xfe")
@settings(max_examples=400, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
def test_random_bytes(live: LiveServer, method: str, raw: bytes) -> None:
    """Whatever bytes arrive, they are no reason for INTERNAL or UNKNOWN, and the server goes on."""
    assert send(live, method, raw) not in NEVER


def test_nothing_was_a_bug(live: LiveServer) -> None:
    """After all that, the log has no error, and the ranks work."""
    assert [line for line in live.log_lines() if line["level"] in ("error", "critical")] == []
    assert live.make(spec()).completed.size_bytes


# ---- beside the API -------------------------------------------------------------------------------------------------


def test_reflection(live: LiveServer) -> None:
    """Reflection lists the services, and describes ours as the protos do."""
    database = ProtoReflectionDescriptorDatabase(live.channel)
    assert set(database.get_services()) == {
        SERVICE,
        "wan_grpc.v1.AdapterService",
        "grpc.channelz.v1.Channelz",
        "grpc.health.v1.Health",
        "grpc.reflection.v1alpha.ServerReflection",
    }
    found = database.FindFileContainingSymbol(SERVICE)
    assert [method.name for method in found.service[0].method] == list(
        service_pb2.DESCRIPTOR.services_by_name["VideoGenerationService"].methods_by_name
    )


def test_channelz(live: LiveServer) -> None:
    """Channelz counts the calls of this server."""
    stub = channelz_pb2_grpc.ChannelzStub(live.channel)

    def num_started() -> int:
        servers = stub.GetServers(channelz_pb2.GetServersRequest()).server
        return sum(int(server.data.calls_started) for server in servers)

    before = num_started()
    live.names()
    assert num_started() >= before + 2


def test_heartbeats(live: LiveServer) -> None:
    """A stream on which nothing happens carries a heartbeat after the silence that was set, with the last sequence."""
    running, waiting = live.generate(long_spec()), live.generate(spec())
    first, second = (waiting.until(kind("heartbeat")) for _ in range(2))
    between_s = (second.time.ToNanoseconds() - first.time.ToNanoseconds()) / 1e9
    assert 0.2 <= between_s < 2.0
    assert first.sequence == second.sequence == waiting.events[0].sequence + 1  # accepted, queued
    live.cancel(running.name)
    assert waiting.finish() == OK


def test_initial_metadata(live: LiveServer) -> None:
    """The names of the call and of its generation come at admission, the call's own id as the caller gave it."""
    running = live.generate(long_spec())
    call = live.stub.Generate(generate_request(spec()), metadata=(("x-request-id", "mine-1"),))
    metadata = dict(call.initial_metadata())  # while it waits for its turn
    assert live.get(metadata["wan-generation"]).state == pb.GENERATION_STATE_QUEUED
    assert metadata["x-request-id"] == "mine-1"
    live.cancel(running.name)
    assert Stream(call).finish() == OK
