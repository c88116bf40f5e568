"""How long each output format takes to encode, with threads and presets as the service sets them.

    python benchmarks/encode_speed.py --out results.json
    python benchmarks/encode_speed.py --formats mp4_h264,webm_vp9 --size 832x480 --frames 33 --repeat 3

Frames are made beforehand: gradients, two moving layers of texture and the noise of a camera, in integers alone, so
that they are the same on every machine. The checksum of each file must then be the same on every machine too.
"""

import argparse
import hashlib
import json
import os
import platform
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from wan_grpc.domain.formats import FORMATS, OutputFormat
from wan_grpc.domain.request import VideoRequest
from wan_grpc.media.codecs import codec_of, converter_of
from wan_grpc.media.video import describe, open_encoder

Pixels = npt.NDArray[np.uint8]
Values = npt.NDArray[np.int32]

NOT_CONVERTED = (OutputFormat.RAW_RGB24, OutputFormat.WEBP_ANIMATION)


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One format: the best of its runs."""

    output_format: str
    media_type: str
    num_frames: int
    describe_s: float
    total_s: float
    """From the first frame in to the last byte out."""
    convert_s: float
    """What the conversion to the encoder's pixel format takes of it, measured by itself; 0 where there is none."""
    first_byte_s: float
    first_byte_after_frames: int
    size_bytes: int
    sha256: str

    @property
    def fps(self) -> float:
        return self.num_frames / self.total_s


def main() -> None:
    asked = _arguments()
    width, height = (int(side) for side in asked.size.split("x"))
    frames = list(moving_pictures(width, height, asked.frames))
    print(f"{asked.frames} frames of {width}x{height}; {_cpus()}")
    print(f"{'format':<22}{'s':>7}{'fps':>8}{'MB':>8}{'convert':>9}{'first byte':>12}  sha256")
    results = []
    for name in asked.formats:
        video = request(name, width, height, 1 if FORMATS[name].is_picture else asked.frames, asked.fps)
        result = min((measure(video, frames) for _ in range(asked.repeat)), key=lambda result: result.total_s)
        results.append(result)
        first = f"{result.first_byte_s * 1000:.0f} ms"
        sizes = f"{result.fps:>8.1f}{result.size_bytes / 1e6:>8.2f}{result.convert_s:>8.2f}s{first:>12}"
        print(f"{name:<22}{result.total_s:>7.2f}{sizes}  {result.sha256[:16]}", flush=True)
    if asked.out is not None:
        told = {"width": width, "height": height, "machine": _cpus(), "results": [asdict(each) for each in results]}
        asked.out.write_text(json.dumps(told, indent=2) + "\n")


def request(name: OutputFormat, width: int, height: int, num_frames: int, fps: int) -> VideoRequest:
    return VideoRequest(
        prompt="moving pictures",
        negative_prompt="",
        width=width,
        height=height,
        num_frames=num_frames,
        fps=fps,
        num_inference_steps=1,
        guidance_scale=1.0,
        guidance_scale_2=1.0,
        flow_shift=1.0,
        boundary_ratio=None,
        seed=0,
        output_format=name,
    )


def measure(video: VideoRequest, frames: list[Pixels]) -> Result:
    num_added, first_byte_s, first_byte_after = 0, 0.0, 0
    digest, size_bytes = hashlib.sha256(), 0

    def write(data: bytes) -> None:
        nonlocal first_byte_s, first_byte_after, size_bytes
        if not size_bytes:
            first_byte_s, first_byte_after = time.perf_counter() - start, num_added
        digest.update(data)
        size_bytes += len(data)

    before = time.perf_counter()
    media_type = describe(video).media_type
    start = time.perf_counter()
    encoder = open_encoder(video, write)
    for frame in frames[: video.num_frames]:
        num_added += 1
        encoder.add(memoryview(frame))
    encoder.finish()
    return Result(
        output_format=video.output_format,
        media_type=media_type,
        num_frames=video.num_frames,
        describe_s=start - before,
        total_s=time.perf_counter() - start,
        convert_s=_convert_s(video, frames),
        first_byte_s=first_byte_s,
        first_byte_after_frames=first_byte_after,
        size_bytes=size_bytes,
        sha256=digest.hexdigest(),
    )


