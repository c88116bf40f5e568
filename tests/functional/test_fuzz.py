"""What callers send who mean no good, or do not know what they do."""

import grpc
import pytest
from hypothesis import HealthCheck, example, given, settings

from tests import pictures
from tests.functional.live import OK, LiveServer, generate_request, refusal, spec
from tests.fuzz.fuzz_front_door import METHODS, NEVER, Caller, any_bytes, any_spec
from wan_grpc.v1 import generation_pb2 as pb

MIB = 2**20
REPEATABLE = {"deadline": None, "derandomize": True, "database": None, "suppress_health_check": list(HealthCheck)}


@pytest.fixture(scope="module")
def caller(live_i2v: LiveServer) -> Caller:
    return Caller(live_i2v)


@pytest.mark.parametrize("path", METHODS)
def test_no_bytes_at_all(caller: Caller, path: str) -> None:
    """The empty message, and a single byte, are requests like others for every method of every service."""
    assert not {caller.send(path, raw) for raw in (b"", b"\x0a", b"\xff")} & {*NEVER}


@given(sent=any_bytes("generations/x"))
@example(sent=("/wan_grpc.v1.VideoGenerationService/GetGeneration", b"\x0a\x02\xff\xfe"))
@settings(max_examples=400, **REPEATABLE)
def test_any_bytes(caller: Caller, sent: tuple[str, bytes]) -> None:
    """Whatever bytes arrive for whatever method, they are no reason for INTERNAL or UNKNOWN."""
    assert caller.send(*sent) not in NEVER


@given(made=any_spec())
@settings(max_examples=60, **REPEATABLE)
def test_any_values(caller: Caller, made: pb.GenerationSpec) -> None:
    """Whatever values a request has, it is refused, or a video comes of it."""
    assert caller.make(made) in (
        grpc.StatusCode.OK,
        grpc.StatusCode.INVALID_ARGUMENT,
        grpc.StatusCode.UNIMPLEMENTED,
        grpc.StatusCode.DEADLINE_EXCEEDED,
    )


def test_streams_hold_no_images(live_i2v: LiveServer) -> None:
    """Many streams of one request with a large image hold neither its bytes nor its pixels while they go on."""
    large = spec(image=pictures.jpeg(), width=64, height=64, num_frames=25, num_inference_steps=10)
    large.MergeFromString(b"\xfa\x3f\x80\x80\x40" + bytes(MIB))  # large as images are, as a field of a later version
    live_i2v.make(large)
    before = live_i2v.rss_bytes()
    streams = [live_i2v.generate(large, request_id="8c5a1f8e-91c3-4ba8-9d0f-c36be22c1a6f") for _ in range(100)]
    assert len({stream.name for stream in streams}) == 1
    grown = live_i2v.rss_bytes() - before
    print(f"{grown / MIB:.1f} MiB for 100 streams")
    assert grown < 50 * MIB
    assert [stream.finish() for stream in streams] == [OK] * 100


def test_refusals_hold_no_images(live_i2v: LiveServer) -> None:
    """What many refused requests held is free again, without waiting for a garbage collector."""
    large = generate_request(spec(image=bytes(MIB))).SerializeToString()
    call = live_i2v.channel.unary_stream("/wan_grpc.v1.VideoGenerationService/Generate")
    refusal(lambda: call(large))
    before = live_i2v.rss_bytes()
    for _ in range(100):
        assert refusal(lambda: call(large)).fields == ("spec.image",)
    grown = live_i2v.rss_bytes() - before
    print(f"{grown / MIB:.1f} MiB for 100 refusals")
    assert grown < 30 * MIB


def test_the_server_is_well(caller: Caller) -> None:
    """After all that it answers, is ready, has logged no error, and its ranks work."""
    caller.assert_well()
    assert caller.make(spec(image=pictures.jpeg())) is grpc.StatusCode.OK
