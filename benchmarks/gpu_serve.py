"""One video of a real model's shapes through a real server on a GPU: memory, step time, decode, time to first chunk.

    python benchmarks/gpu_serve.py --out results.json

Starts `wan-grpc serve` with random weights of published shapes (no files needed; T2V-A14B unless --model-path names
another), calls Generate over loopback with the generated stubs, and prints a table. Run it on an otherwise idle GPU.
"""

import argparse
import io
import json
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
from PIL import Image

from wan_grpc.v1 import generation_pb2 as pb
from wan_grpc.v1.video_generation_service_pb2 import GenerateRequest, GetModelRequest
from wan_grpc.v1.video_generation_service_pb2_grpc import VideoGenerationServiceStub

START_TIMEOUT_S = 600.0


def main() -> None:
    options = read_options()
    began = time.monotonic()
    with server(options.model_path, options.serve) as (process, address), grpc.insecure_channel(address) as channel:
        stub = VideoGenerationServiceStub(channel)
        deployment = wait_ready(stub, process)
        load_s = time.monotonic() - began
        runs = [generate(stub, options) for _ in range(options.runs)]
    result = {
        "device": deployment.device,
        "dtype": deployment.dtype,
        "attention": deployment.attention_backend,
        "model": options.model_path,
        "video": f"{options.width}x{options.height}x{options.num_frames}" + (" with an image" if options.image else ""),
        "num_inference_steps": options.num_inference_steps,
        "load_s": round(load_s, 2),
        "runs": runs,
    }
    print_table(result)
    if options.out:
        with Path(options.out).open("w", encoding="utf-8") as file:
            json.dump(result, file, indent=1)


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model-path", default="Wan-AI/Wan2.2-T2V-A14B-Diffusers")
    parser.add_argument("--width", type=int, default=832)
    parser.add_argument("--height", type=int, default=480)
    parser.add_argument("--num-frames", type=int, default=81)
    parser.add_argument("--num-inference-steps", type=int, default=2)
    parser.add_argument("--image", action="store_true", help="give a first image of twice the video's size")
    parser.add_argument("--boundary-ratio", type=float, help="0.95 lets both experts run when there are two steps")
    parser.add_argument("--runs", type=int, default=2, help="the first one warms up")
    parser.add_argument("--out", help="JSON file for the full result")
    parser.add_argument("--serve", type=shlex.split, default="--load-format dummy", help="flags of the server")
    return parser.parse_args()


@contextmanager
def server(model_path: str, flags: list[str]) -> Iterator[tuple["subprocess.Popen[str]", str]]:
    """A server of its own on a free port, and its address. Ended by its pid."""
    command = [sys.executable, "-m", "wan_grpc.cli", "serve", "--model-path", model_path]
    command += ["--host", "127.0.0.1", "--port", "0", "--metrics-port", "0", *flags]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("listening on "), line
        yield process, line.removeprefix("listening on ").strip()
    finally:
        process.terminate()
        process.wait(60)


def wait_ready(stub: VideoGenerationServiceStub, process: "subprocess.Popen[str]") -> Any:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline and process.poll() is None:
        deployment = stub.GetModel(GetModelRequest(), timeout=10.0).deployment
        if deployment.ready:
            return deployment
        time.sleep(0.5)
    raise SystemExit(f"not ready within {START_TIMEOUT_S:g} s, or ended: {process.poll()}")


def generate(stub: VideoGenerationServiceStub, options: argparse.Namespace) -> dict[str, Any]:
    """One video; when what arrived, in seconds since the call."""
    spec = pb.GenerationSpec(
        prompt="a curious raccoon looks out of a hollow tree",
        width=options.width,
        height=options.height,
        num_frames=options.num_frames,
        num_inference_steps=options.num_inference_steps,
        boundary_ratio=options.boundary_ratio,
        seed=1,
        image=picture(options.width, options.height) if options.image else None,
    )
    began = time.monotonic()
    run: dict[str, Any] = {"steps": [], "bytes": 0}
    for response in stub.Generate(GenerateRequest(spec=spec)):
        take(run, response.event, time.monotonic() - began)
    run["total_s"] = round(time.monotonic() - began, 3)
    return run


def picture(width: int, height: int) -> bytes:
    """A JPEG of twice that size: a grey ramp in each direction."""
    file = io.BytesIO()
    ramp = Image.linear_gradient("L").resize((2 * width, 2 * height))
    Image.merge("RGB", (ramp, ramp.rotate(180), ramp)).save(file, "JPEG")
    return file.getvalue()


def take(run: dict[str, Any], event: pb.GenerationEvent, at_s: float) -> None:
    kind = event.WhichOneof("event")
    if kind == "chunk":
        run.setdefault("first_chunk_s", round(at_s, 3))
        run["bytes"] += len(event.chunk.data)
    elif kind == "progress" and event.progress.stage == pb.STAGE_DENOISE and event.progress.step:
        expert = pb.Expert.Name(event.progress.expert).removeprefix("EXPERT_").lower()
        run["steps"].append({"expert": expert, "step_s": event.progress.step_time.ToNanoseconds() / 1e9})
    elif kind == "progress" and event.progress.stage == pb.STAGE_DECODE:
        run.setdefault("decode_began_s", round(at_s, 3))
        run["decode_ended_s"] = round(at_s, 3)
    elif kind == "completed":
        run["stage_s"] = {
            pb.Stage.Name(part.stage).removeprefix("STAGE_").lower(): round(part.duration.ToNanoseconds() / 1e9, 3)
            for part in event.completed.stage_times
        }
        run["peak_gib"] = [round(memory.peak_bytes / 2**30, 2) for memory in event.completed.rank_memory]


def print_table(result: dict[str, Any]) -> None:
    told = [result[key] for key in ("model", "device", "dtype", "attention", "video")]
    print(", ".join(told), f"ready in {result['load_s']} s")
    heads = (("run", 3), ("steps, s", 18), ("image, s", 9), ("decode, s", 10), ("first chunk, s into decode", 27))
    print(" ".join(f"{head:>{width}}" for head, width in (*heads, ("total, s", 9))), " peak GiB")
    for index, run in enumerate(result["runs"]):
        steps = " / ".join(f"{step['step_s']:.3f}" for step in run["steps"])
        first_s = run["first_chunk_s"] - run["decode_began_s"]
        image, decode = (f"{run['stage_s'].get(stage, 0.0):.2f}" for stage in ("image", "decode"))
        row = f"{index:>3} {steps:>18} {image:>9} {decode:>10} {first_s:>27.2f} {run['total_s']:>9.2f}"
        print(f"{row}  {run['peak_gib']}")


if __name__ == "__main__":
    main()
