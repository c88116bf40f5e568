"""A tokenizer that needs no files: every byte of UTF-8 is a token, so that no text is unknown to it."""

from typing import Any, Final

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

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


def byte_tokenizer() -> Tokenizer:
    """Bytes between a beginning that T5 does not mark and the end that it does."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate((PAD, END, UNKNOWN, *alphabet))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {END}", pair=f"$A {END} $B {END}", special_tokens=[(END, END_ID)]
    )
    tokenizer.add_special_tokens([PAD, END, UNKNOWN])
    return tokenizer
