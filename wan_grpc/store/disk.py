"""Whole blocks to and from files. Knows what a disk that refuses looks like; does not know what the bytes are."""

import os
from collections.abc import Iterator
from contextlib import contextmanager


class StorageFailedError(OSError):
    """The disk did not take or give what it should; most often it is full."""


@contextmanager
def storage_errors() -> Iterator[None]:
    """Turn what the system says about a file into StorageFailedError, in the system's own words."""
    try:
        yield
    except OSError as error:
        raise StorageFailedError(error.errno, error.strerror) from error


def write_all(fd: int, data: bytes | memoryview, offset: int) -> None:
    """Write all of `data` at `offset`.

    Raises:
        StorageFailedError: the disk refused; part of `data` may be in the file.
    """
    rest = memoryview(data).cast("B")
    while rest:
        with storage_errors():
            written = os.pwrite(fd, rest, offset)
        rest = rest[written:]
        offset += written


def read_all(fd: int, size: int, offset: int) -> bytes:
    """Read exactly `size` bytes at `offset`, which must be there."""
    parts: list[bytes] = []
    while size:
        with storage_errors():
            part = os.pread(fd, size, offset)
        assert part, "the file is shorter than what was written to it"
        parts.append(part)
        size -= len(part)
        offset += len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)
