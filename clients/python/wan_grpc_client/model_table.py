"""The answer of GetModel as a table for people, at most 100 columns wide."""

import textwrap
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Final

from wan_grpc.v1 import generation_pb2 as pb
from wan_grpc.v1 import model_pb2
from wan_grpc.v1 import video_generation_service_pb2 as service_pb
from wan_grpc_client.events import word, words

_NUM_COLUMNS: Final = 100
_NAME_COLUMNS: Final = 21
_DEFAULT_COLUMNS: Final = 16
_FORMAT_COLUMNS: Final = (_NAME_COLUMNS, 7, 12, 13)
_NO_LIMIT: Final = ""
_MIB: Final = 2**20


def model_lines(answer: service_pb.GetModelResponse) -> Iterator[str]:
    """What a server can do: facts, then what a request may say, then formats, then what is not served."""
    for name, text in _facts(answer):
        yield from _row((name,), text)
    yield ""
    yield from _request(answer.model)
    yield ""
    yield from _formats(answer.model)
    if answer.unserved:
        yield ""
        yield "not served"
    for part in answer.unserved:
        yield from _unserved(part)


def _facts(answer: service_pb.GetModelResponse) -> Iterator[tuple[str, str]]:
    model, deployment = answer.model, answer.deployment
    yield "model", model.model_id + (" (embedded: knows coloured shapes in motion alone)" if model.embedded else "")
    yield "server", f"wan-grpc {answer.server_version}, {'ready' if deployment.ready else deployment.detail}"
    load = f"{deployment.num_running} running, {deployment.num_queued} waiting"
    yield "queue", f"{load}, room for {model.limits.max_queued}"
    yield "tasks", _listed(words(pb.Task, model.tasks))
    sizes = "".join(f"{size.width}x{size.height}, " for size in model.sizes)
    side = f" up to {model.rules.max_side}" if model.rules.max_side else ""
    yield "sizes", f"{sizes}{'or ' if sizes else ''}any in multiples of {model.rules.size_multiple}{side}"
    yield "frames", f"1 more than a multiple of {model.rules.num_frames_multiple}"
    yield "images", _images(model.rules)
    yield "text", f"the first {model.rules.max_text_tokens} tokens of a prompt count"
    yield "topology", _topology(deployment.topology)
    yield "device", deployment.device or "not known before the ranks are ready"
    yield "dtype", deployment.dtype
    yield "attention", deployment.attention_backend
    yield "weights", deployment.load_format
    yield "memory", _listed(f"rank {one.rank} {one.peak_bytes / 2**30:.2f} GiB" for one in deployment.rank_memory)
    yield "adapters", _listed(adapter.name for adapter in model.adapters)
    yield "profiles", "; ".join(map(_profile, model.acceleration_profiles)) or "none: always the exact computation"


def _images(rules: model_pb2.ModelRules) -> str:
    if not rules.takes_image:
        return "none: videos are made from text alone"
    if rules.needs_last_image:
        return "a first and a last image must be given; PNG, JPEG or WebP"
    first = "a first image must be given" if rules.needs_image else "a first image may be given"
    return f"{first}, {'a last one may be' if rules.takes_last_image else 'a last one may not'}; PNG, JPEG or WebP"


def _topology(topology: model_pb2.Topology) -> str:
    axes = " x ".join(f"{axis} {getattr(topology, axis)}" for axis in ("cfg", "ring", "ulysses"))
    replicas = f"{topology.replicas} replicas, each of " if topology.replicas > 1 else ""
    return f"{replicas}world_size {topology.world_size} = {axes}; text_tensor {topology.text_tensor}"


def _profile(profile: model_pb2.AccelerationProfile) -> str:
    measured = [
        f"{name} {getattr(profile, name):g}" for name in ("ssim", "psnr_db", "speedup") if profile.HasField(name)
    ]
    return f"{profile.name}: {profile.description}" + (f" ({_listed(measured)})" if measured else "")


