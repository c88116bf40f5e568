from pathlib import Path

import pytest
import torch
from diffusers import WanPipeline

from tests import tiny
from wan_grpc.pipeline.checkpoint import Checkpoint, locate
from wan_grpc.pipeline.load import load
from wan_grpc.pipeline.video import VideoPipeline


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Shapes this small gain nothing from more, and lose much to waiting where other processes keep the cores busy."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def reference() -> WanPipeline:
    """The pipeline of diffusers, in memory."""
    return tiny.make_pipeline()


@pytest.fixture(scope="session")
def checkpoint_dir(reference: WanPipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same pipeline as diffusers saves it. Not to be written to."""
    return tiny.save(reference, tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="session")
def checkpoint(checkpoint_dir: Path) -> Checkpoint:
    return locate(str(checkpoint_dir), load_format="auto")


@pytest.fixture(scope="session")
def pipeline(checkpoint: Checkpoint) -> VideoPipeline:
    """Ours, from the files that diffusers saved."""
    return load(checkpoint, device="cpu", dtype="float32", load_format="auto")
