import asyncio
import threading
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import psutil
import pytest

from tests.distributed.live import ALONE, LONG, PAIR, Live, bare_ranks, live_ranks, run, video
from wan_grpc.domain.events import Completed, Progress, Stage
from wan_grpc.domain.formats import OutputFormat
from wan_grpc.domain.observations import GroupReady, RankChanged, RankMemorySampled
from wan_grpc.domain.topology import Topology

pytestmark = pytest.mark.asyncio(loop_scope="session")


@pytest.mark.parametrize(
    "request_",
    [
        {},
        {"width": 48, "height": 64, "num_frames": 9, "num_inference_steps": 5, "negative_prompt": "blurry"},
        {"guidance_scale": 1.0, "num_frames": 1, "num_inference_steps": 1},
        {"num_frames": 17, "seed": 7},
    ],
    ids=["small", "other sizes", "smallest", "longer"],
)
async def test_one_rank_and_two_make_the_same_video(single: Live, pair: Live, request_: dict[str, object]) -> None:
    """The number of ranks changes no sample by more than 1, and a second time gives the same bytes."""
    first, second = await asyncio.gather(single.make(**request_), pair.make(**request_))
    assert first == second
    assert hash(second) == hash(await pair.make(**request_))


async def test_the_same_file_from_the_same_ranks(pair: Live) -> None:
    """An encoded video, too, is byte for byte what it was."""
    asked = {"output_format": OutputFormat.MP4_H264, "num_frames": 17, "seed": 7}
    assert hash(await pair.make(**asked)) == hash(await pair.make(**asked))


async def test_the_number_of_cpu_threads_changes_nothing(tiny: Path, reference: bytes) -> None:
    """A rank with more threads computes the same bytes."""
    async with live_ranks(tiny, cpu_threads=3) as other:
        assert hash(await other.make()) == hash(reference)


async def test_another_seed_or_prompt_is_another_video(single: Live, reference: bytes) -> None:
    """The equality of the other tests is not that of videos that never differ."""
    assert len({reference, await single.make(seed=2), await single.make(prompt="a dog")}) == 3


async def test_many_in_line_all_come_right(pair: Live, reference: bytes) -> None:
    """Ten that wait run one after the other without a pause, and each is whole."""
    assert await asyncio.gather(*(pair.make() for _ in range(10))) == [reference] * 10


async def test_steps_and_memory_are_told(pair: Live) -> None:
    """Every step of every stage is told with its time, the experts in their order, and the memory of each rank."""
    watcher = await (await pair.begin(num_inference_steps=10, num_frames=9)).to_end()
    steps = watcher.find(Progress)
    denoised = [step for step in steps if step.stage is Stage.DENOISE and step.step]
    experts = [step.expert for step in denoised]
    assert all(step.step_time_s is not None and step.step_time_s > 0.0 for step in denoised)
    assert experts == sorted(experts, key=lambda expert: expert != "high_noise")
    assert len(set(experts)) == 2
    completed = watcher.find(Completed)[0]
    assert [memory.rank for memory in completed.rank_memory] == [0, 1]
    assert all(100e6 < memory.peak_bytes < 4e9 for memory in completed.rank_memory)


async def test_what_is_observed_of_a_start(tiny: Path) -> None:
    """Each rank comes up, the group is ready once, and tells what it runs on and what it holds."""
    async with live_ranks(tiny, topology=PAIR) as live:
        assert sorted(change.rank for change in live.seen(RankChanged) if change.up) == [0, 1]
        ready = live.seen(GroupReady)
        assert [(group.topology.world_size, group.device, group.dtype, group.attention) for group in ready] == [
            (2, "cpu (1 threads)", "float32", "torch_sdpa")
        ]
        assert [sample.rank for sample in live.seen(RankMemorySampled)] == [0, 1]


# ---- what ranks are -------------------------------------------------------------------------------------------------


