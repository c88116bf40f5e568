import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from wan_grpc import config
from wan_grpc.domain.formats import FORMATS, OutputFormat
from wan_grpc_client import batch
from wan_grpc_client.batch import BatchError, Job
from wan_grpc_client.request import FRAME_SIZE

HERE = Path("there")


def write(directory: Path, *lines: Mapping[str, Any] | str) -> Path:
    path = directory / "prompts.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines), encoding="utf-8")
    return path


def plan(flags: Mapping[str, Any], path: Path | None = None, directory: Path | None = HERE) -> list[Job]:
    return list(batch.plan(flags, prompts_file=path, directory=directory, name_flag="--name"))


def problems(path: Path, flags: Mapping[str, Any] | None = None) -> tuple[str, ...]:
    with pytest.raises(BatchError) as raised:
        plan(flags or {}, path)
    return tuple(problem.removeprefix(str(path)) for problem in raised.value.problems)


def names(jobs: list[Job]) -> list[str]:
    return [str(job.path.relative_to(HERE)) for job in jobs if job.path]


def test_the_words_are_those_of_the_service() -> None:
    """Formats, their suffixes, pictures, sizes and fields are the same in the client and in the service's settings."""
    assert {str(name): rule.suffix for name, rule in FORMATS.items()} == batch.SUFFIXES
    assert {str(name) for name, rule in FORMATS.items() if rule.is_picture} == batch.PICTURES
    assert (batch.DEFAULT_FORMAT, batch.MAX_OUTPUTS) == (OutputFormat.MP4_H264, config.MAX_OUTPUTS)
    fields = config.GenerateSettings.model_fields
    own = {name for name in fields if name not in config.RankSettings.model_fields}
    assert own - {"prompts_file", "save_output", "output_path"} == set(batch.FIELDS)


@pytest.mark.parametrize("text", ["832x480", "832*480", "0x0", "999999999x1"])
def test_a_size_is_the_same_everywhere(text: str) -> None:
    """What the client takes for a size, the service's settings take too."""
    assert (bool(FRAME_SIZE.fullmatch(text)), bool(config.FRAME_SIZE.fullmatch(text))) == (True, True)


def test_one_prompt_is_one_job() -> None:
    """Flags that were not given are not said, a size becomes its sides, and the name has prompt, seed and suffix."""
    flags = {"prompt": "A fox, in snow!", "seed": 7, "size": "64*48", "crf": None, "format": "webm_vp9"}
    values = {"prompt": "A fox, in snow!", "seed": 7, "width": 64, "height": 48, "output_format": "webm_vp9"}
    assert plan(flags) == [Job(place="", values=values, path=HERE / "A-fox-in-snow-7.webm")]


def test_a_seed_is_drawn_where_a_name_needs_it() -> None:
    """An unset seed is the server's to draw when the file is named and there is one of it."""
    assert plan({"prompt": "p", "output_file_name": "x.mp4"}) == [
        Job(place="", values={"prompt": "p"}, path=HERE / "x.mp4")
    ]
    (job,) = plan({"prompt": "p"})
    assert (names([job]), 0 <= job.values["seed"] < 2**32) == ([f"p-{job.values['seed']}.mp4"], True)


@pytest.mark.parametrize(
    ("name", "wanted"),
    [(None, ["p-7.png", "p-8.png", "p-9.png"]), ("a/x.png", ["a/x-7.png", "a/x-8.png", "a/x-9.png"])],
)
def test_several_outputs_have_consecutive_seeds(name: str | None, wanted: list[str]) -> None:
    """Each has its seed in its name, whether that is made or given."""
    jobs = plan({"prompt": "p", "seed": 7, "num_outputs": 3, "format": "png", "output_file_name": name})
    assert ([job.values["seed"] for job in jobs], names(jobs)) == ([7, 8, 9], wanted)


def test_lines_win_over_flags(tmp_path: Path) -> None:
    """A line says what is its own; the rest comes from the flags, but for what the line has said in another way."""
    path = write(
        tmp_path,
        {"prompt": "a", "seed": 1},
        "",
        {"prompt": "b", "seed": 2, "width": 32, "bitrate_bps": 10000, "fps": None},
        {"prompt": "c", "seed": 3, "size": "32x16", "output_format": "gif", "image_path": "sub/c.png"},
    )
    flags = {"size": "64x48", "crf": 3, "fps": 8, "format": "png"}
    common = {"fps": 8, "output_format": "png"}
    assert plan(flags, path) == [
        Job(
            place=f"{path}:1",
            values={**common, "prompt": "a", "seed": 1, "width": 64, "height": 48, "crf": 3},
            path=HERE / "a-1.png",
        ),
        Job(
            place=f"{path}:3",
            values={**common, "prompt": "b", "seed": 2, "width": 32, "bitrate_bps": 10000},
            path=HERE / "b-2.png",
        ),
        Job(
            place=f"{path}:4",
            values={
                "fps": 8,
                "output_format": "gif",
                "prompt": "c",
                "seed": 3,
                "width": 32,
                "height": 16,
                "crf": 3,
                "image": tmp_path / "sub/c.png",
            },
            path=HERE / "c-3.gif",
        ),
    ]


