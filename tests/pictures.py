"""Picture files of every kind that callers send, made on the spot for tests of input images and as seeds of fuzzers."""

import io
import struct
import zlib
from base64 import b64decode
from collections.abc import Iterable, Sequence
from typing import Any

from PIL import Image

LEFT, RIGHT = (200, 30, 40), (20, 60, 220)
"""Colours of the halves of `two_colours`."""
ARITHMETIC_JPEG = b64decode(
    "/9j/4AAQSkZJRgABAQAAAQABAAD/2wBDAAMCAgMCAgMDAwMEAwMEBQgFBQQEBQoHBwYIDAoMDAsKCwsNDhIQDQ4RDgsLEBYQERMUFRUVDA8XGB"
    "YUGBIUFRT/2wBDAQMEBAUEBQkFBQkUDQsNFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBT/yQARCAAI"
    "ABADASIAAhEBAxEB/8wACgAQEAUBEBEF/9oADAMBAAIRAxEAPwD/AMkWnm2SvKsROx+anX7KEF5o2IvWTGD/2Q=="
)
"""`two_colours()` by `cjpeg -arithmetic -quality 90`: Pillow writes no such file."""
PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
GREY, RGB, PALETTE, GREY_ALPHA, RGB_ALPHA = 0, 2, 3, 4, 6
"""Colour types of PNG."""