async def test_ranks_are_forked_in_a_moment_and_leave_when_asked(tiny: Path, tmp_path: Path) -> None:
    """They are children of the forkserver, which outlives them, and nothing of theirs stays in the directory."""
    async with bare_ranks(tiny, tmp_path, topology=PAIR) as executor:
        ranks = [psutil.Process(pid) for pid in executor.pids]
        parents = {rank.ppid() for rank in ranks}
    assert len(parents) == 1
    assert psutil.pid_exists(parents.pop())
    assert not any(rank.is_running() and rank.status() != psutil.STATUS_ZOMBIE for rank in ranks)
    assert list(tmp_path.iterdir()) == []


async def test_neither_ranks_nor_forkserver_touch_a_gpu(pair: Live) -> None:
    """On CPU no process has opened a device or loaded a driver: a fork with a CUDA context would be of no use."""
    await pair.make()
    forkserver = psutil.Process(pair.pids[0]).ppid()
    for pid in (*pair.pids, forkserver):
        opened = {str(link.readlink()) for link in Path(f"/proc/{pid}/fd").iterdir() if link.is_symlink()}
        mapped = Path(f"/proc/{pid}/maps").read_text(encoding="utf-8")
        assert not [name for name in opened if name.startswith(("/dev/nvidia", "/dev/kfd"))]
        assert "libcuda.so" not in mapped


@pytest.fixture
def no_pickle(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Connections of this process whose pickling methods raise."""

    def refuse(*_: object) -> None:
        raise AssertionError("something on the link is pickled")

    monkeypatch.setattr(Connection, "send", refuse)
    monkeypatch.setattr(Connection, "recv", refuse)
    yield


@pytest.mark.usefixtures("no_pickle")
async def test_nothing_on_the_links_is_pickled(tiny: Path, reference: bytes) -> None:
    """From start to stop the server speaks bytes alone, and reads what it hears as msgpack; a pickle would fail."""
    async with live_ranks(tiny, topology=PAIR) as live:
        assert await live.make() == reference
        watcher = await live.reach(Stage.DENOISE, 1)
        await live.engine.cancel(watcher.records[0].event.name)  # type: ignore[union-attr]


# ---- pressure from behind -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("topology", [ALONE, PAIR], ids=["1", "2"])
async def test_a_disk_that_stands_still_makes_the_ranks_wait(tiny: Path, tmp_path: Path, topology: Topology) -> None:
    """While one frame is being taken the ranks rest as soon as the ring is full; then all come whole, in order."""
    gate, taken = threading.Event(), list[bytes]()

    def take(frame: memoryview) -> None:
        gate.wait(60)
        taken.append(bytes(frame))

    async with bare_ranks(tiny, tmp_path, topology=topology, num_slots=2) as executor:
        asked = video(executor, num_frames=33)
        free: list[bytes] = []
        await run(executor, asked, lambda frame: free.append(bytes(frame)))
        running = asyncio.ensure_future(run(executor, asked, take))
        ranks = [psutil.Process(pid) for pid in executor.pids]
        await until_they_rest(ranks)
        assert (taken, running.done()) == ([], False)
        gate.set()
        _, ended = await running
    assert ended.failure is None
    assert taken == free
    assert len(taken) == 33


async def until_they_rest(processes: list[psutil.Process]) -> None:
    """Wait until the processes have used no time of a CPU for a while."""
    before, still = [-1.0], 0
    async with asyncio.timeout(60):
        while still < 5:
            await asyncio.sleep(0.1)
            now = [round(sum(process.cpu_times()[:2]), 2) for process in processes]
            still = still + 1 if now == before else 0
            before = now


async def test_the_next_order_finds_ranks_that_waited(single: Live, reference: bytes) -> None:
    """A long video with more frames than the ring has slots, at full speed, changes nothing for the next one."""
    await single.make(num_frames=LONG["num_frames"])
    assert await single.make() == reference
