import hashlib
import unicodedata
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.pictures import LEFT, RIGHT, saved, two_colours
from wan_grpc.domain.errors import InvalidRequestError, Violation
from wan_grpc.domain.images import ImageFit, InputFrames
from wan_grpc.domain.request import GenerationRequest
from wan_grpc.domain.variants import I2V_A14B, T2V_A14B, TI2V_5B, Limits, ModelCard, Task
from wan_grpc.engine import intake
from wan_grpc.engine.intake import MOST_EXPANSION, QUICK_TEXT_BYTES, Intake, Prepared, fingerprint
from wan_grpc.pipeline.prompt import clean
from wan_grpc.pipeline.tokenizer import byte_tokenizer

T2V = ModelCard(
    model_id="wan-tiny-t2v", task=Task.TEXT_TO_VIDEO, defaults=T2V_A14B, limits=Limits(max_area=2**20), size_multiple=16
)
I2V = replace(T2V, task=Task.IMAGE_TO_VIDEO, defaults=I2V_A14B, takes_last_image=True)
TI2V = replace(T2V, task=Task.TEXT_IMAGE_TO_VIDEO, defaults=TI2V_5B, size_multiple=32)
TOKENIZER = byte_tokenizer()
PNG = saved(two_colours(64, 32), "PNG")
ON_ITS_SIDE = saved(two_colours(64, 32).transpose(Image.Transpose.ROTATE_90), "PNG")


def count_tokens(prompt: str) -> int:
    return len(TOKENIZER.encode(clean(prompt)))


def count_none(prompt: str) -> int:
    raise AssertionError(f"{prompt!r} was counted")


def prepare(card: ModelCard, *, count: Callable[[str], int] = count_tokens, **asked: object) -> Prepared:
    request = GenerationRequest(**{"prompt": "a cat", "width": 64, "height": 32, **asked})  # type: ignore[arg-type]
    return Intake(card, count).prepare(request)


def violations(card: ModelCard, **asked: object) -> list[tuple[str, str]]:
    with pytest.raises(InvalidRequestError) as caught:
        prepare(card, **asked)
    return [(one.field, one.reason) for one in caught.value.violations]


# ---- images ---------------------------------------------------------------------------------------------------------


def test_images_become_frames_of_the_video() -> None:
    """Both images arrive as pixels at the size of the video, with their checksums, sized by the first."""
    prepared = prepare(I2V, image=PNG, last_image=ON_ITS_SIDE, width=32, height=64)
    video, frames = prepared.video, prepared.frames
    assert (video.width, video.height, video.image_fit) == (64, 32, ImageFit.COVER)
    assert video.image_sha256 == hashlib.sha256(PNG).hexdigest()
    assert video.last_image_sha256 == hashlib.sha256(ON_ITS_SIDE).hexdigest()
    assert frames.first == two_colours(64, 32).tobytes()
    assert frames.last is not None
    last = np.frombuffer(frames.last, dtype=np.uint8).reshape(32, 64, 3)
    assert [tuple(row[0]) for row in (last[0], last[-1])] == [RIGHT, LEFT]


def test_a_named_fit_makes_the_frame() -> None:
    """The frame is the one asked for, and the image is brought to it as was asked."""
    prepared = prepare(I2V, image=PNG, image_fit=ImageFit.CONTAIN, width=64, height=64)
    assert prepared.frames.first is not None
    frame = np.frombuffer(prepared.frames.first, dtype=np.uint8).reshape(64, 64, 3)
    assert [tuple(row[0]) for row in (frame[15], frame[16], frame[47], frame[48])] == [(0, 0, 0), LEFT, LEFT, (0, 0, 0)]


def test_no_image_no_frames() -> None:
    """A video from text alone has none."""
    prepared = prepare(TI2V)
    assert prepared.frames == InputFrames()
    assert not prepared.video.has_image


def test_a_seed_is_drawn_where_none_is_asked_for() -> None:
    """Two requests that leave it open differ in nothing but their seeds, of 32 bits; one that names it keeps it."""
    one, other = prepare(T2V).video, prepare(T2V).video
    assert replace(one, seed=0) == replace(other, seed=0)
    assert one.seed != other.seed
    assert max(one.seed, other.seed) < 2**32
    assert prepare(T2V, seed=7).video.seed == 7


