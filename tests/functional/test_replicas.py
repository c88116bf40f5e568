"""A server of several groups of ranks behind one queue, and flags for many ranks that contradict each other."""

import contextlib
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.functional.live import (
    OK,
    SERVICE,
    LiveServer,
    command,
    environment,
    eventually,
    long_spec,
    running_server,
    spec,
    stage,
)
from wan_grpc.v1 import generation_pb2 as pb
from wan_grpc.v1 import model_pb2
from wan_grpc.v1 import video_generation_service_pb2 as service_pb2

SERVING = health_pb2.HealthCheckResponse.SERVING
RIGHT = spec()


@pytest.fixture(scope="module")
def replicas(checkpoint_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """A server of two groups of one rank each."""
    flags = ("--model-path", str(checkpoint_dir), "--num-gpus", "2", "--replicas", "2", "--drain-window-s", "0")
    with running_server(tmp_path_factory.mktemp("replicas"), *flags) as server:
        eventually(lambda: deployment(server).detail == "2 of 2 replicas are ready")
        yield server


def deployment(server: LiveServer) -> model_pb2.Deployment:
    return server.stub.GetModel(service_pb2.GetModelRequest()).deployment


def test_two_generations_at_once(live: LiveServer, replicas: LiveServer) -> None:
    """Both are denoised at the same time, and what each caller gets has the bytes that a single rank makes."""
    first, second = (replicas.generate(long_spec(seed=seed)) for seed in (1, 2))
    for stream, step in ((first, 1), (second, 1), (first, 2)):
        stream.until(stage(pb.STAGE_DENOISE, step))
    told = deployment(replicas)
    assert (told.num_running, told.num_queued) == (2, 0)
    states = [replicas.get(stream.name).state for stream in (first, second)]
    assert states == [pb.GENERATION_STATE_RUNNING] * 2
    assert replicas.cancel(first.name).state == pb.GENERATION_STATE_CANCELLED
    assert replicas.get(second.name).state == pb.GENERATION_STATE_RUNNING
    replicas.cancel(second.name)
    expected = live.make(RIGHT).video
    small = [replicas.generate(RIGHT) for _ in range(3)]
    assert [(stream.finish(), stream.video) for stream in small] == [(OK, expected)] * 3


def test_what_is_told_of_replicas(replicas: LiveServer) -> None:
    """GetModel has the layout of one group and their number, memory of every rank, and each rank is up."""
    eventually(lambda: len(deployment(replicas).rank_memory) == 2)
    told = deployment(replicas)
    layout = {field.name: value for field, value in told.topology.ListFields()}
    assert layout == {"world_size": 1, "copies": 1, "cfg": 1, "ring": 1, "ulysses": 1, "text_tensor": 1, "replicas": 2}
    assert [memory.rank for memory in told.rank_memory] == [0, 1]
    assert [replicas.scrape().value("wan_rank_up", rank=rank) for rank in ("0", "1")] == [1, 1]
    ready = [line for line in replicas.log_lines() if line["event"] == "ranks are ready"]
    assert sorted(line["replica"] for line in ready) == [0, 1]


def test_one_replica_dies(live: LiveServer, replicas: LiveServer) -> None:
    """Its caller is told at once; the other generation goes on to its end, and the service is ready all the time."""
    health = health_pb2_grpc.HealthStub(replicas.new_channel()).Watch(health_pb2.HealthCheckRequest(service=SERVICE))
    told: list[int] = []
    watching = threading.Thread(target=keep_statuses, args=(health, told))
    watching.start()
    eventually(lambda: told)
    streams = [replicas.generate(long_spec(num_inference_steps=30, seed=seed)) for seed in (1, 2)]
    for stream in streams:
        stream.until(stage(pb.STAGE_DENOISE, 1))
    replicas.ranks()[1].kill()
    endings = {stream.finish().code: stream for stream in streams}
    assert set(endings) == {grpc.StatusCode.OK, grpc.StatusCode.UNAVAILABLE}
    failure = endings[grpc.StatusCode.UNAVAILABLE].ending
    assert failure is not None and failure.reason == "RANK_DIED"
    assert "rank 1 was killed by SIGKILL" in failure.message or "rank 0 was killed by SIGKILL" in failure.message
    assert replicas.health() == SERVING
    expected = live.make(RIGHT).video
    assert replicas.make(RIGHT).video == expected
    eventually(lambda: deployment(replicas).detail == "2 of 2 replicas are ready")
    assert replicas.scrape().value("wan_rank_restarts_total") == 1
    assert [replicas.scrape().value("wan_rank_up", rank=rank) for rank in ("0", "1")] == [1, 1]
    health.cancel()
    watching.join()
    assert told == [SERVING]


def keep_statuses(health: Any, told: list[int]) -> None:
    """Note what a watch tells, when it tells it, until it is cancelled: what it has kept by then is lost."""
    with contextlib.suppress(grpc.RpcError):
        for answer in health:
            told.append(answer.status)


def test_generate_on_replicas(tmp_path: Path) -> None:
    """Without a server, too, several videos are computed at once, are told in their order, and have the same bytes."""
    facts = [
        made(tmp_path / str(number), *flags) for number, flags in enumerate(((), ("--num-gpus=2", "--replicas=2")))
    ]
    assert len(facts[0]) == 3
    assert facts[0] == facts[1]


def made(directory: Path, *flags: str) -> list[str]:
    """What is printed of three videos, but for the directory."""
    small = ("--width=32", "--height=32", "--num-frames=5", "--num-inference-steps=2", "--seed=1", "--num-outputs=3")
    arguments = command("generate", "--prompt=x", f"--output-path={directory}", *small, *flags)
    done = subprocess.run(arguments, env=environment(), capture_output=True, text=True, timeout=100, check=True)
    return [line.replace(str(directory), "") for line in done.stdout.splitlines()]


def refused(*flags: str) -> tuple[int, list[str]]:
    """Exit code of `serve` with the embedded model and these flags, and what it says is wrong with them."""
    arguments = command("serve", "--port=0", "--metrics-port=-1", *flags)
    done = subprocess.run(arguments, env=environment(), capture_output=True, text=True, timeout=100, check=False)
    return done.returncode, [line for line in done.stderr.splitlines() if line.startswith("wan-grpc serve: ")]


def test_flags_that_contradict_each_other(tmp_path: Path) -> None:
    """The start ends with 2 and a sentence about each problem, with its arithmetic; nothing was started."""
    shape = ("--num-gpus=4", "--enable-cfg-parallel", "--sp-degree=4", "--tp-size=3", f"--cache-dir={tmp_path}")
    code, problems = refused(*shape)
    assert code == 2
    assert problems == [
        "wan-grpc serve: --sp-degree: cfg 2 x sequence 4 = 8 is not 4, the number of ranks in a group; "
        "possible: cfg 2 x ulysses 2, cfg 2 x ring 2 or ulysses 4 (--num-gpus 4)",
        *(
            f"wan-grpc serve: --tp-size: 3 does not divide the {what}; 1, 2 and 4 would (--num-gpus 4)"
            for what in (
                "ranks of a group, 4 = 3 x 1 + 1",
                "heads of the text encoder, 8 = 3 x 2 + 2",
                "d_ff of the text encoder, 256 = 3 x 85 + 1",
            )
        ),
    ]
    assert refused("--num-gpus=3", "--replicas=2", f"--cache-dir={tmp_path}") == (
        2,
        [
            "wan-grpc serve: --replicas: 2 does not divide the ranks, 3 = 2 x 1 + 1; 1 and 3 would "
            "(--num-gpus 3, --replicas 2)"
        ],
    )
