import asyncio
import gc
import itertools
import tracemalloc
from collections.abc import Awaitable, Callable
from dataclasses import replace

import pytest

from tests.bench import Bench, eventually
from tests.fake_ranks import CARD, ask, raw_video, steps_of
from wan_grpc.domain.errors import Failure, Reason, ServiceError
from wan_grpc.domain.events import (
    Accepted,
    Chunk,
    Completed,
    Failed,
    Heartbeat,
    Progress,
    Queued,
    Record,
    Stage,
    State,
    VideoInfo,
)
from wan_grpc.domain.observations import LoadChanged
from wan_grpc.domain.request import resolve

OpenAnother = Callable[..., Awaitable[Bench]]


def numbers(records: list[Record]) -> list[int]:
    """Sequence numbers of the logged events."""
    return [record.sequence for record in records if not isinstance(record.event, Chunk | Heartbeat)]


async def finished(bench: Bench, **request: object) -> tuple[str, list[Record]]:
    """A generation that SUCCEEDED, and the records of its log."""
    generation = await bench.succeed(**request)
    return generation.name, list(bench.engine._generations[generation.name].records)


async def test_an_unknown_name_is_told(bench: Bench) -> None:
    """Watching what is not there is refused with the name."""
    with pytest.raises(ServiceError) as caught:
        await bench.watch("generations/none").to_end()
    sentence = "no generation is named 'generations/none'; it may have expired"
    assert caught.value.failure == Failure(reason=Reason.GENERATION_NOT_FOUND, message=sentence)


async def test_watch_from_any_number_on_an_ended_generation(bench: Bench) -> None:
    """Whatever was seen before, what follows comes in order, every byte comes, and the end comes last."""
    name, log = await finished(bench)
    video = raw_video(bench.engine.get(name).video)
    for after in range(len(log)):
        watcher = await bench.watch(name, after=after).to_end()
        seen = numbers(watcher.records)
        assert seen == sorted(set(seen))
        assert (seen[-1], min(seen) > after) == (len(log), True)
        assert watcher.video == video
        skipped = [record.event for record in log[after:] if record.sequence not in seen]
        assert all(isinstance(event, Progress | Queued) for event in skipped)


@pytest.mark.parametrize("beyond", [0, 1, 1000])
async def test_whoever_has_seen_all_is_told_the_end_again(bench: Bench, beyond: int) -> None:
    """A watcher that comes back after the last number, or one from nowhere, hears the end and nothing else."""
    name, log = await finished(bench)
    size = len(raw_video(bench.engine.get(name).video))
    watcher = await bench.watch(name, after=len(log) + beyond, from_offset=size).to_end()
    assert watcher.records == [log[-1]]
    failed = await bench.submit()
    await bench.engine.cancel(failed.name)
    log = list(bench.engine._generations[failed.name].records)
    assert (await bench.watch(failed.name, after=len(log) + beyond).to_end()).records == [log[-1]]


async def test_a_number_from_the_future_is_no_reason_to_miss_the_end(bench: Bench) -> None:
    """A watcher of a running generation that claims to have seen more than there is sees what comes next."""
    generation = await bench.submit()
    watcher = bench.watch(generation.name, after=1000)
    run = await bench.executor.run_number(1)
    run.finish()
    await watcher.to_end()
    assert isinstance(watcher.records[-1].event, Completed)
    assert watcher.video == raw_video(generation.video)


async def test_watch_from_any_offset(bench: Bench) -> None:
    """Chunks begin at the byte asked for, whether the video is there or still growing; at the end there are none."""
    name, log = await finished(bench)
    video = raw_video(bench.engine.get(name).video)
    growing = await bench.submit(watched=False)
    watchers = [bench.watch(growing.name, from_offset=offset) for offset in (0, 1, 1537, len(video))]
    (await bench.executor.run_number(2)).finish()
    watchers += [bench.watch(name, after=len(log) - 1, from_offset=offset) for offset in (0, 1, 1537, len(video))]
    for watcher in watchers:
        await watcher.to_end()
        assert watcher.video == video[watcher.from_offset :]


