"""What callers may send, and what they are told when they may not."""

import uuid
from collections.abc import Callable
from typing import Any

import grpc
import pytest
from grpc_channelz.v1 import channelz_pb2, channelz_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

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


def told(how: Ending) -> tuple[grpc.StatusCode, str]:
    return how.code, how.reason


def refuse(live: LiveServer, made: pb.GenerationSpec, request_id: str = "") -> Ending:
    return refusal(lambda: live.stub.Generate(generate_request(made, request_id)))


# ---- what a request says --------------------------------------------------------------------------------------------


def test_model_lists_what_is_not_served(live: LiveServer) -> None:
    """GetModel names each field and method of a later version, and every format with its rules."""
    answer = live.stub.GetModel(service_pb2.GetModelRequest())
    fields = {part.field for part in answer.unserved if part.field}
    methods = {part.rpc for part in answer.unserved if part.rpc}
    assert fields == {"spec.adapters", "spec.acceleration_profile"}
    adapters = "wan_grpc.v1.AdapterService"
    assert methods == {f"{adapters}/{name}" for name in ("LoadAdapter", "UnloadAdapter", "ListAdapters")}
    assert [0, *answer.model.output_formats] == pb.OutputFormat.values()
    assert [0, *(rules.output_format for rules in answer.model.format_rules)] == pb.OutputFormat.values()
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


def test_request_beyond_the_limit(live: LiveServer) -> None:
    """A request far beyond what its texts need is refused without being read, and the server goes on."""
    before = live.rss_bytes()
    how = refuse(live, spec(image=bytes(65 * MIB)))
    assert how.code == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert live.make(spec()).completed.size_bytes
    assert live.rss_bytes() - before < 128 * MIB


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
