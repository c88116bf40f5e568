"""One process of another host that belongs to a server's group: it starts one rank for each incarnation of the group.

Knows the server's words and the process of its rank. Does not know what the rank computes, and leaves CUDA alone.
"""

import contextlib
import importlib
import multiprocessing
import os
import socket
import time
from collections.abc import Collection
from contextlib import closing
from dataclasses import dataclass
from multiprocessing import connection
from multiprocessing.connection import Connection
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import Final, Literal

import msgspec
import structlog

from wan_grpc import __version__
from wan_grpc.domain.errors import UnusableModelError
from wan_grpc.engine import joining_messages as words
from wan_grpc.engine import links, messages
from wan_grpc.engine.group import how_it_ended, run_rank, settle_environment
from wan_grpc.engine.joining_messages import Attach, End, Ended, Join, Leave, Refused, Seated, Start
from wan_grpc.engine.lifeline import end_with_parent
from wan_grpc.engine.links import Endpoint
from wan_grpc.engine.messages import Head, LoadFailed, RankConfig
from wan_grpc.engine.shared import FrameRing, anonymous_file
from wan_grpc.engine.watchdog import is_stopped
from wan_grpc.pipeline import embedded
from wan_grpc.pipeline.checkpoint import Checkpoint, locate
from wan_grpc.pipeline.fingerprint import fingerprint

_context = multiprocessing.get_context("fork")
_PAUSE_S: Final = 1.0
_TICK_S: Final = 1.0
_MOST_STOPPED_TICKS: Final = 10
"""As many seconds as the server allows a rank of its own by default."""

log = structlog.stdlib.get_logger("wan_grpc")


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Which rank of whose group."""

    server: Endpoint
    secret: bytes
    node_rank: int
    """Of this host, from 1; 0 is the server's."""
    local_rank: int
    num_local: int
    """How many ranks this host has."""
    model_path: str | None = None
    """Where this host has the checkpoint; None: where the server has it."""
    cache_dir: Path
    """Where embedded models are put together."""


class NotTakenError(Exception):
    """The server has no place for this process, and never will."""


class _TryAgainError(Exception):
    """The server cannot be reached, or has no place yet."""


def stay_joined(place: Place, *, give_up_after_s: float) -> None:
    """Start a rank whenever the server wants one, until it says that there will be no more.

    Raises:
        RefusedError: the server knows another secret.
        NotTakenError: it has no such place.
        TimeoutError: it could not be reached for `give_up_after_s`.
    """
    settle_environment()
    with closing(_Rank(place)) as rank:
        told, since = "", time.monotonic()
        while True:
            try:
                if _attend(place, rank):
                    return
                told, since = "", time.monotonic()
                log.warning("the server is gone; trying to reach it again", server=str(place.server))
            except _TryAgainError as error:
                if str(error) != told:
                    log.warning("not joined yet", server=str(place.server), detail=str(error))
                told = str(error)
            if time.monotonic() - since > give_up_after_s:
                raise TimeoutError(f"{place.server}: not joined for {give_up_after_s:g} s: {told}")
            time.sleep(_PAUSE_S)


def _attend(place: Place, rank: "_Rank") -> bool:
    """Join, and do as the server says until it is gone; whether it has said goodbye."""
    try:
        control = links.dial(place.server, place.secret)
    except OSError as error:
        raise _TryAgainError(error.strerror or str(error)) from error
    with closing(control), contextlib.suppress(OSError, EOFError), closing(rank):
        control.send_bytes(words.encode(_join(place)))
        while True:
            happened = connection.wait([control, *rank.sentinels], _TICK_S)
            if not happened:
                rank.look()
            elif rank.ended_in(happened):
                control.send_bytes(words.encode(rank.bury()))
            elif _obey(words.decode_to_host(control.recv_bytes()), rank, control):
                return True
    return False


def _join(place: Place) -> Join:
    return Join(
        node_rank=place.node_rank,
        local_rank=place.local_rank,
        num_local=place.num_local,
        host_name=socket.gethostname(),
        version=__version__,
    )


def _obey(message: words.ToHost, rank: "_Rank", control: Connection) -> bool:
    """Whether there is nothing more to do for that server."""
    match message:
        case Seated(rank=number):
            structlog.contextvars.bind_contextvars(rank=number)
            log.info("joined")
            importlib.import_module("wan_grpc.engine.worker")  # torch, once, so that each rank starts in a moment
        case Start():
            rank.start(message, control)
        case End(group=group):
            rank.end(group)
        case Refused(reason=reason, is_final=is_final):
            raise NotTakenError(reason) if is_final else _TryAgainError(reason)
        case Leave():
            log.info("the server has stopped")
            return True
    return False


