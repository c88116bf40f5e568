import grpc
import pytest

from tests.unit.clients import scripted_server as script
from tests.unit.clients.scripted_server import NAME
from wan_grpc.rpc.server import ServerOptions
from wan_grpc.v1 import generation_pb2 as pb
from wan_grpc.v1 import video_generation_service_pb2 as service_pb
from wan_grpc_client import Patience, Reattaching, TryAgainError, following
from wan_grpc_client.channel import CHANNEL_OPTIONS
from wan_grpc_client.following import Fetching, Following
from wan_grpc_client.sink import Sink

QUICK = Patience(max_attempts=3, first_delay_s=0.001, longest_delay_s=0.002)


@pytest.fixture(autouse=True)
def every_attempt_lasts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each attempt counts as one that took long, as with a connect timeout."""
    monkeypatch.setattr(following, "_LONG_LIVED_S", float("-inf"))


def cut() -> TryAgainError:
    return TryAgainError(grpc.StatusCode.UNAVAILABLE, "connect timeout")


def attempt(outcome: object) -> int | None:
    return outcome.attempt if isinstance(outcome, Reattaching) else None


def test_patience_with_a_server_that_is_gone_ends() -> None:
    """Attempts that reach no server are counted, however long each of them takes."""
    watched = Following(Sink(None), QUICK, name=NAME)
    watched.take(script.accepted())
    fetched = Fetching(NAME, Sink(None), QUICK)
    fetched.take(service_pb.DownloadVideoResponse(size_bytes=1))
    assert [attempt(watched.after_end(cut(), None)) for _ in range(3)] == [1, 2, 3]
    assert [attempt(fetched.after_end(cut())) for _ in range(3)] == [1, 2, 3]
    for after_end in (lambda: watched.after_end(cut(), None), lambda: fetched.after_end(cut())):
        with pytest.raises(TryAgainError, match="connect timeout"):
            after_end()


def test_long_streams_that_a_server_answered_are_no_failures() -> None:
    """A proxy may end every stream after its time: an event, a heartbeat, a name or a head says that all is well."""
    watched = Following(Sink(None), QUICK, name=NAME)
    fetched = Fetching(NAME, Sink(None), QUICK)
    attempts = []
    for _ in range(5):
        watched.take(pb.GenerationEvent(heartbeat=pb.Heartbeat()))
        attempts.append(attempt(watched.after_end(cut(), None)))
        attempts.append(attempt(watched.after_end(cut(), NAME)))
        fetched.take(service_pb.DownloadVideoResponse(size_bytes=1))
        attempts.append(attempt(fetched.after_end(cut())))
    assert attempts == [1] * 15


def test_servers_allow_the_pings_of_clients() -> None:
    """The client's keepalive is above the least interval that a server allows unless it is told otherwise."""
    assert dict(CHANNEL_OPTIONS)["grpc.keepalive_time_ms"] > ServerOptions().min_ping_interval_s * 1000
