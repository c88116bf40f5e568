"""The pictures of the VAE on many ranks: a strip of rows or of columns on each, which borrows its neighbours' borders.

Knows the modules of diffusers' Wan VAE that look beyond a pixel, and divides a loaded model from outside. Does not know
what is encoded or decoded.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import accumulate
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_kl_wan import (
    AutoencoderKLWan,
    WanAttentionBlock,
    WanCausalConv3d,
    WanResample,
    WanUpsample,
)
from torch import nn

from wan_grpc.domain.topology import shares
from wan_grpc.domain.traffic import Exchange
from wan_grpc.parallel.group import Group, Pending
from wan_grpc.parallel.mesh import Mesh

_HEIGHT, _WIDTH = -2, -1
_DIMS_OF_PICTURES = {_HEIGHT: 1, _WIDTH: 2}
"""Where they are in [n, H, W, 3]."""

Lines: TypeAlias = tuple[torch.Tensor | None, torch.Tensor | None]
"""The last line of the strip before and the first of the strip after; None beyond the edge of the picture."""


class Strip:
    """This rank's rows or columns of one video's pictures, at every resolution that the VAE has."""

    def __init__(self, division: "StripDivision", group: Group, *, dim: int, sizes: Sequence[int]) -> None:
        """dim: -2 or -1. sizes: rows or columns of the latents, of each rank."""
        self._division = division
        self._group = group
        self.dim = dim
        self._sizes = sizes
        self.kept: dict[tuple[nn.Module, int], torch.Tensor] = {}
        """Of each convolution in time, the neighbours' lines (0: before, 1: after) beside the last frames it saw."""

    @property
    def convolve(self) -> Callable[..., torch.Tensor]:
        """As F.conv3d."""
        return self._division.convolve

    @property
    def across(self) -> int:
        """The dim that is whole."""
        return _WIDTH if self.dim == _HEIGHT else _HEIGHT

    def cut(self, whole: torch.Tensor) -> torch.Tensor:
        """This rank's part of [.., h, w], latents or pixels."""
        scale = whole.shape[self.dim] // sum(self._sizes)
        edges = [0, *accumulate(self._sizes)]
        first, end = edges[self._group.index], edges[self._group.index + 1]
        return whole.narrow(self.dim, first * scale, (end - first) * scale)

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Within the block what the VAE computes is this strip of a larger picture."""
        self._division.strip = self
        try:
            yield
        finally:
            self._division.strip = None

    def join(self, part: torch.Tensor) -> torch.Tensor:
        """[.., h_i, w_i] of each rank to [.., h, w] on all.

        Raises:
            ExchangeBrokenError: another rank is gone.
        """
        return self.of_all(part.movedim(self.dim, 0)).movedim(0, self.dim).contiguous()

    def join_pictures(self, part: torch.Tensor) -> torch.Tensor:
        """[n, h_i, w_i, 3] of each rank to [n, h, w, 3] on rank 0, and [0, h, w, 3] on the others.

        Raises:
            ExchangeBrokenError: another rank is gone.
        """
        dim = _DIMS_OF_PICTURES[self.dim]
        sizes = self._scaled(part.shape[dim])
        joined = self._group.gather(part, sizes=sizes, dim=dim, kind=Exchange.VAE)
        if joined is not None:
            return joined
        shape = list(part.shape)
        shape[0], shape[dim] = 0, sum(sizes)
        return part.new_empty(shape)

    def borrow(self, to_previous: torch.Tensor, to_next: torch.Tensor | None) -> tuple[Lines, Pending]:
        """Begin to show the neighbours a line each; theirs are there after `wait`.

        to_next: None where nobody needs a line of the strip before.
        """
        before, after, pending = self._group.begin_swap_edges(to_previous, to_next, kind=Exchange.VAE)
        return (before, after), pending

    def of_all(self, rows: torch.Tensor) -> torch.Tensor:
        """[n_i, ..] of each rank to [n, ..] on all, one rank after the other. n_i: lines of the strip, or pixels."""
        return self._group.all_gather(rows, sizes=self._scaled(len(rows)), kind=Exchange.VAE)

    def _scaled(self, mine: int) -> list[int]:
        """What each rank has, in proportion to its lines, where this one has so many."""
        scale = mine // self._sizes[self._group.index]
        return [size * scale for size in self._sizes]


class Whole:
    """Every picture whole on every rank, as there are more ranks than lines; the first rank hands them on."""

    def __init__(self, group: Group) -> None:
        self._group = group

    def cut(self, whole: torch.Tensor) -> torch.Tensor:
        return whole

    def computing(self) -> AbstractContextManager[None]:
        return nullcontext()

    def join(self, part: torch.Tensor) -> torch.Tensor:
        return part

    def join_pictures(self, part: torch.Tensor) -> torch.Tensor:
        return part if self._group.index == 0 else part[:0]


class StripDivision:
    """Divides each video's pictures between the ranks of the mesh. All ranks go through the same videos together."""

    def __init__(self, mesh: Mesh, convolve: Callable[..., torch.Tensor] = F.conv3d) -> None:
        self._mesh = mesh
        self.convolve = convolve
        self.strip: Strip | None = None
        """What the VAE is given at this moment; None while it is given whole pictures."""

    def of(self, height: int, width: int) -> Strip | Whole:
        """This rank's part of a video with latents of this size.

        Rows or columns, whichever leave the rank that has most with less; rows if neither does.
        """
        group = self._mesh.world  # asked for anew each time, because links that broke are replaced
        sizes = {dim: size for dim, size in ((_HEIGHT, height), (_WIDTH, width)) if size >= group.size}
        if not sizes:
            return Whole(group)
        dim = min(sizes, key=lambda dim: shares(sizes[dim], group.size)[0] / sizes[dim])
        return Strip(self, group, dim=dim, sizes=shares(sizes[dim], group.size))


