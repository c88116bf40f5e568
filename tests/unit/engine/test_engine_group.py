import multiprocessing
import os
import signal
import threading
import time
from dataclasses import replace
from multiprocessing import resource_sharer
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from wan_grpc.domain.topology import Topology
from wan_grpc.engine.group import GroupEvent, GroupPlan, HandedOver, LeftBehindError, RankGroup, RanksDied
from wan_grpc.engine.messages import Abort, Cancel, decode_abort
from wan_grpc.pipeline.checkpoint import Checkpoint

context = multiprocessing.get_context("forkserver")


def write_into(fd: int, pipe: Connection) -> None:
    os.pwrite(fd, b"hello", 0)
    pipe.send_bytes(b"done")


def test_a_descriptor_is_handed_over_without_a_server(tmp_path: Path) -> None:
    """The new process writes to the same file, and no thread that would hand descriptors out is started for it."""
    ours, theirs = context.Pipe()
    with (tmp_path / "file").open("w+b") as file:
        process = context.Process(target=write_into, args=(HandedOver(file.fileno()), theirs))
        process.start()
        assert ours.recv_bytes() == b"done"
        process.join()
        assert file.read() == b"hello"
    assert resource_sharer._resource_sharer._listener is None


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_reader_that_cannot_go_on_reports_the_group_as_dead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes that are no message do not end the watch over the ranks in silence."""
    heard: list[GroupEvent] = []
    told = threading.Event()

    def deliver(event: GroupEvent) -> None:
        heard.append(event)
        told.set()

    group = RankGroup(plan(tmp_path), deliver)
    ours, theirs = context.Pipe()
    group._pipes.append(ours)
    theirs.send_bytes(b"\xc1 is not msgpack")
    group._reader.start()
    assert told.wait(10)
    assert heard == [RanksDied(detail="what rank 0 said could not be read")]
    group.kill()
    theirs.close()


def test_a_kill_waits_for_a_start_that_is_under_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a start forks while the group is being killed is killed too, and a later start forks nothing."""
    group = RankGroup(plan(tmp_path), lambda _: None)
    forking, go_on = threading.Event(), threading.Event()
    process = context.Process(target=time.sleep, args=(60,), daemon=True)

    def fork(_rank: int, _fd: int) -> None:
        forking.set()
        assert go_on.wait(10)
        process.start()
        group._processes.append(process)

    monkeypatch.setattr(group, "_start_rank", fork)
    starting = threading.Thread(target=group.start)
    starting.start()
    assert forking.wait(10)
    killing = threading.Thread(target=group.kill)
    killing.start()
    go_on.set()
    starting.join(10)
    killing.join(10)
    assert process.exitcode == -signal.SIGKILL
    group.start()
    assert group.pids == (process.pid,)


class Undying:
    """A process that not even SIGKILL ends."""

    pid = 123

    def kill(self) -> None: ...

    def join(self, timeout_s: float) -> None:
        time.sleep(timeout_s)

    def is_alive(self) -> bool:
        return True


def test_a_process_that_does_not_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kill names it in the end; whoever waits for it to read is let go, and the interpreter does not wait for it."""
    monkeypatch.setattr("wan_grpc.engine.group._END_S", 0.1)
    group = RankGroup(replace(plan(tmp_path), first_rank=2), lambda _: None)
    undying, (ours, theirs) = Undying(), context.Pipe()
    multiprocessing.process._children.add(undying)  # type: ignore[attr-defined]
    group._processes += [undying, Undying()]  # type: ignore[list-item]
    group._pipes.append(ours)
    writing = threading.Thread(target=group.send, args=(Cancel(generation="x" * 10_000_000),))
    writing.start()
    with pytest.raises(LeftBehindError, match=r"rank 2 \(process 123\) and rank 3 \(process 123\) do not end"):
        group.kill()
    writing.join(10)
    assert not writing.is_alive()
    assert undying not in multiprocessing.process._children  # type: ignore[attr-defined]
    ours.close()
    theirs.close()


def test_every_rank_is_called_out(tmp_path: Path) -> None:
    """An abort reaches the lifeline of each rank that is there; those of dead ones, and closed ones, are no error."""
    group = RankGroup(plan(tmp_path), lambda _: None)
    lifelines = [context.Pipe(duplex=False) for _ in range(3)]
    group._lifelines.extend(ours for _, ours in lifelines)
    lifelines[0][0].close()
    lifelines[1][1].close()
    group.abort("generations/1")
    assert decode_abort(lifelines[2][0].recv_bytes()) == Abort(generation="generations/1")
    group.kill()


def test_ranks_beside_other_groups(tmp_path: Path) -> None:
    """The second group of a host counts its ranks, and takes its devices, after those of the first one."""
    group = RankGroup(replace(plan(tmp_path), topology=Topology(cfg=2), first_rank=2, demand="4 GPUs"), lambda _: None)
    configs = [group._config(rank) for rank in range(2)]
    assert [(config.rank, config.local_rank, config.first_rank, config.demand) for config in configs] == [
        (0, 2, 2, "4 GPUs"),
        (1, 3, 2, "4 GPUs"),
    ]
    dead = context.Process(target=os._exit, args=(3,), daemon=True)
    dead.start()
    dead.join()
    group._processes.append(dead)
    assert group._epitaph() == "rank 2 exited with code 3"
    group.kill()


def plan(directory: Path) -> GroupPlan:
    return GroupPlan(
        topology=Topology(),
        checkpoint=Checkpoint(model_path="none", directory=None),
        device="cpu",
        dtype="float32",
        load_format="dummy",
        cpu_threads=1,
        max_frame_bytes=1,
        directory=directory,
    )
