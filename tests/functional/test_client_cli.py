"""The Python client and its command against a real server."""

import asyncio
import hashlib
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Self

import av
import pytest
from PIL import Image

from tests.functional.live import ROOT, LiveServer, environment, eventually
from wan_grpc.v1 import generation_pb2 as pb
from wan_grpc_client import (
    Accepted,
    AsyncClient,
    Chunk,
    Client,
    Completed,
    GenerationCancelledError,
    Options,
    Preview,
    Progress,
    Reattaching,
    RefusedError,
    VideoInfo,
    generate,
)

SMALL = Options(width=64, height=48, num_frames=5, num_inference_steps=4, seed=7)
LONG = Options(width=192, height=192, num_frames=17, num_inference_steps=150)
SMALL_FLAGS = ("--width=64", "--height=48", "--num-frames=5", "--num-inference-steps=4", "--seed=7")
LONG_FLAGS = ("--width=192", "--height=192", "--num-frames=17", "--num-inference-steps=150")
README = (ROOT / "clients" / "README.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
COMMANDS: dict[str, str] = dict(re.findall(r"<!-- command: (\S+) -->\n```sh\n(.*?)```\n", README, re.DOTALL))


def command(live: LiveServer, *arguments: str) -> list[str]:
    name, *rest = arguments
    return [sys.executable, "-m", "wan_grpc_client.cli", name, "--address", live.address, *rest]


def run(live: LiveServer, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(live, *arguments), env=environment(), capture_output=True, text=True, timeout=90, check=False
    )


@contextmanager
def denoising(live: LiveServer, output: Path) -> Iterator[subprocess.Popen[str]]:
    """`wan-grpc-client generate` whose generation is being denoised."""
    arguments = command(live, "generate", "--prompt", "a cat", *LONG_FLAGS, "--output", str(output))
    with subprocess.Popen(
        arguments, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stderr is not None
            while not (line := process.stderr.readline()).startswith("denoise"):
                assert line, "it ended before it was denoised"
            yield process
        finally:
            process.kill()


class Relay:
    """Passes bytes between clients and a server, as a proxy does, until it is told to cut every connection."""

    def __init__(self, address: str) -> None:
        self._host, self._port = address.split(":")
        self._transports: list[asyncio.WriteTransport] = []
        self._ended: list[asyncio.Event] = []

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._connect, "127.0.0.1", 0)
        self.address = "{}:{}".format(*self._server.sockets[0].getsockname())
        return self

    async def __aexit__(self, *error: object) -> None:
        self._server.close()
        self.cut()
        for ended in self._ended:
            await ended.wait()

    def cut(self) -> None:
        for transport in self._transports:
            transport.abort()
        self._transports.clear()

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._ended.append(ended := asyncio.Event())
        server_reader, server_writer = await asyncio.open_connection(self._host, int(self._port))
        self._transports += [writer.transport, server_writer.transport]
        await asyncio.gather(self._pass_on(reader, server_writer), self._pass_on(server_reader, writer))
        ended.set()

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError):
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
        writer.close()


def newest(live: LiveServer) -> pb.Generation:
    return live.get(live.names()[0])


# ---- the library ----------------------------------------------------------------------------------------------------


def test_a_generation_from_end_to_end(live: LiveServer, tmp_path: Path) -> None:
    """Steps come in order, the file is the video, and what was accepted is what was asked for."""
    path = tmp_path / "cat.rgb"
    with generate(live.address, "a cat", output=path, output_format="raw_rgb24", **SMALL) as generation:
        events = list(generation)
        video = generation.result()
    data = path.read_bytes()
    assert (len(data), hashlib.sha256(data).hexdigest()) == (5 * 48 * 64 * 3, video.sha256)
    assert (type(events[0]), type(events[-1])) == (Accepted, Completed)
    assert b"".join(event.data for event in events if isinstance(event, Chunk)) == data
    steps = [event.step for event in events if isinstance(event, Progress) and event.stage == "denoise"]
    assert steps == sorted(set(steps) & {0, 1, 2, 3, 4})
    assert steps
    assert [event for event in events if isinstance(event, VideoInfo)] == [video.info]
    assert (video.resolved.seed, video.resolved.width, video.info.num_frames) == (7, 64, 5)


