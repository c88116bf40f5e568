"""The words between the server process and its ranks, and between ranks. One frozen type a message, never pickle.

Knows the codec. Does not know pipes or collectives.
"""

from typing import TypeAlias

import msgspec

from wan_grpc.domain.errors import Failure
from wan_grpc.domain.events import Progress
from wan_grpc.domain.images import InputFrames
from wan_grpc.domain.request import VideoRequest
from wan_grpc.domain.topology import Topology
from wan_grpc.domain.traffic import RankTime, Traffic
from wan_grpc.pipeline.checkpoint import Checkpoint


class Head(msgspec.Struct, frozen=True, kw_only=True):
    """Where ranks of several hosts meet: the server's own store, which asks for the secret."""

    host: str
    port: int
    group: str
    secret: bytes
    """Never on the wire: each host has it from its own file."""

    def __repr__(self) -> str:
        return f"Head(host={self.host!r}, port={self.port}, group={self.group!r}, secret=...)"


class RankConfig(msgspec.Struct, frozen=True, kw_only=True):
    """All that a rank is told at birth."""

    rank: int
    topology: Topology
    rendezvous: str
    """Path of a file, private to this server, at which the ranks of one group meet when all are on its host."""
    head: Head | None = None
    """Where they meet otherwise."""
    local_rank: int = 0
    """Which device of its host a rank computes on."""
    first_rank: int = 0
    """What rank 0 of this group is called outside."""
    demand: str = ""
    """How many devices a host needs, and why, in a sentence; for when they are not there."""
    checkpoint: Checkpoint
    device: str
    dtype: str
    load_format: str
    cpu_threads: int
    slot_bytes: int
    num_slots: int
    log_format: str
    log_level: str


class Run(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Server to rank 0, rank 0 to all: compute this video."""

    generation: str
    video: VideoRequest
    frames: InputFrames = InputFrames()


class Stop(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Server to rank 0, rank 0 to all: leave the loop and end."""


class Cancel(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Server to rank 0: leave this generation at the next step boundary. Ignored when it is not running."""

    generation: str


class SlotFreed(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Server to rank 0: the frame in this slot of the ring was taken."""

    slot: int


class Ready(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Every rank to the server: the model is loaded."""

    rank: int
    device: str
    dtype: str
    attention: str
    used_bytes: int
    links_s: float
    """That it took to make the links to the other ranks, waiting for them included."""


class LoadFailed(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Any rank to the server: the model cannot be loaded, and trying again would not help."""

    rank: int
    message: str


class StepDone(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Rank 0 to the server: a stage began or the devices of all ranks finished a step of it."""

    progress: Progress
    times: tuple[RankTime, ...] = ()
    """Of the step, by rank; empty when a stage began."""


class PreviewMade(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Rank 0 to the server: what the video is going to be, as far as this step of denoising can tell."""

    step: int
    width: int
    height: int
    rgb: bytes
    """RGB24, row by row."""
    time_s: float
    """That the device took for it."""


class FrameReady(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Rank 0 to the server: one RGB24 frame stands in this slot of the ring."""

    slot: int


class RankFailed(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Any rank to the server: this generation raised here. RunEnded follows when all ranks have left it."""

    generation: str
    rank: int
    failure: Failure


class Abort(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Server to every rank, on its lifeline: another rank has failed; wait for nothing more in this generation."""

    generation: str


class MemoryUse(msgspec.Struct, frozen=True, kw_only=True):
    used_bytes: int
    peak_bytes: int


class RankAccount(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Rank to rank: what a generation cost here."""

    memory: MemoryUse
    traffic: tuple[Traffic, ...]


class RunEnded(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Rank 0 to the server: the group is free again."""

    generation: str
    memory: tuple[MemoryUse, ...]
    """By rank."""
    cancelled: bool = False
    failure: Failure | None = None
    traffic: tuple[tuple[Traffic, ...], ...] = ()
    """What each rank exchanged with others, by rank; empty after a failure."""


Order: TypeAlias = Run | Stop
ToRank: TypeAlias = Run | Stop | Cancel | SlotFreed
FromRank: TypeAlias = Ready | LoadFailed | StepDone | PreviewMade | FrameReady | RankFailed | RunEnded
News: TypeAlias = StepDone | PreviewMade | RankFailed | RunEnded
"""What an executor tells of a generation."""

_configs = msgspec.msgpack.Decoder(RankConfig)
_encoder = msgspec.msgpack.Encoder()
_orders: msgspec.msgpack.Decoder[Order] = msgspec.msgpack.Decoder(Order)
_to_rank: msgspec.msgpack.Decoder[ToRank] = msgspec.msgpack.Decoder(ToRank)
_aborts: msgspec.msgpack.Decoder[Abort] = msgspec.msgpack.Decoder(Abort)
_accounts: msgspec.msgpack.Decoder[RankAccount] = msgspec.msgpack.Decoder(RankAccount)
_from_rank: msgspec.msgpack.Decoder[FromRank] = msgspec.msgpack.Decoder(FromRank)


def encode(message: ToRank | FromRank | RankConfig | Abort | RankAccount) -> bytes:
    return _encoder.encode(message)


def decode_order(data: bytes) -> Order:
    return _orders.decode(data)


def decode_to_rank(data: bytes) -> ToRank:
    return _to_rank.decode(data)


def decode_abort(data: bytes) -> Abort:
    return _aborts.decode(data)


def decode_account(data: bytes) -> RankAccount:
    return _accounts.decode(data)


def decode_from_rank(data: bytes) -> FromRank:
    return _from_rank.decode(data)


def decode_config(data: bytes) -> RankConfig:
    return _configs.decode(data)
