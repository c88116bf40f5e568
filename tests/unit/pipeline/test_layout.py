import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from wan_grpc.domain.errors import UnusableModelError
from wan_grpc.domain.variants import I2V_A14B, T2V_A14B, TI2V_5B, Defaults, Limits, ModelCard, Task
from wan_grpc.pipeline.checkpoint import DEFAULT_LIMITS, Checkpoint, locate, read_card
from wan_grpc.pipeline.published import (
    I2V_A14B_CONFIGS,
    I2V_A14B_ID,
    T2V_A14B_CONFIGS,
    T2V_A14B_ID,
    TI2V_5B_CONFIGS,
    TI2V_5B_ID,
    Configs,
)
from wan_grpc.pipeline.tiny import tiny_configs

INDEX = "model_index.json"
HIGH, LOW, VAE = "transformer/config.json", "transformer_2/config.json", "vae/config.json"
CLIP, PROCESSOR = "image_encoder/config.json", "image_processor/preprocessor_config.json"
NULL = [None, None]
CLIP_CONFIGS = tiny_configs(Task.IMAGE_TO_VIDEO, with_image_encoder=True)
ONLY = "; only WanPipeline and WanImageToVideoPipeline are served by this version"
ONE_EXPERT = {"boundary_ratio": None, "transformer_2": NULL}

Changes = Mapping[str, Mapping[str, Any]]


def write(directory: Path, configs: Configs, changes: Changes) -> Path:
    for name, config in configs.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({**config, **changes.get(name, {})}))
    return directory


def one_expert(defaults: Defaults, **changes: Any) -> Defaults:
    return replace(defaults, boundary_ratio=None, guidance_scale_2=defaults.guidance_scale, **changes)


# Configs, what is changed in them, and what is made of them: the defaults and whatever else of the card is not usual.
SERVED: dict[str, tuple[Configs, Changes, Defaults, dict[str, Any]]] = {
    "T2V-A14B": (T2V_A14B_CONFIGS, {}, T2V_A14B, {"task": Task.TEXT_TO_VIDEO}),
    "I2V-A14B": (
        I2V_A14B_CONFIGS,
        {},
        I2V_A14B,
        {"task": Task.IMAGE_TO_VIDEO, "takes_last_image": True},
    ),
    "I2V-A14B without a word of CLIP": (
        {**I2V_A14B_CONFIGS, INDEX: {k: v for k, v in I2V_A14B_CONFIGS[INDEX].items() if not k.startswith("image_")}},
        {},
        I2V_A14B,
        {"task": Task.IMAGE_TO_VIDEO, "takes_last_image": True},
    ),
    "TI2V-5B": (
        TI2V_5B_CONFIGS,
        {},
        TI2V_5B,
        {"task": Task.TEXT_IMAGE_TO_VIDEO, "size_multiple": 32, "sizes": ((1280, 704), (704, 1280))},
    ),
    "TI2V-5B in the pipeline of images": (
        TI2V_5B_CONFIGS,
        {INDEX: {"_class_name": "WanImageToVideoPipeline"}},
        TI2V_5B,
        {"task": Task.TEXT_IMAGE_TO_VIDEO, "size_multiple": 32, "sizes": ((1280, 704), (704, 1280))},
    ),
    "text-to-video with one expert": (
        T2V_A14B_CONFIGS,
        {INDEX: ONE_EXPERT, "scheduler/scheduler_config.json": {"flow_shift": 3}},
        one_expert(T2V_A14B, flow_shift=3.0),
        {"task": Task.TEXT_TO_VIDEO},
    ),
    "image-to-video with one expert": (
        I2V_A14B_CONFIGS,
        {INDEX: ONE_EXPERT},
        one_expert(I2V_A14B),
        {"task": Task.IMAGE_TO_VIDEO, "takes_last_image": True},
    ),
    "CLIP, for a first image": (
        {name: config for name, config in CLIP_CONFIGS.items() if name != "wan_grpc.json"},
        {},
        one_expert(I2V_A14B),
        {"task": Task.IMAGE_TO_VIDEO},
    ),
    "CLIP, from first to last image": (
        {name: config for name, config in CLIP_CONFIGS.items() if name != "wan_grpc.json"},
        {
            HIGH: {"pos_embed_seq_len": 2 * 5},
            INDEX: {"image_encoder": ["transformers", "CLIPVisionModelWithProjection"]},
        },
        one_expert(I2V_A14B),
        {"task": Task.IMAGE_TO_VIDEO, "takes_last_image": True, "needs_last_image": True},
    ),
    "CLIP that the experts do not listen to": (
        {**I2V_A14B_CONFIGS, CLIP: CLIP_CONFIGS[CLIP], PROCESSOR: {**CLIP_CONFIGS[PROCESSOR], "crop_size": 28}},
        {
            INDEX: {
                "image_encoder": ["transformers", "CLIPVisionModel"],
                "image_processor": ["transformers", "CLIPImageProcessorFast"],
            }
        },
        I2V_A14B,
        {"task": Task.IMAGE_TO_VIDEO, "takes_last_image": True},
    ),
    "a VAE that halves once more": (
        T2V_A14B_CONFIGS,
        {
            VAE: {
                "dim_mult": [1, 1, 1, 1, 1],
                "temperal_downsample": [False, False, True, True],
                "scale_factor_spatial": 16,
            }
        },
        T2V_A14B,
        {"task": Task.TEXT_TO_VIDEO, "size_multiple": 32},
    ),
    "few positions": (
        T2V_A14B_CONFIGS,
        {HIGH: {"rope_max_seq_len": 8}, LOW: {"rope_max_seq_len": 8}},
        T2V_A14B,
        {"task": Task.TEXT_TO_VIDEO, "max_side": 8 * 16, "limits": replace(DEFAULT_LIMITS, max_num_frames=7 * 4 + 1)},
    ),
}


