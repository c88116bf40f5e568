from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import pictures, tiny
from tests.functional import checkpoint
from tests.functional.live import NARROW, PATIENT, LiveServer, running_server
from wan_grpc.domain.variants import Task
from wan_grpc.pipeline.tiny import make_tiny_model

TIMEOUT_S = 120


def pytest_addoption(parser: pytest.Parser) -> None:
    """For whoever has trained the embedded models anew."""
    parser.addoption("--wan-tiny", type=Path, help="what `python -m training package` wrote, instead of the package's")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A test of this folder that lasts too long fails as others do, and so its servers are ended."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.timeout(TIMEOUT_S, method="signal"))


@pytest.fixture(scope="session")
def checkpoint_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that diffusers saved. Not to be written to."""
    return tiny.save(checkpoint.make_pipeline(), tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="session")
def live(checkpoint_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """A server of that checkpoint for all tests that leave it as it was."""
    directory = tmp_path_factory.mktemp("live")
    flags = ("--model-path", str(checkpoint_dir), "--cpu-threads", "1", "--heartbeat-s", "0.2", "--drain-window-s", "0")
    with running_server(directory, *flags, *PATIENT) as server:
        yield server


@pytest.fixture(scope="session")
def live_i2v(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """A server of a tiny image-to-video model with narrow limits, for all tests that leave it as it was."""
    directory = tmp_path_factory.mktemp("live-i2v")
    make_tiny_model(directory / "model", task=Task.IMAGE_TO_VIDEO)
    with running_server(directory, "--model-path", str(directory / "model"), *NARROW, *PATIENT) as server:
        yield server


@pytest.fixture
def star(tmp_path: Path) -> Path:
    """A picture that is twice as wide as it is high, by the name that the documentation has for one."""
    path = tmp_path / "star.png"
    pictures.two_colours(80, 40).save(path)
    return path
