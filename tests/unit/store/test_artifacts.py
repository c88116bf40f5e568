import errno
import hashlib
import os
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from wan_grpc.store.artifacts import Artifact, ArtifactDeletedError, Spool, StorageFailedError


@pytest.fixture
def spool(tmp_path: Path) -> Iterator[Spool]:
    spool = Spool(tmp_path)
    yield spool
    spool.close()


@pytest.fixture
def artifact(spool: Spool) -> Artifact:
    return spool.create("film", ".mp4")


def test_appended_bytes_can_be_read_from_anywhere(artifact: Artifact) -> None:
    """Reads give what lies at the offset, up to the limit or the end, while the file still grows."""
    artifact.append(b"hello ")
    artifact.append(b"world")
    assert artifact.size_bytes == 11
    assert artifact.read(0, 100) == b"hello world"
    assert artifact.read(4, 3) == b"o w"
    assert artifact.read(11, 5) == b""
    assert artifact.read(3, 0) == b""
    artifact.append(b"!")
    assert artifact.read(11, 5) == b"!"


@pytest.mark.parametrize(
    ("offset", "limit", "sentence"),
    [
        (-1, 1, "offset: -1 is not between 0 and 3"),
        (4, 1, "offset: 4 is not between 0 and 3"),
        (0, -1, "limit: -1 is negative"),
    ],
)
def test_reads_outside_are_refused(artifact: Artifact, offset: int, limit: int, sentence: str) -> None:
    """An offset before the start or beyond the end, or a negative limit, is refused with its bound."""
    artifact.append(b"abc")
    with pytest.raises(ValueError, match=sentence):
        artifact.read(offset, limit)


def test_seal_gives_size_and_hash_of_all_bytes(artifact: Artifact) -> None:
    """The hash made while writing is that of the bytes that are read back; sealing again says the same."""
    artifact.append(b"frame one")
    artifact.append(b"")
    artifact.append(b"frame two")
    data = artifact.read(0, 100)
    assert data == b"frame oneframe two"
    assert artifact.seal() == (18, hashlib.sha256(data).hexdigest())
    assert artifact.seal() == artifact.seal()
    assert artifact.read(6, 3) == b"one"


def test_a_sealed_file_holds_no_descriptor(spool: Spool) -> None:
    """A server that keeps a thousand finished videos does not run out of descriptors."""
    before = psutil.Process().num_fds()
    for index in range(20):
        artifact = spool.create(f"film{index}", ".mp4")
        artifact.append(b"abc")
        artifact.seal()
        assert artifact.read(0, 3) == b"abc"
    assert psutil.Process().num_fds() == before


def test_readers_never_see_what_is_not_written(artifact: Artifact) -> None:
    """Four threads that read while one appends get exactly the bytes appended, in order, with no gap."""
    blocks = [bytes([index % 251]) * (index * 37 % 5000 + 1) for index in range(400)]
    want = b"".join(blocks)
    got = [bytearray() for _ in range(4)]
    written = threading.Event()

    def read(into: bytearray) -> None:
        while not written.is_set() or len(into) < artifact.size_bytes:
            into += artifact.read(len(into), 1000)

    readers = [threading.Thread(target=read, args=(into,)) for into in got]
    for reader in readers:
        reader.start()
    for block in blocks:
        artifact.append(block)
    written.set()
    for reader in readers:
        reader.join(timeout=30)
    assert [bytes(into) == want for into in got] == [True] * 4


def test_delete_removes_the_file(spool: Spool, artifact: Artifact) -> None:
    """After a delete nothing is on disk, and every use says so; a second delete does nothing."""
    artifact.append(b"abc")
    artifact.delete()
    artifact.delete()
    assert list(spool.directory.iterdir()) == []
    with pytest.raises(ArtifactDeletedError):
        artifact.read(0, 1)
    with pytest.raises(ArtifactDeletedError):
        artifact.append(b"d")


def test_delete_while_others_write_and_read(spool: Spool) -> None:
    """A delete in the middle ends writer and reader with ArtifactDeletedError and leaves no file and no descriptor."""
    before = psutil.Process().num_fds()
    artifact = spool.create("film", ".mp4")
    artifact.append(b"x")
    ends: list[str] = []
    busy = threading.Barrier(3)

    def until_deleted(act: str) -> None:
        busy.wait()
        try:
            while True:
                if act == "write":
                    artifact.append(b"y" * 1000)
                else:
                    assert artifact.read(0, 1) == b"x"
        except ArtifactDeletedError:
            ends.append(act)

    threads = [threading.Thread(target=until_deleted, args=(act,)) for act in ("write", "read")]
    for thread in threads:
        thread.start()
    busy.wait()
    artifact.delete()
    for thread in threads:
        thread.join(timeout=30)
    assert sorted(ends) == ["read", "write"]
    assert list(spool.directory.iterdir()) == []
    assert psutil.Process().num_fds() == before


FULL_DISK = """
import hashlib, os, resource, sys
from pathlib import Path
from wan_grpc.store.artifacts import Spool, StorageFailedError

spool = Spool(Path(sys.argv[1]))
artifact = spool.create("film", ".mp4")
artifact.append(b"a" * 900)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    artifact.append(b"b" * 200)
except StorageFailedError as error:
    print(error.strerror)
assert artifact.size_bytes == 900
assert os.path.getsize(spool.directory / "film.mp4") == 900
artifact.append(b"c" * 100)
assert artifact.read(0, 2000) == b"a" * 900 + b"c" * 100
assert artifact.seal() == (1000, hashlib.sha256(b"a" * 900 + b"c" * 100).hexdigest())
spool.close()
"""


