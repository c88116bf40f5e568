from collections.abc import Sequence
from dataclasses import FrozenInstanceError

import pytest

from wan_grpc.domain.topology import (
    Divisible,
    Layout,
    Topology,
    TopologyError,
    Wanted,
    choose_topology,
    group_size,
    in_words,
    shares,
)

LAYOUTS = [
    Layout(),
    Layout(cfg=2),
    Layout(ulysses=4),
    Layout(ring=3),
    Layout(cfg=2, ulysses=4),
    Layout(cfg=2, ring=3),
    Layout(ring=2, ulysses=2),
    Layout(cfg=2, ring=2, ulysses=2),
    Layout(cfg=2, ring=3, ulysses=4),
]
TOPOLOGIES = [
    Topology(cfg=layout.cfg, ring=layout.ring, ulysses=layout.ulysses, num_heads=num_heads)
    for layout in LAYOUTS
    for num_heads in (None, 24, 40)
    if num_heads is None or num_heads % layout.ulysses == 0
]
A14B = Divisible(num_heads=40, num_text_heads=64, num_text_units=10240)
TI2V_5B = Divisible(num_heads=24, num_text_heads=64, num_text_units=10240)

Groups = Sequence[Sequence[int]]


def is_partition(groups: Groups, num_ranks: int) -> bool:
    return sorted(rank for group in groups for rank in group) == list(range(num_ranks))


# ---- who computes what ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS, ids=in_words)
def test_every_rank_is_in_one_group_of_each_axis(layout: Layout) -> None:
    """The groups of an axis have its size, and together hold every rank once."""
    axes = (
        (layout.cfg, layout.cfg_groups),
        (layout.ring, layout.ring_groups),
        (layout.ulysses, layout.ulysses_groups),
        (layout.sequence, layout.sequence_groups),
    )
    for size, groups in axes:
        assert is_partition(groups, layout.world_size)
        assert {len(group) for group in groups} == {size}


@pytest.mark.parametrize("layout", LAYOUTS, ids=in_words)
def test_groups_are_in_the_order_of_what_they_hold(layout: Layout) -> None:
    """The first rank of a group has the first pass or tokens, and ranks of one group differ in its axis alone."""
    places = {
        rank: (layout.cfg_index(rank), layout.ring_index(rank), layout.ulysses_index(rank))
        for rank in range(layout.world_size)
    }
    assert len(set(places.values())) == layout.world_size
    for axis, groups in enumerate((layout.cfg_groups, layout.ring_groups, layout.ulysses_groups)):
        for group in groups:
            assert [places[rank][axis] for rank in group] == list(range(len(group)))
            assert len({places[rank][:axis] + places[rank][axis + 1 :] for rank in group}) == 1
    for group in layout.sequence_groups:
        assert [places[rank][1] * layout.ulysses + places[rank][2] for rank in group] == list(range(len(group)))
        assert list(group) == sorted(group)


def test_the_ranks_of_a_large_group() -> None:
    """Written out once: the last axis is the innermost."""
    layout = Layout(cfg=2, ring=2, ulysses=2)
    assert (layout.world_size, layout.sequence) == (8, 4)
    assert layout.cfg_groups == ((0, 4), (1, 5), (2, 6), (3, 7))
    assert layout.sequence_groups == ((0, 1, 2, 3), (4, 5, 6, 7))
    assert layout.ulysses_groups == ((0, 1), (2, 3), (4, 5), (6, 7))
    assert layout.ring_groups == ((0, 2), (1, 3), (4, 6), (5, 7))


@pytest.mark.parametrize("topology", TOPOLOGIES, ids=str)
def test_no_rank_is_idle_whatever_the_guidance(topology: Topology) -> None:
    """A step with one pass runs on as many ranks as one with two, and only as heads allow."""
    alone, guided = topology.layout(1), topology.layout(2)
    assert guided == Layout(cfg=topology.cfg, ring=topology.ring, ulysses=topology.ulysses)
    assert (alone.cfg, alone.world_size, guided.world_size) == (1, topology.world_size, topology.world_size)
    if topology.num_heads is not None:
        assert topology.num_heads % alone.ulysses == 0


@pytest.mark.parametrize(
    ("topology", "wanted"),
    [
        (Topology(cfg=2, ulysses=4, num_heads=40), Layout(ulysses=8)),
        (Topology(cfg=2, ulysses=8, num_heads=40), Layout(ring=2, ulysses=8)),
        (Topology(cfg=2, ring=3, num_heads=40), Layout(ring=3, ulysses=2)),
        (Topology(cfg=2, ulysses=4), Layout(ring=2, ulysses=4)),
        (Topology(ring=2, ulysses=2), Layout(ring=2, ulysses=2)),
    ],
)
def test_without_guidance_both_halves_take_tokens(topology: Topology, wanted: Layout) -> None:
    """The ranks of both passes exchange heads if these divide, and else keys and values go round among more."""
    assert topology.layout(1) == wanted


