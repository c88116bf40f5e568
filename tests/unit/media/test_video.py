import io
import struct
from dataclasses import replace
from fractions import Fraction

import av
import numpy as np
import psutil
import pytest

from tests.unit.media.films import Frames, Sink, box, boxes, decode, encode, psnr, to_rgb, video, waves
from wan_grpc.domain.events import VideoInfo
from wan_grpc.domain.formats import OutputFormat
from wan_grpc.domain.request import VideoRequest
from wan_grpc.media.video import Encoder, describe, open_encoder

RAW = replace(video(num_frames=3), output_format=OutputFormat.RAW_RGB24)


def fragment_durations_s(data: bytes) -> list[Fraction]:
    """How much video each moof covers."""
    timescale = struct.unpack_from(">I", box(data, "moov", "trak", "mdia", "mdhd"), 12)[0]
    return [Fraction(_num_ticks(moof), timescale) for name, moof in boxes(data) if name == "moof"]


def _num_ticks(moof: bytes) -> int:
    flags, _track, default_ticks = struct.unpack_from(">III", box(moof, "traf", "tfhd"))
    assert flags & 0xFFFFFF == 0x020038  # base is the moof; default duration, size and flags
    run = box(moof, "traf", "trun")
    run_flags, num_samples = struct.unpack_from(">II", run)
    assert not run_flags & 0x800, "without B-frames no frame is shown at another time than it is decoded"
    if not run_flags & 0x100:
        return int(num_samples * default_ticks)
    columns = [flag for flag in (0x100, 0x200, 0x400) if run_flags & flag]
    start = 8 + (4 if run_flags & 0x1 else 0) + (4 if run_flags & 0x4 else 0)
    table = np.frombuffer(run[start:], ">u4").reshape(num_samples, len(columns))
    return int(table[:, 0].sum())


@pytest.mark.parametrize("fps", [1, 2, 3, 5, 16, 24, 30, 120])
@pytest.mark.parametrize("num_frames", [1, 5, 13])
@pytest.mark.parametrize("size", [(16, 16), (32, 48), (320, 256)])
def test_a_decoder_gets_every_frame_at_its_time(size: tuple[int, int], num_frames: int, fps: int) -> None:
    """Number, size, rate and times of the frames are those of the request, down to one frame and one frame a second."""
    request = video(*size, num_frames=num_frames, fps=fps)
    data = encode(request, waves(request)).data
    with av.open(io.BytesIO(data), "r") as container:
        stream = container.streams.video[0]
        frames = list(container.decode(stream))
        times = [frame.pts * frame.time_base for frame in frames]
        assert times == [Fraction(index, fps) for index in range(num_frames)]
        assert {(frame.width, frame.height) for frame in frames} == {size}
        assert (stream.codec_context.name, stream.profile, stream.pix_fmt) == ("h264", "High", "yuv420p")
    assert sum(fragment_durations_s(data)) == Fraction(num_frames, fps)


def test_the_picture_survives() -> None:
    """Smooth moving colours come back within 38 dB, so frames are neither swapped nor washed out."""
    request = video(320, 256)
    frames = waves(request)
    decoded = decode(encode(request, frames).data)
    assert psnr(decoded, frames) > 38
    assert psnr(decoded[1:], frames[:-1]) < 30  # the bound would see frames that are off by one


@pytest.mark.parametrize("colour", [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0), (200, 120, 40)])
def test_colours_are_right(colour: tuple[int, int, int]) -> None:
    """A plain patch decodes to its own colour within 3/255 by the BT.709 formulas."""
    request = video(32, 32, num_frames=1)
    frames = np.full((1, 32, 32, 3), colour, np.uint8)
    (decoded,) = decode(encode(request, frames).data)
    assert np.abs(to_rgb(decoded) - colour).max() <= 3


def test_colours_are_named() -> None:
    """Container and stream both say BT.709 limited range, so no player has to guess."""
    request = video(num_frames=1)
    data = encode(request, waves(request)).data
    (frame,) = decode(data)  # tags from the sequence parameter set
    assert (frame.color_primaries, frame.color_trc, frame.colorspace, frame.color_range) == (1, 1, 1, 1)
    sample_entry = box(box(data, "moov", "trak", "mdia", "minf", "stbl", "stsd")[8:], "avc1")
    assert dict(boxes(sample_entry, 78))["colr"] == b"nclx" + struct.pack(">HHHB", 1, 1, 1, 0)


@pytest.mark.parametrize("fps", [1, 3, 7, 16, 24, 30, 120])
def test_no_fragment_covers_more_than_half_a_second(fps: int) -> None:
    """Every fragment is half a second of video or less; below two frames a second it is a single frame."""
    request = video(num_frames=2 * fps + 1, fps=fps)
    durations_s = fragment_durations_s(encode(request, waves(request)).data)
    assert max(durations_s) <= max(Fraction(1, 2), Fraction(1, fps))


