"""One step, one decode and one text on many ranks against one rank, in one run on one machine: time, error, exchanges.

GPUs of one kind differ by a percent. So each makes the whole by itself, all at the same time, and what many make
together is compared with the mean of that.

    python benchmarks/scaling.py --num-gpus 2 --width 1280 --height 720 --out results.json

Random weights of one A14B expert, the VAE and the text encoder (no files needed); the same random inputs everywhere.
Every rank is a process of its own. `--device cpu --model-path DIR` does the same with gloo and a checkpoint's shapes.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from multiprocessing import connection, get_context
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from wan_grpc.domain.events import Progress, Stage
from wan_grpc.domain.topology import Topology
from wan_grpc.domain.variants import Expert
from wan_grpc.engine.worker import divide
from wan_grpc.optimize.attention import choose
from wan_grpc.parallel.mesh import Mesh, join
from wan_grpc.pipeline import decode, device
from wan_grpc.pipeline.checkpoint import Checkpoint, locate
from wan_grpc.pipeline.denoise import Prompts, predict
from wan_grpc.pipeline.experts import Choice
from wan_grpc.pipeline.image import TEXT_ALONE
from wan_grpc.pipeline.load import DTYPES, load
from wan_grpc.pipeline.published import T2V_A14B_CONFIGS
from wan_grpc.pipeline.video import VideoPipeline

KINDS = {
    "exchange": ("nccl",),
    "attention": ("fmha", "flash", "cudnn_generated", "sdpa", "attention"),
    "linear": ("gemm", "nvjet", "cutlass", "splitk"),
    "copy": ("memcpy", "copy", "memset", "catarray"),
    "elementwise": ("elementwise", "reduce", "norm", "index"),
}
"""What kernels are for, by words in their names, looked for in this order."""
STEP, UNGUIDED, DECODE, TEXT = "step", "unguided", "decode", "text"


@dataclass(kw_only=True)
class Case:
    """One way to divide the work, and what it came to on one rank."""

    name: str
    topology: Topology
    works: tuple[str, ...] = (STEP,)
    seconds: dict[str, list[float]] = field(default_factory=dict)
    error: dict[str, float] = field(default_factory=dict)
    exchanges: dict[str, float] = field(default_factory=dict)
    """Seconds in which the device of the rank waited for an exchange of this kind, and GB that the rank sent."""
    peak_gib: float = 0.0
    kernels: dict[str, float] = field(default_factory=dict)
    """Seconds of the kernels of one step by what they are for, those of exchanges beside the others; and "idle"."""


def main() -> None:
    options = read_options()
    with tempfile.TemporaryDirectory() as directory:
        context = get_context("spawn")
        barrier = context.Barrier(options.num_gpus)
        processes = [
            context.Process(target=run_rank, args=(rank, options, directory, barrier), daemon=True)
            for rank in range(options.num_gpus)
        ]
        for process in processes:
            process.start()
        wait_for(processes)


def wait_for(processes: Sequence[BaseProcess]) -> None:
    """Until all have ended. When one fails, the others wait for it in vain, and are ended."""
    alive = {process.sentinel: process for process in processes}
    while alive:
        for sentinel in connection.wait(list(alive)):
            process = alive.pop(sentinel)
            process.join()
            if process.exitcode:
                for other in alive.values():
                    other.kill()
                raise SystemExit(f"a rank ended with exit code {process.exitcode}")


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num-gpus", type=int, default=2)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--model-path", help="a checkpoint's directory; unset: the shapes of one T2V-A14B expert")
    parser.add_argument("--width", type=int, default=1280)
    parser.add_argument("--height", type=int, default=720)
    parser.add_argument("--num-frames", type=int, default=81)
    parser.add_argument(
        "--repeats", type=int, default=2, help="after a warm-up, which for steps goes through two blocks"
    )
    parser.add_argument("--only", nargs="*", help="names of cases, e.g. 'cfg 2'")
    parser.add_argument("--works", nargs="*", default=[STEP, DECODE, TEXT], choices=[STEP, UNGUIDED, DECODE, TEXT])
    parser.add_argument("--dtype", choices=sorted(DTYPES))
    parser.add_argument(
        "--profile", action="store_true", help="one more step, whose kernels and pauses are added up by kind"
    )
    parser.add_argument("--out", help="JSON file for the full result")
    return parser.parse_args()


def cases(options: argparse.Namespace, num_heads: int) -> Iterator[Case]:
    number = options.num_gpus
    works = tuple(options.works)
    yield Case(name="one", topology=Topology(num_heads=num_heads), works=works)
    if number % 2 == 0:
        rest = number // 2
        topology = Topology(cfg=2, ulysses=rest, num_heads=num_heads)
        name = "cfg 2" if rest == 1 else f"cfg 2 x ulysses {rest}"
        yield Case(name=name, topology=topology, works=works)
    sequence = tuple(w for w in works if w in (STEP, UNGUIDED))
    yield Case(name=f"ulysses {number}", topology=Topology(ulysses=number, num_heads=num_heads), works=sequence)
    yield Case(name=f"ring {number}", topology=Topology(ring=number, num_heads=num_heads), works=sequence)
    if number == 4:
        yield Case(name="ring 2 x ulysses 2", topology=Topology(ring=2, ulysses=2, num_heads=num_heads), works=sequence)
    if TEXT in works:
        topology = Topology(ring=number, text_tensor=number, num_heads=num_heads)
        yield Case(name=f"text tensor {number}", topology=topology, works=(TEXT,))  # last: it cuts the encoder


def run_rank(rank: int, options: argparse.Namespace, directory: str, barrier: Any) -> None:
    where = torch.device(device.resolve_device(options.device, local_rank=rank))
    device.make_repeatable(str(where), num_threads=1)
    dtype = options.dtype or ("float32" if where.type == "cpu" else "bfloat16")
    checkpoint = find_checkpoint(options.model_path, Path(directory) / f"model{rank}")
    pipeline = load(checkpoint, device=str(where), dtype=dtype, load_format="dummy")
    wanted: dict[str, torch.Tensor] = {}
    done = []
    for case in cases(options, pipeline.transformers[Expert.HIGH_NOISE].config["num_attention_heads"]):
        if options.only and case.name not in ("one", *options.only):
            continue
        is_alone = case.name == "one"
        if (is_alone or rank < case.topology.world_size) and case.works:
            store = f"{directory}/{case.name}" + (f" {rank}" if is_alone else "")
            mesh = join(case.topology, 0 if is_alone else rank, device=where, store_path=store)
            attention = choose("auto", device=where, dtype=DTYPES[dtype])
            divide(pipeline, mesh, attention)
            measure(case, pipeline, mesh, options, wanted, barrier=barrier if is_alone else None)
            mesh.drop()
            mesh.leave()
            done.append(case)
            if rank == 0 or is_alone:
                print(f"{case.name}, rank {rank}: {case.seconds} error {case.error}", flush=True)
            if is_alone:
                Path(directory, f"alone{rank}.json").write_text(json.dumps(case.seconds), encoding="utf-8")
        barrier.wait()
    if rank == 0:
        alone = [json.loads(Path(directory, f"alone{rank}.json").read_text()) for rank in range(options.num_gpus)]
        report(done, alone, pipeline, options)


def find_checkpoint(model_path: str | None, directory: Path) -> Checkpoint:
    """The checkpoint at `model_path`, or the shapes of T2V-A14B with one expert, which leave room on an 80 GB card."""
    if model_path is not None:
        return locate(model_path, load_format="dummy")
    for name, config in T2V_A14B_CONFIGS.items():
        if name.startswith("transformer_2"):
            continue
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = {key: value for key, value in config.items() if key not in ("transformer_2", "boundary_ratio")}
        path.write_text(json.dumps(kept), encoding="utf-8")
    return locate(str(directory), load_format="dummy")


# ---- what is measured -----------------------------------------------------------------------------------------------


def measure(
    case: Case,
    pipeline: VideoPipeline,
    mesh: Mesh,
    options: argparse.Namespace,
    wanted: dict[str, torch.Tensor],
    *,
    barrier: Any | None,
) -> None:
    """barrier: where all meet who do the same beside each other."""
    inputs = make_inputs(pipeline, options)
    works = {
        STEP: lambda: step(pipeline, inputs, is_guided=True),
        UNGUIDED: lambda: step(pipeline, inputs, is_guided=False),
        DECODE: lambda: pictures(pipeline, inputs),
        TEXT: lambda: texts(pipeline),
    }
    device.reset_peak(pipeline.device)
    traffic: Counter[str] = Counter()
    for name in case.works:
        warm_up(name, works[name], pipeline)
        mesh.meter.reset()
        case.seconds[name] = []
        for _ in range(options.repeats):
            device.synchronize(pipeline.device)
            mesh.agree(0)  # all begin together
            if barrier is not None:
                barrier.wait()
            began = time.perf_counter()
            result = works[name]()
            device.synchronize(pipeline.device)
            case.seconds[name].append(round(time.perf_counter() - began, 4))
        for entry in mesh.meter.take():
            traffic[f"{name}: {entry.kind} s"] += round(entry.seconds / options.repeats, 4)
            traffic[f"{name}: {entry.kind} GB"] += round(entry.sent_bytes / options.repeats / 1e9, 3)
        if mesh.is_first:
            wanted.setdefault(name, result.cpu())
            case.error[name] = error(result.cpu(), wanted[name])
    if options.profile and STEP in case.works and pipeline.device.type == "cuda":
        case.kernels = kernels_of(works[STEP], pipeline.device)
    case.exchanges = dict(traffic)
    case.peak_gib = round(device.peak_bytes(pipeline.device) / 2**30, 2)


def warm_up(name: str, work: Callable[[], object], pipeline: VideoPipeline) -> None:
    """Once in full, but of a transformer two blocks are enough, as all are alike."""
    expert = pipeline.transformers[Expert.HIGH_NOISE]
    blocks = expert.blocks
    if name in (STEP, UNGUIDED):
        expert.blocks = blocks[:2]
    try:
        work()
    finally:
        expert.blocks = blocks


def kernels_of(work: Callable[[], object], where: torch.device) -> dict[str, float]:
    """Seconds of kernels by kind, and of no kernel at all ("idle")."""
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        work()
        device.synchronize(where)
    seconds: Counter[str] = Counter()
    busy_until = None
    events = [event for event in profiled.events() if event.device_type == DeviceType.CUDA]
    for event in sorted(events, key=lambda event: event.time_range.start):
        if event.name.startswith("nccl:"):  # a note of torch beside the kernel
            continue
        begin, end = event.time_range.start, event.time_range.end
        seconds[kind_of(event.name.lower())] += (end - begin) / 1e6
        if busy_until is not None:
            seconds["idle"] += max(begin - busy_until, 0) / 1e6
        busy_until = end if busy_until is None else max(end, busy_until)
    return {kind: round(seconds[kind], 3) for kind in sorted(seconds)}


def kind_of(kernel: str) -> str:
    for kind, words in KINDS.items():
        if any(word in kernel for word in words):
            return kind
    return "other"


def error(result: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative L2 distance, or for pictures the largest difference of a sample."""
    if result.dtype == torch.uint8:
        return float((result.int() - expected.int()).abs().max())
    return float((result.double() - expected.double()).norm() / expected.double().norm())


