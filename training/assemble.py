"""Trained parts to checkpoints in the published diffusers layouts, in bf16.

Knows which parts and configs a checkpoint has. Does not know how the parts were trained.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn

from training import experts, latents
from training import vae as vaes
from training.stages import LATENTS, Work, trained_expert, trained_text, trained_vae
from training.text import text_config, words_tokenizer
from wan_grpc.domain.variants import Task
from wan_grpc.pipeline.checkpoint import EXTRA_NAME
from wan_grpc.pipeline.published import T2V_A14B_CONFIGS, TI2V_5B_CONFIGS, Configs
from wan_grpc.pipeline.tiny_weights import write_checkpoint

EXPERTS: Final[Mapping[Task, Mapping[str, str]]] = {
    Task.TEXT_TO_VIDEO: {"transformer": "t2v-high", "transformer_2": "t2v-low"},
    Task.TEXT_IMAGE_TO_VIDEO: {"transformer": "ti2v"},
}
"""Components and the roles whose experts they are."""
_PUBLISHED: Final[Mapping[Task, Configs]] = {
    Task.TEXT_TO_VIDEO: T2V_A14B_CONFIGS,
    Task.TEXT_IMAGE_TO_VIDEO: TI2V_5B_CONFIGS,
}
_DEFAULTS: Final[Mapping[str, Any]] = {
    "fps": 8,
    "guidance_scale": 4.0,
    "height": 96,
    "num_frames": 25,
    "num_inference_steps": 20,
    "width": 128,
}
VERSION: Final = 2
"""Of the files of the embedded model."""


def assemble(work: Work, task: Task, directory: Path) -> None:
    """Write the checkpoint of `task` into `directory`, with what the stages have made in work.directory."""
    mean, deviation = latents.read_statistics(work.directory / LATENTS)
    models: dict[str, nn.Module] = {
        "text_encoder": trained_text(work),
        "vae": trained_vae(work),
        **{component: trained_expert(work, role) for component, role in EXPERTS[task].items()},
    }
    for model in models.values():
        nn.Module.to(model, "cpu", torch.bfloat16)
    write_checkpoint(directory, configs_of(task, mean, deviation), words_tokenizer(), models)


def configs_of(task: Task, mean: list[float], deviation: list[float]) -> Configs:
    """The JSON files of the checkpoint, but for the tokenizer's."""
    published = _PUBLISHED[task]
    defaults = dict(_DEFAULTS)
    if task is Task.TEXT_TO_VIDEO:
        defaults["guidance_scale_2"] = defaults["guidance_scale"]
    configs: dict[str, Mapping[str, Any]] = {
        name: {**config, **experts.CONFIG} if name.startswith("transformer") else config
        for name, config in published.items()
    }
    index = {**published["model_index.json"], "_diffusers_version": "0.42.0"}
    index["tokenizer"] = ["transformers", "PreTrainedTokenizerFast"]
    if task is Task.TEXT_TO_VIDEO:
        index["boundary_ratio"] = experts.BOUNDARY
    scheduler = {**published["scheduler/scheduler_config.json"], "flow_shift": experts.SHIFT}
    return {
        **configs,
        "model_index.json": index,
        "scheduler/scheduler_config.json": scheduler,
        "text_encoder/config.json": text_config(),
        "vae/config.json": {**vaes.CONFIG, "latents_mean": mean, "latents_std": deviation},
        EXTRA_NAME: {"defaults": defaults, "embedded": True, "version": VERSION},
    }
