"""Flow matching (Lipman et al., 2023): between noise and latents on a straight line, of which the slope is learned.

Knows levels of noise and which of them an expert is for. Does not know pixels.
"""

from dataclasses import dataclass

import torch
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel

NUM_TIMESTEPS = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class Levels:
    """Which levels of noise are drawn, from 0 (none) to 1 (nothing else)."""

    least: float = 0.0
    most: float = 1.0
    shift: float = 3.0
    """Towards noise, as the scheduler shifts."""

    def draw(self, count: int, *, generator: torch.Generator) -> torch.Tensor:
        """[count] levels within the bounds, as often as the scheduler's steps come to them: even before the shift.

        A logit-normal density (Esser et al., 2024) would hardly show the first steps, at levels above 0.98, which
        decide on colour and place.
        """
        least, most = (self._unshifted(level) for level in (self.least, self.most))
        drawn = least + (most - least) * torch.rand(count, generator=generator, device=generator.device)
        return self.shift * drawn / (1 + (self.shift - 1) * drawn)

    def _unshifted(self, level: float) -> float:
        return level / (self.shift - (self.shift - 1) * level)


def loss(
    expert: WanTransformer3DModel,
    latents: torch.Tensor,
    text: torch.Tensor,
    levels: torch.Tensor,
    *,
    generator: torch.Generator,
    has_image: torch.Tensor | None = None,
    weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """Mean squared error of the slope from `latents` [B, C, t, h, w] to noise at `levels` [B], given `text`.

    has_image: [B], whether the first latent frame is given. It is then without noise, at level 0, and has no error; and
    the expert is told the level of each token, as in TI2V-5B. None: one level a clip.
    weights: of places, [B, t, h, w]. They change what is learned first, not what is right: the answer that minimises
    the error of a place does not depend on its weight.
    """
    noise = torch.randn(latents.shape, generator=generator, device=latents.device, dtype=latents.dtype)
    is_given = torch.zeros_like(latents[:, :1], dtype=torch.bool)
    if has_image is not None:
        is_given[:, :, 0] = has_image.view(-1, 1, 1, 1)
    level_map = levels.view(-1, 1, 1, 1, 1).expand(is_given.shape).masked_fill(is_given, 0.0)
    noisy = torch.lerp(latents, noise, level_map.to(latents.dtype))
    told = levels if has_image is None else level_map[:, 0, :, ::2, ::2].flatten(1)
    [slope] = expert(noisy, told * NUM_TIMESTEPS, text, return_dict=False)
    error: torch.Tensor = slope.float() - (noise - latents).float()
    counted = torch.ones_like(is_given, dtype=error.dtype) if weights is None else weights.float().unsqueeze(1)
    counted = counted.masked_fill(is_given, 0.0).expand_as(error)
    return (error.pow(2) * counted).sum() / counted.sum()
