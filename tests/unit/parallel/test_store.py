import socket
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any

import psutil
import pytest
import structlog
import torch.distributed as dist

from wan_grpc.engine.rendezvous import StoreServer
from wan_grpc.parallel import relay
from wan_grpc.parallel.mesh import interface_of
from wan_grpc.parallel.store import RelayedStore


class Keeper:
    """A store in this process, and how it is reached."""

    def __init__(self) -> None:
        self.server = StoreServer()
        self.num_dialled = 0
        self.threads: list[threading.Thread] = []

    def dial(self) -> Connection:
        ours, theirs = Pipe()
        self.num_dialled += 1
        self.threads.append(threading.Thread(target=self._serve, args=(theirs,), daemon=True))
        self.threads[-1].start()
        return ours

    def _serve(self, link: Connection) -> None:
        self.server.serve(link)
        link.close()


@pytest.fixture
def keeper() -> Iterator[Keeper]:
    keeper = Keeper()
    yield keeper
    keeper.server.close()
    for thread in keeper.threads:
        thread.join(10)
        assert not thread.is_alive()


SCRIPT: list[Callable[[dist.Store], Any]] = [
    lambda store: store.num_keys(),
    lambda store: store.set("a", "text"),
    lambda store: store.get("a"),
    lambda store: store.set("b", "\x00\x01" * 100),
    lambda store: store.get("b"),
    lambda store: store.set("a", "another"),
    lambda store: store.get("a"),
    lambda store: store.add("n", 3),
    lambda store: store.add("n", -5),
    lambda store: store.get("n"),
    lambda store: store.check(["a", "n"]),
    lambda store: store.check(["a", "missing"]),
    lambda store: store.wait(["a", "b"]),
    lambda store: store.wait(["a"], timedelta(seconds=1)),
    lambda store: store.compare_set("c", "", "first"),
    lambda store: store.compare_set("c", "other", "second"),
    lambda store: store.compare_set("c", "first", "second"),
    lambda store: store.compare_set("d", "expected", "never"),
    lambda store: store.check(["d"]),
    lambda store: store.num_keys(),
    lambda store: store.delete_key("a"),
    lambda store: store.delete_key("a"),
    lambda store: store.num_keys(),
]


@pytest.mark.parametrize("wrap", [lambda store: store, lambda store: dist.PrefixStore("group", store)])
def test_it_answers_as_the_stores_of_torch_do(keeper: Keeper, wrap: Callable[[dist.Store], dist.Store]) -> None:
    """Every question has the answer that torch's own store in memory gives, also where C++ asks through a prefix."""
    own, theirs = RelayedStore(keeper.dial), dist.HashStore()
    relayed, reference = wrap(own), wrap(theirs)
    assert [ask(relayed) for ask in SCRIPT] == [ask(reference) for ask in SCRIPT]
    assert keeper.num_dialled == 1


def test_who_waits_holds_up_nobody(keeper: Keeper) -> None:
    """Two threads wait for keys that a third one of the same rank sets later, each on a connection of its own."""
    store = RelayedStore(keeper.dial)
    found: dict[str, bytes] = {}
    waiting = [threading.Thread(target=lambda key=key: found.update({key: store.get(key)})) for key in ("a", "b")]
    for thread in waiting:
        thread.start()
    store.set("c", "there")
    store.set("b", "2")
    store.set("a", "1")
    for thread in waiting:
        thread.join(10)
    assert found == {"a": b"1", "b": b"2"}
    assert keeper.num_dialled <= 3


def test_ranks_see_each_others_keys(keeper: Keeper) -> None:
    """What one rank sets, another one gets, though it began to wait before."""
    first, second = RelayedStore(keeper.dial), RelayedStore(keeper.dial)
    later = threading.Timer(0.05, first.set, ("k", b"v"))
    later.start()
    second.wait(["k"], timedelta(days=365))
    assert second.get("k") == b"v"
    later.join()


def test_a_wait_ends(keeper: Keeper) -> None:
    """A key that nobody sets is waited for no longer than asked, and than the store's own time where none is asked."""
    store = RelayedStore(keeper.dial)
    began = time.monotonic()
    with pytest.raises(dist.DistStoreError, match="nobody has answered in time"):
        store.wait(["missing"], timedelta(milliseconds=50))
    store.set_timeout(timedelta(milliseconds=50))
    with pytest.raises(dist.DistStoreError):
        store.get("missing")
    assert 0.1 <= time.monotonic() - began < 5.0
    store.set("k", "and then it goes on")


def test_a_closed_store_lets_everybody_go(keeper: Keeper) -> None:
    """Whoever waits when the store is closed, or asks afterwards, is told that it is gone."""
    store = RelayedStore(keeper.dial)
    store.set("k", "v")
    threading.Timer(0.05, keeper.server.close).start()
    with pytest.raises(dist.DistStoreError):
        store.wait(["missing"], timedelta(days=365))
    with pytest.raises(dist.DistStoreError, match="is gone"):
        store.get("k")


@pytest.mark.parametrize("garbage", [b"\xc1 is not msgpack", relay.encode(relay.Add(key="text", amount=1))])
def test_what_makes_no_sense_ends_its_connection_alone(keeper: Keeper, garbage: bytes) -> None:
    """It is logged, and the others go on."""
    store = RelayedStore(keeper.dial)
    store.set("text", "no number")
    link = keeper.dial()
    with structlog.testing.capture_logs() as log:
        link.send_bytes(garbage)
        with pytest.raises(EOFError):
            link.recv_bytes()
    assert [line["event"] for line in log] == ["a connection to the store of the ranks was closed: it makes no sense"]
    assert store.get("text") == b"no number"
    link.close()


def test_an_interface_is_known_by_its_address() -> None:
    """Each address of this host names the interface that has it, 127.0.0.2 the loopback; others are refused."""
    families = (socket.AF_INET, socket.AF_INET6)
    own = {
        entry.address: name
        for name, entries in psutil.net_if_addrs().items()
        for entry in entries
        if entry.family in families
    }
    assert {address: interface_of(address) for address in own} == own
    assert interface_of("127.0.0.2") == interface_of("127.0.0.1") == "lo"
    with pytest.raises(ValueError, match=r"no network interface of this host has the address 203\.0\.113\.7"):
        interface_of("203.0.113.7")
