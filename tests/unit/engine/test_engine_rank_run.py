"""The rank loop with ranks that are threads, a pipeline that does what a test says, and the test as the server."""

import threading
import time
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any

import pytest
import structlog
import torch

from tests.fake_ranks import CARD, ask, frame, steps_of
from wan_grpc.domain.errors import Failure, Reason
from wan_grpc.domain.events import Progress, Stage
from wan_grpc.domain.images import InputFrames
from wan_grpc.domain.request import VideoRequest, resolve
from wan_grpc.domain.traffic import Exchange, RankTime, Traffic
from wan_grpc.engine import messages, worker
from wan_grpc.engine.messages import (
    Cancel,
    FrameReady,
    FromRank,
    MemoryUse,
    PreviewMade,
    RankFailed,
    Run,
    RunEnded,
    SlotFreed,
    StepDone,
    Stop,
    ToRank,
)
from wan_grpc.engine.shared import FrameRing, anonymous_file
from wan_grpc.engine.worker import Alarm, Outlet, RankRun
from wan_grpc.parallel.group import ExchangeBrokenError
from wan_grpc.parallel.mesh import Agreed, PeersLostError
from wan_grpc.parallel.meter import Meter
from wan_grpc.pipeline.preview import OnPreview

VIDEO = resolve(ask(), CARD, fallback_seed=0)
STEPS = list(steps_of(VIDEO))
ORDER = Run(generation="generations/1", video=VIDEO)
INTERNAL = Failure(reason=Reason.INTERNAL, message="an internal error ended the generation; the server's log has it")
OUT_OF_MEMORY = Failure(
    reason=Reason.OUT_OF_MEMORY,
    message="the device ran out of memory for this video; ask for fewer frames or a smaller size",
)


class Table:
    """Where the seats of a mesh of threads meet."""

    def __init__(self, num_ranks: int) -> None:
        self._barrier = threading.Barrier(num_ranks, timeout=10.0)
        self._said: list[object] = [None] * num_ranks

    def exchange(self, rank: int, value: object) -> list[object]:
        self._said[rank] = value
        self._barrier.wait()
        everything = list(self._said)
        self._barrier.wait()
        return everything


class Seat:
    """A mesh among threads, which counts how often it agreed."""

    def __init__(self, table: Table, rank: int, lost_at: int | None = None) -> None:
        self._table = table
        self._lost_at = lost_at
        self.rank = rank
        self.words: list[int] = []
        self.links: list[str] = []
        """What became of the links for data."""
        self.aborted = threading.Event()
        self.is_told = True
        self.meter = Meter(torch.device("cpu"))

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def agree(self, word: int, *, seconds: float = 0.0, waited_s: float = 0.0) -> Agreed:
        if self._lost_at == len(self.words):
            raise PeersLostError("connection closed by peer")
        self.words.append(word)
        said = self._table.exchange(self.rank, (word, RankTime(seconds=seconds, waited_s=waited_s)))
        return Agreed(word=max(each[0] for each in said), times=tuple(each[1] for each in said))  # type: ignore[index]

    def share(self, payload: bytes | None) -> bytes:
        return self._table.exchange(self.rank, payload)[0]  # type: ignore[return-value]

    def gather(self, payload: bytes) -> tuple[bytes, ...]:
        return tuple(self._table.exchange(self.rank, payload))  # type: ignore[arg-type]

    def drop(self) -> None:
        self.links.append("dropped")

    def build(self) -> None:
        self.links.append("built")

    def abort(self) -> None:
        self.aborted.set()


class Memory:
    """A text encoder that counts how often it was told to forget."""

    def __init__(self) -> None:
        self.num_forgotten = 0

    def forget(self) -> None:
        self.num_forgotten += 1


