import asyncio
import hashlib
import threading
from collections.abc import Awaitable, Callable

import pytest

from tests.bench import Bench, eventually
from tests.fake_ranks import raw_video
from wan_grpc.domain.errors import Failure, Reason, ServiceError
from wan_grpc.domain.events import Chunk, Completed, Generation, Stage, State
from wan_grpc.domain.observations import BytesSent

OpenAnother = Callable[..., Awaitable[Bench]]


def names(page: tuple[tuple[Generation, ...], bool]) -> tuple[list[str], bool]:
    return [generation.name for generation in page[0]], page[1]


def everything(bench: Bench) -> list[str]:
    return names(bench.engine.list(page_size=1000, after_name=None, states=frozenset()))[0]


async def download(bench: Bench, name: str, *, offset: int = 0, limit: int | None = None) -> list[Chunk]:
    return [chunk async for chunk in bench.engine.read_video(name, offset=offset, limit=limit)]


async def refusal(work: Awaitable[object]) -> Failure:
    with pytest.raises(ServiceError) as caught:
        await work
    return caught.value.failure


# ---- how long what has ended is kept --------------------------------------------------------------------------------


async def test_what_ended_is_kept_for_its_time(another: OpenAnother) -> None:
    """Until the time that it names it can be asked for, and after that neither it nor its video is there."""
    bench = await another(retain_s=3600.0)
    generation = await bench.succeed()
    assert generation.ended_s is not None
    assert generation.expires_s == generation.ended_s + 3600.0
    assert len(bench.videos_on_disk()) == 1
    await bench.clock.advance(3599.0)
    assert bench.engine.get(generation.name) == generation
    await bench.clock.advance(2.0)
    with pytest.raises(ServiceError):
        bench.engine.get(generation.name)
    assert bench.videos_on_disk() == []


async def test_the_oldest_goes_when_there_are_too_many(another: OpenAnother) -> None:
    """Only so many that ended are kept, with their videos; those that are not final do not count."""
    bench = await another(retain_count=2)
    ended = [(await bench.succeed(seed=seed)).name for seed in range(5)]
    running = await bench.submit(watched=False)
    assert everything(bench) == [running.name, ended[4], ended[3]]
    assert len(bench.videos_on_disk()) == 2


async def test_watched_generations_are_kept_in_number_too(another: OpenAnother) -> None:
    """One that was watched to its end is counted as soon as its watcher has gone, not one later."""
    bench = await another(retain_count=1)
    for seed in range(3):
        generation = await bench.submit(seed=seed)
        watcher = bench.watch(generation.name)
        (await bench.executor.run_number(seed + 1)).finish()
        await watcher.to_end()
        assert everything(bench) == [generation.name]
        assert len(bench.videos_on_disk()) == 1


async def test_nothing_may_be_kept(another: OpenAnother) -> None:
    """With a count of 0 a generation is gone when it has ended and its watcher has all of it."""
    bench = await another(retain_count=0)
    generation = await bench.submit()
    watcher = bench.watch(generation.name)
    (await bench.executor.run_number(1)).finish()
    await watcher.to_end()
    assert watcher.video == raw_video(generation.video)
    assert (everything(bench), bench.videos_on_disk()) == ([], [])
    cancelled = await bench.submit()
    assert (await bench.engine.cancel(cancelled.name)).state is State.CANCELLED
    assert everything(bench) == []


async def test_an_expiry_does_not_take_the_video_from_its_reader(another: OpenAnother) -> None:
    """A watcher that is still reading when the time is over gets all, and then the file goes."""
    bench = await another(retain_s=60.0)
    generation = await bench.submit(width=512, height=512, num_frames=5)
    watcher = bench.watch(generation.name)
    await eventually(lambda: len(watcher.records) > 0)
    watcher.pause()
    (await bench.executor.run_number(1)).finish()
    await bench.ended(generation.name)
    await bench.clock.advance(61.0)
    assert everything(bench) == []
    assert len(bench.videos_on_disk()) == 1
    watcher.go_on()
    await watcher.to_end()
    assert hashlib.sha256(watcher.video).hexdigest() == watcher.find(Completed)[0].sha256
    assert bench.videos_on_disk() == []


# ---- delete ---------------------------------------------------------------------------------------------------------


