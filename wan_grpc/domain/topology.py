"""How the ranks of one group are laid out. The only place that does rank arithmetic."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from math import gcd, isqrt, prod
from typing import Final

_NUM_PROPOSALS: Final = 3
"""Layouts that are proposed in place of an impossible one, at most."""


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Divisible:
    """What of a model falls into equal parts between ranks. None: not known, so that nothing is refused for it."""

    num_heads: int | None = None
    """Attention heads of the transformer."""
    num_text_heads: int | None = None
    """Attention heads of the text encoder."""
    num_text_units: int | None = None
    """Units of its feed-forward layers, d_ff."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What is wanted of a topology. None: to be chosen."""

    cfg: bool | None = None
    """Whether the two passes of guidance are divided."""
    sequence: int | None = None
    """Product of ring and ulysses."""
    ring: int | None = None
    ulysses: int | None = None
    text_tensor: int = 1

    def misses(self, layout: Layout) -> int:
        """How many wishes it leaves unfulfilled."""
        pairs = (
            (None if self.cfg is None else 1 + self.cfg, layout.cfg),
            (self.sequence, layout.sequence),
            (self.ring, layout.ring),
            (self.ulysses, layout.ulysses),
        )
        return sum(wish is not None and wish != size for wish, size in pairs)


class TopologyError(ValueError):
    """What is wanted cannot be had: every problem, as a field of Wanted and a sentence without its name."""

    def __init__(self, problems: Iterable[tuple[str, str]]) -> None:
        self.problems = tuple(problems)
        super().__init__("; ".join(f"{field}: {sentence}" for field, sentence in self.problems))


def choose_topology(num_ranks: int, *, model: Divisible, guided: bool, wanted: Wanted) -> Topology:
    """How a group of `num_ranks` divides its work: as wanted, and what is left open as well as it can be.

    Where steps usually have two passes (`guided`) these are divided first, which costs the least exchange; then as many
    heads as can be, and the ring takes the rest.

    Raises:
        TopologyError: what is wanted does not go together, or not with this number of ranks or this model.
    """
    layouts = sorted(_layouts(num_ranks, model.num_heads), key=lambda one: ((one.cfg == 2) is not guided, one.ring))
    problems = [*_layout_problems(layouts, model.num_heads, wanted), *_text_problems(num_ranks, model, wanted)]
    if problems:
        raise TopologyError(problems)
    chosen = next(one for one in layouts if not wanted.misses(one))
    return Topology(
        cfg=chosen.cfg,
        ring=chosen.ring,
        ulysses=chosen.ulysses,
        text_tensor=wanted.text_tensor,
        num_heads=model.num_heads,
    )


def group_size(num_ranks: int, num_groups: int) -> int:
    """Ranks in each of as many equal groups.

    Raises:
        TopologyError: there are none such.
    """
    if num_ranks % num_groups:
        others = _listed(_divisors(num_ranks), "and")
        sentence = f"{num_groups} does not divide the ranks, {_remainder(num_ranks, num_groups)}; {others} would"
        raise TopologyError([("groups", sentence)])
    return num_ranks // num_groups


def in_words(layout: Layout | Topology) -> str:
    """The axes that divide anything, such as `cfg 2 x ulysses 4`."""
    sizes = {name: getattr(layout, name) for name in ("cfg", "ring", "ulysses")}
    return " x ".join(f"{name} {size}" for name, size in sizes.items() if size > 1) or "1 rank"


def _layouts(num_ranks: int, num_heads: int | None) -> list[Layout]:
    """All that so many ranks can have."""
    found = []
    for cfg, ulysses in product((1, 2), _divisors(num_ranks)):
        ring, rest = divmod(num_ranks, cfg * ulysses)
        if not rest and (num_heads is None or num_heads % ulysses == 0):
            found.append(Layout(cfg=cfg, ring=ring, ulysses=ulysses))
    return found


