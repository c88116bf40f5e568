"""The noise that a video starts from: its shape, and the same values for one seed on every device."""

import torch

from wan_grpc.domain.request import VideoRequest


def latent_shape(
    video: VideoRequest, *, num_channels: int, temporal_factor: int, spatial_factor: int
) -> tuple[int, int, int, int, int]:
    """[1, C, F, h, w]: one latent frame for the first frame and one for every `temporal_factor` after it."""
    num_latent_frames = (video.num_frames - 1) // temporal_factor + 1
    return (1, num_channels, num_latent_frames, video.height // spatial_factor, video.width // spatial_factor)


def draw_noise(shape: tuple[int, ...], *, seed: int) -> torch.Tensor:
    """Standard normal values in fp32 on the CPU, as diffusers draws them with a CPU generator of this seed."""
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float32)
