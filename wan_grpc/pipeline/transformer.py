"""The Wan transformer: diffusers' weights and blocks, our own forward.

Knows how latents become tokens and back, where self-attention is plugged in, and where somebody may divide the tokens.
Does not know experts, steps or ranks.
"""

from collections.abc import Callable
from typing import Any, Protocol, TypeAlias

import torch
import torch.nn.functional as F
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.transformers.transformer_wan import WanAttention, WanTransformer3DModel, WanTransformerBlock

from wan_grpc.pipeline.text import NUM_TOKENS

AttentionFunction: TypeAlias = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""(q, k, v) -> out, each [B, S, H, D]; S of k and v may differ from that of q. No mask, scale D ** -0.5."""

MakeStates: TypeAlias = Callable[[], torch.Tensor]
"""Computes queries, keys or values: [B, S, H, D]."""

SelfAttentionFunction: TypeAlias = Callable[[MakeStates, MakeStates, MakeStates], torch.Tensor]
"""An attention function over what computes its arguments: whoever sends one away can do so while the next is made."""

RotaryEmbedding: TypeAlias = tuple[torch.Tensor, torch.Tensor]
"""Cosines and sines, each [1, S, 1, D], every value standing twice."""


class TokenSplit(Protocol):
    """Who computes which tokens of a forward pass. Attention among all of them is the split's own concern."""

    def begin(self, num_tokens: int) -> slice:
        """A pass over this many tokens begins: those that are computed here."""

    def join(self, tokens: torch.Tensor) -> torch.Tensor:
        """What was computed here, [B, s, d], to what was computed everywhere, [B, S, d], in order."""


class _AllHere:
    def begin(self, num_tokens: int) -> slice:
        return slice(0, num_tokens)

    def join(self, tokens: torch.Tensor) -> torch.Tensor:
        return tokens


ALL_HERE: TokenSplit = _AllHere()
"""One device computes every token."""