async def test_async_generations_side_by_side(live: LiveServer, tmp_path: Path) -> None:
    """Two at once on one client wait for each other on the server only, and equal requests give equal bytes."""
    async with AsyncClient(live.address) as client:

        async def make(name: str) -> str:
            async with client.generate("a cat", output=tmp_path / name, **SMALL) as generation:
                return (await generation.result()).sha256

        first, second = await asyncio.gather(make("a.mp4"), make("b.mp4"))
    assert first == second == hashlib.sha256((tmp_path / "b.mp4").read_bytes()).hexdigest()


async def test_a_cut_connection_costs_nothing(live: LiveServer) -> None:
    """Cut during denoising and again among the bytes, a generation arrives as it does over a good connection."""
    options = Options(width=192, height=192, num_frames=17, num_inference_steps=12, seed=7, output_format="raw_rgb24")
    async with AsyncClient(live.address) as client, client.generate("a cat", **options) as generation:
        expected = await generation.result()
    cuts = {Progress, Chunk}
    async with (
        Relay(live.address) as relay,
        AsyncClient(relay.address) as client,
        client.generate("a cat", **options) as generation,
    ):
        events = []
        async for event in generation:
            events.append(event)
            if type(event) in cuts:
                cuts.remove(type(event))
                relay.cut()
        video = await generation.result()
    assert {event.attempt for event in events if isinstance(event, Reattaching)} >= {1}
    assert (video.sha256, video.data) == (expected.sha256, expected.data)
    assert b"".join(event.data for event in events if isinstance(event, Chunk)) == expected.data


async def test_a_cancelled_task_frees_the_server(live: LiveServer) -> None:
    """The generation is final, and as the caller's wish, by the time that the task has ended."""
    async with AsyncClient(live.address) as client:
        is_denoised = asyncio.Event()
        generation = client.generate("a cat", **LONG)

        async def make() -> None:
            async for event in generation:
                if isinstance(event, Progress) and event.stage == "denoise":
                    is_denoised.set()

        task = asyncio.create_task(make())
        await is_denoised.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        status = await client.get_generation(generation.name or "")
    assert (status.state, status.error.reason if status.error else "") == ("cancelled", "CANCELLED_BY_CALLER")


def test_leaving_early_frees_the_server(live: LiveServer) -> None:
    """A `with` block that is left during denoising ends the generation, and a watcher of it hears why."""
    with Client(live.address) as client:
        with client.generate("a cat", **LONG) as generation:
            for event in generation:
                if isinstance(event, Progress) and event.stage == "denoise":
                    break
        assert generation.name is not None
        with client.watch(generation.name) as watched, pytest.raises(GenerationCancelledError) as caught:
            watched.result()
    assert (caught.value.reason, caught.value.generation_state) == ("CANCELLED_BY_CALLER", "cancelled")


def test_detached_generations_are_watched_to_their_end(live: LiveServer) -> None:
    """A generation that was left on purpose goes on, and comes whole to whoever watches it next."""
    with Client(live.address) as client:
        with client.generate("a cat", **SMALL) as generation:
            next(generation)
            generation.detach()
        assert generation.name is not None
        with client.watch(generation.name) as watched:
            video = watched.result()
        assert client.download_video(generation.name).data == video.data


def test_the_same_request_id_attaches(live: LiveServer) -> None:
    """Sending a request again costs nothing; another body under the same id is refused."""
    with Client(live.address) as client:
        with client.generate("a cat", **SMALL) as first:
            video = first.result()
        with client.generate("a cat", **SMALL, request_id=first.request_id) as second:
            assert second.result() == video
        with (
            client.generate("a dog", **SMALL, request_id=first.request_id) as third,
            pytest.raises(RefusedError) as caught,
        ):
            third.result()
    assert caught.value.reason == "REQUEST_ID_REUSED"


