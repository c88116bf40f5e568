import asyncio
import errno
import hashlib
import io
import os
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from PIL import Image, ImageStat

from tests.bench import Bench, eventually
from tests.fake_ranks import raw_video, steps_of
from wan_grpc.domain.errors import Failure, Reason, ServiceError
from wan_grpc.domain.events import (
    Accepted,
    Completed,
    Preview,
    Progress,
    Queued,
    RankMemory,
    Stage,
    State,
    VideoInfo,
)
from wan_grpc.domain.formats import OutputFormat
from wan_grpc.domain.observations import (
    Admitted,
    BytesSent,
    Ended,
    FramesDecoded,
    LoadChanged,
    StageEnded,
    Started,
    StepEnded,
)
from wan_grpc.domain.traffic import RankTime
from wan_grpc.domain.variants import Expert
from wan_grpc.engine import encoding
from wan_grpc.engine import engine as engine_module
from wan_grpc.engine.messages import StepDone
from wan_grpc.store.artifacts import Artifact, Spool, StorageFailedError
from wan_grpc.store.frames import FrameSpool

OpenAnother = Callable[..., Awaitable[Bench]]


async def test_everything_from_acceptance_to_the_end_in_order(bench: Bench) -> None:
    """A watcher from the start sees every event, numbered without a gap, and the exact bytes with their hash."""
    generation = await bench.submit()
    watcher = bench.watch(generation.name)
    run = await bench.executor.run_number(1)
    for progress in steps_of(generation.video):
        run.advance()
        await watcher.saw(progress.stage, progress.step)
    run.advance()
    await watcher.to_end()
    steps = list(steps_of(generation.video))
    decode = next(index for index, step in enumerate(steps) if step.stage is Stage.DECODE)
    completed = watcher.find(Completed)[0]
    video = raw_video(generation.video)
    assert watcher.logged == [
        Accepted(name=generation.name, video=generation.video, detach_grace_s=15.0),
        Queued(position=0, eta_s=0.0),
        *steps[:decode],
        VideoInfo(
            output_format=OutputFormat.RAW_RGB24,
            media_type="application/octet-stream",
            width=16,
            height=32,
            num_frames=5,
            fps=8,
        ),
        *steps[decode:],
        Progress(stage=Stage.ENCODE, step=watcher.find(Progress)[-1].step, total_steps=5),
        Completed(
            size_bytes=len(video),
            sha256=hashlib.sha256(video).hexdigest(),
            stage_times=completed.stage_times,
            rank_memory=(RankMemory(rank=0, peak_bytes=1000), RankMemory(rank=1, peak_bytes=2000)),
        ),
    ]
    assert watcher.video == video
    sequences = [record.sequence for record in watcher.records if record.event.__class__.__name__ != "Chunk"]
    assert sequences == list(range(1, len(sequences) + 1))
    assert [time.stage for time in completed.stage_times] == [
        Stage.TEXT,
        Stage.DENOISE,
        Stage.DECODE,
        Stage.ENCODE,
    ]
    assert all(time.seconds >= 0.0 for time in completed.stage_times)
    ended = bench.engine.get(generation.name)
    assert (ended.state, ended.completed, ended.failure) == (State.SUCCEEDED, completed, None)


async def test_one_after_the_other_without_a_pause(bench: Bench) -> None:
    """Those that wait run in the order of acceptance, one at a time, each as soon as the ranks are free."""
    names = [(await bench.submit(watched=False, prompt=str(number))).name for number in range(5)]
    for number, name in enumerate(names, start=1):
        run = await bench.executor.run_number(number)
        assert run.generation == name
        run.finish()
    for name in names:
        await bench.ended(name)
    assert bench.states(*names) == [State.SUCCEEDED] * 5