def noise(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def latent_shape(pipeline: VideoPipeline, options: argparse.Namespace) -> tuple[int, ...]:
    config = pipeline.vae.config
    factor = config["scale_factor_spatial"]
    frames = (options.num_frames - 1) // config["scale_factor_temporal"] + 1
    return (1, config["z_dim"], frames, options.height // factor, options.width // factor)


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """The same noise on every rank, made before the clock runs."""

    latents: torch.Tensor
    prompts: Prompts


def make_inputs(pipeline: VideoPipeline, options: argparse.Namespace) -> Inputs:
    expert = pipeline.transformers[Expert.HIGH_NOISE]
    texts = [noise((1, 512, expert.config["text_dim"]), seed).to(pipeline.device, expert.dtype) for seed in (1, 2)]
    return Inputs(
        latents=noise(latent_shape(pipeline, options), 0).to(pipeline.device),
        prompts=Prompts(positive=texts[0], negative=texts[1]),
    )


@torch.no_grad()
def step(pipeline: VideoPipeline, inputs: Inputs, *, is_guided: bool) -> torch.Tensor:
    return predict(
        pipeline.transformers[Expert.HIGH_NOISE],
        inputs.latents,
        torch.tensor(900, device=pipeline.device),
        prompts=inputs.prompts,
        condition=TEXT_ALONE,
        choice=Choice(expert=Expert.HIGH_NOISE, guidance_scale=4.0, is_guided=is_guided),
        run_passes=pipeline.run_passes,
    )


def pictures(pipeline: VideoPipeline, inputs: Inputs) -> torch.Tensor:
    frames = decode.frames(pipeline.vae, inputs.latents, strips=pipeline.strips, on_step=ignore)
    return torch.cat(list(frames))


def texts(pipeline: VideoPipeline) -> torch.Tensor:
    pipeline.text_encoder.forget()
    prompts = ["A curious raccoon looks out of a hollow tree. " * 20, "blurry " * 50]
    return torch.cat([part.float() for part in pipeline.text_encoder.encode_all(prompts)])


def ignore(progress: Progress) -> None:
    assert progress.stage is Stage.DECODE


# ---- what is said ---------------------------------------------------------------------------------------------------


def report(
    done: list[Case], alone: list[dict[str, list[float]]], pipeline: VideoPipeline, options: argparse.Namespace
) -> None:
    """alone: seconds of each work on each GPU by itself."""
    medians = {work: [statistics.median(seconds[work]) for seconds in alone] for work in alone[0]}
    one = {work: statistics.mean(seconds) for work, seconds in medians.items()}
    name = device.describe_device(pipeline.device)
    shape = f"{options.width}x{options.height}x{options.num_frames}"
    print(f"\n{options.num_gpus} x {name}, torch {torch.__version__}, {pipeline.dtype_name}, {shape}")
    for work, seconds in medians.items():
        print(f"each GPU alone, median s of a {work}: {seconds}, mean {one[work]:.3f}")
    print(f"{'case':24} {'work':9} {'median s':>9} {'speed-up':>9} {'error':>9}  {'peak GiB':>8}  exchanges on rank 0")
    for case in done:
        for work, seconds in case.seconds.items():
            ratio = one[work] / statistics.median(seconds)
            waits = [
                f"{key.partition(': ')[2]} {value:g}" for key, value in case.exchanges.items() if key.startswith(work)
            ]
            figures = f"{statistics.median(seconds):9.3f} {ratio:9.3f} {case.error[work]:9.2e}  {case.peak_gib:8.1f}"
            print(f"{case.name:24} {work:9} {figures}  {', '.join(waits)}")
    for case in done:
        if case.kernels:
            print(f"{case.name:24} kernels of a step, s: {case.kernels}")
    if options.out:
        result = {
            "device": name,
            "torch": torch.__version__,
            "video": shape,
            "alone": alone,
            "cases": [asdict(case) for case in done],
        }
        Path(options.out).write_text(json.dumps(result, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
