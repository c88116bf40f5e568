"""Which attention kernel a device runs.

Knows the kernels and what each can do. Does not know the transformer that calls it, nor how ranks split the work.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, TypeAlias

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

AttentionFunction: TypeAlias = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""(q, k, v) -> out, each [B, S, H, D]; S of k and v may differ from that of q. No mask, scale D ** -0.5."""

LseAttentionFunction: TypeAlias = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]
]
"""The same, and the natural logarithm of the sum of exponentials of each query's scores, [B, H, S], fp32.

With it the results over parts of the keys add up to that over all of them.
"""

_BACKENDS: Final = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "math": SDPBackend.MATH,
}
ATTENTIONS: Final = ("auto", "torch", *_BACKENDS)
_HOPPER: Final = (9, 0)
_HALF: Final = (torch.bfloat16, torch.float16)


@dataclass(frozen=True, slots=True, kw_only=True)
class Attention:
    """A kernel and the name that operators read."""

    name: str
    function: AttentionFunction
    with_lse: LseAttentionFunction


def choose(wanted: str, *, device: torch.device, dtype: torch.dtype) -> Attention:
    """The kernel that `wanted` names; `auto` is the fastest exact one for `device` and `dtype`.

    Raises:
        ValueError: no such kernel, or not on this device.
    """
    if wanted not in ATTENTIONS:
        raise ValueError(f"attention: {wanted} is not one of {', '.join(ATTENTIONS)}")
    if wanted == "auto":
        wanted = _fastest(device, dtype)
    if wanted == "cudnn" and (device.type != "cuda" or dtype not in _HALF):
        raise ValueError(f"attention: cudnn needs a CUDA device and half precision, not {device} and {dtype}")
    return Attention(
        name=f"{wanted}_sdpa", function=_sdpa(_BACKENDS.get(wanted)), with_lse=_with_lse(wanted, device, dtype)
    )


def _fastest(device: torch.device, dtype: torch.dtype) -> str:
    """From Hopper on cuDNN (580-607 TFLOP/s on an H200, flash 369), which computes in half precision only."""
    if device.type != "cuda" or torch.version.hip is not None or dtype not in _HALF:
        return "torch"
    return "cudnn" if torch.cuda.get_device_capability(device) >= _HOPPER else "torch"


def _sdpa(backend: SDPBackend | None) -> AttentionFunction:
    """Scaled dot product attention of torch over [B, S, H, D], held to one backend if there is one to hold it to."""

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
        if backend is None:
            return F.scaled_dot_product_attention(query, key, value).transpose(1, 2)
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(query, key, value).transpose(1, 2)

    return attend


def _with_lse(wanted: str, device: torch.device, dtype: torch.dtype) -> LseAttentionFunction:
    """The kernel itself, one floor below `scaled_dot_product_attention`, which drops the logarithms.

    What torch itself prefers (`torch`) is flash attention on CPU, on CUDA and on ROCm; in fp32, which that does not
    know on GPUs, the memory-efficient kernel.
    """
    if wanted == "math":
        kernel = _math
    elif device.type == "cpu":
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    elif wanted == "cudnn":
        kernel = _cudnn
    elif dtype in _HALF:
        kernel = torch.ops.aten._scaled_dot_product_flash_attention
    else:
        kernel = _efficient

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
        out, lse = kernel(query, key, value)[:2]
        num_queries = query.shape[2]
        # Some kernels round the number of queries up, and cuDNN adds a dimension.
        return out.transpose(1, 2), lse.reshape(*query.shape[:2], -1)[..., :num_queries].float()

    return attend


def _cudnn(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> Sequence[torch.Tensor]:
    kernel = torch.ops.aten._scaled_dot_product_cudnn_attention
    result: Sequence[torch.Tensor] = kernel(query, key, value, None, True)
    return result


def _efficient(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> Sequence[torch.Tensor]:
    kernel = torch.ops.aten._scaled_dot_product_efficient_attention
    result: Sequence[torch.Tensor] = kernel(query, key, value, None, True)
    return result


_MATH_SCORES: Final = 2**26
"""Scores that are held at once."""


def _math(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> Sequence[torch.Tensor]:
    """By the formula, in fp32, a run of queries at a time."""
    rows = max(1, _MATH_SCORES // (query.shape[0] * query.shape[1] * key.shape[2]))
    parts = [_math_rows(part, key, value) for part in torch.split(query, rows, dim=2)]
    return [torch.cat([part[index] for part in parts], dim=2) for index in (0, 1)]


def _math_rows(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    scores = query.float() @ key.float().transpose(2, 3) * query.shape[3] ** -0.5
    lse = scores.logsumexp(dim=3)
    return ((scores - lse.unsqueeze(3)).exp() @ value.float()).to(query.dtype), lse
