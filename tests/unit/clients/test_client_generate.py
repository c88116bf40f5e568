import asyncio
import dataclasses
import io
import threading
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest

from tests.unit.clients import scripted_server as script
from tests.unit.clients.scripted_server import DATA, HALF, NAME, SHA256, End, ScriptedServer, Stay
from wan_grpc.v1 import generation_pb2 as pb
from wan_grpc.v1 import video_generation_service_pb2 as service_pb
from wan_grpc_client import (
    Accepted,
    AsyncClient,
    Chunk,
    Client,
    Completed,
    CorruptVideoError,
    DeadlineError,
    Event,
    GenerationCancelledError,
    Patience,
    Progress,
    RankMemory,
    Reattaching,
    RefusedError,
    Resolved,
    ServerError,
    StageTime,
    TryAgainError,
    Video,
    VideoInfo,
    Violation,
    WanGrpcError,
    generate,
    generate_async,
)

Code = grpc.StatusCode
QUICK = Patience(max_attempts=3, first_delay_s=0.001, longest_delay_s=0.002)
ID = "3f2b8c1e-58a3-4d6e-9c58-0a5a2f1d7b11"
RESOLVED = Resolved(
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
)
ACCEPTED = Accepted(resolved=RESOLVED, warnings=("the prompt is long",))
INFO = VideoInfo(output_format="mp4_h264", media_type="video/mp4", width=64, height=48, num_frames=5, fps=8)
COMPLETED = Completed(
    size_bytes=len(DATA),
    sha256=SHA256,
    stage_times=(StageTime(stage="text", seconds=0.25),),
    rank_memory=(RankMemory(rank=0, peak_bytes=1234),),
)
CANCEL = service_pb.CancelGenerationRequest(name=NAME)


def progress(step: int) -> Progress:
    return Progress(
        stage="denoise",
        step=step,
        total_steps=2,
        expert="high_noise",
        step_time_s=1.5,
        eta_s=3.0,
        slowest_rank=0,
        slowest_rank_time_s=1.25,
    )


def video(**where: Any) -> Video:
    return Video(
        generation=NAME,
        size_bytes=len(DATA),
        sha256=SHA256,
        resolved=RESOLVED,
        info=INFO,
        completed=COMPLETED,
        warnings=("the prompt is long",),
        **{"path": None, "data": None, **where},
    )


@dataclass
class Seen:
    """What a generation brought: its events, then a video or an error."""

    events: list[Event]
    video: Video | None = None
    error: WanGrpcError | None = None


def follow_blocking(address: str, **options: Any) -> Seen:
    seen = Seen([])
    with Client(address, patience=QUICK) as client, client.generate("a cat", request_id=ID, **options) as generation:
        try:
            seen.events.extend(generation)
            seen.video = generation.result()
        except WanGrpcError as error:
            seen.error = error
    return seen


def follow_asyncio(address: str, **options: Any) -> Seen:
    async def follow() -> Seen:
        seen = Seen([])
        async with (
            AsyncClient(address, patience=QUICK) as client,
            client.generate("a cat", request_id=ID, **options) as generation,
        ):
            try:
                async for event in generation:
                    seen.events.append(event)  # keeps those before an error
                seen.video = await generation.result()
            except WanGrpcError as error:
                seen.error = error
        return seen

    return asyncio.run(follow())


Follow = Callable[..., Seen]


@pytest.fixture(params=[follow_blocking, follow_asyncio], ids=["blocking", "asyncio"])
def follow(request: pytest.FixtureRequest) -> Follow:
    """One generation from beginning to end, by either client."""
    chosen: Follow = request.param
    return chosen


def told(error: WanGrpcError | None) -> dict[str, Any]:
    assert error is not None
    return {"type": type(error), "message": str(error), **vars(error)}


def error_values(kind: type[WanGrpcError], code: grpc.StatusCode, message: str, **values: Any) -> dict[str, Any]:
    nothing = {
        "reason": "",
        "violations": (),
        "retry_after_s": None,
        "generation": None,
        "generation_state": "",
        "server_request_id": None,
    }
    return {"type": kind, "message": message, "code": code, **nothing, **values}


