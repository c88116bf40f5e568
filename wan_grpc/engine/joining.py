"""The hosts beside this one from which ranks of the group come: who has joined, and who started what for which group.

Knows the listening socket, its threads and the seats of the group. Does not know local processes, nor what ranks say.
"""

import contextlib
import math
import socket
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from multiprocessing import Pipe, connection
from multiprocessing.connection import Connection
from typing import Final

import msgspec
import structlog

from wan_grpc import __version__
from wan_grpc.engine import joining_messages as words
from wan_grpc.engine import links
from wan_grpc.engine.joining_messages import Attach, Ended, Hello, Join, UseStore
from wan_grpc.engine.links import Endpoint, RefusedError, hang_up
from wan_grpc.engine.rendezvous import StoreServer

_MOST_STRANGERS: Final = 64
"""Connections at a time that have not proven themselves yet."""
_TOLD_EVERY_S: Final = 10.0
_PAUSE_S: Final = 1.0
_FAREWELL_S: Final = 2.0
_WILDCARDS: Final = ("0.0.0.0", "::", "")

log = structlog.stdlib.get_logger("wan_grpc")


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrived:
    """A rank on another host runs and can be spoken to."""

    rank: int
    host: str
    pipe: Connection
    lifeline: Connection


class Away:
    """The ranks of one group that are on other hosts, from the call for them until the group is over."""

    def __init__(self, group: str, *, configs: Mapping[int, bytes], fingerprint: str) -> None:
        """configs: RankConfig of each such rank, as bytes."""
        self.group = group
        self.configs = configs
        self.fingerprint = fingerprint
        self.store = StoreServer()
        self.bell, self._rope = Pipe(duplex=False)
        """The bell can be waited at; `answer` it when it has something."""
        self._changed = threading.Condition()
        self._links: dict[tuple[int, str], Connection] = {}
        self._hosts: dict[int, str] = {}
        self._arrived: list[Arrived] = []
        self._lost: dict[int, str] = {}
        self._is_closed = False

    # ---- for the group ----------------------------------------------------------------------------------------------

    @property
    def is_closed(self) -> bool:
        return self._is_closed

    @property
    def missing(self) -> tuple[int, ...]:
        """The ranks that no host has been told to start."""
        with self._changed:
            return tuple(sorted(self.configs.keys() - self._hosts.keys()))

    def answer(self) -> list[Arrived]:
        """Silence the bell: who has arrived since."""
        with self._changed:
            while not self._is_closed and self.bell.poll():
                self.bell.recv_bytes()
            arrived, self._arrived = self._arrived, []
            return arrived

    def lost(self, *, wait_s: float = 0.0, count: int = 1) -> dict[int, str]:
        """What became of ranks that are gone, by rank; waits until there are so many of them."""
        with self._changed:
            self._changed.wait_for(lambda: len(self._lost) >= count, wait_s)
            return dict(self._lost)

    def lose(self, rank: int, detail: str) -> None:
        """Note that a rank is gone. The first word on it counts."""
        with self._changed:
            self._lost.setdefault(rank, f"on {self._hosts[rank]} {detail}")
            self._ring()

    # ---- for the listener -------------------------------------------------------------------------------------------

    def call(self, rank: int, host: str) -> bool:
        """Note that `host` is told to start this rank; False if one was told before.

        Whom the others have begun to meet cannot be replaced: they would wait for what it had to say.
        """
        with self._changed:
            if rank in self._hosts:
                return False
            self._hosts[rank] = host
            return True

    def attach(self, hello: Attach, link: Connection) -> bool:
        """Take over one of the two connections of a rank; False if none is awaited here."""
        with self._changed:
            is_awaited = hello.rank in self._hosts and (hello.rank, hello.link) not in self._links
            if self._is_closed or not is_awaited:
                return False
            self._links[hello.rank, hello.link] = link
            pipe, lifeline = (self._links.get((hello.rank, kind)) for kind in ("pipe", "lifeline"))
            if pipe is not None and lifeline is not None:
                host = self._hosts[hello.rank]
                self._arrived.append(Arrived(rank=hello.rank, host=host, pipe=pipe, lifeline=lifeline))
                self._ring()
            return True

    def close(self) -> None:
        """End all connections of the group. What waits at one of them, or at the bell, wakes up."""
        self.store.close()
        with self._changed:
            for link in self._links.values():
                hang_up(link)
            self._ring()
            self._is_closed = True

    def free(self) -> None:
        """Let go of what `close` has ended, when nobody waits at it any more."""
        for link in (*self._links.values(), self.bell, self._rope):
            link.close()

    def _ring(self) -> None:
        if not self._is_closed:
            self._rope.send_bytes(b"")
        self._changed.notify_all()


