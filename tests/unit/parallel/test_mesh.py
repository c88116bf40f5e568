import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

NUM_RANKS = 3
RANK = """
import json, os, signal, sys
import psutil, torch
from wan_grpc.domain.topology import Topology
from wan_grpc.domain.traffic import Exchange
from wan_grpc.parallel.group import ExchangeBrokenError
from wan_grpc.parallel.mesh import PeersLostError, join

rank, store = int(sys.argv[1]), sys.argv[2]
mesh = join(Topology(ring=3), rank, device=torch.device("cpu"), store_path=store)
seen = {"is_first": mesh.is_first, "rank": mesh.rank, "world_size": mesh.topology.world_size}
words = [(0, 0, 0)[rank], (0, 1, 0)[rank], (3, 1, 2)[rank], 2**40 + rank]
seen["agree"] = [mesh.agree(word).word for word in words]
times = mesh.agree(0, seconds=1.5 * rank, waited_s=0.25).times
seen["times"] = [[time.seconds, time.waited_s, time.busy_s] for time in times]
payloads = [b"x", b"\\0\\xff" * 5, bytes(range(256)) * 4096]
seen["share"] = [mesh.share(payload if rank == 0 else None) == payload for payload in payloads]
seen["gather"] = [list(map(len, mesh.gather(bytes(3 * rank)))), [data.decode() for data in mesh.gather(b"abc"[rank:])]]
print(json.dumps(seen), flush=True)
addresses = {connection.laddr.ip for connection in psutil.Process().net_connections(kind="inet")}
print(json.dumps(sorted(addresses)), flush=True)

# An exchange from which one rank stays away, and whose links it gives up.
story = []
for _ in range(2):
    try:
        if rank == 1:
            raise ValueError
        mesh.world.add_up(torch.ones(2), kind=Exchange.TEXT)
        story.append("added up")
    except ExchangeBrokenError:
        story.append("broken")
    except ValueError:
        story.append("stayed away")
    mesh.drop()
    story.append(mesh.agree(0).word)
    mesh.build()
    story.append(mesh.world.add_up(torch.ones(2), kind=Exchange.TEXT).tolist())
print(json.dumps(story), flush=True)

if rank == 2:
    os.kill(os.getpid(), signal.SIGKILL)
try:
    mesh.agree(0)
except PeersLostError as error:
    print(json.dumps(str(error)), flush=True)
    os._exit(0)  # as a process of the forkserver ends: gloo's threads are not taken down one by one
"""


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[tuple[int, list[Any]]]]:
    """Exit code and printed lines of three ranks, the last of which is killed before a collective of all."""
    store = tmp_path_factory.mktemp("mesh") / "store"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(rank), str(store)], stdout=subprocess.PIPE, text=True, env=environment
        )
        for rank in range(NUM_RANKS)
    ]
    yield [(process.wait(), [json.loads(line) for line in out.splitlines()]) for process, out in _read(started)]


def _read(started: list[subprocess.Popen[str]]) -> Iterator[tuple[subprocess.Popen[str], str]]:
    for process in started:
        out, _ = process.communicate(timeout=100)
        yield process, out


@pytest.mark.parametrize("rank", range(NUM_RANKS))
def test_what_a_mesh_tells_each_rank(ranks: list[tuple[int, list[Any]]], rank: int) -> None:
    """All ranks hear the largest word, each other's times and payloads by rank, and that of rank 0 byte for byte."""
    assert ranks[rank][1][0] == {
        "is_first": rank == 0,
        "rank": rank,
        "world_size": 3,
        "agree": [0, 1, 3, 2**40 + 2],
        "times": [[0.0, 0.25, 0.0], [1.5, 0.25, 1.25], [3.0, 0.25, 2.75]],
        "share": [True, True, True],
        "gather": [[0, 3, 6], ["abc", "bc", "c"]],
    }


@pytest.mark.parametrize("rank", range(NUM_RANKS))
def test_links_are_made_anew(ranks: list[tuple[int, list[Any]]], rank: int) -> None:
    """When one rank gives its links up, the others come out of their exchange, and all can build new ones, twice."""
    what = "stayed away" if rank == 1 else "broken"
    assert ranks[rank][1][2] == [what, 0, [3.0, 3.0]] * 2


@pytest.mark.parametrize("rank", range(NUM_RANKS))
def test_a_mesh_meets_on_the_loopback_alone(ranks: list[tuple[int, list[Any]]], rank: int) -> None:
    """No rank listens on an address that another machine could reach."""
    assert ranks[rank][1][1] == ["127.0.0.1"]


def test_lost_peers_are_told_apart(ranks: list[tuple[int, list[Any]]]) -> None:
    """When a peer is killed, a collective does not hang: the others learn that the group is gone, and go on living."""
    assert ranks[2][0] == -signal.SIGKILL
    for code, lines in ranks[:2]:
        assert (code, len(lines)) == (0, 4), lines
        assert isinstance(lines[3], str)
