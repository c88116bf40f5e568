"""Several videos of one command: a file of prompts, one JSON object a line, and several outputs of one prompt.

Knows names, types and paths. Does not know what a server accepts, nor who makes the videos.
"""

import difflib
import json
import os
import re
import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from wan_grpc.v1 import generation_pb2 as pb
from wan_grpc_client.request import FRAME_SIZE, frame_size, known_names

MAX_OUTPUTS: Final = 8
DEFAULT_FORMAT: Final = "mp4_h264"
SUFFIXES: Final[Mapping[str, str]] = {
    "mp4_h264": ".mp4",
    "mp4_h264_progressive": ".mp4",
    "mp4_h265": ".mp4",
    "webm_vp9": ".webm",
    "webm_av1": ".webm",
    "mkv_ffv1": ".mkv",
    "raw_rgb24": ".rgb",
    "webp_animation": ".webp",
    "gif": ".gif",
    "png": ".png",
    "jpeg": ".jpg",
    "webp": ".webp",
}
"""Of the names of files, by output format."""
PICTURES: Final = frozenset({"png", "jpeg", "webp"})

_KINDS: Final[Mapping[str, Any]] = {
    "prompt": str,
    "negative_prompt": str,
    "image": Path,
    "last_image": Path,
    "image_fit": known_names(pb.ImageFit),
    "size": FRAME_SIZE,
    "width": int,
    "height": int,
    "num_frames": int,
    "fps": int,
    "num_inference_steps": int,
    "guidance_scale": float,
    "guidance_scale_2": float,
    "flow_shift": float,
    "boundary_ratio": float,
    "seed": int,
    "num_outputs": int,
    "format": known_names(pb.OutputFormat),
    "crf": int,
    "bitrate_bps": int,
    "quality": int,
    "pixel_format": known_names(pb.PixelFormat),
    "output_file_name": Path,
}
"""What a line may say: a type, a pattern, or the names to choose from."""
FIELDS: Final = tuple(_KINDS)
_IMAGES: Final = ("image", "last_image")
_SYNONYMS: Final[Mapping[str, str]] = {"image_path": "image", "output_format": "format"}
_INSTEAD: Final = (("size", frozenset({"width", "height"})), ("crf", frozenset({"bitrate_bps"})))
"""What excludes what. A line that says one of these takes nothing of the others from the flags."""
_NAME_CHARACTERS: Final = 60
_NAME_BYTES: Final = 160
_SHOWN_CHARACTERS: Final = 60


