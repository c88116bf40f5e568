"""How like two clips are."""

import pytest
import torch

from training.likeness import psnr, ssim


def test_how_far_clips_are() -> None:
    """Nothing between the same; an offset of 10 is 28.1 dB and hardly changes structure; noise does."""
    clip = torch.randint(20, 230, (2, 24, 32, 3), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    noise = torch.randint(0, 255, clip.shape, generator=torch.Generator().manual_seed(2), dtype=torch.uint8)
    assert ssim(clip, clip) == pytest.approx(1.0)
    assert psnr(clip, clip) == 120.0
    assert psnr(clip, clip + 10) == pytest.approx(28.13, abs=0.01)
    assert 0.98 < ssim(clip, clip + 10) < 1.0
    assert ssim(clip, noise) < 0.1 and psnr(clip, noise) < 10.0
