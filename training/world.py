"""The world of the small models: what can be seen in a clip, what is drawn at random, and which words say it.

Knows names and chances. Does not know pixels.
"""

import hashlib
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

RGB: Final[dict[str, tuple[int, int, int]]] = {
    "red": (220, 35, 40),
    "orange": (245, 140, 25),
    "yellow": (245, 225, 60),
    "green": (40, 160, 70),
    "cyan": (70, 210, 215),
    "blue": (45, 80, 215),
    "purple": (125, 50, 180),
    "pink": (250, 150, 200),
    "white": (245, 245, 245),
    "black": (20, 20, 22),
    "grey": (128, 128, 128),
}
OBJECT_COLOURS: Final = tuple(colour for colour in RGB if colour != "grey")
"""A grey thing is too easily a shadow."""


class Shape(StrEnum):
    CIRCLE = "circle"
    SQUARE = "square"
    TRIANGLE = "triangle"
    STAR = "star"


class Size(StrEnum):
    SMALL = "small"
    MEDIUM = "medium"
    LARGE = "large"


class Motion(StrEnum):
    LEFT = "left"
    RIGHT = "right"
    UP = "up"
    DOWN = "down"
    BOUNCE = "bounce"
    ORBIT = "orbit"
    GROW = "grow"
    SHRINK = "shrink"
    ROTATE = "rotate"
    APPEAR = "appear"
    STILL = "still"


class Pattern(StrEnum):
    PLAIN = "plain"
    GRADIENT = "gradient"
    STRIPES = "stripes"
    CHECKERBOARD = "checkerboard"


class Camera(StrEnum):
    FIXED = "fixed"
    PAN_LEFT = "pan left"
    PAN_RIGHT = "pan right"
    ZOOM_IN = "zoom in"
    ZOOM_OUT = "zoom out"


