"""What an operator reads, and what a caller never does."""

import subprocess
import sys
from pathlib import Path

import grpc

from tests.functional.live import ROOT, LiveServer, environment, generate_request, refusal, running_server, spec
from wan_grpc.v1 import video_generation_service_pb2 as service_pb2

FAULTY = """
import sys
from wan_grpc.engine.engine import Engine

def get(self, name):
    raise RuntimeError("a secret of the insides")

Engine.get = get
from wan_grpc.cli import main
sys.exit(main(["serve", *sys.argv[1:]]))
"""
"""`wan-grpc serve` with a bug."""


def test_a_request_can_be_followed(live: LiveServer) -> None:
    """The lines of one generation carry its name, the first of them also the request id of its call."""
    call = live.stub.Generate(generate_request(spec()), metadata=(("x-request-id", "follow-me"),))
    name = dict(call.initial_metadata())["wan-generation"]
    assert list(call)
    lines = [line for line in live.log_lines() if line.get("generation") == name]
    assert [line["event"] for line in lines] == ["generation admitted", "generation started", "generation succeeded"]
    assert lines[0]["request_id"] == "follow-me"


def test_lines_are_json(live: LiveServer) -> None:
    """Every line is an object with a time, a level and an event; those of ranks say which rank."""
    live.make(spec())
    lines = live.log_lines()
    assert len(lines) == len(live.log().splitlines())
    assert all({"timestamp", "level", "event"} <= line.keys() for line in lines)
    assert [line["rank"] for line in lines if line["event"] == "rank is up"] == [0]


def test_a_bug_stays_inside(checkpoint_dir: Path, tmp_path: Path) -> None:
    """A caller who meets a bug hears INTERNAL and the id to look for; the trace is in the log under that id alone."""
    flags = ("--model-path", str(checkpoint_dir), "--drain-window-s", "0")
    with running_server(tmp_path, *flags, program=[sys.executable, "-c", FAULTY]) as server:
        request = service_pb2.GetGenerationRequest(name="generations/x")
        calls = [
            lambda: server.stub.GetGeneration(request, metadata=(("x-request-id", "bug-1"),)),
            lambda: server.stub.WatchGeneration(
                service_pb2.WatchGenerationRequest(name="generations/x"), metadata=(("x-request-id", "bug-2"),)
            ),
        ]
        for call, request_id in zip(calls, ("bug-1", "bug-2"), strict=True):
            how = refusal(call)
            assert (how.code, how.reason) == (grpc.StatusCode.INTERNAL, "INTERNAL")
            assert how.message == f"internal error; the server's log has it under request id {request_id}"
            assert how.metadata["request_id"] == request_id
            (line,) = (line for line in server.log_lines() if line.get("request_id") == request_id)
            assert "RuntimeError: a secret of the insides" in line["exception"]
        assert server.make(spec()).completed.size_bytes  # one call met it; the server goes on


def test_app_imports_no_torch() -> None:
    """The composition root is imported without torch, diffusers and transformers, which only ranks need."""
    script = "import sys, wan_grpc.app; print({'torch', 'diffusers', 'transformers'} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, env=environment(), check=True
    )
    assert done.stdout == "set()\n", done.stderr
