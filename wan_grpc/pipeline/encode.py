"""Pictures to latents, one latent frame at a time.

Knows the VAE's encoder, the features it carries from chunk to chunk, and where somebody may divide the pictures. Memory
for pictures does not grow with length.
"""

from collections.abc import Iterable, Iterator, Sequence

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan, WanCausalConv3d, patchify

from wan_grpc.pipeline.strips import WHOLE, Strip


def chunks(first: torch.Tensor, last: torch.Tensor | None, *, num_chunks: int, size: int) -> Iterator[torch.Tensor]:
    """A video that is grey but for its ends, as the encoder takes it: [1, 3, n, H, W], n = 1, then `size` a chunk.

    first, last: [1, 3, H, W] in -1 to 1.
    """
    yield first.unsqueeze(2)
    grey = first.new_zeros((*first.shape[:2], size, *first.shape[2:]))
    for index in range(1, num_chunks):
        if last is not None and index == num_chunks - 1:
            yield torch.cat([grey[:, :, 1:], last.unsqueeze(2)], dim=2)
        else:
            yield grey


def slices(vae: AutoencoderKLWan, pixels: Iterable[torch.Tensor], strip: Strip = WHOLE) -> Iterator[torch.Tensor]:
    """What the encoder makes of each chunk of `chunks`: [1, 2C, 1, h, w].

    strip: what of each picture `pixels` are.
    The features that one chunk leaves to the next live in this iterator, so that nothing of an abandoned one stays.
    """
    features: list[torch.Tensor | None] = [None] * num_features(vae)
    for chunk in pixels:
        with strip.computing():
            encoded = _encode_chunk(vae, chunk, features)
        yield encoded


def num_features(vae: AutoencoderKLWan) -> int:
    """How many causal convolutions of the encoder look back in time."""
    return sum(isinstance(module, WanCausalConv3d) for module in vae.encoder.modules())


@torch.no_grad()
def _encode_chunk(vae: AutoencoderKLWan, chunk: torch.Tensor, features: list[torch.Tensor | None]) -> torch.Tensor:
    chunk = chunk.to(vae.dtype)
    if vae.config["patch_size"] is not None:
        chunk = patchify(chunk, patch_size=vae.config["patch_size"])  # type: ignore[no-untyped-call]
    encoded: torch.Tensor = vae.encoder(chunk, feat_cache=features, feat_idx=[0])
    return encoded


@torch.no_grad()
def to_latents(vae: AutoencoderKLWan, encoded: Sequence[torch.Tensor]) -> torch.Tensor:
    """From all `slices` of a video to its likeliest latents, with the unit variance of noise: [1, C, F, h, w], fp32.

    All at once, so that it is bit for bit what `vae.encode` gives.
    """
    moments: torch.Tensor = vae.quant_conv(torch.cat(list(encoded), dim=2))
    likeliest = moments.chunk(2, dim=1)[0].float()
    mean, std = (
        torch.tensor(values, device=likeliest.device).view(1, -1, 1, 1, 1)
        for values in (vae.config["latents_mean"], vae.config["latents_std"])
    )
    return (likeliest - mean) * (1.0 / std)
