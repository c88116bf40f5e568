"""What may come of one input image, whatever its bytes."""

from typing import Final

from wan_grpc.domain.errors import InvalidRequestError
from wan_grpc.domain.images import ImageFit
from wan_grpc.media.image import read_picture

MAX_BYTES: Final = 4096
MAX_PIXELS: Final = 2**18
REASONS: Final = {"TOO_LARGE", "NOT_AN_IMAGE", "NOT_SERVED", "ANIMATED", "TRUNCATED", "BROKEN"}


def outcome_of(data: bytes) -> str:
    """`read`, or the reason of the refusal. Anything else is a finding, and raises."""
    try:
        picture = read_picture(data, field="spec.image", max_bytes=MAX_BYTES, max_pixels=MAX_PIXELS)
    except InvalidRequestError as error:
        (violation,) = error.violations
        assert violation.reason in REASONS
        return violation.reason
    assert picture.pixels.mode == "RGB"
    assert picture.pixels.size == (picture.facts.width, picture.facts.height)
    assert picture.facts.width * picture.facts.height <= MAX_PIXELS
    fit = list(ImageFit)[data[-1] % len(ImageFit)]
    assert len(picture.fitted(48, 32, fit)) == 48 * 32 * 3
    return "read"
