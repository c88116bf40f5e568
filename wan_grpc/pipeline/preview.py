"""What a video is going to be, as one small picture while it is denoised.

Knows which latents are looked at and how the picture becomes small. Does not know who looks.
"""

from collections.abc import Callable
from typing import Final, TypeAlias

import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan

from wan_grpc.pipeline.decode import slices, to_pictures
from wan_grpc.pipeline.strips import WHOLE, Strips

OnPreview: TypeAlias = Callable[[int, torch.Tensor, float], None]
"""Called with the number of the step, from 1, what `picture` made, and the seconds that the device took for it."""
LONGEST_SIDE: Final = 256
"""Pixels that a preview has at most."""


@torch.no_grad()
def picture(vae: AutoencoderKLWan, predicted: torch.Tensor, *, strips: Strips = WHOLE) -> torch.Tensor:
    """The middle of the video whose latents, [1, C, F, h, w], are `predicted`: uint8 RGB [1, H, W, 3] on the CPU.

    [0, H, W, 3] where others hand pictures on. Three latent frames are decoded, whatever the video's length: the first
    one, without which the decoder's features lack what it adds there, the one before the middle, from which motion
    follows, and the middle.
    """
    middle = predicted.shape[2] // 2
    looked_at = sorted({0, max(0, middle - 1), middle})
    strip = strips.of(*predicted.shape[3:])
    *_, pixels = slices(vae, strip.cut(predicted[:, :, looked_at]), strip)
    return small(strip.join_pictures(to_pictures(pixels[:, :, -1:]))).cpu()


def small(pictures: torch.Tensor) -> torch.Tensor:
    """uint8 [n, H, W, 3], with means of pixels so that no side is longer than LONGEST_SIDE. Aspects are kept."""
    count, height, width, _ = pictures.shape
    scale = LONGEST_SIDE / max(height, width)
    if scale >= 1.0:
        return pictures
    size = [max(1, round(side * scale)) for side in (height, width)]
    if count == 0:
        return pictures.new_empty((0, *size, 3))
    shrunk = F.interpolate(pictures.permute(0, 3, 1, 2).float(), size=size, mode="area")
    return shrunk.round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()
