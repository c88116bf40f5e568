import signal
from pathlib import Path

import grpc
import pytest
from google.protobuf.timestamp_pb2 import Timestamp

from tests.unit.clients import scripted_server as script
from tests.unit.clients.scripted_server import DATA, NAME, RESOLVED, SHA256, End, ScriptedServer
from wan_grpc.v1 import generation_pb2 as pb
from wan_grpc.v1 import model_pb2
from wan_grpc.v1 import video_generation_service_pb2 as service_pb
from wan_grpc_client.cli import main

Captured = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def _utc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "UTC")


@pytest.fixture(autouse=True)
def _keep_signals() -> object:
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def run(server: ScriptedServer, *arguments: str) -> int:
    command, *rest = arguments
    return main([command, "--address", server.address, *rest])


def test_generate_shows_progress_and_says_what_was_made(
    server: ScriptedServer, tmp_path: Path, capsys: Captured
) -> None:
    """Progress goes to stderr, where the video is and what it is to stdout."""
    server.streams.append(script.whole_video())
    path = tmp_path / "cat.mp4"
    assert run(server, "generate", "--prompt", "a cat", "--seed", "7", "--output", str(path)) == 0
    out, err = capsys.readouterr()
    assert out == f"{path}: 64x48, 5 frames at 8 fps, {len(DATA)} bytes, seed 7\nsha256 {SHA256}\n"
    assert err == (
        f"waiting for {server.address}\n"
        "warning: the prompt is long\n"
        "denoise 0/2, high noise, 1.50 s a step, 0:03 left\n"
    )
    assert path.read_bytes() == DATA
    assert server.calls[0].spec == pb.GenerationSpec(prompt="a cat", seed=7)


def test_generate_to_stdout_keeps_words_apart(
    server: ScriptedServer, capsysbinary: pytest.CaptureFixture[bytes]
) -> None:
    """With `-` stdout is the video and nothing else, ready for a player."""
    server.streams.append(script.whole_video())
    assert run(server, "generate", "--prompt", "a cat", "--output", "-") == 0
    out, err = capsysbinary.readouterr()
    assert (out, err.splitlines()[-1]) == (DATA, f"sha256 {SHA256}".encode())


def test_each_violation_has_a_line_with_its_flag(server: ScriptedServer, tmp_path: Path, capsys: Captured) -> None:
    """A refused request is wrong usage, told in the words of the command line, and leaves no file."""
    details = (
        script.error_info("INVALID_REQUEST", request_id="r"),
        script.bad_request(
            ("spec.guidance_scale_2", "101.0 is not between 0.0 and 100.0", "OUT_OF_RANGE"),
            ("spec.max_duration", "0 s is not a positive, finite time", "OUT_OF_RANGE"),
            ("spec.image", "is broken", "OTHER"),
        ),
    )
    server.streams.append([End(code=grpc.StatusCode.INVALID_ARGUMENT, message="all of it", details=details)])
    assert run(server, "generate", "--prompt", "a cat", "--output", str(tmp_path / "x.mp4")) == 2
    assert capsys.readouterr().err.splitlines()[1:] == [
        "wan-grpc-client generate: the request was refused (INVALID_REQUEST)",
        "  --guidance-scale-2: 101.0 is not between 0.0 and 100.0",
        "  --max-duration-s: 0 s is not a positive, finite time",
        "  spec.image: is broken",
    ]
    assert list(tmp_path.iterdir()) == []


def test_a_full_queue_says_when_to_come_back(server: ScriptedServer, tmp_path: Path, capsys: Captured) -> None:
    """The time that the server names is shown."""
    details = (script.error_info("QUEUE_FULL"), script.retry_info(12, 500_000_000))
    server.streams.append([End(code=grpc.StatusCode.RESOURCE_EXHAUSTED, message="the queue is full", details=details)])
    assert run(server, "generate", "--prompt", "a cat", "--output", str(tmp_path / "x.mp4")) == 1
    assert capsys.readouterr().err.splitlines()[1:] == [
        "wan-grpc-client generate: the queue is full (QUEUE_FULL)",
        "  try again in 12.5 s",
    ]


def test_a_file_that_cannot_be_written_is_named(server: ScriptedServer, tmp_path: Path, capsys: Captured) -> None:
    """The server is not even asked."""
    assert run(server, "generate", "--prompt", "a cat", "--output", str(tmp_path / "no" / "x.mp4")) == 1
    assert capsys.readouterr().err.startswith(f"wan-grpc-client generate: {tmp_path}/no/")
    assert server.calls == []


def test_a_value_that_cannot_be_sent_is_wrong_usage(server: ScriptedServer, capsys: Captured) -> None:
    """The same exit code as for a flag that does not exist."""
    assert run(server, "generate", "--prompt", "a cat", "--output", "/dev/null", "--output-format", "avi") == 2
    assert capsys.readouterr().err.startswith("wan-grpc-client generate: output_format: 'avi' is not one of mp4_h264")
    with pytest.raises(SystemExit) as caught:
        main(["generate", "--no-such-flag"])
    assert caught.value.code == 2


