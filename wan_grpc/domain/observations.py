"""What the engine tells whoever measures it: plain facts, one value each.

Telemetry turns them into metrics and log lines; the engine knows neither.
"""

from dataclasses import dataclass
from enum import StrEnum
from typing import TypeAlias

from wan_grpc.domain.errors import Reason
from wan_grpc.domain.events import Stage, State
from wan_grpc.domain.topology import Topology
from wan_grpc.domain.traffic import Exchange
from wan_grpc.domain.variants import Expert, ModelCard


@dataclass(frozen=True, slots=True, kw_only=True)
class Refused:
    """A request was turned away and cost nothing but its call."""

    reason: Reason


@dataclass(frozen=True, slots=True, kw_only=True)
class Admitted:
    name: str
    request_id: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Started:
    """The ranks began a generation."""

    name: str
    wait_s: float
    """From admission to now."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepEnded:
    """The devices finished one denoising step."""

    name: str
    expert: Expert
    seconds: float
    skew_s: float | None = None
    """By how much the busiest rank worked longer than the least busy one; None for a rank alone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StageEnded:
    name: str
    stage: Stage
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class FramesDecoded:
    count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class BytesSent:
    """Video bytes were handed to a watcher or a download."""

    count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """A generation came to its final state."""

    name: str
    state: State
    reason: Reason | None
    """Why it did not succeed; None when it did."""
    duration_s: float
    """From admission to now."""
    message: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadChanged:
    """How much work there is: sent whenever one of the numbers changes."""

    num_queued: int
    num_running: int
    num_watchers: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RankChanged:
    rank: int
    up: bool


class RestartCause(StrEnum):
    """Why a group of ranks was ended, to be started again."""

    RANK_DIED = "rank_died"
    """A process ended."""
    RANK_HUNG = "rank_hung"
    """The ranks were silent for longer than their work takes, or one of them was stopped."""
    EXCHANGE_FAILED = "exchange_failed"
    """A generation failed on one rank, and the others did not come out of it."""
    START_FAILED = "start_failed"
    """It did not come to be ready."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupRestarting:
    cause: RestartCause
    detail: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RankFaulted:
    """A generation raised on a rank, which lives on."""

    rank: int
    reason: Reason


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupRecovered:
    """The ranks can work again."""

    cause: RestartCause | None
    """What they had to be started again for; None when a rank failed and all of them left the generation alive."""
    seconds: float
    """Since a rank was found dead or hung, or failed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Exchanged:
    """What one rank exchanged with others during a generation, of one kind."""

    rank: int
    kind: Exchange
    seconds: float
    """That its device waited for it."""
    sent_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RankMemorySampled:
    rank: int
    used_bytes: int
    peak_bytes: int
    """Most bytes held during the last generation."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupReady:
    """All ranks have loaded the model."""

    card: ModelCard
    topology: Topology
    device: str
    dtype: str
    attention: str
    load_s: float


Observation: TypeAlias = (
    Refused
    | Admitted
    | Started
    | StepEnded
    | StageEnded
    | FramesDecoded
    | BytesSent
    | Ended
    | LoadChanged
    | RankChanged
    | GroupRestarting
    | GroupRecovered
    | RankFaulted
    | RankMemorySampled
    | Exchanged
    | GroupReady
)
