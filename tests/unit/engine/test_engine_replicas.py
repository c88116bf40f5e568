"""Several groups of ranks behind one queue."""

import asyncio
import math
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest
import structlog

from tests.bench import Bench, eventually, open_bench
from tests.fake_ranks import CARD, FakeExecutor, FakeRun, raw_video
from wan_grpc.domain.errors import Failure, Reason, ServiceError
from wan_grpc.domain.events import Generation, Queued, RankMemory, Stage, State
from wan_grpc.domain.observations import LoadChanged
from wan_grpc.engine.executor import Executor, RestartPolicy
from wan_grpc.engine.group import GroupEvent, GroupPlan
from wan_grpc.engine.messages import LoadFailed
from wan_grpc.engine.replicas import Replicas

OpenAnother = Callable[..., Awaitable[Bench]]


@pytest.fixture
async def pair(tmp_path: Path) -> AsyncIterator[Bench]:
    """An engine over two replicas that are ready, whose runs leave at their next step when they are cancelled."""
    async with open_bench(tmp_path, num_replicas=2, leaves_at_once=False) as bench:
        yield bench


async def begin(bench: Bench, count: int) -> tuple[list[Generation], dict[str, FakeRun]]:
    """Generations, and the runs of as many of them as there are replicas, by name."""
    generations = [await bench.submit(watched=False, prompt=str(number)) for number in range(count)]
    await eventually(lambda: bench.engine.status().num_running == len(bench.executors), "all replicas compute")
    runs = [await executor.run_number(len(executor.runs)) for executor in bench.executors]
    return generations, {run.generation: run for run in runs}


async def turn() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


def readiness(bench: Bench) -> tuple[bool, str]:
    status = bench.engine.status()
    return status.ready, status.detail


# ---- work -----------------------------------------------------------------------------------------------------------


async def test_two_generations_at_the_same_time(pair: Bench) -> None:
    """Both run on replicas of their own, whatever the pace of the other, and each gets its own video."""
    (first, second), runs = await begin(pair, 2)
    runs[second.name].reach(Stage.DENOISE, 2)
    await pair.heard()
    runs[first.name].reach(Stage.DENOISE, 1)
    await pair.heard()
    steps = [progress.step for g in (first, second) if (progress := pair.engine.get(g.name).progress)]
    assert (pair.states(first.name, second.name), steps) == ([State.RUNNING] * 2, [1, 2])
    runs[second.name].finish()
    await pair.ended(second.name)
    assert pair.states(first.name, second.name) == [State.RUNNING, State.SUCCEEDED]
    runs[first.name].finish()
    for generation in (first, second):
        assert (await pair.watch(generation.name).to_end()).video == raw_video(generation.video)


async def test_whoever_is_free_takes_the_next(pair: Bench) -> None:
    """Those that wait are begun in their order, by the replica that is done first, time and again."""
    generations, runs = await begin(pair, 5)
    busy, free = pair.executors
    assert set(runs) == {generations[0].name, generations[1].name}
    for number, following in enumerate(generations[2:], start=2):
        assert free.running is not None
        free.running.finish()
        run = await free.run_number(number)
        assert run.generation == following.name
    assert (len(busy.runs), len(free.runs)) == (1, 4)
    assert pair.seen(LoadChanged)[-1].num_running == pair.engine.status().num_running == 2


async def test_a_cancel_reaches_the_right_one(pair: Bench) -> None:
    """Only the replica that computes the cancelled generation is told to leave it."""
    (first, second), runs = await begin(pair, 2)
    cancelling = asyncio.create_task(pair.engine.cancel(second.name))
    await turn()
    assert (runs[first.name].is_cancelled, runs[second.name].is_cancelled) == (False, True)
    runs[second.name].advance()
    assert (await cancelling).state is State.CANCELLED
    runs[first.name].finish()
    await pair.ended(first.name)
    assert pair.states(first.name) == [State.SUCCEEDED]


