"""Some ranks that exchange tensors, and the exchanges that work divided between ranks needs.

Knows torch.distributed and the sizes of uneven parts. Does not know what the tensors mean.
"""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeAlias

import torch
import torch.distributed as dist

from wan_grpc.domain.traffic import Exchange
from wan_grpc.parallel.meter import Meter

_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # its name from torch 2.13 on

ByPeer: TypeAlias = Mapping[int, torch.Tensor]
"""Tensors that go to or come from a rank of the group, by its index; contiguous."""


class ExchangeBrokenError(Exception):
    """An exchange of data did not come to its end, because another rank failed or its link was cut."""


@contextmanager
def _in_our_words() -> Iterator[None]:
    """Torch's word for a broken exchange is a RuntimeError, which running out of memory is, too."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise ExchangeBrokenError(str(error)) from error


class Gate:
    """Keeps an abort from falling into the middle of a call that enqueues an exchange, and further ones from following.

    Without it ranks of NCCL that were aborted while they enqueued exchanges (in decoding) were seen not to come out.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.is_shut = False

    @contextmanager
    def passing(self) -> Iterator[None]:
        """The block enqueues an exchange.

        Raises:
            ExchangeBrokenError: the gate is shut, or torch says so of the exchange.
        """
        with self._lock:
            if self.is_shut:
                raise ExchangeBrokenError("another rank has failed")
            with _in_our_words():
                yield

    def shut(self, *, patience_s: float) -> None:
        """From another thread. After `patience_s` whoever is passing is taken to be stuck there."""
        got = self._lock.acquire(timeout=patience_s)
        self.is_shut = True
        if got:
            self._lock.release()

    def open(self) -> None:
        self.is_shut = False


class Pending:
    """An exchange that is under way; its inputs must stay as they are, and its outputs be left alone, until `wait`."""

    def __init__(
        self, works: Sequence[Any], timed: Callable[[], AbstractContextManager[None]], *, keep: Sequence[Any] = ()
    ) -> None:
        """keep: what holds inputs that nobody else does."""
        self._works = works
        self._timed = timed
        self._keep = keep

    def wait(self) -> None:
        """On a GPU the current stream waits, not the host."""
        with self._timed(), _in_our_words():
            for work in self._works:
                work.wait()
        self._works = self._keep = ()


