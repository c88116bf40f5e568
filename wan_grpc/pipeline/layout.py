"""What is wrong with a checkpoint directory, one sentence a fault, and what kind of model it holds.

Knows the published diffusers layouts and the head of a safetensors file; whether the configs fit each other is asked of
fit.py. Reads no weights and imports no torch.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from wan_grpc.domain.variants import Task
from wan_grpc.pipeline import fit

INDEX: Final = "model_index.json"
CLASSES: Final[Mapping[str, tuple[str, ...]]] = {
    "scheduler": ("UniPCMultistepScheduler",),
    "text_encoder": ("UMT5EncoderModel",),
    "image_processor": ("CLIPImageProcessor", "CLIPImageProcessorFast", "CLIPImageProcessorPil"),
    "image_encoder": ("CLIPVisionModel", "CLIPVisionModelWithProjection"),
    "transformer": ("WanTransformer3DModel",),
    "transformer_2": ("WanTransformer3DModel",),
    "vae": ("AutoencoderKLWan",),
}
"""The components and the classes that each may have."""
CONFIGS: Final[Mapping[str, str]] = {
    "scheduler": "scheduler_config.json",
    "text_encoder": "config.json",
    "image_processor": "preprocessor_config.json",
    "image_encoder": "config.json",
    "transformer": "config.json",
    "transformer_2": "config.json",
    "vae": "config.json",
}
WEIGHT_STEMS: Final[Mapping[str, str]] = {
    "text_encoder": "model",
    "image_encoder": "model",
    "transformer": "diffusion_pytorch_model",
    "transformer_2": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
}
"""Components with weights, and how the names of their files begin."""
PREFIXES: Final[Mapping[str, str]] = {"image_encoder": "vision_model."}
"""With what the names of a component's tensors begin in published files, but not in its class any more."""
TOKENIZER_FILES: Final = ("tokenizer.json", "spiece.model")
_OPTIONAL: Final = ("image_processor", "image_encoder", "transformer_2")
_PIPELINES: Final = ("WanPipeline", "WanImageToVideoPipeline")
_OTHER_PIPELINES: Final[Mapping[str, str]] = {
    "WanVideoToVideoPipeline": "a video-to-video model",
    "WanVACEPipeline": "a VACE model",
    "WanAnimatePipeline": "an Animate model",
}
_PICKLED: Final = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_MAX_HEADER_BYTES: Final = 100_000_000
"""The largest header that the safetensors library reads."""


def problems(directory: Path, *, with_weights: bool) -> Iterator[str]:
    """Everything that keeps `directory` from being served: nothing when it is a published layout, whole.

    with_weights: False where random weights will be made, so that configs are enough.
    """
    index, trouble = read_json(directory / INDEX)
    if index is None:
        yield f"{INDEX} {trouble}"
        return
    class_name = index.get("_class_name")
    if class_name not in _PIPELINES:
        kind = f", {_OTHER_PIPELINES[str(class_name)]}" if str(class_name) in _OTHER_PIPELINES else ""
        yield f"{INDEX}: _class_name is {class_name}{kind}; only {' and '.join(_PIPELINES)} are served by this version"
        return
    yield from _index_problems(index)
    yield from _directory_problems(directory, index)
    if with_weights:
        yield from _tokenizer_problems(directory / "tokenizer")
        for component in weighty_components(index):
            yield from _weight_problems(directory, component, WEIGHT_STEMS[component])


def task_of(index: Mapping[str, Any]) -> Task:
    """What a checkpoint with this model_index.json makes videos from."""
    if index.get("expand_timesteps"):
        return Task.TEXT_IMAGE_TO_VIDEO
    is_i2v = index.get("_class_name") == "WanImageToVideoPipeline"
    return Task.IMAGE_TO_VIDEO if is_i2v else Task.TEXT_TO_VIDEO


def has_component(index: Mapping[str, Any], component: str) -> bool:
    """Whether it is there and not null."""
    return _class_of(index, component) is not None


def weighty_components(index: Mapping[str, Any]) -> list[str]:
    """The components that have weights."""
    return [component for component in WEIGHT_STEMS if has_component(index, component)]


