from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FirstBlockCacheConfig, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel

from tests import tiny, tiny_images
from wan_grpc.domain.variants import Expert
from wan_grpc.pipeline.checkpoint import locate
from wan_grpc.pipeline.load import load
from wan_grpc.pipeline.transformer import WanTransformer, here, torch_attention
from wan_grpc.pipeline.video import VideoPipeline

# Wide and deep enough for bf16 to round as it does in the real model.
WIDER = {"num_attention_heads": 4, "attention_head_dim": 32, "ffn_dim": 256, "num_layers": 6, "text_dim": 32}


@pytest.fixture(scope="module")
def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Latents, timestep and text of one forward."""
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(1, 16, 3, 8, 10, generator=generator)
    return latents, torch.tensor([900]), torch.randn(1, 512, 32, generator=generator)


@torch.no_grad()
def test_from_pretrained_gives_the_forward_of_diffusers(
    checkpoint_dir: Path, reference: WanPipeline, inputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
) -> None:
    """The loader of diffusers fills our class, and both forwards agree, with and without our attention."""
    transformer = WanTransformer.from_pretrained(checkpoint_dir, subfolder="transformer_2")
    expected = reference.transformer_2(*inputs, return_dict=False)[0]
    assert tiny.relative_error(transformer(*inputs).sample, expected) < 1e-6
    transformer.set_attention(here(torch_attention))
    assert tiny.relative_error(transformer.predict(*inputs), expected) < 1e-6


@torch.no_grad()
def test_self_attention_goes_through_the_given_function(
    pipeline: VideoPipeline, checkpoint_dir: Path, inputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
) -> None:
    """Once a block, over [B, S, H, D], and what it returns is what is used."""
    shapes: list[tuple[torch.Size, ...]] = []

    def blind(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        shapes.append((query.shape, key.shape, value.shape))
        return torch.zeros_like(query)

    transformer = WanTransformer.from_pretrained(checkpoint_dir, subfolder="transformer")
    transformer.set_attention(here(blind))
    changed = transformer.predict(*inputs)
    assert shapes == [(torch.Size([1, 3 * 4 * 5, 2, 12]),) * 3] * 2
    assert not torch.equal(changed, pipeline.transformers[Expert.HIGH_NOISE].predict(*inputs))


@torch.no_grad()
def test_bf16_rounds_no_more_than_diffusers(
    tmp_path: Path, inputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
) -> None:
    """Error of a bf16 forward against fp32: at most 1.1 times that of diffusers in bf16 on the same input."""
    tiny.save(tiny.make_pipeline(transformer=WIDER), tmp_path)
    checkpoint = locate(str(tmp_path), load_format="auto")
    ours = load(checkpoint, device="cpu", dtype="bfloat16", load_format="auto").transformers[Expert.HIGH_NOISE]
    exact = load(checkpoint, device="cpu", dtype="float32", load_format="auto").transformers[Expert.HIGH_NOISE]
    theirs = WanTransformer3DModel.from_pretrained(tmp_path, subfolder="transformer", torch_dtype=torch.bfloat16)
    latents, timestep, text = inputs
    rounded = (latents.bfloat16(), timestep, text.bfloat16())
    expected = exact.predict(latents.bfloat16().float(), timestep, text.bfloat16().float())

    error_of_theirs = tiny.relative_error(theirs(*rounded, return_dict=False)[0], expected)
    assert 1e-4 < error_of_theirs < 5e-2
    assert tiny.relative_error(ours.predict(*rounded), expected) <= 1.1 * error_of_theirs


def test_the_pipeline_of_diffusers_runs_our_transformer(reference: WanPipeline, pipeline: VideoPipeline) -> None:
    """Our forward keeps the signature and the output that diffusers' callers rely on."""
    components = {
        **reference.components,
        "scheduler": UniPCMultistepScheduler.from_config(reference.scheduler.config),
        "transformer": pipeline.transformers[Expert.HIGH_NOISE],
        "transformer_2": pipeline.transformers[Expert.LOW_NOISE],
    }
    mixed = WanPipeline(**components, boundary_ratio=0.875)
    mixed.set_progress_bar_config(disable=True)
    assert torch.equal(tiny.reference(mixed, tiny.VIDEO), tiny.reference(reference, tiny.VIDEO))


