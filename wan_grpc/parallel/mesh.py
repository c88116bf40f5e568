"""A rank's seat among its peers: how they agree, over gloo on any device, and the groups in which they exchange data.

Knows torch.distributed. Does not know what the ranks compute or who gives them orders.
"""

import gc
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from ipaddress import ip_address
from itertools import chain
from typing import TYPE_CHECKING, Final, TypeAlias

import psutil
import structlog
import torch
import torch.distributed as dist

from wan_grpc.domain.topology import Layout, Topology
from wan_grpc.domain.traffic import RankTime
from wan_grpc.parallel.group import Gate, Group
from wan_grpc.parallel.meter import Meter

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store  # torch.distributed has it, too, but not for mypy

# A rank may wait for the next order for as long as nobody asks for a video. Dead and hung peers are found by the
# executor, which watches processes and progress, and not by this timeout.
_IDLE_TIMEOUT: Final = timedelta(days=365)
_MICROSECONDS: Final = 1e6
_STUCK_S: Final = 1.0
"""Longest time that enqueueing an exchange takes while all is well."""
_NCCL_LEAVES_IT_TO_US: Final = {
    # Torch's own watchdog would end the process; ours aborts and builds anew.
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0",
    "TORCH_NCCL_ENABLE_MONITORING": "0",
    "TORCH_NCCL_DUMP_ON_TIMEOUT": "0",
    "NCCL_RUNTIME_CONNECT": "0",  # at the start, and not at the first use of each algorithm
}

_LOOPBACK: Final = "lo0" if sys.platform == "darwin" else "lo"
_IP: Final = (socket.AF_INET, socket.AF_INET6)

Partition: TypeAlias = tuple[tuple[int, ...], ...]
"""All ranks, in groups."""


class PeersLostError(Exception):
    """A peer ended in the middle of a word: the group can do nothing more together."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreed:
    """What all ranks said after a step."""

    word: int
    """The largest word that any rank said."""
    times: tuple[RankTime, ...]
    """Of the step, by rank."""


class Mesh:
    """The group as one rank sees it.

    Words and `build` are collective: all ranks call them, in the same order.

    Raises:
        PeersLostError: from any of these.
    """

    def __init__(self, topology: Topology, rank: int, device: torch.device, *, store: "Store | None" = None) -> None:
        """store: at which the ranks met. It is kept: of one written in Python, torch keeps only the half in C++."""
        self._store = store
        self.topology = topology
        self.rank = rank
        self.meter = Meter(device)
        self._gate = Gate()
        self._groups: dict[Partition, Group] = {}
        self.links_s = 0.0
        """That the last `build` took, waiting for the other ranks included."""

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    # ---- words --------------------------------------------------------------------------------------------------

    def agree(self, word: int, *, seconds: float = 0.0, waited_s: float = 0.0) -> Agreed:
        """Say a word and how long the step took here, and hear everybody's."""
        mine = torch.tensor([word, _to_us(seconds), _to_us(waited_s)], dtype=torch.int64)
        said = self._everybodys(mine)
        return Agreed(
            word=max(int(words[0]) for words in said),
            times=tuple(
                RankTime(seconds=int(words[1]) / _MICROSECONDS, waited_s=int(words[2]) / _MICROSECONDS)
                for words in said
            ),
        )

    def share(self, payload: bytes | None) -> bytes:
        """The payload of rank 0, on every rank. The others pass None."""
        size = torch.tensor([len(payload or b"")], dtype=torch.int64)
        with _peers():
            dist.broadcast(size, src=0)
        body = torch.frombuffer(bytearray(payload or bytes(int(size))), dtype=torch.uint8)
        with _peers():
            dist.broadcast(body, src=0)
        return body.numpy().tobytes()

    def gather(self, payload: bytes) -> tuple[bytes, ...]:
        """The payload of each rank, by rank, on every rank."""
        sizes = [int(size) for size in self._everybodys(torch.tensor([len(payload)], dtype=torch.int64))]
        padded = torch.zeros(max(*sizes, 1), dtype=torch.uint8)
        if payload:
            padded[: len(payload)] = torch.frombuffer(bytearray(payload), dtype=torch.uint8)
        bodies = self._everybodys(padded)
        return tuple(body[:size].numpy().tobytes() for body, size in zip(bodies, sizes, strict=True))

    def _everybodys(self, mine: torch.Tensor) -> list[torch.Tensor]:
        values = [torch.empty_like(mine) for _ in range(self.topology.world_size)]
        with _peers():
            dist.all_gather(values, mine)
        return values

    # ---- groups -------------------------------------------------------------------------------------------------

    def layout(self, num_passes: int) -> Layout:
        """Who computes what in a step of this many passes."""
        return self.topology.layout(num_passes)

    @property
    def world(self) -> Group:
        """All ranks."""
        return self.group((tuple(range(self.topology.world_size)),))

    def group(self, partition: Partition) -> Group:
        """The group of this rank in one of the partitions that the topology knows."""
        return self._groups[partition]

    def build(self) -> None:
        """Make every group that the topology may ask for, and let each exchange something, so that its links stand.

        After `drop` it makes them anew; all ranks must have dropped theirs.
        """
        began = time.monotonic()
        self._gate.open()
        partitions = _partitions(self.topology)
        made = {ranks: self._make(ranks) for ranks in dict.fromkeys(chain.from_iterable(partitions))}
        for partition in partitions:
            self._groups[partition] = next(group for ranks in partition if (group := made[ranks]) is not None)
        self.meter.reset()
        with _peers():
            dist.barrier()
        self.links_s = time.monotonic() - began

    def _make(self, ranks: tuple[int, ...]) -> Group | None:
        """The group of these ranks; None if this rank is not one of them. Torch wants all ranks to take part."""
        links = None if len(ranks) == 1 else self._connect(ranks)
        if self.rank not in ranks:
            return None
        group = Group(ranks, self.rank, links, self.meter, self._gate)
        group.warm_up()
        return group

    def _connect(self, ranks: tuple[int, ...]) -> object:
        options = None
        if self._backend == "nccl":
            # Its kernels need few multiprocessors, but those soon, beside attention that fills the device.
            options = dist.ProcessGroupNCCL.Options(is_high_priority_stream=True)
        with _peers():
            return dist.new_group(list(ranks), backend=self._backend, timeout=_IDLE_TIMEOUT, pg_options=options)

    @property
    def _backend(self) -> str:
        return "nccl" if self.meter.device.type == "cuda" else "gloo"  # RCCL goes by the name of NCCL

    def abort(self) -> None:
        """Let this rank come out of an exchange in which it waits. From another thread, at any time.

        Gloo knows no such thing, and needs none: the rank that failed has closed its links.
        """
        if self._backend == "nccl":
            self._gate.shut(patience_s=_STUCK_S)
            self._abort_links()

    @property
    def is_told(self) -> bool:
        """Whether the others know, or will by themselves, that an exchange broke off here."""
        return self._backend == "gloo" or self._gate.is_shut

    def drop(self) -> None:
        """Give all links for data up, after a failure; each rank for itself. The words go on."""
        if self._backend == "nccl":
            self._gate.shut(patience_s=0.0)
            self._abort_links()  # else closing would wait for exchanges that nobody joins any more
        for group in set(self._groups.values()):
            _or_log(group.close)
        self._groups.clear()
        self.meter.reset()
        gc.collect()  # gloo closes its sockets when the last of its objects is gone, and peers may wait for that

    def _abort_links(self) -> None:
        """All at once: the abort of one communicator may wait for the device, and so for the kernels of the others."""
        if groups := set(self._groups.values()):
            with ThreadPoolExecutor(len(groups)) as threads:
                list(threads.map(_or_log, [group.abort for group in groups]))

    def leave(self) -> None:
        dist.destroy_process_group()


