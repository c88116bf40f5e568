from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import structlog.testing

from wan_grpc.app import (
    Job,
    RefusedJobsError,
    find_model,
    find_topology,
    generate,
    plan_groups,
    refuse_wrong_hosts,
)
from wan_grpc.config import GenerateSettings, ServeSettings, UsageError
from wan_grpc.domain.errors import UnusableModelError
from wan_grpc.domain.request import GenerationRequest
from wan_grpc.domain.topology import Topology
from wan_grpc.domain.variants import Defaults, Limits, Task
from wan_grpc.engine.group import GroupPlan
from wan_grpc.pipeline.published import T2V_A14B_ID, TI2V_5B_ID
from wan_grpc.pipeline.tiny import make_tiny_model


def settings(**values: Any) -> ServeSettings:
    """Of a server of the published shapes, which need no files."""
    return ServeSettings(model_path=T2V_A14B_ID, load_format="dummy", **values)


def defaults(**values: Any) -> Defaults:
    return find_model(settings(**values))[1].defaults


def negative_prompt(path: Path, **values: Any) -> str:
    return defaults(default_negative_prompt_file=path, **values).negative_prompt


@pytest.mark.parametrize("name", [None, "wan-tiny-t2v", "wan-tiny-ti2v"])
def test_embedded_models_are_found_by_name(name: str | None, tmp_path: Path) -> None:
    """Under the name that was given, or the default one; their words are known, with random weights they are not."""
    checkpoint, card = find_model(ServeSettings(model_path=name, cache_dir=tmp_path))
    called = name or "wan-tiny-t2v"
    assert (checkpoint.model_path, card.model_id, card.task) == (called, called, Task(called.removeprefix("wan-tiny-")))
    assert card.embedded and "triangle" in card.words
    _, random = find_model(ServeSettings(model_path=name, cache_dir=tmp_path, load_format="dummy"))
    assert random == replace(card, embedded=False, words=frozenset())


