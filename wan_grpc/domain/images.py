"""Input images as facts: what was found out about one, and how one is brought to the size of a video.

Knows sizes and aspects. Does not know how an image is read; media/image.py does.
"""

import math
from dataclasses import dataclass
from enum import StrEnum


class ImageFit(StrEnum):
    """How an image of another aspect is brought to the exact size of a video."""

    COVER = "cover"
    """Scaled until it covers the frame; what stands over is cut off evenly on both sides."""
    CONTAIN = "contain"
    """Scaled until it lies within the frame; the rest is black."""
    STRETCH = "stretch"
    """Scaled to the frame, each direction by itself."""
    EXACT = "exact"
    """Refused when its aspect is not that of the frame."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageFacts:
    """What a request's image turned out to be."""

    width: int
    """Pixels, as it is seen: after the rotation that its EXIF data asks for."""
    height: int
    sha256: str
    """Of the bytes as received, lower-case hexadecimal."""


@dataclass(frozen=True, slots=True, kw_only=True)
class InputFrames:
    """Images brought to the size of a video: RGB24 pixels, rows top to bottom; None where there is none."""

    first: bytes | None = None
    last: bytes | None = None


def size_of_same_aspect(image: ImageFacts, *, area: int, multiple: int) -> tuple[int, int]:
    """The largest (width, height) in multiples of `multiple` with the aspect of `image` and at most `area` pixels.

    Each side is rounded down by itself, as the published examples do, in integers so that no rounding error costs a
    whole multiple. At least one multiple each, so that a very long image may come out larger than `area`.
    """
    width = math.isqrt(area * image.width // image.height)
    height = math.isqrt(area * image.height // image.width)
    return max(multiple, width // multiple * multiple), max(multiple, height // multiple * multiple)
