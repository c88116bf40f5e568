"""Clips that go on from a first frame, which is that of a drawn clip of the same scene.

Knows scenes and clips. Does not know who generates.
"""

from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch

from training.latents import Size, pixels
from training.likeness import psnr
from training.render import to_uint8
from training.score import Generate
from training.world import Scene

Animate: TypeAlias = Callable[[str, int, torch.Tensor], torch.Tensor]
"""A caption, a seed and a first frame, uint8 [H, W, 3], to a clip, uint8 [T, H, W, 3]."""


def going_on(animate: Animate, scenes: Sequence[Scene], size: Size, ratios: list[float]) -> Generate:
    """What generates for each of `scenes`, by its number as the seed, from the first frame of a clip that shows it.

    ratios: takes the PSNR in dB of each first frame to the one that was given.
    """

    def generate(captions: list[str], seeds: list[int]) -> list[torch.Tensor]:
        clips = []
        for caption, seed in zip(captions, seeds, strict=True):
            drawn = to_uint8(pixels([scenes[seed]], size, seed=seed, device=torch.device("cpu"))[0])[0]
            clips.append(made := animate(caption, seed, drawn[0]))
            ratios.append(psnr(made[:1], drawn[:1]))
        return clips

    return generate
