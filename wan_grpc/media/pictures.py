"""Frames as pictures in sRGB: PNG, JPEG, WebP, and WebP pictures one after the other as an animation.

Knows Pillow's options, and as much of WebP's container as an animation takes.
"""

import io
from collections.abc import Callable
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from wan_grpc.domain.formats import OutputFormat, PixelFormat, resolve_encoding
from wan_grpc.domain.request import VideoRequest

_SUBSAMPLING = {PixelFormat.YUV420P: "4:2:0", PixelFormat.YUV422P: "4:2:2", PixelFormat.YUV444P: "4:4:4"}
_FOR_EVER = b"\0\0"
_NO_BLENDING = b"\x02"


PREVIEW_TYPE = "image/webp"
_PREVIEW_QUALITY = 80


def preview(rgb: bytes, *, width: int, height: int) -> bytes:
    """A file of PREVIEW_TYPE of RGB24 samples, fast rather than as small as can be."""
    file = io.BytesIO()
    Image.frombytes("RGB", (width, height), rgb).save(file, format="WEBP", quality=_PREVIEW_QUALITY, method=0)
    return file.getvalue()


class PictureWriter:
    """The file of one frame, in one `write`."""

    def __init__(self, video: VideoRequest, write: Callable[[bytes], None]) -> None:
        self._video = video
        self._write = write

    def add(self, pixels: memoryview) -> None:
        self._write(_picture(pixels, self._video))

    def finish(self) -> None:
        pass

    def abort(self) -> None:
        pass


class WebpAnimationWriter:
    """An animated WebP file of whole pictures, so that a viewer may begin anywhere.

    Its header says how long it is: all of it comes at the end, and frames wait for it encoded. One frame is a picture.
    """

    def __init__(self, video: VideoRequest, write: Callable[[bytes], None]) -> None:
        self._video = video
        self._write = write
        self._pictures: list[bytes] = []

    def add(self, pixels: memoryview) -> None:
        self._pictures.append(_picture(pixels, self._video))

    def finish(self) -> None:
        self._write(_animation(self._pictures, self._video) if self._video.num_frames > 1 else self._pictures[0])

    def abort(self) -> None:
        self._pictures.clear()


def _picture(pixels: memoryview, video: VideoRequest) -> bytes:
    file = io.BytesIO()
    Image.frombytes("RGB", (video.width, video.height), bytes(pixels)).save(file, **_options(video))
    return file.getvalue()


def _animation(pictures: list[bytes], video: VideoRequest) -> bytes:
    """WebP Container Specification, "Extended File Format"."""
    size = _three_bytes(video.width - 1) + _three_bytes(video.height - 1)
    header = _chunk(b"VP8X", b"\x02\0\0\0" + size) + _chunk(b"ANIM", b"\xff\xff\xff\xff" + _FOR_EVER)
    frames = (
        _chunk(b"ANMF", bytes(6) + size + _three_bytes(_duration_ms(index, video.fps)) + _NO_BLENDING + picture[12:])
        for index, picture in enumerate(pictures)
    )
    return _chunk(b"RIFF", b"WEBP" + header + b"".join(frames))


def _duration_ms(index: int, fps: int) -> int:
    """Of one frame: from its own start to the next one's, both rounded, so that errors do not add up."""
    return round((index + 1) * 1000 / fps) - round(index * 1000 / fps)


def _chunk(name: bytes, content: bytes) -> bytes:
    return name + len(content).to_bytes(4, "little") + content + bytes(len(content) % 2)


def _three_bytes(value: int) -> bytes:
    return value.to_bytes(3, "little")


def _options(video: VideoRequest) -> dict[str, Any]:
    encoding = resolve_encoding(video.encoding, video.output_format)
    match video.output_format:
        case OutputFormat.PNG:
            return {"format": "PNG", "pnginfo": _srgb(), "compress_level": 6}
        case OutputFormat.JPEG:
            assert encoding.pixel_format is not None, "a resolved encoding has a pixel format"
            subsampling = _SUBSAMPLING[encoding.pixel_format]
            return {"format": "JPEG", "quality": encoding.quality, "subsampling": subsampling, "optimize": True}
        case OutputFormat.WEBP | OutputFormat.WEBP_ANIMATION:
            return {"format": "WEBP", "quality": encoding.quality, "method": 4}
        case _:
            raise AssertionError(f"{video.output_format} is no picture")


def _srgb() -> PngInfo:
    """The chunk that names the colour space; JFIF and WebP without a profile mean it anyway."""
    info = PngInfo()
    info.add(b"sRGB", b"\0")  # perceptual intent
    return info
