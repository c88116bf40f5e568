from dataclasses import replace

import pytest

from tests.fake_ranks import CARD, ask
from wan_grpc.domain.events import Progress, Stage
from wan_grpc.domain.request import resolve
from wan_grpc.engine.pace import Pace, remaining

VIDEO = resolve(ask(), CARD, fallback_seed=0)
"""16 x 32 x 5, 3 steps, guided."""


def known(**seconds: float) -> Pace:
    """A pace that has seen one VIDEO, whose stages took these seconds."""
    pace = Pace()
    for name, value in seconds.items():
        pace.learn(Stage(name), VIDEO, value)
    return pace


@pytest.mark.parametrize(
    ("stage", "change", "expected_s"),
    [
        (Stage.TEXT, {}, 2.0),
        (Stage.TEXT, {"width": 1280, "num_inference_steps": 40}, 2.0),
        (Stage.DENOISE, {}, 30.0),
        (Stage.DENOISE, {"width": 32}, 60.0),
        (Stage.DENOISE, {"num_frames": 25}, 150.0),
        (Stage.DENOISE, {"num_inference_steps": 6}, 60.0),
        (Stage.DENOISE, {"guidance_scale": 1.0}, 15.0),
        (Stage.DECODE, {}, 8.0),
        (Stage.DECODE, {"height": 64}, 16.0),
        (Stage.DECODE, {"num_inference_steps": 40}, 8.0),
        (Stage.DECODE, {"guidance_scale": 1.0}, 8.0),
    ],
)
def test_what_was_learned_is_scaled(stage: Stage, change: dict[str, int], expected_s: float) -> None:
    """Denoising grows with pixels, steps and guidance, decoding with pixels, text with nothing."""
    pace = known(text=2.0, denoise=30.0, decode=8.0)
    assert pace.expect(stage, replace(VIDEO, **change)) == pytest.approx(expected_s)


def test_nothing_is_expected_before_it_was_timed() -> None:
    """No stage has a time before one was seen, and the whole has none while a stage lacks it."""
    assert [Pace().expect(stage, VIDEO) for stage in Stage] == [None] * 5
    assert Pace().expect_all(VIDEO) is None
    assert known(text=2.0, denoise=30.0).expect_all(VIDEO) is None
    assert known(text=2.0, denoise=30.0, decode=8.0).expect_all(VIDEO) == pytest.approx(40.0)


def test_an_image_takes_its_time_too() -> None:
    """A video with an image is expected to take its image stage as well, and only such a video."""
    pace = known(text=2.0, image=5.0, denoise=30.0, decode=8.0)
    with_image = replace(VIDEO, image_sha256="5" * 64)
    assert pace.expect_all(with_image) == pytest.approx(45.0)
    assert pace.expect_all(VIDEO) == pytest.approx(40.0)
    text = Progress(stage=Stage.TEXT, step=0, total_steps=2)
    assert remaining(text, with_image, pace, 0.5) == pytest.approx(44.5)
    assert remaining(text, VIDEO, pace, 0.5) == pytest.approx(39.5)
    image = Progress(stage=Stage.IMAGE, step=1, total_steps=2, step_time_s=2.0)
    assert remaining(image, with_image, pace, 2.0) == pytest.approx(40.0)


def test_newer_work_counts_for_more_and_not_for_all() -> None:
    """One slow video moves the expectation by three tenths; many of them move it there."""
    pace = known(decode=10.0)
    pace.learn(Stage.DECODE, VIDEO, 20.0)
    assert pace.expect(Stage.DECODE, VIDEO) == pytest.approx(13.0)
    for _ in range(50):
        pace.learn(Stage.DECODE, VIDEO, 20.0)
    assert pace.expect(Stage.DECODE, VIDEO) == pytest.approx(20.0)


PACE = {"text": 2.0, "denoise": 30.0, "decode": 8.0, "encode": 1.0}


@pytest.mark.parametrize(
    ("stage", "step", "total", "stage_s", "seconds", "expected_s"),
    [
        # Nothing was timed yet: a time only where the steps themselves tell one for all that is left.
        (Stage.TEXT, 0, 2, 0.0, {}, None),
        (Stage.TEXT, 1, 2, 1.0, {}, None),
        (Stage.DENOISE, 0, 10, 0.0, {}, None),
        (Stage.DENOISE, 2, 10, 6.0, {}, 24.0),
        (Stage.DECODE, 0, 4, 0.0, {}, None),
        (Stage.DECODE, 1, 4, 2.0, {}, 6.0),
        (Stage.ENCODE, 3, 5, 0.0, {}, None),
        # One video was timed: the rest of this stage by its own steps, the stages after it by what was learned.
        (Stage.TEXT, 0, 2, 0.5, PACE, 1.5 + 30.0 + 8.0),
        (Stage.TEXT, 0, 2, 5.0, PACE, 0.0 + 30.0 + 8.0),
        (Stage.TEXT, 1, 2, 3.0, PACE, 3.0 + 30.0 + 8.0),
        (Stage.DENOISE, 0, 10, 0.0, PACE, 30.0 + 8.0),
        (Stage.DENOISE, 2, 10, 6.0, PACE, 24.0 + 8.0),
        (Stage.DENOISE, 10, 10, 30.0, PACE, 0.0 + 8.0),
        (Stage.DECODE, 0, 4, 1.0, PACE, 7.0),
        (Stage.DECODE, 4, 4, 9.0, PACE, 0.0),
        # Frames that are encoded when encoding is all that is left were encoded before: they tell no pace.
        (Stage.ENCODE, 3, 5, 0.25, PACE, 0.75),
        (Stage.ENCODE, 0, 5, 4.0, PACE, 0.0),
    ],
)
def test_remaining_time(
    stage: Stage, step: int, total: int, stage_s: float, seconds: dict[str, float], expected_s: float | None
) -> None:
    """Seconds to the complete video after each kind of step, or None where nobody can know."""
    progress = Progress(stage=stage, step=step, total_steps=total)
    found = remaining(progress, VIDEO, known(**seconds), stage_s)
    assert found == (None if expected_s is None else pytest.approx(expected_s))
