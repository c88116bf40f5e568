"""Fuzzes the front door of a real server: `python -m tests.fuzz.fuzz_front_door --inputs 100000`.

Most inputs are bytes for every method of every service, random or made from good requests; one in fifty is a request
of random values, images and options, which runs to its end when it is accepted. Whatever arrives, no call may end in
INTERNAL or UNKNOWN, the server must go on, and its memory must stay where it is.
"""

import argparse
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, TypeVar

import grpc
from google.protobuf.duration_pb2 import Duration
from grpc_channelz.v1 import channelz_pb2
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests import pictures
from tests.functional.live import NARROW, LiveServer, running_server
from wan_grpc.domain.formats import FORMATS, OutputFormat
from wan_grpc.domain.variants import Task
from wan_grpc.pipeline.tiny import make_tiny_model
from wan_grpc.v1 import adapter_service_pb2
from wan_grpc.v1 import generation_pb2 as pb
from wan_grpc.v1 import video_generation_service_pb2 as api

NEVER: Final = (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN)
SETTLED: Final = 5000
"""Inputs after which memory has to stay as it is."""
MAX_GROWTH_BYTES: Final = 64 * 2**20
_TIMEOUT_S: Final = 60.0
_VIDEOS: Final = "/wan_grpc.v1.VideoGenerationService"
_ENDLESS: Final = "/grpc.health.v1.Health/Watch"
METHODS: Final = tuple(
    f"/{service.full_name}/{method}"
    for file in (api, adapter_service_pb2, health_pb2, channelz_pb2, reflection_pb2)
    for service in file.DESCRIPTOR.services_by_name.values()
    for method in service.methods_by_name
)
T = TypeVar("T")


# ---- bytes ----------------------------------------------------------------------------------------------------------


def good_requests(name: str) -> list[tuple[str, bytes]]:
    """One good request of each method that takes anything. name: of a generation that there is."""
    asked = pb.GenerationSpec(
        prompt="A cat walks on the grass",
        negative_prompt="rain",
        width=64,
        height=48,
        num_frames=5,
        num_inference_steps=2,
        guidance_scale=4.0,
        seed=7,
        image=pictures.saved(pictures.two_colours(), "PNG"),
        output_format=pb.OUTPUT_FORMAT_WEBM_VP9,
        encoding=pb.EncodingOptions(crf=30, pixel_format=pb.PIXEL_FORMAT_YUV420P),
        adapters=[pb.AdapterUse(name="adapters/a", scale=1.0)],
        max_duration=Duration(seconds=60),
        detach_grace=Duration(seconds=1),
    )
    served = pb.GenerationSpec()
    served.CopyFrom(asked)
    served.ClearField("adapters")
    id_ = str(uuid.uuid4())
    reflection = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"
    messages: list[tuple[str, Any]] = [
        (f"{_VIDEOS}/Generate", api.GenerateRequest(spec=served, request_id=id_)),
        (f"{_VIDEOS}/Generate", api.GenerateRequest(spec=asked)),
        (f"{_VIDEOS}/CreateGeneration", api.CreateGenerationRequest(spec=served)),
        (f"{_VIDEOS}/WatchGeneration", api.WatchGenerationRequest(name=name, after_sequence=1, from_offset=1)),
        (f"{_VIDEOS}/GetGeneration", api.GetGenerationRequest(name=name)),
        (f"{_VIDEOS}/ListGenerations", api.ListGenerationsRequest(page_size=7, page_token="x", states=[1, 2, 3])),
        (f"{_VIDEOS}/CancelGeneration", api.CancelGenerationRequest(name=name)),
        (f"{_VIDEOS}/DeleteGeneration", api.DeleteGenerationRequest(name=f"{name}x")),
        (f"{_VIDEOS}/DownloadVideo", api.DownloadVideoRequest(name=name, offset=1, limit=10)),
        ("/wan_grpc.v1.AdapterService/LoadAdapter", adapter_service_pb2.LoadAdapterRequest()),
        ("/grpc.health.v1.Health/Check", health_pb2.HealthCheckRequest(service="wan_grpc.v1.VideoGenerationService")),
        (_ENDLESS, health_pb2.HealthCheckRequest(service="wan_grpc.v1.VideoGenerationService")),
        ("/grpc.channelz.v1.Channelz/GetServers", channelz_pb2.GetServersRequest(max_results=3)),
        ("/grpc.channelz.v1.Channelz/GetSocket", channelz_pb2.GetSocketRequest(socket_id=3, summary=True)),
        (reflection, reflection_pb2.ServerReflectionRequest(file_containing_symbol="wan_grpc.v1.GenerationSpec")),
        (
            reflection,
            reflection_pb2.ServerReflectionRequest(
                file_containing_extension=reflection_pb2.ExtensionRequest(
                    containing_type="wan_grpc.v1.GenerationSpec", extension_number=1
                )
            ),
        ),
    ]
    return [(path, message.SerializeToString()) for path, message in messages]


