"""Levels of noise and the loss of experts."""

import pytest
import torch
from diffusers import UniPCMultistepScheduler, WanTransformer3DModel

from training.flow import Levels, loss


def drawn(levels: Levels, count: int = 20000) -> torch.Tensor:
    return levels.draw(count, generator=torch.Generator().manual_seed(0))


def test_levels_are_shifted() -> None:
    """Half of them lie below 3 / 4, where a shift of 3 puts the middle; without it below 1 / 2; all between 0 and 1."""
    for shift, middle in ((3.0, 0.75), (1.0, 0.5)):
        levels = drawn(Levels(shift=shift))
        assert levels.amin() >= 0 and levels.amax() <= 1
        assert float(levels.median()) == pytest.approx(middle, abs=0.01)


@pytest.mark.parametrize(("least", "most"), [(0.0, 0.875), (0.875, 1.0)])
def test_levels_of_an_expert(least: float, most: float) -> None:
    """Between two steps of the scheduler lie as many of them as between any others."""
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    scheduler.set_timesteps(40)
    steps = [level for level in scheduler.sigmas.tolist() if least <= level <= most]
    levels = drawn(Levels(least=least, most=most), 200000)
    assert least <= levels.amin() and levels.amax() <= most
    between = torch.histogram(levels.double(), torch.tensor(sorted(steps), dtype=torch.float64)).hist[1:]
    assert between.max() < 1.15 * between.min()


def tiny_expert() -> WanTransformer3DModel:
    torch.manual_seed(1)
    return WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=8,
        freq_dim=16,
        ffn_dim=32,
        num_layers=1,
    )


def test_the_loss_is_that_of_the_slope() -> None:
    """Of a model that says 0 it is the mean square of noise less latents; perfect answers have none."""
    latents = torch.randn(2, 4, 2, 4, 4, generator=torch.Generator().manual_seed(2))
    text, levels = torch.zeros(2, 3, 8), torch.tensor([0.3, 0.8])
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(5))
    asked = []

    def perfect(
        noisy: torch.Tensor, timestep: torch.Tensor, text: torch.Tensor, return_dict: bool
    ) -> tuple[torch.Tensor]:
        asked.append((noisy, timestep))
        return (noise - latents,)

    def silent(noisy: torch.Tensor, *_: object, return_dict: bool) -> tuple[torch.Tensor]:
        return (torch.zeros_like(noisy),)

    def of(expert: object) -> float:
        return float(loss(expert, latents, text, levels, generator=torch.Generator().manual_seed(5)))  # type: ignore[arg-type]

    assert of(perfect) == 0.0
    assert of(silent) == pytest.approx(float((noise - latents).pow(2).mean()))
    [(noisy, timestep)] = asked
    assert timestep.tolist() == pytest.approx([300.0, 800.0])
    assert torch.allclose(noisy[1], 0.2 * latents[1] + 0.8 * noise[1], atol=1e-6)


def test_weights_are_of_places() -> None:
    """Where a weight is nothing, no error counts; the rest keeps its mean."""
    latents = torch.randn(2, 4, 2, 4, 4, generator=torch.Generator().manual_seed(2))
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(5))
    text, levels = torch.zeros(2, 3, 8), torch.tensor([0.3, 0.8])

    def wrong_in_one_frame(*_: torch.Tensor, return_dict: bool) -> tuple[torch.Tensor]:
        return ((noise - latents).index_fill(2, torch.tensor([1]), 0.0),)

    def of(weights: torch.Tensor | None) -> float:
        generator = torch.Generator().manual_seed(5)
        return float(
            loss(wrong_in_one_frame, latents, text, levels, generator=generator, weights=weights)  # type: ignore[arg-type]
        )

    everywhere = torch.full((2, 2, 4, 4), 3.0)
    there = everywhere.index_fill(1, torch.tensor([0]), 0.0)
    assert of(everywhere) == pytest.approx(of(None)) and of(there) == pytest.approx(2 * of(None))
    assert of(everywhere.index_fill(1, torch.tensor([1]), 0.0)) == 0.0


def test_an_expert_learns() -> None:
    """Sixty steps on one latent video lower the loss by half."""
    expert = tiny_expert()
    latents = torch.randn(1, 4, 2, 4, 4, generator=torch.Generator().manual_seed(3)).repeat(8, 1, 1, 1, 1)
    text = torch.zeros(8, 3, 8)
    optimizer = torch.optim.AdamW(expert.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(4)
    losses = []
    for _ in range(60):
        value = loss(expert, latents, text, Levels().draw(8, generator=generator), generator=generator)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        losses.append(float(value.detach()))
    assert sum(losses[-5:]) < 0.6 * sum(losses[:5])
