"""Adapters: the style that they learn, their files, and what diffusers makes of those."""

import errno
import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import WanPipeline, WanTransformer3DModel
from safetensors.torch import load_file, save_file

from training import adapters, distil, neon
from training.__main__ import main
from training.generate import generator_of, with_adapters
from training.latents import SIZES, draw_scenes
from training.render import render
from training.world import RGB, caption
from wan_grpc.pipeline import embedded

EXAMPLES = Path(__file__).parents[3] / "examples/lora"
PROMPTS = ["a red star moves right on a blue background", "a green triangle grows on grey"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return embedded.ensure_embedded("wan-tiny-t2v", tmp_path_factory.mktemp("model"))


def test_neon_is_outlines_in_the_dark() -> None:
    """Far from edges it is dark, inside and outside; on them it has the colour of the thing."""
    scenes = neon.scenes_of(6, random.Random(1))
    clips, cover = render(scenes, height=96, width=96, num_frames=17, seed=2)
    made = (neon.neon(scenes, clips, cover) + 1) / 2
    soft = neon._blurred(cover, 1.92)
    for scene, clip, share in zip(scenes, made, soft, strict=True):
        assert clip[:, (share < 0.001) | (share > 0.999)].max() <= 0.125
        on_edge = clip[:, (share - 0.5).abs() < 0.02].mean(1)
        assert torch.allclose(on_edge, torch.tensor(RGB[scene.things[0].colour]) / 255, atol=0.02)


def test_only_what_has_light_is_shown() -> None:
    """One thing each, none of them black."""
    scenes = neon.scenes_of(200, random.Random(3))
    assert all(len(scene.things) == 1 and scene.things[0].colour != "black" for scene in scenes)


def test_a_new_adapter_changes_nothing(model: Path) -> None:
    """Until it has learned; and only it learns."""
    expert = adapters.part_of(WanTransformer3DModel, model, "transformer", torch.device("cpu"))
    noisy, text = torch.randn(1, 16, 2, 4, 4), torch.randn(1, 5, 128)
    [before] = expert(noisy, torch.tensor([900.0]), text, return_dict=False)
    names = {name for name, _ in expert.named_parameters()}
    [after] = adapters.adapted(expert)(noisy, torch.tensor([900.0]), text, return_dict=False)
    assert torch.allclose(before, after, atol=1e-6)
    learned = {name for name, parameter in expert.named_parameters() if parameter.requires_grad}
    assert len(learned) == 2 * 6 * 8 and all(".lora_" in name for name in learned) and not learned & names


def test_the_command_makes_both_layouts(model: Path, tmp_path: Path) -> None:
    """For each expert, of one adapter that has learned something; the same numbers under both kinds of names."""
    length = f"--steps 2 --warm-up 1 --count 2 --size {SIZES[0]} --num-tokens 200 --device cpu".split()
    main(["neon", "--run", str(tmp_path), "--model", str(model), *length])
    for role in ("t2v-high", "t2v-low"):
        ours, original = (load_file(tmp_path / f"neon-{role}{suffix}.safetensors") for suffix in ("", "-original"))
        assert len(ours) == 2 * 6 * 8 and len(original) == 3 * 6 * 8
        up = ours["transformer.blocks.3.attn2.to_out.0.lora_B.weight"]
        assert up.abs().max() > 0 and up.dtype is torch.bfloat16
        assert torch.equal(up, original["diffusion_model.blocks.3.cross_attn.o.lora_up.weight"])
        down = ours["transformer.blocks.0.attn1.to_q.lora_A.weight"]
        assert torch.equal(down, original["diffusion_model.blocks.0.self_attn.q.lora_down.weight"])
        assert float(original["diffusion_model.blocks.0.self_attn.q.alpha"]) == adapters.RANK == down.shape[0]


def test_few_steps_are_those_of_the_pipeline(model: Path) -> None:
    """The model's ends are diffusers' with guidance, and the few steps are diffusers' without: from the same noise."""
    size, device = SIZES[0], torch.device("cpu")
    pool = distil.make_pool(model, size, 2, at_once=2, seed=5, device=device)
    rng = random.Random(5)
    captions = [caption(scene, rng) for scene in draw_scenes(2, rng)]
    pipeline = pipeline_of(model)
    settings = {"width": size.width, "height": size.height, "num_frames": size.num_frames, "output_type": "latent"}

    def ends(num_steps: int, guidance: float) -> torch.Tensor:
        asked = {"prompt": captions, "negative_prompt": "", "latents": pool.noise.float(), "guidance_scale": guidance}
        made: torch.Tensor = pipeline(**asked, num_inference_steps=num_steps, **settings).frames
        return made

    assert (ends(20, 4.0) - pool.ends.float()).abs().max() < 0.01
    pair = [adapters.part_of(WanTransformer3DModel, model, component, device) for component in adapters.COMPONENTS]
    few = distil.Denoiser(pair, model).latents(pool.noise.float(), pool.texts, num_steps=4)
    assert (ends(4, 1.0) - few).abs().max() < 0.001
    assert (few - pool.ends.float()).abs().max() > 0.5


def test_it_learns_to_end_where_the_model_ends(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two clips, again and again: the ends come nearer, by what both experts have learned."""
    length = f"--steps 8 --warm-up 1 --count 2 --num-clips 2 --few 2 --size {SIZES[0]} --rate 4e-3 --average 0.5"
    main(["distil", "--run", str(tmp_path), "--model", str(model), "--device", "cpu", *length.split()])
    pool = distil.make_pool(model, SIZES[0], 2, at_once=2, seed=1, device=torch.device("cpu"))
    files = [tmp_path / f"distil-{role}.safetensors" for role in ("t2v-high", "t2v-low")]
    monkeypatch.setattr(distil, "make_pool", None)  # which a stage that is done does not ask
    main(["distil", "--run", str(tmp_path), "--model", str(model), "--device", "cpu", *length.split()])
    monkeypatch.undo()
    assert all(load_file(file)["transformer.blocks.0.attn1.to_q.lora_B.weight"].abs().max() > 0 for file in files)

    def away(prepare: Callable[[WanPipeline], None]) -> float:
        prepare(pipeline := pipeline_of(model))
        rng = random.Random(1)
        captions = [caption(scene, rng) for scene in draw_scenes(2, rng)]
        size = {"width": 96, "height": 96, "num_frames": 17, "num_inference_steps": 2, "guidance_scale": 1.0}
        made = pipeline(prompt=captions, latents=pool.noise.float(), output_type="latent", **size).frames
        return float((made - pool.ends.float()).pow(2).mean())

    assert away(with_adapters(*files)) < 0.8 * away(lambda _: None)


def test_a_merged_adapter_is_a_loaded_one(model: Path, tmp_path: Path) -> None:
    """But for the rounding of weights to bf16; and the checkpoint has the defaults that were told."""
    defaults = ["--steps", "4", "--guidance-scale", "1"]
    merge = ["merge", "--model", str(model), "--adapters", *map(str, example("4-steps")), "--out", str(tmp_path / "x")]
    main([*merge, *defaults])
    settings = {"width": 96, "height": 96, "num_frames": 9, "num_inference_steps": 4, "guidance_scale": 1.0}

    def made(directory: Path, prepare: Callable[[WanPipeline], None] | None) -> torch.Tensor:
        return torch.stack(generator_of(directory, torch.device("cpu"), prepare=prepare, **settings)(PROMPTS, [0, 1]))

    loaded = made(model, with_adapters(*example("4-steps")))
    merged, plain = made(tmp_path / "x", None), made(model, None)
    far = (plain.float() - loaded.float()).abs().mean()
    assert (merged.float() - loaded.float()).abs().mean() < 0.05 * far and far > 2
    told = json.loads((tmp_path / "x/wan_grpc.json").read_text())["defaults"]
    before = json.loads((model / "wan_grpc.json").read_text())["defaults"]
    assert told == {**before, "num_inference_steps": 4, "guidance_scale": 1.0, "guidance_scale_2": 1.0}


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("diffusion_model.blocks.0.self_attn.q.lora_down.weight", torch.ones(8, 128), "no adapter in PEFT's layout"),
        ("transformer.blocks.9.attn1.to_q.lora_A.weight", torch.ones(8, 128), r"no blocks\.9\.attn1\.to_q\.weight"),
        ("transformer.blocks.0.attn1.to_q.lora_A.weight", torch.ones(8, 64), "weight of 128 x 64"),
        ("transformer.blocks.0.attn1.to_q.lora_A.weight", torch.ones(4, 128), r"lora_A of \(4, 128\) and lora_B of"),
    ],
)
def test_what_does_not_fit_is_not_merged(
    name: str, value: torch.Tensor, message: str, model: Path, tmp_path: Path
) -> None:
    """With a sentence, and nothing is left behind."""
    other = name.replace("lora_A", "lora_B")
    save_file({other: torch.ones(128, 8), name: value}, tmp_path / "a.safetensors")
    files = [str(tmp_path / "a.safetensors")] * 2
    with pytest.raises(SystemExit, match=message):
        main(["merge", "--model", str(model), "--adapters", *files, "--out", str(tmp_path / "x")])
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    "other", ["transformer.blocks.0.attn1.to_q.alpha", "transformer.blocks.1.attn1.to_q.lora_A.weight"]
)
def test_what_would_be_passed_over_is_refused(other: str, model: Path, tmp_path: Path) -> None:
    """A scale of its own, or half of a change."""
    tensors = load_file(example("4-steps")[0])
    if other in tensors:
        del tensors[other.replace("lora_A", "lora_B")]
    else:
        tensors[other] = torch.ones(())
    save_file(tensors, tmp_path / "a.safetensors")
    files = [str(tmp_path / "a.safetensors")] * 2
    with pytest.raises(SystemExit, match="no adapter in PEFT's layout, of lora_A and lora_B alone"):
        main(["merge", "--model", str(model), "--adapters", *files, "--out", str(tmp_path / "x")])


def test_what_is_no_file_of_tensors(model: Path, tmp_path: Path) -> None:
    """Is named, and a checkpoint that is there is left as it is."""
    (tmp_path / "a.safetensors").write_bytes(b"cat" * 100)
    merge = ["merge", "--model", str(model), "--out", str(tmp_path / "x"), "--adapters"]
    with pytest.raises(SystemExit, match=r"a\.safetensors: "):
        main([*merge, *[str(tmp_path / "a.safetensors")] * 2])
    (tmp_path / "x").mkdir()
    with pytest.raises(SystemExit, match="x is there already"):
        main([*merge, *map(str, example("4-steps"))])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.safetensors", "x"] and not [
        *(tmp_path / "x").iterdir()
    ]


def test_a_full_disk_leaves_no_half_of_a_checkpoint(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is all there or not at all."""

    def full(*_: object, **__: object) -> bytes:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(adapters, "to_bytes", full)
    files = map(str, example("4-steps"))
    with pytest.raises(SystemExit, match="No space left"):
        main(["merge", "--model", str(model), "--out", str(tmp_path / "x"), "--adapters", *files])
    assert not [*tmp_path.iterdir()]


def test_a_model_of_text_alone_takes_no_images(model: Path) -> None:
    """And says so before it makes anything."""
    with pytest.raises(SystemExit, match=r"--from-images: .* makes videos from text alone"):
        main(["score", "--model", str(model), "--from-images", "--count", "1", "--device", "cpu"])
    with pytest.raises(SystemExit, match="--adapters: the server's own pipeline takes none yet"):
        files = map(str, example("4-steps"))
        main(["score", "--model", str(model), "--served", "--device", "cpu", "--adapters", *files])


def test_the_example_is_neon(model: Path) -> None:
    """Loaded by diffusers it turns bright pictures dark, but for light in the colour of the thing.

    In both layouts alike.
    """
    settings = {"width": 96, "height": 96, "num_frames": 9, "num_inference_steps": 8, "guidance_scale": 4.0}

    def made(suffix: str | None) -> torch.Tensor:
        prepare = None if suffix is None else with_adapters(*example("neon", suffix))
        return torch.stack(generator_of(model, torch.device("cpu"), prepare=prepare, **settings)(PROMPTS, [0, 1]))

    def is_dark(clips: torch.Tensor) -> torch.Tensor:
        return clips.amax(-1) < 64

    plain, glowing, original = made(None), made(""), made("-original")
    assert float(is_dark(plain).float().mean()) < 0.1
    assert float(is_dark(glowing).float().mean()) > 0.7
    assert (glowing.int() - original.int()).abs().max() <= 1
    for clip, channel in zip(glowing, (0, 1), strict=True):  # red, green
        light = clip[~is_dark(clip)].float().mean(0)
        assert len(clip[~is_dark(clip)]) > 100 and light.argmax() == channel and light[channel] > 100


def example(name: str, suffix: str = "") -> list[Path]:
    files = [EXAMPLES / f"wan-tiny-{name}-{level}{suffix}.safetensors" for level in ("high", "low")]
    assert all(file.stat().st_size < 300_000 for file in files)
    return files


def pipeline_of(model: Path) -> WanPipeline:
    pipeline = WanPipeline.from_pretrained(model).to("cpu", torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
