"""Processes that are killed and checkpoints that break: what callers hear, what comes back, and what ends."""

import contextlib
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import psutil
import pytest
from grpc_health.v1 import health_pb2

from tests import pictures
from tests.functional.live import (
    MAX_IMAGE_BYTES,
    MIB,
    OK,
    LiveServer,
    eventually,
    generate_request,
    long_spec,
    running_server,
    shared_memory,
    spec,
    stage,
    start_server,
)
from wan_grpc.domain.variants import Task
from wan_grpc.pipeline.tiny import make_tiny_model
from wan_grpc.v1 import generation_pb2 as pb
from wan_grpc.v1.video_generation_service_pb2_grpc import VideoGenerationServiceStub

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
HEARD_S = 5.0
"""How long a caller may wait to hear that a rank has died."""
RIGHT = spec()


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the servers of this file keep their spool, one after the other."""
    return tmp_path_factory.mktemp("deaths")


@pytest.fixture(scope="module")
def pair(checkpoint_dir: Path, root: Path) -> Iterator[LiveServer]:
    """A server of two ranks."""
    flags = ("--model-path", str(checkpoint_dir), "--num-gpus", "2", "--drain-window-s", "0")
    with running_server(root, *flags) as server:
        yield server


@pytest.mark.parametrize("rank", [0, 1])
def test_rank_killed_while_denoising(live: LiveServer, pair: LiveServer, rank: int) -> None:
    """A rank that is killed ends its generation, not those that wait; the ranks come back and compute what is right."""
    expected = live.make(RIGHT).video
    before = pair.scrape()
    changes = pair.watch_health()
    assert next(changes) == SERVING
    running, waiting = pair.generate(long_spec()), pair.generate(RIGHT)
    running.until(stage(pb.STAGE_DENOISE, step=2))
    pids = pair.rank_pids()
    began = time.monotonic()
    psutil.Process(pids[rank]).kill()
    left = running.finish()
    assert time.monotonic() - began < HEARD_S
    assert (left.code, left.reason) == (grpc.StatusCode.UNAVAILABLE, "RANK_DIED")
    assert left.retry_after_s is not None and left.metadata["generation_state"] == "FAILED"
    assert f"rank {rank} was killed by SIGKILL" in left.message
    assert pair.get(running.name).state == pb.GENERATION_STATE_FAILED
    assert (next(changes), pair.health("")) == (NOT_SERVING, SERVING)
    assert next(changes) == SERVING
    assert (waiting.finish(), waiting.video) == (OK, expected)
    assert not set(pids) & set(pair.rank_pids())
    after = pair.scrape()
    restarts = [scrape.value("wan_rank_restarts_total", cause="rank_died") for scrape in (before, after)]
    assert (restarts[1] - restarts[0], after.value("wan_rank_up")) == (1, 2)
    assert [line for line in pair.log().splitlines() if not line.startswith("{")] == []


def test_rank_killed_while_it_reads_an_image(tmp_path: Path) -> None:
    """The image stage dies like any other; a video from an image that waits keeps its picture and is what it was."""
    make_tiny_model(tmp_path / "model", task=Task.IMAGE_TO_VIDEO)
    image = pictures.saved(pictures.two_colours(80, 40), "PNG")
    quick = spec(width=64, height=64, image=image, num_inference_steps=1)
    slow = spec(width=128, height=96, num_frames=81, num_inference_steps=10, image=image)
    with running_server(tmp_path, "--model-path", str(tmp_path / "model"), "--drain-window-s", "0") as server:
        expected = server.make(quick).video
        running = server.generate(slow)
        running.until(stage(pb.STAGE_IMAGE))
        waiting = server.generate(quick)
        waiting.until(lambda event: event.HasField("queued"))
        psutil.Process(server.rank_pids()[0]).kill()
        left = running.finish()
        assert (left.code, left.reason) == (grpc.StatusCode.UNAVAILABLE, "RANK_DIED")
        assert (waiting.finish(), waiting.video) == (OK, expected)


def test_callers_who_hang_up_while_they_send(live_i2v: LiveServer) -> None:
    """A connection that ends within a large request leaves no generation and no bug; the next call is served."""
    before = live_i2v.names()
    request = generate_request(spec(image=bytes(8 * MAX_IMAGE_BYTES)))
    for number in range(20):
        with grpc.insecure_channel(live_i2v.address, [("grpc.use_local_subchannel_pool", 1)]) as channel:
            call = VideoGenerationServiceStub(channel).Generate(request)
            time.sleep(number / 4000)  # from before the connection stands to after the request has arrived
            call.cancel()
    assert (live_i2v.names(), live_i2v.health()) == (before, SERVING)
    assert "a call met a bug" not in live_i2v.log()
    assert live_i2v.make(spec(image=pictures.jpeg(), num_inference_steps=1)).completed.size_bytes > 0


def test_rank_out_of_memory(live: LiveServer, pair: LiveServer) -> None:
    """When the memory of one rank does not suffice, that generation fails and says so; all ranks live and go on."""
    expected = live.make(RIGHT).video
    assert pair.make(RIGHT).video == expected
    pids, short = pair.rank_pids(), pair.ranks()[1]
    unlimited = short.rlimit(psutil.RLIMIT_AS)
    short.rlimit(psutil.RLIMIT_AS, (short.memory_info().vms + 32 * MIB, unlimited[1]))
    left = pair.generate(spec(width=640, height=512, num_frames=9, num_inference_steps=1)).finish()
    short.rlimit(psutil.RLIMIT_AS, unlimited)
    assert (left.code, left.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "OUT_OF_MEMORY")
    assert (left.retry_after_s, left.metadata["generation_state"]) == (None, "FAILED")
    assert (pair.make(RIGHT).video, pair.rank_pids()) == (expected, pids)


def test_idle_rank_killed(live: LiveServer, pair: LiveServer) -> None:
    """A rank that is killed while nothing runs is replaced, and nobody but a watcher of health notices."""
    changes = pair.watch_health()
    assert next(changes) == SERVING
    psutil.Process(pair.rank_pids()[1]).kill()
    assert (next(changes), next(changes)) == (NOT_SERVING, SERVING)
    assert pair.make(RIGHT).video == live.make(RIGHT).video


def test_server_killed(live: LiveServer, pair: LiveServer, checkpoint_dir: Path, root: Path) -> None:
    """A server that is killed while two ranks compute takes every process with it; the next one removes its files."""
    known = shared_memory()
    stream = pair.generate(long_spec(num_inference_steps=200))
    stream.until(stage(pb.STAGE_DENOISE, step=2))
    assert len(pair.family()) >= 4  # itself, the forkserver, two ranks
    pair.kill()
    pair.assert_family_gone()
    assert stream.finish().code == grpc.StatusCode.UNAVAILABLE
    eventually(lambda: shared_memory() <= known)
    (left,) = pair.spool_dir.iterdir()
    flags = ("--model-path", str(checkpoint_dir), "--drain-window-s", "0", "--cpu-threads", "1")
    with running_server(root, *flags, spool_dir=pair.spool_dir) as following:
        assert not left.exists()
        assert following.make(RIGHT).video == live.make(RIGHT).video


# ---- ranks that cannot start ----------------------------------------------------------------------------------------


def last_words(server: LiveServer) -> str:
    """Why the server gave up, as it tells the operator."""
    (line,) = (line for line in server.log_lines() if line["level"] == "critical")
    return str(line["detail"])


def test_ranks_that_die_at_every_start(checkpoint_dir: Path, tmp_path: Path) -> None:
    """When three groups in a row die before they are ready, the process ends with 1, a sentence and nothing left."""
    flags = ("--model-path", str(checkpoint_dir), "--num-gpus", "2", "--drain-window-s", "0")
    server = start_server(tmp_path, *flags, spool_dir=tmp_path / "spool")
    try:
        waiting = server.generate(spec(detach_unlimited=True))
        waiting.until(lambda event: event.HasField("queued"))
        killed: set[int] = set()
        while server.process.poll() is None:
            with contextlib.suppress(psutil.NoSuchProcess):  # whoever has ended since it was listed
                for rank in server.ranks():
                    if rank.pid not in killed:
                        rank.kill()
                        killed.add(rank.pid)
            time.sleep(0.01)
        assert server.process.returncode == 1
        assert re.fullmatch(
            r"3 starts of the ranks failed within 600 s; the last: rank \d was killed by SIGKILL.*", last_words(server)
        )
        assert waiting.finish().code == grpc.StatusCode.UNAVAILABLE
        server.assert_family_gone()
        assert list(server.spool_dir.iterdir()) == []
    finally:
        server.close()


def test_checkpoint_damaged_while_serving(checkpoint_dir: Path, tmp_path: Path) -> None:
    """When ranks that died cannot load the model again, the process ends with 1 and names the file."""
    copy = shutil.copytree(checkpoint_dir, tmp_path / "model")
    with running_server(tmp_path, "--model-path", str(copy), "--drain-window-s", "0") as server:
        changes = server.watch_health()
        assert next(changes) == SERVING
        weights = copy / "transformer_2" / "diffusion_pytorch_model.safetensors"
        weights.unlink()  # first, for the ranks that live may have it mapped
        weights.write_bytes(b"\xff" * 100)
        for rank in server.ranks():
            rank.kill()
        assert server.wait() == 1
        assert "transformer_2/diffusion_pytorch_model.safetensors" in last_words(server)
        assert list(server.spool_dir.iterdir()) == []
