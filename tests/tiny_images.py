"""Small random image-to-video models made with diffusers' own classes, and what diffusers makes of images with them."""

from collections.abc import Mapping
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
from transformers import CLIPVisionConfig, CLIPVisionModel, PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from tests import tiny
from wan_grpc.domain.images import InputFrames
from wan_grpc.domain.request import VideoRequest
from wan_grpc.domain.variants import Expert
from wan_grpc.pipeline.image_encoder import ImageEncoder
from wan_grpc.pipeline.text import TextEncoder
from wan_grpc.pipeline.tokenizer import END, PAD, UNKNOWN, byte_tokenizer
from wan_grpc.pipeline.transformer import WanTransformer, here, torch_attention
from wan_grpc.pipeline.video import VideoPipeline

IMAGE_DIM = 24
NUM_IMAGE_TOKENS = 5
VAE_OF_A14B = {"base_dim": 4, "num_res_blocks": 1}
VAE_OF_5B = {
    "base_dim": 4,
    "decoder_base_dim": 8,
    "z_dim": 48,
    "num_res_blocks": 1,
    "is_residual": True,
    "patch_size": 2,
    "in_channels": 12,
    "out_channels": 12,
    "scale_factor_spatial": 16,
    "latents_mean": [0.02 * (index - 24) for index in range(48)],
    "latents_std": [0.5 + 0.03 * index for index in range(48)],
}
I2V = {"in_channels": 36, "out_channels": 16}
TI2V = {"in_channels": 48, "out_channels": 48}
CLIP = {**I2V, "image_dim": IMAGE_DIM, "added_kv_proj_dim": 24}
FIRST_TO_LAST = {**CLIP, "pos_embed_seq_len": 2 * NUM_IMAGE_TOKENS}


