import asyncio
import threading
from collections.abc import Awaitable, Callable

import pytest

from tests.bench import Bench, eventually
from wan_grpc.domain.errors import Failure, Reason
from wan_grpc.domain.events import Accepted, Failed, Generation, Stage, State
from wan_grpc.domain.observations import Ended
from wan_grpc.domain.request import UNLIMITED_S

OpenAnother = Callable[..., Awaitable[Bench]]
CANCELLED = Failure(reason=Reason.CANCELLED_BY_CALLER, message="the generation was cancelled")
EXPIRED = Failure(reason=Reason.DEADLINE_EXCEEDED, message="the deadline of the call has passed")


def abandoned(grace: str) -> Failure:
    return Failure(reason=Reason.ABANDONED, message=f"nobody watched the generation for {grace} s")


async def started(bench: Bench, **request: object) -> Generation:
    """A generation that the ranks have begun."""
    generation = await bench.submit(**request)
    await bench.executor.run_number(len(bench.executor.runs) + 1)
    return generation


def is_alive(bench: Bench, generation: Generation) -> bool:
    return not bench.engine.get(generation.name).state.is_final


# ---- cancel ---------------------------------------------------------------------------------------------------------


async def test_cancel_in_the_line_is_at_once(bench: Bench) -> None:
    """One that waits ends CANCELLED when the call returns, never runs, and its watcher hears why."""
    await started(bench, watched=False)
    waiting = await bench.submit()
    watcher = bench.watch(waiting.name)
    await asyncio.sleep(0)
    ended = await bench.engine.cancel(waiting.name)
    assert (ended.state, ended.failure, ended.started_s) == (State.CANCELLED, CANCELLED, None)
    assert (await watcher.to_end()).failure == CANCELLED
    assert len(bench.executor.runs) == 1


@pytest.mark.parametrize("stage", [Stage.TEXT, Stage.DENOISE, Stage.DECODE])
async def test_cancel_of_a_running_one_is_true_when_it_returns(another: OpenAnother, stage: Stage) -> None:
    """The call returns when the ranks have left at their next step, and not before; then they are free."""
    bench = await another(leaves_at_once=False)
    generation = await started(bench)
    watcher = bench.watch(generation.name)
    run = bench.executor.runs[0]
    run.reach(stage, 0)
    await watcher.saw(stage, 0)
    cancelling = asyncio.create_task(bench.engine.cancel(generation.name))
    await eventually(lambda: run.is_cancelled)
    assert not cancelling.done()
    assert is_alive(bench, generation)
    run.advance()
    ended = await cancelling
    assert (ended.state, ended.failure) == (State.CANCELLED, CANCELLED)
    assert (await watcher.to_end()).failure == CANCELLED
    assert bench.executor.running is None
    assert bench.videos_on_disk() == []
    assert (await bench.succeed()).state is State.SUCCEEDED


async def test_cancel_while_encoding(bench: Bench, gate: threading.Event) -> None:
    """When only the encoder is still at work it stops at its next frame, and nothing stays on disk."""
    generation = await started(bench)
    bench.executor.runs[0].finish()
    await eventually(lambda: bench.engine.status().num_running == 0)
    cancelling = asyncio.create_task(bench.engine.cancel(generation.name))
    await asyncio.sleep(0)
    assert not cancelling.done()
    gate.set()
    ended = await cancelling
    assert (ended.state, ended.failure, ended.completed) == (State.CANCELLED, CANCELLED, None)
    await eventually(lambda: bench.videos_on_disk() == [])


async def test_cancel_that_the_ranks_hear_too_late(another: OpenAnother) -> None:
    """Ranks that were done with the last step when the cancel came deliver a video that nobody gets."""
    bench = await another(leaves_at_once=False)
    generation = await started(bench)
    cancelling = asyncio.create_task(bench.engine.cancel(generation.name))
    await eventually(lambda: bench.executor.runs[0].is_cancelled)
    bench.executor.runs[0].finish()
    assert (await cancelling).state is State.CANCELLED
    assert (await bench.succeed()).state is State.SUCCEEDED


async def test_cancel_after_the_end_changes_nothing(bench: Bench) -> None:
    """What has SUCCEEDED, FAILED or was CANCELLED before is returned as it is."""
    succeeded = await bench.succeed()
    failed = await started(bench, watched=False)
    bench.executor.runs[1].fail(Failure(reason=Reason.OUT_OF_MEMORY, message="too large"))
    await bench.ended(failed.name)
    abandoned = await started(bench, detach_grace_s=0.0)
    await bench.clock.advance(5.0)
    await bench.ended(abandoned.name)
    before = [bench.engine.get(generation.name) for generation in (succeeded, failed, abandoned)]
    after = [await bench.engine.cancel(generation.name) for generation in before]
    assert after == before
    assert [generation.state for generation in after] == [State.SUCCEEDED, State.FAILED, State.CANCELLED]
    assert len(bench.seen(Ended)) == 3


