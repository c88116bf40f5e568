import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import msgspec
import pytest

from wan_grpc.domain.errors import UnusableModelError
from wan_grpc.domain.variants import T2V_A14B, Limits, Task
from wan_grpc.pipeline.checkpoint import Checkpoint, locate, read_card
from wan_grpc.pipeline.published import T2V_A14B_ID
from wan_grpc.pipeline.tiny import make_tiny_model


@pytest.fixture
def copy(checkpoint_dir: Path, tmp_path: Path) -> Path:
    """A checkpoint to be spoiled."""
    return Path(shutil.copytree(checkpoint_dir, tmp_path / "model"))


def edit(path: Path, **changes: Any) -> None:
    value = json.loads(path.read_text())
    path.write_text(json.dumps({**value, **changes}))


def rename(directory: Path, old: str, new: str) -> None:
    (directory / old).rename(directory / new)


def truncate(path: Path, num_bytes: int) -> None:
    path.write_bytes(path.read_bytes()[:num_bytes])


def shard(directory: Path, *names: str) -> None:
    (directory / "vae/diffusion_pytorch_model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {str(number): name for number, name in enumerate(names)}})
    )


VAE_FILE = "vae/diffusion_pytorch_model.safetensors"
# How a checkpoint is spoiled, and what must be said of it.
FAULTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no index": (lambda d: (d / "model_index.json").unlink(), "model_index.json is missing"),
    "index is no JSON": (lambda d: (d / "model_index.json").write_text("{"), "model_index.json cannot be read: "),
    "index is no object": (
        lambda d: (d / "model_index.json").write_text("[]"),
        "model_index.json is not a JSON object",
    ),
    "another class": (
        lambda d: edit(d / "model_index.json", scheduler=["diffusers", "DDIMScheduler"]),
        "scheduler is a DDIMScheduler; only UniPCMultistepScheduler is served by this version",
    ),
    "no boundary": (
        lambda d: edit(d / "model_index.json", boundary_ratio=None),
        "boundary_ratio is None; between 0 and 1 is needed with two experts",
    ),
    "not flow matching": (
        lambda d: edit(d / "scheduler/scheduler_config.json", prediction_type="epsilon"),
        "scheduler/scheduler_config.json: prediction_type epsilon with use_flow_sigmas True; flow_prediction with",
    ),
    "no component": (lambda d: shutil.rmtree(d / "transformer_2"), "transformer_2/ is missing"),
    "no config": (lambda d: (d / "vae/config.json").unlink(), "vae/config.json is missing"),
    "no tokenizer": (lambda d: shutil.rmtree(d / "tokenizer"), "tokenizer/ has none of tokenizer.json, spiece.model"),
    "no weights": (lambda d: (d / VAE_FILE).unlink(), f"{VAE_FILE} is missing"),
    "pickled weights": (
        lambda d: rename(d, VAE_FILE, "vae/diffusion_pytorch_model.bin"),
        "vae/ holds pickled weights (diffusion_pytorch_model.bin); only safetensors are read",
    ),
    "truncated data": (lambda d: truncate(d / VAE_FILE, 100_000), f"{VAE_FILE} is truncated: 100000 bytes where its"),
    "truncated header": (lambda d: truncate(d / VAE_FILE, 50), f"{VAE_FILE} is truncated: 50 bytes end within its"),
    "empty file": (lambda d: truncate(d / VAE_FILE, 0), f"{VAE_FILE} is truncated: 0 bytes end within its"),
    "LFS pointer": (
        lambda d: (d / VAE_FILE).write_text("version https://git-lfs.github.com/spec/v1\n"),
        f"{VAE_FILE} is not a safetensors file (a Git LFS pointer, perhaps)",
    ),
    "header is no JSON": (
        lambda d: (d / VAE_FILE).write_bytes((4).to_bytes(8, "little") + b"oops"),
        f"{VAE_FILE} is not a safetensors file",
    ),
    "missing shard": (
        lambda d: shard(d, "diffusion_pytorch_model.safetensors", "b.safetensors"),
        "vae/b.safetensors is missing",
    ),
    "shard elsewhere": (
        lambda d: shard(d, "../../secret.safetensors"),
        "vae/diffusion_pytorch_model.safetensors.index.json names files outside its folder: ../../secret.safetensors",
    ),
    "index without shards": (
        lambda d: (d / "vae/diffusion_pytorch_model.safetensors.index.json").write_text("{}"),
        "vae/diffusion_pytorch_model.safetensors.index.json has no weight_map",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_what_is_wrong_is_said_by_name(name: str, copy: Path) -> None:
    """Each fault is refused in a sentence that names the file."""
    spoil, sentence = FAULTS[name]
    spoil(copy)
    with pytest.raises(UnusableModelError) as refused:
        locate(str(copy), load_format="auto")
    assert sentence in str(refused.value)
    assert str(copy) in str(refused.value)


def test_every_fault_is_said_at_once(copy: Path) -> None:
    """An operator mends a checkpoint in one go."""
    shutil.rmtree(copy / "tokenizer")
    (copy / VAE_FILE).unlink()
    with pytest.raises(UnusableModelError) as refused:
        locate(str(copy), load_format="auto")
    assert str(refused.value) == (
        f"{copy} cannot be served: tokenizer/ has none of tokenizer.json, spiece.model; {VAE_FILE} is missing"
    )


def test_dummy_needs_configs_alone(copy: Path) -> None:
    """A directory without weights and tokenizer serves for random weights, and for nothing else."""
    for path in copy.rglob("*.safetensors"):
        path.unlink()
    shutil.rmtree(copy / "tokenizer")
    assert locate(str(copy), load_format="dummy") == Checkpoint(model_path=str(copy), directory=str(copy))
    with pytest.raises(UnusableModelError):
        locate(str(copy), load_format="auto")


@pytest.mark.parametrize(
    ("model_path", "sentence"),
    [
        ("/nowhere/model", "/nowhere/model is neither a directory nor a hub id"),
        ("./model", "./model is neither a directory nor a hub id"),
        ("model", "model is neither a directory nor a hub id"),
        ("wan-tiny", "wan-tiny is neither .* nor one of the embedded models, wan-tiny-t2v and wan-tiny-ti2v"),
        ("owner/-model-", "owner/-model- is neither a directory nor a hub id"),
        (__file__, f"{__file__} is not a directory"),
    ],
)
def test_a_path_that_is_no_directory_is_not_looked_for_elsewhere(model_path: str, sentence: str) -> None:
    """A mistyped path is said to be one, with no question to the hub."""
    with pytest.raises(UnusableModelError, match="^" + sentence.replace("(", r"\(")):
        locate(model_path, load_format="auto")


def test_an_unknown_load_format_is_refused(checkpoint_dir: Path) -> None:
    """The two that exist are named."""
    with pytest.raises(UnusableModelError, match="load format pickle is not one of auto, dummy"):
        locate(str(checkpoint_dir), load_format="pickle")


def ask_the_hub(tmp_path: Path, **environment: str) -> str:
    """What a process with this environment says when it looks for the published model."""
    code = (
        "from wan_grpc.pipeline.checkpoint import locate\n"
        "from wan_grpc.domain.errors import UnusableModelError\n"
        f"try: locate('{T2V_A14B_ID}', load_format='auto')\n"
        "except UnusableModelError as error: print(error)\n"
    )
    env = {**os.environ, "HF_HOME": str(tmp_path), **environment}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True, timeout=60)
    return done.stdout.strip()


