from dataclasses import replace

import pytest

from wan_grpc.domain.formats import OutputFormat
from wan_grpc.domain.images import ImageFacts
from wan_grpc.domain.request import GenerationRequest, VideoRequest, resolve
from wan_grpc.domain.variants import (
    I2V_A14B,
    I2V_A14B_SIZES,
    T2V_A14B,
    T2V_A14B_SIZES,
    TI2V_5B,
    TI2V_5B_SIZES,
    Defaults,
    Limits,
    ModelCard,
    Task,
)

CARDS = {
    Task.TEXT_TO_VIDEO: (T2V_A14B, T2V_A14B_SIZES, 16),
    Task.IMAGE_TO_VIDEO: (I2V_A14B, I2V_A14B_SIZES, 16),
    Task.TEXT_IMAGE_TO_VIDEO: (TI2V_5B, TI2V_5B_SIZES, 32),
}


def card(task: Task) -> ModelCard:
    defaults, sizes, multiple = CARDS[task]
    return ModelCard(
        model_id="Wan-AI/Wan2.2",
        task=task,
        defaults=defaults,
        limits=Limits(),
        size_multiple=multiple,
        sizes=sizes,
        takes_last_image=task is Task.IMAGE_TO_VIDEO,
    )


def ask(task: Task, **changes: int) -> VideoRequest:
    """The request that says nothing but a prompt, and an image where there must be one."""
    needs = task is Task.IMAGE_TO_VIDEO
    request = GenerationRequest(prompt="a cat", image=b"cat" if needs else None, **changes)  # type: ignore[arg-type]
    first = ImageFacts(width=changes.get("width", 16), height=changes.get("height", 9), sha256="0") if needs else None
    return resolve(request, card(task), fallback_seed=0, first=first)


@pytest.mark.parametrize(
    ("task", "takes_image", "needs_image", "has_two_experts"),
    [
        (Task.TEXT_TO_VIDEO, False, False, True),
        (Task.IMAGE_TO_VIDEO, True, True, True),
        (Task.TEXT_IMAGE_TO_VIDEO, True, False, False),
    ],
)
def test_what_a_task_takes(task: Task, takes_image: bool, needs_image: bool, has_two_experts: bool) -> None:
    """Text alone, an image in any case, or either; two experts or one."""
    ours = card(task)
    assert (ours.takes_image, ours.needs_image, ours.has_two_experts) == (takes_image, needs_image, has_two_experts)
    assert ours.formats == tuple(OutputFormat)


@pytest.mark.parametrize("task", Task)
def test_the_published_defaults_keep_the_rules(task: Task) -> None:
    """A request that leaves everything to the server is one that it serves, with the published values."""
    video = ask(task)
    defaults = CARDS[task][0]
    asked = Defaults(
        width=video.width,
        height=video.height,
        num_frames=video.num_frames,
        fps=video.fps,
        num_inference_steps=video.num_inference_steps,
        guidance_scale=video.guidance_scale,
        guidance_scale_2=video.guidance_scale_2,
        flow_shift=video.flow_shift,
        boundary_ratio=video.boundary_ratio,
        negative_prompt=video.negative_prompt,
    )
    assert asked == defaults


@pytest.mark.parametrize(("task", "size"), [(task, size) for task in Task for size in CARDS[task][1]])
def test_the_published_sizes_keep_the_rules(task: Task, size: tuple[int, int]) -> None:
    """Every size that is recommended is one that can be asked for, with an image of that aspect too."""
    video = ask(task, width=size[0], height=size[1])
    assert (video.width, video.height) == size


def test_one_expert_has_no_boundary() -> None:
    """Whether there are two experts follows from whether there is a boundary between them."""
    ours = card(Task.TEXT_TO_VIDEO)
    assert not replace(ours, defaults=replace(T2V_A14B, boundary_ratio=None)).has_two_experts
