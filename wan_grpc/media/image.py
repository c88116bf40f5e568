"""Input images: the bytes that a caller sends become pixels of a known size.

Knows how Pillow decodes what containers.py lets through. Samples are taken for sRGB whatever an embedded colour profile
or gamma says, as in diffusers' `load_image`, so that one file gives one result. Does not know what a picture is for.
"""

import hashlib
import io
from dataclasses import dataclass
from typing import Final

import numpy as np
from PIL import Image, ImageChops

from wan_grpc.domain.errors import InvalidRequestError, Violation
from wan_grpc.domain.images import ImageFacts, ImageFit
from wan_grpc.media.containers import PictureError, Still, read_still

Image.MAX_IMAGE_PIXELS = None  # our own bound stands before the decoder; Pillow's would also print a warning

_UPRIGHT: Final = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What undoes each EXIF orientation but 1."""
_WHITE: Final = (255, 255, 255)


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """One upright RGB picture of 8 bits a channel."""

    facts: ImageFacts
    pixels: Image.Image

    def fitted(self, width: int, height: int, fit: ImageFit) -> bytes:
        """RGB24, rows top to bottom: the picture at exactly this size."""
        match fit:
            case ImageFit.COVER:
                scaled = self._scaled(width, height, box=_middle(*self.pixels.size, width, height))
            case ImageFit.CONTAIN:
                scaled = self._contained(width, height)
            case ImageFit.STRETCH | ImageFit.EXACT:
                scaled = self._scaled(width, height)
        return scaled.tobytes()

    def _scaled(self, width: int, height: int, box: tuple[float, float, float, float] | None = None) -> Image.Image:
        return self.pixels.resize((width, height), Image.Resampling.LANCZOS, box=box)

    def _contained(self, width: int, height: int) -> Image.Image:
        inner_width, inner_height = _within(*self.pixels.size, width, height)
        frame = Image.new("RGB", (width, height))
        corner = (width - inner_width) // 2, (height - inner_height) // 2
        frame.paste(self._scaled(inner_width, inner_height), corner)
        return frame


def read_picture(data: bytes, *, field: str, max_bytes: int, max_pixels: int) -> Picture:
    """Decode one PNG, JPEG or WebP picture, whatever its file is called, once its bytes and pixels are known to be few.

    Transparent parts are laid over white, 16 bits are scaled to 8, CMYK becomes RGB, the rotation of EXIF is applied.

    Raises:
        InvalidRequestError: naming `field` and what is wrong with the picture: TOO_LARGE, NOT_AN_IMAGE, NOT_SERVED (a
            format that is not read), ANIMATED, TRUNCATED or BROKEN.
    """
    if len(data) > max_bytes:
        raise _refusal(field, f"{len(data)} bytes; at most {max_bytes}", "TOO_LARGE")
    try:
        still = read_still(data)
        if still.width * still.height > max_pixels:
            sentence = f"{still.width} x {still.height} = {still.width * still.height} pixels; at most {max_pixels}"
            raise PictureError("TOO_LARGE", sentence)
        pixels = _upright(_on_white(_decoded(still), still), still.orientation)
    except PictureError as error:
        raise _refusal(field, error.description, error.reason) from error
    facts = ImageFacts(width=pixels.width, height=pixels.height, sha256=hashlib.sha256(data).hexdigest())
    return Picture(facts=facts, pixels=pixels)


def _decoded(still: Still) -> Image.Image:
    """The pixels as they are stored, in the mode that Pillow has for them."""
    try:
        with Image.open(io.BytesIO(still.data), formats=(still.format,)) as file:
            if file.size != (still.width, still.height):
                raise PictureError("BROKEN", f"is a {still.format} that tells two sizes")
            file.load()
            return file.convert("RGBA") if file.mode == "P" else file.copy()
    except OSError as error:
        raise PictureError("BROKEN", f"is a {still.format} whose pixels cannot be decoded") from error


def _on_white(image: Image.Image, still: Still) -> Image.Image:
    """As RGB, transparent parts over white."""
    hole = None if still.transparent is None else _hole(image, still)
    match image.mode:
        case "RGB":
            opaque = image
        case "I;16":
            opaque = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
        case "LA" | "RGBA":
            opaque = Image.new("RGB", image.size, _WHITE)
            opaque.paste(image, mask=image)
        case "CMYK":  # Pillow takes all of them for inverted ones
            opaque = (image if still.is_inverted else ImageChops.invert(image)).convert("RGB")
        case _:
            opaque = image.convert("RGB")
    if hole is not None:
        opaque.paste(_WHITE, mask=hole)
    return opaque


def _hole(image: Image.Image, still: Still) -> Image.Image:
    """Where the pixels have the one value that stands for transparency: white there, black elsewhere."""
    assert still.transparent is not None
    if image.mode == "I;16":
        return Image.fromarray(np.where(np.asarray(image) == still.transparent[0], np.uint8(255), np.uint8(0)))
    channels = image.split() if image.mode == "RGB" else (image.convert("L"),)
    hole = Image.new("L", image.size, 255)
    for channel, value in zip(channels, still.transparent, strict=True):
        # Pillow has spread fewer bits over 0 to 255, and kept the upper half of 16.
        wanted = value >> 8 if still.bits == 16 else value * 255 // (2**still.bits - 1)
        hole = ImageChops.darker(hole, channel.point([255 if level == wanted else 0 for level in range(256)]))
    return hole


def _upright(image: Image.Image, orientation: int) -> Image.Image:
    method = _UPRIGHT.get(orientation)
    return image if method is None else image.transpose(method)


def _middle(width: int, height: int, to_width: int, to_height: int) -> tuple[float, float, float, float]:
    """The largest box in the middle of a picture that has the aspect of another size: left, top, right, bottom."""
    if width * to_height > height * to_width:
        margin = (width - height * to_width / to_height) / 2
        return margin, 0, width - margin, height
    margin = (height - width * to_height / to_width) / 2
    return 0, margin, width, height - margin


def _within(width: int, height: int, to_width: int, to_height: int) -> tuple[int, int]:
    """The largest size of the same aspect that lies within another one, at least one pixel each way."""
    if width * to_height > height * to_width:
        return to_width, max(1, round(height * to_width / width))
    return max(1, round(width * to_height / height)), to_height


def _refusal(field: str, description: str, reason: str) -> InvalidRequestError:
    return InvalidRequestError((Violation(field=field, description=description, reason=reason),))
