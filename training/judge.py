"""What is seen in a clip: the colour, shape and motion of its things, found by segmentation and tracks, not by a model.

Knows colours, areas, outlines and paths. Does not know captions; `verdict` compares with the scene that was asked for.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Final

import torch
import torch.nn.functional as F

from training.render import distance
from training.world import OBJECT_COLOURS, RGB, Motion, Scene, Shape

_NAMES: Final = tuple(RGB)
_AT_THE_BORDER: Final = 0.04
"""Share of the border that a colour of the background takes at least; things keep away from it."""
_LEAST_AREA: Final = 0.004
"""Share of the picture that a thing takes at least, in the frames where it is largest."""
_TEMPLATE: Final = 40
"""Pixels of a side of the masks that are compared."""
_REACH: Final = 2.4
"""What such a mask shows, in radii of the circle of the same area."""
_NUM_ANGLES: Final = 24
_SHAPE_FRAMES: Final = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """One thing of a clip."""

    colour: str
    shape: Shape
    motion: Motion


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What of a scene a clip shows. Each is right if it is right of every thing."""

    colour: bool
    shape: bool
    motion: bool


def verdict(pictures: torch.Tensor, scene: Scene) -> Verdict:
    """Compare a clip, uint8 [T, H, W, 3], with a scene before a fixed camera."""
    seen = look(pictures, num_things=len(scene.things))
    if len(seen) < len(scene.things):
        return Verdict(colour=False, shape=False, motion=False)
    pairs = list(zip(seen, scene.things, strict=True))
    return Verdict(
        colour=all(one.colour == other.colour for one, other in pairs),
        shape=all(one.shape == other.shape for one, other in pairs),
        motion=all(one.motion == other.motion for one, other in pairs),
    )


def look(pictures: torch.Tensor, *, num_things: int = 1) -> list[Seen]:
    """The things of a clip, uint8 [T, H, W, 3], from left to right; fewer than num_things if no more are found."""
    names = _named(pictures)
    found = sorted((_path(mask)[:, 0].nanmean().item(), colour, mask) for colour, mask in _things(names, num_things))
    return [Seen(colour=colour, shape=shape_of(mask)[0], motion=motion_of(mask)) for _, colour, mask in found]


# ---- colours --------------------------------------------------------------------------------------------------------


def _named(pictures: torch.Tensor) -> torch.Tensor:
    """Of each pixel the index of the colour that it is nearest to: [T, H, W]."""
    palette = _lab(torch.tensor(list(RGB.values()), dtype=torch.float32) / 255.0)
    return torch.cdist(_lab(pictures.cpu().float() / 255.0).flatten(0, 2), palette).argmin(1).view(pictures.shape[:3])


def _lab(rgb: torch.Tensor) -> torch.Tensor:
    """Colours in sRGB, 0 to 1, in CIELAB (CIE 15:2018) under D65. [.., 3] in and out."""
    linear = torch.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    to_xyz = torch.tensor(
        [
            [0.4124564, 0.3575761, 0.1804375],
            [0.2126729, 0.7151522, 0.0721750],
            [0.0193339, 0.1191920, 0.9503041],
        ]
    )
    xyz = linear @ to_xyz.T / torch.tensor([0.95047, 1.0, 1.08883])
    root = torch.where(xyz > 216 / 24389, xyz.clamp(min=1e-9) ** (1 / 3), (24389 / 27 * xyz + 16) / 116)
    x, y, z = root.unbind(-1)
    return torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], dim=-1)


def _things(names: torch.Tensor, num_things: int) -> list[tuple[str, torch.Tensor]]:
    """Colours that are none of the background's, with their masks [T, H, W]: those that take most of the picture."""
    border = torch.cat([names[:, 0], names[:, -1], names[:, :, 0], names[:, :, -1]], dim=1).flatten()
    shares = torch.bincount(border, minlength=len(_NAMES)) / border.numel()
    found = []
    for colour in OBJECT_COLOURS:
        index = _NAMES.index(colour)
        if shares[index] < _AT_THE_BORDER:
            mask = _opened(names == index)
            area = _areas(mask).sort().values[-_SHAPE_FRAMES:].median().item()
            if area > _LEAST_AREA * mask[0].numel():
                found.append((area, colour, mask))
    found.sort(key=lambda thing: -thing[0])
    return [(colour, mask) for _, colour, mask in found[:num_things]]


def _opened(mask: torch.Tensor) -> torch.Tensor:
    """Without lines of one or two pixels, such as the mixed colours along an edge."""
    whole = mask.float().unsqueeze(1)
    eroded = 1.0 - F.max_pool2d(1.0 - whole, 3, stride=1, padding=1)
    return (F.max_pool2d(eroded, 3, stride=1, padding=1) * whole).squeeze(1) > 0.5


def _areas(mask: torch.Tensor) -> torch.Tensor:
    return mask.flatten(1).sum(1).float()


# ---- shapes ---------------------------------------------------------------------------------------------------------


def shape_of(mask: torch.Tensor) -> tuple[Shape, torch.Tensor]:
    """The shape whose outline fits best where the thing is largest; its angle in each frame, [T], nan where none."""
    crops = torch.stack([_crop(frame) for frame in mask])  # [T, n, n]
    largest = _areas(mask).argsort(descending=True)[:_SHAPE_FRAMES]
    fits = {shape: _overlaps(crops, shape) for shape in Shape}  # [T, angles]
    best = max(Shape, key=lambda shape: fits[shape][largest].amax(1).mean().item())
    angles = fits[best].argmax(1) * (_symmetry(best) / _NUM_ANGLES)
    return best, torch.where(_areas(mask) > 0, angles, torch.nan)


