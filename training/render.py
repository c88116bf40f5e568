"""Scenes to clips: many at once, on any device, with smooth edges.

Knows geometry and pixels. Does not know words.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch

from training.world import RGB, Background, Camera, Motion, Pattern, Scene, Shape, Size, Thing
from wan_grpc.pipeline.decode import to_pictures

_RADIUS: Final = {Size.SMALL: (0.09, 0.12), Size.MEDIUM: (0.14, 0.18), Size.LARGE: (0.21, 0.26)}
"""Of a circle of the same area, as a share of the picture's shorter side."""
_ACROSS: Final = ((0.14, 0.3), (0.7, 0.86))
"""Where a thing that crosses the picture begins and ends, as a share of the side that it follows."""
_MAX_THINGS: Final = 2
_DARKER: Final = 0.45
"""The dark end of a gradient."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Track:
    """Where one thing is, frame by frame. Lengths are shares of the shorter side, places of their own side."""

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
) -> torch.Tensor:
    """Clips [B, 3, num_frames, height, width] of `scenes`, in -1 to 1.

    seed: of all that scenes leave open, such as where a thing begins and how fast it is.
    """
    rng = random.Random(seed)
    grid = _grid(height, width).to(device)
    views = torch.stack([_view(scene.camera, num_frames) for scene in scenes]).to(device)  # [B, T, 3]
    world = (grid * views[:, :, None, None, 2:]) + views[:, :, None, None, :2]  # [B, T, H, W, 2]
    picture = torch.stack([_behind(scene.background, world[i], rng) for i, scene in enumerate(scenes)])
    sides = torch.tensor([width, height]) / min(width, height)
    tracks = [[_track(thing, scene, i, num_frames, rng) for i, thing in enumerate(scene.things)] for scene in scenes]
    pixel = (1.0 / min(height, width)) * views[:, :, None, None, 2]
    for layer in range(_MAX_THINGS):
        for index, scene in enumerate(scenes):
            if layer < len(scene.things):
                thing, track = scene.things[layer], tracks[index][layer]
                cover = _cover(thing.shape, track, world[index], sides.to(device), pixel[index]).unsqueeze(-1)
                picture[index] = torch.lerp(
                    picture[index], _colour(thing.colour, device).expand_as(picture[index]), cover
                )
    return (picture * 2.0 - 1.0).movedim(-1, 1)


def to_uint8(clips: torch.Tensor) -> torch.Tensor:
    """Clips [B, 3, T, H, W] in -1 to 1 as pictures, uint8 [B, T, H, W, 3], rounded as decoded videos are."""
    return torch.stack([to_pictures(clip.unsqueeze(0)) for clip in clips])


def _grid(height: int, width: int) -> torch.Tensor:
    """Of each pixel its place from the centre, x and y, in shorter sides: [H, W, 2]."""
    side = min(height, width)
    y, x = torch.meshgrid(
        (torch.arange(height) + 0.5 - height / 2) / side, (torch.arange(width) + 0.5 - width / 2) / side, indexing="ij"
    )
    return torch.stack([x, y], dim=-1)


def _view(camera: Camera, num_frames: int) -> torch.Tensor:
    """What the camera shows in each frame: the place of its centre, x and y, and how much of the world: [T, 3]."""
    time = torch.linspace(-0.5, 0.5, num_frames)
    shift = {Camera.PAN_LEFT: -0.5, Camera.PAN_RIGHT: 0.5}.get(camera, 0.0)
    zoom = {Camera.ZOOM_IN: -0.7, Camera.ZOOM_OUT: 0.7}.get(camera, 0.0)
    return torch.stack([time * shift, torch.zeros_like(time), torch.exp(time * zoom)], dim=-1)


# ---- things ---------------------------------------------------------------------------------------------------------


def _track(thing: Thing, scene: Scene, place: int, num_frames: int, rng: random.Random) -> Track:
    time = torch.linspace(0.0, 1.0, num_frames)
    left, right = (0.0, 1.0) if len(scene.things) == 1 else ((0.0, 0.5) if place == 0 else (0.5, 1.0))
    middle, half = (left + right) / 2, (right - left) / 2
    x = torch.full_like(time, middle + half * rng.uniform(-0.3, 0.3))
    y = torch.full_like(time, rng.uniform(0.38, 0.62))
    radius = torch.full_like(time, rng.uniform(*_RADIUS[thing.size]) * (1.0 if half == 0.5 else 0.85))
    angle = torch.full_like(time, rng.uniform(-0.25, 0.25))
    opacity = torch.ones_like(time)
    begin, end = (rng.uniform(*range_) for range_ in _ACROSS)
    room = 1.25 * float(radius[0])  # whole from the first frame to the last, but for the tips of stars
    begin, end = max(begin, room), min(end, 1.0 - room)
    along = begin + (end - begin) * time
    match thing.motion:
        case Motion.RIGHT:
            x = along
        case Motion.LEFT:
            x = 1.0 - along
        case Motion.DOWN:
            y = along
        case Motion.UP:
            y = 1.0 - along
        case Motion.BOUNCE:
            jumps = rng.choice((2.0, 2.5, 3.0))
            floor = min(0.78, 1.0 - room)
            y = floor - min(rng.uniform(0.4, 0.5), floor - room) * torch.sin(math.pi * jumps * time).abs()
        case Motion.ORBIT:
            turn = rng.choice((-1, 1)) * math.tau * rng.uniform(0.85, 1.15) * time + rng.uniform(0, math.tau)
            reach = rng.uniform(0.24, 0.3)
            x, y = 0.5 + reach * torch.cos(turn), 0.5 + reach * torch.sin(turn)
            radius = radius * 0.8
        case Motion.GROW:
            radius = radius * torch.exp(math.log(rng.uniform(2.2, 2.8)) * (time - 0.6))
        case Motion.SHRINK:
            radius = radius * torch.exp(-math.log(rng.uniform(2.2, 2.8)) * (time - 0.4))
        case Motion.ROTATE:
            angle = angle + rng.choice((-1, 1)) * math.pi * rng.uniform(0.9, 1.6) * time
        case Motion.APPEAR:
            opacity = ((time - rng.uniform(0.35, 0.55)) / 0.15).clamp(0.0, 1.0)
        case Motion.STILL:
            pass
    return Track(x=x, y=y, radius=radius, angle=angle, opacity=opacity)


def _cover(shape: Shape, track: Track, world: torch.Tensor, sides: torch.Tensor, pixel: torch.Tensor) -> torch.Tensor:
    """How much of each pixel the thing covers, 0 to 1: [T, H, W]. world: [T, H, W, 2]; pixel: its size, [T, 1, 1]."""
    centre = torch.stack([track.x, track.y], dim=-1).to(world.device) - 0.5
    radius, angle, opacity = (
        value.to(world.device)[:, None, None] for value in (track.radius, track.angle, track.opacity)
    )
    offset = (world - (centre * sides)[:, None, None]) / radius.unsqueeze(-1)
    x, y = offset.unbind(-1)
    turned = torch.stack([x * torch.cos(angle) + y * torch.sin(angle), y * torch.cos(angle) - x * torch.sin(angle)], -1)
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


def _behind(background: Background, world: torch.Tensor, rng: random.Random) -> torch.Tensor:
    """[T, H, W, 3] in 0 to 1. world: [T, H, W, 2]."""
    colours = [_colour(colour, world.device) for colour in background.colours]
    angle = rng.choice((0.0, math.pi / 2, math.pi / 4))
    x, y = world.unbind(-1)
    along = x * math.cos(angle) + y * math.sin(angle)
    aside = y * math.cos(angle) - x * math.sin(angle)
    match background.pattern:
        case Pattern.PLAIN:
            return colours[0].expand(*world.shape[:-1], 3).clone()
        case Pattern.GRADIENT:
            share = (along + 0.7) / 1.4 if rng.random() < 0.5 else (0.7 - along) / 1.4
            return torch.lerp(colours[0], colours[0] * _DARKER, share.clamp(0.0, 1.0).unsqueeze(-1))
        case Pattern.STRIPES:
            share = _wave(along, rng.uniform(0.22, 0.4), rng.random())
        case Pattern.CHECKERBOARD:
            period, phase = rng.uniform(0.35, 0.55), rng.random()
            share = _wave(along, period, phase) - 0.5
            share = 2 * share * (_wave(aside, period, phase) - 0.5) + 0.5
    return torch.lerp(colours[0], colours[1], share.unsqueeze(-1))


def _wave(along: torch.Tensor, period: float, phase: float) -> torch.Tensor:
    """0 and 1 by turns, with edges that are about a pixel wide at 96 pixels."""
    triangle = ((along / period + phase) % 1.0 - 0.5).abs() - 0.25
    return (triangle * period * 96 + 0.5).clamp(0.0, 1.0)


def _colour(name: str, device: torch.device | str) -> torch.Tensor:
    return torch.tensor(RGB[name], device=device, dtype=torch.float32) / 255.0
