"""What a caller is told when a call goes wrong: the one table from reason to status, and the details beside it.

Knows gRPC codes and google.rpc messages. Does not know which fault it was; domain/errors.py has the words.
"""

from collections.abc import Mapping
from types import MappingProxyType

import grpc
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2  # type: ignore[import-untyped]

from wan_grpc.domain.errors import (
    CANCELLING_REASONS,
    Failure,
    InvalidRequestError,
    NotSupportedError,
    Reason,
    ServiceError,
    Violation,
)
from wan_grpc.domain.events import State

DOMAIN = "wan-grpc"
_MAX_MESSAGE_BYTES = 768
_SENTENCE_BYTES = (192, 96, 48, 24, 0)
_MAX_DETAILS_BYTES = 3072
"""Trailers travel as base64 and share the 8 KiB that clients allow all metadata of a call."""

STATUS_CODES: Mapping[Reason, grpc.StatusCode] = MappingProxyType(
    {
        Reason.INVALID_REQUEST: grpc.StatusCode.INVALID_ARGUMENT,
        Reason.NOT_SUPPORTED: grpc.StatusCode.UNIMPLEMENTED,
        Reason.GENERATION_NOT_FOUND: grpc.StatusCode.NOT_FOUND,
        Reason.REQUEST_ID_REUSED: grpc.StatusCode.ALREADY_EXISTS,
        Reason.GENERATION_NOT_FINISHED: grpc.StatusCode.FAILED_PRECONDITION,
        Reason.OFFSET_OUT_OF_RANGE: grpc.StatusCode.OUT_OF_RANGE,
        Reason.QUEUE_FULL: grpc.StatusCode.RESOURCE_EXHAUSTED,
        Reason.TOO_MANY_CALLS: grpc.StatusCode.RESOURCE_EXHAUSTED,
        Reason.SHUTTING_DOWN: grpc.StatusCode.UNAVAILABLE,
        Reason.CANCELLED_BY_CALLER: grpc.StatusCode.CANCELLED,
        Reason.ABANDONED: grpc.StatusCode.CANCELLED,
        Reason.DEADLINE_EXCEEDED: grpc.StatusCode.DEADLINE_EXCEEDED,
        Reason.MAX_DURATION_EXCEEDED: grpc.StatusCode.DEADLINE_EXCEEDED,
        Reason.RANK_DIED: grpc.StatusCode.UNAVAILABLE,
        Reason.OUT_OF_MEMORY: grpc.StatusCode.RESOURCE_EXHAUSTED,
        Reason.STORAGE_FAILED: grpc.StatusCode.RESOURCE_EXHAUSTED,
        Reason.INTERNAL: grpc.StatusCode.INTERNAL,
    }
)


class UnsuccessfulEndError(ServiceError):
    """The generation that a call watches came to its end without a video."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.reason, failure.message, retry_after_s=failure.retry_after_s)

    @property
    def state(self) -> State:
        return State.CANCELLED if self.failure.reason in CANCELLING_REASONS else State.FAILED


def code_number(reason: Reason) -> int:
    """The number of the status code that `reason` becomes on the wire."""
    number: int = STATUS_CODES[reason].value[0]
    return number


def to_status(error: ServiceError, metadata: Mapping[str, str]) -> status_pb2.Status:
    """The status of a call that ends in `error`; `metadata` (request id, generation) goes into its ErrorInfo."""
    failure = error.failure
    told = dict(metadata)
    if isinstance(error, UnsuccessfulEndError):
        told["generation_state"] = error.state.name
    status = status_pb2.Status(
        code=code_number(failure.reason), message=_shortened(failure.message, _MAX_MESSAGE_BYTES)
    )
    _attach(status, error_details_pb2.ErrorInfo(reason=failure.reason, domain=DOMAIN, metadata=told))
    if failure.retry_after_s is not None:
        delay = error_details_pb2.RetryInfo()
        delay.retry_delay.FromMilliseconds(round(failure.retry_after_s * 1000))
        _attach(status, delay)
    if violations := _violations(error):
        _attach(status, _bad_request(violations, _MAX_DETAILS_BYTES - status.ByteSize()))
    return status


def bug_status(metadata: Mapping[str, str]) -> status_pb2.Status:
    """The status of a call that met a bug: where to look for it, and nothing of its insides."""
    sentence = f"internal error; the server's log has it under request id {metadata['request_id']}"
    return to_status(ServiceError(Reason.INTERNAL, sentence), metadata)


def _violations(error: ServiceError) -> tuple[Violation, ...]:
    if isinstance(error, InvalidRequestError):
        return error.violations
    if isinstance(error, NotSupportedError):
        sentence = "this server does not serve it"
        return tuple(Violation(field=field, description=sentence, reason="NOT_SERVED") for field in error.fields)
    return ()


def _bad_request(violations: tuple[Violation, ...], room_bytes: int) -> error_details_pb2.BadRequest:
    """Every field, with sentences as long as there is room: trailers that a client refuses would hide them all."""
    for sentence_bytes in _SENTENCE_BYTES:
        request = error_details_pb2.BadRequest()
        for violation in violations:
            request.field_violations.add(
                field=violation.field,
                description=_shortened(violation.description, sentence_bytes),
                reason=violation.reason,
            )
            if request.ByteSize() > room_bytes:
                break
        else:
            return request
    del request.field_violations[-1]
    return request


def _attach(status: status_pb2.Status, detail: Message) -> None:
    status.details.add().Pack(detail)


def _shortened(text: str, max_bytes: int) -> str:
    encoded = text.encode("utf-8", "replace")
    if len(encoded) <= max_bytes:
        return encoded.decode("utf-8")
    if max_bytes < len("…".encode()):
        return ""
    return encoded[: max_bytes - 3].decode("utf-8", "ignore") + "…"
