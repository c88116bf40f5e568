"""Videos from images on one GPU against diffusers on the same GPU, and with random weights in the published shapes."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from diffusers import WanImageToVideoPipeline, WanPipeline, WanTransformer3DModel

from tests import tiny, tiny_images
from tests.tiny_images import errors, frames_of, picture
from wan_grpc.domain.events import Progress, Stage
from wan_grpc.domain.variants import Expert
from wan_grpc.optimize.attention import choose
from wan_grpc.pipeline.checkpoint import Checkpoint, locate
from wan_grpc.pipeline.denoise import Prompts, predict
from wan_grpc.pipeline.experts import Choice
from wan_grpc.pipeline.image import Condition
from wan_grpc.pipeline.load import load
from wan_grpc.pipeline.video import VideoPipeline

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]

DEVICE = torch.device("cuda:0")
I2V_MODEL = "Wan-AI/Wan2.2-I2V-A14B-Diffusers"
TI2V_MODEL = "Wan-AI/Wan2.2-TI2V-5B-Diffusers"
# The real head size, so that the real kernels run, and depth enough for rounding to build up.
WIDER = {"num_attention_heads": 8, "attention_head_dim": 128, "ffn_dim": 2752, "num_layers": 8, "text_dim": 32}
GIB = 2**30


class Leave(Exception):
    """What an on_step raises to leave."""


@pytest.fixture(autouse=True, scope="module")
def _plain_fp32() -> Iterator[None]:
    """fp32 means fp32 in both: TF32 convolutions would hide what is compared."""
    allowed = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = allowed


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    theirs: WanPipeline | WanImageToVideoPipeline
    checkpoint: Checkpoint
    width: int
    height: int
    boundary_ratio: float | None

    def request(self, **changes: Any) -> Any:
        values = {"num_inference_steps": 3, "flow_shift": 5.0, "boundary_ratio": self.boundary_ratio, **changes}
        return tiny.video(**{"width": self.width, "height": self.height, "num_frames": 9, **values})


@pytest.fixture(scope="module", params=["i2v", "clip", "ti2v"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    """Image to video, the same with an image encoder, and text and image to video."""
    match request.param:
        case "i2v":
            theirs, boundary = tiny_images.make_i2v(shape=WIDER), 0.9
        case "clip":
            theirs, boundary = tiny_images.make_i2v({**tiny_images.CLIP, "added_kv_proj_dim": 1024}, WIDER), None
        case _:
            theirs, boundary = tiny_images.make_ti2v(WIDER), None
    saved = tiny.save(theirs, tmp_path_factory.mktemp(request.param))
    return Model(
        theirs=theirs.to(DEVICE),
        checkpoint=locate(str(saved), load_format="auto"),
        width=160,
        height=96,
        boundary_ratio=boundary,
    )


@pytest.fixture(scope="module")
def ours(model: Model) -> VideoPipeline:
    return load(model.checkpoint, device=str(DEVICE), dtype="float32", load_format="auto")


def test_fp32_is_the_reference(model: Model, ours: VideoPipeline) -> None:
    """Latents within 1e-4 and frames within 1/255 of diffusers on the same GPU; another image is caught."""
    video, image = model.request(), picture(model.width, model.height)
    theirs = tiny_images.with_images(model.theirs)
    expected = (
        tiny_images.reference(theirs, video, first=image),
        tiny_images.reference(theirs, video, first=image, output_type="np"),
    )
    found = errors(ours, video, frames_of(image), expected)
    assert found[0] < 1e-4
    assert found[1] <= 1 / 255 + 1e-6
    assert errors(ours, video, frames_of(picture(model.width, model.height, 9)), expected)[0] > 1e-4


@torch.no_grad()
def test_bf16_rounds_no_more_than_diffusers(model: Model, ours: VideoPipeline) -> None:
    """Error of a bf16 forward against fp32: at most 1.1 times that of diffusers in bf16 on the same input."""
    function = choose("auto", device=DEVICE, dtype=torch.bfloat16).function
    half = load(model.checkpoint, device=str(DEVICE), dtype="bfloat16", load_format="auto", attention=function)
    theirs = WanTransformer3DModel.from_pretrained(
        model.checkpoint.directory, subfolder="transformer", torch_dtype=torch.bfloat16
    ).to(DEVICE)
    shown, timestep, text, images = inputs(theirs)
    exact = ours.transformers[Expert.HIGH_NOISE]
    expected = exact.predict(shown.float(), timestep, text.float(), None if images is None else images.float())

    per_token = timestep if timestep.ndim == 1 else timestep.repeat_interleave(22 * 30, dim=1)
    error_of_theirs = tiny.relative_error(theirs(shown, per_token, text, images, return_dict=False)[0], expected)
    predicted = half.transformers[Expert.HIGH_NOISE].predict(shown, timestep, text, images)
    error_of_ours = tiny.relative_error(predicted, expected)
    print(f"error {error_of_ours:.5f}, of diffusers {error_of_theirs:.5f}")
    assert 1e-4 < error_of_theirs < 5e-2
    assert error_of_ours <= 1.1 * error_of_theirs


def inputs(
    transformer: WanTransformer3DModel,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """What one forward is given, 4,620 tokens: latents, a timestep for all or for each frame, text, images."""
    generator = torch.Generator().manual_seed(1)
    config = transformer.config
    shown = torch.randn(1, config.in_channels, 7, 44, 60, generator=generator)
    text = torch.randn(1, 512, 32, generator=generator)
    timestep = torch.tensor([900], device=DEVICE)
    if config.in_channels == config.out_channels:
        timestep = torch.tensor([[0.0] + [900.0] * 6], device=DEVICE)
    images = None
    if config.image_dim is not None:
        images = torch.randn(1, tiny_images.NUM_IMAGE_TOKENS, config.image_dim, generator=generator)
        images = images.to(DEVICE, torch.bfloat16)
    return shown.to(DEVICE, torch.bfloat16), timestep, text.to(DEVICE, torch.bfloat16), images


@torch.no_grad()
def test_a_prediction_never_waits_for_the_gpu(model: Model, ours: VideoPipeline) -> None:
    """With images, too, both passes of a guided step are enqueued without one host synchronization."""
    expert = ours.transformers[Expert.HIGH_NOISE]
    shown, timestep, text, images = inputs(expert)
    channels = expert.config["out_channels"]
    latents = shown[:, :channels].float()
    is_beside = shown.shape[1] > channels
    condition = Condition(
        channels=shown[:, channels:].float() if is_beside else None,
        first=None if is_beside else latents[:, :, :1].clone(),
        embedding=None if images is None else images.float(),
    )
    prompts = Prompts(positive=text.float(), negative=text.float())
    choice = Choice(expert=Expert.HIGH_NOISE, guidance_scale=4.0, is_guided=True)
    step = timestep.flatten()[-1].long()
    predict(expert, latents, step, prompts=prompts, condition=condition, choice=choice)
    torch.cuda.set_sync_debug_mode("error")
    try:
        predict(expert, latents, step, prompts=prompts, condition=condition, choice=choice)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("stage", [Stage.IMAGE, Stage.DENOISE])
def test_leaving_gives_the_memory_back(stage: Stage, model: Model, ours: VideoPipeline) -> None:
    """After leaving a video with an image as many bytes are allocated as before."""
    video, frames = model.request(), frames_of(picture(model.width, model.height))
    list(ours.generate(video, frames=frames, on_step=tiny.ignore))
    before = torch.cuda.memory_allocated(DEVICE)

    def leave(progress: Progress) -> None:
        if (progress.stage, progress.step) == (stage, 1):
            raise Leave

    with pytest.raises(Leave):
        list(ours.generate(video, frames=frames, on_step=leave))
    assert torch.cuda.memory_allocated(DEVICE) == before


# ---- the published shapes -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[I2V_MODEL, TI2V_MODEL])
def published(request: pytest.FixtureRequest) -> Iterator[tuple[str, VideoPipeline]]:
    """A published model with random weights, as ranks load it."""
    checkpoint = locate(request.param, load_format="dummy")
    attention = choose("auto", device=DEVICE, dtype=torch.bfloat16).function
    yield (
        request.param,
        load(checkpoint, device=str(DEVICE), dtype="bfloat16", load_format="dummy", attention=attention),
    )
    torch.cuda.empty_cache()


@pytest.mark.parametrize("is_usual", [True, False], ids=["one image", "two images, or none where that is served"])
def test_the_published_shapes_make_videos(is_usual: bool, published: tuple[str, VideoPipeline]) -> None:
    """Latents are finite, frames have their shape, and what a video took on the GPU is given back."""
    name, pipeline = published
    if name == I2V_MODEL:
        frames = frames_of(picture(480, 272), None if is_usual else picture(480, 272, 1))
        video = tiny.video(width=480, height=272, num_frames=17, num_inference_steps=3, boundary_ratio=0.9)
    else:
        frames = frames_of(picture(480, 256) if is_usual else None)
        video = tiny.video(width=480, height=256, num_frames=17, num_inference_steps=3, boundary_ratio=None)
    pipeline.latents(video, frames=frames, on_step=tiny.ignore)  # prompts stay, and so does what libraries load
    before = torch.cuda.memory_allocated(DEVICE)
    assert torch.isfinite(pipeline.latents(video, frames=frames, on_step=tiny.ignore)).all()
    made = torch.cat(list(pipeline.generate(video, frames=frames, on_step=tiny.ignore)))
    assert made.shape == (17, video.height, video.width, 3)
    assert torch.cuda.memory_allocated(DEVICE) == before


def test_memory_of_an_image_does_not_grow_with_length(published: tuple[str, VideoPipeline]) -> None:
    """Encoding takes as much for 81 frames of 1280 x 704 as for 17, but for the latents themselves."""
    name, pipeline = published
    frames = frames_of(picture(1280, 704))
    peaks, seconds = [], []

    for num_frames in (17, 81):
        told: list[Progress] = []

        def stop_after(progress: Progress, told: list[Progress] = told) -> None:
            told.append(progress)
            if progress.stage is Stage.DENOISE:
                raise Leave

        video = tiny.video(width=1280, height=704, num_frames=num_frames, boundary_ratio=None)
        torch.cuda.synchronize(DEVICE)
        torch.cuda.reset_peak_memory_stats(DEVICE)
        before = torch.cuda.memory_allocated(DEVICE)
        with pytest.raises(Leave):
            pipeline.latents(video, frames=frames, on_step=stop_after)
        peaks.append(torch.cuda.max_memory_allocated(DEVICE) - before)
        seconds.append(sum(progress.step_time_s or 0.0 for progress in told if progress.stage is Stage.IMAGE))
    print(f"{name}: images of 17 and 81 frames in {seconds} s, with {[round(peak / GIB, 2) for peak in peaks]} GiB")
    assert peaks[1] < peaks[0] + 0.25 * GIB