@pytest.mark.parametrize(("text_tensor", "groups"), [(1, ((0,), (1,), (2,), (3,))), (2, ((0, 1), (2, 3)))])
def test_ranks_that_encode_a_text(text_tensor: int, groups: Groups) -> None:
    """Neighbours encode a text together, and each group of them encodes it for itself."""
    assert Topology(cfg=2, ulysses=2, text_tensor=text_tensor).text_groups == groups


@pytest.mark.parametrize(
    ("axes", "sentence"),
    [
        ({"cfg": 0}, "cfg: 0 is less than 1"),
        ({"ring": -1}, "ring: -1 is less than 1"),
        ({"ulysses": 0}, "ulysses: 0 is less than 1"),
        ({"text_tensor": 0}, "text_tensor: 0 is less than 1"),
        ({"cfg": 3}, "cfg: 3 is more than 2, and guidance has two passes"),
        ({"ulysses": 3, "num_heads": 40}, "ulysses: 3 does not divide the 40 heads of the transformer"),
        ({"ulysses": 3, "text_tensor": 2}, "text_tensor: 2 does not divide the 3 ranks"),
    ],
)
def test_what_is_no_group_is_refused(axes: dict[str, int], sentence: str) -> None:
    """The refusal names the axis and the bound."""
    with pytest.raises(ValueError, match=f"^{sentence}$"):
        Topology(**axes)


def test_a_group_is_one_value() -> None:
    """It has one rank unless told, cannot be changed, and two that are alike are equal."""
    assert Topology().world_size == 1
    with pytest.raises(FrozenInstanceError):
        Topology().cfg = 2  # type: ignore[misc]
    assert len({Topology(cfg=2), Topology(cfg=2), Topology()}) == 2


@pytest.mark.parametrize(
    ("total", "num_parts", "wanted"),
    [(10, 1, (10,)), (10, 3, (4, 3, 3)), (2, 4, (1, 1, 0, 0)), (0, 2, (0, 0)), (75600, 8, (9450,) * 8)],
)
def test_shares(total: int, num_parts: int, wanted: tuple[int, ...]) -> None:
    """All is shared out, as evenly as can be, and the first have what is left over."""
    assert shares(total, num_parts) == wanted


# ---- the choice -----------------------------------------------------------------------------------------------------


def chosen(num_ranks: int, model: Divisible = A14B, *, guided: bool = True, **wanted: object) -> str:
    return in_words(choose_topology(num_ranks, model=model, guided=guided, wanted=Wanted(**wanted)))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("num_ranks", "a14b", "ti2v", "unguided"),
    [
        (1, "1 rank", "1 rank", "1 rank"),
        (2, "cfg 2", "cfg 2", "ulysses 2"),
        (3, "ring 3", "ulysses 3", "ring 3"),
        (4, "cfg 2 x ulysses 2", "cfg 2 x ulysses 2", "ulysses 4"),
        (5, "ulysses 5", "ring 5", "ulysses 5"),
        (6, "cfg 2 x ring 3", "cfg 2 x ulysses 3", "ring 3 x ulysses 2"),
        (7, "ring 7", "ring 7", "ring 7"),
        (8, "cfg 2 x ulysses 4", "cfg 2 x ulysses 4", "ulysses 8"),
        (12, "cfg 2 x ring 3 x ulysses 2", "cfg 2 x ulysses 6", "ring 3 x ulysses 4"),
        (16, "cfg 2 x ulysses 8", "cfg 2 x ulysses 8", "ring 2 x ulysses 8"),
        (32, "cfg 2 x ring 2 x ulysses 8", "cfg 2 x ring 2 x ulysses 8", "ring 4 x ulysses 8"),
    ],
)
def test_what_is_left_open_is_chosen(num_ranks: int, a14b: str, ti2v: str, unguided: str) -> None:
    """Passes first where there usually are two, then heads as they divide, and the ring takes the rest."""
    assert (chosen(num_ranks), chosen(num_ranks, TI2V_5B), chosen(num_ranks, guided=False)) == (a14b, ti2v, unguided)