class ScriptedPipeline:
    """Says every step of a video and yields its frames; raises `error` in place of step `error_at`."""

    def __init__(self, error: BaseException | None = None, error_at: int = 0) -> None:
        self.device = torch.device("cpu")
        self.text_encoder = Memory()
        self.num_freed = 0
        self.is_closed = False
        self.preview = torch.arange(24, dtype=torch.uint8).view(1, 2, 4, 3)
        self._error = error
        self._error_at = error_at

    def generate(
        self,
        video: VideoRequest,
        *,
        frames: InputFrames,
        on_step: Callable[[Progress], None],
        on_preview: OnPreview,
    ) -> Iterator[torch.Tensor]:
        num_frames = 0
        try:
            for index, progress in enumerate(steps_of(video)):
                self._maybe_raise(index)
                on_step(progress)
                if progress.stage is Stage.DENOISE and progress.step and video.shows_preview_after(progress.step):
                    self.before_preview()
                    on_preview(progress.step, self.preview, 0.25)
                if progress.stage is Stage.DECODE and progress.step:
                    count = 1 if progress.step == 1 else 4
                    yield torch.stack([picture(video, num_frames + k) for k in range(count)])
                    num_frames += count
            self._maybe_raise(len(list(steps_of(video))))
        finally:
            self.is_closed = True

    def before_preview(self) -> None:
        """What the ranks do for it."""

    def free_memory(self) -> None:
        self.num_freed += 1

    def _maybe_raise(self, index: int) -> None:
        if self._error is not None and index == self._error_at:
            raise self._error


def picture(video: VideoRequest, index: int) -> torch.Tensor:
    pixels = torch.frombuffer(bytearray(frame(video, index)), dtype=torch.uint8)
    return pixels.reshape(video.height, video.width, 3)


class BytesOnly:
    """A connection without the two methods that pickle."""

    def __init__(self, connection: Connection) -> None:
        self.send_bytes = connection.send_bytes
        self.recv_bytes = connection.recv_bytes
        self.poll = connection.poll


class Server:
    """The other end of rank 0's pipe and ring."""

    def __init__(self, num_slots: int = 8, slot_bytes: int = VIDEO.frame_bytes) -> None:
        self.pipe, theirs = Pipe()
        fd = anonymous_file(FrameRing.size_bytes(slot_bytes=slot_bytes, num_slots=num_slots))
        self.ring = FrameRing(fd, slot_bytes=slot_bytes, num_slots=num_slots)
        self.outlet = Outlet(BytesOnly(theirs), self.ring)  # type: ignore[arg-type]
        self._theirs = theirs

    def send(self, message: ToRank) -> None:
        self.pipe.send_bytes(messages.encode(message))

    def next(self) -> FromRank:
        assert self.pipe.poll(10.0), "rank 0 says nothing"
        return messages.decode_from_rank(self.pipe.recv_bytes())

    def rest(self) -> list[FromRank]:
        """All that rank 0 has said and nobody has read."""
        said = []
        while self.pipe.poll():
            said.append(self.next())
        return said

    def picture(self, slot: int) -> bytes:
        with self.ring.slot(slot, VIDEO.frame_bytes) as view:
            return bytes(view)

    def close(self) -> None:
        self.pipe.close()
        self._theirs.close()
        self.ring.close()


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.close()


@pytest.fixture(autouse=True)
def logs() -> Iterator[list[MutableMapping[str, Any]]]:
    """What the ranks log, which is not printed."""
    with structlog.testing.capture_logs() as logs:
        yield logs


class Told:
    """The outlet of a rank other than the first, which only ever tells of failures."""

    def __init__(self) -> None:
        self.said: list[FromRank] = []

    def send(self, message: FromRank) -> None:
        self.said.append(message)


