import hashlib
import random
import struct
import warnings
import zlib
from collections.abc import Callable

import numpy as np
import pytest
from diffusers.video_processor import VideoProcessor
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from tests import pictures
from tests.pictures import GREY, GREY_ALPHA, LEFT, PALETTE, RGB, RGB_ALPHA, RIGHT, chunk, exif, png, two_colours
from wan_grpc.domain.errors import InvalidRequestError, Violation
from wan_grpc.domain.images import ImageFacts, ImageFit
from wan_grpc.media.containers import MAX_JPEG_SCANS, MAX_PARTS, MAX_SIDE, read_still
from wan_grpc.media.image import Picture, read_picture

MAX_BYTES, MAX_PIXELS = 100_000, 4096
KINDS = pictures.every_kind()
WHITE, BLACK = (255, 255, 255), (0, 0, 0)


def read(data: bytes, *, max_bytes: int = MAX_BYTES, max_pixels: int = MAX_PIXELS) -> Picture:
    return read_picture(data, field="spec.image", max_bytes=max_bytes, max_pixels=max_pixels)


def refusal(data: bytes, **bounds: int) -> Violation:
    """The one thing that is wrong with `data`."""
    with pytest.raises(InvalidRequestError) as caught:
        read(data, **bounds)
    (violation,) = caught.value.violations
    assert violation.field == "spec.image"
    return violation


def colours(data: bytes) -> list[tuple[int, ...]]:
    """What stands at the left and at the right end."""
    pixels = read(data).pixels
    assert pixels.mode == "RGB"
    return [tuple(np.asarray(pixels)[0, column].tolist()) for column in (0, -1)]


# ---- colours --------------------------------------------------------------------------------------------------------

TRUE_COLOURS: list[tuple[str, bytes, list[tuple[int, int, int]]]] = [
    ("1 bit", png([[0, 1]], bits=1, colour=GREY, width=2), [BLACK, WHITE]),
    ("2 bits", png([[1, 2]], bits=2, colour=GREY, width=2), [(85, 85, 85), (170, 170, 170)]),
    ("4 bits", png([[1, 14]], bits=4, colour=GREY, width=2), [(17, 17, 17), (238, 238, 238)]),
    ("grey", png([[7, 200]], bits=8, colour=GREY, width=2), [(7, 7, 7), (200, 200, 200)]),
    ("grey of 16 bits", png([[0x1234, 0xFE00]], bits=16, colour=GREY, width=2), [(0x12,) * 3, (0xFE,) * 3]),
    ("RGB", png([[*LEFT, *RIGHT]], bits=8, colour=RGB, width=2), [LEFT, RIGHT]),
    (
        "RGB of 16 bits",
        png([[0x12FF, 0x8000, 0xFFFF, 0, 0x00FF, 0x0100]], bits=16, colour=RGB, width=2),
        [(0x12, 0x80, 0xFF), (0, 0, 1)],
    ),
    (
        "palette of 1 bit",
        png([[0, 1]], bits=1, colour=PALETTE, width=2, before=[chunk(b"PLTE", bytes((*LEFT, *RIGHT)))]),
        [LEFT, RIGHT],
    ),
    (
        "palette with half-transparent and transparent colours",
        png(
            [[0, 1]],
            bits=8,
            colour=PALETTE,
            width=2,
            before=[chunk(b"PLTE", bytes((200, 0, 100, *RIGHT))), chunk(b"tRNS", bytes((51, 0)))],
        ),
        [(244, 204, 224), WHITE],
    ),
    (
        "palette with one transparent colour",
        png(
            [[0, 1]],
            bits=4,
            colour=PALETTE,
            width=2,
            before=[chunk(b"PLTE", bytes((*LEFT, *RIGHT))), chunk(b"tRNS", b"\0")],
        ),
        [WHITE, RIGHT],
    ),
    ("grey with alpha", png([[100, 51, 7, 0]], bits=8, colour=GREY_ALPHA, width=2), [(224, 224, 224), WHITE]),
    (
        "grey with alpha, of 16 bits",
        png([[100 * 257, 51 * 257, 7, 0xFFFF]], bits=16, colour=GREY_ALPHA, width=2),
        [(224, 224, 224), BLACK],
    ),
    (
        "RGB with alpha",
        png([[200, 0, 100, 51, 1, 2, 3, 0]], bits=8, colour=RGB_ALPHA, width=2),
        [(244, 204, 224), WHITE],
    ),
    (
        "RGB with alpha, of 16 bits",
        png([[200 * 257, 0, 100 * 257, 51 * 257, 257, 514, 771, 0xFFFF]], bits=16, colour=RGB_ALPHA, width=2),
        [(244, 204, 224), (1, 2, 3)],
    ),
    # One value of grey or RGB stands for transparency, counted in the samples of the file.
    (
        "a transparent grey of 1 bit",
        png([[0, 1]], bits=1, colour=GREY, width=2, before=[chunk(b"tRNS", b"\0\0")]),
        [WHITE, WHITE],
    ),
    (
        "a transparent grey of 2 bits",
        png([[1, 2]], bits=2, colour=GREY, width=2, before=[chunk(b"tRNS", b"\0\2")]),
        [(85, 85, 85), WHITE],
    ),
    (
        "a transparent grey of 8 bits",
        png([[1, 2]], bits=8, colour=GREY, width=2, before=[chunk(b"tRNS", b"\0\1")]),
        [WHITE, (2, 2, 2)],
    ),
    (
        "a transparent grey of 16 bits",
        png([[0x1234, 0x1233]], bits=16, colour=GREY, width=2, before=[chunk(b"tRNS", b"\x12\x34")]),
        [WHITE, (0x12,) * 3],
    ),
    (
        "a transparent colour",
        png(
            [[*LEFT, LEFT[0], LEFT[1], 41]],
            bits=8,
            colour=RGB,
            width=2,
            before=[chunk(b"tRNS", bytes((0, 200, 0, 30, 0, 40)))],
        ),
        [WHITE, (200, 30, 41)],
    ),
    (
        "a transparent colour of 16 bits",
        png([[0x1234] * 3 + [0x1334] * 3], bits=16, colour=RGB, width=2, before=[chunk(b"tRNS", b"\x12\x34" * 3)]),
        [WHITE, (0x13,) * 3],
    ),
    ("lossless WebP", KINDS["webp-lossless"], [LEFT, RIGHT]),
    (
        "lossless WebP with alpha",
        pictures.saved(Image.new("RGBA", (2, 1), (200, 0, 100, 51)), "WEBP", lossless=True),
        [(244, 204, 224)] * 2,
    ),
]


