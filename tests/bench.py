"""An engine on the bench: over fake ranks, with a clock that a test moves on and watchers that keep what they saw."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

from tests.fake_ranks import CARD, MEMORY, FakeExecutor, ask
from wan_grpc.domain.events import Chunk, Event, Failed, Generation, Progress, Record, Stage, State
from wan_grpc.domain.observations import Observation
from wan_grpc.domain.variants import ModelCard
from wan_grpc.engine.engine import Engine, EngineOptions
from wan_grpc.store.artifacts import Spool

E = TypeVar("E")


async def eventually(condition: Callable[[], bool], what: str = "", timeout_s: float = 10.0) -> None:
    """Wait for a condition; what it reads may change on any thread."""
    deadline = asyncio.get_running_loop().time() + timeout_s
    while not condition():
        assert asyncio.get_running_loop().time() < deadline, f"never came true: {what or condition}"
        await asyncio.sleep(0.001)


class Clock:
    """Moves the running loop's time on, so that timers of hours are due at once."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._time = self._loop.time
        self._ahead_s = 0.0
        self._loop.time = lambda: self._time() + self._ahead_s  # type: ignore[method-assign]

    async def advance(self, seconds: float) -> None:
        self._ahead_s += seconds
        for _ in range(5):  # once round for the timers, and on for what they set off
            await asyncio.sleep(0)

    def restore(self) -> None:
        self._loop.time = self._time  # type: ignore[method-assign]


class Watcher:
    """Reads one generation to its end, or until it leaves, and keeps all that it saw."""

    def __init__(
        self, engine: Engine, name: str, *, after: int = 0, from_offset: int = 0, pause_at: type[Event] | None = None
    ) -> None:
        self._pause_at = pause_at
        self.records: list[Record] = []
        self.from_offset = from_offset
        self._may_read = asyncio.Event()
        self._may_read.set()
        self._task = asyncio.create_task(self._read(engine, name, after))

    async def _read(self, engine: Engine, name: str, after: int) -> None:
        async with aclosing(engine.watch(name, after=after, from_offset=self.from_offset)) as records:
            async for record in records:
                self.records.append(record)
                if self._pause_at is not None and isinstance(record.event, self._pause_at):
                    self.pause()
                await self._may_read.wait()

    async def to_end(self) -> "Watcher":
        """Read to the end. Raises what the watch raises."""
        async with asyncio.timeout(30):
            await self._task
        return self

    async def leave(self) -> None:
        self._task.cancel()
        await asyncio.wait([self._task])

    def pause(self) -> None:
        """Take no more than one record from now on."""
        self._may_read.clear()

    def go_on(self) -> None:
        self._pause_at = None
        self._may_read.set()

    @property
    def has_ended(self) -> bool:
        return self._task.done()

    @property
    def logged(self) -> list[Event]:
        """Events with a number of their own, without what only a stopwatch knows."""
        return [without_eta(record.event) for record in self.records if record.event.__class__ is not Chunk]

    @property
    def video(self) -> bytes:
        """The chunks joined, each of which must follow the one before."""
        joined = b""
        for record in self.records:
            if isinstance(record.event, Chunk):
                assert record.event.offset == self.from_offset + len(joined)
                joined += record.event.data
        return joined

    @property
    def failure(self) -> object:
        end = self.records[-1].event
        assert isinstance(end, Failed)
        return end.failure

    def find(self, kind: type[E]) -> list[E]:
        return [record.event for record in self.records if isinstance(record.event, kind)]

    async def saw(self, stage: Stage, step: int) -> None:
        """Wait until it has seen this step."""

        def has_seen() -> bool:
            return any((event.stage, event.step) == (stage, step) for event in self.find(Progress))

        await eventually(has_seen, f"{stage} {step}")


def without_eta(event: Event) -> Event:
    return replace(event, eta_s=None) if isinstance(event, Progress) else event


@dataclass
class Bench:
    engine: Engine
    executors: list[FakeExecutor]
    spool: Spool
    clock: Clock
    observed: list[Observation] = field(default_factory=list)

    @property
    def executor(self) -> FakeExecutor:
        """The first, which is the only one unless a test asks for more."""
        return self.executors[0]

    async def submit(self, *, watched: bool = True, **request: object) -> Generation:
        return await self.engine.submit(ask(**request), watched=watched)

    def watch(self, name: str, *, after: int = 0, from_offset: int = 0, pause_at: type[Event] | None = None) -> Watcher:
        return Watcher(self.engine, name, after=after, from_offset=from_offset, pause_at=pause_at)

    async def succeed(self, **request: object) -> Generation:
        """Submit a request and let it run to its good end, unwatched."""
        generation = await self.submit(watched=False, **request)
        run = await self.executor.run_number(len(self.executor.runs) + 1)
        assert run.generation == generation.name
        run.finish()
        await self.ended(generation.name)
        return self.engine.get(generation.name)

    async def heard(self) -> None:
        """Return when the engine has taken in all that the ranks have said."""
        runs = [executor.running for executor in self.executors if executor.running is not None]
        await eventually(lambda: not any(run.num_unheard for run in runs), "what the ranks said is heard")

    async def ended(self, name: str) -> None:
        await eventually(lambda: self.engine.get(name).state.is_final, f"the end of {name}")

    def states(self, *names: str) -> list[State]:
        return [self.engine.get(name).state for name in names]

    def videos_on_disk(self) -> list[str]:
        return sorted(path.name for path in self.spool.directory.iterdir())

    def seen(self, kind: type[E]) -> list[E]:
        return [observation for observation in self.observed if isinstance(observation, kind)]


def count_words(prompt: str) -> int:
    """Stands in for a tokenizer: a word is a token, and the end is one."""
    return len(prompt.split()) + 1


@asynccontextmanager
async def open_bench(
    directory: Path,
    *,
    is_ready: bool = True,
    leaves_at_once: bool = True,
    num_replicas: int = 1,
    spool: type[Spool] = Spool,
    card: ModelCard = CARD,
    **options: object,
) -> AsyncIterator[Bench]:
    """`options` are those of the engine."""
    made = spool(directory)
    executors = [
        FakeExecutor(directory, leaves_at_once=leaves_at_once, first_rank=number * len(MEMORY))
        for number in range(num_replicas)
    ]
    for executor in executors:
        executor.set_ready(is_ready)
    observed: list[Observation] = []
    engine = Engine(
        card,
        executors,  # type: ignore[arg-type]
        made,
        options=EngineOptions(**options),  # type: ignore[arg-type]
        observe=observed.append,
        count_tokens=count_words,
    )
    clock = Clock()
    try:
        await engine.start()
        yield Bench(engine=engine, executors=executors, spool=made, clock=clock, observed=observed)
    finally:
        clock.restore()
        await engine.stop()
        made.close()
