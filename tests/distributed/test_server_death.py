"""A server that is killed with -9: nothing of it may live on."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from tests.distributed.live import HEARD_S, is_gone

SERVER = """
import asyncio, json, os, sys, tempfile
from pathlib import Path
from tests.distributed.live import LONG, PAIR, live_ranks
from wan_grpc.domain.events import Stage
from wan_grpc.engine.group import prepare_forkserver

def say(**words):
    print(json.dumps(words), flush=True)

async def main(checkpoint, moment):
    prepare_forkserver()
    async with live_ranks(Path(checkpoint), topology=PAIR, wait=moment != "starting") as live:
        if moment == "starting":
            while len(live.pids) < 2:
                await asyncio.sleep(0.001)
        elif moment == "done":
            video = await live.make()
            say(video=len(video))
        elif moment != "idle":
            await live.reach(Stage(moment), 1, num_inference_steps=1 if moment == "decode" else 100)
        say(ranks=live.pids, torch="torch" in sys.modules, spool=str(live.spool.directory))
        if moment != "done":
            await asyncio.Event().wait()
    say(left=True)

if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
"""


@contextmanager
def server(
    tiny: Path, tmp_path: Path, moment: str
) -> Iterator[tuple[subprocess.Popen[str], Callable[[], dict[str, object]]]]:
    """A server process of its own that has come to this moment, and what it says next."""
    script = tmp_path / "server.py"
    script.write_text(SERVER, encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(Path.cwd()), "TMPDIR": str(tmp_path)}
    process = subprocess.Popen(
        [sys.executable, str(script), str(tiny), moment], stdout=subprocess.PIPE, text=True, env=environment
    )

    def listen() -> dict[str, object]:
        assert process.stdout is not None
        return json.loads(process.stdout.readline())

    try:
        yield process, listen
    finally:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


@pytest.mark.parametrize("moment", ["idle", "denoise", "starting"])
def test_nothing_outlives_a_killed_server(tiny: Path, tmp_path: Path, moment: str) -> None:
    """Ranks, of which the second sits in a collective, forkserver and tracker are gone in 5 s; no memory is left."""
    memory = set(Path("/dev/shm").iterdir())
    with server(tiny, tmp_path, moment) as (process, listen):
        said = listen()
        family = psutil.Process(process.pid).children(recursive=True)
        assert set(said["ranks"]) < {child.pid for child in family}  # type: ignore[call-overload]
        assert len(family) >= 4, "two ranks, a forkserver, a resource tracker"
        began = time.monotonic()
        os.kill(process.pid, signal.SIGKILL)
        while not all(is_gone(child.pid) for child in family):
            assert time.monotonic() - began < HEARD_S, [child for child in family if not is_gone(child.pid)]
            time.sleep(0.02)
    assert set(Path("/dev/shm").iterdir()) <= memory


def test_a_server_that_leaves_takes_all_with_it(tiny: Path, tmp_path: Path) -> None:
    """It made a video without ever importing torch; when it has left in peace no process and no file is left."""
    with server(tiny, tmp_path, "done") as (process, listen):
        assert listen() == {"video": 5 * 32 * 32 * 3}
        family = psutil.Process(process.pid).children(recursive=True)
        said = listen()
        assert said["torch"] is False
        assert listen() == {"left": True}
        assert process.wait(30) == 0
        began = time.monotonic()
        while not all(is_gone(child.pid) for child in family):
            assert time.monotonic() - began < HEARD_S, [child for child in family if not is_gone(child.pid)]
            time.sleep(0.02)
    left = {path.name for path in tmp_path.iterdir() if not path.name.startswith("torchinductor")}  # torch's own cache
    assert left == {"server.py"}
