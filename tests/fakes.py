"""Stand-ins written by hand, in one place. Each keeps what it was asked, and does what a test tells it to."""

import asyncio
import dataclasses
import itertools
from collections.abc import AsyncGenerator, Callable

from wan_grpc.domain.errors import CANCELLING_REASONS, Failure, Reason, ServiceError, Violation
from wan_grpc.domain.events import (
    Accepted,
    Chunk,
    Completed,
    Event,
    Failed,
    Generation,
    Heartbeat,
    Progress,
    RankMemory,
    Record,
    State,
)
from wan_grpc.domain.request import GenerationRequest, resolve
from wan_grpc.domain.status import EngineStatus
from wan_grpc.domain.topology import Topology
from wan_grpc.domain.variants import T2V_A14B, T2V_A14B_SIZES, Limits, ModelCard, Task

CARD = ModelCard(
    model_id="Wan-AI/Wan2.2-T2V-A14B-Diffusers",
    task=Task.TEXT_TO_VIDEO,
    defaults=T2V_A14B,
    limits=Limits(max_area=1280 * 720, max_num_frames=161, max_inference_steps=100),
    size_multiple=16,
    sizes=T2V_A14B_SIZES,
)
NOON_S = 1_795_348_800.5
"""The time of everything that a FakeEngine says."""