class _Strangers:
    """The connections that have not proven themselves yet, from the one that has waited longest.

    A proof takes milliseconds: where there is no room for another one, the first has none to give, and makes way.
    """

    def __init__(self, most: int = _MOST_STRANGERS) -> None:
        self._most = most
        self._guard = threading.Lock()
        self._waiting: dict[socket.socket, socket.socket] = {}
        """Each with a copy, which can be shut down whatever its own thread does to it meanwhile."""
        self._num_sent_away = 0
        self._told = -math.inf

    def __len__(self) -> int:
        return len(self._waiting)

    def take_in(self, accepted: socket.socket) -> None:
        copy = accepted.dup()
        with self._guard:
            if len(self._waiting) >= self._most:
                self._send_away(next(iter(self._waiting)))
            self._waiting[accepted] = copy

    def let_go(self, accepted: socket.socket) -> bool:
        """No stranger any more, or gone; False if it had to make way before."""
        with self._guard:
            copy = self._waiting.pop(accepted, None)
        if copy is None:
            return False
        copy.close()
        return True

    def _send_away(self, first: socket.socket) -> None:
        with self._waiting.pop(first) as copy, contextlib.suppress(OSError):  # it may have left by itself
            copy.shutdown(socket.SHUT_RDWR)
        self._num_sent_away += 1
        if time.monotonic() - self._told >= _TOLD_EVERY_S:
            told = "too many connections to the join address prove nothing: the first to come were closed"
            log.warning(told, num_closed=self._num_sent_away, num_open=self._most)
            self._num_sent_away, self._told = 0, time.monotonic()


@dataclass(slots=True, kw_only=True)
class _Seat:
    """A process on another host that starts one rank of each group."""

    rank: int
    host: str
    control: Connection
    group: str = ""
    """For which it has been told to start a rank."""


@dataclass(slots=True)
class _Seats:
    """Who has joined, by rank, and the group that wants ranks now."""

    taken: dict[int, _Seat] = field(default_factory=dict)
    away: Away | None = None


