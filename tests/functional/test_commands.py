"""The command `wan-grpc` as an operator runs it: real processes, real ranks, the embedded model."""

import hashlib
import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from wan_grpc.domain.variants import Task
from wan_grpc.pipeline.tiny import make_tiny_model
from wan_grpc_client import Accepted, Client

SMALL = ["--width=32", "--height=32", "--num-frames=5", "--num-inference-steps=2"]


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the embedded model is put together once for all tests of this file."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def i2v(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny image-to-video model."""
    directory = tmp_path_factory.mktemp("i2v") / "model"
    make_tiny_model(directory, task=Task.IMAGE_TO_VIDEO)
    return directory


def write(directory: Path, *lines: dict[str, object]) -> Path:
    """A file of prompts."""
    path = directory / "prompts.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def command(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "wan_grpc.cli", *map(str, arguments)]


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*arguments), capture_output=True, text=True, timeout=100, check=False)


@contextmanager
def started(*arguments: str | Path) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(command(*arguments), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def family(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """The process and all that it has started, ranks included."""
    top = psutil.Process(process.pid)
    return [top, *top.children(recursive=True)]


def test_generate_writes_the_same_video_twice(cache_dir: Path, tmp_path: Path) -> None:
    """`generate` writes the file it names, with the checksum it prints; one seed gives the same bytes, alone or not."""
    common: list[str | Path] = [
        "generate",
        "--prompt",
        "A red fox, in snow!",
        "--seed=3",
        "--output-path",
        tmp_path,
        "--cache-dir",
        cache_dir,
    ]
    first = run(*common, *SMALL)
    assert first.returncode == 0, first.stderr
    place, digest = first.stdout.splitlines()
    path = tmp_path / "A-red-fox-in-snow-3.mp4"
    data = path.read_bytes()
    assert (place, digest) == (
        f"{path}: 32x32, 5 frames at 8 fps, {len(data)} bytes, seed 3",
        f"sha256 {hashlib.sha256(data).hexdigest()}",
    )
    assert "warning: spec.prompt: this small model was trained on 94 words, and does not know fox, snow" in first.stderr
    second = run(*common, *SMALL, "--seed=2", "--num-outputs=2", "--cpu-threads=1", "--output-file-name=again.mp4")
    assert second.returncode == 0, second.stderr
    lines = [line.partition(": ") for line in second.stdout.splitlines()]
    assert [place for place, _, _ in lines] == [f"{tmp_path}/again-2.mp4", f"{tmp_path}/again-3.mp4"]
    assert lines[1][2] == f"{place.partition(': ')[2]}, {digest}"
    assert (tmp_path / "again-3.mp4").read_bytes() == data != (tmp_path / "again-2.mp4").read_bytes()
    assert len(list(tmp_path.iterdir())) == 3


def test_generate_shows_its_progress(cache_dir: Path, tmp_path: Path) -> None:
    """Where stderr is no terminal, progress is plain lines: stages in order, the last denoising step among them."""
    done = run("generate", "--prompt=x", "--save-output=false", "--cache-dir", cache_dir, *SMALL)
    assert done.returncode == 0, done.stderr
    stages = [match[1] for line in done.stderr.splitlines() if (match := re.match(r"(\w+) \d+/\d+", line))]
    assert list(dict.fromkeys(stages)) == ["text", "denoise", "decode", "encode"]


def test_generate_refuses_what_the_model_cannot_do(cache_dir: Path) -> None:
    """A size that breaks the rules is wrong usage, each violation under its flag."""
    done = run("generate", "--prompt=x", "--width=17", "--num-frames=4", "--cache-dir", cache_dir)
    refused = [line for line in done.stderr.splitlines() if line.startswith("wan-grpc generate: ")]
    assert (done.returncode, refused) == (
        2,
        [
            "wan-grpc generate: --width: 17 is not a positive multiple of 16",
            "wan-grpc generate: --num-frames: 4 is not 1 more than a multiple of 4",
        ],
    )


def test_a_file_of_prompts(i2v: Path, tmp_path: Path, star: Path) -> None:
    """One start of the ranks for all lines; each in its format and file; one that fails leaves the others alone."""
    (tmp_path / "taken").write_text("a file where a directory is needed")
    image, lossless = {"image": "star.png"}, {"format": "mkv_ffv1"}
    path = write(
        tmp_path,
        {"prompt": "a", **image, "seed": 1, "num_frames": 5},
        {"prompt": "b", **image, "seed": 2, "format": "png", "image_fit": "stretch"},
        {"prompt": "c", **image, "seed": 3, "num_frames": 5, "output_file_name": "../taken/c.mp4"},
        {"prompt": "d", **image, "seed": 4, "num_frames": 5, "size": "48x32", "image_fit": "cover", **lossless},
    )
    out = tmp_path / "out"
    flags = ["--size=64x48", "--num-inference-steps=2", f"--output-path={out}"]
    wrong = run("generate", "--model-path", i2v, "--prompts-file", path, *flags, "--num-frames=9", "--crf=9")
    assert (wrong.returncode, wrong.stdout, out.exists()) == (2, "", False)
    assert [line for line in wrong.stderr.splitlines() if line.startswith("wan-grpc")] == [
        f"wan-grpc generate: {path}:2: format: png is one picture, and num_frames is 9",
        f"wan-grpc generate: {path}:2: crf: png has no such option",
        f"wan-grpc generate: {path}:4: crf: mkv_ffv1 has no such option",
    ]
    done = run("generate", "--model-path", i2v, "--prompts-file", path, *flags, "--log-level=info")
    told = done.stderr.splitlines()
    assert (done.returncode, len([line for line in told if '"ranks are ready"' in line])) == (1, 1), done.stderr
    assert [line for line in told if line.startswith("wan-grpc")] == [
        f"wan-grpc generate: {path}:3: {out}/../taken: File exists"
    ]
    videos = [("a-1.mp4", "64x32, 5 frames at 8 fps", 1), ("b-2.png", "64x48, 1 frame", 2)]
    videos += [("d-4.mkv", "48x32, 5 frames at 8 fps", 4)]
    files = {entry.name: entry.read_bytes() for entry in out.iterdir()}
    assert done.stdout.splitlines() == [
        f"{out}/{name}: {facts}, {len(files[name])} bytes, seed {seed}, sha256 {sha256(files[name])}"
        for name, facts, seed in videos
    ]
    assert len(files) == len(videos)


def test_interrupted_generate_keeps_what_is_whole(cache_dir: Path, tmp_path: Path) -> None:
    """Ctrl-C in the middle of denoising ends the command with 130, all its ranks, and the unfinished file alone."""
    quick, slow = {"num_inference_steps": 1}, {"num_inference_steps": 200}
    path = write(tmp_path, {"prompt": "a", **quick}, {"prompt": "b", **slow}, {"prompt": "c", **slow})
    out = tmp_path / "out"
    arguments = [f"--prompts-file={path}", f"--output-path={out}", "--seed=1", "--size=64x64", "--num-frames=5"]
    with started("generate", *arguments, "--cache-dir", cache_dir) as process:
        assert process.stderr is not None
        assert any(line.startswith("2 of 3") for line in process.stderr)
        assert any(line.startswith("denoise 1") for line in process.stderr)
        members = family(process)
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130
    _, alive = psutil.wait_procs(members, timeout=10)
    assert (alive, [entry.name for entry in out.iterdir()]) == ([], ["a-1.mp4"])


def test_wrong_images_are_told_under_their_flags(i2v: Path, tmp_path: Path) -> None:
    """An image that is missing, broken or not wanted is wrong usage, told before the ranks have begun."""
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    flags = [f"--image={tmp_path}/none.png", f"--last-image={tmp_path}/broken.png", "--size=17x32"]
    done = run("generate", "--model-path", i2v, "--prompt=x", *flags)
    told = [line.removeprefix("wan-grpc generate: ") for line in done.stderr.splitlines() if "generate: --" in line]
    assert (done.returncode, sorted(line.split(":")[0] for line in told)) == (2, ["--image", "--last-image", "--size"])
    assert f"--image: {tmp_path}/none.png: No such file or directory" in told


def test_serve_prints_its_address_and_leaves_on_sigterm(cache_dir: Path, tmp_path: Path) -> None:
    """One line on stdout has the port that was chosen; `models` shows what the operator chose; SIGTERM ends it all."""
    negative = tmp_path / "negative.txt"
    negative.write_text("blurred, overexposed\n")
    options: list[str | Path] = [
        "--port=0",
        "--metrics-port=0",
        "--drain-window-s=0",
        "--log-format=json",
        "--cache-dir",
        cache_dir,
        "--max-area",
        "9216",
        "--default-negative-prompt-file",
        negative,
    ]
    with started("serve", *options) as process:
        assert process.stdout is not None and process.stderr is not None
        address = process.stdout.readline()
        events = (json.loads(line) for line in process.stderr if line.startswith("{"))
        assert any(event["event"] == "ranks are ready" for event in events)
        shown = run("models", "--address", address.split()[-1])
        with Client(address.split()[-1]) as client:
            meant = [resolved(client, prompt) for prompt in (None, "", "dark")]
        members = family(process)
        process.send_signal(signal.SIGTERM)
        assert (process.wait(30), process.stdout.read()) == (0, "")
    _, alive = psutil.wait_procs(members, timeout=10)
    assert re.fullmatch(r"listening on 127\.0\.0\.1:\d+\n", address)
    assert (shown.returncode, alive) == (0, [])
    assert {
        "model                wan-tiny-t2v (embedded: knows coloured shapes in motion alone)",
        "size                 96x80           9216 pixels",
        "negative_prompt      blurred, overexposed",
    } <= set(shown.stdout.splitlines())
    assert meant == [("blurred, overexposed", 96, 80), ("", 96, 80), ("dark", 96, 80)]


def resolved(client: Client, negative_prompt: str | None) -> tuple[str, int, int]:
    """The negative prompt and the size of a request that says nothing else, as `accepted` repeats them."""
    with client.generate("x", negative_prompt=negative_prompt) as generation:
        accepted = next(generation)
    assert isinstance(accepted, Accepted)
    return accepted.resolved.negative_prompt, accepted.resolved.width, accepted.resolved.height


def test_an_unusable_default_ends_the_start(cache_dir: Path, tmp_path: Path) -> None:
    """A negative prompt that cannot be read is wrong usage of `serve`, in a sentence with the setting and the file."""
    done = run(
        "serve",
        "--port=0",
        "--metrics-port=-1",
        f"--default-negative-prompt-file={tmp_path}/none",
        "--cache-dir",
        cache_dir,
    )
    sentence = f"--default-negative-prompt-file: {tmp_path}/none: cannot be read: No such file or directory"
    assert (done.returncode, f"wan-grpc serve: {sentence}" in done.stderr.splitlines()) == (2, True)


def test_serve_ends_when_the_model_cannot_run(cache_dir: Path) -> None:
    """A device that is not there ends the server with 1 after a line that says so; a restart would not help."""
    began = time.monotonic()
    done = run(
        "serve", "--port=0", "--metrics-port=-1", "--drain-window-s=0", "--device=cuda", "--cache-dir", cache_dir
    )
    (fatal,) = [event for line in done.stderr.splitlines() if (event := _event(line)).get("level") == "critical"]
    assert (done.returncode, "cuda" in fatal["detail"], time.monotonic() - began < 60) == (1, True, True)


def _event(line: str) -> dict[str, str]:
    return dict(json.loads(line)) if line.startswith("{") else {}
