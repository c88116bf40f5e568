"""The tokens of one pass on many ranks: Ulysses inside a ring (USP; Fang and Zhao, 2024), in parts without padding.

Knows which rank holds which tokens under a layout. Does not know the transformer around them.
"""

from itertools import accumulate

import torch

from wan_grpc.domain.topology import Layout, shares
from wan_grpc.domain.traffic import Exchange
from wan_grpc.parallel.mesh import Mesh
from wan_grpc.parallel.ring import AttendWithLse, ring_attention
from wan_grpc.parallel.ulysses import Attend, MakeStates, Ulysses


class SequenceSplit:
    """Divides the tokens of each pass between the ranks that the layout in use gives it."""

    def __init__(self, mesh: Mesh, attend: Attend, attend_with_lse: AttendWithLse) -> None:
        self._mesh = mesh
        self._attend = attend
        self._attend_with_lse = attend_with_lse
        self._shares: tuple[int, ...] = ()
        """Tokens of each rank of the pass."""
        self.use(mesh.layout(1))

    def use(self, layout: Layout) -> None:
        """Let the next passes run on this layout."""
        self._layout = layout

    def begin(self, num_tokens: int) -> slice:
        """A pass over this many tokens begins: those of this rank."""
        self._shares = shares(num_tokens, self._layout.sequence)
        edges = [0, *accumulate(self._shares)]
        index = self._mesh.rank % self._layout.sequence
        return slice(edges[index], edges[index + 1])

    def join(self, tokens: torch.Tensor) -> torch.Tensor:
        """[B, s, d] of this rank to [B, S, d] of all."""
        group = self._mesh.group(self._layout.sequence_groups)
        rows = group.all_gather(tokens.transpose(0, 1), sizes=self._shares, kind=Exchange.TOKENS)
        return rows.transpose(0, 1)

    def attend(self, query: MakeStates, key: MakeStates, value: MakeStates) -> torch.Tensor:
        """Attention among the tokens of all ranks, for those of this one: what is made and the result are [B, s, H, D].

        Raises:
            ExchangeBrokenError: another rank is gone.
        """
        group = self._mesh.group(self._layout.ulysses_groups)
        if group.size == 1:
            return self._around_the_ring(query(), key(), value())
        first = self._layout.ring_index(self._mesh.rank) * group.size
        ulysses = Ulysses(group, self._shares[first : first + group.size])
        return ulysses.attention(query, key, value, attend=self._around_the_ring)

    def _around_the_ring(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        group = self._mesh.group(self._layout.ring_groups)
        if group.size == 1:
            return self._attend(query, key, value)
        return ring_attention(query, key, value, group=group, blocks=self._blocks, attend=self._attend_with_lse)

    @property
    def _blocks(self) -> tuple[int, ...]:
        """Tokens of each place in the ring."""
        size = self._layout.ulysses
        return tuple(sum(self._shares[first : first + size]) for first in range(0, self._layout.sequence, size))