@pytest.mark.parametrize(("file", "expected"), [pytest.param(*rest, id=name) for name, *rest in TRUE_COLOURS])
def test_colours_of_lossless_files(file: bytes, expected: list[tuple[int, int, int]]) -> None:
    """Every kind of sample becomes the RGB that it means, to the bit; what is transparent shows white."""
    assert colours(file) == expected


INK = (0, 200, 100, 55)
INK_RGB = (200, 43, 122)
LOSSY = {
    "jpeg-grey": pictures.jpeg(Image.new("L", (16, 8), 99)),
    "jpeg-rgb": pictures.jpeg(Image.new("RGB", (16, 8), LEFT)),
    "jpeg-420": pictures.saved(Image.new("RGB", (17, 9), LEFT), "JPEG", quality=95, subsampling=2),
    "jpeg-progressive": pictures.jpeg(Image.new("RGB", (16, 8), LEFT), progressive=True),
    "jpeg-without-transform": pictures.jpeg(Image.new("RGB", (16, 8), LEFT), keep_rgb=True),
    "jpeg-cmyk-of-adobe": pictures.cmyk_jpeg(INK),
    "jpeg-cmyk": pictures.plain_cmyk_jpeg(INK),
    "jpeg-ycck": pictures.ycck_jpeg(INK),
    "webp": pictures.saved(Image.new("RGB", (16, 8), LEFT), "WEBP", quality=95),
    "webp-alpha": pictures.saved(Image.new("RGBA", (16, 8), (200, 0, 100, 51)), "WEBP", quality=95),
}
LOSSY_COLOURS = {"jpeg-grey": (99, 99, 99), "webp-alpha": (244, 204, 224)}


@pytest.mark.parametrize("name", LOSSY)
def test_colours_of_lossy_files(name: str) -> None:
    """The same within the few levels that the file itself has lost; inks become light whichever way they are stored."""
    expected = LOSSY_COLOURS.get(name, INK_RGB if "cmyk" in name or "ycck" in name else LEFT)
    for colour in colours(LOSSY[name]):
        assert colour == pytest.approx(expected, abs=4)


def test_an_arithmetic_jpeg() -> None:
    """The rare coding of JPEG is read like the common one."""
    assert colours(pictures.ARITHMETIC_JPEG) == [pytest.approx(LEFT, abs=4), pytest.approx(RIGHT, abs=4)]


def test_interlaced_png() -> None:
    """A PNG in seven passes gives the same pixels."""
    pixels = bytes(range(64))
    plain = png([pixels[row : row + 8] for row in range(0, 64, 8)], bits=8, colour=GREY, width=8)
    passes = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
    rows = [
        bytes([0]) + bytes(pixels[y * 8 + x] for x in range(left, 8, across))
        for left, top, across, down in passes
        for y in range(top, 8, down)
    ]
    header = struct.pack(">IIBBBBB", 8, 8, 8, GREY, 0, 0, 1)
    interlaced = pictures.PNG_MAGIC + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"".join(rows)))
    assert read(interlaced + chunk(b"IEND", b"")).pixels.tobytes() == read(plain).pixels.tobytes()


