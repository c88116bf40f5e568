"""The two passes of guidance on different ranks, with one exchange a step.

Knows how many passes a step has and which ranks run them. Does not know what guidance makes of the predictions.
"""

from collections.abc import Callable, Sequence

import torch

from wan_grpc.domain.traffic import Exchange
from wan_grpc.parallel.mesh import Mesh
from wan_grpc.parallel.sequence import SequenceSplit


class PassSplit:
    """Runs the passes of a step on the ranks of the mesh. A step with a single pass uses all of them, too."""

    def __init__(self, mesh: Mesh, sequence: SequenceSplit) -> None:
        self._mesh = mesh
        self._sequence = sequence

    def __call__(self, passes: Sequence[Callable[[], torch.Tensor]]) -> Sequence[torch.Tensor]:
        """What each pass predicts, [1, C, F, h, w], on every rank: the very values, so that guidance is the same.

        Raises:
            ExchangeBrokenError: another rank is gone.
        """
        layout = self._mesh.layout(len(passes))
        self._sequence.use(layout)
        if layout.cfg == 1:
            return [run() for run in passes]
        group = self._mesh.group(layout.cfg_groups)
        mine = passes[layout.cfg_index(self._mesh.rank)]()
        return torch.split(group.all_gather(mine, sizes=[1] * group.size, kind=Exchange.CFG), 1)
