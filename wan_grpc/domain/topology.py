"""How the ranks of one group are laid out. The only place that does rank arithmetic."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Topology:
    """A group of ranks that computes one video together.

    `copies` ranks compute the same video, each for itself: it buys nothing but a group whose life (start, agreement,
    cancel, death) is that of any larger one. The axes that divide the work stand beside it.
    """

    copies: int = 1

    def __post_init__(self) -> None:
        if self.copies < 1:
            raise ValueError(f"copies: {self.copies} is less than 1")

    @property
    def world_size(self) -> int:
        return self.copies
