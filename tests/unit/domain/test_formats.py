"""The table of formats against what the encoders themselves say."""

import pytest

from wan_grpc.domain.formats import FORMATS, Encoding, OutputFormat, PixelFormat, encoding_violations, resolve_encoding

NOTHING = Encoding()


def test_every_format_has_a_rule() -> None:
    """No format is forgotten, and each has a usual way to store samples."""
    assert set(FORMATS) == set(OutputFormat)
    assert all(rule.pixel_formats and rule.suffix.startswith(".") for rule in FORMATS.values())


@pytest.mark.parametrize("name", OutputFormat)
def test_usual_values_are_allowed(name: OutputFormat) -> None:
    """What an unset encoding means keeps the format's own rules, and resolving it again changes nothing."""
    resolved = resolve_encoding(NOTHING, name)
    assert list(encoding_violations(resolved, name)) == []
    assert resolve_encoding(resolved, name) == resolved


def test_a_bit_rate_takes_the_place_of_crf() -> None:
    """One of the two is resolved, as asked."""
    asked = Encoding(bitrate_bps=1_000_000)
    wanted = Encoding(bitrate_bps=1_000_000, pixel_format=PixelFormat.YUV420P)
    assert resolve_encoding(asked, OutputFormat.WEBM_AV1) == wanted


@pytest.mark.parametrize(
    ("name", "asked", "broken"),
    [
        (OutputFormat.MP4_H264, Encoding(crf=18, bitrate_bps=10**6), [("bitrate_bps", "DOES_NOT_APPLY")]),
        (OutputFormat.WEBM_VP9, Encoding(pixel_format=PixelFormat.YUV420P10), [("pixel_format", "NOT_SERVED")]),
        (OutputFormat.WEBM_AV1, Encoding(pixel_format=PixelFormat.YUV444P), [("pixel_format", "NOT_SERVED")]),
        (OutputFormat.MKV_FFV1, Encoding(pixel_format=PixelFormat.YUV420P), [("pixel_format", "NOT_SERVED")]),
        (OutputFormat.PNG, Encoding(quality=90, crf=1), [("crf", "DOES_NOT_APPLY"), ("quality", "DOES_NOT_APPLY")]),
        (OutputFormat.JPEG, Encoding(quality=101), [("quality", "OUT_OF_RANGE")]),
    ],
)
def test_what_does_not_fit_is_named(name: OutputFormat, asked: Encoding, broken: list[tuple[str, str]]) -> None:
    """Each option that the format cannot heed has its own violation."""
    found = encoding_violations(resolve_encoding(asked, name), name)
    assert [(each.field, each.reason) for each in found] == [(f"spec.encoding.{f}", reason) for f, reason in broken]
