"""How the text encoder learns: from its embedding of a caption all that the caption says of its scene is read off.

Knows what a caption says. Does not know how anything looks.
"""

import random
from collections.abc import Mapping, Sequence
from typing import Final

import torch
import torch.nn.functional as F
from torch import nn
from transformers import UMT5EncoderModel

from training.text import TEXT_DIM, Words
from training.world import OBJECT_COLOURS, RGB, Camera, Motion, Pattern, Scene, Shape, Size, caption, draw_scene

_NOTHING: Final = "nothing"
_SIDES: Final = ("first", "second")
_CHOICES: Final[dict[str, tuple[str, ...]]] = {
    **{
        f"{side} {what}": (_NOTHING, *values)
        for side in _SIDES
        for what, values in (
            ("colour", OBJECT_COLOURS),
            ("shape", tuple(Shape)),
            ("size", tuple(Size)),
            ("motion", tuple(Motion)),
        )
    },
    "pattern": tuple(Pattern),
    "one colour": tuple(RGB),
    "other colour": (_NOTHING, *RGB),
    "camera": tuple(Camera),
}
"""What can be said of each property of a scene."""
_UNSAID: Final = -100
"""The label of what a caption leaves open, which torch passes over."""


def labels(scene: Scene, text: str) -> list[int]:
    """The index of what is said of each property; a size that is not among the words is not asked for."""
    values: dict[str, str] = dict.fromkeys(_CHOICES, _NOTHING)
    for side, thing in zip(_SIDES, scene.things, strict=False):
        values |= {
            f"{side} colour": thing.colour,
            f"{side} shape": thing.shape,
            f"{side} size": thing.size,
            f"{side} motion": thing.motion,
        }
    values |= {"pattern": scene.background.pattern, "camera": scene.camera, "one colour": scene.background.colours[0]}
    if len(scene.background.colours) > 1:
        values["other colour"] = scene.background.colours[1]
    return [
        _UNSAID
        if name.endswith("size") and values[name] == Size.MEDIUM and Size.MEDIUM not in text
        else choices.index(values[name])
        for name, choices in _CHOICES.items()
    ]


class Reader(nn.Module):
    """Asks an embedding one question a property, as an expert does: by attention of a learned query to its tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(len(_CHOICES), TEXT_DIM) * TEXT_DIM**-0.5)
        self.attention = nn.MultiheadAttention(TEXT_DIM, num_heads=4, batch_first=True)
        self.answers = nn.ModuleList(nn.Linear(TEXT_DIM, len(choices)) for choices in _CHOICES.values())

    def forward(self, embedded: torch.Tensor, mask: torch.Tensor) -> list[torch.Tensor]:
        """Logits of each property, [B, choices], from [B, T, TEXT_DIM] and which of the tokens there are, [B, T]."""
        queries = self.queries.expand(len(embedded), -1, -1)
        read, _ = self.attention(queries, embedded, embedded, key_padding_mask=~mask.bool(), need_weights=False)
        return [answer(read[:, index]) for index, answer in enumerate(self.answers)]


class Reading(nn.Module):
    """The encoder with its reader; the encoder alone is kept."""

    def __init__(self, encoder: UMT5EncoderModel) -> None:
        super().__init__()
        self.encoder = encoder
        self.reader = Reader()

    def forward(self, tokens: torch.Tensor, mask: torch.Tensor) -> list[torch.Tensor]:
        answers: list[torch.Tensor] = self.reader(self.encoder(tokens, mask).last_hidden_state, mask)
        return answers


def batch(rng: random.Random, size: int) -> tuple[list[str], torch.Tensor]:
    """Captions of any scenes, held-out combinations among them: words are no pictures. Labels: [size, properties]."""
    scenes = [draw_scene(rng, held_out=rng.random() < 0.1) for _ in range(size)]
    texts = [caption(scene, rng) for scene in scenes]
    return texts, torch.tensor([labels(scene, text) for scene, text in zip(scenes, texts, strict=True)])


def loss(model: Reading, words: Words, *, size: int, generator: torch.Generator) -> Mapping[str, torch.Tensor]:
    """`total`: cross-entropy of all properties; `right`: share of captions of which everything is read right."""
    texts, wanted = batch(random.Random(generator.initial_seed()), size)
    tokens, mask = (value.to(generator.device) for value in words.tokens(texts))
    wanted = wanted.to(generator.device)
    answers = model(tokens, mask)
    total = torch.stack(
        [F.cross_entropy(answer, wanted[:, index], ignore_index=_UNSAID) for index, answer in enumerate(answers)]
    ).sum()
    return {"total": total, "right": right(answers, wanted)}


def right(answers: Sequence[torch.Tensor], wanted: torch.Tensor) -> torch.Tensor:
    """Share of captions of which every property is read as it was said."""
    read = torch.stack([answer.argmax(1) for answer in answers], dim=1)
    return ((read == wanted) | (wanted == _UNSAID)).all(1).float().mean()