@pytest.mark.parametrize("name", SERVED)
def test_layouts_that_are_served(name: str, tmp_path: Path) -> None:
    """Task, defaults, sizes and what is needed beside the prompt follow from the files."""
    configs, changes, defaults, card = SERVED[name]
    checkpoint = locate(str(write(tmp_path, configs, changes)), load_format="dummy")
    usual = {"size_multiple": 16, "limits": DEFAULT_LIMITS, "sizes": ((1280, 720), (720, 1280), (832, 480), (480, 832))}
    assert read_card(checkpoint, model_id="mine") == ModelCard(
        **{**usual, "model_id": "mine", "defaults": defaults, **card}
    )


@pytest.mark.parametrize(
    ("model_id", "layout"), [(T2V_A14B_ID, "T2V-A14B"), (I2V_A14B_ID, "I2V-A14B"), (TI2V_5B_ID, "TI2V-5B")]
)
def test_the_published_shapes_need_no_files(model_id: str, layout: str) -> None:
    """Random weights of a published model have its card, and the limits let its default size pass."""
    checkpoint = locate(model_id, load_format="dummy")
    assert checkpoint == Checkpoint(model_path=model_id, directory=None)
    card = read_card(checkpoint, model_id=model_id)
    _, _, defaults, others = SERVED[layout]
    assert (card.defaults, card.task, card.limits) == (defaults, others["task"], Limits())
    assert all(width * height <= card.limits.max_area for width, height in card.sizes)
    assert card.defaults.num_frames <= card.limits.max_num_frames


