"""The bytes of a message before protobuf reads them: how many fields there are, and which text is not UTF-8.

Knows the wire format and descriptors. Does not know what a field means.
"""

from collections.abc import Iterator

from google.protobuf.descriptor import Descriptor, FieldDescriptor

from wan_grpc.domain.errors import InvalidRequestError, Violation

MAX_FIELDS = 4096
"""On the wire of one request, those of its parts included. Each costs memory that its few bytes do not tell."""
_MAX_DEPTH = 16
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_FIXED_BYTES = {_FIXED64: 8, _FIXED32: 4}
_VALUE_BYTES, _SIZE_BYTES = 10, 5
"""Of a number at most: a value; a key or a length."""


class MalformedError(Exception):
    """The bytes are no message that anybody would send. Its text is written for who did."""

    def __init__(self, sentence: str = "the bytes are not a message of this method") -> None:
        super().__init__(sentence)


def check_wire(raw: bytes, message: Descriptor) -> None:
    """Look at what protobuf would make of `raw`. Costs time by the field, not by the byte.

    Raises:
        MalformedError: it cannot be read, or has more than MAX_FIELDS fields.
        InvalidRequestError: naming every text that is not UTF-8.
    """
    walk = _Walk(raw)
    walk.message(message, "", 0, len(raw), depth=0)
    if walk.found:
        raise InvalidRequestError(tuple(walk.found.values()))


class _Walk:
    """One pass over the bytes of one message."""

    def __init__(self, raw: bytes) -> None:
        self._raw = raw
        self._num_fields = 0
        self.found: dict[str, Violation] = {}

    def message(self, message: Descriptor, path: str, start: int, end: int, *, depth: int) -> None:
        if depth > _MAX_DEPTH:
            raise MalformedError
        counts: dict[int, int] = {}
        for number, wire_type, begin, stop in self._fields(start, end):
            field = message.fields_by_number.get(number)
            if field is None or wire_type != _BYTES:
                continue
            index = counts[number] = counts.get(number, -1) + 1
            name = f"{path}{field.name}[{index}]" if field.is_repeated else f"{path}{field.name}"
            if field.type == FieldDescriptor.TYPE_STRING:
                self._check_text(name, begin, stop)
            elif field.message_type is not None:
                self.message(field.message_type, f"{name}.", begin, stop, depth=depth + 1)
            elif field.is_repeated and field.type != FieldDescriptor.TYPE_BYTES:
                self._count(stop - begin)  # packed numbers, of a byte at least

    def _check_text(self, name: str, begin: int, stop: int) -> None:
        try:
            self._raw[begin:stop].decode("utf-8")
        except UnicodeDecodeError as error:
            sentence = f"is not UTF-8 from byte {error.start} on"
            self.found[name] = Violation(field=name, description=sentence, reason="NOT_UTF8")

    def _fields(self, at: int, end: int) -> Iterator[tuple[int, int, int, int]]:
        """Number, wire type, and where the value begins and stops, of each field."""
        while at < end:
            self._count(1)
            key, at = self._varint(at, end, _SIZE_BYTES)
            number, wire_type = key >> 3, key & 7
            if wire_type == _VARINT:
                _, stop = self._varint(at, end, _VALUE_BYTES)
            elif wire_type == _BYTES:
                length, at = self._varint(at, end, _SIZE_BYTES)
                stop = at + length
            elif wire_type in _FIXED_BYTES:
                stop = at + _FIXED_BYTES[wire_type]
            else:
                raise MalformedError  # a group, which no message of ours has, or nothing that there is
            if stop > end or not 0 < number <= FieldDescriptor.MAX_FIELD_NUMBER:
                raise MalformedError
            yield number, wire_type, at, stop
            at = stop

    def _varint(self, at: int, end: int, most: int) -> tuple[int, int]:
        value = 0
        for index, byte in enumerate(self._raw[at : min(end, at + most)]):
            value |= (byte & 0x7F) << 7 * index
            if byte < 0x80:
                return value, at + index + 1
        raise MalformedError

    def _count(self, num_fields: int) -> None:
        self._num_fields += num_fields
        if self._num_fields > MAX_FIELDS:
            raise MalformedError(f"the message has more than {MAX_FIELDS} fields")
