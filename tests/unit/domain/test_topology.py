from dataclasses import FrozenInstanceError

import pytest

from wan_grpc.domain.topology import Topology


@pytest.mark.parametrize("copies", [1, 2, 8])
def test_a_group_has_one_rank_a_copy(copies: int) -> None:
    """The world is as large as the product of its axes."""
    assert Topology(copies=copies).world_size == copies


def test_a_group_has_one_rank_unless_told() -> None:
    """The smallest group is the default."""
    assert Topology() == Topology(copies=1)


@pytest.mark.parametrize("copies", [0, -1])
def test_a_group_without_ranks_is_refused(copies: int) -> None:
    """The refusal names the axis and the bound."""
    with pytest.raises(ValueError, match=f"^copies: {copies} is less than 1$"):
        Topology(copies=copies)


def test_a_group_is_one_value() -> None:
    """It cannot be changed, and two that are alike are equal."""
    with pytest.raises(FrozenInstanceError):
        Topology().copies = 2  # type: ignore[misc]
    assert len({Topology(copies=2), Topology(copies=2), Topology()}) == 2