def test_a_file_that_may_not_grow_loses_nothing(tmp_path: Path) -> None:
    """A block that only partly fits is refused whole; size, bytes and hash stay right, and what fits still fits."""
    command = [sys.executable, "-c", FULL_DISK, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "File too large\n", "")


def test_a_full_disk_is_one_clear_error(artifact: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    """ENOSPC comes out as StorageFailedError with the system's words, and the next append works when there is room."""
    artifact.append(b"abc")

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        with pytest.raises(StorageFailedError, match="No space left on device"):
            artifact.append(b"def")
    artifact.append(b"ghi")
    assert artifact.seal() == (6, hashlib.sha256(b"abcghi").hexdigest())


def test_only_this_user_can_look_in(spool: Spool, artifact: Artifact) -> None:
    """Directory and files are closed to everybody else, whatever the umask."""
    assert stat.S_IMODE(spool.directory.stat().st_mode) == 0o700
    assert stat.S_IMODE((spool.directory / "film.mp4").stat().st_mode) == 0o600


@pytest.mark.parametrize("name", ["", "..", "../film", "a/b", "a\0b", "-rf", "."])
def test_names_that_lead_elsewhere_are_refused(spool: Spool, name: str) -> None:
    """An artifact's name is a plain file name of this directory."""
    with pytest.raises(ValueError, match="name: "):
        spool.create(name, "")


def test_a_name_is_used_once(spool: Spool, artifact: Artifact) -> None:
    """A second artifact of the same name is refused, and the first keeps its bytes."""
    artifact.append(b"abc")
    with pytest.raises(FileExistsError):
        spool.create("film", ".mp4")
    assert artifact.read(0, 3) == b"abc"


def test_close_removes_everything(tmp_path: Path) -> None:
    """A closed spool leaves neither files nor directory nor descriptor; closing again does nothing."""
    before = psutil.Process().num_fds()
    spool = Spool(tmp_path)
    artifact = spool.create("film", ".mp4")
    artifact.append(b"abc")
    artifact.seal()
    spool.close()
    spool.close()
    assert list(tmp_path.iterdir()) == []
    assert psutil.Process().num_fds() == before


def test_free_bytes_is_what_the_disk_says(spool: Spool) -> None:
    """Room is that of the directory's own file system, for a user without privileges."""
    disk = os.statvfs(spool.directory)
    assert abs(spool.free_bytes() - disk.f_bavail * disk.f_frsize) < 2**30  # others write meanwhile


def test_the_root_is_made(tmp_path: Path) -> None:
    """An operator may name a directory that is not there yet."""
    spool = Spool(tmp_path / "var" / "spool")
    assert spool.directory.parent == tmp_path / "var" / "spool"
    spool.close()


def test_the_default_root_is_the_systems(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a root the directory lies where temporary files lie."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    spool = Spool(None)
    assert spool.directory.parent == tmp_path
    spool.close()


HOLD_A_SPOOL = """
import sys, time
from pathlib import Path
from wan_grpc.store.artifacts import Spool

spool = Spool(Path(sys.argv[1]))
spool.create("film", ".mp4").append(b"abc")
print(spool.directory, flush=True)
sys.stdin.read()
"""


class Server:
    """Another process that holds a spool."""

    def __init__(self, root: Path) -> None:
        command = [sys.executable, "-c", HOLD_A_SPOOL, str(root)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        self.directory = Path(self._process.stdout.readline().strip())

    def kill(self) -> None:
        os.kill(self._process.pid, signal.SIGKILL)
        self._process.communicate(timeout=30)


def test_the_next_server_removes_what_a_killed_one_left(tmp_path: Path) -> None:
    """A directory stays while its server lives, also with other servers starting, and goes once it was killed."""
    server = Server(tmp_path)
    second = Spool(tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted([server.directory, second.directory])
    assert (server.directory / "film.mp4").read_bytes() == b"abc"
    server.kill()
    assert server.directory.exists()
    third = Spool(tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted([second.directory, third.directory])
    second.close()
    third.close()


def test_a_sweep_touches_nothing_else(tmp_path: Path) -> None:
    """Files, links and directories of other names stay, and nothing behind a link is followed."""
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "data").write_bytes(b"x")
    (tmp_path / "wan-grpc-spool-link").symlink_to(precious)
    (tmp_path / "wan-grpc-spool-file").write_bytes(b"x")
    Spool(tmp_path).close()
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == ["precious", "wan-grpc-spool-file", "wan-grpc-spool-link"]
    assert (precious / "data").read_bytes() == b"x"


def test_a_directory_of_another_user_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a temporary directory that all share, a server removes only what is its own user's."""
    left_behind = tmp_path / "wan-grpc-spool-theirs"
    left_behind.mkdir()
    me = os.geteuid()
    with monkeypatch.context() as patch:
        patch.setattr(os, "geteuid", lambda: me + 1)
        with pytest.raises(StorageFailedError, match="can be locked"):
            Spool(tmp_path)
    assert list(tmp_path.iterdir()) == [left_behind]


def test_servers_that_start_at_once_each_get_their_own(tmp_path: Path) -> None:
    """Spools made at the same time, each sweeping, never take each other's directory."""
    spools: list[Spool] = []
    start = threading.Barrier(8)

    def make() -> None:
        start.wait()
        for _ in range(10):
            spools.append(Spool(tmp_path))

    threads = [threading.Thread(target=make) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert sorted(spool.directory for spool in spools) == sorted(tmp_path.iterdir())
    assert len(spools) == 80
    for spool in spools:
        spool.close()
