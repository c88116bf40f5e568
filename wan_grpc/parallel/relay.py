"""The words between a rank's store and the process that keeps it. Imports no torch: that process has none.

Knows the codec. Does not know connections, nor who asks what.
"""

from typing import TypeAlias

import msgspec


class Set(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    key: str
    value: bytes


class Get(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The value of a key, once it has one."""

    key: str
    timeout_s: float


class Add(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The number under a key, from 0, after this was added to it."""

    key: str
    amount: int


class Wait(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Answered once every key has a value."""

    keys: tuple[str, ...]
    timeout_s: float


class Check(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Whether every key has a value."""

    keys: tuple[str, ...]


class CompareSet(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Sets `desired` where `expected` is, or where nothing is and nothing is expected; answers with what holds then."""

    key: str
    expected: bytes
    desired: bytes


class Delete(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Whether there was something under the key."""

    key: str


class Count(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The number of keys."""


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    value: bytes | int | bool | None = None
    timed_out: bool = False


Ask: TypeAlias = Set | Get | Add | Wait | Check | CompareSet | Delete | Count

_encoder = msgspec.msgpack.Encoder()
_asks: msgspec.msgpack.Decoder[Ask] = msgspec.msgpack.Decoder(Ask)
_answers = msgspec.msgpack.Decoder(Answer)


def encode(message: Ask | Answer) -> bytes:
    return _encoder.encode(message)


def decode_ask(data: bytes) -> Ask:
    return _asks.decode(data)


def decode_answer(data: bytes) -> Answer:
    return _answers.decode(data)
