"""Adapters: the style that they learn, their files, and what diffusers makes of those."""

import random
from pathlib import Path

import pytest
import torch
from diffusers import WanPipeline
from safetensors.torch import load_file

from training import lora
from training.__main__ import main
from training.generate import generator_of
from training.latents import SIZES
from training.render import render
from training.world import RGB
from wan_grpc.pipeline import embedded

EXAMPLES = Path(__file__).parents[3] / "examples/lora"
PROMPTS = ["a red star moves right on a blue background", "a green triangle grows on grey"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return embedded.ensure_embedded("wan-tiny-t2v", tmp_path_factory.mktemp("model"))


def test_neon_is_outlines_in_the_dark() -> None:
    """Far from edges it is dark, inside and outside; on them it has the colour of the thing."""
    scenes = lora.scenes_of(6, random.Random(1))
    clips, cover = render(scenes, height=96, width=96, num_frames=17, seed=2)
    made = (lora.neon(scenes, clips, cover) + 1) / 2
    soft = lora._blurred(cover, 1.92)
    for scene, clip, share in zip(scenes, made, soft, strict=True):
        assert clip[:, (share < 0.001) | (share > 0.999)].max() <= 0.125
        on_edge = clip[:, (share - 0.5).abs() < 0.02].mean(1)
        assert torch.allclose(on_edge, torch.tensor(RGB[scene.things[0].colour]) / 255, atol=0.02)


def test_only_what_has_light_is_shown() -> None:
    """One thing each, none of them black."""
    scenes = lora.scenes_of(200, random.Random(3))
    assert all(len(scene.things) == 1 and scene.things[0].colour != "black" for scene in scenes)


def test_a_new_adapter_changes_nothing(model: Path) -> None:
    """Until it has learned; and only it learns."""
    expert = lora._part(lora.WanTransformer3DModel, model, "transformer", torch.device("cpu"))
    noisy, text = torch.randn(1, 16, 2, 4, 4), torch.randn(1, 5, 128)
    [before] = expert(noisy, torch.tensor([900.0]), text, return_dict=False)
    names = {name for name, _ in expert.named_parameters()}
    [after] = lora.adapted(expert)(noisy, torch.tensor([900.0]), text, return_dict=False)
    assert torch.allclose(before, after, atol=1e-6)
    learned = {name for name, parameter in expert.named_parameters() if parameter.requires_grad}
    assert len(learned) == 2 * 6 * 8 and all(".lora_" in name for name in learned) and not learned & names


def test_the_command_makes_both_layouts(model: Path, tmp_path: Path) -> None:
    """For each expert, of one adapter that has learned something; the same numbers under both kinds of names."""
    length = f"--steps 2 --warm-up 1 --count 2 --size {SIZES[0]} --num-tokens 200 --device cpu".split()
    main(["lora", "--run", str(tmp_path), "--model", str(model), *length])
    for role in ("t2v-high", "t2v-low"):
        ours, original = (load_file(tmp_path / f"lora-{role}{suffix}.safetensors") for suffix in ("", "-original"))
        assert len(ours) == 2 * 6 * 8 and len(original) == 3 * 6 * 8
        up = ours["transformer.blocks.3.attn2.to_out.0.lora_B.weight"]
        assert up.abs().max() > 0 and up.dtype is torch.bfloat16
        assert torch.equal(up, original["diffusion_model.blocks.3.cross_attn.o.lora_up.weight"])
        down = ours["transformer.blocks.0.attn1.to_q.lora_A.weight"]
        assert torch.equal(down, original["diffusion_model.blocks.0.self_attn.q.lora_down.weight"])
        assert float(original["diffusion_model.blocks.0.self_attn.q.alpha"]) == lora.RANK == down.shape[0]


def test_the_example_is_neon(model: Path) -> None:
    """Loaded by diffusers it turns bright pictures dark, but for light in the colour of the thing.

    In both layouts alike.
    """
    settings = {"width": 96, "height": 96, "num_frames": 9, "num_inference_steps": 8, "guidance_scale": 4.0}

    def made(suffix: str | None) -> torch.Tensor:
        prepare = None if suffix is None else (lambda pipeline: load_example(pipeline, suffix))
        return torch.stack(generator_of(model, torch.device("cpu"), prepare=prepare, **settings)(PROMPTS, [0, 1]))

    def is_dark(clips: torch.Tensor) -> torch.Tensor:
        return clips.amax(-1) < 64

    plain, neon, original = made(None), made(""), made("-original")
    assert float(is_dark(plain).float().mean()) < 0.1
    assert float(is_dark(neon).float().mean()) > 0.7
    assert (neon.int() - original.int()).abs().max() <= 1
    for clip, channel in zip(neon, (0, 1), strict=True):  # red, green
        light = clip[~is_dark(clip)].float().mean(0)
        assert len(clip[~is_dark(clip)]) > 100 and light.argmax() == channel and light[channel] > 100


def load_example(pipeline: WanPipeline, suffix: str) -> None:
    files = [EXAMPLES / f"wan-tiny-neon-{level}{suffix}.safetensors" for level in ("high", "low")]
    assert all(file.stat().st_size < 300_000 for file in files)
    for file, is_second in zip(files, (False, True), strict=True):
        pipeline.load_lora_weights(
            file.parent, weight_name=file.name, adapter_name=file.stem, load_into_transformer_2=is_second
        )
