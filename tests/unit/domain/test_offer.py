from dataclasses import replace
from typing import Any

import pytest

from wan_grpc.domain.errors import InvalidRequestError
from wan_grpc.domain.offer import offered
from wan_grpc.domain.variants import (
    I2V_A14B,
    I2V_A14B_SIZES,
    T2V_A14B,
    T2V_A14B_SIZES,
    TI2V_5B,
    TI2V_5B_SIZES,
    Limits,
    ModelCard,
    Task,
)

T2V = ModelCard(
    model_id="m",
    task=Task.TEXT_TO_VIDEO,
    defaults=T2V_A14B,
    limits=Limits(),
    size_multiple=16,
    sizes=T2V_A14B_SIZES,
)
I2V = replace(T2V, task=Task.IMAGE_TO_VIDEO, defaults=I2V_A14B, sizes=I2V_A14B_SIZES)
TI2V = replace(T2V, task=Task.TEXT_IMAGE_TO_VIDEO, defaults=TI2V_5B, sizes=TI2V_5B_SIZES, size_multiple=32)


def limited(card: ModelCard, **limits: int) -> ModelCard:
    return replace(card, limits=Limits(**limits))


@pytest.mark.parametrize("card", [T2V, I2V, TI2V], ids=["t2v", "i2v", "ti2v"])
def test_the_usual_limits_change_nothing(card: ModelCard) -> None:
    """Every published model is offered as it is, an image that a model needs being the caller's to give."""
    assert offered(card, negative_prompt="") == card


def test_prompts_may_be_as_short_as_the_operator_likes() -> None:
    """The least limit of prompts leaves a model that can be offered."""
    card = limited(T2V, max_prompt_bytes=1)
    assert offered(card, negative_prompt="") == card


def test_the_operators_negative_prompt_is_the_default() -> None:
    """It is offered as every other default is."""
    defaults = replace(T2V.defaults, negative_prompt="blurred")
    assert offered(T2V, negative_prompt="blurred") == replace(T2V, defaults=defaults)


@pytest.mark.parametrize(
    ("card", "max_area", "size", "sizes"),
    [
        (T2V, 1280 * 720, (1280, 720), T2V_A14B_SIZES),
        (T2V, 1280 * 720 - 1, (832, 480), ((832, 480), (480, 832))),
        (T2V, 832 * 480, (832, 480), ((832, 480), (480, 832))),
        (T2V, 832 * 480 - 1, (832, 464), ((832, 464),)),
        (T2V, 16 * 16 * 10, (64, 32), ((64, 32),)),
        (T2V, 16 * 16, (16, 16), ((16, 16),)),
        (TI2V, 1280 * 704 - 1, (1248, 672), ((1248, 672),)),
    ],
)
def test_a_smaller_area_lowers_the_size(
    card: ModelCard, max_area: int, size: tuple[int, int], sizes: tuple[tuple[int, int], ...]
) -> None:
    """The largest recommended size that lies as the default does, else the largest of its aspect."""
    offer = offered(limited(card, max_area=max_area), negative_prompt="")
    assert ((offer.defaults.width, offer.defaults.height), offer.sizes) == (size, sizes)


def test_a_portrait_default_stays_one() -> None:
    """A model whose default stands upright is lowered to a size that does, too."""
    card = replace(T2V, defaults=replace(T2V_A14B, width=720, height=1280))
    offer = offered(limited(card, max_area=832 * 480), negative_prompt="")
    assert (offer.defaults.width, offer.defaults.height) == (480, 832)


@pytest.mark.parametrize(("most", "num_frames"), [(81, 81), (80, 77), (17, 17), (16, 13), (4, 1), (1, 1)])
def test_fewer_frames_lower_the_length(most: int, num_frames: int) -> None:
    """The default becomes the longest video that the limit allows."""
    assert offered(limited(T2V, max_num_frames=most), negative_prompt="").defaults.num_frames == num_frames


@pytest.mark.parametrize(("most", "steps"), [(40, 40), (39, 39), (1, 1)])
def test_fewer_steps_lower_the_steps(most: int, steps: int) -> None:
    """The default becomes the limit."""
    assert offered(limited(T2V, max_inference_steps=most), negative_prompt="").defaults.num_inference_steps == steps


@pytest.mark.parametrize(
    ("card", "negative_prompt", "fields"),
    [
        (limited(T2V, max_area=255), "", ["spec.width"]),
        (limited(I2V, max_area=255), "", ["spec.width"]),
        (T2V, "a\0b", ["spec.negative_prompt"]),
        (T2V, "x" * 16385, ["spec.negative_prompt"]),
        (limited(TI2V, max_area=1, max_prompt_bytes=8), "much too long", ["spec.negative_prompt", "spec.width"]),
    ],
)
def test_what_nobody_could_ask_for_is_refused(card: ModelCard, negative_prompt: str, fields: list[Any]) -> None:
    """Where a bare prompt would be refused, so is the offer: every field, and none that callers bring."""
    with pytest.raises(InvalidRequestError) as raised:
        offered(card, negative_prompt=negative_prompt)
    assert [violation.field for violation in raised.value.violations] == fields
