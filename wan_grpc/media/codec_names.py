"""What a browser is told about a codec before it has seen a byte: the strings of RFC 6381, e.g. `avc1.64001f`.

Knows the headers of the codecs, as far as profile and level. Does not know how they came about.
"""

from typing import Final

from wan_grpc.domain.formats import OutputFormat, PixelFormat, resolve_encoding
from wan_grpc.domain.request import VideoRequest
from wan_grpc.media.codecs import codec_of, open_codec

_MATROSKA_NAMES: Final = {OutputFormat.MKV_FFV1: "V_FFV1"}

# Level x 10, luma samples a second, of a picture, of a side, kbit/s: VP9 Bitstream & Decoding Process, annex A.
_VP9_LEVELS: Final = (
    (10, 829_440, 36_864, 512, 200),
    (11, 2_764_800, 73_728, 768, 800),
    (20, 4_608_000, 122_880, 960, 1_800),
    (21, 9_216_000, 245_760, 1_344, 3_600),
    (30, 20_736_000, 552_960, 2_048, 7_200),
    (31, 36_864_000, 983_040, 2_752, 12_000),
    (40, 83_558_400, 2_228_224, 4_160, 18_000),
    (41, 160_432_128, 2_228_224, 4_160, 30_000),
    (50, 311_951_360, 8_912_896, 8_384, 60_000),
    (51, 588_251_136, 8_912_896, 8_384, 120_000),
    (52, 1_176_502_272, 8_912_896, 8_384, 180_000),
    (60, 1_176_502_272, 35_651_584, 16_832, 180_000),
    (61, 2_353_004_544, 35_651_584, 16_832, 240_000),
    (62, 4_706_009_088, 35_651_584, 16_832, 480_000),
)
_VP9_CHROMA: Final = {PixelFormat.YUV420P: (0, 0), PixelFormat.YUV422P: (1, 2), PixelFormat.YUV444P: (1, 3)}
"""Profile and subsampling; chroma samples of 4:2:0 stand between two rows, at the left of two columns."""


def codec_name(video: VideoRequest) -> str:
    """Name the codec of a video format; profile and level are the encoder's own choice where it has one."""
    match video.output_format:
        case OutputFormat.MP4_H264 | OutputFormat.MP4_H264_PROGRESSIVE:
            return _avc1(_parameter_sets(video))
        case OutputFormat.MP4_H265:
            return _hvc1(_parameter_sets(video))
        case OutputFormat.WEBM_AV1:
            return _av01(_parameter_sets(video), video)
        case OutputFormat.WEBM_VP9:
            return _vp09(video)
        case _:
            return _MATROSKA_NAMES[video.output_format]


def _parameter_sets(video: VideoRequest) -> bytes:
    """What a decoder must know first, as the encoder writes it."""
    return open_codec(codec_of(video), video).extradata or b""


def _avc1(parameter_sets: bytes) -> str:
    return f"avc1.{_unit(parameter_sets, 0x67)[1:4].hex()}"


def _hvc1(parameter_sets: bytes) -> str:
    """ISO/IEC 14496-15, annex E: profile, compatible profiles, tier and level, constraints."""
    profile_tier_level = _unit(parameter_sets, 33 << 1)[3:15]
    tier = "H" if profile_tier_level[0] & 0x20 else "L"
    compatible = int(f"{int.from_bytes(profile_tier_level[1:5]):032b}"[::-1], 2)
    constraints = "".join(f".{byte:X}" for byte in profile_tier_level[5:11].rstrip(b"\0"))
    return f"hvc1.{profile_tier_level[0] & 0x1F}.{compatible:X}.{tier}{profile_tier_level[11]}{constraints}"


def _av01(parameter_sets: bytes, video: VideoRequest) -> str:
    """AV1 Codec ISO Media File Format Binding, section 5."""
    size, payload = parameter_sets[1], parameter_sets[2:]
    assert parameter_sets[0] == 0x0A and size == len(payload), "a sequence header alone"
    bits = "".join(f"{byte:08b}" for byte in payload)
    profile, rest = int(bits[:3], 2), bits[3:]
    # Neither still picture, reduced header, timing nor delays; one operating point, for all there is.
    assert rest[: 4 + 5 + 12] == "0" * 21, "as SVT-AV1 begins its sequence header"
    level = int(rest[21:26], 2)
    tier = "H" if level > 7 and rest[26] == "1" else "M"
    return f"av01.{profile}.{level:02}{tier}.{_depth(video):02}"


def _vp09(video: VideoRequest) -> str:
    """VP Codec ISO Media File Format Binding: profile, level, depth, subsampling, then BT.709 and limited range."""
    profile, subsampling = _VP9_CHROMA[_pixel_format(video)]
    return f"vp09.{profile:02}.{_vp9_level(video)}.{_depth(video):02}.{subsampling:02}.01.01.01.00"


def _vp9_level(video: VideoRequest) -> int:
    """The least level that allows this size, rate and mean of bits; libvpx writes none into the stream."""
    samples, side = video.width * video.height, max(video.width, video.height)
    kilobits = (video.encoding.bitrate_bps or 0) / 1000
    for level, samples_a_second, of_picture, of_side, of_rate in _VP9_LEVELS:
        if (
            samples * video.fps <= samples_a_second
            and samples <= of_picture
            and side <= of_side
            and kilobits <= of_rate
        ):
            return level
    return _VP9_LEVELS[-1][0]


def _unit(parameter_sets: bytes, header: int) -> bytes:
    """The NAL unit whose first byte is `header`, without the bytes that keep start codes out of it."""
    _, *units = parameter_sets.split(b"\0\0\1")
    return next(unit for unit in units if unit[0] == header).replace(b"\0\0\3", b"\0\0")


def _pixel_format(video: VideoRequest) -> PixelFormat:
    pixel_format = resolve_encoding(video.encoding, video.output_format).pixel_format
    assert pixel_format is not None, "a resolved encoding has a pixel format"
    return pixel_format


def _depth(video: VideoRequest) -> int:
    return 10 if _pixel_format(video).endswith("10") else 8
