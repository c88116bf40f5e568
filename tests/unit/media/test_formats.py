"""Every output format: what comes out is the video that was asked for, however small, short, slow or noisy."""

import io
from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction

import av
import numpy as np
import psutil
import pytest
from PIL import Image

from tests.unit.media import films
from tests.unit.media.films import LASTING, PICTURES, YUV_VIDEOS, Sink, encode, of_format, static, waves
from wan_grpc.domain.formats import FORMATS, MAX_BITRATE_BPS, MIN_BITRATE_BPS, OutputFormat
from wan_grpc.domain.request import VideoRequest
from wan_grpc.media.video import open_encoder

MP4 = [OutputFormat.MP4_H264, OutputFormat.MP4_H264_PROGRESSIVE, OutputFormat.MP4_H265]
MATROSKA = [OutputFormat.WEBM_VP9, OutputFormat.WEBM_AV1, OutputFormat.MKV_FFV1]
ANIMATIONS = [OutputFormat.WEBP_ANIMATION, OutputFormat.GIF]
LEAST_SIDE = 16


def times_of(request: VideoRequest, data: bytes) -> list[Fraction]:
    """When each frame is shown."""
    if request.output_format is OutputFormat.WEBP_ANIMATION:
        ends = np.cumsum([0] + [frame.duration_ms for frame in films.animation(data)])
        return [Fraction(int(end), 1000) for end in ends[:-1]]
    return [frame.pts * frame.time_base for frame in films.decode(data)]


def tick_of(name: OutputFormat) -> Fraction:
    """The steps in which a container counts time; MP4 counts in parts of a frame."""
    return Fraction(0) if name in MP4 else Fraction(1, 100) if name is OutputFormat.GIF else Fraction(1, 1000)


@pytest.mark.parametrize("fps", [1, 7, 16, 30, 50, 120])
@pytest.mark.parametrize("name", [name for name in LASTING if name is not OutputFormat.RAW_RGB24])
def test_a_decoder_gets_every_frame_at_its_time(name: OutputFormat, fps: int) -> None:
    """Each frame has its size, and is shown at its time as far as the container can tell it: errors do not add up."""
    request = of_format(name, num_frames=9, fps=min(fps, FORMATS[name].max_fps or fps))
    data = encode(request, waves(request)).data
    frames = films.decoded(request, data)
    assert [(frame.width, frame.height) for frame in frames] == [(96, 80)] * 9
    wanted = films.at_times(request)
    assert all(abs(t - want) <= tick_of(name) for t, want in zip(times_of(request, data), wanted, strict=True))


@pytest.mark.parametrize("fps", [1, 7, 16, 30, 120])
@pytest.mark.parametrize("name", [*MP4, *MATROSKA])
def test_the_container_tells_rate_and_length(name: OutputFormat, fps: int) -> None:
    """Rate and length are in the header of Matroska, which is not written twice, and in the index of MP4."""
    request = of_format(name, num_frames=9, fps=fps)
    data = encode(request, waves(request)).data
    with av.open(io.BytesIO(data), "r") as container:
        assert container.streams.video[0].average_rate == fps
        length = Fraction(container.duration, av.time_base)
    assert abs(length - Fraction(9, fps)) <= Fraction(1, 1000)


@pytest.mark.parametrize("fps", [1, 3, 7, 16, 24, 30, 50])
@pytest.mark.parametrize("name", ANIMATIONS)
def test_an_animation_is_as_long_as_the_video_and_loops(name: OutputFormat, fps: int) -> None:
    """The delays add up to the length of the video within one tick, none is zero, and it goes on for ever."""
    request = of_format(name, num_frames=9, fps=fps)
    with Image.open(io.BytesIO(encode(request, waves(request)).data)) as image:
        assert (image.n_frames, image.size, image.info["loop"]) == (9, (96, 80), 0)  # type: ignore[attr-defined]
        delays_ms = []
        for index in range(9):
            image.seek(index)
            image.load()
            delays_ms.append(image.info["duration"])
    assert min(delays_ms) > 0
    assert abs(Fraction(int(sum(delays_ms)), 1000) - Fraction(9, fps)) <= max(tick_of(name), Fraction(1, 1000))


def quality_of(request: VideoRequest) -> float:
    frames = waves(request)
    return films.psnr(films.decoded(request, encode(request, frames).data), frames)


@pytest.mark.parametrize("name", [name for name in OutputFormat if name is not OutputFormat.RAW_RGB24])
def test_the_picture_survives(name: OutputFormat) -> None:
    """Smooth moving colours come back well, and exactly where the format is lossless."""
    request = of_format(name, width=320, height=256)
    lossless = name in (OutputFormat.MKV_FFV1, OutputFormat.PNG)
    assert quality_of(request) > (130 if lossless else 30 if name is OutputFormat.GIF else 36)


