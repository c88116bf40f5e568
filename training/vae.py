"""The VAE of the small models: diffusers' class, narrow, trained on whole clips at once.

Knows how its causal modules see a clip. Does not know what clips show.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan, WanCausalConv3d, WanResample
from torch import nn

from wan_grpc.pipeline.published import T2V_A14B_CONFIGS

CONFIG: Final[dict[str, Any]] = {**T2V_A14B_CONFIGS["vae/config.json"], "base_dim": 16, "num_res_blocks": 1}
"""2.6 M parameters; eightfold in space and fourfold in time, as the published one."""


_LITTLE_NOISE: Final = 6.0
"""By how much the log variance of its latents is lowered at first: else noise drowns them, and nothing is learned."""


def make_vae(*, seed: int) -> AutoencoderKLWan:
    """One that has learned nothing.

    Its convolutions keep the variance of what they are given, and have no bias at first. As torch makes them, they pass
    on less of a clip than of their biases, and the norms after them keep it so: the decoder then takes hundreds of
    steps to see that clips differ.
    """
    torch.manual_seed(seed)
    vae: AutoencoderKLWan = AutoencoderKLWan.from_config(CONFIG)
    for module in vae.modules():
        if isinstance(module, nn.Conv2d | nn.Conv3d):
            assert module.bias is not None, "each of the published class has one"
            nn.init.normal_(module.weight, std=module.weight[0].numel() ** -0.5)
            nn.init.zeros_(module.bias)
    with torch.no_grad():
        vae.quant_conv.weight[CONFIG["z_dim"] :] *= 0.1
        vae.quant_conv.bias[CONFIG["z_dim"] :] -= _LITTLE_NOISE  # type: ignore[index]
    return vae


@contextmanager
def whole_clips(vae: AutoencoderKLWan) -> Iterator[None]:
    """Within the block encoder and decoder take a clip in one piece, and make of it what they make of it in slices.

    The class itself goes through a clip slice by slice with a cache of features, and leaves out time where there is
    no cache.
    """
    changed: list[nn.Module] = []
    for module in vae.modules():
        if isinstance(module, WanResample):
            module.forward = _on_whole_clip(module)  # type: ignore[method-assign]
            changed.append(module)
        elif isinstance(module, WanCausalConv3d) and module.kernel_size[0] > 1 and module.stride == (1, 1, 1):
            module.forward = _frame_by_frame(module)  # type: ignore[method-assign]
            changed.append(module)
    try:
        yield
    finally:
        for module in changed:
            del module.forward


def _frame_by_frame(module: WanCausalConv3d) -> Any:
    """The same convolution in two dimensions, over the channels of a frame and those before it: faster on GPUs."""
    reach = module.kernel_size[0]

    def forward(x: torch.Tensor, cache_x: None = None) -> torch.Tensor:
        """[B, C, T, H, W] in and out, in memory [B, T, H, W, C]."""
        if torch.is_autocast_enabled(x.device.type):  # norms give fp32, which would be copied as such
            x = x.to(torch.get_autocast_dtype(x.device.type))
        batch, channels, num_frames, height, width = x.shape
        padded = x.new_zeros((batch, num_frames + reach - 1, height, width, channels))
        padded[:, reach - 1 :] = x.permute(0, 2, 3, 4, 1)
        seen = torch.cat([padded[:, first : first + num_frames] for first in range(reach)], dim=4)
        weight = module.weight.transpose(1, 2).flatten(1, 2)  # [out, time and in, height, width]
        padding = tuple((size - 1) // 2 for size in module.kernel_size[1:])
        made = F.conv2d(seen.flatten(0, 1).permute(0, 3, 1, 2), weight, module.bias, padding=padding)
        return made.view(batch, num_frames, *made.shape[1:]).transpose(1, 2)

    return forward


def _on_whole_clip(module: WanResample) -> Any:
    per_frame = module.forward  # without a cache it changes the size of frames alone

    def forward(x: torch.Tensor, feat_cache: None = None, feat_idx: None = None) -> torch.Tensor:
        """[B, C, T, H, W] in; the first frame is its own slice, and stays single."""
        is_moving = x.shape[2] > 1
        if module.mode == "upsample3d" and is_moving:
            x = torch.cat([x[:, :, :1], _doubled(module.time_conv(x[:, :, 1:]))], dim=2)
        x = per_frame(x)
        if module.mode == "downsample3d" and is_moving:
            x = torch.cat([x[:, :, :1], module.time_conv(x)], dim=2)
        return x

    return forward


def _doubled(pairs: torch.Tensor) -> torch.Tensor:
    """Two frames of C channels that lie in 2 C channels of one, one after the other: [B, C, 2 T, H, W].

    In memory [B, 2 T, H, W, C], like everything else.
    """
    batch, channels, num_frames, height, width = pairs.shape
    apart = pairs.permute(0, 2, 3, 4, 1).reshape(batch, num_frames, height, width, 2, channels // 2)
    return apart.permute(0, 1, 4, 2, 3, 5).flatten(1, 2).permute(0, 4, 1, 2, 3)


def precision(device: torch.device) -> torch.autocast:
    """bf16 where that is faster."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def encode(vae: AutoencoderKLWan, clips: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and log variance of the latents of clips [B, 3, T, H, W]; within `whole_clips`."""
    mean, log_variance = vae.quant_conv(vae.encoder(clips)).chunk(2, dim=1)
    return mean, log_variance.clamp(-30.0, 20.0)


def decode(vae: AutoencoderKLWan, latents: torch.Tensor) -> torch.Tensor:
    """Clips [B, 3, T, H, W] of latents [B, C, t, h, w] as they come from `encode`; within `whole_clips`."""
    clips: torch.Tensor = vae.decoder(vae.post_quant_conv(latents))
    return clips


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """Of the parts of the loss."""

    edges: float = 0.5
    """Differences between neighbours in space and time, so that outlines stay sharp."""
    divergence: float = 1e-6
    """From the unit normal distribution."""


def loss(
    vae: AutoencoderKLWan, clips: torch.Tensor, *, generator: torch.Generator, weights: Weights
) -> dict[str, torch.Tensor]:
    """Parts of the loss over clips [B, 3, T, H, W] in -1 to 1; their sum is `total`."""
    mean, log_variance = (value.float() for value in encode(vae, clips))
    noise = torch.randn(mean.shape, generator=generator, device=mean.device)
    made = decode(vae, (mean + torch.exp(0.5 * log_variance) * noise).to(clips.dtype)).float()
    difference = made - clips.float()
    edges = [F.l1_loss(made.diff(dim=dim), clips.float().diff(dim=dim)) for dim in (2, 3, 4)]
    parts = {
        "pixels": difference.abs().mean() + difference.pow(2).mean(),
        "edges": weights.edges * torch.stack(edges).sum(),
        "divergence": weights.divergence * 0.5 * (mean**2 + log_variance.exp() - 1 - log_variance).mean(),
    }
    return {**parts, "total": torch.stack(list(parts.values())).sum(), "psnr": psnr(difference)}


def psnr(difference: torch.Tensor) -> torch.Tensor:
    """Peak signal to noise in dB of pixels in -1 to 1, over all of them."""
    return 10 * torch.log10(4.0 / difference.detach().float().pow(2).mean())
