"""Where a model's files are and what they say about it.

Knows the directory, its configs and the card made from them. Imports no torch: the server process reads this too.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Final

from wan_grpc.domain.errors import UnusableModelError
from wan_grpc.domain.formats import MAX_SIDE
from wan_grpc.domain.variants import (
    I2V_A14B,
    I2V_A14B_SIZES,
    T2V_A14B,
    T2V_A14B_SIZES,
    TI2V_5B,
    TI2V_5B_SIZES,
    Defaults,
    Limits,
    ModelCard,
    Task,
)
from wan_grpc.pipeline import embedded, fit, hub, layout, published

DUMMY: Final = "dummy"
LOAD_FORMATS: Final = ("auto", DUMMY)
DEFAULT_LIMITS: Final = Limits()
EXTRA_NAME: Final = "wan_grpc.json"
"""A file beside model_index.json in which a checkpoint may say its own `defaults` and the `words` that it knows."""
_PUBLISHED: Final[Mapping[Task, tuple[Defaults, tuple[tuple[int, int], ...]]]] = {
    Task.TEXT_TO_VIDEO: (T2V_A14B, T2V_A14B_SIZES),
    Task.IMAGE_TO_VIDEO: (I2V_A14B, I2V_A14B_SIZES),
    Task.TEXT_IMAGE_TO_VIDEO: (TI2V_5B, TI2V_5B_SIZES),
}
"""Defaults and sizes of the published model of each task."""
_OF_TWO_EXPERTS: Final = ("boundary_ratio", "guidance_scale_2")


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A checkpoint that was found and checked. Plain enough to travel to the ranks."""

    model_path: str
    """As the operator named it."""
    directory: str | None
    """Where its files are; None for the published shapes with no files at all."""

    def config(self, name: str) -> Mapping[str, Any]:
        """The JSON object in the file `name`, e.g. `vae/config.json`; empty if there is no such file."""
        if self.directory is None:
            return published.CONFIGS[self.model_path].get(name, {})
        value, trouble = layout.read_json(Path(self.directory, name))
        if value is None and trouble != "is missing":
            raise UnusableModelError(f"{self.model_path}: {name} {trouble}")
        return value or {}

    def component(self, name: str) -> Mapping[str, Any]:
        """The config of a component, e.g. `transformer_2`."""
        return self.config(f"{name}/{layout.CONFIGS[name]}")

    def value(self, component: str, name: str) -> Any:
        """What the component's config says of `name`, or what its class takes it for."""
        return fit.value_of(component, self.component(component), name)

    @property
    def task(self) -> Task:
        return layout.task_of(self.config(layout.INDEX))

    @property
    def has_two_experts(self) -> bool:
        return layout.has_component(self.config(layout.INDEX), "transformer_2")

    @property
    def embeds_images(self) -> bool:
        """Whether the experts listen to an image encoder."""
        return self.value("transformer", "image_dim") is not None

    @property
    def tokenizer_folder(self) -> Path | None:
        """Where the tokenizer's files are; None where there are none, as random weights need none."""
        folder = None if self.directory is None else Path(self.directory, "tokenizer")
        return folder if folder and any((folder / name).is_file() for name in layout.TOKENIZER_FILES) else None

    def weight_files(self, component: str) -> list[Path]:
        assert self.directory is not None, "a checkpoint without files has no weights to read"
        files, trouble = layout.weight_files(Path(self.directory, component), layout.WEIGHT_STEMS[component])
        if trouble:
            raise UnusableModelError(f"{self.model_path}: {component}/{trouble}")
        return files


def locate(model_path: str, *, load_format: str) -> Checkpoint:
    """Find the checkpoint that `model_path` names, a directory or a hub id, and check that it is whole and served.

    load_format: `auto` needs every file; `dummy` needs configs alone, and nothing at all for the published ids.

    Raises:
        UnusableModelError: it cannot be had or cannot be served: every fault found, by file name.
    """
    if load_format not in LOAD_FORMATS:
        raise UnusableModelError(f"load format {load_format} is not one of {', '.join(LOAD_FORMATS)}")
    is_dummy = load_format == DUMMY
    directory = Path(model_path).expanduser()
    if not directory.is_dir():
        if is_dummy and model_path in published.CONFIGS:
            return Checkpoint(model_path=model_path, directory=None)
        _refuse_what_is_a_path(model_path, directory)
        directory = _fetch(model_path, with_weights=not is_dummy)
    _check(model_path, directory, with_weights=not is_dummy)
    return Checkpoint(model_path=model_path, directory=str(directory.resolve()))


def _fetch(repository: str, *, with_weights: bool) -> Path:
    """Configs first, so that what is not served is refused before its weights are on their way."""
    directory = hub.fetch(repository, weights_of=())
    if not with_weights:
        return directory
    _check(repository, directory, with_weights=False)
    index, _ = layout.read_json(directory / layout.INDEX)
    assert index is not None, "it has been read before"
    return hub.fetch(repository, weights_of=layout.weighty_components(index))


