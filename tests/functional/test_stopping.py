"""SIGTERM: what a server that is told to stop still does, what it refuses, and what it leaves."""

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2

from tests.functional.live import OK, LiveServer, eventually, kind, long_spec, refusal, running_server, spec, stage
from wan_grpc.v1 import generation_pb2 as pb
from wan_grpc.v1 import video_generation_service_pb2 as service_pb2

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
QUICK_S = 3.0
"""How long an idle server may take to leave, beside its drain window."""
STOP_GRACE_S = 5.0
"""How long a stopping server waits for a reader whose bytes it may no longer wait for."""
LARGE = spec(width=640, height=512, num_frames=17, num_inference_steps=1, output_format=pb.OUTPUT_FORMAT_RAW_RGB24)
"""A video that does not fit into the windows of a connection."""

Start = Callable[..., AbstractContextManager[LiveServer]]


@pytest.fixture
def start(checkpoint_dir: Path, tmp_path: Path) -> Start:
    def start(*flags: str) -> AbstractContextManager[LiveServer]:
        return running_server(tmp_path, "--model-path", str(checkpoint_dir), "--cpu-threads", "1", *flags)

    return start


def told(changes: Iterator[int], wanted: int) -> float:
    """Wait for this health; when it came."""
    assert wanted in changes
    return time.monotonic()


def test_idle(start: Start) -> None:
    """An idle server leaves within moments, with 0, and ends the health watches that it has."""
    with start("--drain-window-s", "0") as server:
        changes = server.watch_health()
        assert next(changes) == SERVING
        began = time.monotonic()
        server.signal(signal.SIGTERM)
        assert (next(changes), server.wait()) == (NOT_SERVING, 0)
        assert time.monotonic() - began < QUICK_S
        assert refusal(lambda: next(changes)).code == grpc.StatusCode.UNAVAILABLE
        assert list(server.spool_dir.iterdir()) == []


def test_busy(start: Start) -> None:
    """What was accepted completes, in the drain window too; later requests are refused, and the exit code is 0."""
    with start("--drain-window-s", "1.5") as server:
        changes = server.watch_health()
        running, waiting = server.generate(long_spec()), server.generate(spec())
        running.until(stage(pb.STAGE_DENOISE, step=1))
        assert next(changes) == SERVING
        began = time.monotonic()
        server.signal(signal.SIGTERM)
        assert told(changes, NOT_SERVING) - began < 1.0
        in_window = server.generate(spec(seed=8))
        assert server.health("") == SERVING
        assert server.get(in_window.name).state == pb.GENERATION_STATE_QUEUED
        eventually(lambda: deployment(server).detail == "the server is shutting down")
        late = refusal(lambda: server.stub.Generate(service_pb2.GenerateRequest(spec=spec())))
        assert (late.code, late.reason) == (grpc.StatusCode.UNAVAILABLE, "SHUTTING_DOWN")
        assert late.retry_after_s is not None
        assert server.get(running.name).state == pb.GENERATION_STATE_RUNNING
        assert [stream.finish() for stream in (running, waiting, in_window)] == [OK, OK, OK]
        for stream in (running, waiting, in_window):
            assert stream.completed.size_bytes == len(stream.video)
        assert server.wait() == 0, server.log()
        assert list(server.spool_dir.iterdir()) == []


def deployment(server: LiveServer) -> object:
    return server.stub.GetModel(service_pb2.GetModelRequest()).deployment


def test_second_signal(start: Start) -> None:
    """A second signal ends the drain: what runs or waits is cancelled, who does not read is left, the code is 0."""
    with start("--drain-window-s", "60") as server:
        unread = server.generate(LARGE)
        unread.until(kind("chunk"))
        server.ended(unread.name)
        streams = [server.generate(long_spec(num_inference_steps=200)), server.generate(spec())]
        streams[0].until(stage(pb.STAGE_DENOISE, step=1))
        server.signal(signal.SIGTERM)
        eventually(lambda: server.health() == NOT_SERVING)
        began = time.monotonic()
        server.signal(signal.SIGINT)
        for stream in streams:
            left = stream.finish()
            assert (left.code, left.reason) == (grpc.StatusCode.UNAVAILABLE, "SHUTTING_DOWN")
            assert left.metadata["generation_state"] == "CANCELLED"
        assert time.monotonic() - began < QUICK_S
        assert (server.wait(), time.monotonic() - began < STOP_GRACE_S + QUICK_S) == (0, True), server.log()
        assert list(server.spool_dir.iterdir()) == []
        assert unread.finish().code == grpc.StatusCode.UNAVAILABLE