def _divisors(*totals: int) -> list[int]:
    """Numbers that divide all of them."""
    largest = gcd(*totals)
    small = [number for number in range(1, isqrt(largest) + 1) if largest % number == 0]
    return sorted({*small, *(largest // number for number in small)})


# ---- why what is wanted cannot be had --------------------------------------------------------------------------------


def _layout_problems(layouts: Sequence[Layout], num_heads: int | None, wanted: Wanted) -> Iterator[tuple[str, str]]:
    if any(not wanted.misses(one) for one in layouts):
        return
    num_ranks = layouts[0].world_size
    problems = [*_odd_ranks(num_ranks, wanted), *_undivided_heads(layouts, num_heads, wanted), *_wrong_sequence(wanted)]
    if not problems:
        least = min(wanted.misses(one) for one in layouts)
        near = [in_words(one) for one in layouts if wanted.misses(one) == least]
        field, sentence = _wrong_product(num_ranks, num_heads, wanted)
        problems = [(field, f"{sentence}; possible: {_listed(near[:_NUM_PROPOSALS], 'or')}")]
    yield from problems


def _odd_ranks(num_ranks: int, wanted: Wanted) -> Iterator[tuple[str, str]]:
    if wanted.cfg and num_ranks % 2:
        yield "cfg", f"the ranks of a group do not fall into 2 halves, {_remainder(num_ranks, 2)}"


def _undivided_heads(layouts: Sequence[Layout], num_heads: int | None, wanted: Wanted) -> Iterator[tuple[str, str]]:
    if wanted.ulysses is not None and num_heads is not None and num_heads % wanted.ulysses:
        others = _listed(sorted({one.ulysses for one in layouts}), "and")
        sum_ = _remainder(num_heads, wanted.ulysses)
        yield "ulysses", f"{wanted.ulysses} does not divide the heads of the transformer, {sum_}; {others} would"


def _wrong_sequence(wanted: Wanted) -> Iterator[tuple[str, str]]:
    sizes = {"ring": wanted.ring, "ulysses": wanted.ulysses}
    given = {name: size for name, size in sizes.items() if size is not None}
    if wanted.sequence is None:
        return
    if len(given) == 2:
        if prod(given.values()) != wanted.sequence:
            yield "sequence", f"{wanted.sequence} is not {_product(given)}"
        return
    for name, size in given.items():
        if wanted.sequence % size:
            yield name, f"{size} does not divide the sequence degree, {_remainder(wanted.sequence, size)}"


def _wrong_product(num_ranks: int, num_heads: int | None, wanted: Wanted) -> tuple[str, str]:
    """Why nothing in the place of what is left open makes the product come out; what is given is sound by itself."""
    sizes = {"ring": wanted.ring, "ulysses": wanted.ulysses}
    given = {name: size for name, size in sizes.items() if size is not None}
    is_whole = wanted.sequence is not None or len(given) == 2
    if wanted.sequence is not None and len(given) < 2:
        given = {"sequence": wanted.sequence}
    choices = [{"cfg": cfg, **given} for cfg in ((1, 2) if wanted.cfg is None else (1 + wanted.cfg,))]
    fits = [prod(one.values()) == num_ranks if is_whole else num_ranks % prod(one.values()) == 0 for one in choices]
    if not any(fits):
        verb = "is not" if is_whole else "does not divide"
        field = "sequence" if wanted.sequence is not None else next(iter(given))
        return field, f"{' or '.join(map(_product, choices))} {verb} {num_ranks}, the number of ranks in a group"
    assert wanted.ring is not None, "all that is left open is the ulysses degree, and the heads forbid it"
    left = [num_ranks // one["cfg"] // wanted.ring for one, does_fit in zip(choices, fits, strict=True) if does_fit]
    return "ring", f"{wanted.ring} leaves ulysses {_listed(left, 'or')} for the {num_heads} heads of the transformer"


def _text_problems(num_ranks: int, model: Divisible, wanted: Wanted) -> Iterator[tuple[str, str]]:
    totals = {
        "ranks of a group": num_ranks,
        "heads of the text encoder": model.num_text_heads,
        "d_ff of the text encoder": model.num_text_units,
    }
    known = {name: total for name, total in totals.items() if total is not None}
    wrong = {name: total for name, total in known.items() if total % wanted.text_tensor}
    for name, total in wrong.items():
        others = _listed(_divisors(*known.values()), "and")
        sum_ = _remainder(total, wanted.text_tensor)
        yield "text_tensor", f"{wanted.text_tensor} does not divide the {name}, {sum_}; {others} would"


def _product(sizes: Mapping[str, int]) -> str:
    return f"{' x '.join(f'{name} {size}' for name, size in sizes.items())} = {prod(sizes.values())}"


def _remainder(total: int, size: int) -> str:
    whole, rest = divmod(total, size)
    return f"{total} = {size} x {whole} + {rest}"


def _listed(values: Iterable[object], last: str) -> str:
    *first, final = map(str, values)
    return f"{', '.join(first)} {last} {final}" if first else final
