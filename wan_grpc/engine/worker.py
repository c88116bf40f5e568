"""One rank, from its start to its end: load the model, then run the orders that rank 0 shares, step by step.

The only module of the engine that touches torch. Knows the pipeline and the mesh; does not know the server's loop.
"""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from functools import partial
from multiprocessing.connection import Connection

import structlog
import torch

from wan_grpc.domain.errors import Failure, Reason, UnusableModelError
from wan_grpc.domain.events import Progress
from wan_grpc.engine import messages
from wan_grpc.engine.lifeline import end_with_parent
from wan_grpc.engine.links import own_address
from wan_grpc.engine.messages import (
    Cancel,
    FrameReady,
    FromRank,
    LoadFailed,
    MemoryUse,
    Order,
    PreviewMade,
    RankAccount,
    RankConfig,
    RankFailed,
    Ready,
    Run,
    RunEnded,
    SlotFreed,
    StepDone,
    Stop,
)
from wan_grpc.engine.rendezvous import dial_store
from wan_grpc.engine.shared import FrameRing
from wan_grpc.optimize import convolution
from wan_grpc.optimize.attention import Attention, choose
from wan_grpc.parallel.cfg import PassSplit
from wan_grpc.parallel.group import ExchangeBrokenError
from wan_grpc.parallel.mesh import Agreed, Mesh, PeersLostError, join
from wan_grpc.parallel.sequence import SequenceSplit
from wan_grpc.parallel.store import RelayedStore
from wan_grpc.parallel.tensor import split_text_model
from wan_grpc.parallel.text import TextSplit
from wan_grpc.parallel.vae import split_vae
from wan_grpc.pipeline import device as devices
from wan_grpc.pipeline.load import DTYPES, load
from wan_grpc.pipeline.video import VideoPipeline
from wan_grpc.telemetry import logs

# What a rank says after each step. The largest word wins, so a failure outranks a cancel. LOST is said by ranks whose
# exchange broke off because another one failed, which has a word of its own for it.
GO, CANCEL, LOST, FAIL, OUT_OF_MEMORY = range(5)
_FAILURES = {
    LOST: Failure(
        reason=Reason.RANK_DIED, message="an exchange of data between the ranks broke off; try again", retry_after_s=1.0
    ),
    FAIL: Failure(reason=Reason.INTERNAL, message="an internal error ended the generation; the server's log has it"),
    OUT_OF_MEMORY: Failure(
        reason=Reason.OUT_OF_MEMORY,
        message="the device ran out of memory for this video; ask for fewer frames or a smaller size",
    ),
}


class LeaveRun(Exception):
    """Raised out of a step when the ranks agreed to leave the generation there."""

    def __init__(self, word: int) -> None:
        super().__init__(f"agreed word {word}")
        self.word = word


def main(config_bytes: bytes, pipe: Connection, lifeline: Connection, ring_fd: int) -> None:
    """Entry point of a rank process."""
    config = messages.decode_config(config_bytes)
    alarm = Alarm()
    _die_with_the_server(lifeline, alarm)
    logs.configure(level=config.log_level, log_format=config.log_format)
    structlog.contextvars.bind_contextvars(rank=config.first_rank + config.rank)
    ring = FrameRing(ring_fd, slot_bytes=config.slot_bytes, num_slots=config.num_slots)
    os.close(ring_fd)
    try:
        mesh, pipeline = _prepare(config)
    except UnusableModelError as error:
        pipe.send_bytes(messages.encode(LoadFailed(rank=config.rank, message=str(error))))
        raise SystemExit(1) from error
    pipe.send_bytes(messages.encode(_ready(mesh, pipeline)))
    try:
        _serve(mesh, pipeline, Outlet(pipe, ring), alarm)
    except PeersLostError as error:
        structlog.get_logger().warning("another rank is gone, so this one ends, too", detail=str(error))
        raise SystemExit(1) from error
    mesh.leave()


class Alarm:
    """Lets the server call this rank out of an exchange that another rank will never join."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._generation: str | None = None
        self._mesh: Mesh | None = None

    @contextmanager
    def armed(self, mesh: Mesh, generation: str) -> Iterator[None]:
        """Within the block `ring` for this generation aborts the mesh."""
        with self._lock:
            self._mesh, self._generation = mesh, generation
        try:
            yield
        finally:
            with self._lock:
                self._mesh = self._generation = None

    def ring(self, generation: str) -> None:
        """From another thread. One that comes too late, for a generation that is left already, is nothing."""
        with self._lock:
            if self._mesh is not None and self._generation == generation:
                self._mesh.abort()


def _die_with_the_server(lifeline: Connection, alarm: Alarm) -> None:
    """End this process as soon as the server is gone, whatever it is doing, even inside a collective."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(
            number, signal.SIG_IGN
        )  # a rank is told to stop by message; Ctrl-C reaches the whole process group
    end_with_parent()  # the forkserver, which itself ends with the server
    threading.Thread(target=_follow_lifeline, args=(lifeline, alarm), name="lifeline", daemon=True).start()


