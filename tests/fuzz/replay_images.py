"""Reads what fuzz_images.py has kept in DIRECTORY again, without atheris, and fails where memory grows with it."""

import struct
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import psutil

from tests.fuzz.one_image import outcome_of

MOST_GROWTH_BYTES: Final = 8 * 2**20
"""From a fifth of the inputs to their end: what allocators move to and fro is a quarter of it."""


def main() -> None:
    """Watch memory between the first fifth of the inputs, which fills every cache, and the last."""
    warnings.simplefilter("error")
    path = Path(sys.argv[1], "inputs")
    process, outcomes = psutil.Process(), Counter[str]()
    total = sum(1 for _ in inputs(path))
    settled = 0
    for index, data in enumerate(inputs(path)):
        outcomes[outcome_of(data)] += 1
        if index == total // 5:
            settled = process.memory_info().rss
    growth = process.memory_info().rss - settled
    print(f"{total} inputs again, {outcomes['read']} of them read: {growth / 2**20:+.1f} MiB of {settled >> 20} MiB")
    if growth > MOST_GROWTH_BYTES:
        sys.exit(f"memory grows by {growth / total / 0.8:.0f} bytes an input")


def inputs(path: Path) -> Iterator[bytes]:
    """As they were tried."""
    with path.open("rb") as file:
        while length := file.read(4):
            yield file.read(struct.unpack("<I", length)[0])


if __name__ == "__main__":
    main()
