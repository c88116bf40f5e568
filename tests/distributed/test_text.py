import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedTokenizerFast
from transformers.models.umt5.modeling_umt5 import UMT5Attention

from tests.distributed.crew import Crew, crew
from tests.tiny import relative_error
from wan_grpc.domain.topology import Topology
from wan_grpc.domain.traffic import Exchange
from wan_grpc.parallel.group import Group
from wan_grpc.parallel.mesh import Mesh
from wan_grpc.parallel.tensor import split_text_model
from wan_grpc.parallel.text import TextSplit
from wan_grpc.pipeline.text import NUM_REMEMBERED, NUM_TOKENS, TextEncoder, umt5
from wan_grpc.pipeline.tokenizer import END, PAD, UNKNOWN, byte_tokenizer

CONFIG = {"vocab_size": 259, "d_model": 32, "d_kv": 12, "d_ff": 48, "num_layers": 2, "num_heads": 4}
BOUND = 1e-5
"""Relative L2, fp32: parts of a sum are added up in another order. Rounding alone costs 5e-7."""

REQUESTS = [
    ["A cat walks on the grass", "blurry"],
    ["One prompt alone"],
    ["A cat walks on the grass", ""],
    ["the same", " the  same "],
    ["blurry", "A cat walks on the grass"],
    ["long " * 200, "猫"],
]
MANY = [[f"prompt {number}", f"negative {number % 3}"] for number in range(14)] + [["prompt 0", "prompt 9"]]
"""17 prompts; the last request has one that is forgotten and one that is not."""

WHOLE = {
    "2 ranks, each a text": Topology(cfg=2),
    "3 ranks, each a text": Topology(ring=3),
    "4 ranks, each a text": Topology(cfg=2, ulysses=2),
}
DIVIDED = {
    "2 ranks for a text": Topology(cfg=2, text_tensor=2),
    "4 ranks for a text": Topology(ulysses=4, text_tensor=4),
    "2 x 2 ranks for a text": Topology(cfg=2, ring=2, text_tensor=2),
}


@pytest.fixture(scope="module", params=[*WHOLE, *DIVIDED])
def ranks(request: pytest.FixtureRequest) -> Iterator[Crew]:
    """A crew of each topology."""
    with crew((WHOLE | DIVIDED)[request.param]) as started:
        yield started


only_divided = pytest.mark.parametrize("ranks", DIVIDED, indirect=True)


# ---- on the ranks -----------------------------------------------------------------------------------------------


def make_encoder(**changes: Any) -> TextEncoder:
    """The same on every rank. Its attention is decided, so that wrong heads and wrong distances show."""
    torch.manual_seed(3)
    model = umt5(CONFIG | changes).eval().requires_grad_(False)
    for module in model.modules():
        if isinstance(module, UMT5Attention):
            module.q.weight *= 6.0
            module.relative_attention_bias.weight *= 6.0
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=byte_tokenizer(), pad_token=PAD, eos_token=END, unk_token=UNKNOWN
    )
    return TextEncoder(tokenizer, model)


def make_divided(mesh: Mesh, **changes: Any) -> TextEncoder:
    encoder = make_encoder(**changes)
    split_text_model(encoder.model, mesh)
    encoder.spread = TextSplit(mesh, encoder.blank)
    return encoder


@cache
def alone() -> TextEncoder:
    """What one rank makes of a prompt. In a process of a crew it remembers them all."""
    encoder = make_encoder()
    return TextEncoder(encoder.tokenizer, encoder.model, num_remembered=100)


@dataclass(frozen=True, slots=True, kw_only=True)
class Told:
    """What a rank made of requests, each prompt in order."""

    digests: list[str]
    remembered: list[str]
    errors: list[float]
    """Against one rank; only rank 0 compares, as the others must have the same bytes."""
    are_equal: list[bool]
    has_same_zeros: list[bool]


def compare(mesh: Mesh, requests: Sequence[Sequence[str]], first: int = 0) -> Told:
    """Requests on all ranks, and the prompts from the `first` on as one rank encodes them."""
    encoder = make_divided(mesh)
    prompts = [prompt for request in requests for prompt in request]
    embeddings = [embedding for request in requests for embedding in encoder.encode_all(request)]
    assert all(embedding.shape == (1, NUM_TOKENS, CONFIG["d_model"]) for embedding in embeddings)
    compared = zip(prompts[first:], embeddings[first:], strict=True) if mesh.is_first else ()
    pairs = [(embedding, alone().encode(prompt)) for prompt, embedding in compared]
    return Told(
        digests=[hashlib.sha256(embedding.numpy().tobytes()).hexdigest() for embedding in embeddings],
        remembered=list(encoder._remembered),
        errors=[relative_error(actual, expected) for actual, expected in pairs],
        are_equal=[torch.equal(actual, expected) for actual, expected in pairs],
        has_same_zeros=[torch.equal(actual == 0, expected == 0) for actual, expected in pairs],
    )


