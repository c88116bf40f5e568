import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanImageToVideoPipeline, WanPipeline
from safetensors.torch import load_file

from tests import tiny as reference_of
from tests import tiny_images
from wan_grpc import cli
from wan_grpc.domain.errors import UnusableModelError
from wan_grpc.domain.images import InputFrames
from wan_grpc.domain.request import GenerationRequest, VideoRequest, resolve
from wan_grpc.domain.variants import ModelCard, Task
from wan_grpc.pipeline import tiny
from wan_grpc.pipeline.checkpoint import locate, read_card
from wan_grpc.pipeline.load import load
from wan_grpc.pipeline.video import VideoPipeline

MODELS: dict[str, dict[str, Any]] = {
    "t2v": {},
    "i2v": {"task": Task.IMAGE_TO_VIDEO},
    "ti2v": {"task": Task.TEXT_IMAGE_TO_VIDEO},
    "clip": {"task": Task.IMAGE_TO_VIDEO, "with_image_encoder": True},
}
SIZES = {"t2v": (128, 96), "i2v": (128, 96), "ti2v": (192, 128), "clip": (128, 96)}


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {name: tmp_path_factory.mktemp("tiny") / name for name in MODELS}
    for name, options in MODELS.items():
        tiny.make_tiny_model(made[name], **options)
    return made


@pytest.fixture(scope="module")
def directory(directories: dict[str, Path]) -> Path:
    """Of the one for text to video."""
    return directories["t2v"]


@pytest.fixture(scope="module")
def pipelines(directories: dict[str, Path]) -> dict[str, VideoPipeline]:
    checkpoints = {name: locate(str(made), load_format="auto") for name, made in directories.items()}
    return {
        name: load(checkpoint, device="cpu", dtype="float32", load_format="auto")
        for name, checkpoint in checkpoints.items()
    }


def read(directory: Path) -> ModelCard:
    return read_card(locate(str(directory), load_format="auto"), model_id="tiny")


def ask(directory: Path, *, with_image: bool) -> VideoRequest:
    """The request that says nothing but what it must."""
    return resolve(
        GenerationRequest(prompt="A cat", image=b"" if with_image else None), read(directory), fallback_seed=1
    )


def pictured(video: VideoRequest, *, with_image: bool, seed: int = 0) -> InputFrames:
    """The images of that request."""
    picture = tiny_images.picture(video.width, video.height, seed)
    return tiny_images.frames_of(picture if with_image else None)


def hashes(directory: Path) -> dict[str, str]:
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.parametrize("name", MODELS)
def test_every_copy_has_the_same_bytes(name: str, directories: dict[str, Path], tmp_path: Path) -> None:
    """Made again, after torch's own generator was used: the same files, a few megabytes."""
    torch.manual_seed(5)
    tiny.make_tiny_model(tmp_path / "again", **MODELS[name])
    assert hashes(tmp_path / "again") == hashes(directories[name])
    assert sum(path.stat().st_size for path in directories[name].rglob("*") if path.is_file()) < 8 << 20


GUIDANCE = {"t2v": (0.875, 12.0, 4.0, 3.0), "i2v": (0.9, 5.0, 3.5, 3.5), "ti2v": (None, 5.0, 5.0, 5.0)}


@pytest.mark.parametrize("name", GUIDANCE)
def test_it_has_the_card_of_the_real_model(name: str, directories: dict[str, Path]) -> None:
    """Checked like any checkpoint; no embedded model; boundary, shift and guidance are the published ones."""
    card = read(directories[name])
    video = ask(directories[name], with_image=card.needs_image)
    assert (card.task, card.embedded, card.sizes) == (Task(name), False, (SIZES[name],))
    assert (card.size_multiple, card.temporal_factor) == (32 if name == "ti2v" else 16, 4)
    assert (video.boundary_ratio, video.flow_shift, video.guidance_scale, video.guidance_scale_2) == GUIDANCE[name]


