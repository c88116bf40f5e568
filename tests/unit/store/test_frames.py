import errno
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from wan_grpc.store.artifacts import StorageFailedError
from wan_grpc.store.frames import FramesAbortedError, FrameSpool

TIMEOUT_S = 30


def frame(index: int, size: int = 1000) -> bytes:
    return index.to_bytes(4, "big") * (size // 4)


def read_all(spool: FrameSpool, on_frame: Callable[[bytes], None] = lambda _: None) -> list[bytes]:
    frames = []
    for data in spool.frames():
        frames.append(data)
        on_frame(data)
    return frames


def in_a_thread(function: Callable[[], list[bytes]]) -> "Future[list[bytes]]":
    executor = ThreadPoolExecutor(1)
    future = executor.submit(function)
    executor.shutdown(wait=False)
    return future


def num_descriptors() -> int:
    return psutil.Process().num_fds()


def test_frames_come_out_as_they_went_in(tmp_path: Path) -> None:
    """Every frame, in order, from bytes and from memory that is used again at once."""
    spool = FrameSpool(tmp_path, 1000)
    slot = bytearray(1000)
    for index in range(20):
        slot[:] = frame(index)
        spool.put(memoryview(slot) if index % 2 else bytes(slot))
    spool.close()
    assert read_all(spool) == [frame(index) for index in range(20)]


def test_no_frames_at_all(tmp_path: Path) -> None:
    """A reader of a spool that is closed empty ends at once."""
    spool = FrameSpool(tmp_path, 1000)
    spool.close()
    assert read_all(spool) == []


def test_a_reader_gets_each_frame_while_later_ones_are_still_to_come(tmp_path: Path) -> None:
    """The reader has frame n before n+1 is put, and waits without ending until the spool is closed."""
    spool = FrameSpool(tmp_path, 1000)
    arrived = threading.Semaphore(0)
    reader = in_a_thread(lambda: read_all(spool, lambda _: arrived.release()))
    for index in range(10):
        spool.put(frame(index))
        assert arrived.acquire(timeout=TIMEOUT_S)
        assert not reader.done()
    spool.close()
    assert reader.result(TIMEOUT_S) == [frame(index) for index in range(10)]


def test_a_writer_never_waits_for_the_reader(tmp_path: Path) -> None:
    """All frames go in while the reader is stuck at its first one; it finds them all when it goes on."""
    spool = FrameSpool(tmp_path, 1000)
    first, go_on = threading.Event(), threading.Event()

    def hold(_: bytes) -> None:
        first.set()
        assert go_on.wait(TIMEOUT_S)

    spool.put(frame(0))
    reader = in_a_thread(lambda: read_all(spool, hold))
    assert first.wait(TIMEOUT_S)
    for index in range(1, 200):
        spool.put(frame(index))
    spool.close()
    assert not reader.done()
    go_on.set()
    assert reader.result(TIMEOUT_S) == [frame(index) for index in range(200)]


def test_a_fast_writer_and_a_fast_reader(tmp_path: Path) -> None:
    """Two threads at full speed lose, double and tear nothing."""
    spool = FrameSpool(tmp_path, 1000)
    reader = in_a_thread(lambda: read_all(spool))
    for index in range(5000):
        spool.put(frame(index))
    spool.close()
    assert reader.result(TIMEOUT_S) == [frame(index) for index in range(5000)]


def test_frames_wait_on_disk_and_not_in_memory(tmp_path: Path) -> None:
    """Half a gigabyte of waiting frames costs next to no memory."""
    size = 8 * 2**20
    spool = FrameSpool(tmp_path, size)
    data = bytes(size)
    before = psutil.Process().memory_info().rss
    for _ in range(64):
        spool.put(data)
    assert psutil.Process().memory_info().rss - before < 32 * 2**20
    spool.abort()


def test_a_waiting_reader_costs_no_processor(tmp_path: Path) -> None:
    """Nothing spins while frames are awaited: the reader sleeps on the condition."""
    spool = FrameSpool(tmp_path, 1000)
    waiting = threading.Event()
    used_s: list[float] = []

    def read() -> list[bytes]:
        waiting.set()
        before_s = time.thread_time()
        frames = list(spool.frames())
        used_s.append(time.thread_time() - before_s)
        return frames

    reader = in_a_thread(read)
    assert waiting.wait(TIMEOUT_S)
    time.sleep(0.3)  # nothing happens: that is what is measured
    spool.close()
    assert reader.result(TIMEOUT_S) == []
    assert used_s[0] < 0.1


def test_abort_wakes_the_reader_and_stops_the_writer(tmp_path: Path) -> None:
    """A reader that waits gets FramesAbortedError, as do later puts and reads; a second abort does nothing."""
    spool = FrameSpool(tmp_path, 1000)
    arrived = threading.Event()
    reader = in_a_thread(lambda: read_all(spool, lambda _: arrived.set()))
    spool.put(frame(0))
    assert arrived.wait(TIMEOUT_S)
    spool.abort()
    spool.abort()
    with pytest.raises(FramesAbortedError):
        reader.result(TIMEOUT_S)
    with pytest.raises(FramesAbortedError):
        spool.put(frame(1))
    with pytest.raises(FramesAbortedError):
        next(iter(spool.frames()))


def test_abort_drops_frames_that_were_put(tmp_path: Path) -> None:
    """Frames that nobody has read yet are not worth encoding any more, closed or not."""
    spool = FrameSpool(tmp_path, 1000)
    spool.put(frame(0))
    spool.close()
    spool.abort()
    with pytest.raises(FramesAbortedError):
        read_all(spool)


def test_abort_in_the_middle_of_all(tmp_path: Path) -> None:
    """Aborted at any moment of a race, both threads end with FramesAbortedError and no descriptor is left."""
    before = num_descriptors()
    for round_ in range(50):
        spool = FrameSpool(tmp_path, 1000)
        reached = threading.Event()

        def write(spool: FrameSpool = spool, reached: threading.Event = reached, last: int = round_) -> list[bytes]:
            for index in range(10**9):
                spool.put(frame(index))
                if index == last:
                    reached.set()
            return []

        reader = in_a_thread(lambda spool=spool: read_all(spool))  # type: ignore[misc]
        writer = in_a_thread(write)
        assert reached.wait(TIMEOUT_S)
        spool.abort()
        for future in (reader, writer):
            with pytest.raises(FramesAbortedError):
                future.result(TIMEOUT_S)
    assert num_descriptors() == before


@pytest.mark.parametrize("end", ["read to the end", "aborted"])
def test_nothing_is_left_on_disk(tmp_path: Path, end: str) -> None:
    """The frames have no name in the directory, and at the end their descriptor, so their disk, is free."""
    before = num_descriptors()
    spool = FrameSpool(tmp_path, 1000)
    spool.put(frame(0))
    assert list(tmp_path.iterdir()) == []
    assert num_descriptors() == before + 1
    if end == "aborted":
        spool.abort()
    else:
        spool.close()
        assert read_all(spool) == [frame(0)]
    assert num_descriptors() == before


def test_a_frame_of_another_size_is_refused(tmp_path: Path) -> None:
    """A wrong size is named and changes nothing."""
    spool = FrameSpool(tmp_path, 1000)
    for size in (0, 999, 1001):
        with pytest.raises(ValueError, match=f"frame: {size} bytes instead of 1000"):
            spool.put(bytes(size))
    spool.put(frame(1))
    spool.close()
    assert read_all(spool) == [frame(1)]


def test_a_full_disk_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ENOSPC in the middle of a frame comes out as StorageFailedError, and the frames before it can still be read."""
    spool = FrameSpool(tmp_path, 1000)
    spool.put(frame(0))
    pwrite = os.pwrite

    def nearly_full(fd: int, data: memoryview, offset: int) -> int:
        if len(data) <= 600:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return pwrite(fd, data[: len(data) - 600], offset)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", nearly_full)
        with pytest.raises(StorageFailedError, match="No space left on device"):
            spool.put(frame(1))
    spool.put(frame(2))
    spool.close()
    assert read_all(spool) == [frame(0), frame(2)]


def test_a_directory_that_is_gone_is_a_storage_failure(tmp_path: Path) -> None:
    """Where no file can be made, the error is the same as for a full disk."""
    with pytest.raises(StorageFailedError, match="No such file or directory"):
        FrameSpool(tmp_path / "gone", 1000)
