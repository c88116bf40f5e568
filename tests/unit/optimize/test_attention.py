import pytest
import torch

from wan_grpc.optimize.attention import choose

CPU = torch.device("cpu")


def plain(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """softmax(q k^T / sqrt(D)) v over [B, S, H, D], written out."""
    scores = torch.einsum("bqhd,bkhd->bhqk", query, key) * query.shape[-1] ** -0.5
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(dim=-1), value)


@pytest.mark.parametrize("wanted", ["auto", "torch", "flash", "math"])
def test_every_kernel_attends(wanted: str) -> None:
    """Each gives the written-out formula, also with as many keys as a text has."""
    attention = choose(wanted, device=CPU, dtype=torch.float32)
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, length, 3, 16) for length in (20, 7, 7))
    expected = plain(query, key, value)
    torch.testing.assert_close(attention.function(query, key, value), expected, rtol=1e-4, atol=1e-5)
    assert attention.name == ("torch_sdpa" if wanted == "auto" else f"{wanted}_sdpa")


@pytest.mark.parametrize(
    ("wanted", "sentence"),
    [
        ("fastest", "attention: fastest is not one of auto, torch, cudnn, flash, math"),
        ("cudnn", "attention: cudnn needs a CUDA device and half precision, not cpu and torch.bfloat16"),
    ],
)
def test_a_kernel_that_is_not_there_is_refused(wanted: str, sentence: str) -> None:
    """By name, before anything runs."""
    with pytest.raises(ValueError, match=sentence):
        choose(wanted, device=CPU, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("capability", "dtype", "hip", "expected"),
    [
        ((9, 0), torch.bfloat16, None, "cudnn_sdpa"),
        ((10, 0), torch.bfloat16, None, "cudnn_sdpa"),
        ((9, 0), torch.float32, None, "torch_sdpa"),
        ((8, 0), torch.bfloat16, None, "torch_sdpa"),
        ((9, 4), torch.bfloat16, "7.0", "torch_sdpa"),
    ],
)
def test_auto_knows_the_device(
    capability: tuple[int, int],
    dtype: torch.dtype,
    hip: str | None,
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On NVIDIA from Hopper on cuDNN in half precision, else what torch prefers."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "hip", hip)
    assert choose("auto", device=torch.device("cuda:0"), dtype=dtype).name == expected


@pytest.mark.parametrize("wanted", ["auto", "torch", "flash", "math"])
@pytest.mark.parametrize("num_keys", [1, 7, 300])
def test_every_kernel_tells_its_log_sum_exp(wanted: str, num_keys: int) -> None:
    """The natural logarithm of the sum of exponentials of the scores, beside the result that the kernel gives."""
    attention = choose(wanted, device=CPU, dtype=torch.float32)
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, length, 3, 16) for length in (20, num_keys, num_keys))
    out, lse = attention.with_lse(query, key, value)
    scores = torch.einsum("bqhd,bkhd->bhqk", query, key) * query.shape[-1] ** -0.5
    torch.testing.assert_close(out, plain(query, key, value), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(lse, scores.logsumexp(dim=-1), rtol=1e-5, atol=1e-5)


def test_the_formula_is_computed_in_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """However few scores fit at once, the result is the same."""
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, length, 2, 8) for length in (11, 5, 5))
    attend = choose("math", device=CPU, dtype=torch.float32).with_lse
    expected = attend(query, key, value)
    monkeypatch.setattr("wan_grpc.optimize.attention._MATH_SCORES", 30)
    for part, whole in zip(attend(query, key, value), expected, strict=True):
        torch.testing.assert_close(part, whole)
