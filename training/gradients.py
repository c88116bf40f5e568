"""How the gradients of a step come about: of several processes together, and on a GPU from one launch of all kernels.

Knows processes and CUDA graphs. Does not know optimisers, nor what is learned.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Final, TypeAlias

import torch
from torch import distributed, nn

Parts: TypeAlias = Mapping[str, torch.Tensor]
Loss: TypeAlias = Callable[[torch.Generator], Parts]
"""One batch drawn by the generator: parts of the loss, of which `total` is minimised."""
_NUM_WARM_UPS: Final = 3


def rank() -> int:
    """Of this process, among those that learn one model together."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def num_processes() -> int:
    """That learn one model together."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def agreed(value: float) -> float:
    """What the first process says, to all. No GPU is waited for."""
    if num_processes() == 1:
        return value
    told = torch.tensor([value], dtype=torch.float64)
    distributed.broadcast(told, src=0)
    return float(told)


def mean(values: Sequence[float]) -> list[float]:
    """Of each value over all processes."""
    if num_processes() == 1:
        return list(values)
    sums = torch.tensor(values, dtype=torch.float64)
    distributed.all_reduce(sums)
    return (sums / num_processes()).tolist()


@torch.no_grad()
def begin_alike(model: nn.Module) -> None:
    """Give all processes the weights of the first."""
    if num_processes() == 1:
        return
    parameters = list(model.parameters())
    weights = nn.utils.parameters_to_vector(parameters).cpu()
    distributed.broadcast(weights, src=0)
    nn.utils.vector_to_parameters(weights.to(parameters[0].device), parameters)


class Gradients:
    """Of all parameters of a model that learn, in one piece of memory that stays where it is."""

    def __init__(self, model: nn.Module) -> None:
        learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
        sizes = [parameter.numel() for parameter in learning]
        self._flat = torch.zeros(sum(sizes), device=learning[0].device)
        for parameter, part in zip(learning, torch.split(self._flat, sizes), strict=True):
            parameter.grad = part.view_as(parameter)

    def compute(self, loss: Loss, generator: torch.Generator) -> Parts:
        """Those of one batch, of this process alone."""
        self._flat.zero_()
        parts = loss(generator)
        parts["total"].backward()  # type: ignore[no-untyped-call]
        return {name: value.detach() for name, value in parts.items()}

    def captured(self, loss: Loss, generator: torch.Generator) -> Callable[[], Parts]:
        """`compute` as a CUDA graph: a small model has thousands of kernels that take less time than their launch.

        What `loss` does on the host is done once, here; what it draws on the device follows the state that `generator`
        has at each call. The tensors given are the same ones each time.
        """
        graph = torch.cuda.CUDAGraph()
        graph.register_generator_state(generator)
        with torch.cuda.device(self._flat.device):
            beside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            beside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(beside):
                for _ in range(_NUM_WARM_UPS):  # what compiles or chooses kernels does so before
                    self.compute(loss, generator)
            torch.cuda.current_stream().wait_stream(beside)
            with torch.cuda.graph(graph):
                parts = self.compute(loss, generator)

        def replay() -> Parts:
            graph.replay()
            return parts

        return replay

    def average(self) -> None:
        """Over all processes."""
        if num_processes() > 1:
            distributed.all_reduce(self._flat)
            self._flat /= num_processes()
