"""Experts and what they are shown."""

import random
from dataclasses import replace

import pytest
import torch
from diffusers import UniPCMultistepScheduler, WanTransformer3DModel

from training import experts
from training.assemble import configs_of
from training.experts import ROLES, BriefText, Lessons, be_brief, make_expert
from training.flow import Levels
from training.latents import NUM_TOKENS, Clips
from training.text import Words, embed, make_text_model
from training.vae import make_vae
from training.world import caption, draw_scene
from wan_grpc.domain.variants import Task

TEXTS = ["a red circle moves right on a blue background", "", "a curious raccoon on the left jumps"]


@pytest.fixture(scope="module")
def expert() -> WanTransformer3DModel:
    """One whose every part matters, also at the end."""
    made = make_expert(seed=1).eval().requires_grad_(False)
    torch.manual_seed(2)
    torch.nn.init.normal_(made.proj_out.weight, std=0.2)
    for block in made.blocks:
        torch.nn.init.normal_(block.attn2.to_v.weight, std=0.3)
    return made


def test_all_weights_fit() -> None:
    """Three experts, the VAE and the text encoder stay below 16 MB in bf16."""
    models = [*(make_expert(seed=0) for _ in range(3)), make_vae(seed=0), make_text_model(seed=0)]
    assert sum(parameter.numel() for model in models for parameter in model.parameters()) * 2 < 16e6


def test_a_brief_text_is_the_long_one(expert: WanTransformer3DModel) -> None:
    """With one zero for all the padding an expert says what it says of 512 tokens; without its weight it does not."""
    encoder = make_text_model(seed=3).eval().requires_grad_(False)
    numbers, mask = Words(num_tokens=NUM_TOKENS).tokens(TEXTS)
    text = embed(encoder, numbers, mask)
    long = torch.cat([text, text.new_zeros(3, 512 - NUM_TOKENS, text.shape[2])], dim=1)
    noisy, step = (
        torch.randn(3, 16, 2, 4, 6, generator=torch.Generator().manual_seed(4)),
        torch.tensor([900.0, 500, 30]),
    )
    [expected] = expert(noisy, step, long, return_dict=False)
    processors = dict(expert.attn_processors)
    brief = be_brief(expert)
    try:
        brief.look_at(mask)
        [made] = expert(noisy, step, text, return_dict=False)
        brief.look_at(mask, num_served=NUM_TOKENS)
        [wrong] = expert(noisy, step, text, return_dict=False)
    finally:
        expert.set_attn_processor(processors)
    assert (made - expected).norm() < 1e-5 * expected.norm()
    assert (wrong - expected).norm() > 1e-3 * expected.norm()


def test_a_new_expert_listens() -> None:
    """Of its attention to a text at least a seventh goes to the words, which are one in fifty of what is there."""
    made, encoder = make_expert(seed=1).requires_grad_(False), make_text_model(seed=3).eval().requires_grad_(False)
    text = embed(encoder, *Words(num_tokens=512).tokens([TEXTS[0]]))
    words = int((text.abs().sum(2) > 0).sum())
    states = made.condition_embedder.text_embedder(text)
    attention = made.blocks[2].attn2
    query = attention.norm_q(attention.to_q(torch.randn(1, 64, 128, generator=torch.Generator().manual_seed(1))))
    query, key = (
        value.unflatten(2, (4, -1)).transpose(1, 2) for value in (query, attention.norm_k(attention.to_k(states)))
    )
    weights = (query @ key.transpose(2, 3) / 32**0.5).softmax(3)
    assert words == 10 and float(weights[..., :words].sum(3).mean()) > 0.15


def test_one_level_for_all_tokens_is_one_level(expert: WanTransformer3DModel) -> None:
    """Told token by token it gives the same, so that one that knows images can begin as one that does not."""
    noisy = torch.randn(2, 16, 2, 4, 6, generator=torch.Generator().manual_seed(4))
    text, levels = torch.randn(2, 5, 128, generator=torch.Generator().manual_seed(5)), torch.tensor([900.0, 30.0])
    [one] = expert(noisy, levels, text, return_dict=False)
    [other] = expert(noisy, levels[:, None].expand(2, 12), text, return_dict=False)
    assert (one - other).norm() < 1e-5 * one.norm()


