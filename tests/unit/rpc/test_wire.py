import time

import pytest
from google.protobuf.message import DecodeError
from hypothesis import given, settings
from hypothesis import strategies as st

from wan_grpc.domain.errors import InvalidRequestError
from wan_grpc.rpc.wire import MAX_FIELDS, MalformedError, check_wire
from wan_grpc.v1 import generation_pb2 as pb
from wan_grpc.v1.video_generation_service_pb2 import GenerateRequest, ListGenerationsRequest

DESCRIPTOR = GenerateRequest.DESCRIPTOR
NO_TEXT = b"caf\xe9"
MIB = 1024 * 1024


def varint(value: int) -> bytes:
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes((*encoded, value))


def part(number: int, value: bytes) -> bytes:
    """A field of bytes, a text or a message."""
    return varint(number << 3 | 2) + varint(len(value)) + value


def spec(*parts: bytes) -> bytes:
    return part(1, b"".join(parts))


@pytest.mark.parametrize(
    ("raw", "fields"),
    [
        (spec(part(1, NO_TEXT)), ["spec.prompt"]),
        (
            spec(part(1, b"x"), part(2, NO_TEXT), part(26, b"\xed\xa0\x80")),
            ["spec.negative_prompt", "spec.acceleration_profile"],
        ),
        (spec(part(25, b""), part(25, part(1, b"\xc0\x80"))), ["spec.adapters[1].name"]),
        (spec(part(1, NO_TEXT)) + part(2, b"\xff"), ["spec.prompt", "request_id"]),
        (spec(part(1, NO_TEXT)) + spec(part(1, NO_TEXT)), ["spec.prompt"]),
    ],
)
def test_texts_that_are_not_utf8(raw: bytes, fields: list[str]) -> None:
    """Each text that protobuf would refuse is named by its path, in parts of the message too."""
    with pytest.raises(InvalidRequestError) as refused:
        check_wire(raw, DESCRIPTOR)
    assert [(wrong.field, wrong.reason) for wrong in refused.value.violations] == [
        (name, "NOT_UTF8") for name in fields
    ]


def test_where_a_text_ends_to_be_utf8() -> None:
    """The sentence says where in the text to look."""
    with pytest.raises(InvalidRequestError, match=r"spec\.prompt: is not UTF-8 from byte 3 on"):
        check_wire(spec(part(1, NO_TEXT)), DESCRIPTOR)


@pytest.mark.parametrize(
    "raw",
    [
        spec(part(15, b"\xff\xfe")),  # an image is no text
        spec(part(99, b"\xff\xfe")),  # what a later version may know
        spec(varint(1 << 3) + b"\x07"),  # a number where a text is: protobuf takes it for unknown
        part(25, b"\xff"),  # at another level than the field of that number
        b"",
    ],
)
def test_what_only_looks_like_a_text(raw: bytes) -> None:
    """Bytes that protobuf does not read as text are left to it."""
    check_wire(raw, DESCRIPTOR)
    GenerateRequest.FromString(raw)


@pytest.mark.parametrize(
    "raw",
    [
        b"\x0a",  # a length is missing
        b"\x0a\x05abc",  # the end is missing
        b"\x0a" + b"\x80" * 10,  # a number without an end
        b"\x0a" + b"\x80" * 10 + b"\x01",  # a number of too many bytes
        b"\x09\x00",  # 8 bytes are 1
        b"\x0d\x00",  # 4 bytes are 1
        b"\x00\x00",  # a field of number 0
        b"\x80\x80\x80\x80\x81\x00\x00",  # a key of too many bytes
        b"\x80\x80\x80\x80\x7f\x00",  # a field of a number beyond all fields
        b"\x0b\x0c",  # a group
        b"\x0e",  # of a type that there is not
        spec(b"\x0a\x05abc"),  # a part reaches beyond its whole
        b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\x7f",  # a length beyond anything
    ],
)
def test_what_is_no_message(raw: bytes) -> None:
    """Bytes that cannot be cut into fields are told from those that can."""
    with pytest.raises(MalformedError, match="the bytes are not a message of this method"):
        check_wire(raw, DESCRIPTOR)


@pytest.mark.parametrize(
    ("message", "raw"),
    [
        (GenerateRequest, spec(part(25, b"") * (16 * MIB // 3))),
        (GenerateRequest, b"\x78\x00" * (8 * MIB)),
        (ListGenerationsRequest, part(3, b"\x01" * (16 * MIB))),
    ],
    ids=["empty parts", "unknown fields", "packed numbers"],
)
def test_small_fields_in_great_number(message: type[GenerateRequest | ListGenerationsRequest], raw: bytes) -> None:
    """What would take up many times the memory of its bytes is refused in no time."""
    began = time.process_time()
    with pytest.raises(MalformedError, match=f"the message has more than {MAX_FIELDS} fields"):
        check_wire(raw, message.DESCRIPTOR)
    assert time.process_time() - began < 1.0


def test_images_cost_nothing() -> None:
    """The time goes by the fields and not by their bytes."""
    raw = GenerateRequest(spec=pb.GenerationSpec(prompt="x", image=bytes(16 * MIB))).SerializeToString()
    began = time.process_time()
    for _ in range(100):
        check_wire(raw, DESCRIPTOR)
    assert time.process_time() - began < 1.0


PARTS = st.builds(part, st.sampled_from([1, 2, 3, 15, 21, 25, 30]), st.binary())


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.binary(max_size=60) | st.builds(spec, PARTS))
def test_protobuf_refuses_nothing_else(raw: bytes) -> None:
    """What passes is a message for protobuf, too: nobody is left without a reason."""
    try:
        check_wire(raw, DESCRIPTOR)
    except (MalformedError, InvalidRequestError):
        return
    try:
        GenerateRequest.FromString(raw)
    except DecodeError as error:
        raise AssertionError(raw) from error
