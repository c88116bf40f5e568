"""Any mix of what callers, ranks, encoders and time can do, drawn from fixed seeds."""

import asyncio
import random
import threading
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from tests.bench import Bench, Watcher, eventually, open_bench
from tests.fake_ranks import FakeExecutor, FakeRun, raw_video
from wan_grpc.domain.errors import CANCELLING_REASONS, Failure, Reason, ServiceError
from wan_grpc.domain.events import Accepted, Chunk, Completed, Failed, Heartbeat, Record, State, VideoInfo
from wan_grpc.domain.observations import Admitted, Ended, LoadChanged
from wan_grpc.domain.request import UNLIMITED_S
from wan_grpc.engine.generation import GenerationLog

IDS = ("7d9c1f70-4c1e-4b5c-9d5f-0a1b2c3d4e5f", "0b6f3c52-8d43-4f0e-a5a5-5f1d3c2b1a09")
MAX_QUEUE, MAX_ENCODING, RETAIN_COUNT = 4, 1, 6
NUM_ACTIONS = 60
OUT_OF_MEMORY = Failure(reason=Reason.OUT_OF_MEMORY, message="too large")
PLACES = {State.QUEUED: 0, State.RUNNING: 1}


class Schedule:
    """One run of random actions on one engine, which is left to settle after each."""

    def __init__(self, bench: Bench, gate: threading.Event, seed: int) -> None:
        self.bench = bench
        self.gate = gate
        self.random = random.Random(seed)
        self.jobs: dict[str, GenerationLog] = {}
        self.states: dict[str, State] = {}
        self.first_failures: dict[str, Failure] = {}
        self.watchers: list[tuple[GenerationLog, int, Watcher]] = []
        self.cancels: list[asyncio.Task[object]] = []
        self.actions: list[str] = []

    async def play(self) -> None:
        actions: dict[Callable[[], Awaitable[None]], int] = {
            self.submit: 8,
            self.watch: 8,
            self.leave: 3,
            self.cancel: 2,
            self.expire: 1,
            self.delete: 1,
            self.advance: 12,
            self.finish: 4,
            self.fail: 1,
            self.fail_on_one_rank: 1,
            self.die_or_revive: 2,
            self.hold_or_release_the_encoders: 2,
            self.pass_time: 3,
        }
        for action in self.random.choices(list(actions), list(actions.values()), k=NUM_ACTIONS):
            self.actions.append(action.__name__)
            attached = [entry for entry in self.watchers if not entry[2].has_ended]
            await action()
            await self.settle()
            self.check_always({entry[0].name for entry in attached if entry in self.watchers})
        await self.to_the_end()

    # ---- callers ----------------------------------------------------------------------------------------------------

    async def submit(self) -> None:
        has_room = len(self.bench.engine._queue) + self.bench.engine.status().num_running < MAX_QUEUE + len(
            self.bench.executors
        )
        try:
            generation = await self.bench.submit(
                watched=self.random.choice([True, False]),
                detach_grace_s=self.random.choice([None, 0.0, 8.0, UNLIMITED_S]),
                max_duration_s=self.random.choice([None, 12.0]),
                request_id=self.random.choice([None, None, None, *IDS]),
                num_frames=self.random.choice([1, 5]),
                seed=len(self.jobs),
            )
        except ServiceError as error:
            assert error.failure.reason is Reason.REQUEST_ID_REUSED or not has_room
            assert error.failure.reason in (Reason.QUEUE_FULL, Reason.REQUEST_ID_REUSED)
        else:
            assert has_room or generation.name in self.jobs
            self.jobs.setdefault(generation.name, self.bench.engine._generations[generation.name])

    async def watch(self) -> None:
        if job := self.any_known_job():
            after, offset = self.random.choice([0, 0, 3, 20]), self.random.choice([0, 0, 1, 1536])
            watcher = self.bench.watch(job.name, after=after, from_offset=offset)
            if self.random.random() < 0.3:
                watcher.pause()
            self.watchers.append((job, after, watcher))

    async def leave(self) -> None:
        if self.watchers:
            _, _, watcher = self.watchers.pop(self.random.randrange(len(self.watchers)))
            await watcher.leave()

    async def cancel(self) -> None:
        if job := self.any_known_job():
            self.cancels.append(asyncio.create_task(self.bench.engine.cancel(job.name)))

    async def expire(self) -> None:
        if self.jobs:
            await self.bench.engine.expire(self.random.choice(list(self.jobs)))

    async def delete(self) -> None:
        job = self.any_known_job()
        if job and job.state.is_final:
            await self.bench.engine.delete(job.name)

    def any_known_job(self) -> GenerationLog | None:
        known = list(self.bench.engine._generations)
        return self.jobs[self.random.choice(known)] if known else None

    # ---- ranks, encoders and time -----------------------------------------------------------------------------------

    async def advance(self) -> None:
        for _ in range(self.random.randint(1, 6)):
            if (run := self.any_executor().running) is not None:
                run.advance()
                await self.settle()

    async def finish(self) -> None:
        if (run := self.any_executor().running) is not None:
            run.finish()

    async def fail(self) -> None:
        if (run := self.any_executor().running) is not None:
            run.fail(OUT_OF_MEMORY)

    async def fail_on_one_rank(self) -> None:
        if (run := self.any_executor().running) is not None:
            run.fail_on(1, OUT_OF_MEMORY)

    async def die_or_revive(self) -> None:
        executor = self.any_executor()
        if executor.is_ready:
            executor.kill()
        else:
            executor.set_ready(True)

    @property
    def runs(self) -> list[FakeRun]:
        return [executor.running for executor in self.bench.executors if executor.running is not None]

    def any_executor(self) -> FakeExecutor:
        return self.random.choice(self.bench.executors)

    async def hold_or_release_the_encoders(self) -> None:
        if self.gate.is_set():
            self.gate.clear()
        else:
            self.gate.set()

    async def pass_time(self) -> None:
        await self.bench.clock.advance(self.random.choice([1.0, 6.0, 9.0, 16.0]))

    # ---- what always holds ------------------------------------------------------------------------------------------

    def check_always(self, watched: set[str]) -> None:
        for job in self.jobs.values():
            self.check_step(job, watched)
        executors = self.bench.executors
        queued = [job for job in self.jobs.values() if job.state is State.QUEUED]
        running = [job for job in self.jobs.values() if job.state is State.RUNNING]
        kept = [job for job in self.bench.engine._generations.values() if job.state.is_final and not job.num_watchers]
        assert [job.snapshot().queue_position for job in queued] == list(range(len(queued)))
        assert len(queued) <= MAX_QUEUE + len(executors)
        assert len(running) <= len(executors) + MAX_ENCODING
        assert len(kept) <= RETAIN_COUNT
        are_idle = any(executor.is_ready and executor.running is None for executor in executors)
        assert not (queued and are_idle and self.gate.is_set()), "idle ranks"

    def check_step(self, job: GenerationLog, watched: set[str]) -> None:
        before = self.states.get(job.name, job.state)
        self.states[job.name] = job.state
        if job.state is not before:
            assert PLACES.get(job.state, 2) > PLACES.get(before, 2), f"{before} to {job.state}"
            self.check_end(job, watched)
        if job.running is not None and job.running.failure is not None:
            self.first_failures.setdefault(job.name, job.running.failure)

    def check_end(self, job: GenerationLog, watched: set[str]) -> None:
        """The first cause is told, and nobody who was watched all the time is given up as unwatched."""
        end = job.records[-1].event
        if not isinstance(end, Failed):
            return
        assert end.failure == self.first_failures.get(job.name, end.failure)
        if end.failure.reason in (Reason.ABANDONED, Reason.DEADLINE_EXCEEDED) and job.name not in self.first_failures:
            assert job.name not in watched, f"{end} while somebody watched"

    # ---- the end ----------------------------------------------------------------------------------------------------

    async def to_the_end(self) -> None:
        self.gate.set()
        while not all(job.state.is_final for job in self.jobs.values()) or self.runs:
            for executor in self.bench.executors:
                executor.set_ready(True)
            for run in self.runs:
                run.finish()
            await asyncio.sleep(0.001)
        await eventually(lambda: self.bench.engine.status().num_running == 0, "the ranks are free")
        for _, _, watcher in self.watchers:
            watcher.go_on()
        await eventually(lambda: all(watcher.has_ended for _, _, watcher in self.watchers), "watchers end")
        await eventually(lambda: all(task.done() for task in self.cancels), "cancels return")
        for task in self.cancels:
            assert (await task).state.is_final  # type: ignore[attr-defined]
        for job in self.jobs.values():
            check_log(job)
        for job, after, watcher in self.watchers:
            await check_watcher(job, after, watcher)
        await self.check_nothing_is_left()

    async def check_nothing_is_left(self) -> None:
        assert sorted(observation.name for observation in self.bench.seen(Admitted)) == sorted(self.jobs)
        assert sorted(observation.name for observation in self.bench.seen(Ended)) == sorted(self.jobs)
        assert self.bench.seen(LoadChanged)[-1] == LoadChanged(num_queued=0, num_running=0, num_watchers=0)
        succeeded = [job for job in self.bench.engine._generations.values() if job.state is State.SUCCEEDED]
        assert len(self.bench.videos_on_disk()) == len(succeeded)
        for name in tuple(self.bench.engine._generations):
            await self.bench.engine.delete(name)
        assert self.bench.videos_on_disk() == []
        assert self.bench.engine._by_request_id == {}

    # ---- settling ---------------------------------------------------------------------------------------------------

    async def settle(self) -> None:
        """Let everything happen that can without anybody's doing."""
        for _ in range(10):
            await asyncio.sleep(0)
        await eventually(self.is_settled, "settled")
        for _ in range(10):
            await asyncio.sleep(0)

    def is_settled(self) -> bool:
        at_work = {run.generation for run in self.runs}
        behind = [job for job in self.jobs.values() if job.state is State.RUNNING and job.name not in at_work]
        are_idle = any(executor.is_ready and executor.running is None for executor in self.bench.executors)
        is_beginning = are_idle and len(self.bench.engine._queue)
        has_encoded = not self.gate.is_set() or not (behind or is_beginning)
        return has_encoded and not any(run.num_unheard or run.has_ended for run in self.runs)


