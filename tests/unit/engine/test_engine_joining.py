import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing import Pipe, connection
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil
import pytest
import structlog

from wan_grpc import __version__
from wan_grpc.domain.errors import UnusableModelError
from wan_grpc.domain.topology import Topology
from wan_grpc.engine import joined, joining, links, messages
from wan_grpc.engine import joining_messages as words
from wan_grpc.engine.group import GroupEvent, GroupPlan, RankGroup, RanksDied
from wan_grpc.engine.joined import NotTakenError, Place, stay_joined
from wan_grpc.engine.joining import Away, Hosts
from wan_grpc.engine.joining_messages import Attach, End, Ended, Join, Leave, Refused, Seated, Start, UseStore
from wan_grpc.engine.links import Endpoint, RefusedError
from wan_grpc.engine.messages import Abort, Head, Ready
from wan_grpc.engine.rendezvous import dial_store
from wan_grpc.parallel import relay
from wan_grpc.pipeline import embedded
from wan_grpc.pipeline.checkpoint import Checkpoint
from wan_grpc.pipeline.fingerprint import fingerprint
from wan_grpc.pipeline.published import I2V_A14B_ID, T2V_A14B_ID

SECRET = b"what nobody guesses"
OTHER = b"what somebody guessed"
HERE = Endpoint(host="127.0.0.1", port=0)


