"""How long a prompt is for the model. Imports no torch: the server process asks this.

Knows how prompts are cleaned and the checkpoint's tokenizer. Does not know what the tokens mean.
"""

import html
import re
from collections.abc import Callable

import ftfy

from wan_grpc.pipeline.checkpoint import Checkpoint
from wan_grpc.pipeline.tokenizer import byte_tokenizer, read_tokenizer


def clean(prompt: str) -> str:
    """The prompt as the model was trained to read it: broken Unicode mended, entities resolved, white space single."""
    mended = html.unescape(html.unescape(ftfy.fix_text(prompt)))
    return re.sub(r"\s+", " ", mended.strip()).strip()


def token_counter(checkpoint: Checkpoint) -> Callable[[str], int]:
    """A function from a prompt to the number of its tokens, its end included. It may be called from any thread.

    Raises:
        UnusableModelError: the checkpoint's tokenizer is broken.
    """
    folder = checkpoint.tokenizer_folder
    tokenizer = byte_tokenizer() if folder is None else read_tokenizer(folder)
    return lambda prompt: len(tokenizer.encode(clean(prompt)))
