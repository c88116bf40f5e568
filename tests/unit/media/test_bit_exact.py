"""The same frames give the same bytes: again, on other cores, and on processors that can do less."""

import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.unit.media.films import YUV_VIDEOS, encode, of_format, waves
from wan_grpc.domain.formats import FORMATS, OutputFormat

REPOSITORY = Path(__file__).parents[3]

HASHES_ELSEWHERE = """
import ctypes, json, os, sys
from tests.unit.media.test_bit_exact import hashes
from wan_grpc.media import codecs

def library(name):
    return ctypes.CDLL(next(line.split()[-1] for line in open("/proc/self/maps") if name in line))

if sys.argv[1] == "one CPU":
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
if sys.argv[1] == "no vector instructions":
    libavutil = library("av.libs/libavutil")
    libavutil.av_force_cpu_flags(0)
    assert libavutil.av_get_cpu_flags() == 0
    codecs.X264["x264-params"] += ":asm=0"
    codecs.X265["x265-params"] += ":asm=0"
    codecs.AV1["svtav1-params"] += ":asm=c"
    from PIL import _webp
    ctypes.c_void_p.in_dll(library("pillow.libs/libwebp-"), "VP8GetCPUInfo").value = None
print(json.dumps(hashes()))
"""
NOTHING_FAST = {
    "VPX_SIMD_CAPS": "0",  # libvpx
    "JSIMD_FORCENONE": "1",  # libjpeg-turbo
    "GLIBC_TUNABLES": "glibc.cpu.hwcaps=-AVX,-AVX2,-FMA,-FMA4,-AVX512F",  # the mathematical functions of the system
}


def hash_of(name: OutputFormat, **more: object) -> str:
    request = of_format(name, **{"width": 320, "height": 256, "num_frames": 9, **more})
    return hashlib.sha256(encode(request, waves(request)).data).hexdigest()


def hashes() -> dict[str, str]:
    """Of every format, as usual and by a bit rate: what decides about each bit then is floating point."""
    usual = {str(name): hash_of(name, num_frames=1 if FORMATS[name].is_picture else 9) for name in OutputFormat}
    return usual | {f"{name} by bit rate": hash_of(name, bitrate_bps=400_000) for name in YUV_VIDEOS}


@pytest.fixture(scope="module")
def here() -> dict[str, str]:
    return hashes()


def test_again(here: dict[str, str]) -> None:
    """A second run of each format gives the same bytes."""
    assert hashes() == here


@pytest.mark.parametrize("how", ["one CPU", "no vector instructions"])
def test_elsewhere(here: dict[str, str], how: str) -> None:
    """Neither the number of CPUs nor what they can do is in a file, whatever its format."""
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), **(NOTHING_FAST if how != "one CPU" else {})}
    command = [sys.executable, "-c", HASHES_ELSEWHERE, how]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, timeout=100, cwd=REPOSITORY, env=environment)
    assert json.loads(done.stdout) == here


def test_formats_differ(here: dict[str, str]) -> None:
    """No two of these files are the same, so that the hashes say something."""
    assert len(set(here.values())) == len(here)


@pytest.mark.parametrize("name", OutputFormat)
def test_nothing_in_a_file_tells_by_which_version_of_a_library_it_was_made(name: OutputFormat) -> None:
    """FFmpeg, x265, SVT-AV1 and Pillow leave no version; only x264 writes its settings into each stream."""
    data = encode(of_format(name), waves(of_format(name))).data
    assert not re.search(rb"Lav[fc] ?\d|x265|SVT|Pillow", data)
