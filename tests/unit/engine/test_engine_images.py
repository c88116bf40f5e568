import asyncio
import io
import threading
from collections.abc import Awaitable, Callable
from dataclasses import replace

import pytest
from PIL import Image

from tests.bench import Bench
from tests.fake_ranks import CARD
from wan_grpc.domain.errors import InvalidRequestError, Reason, ServiceError, Violation
from wan_grpc.domain.events import Accepted, Generation
from wan_grpc.domain.images import ImageFit, InputFrames
from wan_grpc.domain.observations import Refused
from wan_grpc.domain.request import GenerationRequest
from wan_grpc.domain.variants import Task
from wan_grpc.engine.intake import Intake, Prepared

OpenAnother = Callable[..., Awaitable[Bench]]
CARD_I2V = replace(CARD, task=Task.IMAGE_TO_VIDEO, takes_last_image=True)


def png(width: int, height: int, colour: tuple[int, int, int] = (10, 20, 30)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, height), colour).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
async def bench(another: OpenAnother) -> Bench:
    return await another(card=CARD_I2V)


async def test_the_ranks_get_the_images_at_the_size_of_the_video(bench: Bench) -> None:
    """First and last image reach the ranks as RGB24 of width x height, and `accepted` has the size they led to."""
    generation = await bench.submit(image=png(200, 100), last_image=png(30, 30, (255, 0, 0)), width=64, height=64)
    run = await bench.executor.run_number(1)
    assert (generation.video.width, generation.video.height) == (80, 32)  # 2 : 1 within 64 x 64 in multiples of 16
    assert run.frames == InputFrames(first=bytes((10, 20, 30)) * 80 * 32, last=bytes((255, 0, 0)) * 80 * 32)
    assert generation.video.image_fit is ImageFit.COVER


async def test_what_is_wrong_with_images_is_told_with_the_rest(bench: Bench) -> None:
    """One answer names a broken image and a wrong number together; nothing was admitted."""
    with pytest.raises(InvalidRequestError) as caught:
        await bench.submit(image=b"no image", seed=-1)
    assert {violation.field for violation in caught.value.violations} == {"spec.image", "spec.seed"}
    assert bench.seen(Refused) == [Refused(reason=Reason.INVALID_REQUEST)]
    assert bench.executor.runs == []


async def test_the_same_images_attach_to_the_same_generation(bench: Bench) -> None:
    """A request id with the same bytes finds its generation, with other bytes it is refused."""
    asked = {"request_id": "7d9c1f70-4c1e-4b5c-9d5f-0a1b2c3d4e5f", "image": png(32, 32)}
    first = await bench.submit(**asked)
    assert (await bench.submit(**asked)).name == first.name
    with pytest.raises(ServiceError) as caught:
        await bench.submit(**{**asked, "image": png(32, 33)})
    assert caught.value.failure.reason is Reason.REQUEST_ID_REUSED


async def test_the_same_request_twice_while_its_image_is_read(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two calls with one id that both wait for the decoder end in one generation."""
    both_inside = threading.Barrier(2)

    def prepare(self: Intake, request: GenerationRequest, found: tuple[Violation, ...] = ()) -> Prepared:
        both_inside.wait(10.0)
        return original(self, request, found)

    original = Intake.prepare
    monkeypatch.setattr(Intake, "prepare", prepare)
    asked = {"request_id": "7d9c1f70-4c1e-4b5c-9d5f-0a1b2c3d4e5f", "image": png(32, 32)}
    one, two = await asyncio.gather(bench.submit(**asked), bench.submit(**asked))
    assert one.name == two.name


async def test_callers_that_leave_let_no_more_images_be_read(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two images are decoded at once, also when their callers have gone and others come; then it is their turn."""
    inside: list[int] = []
    began, may_end = [threading.Event(), threading.Event()], threading.Event()

    def prepare(self: Intake, request: GenerationRequest, found: tuple[Violation, ...] = ()) -> Prepared:
        inside.append(request.seed or 0)
        if len(inside) <= 2:
            began[len(inside) - 1].set()
        assert may_end.wait(10.0)
        return original(self, request, found)

    original = Intake.prepare
    monkeypatch.setattr(Intake, "prepare", prepare)
    gone = [asyncio.create_task(bench.submit(image=png(32, 32), seed=1)) for _ in range(2)]
    for each in began:
        assert await asyncio.to_thread(each.wait, 10.0)
    for task in gone:
        task.cancel()
    await asyncio.wait(gone)
    waiting = asyncio.create_task(bench.submit(image=png(32, 32), seed=2))
    for _ in range(10):  # time enough for a thread to begin, were there one
        await asyncio.to_thread(int)
    assert inside == [1, 1]
    may_end.set()
    assert (await waiting).video.seed == 2
    assert inside == [1, 1, 2]


async def test_pictures_are_forgotten_once_the_ranks_have_them(bench: Bench) -> None:
    """Neither the file nor the pixels of an image stay with a generation that runs or has ended."""
    file = png(640, 640)
    running = await bench.submit(image=file, width=256, height=256)
    waiting = await bench.submit(image=file, width=256, height=256)
    await bench.executor.run_number(1)
    await bench.engine.cancel(waiting.name)
    logs = [bench.engine._generations[generation.name] for generation in (running, waiting)]
    assert [log.take_frames() for log in logs] == [InputFrames(), InputFrames()]
    assert all(log.request.image != file for log in logs)


async def test_a_prompt_that_is_too_long_is_told_about(bench: Bench) -> None:
    """What the model will not read is a warning in `accepted` and in the resource, for both prompts."""
    generation = await bench.submit(prompt="cat " * 600, negative_prompt="dog " * 700, image=png(32, 32))
    expected = (
        "spec.prompt: 601 tokens, of which the model reads the first 512",
        "spec.negative_prompt: 701 tokens, of which the model reads the first 512",
    )
    accepted = bench.engine._generations[generation.name].records[0].event
    assert isinstance(accepted, Accepted)
    assert (generation.warnings, accepted.warnings) == (expected, expected)


async def test_a_prompt_that_fits_is_not(bench: Bench) -> None:
    """No warning where every token is read."""
    generation: Generation = await bench.submit(prompt="cat " * 511, image=png(32, 32))
    assert generation.warnings == ()


async def test_one_frame_of_a_model_that_keeps_the_image_is_told_about(another: OpenAnother) -> None:
    """A picture asked for from a picture is that picture where the first frame is kept, and the caller hears it."""
    bench = await another(card=replace(CARD_I2V, task=Task.TEXT_IMAGE_TO_VIDEO, takes_last_image=False))
    generation: Generation = await bench.submit(image=png(32, 32), num_frames=1)
    assert generation.warnings == (
        "spec.num_frames: this model keeps the image as the first frame, so that one frame is the image again",
    )
    assert (await bench.submit(image=png(32, 32), num_frames=5)).warnings == ()
    assert (await bench.submit(num_frames=1)).warnings == ()


async def test_no_image_is_read_for_a_full_queue(another: OpenAnother, monkeypatch: pytest.MonkeyPatch) -> None:
    """A request that finds no room is told so before its image costs anything."""
    bench = await another(card=CARD_I2V, max_queue=0)
    await bench.submit(image=png(32, 32))
    monkeypatch.setattr(Intake, "prepare", None)  # whoever calls it fails with a TypeError
    with pytest.raises(ServiceError) as caught:
        await bench.submit(image=png(32, 32))
    assert caught.value.failure.reason is Reason.QUEUE_FULL
