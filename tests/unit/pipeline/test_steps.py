"""What a pipeline tells while it works, and what it leaves behind when it is told to stop."""

import gc
from dataclasses import replace
from itertools import groupby

import pytest
import torch

from tests import tiny, tiny_images
from wan_grpc.domain.events import Progress, Stage
from wan_grpc.domain.images import InputFrames
from wan_grpc.domain.request import VideoRequest
from wan_grpc.domain.variants import Expert
from wan_grpc.pipeline.video import VideoPipeline


class Leave(Exception):
    """What an on_step raises to leave."""


def everything(pipeline: VideoPipeline, video: object = tiny.VIDEO) -> torch.Tensor:
    return torch.cat(list(pipeline.generate(video, on_step=tiny.ignore)))


def live_tensor_bytes() -> int:
    gc.collect()
    return sum(value.numel() * value.element_size() for value in gc.get_objects() if type(value) is torch.Tensor)


def test_every_stage_and_step_is_told_once_and_in_order(pipeline: VideoPipeline) -> None:
    """Step 0 when a stage starts, each step after it is done, with its expert and how long it took."""
    told: list[Progress] = []
    list(pipeline.generate(tiny.VIDEO, on_step=told.append))
    experts = [Expert.HIGH_NOISE] * 4 + [Expert.LOW_NOISE] * 2
    assert [replace(progress, step_time_s=None) for progress in told] == [
        *(Progress(stage=Stage.TEXT, step=step, total_steps=2) for step in range(3)),
        Progress(stage=Stage.DENOISE, step=0, total_steps=6),
        *(
            Progress(stage=Stage.DENOISE, step=step, total_steps=6, expert=expert)
            for step, expert in enumerate(experts, start=1)
        ),
        *(Progress(stage=Stage.DECODE, step=step, total_steps=2) for step in range(3)),
    ]
    assert all((progress.step_time_s is None) == (progress.step == 0) for progress in told)
    assert all(progress.step_time_s > 0 for progress in told if progress.step_time_s is not None)


def test_one_prompt_is_encoded_without_guidance(pipeline: VideoPipeline) -> None:
    """The text stage counts the prompts that are needed."""
    told: list[Progress] = []
    pipeline.latents(tiny.video(guidance_scale=1.0), on_step=told.append)
    assert [(p.step, p.total_steps) for p in told if p.stage is Stage.TEXT] == [(0, 1), (1, 1)]


def test_a_step_is_told_after_its_work_and_before_the_next(pipeline: VideoPipeline) -> None:
    """When step n is told, exactly the forwards of n steps have run."""
    num_forwards = 0
    seen: list[tuple[int, int]] = []

    def count(*_: object) -> None:
        nonlocal num_forwards
        num_forwards += 1

    def look(progress: Progress) -> None:
        if progress.stage is Stage.DENOISE:
            seen.append((progress.step, num_forwards))

    hooks = [model.register_forward_hook(count) for model in pipeline.transformers.values()]
    pipeline.latents(tiny.VIDEO, on_step=look)
    for hook in hooks:
        hook.remove()
    assert seen == [(step, 2 * step) for step in range(7)]


def test_frames_come_slice_by_slice(pipeline: VideoPipeline) -> None:
    """One frame, then four at a time, each slice as soon as it is decoded: uint8 RGB, contiguous, on the CPU."""
    told: list[int] = []

    def look(progress: Progress) -> None:
        if progress.stage is Stage.DECODE:
            told.append(progress.step)

    described = [
        (frames.shape, frames.dtype, frames.device.type, frames.is_contiguous(), told[-1])
        for frames in pipeline.generate(tiny.video(num_frames=9), on_step=look)
    ]
    assert described == [
        (torch.Size([1, 32, 48, 3]), torch.uint8, "cpu", True, 1),
        (torch.Size([4, 32, 48, 3]), torch.uint8, "cpu", True, 2),
        (torch.Size([4, 32, 48, 3]), torch.uint8, "cpu", True, 3),
    ]


