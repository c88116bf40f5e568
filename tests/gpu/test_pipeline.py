"""One GPU against diffusers on the same GPU: rounding in bf16, results in fp32, truth of the step times, memory."""

from collections.abc import Iterator

import pytest
import torch
from diffusers import WanPipeline, WanTransformer3DModel

from tests import tiny
from wan_grpc.domain.events import Progress, Stage
from wan_grpc.domain.variants import Expert
from wan_grpc.optimize.attention import choose
from wan_grpc.pipeline.checkpoint import Checkpoint, locate
from wan_grpc.pipeline.denoise import Prompts, predict
from wan_grpc.pipeline.device import Stopwatch
from wan_grpc.pipeline.experts import Choice
from wan_grpc.pipeline.image import TEXT_ALONE
from wan_grpc.pipeline.load import load
from wan_grpc.pipeline.video import VideoPipeline

pytestmark = pytest.mark.gpu

DEVICE = torch.device("cuda:0")
# The real head size, so that the real kernels run, and depth enough for rounding to build up.
WIDER = {"num_attention_heads": 8, "attention_head_dim": 128, "ffn_dim": 2752, "num_layers": 8, "text_dim": 32}


class Leave(Exception):
    """What an on_step raises to leave."""


@pytest.fixture(autouse=True, scope="module")
def _plain_fp32() -> Iterator[None]:
    """fp32 means fp32 in both: TF32 convolutions would hide what is compared."""
    allowed = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = allowed


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    directory = tiny.save(tiny.make_pipeline(transformer=WIDER), tmp_path_factory.mktemp("wider"))
    return locate(str(directory), load_format="auto")


@pytest.fixture(scope="module")
def pipeline(checkpoint: Checkpoint) -> VideoPipeline:
    return load(checkpoint, device=str(DEVICE), dtype="float32", load_format="auto")


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Latents of 4,620 tokens, a timestep and a text, on the GPU in bf16."""
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(1, 16, 7, 44, 60, generator=generator)
    text = torch.randn(1, 512, 32, generator=generator)
    return latents.to(DEVICE, torch.bfloat16), torch.tensor([900], device=DEVICE), text.to(DEVICE, torch.bfloat16)


@pytest.mark.parametrize("attention", ["auto", "torch", "flash"])
@torch.no_grad()
def test_bf16_rounds_no_more_than_diffusers(attention: str, checkpoint: Checkpoint, pipeline: VideoPipeline) -> None:
    """Error of a bf16 forward against fp32: at most 1.1 times that of diffusers in bf16 on the same input."""
    function = choose(attention, device=DEVICE, dtype=torch.bfloat16).function
    ours = load(checkpoint, device=str(DEVICE), dtype="bfloat16", load_format="auto", attention=function)
    assert checkpoint.directory is not None
    theirs = WanTransformer3DModel.from_pretrained(
        checkpoint.directory, subfolder="transformer", torch_dtype=torch.bfloat16
    ).to(DEVICE)
    latents, timestep, text = inputs()
    expected = pipeline.transformers[Expert.HIGH_NOISE].predict(latents.float(), timestep, text.float())

    error_of_theirs = tiny.relative_error(theirs(latents, timestep, text, return_dict=False)[0], expected)
    error_of_ours = tiny.relative_error(ours.transformers[Expert.HIGH_NOISE].predict(latents, timestep, text), expected)
    assert 1e-4 < error_of_theirs < 5e-2
    assert error_of_ours <= 1.1 * error_of_theirs


def test_fp32_is_the_reference(checkpoint: Checkpoint, pipeline: VideoPipeline) -> None:
    """Latents within 1e-4 and frames within 1/255 of diffusers on the same GPU; a wrong shift is caught."""
    theirs = WanPipeline.from_pretrained(checkpoint.directory).to(DEVICE)
    theirs.set_progress_bar_config(disable=True)
    request = tiny.video(width=160, height=96, num_frames=9)
    expected = tiny.reference(theirs, request)
    frames = tiny.reference(theirs, request, output_type="np")
    ours = torch.cat(list(pipeline.generate(request, on_step=tiny.ignore))).float() / 255
    mistaken = tiny.video(width=160, height=96, num_frames=9, flow_shift=11.0)

    assert tiny.relative_error(pipeline.latents(request, on_step=tiny.ignore), expected) < 1e-4
    assert float((ours - frames).abs().max()) <= 1 / 255 + 1e-6
    assert tiny.relative_error(pipeline.latents(mistaken, on_step=tiny.ignore), expected) > 1e-4


@torch.no_grad()
def test_a_prediction_never_waits_for_the_gpu(pipeline: VideoPipeline) -> None:
    """Both passes of a guided step are enqueued without one host synchronization."""
    latents, timestep, text = (tensor.float() for tensor in inputs())
    choice = Choice(expert=Expert.HIGH_NOISE, guidance_scale=4.0, is_guided=True)
    prompts = Prompts(positive=text, negative=text)
    expert, given = pipeline.transformers[Expert.HIGH_NOISE], timestep[0].long()
    predict(expert, latents, given, prompts=prompts, condition=TEXT_ALONE, choice=choice)
    torch.cuda.set_sync_debug_mode("error")
    try:
        predict(expert, latents, given, prompts=prompts, condition=TEXT_ALONE, choice=choice)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_stopwatch_waits_for_the_gpu() -> None:
    """Its time is that of the work on the GPU, and when it has told it nothing is left to be done."""
    big = torch.randn(8192, 8192, device=DEVICE)
    big @ big  # the first product also loads the library
    torch.cuda.synchronize(DEVICE)
    watch = Stopwatch(DEVICE)
    for _ in range(20):
        big @ big
    seconds = watch.finish()
    assert torch.cuda.current_stream(DEVICE).query()
    floor = 20 * 2 * 8192**3 / 2e15  # no GPU does 2 PFLOP/s in fp32
    assert floor < seconds < 10


@pytest.mark.parametrize("stage", [Stage.TEXT, Stage.DENOISE, Stage.DECODE])
def test_leaving_gives_the_memory_back(stage: Stage, pipeline: VideoPipeline) -> None:
    """After leaving in any stage as many bytes are allocated as before, and the next video is right."""
    expected = torch.cat(list(pipeline.generate(tiny.VIDEO, on_step=tiny.ignore)))
    before = torch.cuda.memory_allocated(DEVICE)

    def leave(progress: Progress) -> None:
        if (progress.stage, progress.step) == (stage, 1):
            raise Leave

    with pytest.raises(Leave):
        list(pipeline.generate(tiny.VIDEO, on_step=leave))
    assert torch.cuda.memory_allocated(DEVICE) == before
    again = torch.cat(list(pipeline.generate(tiny.VIDEO, on_step=tiny.ignore)))
    assert float((again.float() - expected.float()).abs().max()) <= 1


def test_dummy_weights_are_made_on_the_gpu(checkpoint: Checkpoint) -> None:
    """Random weights in bf16 make finite latents and pictures, with no host memory spent on them."""
    assert checkpoint.directory is not None
    dummy = locate(checkpoint.directory, load_format="dummy")
    made = load(dummy, device=str(DEVICE), dtype="bfloat16", load_format="dummy")
    assert {parameter.device for model in made.transformers.values() for parameter in model.parameters()} == {DEVICE}
    assert torch.isfinite(made.latents(tiny.VIDEO, on_step=tiny.ignore)).all()
    frames = torch.cat(list(made.generate(tiny.VIDEO, on_step=tiny.ignore)))
    assert (frames.shape, frames.device.type) == (torch.Size([5, 32, 48, 3]), "cpu")