@pytest.mark.parametrize(
    ("name", "with_image"), [("t2v", False), ("i2v", True), ("ti2v", False), ("ti2v", True)], ids=str
)
def test_its_video_is_worth_looking_at(
    name: str, with_image: bool, directories: dict[str, Path], pipelines: dict[str, VideoPipeline]
) -> None:
    """Every expert works; pictures are neither flat nor static noise, and change from one to the next."""
    video = ask(directories[name], with_image=with_image)
    experts = []
    slices = pipelines[name].generate(
        video,
        frames=pictured(video, with_image=with_image),
        on_step=lambda progress: experts.append(progress.expert),
    )
    frames = torch.cat(list(slices)).float()
    assert frames.shape == (video.num_frames, video.height, video.width, 3)
    assert set(experts) == {None, *pipelines[name].transformers}
    assert frames.std() > 20
    assert (frames[:, 1:] - frames[:, :-1]).abs().mean() < 10
    assert all((frames[1:] - frames[:-1]).flatten(1).abs().mean(dim=1) > 0.05)


@pytest.mark.parametrize("name", MODELS)
def test_what_is_asked_matters(name: str, directories: dict[str, Path], pipelines: dict[str, VideoPipeline]) -> None:
    """Another prompt, in any script, another seed or another image gives another video."""
    with_image = name != "t2v"
    video = replace(ask(directories[name], with_image=with_image), num_frames=5, num_inference_steps=2)
    changes = ({}, {"prompt": "A dog"}, {"prompt": "猫"}, {"prompt": "犬"}, {"seed": 2}, {"negative_prompt": "dull"})
    runs = [(replace(video, **change), pictured(video, with_image=with_image)) for change in changes]
    runs += [(video, pictured(video, with_image=True, seed=1))] if with_image else []
    runs += [(video, InputFrames())] if name == "ti2v" else []
    results = {
        pipelines[name].latents(request, frames=frames, on_step=reference_of.ignore).numpy().tobytes()
        for request, frames in runs
    }
    assert len(results) == len(runs)


@pytest.mark.parametrize(
    ("name", "pipeline_class"),
    [
        ("t2v", WanPipeline),
        ("i2v", WanImageToVideoPipeline),
        ("clip", WanImageToVideoPipeline),
        ("ti2v", WanPipeline),
        ("ti2v", WanImageToVideoPipeline),
    ],
)
def test_diffusers_loads_it_and_agrees(
    name: str,
    pipeline_class: type[WanPipeline],
    directories: dict[str, Path],
    pipelines: dict[str, VideoPipeline],
) -> None:
    """The whole pipeline of diffusers, from the same directory: the same latents within 1e-4."""
    with_image = pipeline_class is WanImageToVideoPipeline
    theirs = pipeline_class.from_pretrained(directories[name])
    theirs.set_progress_bar_config(disable=True)
    request = replace(ask(directories[name], with_image=with_image), num_frames=5, num_inference_steps=4)
    picture = tiny_images.picture(request.width, request.height) if with_image else None
    expected = tiny_images.reference(theirs, request, first=picture)
    actual = pipelines[name].latents(request, frames=tiny_images.frames_of(picture), on_step=reference_of.ignore)
    assert reference_of.relative_error(actual, expected) < 1e-4


@pytest.mark.parametrize("task", Task)
def test_the_command_makes_one_for_each_task(task: Task, directories: dict[str, Path], tmp_path: Path) -> None:
    """`make-tiny-model --task` writes the same files."""
    assert cli.main(["make-tiny-model", str(tmp_path / "made"), "--task", task]) == cli.DONE
    assert hashes(tmp_path / "made") == hashes(directories[task])


def test_published_clip_tensors_have_published_names(directories: dict[str, Path]) -> None:
    """As in the published image-to-video checkpoints of Wan2.1."""
    names = load_file(directories["clip"] / "image_encoder/model.safetensors")
    assert {name.split(".")[0] for name in names} == {"vision_model"}


def test_a_directory_with_files_is_left_alone(tmp_path: Path) -> None:
    """Nothing is overwritten."""
    (tmp_path / "mine").write_text("")
    with pytest.raises(UnusableModelError, match="is not empty"):
        tiny.make_tiny_model(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
