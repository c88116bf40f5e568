import pytest

from wan_grpc.domain.errors import CANCELLING_REASONS, Failure, InvalidRequestError, Reason, ServiceError
from wan_grpc.domain.events import State


def test_which_states_are_final() -> None:
    """A generation ends in one of three states and leaves the other two."""
    assert {state for state in State if state.is_final} == {State.SUCCEEDED, State.FAILED, State.CANCELLED}


def test_which_reasons_cancel() -> None:
    """A wish, a bound or the end of the server cancels; whatever else ends a generation is a failure."""
    assert {
        Reason.CANCELLED_BY_CALLER,
        Reason.ABANDONED,
        Reason.DEADLINE_EXCEEDED,
        Reason.MAX_DURATION_EXCEEDED,
        Reason.SHUTTING_DOWN,
    } == CANCELLING_REASONS


def test_an_error_carries_its_failure() -> None:
    """What is raised says to a program what it says to a person."""
    error = ServiceError(Reason.QUEUE_FULL, "16 are waiting", retry_after_s=3.0)
    assert str(error) == "16 are waiting"
    assert error.failure == Failure(reason=Reason.QUEUE_FULL, message="16 are waiting", retry_after_s=3.0)


def test_a_refusal_names_something() -> None:
    """A request is never refused for nothing."""
    with pytest.raises(AssertionError):
        InvalidRequestError(())
