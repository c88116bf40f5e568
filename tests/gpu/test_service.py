"""The service on a GPU with the real A14B shapes and random weights: what only a busy device can show."""

import signal
import time
from collections.abc import Iterator

import pytest
import torch

from tests.functional.live import LiveServer, running_server, spec, stage
from wan_grpc.v1 import generation_pb2 as pb

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(240)]

MODEL = "Wan-AI/Wan2.2-T2V-A14B-Diffusers"
GIB = 2**30


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """A server of the published shapes. Loading it takes a quarter of a minute."""
    flags = ("--model-path", MODEL, "--load-format", "dummy", "--device", "cuda", "--drain-window-s", "0")
    with running_server(tmp_path_factory.mktemp("live"), *flags) as server:
        yield server


def small(**changes: object) -> pb.GenerationSpec:
    return spec(**{"width": 480, "height": 272, "num_frames": 17, "num_inference_steps": 4, **changes})


def used_bytes(live: LiveServer) -> float:
    return live.scrape().value("wan_rank_memory_bytes")


def test_cancel_frees_the_gpu_at_the_next_step(live: LiveServer) -> None:
    """A cancel in the middle of a long step ends it after that step; its memory comes back, the next one is right."""
    reference = live.make(small()).completed.sha256
    before, ranks = used_bytes(live), live.rank_pids()
    stream = live.generate(spec(width=832, height=480, num_frames=81, num_inference_steps=40))
    step_s = stream.until(stage(pb.STAGE_DENOISE, step=1)).progress.step_time.ToNanoseconds() / 1e9
    began = time.monotonic()
    ended = live.cancel(stream.name)
    took_s = time.monotonic() - began
    assert ended.state == pb.GENERATION_STATE_CANCELLED
    assert took_s < step_s + 1.0
    assert abs(used_bytes(live) - before) < 0.1 * GIB
    assert live.rank_pids() == ranks
    assert live.make(small()).completed.sha256 == reference
    print(f"step {step_s:.2f} s, cancelled after {took_s:.2f} s, {before / GIB:.2f} GiB held before and after")


def test_a_killed_rank_is_replaced_on_the_gpu(live: LiveServer) -> None:
    """A rank killed mid-denoise is told of within 5 s; the new one has the GPU to itself and gives the same video."""
    reference = live.make(small()).completed.sha256
    stream = live.generate(spec(width=832, height=480, num_frames=81, num_inference_steps=40))
    stream.until(stage(pb.STAGE_DENOISE, step=1))
    began = time.monotonic()
    live.ranks()[0].send_signal(signal.SIGKILL)
    assert stream.finish().reason == "RANK_DIED"
    told_s = time.monotonic() - began
    assert told_s < 5.0
    live.until_ready()
    ready_s = time.monotonic() - began
    assert live.make(small()).completed.sha256 == reference
    print(f"told after {told_s:.2f} s, ready again after {ready_s:.1f} s")


def test_a_video_that_does_not_fit_ends_in_a_sentence(live: LiveServer) -> None:
    """When the GPU is out of memory the call is RESOURCE_EXHAUSTED, the rank lives on, and the next video is right."""
    reference = live.make(small()).completed.sha256
    ranks = live.rank_pids()
    free_bytes, _ = torch.cuda.mem_get_info()
    hog = torch.empty(free_bytes - 2 * GIB, dtype=torch.uint8, device="cuda")
    assert live.generate(spec(width=1280, height=720, num_frames=81)).finish().reason == "OUT_OF_MEMORY"
    del hog
    torch.cuda.empty_cache()
    assert live.rank_pids() == ranks
    assert live.make(small()).completed.sha256 == reference
