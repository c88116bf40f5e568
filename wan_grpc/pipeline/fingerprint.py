"""Whether two hosts hold the same checkpoint, told from little of it.

Knows which files are read. Imports no torch: the server process asks, too.
"""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from wan_grpc.pipeline import layout
from wan_grpc.pipeline.checkpoint import DUMMY, Checkpoint

_END_BYTES: Final = 2**16


def fingerprint(checkpoint: Checkpoint, *, load_format: str) -> str:
    """Of the configs and of both ends of each file of weights, which another training changes everywhere."""
    digest = hashlib.sha256()
    if checkpoint.directory is None:
        digest.update(checkpoint.model_path.encode())
        return digest.hexdigest()
    directory = Path(checkpoint.directory)
    for path in _files(checkpoint, directory, with_weights=load_format != DUMMY):
        size = path.stat().st_size
        digest.update(f"{path.relative_to(directory)}\0{size}\0".encode())
        with path.open("rb") as file:
            digest.update(file.read(_END_BYTES))
            file.seek(max(0, size - _END_BYTES))
            digest.update(file.read(_END_BYTES))
    return digest.hexdigest()


def _files(checkpoint: Checkpoint, directory: Path, *, with_weights: bool) -> Iterator[Path]:
    index = checkpoint.config(layout.INDEX)
    names = [layout.INDEX, *(f"{name}/{config}" for name, config in layout.CONFIGS.items())]
    yield from (directory / name for name in names if (directory / name).is_file())
    if not with_weights:
        return
    tokenizer = [directory / "tokenizer" / name for name in layout.TOKENIZER_FILES]
    yield from (path for path in tokenizer if path.is_file())
    for component in layout.weighty_components(index):
        yield from checkpoint.weight_files(component)
