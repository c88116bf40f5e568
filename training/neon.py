"""A style that an adapter learns: things are outlines that glow in the dark.

Knows the style and its clips. Does not know how adapters are kept.
"""

import random
from pathlib import Path
from typing import Final

import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from transformers import UMT5EncoderModel

from training import experts, latents
from training.adapters import COMPONENTS, adapted, part_of, save
from training.latents import Size
from training.likeness import bell
from training.loop import Plan, Training
from training.world import RGB, Scene, draw_scene

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
    weights = bell(deviation, reach=reach).to(cover.device, cover.dtype)
    padded = F.pad(cover, (reach, reach, reach, reach), mode="replicate").flatten(0, 1).unsqueeze(1)
    return F.conv2d(F.conv2d(padded, weights.view(1, 1, 1, -1)), weights.view(1, 1, -1, 1)).view_as(cover)


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
    """An adapter for each expert of `checkpoint`, in neon-t2v-high and neon-t2v-low of `directory`, and its files.

    count: clips that are shown, of one size. num_tokens: of a batch.
    """
    vae = part_of(AutoencoderKLWan, checkpoint, "vae", device)
    text = part_of(UMT5EncoderModel, checkpoint, "text_encoder", device)
    drawn = latents.make_clips(vae, size, count, seed=plan.seed + 1, draw=scenes_of, style=neon)
    clips = latents.normalised(drawn, vae.config["latents_mean"], vae.config["latents_std"])
    for component, role in COMPONENTS.items():
        expert = adapted(part_of(WanTransformer3DModel, checkpoint, component, device))
        brief = experts.be_brief(expert)
        lessons = experts.Lessons(experts.ROLES[role], [clips], text, brief)
        name = f"neon-{role}"
        training = Training(expert, directory / name, plan)
        training.run(*lessons.losses(expert, num_tokens=num_tokens))
        save(training.averaged, directory, name)