def same_delay(events: list[Event]) -> list[Event]:
    """Delays are drawn at random; put one value in their place."""
    return [dataclasses.replace(event, delay_s=0.0) if isinstance(event, Reattaching) else event for event in events]


# ---- what arrives ---------------------------------------------------------------------------------------------------


def test_every_event_and_byte_arrives(server: ScriptedServer, follow: Follow) -> None:
    """A whole stream becomes typed events, heartbeats excepted, and the video in memory."""
    server.streams.append(script.whole_video())
    seen = follow(server.address)
    assert seen == Seen(
        events=[
            ACCEPTED,
            progress(0),
            progress(1),
            INFO,
            Chunk(offset=0, data=DATA[:HALF]),
            Chunk(offset=HALF, data=DATA[HALF:]),
            COMPLETED,
        ],
        video=video(data=DATA),
    )
    assert server.calls == [service_pb.GenerateRequest(spec=pb.GenerationSpec(prompt="a cat"), request_id=ID)]


def test_a_path_receives_the_video(server: ScriptedServer, follow: Follow, tmp_path: Path) -> None:
    """The file has its bytes, its name and the permissions of any other new file, and nothing lies beside it."""
    server.streams.append(script.whole_video())
    path, ordinary = tmp_path / "cat.mp4", tmp_path / "ordinary"
    ordinary.touch()
    seen = follow(server.address, output=path)
    assert seen.video == video(path=path)
    assert (path.read_bytes(), path.stat().st_mode) == (DATA, ordinary.stat().st_mode)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["cat.mp4", "ordinary"]


def test_a_path_has_nothing_before_the_end(server: ScriptedServer, tmp_path: Path) -> None:
    """While bytes arrive the name keeps what it had, so that a broken download never looks complete."""
    server.streams.append([*script.whole_video()[:-1], Stay()])
    path = tmp_path / "cat.mp4"
    path.write_text("the last one")
    with generate(server.address, "a cat", output=path) as generation:
        while not isinstance(next(generation), Chunk):
            assert path.read_text() == "the last one"
        assert len(list(tmp_path.iterdir())) == 2
    assert {entry.name: entry.read_text() for entry in tmp_path.iterdir()} == {"cat.mp4": "the last one"}


def test_a_file_object_receives_bytes_as_they_arrive(server: ScriptedServer, follow: Follow) -> None:
    """A file object is written to and stays open."""
    server.streams.append(script.whole_video())
    output = io.BytesIO()
    assert follow(server.address, output=output).video == video()
    assert output.getvalue() == DATA


def test_a_device_is_written_to_and_not_replaced(server: ScriptedServer, follow: Follow) -> None:
    """Naming a device or a pipe must never put a file in its place."""
    server.streams.append(script.whole_video())
    assert follow(server.address, output="/dev/null").video == video(path=Path("/dev/null"))
    assert Path("/dev/null").is_char_device()


def test_an_unwritable_path_is_told_before_the_work(server: ScriptedServer, tmp_path: Path) -> None:
    """Nobody waits for a video that cannot be kept: no call is made."""
    with pytest.raises(FileNotFoundError), Client(server.address) as client:
        client.generate("a cat", output=tmp_path / "missing" / "cat.mp4")
    assert server.calls == []


@pytest.mark.parametrize(
    ("stream", "message", "is_cancelled"),
    [
        (
            [script.accepted(), script.video_info(2), script.chunk(2, 0, HALF, checksum=1)],
            "the chunk at byte 0 does not have its checksum (CRC-32C)",
            True,
        ),
        (
            [script.accepted(), script.video_info(2), script.chunk(2, 0, 10), script.chunk(2, 11, 20)],
            "a chunk begins at byte 11 where byte 10 was due",
            True,
        ),
        (
            [*script.whole_video()[:-1], script.completed(5, sha256="00")],
            "the video does not have its checksum (SHA-256 00)",
            False,
        ),
        (
            [*script.whole_video()[:-1], script.completed(5, size_bytes=9)],
            f"{len(DATA)} bytes arrived of a video of 9",
            False,
        ),
    ],
    ids=["chunk", "gap", "whole", "size"],
)
def test_wrong_bytes_are_refused(
    server: ScriptedServer,
    follow: Follow,
    tmp_path: Path,
    *,
    stream: list[script.Item],
    message: str,
    is_cancelled: bool,
) -> None:
    """Bytes that are not the server's raise, leave no file, and end a generation that is not at its end."""
    server.streams.append(stream)
    seen = follow(server.address, output=tmp_path / "cat.mp4")
    assert told(seen.error) == error_values(CorruptVideoError, Code.DATA_LOSS, message)
    assert list(tmp_path.iterdir()) == []
    assert server.calls[1:] == ([CANCEL] if is_cancelled else [])


