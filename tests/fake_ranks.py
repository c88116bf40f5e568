"""Ranks without processes: an executor that computes nothing, and says what a test tells it to.

Written by hand; it keeps the promises of engine/executor.py, above all that a run which is cancelled ends at a step.
"""

import asyncio
import hashlib
from collections.abc import AsyncGenerator, Callable, Iterator
from pathlib import Path

from wan_grpc.domain.errors import Failure, Reason, ServiceError, UnusableModelError
from wan_grpc.domain.events import Progress, Stage
from wan_grpc.domain.formats import OutputFormat
from wan_grpc.domain.images import InputFrames
from wan_grpc.domain.request import GenerationRequest, VideoRequest
from wan_grpc.domain.topology import Topology
from wan_grpc.domain.variants import Defaults, Expert, Limits, ModelCard, Task
from wan_grpc.engine.bell import Bell, rang
from wan_grpc.engine.group import GroupPlan
from wan_grpc.engine.messages import MemoryUse, News, PreviewMade, RankFailed, Ready, RunEnded, StepDone
from wan_grpc.pipeline.checkpoint import Checkpoint

CARD = ModelCard(
    model_id="fake",
    task=Task.TEXT_TO_VIDEO,
    defaults=Defaults(
        width=16,
        height=32,
        num_frames=5,
        fps=8,
        num_inference_steps=3,
        guidance_scale=4.0,
        guidance_scale_2=3.0,
        flow_shift=12.0,
        boundary_ratio=0.875,
    ),
    limits=Limits(max_area=1280 * 720, max_num_frames=161, max_inference_steps=200),
    size_multiple=16,
)
MEMORY = (MemoryUse(used_bytes=100, peak_bytes=1000), MemoryUse(used_bytes=200, peak_bytes=2000))


def ask(**changes: object) -> GenerationRequest:
    """A request for a small raw video; `changes` are fields of it."""
    values: dict[str, object] = {"prompt": "a cat", "seed": 1, "output_format": OutputFormat.RAW_RGB24, **changes}
    return GenerationRequest(**values)  # type: ignore[arg-type]


