"""The device that this process computes on: its name, its memory, and when it has finished.

Knows CUDA (and ROCm, which torch calls cuda) and CPU. Does not know what is computed.
"""

import contextlib
import os
import time
from pathlib import Path
from typing import Final

import psutil
import torch

from wan_grpc.domain.errors import UnusableModelError

_REPEATABLE: Final = {"MKL_CBWR": "AVX2,STRICT", "ATEN_CPU_CAPABILITY": "avx2"}
"""Read by MKL and torch when they compute for the first time."""
_REPEATABLE_THREADS: Final = (1, 2, 4)


def resolve_device(device: str, *, local_rank: int = 0, demand: str = "") -> str:
    """The torch device that `auto`, `cuda`, `cuda:1` or `cpu` means here; `auto` is the GPU if there is one.

    demand: what to say of the GPUs that are needed when there are fewer.

    Raises:
        UnusableModelError: a GPU is asked for that this machine does not have.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        device = f"cuda:{local_rank}"
    kind, _, index = device.partition(":")
    if kind not in ("cpu", "cuda") or (index and not index.isdecimal()):
        raise UnusableModelError(f"device {device} is not one of auto, cuda, cuda:N, cpu")
    if kind == "cuda" and int(index) >= torch.cuda.device_count():
        seen = f"torch sees {torch.cuda.device_count()} here"
        raise UnusableModelError(f"there is no device {device}: {f'{demand}, ' if demand else ''}{seen}")
    return device


def make_repeatable(device: str, *, num_threads: int) -> int:
    """Let results on a CPU be the same bytes whether 1, 2 or 4 threads compute them; the number that will.

    To be called before the first computation of the process. Matrix products must not choose a kernel by the number of
    threads, and elementwise kernels treat the end of each thread's share in another way unless it fills whole vectors,
    which other numbers of threads do not grant. `num_threads` is therefore rounded down to 1, 2 or 4.
    """
    if device != "cpu":
        torch.set_num_threads(num_threads)
        return num_threads
    if "avx2" in _cpu_flags():
        os.environ.update(_REPEATABLE)
    num_threads = max(count for count in _REPEATABLE_THREADS if count <= max(num_threads, 1))
    torch.set_num_threads(num_threads)
    return num_threads


def _cpu_flags() -> set[str]:
    with contextlib.suppress(OSError):
        return set(Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").split())
    return set()


def describe_device(device: torch.device) -> str:
    """What an operator calls it, e.g. `NVIDIA H200 (cuda:0)`."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)} ({device})"
    return f"cpu ({torch.get_num_threads()} threads)"


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def is_out_of_memory(error: Exception) -> bool:
    """Whether a computation failed for want of memory. torch has an exception of its own for it on GPUs alone.

    On CPUs oneDNN says no more than that it could not create a primitive, when there is no memory for a kernel's code;
    shapes that it does not know it refuses by another sentence.
    """
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return "DefaultCPUAllocator: can't" in str(error) or str(error) == "could not create a primitive"


def used_bytes(device: torch.device) -> int:
    """Memory held now: by tensors on a GPU, resident set size on CPU."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return psutil.Process().memory_info().rss


def peak_bytes(device: torch.device) -> int:
    """Most memory held since `reset_peak`."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return used_bytes(device)


def reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with contextlib.suppress(OSError):  # not Linux, or a sandbox that forbids it: the peak is then that of the process
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


class Stopwatch:
    """Times one piece of work as the device does it, and waits for its end."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._begin: float | torch.cuda.Event = self._mark()

    def finish(self) -> float:
        """Wait until the device has finished all work enqueued so far; seconds since this was made."""
        end = self._mark()
        if isinstance(self._begin, float):
            assert isinstance(end, float)
            return end - self._begin
        assert isinstance(end, torch.cuda.Event)
        end.synchronize()
        return float(self._begin.elapsed_time(end)) / 1000.0

    def _mark(self) -> "float | torch.cuda.Event":
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._device))
        return event
