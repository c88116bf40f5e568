"""`wan-grpc` without a server, and what it says when it is used wrongly."""

import hashlib
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from tests.functional.live import ROOT, LiveServer, command, environment, spec


def run(*arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        command(*arguments), capture_output=True, text=True, timeout=100, check=False, cwd=ROOT, env=environment()
    )


def test_generate_writes_what_a_server_sends(live: LiveServer, checkpoint_dir: Path, tmp_path: Path) -> None:
    """The file of `wan-grpc generate` has the very bytes that a server sends for the same request."""
    video = spec()
    flags = [
        f"--{field.name.replace('_', '-')}={value}"
        for field, value in video.ListFields()  # prompt, size, frames, steps and seed
    ]
    place = [f"--output-path={tmp_path}", "--output-file-name=made.mp4", f"--model-path={checkpoint_dir}"]
    done = run("generate", *flags, *place)
    assert done.returncode == 0, done.stderr
    made = (tmp_path / "made.mp4").read_bytes()
    assert made == live.make(video).video
    assert done.stdout.splitlines()[-1] == f"sha256 {hashlib.sha256(made).hexdigest()}"


def test_wrong_flags() -> None:
    """Unknown flags and wrong values end the command with 2 before anything is done, each named in a line."""
    done = run("serve", "--max-queue=-1", "--heartbeat-s=16", "--port=x", "--warp=9", "--lora-path=x")
    told = sorted(line.split(":")[1].strip() for line in done.stderr.splitlines() if ":" in line)
    assert (done.returncode, done.stdout) == (2, "")
    assert told == ["--heartbeat-s", "--lora-path", "--max-queue", "--port", "--warp"]


def test_help_is_quick(capsys: pytest.CaptureFixture[str]) -> None:
    """Help comes without torch; how long it takes is shown, since a busy machine is no fault."""
    for arguments in ([], ["serve"], ["generate"]):
        began = time.monotonic()
        done = run(*arguments, "--help")
        with capsys.disabled():
            print(f"\n`wan-grpc {' '.join([*arguments, '--help'])}` took {time.monotonic() - began:.2f} s")
        assert (done.returncode, done.stderr) == (0, "")
        assert "usage: wan-grpc" in done.stdout


def test_damaged_checkpoint(checkpoint_dir: Path, tmp_path: Path) -> None:
    """A checkpoint that cannot be served ends either command with 1 and one sentence that has every fault."""
    copy = shutil.copytree(checkpoint_dir, tmp_path / "model")
    (copy / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(b"\xff" * 100)
    (copy / "transformer_2" / "config.json").unlink()
    for arguments in (("serve", "--port=0", "--metrics-port=-1"), ("generate", "--prompt=x", "--save-output=false")):
        done = run(*arguments, f"--model-path={copy}", f"--spool-dir={tmp_path / 'spool'}")
        (sentence,) = (line for line in done.stderr.splitlines() if line != "the ranks are starting")
        assert (done.returncode, done.stdout) == (1, "")
        assert sentence.startswith(f"wan-grpc {arguments[0]}: {copy} cannot be served: ")
        assert "transformer_2/config.json is missing" in sentence
        assert "vae/diffusion_pytorch_model.safetensors" in sentence
