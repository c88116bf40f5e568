"""Words and their embeddings."""

import random

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from training.text import TEXT_DIM, Words, embed, make_text_model, words_tokenizer
from training.world import caption, draw_scene
from wan_grpc.pipeline.text import TextEncoder
from wan_grpc.pipeline.tokenizer import END, PAD, UNKNOWN


def test_captions_are_words() -> None:
    """One token a word of a caption and of its punctuation, whatever the case."""
    tokenizer, rng = words_tokenizer(), random.Random(1)
    for _ in range(300):
        text = caption(draw_scene(rng), rng)
        words = text.replace(",", " ,").split()
        assert tokenizer.encode(text).tokens == [*words, END]
        assert tokenizer.encode(text.upper()).ids == tokenizer.encode(text).ids


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("A red raccoon", "a red r ##a ##c ##c ##o ##o ##n </s>"),
        ("café 42", "c ##a ##f ##e 4 ##2 </s>"),
        ("一只猫 red", "<unk> red </s>"),
        ("", "</s>"),
    ],
)
def test_all_other_words_are_spelled(text: str, tokens: str) -> None:
    """Letters, without accents; what has no letters of this alphabet is unknown, and nothing raises."""
    assert words_tokenizer().encode(text).tokens == tokens.split()


def test_embeddings_are_those_of_the_server() -> None:
    """Padded further they are what the server's text encoder makes of the same tokenizer and weights."""
    model = make_text_model(seed=3).eval().requires_grad_(False)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=words_tokenizer(), eos_token=END, pad_token=PAD, unk_token=UNKNOWN, model_max_length=512
    )
    texts = ["a red circle moves right on a blue background", "", "a curious raccoon"]
    embedded = embed(model, *Words(num_tokens=48).tokens(texts))
    expected = torch.cat(list(TextEncoder(fast, model).encode_all(texts)))
    assert embedded.shape == (3, 48, TEXT_DIM) and expected.shape == (3, 512, TEXT_DIM)
    assert (embedded - expected[:, :48]).abs().max() < 1e-5
    assert expected[:, 48:].abs().max() == 0