def count_computed(mesh: Mesh, requests: Sequence[Sequence[str]]) -> list[tuple[list[str], int]]:
    """Of each request, the texts that this rank had to compute, and the bytes that it sent."""
    encoder = make_divided(mesh)
    compute, computed = encoder._compute, []

    def watch(text: str) -> torch.Tensor:
        computed.append(text)
        return compute(text)

    encoder._compute = watch  # type: ignore[method-assign]
    told = []
    mesh.meter.take()
    for prompts in requests:
        computed.clear()
        list(encoder.encode_all(prompts))
        told.append((computed.copy(), sum(traffic.sent_bytes for traffic in mesh.meter.take())))
    return told


def held_parameters(mesh: Mesh | None) -> tuple[dict[str, int], list[str]]:
    """The size of each parameter here; and those that keep more memory than they show."""
    model = (make_encoder() if mesh is None else make_divided(mesh)).model
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    wasteful = [
        name
        for name, parameter in model.named_parameters()
        if parameter.untyped_storage().nbytes() != parameter.numel() * parameter.element_size()
        or not parameter.is_contiguous()
        or parameter.requires_grad
    ]
    return sizes, wasteful


def error_with(mesh: Mesh, fault: str) -> float:
    """The error of a prompt if the division had this fault."""
    expected = alone().encode("A cat walks on the grass")
    encoder = make_divided(mesh)
    heads = make_encoder().model.modules()
    for module, whole in zip(encoder.model.modules(), heads, strict=True):
        match fault:
            case "heads are not added up" if isinstance(module, UMT5Attention):
                module.o._forward_hooks.clear()
            case "units are not added up" if hasattr(module, "wo"):
                module.wo._forward_hooks.clear()
            case "biases of the first heads" if isinstance(module, UMT5Attention):
                biases = whole.relative_attention_bias.weight[:, : module.n_heads]
                module.relative_attention_bias.weight = nn.Parameter(biases, requires_grad=False)
    return relative_error(encoder.encode("A cat walks on the grass"), expected)


def encode_in_half(mesh: Mesh) -> tuple[list[torch.dtype], float, float]:
    """In which dtypes parts are added up in a model in bf16, its error, and that of one rank in bf16."""
    exact = alone().encode("A cat walks on the grass")
    whole, together = make_encoder(), make_divided(mesh)
    whole.model.bfloat16()
    together.model.bfloat16()
    dtypes = []
    add_up = Group.add_up

    def watch(group: Group, tensor: torch.Tensor, *, kind: Exchange) -> torch.Tensor:
        dtypes.append(tensor.dtype)
        return add_up(group, tensor, kind=kind)

    Group.add_up = watch  # type: ignore[method-assign]
    try:
        embedding = together.encode("A cat walks on the grass")
    finally:
        Group.add_up = add_up  # type: ignore[method-assign]
    assert embedding.dtype == torch.bfloat16
    return dtypes, relative_error(embedding, exact), relative_error(whole.encode("A cat walks on the grass"), exact)


def lose_step(mesh: Mesh) -> float:
    """One rank fails after the first of two texts; links are made anew, all forget, and go on. The error of that."""
    encoder = make_divided(mesh)
    encoded = encoder.encode_all(["a", "b"])
    next(encoded)
    if mesh.rank == 0:
        encoder.forget()  # as if it had never remembered the text that the others remember
    mesh.agree(0)
    mesh.drop()
    mesh.agree(0)
    mesh.build()
    encoder.forget()
    pairs = zip(encoder.encode_all(["a", "b"]), alone().encode_all(["a", "b"]), strict=True)
    return max(relative_error(actual, expected) for actual, expected in pairs)


def encode_ungated(mesh: Mesh) -> float:
    """The error of a model whose feed-forward has no gate."""
    expected = make_encoder(feed_forward_proj="relu").encode("A cat")
    return relative_error(make_divided(mesh, feed_forward_proj="relu").encode("A cat"), expected)


