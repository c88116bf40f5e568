"""Whether the configs of a checkpoint's components fit each other and its task, one sentence a misfit.

Knows the numbers that must agree for a video to come out. Reads no files and imports no torch.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

from wan_grpc.domain.variants import Task

Config: TypeAlias = Mapping[str, Any]

_WORDS: Final[Mapping[Task, str]] = {
    Task.TEXT_TO_VIDEO: "text-to-video",
    Task.IMAGE_TO_VIDEO: "image-to-video",
    Task.TEXT_IMAGE_TO_VIDEO: "text-and-image-to-video",
}


@dataclass(frozen=True, slots=True)
class _Value:
    """One value of a config: what it is where the file does not say, and what it may be."""

    default: Any
    is_right: Callable[[Any], bool]
    needed: str


def _is_count(value: Any) -> bool:
    return type(value) is int and value > 0


def _is_list(value: Any, is_right: Callable[[Any], bool]) -> bool:
    return isinstance(value, list) and len(value) > 0 and all(map(is_right, value))


def _is_number(value: Any) -> bool:
    return type(value) in {int, float} and math.isfinite(value)


def _count(default: int) -> _Value:
    return _Value(default, _is_count, "a whole number above 0")


def _count_or_null(default: int | None = None) -> _Value:
    return _Value(default, lambda value: value is None or _is_count(value), "a whole number above 0, or null,")


def _numbers(default: Sequence[float]) -> _Value:
    return _Value(default, lambda value: _is_list(value, _is_number), "a list of numbers")


_TRANSFORMER: Final = {
    "added_kv_proj_dim": _count_or_null(),
    "attention_head_dim": _count(128),
    "image_dim": _count_or_null(),
    "in_channels": _count(16),
    "num_attention_heads": _count(40),
    "out_channels": _count_or_null(16),
    "patch_size": _Value(
        [1, 2, 2],
        lambda value: _is_list(value, _is_count) and len(value) == 3 and value[0] == 1 and value[1] == value[2],
        "[1, n, n]",
    ),
    "pos_embed_seq_len": _count_or_null(),
    "rope_max_seq_len": _count(1024),
    "text_dim": _count(4096),
}
_VALUES: Final[Mapping[str, Mapping[str, _Value]]] = {
    "image_encoder": {"hidden_size": _count(768), "image_size": _count(224), "patch_size": _count(32)},
    "scheduler": {"flow_shift": _Value(1.0, lambda value: _is_number(value) and value > 0, "a number above 0")},
    "text_encoder": {"d_ff": _count(1024), "d_model": _count(512), "num_heads": _count(6)},
    "transformer": _TRANSFORMER,
    "transformer_2": _TRANSFORMER,
    "vae": {
        "dim_mult": _Value([1, 2, 4, 4], lambda value: _is_list(value, _is_count), "a list of whole numbers above 0"),
        "in_channels": _count(3),
        "latents_mean": _numbers([0.0] * 16),
        "latents_std": _numbers([1.0] * 16),
        "out_channels": _count(3),
        "patch_size": _count_or_null(),
        "scale_factor_spatial": _count(8),
        "scale_factor_temporal": _count(4),
        "temperal_downsample": _Value(
            [False, True, True],
            lambda value: _is_list(value, lambda one: isinstance(one, bool)),
            "a list of true and false",
        ),
        "z_dim": _count(16),
    },
}
"""What is asked of configs here or in the card; the defaults are those of the components' own classes."""


def wrong_values(component: str, config: Config) -> Iterator[str]:
    """A sentence for each value of one config that is of the wrong kind."""
    for name, value in _VALUES.get(component, {}).items():
        if name in config and not value.is_right(config[name]):
            yield f"{name} is {config[name]!r}; {value.needed} is needed"


def value_of(component: str, config: Config, name: str) -> Any:
    """What the config says of `name`, or what its class takes it for."""
    return config.get(name, _VALUES[component][name].default)


def problems(task: Task, configs: Mapping[str, Config]) -> Iterator[str]:
    """A sentence for each misfit between the configs of all components, none of which has a wrong value."""
    parts = {
        component: {name: value_of(component, config, name) for name in _VALUES.get(component, {})}
        for component, config in configs.items()
    }
    transformer, vae, d_model = parts["transformer"], parts["vae"], parts["text_encoder"]["d_model"]
    yield from _vae_problems(vae)
    yield from _channel_problems(task, transformer, vae)
    if transformer["text_dim"] != d_model:
        yield _misfit("transformer", "text_dim", transformer, f"text_encoder/config.json has d_model {d_model}")
    if transformer["image_dim"] is not None:
        yield from _image_problems(task, transformer, parts.get("image_encoder"))
    for name in _TRANSFORMER:
        other = parts.get("transformer_2", transformer)
        if name in _SHARED and other[name] != transformer[name]:
            yield _misfit("transformer_2", name, other, f"transformer/config.json has {transformer[name]}")
    if "image_encoder" in configs and "image_processor" in configs:
        yield from _processor_problems(configs["image_processor"], parts["image_encoder"])


