"""One incarnation of the rank processes: start them, talk to rank 0, notice any death, end them all.

Knows processes and pipes. Does not know torch, generations or whether a dead group is to be started again.
"""

import contextlib
import multiprocessing
import os
import signal
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import connection, forkserver
from multiprocessing.context import ForkServerProcess
from multiprocessing.reduction import DupFd
from pathlib import Path
from typing import Any, TypeAlias

from wan_grpc.domain.topology import Topology
from wan_grpc.engine import messages
from wan_grpc.engine.messages import FrameReady, FromRank, RankConfig, SlotFreed, Stop, ToRank
from wan_grpc.engine.shared import FrameRing, anonymous_file
from wan_grpc.pipeline.checkpoint import Checkpoint

_context = multiprocessing.get_context("forkserver")

TakeFrame: TypeAlias = Callable[[memoryview], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupPlan:
    """What a group of ranks is to be. The same plan serves every restart."""

    topology: Topology
    checkpoint: Checkpoint
    device: str
    dtype: str
    load_format: str
    cpu_threads: int
    max_frame_bytes: int
    directory: Path
    """A private directory of this server, for the file at which the ranks meet."""
    num_slots: int = 8
    log_format: str = "console"
    log_level: str = "info"


@dataclass(frozen=True, slots=True, kw_only=True)
class RanksDied:
    """At least one rank process ended without being told to. The rest of the group is of no use."""

    detail: str


GroupEvent: TypeAlias = FromRank | RanksDied


def prepare_forkserver() -> None:
    """Start the process that ranks are forked from. Call it before any gRPC object exists and before threads do.

    It imports torch, diffusers and transformers once, and leaves CUDA alone, so that each rank starts in a moment.
    """
    multiprocessing.set_forkserver_preload(["wan_grpc.engine.preloaded"])
    # Some library asks torch at import whether there is a GPU. Answered by the CUDA runtime, that would bar every fork
    # from CUDA for good; answered by NVML it touches nothing.
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    # CPU threads that wait for each other shall sleep: on shared cores, spinning was seen to take ten times as long.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    forkserver.ensure_running()


def run_rank(config: bytes, pipe: connection.Connection, lifeline: connection.Connection, ring_fd: int) -> None:
    """What a new rank process calls. Here, and not in the worker, so that the server never imports torch."""
    from wan_grpc.engine.worker import main

    main(config, pipe, lifeline, ring_fd)


class HandedOver:
    """A file descriptor on its way into a process that is being started; there it arrives as a number.

    DupFd is made while the process is being spawned, since it would otherwise start a server thread of its own.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def __reduce__(self) -> tuple[Callable[[Any], int], tuple[Any]]:
        return _take_over, (DupFd(self._fd),)


def _take_over(handed: Any) -> int:
    fd: int = handed.detach()
    return fd


class RankGroup:
    """The rank processes of one incarnation, with one thread that reads what they say.

    `deliver` is called from that thread with every message but frames, in order; nothing follows RanksDied.
    """

    def __init__(self, plan: GroupPlan, deliver: Callable[[GroupEvent], None]) -> None:
        self._plan = plan
        self._deliver = deliver
        self._processes: list[ForkServerProcess] = []
        self._pipes: list[connection.Connection] = []
        self._lifelines: list[connection.Connection] = []
        self._sending = threading.Lock()
        self._starting = threading.Lock()
        self._reader = threading.Thread(target=self._read, name="rank-reader", daemon=True)
        self._take_frame: TakeFrame | None = None
        self._frame_bytes = 0
        self._stopping = False
        self._ring: FrameRing | None = None
        self._rendezvous = str(plan.directory / f"rendezvous-{uuid.uuid4().hex}")

    def start(self) -> None:
        """Start every rank. Blocks for the forks, not for the loading of the model."""
        with self._starting:
            if not self._stopping:
                self._start()

    def _start(self) -> None:
        plan = self._plan
        size = FrameRing.size_bytes(slot_bytes=plan.max_frame_bytes, num_slots=plan.num_slots)
        fd = anonymous_file(size)
        try:
            self._ring = FrameRing(fd, slot_bytes=plan.max_frame_bytes, num_slots=plan.num_slots)
            for rank in range(plan.topology.world_size):
                self._start_rank(rank, fd)
        finally:
            os.close(fd)
        self._reader.start()

    def _start_rank(self, rank: int, ring_fd: int) -> None:
        ours, theirs = _context.Pipe()
        their_lifeline, our_lifeline = _context.Pipe(duplex=False)
        config = messages.encode(self._config(rank))
        process = _context.Process(
            target=run_rank,
            args=(config, theirs, their_lifeline, HandedOver(ring_fd)),
            name=f"wan-rank-{rank}",
            daemon=True,
        )
        process.start()
        theirs.close()
        their_lifeline.close()
        self._processes.append(process)
        self._pipes.append(ours)
        self._lifelines.append(our_lifeline)

    def _config(self, rank: int) -> RankConfig:
        plan = self._plan
        return RankConfig(
            rank=rank,
            topology=plan.topology,
            rendezvous=self._rendezvous,
            checkpoint=plan.checkpoint,
            device=plan.device,
            dtype=plan.dtype,
            load_format=plan.load_format,
            cpu_threads=plan.cpu_threads,
            slot_bytes=plan.max_frame_bytes,
            num_slots=plan.num_slots,
            log_format=plan.log_format,
            log_level=plan.log_level,
        )

    @property
    def pids(self) -> tuple[int, ...]:
        return tuple(process.pid for process in self._processes if process.pid is not None)

    def expect_frames(self, frame_bytes: int, take_frame: TakeFrame) -> None:
        """Every frame from now on has this size and goes to `take_frame`, on the reading thread. It must not raise."""
        self._frame_bytes = frame_bytes
        self._take_frame = take_frame

    def send(self, message: ToRank) -> None:
        """Send to rank 0. A dead rank is no error here: its death is reported by itself."""
        with self._sending, contextlib.suppress(BrokenPipeError, ConnectionResetError, OSError):
            self._pipes[0].send_bytes(messages.encode(message))

    def stop(self, timeout_s: float = 5.0) -> None:
        """End an idle group: ask first, then kill. Blocks until no process is left."""
        self._stopping = True
        self.send(Stop())
        deadline = time.monotonic() + timeout_s
        for process in self._processes:
            process.join(max(0.0, deadline - time.monotonic()))
        self.kill()

    def kill(self) -> None:
        """End every process at once and free all that the group held. Blocks until they are gone.

        A start that is under way on another thread is waited for: what it forks would else outlive everybody.
        """
        self._stopping = True
        with self._starting:
            self._end()

    def _end(self) -> None:
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
        if self._reader.is_alive():
            self._reader.join()
        for end in (*self._pipes, *self._lifelines):
            end.close()
        if self._ring is not None:
            self._ring.close()
        Path(self._rendezvous).unlink(missing_ok=True)

    def _read(self) -> None:
        """The reading thread: until a rank dies, the group is stopped, or what a rank says cannot be understood."""
        try:
            self._read_until_a_death()
        finally:
            if not self._stopping:
                self._deliver(RanksDied(detail=self._epitaph() or "what rank 0 said could not be read"))

    def _read_until_a_death(self) -> None:
        sentinels = [process.sentinel for process in self._processes]
        open_pipes = list(self._pipes)
        while True:
            happened = connection.wait([*open_pipes, *sentinels])
            for pipe in [pipe for pipe in open_pipes if pipe in happened]:
                if not self._read_one(pipe):
                    open_pipes.remove(pipe)
            if not any(pipe in happened for pipe in open_pipes) and any(s in happened for s in sentinels):
                return

    def _read_one(self, pipe: connection.Connection) -> bool:
        try:
            message = messages.decode_from_rank(pipe.recv_bytes())
        except (EOFError, OSError):
            return False
        if isinstance(message, FrameReady):
            self._pass_frame(message.slot)
        else:
            self._deliver(message)
        return True

    def _pass_frame(self, slot: int) -> None:
        assert self._take_frame is not None and self._ring is not None
        with self._ring.slot(slot, self._frame_bytes) as view:
            self._take_frame(view)
        self.send(SlotFreed(slot=slot))

    def _epitaph(self) -> str:
        for process in self._processes:  # give the others a moment: the first to die explains it best
            process.join(0.05)
        dead = [(rank, p.exitcode) for rank, p in enumerate(self._processes) if p.exitcode is not None]
        return "; ".join(f"rank {rank} {_how(code)}" for rank, code in dead)


def _how(exit_code: int) -> str:
    if exit_code >= 0:
        return f"exited with code {exit_code}"
    return f"was killed by {signal.Signals(-exit_code).name}"
