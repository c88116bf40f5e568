"""A style as low-rank changes of the matrices of an expert (Hu et al., 2021), in the two layouts that loaders know.

Knows the style, adapters and their names. Does not know how experts are trained otherwise.
"""

import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from peft import LoraConfig
from safetensors.torch import save as to_bytes
from transformers import UMT5EncoderModel

from training import experts, latents
from training.latents import Size
from training.loop import Plan, Training, on
from training.world import RGB, Scene, draw_scene

RANK: Final = 8
_MATRICES: Final = {"to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "o"}
"""Of each attention: in diffusers' names and in the published checkpoint's own."""
_ATTENTIONS: Final = {"attn1": "self_attn", "attn2": "cross_attn"}
_COMPONENTS: Final = {"transformer": "t2v-high", "transformer_2": "t2v-low"}
_GLOW: Final = 0.02
"""Standard deviation of the light around an outline, in shorter sides."""
_NIGHT: Final = 0.12
"""What is left of everything else."""


def neon(scenes: list[Scene], clips: torch.Tensor, cover: torch.Tensor) -> torch.Tensor:
    """Clips [B, 3, T, H, W] in -1 to 1 as outlines that glow in the colour of their only thing, in the dark.

    cover: of the things, [B, T, H, W].
    """
    soft = _blurred(cover, _GLOW * min(cover.shape[2:]))
    light = (4.0 * soft * (1.0 - soft)).unsqueeze(1)
    colours = torch.tensor([RGB[scene.things[0].colour] for scene in scenes], device=clips.device) / 255.0
    dark = (clips + 1.0) * (0.5 * _NIGHT)
    return torch.lerp(dark, colours[:, :, None, None, None].to(clips.dtype), light) * 2.0 - 1.0


def _blurred(cover: torch.Tensor, deviation: float) -> torch.Tensor:
    reach = max(1, round(3 * deviation))
    places = torch.arange(-reach, reach + 1, device=cover.device, dtype=cover.dtype)
    bell = torch.exp(-0.5 * (places / deviation) ** 2)
    bell = bell / bell.sum()
    padded = F.pad(cover, (reach, reach, reach, reach), mode="replicate").flatten(0, 1).unsqueeze(1)
    return F.conv2d(F.conv2d(padded, bell.view(1, 1, 1, -1)), bell.view(1, 1, -1, 1)).view_as(cover)


def scenes_of(count: int, rng: random.Random) -> list[Scene]:
    """Of one thing that has light: none is black."""
    scenes: list[Scene] = []
    while len(scenes) < count:
        scene = draw_scene(rng, alone=True)
        if scene.things[0].colour != "black":
            scenes.append(scene)
    return scenes


def train(
    checkpoint: Path, directory: Path, plan: Plan, *, size: Size, count: int, num_tokens: int, device: torch.device
) -> None:
    """An adapter for each expert of `checkpoint`, in lora-t2v-high and lora-t2v-low of `directory`, and its files.

    count: clips that are shown, of one size. num_tokens: of a batch.
    """
    vae = _part(AutoencoderKLWan, checkpoint, "vae", device)
    text = _part(UMT5EncoderModel, checkpoint, "text_encoder", device)
    drawn = latents.make_clips(vae, size, count, seed=plan.seed + 1, draw=scenes_of, style=neon)
    clips = latents.normalised(drawn, vae.config["latents_mean"], vae.config["latents_std"])
    for component, role in _COMPONENTS.items():
        expert = adapted(_part(WanTransformer3DModel, checkpoint, component, device))
        brief = experts.be_brief(expert)
        lessons = experts.Lessons(experts.ROLES[role], [clips], text, brief)
        name = f"lora-{role}"
        training = Training(expert, directory / name, plan)
        training.run(
            lambda generator, lessons=lessons, expert=expert: lessons.loss(  # type: ignore[misc]
                expert, num_tokens=num_tokens, generator=generator
            )
        )
        save(training.averaged, directory, name)


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


def _part(cls: Any, checkpoint: Path, component: str, device: torch.device) -> Any:
    part = cls.from_pretrained(checkpoint / component, torch_dtype=torch.float32)
    part.eval().requires_grad_(False)
    return on(device, part)