def eventually(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, "never came true"
        time.sleep(0.005)


@pytest.fixture(autouse=True)
def log() -> Iterator[list[Any]]:
    with structlog.testing.capture_logs() as lines:
        yield lines


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    """Of a group of two hosts with two ranks each."""
    with contextlib.closing(Hosts(at=HERE, secret=SECRET, num_nodes=2, ranks_per_node=2, patience_s=0.5)) as hosts:
        yield hosts


@pytest.fixture
def dial(hosts: Hosts) -> Iterator[Callable[..., Connection]]:
    """Opens connections that know the secret and begin with these words. Closed after the test."""
    with contextlib.ExitStack() as stack:

        def dial(hello: words.Hello | None = None, *, secret: bytes = SECRET) -> Connection:
            link = stack.enter_context(contextlib.closing(links.dial(hosts.at, secret)))
            if hello is not None:
                link.send_bytes(words.encode(hello))
            return link

        yield dial


def join(local_rank: int = 0, **changes: Any) -> Join:
    values = {"node_rank": 1, "local_rank": local_rank, "num_local": 2, "host_name": "box", "version": __version__}
    return Join(**{**values, **changes})


def hear(control: Connection) -> words.ToHost:
    assert control.poll(10), "nothing is said"
    return words.decode_to_host(control.recv_bytes())


def is_ended(link: Connection) -> bool:
    """Whether the other end has hung up, with nothing left to hear."""
    assert link.poll(10), "it stays"
    try:
        link.recv_bytes()
    except (EOFError, OSError):
        return True
    return False


def summon(hosts: Hosts, group: str = "g") -> Away:
    return hosts.summon(group, configs={2: b"of 2", 3: b"of 3"}, fingerprint="f")


def start(rank: int, group: str = "g") -> Start:
    return Start(group=group, rank=rank, config=b"of %d" % rank, fingerprint="f")


# ---- the proof ------------------------------------------------------------------------------------------------------


def meet(accepting: bytes, dialling: bytes) -> tuple[object, object]:
    """What both ends of a connection have of it, or why they have none."""
    with links.listen(HERE) as listening:
        at = Endpoint(host="127.0.0.1", port=listening.getsockname()[1])
        results: dict[str, object] = {}

        def accept() -> None:
            try:
                results["accepted"] = links.greet(listening.accept()[0], accepting)
            except (RefusedError, OSError) as error:
                results["accepted"] = str(error)

        thread = threading.Thread(target=accept)
        thread.start()
        try:
            results["dialled"] = links.dial(at, dialling)
        except (RefusedError, OSError) as error:
            results["dialled"] = str(error).replace(str(at), "THERE")
        thread.join(10)
        return results["accepted"], results["dialled"]


def test_who_knows_the_secret_is_connected() -> None:
    """Both ends have a connection that carries messages of any size both ways."""
    accepted, dialled = meet(SECRET, SECRET)
    assert isinstance(accepted, Connection) and isinstance(dialled, Connection)
    for message in (b"", b"x", bytes(range(256)) * 1000):
        writer = threading.Thread(target=dialled.send_bytes, args=(message,))
        writer.start()
        assert accepted.recv_bytes() == message
        accepted.send_bytes(message[:1000])
        assert dialled.recv_bytes() == message[:1000]
        writer.join()
    assert links.own_address(dialled) == "127.0.0.1"
    accepted.close()
    assert is_ended(dialled)
    dialled.close()


def test_who_does_not_know_it_is_refused() -> None:
    """Each end learns that the secrets differ, and has no connection."""
    assert meet(SECRET, OTHER) == ("it does not know the secret", "the server at THERE knows another secret")


def listen_once(answer: Callable[[socket.socket], None]) -> tuple[Endpoint, threading.Thread]:
    """Something that is no server of ours."""
    listening = socket.create_server(("127.0.0.1", 0))
    at = Endpoint(host="127.0.0.1", port=listening.getsockname()[1])

    def accept() -> None:
        with listening, listening.accept()[0] as accepted:
            answer(accepted)

    thread = threading.Thread(target=accept)
    thread.start()
    return at, thread


@pytest.mark.parametrize(
    ("answer", "error", "sentence"),
    [
        (lambda s: s.sendall(b"SSH-2.0-OpenSSH_9.2p1\r\n"), RefusedError, "is no wan-grpc server"),
        (lambda s: None, ConnectionResetError, "left before"),
        (
            lambda s: (s.sendall(links._GREETING + b"n" * 32), s.recv(64), s.sendall(b"p" * 32)),
            RefusedError,
            "does not know the secret",
        ),
        (
            # what was said to it, said back
            lambda s: (s.sendall(links._GREETING + b"n" * 32), s.sendall(s.recv(64)[32:])),
            RefusedError,
            "does not know the secret",
        ),
        (lambda s: time.sleep(1), TimeoutError, "timed out"),
    ],
    ids=["another protocol", "leaves", "guesses", "mirrors", "silent"],
)
def test_a_server_must_prove_itself(
    answer: Callable[[socket.socket], object], error: type[Exception], sentence: str
) -> None:
    """Whoever dials sends nothing to what listens there unless that knows the secret, too."""
    at, thread = listen_once(answer)  # type: ignore[arg-type]
    with pytest.raises(error, match=sentence):
        links.dial(at, SECRET, patience_s=0.3)
    thread.join()


@pytest.mark.parametrize(
    ("content", "mode", "problem"),
    [
        (b"x" * 15, 0o600, "must hold 16 to 4096 bytes"),
        (b"x" * 15 + b"\r\n", 0o600, "must hold 16 to 4096 bytes"),
        (b"x" * 4097, 0o600, "must hold 16 to 4096 bytes"),
        (b"x" * 16, 0o604, "everybody on this host has access to it"),
        (b"x" * 16, 0o602, "everybody on this host has access to it"),
        (b"x" * 16, 0o644, "everybody on this host has access to it"),
    ],
)
def test_bad_secrets(content: bytes, mode: int, problem: str, tmp_path: Path) -> None:
    """A secret that is too short, or that everybody can have, is refused by name."""
    path = tmp_path / "secret"
    path.write_bytes(content)
    path.chmod(mode)
    with pytest.raises(ValueError, match=f"{path}: {problem}"):
        links.read_secret(path)


def test_a_secret_is_the_content_without_the_line_end(tmp_path: Path) -> None:
    """The same secret, written with an editor or without, is the same."""
    path = tmp_path / "secret"
    secrets = []
    for content in (b"0123456789abcdef", b"0123456789abcdef\n", b"0123456789abcdef\r\n"):
        path.write_bytes(content)
        path.chmod(0o640)
        secrets.append(links.read_secret(path))
    assert secrets == [b"0123456789abcdef"] * 3


# ---- who joins ------------------------------------------------------------------------------------------------------


def test_a_stranger_costs_nothing(hosts: Hosts, dial: Callable[..., Connection], log: list[Any]) -> None:
    """Whoever guesses, talks nonsense or leaves is refused and logged, and the place stays for who knows the secret."""
    with pytest.raises(RefusedError):
        dial(secret=OTHER)
    with socket.create_connection((hosts.at.host, hosts.at.port)) as nonsense:
        nonsense.sendall(b"GET / HTTP/1.1\r\n" * 10)
        nonsense.settimeout(10)
        with contextlib.suppress(ConnectionResetError):
            while nonsense.recv(1000):
                pass
    socket.create_connection((hosts.at.host, hosts.at.port)).close()
    garbage = dial()
    garbage.send_bytes(b"\xc1 is not msgpack")
    assert is_ended(garbage)
    control = dial(join())
    assert hear(control) == Seated(rank=2)
    refused = [line for line in log if line["event"] == "a connection to the join address was refused"]
    eventually(lambda: sum(line["event"] == refused[0]["event"] for line in log) == 4)
    assert {line["peer"] for line in refused} == {"127.0.0.1"}


def test_who_says_nothing_is_dropped(hosts: Hosts, dial: Callable[..., Connection], log: list[Any]) -> None:
    """A connection that proves nothing, and one that proves itself and says no more, end soon and hold up nobody."""
    with socket.create_connection((hosts.at.host, hosts.at.port)) as silent:
        mute = dial()
        control = dial(join())
        assert hear(control) == Seated(rank=2)
        silent.settimeout(10)
        greeting = silent.recv(1000)
        assert (greeting[:16], silent.recv(1000)) == (links._GREETING, b"")
        assert is_ended(mute)
    eventually(lambda: sum("refused" in line["event"] for line in log) == 2)
    details = {line["detail"] for line in log if "refused" in line["event"]}
    assert details == {"timed out", "it knows the secret, and did not say what it wants"}


@pytest.fixture
def strangers(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Hosts, int], list[socket.socket]]]:
    """Opens connections that say nothing, at a server that has room for two. Closed after the test."""
    with contextlib.ExitStack() as stack:

        def come(hosts: Hosts, count: int) -> list[socket.socket]:
            monkeypatch.setattr(hosts, "_strangers", joining._Strangers(2))
            monkeypatch.setattr(hosts, "_patience_s", 60.0)
            made = []
            for _ in range(count):
                made.append(stack.enter_context(socket.create_connection((hosts.at.host, hosts.at.port), timeout=10)))
                made[-1].recv(48)
            return made

        yield come