@torch.no_grad()
def test_caches_around_the_blocks_take_hold(
    checkpoint_dir: Path, inputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
) -> None:
    """Blocks are called as diffusers calls them: its first-block cache skips the others on a repeated input."""
    transformer = WanTransformer.from_pretrained(checkpoint_dir, subfolder="transformer")
    calls: list[str] = []
    transformer.set_attention(
        here(lambda query, key, value: (calls.append("block"), torch_attention(query, key, value))[1])
    )
    transformer.enable_cache(FirstBlockCacheConfig(threshold=0.5))
    with transformer.cache_context("cond"):
        first, again = (transformer.predict(*inputs) for _ in range(2))
    assert len(calls) == 3
    assert tiny.relative_error(again, first) < 1e-6


@torch.no_grad()
def test_a_timestep_for_each_token(inputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> None:
    """Bit for bit the forward of diffusers; a timestep for each frame is short for its tokens having it."""
    torch.manual_seed(0)
    theirs = tiny_images.make_transformer(tiny.TRANSFORMER)
    ours = tiny_images.our_transformer(theirs)
    latents, _, text = inputs
    by_frame = torch.tensor([[0.0, 900.0, 500.0]])
    by_token = by_frame.repeat_interleave(4 * 5, dim=1)
    expected = theirs(latents, by_token, text, return_dict=False)[0]
    assert torch.equal(ours.predict(latents, by_token, text), expected)
    assert tiny.relative_error(ours.predict(latents, by_frame, text), expected) < 1e-5
    assert tiny.relative_error(ours.predict(latents, by_frame[:, 1], text), expected) > 1e-3


@pytest.mark.parametrize(("config", "num_images"), [(tiny_images.CLIP, 1), (tiny_images.FIRST_TO_LAST, 2)])
@torch.no_grad()
def test_tokens_attend_to_images(
    config: dict[str, Any], num_images: int, inputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
) -> None:
    """Bit for bit the forward of diffusers, which other images change."""
    torch.manual_seed(0)
    theirs = tiny_images.make_transformer({**tiny.TRANSFORMER, **config})
    ours = tiny_images.our_transformer(theirs)
    latents, timestep, text = inputs
    shown = torch.cat([latents, torch.randn(1, 20, *latents.shape[2:])], dim=1)
    images = torch.randn(num_images, tiny_images.NUM_IMAGE_TOKENS, tiny_images.IMAGE_DIM)
    expected = theirs(shown, timestep, text, images, return_dict=False)[0]
    assert torch.equal(ours.predict(shown, timestep, text, images), expected)
    assert tiny.relative_error(ours.predict(shown, timestep, text, images.flip(-1)), expected) > 1e-3


def test_an_image_is_refused(pipeline: VideoPipeline, inputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> None:
    """What this transformer would otherwise silently ignore is an error, and so is the lack of what it needs."""
    with pytest.raises(ValueError, match="encoder_hidden_states_image"):
        pipeline.transformers[Expert.HIGH_NOISE](*inputs, encoder_hidden_states_image=torch.zeros(1))
    with pytest.raises(ValueError, match="attention_kwargs"):
        pipeline.transformers[Expert.HIGH_NOISE](*inputs, attention_kwargs={"scale": 0.5})
    embeds_images = tiny_images.our_transformer(tiny_images.make_transformer({**tiny.TRANSFORMER, **tiny_images.CLIP}))
    with pytest.raises(ValueError, match="encoder_hidden_states_image"):
        embeds_images(*inputs)
