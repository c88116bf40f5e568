"""What is shown of a video while it is denoised."""

from pathlib import Path

import pytest
import torch

from tests import tiny
from tests.tiny_images import picture
from wan_grpc.domain.images import InputFrames
from wan_grpc.domain.variants import Expert, Task
from wan_grpc.pipeline import preview
from wan_grpc.pipeline.checkpoint import locate
from wan_grpc.pipeline.decode import slices, to_pictures
from wan_grpc.pipeline.load import load
from wan_grpc.pipeline.schedule import Schedule
from wan_grpc.pipeline.tiny import make_tiny_model
from wan_grpc.pipeline.video import VideoPipeline

Shown = list[tuple[int, torch.Tensor]]


def shown(pipeline: VideoPipeline, **changes: object) -> Shown:
    told: Shown = []
    list(
        pipeline.generate(
            tiny.video(**changes),
            on_step=tiny.ignore,
            on_preview=lambda step, pictures, _: told.append((step, pictures)),
        )
    )
    return told


@pytest.mark.parametrize(
    ("every", "steps"), [(0, []), (1, [1, 2, 3, 4, 5, 6]), (2, [2, 4, 6]), (4, [4]), (6, [6]), (7, [])]
)
def test_as_often_as_asked(pipeline: VideoPipeline, every: int, steps: list[int]) -> None:
    """After every n-th step one picture of the video's size, which is small here."""
    told = shown(pipeline, preview_every_steps=every)
    assert [step for step, _ in told] == steps
    assert all(picture.shape == (1, tiny.VIDEO.height, tiny.VIDEO.width, 3) for _, picture in told)
    assert all(picture.dtype is torch.uint8 and picture.float().std() > 1 for _, picture in told)


def test_previews_change_nothing(pipeline: VideoPipeline) -> None:
    """The frames are those of a video without them."""
    plain, watched = (
        torch.cat(
            list(
                pipeline.generate(
                    tiny.video(preview_every_steps=every), on_step=tiny.ignore, on_preview=lambda *_: None
                )
            )
        )
        for every in (0, 1)
    )
    assert torch.equal(plain, watched)


def test_they_come_nearer_to_the_video(pipeline: VideoPipeline) -> None:
    """The last one is nearer to the middle of the finished video than the first one, and near."""
    video = tiny.video(preview_every_steps=1, num_frames=9)
    told: list[torch.Tensor] = []
    frames = torch.cat(
        list(pipeline.generate(video, on_step=tiny.ignore, on_preview=lambda _, pictures, __: told.append(pictures[0])))
    )
    away = [(picture.float() - frames[4].float()).abs().mean() for picture in told]
    assert away[-1] < 0.5 * away[0]
    assert away[-1] < 8


def test_the_first_step_shows_what_it_predicts(pipeline: VideoPipeline) -> None:
    """From pure noise: the noise less the guided flow, as both passes of the expert say it, decoded."""
    video = tiny.video(preview_every_steps=1)
    flows: list[torch.Tensor] = []
    transformer = pipeline.transformers[Expert.HIGH_NOISE]
    hook = transformer.register_forward_hook(lambda *call: flows.append(call[2]))
    try:
        [(_, first), *_] = shown(pipeline, preview_every_steps=1)
    finally:
        hook.remove()
    conditional, unconditional = (flow[0] if isinstance(flow, tuple) else flow for flow in flows[:2])
    flow = unconditional + video.guidance_scale * (conditional - unconditional)
    noise = pipeline._noise(video)
    expected = preview.picture(pipeline.vae, noise - flow.float())
    assert (first.int() - expected.int()).abs().max() <= 1
    assert (first.int() - preview.picture(pipeline.vae, noise).int()).abs().max() > 20


def test_a_given_frame_stays(tmp_path: Path) -> None:
    """Of a video that is its first image alone every preview is the video, whatever is predicted for it."""
    make_tiny_model(tmp_path / "model", task=Task.TEXT_IMAGE_TO_VIDEO)
    pipeline = load(
        locate(str(tmp_path / "model"), load_format="auto"), device="cpu", dtype="float32", load_format="auto"
    )
    video = tiny.video(width=64, height=96, num_frames=1, boundary_ratio=None, preview_every_steps=1)
    frames = InputFrames(first=picture(video.width, video.height, 0).tobytes())
    told: list[torch.Tensor] = []
    [made] = pipeline.generate(
        video, frames=frames, on_step=tiny.ignore, on_preview=lambda _, pictures, __: told.append(pictures)
    )
    assert len(told) == video.num_inference_steps and made.float().std() > 1
    assert all(torch.equal(pictures, made) for pictures in told)


def test_a_right_flow_leads_to_the_end() -> None:
    """From every level of noise, when it points from the latents to the noise."""
    config = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
    schedule = Schedule(config, flow_shift=3.0, num_inference_steps=5, device=torch.device("cpu"))
    latents, noise = torch.randn(2, 1, 4, 2, 3, 3).unbind()
    assert schedule.sigmas[0] == pytest.approx(1.0, abs=1e-3) and schedule.sigmas[-1] == 0.0
    for index in range(5):
        seen = torch.lerp(latents, noise, schedule.sigmas[index])
        assert torch.allclose(schedule.predicted(index, noise - latents, seen), latents, atol=1e-5)


@pytest.mark.parametrize("num_frames", [1, 2, 3, 4])
def test_the_middle_is_shown(pipeline: VideoPipeline, num_frames: int) -> None:
    """Up to three latent frames it is the video's own picture, the last one of the middle slice."""
    torch.manual_seed(3)
    latents = torch.randn(1, 16, num_frames, 4, 4)
    whole = [to_pictures(pixels)[-1] for pixels in slices(pipeline.vae, latents)]
    made = preview.picture(pipeline.vae, latents)
    if num_frames < 4:
        assert torch.equal(made[0], whole[num_frames // 2])
    others = [index for index in range(num_frames) if index != num_frames // 2]
    assert all((made[0].int() - whole[index].int()).abs().sum() > 0 for index in others)


@pytest.mark.parametrize(
    ("size", "expected"),
    [((256, 256), (256, 256)), ((720, 1280), (144, 256)), ((1280, 720), (256, 144)), ((16, 8192), (1, 256))],
)
def test_large_ones_become_small(size: tuple[int, int], expected: tuple[int, int]) -> None:
    """To 256 pixels on the longer side, by means, also where there is no picture."""
    large = torch.zeros(1, *size, 3, dtype=torch.uint8)
    large[:, :, : size[1] // 2] = 200
    small = preview.small(large)
    assert small.shape == (1, *expected, 3) and small.dtype is torch.uint8
    assert float(small.float().mean()) == pytest.approx(100.0, abs=2.0)
    assert preview.small(large[:0]).shape == (0, *expected, 3)
