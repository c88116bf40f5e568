import base64
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerBase, T5Tokenizer
from transformers.utils import sentencepiece_model_pb2_new as spm

from wan_grpc.domain.errors import UnusableModelError
from wan_grpc.pipeline.checkpoint import Checkpoint
from wan_grpc.pipeline.load import load_tokenizer
from wan_grpc.pipeline.prompt import clean, token_counter
from wan_grpc.pipeline.published import T2V_A14B_ID
from wan_grpc.pipeline.spiece import read_spiece
from wan_grpc.pipeline.tokenizer import TOKENIZER_CONFIG, byte_tokenizer, read_tokenizer

PIECES = [
    ("<pad>", 0.0),
    ("</s>", 0.0),
    ("<unk>", 0.0),
    *(
        (piece, -2.0 - index / 4)
        for index, piece in enumerate(["▁a", "▁", "cat", "s", "▁walk", "ing", "é", "▁猫", "a"])
    ),
]
TEXTS = [
    "A cat",
    "",
    "a cats  walking",
    "caf&eacute; 猫 🐈",
    "walking" * 300,
    "<extra_id_0> a </s> cat",
    "\u200ba\u3000",
]
SETTINGS = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}


def unigram(*, is_split: bool) -> Tokenizer:
    """A tokenizer as SentencePiece models become ones: what comes before the words differs from class to class."""
    tokenizer = Tokenizer(models.Unigram(PIECES, unk_id=2))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace("  ", " ")])
    words = pre_tokenizers.Metaspace()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), words]) if is_split else words
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer.add_special_tokens(["<pad>", "</s>", "<unk>"])
    tokenizer.enable_truncation(512)
    tokenizer.enable_padding(length=512)
    return tokenizer


def write(folder: Path, tokenizer: Tokenizer, config: dict[str, Any]) -> None:
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def spiece(**trainer: Any) -> bytes:
    """A SentencePiece model as SentencePiece itself would write it."""
    kinds = {"<pad>": 3, "</s>": 3, "<unk>": 2}
    model = spm.ModelProto(
        pieces=[{"piece": piece, "score": score, "type": kinds.get(piece, 1)} for piece, score in PIECES],
        trainer_spec={"model_type": 1, "unk_id": 2, "byte_fallback": True, **trainer},
        normalizer_spec={"name": "identity", "add_dummy_prefix": True},
    )
    return model.SerializeToString()


def write_spiece(folder: Path) -> None:
    folder.mkdir(parents=True)
    (folder / "spiece.model").write_bytes(spiece())


TOKENIZERS: dict[str, Callable[[Path], None]] = {
    "bytes": lambda folder: write(folder, byte_tokenizer(), TOKENIZER_CONFIG),
    "unigram": lambda folder: write(
        folder, unigram(is_split=False), {"tokenizer_class": "PreTrainedTokenizerFast", **SETTINGS}
    ),
    "T5": lambda folder: write(folder, unigram(is_split=False), {"tokenizer_class": "T5Tokenizer", **SETTINGS}),
    "T5 of old": lambda folder: write(
        folder, unigram(is_split=True), {"tokenizer_class": "T5TokenizerFast", "extra_ids": 7, **SETTINGS}
    ),
    "spiece": write_spiece,
}


def checkpoint_with(directory: Path, make: Callable[[Path], None]) -> Checkpoint:
    make(directory / "tokenizer")
    return Checkpoint(model_path=str(directory), directory=str(directory))


@pytest.fixture(scope="module", params=TOKENIZERS)
def both(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Callable[[str], int], PreTrainedTokenizerBase]:
    """The server's counter and the ranks' tokenizer, of one checkpoint."""
    checkpoint = checkpoint_with(tmp_path_factory.mktemp("model"), TOKENIZERS[request.param])
    return token_counter(checkpoint), load_tokenizer(checkpoint)


def test_the_server_counts_what_the_ranks_read(both: tuple[Callable[[str], int], PreTrainedTokenizerBase]) -> None:
    """The same number of tokens, the end included, with nothing cut off: texts of every kind."""
    count, tokenizer = both
    assert [count(text) for text in TEXTS] == [len(tokenizer(clean(text)).input_ids) for text in TEXTS]


@settings(max_examples=200, deadline=None)
@given(text=st.text(st.sampled_from("acts walking é猫\u3000\u200b\n<_0>/&;ﬁ"), max_size=40))
def test_the_server_counts_any_text_as_the_ranks_do(
    both: tuple[Callable[[str], int], PreTrainedTokenizerBase], text: str
) -> None:
    """Words, spaces of every width, half tokens and entities."""
    count, tokenizer = both
    assert count(text) == len(tokenizer(clean(text)).input_ids)


