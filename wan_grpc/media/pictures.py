"""One frame as a picture: PNG, JPEG or WebP, in sRGB.

Knows Pillow's options. Does not know moving pictures.
"""

import io
from collections.abc import Callable
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from wan_grpc.domain.formats import OutputFormat, PixelFormat, resolve_encoding
from wan_grpc.domain.request import VideoRequest

_SUBSAMPLING = {PixelFormat.YUV420P: "4:2:0", PixelFormat.YUV422P: "4:2:2", PixelFormat.YUV444P: "4:4:4"}


class PictureWriter:
    """The file of one frame, in one `write`."""

    def __init__(self, video: VideoRequest, write: Callable[[bytes], None]) -> None:
        self._size = (video.width, video.height)
        self._write = write
        self._options = _options(video)

    def add(self, pixels: memoryview) -> None:
        file = io.BytesIO()
        Image.frombytes("RGB", self._size, bytes(pixels)).save(file, **self._options)
        self._write(file.getvalue())

    def finish(self) -> None:
        pass

    def abort(self) -> None:
        pass


def _options(video: VideoRequest) -> dict[str, Any]:
    encoding = resolve_encoding(video.encoding, video.output_format)
    match video.output_format:
        case OutputFormat.PNG:
            return {"format": "PNG", "pnginfo": _srgb(), "compress_level": 6}
        case OutputFormat.JPEG:
            assert encoding.pixel_format is not None, "a resolved encoding has a pixel format"
            subsampling = _SUBSAMPLING[encoding.pixel_format]
            return {"format": "JPEG", "quality": encoding.quality, "subsampling": subsampling, "optimize": True}
        case OutputFormat.WEBP:
            return {"format": "WEBP", "quality": encoding.quality, "method": 4}
        case _:
            raise AssertionError(f"{video.output_format} is no picture")


def _srgb() -> PngInfo:
    """The chunk that names the colour space; JFIF and WebP without a profile mean it anyway."""
    info = PngInfo()
    info.add(b"sRGB", b"\0")  # perceptual intent
    return info