def test_an_image_that_is_not_taken_is_not_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model of text alone refuses an image without looking at it, and without a thread for it."""
    monkeypatch.delattr(intake, "read_picture")
    assert violations(T2V, image=PNG, last_image=PNG) == [
        ("spec.image", "DOES_NOT_APPLY"),
        ("spec.last_image", "DOES_NOT_APPLY"),
    ]
    assert violations(TI2V, last_image=PNG) == [("spec.last_image", "DOES_NOT_APPLY")]
    for card in (T2V, TI2V):
        assert Intake(card, count_none).is_quick(GenerationRequest(prompt="a cat", last_image=PNG))


def test_all_that_is_wrong_is_told_at_once() -> None:
    """What is wrong with either image stands beside what is wrong with the numbers and with the message."""
    told = Violation(field="spec.adapters", description="not served", reason="NOT_SERVED")
    limits = replace(I2V.limits, max_image_pixels=64 * 32 - 1)
    request = GenerationRequest(prompt="", image=PNG, last_image=b"GIF89a", fps=0)
    with pytest.raises(InvalidRequestError) as caught:
        Intake(replace(I2V, limits=limits), count_none).prepare(request, (told,))
    assert [(one.field, one.reason) for one in caught.value.violations] == [
        ("spec.prompt", "REQUIRED"),
        ("spec.fps", "OUT_OF_RANGE"),
        ("spec.adapters", "NOT_SERVED"),
        ("spec.image", "TOO_LARGE"),
        ("spec.last_image", "NOT_SERVED"),
    ]


def test_bytes_of_images_have_the_limit_of_the_server() -> None:
    """At the limit an image is read; one byte more is refused."""
    at = replace(I2V, limits=replace(I2V.limits, max_image_bytes=len(PNG)))
    assert prepare(at, image=PNG).frames.first is not None
    below = replace(I2V, limits=replace(I2V.limits, max_image_bytes=len(PNG) - 1))
    assert violations(below, image=PNG) == [("spec.image", "TOO_LARGE")]


# ---- warnings -------------------------------------------------------------------------------------------------------


FEW_WORDS = replace(T2V, words=frozenset({"a", "red", "star", "moves", "up"}))


def test_words_that_a_small_model_does_not_know_are_told() -> None:
    """Once each, without regard to case and punctuation; the first five; none where all are known or may be any."""
    assert prepare(FEW_WORDS, prompt="A RÉD star... moves, up!").warnings == ()
    assert prepare(T2V, prompt="a curious raccoon").warnings == ()
    [told] = prepare(FEW_WORDS, prompt="a curious Raccoon, a raccoon moves").warnings
    assert told == ("spec.prompt: this small model was trained on 5 words, and does not know curious, raccoon")
    [told] = prepare(FEW_WORDS, prompt=f"eins zwei drei 猫 {'x' * 100} sechs 7").warnings
    assert told.endswith(f"does not know eins, zwei, drei, 猫, {'x' * 40}.. and 2 more")
    assert prepare(FEW_WORDS, prompt="a red star", negative_prompt="a raccoon").warnings == ()


def test_tokens_that_are_not_read_are_told() -> None:
    """Up to the model's length nothing is said; beyond it the caller hears how long the text is and what is read."""
    assert prepare(T2V, prompt="x" * 511).warnings == ()
    assert prepare(T2V, prompt="x" * 512).warnings == (
        "spec.prompt: 513 tokens, of which the model reads the first 512",
    )
    both = prepare(T2V, prompt="é" * 256, negative_prompt="x" * 600)
    assert both.warnings == (
        "spec.prompt: 513 tokens, of which the model reads the first 512",
        "spec.negative_prompt: 601 tokens, of which the model reads the first 512",
    )


def test_tokens_are_counted_as_the_model_sees_the_text() -> None:
    """White space that is folded and entities that are resolved do not count."""
    assert prepare(T2V, prompt="a" + " " * 1000 + "cat").warnings == ()
    assert prepare(T2V, prompt="&amp;" * 500).warnings == ()


def test_short_texts_are_not_counted() -> None:
    """Who sends a sentence does not wait for the tokenizer."""
    assert prepare(T2V, prompt="x" * 510, negative_prompt="猫" * 15, count=count_none).warnings == ()


def test_a_negative_prompt_without_guidance_is_told() -> None:
    """At a guidance of 1.0 or less a negative prompt does nothing, which its author hears; the operator's is silent."""
    sentence = "spec.negative_prompt: of no effect, since a guidance_scale of 1.0 or less runs no unconditional pass"
    assert prepare(T2V, negative_prompt="blurry", guidance_scale=1.0).warnings == (sentence,)
    assert prepare(T2V, negative_prompt="blurry", guidance_scale=1.01).warnings == ()
    assert prepare(T2V, negative_prompt="", guidance_scale=1.0).warnings == ()
    operators = replace(T2V, defaults=replace(T2V_A14B, negative_prompt="blurry"))
    assert prepare(operators, guidance_scale=1.0).warnings == ()