def two_colours(width: int = 16, height: int = 8) -> Image.Image:
    """The left half in one colour and the right half in another."""
    image = Image.new("RGB", (width, height), LEFT)
    image.paste(RIGHT, (width // 2, 0, width, height))
    return image


def saved(image: Image.Image, file_format: str, **options: Any) -> bytes:
    """`image` as a file, by Pillow."""
    target = io.BytesIO()
    image.save(target, file_format, **options)
    return target.getvalue()


def jpeg(image: Image.Image | None = None, **options: Any) -> bytes:
    """A JPEG that keeps colours to within a few levels."""
    return saved(two_colours() if image is None else image, "JPEG", quality=95, subsampling=0, **options)


def exif(orientation: int, order: str = "<") -> bytes:
    """EXIF data that says nothing but an orientation."""
    magic = {"<": b"II*\0", ">": b"MM\0*"}[order]
    return magic + struct.pack(f"{order}IHHHIHHI", 8, 1, 0x0112, 3, 1, orientation, 0, 0)


# ---- PNG ------------------------------------------------------------------------------------------------------------


def chunk(kind: bytes, body: bytes) -> bytes:
    """One part of a PNG."""
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(
    rows: Sequence[Sequence[int]],
    *,
    bits: int,
    colour: int,
    width: int,
    before: Iterable[bytes] = (),
    after: Iterable[bytes] = (),
    claimed: tuple[int, int] | None = None,
) -> bytes:
    """A PNG of these samples, row by row.

    before, after: further chunks on either side of the pixels. claimed: the size that the header tells instead.
    """
    pixels = b"".join(b"\0" + _packed(row, bits) for row in rows)
    size = (width, len(rows)) if claimed is None else claimed
    header = struct.pack(">IIBBBBB", *size, bits, colour, 0, 0, 0)
    return b"".join(
        (
            PNG_MAGIC,
            chunk(b"IHDR", header),
            *before,
            chunk(b"IDAT", zlib.compress(pixels)),
            *after,
            chunk(b"IEND", b""),
        )
    )


def _packed(samples: Sequence[int], bits: int) -> bytes:
    if bits == 16:
        return struct.pack(f">{len(samples)}H", *samples)
    together = "".join(f"{sample:0{bits}b}" for sample in samples)
    together += "0" * (-len(together) % 8)
    return bytes(int(together[index : index + 8], 2) for index in range(0, len(together), 8))


def with_right_checksums(file: bytes) -> bytes:
    """`file` with every checksum made right, as far as it is a PNG, so that what else is wrong is looked at."""
    data = bytearray(file)
    position = len(PNG_MAGIC) if file.startswith(PNG_MAGIC) else len(file)
    while position + 12 <= len(file):
        end = position + 8 + struct.unpack_from(">I", file, position)[0]
        if end + 4 > len(file):
            break
        struct.pack_into(">I", data, end, zlib.crc32(file[position + 4 : end]))
        position = end + 4
    return bytes(data)


# ---- JPEG -----------------------------------------------------------------------------------------------------------


def segment(marker: int, body: bytes) -> bytes:
    """One part of a JPEG."""
    return struct.pack(">BBH", 0xFF, marker, len(body) + 2) + body


def with_segment(file: bytes, marker: int, body: bytes) -> bytes:
    """`file` with one more part behind its first marker."""
    return file[:2] + segment(marker, body) + file[2:]


def without_segment(file: bytes, marker: int) -> bytes:
    """`file` without its first part of this kind, which must stand before the picture."""
    start = file.index(bytes((0xFF, marker)))
    return file[:start] + file[start + 2 + struct.unpack_from(">H", file, start + 2)[0] :]


def cmyk_jpeg(ink: tuple[int, int, int, int], size: tuple[int, int] = (16, 8)) -> bytes:
    """One colour, stored as Adobe does: 255 is no ink, and a marker says so."""
    return jpeg(Image.new("CMYK", size, ink))


def plain_cmyk_jpeg(ink: tuple[int, int, int, int], size: tuple[int, int] = (16, 8)) -> bytes:
    """One colour, stored without Adobe's marker: 0 is no ink."""
    inverted = tuple(255 - value for value in ink)
    return without_segment(cmyk_jpeg((inverted[0], inverted[1], inverted[2], inverted[3]), size), 0xEE)


def ycck_jpeg(ink: tuple[int, int, int, int], size: tuple[int, int] = (16, 8)) -> bytes:
    """One colour, stored as Photoshop does: CMY as luma and chroma, K beside it, all inverted."""
    # Decoders turn YCC into RGB, take its inverse for what is stored as CMY, and Adobe's is inverted once more. Pillow
    # stores the inverse of what it is given.
    luma = Image.new("RGB", (1, 1), ink[:3]).convert("YCbCr").getpixel((0, 0))
    assert isinstance(luma, tuple)
    stored = (*luma, 255 - ink[3])
    plain = cmyk_jpeg((255 - stored[0], 255 - stored[1], 255 - stored[2], 255 - stored[3]), size)
    transform = plain.index(b"Adobe") + 11
    return plain[:transform] + b"\2" + plain[transform + 1 :]


def mpo() -> bytes:
    """What phones write: a JPEG with a second one behind it, and an index of both."""
    return saved(two_colours(), "MPO", save_all=True, append_images=[Image.new("RGB", (16, 8), "green")], quality=95)


# ---- WebP -----------------------------------------------------------------------------------------------------------


def webp_chunk(kind: bytes, body: bytes) -> bytes:
    """One part of a WebP."""
    return kind + struct.pack("<I", len(body)) + body + b"\0" * (len(body) % 2)


def webp(*chunks: bytes) -> bytes:
    """A WebP of these parts."""
    return webp_chunk(b"RIFF", b"WEBP" + b"".join(chunks))


# ---- all ------------------------------------------------------------------------------------------------------------


def every_kind() -> dict[str, bytes]:
    """A small file of each kind that is read, by name."""
    clear = two_colours().convert("RGBA")
    clear.putalpha(Image.linear_gradient("L").resize((16, 8)))
    palette = chunk(b"PLTE", bytes((*LEFT, *RIGHT)))
    ramp = [list(range(0, 65536, 4096))] * 8
    return {
        "png-1": png([[0, 1] * 8] * 8, bits=1, colour=GREY, width=16),
        "png-2": png([[0, 1, 2, 3] * 4] * 8, bits=2, colour=GREY, width=16, before=[chunk(b"tRNS", b"\0\1")]),
        "png-4": png([list(range(16))] * 8, bits=4, colour=GREY, width=16),
        "png-grey": saved(two_colours().convert("L"), "PNG"),
        "png-grey-16": png(ramp, bits=16, colour=GREY, width=16, before=[chunk(b"tRNS", b"\x10\0")]),
        "png-grey-alpha": saved(clear.convert("LA"), "PNG"),
        "png-grey-alpha-16": png([ramp[0] * 2] * 8, bits=16, colour=GREY_ALPHA, width=16),
        "png-rgb": saved(two_colours(), "PNG", exif=exif(6)),
        "png-rgb-16": png([ramp[0] * 3] * 8, bits=16, colour=RGB, width=16, before=[chunk(b"tRNS", bytes(6))]),
        "png-rgba": saved(clear, "PNG"),
        "png-rgba-16": png([ramp[0] * 4] * 8, bits=16, colour=RGB_ALPHA, width=16),
        "png-palette": png(
            [[0] * 8 + [1] * 8] * 8,
            bits=8,
            colour=PALETTE,
            width=16,
            before=[palette, chunk(b"tRNS", b"\x80")],
            after=[chunk(b"tEXt", b"Comment\0a cat")],
        ),
        "png-palette-1": png([[0] * 8 + [1] * 8] * 8, bits=1, colour=PALETTE, width=16, before=[palette]),
        "jpeg": jpeg(exif=b"Exif\0\0" + exif(3)),
        "jpeg-420": saved(two_colours(40, 24), "JPEG", quality=50, subsampling=2),
        "jpeg-grey": jpeg(two_colours().convert("L")),
        "jpeg-progressive": jpeg(progressive=True),
        "jpeg-restarts": jpeg(two_colours(40, 24), restart_marker_blocks=1),
        "jpeg-arithmetic": ARITHMETIC_JPEG,
        "jpeg-cmyk": cmyk_jpeg((255, 0, 0, 0)),
        "jpeg-cmyk-plain": plain_cmyk_jpeg((255, 0, 0, 0)),
        "jpeg-ycck": ycck_jpeg((255, 0, 0, 0)),
        "jpeg-mpo": mpo(),
        "webp": saved(two_colours(), "WEBP"),
        "webp-alpha": saved(clear, "WEBP", exif=exif(8, ">")),
        "webp-lossless": saved(two_colours(), "WEBP", lossless=True),
        "webp-lossless-alpha": saved(clear, "WEBP", lossless=True, icc_profile=b"none"),
    }