BESIDE_ANOTHER: Final = frozenset(
    {
        Motion.UP,
        Motion.DOWN,
        Motion.BOUNCE,
        Motion.GROW,
        Motion.SHRINK,
        Motion.ROTATE,
        Motion.APPEAR,
        Motion.STILL,
    }
)
"""Motions that keep to one half of the picture."""
UNDER_A_MOVING_CAMERA: Final = frozenset({Motion.STILL, Motion.ROTATE})
"""Motions that stay recognisable while everything moves."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Thing:
    """One object."""

    shape: Shape
    colour: str
    size: Size = Size.MEDIUM
    motion: Motion


@dataclass(frozen=True, slots=True, kw_only=True)
class Background:
    """What is behind the objects. Two colours where the pattern has two; a gradient is light and dark of one."""

    pattern: Pattern
    colours: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """All that a caption can say of a clip."""

    things: tuple[Thing, ...]
    """One, or the left and the right one."""
    background: Background
    camera: Camera = Camera.FIXED


# ---- chance ---------------------------------------------------------------------------------------------------------

_HELD_OUT_OF: Final = 10


def is_held_out(thing: Thing) -> bool:
    """Whether no training clip shows a thing of this shape and colour in this motion: one of ten combinations."""
    name = f"{thing.shape}/{thing.colour}/{thing.motion}"
    return hashlib.sha256(name.encode()).digest()[0] % _HELD_OUT_OF == 0


def draw_scene(rng: random.Random, *, held_out: bool = False, alone: bool = False) -> Scene:
    """A scene at random, of things that are held out of training or of those that are not.

    alone: one thing before a fixed camera.
    """
    num_things = 1 if alone or rng.random() < _ALONE else 2
    camera = Camera.FIXED if alone or rng.random() < _FIXED_CAMERA else rng.choice(list(Camera)[1:])
    motions = [motion for motion in Motion if _suits(motion, num_things, camera)]
    things: list[Thing] = []
    while len(things) < num_things:
        colours = [colour for colour in OBJECT_COLOURS if colour not in {thing.colour for thing in things}]
        thing = _draw_thing(rng, colours, motions)
        if is_held_out(thing) == held_out:
            things.append(thing)
    return Scene(things=tuple(things), background=_draw_background(rng, things, camera), camera=camera)


_ALONE: Final = 0.75
_FIXED_CAMERA: Final = 0.85


def _suits(motion: Motion, num_things: int, camera: Camera) -> bool:
    is_apart = num_things == 1 or motion in BESIDE_ANOTHER
    return is_apart and (camera is Camera.FIXED or motion in UNDER_A_MOVING_CAMERA)


def _draw_thing(rng: random.Random, colours: Sequence[str], motions: Sequence[Motion]) -> Thing:
    shape = rng.choice(list(Shape))
    if shape is Shape.CIRCLE:  # nobody sees it turn
        motions = [motion for motion in motions if motion is not Motion.ROTATE]
    size = rng.choices(list(Size), weights=(1, 2, 1))[0]
    return Thing(shape=shape, colour=rng.choice(colours), size=size, motion=rng.choice(motions))


def _draw_background(rng: random.Random, things: Sequence[Thing], camera: Camera) -> Background:
    """None of its colours is that of a thing. A moving camera needs something to move over."""
    free = [colour for colour in RGB if colour not in {thing.colour for thing in things}]
    patterns = [pattern for pattern in Pattern if camera is Camera.FIXED or _has_two(pattern)]
    if "black" not in free:  # the dark end of a gradient would hide it
        patterns = [pattern for pattern in patterns if pattern is not Pattern.GRADIENT]
    pattern = rng.choice(patterns)
    if pattern is Pattern.GRADIENT:
        free = [colour for colour in free if colour in _SHADED]
    return Background(pattern=pattern, colours=tuple(rng.sample(free, 2 if _has_two(pattern) else 1)))


_SHADED: Final = ("red", "green", "blue", "purple", "grey")
"""Colours whose darker shades are no other colour of this world."""


def _has_two(pattern: Pattern) -> bool:
    return pattern in {Pattern.STRIPES, Pattern.CHECKERBOARD}


# ---- words ----------------------------------------------------------------------------------------------------------

_MOTION_WORDS: Final[dict[Motion, tuple[str, ...]]] = {
    Motion.LEFT: ("moves left", "moves to the left", "slides left", "travels from right to left"),
    Motion.RIGHT: ("moves right", "moves to the right", "slides right", "travels from left to right"),
    Motion.UP: ("moves up", "rises", "goes upwards", "floats up"),
    Motion.DOWN: ("moves down", "falls", "goes downwards", "sinks"),
    Motion.BOUNCE: ("bounces", "bounces up and down", "is bouncing", "hops up and down"),
    Motion.ORBIT: ("moves in a circle", "orbits the centre", "circles around the middle", "goes round and round"),
    Motion.GROW: ("grows", "gets bigger", "is growing", "becomes larger"),
    Motion.SHRINK: ("shrinks", "gets smaller", "is shrinking", "becomes tiny"),
    Motion.ROTATE: ("rotates", "spins", "is turning", "turns around itself"),
    Motion.APPEAR: ("appears", "fades in", "comes into view", "suddenly appears"),
    Motion.STILL: ("stands still", "does not move", "stays in place", "is still"),
}
_SIZE_WORDS: Final[dict[Size, tuple[str, ...]]] = {
    Size.SMALL: ("small", "little"),
    Size.MEDIUM: ("", "", "medium"),
    Size.LARGE: ("large", "big"),
}
_CAMERA_WORDS: Final[dict[Camera, tuple[str, ...]]] = {
    Camera.PAN_LEFT: ("the camera pans left", "the camera moves to the left"),
    Camera.PAN_RIGHT: ("the camera pans right", "the camera moves to the right"),
    Camera.ZOOM_IN: ("the camera zooms in", "the camera moves closer"),
    Camera.ZOOM_OUT: ("the camera zooms out", "the camera moves away"),
}
_BACKGROUND_WORDS: Final[dict[Pattern, tuple[str, ...]]] = {
    Pattern.PLAIN: ("on a {0} background", "in front of a {0} background", "on {0}"),
    Pattern.GRADIENT: ("on a {0} gradient", "in front of a {0} gradient background"),
    Pattern.STRIPES: ("on {0} and {1} stripes", "in front of a background with {0} and {1} stripes"),
    Pattern.CHECKERBOARD: ("on a {0} and {1} checkerboard", "in front of a {0} and {1} checkerboard"),
}
_ONE: Final = ("{thing} {motion} {background}", "{thing} that {motion} {background}", "{background}, {thing} {motion}")
_TWO: Final = (
    "{left} on the left {left_motion} and {right} on the right {right_motion} {background}",
    "on the left {left} {left_motion}, on the right {right} {right_motion}, {background}",
)


def caption(scene: Scene, rng: random.Random) -> str:
    """One of the ways to say what is seen."""
    background = rng.choice(_BACKGROUND_WORDS[scene.background.pattern]).format(*scene.background.colours)
    said = [(_named(thing, rng), rng.choice(_MOTION_WORDS[thing.motion])) for thing in scene.things]
    if len(said) == 1:
        [(thing, motion)] = said
        text = rng.choice(_ONE).format(thing=thing, motion=motion, background=background)
    else:
        (left, left_motion), (right, right_motion) = said
        text = rng.choice(_TWO).format(
            left=left, left_motion=left_motion, right=right, right_motion=right_motion, background=background
        )
    if scene.camera is not Camera.FIXED:
        text = f"{text}, {rng.choice(_CAMERA_WORDS[scene.camera])}"
    return text


def _named(thing: Thing, rng: random.Random) -> str:
    words = [rng.choice(_SIZE_WORDS[thing.size]), thing.colour, thing.shape.value]
    name = " ".join(word for word in words if word)
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def vocabulary() -> list[str]:
    """Every word that a caption may have, sorted."""
    templates = [*_ONE, *_TWO, *(text for texts in _BACKGROUND_WORDS.values() for text in texts)]
    phrases = [
        text for words in (_MOTION_WORDS, _SIZE_WORDS, _CAMERA_WORDS) for texts in words.values() for text in texts
    ]
    texts = [re.sub(r"\{\w+\}", " ", text) for text in [*templates, *phrases]]
    words = {word for text in texts for word in re.findall(r"\w+", text)}
    return sorted(words | {"a", "an"} | set(RGB) | {shape.value for shape in Shape})