async def test_memory_is_told_by_numbers_over_all_replicas(pair: Bench) -> None:
    """Ranks of the second replica are counted on after those of the first, in what is completed and in the status."""
    (first, second), runs = await begin(pair, 2)
    runs[first.name].finish()
    runs[second.name].finish()
    for generation in (first, second):
        await pair.ended(generation.name)
    told = [completed.rank_memory for g in (first, second) if (completed := pair.engine.get(g.name).completed)]
    low = (RankMemory(rank=0, peak_bytes=1000), RankMemory(rank=1, peak_bytes=2000))
    high = (RankMemory(rank=2, peak_bytes=1000), RankMemory(rank=3, peak_bytes=2000))
    assert sorted(told, key=lambda ranks: ranks[0].rank) == [low, high]
    status = pair.engine.status()
    assert (status.rank_memory, status.num_replicas) == ((*low, *high), 2)


async def test_the_encoder_has_a_place_for_each_replica(another: OpenAnother, gate: threading.Event) -> None:
    """While as many videos hang in the encoder as may, each replica computes one more; then they wait."""
    bench = await another(num_replicas=2, max_encoding=1)
    generations, runs = await begin(bench, 4)
    for run in runs.values():
        run.finish()
    await eventually(lambda: sum(len(executor.runs) for executor in bench.executors) == 3, "one more begins")
    await turn()
    assert bench.states(*(generation.name for generation in generations)) == [State.RUNNING] * 3 + [State.QUEUED]
    gate.set()
    await eventually(lambda: bench.engine.status().num_running == 2, "the last begins")
    for executor in bench.executors:
        assert executor.running is not None
        executor.running.finish()
    for generation in generations:
        await bench.ended(generation.name)


# ---- the line -------------------------------------------------------------------------------------------------------


async def test_the_line_begins_behind_all_replicas(another: OpenAnother) -> None:
    """One generation a replica is next, as many as asked for wait behind them, and the refusal says so."""
    bench = await another(num_replicas=2, max_queue=1, is_ready=False)
    names = [(await bench.submit(watched=False)).name for _ in range(3)]
    with pytest.raises(ServiceError) as caught:
        await bench.submit()
    assert caught.value.failure == Failure(
        reason=Reason.QUEUE_FULL,
        message="1 generations wait behind the 2 that are next; no more are accepted now",
        retry_after_s=5.0,
    )
    for executor in bench.executors:
        executor.set_ready(True)
    await eventually(lambda: bench.states(*names) == [State.RUNNING, State.RUNNING, State.QUEUED])
    with pytest.raises(ServiceError, match="wait behind the 2 that are next"):
        await bench.submit()


async def test_waiting_times_with_two_replicas(pair: Bench) -> None:
    """Each that waits is told when the first replica will be free for it, the time of those before it counted in."""
    (first, _), runs = await begin(pair, 2)
    for stage, seconds in ((Stage.TEXT, 1.0), (Stage.DENOISE, 90.0), (Stage.DECODE, 9.0)):
        pair.engine._pace.learn(stage, first.video, seconds)  # as if a video before had taken 100 s
    for run in runs.values():
        run.reach(Stage.TEXT, 0)
    await pair.heard()
    waiting = [await pair.submit(watched=False) for _ in range(5)]
    told = [pair.engine._generations[generation.name].records[-1].event for generation in waiting]
    assert [event.position for event in told if isinstance(event, Queued)] == [0, 1, 2, 3, 4]
    etas = [event.eta_s for event in told if isinstance(event, Queued)]
    assert etas == [pytest.approx(seconds, abs=5.0) for seconds in (100.0, 100.0, 200.0, 200.0, 300.0)]


async def test_a_start_that_one_replica_can_promise(pair: Bench) -> None:
    """Where one replica says nothing yet, the one that does is what is counted on."""
    (first, _), runs = await begin(pair, 2)
    for stage, seconds in ((Stage.TEXT, 1.0), (Stage.DENOISE, 90.0), (Stage.DECODE, 9.0)):
        pair.engine._pace.learn(stage, first.video, seconds)
    runs[first.name].reach(Stage.TEXT, 0)
    await pair.heard()
    waiting = [await pair.submit(watched=False) for _ in range(2)]
    etas = [pair.engine._generations[g.name].records[-1].event.eta_s for g in waiting]  # type: ignore[union-attr]
    assert etas == [pytest.approx(100.0, abs=5.0), pytest.approx(200.0, abs=5.0)]


