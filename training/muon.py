"""Muon (Jordan et al., 2024): steps of matrices are made orthogonal, so that all directions learn alike.

Knows matrices. Does not know models. torch.optim.Muon does the same one matrix at a time, of which a small model has
too many: on a GPU it would wait for their hundreds of little products.
"""

from collections import defaultdict
from collections.abc import Iterable
from typing import Final

import torch
from torch import nn

_MOMENTUM: Final = 0.95
_COEFFICIENTS: Final = (3.4445, -4.7750, 2.0315)
_ITERATIONS: Final = 5
_LIKE_ADAM: Final = 0.2
"""The root mean square of a step of AdamW, by its rate (Liu et al., 2025): so both learn at one rate."""


class Muon(torch.optim.Optimizer):
    """Of matrices alone; those of one shape are stepped together."""

    def __init__(self, matrices: Iterable[nn.Parameter], *, lr: float, weight_decay: float) -> None:
        super().__init__(matrices, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step along the momentum of the gradients."""
        for group in self.param_groups:
            alike: dict[torch.Size, list[torch.Tensor]] = defaultdict(list)
            for matrix in group["params"]:
                alike[matrix.shape].append(matrix)
            for shape, matrices in alike.items():
                rate = group["lr"] * _LIKE_ADAM * max(shape) ** 0.5
                steps = orthogonal(self._with_momentum(matrices))
                torch._foreach_mul_(list(matrices), 1.0 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(list(matrices), list(steps.unbind()), alpha=-rate)

    def _with_momentum(self, matrices: list[torch.Tensor]) -> torch.Tensor:
        gradients = [matrix.grad for matrix in matrices if matrix.grad is not None]
        assert len(gradients) == len(matrices), "each takes part in every step"
        momenta = [self._momentum(matrix) for matrix in matrices]
        torch._foreach_lerp_(momenta, gradients, 1.0 - _MOMENTUM)
        return torch.stack(gradients).lerp(torch.stack(momenta), _MOMENTUM)

    def _momentum(self, matrix: torch.Tensor) -> torch.Tensor:
        state = self.state[matrix]
        if not state:
            state["momentum"] = torch.zeros_like(matrix)
        kept: torch.Tensor = state["momentum"]
        return kept


def orthogonal(matrices: torch.Tensor) -> torch.Tensor:
    """[N, n, m], each about the nearest matrix whose singular values are all 1.

    A polynomial of five degrees, five times over, which needs products alone. It takes all but the smallest values to
    between 0.7 and 1.2, and is exact in no case.
    """
    is_tall = matrices.shape[1] > matrices.shape[2]
    x: torch.Tensor = matrices.transpose(1, 2) if is_tall else matrices
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    one, three, five = _COEFFICIENTS
    for _ in range(_ITERATIONS):
        square = x @ x.transpose(1, 2)
        x = one * x + (three * square + five * square @ square) @ x
    return x.transpose(1, 2) if is_tall else x