def test_a_profile_changes_no_colour() -> None:
    """Samples are taken for sRGB whatever a profile, a gamma or chromaticities say, as diffusers takes them."""
    says_other = [
        chunk(b"gAMA", struct.pack(">I", 100_000)),
        chunk(b"cHRM", struct.pack(">8I", *[30_000] * 8)),
        chunk(b"iCCP", b"P3\0\0" + zlib.compress(b"no profile at all")),
    ]
    assert colours(png([[*LEFT, *RIGHT]], bits=8, colour=RGB, width=2, before=says_other)) == [LEFT, RIGHT]
    plain = KINDS["jpeg-progressive"]
    assert colours(pictures.with_segment(plain, 0xE2, b"ICC_PROFILE\0\1\1none")) == colours(plain)


# ---- which way up ---------------------------------------------------------------------------------------------------

UPRIGHT = Image.fromarray(np.arange(24, dtype=np.uint8).reshape(2, 4, 3) * 10)
STORED: dict[int, Callable[[Image.Image], Image.Image]] = {
    1: lambda image: image,
    2: lambda image: image.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
    3: lambda image: image.rotate(180),
    4: lambda image: image.transpose(Image.Transpose.FLIP_TOP_BOTTOM),
    5: lambda image: image.transpose(Image.Transpose.FLIP_LEFT_RIGHT).rotate(90, expand=True),
    6: lambda image: image.rotate(90, expand=True),
    7: lambda image: image.transpose(Image.Transpose.FLIP_LEFT_RIGHT).rotate(270, expand=True),
    8: lambda image: image.rotate(270, expand=True),
}
"""How a camera stores an upright picture under each orientation (rotate turns to the left)."""


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("orientation", STORED)
def test_every_orientation(orientation: int, order: str) -> None:
    """A picture stored in any of the eight ways is seen upright, in PNG and in WebP, in either byte order."""
    stored = STORED[orientation](UPRIGHT)
    data = exif(orientation, order)
    for file in (
        pictures.saved(stored, "PNG", exif=data),
        pictures.saved(stored, "WEBP", lossless=True, exif=data),
        pictures.saved(stored, "WEBP", lossless=True, exif=b"Exif\0\0" + data),
    ):
        picture = read(file)
        assert (picture.facts.width, picture.facts.height) == (4, 2)
        assert picture.pixels.tobytes() == UPRIGHT.tobytes()


def test_orientation_of_a_jpeg() -> None:
    """A phone's JPEG lying on its side is turned; a PNG may tell so behind its pixels."""
    on_its_side = pictures.jpeg(two_colours().transpose(Image.Transpose.ROTATE_90), exif=b"Exif\0\0" + exif(6))
    assert colours(on_its_side) == [pytest.approx(LEFT, abs=4), pytest.approx(RIGHT, abs=4)]
    late = png([[*LEFT, *RIGHT]], bits=8, colour=RGB, width=2, after=[chunk(b"eXIf", exif(2))])
    assert colours(late) == [RIGHT, LEFT]


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"Exif\0\0",
        b"II*\0",
        b"nonsense",
        exif(0),
        exif(9),
        exif(0xFFFF),
        exif(6)[:12],
        exif(6)[:20],
        exif(6).replace(b"\x08\0\0\0", b"\xff\xff\xff\xff", 1),
        exif(6).replace(b"\1\0\x12\1", b"\xff\xff\x13\1"),
        exif(6).replace(b"\3\0\1\0", b"\7\0\1\0"),
    ],
)
def test_broken_exif_is_ignored(data: bytes) -> None:
    """Orientation data that is cut off, out of range or nonsense leaves the picture as it is stored."""
    file = png([[*LEFT, *RIGHT]], bits=8, colour=RGB, width=2, before=[chunk(b"eXIf", data)])
    assert colours(file) == [LEFT, RIGHT]
    assert colours(pictures.with_segment(pictures.jpeg(), 0xE1, b"Exif\0\0" + data)) == colours(pictures.jpeg())


# ---- what is found out ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_is_read(name: str) -> None:
    """The facts are the size as seen and the checksum of the bytes as received."""
    picture = read(KINDS[name])
    size = {"jpeg-420": (40, 24), "jpeg-restarts": (40, 24), "png-rgb": (8, 16), "webp-alpha": (8, 16)}
    width, height = size.get(name, (16, 8))
    assert picture.facts == ImageFacts(width=width, height=height, sha256=hashlib.sha256(KINDS[name]).hexdigest())
    assert (picture.pixels.mode, picture.pixels.size) == ("RGB", (width, height))


