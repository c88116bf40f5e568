"""Trained parts to checkpoints in the published diffusers layouts, in bf16.

Knows which parts and configs a checkpoint has. Does not know how the parts were trained.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import load_file
from torch import nn

from training import experts, latents
from training import vae as vaes
from training.adapters import WEIGHTS
from training.loop import leave
from training.stages import LATENTS, TEXT, VAE, Work, trained_expert, trained_text, trained_vae, untrained_text
from training.text import text_config, words_tokenizer
from training.world import vocabulary
from wan_grpc.domain.variants import Task
from wan_grpc.pipeline import embedded
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
_SHARED: Final = ("text_encoder", "tokenizer", "vae")


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


def package(checkpoints: Mapping[Task, Path], directory: Path) -> None:
    """Write what the package has of `checkpoints` made by one run: what each has for itself, and what they share.

    Raises:
        FileExistsError: `directory` holds something already.
        ValueError: what they should share is not the same.
    """
    if directory.exists() and any(directory.iterdir()):
        raise FileExistsError(f"{directory} is not empty")
    files: dict[Path, Path] = {}
    for task, checkpoint in checkpoints.items():
        for path in sorted(path for path in checkpoint.rglob("*") if path.is_file()):
            place = path.relative_to(checkpoint)
            target = directory / (embedded.SHARED if place.parts[0] in _SHARED else task.value) / place
            if files.setdefault(target, path).read_bytes() != path.read_bytes():
                raise ValueError(f"{place} of {checkpoint} is not that of the others")
    for target, path in files.items():
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())


def unpack(packaged: Path, work: Work) -> None:
    """Put the weights of `packaged`, as `package` writes them, where the stages leave theirs.

    The next stages find them there; an expert goes on from its own with --first. How far training had come is not in
    it, nor what read the text encoder's embeddings, nor latents.

    Raises:
        FileExistsError: a stage has been there before.
    """
    shared = packaged / embedded.SHARED
    reading = untrained_text()
    left_out = reading.encoder.load_state_dict(load_file(shared / "text_encoder/model.safetensors"), strict=False)
    assert set(left_out.missing_keys) <= {"encoder.embed_tokens.weight"}, "the other name of what is shared"
    assert not left_out.unexpected_keys
    vae = vaes.make_vae(seed=0)
    vae.load_state_dict(load_file(shared / "vae" / WEIGHTS))
    leave(reading, work.directory / TEXT)
    leave(vae, work.directory / VAE)
    for task, components in EXPERTS.items():
        for component, role in components.items():
            expert = experts.make_expert(seed=0)
            expert.load_state_dict(load_file(packaged / task.value / component / WEIGHTS))
            leave(expert, work.directory / role)


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
        EXTRA_NAME: {"defaults": defaults, "words": vocabulary()},
    }