@contextmanager
def running(
    server: Server,
    *pipelines: ScriptedPipeline,
    order: Run = ORDER,
    lost_at: int | None = None,
    others: Told | None = None,
    alarms: Sequence[Alarm] = (),
) -> Iterator[tuple[list[Future[RunEnded]], list[Seat]]]:
    """One rank a pipeline, each on a thread; rank 0 speaks to `server`, the others to `others`."""
    table = Table(len(pipelines))
    seats = [Seat(table, rank, lost_at) for rank in range(len(pipelines))]
    outlets = [server.outlet, *(others or Told() for _ in pipelines[1:])]
    alarms = alarms or [Alarm() for _ in pipelines]
    with ThreadPoolExecutor(len(pipelines)) as threads:
        runs = [
            RankRun(seat, pipeline, outlet, order, alarm)  # type: ignore[arg-type]
            for seat, pipeline, outlet, alarm in zip(seats, pipelines, outlets, alarms, strict=True)
        ]
        yield [threads.submit(run.to_end) for run in runs], seats


def ends(futures: list[Future[RunEnded]]) -> list[RunEnded]:
    return [future.result(10.0) for future in futures]


def test_ranks_run_a_video_in_step(server: Server) -> None:
    """Rank 0 alone speaks: each step, then its frames; all ranks say GO once a step and once at the end."""
    pipelines = ScriptedPipeline(), ScriptedPipeline()
    with running(server, *pipelines) as (futures, seats):
        first, second = ends(futures)
    said = server.rest()
    slots = [message.slot for message in said if isinstance(message, FrameReady)]
    assert first == second
    assert (first.generation, first.cancelled, first.failure, len(first.memory)) == ("generations/1", False, None, 2)
    assert all(isinstance(use, MemoryUse) and use.peak_bytes >= use.used_bytes > 0 for use in first.memory)
    assert [message.progress for message in said if isinstance(message, StepDone)] == STEPS
    assert [type(message) for message in said[-7:]] == [StepDone, FrameReady, StepDone, *[FrameReady] * 4]
    assert [server.picture(slot) for slot in slots] == [frame(VIDEO, index) for index in range(5)]
    assert [seat.words for seat in seats] == [[worker.GO] * (len(STEPS) + 1)] * 2
    assert [seat.links for seat in seats] == [[], []]
    assert [(pipeline.is_closed, pipeline.num_freed) for pipeline in pipelines] == [(True, 1)] * 2


def test_rank_0_shows_previews(server: Server) -> None:
    """After the step that each belongs to, with its size; ranks that hold none of the picture show none."""
    order = Run(generation="generations/1", video=replace(VIDEO, preview_every_steps=2))
    pipelines = ScriptedPipeline(), ScriptedPipeline()
    pipelines[1].preview = torch.empty((0, 2, 4, 3), dtype=torch.uint8)
    others = Told()
    with running(server, *pipelines, order=order, others=others) as (futures, _):
        ends(futures)
    said = server.rest()
    shown = [index for index, message in enumerate(said) if isinstance(message, PreviewMade)]
    due = [step for step in range(1, VIDEO.num_inference_steps + 1) if step % 2 == 0]
    assert (
        [said[index] for index in shown]
        == [PreviewMade(step=step, width=4, height=2, rgb=bytes(range(24)), time_s=0.25) for step in due]
        != []
    )
    before = [said[index - 1] for index in shown]
    assert [message.progress.step for message in before if isinstance(message, StepDone)] == due
    assert not others.said


def test_what_is_waited_for_at_a_preview_is_of_no_step(server: Server) -> None:
    """The next step's waiting is its own."""
    order = Run(generation="generations/1", video=replace(VIDEO, preview_every_steps=1))
    seated = threading.Event()

    class Waiting(ScriptedPipeline):
        def before_preview(self) -> None:
            assert seated.wait(10.0)
            with seats[1].meter.timing(Exchange.VAE):
                time.sleep(0.01)

    with running(server, ScriptedPipeline(), Waiting(), order=order) as (futures, seats):
        seated.set()
        first, _ = ends(futures)
    told = [message for message in server.rest() if isinstance(message, StepDone)]
    assert all(each.waited_s == 0.0 for message in told for each in message.times)
    assert [traffic.kind for traffic in first.traffic[1]] == [Exchange.VAE]


