"""A rank's seat among its peers: how they agree, over gloo on any device, and the groups in which they exchange data.

Knows torch.distributed. Does not know what the ranks compute or who gives them orders.
"""

import gc
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Final, TypeAlias

import torch
import torch.distributed as dist

from wan_grpc.domain.topology import Layout, Topology
from wan_grpc.domain.traffic import RankTime
from wan_grpc.parallel.group import Group
from wan_grpc.parallel.meter import Meter

# A rank may wait for the next order for as long as nobody asks for a video. Dead and hung peers are found by the
# executor, which watches processes and progress, and not by this timeout.
_IDLE_TIMEOUT: Final = timedelta(days=365)
_MICROSECONDS: Final = 1e6
_NCCL_LEAVES_IT_TO_US: Final = {
    # Torch's own watchdog would end the process; ours aborts and builds anew.
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0",
    "TORCH_NCCL_ENABLE_MONITORING": "0",
    "TORCH_NCCL_DUMP_ON_TIMEOUT": "0",
}

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
    """The group as one rank sees it. Every method but `abort` is collective: all ranks call it, in the same order.

    Raises:
        PeersLostError: from any of them.
    """

    def __init__(self, topology: Topology, rank: int, device: torch.device) -> None:
        self.topology = topology
        self.rank = rank
        self.meter = Meter(device)
        self._groups: dict[Partition, Group] = {}

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
        made: dict[tuple[int, ...], Group] = {}
        for partition in _partitions(self.topology):
            for ranks in partition:
                if ranks not in made:
                    made[ranks] = self._make(ranks) if self.rank in ranks else self._make_others(ranks)
            self._groups[partition] = next(made[ranks] for ranks in partition if self.rank in ranks)
        with _peers():
            dist.barrier()

    def _make(self, ranks: tuple[int, ...]) -> Group:
        handle = self._handle(ranks)
        if handle is not None:
            dist.all_reduce(torch.zeros(1, device=self.meter.device), group=handle)
        return Group(ranks, self.rank, handle, self.meter)

    def _make_others(self, ranks: tuple[int, ...]) -> Group:
        self._handle(ranks)  # torch wants all ranks to take part
        return Group(ranks, ranks[0], None, self.meter)

    def _handle(self, ranks: tuple[int, ...]) -> object:
        if len(ranks) == 1:
            return None
        backend = "nccl" if self.meter.device.type == "cuda" else "gloo"  # RCCL goes by the name of NCCL
        with _peers():
            return dist.new_group(list(ranks), backend=backend, timeout=_IDLE_TIMEOUT)

    def abort(self) -> None:
        """Let this rank come out of an exchange in which it waits. From another thread, at any time."""
        for group in list(self._groups.values()):
            with suppress(RuntimeError):
                group.abort()

    def drop(self) -> None:
        """Give all links for data up, after a failure; the words go on."""
        for group in self._groups.values():
            with suppress(RuntimeError):
                group.close()
        self._groups.clear()
        self.meter.reset()
        gc.collect()  # gloo closes its sockets when the last of its objects is gone, and peers may wait for that

    def leave(self) -> None:
        dist.destroy_process_group()


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


def join(topology: Topology, rank: int, *, device: torch.device, store_path: str) -> Mesh:
    """Meet the peers of this host at `store_path`, a file that only they can open, and take seat `rank`."""
    # Without a name gloo and NCCL listen on whatever address the host name resolves to, which may be a public one.
    interface = "lo0" if sys.platform == "darwin" else "lo"
    os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    os.environ.setdefault("NCCL_SOCKET_IFNAME", interface)
    for name, value in _NCCL_LEAVES_IT_TO_US.items():
        os.environ.setdefault(name, value)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    store = dist.FileStore(store_path, topology.world_size)  # type: ignore[attr-defined]  # exported at run time
    dist.init_process_group("gloo", store=store, rank=rank, world_size=topology.world_size, timeout=_IDLE_TIMEOUT)
    mesh = Mesh(topology, rank, device)
    mesh.build()
    return mesh
