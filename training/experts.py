"""The transformers of the small models, and what they learn: the slope from latents to noise, given a caption.

Knows which levels of noise, captions and first frames an expert is shown. Does not know pixels.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
import torch.nn.functional as F
from diffusers.models.transformers.transformer_wan import WanAttention, WanTransformer3DModel
from transformers import UMT5EncoderModel

from training import flow
from training.flow import Levels
from training.gradients import Loss, Parts
from training.latents import NUM_TOKENS, Clips
from training.text import TEXT_DIM, Words, embed
from training.vae import precision
from wan_grpc.pipeline.published import T2V_A14B_CONFIGS
from wan_grpc.pipeline.text import NUM_TOKENS as NUM_SERVED
from wan_grpc.pipeline.transformer import TextAttention

CONFIG: Final[dict[str, Any]] = {
    **T2V_A14B_CONFIGS["transformer/config.json"],
    "attention_head_dim": 32,
    "ffn_dim": 384,
    "num_attention_heads": 4,
    "num_layers": 6,
    "text_dim": TEXT_DIM,
}
"""1.6 M parameters: three of them with the VAE and the text encoder come to 15.5 MB in bf16."""
BOUNDARY: Final = 0.875
"""The level of noise from which on the first of two experts works."""
SHIFT: Final = 3.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Role:
    """What one expert is for."""

    levels: Levels
    share_of_images: float = 0.0
    """Of its clips, those whose first frame it is given, as TI2V-5B is."""


ROLES: Final[Mapping[str, Role]] = {
    "base": Role(levels=Levels(shift=SHIFT)),
    "t2v-high": Role(levels=Levels(least=BOUNDARY, shift=SHIFT)),
    "t2v-low": Role(levels=Levels(most=BOUNDARY, shift=SHIFT)),
    "ti2v": Role(levels=Levels(shift=SHIFT), share_of_images=0.5),
}
"""`base` is what the others may begin with: it knows all levels."""
_AWAY: Final = 0.6
_WITHOUT_CAPTION: Final = 0.1
_NEAR_THINGS: Final = 8.0
"""How much more errors count where a thing is. Backgrounds are most of a clip, and shapes were learned last."""
_FINE: Final = 0.4
"""Levels below it count less: there only details are left that nobody sees, with large errors of the slope."""
_AT_ONCE: Final = 4096
_PATCH: Final = 4
"""Values of a channel that are one token."""


def make_expert(*, seed: int) -> WanTransformer3DModel:
    """One that has learned nothing. Its last layer begins at zero, so that it says nothing at first.

    Its questions to the text begin turned away from the padding, which is 470 tokens of 512 and would drown the rest.
    """
    torch.manual_seed(seed)
    expert: WanTransformer3DModel = WanTransformer3DModel.from_config(CONFIG)
    torch.nn.init.zeros_(expert.proj_out.weight)
    torch.nn.init.zeros_(expert.proj_out.bias)
    with torch.no_grad():
        padding = expert.condition_embedder.text_embedder(torch.zeros(1, TEXT_DIM))
        for block in expert.blocks:
            attention = block.attn2
            assert isinstance(attention, WanAttention)
            attention.to_q.bias.copy_(-_AWAY * attention.norm_k(attention.to_k(padding))[0])
    return expert


class BriefText(TextAttention):
    """Attention to a text without its padding: one zero stands for all that the pipelines append.

    They are alike, and a softmax over n of the same is one of them with ln n added.
    """

    def __init__(self) -> None:
        self.bias = torch.zeros(0)
        """[B, 1, 1, tokens], added before the softmax."""

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """[B, S, H, D] of the video, [B, tokens, H, D] of the text twice."""
        query, key, value = (states.transpose(1, 2) for states in (query, key, value))
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=self.bias.to(query.dtype))
        return attended.transpose(1, 2)

    def look_at(self, mask: torch.Tensor, *, num_served: int = NUM_SERVED) -> None:
        """mask: which tokens there are, [B, tokens], with at least one that is not. num_served: of the pipelines."""
        lengths = mask.sum(1, keepdim=True)
        places = torch.arange(mask.shape[1], device=mask.device)
        bias = torch.where(places < lengths, 0.0, -math.inf)
        self.bias = torch.where(places == lengths, torch.log((num_served - lengths).float()), bias)[:, None, None]


def be_brief(expert: WanTransformer3DModel) -> BriefText:
    """Let `expert` attend to texts without their padding."""
    brief = BriefText()
    for block in expert.blocks:
        attention = block.attn2
        assert isinstance(attention, WanAttention)
        attention.set_processor(brief)  # type: ignore[arg-type]
    return brief


class Lessons:
    """Batches for one expert. All captions are embedded once."""

    def __init__(
        self,
        role: Role,
        clips: Sequence[Clips],
        encoder: UMT5EncoderModel,
        brief: BriefText,
    ) -> None:
        """clips: of one size each."""
        self._role = role
        self._clips = clips
        self._brief = brief
        self._texts = [_embedded(encoder, each.tokens, each.mask) for each in clips]
        numbers, mask = (value.to(encoder.device) for value in Words(num_tokens=NUM_TOKENS).tokens([""]))
        self._no_text = _embedded(encoder, numbers, mask)
        self._no_mask = mask

    def losses(self, expert: WanTransformer3DModel, *, num_tokens: int) -> list[Loss]:
        """One for each size of clips.

        num_tokens: of the transformer, about as many as a batch has, whatever the size of its clips.
        """
        return [functools.partial(self._loss, expert, kind, num_tokens) for kind in range(len(self._clips))]

    def _loss(self, expert: WanTransformer3DModel, kind: int, num_tokens: int, generator: torch.Generator) -> Parts:
        device = generator.device
        clips = self._clips[kind]
        _, _, frames, height, width = clips.latents.shape
        count = max(1, num_tokens * _PATCH // (frames * height * width))
        chosen = torch.randint(len(clips), (count,), generator=generator, device=device)
        text = self._text(kind, chosen, generator)
        levels = self._role.levels.draw(count, generator=generator)
        has_image = None
        if self._role.share_of_images:
            has_image = torch.rand(count, generator=generator, device=device) < self._role.share_of_images
        with precision(device):
            total = flow.loss(
                expert,
                clips.latents[chosen].float(),
                text,
                levels,
                generator=generator,
                has_image=has_image,
                weights=_weights(clips.near[chosen], levels),
            )
        return {"total": total}

    def _text(self, kind: int, chosen: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        device = generator.device
        said = torch.randint(self._texts[kind].shape[1], chosen.shape, generator=generator, device=device)
        is_silent = torch.rand(chosen.shape, generator=generator, device=device) < _WITHOUT_CAPTION
        mask = self._clips[kind].mask[chosen, said].long()
        self._brief.look_at(torch.where(is_silent[:, None], self._no_mask, mask))
        text = self._texts[kind][chosen, said]
        return torch.where(is_silent[:, None, None], self._no_text, text).float()


def _weights(near: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    """Of the errors at each place, [B, t, h, w], by what is near it and by the level of its clip, [B]."""
    return (1.0 + _NEAR_THINGS * near.float()) * (levels / _FINE).clamp(max=1.0).view(-1, 1, 1, 1)


@torch.no_grad()
def _embedded(encoder: UMT5EncoderModel, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """[.., tokens, TEXT_DIM] in bf16 of [.., tokens]."""
    flat, flat_mask = (value.flatten(0, -2).long() for value in (tokens, mask))
    parts = zip(torch.split(flat, _AT_ONCE), torch.split(flat_mask, _AT_ONCE), strict=True)
    made = torch.cat([embed(encoder, *some).bfloat16() for some in parts])
    return made.view(*tokens.shape, -1)
