"""Fuzzes the reading of input images: `make fuzz`, or `fuzz_images.py DIRECTORY` with libFuzzer's own options.

Whatever the bytes, the outcome is a picture or a refusal with a known reason, and no warning. The inputs are kept in
DIRECTORY for replay_images.py, which watches memory: the code that atheris instruments takes ever more of it by itself.
Needs atheris, which no other test does.
"""

import random
import struct
import sys
import warnings
from collections import Counter
from pathlib import Path
from typing import Final

import atheris

with atheris.instrument_imports(include=["wan_grpc.media", "PIL"]):
    from tests.fuzz.one_image import MAX_BYTES, outcome_of

from tests.pictures import every_kind, with_right_checksums

REPORTED: Final = 20_000
"""Inputs from one line of figures to the next."""


class Fuzzed:
    """What came of the inputs so far, and the file that keeps them."""

    def __init__(self, inputs: Path) -> None:
        self._inputs = inputs.open("wb")
        self._outcomes: Counter[str] = Counter()

    def fuzz(self, data: bytes) -> None:
        """One input, which is on disk before it is read."""
        self._inputs.write(struct.pack("<I", len(data)) + data)
        self._inputs.flush()
        self._outcomes[outcome_of(data)] += 1
        if self._outcomes.total() % REPORTED == 0:
            told = ", ".join(f"{outcome} {count}" for outcome, count in self._outcomes.most_common())
            print(f"{self._outcomes.total()} inputs: {told}", flush=True)


def mutate(data: bytes, max_size: int, seed: int) -> bytes:
    """A damaged input; mostly with the checksums of a PNG made right again, without which nothing else is looked at."""
    damaged = atheris.Mutate(data, max_size)
    return damaged if random.Random(seed).random() < 0.1 else with_right_checksums(damaged)


def main() -> None:
    """Start from a small file of every kind."""
    warnings.simplefilter("error")
    directory = Path(sys.argv[1])
    corpus = directory / "corpus"
    corpus.mkdir()
    for name, file in every_kind().items():
        (corpus / name).write_bytes(file)
    options = [f"-max_len={MAX_BYTES}", "-rss_limit_mb=2048", "-timeout=10", "-print_final_stats=1", *sys.argv[2:]]
    fuzzed = Fuzzed(directory / "inputs")
    atheris.Setup([sys.argv[0], str(corpus), *options], fuzzed.fuzz, custom_mutator=mutate)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
