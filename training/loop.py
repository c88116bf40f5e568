"""The loop that all stages of training share: it goes on where it stopped, averages weights, and keeps a log.

Knows optimisers, checkpoints and logs. Does not know what is learned.
"""

import json
import math
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeAlias, TypeVar

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

Loss: TypeAlias = Callable[[torch.Generator], Mapping[str, torch.Tensor]]
"""One batch drawn by the generator: parts of the loss, of which `total` is minimised."""

_STATE: Final = "state.pt"
_LOG: Final = "log.jsonl"
_NUM_TRIED: Final = 10
_NUM_TIMED: Final = 30
"""Steps that are taken before it is known how many fit into the time, the first few uncounted."""


class DivergedError(Exception):
    """The loss is no number any more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How long and how fast a stage learns."""

    steps: int | None = None
    """None: as many as fit into `seconds`."""
    seconds: float | None = None
    rate: float = 1e-3
    warm_up: int = 100
    decay: float = 0.01
    average: float = 0.999
    """Of the moving average of all weights, which is what is kept in the end."""
    most_gradient: float = 1.0
    seed: int = 0
    save_every_s: float = 60.0
    log_every: int = 50

    def rate_at(self, step: int, steps: int) -> float:
        """Linear to the full rate, then along a cosine to none at the end."""
        if step < self.warm_up:
            return self.rate * (step + 1) / self.warm_up
        return (
            self.rate * 0.5 * (1 + math.cos(math.pi * min(1.0, (step - self.warm_up) / max(1, steps - self.warm_up))))
        )


class Training:
    """Of one model in one directory, which holds its state and its log."""

    def __init__(self, model: nn.Module, directory: Path, plan: Plan) -> None:
        """Goes on where the state in `directory` stopped, if there is one."""
        assert (plan.steps is None) != (plan.seconds is None), "either steps or seconds"
        self.model = model
        self.device = next(model.parameters()).device
        self._directory = directory
        self._plan = plan
        self._optimizer = torch.optim.AdamW(
            model.parameters(),
            lr=plan.rate,
            betas=(0.9, 0.99),
            weight_decay=plan.decay,
            fused=self.device.type == "cuda",
        )
        self._average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(plan.average))  # type: ignore[no-untyped-call]
        self.step = 0
        self.steps = plan.steps
        directory.mkdir(parents=True, exist_ok=True)
        if (directory / _STATE).exists():
            self._restore(torch.load(directory / _STATE, map_location=self.device, weights_only=True))

    @property
    def averaged(self) -> nn.Module:
        """The model with the moving average of its weights."""
        return self._average.module

    def run(self, loss: Loss) -> None:
        """Learn until the plan is fulfilled; the last state is saved.

        What a step draws depends on its number alone, so that one that was interrupted learns the same.

        Raises:
            DivergedError: the loss became infinite or no number.
        """
        began = saved = logged = time.monotonic()
        first = logged_step = self.step
        while self.steps is None or self.step < self.steps:
            parts = self._learn(loss)
            now = time.monotonic()
            if self.step - first == _NUM_TRIED:
                self._synchronize()
                began = time.monotonic()
            if self.steps is None and self.step - first == _NUM_TIMED:
                self._synchronize()
                self.steps = self._steps_within(time.monotonic() - began)
            if self.step % self._plan.log_every == 0 or self.step == self.steps:
                values = {name: round(float(value.detach()), 6) for name, value in parts.items()}
                now = time.monotonic()
                self._log(
                    {
                        "step": self.step,
                        "of": self.steps,
                        "steps_s": (self.step - logged_step) / (now - logged),
                        **values,
                    }
                )
                logged, logged_step = now, self.step
                if not math.isfinite(values["total"]):
                    raise DivergedError(f"step {self.step}: {values}")
            if now - saved > self._plan.save_every_s:
                self.save()
                saved = time.monotonic()
        self.save()

    def _learn(self, loss: Loss) -> Mapping[str, torch.Tensor]:
        generator = torch.Generator(self.device).manual_seed(self._plan.seed * 1_000_003 + self.step)
        for group in self._optimizer.param_groups:
            group["lr"] = self._plan.rate_at(self.step, self.steps or 1_000_000)
        parts = loss(generator)
        self._optimizer.zero_grad(set_to_none=True)
        parts["total"].backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.model.parameters(), self._plan.most_gradient)
        self._optimizer.step()
        self._average.update_parameters(self.model)
        self.step += 1
        return parts

    def _steps_within(self, timed_s: float) -> int:
        assert self._plan.seconds is not None
        rate = (_NUM_TIMED - _NUM_TRIED) / timed_s
        return self.step + max(0, int((self._plan.seconds - _NUM_TIMED / rate) * rate))

    def save(self) -> None:
        """Whole or not at all."""
        scratch = self._directory / f"{_STATE}.new"
        state = {
            "step": self.step,
            "steps": self.steps,
            "model": self.model.state_dict(),
            "average": self._average.state_dict(),
            "optimizer": self._optimizer.state_dict(),
        }
        torch.save(state, scratch)
        scratch.replace(self._directory / _STATE)

    def _restore(self, state: Mapping[str, Any]) -> None:
        self.step = state["step"]
        self.steps = self._plan.steps or state["steps"]
        self.model.load_state_dict(state["model"])
        self._average.load_state_dict(state["average"])
        self._optimizer.load_state_dict(state["optimizer"])

    def _log(self, entry: Mapping[str, Any]) -> None:
        line = json.dumps(entry)
        sys.stderr.write(f"{self._directory.name}: {line}\n")
        with (self._directory / _LOG).open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


Model = TypeVar("Model", bound=nn.Module)


def finished(model: Model, directory: Path, *, device: torch.device) -> Model:
    """`model` with the averaged weights of a stage that was trained in `directory`, on `device`.

    Raises:
        FileNotFoundError: none was.
    """
    state = torch.load(directory / _STATE, map_location="cpu", weights_only=True)["average"]
    prefix = "module."
    model.load_state_dict(
        {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    )
    model.eval().requires_grad_(False)
    return on(device, model)


def on(device: torch.device, model: Model) -> Model:
    """`model`, moved. Some classes of libraries hide the type of their `to`."""
    nn.Module.to(model, device)
    return model