def test_the_first_picture_of_a_phone_file() -> None:
    """Of the pictures that a phone puts into one JPEG the first is taken."""
    assert colours(pictures.mpo()) == [pytest.approx(LEFT, abs=4), pytest.approx(RIGHT, abs=4)]


def test_bytes_behind_the_picture_do_not_matter() -> None:
    """A film or padding that follows the end of a picture is not looked at."""
    for name in ("png-rgba", "jpeg", "webp-lossless"):
        assert read(KINDS[name] + b"\0 trailing bytes").pixels.tobytes() == read(KINDS[name]).pixels.tobytes()


def test_an_animation_of_one_picture_is_a_picture() -> None:
    """A PNG that calls itself an animation of one frame is still."""
    still = png([[*LEFT, *RIGHT]], bits=8, colour=RGB, width=2, before=[chunk(b"acTL", struct.pack(">II", 1, 0))])
    assert colours(still) == [LEFT, RIGHT]


# ---- what is refused ------------------------------------------------------------------------------------------------

NOT_READ = {
    "GIF": pictures.saved(two_colours(), "GIF"),
    "TIFF": pictures.saved(two_colours(), "TIFF"),
    "BMP": pictures.saved(two_colours(), "BMP"),
    "AVIF": pictures.saved(two_colours(), "AVIF"),
    "HEIC": b"\0\0\0\x18ftypheic\0\0\0\0mif1heic",
    "a video": b"\0\0\0\x1cftypisom\0\0\2\0isomiso2mp41",
    "JPEG XL": b"\xff\x0a\x7f\0",
    "JPEG 2000": pictures.saved(two_colours(), "JPEG2000"),
    "ICO": pictures.saved(two_colours(), "ICO"),
    "PSD": b"8BPS\0\1",
    "PDF": b"%PDF-1.7\n",
    "SVG": b'<?xml version="1.0"?>\n<svg xmlns="http://www.w3.org/2000/svg"/>',
}


@pytest.mark.parametrize("name", NOT_READ)
def test_other_formats_are_refused_by_name(name: str) -> None:
    """A caller hears what was sent and what is read."""
    assert refusal(NOT_READ[name]) == Violation(
        field="spec.image", description=f"is {name}; PNG, JPEG and WebP are read", reason="NOT_SERVED"
    )


def grey(**changes: int) -> bytes:
    """A PNG whose header says something unusual."""
    header = {
        "width": 2,
        "height": 1,
        "bits": 8,
        "colour": GREY,
        "compression": 0,
        "filter": 0,
        "interlace": 0,
        **changes,
    }
    parts = chunk(b"IHDR", struct.pack(">IIBBBBB", *header.values())), chunk(b"IDAT", zlib.compress(bytes(3)))
    return pictures.PNG_MAGIC + b"".join(parts) + chunk(b"IEND", b"")


def jpeg_header(*, bits: int = 8, height: int = 8, width: int = 16, components: int = 3, marker: int = 0xC0) -> bytes:
    """A JPEG of these words, without a picture."""
    frame = struct.pack(">BHHB", bits, height, width, components) + bytes((1, 0x11, 0)) * components
    return b"\xff\xd8" + pictures.segment(marker, frame)