def split_vae(vae: AutoencoderKLWan, mesh: Mesh, convolve: Callable[..., torch.Tensor] = F.conv3d) -> StripDivision:
    """Let encoder and decoder compute strips of pictures, between the ranks of the mesh, within `Strip.computing`.

    Outside of it they do what they did. convolve: as F.conv3d, with which strips are convolved.
    """
    division = StripDivision(mesh, convolve)
    for module in vae.modules():
        if isinstance(module, WanAttentionBlock):
            _divide(module, division, _attend)
        elif isinstance(module, WanResample) and module.mode.startswith("upsample"):
            _divide(module.resample, division, _upsample)
        elif isinstance(module, WanResample) and module.mode.startswith("downsample"):
            _divide(module.resample, division, _downsample)
        elif isinstance(module, WanCausalConv3d) and module.kernel_size[1:] != (1, 1):
            assert module.kernel_size == (3, 3, 3) and module._padding == (1, 1, 1, 1, 2, 0), module
            _divide(module, division, _convolve)
    return division


def _divide(module: nn.Module, division: StripDivision, on_strip: Callable[..., torch.Tensor]) -> None:
    whole = module.forward

    def forward(*args: Any, **kwargs: Any) -> torch.Tensor:
        if division.strip is None:
            result: torch.Tensor = whole(*args, **kwargs)
            return result
        return on_strip(division.strip, module, *args, **kwargs)

    module.forward = forward


def _convolve(
    strip: Strip, conv: WanCausalConv3d, x: torch.Tensor, cache_x: torch.Tensor | None = None
) -> torch.Tensor:
    """A convolution over 3 lines of 3 frames. x: [B, C, T, h, w]; cache_x: up to 2 frames before them.

    What is convolved is put together in one copy, with zeros before the first frame and beyond the picture, but for the
    edges that the strip shares with it: these are left to the convolution. Each frame's borders are borrowed once.
    """
    size = x.shape[strip.dim]
    borrowed, pending = strip.borrow(x.narrow(strip.dim, 0, 1), x.narrow(strip.dim, size - 1, 1))
    num_cached = 0 if cache_x is None else cache_x.shape[2]
    cached, new = slice(2 - num_cached, 2), slice(2, None)
    room = _room(x, {2: x.shape[2] + 2, strip.dim: size + 2})
    room[:, :, : 2 - num_cached] = 0.0
    inside = room.narrow(strip.dim, 1, size)
    inside[:, :, new] = x
    if cache_x is not None:
        inside[:, :, cached] = cache_x
    sides = room.narrow(strip.dim, 0, 1), room.narrow(strip.dim, size + 1, 1)
    pending.wait()
    for index, (side, line) in enumerate(zip(sides, borrowed, strict=True)):
        if line is None:
            side[:] = 0.0
            continue
        side[:, :, new] = line
        if num_cached:
            side[:, :, cached] = strip.kept[conv, index][:, :, -num_cached:]
        strip.kept[conv, index] = side[:, :, -2:].clone()
    padding = (0, 0, 1) if strip.dim == _HEIGHT else (0, 1, 0)
    return strip.convolve(room, conv.weight, conv.bias, conv.stride, padding)


