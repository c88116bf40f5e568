from dataclasses import replace

import pytest
import torch
from diffusers import WanImageToVideoPipeline
from diffusers.video_processor import VideoProcessor
from PIL import Image

from tests import tiny, tiny_images
from tests.tiny_images import frames_of, picture
from wan_grpc.domain.events import Progress, Stage
from wan_grpc.domain.images import InputFrames
from wan_grpc.pipeline.image import TEXT_ALONE, Condition, ImageConditioner, to_pixels


@pytest.fixture(scope="module")
def theirs() -> WanImageToVideoPipeline:
    return tiny_images.make_i2v()


def test_pixels_are_those_of_diffusers() -> None:
    """Every value of a byte becomes, bit for bit, what diffusers makes of it, each in its place and colour."""
    values = torch.arange(3 * 32 * 16).view(32, 16, 3).remainder(256).to(torch.uint8)
    image = Image.frombytes("RGB", (16, 32), values.numpy().tobytes())
    expected = VideoProcessor().preprocess(image, height=32, width=16)
    actual = to_pixels(image.tobytes(), tiny.video(width=16, height=32))
    assert torch.equal(actual, expected)
    assert (float(actual.min()), float(actual.max())) == (-1.0, 1.0)


@pytest.mark.parametrize(("num_frames", "has_last"), [(1, False), (9, False), (9, True)], ids=str)
@torch.no_grad()
def test_channels_are_those_of_diffusers(num_frames: int, has_last: bool, theirs: WanImageToVideoPipeline) -> None:
    """Mask and latents beside the noise are, bit for bit, what diffusers prepares."""
    video = tiny.video(width=48, height=32, num_frames=num_frames)
    first, last = picture(48, 32), picture(48, 32, 1) if has_last else None
    prepare = theirs.video_processor.preprocess
    _, expected = theirs.prepare_latents(
        prepare(first, height=32, width=48),
        batch_size=1,
        height=32,
        width=48,
        num_frames=num_frames,
        dtype=torch.float32,
        device=torch.device("cpu"),
        last_image=last and prepare(last, height=32, width=48),
    )
    conditioner = ImageConditioner(theirs.vae, keeps_first=False, image_encoder=None)
    condition = conditioner.condition(video, frames_of(first, last), on_step=tiny.ignore)
    assert condition.channels is not None
    assert torch.equal(condition.channels, expected)
    assert (condition.first, condition.embedding) == (None, None)


def test_nothing_is_done_without_an_image(theirs: WanImageToVideoPipeline) -> None:
    """No stage is told, and latents and timestep are those of text alone."""
    told: list[Progress] = []
    conditioner = ImageConditioner(theirs.vae, keeps_first=True, image_encoder=None)
    assert conditioner.condition(tiny.VIDEO, InputFrames(), on_step=told.append) is TEXT_ALONE
    latents = torch.randn(1, 16, 3, 4, 4)
    assert told == []
    assert TEXT_ALONE.shown(latents) is TEXT_ALONE.kept(latents) is latents
    assert torch.equal(TEXT_ALONE.timesteps(torch.tensor(7), 3), torch.tensor([7]))


def test_a_kept_frame_has_no_noise() -> None:
    """It stands in front of the other latents, and its timestep is 0 while theirs is that of the step."""
    first, latents = torch.randn(1, 2, 1, 4, 4), torch.randn(1, 2, 3, 4, 4)
    condition = Condition(first=first)
    assert torch.equal(condition.shown(latents), torch.cat([first, latents[:, :, 1:]], dim=2))
    assert torch.equal(condition.kept(latents), condition.shown(latents))
    assert torch.equal(condition.timesteps(torch.tensor(7), 3), torch.tensor([[0.0, 7.0, 7.0]]))
    assert torch.equal(condition.timesteps(torch.tensor(7), 1), torch.tensor([[0.0]]))


@pytest.mark.parametrize(
    ("keeps_first", "has_encoder", "total"),
    [(False, False, 3), (False, True, 4), (True, False, 1)],
    ids=["I2V-A14B", "with an image encoder", "TI2V-5B"],
)
def test_every_chunk_is_told(keeps_first: bool, has_encoder: bool, total: int) -> None:
    """Step 0 before the first, then each when it is done, with its time: one an encoded chunk, one for the encoder."""
    theirs = tiny_images.make_i2v(tiny_images.CLIP if has_encoder else tiny_images.I2V)
    told: list[Progress] = []
    conditioner = ImageConditioner(
        theirs.vae, keeps_first=keeps_first, image_encoder=tiny_images.ours(theirs).image_encoder
    )
    video = tiny.video(width=48, height=32, num_frames=9)
    conditioner.condition(video, frames_of(picture(48, 32)), on_step=told.append)
    assert [replace(progress, step_time_s=None) for progress in told] == [
        Progress(stage=Stage.IMAGE, step=step, total_steps=total) for step in range(total + 1)
    ]
    assert [progress.step_time_s is None for progress in told] == [True] + [False] * total