@pytest.mark.parametrize(
    ("free_in_s", "durations_s", "wanted"),
    [
        ([0.0], [10.0, None, 5.0], [0.0, 10.0, None]),
        ([30.0, 0.0], [10.0, 10.0, 10.0, 10.0], [0.0, 10.0, 20.0, 30.0]),
        ([30.0, 0.0], [100.0, 1.0, 1.0], [0.0, 30.0, 31.0]),
        ([math.inf, 5.0], [None, 1.0], [5.0, None]),
        ([math.inf, math.inf], [1.0, 1.0], [None, None]),
        ([1.0, 2.0, 3.0], [], []),
    ],
)
async def test_servers_of_one_line(
    free_in_s: list[float], durations_s: list[float | None], wanted: list[float | None], tmp_path: Path
) -> None:
    """Each takes the next in line when it is free; what takes nobody knows how long frees nobody."""
    async with open_bench(tmp_path, num_replicas=len(free_in_s), is_ready=False) as bench:
        for replica, seconds in zip(bench.engine._replicas, free_in_s, strict=True):
            bench.executors[replica.number].set_ready(seconds == 0.0)
            if 0.0 < seconds < math.inf:
                replica.job = Left(seconds)  # type: ignore[assignment]
        assert list(bench.engine._replicas.starts_s(durations_s)) == wanted
        known = [seconds for seconds in free_in_s if 0.0 < seconds < math.inf]
        assert bench.engine._replicas.next_end_s() == min(known, default=None)
        for replica in bench.engine._replicas:
            replica.job = None


class Left:
    """A generation that will take as long."""

    def __init__(self, left_s: float) -> None:
        self.left_s = left_s


# ---- death and readiness --------------------------------------------------------------------------------------------


async def test_one_dies_and_the_other_goes_on(pair: Bench) -> None:
    """Its own generation fails; the rest is served by the other, and the service stays ready all the time."""
    (first, second, third), runs = await begin(pair, 3)
    told: list[bool] = []

    async def listen() -> None:
        async for ready in pair.engine.status_changes():
            told.append(ready)

    listening = asyncio.create_task(listen())
    dying = next(executor for executor in pair.executors if executor.running is runs[first.name])
    living = next(executor for executor in pair.executors if executor is not dying)
    dying.kill("rank 0 was killed by SIGKILL")
    await pair.ended(first.name)
    assert readiness(pair) == (True, "1 of 2 replicas are ready")
    runs[second.name].finish()
    run = await living.run_number(2)
    run.finish()
    await pair.ended(third.name)
    assert pair.states(first.name, second.name, third.name) == [State.FAILED, State.SUCCEEDED, State.SUCCEEDED]
    dying.set_ready(True)
    assert readiness(pair) == (True, "2 of 2 replicas are ready")
    await begin(pair, 2)
    assert told == [True]
    listening.cancel()


async def test_readiness_follows_all(pair: Bench) -> None:
    """Red while both are down, green as soon as either is back, and told at each change."""
    changes = pair.engine.status_changes()
    told = [await anext(changes)]
    for executor in pair.executors:
        executor.kill()
    told.append(await anext(changes))
    assert readiness(pair) == (False, "0 of 2 replicas are ready")
    pair.executors[1].set_ready(True)
    told.append(await anext(changes))
    assert pair.engine.status().device == "cpu"
    draining = asyncio.create_task(pair.engine.drain(0.0))
    told.append(await anext(changes))
    await draining
    assert told == [True, False, True, False]
    await changes.aclose()


