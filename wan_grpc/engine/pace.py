"""How long work takes here, learned from the work that was done, so that an eta is a measurement and not a promise."""

from dataclasses import dataclass, field

from wan_grpc.domain.events import Progress, Stage
from wan_grpc.domain.request import VideoRequest

_NEWEST_WEIGHT = 0.3


@dataclass(slots=True)
class Pace:
    """Seconds per unit of work and stage, as a moving average over generations."""

    _seconds_per_unit: dict[Stage, float] = field(default_factory=dict)

    def learn(self, stage: Stage, video: VideoRequest, seconds: float) -> None:
        """A whole stage of `video` took `seconds`."""
        rate = seconds / _units(stage, video)
        known = self._seconds_per_unit.get(stage)
        self._seconds_per_unit[stage] = rate if known is None else known + _NEWEST_WEIGHT * (rate - known)

    def expect(self, stage: Stage, video: VideoRequest) -> float | None:
        """Seconds that this stage of `video` should take; None before one was timed."""
        rate = self._seconds_per_unit.get(stage)
        return None if rate is None else rate * _units(stage, video)

    def expect_all(self, video: VideoRequest) -> float | None:
        """Seconds for which `video` should occupy the ranks."""
        stages = (Stage.TEXT, *([Stage.IMAGE] if video.has_image else []), Stage.DENOISE, Stage.DECODE)
        parts = [self.expect(stage, video) for stage in stages]
        return None if None in parts else sum(part for part in parts if part is not None)


def remaining(progress: Progress, video: VideoRequest, pace: Pace, stage_s: float) -> float | None:
    """Seconds until the video is complete, given that its running stage has lasted `stage_s`.

    Steps that are done tell best how long the rest of a stage takes; past generations tell it for what comes after.
    """
    if progress.step and progress.stage is not Stage.ENCODE:  # whose frames were encoded before it began
        here = stage_s / progress.step * (progress.total_steps - progress.step)
    else:
        expected = pace.expect(progress.stage, video)
        if expected is None:
            return None
        here = max(0.0, expected - stage_s)
    if progress.stage in (Stage.DECODE, Stage.ENCODE):
        return here
    decode = pace.expect(Stage.DECODE, video)
    if progress.stage is Stage.DENOISE:
        return here + (decode or 0.0)
    denoise = pace.expect(Stage.DENOISE, video)
    image = pace.expect(Stage.IMAGE, video) if progress.stage is Stage.TEXT and video.has_image else None
    return None if denoise is None else here + (image or 0.0) + denoise + (decode or 0.0)


def _units(stage: Stage, video: VideoRequest) -> float:
    """Work of a stage in arbitrary units: proportional to pixels, and for denoising to forward passes as well."""
    pixels = video.width * video.height * video.num_frames
    if stage is Stage.TEXT:
        return 1.0
    if stage is Stage.DENOISE:
        return float(pixels * video.num_inference_steps * (2 if video.guidance_scale > 1.0 else 1))
    return float(pixels)
