import dataclasses
from typing import Any

import google_crc32c
import pytest
from google.protobuf.duration_pb2 import Duration
from google.protobuf.json_format import MessageToDict
from hypothesis import given
from hypothesis import strategies as st

from tests.fakes import CARD, NOON_S
from wan_grpc.domain.errors import Failure, InvalidRequestError, Reason
from wan_grpc.domain.events import (
    Accepted,
    Chunk,
    Completed,
    Event,
    Failed,
    Generation,
    Heartbeat,
    Preview,
    Progress,
    Queued,
    RankMemory,
    Record,
    Resumed,
    Stage,
    StageTime,
    State,
    VideoInfo,
)
from wan_grpc.domain.formats import Encoding, OutputFormat, PixelFormat
from wan_grpc.domain.images import ImageFit
from wan_grpc.domain.request import UNLIMITED_S, GenerationRequest, VideoRequest, resolve
from wan_grpc.domain.variants import Expert, Task
from wan_grpc.rpc.capabilities import TASKS
from wan_grpc.rpc.convert import (
    EXPERTS,
    IMAGE_FITS,
    OUTPUT_FORMATS,
    PIXEL_FORMATS,
    STAGES,
    STATES,
    Asked,
    check_name,
    check_not_negative,
    to_domain,
    to_event,
    to_generation,
    to_states,
)
from wan_grpc.rpc.unserved import UNSERVED_FIELDS
from wan_grpc.v1 import generation_pb2 as pb
from wan_grpc.v1.video_generation_service_pb2 import CreateGenerationRequest, GenerateRequest

NAME = "generations/1"
VIDEO = VideoRequest(
    prompt="a raccoon",
    negative_prompt="rain",
    width=832,
    height=480,
    num_frames=81,
    fps=16,
    num_inference_steps=40,
    guidance_scale=4.0,
    guidance_scale_2=3.0,
    flow_shift=12.0,
    boundary_ratio=0.875,
    seed=2**63 - 1,
    output_format=OutputFormat.MP4_H264,
    encoding=Encoding(crf=18, pixel_format=PixelFormat.YUV420P),
)
RESOLVED = {
    "prompt": "a raccoon",
    "negative_prompt": "rain",
    "width": 832,
    "height": 480,
    "num_frames": 81,
    "fps": 16,
    "num_inference_steps": 40,
    "guidance_scale": 4.0,
    "guidance_scale_2": 3.0,
    "flow_shift": 12.0,
    "boundary_ratio": 0.875,
    "seed": "9223372036854775807",
    "output_format": "OUTPUT_FORMAT_MP4_H264",
    "encoding": {"crf": 18, "pixel_format": "PIXEL_FORMAT_YUV420P"},
}
PROGRESS = Progress(
    stage=Stage.DENOISE,
    step=3,
    total_steps=40,
    expert=Expert.HIGH_NOISE,
    step_time_s=1.25,
    eta_s=46.0,
    slowest_rank=0,
    slowest_rank_time_s=1.125,
)
PROGRESS_TOLD = {
    "stage": "STAGE_DENOISE",
    "step": 3,
    "total_steps": 40,
    "expert": "EXPERT_HIGH_NOISE",
    "step_time": "1.250s",
    "eta": "46s",
    "slowest_rank": 0,
    "slowest_rank_time": "1.125s",
}
COMPLETED = Completed(
    size_bytes=2**40,
    sha256="ab" * 32,
    stage_times=(StageTime(stage=Stage.TEXT, seconds=0.5), StageTime(stage=Stage.ENCODE, seconds=2.0)),
    rank_memory=(RankMemory(rank=0, peak_bytes=7), RankMemory(rank=1, peak_bytes=8)),
)
COMPLETED_TOLD = {
    "size_bytes": "1099511627776",
    "sha256": "ab" * 32,
    "stage_times": [
        {"stage": "STAGE_TEXT", "duration": "0.500s"},
        {"stage": "STAGE_ENCODE", "duration": "2s"},
    ],
    "rank_memory": [{"peak_bytes": "7"}, {"rank": 1, "peak_bytes": "8"}],
}


