"""The loop of training: schedules, averages, and going on where it stopped."""

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import distributed, multiprocessing, nn

from training.gradients import Gradients, Loss
from training.loop import DivergedError, Plan, Training, finished

CPU = torch.device("cpu")


def model() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(3, 1)


def loss_of(model: nn.Module, drawn: list[int] | None = None) -> Loss:
    """Linear regression on points that the generator draws."""

    def loss(generator: torch.Generator) -> dict[str, torch.Tensor]:
        if drawn is not None:
            drawn.append(generator.initial_seed())
        points = torch.randn(8, 3, generator=generator)
        return {"total": (model(points) - points.sum(1, keepdim=True)).pow(2).mean()}

    return loss


def test_it_learns(tmp_path: Path) -> None:
    training = Training(here := model(), tmp_path, Plan(steps=200, warm_up=5, rate=0.05))
    training.run(loss_of(here))
    assert torch.allclose(here.weight, torch.ones(1, 3), atol=1e-2)
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in log] == [50, 100, 150, 200]
    assert log[-1]["total"] < 1e-3 < log[0]["total"]


class InBlocks(nn.Module):
    """The same matrix where those of transformers are."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([model()])

    @property
    def weight(self) -> torch.Tensor:
        return self.blocks[0].weight  # type: ignore[return-value]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = self.blocks[0](x)
        return made


@pytest.mark.parametrize("model", [model, InBlocks], ids=["AdamW", "Muon"])
def test_one_that_was_interrupted_learns_the_same(model: Callable[[], nn.Module], tmp_path: Path) -> None:
    """Weights, averages and optimisers go on; a step draws what it would have drawn."""
    plan = Plan(steps=40, warm_up=5, is_orthogonal=model is InBlocks)
    whole = Training(one := model(), tmp_path / "one", plan)
    drawn: list[int] = []
    whole.run(loss_of(one, drawn))

    first = Training(two := model(), tmp_path / "two", plan)
    seen: list[int] = []
    inner = loss_of(two, seen)

    def until_17(generator: torch.Generator) -> dict[str, torch.Tensor]:
        if first.step == 17:
            first.save()
            raise InterruptedError
        return inner(generator)

    with pytest.raises(InterruptedError):
        first.run(until_17)
    second = Training(three := model(), tmp_path / "two", plan)
    assert second.step == 17
    second.run(loss_of(three, seen))
    assert seen == drawn and len(set(drawn)) == 40
    assert torch.equal(three.weight, one.weight)
    assert torch.equal(second.averaged.weight, whole.averaged.weight)
    assert not torch.equal(second.averaged.weight, three.weight)


def test_kinds_of_batches(tmp_path: Path) -> None:
    """Each step is of one, as often as its share says, and the same one whenever it is taken."""
    seen: list[tuple[int, int]] = []
    here = model()

    def of_kind(kind: int) -> Loss:
        inner = loss_of(here)

        def loss(generator: torch.Generator) -> dict[str, torch.Tensor]:
            seen.append((generator.initial_seed(), kind))
            return dict(inner(generator))

        return loss

    for name in ("one", "again"):
        Training(here, tmp_path / name, Plan(steps=200)).run(of_kind(0), of_kind(1), shares=(0.2, 0.8))
    assert seen[:200] == seen[200:]
    assert 20 <= sum(kind == 0 for _, kind in seen[:200]) <= 60


def lost(model: nn.Module, rank: int) -> torch.Tensor:
    """A loss that the second process alone finds to be no number."""
    return sum(parameter.sum() for parameter in model.parameters()) * (torch.nan if rank else 1.0)  # type: ignore[return-value]


def learn_beside_another(rank: int, directory: Path) -> None:
    """One of two processes."""
    store = distributed.FileStore(str(directory / "store"), 2)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    gradients = Gradients(here := model())
    for parameter in here.parameters():
        assert parameter.grad is not None
        parameter.grad.fill_(rank + 1.0)
    gradients.average()
    assert all((parameter.grad == 1.5).all() for parameter in here.parameters())  # type: ignore[union-attr]

    both = InBlocks()
    if rank:
        nn.init.zeros_(both.weight)
    training = Training(both, directory / "both", Plan(steps=20, warm_up=5, log_every=10, is_orthogonal=True))
    training.run(loss_of(both))
    timed = Training(there := model(), directory / "timed", Plan(seconds=0.3, log_every=1))
    timed.run(loss_of(there))
    with pytest.raises(DivergedError):
        Training(model(), directory / "diverged", Plan(steps=1)).run(lambda _: {"total": lost(there, rank)})
    torch.save((both.weight, there.weight, timed.step), directory / f"rank-{rank}.pt")
    distributed.destroy_process_group()


def test_two_processes_learn_as_one(tmp_path: Path) -> None:
    """Batches of their own count as one of both, and by a plan in seconds they take as many steps as each other."""
    multiprocessing.spawn(learn_beside_another, (tmp_path,), nprocs=2)  # type: ignore[no-untyped-call]
    (one, *timed_one), (two, *timed_two) = (torch.load(tmp_path / f"rank-{rank}.pt") for rank in range(2))
    assert torch.equal(one, two) and timed_one[1] == timed_two[1] > 0
    assert torch.equal(timed_one[0], timed_two[0])

    inner = loss_of(here := InBlocks())

    def of_both(generator: torch.Generator) -> dict[str, torch.Tensor]:
        step = generator.initial_seed()
        each = [inner(torch.Generator().manual_seed(step + (rank << 40)))["total"] for rank in range(2)]
        return {"total": torch.stack(each).mean()}

    Training(here, tmp_path / "one", Plan(steps=20, warm_up=5, is_orthogonal=True)).run(of_both)
    assert torch.allclose(one, here.weight, atol=1e-6)
    logs = [
        [json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        for name in ("both", "one", "timed")
    ]
    assert [entry["total"] for entry in logs[0]][1] == pytest.approx(logs[1][0]["total"], rel=1e-4)
    assert logs[2][-1]["seconds"] >= 0.3


def test_what_is_frozen_stays(tmp_path: Path) -> None:
    """Neither a gradient nor decay changes it."""
    here = nn.Sequential(model(), nn.Linear(1, 1))
    here[0].requires_grad_(False)
    before = [parameter.clone() for parameter in here.parameters()]
    Training(here, tmp_path, Plan(steps=5, warm_up=1, decay=10.0)).run(loss_of(here))
    are_equal = [torch.equal(old, new) for old, new in zip(before, here.parameters(), strict=True)]
    assert are_equal == [True, True, False, False]


def test_what_is_finished(tmp_path: Path) -> None:
    """The averaged weights, which need no gradient; a run that is done does nothing more."""
    training = Training(here := model(), tmp_path, Plan(steps=10, average=0.5))
    training.run(loss_of(here))
    kept = finished(model(), tmp_path, device=CPU)
    assert torch.equal(kept.weight, training.averaged.weight)
    assert not kept.weight.requires_grad and not kept.training
    again = Training(there := model(), tmp_path, Plan(steps=10, average=0.5))
    again.run(loss_of(there))
    assert again.step == 10 and torch.equal(there.weight, here.weight)
    with pytest.raises(FileNotFoundError):
        finished(model(), tmp_path / "nothing", device=CPU)


def test_a_disk_that_is_full(tmp_path: Path) -> None:
    """What could not be saved whole is not taken for done, and the stage goes on from what was."""
    Training(here := model(), tmp_path, Plan(steps=3)).run(loss_of(here))
    scratch = tmp_path / "state.pt.new"
    scratch.symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left"):
        Training(there := model(), tmp_path, Plan(steps=9)).run(loss_of(there))
    scratch.unlink()
    again = Training(last := model(), tmp_path, Plan(steps=9))
    assert again.step == 3 and not again.is_done
    again.run(loss_of(last))
    kept = finished(model(), tmp_path, device=CPU)
    assert again.step == 9 and torch.equal(kept.weight, again.averaged.weight)  # type: ignore[arg-type]


def test_a_plan_in_seconds(tmp_path: Path) -> None:
    """It ends when they are over, those of earlier runs counted."""
    began = time.monotonic()
    training = Training(here := model(), tmp_path, Plan(seconds=0.5))
    training.run(loss_of(here))
    assert 0.5 <= time.monotonic() - began < 5.0
    steps = training.step
    assert steps > 20
    again = Training(there := model(), tmp_path, Plan(seconds=0.5))
    again.run(loss_of(there))
    assert again.step == steps
    longer = Training(there, tmp_path, Plan(seconds=0.7))
    began = time.monotonic()
    longer.run(loss_of(there))
    assert longer.step > steps and time.monotonic() - began < 5.0


def test_a_loss_that_is_no_number(tmp_path: Path) -> None:
    here = model()
    training = Training(here, tmp_path, Plan(steps=10, log_every=5))
    with pytest.raises(DivergedError, match="step 5"):
        training.run(lambda _: {"total": here.weight.sum() * torch.nan})


def test_the_rate() -> None:
    """Up along a line, and down along a cosine."""
    plan = Plan(steps=1000, rate=2.0, warm_up=100)
    assert plan.rate_at(0, 0.0) == pytest.approx(0.02)
    assert plan.rate_at(99, 0.0) == pytest.approx(2.0)
    assert plan.rate_at(500, plan.done(500, 0.0)) == pytest.approx(1.0)
    assert plan.rate_at(1000, plan.done(1000, 0.0)) == pytest.approx(0.0)
    assert Plan(seconds=20.0).done(7, 5.0) == 0.25


def test_the_average_begins_early(tmp_path: Path) -> None:
    """After one step little of the first weights is left, and what is kept grows to what the plan says."""
    training = Training(here := model(), tmp_path, Plan(steps=1, rate=0.1, warm_up=1))
    first = here.weight.detach().clone()
    training.run(loss_of(here))
    assert torch.allclose(training.averaged.weight, first + (here.weight - first) * 9 / 11, atol=1e-6)  # type: ignore[operator]
