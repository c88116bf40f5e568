"""What `make demo` runs, as somebody sees it who has just cloned the repository."""

import hashlib
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import av
import psutil
import pytest

from tests.functional.live import ROOT, environment

DEMO = ROOT / "examples" / "demo.py"


@pytest.fixture
def scratch(tmp_path: Path) -> Path:
    """Where the demo and its server put what is temporary."""
    directory = tmp_path / "scratch"
    directory.mkdir()
    return directory


@pytest.fixture
def current(tmp_path: Path) -> Path:
    """The directory that the demo is run in."""
    directory = tmp_path / "current"
    directory.mkdir()
    return directory


@contextmanager
def demo(current: Path, scratch: Path, **variables: str) -> Iterator[subprocess.Popen[str]]:
    """The demo at work. Ends with everything that it started, each process by its id."""
    with subprocess.Popen(
        [sys.executable, str(DEMO)],
        cwd=current,
        env={**environment(), "TMPDIR": str(scratch), **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            for started in descendants(process):
                started.kill()
            process.kill()


def descendants(process: "subprocess.Popen[str]") -> list[psutil.Process]:
    try:
        return psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def still_alive(processes: list[psutil.Process]) -> list[psutil.Process]:
    _, alive = psutil.wait_procs(processes, timeout=10)
    return alive


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_demo_makes_a_video_and_says_so(current: Path, scratch: Path) -> None:
    """One command: progress, a demo.mp4 that a player opens, its facts, what was asked for, and no traces."""
    with demo(current, scratch) as process:
        out, err = process.communicate(timeout=110)
        assert (process.returncode, re.findall("^denoise .*$", err, re.MULTILINE) != []) == (0, True), err
    data = (current / "demo.mp4").read_bytes()
    facts, checksum, seconds, asked = out.splitlines()
    with av.open(str(current / "demo.mp4")) as video:
        frames = [frame.to_ndarray(format="rgb24").shape for frame in video.decode(video=0)]
        fps = video.streams.video[0].average_rate
    height, width, _ = frames[0]
    assert re.sub(r"\d+$", "N", facts) == (
        f"demo.mp4: {width}x{height}, {len(frames)} frames at {fps} fps, {len(data)} bytes, seed N"
    )
    assert checksum == f"sha256 {hashlib.sha256(data).hexdigest()}"
    assert re.fullmatch(r"\d+\.\d s in all", seconds)
    assert (
        asked
        == "This is how the small embedded model sees: A large yellow star moves to the right on a blue background"
    )
    assert (names(current), names(scratch)) == (["demo.mp4"], [])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP], ids=["Ctrl-C", "closed terminal"])
def test_interrupted_demo_leaves_nothing(current: Path, scratch: Path, number: int) -> None:
    """Ended while the video is made: no server, no rank, no file, no log stays."""
    with demo(current, scratch) as process:
        assert process.stderr is not None
        assert any(line.startswith(("text", "denoise")) for line in process.stderr)
        started = descendants(process)
        process.send_signal(number)
        assert process.wait(30) == 130
        assert (len(started) >= 2, still_alive(started)) == (True, [])
    assert (names(current), names(scratch)) == ([], [])


def test_failed_demo_names_the_log(current: Path, scratch: Path) -> None:
    """A server that cannot start: the exit code tells, and the log that is named says why."""
    with demo(current, scratch, WAN_GRPC_MODEL_PATH="/no/such/model") as process:
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out, names(current)) == (1, "", [])
    log = re.search(r"^demo: the server did not start; the server's log is (\S+)$", err, re.MULTILINE)
    assert log is not None, err
    assert "/no/such/model" in Path(log[1]).read_text(encoding="utf-8")