@pytest.mark.parametrize("name", [OutputFormat.MKV_FFV1, OutputFormat.PNG])
def test_lossless_is_lossless(name: OutputFormat) -> None:
    """Noise in every bit comes back in every bit."""
    request = of_format(name)
    frames = static(request)
    for got, frame in zip(films.decode(encode(request, frames).data), frames, strict=True):
        assert np.array_equal(films.to_rgb(got), frame)


@pytest.mark.parametrize("name", [OutputFormat.MP4_H264, OutputFormat.WEBM_VP9, OutputFormat.MP4_H265])
def test_frames_come_in_order(name: OutputFormat) -> None:
    """Each frame that is decoded is nearer to its own than to its neighbours."""
    request = of_format(name, num_frames=9)
    frames = waves(request)
    got = films.decode(encode(request, frames).data)
    assert films.psnr(got, frames) > films.psnr(got[1:], frames[:-1]) + 3


def corner_cases(name: OutputFormat) -> Iterator[VideoRequest]:
    rule = FORMATS[name]
    least = max(LEAST_SIDE, rule.min_side)
    sizes = [(least, least), (least, least + 16), (max(48, least), 80), (least, 512), (528, least)]
    rates = [min(fps, rule.max_fps or fps) for fps in (1, 7, 30, 120)]
    for index, (width, height) in enumerate(sizes):
        for num_frames in (1,) if rule.is_picture else (1, 5):
            fps = rates[(index + num_frames) % 4]
            yield of_format(name, width=width, height=height, num_frames=num_frames, fps=fps)


@pytest.mark.parametrize("name", OutputFormat)
def test_whatever_the_rules_allow_can_be_encoded(name: OutputFormat) -> None:
    """The least sides, narrow and flat, single frames and each rate, of pure noise: no encoder refuses or hangs."""
    for request in corner_cases(name):
        frames = static(request)
        data = encode(request, frames).data
        if name is OutputFormat.RAW_RGB24:
            assert data == frames.tobytes()
        else:
            got = films.decoded(request, data)
            sizes = [(request.width, request.height)] * request.num_frames
            assert [(frame.width, frame.height) for frame in got] == sizes, request


def option_cases(name: OutputFormat) -> Iterator[VideoRequest]:
    rule = FORMATS[name]
    for pixel_format in rule.pixel_formats:
        if rule.crf is not None:
            least, most, _ = rule.crf
            yield of_format(name, crf=least, pixel_format=pixel_format)
            yield of_format(name, crf=most, pixel_format=pixel_format)
            yield of_format(name, bitrate_bps=MIN_BITRATE_BPS, pixel_format=pixel_format, fps=1)
            yield of_format(name, bitrate_bps=MAX_BITRATE_BPS, pixel_format=pixel_format, fps=120)
        elif rule.default_quality is not None:
            yield of_format(name, quality=1, pixel_format=pixel_format)
            yield of_format(name, quality=100, pixel_format=pixel_format)


@pytest.mark.parametrize("name", [name for name, rule in FORMATS.items() if rule.crf or rule.default_quality])
def test_every_option_is_taken_at_its_bounds(name: OutputFormat) -> None:
    """Least and most of crf, bit rate and quality, with every way to store samples, give a video of that kind."""
    for request in option_cases(name):
        got = films.decoded(request, encode(request, static(request)).data)
        assert len(got) == request.num_frames
        assert plain(got[0].format.name) == request.encoding.pixel_format, request


def plain(ffmpeg_name: str) -> str:
    """The name without the order of bytes, and without the range that FFmpeg puts into names of JPEG."""
    return ffmpeg_name.replace("yuvj", "yuv").removesuffix("le")


@pytest.mark.parametrize("name", YUV_VIDEOS)
def test_crf_and_bit_rate_are_heeded(name: OutputFormat) -> None:
    """Less quality makes smaller files, and a mean of bits is met within a half over four seconds."""
    by_crf = [len(encode(request, static(request)).data) for request in (of_format(name, crf=c) for c in (10, 30, 50))]
    assert by_crf == sorted(by_crf, reverse=True)
    request = of_format(name, width=160, height=128, num_frames=65, bitrate_bps=600_000)
    frames = waves(request) // 2 + static(request) // 16
    bits_a_second = 8 * len(encode(request, frames).data) / (65 / 16)
    assert 300_000 < bits_a_second < 900_000


@pytest.mark.parametrize("name", [name for name, rule in FORMATS.items() if rule.default_quality])
def test_quality_is_heeded(name: OutputFormat) -> None:
    """More quality is more like the original."""
    qualities = [quality_of(of_format(name, quality=quality)) for quality in (1, 50, 100)]
    assert qualities == sorted(qualities)


