"""The raw frames of one generation on their way from the ranks to the encoder, on disk, so that neither waits.

Knows one unnamed file that goes with its last user. Does not know pixels, ranks or encoders.
"""

import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from wan_grpc.store.disk import read_all, storage_errors, write_all


class FramesAbortedError(Exception):
    """The frames were given up; none can be put or read any more."""


class FrameSpool:
    """A queue of frames without a bound in number and with the disk for memory. One thread puts, one other reads."""

    def __init__(self, directory: Path, frame_bytes: int) -> None:
        self._frame_bytes = frame_bytes
        with storage_errors():
            self._file = tempfile.TemporaryFile(dir=directory, buffering=0)  # noqa: SIM115  # its last user closes it
        self._changed = threading.Condition()
        self._num_put = 0
        self._num_users = 0
        self._closed = False
        self._aborted = False

    def put(self, frame: bytes | memoryview) -> None:
        """Add a frame. Waits for the disk, never for the reader.

        Raises:
            ValueError: the frame has another size.
            StorageFailedError: the disk refused; the frames before are untouched.
            FramesAbortedError: after `abort`.
        """
        size = memoryview(frame).nbytes
        if size != self._frame_bytes:
            raise ValueError(f"frame: {size} bytes instead of {self._frame_bytes}")
        with self._file_in_use() as fd:
            assert not self._closed, "put after close"
            write_all(fd, frame, self._num_put * self._frame_bytes)
        with self._changed:
            self._num_put += 1
            self._changed.notify_all()

    def close(self) -> None:
        """Say that no more frames come: the reader ends after the last one."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def abort(self) -> None:
        """Wake the reader with FramesAbortedError and free the disk. Does nothing the second time."""
        with self._changed:
            self._aborted = True
            self._close_unused_file()
            self._changed.notify_all()

    def frames(self) -> Iterator[bytes]:
        """Give every frame in order, each as soon as it is there. The last one out frees the disk.

        Raises:
            FramesAbortedError: after `abort`.
        """
        num_read = 0
        while self._wait_for_frame(num_read):
            with self._file_in_use() as fd:
                frame = read_all(fd, self._frame_bytes, num_read * self._frame_bytes)
            yield frame
            num_read += 1
        self.abort()

    def _wait_for_frame(self, index: int) -> bool:
        """Wait until the frame is there (True) or until it is clear that it never will be (False)."""
        with self._changed:
            self._changed.wait_for(lambda: self._num_put > index or self._closed or self._aborted)
            if self._aborted:
                raise FramesAbortedError
            return self._num_put > index

    @contextmanager
    def _file_in_use(self) -> Iterator[int]:
        """Keep the descriptor open for as long as it is used, whoever aborts meanwhile."""
        with self._changed:
            if self._aborted:
                raise FramesAbortedError
            self._num_users += 1
        try:
            yield self._file.fileno()
        finally:
            with self._changed:
                self._num_users -= 1
                self._close_unused_file()

    def _close_unused_file(self) -> None:
        if self._aborted and not self._num_users:
            self._file.close()
