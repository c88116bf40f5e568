import contextlib
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import wait as wait_for
from pathlib import Path

import numpy as np
import psutil
import pytest

from tests.distributed.live import HEARD_S, Live, is_gone
from tests.distributed.two_hosts import TwoHosts, two_hosts
from tests.functional.live import ROOT, LiveServer, command, environment, eventually, start_server
from wan_grpc.v1 import generation_pb2 as pb

TORCHRUN = ROOT / ".venv" / "bin" / "torchrun"
SMALL = pb.GenerationSpec(
    prompt="a cat",
    seed=1,
    width=32,
    height=32,
    num_frames=5,
    num_inference_steps=3,
    output_format=pb.OUTPUT_FORMAT_RAW_RGB24,
)
LONG = pb.GenerationSpec(prompt="a cat", seed=1, width=64, height=64, num_frames=81, num_inference_steps=100)
"""As `ask` and LONG of the tests on one host."""


class Pair:
    """A server with a rank of its own, and torchrun with a rank on the other host."""

    def __init__(
        self,
        hosts: TwoHosts,
        server: LiveServer,
        torchrun: "subprocess.Popen[bytes]",
        log: Path,
        start: Callable[[], LiveServer],
    ) -> None:
        """start: another server where this one was."""
        self.hosts = hosts
        self.server = server
        self.torchrun = torchrun
        self.start = start
        self._log = log

    def told(self, event: str) -> list[dict[str, object]]:
        """What the server has logged of this."""
        return [line for line in self.server.log_lines() if line["event"] == event]

    def joined(self) -> list[psutil.Process]:
        """All processes on the other host: torchrun, the one that has joined, and its rank."""
        if self.torchrun.poll() is not None:
            return []
        process = psutil.Process(self.torchrun.pid)
        return [process, *process.children(recursive=True)]

    def supervisor(self) -> psutil.Process:
        """The process that has joined: the only child of torchrun."""
        (child,) = psutil.Process(self.torchrun.pid).children()
        return child

    def remote_rank(self) -> psutil.Process:
        """The only child of the process that has joined."""
        (rank,) = eventually(self.supervisor().children)
        return rank

    def log(self) -> str:
        return f"{self.server.log()}\n{self._log.read_text(encoding='utf-8')}"


