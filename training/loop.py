"""The loop that all stages of training share: it goes on where it stopped, averages weights, and keeps a log.

Knows optimisers, checkpoints and logs. Does not know what is learned.
"""

import copy
import functools
import json
import math
import random
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

import torch
from torch import nn

from training.gradients import Gradients, Loss, Parts, agreed, begin_alike, mean, rank
from training.muon import Muon

Model = TypeVar("Model", bound=nn.Module)

_STATE: Final = "state.pt"
_AVERAGE: Final = "average.pt"
_LOG: Final = "log.jsonl"


class DivergedError(Exception):
    """The loss is no number any more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How long and how fast a stage learns."""

    steps: int | None = None
    """None: as many as fit into `seconds`."""
    seconds: float | None = None
    """Of learning, over all runs of the stage together."""
    rate: float = 1e-3
    warm_up: int = 100
    decay: float = 0.01
    average: float = 0.999
    """Of the moving average of all weights, which is what is kept in the end. It begins with less."""
    most_gradient: float = 1.0
    is_orthogonal: bool = False
    """Whether the matrices of a transformer's blocks are learned by Muon instead of AdamW."""
    is_captured: bool = False
    """Whether forward and backward pass are one CUDA graph, so that a GPU does not wait for launches."""
    seed: int = 0
    save_every_s: float = 20.0
    log_every: int = 50

    def done(self, step: int, seconds: float) -> float:
        """The share that is done, from 0 to 1 and beyond."""
        if self.steps is not None:
            return step / self.steps
        assert self.seconds is not None, "either steps or seconds"
        return seconds / self.seconds

    def rate_at(self, step: int, done: float) -> float:
        """Linear to the full rate in the first steps, and all the while along a cosine to none at the end."""
        warm = min(1.0, (step + 1) / self.warm_up)
        return self.rate * warm * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


