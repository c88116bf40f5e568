"""The VAE of the small models on whole clips."""

import random

import pytest
import torch
from diffusers import AutoencoderKLWan

from training import vae as vaes
from training.render import render
from training.world import draw_scene


@pytest.fixture(scope="module")
def vae() -> AutoencoderKLWan:
    return vaes.make_vae(seed=1).requires_grad_(False)


def clip(num_frames: int) -> torch.Tensor:
    return torch.rand(2, 3, num_frames, 32, 24, generator=torch.Generator().manual_seed(num_frames)) * 2 - 1


@pytest.mark.parametrize("num_frames", [1, 5, 9, 17])
def test_whole_clips_are_what_slices_are(vae: AutoencoderKLWan, num_frames: int) -> None:
    """Latents and pixels of a clip in one piece equal those that diffusers makes slice by slice."""
    pixels = clip(num_frames)
    latents = vae.encode(pixels).latent_dist.mode()
    with vaes.whole_clips(vae):
        mean, _ = vaes.encode(vae, pixels)
        made = vaes.decode(vae, mean)
    assert mean.shape == latents.shape == (2, 16, (num_frames + 3) // 4, 4, 3)
    assert (mean - latents).abs().max() < 1e-5 * latents.abs().max()
    expected = vae.decode(latents).sample
    assert (made.clamp(-1, 1) - expected).abs().max() < 5e-5


def test_the_first_frame_stands_alone(vae: AutoencoderKLWan) -> None:
    """Its latents are those of the frame by itself, which is how a model that takes an image is given it."""
    pixels = clip(9)
    with vaes.whole_clips(vae):
        mean, _ = vaes.encode(vae, pixels)
        alone, _ = vaes.encode(vae, pixels[:, :, :1])
    assert (mean[:, :, :1] - alone).abs().max() < 1e-5 * alone.abs().max()


def test_half_precision(vae: AutoencoderKLWan, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every convolution gets bf16, although norms give fp32, and the loss is that of fp32 within a hundredth."""
    pixels, dtypes = clip(5), []
    convolve = torch.nn.functional.conv2d

    def noted(x: torch.Tensor, *args: object, **named: object) -> torch.Tensor:
        dtypes.append(x.dtype)
        return convolve(x, *args, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(torch.nn.functional, "conv2d", noted)

    def total() -> float:
        parts = vaes.loss(vae, pixels, generator=torch.Generator().manual_seed(1), weights=vaes.Weights())
        return float(parts["total"])

    with vaes.whole_clips(vae):
        exact = total()
        num_convolutions = len(dtypes)
        dtypes.clear()
        with torch.autocast("cpu", torch.bfloat16):
            assert total() == pytest.approx(exact, rel=1e-2)
    assert dtypes.count(torch.bfloat16) >= num_convolutions - 8  # resampling is torch's own, which casts inside


def test_slices_are_left_as_they_were(vae: AutoencoderKLWan) -> None:
    """After the block diffusers' own way gives the same as before, also when the block failed."""
    pixels = clip(9)
    before = vae.encode(pixels).latent_dist.mode()
    with pytest.raises(ZeroDivisionError), vaes.whole_clips(vae):
        raise ZeroDivisionError
    assert torch.equal(vae.encode(pixels).latent_dist.mode(), before)


def test_it_learns() -> None:
    """Thirty steps on one rendered clip lower the loss by a quarter, and gradients reach every parameter."""
    vae = vaes.make_vae(seed=2)
    scenes = [draw_scene(random.Random(1))]
    pixels = render(scenes, height=32, width=32, num_frames=5, seed=1)[0]
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3)
    losses = []
    for step in range(30):
        generator = torch.Generator().manual_seed(step)
        with vaes.whole_clips(vae):
            parts = vaes.loss(vae, pixels, generator=generator, weights=vaes.Weights())
        optimizer.zero_grad()
        parts["total"].backward()
        assert all(parameter.grad is not None for parameter in vae.parameters())
        optimizer.step()
        losses.append(float(parts["total"].detach()))
    assert losses[-1] < 0.75 * losses[0]


def test_a_new_one_tells_clips_apart() -> None:
    """Most of what a new one makes depends on what it is given, and its latents are no noise.

    Of the class as torch makes it the first does not hold: it makes nearly the same of everything.
    """

    def share(vae: AutoencoderKLWan) -> float:
        """Of the variance of what it makes, that between different clips."""
        scenes = [draw_scene(random.Random(number)) for number in range(6)]
        pixels = render(scenes, height=32, width=32, num_frames=5, seed=1)[0]
        with torch.no_grad(), vaes.whole_clips(vae):
            mean, _ = vaes.encode(vae, pixels)
            made = vaes.decode(vae, mean)
        return float(made.var(0).mean() / made.var((0, 2, 3, 4)).mean())

    new = vaes.make_vae(seed=2)
    torch.manual_seed(2)
    ordinary: AutoencoderKLWan = AutoencoderKLWan.from_config(vaes.CONFIG)
    assert share(new) > 0.5 > share(ordinary)
    with torch.no_grad(), vaes.whole_clips(new):
        mean, log_variance = vaes.encode(new, clip(5))
    assert float(log_variance.exp().mean().sqrt()) < 0.2 * float(mean.std())


def test_psnr() -> None:
    """A tenth of the range everywhere is 20 dB."""
    assert float(vaes.psnr(torch.full((4, 4), 0.2))) == pytest.approx(20.0)
