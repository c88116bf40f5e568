"""How like two clips are: PSNR and SSIM.

Knows pictures. Does not know who made them.
"""

from typing import Final

import torch
import torch.nn.functional as F

from training import vae as vaes

_SAME: Final = 120.0


def psnr(clip: torch.Tensor, other: torch.Tensor) -> float:
    """In dB of clips uint8 [T, H, W, 3]; of the same ones a finite value that no others reach."""
    return min(_SAME, float(vaes.psnr((clip.float() - other.float()) / 127.5)))


def ssim(clip: torch.Tensor, other: torch.Tensor) -> float:
    """Structural similarity (Wang et al., 2004) of the luma of clips uint8 [T, H, W, 3], in windows of 11 pixels."""
    one, two = (_luma(each) for each in (clip, other))
    weights = bell(1.5, reach=5).view(1, 1, 1, -1)

    def local(values: torch.Tensor) -> torch.Tensor:
        return F.conv2d(F.conv2d(values, weights), weights.transpose(2, 3))

    mean_one, mean_two = local(one), local(two)
    variance_one, variance_two = local(one * one) - mean_one**2, local(two * two) - mean_two**2
    covariance = local(one * two) - mean_one * mean_two
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    likeness = (2 * mean_one * mean_two + c1) * (2 * covariance + c2)
    return float((likeness / ((mean_one**2 + mean_two**2 + c1) * (variance_one + variance_two + c2))).mean())


def bell(deviation: float, *, reach: int) -> torch.Tensor:
    """Weights of a Gaussian window, [2 reach + 1], that sum up to 1."""
    places = torch.arange(-reach, reach + 1, dtype=torch.float32)
    weights = torch.exp(-0.5 * (places / deviation) ** 2)
    return weights / weights.sum()


def _luma(clip: torch.Tensor) -> torch.Tensor:
    """[T, 1, H, W] by ITU-R BT.601."""
    return (clip.float() @ torch.tensor([0.299, 0.587, 0.114])).unsqueeze(1)
