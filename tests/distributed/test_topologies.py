"""One video on every topology: the same latents and pictures as on one rank, whatever the task and the size."""

import os
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from itertools import pairwise
from typing import Any

import pytest
import torch

from tests import tiny
from tests.distributed.crew import Crew, crew
from tests.tiny_images import picture
from wan_grpc.domain.images import InputFrames
from wan_grpc.domain.request import VideoRequest
from wan_grpc.domain.topology import Topology
from wan_grpc.domain.variants import Task
from wan_grpc.engine.worker import divide
from wan_grpc.optimize.attention import choose
from wan_grpc.parallel.mesh import Mesh
from wan_grpc.pipeline.checkpoint import locate
from wan_grpc.pipeline.load import load
from wan_grpc.pipeline.tiny import make_tiny_model
from wan_grpc.pipeline.video import VideoPipeline

LATENTS = 1e-4
PIXELS = 1

TOPOLOGIES = {
    "1": Topology(),
    "cfg2": Topology(cfg=2),
    "ulysses2": Topology(ulysses=2),
    "ulysses4": Topology(ulysses=4),
    "ring2": Topology(ring=2),
    "ring3": Topology(ring=3),
    "ring4": Topology(ring=4),
    "cfg2 x ulysses2": Topology(cfg=2, ulysses=2),
    "ring2 x ulysses2": Topology(ring=2, ulysses=2),
    "cfg2 x ring2 x ulysses2": Topology(cfg=2, ring=2, ulysses=2),
    "cfg2, text 2": Topology(cfg=2, text_tensor=2),
    "cfg2 x ulysses2, text 4": Topology(cfg=2, ulysses=2, text_tensor=4),
}

T2V, I2V, TI2V = Task.TEXT_TO_VIDEO, Task.IMAGE_TO_VIDEO, Task.TEXT_IMAGE_TO_VIDEO
BASE = tiny.video(width=64, height=48, num_frames=9, num_inference_steps=4)
"""36 tokens in 3 latent frames; with two experts, each has steps."""
CASES: dict[str, tuple[Task, VideoRequest, int]] = {
    "t2v": (T2V, BASE, 0),
    "t2v, 15 tokens": (T2V, replace(BASE, width=80, height=48, num_frames=1), 0),
    "t2v, 1 token": (T2V, replace(BASE, width=16, height=16, num_frames=1), 0),
    "t2v, 105 tokens": (T2V, replace(BASE, width=80, height=112, num_frames=9), 0),
    "t2v without guidance": (T2V, replace(BASE, guidance_scale=1.0, guidance_scale_2=1.0, num_frames=5), 0),
    "t2v with guidance by one expert": (T2V, replace(BASE, guidance_scale_2=1.0, num_frames=5), 0),
    "i2v": (I2V, BASE, 1),
    "i2v, two images": (I2V, replace(BASE, width=48, height=80, num_frames=5), 2),
    "ti2v": (TI2V, replace(BASE, width=96, height=64, num_frames=5, boundary_ratio=None), 0),
    "ti2v with an image": (TI2V, replace(BASE, width=160, height=96, boundary_ratio=None), 1),
}


