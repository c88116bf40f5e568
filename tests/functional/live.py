"""A real server in a process of its own: how tests start it, speak to it, look into it, and see that nothing stays."""

import contextlib
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import google_crc32c
import grpc
import psutil
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status

from wan_grpc.v1 import generation_pb2 as pb
from wan_grpc.v1 import video_generation_service_pb2 as service_pb2
from wan_grpc.v1.video_generation_service_pb2_grpc import VideoGenerationServiceStub

ROOT = Path(__file__).parents[2]
SERVICE = "wan_grpc.v1.VideoGenerationService"
MIB = 1024 * 1024
ENDED_STATES = (pb.GENERATION_STATE_SUCCEEDED, pb.GENERATION_STATE_FAILED, pb.GENERATION_STATE_CANCELLED)
GONE_S = 5.0
"""The longest that anything of a server may outlive it."""
_NEW_FILES_S = 10.0
MAX_AREA, MAX_IMAGE_BYTES, MAX_IMAGE_PIXELS = 128 * 96, 100_000, 20_000
NARROW = (
    *("--cpu-threads", "1", "--drain-window-s", "0", "--max-area", str(MAX_AREA)),
    *("--max-num-frames", "25", "--max-inference-steps", "10"),
    *("--max-image-bytes", str(MAX_IMAGE_BYTES), "--max-image-pixels", str(MAX_IMAGE_PIXELS)),
)
"""Flags of a server that accepts nothing that takes long."""
PATIENT = ("--watchdog-grace-s", "3600", "--first-step-timeout-s", "3600")
"""Flags of a server whose ranks a test may stop for as long as it likes."""
T = TypeVar("T")


def environment() -> dict[str, str]:
    """Where the project is, for processes that are started from it."""
    found = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    paths = [str(ROOT), str(ROOT / "clients" / "python"), *filter(None, found)]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


def command(*arguments: str) -> list[str]:
    """`wan-grpc` with these arguments."""
    return [sys.executable, "-m", "wan_grpc.cli", *arguments]


def eventually(condition: Callable[[], T], *, within_s: float = 30.0) -> T:
    """What `condition` gives as soon as that is true."""
    deadline = time.monotonic() + within_s
    while not (found := condition()):
        assert time.monotonic() < deadline, f"not so within {within_s:g} s: {condition}"
        time.sleep(0.01)
    return found


# ---- requests -------------------------------------------------------------------------------------------------------


def spec(**changes: Any) -> pb.GenerationSpec:
    """A video that is made in a moment."""
    small = {
        "prompt": "A cat walks on the grass",
        "width": 64,
        "height": 48,
        "num_frames": 5,
        "num_inference_steps": 4,
        "seed": 7,
    }
    return pb.GenerationSpec(**{**small, **changes})


def long_spec(**changes: Any) -> pb.GenerationSpec:
    """A video whose denoising lasts for seconds, in many short steps."""
    return spec(**{"width": 192, "height": 192, "num_frames": 17, "num_inference_steps": 100, **changes})


def generate_request(made: pb.GenerationSpec, request_id: str = "") -> service_pb2.GenerateRequest:
    return service_pb2.GenerateRequest(spec=made, request_id=request_id)


# ---- streams --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Ending:
    """How a call ended, with all that its status carries."""

    code: grpc.StatusCode
    reason: str = ""
    message: str = ""
    retry_after_s: float | None = None
    metadata: dict[str, str] = field(default_factory=dict)
    fields: tuple[str, ...] = ()
    rules: tuple[str, ...] = ()
    """The reason beside each of the fields."""


OK = Ending(code=grpc.StatusCode.OK)


