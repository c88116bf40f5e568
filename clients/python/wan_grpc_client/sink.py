"""Where the bytes of a video go, and the proof that they are the right ones.

Knows files, checksums and order. Does not know where the bytes come from.
"""

import contextlib
import hashlib
import io
import os
import secrets
from pathlib import Path
from typing import IO, Final, TypeAlias

from wan_grpc_client.crc32c import crc32c
from wan_grpc_client.errors import CorruptVideoError

Output: TypeAlias = str | os.PathLike[str] | IO[bytes] | None
"""A path: written beside it under a temporary name and renamed when complete (a device or pipe: written directly). A
binary file object: written as bytes arrive. None: collected in memory."""

_TOKEN_BYTES: Final = 8


class Sink:
    """Takes a video from its first byte to its last, in order, and verifies every chunk and the whole."""

    def __init__(self, output: Output) -> None:
        """Raises: OSError: the file cannot be made; better told before the video is than after."""
        self.num_bytes = 0
        self.path: Path | None = None
        self._scratch: Path | None = None
        self._sha256 = hashlib.sha256()
        self._file: IO[bytes]
        self._memory: io.BytesIO | None = None
        if output is None:
            self._file = self._memory = io.BytesIO()
        elif isinstance(output, str | os.PathLike):
            self.path = Path(output)
            self._file = self._open(self.path)
        else:
            self._file = output

    @property
    def data(self) -> bytes | None:
        """The video, where it is collected in memory."""
        return self._memory.getvalue() if self._memory is not None else None

    def take(self, offset: int, data: bytes, checksum: int) -> None:
        """Raises: CorruptVideoError: these are not the next bytes, or not those that were sent."""
        if offset != self.num_bytes:
            raise CorruptVideoError(f"a chunk begins at byte {offset} where byte {self.num_bytes} was due")
        if crc32c(data) != checksum:
            raise CorruptVideoError(f"the chunk at byte {offset} does not have its checksum (CRC-32C)")
        self._file.write(data)
        self._sha256.update(data)
        self.num_bytes += len(data)

    def finish(self, size_bytes: int, sha256: str) -> None:
        """Verify the whole and give the file its name.

        Raises:
            CorruptVideoError: size or checksum are not those of the server.
        """
        if self.num_bytes != size_bytes:
            raise CorruptVideoError(f"{self.num_bytes} bytes arrived of a video of {size_bytes}")
        if self._sha256.hexdigest() != sha256:
            raise CorruptVideoError(f"the video does not have its checksum (SHA-256 {sha256})")
        self._file.flush()
        if self._scratch is not None and self.path is not None:
            os.fsync(self._file.fileno())
            self._scratch.replace(self.path)
            self._scratch = None
        self._close()

    def discard(self) -> None:
        """Forget a video that did not come to its end; nothing to do for one that did."""
        self._close()
        if self._scratch is not None:
            with contextlib.suppress(FileNotFoundError):
                self._scratch.unlink()
            self._scratch = None

    def _close(self) -> None:
        if self.path is not None:
            self._file.close()

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            self.discard()

    def _open(self, path: Path) -> IO[bytes]:
        if path.exists() and not path.is_file():
            return path.open("wb")
        self._scratch = path.with_name(f".wan-grpc-{secrets.token_hex(_TOKEN_BYTES)}.part")
        return self._scratch.open("xb")
