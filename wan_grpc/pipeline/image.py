"""What input images fix of a video, for the models that are shown them.

Knows the two ways of Wan2.2, latent channels beside the noise and a latent frame in place of it, and the embedding of
Wan2.1. Does not know how images are read, nor what denoises.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan

from wan_grpc.domain.events import Progress, Stage
from wan_grpc.domain.images import InputFrames
from wan_grpc.domain.request import VideoRequest
from wan_grpc.pipeline import encode
from wan_grpc.pipeline.device import Stopwatch
from wan_grpc.pipeline.image_encoder import ImageEncoder
from wan_grpc.pipeline.strips import WHOLE, Strips


@dataclass(frozen=True, slots=True, kw_only=True)
class Condition:
    """What a video is bound to beside its text; all None for text alone."""

    channels: torch.Tensor | None = None
    """[1, 4 + C, F, h, w], fp32: which of its frames are given, and the latents of a video of just those."""
    first: torch.Tensor | None = None
    """[1, C, 1, h, w], fp32: the latent frame that it begins with, free of noise from the first step on."""
    embedding: torch.Tensor | None = None
    """[n, num_tokens, image_dim]: the image encoder's view of n images."""

    def shown(self, latents: torch.Tensor) -> torch.Tensor:
        """What an expert is shown of `latents` [1, C, F, h, w]: C channels, or 4 + 2C with images beside them."""
        if self.channels is not None:
            return torch.cat([latents, self.channels], dim=1)
        return self.kept(latents)

    def kept(self, latents: torch.Tensor) -> torch.Tensor:
        """`latents` [1, C, F, h, w] with the first frame that is given, if one is."""
        if self.first is None:
            return latents
        return torch.cat([self.first, latents[:, :, 1:]], dim=2)

    def timesteps(self, timestep: torch.Tensor, num_latent_frames: int) -> torch.Tensor:
        """How noisy the latents are at `timestep` (no dimensions): [1] for all, or [1, F] with 0 for a given frame."""
        if self.first is None:
            return timestep.expand(1)
        return F.pad(timestep.float().expand(1, num_latent_frames - 1), (1, 0))


TEXT_ALONE: Final = Condition()


class ImageConditioner:
    """Makes conditions for one model. Holds nothing of a request."""

    def __init__(self, vae: AutoencoderKLWan, *, keeps_first: bool, image_encoder: ImageEncoder | None) -> None:
        """keeps_first: whether an image stands in the latents themselves (TI2V) rather than beside them (I2V)."""
        self._vae = vae
        self._keeps_first = keeps_first
        self._image_encoder = image_encoder

    def condition(
        self,
        video: VideoRequest,
        frames: InputFrames,
        *,
        strips: Strips = WHOLE,
        on_step: Callable[[Progress], None],
    ) -> Condition:
        """What the images of `video` fix of it; without images nothing.

        strips: who encodes which part of the pictures; the latents are whole again.
        `on_step` is called before the first chunk of pictures is encoded and whenever the device has finished one.
        """
        if frames.first is None:
            assert frames.last is None, "a last image comes with a first one"
            return TEXT_ALONE
        steps = _Steps(self._num_steps(video), self._vae.device, on_step)
        embedding = self._embed(video, frames, steps)
        if self._keeps_first:
            first = self._encode(video, frames.first, None, num_chunks=1, strips=strips, steps=steps)
            return Condition(first=first, embedding=embedding)
        num_chunks = self._num_latent_frames(video)
        latents = self._encode(video, frames.first, frames.last, num_chunks=num_chunks, strips=strips, steps=steps)
        mask = self._given(latents, has_last=frames.last is not None)
        return Condition(channels=torch.cat([mask, latents], dim=1), embedding=embedding)

    def _num_latent_frames(self, video: VideoRequest) -> int:
        return (video.num_frames - 1) // self._temporal_factor + 1

    @property
    def _temporal_factor(self) -> int:
        factor: int = self._vae.config["scale_factor_temporal"]
        return factor

    def _num_steps(self, video: VideoRequest) -> int:
        num_chunks = 1 if self._keeps_first else self._num_latent_frames(video)
        return num_chunks + (self._image_encoder is not None)

    def _embed(self, video: VideoRequest, frames: InputFrames, steps: "_Steps") -> torch.Tensor | None:
        if self._image_encoder is None:
            return None
        images = [image for image in (frames.first, frames.last) if image is not None]
        embedding = self._image_encoder.encode(images, width=video.width, height=video.height)
        steps.finish()
        return embedding

    def _encode(
        self, video: VideoRequest, first: bytes, last: bytes | None, *, num_chunks: int, strips: Strips, steps: "_Steps"
    ) -> torch.Tensor:
        factor = self._vae.config["scale_factor_spatial"]
        strip = strips.of(video.height // factor, video.width // factor)
        ends = [
            None if image is None else strip.cut(to_pixels(image, video)).to(self._vae.device)
            for image in (first, last)
        ]
        assert ends[0] is not None
        pixels = encode.chunks(ends[0], ends[1], num_chunks=num_chunks, size=self._temporal_factor)
        encoded: list[torch.Tensor] = []
        for part in encode.slices(self._vae, pixels, strip):
            encoded.append(strip.join(part))
            steps.finish()
        return encode.to_latents(self._vae, encoded)

    def _given(self, latents: torch.Tensor, *, has_last: bool) -> torch.Tensor:
        """[1, 4, F, h, w]: 1 where a frame is given. Latent frame f stands for the 4 frames that end with frame 4f."""
        given = latents.new_zeros((1, self._temporal_factor, *latents.shape[2:]))
        given[:, :, 0] = 1.0
        if has_last:
            given[:, -1, -1] = 1.0
        return given


def to_pixels(image: bytes, video: VideoRequest) -> torch.Tensor:
    """RGB24 of the size of `video` -> [1, 3, H, W] in -1 to 1, fp32, on the CPU, as diffusers prepares a picture."""
    rows = torch.frombuffer(bytearray(image), dtype=torch.uint8).view(1, video.height, video.width, 3)
    return 2.0 * (rows.permute(0, 3, 1, 2).float() / 255.0) - 1.0


class _Steps:
    """Tells of the image stage, one step after the other."""

    def __init__(self, total: int, device: torch.device, on_step: Callable[[Progress], None]) -> None:
        self._total = total
        self._device = device
        self._on_step = on_step
        self._finished = 0
        on_step(Progress(stage=Stage.IMAGE, step=0, total_steps=total))
        self._watch = Stopwatch(device)

    def finish(self) -> None:
        """Wait until the device has finished this step, tell it, and start the next one."""
        self._finished += 1
        time_s = self._watch.finish()
        self._on_step(Progress(stage=Stage.IMAGE, step=self._finished, total_steps=self._total, step_time_s=time_s))
        self._watch = Stopwatch(self._device)