@pytest.mark.parametrize(
    ("snippet", "server", "made"),
    [
        (SNIPPETS[0], "live", "star.mp4"),
        (SNIPPETS[1], "live", "star.mp4"),
        (SNIPPETS[2], "live_i2v", "right.mp4"),
        (SNIPPETS[3], "live", "star.png"),
    ],
)
def test_the_printed_programs_run(
    snippet: str, server: str, made: str, tmp_path: Path, star: Path, request: pytest.FixtureRequest
) -> None:
    """What clients/README.md shows works as it stands, here at another address and a size that is quickly made."""
    is_picture = made.endswith(".png")
    small = f"width=64, height=48, num_frames={1 if is_picture else 5}, num_inference_steps=4, output="
    address = request.getfixturevalue(server).address
    program = snippet.replace("127.0.0.1:3000", address).replace("output=", small)
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[-1].split()[0] == made
    assert {path.name for path in tmp_path.iterdir()} == {"star.png", made}


def test_every_printed_program_runs() -> None:
    """No program is added to clients/README.md without a run above."""
    assert len(SNIPPETS) == 4


@pytest.mark.parametrize(("name", "snippet"), [("generate", SNIPPETS[0]), ("animate", SNIPPETS[2])])
def test_the_examples_are_the_printed_ones(name: str, snippet: str) -> None:
    """The programs in examples are those of clients/README.md, which are run above."""
    example = (ROOT / "examples" / f"{name}.py").read_text(encoding="utf-8")
    assert example.endswith(f"\n\n{snippet}")


# ---- the command ----------------------------------------------------------------------------------------------------


def test_generate_writes_a_video_and_says_what_it_is(live: LiveServer, tmp_path: Path) -> None:
    """Size, frames, seed and checksum on stdout are those of the file; progress goes to stderr, as plain lines."""
    path = tmp_path / "cat.mp4"
    done = run(live, "generate", "--prompt", "a cat", *SMALL_FLAGS, "--fps=8", "--output", str(path))
    data = path.read_bytes()
    assert (done.returncode, done.stdout) == (
        0,
        f"{path}: 64x48, 5 frames at 8 fps, {len(data)} bytes, seed 7\nsha256 {hashlib.sha256(data).hexdigest()}\n",
    )
    assert [line.split()[0] for line in done.stderr.splitlines() if "denoise" in line][:1] == ["denoise"]


def test_a_preview_is_kept_beside_the_video(live: LiveServer, tmp_path: Path) -> None:
    """The last one of those that were asked for, where it was asked for; the video is that without previews."""
    path, picture = tmp_path / "cat.mp4", tmp_path / "now.webp"
    flags = ("generate", "--prompt", "a cat", *SMALL_FLAGS, "--output", str(path))
    plain = run(live, *flags)
    done = run(live, *flags, "--preview", str(picture), "--preview-every-steps", "2")
    assert (done.returncode, done.stdout) == (0, plain.stdout)
    with Image.open(picture) as opened:
        assert (opened.format, opened.size) == ("WEBP", (64, 48))
    assert sorted(tmp_path.iterdir()) == [path, picture]
    for wrong, sentence in (
        (("--preview-every-steps", "2"), "--preview-every-steps: needs --preview"),
        (("--preview", str(tmp_path / "no/such.webp")), "no is no directory"),
        (("--preview", str(tmp_path)), "is a directory"),
        (("--preview", "."), "is a directory"),
        (("--preview", str(picture), "--preview-every-steps=-1"), "--preview-every-steps: -1 is not between 0 and"),
    ):
        refused = run(live, *flags, *wrong)
        assert refused.returncode == 2 and sentence in refused.stderr, refused.stderr
    unwritable = run(live, *flags, "--preview", "/proc/now.webp", "--preview-every-steps", "2")
    assert unwritable.returncode == 0 and unwritable.stdout == plain.stdout
    assert "no preview of step 4: " in unwritable.stderr


