"""Tokenizer and text encoder of the small models: they know the words of captions, and spell all others.

Knows the vocabulary. Does not know what words mean; that is learned.
"""

import string
from typing import Any, Final

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import UMT5EncoderModel

from training.world import vocabulary
from wan_grpc.pipeline.published import T2V_A14B_CONFIGS
from wan_grpc.pipeline.text import umt5
from wan_grpc.pipeline.tokenizer import END, PAD, UNKNOWN, mark_end

TEXT_DIM: Final = 128
_LETTERS: Final = string.ascii_lowercase + string.digits + string.punctuation


def words_tokenizer() -> Tokenizer:
    """Lower-case words without accents. What no caption has is spelled; what cannot be spelled is unknown."""
    pieces = [PAD, END, UNKNOWN, *vocabulary(), *_LETTERS, *(f"##{letter}" for letter in _LETTERS)]
    numbers = {piece: number for number, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer = Tokenizer(models.WordPiece(vocab=numbers, unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFKD(), normalizers.StripAccents(), normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    mark_end(tokenizer)
    return tokenizer


def text_config() -> dict[str, Any]:
    """Of the published encoder, two narrow layers."""
    return {
        **T2V_A14B_CONFIGS["text_encoder/config.json"],
        "d_ff": 256,
        "d_kv": 16,
        "d_model": TEXT_DIM,
        "num_decoder_layers": 2,
        "num_heads": 8,
        "num_layers": 2,
        "vocab_size": words_tokenizer().get_vocab_size(),
    }


def make_text_model(*, seed: int) -> UMT5EncoderModel:
    """One that has learned nothing."""
    torch.manual_seed(seed)
    return umt5(text_config())


class Words:
    """Captions as tokens."""

    def __init__(self, *, num_tokens: int) -> None:
        """num_tokens: to which all are padded or cut."""
        self._tokenizer = words_tokenizer()
        self._tokenizer.enable_padding(length=num_tokens, pad_token=PAD)
        self._tokenizer.enable_truncation(num_tokens)

    def tokens(self, captions: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Their numbers and which of them there are, 1 or 0: [B, num_tokens] both."""
        encodings = self._tokenizer.encode_batch(captions)
        ids = torch.tensor([encoding.ids for encoding in encodings])
        return ids, torch.tensor([encoding.attention_mask for encoding in encodings])


def embed(model: UMT5EncoderModel, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """[B, num_tokens, TEXT_DIM] of captions, zero after the last token, as the pipelines have it."""
    embedded: torch.Tensor = model(tokens, mask).last_hidden_state
    return embedded * mask.unsqueeze(2)
