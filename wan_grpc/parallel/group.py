"""Some ranks that exchange tensors, and the exchanges that work divided between ranks needs.

Knows torch.distributed and the sizes of uneven parts. Does not know what the tensors mean.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
import torch.distributed as dist

from wan_grpc.domain.traffic import Exchange
from wan_grpc.parallel.meter import Meter

_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # its name from torch 2.13 on


class ExchangeBrokenError(Exception):
    """An exchange of data did not come to its end, because another rank failed or its link was cut."""


@contextmanager
def exchanging() -> Iterator[None]:
    """Torch's word for a broken exchange is a RuntimeError, which running out of memory is, too."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise ExchangeBrokenError(str(error)) from error


class Pending:
    """An exchange that is under way; its inputs must stay as they are, and its outputs be left alone, until `wait`."""

    def __init__(self, works: Sequence[Any], timed: Callable[[], AbstractContextManager[None]]) -> None:
        self._works = works
        self._timed = timed

    def wait(self) -> None:
        """On a GPU the current stream waits, not the host."""
        with self._timed(), exchanging():
            for work in self._works:
                work.wait()


class Group:
    """The ranks of one group as one of them sees it. Every method is collective among them, in the same order.

    Raises:
        ExchangeBrokenError: from any of them.
    """

    def __init__(self, ranks: tuple[int, ...], rank: int, handle: Any, meter: Meter) -> None:
        """ranks: by their numbers in the world. handle: torch's group; None for a rank alone."""
        self.ranks = ranks
        self.index = ranks.index(rank)
        self._handle = handle
        self._meter = meter

    @property
    def size(self) -> int:
        return len(self.ranks)

    @property
    def device(self) -> torch.device:
        return self._meter.device

    def all_to_all(
        self, parts: torch.Tensor, into: torch.Tensor, *, sent: Sequence[int], received: Sequence[int], kind: Exchange
    ) -> Pending:
        """Rows of `parts` to each rank, `sent[i]` to the i-th; rows from each, `received[i]` from the i-th, in order.

        parts: [sum(sent), ...]; into: [sum(received), ...]; contiguous.
        """
        self._count(kind, parts, sum(sent) - sent[self.index])
        with exchanging():
            work = dist.all_to_all_single(into, parts, list(received), list(sent), group=self._handle, async_op=True)
        return Pending([work], lambda: self._meter.timing(kind))

    def all_gather(self, part: torch.Tensor, *, sizes: Sequence[int], kind: Exchange) -> torch.Tensor:
        """The parts of all ranks, one after the other: [sizes[i], ...] of the i-th, [sum(sizes), ...] on each."""
        if self.size == 1:
            return part
        most = max(sizes)
        padded = part if part.shape[0] == most else part.new_zeros((most, *part.shape[1:]))
        if padded is not part:
            padded[: part.shape[0]] = part
        padded = padded.contiguous()
        result = part.new_empty((self.size * most, *part.shape[1:]))
        self._count(kind, padded, padded.shape[0], times=self.size - 1)
        with self._meter.timing(kind), exchanging():
            _all_gather(result, padded, group=self._handle)
        if len(set(sizes)) == 1:
            return result
        return torch.cat([result[i * most : i * most + size] for i, size in enumerate(sizes)])

    def rotate(self, mine: Sequence[torch.Tensor], into: Sequence[torch.Tensor], *, kind: Exchange) -> Pending:
        """Send `mine` to the next rank, around the end to the first, and fill `into` with what the one before sends.

        All contiguous, and of the same shapes at both ends of each link.
        """
        following, previous = self.ranks[(self.index + 1) % self.size], self.ranks[self.index - 1]
        sends = [dist.P2POp(dist.isend, tensor, following, self._handle) for tensor in mine if tensor.numel()]
        receives = [dist.P2POp(dist.irecv, tensor, previous, self._handle) for tensor in into if tensor.numel()]
        num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in mine)
        return self._send_and_receive([*sends, *receives], kind, num_bytes)

    def swap_edges(
        self, to_previous: torch.Tensor, to_next: torch.Tensor, *, kind: Exchange
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """What the rank before sends to its next, and the rank after to its previous; None at the ends of the line.

        Both tensors have the shape of what comes back, on every rank.
        """
        from_previous = from_next = None
        operations, num_bytes = [], 0
        if self.index > 0:
            from_previous = torch.empty_like(to_previous, memory_format=torch.contiguous_format)
            peer = self.ranks[self.index - 1]
            operations += [
                dist.P2POp(dist.isend, to_previous.contiguous(), peer, self._handle),
                dist.P2POp(dist.irecv, from_previous, peer, self._handle),
            ]
            num_bytes += to_previous.numel() * to_previous.element_size()
        if self.index + 1 < self.size:
            from_next = torch.empty_like(to_next, memory_format=torch.contiguous_format)
            peer = self.ranks[self.index + 1]
            operations += [
                dist.P2POp(dist.isend, to_next.contiguous(), peer, self._handle),
                dist.P2POp(dist.irecv, from_next, peer, self._handle),
            ]
            num_bytes += to_next.numel() * to_next.element_size()
        self._send_and_receive(operations, kind, num_bytes).wait()
        return from_previous, from_next

    def broadcast(self, tensor: torch.Tensor, *, source: int, kind: Exchange) -> torch.Tensor:
        """Fill `tensor` with that of the rank at index `source`."""
        if self.size > 1:
            if self.index == source:
                self._count(kind, tensor, tensor.shape[0], times=self.size - 1)
            with self._meter.timing(kind), exchanging():
                dist.broadcast(tensor, src=self.ranks[source], group=self._handle)
        return tensor

    def add_up(self, tensor: torch.Tensor, *, kind: Exchange) -> torch.Tensor:
        """The sum of all ranks' tensors, in place."""
        if self.size > 1:
            self._count(kind, tensor, tensor.shape[0])
            with self._meter.timing(kind), exchanging():
                dist.all_reduce(tensor, group=self._handle)
        return tensor

    def abort(self) -> None:
        """From another thread: let whoever waits in an exchange of NCCL or RCCL come out of it."""
        if self._handle is not None and self.device.type == "cuda":
            self._handle.abort()

    def close(self) -> None:
        """Give the links up. With gloo, others that wait for this rank come out of their exchange with an error."""
        handle, self._handle = self._handle, None
        if handle is not None:
            dist.destroy_process_group(handle)

    def _send_and_receive(self, operations: list[Any], kind: Exchange, num_bytes: int) -> Pending:
        self._meter.count(kind, num_bytes)
        with exchanging():
            works = dist.batch_isend_irecv(operations) if operations else []
        return Pending(works, lambda: self._meter.timing(kind))

    def _count(self, kind: Exchange, tensor: torch.Tensor, rows: int, *, times: int = 1) -> None:
        if tensor.shape[0]:
            self._meter.count(kind, tensor.numel() // tensor.shape[0] * rows * tensor.element_size() * times)