def test_previews_of_every_step(live: LiveServer) -> None:
    """Each follows its step, and they differ from step to step."""
    previews: list[tuple[int, bytes]] = []
    step = 0
    with generate(live.address, "a cat", **SMALL, preview_every_steps=1) as generation:
        for event in generation:
            if isinstance(event, Progress) and event.stage == "denoise":
                step = event.step
            if isinstance(event, Preview):
                assert (event.step, event.media_type) == (step, "image/webp")
                previews.append((event.step, event.data))
        assert generation.result().resolved.preview_every_steps == 1
    assert previews and previews[-1][0] == 4
    assert len({data for _, data in previews}) == len(previews)


def test_the_small_commands(live: LiveServer, tmp_path: Path) -> None:
    """A generation is listed, looked at, downloaded, deleted, and then gone."""
    stream = live.make(pb.GenerationSpec(prompt="a cat", **SMALL))
    name, path = stream.events[0].generation, tmp_path / "cat.mp4"
    assert name in run(live, "list", "--state", "succeeded").stdout
    assert run(live, "get", name).stdout.splitlines()[0] == f"{name} succeeded"
    assert run(live, "download", name, "--output", str(path)).returncode == 0
    assert path.read_bytes() == stream.video
    assert run(live, "delete", name).stdout == f"{name} is removed\n"
    gone = run(live, "get", name)
    assert (gone.returncode, gone.stdout) == (1, "")
    assert gone.stderr.startswith("wan-grpc-client get: no generation is named")


def test_models_says_that_the_server_is_ready(live: LiveServer) -> None:
    """The facts of the running server are printed, and fit a terminal."""
    done = run(live, "models")
    lines = done.stdout.splitlines()
    assert (done.returncode, "server               wan-grpc 0.1.0, ready" in lines, max(map(len, lines))) == (
        0,
        True,
        100,
    )