class Training:
    """Of one model in one directory, which holds its state, the average of its weights and its log.

    Where torch.distributed is initialised, all its processes learn one model: each computes batches of its own, and
    their gradients are averaged. The first one writes.
    """

    def __init__(self, model: nn.Module, directory: Path, plan: Plan) -> None:
        """Goes on where the state in `directory` stopped, if there is one."""
        self.model = model
        self.device = next(model.parameters()).device
        self._directory = directory
        self._plan = plan
        self._optimizers = _optimizers(model, plan, is_fused=self.device.type == "cuda")
        self.averaged = copy.deepcopy(model).requires_grad_(False)
        """The model with the moving average of its weights."""
        self.step = 0
        self._seconds = 0.0
        directory.mkdir(parents=True, exist_ok=True)
        if (directory / _STATE).exists():
            self._restore(torch.load(directory / _STATE, map_location=self.device, weights_only=True))

    @property
    def is_done(self) -> bool:
        """Whether the plan is fulfilled."""
        return self._plan.done(self.step, self._seconds) >= 1.0

    def run(self, *losses: Loss, shares: Sequence[float] = (1.0,)) -> None:
        """Learn until the plan is fulfilled; the last state is saved.

        losses: one for each kind of batches, `shares` of all steps. What a step draws depends on its number and on the
        process alone, so that one that was interrupted learns the same by a plan in steps.

        Raises:
            DivergedError: the loss became infinite or no number.
        """
        if self.step and self.is_done:
            return
        begin_alike(self.model)
        generator, gradients = torch.Generator(self.device), Gradients(self.model)
        kinds = [self._kind(gradients, loss, generator) for loss in losses]
        last = saved = time.monotonic()
        while not self.is_done:
            number = self._plan.seed * 1_000_003 + self.step + (rank() << 40)
            generator.manual_seed(number)
            [compute] = random.Random(number).choices(kinds, shares)
            parts = self._learn(compute, gradients)
            is_logged = self.step % self._plan.log_every == 0 or self.step == self._plan.steps
            values = _values(parts) if is_logged else {}  # which waits for the device, and so keeps the clock honest
            now = time.monotonic()
            self._seconds, last = agreed(self._seconds + now - last), now
            if is_logged:
                self._log(values)
            if now - saved > self._plan.save_every_s:
                self.save()
                saved = time.monotonic()
                last += saved - now
        self.save()

    def _kind(self, gradients: Gradients, loss: Loss, generator: torch.Generator) -> Callable[[], Parts]:
        if self._plan.is_captured:
            return gradients.captured(loss, generator)
        return functools.partial(gradients.compute, loss, generator)

    def _learn(self, compute: Callable[[], Parts], gradients: Gradients) -> Parts:
        rate = self._plan.rate_at(self.step, self._plan.done(self.step, self._seconds))
        parts = compute()
        gradients.average()
        nn.utils.clip_grad_norm_(self.model.parameters(), self._plan.most_gradient)
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
        self.step += 1
        self._take_into_average()
        return parts

    @torch.no_grad()
    def _take_into_average(self) -> None:
        kept = min(self._plan.average, (1 + self.step) / (10 + self.step))  # at first all weights are far from good
        torch._foreach_lerp_(list(self.averaged.parameters()), list(self.model.parameters()), 1.0 - kept)

    def save(self) -> None:
        """Each file whole or not at all; the state last, so that what it says is done has its average."""
        if rank():
            return
        average = self.averaged.state_dict()
        state = {
            "step": self.step,
            "seconds": self._seconds,
            "model": self.model.state_dict(),
            "average": average,
            "optimizers": [optimizer.state_dict() for optimizer in self._optimizers],
        }
        for name, content in ((_AVERAGE, average), (_STATE, state)):
            write_whole(content, self._directory / name)

    def _restore(self, state: Mapping[str, Any]) -> None:
        self.step, self._seconds = state["step"], state["seconds"]
        self.model.load_state_dict(state["model"])
        self.averaged.load_state_dict(state["average"])
        for optimizer, kept in zip(self._optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(kept)

    def _log(self, values: Mapping[str, float]) -> None:
        line = json.dumps({"step": self.step, "seconds": round(self._seconds, 1), **values})
        if not rank():
            sys.stderr.write(f"{self._directory.name}: {line}\n")
            with (self._directory / _LOG).open("a", encoding="utf-8") as file:
                file.write(line + "\n")
        if not math.isfinite(values["total"]):
            raise DivergedError(f"step {self.step}: {values}")


def _values(parts: Parts) -> dict[str, float]:
    values = mean([float(value) for value in parts.values()])
    return {name: round(value, 6) for name, value in zip(parts, values, strict=True)}


def _optimizers(model: nn.Module, plan: Plan, *, is_fused: bool) -> list[torch.optim.Optimizer]:
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        is_of_muon = plan.is_orthogonal and parameter.ndim == 2 and name.startswith("blocks.")
        (matrices if is_of_muon else others).append(parameter)
    decay = plan.decay
    made: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(others, lr=plan.rate, betas=(0.9, 0.99), weight_decay=decay, fused=is_fused)
    ]
    return [*made, Muon(matrices, lr=plan.rate, weight_decay=decay)] if matrices else made


def write_whole(content: Any, path: Path) -> None:
    """`content` to `path`, which has all of it or is not there.

    Raises:
        OSError: the disk refused some of it.
    """
    scratch = path.with_name(f"{path.name}.new")
    with scratch.open("wb") as file:  # given a path, torch calls a full disk a RuntimeError of its own
        torch.save(content, file)
    scratch.replace(path)


def leave(model: nn.Module, directory: Path) -> None:
    """Write the weights of `model` as a stage that was trained in `directory` leaves them.

    Raises:
        FileExistsError: one was, and would go on from its own.
    """
    directory.mkdir(parents=True, exist_ok=True)
    for name in (_STATE, _AVERAGE):
        if (directory / name).exists():
            raise FileExistsError(f"{directory} has a {name} already")
    write_whole(model.state_dict(), directory / _AVERAGE)


def finished(model: Model, directory: Path, *, device: torch.device) -> Model:
    """`model` with the averaged weights of a stage that was trained in `directory`, on `device`.

    Raises:
        FileNotFoundError: none was.
    """
    model.load_state_dict(torch.load(directory / _AVERAGE, map_location="cpu", weights_only=True))
    model.eval().requires_grad_(False)
    return on(device, model)


def on(device: torch.device, model: Model) -> Model:
    """`model`, moved. Some classes of libraries hide the type of their `to`."""
    nn.Module.to(model, device)
    return model