def check_log(job: GenerationLog) -> None:
    events = [record.event for record in job.records]
    kinds = [type(event) for event in events]
    end = events[-1]
    assert [record.sequence for record in job.records] == list(range(1, len(events) + 1))
    assert (kinds[0], kinds.count(Accepted), kinds.count(VideoInfo) <= 1) == (Accepted, 1, True)
    assert kinds.count(Completed) + kinds.count(Failed) == 1
    if isinstance(end, Completed):
        assert job.state is State.SUCCEEDED
    else:
        assert isinstance(end, Failed)
        assert end.failure.reason is not Reason.INTERNAL
        assert job.state is (State.CANCELLED if end.failure.reason in CANCELLING_REASONS else State.FAILED)


async def check_watcher(job: GenerationLog, after: int, watcher: Watcher) -> None:
    end = job.records[-1].event
    if isinstance(end, Completed) and watcher.from_offset > end.size_bytes:
        with pytest.raises(ServiceError, match="is past the end"):
            await watcher.to_end()
        return
    await watcher.to_end()
    logged = [record for record in watcher.records if not isinstance(record.event, Chunk | Heartbeat)]
    assert logged[-1] == job.records[-1]
    assert is_part(logged, job.records)
    if isinstance(end, Completed):
        assert watcher.video == raw_video(job.video)[watcher.from_offset :]
    if after == 0 and watcher.find(Chunk):
        kinds = [type(record.event) for record in watcher.records]
        assert kinds.index(VideoInfo) < kinds.index(Chunk)