def _follow_lifeline(lifeline: Connection, alarm: Alarm) -> None:
    while True:
        try:
            told = lifeline.recv_bytes()
        except (EOFError, OSError):
            os._exit(1)
        generation = messages.decode_abort(told).generation
        # On a thread of its own: whatever becomes of an abort, this one must hear the end of the server.
        threading.Thread(target=alarm.ring, args=(generation,), name="alarm", daemon=True).start()


def _meet(config: RankConfig, device: torch.device) -> Mesh:
    if config.head is None:
        return join(config.topology, config.rank, device=device, store_path=config.rendezvous)
    dial = partial(dial_store, config.head)
    with closing(dial()) as link:
        address = own_address(link)
    return join(config.topology, config.rank, device=device, store=RelayedStore(dial), address=address)


def _prepare(config: RankConfig) -> tuple[Mesh, VideoPipeline]:
    """Meet the other ranks and load the model."""
    device = devices.resolve_device(config.device, local_rank=config.local_rank, demand=config.demand)
    devices.make_repeatable(device, num_threads=config.cpu_threads)  # before anything is computed here
    mesh = _meet(config, torch.device(device))
    dtype = _dtype(config.dtype, device)
    attention = choose("auto", device=torch.device(device), dtype=DTYPES[dtype])
    pipeline = load(
        config.checkpoint,
        device=device,
        dtype=dtype,
        load_format=config.load_format,
        attention_name=attention.name,
    )
    divide(pipeline, mesh, attention)
    return mesh, pipeline


def divide(pipeline: VideoPipeline, mesh: Mesh, attention: Attention) -> None:
    """Let the ranks of `mesh` compute each video together. With one rank every part is the whole."""
    sequence = SequenceSplit(mesh, attention.function, attention.with_lse)
    for transformer in pipeline.transformers.values():
        transformer.set_attention(sequence.attend)
        transformer.token_split = sequence
    pipeline.run_passes = PassSplit(mesh, sequence)
    split_text_model(pipeline.text_encoder.model, mesh)
    pipeline.text_encoder.spread = TextSplit(mesh, pipeline.text_encoder.blank)
    convolve = convolution.choose(pipeline.device, pipeline.vae.dtype)
    convolution.install(pipeline.vae, convolve)
    pipeline.strips = split_vae(pipeline.vae, mesh, convolve)
    pipeline.free_memory()


def _ready(mesh: Mesh, pipeline: VideoPipeline) -> Ready:
    return Ready(
        rank=mesh.rank,
        device=devices.describe_device(pipeline.device),
        dtype=pipeline.dtype_name,
        attention=pipeline.attention_name,
        used_bytes=devices.used_bytes(pipeline.device),
        links_s=mesh.links_s,
    )


def _dtype(wanted: str, device: str) -> str:
    if wanted != "auto":
        return wanted
    return "float32" if device == "cpu" else "bfloat16"


class Outlet:
    """A rank's line to the server. Orders come and frames leave on that of rank 0; others tell of failures alone."""

    def __init__(self, pipe: Connection, ring: FrameRing) -> None:
        self._pipe = pipe
        self._ring = ring
        self._free = list(range(ring.num_slots))
        self._cancelled: str | None = None

    def send(self, message: FromRank) -> None:
        self._pipe.send_bytes(messages.encode(message))

    def next_order(self) -> Order:
        """Wait until the server wants something done."""
        while True:
            order = self._receive()
            if order is not None:
                return order

    def is_cancelled(self, generation: str) -> bool:
        while self._pipe.poll():
            order = self._receive()
            assert order is None, f"order {order} while {generation} runs"
        return self._cancelled == generation

    def send_frame(self, frame: torch.Tensor, generation: str) -> None:
        """Put one [H, W, 3] frame into a free slot, waiting for the server to free one.

        A frame of a cancelled generation is dropped: nobody may be left to free a slot for it.
        """
        while not self._free:
            if self._cancelled == generation:
                return
            self._receive()
        slot = self._free.pop()
        with self._ring.slot(slot, frame.numel()) as view:
            torch.frombuffer(view, dtype=torch.uint8).copy_(frame.flatten())
        self.send(FrameReady(slot=slot))

    def _receive(self) -> Order | None:
        match messages.decode_to_rank(self._pipe.recv_bytes()):
            case SlotFreed(slot=slot):
                self._free.append(slot)
            case Cancel(generation=generation):
                self._cancelled = generation
            case Run() | Stop() as order:
                return order
        return None


def _serve(mesh: Mesh, pipeline: VideoPipeline, outlet: Outlet, alarm: Alarm) -> None:
    while True:
        order = _shared_order(mesh, outlet)
        if isinstance(order, Stop):
            return
        with structlog.contextvars.bound_contextvars(generation=order.generation):
            ended = RankRun(mesh, pipeline, outlet, order, alarm).to_end()
        if mesh.is_first:
            outlet.send(ended)


