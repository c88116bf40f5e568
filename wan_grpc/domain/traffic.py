"""What the ranks of a group say to each other while they compute, as figures."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum


class Exchange(StrEnum):
    """Kinds of exchange between ranks, by what they are for."""

    ULYSSES = "ulysses"
    """Tokens of all heads for all tokens of some heads, and back: all-to-all."""
    RING = "ring"
    """Keys and values to the next rank: send and receive."""
    TOKENS = "tokens"
    """The parts of a prediction, once a pass: all-gather."""
    CFG = "cfg"
    """Predictions of the passes of guidance, once a step: all-gather."""
    TEXT = "text"
    """Text embeddings: broadcast; parts of a layer of the text encoder: all-reduce."""
    VAE = "vae"
    """Borders of strips, keys and values of the VAE's attention, and finished pictures."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """One rank's exchanges of one kind during one generation."""

    kind: Exchange
    seconds: float
    """That the rank's device waited for it; what was hidden behind work is not counted."""
    sent_bytes: int
    """To other ranks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RankTime:
    """One rank's part in one step."""

    seconds: float
    """From the step's begin to its end on the device of this rank."""
    waited_s: float
    """Of these, in exchanges: moving data, and waiting for ranks that are slower."""

    @property
    def busy_s(self) -> float:
        return max(0.0, self.seconds - self.waited_s)


def busiest(times: Sequence[RankTime]) -> int | None:
    """The rank that worked longest, of those that are not alone."""
    return max(range(len(times)), key=lambda rank: times[rank].busy_s) if len(times) > 1 else None


def skew_s(times: Sequence[RankTime]) -> float | None:
    """By how much the busiest rank worked longer than the least busy one; None for a rank alone."""
    busy = [time.busy_s for time in times]
    return max(busy) - min(busy) if len(busy) > 1 else None
