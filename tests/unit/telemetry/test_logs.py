import io
import json
import logging
from collections.abc import Iterator
from typing import Any

import pytest
import structlog

from wan_grpc.domain.errors import Reason
from wan_grpc.domain.events import State
from wan_grpc.domain.observations import (
    Admitted,
    BytesSent,
    Ended,
    GroupRecovered,
    GroupRestarting,
    Observation,
    RankFaulted,
    RestartCause,
)
from wan_grpc.telemetry import logs


@pytest.fixture(autouse=True)
def _restored_logging() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    structlog.contextvars.clear_contextvars()
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    logging.captureWarnings(False)
    structlog.reset_defaults()


def lines(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    """The JSON lines on stderr without their times; stdout stays empty."""
    shown = capsys.readouterr()
    assert shown.out == ""
    records = [json.loads(line) for line in shown.err.splitlines()]
    assert all(record.pop("timestamp").endswith("Z") for record in records)
    return records


@pytest.mark.parametrize(
    ("observation", "wanted"),
    [
        (
            Admitted(name="generations/1", request_id="r"),
            {"event": "generation admitted", "generation": "generations/1", "request_id": "r", "level": "info"},
        ),
        (
            Ended(name="g", state=State.SUCCEEDED, reason=None, duration_s=1.23456),
            {"event": "generation succeeded", "generation": "g", "duration_s": 1.235, "level": "info"},
        ),
        (
            Ended(name="g", state=State.CANCELLED, reason=Reason.ABANDONED, duration_s=1.0, message="m"),
            {
                "event": "generation cancelled",
                "generation": "g",
                "duration_s": 1.0,
                "reason": "ABANDONED",
                "detail": "m",
                "level": "info",
            },
        ),
        (
            Ended(name="g", state=State.FAILED, reason=Reason.RANK_DIED, duration_s=1.0, message="m"),
            {
                "event": "generation failed",
                "generation": "g",
                "duration_s": 1.0,
                "reason": "RANK_DIED",
                "detail": "m",
                "level": "error",
            },
        ),
        (
            GroupRestarting(cause=RestartCause.RANK_DIED, detail="rank 1: SIGKILL"),
            {
                "event": "ranks are being started again",
                "cause": "rank_died",
                "detail": "rank 1: SIGKILL",
                "level": "error",
            },
        ),
        (
            RankFaulted(rank=1, reason=Reason.OUT_OF_MEMORY),
            {"event": "a generation failed on a rank", "rank": 1, "reason": "OUT_OF_MEMORY", "level": "error"},
        ),
        (
            GroupRecovered(cause=RestartCause.RANK_HUNG, seconds=12.3456),
            {"event": "ranks have recovered", "recovery_s": 12.346, "level": "info"},
        ),
    ],
)
def test_observations_as_lines(
    observation: Observation, wanted: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """What an operator wants to know is one JSON line each, an error only where the server is at fault."""
    logs.configure(level="info", log_format="json")
    logs.observe(observation)
    assert lines(capsys) == [{**wanted, "logger": "wan_grpc"}]


def test_what_is_only_counted_is_silent(capsys: pytest.CaptureFixture[str]) -> None:
    """Bytes on the wire make no line, not even at the lowest level."""
    logs.configure(level="debug", log_format="json")
    logs.observe(BytesSent(count=1))
    assert lines(capsys) == []


def test_context_reaches_every_line(capsys: pytest.CaptureFixture[str]) -> None:
    """What is bound to the running work stands on each of its lines, those of foreign libraries too."""
    logs.configure(level="info", log_format="json")
    with structlog.contextvars.bound_contextvars(generation="generations/1", rank=2):
        structlog.get_logger("ours").info("own", answer=42)
        logging.getLogger("theirs").warning("foreign %s", "words")
    context = {"generation": "generations/1", "rank": 2}
    assert lines(capsys) == [
        {"event": "own", "answer": 42, "level": "info", "logger": "ours", **context},
        {"event": "foreign words", "level": "warning", "logger": "theirs", **context},
    ]


def test_the_request_id_of_the_caller_wins(capsys: pytest.CaptureFixture[str]) -> None:
    """A line bears the id that the request names, and that of the call where it names none."""
    logs.configure(level="info", log_format="json")
    with structlog.contextvars.bound_contextvars(request_id="call"):
        logs.observe(Admitted(name="g", request_id=None))
        logs.observe(Admitted(name="g", request_id="caller"))
    assert [line["request_id"] for line in lines(capsys)] == ["call", "caller"]


def test_level_holds_for_all(capsys: pytest.CaptureFixture[str]) -> None:
    """Lines below the level are dropped, ours and others'."""
    logs.configure(level="warning", log_format="json")
    structlog.get_logger("ours").info("no")
    logging.getLogger("theirs").info("no")
    structlog.get_logger("ours").warning("yes")
    assert [line["event"] for line in lines(capsys)] == ["yes"]


def test_exception_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    """A traceback stays inside its JSON line."""
    logs.configure(level="info", log_format="json")
    try:
        raise ValueError("broken")
    except ValueError:
        structlog.get_logger("ours").exception("failed")
    (line,) = lines(capsys)
    assert (line["event"], line["level"], line["exception"].splitlines()[-1]) == (
        "failed",
        "error",
        "ValueError: broken",
    )


def test_console_lines(capsys: pytest.CaptureFixture[str]) -> None:
    """For people a line is words and key=value pairs, without colours when it goes to no terminal."""
    logs.configure(level="info", log_format="console")
    logs.observe(Admitted(name="generations/1", request_id=None))
    _time, _, rest = capsys.readouterr().err.partition(" ")
    assert rest == "[info     ] generation admitted [wan_grpc] generation=generations/1\n"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("asked", "stream", "chosen"),
    [
        ("auto", Terminal(), "console"),
        ("auto", io.StringIO(), "json"),
        ("json", Terminal(), "json"),
        ("console", io.StringIO(), "console"),
    ],
)
def test_format_by_where_it_goes(asked: str, stream: io.StringIO, chosen: str) -> None:
    """`auto` is for people on a terminal and JSON elsewhere; what was asked for stays."""
    assert logs.choose_format(asked, stream) == chosen
