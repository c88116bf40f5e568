"""Turns what a caller asks for into messages of the API. Does not know what a server accepts; that one says so."""

import datetime
import math
import uuid
from collections.abc import Iterable
from typing import Any, TypedDict

from google.protobuf.message import Message

from wan_grpc.v1 import generation_pb2 as pb
from wan_grpc.v1 import video_generation_service_pb2 as service_pb
from wan_grpc_client.events import word


class Options(TypedDict, total=False):
    """What a request may say besides its prompt. What is left out, or None, is the server's to choose.

    The fields are described in protos/wan_grpc/v1/generation.proto; `get_model()` tells what unset values mean.
    """

    negative_prompt: str | None
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
    output_format: str | None
    """E.g. `mp4_h264` (the default) or `raw_rgb24`."""
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
    """
    unknown = options.keys() - Options.__annotations__.keys()
    if unknown:
        raise TypeError(f"no such option of a generation: {', '.join(sorted(unknown))}")
    request = service_pb.GenerateRequest()
    _set(request.spec, "prompt", prompt)
    _set(request, "request_id", options.get("request_id") or str(uuid.uuid4()))
    for name, value in options.items():
        if value is not None and name != "request_id":
            _set_option(request.spec, name, value)
    return request


def list_request(states: Iterable[str], page_token: str = "") -> service_pb.ListGenerationsRequest:
    """Raises: ValueError: naming a state that does not exist."""
    numbers = [_number(pb.GenerationState, "states", state) for state in states]
    return service_pb.ListGenerationsRequest(states=numbers, page_token=page_token)


def _set_option(spec: pb.GenerationSpec, name: str, value: Any) -> None:
    if name == "output_format":
        spec.output_format = _number(pb.OutputFormat, name, value)
    elif name == "max_duration_s":
        spec.max_duration.FromTimedelta(_timedelta(name, value))
    elif name == "detach_grace_s" and value == math.inf:
        spec.detach_unlimited = True
    elif name == "detach_grace_s":
        spec.detach_grace.FromTimedelta(_timedelta(name, value))
    else:
        _set(spec, name, value)


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
