"""Latents to pictures, one latent frame at a time.

Knows the VAE's decoder, the features it carries from slice to slice, and where somebody may divide the pictures. Memory
does not grow with the video's length.
"""

from collections.abc import Callable, Iterator

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan, WanCausalConv3d, unpatchify

from wan_grpc.domain.events import Progress, Stage
from wan_grpc.pipeline.device import Stopwatch
from wan_grpc.pipeline.strips import WHOLE, Strip, Strips


def frames(
    vae: AutoencoderKLWan, latents: torch.Tensor, *, strips: Strips = WHOLE, on_step: Callable[[Progress], None]
) -> Iterator[torch.Tensor]:
    """The pictures of `latents` [1, C, F, h, w], in order: uint8 RGB [n, H, W, 3] on the CPU, n = 1, then 4 a slice.

    n is 0 where others hand the pictures on.
    `on_step` is called before the first slice and whenever the pictures of one have arrived.
    """
    total = latents.shape[2]
    strip = strips.of(*latents.shape[3:])
    on_step(Progress(stage=Stage.DECODE, step=0, total_steps=total))
    watch = Stopwatch(latents.device)
    for index, pixels in enumerate(slices(vae, strip.cut(latents), strip)):
        pictures = strip.join_pictures(to_pictures(pixels)).cpu()
        finished = Progress(stage=Stage.DECODE, step=index + 1, total_steps=total, step_time_s=watch.finish())
        on_step(finished)
        yield pictures
        watch = Stopwatch(latents.device)


def slices(vae: AutoencoderKLWan, latents: torch.Tensor, strip: Strip = WHOLE) -> Iterator[torch.Tensor]:
    """What `vae.decode` returns for denoised `latents` [1, C, F, h, w], cut in time: [1, 3, n, H, W] in -1 to 1.

    strip: what of each picture `latents` are.
    The features that one slice leaves to the next live in this iterator, so that nothing of an abandoned one stays.
    """
    features: list[torch.Tensor | str | None] = [None] * num_features(vae)
    for index in range(latents.shape[2]):
        with strip.computing():
            pixels = _decode_slice(vae, latents[:, :, index : index + 1], features, is_first=index == 0)
        yield pixels


def num_features(vae: AutoencoderKLWan) -> int:
    """How many causal convolutions of the decoder look back in time."""
    return sum(isinstance(module, WanCausalConv3d) for module in vae.decoder.modules())


@torch.no_grad()
def _decode_slice(
    vae: AutoencoderKLWan, latents: torch.Tensor, features: list[torch.Tensor | str | None], *, is_first: bool
) -> torch.Tensor:
    hidden = vae.post_quant_conv(_unscale(vae, latents.to(vae.dtype)))
    pixels = vae.decoder(hidden, feat_cache=features, feat_idx=[0], first_chunk=is_first)
    if vae.config["patch_size"] is not None:
        pixels = unpatchify(pixels, patch_size=vae.config["patch_size"])  # type: ignore[no-untyped-call]
    return torch.clamp(pixels, min=-1.0, max=1.0)


def _unscale(vae: AutoencoderKLWan, latents: torch.Tensor) -> torch.Tensor:
    """From the unit variance that the transformer works in to what the VAE made. [1, C, n, h, w] in and out."""
    mean, std = (
        torch.tensor(values, device=latents.device, dtype=latents.dtype).view(1, -1, 1, 1, 1)
        for values in (vae.config["latents_mean"], vae.config["latents_std"])
    )
    return latents * std + mean


@torch.no_grad()
def to_pictures(pixels: torch.Tensor) -> torch.Tensor:
    """[1, 3, n, H, W] in -1 to 1 -> uint8 [n, H, W, 3], rounded to the nearest as diffusers does."""
    unit = (pixels[0].float() * 0.5 + 0.5).clamp(0.0, 1.0)
    return (unit * 255.0).round().to(torch.uint8).permute(1, 2, 3, 0).contiguous()
