import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLWan, WanPipeline, WanTransformer3DModel
from safetensors.torch import load_file, save_file
from transformers import CLIPImageProcessorPil, CLIPVisionModel, UMT5EncoderModel

from tests import tiny, tiny_images
from wan_grpc.domain.errors import UnusableModelError
from wan_grpc.domain.images import InputFrames
from wan_grpc.domain.variants import Expert
from wan_grpc.pipeline.checkpoint import LOAD_FORMATS, Checkpoint, locate
from wan_grpc.pipeline.load import load
from wan_grpc.pipeline.published import CONFIGS, I2V_A14B_ID, T2V_A14B_ID, TI2V_5B_ID
from wan_grpc.pipeline.text import umt5
from wan_grpc.pipeline.transformer import WanTransformer

FLOAT32 = {"device": "cpu", "dtype": "float32", "load_format": "auto"}
BFLOAT16 = {"device": "cpu", "dtype": "bfloat16", "load_format": "auto"}


def described(model: torch.nn.Module) -> dict[str, tuple[torch.dtype, torch.Tensor]]:
    return {name: (parameter.dtype, parameter) for name, parameter in model.named_parameters()}


def assert_same_weights(ours: torch.nn.Module, theirs: torch.nn.Module) -> None:
    expected, actual = described(theirs), described(ours)
    assert {name: dtype for name, (dtype, _) in actual.items()} == {
        name: dtype for name, (dtype, _) in expected.items()
    }
    assert [name for name in expected if not torch.equal(actual[name][1], expected[name][1])] == []


