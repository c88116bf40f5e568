"""Where a model's files are and what they say about it.

Knows the directory, its configs and the card made from them. Imports no torch: the server process reads this too.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Final

from wan_grpc.domain.errors import UnusableModelError
from wan_grpc.domain.formats import MAX_SIDE
from wan_grpc.domain.variants import T2V_A14B, T2V_A14B_SIZES, Defaults, Limits, ModelCard, Task
from wan_grpc.pipeline import hub, layout
from wan_grpc.pipeline.published import T2V_A14B_CONFIGS, T2V_A14B_ID

DUMMY: Final = "dummy"
LOAD_FORMATS: Final = ("auto", DUMMY)
DEFAULT_LIMITS: Final = Limits()
EXTRA_NAME: Final = "wan_grpc.json"
"""A file beside model_index.json in which a checkpoint may carry defaults of its own."""


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
            return T2V_A14B_CONFIGS.get(name, {})
        value, trouble = layout.read_json(Path(self.directory, name))
        if value is None and trouble != "is missing":
            raise UnusableModelError(f"{self.model_path}: {name} {trouble}")
        return value or {}

    def component(self, name: str) -> Mapping[str, Any]:
        """The config of a component, e.g. `transformer_2`."""
        return self.config(f"{name}/{layout.CONFIGS[name]}")

    def weight_files(self, component: str) -> list[Path]:
        assert self.directory is not None, "a checkpoint without files has no weights to read"
        files, trouble = layout.weight_files(Path(self.directory, component), layout.WEIGHT_STEMS[component])
        if trouble:
            raise UnusableModelError(f"{self.model_path}: {component}/{trouble}")
        return files


def locate(model_path: str, *, load_format: str) -> Checkpoint:
    """Find the checkpoint that `model_path` names, a directory or a hub id, and check that it is whole and served.

    load_format: `auto` needs every file; `dummy` needs configs alone, and nothing at all for the published T2V-A14B id.

    Raises:
        UnusableModelError: it cannot be had or cannot be served: every fault found, by file name.
    """
    if load_format not in LOAD_FORMATS:
        raise UnusableModelError(f"load format {load_format} is not one of {', '.join(LOAD_FORMATS)}")
    is_dummy = load_format == DUMMY
    directory = Path(model_path).expanduser()
    if not directory.is_dir():
        if is_dummy and model_path == T2V_A14B_ID:
            return Checkpoint(model_path=model_path, directory=None)
        _refuse_what_is_a_path(model_path, directory)
        directory = hub.fetch(model_path, with_weights=not is_dummy)
    found = list(layout.problems(directory, with_weights=not is_dummy))
    if found:
        raise UnusableModelError(f"{model_path} cannot be served: {'; '.join(found)}")
    return Checkpoint(model_path=model_path, directory=str(directory.resolve()))


def _refuse_what_is_a_path(model_path: str, directory: Path) -> None:
    """A path that is not there must not become a question to the hub."""
    if directory.exists():
        raise UnusableModelError(f"{model_path} is not a directory")
    if model_path.startswith(("/", "~", "./", "../")) or model_path.count("/") != 1:
        raise UnusableModelError(f"{model_path} is neither a directory nor a hub id such as {T2V_A14B_ID}")


def read_card(checkpoint: Checkpoint, *, model_id: str, limits: Limits | None = None) -> ModelCard:
    """What the model can do, from its own files; the facts of T2V-A14B where they say nothing.

    Raises:
        UnusableModelError: a value in the files is of the wrong type.
    """
    vae = checkpoint.component("vae")
    transformer = checkpoint.component("transformer")
    patch = transformer.get("patch_size", [1, 2, 2])
    num_positions = transformer.get("rope_max_seq_len", 1024)  # on each axis of the latents
    size_multiple = vae.get("scale_factor_spatial", 8) * patch[1]
    temporal_factor = vae.get("scale_factor_temporal", 4) * patch[0]
    extra = checkpoint.config(EXTRA_NAME)
    defaults = _defaults(checkpoint, extra)
    own_size = ((defaults.width, defaults.height),)
    return ModelCard(
        model_id=model_id,
        task=Task.TEXT_TO_VIDEO,
        defaults=defaults,
        limits=_within(limits or DEFAULT_LIMITS, max_num_frames=(num_positions - 1) * temporal_factor + 1),
        size_multiple=size_multiple,
        max_side=min(MAX_SIDE, num_positions * size_multiple),
        temporal_factor=temporal_factor,
        embedded=extra.get("embedded", False) is True,
        sizes=T2V_A14B_SIZES if own_size[0] in T2V_A14B_SIZES else own_size,
    )


def _within(limits: Limits, *, max_num_frames: int) -> Limits:
    return replace(limits, max_num_frames=min(limits.max_num_frames, max_num_frames))


def _defaults(checkpoint: Checkpoint, extra: Mapping[str, Any]) -> Defaults:
    values: dict[str, Any] = {field.name: getattr(T2V_A14B, field.name) for field in fields(Defaults)}
    values["boundary_ratio"] = checkpoint.config("model_index.json").get("boundary_ratio", T2V_A14B.boundary_ratio)
    values["flow_shift"] = checkpoint.component("scheduler").get("flow_shift", T2V_A14B.flow_shift)
    own = extra.get("defaults", {})
    for name, value in own.items():
        if name not in values:
            raise UnusableModelError(f"{checkpoint.model_path}: {EXTRA_NAME}: defaults.{name} is not a default")
        values[name] = value
    for name, value in values.items():
        kind = type(getattr(T2V_A14B, name))
        if type(value) is int and kind is float:
            values[name] = float(value)
        elif type(value) is not kind:
            sentence = f"{name} is {value!r}, not of type {kind.__name__}"
            raise UnusableModelError(f"{checkpoint.model_path}: {sentence}")
    return Defaults(**values)
