"""Progressive MP4: the index in front, prepared on disk."""

import errno
import struct
import tempfile
from pathlib import Path
from typing import Any

import pytest

from tests.unit.media import films
from tests.unit.media.films import Sink, of_format, static, waves
from wan_grpc.domain.formats import OutputFormat
from wan_grpc.media.video import ScratchError, open_encoder

REQUEST = of_format(OutputFormat.MP4_H264_PROGRESSIVE, num_frames=33)


def test_the_index_stands_in_front() -> None:
    """A player that reads from the front knows all frames before the first: every one has its place in the index."""
    data = films.encode(REQUEST, waves(REQUEST)).data
    assert [name for name, _ in films.boxes(data)] == ["ftyp", "moov", "free", "free", "mdat"]
    assert films.box(data, "moov", "mvhd")
    table = films.box(data, "moov", "trak", "mdia", "minf", "stbl", "stsz")
    assert struct.unpack_from(">I", table, 8) == (33,)


@pytest.mark.parametrize(("num_frames", "fps"), [(1, 16), (1, 1), (481, 120), (201, 1)])
def test_there_is_room_for_every_index(num_frames: int, fps: int) -> None:
    """Long and slow videos fit into the room that was left in front, and little of it is lost."""
    request = of_format(OutputFormat.MP4_H264_PROGRESSIVE, width=16, height=16, num_frames=num_frames, fps=fps)
    data = films.encode(request, waves(request)).data
    assert len(films.decode(data)) == num_frames
    assert sum(len(content) for name, content in films.boxes(data) if name == "free") < 2048 + 32 * num_frames


def test_pictures_are_those_of_the_fragmented_file() -> None:
    """Only the container differs."""
    fragmented = of_format(OutputFormat.MP4_H264, num_frames=33)
    ours, theirs = (films.decode(films.encode(each, waves(each)).data) for each in (REQUEST, fragmented))
    assert [bytes(frame.planes[0]) for frame in ours] == [bytes(frame.planes[0]) for frame in theirs]


def test_nothing_is_written_before_the_end_and_then_in_blocks() -> None:
    """The file waits on disk, and is never in memory as a whole: no write has more than a mebibyte."""
    request = of_format(OutputFormat.MP4_H264_PROGRESSIVE, width=512, height=512, num_frames=9, crf=0)
    sink = Sink()
    encoder = open_encoder(request, sink)
    for frame in static(request):
        encoder.add(frame.tobytes())
    assert sink.writes == []
    encoder.finish()
    assert len(sink.data) > 3 * 2**20
    assert {len(data) for data in sink.writes[:-1]} == {2**20}


class Watched:
    """A real file of `tempfile` that tells where it was made, and may refuse."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.directories: list[Path | None] = []
        self.files: list[Any] = []
        self._make = tempfile.TemporaryFile
        monkeypatch.setattr(tempfile, "TemporaryFile", self._open)

    def _open(self, *, dir: Path | None = None) -> Any:  # tempfile's own name
        self.directories.append(dir)
        self.files.append(self._make(dir=dir, buffering=0))
        return self.files[-1]


@pytest.mark.parametrize("ending", ["finish", "abort"])
def test_the_file_lies_where_it_should_and_goes(ending: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is in the directory that was given, without a name, and closed however the video ends."""
    watched = Watched(monkeypatch)
    encoder = open_encoder(REQUEST, Sink(), scratch=tmp_path)
    for frame in waves(REQUEST):
        encoder.add(frame.tobytes())
    assert (watched.directories, list(tmp_path.iterdir())) == ([tmp_path], [])
    getattr(encoder, ending)()
    encoder.abort()
    assert [file.closed for file in watched.files] == [True]


def test_a_full_disk_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What the disk says comes out as ScratchError with its number and words, from the call that met it."""

    class Full:
        closed = False

        def write(self, data: bytes) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

        def seek(self, offset: int, whence: int = 0) -> int:
            return 0

        def tell(self) -> int:
            return 0

        def close(self) -> None:
            self.closed = True

    full = Full()
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda dir: full)
    with pytest.raises(ScratchError) as caught:
        encoder = open_encoder(REQUEST, Sink(), scratch=tmp_path)
        try:
            for frame in static(REQUEST):
                encoder.add(frame.tobytes())
            encoder.finish()
        finally:
            encoder.abort()
    assert (caught.value.errno, caught.value.strerror) == (errno.ENOSPC, "No space left on device")
    with pytest.raises(ScratchError):
        monkeypatch.undo()
        open_encoder(REQUEST, Sink(), scratch=tmp_path / "missing")
