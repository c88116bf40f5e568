"""Scenes to clips: many at once, on any device, with smooth edges.

Knows geometry and pixels. Does not know words.
"""

import itertools
import math
import random
from collections.abc import Hashable, Sequence
from ctypes import c_float
from dataclasses import dataclass
from typing import Final, NamedTuple, TypeVar

import torch

from training.world import RGB, Background, Camera, Motion, Pattern, Scene, Shape, Size, Thing
from wan_grpc.pipeline.decode import to_pictures

_Kind = TypeVar("_Kind", bound=Hashable)

_RADIUS: Final = {Size.SMALL: (0.12, 0.145), Size.MEDIUM: (0.155, 0.19), Size.LARGE: (0.21, 0.26)}
"""Of a circle of the same area, as a share of the picture's shorter side."""
_ACROSS: Final = ((0.14, 0.3), (0.7, 0.86))
"""Where a thing that crosses the picture begins and ends, as a share of the side that it follows."""
_MAX_THINGS: Final = 2
_DARKER: Final = 0.45
"""The dark end of a gradient."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Track:
    """Where each thing is, frame by frame: [N, T]. Lengths are shares of the shorter side, places of their own side."""

    x: torch.Tensor
    y: torch.Tensor
    radius: torch.Tensor
    angle: torch.Tensor
    """Radians, clockwise."""
    opacity: torch.Tensor


def render(
    scenes: Sequence[Scene],
    *,
    height: int,
    width: int,
    num_frames: int,
    seed: int,
    device: torch.device | str = "cpu",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Clips [B, 3, num_frames, height, width] of `scenes`, in -1 to 1, and how much of each pixel things cover.

    That is [B, num_frames, height, width] in 0 to 1. seed: of all that scenes leave open, such as where a thing begins
    and how fast it is.
    """
    rng = random.Random(seed)
    backgrounds = [scene.background for scene in scenes]
    textures = [_draw_texture(background.pattern, rng) for background in backgrounds]
    things = [(index, layer, thing) for index, scene in enumerate(scenes) for layer, thing in enumerate(scene.things)]
    paths = [_draw_path(thing, scenes[index], layer, rng) for index, layer, thing in things]

    views = _views([scene.camera for scene in scenes], num_frames).to(device, non_blocking=True)
    x, y = (place.to(device, non_blocking=True) for place in _grid(height, width))
    x, y = x * views[..., 2] + views[..., 0], y * views[..., 2] + views[..., 1]  # [B, T, 1, W] and [B, T, H, 1]
    picture = _behind(backgrounds, textures, x, y)
    covers = torch.zeros_like(picture[:, 0])

    tracks = _tracks(paths, num_frames).to(device, non_blocking=True)
    colours = _colours([thing.colour for _, _, thing in things]).to(device, non_blocking=True)
    clips = torch.tensor([index for index, _, _ in things]).to(device, non_blocking=True)
    alike = _alike([(layer, thing.shape) for _, layer, thing in things], device)
    sides = (width / min(width, height), height / min(width, height))
    pixel = (1.0 / min(height, width)) * views[..., 2]
    for kind in itertools.product(range(_MAX_THINGS), Shape):
        if kind in alike:
            chosen = alike[kind]
            clip, track = clips[chosen], _track(tracks[chosen])
            cover = _cover(kind[1], track, x[clip], y[clip], sides=sides, pixel=pixel[clip])
            picture[clip] = torch.lerp(picture[clip], colours[chosen], cover.unsqueeze(1))
            covers[clip] = torch.maximum(covers[clip], cover)
    return picture.mul_(2.0).sub_(1.0), covers


def to_uint8(clips: torch.Tensor) -> torch.Tensor:
    """Clips [B, 3, T, H, W] in -1 to 1 as pictures, uint8 [B, T, H, W, 3], rounded as decoded videos are."""
    return torch.stack([to_pictures(clip.unsqueeze(0)) for clip in clips])


