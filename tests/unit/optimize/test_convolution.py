"""Convolutions in time and space."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from wan_grpc.optimize import convolution
from wan_grpc.optimize.convolution import choose, install, onednn

SHAPES = [
    ((1, 4, 3, 5, 7), (6, 4, 3, 3, 3), (1, 1, 1), (0, 0, 1)),
    ((1, 4, 3, 5, 7), (6, 4, 3, 3, 3), (1, 1, 1), (0, 1, 0)),
    ((2, 3, 4, 6, 6), (5, 3, 3, 1, 1), (2, 1, 1), (0, 0, 0)),
    ((1, 8, 1, 4, 4), (8, 8, 1, 1, 1), (1, 1, 1), (0, 0, 0)),
    ((1, 32, 3, 40, 40), (16, 32, 3, 3, 3), (1, 1, 1), (0, 1, 1)),
]


@pytest.mark.parametrize(("size", "weight_size", "stride", "padding"), SHAPES)
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("is_last", [True, False])
def test_onednn_is_right(
    size: tuple[int, ...],
    weight_size: tuple[int, ...],
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    has_bias: bool,
    is_last: bool,
) -> None:
    """What conv3d gives in float64, in either order of memory."""
    torch.manual_seed(1)
    x, weight = torch.randn(size), torch.randn(weight_size)
    bias = torch.randn(weight_size[0]) if has_bias else None
    if is_last:
        weight = weight.contiguous(memory_format=torch.channels_last_3d)
    expected = F.conv3d(x.double(), weight.double(), None if bias is None else bias.double(), stride, padding)
    convolved = onednn(x, weight, bias, stride, padding)
    assert convolved.shape == expected.shape
    assert float((convolved - expected).norm() / expected.norm()) < 1e-6


def test_small_pictures_on_a_cpu_alone() -> None:
    """Other devices and types have conv3d."""
    assert choose(torch.device("cpu"), torch.float32) is onednn
    assert choose(torch.device("cpu"), torch.bfloat16) is F.conv3d
    assert choose(torch.device("cuda"), torch.float32) is F.conv3d
    assert choose(torch.device("cuda"), torch.bfloat16) is F.conv3d


def test_it_takes_the_place_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every convolution in time and space of a model, and the model says what it said."""
    torch.manual_seed(2)
    model = nn.Sequential(nn.Conv3d(3, 4, 3, padding=1), nn.SiLU(), nn.Conv3d(4, 2, (3, 1, 1), stride=(2, 1, 1)))
    x = torch.randn(1, 3, 5, 6, 7)
    before = model(x)
    calls = 0

    def counted(*arguments: object) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return onednn(*arguments)  # type: ignore[arg-type]

    install(model, counted)
    assert torch.allclose(model(x), before, atol=1e-6)
    assert calls == 2
    assert all(module.weight.is_contiguous(memory_format=torch.channels_last_3d) for module in (model[0], model[2]))
    install(other := nn.Conv3d(3, 4, 3), F.conv3d)
    assert "_conv_forward" not in vars(other)
    with pytest.raises(AssertionError):
        install(nn.Conv3d(4, 4, 3, groups=2), convolution.onednn)
