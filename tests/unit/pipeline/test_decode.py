from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLWan
from diffusers.video_processor import VideoProcessor

from tests import tiny
from wan_grpc.domain.events import Progress
from wan_grpc.pipeline import decode
from wan_grpc.pipeline.video import VideoPipeline

# The VAE of TI2V-5B packs 2x2 pixels into channels and has other blocks.
VAE_OF_5B = {"base_dim": 4, "is_residual": True, "patch_size": 2, "in_channels": 12, "out_channels": 12}


def unscaled(vae: AutoencoderKLWan, latents: torch.Tensor) -> torch.Tensor:
    mean, std = (torch.tensor(vae.config[name]).view(1, -1, 1, 1, 1) for name in ("latents_mean", "latents_std"))
    return latents * std + mean


@pytest.mark.parametrize("num_latent_frames", [1, 2, 5])
@pytest.mark.parametrize("config", [{"base_dim": 4, "num_res_blocks": 1}, VAE_OF_5B], ids=["A14B", "5B"])
@torch.no_grad()
def test_slices_are_the_whole(config: dict[str, Any], num_latent_frames: int) -> None:
    """Slice by slice gives what vae.decode gives at once: 1 frame, then 4 a slice."""
    torch.manual_seed(0)
    vae = AutoencoderKLWan(**config).eval()
    latents = torch.randn(1, 16, num_latent_frames, 4, 6)
    parts = list(decode.slices(vae, latents))
    assert [part.shape[2] for part in parts] == [1] + [4] * (num_latent_frames - 1)
    expected = vae.decode(unscaled(vae, latents), return_dict=False)[0]
    assert tiny.relative_error(torch.cat(parts, dim=2), expected) < 1e-6


def test_memory_does_not_grow_with_length(pipeline: VideoPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is carried from slice to slice is as large after 12 slices as after 3."""
    carried: list[list[Any]] = []
    sizes: list[int] = []
    decode_slice = decode._decode_slice

    def watch(vae: Any, latents: torch.Tensor, features: list[Any], *, is_first: bool) -> torch.Tensor:
        carried.append(features)
        pixels = decode_slice(vae, latents, features, is_first=is_first)
        sizes.append(sum(value.untyped_storage().nbytes() for value in features if isinstance(value, torch.Tensor)))
        return pixels

    monkeypatch.setattr(decode, "_decode_slice", watch)
    for _ in decode.slices(pipeline.vae, torch.randn(1, 16, 12, 4, 4)):
        pass
    assert all(features is carried[0] for features in carried)
    assert sizes[2:] == [sizes[2]] * 10


def test_pictures_are_rounded_as_diffusers_does() -> None:
    """Every value of a pixel, and values outside the range, become the byte that diffusers writes."""
    pixels = torch.linspace(-1.1, 1.1, 2 * 3 * 40 * 40).view(1, 3, 2, 40, 40)
    expected = VideoProcessor().postprocess_video(pixels, output_type="np")[0]
    expected = torch.from_numpy((expected * 255).round().astype("uint8"))
    assert torch.equal(decode.to_pictures(pixels), expected)


def test_a_slice_is_told_before_it_is_given(pipeline: VideoPipeline) -> None:
    """A reader that stops at a slice has heard of that slice and of no later one."""
    told: list[Progress] = []
    frames = decode.frames(pipeline.vae, torch.zeros(1, 16, 3, 4, 4), on_step=told.append)
    next(frames)
    assert [(progress.step, progress.total_steps) for progress in told] == [(0, 3), (1, 3)]
