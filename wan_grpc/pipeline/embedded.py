"""The models that come with the package: small ones that were trained on videos of coloured shapes in motion.

Knows their names and files. Does not know how checkpoints are read. Imports no torch. training/ makes the files, and
docs/wan-tiny.md says what the models can do.
"""

import filecmp
import hashlib
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from wan_grpc.domain.errors import UnusableModelError

DEFAULT: Final = "wan-tiny-t2v"
_OWN: Final = {"wan-tiny-t2v": "t2v", "wan-tiny-ti2v": "ti2v"}
NAMES: Final = tuple(_OWN)
FILES: Final = Path(__file__).parent / "wan_tiny"
"""What each model has for itself, and what they share: the text encoder with its tokenizer, and the VAE."""
SHARED: Final = "shared"


def is_embedded(model_path: str) -> bool:
    """Whether it names a model of the package. A directory of that name, where the process stands, comes first."""
    return model_path in NAMES and not Path(model_path).is_dir()


def resolved(model_path: str, cache_dir: Path) -> str:
    """The directory of an embedded model; anything else as it is.

    Raises:
        UnusableModelError: it cannot be put together below `cache_dir`.
    """
    return str(ensure_embedded(model_path, cache_dir)) if is_embedded(model_path) else model_path


def ensure_embedded(name: str, cache_dir: Path) -> Path:
    """The directory under `cache_dir` that has the whole checkpoint of one of NAMES.

    Files that are not there, or are not as the package has them, are copied: on the first call, after a power cut and
    after a cleaner of caches. Servers that start at once may do so at once. A directory is named after what is in it,
    so that what another version of the package left is not served.

    Raises:
        UnusableModelError: it cannot be put there.
    """
    files = _files(name)
    try:
        target = cache_dir / f"{name}-{_digest(files)}"
        for place, path in files.items():
            if not _is_same(path, target / place):
                _copy(path, target / place)
    except OSError as error:
        raise UnusableModelError(f"the embedded model cannot be kept in {cache_dir}: {error}") from error
    return target


def _is_same(path: Path, kept: Path) -> bool:
    return kept.is_file() and filecmp.cmp(path, kept, shallow=False)


def _copy(path: Path, target: Path) -> None:
    """Whole or not at all; who reads the file that was there before reads on in it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".copy-", dir=target.parent) as scratch:
        shutil.copyfile(path, copy := Path(scratch, target.name))
        copy.replace(target)


def _files(name: str) -> dict[str, Path]:
    """What the checkpoint has, by its places."""
    found: dict[str, Path] = {}
    for part in (FILES / SHARED, FILES / _OWN[name]):
        found |= {str(path.relative_to(part)): path for path in sorted(part.rglob("*")) if path.is_file()}
    if "model_index.json" not in found:
        raise UnusableModelError(f"this installation has no files of {name} in {FILES}")
    return found


def _digest(files: Mapping[str, Path]) -> str:
    digest = hashlib.sha256()
    for place in sorted(files):
        digest.update(place.encode() + b"\0" + hashlib.sha256(files[place].read_bytes()).digest())
    return digest.hexdigest()[:12]
