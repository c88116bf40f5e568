"""What the engine tells whoever measures it: plain facts, one value each.

Telemetry turns them into metrics and log lines; the engine knows neither.
"""

from dataclasses import dataclass
from enum import StrEnum
from typing import TypeAlias

from wan_grpc.domain.errors import Reason
from wan_grpc.domain.events import Stage, State
from wan_grpc.domain.topology import Topology
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
    """The device finished one denoising step."""

    name: str
    expert: Expert
    seconds: float


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
    RANK_DIED = "rank_died"
    START_FAILED = "start_failed"


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupRestarting:
    cause: RestartCause
    detail: str


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
    | RankMemorySampled
    | GroupReady
)
