"""Small random checkpoints made with diffusers' own classes, and what diffusers makes of a request with them."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKLWan,
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
)
from PIL import Image
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from wan_grpc.domain.events import Progress
from wan_grpc.domain.formats import OutputFormat
from wan_grpc.domain.request import VideoRequest
from wan_grpc.pipeline.tokenizer import END, PAD, UNKNOWN, byte_tokenizer

VIDEO = VideoRequest(
    prompt="A cat walks on the grass",
    negative_prompt="blurry",
    width=48,
    height=32,
    num_frames=5,
    fps=8,
    num_inference_steps=6,
    guidance_scale=4.0,
    guidance_scale_2=3.0,
    flow_shift=12.0,
    boundary_ratio=0.875,
    seed=7,
    output_format=OutputFormat.RAW_RGB24,
)
"""A request whose schedule crosses the experts: 4 steps of the high-noise one, then 2 of the other."""

TRANSFORMER = {"num_attention_heads": 2, "attention_head_dim": 12, "ffn_dim": 48, "num_layers": 2, "text_dim": 32}


def video(**changes: Any) -> VideoRequest:
    return replace(VIDEO, **changes)


def make_pipeline(seed: int = 0, transformer: Mapping[str, Any] = TRANSFORMER) -> WanPipeline:
    """A T2V-A14B pipeline in miniature, as diffusers builds it, with weights that let every input matter."""
    torch.manual_seed(seed)
    config = UMT5Config(vocab_size=259, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
    pipeline = WanPipeline(
        tokenizer=PreTrainedTokenizerFast(
            tokenizer_object=byte_tokenizer(), pad_token=PAD, eos_token=END, unk_token=UNKNOWN
        ),
        text_encoder=UMT5EncoderModel(config).eval(),
        vae=_contrasty(AutoencoderKLWan(base_dim=4, num_res_blocks=1).eval()),
        scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=12.0),
        transformer=_attentive(WanTransformer3DModel(**transformer).eval()),
        transformer_2=_attentive(WanTransformer3DModel(**transformer).eval()),
        boundary_ratio=0.875,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def save(pipeline: WanPipeline, directory: Path) -> Path:
    """Write the pipeline as diffusers publishes it."""
    pipeline.save_pretrained(directory, safe_serialization=True)
    return directory


def reference(
    pipeline: WanPipeline | WanImageToVideoPipeline,
    request: VideoRequest,
    *,
    output_type: str = "latent",
    **images: Image.Image | None,
) -> torch.Tensor:
    """What diffusers makes of the request: latents [1, C, F, h, w], or frames [F, H, W, 3] from 0 to 1 for `np`.

    images: arguments of the pipeline, for one that takes them.
    """
    pipeline.scheduler = UniPCMultistepScheduler.from_config(pipeline.scheduler.config, flow_shift=request.flow_shift)
    pipeline.register_to_config(boundary_ratio=request.boundary_ratio)
    output = pipeline(
        **images,
        prompt=request.prompt,
        negative_prompt=request.negative_prompt,
        height=request.height,
        width=request.width,
        num_frames=request.num_frames,
        num_inference_steps=request.num_inference_steps,
        guidance_scale=request.guidance_scale,
        guidance_scale_2=None if request.boundary_ratio is None else request.guidance_scale_2,
        generator=torch.Generator("cpu").manual_seed(request.seed),
        output_type=output_type,
    ).frames
    return output if output_type == "latent" else torch.from_numpy(output[0])


def ignore(progress: Progress) -> None:
    """An on_step for those who only want the result."""


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative L2 distance."""
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


def _attentive(transformer: WanTransformer3DModel) -> WanTransformer3DModel:
    """Random experts hardly hear the text, which would hide a wrong prompt or guidance."""
    with torch.no_grad():
        transformer.proj_out.weight.mul_(3.0)
        for block in transformer.blocks:
            for layer in (block.attn2.to_v, block.attn2.to_out[0]):
                layer.weight.mul_(8.0)
    return transformer


def _contrasty(vae: AutoencoderKLWan) -> AutoencoderKLWan:
    """Random decoders paint flat grey, which would hide any error."""
    with torch.no_grad():
        for module in vae.decoder.modules():
            if isinstance(module, torch.nn.Conv2d | torch.nn.Conv3d):
                module.weight.mul_(1.7)
    return vae
