"""The service without a network: submit a request, watch what becomes of it, cancel it.

Knows generations, their order and their ends. Does not know protobuf, gRPC, or how a rank computes.
"""

import asyncio
import contextlib
import functools
import math
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import structlog

from wan_grpc.domain.errors import Failure, Reason, ServiceError, UnusableModelError, Violation
from wan_grpc.domain.events import (
    Accepted,
    Chunk,
    Completed,
    Event,
    Failed,
    Generation,
    Heartbeat,
    Preview,
    Progress,
    Queued,
    RankMemory,
    Record,
    Stage,
    State,
)
from wan_grpc.domain.observations import (
    Admitted,
    BytesSent,
    Ended,
    FramesDecoded,
    LoadChanged,
    Observation,
    Refused,
    StageEnded,
    Started,
    StepEnded,
)
from wan_grpc.domain.request import UNLIMITED_S, GenerationRequest
from wan_grpc.domain.status import EngineStatus
from wan_grpc.domain.traffic import skew_s
from wan_grpc.domain.variants import ModelCard
from wan_grpc.engine.bell import Bell, rang
from wan_grpc.engine.encoding import Encoding, storage_failure
from wan_grpc.engine.executor import Executor
from wan_grpc.engine.generation import GenerationLog, Running
from wan_grpc.engine.intake import CountTokens, Intake, Prepared, fingerprint
from wan_grpc.engine.messages import PreviewMade, RankFailed, RunEnded, StepDone
from wan_grpc.engine.pace import Pace, remaining
from wan_grpc.engine.queue import AdmissionQueue
from wan_grpc.engine.replicas import Replica, Replicas
from wan_grpc.media.pictures import PREVIEW_TYPE, preview
from wan_grpc.media.video import describe
from wan_grpc.store.artifacts import Spool, StorageFailedError
from wan_grpc.store.frames import FramesAbortedError

CHUNK_BYTES = 1024 * 1024
_UNKNOWN_WAIT_S = 5.0
_ATTACH_S = 5.0
"""The least time that a caller who said it would watch has to begin."""
_NUM_READING = 2
"""Requests whose images are decoded at once: what bounds the memory that callers can make the server use for it."""
_LEAVE_S = 30.0
"""How long a stopping server waits for cancelled work to come to its next step boundary."""
_INTERNAL = Failure(reason=Reason.INTERNAL, message="an internal error ended the generation; the server's log has it")
_SHUTTING_DOWN = Failure(
    reason=Reason.SHUTTING_DOWN, message="the server is shutting down", retry_after_s=_UNKNOWN_WAIT_S
)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions:
    """The operator's choices about generations. Times in seconds."""

    max_queue: int = 16
    detach_grace_s: float = 15.0
    heartbeat_s: float = 15.0
    max_encoding: int = 4
    """Videos that may be encoded while the ranks are already at a later one; the next one waits beyond that."""
    retain_s: float = 3600.0
    """How long a generation that ended, and its video, can still be asked for."""
    retain_count: int = 64