def _request(model: model_pb2.Model) -> Iterator[str]:
    yield from _row(("request", "default"), "at most", _DEFAULT_COLUMNS)
    for name, default, limit in _fields(model):
        yield from _row((name, default), limit, _DEFAULT_COLUMNS)
    yield from _row(("negative_prompt",), model.defaults.negative_prompt or "none")


def _fields(model: model_pb2.Model) -> Iterator[tuple[str, str, str]]:
    defaults, limits = model.defaults, model.limits
    yield "prompt", "", f"{limits.max_prompt_bytes} bytes of UTF-8"
    if model.rules.takes_image:
        yield "image", "", f"{_bytes(limits.max_image_bytes)}, {limits.max_image_pixels} pixels"
    yield "size", f"{defaults.width}x{defaults.height}", f"{limits.max_area} pixels"
    yield "num_frames", str(defaults.num_frames), str(limits.max_num_frames)
    yield "num_inference_steps", str(defaults.num_inference_steps), str(limits.max_inference_steps)
    yield "fps", str(defaults.fps), _NO_LIMIT
    yield "guidance_scale", f"{defaults.guidance_scale:g}", _NO_LIMIT
    if defaults.HasField("boundary_ratio"):
        yield "guidance_scale_2", f"{defaults.guidance_scale_2:g}", _NO_LIMIT
        yield "boundary_ratio", f"{defaults.boundary_ratio:g}", _NO_LIMIT
    yield "flow_shift", f"{defaults.flow_shift:g}", _NO_LIMIT
    yield "format", word(pb.OutputFormat, defaults.output_format), _NO_LIMIT


def _formats(model: model_pb2.Model) -> Iterator[str]:
    yield from _row(
        ("format", "file", "crf (usual)", "quality"), "pixel formats, the usual one first", *_FORMAT_COLUMNS[1:]
    )
    rules = {rule.output_format: rule for rule in model.format_rules}
    for number in model.output_formats:
        rule = rules.get(number, model_pb2.FormatRules())
        cells = (word(pb.OutputFormat, number), rule.file_suffix, _range(rule, "crf"), _range(rule, "quality"))
        yield from _row(cells, "; ".join(_format_notes(rule, model.rules)), *_FORMAT_COLUMNS[1:])


def _format_notes(rule: model_pb2.FormatRules, rules: model_pb2.ModelRules) -> Iterator[str]:
    yield _listed(words(pb.PixelFormat, rule.pixel_formats))
    if rule.is_picture:
        yield "one frame"
    if rule.HasField("max_fps"):
        yield f"at most {rule.max_fps} fps"
    if rule.HasField("max_pixels"):
        yield f"at most {rule.max_pixels} pixels in all frames"
    if rule.min_side > rules.size_multiple:
        yield f"sides from {rule.min_side}"
    if 0 < rule.max_side < rules.max_side:
        yield f"sides up to {rule.max_side}"


def _range(rule: model_pb2.FormatRules, name: str) -> str:
    found: model_pb2.IntegerRange = getattr(rule, name)
    return f"{found.min}-{found.max} ({found.default})" if rule.HasField(name) else "-"


def _unserved(part: Any) -> Iterator[str]:
    name = (part.rpc.removeprefix("wan_grpc.v1.") or part.field).removeprefix("spec.")
    yield from _row((f"  {name}",), part.description, first_columns=31)


def _row(cells: Sequence[str], text: str, *columns: int, first_columns: int = _NAME_COLUMNS) -> Iterator[str]:
    """Cells in their columns, then `text`, which goes on below itself where it does not fit."""
    widths = (first_columns, *columns)
    begin = "".join(f"{cell:<{width - 1}} " for cell, width in zip(cells, widths, strict=True))
    indent = " " * sum(widths)
    wrapped = textwrap.wrap(text, _NUM_COLUMNS, initial_indent=begin, subsequent_indent=indent, break_on_hyphens=False)
    yield from wrapped or [begin.rstrip()]


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names) or "none"


def _bytes(count: int) -> str:
    return f"{count // _MIB} MiB" if count % _MIB == 0 else f"{count} bytes"
