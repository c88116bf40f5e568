"""Real rank processes on the tiny model, with an engine over them or without: what every test here starts from."""

import asyncio
import hashlib
import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

import numpy as np
import psutil

from tests.bench import Watcher, eventually
from wan_grpc.domain.events import Completed, Generation, Progress, Stage
from wan_grpc.domain.formats import OutputFormat
from wan_grpc.domain.images import InputFrames
from wan_grpc.domain.observations import Observation
from wan_grpc.domain.request import GenerationRequest, VideoRequest, resolve
from wan_grpc.domain.topology import Topology
from wan_grpc.domain.variants import Limits
from wan_grpc.engine.engine import Engine, EngineOptions
from wan_grpc.engine.executor import Executor, RestartPolicy
from wan_grpc.engine.group import GroupPlan
from wan_grpc.engine.messages import RunEnded, StepDone
from wan_grpc.pipeline.checkpoint import locate, read_card
from wan_grpc.pipeline.prompt import token_counter
from wan_grpc.store.artifacts import Spool

T = TypeVar("T")
HEARD_S = 5.0
"""How soon a caller hears that a rank has died, and a killed server's ranks are gone."""
_LIMITS = Limits(max_area=128 * 128, max_num_frames=161, max_inference_steps=200)


def ask(**changes: object) -> GenerationRequest:
    """A small raw video: 3 steps of denoising and 2 slices, a fraction of a second. `changes` are fields of it."""
    values: dict[str, object] = {
        "prompt": "a cat",
        "seed": 1,
        "width": 32,
        "height": 32,
        "num_frames": 5,
        "num_inference_steps": 3,
        "output_format": OutputFormat.RAW_RGB24,
        **changes,
    }
    return GenerationRequest(**values)  # type: ignore[arg-type]


LONG = {"width": 64, "height": 64, "num_frames": 81, "num_inference_steps": 100}
"""Long enough in every stage to be caught in the middle of it."""


ALONE = Topology(num_heads=4)
PAIR = Topology(cfg=2, num_heads=4)
FOUR = Topology(cfg=2, ulysses=2, num_heads=4)


class Frames(bytes):
    """Raw frames, which equal others when no sample differs by more than 1: many ranks round otherwise than one."""

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, bytes) or len(other) != len(self):
            return False
        mine, theirs = (np.frombuffer(frames, dtype=np.uint8).astype(np.int16) for frames in (self, other))
        return bool(np.abs(mine - theirs).max(initial=0) <= 1)

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = bytes.__hash__


@dataclass
class Live:
    """An engine over real ranks."""

    engine: Engine
    executor: Executor
    spool: Spool
    observed: list[Observation] = field(default_factory=list)

    @property
    def pids(self) -> tuple[int, ...]:
        return self.executor.pids

    def resident_bytes(self) -> list[int]:
        return [psutil.Process(pid).memory_info().rss for pid in self.pids]

    def seen(self, kind: type[T]) -> list[T]:
        return [observation for observation in self.observed if isinstance(observation, kind)]

    async def submit(self, **request: object) -> Generation:
        return await self.engine.submit(ask(**request), watched=False)

    async def begin(self, **request: object) -> Watcher:
        generation = await self.submit(**request)
        watcher = Watcher(self.engine, generation.name)
        await eventually(lambda: bool(watcher.records))
        return watcher

    async def reach(self, stage: Stage, step: int, **request: object) -> Watcher:
        """A watched generation that has come at least this far on the ranks."""
        watcher = await self.begin(**{**LONG, **request})
        await eventually(lambda: any(event.stage is stage and event.step >= step for event in watcher.find(Progress)))
        return watcher

    async def make(self, **request: object) -> bytes:
        """The bytes of a video, which must come with their true size and hash."""
        watcher = await (await self.begin(**request)).to_end()
        completed, video = watcher.find(Completed)[0], watcher.video
        assert (completed.size_bytes, completed.sha256) == (len(video), hashlib.sha256(video).hexdigest())
        return Frames(video)


def name_of(watcher: Watcher) -> str:
    return watcher.records[0].event.name  # type: ignore[union-attr]


def plan_ranks(checkpoint: Path, directory: Path, **changes: object) -> GroupPlan:
    plan = GroupPlan(
        topology=ALONE,
        checkpoint=locate(str(checkpoint), load_format="auto"),
        device="cpu",
        dtype="auto",
        load_format="auto",
        cpu_threads=1,
        max_frame_bytes=_LIMITS.max_area * 3,
        directory=directory,
        log_level="error",
    )
    return replace(plan, **changes)  # type: ignore[arg-type]


@asynccontextmanager
async def live_ranks(
    checkpoint: Path, *, policy: RestartPolicy | None = None, wait: bool = True, **plan: object
) -> AsyncIterator[Live]:
    """Ranks that are ready, unless `wait` is False. `plan` holds fields of GroupPlan."""
    spool = Spool()
    planned = plan_ranks(checkpoint, spool.directory, **plan)  # type: ignore[arg-type]
    card = read_card(planned.checkpoint, model_id="tiny", limits=_LIMITS)
    observed: list[Observation] = []
    executor = Executor(planned, card, policy=policy or RestartPolicy(), observe=observed.append)
    engine = Engine(
        card,
        [executor],
        spool,
        options=EngineOptions(),
        observe=observed.append,
        count_tokens=token_counter(planned.checkpoint),
    )
    await engine.start()
    try:
        if wait:
            async with asyncio.timeout(100):
                await executor.wait_ready()
        yield Live(engine=engine, executor=executor, spool=spool, observed=observed)
    finally:
        await engine.stop()
        spool.close()


@asynccontextmanager
async def bare_ranks(checkpoint: Path, directory: Path, **plan: object) -> AsyncIterator[Executor]:
    """An executor without an engine over it, for what an engine would never ask."""
    planned = plan_ranks(checkpoint, directory, **plan)  # type: ignore[arg-type]
    card = read_card(planned.checkpoint, model_id="tiny", limits=_LIMITS)
    executor = Executor(planned, card, policy=RestartPolicy(), observe=lambda _: None)
    executor.start()
    try:
        await executor.wait_ready()
        yield executor
    finally:
        await executor.stop()


def video(executor: Executor, **request: object) -> VideoRequest:
    """What `request` means to the model of these ranks."""
    card = read_card(executor.plan.checkpoint, model_id="tiny", limits=_LIMITS)
    return resolve(ask(**request), card, fallback_seed=0)


async def run(
    executor: Executor,
    video: VideoRequest,
    take_frame: Callable[[memoryview], None] = lambda _: None,
    frames: InputFrames = InputFrames(),
) -> tuple[list[Progress], RunEnded]:
    """Compute one video to its end."""
    steps: list[Progress] = []
    async for message in executor.run("generations/bare", video, frames, take_frame):
        if isinstance(message, StepDone):
            steps.append(message.progress)
    assert isinstance(message, RunEnded)
    return steps, message


def is_gone(pid: int) -> bool:
    """No such process any more, or only its name until its parent asks."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))  # noqa: PTH208  a Path would open one more
