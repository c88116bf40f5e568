"""A checkpoint's tokenizer, and one that needs no files: every byte of UTF-8 is a token, so that no text is unknown.

Knows which files make one. Imports no torch: the server process counts tokens too.
"""

import base64
from pathlib import Path
from typing import Any, Final

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from wan_grpc.domain.errors import UnusableModelError
from wan_grpc.pipeline.layout import read_json
from wan_grpc.pipeline.spiece import NUM_EXTRA, read_spiece, sentinels, t5_tokenizer

PAD, END, UNKNOWN = "<pad>", "</s>", "<unk>"
PAD_ID, END_ID, UNKNOWN_ID = range(3)
BYTE_VOCAB_SIZE: Final = 3 + 256
TOKENIZER_CONFIG: Final[dict[str, Any]] = {
    "eos_token": END,
    "model_max_length": 512,
    "pad_token": PAD,
    "tokenizer_class": "PreTrainedTokenizerFast",
    "unk_token": UNKNOWN,
}
"""What tokenizer_config.json says beside a byte tokenizer's tokenizer.json."""
_T5_CLASSES: Final = ("T5Tokenizer", "T5TokenizerFast")


def byte_tokenizer() -> Tokenizer:
    """Bytes between a beginning that T5 does not mark and the end that it does."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate((PAD, END, UNKNOWN, *alphabet))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    mark_end(tokenizer)
    return tokenizer


def mark_end(tokenizer: Tokenizer) -> None:
    """Let texts end as T5 ends them, and make the three tokens special that every vocabulary here begins with."""
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {END}", pair=f"$A {END} $B {END}", special_tokens=[(END, END_ID)]
    )
    tokenizer.add_special_tokens([PAD, END, UNKNOWN])


def read_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer in `folder`, which splits text as the class that its files name does; it neither cuts nor pads.

    Raises:
        UnusableModelError: a file is broken, or there is none.
    """
    config = _object(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").exists() else {}
    if not (folder / "tokenizer.json").is_file():
        return _from_spiece(folder / "spiece.model", config)
    description = _object(folder / "tokenizer.json")
    try:
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        if config.get("tokenizer_class") in _T5_CLASSES and description["model"]["type"] == "Unigram":
            tokenizer = _as_t5(description, num_extra=_num_extra(config))
    except Exception as error:  # the library raises nothing narrower
        raise UnusableModelError(f"{folder / 'tokenizer.json'} is not a tokenizer: {error}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _object(path: Path) -> dict[str, Any]:
    value, trouble = read_json(path)
    if value is None:
        raise UnusableModelError(f"{path} {trouble}")
    return value


def _from_spiece(path: Path, config: dict[str, Any]) -> Tokenizer:
    try:
        return read_spiece(path.read_bytes(), num_extra=_num_extra(config))
    except OSError as error:
        raise UnusableModelError(f"{path} cannot be read: {error}") from error
    except ValueError as error:
        raise UnusableModelError(f"{path} {error}") from error


def _num_extra(config: dict[str, Any]) -> int:
    num_extra = config.get("extra_ids")
    return num_extra if isinstance(num_extra, int) else NUM_EXTRA


def _as_t5(description: dict[str, Any], *, num_extra: int) -> Tokenizer:
    """T5's class takes the vocabulary of a tokenizer.json, and puts its own pipeline and sentinels around it."""
    normalizer = description["normalizer"] or {}
    steps = normalizer.get("normalizers", [normalizer])
    maps = [step["precompiled_charsmap"] for step in steps if step.get("type") == "Precompiled"]
    added = [AddedToken(**{key: token[key] for key in _FLAGS}) for token in description["added_tokens"]]
    added += sentinels(num_extra)
    pieces = [(piece, score) for piece, score in description["model"]["vocab"]]
    return t5_tokenizer(pieces, base64.b64decode(maps[0]) if maps else None, added)


_FLAGS: Final = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")