def _upsample(strip: Strip, resample: nn.Sequential, x: torch.Tensor) -> torch.Tensor:
    """Every pixel four times, then a convolution over 3 lines. [n, C, h, w] in, [n, C', 2h, 2w] out.

    Borders are borrowed before they are doubled.
    """
    upsample, conv = resample
    assert isinstance(upsample, WanUpsample) and upsample.scale_factor == (2.0, 2.0), resample
    assert isinstance(conv, nn.Conv2d) and (conv.kernel_size, conv.padding) == ((3, 3), (1, 1)), resample
    batch, channels, height, width = x.shape
    size = x.shape[strip.dim]
    borrowed, pending = strip.borrow(x.narrow(strip.dim, 0, 1), x.narrow(strip.dim, size - 1, 1))
    room = _room(x, {strip.dim: 2 * size + 2, strip.across: 2 * x.shape[strip.across]})
    inside = room.narrow(strip.dim, 1, 2 * size)
    inside.view(batch, channels, height, 2, width, 2).copy_(x[:, :, :, None, :, None])
    pending.wait()
    for line, place in zip(borrowed, (0, 2 * size + 1), strict=True):
        side = room.narrow(strip.dim, place, 1)
        side[:] = 0.0 if line is None else line.repeat_interleave(2, dim=strip.across)
    padding = (0, 1) if strip.dim == _HEIGHT else (1, 0)
    return F.conv2d(room, conv.weight, conv.bias, conv.stride, padding)


def _downsample(strip: Strip, resample: nn.Sequential, x: torch.Tensor) -> torch.Tensor:
    """A convolution over 3 lines, at every second one, with zeros after the last. [n, C, h, w] in, half of it out."""
    pad, conv = resample
    assert isinstance(pad, nn.ZeroPad2d) and pad.padding == (0, 1, 0, 1), resample
    assert isinstance(conv, nn.Conv2d) and (conv.kernel_size, conv.stride) == ((3, 3), (2, 2)), resample
    height, width = x.shape[2:]
    (_, after), pending = strip.borrow(x.narrow(strip.dim, 0, 1), None)
    room = _room(x, {_HEIGHT: height + 1, _WIDTH: width + 1})
    room[:, :, :height, :width] = x
    room[:, :, height:] = 0.0
    room[:, :, :, width:] = 0.0
    pending.wait()
    if after is not None:
        room.narrow(strip.dim, x.shape[strip.dim], 1).narrow(strip.across, 0, x.shape[strip.across]).copy_(after)
    return F.conv2d(room, conv.weight, conv.bias, conv.stride)


def _attend(strip: Strip, block: WanAttentionBlock, x: torch.Tensor) -> torch.Tensor:
    """Attention of the strip's pixels to those of the whole frame. [B, C, T, h, w] in and out."""
    batch, channels, time, height, width = x.shape
    frames = x.transpose(1, 2).reshape(batch * time, channels, height, width)
    states: torch.Tensor = block.to_qkv(block.norm(frames)).flatten(2)
    query = states[:, :channels].transpose(1, 2).contiguous()  # fused kernels want channels side by side
    mine = states[:, channels:].permute(2, 0, 1).contiguous()  # [pixels, B * T, 2 * C], in an order that is free
    everybodys = strip.of_all(mine)
    key, value = everybodys.transpose(0, 1).unsqueeze(1).chunk(2, dim=3)
    attended = F.scaled_dot_product_attention(query.unsqueeze(1), key, value)
    projected: torch.Tensor = block.proj(attended.squeeze(1).transpose(1, 2).reshape(frames.shape))
    return projected.view(batch, time, channels, height, width).transpose(1, 2) + x


def _room(like: torch.Tensor, sizes: dict[int, int]) -> torch.Tensor:
    """A tensor with nothing in it, of the shape of another but for these dims."""
    shape = list(like.shape)
    for dim, size in sizes.items():
        shape[dim] = size
    return like.new_empty(shape)