def test_every_kind_of_value_is_taken(tmp_path: Path) -> None:
    """A line may say every field; whole numbers do for fractions."""
    said = {
        "prompt": "p",
        "negative_prompt": "",
        "image": "/a.png",
        "last_image": "b.png",
        "image_fit": "cover",
        "size": "64x48",
        "num_frames": 5,
        "fps": 8,
        "num_inference_steps": 2,
        "guidance_scale": 1,
        "guidance_scale_2": 2.5,
        "flow_shift": 3,
        "boundary_ratio": 0.5,
        "seed": 0,
        "num_outputs": 1,
        "format": "mp4_h265",
        "crf": 20,
        "quality": 3,
        "pixel_format": "yuv444p",
        "output_file_name": "x.mp4",
    }
    (job,) = plan({}, write(tmp_path, said))
    own = {
        name: value for name, value in said.items() if name not in {"size", "format", "num_outputs", "output_file_name"}
    }
    images = {"image": Path("/a.png"), "last_image": tmp_path / "b.png"}
    sides = {"width": 64, "height": 48, "output_format": "mp4_h265"}
    assert (job.values, job.path) == ({**own, **images, **sides}, HERE / "x.mp4")


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ({}, [":1: prompt: must be given"]),
        ({"prompt": None}, [":1: prompt: must be given"]),
        ({"prompt": 3}, [":1: prompt: must be text, not 3"]),
        ({"prompt": "p", "seed": "7"}, [':1: seed: must be a whole number, not "7"']),
        ({"prompt": "p", "seed": True}, [":1: seed: must be a whole number, not true"]),
        ({"prompt": "p", "seed": 7.0}, [":1: seed: must be a whole number, not 7.0"]),
        ({"prompt": "p", "flow_shift": "3"}, [':1: flow_shift: must be a number, not "3"']),
        ({"prompt": "p", "flow_shift": False}, [":1: flow_shift: must be a number, not false"]),
        ({"prompt": "p", "size": "64"}, [':1: size: must be WIDTHxHEIGHT such as "832x480", not "64"']),
        ({"prompt": "p", "size": [64, 48]}, [':1: size: must be WIDTHxHEIGHT such as "832x480", not [64, 48]']),
        ({"prompt": "p", "size": "64x48", "height": 1}, [":1: size: not with height"]),
        ({"prompt": "p", "crf": 1, "bitrate_bps": 1}, [":1: crf: not with bitrate_bps"]),
        ({"prompt": "p", "image_fit": "x"}, [':1: image_fit: must be one of cover, contain, stretch, exact, not "x"']),
        ({"prompt": "p", "image": ""}, [':1: image: must be a path, not ""']),
        ({"prompt": "p", "image": "a\0b"}, [':1: image: must be a path, not "a\\u0000b"']),
        ({"prompt": "p", "image": "~nobody-at-all/x"}, [':1: image: must be a path, not "~nobody-at-all/x"']),
        ('{"prompt": "p", "image": "\\ud800"}', [':1: image: must be a path, not "\ud800"']),
        ({"prompt": "p", "output_file_name": ".."}, [':1: output_file_name: must be a path, not ".."']),
        ({"prompt": "p", "num_outputs": 0}, [":1: num_outputs: 0 is not between 1 and 8"]),
        ({"prompt": "p", "num_outputs": 9}, [":1: num_outputs: 9 is not between 1 and 8"]),
        ({"prompt": "p", "wdith": 1}, [":1: wdith: unknown field; did you mean width?"]),
        ({"prompt": "p", "output_path": "x"}, [":1: output_path: unknown field"]),
        ('{"prompt": "p", "prompt": "q"}', [":1: prompt: is there twice"]),
        ('{"prompt": "p", "format": "png", "output_format": "png"}', [":1: format: is there twice"]),
        ('{"prompt": "p", "flow_shift": NaN}', [":1: cannot be read: NaN is no number"]),
        ("[]", [":1: is not a JSON object"]),
        ("null", [":1: is not a JSON object"]),
        ('{"prompt": ', [":1: is not JSON: Expecting value at column 12"]),
        (" \n\t", [": holds no line"]),
        (
            {"prompt": 1, "seed": "x", "x": 1},
            [
                ":1: prompt: must be text, not 1",
                ':1: seed: must be a whole number, not "x"',
                ":1: x: unknown field",
            ],
        ),
    ],
)
def test_wrong_lines_are_told(line: Mapping[str, Any] | str, wanted: list[str], tmp_path: Path) -> None:
    """Each fault has its line, its field and what is wanted instead."""
    assert problems(write(tmp_path, line)) == tuple(wanted)


def test_faults_of_all_lines_are_told_at_once(tmp_path: Path) -> None:
    """The first wrong line does not hide the others."""
    path = write(tmp_path, {"seed": 1}, {"prompt": "p"}, "{", "7")
    assert [re.match(r":\d", problem)[0] for problem in problems(path)] == [":1", ":3", ":4"]  # type: ignore[index]


