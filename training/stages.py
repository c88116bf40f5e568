"""The stages of training, one after the other in one directory: text, VAE, latents, experts.

Knows what a stage needs of the ones before it. Does not know the command line.
"""

import functools
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
from training.latents import NUM_TOKENS, SHARES, SIZES, Size
from training.loop import Plan, Training, finished, on
from training.render import to_uint8
from training.score import Score, examine, questions
from training.text import Words, make_text_model

TEXT, VAE, LATENTS = "text", "vae", "latents.pt"
_TEXT_BATCH: Final = 64
_POOL: Final = 2.0**33
"""Bytes of the clips among which the VAE's batches are drawn."""
_SEED: Final = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """Where a model is made, and on what."""

    directory: Path
    device: torch.device


def train_text(work: Work, plan: Plan) -> None:
    """The text encoder, by reading captions."""
    model = on(work.device, untrained_text())
    words = Words(num_tokens=NUM_TOKENS)
    training = Training(model, work.directory / TEXT, plan)
    training.run(lambda generator: reading.loss(model, words, size=_TEXT_BATCH, generator=generator))


def trained_text(work: Work) -> UMT5EncoderModel:
    """What `train_text` has made."""
    return finished(untrained_text(), work.directory / TEXT, device=work.device).encoder


def untrained_text() -> reading.Reading:
    """The text encoder and its reader before they have learned anything."""
    return reading.Reading(make_text_model(seed=_SEED))


def train_vae(work: Work, plan: Plan, *, num_clips: int, scale: float = 1.0) -> None:
    """The VAE, on clips out of a pool that is drawn once.

    num_clips: of the smallest size in a batch. scale: of the pool, which a test makes small.
    """
    vae = on(work.device, vaes.make_vae(seed=_SEED + 1))
    training = Training(vae, work.directory / VAE, plan)
    if training.step and training.is_done:
        return
    pools = [_pool(size, work.device, scale=scale) for size in SIZES]
    most = num_clips * pools[0][0].numel()

    def loss(pool: torch.Tensor, generator: torch.Generator) -> dict[str, torch.Tensor]:
        count = max(1, most // pool[0].numel())
        chosen = torch.randint(len(pool), (count,), generator=generator, device=work.device)
        clips = pool[chosen].permute(0, 4, 1, 2, 3).float() / 127.5 - 1.0
        with vaes.precision(work.device):
            return vaes.loss(vae, clips, generator=generator, weights=vaes.Weights())

    with vaes.whole_clips(vae):
        training.run(*(functools.partial(loss, pool) for pool in pools), shares=SHARES)


def _pool(size: Size, device: torch.device, *, scale: float) -> torch.Tensor:
    """uint8 [N, T, H, W, 3], of as many bytes as those of the other sizes."""
    count = int(_POOL * scale / len(SIZES) / (size.num_pixels * 3)) + 1
    rng, parts = random.Random(size.width), []
    for first in range(0, count, 64):
        scenes = latents.draw_scenes(min(64, count - first), rng)
        clips = latents.pixels(scenes, size, seed=rng.randrange(2**31), device=device)[0]
        parts.append(to_uint8(clips))
    return torch.cat(parts)


@torch.no_grad()
def judge_vae(work: Work, *, count: int) -> Score:
    """How much of held-out clips is seen after they went through the VAE: what experts can reach at most."""
    vae, size = trained_vae(work), SIZES[1]

    def through(_: list[str], seeds: list[int]) -> list[torch.Tensor]:
        scenes = [scene for scene, _ in questions(count, seed=0)[seeds[0] : seeds[-1] + 1]]
        clips = latents.pixels(scenes, size, seed=seeds[0], device=work.device)[0]
        with vaes.whole_clips(vae), vaes.precision(work.device):
            latent_clips = vaes.encode(vae, clips)[0]
            return list(to_uint8(vaes.decode(vae, latent_clips).float()).cpu())

    return examine(through, count, seed=0, at_once=10)[0]


def trained_vae(work: Work) -> AutoencoderKLWan:
    """What `train_vae` has made."""
    return finished(vaes.make_vae(seed=_SEED + 1), work.directory / VAE, device=work.device)


def make_latents(work: Work, *, counts: tuple[int, ...]) -> None:
    """Clips of each of SIZES, so many of each, for the experts; not again if there are any."""
    vae = trained_vae(work)
    if (work.directory / LATENTS).exists():
        return
    every = {
        size: latents.make_clips(vae, size, count, seed=_SEED + 2 + index)
        for index, (size, count) in enumerate(zip(SIZES, counts, strict=True))
    }
    mean, deviation = latents.statistics(list(every.values()))
    latents.save(every, mean, deviation, work.directory / LATENTS)


def train_expert(
    work: Work, name: str, plan: Plan, *, num_tokens: int, first: str | None = None, is_compiled: bool = False
) -> None:
    """One of experts.ROLES. num_tokens: of a batch. first: a role whose expert it begins as."""
    expert = on(work.device, experts.make_expert(seed=_SEED + 10)) if first is None else trained_expert(work, first)
    expert.train().requires_grad_(True)
    brief = experts.be_brief(expert)
    training = Training(expert, work.directory / name, plan)
    if training.step and training.is_done:
        return
    clips, _, _ = latents.read(work.directory / LATENTS, device=work.device)
    lessons = experts.Lessons(experts.ROLES[name], list(clips.values()), trained_text(work), brief)
    if is_compiled:
        expert.compile_repeated_blocks(dynamic=False)  # type: ignore[no-untyped-call]
    training.run(*lessons.losses(expert, num_tokens=num_tokens), shares=SHARES)


def trained_expert(work: Work, name: str) -> WanTransformer3DModel:
    """What `train_expert` has made."""
    return finished(experts.make_expert(seed=_SEED + 10), work.directory / name, device=work.device)
