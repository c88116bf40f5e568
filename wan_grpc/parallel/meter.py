"""How long this rank spends in the exchange of data, and how many bytes it sends, by kind of exchange.

Knows clocks of devices. Does not know what is exchanged.
"""

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from wan_grpc.domain.traffic import Exchange, Traffic


@dataclass(slots=True)
class Meter:
    """Times are of the device: what its own stream waits for, so that an exchange hidden behind work costs nothing."""

    device: torch.device
    _open: list[tuple[Exchange, torch.cuda.Event, torch.cuda.Event]] = field(default_factory=list)
    _seconds: dict[Exchange, float] = field(default_factory=lambda: dict.fromkeys(Exchange, 0.0))
    _bytes: Counter[Exchange] = field(default_factory=Counter)
    _lap_s: float = 0.0

    @contextmanager
    def timing(self, kind: Exchange) -> Iterator[None]:
        """The block waits for an exchange of this kind."""
        if self.device.type != "cuda":
            began = time.perf_counter()
            yield
            self._add(kind, time.perf_counter() - began)
            return
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        begin.record()
        yield
        end.record()
        self._open.append((kind, begin, end))

    def count(self, kind: Exchange, num_bytes: int) -> None:
        """This rank sends so many bytes to others."""
        self._bytes[kind] += num_bytes

    def lap(self) -> float:
        """Seconds in exchanges since the last call. The device must have finished all that was enqueued."""
        for kind, begin, end in self._open:
            self._add(kind, begin.elapsed_time(end) / 1000.0)
        self._open.clear()
        lap_s, self._lap_s = self._lap_s, 0.0
        return lap_s

    def take(self) -> tuple[Traffic, ...]:
        """All that was measured since the last call, kinds in their order."""
        self.lap()
        kinds = [kind for kind in Exchange if self._seconds[kind] or self._bytes[kind]]
        taken = tuple(Traffic(kind=kind, seconds=self._seconds[kind], sent_bytes=self._bytes[kind]) for kind in kinds)
        self.reset()
        return taken

    def reset(self) -> None:
        """Forget what was measured; events of work that may never end are not waited for."""
        self._open.clear()
        self._seconds = dict.fromkeys(Exchange, 0.0)
        self._bytes.clear()
        self._lap_s = 0.0

    def _add(self, kind: Exchange, seconds: float) -> None:
        self._seconds[kind] += seconds
        self._lap_s += seconds