def any_bytes(name: str) -> st.SearchStrategy[tuple[str, bytes]]:
    """A method and bytes for it: nothing but noise, noise that looks like fields, or a good request with damage."""
    noise = st.tuples(st.sampled_from(METHODS), st.binary(max_size=200) | st.lists(_fields(), max_size=6).map(b"".join))
    damage = st.sampled_from(good_requests(name)).flatmap(lambda good: st.tuples(st.just(good[0]), _damaged(good[1])))
    return noise | damage


def _fields() -> st.SearchStrategy[bytes]:
    """One field as the wire has it, nested now and then."""
    keys = st.tuples(st.integers(0, 33), st.integers(0, 7)).map(lambda key: _varint(key[0] << 3 | key[1]))
    values = st.integers(0, 2**64 - 1).map(_varint) | st.binary(max_size=12)
    lengths = st.recursive(
        st.binary(max_size=24),
        lambda inner: st.tuples(st.integers(1, 33), inner).map(lambda part: _part(part[0], part[1])),
        max_leaves=4,
    )
    return st.tuples(keys, values).map(b"".join) | st.tuples(st.integers(1, 33), lengths).map(
        lambda part: _part(part[0], part[1])
    )


def _damaged(raw: bytes) -> st.SearchStrategy[bytes]:
    """`raw` with some bytes changed, added or left out."""
    place = st.integers(0, max(0, len(raw) - 1))
    change = st.tuples(place, st.binary(max_size=3), st.integers(0, 3))

    def apply(changes: list[tuple[int, bytes, int]]) -> bytes:
        result = raw
        for index, put, length in changes:
            result = result[:index] + put + result[index + length :]
        return result

    return st.lists(change, max_size=4).map(apply)


def _part(number: int, value: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(value)) + value


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes((*encoded, value))


# ---- values ---------------------------------------------------------------------------------------------------------

