"""Images made into videos by diffusers' WanImageToVideoPipeline and by ours, in fp32 on the CPU."""

import io
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from diffusers import WanImageToVideoPipeline
from PIL import Image

from tests import tiny, tiny_images
from tests.tiny_images import errors, frames_of, picture
from wan_grpc.domain.images import ImageFit, InputFrames
from wan_grpc.domain.request import VideoRequest
from wan_grpc.media.image import read_picture
from wan_grpc.pipeline import encode, image
from wan_grpc.pipeline.image import Condition, ImageConditioner
from wan_grpc.pipeline.video import VideoPipeline

MAX_LATENT_ERROR = 1e-4
MAX_FRAME_ERROR = 1 / 255 + 1e-6
LANDSCAPE = {"width": 80, "height": 48}
PORTRAIT = {"width": 48, "height": 80}
UNGUIDED = {"guidance_scale": 1.0, "guidance_scale_2": 1.0}

CASES: Mapping[str, tuple[dict[str, Any], bool]] = {
    "one frame": ({**LANDSCAPE, "num_frames": 1}, False),
    "landscape": (LANDSCAPE, False),
    "landscape to a last image": (LANDSCAPE, True),
    "portrait, no guidance": ({**PORTRAIT, **UNGUIDED}, False),
    "portrait to a last image, no guidance": ({**PORTRAIT, **UNGUIDED}, True),
    "17 frames": ({**PORTRAIT, "num_frames": 17}, False),
    "17 frames to a last image": ({**LANDSCAPE, "num_frames": 17}, True),
    "high-noise expert alone": ({**LANDSCAPE, "boundary_ratio": None}, False),
}


def request(**changes: Any) -> VideoRequest:
    """Three steps, of which the last is the low-noise expert's."""
    return tiny.video(**{"num_inference_steps": 3, "flow_shift": 5.0, "boundary_ratio": 0.9, **changes})


def images(video: VideoRequest, *, has_last: bool, seed: int = 0) -> tuple[Image.Image, Image.Image | None]:
    last = picture(video.width, video.height, seed + 1) if has_last else None
    return picture(video.width, video.height, seed), last


@pytest.fixture(scope="module")
def theirs() -> WanImageToVideoPipeline:
    return tiny_images.make_i2v()


@pytest.fixture(scope="module")
def ours(theirs: WanImageToVideoPipeline) -> VideoPipeline:
    return tiny_images.ours(theirs)


