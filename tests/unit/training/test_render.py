"""Scenes to clips."""

import math
import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from training.latents import near_things
from training.render import distance, render, to_uint8
from training.world import RGB, Background, Camera, Motion, Pattern, Scene, Shape, Size, Thing, draw_scene

PLAIN = Background(pattern=Pattern.PLAIN, colours=("grey",))
SIZES = [(96, 96, 17), (96, 128, 25), (160, 128, 33)]


def scene(
    motion: Motion, shape: Shape = Shape.SQUARE, *, camera: Camera = Camera.FIXED, size: Size = Size.LARGE
) -> Scene:
    thing = Thing(shape=shape, colour="red", motion=motion, size=size)
    return Scene(things=(thing,), background=PLAIN, camera=camera)


def covered(clip: torch.Tensor) -> torch.Tensor:
    """How much of each frame [T] of a clip [3, T, H, W] is red on grey, in pixels."""
    red, grey = (torch.tensor(RGB[name]) / 255 for name in ("red", "grey"))
    way = red - grey
    share = ((clip * 0.5 + 0.5).movedim(0, -1) - grey) @ way / (way @ way)
    return share.sum((1, 2))


class Operations(TorchDispatchMode):
    """Counts what torch does while it is entered."""

    count = 0

    def __torch_dispatch__(
        self,
        func: Callable[..., object],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> object:
        self.count += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("shape", Shape)
def test_shapes_have_the_area_of_the_unit_circle(shape: Shape) -> None:
    """By counting points within the edge."""
    steps = (torch.arange(1000) + 0.5) / 1000 * 5 - 2.5
    inside = distance(shape, torch.stack(torch.meshgrid(steps, steps, indexing="xy"), dim=-1)) < 0
    assert float(inside.sum()) * 0.005**2 == pytest.approx(math.pi, rel=0.01)


@pytest.mark.parametrize("shape", Shape)
def test_distances_are_distances(shape: Shape) -> None:
    """Within half a radius of an edge they change by one a radius, so that edges are smooth alike."""
    points = torch.randn(4000, 2, generator=torch.Generator().manual_seed(0)).requires_grad_()
    away = distance(shape, points)
    [slope] = torch.autograd.grad(away.sum(), points)
    assert (slope.norm(dim=1)[away.abs() < 0.5] - 1).abs().max() < 1e-4


@pytest.mark.parametrize(("height", "width", "num_frames"), SIZES)
def test_clips_have_the_size_that_is_asked_for(height: int, width: int, num_frames: int) -> None:
    """Any size, in -1 to 1, and pictures to match."""
    rng = random.Random(4)
    scenes = [draw_scene(rng) for _ in range(6)]
    clips = render(scenes, height=height, width=width, num_frames=num_frames, seed=2)[0]
    assert clips.shape == (6, 3, num_frames, height, width)
    assert clips.amin() >= -1 and clips.amax() <= 1
    pictures = to_uint8(clips)
    assert pictures.shape == (6, num_frames, height, width, 3) and pictures.dtype == torch.uint8
    assert (pictures.float() / 127.5 - 1 - clips.movedim(1, -1)).abs().max() < 1 / 127


def test_more_clips_take_no_more_operations() -> None:
    """On a GPU each of them costs a launch, however small it is."""
    rng = random.Random(9)
    scenes = [draw_scene(rng) for _ in range(8)]
    counts = []
    for times in (1, 8):
        with Operations() as operations:
            render(scenes * times, height=16, width=16, num_frames=3, seed=1)[0]
        counts.append(operations.count)
    assert 0 < counts[1] <= counts[0]


def test_a_seed_gives_the_same_clip() -> None:
    """And another seed another one of the same scene."""
    clips = [render([scene(Motion.UP)], height=64, width=64, num_frames=5, seed=seed)[0] for seed in (1, 1, 2)]
    assert torch.equal(clips[0], clips[1]) and not torch.equal(clips[0], clips[2])


@pytest.mark.parametrize(
    "motion", [motion for motion in Motion if motion not in (Motion.GROW, Motion.SHRINK, Motion.APPEAR)]
)
@pytest.mark.parametrize("shape", Shape)
def test_things_stay_whole(motion: Motion, shape: Shape) -> None:
    """Whatever they do, no part of them leaves the picture, and none is lost or gained at the edges."""
    for size in Size:
        clips = render([scene(motion, shape, size=size)] * 4, height=96, width=96, num_frames=9, seed=5)[0]
        for clip in clips:
            area = covered(clip)
            assert area.amax() / area.amin() < 1.06, (size, area)


def test_things_grow_shrink_and_appear() -> None:
    """By the area that they cover from first to last frame."""
    kinds = [Motion.GROW, Motion.SHRINK, Motion.APPEAR]
    grown, shrunk, appeared = map(
        covered,
        render([scene(kind, size=Size.MEDIUM) for kind in kinds], height=96, width=96, num_frames=17, seed=6)[0],
    )
    assert (grown.diff() > 0).all() and grown[-1] > 4 * grown[0]
    assert (shrunk.diff() < 0).all() and shrunk[0] > 4 * shrunk[-1]
    assert appeared[:5].abs().max() < 1 and appeared[-1] > 400


@pytest.mark.parametrize("camera", Camera)
def test_the_camera_moves_everything(camera: Camera) -> None:
    """What stands still goes the other way, or comes closer, or goes away."""
    [clip] = render([scene(Motion.STILL, camera=camera)], height=96, width=128, num_frames=9, seed=7)[0]
    red = (clip[0] > 0.5) & (clip[1] < -0.3)
    columns = torch.arange(128).float()
    centres = (red.sum(1) * columns).sum(1) / red.sum((1, 2))
    moved, scaled = float(centres[-1] - centres[0]), float(red[-1].sum() / red[0].sum())
    assert {Camera.PAN_LEFT: moved > 30, Camera.PAN_RIGHT: moved < -30}.get(camera, abs(moved) < 20)
    assert {Camera.ZOOM_IN: scaled > 3, Camera.ZOOM_OUT: scaled < 1 / 3}.get(camera, 0.9 < scaled < 1.1)


def test_what_is_near_a_thing() -> None:
    """Places of the latents that a thing touches in any of their frames, and those beside; none far away."""
    _, cover = render([scene(Motion.RIGHT)], height=96, width=128, num_frames=25, seed=3)
    near = near_things(cover)
    assert near.shape == (1, 7, 12, 16) and near.amax() == 1.0 and near.amin() == 0.0
    touched = cover[:, [0]] > 0.5
    assert (near[:, [0]].repeat_interleave(8, 2).repeat_interleave(8, 3)[touched] > 0.5).all()
    later = cover[0, 1:5].amax(0) > 0.5
    assert (near[0, 1].repeat_interleave(8, 0).repeat_interleave(8, 1)[later] > 0.5).all()
    rows = near[0].amax(0).amax(1) > 0
    assert rows.sum() < 12, "it stays at one height"


def test_cover_is_what_is_seen_of_things() -> None:
    """By the share of red on grey."""
    clips, cover = render([scene(Motion.GROW)], height=96, width=96, num_frames=17, seed=1)
    assert torch.allclose(cover[0].sum((1, 2)), covered(clips[0]), rtol=0.01)
