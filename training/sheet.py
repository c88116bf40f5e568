"""Clips side by side in one picture: a row a clip, with what was asked for.

Knows pictures. Does not know models.
"""

from collections.abc import Sequence

import torch
from PIL import Image, ImageDraw

_GAP = 4
_TEXT = 14


def sheet(rows: Sequence[tuple[str, torch.Tensor]], *, num_frames: int = 6) -> Image.Image:
    """rows: a title and a clip, uint8 [T, H, W, 3], of which num_frames are shown, first and last among them."""
    parts = [_row(title, clip, num_frames) for title, clip in rows]
    whole = Image.new("RGB", (max(part.width for part in parts), sum(part.height for part in parts)), "white")
    top = 0
    for part in parts:
        whole.paste(part, (0, top))
        top += part.height
    return whole


def _row(title: str, clip: torch.Tensor, num_frames: int) -> Image.Image:
    num, height, width, _ = clip.shape
    chosen = [round(index * (num - 1) / (num_frames - 1)) for index in range(num_frames)]
    row = Image.new("RGB", (num_frames * (width + _GAP) - _GAP, height + _TEXT + _GAP), "white")
    ImageDraw.Draw(row).text((1, 0), title, fill="black")
    for place, index in enumerate(chosen):
        row.paste(Image.fromarray(clip[index].cpu().numpy()), (place * (width + _GAP), _TEXT))
    return row
