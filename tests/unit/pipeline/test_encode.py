from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLWan

from tests import tiny_images
from wan_grpc.pipeline import encode


def scaled(vae: AutoencoderKLWan, latents: torch.Tensor) -> torch.Tensor:
    mean, std = (torch.tensor(vae.config[name]).view(1, -1, 1, 1, 1) for name in ("latents_mean", "latents_std"))
    return (latents - mean) * (1.0 / std)


def ends(width: int, height: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    first, last = (torch.rand(1, 3, height, width, generator=generator) * 2 - 1 for _ in range(2))
    return first, last


def whole(first: torch.Tensor, last: torch.Tensor | None, num_frames: int) -> torch.Tensor:
    """[1, 3, num_frames, H, W]: all the frames at once, as diffusers lays them out."""
    video = torch.zeros(1, 3, num_frames, *first.shape[2:])
    video[:, :, 0] = first
    if last is not None:
        video[:, :, -1] = last
    return video


@pytest.mark.parametrize(
    ("num_frames", "has_last"), [(1, False), (5, False), (5, True), (17, False), (17, True)], ids=str
)
@pytest.mark.parametrize("config", [tiny_images.VAE_OF_A14B, tiny_images.VAE_OF_5B], ids=["A14B", "5B"])
@torch.no_grad()
def test_chunks_are_the_whole(config: dict[str, Any], num_frames: int, has_last: bool) -> None:
    """Chunk by chunk gives, bit for bit, what vae.encode gives of the whole video, in the scale of diffusers."""
    torch.manual_seed(0)
    vae = tiny_images.make_vae(config)
    first, last = ends(96, 64)
    video = whole(first, last if has_last else None, num_frames)
    expected = scaled(vae, vae.encode(video).latent_dist.mode())

    num_chunks = 1 + (num_frames - 1) // 4
    pixels = encode.chunks(first, last if has_last else None, num_chunks=num_chunks, size=4)
    parts = list(encode.slices(vae, pixels))
    assert [part.shape[2] for part in parts] == [1] * num_chunks
    assert torch.equal(encode.to_latents(vae, parts), expected)


def test_chunks_are_a_video_with_grey_between_its_ends() -> None:
    """1 frame, then 4 a chunk; the last image is the last frame of the last chunk, and grey chunks share memory."""
    first, last = ends(6, 4)
    parts = list(encode.chunks(first, last, num_chunks=4, size=4))
    assert [part.shape[2] for part in parts] == [1, 4, 4, 4]
    assert torch.equal(torch.cat(parts, dim=2), whole(first, last, 13))
    assert parts[1].data_ptr() == parts[2].data_ptr()


@torch.no_grad()
def test_memory_for_pictures_does_not_grow_with_length(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is carried from chunk to chunk is as large after 12 chunks as after 3."""
    vae = tiny_images.make_vae(tiny_images.VAE_OF_A14B)
    carried: list[list[Any]] = []
    sizes: list[int] = []
    encode_chunk = encode._encode_chunk

    def watch(vae: Any, chunk: torch.Tensor, features: list[Any]) -> torch.Tensor:
        carried.append(features)
        encoded = encode_chunk(vae, chunk, features)
        sizes.append(sum(value.untyped_storage().nbytes() for value in features if isinstance(value, torch.Tensor)))
        return encoded

    monkeypatch.setattr(encode, "_encode_chunk", watch)
    first, _ = ends(48, 32)
    for _ in encode.slices(vae, encode.chunks(first, None, num_chunks=12, size=4)):
        pass
    assert all(features is carried[0] for features in carried)
    assert sizes[2:] == [sizes[2]] * 10
