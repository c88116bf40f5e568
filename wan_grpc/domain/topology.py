"""How the ranks of one group are laid out. The only place that does rank arithmetic."""

from dataclasses import dataclass
from itertools import product


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """How the ranks of a group share the forward passes of one step: `cfg x ring x ulysses`, the last axis innermost.

    Ranks that differ in `cfg` run different passes; ranks that differ in `ring` or `ulysses` hold different tokens of
    the same pass, in the order of their numbers.
    """

    cfg: int = 1
    ring: int = 1
    ulysses: int = 1

    @property
    def world_size(self) -> int:
        return self.cfg * self.sequence

    @property
    def sequence(self) -> int:
        """Ranks between which the tokens of one pass are divided."""
        return self.ring * self.ulysses

    def cfg_index(self, rank: int) -> int:
        return rank // self.sequence

    def ring_index(self, rank: int) -> int:
        return rank // self.ulysses % self.ring

    def ulysses_index(self, rank: int) -> int:
        return rank % self.ulysses

    @property
    def cfg_groups(self) -> tuple[tuple[int, ...], ...]:
        """Ranks that hold the same tokens of different passes, in the order of the passes."""
        return tuple(tuple(range(first, self.world_size, self.sequence)) for first in range(self.sequence))

    @property
    def sequence_groups(self) -> tuple[tuple[int, ...], ...]:
        """Ranks that hold the tokens of one pass, in the order of the tokens."""
        return tuple(tuple(range(first, first + self.sequence)) for first in range(0, self.world_size, self.sequence))

    @property
    def ulysses_groups(self) -> tuple[tuple[int, ...], ...]:
        """Ranks that exchange tokens for heads, in the order of the tokens."""
        return tuple(tuple(range(first, first + self.ulysses)) for first in range(0, self.world_size, self.ulysses))

    @property
    def ring_groups(self) -> tuple[tuple[int, ...], ...]:
        """Ranks between which keys and values rotate, in the order of the tokens."""
        return tuple(
            tuple(range(first + column, first + self.sequence, self.ulysses))
            for first, column in product(range(0, self.world_size, self.sequence), range(self.ulysses))
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Topology:
    """A group of ranks that computes one video together.

    A step with guidance has two passes and runs on `cfg x ring x ulysses`. One without has a single pass: the ranks of
    the `cfg` axis then divide its tokens, so that none is idle.
    """

    cfg: int = 1
    """Ranks between which the two passes of guidance are divided: 1 or 2."""
    ring: int = 1
    """Ranks between which keys and values rotate."""
    ulysses: int = 1
    """Ranks that exchange tokens for heads."""
    text_tensor: int = 1
    """Ranks between which each layer of the text encoder is divided; a divisor of the world size."""
    num_heads: int | None = None
    """Attention heads of the transformer; None when they are not known, so that nothing relies on them."""

    def __post_init__(self) -> None:
        for name in ("cfg", "ring", "ulysses", "text_tensor"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: {getattr(self, name)} is less than 1")
        if self.cfg > 2:
            raise ValueError(f"cfg: {self.cfg} is more than 2, and guidance has two passes")
        if self.num_heads is not None and self.num_heads % self.ulysses:
            raise ValueError(f"ulysses: {self.ulysses} does not divide the {self.num_heads} heads of the transformer")
        if self.world_size % self.text_tensor:
            raise ValueError(f"text_tensor: {self.text_tensor} does not divide the {self.world_size} ranks")

    @property
    def world_size(self) -> int:
        return self.cfg * self.ring * self.ulysses

    def layout(self, num_passes: int) -> Layout:
        """Who computes what in a step of this many passes: 1, or 2 with guidance."""
        if self.cfg in (1, num_passes):
            return Layout(cfg=self.cfg, ring=self.ring, ulysses=self.ulysses)
        ulysses = self.ulysses * self.cfg
        if self.num_heads is not None and self.num_heads % ulysses == 0:
            return Layout(ring=self.ring, ulysses=ulysses)
        return Layout(ring=self.ring * self.cfg, ulysses=self.ulysses)

    @property
    def text_groups(self) -> tuple[tuple[int, ...], ...]:
        """Ranks that encode one text together."""
        size = self.text_tensor
        return tuple(tuple(range(first, first + size)) for first in range(0, self.world_size, size))


def shares(total: int, num_parts: int) -> tuple[int, ...]:
    """`total` things in `num_parts` parts that differ by at most one, larger ones first; nothing is padded."""
    least, num_larger = divmod(total, num_parts)
    return tuple(least + (part < num_larger) for part in range(num_parts))