def make_i2v(transformer: Mapping[str, Any] = I2V, shape: Mapping[str, Any] = tiny.TRANSFORMER) -> WanPipeline:
    """I2V-A14B in miniature; with an `image_dim` in `transformer`, a model with one expert and CLIP as Wan2.1 has."""
    torch.manual_seed(3)
    config = {**shape, **transformer}
    has_clip = "image_dim" in config
    pipeline = WanImageToVideoPipeline(
        **_text_and_schedule(),
        vae=make_vae(VAE_OF_A14B),
        transformer=make_transformer(config),
        transformer_2=None if has_clip else make_transformer(config),
        image_encoder=_clip() if has_clip else None,
        image_processor=_clip_processor() if has_clip else None,
        boundary_ratio=None if has_clip else 0.9,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def make_ti2v(shape: Mapping[str, Any] = tiny.TRANSFORMER) -> WanPipeline:
    """TI2V-5B in miniature, as its checkpoint is published: a WanPipeline."""
    torch.manual_seed(4)
    pipeline = WanPipeline(
        **_text_and_schedule(),
        vae=make_vae(VAE_OF_5B),
        transformer=make_transformer({**shape, **TI2V}),
        transformer_2=None,
        boundary_ratio=None,
        expand_timesteps=True,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def with_images(pipeline: WanPipeline) -> WanImageToVideoPipeline:
    """The same components and configuration, in the pipeline that takes images."""
    made = WanImageToVideoPipeline(
        **pipeline.components,
        boundary_ratio=pipeline.config.boundary_ratio,
        expand_timesteps=pipeline.config.expand_timesteps,
    )
    made.set_progress_bar_config(disable=True)
    return made


def ours(theirs: WanPipeline | WanImageToVideoPipeline) -> VideoPipeline:
    """Our pipeline over the weights of diffusers' one."""
    experts = {Expert.HIGH_NOISE: theirs.transformer, Expert.LOW_NOISE: theirs.transformer_2}
    has_clip = getattr(theirs, "image_encoder", None) is not None
    return VideoPipeline(
        text_encoder=TextEncoder(theirs.tokenizer, theirs.text_encoder),
        transformers={expert: our_transformer(model) for expert, model in experts.items() if model is not None},
        vae=theirs.vae,
        scheduler_config=theirs.scheduler.config,
        device=theirs.vae.device,
        attention_name="torch_sdpa",
        image_encoder=ImageEncoder(theirs.image_processor, theirs.image_encoder) if has_clip else None,
        expand_timesteps=theirs.config.expand_timesteps,
    )


def our_transformer(theirs: WanTransformer3DModel) -> WanTransformer:
    transformer = WanTransformer.from_config(theirs.config).to(theirs.device).eval()
    transformer.load_state_dict(theirs.state_dict())
    transformer.set_attention(here(torch_attention))
    return transformer


def reference(
    pipeline: WanPipeline | WanImageToVideoPipeline,
    request: VideoRequest,
    *,
    first: Image.Image | None = None,
    last: Image.Image | None = None,
    output_type: str = "latent",
) -> torch.Tensor:
    """What diffusers makes of the request and its images; see `tiny.reference`."""
    takes_images = isinstance(pipeline, WanImageToVideoPipeline)
    images = {"image": first, "last_image": last} if takes_images else {}
    return tiny.reference(pipeline, request, output_type=output_type, **images)


def errors(
    ours: VideoPipeline, request: VideoRequest, frames: InputFrames, expected: tuple[torch.Tensor, torch.Tensor]
) -> tuple[float, float]:
    """How far our latents (relative L2) and frames (the worst sample) are from the expected ones."""
    latents = ours.latents(request, frames=frames, on_step=tiny.ignore)
    made = torch.cat(list(ours.generate(request, frames=frames, on_step=tiny.ignore))).float() / 255
    assert made.shape == expected[1].shape
    return tiny.relative_error(latents, expected[0]), float((made - expected[1]).abs().max())


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """Colours that change over the picture, with detail of every size."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 3, 3, 3, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear")
    noisy = (smooth + 0.3 * torch.rand(1, 3, height, width, generator=generator)).clamp(0, 1)
    pixels = (noisy[0] * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous()
    return Image.frombytes("RGB", (width, height), pixels.numpy().tobytes())


def frames_of(first: Image.Image | None, last: Image.Image | None = None) -> InputFrames:
    """Pictures of the size of the video, as the server hands them to the ranks."""
    return InputFrames(first=first and first.tobytes(), last=last and last.tobytes())


def make_transformer(config: Mapping[str, Any]) -> WanTransformer3DModel:
    """Random experts hardly hear text, image and time, which would hide what is wrong with them."""
    transformer = WanTransformer3DModel(**config).eval()
    with torch.no_grad():
        transformer.proj_out.weight.mul_(3.0)
        transformer.patch_embedding.weight[:, transformer.config.out_channels :].mul_(4.0)
        transformer.condition_embedder.time_proj.weight.mul_(4.0)
        if transformer.condition_embedder.image_embedder is not None and "pos_embed_seq_len" in config:
            transformer.condition_embedder.image_embedder.pos_embed.normal_()
        for block in transformer.blocks:
            for layer in (block.attn2.to_v, block.attn2.add_v_proj, block.attn2.to_out[0]):
                if layer is not None:
                    layer.weight.mul_(8.0)
    return transformer


def make_vae(config: Mapping[str, Any]) -> AutoencoderKLWan:
    """Random VAEs see and paint flat grey, which would hide any error."""
    vae = AutoencoderKLWan(**config).eval()
    with torch.no_grad():
        for part, factor in ((vae.encoder, 2.5), (vae.decoder, 1.7)):
            for module in part.modules():
                if isinstance(module, torch.nn.Conv2d | torch.nn.Conv3d):
                    module.weight.mul_(factor)
    return vae


def _text_and_schedule() -> dict[str, Any]:
    config = UMT5Config(vocab_size=259, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
    return {
        "tokenizer": PreTrainedTokenizerFast(
            tokenizer_object=byte_tokenizer(), pad_token=PAD, eos_token=END, unk_token=UNKNOWN
        ),
        "text_encoder": UMT5EncoderModel(config).eval(),
        "scheduler": UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0),
    }


def _clip() -> CLIPVisionModel:
    config = CLIPVisionConfig(
        hidden_size=IMAGE_DIM,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=32,
        patch_size=16,
    )
    return CLIPVisionModel(config).eval()


def _clip_processor() -> CLIPImageProcessorPil:
    return CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
