"""Rank processes that run functions of tests: a group is started once and serves every test of its topology."""

import multiprocessing
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from wan_grpc.domain.topology import Topology
from wan_grpc.parallel.mesh import Mesh, join

_context = multiprocessing.get_context("forkserver")
_ANSWER_S = 120.0


class Crew:
    """A group of ranks that waits for functions to run."""

    def __init__(self, topology: Topology, pipes: list[Connection]) -> None:
        self.topology = topology
        self._pipes = pipes

    def run(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """What `function(mesh, *arguments)` returns on each rank, by rank; it must be importable.

        Raises:
            AssertionError: with the traceback of every rank on which it raised.
        """
        for pipe in self._pipes:
            pipe.send((function, arguments))
        answers = []
        for rank, pipe in enumerate(self._pipes):
            assert pipe.poll(_ANSWER_S), f"rank {rank} does not answer"
            answers.append(pipe.recv())
        wrong = [f"rank {rank}: {story}" for rank, (_, story) in enumerate(answers) if story]
        assert not wrong, "\n".join(wrong)
        return [result for result, _ in answers]


@contextmanager
def crew(topology: Topology, *, device: str = "cpu") -> Iterator[Crew]:
    """Ranks that have joined, on the CPU or each on a GPU of its own (`cuda`). They end with the block."""
    with tempfile.TemporaryDirectory() as directory:
        pipes, processes = [], []
        for rank in range(topology.world_size):
            ours, theirs = _context.Pipe()
            process = _context.Process(
                target=_work, args=(topology, rank, device, str(Path(directory) / "store"), theirs), daemon=True
            )
            process.start()
            theirs.close()
            pipes.append(ours)
            processes.append(process)
        try:
            yield Crew(topology, pipes)
        finally:
            for pipe in pipes:
                pipe.close()
            for process in processes:
                process.join(10.0)
                process.kill()
                process.join()


def _work(topology: Topology, rank: int, device: str, store_path: str, pipe: Connection) -> None:
    torch.set_num_threads(1)
    where = torch.device(device, rank if device == "cuda" else None)
    mesh: Mesh = join(topology, rank, device=where, store_path=store_path)
    while True:
        try:
            function, arguments = pipe.recv()
        except EOFError:
            return
        try:
            answer = (function(mesh, *arguments), "")
        except Exception:
            answer = (None, traceback.format_exc())
        pipe.send(answer)
