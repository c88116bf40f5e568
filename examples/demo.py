"""What `make demo` runs: starts a server with the embedded model, makes demo.mp4 on it through the client, stops it."""

import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from wan_grpc_client import Video, WanGrpcError, generate
from wan_grpc_client.bar import Bar
from wan_grpc_client.display import error_lines, show_event, video_lines

SERVICE = "wan_grpc.v1.VideoGenerationService"
PROMPT = "A large yellow star moves to the right on a blue background"
OUTPUT = Path("demo.mp4")
READY_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 60.0


class ServerFailedError(Exception):
    """The server did not do as it should; its log has more."""


def main() -> int:
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    log = Path(tempfile.mkstemp(prefix="wan-grpc-demo-", suffix=".log")[1])
    try:
        began = time.monotonic()
        video = make_video(log)
    except (ServerFailedError, OSError) as error:
        print(f"demo: {error}; the server's log is {log}", file=sys.stderr)
        return 1
    except WanGrpcError as error:
        print(*error_lines(error), f"the server's log is {log}", sep="\n", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        log.unlink()
        return 130
    print(*video_lines(video), f"{time.monotonic() - began:.1f} s in all", sep="\n")
    print(f"This is how the small embedded model sees: {PROMPT}")
    log.unlink()
    return 0


def make_video(log: Path) -> Video:
    with Bar(sys.stderr) as bar, running_server(log) as address:
        bar.wait(f"waiting for the ranks of the server at {address}")
        wait_until_ready(address)
        with generate(address, PROMPT, output=OUTPUT) as generation:
            for event in generation:
                show_event(bar, event)
            return generation.result()


@contextmanager
def running_server(log: Path) -> Iterator[str]:
    """The address of a server that lives as long as the block. In a session of its own, so that Ctrl-C is ours."""
    command = [sys.executable, "-m", "wan_grpc.cli", "serve", "--port=0", "--metrics-port=0", "--drain-window-s=0"]
    with (
        log.open("wb") as log_file,
        subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=log_file,
            text=True,
            start_new_session=True,
        ) as process,
    ):
        try:
            yield _read_address(process)
        finally:
            _stop(process)
    if process.returncode != 0:
        raise ServerFailedError(f"{shlex.join(command)} ended with code {process.returncode}")


def wait_until_ready(address: str) -> None:
    """Return when a generation would begin at once."""
    with grpc.insecure_channel(address) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        request = health_pb2.HealthCheckRequest(service=SERVICE)
        try:
            for answer in health.Watch(request, timeout=READY_TIMEOUT_S):  # type: ignore[attr-defined]
                if answer.status == health_pb2.HealthCheckResponse.SERVING:
                    return
        except grpc.RpcError as error:
            raise ServerFailedError(f"the server did not become ready: {error.details()}") from error
    raise ServerFailedError("the server did not become ready")


def _read_address(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    words, _, address = process.stdout.readline().strip().rpartition(" ")
    if words != "listening on":
        raise ServerFailedError("the server did not start")
    return address


def _stop(process: subprocess.Popen[str]) -> None:
    process.terminate()
    try:
        process.wait(STOP_TIMEOUT_S)
    except BaseException:  # whoever waits will wait no longer; its ranks notice that it is gone
        process.kill()
        process.wait()
        raise


def _interrupt(number: int, frame: object) -> NoReturn:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