def test_a_cancel_is_seen_after_a_preview(server: Server) -> None:
    """One that comes while a preview is made ends the run at the next step, and nothing of it is told twice."""
    order = Run(generation="generations/1", video=replace(VIDEO, preview_every_steps=1))

    class Cancelled(ScriptedPipeline):
        def before_preview(self) -> None:
            server.send(Cancel(generation="generations/1"))

    with running(server, Cancelled(), ScriptedPipeline(), order=order) as (futures, _):
        first, second = ends(futures)
    assert first.cancelled and second.cancelled
    said = server.rest()
    steps = [message.progress.step for message in said if isinstance(message, StepDone)]
    assert [message.step for message in said if isinstance(message, PreviewMade)] == [1]
    assert steps[-1] == 2


def test_each_step_is_told_with_the_time_of_every_rank(server: Server) -> None:
    """A step's time on each rank, and how much of it that rank waited; a stage that begins has none."""
    seated = threading.Event()

    class Waiting(ScriptedPipeline):
        def _maybe_raise(self, index: int) -> None:
            assert seated.wait(10.0)
            if index < len(STEPS) and STEPS[index].step:
                with seats[1].meter.timing(Exchange.RING):
                    pass
                seats[1].meter.count(Exchange.RING, 10)

    with running(server, ScriptedPipeline(), Waiting()) as (futures, seats):
        seated.set()
        first, _ = ends(futures)
    told = [message for message in server.rest() if isinstance(message, StepDone)]
    for message in told:
        if message.progress.step == 0:
            assert message.times == ()
        else:
            assert [time.seconds for time in message.times] == [message.progress.step_time_s] * 2
            assert message.times[0].waited_s == 0.0 < message.times[1].waited_s < 0.1
    (none, (traffic,)) = first.traffic
    assert (none, traffic.kind, traffic.sent_bytes) == ((), Exchange.RING, 10 * sum(step.step > 0 for step in STEPS))
    assert isinstance(traffic, Traffic) and traffic.seconds > 0.0


@pytest.mark.parametrize("error_at", range(len(STEPS) + 1))
@pytest.mark.parametrize("broken", [0, 1])
def test_an_error_on_one_rank_ends_the_run_on_both(
    server: Server, logs: list[MutableMapping[str, Any]], broken: int, error_at: int
) -> None:
    """Wherever one rank fails, it tells so itself and both leave there, with new links; none says a word more."""
    pipelines = [ScriptedPipeline(), ScriptedPipeline()]
    pipelines[broken] = ScriptedPipeline(RuntimeError("secret /path"), error_at)
    others = Told()
    with running(server, *pipelines, others=others) as (futures, seats):
        first, second = ends(futures)
    said = [*server.rest(), *others.said]
    assert first == second
    assert (first.failure, first.cancelled) == (INTERNAL, False)
    assert [message for message in said if isinstance(message, RankFailed)] == [
        RankFailed(generation="generations/1", rank=broken, failure=INTERNAL)
    ]
    assert [message.progress for message in said if isinstance(message, StepDone)] == STEPS[:error_at]
    assert [len(seat.words) for seat in seats] == [error_at + 1] * 2
    assert [seat.links[-2:] for seat in seats] == [["dropped", "built"]] * 2
    assert seats[broken].links[0] == "dropped", "before its word, since others may wait in an exchange with it"
    assert all(pipeline.is_closed and pipeline.num_freed == 1 for pipeline in pipelines)
    assert [pipeline.text_encoder.num_forgotten for pipeline in pipelines] == [1, 1]
    assert logs == [{"event": "generation failed on this rank", "exc_info": True, "log_level": "error"}]