def torch_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Scaled dot product attention with the backend that torch itself prefers. [B, S, H, D] in and out."""
    query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
    return F.scaled_dot_product_attention(query, key, value).transpose(1, 2)


class SelfAttention:
    """Attention of the video tokens among themselves, through a function chosen elsewhere."""

    def __init__(self, attend: SelfAttentionFunction) -> None:
        self._attend = attend

    def __call__(
        self,
        attn: WanAttention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: None = None,
        attention_mask: None = None,
        rotary_emb: RotaryEmbedding | None = None,
    ) -> torch.Tensor:
        """[B, S, inner_dim] in and out. The signature is that of a diffusers attention processor."""
        assert rotary_emb is not None, "self-attention needs positions"

        def split(states: torch.Tensor) -> torch.Tensor:
            return torch.unflatten(states, 2, (attn.heads, -1))

        attended = self._attend(
            lambda: rotate(split(attn.norm_q(attn.to_q(hidden_states))), *rotary_emb),
            lambda: rotate(split(attn.norm_k(attn.to_k(hidden_states))), *rotary_emb),
            lambda: split(attn.to_v(hidden_states)),
        )
        return _project_out(attn, attended)


def here(attention: AttentionFunction) -> SelfAttentionFunction:
    """`attention` among tokens that are all on this device."""
    return lambda query, key, value: attention(query(), key(), value())


class TextAttention:
    """Attention of the video tokens to the text and, in transformers that have keys for them, to embedded images."""

    def __call__(
        self,
        attn: WanAttention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        attention_mask: None = None,
        rotary_emb: None = None,
    ) -> torch.Tensor:
        """[B, S, inner_dim] and [B, n + 512, inner_dim] in, n tokens of images first; [B, S, inner_dim] out."""
        num_image_tokens = 0 if attn.add_k_proj is None else encoder_hidden_states.shape[1] - NUM_TOKENS
        text = encoder_hidden_states[:, num_image_tokens:]
        query = attn.norm_q(attn.to_q(hidden_states)).unflatten(2, (attn.heads, -1))
        key = attn.norm_k(attn.to_k(text)).unflatten(2, (attn.heads, -1))
        value = attn.to_v(text).unflatten(2, (attn.heads, -1))
        attended = self.attend(query, key, value)
        if num_image_tokens:
            attended = attended + self._attend_images(attn, query, encoder_hidden_states[:, :num_image_tokens])
        return _project_out(attn, attended)

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Attention to the text alone: [B, S, H, D] of the video, [B, 512, H, D] of the text twice."""
        return torch_attention(query, key, value)

    def _attend_images(self, attn: WanAttention, query: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
        assert attn.add_k_proj is not None
        assert attn.add_v_proj is not None
        key = attn.norm_added_k(attn.add_k_proj(image)).unflatten(2, (attn.heads, -1))
        value = attn.add_v_proj(image).unflatten(2, (attn.heads, -1))
        return torch_attention(query, key, value)


def _project_out(attn: WanAttention, attended: torch.Tensor) -> torch.Tensor:
    projected: torch.Tensor = attn.to_out[0](attended.flatten(2, 3))
    return projected  # to_out[1] is dropout, which does nothing outside training


def rotate(states: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor) -> torch.Tensor:
    """Turn each pair of values by the angle of its position (RoPE, Su et al., 2021). [B, S, H, D] in and out."""
    even, odd = states[..., 0::2], states[..., 1::2]
    cosines, sines = cosines[..., 0::2], sines[..., 1::2]
    rotated = torch.empty_like(states)
    rotated[..., 0::2] = even * cosines - odd * sines
    rotated[..., 1::2] = even * sines + odd * cosines
    return rotated


class WanTransformer(WanTransformer3DModel):
    """One expert. Loads what WanTransformer3DModel loads, by the same names."""

    token_split: TokenSplit = ALL_HERE

    @property
    def compute_dtype(self) -> torch.dtype:
        """What latents are cast to on their way in; norms and modulation stay in fp32."""
        return self.patch_embedding.weight.dtype

    def set_attention(self, attend: SelfAttentionFunction) -> None:
        """Let self-attention of every block go through `attend`."""
        for block in self.blocks:
            assert isinstance(block, WanTransformerBlock)
            block.attn1.set_processor(SelfAttention(attend))  # type: ignore[arg-type]  # its type lists diffusers' own
            block.attn2.set_processor(TextAttention())  # type: ignore[arg-type]

    def predict(
        self,
        latents: torch.Tensor,
        timestep: torch.Tensor,
        text: torch.Tensor,
        images: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The flow at `timestep` in `latents` [B, C, F, h, w], given `text` [B, 512, text_dim]: [B, C_out, F, h, w].

        timestep: [B], or [B, n] where the tokens fall into n equal runs, one after the other, each with its own.
        images: embedded, [n, num_tokens, image_dim], for transformers that have an `image_dim`.

        Goes through the module's own call, so that hooks and wrappers put around it take part.
        """
        output: torch.Tensor = self(latents, timestep, text, images, return_dict=False)[0]
        return output

    def forward(  # noqa: PLR0917 (the signature of diffusers)
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        encoder_hidden_states_image: torch.Tensor | None = None,
        return_dict: bool = True,
        attention_kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """See `predict`. The signature is that of diffusers, which its pipelines and caches rely on.

        Raises:
            ValueError: attention arguments, or an image embedding for a transformer that has no use for one, or none
                for one that has.
        """
        if attention_kwargs:
            raise ValueError("attention_kwargs are not served by this transformer")
        if (encoder_hidden_states_image is None) != (self.condition_embedder.image_embedder is None):
            raise ValueError("encoder_hidden_states_image goes with transformers that have an image_dim, and only them")
        cosines, sines = self.rope(hidden_states)
        tokens = self.to_tokens(hidden_states)
        num_tokens = tokens.shape[1]
        here = self.token_split.begin(num_tokens)
        tokens, positions = tokens[:, here], (cosines[:, here], sines[:, here])
        temb, modulation, context = self._embed_conditions(
            timestep, encoder_hidden_states, encoder_hidden_states_image, num_tokens=num_tokens, here=here
        )
        for block in self.blocks:
            tokens = block(tokens, context, modulation, positions)
        output = self.to_latents(tokens, temb, hidden_states.shape)
        return Transformer2DModelOutput(sample=output) if return_dict else (output,)

    def _embed_conditions(
        self, timestep: torch.Tensor, text: torch.Tensor, images: torch.Tensor | None, *, num_tokens: int, here: slice
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Time [B, n, inner_dim], modulation, and what is attended to, [B, m, inner_dim].

        The modulation is as blocks take it: [B, 6, inner_dim], or [B, s, 6, inner_dim] for the s tokens `here` out of
        num_tokens if they differ in timestep.
        A run of tokens is embedded once, not token by token: the largest video has 27,280 of them, in 31 runs.
        """
        num_runs = timestep.shape[1] if timestep.ndim == 2 else None
        temb, modulation, context, image_context = self.condition_embedder(
            timestep.flatten(), text, images, timestep_seq_len=num_runs
        )
        modulation = modulation.unflatten(-1, (6, -1))
        if image_context is not None:
            context = torch.cat([image_context, context], dim=1)
        if num_runs is None:
            return temb.unsqueeze(1), modulation, context
        runs = torch.arange(here.start, here.stop, device=temb.device) // (num_tokens // num_runs)
        return temb[:, runs], modulation[:, runs], context

    def to_tokens(self, latents: torch.Tensor) -> torch.Tensor:
        """[B, C, F, h, w] -> [B, S, inner_dim], one token for each patch, frame by frame, row by row."""
        embedded: torch.Tensor = self.patch_embedding(latents)
        return embedded.flatten(2).transpose(1, 2).contiguous()

    def to_latents(self, tokens: torch.Tensor, temb: torch.Tensor, shape: torch.Size) -> torch.Tensor:
        """[B, s, inner_dim] -> [B, C_out, F, h, w] with F, h, w of `shape`; temb is [B, 1 or s, inner_dim]."""
        shift, scale = (self.scale_shift_table + temb.unsqueeze(2)).unbind(2)
        tokens = (self.norm_out(tokens.float()) * (1 + scale) + shift).type_as(tokens)
        patches = self.token_split.join(self.proj_out(tokens))
        time, rows, columns = self.config["patch_size"]
        grid = (shape[2] // time, shape[3] // rows, shape[4] // columns)
        patches = patches.reshape(shape[0], *grid, time, rows, columns, -1)
        return patches.permute(0, 7, 1, 4, 2, 5, 3, 6).flatten(6, 7).flatten(4, 5).flatten(2, 3)
