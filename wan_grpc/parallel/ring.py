"""Attention whose keys and values rotate through the ranks of a ring (Liu et al., 2023).

Knows blocks of any sizes and how results over parts of the keys add up. Does not know who else divides what.
"""

from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch

from wan_grpc.domain.traffic import Exchange
from wan_grpc.parallel.group import Group

AttendWithLse: TypeAlias = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""(q, k, v) -> out, each [B, S, H, D], and the log-sum-exp of each query's scores, [B, H, S], fp32."""


def ring_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    group: Group,
    blocks: Sequence[int],
    attend: AttendWithLse,
) -> torch.Tensor:
    """Attention of this rank's queries [B, s, H, D] to the keys of all ranks of the ring, of which it holds its own.

    blocks: tokens of each rank. While one block is attended the next is on its way, so that a rank holds three blocks
    of keys and values at most: its own, the one it attends and passes on, and the one that arrives.

    Raises:
        ExchangeBrokenError: another rank is gone.
    """
    merged = Merge()
    held = [key.contiguous(), value.contiguous()]
    rooms = [[_room(tensor, max(blocks)) for tensor in held] for _ in range(min(group.size - 1, 2))]
    for hop in range(group.size):
        pending, arriving = None, held
        if hop + 1 < group.size:
            length = blocks[group.index - hop - 1]  # of the rank that many places back, around the end
            arriving = [_begin_of(room, key, length) for room in rooms[hop % 2]]
            pending = group.rotate(held, arriving, kind=Exchange.RING)
        if query.shape[1] and held[0].shape[1]:
            merged.add(*attend(query, *held))
        if pending is not None:
            pending.wait()
        held = arriving
    return merged.result(query)


class Merge:
    """Attention over some keys and over others to attention over all of them, in fp32 (online softmax, by parts)."""

    def __init__(self) -> None:
        self._out: torch.Tensor | None = None
        self._lse: torch.Tensor | None = None

    def add(self, out: torch.Tensor, lse: torch.Tensor) -> None:
        """out: [B, S, H, D]; lse: [B, H, S], natural, fp32."""
        lse = lse.transpose(1, 2).unsqueeze(3)
        if self._out is None or self._lse is None:
            self._out, self._lse = out.float(), lse
            return
        self._out.lerp_(out.float(), torch.sigmoid(lse - self._lse))
        self._lse = torch.logaddexp(self._lse, lse)

    def result(self, like: torch.Tensor) -> torch.Tensor:
        """[B, S, H, D] in the dtype of `like`."""
        return torch.empty_like(like) if self._out is None else self._out.to(like.dtype)


def _room(like: torch.Tensor, num_tokens: int) -> torch.Tensor:
    batch, _, heads, width = like.shape
    return like.new_empty(batch * num_tokens * heads * width)


def _begin_of(room: torch.Tensor, like: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """The first part of a flat room, as a contiguous [B, num_tokens, H, D]."""
    batch, _, heads, width = like.shape
    return room[: batch * num_tokens * heads * width].view(batch, num_tokens, heads, width)
