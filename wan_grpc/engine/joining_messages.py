"""The words between the server and the other hosts, from which ranks of its group come. Never pickle.

Knows the codec. Does not know sockets, nor what ranks say once they run.
"""

from typing import Literal, TypeAlias

import msgspec


class Join(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """A new connection, which stays: this process can start one rank, again and again."""

    node_rank: int
    """Which of the hosts it is, from 1; 0 is the server's."""
    local_rank: int
    """Which of the ranks, and devices, of its host."""
    num_local: int
    """How many ranks its host has."""
    host_name: str
    version: str


class Attach(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """A new connection: the pipe or the lifeline of this rank of this group."""

    group: str
    rank: int
    link: Literal["pipe", "lifeline"]


class UseStore(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """A new connection: a rank of this group asks its store."""

    group: str


class Seated(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Server to a host: you have joined, and will start this rank of each group."""

    rank: int


class Start(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Server to a host: start this rank of a new group."""

    group: str
    rank: int
    config: bytes
    fingerprint: str
    """Of the server's checkpoint."""


class End(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Server to a host: the group is over; end your rank of it, if you have not."""

    group: str


class Leave(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Server to a host: there will be no further group."""


class Refused(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Server to a host: there is no place for you."""

    reason: str
    is_final: bool
    """Whether asking again is no use."""


class Ended(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """A host to the server: the rank that it had started for this group has ended, in these words."""

    group: str
    detail: str


Hello: TypeAlias = Join | Attach | UseStore
ToHost: TypeAlias = Seated | Start | End | Leave | Refused

_encoder = msgspec.msgpack.Encoder()
_hellos: msgspec.msgpack.Decoder[Hello] = msgspec.msgpack.Decoder(Hello)
_to_host: msgspec.msgpack.Decoder[ToHost] = msgspec.msgpack.Decoder(ToHost)
_ended = msgspec.msgpack.Decoder(Ended)


def encode(message: Hello | ToHost | Ended) -> bytes:
    return _encoder.encode(message)


def decode_hello(data: bytes) -> Hello:
    return _hellos.decode(data)


def decode_to_host(data: bytes) -> ToHost:
    return _to_host.decode(data)


def decode_ended(data: bytes) -> Ended:
    return _ended.decode(data)
