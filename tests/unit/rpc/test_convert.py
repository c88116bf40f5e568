import dataclasses
import json
from typing import Any

import google_crc32c
import pytest
from google.protobuf.duration_pb2 import Duration
from google.protobuf.json_format import MessageToDict
from hypothesis import given
from hypothesis import strategies as st

from tests.fakes import CARD, NOON_S
from wan_grpc.domain.errors import Failure, InvalidRequestError, NotSupportedError, Reason
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
from wan_grpc.domain.formats import OutputFormat
from wan_grpc.domain.request import UNLIMITED_S, GenerationRequest, VideoRequest, resolve
from wan_grpc.domain.status import EngineStatus
from wan_grpc.domain.topology import Topology
from wan_grpc.domain.variants import Expert, Task
from wan_grpc.rpc.capabilities import TASKS, describe
from wan_grpc.rpc.convert import (
    EXPERTS,
    OUTPUT_FORMATS,
    STAGES,
    STATES,
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
}
PROGRESS = Progress(stage=Stage.DENOISE, step=3, total_steps=40, expert=Expert.HIGH_NOISE, step_time_s=1.25, eta_s=46.0)
PROGRESS_TOLD = {
    "stage": "STAGE_DENOISE",
    "step": 3,
    "total_steps": 40,
    "expert": "EXPERT_HIGH_NOISE",
    "step_time": "1.250s",
    "eta": "46s",
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


def violations(**spec: Any) -> dict[str, str]:
    """The fields that a spec is refused for, each with its rule."""
    with pytest.raises(InvalidRequestError) as refused:
        to_domain(GenerateRequest(spec=pb.GenerationSpec(**{"prompt": "x", **spec})), CARD)
    return {violation.field: violation.reason for violation in refused.value.violations}


# ---- words ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ours", "table", "wire"),
    [
        (Expert, EXPERTS, pb.Expert),
        (Stage, STAGES, pb.Stage),
        (State, STATES, pb.GenerationState),
        (OutputFormat, OUTPUT_FORMATS, pb.OutputFormat),
        (Task, TASKS, pb.Task),
    ],
    ids=["Expert", "Stage", "State", "OutputFormat", "Task"],
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
        ({"prompt": "x", "preview_every_steps": 0}, GenerationRequest(prompt="x", request_id="r")),
        ({"prompt": "x", "acceleration_profile": ""}, GenerationRequest(prompt="x", request_id="r")),
        ({"prompt": "x", "encoding": pb.EncodingOptions()}, GenerationRequest(prompt="x", request_id="r")),
    ],
)
def test_requests_say_what_the_message_says(kind: Any, spec: dict[str, Any], expected: GenerationRequest) -> None:
    """Set fields arrive, zero and empty included; unset ones stay open; what judges values is asked later."""
    assert to_domain(kind(spec=pb.GenerationSpec(**spec), request_id="r"), CARD) == expected


def test_an_empty_request_is_refused_by_the_rules_and_not_by_accident() -> None:
    """A message with nothing in it becomes a request with nothing in it."""
    assert to_domain(GenerateRequest(), CARD) == GenerationRequest(prompt="")


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ({"output_format": 99}, {"spec.output_format": "UNKNOWN_VALUE"}),
        ({"max_duration": Duration(seconds=1, nanos=-1)}, {"spec.max_duration": "NOT_A_DURATION"}),
        ({"max_duration": Duration(seconds=400_000_000_000)}, {"spec.max_duration": "NOT_A_DURATION"}),
        ({"detach_grace": Duration(nanos=1_000_000_000)}, {"spec.detach_grace": "NOT_A_DURATION"}),
        (
            {"prompt": " ", "width": 7, "seed": -1, "output_format": 99, "detach_grace": Duration(seconds=-1, nanos=1)},
            {
                "spec.prompt": "REQUIRED",
                "spec.width": "NOT_A_MULTIPLE",
                "spec.seed": "OUT_OF_RANGE",
                "spec.output_format": "UNKNOWN_VALUE",
                "spec.detach_grace": "NOT_A_DURATION",
            },
        ),
    ],
)
def test_what_no_value_can_hold_is_refused_together_with_the_rest(
    spec: dict[str, Any], expected: dict[str, str]
) -> None:
    """What the wire can say and a value cannot is named, together with every rule of the model that is broken."""
    assert violations(**spec) == expected


