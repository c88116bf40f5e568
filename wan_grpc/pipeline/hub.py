"""Brings a checkpoint from the Hugging Face Hub, or from its local cache, to a directory.

Knows which files are wanted and what each refusal means for an operator. Does not know what is in the files.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Final

from wan_grpc.domain.errors import UnusableModelError

CONFIG_PATTERNS: Final = ("*.json", "tokenizer/*.model", "tokenizer/*.txt")


def fetch(repository: str, *, weights_of: Sequence[str]) -> Path:
    """Directory of the snapshot of `repository`, downloaded where it is not in the cache.

    weights_of: the components whose safetensors are wanted beside all configs and the tokenizer.

    Raises:
        UnusableModelError: it cannot be had, with the reason and what would help.
    """
    from huggingface_hub import constants, errors, snapshot_download  # half a second, only for those who need it

    patterns = [*CONFIG_PATTERNS, *(f"{component}/*.safetensors" for component in weights_of)]
    try:
        return Path(snapshot_download(repository, allow_patterns=patterns))
    except errors.HFValidationError as error:
        raise UnusableModelError(f"{repository} is neither a directory nor a hub id such as owner/name") from error
    except errors.GatedRepoError as error:
        raise UnusableModelError(
            f"{repository} is gated: accept its terms on huggingface.co and set HF_TOKEN to a token of that account"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise UnusableModelError(
            f"{repository} is no directory here and no model on huggingface.co (a private one needs HF_TOKEN)"
        ) from error
    except (OSError, errors.HfHubHTTPError) as error:
        raise UnusableModelError(_unreachable(repository, offline=constants.HF_HUB_OFFLINE, error=error)) from error


def _unreachable(repository: str, *, offline: bool, error: Exception) -> str:
    if offline:
        return (
            f"{repository} is no directory here and not whole in the local cache, and HF_HUB_OFFLINE forbids a download"
        )
    detail = (str(error).strip() or type(error).__name__).splitlines()[0].removeprefix("Got: ")
    return f"{repository} is no directory here, not whole in the local cache, and cannot be downloaded: {detail}"
