"""What goes wrong, as one small family of exceptions, sorted by what a caller can do about it.

Knows gRPC statuses and the details that the server sends with them.
"""

from typing import Any, Final

import grpc

from wan_grpc_client.details import TRAILER, Details, Violation, read_details

_Code = grpc.StatusCode


class WanGrpcError(Exception):
    """A call or a generation that did not succeed. `str()` of it is the server's sentence."""

    def __init__(self, code: grpc.StatusCode, message: str, details: Details | None = None) -> None:
        super().__init__(message)
        told = details or Details(metadata={})
        self.code = code
        self.message = message
        self.reason = told.reason
        """Stable cause in upper case, e.g. `QUEUE_FULL`; empty when it was not the server itself that spoke."""
        self.violations: tuple[Violation, ...] = told.violations
        """Every field of the request that breaks a rule."""
        self.retry_after_s = told.retry_after_s
        """Seconds after which the same request may succeed; None when the server named no time."""
        self.generation: str | None = told.metadata.get("generation")
        """Resource name of the generation that this is about."""
        self.generation_state = told.metadata.get("generation_state", "").lower()
        """Its final state, `failed` or `cancelled`; empty when it has none yet, or there is none."""
        self.server_request_id: str | None = told.metadata.get("request_id")
        """The id of the failed call in the server's log."""


class RefusedError(WanGrpcError):
    """The request is at fault, or is not allowed: sent again unchanged it fails again."""


class TryAgainError(WanGrpcError):
    """No room, or no server, at the moment: the same request may succeed later."""


class GenerationCancelledError(WanGrpcError):
    """The generation, or the call, was cancelled."""


class DeadlineError(WanGrpcError):
    """The time that was allowed has passed."""


class ServerError(WanGrpcError):
    """The server is at fault."""


class CorruptVideoError(WanGrpcError):
    """The bytes that arrived are not the bytes that the server made. Nothing of them was kept under the final name."""

    def __init__(self, message: str) -> None:
        super().__init__(grpc.StatusCode.DATA_LOSS, message)


_FAMILY: Final[dict[grpc.StatusCode, type[WanGrpcError]]] = {
    _Code.INVALID_ARGUMENT: RefusedError,
    _Code.UNIMPLEMENTED: RefusedError,
    _Code.ALREADY_EXISTS: RefusedError,
    _Code.NOT_FOUND: RefusedError,
    _Code.FAILED_PRECONDITION: RefusedError,
    _Code.OUT_OF_RANGE: RefusedError,
    _Code.UNAUTHENTICATED: RefusedError,
    _Code.PERMISSION_DENIED: RefusedError,
    _Code.RESOURCE_EXHAUSTED: TryAgainError,
    _Code.UNAVAILABLE: TryAgainError,
    _Code.CANCELLED: GenerationCancelledError,
    _Code.DEADLINE_EXCEEDED: DeadlineError,
}


_TOO_LARGE: Final = "larger than max"
"""What gRPC itself says of a message above the server's bound."""


def from_rpc(error: grpc.RpcError) -> WanGrpcError:
    """The member of the family that `error`, the end of a call, stands for."""
    code = error.code()
    metadata: Any = error.trailing_metadata() or ()
    trailer = next((value for key, value in metadata if key == TRAILER), None)
    details = read_details(trailer if isinstance(trailer, bytes) else None)
    message = error.details() or f"the call ended in {code.name}"
    if not details.reason and code is _Code.RESOURCE_EXHAUSTED and _TOO_LARGE in message:
        return RefusedError(code, message, details)
    return _FAMILY.get(code, ServerError)(code, message, details)
