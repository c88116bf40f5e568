import hashlib
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import WanPipeline

from tests import tiny as reference_of
from wan_grpc.domain.errors import UnusableModelError
from wan_grpc.domain.request import GenerationRequest, VideoRequest, resolve
from wan_grpc.domain.variants import Expert
from wan_grpc.pipeline import tiny
from wan_grpc.pipeline.checkpoint import Checkpoint, locate, read_card
from wan_grpc.pipeline.load import load
from wan_grpc.pipeline.video import VideoPipeline


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("tiny") / "model"
    tiny.make_tiny_model(made)
    return made


@pytest.fixture(scope="module")
def checkpoint(directory: Path) -> Checkpoint:
    return locate(str(directory), load_format="auto")


@pytest.fixture(scope="module")
def pipeline(checkpoint: Checkpoint) -> VideoPipeline:
    return load(checkpoint, device="cpu", dtype="float32", load_format="auto")


@pytest.fixture(scope="module")
def video(checkpoint: Checkpoint) -> VideoRequest:
    """The request that says nothing but its prompt."""
    return resolve(GenerationRequest(prompt="A cat"), read_card(checkpoint, model_id="x"), fallback_seed=1)


def hashes(directory: Path) -> dict[str, str]:
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_every_copy_has_the_same_bytes(directory: Path, tmp_path: Path) -> None:
    """Made again, after torch's own generator was used: the same files, a few megabytes."""
    torch.manual_seed(5)
    tiny.make_tiny_model(tmp_path / "again")
    assert hashes(tmp_path / "again") == hashes(directory)
    assert sum(path.stat().st_size for path in directory.rglob("*") if path.is_file()) < 8 << 20


def test_it_has_the_layout_and_the_card_of_the_real_model(checkpoint: Checkpoint, video: VideoRequest) -> None:
    """Checked like any checkpoint; says that it is embedded; both experts work in a video of its defaults."""
    card = read_card(checkpoint, model_id="embedded")
    assert (card.embedded, card.size_multiple, card.temporal_factor, card.sizes) == (True, 16, 4, ((128, 96),))
    assert (video.boundary_ratio, video.flow_shift, video.guidance_scale, video.guidance_scale_2) == (0.875, 12.0, 4, 3)


def test_its_video_is_worth_looking_at(pipeline: VideoPipeline, video: VideoRequest) -> None:
    """Both experts work; pictures are neither flat nor static noise, and change from one to the next."""
    experts = []
    slices = pipeline.generate(video, on_step=lambda progress: experts.append(progress.expert))
    frames = torch.cat(list(slices)).float()
    assert frames.shape == (video.num_frames, video.height, video.width, 3)
    assert set(experts) == {None, *Expert}
    assert frames.std() > 20
    assert (frames[:, 1:] - frames[:, :-1]).abs().mean() < 10
    assert all((frames[1:] - frames[:-1]).flatten(1).abs().mean(dim=1) > 0.05)


def test_prompts_and_seeds_matter(pipeline: VideoPipeline, video: VideoRequest) -> None:
    """Another prompt, in any script, or another seed gives another video."""
    changes = ({}, {"prompt": "A dog"}, {"prompt": "猫"}, {"prompt": "犬"}, {"seed": 2}, {"negative_prompt": "dull"})
    short = [replace(video, num_frames=1, num_inference_steps=2, **change) for change in changes]
    results = {pipeline.latents(request, on_step=reference_of.ignore).numpy().tobytes() for request in short}
    assert len(results) == len(changes)


def test_diffusers_loads_it_and_agrees(directory: Path, pipeline: VideoPipeline, video: VideoRequest) -> None:
    """The whole pipeline of diffusers, from the same directory: the same latents within 1e-4."""
    theirs = WanPipeline.from_pretrained(directory)
    theirs.set_progress_bar_config(disable=True)
    request = replace(video, num_frames=5)
    expected = reference_of.reference(theirs, request)
    assert reference_of.relative_error(pipeline.latents(request, on_step=reference_of.ignore), expected) < 1e-4


def test_a_directory_with_files_is_left_alone(tmp_path: Path) -> None:
    """Nothing is overwritten."""
    (tmp_path / "mine").write_text("")
    with pytest.raises(UnusableModelError, match="is not empty"):
        tiny.make_tiny_model(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_servers_that_start_at_once_share_one_copy(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All make one, one is kept, nothing else stays behind."""
    barrier = threading.Barrier(4)

    def make(target: Path) -> None:
        barrier.wait()
        tiny.make_tiny_model(target)
        barrier.wait()

    monkeypatch.setattr(tiny, "_make_elsewhere", make)
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(tiny.ensure_tiny_model(tmp_path))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [tmp_path / f"tiny-t2v-a14b-{tiny.VERSION}"] * 4
    assert list(tmp_path.iterdir()) == found[:1]
    assert hashes(found[0]) == hashes(directory)


def test_another_version_is_made_anew(directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy that an older program left is not served."""
    made: list[Path] = []
    monkeypatch.setattr(tiny, "_make_elsewhere", lambda target: (made.append(target), target.mkdir()))
    old = tiny.ensure_tiny_model(tmp_path)
    assert tiny.ensure_tiny_model(tmp_path) == old
    monkeypatch.setattr(tiny, "VERSION", tiny.VERSION + 1)
    assert tiny.ensure_tiny_model(tmp_path) != old
    assert len(made) == 2


def test_it_is_made_without_torch_in_the_caller(directory: Path, tmp_path: Path) -> None:
    """The real thing: a process that asks for the embedded model gets it whole and has not imported torch."""
    code = (
        "import sys; from pathlib import Path; from wan_grpc.pipeline.tiny import ensure_tiny_model\n"
        f"print(ensure_tiny_model(Path({str(tmp_path)!r})), 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=100)
    made = tmp_path / f"tiny-t2v-a14b-{tiny.VERSION}"
    assert done.stdout.split() == [str(made), "False"]
    assert hashes(made) == hashes(directory)


def test_a_cache_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    """By its path."""
    (tmp_path / "file").write_text("")
    with pytest.raises(UnusableModelError, match=r"cannot be made in .*file"):
        tiny.ensure_tiny_model(tmp_path / "file")