@pytest.mark.parametrize("fps", [4, 5, 7, 16, 24, 30, 120])
def test_the_first_bytes_can_be_played_and_come_within_half_a_second_of_video(fps: int) -> None:
    """Nothing leaves before there is a picture in it, and that is before half a second of frames went in."""
    request = video(num_frames=2 * fps + 1, fps=fps)
    frames = waves(request)
    sink = Sink()
    encoder = open_encoder(request, sink)
    num_added = 0
    while not sink.writes:
        encoder.add(frames[num_added].tobytes())
        num_added += 1
    encoder.abort()
    assert num_added <= fps / 2
    assert [name for name, _ in boxes(sink.data)] == ["ftyp", "moov", "moof", "mdat"]
    assert len(decode(sink.data)) == num_added - 1


@pytest.mark.parametrize("fps", [1, 2, 3])
def test_a_slow_video_comes_frame_by_frame(fps: int) -> None:
    """With frames further apart than half a second, each leaves as soon as the next is there."""
    request = video(num_frames=5, fps=fps)
    sink = Sink()
    encoder = open_encoder(request, sink)
    num_playable = []
    for frame in waves(request):
        encoder.add(frame.tobytes())
        num_playable.append(len(decode(sink.data)) if sink.writes else 0)
    encoder.finish()
    assert num_playable == [0, 1, 2, 3, 4]
    assert len(decode(sink.data)) == 5


@pytest.mark.parametrize(("size", "num_frames", "fps"), [((320, 256), 81, 16), ((64, 48), 121, 24), ((64, 48), 5, 16)])
def test_a_player_opens_what_is_there_when_half_went_in(size: tuple[int, int], num_frames: int, fps: int) -> None:
    """The prefix written by then holds all but the last half second, and the frames are those of the whole file."""
    request = video(*size, num_frames=num_frames, fps=fps)
    frames = waves(request)
    sink = Sink()
    encoder = open_encoder(request, sink)
    half = (num_frames + 1) // 2
    for frame in frames[:half]:
        encoder.add(frame.tobytes())
    prefix = sink.data
    for frame in frames[half:]:
        encoder.add(frame.tobytes())
    encoder.finish()
    early = decode(prefix) if prefix else []
    whole = decode(sink.data)
    assert len(early) >= half - fps / 2
    assert [frame.pts for frame in early] == [frame.pts for frame in whole[: len(early)]]
    assert all(np.array_equal(a.to_ndarray(), b.to_ndarray()) for a, b in zip(early, whole, strict=False))


def test_each_write_is_whole_boxes() -> None:
    """A reader that stops between two writes never holds half a box."""
    request = video(num_frames=33)
    written = [[name for name, _ in boxes(data)] for data in encode(request, waves(request)).writes]
    assert written[0] == ["ftyp", "moov", "moof", "mdat"]
    assert written[1:-1] == [["moof", "mdat"]] * 7
    assert written[-1] == ["moof", "mdat", "mfra"]


def test_nothing_in_the_file_tells_when_or_by_which_ffmpeg_it_was_made() -> None:
    """Times are zero and FFmpeg leaves no version, so the same frames can give the same bytes."""
    request = video(num_frames=1)
    data = encode(request, waves(request)).data
    for path in (("mvhd",), ("trak", "tkhd"), ("trak", "mdia", "mdhd")):
        version, created, modified = struct.unpack_from(">III", box(data, "moov", *path))
        assert (version >> 24, created, modified) == (0, 0, 0)
    assert b"Lavf" not in data
    assert b"Lavc" not in data


@pytest.mark.parametrize(("size", "num_slices"), [((320, 256), 4), ((832, 480), 7), ((1280, 720), 8)])
def test_slices_are_in_the_stream(size: tuple[int, int], num_slices: int) -> None:
    """Their number follows the height of the video, up to eight, and never the machine."""
    request = video(*size, num_frames=1)
    assert f"sliced_threads=1 slices={num_slices}".encode() in encode(request, waves(request)).data


def test_one_different_pixel_gives_other_bytes() -> None:
    """The comparison of bytes above would see a difference."""
    request = video()
    frames = waves(request)
    changed = frames.copy()
    changed[0, 0, 0] ^= 128
    assert encode(request, changed).data != encode(request, frames).data


def test_raw_frames_are_passed_on_as_they_are() -> None:
    """Raw output is every frame's bytes, one write a frame, at once."""
    frames = waves(RAW)
    sink = Sink()
    encoder = open_encoder(RAW, sink)
    for index, frame in enumerate(frames, start=1):
        encoder.add(memoryview(frame.tobytes()))
        assert sink.data == frames[:index].tobytes()
    encoder.finish()
    assert sink.writes == [frame.tobytes() for frame in frames]


