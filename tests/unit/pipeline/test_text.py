from collections.abc import Iterator, Sequence

import pytest
import torch
from diffusers import WanPipeline
from diffusers.pipelines.wan.pipeline_wan import prompt_clean

from tests import tiny
from wan_grpc.domain.events import Progress, Stage
from wan_grpc.pipeline.text import NUM_TOKENS, EncodeText, TextEncoder, clean
from wan_grpc.pipeline.video import VideoPipeline

PROMPTS = [
    "A cat",
    "",
    "   ",
    " a\t b\r\n c \u3000 d\u00a0e\u2028f\x1cg\x85h\u200bi ",
    "caf&eacute; &amp;amp; &#28; &lt;b&gt;",
    "schÃ¶n â€œquotedâ€",  # UTF-8 read as Latin-1
    "“curly” ﬁ ｆｕｌｌｗｉｄｔｈ e\u0301",
    "猫が歩く 🐈\u200d⬛ \ud800",
    "\x00\x07\x1b[31mred",
    "".join(chr(code) for code in range(0x20, 0x3100) if chr(code).isspace()),
    "long " * 300,
]


@pytest.mark.parametrize("prompt", PROMPTS, ids=range(len(PROMPTS)))
def test_prompts_are_cleaned_as_diffusers_does(prompt: str) -> None:
    """Broken Unicode, entities, control characters and every kind of space."""
    assert clean(prompt) == prompt_clean(prompt)


@pytest.mark.parametrize(
    "prompt", ["A cat", "", "caf&eacute;  猫", "long " * 300], ids=["short", "empty", "cleaned", "long"]
)
@torch.no_grad()
def test_embeddings_are_those_of_diffusers(prompt: str, reference: WanPipeline, pipeline: VideoPipeline) -> None:
    """512 tokens, zero after the last one, cut off at 512; a second call gives the same."""
    expected, _ = reference.encode_prompt(prompt, do_classifier_free_guidance=False, max_sequence_length=NUM_TOKENS)
    for _ in range(2):
        assert torch.equal(pipeline.text_encoder.encode(prompt), expected)


@pytest.fixture
def counted(pipeline: VideoPipeline, monkeypatch: pytest.MonkeyPatch) -> tuple[TextEncoder, list[str]]:
    """An encoder that remembers two prompts, and the texts that it had to compute."""
    encoder = TextEncoder(pipeline.text_encoder.tokenizer, pipeline.text_encoder.model, num_remembered=2)
    computed: list[str] = []
    compute = encoder._compute

    def watch(text: str) -> torch.Tensor:
        computed.append(text)
        return compute(text)

    monkeypatch.setattr(encoder, "_compute", watch)
    return encoder, computed


def test_recent_prompts_are_not_computed_again(counted: tuple[TextEncoder, list[str]]) -> None:
    """Prompts that clean to the same text are one; the one used longest ago is forgotten first."""
    encoder, computed = counted
    for prompt in ("a", " a ", "b", "a", "c", "a", "b"):
        encoder.encode(prompt)
    assert computed == ["a", "b", "c", "b"]


def test_few_prompts_are_remembered(counted: tuple[TextEncoder, list[str]]) -> None:
    """However many prompts come, two embeddings are held."""
    encoder, _ = counted
    for number in range(5):
        encoder.encode(str(number))
    assert list(encoder._remembered) == ["3", "4"]


def test_prompts_are_encoded_in_turn(counted: tuple[TextEncoder, list[str]]) -> None:
    """Nothing is computed before it is asked for, so that a video can be cancelled between its prompts."""
    encoder, computed = counted
    encoded = encoder.encode_all(["a", "b"])
    seen = [computed.copy()]
    for _ in encoded:
        seen.append(computed.copy())
    assert seen == [[], ["a"], ["a", "b"]]


def test_an_abandoned_request_is_remembered_as_far_as_it_came(counted: tuple[TextEncoder, list[str]]) -> None:
    """What was computed before a cancel is not computed again."""
    encoder, computed = counted
    next(encoder.encode_all(["a", "b"]))
    list(encoder.encode_all(["a", "b"]))
    assert computed == ["a", "b"]


def test_equal_prompts_are_computed_once(counted: tuple[TextEncoder, list[str]]) -> None:
    """Two prompts that clean to the same text have one embedding between them, and it is the right one."""
    encoder, computed = counted
    one, other = encoder.encode_all(["a", " a "])
    assert computed == ["a"]
    assert torch.equal(one, other)
    assert torch.equal(one, encoder._compute("a"))


def test_a_request_drives_out_none_of_its_own_prompts(counted: tuple[TextEncoder, list[str]]) -> None:
    """The memory is full and knows the second prompt longest, when the first one comes anew."""
    encoder, computed = counted
    expected = encoder.encode("b")
    encoder.encode("c")
    _, second = encoder.encode_all(["a", "b"])
    assert computed == ["b", "c", "a"]
    assert torch.equal(second, expected)
    assert list(encoder._remembered) == ["a", "b"]


def test_what_is_forgotten_is_computed_again(counted: tuple[TextEncoder, list[str]]) -> None:
    """After `forget` no prompt is known."""
    encoder, computed = counted
    for _ in range(2):
        list(encoder.encode_all(["a", "b"]))
        encoder.forget()
    assert computed == ["a", "b", "a", "b"]


def test_a_blank_is_like_every_embedding(pipeline: VideoPipeline) -> None:
    """What ranks receive an embedding into has its shape and dtype."""
    encoder = pipeline.text_encoder
    blank, embedding = encoder.blank(), encoder.encode("a")
    assert (blank.shape, blank.dtype, blank.device) == (embedding.shape, embedding.dtype, embedding.device)
    assert not blank.any()


def test_each_prompt_is_a_step_whoever_encodes_it(pipeline: VideoPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts that are divided may come all at once: there is still one step for each, so that ranks agree as often."""
    given: list[list[str]] = []

    def all_at_once(texts: Sequence[str], encode: EncodeText) -> Iterator[torch.Tensor]:
        given.append(list(texts))
        return iter([encode(text) for text in texts])

    class Enough(Exception):
        pass

    steps: list[Progress] = []

    def on_step(progress: Progress) -> None:
        if progress.stage is not Stage.TEXT:
            raise Enough
        steps.append(progress)

    encoder = TextEncoder(pipeline.text_encoder.tokenizer, pipeline.text_encoder.model)
    encoder.spread = all_at_once
    monkeypatch.setattr(pipeline, "text_encoder", encoder)
    for prompt in ("one", "two"):
        with pytest.raises(Enough):
            pipeline.latents(tiny.video(prompt=prompt, negative_prompt="no"), on_step=on_step)
    assert given == [["one", "no"], ["two"]]
    assert [(step.step, step.total_steps) for step in steps] == [(0, 2), (1, 2), (2, 2)] * 2