# ---- streams that are cut -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [Code.INTERNAL, Code.UNKNOWN, Code.UNAVAILABLE, Code.CANCELLED])
def test_a_cut_stream_is_taken_up_where_it_was(server: ScriptedServer, follow: Follow, code: grpc.StatusCode) -> None:
    """What a proxy cuts goes on with the next event and byte, and what is told twice is heard once."""
    server.streams.append([*script.whole_video()[:6], End(code=code)])
    server.streams.append([script.video_info(4), script.chunk(4, HALF, len(DATA)), script.completed(5)])
    seen = follow(server.address)
    assert (same_delay(seen.events), seen.video) == (
        [
            ACCEPTED,
            progress(0),
            progress(1),
            INFO,
            Chunk(offset=0, data=DATA[:HALF]),
            Reattaching(attempt=1, delay_s=0.0, message="upstream reset"),
            Chunk(offset=HALF, data=DATA[HALF:]),
            COMPLETED,
        ],
        video(data=DATA),
    )
    assert server.calls[1:] == [service_pb.WatchGenerationRequest(name=NAME, after_sequence=4, from_offset=HALF)]


def test_a_stream_that_ends_well_too_early_is_taken_up(server: ScriptedServer, follow: Follow) -> None:
    """OK without `completed` is no end of a generation."""
    server.streams.extend([script.whole_video()[:3], script.whole_video()[3:]])
    seen = follow(server.address)
    assert [event for event in seen.events if isinstance(event, Reattaching)] != []
    assert seen.video == video(data=DATA)


def test_a_stream_cut_before_its_first_event_is_taken_up_by_its_metadata(
    server: ScriptedServer, follow: Follow
) -> None:
    """The initial metadata names the generation as soon as it exists."""
    server.initial_metadata = (("wan-generation", NAME),)
    nameless = pb.GenerationEvent(heartbeat=pb.Heartbeat())  # its arrival proves that of the metadata before it
    server.streams.extend([[nameless, End(code=Code.UNAVAILABLE)], script.whole_video()])
    assert follow(server.address).video == video(data=DATA)
    assert server.calls[1:] == [service_pb.WatchGenerationRequest(name=NAME)]


def test_a_restarting_server_is_waited_for(server: ScriptedServer, follow: Follow) -> None:
    """UNAVAILABLE with a generation that is not final means: come back after the time that is told."""
    details = (script.error_info("SHUTTING_DOWN", generation=NAME), script.retry_info(0, 20_000_000))
    server.streams.append([*script.whole_video()[:3], End(code=Code.UNAVAILABLE, details=details)])
    server.streams.append(script.whole_video()[3:])
    seen = follow(server.address)
    assert [event.delay_s for event in seen.events if isinstance(event, Reattaching)] == [0.02]
    assert seen.video == video(data=DATA)


def test_patience_ends(server: ScriptedServer, follow: Follow) -> None:
    """After three attempts that brought nothing, the caller hears the error and which generation it is about."""
    cut = End(code=Code.UNAVAILABLE, message="no route")
    server.streams.extend([[script.accepted(), cut], [cut], [cut], [cut]])
    seen = follow(server.address)
    assert same_delay(seen.events) == [
        ACCEPTED,
        *(Reattaching(attempt=attempt, delay_s=0.0, message="no route") for attempt in (1, 2, 3)),
    ]
    assert told(seen.error) == error_values(TryAgainError, Code.UNAVAILABLE, "no route", generation=NAME)
    assert server.calls[-1] == CANCEL


