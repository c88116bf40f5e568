import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2, status_pb2

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
from wan_grpc.rpc.errors import STATUS_CODES, UnsuccessfulEndError, bug_status, code_number, to_status

TOLD = {"request_id": "r1", "generation": "generations/7"}
DETAIL_KINDS = (error_details_pb2.ErrorInfo, error_details_pb2.RetryInfo, error_details_pb2.BadRequest)
MAX_TRAILER_BYTES = 8192


def details(status: status_pb2.Status) -> list[object]:
    """The details of a status, unpacked."""
    unpacked = []
    for packed in status.details:
        kind = next(kind for kind in DETAIL_KINDS if packed.Is(kind.DESCRIPTOR))
        message = kind()
        packed.Unpack(message)
        unpacked.append(message)
    return unpacked


def info(reason: str, **more: str) -> error_details_pb2.ErrorInfo:
    return error_details_pb2.ErrorInfo(reason=reason, domain="wan-grpc", metadata={**TOLD, **more})


def test_every_reason_has_a_status() -> None:
    """No fault can arise for which the table has no code, and none of them is OK or UNKNOWN."""
    assert set(STATUS_CODES) == set(Reason)
    assert not {grpc.StatusCode.OK, grpc.StatusCode.UNKNOWN} & set(STATUS_CODES.values())


@pytest.mark.parametrize("reason", list(Reason))
def test_status_of_each_reason(reason: Reason) -> None:
    """Every status carries its code's number, the sentence, and an ErrorInfo with the reason and what it is about."""
    status = to_status(ServiceError(reason, "a sentence"), TOLD)
    assert (status.code, status.message) == (STATUS_CODES[reason].value[0], "a sentence")
    assert code_number(reason) == status.code
    assert details(status) == [info(reason)]


def test_faults_worth_another_try_say_when() -> None:
    """A fault that passes comes with the time after which the call may succeed."""
    status = to_status(ServiceError(Reason.QUEUE_FULL, "full", retry_after_s=2.25), TOLD)
    delay = error_details_pb2.RetryInfo(retry_delay=Duration(seconds=2, nanos=250_000_000))
    assert details(status) == [info("QUEUE_FULL"), delay]


def test_faults_of_the_caller_name_every_field() -> None:
    """A refused request is told every field at once, with rule and bound."""
    violations = (
        Violation(field="spec.width", description="7 is not a multiple of 16", reason="NOT_A_MULTIPLE"),
        Violation(field="spec.fps", description="0 is not between 1 and 120", reason="OUT_OF_RANGE"),
    )
    bad = error_details_pb2.BadRequest()
    bad.field_violations.add(field="spec.width", description="7 is not a multiple of 16", reason="NOT_A_MULTIPLE")
    bad.field_violations.add(field="spec.fps", description="0 is not between 1 and 120", reason="OUT_OF_RANGE")
    assert details(to_status(InvalidRequestError(violations), TOLD)) == [info("INVALID_REQUEST"), bad]


def test_unserved_fields_are_named() -> None:
    """A request for what this server has not hears which fields it was."""
    bad = error_details_pb2.BadRequest()
    bad.field_violations.add(field="spec.image", description="this server does not serve it", reason="NOT_SERVED")
    status = to_status(NotSupportedError("no images", fields=("spec.image",)), TOLD)
    assert details(status) == [info("NOT_SUPPORTED"), bad]


@pytest.mark.parametrize("reason", list(Reason))
def test_the_end_of_a_generation_is_told_from_the_end_of_a_call(reason: Reason) -> None:
    """The end of the watched generation itself carries the state that it ended in."""
    state = State.CANCELLED if reason in CANCELLING_REASONS else State.FAILED
    status = to_status(UnsuccessfulEndError(Failure(reason=reason, message="over", retry_after_s=None)), TOLD)
    assert details(status) == [info(reason, generation_state=state.name)]


def test_a_bug_shows_nothing_of_itself() -> None:
    """A bug is INTERNAL, with the request id under which the log has the rest."""
    status = bug_status(TOLD)
    assert status.code == grpc.StatusCode.INTERNAL.value[0]
    assert status.message == "internal error; the server's log has it under request id r1"
    assert details(status) == [info("INTERNAL")]


@pytest.mark.parametrize(
    ("num_fields", "num_told", "least_bytes"), [(9, 9, 180), (20, 20, 40), (40, 40, 15), (80, 80, 0), (500, 81, 0)]
)
@pytest.mark.parametrize("letter", ["x", "é", "視", "🎬"])
def test_trailers_fit_what_clients_take(letter: str, num_fields: int, num_told: int, least_bytes: int) -> None:
    """However much is wrong, in whatever script, clients accept it: sentences shrink before fields are left out."""
    violations = tuple(
        Violation(field=f"spec.field_{i}", description=letter * 5000, reason="TOO_LONG") for i in range(num_fields)
    )
    status = to_status(InvalidRequestError(violations), TOLD)
    percent_encoded = sum(1 if 0x20 <= byte < 0x7F else 3 for byte in status.message.encode())
    assert percent_encoded + status.ByteSize() * 4 // 3 < MAX_TRAILER_BYTES - 500
    bad = details(status)[-1]
    assert isinstance(bad, error_details_pb2.BadRequest)
    assert len(bad.field_violations) == num_told
    assert min(len(violation.description.encode()) for violation in bad.field_violations) >= least_bytes