PREVIEWED = ["ti2v with an image"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[Task, str]:
    """Directories of a tiny checkpoint for each task, whose experts hear the text."""
    directories = {}
    for task in (T2V, I2V, TI2V):
        directory = tmp_path_factory.mktemp(task) / "model"
        make_tiny_model(directory, task=task)
        directories[task] = str(directory)
    return directories


@pytest.fixture(scope="module", params=list(TOPOLOGIES), ids=list(TOPOLOGIES))
def group(request: pytest.FixtureRequest) -> Iterator[Crew]:
    """One start of the ranks for all cases of a topology."""
    with crew(replace(TOPOLOGIES[request.param], num_heads=4)) as ranks:
        yield ranks


@cache
def open_pipeline(directory: str) -> VideoPipeline:
    checkpoint = locate(directory, load_format="auto")
    return load(checkpoint, device="cpu", dtype="float32", load_format="auto")


@cache
def divided(mesh: Mesh, directory: str) -> VideoPipeline:
    pipeline = open_pipeline(directory)
    divide(pipeline, mesh, choose("auto", device=torch.device("cpu"), dtype=torch.float32))
    return pipeline


def make(pipeline: VideoPipeline, video: VideoRequest, num_images: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents and frames of a video."""
    images = [picture(video.width, video.height, seed).tobytes() for seed in range(num_images)]
    frames = InputFrames(first=images[0] if images else None, last=images[1] if num_images > 1 else None)
    latents = pipeline.latents(video, frames=frames, on_step=tiny.ignore)
    pictures = torch.cat(list(pipeline.generate(video, frames=frames, on_step=tiny.ignore)))
    return latents, pictures


def make_together(mesh: Mesh, directory: str, video: VideoRequest, num_images: int) -> Any:
    latents, pictures = make(divided(mesh, directory), video, num_images)
    waits = {traffic.kind.value for traffic in mesh.meter.take() if traffic.sent_bytes}
    return latents.numpy(), pictures.numpy(), waits


@cache
def alone(directory: str, case: str) -> tuple[torch.Tensor, torch.Tensor]:
    _, video, num_images = CASES[case]
    return make(open_pipeline(directory), video, num_images)


def show(pipeline: VideoPipeline, video: VideoRequest, num_images: int) -> list[torch.Tensor]:
    """The previews of a video."""
    told: list[torch.Tensor] = []
    frames = InputFrames(first=picture(video.width, video.height, 0).tobytes() if num_images else None)
    watched = replace(video, preview_every_steps=1)
    pipeline.latents(
        watched, frames=frames, on_step=tiny.ignore, on_preview=lambda step, pictures, time_s: told.append(pictures)
    )
    return told


def show_together(mesh: Mesh, directory: str, video: VideoRequest, num_images: int) -> Any:
    return [pictures.numpy() for pictures in show(divided(mesh, directory), video, num_images)]


@cache
def shown_alone(directory: str, case: str) -> list[torch.Tensor]:
    _, video, num_images = CASES[case]
    return show(open_pipeline(directory), video, num_images)


@pytest.mark.parametrize("case", PREVIEWED)
def test_previews_on_every_topology(group: Crew, models: dict[Task, str], case: str) -> None:
    """Of every step the picture of one rank, within 1/255, out of rank 0; none out of the others."""
    task, video, num_images = CASES[case]
    expected = shown_alone(models[task], case)
    first, *others = group.run(show_together, models[task], video, num_images)
    assert len(first) == len(expected) == video.num_inference_steps
    for theirs, ours in zip(first, expected, strict=True):
        assert int((torch.from_numpy(theirs).int() - ours.int()).abs().max()) <= PIXELS
    assert all(len(pictures) == 0 for told in others for pictures in told)
    assert all((one.int() - other.int()).abs().max() > PIXELS for one, other in pairwise(expected))


@pytest.mark.parametrize("case", CASES)
def test_a_video_on_every_topology(group: Crew, models: dict[Task, str], case: str) -> None:
    """All ranks hold the latents of one rank within 1e-4, and its pictures within 1/255 come out of rank 0."""
    task, video, num_images = CASES[case]
    latents, pictures = alone(models[task], case)
    answers = group.run(make_together, models[task], video, num_images)
    for theirs, _, _ in answers:
        assert tiny.relative_error(torch.from_numpy(theirs), latents) < LATENTS
    frames = torch.from_numpy(answers[0][1])
    assert frames.shape == pictures.shape
    assert int((frames.int() - pictures.int()).abs().max()) <= PIXELS


def test_what_ranks_say_to_each_other(group: Crew, models: dict[Task, str]) -> None:
    """Each axis exchanges what it is for, and nothing else: the work is divided, not repeated."""
    topology = group.topology
    wanted = {
        "cfg": topology.cfg > 1,
        "ring": topology.ring > 1,
        "ulysses": topology.ulysses > 1,
        "tokens": topology.ring * topology.ulysses > 1,
        "vae": topology.world_size > 1,
    }
    _, _, said = group.run(make_together, models[T2V], replace(BASE, prompt=f"new to all {os.getpid()}"), 0)[0]
    assert said - {"text"} == {kind for kind, is_wanted in wanted.items() if is_wanted}
    assert ("text" in said) == (topology.world_size > 1)
