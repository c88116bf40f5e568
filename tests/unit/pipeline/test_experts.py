from typing import Any

import pytest
import torch

from tests import tiny
from wan_grpc.domain.variants import Expert
from wan_grpc.pipeline.experts import Choice, choose
from wan_grpc.pipeline.latents import draw_noise, latent_shape

HIGH, LOW = Expert.HIGH_NOISE, Expert.LOW_NOISE


@pytest.mark.parametrize(
    ("changes", "timestep", "expected"),
    [
        ({}, 999, Choice(expert=HIGH, guidance_scale=4.0, is_guided=True)),
        ({}, 875, Choice(expert=HIGH, guidance_scale=4.0, is_guided=True)),
        ({}, 874, Choice(expert=LOW, guidance_scale=3.0, is_guided=True)),
        ({"boundary_ratio": None}, 0, Choice(expert=HIGH, guidance_scale=4.0, is_guided=True)),
        ({"boundary_ratio": 0.0}, 0, Choice(expert=HIGH, guidance_scale=4.0, is_guided=True)),
        ({"boundary_ratio": 1.0}, 999, Choice(expert=LOW, guidance_scale=3.0, is_guided=True)),
        ({"guidance_scale": 1.0}, 999, Choice(expert=HIGH, guidance_scale=1.0, is_guided=False)),
        ({"guidance_scale": 1.0}, 1, Choice(expert=LOW, guidance_scale=3.0, is_guided=False)),
        ({"guidance_scale_2": 1.0}, 999, Choice(expert=HIGH, guidance_scale=4.0, is_guided=True)),
        ({"guidance_scale_2": 1.0}, 1, Choice(expert=LOW, guidance_scale=1.0, is_guided=False)),
        ({"guidance_scale_2": 0.5}, 1, Choice(expert=LOW, guidance_scale=0.5, is_guided=True)),
    ],
    ids=str,
)
def test_the_expert_of_a_timestep(changes: dict[str, Any], timestep: int, expected: Choice) -> None:
    """High noise from the boundary up; the first scale decides whether there is guidance at all."""
    assert choose(tiny.video(**changes), timestep, num_train_timesteps=1000) == expected


@pytest.mark.parametrize(
    ("num_frames", "width", "height", "expected"),
    [(1, 16, 32, (1, 16, 1, 4, 2)), (5, 832, 480, (1, 16, 2, 60, 104)), (81, 720, 1280, (1, 16, 21, 160, 90))],
)
def test_latent_shapes(num_frames: int, width: int, height: int, expected: tuple[int, ...]) -> None:
    """One latent frame for the first frame and one for every four after it; rows before columns."""
    request = tiny.video(num_frames=num_frames, width=width, height=height)
    assert latent_shape(request, num_channels=16, temporal_factor=4, spatial_factor=8) == expected


def test_noise_is_that_of_a_cpu_generator() -> None:
    """One seed, one noise, whatever torch's own generator has been through."""
    expected = torch.randn((1, 2, 3), generator=torch.Generator("cpu").manual_seed(5))
    torch.manual_seed(0)
    assert torch.equal(draw_noise((1, 2, 3), seed=5), expected)
    assert not torch.equal(draw_noise((1, 2, 3), seed=6), expected)
