"""Faults that a test asks for by the prompt of a request: preloaded into the forkserver, so that every rank has them.

A prompt such as `FAULT denoise 1 error 3` makes rank 1 raise before its third self-attention. `sent` is the moment at
which keys and values are on their way and nobody waits for them yet.
"""

import faulthandler
import os
import signal
from collections.abc import Callable
from typing import Any

import torch

from wan_grpc.engine import worker
from wan_grpc.parallel.group import Group
from wan_grpc.parallel.ulysses import Ulysses
from wan_grpc.pipeline import decode
from wan_grpc.pipeline.text import TextEncoder
from wan_grpc.pipeline.transformer import SelfAttention

_planned: list[tuple[str, str, int]] = []
"""Stage, what happens, and at which time through the stage: one fault at most."""


def prompt(stage: str, rank: int, what: str, count: int = 1) -> str:
    return f"FAULT {stage} {rank} {what} {count}"


def _strike(stage: str) -> None:
    if not _planned or _planned[0][0] != stage:
        return
    _, what, count = _planned.pop()
    if count > 1:
        _planned.append((stage, what, count - 1))
        return
    if torch.cuda.is_initialized():
        torch.cuda._sleep(2_000_000_000)  # hosts run ahead of devices: what this one has enqueued is not done yet
    if what == "error":
        raise RuntimeError("an injected error")
    if what == "memory":
        raise torch.OutOfMemoryError("injected: out of memory")
    os.kill(os.getpid(), {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}[what])


def _before(stage: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def wrapped(*arguments: Any, **named: Any) -> Any:
        _strike(stage)
        return function(*arguments, **named)

    return wrapped


def _after(stage: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def wrapped(*arguments: Any, **named: Any) -> Any:
        result = function(*arguments, **named)
        _strike(stage)
        return result

    return wrapped


_run = worker.RankRun.to_end


def _to_end(self: worker.RankRun) -> Any:
    _planned.clear()
    if "WAN_GRPC_TEST_STACKS" in os.environ:
        faulthandler.dump_traceback_later(4.0)  # of ranks that do not answer
    words = self._order.video.prompt.split()
    if words[0] == "FAULT" and int(words[2]) == self._mesh.rank:
        _planned.append((words[1], words[3], int(words[4])))
    try:
        return _run(self)
    finally:
        faulthandler.cancel_dump_traceback_later()


worker.RankRun.to_end = _to_end  # type: ignore[method-assign]
TextEncoder._compute = _before("text", TextEncoder._compute)  # type: ignore[method-assign]
SelfAttention.__call__ = _before("denoise", SelfAttention.__call__)  # type: ignore[method-assign]
Ulysses._to_heads = _after("sent", Ulysses._to_heads)  # type: ignore[method-assign]
Group.rotate = _after("sent", Group.rotate)  # type: ignore[method-assign]
decode._decode_slice = _before("decode", decode._decode_slice)
