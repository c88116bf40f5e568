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

SMALL = ["--width=32", "--height=32", "--num-frames=5", "--num-inference-steps=2"]


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the embedded model is made once for all tests of this file."""
    return tmp_path_factory.mktemp("cache")


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
    """`generate` writes the file it names, with the checksum it prints; other thread counts give the same bytes."""
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
    second = run(*common, *SMALL, "--cpu-threads=1", "--output-file-name=again.mp4")
    assert (second.returncode, (tmp_path / "again.mp4").read_bytes() == data) == (0, True), second.stderr
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["A-red-fox-in-snow-3.mp4", "again.mp4"]


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


def test_interrupted_generate_leaves_nothing(cache_dir: Path, tmp_path: Path) -> None:
    """Ctrl-C in the middle of denoising ends the command with 130, all its ranks, and the unfinished file."""
    arguments: list[str | Path] = [
        "--prompt=x",
        "--num-inference-steps=200",
        "--output-path",
        tmp_path,
        "--cache-dir",
        cache_dir,
    ]
    with started("generate", *arguments) as process:
        assert process.stderr is not None
        assert any(line.startswith("denoise 1") for line in process.stderr)
        members = family(process)
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130
    _, alive = psutil.wait_procs(members, timeout=10)
    assert (alive, list(tmp_path.iterdir())) == ([], [])


def test_serve_prints_its_address_and_leaves_on_sigterm(cache_dir: Path) -> None:
    """One line on stdout has the port that was chosen; SIGTERM ends the server with 0 and its ranks with it."""
    options: list[str | Path] = [
        "--port=0",
        "--metrics-port=0",
        "--drain-window-s=0",
        "--log-format=json",
        "--cache-dir",
        cache_dir,
    ]
    with started("serve", *options) as process:
        assert process.stdout is not None and process.stderr is not None
        address = process.stdout.readline()
        events = (json.loads(line) for line in process.stderr if line.startswith("{"))
        assert any(event["event"] == "ranks are ready" for event in events)
        shown = run("models", "--address", address.split()[-1])
        members = family(process)
        process.send_signal(signal.SIGTERM)
        assert (process.wait(30), process.stdout.read()) == (0, "")
    _, alive = psutil.wait_procs(members, timeout=10)
    assert re.fullmatch(r"listening on 127\.0\.0\.1:\d+\n", address)
    assert (shown.returncode, shown.stdout.splitlines()[0], alive) == (
        0,
        "model: embedded (random weights: its videos are noise)",
        [],
    )


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