@pytest.fixture(scope="module")
def pair(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    """Ready. Tests follow each other in its life; the last ones end the server."""
    directory = tmp_path_factory.mktemp("hosts")
    secret, log_path = directory / "secret", directory / "join.log"
    secret.write_text("0123456789abcdef\n", encoding="utf-8")
    secret.chmod(0o600)

    def start(join_address: str) -> LiveServer:
        flags = [
            *("--model-path", str(tiny), "--cpu-threads", "1", "--drain-window-s", "0", "--num-gpus", "2"),
            *("--nnodes", "2", "--join-address", join_address, "--join-secret-file", str(secret)),
        ]
        return start_server(directory, *flags, spool_dir=directory / "spool")

    with two_hosts() as hosts, log_path.open("wb") as log:
        server = start(f"{hosts.address}:0")
        (listening,) = [line for line in server.log_lines() if line["event"] == "listening for ranks of other hosts"]
        address = str(listening["join_address"])
        torchrun = subprocess.Popen(
            [
                *(*hosts.enter, str(TORCHRUN), "--standalone", "--nproc-per-node", "1", "-m", "wan_grpc.join"),
                *("--address", address, "--secret-file", str(secret), "--node-rank", "1"),
            ],
            stderr=log,
            stdout=log,
            cwd=ROOT,
            env=environment(),
        )
        made = Pair(hosts, server, torchrun, log_path, lambda: start(address))
        try:
            server.until_ready()
            yield made
        finally:
            made.server.close()
            for process in made.joined():
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            torchrun.wait()
            print(made.log())


def own_addresses(process: psutil.Process, enter: Sequence[str]) -> set[str]:
    """At which the process listens or is connected; asked on its own host, for others do not see it."""
    ask = f"import psutil; print(*{{c.laddr.ip for c in psutil.Process({process.pid}).net_connections('inet')}})"
    done = subprocess.run([*enter, sys.executable, "-c", ask], check=True, capture_output=True, text=True)
    return set(done.stdout.split())


def frames(video: bytes) -> "np.ndarray[tuple[int], np.dtype[np.int16]]":
    return np.frombuffer(video, dtype=np.uint8).astype(np.int16)


@pytest.mark.asyncio(loop_scope="session")
async def test_two_hosts_make_the_video_of_one_rank(pair: Pair, single: Live) -> None:
    """A rank that torchrun has started on the other host computes half of each step; the frames differ by 1 at most."""
    reference = frames(await single.make())
    video = frames(bytes(pair.server.make(SMALL).video))
    assert video.shape == reference.shape == (5 * 32 * 32 * 3,)
    assert int(np.abs(video - reference).max()) <= 1
    (joined,) = pair.told("a rank of another host has joined")
    assert (joined["rank"], joined["peer"] in pair.hosts.other_addresses) == (1, True)


def test_ranks_of_several_hosts_use_the_network_between_them(pair: Pair) -> None:
    """Each has connections, and listens, at the address of its host in that network and nowhere else."""
    own, other = pair.server.ranks()[-1], pair.remote_rank()
    assert set() < own_addresses(own, ()) <= pair.hosts.own_addresses
    assert set() < own_addresses(other, pair.hosts.enter) <= pair.hosts.other_addresses


def test_the_death_of_a_rank_on_another_host_is_survived(pair: Pair) -> None:
    """What ran is FAILED within seconds, the other host starts a rank again by itself, and the next video is right."""
    before = bytes(pair.server.make(SMALL).video)
    stream = pair.server.generate(LONG)
    stream.until(lambda event: event.progress.stage == pb.STAGE_DENOISE and event.progress.step >= 1)
    died, supervisor = pair.remote_rank(), pair.supervisor()
    began = time.monotonic()
    died.kill()
    ending = stream.finish()
    assert time.monotonic() - began < HEARD_S
    assert ending.reason == "RANK_DIED"
    assert re.search(r"rank 1 on \S+ was killed by SIGKILL", ending.message), ending
    pair.server.until_ready()
    assert bytes(pair.server.make(SMALL).video) == before
    assert pair.supervisor() == supervisor
    assert pair.remote_rank() != died


def test_the_death_of_the_servers_own_rank_ends_that_on_the_other_host(pair: Pair) -> None:
    """The whole group is started again, on both hosts."""
    own, other = pair.server.ranks()[-1], pair.remote_rank()
    num_restarts = len(pair.told("ranks are being started again"))
    own.kill()
    eventually(lambda: is_gone(other.pid), within_s=HEARD_S)
    eventually(lambda: len(pair.told("ranks are being started again")) > num_restarts)
    pair.server.until_ready()
    pair.server.make(SMALL)


def test_strangers_keep_no_rank_away(pair: Pair) -> None:
    """While more idle connections than there is room for come again and again, a group starts and makes the video."""
    before = bytes(pair.server.make(SMALL).video)
    num_restarts = len(pair.told("ranks are being started again"))
    host, port = str(pair.told("listening for ranks of other hosts")[0]["join_address"]).rsplit(":", 1)
    with idle_connections(host, int(port), count=80):
        eventually(
            lambda: pair.told("too many connections to the join address prove nothing: the first to come were closed")
        )
        pair.server.ranks()[-1].kill()
        eventually(lambda: len(pair.told("ranks are being started again")) > num_restarts)
        pair.server.until_ready()
        assert bytes(pair.server.make(SMALL).video) == before
    assert len(pair.told("ranks are being started again")) == num_restarts + 1


@contextlib.contextmanager
def idle_connections(host: str, port: int, *, count: int) -> Iterator[None]:
    """So many at a time; for each that is closed there comes another one."""
    done, open_ones = threading.Event(), list[socket.socket]()

    def keep_coming() -> None:
        while not done.wait(0.02):
            for one in wait_for(open_ones, 0.0):
                with contextlib.suppress(OSError):
                    if one.recv(1000):
                        continue
                open_ones.remove(one)
                one.close()
            while len(open_ones) < count:
                open_ones.append(socket.create_connection((host, port), timeout=10))

    thread = threading.Thread(target=keep_coming)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        for one in open_ones:
            one.close()


def test_an_idle_rank_on_another_host_that_is_stopped(pair: Pair) -> None:
    """It is found though nothing is asked of it, and the group is started again."""
    rank = pair.remote_rank()
    rank.suspend()
    eventually(lambda: "did not run for 10 s: stopped by a signal or a debugger" in pair.server.log())
    eventually(lambda: is_gone(rank.pid), within_s=HEARD_S)
    pair.server.until_ready()
    pair.server.make(SMALL)


def test_nothing_on_another_host_outlives_a_killed_server(pair: Pair) -> None:
    """Its ranks there end within seconds, in the middle of a video, and what has joined looks for a server again."""
    stream = pair.server.generate(LONG)
    stream.until(lambda event: event.progress.stage == pb.STAGE_DENOISE and event.progress.step >= 1)
    rank, supervisor = pair.remote_rank(), pair.supervisor()
    pair.server.kill()
    eventually(lambda: is_gone(rank.pid), within_s=HEARD_S)
    eventually(lambda: '"Connection refused", "event": "not joined yet"' in pair.log())
    assert supervisor.is_running() and not supervisor.children()


def test_a_server_that_is_started_again_has_its_ranks_back(pair: Pair) -> None:
    """What has joined comes back to it without a hand; when the server stops in peace, torchrun ends well, too."""
    pair.server.close()
    pair.server = pair.start()
    pair.server.until_ready()
    pair.server.make(SMALL)
    family = pair.joined()
    pair.server.signal(signal.SIGTERM)
    assert pair.server.wait() == 0
    assert pair.torchrun.wait(30) == 0
    assert all(is_gone(process.pid) for process in family)


def test_a_server_that_cannot_work_is_no_peace(tiny: Path, tmp_path: Path) -> None:
    """It ends with 1, and what has joined looks for another one for as long as it was told, and ends with 1, too."""
    secret = tmp_path / "secret"
    secret.write_text("0123456789abcdef\n", encoding="utf-8")
    secret.chmod(0o600)
    hosts = ("--nnodes", "2", "--num-gpus", "2", "--join-address", "127.0.0.1:0", "--join-secret-file", str(secret))
    flags = ("--model-path", str(tiny), "--cpu-threads", "1", "--drain-window-s", "0", *hosts)
    server = start_server(tmp_path, *flags, spool_dir=tmp_path / "spool")
    with contextlib.closing(server):
        (line,) = [line for line in server.log_lines() if line["event"] == "listening for ranks of other hosts"]
        joins = command("join", "--address", str(line["join_address"]), "--secret-file", str(secret))
        flags = ("--model-path", str(tmp_path / "nowhere"), "--give-up-after-s", "2")
        joined = subprocess.run(
            [*joins, *flags], env=environment(), capture_output=True, text=True, timeout=100, check=False
        )
        assert server.wait() == 1
    assert joined.returncode == 1, joined.stderr
    assert "not joined for 2 s" in joined.stderr
    assert "the server has stopped" not in joined.stderr
