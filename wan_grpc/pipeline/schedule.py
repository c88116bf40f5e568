"""UniPC over the noise levels of one request.

Knows the checkpoint's own scheduler config and what a request replaces in it. Does not know what predicts the noise.
"""

from collections.abc import Mapping
from typing import Any

import torch
from diffusers.schedulers.scheduling_unipc_multistep import UniPCMultistepScheduler


class Schedule:
    """The steps of one video: made for a request, used once, forgotten with it."""

    def __init__(
        self, config: Mapping[str, Any], *, flow_shift: float, num_inference_steps: int, device: torch.device
    ) -> None:
        scheduler = UniPCMultistepScheduler.from_config(dict(config), flow_shift=flow_shift)
        scheduler.set_timesteps(num_inference_steps, device=device)
        scheduler.set_begin_index(0)  # else the first step searches its timestep on the device and waits for the answer
        self.timesteps: tuple[int, ...] = tuple(scheduler.timesteps.tolist())
        """On the host, for whoever must decide by them."""
        self.device_timesteps: torch.Tensor = scheduler.timesteps
        """[num_inference_steps], int64, on the device: what the transformer is told."""
        self.num_train_timesteps: int = scheduler.config.num_train_timesteps
        self.sigmas: tuple[float, ...] = tuple(scheduler.sigmas.tolist())
        """Share of noise before each step, and after the last one."""
        # Left on the CPU, every step would copy them over and wait for each copy.
        scheduler.sigmas = scheduler.sigmas.to(device)
        self._scheduler = scheduler

    def predicted(self, index: int, noise: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        """The latents without noise to which the flow predicted at step `index` leads in a straight line.

        [1, C, F, h, w] each, fp32; latents: before the step.
        """
        return latents - self.sigmas[index] * noise

    def step(self, index: int, noise: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        """The latents one step further, from the flow predicted at step `index`. [1, C, F, h, w] each, fp32.

        From the second step on, the corrector's 2 x 2 system is solved on the device and checked on the host: that wait
        is part of the step's own, since all of its predictions are enqueued by then.
        """
        stepped: torch.Tensor = self._scheduler.step(noise, self.device_timesteps[index], latents, return_dict=False)[0]
        return stepped
