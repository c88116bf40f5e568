"""The same checkpoint and request through diffusers' WanPipeline and through ours, in fp32 on the CPU."""

from typing import Any

import pytest
import torch
from diffusers import WanPipeline

from tests import tiny
from wan_grpc.domain.request import VideoRequest
from wan_grpc.domain.variants import Expert
from wan_grpc.pipeline.video import VideoPipeline

MAX_LATENT_ERROR = 1e-4
MAX_FRAME_ERROR = 1 / 255 + 1e-6

# What is asked for, and what a pipeline that gets just that wrong would compute instead.
CASES = {
    "experts crossed": ({}, {"flow_shift": 11.0}),
    "another shift": ({"flow_shift": 3.0}, {"flow_shift": 3.1}),
    "another boundary": ({"flow_shift": 3.0, "boundary_ratio": 0.5}, {"flow_shift": 3.0, "boundary_ratio": 0.875}),
    "no boundary": ({"flow_shift": 3.0, "boundary_ratio": None}, {"flow_shift": 3.0, "boundary_ratio": 0.875}),
    "high-noise expert alone": ({"flow_shift": 3.0, "boundary_ratio": 0.0}, {"flow_shift": 3.0}),
    "low-noise expert alone": ({"flow_shift": 3.0, "boundary_ratio": 1.0}, {"flow_shift": 3.0}),
    "guidance of the high-noise expert": ({"guidance_scale": 6.0}, {"guidance_scale": 4.0}),
    "guidance of the low-noise expert": ({"guidance_scale_2": 5.0}, {"guidance_scale_2": 4.0}),
    "no guidance at all": ({"guidance_scale": 1.0}, {"guidance_scale": 1.5}),
    "no guidance by a scale of 0": ({"guidance_scale": 0.0}, {"guidance_scale": 1.5}),
    "no guidance of the low-noise expert": ({"guidance_scale_2": 1.0}, {"guidance_scale_2": 1.5}),
    "guidance below 1": ({"guidance_scale_2": 0.5}, {"guidance_scale_2": 1.0}),
    "a negative prompt": ({"negative_prompt": "watermark, ugly"}, {"negative_prompt": "watermark"}),
    "an empty negative prompt": ({"negative_prompt": ""}, {"negative_prompt": " ."}),
    "a prompt to be cleaned": ({"prompt": "caf&amp;eacute; \u2028 “猫”\n"}, {"prompt": "caf&amp;eacute; “猫”"}),
    "an odd number of steps": ({"num_inference_steps": 7}, {"num_inference_steps": 8}),
    "one step": ({"num_inference_steps": 1}, {"num_inference_steps": 2}),
    "landscape": ({"width": 80, "height": 32}, {"width": 80, "height": 32, "flow_shift": 11.0}),
    "portrait": ({"width": 32, "height": 80}, {"width": 32, "height": 80, "flow_shift": 11.0}),
    "one frame": ({"num_frames": 1}, {"num_frames": 1, "guidance_scale_2": 4.0}),
    "17 frames": ({"num_frames": 17, "num_inference_steps": 4}, {"num_frames": 17, "num_inference_steps": 5}),
    "another seed": ({"seed": 2**63 - 1}, {"seed": 2**63 - 2}),
}
# Cleaning maps this pair of prompts to one text, so that no difference is the right answer.
SAME_AFTER_CLEANING = {"a prompt to be cleaned"}


def frames_of(pipeline: VideoPipeline, request: VideoRequest) -> torch.Tensor:
    return torch.cat(list(pipeline.generate(request, on_step=tiny.ignore))).float() / 255


def frame_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual - expected).abs().max())


@pytest.mark.parametrize("name", CASES)
def test_ours_is_the_reference(name: str, reference: WanPipeline, pipeline: VideoPipeline) -> None:
    """Latents within 1e-4 and frames within 1/255 of diffusers; the same bounds catch a mistake in the request."""
    asked, mistaken = (tiny.video(**changes) for changes in CASES[name])
    latents = tiny.reference(reference, asked)
    frames = tiny.reference(reference, asked, output_type="np")

    assert tiny.relative_error(pipeline.latents(asked, on_step=tiny.ignore), latents) < MAX_LATENT_ERROR
    assert frame_error(frames_of(pipeline, asked), frames) <= MAX_FRAME_ERROR
    is_caught = name not in SAME_AFTER_CLEANING
    assert (
        tiny.relative_error(pipeline.latents(mistaken, on_step=tiny.ignore), latents) > MAX_LATENT_ERROR
    ) is is_caught
    assert (frame_error(frames_of(pipeline, mistaken), frames) > MAX_FRAME_ERROR) is is_caught


def test_swapped_experts_are_caught(reference: WanPipeline, pipeline: VideoPipeline) -> None:
    """The bounds tell one expert from the other."""
    swapped = VideoPipeline(
        text_encoder=pipeline.text_encoder,
        transformers={
            Expert.HIGH_NOISE: pipeline.transformers[Expert.LOW_NOISE],
            Expert.LOW_NOISE: pipeline.transformers[Expert.HIGH_NOISE],
        },
        vae=pipeline.vae,
        scheduler_config=pipeline.scheduler_config,
        device=pipeline.device,
        attention_name=pipeline.attention_name,
    )
    expected = tiny.reference(reference, tiny.VIDEO)
    assert tiny.relative_error(swapped.latents(tiny.VIDEO, on_step=tiny.ignore), expected) > MAX_LATENT_ERROR
    frames = tiny.reference(reference, tiny.VIDEO, output_type="np")
    assert frame_error(frames_of(swapped, tiny.VIDEO), frames) > MAX_FRAME_ERROR


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, {Expert.HIGH_NOISE: 8, Expert.LOW_NOISE: 4}),
        ({"guidance_scale": 1.0}, {Expert.HIGH_NOISE: 4, Expert.LOW_NOISE: 2}),
        ({"guidance_scale_2": 1.0}, {Expert.HIGH_NOISE: 8, Expert.LOW_NOISE: 2}),
        ({"flow_shift": 3.0}, {Expert.HIGH_NOISE: 4, Expert.LOW_NOISE: 8}),
    ],
    ids=str,
)
def test_a_pass_that_changes_nothing_is_not_run(
    changes: dict[str, Any], expected: dict[Expert, int], pipeline: VideoPipeline
) -> None:
    """Two forwards of the expert in charge a step, one where no guidance is asked for."""
    counted = dict.fromkeys(Expert, 0)

    def count(expert: Expert) -> None:
        counted[expert] += 1

    hooks = [
        model.register_forward_hook(lambda *_, expert=expert: count(expert))
        for expert, model in pipeline.transformers.items()
    ]
    pipeline.latents(tiny.video(**changes), on_step=tiny.ignore)
    for hook in hooks:
        hook.remove()
    assert counted == expected
