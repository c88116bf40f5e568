"""The judge sees what was rendered, also in blurred and noisy clips, and nothing else."""

import random
from collections import Counter
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from training.judge import look, verdict
from training.render import render, to_uint8
from training.world import OBJECT_COLOURS, Camera, Motion, Scene, Shape, draw_scene

NUM_SCENES, NUM_WRONG = 60, 20


def clips(scenes: list[Scene], *, is_spoiled: bool = False) -> torch.Tensor:
    """uint8 [B, T, H, W, 3]; spoiled: blurred, with colours a little off and noise, as a small VAE leaves them."""
    rendered = render(scenes, height=96, width=96, num_frames=17, seed=8)[0]
    if is_spoiled:
        frames = rendered.transpose(1, 2).flatten(0, 1)
        blurred = F.avg_pool2d(F.pad(frames, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
        noise = torch.randn(blurred.shape, generator=torch.Generator().manual_seed(1))
        rendered = (0.92 * blurred + 0.06 * noise).unflatten(0, (-1, 17)).transpose(1, 2)
    return to_uint8(rendered)


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    rng = random.Random(9)
    return [draw_scene(rng, held_out=True, alone=True) for _ in range(NUM_SCENES)]


@pytest.fixture(scope="module")
def rendered(scenes: list[Scene]) -> torch.Tensor:
    return clips(scenes)


def shares(pictures: torch.Tensor, scenes: list[Scene]) -> dict[str, float]:
    """How many of the clips are right, by what is judged."""
    right: Counter[str] = Counter()
    for clip, scene in zip(pictures, scenes, strict=True):
        judged = verdict(clip, scene)
        right.update({name: getattr(judged, name) for name in ("colour", "shape", "motion")})
    return {name: count / len(scenes) for name, count in right.items()}


def test_it_sees_what_was_rendered(rendered: torch.Tensor, scenes: list[Scene]) -> None:
    """All colours, shapes and motions of one thing."""
    assert shares(rendered, scenes) == {"colour": 1.0, "shape": 1.0, "motion": 1.0}


def test_it_sees_through_blur_and_noise(scenes: list[Scene]) -> None:
    """19 of 20 in each."""
    assert min(shares(clips(scenes, is_spoiled=True), scenes).values()) >= 0.95


def test_it_sees_two_things() -> None:
    """From left to right."""
    rng = random.Random(10)
    drawn = [draw_scene(rng) for _ in range(300)]
    two = [scene for scene in drawn if len(scene.things) == 2 and scene.camera is Camera.FIXED][:25]
    assert min(shares(clips(two), two).values()) >= 0.95


@pytest.mark.parametrize("name", ["colour", "shape", "motion"])
def test_it_finds_what_is_wrong(rendered: torch.Tensor, scenes: list[Scene], name: str) -> None:
    """A clip of another colour, shape or motion than was asked for is wrong in that, and in that alone."""
    values = {"colour": list(OBJECT_COLOURS), "shape": list(Shape), "motion": list(Motion)}[name]
    for clip, scene in zip(rendered[:NUM_WRONG], scenes[:NUM_WRONG], strict=True):
        [thing] = scene.things
        other = values[(values.index(getattr(thing, name)) + 1) % len(values)]
        asked = replace(scene, things=(replace(thing, **{name: other}),))
        judged = verdict(clip, asked)
        assert {field: getattr(judged, field) for field in ("colour", "shape", "motion")} == {
            field: field != name for field in ("colour", "shape", "motion")
        }


def test_it_sees_nothing_where_nothing_is(scenes: list[Scene]) -> None:
    """Backgrounds alone and noise have no things, and are wrong in everything."""
    noise = torch.randint(0, 256, (17, 96, 96, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    assert look(noise) == []
    grey = torch.full((17, 96, 96, 3), 128, dtype=torch.uint8)
    judged = verdict(grey, scenes[0])
    assert not (judged.colour or judged.shape or judged.motion)