def as_dict(message: Any) -> dict[str, Any]:
    told: dict[str, Any] = MessageToDict(message, preserving_proto_field_name=True)
    return told


def asked(kind: Any = GenerateRequest, /, *, request_id: str = "", **spec: Any) -> Asked:
    return to_domain(kind(spec=pb.GenerationSpec(**spec), request_id=request_id))


def found(**spec: Any) -> dict[str, str]:
    """The fields in which a spec says what no value can, each with its rule."""
    return {violation.field: violation.reason for violation in asked(**spec).found}


# ---- words ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ours", "table", "wire"),
    [
        (Expert, EXPERTS, pb.Expert),
        (Stage, STAGES, pb.Stage),
        (State, STATES, pb.GenerationState),
        (OutputFormat, OUTPUT_FORMATS, pb.OutputFormat),
        (PixelFormat, PIXEL_FORMATS, pb.PixelFormat),
        (ImageFit, IMAGE_FITS, pb.ImageFit),
        (Task, TASKS, pb.Task),
    ],
    ids=lambda word: getattr(word, "__name__", ""),
)
def test_every_word_has_one_of_its_own_on_the_wire(ours: Any, table: Any, wire: Any) -> None:
    """Each value of ours has a wire value of the same name, and no two share one."""
    assert set(table) == set(ours)
    prefix = wire.Name(0).removesuffix("UNSPECIFIED")
    assert {value: wire.Name(number) for value, number in table.items()} == {v: f"{prefix}{v.name}" for v in ours}


# ---- requests -------------------------------------------------------------------------------------------------------

FULL_SPEC: dict[str, Any] = {
    "prompt": "a raccoon",
    "negative_prompt": "",
    "width": 832,
    "height": 480,
    "num_frames": 81,
    "num_inference_steps": 4,
    "fps": 24,
    "guidance_scale": 1.0,
    "guidance_scale_2": 2.5,
    "flow_shift": 5.0,
    "boundary_ratio": 0.9,
    "seed": 0,
}


@pytest.mark.parametrize("kind", [GenerateRequest, CreateGenerationRequest])
@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ({"prompt": "x"}, GenerationRequest(prompt="x", request_id="r")),
        (FULL_SPEC, GenerationRequest(request_id="r", **FULL_SPEC)),
        (
            {"prompt": "x", "image": b"a", "last_image": b"", "image_fit": pb.IMAGE_FIT_STRETCH},
            GenerationRequest(prompt="x", request_id="r", image=b"a", last_image=b"", image_fit=ImageFit.STRETCH),
        ),
        (
            {"prompt": "x", "encoding": pb.EncodingOptions(crf=0, pixel_format=pb.PIXEL_FORMAT_YUV444P10)},
            GenerationRequest(prompt="x", request_id="r", encoding=Encoding(crf=0, pixel_format=PixelFormat.YUV444P10)),
        ),
        (
            {"prompt": "x", "encoding": pb.EncodingOptions(bitrate_bps=0, quality=0)},
            GenerationRequest(prompt="x", request_id="r", encoding=Encoding(bitrate_bps=0, quality=0)),
        ),
        (
            {"prompt": "x", "output_format": pb.OUTPUT_FORMAT_RAW_RGB24},
            GenerationRequest(prompt="x", request_id="r", output_format=OutputFormat.RAW_RGB24),
        ),
        (
            {"prompt": "x", "output_format": pb.OUTPUT_FORMAT_UNSPECIFIED},
            GenerationRequest(prompt="x", request_id="r"),
        ),
        (
            {"prompt": "x", "max_duration": Duration(seconds=90, nanos=500_000_000), "detach_grace": Duration()},
            GenerationRequest(prompt="x", request_id="r", max_duration_s=90.5, detach_grace_s=0.0),
        ),
        (
            {"prompt": "x", "detach_unlimited": True},
            GenerationRequest(prompt="x", request_id="r", detach_grace_s=UNLIMITED_S),
        ),
        ({"prompt": "x", "detach_unlimited": False}, GenerationRequest(prompt="x", request_id="r")),
        ({"prompt": "x", "width": -16}, GenerationRequest(prompt="x", request_id="r", width=-16)),
        (
            {"prompt": "x", "preview_every_steps": 0},
            GenerationRequest(prompt="x", request_id="r", preview_every_steps=0),
        ),
        (
            {"prompt": "x", "preview_every_steps": -5},
            GenerationRequest(prompt="x", request_id="r", preview_every_steps=-5),
        ),
        ({"prompt": "x", "acceleration_profile": ""}, GenerationRequest(prompt="x", request_id="r")),
        ({"prompt": "x", "encoding": pb.EncodingOptions()}, GenerationRequest(prompt="x", request_id="r")),
    ],
)
def test_requests_say_what_the_message_says(kind: Any, spec: dict[str, Any], expected: GenerationRequest) -> None:
    """Set fields arrive, zero and empty included; unset ones stay open; what judges values is asked later."""
    assert asked(kind, request_id="r", **spec) == Asked(request=expected, found=())


