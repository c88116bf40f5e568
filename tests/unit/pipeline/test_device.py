import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

from wan_grpc.domain.errors import UnusableModelError
from wan_grpc.pipeline import device as devices
from wan_grpc.pipeline.tiny import make_tiny_model

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("asked", "has_gpu", "num_gpus", "expected"),
    [
        ("auto", False, 0, "cpu"),
        ("auto", True, 2, "cuda:1"),
        ("cuda", True, 2, "cuda:1"),
        ("cuda:0", True, 2, "cuda:0"),
        ("cpu", True, 2, "cpu"),
    ],
)
def test_a_device_is_resolved_for_its_rank(
    asked: str, has_gpu: bool, num_gpus: int, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`auto` takes a GPU if there is one, and each rank its own."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: num_gpus)
    assert devices.resolve_device(asked, local_rank=1) == expected


@pytest.mark.parametrize(
    ("asked", "sentence"),
    [
        ("cuda", "there is no device cuda:2: torch sees 1 here"),
        ("cuda:1", "there is no device cuda:1: torch sees 1 here"),
        ("cuda:x", "device cuda:x is not one of auto, cuda, cuda:N, cpu"),
        ("mps", "device mps is not one of auto, cuda, cuda:N, cpu"),
    ],
)
def test_a_device_that_is_not_there_is_refused(asked: str, sentence: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By name, before anything is loaded."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UnusableModelError, match=sentence):
        devices.resolve_device(asked, local_rank=2)


def test_a_lack_of_devices_is_told_with_what_needs_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever asked for more ranks than GPUs reads his own arithmetic beside what there is."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    demand = "--num-gpus 4 needs 4 GPUs (2 replicas of cfg 2)"
    with pytest.raises(UnusableModelError) as raised:
        devices.resolve_device("auto", local_rank=3, demand=demand)
    sentence = "there is no device cuda:3: --num-gpus 4 needs 4 GPUs (2 replicas of cfg 2), torch sees 2 here"
    assert str(raised.value) == sentence


def test_the_peak_is_that_since_its_reset() -> None:
    """Memory taken and given back shows in the peak; after a reset only what is held."""
    devices.reset_peak(CPU)
    before = devices.peak_bytes(CPU)
    block = bytearray(os.urandom(1)) * (300 << 20)
    del block
    assert devices.peak_bytes(CPU) > before + (250 << 20)
    devices.reset_peak(CPU)
    assert devices.peak_bytes(CPU) < before + (200 << 20)
    assert abs(devices.used_bytes(CPU) - psutil.Process().memory_info().rss) < 50 << 20


def test_a_stopwatch_measures_until_it_is_asked() -> None:
    """Seconds between its making and its end."""
    began = time.perf_counter()
    watch = devices.Stopwatch(CPU)
    while time.perf_counter() < began + 0.01:
        pass
    assert 0.009 <= watch.finish() <= time.perf_counter() - began  # it was made a moment after


THREADS = """
import hashlib, sys, torch
from wan_grpc.domain.request import GenerationRequest, resolve
from wan_grpc.pipeline.checkpoint import locate, read_card
from wan_grpc.pipeline.device import make_repeatable
from wan_grpc.pipeline.load import load
make_repeatable("cpu", num_threads=1)
checkpoint = locate(sys.argv[1], load_format="auto")
card = read_card(checkpoint, model_id="tiny")
pipeline = load(checkpoint, device="cpu", dtype="float32", load_format="auto")
for size in ((16, 16, 9), (64, 80, 5), (128, 96, 1)):
    width, height, num_frames = size
    request = GenerationRequest(
        prompt="a cat", width=width, height=height, num_frames=num_frames, num_inference_steps=3
    )
    video = resolve(request, card, fallback_seed=3)
    hashes = set()
    for num_threads in (1, 2, 4):
        assert make_repeatable("cpu", num_threads=num_threads) == torch.get_num_threads() == num_threads
        latents = pipeline.latents(video, on_step=lambda progress: None)
        frames = torch.cat(list(pipeline.generate(video, on_step=lambda progress: None)))
        hashes.add(hashlib.sha256(latents.numpy().tobytes() + frames.numpy().tobytes()).hexdigest())
    print(size, len(hashes))
"""


def test_results_do_not_depend_on_the_number_of_threads(tmp_path: Path) -> None:
    """Latents and frames are the same bytes with 1, 2 and 4 threads, in a process made repeatable at its start."""
    make_tiny_model(tmp_path / "tiny")
    command = [sys.executable, "-c", THREADS, str(tmp_path / "tiny")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=100)
    assert done.stdout.splitlines() == ["(16, 16, 9) 1", "(64, 80, 5) 1", "(128, 96, 1) 1"]


@pytest.mark.parametrize(("asked", "given"), [(0, 1), (1, 1), (2, 2), (3, 2), (4, 4), (64, 4)])
def test_threads_are_rounded_down_to_what_repeats(asked: int, given: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """1, 2 or 4 on a CPU; a GPU's host threads are as many as asked for."""
    set_to: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", set_to.append)
    monkeypatch.setattr(os, "environ", {})
    assert devices.make_repeatable("cpu", num_threads=asked) == given
    assert devices.make_repeatable("cuda:0", num_threads=asked) == asked
    assert set_to == [given, asked]


def test_what_is_a_lack_of_memory() -> None:
    """Also oneDNN's word for it; neither a bug nor a shape that no kernel takes, which it tells in nearly the same."""
    message = "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory"
    for error in (
        torch.OutOfMemoryError(),
        MemoryError(),
        *map(RuntimeError, (message, "could not create a primitive")),
    ):
        assert devices.is_out_of_memory(error)
    for message in ("could not create a primitive descriptor for a convolution forward propagation", "a bug"):
        assert not devices.is_out_of_memory(RuntimeError(message))