def ending(error: grpc.RpcError) -> Ending:
    status = rpc_status.from_call(error)
    if status is None:
        return Ending(code=error.code(), message=error.details())
    info, retry, wrong = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo(), error_details_pb2.BadRequest()
    kinds = [detail.type_url.rpartition(".")[2] for detail in status.details if detail.Unpack(info)]
    has_retry = any(detail.Unpack(retry) for detail in status.details)
    for detail in status.details:
        detail.Unpack(wrong)
    assert kinds == ["ErrorInfo"], status
    return Ending(
        code=error.code(),
        reason=info.reason,
        message=error.details(),
        retry_after_s=retry.retry_delay.ToTimedelta().total_seconds() if has_retry else None,
        metadata=dict(info.metadata),
        fields=tuple(violation.field for violation in wrong.field_violations),
        rules=tuple(violation.reason for violation in wrong.field_violations),
    )


def refusal(call: Callable[[], object]) -> Ending:
    """How `call` was refused."""
    try:
        result = call()
        for message in result if isinstance(result, Iterator) else ():
            raise AssertionError(f"answered: {message}")
    except grpc.RpcError as error:
        return ending(error)
    raise AssertionError(f"answered: {result}")


class Stream:
    """The events of one Generate or WatchGeneration call, read when the test says so; every chunk is checked."""

    def __init__(self, call: Any, *, from_offset: int = 0) -> None:
        self._call = call
        self._from_offset = from_offset
        self.events: list[pb.GenerationEvent] = []
        self.video = bytearray()
        self.ending: Ending | None = None

    @property
    def name(self) -> str:
        """Of the generation; waits for the initial metadata."""
        return str(dict(self._call.initial_metadata())["wan-generation"])

    @property
    def last_sequence(self) -> int:
        return self.events[-1].sequence if self.events else 0

    @property
    def completed(self) -> pb.Completed:
        assert self.ending == OK, self.ending
        return self.events[-1].completed

    def kinds(self) -> list[str]:
        """The kinds of all events so far, runs of the same kind once."""
        return [kind for kind, _ in itertools.groupby(event.WhichOneof("event") for event in self.events)]

    def stages(self) -> list[pb.Stage]:
        """The stages of all progress so far, each once, in order."""
        told = [event.progress.stage for event in self.events if event.HasField("progress")]
        return [stage for stage, _ in itertools.groupby(told)]

    def take(self) -> pb.GenerationEvent | None:
        """Wait for the next event; None at the end of the stream."""
        try:
            event = next(self._call).event
        except StopIteration:
            self.ending = OK
            return None
        except grpc.RpcError as error:
            self.ending = ending(error)
            return None
        if event.HasField("chunk"):
            self._keep(event.chunk)
        self.events.append(event)
        return event  # type: ignore[no-any-return]

    def until(self, wanted: Callable[[pb.GenerationEvent], bool]) -> pb.GenerationEvent:
        """Read up to the first event that is wanted."""
        while (event := self.take()) is not None:
            if wanted(event):
                return event
        raise AssertionError(f"the stream ended before that: {self.ending}")

    def finish(self) -> Ending:
        """Read everything that is left; how the stream ended."""
        while self.take() is not None:
            pass
        assert self.ending is not None
        return self.ending

    def drop(self) -> None:
        """Hang up without a word."""
        self._call.cancel()

    def _keep(self, chunk: pb.Chunk) -> None:
        assert chunk.offset == self._from_offset + len(self.video)
        assert 0 < len(chunk.data) <= MIB
        assert chunk.crc32c == google_crc32c.value(chunk.data)
        self.video += chunk.data


def kind(name: str) -> Callable[[pb.GenerationEvent], bool]:
    return lambda event: event.WhichOneof("event") == name


def stage(wanted: pb.Stage, step: int = 0) -> Callable[[pb.GenerationEvent], bool]:
    """Progress of a stage that has come at least to `step`."""
    return lambda event: event.HasField("progress") and event.progress.stage == wanted and event.progress.step >= step


