"""Attention of which each rank computes some heads over all tokens (Ulysses; Jacobs et al., 2023).

Knows how queries, keys and values are packed into one exchange and results unpacked. Does not know the attention.
"""

from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch

from wan_grpc.domain.traffic import Exchange
from wan_grpc.parallel.group import Group, Pending

Attend: TypeAlias = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""(q, k, v) -> out, each [B, S, H, D]."""


def ulysses_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    group: Group,
    shares: Sequence[int],
    attend: Attend,
    num_parts: int = 1,
) -> torch.Tensor:
    """Attention among the tokens of all ranks, for those of this one: [B, s, H, D] in and out.

    shares: tokens of each rank. H is a multiple of the number of ranks times `num_parts`: so many parts of a rank's
    heads are exchanged one by one, each while the one before is attended.

    Raises:
        ExchangeBrokenError: another rank is gone.
    """
    exchange = _Exchange(group, shares, num_parts)
    arriving = [exchange.begin_to_heads((query, key, value), part) for part in range(num_parts)]
    leaving = []
    for packed, pending in arriving:
        pending.wait()
        leaving.append(exchange.begin_to_tokens(attend(*exchange.unpacked(packed))))
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    for part, (packed, pending) in enumerate(leaving):
        pending.wait()
        exchange.put(packed, out, part)
    return out


class _Exchange:
    def __init__(self, group: Group, shares: Sequence[int], num_parts: int) -> None:
        self._group = group
        self._shares = shares
        self._num_parts = num_parts
        self._mine = shares[group.index]

    def begin_to_heads(self, states: Sequence[torch.Tensor], part: int) -> tuple[torch.Tensor, Pending]:
        """Send the heads of each rank there, with this rank's tokens; all tokens of this rank's heads come back.

        Packed [tokens, 3, B, heads, D], so that what arrives from several ranks lies in the order of the tokens.
        """
        batch, _, _, width = states[0].shape
        views = [self._by_rank(state)[:, :, :, :, part] for state in states]
        heads = views[0].shape[3]
        sent = states[0].new_empty((self._group.size, self._mine, len(states), batch, heads, width))
        for index, view in enumerate(views):
            sent[:, :, index] = view.permute(2, 1, 0, 3, 4)
        into = sent.new_empty((sum(self._shares), len(states), batch, heads, width))
        return into, self._begin(sent.flatten(0, 1), into, sent=[self._mine] * self._group.size, received=self._shares)

    def unpacked(self, packed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries, keys and values, each [B, S, heads, D], as views."""
        query, key, value = packed.unbind(1)
        return query.transpose(0, 1), key.transpose(0, 1), value.transpose(0, 1)

    def begin_to_tokens(self, out: torch.Tensor) -> tuple[torch.Tensor, Pending]:
        """Send each rank its tokens of these heads, [B, S, heads, D]; this rank's tokens of all heads return."""
        rows = out.transpose(0, 1).contiguous()
        into = rows.new_empty((self._group.size * self._mine, *rows.shape[1:]))
        return into, self._begin(rows, into, sent=self._shares, received=[self._mine] * self._group.size)

    def put(self, packed: torch.Tensor, out: torch.Tensor, part: int) -> None:
        """What came back, into `out` [B, s, H, D]."""
        rows = packed.unflatten(0, (self._group.size, self._mine))
        self._by_rank(out)[:, :, :, :, part] = rows.permute(2, 1, 0, 3, 4)

    def _by_rank(self, states: torch.Tensor) -> torch.Tensor:
        """[B, s, H, D] as [B, s, ranks, heads, parts, D] with the last two the other way round: a part is a slice."""
        heads = states.shape[2] // (self._group.size * self._num_parts)
        return states.unflatten(2, (self._group.size, self._num_parts, heads)).transpose(3, 4)

    def _begin(
        self, parts: torch.Tensor, into: torch.Tensor, *, sent: Sequence[int], received: Sequence[int]
    ) -> Pending:
        return self._group.all_to_all(parts, into, sent=sent, received=received, kind=Exchange.ULYSSES)