@pytest.mark.parametrize(
    ("num_ranks", "wanted", "layout"),
    [
        (4, {"cfg": True, "ulysses": 2}, "cfg 2 x ulysses 2"),
        (4, {"ulysses": 2}, "cfg 2 x ulysses 2"),
        (4, {"ulysses": 4}, "ulysses 4"),
        (4, {"cfg": False}, "ulysses 4"),
        (4, {"cfg": False, "ulysses": 2}, "ring 2 x ulysses 2"),
        (4, {"ring": 2}, "cfg 2 x ring 2"),
        (4, {"ring": 4}, "ring 4"),
        (4, {"sequence": 2}, "cfg 2 x ulysses 2"),
        (4, {"sequence": 4}, "ulysses 4"),
        (8, {"sequence": 4, "ring": 2}, "cfg 2 x ring 2 x ulysses 2"),
        (8, {"sequence": 8, "ulysses": 2}, "ring 4 x ulysses 2"),
        (8, {"sequence": 4, "ring": 2, "ulysses": 2, "cfg": True}, "cfg 2 x ring 2 x ulysses 2"),
        (6, {"ulysses": 2}, "ring 3 x ulysses 2"),
        (1, {"sequence": 1, "ring": 1, "ulysses": 1, "cfg": False}, "1 rank"),
    ],
)
def test_what_is_given_fixes_the_rest(num_ranks: int, wanted: dict[str, int | bool], layout: str) -> None:
    """A wish is kept, and what it leaves open is chosen so that the product comes out."""
    assert chosen(num_ranks, **wanted) == layout


def test_guidance_can_be_divided_where_it_is_not_usual() -> None:
    """Who asks for it gets it, also where the model's defaults have no guidance."""
    assert chosen(4, guided=False, cfg=True) == "cfg 2 x ulysses 2"


def test_all_that_is_known_of_a_group() -> None:
    """The topology carries the heads, so that steps without guidance can be laid out, and what the text encoder has."""
    topology = choose_topology(8, model=A14B, guided=True, wanted=Wanted(text_tensor=4))
    assert topology == Topology(cfg=2, ulysses=4, text_tensor=4, num_heads=40)


def test_a_model_of_which_nothing_is_known() -> None:
    """Nothing is refused for its sake."""
    assert choose_topology(6, model=Divisible(), guided=True, wanted=Wanted(text_tensor=3)) == Topology(
        cfg=2, ulysses=3, text_tensor=3
    )


@pytest.mark.parametrize("num_ranks", range(1, 33))
def test_every_number_of_ranks_can_be_used(num_ranks: int) -> None:
    """Whatever the model, with and without guidance, and no rank is left over."""
    for model in (A14B, TI2V_5B):
        for guided in (True, False):
            topology = choose_topology(num_ranks, model=model, guided=guided, wanted=Wanted())
            assert topology.world_size == num_ranks
            assert topology.cfg == (2 if guided and num_ranks % 2 == 0 else 1)


def test_a_choice_between_many() -> None:
    """A number that nobody meant is laid out, too, and at once."""
    assert choose_topology(2**31 - 1, model=A14B, guided=True, wanted=Wanted()).ring == 2**31 - 1