@pytest.fixture(scope="module", params=["i2v", "ti2v"])
def with_image(request: pytest.FixtureRequest) -> tuple[VideoPipeline, VideoRequest, InputFrames]:
    """A pipeline that takes images, a video for it, and the image that this starts from."""
    if request.param == "i2v":
        made, video = tiny_images.make_i2v(), tiny.video(width=48, height=32)
    else:
        made, video = tiny_images.make_ti2v(), tiny.video(width=64, height=32, boundary_ratio=None)
    return tiny_images.ours(made), video, tiny_images.frames_of(tiny_images.picture(video.width, video.height))


def test_images_come_after_text(with_image: tuple[VideoPipeline, VideoRequest, InputFrames]) -> None:
    """Their stage stands between text and denoising, and only where there is an image."""
    pipeline, video, frames = with_image
    told: list[Progress] = []
    list(pipeline.generate(video, frames=frames, on_step=told.append))
    stages = [stage for stage, _ in groupby(progress.stage for progress in told)]
    assert stages == [Stage.TEXT, Stage.IMAGE, Stage.DENOISE, Stage.DECODE]


@pytest.mark.parametrize(
    ("stage", "step"), [(Stage.IMAGE, 0), (Stage.IMAGE, 1), (Stage.DENOISE, 0), (Stage.DENOISE, 1), (Stage.DECODE, 1)]
)
def test_leaving_a_video_with_an_image_leaves_nothing(
    stage: Stage, step: int, with_image: tuple[VideoPipeline, VideoRequest, InputFrames]
) -> None:
    """Neither when it comes to its end nor when it is left does a tensor stay; the next video is right."""
    pipeline, video, frames = with_image

    def leave(progress: Progress) -> None:
        if (progress.stage, progress.step) == (stage, step):
            raise Leave

    def make() -> torch.Tensor:
        return torch.cat(list(pipeline.generate(video, frames=frames, on_step=tiny.ignore)))

    expected = make()  # also fills the memory of prompts, which is meant to stay
    before = live_tensor_bytes()
    with pytest.raises(Leave):
        list(pipeline.generate(video, frames=frames, on_step=leave))
    assert live_tensor_bytes() == before
    assert torch.equal(make(), expected)
    assert live_tensor_bytes() == before


@pytest.mark.parametrize(
    ("stage", "step"),
    [
        (Stage.TEXT, 0),
        (Stage.TEXT, 1),
        (Stage.DENOISE, 0),
        (Stage.DENOISE, 3),
        (Stage.DENOISE, 6),
        (Stage.DECODE, 0),
        (Stage.DECODE, 1),
        (Stage.DECODE, 2),
    ],
)
def test_leaving_at_any_step_leaves_nothing(stage: Stage, step: int, pipeline: VideoPipeline) -> None:
    """What on_step raises comes out, no tensor of the request stays alive, and the next video is right."""
    expected = everything(pipeline)  # also fills the memory of prompts, which is meant to stay
    before = live_tensor_bytes()

    def leave(progress: Progress) -> None:
        if (progress.stage, progress.step) == (stage, step):
            raise Leave

    with pytest.raises(Leave):
        list(pipeline.generate(tiny.VIDEO, on_step=leave))
    assert live_tensor_bytes() == before
    assert torch.equal(everything(pipeline), expected)


def test_a_video_that_nobody_reads_on_leaves_nothing(pipeline: VideoPipeline) -> None:
    """Closing the iterator after its first frame frees what it held, and the next video is right."""
    expected = everything(pipeline)
    before = live_tensor_bytes()
    frames = pipeline.generate(tiny.VIDEO, on_step=tiny.ignore)
    next(frames)
    frames.close()
    assert live_tensor_bytes() == before
    assert torch.equal(everything(pipeline), expected)


def test_a_request_is_not_changed_by_those_before_it(pipeline: VideoPipeline) -> None:
    """The same request gives the same bytes after others of other shapes."""
    expected = everything(pipeline)
    for other in (tiny.video(width=32, height=32, num_frames=1), tiny.video(flow_shift=3.0, num_inference_steps=3)):
        everything(pipeline, other)
    assert torch.equal(everything(pipeline), expected)


def test_dtype_and_attention_have_names(pipeline: VideoPipeline) -> None:
    """What the ranks report about themselves."""
    assert (pipeline.dtype_name, pipeline.attention_name, str(pipeline.device)) == ("float32", "torch_sdpa", "cpu")
