"""Fuzzes the reading of input images: `make fuzz`, or with libFuzzer's own options, e.g. `-runs=100000`.

Whatever the bytes, the outcome is a picture or a refusal with a known reason; no warning, no other error, and no memory
that is kept. Needs atheris, which no other test does.
"""

import random
import sys
import tempfile
import warnings
from collections import Counter
from pathlib import Path
from typing import Final

import atheris

with atheris.instrument_imports(include=["wan_grpc.media", "PIL"]):
    from wan_grpc.media.image import Picture, read_picture

from tests.pictures import every_kind, with_right_checksums
from wan_grpc.domain.errors import InvalidRequestError
from wan_grpc.domain.images import ImageFit

MAX_BYTES: Final = 4096
MAX_PIXELS: Final = 2**18
REASONS: Final = {"TOO_LARGE", "NOT_AN_IMAGE", "NOT_SERVED", "ANIMATED", "TRUNCATED", "BROKEN"}
SETTLED: Final = 20_000
"""Inputs after which memory has to stay as it is."""
MOST_GROWTH_BYTES: Final = 64 * 2**20
PAGE_BYTES: Final = 4096

outcomes: Counter[str] = Counter()
resident_bytes: dict[str, int] = {}


def fuzz(data: bytes) -> None:
    """One input."""
    try:
        picture = read_picture(data, field="spec.image", max_bytes=MAX_BYTES, max_pixels=MAX_PIXELS)
    except InvalidRequestError as error:
        outcome = error.violations[0].reason
        assert outcome in REASONS
    else:
        check(picture, data)
        outcome = "read"
    outcomes[outcome] += 1
    if outcomes.total() % SETTLED == 0:
        report()


def check(picture: Picture, data: bytes) -> None:
    """What was read can be fitted to any frame."""
    assert picture.pixels.mode == "RGB"
    assert picture.pixels.size == (picture.facts.width, picture.facts.height)
    assert picture.facts.width * picture.facts.height <= MAX_PIXELS
    fit = list(ImageFit)[data[-1] % len(ImageFit)]
    assert len(picture.fitted(48, 32, fit)) == 48 * 32 * 3


def report() -> None:
    """Tell what came of the inputs; fail where memory grows with their number."""
    now = int(Path("/proc/self/statm").read_text().split()[1]) * PAGE_BYTES
    settled = resident_bytes.setdefault("settled", now)
    told = ", ".join(f"{outcome} {count}" for outcome, count in outcomes.most_common())
    print(f"{outcomes.total()} inputs, {now >> 20} MiB resident: {told}", flush=True)
    if now > settled + MOST_GROWTH_BYTES:
        raise MemoryError(f"{now - settled} bytes more than after {SETTLED} inputs")


def mutate(data: bytes, max_size: int, seed: int) -> bytes:
    """A damaged input; mostly with the checksums of a PNG made right again, without which nothing else is looked at."""
    damaged = atheris.Mutate(data, max_size)
    return damaged if random.Random(seed).random() < 0.1 else with_right_checksums(damaged)


def main() -> None:
    """Start from a small file of every kind."""
    warnings.simplefilter("error")
    with tempfile.TemporaryDirectory() as corpus:
        for name, file in every_kind().items():
            Path(corpus, name).write_bytes(file)
        options = [f"-max_len={MAX_BYTES}", "-rss_limit_mb=1024", "-timeout=10", "-print_final_stats=1", *sys.argv[1:]]
        atheris.Setup([sys.argv[0], corpus, *options], fuzz, custom_mutator=mutate)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
