"""Clips as experts see them: latents of the trained VAE, made once and kept on the device, with several captions each.

Knows sizes of clips and how latents are normalised. Does not know experts.
"""

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan

from training import vae as vaes
from training.render import render
from training.text import Words
from training.world import Scene, caption, draw_scene

NUM_TOKENS: Final = 48
"""More than the longest caption has."""
_NUM_CAPTIONS: Final = 4
_AT_ONCE: Final = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """Of a clip."""

    width: int
    height: int
    num_frames: int

    def __str__(self) -> str:
        return f"{self.width}x{self.height}x{self.num_frames}"


SIZES: Final = (
    Size(width=96, height=96, num_frames=17),
    Size(width=128, height=96, num_frames=25),
    Size(width=160, height=128, num_frames=33),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Clips:
    """Clips of one size."""

    latents: torch.Tensor
    """[N, 16, t, h, w]."""
    tokens: torch.Tensor
    """Of their captions: [N, captions, NUM_TOKENS]."""
    mask: torch.Tensor
    """Which of the tokens there are: the same shape."""

    def __len__(self) -> int:
        return len(self.latents)

    def to(self, device: torch.device) -> "Clips":
        return Clips(latents=self.latents.to(device), tokens=self.tokens.to(device), mask=self.mask.to(device))


def draw_scenes(count: int, rng: random.Random) -> list[Scene]:
    """Scenes to learn from, none of which shows a combination that is held out."""
    return [draw_scene(rng) for _ in range(count)]


def pixels(scenes: list[Scene], size: Size, *, seed: int, device: torch.device) -> torch.Tensor:
    """[B, 3, T, H, W] in -1 to 1."""
    return render(scenes, height=size.height, width=size.width, num_frames=size.num_frames, seed=seed, device=device)


@torch.no_grad()
def make_clips(vae: AutoencoderKLWan, size: Size, count: int, *, seed: int) -> Clips:
    """Draw, render and encode; latents as the VAE has them, in bf16."""
    rng, words = random.Random(seed), Words(num_tokens=NUM_TOKENS)
    latents, tokens, masks = [], [], []
    for first in range(0, count, _AT_ONCE):
        scenes = draw_scenes(min(_AT_ONCE, count - first), rng)
        clips = pixels(scenes, size, seed=rng.randrange(2**31), device=vae.device)
        with vaes.whole_clips(vae), vaes.precision(vae.device):
            mean, _ = vaes.encode(vae, clips)
        latents.append(mean.bfloat16())
        for scene in scenes:
            numbers, mask = words.tokens([caption(scene, rng) for _ in range(_NUM_CAPTIONS)])
            tokens.append(numbers.to(torch.int16))
            masks.append(mask.to(torch.int16))
    return Clips(latents=torch.cat(latents), tokens=torch.stack(tokens), mask=torch.stack(masks))


def statistics(every: list[Clips]) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel of the latents, over clips of all sizes alike."""
    flat = [clips.latents.float().transpose(0, 1).flatten(1) for clips in every]
    means = torch.stack([values.mean(1) for values in flat])
    squares = torch.stack([values.pow(2).mean(1) for values in flat])
    mean = means.mean(0)
    return mean.tolist(), (squares.mean(0) - mean**2).sqrt().tolist()


def save(every: dict[Size, Clips], mean: list[float], deviation: list[float], path: Path) -> None:
    """One file."""
    body = {str(size): (clips.latents.cpu(), clips.tokens, clips.mask) for size, clips in every.items()}
    scratch = path.with_suffix(".new")
    torch.save({"mean": mean, "deviation": deviation, "clips": body}, scratch)
    scratch.replace(path)


def read(path: Path, *, device: torch.device) -> tuple[dict[str, Clips], list[float], list[float]]:
    """Clips by the name of their size, normalised; mean and deviation of their channels before."""
    kept = torch.load(path, map_location=device, weights_only=True)
    mean, deviation = (torch.tensor(kept[name], device=device).view(1, -1, 1, 1, 1) for name in ("mean", "deviation"))
    clips = {
        name: Clips(latents=((latents - mean) / deviation).bfloat16(), tokens=tokens, mask=mask)
        for name, (latents, tokens, mask) in kept["clips"].items()
    }
    return clips, kept["mean"], kept["deviation"]


def read_statistics(path: Path) -> tuple[list[float], list[float]]:
    """Mean and deviation of the channels of the latents at `path`."""
    kept = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    return kept["mean"], kept["deviation"]
