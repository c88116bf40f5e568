"""Every recipe of clients/README.md, run by the real grpcurl against a real server."""

import base64
import hashlib
import json
import os
import re
import subprocess
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import av
import pytest

from tests.functional.live import ROOT, LiveServer, environment, spec

README = (ROOT / "clients" / "README.md").read_text(encoding="utf-8")
RECIPES: dict[str, str] = dict(re.findall(r"<!-- recipe: (\S+) -->\n```sh\n(.*?)```\n", README, re.DOTALL))
DOCUMENTED_ADDRESS = "127.0.0.1:3000"
Cook = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def cook(live: LiveServer, tmp_path: Path) -> Cook:
    """Runs a recipe as it is printed, on another address and in a directory that looks like a checkout."""
    return cook_at(live, tmp_path)


def cook_at(live: LiveServer, directory: Path) -> Cook:
    (directory / "protos").symlink_to(ROOT / "protos")
    path = os.pathsep.join((sysconfig.get_path("scripts"), os.environ["PATH"]))

    def run(recipe: str, **variables: str) -> subprocess.CompletedProcess[str]:
        script = RECIPES[recipe].replace(DOCUMENTED_ADDRESS, live.address)
        return subprocess.run(
            ["bash", "-euo", "pipefail", "-c", script],
            cwd=directory,
            env={**environment(), "PATH": path, **variables},
            capture_output=True,
            text=True,
            timeout=90,
            check=False,
        )

    return run


def answers(done: subprocess.CompletedProcess[str]) -> list[dict[str, Any]]:
    """The JSON values that grpcurl has printed one after the other."""
    assert (done.returncode, done.stderr) == (0, "")
    return list(_values(done.stdout))


def _values(rest: str) -> Iterator[dict[str, Any]]:
    while rest := rest.lstrip():
        value, end = json.JSONDecoder().raw_decode(rest)
        yield value
        rest = rest[end:]


def test_every_recipe_is_tested() -> None:
    """No recipe is added to the page without a test here, and no grpcurl command stands outside a recipe."""
    tested = set(re.findall(r'cook\("([^"]+)"', Path(__file__).read_text(encoding="utf-8")))
    assert tested == set(RECIPES)
    assert README.count("\ngrpcurl ") == sum(f"\n{script}".count("\ngrpcurl ") for script in RECIPES.values())


def test_list(cook: Cook) -> None:
    """Reflection names every service, those of gRPC itself included."""
    assert cook("list").stdout.splitlines() == [
        "grpc.channelz.v1.Channelz",
        "grpc.health.v1.Health",
        "grpc.reflection.v1alpha.ServerReflection",
        "wan_grpc.v1.AdapterService",
        "wan_grpc.v1.VideoGenerationService",
    ]


def test_describe(cook: Cook) -> None:
    """Reflection knows the methods of a service and the fields of a message."""
    done = cook("describe")
    assert (done.returncode, done.stderr) == (0, "")
    assert (
        "rpc Generate ( .wan_grpc.v1.GenerateRequest ) returns ( stream .wan_grpc.v1.GenerateResponse );" in done.stdout
    )
    assert "optional int32 num_inference_steps = 6" in done.stdout


def test_model(cook: Cook) -> None:
    """GetModel answers with what the server is."""
    [answer] = answers(cook("model"))
    assert (answer["model"]["tasks"], answer["deployment"]["ready"]) == (["TASK_TEXT_TO_VIDEO"], True)


def test_health(cook: Cook) -> None:
    """Readiness goes by the name of the service."""
    assert answers(cook("health")) == [{"status": "SERVING"}]


def test_generate(cook: Cook, live: LiveServer, tmp_path: Path) -> None:
    """Progress and bytes come as JSON, and the printed script makes the very video of them."""
    cook("save")
    done = cook("generate")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    events = [answer["event"] for answer in _values((tmp_path / "events.json").read_text(encoding="utf-8"))]
    denoised = [event["progress"] for event in events if "expert" in event.get("progress", {})]
    assert {(one["stage"], one["totalSteps"], one["step"] in (1, 2, 3, 4)) for one in denoised} == {
        ("STAGE_DENOISE", 4, True)
    }
    generation = live.get(events[0]["generation"])
    video = (tmp_path / "star.mp4").read_bytes()
    assert (len(video), hashlib.sha256(video).hexdigest()) == (
        generation.completed.size_bytes,
        generation.completed.sha256,
    )


