"""The media type names the codec as it stands in the file: browsers decide by it before they have a byte."""

import io

import av
import pytest

from tests.unit.media import films
from tests.unit.media.films import encode, of_format, video, waves
from wan_grpc.domain.formats import FORMATS, OutputFormat, PixelFormat
from wan_grpc.domain.request import VideoRequest
from wan_grpc.media.video import describe

SIZES = [(832, 480, 16), (1280, 720, 24)]


def codec_of(request: VideoRequest) -> str:
    name = describe(request).media_type.split('codecs="')[1]
    return name.removesuffix('"')


def requests_of(*names: OutputFormat) -> list[VideoRequest]:
    return [
        video(width, height, num_frames=1, fps=fps, output_format=name, pixel_format=pixel_format)
        for name in names
        for pixel_format in FORMATS[name].pixel_formats
        for width, height, fps in SIZES[: 2 if pixel_format is PixelFormat.YUV420P else 1]
    ]


@pytest.mark.parametrize(
    ("name", "media_type"),
    [
        (OutputFormat.MP4_H264, 'video/mp4; codecs="avc1.64001f"'),
        (OutputFormat.MP4_H264_PROGRESSIVE, 'video/mp4; codecs="avc1.64001f"'),
        (OutputFormat.MP4_H265, 'video/mp4; codecs="hvc1.1.6.L93.90"'),
        (OutputFormat.WEBM_VP9, 'video/webm; codecs="vp09.00.31.08.00.01.01.01.00"'),
        (OutputFormat.WEBM_AV1, 'video/webm; codecs="av01.0.05M.08"'),
        (OutputFormat.MKV_FFV1, 'video/matroska; codecs="V_FFV1"'),
        (OutputFormat.RAW_RGB24, "application/octet-stream"),
        (OutputFormat.WEBP_ANIMATION, "image/webp"),
        (OutputFormat.GIF, "image/gif"),
        (OutputFormat.PNG, "image/png"),
        (OutputFormat.JPEG, "image/jpeg"),
        (OutputFormat.WEBP, "image/webp"),
    ],
)
def test_every_format_has_its_media_type(name: OutputFormat, media_type: str) -> None:
    """As browsers and RFC 6381 spell them, for the usual size and rate."""
    assert describe(video(1280, 720, output_format=name)).media_type == media_type


@pytest.mark.parametrize("request_", requests_of(OutputFormat.MP4_H264, OutputFormat.MP4_H264_PROGRESSIVE))
def test_h264(request_: VideoRequest) -> None:
    """Profile, constraints and level are those of the sample entry."""
    name, found = films.sample_entry(encode(request_, waves(request_)).data)
    assert codec_of(request_) == f"{name}.{found['avcC'][1:4].hex()}"


@pytest.mark.parametrize("request_", requests_of(OutputFormat.MP4_H265))
def test_h265(request_: VideoRequest) -> None:
    """Profile, compatibility, tier, level and constraints are those of the sample entry, named as Apple wants it."""
    name, found = films.sample_entry(encode(request_, waves(request_)).data)
    header = found["hvcC"]
    compatible = sum(1 << bit for bit in range(32) if int.from_bytes(header[2:6]) >> (31 - bit) & 1)
    constraints = "".join(f".{byte:X}" for byte in header[6:12].rstrip(b"\0"))
    tier = "LH"[header[1] >> 5 & 1]
    assert codec_of(request_) == f"{name}.{header[1] & 31}.{compatible:X}.{tier}{header[12]}{constraints}"
    assert name == "hvc1"


def track_of(data: bytes) -> bytes:
    return films.element(data, films.SEGMENT, films.TRACKS, films.TRACK)


@pytest.mark.parametrize("request_", requests_of(OutputFormat.WEBM_AV1))
def test_av1(request_: VideoRequest) -> None:
    """Profile, level, tier and depth are those of the configuration record that FFmpeg made of the sequence header."""
    track = track_of(encode(request_, waves(request_)).data)
    record = films.element(track, films.CODEC_PRIVATE)
    profile, level = record[1] >> 5, record[1] & 31
    tier, depth = "MH"[record[2] >> 7], 10 if record[2] >> 6 & 1 else 8
    assert codec_of(request_) == f"av01.{profile}.{level:02}{tier}.{depth:02}"
    assert films.element(track, films.CODEC_ID) == b"V_AV1"


@pytest.mark.parametrize("request_", requests_of(OutputFormat.WEBM_VP9))
def test_vp9(request_: VideoRequest) -> None:
    """Profile, depth, matrix, range and subsampling are those in the header of the first frame."""
    data = encode(request_, waves(request_)).data
    with av.open(io.BytesIO(data)) as container:
        header = bytes(next(iter(container.demux(video=0))))[:8]
    bits = "".join(f"{byte:08b}" for byte in header)
    profile = int(bits[3] + bits[2], 2)
    start = 8 + 24  # marker, profile, a frame that is shown and a key; the sync code
    assert (bits[:2], bits[4:6], header[1:4]) == ("10", "00", b"\x49\x83\x42")
    matrix, full_range = int(bits[start : start + 3], 2), bits[start + 3]
    across, down = (bits[start + 4], bits[start + 5]) if profile == 1 else ("1", "1")
    subsampling = {("1", "1"): "00", ("1", "0"): "02", ("0", "0"): "03"}[across, down]
    assert (matrix, full_range) == (2, "0")  # BT.709 as VP9 numbers it, limited
    name, told_profile, _level, depth, told_subsampling, *colours = codec_of(request_).split(".")
    assert (name, int(told_profile), depth, told_subsampling) == ("vp09", profile, "08", subsampling)
    assert colours == ["01", "01", "01", "00"]
    assert films.element(track_of(data), films.CODEC_ID) == b"V_VP9"


@pytest.mark.parametrize(
    ("width", "height", "fps", "bitrate_bps", "level"),
    [
        (16, 16, 16, None, "10"),
        (256, 144, 22, None, "10"),  # 829440 samples a second stop at 22.5
        (256, 144, 23, None, "11"),
        (416, 240, 16, None, "20"),
        (832, 480, 16, None, "30"),
        (1280, 720, 16, None, "31"),
        (1280, 720, 40, None, "31"),
        (1280, 720, 41, None, "40"),
        (16, 528, 1, None, "11"),  # a side of 512 is the most of level 1
        (1280, 720, 16, 12_000_000, "31"),
        (1280, 720, 16, 12_000_001, "40"),
        (8192, 4096, 120, None, "62"),
        (16384, 16384, 120, None, "62"),  # beyond every level: the highest there is
    ],
)
def test_vp9_levels(width: int, height: int, fps: int, bitrate_bps: int | None, level: str) -> None:
    """The least level of the standard's table that has room for picture, side, rate and bits."""
    request = video(width, height, fps=fps, output_format=OutputFormat.WEBM_VP9, bitrate_bps=bitrate_bps)
    assert codec_of(request).split(".")[2] == level


def test_ffv1() -> None:
    """The name is the one in the file."""
    request = of_format(OutputFormat.MKV_FFV1)
    data = encode(request, waves(request)).data
    assert films.element(track_of(data), films.CODEC_ID).decode() == codec_of(request)
