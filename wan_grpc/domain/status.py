"""How a server stands right now, for readiness and GetModel."""

from dataclasses import dataclass

from wan_grpc.domain.events import RankMemory
from wan_grpc.domain.topology import Topology


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStatus:
    ready: bool
    """True while a request made now would be admitted and begin as soon as its turn comes."""
    detail: str
    """One sentence: what the server waits for when it is not ready."""
    topology: Topology
    """Of each replica."""
    num_replicas: int = 1
    device: str
    """As the ranks found it, e.g. `cuda: NVIDIA H200`; empty until they have."""
    dtype: str
    attention: str
    load_format: str
    queue_limit: int
    num_queued: int
    num_running: int
    rank_memory: tuple[RankMemory, ...]