def _shared_order(mesh: Mesh, outlet: Outlet) -> Order:
    payload = messages.encode(outlet.next_order()) if mesh.is_first else None
    return messages.decode_order(mesh.share(payload))


class RankRun:
    """One generation on one rank. Every rank says exactly one word per step, and leaves at the first that is not GO."""

    def __init__(self, mesh: Mesh, pipeline: VideoPipeline, outlet: Outlet, order: Run, alarm: Alarm) -> None:
        self._mesh = mesh
        self._pipeline = pipeline
        self._outlet = outlet
        self._order = order
        self._alarm = alarm

    def to_end(self) -> RunEnded:
        devices.reset_peak(self._pipeline.device)
        word = self._last_word()
        self._pipeline.free_memory()  # also for new links, which take theirs from the device
        if word not in (GO, CANCEL):
            self._recover()
        accounts = self._accounts()
        return RunEnded(
            generation=self._order.generation,
            memory=tuple(account.memory for account in accounts),
            cancelled=word == CANCEL,
            failure=_FAILURES.get(word),
            traffic=tuple(account.traffic for account in accounts),
        )

    def _last_word(self) -> int:
        try:
            with self._alarm.armed(self._mesh, self._order.generation):
                self._compute()
            word = self._wish()
        except LeaveRun as left:
            return left.word
        except PeersLostError:
            raise
        except ExchangeBrokenError as error:
            word = self._complain_of_exchange(error)
        except Exception as error:  # noqa: BLE001  the rank loop is one of the two places that must outlive any error
            word = self._complain(error)
        if word not in (GO, CANCEL):
            self._mesh.drop()  # after the error's frames are gone, which hold links: others wait for these to break
        return self._mesh.agree(word).word

    def _complain(self, error: Exception) -> int:
        structlog.get_logger().exception("generation failed on this rank")
        return self._tell(OUT_OF_MEMORY if devices.is_out_of_memory(error) else FAIL)

    def _complain_of_exchange(self, error: ExchangeBrokenError) -> int:
        is_told = self._mesh.is_told
        log = structlog.get_logger()
        log.warning("an exchange with other ranks broke off", detail=str(error), exc_info=not is_told)
        return LOST if is_told else self._tell(LOST)

    def _tell(self, word: int) -> int:
        """Tell the server at once, which calls the other ranks out of what they wait for."""
        failed = RankFailed(generation=self._order.generation, rank=self._mesh.rank, failure=_FAILURES[word])
        with suppress(OSError):  # a server that is gone, which the lifeline takes care of
            self._outlet.send(failed)
        return word

    def _recover(self) -> None:
        """Links that may be broken or half used are given up and made anew; the weights stay."""
        self._mesh.drop()
        self._mesh.build()
        self._pipeline.text_encoder.forget()  # some ranks may remember what others have not heard

    def _compute(self) -> None:
        slices = self._pipeline.generate(
            self._order.video,
            frames=self._order.frames,
            on_step=self._finish_step,
            on_preview=self._show,
        )
        with closing(slices):
            for frames in slices:
                if self._mesh.is_first:
                    for frame in frames:
                        self._outlet.send_frame(frame, self._order.generation)

    def _finish_step(self, progress: Progress) -> None:
        """Tell what the devices of all ranks have finished, then go on only if every rank does."""
        agreed = self._agree(progress)
        if self._mesh.is_first and agreed.word in (GO, CANCEL):
            self._outlet.send(StepDone(progress=progress, times=agreed.times if progress.step else ()))
        if agreed.word != GO:
            raise LeaveRun(agreed.word)

    def _show(self, step: int, pictures: torch.Tensor, time_s: float) -> None:
        self._mesh.meter.lap()  # what was waited for here is not of the next step
        for picture in pictures:
            height, width, _ = picture.shape
            rgb = picture.contiguous().numpy().tobytes()
            self._outlet.send(PreviewMade(step=step, width=width, height=height, rgb=rgb, time_s=time_s))

    def _agree(self, progress: Progress) -> Agreed:
        if progress.step == 0:
            return self._mesh.agree(self._wish())
        waited_s = self._mesh.meter.lap()
        return self._mesh.agree(self._wish(), seconds=progress.step_time_s or 0.0, waited_s=waited_s)

    def _wish(self) -> int:
        """What this rank says when it has nothing to complain about: rank 0 speaks for the server."""
        return CANCEL if self._mesh.is_first and self._outlet.is_cancelled(self._order.generation) else GO

    def _accounts(self) -> tuple[RankAccount, ...]:
        """What the generation cost each rank, by rank."""
        device = self._pipeline.device
        devices.synchronize(device)  # a device that can no longer compute ends this rank here, and the group restarts
        memory = MemoryUse(used_bytes=devices.used_bytes(device), peak_bytes=devices.peak_bytes(device))
        mine = RankAccount(memory=memory, traffic=self._mesh.meter.take())
        return tuple(messages.decode_account(data) for data in self._mesh.gather(messages.encode(mine)))