def test_offline_is_respected(tmp_path: Path) -> None:
    """HF_HUB_OFFLINE and an empty cache: said at once, and why."""
    assert ask_the_hub(tmp_path, HF_HUB_OFFLINE="1") == (
        f"{T2V_A14B_ID} is no directory here and not whole in the local cache, and HF_HUB_OFFLINE forbids a download"
    )


def test_an_unreachable_hub_is_said(tmp_path: Path) -> None:
    """Nobody listens at the hub's address: the sentence says that the cache was looked at too."""
    assert ask_the_hub(tmp_path, HF_ENDPOINT="http://127.0.0.1:9", HF_HUB_OFFLINE="0").startswith(
        f"{T2V_A14B_ID} is no directory here, not whole in the local cache, and cannot be downloaded: "
    )


CONFIG_PATTERNS = ["*.json", "tokenizer/*.model", "tokenizer/*.txt"]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, copy: Path) -> list[tuple[str, list[str]]]:
    """A hub that has one model, and what is asked of it."""
    asked: list[tuple[str, list[str]]] = []

    def snapshot(repository: str, *, allow_patterns: list[str]) -> str:
        asked.append((repository, allow_patterns))
        return str(copy)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    return asked


def test_a_hub_id_becomes_a_checked_snapshot(asked: list[tuple[str, list[str]]], copy: Path) -> None:
    """Configs first, then the safetensors of what the index names, and what comes is checked like any directory."""
    found = locate("owner/model", load_format="auto")
    assert found == Checkpoint(model_path="owner/model", directory=str(copy))
    parts = ["text_encoder", "transformer", "transformer_2", "vae"]
    assert asked == [
        ("owner/model", CONFIG_PATTERNS),
        ("owner/model", [*CONFIG_PATTERNS, *(f"{part}/*.safetensors" for part in parts)]),
    ]
    (copy / VAE_FILE).unlink()
    with pytest.raises(UnusableModelError, match=f"^owner/model cannot be served: {VAE_FILE} is missing"):
        locate("owner/model", load_format="auto")


def test_the_image_encoder_is_fetched_too(asked: list[tuple[str, list[str]]], copy: Path) -> None:
    """Where the index names one."""
    shutil.rmtree(copy)
    make_tiny_model(copy, task=Task.IMAGE_TO_VIDEO, with_image_encoder=True)
    locate("owner/model", load_format="auto")
    parts = ["text_encoder", "image_encoder", "transformer", "vae"]
    assert asked[1:] == [("owner/model", [*CONFIG_PATTERNS, *(f"{part}/*.safetensors" for part in parts)])]


