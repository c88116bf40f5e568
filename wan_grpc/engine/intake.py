"""From a request as it was made to everything that its run needs: values, pictures, warnings. Does no asyncio.

Knows images, prompts and the model's rules. Does not know queues or generations.
"""

import hashlib
import re
import secrets
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Final

from wan_grpc.domain.errors import InvalidRequestError, Violation
from wan_grpc.domain.images import ImageFit, InputFrames
from wan_grpc.domain.request import GenerationRequest, VideoRequest, resolve
from wan_grpc.domain.variants import ModelCard
from wan_grpc.media.image import Picture, read_picture

CountTokens = Callable[[str], int]
"""Tokens of a prompt as the model's tokenizer makes them, its end included."""
_WORD: Final = re.compile(r"\w+")
_TOLD_WORDS: Final = 5
_LONG_WORD: Final = 40
"""Characters, after which a word is cut in a warning."""
QUICK_TEXT_BYTES: Final = 2048
"""What is cleaned and counted in a few milliseconds at worst."""
MOST_EXPANSION: Final = 11
"""Bytes that a byte of a prompt becomes at most before tokens are cut from it: U+FDFA has 3, and 33 spelled out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A request that was accepted, ready to run."""

    video: VideoRequest
    frames: InputFrames
    warnings: tuple[str, ...]


class Intake:
    """Checks requests against one model. Its methods may be called from any thread."""

    def __init__(self, card: ModelCard, count_tokens: CountTokens) -> None:
        self._card = card
        self._count_tokens = count_tokens

    def is_quick(self, request: GenerationRequest) -> bool:
        """Whether `prepare` takes no time worth a thread: no image to decode, and no text that is long to count."""
        texts = (request.prompt, _asked_or(self._card.defaults.negative_prompt, request.negative_prompt))
        takes_first = request.image is not None and self._card.takes_image
        takes_last = request.last_image is not None and self._card.takes_last_image
        return not (takes_first or takes_last) and all(_num_bytes(text) <= QUICK_TEXT_BYTES for text in texts)

    def prepare(self, request: GenerationRequest, found: tuple[Violation, ...] = ()) -> Prepared:
        """Read images, fill open values, draw a seed.

        found: what is wrong with the request already, to be told with the rest.

        Raises:
            InvalidRequestError: naming every field that breaks a rule.
        """
        wrong = list(found)
        first = self._read("spec.image", request.image, wrong) if self._card.takes_image else None
        last = self._read("spec.last_image", request.last_image, wrong) if self._card.takes_last_image else None
        video = resolve(
            request,
            self._card,
            fallback_seed=secrets.randbits(32),
            first=first.facts if first else None,
            last=last.facts if last else None,
            found=tuple(wrong),
        )
        frames = InputFrames(first=_fitted(first, video), last=_fitted(last, video))
        return Prepared(video=video, frames=frames, warnings=tuple(self._warnings(request, video)))

    def _read(self, field: str, data: bytes | None, found: list[Violation]) -> Picture | None:
        if data is None:
            return None
        limits = self._card.limits
        try:
            return read_picture(data, field=field, max_bytes=limits.max_image_bytes, max_pixels=limits.max_image_pixels)
        except InvalidRequestError as error:
            found.extend(error.violations)
            return None

    def _warnings(self, request: GenerationRequest, video: VideoRequest) -> Iterator[str]:
        for field, text in (("spec.prompt", video.prompt), ("spec.negative_prompt", video.negative_prompt)):
            if self._may_be_too_long(text):
                yield from self._length_warnings(field, text)
        yield from self._word_warnings(video.prompt)
        if request.negative_prompt and video.guidance_scale <= 1.0:
            yield "spec.negative_prompt: of no effect, since a guidance_scale of 1.0 or less runs no unconditional pass"
        if video.num_frames == 1 and video.image_sha256 and not self._card.needs_image:
            yield "spec.num_frames: this model keeps the image as the first frame, so that one frame is the image again"

    def _length_warnings(self, field: str, text: str) -> Iterator[str]:
        num_tokens, most = self._count_tokens(text), self._card.max_text_tokens
        if num_tokens > most:
            yield f"{field}: {num_tokens} tokens, of which the model reads the first {most}"

    def _word_warnings(self, prompt: str) -> Iterator[str]:
        """Of words that a model of few words was not trained on. It makes a video of them all the same."""
        if not self._card.words:
            return
        words = dict.fromkeys(_WORD.findall(_plain(prompt)))
        strange = [word for word in words if word not in self._card.words]
        if strange:
            told = ", ".join(_shortened(word) for word in strange[:_TOLD_WORDS])
            others = f" and {len(strange) - _TOLD_WORDS} more" if len(strange) > _TOLD_WORDS else ""
            yield (
                f"spec.prompt: this small model was trained on {len(self._card.words)} words, and does not know {told}"
                f"{others}"
            )

    def _may_be_too_long(self, text: str) -> bool:
        """False for what cannot be: a token is at least one byte, but for those of the first word and of the end."""
        growth = 1 if text.isascii() and "&" not in text else MOST_EXPANSION
        return growth * _num_bytes(text) + 2 > self._card.max_text_tokens


def fingerprint(request: GenerationRequest) -> GenerationRequest:
    """`request` with the checksums of its images in place of their bytes: what tells it from others, and is small."""
    return replace(request, image=_digest(request.image), last_image=_digest(request.last_image))


def _digest(data: bytes | None) -> bytes | None:
    return None if data is None else hashlib.sha256(data).digest()


def _plain(text: str) -> str:
    """Lower case without accents."""
    return "".join(char for char in unicodedata.normalize("NFKD", text).lower() if not unicodedata.combining(char))


def _shortened(word: str) -> str:
    return word if len(word) <= _LONG_WORD else f"{word[:_LONG_WORD]}.."


def _num_bytes(text: str) -> int:
    return len(text.encode("utf-8", "surrogatepass"))


def _asked_or(default: str, asked: str | None) -> str:
    return default if asked is None else asked


def _fitted(picture: Picture | None, video: VideoRequest) -> bytes | None:
    if picture is None:
        return None
    return picture.fitted(video.width, video.height, video.image_fit or ImageFit.COVER)
