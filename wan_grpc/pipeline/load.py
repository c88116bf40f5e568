"""A checkpoint becomes a pipeline on one device.

Knows the components, their dtypes and where each comes from. Does not know what they compute together.
"""

from collections.abc import Callable
from typing import Final, TypeVar

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed
from torch import nn
from transformers import (
    AutoTokenizer,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    CLIPVisionModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    UMT5EncoderModel,
)

from wan_grpc.domain.errors import UnusableModelError
from wan_grpc.domain.variants import Expert, Task
from wan_grpc.pipeline.checkpoint import DUMMY, LOAD_FORMATS, Checkpoint
from wan_grpc.pipeline.device import resolve_device
from wan_grpc.pipeline.image_encoder import ImageEncoder
from wan_grpc.pipeline.layout import PREFIXES
from wan_grpc.pipeline.text import TextEncoder, umt5
from wan_grpc.pipeline.tokenizer import END, PAD, UNKNOWN, byte_tokenizer, read_tokenizer
from wan_grpc.pipeline.transformer import AttentionFunction, WanTransformer, here, torch_attention
from wan_grpc.pipeline.video import VideoPipeline
from wan_grpc.pipeline.weights import random_weights, read_weights

DTYPES: Final = {"bfloat16": torch.bfloat16, "float32": torch.float32}
_DUMMY_SEEDS: Final = {"text_encoder": 1, "vae": 2, "transformer": 3, "transformer_2": 4, "image_encoder": 5}

M = TypeVar("M", bound=nn.Module)


def load(
    checkpoint: Checkpoint,
    *,
    device: str,
    dtype: str,
    load_format: str,
    attention: AttentionFunction | None = None,
    attention_name: str = "torch_sdpa",
    vae_dtype: str = "float32",
) -> VideoPipeline:
    """Build every component on `device` and fill it from the checkpoint, or with random values (`dummy`).

    dtype: of the experts and the text encoder, `bfloat16` or `float32`; norms and modulation stay in fp32, and so does
        the image encoder, which runs once a video.
    attention: self-attention of the experts, torch's own if None; `attention_name` is what operators read.
    vae_dtype: fp32 unless told, as the reference runs it: on an H200 that costs 1 s of decoding an 81-frame 480p video,
        and rounding in the last layers would show in flat areas.

    Raises:
        UnusableModelError: the device or a value is not to be had, or the files do not fit their configs.
    """
    builder = _Builder(checkpoint, torch.device(resolve_device(device)), is_dummy=_is_dummy(load_format))
    compute, vae = _dtype(dtype), _dtype(vae_dtype)
    transformers = {Expert.HIGH_NOISE: builder.transformer("transformer", compute)}
    if checkpoint.has_two_experts:
        transformers[Expert.LOW_NOISE] = builder.transformer("transformer_2", compute)
    for transformer in transformers.values():
        transformer.set_attention(here(attention or torch_attention))
    return VideoPipeline(
        text_encoder=TextEncoder(load_tokenizer(checkpoint), builder.text_model(compute)),
        transformers=transformers,
        vae=builder.vae(vae),
        scheduler_config=checkpoint.component("scheduler"),
        device=builder.device,
        attention_name=attention_name,
        image_encoder=builder.image_encoder() if checkpoint.embeds_images else None,
        expand_timesteps=checkpoint.task is Task.TEXT_IMAGE_TO_VIDEO,
    )


def load_tokenizer(checkpoint: Checkpoint) -> PreTrainedTokenizerBase:
    """The checkpoint's own; where it brings none, which random weights allow, that of bytes."""
    folder = checkpoint.tokenizer_folder
    if folder is not None and (folder / "tokenizer.json").is_file():
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        return tokenizer
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=byte_tokenizer() if folder is None else read_tokenizer(folder),
        pad_token=PAD,
        eos_token=END,
        unk_token=UNKNOWN,
    )


def _is_dummy(load_format: str) -> bool:
    if load_format not in LOAD_FORMATS:
        raise UnusableModelError(f"load format {load_format} is not one of {', '.join(LOAD_FORMATS)}")
    return load_format == DUMMY


def _dtype(name: str) -> torch.dtype:
    if name not in DTYPES:
        raise UnusableModelError(f"dtype {name} is not one of {', '.join(DTYPES)}")
    return DTYPES[name]


class _Builder:
    """Makes each component on the meta device, where shapes cost nothing, then fills it where it is to stay."""

    def __init__(self, checkpoint: Checkpoint, device: torch.device, *, is_dummy: bool) -> None:
        self.device = device
        self._checkpoint = checkpoint
        self._is_dummy = is_dummy

    def transformer(self, component: str, dtype: torch.dtype) -> WanTransformer:
        config = dict(self._checkpoint.component(component))
        model: WanTransformer = self._fill(component, lambda: WanTransformer.from_config(config), dtype)
        # The tables of positions are no weights: they come from no file, and must not stay on the meta device.
        model.rope = WanRotaryPosEmbed(
            model.config["attention_head_dim"], model.config["patch_size"], model.config["rope_max_seq_len"]
        ).to(self.device)
        return model

    def vae(self, dtype: torch.dtype) -> AutoencoderKLWan:
        config = dict(self._checkpoint.component("vae"))
        model: AutoencoderKLWan = self._fill("vae", lambda: AutoencoderKLWan.from_config(config), dtype)
        return model

    def text_model(self, dtype: torch.dtype) -> UMT5EncoderModel:
        return self._fill("text_encoder", lambda: umt5(self._checkpoint.component("text_encoder")), dtype)

    def image_encoder(self) -> ImageEncoder:
        config = CLIPVisionConfig.from_dict(dict(self._checkpoint.component("image_encoder")))
        model = self._fill("image_encoder", lambda: CLIPVisionModel(config), torch.float32)
        # As the tables of positions above.
        positions = torch.arange(model.embeddings.num_positions, device=self.device)[None]
        model.embeddings.register_buffer("position_ids", positions, persistent=False)
        # Pillow's resampling whatever else is installed, so that one image means one embedding.
        processor = CLIPImageProcessorPil.from_dict(dict(self._checkpoint.component("image_processor")))
        return ImageEncoder(processor, model)

    def _fill(self, component: str, make: Callable[[], M], dtype: torch.dtype) -> M:
        with torch.device("meta"):
            model = make()
        in_fp32 = getattr(model, "_keep_in_fp32_modules", None) if component.startswith("transformer") else None
        if self._is_dummy:
            seed = _DUMMY_SEEDS[component]
            random_weights(model, seed=seed, device=self.device, dtype=dtype, in_fp32=in_fp32 or ())
        else:
            files = self._checkpoint.weight_files(component)
            prefix = PREFIXES.get(component, "")
            read_weights(model, files, device=self.device, dtype=dtype, in_fp32=in_fp32 or (), prefix=prefix)
        return model.eval().requires_grad_(False)