async def test_what_is_measured_of_a_generation(bench: Bench) -> None:
    """The observations of one video tell its admission, wait, steps, stages, frames, bytes and end, each once."""
    generation = await bench.submit(request_id="7d9c1f70-4c1e-4b5c-9d5f-0a1b2c3d4e5f")
    watcher = bench.watch(generation.name)
    (await bench.executor.run_number(1)).finish()
    await watcher.to_end()
    name = generation.name
    assert bench.seen(Admitted) == [Admitted(name=name, request_id="7d9c1f70-4c1e-4b5c-9d5f-0a1b2c3d4e5f")]
    assert [started.name for started in bench.seen(Started)] == [name]
    assert bench.seen(StepEnded) == [StepEnded(name=name, expert=Expert.HIGH_NOISE, seconds=0.25)] * 3
    assert bench.seen(FramesDecoded) == [FramesDecoded(count=1), FramesDecoded(count=4)]
    assert [(stage.name, stage.stage) for stage in bench.seen(StageEnded)] == [
        (name, stage) for stage in Stage if stage is not Stage.IMAGE
    ]
    assert sum(sent.count for sent in bench.seen(BytesSent)) == 5 * generation.video.frame_bytes
    ended = bench.seen(Ended)[0]
    assert bench.seen(Ended) == [
        Ended(name=name, state=State.SUCCEEDED, reason=None, duration_s=ended.duration_s, message="")
    ]
    loads = bench.seen(LoadChanged)
    assert LoadChanged(num_queued=0, num_running=1, num_watchers=1) in loads
    assert loads[-1] == LoadChanged(num_queued=0, num_running=0, num_watchers=0)


async def test_the_ranks_of_a_step_are_compared(bench: Bench) -> None:
    """How much longer the busiest rank worked is measured; which one it was stands in the progress."""
    generation = await bench.submit()
    watcher = bench.watch(generation.name)
    run = await bench.executor.run_number(1)
    progress = Progress(
        stage=Stage.DENOISE,
        step=1,
        total_steps=3,
        expert=Expert.LOW_NOISE,
        step_time_s=2.0,
        slowest_rank=1,
        slowest_rank_time_s=1.75,
    )
    times = (RankTime(seconds=2.0, waited_s=1.5), RankTime(seconds=2.0, waited_s=0.25))
    run.reach(Stage.DENOISE)
    run.messages.put_nowait(StepDone(progress=progress, times=times))
    await watcher.saw(Stage.DENOISE, 1)
    assert watcher.logged[-1] == progress
    assert bench.seen(StepEnded) == [StepEnded(name=generation.name, expert=Expert.LOW_NOISE, seconds=2.0, skew_s=1.25)]
    run.finish()
    await watcher.to_end()


async def test_previews_stand_after_their_steps(bench: Bench) -> None:
    """Each is a WebP picture of its pixels. A later watcher is told the last one alone, and the log keeps no other."""
    generation = await bench.submit(preview_every_steps=1)
    watcher = bench.watch(generation.name)
    run = await bench.executor.run_number(1)
    run.reach(Stage.DENOISE, 1)
    run.show(1, bytes([200, 30, 30]) * 8)
    await watcher.saw(Stage.DENOISE, 1)
    await eventually(lambda: len(watcher.find(Preview)) == 1, "a preview")
    run.reach(Stage.DENOISE, 2)
    run.show(2, bytes([30, 30, 200]) * 8)
    await eventually(lambda: len(watcher.find(Preview)) == 2, "another preview")
    run.finish()
    await watcher.to_end()
    told = [
        event.step
        for event in watcher.logged
        if isinstance(event, Preview) or (isinstance(event, Progress) and event.stage is Stage.DENOISE and event.step)
    ]
    assert told[:4] == [1, 1, 2, 2] and [event.step for event in watcher.find(Preview)] == [1, 2]
    for preview, channel in zip(watcher.find(Preview), (0, 2), strict=True):
        assert preview.media_type == "image/webp"
        with Image.open(io.BytesIO(preview.data)) as picture:
            assert (picture.format, picture.size) == ("WEBP", (4, 2))
            mean = ImageStat.Stat(picture.convert("RGB")).mean
            assert max(range(3), key=mean.__getitem__) == channel
    late = await bench.watch(generation.name).to_end()
    assert [event.step for event in late.find(Preview)] == [2]
    kept = [record.event for record in bench.engine._generations[generation.name].records]
    assert [(event.step, bool(event.data)) for event in kept if isinstance(event, Preview)] == [(1, False), (2, True)]


async def test_a_step_stays_before_its_preview(bench: Bench) -> None:
    """For a watcher that comes late, too: older steps and previews are left out, the pair is not."""
    generation = await bench.submit(preview_every_steps=1)
    run = await bench.executor.run_number(1)
    run.reach(Stage.DENOISE, 1)
    run.show(1, bytes(24))
    run.reach(Stage.DENOISE, 2)
    run.show(2, bytes(24))
    run.reach(Stage.DENOISE, 3)
    await bench.heard()
    await eventually(lambda: run.num_unheard == 0, "everything is heard")
    watcher = bench.watch(generation.name)
    run.finish()
    await watcher.to_end()
    kinds = [
        (type(event), event.step)
        for event in watcher.logged
        if isinstance(event, Preview) or (isinstance(event, Progress) and event.stage is Stage.DENOISE)
    ]
    assert kinds == [(Progress, 2), (Preview, 2), (Progress, 3)]