class BatchError(ValueError):
    """Lines that cannot be used: every fault with its place."""

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = tuple(problems)


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One video to make."""

    place: str
    """`FILE:LINE`; empty for the command line."""
    values: Mapping[str, Any]
    """What the request says, by the names of Options, and `prompt`. Images are paths."""
    path: Path | None
    """Where the video is to be; None: nowhere."""


def plan(
    flags: Mapping[str, Any],
    *,
    prompts_file: Path | None = None,
    directory: Path | None,
    name_flag: str,
) -> tuple[Job, ...]:
    """Every video that the command asks for, seeds drawn where names need them, each with a file that is no other's.

    flags: what the command line says, by the names in FIELDS; with a file of prompts, for lines that say nothing else.
    directory: where files go; None: nowhere.
    name_flag: what the flag is called that names a file.

    Raises:
        BatchError: naming every line and field that cannot be used.
    """
    said = {name: value for name, value in flags.items() if value is not None}
    wishes = [("", said)] if prompts_file is None else _read(prompts_file, said)
    jobs = [job for place, values in wishes for job in _outputs(place, values)]
    return tuple(_placed(jobs, directory, name_flag))


def suffix(output_format: str | None) -> str:
    """Of the name of a file in this format."""
    return SUFFIXES.get(output_format or DEFAULT_FORMAT, ".bin")


# ---- lines ----------------------------------------------------------------------------------------------------------


def _read(path: Path, flags: Mapping[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    problems: list[str] = []
    wishes = []
    for number, line in enumerate(_lines(path), 1):
        if line.strip():
            values, faults = _line(line, path.parent)
            problems += [f"{path}:{number}: {fault}" for fault in faults]
            wishes.append((f"{path}:{number}", _merged(flags, values)))
    if not wishes:
        problems.append(f"{path}: holds no line")
    if problems:
        raise BatchError(problems)
    return wishes


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8-sig").split("\n")
    except OSError as error:
        raise BatchError([f"{path}: cannot be read: {error.strerror}"]) from error
    except UnicodeDecodeError as error:
        raise BatchError([f"{path}: is not UTF-8 text"]) from error


def _line(text: str, directory: Path) -> tuple[dict[str, Any], list[str]]:
    """What a line says, and what is wrong with it."""
    faults: list[str] = []

    def collect(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in pairs:
            if (name := _SYNONYMS.get(key, key)) in found:
                faults.append(f"{name}: is there twice")
            found[name] = value
        return found

    try:
        line = json.loads(text, object_pairs_hook=collect, parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        return {}, [f"is not JSON: {error.msg} at column {error.colno}"]
    except (ValueError, RecursionError) as error:
        return {}, [f"cannot be read: {error}"]
    if not isinstance(line, dict):
        return {}, ["is not a JSON object"]
    values = {name: value for name, value in line.items() if value is not None}
    faults += _faults(values)
    if not faults:
        values |= {name: directory / Path(values[name]).expanduser() for name in _IMAGES if name in values}
    return values, faults


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number")


def _faults(values: Mapping[str, Any]) -> Iterator[str]:
    if "prompt" not in values:
        yield "prompt: must be given"
    for name, value in values.items():
        if name not in _KINDS:
            close = difflib.get_close_matches(name, FIELDS, n=1)
            yield f"{name}: unknown field" + (f"; did you mean {close[0]}?" if close else "")
        elif wanted := _wanted(_KINDS[name], value):
            yield f"{name}: must be {wanted}, not {json.dumps(value, ensure_ascii=False)[:_SHOWN_CHARACTERS]}"
    outputs = values.get("num_outputs")
    if isinstance(outputs, int) and not 1 <= outputs <= MAX_OUTPUTS:
        yield f"num_outputs: {outputs} is not between 1 and {MAX_OUTPUTS}"
    for name, others in _INSTEAD:
        if name in values and (found := sorted(others & values.keys())):
            yield f"{name}: not with {' or '.join(found)}"


def _wanted(kind: Any, value: Any) -> str | None:
    """What `value` should be and is not; None when all is well."""
    if isinstance(value, bool):
        value = object()  # which JSON does not count among the numbers
    match kind:
        case tuple():
            return None if value in kind else f"one of {', '.join(kind)}"
        case re.Pattern():
            is_size = isinstance(value, str) and kind.fullmatch(value)
            return None if is_size else 'WIDTHxHEIGHT such as "832x480"'
        case _ if kind is int:
            return None if isinstance(value, int) else "a whole number"
        case _ if kind is float:
            return None if isinstance(value, int | float) else "a number"
        case _ if kind is Path:
            return None if isinstance(value, str) and _is_path(value) else "a path"
    return None if isinstance(value, str) else "text"


def _is_path(text: str) -> bool:
    try:
        return b"\0" not in os.fsencode(Path(text).expanduser()) and Path(text).name not in {"", ".."}
    except (UnicodeEncodeError, RuntimeError):  # half a surrogate pair; the home of nobody
        return False


def _merged(flags: Mapping[str, Any], line: Mapping[str, Any]) -> dict[str, Any]:
    replaced = set(line)
    for name, others in _INSTEAD:
        if replaced & {name, *others}:
            replaced |= {name, *others}
    return {**{name: value for name, value in flags.items() if name not in replaced}, **line}


# ---- outputs --------------------------------------------------------------------------------------------------------


def _outputs(place: str, values: Mapping[str, Any]) -> Iterator[Job]:
    """The videos of one line, with consecutive seeds. Their paths are names yet, and may be those of others."""
    asked = dict(values)
    count = asked.pop("num_outputs", 1)
    name = asked.pop("output_file_name", None)
    if "format" in asked:
        asked["output_format"] = asked.pop("format")
    if "size" in asked:
        asked["width"], asked["height"] = frame_size(asked.pop("size"))
    if count == 1 and name is not None:
        yield Job(place=place, values=asked, path=Path(name))
        return
    first = asked.get("seed", secrets.randbits(32))
    for seed in range(first, first + count):
        path = None if name is None else _with_seed(Path(name), seed)
        yield Job(place=place, values={**asked, "seed": seed}, path=path)


def _with_seed(path: Path, seed: int) -> Path:
    return path.with_stem(f"{path.stem}-{seed}") if path.name else path


def _placed(jobs: Sequence[Job], directory: Path | None, name_flag: str) -> Iterator[Job]:
    """The same jobs, each with a path that no other has.

    Raises:
        BatchError: two lines name the same file, or there cannot be files.
    """
    if directory is None:
        yield from (replace(job, path=None) for job in jobs)
        return
    if directory.exists() and not directory.is_dir():
        raise BatchError([f"--output-path: {directory} is not a directory"])
    taken: dict[str, str] = {}
    problems = []
    for job in jobs:
        if job.path is not None and (directory / job.path).is_dir():
            said = f"{job.place}: output_file_name" if job.place else name_flag
            problems.append(f"{said}: {directory / job.path} is a directory")
        elif job.path is not None and (other := taken.setdefault(_key(directory / job.path), job.place)) != job.place:
            problems.append(f"{job.place}: output_file_name: {job.path} is that of {other}")
    if problems:
        raise BatchError(problems)
    for job in jobs:
        yield replace(job, path=directory / job.path if job.path is not None else _free_path(job, directory, taken))


def _free_path(job: Job, directory: Path, taken: dict[str, str]) -> Path:
    """Words of the prompt and the seed, so that the name tells what is inside and can be made again."""
    words = (
        re.sub(r"[^\w]+", "-", job.values["prompt"])[:_NAME_CHARACTERS].encode()[:_NAME_BYTES].decode(errors="ignore")
    )
    stem = f"{words.strip('-') or 'video'}-{job.values['seed']}"
    ending = suffix(job.values.get("output_format"))
    number = 1
    while _key(path := directory / f"{stem}{f'-{number}' if number > 1 else ''}{ending}") in taken:
        number += 1
    taken[_key(path)] = job.place
    return path


def _key(path: Path) -> str:
    """What two paths of the same file have in common, also where letters have no case."""
    return os.path.normpath(path.absolute()).casefold()