def _grid(height: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each pixel its place from the centre in shorter sides: x [W] and y [H, 1]."""
    side = min(height, width)
    x, y = ((torch.arange(length) + 0.5 - length / 2) / side for length in (width, height))
    return x, y.unsqueeze(-1)


def _views(cameras: Sequence[Camera], num_frames: int) -> torch.Tensor:
    """What each camera shows in each frame: the place of its centre, x and y, and how much of the world.

    [B, T, 1, 1, 3].
    """
    shifts = {Camera.PAN_LEFT: -0.5, Camera.PAN_RIGHT: 0.5}
    zooms = {Camera.ZOOM_IN: -0.7, Camera.ZOOM_OUT: 0.7}
    moves = torch.tensor([(shifts.get(camera, 0.0), zooms.get(camera, 0.0)) for camera in cameras])
    shift, zoom = (torch.linspace(-0.5, 0.5, num_frames) * moves.unsqueeze(-1)).unbind(1)
    return torch.stack([shift, torch.zeros_like(shift), torch.exp(zoom)], dim=-1)[:, :, None, None]


def _alike(kinds: Sequence[_Kind], device: torch.device | str) -> dict[_Kind, torch.Tensor]:
    """Of each kind that occurs the places where it does, moved to the device in one go."""
    places: dict[_Kind, list[int]] = {}
    for place, kind in enumerate(kinds):
        places.setdefault(kind, []).append(place)
    joined = torch.tensor([*itertools.chain(*places.values())]).to(device, non_blocking=True)
    return dict(zip(places, joined.split_with_sizes([len(part) for part in places.values()]), strict=True))


def _colours(names: Sequence[str]) -> torch.Tensor:
    """[N, 3, 1, 1, 1] in 0 to 1."""
    return (torch.tensor([RGB[name] for name in names], dtype=torch.float32) / 255.0)[:, :, None, None, None]


# ---- things ---------------------------------------------------------------------------------------------------------


class _Path(NamedTuple):
    """What is drawn for one thing. `time`, from 0 to 1, does the rest."""

    x: float
    y: float
    radius: float
    angle: float
    along: float = 0.0
    """How far it goes, and .."""
    down: float = 0.0
    right: float = 0.0
    """1 where `x` and `along` count from the right, and .."""
    bottom: float = 0.0
    """where `y` and `down` count from below."""
    jump: float = 0.0
    """How high, and .."""
    jumps: float = 0.0
    """how often, in half turns."""
    reach: float = 0.0
    """From the centre of an orbit, which has .."""
    turn: float = 0.0
    """so much of a circle and .."""
    phase: float = 0.0
    """begins here."""
    growth: float = 0.0
    """The logarithm of how much larger it is in the end, and .."""
    normal: float = 0.0
    """when it has its own size."""
    spin: float = 0.0
    start: float = -1.0
    """When it begins to appear."""


def _draw_path(thing: Thing, scene: Scene, place: int, rng: random.Random) -> _Path:
    left, right = (0.0, 1.0) if len(scene.things) == 1 else ((0.0, 0.5) if place == 0 else (0.5, 1.0))
    middle, half = (left + right) / 2, (right - left) / 2
    path = _Path(
        x=middle + half * rng.uniform(-0.3, 0.3),
        y=rng.uniform(0.38, 0.62),
        radius=c_float(rng.uniform(*_RADIUS[thing.size]) * (1.0 if half == 0.5 else 0.85)).value,  # as tensors have it
        angle=rng.uniform(-0.25, 0.25),
    )
    begin, end = (rng.uniform(*range_) for range_ in _ACROSS)
    room = 1.25 * path.radius  # whole from the first frame to the last, but for the tips of stars
    begin, end = max(begin, room), min(end, 1.0 - room)
    match thing.motion:
        case Motion.RIGHT:
            path = path._replace(x=begin, along=end - begin)
        case Motion.LEFT:
            path = path._replace(x=begin, along=end - begin, right=1.0)
        case Motion.DOWN:
            path = path._replace(y=begin, down=end - begin)
        case Motion.UP:
            path = path._replace(y=begin, down=end - begin, bottom=1.0)
        case Motion.BOUNCE:
            jumps = math.pi * rng.choice((2.0, 2.5, 3.0))
            floor = min(0.78, 1.0 - room)
            path = path._replace(y=floor, jump=min(rng.uniform(0.4, 0.5), floor - room), jumps=jumps)
        case Motion.ORBIT:
            turn, phase = rng.choice((-1, 1)) * math.tau * rng.uniform(0.85, 1.15), rng.uniform(0, math.tau)
            reach = rng.uniform(0.24, 0.3)
            path = path._replace(x=0.5, y=0.5, radius=path.radius * 0.8, reach=reach, turn=turn, phase=phase)
        case Motion.GROW:
            path = path._replace(growth=math.log(rng.uniform(2.2, 2.8)), normal=0.6)
        case Motion.SHRINK:
            path = path._replace(growth=-math.log(rng.uniform(2.2, 2.8)), normal=0.4)
        case Motion.ROTATE:
            path = path._replace(spin=rng.choice((-1, 1)) * math.pi * rng.uniform(0.9, 1.6))
        case Motion.APPEAR:
            path = path._replace(start=rng.uniform(0.35, 0.55))
        case Motion.STILL:
            pass
    return path


def _tracks(paths: Sequence[_Path], num_frames: int) -> torch.Tensor:
    """All that a `Track` has, in its order: [N, T, 5]."""
    time = torch.linspace(0.0, 1.0, num_frames)
    x, y, radius, angle, along, down, right, bottom, jump, jumps, reach, turn, phase, growth, normal, spin, start = (
        torch.tensor(paths).unsqueeze(-1).unbind(1)
    )
    turned = turn * time + phase
    x = (x + along * time - right).abs() + reach * torch.cos(turned)
    y = (y + down * time - bottom).abs() + reach * torch.sin(turned) - jump * torch.sin(jumps * time).abs()
    radius = radius * torch.exp(growth * (time - normal))
    angle = angle + spin * time
    opacity = ((time - start) / 0.15).clamp(0.0, 1.0)
    return torch.stack([x, y, radius, angle, opacity], dim=-1)


def _track(track: torch.Tensor) -> Track:
    x, y, radius, angle, opacity = track.unbind(-1)
    return Track(x=x, y=y, radius=radius, angle=angle, opacity=opacity)


def _cover(
    shape: Shape, track: Track, x: torch.Tensor, y: torch.Tensor, *, sides: tuple[float, float], pixel: torch.Tensor
) -> torch.Tensor:
    """How much of each pixel the things cover, 0 to 1: [N, T, H, W].

    x: [N, T, 1, W]; y: [N, T, H, 1]; pixel: its size, [N, T, 1, 1].
    """
    centre_x, centre_y, radius, angle, opacity = (
        value[:, :, None, None] for value in (track.x, track.y, track.radius, track.angle, track.opacity)
    )
    x, y = (x - (centre_x - 0.5) * sides[0]) / radius, (y - (centre_y - 0.5) * sides[1]) / radius
    cos, sin = torch.cos(angle), torch.sin(angle)
    turned = torch.stack([x * cos + y * sin, y * cos - x * sin], dim=-1)
    return (0.5 - distance(shape, turned) * radius / pixel).clamp(0.0, 1.0) * opacity


def distance(shape: Shape, points: torch.Tensor) -> torch.Tensor:
    """Of each point [.., 2] to the edge of the upright shape around the origin, negative inside: [..].

    Every shape has the area of the circle of radius 1.
    """
    x, y = points.unbind(-1)
    if shape is Shape.CIRCLE:
        return torch.hypot(x, y) - 1.0
    if shape is Shape.SQUARE:
        return torch.maximum(x.abs(), y.abs()) - math.sqrt(math.pi) / 2
    if shape is Shape.TRIANGLE:
        inner = math.sqrt(math.pi / (3 * math.sqrt(3)))  # radius of the circle within, for an area of pi
        return torch.maximum(y, x.abs() * math.cos(math.pi / 6) - y * 0.5) - inner
    return _distance_to_star(x, y)


_POINTS: Final = 5
_INNER: Final = 0.45
"""The star's inner radius as a share of its outer one."""


def _distance_to_star(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """To the line from the nearest tip to the nearest notch, by folding the plane into a tenth."""
    half = math.pi / _POINTS
    outer = math.sqrt(math.pi / (_POINTS * _INNER * math.sin(half)))
    angle = torch.atan2(x, -y)  # 0 at the tip that points up
    folded = ((angle + half) % (2 * half) - half).abs()
    length = torch.hypot(x, y)
    along, aside = length * torch.cos(folded), length * torch.sin(folded)
    notch = (outer * _INNER * math.cos(half), outer * _INNER * math.sin(half))
    edge = (notch[0] - outer, notch[1])
    return ((along - outer) * edge[1] - aside * edge[0]) / math.hypot(*edge)


# ---- backgrounds ----------------------------------------------------------------------------------------------------


class _Texture(NamedTuple):
    """What is drawn for one background."""

    angle: float
    period: float = 1.0
    phase: float = 0.0
    way: float = 1.0
    """1 where a gradient darkens along the angle, -1 where against it."""


def _draw_texture(pattern: Pattern, rng: random.Random) -> _Texture:
    angle = rng.choice((0.0, math.pi / 2, math.pi / 4))
    match pattern:
        case Pattern.PLAIN:
            return _Texture(angle)
        case Pattern.GRADIENT:
            return _Texture(angle, way=1.0 if rng.random() < 0.5 else -1.0)
        case Pattern.STRIPES:
            return _Texture(angle, period=rng.uniform(0.22, 0.4), phase=rng.random())
        case Pattern.CHECKERBOARD:
            return _Texture(angle, period=rng.uniform(0.35, 0.55), phase=rng.random())


def _behind(
    backgrounds: Sequence[Background], textures: Sequence[_Texture], x: torch.Tensor, y: torch.Tensor
) -> torch.Tensor:
    """[B, 3, T, H, W] in 0 to 1. x: [B, T, 1, W]; y: [B, T, H, 1]."""
    drawn = torch.tensor([(math.cos(texture.angle), math.sin(texture.angle), *texture[1:]) for texture in textures])
    drawn = drawn[:, :, None, None, None].to(x.device, non_blocking=True)
    alike = _alike([background.pattern for background in backgrounds], x.device)
    share = x.new_zeros(*x.shape[:2], y.shape[2], x.shape[3])
    for pattern, chosen in alike.items():
        if pattern is not Pattern.PLAIN:
            share[chosen] = _share(pattern, drawn[chosen], x[chosen], y[chosen])
    first = _colours([background.colours[0] for background in backgrounds])
    second = _colours([background.colours[-1] for background in backgrounds])
    dark = [_DARKER if background.pattern is Pattern.GRADIENT else 1.0 for background in backgrounds]
    second = second * torch.tensor(dark)[:, None, None, None, None]
    first, second = (colour.to(x.device, non_blocking=True) for colour in (first, second))
    return torch.lerp(first, second, share.unsqueeze(1))


def _share(pattern: Pattern, drawn: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """How much each pixel has of the second colour, 0 to 1: [N, T, H, W]. drawn: [N, 5, 1, 1, 1]."""
    cos, sin, period, phase, way = drawn.unbind(1)
    along = x * cos + y * sin
    if pattern is Pattern.GRADIENT:
        return ((along * way + 0.7) / 1.4).clamp(0.0, 1.0)
    share = _wave(along, period, phase)
    if pattern is Pattern.CHECKERBOARD:
        share = 2 * (share - 0.5) * (_wave(y * cos - x * sin, period, phase) - 0.5) + 0.5
    return share


def _wave(along: torch.Tensor, period: torch.Tensor, phase: torch.Tensor) -> torch.Tensor:
    """0 and 1 by turns, with edges that are about a pixel wide at 96 pixels."""
    triangle = ((along / period + phase) % 1.0 - 0.5).abs() - 0.25
    return (triangle * period * 96 + 0.5).clamp(0.0, 1.0)