async def test_delete_forgets_a_generation_and_its_video(bench: Bench) -> None:
    """After a delete nothing is there to get, list, watch, read, cancel or delete."""
    generation = await bench.succeed()
    await bench.engine.delete(generation.name)
    assert (everything(bench), bench.videos_on_disk()) == ([], [])
    sentence = f"no generation is named {generation.name!r}; it may have expired"
    gone = Failure(reason=Reason.GENERATION_NOT_FOUND, message=sentence)
    assert await refusal(bench.engine.delete(generation.name)) == gone
    assert await refusal(bench.engine.cancel(generation.name)) == gone
    assert await refusal(bench.watch(generation.name).to_end()) == gone
    assert await refusal(download(bench, generation.name)) == gone


async def test_delete_refuses_what_has_not_ended(bench: Bench) -> None:
    """A generation that waits or runs must be cancelled first, and is not touched."""
    running, waiting = await bench.submit(watched=False), await bench.submit(watched=False)
    await bench.executor.run_number(1)
    for generation, state in ((running, "running"), (waiting, "queued")):
        failure = await refusal(bench.engine.delete(generation.name))
        sentence = f"{generation.name} is {state}: cancel it first"
        assert failure == Failure(reason=Reason.GENERATION_NOT_FINISHED, message=sentence)
    assert bench.states(running.name, waiting.name) == [State.RUNNING, State.QUEUED]


async def test_delete_while_somebody_reads(bench: Bench) -> None:
    """A watcher and a download that are under way get every byte; then the file goes."""
    generation = await bench.succeed(width=512, height=512, num_frames=5)
    video = raw_video(generation.video)
    watcher = bench.watch(generation.name, pause_at=Chunk)
    await eventually(lambda: len(watcher.find(Chunk)) == 1)
    download = bench.engine.read_video(generation.name, offset=0, limit=None)
    first = await anext(download)
    await bench.engine.delete(generation.name)
    assert everything(bench) == []
    assert len(bench.videos_on_disk()) == 1
    assert first.data + b"".join([chunk.data async for chunk in download]) == video
    watcher.go_on()
    await watcher.to_end()
    assert watcher.video == video
    assert bench.videos_on_disk() == []


async def test_delete_while_a_download_is_left(bench: Bench) -> None:
    """A download that is closed half way gives the file back as well."""
    generation = await bench.succeed(width=512, height=512, num_frames=5)
    download = bench.engine.read_video(generation.name, offset=0, limit=None)
    await anext(download)
    await bench.engine.delete(generation.name)
    await download.aclose()
    assert bench.videos_on_disk() == []


# ---- downloads ------------------------------------------------------------------------------------------------------


async def test_downloads_of_any_part(bench: Bench) -> None:
    """Offset and limit cut the video exactly, also at its end and beyond the limit; what was sent is counted."""
    generation = await bench.succeed()
    video = raw_video(generation.video)
    before = len(bench.seen(BytesSent))
    for offset, limit in (
        (0, None),
        (0, 0),
        (5, 7),
        (7000, 10_000),
        (len(video), None),
        (len(video), 5),
        (3, len(video)),
    ):
        chunks = await download(bench, generation.name, offset=offset, limit=limit)
        expected = video[offset:] if limit is None else video[offset : offset + limit]
        assert b"".join(chunk.data for chunk in chunks) == expected
        assert [chunk.offset for chunk in chunks] == [offset][: len(chunks)]
        assert all(chunk.data for chunk in chunks)
    assert sum(sent.count for sent in bench.seen(BytesSent)[before:]) == len(video) + 7 + 680 + len(video) - 3


async def test_large_downloads_come_in_chunks_of_a_mebibyte(bench: Bench) -> None:
    """No chunk is larger than 1 MiB, each begins where the one before ended."""
    generation = await bench.succeed(width=512, height=512, num_frames=5)
    chunks = await download(bench, generation.name, offset=100)
    assert [len(chunk.data) for chunk in chunks] == [1 << 20, 1 << 20, 1 << 20, 5 * 512 * 512 * 3 - (3 << 20) - 100]
    assert [chunk.offset for chunk in chunks] == [100, 100 + (1 << 20), 100 + (2 << 20), 100 + (3 << 20)]