def test_wrong_values_are_all_told(live: LiveServer, tmp_path: Path) -> None:
    """Each violation is a line with its flag and bound; nothing is written."""
    arguments = ("--prompt", "a cat", "--width=65", "--num-frames=6", "--output", str(tmp_path / "x.mp4"))
    done = run(live, "generate", *arguments)
    assert (done.returncode, done.stderr.splitlines()[1:]) == (
        2,
        [
            "wan-grpc-client generate: the request was refused (INVALID_REQUEST)",
            "  --width: 65 is not a positive multiple of 16",
            "  --num-frames: 6 is not 1 more than a multiple of 4",
        ],
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_interrupting_cancels_the_generation(live: LiveServer, tmp_path: Path, number: int, code: int) -> None:
    """Ctrl-C, SIGTERM, a closed terminal: the server is free at once, and no file is left."""
    with denoising(live, tmp_path / "cat.mp4") as process:
        process.send_signal(number)
        assert process.wait(20) == code
    generation = newest(live)
    assert (generation.state, generation.error.reason) == (pb.GENERATION_STATE_CANCELLED, "CANCELLED_BY_CALLER")
    assert list(tmp_path.iterdir()) == []


def test_a_killed_client_is_only_noticed(live: LiveServer, tmp_path: Path) -> None:
    """A client that dies says nothing, so its generation goes on for its grace, here none, and is then abandoned."""
    arguments = command(live, "generate", "--prompt", "a cat", *LONG_FLAGS, "--detach-grace-s=0", "--output=-")
    with subprocess.Popen(
        arguments, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, cwd=tmp_path
    ) as process:
        assert process.stderr is not None
        assert any(line.startswith("denoise") for line in process.stderr)
        process.kill()
    name = live.names()[0]
    ended = eventually(lambda: live.get(name) if live.get(name).HasField("end_time") else None)
    assert (ended.state, ended.error.reason) == (pb.GENERATION_STATE_CANCELLED, "ABANDONED")


# ---- what clients/README.md prints ----------------------------------------------------------------------------------


def run_printed(live: LiveServer, name: str, directory: Path) -> str:
    """The output of a block of commands, run as it is printed but at another address."""
    script = COMMANDS[name].replace("wan-grpc-client ", f"{shlex.quote(sys.executable)} -m wan_grpc_client.cli ")
    address = f"\\1 --address {live.address}"
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", re.sub(r"(-m wan_grpc_client\.cli \w+)", address, script)],
        cwd=directory,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def shape(path: Path) -> tuple[int, ...]:
    """Frames, height and width, as an independent decoder sees them."""
    with av.open(str(path)) as file:
        frames = [frame.to_ndarray(format="rgb24").shape[:2] for frame in file.decode(video=0)]
    assert len(set(frames)) == 1
    return (len(frames), *frames[0])


def test_the_first_commands(live: LiveServer, tmp_path: Path) -> None:
    """The table of the model, a video, and its line in the list."""
    shown = run_printed(live, "first", tmp_path)
    assert shown.startswith("model ")
    assert (f"{live.names()[0]} " in shown, shape(tmp_path / "star.mp4")) == (True, (9, 96, 128))


def test_the_commands_for_formats(live: LiveServer, tmp_path: Path) -> None:
    """A picture, a lossless video, and three files with their seeds."""
    run_printed(live, "formats", tmp_path)
    videos = {path.name: shape(path) for path in tmp_path.iterdir()}
    length = (9, 96, 128)
    assert videos == {
        "star.png": (1, 96, 128),
        "star.mkv": length,
        "star-7.mp4": length,
        "star-8.mp4": length,
        "star-9.mp4": length,
    }


def test_the_commands_for_previews(live: LiveServer, tmp_path: Path) -> None:
    """A video and the last picture of what was being made."""
    run_printed(live, "preview", tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"now.webp", "star.mp4"}
    assert shape(tmp_path / "now.webp") == (1, 96, 128)


def test_the_commands_for_images(live_i2v: LiveServer, tmp_path: Path, star: Path) -> None:
    """Without a fit the video has the aspect of the picture; with one it has the size that was named."""
    run_printed(live_i2v, "image", tmp_path)
    assert (shape(tmp_path / "right.mp4"), shape(tmp_path / "loop.mp4")) == ((9, 64, 144), (9, 128, 96))


def test_the_commands_for_many(live: LiveServer, tmp_path: Path) -> None:
    """Each line has its file, and its line on stdout."""
    shown = run_printed(live, "batch", tmp_path).splitlines()
    videos = {path.name: shape(path) for path in (tmp_path / "videos").iterdir()}
    assert videos == {
        "A-red-star-moves-right-on-a-blue-background-7.mp4": (5, 96, 128),
        "A-small-white-circle-bounces-on-green-8.mp4": (5, 96, 128),
        "A-small-white-circle-bounces-on-green-9.mp4": (5, 96, 128),
        "triangle.webm": (5, 128, 96),
    }
    assert [line.partition(":")[0] for line in shown] == [f"videos/{name}" for name in videos_in_order(videos)]


def videos_in_order(videos: dict[str, tuple[int, ...]]) -> list[str]:
    """As their lines stand in the file."""
    return sorted(videos, key=lambda name: ("triangle" in name, name.startswith("A-small"), name))


def test_every_printed_command_is_run() -> None:
    """No block of commands is added to the page without a test here."""
    tested = set(re.findall(r'run_printed\(\w+, "(\w+)"', Path(__file__).read_text(encoding="utf-8")))
    assert tested == set(COMMANDS)
    assert README.count("\nwan-grpc-client ") == sum(
        f"\n{text}".count("\nwan-grpc-client ") for text in COMMANDS.values()
    )
