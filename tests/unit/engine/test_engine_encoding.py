import errno
import hashlib
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fake_ranks import CARD, ask, frame, raw_video
from wan_grpc.domain.errors import Failure, Reason, ServiceError
from wan_grpc.domain.formats import OutputFormat
from wan_grpc.domain.request import VideoRequest, resolve
from wan_grpc.engine import encoding as module
from wan_grpc.engine.encoding import Encoding
from wan_grpc.store.artifacts import Artifact, Spool, StorageFailedError
from wan_grpc.store.frames import FramesAbortedError, FrameSpool

VIDEO = resolve(ask(num_frames=9), CARD, fallback_seed=0)


@pytest.fixture
def spool(tmp_path: Path) -> Iterator[Spool]:
    spool = Spool(tmp_path)
    yield spool
    spool.close()


@pytest.fixture
def artifact(spool: Spool) -> Artifact:
    return spool.create("film", ".raw_rgb24")


@pytest.fixture
def encoding(spool: Spool, artifact: Artifact) -> Encoding:
    return Encoding(VIDEO, artifact, spool.directory)


def put(encoding: Encoding, count: int, video: VideoRequest = VIDEO) -> None:
    for index in range(count):
        encoding.take_frame(memoryview(frame(video, index)))


class Work(threading.Thread):
    """Encodes on a thread of its own and keeps what came of it."""

    def __init__(self, encoding: Encoding) -> None:
        super().__init__(daemon=True)
        self.error: BaseException | None = None
        self.num_rings = 0
        self._encoding = encoding
        self.start()

    def run(self) -> None:
        try:
            self._encoding.encode(self._ring)
        except BaseException as error:
            self.error = error

    def _ring(self) -> None:
        self.num_rings += 1

    def end(self) -> BaseException | None:
        self.join(10.0)
        assert not self.is_alive()
        return self.error


def test_frames_become_the_bytes_of_the_video(encoding: Encoding, artifact: Artifact) -> None:
    """Frames put on one thread come out on the other in order and whole, each append rings the bell."""
    work = Work(encoding)
    put(encoding, 9)
    encoding.end_of_frames()
    assert work.end() is None
    video = raw_video(VIDEO)
    assert artifact.seal() == (len(video), hashlib.sha256(video).hexdigest())
    assert (encoding.num_encoded, work.num_rings, encoding.put_failure) == (9, 9, None)


def test_frames_may_be_there_before_the_encoder(encoding: Encoding, artifact: Artifact) -> None:
    """An encoder that comes late finds all frames."""
    put(encoding, 9)
    encoding.end_of_frames()
    assert Work(encoding).end() is None
    assert artifact.size_bytes == len(raw_video(VIDEO))


def test_an_abort_wakes_the_encoder_and_drops_frames(encoding: Encoding, spool: Spool) -> None:
    """The encoder ends, later frames are dropped without a word, and doing it again is harmless."""
    work = Work(encoding)
    put(encoding, 2)
    encoding.abort()
    assert isinstance(work.end(), FramesAbortedError)
    put(encoding, 9)
    encoding.abort()
    encoding.end_of_frames()
    assert encoding.put_failure is None


def test_a_video_that_lacks_frames_is_no_video(encoding: Encoding) -> None:
    """Ranks that say they are done before the last frame have a bug, which does not pass for a video."""
    work = Work(encoding)
    put(encoding, 8)
    encoding.end_of_frames()
    error = work.end()
    assert isinstance(error, ValueError)
    assert "8 frames were added; 9 were promised" in str(error)


def test_a_disk_that_refuses_bytes_is_told(
    encoding: Encoding, artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The encoder ends with the reason, and frames that still come are dropped."""

    def refuse(data: bytes) -> None:
        raise StorageFailedError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(artifact, "append", refuse)
    work = Work(encoding)
    put(encoding, 9)
    error = work.end()
    assert isinstance(error, ServiceError)
    sentence = "the server could not store the video: No space left on device"
    assert error.failure == Failure(reason=Reason.STORAGE_FAILED, message=sentence)
    put(encoding, 9)


def test_a_disk_that_refuses_frames_is_told(spool: Spool, artifact: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    """The failure is kept for whoever asks, the encoder is woken, and the thread of the ranks never sees an error."""

    class Full(FrameSpool):
        def put(self, frame: bytes | memoryview) -> None:
            raise StorageFailedError(errno.EDQUOT, "Disk quota exceeded")

    monkeypatch.setattr(module, "FrameSpool", Full)
    encoding = Encoding(VIDEO, artifact, spool.directory)
    work = Work(encoding)
    put(encoding, 3)
    assert isinstance(work.end(), FramesAbortedError)
    sentence = "the server could not store the video: Disk quota exceeded"
    assert encoding.put_failure == Failure(reason=Reason.STORAGE_FAILED, message=sentence)


def test_a_file_that_is_prepared_on_disk_lies_in_the_directory(artifact: Artifact, tmp_path: Path) -> None:
    """A video whose index stands in front is prepared where the frames are: a disk that is gone is told, like any."""
    directory = tmp_path / "gone"
    directory.mkdir()
    video = resolve(ask(num_frames=9, output_format=OutputFormat.MP4_H264_PROGRESSIVE), CARD, fallback_seed=0)
    encoding = Encoding(video, artifact, directory)
    directory.rmdir()  # the frames' own file has no name in it
    work = Work(encoding)
    error = work.end()
    assert isinstance(error, ServiceError)
    sentence = "the server could not store the video: No such file or directory"
    assert error.failure == Failure(reason=Reason.STORAGE_FAILED, message=sentence)