def test_no_caption_is_too_long() -> None:
    """Each leaves room for one padding token at least."""
    rng, words = random.Random(5), Words(num_tokens=NUM_TOKENS)
    _, mask = words.tokens([caption(draw_scene(rng), rng) for _ in range(2000)])
    assert int(mask.sum(1).max()) < NUM_TOKENS


def clips(count: int, frames: int, side: int) -> Clips:
    generator = torch.Generator().manual_seed(count)
    numbers, mask = Words(num_tokens=NUM_TOKENS).tokens([TEXTS[0], TEXTS[2]] * count)
    return Clips(
        latents=torch.randn(count, 16, frames, side, side, generator=generator),
        tokens=numbers.view(count, 2, -1).short(),
        mask=mask.view(count, 2, -1).short(),
        near=torch.zeros(count, frames, side, side),
    )


class Asked(torch.nn.Module):
    """Notes what an expert is shown, and says nothing but zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.shown: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []

    def forward(
        self, noisy: torch.Tensor, timestep: torch.Tensor, text: torch.Tensor, return_dict: bool
    ) -> tuple[torch.Tensor]:
        self.shown.append((noisy, timestep, text))
        return (torch.zeros_like(noisy),)


def lessons_of(role: str, *some: Clips) -> Lessons:
    encoder = make_text_model(seed=3).eval().requires_grad_(False)
    return Lessons(ROLES[role], list(some), encoder, BriefText())


@pytest.mark.parametrize("role", ["t2v-high", "t2v-low"])
def test_what_an_expert_of_two_is_shown(role: str) -> None:
    """Clips of every size, as many as have the tokens, at its levels; a tenth without a caption."""
    asked, lessons = Asked(), lessons_of(role, clips(9, 2, 4), clips(5, 1, 8))
    losses = lessons.losses(asked, num_tokens=256)  # type: ignore[arg-type]
    for step in range(60):
        losses[step % 2](torch.Generator().manual_seed(step))
    shapes = {tuple(noisy.shape) for noisy, _, _ in asked.shown}
    assert shapes == {(32, 16, 2, 4, 4), (16, 16, 1, 8, 8)}
    steps = torch.cat([timestep for _, timestep, _ in asked.shown])
    bounds = (875.0, 1000.0) if role == "t2v-high" else (0.0, 875.0)
    assert bounds[0] <= float(steps.min()) and float(steps.max()) <= bounds[1]
    silent = torch.cat([(text[:, 1] == 0).all(1) for _, _, text in asked.shown]).float().mean()
    assert 0.05 < float(silent) < 0.16


def test_what_one_that_sees_images_is_shown() -> None:
    """Half of its clips begin with their own first frame, which is said to be without noise, token by token."""
    some = clips(3, 3, 4)
    asked, lessons = Asked(), lessons_of("ti2v", some)
    [loss] = lessons.losses(asked, num_tokens=12 * 200)  # type: ignore[arg-type]
    loss(torch.Generator().manual_seed(1))
    [(noisy, timestep, _)] = asked.shown
    assert timestep.shape == (200, 12)
    has_image = (timestep[:, :4] == 0).all(1)
    assert 70 < int(has_image.sum()) < 130
    assert (timestep[~has_image] == timestep[~has_image][:, :1]).all()
    first = noisy[has_image][:, :, 0]
    assert all(any(torch.equal(frame, own) for own in some.latents[:, :, 0]) for frame in first)
    assert (timestep[has_image][:, 4:] > 0).all()


def test_a_given_frame_has_no_error() -> None:
    """The loss is that of what is not given, so an expert that is right about the rest has none."""
    latents = torch.randn(2, 16, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(2))
    slope = noise - latents
    slope[:, :, 0] += 100.0

    def right_but_at_first(*_: torch.Tensor, return_dict: bool) -> tuple[torch.Tensor]:
        return (slope,)

    def error(has_image: torch.Tensor | None) -> float:
        generator = torch.Generator().manual_seed(2)
        levels = torch.tensor([0.4, 0.9])
        return float(
            experts.flow.loss(
                right_but_at_first,  # type: ignore[arg-type]
                latents,
                torch.zeros(2, 3, 8),
                levels,
                generator=generator,
                has_image=has_image,
            )
        )

    assert error(torch.tensor([True, True])) == 0.0
    assert error(torch.tensor([False, False])) == pytest.approx(100.0**2 / 3)
    assert error(torch.tensor([True, False])) == pytest.approx(100.0**2 / 5)
    assert error(None) == pytest.approx(100.0**2 / 3)


def test_errors_where_things_are_count_more() -> None:
    """And those of the last details less, but none of them nothing."""
    some = clips(4, 2, 4)
    some = replace(some, near=some.near.index_fill(1, torch.tensor([0]), 1.0))
    lessons = lessons_of("t2v-low", some)
    shown: list[torch.Tensor] = []

    def wrong_about(frame: int) -> float:
        def answer(
            noisy: torch.Tensor, timestep: torch.Tensor, _: torch.Tensor, return_dict: bool
        ) -> tuple[torch.Tensor]:
            shown.append(timestep)
            return (torch.zeros_like(noisy).index_fill(2, torch.tensor([frame]), 100.0),)

        [loss] = lessons.losses(answer, num_tokens=64)  # type: ignore[arg-type]
        return float(loss(torch.Generator().manual_seed(1))["total"])

    assert wrong_about(0) == pytest.approx(9 * wrong_about(1), rel=0.01)
    assert torch.equal(shown[0], shown[1])
    even = experts._weights(torch.zeros(3, 2, 4, 4), torch.tensor([0.1, 0.4, 0.9]))
    assert even.amax((1, 2, 3)).tolist() == even.amin((1, 2, 3)).tolist() == pytest.approx([0.25, 1.0, 1.0])


def test_it_learns() -> None:
    """Gradients reach every parameter, and the loss falls on one clip."""
    made = make_expert(seed=1)
    some = clips(1, 2, 4)
    role = replace(ROLES["t2v-low"], levels=Levels(least=0.4, most=0.6))
    lessons = Lessons(role, [some], make_text_model(seed=3).eval().requires_grad_(False), be_brief(made))
    optimizer = torch.optim.AdamW(made.parameters(), lr=3e-3)
    [loss], losses = lessons.losses(made, num_tokens=64), []
    for step in range(40):
        parts = loss(torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        parts["total"].backward()
        optimizer.step()
        losses.append(float(parts["total"].detach()))
    assert losses[-1] < 0.75 * losses[0]
    assert all(parameter.grad is not None and parameter.grad.abs().max() > 0 for parameter in made.parameters())


def test_the_sampler_gives_back_what_was_learned() -> None:
    """An expert that has seen one clip alone makes it out of any noise, by the scheduler of the checkpoint."""
    made, some = make_expert(seed=1), clips(1, 2, 4)
    encoder = make_text_model(seed=3).eval().requires_grad_(False)
    lessons = Lessons(ROLES["base"], [some], encoder, brief := be_brief(made))
    optimizer = torch.optim.AdamW(made.parameters(), lr=2e-3)
    [loss] = lessons.losses(made, num_tokens=128)
    for step in range(160):
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1.0, (step + 1) / 20, (160 - step) / 60)
        parts = loss(torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        parts["total"].backward()
        optimizer.step()
    scheduler = UniPCMultistepScheduler.from_config(
        dict(configs_of(Task.TEXT_TO_VIDEO, [], [])["scheduler/scheduler_config.json"])
    )
    scheduler.set_timesteps(20)
    numbers, mask = Words(num_tokens=NUM_TOKENS).tokens([TEXTS[0]])
    brief.look_at(mask)
    latents = torch.randn(1, 16, 2, 4, 4, generator=torch.Generator().manual_seed(99))
    assert (latents - some.latents).norm() > 1.2 * some.latents.norm()
    with torch.no_grad():
        text = embed(encoder, numbers, mask)
        for timestep in scheduler.timesteps:
            [slope] = made(latents, timestep.expand(1), text, return_dict=False)
            latents = scheduler.step(slope, timestep, latents, return_dict=False)[0]
    assert (latents - some.latents).norm() < 0.5 * some.latents.norm()
