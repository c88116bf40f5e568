from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import structlog.testing

from wan_grpc.app import Job, RefusedJobsError, find_model, generate
from wan_grpc.config import GenerateSettings, ServeSettings, UsageError
from wan_grpc.domain.errors import UnusableModelError
from wan_grpc.domain.request import GenerationRequest
from wan_grpc.domain.variants import Defaults, Limits
from wan_grpc.pipeline.published import T2V_A14B_ID


def settings(**values: Any) -> ServeSettings:
    """Of a server of the published shapes, which need no files."""
    return ServeSettings(model_path=T2V_A14B_ID, load_format="dummy", **values)


def defaults(**values: Any) -> Defaults:
    return find_model(settings(**values))[1].defaults


def negative_prompt(path: Path, **values: Any) -> str:
    return defaults(default_negative_prompt_file=path, **values).negative_prompt


def test_limits_are_those_of_the_settings() -> None:
    """Every limit is an option, and what requests are checked against."""
    limits = {
        "max_area": 1000_000,
        "max_num_frames": 101,
        "max_inference_steps": 50,
        "max_prompt_bytes": 99,
        "max_image_bytes": 1234,
        "max_image_pixels": 5678,
    }
    assert find_model(settings(**limits))[1].limits == Limits(**limits)
    assert find_model(settings())[1].limits == Limits()


@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        (b"blurred, overexposed", "blurred, overexposed"),
        (b"blurred\n", "blurred"),
        (b"blurred\r\n", "blurred"),
        (b"\xef\xbb\xbfblurred\n", "blurred"),
        (b" two\nlines \n\n", " two\nlines \n"),
        ("色调艳丽\n".encode(), "色调艳丽"),
        (b"\n", ""),
        (b"", ""),
    ],
)
def test_the_default_negative_prompt_is_read(content: bytes, wanted: str, tmp_path: Path) -> None:
    """The text of the file without the end of its last line is what requests mean that say nothing."""
    path = tmp_path / "negative.txt"
    path.write_bytes(content)
    assert negative_prompt(path) == wanted


def test_without_a_file_the_negative_prompt_is_empty() -> None:
    """As in diffusers."""
    assert defaults().negative_prompt == ""


@pytest.mark.parametrize("content", [b"x" * 20, b"\xef\xbb\xbf" + b"x" * 20 + b"\r\n"])
def test_the_default_negative_prompt_may_be_as_long_as_any(content: bytes, tmp_path: Path) -> None:
    """The bound counts the text alone."""
    path = tmp_path / "negative.txt"
    path.write_bytes(content)
    assert negative_prompt(path, max_prompt_bytes=20) == "x" * 20


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (None, "cannot be read: No such file or directory"),
        (b"a\x07b", "holds the control character U+0007"),
        (b"a\xffb", "is not UTF-8 text"),
        (b"x" * 21, "21 bytes of UTF-8; at most 20"),
        (b"x" * 26, "is longer than 20 bytes"),
        ("é".encode() * 20, "is longer than 20 bytes"),
    ],
)
def test_an_unusable_negative_prompt_is_told(content: bytes | None, problem: str, tmp_path: Path) -> None:
    """The start ends in a sentence with the setting, the file and the fault."""
    path = tmp_path / "negative.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UsageError) as raised:
        negative_prompt(path, max_prompt_bytes=20)
    assert raised.value.problems == (f"--default-negative-prompt-file: {path}: {problem}",)


def test_an_endless_file_ends_the_start(tmp_path: Path) -> None:
    """No more is read than a prompt may have."""
    with pytest.raises(UsageError, match="is longer than 16384 bytes"):
        negative_prompt(Path("/dev/zero"))


def test_a_directory_is_no_prompt(tmp_path: Path) -> None:
    """What cannot be read is told as the system tells it."""
    with pytest.raises(UsageError, match="cannot be read: Is a directory"):
        negative_prompt(tmp_path)


def test_lowered_defaults_are_logged() -> None:
    """Limits below the model's defaults lower these, and the operator is told to what."""
    with structlog.testing.capture_logs() as logs:
        lowered = defaults(max_area=832 * 480, max_num_frames=50, max_inference_steps=200)
    usual = defaults()
    assert lowered == replace(usual, width=832, height=480, num_frames=49)
    assert logs == [
        {
            "event": "the limits are below the model's own defaults, which become",
            "log_level": "warning",
            "width": 832,
            "height": 480,
            "num_frames": 49,
        }
    ]


def test_limits_that_leave_nothing_end_the_start() -> None:
    """Where not even the smallest frame is allowed there is nothing to serve."""
    with pytest.raises(UnusableModelError) as raised:
        defaults(max_area=255)
    assert str(raised.value) == (
        "what requests mean by default cannot be served: width: 16 x 16 = 256 pixels a frame; at most 255"
    )


async def test_every_job_is_checked_before_the_first_begins(tmp_path: Path) -> None:
    """What breaks rules is told with the job's number, images that cannot be read too, and no rank is started."""
    (tmp_path / "a.png").write_bytes(b"no picture")
    jobs = [
        Job(request=GenerationRequest(prompt="p")),
        Job(request=GenerationRequest(prompt="p", width=17, seed=-1)),
        Job(request=GenerationRequest(prompt=""), image=tmp_path / "none.png", last_image=tmp_path / "a.png"),
    ]
    asked = GenerateSettings(
        prompt="p", model_path=T2V_A14B_ID, load_format="dummy", spool_dir=tmp_path, log_level="error"
    )
    with pytest.raises(RefusedJobsError) as raised:
        await anext(generate(asked, jobs, on_event=lambda number, event: None))
    told = [(number, one.field, one.description) for number, one in raised.value.violations]
    assert told == [
        (1, "spec.width", "17 is not a positive multiple of 16"),
        (1, "spec.seed", f"-1 is not between 0 and {2**63 - 1}"),
        (2, "spec.prompt", "must not be empty"),
        (2, "spec.last_image", "this model takes no last image"),
        (2, "spec.image", f"{tmp_path}/none.png: No such file or directory"),
    ]