class Group:
    """The ranks of one group as one of them sees it. Exchanges are collective among them, in the same order.

    Raises:
        ExchangeBrokenError: from any of them.
    """

    def __init__(self, ranks: tuple[int, ...], rank: int, links: Any, meter: Meter, gate: Gate) -> None:
        """ranks: by their numbers in the world. links: torch's group; None for a rank alone. gate: of all groups."""
        self.ranks = ranks
        self.index = ranks.index(rank)
        self._links = links
        self._meter = meter
        self._gate = gate

    @property
    def _open_links(self) -> Any:
        assert self._links is not None, f"the links between ranks {self.ranks} are closed"  # torch would take the world
        return self._links

    @property
    def size(self) -> int:
        return len(self.ranks)

    @property
    def device(self) -> torch.device:
        return self._meter.device

    def swap(self, parts: Sequence[torch.Tensor], into: Sequence[torch.Tensor], *, kind: Exchange) -> Pending:
        """Send `parts[i]` to the i-th rank and fill `into[i]` with what it sends, but for this rank itself.

        All contiguous, and of the same shapes at both ends of each link.
        """
        assert len(parts) == len(into) == self.size, (len(parts), len(into), self.ranks)
        others = [index for index in range(self.size) if index != self.index]
        return self._meet([({i: parts[i] for i in others}, {i: into[i] for i in others})], kind)

    def all_gather(self, part: torch.Tensor, *, sizes: Sequence[int], kind: Exchange) -> torch.Tensor:
        """The parts of all ranks, one after the other: [sizes[i], ...] of the i-th, [sum(sizes), ...] on each."""
        if self.size == 1:
            return part
        assert part.shape[0] == sizes[self.index], (sizes, part.shape)
        most = max(sizes)
        padded = part if part.shape[0] == most else part.new_zeros((most, *part.shape[1:]))
        if padded is not part:
            padded[: part.shape[0]] = part
        padded = padded.contiguous()
        result = part.new_empty((self.size * most, *part.shape[1:]))
        self._count(kind, padded, padded.shape[0], times=self.size - 1)
        with self._meter.timing(kind), self._gate.passing():
            _all_gather(result, padded, group=self._open_links)
        if len(set(sizes)) == 1:
            return result
        return torch.cat([result[i * most : i * most + size] for i, size in enumerate(sizes)])

    def rotate(self, mine: Sequence[torch.Tensor], into: Sequence[torch.Tensor], *, kind: Exchange) -> Pending:
        """Send `mine` to the next rank, around the end to the first, and fill `into` with what the one before sends.

        All contiguous, and of the same shapes at both ends of each link.
        """
        following, previous = (self.index + 1) % self.size, (self.index - 1) % self.size
        pairs = zip(mine, into, strict=True)
        return self._meet([({following: leaving}, {previous: arriving}) for leaving, arriving in pairs], kind)

    def begin_swap_edges(
        self, to_previous: torch.Tensor, to_next: torch.Tensor | None, *, kind: Exchange
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, Pending]:
        """What the rank before sends to its next, and the rank after to its previous; None at the ends of the line.

        Both tensors have the shape of what comes back, on every rank. Without `to_next` nothing goes that way.
        """
        previous = self.index - 1 if self.index > 0 else None
        following = self.index + 1 if self.index + 1 < self.size else None
        from_previous = None if previous is None or to_next is None else _blank(to_next)
        from_next = None if following is None else _blank(to_previous)
        leaving = _by_peer((previous, to_previous), (following, to_next))
        arriving = _by_peer((previous, from_previous), (following, from_next))
        leaving = {index: line.contiguous() for index, line in leaving.items()}
        return from_previous, from_next, self._pair_up([(leaving, arriving)], kind)

    def gather(self, part: torch.Tensor, *, sizes: Sequence[int], dim: int, kind: Exchange) -> torch.Tensor | None:
        """The parts of all ranks joined along `dim`, of which they have `sizes`, on the first; None on the others."""
        if self.size == 1:
            return part
        part = part.contiguous()
        if self.index > 0:
            self._pair_up([({0: part}, {})], kind).wait()
            return None
        shapes = [(*part.shape[:dim], size, *part.shape[dim + 1 :]) for size in sizes]
        parts = [part, *(part.new_empty(shape) for shape in shapes[1:])]
        self._pair_up([({}, dict(enumerate(parts[1:], start=1)))], kind).wait()
        return torch.cat(parts, dim)

    def broadcast(self, tensor: torch.Tensor, *, source: int, kind: Exchange) -> torch.Tensor:
        """Fill `tensor` with that of the rank at index `source`."""
        if self.size > 1:
            if self.index == source:
                self._count(kind, tensor, tensor.shape[0], times=self.size - 1)
            with self._meter.timing(kind), self._gate.passing():
                dist.broadcast(tensor, src=self.ranks[source], group=self._open_links)
        return tensor

    def add_up(self, tensor: torch.Tensor, *, kind: Exchange) -> torch.Tensor:
        """The sum of all ranks' tensors, in place."""
        if self.size > 1:
            self._count(kind, tensor, tensor.shape[0])
            with self._meter.timing(kind), self._gate.passing():
                dist.all_reduce(tensor, group=self._open_links)
        return tensor

    def warm_up(self) -> None:
        """Exchange something in every way, so that links which are made at their first use stand.

        What waits for a link is the host, and a host is not called out of that as cleanly as a device out of a kernel.
        """
        if self.size == 1:
            return
        probe = torch.zeros(self.size, device=self.device)
        self.add_up(probe, kind=Exchange.TEXT)
        self.broadcast(probe, source=0, kind=Exchange.TEXT)
        self.all_gather(probe, sizes=[self.size] * self.size, kind=Exchange.TOKENS)
        self.swap(torch.split(probe, 1), torch.split(torch.empty_like(probe), 1), kind=Exchange.ULYSSES).wait()
        self.rotate([probe], [torch.empty_like(probe)], kind=Exchange.RING).wait()

    def abort(self) -> None:
        """From another thread, with the gate shut: let whoever waits in an exchange of NCCL or RCCL come out of it."""
        links = self._links
        if links is not None:
            links.abort()

    def close(self) -> None:
        """Give the links up. With gloo, others that wait for this rank come out of their exchange with an error."""
        links, self._links = self._links, None
        if links is not None:
            dist.destroy_process_group(links)

    def _meet(self, rounds: Sequence[tuple[ByPeer, ByPeer]], kind: Exchange) -> Pending:
        """What leaves and what arrives in each round, by peer. All ranks of the group call this, with as many rounds.

        On GPUs each round is one call of all ranks, whatever each of them has for it, since NCCL exchanges empty parts,
        too. In pairs it would cost memory: torch lets what is sent be used again only when the device has come past
        it, and the host, which is layers ahead, would take new memory until there is none.
        """
        if self.device.type != "cuda":
            return self._pair_up(rounds, kind)
        self._meter.count(kind, _leaving_bytes(rounds))
        with self._gate.passing():
            works = [self._all_to_all(leaving, arriving) for leaving, arriving in rounds]
        return Pending(works, lambda: self._meter.timing(kind), keep=rounds)

    def _all_to_all(self, leaving: ByPeer, arriving: ByPeer) -> Any:
        nothing = next(iter(leaving.values())).new_empty(0)
        parts, into = ([tensors.get(index, nothing) for index in range(self.size)] for tensors in (leaving, arriving))
        return dist.all_to_all(into, parts, group=self._open_links, async_op=True)

    def _pair_up(self, rounds: Sequence[tuple[ByPeer, ByPeer]], kind: Exchange) -> Pending:
        """The same between pairs of ranks alone, where small things are exchanged, or gloo does it.

        Gloo's own exchange of lists among all knows parts of one size only.
        """
        sends = [(dist.isend, index, part) for leaving, _ in rounds for index, part in leaving.items()]
        receives = [(dist.irecv, index, room) for _, arriving in rounds for index, room in arriving.items()]
        operations = [
            dist.P2POp(action, tensor, self.ranks[index], self._open_links)
            for action, index, tensor in (*sends, *receives)
            if tensor.numel()
        ]
        if not operations:
            return Pending((), nullcontext)
        self._meter.count(kind, _leaving_bytes(rounds))
        with self._gate.passing():
            works = dist.batch_isend_irecv(operations)
        return Pending(works, lambda: self._meter.timing(kind), keep=operations)

    def _count(self, kind: Exchange, tensor: torch.Tensor, rows: int, *, times: int = 1) -> None:
        if tensor.shape[0]:
            self._meter.count(kind, tensor.numel() // tensor.shape[0] * rows * tensor.element_size() * times)


def _by_peer(*tensors: tuple[int | None, torch.Tensor | None]) -> dict[int, torch.Tensor]:
    """Leaves out peers and tensors that there are none of."""
    return {index: tensor for index, tensor in tensors if index is not None and tensor is not None}


def _leaving_bytes(rounds: Sequence[tuple[ByPeer, ByPeer]]) -> int:
    return sum(_num_bytes(tensor) for leaving, _ in rounds for tensor in leaving.values())


def _blank(like: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(like, memory_format=torch.contiguous_format)


def _num_bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()
