"""What is wrong with a checkpoint directory, one sentence a fault.

Knows the published diffusers layout and the head of a safetensors file. Reads no weights and imports no torch.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

CLASSES: Final = {
    "scheduler": "UniPCMultistepScheduler",
    "text_encoder": "UMT5EncoderModel",
    "transformer": "WanTransformer3DModel",
    "transformer_2": "WanTransformer3DModel",
    "vae": "AutoencoderKLWan",
}
CONFIGS: Final = {
    "scheduler": "scheduler_config.json",
    "text_encoder": "config.json",
    "transformer": "config.json",
    "transformer_2": "config.json",
    "vae": "config.json",
}
WEIGHT_STEMS: Final = {
    "image_encoder": "model",
    "text_encoder": "model",
    "transformer": "diffusion_pytorch_model",
    "transformer_2": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
}
"""Components with weights, and how the names of their files begin."""
TOKENIZER_FILES: Final = ("tokenizer.json", "spiece.model")
_PICKLED: Final = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_MAX_HEADER_BYTES: Final = 100_000_000
"""The largest header that the safetensors library reads."""
_OTHER_PIPELINES: Final = {
    "WanImageToVideoPipeline": "an image-to-video model (I2V)",
    "WanVideoToVideoPipeline": "a video-to-video model",
    "WanVACEPipeline": "a VACE model",
    "WanAnimatePipeline": "an Animate model",
}


def problems(directory: Path, *, with_weights: bool) -> Iterator[str]:
    """Everything that keeps `directory` from being served: nothing when it is the T2V-A14B layout, whole.

    with_weights: False where random weights will be made, so that configs are enough.
    """
    index, trouble = read_json(directory / "model_index.json")
    if index is None:
        yield f"model_index.json {trouble}"
        return
    refusal = _other_model(index)
    if refusal is not None:
        yield f"model_index.json describes {refusal}, which is not served by this version; T2V-A14B models are"
        return
    yield from _index_problems(index)
    for component, config in CONFIGS.items():
        yield from _config_problems(directory, component, config)
    if with_weights:
        yield from _tokenizer_problems(directory / "tokenizer")
        for component, stem in WEIGHT_STEMS.items():
            yield from _weight_problems(directory, component, stem)


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


def _other_model(index: Mapping[str, Any]) -> str | None:
    class_name = index.get("_class_name")
    if class_name != "WanPipeline":
        return _OTHER_PIPELINES.get(str(class_name), f"a {class_name}")
    if index.get("expand_timesteps"):
        return "a text-and-image-to-video model (TI2V-5B)"
    if not _is_present(index, "transformer_2"):
        return "a model with one expert"
    return None


def _is_present(index: Mapping[str, Any], component: str) -> bool:
    return _class_of(index, component) is not None


def _class_of(index: Mapping[str, Any], component: str) -> str | None:
    entry = index.get(component)
    return entry[1] if isinstance(entry, list) and len(entry) == 2 else None


def _index_problems(index: Mapping[str, Any]) -> Iterator[str]:
    for component, expected in CLASSES.items():
        found = _class_of(index, component)
        if found is None:
            yield f"model_index.json has no {component}"
        elif found != expected:
            yield f"model_index.json: {component} is a {found}; only {expected} is served by this version"
    boundary = index.get("boundary_ratio")
    if not isinstance(boundary, int | float) or not 0.0 <= boundary <= 1.0:
        yield f"model_index.json: boundary_ratio is {boundary}; between 0 and 1 is needed with two experts"


def _config_problems(directory: Path, component: str, name: str) -> Iterator[str]:
    if not (directory / component).is_dir():
        yield f"{component}/ is missing"
        return
    config, trouble = read_json(directory / component / name)
    if config is None:
        yield f"{component}/{name} {trouble}"
    elif component == "scheduler" and not _is_flow_matching(config):
        yield (
            f"scheduler/{name}: prediction_type {config.get('prediction_type')} with use_flow_sigmas "
            f"{config.get('use_flow_sigmas')}; flow_prediction with flow sigmas is needed"
        )
    elif component.startswith("transformer") and config.get("in_channels", 16) != config.get("out_channels", 16):
        channels = config["in_channels"]
        yield f"{component}/{name}: {channels} input channels take an image (I2V), which is not served by this version"


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