@pytest.mark.parametrize("depth", [100_000])
def test_deep_nesting_is_a_fault(depth: int, tmp_path: Path) -> None:
    """A line made to exhaust the reader is a fault as any other."""
    (problem,) = problems(write(tmp_path, "[" * depth))
    assert problem.startswith(":1: ")


def test_unusable_files(tmp_path: Path) -> None:
    """A file that is missing, a directory or no text is named with the reason."""
    assert problems(tmp_path / "none") == (": cannot be read: No such file or directory",)
    assert problems(tmp_path) == (": cannot be read: Is a directory",)
    (tmp_path / "bytes").write_bytes(b'{"prompt": "\xff"}')
    assert problems(tmp_path / "bytes") == (": is not UTF-8 text",)


def test_a_file_from_another_system(tmp_path: Path) -> None:
    """A byte order mark and carriage returns do no harm."""
    path = tmp_path / "dos.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "p", "seed": 1}\r\n{"prompt": "q", "seed": 2}\r\n')
    assert [job.values["prompt"] for job in plan({}, path)] == ["p", "q"]


def test_names_are_never_those_of_others(tmp_path: Path) -> None:
    """What is made twice gets a number; names that were given stand, and letters are taken for alike in any case."""
    line = {"prompt": "Fox", "seed": 7}
    path = write(tmp_path, line, line, {**line, "prompt": "fox"}, {**line, "output_file_name": "fox-7-2.mp4"})
    assert names(plan({}, path)) == ["Fox-7.mp4", "Fox-7-3.mp4", "fox-7-4.mp4", "fox-7-2.mp4"]


def test_the_same_name_twice_is_refused(tmp_path: Path) -> None:
    """Two lines that name one file, whatever the spelling, would lose one video."""
    path = write(
        tmp_path,
        {"prompt": "a", "output_file_name": "x-7.mp4"},
        {"prompt": "b", "output_file_name": "a/../X-7.mp4"},
        {"prompt": "c", "output_file_name": "x.mp4", "seed": 6, "num_outputs": 2},
    )
    assert problems(path) == (
        f":2: output_file_name: a/../X-7.mp4 is that of {path}:1",
        f":3: output_file_name: x-7.mp4 is that of {path}:1",
    )


def test_a_file_is_no_directory(tmp_path: Path) -> None:
    """A directory of files that is a file is told before there is a video for it."""
    (tmp_path / "x").touch()
    with pytest.raises(BatchError) as raised:
        plan({"prompt": "p"}, None, tmp_path / "x")
    assert raised.value.problems == (f"--output-path: {tmp_path / 'x'} is not a directory",)


def test_a_directory_is_no_file(tmp_path: Path) -> None:
    """A name that is taken by a directory is told before there is a video for it."""
    (tmp_path / "x").mkdir()
    path = write(tmp_path, {"prompt": "p", "output_file_name": "x"})
    for flags, file, place in (
        ({"prompt": "p", "output_file_name": "x"}, None, "--name"),
        ({}, path, f"{path}:1: output_file_name"),
    ):
        with pytest.raises(BatchError) as raised:
            plan(flags, file, tmp_path)
        assert raised.value.problems == (f"{place}: {tmp_path / 'x'} is a directory",)


def test_no_directory_is_no_file() -> None:
    """Where nothing is to be written there are no paths."""
    assert [job.path for job in plan({"prompt": "p", "output_file_name": "x", "num_outputs": 2}, None, None)] == [
        None
    ] * 2


@pytest.mark.parametrize(
    ("prompt", "stem"),
    [
        ("", "video"),
        ("../../etc/passwd", "etc-passwd"),
        ("雪" * 100, "雪" * 53),
        ("a" * 100, "a" * 60),
        ("\udc80", "video"),
    ],
)
def test_names_are_safe_and_short(prompt: str, stem: str) -> None:
    """No prompt makes a name with a path in it, or one that a file system does not take."""
    assert names(plan({"prompt": prompt, "seed": 2**63 - 1})) == [f"{stem}-{2**63 - 1}.mp4"]


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(), inner, max_size=2),
    max_leaves=4,
)
OBJECTS = st.dictionaries(st.sampled_from(batch.FIELDS) | st.text(), VALUES, max_size=4).map(json.dumps)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.lists(OBJECTS | st.text(), max_size=3))
def test_no_line_is_an_accident(tmp_path: Path, lines: list[str]) -> None:
    """Whatever a file holds, it is a plan or a list of faults, each with the file's name."""
    path = tmp_path / "prompts.jsonl"
    path.write_bytes("\n".join(lines).encode("utf-8", "surrogatepass"))
    try:
        jobs = plan({}, path)
    except BatchError as error:
        assert all(problem.startswith(str(path)) for problem in error.problems)
    else:
        assert {type(job.values["prompt"]) for job in jobs} == {str}
