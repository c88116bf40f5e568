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
        """[count] levels, logit-normal (Esser et al., 2024) before they are shifted, within the bounds."""
        bounds = torch.tensor([self.least, self.most], dtype=torch.float64)
        least, most = torch.special.ndtr(torch.logit(self._unshifted(bounds))).tolist()
        device = generator.device
        shares = least + (most - least) * torch.rand(count, generator=generator, device=device, dtype=torch.float64)
        drawn = torch.sigmoid(torch.special.ndtri(shares))
        return (self.shift * drawn / (1 + (self.shift - 1) * drawn)).float()

    def _unshifted(self, levels: torch.Tensor) -> torch.Tensor:
        return levels / (self.shift - (self.shift - 1) * levels)


def loss(
    expert: WanTransformer3DModel,
    latents: torch.Tensor,
    text: torch.Tensor,
    levels: torch.Tensor,
    *,
    generator: torch.Generator,
) -> torch.Tensor:
    """Mean squared error of the slope from `latents` [B, C, t, h, w] to noise at `levels` [B], given `text`."""
    noise = torch.randn(latents.shape, generator=generator, device=latents.device, dtype=latents.dtype)
    noisy = torch.lerp(latents, noise, levels.view(-1, 1, 1, 1, 1).to(latents.dtype))
    [slope] = expert(noisy, levels * NUM_TIMESTEPS, text, return_dict=False)
    error: torch.Tensor = slope.float() - (noise - latents).float()
    return error.pow(2).mean()