def test_an_empty_request_is_refused_by_the_rules_and_not_by_accident() -> None:
    """A message with nothing in it becomes a request with nothing in it."""
    assert to_domain(GenerateRequest()) == Asked(request=GenerationRequest(prompt=""), found=())


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ({"output_format": 99}, {"spec.output_format": "UNKNOWN_VALUE"}),
        ({"output_format": -1}, {"spec.output_format": "UNKNOWN_VALUE"}),
        ({"image_fit": 5}, {"spec.image_fit": "UNKNOWN_VALUE"}),
        ({"encoding": pb.EncodingOptions(pixel_format=7)}, {"spec.encoding.pixel_format": "UNKNOWN_VALUE"}),
        ({"max_duration": Duration(seconds=1, nanos=-1)}, {"spec.max_duration": "NOT_A_DURATION"}),
        ({"max_duration": Duration(seconds=400_000_000_000)}, {"spec.max_duration": "NOT_A_DURATION"}),
        ({"detach_grace": Duration(nanos=1_000_000_000)}, {"spec.detach_grace": "NOT_A_DURATION"}),
        ({"adapters": [pb.AdapterUse()]}, {"spec.adapters": "NOT_SERVED"}),
        ({"acceleration_profile": "fast"}, {"spec.acceleration_profile": "NOT_SERVED"}),
    ],
)
def test_what_no_value_can_hold_is_told_by_its_field(spec: dict[str, Any], expected: dict[str, str]) -> None:
    """What the wire can say and a value cannot is named, and stays open in the request, so that it is told once."""
    told = asked(prompt="x", **spec)
    assert {violation.field: violation.reason for violation in told.found} == expected
    assert told.request == GenerationRequest(prompt="x")


def test_everything_is_told_at_once() -> None:
    """One wrong word does not hide another."""
    assert found(
        image_fit=9,
        output_format=99,
        encoding=pb.EncodingOptions(crf=-1, pixel_format=99),
        adapters=[pb.AdapterUse(name="adapters/a")],
        acceleration_profile="fast",
        max_duration=Duration(nanos=-(2**31)),
        detach_grace=Duration(seconds=2**62),
    ) == {
        "spec.image_fit": "UNKNOWN_VALUE",
        "spec.output_format": "UNKNOWN_VALUE",
        "spec.encoding.pixel_format": "UNKNOWN_VALUE",
        "spec.adapters": "NOT_SERVED",
        "spec.acceleration_profile": "NOT_SERVED",
        "spec.max_duration": "NOT_A_DURATION",
        "spec.detach_grace": "NOT_A_DURATION",
    }


def test_options_of_an_unknown_format_are_not_judged() -> None:
    """What an option means depends on the format, so that one that is unknown takes its options with it."""
    told = asked(prompt="x", output_format=99, encoding=pb.EncodingOptions(quality=1000))
    assert told.request == GenerationRequest(prompt="x")