@pytest.mark.parametrize(("recipe", "name", "frames"), [("picture", "star.png", 1), ("lossless", "star.mkv", 5)])
def test_formats(cook: Cook, tmp_path: Path, recipe: str, name: str, frames: int) -> None:
    """The format that is asked for is what the file is."""
    cook("save")
    done = cook("picture") if recipe == "picture" else cook("lossless")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    with av.open(str(tmp_path / name)) as file:
        shapes = [frame.to_ndarray(format="rgb24").shape for frame in file.decode(video=0)]
    assert shapes == [(96, 128, 3)] * frames


def test_image(live_i2v: LiveServer, tmp_path: Path, star: Path) -> None:
    """A picture on stdin becomes a video of its aspect."""
    cook = cook_at(live_i2v, tmp_path)
    cook("save")
    done = cook("image")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    with av.open(str(tmp_path / "right.mp4")) as file:
        shapes = {frame.to_ndarray(format="rgb24").shape for frame in file.decode(video=0)}
    accepted = next(_values((tmp_path / "events.json").read_text(encoding="utf-8")))["event"]["accepted"]["resolved"]
    assert shapes == {(accepted["height"], accepted["width"], 3)} == {(64, 144, 3)}
    assert accepted["imageSha256"] == hashlib.sha256(star.read_bytes()).hexdigest()


def test_create_and_cancel(cook: Cook, live: LiveServer) -> None:
    """A generation begun without a stream is found by its name and ends when told to."""
    found, cancelled = (answer["generation"] for answer in answers(cook("create")))
    assert (found["state"], found["name"]) in [
        (f"GENERATION_STATE_{state}", cancelled["name"]) for state in ("QUEUED", "RUNNING")
    ]
    assert (cancelled["state"], cancelled["error"]["reason"]) == ("GENERATION_STATE_CANCELLED", "CANCELLED_BY_CALLER")


def test_watch(cook: Cook, live: LiveServer) -> None:
    """Watching an ended generation replays what came after the sequence that was seen."""
    name = live.make(spec()).events[0].generation
    events = [answer["event"] for answer in answers(cook("watch", NAME=name))]
    assert "accepted" not in events[0]
    assert int(events[-1]["completed"]["sizeBytes"]) == live.get(name).completed.size_bytes


def test_list_generations(cook: Cook, live: LiveServer) -> None:
    """The newest one comes first, and only those in the state that was asked for."""
    name = live.make(spec()).events[0].generation
    [answer] = answers(cook("list-generations"))
    assert answer["generations"][0]["name"] == name
    assert {generation["state"] for generation in answer["generations"]} == {"GENERATION_STATE_SUCCEEDED"}


def test_download(cook: Cook, live: LiveServer) -> None:
    """The size and checksum of the whole come first, then the bytes from the offset on."""
    stream = live.make(spec())
    head, *rest = answers(cook("download", NAME=stream.events[0].generation))
    assert (int(head["sizeBytes"]), head["sha256"]) == (stream.completed.size_bytes, stream.completed.sha256)
    assert b"".join(base64.b64decode(part["chunk"]["data"]) for part in rest) == bytes(stream.video[1000:])


def test_refused(cook: Cook) -> None:
    """Each field that is wrong is named, readable in a shell."""
    done = cook("refused")
    assert (done.returncode != 0, done.stdout) == (True, "")
    assert "Code: InvalidArgument" in done.stderr
    assert '"field":"spec.prompt","description":"must not be empty"' in done.stderr
    assert '"field":"spec.width","description":"100 is not a positive multiple of 16"' in done.stderr


def test_without_reflection(cook: Cook) -> None:
    """The protos of a checkout are enough to call the server."""
    [answer] = answers(cook("protos"))
    assert answer["deployment"]["ready"] is True
