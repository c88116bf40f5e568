"""The calls that ranks make for one attention on GPUs, each rank on its own: they must match, or all would wait."""

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from wan_grpc.domain.topology import Layout, Topology
from wan_grpc.domain.traffic import Exchange
from wan_grpc.optimize.attention import choose
from wan_grpc.parallel import group as groups
from wan_grpc.parallel.group import ByPeer, Gate, Group
from wan_grpc.parallel.meter import Meter
from wan_grpc.parallel.sequence import SequenceSplit

CPU = torch.device("cpu")
NUM_HEADS, WIDTH = 24, 8
TOPOLOGIES = [
    Topology(ulysses=2, num_heads=NUM_HEADS),
    Topology(ulysses=8, num_heads=NUM_HEADS),
    Topology(ring=2, num_heads=NUM_HEADS),
    Topology(ring=3, num_heads=NUM_HEADS),
    Topology(ring=8, num_heads=NUM_HEADS),
    Topology(ring=4, ulysses=2, num_heads=NUM_HEADS),
    Topology(cfg=2, ring=2, ulysses=2, num_heads=NUM_HEADS),
]


@dataclass(frozen=True)
class Call:
    """One exchange among all ranks of a group, as one of them sees it: numbers of values by peer."""

    ranks: tuple[int, ...]
    sent: dict[int, int]
    expected: dict[int, int]


class Done:
    def wait(self) -> None:
        """Nothing was begun."""


class OnGpus(Group):
    """Goes the way of GPUs, and notes what it would have called."""

    calls: list[Call]

    @property
    def device(self) -> torch.device:
        return torch.device("cuda")

    def _all_to_all(self, leaving: ByPeer, arriving: ByPeer) -> Any:
        for room in arriving.values():
            room.zero_()
        assert all(tensor.is_contiguous() for tensors in (leaving, arriving) for tensor in tensors.values())
        sizes = [{self.ranks[index]: t.numel() for index, t in tensors.items()} for tensors in (leaving, arriving)]
        self.calls.append(Call(self.ranks, *sizes))
        return Done()


@dataclass
class Seat:
    """What SequenceSplit asks of a mesh."""

    topology: Topology
    rank: int
    calls: list[Call] = field(default_factory=list)

    def layout(self, num_passes: int) -> Layout:
        return self.topology.layout(num_passes)

    def group(self, partition: tuple[tuple[int, ...], ...]) -> Group:
        [ranks] = [ranks for ranks in partition if self.rank in ranks]
        group = OnGpus(ranks, self.rank, None, Meter(CPU), Gate())
        group.calls = self.calls
        return group


def calls_of(topology: Topology, rank: int, num_tokens: int, num_passes: int) -> list[Call]:
    seat = Seat(topology, rank)
    attention = choose("torch", device=CPU, dtype=torch.float32)
    split = SequenceSplit(seat, attention.function, attention.with_lse)  # type: ignore[arg-type]
    split.use(topology.layout(num_passes))
    here = split.begin(num_tokens)
    query, key, value = torch.ones(3, 1, here.stop - here.start, NUM_HEADS, WIDTH)
    split.attend(lambda: query, lambda: key, lambda: value)
    return seat.calls


@pytest.mark.parametrize("num_passes", [1, 2])
@pytest.mark.parametrize(
    "topology", TOPOLOGIES, ids=lambda topology: f"{topology.cfg}x{topology.ring}x{topology.ulysses}"
)
def test_ranks_make_calls_that_match(topology: Topology, num_passes: int) -> None:
    """For 1 to 12 tokens all ranks of a group call equally often, and each sends what the other one expects."""
    for num_tokens in range(1, 13):
        by_rank = [calls_of(topology, rank, num_tokens, num_passes) for rank in range(topology.world_size)]
        for ranks in {call.ranks for calls in by_rank for call in calls}:
            theirs = [[call for call in by_rank[rank] if call.ranks == ranks] for rank in ranks]
            assert len({len(calls) for calls in theirs}) == 1, (num_tokens, ranks)
            for together in zip(*theirs, strict=True):
                assert_matched(dict(zip(ranks, together, strict=True)))


def assert_matched(calls: dict[int, Call]) -> None:
    for rank, call in calls.items():
        for peer, other in calls.items():
            assert call.sent.get(peer, 0) == other.expected.get(rank, 0), calls


def test_exchanges_in_pairs_leave_out_what_is_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU nothing is begun for empty parts; with none that is not empty nothing at all."""
    begun: list[list[Any]] = []

    def batch(operations: list[Any]) -> list[Any]:
        begun.append(operations)
        return [Done()]

    monkeypatch.setattr(groups.dist, "batch_isend_irecv", batch)
    monkeypatch.setattr(groups.dist, "P2POp", lambda *arguments: arguments)
    group, kind = Group((3, 7), 3, object(), Meter(CPU), Gate()), Exchange.ULYSSES
    full, empty = torch.ones(2), torch.ones(0)
    group.swap([full, empty], [full, empty], kind=kind).wait()
    assert begun == []
    group.swap([full, full], [full, empty], kind=kind).wait()
    [[operation]] = begun
    assert operation[0] is groups.dist.isend and operation[1:3] == (full, 7)