def moving_pictures(width: int, height: int, num_frames: int) -> Iterator[Pixels]:
    """Frames as a camera might see them: (height, width, 3)."""
    numbers = np.random.default_rng(2022)
    far = _texture(numbers, width + 3 * num_frames, height + num_frames)
    near = _texture(numbers, width + 7 * num_frames, height + num_frames)
    noise = _noise(numbers, width + 64, height + 64)
    down, right = np.mgrid[0:height, 0:width].astype(np.int32)
    sky = np.stack([70 + 60 * right // width, 90 + 50 * down // height, 150 - 60 * right // width], axis=-1)
    for index in range(num_frames):
        there = far[index : index + height, 3 * index : 3 * index + width, None]
        frame = sky + there * np.array([4, 3, 2], np.int32) // 4
        centre = (width * (1 + 2 * index // num_frames) // 4 + 5 * index, height // 2 + index)
        inside = (right - centre[0]) ** 2 + (down - centre[1]) ** 2 < (height // 4) ** 2
        here = near[index : index + height, 7 * index : 7 * index + width, None]
        frame = np.where(inside[..., None], np.array([170, 80, 50], np.int32) + here, frame)
        x, y = numbers.integers(0, 64, 2)
        frame += noise[y : y + height, x : x + width, None]
        yield frame.clip(0, 255).astype(np.uint8)


def _texture(numbers: np.random.Generator, width: int, height: int) -> Values:
    """Patches of several sizes with soft edges, about -60 to 60."""
    texture = np.zeros((height, width), np.int32)
    for size, most in ((64, 32), (16, 16), (4, 8), (1, 2)):
        patches = numbers.integers(-most, most + 1, (height // size + 3, width // size + 3), dtype=np.int32)
        large = patches.repeat(size, axis=0).repeat(size, axis=1)
        for axis in (0, 1):
            sums = large.cumsum(axis=axis)
            large = (np.roll(sums, -size, axis=axis) - sums) // size
        texture += large[:height, :width]
    return texture


def _noise(numbers: np.random.Generator, width: int, height: int) -> Values:
    """Nearly normal, with a deviation of about 1.5."""
    return numbers.integers(0, 256, (height, width, 4), dtype=np.int32).sum(axis=-1, dtype=np.int32) // 100 - 5


def _convert_s(video: VideoRequest, frames: list[Pixels]) -> float:
    if video.output_format in NOT_CONVERTED or FORMATS[video.output_format].is_picture:
        return 0.0
    converter = converter_of(codec_of(video), video)
    start = time.perf_counter()
    for frame in frames[: video.num_frames]:
        converter.convert(frame)
    return time.perf_counter() - start


def _cpus() -> str:
    return f"{len(os.sched_getaffinity(0))} CPUs, {platform.machine()}"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    everything = ",".join(OutputFormat)
    parser.add_argument("--formats", type=_formats, default=everything, metavar="A,B", help=f"of {everything}")
    parser.add_argument("--size", default="1280x720", metavar="WxH", help="pixels (default %(default)s)")
    parser.add_argument("--frames", type=int, default=81, help="(default %(default)s)")
    parser.add_argument("--fps", type=int, default=16, help="(default %(default)s)")
    parser.add_argument("--repeat", type=int, default=1, help="runs, of which the best counts (default %(default)s)")
    parser.add_argument("--out", type=Path, help="JSON file of the results")
    return parser.parse_args()


def _formats(names: str) -> list[OutputFormat]:
    return [OutputFormat(name) for name in names.split(",")]


if __name__ == "__main__":
    main()
