"""How long a prompt is for the model. Imports no torch: the server process asks this.

Knows how prompts are cleaned and the checkpoint's tokenizer. Does not know what the tokens mean.
"""

import html
import re
from collections.abc import Callable
from pathlib import Path

import ftfy
from tokenizers import Tokenizer

from wan_grpc.pipeline.checkpoint import Checkpoint
from wan_grpc.pipeline.tokenizer import byte_tokenizer


def clean(prompt: str) -> str:
    """The prompt as the model was trained to read it: broken Unicode mended, entities resolved, white space single."""
    mended = html.unescape(html.unescape(ftfy.fix_text(prompt)))
    return re.sub(r"\s+", " ", mended.strip()).strip()


def token_counter(checkpoint: Checkpoint) -> Callable[[str], int]:
    """A function from a prompt to the number of its tokens, its end included."""
    tokenizer = _tokenizer(checkpoint)
    return lambda prompt: len(tokenizer.encode(clean(prompt)))


def _tokenizer(checkpoint: Checkpoint) -> Tokenizer:
    if checkpoint.directory is None:
        return byte_tokenizer()
    tokenizer = Tokenizer.from_file(str(Path(checkpoint.directory, "tokenizer/tokenizer.json")))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer
