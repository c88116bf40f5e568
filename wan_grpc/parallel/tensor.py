"""Each layer of the text encoder on several ranks: some heads and some of the feed-forward's units on each.

As Megatron-LM divides them (Shoeybi et al., 2019). Knows the modules of transformers' UMT5, and divides a loaded model
from outside. Does not know texts or tokens.
"""

from collections.abc import Iterator

import torch
from torch import nn
from transformers import UMT5Config, UMT5EncoderModel
from transformers.models.umt5.modeling_umt5 import UMT5Attention, UMT5DenseActDense, UMT5DenseGatedActDense

from wan_grpc.domain.traffic import Exchange
from wan_grpc.parallel.mesh import Mesh


def split_text_model(model: UMT5EncoderModel, mesh: Mesh) -> None:
    """Leave of each layer on this rank what it computes among the ranks of its group for text; embeddings stay whole.

    The model must be loaded and whole, the same on all ranks of the group. From then on all of them run it together.

    Raises:
        ValueError: heads or d_ff of the model do not fall into as many equal parts; it is left as it was.
    """
    num_parts = mesh.topology.text_tensor
    if num_parts == 1:
        return
    faults = list(_faults(model.config, num_parts))
    if faults:
        raise ValueError("; ".join(faults))
    division = _Division(mesh, num_parts)
    for module in model.modules():
        if isinstance(module, UMT5Attention):
            division.split_attention(module)
        elif isinstance(module, UMT5DenseGatedActDense):
            division.split_feed_forward(module.wi_0, module.wi_1, module.wo)
        elif isinstance(module, UMT5DenseActDense):
            division.split_feed_forward(module.wi, module.wo)


def _faults(config: UMT5Config, num_parts: int) -> Iterator[str]:
    for name, total in {"heads": config.num_heads, "d_ff": config.d_ff}.items():
        if total % num_parts:
            whole, rest = divmod(total, num_parts)
            sum_ = f"{total} = {num_parts} x {whole} + {rest}"
            yield f"text_tensor: {num_parts} does not divide the {name} of the text encoder, {sum_}"


class _Division:
    """This rank's part of layers: the same of each."""

    def __init__(self, mesh: Mesh, num_parts: int) -> None:
        self._mesh = mesh
        self._num_parts = num_parts
        self._index = mesh.group(mesh.topology.text_groups).index

    def split_attention(self, attention: UMT5Attention) -> None:
        attention.n_heads //= self._num_parts
        attention.inner_dim //= self._num_parts
        for linear in (attention.q, attention.k, attention.v):
            self._keep_outputs(linear)
        if attention.has_relative_attention_bias:
            table = attention.relative_attention_bias
            table.weight = self._part(table.weight, dim=1)  # [buckets, heads]
            table.embedding_dim = attention.n_heads
        self._keep_inputs(attention.o)

    def split_feed_forward(self, *layers: nn.Linear) -> None:
        """layers: those into the hidden units, and at last the one out of them."""
        *into, out = layers
        for linear in into:
            self._keep_outputs(linear)
        self._keep_inputs(out)

    def _keep_outputs(self, linear: nn.Linear) -> None:
        linear.weight = self._part(linear.weight, dim=0)
        linear.out_features //= self._num_parts

    def _keep_inputs(self, linear: nn.Linear) -> None:
        """What the layer then makes of some inputs is a part of a sum, which is added up as soon as it is there."""
        linear.weight = self._part(linear.weight, dim=1)
        linear.in_features //= self._num_parts
        linear.register_forward_hook(self._add_up)

    def _part(self, weight: torch.Tensor, *, dim: int) -> nn.Parameter:
        """A copy, so that the whole can be freed."""
        part = weight.detach().chunk(self._num_parts, dim)[self._index]
        return nn.Parameter(part.clone(memory_format=torch.contiguous_format), requires_grad=weight.requires_grad)

    def _add_up(self, _module: nn.Module, _inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        # A sum in half precision would be rounded once more with every rank. The group is asked for anew each time,
        # because links that broke are replaced.
        group = self._mesh.group(self._mesh.topology.text_groups)
        return group.add_up(output.float(), kind=Exchange.TEXT).to(output.dtype)
