"""One rank, from its start to its end: load the model, then run the orders that rank 0 shares, step by step.

The only module of the engine that touches torch. Knows the pipeline and the mesh; does not know the server's loop.
"""

import os
import signal
import threading
from contextlib import closing
from multiprocessing.connection import Connection

import structlog
import torch

from wan_grpc.domain.errors import Failure, Reason, UnusableModelError
from wan_grpc.domain.events import Progress
from wan_grpc.engine import messages
from wan_grpc.engine.lifeline import end_with_parent
from wan_grpc.engine.messages import (
    Cancel,
    FrameReady,
    FromRank,
    LoadFailed,
    MemoryUse,
    Order,
    RankConfig,
    Ready,
    Run,
    RunEnded,
    SlotFreed,
    StepDone,
    Stop,
)
from wan_grpc.engine.shared import FrameRing
from wan_grpc.optimize.attention import choose
from wan_grpc.parallel.mesh import Mesh, PeersLostError, join
from wan_grpc.pipeline import device as devices
from wan_grpc.pipeline.load import DTYPES, load
from wan_grpc.pipeline.video import VideoPipeline
from wan_grpc.telemetry import logs

# What a rank says after each step. The largest word wins, so a failure outranks a cancel.
GO, CANCEL, FAIL, OUT_OF_MEMORY = 0, 1, 2, 3
_FAILURES = {
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
    _die_with_the_server(lifeline)
    logs.configure(level=config.log_level, log_format=config.log_format)
    structlog.contextvars.bind_contextvars(rank=config.rank)
    ring = FrameRing(ring_fd, slot_bytes=config.slot_bytes, num_slots=config.num_slots)
    os.close(ring_fd)
    try:
        mesh, pipeline = _prepare(config)
    except UnusableModelError as error:
        pipe.send_bytes(messages.encode(LoadFailed(rank=config.rank, message=str(error))))
        raise SystemExit(1) from error
    pipe.send_bytes(messages.encode(_ready(config.rank, pipeline)))
    try:
        _serve(mesh, pipeline, Outlet(pipe, ring))
    except PeersLostError as error:
        structlog.get_logger().warning("another rank is gone, so this one ends, too", detail=str(error))
        raise SystemExit(1) from error
    mesh.leave()


def _die_with_the_server(lifeline: Connection) -> None:
    """End this process as soon as the server is gone, whatever it is doing, even inside a collective."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(
            number, signal.SIG_IGN
        )  # a rank is told to stop by message; Ctrl-C reaches the whole process group
    end_with_parent()  # the forkserver, which itself ends with the server
    threading.Thread(target=_wait_for_end, args=(lifeline,), name="lifeline", daemon=True).start()


def _wait_for_end(lifeline: Connection) -> None:
    try:
        lifeline.recv_bytes()
    except (EOFError, OSError):
        os._exit(1)


def _prepare(config: RankConfig) -> tuple[Mesh, VideoPipeline]:
    """Meet the other ranks and load the model."""
    device = devices.resolve_device(config.device, local_rank=config.rank)
    devices.make_repeatable(device, num_threads=config.cpu_threads)  # before anything is computed here
    mesh = join(config.topology, config.rank, store_path=config.rendezvous)
    dtype = _dtype(config.dtype, device)
    attention = choose("auto", device=torch.device(device), dtype=DTYPES[dtype])
    pipeline = load(
        config.checkpoint,
        device=device,
        dtype=dtype,
        load_format=config.load_format,
        attention=attention.function,
        attention_name=attention.name,
    )
    return mesh, pipeline


def _ready(rank: int, pipeline: VideoPipeline) -> Ready:
    return Ready(
        rank=rank,
        device=devices.describe_device(pipeline.device),
        dtype=pipeline.dtype_name,
        attention=pipeline.attention_name,
        used_bytes=devices.used_bytes(pipeline.device),
    )


def _dtype(wanted: str, device: str) -> str:
    if wanted != "auto":
        return wanted
    return "float32" if device == "cpu" else "bfloat16"


class Outlet:
    """Rank 0's line to the server: messages both ways, frames through the ring. Other ranks never use theirs."""

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


def _serve(mesh: Mesh, pipeline: VideoPipeline, outlet: Outlet) -> None:
    while True:
        order = _shared_order(mesh, outlet)
        if isinstance(order, Stop):
            return
        with structlog.contextvars.bound_contextvars(generation=order.generation):
            ended = RankRun(mesh, pipeline, outlet, order).to_end()
        if mesh.is_first:
            outlet.send(ended)


def _shared_order(mesh: Mesh, outlet: Outlet) -> Order:
    payload = messages.encode(outlet.next_order()) if mesh.is_first else None
    return messages.decode_order(mesh.share(payload))


class RankRun:
    """One generation on one rank. Every rank says exactly one word per step, and leaves at the first that is not GO."""

    def __init__(self, mesh: Mesh, pipeline: VideoPipeline, outlet: Outlet, order: Run) -> None:
        self._mesh = mesh
        self._pipeline = pipeline
        self._outlet = outlet
        self._order = order

    def to_end(self) -> RunEnded:
        devices.reset_peak(self._pipeline.device)
        word = self._last_word()
        self._pipeline.free_memory()
        return RunEnded(
            generation=self._order.generation,
            memory=self._memory(),
            cancelled=word == CANCEL,
            failure=_FAILURES.get(word),
        )

    def _last_word(self) -> int:
        try:
            self._compute()
        except LeaveRun as left:
            return left.word
        except PeersLostError:
            raise
        except Exception as error:  # noqa: BLE001  the rank loop is one of the two places that must outlive any error
            structlog.get_logger().exception("generation failed on this rank")
            return self._mesh.agree(OUT_OF_MEMORY if devices.is_out_of_memory(error) else FAIL)
        return self._mesh.agree(self._wish())

    def _compute(self) -> None:
        slices = self._pipeline.generate(self._order.video, frames=self._order.frames, on_step=self._finish_step)
        with closing(slices):
            for frames in slices:
                if self._mesh.is_first:
                    for frame in frames:
                        self._outlet.send_frame(frame, self._order.generation)

    def _finish_step(self, progress: Progress) -> None:
        """Tell what the device has finished, then go on only if every rank does."""
        if self._mesh.is_first:
            self._outlet.send(StepDone(progress=progress))
        agreed = self._mesh.agree(self._wish())
        if agreed != GO:
            raise LeaveRun(agreed)

    def _wish(self) -> int:
        """What this rank says when it has nothing to complain about: rank 0 speaks for the server."""
        return CANCEL if self._mesh.is_first and self._outlet.is_cancelled(self._order.generation) else GO

    def _memory(self) -> tuple[MemoryUse, ...]:
        device = self._pipeline.device
        devices.synchronize(device)  # a device that can no longer compute ends this rank here, and the group restarts
        used = self._mesh.gather(devices.used_bytes(device))
        peak = self._mesh.gather(devices.peak_bytes(device))
        return tuple(MemoryUse(used_bytes=u, peak_bytes=p) for u, p in zip(used, peak, strict=True))
