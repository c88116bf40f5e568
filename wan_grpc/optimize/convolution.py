"""Which convolution in time and space a device runs.

Knows the kernels. Does not know the VAE that calls them, nor who computes which part of a picture.
"""

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import nn

Convolve: TypeAlias = Callable[..., torch.Tensor]
"""As torch.nn.functional.conv3d: input [B, C, T, H, W], weight, bias, stride, padding."""


def choose(device: torch.device, dtype: torch.dtype) -> Convolve:
    """The fastest one there.

    On a CPU torch takes oneDNN by itself where batch x channels x frames x height is more than 20480, and else a kernel
    that is several times as slow.
    """
    has_onednn: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return onednn if device.type == "cpu" and dtype is torch.float32 and has_onednn else F.conv3d


def onednn(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, stride: Any, padding: Any) -> torch.Tensor:
    """On a CPU, whatever the size."""
    return torch.mkldnn_convolution(x, weight, bias, padding, stride, (1, 1, 1), 1)


def install(model: nn.Module, convolve: Convolve) -> None:
    """Let all convolutions of `model` in time and space run by `convolve`, with weights as it reads them fastest."""
    if convolve is F.conv3d:
        return
    for module in model.modules():
        if isinstance(module, nn.Conv3d):
            assert module.groups == 1 and module.dilation == (1, 1, 1) and module.padding_mode == "zeros", module
            module.weight.data = module.weight.data.contiguous(memory_format=torch.channels_last_3d)
            module._conv_forward = _forward_of(module, convolve)  # type: ignore[method-assign]


def _forward_of(conv: nn.Conv3d, convolve: Convolve) -> Any:
    def forward(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return convolve(x, weight, bias, conv.stride, conv.padding)

    return forward
