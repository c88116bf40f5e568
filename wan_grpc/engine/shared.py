"""Memory that the server process and its ranks share without a name, so that no crash can leave any of it behind.

Knows file descriptors and mmap. Does not know what is in a frame.
"""

import mmap
import os
import tempfile


def anonymous_file(size_bytes: int) -> int:
    """A file descriptor of an empty file without a name; it is gone when the last process that holds it is.

    On Linux it is memory and does not count against the size of /dev/shm, which containers keep small.
    """
    if hasattr(os, "memfd_create"):
        fd = os.memfd_create("wan-grpc", os.MFD_CLOEXEC)
    else:
        with tempfile.TemporaryFile() as file:
            fd = os.dup(file.fileno())
    os.truncate(fd, size_bytes)
    return fd


class FrameRing:
    """A fixed number of slots, each large enough for one frame.

    Who owns a slot follows from messages: the rank from the start and after SlotFreed, the server after FrameReady.
    """

    def __init__(self, fd: int, *, slot_bytes: int, num_slots: int) -> None:
        self.slot_bytes = slot_bytes
        self.num_slots = num_slots
        self._map = mmap.mmap(fd, slot_bytes * num_slots)

    @staticmethod
    def size_bytes(*, slot_bytes: int, num_slots: int) -> int:
        return slot_bytes * num_slots

    def slot(self, index: int, size_bytes: int) -> memoryview:
        """The first `size_bytes` of a slot, writable. Release it before close."""
        assert 0 <= index < self.num_slots and size_bytes <= self.slot_bytes
        start = index * self.slot_bytes
        return memoryview(self._map)[start : start + size_bytes]

    def close(self) -> None:
        self._map.close()