# ---- what takes time ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("card", "asked", "is_quick"),
    [
        (T2V, {}, True),
        (T2V, {"prompt": "x" * QUICK_TEXT_BYTES}, True),
        (T2V, {"prompt": "x" * (QUICK_TEXT_BYTES + 1)}, False),
        (T2V, {"prompt": "é" * (QUICK_TEXT_BYTES // 2 + 1)}, False),
        (T2V, {"negative_prompt": "x" * (QUICK_TEXT_BYTES + 1)}, False),
        (T2V, {"prompt": "\ud800"}, True),
        (T2V, {"image": PNG}, True),
        (I2V, {"image": PNG}, False),
        (I2V, {"last_image": PNG}, False),
        (TI2V, {"image": PNG}, False),
        (TI2V, {"last_image": PNG}, True),
    ],
)
def test_what_is_quick(card: ModelCard, asked: dict[str, object], is_quick: bool) -> None:
    """Images that will be decoded and long texts are worth a thread, and nothing else is."""
    request = GenerationRequest(**{"prompt": "a cat", **asked})  # type: ignore[arg-type]
    assert Intake(card, count_none).is_quick(request) == is_quick


def test_the_operators_negative_prompt_counts_where_it_is_used() -> None:
    """A long default is worth a thread, unless the request puts another text, or none, in its place."""
    long = Intake(replace(T2V, defaults=replace(T2V_A14B, negative_prompt="x" * 4096)), count_none)
    assert not long.is_quick(GenerationRequest(prompt="a cat"))
    assert long.is_quick(GenerationRequest(prompt="a cat", negative_prompt=""))


PIECES = [
    "a",
    " ",
    "\n",
    "&",
    "&lt;",
    "&nLt;",
    "&ngE",
    "&#xFDFA;",
    "&amp;#64;",
    "ﬃ",
    "ŉ",
    "Ĳ",
    "ﷺ",
    "\u0958",
    "\U0001d1c0",
]
PIECES += ["Ã©", "ï·º", "â€œ", "…", "㎖", "＆lt;", "猫", "🐈", "\u200b", "\u2028", "\xa0", "\xad"]


@settings(deadline=None)
@given(st.lists(st.sampled_from(PIECES), min_size=1, max_size=60).map("".join) | st.text(min_size=1, max_size=100))
@example("ﷺ" * 15)
@example("x" * 510)
def test_what_is_not_counted_is_never_too_long(prompt: str) -> None:
    """No mending, entity or compatibility form makes a text longer than the model reads without a warning."""
    spelled_out = unicodedata.normalize("NFKC", clean(prompt)).encode()  # as the published model's tokenizer does
    assert len(spelled_out) <= MOST_EXPANSION * len(prompt.encode())
    limits = replace(T2V.limits, max_prompt_bytes=2**20)
    try:
        prepared = prepare(replace(T2V, limits=limits), prompt=prompt, count=lambda text: 600)
    except InvalidRequestError:
        return
    if not prepared.warnings:
        assert len(spelled_out) + 2 <= T2V.max_text_tokens
        assert count_tokens(prompt) <= T2V.max_text_tokens


def test_no_character_is_spelled_out_longer() -> None:
    """The bound of expansion is that of all characters of Unicode, and one of them reaches it."""
    characters = (chr(number) for number in range(0x110000) if not 0xD800 <= number < 0xE000)
    growths = {len(unicodedata.normalize("NFKC", one).encode()) / len(one.encode()) for one in characters}
    assert max(growths) == MOST_EXPANSION


# ---- fingerprints ---------------------------------------------------------------------------------------------------


def test_a_fingerprint_is_small_and_tells_requests_apart() -> None:
    """Images are stood for by their checksums, one by one; all else is as it was asked."""
    request = GenerationRequest(prompt="a cat", image=PNG, last_image=b"dog", seed=7)
    assert fingerprint(request) == GenerationRequest(
        prompt="a cat", image=hashlib.sha256(PNG).digest(), last_image=hashlib.sha256(b"dog").digest(), seed=7
    )
    assert fingerprint(replace(request, image=b"dog", last_image=PNG)) != fingerprint(request)
    assert fingerprint(replace(request, last_image=None)) != fingerprint(request)
    assert fingerprint(replace(request, last_image=b"")) != fingerprint(replace(request, last_image=None))
    plain = GenerationRequest(prompt="a cat")
    assert fingerprint(plain) == plain