@pytest.mark.parametrize("moment", ["ended", "growing"])
async def test_an_offset_past_the_end_is_refused(bench: Bench, moment: str) -> None:
    """It is told as soon as the end is known: at once, or when the video turns out to be shorter."""
    generation = await bench.submit(watched=False)
    run = await bench.executor.run_number(1)
    size = 5 * generation.video.frame_bytes
    if moment == "ended":
        run.finish()
        await bench.ended(generation.name)
    watcher = bench.watch(generation.name, from_offset=size + 1)
    run.finish()
    with pytest.raises(ServiceError) as caught:
        await watcher.to_end()
    sentence = f"offset {size + 1} is past the end of the video, which has {size} bytes"
    assert caught.value.failure == Failure(reason=Reason.OFFSET_OUT_OF_RANGE, message=sentence)
    assert watcher.find(Completed) == []
    await bench.ended(generation.name)
    assert bench.states(generation.name) == [State.SUCCEEDED]


async def test_chunks_carry_the_number_before_them(bench: Bench) -> None:
    """A chunk repeats the number of the last logged event that its watcher saw, so that it can come back from there."""
    name, _ = await finished(bench)
    watcher = await bench.watch(name).to_end()
    last = 0
    for record in watcher.records:
        if isinstance(record.event, Chunk):
            assert record.sequence == last
        last = record.sequence


async def test_large_videos_come_in_chunks_of_a_mebibyte(bench: Bench) -> None:
    """No chunk is larger than 1 MiB and none but the last smaller, when the video is there already."""
    name, _ = await finished(bench, width=512, height=512, num_frames=5)
    watcher = await bench.watch(name).to_end()
    sizes = [len(chunk.data) for chunk in watcher.find(Chunk)]
    assert sizes == [1024 * 1024] * 3 + [5 * 512 * 512 * 3 - 3 * 1024 * 1024]


async def test_heartbeats_fill_silence_alone(bench: Bench) -> None:
    """After 15 s without an event one heartbeat comes, again after each 15 s, with the number of the last event."""
    generation = await bench.submit()
    watcher = bench.watch(generation.name)
    run = await bench.executor.run_number(1)
    run.advance()
    await watcher.saw(Stage.TEXT, 0)
    await bench.clock.advance(14.9)
    assert watcher.find(Heartbeat) == []
    for count in (1, 2):
        await bench.clock.advance(15.1)
        await eventually(lambda count=count: len(watcher.find(Heartbeat)) == count)
    last = watcher.records[-3].sequence
    assert [record.sequence for record in watcher.records[-2:]] == [last, last]
    await bench.clock.advance(14.0)
    run.advance()
    await watcher.saw(Stage.TEXT, 1)
    await bench.clock.advance(14.0)
    assert len(watcher.find(Heartbeat)) == 2
    run.finish()
    await watcher.to_end()


async def test_heartbeats_come_in_the_line_and_while_ranks_start(another: OpenAnother) -> None:
    """A generation that waits for a server that is starting is alive too."""
    bench = await another(is_ready=False, heartbeat_s=5.0)
    watcher = bench.watch((await bench.submit()).name)
    await eventually(lambda: bool(watcher.find(Queued)))
    for count in range(1, 4):
        await bench.clock.advance(5.1)
        await eventually(lambda count=count: len(watcher.find(Heartbeat)) == count)


# ---- slow readers ---------------------------------------------------------------------------------------------------