async def test_one_that_gives_up_leaves_the_work_to_the_other(pair: Bench) -> None:
    """It is logged with its reason, counts no longer, and ends nothing; the other serves those that wait."""
    with structlog.testing.capture_logs() as logs:
        pair.executors[0].kill()
        pair.executors[0].give_up("3 starts of the ranks failed within 600 s")
        await turn()
    told = "a replica cannot work, and starting it again is no use; the others go on"
    detail = "3 starts of the ranks failed within 600 s"
    assert logs == [{"event": told, "log_level": "error", "replica": 0, "detail": detail}]
    assert readiness(pair) == (True, "1 of 2 replicas are ready; 3 starts of the ranks failed within 600 s")
    assert not pair.engine.fatal.done()
    for number in range(1, 3):
        generation = await pair.submit(watched=False)
        (await pair.executors[1].run_number(number)).finish()
        await pair.ended(generation.name)
        assert pair.states(generation.name) == [State.SUCCEEDED]
    assert pair.executors[0].runs == []


async def test_all_hope_is_lost_with_the_last(pair: Bench) -> None:
    """When both have given up, those that wait are told so, and the engine says that it cannot go on."""
    for executor in pair.executors:
        executor.kill()
    waiting = [await pair.submit(watched=False) for _ in range(2)]
    pair.executors[1].give_up("no hope for one")
    await turn()
    assert pair.states(*(generation.name for generation in waiting)) == [State.QUEUED] * 2
    pair.executors[0].give_up("no hope for the other")
    for generation in waiting:
        await pair.ended(generation.name)
    assert [pair.engine.get(generation.name).failure for generation in waiting] == [
        Failure(reason=Reason.RANK_DIED, message="the ranks cannot be started: no hope for the other")
    ] * 2
    assert await pair.engine.fatal == "no hope for the other"
    assert readiness(pair) == (False, "no hope for the other")
    with pytest.raises(ServiceError) as caught:
        await pair.submit()
    assert caught.value.failure.reason is Reason.SHUTTING_DOWN


async def test_a_model_that_cannot_be_loaded_ends_all_at_once(another: OpenAnother) -> None:
    """What is wrong with it is wrong for every replica; nobody waits for the others to find out."""
    bench = await another(num_replicas=2, is_ready=False)
    generation = await bench.submit(watched=False)
    bench.executors[1].fail_to_load("transformer/ lacks 3 tensors")
    await bench.ended(generation.name)
    assert await bench.engine.fatal == "transformer/ lacks 3 tensors"


class UnloadableGroup:
    """Ranks that tell at their start that the model is of no use."""

    pids = ()

    def __init__(self, plan: GroupPlan, deliver: Callable[[GroupEvent], None]) -> None:
        self._deliver = deliver

    def start(self) -> None:
        self._deliver(LoadFailed(rank=1, message="transformer/ lacks 3 tensors"))

    def kill(self) -> None:
        pass


async def test_an_executor_tells_what_no_other_ranks_could_load(tmp_path: Path) -> None:
    """Ranks that cannot load the model make it give up at once, and say that the model is the reason."""
    plan = FakeExecutor(tmp_path).plan
    executor = Executor(plan, CARD, policy=RestartPolicy(), observe=lambda _: None, make_group=UnloadableGroup)  # type: ignore[arg-type]
    assert not executor.is_unusable
    executor.start()
    async with asyncio.timeout(10):
        assert await executor.fatal == "transformer/ lacks 3 tensors"
    assert executor.is_unusable
    await executor.stop()


async def test_starts_that_fail_do_not_end_those_that_still_load(another: OpenAnother) -> None:
    """One replica gives up before any was ready: the other may yet be."""
    bench = await another(num_replicas=2, is_ready=False)
    generation = await bench.submit(watched=False)
    bench.executors[0].give_up("3 starts of the ranks failed within 600 s")
    await turn()
    assert not bench.engine.fatal.done()
    bench.executors[1].set_ready(True)
    (await bench.executors[1].run_number(1)).finish()
    await bench.ended(generation.name)
    assert bench.states(generation.name) == [State.SUCCEEDED]