HEADER = chunk(b"IHDR", struct.pack(">IIBBBBB", 1, 1, 8, GREY, 0, 0, 0))
PIXELS, END = chunk(b"IDAT", zlib.compress(b"\0\7")), chunk(b"IEND", b"")
ANIMATED = pictures.saved(two_colours(), "PNG", save_all=True, append_images=[Image.new("RGB", (16, 8))])
ANIMATED_WEBP = pictures.saved(two_colours(), "WEBP", save_all=True, append_images=[Image.new("RGB", (16, 8))])
REFUSED: list[tuple[str, bytes, str, str]] = [
    ("no bytes", b"", "is empty", "NOT_AN_IMAGE"),
    ("a text", b"a picture of a cat", "is not a PNG, JPEG or WebP file", "NOT_AN_IMAGE"),
    ("a page", b"<!DOCTYPE html><html></html>", "is not a PNG, JPEG or WebP file", "NOT_AN_IMAGE"),
    ("an address", b"https://example.org/cat.png", "is not a PNG, JPEG or WebP file", "NOT_AN_IMAGE"),
    ("a sound", b"RIFF\4\0\0\0WAVE", "is not a PNG, JPEG or WebP file", "NOT_AN_IMAGE"),
    ("zeros", bytes(64), "is not a PNG, JPEG or WebP file", "NOT_AN_IMAGE"),
    ("an animated PNG", ANIMATED, "is an animated PNG; a still picture is needed", "ANIMATED"),
    ("an animated WebP", ANIMATED_WEBP, "is an animated WebP; a still picture is needed", "ANIMATED"),
    ("a mark of PNG alone", pictures.PNG_MAGIC, "is a PNG that ends too early, after 8 bytes", "TRUNCATED"),
    ("no PNG header", pictures.PNG_MAGIC + END, "is a PNG that does not begin with its header", "BROKEN"),
    ("two headers", pictures.PNG_MAGIC + HEADER * 2 + PIXELS + END, "is a PNG with two headers", "BROKEN"),
    ("a short header", pictures.PNG_MAGIC + chunk(b"IHDR", b"\0"), "is a PNG with a broken header", "BROKEN"),
    ("no pixels", pictures.PNG_MAGIC + HEADER + END, "is a PNG whose pixels cannot be decoded", "BROKEN"),
    ("no end", pictures.PNG_MAGIC + HEADER + PIXELS, "is a PNG that ends too early, after 55 bytes", "TRUNCATED"),
    (
        "a wrong checksum",
        pictures.PNG_MAGIC + HEADER + PIXELS[:-1] + b"\0" + END,
        "is a PNG with a wrong checksum at byte 33",
        "BROKEN",
    ),
    (
        "an unknown critical part",
        pictures.PNG_MAGIC + chunk(b"CgBI", b"P\0 \2") + HEADER + PIXELS + END,
        "is a PNG that does not begin with its header",
        "BROKEN",
    ),
    (
        "another unknown critical part",
        pictures.PNG_MAGIC + HEADER + chunk(b"CgBI", b"P\0 \2") + PIXELS + END,
        "is a PNG of a private kind: its part 'CgBI' is unknown",
        "NOT_SERVED",
    ),
    ("no width", grey(width=0), "is a PNG of 0 x 1 pixels", "BROKEN"),
    ("no height", grey(height=0), "is a PNG of 2 x 0 pixels", "BROKEN"),
    ("3 bits", grey(bits=3), "is a PNG with a broken header: colour type 0 of 3 bits", "BROKEN"),
    ("colour type 5", grey(colour=5), "is a PNG with a broken header: colour type 5 of 8 bits", "BROKEN"),
    ("a compression", grey(compression=1), "is a PNG with a broken header: colour type 0 of 8 bits", "BROKEN"),
    ("a filter", grey(filter=1), "is a PNG with a broken header: colour type 0 of 8 bits", "BROKEN"),
    ("an interlace", grey(interlace=2), "is a PNG with a broken header: colour type 0 of 8 bits", "BROKEN"),
    ("no palette", grey(colour=PALETTE), "is a PNG without a palette of 1 to 256 colours", "BROKEN"),
    (
        "too large a palette",
        png([[0, 1]], bits=8, colour=PALETTE, width=2, before=[chunk(b"PLTE", bytes(771))]),
        "is a PNG without a palette of 1 to 256 colours",
        "BROKEN",
    ),
    (
        "pixels that are no zlib stream",
        pictures.PNG_MAGIC + HEADER + chunk(b"IDAT", b"no zlib") + END,
        "is a PNG whose pixels cannot be decoded",
        "BROKEN",
    ),
    ("a mark of JPEG alone", b"\xff\xd8\xff", "is a JPEG that ends too early, after 3 bytes", "TRUNCATED"),
    ("a JPEG of nothing", b"\xff\xd8\xff\xd9", "is a JPEG without a picture", "BROKEN"),
    (
        "a JPEG of 12 bits",
        jpeg_header(bits=12),
        "is a JPEG of 3 components of 12 bits; 1, 3 or 4 of 8 bits are read",
        "NOT_SERVED",
    ),
    (
        "a JPEG of 2 components",
        jpeg_header(components=2),
        "is a JPEG of 2 components of 8 bits; 1, 3 or 4 of 8 bits are read",
        "NOT_SERVED",
    ),
    ("a lossless JPEG", jpeg_header(marker=0xC3), "is a JPEG of the rare kind SOF3, which is not read", "NOT_SERVED"),
    ("a JPEG of no height", jpeg_header(height=0), "is a JPEG of 16 x 0 pixels", "BROKEN"),
    ("a short frame", b"\xff\xd8" + pictures.segment(0xC0, b"\x08"), "is a JPEG with a broken header", "BROKEN"),
    ("two frames", jpeg_header() + jpeg_header()[2:], "is a JPEG with a broken header", "BROKEN"),
    (
        "a scan before the frame",
        b"\xff\xd8" + pictures.segment(0xDA, bytes(10)),
        "is a JPEG with a picture before its header",
        "BROKEN",
    ),
    ("a segment of no length", b"\xff\xd8\xff\xe0\0\1", "is a JPEG with a broken segment at byte 2", "BROKEN"),
    (
        "a JPEG without tables",
        jpeg_header() + pictures.segment(0xDA, bytes((3, 1, 0, 1, 0, 1, 0, 0, 63, 0))) + b"\0\xff\xd9",
        "is a JPEG whose pixels cannot be decoded",
        "BROKEN",
    ),
    ("a WebP of nothing", pictures.webp(), "is a WebP without a picture of the size that it tells", "BROKEN"),
    (
        "a WebP that tells two sizes",
        pictures.webp(pictures.webp_chunk(b"VP8X", bytes((0, 0, 0, 0, 63, 0, 0, 63, 0, 0))), KINDS["webp"][12:]),
        "is a WebP without a picture of the size that it tells",
        "BROKEN",
    ),
    (
        "a broken VP8 header",
        pictures.webp(pictures.webp_chunk(b"VP8 ", bytes(16))),
        "is a WebP with a broken header",
        "BROKEN",
    ),
    (
        "a broken VP8L header",
        pictures.webp(pictures.webp_chunk(b"VP8L", b"")),
        "is a WebP with a broken header",
        "BROKEN",
    ),
    (
        "a VP8 of no width",
        pictures.webp(pictures.webp_chunk(b"VP8 ", b"\0\0\0\x9d\x01\x2a\0\0\1\0")),
        "is a WebP of 0 x 1 pixels",
        "BROKEN",
    ),
    (
        "a VP8L of no pixels",
        pictures.webp(pictures.webp_chunk(b"VP8L", b"\x2f\x0f\xc0\1\0")),
        "is a WebP whose pixels cannot be decoded",
        "BROKEN",
    ),
]