# Configs, what is changed in them, and the one sentence that is said.
REFUSED: dict[str, tuple[Configs, Changes, str]] = {
    "VACE": (
        T2V_A14B_CONFIGS,
        {INDEX: {"_class_name": "WanVACEPipeline"}},
        f"{INDEX}: _class_name is WanVACEPipeline, a VACE model{ONLY}",
    ),
    "Animate": (
        T2V_A14B_CONFIGS,
        {INDEX: {"_class_name": "WanAnimatePipeline"}},
        f"{INDEX}: _class_name is WanAnimatePipeline, an Animate model{ONLY}",
    ),
    "video to video": (
        T2V_A14B_CONFIGS,
        {INDEX: {"_class_name": "WanVideoToVideoPipeline"}},
        f"{INDEX}: _class_name is WanVideoToVideoPipeline, a video-to-video model{ONLY}",
    ),
    "another family": (
        T2V_A14B_CONFIGS,
        {INDEX: {"_class_name": "FluxPipeline"}},
        f"{INDEX}: _class_name is FluxPipeline{ONLY}",
    ),
    "no family": (
        T2V_A14B_CONFIGS,
        {INDEX: {"_class_name": ["WanPipeline"]}},
        f"{INDEX}: _class_name is ['WanPipeline']{ONLY}",
    ),
    "a transformer of VACE": (
        T2V_A14B_CONFIGS,
        {INDEX: {"transformer": ["diffusers", "WanVACETransformer3DModel"]}},
        f"{INDEX}: transformer is a WanVACETransformer3DModel; only WanTransformer3DModel is served by this version",
    ),
    "the low-noise expert alone": (
        T2V_A14B_CONFIGS,
        {INDEX: {"transformer": NULL}},
        f"{INDEX} has no transformer",
    ),
    "a boundary and one expert": (
        T2V_A14B_CONFIGS,
        {INDEX: {"transformer_2": NULL}},
        f"{INDEX}: boundary_ratio is 0.875, and there is no transformer_2 below it",
    ),
    "two experts and no boundary": (
        I2V_A14B_CONFIGS,
        {INDEX: {"boundary_ratio": None}},
        f"{INDEX}: boundary_ratio is None; between 0 and 1 is needed with two experts",
    ),
    "a boundary outside": (
        I2V_A14B_CONFIGS,
        {INDEX: {"boundary_ratio": 900}},
        f"{INDEX}: boundary_ratio is 900; between 0 and 1 is needed with two experts",
    ),
    "a boundary that is none": (
        I2V_A14B_CONFIGS,
        {INDEX: {"boundary_ratio": True}},
        f"{INDEX}: boundary_ratio is True; between 0 and 1 is needed with two experts",
    ),
    "timesteps of tokens with two experts": (
        T2V_A14B_CONFIGS,
        {INDEX: {"expand_timesteps": True}},
        f"{INDEX}: expand_timesteps is true, and there is a transformer_2; such a model has one expert",
    ),
    "timesteps of tokens, perhaps": (
        TI2V_5B_CONFIGS,
        {INDEX: {"expand_timesteps": "yes"}},
        f"{INDEX}: expand_timesteps is 'yes', neither true nor false",
    ),
    "image-to-video in the pipeline of text": (
        I2V_A14B_CONFIGS,
        {INDEX: {"_class_name": "WanPipeline"}},
        f"{HIGH}: in_channels is 36; text-to-video with z_dim 16 in {VAE} has 16",
    ),
    "text-to-video in the pipeline of images": (
        T2V_A14B_CONFIGS,
        {INDEX: {"_class_name": "WanImageToVideoPipeline"}},
        f"{HIGH}: in_channels is 16; image-to-video with z_dim 16 in {VAE} has 36",
    ),
    "channels of no task": (
        TI2V_5B_CONFIGS,
        {HIGH: {"in_channels": 100}},
        f"{HIGH}: in_channels is 100; text-and-image-to-video with z_dim 48 in {VAE} has 48",
    ),
    "channels out of no VAE": (
        TI2V_5B_CONFIGS,
        {HIGH: {"out_channels": 16}},
        f"{HIGH}: out_channels is 16; {VAE} has z_dim 48",
    ),
    "as many channels out as in": (
        I2V_A14B_CONFIGS,
        {HIGH: {"out_channels": None}, LOW: {"out_channels": None}},
        f"{HIGH}: out_channels is None; {VAE} has z_dim 16",
    ),
    "another low-noise expert": (
        I2V_A14B_CONFIGS,
        {LOW: {"in_channels": 16}},
        f"{LOW}: in_channels is 16; {HIGH} has 36",
    ),
    "the statistics of another VAE": (
        TI2V_5B_CONFIGS,
        {VAE: {"latents_std": [1.0] * 16}},
        f"{VAE}: latents_std has 16 values; z_dim is 48",
    ),
    "a VAE of no statistics": (
        T2V_A14B_CONFIGS,
        {VAE: {"z_dim": 4}, HIGH: {"in_channels": 4, "out_channels": 4}, LOW: {"in_channels": 4, "out_channels": 4}},
        f"{VAE}: latents_mean has 16 values; z_dim is 4; {VAE}: latents_std has 16 values; z_dim is 4",
    ),
    "a VAE with another patch": (
        TI2V_5B_CONFIGS,
        {VAE: {"patch_size": None, "scale_factor_spatial": 8}},
        f"{VAE}: in_channels is 12; patch_size None makes 3 of red, green and blue; "
        f"{VAE}: out_channels is 12; patch_size None makes 3 of red, green and blue",
    ),
    "a VAE with another factor": (
        TI2V_5B_CONFIGS,
        {VAE: {"scale_factor_spatial": 8, "scale_factor_temporal": 8}},
        f"{VAE}: scale_factor_spatial is 8; dim_mult and patch_size make 16; "
        f"{VAE}: scale_factor_temporal is 8; temperal_downsample makes 4",
    ),
    "a VAE with a step too many": (
        T2V_A14B_CONFIGS,
        {VAE: {"dim_mult": [1, 2]}},
        f"{VAE}: temperal_downsample is [False, True, True]; dim_mult [1, 2] needs one value less than its own",
    ),
    "the text encoder of another model": (
        T2V_A14B_CONFIGS,
        {"text_encoder/config.json": {"d_model": 512}},
        f"{HIGH}: text_dim is 4096; text_encoder/config.json has d_model 512",
    ),
    "an expert that listens to nobody": (
        I2V_A14B_CONFIGS,
        {HIGH: {"image_dim": 1280}, LOW: {"image_dim": 1280}},
        f"{HIGH}: image_dim is 1280; {INDEX} has no image_encoder",
    ),
    "text-to-video that listens to images": (
        T2V_A14B_CONFIGS,
        {HIGH: {"image_dim": 1280}, LOW: {"image_dim": 1280}},
        f"{HIGH}: image_dim is 1280; text-to-video has null",
    ),
    "another CLIP": (
        CLIP_CONFIGS,
        {CLIP: {"hidden_size": 1280}},
        f"{HIGH}: image_dim is 32; {CLIP} has hidden_size 1280",
    ),
    "no keys for images": (
        CLIP_CONFIGS,
        {HIGH: {"added_kv_proj_dim": None}},
        f"{HIGH}: added_kv_proj_dim is None; its heads make 96, which is needed with an image_dim",
    ),
    "positions of another CLIP": (
        CLIP_CONFIGS,
        {HIGH: {"pos_embed_seq_len": 514}},
        f"{HIGH}: pos_embed_seq_len is 514; two images in image_encoder/ have 10 tokens",
    ),
    "images of another size": (
        CLIP_CONFIGS,
        {PROCESSOR: {"crop_size": {"height": 224, "width": 224}}},
        f"{PROCESSOR}: crop_size is {{'height': 224, 'width': 224}} with do_center_crop True; {CLIP} has image_size 28",
    ),
    "images of any size": (
        CLIP_CONFIGS,
        {PROCESSOR: {"do_center_crop": False}},
        f"{PROCESSOR}: crop_size is {{'height': 28, 'width': 28}} with do_center_crop False; {CLIP} has image_size 28",
    ),
    "no image processor": (
        CLIP_CONFIGS,
        {INDEX: {"image_processor": NULL}},
        f"{INDEX} has an image_encoder and no image_processor",
    ),
    "an image encoder that is none": (
        CLIP_CONFIGS,
        {INDEX: {"image_encoder": ["transformers", "SiglipVisionModel"]}},
        f"{INDEX}: image_encoder is a SiglipVisionModel; only CLIPVisionModel or "
        "CLIPVisionModelWithProjection is served by this version",
    ),
    "numbers that are none": (
        T2V_A14B_CONFIGS,
        {HIGH: {"in_channels": "16", "patch_size": [2, 2, 2]}, VAE: {"latents_mean": [], "temperal_downsample": [1]}},
        f"{HIGH}: in_channels is '16'; a whole number above 0 is needed; "
        f"{HIGH}: patch_size is [2, 2, 2]; [1, n, n] is needed; "
        f"{VAE}: latents_mean is []; a list of numbers is needed; "
        f"{VAE}: temperal_downsample is [1]; a list of true and false is needed",
    ),
    "a shift that is none": (
        T2V_A14B_CONFIGS,
        {"scheduler/scheduler_config.json": {"flow_shift": 0}},
        "scheduler/scheduler_config.json: flow_shift is 0; a number above 0 is needed",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_layouts_that_are_not_served(name: str, tmp_path: Path) -> None:
    """What does not fit is said before anything is loaded: the file, the value and what would fit, and nothing else."""
    configs, changes, sentence = REFUSED[name]
    with pytest.raises(UnusableModelError) as refused:
        locate(str(write(tmp_path, configs, changes)), load_format="dummy")
    assert str(refused.value).removeprefix(f"{tmp_path} cannot be served: ") == sentence


@pytest.mark.parametrize("component", ["image_encoder", "image_processor", "transformer_2"])
def test_what_the_index_names_must_be_there(component: str, tmp_path: Path) -> None:
    """A component that is null may be missing; one that is named may not."""
    configs = {**CLIP_CONFIGS, INDEX: {**CLIP_CONFIGS[INDEX], "boundary_ratio": 0.9}}
    configs[INDEX]["transformer_2"] = ["diffusers", "WanTransformer3DModel"]
    configs[LOW] = configs[HIGH]
    write(tmp_path, {name: config for name, config in configs.items() if not name.startswith(f"{component}/")}, {})
    with pytest.raises(UnusableModelError, match=f"^{tmp_path} cannot be served: {component}/ is missing$"):
        locate(str(tmp_path), load_format="dummy")