async def test_a_preview_that_cannot_be_encoded(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is left out; its video and the next one come to their ends."""

    def fail(rgb: bytes, *, width: int, height: int) -> bytes:
        raise MemoryError

    monkeypatch.setattr(engine_module, "preview", fail)
    generation, following = await bench.submit(preview_every_steps=1), await bench.submit(watched=False)
    watcher = bench.watch(generation.name)
    run = await bench.executor.run_number(1)
    run.reach(Stage.DENOISE, 1)
    run.show(1, bytes(24))
    run.finish()
    await watcher.to_end()
    assert not watcher.find(Preview) and watcher.find(Completed)
    (await bench.executor.run_number(2)).finish()
    await bench.ended(following.name)
    assert bench.states(following.name) == [State.SUCCEEDED]


async def test_previews_are_no_measure_of_other_videos(bench: Bench) -> None:
    """What they took is not learned as the time of denoising."""
    generation = await bench.submit(preview_every_steps=1)
    watcher = bench.watch(generation.name)
    run = await bench.executor.run_number(1)
    run.reach(Stage.DENOISE, 1)
    await asyncio.sleep(0.3)
    run.show(1, bytes(24), time_s=0.3)
    run.finish()
    await watcher.to_end()
    denoise_s = next(ended.seconds for ended in bench.seen(StageEnded) if ended.stage is Stage.DENOISE)
    learned_s = bench.engine._pace.expect(Stage.DENOISE, generation.video)
    assert denoise_s >= 0.3 and learned_s == pytest.approx(denoise_s - 0.3)


async def test_the_remaining_time_is_measured(bench: Bench) -> None:
    """From the second video on a time is told with every step, and it shrinks to nothing at the end."""
    await bench.succeed()
    generation = await bench.submit(watched=False)
    (await bench.executor.run_number(2)).finish()
    await bench.ended(generation.name)
    log = bench.engine._generations[generation.name].records
    etas = [record.event.eta_s for record in log if isinstance(record.event, Progress)]
    assert None not in etas
    assert all(eta_s >= 0.0 for eta_s in etas)


async def test_mp4_bytes_leave_while_frames_are_still_to_come(bench: Bench) -> None:
    """With half of the frames decoded a watcher holds playable bytes; the rest comes after, whole and hashed."""
    generation = await bench.submit(num_frames=33, output_format=OutputFormat.MP4_H264)
    watcher = bench.watch(generation.name)
    run = await bench.executor.run_number(1)
    run.reach(Stage.DECODE, 6)
    await eventually(lambda: b"moof" in watcher.video, "a fragment")
    assert not watcher.has_ended
    run.finish()
    await watcher.to_end()
    completed = watcher.find(Completed)[0]
    video = watcher.video
    assert (len(video), hashlib.sha256(video).hexdigest()) == (completed.size_bytes, completed.sha256)


# ---- faults of the ranks --------------------------------------------------------------------------------------------


async def test_a_failure_on_the_ranks_ends_one_generation(bench: Bench) -> None:
    """What the ranks say went wrong is what the caller hears; the next generation runs on the same ranks."""
    oom = Failure(reason=Reason.OUT_OF_MEMORY, message="ask for fewer frames")
    generation, following = await bench.submit(), await bench.submit(watched=False)
    watcher = bench.watch(generation.name)
    run = await bench.executor.run_number(1)
    run.reach(Stage.DECODE, 1)
    run.fail(oom)
    await watcher.to_end()
    assert watcher.failure == oom
    ended = bench.engine.get(generation.name)
    assert (ended.state, ended.failure, ended.completed) == (State.FAILED, oom, None)
    (await bench.executor.run_number(2)).finish()
    await bench.ended(following.name)
    assert bench.states(following.name) == [State.SUCCEEDED]


@pytest.mark.parametrize("stage", [Stage.TEXT, Stage.DENOISE, Stage.DECODE])
async def test_a_failure_on_one_rank_is_told_before_the_others_have_left(bench: Bench, stage: Stage) -> None:
    """Its caller hears at once; the next generation begins when all ranks are free, and is not touched by it."""
    oom = Failure(reason=Reason.OUT_OF_MEMORY, message="ask for fewer frames")
    generation, following = await bench.submit(), await bench.submit(watched=False)
    watcher = bench.watch(generation.name)
    run = await bench.executor.run_number(1)
    run.reach(stage, 1)
    await watcher.saw(stage, 1)
    run.fail_on(1, oom)
    await watcher.to_end()
    assert watcher.failure == oom
    assert bench.states(generation.name, following.name) == [State.FAILED, State.QUEUED]
    assert (bench.executor.running, bench.engine.status().num_running) == (run, 1)
    assert (await bench.engine.cancel(generation.name)).state is State.FAILED
    run.end()
    (await bench.executor.run_number(2)).finish()
    await bench.ended(following.name)
    assert bench.states(following.name) == [State.SUCCEEDED]
    assert [ended.name for ended in bench.seen(Ended)] == [generation.name, following.name]


async def test_ranks_that_die_while_they_leave_a_failure(bench: Bench) -> None:
    """The generation keeps the failure that its caller has heard."""
    oom = Failure(reason=Reason.OUT_OF_MEMORY, message="ask for fewer frames")
    generation = await bench.submit(watched=False)
    run = await bench.executor.run_number(1)
    run.reach(Stage.DENOISE, 1)
    run.fail_on(1, oom)
    await bench.ended(generation.name)
    bench.executor.kill()
    await eventually(lambda: bench.engine.status().num_running == 0)
    assert bench.engine.get(generation.name).failure == oom
    assert len(bench.seen(Ended)) == 1


async def test_a_cancelled_generation_that_fails_on_one_rank(bench: Bench) -> None:
    """Whoever asked for its end gets it, and need not wait for the ranks either."""
    generation = await bench.submit(watched=False)
    run = await bench.executor.run_number(1)
    run.reach(Stage.DENOISE, 1)
    await bench.heard()
    bench.executor.leaves_at_once = False
    cancelled = asyncio.create_task(bench.engine.cancel(generation.name))
    await eventually(lambda: run.is_cancelled)
    run.fail_on(1, Failure(reason=Reason.INTERNAL, message="a bug"))
    assert (await cancelled).state is State.CANCELLED
    assert not run.has_ended
    run.leave()
    await next_one_works(bench)


@pytest.mark.parametrize("stage", [Stage.TEXT, Stage.DENOISE, Stage.DECODE])
async def test_dead_ranks_end_the_running_generation_and_no_other(bench: Bench, stage: Stage) -> None:
    """The running one fails with the reason and a time; readiness turns red; those in line run when it is green."""
    running, waiting = await bench.submit(), await bench.submit(watched=False)
    watcher = bench.watch(running.name)
    run = await bench.executor.run_number(1)
    run.reach(stage, 1)
    bench.executor.kill("rank 1 was killed by SIGKILL")
    await watcher.to_end()
    assert watcher.failure == Failure(
        reason=Reason.RANK_DIED, message="rank 1 was killed by SIGKILL", retry_after_s=7.0
    )
    assert not bench.engine.status().ready
    assert bench.states(running.name, waiting.name) == [State.FAILED, State.QUEUED]
    bench.executor.set_ready(True)
    (await bench.executor.run_number(2)).finish()
    await bench.ended(waiting.name)
    assert bench.states(waiting.name) == [State.SUCCEEDED]


async def test_a_video_in_encoding_survives_the_death_of_the_ranks(bench: Bench, gate: threading.Event) -> None:
    """What the ranks have delivered is encoded to its end, whatever becomes of them."""
    generation = await bench.submit(watched=False)
    (await bench.executor.run_number(1)).finish()
    await eventually(lambda: bench.engine.status().num_running == 0)
    bench.executor.kill()
    gate.set()
    await bench.ended(generation.name)
    assert bench.states(generation.name) == [State.SUCCEEDED]


async def test_a_generation_waits_in_line_for_ranks_that_are_dead(bench: Bench) -> None:
    """Work that comes while the ranks start again is not begun: it is QUEUED, and a cancel ends it at once."""
    bench.executor.kill()
    cancelled, kept = await bench.submit(watched=False), await bench.submit(watched=False)
    for _ in range(5):
        await asyncio.sleep(0)
    assert bench.states(cancelled.name, kept.name) == [State.QUEUED, State.QUEUED]
    assert (await bench.engine.cancel(cancelled.name)).state is State.CANCELLED
    bench.executor.set_ready(True)
    run = await bench.executor.run_number(1)
    assert run.generation == kept.name


async def test_ranks_that_cannot_be_started_fail_all_that_wait(bench: Bench) -> None:
    """When starting again is no use, each that waits is told so in a sentence, and nothing more is accepted."""
    running = await bench.submit(watched=False)
    await bench.executor.run_number(1)
    waiting = [await bench.submit(watched=False) for _ in range(2)]
    bench.executor.kill()
    bench.executor.give_up("3 starts of the ranks failed within 600 s; the last: rank 0 exited with code 1")
    for generation in (running, *waiting):
        await bench.ended(generation.name)
    sentence = (
        "the ranks cannot be started: 3 starts of the ranks failed within 600 s; the last: rank 0 exited with code 1"
    )
    assert [bench.engine.get(generation.name).failure for generation in waiting] == [
        Failure(reason=Reason.RANK_DIED, message=sentence)
    ] * 2
    with pytest.raises(ServiceError) as caught:
        await bench.submit()
    assert caught.value.failure.reason is Reason.SHUTTING_DOWN
    assert not bench.engine.status().ready


async def test_work_that_came_between_a_death_and_the_end_of_hope_is_told(bench: Bench) -> None:
    """A request accepted after the ranks died is not left without an end when they never come back."""
    bench.executor.kill()
    generation = await bench.submit(watched=False)
    await asyncio.sleep(0)
    bench.executor.give_up("no hope")
    await bench.ended(generation.name)
    assert bench.engine.get(generation.name).failure == Failure(
        reason=Reason.RANK_DIED, message="the ranks cannot be started: no hope"
    )


async def test_ranks_that_never_were_ready_fail_all_that_wait(another: OpenAnother) -> None:
    """The same holds before the first start has succeeded."""
    bench = await another(is_ready=False)
    generation = await bench.submit()
    watcher = bench.watch(generation.name)
    bench.executor.give_up("transformer/ lacks 3 tensors")
    await watcher.to_end()
    assert watcher.failure == Failure(
        reason=Reason.RANK_DIED, message="the ranks cannot be started: transformer/ lacks 3 tensors"
    )


# ---- faults of the disk and of the encoder --------------------------------------------------------------------------


class FullDisk(Spool):
    """A spool whose disk may refuse."""

    refuses_files = False
    refuses_bytes = False

    def create(self, name: str, suffix: str) -> Artifact:
        if self.refuses_files:
            raise StorageFailedError(errno.ENOSPC, "No space left on device")
        return FullArtifact(self, self.directory / (name + suffix))


class FullArtifact(Artifact):
    def __init__(self, spool: FullDisk, path: Path) -> None:
        super().__init__(path)
        self._spool = spool

    def append(self, data: bytes) -> None:
        if self._spool.refuses_bytes:
            raise StorageFailedError(errno.ENOSPC, "No space left on device")
        super().append(data)


class FullFrames(FrameSpool):
    """The frames of one generation, of which the third finds no room."""

    num_kept = 0

    def put(self, frame: bytes | memoryview) -> None:
        if self.num_kept == 2:
            raise StorageFailedError(errno.ENOSPC, "No space left on device")
        self.num_kept += 1
        super().put(frame)


FULL = Failure(
    reason=Reason.STORAGE_FAILED,
    message="the server could not store the video: No space left on device",
)


async def next_one_works(bench: Bench) -> None:
    assert (await bench.succeed(prompt="the next one")).state is State.SUCCEEDED
    assert [name for name in bench.videos_on_disk() if not name.endswith(".raw_rgb24")] == []


async def test_a_disk_that_refuses_the_file(another: OpenAnother) -> None:
    """No file, no run: the generation fails before the ranks are asked, and the next one works."""
    bench = await another(spool=FullDisk)
    bench.spool.refuses_files = True
    generation = await bench.submit(watched=False)
    await bench.ended(generation.name)
    assert bench.engine.get(generation.name).failure == FULL
    assert bench.executor.runs == []
    bench.spool.refuses_files = False
    await next_one_works(bench)


async def test_a_disk_that_refuses_a_place_for_frames(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file of the video, which could be made, does not stay behind."""

    class NoFrames(FrameSpool):
        def __init__(self, directory: Path, frame_bytes: int) -> None:
            raise StorageFailedError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(encoding, "FrameSpool", NoFrames)
        generation = await bench.submit(watched=False)
        await bench.ended(generation.name)
    assert bench.engine.get(generation.name).failure == FULL
    assert bench.videos_on_disk() == []
    await next_one_works(bench)


@pytest.mark.parametrize("output_format", [OutputFormat.MP4_H264, OutputFormat.RAW_RGB24])
async def test_a_disk_that_refuses_bytes_of_the_video(another: OpenAnother, output_format: OutputFormat) -> None:
    """The ranks are told to leave, the caller hears why, nothing stays on disk, and the next one works."""
    bench = await another(spool=FullDisk)
    bench.spool.refuses_bytes = True
    generation = await bench.submit(output_format=output_format, num_frames=33)
    watcher = bench.watch(generation.name)
    run = await bench.executor.run_number(1)
    run.reach(Stage.DECODE, 8)
    await watcher.to_end()
    assert run.is_cancelled
    assert watcher.failure == FULL
    assert bench.states(generation.name) == [State.FAILED]
    assert bench.videos_on_disk() == []
    bench.spool.refuses_bytes = False
    await next_one_works(bench)


@pytest.mark.parametrize("output_format", [OutputFormat.MP4_H264_PROGRESSIVE, OutputFormat.GIF])
async def test_a_disk_that_refuses_the_last_bytes(another: OpenAnother, output_format: OutputFormat) -> None:
    """A format that is written when its last frame is in fails like any other, and leaves nothing on disk."""
    bench = await another(spool=FullDisk)
    bench.spool.refuses_bytes = True
    generation = await bench.submit(output_format=output_format, watched=False)
    (await bench.executor.run_number(1)).finish()
    await bench.ended(generation.name)
    assert bench.engine.get(generation.name).failure == FULL
    assert bench.videos_on_disk() == []
    bench.spool.refuses_bytes = False
    await next_one_works(bench)


async def test_a_disk_that_is_full_when_the_file_is_closed(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """The generation fails with the reason, and the next one is served."""
    close = os.close

    def refuse_videos(fd: int) -> None:
        is_video = Path(f"/proc/self/fd/{fd}").readlink().suffix == ".raw_rgb24"
        close(fd)
        if is_video:
            raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "close", refuse_videos)
        generation = await bench.submit(watched=False)
        (await bench.executor.run_number(1)).finish()
        await bench.ended(generation.name)
    failure = bench.engine.get(generation.name).failure
    assert failure is not None and failure.reason is Reason.STORAGE_FAILED
    assert "No space left on device" in failure.message
    await bench.succeed()


async def test_a_disk_that_refuses_frames(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """The ranks are told to leave at the next step, and the next one works."""
    with monkeypatch.context() as patched:
        patched.setattr(encoding, "FrameSpool", FullFrames)
        generation = await bench.submit(watched=False, num_frames=33)
        run = await bench.executor.run_number(1)
        run.reach(Stage.DECODE, 2)
        await bench.heard()
        run.advance()
        await bench.ended(generation.name)
    assert run.is_cancelled
    assert bench.engine.get(generation.name).failure == FULL
    await next_one_works(bench)


async def test_a_disk_that_refuses_the_last_frames(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """A refusal after the last step is no success either, though no step is left to leave at."""
    with monkeypatch.context() as patched:
        patched.setattr(encoding, "FrameSpool", FullFrames)
        generation = await bench.submit(watched=False)
        (await bench.executor.run_number(1)).finish()
        await bench.ended(generation.name)
    assert bench.engine.get(generation.name).failure == FULL
    await next_one_works(bench)


async def test_an_encoder_that_crashes(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """The caller hears of a bug and nothing of its inside, the ranks are told to leave, and the next one works."""

    def crash(*_: object) -> None:
        raise RuntimeError("libx264 at /home/somebody/secret failed")

    with monkeypatch.context() as patched:
        patched.setattr(encoding, "open_encoder", crash)
        generation = await bench.submit()
        watcher = bench.watch(generation.name)
        run = await bench.executor.run_number(1)
        run.reach(Stage.DECODE, 1)
        await watcher.to_end()
    assert run.is_cancelled
    assert watcher.failure == Failure(
        reason=Reason.INTERNAL, message="an internal error ended the generation; the server's log has it"
    )
    assert bench.states(generation.name) == [State.FAILED]
    await next_one_works(bench)


async def test_an_encoder_that_cannot_be_opened(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even what only describes a video may fail: that one ends, the ranks are told to leave, and the next one works."""

    def crash(*_: object) -> None:
        raise RuntimeError("no threads left for libx264")

    with monkeypatch.context() as patched:
        patched.setattr(engine_module, "describe", crash)
        generation = await bench.submit()
        watcher = bench.watch(generation.name)
        run = await bench.executor.run_number(1)
        run.reach(Stage.DECODE, 1)
        await eventually(lambda: run.is_cancelled)
        await watcher.to_end()
    assert watcher.failure is not None and watcher.failure.reason is Reason.INTERNAL
    assert bench.states(generation.name) == [State.FAILED]
    await next_one_works(bench)


async def test_a_bug_in_the_scheduler_leaves_nobody_waiting(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """What runs and what waits end as FAILED, and the engine says that it cannot go on."""
    running = await bench.submit(watched=False)
    waiting = await bench.submit(watched=False)
    run = await bench.executor.run_number(1)

    def crash(*_: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(bench.engine, "_take_step", crash)
    run.advance()
    await bench.ended(running.name)
    await bench.ended(waiting.name)
    assert [bench.states(g.name) for g in (running, waiting)] == [[State.FAILED], [State.FAILED]]
    assert "a bug" in await bench.engine.fatal


# ---- encoding beside the ranks --------------------------------------------------------------------------------------


async def test_encoding_never_holds_the_ranks(another: OpenAnother, gate: threading.Event) -> None:
    """While one video hangs in the encoder the ranks compute the next, even where only one may hang over."""
    bench = await another(max_encoding=1)
    first, second, third = [await bench.submit(watched=False) for _ in range(3)]
    (await bench.executor.run_number(1)).finish()
    run = await bench.executor.run_number(2)
    assert (run.generation, bench.states(first.name)) == (second.name, [State.RUNNING])
    run.finish()
    await eventually(lambda: bench.engine.status().num_running == 0)
    for _ in range(5):
        await asyncio.sleep(0)
    assert bench.states(first.name, second.name, third.name) == [State.RUNNING, State.RUNNING, State.QUEUED]
    gate.set()
    (await bench.executor.run_number(3)).finish()
    for generation in (first, second, third):
        await bench.ended(generation.name)
    assert bench.states(first.name, second.name, third.name) == [State.SUCCEEDED] * 3


async def test_a_disk_that_is_slow_to_close_files_holds_the_line(
    another: OpenAnother, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A video whose file is being closed takes its place in the encoder until it is."""
    may_close, seal = threading.Event(), Artifact.seal
    closing: list[Artifact] = []

    def seal_late(artifact: Artifact) -> tuple[int, str]:
        closing.append(artifact)
        may_close.wait(10.0)
        return seal(artifact)

    monkeypatch.setattr(Artifact, "seal", seal_late)
    bench = await another(max_encoding=1)
    names = [(await bench.submit(watched=False)).name for _ in range(3)]
    for number in (1, 2):
        (await bench.executor.run_number(number)).finish()
    await eventually(lambda: len(closing) == 2)
    for _ in range(5):
        await asyncio.sleep(0)
    assert bench.states(*names) == [State.RUNNING, State.RUNNING, State.QUEUED]
    may_close.set()
    (await bench.executor.run_number(3)).finish()
    for name in names:
        await bench.ended(name)
    assert bench.states(*names) == [State.SUCCEEDED] * 3


async def test_status_counts_what_waits_and_runs(bench: Bench) -> None:
    """The status tells line, run, memory and what the ranks said of themselves."""
    await bench.succeed()
    await bench.submit(watched=False)
    await bench.executor.run_number(2)
    await bench.submit(watched=False)
    status = bench.engine.status()
    assert (status.ready, status.detail, status.num_queued, status.num_running, status.queue_limit) == (
        True,
        "ready",
        1,
        1,
        16,
    )
    assert (status.device, status.dtype, status.attention, status.load_format) == (
        "cpu",
        "float32",
        "fake_sdpa",
        "dummy",
    )
    assert status.rank_memory == (RankMemory(rank=0, peak_bytes=1000), RankMemory(rank=1, peak_bytes=2000))
    bench.executor.kill()
    status = bench.engine.status()
    assert (status.ready, status.detail, status.device) == (False, "the ranks are starting", "")
