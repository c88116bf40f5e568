import asyncio
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from tests.unit.clients import scripted_server as script
from tests.unit.clients.scripted_server import DATA, HALF, NAME, RESOLVED, SHA256, End, ScriptedServer
from wan_grpc.v1 import generation_pb2 as pb
from wan_grpc.v1 import video_generation_service_pb2 as service_pb
from wan_grpc_client import (
    AsyncClient,
    Client,
    Completed,
    CorruptVideoError,
    Download,
    Ending,
    GenerationStatus,
    Patience,
    Progress,
    RankMemory,
    RefusedError,
    Resolved,
    StageTime,
)

QUICK = Patience(max_attempts=3, first_delay_s=0.001, longest_delay_s=0.002)
Ask = Callable[..., Any]


def ask_blocking(address: str, method: str, *args: Any, **options: Any) -> Any:
    with Client(address, patience=QUICK) as client:
        answer = getattr(client, method)(*args, **options)
        return list(answer) if inspect.isgenerator(answer) else answer


def ask_asyncio(address: str, method: str, *args: Any, **options: Any) -> Any:
    async def ask() -> Any:
        async with AsyncClient(address, patience=QUICK) as client:
            answer = getattr(client, method)(*args, **options)
            return [item async for item in answer] if inspect.isasyncgen(answer) else await answer

    return asyncio.run(ask())


@pytest.fixture(params=[ask_blocking, ask_asyncio], ids=["blocking", "asyncio"])
def ask(request: pytest.FixtureRequest) -> Ask:
    """One call of a method, by either client."""
    chosen: Ask = request.param
    return chosen


def status(**values: Any) -> GenerationStatus:
    nothing = dict.fromkeys(
        ("start_time_s", "end_time_s", "expire_time_s", "queue_position", "progress", "completed", "error")
    )
    given = {
        "name": NAME,
        "request_id": "",
        "state": "queued",
        "warnings": (),
        "create_time_s": 0.0,
        "resolved": Resolved(
            prompt="",
            negative_prompt="",
            width=0,
            height=0,
            num_frames=0,
            num_inference_steps=0,
            fps=0,
            guidance_scale=0.0,
            guidance_scale_2=0.0,
            flow_shift=0.0,
            boundary_ratio=None,
            seed=0,
            image_sha256="",
            last_image_sha256="",
            image_fit=None,
            output_format="unspecified",
            crf=None,
            bitrate_bps=None,
            quality=None,
            pixel_format=None,
            preview_every_steps=0,
        ),
    }
    return GenerationStatus(**{**nothing, **given, **values})


def test_a_generation_is_read_whole(server: ScriptedServer, ask: Ask) -> None:
    """Every field of the resource arrives, in seconds and words."""
    server.answers["GetGeneration"] = service_pb.GetGenerationResponse(
        generation=pb.Generation(
            name=NAME,
            request_id="some-id",
            state=pb.GENERATION_STATE_SUCCEEDED,
            resolved=RESOLVED,
            warnings=["long"],
            create_time=Timestamp(seconds=10, nanos=500_000_000),
            start_time=Timestamp(seconds=11),
            end_time=Timestamp(seconds=12),
            expire_time=Timestamp(seconds=13),
            progress=pb.Progress(stage=pb.STAGE_ENCODE, step=4, total_steps=5),
            completed=script.completed(1).completed,
        )
    )
    assert ask(server.address, "get_generation", NAME) == GenerationStatus(
        name=NAME,
        request_id="some-id",
        state="succeeded",
        resolved=Resolved(
            prompt="a cat",
            negative_prompt="",
            width=64,
            height=48,
            num_frames=5,
            num_inference_steps=2,
            fps=8,
            guidance_scale=4.0,
            guidance_scale_2=3.0,
            flow_shift=12.0,
            boundary_ratio=0.875,
            seed=7,
            image_sha256="ab" * 32,
            last_image_sha256="",
            image_fit="cover",
            output_format="mp4_h264",
            crf=18,
            bitrate_bps=None,
            quality=None,
            pixel_format="yuv420p",
            preview_every_steps=0,
        ),
        warnings=("long",),
        create_time_s=10.5,
        start_time_s=11.0,
        end_time_s=12.0,
        expire_time_s=13.0,
        queue_position=None,
        progress=Progress(stage="encode", step=4, total_steps=5, expert=None, step_time_s=None, eta_s=None),
        completed=Completed(
            size_bytes=len(DATA),
            sha256=SHA256,
            stage_times=(StageTime(stage="text", seconds=0.25),),
            rank_memory=(RankMemory(rank=0, peak_bytes=1234),),
        ),
        error=None,
    )
    assert server.calls == [service_pb.GetGenerationRequest(name=NAME)]


def test_a_failed_generation_says_why(server: ScriptedServer, ask: Ask) -> None:
    """An unsuccessful end carries its reason; a state that a newer server has added does no harm."""
    error = pb.GenerationError(reason="RANK_DIED", code=14, message="rank 0 died", retry_delay=Duration(seconds=5))
    generation = pb.Generation(name=NAME, state=77, error=error)  # type: ignore[arg-type]
    server.answers["GetGeneration"] = service_pb.GetGenerationResponse(generation=generation)
    assert ask(server.address, "get_generation", NAME) == status(
        state="77", error=Ending(reason="RANK_DIED", message="rank 0 died", retry_after_s=5.0)
    )


