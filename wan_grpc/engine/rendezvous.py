"""The store at which the ranks of one group meet when they are on several hosts: keys and bytes in the server process.

Knows what a store promises, and how it is reached. Does not know torch, nor what ranks write there.
"""

import contextlib
import threading
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection

import msgspec
import structlog

from wan_grpc.engine import joining_messages, links
from wan_grpc.engine.links import Endpoint, hang_up
from wan_grpc.engine.messages import Head
from wan_grpc.parallel import relay
from wan_grpc.parallel.relay import Add, Answer, Ask, Check, CompareSet, Count, Delete, Get, Set, Wait

Value = bytes | int | bool | None

log = structlog.stdlib.get_logger("wan_grpc")


def dial_store(head: Head) -> Connection:
    """One more connection to the store of a group, for a rank of it. Tries again for half a minute.

    Raises:
        OSError: the server is gone.
        RefusedError: the secret is another one by now.
    """
    link = links.keep_dialling(Endpoint(host=head.host, port=head.port), head.secret)
    link.send_bytes(joining_messages.encode(joining_messages.UseStore(group=head.group)))
    return link


class StoreServer:
    """One store. `serve` is called on a thread for each connection; they wait for each other's keys."""

    def __init__(self) -> None:
        self._values: dict[str, bytes] = {}
        self._changed = threading.Condition()
        self._links: set[Connection] = set()
        self._is_closed = False

    def serve(self, link: Connection) -> None:
        """Answer questions until the other end leaves or the store is closed."""
        with self._changed:
            if self._is_closed:
                return
            self._links.add(link)
        try:
            with contextlib.suppress(OSError, EOFError):
                while True:
                    link.send_bytes(relay.encode(self._answer(relay.decode_ask(link.recv_bytes()))))
        except (msgspec.MsgspecError, ValueError) as error:
            log.warning("a connection to the store of the ranks was closed: it makes no sense", detail=str(error))
        finally:
            with self._changed:
                self._links.discard(link)

    def close(self) -> None:
        """Let everybody go. Connections are closed by those who own them."""
        with self._changed:
            self._is_closed = True
            for link in self._links:
                hang_up(link)
            self._changed.notify_all()

    def _answer(self, ask: Ask) -> Answer:
        with self._changed:
            match ask:
                case Get(key=key, timeout_s=timeout_s):
                    return self._once_there([key], timeout_s, lambda: self._values[key])
                case Wait(keys=keys, timeout_s=timeout_s):
                    return self._once_there(keys, timeout_s, lambda: None)
                case _:
                    return Answer(value=self._do(ask))

    def _once_there(self, keys: Sequence[str], timeout_s: float, value: Callable[[], Value]) -> Answer:
        limit_s = min(timeout_s, threading.TIMEOUT_MAX)
        self._changed.wait_for(lambda: self._is_closed or self._has(keys), limit_s)
        return Answer(value=value()) if self._has(keys) else Answer(timed_out=True)

    def _do(self, ask: Set | Add | Check | CompareSet | Delete | Count) -> Value:
        match ask:
            case Set(key=key, value=value):
                self._put(key, value)
            case Add(key=key, amount=amount):
                total = int(self._values.get(key, b"0")) + amount
                self._put(key, str(total).encode())
                return total
            case Check(keys=keys):
                return self._has(keys)
            case CompareSet(key=key, expected=expected, desired=desired):
                if self._values.get(key, b"") == expected:
                    self._put(key, desired)
                return self._values.get(key, expected)
            case Delete(key=key):
                return self._values.pop(key, None) is not None
            case Count():
                return len(self._values)
        return None

    def _has(self, keys: Sequence[str]) -> bool:
        return all(key in self._values for key in keys)

    def _put(self, key: str, value: bytes) -> None:
        self._values[key] = value
        self._changed.notify_all()
