"""Attention of which each rank computes some heads over all tokens (Ulysses; Jacobs et al., 2023).

Knows how queries, keys and values are packed for the exchange and results unpacked. Does not know the attention.
"""

from collections.abc import Callable, Sequence
from typing import Final, TypeAlias

import torch

from wan_grpc.domain.traffic import Exchange
from wan_grpc.parallel.group import Group, Pending

Attend: TypeAlias = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""(q, k, v) -> out, each [B, S, H, D]."""
MakeStates: TypeAlias = Callable[[], torch.Tensor]
"""Computes queries, keys or values of this rank's tokens: [B, s, H, D]."""

_WORD: Final = torch.int64


class Ulysses:
    """The exchange of tokens for heads, and back, within one group. Made for one layer, used once."""

    def __init__(self, group: Group, shares: Sequence[int]) -> None:
        """shares: tokens of each rank."""
        self._group = group
        self._shares = shares
        self._mine = shares[group.index]

    def attention(self, query: MakeStates, key: MakeStates, value: MakeStates, *, attend: Attend) -> torch.Tensor:
        """Attention among the tokens of all ranks, for those of this one: [B, s, H, D].

        Keys and values travel while the queries are computed.

        Raises:
            ExchangeBrokenError: another rank is gone.
        """
        keys, keys_pending = self._to_heads([value(), key()])  # no name holds what was sent
        queries, queries_pending = self._to_heads([query()])
        queries_pending.wait()
        keys_pending.wait()
        attended = attend(_by_batch(queries[:, 0]), _by_batch(keys[:, 1]), _by_batch(keys[:, 0]))
        del queries, keys
        return self._to_tokens(attended)

    def _to_heads(self, states: Sequence[torch.Tensor]) -> tuple[torch.Tensor, Pending]:
        """Send each rank its heads of `states`, with this rank's tokens; all tokens of this rank's heads come back.

        Packed [tokens, len(states), B, heads, D], so that what arrives from several ranks lies in the tokens' order.
        This rank's own are put among them while the others travel.
        """
        views = [self._heads_by_rank(state) for state in states]
        _, _, *heads = views[0].shape
        leaving = states[0].new_empty((self._group.size, self._mine, len(states), *heads))
        for index, view in enumerate(views):
            self._copy_others(leaving[:, :, index], view)
        arriving = states[0].new_empty((sum(self._shares), len(states), *heads))
        places = torch.split(arriving, list(self._shares))
        pending = self._group.swap(leaving.unbind(), places, kind=Exchange.ULYSSES)
        for index, view in enumerate(views):
            _copy(view[self._group.index], places[self._group.index][:, index])
        return arriving, pending

    def _to_tokens(self, attended: torch.Tensor) -> torch.Tensor:
        """Send each rank its tokens of these heads, [B, S, heads, D]; its own, [B, s, H, D], come back."""
        batch, _, num_heads, width = attended.shape
        out = attended.new_empty((batch, self._mine, num_heads * self._group.size, width))
        leaving = torch.split(attended.transpose(0, 1).contiguous(), list(self._shares))
        arriving = attended.new_empty((self._group.size, *leaving[self._group.index].shape))
        pending = self._group.swap(leaving, arriving.unbind(), kind=Exchange.ULYSSES)
        places = self._heads_by_rank(out)
        _copy(leaving[self._group.index], places[self._group.index])
        pending.wait()
        self._copy_others(places, arriving)
        return out

    def _copy_others(self, into: torch.Tensor, states: torch.Tensor) -> None:
        """All but what is this rank's own. [ranks, ..] both."""
        for others in (slice(0, self._group.index), slice(self._group.index + 1, self._group.size)):
            _copy(states[others], into[others])

    def _heads_by_rank(self, states: torch.Tensor) -> torch.Tensor:
        """[B, s, H, D] as [ranks, s, B, heads, D], a view of each rank's heads."""
        batch, num_tokens, num_heads, width = states.shape
        heads = states.view(batch, num_tokens, self._group.size, num_heads // self._group.size, width)
        return heads.permute(2, 1, 0, 3, 4)


def _copy(source: torch.Tensor, into: torch.Tensor) -> None:
    """In words of 8 bytes where both come to whole ones: faster than value by value when these have 2."""
    if _is_in_words(source) and _is_in_words(into):
        source, into = source.view(_WORD), into.view(_WORD)
    into.copy_(source)


def _is_in_words(states: torch.Tensor) -> bool:
    *steps, last = states.stride()
    lengths = (states.shape[-1], states.storage_offset(), *steps)
    return last == 1 and all(length * states.element_size() % _WORD.itemsize == 0 for length in lengths)


def _by_batch(rows: torch.Tensor) -> torch.Tensor:
    """[S, B, heads, D] -> [B, S, heads, D], a view."""
    return rows.transpose(0, 1)
