"""Fills a model that was built on the meta device, from files or with random values.

Knows safetensors and parameter names. Does not know what the models compute.
"""

import math
from collections.abc import Collection, Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from wan_grpc.domain.errors import UnusableModelError


def read_weights(
    model: nn.Module,
    files: Iterable[Path],
    *,
    device: torch.device,
    dtype: torch.dtype,
    in_fp32: Collection[str] = (),
    prefix: str = "",
) -> None:
    """Give every parameter of `model` its tensor from `files`, by name.

    Each tensor goes from the mapped file to the device and is cast there: no second copy in host memory.

    in_fp32: modules whose parameters stay in fp32, by a part of their dotted name.
    prefix: with which names may begin in the files alone.

    Raises:
        UnusableModelError: a tensor is missing or has another shape than the config says.
    """
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    for path in files:
        state: dict[str, torch.Tensor] = {}
        with _open(path, device) as shard:
            for stored in shard.keys():  # noqa: SIM118 (not a mapping)
                name = stored.removeprefix(prefix)
                if name in shapes:
                    state[name] = _own(shard.get_tensor(stored), dtype_of(name, dtype, in_fp32))
                    _check_shape(path, name, state[name].shape, shapes[name])
        model.load_state_dict(state, strict=False, assign=True)
    missing = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if missing:
        folder = path.parent.name
        raise UnusableModelError(f"{folder}/ lacks {len(missing)} tensors that its config asks for, e.g. {missing[0]}")


def random_weights(
    model: nn.Module, *, seed: int, device: torch.device, dtype: torch.dtype, in_fp32: Collection[str] = ()
) -> None:
    """Give every parameter of `model` values that keep activations of any depth finite, the same for one seed."""
    generator = torch.Generator(device).manual_seed(seed)
    state: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters():
        kind = dtype_of(name, dtype, in_fp32)
        state[name] = random_values(name, parameter.shape, generator=generator, device=device, dtype=kind)
    model.load_state_dict(state, strict=False, assign=True)


def random_values(
    name: str, shape: torch.Size, *, generator: torch.Generator, device: torch.device, dtype: torch.dtype
) -> torch.Tensor:
    """One parameter: 0 for a bias, 1 for a norm, else even over ±√3 σ, where σ keeps the variance of its input."""
    if name.endswith("bias"):
        return torch.zeros(shape, device=device, dtype=dtype)
    if len(shape) == 1 or name.endswith("gamma"):
        return torch.ones(shape, device=device, dtype=dtype)
    bound = math.sqrt(3.0) * _spread(name, shape)
    values = torch.rand(shape, generator=generator, device=device, dtype=dtype)
    # Exact in floating point, so that the same values come out wherever the generator gives the same bits.
    return values.mul_(2.0).sub_(1.0).mul_(bound)


def dtype_of(name: str, dtype: torch.dtype, in_fp32: Collection[str]) -> torch.dtype:
    """The rule of diffusers: a parameter under one of the named modules stays in fp32."""
    return torch.float32 if any(part in in_fp32 for part in name.split(".")) else dtype


def _spread(name: str, shape: torch.Size) -> float:
    if name == "shared.weight":  # an embedding is looked up, not multiplied
        return 1.0
    if "relative_attention_bias" in name:
        return 0.1
    if name.endswith("scale_shift_table"):
        return 1.0 / math.sqrt(shape[-1])
    return 1.0 / math.sqrt(math.prod(shape[1:]))


def _open(path: Path, device: torch.device) -> safe_open:
    try:
        return safe_open(path, framework="pt", device=str(device))
    except (SafetensorError, OSError) as error:
        raise UnusableModelError(f"{path} cannot be read: {error}") from error


def _own(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """In its dtype and in memory of its own: on CPU it would stay a view of the file, which may change."""
    return tensor.to(dtype, copy=tensor.device.type == "cpu")


def _check_shape(path: Path, name: str, found: torch.Size, expected: torch.Size) -> None:
    if found != expected:
        sentence = f"{name} is {list(found)} where the config says {list(expected)}"
        raise UnusableModelError(f"{path.parent.name}/{path.name}: {sentence}")
