"""Many clips at once by diffusers' own pipelines, to look at and to judge.

Knows WanPipeline. Does not know captions.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import WanImageToVideoPipeline, WanPipeline

from training.score import Generate


def generator_of(
    directory: Path, device: torch.device, *, prepare: Callable[[Any], None] | None = None, **settings: Any
) -> Generate:
    """What generates with the checkpoint in `directory`; settings: of the call, such as num_inference_steps.

    prepare: what is done to the pipeline first, such as loading adapters.
    """
    pipeline = _load(WanPipeline, directory, device)
    if prepare is not None:
        prepare(pipeline)

    def generate(captions: list[str], seeds: list[int]) -> list[torch.Tensor]:
        generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
        clips = pipeline(prompt=captions, negative_prompt="", generator=generators, output_type="pt", **settings).frames
        return [_to_uint8(clip) for clip in clips]

    return generate


def animator_of(directory: Path, device: torch.device, **settings: Any) -> Callable[[Any, str, int], torch.Tensor]:
    """The same from a first frame, one at a time: image, caption and seed to a clip."""
    pipeline = _load(WanImageToVideoPipeline, directory, device)

    def animate(image: Any, caption: str, seed: int) -> torch.Tensor:
        generator = torch.Generator("cpu").manual_seed(seed)
        made = pipeline(
            image=image, prompt=caption, negative_prompt="", generator=generator, output_type="pt", **settings
        )
        return _to_uint8(made.frames[0])

    return animate


def with_adapters(first: Path, second: Path) -> Callable[[Any], None]:
    """What loads LoRA files into a pipeline's first and second expert."""

    def prepare(pipeline: Any) -> None:
        for file, is_second in ((first, False), (second, True)):
            pipeline.load_lora_weights(
                file.parent, weight_name=file.name, adapter_name=file.stem, load_into_transformer_2=is_second
            )

    return prepare


def _load(cls: Any, directory: Path, device: torch.device) -> Any:
    pipeline = cls.from_pretrained(directory).to(device, torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _to_uint8(clip: torch.Tensor) -> torch.Tensor:
    """[T, 3, H, W] in 0 to 1 to [T, H, W, 3]."""
    return (clip.float() * 255.0).round().to(torch.uint8).permute(0, 2, 3, 1).cpu()
