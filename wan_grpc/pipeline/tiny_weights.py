"""Makes the files of a tiny checkpoint: random weights, scaled so that its pictures are worth looking at.

Knows shapes and seeds. Does not know where the files are kept, nor how they are read.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from safetensors.torch import save
from tokenizers import Tokenizer
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModel

from wan_grpc.pipeline.layout import PREFIXES, WEIGHT_STEMS
from wan_grpc.pipeline.published import Configs
from wan_grpc.pipeline.text import umt5
from wan_grpc.pipeline.tokenizer import TOKENIZER_CONFIG, byte_tokenizer
from wan_grpc.pipeline.weights import random_weights

_CONTRAST: Final = 1.2
_BELLS: Final = {1: [1.0], 3: [0.25, 0.5, 0.25]}
_SEEDS: Final = {"text_encoder": 1, "transformer": 2, "transformer_2": 3, "vae": 4, "image_encoder": 5}


def write_model(directory: Path, configs: Configs) -> None:
    """Write configs, tokenizer and weights into `directory`, byte for byte the same every time."""
    models = {}
    for component in (name for name in WEIGHT_STEMS if f"{name}/config.json" in configs):
        model = models[component] = _model(component, configs[f"{component}/config.json"])
        random_weights(model, seed=_SEEDS[component], device=torch.device("cpu"), dtype=torch.float32)
        if isinstance(model, AutoencoderKLWan):
            _smooth(model)
    write_checkpoint(directory, configs, byte_tokenizer(), models)


def write_checkpoint(directory: Path, configs: Configs, tokenizer: Tokenizer, models: Mapping[str, nn.Module]) -> None:
    """Write what the published layout has: configs by their names, the tokenizer, weights by component, on the CPU."""
    for name, config in configs.items():
        _write_json(directory / name, config)
    _write_json(directory / "tokenizer/tokenizer_config.json", TOKENIZER_CONFIG)
    tokenizer.save(str(directory / "tokenizer/tokenizer.json"))
    for component, model in models.items():
        prefix = PREFIXES.get(component, "")
        state = {f"{prefix}{name}": parameter.detach() for name, parameter in model.named_parameters()}
        file = directory / component / f"{WEIGHT_STEMS[component]}.safetensors"
        file.write_bytes(save(state, metadata={"format": "pt"}))


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _model(component: str, config: Mapping[str, Any]) -> nn.Module:
    with torch.device("meta"):
        match component:
            case "text_encoder":
                model: nn.Module = umt5(config)
            case "image_encoder":
                model = CLIPVisionModel(CLIPVisionConfig.from_dict(dict(config)))
            case "vae":
                model = AutoencoderKLWan.from_config(dict(config))
            case _:
                model = WanTransformer3DModel.from_config(dict(config))
    return model


def _smooth(vae: AutoencoderKLWan) -> None:
    """Let every convolution blur, and the last one keep within the range of a picture: clouds rather than static."""
    for name, parameter in vae.named_parameters():
        if parameter.ndim > 2 and name.endswith("weight"):
            parameter.data.copy_(_blurring(parameter.data))
    last = vae.decoder.conv_out.weight.data.mul_(_CONTRAST)
    pixels = last.view(3, -1, *last.shape[1:])  # each colour of the pixels of a patch, of which there may be but one
    pixels.copy_(pixels[:, :1].expand_as(pixels).clone())


def _blurring(weight: torch.Tensor) -> torch.Tensor:
    """One value for each pair of channels, spread over the kernel as a bell that sums to 1. [out, in, ...]."""
    bell = torch.ones(())
    for width in weight.shape[2:]:
        bell = bell.unsqueeze(-1) * torch.tensor(_BELLS[width])
    corner = weight.flatten(2)[:, :, 0] * math.sqrt(bell.numel())
    return corner.reshape(*corner.shape, *(1 for _ in bell.shape)) * bell