# ---- the tests --------------------------------------------------------------------------------------------------


def test_embeddings_are_those_of_one_rank(ranks: Crew) -> None:
    """One prompt and two, equal, empty, repeated and cut off: the bytes of one rank where layers are whole."""
    told = ranks.run(compare, REQUESTS)
    assert max(told[0].errors) < BOUND, told[0].errors
    assert all(told[0].has_same_zeros)
    assert all(told[0].are_equal) or ranks.topology.text_tensor > 1
    assert all(each.digests == told[0].digests for each in told)


def test_all_ranks_remember_the_same(ranks: Crew) -> None:
    """More prompts than are remembered: none waits for a text that others still know, and all forget the same."""
    told = ranks.run(compare, MANY, len(MANY) * 2 - 2)
    assert len(told[0].errors) == 2
    assert max(told[0].errors) < BOUND
    assert len(told[0].remembered) == NUM_REMEMBERED
    assert told[0].remembered[-2:] == MANY[-1]
    assert all(each.digests == told[0].digests and each.remembered == told[0].remembered for each in told)


def test_each_group_encodes_its_texts(ranks: Crew) -> None:
    """Texts go to the groups in turn; what is remembered is neither computed nor sent."""
    groups = ranks.topology.text_groups
    told = ranks.run(count_computed, [["a", "b"], ["b", "c"], ["a", "c"]])
    for rank, ((first, _), (second, _), third) in enumerate(told):
        assert first == [text for index, text in enumerate("ab") if rank in groups[index % len(groups)]]
        assert second == (["c"] if rank in groups[0] else [])
        assert third == ([], 0)
    embedding_bytes = NUM_TOKENS * CONFIG["d_model"] * 4
    exchanges = 2 * CONFIG["num_layers"] if ranks.topology.text_tensor > 1 else 0
    sent = [((exchanges + (ranks.topology.world_size - 1) * (rank == 0)) * embedding_bytes) for rank in groups[0]]
    assert [told[rank][1][1] for rank in groups[0]] == sent


def test_layers_fall_to_ranks_in_equal_parts(ranks: Crew) -> None:
    """All but embeddings and norms is held once a group, and the memory of the rest is free."""
    whole, _ = held_parameters(None)
    for sizes, wasteful in ranks.run(held_parameters):
        assert not wasteful
        assert sizes == {
            name: size if "norm" in name or name == "shared.weight" else size // ranks.topology.text_tensor
            for name, size in whole.items()
        }


@only_divided
@pytest.mark.parametrize("fault", ["heads are not added up", "units are not added up", "biases of the first heads"])
def test_the_bound_finds_faults(ranks: Crew, fault: str) -> None:
    """A division with a fault is off by a thousand times the bound; without one the same check is within it."""
    assert max(ranks.run(error_with, "none")) < BOUND
    assert min(ranks.run(error_with, fault)) > 1000 * BOUND


@only_divided
def test_half_precision_is_added_up_in_fp32(ranks: Crew) -> None:
    """Divided layers in bf16 are about as near to fp32 as whole ones."""
    for rank, (dtypes, error, error_alone) in enumerate(ranks.run(encode_in_half)):
        computes = rank in ranks.topology.text_groups[0]
        assert dtypes == [torch.float32] * (2 * CONFIG["num_layers"] if computes else 0)
        assert error < 1.5 * error_alone


@only_divided
def test_a_feed_forward_without_gate_is_divided(ranks: Crew) -> None:
    """UMT5 comes with and without."""
    assert max(ranks.run(encode_ungated)) < BOUND


def test_a_failure_leaves_nothing_behind(ranks: Crew) -> None:
    """After new links, and once all have forgotten, the ranks encode together again, whatever each remembered."""
    assert max(ranks.run(lose_step)) < BOUND


def test_what_does_not_divide_is_refused() -> None:
    """Both faults at once, with the arithmetic; the model stays whole."""
    encoder = make_encoder()
    mesh = Mesh(Topology(ring=5, text_tensor=5), 0, torch.device("cpu"))
    with pytest.raises(ValueError) as caught:
        split_text_model(encoder.model, mesh)
    assert str(caught.value) == (
        "text_tensor: 5 does not divide the heads of the text encoder, 4 = 5 x 0 + 4; "
        "text_tensor: 5 does not divide the d_ff of the text encoder, 48 = 5 x 9 + 3"
    )
    assert held_parameters(None)[0] == {name: each.numel() for name, each in encoder.model.named_parameters()}