def is_part(part: list[Record], whole: list[Record]) -> bool:
    """Whether all of `part` stand in `whole`, in this order."""
    rest = iter(whole)
    return all(any(record == other for other in rest) for record in part)


@pytest.mark.parametrize("num_replicas", [1, 2])
async def test_every_generation_ends_in_one_way_once(num_replicas: int, tmp_path: Path, gate: threading.Event) -> None:
    """Whatever happens in what order, each has one end that all its watchers see, and nothing of it is left behind."""
    ends: Counter[str] = Counter()
    for seed in range(120):
        gate.set()
        async with open_bench(
            tmp_path,
            leaves_at_once=False,
            num_replicas=num_replicas,
            max_queue=MAX_QUEUE,
            max_encoding=MAX_ENCODING,
            retain_count=RETAIN_COUNT,
        ) as bench:
            schedule = Schedule(bench, gate, seed)
            try:
                await schedule.play()
            except BaseException as error:
                error.add_note(f"seed {seed}, actions {', '.join(schedule.actions)}")
                gate.set()
                raise
        assert list(tmp_path.iterdir()) == []
        ends.update(failure.reason if (failure := job.snapshot().failure) else "" for job in schedule.jobs.values())
    common = ["", *(CANCELLING_REASONS - {Reason.SHUTTING_DOWN}), Reason.RANK_DIED, Reason.OUT_OF_MEMORY]
    assert {reason for reason in common if ends[reason] < 10} == set(), "the schedules meet each end often"