class FakeEngine:
    """The engine's interface over generations that do nothing but what `tell` says happens to them."""

    def __init__(self, card: ModelCard = CARD) -> None:
        self.card = card
        self.submitted: list[tuple[GenerationRequest, bool]] = []
        self.cancelled: list[str] = []
        self.expired: list[str] = []
        self.deleted: list[str] = []
        self.drained: list[float] = []
        self.num_watchers = 0
        self.error: BaseException | None = None
        """Raised by the next call of whatever method."""
        self.video = b""
        """Bytes of every video."""
        self.on_take: Callable[[int], None] = lambda sequence: None
        """Called with the number of each record that a watcher takes."""
        self.ready = False
        self.ends_at_drain = True
        """Whether draining brings what is unfinished to its end."""
        self._generations: dict[str, Generation] = {}
        self._records: dict[str, list[Record]] = {}
        self._changed = asyncio.Event()

    # ---- what a test says -------------------------------------------------------------------------------------------

    def tell(self, name: str, *events: Event) -> None:
        """Let these events happen to a generation."""
        for event in events:
            records = self._records[name]
            is_logged = not isinstance(event, Chunk | Heartbeat)
            sequence = (records[-1].sequence if records else 0) + is_logged
            records.append(Record(sequence=sequence, time_s=NOON_S + len(records), event=event))
            self._update(name, event)
        self._wake()

    def set_ready(self, ready: bool) -> None:
        self.ready = ready
        self._wake()

    async def until_watched(self, by: int) -> None:
        """Return when that many watchers are attached."""
        await self._until(lambda: self.num_watchers == by)

    async def until_expired(self, name: str) -> None:
        """Return when a passed deadline was reported for `name`."""
        await self._until(lambda: name in self.expired)

    # ---- what the service asks --------------------------------------------------------------------------------------

    async def submit(
        self, request: GenerationRequest, *, watched: bool, found: tuple[Violation, ...] = ()
    ) -> Generation:
        self._maybe_raise()
        video = resolve(request, self.card, fallback_seed=42, found=found)
        self.submitted.append((request, watched))
        name = f"generations/{len(self.submitted)}"
        self._generations[name] = Generation(
            name=name, state=State.QUEUED, video=video, created_s=NOON_S, request_id=request.request_id
        )
        self._records[name] = []
        self.tell(name, Accepted(name=name, video=video))
        return self._generations[name]

    async def watch(self, name: str, *, after: int = 0, from_offset: int = 0) -> AsyncGenerator[Record, None]:
        self._maybe_raise()
        self._attach(1)
        try:
            for index in itertools.count():
                await self._until(lambda index=index: len(self._records[name]) > index)
                record = self._records[name][index]
                if not _is_seen(record, after, from_offset):
                    self.on_take(record.sequence)
                    yield record
                if isinstance(record.event, Completed | Failed):
                    return
        finally:
            self._attach(-1)

    async def cancel(self, name: str) -> Generation:
        self._maybe_raise()
        self.cancelled.append(name)
        if not self.get(name).state.is_final:
            failure = Failure(reason=Reason.CANCELLED_BY_CALLER, message="the generation was cancelled")
            self.tell(name, Failed(failure=failure))
        return self.get(name)

    async def expire(self, name: str) -> None:
        self.expired.append(name)
        self._wake()

    def get(self, name: str) -> Generation:
        self._maybe_raise()
        if name not in self._generations:
            raise ServiceError(Reason.GENERATION_NOT_FOUND, f"no generation is named {name!r}")
        return self._generations[name]

    def list(
        self, *, page_size: int, after_name: str | None, states: frozenset[State]
    ) -> tuple[tuple[Generation, ...], bool]:
        names = list(reversed(self._generations))
        names = names[names.index(after_name) + 1 :] if after_name else names
        found = [g for g in map(self.get, names) if not states or g.state in states]
        return tuple(found[:page_size]), len(found) > page_size

    async def delete(self, name: str) -> None:
        if not self.get(name).state.is_final:
            raise ServiceError(Reason.GENERATION_NOT_FINISHED, f"{name} is not final")
        self.deleted.append(name)

    async def read_video(self, name: str, *, offset: int, limit: int | None) -> AsyncGenerator[Chunk, None]:
        if self.get(name).state is not State.SUCCEEDED:
            raise ServiceError(Reason.GENERATION_NOT_FINISHED, f"{name} has no finished video")
        if offset > len(self.video):
            raise ServiceError(Reason.OFFSET_OUT_OF_RANGE, f"offset {offset} is past the end")
        end = len(self.video) if limit is None else min(len(self.video), offset + limit)
        for at in range(offset, end, 4):
            yield Chunk(offset=at, data=self.video[at : min(at + 4, end)])

    def status(self) -> EngineStatus:
        self._maybe_raise()
        return EngineStatus(
            ready=self.ready,
            detail="as told",
            topology=Topology(cfg=2),
            device="cpu",
            dtype="float32",
            attention="sdpa",
            load_format="safetensors",
            queue_limit=16,
            num_queued=3,
            num_running=1,
            rank_memory=(RankMemory(rank=0, peak_bytes=5), RankMemory(rank=1, peak_bytes=6)),
        )

    async def status_changes(self) -> AsyncGenerator[bool, None]:
        told: list[bool] = []
        while True:
            await self._until(lambda: told[-1:] != [self.ready])
            told.append(self.ready)
            yield self.ready

    async def start(self) -> None:
        self.set_ready(True)

    async def drain(self, timeout_s: float) -> None:
        self.drained.append(timeout_s)
        failed = Failed(failure=Failure(reason=Reason.SHUTTING_DOWN, message="the server is shutting down"))
        for name, generation in self._generations.items():
            if self.ends_at_drain and not generation.state.is_final:
                self.tell(name, failed)

    async def stop(self) -> None:
        self.set_ready(False)

    # ---- underneath -------------------------------------------------------------------------------------------------

    def _maybe_raise(self) -> None:
        error, self.error = self.error, None
        if error is not None:
            raise error

    def _update(self, name: str, event: Event) -> None:
        changes: dict[str, object] = {}
        match event:
            case Progress():
                changes = {"state": State.RUNNING, "started_s": NOON_S, "progress": event}
            case Completed():
                changes = {"state": State.SUCCEEDED, "ended_s": NOON_S, "completed": event}
            case Failed(failure=failure):
                state = State.CANCELLED if failure.reason in CANCELLING_REASONS else State.FAILED
                changes = {"state": state, "ended_s": NOON_S, "failure": failure}
        self._generations[name] = dataclasses.replace(self._generations[name], **changes)  # type: ignore[arg-type]

    def _attach(self, change: int) -> None:
        self.num_watchers += change
        self._wake()

    async def _until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            await self._changed.wait()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()


def _is_seen(record: Record, after: int, from_offset: int) -> bool:
    if isinstance(record.event, Chunk):
        return record.event.offset < from_offset
    return record.sequence <= after