def test_every_field_of_a_spec_is_either_served_or_said_not_to_be() -> None:
    """A field added to the API cannot be forgotten: it is part of the request, or listed as not served."""
    described = {f"spec.{field.name}" for field in pb.GenerationSpec.DESCRIPTOR.fields}
    served = {f"spec.{field.name}" for field in dataclasses.fields(GenerationRequest)}
    served |= {"spec.max_duration", "spec.detach_grace", "spec.detach_unlimited"}
    assert described - served == set(UNSERVED_FIELDS)


ANY_BYTES = st.binary(max_size=40)
INT32 = st.integers(-(2**31), 2**31 - 1)
DURATIONS = st.builds(Duration, seconds=st.integers(-(2**63), 2**63 - 1), nanos=INT32)
ANY_SPEC = st.fixed_dictionaries(
    {},
    optional={
        "prompt": st.text(max_size=20),
        "negative_prompt": st.text(max_size=20),
        "seed": st.integers(-(2**63), 2**63 - 1),
        "image": ANY_BYTES,
        "last_image": ANY_BYTES,
        "image_fit": INT32 | st.sampled_from(pb.ImageFit.values()),
        "encoding": st.builds(
            pb.EncodingOptions,
            crf=INT32,
            quality=st.none() | INT32,
            pixel_format=INT32 | st.sampled_from(pb.PixelFormat.values()),
        )
        | st.builds(pb.EncodingOptions, bitrate_bps=st.integers(-(2**63), 2**63 - 1)),
        "output_format": INT32 | st.sampled_from(pb.OutputFormat.values()),
        "max_duration": DURATIONS,
        **dict.fromkeys(("width", "height", "num_frames", "num_inference_steps", "fps"), INT32),
        **{name: st.floats() for name in ("guidance_scale", "guidance_scale_2", "flow_shift", "boundary_ratio")},
    },
)


def test_the_case_of_a_request_id_does_not_count() -> None:
    """Two spellings of one UUID are one id, and so one generation."""
    upper, lower = "7D9C1F70-4C1E-4B5C-9D5F-0A1B2C3D4E5F", "7d9c1f70-4c1e-4b5c-9d5f-0a1b2c3d4e5f"
    told = [asked(request_id=spelled, prompt="x").request for spelled in (upper, lower)]
    assert told == [GenerationRequest(prompt="x", request_id=lower)] * 2


@given(ANY_SPEC, st.fixed_dictionaries({}, optional={"detach_grace": DURATIONS}), st.text(max_size=40))
def test_no_message_breaks_the_conversion(spec: dict[str, Any], detach: dict[str, Any], request_id: str) -> None:
    """Whatever a message says is converted and judged, or refused with a sentence; nothing else can happen."""
    message = GenerateRequest(spec=pb.GenerationSpec(**spec, **detach), request_id=request_id)
    told = to_domain(GenerateRequest.FromString(message.SerializeToString()))
    try:
        video = resolve(told.request, CARD, fallback_seed=0, found=told.found)
    except InvalidRequestError as refused:
        assert str(refused)
    else:
        accepted = Accepted(name=NAME, video=video, max_duration_s=told.request.max_duration_s)
        assert to_event(NAME, Record(sequence=1, time_s=0, event=accepted)).SerializeToString()


@pytest.mark.parametrize("name", ["generations/1", "generations/0b2c6f0e-8f5e-4b7e-9d0a-1c2d3e4f5a6b"])
def test_names_of_generations(name: str) -> None:
    """A name of the right form passes."""
    assert check_name(name) == name


@pytest.mark.parametrize("name", ["", "1", "generations/", "generations/a/b", "adapters/1", "generations/" + "a" * 65])
def test_what_is_no_name(name: str) -> None:
    """Anything else is refused without being repeated, however long it is."""
    with pytest.raises(InvalidRequestError) as refused:
        check_name(name)
    assert [(v.field, v.reason) for v in refused.value.violations] == [("name", "NOT_A_NAME")]
    assert str(refused.value) == "name: is not of the form generations/{id}"


def test_numbers_below_zero() -> None:
    """Every negative number is named, and zero is none."""
    check_not_negative(offset=0, limit=1)
    with pytest.raises(InvalidRequestError) as refused:
        check_not_negative(offset=-1, limit=-2)
    assert [v.field for v in refused.value.violations] == ["offset", "limit"]


