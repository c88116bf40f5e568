"""What the training of the embedded models does otherwise on a GPU: forward and backward pass as one CUDA graph."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from training.__main__ import main

pytestmark = pytest.mark.gpu

VAE = "vae --num-clips 2 --scale 0.00002 --warm-up 1"
EXPERT = "expert --role t2v-low --num-tokens 600"
BEFORE = ("text --steps 2", f"{VAE} --steps 2", "latents --counts 4 4 4")
NAMES = {"text", "vae", "latents.pt"}


@pytest.fixture(scope="module")
def before(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What experts need."""
    directory = tmp_path_factory.mktemp("before")
    for stage in BEFORE:
        main([*stage.split(), "--run", str(directory), "--device", "cuda"])
    return directory


def learned(stage: str, before: Path, directory: Path, *options: str) -> torch.Tensor:
    """All averaged weights of a stage."""
    directory.mkdir()
    own = "vae" if stage.startswith("vae") else "t2v-low"
    for name in NAMES - {own}:
        (directory / name).symlink_to(before / name)
    main([*stage.split(), *options, "--run", str(directory), "--device", "cuda"])
    average = torch.load(directory / own / "average.pt", map_location="cpu")
    return torch.cat([value.float().flatten() for value in average.values()])


@pytest.mark.parametrize(
    ("stage", "options"), [(VAE, []), (EXPERT, []), (EXPERT, ["--compile"])], ids=["vae", "expert", "compiled expert"]
)
def test_it_learns_the_same_by_graphs(stage: str, options: list[str], before: Path, tmp_path: Path) -> None:
    """From clips of all three sizes: each step draws the same, and what was learned differs by rounding alone."""
    first = learned(f"{stage} --steps 1", before, tmp_path / "first")
    plain = learned(f"{stage} --steps 20", before, tmp_path / "plain")
    again = learned(f"{stage} --steps 20 --cuda-graphs", before, tmp_path / "again", *options)
    moved, apart = float((plain - first).norm()), float((plain - again).norm())
    print(f"moved {moved:.4f}, apart {apart:.4f}")
    assert apart < 0.2 * moved


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_learn_one_expert(before: Path, tmp_path: Path) -> None:
    """By graphs, too; what they learn together is near what one of them learns alone."""
    first = learned(f"{EXPERT} --steps 1", before, tmp_path / "first")
    plain = learned(f"{EXPERT} --steps 20", before, tmp_path / "plain")
    for name in NAMES:
        (tmp_path / name).symlink_to(before / name)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "--"]
    command = f"training {EXPERT} --steps 20 --cuda-graphs --run {tmp_path}"
    subprocess.run([*torchrun, *command.split()], check=True, timeout=100)
    average = torch.load(tmp_path / "t2v-low/average.pt", map_location="cpu")
    both = torch.cat([value.float().flatten() for value in average.values()])
    moved, together = plain - first, both - first
    print(f"along {float(torch.cosine_similarity(moved, together, dim=0)):.3f}")
    assert torch.cosine_similarity(moved, together, dim=0) > 0.8
    [line] = (tmp_path / "t2v-low/log.jsonl").read_text().splitlines()
    assert json.loads(line)["step"] == 20