def reference(
    theirs: WanImageToVideoPipeline, video: VideoRequest, first: Image.Image, last: Image.Image | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents and frames of diffusers, which are no flat grey that would equal any other."""
    latents = tiny_images.reference(theirs, video, first=first, last=last)
    frames = tiny_images.reference(theirs, video, first=first, last=last, output_type="np")
    assert float(frames.std()) > 0.1
    return latents, frames


def assert_equal(found: tuple[float, float]) -> None:
    assert found[0] < MAX_LATENT_ERROR
    assert found[1] <= MAX_FRAME_ERROR


def assert_caught(found: tuple[float, float]) -> None:
    assert found[0] > MAX_LATENT_ERROR
    assert found[1] > MAX_FRAME_ERROR


@pytest.mark.parametrize("name", CASES)
def test_ours_is_the_reference(name: str, theirs: WanImageToVideoPipeline, ours: VideoPipeline) -> None:
    """Latents within 1e-4 and frames within 1/255 of diffusers; another picture in place of the last is caught."""
    changes, has_last = CASES[name]
    video = request(**changes)
    first, last = images(video, has_last=has_last)
    expected = reference(theirs, video, first, last)
    assert_equal(errors(ours, video, frames_of(first, last), expected))
    other = picture(video.width, video.height, 9)
    mistaken = frames_of(first, other) if has_last else frames_of(other)
    assert_caught(errors(ours, video, mistaken, expected))


@pytest.mark.parametrize(
    ("config", "has_last"),
    [(tiny_images.CLIP, False), (tiny_images.FIRST_TO_LAST, True)],
    ids=["first", "first and last"],
)
def test_an_image_encoder_is_used(config: dict[str, Any], has_last: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With CLIP, too, ours is the reference, and what it says of the image matters."""
    theirs = tiny_images.make_i2v(config)
    ours = tiny_images.ours(theirs)
    video = request(**LANDSCAPE, boundary_ratio=None)
    first, last = images(video, has_last=has_last)
    expected = reference(theirs, video, first, last)
    assert_equal(errors(ours, video, frames_of(first, last), expected))

    assert ours.image_encoder is not None
    encoded = ours.image_encoder.encode
    monkeypatch.setattr(ours.image_encoder, "encode", lambda *args, **kw: encoded(*args, **kw).flip(-1))
    assert_caught(errors(ours, video, frames_of(first, last), expected))


@pytest.mark.parametrize("fit", [ImageFit.STRETCH, ImageFit.COVER, ImageFit.CONTAIN], ids=str)
def test_an_image_of_another_size_is_fitted(
    fit: ImageFit, theirs: WanImageToVideoPipeline, ours: VideoPipeline
) -> None:
    """Our reading and fitting of a file against diffusers, given what a fit makes of it.

    For a stretch diffusers is given the picture as it is, and resizes it by itself.
    """
    video = request(**LANDSCAPE)
    original, size = picture(123, 57), (video.width, video.height)
    file = io.BytesIO()
    original.save(file, "PNG")
    read = read_picture(file.getvalue(), field="spec.image", max_bytes=10**6, max_pixels=10**6)
    fitted = read.fitted(*size, fit)
    given = original if fit is ImageFit.STRETCH else Image.frombytes("RGB", size, fitted)
    expected = reference(theirs, video, given)
    assert_equal(errors(ours, video, InputFrames(first=fitted), expected))
    other = ImageFit.COVER if fit is ImageFit.STRETCH else ImageFit.STRETCH
    assert_caught(errors(ours, video, InputFrames(first=read.fitted(*size, other)), expected))


def _invert_the_mask(patch: pytest.MonkeyPatch) -> None:
    given = ImageConditioner._given
    patch.setattr(ImageConditioner, "_given", lambda *args, **kw: 1.0 - given(*args, **kw))


def _forget_the_last_frame_in_the_mask(patch: pytest.MonkeyPatch) -> None:
    given = ImageConditioner._given
    patch.setattr(ImageConditioner, "_given", lambda *args, **_: given(*args, has_last=False))


def _let_pixels_begin_at_zero(patch: pytest.MonkeyPatch) -> None:
    to_pixels = image.to_pixels
    patch.setattr(image, "to_pixels", lambda *args: to_pixels(*args) / 2 + 0.5)


def _swap_colours(patch: pytest.MonkeyPatch) -> None:
    to_pixels = image.to_pixels
    patch.setattr(image, "to_pixels", lambda *args: to_pixels(*args).flip(1))


def _leave_latents_unscaled(patch: pytest.MonkeyPatch) -> None:
    to_latents = encode.to_latents

    def unscaled(vae: Any, encoded: Any) -> torch.Tensor:
        mean, std = (torch.tensor(vae.config[name]).view(1, -1, 1, 1, 1) for name in ("latents_mean", "latents_std"))
        return to_latents(vae, encoded) * std + mean

    patch.setattr(encode, "to_latents", unscaled)


def _fill_with_black(patch: pytest.MonkeyPatch) -> None:
    chunks = encode.chunks

    def black(*args: Any, **kw: Any) -> Any:
        return (torch.where(chunk == 0.0, -1.0, chunk) for chunk in chunks(*args, **kw))

    patch.setattr(encode, "chunks", black)


def _put_the_mask_behind(patch: pytest.MonkeyPatch) -> None:
    def shown(condition: Condition, latents: torch.Tensor) -> torch.Tensor:
        assert condition.channels is not None
        return torch.cat([latents, condition.channels[:, 4:], condition.channels[:, :4]], dim=1)

    patch.setattr(Condition, "shown", shown)


def _forget_what_was_before_a_chunk(patch: pytest.MonkeyPatch) -> None:
    encode_chunk = encode._encode_chunk

    def forgetful(vae: Any, chunk: torch.Tensor, features: list[Any]) -> torch.Tensor:
        for feature in features:
            if feature is not None:
                feature.zero_()
        return encode_chunk(vae, chunk, features)

    patch.setattr(encode, "_encode_chunk", forgetful)


MISTAKES: list[Callable[[pytest.MonkeyPatch], None]] = [
    _invert_the_mask,
    _forget_the_last_frame_in_the_mask,
    _let_pixels_begin_at_zero,
    _swap_colours,
    _leave_latents_unscaled,
    _fill_with_black,
    _put_the_mask_behind,
    _forget_what_was_before_a_chunk,
]


@pytest.fixture(scope="module")
def first_to_last(
    theirs: WanImageToVideoPipeline,
) -> tuple[VideoRequest, Image.Image, Image.Image, tuple[torch.Tensor, torch.Tensor]]:
    """A request with its images and what diffusers makes of it."""
    video = request(**LANDSCAPE, num_frames=9)
    first, last = images(video, has_last=True)
    assert last is not None
    return video, first, last, reference(theirs, video, first, last)


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.__name__.strip("_"))
def test_a_mistake_is_caught(
    mistake: Callable[[pytest.MonkeyPatch], None],
    ours: VideoPipeline,
    first_to_last: tuple[VideoRequest, Image.Image, Image.Image, tuple[torch.Tensor, torch.Tensor]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whatever is done wrong to image or mask breaks both bounds."""
    video, first, last, expected = first_to_last
    mistake(monkeypatch)
    assert_caught(errors(ours, video, frames_of(first, last), expected))


def test_a_dropped_or_swapped_image_is_caught(
    ours: VideoPipeline,
    first_to_last: tuple[VideoRequest, Image.Image, Image.Image, tuple[torch.Tensor, torch.Tensor]],
) -> None:
    """The last image is not left out, and the two do not change places."""
    video, first, last, expected = first_to_last
    assert_equal(errors(ours, video, frames_of(first, last), expected))
    assert_caught(errors(ours, video, frames_of(first), expected))
    assert_caught(errors(ours, video, frames_of(last, first), expected))
