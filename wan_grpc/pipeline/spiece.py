"""SentencePiece models (spiece.model) as tokenizers, in the way T5's tokenizer has them.

Knows the few fields of the model's protobuf messages that matter for that. Needs neither sentencepiece nor protobuf.
"""

import struct
from collections.abc import Iterable, Iterator, Sequence
from typing import Final, TypeAlias

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

Piece: TypeAlias = tuple[str, float]
"""A token and the logarithm of its probability."""

_NO_MODEL: Final = "is no SentencePiece model, or not whole"
_UNIGRAM: Final = 1
_CONTROL: Final = 3
NUM_EXTRA: Final = 100
"""Sentinels that T5 has unless told."""
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_WIDTHS: Final = {_FIXED64: 8, _FIXED32: 4}


def read_spiece(data: bytes, *, num_extra: int = NUM_EXTRA) -> Tokenizer:
    """The tokenizer in the bytes of a spiece.model.

    num_extra: sentinels, which come after the model's own pieces.

    Raises:
        ValueError: it is no SentencePiece model, or not of the unigram kind.
    """
    pieces: list[Piece] = []
    special: list[str] = []
    charsmap = b""
    for number, value in _fields(data):
        match number, value:
            case 1, bytes():
                piece, score, kind = _piece(value)
                pieces.append((piece, score))
                special += [piece] if kind == _CONTROL else []
            case 2, bytes() if dict(_fields(value)).get(3, _UNIGRAM) != _UNIGRAM:
                raise ValueError("is not of the unigram kind")
            case 3, bytes():
                charsmap = _bytes(dict(_fields(value)).get(2, b""))
    extra = sentinels(num_extra)
    added = [*(AddedToken(token, normalized=False, special=True) for token in special), *extra]
    return t5_tokenizer([*pieces, *((token.content, 0.0) for token in extra)], charsmap, added)


def sentinels(number: int) -> list[AddedToken]:
    """T5's `<extra_id_0>` and so on, the highest first, as they stand in its vocabulary."""
    return [AddedToken(f"<extra_id_{index}>", normalized=False, special=True) for index in reversed(range(number))]


def t5_tokenizer(pieces: Sequence[Piece], charsmap: bytes | None, added: Iterable[AddedToken]) -> Tokenizer:
    """The pipeline that transformers' T5Tokenizer builds around a vocabulary, whatever stands in its files.

    charsmap: SentencePiece's normalization, compiled.

    Raises:
        ValueError: the pieces make no vocabulary of T5, which begins with padding, end and unknown.
    """
    ids = {token: index for index, (token, _) in enumerate(pieces)}
    if len(pieces) < 3 or "</s>" not in ids:
        raise ValueError("has no vocabulary that ends texts with </s>")
    tokenizer = Tokenizer(models.Unigram(list(pieces), unk_id=2, byte_fallback=False))
    if charsmap:
        tokenizer.normalizer = normalizers.Precompiled(charsmap)
    words = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always", split=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), words])
    tokenizer.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="always", split=True)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=["$A", "</s>"], pair=["$A", "</s>", "$B", "</s>"], special_tokens=[("</s>", ids["</s>"])]
    )
    tokenizer.add_tokens(list(added))
    return tokenizer


def _piece(data: bytes) -> tuple[str, float, int]:
    fields = dict(_fields(data))
    kind = fields.get(3, 1)
    try:
        (score,) = struct.unpack("<f", _bytes(fields.get(2, bytes(4))))
        text = _bytes(fields.get(1, b"")).decode()
    except (struct.error, UnicodeDecodeError) as error:
        raise ValueError(_NO_MODEL) from error
    if not isinstance(kind, int):
        raise ValueError(_NO_MODEL)
    return text, score, kind


def _bytes(value: int | bytes) -> bytes:
    if not isinstance(value, bytes):
        raise ValueError(_NO_MODEL)
    return value


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Number and value of each field of a protobuf message: an int where it is a varint."""
    position = 0
    while position < len(data):
        key, position = _varint(data, position)
        number, kind = key >> 3, key & 7
        value, position = _varint(data, position) if kind in {_VARINT, _BYTES} else (_WIDTHS.get(kind, -1), position)
        if kind == _VARINT:
            yield number, value
            continue
        if value < 0 or position + value > len(data):
            raise ValueError(_NO_MODEL)
        yield number, data[position : position + value]
        position += value


def _varint(data: bytes, position: int) -> tuple[int, int]:
    """A number and the position after it."""
    value = 0
    for shift in range(0, 70, 7):
        if position == len(data):
            break
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
    raise ValueError(_NO_MODEL)