def frame(video: VideoRequest, index: int) -> bytes:
    """What the fake ranks compute: noise that names its video and its place."""
    digest = hashlib.sha256(f"{video.prompt}/{video.seed}/{index}".encode()).digest()
    return (digest * (video.frame_bytes // len(digest) + 1))[: video.frame_bytes]


def raw_video(video: VideoRequest) -> bytes:
    return b"".join(frame(video, index) for index in range(video.num_frames))


def steps_of(video: VideoRequest) -> Iterator[Progress]:
    """Everything that ranks say on the way through a video."""
    for stage, total in (
        (Stage.TEXT, 2 if video.guidance_scale > 1.0 else 1),
        (Stage.DENOISE, video.num_inference_steps),
        (Stage.DECODE, (video.num_frames - 1) // 4 + 1),
    ):
        yield Progress(stage=stage, step=0, total_steps=total)
        for step in range(1, total + 1):
            expert = Expert.HIGH_NOISE if stage is Stage.DENOISE else None
            yield Progress(stage=stage, step=step, total_steps=total, expert=expert, step_time_s=0.25)


class FakeRun:
    """One generation on the fake ranks, which a test moves on."""

    def __init__(
        self, generation: str, video: VideoRequest, frames: InputFrames, take_frame: Callable[[memoryview], None]
    ) -> None:
        self.generation = generation
        self.video = video
        self.frames = frames
        self.is_cancelled = False
        self.messages: asyncio.Queue[News | ServiceError] = asyncio.Queue()
        self.failure: Failure | None = None
        """Of the rank that failed first: no step is told after it, and the run ends in nothing else."""
        self.has_ended = False
        self.num_unheard = 0
        """Steps that the engine has not dealt with yet."""
        self._take_frame = take_frame
        self._steps = steps_of(video)
        self._num_frames = 0

    def advance(self, count: int = 1) -> None:
        """Finish the next steps; a cancelled run ends after the first, one without steps left ends well."""
        for _ in range(count):
            progress = next(self._steps, None)
            if self.has_ended:
                return
            if progress is not None:
                self._say(progress)
            if self.is_cancelled:
                self.leave()
            elif progress is None:
                self.end()

    def reach(self, stage: Stage, step: int = 0) -> None:
        """Finish steps up to and with this one."""
        for progress in self._steps:
            self._say(progress)
            if (progress.stage, progress.step) == (stage, step):
                return
        raise AssertionError(f"{stage} {step} is behind or not there")

    def show(self, step: int, rgb: bytes, *, time_s: float = 0.0) -> None:
        """A preview of 4 x 2 pixels."""
        self.messages.put_nowait(PreviewMade(step=step, width=4, height=2, rgb=rgb, time_s=time_s))
        self.num_unheard += 1

    def finish(self) -> None:
        """All steps that are left, and a good end, as if no cancel had arrived in time."""
        for progress in self._steps:
            self._say(progress)
        self.end()

    def end(self) -> None:
        self._close(RunEnded(generation=self.generation, memory=MEMORY, failure=self.failure))

    def leave(self) -> None:
        """End as cancelled, here."""
        is_cancelled = self.failure is None
        self._close(RunEnded(generation=self.generation, memory=MEMORY, cancelled=is_cancelled, failure=self.failure))

    def fail_on(self, rank: int, failure: Failure) -> None:
        """Fail on one rank, while the others are still to leave."""
        if self.failure is None and not self.has_ended:
            self.failure = failure
            self.messages.put_nowait(RankFailed(generation=self.generation, rank=rank, failure=failure))
            self.num_unheard += 1

    def fail(self, failure: Failure) -> None:
        self._close(RunEnded(generation=self.generation, memory=MEMORY, failure=failure))

    def die(self, detail: str) -> None:
        self._close(ServiceError(Reason.RANK_DIED, detail, retry_after_s=7.0))

    def _close(self, message: RunEnded | ServiceError) -> None:
        if not self.has_ended:
            self.has_ended = True
            self.messages.put_nowait(message)

    def _say(self, progress: Progress) -> None:
        if self.failure is not None:
            return
        self.messages.put_nowait(StepDone(progress=progress))
        self.num_unheard += 1
        if progress.stage is Stage.DECODE and progress.step:
            for _ in range(1 if progress.step == 1 else 4):
                self._take_frame(memoryview(frame(self.video, self._num_frames)))
                self._num_frames += 1


class FakeExecutor:
    """The executor's interface over runs that stand still until a test moves them."""

    def __init__(self, directory: Path, *, leaves_at_once: bool = True, first_rank: int = 0) -> None:
        self.plan = GroupPlan(
            topology=Topology(ulysses=len(MEMORY)),
            checkpoint=Checkpoint(model_path="fake", directory=None),
            device="cpu",
            dtype="float32",
            load_format="dummy",
            cpu_threads=1,
            max_frame_bytes=CARD.limits.max_area * 3,
            directory=directory,
            first_rank=first_rank,
        )
        self.leaves_at_once = leaves_at_once
        """Whether a run that is cancelled ends by itself, or at its next step."""
        self.changed = Bell()
        self.detail = "the ranks are starting"
        self.ready: tuple[Ready, ...] = ()
        self.memory: tuple[MemoryUse, ...] = ()
        self.fatal: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.is_unusable = False
        self.is_started = False
        self.runs: list[FakeRun] = []
        self.running: FakeRun | None = None
        self._begun = Bell()

    # ---- what a test says -------------------------------------------------------------------------------------------

    def set_ready(self, is_ready: bool) -> None:
        self.ready = tuple(
            Ready(
                rank=rank, device="cpu", dtype="float32", attention="fake_sdpa", used_bytes=use.used_bytes, links_s=0.0
            )
            for rank, use in enumerate(MEMORY if is_ready else ())
        )
        self.detail = "ready" if is_ready else "the ranks are starting"
        self.changed.ring()

    def fail_to_load(self, detail: str) -> None:
        """The model cannot be loaded by these ranks."""
        self.is_unusable = True
        self.give_up(detail)

    def kill(self, detail: str = "rank 1 was killed by SIGKILL") -> None:
        """The ranks die, and are not ready again until told so."""
        self.set_ready(False)
        if self.running is not None:
            self.running.die(detail)

    async def run_number(self, number: int) -> FakeRun:
        """The run that begins as the `number`th, from 1; waits for it."""
        while len(self.runs) < number:
            assert await rang(self._begun.ticket(), 10.0), f"{len(self.runs)} runs have begun, not {number}"
        return self.runs[number - 1]

    # ---- what the engine asks ---------------------------------------------------------------------------------------

    @property
    def is_ready(self) -> bool:
        return bool(self.ready)

    def start(self) -> None:
        self.is_started = True

    async def wait_ready(self) -> None:
        while not self.is_ready:
            if self.fatal.done():
                raise UnusableModelError(self.fatal.result())
            await rang(self.changed.ticket(), None)

    async def run(
        self, generation: str, video: VideoRequest, frames: InputFrames, take_frame: Callable[[memoryview], None]
    ) -> AsyncGenerator[News, None]:
        await self.wait_ready()
        assert self.running is None, "one generation at a time"
        run = self.running = FakeRun(generation, video, frames, take_frame)
        self.runs.append(run)
        self._begun.ring()
        try:
            while not isinstance(message := await run.messages.get(), RunEnded):
                if isinstance(message, ServiceError):
                    raise message
                yield message
                run.num_unheard -= 1  # whoever asks for the next message is done with this one
        finally:
            self.running = None
        self.memory = message.memory
        yield message

    def cancel(self, generation: str) -> None:
        run = self.running
        if run is not None and run.generation == generation and run.failure is None:
            run.is_cancelled = True
            if self.leaves_at_once:
                run.leave()

    def give_up(self, detail: str) -> None:
        if not self.fatal.done():
            self.detail = detail
            self.fatal.set_result(detail)
            self.changed.ring()

    async def stop(self) -> None:
        self.is_started = False
        self.set_ready(False)
