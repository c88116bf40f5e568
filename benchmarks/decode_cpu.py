"""Decoding the embedded model's default video on a CPU: torch's own choice of convolutions against the service's.

python benchmarks/decode_cpu.py
"""

import statistics
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from wan_grpc.optimize import convolution
from wan_grpc.pipeline import embedded
from wan_grpc.pipeline.checkpoint import locate
from wan_grpc.pipeline.decode import slices
from wan_grpc.pipeline.load import load

REPEATS = 5


def decode(directory: str, convolve: convolution.Convolve, latents: torch.Tensor) -> tuple[list[float], torch.Tensor]:
    """Seconds of each time, and the pixels."""
    vae = load(locate(directory, load_format="auto"), device="cpu", dtype="float32", load_format="auto").vae
    convolution.install(vae, convolve)
    times = []
    for _ in range(REPEATS + 1):
        began = time.perf_counter()
        pixels = torch.cat(list(slices(vae, latents)), dim=2)
        times.append(time.perf_counter() - began)
    return times[1:], pixels


def main() -> None:
    torch.manual_seed(0)
    latents = torch.randn(1, 16, 7, 12, 16)
    with tempfile.TemporaryDirectory() as scratch:
        directory = str(embedded.ensure_embedded(embedded.DEFAULT, Path(scratch)))
        plain, pixels = decode(directory, F.conv3d, latents)
        ours, others = decode(directory, convolution.choose(torch.device("cpu"), torch.float32), latents)
    medians = statistics.median(plain), statistics.median(ours)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, 128x96, 25 frames, fp32")
    print(f"conv3d {medians[0]:.2f} s, chosen {medians[1]:.2f} s: {medians[0] / medians[1]:.1f} times as fast")
    print(f"largest difference of a pixel from -1 to 1: {(pixels - others).abs().max():.1e}")


if __name__ == "__main__":
    main()
