"""What a PNG, JPEG or WebP file says of itself, found without decoding a pixel, and the file cut down to its pixels.

Text, profiles, thumbnails, EXIF data and further pictures never reach a decoder, so that what a hostile file hides
there costs nothing. Does not know how pixels are decoded; image.py does.
"""

import re
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

MAX_JPEG_SCANS: Final = 100
"""A scan of ten bytes costs a pass over the whole picture; real encoders write about ten of them."""
MIN_JPEG_SCANS: Final = 16
"""What a picture of any size may have."""
MAX_JPEG_SCANNED: Final = 2**29
"""Pixels of all scans together beyond that, about two seconds of decoding."""
MAX_SIDE: Final = 65535
"""Pixels; JPEG's own bound. Pillow's decoders count the bits of a row in 31 bits."""
MAX_PARTS: Final = 65536
"""Chunks or segments of a file, so that empty ones cost little."""

_PNG: Final = b"\x89PNG\r\n\x1a\n"
_OTHER_FORMATS: Final = (
    (re.compile(rb"GIF8[79]a"), "GIF"),
    (re.compile(rb"II\*\0|MM\0\*|II\+\0|MM\0\+"), "TIFF"),
    (re.compile(rb"(?s)BM.{12}"), "BMP"),
    (re.compile(rb"(?s)....ftyp(?:avif|avis)"), "AVIF"),
    (re.compile(rb"(?s)....ftyp(?:hei[cxms]|hev[cxms]|mif1|msf1)"), "HEIC"),
    (re.compile(rb"(?s)....ftyp|\x1a\x45\xdf\xa3"), "a video"),
    (re.compile(rb"\xff\x0a|\0\0\0\x0cJXL \r\n"), "JPEG XL"),
    (re.compile(rb"\xff\x4f\xff\x51|\0\0\0\x0cjP  \r\n"), "JPEG 2000"),
    (re.compile(rb"\0\0[\1\2]\0"), "ICO"),
    (re.compile(rb"8BPS"), "PSD"),
    (re.compile(rb"%PDF"), "PDF"),
    (re.compile(rb"(?s)(?:\xef\xbb\xbf)?\s*(?:<\?xml|<!--|<!DOCTYPE svg|<svg)"), "SVG"),
)
_PNG_DEPTHS: Final = {0: (1, 2, 4, 8, 16), 2: (8, 16), 3: (1, 2, 4, 8), 4: (8, 16), 6: (8, 16)}
"""Bits a sample that each colour type has."""
_GREY, _RGB, _PALETTE = 0, 2, 3
_JPEG_FRAMES: Final = frozenset({0xC0, 0xC1, 0xC2, 0xC9, 0xCA})
"""Baseline, extended and progressive, with Huffman or arithmetic coding."""
_JPEG_OTHER_FRAMES: Final = frozenset(range(0xC0, 0xD0)) - _JPEG_FRAMES - {0xC4, 0xC8, 0xCC}
_JPEG_TABLES: Final = frozenset({0xC4, 0xCC, 0xDB, 0xDC, 0xDD})
_JPEG_MARKER: Final = re.compile(rb"\xff[^\0\xff]")
_JPEG_END_OF_SCAN: Final = re.compile(rb"\xff[^\0\xd0-\xd7\xff]")
_ORIENTATION_TAG: Final = 0x0112


class PictureError(ValueError):
    """A file that is no picture which can be read."""

    def __init__(self, reason: str, description: str) -> None:
        super().__init__(description)
        self.reason = reason
        self.description = description


@dataclass(frozen=True, slots=True, kw_only=True)
class Still:
    """One picture as a file that holds nothing but its pixels."""

    format: str
    """PNG, JPEG or WebP."""
    data: bytes
    width: int
    """Pixels, as stored: before any rotation."""
    height: int
    orientation: int = 1
    """Of EXIF, 1 to 8: which way up it is seen. 1 where the file does not say so intelligibly."""
    transparent: tuple[int, ...] | None = None
    """The one grey or RGB value that stands for transparency in a PNG, in samples of `bits`."""
    bits: int = 8
    """Of a sample."""
    is_inverted: bool = True
    """Whether CMYK samples count the light that is left rather than the ink, as Adobe's do."""


