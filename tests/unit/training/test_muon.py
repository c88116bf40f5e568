"""Steps of matrices."""

from pathlib import Path

import pytest
import torch
from torch import nn

from training.loop import Plan, Training
from training.muon import Muon, orthogonal


@pytest.mark.parametrize("shape", [(6, 16, 16), (3, 8, 24), (3, 24, 8)])
def test_all_directions_are_alike(shape: tuple[int, ...]) -> None:
    """Singular values come close to 1, those of another size by far, too; none keeps its own."""
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    before = torch.linalg.svdvals(matrices)
    made = torch.linalg.svdvals(orthogonal(matrices))
    assert float(before.amax() / before.amin()) > 3.0
    assert float(made.amin()) > 0.3 and float(made.amax()) < 1.3


def test_it_is_that_of_torch() -> None:
    """Ten steps of several shapes at once are ten of torch.optim.Muon, but for its rounding to bf16."""
    shapes = [(16, 16), (16, 16), (24, 16), (16, 24)]
    generator = torch.Generator().manual_seed(2)
    ours = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    theirs = [nn.Parameter(matrix.detach().clone()) for matrix in ours]
    first = [matrix.detach().clone() for matrix in ours]
    one = Muon(ours, lr=0.02, weight_decay=0.1)
    other = torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for _ in range(10):
        for mine, its in zip(ours, theirs, strict=True):
            mine.grad = torch.randn(mine.shape, generator=generator)
            its.grad = mine.grad.clone()
        one.step()
        other.step()
    for mine, its, begin in zip(ours, theirs, first, strict=True):
        assert (mine - its).norm() < 0.05 * (its - begin).norm()


class Blocks(nn.Module):
    """A matrix in a block, a vector, and a matrix elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.blocks = nn.ModuleList([nn.Linear(8, 8)])
        self.last = nn.Linear(8, 8)


def test_it_is_for_the_matrices_of_blocks(tmp_path: Path) -> None:
    """One step changes all singular values of theirs alike; the rest is AdamW's."""
    data = torch.randn(64, 8, generator=torch.Generator().manual_seed(4))
    model, before = Blocks(), Blocks()
    plan = Plan(steps=1, rate=0.01, warm_up=1, decay=0.0, is_orthogonal=True)
    Training(model, tmp_path, plan).run(
        lambda _: {"total": (model.last(model.blocks[0](data)) - data).pow(2).mean()},
    )
    with torch.no_grad():
        made = torch.linalg.svdvals(model.blocks[0].weight - before.blocks[0].weight)
        rate = 0.01 * 0.2 * 8**0.5
        assert 0.5 * rate < float(made.amin()) and float(made.amax()) < 1.3 * rate
        assert (model.last.weight - before.last.weight).abs().allclose(torch.tensor(0.01), rtol=0.01)