@pytest.mark.parametrize("request_", [video(num_frames=3), RAW], ids=["mp4", "raw"])
def test_what_is_no_frame_is_refused(request_: VideoRequest) -> None:
    """A frame of another size, one too many, or an end too early: each is named, and the rest of the video is right."""
    frames = waves(request_)
    sink = Sink()
    encoder = open_encoder(request_, sink)
    for wrong in (b"", frames[0].tobytes()[:-1], frames[:2].tobytes()):
        with pytest.raises(
            ValueError, match=rf"frame: {len(wrong)} bytes; a frame of this video has 64 x 48 x 3 = 9216"
        ):
            encoder.add(wrong)
    encoder.add(frames[0].tobytes())
    encoder.add(frames[1].tobytes())
    with pytest.raises(ValueError, match="num_frames: 2 frames were added; 3 were promised"):
        encoder.finish()
    encoder.add(frames[2].tobytes())
    with pytest.raises(ValueError, match="all its 3 frames"):
        encoder.add(frames[2].tobytes())
    encoder.finish()
    assert sink.data == encode(request_, frames).data


@pytest.mark.parametrize("request_", [video(num_frames=1), replace(RAW, num_frames=1)], ids=["mp4", "raw"])
def test_a_frame_is_free_after_add(request_: VideoRequest) -> None:
    """The encoder keeps no hold of the caller's memory, so a slot of shared memory can be used again."""
    buffer = bytearray(waves(request_).tobytes())
    encoder = open_encoder(request_, Sink())
    with memoryview(buffer) as frame:
        encoder.add(frame)
    buffer.clear()  # BufferError if anything still looked at it
    encoder.abort()


def num_threads() -> int:
    return psutil.Process().num_threads()


@pytest.mark.parametrize("num_added", [0, 1, 6, 13])
def test_abort_leaves_nothing(num_added: int) -> None:
    """At any moment, abort writes nothing more and ends the encoder's threads; again, it does nothing."""
    request = video(320, 256)
    before = num_threads()
    sink = Sink()
    encoder = open_encoder(request, sink)
    for frame in waves(request)[:num_added]:
        encoder.add(frame.tobytes())
    assert num_threads() > before
    written = list(sink.writes)
    encoder.abort()
    encoder.abort()
    assert num_threads() == before
    assert sink.writes == written


def test_finish_leaves_nothing_and_abort_after_it_does_nothing() -> None:
    """A finished encoder holds no threads, and the abort in a `finally` does not touch the file."""
    request = video(320, 256)
    before = num_threads()
    sink = Sink()
    encoder = open_encoder(request, sink)
    for frame in waves(request):
        encoder.add(frame.tobytes())
    encoder.finish()
    data = sink.data
    encoder.abort()
    assert num_threads() == before
    assert sink.data == data


def test_aborted_encoders_give_their_memory_back() -> None:
    """Thirty aborted videos of full size cost no more memory than one."""
    request = video(1280, 720)
    frame = waves(replace(request, num_frames=1)).tobytes()

    def open_and_abort() -> int:
        encoder = open_encoder(request, Sink())
        encoder.add(frame)
        in_use = psutil.Process().memory_info().rss
        encoder.abort()
        return in_use

    first = open_and_abort()
    last = [open_and_abort() for _ in range(30)][-1]
    assert last - first < 64 * 2**20  # one encoder takes about as much


class RefusedError(Exception):
    pass


@pytest.mark.parametrize("request_", [video(num_frames=8), replace(RAW, num_frames=8)], ids=["mp4", "raw"])
def test_what_write_raises_comes_out(request_: VideoRequest) -> None:
    """A disk that refuses reaches whoever added the frame, as the very error, and the encoder can be aborted then."""

    def refuse(_: bytes) -> None:
        raise RefusedError

    encoder = open_encoder(request_, refuse)
    with pytest.raises(RefusedError):
        add_all(encoder, waves(request_))
    encoder.abort()


def add_all(encoder: Encoder, frames: Frames) -> None:
    for frame in frames:
        encoder.add(frame.tobytes())


@pytest.mark.parametrize(("size", "fps", "codecs"), [((832, 480), 16, "avc1.64001e"), ((1280, 720), 24, "avc1.64001f")])
def test_describe_names_the_codec_that_is_in_the_file(size: tuple[int, int], fps: int, codecs: str) -> None:
    """The media type repeats profile and level of the file itself, so a browser can tell whether it can play it."""
    request = video(*size, num_frames=1, fps=fps)
    assert describe(request) == VideoInfo(
        output_format=OutputFormat.MP4_H264,
        media_type=f'video/mp4; codecs="{codecs}"',
        width=size[0],
        height=size[1],
        num_frames=1,
        fps=fps,
    )
    data = encode(request, waves(request)).data
    sample_entry = box(box(data, "moov", "trak", "mdia", "minf", "stbl", "stsd")[8:], "avc1")
    assert f"avc1.{dict(boxes(sample_entry, 78))['avcC'][1:4].hex()}" == codecs


def test_describe_raw() -> None:
    """Raw frames are plain bytes of a size that the other fields give."""
    assert describe(RAW) == VideoInfo(
        output_format=OutputFormat.RAW_RGB24,
        media_type="application/octet-stream",
        width=64,
        height=48,
        num_frames=3,
        fps=16,
    )
