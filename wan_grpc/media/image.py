"""Input images: the bytes that a caller sends become pixels of a known size.

Knows PNG, JPEG and WebP. Does not know what a picture is for.
"""

import hashlib
import io
from dataclasses import dataclass

from PIL import Image, ImageOps

from wan_grpc.domain.errors import InvalidRequestError, Violation
from wan_grpc.domain.images import ImageFacts, ImageFit

READ_FORMATS = ("PNG", "JPEG", "WEBP")


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """One upright RGB picture of 8 bits a channel."""

    facts: ImageFacts
    pixels: Image.Image

    def fitted(self, width: int, height: int, fit: ImageFit) -> bytes:
        """RGB24, rows top to bottom: the picture at exactly this size."""
        match fit:
            case ImageFit.COVER:
                scaled = ImageOps.fit(self.pixels, (width, height), Image.Resampling.LANCZOS)
            case ImageFit.CONTAIN:
                scaled = ImageOps.pad(self.pixels, (width, height), Image.Resampling.LANCZOS)
            case ImageFit.STRETCH | ImageFit.EXACT:
                scaled = self.pixels.resize((width, height), Image.Resampling.LANCZOS)
        return scaled.tobytes()


def read_picture(data: bytes, *, field: str, max_bytes: int, max_pixels: int) -> Picture:
    """Decode one picture.

    Raises:
        InvalidRequestError: naming `field` and what is wrong with the picture.
    """
    if len(data) > max_bytes:
        raise _refusal(field, f"{len(data)} bytes; at most {max_bytes}", "TOO_LARGE")
    try:
        image = Image.open(io.BytesIO(data), formats=READ_FORMATS)
        if image.width * image.height > max_pixels:
            sentence = f"{image.width} x {image.height} = {image.width * image.height} pixels; at most {max_pixels}"
            raise _refusal(field, sentence, "TOO_LARGE")
        upright = ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, SyntaxError, ValueError) as error:
        raise _refusal(field, f"cannot be read: {error}", "NOT_AN_IMAGE") from error
    facts = ImageFacts(width=upright.width, height=upright.height, sha256=hashlib.sha256(data).hexdigest())
    return Picture(facts=facts, pixels=upright)


def _refusal(field: str, description: str, reason: str) -> InvalidRequestError:
    return InvalidRequestError((Violation(field=field, description=description, reason=reason),))
