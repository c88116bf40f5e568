"""The store at which ranks of several hosts meet, as a rank sees it: each question goes to the process that keeps it.

Knows torch's store and the words for it. Does not know how the other process is reached.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import TypeVar

import torch.distributed as dist

from wan_grpc.parallel import relay

T = TypeVar("T", bytes, int, bool)


class RelayedStore(dist.Store):  # type: ignore[name-defined, misc]  # exported at run time
    """What torch asks of a store. Keep a reference: torch itself holds on to the C++ half alone.

    Raises:
        DistStoreError: from any method: a wait took too long, or the process that keeps the store is gone.
    """

    def __init__(self, dial: Callable[[], Connection]) -> None:
        """dial: opens one more connection to the process that keeps the store."""
        super().__init__()
        self._dial = dial
        self._idle: list[Connection] = []
        self._guard = threading.Lock()

    def set(self, key: str, value: str | bytes) -> None:
        self._ask(relay.Set(key=key, value=_bytes(value)))

    def get(self, key: str) -> bytes:
        return self._hear(bytes, relay.Get(key=key, timeout_s=self.timeout.total_seconds()))

    def add(self, key: str, value: int) -> int:
        return self._hear(int, relay.Add(key=key, amount=value))

    def wait(self, keys: Sequence[str], timeout: timedelta | None = None) -> None:
        limit = self.timeout if timeout is None else timeout
        self._ask(relay.Wait(keys=tuple(keys), timeout_s=limit.total_seconds()))

    def check(self, keys: Sequence[str]) -> bool:
        return self._hear(bool, relay.Check(keys=tuple(keys)))

    def compare_set(self, key: str, expected_value: str | bytes, desired_value: str | bytes) -> bytes:
        ask = relay.CompareSet(key=key, expected=_bytes(expected_value), desired=_bytes(desired_value))
        return self._hear(bytes, ask)

    def delete_key(self, key: str) -> bool:
        return self._hear(bool, relay.Delete(key=key))

    def num_keys(self) -> int:
        return self._hear(int, relay.Count())

    deleteKey, getNumKeys = delete_key, num_keys  # as C++ calls them

    def _hear(self, kind: type[T], ask: relay.Ask) -> T:
        value = self._ask(ask)
        assert isinstance(value, kind), value
        return value

    def _ask(self, ask: relay.Ask) -> bytes | int | bool | None:
        with self._link() as link:
            link.send_bytes(relay.encode(ask))
            answer = relay.decode_answer(link.recv_bytes())
        if answer.timed_out:
            raise dist.DistStoreError(f"nobody has answered in time: {ask}")
        return answer.value

    @contextmanager
    def _link(self) -> Iterator[Connection]:
        """A connection for one question: while one thread of torch waits for a key, another may ask for something."""
        try:
            with self._guard:
                link = self._idle.pop() if self._idle else None
            link = link or self._dial()
            yield link
        except (OSError, EOFError) as error:
            raise dist.DistStoreError(f"the process that keeps the store is gone: {error!r}") from error
        with self._guard:
            self._idle.append(link)


def _bytes(value: str | bytes) -> bytes:
    return value.encode() if isinstance(value, str) else bytes(value)