@pytest.mark.parametrize(("file", "description", "reason"), [pytest.param(*rest, id=name) for name, *rest in REFUSED])
def test_what_is_refused(file: bytes, description: str, reason: str) -> None:
    """What is wrong with a file is said in a sentence, which tells nothing of the server's insides."""
    assert refusal(file) == Violation(field="spec.image", description=description, reason=reason)


def test_bounds_of_bytes_and_pixels() -> None:
    """At its bounds a picture is read, one byte or pixel above it is refused by the numbers."""
    file = KINDS["png-rgba"]
    assert read(file, max_bytes=len(file), max_pixels=128).facts.width == 16
    assert refusal(file, max_bytes=len(file) - 1) == Violation(
        field="spec.image", description=f"{len(file)} bytes; at most {len(file) - 1}", reason="TOO_LARGE"
    )
    assert refusal(file, max_pixels=127) == Violation(
        field="spec.image", description="16 x 8 = 128 pixels; at most 127", reason="TOO_LARGE"
    )


LARGE = {
    "PNG": png([[0, 1]], bits=8, colour=GREY, width=2, claimed=(50_000, 40_000)),
    "JPEG": jpeg_header(width=50_000, height=40_000) + pictures.segment(0xDA, bytes(10)) + b"\xff\xd9",
    "WebP": pictures.webp(pictures.webp_chunk(b"VP8L", b"\x2f" + struct.pack("<I", 16382 << 14 | 16382) + bytes(8))),
    "WebP with a canvas": pictures.webp(
        pictures.webp_chunk(b"VP8X", b"\x10\0\0\0\xfe\x3f\0\xfe\x3f\0"),
        pictures.webp_chunk(b"VP8L", b"\x2f" + struct.pack("<I", 16382 << 14 | 16382) + bytes(8)),
    ),
}