SENT_AWAY = "too many connections to the join address prove nothing: the first to come were closed"


def test_strangers_make_way(
    hosts: Hosts,
    dial: Callable[..., Connection],
    strangers: Callable[[Hosts, int], list[socket.socket]],
    log: list[Any],
) -> None:
    """Where there is room for no more, those that have waited longest are closed, and who knows the secret gets in."""
    made = strangers(hosts, 5)
    assert [stranger.recv(1) for stranger in made[:3]] == [b""] * 3
    assert hear(dial(join())) == Seated(rank=2)
    assert made[3].recv(1) == b""
    made[4].settimeout(0.05)
    with pytest.raises(TimeoutError):
        made[4].recv(1)
    made[4].close()
    eventually(lambda: len(hosts._strangers) == 0)
    assert [line["num_closed"] for line in log if line["event"] == SENT_AWAY] == [1]  # and no more for a while
    assert [line["detail"] for line in log if "refused" in line["event"]] == [
        "the other end left before it had proven that it knows the secret"
    ]


def test_a_thread_that_cannot_be_had_is_survived(
    hosts: Hosts, dial: Callable[..., Connection], log: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The connection is closed and logged, its room is free again, and the next one is heard."""
    monkeypatch.setattr(joining, "_PAUSE_S", 0.01)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", _no_thread)
        with socket.create_connection((hosts.at.host, hosts.at.port), timeout=10) as unheard:
            assert unheard.recv(1) == b""
    assert len(hosts._strangers) == 0
    assert hear(dial(join())) == Seated(rank=2)
    (detail,) = (line["detail"] for line in log if line["event"].endswith("cannot be taken"))
    assert detail == "can't start new thread"


def _no_thread(thread: threading.Thread) -> None:
    raise RuntimeError("can't start new thread")


def test_a_rank_dials_with_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """A connection that breaks off is dialled again until it stands, but not for ever, and not when it is refused."""
    monkeypatch.setattr(links, "_DIAL_PAUSE_S", 0.0)
    outcomes: list[object] = [ConnectionResetError(), TimeoutError(), "link"]

    def dial(to: Endpoint, secret: bytes) -> object:
        outcome = outcomes.pop(0)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    monkeypatch.setattr(links, "dial", dial)
    assert links.keep_dialling(HERE, SECRET) == "link"
    outcomes[:] = [ConnectionResetError(), "link"]
    with pytest.raises(ConnectionResetError):
        links.keep_dialling(HERE, SECRET, for_s=0.0)
    outcomes[:] = [RefusedError(), "link"]
    with pytest.raises(RefusedError):
        links.keep_dialling(HERE, SECRET)


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ({"node_rank": 0}, "node rank 0 is none of 1 to 1"),
        ({"node_rank": 2}, "node rank 2 is none of 1 to 1"),
        ({"local_rank": 2}, "each host has 2 ranks; yours is local rank 2 of 2"),
        ({"local_rank": 0, "num_local": 1}, "each host has 2 ranks; yours is local rank 0 of 1"),
        ({"local_rank": 7, "num_local": 8}, "each host has 2 ranks; yours is local rank 7 of 8"),
        ({"version": "0.0"}, f"the server is wan-grpc {__version__}, and you are 0.0"),
    ],
)
def test_who_does_not_fit_is_refused(
    wrong: dict[str, Any], reason: str, dial: Callable[..., Connection], log: list[Any]
) -> None:
    """There are as many places as the server was told, and asking again is no use."""
    control = dial(join(**wrong))
    assert hear(control) == Refused(reason=reason, is_final=True)
    assert is_ended(control)
    assert [line["detail"] for line in log if line["event"] == "a rank of another host was refused"] == [reason]


def test_a_place_is_for_one(dial: Callable[..., Connection]) -> None:
    """Who comes second is told so and may ask again; the place is free once the first has left."""
    first = dial(join(1))
    assert hear(first) == Seated(rank=3)
    reason = "local rank 1 of node 1 is there already, from 127.0.0.1"
    assert hear(dial(join(1))) == Refused(reason=reason, is_final=False)
    first.close()
    eventually(lambda: isinstance(hear(dial(join(1))), Seated))


def test_every_address_at_once_is_refused() -> None:
    """Ranks meet at one address: that of the network which the other hosts are on."""
    for host in ("0.0.0.0", "::"):
        with pytest.raises(ValueError, match="must name one address"):
            Hosts(at=Endpoint(host=host, port=0), secret=SECRET, num_nodes=2, ranks_per_node=1)


def test_who_has_joined_is_told_when_the_server_stops(hosts: Hosts, dial: Callable[..., Connection]) -> None:
    """Everybody hears that there will be no further group, and nobody can join any more."""
    controls = [dial(join(rank)) for rank in (0, 1)]
    assert [hear(control) for control in controls] == [Seated(rank=2), Seated(rank=3)]

    def listen(control: Connection) -> None:
        heard.append(hear(control))
        control.close()

    heard: list[words.ToHost] = []
    listening = [threading.Thread(target=listen, args=(control,)) for control in controls]
    for thread in listening:
        thread.start()
    hosts.close()
    for thread in listening:
        thread.join()
    assert heard == [Leave(), Leave()]
    with pytest.raises(OSError, match="refused"):
        dial()


def test_who_has_joined_is_told_nothing_when_the_server_has_failed(
    hosts: Hosts, dial: Callable[..., Connection]
) -> None:
    """A server that cannot work hangs up without a word, as one that was killed would."""
    control = dial(join())
    assert hear(control) == Seated(rank=2)
    hosts.give_up()
    hosts.close()
    assert is_ended(control)


# ---- what a group asks ----------------------------------------------------------------------------------------------


def test_a_group_calls_those_who_are_there_and_those_who_come(hosts: Hosts, dial: Callable[..., Connection]) -> None:
    """Each rank is started once, whether its host joined before the group was called or after."""
    early = dial(join(0))
    assert hear(early) == Seated(rank=2)
    summon(hosts)
    late = dial(join(1))
    assert [hear(late), hear(late)] == [Seated(rank=3), start(3)]
    assert hear(early) == start(2)


def test_a_rank_arrives_with_both_its_connections(hosts: Hosts, dial: Callable[..., Connection]) -> None:
    """The group hears of a rank once it has its pipe and its lifeline, and can speak and listen to it."""
    control = dial(join())
    away = summon(hosts)
    assert [hear(control), hear(control)] == [Seated(rank=2), start(2)]
    pipe = dial(Attach(group="g", rank=2, link="pipe"))
    lifeline = dial(Attach(group="g", rank=2, link="lifeline"))
    assert away.bell.poll(10)
    (arrived,) = away.answer()
    assert (arrived.rank, arrived.host, away.answer()) == (2, "127.0.0.1", [])
    pipe.send_bytes(b"up")
    arrived.lifeline.send_bytes(b"down")
    assert (arrived.pipe.recv_bytes(), lifeline.recv_bytes()) == (b"up", b"down")
    hosts.dismiss(away)
    assert hear(control) == End(group="g")
    assert is_ended(pipe) and is_ended(lifeline)
    away.free()


@pytest.mark.parametrize(
    "hello",
    [
        Attach(group="g", rank=3, link="pipe"),
        Attach(group="g", rank=0, link="pipe"),
        Attach(group="g", rank=2, link="pipe"),
        Attach(group="former", rank=2, link="lifeline"),
        UseStore(group="former"),
    ],
    ids=["not started", "local", "twice", "of another group", "store of another group"],
)
def test_what_belongs_to_no_rank_is_hung_up(hello: words.Hello, hosts: Hosts, dial: Callable[..., Connection]) -> None:
    """A connection for a rank that nobody awaits comes to nothing, and harms nothing."""
    control = dial(join())
    away = summon(hosts)
    assert [hear(control), hear(control)] == [Seated(rank=2), start(2)]
    dial(Attach(group="g", rank=2, link="pipe"))
    eventually(lambda: (2, "pipe") in away._links)
    assert is_ended(dial(hello))
    assert (away.answer(), away.lost()) == ([], {})


def test_the_store_is_for_the_group(hosts: Hosts, dial: Callable[..., Connection]) -> None:
    """Ranks meet at the store with the secret alone; it ends with the group."""
    away = summon(hosts)
    head = Head(host=hosts.at.host, port=hosts.at.port, group="g", secret=SECRET)
    with contextlib.closing(dial_store(head)) as one, contextlib.closing(dial_store(head)) as other:
        one.send_bytes(relay.encode(relay.Get(key="k", timeout_s=1e9)))
        other.send_bytes(relay.encode(relay.Set(key="k", value=b"v")))
        assert relay.decode_answer(one.recv_bytes()) == relay.Answer(value=b"v")
        hosts.dismiss(away)
        assert relay.decode_answer(other.recv_bytes()) == relay.Answer()
        assert is_ended(one) and is_ended(other)
    with pytest.raises(RefusedError):
        dial_store(Head(host=hosts.at.host, port=hosts.at.port, group="g", secret=OTHER))
    assert "nobody" not in repr(head)


def test_what_becomes_of_a_rank_is_told(hosts: Hosts, dial: Callable[..., Connection]) -> None:
    """The words of the host count, else that it is gone; words on another group do not."""
    controls = [dial(join(rank)) for rank in (0, 1)]
    away = summon(hosts)
    for rank, control in enumerate(controls):
        assert [hear(control), hear(control)] == [Seated(rank=2 + rank), start(2 + rank)]
    controls[0].send_bytes(words.encode(Ended(group="former", detail="exited with code 0")))
    controls[0].send_bytes(words.encode(Ended(group="g", detail="was killed by SIGKILL")))
    assert away.lost(wait_s=10) == {2: "on 127.0.0.1 was killed by SIGKILL"}
    controls[1].close()
    assert away.lost(wait_s=10, count=2) == {
        2: "on 127.0.0.1 was killed by SIGKILL",
        3: "on 127.0.0.1 went away",
    }


def test_a_rank_that_was_lost_is_started_in_the_next_group(hosts: Hosts, dial: Callable[..., Connection]) -> None:
    """Its peers wait for what the first one had to say, so a second one in the same group would meet nobody."""
    first = dial(join())
    away = summon(hosts)
    assert [hear(first), hear(first)] == [Seated(rank=2), start(2)]
    first.close()
    assert away.lost(wait_s=10)
    second = dial(join())
    assert hear(second) == Seated(rank=2)
    hosts.dismiss(away)
    summon(hosts, "next")
    assert hear(second) == start(2, "next")
    hosts.dismiss(away)  # once more, and late: the next group goes on
    assert hear(dial(join(1))) == Seated(rank=3)
    assert not second.poll(0.05)


# ---- the group ------------------------------------------------------------------------------------------------------


def plan(directory: Path) -> GroupPlan:
    return GroupPlan(
        topology=Topology(ulysses=4),
        checkpoint=Checkpoint(model_path=T2V_A14B_ID, directory=None),
        device="auto",
        dtype="auto",
        load_format="dummy",
        cpu_threads=1,
        max_frame_bytes=1,
        directory=directory,
    )


@pytest.fixture
def group(
    hosts: Hosts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[RankGroup, list[GroupEvent]]]:
    """One whose local ranks are not there. What it delivers."""
    heard: list[GroupEvent] = []
    group = RankGroup(plan(tmp_path), heard.append, hosts=hosts)
    local: list[int] = []
    monkeypatch.setattr(group, "_start_rank", lambda rank, _fd: local.append(rank))
    group.start()
    assert local == [0, 1]
    yield group, heard
    group.kill()


def attached(group: RankGroup, dial: Callable[..., Connection], rank: int) -> tuple[Connection, Connection]:
    pipe, lifeline = (dial(Attach(group=group._name, rank=rank, link=link)) for link in ("pipe", "lifeline"))
    pipe.send_bytes(messages.encode(ready(rank)))
    return pipe, lifeline


def ready(rank: int) -> Ready:
    return Ready(rank=rank, device="cpu", dtype="float32", attention="a", used_bytes=rank, links_s=0.0)


def test_a_group_listens_to_ranks_of_other_hosts(
    group: tuple[RankGroup, list[GroupEvent]], dial: Callable[..., Connection]
) -> None:
    """Each is told what it is, heard when it is ready, called out of an exchange, and ended with the group."""
    made, heard = group
    controls = [dial(join(rank)) for rank in (0, 1)]
    configs = []
    for control in controls:
        assert isinstance(hear(control), Seated)
        started = hear(control)
        assert isinstance(started, Start)
        configs.append(messages.decode_config(started.config))
    assert [(config.rank, config.local_rank, config.topology) for config in configs] == [
        (2, 0, Topology(ulysses=4)),
        (3, 1, Topology(ulysses=4)),
    ]
    assert all(config.head is not None and config.head.secret == b"" for config in configs)
    ends = [attached(made, dial, rank) for rank in (2, 3)]
    eventually(lambda: len(heard) == 2)
    assert sorted(heard, key=lambda one: one.rank) == [ready(2), ready(3)]  # type: ignore[union-attr]
    made.abort("g/1")
    assert [messages.decode_abort(lifeline.recv_bytes()) for _, lifeline in ends] == [Abort(generation="g/1")] * 2
    made.kill()
    assert all(is_ended(link) for end in ends for link in end)
    assert [hear(control) for control in controls] == [End(group=made._name)] * 2
    assert len(heard) == 2


@pytest.mark.parametrize("said", ["was killed by SIGKILL", None])
def test_the_death_of_a_rank_of_another_host_ends_the_group(
    said: str | None, group: tuple[RankGroup, list[GroupEvent]], dial: Callable[..., Connection]
) -> None:
    """The end of its pipe is its death, for the reason that its host gives, if it does."""
    made, heard = group
    control = dial(join())
    assert [type(hear(control)) for _ in range(2)] == [Seated, Start]
    pipe, lifeline = attached(made, dial, 2)
    eventually(lambda: heard == [ready(2)])
    pipe.close()
    lifeline.close()
    if said is not None:
        control.send_bytes(words.encode(Ended(group=made._name, detail=said)))
    eventually(lambda: len(heard) == 2)
    assert heard[1] == RanksDied(detail=f"rank 2 on 127.0.0.1 {said or 'went away'}")


def test_a_rank_that_dies_before_it_arrives_ends_the_group(
    group: tuple[RankGroup, list[GroupEvent]], dial: Callable[..., Connection]
) -> None:
    """Nobody waits for a rank of which its host has said that it is no more."""
    made, heard = group
    control = dial(join(1))
    assert [type(hear(control)) for _ in range(2)] == [Seated, Start]
    control.send_bytes(words.encode(Ended(group=made._name, detail="exited with code 1")))
    eventually(lambda: bool(heard))
    assert heard == [RanksDied(detail="rank 3 on 127.0.0.1 exited with code 1")]


# ---- the other host -------------------------------------------------------------------------------------------------


def place(server: Endpoint, **changes: Any) -> Place:
    values = {
        "server": server,
        "secret": SECRET,
        "node_rank": 1,
        "local_rank": 0,
        "num_local": 2,
        "cache_dir": Path("/none"),
    }
    return Place(**{**values, **changes})


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(joined, "_PAUSE_S", 0.02)
    monkeypatch.setattr(joining, "_FAREWELL_S", 10.0)


def test_a_host_stays_until_the_server_stops(hosts: Hosts, quick: None) -> None:
    """It joins, and returns when the server says that there will be no more."""
    thread = threading.Thread(target=stay_joined, args=(place(hosts.at),), kwargs={"give_up_after_s": 60.0})
    thread.start()
    eventually(lambda: 2 in hosts._seats.taken)
    hosts.close()
    thread.join(10)
    assert not thread.is_alive()


def test_a_host_whose_secret_or_place_is_wrong_leaves(hosts: Hosts) -> None:
    """Asking again would be no use, and the sentence says why."""
    with pytest.raises(RefusedError, match="knows another secret"):
        stay_joined(place(hosts.at, secret=OTHER), give_up_after_s=60.0)
    with pytest.raises(NotTakenError, match="node rank 5 is none of 1 to 1"):
        stay_joined(place(hosts.at, node_rank=5), give_up_after_s=60.0)


def test_a_host_gives_up_on_a_server_that_is_not_there(quick: None) -> None:
    """It tries again for as long as it was told, and then says what was wrong."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        at = Endpoint(host="127.0.0.1", port=taken.getsockname()[1])
    with pytest.raises(TimeoutError, match=rf"{at}: not joined for 0\.1 s: Connection refused"):
        stay_joined(place(at), give_up_after_s=0.1)


def test_a_host_waits_for_a_place_that_is_taken(
    hosts: Hosts, dial: Callable[..., Connection], quick: None, log: list[Any]
) -> None:
    """One that is there already may be about to leave: what torchrun starts in its place takes over."""
    first = dial(join())
    assert hear(first) == Seated(rank=2)
    thread = threading.Thread(target=stay_joined, args=(place(hosts.at),), kwargs={"give_up_after_s": 60.0})
    thread.start()
    eventually(lambda: any(line["event"] == "not joined yet" for line in log))
    first.close()
    eventually(lambda: any(line["event"] == "joined" for line in log))
    hosts.close()
    thread.join(10)
    assert not thread.is_alive()


def test_a_host_comes_back_to_a_server_that_was_started_again(hosts: Hosts, quick: None, log: list[Any]) -> None:
    """A server that is gone without a word is looked for until there is another one at its address."""
    at = hosts.at
    thread = threading.Thread(target=stay_joined, args=(place(at),), kwargs={"give_up_after_s": 60.0})
    thread.start()
    eventually(lambda: 2 in hosts._seats.taken)
    seat = hosts._seats.taken[2]
    hosts._close.send_bytes(b"")
    hosts._listener.join()
    hosts._socket.close()
    links.hang_up(seat.control)  # as if the process had been killed
    eventually(lambda: any(line["event"] == "not joined yet" for line in log))
    with contextlib.closing(Hosts(at=at, secret=SECRET, num_nodes=2, ranks_per_node=2)) as again:
        eventually(lambda: 2 in again._seats.taken)
    thread.join(10)
    assert not thread.is_alive()


def test_a_rank_that_something_has_stopped_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that does not run for long enough is ended in those words; one that goes on in time is left alone."""
    monkeypatch.setattr(joined, "_be_rank", lambda *_: time.sleep(60))
    with contextlib.closing(joined._Rank(place(HERE))) as rank, contextlib.closing(Pipe()[0]) as control:
        rank.look()
        rank.start(start(2), control)
        assert rank._process is not None
        process = psutil.Process(rank._process.pid)
        for num_ticks in (joined._MOST_STOPPED_TICKS - 1, joined._MOST_STOPPED_TICKS):
            process.suspend()
            eventually(lambda: process.status() == psutil.STATUS_STOPPED)
            for _ in range(num_ticks):
                assert process.status() == psutil.STATUS_STOPPED
                rank.look()
            if num_ticks < joined._MOST_STOPPED_TICKS:
                process.resume()
                eventually(lambda: process.status() != psutil.STATUS_STOPPED)
                rank.look()
        assert connection.wait(rank.sentinels, 10)
        detail = "did not run for 10 s: stopped by a signal or a debugger"
        assert rank.bury() == Ended(group="g", detail=detail)


def told(model_path: str, directory: str | None) -> messages.RankConfig:
    """What a server says that has the published shapes of a model."""
    return messages.RankConfig(
        rank=2,
        topology=Topology(ulysses=4),
        rendezvous="/tmp/of-the-server",
        checkpoint=Checkpoint(model_path=model_path, directory=directory),
        device="auto",
        dtype="auto",
        load_format="dummy",
        cpu_threads=2**20,
        slot_bytes=1,
        num_slots=1,
        log_format="json",
        log_level="info",
    )


def test_a_rank_has_what_its_own_host_has() -> None:
    """Its device, its share of the threads, its way to the server, and the secret, which never was on the wire."""
    server = Endpoint(host="head", port=1)
    here = place(server, local_rank=1)
    own = joined._own_config(here, start(3), told("theirs", None), Checkpoint(model_path="ours", directory="/ours"))
    assert (own.local_rank, own.checkpoint.directory, own.head) == (
        1,
        "/ours",
        Head(host="head", port=1, group="g", secret=SECRET),
    )
    assert 1 <= own.cpu_threads < 2**20


def test_a_host_has_embedded_models_of_its_own(tmp_path: Path) -> None:
    """By the name that the server serves, or one it was told; put together below its own cache."""
    name = "wan-tiny-t2v"
    theirs = Checkpoint(model_path=name, directory=str(embedded.ensure_embedded(name, tmp_path / "theirs")))
    wanted = fingerprint(theirs, load_format="dummy")
    for here in (place(HERE, cache_dir=tmp_path / "ours"), place(HERE, cache_dir=tmp_path / "ours", model_path=name)):
        own = joined._own_checkpoint(here, told(name, "/only/on/the/server"), wanted)
        assert own.directory is not None and Path(own.directory).parent == tmp_path / "ours"
    other = place(HERE, cache_dir=tmp_path / "ours", model_path="wan-tiny-ti2v")
    with pytest.raises(UnusableModelError, match="is not the checkpoint that the server has"):
        joined._own_checkpoint(other, told(name, None), wanted)


@pytest.mark.parametrize("directory", [None, "/only/on/the/server"])
def test_a_host_finds_its_own_copy_of_the_checkpoint(directory: str | None) -> None:
    """By the hub id where the server's path is not there, or where it was told; and it must be the same one."""
    theirs = Checkpoint(model_path=T2V_A14B_ID, directory=None)
    wanted = fingerprint(theirs, load_format="dummy")
    here, config = place(HERE), told(T2V_A14B_ID, directory)
    assert joined._own_checkpoint(here, config, wanted) == theirs
    assert joined._own_checkpoint(place(HERE, model_path=T2V_A14B_ID), told("elsewhere", directory), wanted) == theirs
    with pytest.raises(UnusableModelError, match=f"{I2V_A14B_ID} is not the checkpoint that the server has"):
        joined._own_checkpoint(place(HERE, model_path=I2V_A14B_ID), config, wanted)
    with pytest.raises(UnusableModelError, match="/no/where is neither a directory nor a hub id"):
        joined._own_checkpoint(here, told("/no/where", directory), wanted)