@pytest.mark.parametrize("offset", [7681, 10**12])
async def test_a_download_past_the_end_is_refused(bench: Bench, offset: int) -> None:
    """The refusal tells the offset and the size."""
    generation = await bench.succeed()
    failure = await refusal(download(bench, generation.name, offset=offset))
    sentence = f"offset {offset} is past the end of the video, which has 7680 bytes"
    assert failure == Failure(reason=Reason.OFFSET_OUT_OF_RANGE, message=sentence)


async def test_only_a_finished_video_can_be_downloaded(bench: Bench) -> None:
    """One that waits, runs, was cancelled or failed has none, and the refusal tells which."""
    failed = await bench.submit(watched=False)
    (await bench.executor.run_number(1)).fail(Failure(reason=Reason.INTERNAL, message="no"))
    await bench.ended(failed.name)
    running, waiting, cancelled = [await bench.submit(watched=False) for _ in range(3)]
    await bench.executor.run_number(2)
    await bench.engine.cancel(cancelled.name)
    for generation, state in ((failed, "failed"), (running, "running"), (waiting, "queued"), (cancelled, "cancelled")):
        failure = await refusal(download(bench, generation.name))
        sentence = f"{generation.name} is {state}: it has no finished video"
        assert failure == Failure(reason=Reason.GENERATION_NOT_FINISHED, message=sentence)


# ---- lists ----------------------------------------------------------------------------------------------------------


async def test_pages_newest_first(bench: Bench) -> None:
    """Pages follow each other without a gap or a double, also when newer ones come in between."""
    made = [(await bench.submit(watched=False)).name for _ in range(5)]
    newest_first = list(reversed(made))
    assert names(bench.engine.list(page_size=2, after_name=None, states=frozenset())) == (newest_first[:2], True)
    await bench.submit(watched=False)
    second = bench.engine.list(page_size=2, after_name=newest_first[1], states=frozenset())
    assert names(second) == (newest_first[2:4], True)
    last = bench.engine.list(page_size=2, after_name=newest_first[3], states=frozenset())
    assert names(last) == (newest_first[4:], False)
    assert names(bench.engine.list(page_size=2, after_name=made[0], states=frozenset())) == ([], False)
    assert names(bench.engine.list(page_size=1, after_name=made[1], states=frozenset())) == ([made[0]], False)


async def test_lists_of_some_states(bench: Bench) -> None:
    """Only the states that are asked for are listed, and pages count those alone."""
    succeeded = [(await bench.succeed()).name for _ in range(2)]
    running, waiting = [(await bench.submit(watched=False)).name for _ in range(2)]
    await bench.executor.run_number(3)
    page = bench.engine.list(page_size=10, after_name=None, states=frozenset({State.SUCCEEDED}))
    assert names(page) == ([succeeded[1], succeeded[0]], False)
    page = bench.engine.list(page_size=1, after_name=None, states=frozenset({State.RUNNING, State.QUEUED}))
    assert names(page) == ([waiting], True)
    page = bench.engine.list(page_size=1, after_name=waiting, states=frozenset({State.RUNNING, State.QUEUED}))
    assert names(page) == ([running], False)


async def test_a_list_after_a_name_that_is_gone(bench: Bench) -> None:
    """A page cannot begin after a generation that is not there any more, and says so."""
    with pytest.raises(ServiceError) as caught:
        bench.engine.list(page_size=1, after_name="generations/gone", states=frozenset())
    assert caught.value.failure.reason is Reason.GENERATION_NOT_FOUND


# ---- drain and stop -------------------------------------------------------------------------------------------------


async def test_drain_lets_accepted_work_end_and_be_read(bench: Bench) -> None:
    """From the first moment nothing is admitted and readiness is red; it returns when all has ended and been read."""
    running, waiting = await bench.submit(), await bench.submit(watched=False)
    watcher = bench.watch(running.name)
    run = await bench.executor.run_number(1)
    draining = asyncio.create_task(bench.engine.drain(60.0))
    await asyncio.sleep(0)
    refused = await refusal(bench.submit())
    assert refused == Failure(reason=Reason.SHUTTING_DOWN, message="the server is shutting down", retry_after_s=5.0)
    status = bench.engine.status()
    assert (status.ready, status.detail) == (False, "the server is shutting down")
    run.reach(Stage.DENOISE, 1)
    await watcher.saw(Stage.DENOISE, 1)
    watcher.pause()
    run.finish()
    (await bench.executor.run_number(2)).finish()
    await bench.ended(waiting.name)
    assert not draining.done()
    watcher.go_on()
    await draining
    assert watcher.video == raw_video(running.video)
    assert bench.states(running.name, waiting.name) == [State.SUCCEEDED, State.SUCCEEDED]


