"""The stages of training, one after the other in one directory: text, VAE, latents, experts.

Knows what a stage needs of the ones before it. Does not know the command line.
"""

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from transformers import UMT5EncoderModel

from training import experts, latents, reading
from training import vae as vaes
from training.latents import NUM_TOKENS, SIZES, Size
from training.loop import Plan, Training, finished, on
from training.render import to_uint8
from training.text import Words, make_text_model

TEXT, VAE, LATENTS = "text", "vae", "latents.pt"
_TEXT_BATCH: Final = 64
_POOL: Final = 2.0**31
"""Bytes of the clips among which the VAE's batches are drawn."""
_SEED: Final = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """Where a model is made, and on what."""

    directory: Path
    device: torch.device
    scale: float = 1.0
    """Of the amounts of data, which a test makes small."""


def train_text(work: Work, plan: Plan) -> None:
    """The text encoder, by reading captions."""
    model = on(work.device, _reading())
    words = Words(num_tokens=NUM_TOKENS)
    training = Training(model, work.directory / TEXT, plan)
    training.run(lambda generator: reading.loss(model, words, size=_TEXT_BATCH, generator=generator))


def trained_text(work: Work) -> UMT5EncoderModel:
    """What `train_text` has made."""
    return finished(_reading(), work.directory / TEXT, device=work.device).encoder


def _reading() -> reading.Reading:
    return reading.Reading(make_text_model(seed=_SEED))


def train_vae(work: Work, plan: Plan, *, num_clips: int) -> None:
    """The VAE, on clips out of a pool that is drawn once. num_clips: of the smallest size in a batch."""
    vae = on(work.device, vaes.make_vae(seed=_SEED + 1))
    pools = [_pool(size, work) for size in SIZES]
    most = num_clips * pools[0][0].numel()

    def loss(generator: torch.Generator) -> dict[str, torch.Tensor]:
        pool = pools[random.Random(generator.initial_seed()).randrange(len(pools))]
        count = max(1, most // pool[0].numel())
        chosen = torch.randint(len(pool), (count,), generator=generator, device=work.device)
        clips = pool[chosen].permute(0, 4, 1, 2, 3).float() / 127.5 - 1.0
        with vaes.precision(work.device):
            return vaes.loss(vae, clips, generator=generator, weights=vaes.Weights())

    training = Training(vae, work.directory / VAE, plan)
    with vaes.whole_clips(vae):
        training.run(loss)


def _pool(size: Size, work: Work) -> torch.Tensor:
    """uint8 [N, T, H, W, 3], of as many bytes as those of the other sizes."""
    count = int(_POOL * work.scale / len(SIZES) / (size.width * size.height * size.num_frames * 3)) + 1
    rng, parts = random.Random(size.width), []
    for first in range(0, count, 64):
        scenes = latents.draw_scenes(min(64, count - first), rng)
        clips = latents.pixels(scenes, size, seed=rng.randrange(2**31), device=work.device)
        parts.append(to_uint8(clips))
    return torch.cat(parts)


def trained_vae(work: Work) -> AutoencoderKLWan:
    """What `train_vae` has made."""
    return finished(vaes.make_vae(seed=_SEED + 1), work.directory / VAE, device=work.device)


def make_latents(work: Work, *, counts: tuple[int, ...]) -> None:
    """Clips of each of SIZES, so many of each, for the experts."""
    vae = trained_vae(work)
    every = {
        size: latents.make_clips(vae, size, count, seed=_SEED + 2 + index)
        for index, (size, count) in enumerate(zip(SIZES, counts, strict=True))
    }
    mean, deviation = latents.statistics(list(every.values()))
    latents.save(every, mean, deviation, work.directory / LATENTS)


def train_expert(work: Work, name: str, plan: Plan, *, num_tokens: int) -> None:
    """One of experts.ROLES. num_tokens: of a batch."""
    expert = on(work.device, experts.make_expert(seed=_SEED + 10))
    clips, _, _ = latents.read(work.directory / LATENTS, device=work.device)
    lessons = experts.Lessons(experts.ROLES[name], list(clips.values()), trained_text(work), experts.be_brief(expert))
    training = Training(expert, work.directory / name, plan)
    training.run(lambda generator: lessons.loss(expert, num_tokens=num_tokens, generator=generator))


def trained_expert(work: Work, name: str) -> WanTransformer3DModel:
    """What `train_expert` has made."""
    return finished(experts.make_expert(seed=_SEED + 10), work.directory / name, device=work.device)