def test_a_directory_like_an_embedded_model_is_a_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It stands where the server starts, under the same name."""
    make_tiny_model(tmp_path / "wan-tiny-ti2v")
    monkeypatch.chdir(tmp_path)
    _, card = find_model(ServeSettings(model_path="wan-tiny-ti2v", cache_dir=tmp_path / "cache"))
    assert (card.task, card.embedded) == (Task.TEXT_TO_VIDEO, False)


def test_an_empty_path_is_no_model() -> None:
    """Such as that of a variable that is not set; nobody wants the embedded model then."""
    with pytest.raises(UnusableModelError):
        find_model(ServeSettings(model_path=""))


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


def topology(**values: Any) -> Topology:
    asked = settings(**values)
    return find_topology(asked, *find_model(asked))


def groups(directory: Path, **values: Any) -> list[GroupPlan]:
    asked = settings(**values)
    checkpoint, card = find_model(asked)
    return list(plan_groups(asked, find_topology(asked, checkpoint, card), checkpoint, directory))


@pytest.mark.parametrize(
    ("values", "wanted"),
    [
        ({}, Topology(num_heads=40)),
        ({"num_gpus": 4}, Topology(cfg=2, ulysses=2, num_heads=40)),
        ({"num_gpus": 8}, Topology(cfg=2, ulysses=4, num_heads=40)),
        ({"num_gpus": 8, "replicas": 4}, Topology(cfg=2, num_heads=40)),
        ({"num_gpus": 4, "ulysses_degree": 2, "enable_cfg_parallel": True}, Topology(cfg=2, ulysses=2, num_heads=40)),
        ({"num_gpus": 4, "enable_cfg_parallel": False}, Topology(ulysses=4, num_heads=40)),
        ({"num_gpus": 6, "sp_degree": 6}, Topology(ring=3, ulysses=2, num_heads=40)),
        (
            {"num_gpus": 8, "ring_degree": 2, "tp_size": 8},
            Topology(cfg=2, ring=2, ulysses=2, text_tensor=8, num_heads=40),
        ),
    ],
)
def test_the_topology_is_that_of_the_settings(values: dict[str, Any], wanted: Topology) -> None:
    """What the flags leave open follows from the number of ranks in a group and the model."""
    assert topology(**values) == wanted


def test_the_topology_follows_the_checkpoint() -> None:
    """Six ranks exchange the 24 heads of one model, and rotate keys and values for the 40 heads of the other."""
    asked = ServeSettings(model_path=TI2V_5B_ID, load_format="dummy", num_gpus=6)
    assert find_topology(asked, *find_model(asked)) == Topology(cfg=2, ulysses=3, num_heads=24)
    assert topology(num_gpus=6) == Topology(cfg=2, ring=3, num_heads=40)


def test_models_without_guidance_are_divided_by_tokens_alone() -> None:
    """Where requests usually have one pass there is no second one to divide."""
    asked = settings(num_gpus=4)
    checkpoint, card = find_model(asked)
    distilled = replace(card, defaults=replace(card.defaults, guidance_scale=1.0))
    assert find_topology(asked, checkpoint, distilled) == Topology(ulysses=4, num_heads=40)


@pytest.mark.parametrize(
    ("values", "problems"),
    [
        (
            {"num_gpus": 5, "replicas": 2},
            ["--replicas: 2 does not divide the ranks, 5 = 2 x 2 + 1; 1 and 5 would (--num-gpus 5, --replicas 2)"],
        ),
        (
            {"num_gpus": 8, "replicas": 2, "sp_degree": 8},
            [
                "--sp-degree: cfg 1 x sequence 8 = 8 or cfg 2 x sequence 8 = 16 is not 4, "
                "the number of ranks in a group; "
                "possible: cfg 2 x ulysses 2, cfg 2 x ring 2 or ulysses 4 (--num-gpus 8, --replicas 2)"
            ],
        ),
        (
            {"num_gpus": 6, "ulysses_degree": 3, "tp_size": 4},
            [
                "--ulysses-degree: 3 does not divide the heads of the transformer, 40 = 3 x 13 + 1; 1 and 2 would "
                "(--num-gpus 6)",
                "--tp-size: 4 does not divide the ranks of a group, 6 = 4 x 1 + 2; 1 and 2 would (--num-gpus 6)",
            ],
        ),
        (
            {"enable_cfg_parallel": True},
            ["--enable-cfg-parallel: the ranks of a group do not fall into 2 halves, 1 = 2 x 0 + 1 (--num-gpus 1)"],
        ),
        (
            {"num_gpus": 8, "ring_degree": 3},
            [
                "--ring-degree: cfg 1 x ring 3 = 3 or cfg 2 x ring 3 = 6 does not divide 8, "
                "the number of ranks in a group; "
                "possible: cfg 2 x ulysses 4, cfg 2 x ring 2 x ulysses 2 or cfg 2 x ring 4 (--num-gpus 8)"
            ],
        ),
    ],
)
def test_a_topology_that_cannot_be_ends_the_start(values: dict[str, Any], problems: list[str]) -> None:
    """Each problem is told under the flag that brought it, with the numbers that it does not go with."""
    with pytest.raises(UsageError) as raised:
        topology(**values)
    assert list(raised.value.problems) == problems


def test_the_groups_of_a_host(tmp_path: Path) -> None:
    """Each replica counts its ranks and devices after those of the ones before, and is like them in all else."""
    first, *others = groups(tmp_path, num_gpus=6, replicas=3)
    assert (first.topology, first.first_rank) == (Topology(cfg=2, num_heads=40), 0)
    assert others == [replace(first, first_rank=2), replace(first, first_rank=4)]


@pytest.mark.parametrize(
    ("values", "cores", "wanted"),
    [
        ({}, 16, 16),
        ({"num_gpus": 4}, 16, 4),
        ({"num_gpus": 4, "replicas": 2}, 16, 4),
        ({"num_gpus": 8, "replicas": 4}, 4, 1),
        ({"num_gpus": 4, "cpu_threads": 7}, 16, 7),
        ({"num_gpus": 4, "nnodes": 2}, 16, 8),
    ],
)
def test_cores_are_divided_by_all_ranks(
    values: dict[str, Any], cores: int, wanted: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of all replicas on a host; never less than one thread, and as told where it is told."""
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(cores)))
    assert {plan.cpu_threads for plan in groups(tmp_path, **values)} == {wanted}


@pytest.mark.parametrize(
    ("values", "wanted"),
    [
        ({}, "--num-gpus 1 needs 1 GPU"),
        ({"num_gpus": 4, "replicas": 2}, "--num-gpus 4 needs 4 GPUs (2 replicas of cfg 2)"),
        ({"num_gpus": 8, "nnodes": 2}, "--num-gpus 8 needs 4 GPUs on each of --nnodes 2 (cfg 2 x ulysses 4)"),
    ],
)
def test_ranks_know_what_needs_the_devices(values: dict[str, Any], wanted: str, tmp_path: Path) -> None:
    """They tell it when there are fewer."""
    assert {plan.demand for plan in groups(tmp_path, **values)} == {wanted}


def test_replicas_are_of_one_host(tmp_path: Path) -> None:
    """The ranks of several hosts are one group."""
    with pytest.raises(UsageError) as raised:
        refuse_wrong_hosts(settings(num_gpus=4, nnodes=2, replicas=2))
    assert "--replicas: 2, but the ranks of --nnodes 2 are one group" in raised.value.problems


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