def test_a_spiece_model_is_read_as_t5_reads_it(tmp_path: Path) -> None:
    """With the same pieces, transformers' own class makes the same tokens of every text."""
    ours = load_tokenizer(checkpoint_with(tmp_path, write_spiece))
    pieces = [*PIECES, *((f"<extra_id_{index}>", 0.0) for index in reversed(range(100)))]
    theirs = T5Tokenizer(vocab=pieces)
    assert [ours(text).input_ids for text in TEXTS] == [theirs(text).input_ids for text in TEXTS]


def test_normalization_that_sentencepiece_compiled_is_kept(tmp_path: Path) -> None:
    """Its table is handed on as it is, from a spiece.model and from a tokenizer.json among other steps."""
    table = b"\x04" + bytes(7)
    model = spm.ModelProto.FromString(spiece())
    model.normalizer_spec.precompiled_charsmap = table
    old = unigram(is_split=False)
    old.normalizer = normalizers.Sequence([normalizers.Precompiled(table), normalizers.Replace("  ", " ")])
    write(tmp_path / "tokenizer", old, {"tokenizer_class": "T5Tokenizer"})
    for tokenizer in (read_spiece(model.SerializeToString()), read_tokenizer(tmp_path / "tokenizer")):
        assert json.loads(tokenizer.to_str())["normalizer"] == {
            "type": "Precompiled",
            "precompiled_charsmap": base64.b64encode(table).decode(),
        }


def test_random_weights_need_no_tokenizer() -> None:
    """Without files, both sides take bytes for tokens."""
    checkpoint = Checkpoint(model_path=T2V_A14B_ID, directory=None)
    assert token_counter(checkpoint)("A cat") == len("A cat") + 1 == len(load_tokenizer(checkpoint)("A cat").input_ids)


def broken(name: str, content: bytes) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        write(folder, unigram(is_split=True), {"tokenizer_class": "T5Tokenizer"})
        if name == "spiece.model":
            (folder / "tokenizer.json").unlink()
        (folder / name).write_bytes(content)

    return make


FAULTS = {
    "no JSON": (broken("tokenizer.json", b"{"), "tokenizer.json cannot be read: "),
    "no object": (broken("tokenizer.json", b"[]"), "tokenizer.json is not a JSON object"),
    "no tokenizer": (broken("tokenizer.json", b"{}"), "tokenizer.json is not a tokenizer: "),
    "no config": (broken("tokenizer_config.json", b"oops"), "tokenizer_config.json cannot be read: "),
    "not whole": (broken("spiece.model", spiece()[:-5]), "spiece.model is no SentencePiece model, or not whole"),
    "no message": (broken("spiece.model", b"\x0f\x01"), "spiece.model is no SentencePiece model, or not whole"),
    "another message": (broken("spiece.model", b"\x0a\x02\x15\x00"), "spiece.model is no SentencePiece model, or"),
    "no end of a number": (broken("spiece.model", b"\xff" * 12), "spiece.model is no SentencePiece model, or not"),
    "empty": (broken("spiece.model", b""), "spiece.model has no vocabulary that ends texts with </s>"),
    "BPE": (broken("spiece.model", spiece(model_type=2)), "spiece.model is not of the unigram kind"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_broken_tokenizer_is_refused_by_its_name(name: str, tmp_path: Path) -> None:
    """At the start of a server, not at the first prompt."""
    make, sentence = FAULTS[name]
    with pytest.raises(UnusableModelError) as refused:
        token_counter(checkpoint_with(tmp_path, make))
    assert f"{tmp_path}/tokenizer/{sentence}" in str(refused.value)


@pytest.mark.parametrize("make", [TOKENIZERS["T5"], write_spiece], ids=["tokenizer.json", "spiece.model"])
def test_counting_imports_no_torch(make: Callable[[Path], None], tmp_path: Path) -> None:
    """The server process counts with the tokenizers library alone."""
    checkpoint_with(tmp_path, make)
    code = (
        "import sys; from wan_grpc.pipeline.checkpoint import Checkpoint\n"
        "from wan_grpc.pipeline.prompt import token_counter\n"
        f"count = token_counter(Checkpoint(model_path='x', directory={str(tmp_path)!r}))\n"
        "print(count('a cat'), {'torch', 'transformers', 'numpy', 'google.protobuf'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "4 set()"
