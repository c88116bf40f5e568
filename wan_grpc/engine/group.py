"""One incarnation of the rank processes: start them, talk to rank 0, notice any death, end them all.

Knows processes and pipes, and those of the ranks that other hosts have started. Does not know torch, generations or
whether a dead group is to be started again.
"""

import contextlib
import multiprocessing
import os
import signal
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing import connection, forkserver
from multiprocessing.context import ForkServerProcess
from multiprocessing.reduction import DupFd
from pathlib import Path
from typing import Any, NoReturn, TypeAlias

from wan_grpc.domain.topology import Topology
from wan_grpc.engine import messages
from wan_grpc.engine.joining import Away, Hosts
from wan_grpc.engine.links import hang_up
from wan_grpc.engine.messages import Abort, FrameReady, FromRank, Head, RankConfig, SlotFreed, Stop, ToRank
from wan_grpc.engine.shared import FrameRing, anonymous_file
from wan_grpc.pipeline.checkpoint import Checkpoint
from wan_grpc.pipeline.fingerprint import fingerprint

_context = multiprocessing.get_context("forkserver")

_LAST_WORDS_S = 0.5
"""A rank's end is seen by its connections at once, and told by its host a moment later."""

_END_S = 30.0
"""For processes that were killed. One that waits for a broken device or disk cannot even be killed."""

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
    first_rank: int = 0
    """What rank 0 is called outside. The ranks of other groups on this host come before it, and so do their devices."""
    demand: str = ""
    """How many devices a host needs, and why, in a sentence; for when they are not there."""
    log_format: str = "console"
    log_level: str = "info"


@dataclass(frozen=True, slots=True, kw_only=True)
class RanksDied:
    """At least one rank process ended without being told to. The rest of the group is of no use."""

    detail: str


class LeftBehindError(Exception):
    """Processes that do not end although they were killed."""


GroupEvent: TypeAlias = FromRank | RanksDied


def prepare_forkserver(*further: str) -> None:
    """Start the process that ranks are forked from. Call it before any gRPC object exists and before threads do.

    It imports torch, diffusers and transformers once, and leaves CUDA alone, so that each rank starts in a moment.
    further: modules that it shall import as well.
    """
    multiprocessing.set_forkserver_preload(["wan_grpc.engine.preloaded", *further])
    settle_environment()
    forkserver.ensure_running()