class _Rank:
    """The process of the rank, while a group wants one."""

    def __init__(self, place: Place) -> None:
        self._place = place
        self._process: ForkProcess | None = None
        self._group = ""
        self._num_stopped_ticks = 0

    @property
    def sentinels(self) -> list[int]:
        return [] if self._process is None else [self._process.sentinel]

    def ended_in(self, happened: Collection[object]) -> bool:
        return any(sentinel in happened for sentinel in self.sentinels)

    def start(self, start: Start, control: Connection) -> None:
        """Fork a rank, in place of any former one."""
        self.close()
        self._group, self._num_stopped_ticks = start.group, 0
        self._process = _context.Process(
            target=_be_rank, args=(self._place, start, control, os.getpid()), name=f"wan-rank-{start.rank}", daemon=True
        )
        self._process.start()
        log.info("the rank was started", pid=self._process.pid)

    def look(self) -> None:
        """Kill a process that does not run: its peers wait for it, and the server does not see it. Once a tick."""
        pid = self._process.pid if self._process is not None else None
        is_stopped_now = pid is not None and is_stopped(pid)
        self._num_stopped_ticks = self._num_stopped_ticks + 1 if is_stopped_now else 0
        if self._process is not None and self._num_stopped_ticks == _MOST_STOPPED_TICKS:
            self._process.kill()

    def end(self, group: str) -> None:
        if group == self._group:
            self.close()

    def bury(self) -> Ended:
        """What to tell of a process that has ended by itself."""
        assert self._process is not None
        self._process.join()
        detail = how_it_ended(self._process.exitcode or 0)
        if self._num_stopped_ticks >= _MOST_STOPPED_TICKS:
            stopped_s = self._num_stopped_ticks * _TICK_S
            detail = f"did not run for {stopped_s:g} s: stopped by a signal or a debugger"
        log.info("the rank has ended", detail=detail)
        ended = Ended(group=self._group, detail=detail)
        self.close()
        return ended

    def close(self) -> None:
        """End the process, whatever it is at."""
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._process.close()
        self._process = None


# ---- in the process of the rank --------------------------------------------------------------------------------------


def _be_rank(place: Place, start: Start, control: Connection, parent: int) -> None:
    control.close()  # the server shall hear at once when the process that holds the other copy is gone
    end_with_parent()
    if os.getppid() != parent:
        return
    try:
        pipe, lifeline = (_attach(place, start, link) for link in ("pipe", "lifeline"))
    except OSError as error:
        log.warning("the server is gone before the rank has met it", detail=str(error))
        raise SystemExit(1) from error
    config = messages.decode_config(start.config)
    try:
        checkpoint = _own_checkpoint(place, config, start.fingerprint)
    except UnusableModelError as error:
        message = f"on {links.own_address(pipe)}: {error}"
        pipe.send_bytes(messages.encode(LoadFailed(rank=start.rank, message=message)))
        raise SystemExit(1) from error
    ring = anonymous_file(FrameRing.size_bytes(slot_bytes=config.slot_bytes, num_slots=config.num_slots))
    run_rank(messages.encode(_own_config(place, start, config, checkpoint)), pipe, lifeline, ring)


def _attach(place: Place, start: Start, link: Literal["pipe", "lifeline"]) -> Connection:
    attached = links.keep_dialling(place.server, place.secret)
    attached.send_bytes(words.encode(Attach(group=start.group, rank=start.rank, link=link)))
    return attached


def _own_checkpoint(place: Place, config: RankConfig, wanted: str) -> Checkpoint:
    """The server's checkpoint as this host has it.

    Raises:
        UnusableModelError: it has none, or another one.
    """
    theirs = config.checkpoint
    is_here_too = theirs.directory is not None and Path(theirs.directory).is_dir()
    path = place.model_path or (theirs.directory if is_here_too else None) or theirs.model_path
    own = locate(embedded.resolved(path, place.cache_dir), load_format=config.load_format)
    if fingerprint(own, load_format=config.load_format) != wanted:
        raise UnusableModelError(f"{path} is not the checkpoint that the server has")
    return own


def _own_config(place: Place, start: Start, config: RankConfig, checkpoint: Checkpoint) -> RankConfig:
    """The server's word, with what is another matter on this host."""
    num_cores = len(os.sched_getaffinity(0))
    return msgspec.structs.replace(
        config,
        checkpoint=checkpoint,
        local_rank=place.local_rank,
        cpu_threads=min(config.cpu_threads, max(1, num_cores // place.num_local)),
        head=Head(host=place.server.host, port=place.server.port, group=start.group, secret=place.secret),
    )