_SHARED: Final = frozenset(_TRANSFORMER) - {"attention_head_dim", "num_attention_heads", "added_kv_proj_dim"}
"""What both experts must agree in: all that meets something outside of them."""


def _misfit(component: str, name: str, part: Config, other: str) -> str:
    return f"{component}/config.json: {name} is {part[name]}; {other}"


def _vae_problems(vae: Config) -> Iterator[str]:
    z_dim, patch = vae["z_dim"], vae["patch_size"] or 1
    for name in ("latents_mean", "latents_std"):
        if len(vae[name]) != z_dim:
            yield f"vae/config.json: {name} has {len(vae[name])} values; z_dim is {z_dim}"
    for name in ("in_channels", "out_channels"):
        if vae[name] != 3 * patch**2:
            yield _misfit(
                "vae", name, vae, f"patch_size {vae['patch_size']} makes {3 * patch**2} of red, green and blue"
            )
    if len(vae["temperal_downsample"]) != len(vae["dim_mult"]) - 1:
        yield _misfit(
            "vae", "temperal_downsample", vae, f"dim_mult {vae['dim_mult']} needs one value less than its own"
        )
        return
    spatial = 2 ** len(vae["temperal_downsample"]) * patch
    if vae["scale_factor_spatial"] != spatial:
        yield _misfit("vae", "scale_factor_spatial", vae, f"dim_mult and patch_size make {spatial}")
    temporal = 2 ** sum(vae["temperal_downsample"])
    if vae["scale_factor_temporal"] != temporal:
        yield _misfit("vae", "scale_factor_temporal", vae, f"temperal_downsample makes {temporal}")


def _channel_problems(task: Task, transformer: Config, vae: Config) -> Iterator[str]:
    """In: latents, and for image-to-video their mask and the latents of the image beside them. Out: latents."""
    z_dim = vae["z_dim"]
    beside = vae["scale_factor_temporal"] + z_dim if task is Task.IMAGE_TO_VIDEO else 0
    if transformer["in_channels"] != z_dim + beside:
        needed = f"{_WORDS[task]} with z_dim {z_dim} in vae/config.json has {z_dim + beside}"
        yield _misfit("transformer", "in_channels", transformer, needed)
    if (transformer["out_channels"] or transformer["in_channels"]) != z_dim:
        yield _misfit("transformer", "out_channels", transformer, f"vae/config.json has z_dim {z_dim}")


def _image_problems(task: Task, transformer: Config, image_encoder: Config | None) -> Iterator[str]:
    if task is not Task.IMAGE_TO_VIDEO:
        yield _misfit("transformer", "image_dim", transformer, f"{_WORDS[task]} has null")
        return
    if image_encoder is None:
        yield _misfit("transformer", "image_dim", transformer, "model_index.json has no image_encoder")
        return
    hidden_size = image_encoder["hidden_size"]
    if transformer["image_dim"] != hidden_size:
        other = f"image_encoder/config.json has hidden_size {hidden_size}"
        yield _misfit("transformer", "image_dim", transformer, other)
    inner_dim = transformer["num_attention_heads"] * transformer["attention_head_dim"]
    if transformer["added_kv_proj_dim"] != inner_dim:
        other = f"its heads make {inner_dim}, which is needed with an image_dim"
        yield _misfit("transformer", "added_kv_proj_dim", transformer, other)
    num_tokens = (image_encoder["image_size"] // image_encoder["patch_size"]) ** 2 + 1
    if transformer["pos_embed_seq_len"] not in {None, 2 * num_tokens}:
        other = f"two images in image_encoder/ have {2 * num_tokens} tokens"
        yield _misfit("transformer", "pos_embed_seq_len", transformer, other)


def _processor_problems(processor: Config, image_encoder: Config) -> Iterator[str]:
    """CLIP knows positions for one size alone."""
    size = image_encoder["image_size"]
    crop = processor.get("crop_size", {"height": 224, "width": 224})
    if crop not in (size, {"height": size, "width": size}) or not processor.get("do_center_crop", True):
        yield (
            f"image_processor/preprocessor_config.json: crop_size is {crop} with do_center_crop "
            f"{processor.get('do_center_crop', True)}; image_encoder/config.json has image_size {size}"
        )