def settle_environment() -> None:
    """Say what torch reads when it is imported. Call it before, in the process that ranks are forked from."""
    # Some library asks torch at import whether there is a GPU. Answered by the CUDA runtime, that would bar every fork
    # from CUDA for good; answered by NVML it touches nothing.
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    # CPU threads that wait for each other shall sleep: on shared cores, spinning was seen to take ten times as long.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


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

    def __init__(self, plan: GroupPlan, deliver: Callable[[GroupEvent], None], *, hosts: Hosts | None = None) -> None:
        """hosts: from which the ranks come that are not of this host; None: all are."""
        self._plan = plan
        self._deliver = deliver
        self._hosts = hosts
        self._away: Away | None = None
        self._away_pipes: dict[connection.Connection, int] = {}
        self._away_gone: set[int] = set()
        """Ranks on other hosts whose pipes have ended; why, their hosts tell."""
        self._name = uuid.uuid4().hex
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
        self._rendezvous = str(plan.directory / f"rendezvous-{self._name}")

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
            if self._hosts is not None:
                self._away = self._summon(self._hosts)
            for rank in range(self._num_local):
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
            name=f"wan-rank-{self._plan.first_rank + rank}",
            daemon=True,
        )
        process.start()
        theirs.close()
        their_lifeline.close()
        self._processes.append(process)
        self._pipes.append(ours)
        self._lifelines.append(our_lifeline)

    @property
    def _num_local(self) -> int:
        return self._hosts.ranks_per_node if self._hosts else self._plan.topology.world_size

    def _summon(self, hosts: Hosts) -> Away:
        world_size = self._plan.topology.world_size
        assert world_size == hosts.num_nodes * hosts.ranks_per_node, "as many on each host"
        ranks = range(self._num_local, world_size)
        return hosts.summon(
            self._name,
            configs={rank: messages.encode(self._config(rank)) for rank in ranks},
            fingerprint=fingerprint(self._plan.checkpoint, load_format=self._plan.load_format),
        )

    def _head(self, rank: int) -> Head | None:
        hosts = self._hosts
        if hosts is None:
            return None
        secret = hosts.secret if rank < self._num_local else b""  # the other hosts have it already
        return Head(host=hosts.at.host, port=hosts.at.port, group=self._name, secret=secret)

    def _config(self, rank: int) -> RankConfig:
        plan = self._plan
        return RankConfig(
            rank=rank,
            topology=plan.topology,
            rendezvous=self._rendezvous,
            head=self._head(rank),
            local_rank=plan.first_rank + rank % self._num_local,
            first_rank=plan.first_rank,
            demand=plan.demand,
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
        """Of the ranks on this host, which are the first."""
        return tuple(process.pid for process in self._processes if process.pid is not None)

    @property
    def missing(self) -> tuple[int, ...]:
        """The ranks on other hosts that have not joined."""
        return () if self._away is None else self._away.missing

    def expect_frames(self, frame_bytes: int, take_frame: TakeFrame) -> None:
        """Every frame from now on has this size and goes to `take_frame`, on the reading thread. It must not raise."""
        self._frame_bytes = frame_bytes
        self._take_frame = take_frame

    def send(self, message: ToRank) -> None:
        """Send to rank 0. A dead rank is no error here: its death is reported by itself."""
        with self._sending, contextlib.suppress(BrokenPipeError, ConnectionResetError, OSError):
            self._pipes[0].send_bytes(messages.encode(message))

    def abort(self, generation: str) -> None:
        """Call every rank out of whatever it waits for in this generation, which has failed on one of them."""
        for lifeline in self._lifelines:
            with contextlib.suppress(OSError):  # the death of a rank is reported by itself
                lifeline.send_bytes(messages.encode(Abort(generation=generation)))

    def stop(self, timeout_s: float = 5.0) -> None:
        """End an idle group: ask first, then kill. Blocks until no process is left.

        Raises:
            LeftBehindError: as `kill` does.
        """
        self._stopping = True
        self.send(Stop())
        deadline = time.monotonic() + timeout_s
        for process in self._processes:
            process.join(max(0.0, deadline - time.monotonic()))
        if self._away is not None:
            self._away.lost(wait_s=max(0.0, deadline - time.monotonic()), count=len(self._away.configs))
        self.kill()

    def kill(self) -> None:
        """End every process at once and free all that the group held. Blocks until they are gone.

        A start that is under way on another thread is waited for: what it forks would else outlive everybody.

        Raises:
            LeftBehindError: some are not gone after half a minute.
        """
        self._stopping = True
        with self._starting:
            self._end()

    def _end(self) -> None:
        for process in self._processes:
            process.kill()
        deadline = time.monotonic() + _END_S
        for process in self._processes:
            process.join(max(0.0, deadline - time.monotonic()))
        if self._hosts is not None and self._away is not None:
            self._hosts.dismiss(self._away)
        left = {rank: p for rank, p in enumerate(self._processes, self._plan.first_rank) if p.is_alive()}
        if left:
            self._leave(left)
        self._free()

    def _leave(self, left: Mapping[int, ForkServerProcess]) -> NoReturn:
        """Go on without some processes, and without what they hold."""
        for pipe in self._pipes:
            hang_up(pipe)  # for whoever on another thread waits for them to read
        for process in left.values():
            multiprocessing.process._children.discard(process)  # type: ignore[attr-defined]  # else waited for at exit
        named = " and ".join(f"rank {rank} (process {process.pid})" for rank, process in left.items())
        raise LeftBehindError(f"{named} {'does' if len(left) == 1 else 'do'} not end")

    def _free(self) -> None:
        if self._reader.is_alive():
            self._reader.join()
        if self._away is not None:
            self._away.free()
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
        bells = [] if self._away is None else [self._away.bell]
        open_pipes = list(self._pipes)
        is_over = False
        while True:
            happened = connection.wait([*open_pipes, *sentinels, *bells], 0.0 if is_over else None)
            readable = [pipe for pipe in open_pipes if pipe in happened]
            for pipe in readable:
                if not self._read_one(pipe):
                    open_pipes.remove(pipe)
            open_pipes += self._new_pipes()
            is_over = is_over or any(s in happened for s in sentinels) or self._has_lost()
            if is_over and not readable:  # what was said before is heard
                return

    def _new_pipes(self) -> list[connection.Connection]:
        """Those of ranks that other hosts have started since."""
        arrived = [] if self._away is None else self._away.answer()
        for one in arrived:
            self._away_pipes[one.pipe] = one.rank
            self._lifelines.append(one.lifeline)
        return [one.pipe for one in arrived]

    def _has_lost(self) -> bool:
        """Whether a rank on another host is gone."""
        return self._away is not None and (bool(self._away_gone) or bool(self._away.lost()) or self._away.is_closed)

    def _read_one(self, pipe: connection.Connection) -> bool:
        try:
            message = messages.decode_from_rank(pipe.recv_bytes())
        except (EOFError, OSError):
            if pipe in self._away_pipes:
                self._away_gone.add(self._away_pipes[pipe])
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
        dead = {rank: how_it_ended(p.exitcode) for rank, p in enumerate(self._processes) if p.exitcode is not None}
        if self._away is not None:
            dead |= self._why_away(self._away)
        return "; ".join(f"rank {self._plan.first_rank + rank} {how}" for rank, how in dead.items())

    def _why_away(self, away: Away) -> dict[int, str]:
        lost = away.lost(wait_s=_LAST_WORDS_S, count=max(1, len(self._away_gone)))
        for rank in self._away_gone - lost.keys():
            away.lose(rank, "went away")
        return away.lost()


def how_it_ended(exit_code: int) -> str:
    """The end of a process, in the words of a sentence."""
    if exit_code >= 0:
        return f"exited with code {exit_code}"
    return f"was killed by {signal.Signals(-exit_code).name}"