_INT32 = st.integers(-(2**31), 2**31 - 1)
_INT64 = st.integers(-(2**63), 2**63 - 1)
_DURATIONS = st.builds(Duration, seconds=_INT64 | st.integers(-2, 2), nanos=_INT32 | st.integers(-2, 2))
_PICTURES = st.sampled_from(list(pictures.every_kind().values()))
_SIDES = st.integers(1, 6).map(lambda multiple: 16 * multiple)
_TAME: Final[dict[str, st.SearchStrategy[Any]]] = {
    "prompt": st.text(st.characters(exclude_categories=("Cs", "Cc")), min_size=1, max_size=600).map("a {}".format),
    "negative_prompt": st.text(st.characters(exclude_categories=("Cs", "Cc")), max_size=60),
    "width": _SIDES,
    "height": _SIDES,
    "num_frames": st.sampled_from([1, 5, 9]),
    "num_inference_steps": st.integers(1, 3),
    "fps": st.integers(1, 120),
    "guidance_scale": st.floats(0.0, 100.0),
    "guidance_scale_2": st.floats(0.0, 100.0),
    "flow_shift": st.floats(0.0, 100.0, exclude_min=True),
    "boundary_ratio": st.floats(0.0, 1.0),
    "seed": st.integers(0, 2**63 - 1),
    "image": _PICTURES,
    "last_image": _PICTURES,
    "image_fit": st.sampled_from([fit for fit in pb.ImageFit.values() if fit != pb.IMAGE_FIT_EXACT]),
    "detach_grace": st.just(Duration(seconds=5)),
    "max_duration": st.just(Duration(seconds=30)),
}
_ALWAYS: Final = frozenset({"prompt", "width", "height", "num_frames", "num_inference_steps", "image"})
_WILD: Final[dict[str, st.SearchStrategy[Any]]] = {
    **dict.fromkeys(("prompt", "negative_prompt", "acceleration_profile"), st.text(max_size=40)),
    **dict.fromkeys(("width", "height", "num_frames", "num_inference_steps", "fps", "preview_every_steps"), _INT32),
    **dict.fromkeys(("guidance_scale", "guidance_scale_2", "flow_shift", "boundary_ratio"), st.floats()),
    "seed": _INT64,
    **dict.fromkeys(("image", "last_image"), st.binary(max_size=100) | _PICTURES.flatmap(_damaged)),
    "image_fit": _INT32 | st.sampled_from(pb.ImageFit.values()),
    "output_format": _INT32 | st.sampled_from(pb.OutputFormat.values()),
    "encoding": st.builds(pb.EncodingOptions, crf=_INT32, quality=st.none() | _INT32, pixel_format=_INT32)
    | st.builds(pb.EncodingOptions, bitrate_bps=_INT64),
    "adapters": st.lists(
        st.builds(pb.AdapterUse, name=st.text(max_size=9), scale=st.floats(), expert=_INT32), max_size=3
    ),
    "max_duration": _DURATIONS,
    "detach_grace": _DURATIONS,
    "detach_unlimited": st.booleans(),
}


@st.composite
def any_spec(draw: st.DrawFn) -> pb.GenerationSpec:
    """A request that would be accepted, but for up to two fields that may hold anything."""
    values = {name: draw(value) for name, value in _TAME.items() if name in _ALWAYS or draw(st.integers(0, 3)) == 0}
    output_format, values["encoding"] = draw(_good_encodings())
    values["output_format"] = pb.OutputFormat.Value(f"OUTPUT_FORMAT_{output_format.name}")
    if FORMATS[output_format].is_picture:
        values["num_frames"] = 1
    if values["num_frames"] == 1:
        values.pop("last_image", None)
    for name in sorted(draw(st.sets(st.sampled_from(sorted(_WILD)), max_size=2))):
        values[name] = draw(_WILD[name])
    return pb.GenerationSpec(**values)


@st.composite
def _good_encodings(draw: st.DrawFn) -> tuple[OutputFormat, pb.EncodingOptions]:
    """An output format with options that it has."""
    output_format = draw(st.sampled_from(list(OutputFormat)))
    rule = FORMATS[output_format]
    options = pb.EncodingOptions()
    if rule.crf is not None and draw(st.booleans()):
        options.crf = draw(st.integers(rule.crf[0], rule.crf[1]))
    elif rule.crf is not None and draw(st.booleans()):
        options.bitrate_bps = draw(st.integers(10_000, 200_000_000))
    if rule.default_quality is not None and draw(st.booleans()):
        options.quality = draw(st.integers(1, 100))
    if draw(st.booleans()):
        pixel_format = draw(st.sampled_from(rule.pixel_formats))
        options.pixel_format = pb.PixelFormat.Value(f"PIXEL_FORMAT_{pixel_format.name}")
    return output_format, options


# ---- calls ----------------------------------------------------------------------------------------------------------


