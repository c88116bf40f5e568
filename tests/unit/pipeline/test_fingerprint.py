import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from wan_grpc.pipeline.checkpoint import locate
from wan_grpc.pipeline.fingerprint import fingerprint
from wan_grpc.pipeline.published import I2V_A14B_ID, T2V_A14B_ID
from wan_grpc.pipeline.tiny import make_tiny_model


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    make_tiny_model(directory := tmp_path_factory.mktemp("model") / "tiny")
    return directory


@pytest.fixture
def copy(tiny: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny, tmp_path / "copy"))


def of(directory: Path | str, *, load_format: str = "auto") -> str:
    return fingerprint(locate(str(directory), load_format=load_format), load_format=load_format)


def test_a_copy_is_the_same(tiny: Path, copy: Path) -> None:
    """Neither the place nor files that nobody reads matter."""
    (copy / "README.md").write_text("mine", encoding="utf-8")
    (copy / "transformer" / "diffusion_pytorch_model.bin").write_bytes(b"old")
    assert of(copy) == of(tiny)


def edit_config(directory: Path) -> None:
    path = directory / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text("utf-8")), "flow_shift": 5.5}), encoding="utf-8")


def edit_first_weight(directory: Path) -> None:
    path = directory / "transformer" / "diffusion_pytorch_model.safetensors"
    data = bytearray(path.read_bytes())
    data[8 + int.from_bytes(data[:8], "little")] ^= 1
    path.write_bytes(data)


def edit_last_weight(directory: Path) -> None:
    path = directory / "vae" / "diffusion_pytorch_model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def edit_tokenizer(directory: Path) -> None:
    path = directory / "tokenizer" / "tokenizer.json"
    path.write_text(f"{path.read_text('utf-8')} ", encoding="utf-8")


@pytest.mark.parametrize("edit", [edit_config, edit_first_weight, edit_last_weight, edit_tokenizer])
def test_another_checkpoint_is_another(edit: Callable[[Path], None], tiny: Path, copy: Path) -> None:
    """Another config, tokenizer, or other weights of the same shapes are told apart."""
    edit(copy)
    assert of(copy) != of(tiny)


def test_random_weights_depend_on_configs_alone(tiny: Path, copy: Path) -> None:
    """Where no weights are read, none count, and the published shapes are told apart by their name."""
    shutil.rmtree(copy / "tokenizer")
    (copy / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    assert of(copy, load_format="dummy") == of(tiny, load_format="dummy")
    published = {of(name, load_format="dummy") for name in (T2V_A14B_ID, I2V_A14B_ID, tiny)}
    assert len(published) == 3