@pytest.mark.parametrize(
    ("spec", "fields"),
    [
        ({"image": b"\x89PNG"}, ("spec.image",)),
        ({"image": b""}, ("spec.image",)),
        ({"last_image": b"x"}, ("spec.last_image",)),
        ({"image_fit": pb.IMAGE_FIT_COVER}, ("spec.image_fit",)),
        ({"encoding": pb.EncodingOptions(crf=0)}, ("spec.encoding",)),
        ({"preview_every_steps": 5}, ("spec.preview_every_steps",)),
        ({"adapters": [pb.AdapterUse(name="adapters/a")]}, ("spec.adapters",)),
        ({"acceleration_profile": "fast"}, ("spec.acceleration_profile",)),
        ({"output_format": pb.OUTPUT_FORMAT_WEBM_AV1}, ("spec.output_format",)),
        (
            {"width": 7, "image": b"x", "adapters": [pb.AdapterUse()], "output_format": pb.OUTPUT_FORMAT_GIF},
            ("spec.image", "spec.adapters", "spec.output_format"),
        ),
    ],
)
def test_what_this_server_has_not_is_refused_by_name(spec: dict[str, Any], fields: tuple[str, ...]) -> None:
    """A field whose behaviour is not here is never ignored: all of them are named, with a sentence each."""
    with pytest.raises(NotSupportedError) as refused:
        to_domain(GenerateRequest(spec=pb.GenerationSpec(**{"prompt": "x", **spec})), CARD)
    assert refused.value.fields == fields
    assert all(field in str(refused.value) for field in fields)


def test_every_field_of_a_spec_is_either_served_or_said_not_to_be() -> None:
    """A field added to the API cannot be forgotten: it is part of the request, or listed as not served."""
    described = {f"spec.{field.name}" for field in pb.GenerationSpec.DESCRIPTOR.fields}
    served = {f"spec.{field.name}" for field in dataclasses.fields(GenerationRequest)}
    served |= {"spec.max_duration", "spec.detach_grace", "spec.detach_unlimited"}
    assert described - served == set(UNSERVED_FIELDS)


INT32 = st.integers(-(2**31), 2**31 - 1)
DURATIONS = st.builds(Duration, seconds=st.integers(-(2**63), 2**63 - 1), nanos=INT32)
ANY_SPEC = st.fixed_dictionaries(
    {},
    optional={
        "prompt": st.text(max_size=20),
        "negative_prompt": st.text(max_size=20),
        "seed": st.integers(-(2**63), 2**63 - 1),
        "image_fit": INT32,
        "output_format": INT32 | st.sampled_from(pb.OutputFormat.values()),
        "max_duration": DURATIONS,
        **dict.fromkeys(("width", "height", "num_frames", "num_inference_steps", "fps"), INT32),
        **{name: st.floats() for name in ("guidance_scale", "guidance_scale_2", "flow_shift", "boundary_ratio")},
    },
)


def test_the_case_of_a_request_id_does_not_count() -> None:
    """Two spellings of one UUID are one id, and so one generation."""
    upper, lower = "7D9C1F70-4C1E-4B5C-9D5F-0A1B2C3D4E5F", "7d9c1f70-4c1e-4b5c-9d5f-0a1b2c3d4e5f"
    asked = [GenerateRequest(spec=pb.GenerationSpec(prompt="x"), request_id=spelled) for spelled in (upper, lower)]
    assert [to_domain(message, CARD) for message in asked] == [GenerationRequest(prompt="x", request_id=lower)] * 2


