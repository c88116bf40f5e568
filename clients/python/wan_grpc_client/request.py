"""Turns what a caller asks for into messages of the API. Does not know what a server accepts; that one says so."""

import datetime
import math
import os
import re
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final, TypeAlias, TypedDict

from google.protobuf.message import Message

from wan_grpc.v1 import generation_pb2 as pb
from wan_grpc.v1 import video_generation_service_pb2 as service_pb
from wan_grpc_client.events import word

FRAME_SIZE: Final = re.compile(r"([0-9]{1,9})[x*]([0-9]{1,9})")
Image: TypeAlias = bytes | str | os.PathLike[str]
"""A PNG, JPEG or WebP file: its bytes, or a path at which they are read when the request is made."""
_ENCODING: Final = frozenset({"crf", "bitrate_bps", "quality"})
_EXCLUSIVE: Final = (("size", "width"), ("size", "height"), ("crf", "bitrate_bps"))


class Options(TypedDict, total=False):
    """What a request may say besides its prompt. What is left out, or None, is the server's to choose.

    The fields are described in protos/wan_grpc/v1/generation.proto; `get_model()` tells what unset values mean.
    """

    negative_prompt: str | None
    image: Image | None
    """First image of the video."""
    last_image: Image | None
    image_fit: str | None
    """`cover`, `contain`, `stretch` or `exact`; unset: the video takes the aspect of its first image."""
    size: str | tuple[int, int] | None
    """`"832x480"` or `(832, 480)`, instead of `width` and `height`."""
    width: int | None
    height: int | None
    num_frames: int | None
    fps: int | None
    num_inference_steps: int | None
    guidance_scale: float | None
    guidance_scale_2: float | None
    flow_shift: float | None
    boundary_ratio: float | None
    seed: int | None
    preview_every_steps: int | None
    """Denoising steps from one `Preview` to the next; unset: no previews."""
    output_format: str | None
    """E.g. `mp4_h264` (the default), `mkv_ffv1` (lossless) or `png`; `get_model()` tells what each can do."""
    crf: int | None
    """Constant quality of a video codec, 0 is best."""
    bitrate_bps: int | None
    """Mean bits a second, instead of `crf`."""
    quality: int | None
    """Of JPEG and WebP, 1 to 100, 100 is best."""
    pixel_format: str | None
    """How samples are stored, e.g. `yuv444p`."""
    max_duration_s: float | None
    """Bound on the job itself, from acceptance to its last byte."""
    detach_grace_s: float | None
    """How long the job goes on while nobody watches it; `math.inf`: without limit."""
    request_id: str | None
    """UUID of version 4. The same id and request attaches to the same generation; by default a new one is drawn."""


def generate_request(prompt: str, options: Options) -> service_pb.GenerateRequest:
    """The message for `prompt` and `options`.

    Raises:
        TypeError: naming an option that does not exist.
        ValueError: naming a value that the API cannot express.
        OSError: an image cannot be read.
    """
    unknown = options.keys() - Options.__annotations__.keys()
    if unknown:
        raise TypeError(f"no such option of a generation: {', '.join(sorted(unknown))}")
    said: Mapping[str, Any] = {name: value for name, value in options.items() if value is not None}
    for one, other in _EXCLUSIVE:
        if one in said and other in said:
            raise ValueError(f"{one}: not with {other}")
    request = service_pb.GenerateRequest()
    _set(request.spec, "prompt", prompt)
    _set(request, "request_id", said.get("request_id") or str(uuid.uuid4()))
    for name, value in said.items():
        if name != "request_id":
            _set_option(request.spec, name, value)
    return request


def frame_size(size: str | tuple[int, int]) -> tuple[int, int]:
    """(width, height) of `size`. Raises: ValueError: it is none."""
    match size:
        case str() if found := FRAME_SIZE.fullmatch(size):
            return int(found[1]), int(found[2])
        case (int() as width, int() as height):
            return width, height
    raise ValueError(f"size: {size!r} is not WIDTHxHEIGHT such as 832x480")


def known_names(enum: Any) -> tuple[str, ...]:
    """The values of an enumeration of the API that a request may name."""
    return tuple(word(enum, number) for number in enum.values() if number)


def list_request(states: Iterable[str], page_token: str = "") -> service_pb.ListGenerationsRequest:
    """Raises: ValueError: naming a state that does not exist."""
    numbers = [_number(pb.GenerationState, "states", state) for state in states]
    return service_pb.ListGenerationsRequest(states=numbers, page_token=page_token)


def _set_option(spec: pb.GenerationSpec, name: str, value: Any) -> None:
    match name:
        case "image" | "last_image":
            _set(spec, name, _image(name, value))
        case "image_fit":
            spec.image_fit = _number(pb.ImageFit, name, value)
        case "size":
            for side, pixels in zip(("width", "height"), frame_size(value), strict=True):
                _set(spec, side, pixels)
        case "output_format":
            spec.output_format = _number(pb.OutputFormat, name, value)
        case "pixel_format":
            spec.encoding.pixel_format = _number(pb.PixelFormat, name, value)
        case "max_duration_s":
            spec.max_duration.FromTimedelta(_timedelta(name, value))
        case "detach_grace_s" if value == math.inf:
            spec.detach_unlimited = True
        case "detach_grace_s":
            spec.detach_grace.FromTimedelta(_timedelta(name, value))
        case _:
            _set(spec.encoding if name in _ENCODING else spec, name, value)


def _image(name: str, value: Any) -> bytes:
    if isinstance(value, bytes):
        return value
    if not isinstance(value, str | os.PathLike):
        raise ValueError(f"{name}: must be the bytes of a file or a path, not {type(value).__name__}")
    return Path(value).read_bytes()


def _set(message: Message, name: str, value: Any) -> None:
    try:
        setattr(message, name, value)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}: {value!r} cannot be sent: {error}") from error


def _number(enum: Any, field: str, name: str) -> Any:
    known = {word(enum, number): number for number in enum.values() if number}
    if name not in known:
        raise ValueError(f"{field}: {name!r} is not one of {', '.join(known)}")
    return known[name]


def _timedelta(name: str, seconds: float) -> datetime.timedelta:
    try:
        return datetime.timedelta(seconds=seconds)
    except (OverflowError, ValueError) as error:
        raise ValueError(f"{name}: {seconds!r} s is not a finite time") from error
