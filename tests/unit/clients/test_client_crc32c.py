import google_crc32c
from hypothesis import given, settings
from hypothesis import strategies as st

from wan_grpc_client.crc32c import crc32c, crc32c_in_python


def test_known_value() -> None:
    """The check value that every description of CRC-32C gives."""
    assert (crc32c(b"123456789"), crc32c_in_python(b"123456789")) == (0xE3069283, 0xE3069283)


@given(st.integers(0, 5000).flatmap(lambda size: st.binary(min_size=size, max_size=size)))
@settings(max_examples=60, deadline=None)
def test_pure_python_agrees_with_the_library(data: bytes) -> None:
    """Below, at and above the length of a lane, both ways give the same number."""
    assert crc32c_in_python(data) == google_crc32c.value(data)


def test_a_whole_chunk() -> None:
    """The largest chunk of the API, whose lanes fill every step."""
    data = bytes(number * number % 251 for number in range(1024 * 1024))
    assert crc32c_in_python(data) == google_crc32c.value(data)