def test_attempts_that_bring_something_do_not_count(server: ScriptedServer, follow: Follow) -> None:
    """A stream that is cut again and again, and yet moves, comes to its end."""
    cut = End(code=Code.UNAVAILABLE)
    server.streams.extend([item, cut] for item in script.whole_video()[:-1])
    server.streams.append(script.whole_video()[-1:])
    seen = follow(server.address)
    assert {event.attempt for event in seen.events if isinstance(event, Reattaching)} == {1, 2}
    assert seen.video == video(data=DATA)


def test_before_acceptance_nothing_is_sent_twice(server: ScriptedServer, follow: Follow) -> None:
    """A call that fails before there is a generation is the caller's to send again."""
    server.streams.append([End(code=Code.UNAVAILABLE, message="no route")])
    seen = follow(server.address)
    assert (seen.events, told(seen.error)) == ([], error_values(TryAgainError, Code.UNAVAILABLE, "no route"))
    assert len(server.calls) == 1


def test_no_server_is_an_error_of_the_family(follow: Follow) -> None:
    """A refused connection raises at once, with the words of gRPC."""
    seen = follow("127.0.0.1:1")
    assert (type(seen.error), "Connection refused" in str(seen.error)) == (TryAgainError, True)


# ---- ends without a video -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("end", "expected"),
    [
        (
            End(
                code=Code.INVALID_ARGUMENT,
                message="two fields break rules",
                details=(
                    script.error_info("INVALID_REQUEST", request_id="r-1"),
                    script.bad_request(
                        ("spec.width", "65 is odd", "NOT_A_MULTIPLE"), ("spec.fps", "0", "OUT_OF_RANGE")
                    ),
                ),
            ),
            error_values(
                RefusedError,
                Code.INVALID_ARGUMENT,
                "two fields break rules",
                reason="INVALID_REQUEST",
                server_request_id="r-1",
                violations=(
                    Violation(field="spec.width", description="65 is odd", reason="NOT_A_MULTIPLE"),
                    Violation(field="spec.fps", description="0", reason="OUT_OF_RANGE"),
                ),
            ),
        ),
        (
            End(
                code=Code.RESOURCE_EXHAUSTED,
                message="the queue is full",
                details=(script.error_info("QUEUE_FULL", request_id="r-2"), script.retry_info(12, 500_000_000)),
            ),
            error_values(
                TryAgainError,
                Code.RESOURCE_EXHAUSTED,
                "the queue is full",
                reason="QUEUE_FULL",
                server_request_id="r-2",
                retry_after_s=12.5,
            ),
        ),
        (
            End(code=Code.INTERNAL, message="a bug", details=(script.error_info("INTERNAL", request_id="r-3"),)),
            error_values(ServerError, Code.INTERNAL, "a bug", reason="INTERNAL", server_request_id="r-3"),
        ),
        (
            End(code=Code.UNAUTHENTICATED, message="who?", details=(script.retry_info(1),)),
            error_values(RefusedError, Code.UNAUTHENTICATED, "who?"),
        ),
    ],
    ids=["violations", "retry", "bug", "no server of this API"],
)
def test_refusals_arrive_with_their_details(
    server: ScriptedServer, follow: Follow, end: End, expected: dict[str, Any]
) -> None:
    """Code, reason, sentence, every field and the time to wait are attributes; details of others are not trusted."""
    server.streams.append([end])
    seen = follow(server.address)
    assert (seen.events, told(seen.error)) == ([], expected)
    assert len(server.calls) == 1


def test_a_dead_generation_is_not_taken_up(server: ScriptedServer, follow: Follow) -> None:
    """UNAVAILABLE with a final state is the end of the generation and not of the connection."""
    details = (
        script.error_info("RANK_DIED", generation=NAME, generation_state="FAILED", request_id="r"),
        script.retry_info(5),
    )
    server.streams.append([script.accepted(), End(code=Code.UNAVAILABLE, message="rank 0 died", details=details)])
    seen = follow(server.address)
    assert told(seen.error) == error_values(
        TryAgainError,
        Code.UNAVAILABLE,
        "rank 0 died",
        reason="RANK_DIED",
        retry_after_s=5.0,
        generation=NAME,
        generation_state="failed",
        server_request_id="r",
    )
    assert len(server.calls) == 1