@given(ANY_SPEC, st.fixed_dictionaries({}, optional={"detach_grace": DURATIONS}), st.text(max_size=40))
def test_no_message_breaks_the_conversion(spec: dict[str, Any], detach: dict[str, Any], request_id: str) -> None:
    """Whatever a message says is converted and judged, or refused with a sentence; nothing else can happen."""
    message = GenerateRequest(spec=pb.GenerationSpec(**spec, **detach), request_id=request_id)
    try:
        request = to_domain(GenerateRequest.FromString(message.SerializeToString()), CARD)
        video = resolve(request, CARD, fallback_seed=0)
    except (InvalidRequestError, NotSupportedError) as refused:
        assert str(refused)
    else:
        accepted = Accepted(name=NAME, video=video, max_duration_s=request.max_duration_s)
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
    spec = pb.GenerationSpec()
    for field in told:
        setattr(spec, field, getattr(message.accepted.resolved, field))
    assert resolve(to_domain(GenerateRequest(spec=spec), CARD), CARD, fallback_seed=1) == VIDEO


# ---- the model ------------------------------------------------------------------------------------------------------


def test_the_model_on_the_wire() -> None:
    """GetModel tells rules, defaults, limits, how the model is run, and every part of the API that is missing."""
    status = EngineStatus(
        ready=True,
        detail="ready",
        topology=Topology(copies=2),
        device="cpu",
        dtype="float32",
        attention="sdpa",
        load_format="safetensors",
        queue_limit=16,
        num_queued=3,
        num_running=1,
        rank_memory=(RankMemory(rank=1, peak_bytes=6),),
    )
    told = as_dict(describe(CARD, status))
    unserved = told.pop("unserved")
    assert told.pop("server_version")
    assert told == {
        "model": {
            "model_id": "Wan-AI/Wan2.2-T2V-A14B-Diffusers",
            "tasks": ["TASK_TEXT_TO_VIDEO"],
            "sizes": [
                {"width": 1280, "height": 720},
                {"width": 720, "height": 1280},
                {"width": 832, "height": 480},
                {"width": 480, "height": 832},
            ],
            "rules": {"size_multiple": 16, "num_frames_multiple": 4, "max_text_tokens": 512},
            "defaults": {
                "width": 1280,
                "height": 720,
                "num_frames": 81,
                "fps": 16,
                "num_inference_steps": 40,
                "guidance_scale": 4.0,
                "guidance_scale_2": 3.0,
                "flow_shift": 12.0,
                "boundary_ratio": 0.875,
                "output_format": "OUTPUT_FORMAT_MP4_H264",
            },
            "limits": {
                "max_area": 921600,
                "max_num_frames": 161,
                "max_inference_steps": 100,
                "max_prompt_bytes": 16384,
                "max_queued": 16,
            },
            "output_formats": ["OUTPUT_FORMAT_MP4_H264", "OUTPUT_FORMAT_RAW_RGB24"],
        },
        "deployment": {
            "ready": True,
            "detail": "ready",
            "topology": {"world_size": 2, "copies": 2, "cfg": 1, "ring": 1, "ulysses": 1, "text_tensor": 1},
            "device": "cpu",
            "dtype": "float32",
            "attention_backend": "sdpa",
            "load_format": "safetensors",
            "num_queued": 3,
            "num_running": 1,
            "rank_memory": [{"rank": 1, "peak_bytes": "6"}],
        },
    }
    assert all(part.pop("description") for part in unserved)
    assert json.dumps(unserved) == json.dumps(
        [{"rpc": f"wan_grpc.v1.AdapterService/{m}"} for m in ("LoadAdapter", "UnloadAdapter", "ListAdapters")]
        + [{"field": field} for field in UNSERVED_FIELDS]
    )
