"""Prompts as embeddings.

Knows how diffusers cleans, tokenizes, encodes and pads a prompt, remembers recent ones, and where somebody may divide
the work on several. Knows no guidance and no ranks.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final, TypeAlias

import torch
from transformers import PreTrainedTokenizerBase, UMT5Config, UMT5EncoderModel

from wan_grpc.pipeline.prompt import clean

NUM_TOKENS: Final = 512
NUM_REMEMBERED: Final = 16
"""Prompts kept: 4 MB each on the device with UMT5-XXL in bf16."""

EncodeText: TypeAlias = Callable[[str], torch.Tensor]
"""A cleaned text's embedding, [1, 512, text_dim], computed on this device."""

Spread: TypeAlias = Callable[[Sequence[str], EncodeText], Iterator[torch.Tensor]]
"""Has texts encoded, here or elsewhere: their embeddings, in order, each as soon as it is there."""


def umt5(config: Mapping[str, Any]) -> UMT5EncoderModel:
    """The encoder with the weights that it is born with: one embedding table, which files name once or twice."""
    model = UMT5EncoderModel(UMT5Config.from_dict(dict(config)))
    model.encoder.embed_tokens = model.shared
    return model


def in_turn(texts: Sequence[str], encode: EncodeText) -> Iterator[torch.Tensor]:
    """Each text on this device, not before it is asked for."""
    return map(encode, texts)


class TextEncoder:
    """UMT5 on one device, with a small memory of prompts.

    Where `spread` divides work between ranks, they must remember the same prompts: all of them call the same methods
    in the same order, and `forget` when one of them may have failed in the middle.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, model: UMT5EncoderModel, *, num_remembered: int = NUM_REMEMBERED
    ) -> None:
        self.tokenizer = tokenizer
        self.model = model
        self.spread: Spread = in_turn
        """Who encodes texts that are not remembered: this device, unless somebody divides them."""
        self._num_remembered = num_remembered
        self._remembered: OrderedDict[str, torch.Tensor] = OrderedDict()

    def encode(self, prompt: str) -> torch.Tensor:
        """[1, 512, text_dim], zero after the prompt's last token; what is longer than 512 tokens is cut off."""
        [embedding] = self.encode_all([prompt])
        return embedding

    def encode_all(self, prompts: Sequence[str]) -> Iterator[torch.Tensor]:
        """What `encode` makes of each prompt, in order. Nothing is begun before the first is asked for."""
        texts = [clean(prompt) for prompt in prompts]
        # Kept here, so that remembering one prompt of a request does not drive out another.
        known = {text: self._remembered[text] for text in texts if text in self._remembered}
        computed = self.spread([text for text in dict.fromkeys(texts) if text not in known], self._compute)
        for text in texts:
            if text not in known:
                known[text] = next(computed)
            self._remember(text, known[text])
            yield known[text]

    def forget(self) -> None:
        """Remember no prompt."""
        self._remembered.clear()

    def blank(self) -> torch.Tensor:
        """The embedding of no token: zeros, of the shape, dtype and device of every embedding."""
        return torch.zeros((1, NUM_TOKENS, self.model.config.d_model), dtype=self.model.dtype, device=self.model.device)

    def _remember(self, text: str, embedding: torch.Tensor) -> None:
        self._remembered[text] = embedding
        self._remembered.move_to_end(text)
        while len(self._remembered) > self._num_remembered:
            self._remembered.popitem(last=False)

    @torch.no_grad()
    def _compute(self, text: str) -> torch.Tensor:
        tokens = self.tokenizer(
            [text], padding="max_length", max_length=NUM_TOKENS, truncation=True, return_tensors="pt"
        )
        mask = tokens["attention_mask"]
        num_tokens = int(mask.sum())
        device = self.model.device
        encoded = self.model(tokens["input_ids"].to(device), mask.to(device)).last_hidden_state
        embedding = self.blank()
        embedding[:, :num_tokens] = encoded[:, :num_tokens]
        return embedding
