"""The checkpoint that these tests serve: diffusers' own classes, each stage as long as the tests need it."""

import torch
from diffusers import AutoencoderKLWan, WanPipeline
from transformers import UMT5Config, UMT5EncoderModel

from tests import tiny


def make_pipeline() -> WanPipeline:
    """One whose text encoder takes its time, so that tests can act meanwhile, and whose pictures are cheap."""
    pipeline = tiny.make_pipeline()
    torch.manual_seed(1)
    config = UMT5Config(vocab_size=259, d_model=32, d_kv=32, d_ff=512, num_layers=4, num_heads=8)
    pipeline.register_modules(text_encoder=UMT5EncoderModel(config).eval(), vae=_make_vae())
    return pipeline


def _make_vae() -> AutoencoderKLWan:
    vae = AutoencoderKLWan(
        base_dim=2,
        num_res_blocks=0,
        dim_mult=[1, 1, 1],
        temperal_downsample=[True, True],
        patch_size=2,
        in_channels=12,
        out_channels=12,
    )
    _increase_contrast(vae)
    return vae.eval()


def _increase_contrast(vae: AutoencoderKLWan) -> None:
    """Random decoders paint flat grey, which would hide any error."""
    with torch.no_grad():
        for module in vae.decoder.modules():
            if isinstance(module, torch.nn.Conv2d | torch.nn.Conv3d):
                module.weight.mul_(1.7)
