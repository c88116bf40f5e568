"""Few steps instead of many: an adapter with which they end where the many steps of the model itself end.

The few steps are taken as the scheduler takes them, without guidance, and what is minimised is how far their end is
from that of the model, which starts from the same noise and takes its many steps with guidance. So what is learned
makes up for both.

Knows schedulers and guidance. Does not know how adapters are kept.
"""

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, cast

import torch
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from diffusers.schedulers.scheduling_unipc_multistep import UniPCMultistepScheduler
from torch import nn
from transformers import UMT5EncoderModel

from training import experts
from training.adapters import COMPONENTS, adapted, part_of, save
from training.flow import NUM_TIMESTEPS
from training.latents import NUM_TOKENS, Size, draw_scenes
from training.loop import Plan, Training
from training.text import Words, embed
from training.vae import precision
from training.world import caption

NAME: Final = "distil"
_NUM_STEPS: Final = 20
"""Of the model."""
_GUIDANCE: Final = 4.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Texts:
    """Embedded captions and which of their tokens there are: [B, tokens, TEXT_DIM] and [B, tokens]."""

    embedded: torch.Tensor
    mask: torch.Tensor

    def chosen(self, rows: torch.Tensor | slice) -> "Texts":
        """Some of them."""
        return Texts(embedded=self.embedded[rows], mask=self.mask[rows])

    def beside(self, other: "Texts") -> "Texts":
        """These and as many times `other`, which is one."""
        embedded, mask = (
            torch.cat([own, others.expand_as(own)])
            for own, others in ((self.embedded, other.embedded), (self.mask, other.mask))
        )
        return Texts(embedded=embedded, mask=mask)


class Denoiser:
    """Both experts of a checkpoint, by the steps of its scheduler."""

    def __init__(self, pair: Sequence[WanTransformer3DModel], checkpoint: Path) -> None:
        """pair: the experts, in the order in which they work."""
        self._experts = pair
        self._briefs = [experts.be_brief(expert) for expert in pair]
        self._scheduler: dict[str, Any] = json.loads((checkpoint / "scheduler/scheduler_config.json").read_text())
        index: dict[str, Any] = json.loads((checkpoint / "model_index.json").read_text())
        self._boundary: float = index["boundary_ratio"] * NUM_TIMESTEPS

    def latents(
        self, noise: torch.Tensor, texts: Texts, *, num_steps: int, guided: Texts | None = None
    ) -> torch.Tensor:
        """From noise to clips, normalised latents [B, 16, t, h, w] both.

        guided: the text without a caption, away from which the model is guided. None: no guidance, one call a step.
        """
        scheduler = UniPCMultistepScheduler.from_config(self._scheduler)
        scheduler.set_timesteps(num_steps, device=noise.device)
        scheduler.set_begin_index(0)
        told = texts if guided is None else texts.beside(guided)
        latents = noise
        for time, level in zip(scheduler.timesteps, scheduler.timesteps.tolist(), strict=True):
            which = 0 if level >= self._boundary else 1
            self._briefs[which].look_at(told.mask)
            shown = latents.repeat(len(told.mask) // len(latents), 1, 1, 1, 1)
            with precision(noise.device):
                [slope] = self._experts[which](shown, time.expand(len(shown)), told.embedded, return_dict=False)
            slope = slope.float()
            if guided is not None:
                with_caption, without = slope.chunk(2)
                slope = without + _GUIDANCE * (with_caption - without)
            [latents] = scheduler.step(slope, time, latents, return_dict=False)
        return latents


@dataclass(frozen=True, slots=True, kw_only=True)
class Pool:
    """Noise, captions, and where the model ends with them: latents of N clips in half precision."""

    noise: torch.Tensor
    texts: Texts
    ends: torch.Tensor


@torch.no_grad()
def make_pool(checkpoint: Path, size: Size, count: int, *, at_once: int, seed: int, device: torch.device) -> Pool:
    """What the model itself makes of captions that it may learn from."""
    rng, words = random.Random(seed), Words(num_tokens=NUM_TOKENS)
    tokens, mask = (
        value.to(device) for value in words.tokens([caption(scene, rng) for scene in draw_scenes(count, rng)])
    )
    silent_tokens, silent_mask = (value.to(device) for value in words.tokens([""]))
    encoder = part_of(UMT5EncoderModel, checkpoint, "text_encoder", device)
    silent = Texts(embedded=embed(encoder, silent_tokens, silent_mask), mask=silent_mask)
    frames = 1 + (size.num_frames - 1) // 4
    generator = torch.Generator(device).manual_seed(seed)
    shape = (count, experts.CONFIG["in_channels"], frames, size.height // 8, size.width // 8)
    noise = torch.randn(shape, generator=generator, device=device).half()
    model = Denoiser(_pair(checkpoint, device), checkpoint)
    embeddings, ends = [], []
    for first in range(0, count, at_once):
        some = slice(first, first + at_once)
        texts = Texts(embedded=embed(encoder, tokens[some], mask[some]), mask=mask[some])
        embeddings.append(texts.embedded)
        ends.append(model.latents(noise[some].float(), texts, num_steps=_NUM_STEPS, guided=silent).half())
    return Pool(noise=noise, texts=Texts(embedded=torch.cat(embeddings), mask=mask), ends=torch.cat(ends))


def train(
    checkpoint: Path,
    directory: Path,
    plan: Plan,
    *,
    size: Size,
    count: int,
    num_steps: int,
    num_clips: int,
    device: torch.device,
    is_compiled: bool = False,
) -> None:
    """An adapter for each expert of `checkpoint`, both in `distil` of `directory`, and their files.

    count: clips that the model makes first, all of one size. num_steps: that are to be enough. num_clips: of a batch.
    """
    pair = [adapted(expert) for expert in _pair(checkpoint, device)]
    denoiser = Denoiser(pair, checkpoint)
    training = Training(nn.ModuleList(pair), directory / NAME, plan)
    if not (training.step and training.is_done):
        pool = make_pool(checkpoint, size, count, at_once=num_clips, seed=plan.seed + 1, device=device)
        if is_compiled:
            for expert in pair:
                expert.compile_repeated_blocks(dynamic=False)  # type: ignore[no-untyped-call]
        training.run(lambda generator: {"total": _distance(denoiser, pool, num_clips, num_steps, generator)})
    for averaged, role in zip(cast(nn.ModuleList, training.averaged), COMPONENTS.values(), strict=True):
        save(averaged, directory, f"{NAME}-{role}")


def _distance(
    denoiser: Denoiser, pool: Pool, num_clips: int, num_steps: int, generator: torch.Generator
) -> torch.Tensor:
    """Mean square of how far the ends of few steps are from the model's, for some clips of the pool."""
    chosen = torch.randint(len(pool.ends), (num_clips,), generator=generator, device=generator.device)
    ends = denoiser.latents(pool.noise[chosen].float(), pool.texts.chosen(chosen), num_steps=num_steps)
    return (ends - pool.ends[chosen].float()).pow(2).mean()


def _pair(checkpoint: Path, device: torch.device) -> list[WanTransformer3DModel]:
    return [part_of(WanTransformer3DModel, checkpoint, component, device) for component in COMPONENTS]
