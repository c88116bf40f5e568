import json
import signal
from pathlib import Path

import grpc
import pytest
from google.protobuf.timestamp_pb2 import Timestamp

from tests.unit.clients import scripted_server as script
from tests.unit.clients.scripted_server import DATA, NAME, RESOLVED, SHA256, End, ScriptedServer
from wan_grpc.v1 import generation_pb2 as pb
from wan_grpc.v1 import video_generation_service_pb2 as service_pb
from wan_grpc_client import Client, RefusedError
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
            ("spec.encoding.crf", "gif has no such option", "DOES_NOT_APPLY"),
            ("spec.output_format", "gif is for small videos", "DOES_NOT_FIT"),
            ("spec.width", "3 is odd", "NOT_A_MULTIPLE"),
            ("spec.adapters", "are none", "OTHER"),
        ),
    )
    server.streams.append([End(code=grpc.StatusCode.INVALID_ARGUMENT, message="all of it", details=details)])
    assert run(server, "generate", "--prompt", "a cat", "--output", str(tmp_path / "x.mp4")) == 2
    assert capsys.readouterr().err.splitlines()[1:] == [
        "wan-grpc-client generate: the request was refused (INVALID_REQUEST)",
        "  --guidance-scale-2: 101.0 is not between 0.0 and 100.0",
        "  --max-duration-s: 0 s is not a positive, finite time",
        "  --image: is broken",
        "  --crf: gif has no such option",
        "  --format: gif is for small videos",
        "  --width: 3 is odd",
        "  spec.adapters: are none",
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


def test_a_size_is_named_as_it_was_given(server: ScriptedServer, capsys: Captured) -> None:
    """Who says --size hears of --size, whichever side is wrong."""
    details = (
        script.error_info("INVALID_REQUEST"),
        script.bad_request(("spec.width", "3 is odd", "R"), ("spec.height", "5 is odd", "R")),
    )
    server.streams.append([End(code=grpc.StatusCode.INVALID_ARGUMENT, details=details)])
    assert run(server, "generate", "--prompt", "a cat", "--size", "3x5", "--output", "/dev/null") == 2
    assert capsys.readouterr().err.splitlines()[2:] == ["  --size: 3 is odd", "  --size: 5 is odd"]
    assert server.calls[0].spec == pb.GenerationSpec(prompt="a cat", width=3, height=5)


@pytest.mark.parametrize(
    ("flags", "wanted"),
    [
        ([], ["--prompt or --prompts-file: one of them, and not both, must be given"]),
        (["--prompt=p", "--prompts-file=x"], ["--prompt or --prompts-file: one of them, and not both, must be given"]),
        (["--prompt=p", "--size=1x1", "--height=1"], ["--size: not with --width or --height"]),
        (["--prompt=p", "--crf=1", "--bitrate-bps=1"], ["--crf: not with --bitrate-bps"]),
        (["--prompt=p", "--num-outputs=2", "--output=-"], ["--output: stdout takes one video"]),
        (
            ["--prompts-file=x", "--output=y"],
            ["--output: not with --prompts-file, whose lines may have an output_file_name each"],
        ),
        (["--prompt=p", "--num-outputs=2", "--request-id=x"], ["--request-id: names one generation"]),
        (
            ["--prompt=p", "--width=99999999999"],
            ["--width: 99999999999 cannot be sent: Value out of range: 99999999999"],
        ),
        (["--prompt=p", "--max-duration-s=nan"], ["--max-duration-s: nan s is not a finite time"]),
        (["--prompt=p", "--image=/no/a.png"], ["--image: /no/a.png: No such file or directory"]),
        (["--prompt=p", "--last-image=/no/a.png"], ["--last-image: /no/a.png: No such file or directory"]),
        (["--prompt=p", "--output=/"], ["--output: / is a directory"]),
        (["--prompt=p", f"--output-path={__file__}"], [f"--output-path: {__file__} is not a directory"]),
        (["--prompts-file=/no/x"], ["/no/x: cannot be read: No such file or directory"]),
    ],
)
def test_wrong_flags_are_told_before_the_server_is_asked(
    flags: list[str], wanted: list[str], server: ScriptedServer, capsys: Captured
) -> None:
    """What cannot be sent, or does not go together, is wrong usage under the name of its flag."""
    assert run(server, "generate", *flags) == 2
    assert capsys.readouterr().err.splitlines() == [f"wan-grpc-client generate: {one}" for one in wanted]
    assert server.calls == []


@pytest.mark.parametrize(
    ("flags", "wanted"),
    [
        (["--format=avi"], "argument --format/--output-format: invalid choice: 'avi'"),
        (["--size=64-48"], "argument --size: '64-48' is not WIDTHxHEIGHT such as 832x480"),
        (["--num-outputs=9"], "argument --num-outputs: invalid choice: 9"),
        (["--image-fit=x"], "argument --image-fit: invalid choice: 'x'"),
        (["--no-such-flag"], "unrecognized arguments: --no-such-flag"),
    ],
)
def test_what_is_no_value_of_a_flag(flags: list[str], wanted: str, capsys: Captured) -> None:
    """A value that no server could take is told with the flag and what there is to choose from."""
    with pytest.raises(SystemExit) as caught:
        main(["generate", "--prompt=p", *flags])
    assert (caught.value.code, wanted in capsys.readouterr().err) == (2, True)


def test_every_flag_reaches_the_request(server: ScriptedServer, tmp_path: Path) -> None:
    """Images go as bytes, sizes as sides, names as values; a synonym is as good."""
    (tmp_path / "a.png").write_bytes(b"first")
    (tmp_path / "b.png").write_bytes(b"last")
    flags = {
        "--image-path": str(tmp_path / "a.png"),
        "--last-image": str(tmp_path / "b.png"),
        "--image-fit": "contain",
        "--size": "64*48",
        "--output-format": "mkv_ffv1",
        "--crf": "3",
        "--quality": "4",
        "--pixel-format": "rgb24",
        "--output": str(tmp_path / "x.mkv"),
    }
    server.streams.append(script.whole_video())
    assert run(server, "generate", "--prompt", "p", *(word for flag in flags.items() for word in flag)) == 0
    assert server.calls[0].spec == pb.GenerationSpec(
        prompt="p",
        image=b"first",
        last_image=b"last",
        image_fit=pb.IMAGE_FIT_CONTAIN,
        width=64,
        height=48,
        output_format=pb.OUTPUT_FORMAT_MKV_FFV1,
        encoding=pb.EncodingOptions(crf=3, quality=4, pixel_format=pb.PIXEL_FORMAT_RGB24),
    )


@pytest.mark.parametrize(
    ("flags", "name"), [([], "video.mp4"), (["--format=png"], "picture.png"), (["--format=webm_av1"], "video.webm")]
)
def test_the_usual_name_has_the_suffix_of_the_format(
    flags: list[str], name: str, server: ScriptedServer, tmp_path: Path
) -> None:
    """Without --output the file is video or picture, in --output-path, which is made."""
    server.streams.append(script.whole_video())
    assert run(server, "generate", "--prompt=p", *flags, "--output-path", str(tmp_path / "new")) == 0
    assert [path.name for path in (tmp_path / "new").iterdir()] == [name]


def test_several_outputs_are_several_generations(server: ScriptedServer, tmp_path: Path, capsys: Captured) -> None:
    """Consecutive seeds, an id and a file each, a line on stdout for each."""
    server.streams.extend([script.whole_video(), script.whole_video()])
    path = tmp_path / "cat.mp4"
    assert run(server, "generate", "--prompt=p", "--seed=7", "--num-outputs=2", f"--output={path}") == 0
    files = [tmp_path / f"cat-{seed}.mp4" for seed in (7, 8)]
    facts = f"64x48, 5 frames at 8 fps, {len(DATA)} bytes, seed 7, sha256 {SHA256}"
    assert capsys.readouterr().out.splitlines() == [f"{file}: {facts}" for file in files]
    assert [file.read_bytes() for file in files] == [DATA, DATA]
    assert [call.spec for call in server.calls] == [pb.GenerationSpec(prompt="p", seed=seed) for seed in (7, 8)]
    assert len({call.request_id for call in server.calls}) == 2


def write(directory: Path, *lines: dict[str, object]) -> Path:
    path = directory / "prompts.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_a_failing_line_does_not_stop_the_others(server: ScriptedServer, tmp_path: Path, capsys: Captured) -> None:
    """Each line is a generation; what fails is told under its line, in its own words, and the exit code says so."""
    details = (script.error_info("INVALID_REQUEST"), script.bad_request(("spec.output_format", "no", "R")))
    died = End(code=grpc.StatusCode.UNAVAILABLE, message="rank 0 died", details=(script.error_info("RANK_DIED"),))
    server.streams.extend([[End(code=grpc.StatusCode.INVALID_ARGUMENT, details=details)], script.whole_video(), [died]])
    (tmp_path / "b.png").write_bytes(b"picture")
    path = write(
        tmp_path,
        {"prompt": "a", "seed": 1},
        {"prompt": "b", "seed": 2, "image": "b.png"},
        {"prompt": "c", "output_file_name": "sub/c.mp4"},
    )
    out = tmp_path / "out"
    assert run(server, "generate", f"--prompts-file={path}", f"--output-path={out}", "--fps=8") == 1
    told = capsys.readouterr()
    facts = f"64x48, 5 frames at 8 fps, {len(DATA)} bytes, seed 7, sha256 {SHA256}"
    assert told.out.splitlines() == [f"{out}/b-2.mp4: {facts}"]
    assert [line for line in told.err.splitlines() if line.startswith(("wan-grpc-client", "  "))] == [
        f"wan-grpc-client generate: {path}:1: the request was refused (INVALID_REQUEST)",
        "  format: no",
        f"wan-grpc-client generate: {path}:3: rank 0 died (RANK_DIED)",
    ]
    assert [call.spec for call in server.calls] == [
        pb.GenerationSpec(prompt="a", seed=1, fps=8),
        pb.GenerationSpec(prompt="b", seed=2, fps=8, image=b"picture"),
        pb.GenerationSpec(prompt="c", fps=8),
    ]
    assert sorted(path.name for path in out.rglob("*")) == ["b-2.mp4", "sub"]


def test_every_line_is_checked_before_the_first_is_sent(
    server: ScriptedServer, tmp_path: Path, capsys: Captured
) -> None:
    """Types, names, ranges of the wire and images that cannot be read: all at once, and nothing is asked or written."""
    path = write(
        tmp_path,
        {"prompt": "a"},
        {"prompt": "b", "image": "no.png"},
        {"prompt": "c", "width": 2**40},
        {"prompt": "\ud800"},
    )
    assert run(server, "generate", f"--prompts-file={path}", f"--output-path={tmp_path / 'out'}") == 2
    told = [line.partition(": ")[2].partition(":") for line in capsys.readouterr().err.splitlines()]
    assert [rest.removeprefix(f"{path}:") for rest in ("".join(parts) for parts in told)] == [
        f"2: image: {tmp_path}/no.png: No such file or directory",
        f"3: width: {2**40} cannot be sent: Value out of range: {2**40}",
        "4: prompt: '\\ud800' cannot be sent: 'utf-8' codec can't encode character '\\ud800' in position 0: "
        "surrogates not allowed",
    ]
    assert (server.calls, (tmp_path / "out").exists()) == ([], False)


def test_a_full_queue_is_waited_for_by_a_file_of_prompts(
    server: ScriptedServer, tmp_path: Path, capsys: Captured
) -> None:
    """A line that finds no room comes again when the server says so, under the same file."""
    details = (script.error_info("QUEUE_FULL"), script.retry_info(0, 10_000_000))
    full = End(code=grpc.StatusCode.RESOURCE_EXHAUSTED, message="the queue is full", details=details)
    server.streams.extend([[full], [full], script.whole_video()])
    path = write(tmp_path, {"prompt": "a", "output_file_name": "a.mp4"})
    assert run(server, "generate", f"--prompts-file={path}", f"--output-path={tmp_path}") == 0
    assert "1 of 1: the queue is full; trying again\n" in capsys.readouterr().err
    assert ((tmp_path / "a.mp4").read_bytes(), len(server.calls)) == (DATA, 3)


def test_a_request_that_is_too_large_for_grpc_is_refused(server: ScriptedServer, capsys: Captured) -> None:
    """What gRPC itself does not take is no matter of trying again."""
    too_large = "SERVER: Received message larger than max (9 vs. 8)"
    server.streams.append([End(code=grpc.StatusCode.RESOURCE_EXHAUSTED, message=too_large)])
    with Client(server.address) as client, client.generate("p") as generation, pytest.raises(RefusedError) as caught:
        generation.result()
    assert str(caught.value) == too_large


def test_no_server_is_a_sentence(capsys: Captured) -> None:
    """A refused connection is no traceback."""
    assert main(["models", "--address", "127.0.0.1:1"]) == 1
    assert capsys.readouterr().err.startswith("wan-grpc-client models: failed to connect")


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
