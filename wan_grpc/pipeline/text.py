"""Prompts as embeddings.

Knows how diffusers cleans, tokenizes, encodes and pads a prompt, and remembers recent ones. Knows no guidance.
"""

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, Final

import torch
from transformers import PreTrainedTokenizerBase, UMT5Config, UMT5EncoderModel

from wan_grpc.pipeline.prompt import clean

NUM_TOKENS: Final = 512
NUM_REMEMBERED: Final = 16
"""Prompts kept: 4 MB each on the device with UMT5-XXL in bf16."""


def umt5(config: Mapping[str, Any]) -> UMT5EncoderModel:
    """The encoder with the weights that it is born with: one embedding table, which files name once or twice."""
    model = UMT5EncoderModel(UMT5Config.from_dict(dict(config)))
    model.encoder.embed_tokens = model.shared
    return model


class TextEncoder:
    """UMT5 on one device, with a small memory of prompts."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, model: UMT5EncoderModel, *, num_remembered: int = NUM_REMEMBERED
    ) -> None:
        self.tokenizer = tokenizer
        self.model = model
        self._num_remembered = num_remembered
        self._remembered: OrderedDict[str, torch.Tensor] = OrderedDict()

    def encode(self, prompt: str) -> torch.Tensor:
        """[1, 512, text_dim], zero after the prompt's last token; what is longer than 512 tokens is cut off."""
        text = clean(prompt)
        embedding = self._remembered.pop(text, None)
        if embedding is None:
            embedding = self._compute(text)
        self._remembered[text] = embedding
        while len(self._remembered) > self._num_remembered:
            self._remembered.popitem(last=False)
        return embedding

    @torch.no_grad()
    def _compute(self, text: str) -> torch.Tensor:
        tokens = self.tokenizer(
            [text], padding="max_length", max_length=NUM_TOKENS, truncation=True, return_tensors="pt"
        )
        mask = tokens["attention_mask"]
        num_tokens = int(mask.sum())
        device = self.model.device
        encoded = self.model(tokens["input_ids"].to(device), mask.to(device)).last_hidden_state
        embedding: torch.Tensor = torch.zeros_like(encoded)
        embedding[:, :num_tokens] = encoded[:, :num_tokens]
        return embedding
