"""A rank's seat among its peers: the control collectives that every group needs, over gloo on any device.

Knows torch.distributed. Does not know what the ranks compute or who gives them orders.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from wan_grpc.domain.topology import Topology

# A rank may wait for the next order for as long as nobody asks for a video. Dead peers are found by the executor,
# which watches processes, and not by this timeout.
_IDLE_TIMEOUT = timedelta(days=365)


class PeersLostError(Exception):
    """A peer ended in the middle of a collective: the group can do nothing more together."""


class Mesh:
    """The group as one rank sees it. Every method is collective: all ranks call it, in the same order.

    Raises:
        PeersLostError: from any of them.
    """

    def __init__(self, topology: Topology, rank: int) -> None:
        self.topology = topology
        self.rank = rank

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def agree(self, word: int) -> int:
        """The largest word that any rank said."""
        flag = torch.tensor([word], dtype=torch.int64)
        with _peers():
            dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return int(flag)

    def share(self, payload: bytes | None) -> bytes:
        """The payload of rank 0, on every rank. The others pass None."""
        size = torch.tensor([len(payload or b"")], dtype=torch.int64)
        with _peers():
            dist.broadcast(size, src=0)
        body = torch.frombuffer(bytearray(payload or bytes(int(size))), dtype=torch.uint8)
        with _peers():
            dist.broadcast(body, src=0)
        return body.numpy().tobytes()

    def gather(self, value: int) -> tuple[int, ...]:
        """The value of each rank, by rank, on every rank."""
        mine = torch.tensor([value], dtype=torch.int64)
        values = [torch.empty_like(mine) for _ in range(self.topology.world_size)]
        with _peers():
            dist.all_gather(values, mine)
        return tuple(int(v) for v in values)

    def leave(self) -> None:
        dist.destroy_process_group()


@contextmanager
def _peers() -> Iterator[None]:
    """Gloo's word for a connection that a peer has left is a RuntimeError."""
    try:
        yield
    except RuntimeError as error:
        raise PeersLostError(str(error)) from error


def join(topology: Topology, rank: int, *, store_path: str) -> Mesh:
    """Meet the peers of this host at `store_path`, a file that only they can open, and take seat `rank`."""
    # Without a name gloo listens on whatever address the host name resolves to, which may be a public one.
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")
    store = dist.FileStore(store_path, topology.world_size)  # type: ignore[attr-defined]  # exported at run time
    dist.init_process_group("gloo", store=store, rank=rank, world_size=topology.world_size, timeout=_IDLE_TIMEOUT)
    return Mesh(topology, rank)
