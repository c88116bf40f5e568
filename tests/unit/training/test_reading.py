"""What the text encoder learns to tell of captions."""

import random

import torch

from training.reading import Reading, batch, labels, loss, right
from training.text import Words, make_text_model
from training.world import Background, Camera, Motion, Pattern, Scene, Shape, Size, Thing

SCENE = Scene(
    things=(
        Thing(shape=Shape.STAR, colour="red", size=Size.MEDIUM, motion=Motion.UP),
        Thing(shape=Shape.CIRCLE, colour="blue", size=Size.LARGE, motion=Motion.STILL),
    ),
    background=Background(pattern=Pattern.STRIPES, colours=("white", "grey")),
    camera=Camera.FIXED,
)


def test_everything_that_is_said_is_asked() -> None:
    """Each property has a label of its own; a size that goes without saying has none, and one that is said has one."""
    silent = labels(SCENE, "a red star on the left rises and a large blue circle on the right is still")
    said = labels(SCENE, "a medium red star on the left rises and a large blue circle on the right is still")
    assert [index for index, (one, other) in enumerate(zip(silent, said, strict=True)) if one != other] == [2]
    assert silent[2] == -100
    other = Scene(things=SCENE.things[:1], background=SCENE.background)
    assert labels(other, "")[4:8] == [0, 0, 0, 0]  # there is no second thing


def test_what_is_right() -> None:
    """A caption counts when everything is read right; what is left open cannot be wrong."""
    texts, wanted = batch(random.Random(1), 16)
    assert len(texts) == 16 and len(set(texts)) > 12
    choices = 24
    perfect = [torch.eye(choices)[column.clamp(min=0)] for column in wanted.T]
    assert float(right(perfect, wanted)) == 1.0
    perfect[0] = perfect[0].roll(1, dims=1)
    assert float(right(perfect, wanted)) == 0.0


def test_it_learns_to_read() -> None:
    """The loss falls by a third, through the encoder."""
    torch.manual_seed(0)
    model, words = Reading(make_text_model(seed=1)), Words(num_tokens=48)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for step in range(40):
        parts = loss(model, words, size=16, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        parts["total"].backward()
        optimizer.step()
        losses.append(float(parts["total"].detach()))
    assert losses[-1] < 0.65 * losses[0]
    gradients = [parameter.grad for parameter in model.encoder.parameters()]
    assert all(gradient is not None and gradient.abs().max() > 0 for gradient in gradients)