def _crop(frame: torch.Tensor) -> torch.Tensor:
    """The mask around its centre, at one scale by its area: [n, n] in 0 to 1."""
    if not frame.any():
        return torch.zeros(_TEMPLATE, _TEMPLATE)
    height, width = frame.shape
    y, x = (places.float().mean() + 0.5 for places in frame.nonzero(as_tuple=True))
    reach = _REACH * math.sqrt(frame.sum().item() / math.pi) / 2
    steps = (torch.arange(_TEMPLATE) + 0.5) / _TEMPLATE * 2 - 1
    rows, columns = (y + steps * reach) / height * 2 - 1, (x + steps * reach) / width * 2 - 1
    grid = torch.stack(torch.meshgrid(columns, rows, indexing="xy"), dim=-1)
    return F.grid_sample(frame.float()[None, None], grid[None], align_corners=False)[0, 0]


def _overlaps(crops: torch.Tensor, shape: Shape) -> torch.Tensor:
    """Intersection over union of each crop with the shape at each angle: [T, angles]."""
    templates = _templates(shape).flatten(1)
    flat = crops.flatten(1)
    both = torch.minimum(flat[:, None], templates[None]).sum(2)
    either = torch.maximum(flat[:, None], templates[None]).sum(2)
    return both / either


def _symmetry(shape: Shape) -> float:
    """The angle after which the shape looks the same."""
    return {Shape.SQUARE: math.tau / 4, Shape.TRIANGLE: math.tau / 3, Shape.STAR: math.tau / 5}.get(shape, math.tau)


@cache
def _templates(shape: Shape) -> torch.Tensor:
    """[angles, n, n] in 0 to 1."""
    steps = ((torch.arange(_TEMPLATE) + 0.5) / _TEMPLATE * 2 - 1) * (_REACH / 2)
    y, x = torch.meshgrid(steps, steps, indexing="ij")
    masks = []
    for index in range(_NUM_ANGLES):
        angle = index / _NUM_ANGLES * _symmetry(shape)
        turned = (x * math.cos(angle) + y * math.sin(angle), y * math.cos(angle) - x * math.sin(angle))
        away = distance(shape, torch.stack(turned, dim=-1))
        masks.append((0.5 - away * _TEMPLATE / _REACH).clamp(0.0, 1.0))
    return torch.stack(masks)


# ---- motions --------------------------------------------------------------------------------------------------------

_LATE: Final = 0.25
"""A thing that appears is not there for this share of the clip at least."""
_PRESENT: Final = 0.08
"""Share of its largest area that a thing has where it is there; one that grows begins with an eighth."""
_GROWTH: Final = 1.4
"""Radius at the end by that at the beginning."""
_STRAIGHT: Final = 0.8
"""Way from the first place to the last by the way that was gone."""
_FAR: Final = 0.15
"""Ways that count, in shorter sides."""
_TURN: Final = math.radians(60)
_ROUND: Final = math.radians(200)
_ENDS: Final = 3


def motion_of(mask: torch.Tensor) -> Motion:
    """What the thing with this mask [T, H, W] does."""
    areas = _areas(mask)
    is_there = areas > _PRESENT * areas.max()
    first = int(is_there.nonzero()[0])
    if first >= _LATE * len(mask):
        return Motion.APPEAR
    path = _path(mask)[is_there]
    extent = path.amax(0) - path.amin(0)
    if extent.max() > _FAR and (motion := _motion_of_path(path)) is not None:
        return motion
    radii = areas.sqrt()
    growth = (radii[-_ENDS:].mean() / radii[first : first + _ENDS].mean()).item()
    if growth > _GROWTH:
        return Motion.GROW
    if growth < 1 / _GROWTH:
        return Motion.SHRINK
    shape, angles = shape_of(mask)
    is_turning = shape is not Shape.CIRCLE and abs(_unwound(angles[is_there], _symmetry(shape))) > _TURN
    return Motion.ROTATE if is_turning else Motion.STILL


def _path(mask: torch.Tensor) -> torch.Tensor:
    """The centre in each frame, x and y in shorter sides: [T, 2]; nan where there is none."""
    height, width = mask.shape[1:]
    y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    places = torch.stack([x, y], dim=-1) / min(height, width)
    return (mask[..., None] * places).sum((1, 2)) / mask.sum((1, 2))[:, None]


def _motion_of_path(path: torch.Tensor) -> Motion | None:
    """Of a path [n, 2] that leads somewhere; None if it is none of this world."""
    steps = path.diff(dim=0)
    x, y = (path[-1] - path[0]).tolist()
    way = math.hypot(x, y)
    if way > _STRAIGHT * steps.norm(dim=1).sum().item():
        if abs(x) > abs(y):
            return Motion.RIGHT if x > 0 else Motion.LEFT
        return Motion.DOWN if y > 0 else Motion.UP
    middle = path - (path.amax(0) + path.amin(0)) / 2
    if abs(_unwound(torch.atan2(middle[:, 1], middle[:, 0]), math.tau)) > _ROUND and _is_round(path):
        return Motion.ORBIT
    extent_x, extent_y = (path.amax(0) - path.amin(0)).tolist()
    return Motion.BOUNCE if extent_y > 2 * extent_x else None


def _is_round(path: torch.Tensor) -> bool:
    extents: Sequence[float] = (path.amax(0) - path.amin(0)).tolist()
    return min(extents) > 0.5 * max(extents)


def _unwound(angles: torch.Tensor, period: float) -> float:
    """How far a sequence of angles that repeat after `period` has turned from its first to its last."""
    steps = (angles.diff() + period / 2) % period - period / 2
    return float(steps.sum())