async def test_drain_cancels_what_is_not_done_in_time(another: OpenAnother) -> None:
    """After its time what waits ends at once and what runs at its next step: CANCELLED, with a time to try again."""
    bench = await another(leaves_at_once=False)
    running, waiting = await bench.submit(watched=False), await bench.submit(watched=False)
    run = await bench.executor.run_number(1)
    draining = asyncio.create_task(bench.engine.drain(30.0))
    await asyncio.sleep(0)
    await bench.clock.advance(29.0)
    assert bench.states(running.name, waiting.name) == [State.RUNNING, State.QUEUED]
    await bench.clock.advance(1.1)
    await bench.ended(waiting.name)
    assert not draining.done()
    run.advance()
    await draining
    failure = Failure(reason=Reason.SHUTTING_DOWN, message="the server is shutting down", retry_after_s=5.0)
    for generation in (running, waiting):
        ended = bench.engine.get(generation.name)
        assert (ended.state, ended.failure) == (State.CANCELLED, failure)


async def test_drain_of_an_idle_engine_returns_at_once(bench: Bench) -> None:
    """Nothing to do is done."""
    await bench.succeed()
    await asyncio.wait_for(bench.engine.drain(3600.0), 5.0)


async def test_drain_gives_up_on_ranks_that_never_leave(another: OpenAnother) -> None:
    """A run that hears no cancel holds the end of the server for half a minute, not longer; stop then ends it."""
    bench = await another(leaves_at_once=False)
    generation = await bench.submit(watched=False)
    await bench.executor.run_number(1)
    draining = asyncio.create_task(bench.engine.drain(0.0))
    await eventually(lambda: bench.executor.runs[0].is_cancelled)
    await bench.clock.advance(29.0)
    assert not draining.done()
    await bench.clock.advance(1.1)
    await draining
    await bench.engine.stop()
    assert bench.states(generation.name) == [State.CANCELLED]


async def test_stop_ends_what_is_unfinished(bench: Bench, gate: threading.Event) -> None:
    """In the encoder, on the ranks or in line: each ends CANCELLED, its watcher hears it, nothing stays behind."""
    tasks_before = asyncio.all_tasks()
    generations = [await bench.submit() for _ in range(4)]
    watchers = [bench.watch(generation.name) for generation in generations]
    (await bench.executor.run_number(1)).finish()
    (await bench.executor.run_number(2)).reach(Stage.DECODE, 1)
    await eventually(lambda: all(watcher.records for watcher in watchers))
    asyncio.get_running_loop().call_later(0.05, gate.set)
    await bench.engine.stop()
    failure = Failure(reason=Reason.SHUTTING_DOWN, message="the server is shutting down", retry_after_s=5.0)
    for watcher in watchers:
        await watcher.to_end()
        assert watcher.failure == failure
    assert bench.states(*(generation.name for generation in generations)) == [State.CANCELLED] * 4
    assert bench.videos_on_disk() == []
    assert not bench.executor.is_started
    await eventually(lambda: asyncio.all_tasks() <= tasks_before)


async def test_readiness_is_told_at_every_change(bench: Bench) -> None:
    """Now, at each change and at a drain; never twice the same, however slow the listener."""
    changes = bench.engine.status_changes()
    assert await anext(changes) is True
    bench.executor.kill()
    assert await anext(changes) is False
    bench.executor.set_ready(True)
    bench.executor.set_ready(False)
    bench.executor.set_ready(True)
    assert await anext(changes) is True
    following = asyncio.ensure_future(anext(changes))
    await asyncio.sleep(0)
    bench.executor.changed.ring()
    await asyncio.sleep(0)
    assert not following.done()
    await bench.engine.drain(0.0)
    assert await following is False


async def test_readiness_is_red_when_there_is_no_hope(bench: Bench) -> None:
    """An engine that has given up is not ready, even while its ranks are."""
    changes = bench.engine.status_changes()
    assert await anext(changes) is True
    bench.executor.give_up("internal error: RuntimeError('no')")
    assert await anext(changes) is False
    assert bench.engine.status().detail == "internal error: RuntimeError('no')"