def test_a_broken_exchange_is_the_fault_of_another(server: Server, logs: list[MutableMapping[str, Any]]) -> None:
    """A rank that is thrown out of an exchange says so, and the word of the rank that failed outranks it."""
    others = Told()
    pipelines = ScriptedPipeline(ExchangeBrokenError("closed"), 4), ScriptedPipeline(RuntimeError("bug"), 4)
    with running(server, *pipelines, others=others) as (futures, seats):
        assert [ended.failure for ended in ends(futures)] == [INTERNAL] * 2
    assert [seat.words[-1] for seat in seats] == [worker.LOST, worker.FAIL]
    assert not any(isinstance(message, RankFailed) for message in server.rest())
    assert [type(message) for message in others.said] == [RankFailed]
    said = {"event": "an exchange with other ranks broke off", "detail": "closed", "log_level": "warning"}
    assert {**said, "exc_info": False} in logs


def test_a_break_of_which_nobody_else_can_know(server: Server, logs: list[MutableMapping[str, Any]]) -> None:
    """Where links tell nobody that they broke, and no call has come, the rank tells so itself."""
    others, told = Told(), RankFailed(generation="generations/1", rank=1, failure=worker._FAILURES[worker.LOST])

    class Alone(ScriptedPipeline):
        def _maybe_raise(self, index: int) -> None:
            assert seated.wait(10.0)
            super()._maybe_raise(index)

    seated = threading.Event()
    pipelines = ScriptedPipeline(), Alone(ExchangeBrokenError("unhandled system error"), 4)
    with running(server, *pipelines, others=others) as (futures, seats):
        seats[1].is_told = False
        seated.set()
        assert [ended.failure for ended in ends(futures)] == [told.failure] * 2
    assert others.said == [told]
    assert [line["exc_info"] for line in logs] == [True]


def test_a_link_that_breaks_by_itself(server: Server) -> None:
    """Without any rank at fault the caller hears that it may try again."""
    pipelines = ScriptedPipeline(ExchangeBrokenError("closed"), 4), ScriptedPipeline(ExchangeBrokenError("closed"), 4)
    with running(server, *pipelines) as (futures, _):
        (failure, other) = [ended.failure for ended in ends(futures)]
    assert failure == other
    assert failure is not None
    assert (failure.reason, failure.retry_after_s) == (Reason.RANK_DIED, 1.0)


def test_an_alarm_reaches_the_running_generation_alone(server: Server) -> None:
    """The server's call aborts the exchanges of the generation that it names, and of no other before or after."""
    alarm, seated = Alarm(), threading.Event()

    class Called(ScriptedPipeline):
        def _maybe_raise(self, index: int) -> None:
            assert seated.wait(10.0)
            if index == 2:
                alarm.ring("generations/2")
                assert not seats[0].aborted.is_set()
                alarm.ring("generations/1")
                assert seats[0].aborted.is_set()

    alarm.ring("generations/1")
    with running(server, Called(), alarms=[alarm]) as (futures, seats):
        seated.set()
        assert ends(futures)[0].failure is None
    seats[0].aborted.clear()
    alarm.ring("generations/1")
    assert not seats[0].aborted.is_set()


@pytest.mark.parametrize(
    ("first", "second", "failure"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), None, OUT_OF_MEMORY),
        (None, torch.OutOfMemoryError("CUDA out of memory"), OUT_OF_MEMORY),
        (MemoryError(), None, OUT_OF_MEMORY),
        (RuntimeError("bug"), torch.OutOfMemoryError("CUDA out of memory"), OUT_OF_MEMORY),
        (RuntimeError("bug"), ValueError("bug"), INTERNAL),
    ],
)
def test_what_ran_out_of_memory_is_told_apart(
    server: Server, first: BaseException | None, second: BaseException | None, failure: Failure
) -> None:
    """Too little memory on any rank is the caller's to mend, and outranks a bug on another."""
    with running(server, ScriptedPipeline(first, 4), ScriptedPipeline(second, 4)) as (futures, _):
        assert [ended.failure for ended in ends(futures)] == [failure] * 2