class Hosts:
    """Listens for the other hosts, all through the life of the server, and asks them for the ranks of each group."""

    def __init__(
        self,
        *,
        at: Endpoint,
        secret: bytes,
        num_nodes: int,
        ranks_per_node: int,
        patience_s: float = links.PATIENCE_S,
    ) -> None:
        """patience_s: for whoever connects to prove itself and say what it wants.

        Raises:
            OSError: the address cannot be had.
            ValueError: it is every address of this host, of which ranks would not know the right one.
        """
        if at.host in _WILDCARDS:
            raise ValueError("must name one address of this host: its ranks use the network that has it")
        self.secret = secret
        self.num_nodes = num_nodes
        self.ranks_per_node = ranks_per_node
        self._patience_s = patience_s
        self._socket = links.listen(at)
        self.at = Endpoint(host=self._socket.getsockname()[0], port=self._socket.getsockname()[1])
        self._guard = threading.Condition()
        self._seats = _Seats()
        self._strangers = _Strangers()
        self._is_at_peace = True
        self._closing, self._close = Pipe(duplex=False)
        self._listener = threading.Thread(target=self._listen, name="join-listener", daemon=True)
        self._listener.start()
        log.info("listening for ranks of other hosts", join_address=str(self.at), num_nodes=num_nodes)

    def summon(self, group: str, *, configs: Mapping[int, bytes], fingerprint: str) -> Away:
        """Have every host start its ranks of a new group: those that have joined now, the others when they do."""
        away = Away(group, configs=configs, fingerprint=fingerprint)
        with self._guard:
            self._seats.away = away
            for seat in self._seats.taken.values():
                self._start(seat, away)
            missing = sorted(configs.keys() - self._seats.taken.keys())
        if missing:
            log.info("waiting for ranks of other hosts", missing=missing, join_address=str(self.at))
        return away

    def dismiss(self, away: Away) -> None:
        """The group is over: its ranks end. Blocks for nobody."""
        with self._guard:
            if self._seats.away is away:
                self._seats.away = None
            for seat in self._seats.taken.values():
                if seat.group == away.group:
                    seat.group = ""
                    _tell(seat.control, words.End(group=away.group))
        away.close()

    def give_up(self) -> None:
        """The server is about to end because it cannot work: who has joined shall look for the next one."""
        self._is_at_peace = False

    def close(self) -> None:
        """Listen no more, and tell everybody who has joined that there will be no further group.

        After `give_up` they are told nothing, and take it that the server has died.
        """
        self._close.send_bytes(b"")
        self._listener.join()
        with self._guard:
            if self._is_at_peace:
                for seat in self._seats.taken.values():
                    _tell(seat.control, words.Leave())
                self._guard.wait_for(lambda: not self._seats.taken, _FAREWELL_S)  # what is cut off may go unheard
            for seat in self._seats.taken.values():
                hang_up(seat.control)
        self._socket.close()

    # ---- those who come ---------------------------------------------------------------------------------------------

    def _listen(self) -> None:
        while self._closing not in connection.wait([self._closing, self._socket]):
            try:
                self._accept()
            except (OSError, RuntimeError) as error:  # too many files or threads, or the other end has left already
                log.warning("a connection to the join address cannot be taken", detail=str(error))
                time.sleep(_PAUSE_S)

    def _accept(self) -> None:
        accepted, (host, *_) = self._socket.accept()
        try:
            self._strangers.take_in(accepted)
            threading.Thread(target=self._meet, args=(accepted, host), name=f"join-{host}", daemon=True).start()
        except BaseException:
            self._strangers.let_go(accepted)
            accepted.close()
            raise

    def _meet(self, accepted: socket.socket, host: str) -> None:
        """One connection, to its end or until a group has it."""
        link = self._greet(accepted, host)
        if link is None:
            return
        try:
            hello = self._hear(link)
        except (OSError, EOFError, msgspec.MsgspecError) as error:
            _tell_of_refusal(host, error)
            return
        if not self._take_in(hello, link, host):
            link.close()

    def _greet(self, accepted: socket.socket, host: str) -> Connection | None:
        """The connection, once it is no stranger's any more."""
        try:
            link = links.greet(accepted, self.secret, patience_s=self._patience_s)
        except (RefusedError, OSError) as error:
            if self._strangers.let_go(accepted):  # those that had to make way are told of together
                _tell_of_refusal(host, error)
            return None
        if not self._strangers.let_go(accepted):
            link.close()
            return None
        return link

    def _hear(self, link: Connection) -> Hello:
        try:
            if not link.poll(self._patience_s):
                raise TimeoutError("it knows the secret, and did not say what it wants")
            return words.decode_hello(link.recv_bytes())
        except BaseException:
            link.close()
            raise

    def _take_in(self, hello: Hello, link: Connection, host: str) -> bool:
        """Whether the connection belongs to somebody else now."""
        match hello:
            case Join():
                self._seat(hello, link, host)
            case UseStore(group=group):
                if (away := self._away(group)) is not None:
                    away.store.serve(link)
            case Attach(group=group):
                return (away := self._away(group)) is not None and away.attach(hello, link)
        return False

    def _away(self, group: str) -> Away | None:
        with self._guard:
            away = self._seats.away
            return away if away is not None and away.group == group else None

    # ---- those who stay ---------------------------------------------------------------------------------------------

    def _seat(self, join: Join, control: Connection, host: str) -> None:
        """Keep a place in the group for whoever joins, until it leaves."""
        seat = _Seat(rank=join.node_rank * self.ranks_per_node + join.local_rank, host=host, control=control)
        told = log.bind(peer=host, host_name=join.host_name, node_rank=join.node_rank, local_rank=join.local_rank)
        with self._guard:
            refused = self._refusal(join, seat)
            if refused is None:
                self._seats.taken[seat.rank] = seat
                _tell(control, words.Seated(rank=seat.rank))
                told.info("a rank of another host has joined", rank=seat.rank)
                if self._seats.away is not None:
                    self._start(seat, self._seats.away)
        if refused is not None:
            told.warning("a rank of another host was refused", detail=refused.reason)
            _tell(control, refused)
            return
        try:
            self._listen_to(seat)
        finally:
            with self._guard:
                del self._seats.taken[seat.rank]
                self._guard.notify_all()
                self._note_end(seat, seat.group, "went away")
            told.info("a rank of another host has left", rank=seat.rank)

    def _refusal(self, join: Join, seat: _Seat) -> words.Refused | None:
        reason = ""
        if join.version != __version__:
            reason = f"the server is wan-grpc {__version__}, and you are {join.version}"
        elif not 1 <= join.node_rank < self.num_nodes:
            reason = f"node rank {join.node_rank} is none of 1 to {self.num_nodes - 1}"
        elif join.num_local != self.ranks_per_node or not 0 <= join.local_rank < self.ranks_per_node:
            reason = (
                f"each host has {self.ranks_per_node} ranks; yours is local rank {join.local_rank} of {join.num_local}"
            )
        if reason:
            return words.Refused(reason=reason, is_final=True)
        if (other := self._seats.taken.get(seat.rank)) is not None:
            reason = f"local rank {join.local_rank} of node {join.node_rank} is there already, from {other.host}"
            return words.Refused(reason=reason, is_final=False)
        return None

    def _listen_to(self, seat: _Seat) -> None:
        with contextlib.suppress(OSError, EOFError, msgspec.MsgspecError):
            while True:
                ended: Ended = words.decode_ended(seat.control.recv_bytes())
                with self._guard:
                    self._note_end(seat, ended.group, ended.detail)

    def _note_end(self, seat: _Seat, group: str, detail: str) -> None:
        away = self._seats.away
        if away is not None and away.group == group:
            away.lose(seat.rank, detail)

    def _start(self, seat: _Seat, away: Away) -> None:
        if not away.call(seat.rank, seat.host):
            return  # this group is about to end; the next one has a place for it
        seat.group = away.group
        start = words.Start(
            group=away.group, rank=seat.rank, config=away.configs[seat.rank], fingerprint=away.fingerprint
        )
        _tell(seat.control, start)


def _tell_of_refusal(host: str, error: Exception) -> None:
    log.warning("a connection to the join address was refused", peer=host, detail=str(error) or repr(error))


def _tell(control: Connection, message: words.ToHost) -> None:
    """Send. That somebody has left is no error here: whoever listens to it finds out."""
    with contextlib.suppress(OSError):
        control.send_bytes(words.encode(message))