def read_still(data: bytes) -> Still:
    """The picture in `data`; of several pictures in a JPEG the first.

    Raises:
        PictureError: what the file is instead, or what is wrong with it.
    """
    if data.startswith(_PNG):
        return _read_png(data)
    if data.startswith(b"\xff\xd8\xff"):
        return _read_jpeg(data)
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return _read_webp(data)
    if not data:
        raise PictureError("NOT_AN_IMAGE", "is empty")
    for pattern, name in _OTHER_FORMATS:
        if pattern.match(data[:1024]):
            raise PictureError("NOT_SERVED", f"is {name}; PNG, JPEG and WebP are read")
    raise PictureError("NOT_AN_IMAGE", "is not a PNG, JPEG or WebP file")


# ---- PNG ------------------------------------------------------------------------------------------------------------


def _read_png(data: bytes) -> Still:
    header = palette = transparency = exif = b""
    kept = [_PNG]
    for kind, body in _png_chunks(data):
        if not header and kind != b"IHDR":
            raise PictureError("BROKEN", "is a PNG that does not begin with its header")
        if kind == b"IHDR":
            if header:
                raise PictureError("BROKEN", "is a PNG with two headers")
            header = _check_png_header(body)
        elif kind == b"PLTE":
            palette = body
        elif kind == b"tRNS":
            transparency = body
        elif kind == b"acTL" and body[:4] != b"\0\0\0\1":
            raise PictureError("ANIMATED", "is an animated PNG; a still picture is needed")
        elif kind == b"eXIf":
            exif = body
        elif kind not in (b"IDAT", b"IEND") and kind[:1].isupper():
            name = kind.decode("latin-1")
            raise PictureError("NOT_SERVED", f"is a PNG of a private kind: its part {name!r} is unknown")
        if kind in (b"IHDR", b"PLTE", b"IDAT", b"IEND") or (kind == b"tRNS" and header[9] == _PALETTE):
            kept.append(_png_chunk(kind, body))
    width, height, bits, colour = struct.unpack_from(">IIBB", header)
    if colour == _PALETTE and (not palette or len(palette) % 3 or len(palette) > 3 * 256):
        raise PictureError("BROKEN", "is a PNG without a palette of 1 to 256 colours")
    return Still(
        format="PNG",
        data=b"".join(kept),
        width=width,
        height=height,
        orientation=exif_orientation(exif),
        transparent=_png_transparent(colour, transparency),
        bits=bits,
    )


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Kind and body of each chunk up to the end of the picture; checksums of those that matter are right."""
    position = len(_PNG)
    for _ in _parts("PNG"):
        if position + 12 > len(data):
            break
        length, kind = struct.unpack_from(">I4s", data, position)
        end = position + 12 + length
        if end > len(data):
            break
        body = data[position + 8 : end - 4]
        if kind[:1].isupper() and zlib.crc32(body, zlib.crc32(kind)) != struct.unpack_from(">I", data, end - 4)[0]:
            raise PictureError("BROKEN", f"is a PNG with a wrong checksum at byte {position}")
        yield kind, body
        if kind == b"IEND":
            return
        position = end
    raise PictureError("TRUNCATED", f"is a PNG that ends too early, after {len(data)} bytes")


def _png_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(body, zlib.crc32(kind)))


def _check_png_header(body: bytes) -> bytes:
    if len(body) != 13:
        raise PictureError("BROKEN", "is a PNG with a broken header")
    width, height, bits, colour, *methods = struct.unpack(">IIBBBBB", body)
    _check_size("PNG", width, height)
    if bits not in _PNG_DEPTHS.get(colour, ()) or methods not in ([0, 0, 0], [0, 0, 1]):
        raise PictureError("BROKEN", f"is a PNG with a broken header: colour type {colour} of {bits} bits")
    return body


def _png_transparent(colour: int, transparency: bytes) -> tuple[int, ...] | None:
    num_values = {_GREY: 1, _RGB: 3}.get(colour)
    if num_values is None or len(transparency) < 2 * num_values:
        return None
    return struct.unpack_from(f">{num_values}H", transparency)


# ---- JPEG -----------------------------------------------------------------------------------------------------------


@dataclass(slots=True, kw_only=True)
class _JpegParts:
    """What was found on the way through a JPEG."""

    kept: list[bytes]
    frame: bytes = b""
    exif: bytes = b""
    has_adobe: bool = False
    num_scans: int = 0


def _read_jpeg(data: bytes) -> Still:
    parts = _JpegParts(kept=[b"\xff\xd8"])
    _walk_jpeg(data, parts)
    if not parts.num_scans:
        raise PictureError("BROKEN", "is a JPEG without a picture")
    height, width = struct.unpack_from(">HH", parts.frame, 1)
    return Still(
        format="JPEG",
        data=b"".join(parts.kept),
        width=width,
        height=height,
        orientation=exif_orientation(parts.exif),
        is_inverted=parts.has_adobe,
    )


def _walk_jpeg(data: bytes, parts: _JpegParts) -> None:
    """Sort the segments of `data` into `parts`, up to the end of the picture."""
    position = 2
    for _ in _parts("JPEG"):
        found = _JPEG_MARKER.search(data, position)
        if found is None:
            break
        marker, start = data[found.start() + 1], found.end()
        if marker == 0xD9:
            parts.kept.append(b"\xff\xd9")
            return
        if marker == 0x01 or 0xD0 <= marker <= 0xD7:  # these stand alone, and mean nothing here
            position = start
            continue
        if start + 2 > len(data):
            break
        position = start + struct.unpack_from(">H", data, start)[0]
        if position < start + 2:
            raise PictureError("BROKEN", f"is a JPEG with a broken segment at byte {found.start()}")
        if position > len(data):
            break
        if marker == 0xDA:
            following = _JPEG_END_OF_SCAN.search(data, position)
            position = len(data) if following is None else following.start()
        _sort_segment(marker, data[start + 2 : position], b"\xff" + data[start - 1 : position], parts)
    raise PictureError("TRUNCATED", f"is a JPEG that ends too early, after {len(data)} bytes")


def _sort_segment(marker: int, body: bytes, segment: bytes, parts: _JpegParts) -> None:
    if marker in _JPEG_OTHER_FRAMES:
        raise PictureError("NOT_SERVED", f"is a JPEG of the rare kind SOF{marker - 0xC0}, which is not read")
    if marker in _JPEG_FRAMES:
        _check_jpeg_frame(body, parts)
        parts.frame = body
    elif marker == 0xDA:
        _check_jpeg_scan(parts)
    elif marker == 0xE1 and body.startswith(b"Exif\0\0") and not parts.exif:
        parts.exif = body
    is_adobe = marker == 0xEE and body.startswith(b"Adobe") and len(body) >= 12
    is_jfif = marker == 0xE0 and body.startswith(b"JFIF\0")
    parts.has_adobe |= is_adobe
    if marker in _JPEG_FRAMES or marker in _JPEG_TABLES or marker == 0xDA or is_adobe or is_jfif:
        parts.kept.append(segment)


def _check_jpeg_frame(body: bytes, parts: _JpegParts) -> None:
    if parts.frame or len(body) < 6 or len(body) < 6 + 3 * body[5]:
        raise PictureError("BROKEN", "is a JPEG with a broken header")
    bits, height, width, num_components = struct.unpack_from(">BHHB", body)
    _check_size("JPEG", width, height)
    if bits != 8 or num_components not in (1, 3, 4):
        sentence = f"is a JPEG of {num_components} components of {bits} bits; 1, 3 or 4 of 8 bits are read"
        raise PictureError("NOT_SERVED", sentence)


def _check_jpeg_scan(parts: _JpegParts) -> None:
    if not parts.frame:
        raise PictureError("BROKEN", "is a JPEG with a picture before its header")
    parts.num_scans += 1
    height, width = struct.unpack_from(">HH", parts.frame, 1)
    most = min(MAX_JPEG_SCANS, max(MIN_JPEG_SCANS, MAX_JPEG_SCANNED // (width * height)))
    if parts.num_scans > most:
        raise PictureError("TOO_LARGE", f"is a JPEG of {width} x {height} pixels with more than {most} scans")


# ---- WebP -----------------------------------------------------------------------------------------------------------


def _read_webp(data: bytes) -> Still:
    canvas: tuple[int, int] | None = None
    size: tuple[int, int] | None = None
    kept: list[bytes] = []
    exif = b""
    for kind, body in _webp_chunks(data):
        match kind:
            case b"VP8X" if canvas is None and size is None and len(body) >= 10:
                canvas = _int24(body, 4) + 1, _int24(body, 7) + 1
                if body[0] & 0b10:
                    raise _animated_webp()
                kept.append(_webp_chunk(kind, bytes((body[0] & 0x10, 0, 0, 0)) + body[4:10]))
            case b"ANIM" | b"ANMF":
                raise _animated_webp()
            case b"ALPH" if size is None and canvas is not None:
                kept.append(_webp_chunk(kind, body))
            case b"VP8 " | b"VP8L" if size is None:
                size = _vp8_size(body) if kind == b"VP8 " else _vp8l_size(body)
                kept.append(_webp_chunk(kind, body))
            case b"EXIF":
                exif = body
    if size is None or canvas not in (None, size):
        raise PictureError("BROKEN", "is a WebP without a picture of the size that it tells")
    _check_size("WebP", *size)
    return Still(
        format="WebP",
        data=_webp_chunk(b"RIFF", b"WEBP" + b"".join(kept)),
        width=size[0],
        height=size[1],
        orientation=exif_orientation(exif),
    )


def _webp_chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    end_of_file = 8 + struct.unpack_from("<I", data, 4)[0]
    if end_of_file > len(data) + 1:  # some writers leave out the last byte of padding
        raise PictureError("TRUNCATED", f"is a WebP that ends too early, after {len(data)} of {end_of_file} bytes")
    position = 12
    for _ in _parts("WebP"):
        if position + 8 > min(end_of_file, len(data)):
            return
        kind, length = struct.unpack_from("<4sI", data, position)
        body = data[position + 8 : position + 8 + length]
        if len(body) < length:
            raise PictureError("TRUNCATED", f"is a WebP that ends too early, after {len(data)} bytes")
        yield kind, body
        position += 8 + length + length % 2


def _webp_chunk(kind: bytes, body: bytes) -> bytes:
    return kind + struct.pack("<I", len(body)) + body + b"\0" * (len(body) % 2)


def _animated_webp() -> PictureError:
    return PictureError("ANIMATED", "is an animated WebP; a still picture is needed")


def _vp8_size(body: bytes) -> tuple[int, int]:
    if body[3:6] != b"\x9d\x01\x2a" or len(body) < 10:
        raise PictureError("BROKEN", "is a WebP with a broken header")
    width, height = struct.unpack_from("<HH", body, 6)
    return width & 0x3FFF, height & 0x3FFF


def _vp8l_size(body: bytes) -> tuple[int, int]:
    if body[:1] != b"\x2f" or len(body) < 5:
        raise PictureError("BROKEN", "is a WebP with a broken header")
    (bits,) = struct.unpack_from("<I", body, 1)
    return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1


def _int24(data: bytes, position: int) -> int:
    return int.from_bytes(data[position : position + 3], "little")


# ---- all ------------------------------------------------------------------------------------------------------------


def exif_orientation(exif: bytes) -> int:
    """Which way up the picture is seen, 1 to 8; 1 where `exif` is empty, broken or does not say."""
    tiff = exif.removeprefix(b"Exif\0\0")
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(tiff[:4])
    if order is None or len(tiff) < 8:
        return 1
    (start,) = struct.unpack_from(f"{order}I", tiff, 4)
    if start + 2 > len(tiff):
        return 1
    (num_entries,) = struct.unpack_from(f"{order}H", tiff, start)
    entries = tiff[start + 2 : start + 2 + 12 * num_entries]
    for tag, kind, count, value in struct.iter_unpack(f"{order}HHIH2x", entries[: len(entries) // 12 * 12]):
        if (tag, kind, count) == (_ORIENTATION_TAG, 3, 1):
            return value if 1 <= value <= 8 else 1
    return 1


def _parts(name: str) -> Iterator[int]:
    yield from range(MAX_PARTS)
    raise PictureError("TOO_LARGE", f"is a {name} of more than {MAX_PARTS} parts")


def _check_size(name: str, width: int, height: int) -> None:
    if not width or not height:
        raise PictureError("BROKEN", f"is a {name} of {width} x {height} pixels")
    if max(width, height) > MAX_SIDE:
        raise PictureError("TOO_LARGE", f"is a {name} of {width} x {height} pixels; at most {MAX_SIDE} a side")