def test_no_server_is_a_sentence(capsys: Captured) -> None:
    """A refused connection is no traceback."""
    assert main(["models", "--address", "127.0.0.1:1"]) == 1
    assert capsys.readouterr().err.startswith("wan-grpc-client models: failed to connect")


def test_models_prints_what_the_server_can_do(server: ScriptedServer, capsys: Captured) -> None:
    """Every fact of use has a line, defaults by the names of the flags."""
    server.answers["GetModel"] = service_pb.GetModelResponse(
        model=model_pb2.Model(
            model_id="embedded",
            embedded=True,
            tasks=[pb.TASK_TEXT_TO_VIDEO],
            sizes=[model_pb2.FrameSize(width=128, height=96)],
            defaults=model_pb2.ModelDefaults(width=128, height=96, output_format=pb.OUTPUT_FORMAT_MP4_H264),
            limits=model_pb2.ModelLimits(max_queued=16),
            output_formats=[pb.OUTPUT_FORMAT_MP4_H264, pb.OUTPUT_FORMAT_RAW_RGB24],
        ),
        deployment=model_pb2.Deployment(
            ready=True, topology=model_pb2.Topology(world_size=2), device="cpu", dtype="float32", num_running=1
        ),
        server_version="0.1.0",
        unserved=[model_pb2.UnservedPart(field="spec.image", description="takes no images")],
    )
    assert run(server, "models") == 0
    assert capsys.readouterr().out == (
        "model: embedded (random weights: its videos are noise)\n"
        "server: wan-grpc 0.1.0, ready\n"
        "runs on: 2 x cpu, float32\n"
        "queue: 1 running, 0 waiting, room for 16\n"
        "tasks: text_to_video\n"
        "sizes: 128x96\n"
        "output formats: mp4_h264, raw_rgb24\n"
        "defaults:\n"
        "  width: 128\n"
        "  height: 96\n"
        "  output_format: mp4_h264\n"
        "not served: spec.image: takes no images\n"
    )


def test_get_and_list_print_how_generations_stand(server: ScriptedServer, capsys: Captured) -> None:
    """`get` has a line for each fact, `list` one for each generation."""
    failed = pb.Generation(
        name=NAME,
        state=pb.GENERATION_STATE_FAILED,
        resolved=RESOLVED,
        create_time=Timestamp(seconds=1_700_000_000),
        end_time=Timestamp(seconds=1_700_000_060),
        error=pb.GenerationError(reason="RANK_DIED", message="rank 0 died"),
    )
    running = pb.Generation(
        name="generations/b",
        state=pb.GENERATION_STATE_RUNNING,
        create_time=Timestamp(seconds=1_700_000_000),
        progress=pb.Progress(stage=pb.STAGE_DENOISE, step=3, total_steps=40),
    )
    server.answers["GetGeneration"] = service_pb.GetGenerationResponse(generation=failed)
    server.answers["ListGenerations"] = service_pb.ListGenerationsResponse(generations=[running, failed])
    assert (run(server, "get", NAME), run(server, "list")) == (0, 0)
    assert capsys.readouterr().out == (
        f"{NAME} failed\n"
        "  prompt: a cat\n"
        "  video: 64x48, 5 frames at 8 fps, 2 steps, mp4_h264, seed 7\n"
        "  accepted: 2023-11-14 22:13:20\n"
        "  ended: 2023-11-14 22:14:20\n"
        "  error: rank 0 died (RANK_DIED)\n"
        "generations/b  2023-11-14 22:13:20  running, denoise 3/40\n"
        f"{NAME}  2023-11-14 22:13:20  failed\n"
    )


def test_download_delete_and_cancel(server: ScriptedServer, tmp_path: Path, capsys: Captured) -> None:
    """The small commands do what they say and say what they did."""
    head = service_pb.DownloadVideoResponse(
        size_bytes=len(DATA), sha256=SHA256, output_format=pb.OUTPUT_FORMAT_MP4_H264
    )
    body = service_pb.DownloadVideoResponse(chunk=script.chunk(0, 0, len(DATA)).chunk)
    server.streams.append([head, body])
    server.answers["DeleteGeneration"] = service_pb.DeleteGenerationResponse()
    path = tmp_path / "cat.mp4"
    codes = (
        run(server, "download", NAME, "--output", str(path)),
        run(server, "delete", NAME),
        run(server, "cancel", NAME),
    )
    assert (codes, path.read_bytes()) == ((0, 0, 0), DATA)
    assert capsys.readouterr().out.splitlines()[:4] == [
        f"{path}: {len(DATA)} bytes, mp4_h264",
        f"sha256 {SHA256}",
        f"{NAME} is removed",
        f"{NAME} cancelled",
    ]
