"""Where somebody may divide the pictures of the VAE.

Knows what decoder and encoder ask of whoever divides. Does not know ranks, nor how strips see each other's borders.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Final, Protocol

import torch


class Strip(Protocol):
    """What is computed here of one video's pictures: the same rows or columns of each."""

    def cut(self, whole: torch.Tensor) -> torch.Tensor:
        """Of [.., h, w], latents or pixels, what is computed here: [.., h_i, w_i]."""

    def computing(self) -> AbstractContextManager[None]:
        """Within the block the VAE is given what was cut, and knows it."""

    def join(self, part: torch.Tensor) -> torch.Tensor:
        """What was computed here, [.., h_i, w_i], to what was computed everywhere, [.., h, w]."""

    def join_pictures(self, part: torch.Tensor) -> torch.Tensor:
        """The same of finished pictures, [n, h_i, w_i, 3], for those who hand them on; [0, h, w, 3] for all others."""


class Strips(Protocol):
    """Who computes which part of pictures."""

    def of(self, height: int, width: int) -> Strip:
        """A video with latents of this size begins."""


class _Whole:
    def of(self, height: int, width: int) -> Strip:
        return self

    def cut(self, whole: torch.Tensor) -> torch.Tensor:
        return whole

    def computing(self) -> AbstractContextManager[None]:
        return nullcontext()

    def join(self, part: torch.Tensor) -> torch.Tensor:
        return part

    def join_pictures(self, part: torch.Tensor) -> torch.Tensor:
        return part


WHOLE: Final = _Whole()
"""One device computes every picture."""
