import io

import pytest

from wan_grpc_client.bar import Bar

ERASE = "\r\x1b[2K"


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


def step(bar: Bar, number: int, *, stage: str = "denoise") -> None:
    expert, step_time_s = ("high_noise", 1.234) if number else (None, None)
    bar.show(stage=stage, step=number, total_steps=40, expert=expert, step_time_s=step_time_s, eta_s=50.0 - number)


def test_a_terminal_has_one_line_rewritten() -> None:
    """Each value replaces the last one in place, and nothing is left at the end."""
    stream = io.StringIO()
    with Bar(stream, is_terminal=True, num_columns=100) as bar:
        bar.wait("queued, 2 before this one")
        step(bar, 0)
        step(bar, 20)
        bar.show(stage="decode", step=21, total_steps=21, eta_s=0.2)
    assert stream.getvalue() == (
        f"{ERASE}queued, 2 before this one"
        f"{ERASE}denoise   [................]    0/40   0:50 left"
        f"{ERASE}denoise   [########........]   20/40   high noise  1.23 s a step  0:30 left"
        f"{ERASE}decode    [################]   21/21   0:00 left"
        f"{ERASE}"
    )


def test_a_narrow_terminal_is_not_wrapped() -> None:
    """A line that does not fit is cut, since a wrapped one could not be rewritten."""
    stream = io.StringIO()
    with Bar(stream, is_terminal=True, num_columns=24) as bar:
        step(bar, 20)
    assert stream.getvalue() == f"{ERASE}denoise   [########....{ERASE}"


def test_a_usual_terminal_shows_it_all() -> None:
    """80 columns hold every value of a long generation."""
    stream = io.StringIO()
    bar = Bar(stream, is_terminal=True, num_columns=80)
    bar.show(stage="denoise", step=100, total_steps=200, expert="high_noise", step_time_s=12.34, eta_s=7325.0)
    line = "denoise   [########........]  100/200  high noise  12.34 s a step  2:02:05 left"
    assert stream.getvalue() == f"{ERASE}{line}"


def test_a_line_that_stays_goes_above_the_bar() -> None:
    """What is said takes the place of the bar, which is drawn again below."""
    stream = io.StringIO()
    with Bar(stream, is_terminal=True, num_columns=100) as bar:
        bar.wait("waiting")
        bar.say("warning: the prompt is long")
    assert stream.getvalue() == f"{ERASE}waiting{ERASE}warning: the prompt is long\n{ERASE}waiting{ERASE}"


def test_elsewhere_lines_come_with_the_stage_and_each_second(clock: Clock) -> None:
    """Off a terminal a log is not flooded: a line a stage, and one a second within it."""
    stream = io.StringIO()
    with Bar(stream, is_terminal=False, now=clock) as bar:
        bar.wait("queued, 2 before this one")
        for number in range(6):
            step(bar, number)
            clock.now_s += 0.4
        bar.say("warning: the prompt is long")
        bar.show(stage="decode", step=0, total_steps=21)
        bar.show(stage="decode", step=1, total_steps=21)
    assert stream.getvalue() == (
        "queued, 2 before this one\n"
        "denoise 0/40, 0:50 left\n"
        "denoise 3/40, high noise, 1.23 s a step, 0:47 left\n"
        "warning: the prompt is long\n"
        "decode 0/21\n"
    )


@pytest.mark.parametrize(("eta_s", "shown"), [(0.0, "0:00"), (59.6, "1:00"), (3599.0, "59:59"), (7325.0, "2:02:05")])
def test_times_are_shown_as_on_a_clock(eta_s: float, shown: str) -> None:
    """Minutes and seconds, with hours where there are any."""
    stream = io.StringIO()
    Bar(stream, is_terminal=False).show(stage="text", step=0, total_steps=1, eta_s=eta_s)
    assert stream.getvalue() == f"text 0/1, {shown} left\n"


def test_a_pipe_is_no_terminal() -> None:
    """Without being told, the bar asks the stream."""
    stream = io.StringIO()
    Bar(stream).show(stage="text", step=0, total_steps=1)
    assert stream.getvalue() == "text 0/1\n"
