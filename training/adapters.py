"""Low-rank changes of the matrices of experts (Hu et al., 2021), in the two layouts that loaders know.

Knows adapters, their names, and how checkpoints take them in. Does not know what they learn.
"""

import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from peft import LoraConfig
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes

from training.loop import on
from wan_grpc.pipeline.checkpoint import EXTRA_NAME

RANK: Final = 8
COMPONENTS: Final = {"transformer": "t2v-high", "transformer_2": "t2v-low"}
"""Of a checkpoint, in the order in which they work, and the roles of their experts."""
WEIGHTS: Final = "diffusion_pytorch_model.safetensors"
_DOWN, _UP = ".lora_A.weight", ".lora_B.weight"
_MATRICES: Final = {"to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "o"}
"""Of each attention: in diffusers' names and in the published checkpoint's own."""
_ATTENTIONS: Final = {"attn1": "self_attn", "attn2": "cross_attn"}


def adapted(expert: WanTransformer3DModel) -> WanTransformer3DModel:
    """`expert`, of which nothing is learned any more but new low-rank changes, which are none at first."""
    expert.requires_grad_(False)
    torch.manual_seed(RANK)
    expert.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=list(_MATRICES)))
    return expert


def save(expert: Any, directory: Path, name: str) -> None:
    """Write `directory`/`name`.safetensors in PEFT's layout and `name`-original.safetensors, both in bf16."""
    tensors = {
        key.replace(".default.", "."): value.detach().to("cpu", torch.bfloat16).contiguous()
        for key, value in expert.named_parameters()
        if ".lora_" in key
    }
    for suffix, layout in (("", peft_layout(tensors)), ("-original", original_layout(tensors))):
        directory.mkdir(parents=True, exist_ok=True)
        (directory / f"{name}{suffix}.safetensors").write_bytes(to_bytes(layout, metadata={"format": "pt"}))


def peft_layout(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """As PEFT and diffusers name them: transformer.blocks.0.attn1.to_q.lora_A.weight."""
    return {f"transformer.{name}": value for name, value in tensors.items()}


def original_layout(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """As those are named that were trained on the original checkpoint, each with its alpha.

    diffusion_model.blocks.0.self_attn.q.lora_down.weight.
    """
    made: dict[str, torch.Tensor] = {}
    for name, value in tensors.items():
        _, block, attention, matrix, part, _ = _split(name)
        stem = f"diffusion_model.blocks.{block}.{_ATTENTIONS[attention]}.{_MATRICES[matrix]}"
        made[f"{stem}.{'lora_down' if part == 'lora_A' else 'lora_up'}.weight"] = value
        made[f"{stem}.alpha"] = torch.tensor(float(RANK), dtype=value.dtype)
    return made


def _split(name: str) -> tuple[str, str, str, str, str, str]:
    blocks, block, attention, rest = name.split(".", 3)
    matrix, part, weight = rest.rsplit(".", 2)
    return blocks, block, attention, matrix, part, weight


def merge(checkpoint: Path, files: Mapping[str, Path], directory: Path, **defaults: Any) -> None:
    """Write `checkpoint` into `directory` with adapters in its weights, for servers that take no adapters.

    files: in PEFT's layout, by component. defaults: of requests, where the checkpoint has others.

    Raises:
        FileExistsError: `directory` exists.
        ValueError: an adapter is of another layout or for other matrices.
    """
    merged = {
        Path(component, WEIGHTS): _merged(load_file(checkpoint / component / WEIGHTS), file)
        for component, file in files.items()
    }
    extra = json.loads((checkpoint / EXTRA_NAME).read_text())
    extra["defaults"] |= defaults
    if directory.exists():
        raise FileExistsError(f"{directory} is there already")
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".merge-", dir=directory.parent) as scratch:
        made = Path(shutil.copytree(checkpoint, Path(scratch, directory.name)))
        for place, tensors in merged.items():
            (made / place).write_bytes(to_bytes(tensors, metadata={"format": "pt"}))
        (made / EXTRA_NAME).write_text(json.dumps(extra, indent=2) + "\n")
        made.rename(directory)  # whole or not at all


def _merged(tensors: dict[str, torch.Tensor], file: Path) -> dict[str, torch.Tensor]:
    """`tensors` with what the adapter in `file` adds, whose alpha is its rank."""
    try:
        loaded = load_file(file)
    except SafetensorError as error:
        raise ValueError(f"{file}: {error}") from error
    adapter = {name.removeprefix("transformer."): value.float() for name, value in loaded.items()}
    stems = {name.removesuffix(_DOWN) for name in adapter if name.endswith(_DOWN)}
    if not stems or adapter.keys() != {stem + end for stem in stems for end in (_DOWN, _UP)}:
        raise ValueError(f"{file}: no adapter in PEFT's layout, of lora_A and lora_B alone")
    made = dict(tensors)
    for stem in sorted(stems):
        own = tensors.get(f"{stem}.weight")
        up, down = adapter[stem + _UP], adapter[stem + _DOWN]
        if up.ndim != 2 or down.ndim != 2 or up.shape[1] != len(down):
            raise ValueError(f"{file}: {stem} has lora_A of {tuple(down.shape)} and lora_B of {tuple(up.shape)}")
        if own is None or own.shape != (len(up), down.shape[1]):
            raise ValueError(f"{file}: the expert has no {stem}.weight of {len(up)} x {down.shape[1]}")
        made[f"{stem}.weight"] = (own.float() + up @ down).to(own.dtype)
    return made


def part_of(cls: Any, checkpoint: Path, component: str, device: torch.device) -> Any:
    """A component of `checkpoint`, of which nothing is learned, in float32."""
    part = cls.from_pretrained(checkpoint / component, torch_dtype=torch.float32)
    part.eval().requires_grad_(False)
    return on(device, part)