@pytest.mark.parametrize("name", LARGE)
def test_pixels_are_counted_before_they_are_decoded(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A small file that unfolds to gigabytes is refused by its header: no decoder is ever asked."""
    monkeypatch.delattr(Image, "open")
    width, height = (16383, 16383) if name.startswith("WebP") else (50_000, 40_000)
    sentence = f"{width} x {height} = {width * height} pixels; at most {2**25}"
    violation = refusal(LARGE[name], max_pixels=2**25)
    assert violation == Violation(field="spec.image", description=sentence, reason="TOO_LARGE")


def test_a_row_has_a_bound_of_its_own() -> None:
    """Few pixels in an endless row are refused too: decoders count the bits of a row in 31 bits."""
    assert read(png([[0] * 4096], bits=1, colour=GREY, width=4096)).facts.width == 4096
    assert refusal(png([[0]], bits=16, colour=GREY, width=1, claimed=(MAX_SIDE + 1, 1)), max_pixels=2**25) == Violation(
        field="spec.image", description="is a PNG of 65536 x 1 pixels; at most 65535 a side", reason="TOO_LARGE"
    )


def test_scans_and_parts_have_a_bound() -> None:
    """Ten bytes that cost a pass over the picture, or a step of a loop, cannot be repeated without end."""
    plain = KINDS["jpeg-progressive"]
    scan = pictures.segment(0xDA, bytes((1, 1, 0, 1, 63, 0x10)))
    num_scans = plain.count(b"\xff\xda")
    most = plain[:-2] + scan * (MAX_JPEG_SCANS - num_scans) + plain[-2:]
    assert colours(most) == colours(plain)
    assert refusal(most[:-2] + scan + b"\xff\xd9").reason == "TOO_LARGE"
    for file in (
        pictures.PNG_MAGIC + HEADER + chunk(b"teSt", b"") * MAX_PARTS,
        b"\xff\xd8" + b"\xff\xd0" * MAX_PARTS + b"\xff\xd0",
        pictures.webp(pictures.webp_chunk(b"teSt", b"") * (MAX_PARTS + 1)),
    ):
        assert refusal(file, max_bytes=2**24).reason == "TOO_LARGE"


@pytest.mark.parametrize(("width", "height", "most"), [(2048, 1024, 100), (2048, 4096, 64), (8192, 4096, 16)])
def test_large_pictures_have_fewer_scans(width: int, height: int, most: int) -> None:
    """What scans cost together is bounded, and so is how long two callers can keep others from the decoder."""
    plain = bytearray(KINDS["jpeg-progressive"])
    at = plain.index(b"\xff\xc2") + 5
    plain[at : at + 4] = height.to_bytes(2) + width.to_bytes(2)
    scan = pictures.segment(0xDA, bytes((1, 1, 0, 1, 63, 0x10)))
    allowed = bytes(plain[:-2] + scan * (most - plain.count(b"\xff\xda")))
    assert read_still(allowed + b"\xff\xd9").width == width
    sentence = f"is a JPEG of {width} x {height} pixels with more than {most} scans"
    expected = Violation(field="spec.image", description=sentence, reason="TOO_LARGE")
    assert refusal(allowed + scan + b"\xff\xd9") == expected


def test_what_pixels_do_not_need_never_reaches_a_decoder() -> None:
    """Texts that unfold without bound, profiles, thumbnails and EXIF data are left out of what is decoded."""
    bomb = zlib.compress(bytes(2**22))
    texts = [
        chunk(b"zTXt", b"Comment\0\0" + bomb),
        chunk(b"iTXt", b"Comment\0\1\0\0\0" + bomb),
        chunk(b"iCCP", b"P3\0\0" + bomb),
        chunk(b"eXIf", exif(1)),
    ]
    plain = png([[*LEFT, *RIGHT]], bits=8, colour=RGB, width=2)
    assert read_still(png([[*LEFT, *RIGHT]], bits=8, colour=RGB, width=2, before=texts, after=texts)).data == plain
    file = KINDS["jpeg-progressive"]
    for marker, body in (
        (0xE1, b"Exif\0\0" + exif(1)),
        (0xE2, b"MPF\0" + bytes(80)),
        (0xED, b"Photoshop"),
        (0xFE, b"cat"),
    ):
        assert read_still(pictures.with_segment(file, marker, body)).data == file
    profile = pictures.saved(two_colours(), "WEBP", lossless=True, icc_profile=bytes(999), exif=exif(1), xmp=b"<x/>")
    assert len(read_still(profile).data) < len(KINDS["webp-lossless"]) + 20


@pytest.mark.parametrize("name", ["png-palette", "jpeg-cmyk", "jpeg-progressive", "webp", "webp-lossless-alpha"])
def test_a_file_that_was_cut_off(name: str) -> None:
    """Whatever byte an upload ends at, the file is refused as cut off, or as no image while it tells nothing yet."""
    whole = KINDS[name]
    reasons = [refusal(whole[:length]).reason for length in range(len(whole))]
    magic = {"png": 8, "jpe": 3, "web": 12}[name[:3]]
    assert set(reasons[:magic]) == {"NOT_AN_IMAGE"}
    assert set(reasons[magic:]) == {"TRUNCATED"}


# ---- mutated files --------------------------------------------------------------------------------------------------

REASONS = {"TOO_LARGE", "NOT_AN_IMAGE", "NOT_SERVED", "ANIMATED", "TRUNCATED", "BROKEN"}


def mutated(file: bytes, chance: random.Random) -> bytes:
    """`file` with a few bytes changed, lost, doubled or moved; the checksums of a PNG are made right again."""
    data = bytearray(file)
    for _ in range(chance.choice((1, 1, 2, 8))):
        position, length = chance.randrange(len(data)), chance.randrange(1, 9)
        match chance.randrange(4):
            case 0:
                data[position] = chance.choice((0, 1, 127, 128, 255, chance.randrange(256)))
            case 1:
                data[position] ^= 1 << chance.randrange(8)
            case 2:
                del data[position : position + length]
            case 3:
                data[position:position] = data[position : position + length]
        data = data or bytearray(b"\0")
    return pictures.with_right_checksums(bytes(data))


@pytest.mark.parametrize("name", KINDS)
def test_mutated_files_are_read_or_refused(name: str) -> None:
    """Of a file of each kind, damaged in 60 ways, comes a picture or a refusal with a known reason, and no warning."""
    chance = random.Random(name)
    outcomes = set()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(60):
            try:
                picture = read(mutated(KINDS[name], chance))
            except InvalidRequestError as error:
                outcomes.add(error.violations[0].reason)
            else:
                assert picture.pixels.mode == "RGB"
                assert picture.facts.width * picture.facts.height <= MAX_PIXELS
                outcomes.add("read")
    assert "read" in outcomes
    assert len(outcomes) > 1
    assert outcomes <= REASONS | {"read"}


# ---- sizes ----------------------------------------------------------------------------------------------------------


def picture_of(pixels: np.ndarray) -> Picture:
    image = Image.fromarray(pixels.astype(np.uint8))
    return Picture(facts=ImageFacts(width=image.width, height=image.height, sha256=""), pixels=image)


def fitted(pixels: np.ndarray, width: int, height: int, fit: ImageFit) -> np.ndarray:
    data = picture_of(pixels).fitted(width, height, fit)
    return np.frombuffer(data, dtype=np.uint8).reshape(height, width, 3)


def stripes(colours_of_stripes: list[int], *, across: int, height: int) -> np.ndarray:
    """[height, stripes * across, 3]: grey stripes side by side."""
    return np.repeat(np.repeat(np.array(colours_of_stripes)[None, :, None], across, 1), height, 0).repeat(3, 2)


def test_cover_cuts_off_evenly() -> None:
    """Of four stripes the middle two are left in a frame half as wide, lying or standing, at any scale."""
    four = stripes([10, 90, 170, 250], across=16, height=32)
    middle = stripes([90, 170], across=16, height=32)
    assert (fitted(four, 32, 32, ImageFit.COVER) == middle).all()
    assert (fitted(four.transpose(1, 0, 2), 32, 32, ImageFit.COVER) == middle.transpose(1, 0, 2)).all()
    smaller = fitted(four, 16, 16, ImageFit.COVER)
    assert (smaller[:, [3, 4, 11, 12]] == [[90], [90], [170], [170]]).all()  # away from the edges, which ring


def test_contain_pads_evenly_with_black() -> None:
    """What is missing on two sides is black, as wide on one side as on the other, within a pixel where it is odd."""
    white = np.full((16, 32, 3), 255)
    assert (fitted(white, 32, 48, ImageFit.CONTAIN)[:, 0, 0] == [0] * 16 + [255] * 16 + [0] * 16).all()
    assert (
        fitted(white.transpose(1, 0, 2), 48, 32, ImageFit.CONTAIN)[0, :, 0] == [0] * 16 + [255] * 16 + [0] * 16
    ).all()
    assert (fitted(white, 32, 19, ImageFit.CONTAIN)[:, 0, 0] == [0] + [255] * 16 + [0] * 2).all()


@pytest.mark.parametrize("fit", [ImageFit.STRETCH, ImageFit.EXACT])
@pytest.mark.parametrize(("width", "height"), [(48, 32), (32, 48), (37, 23), (160, 96)])
def test_stretch_is_what_diffusers_does(fit: ImageFit, width: int, height: int) -> None:
    """An image scaled by itself in each direction is that of the reference pipelines to the bit."""
    pixels = np.random.default_rng(0).integers(0, 256, (45, 61, 3))
    reference = VideoProcessor(vae_scale_factor=1).preprocess(picture_of(pixels).pixels, height=height, width=width)
    ours = fitted(pixels, width, height, fit)
    assert (ours == ((reference[0].permute(1, 2, 0).numpy() + 1) * 127.5).round()).all()


@pytest.mark.parametrize("fit", ImageFit)
def test_an_image_of_the_right_size_is_left_alone(fit: ImageFit) -> None:
    """No fit changes a pixel of an image that has the size of the video."""
    pixels = np.random.default_rng(1).integers(0, 256, (32, 48, 3))
    assert (fitted(pixels, 48, 32, fit) == pixels).all()


@settings(deadline=None)
@given(st.integers(1, 70), st.integers(1, 70), st.integers(1, 70), st.integers(1, 70), st.sampled_from(ImageFit))
@example(4096, 1, 16, 16, ImageFit.CONTAIN)
@example(1, 4096, 16, 16, ImageFit.COVER)
def test_any_image_fits_any_frame(width: int, height: int, to_width: int, to_height: int, fit: ImageFit) -> None:
    """The frame has exactly the size asked for; white stays white, but for black beside a contained one."""
    white = fitted(np.full((height, width, 3), 255), to_width, to_height, fit)
    assert white.shape == (to_height, to_width, 3)
    assert white.any()
    if fit is not ImageFit.CONTAIN:
        assert (white == 255).all()