# ---- the server -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Scrape:
    """The metrics at one moment."""

    text: str

    def value(self, name: str, **labels: str) -> float:
        """The sum over all series of this name that carry these labels."""
        values = []
        for series, raw, value in re.findall(rf"^{name}(\{{(.*)\}})? (\S+)$", self.text, re.MULTILINE):
            found = dict(re.findall(r'(\w+)="([^"]*)"', raw)) if series else {}
            if labels.items() <= found.items():
                values.append(float(value))
        return sum(values)


class LiveServer:
    """`wan-grpc serve` in a process of its own."""

    def __init__(self, process: "subprocess.Popen[str]", log_path: Path, spool_dir: Path) -> None:
        self.process = process
        self.log_path = log_path
        self.spool_dir = spool_dir
        self._opened = contextlib.ExitStack()
        self._channel: grpc.Channel | None = None
        self._ps = psutil.Process(process.pid)
        self._family: set[psutil.Process] = set()
        line = process.stdout.readline() if process.stdout else ""
        assert line.startswith("listening on 127.0.0.1:"), f"{line}{self.log()}"
        self.address = line.split()[-1]

    @property
    def channel(self) -> grpc.Channel:
        if self._channel is None:
            self._channel = self.new_channel()
        return self._channel

    def new_channel(self) -> grpc.Channel:
        """A connection of its own."""
        options = [("grpc.use_local_subchannel_pool", 1)]
        return self._opened.enter_context(grpc.insecure_channel(self.address, options))

    @property
    def stub(self) -> VideoGenerationServiceStub:
        return VideoGenerationServiceStub(self.channel)

    # ---- calls ------------------------------------------------------------------------------------------------------

    def generate(
        self, made: pb.GenerationSpec, *, request_id: str = "", timeout_s: float | None = None, channel: Any = None
    ) -> Stream:
        stub = VideoGenerationServiceStub(channel or self.channel)
        return Stream(stub.Generate(generate_request(made, request_id), timeout=timeout_s))

    def watch(self, name: str, *, after: int = 0, from_offset: int = 0, timeout_s: float | None = None) -> Stream:
        request = service_pb2.WatchGenerationRequest(name=name, after_sequence=after, from_offset=from_offset)
        return Stream(self.stub.WatchGeneration(request, timeout=timeout_s), from_offset=from_offset)

    def create(self, made: pb.GenerationSpec, *, request_id: str = "") -> pb.Generation:
        request = service_pb2.CreateGenerationRequest(spec=made, request_id=request_id)
        return self.stub.CreateGeneration(request).generation

    def get(self, name: str) -> pb.Generation:
        return self.stub.GetGeneration(service_pb2.GetGenerationRequest(name=name)).generation

    def cancel(self, name: str) -> pb.Generation:
        return self.stub.CancelGeneration(service_pb2.CancelGenerationRequest(name=name)).generation

    def ended(self, name: str) -> pb.Generation:
        """The generation as soon as it is final."""
        return eventually(lambda: found if (found := self.get(name)).state in ENDED_STATES else None)

    def make(self, made: pb.GenerationSpec) -> Stream:
        """The whole stream of a generation that succeeds."""
        stream = self.generate(made)
        assert stream.finish() == OK
        return stream

    def names(self) -> list[str]:
        """Every generation that the server knows, newest first."""
        names: list[str] = []
        token = ""
        while True:
            request = service_pb2.ListGenerationsRequest(page_token=token, page_size=100)
            page = self.stub.ListGenerations(request)
            names += [generation.name for generation in page.generations]
            token = page.next_page_token
            if not token:
                return names

    def health(self, service: str = SERVICE) -> int:
        request = health_pb2.HealthCheckRequest(service=service)
        return int(health_pb2_grpc.HealthStub(self.channel).Check(request).status)

    def watch_health(self, service: str = SERVICE) -> Iterator[int]:
        """Every change of health, on a connection of its own."""
        stub = health_pb2_grpc.HealthStub(self.new_channel())
        watch = stub.Watch(health_pb2.HealthCheckRequest(service=service))
        return (int(answer.status) for answer in watch)

    def until_ready(self) -> None:
        for status in self.watch_health():
            if status == health_pb2.HealthCheckResponse.SERVING:
                return

    # ---- looks inside -----------------------------------------------------------------------------------------------

    def ranks(self) -> list[psutil.Process]:
        """The rank processes, from rank 0 on: the children of the forkserver."""
        found = []
        for child in self._ps.children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):  # gone since it was listed
                if child.ppid() != self.process.pid:
                    found.append(child)
        return sorted(found, key=lambda process: process.create_time())

    def rank_pids(self) -> list[int]:
        return [process.pid for process in self.ranks()]

    def rank_bytes(self) -> int:
        """Resident memory of all ranks."""
        return sum(process.memory_info().rss for process in self.ranks())

    def rss_bytes(self) -> int:
        """Resident memory of the server process."""
        return int(self._ps.memory_info().rss)

    def log(self) -> str:
        return self.log_path.read_text(encoding="utf-8")

    def log_lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.log().splitlines() if line.startswith("{")]

    def scrape(self) -> Scrape:
        port = next(line["metrics_port"] for line in self.log_lines() if line["event"] == "listening")
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
            return Scrape(text=answer.read().decode())

    # ---- the end ----------------------------------------------------------------------------------------------------

    def family(self) -> list[psutil.Process]:
        """The server and every process that it has started and that this object has seen."""
        with contextlib.suppress(psutil.NoSuchProcess):
            self._family |= {self._ps, *self._ps.children(recursive=True)}
        return list(self._family)

    def signal(self, number: int) -> None:
        self.family()
        self.process.send_signal(number)

    def wait(self, timeout_s: float = 30.0) -> int:
        """The exit code, once the server has ended."""
        return self.process.wait(timeout_s)

    def kill(self) -> None:
        self.signal(signal.SIGKILL)
        self.process.wait()

    def assert_family_gone(self) -> None:
        eventually(lambda: not [process for process in self.family() if _is_alive(process)], within_s=GONE_S)

    def close(self) -> None:
        """End whatever still runs, each process by its id."""
        self._opened.close()
        for process in self.family():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait()
        if self.process.stdout:
            self.process.stdout.close()


