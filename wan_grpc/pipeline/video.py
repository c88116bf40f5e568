"""One video from start to end on one device: text, images, noise, denoising, decoding.

Knows the order of the stages and reports each. Does not know who asked, nor where the pictures go.
"""

from collections.abc import Callable, Generator, Mapping
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan

from wan_grpc.domain.events import Progress, Stage
from wan_grpc.domain.images import InputFrames
from wan_grpc.domain.request import VideoRequest
from wan_grpc.domain.variants import Expert
from wan_grpc.pipeline import decode, preview
from wan_grpc.pipeline.denoise import Prompts, RunPasses, denoise, run_in_turn
from wan_grpc.pipeline.device import Stopwatch
from wan_grpc.pipeline.experts import is_guided
from wan_grpc.pipeline.image import Condition, ImageConditioner
from wan_grpc.pipeline.image_encoder import ImageEncoder
from wan_grpc.pipeline.latents import draw_noise, latent_shape
from wan_grpc.pipeline.preview import OnPreview
from wan_grpc.pipeline.schedule import Schedule
from wan_grpc.pipeline.strips import WHOLE, Strips
from wan_grpc.pipeline.text import TextEncoder
from wan_grpc.pipeline.transformer import WanTransformer


class VideoPipeline:
    """A loaded model. Holds nothing of a request but the embeddings of recent prompts; one video at a time."""

    def __init__(
        self,
        *,
        text_encoder: TextEncoder,
        transformers: Mapping[Expert, WanTransformer],
        vae: AutoencoderKLWan,
        scheduler_config: Mapping[str, Any],
        device: torch.device,
        attention_name: str,
        image_encoder: ImageEncoder | None = None,
        expand_timesteps: bool = False,
    ) -> None:
        """See the parts' own classes.

        transformers: the high-noise expert alone, or both.
        image_encoder: None for checkpoints that have none.
        expand_timesteps: whether tokens have timesteps of their own, so that an image can stand among them (TI2V).
        """
        self.text_encoder = text_encoder
        self.transformers = transformers
        self.vae = vae
        self.device = device
        self.attention_name = attention_name
        self.scheduler_config = scheduler_config
        self.image_encoder = image_encoder
        self.run_passes: RunPasses = run_in_turn
        """Who runs the passes of a guided step; as with the other divisions, one device unless somebody divides."""
        self.strips: Strips = WHOLE
        """Who encodes and decodes which part of pictures."""
        self._conditioner = ImageConditioner(
            vae,
            keeps_first=expand_timesteps,
            image_encoder=image_encoder if self._embeds_images else None,
        )

    @property
    def dtype_name(self) -> str:
        """What the experts compute in, e.g. `bfloat16`."""
        return str(self.transformers[Expert.HIGH_NOISE].compute_dtype).removeprefix("torch.")

    @property
    def _embeds_images(self) -> bool:
        return self.transformers[Expert.HIGH_NOISE].config["image_dim"] is not None

    def generate(
        self,
        video: VideoRequest,
        *,
        frames: InputFrames = InputFrames(),
        on_step: Callable[[Progress], None],
        on_preview: OnPreview | None = None,
    ) -> Generator[torch.Tensor, None, None]:
        """The pictures of `video`, in order, as they are decoded: uint8 RGB [n, H, W, 3] on the CPU, 1 first, then 4s.

        frames: the images that it begins and ends with, at its size.
        on_step: called with step 0 when a stage starts and then whenever the device has finished a step of it. What it
            raises ends the video at once; nothing of it stays behind, and the next video is not affected.
        on_preview: called after every `video.preview_every_steps` denoising steps, with a picture of what they predict.
        """
        latents = self.latents(video, frames=frames, on_step=on_step, on_preview=on_preview)
        yield from decode.frames(self.vae, latents, strips=self.strips, on_step=on_step)

    def latents(
        self,
        video: VideoRequest,
        *,
        frames: InputFrames = InputFrames(),
        on_step: Callable[[Progress], None],
        on_preview: OnPreview | None = None,
    ) -> torch.Tensor:
        """The denoised latents of `video`, [1, C, F, h, w], fp32 on the device."""
        prompts = self._encode(video, on_step)
        condition: Condition = self._conditioner.condition(video, frames, strips=self.strips, on_step=on_step)
        schedule = Schedule(
            self.scheduler_config,
            flow_shift=video.flow_shift,
            num_inference_steps=video.num_inference_steps,
            device=self.device,
        )

        def show(step: int, predicted: torch.Tensor) -> None:
            assert on_preview is not None
            watch = Stopwatch(self.device)
            pictures = preview.picture(self.vae, predicted, strips=self.strips)
            on_preview(step, pictures, watch.finish())

        return denoise(
            self._noise(video),
            video=video,
            prompts=prompts,
            condition=condition,
            schedule=schedule,
            transformers=self.transformers,
            on_step=on_step,
            on_prediction=None if on_preview is None else show,
            run_passes=self.run_passes,
        )

    def free_memory(self) -> None:
        """Give memory that is cached but not in use back to the device."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _encode(self, video: VideoRequest, on_step: Callable[[Progress], None]) -> Prompts:
        wanted = [video.prompt, video.negative_prompt] if is_guided(video) else [video.prompt]
        on_step(Progress(stage=Stage.TEXT, step=0, total_steps=len(wanted)))
        embeddings: list[torch.Tensor] = []
        encoded = self.text_encoder.encode_all(wanted)
        for index in range(len(wanted)):
            watch = Stopwatch(self.device)
            embeddings.append(next(encoded))
            time_s = watch.finish()
            on_step(Progress(stage=Stage.TEXT, step=index + 1, total_steps=len(wanted), step_time_s=time_s))
        return Prompts(positive=embeddings[0], negative=embeddings[1] if len(embeddings) > 1 else None)

    def _noise(self, video: VideoRequest) -> torch.Tensor:
        shape = latent_shape(
            video,
            num_channels=self.vae.config["z_dim"],
            temporal_factor=self.vae.config["scale_factor_temporal"],
            spatial_factor=self.vae.config["scale_factor_spatial"],
        )
        return draw_noise(shape, seed=video.seed).to(self.device)