def test_states_to_list() -> None:
    """States of a filter arrive as ours; numbers that are none are named by their place."""
    assert to_states([pb.GENERATION_STATE_FAILED, pb.GENERATION_STATE_QUEUED]) == {State.FAILED, State.QUEUED}
    with pytest.raises(InvalidRequestError) as refused:
        to_states([pb.GENERATION_STATE_FAILED, 0, 77])
    assert [v.field for v in refused.value.violations] == ["states[1]", "states[2]"]
    with pytest.raises(InvalidRequestError) as refused:
        to_states([pb.GENERATION_STATE_FAILED] * 101)
    assert [(v.field, v.reason) for v in refused.value.violations] == [("states", "TOO_MANY")]


# ---- events and resources -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("event", "kind", "expected"),
    [
        (
            Accepted(name=NAME, video=VIDEO, warnings=("w",), max_duration_s=60.0, detach_grace_s=15.0),
            "accepted",
            {"resolved": {**RESOLVED, "max_duration": "60s", "detach_grace": "15s"}, "warnings": ["w"]},
        ),
        (
            Accepted(name=NAME, video=VIDEO, detach_grace_s=UNLIMITED_S),
            "accepted",
            {"resolved": {**RESOLVED, "detach_unlimited": True}},
        ),
        (Queued(position=2, eta_s=12.5), "queued", {"position": 2, "eta": "12.500s"}),
        (Queued(position=0, eta_s=None), "queued", {}),
        (PROGRESS, "progress", PROGRESS_TOLD),
        (Progress(stage=Stage.TEXT, step=0, total_steps=1), "progress", {"stage": "STAGE_TEXT", "total_steps": 1}),
        (
            Preview(step=4, media_type="image/webp", data=b"abc"),
            "preview",
            {"step": 4, "media_type": "image/webp", "data": "YWJj"},
        ),
        (Resumed(step=4, total_steps=40), "resumed", {"step": 4, "total_steps": 40}),
        (
            VideoInfo(output_format=OutputFormat.RAW_RGB24, media_type="a/b", width=1, height=2, num_frames=3, fps=4),
            "video_info",
            {
                "output_format": "OUTPUT_FORMAT_RAW_RGB24",
                "media_type": "a/b",
                "width": 1,
                "height": 2,
                "num_frames": 3,
                "fps": 4,
            },
        ),
        (
            Chunk(offset=2**33, data=b"123456789"),
            "chunk",
            {"offset": "8589934592", "data": "MTIzNDU2Nzg5", "crc32c": 0xE3069283},
        ),
        (COMPLETED, "completed", COMPLETED_TOLD),
        (Heartbeat(), "heartbeat", {}),
    ],
)
def test_events_on_the_wire(event: Event, kind: str, expected: dict[str, Any]) -> None:
    """Each event arrives whole, in its own kind, with its number, time and generation; unset stays unset."""
    told = as_dict(to_event(NAME, Record(sequence=9, time_s=NOON_S, event=event)))
    assert told == {"sequence": "9", "time": "2026-11-22T12:00:00.500Z", "generation": NAME, kind: expected}


def test_one_expert_has_no_boundary() -> None:
    """The boundary of a model with one expert is unset, not zero."""
    event = Accepted(name=NAME, video=dataclasses.replace(VIDEO, boundary_ratio=None))
    assert not to_event(NAME, Record(sequence=1, time_s=0, event=event)).accepted.resolved.HasField("boundary_ratio")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"image_sha256": "ab" * 32, "last_image_sha256": "cd" * 32, "image_fit": ImageFit.CONTAIN},
            {"image_sha256": "ab" * 32, "last_image_sha256": "cd" * 32, "image_fit": "IMAGE_FIT_CONTAIN"},
        ),
        (
            {"encoding": Encoding(crf=0, pixel_format=PixelFormat.YUV422P)},
            {"encoding": {"crf": 0, "pixel_format": "PIXEL_FORMAT_YUV422P"}},
        ),
        ({"encoding": Encoding(bitrate_bps=2**27)}, {"encoding": {"bitrate_bps": "134217728"}}),
        ({"encoding": Encoding(quality=100)}, {"encoding": {"quality": 100}}),
    ],
)
def test_what_is_resolved_on_the_wire(changes: dict[str, Any], expected: dict[str, Any]) -> None:
    """Images by their checksums, how they are fitted, and every option that applies to the format."""
    event = Accepted(name=NAME, video=dataclasses.replace(VIDEO, **changes))
    told = as_dict(to_event(NAME, Record(sequence=1, time_s=0, event=event)).accepted.resolved)
    assert told == {**RESOLVED, **expected}


