"""Attention of which each rank computes some heads over all tokens (Ulysses; Jacobs et al., 2023).

Knows how queries, keys and values are packed for the exchange and results unpacked. Does not know the attention.
"""

from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch

from wan_grpc.domain.traffic import Exchange
from wan_grpc.parallel.group import Group, Pending

Attend: TypeAlias = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""(q, k, v) -> out, each [B, S, H, D]."""
MakeStates: TypeAlias = Callable[[], torch.Tensor]
"""Computes queries, keys or values of this rank's tokens: [B, s, H, D]."""


class Ulysses:
    """The exchange of tokens for heads, and back, within one group. Made for one layer, used once."""

    def __init__(self, group: Group, shares: Sequence[int], *, num_parts: int = 1) -> None:
        """shares: tokens of each rank.

        num_parts: parts of a rank's heads that are exchanged one by one, each while the one before is attended; 1 if
        they do not fall into so many.
        """
        self._group = group
        self._shares = shares
        self._mine = shares[group.index]
        self._num_parts = num_parts

    def attention(self, query: MakeStates, key: MakeStates, value: MakeStates, *, attend: Attend) -> torch.Tensor:
        """Attention among the tokens of all ranks, for those of this one: [B, s, H, D].

        Keys and values travel together while the queries are computed.

        Raises:
            ExchangeBrokenError: another rank is gone.
        """
        states = [value(), key()]
        if states[0].shape[2] % (self._group.size * self._num_parts):
            self._num_parts = 1
        parts = range(self._num_parts)
        keys = [self._to_heads(states, part) for part in parts]
        states.clear()
        states.append(query())
        shape = states[0].shape
        asked = [self._to_heads(states, part) for part in parts]
        states.clear()
        leaving = [self._to_tokens(self._attended(attend, asked.pop(0), keys.pop(0))) for _ in parts]
        return self._put_together(leaving, leaving[0][0].new_empty(shape))

    def _attended(
        self, attend: Attend, asked: tuple[torch.Tensor, Pending], keys: tuple[torch.Tensor, Pending]
    ) -> torch.Tensor:
        """What has arrived, attended; nothing of it is held afterwards."""
        for _, pending in (asked, keys):
            pending.wait()
        query, key, value = (_by_batch(states) for states in (asked[0][:, 0], keys[0][:, 1], keys[0][:, 0]))
        return attend(query, key, value)

    def _to_heads(self, states: Sequence[torch.Tensor], part: int) -> tuple[torch.Tensor, Pending]:
        """Send each rank its heads of `states`, with this rank's tokens; all tokens of this rank's heads come back.

        Packed [tokens, len(states), B, heads, D], so that what arrives from several ranks lies in the tokens' order.
        """
        batch, _, _, width = states[0].shape
        views = [self._by_rank(state)[:, :, :, part] for state in states]
        heads = views[0].shape[3]
        sent = states[0].new_empty((self._group.size, self._mine, len(states), batch, heads, width))
        for index, view in enumerate(views):
            sent[:, :, index] = view.permute(2, 1, 0, 3, 4)
        into = sent.new_empty((sum(self._shares), len(states), batch, heads, width))
        return into, self._exchange(sent.flatten(0, 1), into, self._even, self._shares)

    def _to_tokens(self, out: torch.Tensor) -> tuple[torch.Tensor, Pending]:
        """Send each rank its tokens of these heads, [B, S, heads, D]; this rank's tokens of all heads come back."""
        rows = out.transpose(0, 1).contiguous()
        into = rows.new_empty((self._group.size * self._mine, *rows.shape[1:]))
        return into, self._exchange(rows, into, self._shares, self._even)

    def _put_together(self, leaving: Sequence[tuple[torch.Tensor, Pending]], out: torch.Tensor) -> torch.Tensor:
        for part, (packed, pending) in enumerate(leaving):
            pending.wait()
            rows = packed.view(self._group.size, self._mine, *packed.shape[1:])
            self._by_rank(out)[:, :, :, part] = rows.permute(2, 1, 0, 3, 4)
        return out

    @property
    def _even(self) -> Sequence[int]:
        return [self._mine] * self._group.size

    def _by_rank(self, states: torch.Tensor) -> torch.Tensor:
        """[B, s, H, D] as [B, s, ranks, parts, heads, D]."""
        batch, num_tokens, num_heads, width = states.shape
        heads = num_heads // (self._group.size * self._num_parts)
        return states.view(batch, num_tokens, self._group.size, self._num_parts, heads, width)

    def _exchange(
        self, parts: torch.Tensor, into: torch.Tensor, sent: Sequence[int], received: Sequence[int]
    ) -> Pending:
        return self._group.all_to_all(parts, into, sent=sent, received=received, kind=Exchange.ULYSSES)


def _by_batch(rows: torch.Tensor) -> torch.Tensor:
    """[S, B, heads, D] -> [B, S, heads, D], a view."""
    return rows.transpose(0, 1)
