"""The denoising loop.

Knows who predicts at each step and how predictions are guided. Does not know how noise is drawn or pixels are made.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias

import torch

from wan_grpc.domain.events import Progress, Stage
from wan_grpc.domain.request import VideoRequest
from wan_grpc.domain.variants import Expert
from wan_grpc.pipeline.device import Stopwatch
from wan_grpc.pipeline.experts import Choice, choose
from wan_grpc.pipeline.image import Condition
from wan_grpc.pipeline.schedule import Schedule
from wan_grpc.pipeline.transformer import WanTransformer

Pass: TypeAlias = Callable[[], torch.Tensor]
"""One forward pass: the prediction that it makes, [1, C, F, h, w]."""

RunPasses: TypeAlias = Callable[[Sequence[Pass]], Sequence[torch.Tensor]]
"""Runs the passes of one step, here or elsewhere: what each of them predicts, in order."""


def run_in_turn(passes: Sequence[Pass]) -> Sequence[torch.Tensor]:
    """Each pass on this device, one after the other."""
    return [run() for run in passes]


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompts:
    """What a video is to show and what not, as text embeddings [1, 512, text_dim]."""

    positive: torch.Tensor
    negative: torch.Tensor | None
    """None when no step is guided."""


@torch.no_grad()
def denoise(
    latents: torch.Tensor,
    *,
    video: VideoRequest,
    prompts: Prompts,
    condition: Condition,
    schedule: Schedule,
    transformers: Mapping[Expert, WanTransformer],
    on_step: Callable[[Progress], None],
    on_prediction: Callable[[int, torch.Tensor], None] | None = None,
    run_passes: RunPasses = run_in_turn,
) -> torch.Tensor:
    """From noise to the latents of a video. [1, C, F, h, w] in and out, fp32.

    `on_step` is called before the first step and whenever the device has finished one; what it raises leaves the loop.
    on_prediction: called after every `video.preview_every_steps` of them with the number of the step, from 1, and the
        latents that are predicted for the end, where previews are wanted.
    """
    total = len(schedule.timesteps)
    on_step(Progress(stage=Stage.DENOISE, step=0, total_steps=total))
    for index, timestep in enumerate(schedule.timesteps):
        watch = Stopwatch(latents.device)
        choice = choose(video, timestep, num_train_timesteps=schedule.num_train_timesteps)
        noise = predict(
            transformers[choice.expert],
            latents,
            schedule.device_timesteps[index],
            prompts=prompts,
            condition=condition,
            choice=choice,
            run_passes=run_passes,
        )
        seen = latents
        latents = schedule.step(index, noise, latents)
        finished = Progress(
            stage=Stage.DENOISE,
            step=index + 1,
            total_steps=total,
            expert=choice.expert,
            step_time_s=watch.finish(),
        )
        on_step(finished)
        if on_prediction is not None and video.shows_preview_after(index + 1):
            on_prediction(index + 1, condition.kept(schedule.predicted(index, noise, seen)))
    return condition.kept(latents)


def predict(
    transformer: WanTransformer,
    latents: torch.Tensor,
    timestep: torch.Tensor,
    *,
    prompts: Prompts,
    condition: Condition,
    choice: Choice,
    run_passes: RunPasses = run_in_turn,
) -> torch.Tensor:
    """The flow that one expert sees in the latents, guided away from the negative prompt. [1, C, F, h, w], fp32.

    Classifier-free guidance (Ho and Salimans, 2022): uncond + scale * (cond - uncond), in fp32 whatever the experts
    use, because the scale multiplies their rounding errors too.
    """
    seen = condition.shown(latents).to(transformer.compute_dtype)
    timesteps = condition.timesteps(timestep, latents.shape[2])
    images = None if condition.embedding is None else condition.embedding.to(transformer.compute_dtype)
    texts = [prompts.positive]
    if choice.is_guided:
        assert prompts.negative is not None, "a guided step needs the negative prompt"
        texts.append(prompts.negative)
    passes = [partial(transformer.predict, seen, timesteps, text, images) for text in texts]
    conditional, *unconditional = (prediction.float() for prediction in run_passes(passes))
    if not unconditional:
        return conditional
    return unconditional[0] + choice.guidance_scale * (conditional - unconditional[0])
