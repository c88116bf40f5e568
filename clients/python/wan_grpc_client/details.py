"""Reads google.rpc.Status from the trailer of a call without googleapis-common-protos.

The few fields are listed by hand in a descriptor pool of their own, under names of their own, so that nothing clashes
with whatever else the caller's process has loaded. What a field means is for errors.py to know.
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from google.protobuf.descriptor_pb2 import FieldDescriptorProto, FileDescriptorProto
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass

TRAILER: Final = "grpc-status-details-bin"
DOMAIN: Final = "wan-grpc"
_PACKAGE: Final = "wan_grpc_client.details"

# Name -> (number, type); a type in capitals is a message of this table. A map is its entries, as on the wire.
_MESSAGES: Final[dict[str, dict[str, tuple[int, str]]]] = {
    "Status": {"details": (3, "*Any")},
    "Any": {"type_url": (1, "string"), "value": (2, "bytes")},
    "ErrorInfo": {"reason": (1, "string"), "domain": (2, "string"), "metadata": (3, "*Entry")},
    "Entry": {"key": (1, "string"), "value": (2, "string")},
    "BadRequest": {"field_violations": (1, "*FieldViolation")},
    "FieldViolation": {"field": (1, "string"), "description": (2, "string"), "reason": (3, "string")},
    "RetryInfo": {"retry_delay": (1, "Duration")},
    "Duration": {"seconds": (1, "int64"), "nanos": (2, "int32")},
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Violation:
    """One thing wrong with one field of a request."""

    field: str
    """Path of the field in the request message, e.g. `spec.width`."""
    description: str
    reason: str
    """Stable name of the rule, e.g. `NOT_A_MULTIPLE`; empty when the server gave none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Details:
    """What a server of this API says beside code and message."""

    reason: str = ""
    metadata: Mapping[str, str]
    violations: tuple[Violation, ...] = ()
    retry_after_s: float | None = None


def read_details(trailer: bytes | None) -> Details:
    """What `trailer` holds; all empty when there is none, or when another system than this server wrote it."""
    found = Details(metadata={})
    try:
        packed = _parse("Status", trailer or b"").details
        parts = {part.type_url.rpartition("/")[2]: part.value for part in packed}
        info = _parse("ErrorInfo", parts.get("google.rpc.ErrorInfo", b""))
        if info.domain == DOMAIN:
            found = Details(
                reason=info.reason,
                metadata={entry.key: entry.value for entry in info.metadata},
                violations=_violations(parts.get("google.rpc.BadRequest", b"")),
                retry_after_s=_retry_after_s(parts.get("google.rpc.RetryInfo")),
            )
    except DecodeError:
        pass  # code and message of the call still tell what there is to tell
    return found


def _violations(packed: bytes) -> tuple[Violation, ...]:
    return tuple(
        Violation(field=violation.field, description=violation.description, reason=violation.reason)
        for violation in _parse("BadRequest", packed).field_violations
    )


def _retry_after_s(packed: bytes | None) -> float | None:
    if packed is None:
        return None
    delay = _parse("RetryInfo", packed).retry_delay
    return float(delay.seconds + delay.nanos / 1e9)


def _parse(name: str, data: bytes) -> Any:
    return _classes()[name].FromString(data)


@functools.cache
def _classes() -> dict[str, type[Message]]:
    file = FileDescriptorProto(name="wan_grpc_client/details.proto", package=_PACKAGE, syntax="proto3")
    for name, fields in _MESSAGES.items():
        message = file.message_type.add(name=name)
        message.field.extend(_field(field, number, kind) for field, (number, kind) in fields.items())
    pool = DescriptorPool()
    pool.Add(file)
    return {name: GetMessageClass(pool.FindMessageTypeByName(f"{_PACKAGE}.{name}")) for name in _MESSAGES}


def _field(name: str, number: int, kind: str) -> FieldDescriptorProto:
    bare = kind.lstrip("*")
    label = FieldDescriptorProto.LABEL_REPEATED if kind != bare else FieldDescriptorProto.LABEL_OPTIONAL
    field = FieldDescriptorProto(name=name, number=number, label=label)
    if bare in _MESSAGES:
        field.type, field.type_name = FieldDescriptorProto.TYPE_MESSAGE, f".{_PACKAGE}.{bare}"
    else:
        field.type = FieldDescriptorProto.Type.Value(f"TYPE_{bare.upper()}")
    return field