def test_the_deadline_bounds_the_whole_and_cancels(server: ScriptedServer, follow: Follow) -> None:
    """When the time has passed the caller hears so, and the server is told to stop."""
    server.streams.append([script.accepted(), Stay()])
    seen = follow(server.address, timeout_s=0.2)
    assert (type(seen.error), seen.error.generation if seen.error else None) == (DeadlineError, NAME)
    assert server.calls[1:] == [CANCEL]


# ---- leaving --------------------------------------------------------------------------------------------------------


def test_leaving_early_cancels(server: ScriptedServer, tmp_path: Path) -> None:
    """An exception in the `with` block cancels the generation and leaves no file."""
    server.streams.append([script.accepted(), Stay()])
    with pytest.raises(KeyboardInterrupt), generate(server.address, "a cat", output=tmp_path / "x.mp4") as generation:
        next(generation)
        raise KeyboardInterrupt
    assert (server.calls[1:], list(tmp_path.iterdir())) == ([CANCEL], [])


async def test_leaving_early_cancels_with_asyncio(server: ScriptedServer) -> None:
    """The same in an `async with` block."""
    server.streams.append([script.accepted(), Stay()])
    async with generate_async(server.address, "a cat") as generation:
        await anext(generation)
    assert server.calls[1:] == [CANCEL]


async def test_a_cancelled_task_cancels(server: ScriptedServer) -> None:
    """Cancelling the task that waits for events cancels the generation, also without a `with` block."""
    server.streams.append([script.accepted(), Stay()])
    is_accepted = asyncio.Event()

    async def make() -> None:
        async for _ in generate_async(server.address, "a cat"):
            is_accepted.set()

    task = asyncio.create_task(make())
    await is_accepted.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert server.calls[1:] == [CANCEL]


def test_another_thread_can_cancel(server: ScriptedServer) -> None:
    """Who iterates then hears that the generation was cancelled by a caller."""
    server.streams.append([script.accepted(), Stay()])
    with generate(server.address, "a cat") as generation:
        next(generation)
        thread = threading.Thread(target=generation.cancel)
        thread.start()
        with pytest.raises(GenerationCancelledError) as caught:
            next(generation)
        thread.join()
    assert (caught.value.reason, server.calls[1:]) == ("CANCELLED_BY_CALLER", [CANCEL])


async def test_another_task_can_cancel(server: ScriptedServer) -> None:
    """The same with asyncio."""
    server.streams.append([script.accepted(), Stay()])
    async with generate_async(server.address, "a cat") as generation:
        await anext(generation)
        waiting = asyncio.ensure_future(generation.result())
        await generation.cancel()
        with pytest.raises(GenerationCancelledError) as caught:
            await waiting
    assert (caught.value.reason, server.calls[1:]) == ("CANCELLED_BY_CALLER", [CANCEL])


def test_cancel_before_acceptance_ends_the_call(server: ScriptedServer) -> None:
    """There is no name to cancel by yet, so the call itself is left."""
    server.streams.append([Stay()])
    with generate(server.address, "a cat") as generation:
        thread = threading.Thread(target=generation.cancel)
        thread.start()
        with pytest.raises(GenerationCancelledError):
            generation.result()
        thread.join()
    assert [type(call) for call in server.calls if isinstance(call, service_pb.CancelGenerationRequest)] == []


async def test_cancel_before_acceptance_is_no_cancel_of_the_task(server: ScriptedServer) -> None:
    """With asyncio, the waiting task hears an error of the family and is not itself cancelled."""
    server.streams.append([Stay()])
    async with generate_async(server.address, "a cat") as generation:
        waiting = asyncio.ensure_future(generation.result())
        await asyncio.sleep(0)
        await generation.cancel()
        with pytest.raises(GenerationCancelledError):
            await waiting