async def test_a_model_that_was_loaded_before_is_no_reason_to_end(pair: Bench) -> None:
    """One replica that cannot load again what has worked, as without its device, leaves the others alone."""
    pair.executors[0].kill()
    pair.executors[1].kill()
    pair.executors[0].fail_to_load("--num-gpus 4 needs 4 GPUs (2 replicas of cfg 2), torch sees 3 here")
    await turn()
    assert not pair.engine.fatal.done()
    pair.executors[1].set_ready(True)
    assert pair.engine.status().ready


# ---- the end --------------------------------------------------------------------------------------------------------


async def test_drain_waits_for_all(pair: Bench) -> None:
    """It returns when the generations of both replicas, and what waited, have ended."""
    generations, runs = await begin(pair, 3)
    draining = asyncio.create_task(pair.engine.drain(60.0))
    await turn()
    assert readiness(pair) == (False, "the server is shutting down")
    runs[generations[0].name].finish()
    await eventually(lambda: sum(len(executor.runs) for executor in pair.executors) == 3, "the last begins")
    runs[generations[1].name].finish()
    await pair.ended(generations[1].name)
    assert not draining.done()
    last = next(run for executor in pair.executors for run in executor.runs if run.generation == generations[2].name)
    last.finish()
    async with asyncio.timeout(10):
        await draining
    assert pair.states(*(generation.name for generation in generations)) == [State.SUCCEEDED] * 3


async def test_drain_cancels_on_all(pair: Bench) -> None:
    """When its time is over, the generations of both replicas are left at their next steps."""
    generations, runs = await begin(pair, 3)
    draining = asyncio.create_task(pair.engine.drain(30.0))
    await turn()
    await pair.clock.advance(31.0)
    await eventually(lambda: all(run.is_cancelled for run in runs.values()), "both are told")
    for run in runs.values():
        run.advance()
    async with asyncio.timeout(10):
        await draining
    assert pair.states(*(generation.name for generation in generations)) == [State.CANCELLED] * 3


async def test_stop_ends_all(tmp_path: Path) -> None:
    """The ranks of every replica are ended, and what was unfinished is CANCELLED."""
    async with open_bench(tmp_path, num_replicas=3) as bench:
        generations, _ = await begin(bench, 4)
        await bench.engine.stop()
        assert [executor.is_started for executor in bench.executors] == [False] * 3
        assert bench.states(*(generation.name for generation in generations)) == [State.CANCELLED] * 4


async def test_a_bug_ends_the_work_of_all(pair: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """What runs on any replica and what waits end as FAILED, and the engine says that it cannot go on."""
    generations, runs = await begin(pair, 3)

    def crash(*_: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(pair.engine, "_take_step", crash)
    runs[generations[0].name].advance()
    with structlog.testing.capture_logs() as logs:
        for generation in generations:
            await pair.ended(generation.name)
        runs[generations[1].name].advance()
        assert "a bug" in await pair.engine.fatal
        await turn()
    assert pair.states(*(generation.name for generation in generations)) == [State.FAILED] * 3
    assert [entry["event"] for entry in logs].count("a vital task of the engine failed") == 1


# ---- names ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("num_replicas", "wanted"), [(1, [{}]), (2, [{"replica": 0}, {"replica": 1}])])
async def test_logs_tell_which_one(num_replicas: int, wanted: list[dict[str, int]], tmp_path: Path) -> None:
    """What is logged of a replica, and by tasks that it starts, has its number, but for an only one."""
    async with open_bench(tmp_path, num_replicas=num_replicas) as bench:
        seen = []
        for replica in bench.engine._replicas:
            with bench.engine._replicas.named_in_logs(replica):
                seen.append(structlog.contextvars.get_contextvars())
        assert seen == wanted
        assert structlog.contextvars.get_contextvars() == {}


async def test_nobody_computes_without_replicas() -> None:
    """An engine without ranks is our own bug."""
    with pytest.raises(AssertionError):
        Replicas([])
