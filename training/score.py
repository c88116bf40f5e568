"""How well a model does what captions say: colour, shape and motion of its clips, over captions that it never saw.

Knows captions and the judge. Does not know who generates.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch

from training.judge import Verdict, verdict
from training.world import Scene, caption, draw_scene

Generate: TypeAlias = Callable[[list[str], list[int]], list[torch.Tensor]]
"""Captions and a seed each to clips, uint8 [T, H, W, 3]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """Shares of captions, 0 to 1."""

    count: int
    colour: float
    motion: float
    shape: float
    everything: float

    def __str__(self) -> str:
        return (
            f"of {self.count} captions colour {self.colour:.0%}, motion {self.motion:.0%}, shape {self.shape:.0%}, "
            f"everything {self.everything:.0%}"
        )


def questions(count: int, *, seed: int) -> list[tuple[Scene, str]]:
    """Scenes of one thing before a fixed camera, in combinations that no training clip shows, with a caption each.

    Each depends on its own number alone, so that fewer are the first of more.
    """
    rngs = [random.Random(f"{seed}/{index}") for index in range(count)]
    return [(scene := draw_scene(rng, held_out=True, alone=True), caption(scene, rng)) for rng in rngs]


def examine(
    generate: Generate, count: int, *, seed: int = 0, at_once: int = 50
) -> tuple[Score, list[tuple[Scene, str, Verdict, torch.Tensor]]]:
    """The score, and every answer with its verdict. at_once: captions of one call of `generate`."""
    asked = questions(count, seed=seed)
    answers = []
    for first in range(0, count, at_once):
        some = asked[first : first + at_once]
        clips = generate([text for _, text in some], list(range(first, first + len(some))))
        answers += [(scene, text, verdict(clip, scene), clip) for (scene, text), clip in zip(some, clips, strict=True)]
    return score([answer[2] for answer in answers]), answers


def score(verdicts: Sequence[Verdict]) -> Score:
    """The shares of all that were right."""
    count = len(verdicts)
    return Score(
        count=count,
        colour=sum(each.colour for each in verdicts) / count,
        motion=sum(each.motion for each in verdicts) / count,
        shape=sum(each.shape for each in verdicts) / count,
        everything=sum(each.colour and each.motion and each.shape for each in verdicts) / count,
    )