class Caller:
    """Calls a server with whatever it is given, and counts how that ended."""

    def __init__(self, server: LiveServer) -> None:
        self._server = server
        self.outcomes: Counter[tuple[str, str]] = Counter()

    def send(self, path: str, raw: bytes) -> grpc.StatusCode:
        """Call a method with these bytes, whatever its kind: on the wire they do not differ. What is accepted ends."""
        name = ""
        call = self._server.channel.stream_stream(path)(iter((raw,)), timeout=_TIMEOUT_S)
        try:
            for answer in call:
                name = name or _made(path, answer)
                if name or path == _ENDLESS:
                    break
            call.cancel()
            code = grpc.StatusCode.OK
        except grpc.RpcError as error:
            code = error.code()
        if name:
            self._server.cancel(name)
        return self._counted(path, code)

    def make(self, made: pb.GenerationSpec) -> grpc.StatusCode:
        """Generate, to the very end."""
        ending = self._server.generate(made, timeout_s=_TIMEOUT_S).finish()
        return self._counted("to the end", ending.code)

    def assert_well(self) -> None:
        """The server answers, is ready, and has met no bug."""
        assert self._server.health("") == health_pb2.HealthCheckResponse.SERVING
        assert self._server.health() == health_pb2.HealthCheckResponse.SERVING
        bad = [line for line in self._server.log_lines() if line["level"] in ("error", "critical")]
        assert not bad, bad

    def _counted(self, what: str, code: grpc.StatusCode) -> grpc.StatusCode:
        self.outcomes[what.rpartition("/")[2], code.name] += 1
        return code


def _made(path: str, answer: bytes) -> str:
    """The name of the generation that an answer says was made."""
    if path == f"{_VIDEOS}/Generate":
        return api.GenerateResponse.FromString(answer).event.generation
    if path == f"{_VIDEOS}/CreateGeneration":
        return api.CreateGenerationResponse.FromString(answer).generation.name
    return ""


# ---- by hand --------------------------------------------------------------------------------------------------------


def serving(directory: Path) -> Any:
    """A server of an image-to-video model, which takes the most that there is to take."""
    make_tiny_model(directory / "model", task=Task.IMAGE_TO_VIDEO)
    flags = ("--model-path", str(directory / "model"), "--log-level", "warning", *NARROW)
    return running_server(directory, *flags)


def _each(strategy: st.SearchStrategy[T], count: int, use: Callable[[T], None]) -> None:
    """Give `use` that many values, the same ones each time."""

    @settings(
        max_examples=count,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def give(value: T) -> None:
        use(value)

    give()


def fuzz(server: LiveServer, num_inputs: int) -> None:
    """Give it that many inputs and tell what came of them."""
    caller = Caller(server)
    began = time.monotonic()
    resident = {"at first": server.rss_bytes()}

    def look() -> None:
        count = caller.outcomes.total()
        if count % 1000 == 0 or count == num_inputs:
            caller.assert_well()
        if count % SETTLED == 0 or count == num_inputs:
            resident.setdefault("settled", server.rss_bytes())
            grown = server.rss_bytes() - resident["settled"]
            print(
                f"{count} inputs, {count / (time.monotonic() - began):.0f}/s, {_mebibytes(server.rss_bytes())}",
                flush=True,
            )
            assert grown < MAX_GROWTH_BYTES, f"{_mebibytes(grown)} more than after {SETTLED} inputs"

    def use(code: grpc.StatusCode, given: object) -> None:
        assert code not in NEVER, f"{code.name} for {given!r}"
        look()

    name = server.make(pb.GenerationSpec(prompt="x", image=pictures.jpeg(), num_frames=1, num_inference_steps=1)).name
    num_specs = num_inputs // 50
    _each(any_spec(), num_specs, lambda made: use(caller.make(made), made))
    _each(any_bytes(name), num_inputs - num_specs, lambda sent: use(caller.send(*sent), sent))
    for (what, code), count in sorted(caller.outcomes.items()):
        print(f"{what:24} {code:20} {count:7}")
    print(f"resident at first {_mebibytes(resident['at first'])}, in the end {_mebibytes(server.rss_bytes())}")


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=100_000)
    with tempfile.TemporaryDirectory() as directory, serving(Path(directory)) as server:
        fuzz(server, parser.parse_args().inputs)


def _mebibytes(count: int) -> str:
    return f"{count / 2**20:.0f} MiB"


if __name__ == "__main__":
    main()
