"""Clips as experts see them: latents of the trained VAE, made once and kept on the device, with several captions each.

Knows sizes of clips and how latents are normalised. Does not know experts.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, TypeAlias

import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan

from training import vae as vaes
from training.loop import write_whole
from training.render import render
from training.text import Words
from training.world import Scene, caption, draw_scene

Style: TypeAlias = Callable[[list[Scene], torch.Tensor, torch.Tensor], torch.Tensor]
"""Of scenes, their clips and how much things cover of them, other clips."""
NUM_TOKENS: Final = 48
"""More than the longest caption has."""
_NUM_CAPTIONS: Final = 4
_AT_ONCE: Final = 2**23
"""Pixels that are encoded at once."""
_LEAST_DEVIATION: Final = 0.01
"""Of the largest one: a channel that says nothing must not become noise."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """Of a clip."""

    width: int
    height: int
    num_frames: int

    @property
    def num_pixels(self) -> int:
        """Of all frames."""
        return self.width * self.height * self.num_frames

    def __str__(self) -> str:
        return f"{self.width}x{self.height}x{self.num_frames}"


SIZES: Final = (
    Size(width=96, height=96, num_frames=17),
    Size(width=128, height=96, num_frames=25),
    Size(width=160, height=128, num_frames=33),
)
SHARES: Final = (0.3, 0.55, 0.15)
"""Of batches that have clips of these sizes; the second is what the model makes by default."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Clips:
    """Clips of one size."""

    latents: torch.Tensor
    """[N, 16, t, h, w]."""
    tokens: torch.Tensor
    """Of their captions: [N, captions, NUM_TOKENS]."""
    mask: torch.Tensor
    """Which of the tokens there are: the same shape."""
    near: torch.Tensor
    """How much of a thing is in each place of the latents or beside it, 0 to 1: [N, t, h, w]."""

    def __len__(self) -> int:
        return len(self.latents)


def draw_scenes(count: int, rng: random.Random) -> list[Scene]:
    """Scenes to learn from, none of which shows a combination that is held out."""
    return [draw_scene(rng) for _ in range(count)]


def pixels(scenes: list[Scene], size: Size, *, seed: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """[B, 3, T, H, W] in -1 to 1, and how much of it things cover, as `render` has them."""
    return render(scenes, height=size.height, width=size.width, num_frames=size.num_frames, seed=seed, device=device)


@torch.no_grad()
def make_clips(
    vae: AutoencoderKLWan,
    size: Size,
    count: int,
    *,
    seed: int,
    draw: Callable[[int, random.Random], list[Scene]] = draw_scenes,
    style: Style | None = None,
) -> Clips:
    """Draw, render and encode; latents as the VAE has them, in half precision.

    style: what becomes of what was drawn.
    """
    rng, words = random.Random(seed), Words(num_tokens=NUM_TOKENS)
    latents, tokens, masks, near = [], [], [], []
    at_once = max(1, _AT_ONCE // size.num_pixels)
    for first in range(0, count, at_once):
        scenes = draw(min(at_once, count - first), rng)
        clips, cover = pixels(scenes, size, seed=rng.randrange(2**31), device=vae.device)
        if style is not None:
            clips = style(scenes, clips, cover)
        near.append(near_things(cover).half())
        with vaes.whole_clips(vae), vaes.precision(vae.device):
            mean, _ = vaes.encode(vae, clips)
        latents.append(mean.half())  # which rounds less than bf16 before means are taken off
        numbers, mask = words.tokens([caption(scene, rng) for scene in scenes for _ in range(_NUM_CAPTIONS)])
        tokens.append(numbers.to(torch.int16).view(len(scenes), _NUM_CAPTIONS, -1))
        masks.append(mask.to(torch.int16).view(len(scenes), _NUM_CAPTIONS, -1))
    return Clips(latents=torch.cat(latents), tokens=torch.cat(tokens), mask=torch.cat(masks), near=torch.cat(near))


def near_things(cover: torch.Tensor) -> torch.Tensor:
    """The largest cover, [B, T, H, W], of the pixels in and around each place of the latents: [B, t, h, w].

    The first latent frame is the first frame, each other one stands for four.
    """
    places = F.max_pool2d(cover, 8)
    first, others = places[:, :1], places[:, 1:]
    frames = torch.cat([first, others.reshape(len(others), -1, 4, *others.shape[2:]).amax(2)], dim=1)
    return F.max_pool2d(frames, 3, stride=1, padding=1)


def statistics(every: list[Clips]) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel of the latents, over clips of all sizes alike."""
    flat = [clips.latents.float().transpose(0, 1).flatten(1) for clips in every]
    mean = torch.stack([values.mean(1) for values in flat]).mean(0)
    variance = torch.stack([(values - mean[:, None]).pow(2).mean(1) for values in flat]).mean(0)
    deviation = variance.sqrt()
    return mean.tolist(), deviation.clamp(min=_LEAST_DEVIATION * float(deviation.max())).tolist()


def save(every: dict[Size, Clips], mean: list[float], deviation: list[float], path: Path) -> None:
    """One file."""
    body = {
        str(size): (clips.latents.cpu(), clips.tokens, clips.mask, clips.near.cpu()) for size, clips in every.items()
    }
    write_whole({"mean": mean, "deviation": deviation, "clips": body}, path)


def read(path: Path, *, device: torch.device) -> tuple[dict[str, Clips], list[float], list[float]]:
    """Clips by the name of their size, normalised; mean and deviation of their channels before."""
    kept = torch.load(path, map_location=device, weights_only=True)
    clips = {
        name: normalised(Clips(latents=latents, tokens=tokens, mask=mask, near=near), kept["mean"], kept["deviation"])
        for name, (latents, tokens, mask, near) in kept["clips"].items()
    }
    return clips, kept["mean"], kept["deviation"]


def normalised(clips: Clips, mean: list[float], deviation: list[float]) -> Clips:
    """As experts see them: channels less their mean, by their deviation, in bf16."""
    own = clips.latents.float()
    less, by = (torch.tensor(values, device=own.device).view(1, -1, 1, 1, 1) for values in (mean, deviation))
    return replace(clips, latents=((own - less) / by).bfloat16())


def read_statistics(path: Path) -> tuple[list[float], list[float]]:
    """Mean and deviation of the channels of the latents at `path`."""
    kept = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    return kept["mean"], kept["deviation"]
