"""What comes over the wire against what diffusers makes of the same checkpoint."""

from dataclasses import replace

import pytest
import torch

from tests import tiny
from tests.functional import checkpoint
from tests.functional.live import LiveServer, spec
from wan_grpc.domain.request import VideoRequest
from wan_grpc.domain.variants import Expert
from wan_grpc.v1 import generation_pb2 as pb

BOUND = 1 / 255
CASES = {
    "crossing, not square": tiny.video(width=64, height=48),
    "odd steps, longer, other shift and boundary": tiny.video(
        width=48,
        height=80,
        num_frames=9,
        num_inference_steps=5,
        flow_shift=3.0,
        boundary_ratio=0.7,
        negative_prompt="",
        seed=11,
    ),
    "no unconditional pass": tiny.video(guidance_scale=1.0, guidance_scale_2=1.0, seed=12),
    "guidance of one expert alone": tiny.video(guidance_scale=5.0, guidance_scale_2=1.0, num_frames=1, seed=13),
}


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> None:
    """The server's ranks need the cores more."""
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def reference() -> tiny.WanPipeline:
    """The pipeline that the served checkpoint was saved from."""
    return checkpoint.make_pipeline()


def wire(video: VideoRequest) -> pb.GenerationSpec:
    names = [name for name in VideoRequest.__dataclass_fields__ if name != "output_format"]
    return spec(**{name: getattr(video, name) for name in names}, output_format=pb.OUTPUT_FORMAT_RAW_RGB24)


def frames(live: LiveServer, video: VideoRequest) -> torch.Tensor:
    """What the server sends, [F, H, W, 3] from 0 to 1."""
    data = live.make(wire(video)).video
    return torch.frombuffer(data, dtype=torch.uint8).view(-1, video.height, video.width, 3) / 255


def worst(actual: torch.Tensor, expected: torch.Tensor) -> float:
    assert actual.shape == expected.shape
    return float((actual - expected).abs().max())


@pytest.mark.parametrize("video", CASES.values(), ids=CASES.keys())
def test_frames_are_those_of_diffusers(live: LiveServer, reference: tiny.WanPipeline, video: VideoRequest) -> None:
    """Every sample of every frame that is received equals WanPipeline's within 1/255."""
    expected = tiny.reference(reference, video, output_type="np")
    assert float(expected.std()) > 0.1, "a grey video would equal any other"
    assert worst(frames(live, video), expected) <= BOUND


@pytest.mark.parametrize(
    "wrong",
    [
        {"flow_shift": 11.5},
        {"boundary_ratio": 0.95},
        {"guidance_scale": 4.1},
        {"negative_prompt": "sharp"},
        {"seed": 8},
    ],
    ids=lambda wrong: next(iter(wrong)),
)
def test_the_bound_notices_an_error(live: LiveServer, reference: tiny.WanPipeline, wrong: dict[str, object]) -> None:
    """A wrong shift, boundary, guidance, negative prompt or seed does not pass for the right one."""
    video = CASES["crossing, not square"]
    expected = tiny.reference(reference, video, output_type="np")
    assert worst(frames(live, replace(video, **wrong)), expected) > BOUND  # type: ignore[arg-type]


def test_both_experts_are_at_work(live: LiveServer) -> None:
    """The steps that are told cross from one expert to the other at the boundary that the schedule has."""
    told: list[Expert] = []
    stream = live.make(wire(CASES["crossing, not square"]))
    for event in stream.events:
        if event.progress.expert:
            told.append(pb.Expert.Name(event.progress.expert))
    assert told == ["EXPERT_HIGH_NOISE"] * 4 + ["EXPERT_LOW_NOISE"] * 2
