"""Everything that can go wrong, by whose fault it is.

Knows reasons and sentences. Does not know how a reason is spelled on a wire; rpc/errors.py has that table.
"""

from dataclasses import dataclass
from enum import StrEnum


class Reason(StrEnum):
    """Stable, machine-readable cause of a refusal or of an unsuccessful end. Values never change meaning."""

    # The caller's fault: change the request.
    INVALID_REQUEST = "INVALID_REQUEST"
    NOT_SUPPORTED = "NOT_SUPPORTED"
    GENERATION_NOT_FOUND = "GENERATION_NOT_FOUND"
    REQUEST_ID_REUSED = "REQUEST_ID_REUSED"
    GENERATION_NOT_FINISHED = "GENERATION_NOT_FINISHED"
    OFFSET_OUT_OF_RANGE = "OFFSET_OUT_OF_RANGE"
    # Nobody's fault: try again later.
    QUEUE_FULL = "QUEUE_FULL"
    TOO_MANY_CALLS = "TOO_MANY_CALLS"
    SHUTTING_DOWN = "SHUTTING_DOWN"
    # The caller's wish.
    CANCELLED_BY_CALLER = "CANCELLED_BY_CALLER"
    ABANDONED = "ABANDONED"
    DEADLINE_EXCEEDED = "DEADLINE_EXCEEDED"
    MAX_DURATION_EXCEEDED = "MAX_DURATION_EXCEEDED"
    # The server's fault.
    RANK_DIED = "RANK_DIED"  # or hung, which comes to the same: its caller can only try again
    OUT_OF_MEMORY = "OUT_OF_MEMORY"
    STORAGE_FAILED = "STORAGE_FAILED"
    INTERNAL = "INTERNAL"


CANCELLING_REASONS = frozenset(
    {
        Reason.CANCELLED_BY_CALLER,
        Reason.ABANDONED,
        Reason.DEADLINE_EXCEEDED,
        Reason.MAX_DURATION_EXCEEDED,
        Reason.SHUTTING_DOWN,
    }
)
"""Reasons that end a generation as CANCELLED; every other one ends it as FAILED."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Violation:
    """One thing wrong with one field of a request."""

    field: str
    """Path of the field in the request message, e.g. `video.width`."""
    description: str
    """A sentence with the value that was given and the bound it breaks."""
    reason: str
    """Stable name of the rule, e.g. `NOT_A_MULTIPLE`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """Why a generation ended without success, or why a call was refused."""

    reason: Reason
    message: str
    retry_after_s: float | None = None
    """Seconds after which the same call may succeed; None when trying again is no help."""


class ServiceError(Exception):
    """A fault that a caller is told about. Its message is written for that caller."""

    def __init__(self, reason: Reason, message: str, *, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.failure = Failure(reason=reason, message=message, retry_after_s=retry_after_s)


class InvalidRequestError(ServiceError):
    """A request that breaks rules: all of them at once, each with its field."""

    def __init__(self, violations: tuple[Violation, ...]) -> None:
        assert violations
        sentences = "; ".join(f"{v.field}: {v.description}" for v in violations)
        super().__init__(Reason.INVALID_REQUEST, sentences)
        self.violations = violations


class NotSupportedError(ServiceError):
    """A part of the API that this version does not serve yet."""

    def __init__(self, message: str, *, fields: tuple[str, ...] = ()) -> None:
        super().__init__(Reason.NOT_SUPPORTED, message)
        self.fields = fields


class UnusableModelError(Exception):
    """A checkpoint that cannot be had or served. Ends the process at start, with a sentence for the operator."""
