"""The models that come with the package, as a server finds them."""

import hashlib
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from training.world import vocabulary
from wan_grpc.domain.errors import UnusableModelError
from wan_grpc.domain.variants import Task
from wan_grpc.pipeline import embedded
from wan_grpc.pipeline.checkpoint import locate, read_card

WEIGHTS = "transformer_2/diffusion_pytorch_model.safetensors"
TASKS = {"wan-tiny-t2v": Task.TEXT_TO_VIDEO, "wan-tiny-ti2v": Task.TEXT_IMAGE_TO_VIDEO}


def hashes(directory: Path) -> dict[str, str]:
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_all_of_them_are_small() -> None:
    """16 MB of weights in all, and what is shared is there once."""
    weights = list(embedded.FILES.rglob("*.safetensors"))
    assert sum(path.stat().st_size for path in weights) < 16e6
    assert sorted(path.parent.name for path in weights) == [
        *("text_encoder", "transformer", "transformer", "transformer_2", "vae"),
    ]


@pytest.mark.parametrize("name", embedded.NAMES)
def test_its_card(name: str, tmp_path: Path) -> None:
    """What it says of itself: its task, its size, every word of its world."""
    card = read_card(locate(str(embedded.ensure_embedded(name, tmp_path)), load_format="auto"), model_id=name)
    assert (card.task, card.sizes) == (TASKS[name], ((128, 96),))
    assert (card.defaults.num_frames, card.defaults.num_inference_steps, card.defaults.fps) == (25, 20, 8)
    assert card.words == set(vocabulary())


def whole(name: str) -> dict[str, str]:
    """What the checkpoint should have."""
    return hashes(embedded.FILES / embedded.SHARED) | hashes(embedded.FILES / embedded._OWN[name])


def test_servers_that_start_at_once_share_one_copy(tmp_path: Path) -> None:
    """Each has a whole one as soon as it goes on, and nothing else stays behind."""
    barrier, found = threading.Barrier(4), []

    def start() -> None:
        barrier.wait(30)
        made = embedded.ensure_embedded(embedded.DEFAULT, tmp_path)
        found.append((made, hashlib.sha256((made / WEIGHTS).read_bytes()).hexdigest()))

    threads = [threading.Thread(target=start) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    [made] = tmp_path.iterdir()
    assert found == [(made, whole(embedded.DEFAULT)[WEIGHTS])] * 4
    assert hashes(made) == whole(embedded.DEFAULT)


@pytest.mark.parametrize("harm", ["lost", "cut", "zeros", "no directory"])
def test_a_copy_that_was_harmed_is_mended(harm: str, tmp_path: Path) -> None:
    """By a cleaner that took a file, or a power cut that took its content; what is whole is left alone."""
    made = embedded.ensure_embedded(embedded.DEFAULT, tmp_path)
    weights, other = made / WEIGHTS, made / "model_index.json"
    content, before = weights.read_bytes(), other.stat()
    match harm:
        case "lost":
            weights.unlink()
        case "cut":
            weights.write_bytes(content[:1000])
        case "zeros":
            weights.write_bytes(bytes(len(content)))
        case _:
            shutil.rmtree(weights.parent)
    assert embedded.ensure_embedded(embedded.DEFAULT, tmp_path) == made
    assert hashes(made) == whole(embedded.DEFAULT)
    assert other.stat() == before


def test_a_full_disk_is_said_and_mended_later(tmp_path: Path) -> None:
    """No file may have more than a megabyte: the sentence names the place; with room again the next start goes on."""
    code = (
        "import resource, signal; from pathlib import Path; from wan_grpc.pipeline import embedded\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))\n"
        f"embedded.ensure_embedded(embedded.DEFAULT, Path({str(tmp_path)!r}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert f"UnusableModelError: the embedded model cannot be kept in {tmp_path}: " in done.stderr
    [made] = tmp_path.iterdir()
    assert hashes(made) != whole(embedded.DEFAULT) and not list(made.rglob(".copy-*"))
    assert embedded.ensure_embedded(embedded.DEFAULT, tmp_path) == made
    assert hashes(made) == whole(embedded.DEFAULT)


def test_other_files_are_another_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a package with other weights left is not served, and what this one left is taken as it is."""
    own, shared = tmp_path / "files/t2v", tmp_path / "files/shared"
    for directory in (own, shared):
        directory.mkdir(parents=True)
    (own / "model_index.json").write_text("{}")
    (own / "weights").write_text("old")
    monkeypatch.setattr(embedded, "FILES", tmp_path / "files")
    old = embedded.ensure_embedded(embedded.DEFAULT, tmp_path / "cache")
    kept = (old / "weights").stat()
    assert embedded.ensure_embedded(embedded.DEFAULT, tmp_path / "cache") == old
    assert (old / "weights").stat() == kept
    (own / "weights").write_text("new")
    new = embedded.ensure_embedded(embedded.DEFAULT, tmp_path / "cache")
    assert (new / "weights").read_text() == "new" and (old / "weights").read_text() == "old"


def test_a_package_that_cannot_be_written_is_no_trouble(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Modes of its directories are not copied, so that theirs can be removed."""
    own, shared = tmp_path / "files/t2v", tmp_path / "files/shared"
    for directory in (own, shared):
        (directory / "part").mkdir(parents=True)
        (directory / "part" / directory.name).write_text("x")
    (own / "model_index.json").write_text("{}")
    for directory in (own, shared):
        (directory / "part").chmod(0o555)
        directory.chmod(0o555)
    monkeypatch.setattr(embedded, "FILES", tmp_path / "files")
    made = embedded.ensure_embedded(embedded.DEFAULT, tmp_path / "cache")
    assert sorted(path.name for path in (made / "part").iterdir()) == ["shared", "t2v"]
    assert all(path.stat().st_mode & 0o200 for path in (made, made / "part"))


def test_a_package_without_its_files_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not blamed on the cache."""
    monkeypatch.setattr(embedded, "FILES", tmp_path)
    with pytest.raises(UnusableModelError, match="this installation has no files of wan-tiny-t2v"):
        embedded.ensure_embedded(embedded.DEFAULT, tmp_path / "cache")


def test_a_directory_of_that_name_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever made one means it."""
    monkeypatch.chdir(tmp_path)
    assert embedded.resolved("wan-tiny-ti2v", tmp_path) == str(embedded.ensure_embedded("wan-tiny-ti2v", tmp_path))
    Path("wan-tiny-ti2v").mkdir()
    assert embedded.resolved("wan-tiny-ti2v", tmp_path) == "wan-tiny-ti2v"
    assert embedded.resolved("org/model", tmp_path) == "org/model"


def test_it_needs_no_torch(tmp_path: Path) -> None:
    """A process that asks for it has not imported torch."""
    code = (
        "import sys; from pathlib import Path; from wan_grpc.pipeline.embedded import DEFAULT, ensure_embedded\n"
        f"print(ensure_embedded(DEFAULT, Path({str(tmp_path)!r})).is_dir(), 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=100)
    assert done.stdout.split() == ["True", "False"]


def test_a_cache_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    """By its path."""
    (tmp_path / "file").write_text("")
    with pytest.raises(UnusableModelError, match=r"cannot be kept in .*file"):
        embedded.ensure_embedded(embedded.DEFAULT, tmp_path / "file")
