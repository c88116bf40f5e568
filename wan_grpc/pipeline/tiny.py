"""The embedded model: a checkpoint in the published T2V-A14B layout, small enough to be made on the spot.

Knows where it is kept and its configs. Imports no torch: the weights are made by tiny_weights, in a process of its own.
"""

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Final

from wan_grpc.domain.errors import UnusableModelError
from wan_grpc.pipeline.checkpoint import EXTRA_NAME
from wan_grpc.pipeline.published import T2V_A14B_CONFIGS

VERSION: Final = 1
"""Raised whenever the files change, so that an older copy is not served."""
TEXT_DIM: Final = 64
_TRANSFORMER: Final = {
    **T2V_A14B_CONFIGS["transformer/config.json"],
    "attention_head_dim": 24,
    "ffn_dim": 192,
    "num_attention_heads": 4,
    "num_layers": 2,
    "text_dim": TEXT_DIM,
}

CONFIGS: Final[dict[str, dict[str, Any]]] = {
    "model_index.json": {
        **T2V_A14B_CONFIGS["model_index.json"],
        "_diffusers_version": "0.42.0",
        "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
    },
    "scheduler/scheduler_config.json": dict(T2V_A14B_CONFIGS["scheduler/scheduler_config.json"]),
    "text_encoder/config.json": {
        **T2V_A14B_CONFIGS["text_encoder/config.json"],
        "d_ff": 128,
        "d_kv": 16,
        "d_model": TEXT_DIM,
        "num_decoder_layers": 2,
        "num_heads": 4,
        "num_layers": 2,
        "vocab_size": 259,
    },
    "transformer/config.json": _TRANSFORMER,
    "transformer_2/config.json": _TRANSFORMER,
    "vae/config.json": {**T2V_A14B_CONFIGS["vae/config.json"], "base_dim": 8, "num_res_blocks": 1},
    EXTRA_NAME: {
        "defaults": {
            "fps": 8,
            "guidance_scale": 4.0,
            "guidance_scale_2": 3.0,
            "height": 96,
            "num_frames": 25,
            "num_inference_steps": 10,
            "width": 128,
        },
        "embedded": True,
        "version": VERSION,
    },
}


def make_tiny_model(directory: Path) -> None:
    """Write the checkpoint into `directory`, which is made if need be: the same bytes every time.

    Raises:
        UnusableModelError: `directory` holds something already.
    """
    from wan_grpc.pipeline import tiny_weights  # brings torch, which the server process must stay free of

    if directory.exists() and any(directory.iterdir()):
        raise UnusableModelError(f"{directory} is not empty")
    tiny_weights.write_model(directory, CONFIGS)


def ensure_tiny_model(cache_dir: Path) -> Path:
    """The directory of the checkpoint under `cache_dir`, made on the first call. Safe for servers that start at once.

    Raises:
        UnusableModelError: it cannot be made there.
    """
    target = cache_dir / f"tiny-t2v-a14b-{VERSION}"
    if target.is_dir():
        return target
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f"{target.name}-", dir=cache_dir) as scratch:
            _make_elsewhere(Path(scratch, "model"))
            _publish(Path(scratch, "model"), target)
    except OSError as error:
        raise UnusableModelError(f"the embedded model cannot be made in {cache_dir}: {error}") from error
    return target


def _make_elsewhere(directory: Path) -> None:
    """Make the model in a process of its own, so that the caller's stays free of torch."""
    command = [sys.executable, "-m", "wan_grpc.pipeline.tiny", str(directory)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise UnusableModelError(f"the embedded model could not be made: {done.stderr.strip()[-2000:]}")


def _publish(made: Path, target: Path) -> None:
    """Rename, which shows the model whole or not at all; whoever was faster made the same bytes."""
    try:
        made.rename(target)
    except OSError:
        if not target.is_dir():
            raise


if __name__ == "__main__":
    make_tiny_model(Path(sys.argv[1]))