@pytest.mark.parametrize("step", range(len(STEPS)))
def test_a_cancel_is_seen_at_the_next_step(server: Server, step: int) -> None:
    """A cancel that came while a step was computed ends the run on all ranks when that step is done, not one later."""

    class Cancelling(ScriptedPipeline):
        def _maybe_raise(self, index: int) -> None:
            if index == step:
                server.send(Cancel(generation="generations/1"))

    with running(server, Cancelling(), ScriptedPipeline()) as (futures, seats):
        first, second = ends(futures)
    assert first == second
    assert (first.cancelled, first.failure) == (True, None)
    assert [message.progress for message in server.rest() if isinstance(message, StepDone)] == STEPS[: step + 1]
    assert [seat.words for seat in seats] == [[0] * step + [worker.CANCEL], [0] * (step + 1)]


def test_a_cancel_after_the_last_step_counts(server: Server) -> None:
    """The last word of a run is said after its last frame, so that a cancel until then is a cancel."""

    class Cancelling(ScriptedPipeline):
        def _maybe_raise(self, index: int) -> None:
            if index == len(STEPS):
                server.send(Cancel(generation="generations/1"))

    with running(server, Cancelling(), ScriptedPipeline()) as (futures, _):
        assert [ended.cancelled for ended in ends(futures)] == [True, True]


def test_a_cancel_of_another_generation_is_nothing(server: Server) -> None:
    """One that came too late for the generation before does not touch this one."""
    server.send(Cancel(generation="generations/0"))
    with running(server, ScriptedPipeline()) as (futures, _):
        server.send(Cancel(generation="generations/2"))
        assert [ended.cancelled for ended in ends(futures)] == [False]


def test_an_error_outranks_a_cancel(server: Server) -> None:
    """When one rank fails in the step in which a cancel arrived, the run has failed."""
    server.send(Cancel(generation="generations/1"))
    with running(server, ScriptedPipeline(), ScriptedPipeline(RuntimeError("bug"), 0)) as (futures, _):
        assert [(ended.failure, ended.cancelled) for ended in ends(futures)] == [(INTERNAL, False)] * 2


@pytest.mark.parametrize("lost_at", [0, 3, len(STEPS)])
def test_lost_peers_end_the_rank_and_not_the_run(
    server: Server, logs: list[MutableMapping[str, Any]], lost_at: int
) -> None:
    """A rank whose peers are gone does not try to agree on it, nor takes it for a bug: the error leaves the run."""
    pipeline = ScriptedPipeline()
    with running(server, pipeline, lost_at=lost_at) as (futures, seats), pytest.raises(PeersLostError):
        futures[0].result(10.0)
    assert (len(seats[0].words), pipeline.is_closed, logs) == (lost_at, True, [])


# ---- the ring -------------------------------------------------------------------------------------------------------


def test_a_full_ring_makes_the_rank_wait() -> None:
    """With 2 slots at most 2 frames are out; each slot that is freed lets one more frame out, whole and in order."""
    server = Server(num_slots=2)
    video = replace(VIDEO, num_frames=9)
    with running(server, ScriptedPipeline(), order=Run(generation="generations/1", video=video)) as (futures, _):
        taken: list[bytes] = []
        out: list[int] = []
        while not futures[0].done() or out or server.pipe.poll():
            while len(out) < 2 and len(taken) + len(out) < 9:
                if isinstance(message := server.next(), FrameReady):
                    out.append(message.slot)
            assert len(set(out)) == len(out) <= 2
            assert len(taken) + len(out) == 9 or not futures[0].done()
            slot = out.pop(0)
            taken.append(server.picture(slot))
            server.send(SlotFreed(slot=slot))
            if len(taken) == 9:
                break
        assert ends(futures)[0].failure is None
    assert taken == [frame(video, index) for index in range(9)]
    server.close()


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_cancel_reaches_a_rank_that_waits_for_a_slot(num_ranks: int) -> None:
    """Nobody frees a slot any more: what is still decoded is dropped, and the run is left at the next step."""
    server = Server(num_slots=2)
    video = replace(VIDEO, num_frames=33)
    order = Run(generation="generations/1", video=video)
    with running(server, *(ScriptedPipeline() for _ in range(num_ranks)), order=order) as (futures, _):
        slots = []
        while len(slots) < 2:
            if isinstance(message := server.next(), FrameReady):
                slots.append(message.slot)
        assert not futures[0].done()
        server.send(Cancel(generation="generations/1"))
        assert [ended.cancelled for ended in ends(futures)] == [True] * num_ranks
    assert not any(isinstance(message, FrameReady) for message in server.rest())
    assert [server.picture(slot) for slot in slots] == [frame(video, 0), frame(video, 1)]
    server.close()


