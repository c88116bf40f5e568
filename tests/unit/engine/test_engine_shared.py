import mmap
import os
from pathlib import Path

import pytest

from wan_grpc.engine.shared import FrameRing, anonymous_file


@pytest.mark.parametrize("with_memfd", [True, False])
def test_shared_memory_has_no_name(with_memfd: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file stands nowhere, has its size, reads as zero, and is not inherited by programs that are executed."""
    if not with_memfd:
        monkeypatch.delattr(os, "memfd_create", raising=False)
    before = set(Path("/dev/shm").iterdir())
    fd = anonymous_file(5000)
    try:
        assert str(Path(f"/proc/self/fd/{fd}").readlink()).endswith("(deleted)")
        assert (os.fstat(fd).st_size, os.fstat(fd).st_nlink) == (5000, 0)
        assert os.pread(fd, 6000, 0) == bytes(5000)
        assert not os.get_inheritable(fd)
        assert set(Path("/dev/shm").iterdir()) <= before
    finally:
        os.close(fd)


def test_two_ends_of_a_ring_see_the_same_frames() -> None:
    """What one mapping writes into a slot the other reads there, and no slot touches its neighbour."""
    fd = anonymous_file(FrameRing.size_bytes(slot_bytes=100, num_slots=3))
    ours = FrameRing(fd, slot_bytes=100, num_slots=3)
    theirs = FrameRing(os.dup(fd), slot_bytes=100, num_slots=3)
    os.close(fd)
    for index in range(3):
        with theirs.slot(index, 100) as view:
            view[:] = bytes([index + 1]) * 100
    with theirs.slot(1, 40) as view:
        view[:] = b"x" * 40
    seen = []
    for index in range(3):
        with ours.slot(index, 100) as view:
            seen.append(bytes(view))
    assert seen == [b"\1" * 100, b"x" * 40 + b"\2" * 60, b"\3" * 100]
    ours.close()
    theirs.close()


@pytest.mark.parametrize(("index", "size"), [(-1, 10), (3, 10), (0, 101)])
def test_a_slot_that_is_not_there_is_a_bug(index: int, size: int) -> None:
    """Asking for a slot outside the ring, or for more than one holds, never gives another's memory."""
    fd = anonymous_file(300)
    ring = FrameRing(fd, slot_bytes=100, num_slots=3)
    os.close(fd)
    with pytest.raises(AssertionError):
        ring.slot(index, size)
    ring.close()


def test_a_ring_is_as_large_as_its_slots() -> None:
    """The size that is asked for is the size that is mapped."""
    assert FrameRing.size_bytes(slot_bytes=mmap.PAGESIZE, num_slots=8) == 8 * mmap.PAGESIZE
