"""Tiny checkpoints with random weights in the published layouts, small enough to be made on the spot.

Knows their configs. Imports no torch: the weights are made by tiny_weights.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from wan_grpc.domain.errors import UnusableModelError
from wan_grpc.domain.variants import Task
from wan_grpc.pipeline.checkpoint import EXTRA_NAME
from wan_grpc.pipeline.published import I2V_A14B_CONFIGS, T2V_A14B_CONFIGS, TI2V_5B_CONFIGS, Configs

TEXT_DIM: Final = 64
IMAGE_DIM: Final = 32
_NUM_HEADS: Final = 4
_HEAD_DIM: Final = 24
_PUBLISHED: Final[Mapping[Task, Configs]] = {
    Task.TEXT_TO_VIDEO: T2V_A14B_CONFIGS,
    Task.IMAGE_TO_VIDEO: I2V_A14B_CONFIGS,
    Task.TEXT_IMAGE_TO_VIDEO: TI2V_5B_CONFIGS,
}
_TINIER: Final[Configs] = {
    "model_index.json": {
        "_diffusers_version": "0.42.0",
        "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
    },
    "text_encoder/config.json": {
        "d_ff": 128,
        "d_kv": 16,
        "d_model": TEXT_DIM,
        "num_decoder_layers": 2,
        "num_heads": 4,
        "num_layers": 2,
        "vocab_size": 259,
    },
    "transformer/config.json": {
        "attention_head_dim": _HEAD_DIM,
        "ffn_dim": 192,
        "num_attention_heads": _NUM_HEADS,
        "num_layers": 2,
        "text_dim": TEXT_DIM,
    },
    "vae/config.json": {"base_dim": 8, "num_res_blocks": 1},
}
"""What is smaller than in the published configs."""
_DEFAULTS: Final[Mapping[Task, Mapping[str, Any]]] = {
    Task.TEXT_TO_VIDEO: {"guidance_scale": 4.0, "guidance_scale_2": 3.0, "height": 96, "width": 128},
    Task.IMAGE_TO_VIDEO: {"guidance_scale": 3.5, "height": 96, "width": 128},
    Task.TEXT_IMAGE_TO_VIDEO: {"guidance_scale": 5.0, "height": 128, "width": 192},
}
_IMAGE_ENCODER: Final[Configs] = {
    "image_encoder/config.json": {
        "architectures": ["CLIPVisionModel"],
        "hidden_act": "gelu",
        "hidden_size": IMAGE_DIM,
        "image_size": 28,
        "intermediate_size": 64,
        "layer_norm_eps": 1e-05,
        "model_type": "clip_vision_model",
        "num_attention_heads": 2,
        "num_channels": 3,
        "num_hidden_layers": 3,
        "patch_size": 14,
        "projection_dim": 16,
    },
    "image_processor/preprocessor_config.json": {
        "crop_size": {"height": 28, "width": 28},
        "do_center_crop": True,
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_processor_type": "CLIPImageProcessor",
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "resample": 3,
        "rescale_factor": 1 / 255,
        "size": {"shortest_edge": 28},
    },
}


def make_tiny_model(directory: Path, *, task: Task = Task.TEXT_TO_VIDEO, with_image_encoder: bool = False) -> None:
    """Write a checkpoint for `task` into `directory`, which is made if need be: the same bytes every time.

    with_image_encoder: for image-to-video, one expert that sees its image through CLIP too, as Wan2.1 has it.

    Raises:
        UnusableModelError: `directory` holds something already.
    """
    from wan_grpc.pipeline import tiny_weights  # brings torch, which the server process must stay free of

    if directory.exists() and any(directory.iterdir()):
        raise UnusableModelError(f"{directory} is not empty")
    tiny_weights.write_model(directory, tiny_configs(task, with_image_encoder=with_image_encoder))


def tiny_configs(task: Task, *, with_image_encoder: bool = False) -> Configs:
    """The JSON files of a tiny checkpoint by their names, but for the tokenizer's."""
    assert not with_image_encoder or task is Task.IMAGE_TO_VIDEO, f"{task} has no image encoder"
    published = dict(_PUBLISHED[task])
    configs = {name: {**config, **_TINIER.get(_shared(name), {})} for name, config in published.items()}
    if task is Task.TEXT_IMAGE_TO_VIDEO:
        configs["vae/config.json"]["decoder_base_dim"] = 12
    if with_image_encoder:
        _add_image_encoder(configs)
    defaults = {"fps": 8, "num_frames": 25, "num_inference_steps": 10, **_DEFAULTS[task]}
    configs[EXTRA_NAME] = {"defaults": defaults}
    return configs


def _shared(name: str) -> str:
    """The name under which the config of either expert is found."""
    return name.replace("transformer_2/", "transformer/")


def _add_image_encoder(configs: dict[str, dict[str, Any]]) -> None:
    """CLIP beside one expert that listens to it."""
    del configs["transformer_2/config.json"]
    configs["transformer/config.json"] |= {"image_dim": IMAGE_DIM, "added_kv_proj_dim": _NUM_HEADS * _HEAD_DIM}
    configs["model_index.json"] |= {
        "boundary_ratio": None,
        "image_encoder": ["transformers", "CLIPVisionModel"],
        "image_processor": ["transformers", "CLIPImageProcessor"],
        "transformer_2": [None, None],
    }
    configs.update({name: dict(config) for name, config in _IMAGE_ENCODER.items()})
