"""Clips by the server's own pipeline, one at a time, to look at and to judge.

Knows VideoPipeline. Does not know captions.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from training.score import Generate
from wan_grpc.domain.events import Progress
from wan_grpc.domain.images import InputFrames
from wan_grpc.domain.request import GenerationRequest, resolve
from wan_grpc.optimize import convolution
from wan_grpc.pipeline.checkpoint import locate, read_card
from wan_grpc.pipeline.load import load


def served_by(directory: Path, *, device: str = "cpu", dtype: str = "float32", **asked: Any) -> Generate:
    """What generates as a server with the checkpoint in `directory` does on that device and in that dtype.

    dtype: of the transformers and the text encoder; servers take float32 on a CPU and bfloat16 on a GPU.
    asked: fields of the request.
    """
    animate = animated_by(directory, device=device, dtype=dtype, **asked)

    def generate(captions: list[str], seeds: list[int]) -> list[torch.Tensor]:
        return [animate(caption, seed, None) for caption, seed in zip(captions, seeds, strict=True)]

    return generate


def animated_by(directory: Path, *, device: str = "cpu", dtype: str = "float32", **asked: Any) -> Any:
    """The same of one caption, one seed and, if there is one, a first frame, uint8 [H, W, 3] of the video's size."""
    checkpoint = locate(str(directory), load_format="auto")
    card = read_card(checkpoint, model_id=directory.name)
    pipeline = load(checkpoint, device=device, dtype=dtype, load_format="auto")
    convolution.install(pipeline.vae, convolution.choose(pipeline.device, pipeline.vae.dtype))

    def animate(caption: str, seed: int, first: torch.Tensor | None) -> torch.Tensor:
        video = resolve(GenerationRequest(prompt=caption, seed=seed, **asked), card, fallback_seed=seed)
        frames = InputFrames()
        if first is not None:
            video = replace(video, image_sha256="0" * 64)  # that there is one; which one, only records ask
            frames = InputFrames(first=first.contiguous().numpy().tobytes())
        return torch.cat(list(pipeline.generate(video, frames=frames, on_step=_ignore)))

    return animate


def _ignore(progress: Progress) -> None:
    """Nobody waits."""
