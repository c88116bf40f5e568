"""Which of the two experts works at a timestep, and how strongly it is guided.

Knows the rule of Wan2.2: the high-noise expert from the boundary up, the low-noise one below. Knows no tensors.
"""

from dataclasses import dataclass

from wan_grpc.domain.request import VideoRequest
from wan_grpc.domain.variants import Expert


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """Who predicts the noise of one step, and with what guidance."""

    expert: Expert
    guidance_scale: float
    is_guided: bool
    """Whether the unconditional pass is needed as well."""


def choose(video: VideoRequest, timestep: int, *, num_train_timesteps: int) -> Choice:
    """The expert at `timestep`, which counts down from `num_train_timesteps` to 0 as the noise fades."""
    boundary = video.boundary_ratio
    if boundary is None or timestep >= boundary * num_train_timesteps:
        return _choice(video, Expert.HIGH_NOISE, video.guidance_scale)
    return _choice(video, Expert.LOW_NOISE, video.guidance_scale_2)


def is_guided(video: VideoRequest) -> bool:
    """Whether any step may need the negative prompt. As in diffusers, the first scale decides for the whole video."""
    return video.guidance_scale > 1.0


def _choice(video: VideoRequest, expert: Expert, scale: float) -> Choice:
    # At a scale of exactly 1 the unconditional prediction cancels out of uncond + 1 * (cond - uncond).
    return Choice(expert=expert, guidance_scale=scale, is_guided=is_guided(video) and scale != 1.0)
