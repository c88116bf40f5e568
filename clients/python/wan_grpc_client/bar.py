"""A live progress bar for the terminal, plain lines elsewhere. Standard library only; knows no events, only values.

    with Bar(sys.stderr) as bar:
        bar.wait("queued, 2 before this one")                                   # replaced by whatever comes next
        bar.show(stage="denoise", step=3, total_steps=40, expert="high_noise", step_time_s=1.2, eta_s=44.0)
        bar.say("warning: the prompt is too long")                              # stays

On a terminal there is one line, rewritten in place and gone at the end. Elsewhere there is a line whenever the stage
(or what is waited for) changes, and otherwise at most one a second.
"""

import shutil
import time
from collections.abc import Callable
from types import TracebackType
from typing import Final, Self, TextIO

_TRACK_COLUMNS: Final = 16
_LINE_EVERY_S: Final = 1.0
_ERASE_LINE: Final = "\r\x1b[2K"


class Bar:
    """Shows how far one generation is."""

    def __init__(
        self,
        stream: TextIO,
        *,
        is_terminal: bool | None = None,
        num_columns: int | None = None,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        """`is_terminal` and `num_columns` are found out where they are not given."""
        self._stream = stream
        self._is_terminal = stream.isatty() if is_terminal is None else is_terminal
        self._num_columns = num_columns
        self._now = now
        self._stage: str | None = None
        self._printed_at = 0.0
        self._live = ""

    def show(
        self,
        *,
        stage: str,
        step: int,
        total_steps: int,
        expert: str | None = None,
        step_time_s: float | None = None,
        eta_s: float | None = None,
    ) -> None:
        """`step` of `total_steps` of `stage` are done; the last took `step_time_s`; all will be done in `eta_s`."""
        notes = _notes(expert, step_time_s, eta_s)
        if self._is_terminal:
            words = (f"{stage:<8}", _track(step, total_steps), f"{step:>3}/{total_steps:<3}", *notes)
            self._draw("  ".join(words))
        else:
            self._print(", ".join((f"{stage} {step}/{total_steps}", *notes)), stage=stage)

    def wait(self, text: str) -> None:
        """There is nothing to measure yet: `text` says what is waited for."""
        if self._is_terminal:
            self._draw(text)
        else:
            self._print(text, stage=text)

    def say(self, text: str) -> None:
        """A line that stays."""
        live = self._live
        self._erase()
        print(text, file=self._stream, flush=True)
        if live:
            self._draw(live)

    def close(self) -> None:
        """Take the live line away."""
        self._erase()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _draw(self, line: str) -> None:
        num_columns = self._num_columns or shutil.get_terminal_size().columns
        self._live = line.rstrip()[: num_columns - 1]
        self._stream.write(_ERASE_LINE + self._live)
        self._stream.flush()

    def _erase(self) -> None:
        if self._live:
            self._stream.write(_ERASE_LINE)
            self._stream.flush()
            self._live = ""

    def _print(self, line: str, *, stage: str) -> None:
        now = self._now()
        if stage != self._stage or now - self._printed_at >= _LINE_EVERY_S:
            print(line, file=self._stream, flush=True)
            self._stage, self._printed_at = stage, now


def _track(step: int, total_steps: int) -> str:
    filled = _TRACK_COLUMNS * min(max(step, 0), total_steps) // max(total_steps, 1)
    return f"[{'#' * filled:.<{_TRACK_COLUMNS}}]"


def _notes(expert: str | None, step_time_s: float | None, eta_s: float | None) -> list[str]:
    notes = [expert.replace("_", " ")] if expert else []
    if step_time_s is not None:
        notes.append(f"{step_time_s:.2f} s a step")
    if eta_s is not None:
        notes.append(f"{_clock(eta_s)} left")
    return notes


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(max(seconds, 0.0)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
