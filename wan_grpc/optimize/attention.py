"""Which attention kernel a device runs.

Knows the kernels and what each can do. Does not know the transformer that calls it, nor how ranks split the work.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, TypeAlias

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

AttentionFunction: TypeAlias = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""(q, k, v) -> out, each [B, S, H, D]; S of k and v may differ from that of q. No mask, scale D ** -0.5."""

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
    return Attention(name=f"{wanted}_sdpa", function=_sdpa(_BACKENDS.get(wanted)))


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