async def test_a_slow_reader_skips_what_is_old_and_nothing_else(bench: Bench) -> None:
    """Of a stage that has passed only its last step is told; all bytes come, after what they are."""
    await bench.submit(watched=False)
    generation = await bench.submit(num_inference_steps=200, num_frames=33)
    watcher = bench.watch(generation.name)
    watcher.pause()
    await eventually(lambda: len(watcher.records) == 1)
    (await bench.executor.run_number(1)).finish()
    (await bench.executor.run_number(2)).finish()
    await bench.ended(generation.name)
    watcher.go_on()
    await watcher.to_end()
    kinds = [type(record.event) for record in watcher.records if not isinstance(record.event, Chunk)]
    assert kinds == [Accepted, Queued, Progress, Progress, VideoInfo, Progress, Progress, Completed]
    steps = [(event.stage, event.step) for event in watcher.find(Progress)]
    assert steps[:3] == [(Stage.TEXT, 2), (Stage.DENOISE, 200), (Stage.DECODE, 9)]
    assert watcher.video == raw_video(generation.video)


async def test_no_byte_comes_before_what_it_is(bench: Bench) -> None:
    """A reader that sleeps from before the first byte until the video is there hears of its format first."""
    generation = await bench.submit()
    watcher = bench.watch(generation.name)
    run = await bench.executor.run_number(1)
    run.reach(Stage.DENOISE, 2)
    await watcher.saw(Stage.DENOISE, 2)
    watcher.pause()
    run.reach(Stage.DENOISE, 3)  # taken, and held
    await watcher.saw(Stage.DENOISE, 3)
    run.reach(Stage.DECODE, 2)
    job = bench.engine._generations[generation.name]
    await eventually(lambda: job.video_bytes == 5 * generation.video.frame_bytes)
    watcher.go_on()
    run.finish()
    await watcher.to_end()
    kinds = [type(record.event) for record in watcher.records]
    assert kinds.index(VideoInfo) < kinds.index(Chunk)
    assert watcher.video == raw_video(generation.video)


async def test_every_way_of_being_slow(bench: Bench) -> None:
    """At whatever steps a reader falls asleep and wakes up, it gets all states and bytes, in one true order."""
    total = len(list(steps_of(resolve(ask(), bench.engine.card, fallback_seed=0))))
    for sleep, wake in itertools.combinations(range(0, total + 1, 2), 2):
        generation = await bench.submit(prompt=f"{sleep} to {wake}")
        watcher = bench.watch(generation.name)
        run = await bench.executor.run_number(len(bench.executor.runs) + 1)
        run.advance(sleep)
        await bench.heard()
        watcher.pause()
        run.advance(wake - sleep)
        await bench.heard()
        watcher.go_on()
        run.advance(total + 1 - wake)
        await watcher.to_end()
        kinds = [type(record.event) for record in watcher.records]
        assert kinds.index(Accepted) == 0
        assert kinds.index(VideoInfo) < kinds.index(Chunk)
        assert kinds.index(Completed) == len(kinds) - 1
        assert watcher.video == raw_video(generation.video)


async def test_sleeping_readers_cost_no_memory(another: OpenAnother) -> None:
    """A hundred readers that take nothing more add nothing to what the engine holds, however much happens."""
    bench = await another(card=replace(CARD, limits=replace(CARD.limits, max_inference_steps=2000)))
    alone = await bench.submit(watched=False, num_inference_steps=2000)
    run = await bench.executor.run_number(1)
    run.advance(4)
    unread = await growth(bench, lambda: run.advance(1900))
    run.finish()
    await bench.ended(alone.name)
    asleep = await bench.submit(num_inference_steps=2000)
    run = await bench.executor.run_number(2)
    watchers = [bench.watch(asleep.name) for _ in range(100)]
    await eventually(lambda: all(watcher.records for watcher in watchers))
    for watcher in watchers:
        watcher.pause()
    run.advance(4)
    await eventually(lambda: all(len(watcher.records) > 1 for watcher in watchers))
    ignored = await growth(bench, lambda: run.advance(1900))
    assert ignored - unread < 1900 * len(watchers) * 4, "less than half a pointer for each event and reader"
    run.finish()
    await bench.ended(asleep.name)
    for watcher in watchers:
        watcher.go_on()
        await watcher.to_end()
        assert watcher.records[-1].event == bench.engine.get(asleep.name).completed


