"""What comes over the wire against what diffusers makes of the same checkpoint."""

import io
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from tests import tiny, tiny_images
from tests.functional import checkpoint
from tests.functional.live import LiveServer, running_server, spec
from tests.tiny_images import picture
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


def wire(video: VideoRequest, **images: Any) -> pb.GenerationSpec:
    values = {
        name: getattr(video, name) for name in pb.GenerationSpec.DESCRIPTOR.fields_by_name if hasattr(video, name)
    }
    for name in ("output_format", "encoding", "image_fit"):
        del values[name]
    if video.boundary_ratio is None:  # one expert: whatever there is of a second one is refused
        del values["boundary_ratio"], values["guidance_scale_2"]
    return spec(**values, **images, output_format=pb.OUTPUT_FORMAT_RAW_RGB24)


def frames(live: LiveServer, video: VideoRequest, **images: Any) -> torch.Tensor:
    """What the server sends, [F, H, W, 3] from 0 to 1."""
    data = live.make(wire(video, **images)).video
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


# ---- images ---------------------------------------------------------------------------------------------------------

FLAGS = ("--cpu-threads", "1", "--drain-window-s", "0")
I2V = tiny.video(width=80, height=48, num_inference_steps=3, flow_shift=5.0, boundary_ratio=0.9)
TI2V = tiny.video(width=96, height=64, num_inference_steps=3, flow_shift=5.0, boundary_ratio=None)


@pytest.fixture(scope="module")
def i2v() -> tiny_images.WanImageToVideoPipeline:
    return tiny_images.make_i2v()


@pytest.fixture(scope="module")
def live_i2v(
    i2v: tiny_images.WanImageToVideoPipeline, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LiveServer]:
    """A server of an image-to-video model that diffusers saved."""
    saved = tiny.save(i2v, tmp_path_factory.mktemp("i2v"))
    with running_server(tmp_path_factory.mktemp("live-i2v"), "--model-path", str(saved), *FLAGS) as server:
        yield server


@pytest.fixture(scope="module")
def ti2v() -> tiny.WanPipeline:
    return tiny_images.make_ti2v()


@pytest.fixture(scope="module")
def live_ti2v(ti2v: tiny.WanPipeline, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """A server of a text-and-image-to-video model that diffusers saved."""
    saved: Path = tiny.save(ti2v, tmp_path_factory.mktemp("ti2v"))
    with running_server(tmp_path_factory.mktemp("live-ti2v"), "--model-path", str(saved), *FLAGS) as server:
        yield server


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize(
    ("changes", "size", "last"),
    [
        ({"image_fit": pb.IMAGE_FIT_STRETCH}, (123, 57), None),
        ({}, (160, 96), None),
        ({"image_fit": pb.IMAGE_FIT_EXACT, "width": 48, "height": 80, "num_frames": 9}, (48, 80), (48, 80)),
        ({"num_frames": 1}, (80, 48), None),
    ],
    ids=["stretched", "twice the size", "portrait, first and last", "one frame"],
)
def test_a_video_from_images_is_that_of_diffusers(
    changes: dict[str, Any],
    size: tuple[int, int],
    last: tuple[int, int] | None,
    live_i2v: LiveServer,
    i2v: tiny_images.WanImageToVideoPipeline,
) -> None:
    """The same files through the server and, as pictures, through diffusers, which resizes them by itself."""
    fit = {name: changes[name] for name in changes if name == "image_fit"}
    video = replace(I2V, **{name: value for name, value in changes.items() if name not in fit})
    images = {"image": picture(*size)} | ({"last_image": picture(*last, seed=1)} if last else {})
    expected = tiny_images.reference(i2v, video, first=images["image"], last=images.get("last_image"), output_type="np")
    assert float(expected.std()) > 0.1, "a grey video would equal any other"
    files = {name: png(image) for name, image in images.items()}
    assert worst(frames(live_i2v, video, **files, **fit), expected) <= BOUND
    mistaken = files | {list(files)[-1]: png(picture(*size, seed=9))}
    assert worst(frames(live_i2v, video, **mistaken, **fit), expected) > BOUND


@pytest.mark.parametrize("has_image", [False, True], ids=["text alone", "with an image"])
def test_a_video_from_text_and_image_is_that_of_diffusers(
    has_image: bool, live_ti2v: LiveServer, ti2v: tiny.WanPipeline
) -> None:
    """One model with an image and without."""
    image = picture(TI2V.width, TI2V.height) if has_image else None
    pipeline = tiny_images.with_images(ti2v) if image else ti2v
    expected = tiny_images.reference(pipeline, TI2V, first=image, output_type="np")
    assert float(expected.std()) > 0.1, "a grey video would equal any other"
    files = {"image": png(image)} if image else {}
    assert worst(frames(live_ti2v, TI2V, **files), expected) <= BOUND
    mistaken = {} if image else {"image": png(picture(TI2V.width, TI2V.height))}
    assert worst(frames(live_ti2v, TI2V, **mistaken), expected) > BOUND
