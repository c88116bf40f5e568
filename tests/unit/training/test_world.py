"""The world of the small models: scenes, what is held out, and captions."""

import random
import re

import pytest

from training.world import (
    OBJECT_COLOURS,
    RGB,
    Camera,
    Motion,
    Pattern,
    Scene,
    Shape,
    Size,
    Thing,
    caption,
    draw_scene,
    is_held_out,
    vocabulary,
)

COMBINATIONS = [
    Thing(shape=shape, colour=colour, motion=motion)
    for shape in Shape
    for colour in OBJECT_COLOURS
    for motion in Motion
    if (shape, motion) != (Shape.CIRCLE, Motion.ROTATE)
]


def draw(count: int, *, seed: int = 1, held_out: bool = False, alone: bool = False) -> list[Scene]:
    rng = random.Random(seed)
    return [draw_scene(rng, held_out=held_out, alone=alone) for _ in range(count)]


@pytest.mark.parametrize("held_out", [False, True])
def test_scenes_keep_to_their_side(held_out: bool) -> None:
    """Training never draws a combination that is held out, and tests never one that is not."""
    things = [thing for scene in draw(2000, held_out=held_out) for thing in scene.things]
    assert {is_held_out(thing) for thing in things} == {held_out}


def test_enough_is_held_out_and_enough_is_not() -> None:
    """About one in ten; each shape, colour and motion is seen in training with each of most others."""
    held_out = [thing for thing in COMBINATIONS if is_held_out(thing)]
    assert 0.06 < len(held_out) / len(COMBINATIONS) < 0.14
    for name, values in (("shape", list(Shape)), ("colour", OBJECT_COLOURS), ("motion", list(Motion))):
        for value in values:
            of_value = [thing for thing in COMBINATIONS if getattr(thing, name) == value]
            assert sum(map(is_held_out, of_value)) < 0.35 * len(of_value), value


def test_the_same_chance_gives_the_same_scenes() -> None:
    """By seed, whatever the size is drawn."""
    assert draw(50) == draw(50) != draw(50, seed=2)


def test_all_of_the_world_is_drawn() -> None:
    """Every shape, colour, size, motion, pattern and camera, one thing and two."""
    scenes = draw(3000)
    things = [thing for scene in scenes for thing in scene.things]
    assert {thing.shape for thing in things} == set(Shape)
    assert {thing.colour for thing in things} == set(OBJECT_COLOURS)
    assert {thing.size for thing in things} == set(Size)
    assert {thing.motion for thing in things} == set(Motion)
    assert {scene.background.pattern for scene in scenes} == set(Pattern)
    assert {scene.camera for scene in scenes} == set(Camera)
    assert {len(scene.things) for scene in scenes} == {1, 2}
    assert {colour for scene in scenes for colour in scene.background.colours} == set(RGB)


def test_scenes_can_be_told_apart() -> None:
    """No thing has a colour of another or of its background; a circle does not turn; things beside each other stay."""
    for scene in draw(3000):
        colours = [thing.colour for thing in scene.things] + list(scene.background.colours)
        assert len(set(colours)) == len(colours)
        assert not any(thing.shape is Shape.CIRCLE and thing.motion is Motion.ROTATE for thing in scene.things)
        if len(scene.things) == 2:
            crossing = {Motion.LEFT, Motion.RIGHT, Motion.ORBIT}
            assert not crossing & {thing.motion for thing in scene.things}
        if scene.camera is not Camera.FIXED:
            assert scene.background.pattern in {Pattern.STRIPES, Pattern.CHECKERBOARD}


def test_captions_say_what_is_seen() -> None:
    """Colours, shapes and directions of every thing are named, in words of the vocabulary alone."""
    rng, words = random.Random(3), set(vocabulary())
    for scene in draw(2000):
        said = re.findall(r"\w+", caption(scene, rng))
        assert set(said) <= words
        for thing in scene.things:
            assert thing.colour in said and thing.shape in said
            assert (thing.size is Size.LARGE) <= bool({"large", "big"} & set(said))
        assert set(scene.background.colours) <= set(said)
        assert (scene.camera is not Camera.FIXED) == ("camera" in said)
        motions = {thing.motion for thing in scene.things}
        if len(scene.things) == 1 and scene.camera is Camera.FIXED and motions == {Motion.LEFT}:
            assert said[-1] != "right" and "left" in said


def test_captions_differ() -> None:
    """The same scene is said in many ways, and no two motions in the same words."""
    scene = draw(1)[0]
    rng = random.Random(0)
    assert len({caption(scene, rng) for _ in range(100)}) >= 10
    plain = {
        motion: {
            caption(
                Scene(things=(Thing(shape=Shape.STAR, colour="red", motion=motion),), background=scene.background), rng
            )
            for _ in range(200)
        }
        for motion in Motion
    }
    texts = [text for said in plain.values() for text in said]
    assert len(texts) == len(set(texts))