def read_json(path: Path) -> tuple[dict[str, Any] | None, str]:
    """The object in a JSON file and an empty string, or None and what is wrong with the file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None, "is missing"
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        return None, f"cannot be read: {error}"
    return (value, "") if isinstance(value, dict) else (None, "is not a JSON object")


def weight_files(folder: Path, stem: str) -> tuple[list[Path], str]:
    """The safetensors files of one component and an empty string, or what keeps them from being named."""
    index_path = folder / f"{stem}.safetensors.index.json"
    if not index_path.is_file():
        return [folder / f"{stem}.safetensors"], ""
    index, trouble = read_json(index_path)
    if index is None:
        return [], f"{index_path.name} {trouble}"
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        return [], f"{index_path.name} has no weight_map"
    names = sorted({str(name) for name in weight_map.values()})
    outside = [name for name in names if Path(name).name != name]
    if outside:
        return [], f"{index_path.name} names files outside its folder: {', '.join(outside)}"
    return [folder / name for name in names], ""


def _class_of(index: Mapping[str, Any], component: str) -> str | None:
    entry = index.get(component)
    return entry[1] if isinstance(entry, list) and len(entry) == 2 else None


def _index_problems(index: Mapping[str, Any]) -> Iterator[str]:
    for component, classes in CLASSES.items():
        found = _class_of(index, component)
        if found is None and component not in _OPTIONAL:
            yield f"{INDEX} has no {component}"
        elif found is not None and found not in classes:
            yield f"{INDEX}: {component} is a {found}; only {' or '.join(classes)} is served by this version"
    yield from _expert_problems(index)
    if has_component(index, "image_encoder") and not has_component(index, "image_processor"):
        yield f"{INDEX} has an image_encoder and no image_processor"


def _expert_problems(index: Mapping[str, Any]) -> Iterator[str]:
    boundary, timesteps = index.get("boundary_ratio"), index.get("expand_timesteps", False)
    if not has_component(index, "transformer_2"):
        if boundary is not None:
            yield f"{INDEX}: boundary_ratio is {boundary}, and there is no transformer_2 below it"
    elif isinstance(boundary, bool) or not isinstance(boundary, int | float) or not 0.0 <= boundary <= 1.0:
        yield f"{INDEX}: boundary_ratio is {boundary}; between 0 and 1 is needed with two experts"
    if not isinstance(timesteps, bool):
        yield f"{INDEX}: expand_timesteps is {timesteps!r}, neither true nor false"
    elif timesteps and has_component(index, "transformer_2"):
        yield f"{INDEX}: expand_timesteps is true, and there is a transformer_2; such a model has one expert"


def _directory_problems(directory: Path, index: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong with the configs, and, once each by itself is right, what does not fit together."""
    configs: dict[str, Mapping[str, Any]] = {}
    wanted = [name for name in CONFIGS if name not in _OPTIONAL or has_component(index, name)]
    for component in wanted:
        config, trouble = _read_config(directory, component)
        found = [trouble] if config is None else list(_config_problems(component, config))
        yield from found
        if config is not None and not found:
            configs[component] = config
    if len(configs) == len(wanted):
        yield from fit.problems(task_of(index), configs)


def _read_config(directory: Path, component: str) -> tuple[dict[str, Any] | None, str]:
    if not (directory / component).is_dir():
        return None, f"{component}/ is missing"
    name = f"{component}/{CONFIGS[component]}"
    config, trouble = read_json(directory / name)
    return config, f"{name} {trouble}"


def _config_problems(component: str, config: Mapping[str, Any]) -> Iterator[str]:
    name = f"{component}/{CONFIGS[component]}"
    if component == "scheduler" and not _is_flow_matching(config):
        yield (
            f"{name}: prediction_type {config.get('prediction_type')} with use_flow_sigmas "
            f"{config.get('use_flow_sigmas')}; flow_prediction with flow sigmas is needed"
        )
    for sentence in fit.wrong_values(component, config):
        yield f"{name}: {sentence}"


def _is_flow_matching(config: Mapping[str, Any]) -> bool:
    return config.get("prediction_type") == "flow_prediction" and config.get("use_flow_sigmas") is True


def _tokenizer_problems(folder: Path) -> Iterator[str]:
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        yield f"tokenizer/ has none of {', '.join(TOKENIZER_FILES)}"


def _weight_problems(directory: Path, component: str, stem: str) -> Iterator[str]:
    folder = directory / component
    if not folder.is_dir():
        return  # said already, with its config
    files, trouble = weight_files(folder, stem)
    if trouble:
        yield f"{component}/{trouble}"
    if len(files) == 1 and not files[0].is_file():
        yield _no_weights(folder, component, files[0].name)
        return
    for path in files:
        fault = _safetensors_fault(path)
        if fault:
            yield f"{component}/{path.name} {fault}"


def _no_weights(folder: Path, component: str, expected: str) -> str:
    pickled = sorted(path.name for path in folder.iterdir() if path.suffix in _PICKLED)
    if pickled:
        return f"{component}/ holds pickled weights ({', '.join(pickled)}); only safetensors are read"
    return f"{component}/{expected} is missing"


def _safetensors_fault(path: Path) -> str | None:
    """Why the file is not a whole safetensors file: 8 bytes of header length, a JSON header, then exactly its data."""
    if not path.is_file():
        return "is missing"
    size = path.stat().st_size
    with path.open("rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
        if header_bytes > _MAX_HEADER_BYTES:
            return "is not a safetensors file (a Git LFS pointer, perhaps)"
        header_text = file.read(header_bytes)
    if size < 8 + header_bytes:
        return f"is truncated: {size} bytes end within its header"
    try:
        header = json.loads(header_text)
        data_bytes = max(entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__")
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        return "is not a safetensors file"
    expected = 8 + header_bytes + data_bytes
    return None if size == expected else f"is truncated: {size} bytes where its header says {expected}"