def test_the_ring_is_whole_again_for_the_next_run() -> None:
    """Slots that are freed late, after a cancel, serve the next generation; none is lost and none is used twice."""
    server = Server(num_slots=2)
    order = Run(generation="generations/1", video=replace(VIDEO, num_frames=33))
    with running(server, ScriptedPipeline(), order=order) as (futures, _):
        while not isinstance(server.next(), FrameReady):
            pass
        server.send(Cancel(generation="generations/1"))
        ends(futures)
    used = [0, 1]
    for slot in used:
        server.send(SlotFreed(slot=slot))
    server.rest()
    second = Run(generation="generations/2", video=replace(VIDEO, num_frames=1))
    with running(server, ScriptedPipeline(), order=second) as (futures, _):
        assert ends(futures)[0].failure is None
    assert len([message for message in server.rest() if isinstance(message, FrameReady)]) == 1
    server.close()


def test_a_frame_that_fits_no_slot_is_a_bug_and_no_crash() -> None:
    """A video larger than the ring was made for ends as an internal error on all ranks, and touches no other slot."""
    server = Server(slot_bytes=VIDEO.frame_bytes - 1)
    with running(server, ScriptedPipeline(), ScriptedPipeline()) as (futures, _):
        assert [ended.failure for ended in ends(futures)] == [INTERNAL] * 2
    server.close()


def test_a_server_that_is_gone_is_an_error(server: Server) -> None:
    """A broken pipe in the middle of a run does not hang the ranks: it ends the run as any error does."""
    server.pipe.close()
    with running(server, ScriptedPipeline(), ScriptedPipeline()) as (futures, _):
        assert [ended.failure for ended in ends(futures)] == [INTERNAL] * 2


# ---- orders ---------------------------------------------------------------------------------------------------------


def test_the_loop_runs_orders_until_it_is_told_to_stop(server: Server) -> None:
    """Two generations, one of them failing, and a stop: both ranks do all of it, rank 0 reports each end."""
    table = Table(2)
    pipelines = [ScriptedPipeline(), ScriptedPipeline()]
    server.send(SlotFreed(slot=7))  # words between the orders are no orders
    server.send(Cancel(generation="generations/0"))
    server.send(ORDER)
    with ThreadPoolExecutor(2) as threads:
        loops = [
            threads.submit(worker._serve, Seat(table, rank), pipelines[rank], outlet, Alarm())  # type: ignore[arg-type]
            for rank, outlet in enumerate((server.outlet, Told()))
        ]
        first = take_to_end(server)
        pipelines[1]._error = RuntimeError("bug")
        server.send(Run(generation="generations/2", video=VIDEO))
        second = take_to_end(server)
        server.send(Stop())
        assert [loop.result(10.0) for loop in loops] == [None, None]
    assert [(ended.generation, ended.failure) for ended in (first, second)] == [
        ("generations/1", None),
        ("generations/2", INTERNAL),
    ]


def take_to_end(server: Server) -> RunEnded:
    """Be a server that frees each slot at once, until the run has ended."""
    while not isinstance(message := server.next(), RunEnded):
        if isinstance(message, FrameReady):
            server.send(SlotFreed(slot=message.slot))
    return message
