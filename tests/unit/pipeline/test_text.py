import pytest
import torch
from diffusers import WanPipeline
from diffusers.pipelines.wan.pipeline_wan import prompt_clean

from wan_grpc.pipeline.text import NUM_TOKENS, TextEncoder, clean
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