async def test_cancel_twice_at_once(another: OpenAnother) -> None:
    """Both calls return the same end, which happens once."""
    bench = await another(leaves_at_once=False)
    generation = await started(bench)
    calls = [asyncio.create_task(bench.engine.cancel(generation.name)) for _ in range(2)]
    await eventually(lambda: bench.executor.runs[0].is_cancelled)
    bench.executor.runs[0].advance()
    first, second = await asyncio.gather(*calls)
    assert first == second == bench.engine.get(generation.name)
    log = bench.engine._generations[generation.name].records
    assert [record.event for record in log if isinstance(record.event, Failed)] == [Failed(failure=CANCELLED)]


async def test_the_first_reason_is_told(another: OpenAnother) -> None:
    """A generation that was cancelled and whose ranks then fail or die has been cancelled."""
    bench = await another(leaves_at_once=False)
    generation = await started(bench)
    cancelling = asyncio.create_task(bench.engine.cancel(generation.name))
    await eventually(lambda: bench.executor.runs[0].is_cancelled)
    bench.executor.kill()
    assert (await cancelling).failure == CANCELLED


# ---- the grace of those who left ------------------------------------------------------------------------------------


async def test_a_dropped_watcher_leaves_the_grace(bench: Bench) -> None:
    """15 s after the last watcher went the generation is cancelled, a moment before it is not."""
    generation = await started(bench)
    watcher = bench.watch(generation.name)
    await eventually(lambda: len(watcher.records) > 0)
    await bench.clock.advance(1000.0)
    assert is_alive(bench, generation)
    await watcher.leave()
    await bench.clock.advance(14.9)
    assert is_alive(bench, generation)
    await bench.clock.advance(0.2)
    await bench.ended(generation.name)
    assert bench.engine.get(generation.name).failure == abandoned("15")


async def test_a_grace_in_the_line(bench: Bench) -> None:
    """The grace counts for one that waits as well, which then leaves the line."""
    await started(bench, watched=False)
    waiting, last = await bench.submit(), await bench.submit(watched=False)
    await bench.clock.advance(15.1)
    assert bench.engine.get(waiting.name).failure == abandoned("15")
    assert bench.engine.get(last.name).queue_position == 0


async def test_whoever_returns_within_the_grace_keeps_the_generation(bench: Bench) -> None:
    """A new watcher stops the clock, and the grace is whole again when it goes too."""
    generation = await started(bench)
    for _ in range(3):
        watcher = bench.watch(generation.name)
        await eventually(lambda watcher=watcher: len(watcher.records) > 0)
        await bench.clock.advance(100.0)
        await watcher.leave()
        await bench.clock.advance(14.0)
    assert is_alive(bench, generation)
    await bench.clock.advance(1.1)
    await bench.ended(generation.name)
    assert bench.engine.get(generation.name).failure == abandoned("15")


async def test_the_grace_runs_when_the_last_of_two_leaves(bench: Bench) -> None:
    """As long as anybody watches, nobody's leaving matters."""
    generation = await started(bench)
    first, second = bench.watch(generation.name), bench.watch(generation.name)
    await eventually(lambda: bool(first.records and second.records))
    await first.leave()
    await bench.clock.advance(100.0)
    assert is_alive(bench, generation)
    await second.leave()
    await bench.clock.advance(15.1)
    await bench.ended(generation.name)
    assert bench.states(generation.name) == [State.CANCELLED]


async def test_a_generation_that_nobody_meant_to_watch_goes_on(bench: Bench) -> None:
    """Created unwatched and without a grace of its own, it goes on for ever, also when a watcher came and went."""
    generation = await started(bench, watched=False)
    watcher = bench.watch(generation.name)
    await eventually(lambda: len(watcher.records) > 0)
    await watcher.leave()
    await bench.clock.advance(1e6)
    assert is_alive(bench, generation)


@pytest.mark.parametrize(
    ("watched", "grace_s", "alive_until_s", "told"),
    [(True, 0.0, 5.0, "5"), (True, 60.0, 60.0, "60"), (False, 60.0, 60.0, "60")],
)
async def test_the_grace_of_the_request(
    bench: Bench, watched: bool, grace_s: float, alive_until_s: float, told: str
) -> None:
    """A request's own grace holds from the start; who said it would watch has 5 s to begin, whatever the grace."""
    generation = await started(bench, watched=watched, detach_grace_s=grace_s)
    await bench.clock.advance(alive_until_s - 0.2)
    assert is_alive(bench, generation)
    await bench.clock.advance(0.4)
    await bench.ended(generation.name)
    assert bench.engine.get(generation.name).failure == abandoned(told)