@pytest.mark.parametrize("name", [*MATROSKA, OutputFormat.GIF, OutputFormat.MP4_H265])
def test_streams_leave_while_frames_come_in(name: OutputFormat) -> None:
    """The first bytes hold a picture and come within half a second of video; what has left is never changed."""
    request = of_format(name, num_frames=33)
    sink = Sink()
    encoder = open_encoder(request, sink)
    num_before: list[int] = []
    for index, frame in enumerate(waves(request)):
        encoder.add(frame.tobytes())
        if sink.writes and not num_before:
            num_before.append(index + 1)
            assert len(films.decode(sink.data)) >= 1
    early = sink.data
    encoder.finish()
    assert num_before[0] <= request.fps / 2
    assert len(films.decode(early)) >= 33 - request.fps / 2
    assert sink.data.startswith(early)


def test_clusters_are_whole() -> None:
    """Each write of a WebM file is whole clusters of at most half a second; its header has length and no index."""
    request = of_format(OutputFormat.WEBM_VP9, num_frames=33)
    first, *rest = encode(request, waves(request)).writes
    (_, segment) = list(films.elements(first))[1]
    assert [name for name, _ in films.elements(segment) if name in (films.INFO, films.TRACKS, films.CLUSTER)] == [
        films.INFO,
        films.TRACKS,
        films.CLUSTER,
    ]
    clusters = [name for data in rest for name, _ in films.elements(data)]
    assert set(clusters[:-1]) == {films.CLUSTER}
    assert len(clusters) >= 6


@pytest.mark.parametrize("name", [OutputFormat.WEBP_ANIMATION, *PICTURES])
def test_what_cannot_be_streamed_comes_in_one_piece(name: OutputFormat) -> None:
    """A picture, or an animation whose header tells its length, is one write."""
    request = of_format(name)
    assert len(encode(request, waves(request)).writes) == 1


@pytest.mark.parametrize("name", OutputFormat)
def test_abort_leaves_nothing(name: OutputFormat) -> None:
    """At any moment, abort writes nothing more and ends the encoder's threads; again, it does nothing."""
    before = psutil.Process().num_threads()
    for num_added in (0, 1) if name in PICTURES else (0, 1, 6):
        request = of_format(name, num_frames=1 if name in PICTURES else 13)
        sink = Sink()
        encoder = open_encoder(request, sink)
        for frame in waves(request)[:num_added]:
            encoder.add(frame.tobytes())
        written = list(sink.writes)
        encoder.abort()
        encoder.abort()
        assert psutil.Process().num_threads() == before
        assert sink.writes == written


class RefusedError(Exception):
    pass


@pytest.mark.parametrize("name", OutputFormat)
def test_what_write_raises_comes_out(name: OutputFormat) -> None:
    """A disk that refuses reaches whoever added the frame or ended the video, as the very error."""

    def refuse(_: bytes) -> None:
        raise RefusedError

    request = of_format(name)
    encoder = open_encoder(request, refuse)
    with pytest.raises(RefusedError):
        for frame in waves(request):
            encoder.add(frame.tobytes())
        encoder.finish()
    encoder.abort()


@pytest.mark.parametrize("name", OutputFormat)
def test_a_frame_is_free_after_add(name: OutputFormat) -> None:
    """The encoder keeps no hold of the caller's memory, so a slot of shared memory can be used again."""
    request = of_format(name, num_frames=1)
    buffer = bytearray(waves(request).tobytes())
    encoder = open_encoder(request, Sink())
    with memoryview(buffer) as frame:
        encoder.add(frame)
    buffer.clear()  # BufferError if anything still looked at it
    encoder.abort()


@pytest.mark.parametrize(
    "name", [OutputFormat.WEBP_ANIMATION, OutputFormat.MP4_H264_PROGRESSIVE, OutputFormat.GIF, OutputFormat.MKV_FFV1]
)
def test_raw_frames_do_not_wait_in_memory(name: OutputFormat) -> None:
    """Sixty frames cost no more memory than ten, although their pixels are many times that."""
    request = of_format(name, width=640, height=480, num_frames=60)
    grey = bytes([96]) * request.frame_bytes
    encoder = open_encoder(request, lambda _: None)
    in_use = []
    for _ in range(60):
        encoder.add(grey)
        in_use.append(psutil.Process().memory_info().rss)
    encoder.finish()
    assert in_use[-1] - in_use[9] < 15 * request.frame_bytes


def test_a_still_webp_animation_is_a_picture() -> None:
    """One frame needs no animation."""
    request = of_format(OutputFormat.WEBP_ANIMATION, num_frames=1)
    frames = waves(request)
    (frame,) = films.decode(encode(request, frames).data)
    assert films.psnr([frame], frames) > 36


def test_one_different_pixel_gives_another_file() -> None:
    """Comparisons of bytes would see a difference, in each format."""
    for name in OutputFormat:
        request = replace(of_format(name), num_frames=1)
        frames = waves(request)
        changed = frames.copy()
        changed[0, 40, 40] ^= 128
        assert encode(request, changed).data != encode(request, frames).data, name