def _is_alive(process: psutil.Process) -> bool:
    """Whether it can still do anything: one that has ended stays in the list until its parent has looked."""
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def shared_memory() -> set[str]:
    return {entry.name for entry in Path("/dev/shm").iterdir()}


@contextlib.contextmanager
def running_server(
    directory: Path, *flags: str, spool_dir: Path | None = None, program: Sequence[str] | None = None
) -> Iterator[LiveServer]:
    """A server that is ready. When the block ends it must leave well, unless it has ended before, and leave nothing."""
    spool_dir = spool_dir or directory / "spool"
    known = shared_memory()
    server = start_server(directory, *flags, spool_dir=spool_dir, program=program)
    try:
        server.until_ready()
        yield server
        if server.process.poll() is None:
            server.signal(signal.SIGTERM)
            assert server.wait() == 0, server.log()
            assert list(spool_dir.iterdir()) == []
        server.assert_family_gone()
        eventually(lambda: shared_memory() <= known, within_s=_NEW_FILES_S)
    finally:
        server.close()


def start_server(directory: Path, *flags: str, spool_dir: Path, program: Sequence[str] | None = None) -> LiveServer:
    """A server that listens; its ranks are starting. `program` stands for `wan-grpc serve`."""
    directory.mkdir(parents=True, exist_ok=True)
    log_path = directory / f"server-{time.monotonic_ns()}.log"
    own = ["--port", "0", "--metrics-port", "0", "--log-format", "json", "--spool-dir", str(spool_dir)]
    with log_path.open("w") as log:
        process = subprocess.Popen(
            [*(program or command("serve")), *own, *flags],
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            cwd=ROOT,
            env=environment(),
        )
    try:
        return LiveServer(process, log_path, spool_dir)
    except BaseException:
        process.kill()
        process.wait()
        raise
