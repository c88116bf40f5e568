"""What a server offers of a model: its card, within what the operator chose.

Knows cards, limits and sizes. Does not know where a card or a choice comes from.
"""

from dataclasses import replace

from wan_grpc.domain.errors import InvalidRequestError
from wan_grpc.domain.images import ImageFacts, size_of_same_aspect
from wan_grpc.domain.request import GenerationRequest, resolve
from wan_grpc.domain.variants import Defaults, ModelCard

_GIVEN_BY_CALLERS = ("spec.image", "spec.last_image")


def offered(card: ModelCard, *, negative_prompt: str) -> ModelCard:
    """`card` with the operator's negative prompt, and with defaults and sizes lowered to its limits.

    A request that says nothing but its prompt is one that the server accepts: what cannot be brought to that is refused
    here, before anybody asks.

    Raises:
        InvalidRequestError: naming every default that breaks a rule.
    """
    defaults = replace(_lowered(card), negative_prompt=negative_prompt)
    sizes = tuple(size for size in card.sizes if _fits(size, card)) or ((defaults.width, defaults.height),)
    offer = replace(card, defaults=defaults, sizes=sizes)
    try:
        resolve(GenerationRequest(prompt="x"), offer, fallback_seed=0)
    except InvalidRequestError as error:
        if ours := tuple(one for one in error.violations if one.field not in _GIVEN_BY_CALLERS):
            raise InvalidRequestError(ours) from error
    return offer


def _lowered(card: ModelCard) -> Defaults:
    width, height = _size_within(card)
    most = card.limits.max_num_frames
    return replace(
        card.defaults,
        width=width,
        height=height,
        num_frames=min(card.defaults.num_frames, (most - 1) // card.temporal_factor * card.temporal_factor + 1),
        num_inference_steps=min(card.defaults.num_inference_steps, card.limits.max_inference_steps),
    )


def _size_within(card: ModelCard) -> tuple[int, int]:
    """The default size; else the largest recommended one that lies as it does; else the largest of its aspect."""
    usual = card.defaults.width, card.defaults.height
    alike = [size for size in card.sizes if (size[0] > size[1]) == (usual[0] > usual[1])]
    for size in (usual, *sorted(alike, key=_area, reverse=True)):
        if _fits(size, card):
            return size
    shape = ImageFacts(width=usual[0], height=usual[1], sha256="")
    return size_of_same_aspect(shape, area=card.limits.max_area, multiple=card.size_multiple)


def _fits(size: tuple[int, int], card: ModelCard) -> bool:
    return _area(size) <= card.limits.max_area and max(size) <= card.max_side


def _area(size: tuple[int, int]) -> int:
    return size[0] * size[1]