@pytest.fixture(scope="module")
def sharded(reference: WanPipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same checkpoint in many files, as large models come."""
    directory = tmp_path_factory.mktemp("sharded")
    reference.save_pretrained(directory, max_shard_size="100KB")
    return directory


def test_bf16_weights_are_those_that_diffusers_loads(sharded: Path) -> None:
    """Every parameter, by name, value and dtype: norms and modulation of the experts in fp32, the VAE in fp32."""
    assert len(list((sharded / "transformer").glob("*.safetensors"))) > 1
    pipeline = load(locate(str(sharded), load_format="auto"), **BFLOAT16)
    for expert, folder in ((Expert.HIGH_NOISE, "transformer"), (Expert.LOW_NOISE, "transformer_2")):
        theirs = WanTransformer3DModel.from_pretrained(sharded, subfolder=folder, torch_dtype=torch.bfloat16)
        assert_same_weights(pipeline.transformers[expert], theirs)
        assert torch.equal(pipeline.transformers[expert].rope.freqs_cos, theirs.rope.freqs_cos)
    theirs = UMT5EncoderModel.from_pretrained(sharded / "text_encoder", dtype=torch.bfloat16)
    assert_same_weights(pipeline.text_encoder.model, theirs)
    assert_same_weights(pipeline.vae, AutoencoderKLWan.from_pretrained(sharded, subfolder="vae"))
    assert (pipeline.dtype_name, pipeline.vae.dtype) == ("bfloat16", torch.float32)


def test_weights_do_not_depend_on_the_files_any_more(reference: WanPipeline, tmp_path: Path) -> None:
    """Files that change under a running server do not reach its weights."""
    directory = tiny.save(reference, tmp_path)
    pipeline = load(locate(str(directory), load_format="auto"), device="cpu", dtype="float32", load_format="auto")
    before = pipeline.latents(tiny.VIDEO, on_step=tiny.ignore)
    for path in directory.rglob("*.safetensors"):
        with path.open("r+b") as file:
            file.seek(path.stat().st_size // 2)
            file.write(b"\0" * (path.stat().st_size // 2))
    assert torch.equal(pipeline.latents(tiny.VIDEO, on_step=tiny.ignore), before)


def test_the_vae_may_be_told_another_dtype(checkpoint: Checkpoint) -> None:
    """Exact is the default, not a must."""
    pipeline = load(checkpoint, **BFLOAT16, vae_dtype="bfloat16")
    frames = torch.cat(list(pipeline.generate(tiny.VIDEO, on_step=tiny.ignore)))
    assert (pipeline.vae.dtype, frames.shape) == (torch.bfloat16, torch.Size([5, 32, 48, 3]))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_dummy_weights_make_a_video_from_configs_alone(dtype: str, checkpoint_dir: Path, tmp_path: Path) -> None:
    """No weights, no tokenizer: pictures all the same, not flat, and the same ones for the next process."""
    copy = Path(
        shutil.copytree(
            checkpoint_dir, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors", "tokenizer*")
        )
    )
    checkpoint = locate(str(copy), load_format="dummy")
    first, second = (load(checkpoint, device="cpu", dtype=dtype, load_format="dummy") for _ in range(2))
    latents = first.latents(tiny.VIDEO, on_step=tiny.ignore)
    assert torch.isfinite(latents).all()
    assert torch.equal(latents, second.latents(tiny.VIDEO, on_step=tiny.ignore))
    frames = torch.cat(list(first.generate(tiny.VIDEO, on_step=tiny.ignore))).float()
    assert frames.std() > 5
    high, low = (first.transformers[expert].proj_out.weight for expert in Expert)
    assert not torch.equal(high, low), "the two experts are not one"


def test_dummy_weights_stay_finite_at_the_real_depth(reference: WanPipeline, tmp_path: Path) -> None:
    """40 layers and 24 of UMT5 in bf16: finite, and of the size that a real prediction has."""
    tiny.save(reference, tmp_path)
    for folder, changes in (
        ("transformer", {"num_layers": 40}),
        ("transformer_2", {"num_layers": 40}),
        ("text_encoder", {"num_layers": 24}),
    ):
        _edit(tmp_path / folder / "config.json", changes)
    pipeline = load(locate(str(tmp_path), load_format="dummy"), device="cpu", dtype="bfloat16", load_format="dummy")
    latents = pipeline.latents(tiny.video(num_inference_steps=2), on_step=tiny.ignore)
    assert 0.1 < latents.std() < 100


def _edit(path: Path, changes: dict[str, object]) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


# Parameters of a published model's expert and VAE.
PUBLISHED_SIZES = {
    T2V_A14B_ID: (14_288_491_584, 126_892_531),
    I2V_A14B_ID: (14_288_901_184, 126_892_531),
    TI2V_5B_ID: (4_999_787_712, 704_688_668),
}


@pytest.mark.parametrize("model_id", PUBLISHED_SIZES)
def test_the_published_shapes_are_those_of_the_published_models(model_id: str) -> None:
    """Parameter counts: 14.3 and 5.0 billion an expert, 5.7 billion of UMT5-XXL, 127 and 705 million of the VAEs."""
    configs = CONFIGS[model_id]
    with torch.device("meta"):
        models = (
            WanTransformer.from_config(dict(configs["transformer/config.json"])),
            AutoencoderKLWan.from_config(dict(configs["vae/config.json"])),
            umt5(configs["text_encoder/config.json"]),
        )
    counts = [sum(parameter.numel() for parameter in model.parameters()) for model in models]
    assert counts == [*PUBLISHED_SIZES[model_id], 5_680_910_336]


@pytest.fixture(scope="module")
def with_clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image-to-video model with CLIP, from first to last image, as diffusers saves it."""
    return tiny.save(tiny_images.make_i2v(tiny_images.FIRST_TO_LAST), tmp_path_factory.mktemp("clip"))


def test_an_image_encoder_is_the_one_that_transformers_loads(with_clip: Path) -> None:
    """CLIP in fp32 beside one expert in bf16, and the positions of two images in it."""
    pipeline = load(locate(str(with_clip), load_format="auto"), **BFLOAT16)
    assert pipeline.image_encoder is not None
    theirs = CLIPVisionModel.from_pretrained(with_clip / "image_encoder")
    assert_same_weights(pipeline.image_encoder.model, theirs)
    assert torch.equal(pipeline.image_encoder.model.embeddings.position_ids, theirs.embeddings.position_ids)
    processor = CLIPImageProcessorPil.from_pretrained(with_clip / "image_processor")
    assert pipeline.image_encoder.processor.to_dict() == processor.to_dict()
    expert = WanTransformer3DModel.from_pretrained(with_clip, subfolder="transformer", torch_dtype=torch.bfloat16)
    assert list(pipeline.transformers) == [Expert.HIGH_NOISE]
    assert_same_weights(pipeline.transformers[Expert.HIGH_NOISE], expert)
    assert expert.condition_embedder.image_embedder.pos_embed.shape == (1, 10, tiny_images.IMAGE_DIM)


def test_tensors_of_clip_go_by_either_name(with_clip: Path, tmp_path: Path) -> None:
    """Published files say `vision_model.` before the names, newer ones do not; a projection on top is left alone."""
    copy = Path(shutil.copytree(with_clip, tmp_path / "model"))
    path = copy / "image_encoder/model.safetensors"
    state = load_file(path)
    assert not any(name.startswith("vision_model.") for name in state)
    old = {f"vision_model.{name}": tensor for name, tensor in state.items()}
    save_file({**old, "visual_projection.weight": torch.zeros(8, tiny_images.IMAGE_DIM)}, path)
    encoder = load(locate(str(copy), load_format="auto"), **BFLOAT16).image_encoder
    assert encoder is not None
    assert_same_weights(encoder.model, CLIPVisionModel.from_pretrained(with_clip / "image_encoder"))


# What one video is made from: the images that it begins and ends with.
MADE = {
    "i2v": (tiny_images.make_i2v, ("first", "last")),
    "clip": (lambda: tiny_images.make_i2v(tiny_images.CLIP), ("first",)),
    "from first to last": (lambda: tiny_images.make_i2v(tiny_images.FIRST_TO_LAST), ("first", "last")),
    "ti2v": (tiny_images.make_ti2v, ("first",)),
    "ti2v without": (tiny_images.make_ti2v, ()),
}


@pytest.mark.parametrize("name", MADE)
def test_every_task_is_loaded_as_diffusers_saves_it(name: str, tmp_path: Path) -> None:
    """The same latents as from the pipeline in memory, and finite ones from random weights of the same configs."""
    make, wanted = MADE[name]
    theirs = make()
    tiny.save(theirs, tmp_path)
    side = 64
    pixels = {end: tiny_images.picture(side, side, seed).tobytes() for seed, end in enumerate(wanted)}
    boundary = theirs.config.boundary_ratio
    request = tiny.video(width=side, height=side, num_inference_steps=2, boundary_ratio=boundary, flow_shift=5.0)
    results = []
    for pipeline in (
        tiny_images.ours(theirs),
        *(load(locate(str(tmp_path), load_format=word), **{**FLOAT32, "load_format": word}) for word in LOAD_FORMATS),
    ):
        results.append(pipeline.latents(request, frames=InputFrames(**pixels), on_step=tiny.ignore))
    in_memory, loaded, random = results
    assert torch.equal(in_memory, loaded)
    assert torch.isfinite(random).all()
    assert random.std() > 0.1


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (
            lambda state: state.pop("blocks.0.attn1.to_q.bias"),
            "transformer/ lacks 1 tensors that its config asks for, ",
        ),
        (
            lambda state: state.update({"proj_out.bias": torch.zeros(3)}),
            "proj_out.bias is [3] where the config says [64]",
        ),
    ],
    ids=["missing", "of another shape"],
)
def test_tensors_that_do_not_fit_are_named(spoil: object, sentence: str, checkpoint_dir: Path, tmp_path: Path) -> None:
    """Files that do not fit their config are refused by the tensor's name."""
    copy = Path(shutil.copytree(checkpoint_dir, tmp_path / "model"))
    path = copy / "transformer/diffusion_pytorch_model.safetensors"
    state = load_file(path)
    spoil(state)
    save_file(state, path)
    with pytest.raises(UnusableModelError) as refused:
        load(locate(str(copy), load_format="auto"), device="cpu", dtype="float32", load_format="auto")
    assert sentence in str(refused.value)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"dtype": "float8"}, "dtype float8 is not one of bfloat16, float32"),
        ({"vae_dtype": "int8"}, "dtype int8 is not one of bfloat16, float32"),
        ({"load_format": "pt"}, "load format pt is not one of auto, dummy"),
        ({"device": "tpu"}, "device tpu is not one of auto, cuda, cuda:N, cpu"),
    ],
    ids=str,
)
def test_unknown_values_are_refused_by_name(changes: dict[str, str], sentence: str, checkpoint: Checkpoint) -> None:
    """With the values that exist."""
    with pytest.raises(UnusableModelError, match=sentence):
        load(checkpoint, **{**BFLOAT16, **changes})