def _check(model_path: str, directory: Path, *, with_weights: bool) -> None:
    found = list(layout.problems(directory, with_weights=with_weights))
    if found:
        raise UnusableModelError(f"{model_path} cannot be served: {'; '.join(found)}")


def _refuse_what_is_a_path(model_path: str, directory: Path) -> None:
    """A path that is not there must not become a question to the hub."""
    if directory.exists():
        raise UnusableModelError(f"{model_path} is not a directory")
    if model_path.startswith(("/", "~", "./", "../")) or model_path.count("/") != 1:
        raise UnusableModelError(
            f"{model_path} is neither a directory nor a hub id such as {published.T2V_A14B_ID}, nor one of the "
            f"embedded models, {' and '.join(embedded.NAMES)}"
        )


def read_card(checkpoint: Checkpoint, *, model_id: str, limits: Limits | None = None) -> ModelCard:
    """What the model can do, from its own files; the facts of the published model of its task where they say nothing.

    Raises:
        UnusableModelError: a value in the files is of the wrong type.
    """
    task = checkpoint.task
    _, published_sizes = _PUBLISHED[task]
    num_positions = checkpoint.value("transformer", "rope_max_seq_len")  # on each axis of the latents
    size_multiple = checkpoint.value("vae", "scale_factor_spatial") * checkpoint.value("transformer", "patch_size")[1]
    temporal_factor = checkpoint.value("vae", "scale_factor_temporal")
    extra = checkpoint.config(EXTRA_NAME)
    defaults = _defaults(checkpoint, extra)
    own_size = (defaults.width, defaults.height)
    embeds_two = checkpoint.embeds_images and checkpoint.value("transformer", "pos_embed_seq_len") is not None
    return ModelCard(
        model_id=model_id,
        task=task,
        defaults=defaults,
        limits=_within(limits or DEFAULT_LIMITS, max_num_frames=(num_positions - 1) * temporal_factor + 1),
        size_multiple=size_multiple,
        max_side=min(MAX_SIDE, num_positions * size_multiple),
        temporal_factor=temporal_factor,
        words=_words(checkpoint, extra),
        sizes=published_sizes if own_size in published_sizes else (own_size,),
        takes_last_image=task is Task.IMAGE_TO_VIDEO and (embeds_two or not checkpoint.embeds_images),
        needs_last_image=embeds_two,
    )


def _within(limits: Limits, *, max_num_frames: int) -> Limits:
    return replace(limits, max_num_frames=min(limits.max_num_frames, max_num_frames))


def _defaults(checkpoint: Checkpoint, extra: Mapping[str, Any]) -> Defaults:
    usual, _ = _PUBLISHED[checkpoint.task]
    values: dict[str, Any] = {field.name: getattr(usual, field.name) for field in fields(Defaults)}
    values["flow_shift"] = float(checkpoint.component("scheduler").get("flow_shift", usual.flow_shift))
    boundary = checkpoint.config(layout.INDEX).get("boundary_ratio")
    values["boundary_ratio"] = None if boundary is None else float(boundary)
    for name, value in _own_defaults(checkpoint, extra).items():
        values[name] = _of_kind(checkpoint, name, value)
    if not checkpoint.has_two_experts:
        values["guidance_scale_2"] = values["guidance_scale"]
    return Defaults(**values)


def _own_defaults(checkpoint: Checkpoint, extra: Mapping[str, Any]) -> Mapping[str, Any]:
    own = extra.get("defaults", {})
    if not isinstance(own, dict):
        raise UnusableModelError(f"{checkpoint.model_path}: {EXTRA_NAME}: defaults is {own!r}, not an object")
    for name in own:
        if name not in {field.name for field in fields(Defaults)}:
            raise UnusableModelError(f"{checkpoint.model_path}: {EXTRA_NAME}: defaults.{name} is not a default")
        if name in _OF_TWO_EXPERTS and not checkpoint.has_two_experts:
            sentence = f"defaults.{name} is for two experts, and this model has one"
            raise UnusableModelError(f"{checkpoint.model_path}: {EXTRA_NAME}: {sentence}")
    return own


def _words(checkpoint: Checkpoint, extra: Mapping[str, Any]) -> frozenset[str]:
    words = extra.get("words", [])
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        raise UnusableModelError(f"{checkpoint.model_path}: {EXTRA_NAME}: words is not a list of strings")
    return frozenset(word.lower() for word in words)


def _of_kind(checkpoint: Checkpoint, name: str, value: Any) -> Any:
    """`value` of the type that the default `name` has."""
    kind = type(getattr(T2V_A14B, name))
    if type(value) is int and kind is float:
        return float(value)
    if type(value) is not kind:
        sentence = f"{EXTRA_NAME}: defaults.{name} is {value!r}, not of type {kind.__name__}"
        raise UnusableModelError(f"{checkpoint.model_path}: {sentence}")
    return value
