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

        Keys and values travel while the queries are computed.

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
        out: torch.Tensor | None = None
        leaving = []
        for part in parts:
            attended = self._attended(attend, asked.pop(0), keys.pop(0))
            out = attended.new_empty(shape) if out is None else out
            leaving.append(self._to_tokens(attended, out, part))
        assert out is not None, "there is a part"
        for part, (arriving, pending) in enumerate(leaving):
            pending.wait()
            self._copy_others(self._heads_by_rank(out, part), arriving)
        return out

    def _attended(
        self, attend: Attend, asked: tuple[torch.Tensor, Pending], keys: tuple[torch.Tensor, Pending]
    ) -> torch.Tensor:
        """What has arrived, attended; nothing of it is held afterwards."""
        (queries, queries_pending), (others, others_pending) = asked, keys
        queries_pending.wait()
        others_pending.wait()
        value, key = others.unbind(1)
        return attend(_by_batch(queries[:, 0]), _by_batch(key), _by_batch(value))

    def _to_heads(self, states: Sequence[torch.Tensor], part: int) -> tuple[torch.Tensor, Pending]:
        """Send each rank its heads of `states`, with this rank's tokens; all tokens of this rank's heads come back.

        Packed [tokens, len(states), B, heads, D], so that what arrives from several ranks lies in the tokens' order.
        This rank's own are put among them while the others travel.
        """
        views = [self._heads_by_rank(state, part) for state in states]
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

    def _to_tokens(self, attended: torch.Tensor, out: torch.Tensor, part: int) -> tuple[torch.Tensor, Pending]:
        """Send each rank its tokens of these heads, [B, S, heads, D]; this rank's tokens of other heads come back.

        Its tokens of its own heads are put into `out` meanwhile.
        """
        leaving = torch.split(attended.transpose(0, 1).contiguous(), list(self._shares))
        arriving = attended.new_empty((self._group.size, *leaving[self._group.index].shape))
        pending = self._group.swap(leaving, arriving.unbind(), kind=Exchange.ULYSSES)
        _copy(leaving[self._group.index], self._heads_by_rank(out, part)[self._group.index])
        return arriving, pending

    def _copy_others(self, into: torch.Tensor, states: torch.Tensor) -> None:
        """All but what is this rank's own. [ranks, ..] both."""
        for others in (slice(0, self._group.index), slice(self._group.index + 1, self._group.size)):
            _copy(states[others], into[others])

    def _heads_by_rank(self, states: torch.Tensor, part: int) -> torch.Tensor:
        """[B, s, H, D] as [ranks, s, B, heads, D], a view of this part of each rank's heads."""
        batch, num_tokens, num_heads, width = states.shape
        heads = num_heads // (self._group.size * self._num_parts)
        parts = states.view(batch, num_tokens, self._group.size, self._num_parts, heads, width)
        return parts[:, :, :, part].permute(2, 1, 0, 3, 4)


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