def test_random_weights_fetch_none(asked: list[tuple[str, list[str]]]) -> None:
    """Configs are enough for them."""
    locate("owner/model", load_format="dummy")
    assert asked == [("owner/model", CONFIG_PATTERNS)]


def test_what_is_not_served_is_refused_before_its_weights_come(asked: list[tuple[str, list[str]]], copy: Path) -> None:
    """Dozens of gigabytes are not fetched for a sentence."""
    edit(copy / "model_index.json", _class_name="WanVACEPipeline")
    with pytest.raises(UnusableModelError, match=r"^owner/model cannot be served: .* a VACE model"):
        locate("owner/model", load_format="auto")
    assert asked == [("owner/model", CONFIG_PATTERNS)]


def test_a_checkpoint_travels_as_plain_values(checkpoint: Checkpoint) -> None:
    """To JSON and back without loss."""
    assert msgspec.json.decode(msgspec.json.encode(checkpoint), type=Checkpoint) == checkpoint
    assert {type(value) for value in asdict(checkpoint).values()} <= {str, bool, type(None)}


def test_the_operator_limits_requests(checkpoint: Checkpoint) -> None:
    """What the operator allows is in the card."""
    limits = Limits(max_area=100, max_num_frames=5, max_inference_steps=7)
    assert read_card(checkpoint, model_id="mine", limits=limits).limits == limits


def test_a_checkpoint_may_carry_defaults(copy: Path) -> None:
    """wan_grpc.json beside model_index.json wins over the published facts."""
    own = {"width": 64, "height": 48, "num_frames": 9, "guidance_scale": 2, "negative_prompt": "dull"}
    (copy / "wan_grpc.json").write_text(json.dumps({"defaults": own, "words": ["A", "cat"]}))
    card = read_card(locate(str(copy), load_format="auto"), model_id="mine")
    assert card.defaults == replace(T2V_A14B, **{**own, "guidance_scale": 2.0})
    assert (card.embedded, card.sizes, card.words) == (False, ((64, 48),), {"a", "cat"})


@pytest.mark.parametrize(
    ("defaults", "sentence"),
    [
        ({"color": 1}, "wan_grpc.json: defaults.color is not a default"),
        ({"width": 64.5}, "width is 64.5, not of type int"),
        ({"fps": "8"}, "fps is '8', not of type int"),
        ({"flow_shift": True}, "flow_shift is True, not of type float"),
        (["width"], "wan_grpc.json: defaults is ['width'], not an object"),
    ],
)
def test_defaults_of_the_wrong_kind_are_refused(defaults: Any, sentence: str, copy: Path) -> None:
    """The value is named."""
    (copy / "wan_grpc.json").write_text(json.dumps({"defaults": defaults}))
    with pytest.raises(UnusableModelError) as refused:
        read_card(locate(str(copy), load_format="auto"), model_id="x")
    assert sentence in str(refused.value)


@pytest.mark.parametrize("words", ["a cat", ["cat", 1], {"cat": 1}])
def test_words_of_the_wrong_kind_are_refused(words: Any, copy: Path) -> None:
    """Text would be taken for its letters."""
    (copy / "wan_grpc.json").write_text(json.dumps({"words": words}))
    with pytest.raises(UnusableModelError, match=r"wan_grpc\.json: words is not a list of strings"):
        read_card(locate(str(copy), load_format="auto"), model_id="x")


@pytest.mark.parametrize("name", ["guidance_scale_2", "boundary_ratio"])
def test_defaults_of_two_experts_are_refused_with_one(name: str, copy: Path) -> None:
    """They would have no effect."""
    edit(copy / "model_index.json", transformer_2=[None, None], boundary_ratio=None)
    (copy / "wan_grpc.json").write_text(json.dumps({"defaults": {name: 0.5}}))
    with pytest.raises(UnusableModelError, match=f"defaults.{name} is for two experts, and this model has one"):
        read_card(locate(str(copy), load_format="auto"), model_id="x")


def test_one_expert_is_guided_by_its_own_scale(copy: Path) -> None:
    """A guidance that a checkpoint carries is that of every step."""
    edit(copy / "model_index.json", transformer_2=[None, None], boundary_ratio=None)
    (copy / "wan_grpc.json").write_text(json.dumps({"defaults": {"guidance_scale": 6}}))
    card = read_card(locate(str(copy), load_format="auto"), model_id="x")
    assert card.defaults == replace(T2V_A14B, guidance_scale=6.0, guidance_scale_2=6.0, boundary_ratio=None)


def test_the_server_process_stays_free_of_torch() -> None:
    """Finding a checkpoint, reading its card and asking for the embedded model import no heavy library."""
    code = (
        "import sys, wan_grpc.pipeline.checkpoint, wan_grpc.pipeline.embedded\n"
        "print({'torch', 'diffusers', 'transformers', 'numpy'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "set()"
