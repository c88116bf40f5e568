"""The videos of this server on disk: written once, read by many meanwhile, gone with the server.

Knows directories, locks and hashes. Does not know generations, nor when a video has served its time.
"""

import errno
import fcntl
import hashlib
import os
import re
import shutil
import tempfile
import threading
from contextlib import suppress
from pathlib import Path

from wan_grpc.store.disk import StorageFailedError, read_all, storage_errors, write_all

__all__ = ["Artifact", "ArtifactDeletedError", "Spool", "StorageFailedError"]

_PREFIX = "wan-grpc-spool-"
_MAX_TRIES = 16
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")


class ArtifactDeletedError(LookupError):
    """The artifact was deleted before or during the call."""


class Artifact:
    """A file that grows at its end. One thread appends; any thread reads what has been appended so far."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()  # of writer and deleter; readers need none
        self._hash = hashlib.sha256()
        self._size_bytes = 0
        self._fd: int | None = _create(path)
        self._deleted = False

    @property
    def size_bytes(self) -> int:
        """Bytes that can be read. Never shrinks."""
        return self._size_bytes

    def append(self, data: bytes) -> None:
        """Add `data` at the end: all of it, or on failure nothing.

        Raises:
            StorageFailedError: the disk refused; what was appended before is untouched.
            ArtifactDeletedError: there is no file any more.
        """
        with self._lock:
            if self._deleted:
                raise ArtifactDeletedError(self._path.name)
            assert self._fd is not None, "append after seal"
            self._append(self._fd, data)

    def seal(self) -> tuple[int, str]:
        """End the file. Gives its size in bytes and the SHA-256 of its bytes in lower-case hexadecimal.

        Raises:
            StorageFailedError: the disk refused what it had taken before, as some do that are elsewhere.
        """
        with self._lock, storage_errors():
            self._close_fd()
            return self._size_bytes, self._hash.hexdigest()

    def read(self, offset: int, limit: int) -> bytes:
        """Give up to `limit` bytes from `offset`: fewer at the end, none exactly at it. Blocks on the disk alone.

        Raises:
            ValueError: `offset` is negative or beyond the end, or `limit` is negative.
            ArtifactDeletedError: there is no file any more.
        """
        size_bytes = self._size_bytes
        if not 0 <= offset <= size_bytes:
            raise ValueError(f"offset: {offset} is not between 0 and {size_bytes}")
        if limit < 0:
            raise ValueError(f"limit: {limit} is negative")
        # Opened for each read, so that finished videos hold no descriptors and a delete never pulls one away.
        try:
            fd = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            raise ArtifactDeletedError(self._path.name) from None
        try:
            return read_all(fd, min(limit, size_bytes - offset), offset)
        finally:
            os.close(fd)

    def delete(self) -> None:
        """Remove the file. Reads that are under way still end well. Does nothing the second time."""
        with self._lock:
            self._deleted = True
            self._close_fd()
            self._path.unlink(missing_ok=True)

    def _append(self, fd: int, data: bytes) -> None:
        try:
            write_all(fd, data, self._size_bytes)
        except StorageFailedError:
            with suppress(OSError):
                os.ftruncate(fd, self._size_bytes)  # give back what a partial write took
            raise
        self._hash.update(data)
        self._size_bytes += len(data)

    def _close_fd(self) -> None:
        if self._fd is not None:
            fd, self._fd = self._fd, None  # closed also where that fails
            os.close(fd)


class Spool:
    """A private directory of this server, removed when it ends; by the next server, if this one is killed."""

    def __init__(self, root: Path | None = None) -> None:
        root = Path(tempfile.gettempdir()) if root is None else root
        root.mkdir(parents=True, exist_ok=True)
        _sweep(root)
        self.directory, self._lock_fd = _make_directory(root)
        self._open = True

    def create(self, name: str, suffix: str) -> Artifact:
        """Make the empty artifact `name` + `suffix`.

        Raises:
            ValueError: the name is not a plain file name.
            FileExistsError: there is one of this name.
            StorageFailedError: the disk is full.
        """
        if not _PLAIN_NAME.fullmatch(name + suffix):
            raise ValueError(f"name: {name + suffix!r} is not letters, digits, '.', '_' and '-' alone")
        return Artifact(self.directory / (name + suffix))

    def free_bytes(self) -> int:
        """Bytes that this server may still write to the disk of its directory."""
        return shutil.disk_usage(self.directory).free

    def close(self) -> None:
        """Remove the directory and all in it. Does nothing the second time."""
        if self._open:
            self._open = False
            shutil.rmtree(self.directory, ignore_errors=True)
            os.close(self._lock_fd)


def _create(path: Path) -> int:
    if path.exists():
        raise FileExistsError(path.name)
    with storage_errors():
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)


def _make_directory(root: Path) -> tuple[Path, int]:
    """Make a locked directory. One that another server sweeps before it is locked is given up for a new one."""
    for _ in range(_MAX_TRIES):
        path = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=root))
        lock_fd = _lock(path)
        if lock_fd is not None:
            return path, lock_fd
        with suppress(OSError):
            path.rmdir()
    raise StorageFailedError(errno.ENOLCK, f"no directory under {root} can be locked")


def _sweep(root: Path) -> None:
    """Remove the directories of servers that were killed: those that are ours and that nobody locks."""
    for path in root.glob(_PREFIX + "*"):
        lock_fd = _lock(path)
        if lock_fd is not None:
            shutil.rmtree(path, ignore_errors=True)
            os.close(lock_fd)


def _lock(path: Path) -> int | None:
    """Lock a directory of this user; None where it is gone, locked, or no such thing. A kill unlocks it."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(fd).st_uid == os.geteuid() and os.path.samestat(os.fstat(fd), path.stat()):
            return fd
    except OSError:
        pass
    os.close(fd)
    return None