def test_detaching_leaves_the_generation_alone(server: ScriptedServer) -> None:
    """After `detach` nothing is cancelled, and the name allows to watch on."""
    server.streams.append([script.accepted(), Stay()])
    with generate(server.address, "a cat") as generation:
        next(generation)
        generation.detach()
        assert (generation.name, list(generation)) == (NAME, [])
    assert len(server.calls) == 1


def test_a_watcher_only_detaches(server: ScriptedServer) -> None:
    """Whoever only watches has no say in the end of a generation."""
    server.streams.append([script.accepted(), Stay()])
    with Client(server.address) as client, client.watch(NAME) as generation:
        assert next(generation) == ACCEPTED
    assert server.calls == [service_pb.WatchGenerationRequest(name=NAME)]


def test_a_watcher_receives_the_whole_video(server: ScriptedServer) -> None:
    """Watching begins with the first event and byte."""
    server.streams.append(script.whole_video())
    with Client(server.address) as client, client.watch(NAME) as generation:
        assert generation.result() == video(data=DATA)


def test_the_channel_of_the_caller_stays_open(server: ScriptedServer) -> None:
    """A channel that was passed in serves further generations."""
    server.streams.extend([script.whole_video(), script.whole_video()])
    with grpc.insecure_channel(server.address) as channel:
        for _ in range(2):
            with generate(channel, "a cat", metadata=[("x-who", "me")]) as generation:
                assert generation.result() == video(data=DATA)
    assert [metadata["x-who"] for metadata in server.metadata] == ["me", "me"]


# ---- what is sent ---------------------------------------------------------------------------------------------------


def test_every_option_is_sent(server: ScriptedServer, follow: Follow) -> None:
    """Each option lands in its field, and what is None in none."""
    server.streams.append(script.whole_video())
    follow(
        server.address,
        negative_prompt="",
        width=64,
        height=48,
        num_frames=5,
        fps=8,
        num_inference_steps=2,
        guidance_scale=1.0,
        guidance_scale_2=2.0,
        flow_shift=3.0,
        boundary_ratio=0.0,
        seed=0,
        output_format="raw_rgb24",
        max_duration_s=1.5,
        detach_grace_s=0.0,
    )
    spec = pb.GenerationSpec(
        prompt="a cat",
        negative_prompt="",
        width=64,
        height=48,
        num_frames=5,
        fps=8,
        num_inference_steps=2,
        guidance_scale=1.0,
        guidance_scale_2=2.0,
        flow_shift=3.0,
        boundary_ratio=0.0,
        seed=0,
        output_format=pb.OUTPUT_FORMAT_RAW_RGB24,
    )
    spec.max_duration.FromMilliseconds(1500)
    spec.detach_grace.FromMilliseconds(0)
    assert server.calls == [service_pb.GenerateRequest(spec=spec, request_id=ID)]


def test_an_endless_grace_is_sent_as_such(server: ScriptedServer, follow: Follow) -> None:
    """Infinity has a field of its own."""
    server.streams.append(script.whole_video())
    follow(server.address, detach_grace_s=float("inf"), seed=None)
    spec = pb.GenerationSpec(prompt="a cat", detach_unlimited=True)
    assert server.calls == [service_pb.GenerateRequest(spec=spec, request_id=ID)]