def _or_log(end: Callable[[], None]) -> None:
    """Links that cannot even be ended in peace must not keep the others from it."""
    try:
        end()
    except RuntimeError as error:
        structlog.get_logger().warning("links between ranks did not end well", detail=str(error))


@contextmanager
def _peers() -> Iterator[None]:
    """Gloo's word for a connection that a peer has left is a RuntimeError."""
    try:
        yield
    except RuntimeError as error:
        raise PeersLostError(str(error)) from error


def _to_us(seconds: float) -> int:
    return round(seconds * _MICROSECONDS)


def _partitions(topology: Topology) -> tuple[Partition, ...]:
    layouts = [topology.layout(num_passes) for num_passes in (1, 2)]
    world = (tuple(range(topology.world_size)),)
    wanted = [world, topology.text_groups]
    for layout in layouts:
        wanted += [layout.cfg_groups, layout.sequence_groups, layout.ulysses_groups, layout.ring_groups]
    return tuple(dict.fromkeys(wanted))


def join(
    topology: Topology,
    rank: int,
    *,
    device: torch.device,
    store_path: str | None = None,
    store: "Store | None" = None,
    address: str | None = None,
) -> Mesh:
    """Meet the peers and take seat `rank`.

    store_path: a file that only ranks of this host can open, at which they meet when there are no others.
    store: at which ranks of several hosts meet.
    address: of this host, on the network through which it reaches the others; None when there are none.

    Raises:
        ValueError: no interface of this host has that address.
    """
    # Without a name gloo and NCCL listen on whatever address the host name resolves to, which may be a public one.
    interface = _LOOPBACK if address is None else interface_of(address)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={interface}")  # without the sign: all whose names begin so
    os.environ.update(_NCCL_LEAVES_IT_TO_US)  # whatever torchrun has put there
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.zeros(1, device=device)  # opens the device before all meet, so that it is no part of the links' time
    if store is None:
        assert store_path is not None, "there is a place to meet"
        store = dist.FileStore(store_path, topology.world_size)  # type: ignore[attr-defined]  # exported at run time
    dist.init_process_group("gloo", store=store, rank=rank, world_size=topology.world_size, timeout=_IDLE_TIMEOUT)
    mesh = Mesh(topology, rank, device, store=store)
    mesh.build()
    return mesh


def interface_of(address: str) -> str:
    """The network interface of this host that has this address."""
    wanted = ip_address(address)
    if wanted.is_loopback:
        return _LOOPBACK  # 127.0.0.2 is its own, too, and in no list
    for name, entries in psutil.net_if_addrs().items():
        if any(entry.family in _IP and ip_address(entry.address) == wanted for entry in entries):
            return name
    raise ValueError(f"no network interface of this host has the address {address}")