def test_a_failure_is_no_event() -> None:
    """A failed generation ends its calls in a status; sending it as an event would be our own bug."""
    failed = Failed(failure=Failure(reason=Reason.INTERNAL, message="m"))
    with pytest.raises(AssertionError):
        to_event(NAME, Record(sequence=1, time_s=0, event=failed))


@given(st.binary(min_size=1, max_size=4096), st.integers(0, 2**62))
def test_chunks_carry_the_checksum_of_their_bytes(data: bytes, offset: int) -> None:
    """Chunk bytes and offset survive the wire, and the checksum is that of the bytes."""
    sent = to_event(NAME, Record(sequence=1, time_s=0, event=Chunk(offset=offset, data=data))).SerializeToString()
    chunk = pb.GenerationEvent.FromString(sent).chunk
    assert (chunk.offset, chunk.data, chunk.crc32c) == (offset, data, google_crc32c.value(data))


@pytest.mark.parametrize(
    ("generation", "expected"),
    [
        (
            Generation(name=NAME, state=State.QUEUED, video=VIDEO, created_s=NOON_S, queue_position=0),
            {"state": "GENERATION_STATE_QUEUED", "queue_position": 0},
        ),
        (
            Generation(
                name=NAME,
                state=State.SUCCEEDED,
                video=VIDEO,
                created_s=NOON_S,
                started_s=NOON_S + 1,
                ended_s=NOON_S + 2,
                expires_s=NOON_S + 3600,
                progress=PROGRESS,
                completed=COMPLETED,
                request_id="r",
                warnings=("w",),
                max_duration_s=1.0,
            ),
            {
                "state": "GENERATION_STATE_SUCCEEDED",
                "request_id": "r",
                "resolved": {**RESOLVED, "max_duration": "1s"},
                "warnings": ["w"],
                "start_time": "2026-11-22T12:00:01.500Z",
                "end_time": "2026-11-22T12:00:02.500Z",
                "expire_time": "2026-11-22T13:00:00.500Z",
                "progress": PROGRESS_TOLD,
                "completed": COMPLETED_TOLD,
            },
        ),
        (
            Generation(
                name=NAME,
                state=State.FAILED,
                video=VIDEO,
                created_s=NOON_S,
                failure=Failure(reason=Reason.RANK_DIED, message="rank 1 was killed", retry_after_s=10.0),
            ),
            {
                "state": "GENERATION_STATE_FAILED",
                "error": {
                    "reason": "RANK_DIED",
                    "code": 14,
                    "message": "rank 1 was killed",
                    "retry_delay": "10s",
                },
            },
        ),
    ],
    ids=["queued", "succeeded", "failed"],
)
def test_generations_on_the_wire(generation: Generation, expected: dict[str, Any]) -> None:
    """A resource says how it stands, and leaves out what it has not come to."""
    common = {"name": NAME, "resolved": RESOLVED, "create_time": "2026-11-22T12:00:00.500Z"}
    assert as_dict(to_generation(generation)) == {**common, **expected}


def test_what_was_accepted_can_be_asked_for_again() -> None:
    """The resolved values, sent as a request, resolve to the very same video."""
    message = to_event(NAME, Record(sequence=1, time_s=0, event=Accepted(name=NAME, video=VIDEO)))
    told = MessageToDict(message.accepted.resolved, preserving_proto_field_name=True)
    spec = {field: getattr(message.accepted.resolved, field) for field in told}
    assert resolve(asked(**spec).request, CARD, fallback_seed=1) == VIDEO