async def growth(bench: Bench, work: Callable[[], None]) -> int:
    """Bytes that are held after `work` and were not before."""
    tracemalloc.start()
    gc.collect()
    before = tracemalloc.get_traced_memory()[0]
    work()
    await bench.heard()
    gc.collect()
    after = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    return after - before


async def test_the_log_is_as_long_as_the_work(bench: Bench) -> None:
    """A generation logs its acceptance, its places, its steps, its format and its end: no more than that."""
    generation = await bench.succeed(num_inference_steps=200, num_frames=161)
    steps = len(list(steps_of(generation.video)))
    assert len(bench.engine._generations[generation.name].records) == steps + len(
        ["accepted", "queued", "video info", "encode", "completed"]
    )


async def test_ten_readers_get_the_same(bench: Bench) -> None:
    """Watchers that come at different times, at their own pace and from their own places, get the same bytes."""
    generation = await bench.submit(num_frames=33)
    run = await bench.executor.run_number(1)
    watchers = []
    for number in range(10):
        watchers.append(bench.watch(generation.name, from_offset=number * 100))
        if number % 3 == 0:
            watchers[-1].pause()
        run.advance(2)
        await bench.heard()
    run.finish()
    await bench.ended(generation.name)
    video = raw_video(generation.video)
    for number, watcher in enumerate(watchers):
        watcher.go_on()
        await watcher.to_end()
        assert watcher.video == video[number * 100 :]


async def test_watchers_are_counted(bench: Bench) -> None:
    """The load tells how many watch, and none when all have gone, by leaving or at the end."""
    generation = await bench.submit()
    watchers = [bench.watch(generation.name) for _ in range(3)]
    await eventually(lambda: all(watcher.records for watcher in watchers))
    assert bench.seen(LoadChanged)[-1].num_watchers == 3
    await watchers[0].leave()
    assert bench.seen(LoadChanged)[-1].num_watchers == 2
    (await bench.executor.run_number(1)).finish()
    for watcher in watchers[1:]:
        await watcher.to_end()
    assert bench.seen(LoadChanged)[-1] == LoadChanged(num_queued=0, num_running=0, num_watchers=0)


async def test_a_watch_that_is_made_and_not_read_is_no_watcher(bench: Bench) -> None:
    """Who never asks for a first record keeps nothing alive."""
    generation = await bench.submit()
    watch = bench.engine.watch(generation.name)
    await bench.clock.advance(15.1)
    await bench.ended(generation.name)
    assert [record.event async for record in watch][-1] == Failed(
        failure=Failure(reason=Reason.ABANDONED, message="nobody watched the generation for 15 s")
    )


async def test_a_watcher_of_a_failing_generation_may_be_amid_its_bytes(bench: Bench) -> None:
    """The bytes that it is reading stay until it has moved on to the end; then they are gone."""
    generation = await bench.submit(width=512, height=512, num_frames=9)
    watcher = bench.watch(generation.name)
    run = await bench.executor.run_number(1)
    run.reach(Stage.DENOISE)
    await watcher.saw(Stage.DENOISE, 0)
    watcher.pause()
    run.reach(Stage.DECODE, 3)
    job = bench.engine._generations[generation.name]
    await eventually(lambda: job.video_bytes == 9 * generation.video.frame_bytes)
    asyncio.get_running_loop().call_soon(run.fail, Failure(reason=Reason.INTERNAL, message="no"))
    await bench.ended(generation.name)
    assert len(bench.videos_on_disk()) == 1
    watcher.go_on()
    await watcher.to_end()
    assert watcher.failure == Failure(reason=Reason.INTERNAL, message="no")
    await eventually(lambda: bench.videos_on_disk() == [])
