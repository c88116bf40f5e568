import asyncio
import os
import shutil
import signal
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from tests.bench import eventually
from tests.distributed.live import ALONE, HEARD_S, PAIR, Live, bare_ranks, is_gone, live_ranks, open_files, run, video
from wan_grpc.domain.errors import Failure, Reason, UnusableModelError
from wan_grpc.domain.events import Stage, State
from wan_grpc.domain.observations import GroupRestarting, RankChanged, RestartCause
from wan_grpc.domain.topology import Topology
from wan_grpc.engine.executor import RestartPolicy

pytestmark = pytest.mark.asyncio(loop_scope="session")

INTERNAL = Failure(reason=Reason.INTERNAL, message="an internal error ended the generation; the server's log has it")


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("stage", [Stage.DENOISE, Stage.DECODE])
async def test_a_rank_killed_at_work(pair: Live, reference: bytes, rank: int, stage: Stage) -> None:
    """The caller hears within 5 s which rank died of what; readiness turns red and green; those in line are made."""
    pids, restarts = pair.pids, len(pair.seen(GroupRestarting))
    changes = pair.engine.status_changes()
    assert await anext(changes)
    running = await pair.reach(stage, 1, num_inference_steps=1 if stage is Stage.DECODE else 100)
    waiting = [await pair.begin() for _ in range(2)]
    began = time.monotonic()
    os.kill(pids[rank], signal.SIGKILL)
    await running.to_end()
    assert time.monotonic() - began < HEARD_S
    failure = running.failure
    assert isinstance(failure, Failure)
    assert failure.reason is Reason.RANK_DIED
    assert f"rank {rank} was killed by SIGKILL" in failure.message
    assert failure.retry_after_s is not None and failure.retry_after_s >= 1.0
    assert [await anext(changes), await anext(changes)] == [False, True]
    assert [(await watcher.to_end()).video for watcher in waiting] == [reference, reference]
    assert pair.engine.get(running.records[0].event.name).state is State.FAILED  # type: ignore[union-attr]
    assert not set(pids) & set(pair.pids)
    assert all(is_gone(pid) for pid in pids)
    told = pair.seen(GroupRestarting)[restarts:]
    assert [restarting.cause for restarting in told] == [RestartCause.RANK_DIED]
    up = pair.seen(RankChanged)[-4:]
    assert [(change.rank, change.up) for change in up[:2]] == [(0, False), (1, False)]
    assert sorted((change.rank, change.up) for change in up[2:]) == [(0, True), (1, True)]


@pytest.mark.parametrize("rank", [0, 1])
async def test_an_idle_rank_killed(pair: Live, reference: bytes, rank: int) -> None:
    """Nobody is hurt: readiness turns red and green, and what is asked meanwhile is made by the new ranks."""
    pids = pair.pids
    changes = pair.engine.status_changes()
    assert await anext(changes)
    began = time.monotonic()
    os.kill(pids[rank], signal.SIGKILL)
    assert await anext(changes) is False
    assert time.monotonic() - began < HEARD_S
    assert await pair.make() == reference
    assert await anext(changes) is True
    assert not set(pids) & set(pair.pids)


async def test_all_ranks_killed_at_once(pair: Live, reference: bytes) -> None:
    """The story names each."""
    running = await pair.reach(Stage.DENOISE, 1)
    for pid in pair.pids:
        os.kill(pid, signal.SIGKILL)
    await running.to_end()
    assert "rank 0 was killed by SIGKILL; rank 1 was killed by SIGKILL" in running.failure.message  # type: ignore[attr-defined]
    assert await pair.make() == reference


async def test_deaths_leave_nothing_open(pair: Live, reference: bytes) -> None:
    """Restart after restart, the server holds as many files as before, and its directory as many."""
    await die_and_come_back(pair, rank=0)
    before = open_files(), sorted(pair.spool.directory.iterdir())
    for rank in (1, 0, 1):
        await die_and_come_back(pair, rank=rank)
    await eventually(lambda: open_files() <= before[0], f"no more than {before[0]} open files")
    assert len(sorted(pair.spool.directory.iterdir())) == len(before[1])
    assert await pair.make() == reference


async def die_and_come_back(live: Live, *, rank: int) -> None:
    changes = live.engine.status_changes()
    assert await anext(changes)
    os.kill(live.pids[rank], signal.SIGKILL)
    assert [await anext(changes), await anext(changes)] == [False, True]


async def test_a_forkserver_that_is_killed(pair: Live, reference: bytes) -> None:
    """Its ranks die with it, the caller hears so, and ranks come back from a new one."""
    forkserver = psutil.Process(pair.pids[0]).ppid()
    running = await pair.reach(Stage.DENOISE, 1)
    pids = pair.pids
    os.kill(forkserver, signal.SIGKILL)
    await running.to_end()
    assert running.failure.reason is Reason.RANK_DIED  # type: ignore[attr-defined]
    await eventually(lambda: all(is_gone(pid) for pid in pids))
    async with asyncio.timeout(100):
        assert await pair.make() == reference
    assert psutil.Process(pair.pids[0]).ppid() != forkserver


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_signals_to_the_group_change_nothing(tiny: Path, reference: bytes, number: signal.Signals) -> None:
    """Ctrl-C and a service manager reach ranks and forkserver too; what is being made is made to its end."""
    async with live_ranks(tiny, topology=PAIR) as live:
        pids, forkserver = live.pids, psutil.Process(live.pids[0]).ppid()
        watcher = await live.begin(num_inference_steps=20)
        await watcher.saw(Stage.DENOISE, 2)
        for pid in (*pids, forkserver):
            os.kill(pid, number)
        await watcher.to_end()
        assert live.engine.get(watcher.records[0].event.name).state is State.SUCCEEDED  # type: ignore[union-attr]
        assert await live.make() == reference
        assert live.pids == pids
        assert psutil.Process(pids[0]).ppid() == forkserver