class Engine:
    """Every accepted generation, from acceptance to its end. All methods belong to one asyncio loop."""

    def __init__(
        self,
        card: ModelCard,
        executors: Sequence[Executor],
        spool: Spool,
        *,
        options: EngineOptions,
        observe: Callable[[Observation], None],
        count_tokens: CountTokens,
    ) -> None:
        self.card = card
        self._intake = Intake(card, count_tokens)
        self._may_read = asyncio.Semaphore(_NUM_READING)
        self._replicas = Replicas(executors)
        self._replicas.fatal.add_done_callback(self._fail_waiting)
        self._spool = spool
        self._options = options
        self._observe = observe
        self._queue = AdmissionQueue(options.max_queue)
        self._generations: dict[str, GenerationLog] = {}
        self._by_request_id: dict[str, str] = {}
        self._pace = Pace()
        self._changed = Bell()
        self._draining = False
        self._drain_until = math.inf
        # More than may hang over: the videos that the ranks are at are encoded meanwhile, too.
        num_encoding = options.max_encoding + self._replicas.count
        self._threads = ThreadPoolExecutor(num_encoding, thread_name_prefix="encoder")
        self._may_encode = asyncio.Semaphore(num_encoding)
        self._tasks: set[asyncio.Task[None]] = set()
        self._scheduling: list[asyncio.Task[None]] = []

    # ---- life -------------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Begin to start the ranks. Requests are admitted from now on and wait for them."""
        self._replicas.start()
        self._scheduling = [self._background(self._schedule(replica)) for replica in self._replicas]

    async def drain(self, timeout_s: float) -> None:
        """Admit nothing more, let what was accepted end and be read, and cancel what has not by `timeout_s`.

        A second call may bring that time forward for the first one, too.
        """
        self._draining = True
        self._replicas.changed.ring()
        loop = asyncio.get_running_loop()
        self._drain_until = min(self._drain_until, loop.time() + timeout_s)
        self._changed.ring()
        while self._busy() and loop.time() < self._drain_until:
            await rang(self._changed.ticket(), self._drain_until - loop.time())
        unfinished = self._unfinished()
        for job in unfinished:
            self._stop(job, _SHUTTING_DOWN)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_LEAVE_S):
                for job in unfinished:
                    await job.ended.wait()

    async def stop(self) -> None:
        """End the ranks and every task. What is still unfinished ends as CANCELLED: drain first."""
        for job in self._unfinished():
            if job.running is not None:
                job.running.encoding.abort()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._replicas.stop()
        await asyncio.to_thread(self._threads.shutdown)
        for job in self._unfinished():
            self._end_failed(job, _SHUTTING_DOWN)

    @property
    def fatal(self) -> asyncio.Future[str]:
        """Set with a sentence when no ranks can be brought to life again."""
        return self._replicas.fatal

    def status(self) -> EngineStatus:
        plan, ready = self._replicas.plan, self._replicas.ready
        return EngineStatus(
            ready=bool(ready) and not self._draining and not self.fatal.done(),
            detail="the server is shutting down" if self._draining else self._replicas.detail,
            topology=plan.topology,
            num_replicas=self._replicas.count,
            device=ready[0].device if ready else "",
            dtype=ready[0].dtype if ready else "",
            attention=ready[0].attention if ready else "",
            load_format=plan.load_format,
            queue_limit=self._options.max_queue,
            num_queued=len(self._queue),
            num_running=self._replicas.num_running,
            rank_memory=self._replicas.rank_memory,
        )

    async def status_changes(self) -> AsyncGenerator[bool, None]:
        """Readiness now, and again each time it changes."""
        known: bool | None = None
        while True:
            ticket = self._replicas.changed.ticket()
            ready = self.status().ready
            if ready is not known:
                known = ready
                yield ready
            await rang(ticket, None)

    # ---- requests ---------------------------------------------------------------------------------------------------

    async def submit(
        self, request: GenerationRequest, *, watched: bool, found: tuple[Violation, ...] = ()
    ) -> Generation:
        """Accept `request`, or find the generation that the same request id and body made before.

        `watched` says that the caller is about to watch: when nobody does, the detach grace runs from now. `found` is
        what is wrong with the request already, to be told with the rest.

        Raises:
            ServiceError: INVALID_REQUEST, REQUEST_ID_REUSED, QUEUE_FULL, SHUTTING_DOWN.
        """
        try:
            asked = await self._fingerprint(request)
            job = None if found else self._known(asked)
            if job is None:
                prepared = await self._prepare(request, found)
                # The same request may have come a second time meanwhile; from here on nothing waits.
                job = self._known(asked) or self._admit(asked, prepared, watched=watched)
        except ServiceError as error:
            self._observe(Refused(reason=error.failure.reason))
            raise
        return job.snapshot()

    def get(self, name: str) -> Generation:
        """Raises: ServiceError: GENERATION_NOT_FOUND."""
        return self._find(name).snapshot()

    def list(
        self, *, page_size: int, after_name: str | None, states: frozenset[State]
    ) -> tuple[tuple[Generation, ...], bool]:
        """Generations in `states` (all when empty), newest first, after `after_name`; and whether there are more."""
        jobs = [job for job in reversed(self._generations.values()) if not states or job.state in states]
        if after_name is not None:
            edge = self._find(after_name).born
            jobs = [job for job in jobs if job.born < edge]
        return tuple(job.snapshot() for job in jobs[:page_size]), len(jobs) > page_size

    async def cancel(self, name: str) -> Generation:
        """End a generation and return when it has ended; one that has ended already stays as it is."""
        job = self._find(name)
        self._stop(job, Failure(reason=Reason.CANCELLED_BY_CALLER, message="the generation was cancelled"))
        await job.ended.wait()
        return job.snapshot()

    async def expire(self, name: str) -> None:
        """The deadline of the call that made this generation has passed: cancel it unless somebody else watches."""
        job = self._generations.get(name)
        if job is not None and not job.num_watchers:
            self._stop(job, Failure(reason=Reason.DEADLINE_EXCEEDED, message="the deadline of the call has passed"))

    async def delete(self, name: str) -> None:
        """Forget a generation that has ended, and its video.

        Raises:
            ServiceError: GENERATION_NOT_FOUND, GENERATION_NOT_FINISHED.
        """
        job = self._find(name)
        if not job.state.is_final:
            raise ServiceError(Reason.GENERATION_NOT_FINISHED, f"{name} is {job.state}: cancel it first")
        self._forget(job)

    # ---- watching ---------------------------------------------------------------------------------------------------

    async def watch(self, name: str, *, after: int = 0, from_offset: int = 0) -> AsyncGenerator[Record, None]:
        """What happened after record `after`, the video from byte `from_offset`, and then all that follows.

        Ends after Completed or Failed. Closing it only detaches. Progress, queue positions and previews that a
        newer one has replaced by the time the watcher reads on are skipped; nothing else is, and no byte is.
        """
        job = self._find(name)
        self._attach(job)
        try:
            async for record in self._follow(job, after, from_offset):
                yield record
        finally:
            self._detach(job)

    async def read_video(self, name: str, *, offset: int, limit: int | None) -> AsyncGenerator[Chunk, None]:
        """Bytes of a finished video.

        Raises:
            ServiceError: GENERATION_NOT_FOUND, GENERATION_NOT_FINISHED, OFFSET_OUT_OF_RANGE.
        """
        job = self._find(name)
        if job.state is not State.SUCCEEDED:
            raise ServiceError(Reason.GENERATION_NOT_FINISHED, f"{name} is {job.state}: it has no finished video")
        _check_offset(job, offset)
        end = job.video_bytes if limit is None else min(job.video_bytes, offset + limit)
        job.num_readers += 1
        try:
            while offset < end:
                data = await self._read(job, offset, end)
                yield Chunk(offset=offset, data=data)
                offset += len(data)
        finally:
            job.num_readers -= 1
            self._release(job)
            self._changed.ring()

    async def _follow(self, job: GenerationLog, sequence: int, offset: int) -> AsyncGenerator[Record, None]:
        sequence = min(sequence, job.last_sequence - job.state.is_final)  # the end is told to every watcher
        while True:
            ticket = job.changed.ticket()
            moved = False
            end = job.video_bytes  # before the records, of which one tells what these bytes are
            for record in job.after(sequence):
                if isinstance(record.event, Completed):
                    _check_offset(job, offset)
                    async for chunk in self._chunks(job, sequence, offset, job.video_bytes):
                        yield chunk
                yield record
                sequence, moved = record.sequence, True
                if isinstance(record.event, Completed | Failed):
                    return
            async for chunk in self._chunks(job, sequence, offset, end):
                yield chunk
                assert isinstance(chunk.event, Chunk)
                offset, moved = offset + len(chunk.event.data), True
            if not moved and not await rang(ticket, self._options.heartbeat_s):
                yield _unlogged(sequence, Heartbeat())

    async def _chunks(self, job: GenerationLog, sequence: int, offset: int, end: int) -> AsyncGenerator[Record, None]:
        while offset < end:
            data = await self._read(job, offset, end)
            yield _unlogged(sequence, Chunk(offset=offset, data=data))
            offset += len(data)

    async def _read(self, job: GenerationLog, offset: int, end: int) -> bytes:
        assert job.artifact is not None
        try:
            data = await asyncio.to_thread(job.artifact.read, offset, min(CHUNK_BYTES, end - offset))
        except OSError as error:
            sentence = f"the server could not read the video: {error.strerror}"
            raise ServiceError(Reason.STORAGE_FAILED, sentence) from error
        self._observe(BytesSent(count=len(data)))
        return data

    def _attach(self, job: GenerationLog) -> None:
        job.num_watchers += 1
        if job.grace is not None:
            job.grace.cancel()
            job.grace = None
        self._report_load()

    def _detach(self, job: GenerationLog) -> None:
        job.num_watchers -= 1
        if not job.num_watchers and not job.state.is_final:
            self._begin_grace(job)
        self._release(job)
        self._forget_surplus()
        self._report_load()

    def _begin_grace(self, job: GenerationLog, *, at_least_s: float = 0.0) -> None:
        if job.detach_grace_s == UNLIMITED_S:
            return
        grace_s = max(job.detach_grace_s, at_least_s)
        failure = Failure(reason=Reason.ABANDONED, message=f"nobody watched the generation for {grace_s:g} s")
        job.grace = asyncio.get_running_loop().call_later(grace_s, self._stop, job, failure)

    # ---- admission --------------------------------------------------------------------------------------------------

    def _known(self, request: GenerationRequest) -> GenerationLog | None:
        name = self._by_request_id.get(request.request_id or "")
        if name is None:
            return None
        job = self._generations[name]
        if job.request != request:
            sentence = f"request_id {request.request_id} was used before with another body, for {name}"
            raise ServiceError(Reason.REQUEST_ID_REUSED, sentence)
        return job

    async def _fingerprint(self, request: GenerationRequest) -> GenerationRequest:
        if request.image is None and request.last_image is None:
            return request
        return await asyncio.to_thread(fingerprint, request)

    async def _prepare(self, request: GenerationRequest, found: tuple[Violation, ...]) -> Prepared:
        if self._intake.is_quick(request):
            return self._intake.prepare(request, found)
        self._check_room()  # now as well as later: what would be refused anyway is not decoded first
        await self._may_read.acquire()
        reading = asyncio.ensure_future(asyncio.to_thread(self._intake.prepare, request, found))
        reading.add_done_callback(self._note_end_of_reading)
        return await asyncio.shield(reading)  # a caller who leaves ends no thread: its place is taken until that ends

    def _note_end_of_reading(self, reading: "asyncio.Future[Prepared]") -> None:
        self._may_read.release()
        if not reading.cancelled():
            reading.exception()  # whoever still waits for it is told; nobody has to

    def _admit(self, request: GenerationRequest, prepared: Prepared, *, watched: bool) -> GenerationLog:
        video = prepared.video
        self._check_room()
        unset_grace = self._options.detach_grace_s if watched else UNLIMITED_S
        grace_s = unset_grace if request.detach_grace_s is None else request.detach_grace_s
        job = GenerationLog(f"generations/{uuid.uuid4()}", request, prepared, detach_grace_s=grace_s)
        self._generations[job.name] = job
        if request.request_id is not None:
            self._by_request_id[request.request_id] = job.name
        job.log(
            Accepted(
                name=job.name,
                video=video,
                warnings=job.warnings,
                max_duration_s=request.max_duration_s,
                detach_grace_s=grace_s,
            )
        )
        self._observe(Admitted(name=job.name, request_id=request.request_id))
        self._bound_duration(job)
        self._begin_grace(job, at_least_s=_ATTACH_S if watched else 0.0)
        self._queue.push(job)
        self._tell_positions()
        return job

    def _check_room(self) -> None:
        if self._draining or self.fatal.done():
            raise ServiceError(Reason.SHUTTING_DOWN, _SHUTTING_DOWN.message, retry_after_s=_UNKNOWN_WAIT_S)
        limit, num_next = self._options.max_queue, self._replicas.num_alive
        if len(self._queue) + self._replicas.num_running >= limit + num_next:
            ahead = "the one that is" if num_next == 1 else f"the {num_next} that are"
            sentence = f"{limit} generations wait behind {ahead} next; no more are accepted now"
            raise ServiceError(Reason.QUEUE_FULL, sentence, retry_after_s=self._wait_for_room_s())

    def _wait_for_room_s(self) -> float:
        left = self._replicas.next_end_s()
        return _UNKNOWN_WAIT_S if left is None else max(1.0, left)

    def _bound_duration(self, job: GenerationLog) -> None:
        bound_s = job.request.max_duration_s
        if bound_s is not None:
            failure = Failure(
                reason=Reason.MAX_DURATION_EXCEEDED, message=f"not complete within max_duration of {bound_s:g} s"
            )
            job.timers.append(asyncio.get_running_loop().call_later(bound_s, self._stop, job, failure))

    def _tell_positions(self) -> None:
        """Log each waiting generation's place where it has changed."""
        starts_s = self._replicas.starts_s(self._pace.expect_all(job.video) for job in self._queue)
        for position, (job, eta_s) in enumerate(zip(self._queue, starts_s, strict=True)):
            last = job.records[-1].event
            if not (isinstance(last, Queued) and last.position == position):
                job.log(Queued(position=position, eta_s=eta_s))
        self._report_load()

    # ---- running ----------------------------------------------------------------------------------------------------

    async def _schedule(self, replica: Replica) -> None:
        """Give its ranks one generation after the other, for as long as they can be brought to life."""
        while True:
            await self._may_encode.acquire()
            try:
                job = await self._next(replica.executor)
            except UnusableModelError:
                return
            replica.job = job
            job.start()
            self._tell_positions()
            self._observe(Started(name=job.name, wait_s=job.age_s))
            with self._replicas.named_in_logs(replica), structlog.contextvars.bound_contextvars(generation=job.name):
                await self._run(job, replica)
            replica.job = None
            self._tell_positions()

    async def _next(self, executor: Executor) -> GenerationLog:
        """The first in line, who stands there until there are ranks that can begin."""
        while not (len(self._queue) and executor.is_ready):
            await self._queue.filled()
            await executor.wait_ready()
        return self._queue.pop()

    def _fail_waiting(self, fatal: "asyncio.Future[str]") -> None:
        if fatal.cancelled():
            return
        sentence = f"the ranks cannot be started: {fatal.result()}"
        for job in self._queue:
            self._queue.remove(job)
            self._end_failed(job, Failure(reason=Reason.RANK_DIED, message=sentence))

    async def _run(self, job: GenerationLog, replica: Replica) -> None:
        """Have the ranks compute `job`. Its encoding may go on when this returns."""
        leave_ranks = functools.partial(replica.executor.cancel, job.name)
        try:
            job.artifact = self._spool.create(job.name.rpartition("/")[2], "." + job.video.output_format)
            run = Running(Encoding(job.video, job.artifact, self._spool.directory), leave_ranks)
        except StorageFailedError as error:
            self._may_encode.release()
            self._end_failed(job, storage_failure(error))
            return
        job.running = run
        run.info = asyncio.ensure_future(
            asyncio.to_thread(describe, job.video)
        )  # it opens an encoder, which takes a while
        try:
            ended = await self._follow_ranks(job, run, replica)
        except ServiceError as error:
            run.stop_with(error.failure)
            ended = None
        if ended is None or run.failure is not None:
            run.encoding.abort()
        else:
            run.encoding.end_of_frames()
        self._begin_to_finish(job, run, None if ended is None else replica.rank_memory(ended.memory))

    def _begin_to_finish(self, job: GenerationLog, run: Running, memory: tuple[RankMemory, ...] | None) -> None:
        if not run.is_finishing:
            run.is_finishing = True
            self._background(self._finish(job, run, memory))

    async def _follow_ranks(self, job: GenerationLog, run: Running, replica: Replica) -> RunEnded:
        frames = job.take_frames()
        running = replica.executor.run(job.name, job.video, frames, run.encoding.take_frame)
        async with contextlib.aclosing(running) as messages:
            async for message in messages:
                if isinstance(message, RunEnded):
                    self._take_end(job, run, message)
                    return message
                if isinstance(message, RankFailed):  # the caller need not wait until all ranks have left
                    run.stop_with(message.failure)
                    run.encoding.abort()
                    self._begin_to_finish(job, run, None)
                    continue
                if isinstance(message, PreviewMade):
                    await self._take_preview(job, message)
                    continue
                if message.progress.stage is Stage.DECODE and run.info is not None:
                    await asyncio.wait([run.info])
                self._take_step(job, run, message)
                if run.failure is not None or run.encoding.put_failure is not None:
                    run.leave_ranks()
        raise AssertionError("the executor ended without RunEnded")

    async def _take_preview(self, job: GenerationLog, made: PreviewMade) -> None:
        job.clock.previews_s += made.time_s
        try:
            data = await asyncio.to_thread(preview, made.rgb, width=made.width, height=made.height)
        except Exception:  # noqa: BLE001  whatever is wrong with a picture, it must not cost the video
            structlog.get_logger().exception("a preview could not be encoded", step=made.step)
            return
        if not job.state.is_final:
            job.log(Preview(step=made.step, media_type=PREVIEW_TYPE, data=data))

    def _take_step(self, job: GenerationLog, run: Running, done: StepDone) -> None:
        progress = done.progress
        if progress.step == 0:
            self._enter(job, progress.stage)
        if progress.stage is Stage.DECODE:
            if progress.step == 0:
                self._begin_encoding(job, run)
            else:
                self._observe(FramesDecoded(count=1 if progress.step == 1 else self.card.temporal_factor))
        if progress.expert is not None and progress.step_time_s is not None:
            ended = StepEnded(
                name=job.name,
                expert=progress.expert,
                seconds=progress.step_time_s,
                skew_s=skew_s(done.times),
            )
            self._observe(ended)
        self._log_progress(job, progress)

    def _begin_encoding(self, job: GenerationLog, run: Running) -> None:
        assert run.info is not None
        if (error := run.info.exception()) is not None:
            self._note_crash_of_encoder(error, job, run)
            return
        job.log(run.info.result())
        run.task = asyncio.create_task(self._encode(job, run))
        run.task.add_done_callback(lambda task: self._note_end_of_encoder(task, job, run))

    def _log_progress(self, job: GenerationLog, progress: Progress) -> None:
        eta_s = remaining(progress, job.video, self._pace, job.clock.elapsed_s)
        job.log(replace(progress, eta_s=eta_s))

    def _enter(self, job: GenerationLog, stage: Stage) -> None:
        previews_s = job.clock.previews_s
        ended = job.clock.enter(stage)
        if ended is not None:
            self._pace.learn(ended.stage, job.video, max(0.0, ended.seconds - previews_s))
            self._observe(StageEnded(name=job.name, stage=ended.stage, seconds=ended.seconds))

    def _take_end(self, job: GenerationLog, run: Running, ended: RunEnded) -> None:
        if run.encoding.put_failure is not None:
            run.stop_with(run.encoding.put_failure)
        if ended.failure is not None:
            run.stop_with(ended.failure)
        if run.failure is None:
            assert not ended.cancelled, f"{job.name} left its ranks without a reason"
            self._enter(job, Stage.ENCODE)
            self._log_progress(
                job,
                Progress(stage=Stage.ENCODE, step=run.encoding.num_encoded, total_steps=job.video.num_frames),
            )

    async def _encode(self, job: GenerationLog, run: Running) -> None:
        """Encode on a thread; a failure there also stops the ranks."""
        loop = asyncio.get_running_loop()

        def on_bytes() -> None:
            loop.call_soon_threadsafe(job.changed.ring)

        try:
            await loop.run_in_executor(self._threads, run.encoding.encode, on_bytes)
        except FramesAbortedError:
            pass  # whoever aborted has said why
        except ServiceError as error:
            run.stop_with(error.failure)
            run.leave_ranks()
        else:
            run.is_encoded = True

    async def _finish(self, job: GenerationLog, run: Running, memory: tuple[RankMemory, ...] | None) -> None:
        """Wait for the encoder, then end the generation. memory: None when the ranks did not compute it to its end."""
        if run.task is not None:
            await asyncio.wait([run.task])
        try:
            if job.state.is_final:
                return  # a bug elsewhere has ended it
            if memory is not None and run.is_encoded:
                await self._end_complete(job, memory)
            else:
                self._end_failed(job, run.failure or _INTERNAL)
        finally:
            self._may_encode.release()  # not before its file is closed: on a slow disk ever more would wait for that

    async def _end_complete(self, job: GenerationLog, memory: tuple[RankMemory, ...]) -> None:
        assert job.artifact is not None
        # Where it was encoded, and so has a thread still: on a slow disk closing files must not hold those of readers.
        loop = asyncio.get_running_loop()
        try:
            size_bytes, sha256 = await loop.run_in_executor(self._threads, job.artifact.seal)
        except StorageFailedError as error:
            self._end_failed(job, storage_failure(error))
            return
        ended = job.clock.leave()
        assert ended is not None
        self._pace.learn(ended.stage, job.video, ended.seconds)
        self._observe(StageEnded(name=job.name, stage=ended.stage, seconds=ended.seconds))
        job.succeed(
            Completed(
                size_bytes=size_bytes,
                sha256=sha256,
                stage_times=job.clock.times,
                rank_memory=memory,
            )
        )
        self._after_end(job, None)

    def _end_failed(self, job: GenerationLog, failure: Failure) -> None:
        job.fail(failure)
        self._after_end(job, failure)

    def _after_end(self, job: GenerationLog, failure: Failure | None) -> None:
        job.running = None
        self._observe(
            Ended(
                name=job.name,
                state=job.state,
                reason=failure.reason if failure else None,
                duration_s=job.age_s,
                message=failure.message if failure else "",
            )
        )
        self._retain(job)
        self._release(job)
        self._report_load()

    def _stop(self, job: GenerationLog, failure: Failure) -> None:
        """Bring `job` to an end with `failure`: at once when it waits, at the next step boundary when it runs."""
        if job.state is State.QUEUED:
            self._queue.remove(job)
            self._end_failed(job, failure)
            self._tell_positions()
        elif job.running is not None:
            job.running.stop_with(failure)
            job.running.encoding.abort()
            job.running.leave_ranks()

    # ---- what has ended ---------------------------------------------------------------------------------------------

    def _retain(self, job: GenerationLog) -> None:
        """Keep what ended for a while."""
        job.expires_s = (job.ended_s or 0.0) + self._options.retain_s
        job.timers.append(asyncio.get_running_loop().call_later(self._options.retain_s, self._forget, job))
        self._forget_surplus()

    def _forget_surplus(self) -> None:
        """The oldest goes first when there are too many; one that is watched stays."""
        ended = [other for other in self._generations.values() if other.state.is_final and not other.num_watchers]
        for oldest in ended[: max(0, len(ended) - self._options.retain_count)]:
            self._forget(oldest)

    def _forget(self, job: GenerationLog) -> None:
        for timer in job.timers:
            timer.cancel()
        self._generations.pop(job.name, None)
        self._by_request_id.pop(job.request.request_id or "", None)
        self._release(job)

    def _release(self, job: GenerationLog) -> None:
        """Delete a file that nobody can ask for any more, or that will never be whole, once nobody reads it."""
        is_wanted = job.name in self._generations and job.state not in (State.FAILED, State.CANCELLED)
        in_use = job.num_watchers or job.num_readers
        if not is_wanted and not in_use and job.artifact is not None:
            artifact, job.artifact = job.artifact, None
            artifact.delete()

    # ---- small things -----------------------------------------------------------------------------------------------

    def _find(self, name: str) -> GenerationLog:
        job = self._generations.get(name)
        if job is None:
            raise ServiceError(Reason.GENERATION_NOT_FOUND, f"no generation is named {name!r}; it may have expired")
        return job

    def _unfinished(self) -> tuple[GenerationLog, ...]:
        return tuple(job for job in self._generations.values() if not job.state.is_final)

    def _busy(self) -> bool:
        return any(not job.state.is_final or job.num_watchers or job.num_readers for job in self._generations.values())

    def _report_load(self) -> None:
        num_watchers = sum(job.num_watchers for job in self._generations.values())
        self._observe(
            LoadChanged(num_queued=len(self._queue), num_running=self._replicas.num_running, num_watchers=num_watchers)
        )
        self._changed.ring()

    def _background(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._note_end)
        return task

    def _note_end(self, task: asyncio.Task[None]) -> None:
        """A bug in the work that every generation depends on ends the server, which is better than a silent one."""
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            structlog.get_logger().error("a vital task of the engine failed", exc_info=error)
            self._replicas.give_up(f"internal error: {error!r}")
            for scheduling in self._scheduling:  # whose generations end now
                scheduling.cancel()
            for job in self._unfinished():
                self._end_after_a_bug(job)

    def _end_after_a_bug(self, job: GenerationLog) -> None:
        if job.state is State.QUEUED:
            self._queue.remove(job)
        elif job.running is not None:
            job.running.encoding.abort()
        self._end_failed(job, _INTERNAL)

    def _note_end_of_encoder(self, task: asyncio.Task[None], job: GenerationLog, run: Running) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            self._note_crash_of_encoder(error, job, run)

    def _note_crash_of_encoder(self, error: BaseException, job: GenerationLog, run: Running) -> None:
        structlog.get_logger().error("the encoder failed", exc_info=error)
        run.stop_with(_INTERNAL)
        run.leave_ranks()


def _unlogged(sequence: int, event: Event) -> Record:
    return Record(sequence=sequence, time_s=time.time(), event=event)


def _check_offset(job: GenerationLog, offset: int) -> None:
    if not 0 <= offset <= job.video_bytes:
        sentence = f"offset {offset} is past the end of the video, which has {job.video_bytes} bytes"
        raise ServiceError(Reason.OFFSET_OUT_OF_RANGE, sentence)