def test_listing_follows_the_pages(server: ScriptedServer, ask: Ask) -> None:
    """All generations come in order, whatever the size of a page, and states are sent as asked."""
    queued = pb.Generation(name="generations/b", state=pb.GENERATION_STATE_QUEUED, queue_position=0)
    running = pb.Generation(name="generations/a", state=pb.GENERATION_STATE_RUNNING)
    server.answers["ListGenerations"] = service_pb.ListGenerationsResponse(generations=[queued], next_page_token="next")
    server.answers["ListGenerations next"] = service_pb.ListGenerationsResponse(generations=[running])
    assert ask(server.address, "list_generations", states=["queued", "running"]) == [
        status(name="generations/b", queue_position=0),
        status(name="generations/a", state="running"),
    ]
    states = [pb.GENERATION_STATE_QUEUED, pb.GENERATION_STATE_RUNNING]
    assert server.calls == [
        service_pb.ListGenerationsRequest(states=states),
        service_pb.ListGenerationsRequest(states=states, page_token="next"),
    ]


def test_an_unknown_state_is_named(server: ScriptedServer, ask: Ask) -> None:
    """A state that does not exist is refused with those that do."""
    with pytest.raises(ValueError, match="states: 'done' is not one of queued, running, succeeded, failed, cancelled"):
        ask(server.address, "list_generations", states=["done"])


def test_cancelling_gives_the_final_state(server: ScriptedServer, ask: Ask) -> None:
    """The answer is the generation as it ended."""
    assert ask(server.address, "cancel_generation", NAME) == status(state="cancelled")


def test_deleting_sends_the_name(server: ScriptedServer, ask: Ask) -> None:
    """Nothing comes back but the absence of an error."""
    server.answers["DeleteGeneration"] = service_pb.DeleteGenerationResponse()
    assert ask(server.address, "delete_generation", NAME) is None
    assert server.calls == [service_pb.DeleteGenerationRequest(name=NAME)]


def test_the_model_is_the_message_of_the_api(server: ScriptedServer, ask: Ask) -> None:
    """What a server can do is told in the API's own words."""
    answer = service_pb.GetModelResponse(server_version="0.1.0")
    server.answers["GetModel"] = answer
    assert ask(server.address, "get_model") == answer


def test_a_unary_error_is_of_the_family(server: ScriptedServer, ask: Ask) -> None:
    """Small calls end in the same errors as streams."""
    details = (script.error_info("GENERATION_NOT_FOUND", generation=NAME),)
    server.answers["GetGeneration"] = End(code=grpc.StatusCode.NOT_FOUND, message="no such generation", details=details)
    with pytest.raises(RefusedError) as caught:
        ask(server.address, "get_generation", NAME)
    assert (str(caught.value), caught.value.reason, caught.value.generation) == (
        "no such generation",
        "GENERATION_NOT_FOUND",
        NAME,
    )


# ---- download -------------------------------------------------------------------------------------------------------


def head(**values: Any) -> service_pb.DownloadVideoResponse:
    given = {"size_bytes": len(DATA), "sha256": SHA256, "output_format": pb.OUTPUT_FORMAT_MP4_H264, **values}
    return service_pb.DownloadVideoResponse(**given)


def part(begin: int, end: int) -> service_pb.DownloadVideoResponse:
    return service_pb.DownloadVideoResponse(chunk=script.chunk(0, begin, end).chunk)


def test_a_download_is_verified_and_kept(server: ScriptedServer, ask: Ask, tmp_path: Path) -> None:
    """The file has the bytes, and the result says what they are."""
    server.streams.append([head(), part(0, HALF), part(HALF, len(DATA))])
    path = tmp_path / "cat.mp4"
    assert ask(server.address, "download_video", NAME, output=path) == Download(
        generation=NAME, path=path, data=None, size_bytes=len(DATA), sha256=SHA256, output_format="mp4_h264"
    )
    assert (path.read_bytes(), list(tmp_path.iterdir())) == (DATA, [path])


def test_a_download_goes_on_where_it_was_cut(server: ScriptedServer, ask: Ask) -> None:
    """After a cut only the rest is asked for."""
    server.streams.append([head(), part(0, HALF), End(code=grpc.StatusCode.UNKNOWN)])
    server.streams.append([head(), part(HALF, len(DATA))])
    assert ask(server.address, "download_video", NAME).data == DATA
    assert server.calls == [
        service_pb.DownloadVideoRequest(name=NAME),
        service_pb.DownloadVideoRequest(name=NAME, offset=HALF),
    ]


@pytest.mark.parametrize(
    "stream", [[head(sha256="00"), part(0, len(DATA))], [head(), part(0, HALF)]], ids=["checksum", "truncated"]
)
def test_a_wrong_download_leaves_nothing(
    server: ScriptedServer, ask: Ask, tmp_path: Path, stream: list[script.Item]
) -> None:
    """What is not the server's video gets no file."""
    server.streams.append(stream)
    with pytest.raises(CorruptVideoError):
        ask(server.address, "download_video", NAME, output=tmp_path / "cat.mp4")
    assert list(tmp_path.iterdir()) == []


def test_a_download_that_fails_leaves_nothing(server: ScriptedServer, ask: Ask, tmp_path: Path) -> None:
    """A generation that is unknown is told as such."""
    server.streams.append([End(code=grpc.StatusCode.NOT_FOUND, message="gone")])
    with pytest.raises(RefusedError, match="gone"):
        ask(server.address, "download_video", NAME, output=tmp_path / "cat.mp4")
    assert list(tmp_path.iterdir()) == []
