from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wan_grpc.domain.images import ImageFacts, size_of_same_aspect


def facts(width: int, height: int) -> ImageFacts:
    return ImageFacts(width=width, height=height, sha256="0" * 64)


@pytest.mark.parametrize(
    ("image", "area", "multiple", "size"),
    [
        # An image of the frame's own aspect gives exactly the frame, whatever its size.
        ((1280, 720), 1280 * 720, 16, (1280, 720)),
        ((3840, 2160), 1280 * 720, 16, (1280, 720)),
        ((16, 9), 1280 * 720, 16, (1280, 720)),
        ((720, 1280), 1280 * 720, 16, (720, 1280)),
        ((832, 480), 832 * 480, 16, (832, 480)),
        ((1280, 704), 1280 * 704, 32, (1280, 704)),
        # Others keep their own.
        ((1000, 1000), 832 * 480, 16, (624, 624)),
        ((4032, 3024), 1280 * 720, 16, (1104, 816)),
        ((3024, 4032), 1280 * 720, 16, (816, 1104)),
        ((1920, 1080), 832 * 480, 16, (832, 464)),
        ((1, 1), 1280 * 704, 32, (928, 928)),
        # A side is at least one multiple.
        ((10_000, 1), 832 * 480, 16, (63184, 16)),
        ((1, 10_000), 832 * 480, 32, (32, 63168)),
    ],
)
def test_sizes_of_the_same_aspect(image: tuple[int, int], area: int, multiple: int, size: tuple[int, int]) -> None:
    """The frame is as large as the area allows, in the aspect of the image."""
    assert size_of_same_aspect(facts(*image), area=area, multiple=multiple) == size


@settings(deadline=None)
@given(
    st.integers(1, 2**16),
    st.integers(1, 2**16),
    st.integers(1, 2**24),
    st.sampled_from([8, 16, 32]),
)
def test_each_side_is_the_largest_multiple(width: int, height: int, area: int, multiple: int) -> None:
    """No side is longer than the exact one of that area and aspect, nor is there room for one more multiple."""
    found = size_of_same_aspect(facts(width, height), area=area, multiple=multiple)
    squares = Fraction(area * width, height), Fraction(area * height, width)
    for side, square in zip(found, squares, strict=True):
        assert side % multiple == 0
        assert side**2 <= square or side == multiple
        assert (side + multiple) ** 2 > square
    if multiple not in found:
        assert found[0] * found[1] <= area


@settings(deadline=None)
@given(st.integers(1, 2**10), st.integers(1, 2**10), st.integers(1, 2**6), st.sampled_from([16, 32]))
def test_a_frame_that_fits_comes_back(columns: int, rows: int, scale: int, multiple: int) -> None:
    """An image of the aspect and area of a valid frame gives that frame: no rounding error costs a multiple."""
    width, height = columns * multiple, rows * multiple
    image = facts(columns * scale, rows * scale)
    assert size_of_same_aspect(image, area=width * height, multiple=multiple) == (width, height)


@settings(deadline=None)
@given(st.integers(1, 2**16), st.integers(1, 2**16), st.integers(1, 2**24))
def test_an_image_on_its_side_gives_the_frame_on_its_side(width: int, height: int, area: int) -> None:
    """Neither direction is favoured."""
    upright = size_of_same_aspect(facts(width, height), area=area, multiple=16)
    assert size_of_same_aspect(facts(height, width), area=area, multiple=16) == upright[::-1]
