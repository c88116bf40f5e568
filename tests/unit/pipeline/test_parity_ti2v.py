"""Text, with an image or without, made into videos by diffusers with `expand_timesteps` and by ours, in fp32 on CPU."""

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import WanPipeline
from PIL import Image

from tests import tiny, tiny_images
from tests.tiny_images import errors, frames_of, picture
from wan_grpc.domain.request import VideoRequest
from wan_grpc.pipeline import encode
from wan_grpc.pipeline.image import Condition
from wan_grpc.pipeline.video import VideoPipeline

MAX_LATENT_ERROR = 1e-4
MAX_FRAME_ERROR = 1 / 255 + 1e-6
LANDSCAPE = {"width": 96, "height": 64}
PORTRAIT = {"width": 64, "height": 96}
UNGUIDED = {"guidance_scale": 1.0, "guidance_scale_2": 1.0}

CASES: Mapping[str, tuple[dict[str, Any], bool]] = {
    "one frame": ({**LANDSCAPE, "num_frames": 1}, False),
    "one frame from an image": ({**LANDSCAPE, "num_frames": 1}, True),
    "portrait": (PORTRAIT, False),
    "portrait from an image": (PORTRAIT, True),
    "no guidance": ({**LANDSCAPE, **UNGUIDED}, False),
    "from an image, no guidance": ({**LANDSCAPE, **UNGUIDED}, True),
    "17 frames": ({**LANDSCAPE, "num_frames": 17}, False),
    "17 frames from an image": ({**LANDSCAPE, "num_frames": 17}, True),
}


def request(**changes: Any) -> VideoRequest:
    return tiny.video(**{"num_inference_steps": 3, "flow_shift": 5.0, "boundary_ratio": None, **changes})


@pytest.fixture(scope="module")
def theirs() -> WanPipeline:
    return tiny_images.make_ti2v()


@pytest.fixture(scope="module")
def ours(theirs: WanPipeline) -> VideoPipeline:
    return tiny_images.ours(theirs)


def reference(theirs: WanPipeline, video: VideoRequest, first: Image.Image | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents and frames of diffusers, which are no flat grey that would equal any other."""
    pipeline = tiny_images.with_images(theirs) if first else theirs
    latents = tiny_images.reference(pipeline, video, first=first)
    frames = tiny_images.reference(pipeline, video, first=first, output_type="np")
    assert float(frames.std()) > 0.1
    return latents, frames


@pytest.mark.parametrize("name", CASES)
def test_ours_is_the_reference(name: str, theirs: WanPipeline, ours: VideoPipeline) -> None:
    """Latents within 1e-4 and frames within 1/255 of diffusers; another picture, or none, is caught."""
    changes, has_image = CASES[name]
    video = request(**changes)
    first = picture(video.width, video.height) if has_image else None
    expected = reference(theirs, video, first)
    found = errors(ours, video, frames_of(first), expected)
    assert found[0] < MAX_LATENT_ERROR
    assert found[1] <= MAX_FRAME_ERROR

    other = None if has_image else picture(video.width, video.height, 9)
    found = errors(ours, video, frames_of(other), expected)
    assert found[0] > MAX_LATENT_ERROR
    assert found[1] > MAX_FRAME_ERROR


def test_diffusers_runs_our_transformer_with_a_timestep_a_token(theirs: WanPipeline, ours: VideoPipeline) -> None:
    """Bit for bit: WanPipeline tells our transformer the timestep of each token, as it tells its own."""
    video = request(**LANDSCAPE)
    mixed = WanPipeline(
        **{**theirs.components, "transformer": tiny_images.our_transformer(theirs.transformer)}, expand_timesteps=True
    )
    mixed.set_progress_bar_config(disable=True)
    assert torch.equal(tiny_images.reference(mixed, video), tiny_images.reference(theirs, video))


def _tell_all_tokens_one_timestep(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Condition, "timesteps", lambda _, timestep, __: timestep.expand(1))


def _call_the_rest_free_of_noise(patch: pytest.MonkeyPatch) -> None:
    def swapped(_: Condition, timestep: torch.Tensor, num_latent_frames: int) -> torch.Tensor:
        return F.pad(timestep.float().view(1, 1), (0, num_latent_frames - 1))

    patch.setattr(Condition, "timesteps", swapped)


def _show_only_noise(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Condition, "shown", lambda _, latents: latents)


def _lose_the_image_at_the_end(patch: pytest.MonkeyPatch) -> None:
    kept = Condition.kept
    patch.setattr(Condition, "shown", kept)
    patch.setattr(Condition, "kept", lambda _, latents: latents)


def _leave_latents_unscaled(patch: pytest.MonkeyPatch) -> None:
    to_latents = encode.to_latents

    def unscaled(vae: Any, encoded: Any) -> torch.Tensor:
        mean, std = (torch.tensor(vae.config[name]).view(1, -1, 1, 1, 1) for name in ("latents_mean", "latents_std"))
        return to_latents(vae, encoded) * std + mean

    patch.setattr(encode, "to_latents", unscaled)


def _pack_pixels_in_another_order(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(
        encode, "patchify", lambda pixels, patch_size: F.pixel_unshuffle(pixels[:, :, 0], patch_size)[:, :, None]
    )


MISTAKES: list[Callable[[pytest.MonkeyPatch], None]] = [
    _tell_all_tokens_one_timestep,
    _call_the_rest_free_of_noise,
    _show_only_noise,
    _lose_the_image_at_the_end,
    _leave_latents_unscaled,
    _pack_pixels_in_another_order,
]


@pytest.fixture(scope="module")
def from_an_image(theirs: WanPipeline) -> tuple[VideoRequest, Image.Image, tuple[torch.Tensor, torch.Tensor]]:
    """A request with its image and what diffusers makes of it."""
    video = request(**LANDSCAPE, num_frames=9)
    first = picture(video.width, video.height)
    return video, first, reference(theirs, video, first)


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.__name__.strip("_"))
def test_a_mistake_is_caught(
    mistake: Callable[[pytest.MonkeyPatch], None],
    ours: VideoPipeline,
    from_an_image: tuple[VideoRequest, Image.Image, tuple[torch.Tensor, torch.Tensor]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whatever is done wrong to the image or its timestep breaks both bounds."""
    video, first, expected = from_an_image
    mistake(monkeypatch)
    found = errors(ours, video, frames_of(first), expected)
    assert found[0] > MAX_LATENT_ERROR
    assert found[1] > MAX_FRAME_ERROR