# ---- starts that fail -----------------------------------------------------------------------------------------------


async def test_ranks_that_die_before_they_are_ready(tiny: Path) -> None:
    """Three starts in a row that come to nothing are enough: a sentence says so, and those that wait hear it."""
    policy = RestartPolicy(max_failures=3, window_s=60.0)
    async with live_ranks(tiny, topology=PAIR, policy=policy, wait=False) as live:
        waiting = await live.begin()
        killer = asyncio.create_task(kill_newborns(live))
        fatal = await asyncio.wait_for(asyncio.shield(live.engine.fatal), 60.0)
        killer.cancel()
        await waiting.to_end()
        assert fatal.startswith("3 starts of the ranks failed within 60 s; the last: rank ")
        assert "was killed by SIGKILL" in fatal
        assert waiting.failure == Failure(reason=Reason.RANK_DIED, message=f"the ranks cannot be started: {fatal}")
        assert [restarting.cause for restarting in live.seen(GroupRestarting)] == [RestartCause.START_FAILED] * 3
        assert not live.engine.status().ready
        with pytest.raises(UnusableModelError, match="3 starts of the ranks failed"):
            await live.executor.wait_ready()


async def kill_newborns(live: Live) -> None:
    """Kill every rank as soon as there is one."""
    while True:
        for pid in live.pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        await asyncio.sleep(0.002)


async def test_a_start_that_fails_once_is_tried_again(tiny: Path, reference: bytes) -> None:
    """One rank that dies while it loads costs a second, not the server."""
    async with live_ranks(tiny, topology=PAIR, wait=False) as live:
        await eventually(lambda: len(live.pids) == 2)
        os.kill(live.pids[1], signal.SIGKILL)
        assert await live.make() == reference
        assert [restarting.cause for restarting in live.seen(GroupRestarting)] == [RestartCause.START_FAILED]


async def test_ranks_that_take_too_long(tiny: Path) -> None:
    """A group that is not ready in time counts as one that failed, and its processes are gone."""
    policy = RestartPolicy(max_failures=1, start_timeout_s=0.01)
    async with live_ranks(tiny, policy=policy, wait=False) as live:
        last = "not ready within --start-timeout-s 0.01"
        assert await live.engine.fatal == f"1 starts of the ranks failed within 600 s; the last: {last}"
        await eventually(lambda: live.pids == ())


@pytest.mark.parametrize("topology", [ALONE, PAIR], ids=["1", "2"])
async def test_a_checkpoint_that_is_damaged_meanwhile(
    tiny: Path, reference: bytes, tmp_path: Path, topology: Topology
) -> None:
    """Ranks at work do not notice; when they must start again it is fatal at once, in the loader's own words."""
    checkpoint = tmp_path / "model"
    shutil.copytree(tiny, checkpoint)
    async with live_ranks(checkpoint, topology=topology) as live:
        damaged = next(checkpoint.glob("transformer/*.safetensors"))
        damaged.write_bytes(b"\xff" * damaged.stat().st_size)
        assert await live.make() == reference
        os.kill(live.pids[0], signal.SIGKILL)
        await eventually(lambda: not live.engine.status().ready)
        waiting = await live.begin()
        fatal = await asyncio.wait_for(asyncio.shield(live.engine.fatal), 60.0)
        assert f"{damaged} cannot be read" in fatal
        await waiting.to_end()
        assert waiting.failure == Failure(reason=Reason.RANK_DIED, message=f"the ranks cannot be started: {fatal}")
        causes = [restarting.cause for restarting in live.seen(GroupRestarting)]
        assert causes == [RestartCause.RANK_DIED], "it is not tried again"


async def test_a_stop_while_ranks_are_starting(tiny: Path) -> None:
    """A server that is told to leave before it is ready leaves no process behind."""
    async with live_ranks(tiny, topology=PAIR, wait=False) as live:
        await eventually(lambda: len(live.pids) == 2)
        pids = live.pids
    assert all(is_gone(pid) for pid in pids)


async def test_a_stop_in_the_middle_of_a_video(tiny: Path) -> None:
    """Ranks at work are killed, and the generation ends as CANCELLED."""
    async with live_ranks(tiny, topology=PAIR) as live:
        watcher = await live.reach(Stage.DENOISE, 1)
        pids = live.pids
    await watcher.to_end()
    assert watcher.failure.reason is Reason.SHUTTING_DOWN  # type: ignore[attr-defined]
    assert all(is_gone(pid) for pid in pids)


# ---- errors in the middle -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("topology", [ALONE, PAIR], ids=["1", "2"])
async def test_an_error_in_the_pipeline(tiny: Path, tmp_path: Path, topology: Topology) -> None:
    """A video that nobody checked fails inside; the ranks tell of a bug, live on, and make the next one right."""
    async with bare_ranks(tiny, tmp_path, topology=topology) as executor:
        good = video(executor)
        first: list[bytes] = []
        await run(executor, good, lambda frame: first.append(bytes(frame)))
        pids = executor.pids
        for bad in (
            replace(good, num_frames=0),
            replace(good, num_inference_steps=0),
            replace(good, width=256, height=256, num_inference_steps=1),  # larger than a slot of the ring
        ):
            _, ended = await run(executor, bad)
            assert (ended.failure, ended.cancelled) == (INTERNAL, False)
            again: list[bytes] = []
            _, ended = await run(executor, good, lambda frame, again=again: again.append(bytes(frame)))
            assert (ended.failure, again) == (None, first)
        assert executor.pids == pids