async def test_no_grace_at_all(bench: Bench) -> None:
    """With a grace of 0 the generation ends when its watcher goes."""
    generation = await started(bench, detach_grace_s=0.0)
    watcher = bench.watch(generation.name)
    await eventually(lambda: len(watcher.records) > 0)
    await watcher.leave()
    await bench.ended(generation.name)
    assert bench.engine.get(generation.name).failure == abandoned("0")


async def test_an_unlimited_grace(bench: Bench) -> None:
    """A watched generation whose request says so outlives all its watchers."""
    generation = await started(bench, detach_grace_s=UNLIMITED_S)
    watcher = bench.watch(generation.name)
    await eventually(lambda: len(watcher.records) > 0)
    await watcher.leave()
    await bench.clock.advance(1e6)
    assert is_alive(bench, generation)


# ---- the deadline of the call ---------------------------------------------------------------------------------------


async def test_a_passed_deadline_cancels_what_nobody_else_watches(bench: Bench) -> None:
    """Running or waiting, it ends with the deadline as its reason, without waiting for a grace."""
    running, waiting = await started(bench), await bench.submit()
    for generation in (waiting, running):
        await bench.engine.expire(generation.name)
        await bench.ended(generation.name)
        assert bench.engine.get(generation.name).failure == EXPIRED
    assert bench.states(running.name, waiting.name) == [State.CANCELLED, State.CANCELLED]


async def test_a_passed_deadline_spares_what_somebody_watches(bench: Bench) -> None:
    """Another watcher keeps the generation; when that one leaves, the grace runs."""
    generation = await started(bench)
    watcher = bench.watch(generation.name)
    await eventually(lambda: len(watcher.records) > 0)
    await bench.engine.expire(generation.name)
    assert is_alive(bench, generation)
    bench.executor.runs[0].finish()
    await watcher.to_end()
    assert bench.states(generation.name) == [State.SUCCEEDED]


async def test_a_passed_deadline_of_what_has_ended_or_is_gone(bench: Bench) -> None:
    """It changes no end, and a name that was deleted meanwhile is no error."""
    generation = await bench.succeed()
    await bench.engine.expire(generation.name)
    assert bench.engine.get(generation.name) == generation
    await bench.engine.delete(generation.name)
    await bench.engine.expire(generation.name)


# ---- max_duration ---------------------------------------------------------------------------------------------------


def too_long(bound: str) -> Failure:
    return Failure(reason=Reason.MAX_DURATION_EXCEEDED, message=f"not complete within max_duration of {bound} s")


async def test_max_duration_passes_in_the_line(bench: Bench) -> None:
    """The bound counts from acceptance; whoever is watching."""
    await started(bench, watched=False)
    waiting = await bench.submit(max_duration_s=20.0)
    watcher = bench.watch(waiting.name)
    await eventually(lambda: bool(watcher.find(Accepted)))
    await bench.clock.advance(19.9)
    assert is_alive(bench, waiting)
    await bench.clock.advance(0.2)
    assert (await watcher.to_end()).failure == too_long("20")
    assert bench.states(waiting.name) == [State.CANCELLED]


async def test_max_duration_passes_on_the_ranks(another: OpenAnother) -> None:
    """The time in the line counts; the ranks leave at their next step."""
    bench = await another(leaves_at_once=False)
    await started(bench, watched=False)
    generation = await bench.submit(watched=False, max_duration_s=20.0)
    await bench.clock.advance(15.0)
    bench.executor.runs[0].finish()
    run = await bench.executor.run_number(2)
    run.reach(Stage.DENOISE, 1)
    await bench.clock.advance(5.1)
    assert run.is_cancelled
    assert is_alive(bench, generation)
    run.advance()
    await bench.ended(generation.name)
    assert bench.engine.get(generation.name).failure == too_long("20")


async def test_max_duration_passes_in_the_encoder(bench: Bench, gate: threading.Event) -> None:
    """The bound is on the last byte, so that it holds for the encoder too."""
    generation = await started(bench, watched=False, max_duration_s=0.5)
    bench.executor.runs[0].finish()
    await eventually(lambda: bench.engine.status().num_running == 0)
    await bench.clock.advance(0.6)
    gate.set()
    await bench.ended(generation.name)
    assert bench.engine.get(generation.name).failure == too_long("0.5")


async def test_max_duration_after_the_end_does_nothing(bench: Bench) -> None:
    """What was complete in time stays so."""
    generation = await bench.succeed(max_duration_s=20.0)
    await bench.clock.advance(30.0)
    assert bench.engine.get(generation.name) == generation