def test_images_and_encoding_are_sent(server: ScriptedServer, follow: Follow, tmp_path: Path) -> None:
    """Bytes go as they are, paths as the bytes that are there, sizes as sides, names as values of the API."""
    (tmp_path / "a.png").write_bytes(b"first")
    options: list[dict[str, Any]] = [
        {"image": b"first", "last_image": str(tmp_path / "a.png"), "size": "64x48", "crf": 0, "quality": 90},
        {"image": tmp_path / "a.png", "image_fit": "exact", "size": (64, 48), "bitrate_bps": 10_000, "width": None},
        {"pixel_format": "yuv444p10", "output_format": "mp4_h265", "image": None, "crf": None},
    ]
    for one in options:
        server.streams.append(script.whole_video())
        follow(server.address, **one)
    sides = {"width": 64, "height": 48}
    specs = [
        pb.GenerationSpec(image=b"first", last_image=b"first", encoding=pb.EncodingOptions(crf=0, quality=90), **sides),
        pb.GenerationSpec(
            image=b"first",
            image_fit=pb.IMAGE_FIT_EXACT,
            encoding=pb.EncodingOptions(bitrate_bps=10_000),
            **sides,
        ),
        pb.GenerationSpec(
            output_format=pb.OUTPUT_FORMAT_MP4_H265,
            encoding=pb.EncodingOptions(pixel_format=pb.PIXEL_FORMAT_YUV444P10),
        ),
    ]
    for spec in specs:
        spec.prompt = "a cat"
    assert [call.spec for call in server.calls] == specs


def test_every_generation_has_an_id_of_its_own(server: ScriptedServer) -> None:
    """Without a request_id one is drawn, a UUID of version 4, and the caller can see it."""
    server.streams.extend([script.whole_video(), script.whole_video()])
    ids = []
    for _ in range(2):
        with generate(server.address, "a cat") as generation:
            generation.result()
            ids.append(generation.request_id)
    assert [call.request_id for call in server.calls] == ids
    assert (len(set(ids)), {uuid.UUID(one).version for one in ids}) == (2, {4})


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"wdith": 1}, TypeError, "no such option of a generation: wdith"),
        ({"width": 1.5}, ValueError, "width: 1.5 cannot be sent"),
        ({"seed": 2**63}, ValueError, f"seed: {2**63} cannot be sent"),
        ({"output_format": "avi"}, ValueError, "output_format: 'avi' is not one of mp4_h264, mp4_h264_progressive"),
        ({"max_duration_s": float("nan")}, ValueError, "max_duration_s: nan s is not a finite time"),
        ({"size": "64-48"}, ValueError, "size: '64-48' is not WIDTHxHEIGHT such as 832x480"),
        ({"size": (64,)}, ValueError, "size: (64,) is not WIDTHxHEIGHT such as 832x480"),
        ({"size": "64x48", "width": 64}, ValueError, "size: not with width"),
        ({"size": (64, 48), "height": 48}, ValueError, "size: not with height"),
        ({"crf": 1, "bitrate_bps": 1}, ValueError, "crf: not with bitrate_bps"),
        ({"quality": "best"}, ValueError, "quality: 'best' cannot be sent"),
        ({"image": 3}, ValueError, "image: must be the bytes of a file or a path, not int"),
        ({"last_image": ["a"]}, ValueError, "last_image: must be the bytes of a file or a path, not list"),
        ({"image": "/no/a.png"}, FileNotFoundError, "[Errno 2] No such file or directory: '/no/a.png'"),
        ({"image_fit": "crop"}, ValueError, "image_fit: 'crop' is not one of cover, contain, stretch, exact"),
        ({"pixel_format": "rgb48"}, ValueError, "pixel_format: 'rgb48' is not one of yuv420p, yuv422p"),
    ],
)
def test_what_cannot_be_sent_is_named(options: dict[str, Any], kind: type[Exception], message: str) -> None:
    """An option that the API cannot express is refused before there is a call."""
    with Client("127.0.0.1:1") as client, pytest.raises(kind) as caught:
        client.generate("a cat", **options)
    assert str(caught.value).startswith(message)


async def test_what_cannot_be_begun_leaves_no_channel(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A refused option or output is told before there is a channel, for nobody would be left to close it."""
    opened: list[str] = []
    connect = grpc.aio.insecure_channel

    def count(address: str, **options: Any) -> grpc.aio.Channel:
        opened.append(address)
        return connect(address, **options)

    monkeypatch.setattr(grpc.aio, "insecure_channel", count)
    with pytest.raises(ValueError, match="width"):
        generate_async("127.0.0.1:1", "a cat", width=2**40)
    with pytest.raises(OSError, match="nowhere"):
        generate_async("127.0.0.1:1", "a cat", output=tmp_path / "nowhere" / "x.mp4")
    assert opened == []
