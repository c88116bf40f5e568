"""The tokens of one pass on many ranks: attention as on one rank, and what a rank holds of the keys and values."""

import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.distributed.crew import Crew, crew
from wan_grpc.domain.topology import Topology
from wan_grpc.domain.traffic import Exchange
from wan_grpc.optimize.attention import choose
from wan_grpc.parallel import ring
from wan_grpc.parallel.group import Group, Pending
from wan_grpc.parallel.mesh import Mesh
from wan_grpc.parallel.ring import ring_attention
from wan_grpc.parallel.sequence import SequenceSplit

NUM_HEADS, WIDTH = 12, 8
CPU = torch.device("cpu")
TOPOLOGIES = {
    "ulysses 2": Topology(ulysses=2, num_heads=NUM_HEADS),
    "ulysses 3": Topology(ulysses=3, num_heads=NUM_HEADS),
    "ring 2": Topology(ring=2, num_heads=NUM_HEADS),
    "ring 3": Topology(ring=3, num_heads=NUM_HEADS),
    "ring 2 x ulysses 2": Topology(ring=2, ulysses=2, num_heads=NUM_HEADS),
    "cfg 2 x ring 2": Topology(cfg=2, ring=2, num_heads=NUM_HEADS),
}
NUM_TOKENS = [1, 2, 3, 5, 13, 64]
"""Also fewer than ranks, so that some have none."""


@pytest.fixture(scope="module", params=list(TOPOLOGIES), ids=list(TOPOLOGIES))
def group(request: pytest.FixtureRequest) -> Iterator[Crew]:
    with crew(TOPOLOGIES[request.param]) as ranks:
        yield ranks


def states(
    num_tokens: int, batch: int = 1, width: int = WIDTH, dtype: torch.dtype = torch.float32
) -> list[torch.Tensor]:
    """Queries, keys and values of all tokens, the same everywhere."""
    generator = torch.Generator().manual_seed(num_tokens)
    return [torch.randn(batch, num_tokens, NUM_HEADS, width, generator=generator).to(dtype) for _ in range(3)]


def worst_error(mesh: Mesh, batch: int, kernel: str, width: int = WIDTH, dtype_name: str = "float32") -> float:
    """The largest difference to attention on one rank, over all numbers of tokens and of passes."""
    dtype = getattr(torch, dtype_name)
    attention = choose(kernel, device=CPU, dtype=dtype)
    split = SequenceSplit(mesh, attention.function, attention.with_lse)
    worst = 0.0
    for num_tokens in NUM_TOKENS:
        expected = attention.function(*states(num_tokens, batch, width, dtype))
        for num_passes in (1, 2):
            split.use(mesh.layout(num_passes))
            here = split.begin(num_tokens)
            query, key, value = (state[:, here] for state in states(num_tokens, batch, width, dtype))
            mine = split.attend(lambda q=query: q, lambda k=key: k, lambda v=value: v)
            whole = split.join(mine.flatten(2)).unflatten(2, (NUM_HEADS, width))
            worst = max(worst, float((whole - expected).abs().max()))
    return worst


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("kernel", ["torch", "math"])
def test_attention_over_many_ranks(group: Crew, batch: int, kernel: str) -> None:
    """Any number of tokens, in uneven parts and none at all on some ranks, is attended as on one rank."""
    assert max(group.run(worst_error, batch, kernel)) < 2e-6


@pytest.mark.parametrize(
    ("width", "dtype", "bound"), [(7, "float32", 2e-6), (7, "bfloat16", 2e-2), (8, "bfloat16", 2e-2)]
)
def test_heads_of_any_bytes(group: Crew, width: int, dtype: str, bound: float) -> None:
    """Heads whose bytes come to whole words of 8, or do not, in values of 2 bytes and of 4."""
    assert max(group.run(worst_error, 1, "torch", width, dtype)) < bound


def without_rescaling(mesh: Mesh) -> float:
    """The error of a merge that adds the parts up as if all had the same weight."""

    class Careless(ring.Merge):
        def add(self, out: torch.Tensor, lse: torch.Tensor) -> None:
            super().add(out, torch.zeros_like(lse))

    kept, ring.Merge = ring.Merge, Careless  # type: ignore[misc]
    try:
        return worst_error(mesh, 1, "torch")
    finally:
        ring.Merge = kept  # type: ignore[misc]


def test_a_careless_merge_is_caught() -> None:
    """The bound of the tests above is broken by parts that are added up without their log-sum-exp."""
    with crew(TOPOLOGIES["ring 2"]) as ranks:
        assert min(ranks.run(without_rescaling)) > 1e-2


# ---- what a rank holds ----------------------------------------------------------------------------------------------


class LiveBytes(TorchDispatchMode):
    """The most bytes that tensors made under it have held at once."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._note(leaf.untyped_storage())
        return result

    def _note(self, storage: torch.UntypedStorage) -> None:
        pointer, size = storage.data_ptr(), storage.nbytes()
        if pointer in self._known:
            return
        self._known.add(pointer)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, pointer, size)

    def _forget(self, pointer: int, size: int) -> None:
        self._known.discard(pointer)
        self.now -= size


class Watched(Group):
    """A group that remembers whatever keys and values went through it."""

    held: dict[int, int]

    def rotate(self, mine: Sequence[torch.Tensor], into: Sequence[torch.Tensor], *, kind: Exchange) -> Pending:
        for tensor in (*mine, *into):
            self.held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return super().rotate(mine, into, kind=kind)


def what_a_ring_holds(mesh: Mesh, num_tokens: int) -> tuple[int, int, int]:
    """Bytes of one block of keys and values, of all that rotated through this rank, and the peak of all tensors."""
    attention = choose("torch", device=CPU, dtype=torch.float32)
    split = SequenceSplit(mesh, attention.function, attention.with_lse)
    here = split.begin(num_tokens)
    query, key, value = (state[:, here].clone() for state in states(num_tokens))
    group = mesh.group(mesh.layout(1).ring_groups)
    group.__class__, group.held = Watched, {}  # type: ignore[attr-defined]
    with LiveBytes() as live:
        ring_attention(query, key, value, group=group, blocks=split._blocks, attend=attention.with_lse)
    return 2 * key.nbytes, sum(group.held.values()), live.peak  # type: ignore[attr-defined]


def test_a_ring_rank_holds_three_blocks_at_most() -> None:
    """Keys and values on a rank are 3 x S / ring tokens at most, and all that attention takes falls as 1 / ring."""
    num_tokens, peaks = 3360, {}
    for degree in (2, 4, 8):
        with crew(Topology(ring=degree, num_heads=NUM_HEADS)) as ranks:
            told = ranks.run(what_a_ring_holds, num_tokens)
        for block, held, _ in told:
            assert block == 2 * num_tokens // degree * NUM_HEADS * WIDTH * 4
            assert held == min(degree, 3) * block
        peaks[degree] = max(peak for _, _, peak in told)
    print(f"peak bytes of ring attention over {num_tokens} tokens, by degree: {peaks}")
    assert peaks[4] < 0.65 * peaks[2], "a ring of 2 needs one room for what arrives, a longer one two"
    assert peaks[8] < 0.55 * peaks[4]