@pytest.mark.parametrize(
    ("num_ranks", "wanted", "problems"),
    [
        (3, {"cfg": True}, [("cfg", "the ranks of a group do not fall into 2 halves, 3 = 2 x 1 + 1")]),
        (
            6,
            {"ulysses": 3},
            [("ulysses", "3 does not divide the heads of the transformer, 40 = 3 x 13 + 1; 1 and 2 would")],
        ),
        (8, {"sequence": 4, "ring": 2, "ulysses": 4}, [("sequence", "4 is not ring 2 x ulysses 4 = 8")]),
        (8, {"sequence": 4, "ring": 3}, [("ring", "3 does not divide the sequence degree, 4 = 3 x 1 + 1")]),
        (8, {"sequence": 5, "ulysses": 2}, [("ulysses", "2 does not divide the sequence degree, 5 = 2 x 2 + 1")]),
        (
            4,
            {"sequence": 3},
            [
                (
                    "sequence",
                    "cfg 1 x sequence 3 = 3 or cfg 2 x sequence 3 = 6 is not 4, the number of ranks in a group; "
                    "possible: cfg 2 x ulysses 2, cfg 2 x ring 2 or ulysses 4",
                )
            ],
        ),
        (
            8,
            {"sequence": 8, "cfg": True},
            [
                (
                    "sequence",
                    "cfg 2 x sequence 8 = 16 is not 8, the number of ranks in a group; "
                    "possible: cfg 2 x ulysses 4, cfg 2 x ring 2 x ulysses 2 or cfg 2 x ring 4",
                )
            ],
        ),
        (
            8,
            {"ring": 4, "ulysses": 2, "cfg": True},
            [
                (
                    "ring",
                    "cfg 2 x ring 4 x ulysses 2 = 16 is not 8, the number of ranks in a group; "
                    "possible: cfg 2 x ring 2 x ulysses 2, cfg 2 x ring 4 or ring 4 x ulysses 2",
                )
            ],
        ),
        (
            2,
            {"ulysses": 8},
            [
                (
                    "ulysses",
                    "cfg 1 x ulysses 8 = 8 or cfg 2 x ulysses 8 = 16 does not divide 2, "
                    "the number of ranks in a group; possible: cfg 2, ulysses 2 or ring 2",
                )
            ],
        ),
        (
            1,
            {"ring": 2, "cfg": False},
            [("ring", "cfg 1 x ring 2 = 2 does not divide 1, the number of ranks in a group; possible: 1 rank")],
        ),
        (
            6,
            {"ring": 1},
            [
                (
                    "ring",
                    "1 leaves ulysses 6 or 3 for the 40 heads of the transformer; "
                    "possible: cfg 2 x ring 3, ring 3 x ulysses 2 or ring 6",
                )
            ],
        ),
        (
            12,
            {"sequence": 6, "ring": 2, "cfg": True},
            [
                (
                    "ring",
                    "2 leaves ulysses 3 for the 40 heads of the transformer; "
                    "possible: cfg 2 x ring 3 x ulysses 2 or cfg 2 x ring 6",
                )
            ],
        ),
        (
            4,
            {"text_tensor": 3},
            [
                ("text_tensor", "3 does not divide the ranks of a group, 4 = 3 x 1 + 1; 1, 2 and 4 would"),
                ("text_tensor", "3 does not divide the heads of the text encoder, 64 = 3 x 21 + 1; 1, 2 and 4 would"),
                (
                    "text_tensor",
                    "3 does not divide the d_ff of the text encoder, 10240 = 3 x 3413 + 1; 1, 2 and 4 would",
                ),
            ],
        ),
        (
            3,
            {"cfg": True, "ulysses": 3, "sequence": 2, "text_tensor": 2},
            [
                ("cfg", "the ranks of a group do not fall into 2 halves, 3 = 2 x 1 + 1"),
                ("ulysses", "3 does not divide the heads of the transformer, 40 = 3 x 13 + 1; 1 would"),
                ("ulysses", "3 does not divide the sequence degree, 2 = 3 x 0 + 2"),
                ("text_tensor", "2 does not divide the ranks of a group, 3 = 2 x 1 + 1; 1 would"),
            ],
        ),
    ],
)
def test_a_contradiction_is_told_with_its_arithmetic(
    num_ranks: int, wanted: dict[str, int | bool], problems: list[tuple[str, str]]
) -> None:
    """Each problem names its field, the numbers, what they give and what would do, and all are told at once."""
    with pytest.raises(TopologyError) as raised:
        chosen(num_ranks, **wanted)
    assert list(raised.value.problems) == problems
    assert str(raised.value) == "; ".join(f"{field}: {sentence}" for field, sentence in problems)


def test_every_wish_is_kept_or_refused() -> None:
    """Of all wishes for up to 12 ranks, each is fulfilled to the letter or told to be impossible, which it then is."""
    sizes = (None, 1, 2, 3, 4, 6)
    for num_ranks in range(1, 13):
        for cfg in (None, True, False):
            for sequence in sizes:
                for ring in sizes:
                    for ulysses in sizes:
                        wanted = Wanted(cfg=cfg, sequence=sequence, ring=ring, ulysses=ulysses)
                        check_wish(num_ranks, wanted)


def check_wish(num_ranks: int, wanted: Wanted) -> None:
    possible = [
        Layout(cfg=cfg, ring=ring, ulysses=ulysses)
        for cfg in (1, 2)
        for ring in range(1, num_ranks + 1)
        for ulysses in range(1, num_ranks + 1)
        if cfg * ring * ulysses == num_ranks and 24 % ulysses == 0
    ]
    fitting = [one for one in possible if not wanted.misses(one)]
    try:
        topology = choose_topology(num_ranks, model=TI2V_5B, guided=True, wanted=wanted)
    except TopologyError as error:
        assert not fitting
        assert error.problems
    else:
        assert topology.layout(2) in fitting


# ---- groups ---------------------------------------------------------------------------------------------------------


def test_equal_groups() -> None:
    """The ranks of a host fall into groups of one size."""
    assert [group_size(8, count) for count in (1, 2, 4, 8)] == [8, 4, 2, 1]


@pytest.mark.parametrize(
    ("num_ranks", "num_groups", "sentence"),
    [
        (5, 2, "2 does not divide the ranks, 5 = 2 x 2 + 1; 1 and 5 would"),
        (2, 4, "4 does not divide the ranks, 2 = 4 x 0 + 2; 1 and 2 would"),
    ],
)
def test_groups_that_are_not_equal(num_ranks: int, num_groups: int, sentence: str) -> None:
    """The remainder is told, and the numbers of groups that would do."""
    with pytest.raises(TopologyError) as raised:
        group_size(num_ranks, num_groups)
    assert raised.value.problems == (("groups", sentence),)
