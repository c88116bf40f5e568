import copy
import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanAttentionBlock, WanCausalConv3d, WanResample
from torch import nn

from tests import tiny, tiny_images
from tests.distributed.crew import Crew, crew
from wan_grpc.domain.events import Progress, Stage
from wan_grpc.domain.topology import Topology
from wan_grpc.domain.traffic import Exchange
from wan_grpc.parallel.group import ExchangeBrokenError
from wan_grpc.parallel.mesh import Mesh
from wan_grpc.parallel.vae import Strip, StripDivision, split_vae
from wan_grpc.pipeline import decode, preview
from wan_grpc.pipeline.image import ImageConditioner
from wan_grpc.pipeline.strips import WHOLE, Strips

VAES = {"A14B": tiny_images.VAE_OF_A14B, "5B": tiny_images.VAE_OF_5B}
BOUND = 1e-4
"""Of a pixel from -1 to 1, or of a latent of unit variance, fp32: a frame's keys come in another order."""

SIZES = {"landscape": (4, 6, 3), "portrait": (6, 4, 1), "odd": (5, 7, 3), "few rows": (2, 7, 2)}
"""Height and width of latents, and how many there are."""
DIVIDED = {  # by world size and height x width: the dim of the strips, -2 for rows, and their sizes
    2: {
        (4, 6): (-2, (2, 2)),
        (6, 4): (-2, (3, 3)),
        (5, 7): (-1, (4, 3)),
        (2, 7): (-2, (1, 1)),
        (7, 2): (-1, (1, 1)),
        (90, 160): (-2, (45, 45)),
        (1, 3): (-1, (2, 1)),
        (1, 1): None,
    },
    3: {
        (4, 6): (-1, (2, 2, 2)),
        (6, 4): (-2, (2, 2, 2)),
        (5, 7): (-2, (2, 2, 1)),
        (2, 7): (-1, (3, 2, 2)),
        (7, 2): (-2, (3, 2, 2)),
        (2, 2): None,
    },
    4: {
        (4, 6): (-2, (1, 1, 1, 1)),
        (6, 4): (-1, (1, 1, 1, 1)),
        (5, 7): (-1, (2, 2, 2, 1)),
        (2, 7): (-1, (2, 2, 2, 1)),
        (7, 2): (-2, (2, 2, 2, 1)),
        (90, 160): (-1, (40, 40, 40, 40)),
        (3, 3): None,
    },
}
WORLDS = {2: Topology(cfg=2), 3: Topology(ring=3), 4: Topology(cfg=2, ulysses=2)}
for_both = pytest.mark.parametrize("name", VAES)


@pytest.fixture(scope="module", params=WORLDS, ids=lambda size: f"{size} ranks")
def ranks(request: pytest.FixtureRequest) -> Iterator[Crew]:
    """A crew of each size."""
    with crew(WORLDS[request.param]) as started:
        yield started


# ---- on the ranks -----------------------------------------------------------------------------------------------


@cache
def make_vae(name: str) -> AutoencoderKLWan:
    """The same everywhere. Its attention is decided, so that pixels that it does not see are missed."""
    torch.manual_seed(5)
    vae = tiny_images.make_vae(VAES[name])
    with torch.no_grad():
        for module in vae.modules():
            if isinstance(module, WanAttentionBlock):
                module.to_qkv.weight *= 3.0
                module.proj.weight *= 3.0
    return vae


def make_divided(mesh: Mesh, name: str) -> tuple[AutoencoderKLWan, StripDivision]:
    vae = copy.deepcopy(make_vae(name))
    return vae, split_vae(vae, mesh)


@cache
def make_latents(name: str, height: int, width: int, num_frames: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(num_frames)
    return torch.randn(1, make_vae(name).config["z_dim"], num_frames, height, width, generator=generator)


@cache
def pixels_alone(name: str, *size: int) -> torch.Tensor:
    return torch.cat(list(decode.slices(make_vae(name), make_latents(name, *size))), dim=2)


def pixels_together(vae: AutoencoderKLWan, strips: Strips, latents: torch.Tensor) -> torch.Tensor:
    strip = strips.of(*latents.shape[3:])
    return torch.cat([strip.join(part) for part in decode.slices(vae, strip.cut(latents), strip)], dim=2)


def worst(actual: torch.Tensor, expected: torch.Tensor) -> float:
    assert actual.shape == expected.shape
    return float((actual.float() - expected.float()).abs().max())


def sizes_of_strips(mesh: Mesh, sizes: Sequence[tuple[int, int]]) -> list[tuple[int, int] | None]:
    """The dim of this rank's strip and its lines; None for a whole."""
    strips = [StripDivision(mesh).of(*size) for size in sizes]
    return [
        (strip.dim, strip.cut(torch.empty(*size)).shape[strip.dim]) if isinstance(strip, Strip) else None
        for strip, size in zip(strips, sizes, strict=True)
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Made:
    """What a rank has in the end."""

    values: np.ndarray | None
    """Of rank 0; the others must have the same bytes."""
    digest: str


def made(mesh: Mesh, tensor: torch.Tensor) -> Made:
    tensor = tensor.contiguous()
    digest = hashlib.sha256(tensor.numpy().tobytes()).hexdigest()
    return Made(values=tensor.numpy() if mesh.is_first else None, digest=digest)


def decode_together(mesh: Mesh, name: str, *size: int) -> Made:
    vae, strips = make_divided(mesh, name)
    return made(mesh, pixels_together(vae, strips, make_latents(name, *size)))


def frames_together(mesh: Mesh, name: str, *size: int) -> tuple[np.ndarray, list[tuple[Stage, int, int, bool]]]:
    """The frames that this rank hands on, and the steps that it tells, timed or not."""
    vae, strips = make_divided(mesh, name)
    told: list[Progress] = []
    frames = torch.cat(list(decode.frames(vae, make_latents(name, *size), strips=strips, on_step=told.append)))
    steps = [(step.stage, step.step, step.total_steps, step.step_time_s is not None) for step in told]
    return frames.numpy(), steps


def preview_together(mesh: Mesh, name: str, *size: int) -> np.ndarray:
    vae, strips = make_divided(mesh, name)
    return preview.picture(vae, make_latents(name, *size), strips=strips).numpy()


def encode_images(
    vae: AutoencoderKLWan, strips: Strips, height: int, width: int, num_frames: int, *, keeps_first: bool = False
) -> torch.Tensor:
    """The latents of a video that begins with an image and, unless it keeps that, ends with another."""
    factor = vae.config["scale_factor_spatial"]
    video = tiny.video(width=width * factor, height=height * factor, num_frames=4 * num_frames - 3)
    first, last = (tiny_images.picture(video.width, video.height, seed) for seed in range(2))
    condition = ImageConditioner(vae, keeps_first=keeps_first, image_encoder=None).condition(
        video,
        tiny_images.frames_of(first, last if not keeps_first and num_frames > 1 else None),
        strips=strips,
        on_step=tiny.ignore,
    )
    latents = condition.first if keeps_first else condition.channels
    assert latents is not None and latents.shape[3:] == (height, width)
    return latents


def encode_together(mesh: Mesh, name: str, size: tuple[int, int, int], keeps_first: bool) -> Made:
    vae, strips = make_divided(mesh, name)
    return made(mesh, encode_images(vae, strips, *size, keeps_first=keeps_first))


def _forget_borders(vae: AutoencoderKLWan, strips: StripDivision) -> None:
    begin = strips.of

    def of(height: int, width: int) -> Any:
        strip = begin(height, width)
        assert isinstance(strip, Strip)
        compute = strip.computing

        def computing() -> Any:
            for line in strip.kept.values():
                line.zero_()
            return compute()

        strip.computing = computing  # type: ignore[method-assign]
        return strip

    strips.of = of  # type: ignore[method-assign]


def _undivided(is_it: Callable[[nn.Module], bool]) -> Callable[[AutoencoderKLWan, StripDivision], None]:
    """Modules of one sort take a strip for the whole picture."""

    def undo(vae: AutoencoderKLWan, strips: StripDivision) -> None:
        for module in vae.modules():
            if is_it(module):
                del module.forward

    return undo


def _is_3x3(module: nn.Module) -> bool:
    return isinstance(module, WanCausalConv3d) and module.kernel_size == (3, 3, 3)


FAULTS: dict[str, Callable[[AutoencoderKLWan, StripDivision], None]] = {
    "convolutions without borders": _undivided(_is_3x3),
    "resampling without borders": _undivided(lambda module: isinstance(module, nn.Sequential)),
    "attention to the strip alone": _undivided(lambda module: isinstance(module, WanAttentionBlock)),
    "borders forgotten from slice to slice": _forget_borders,
}


def make_with(mesh: Mesh, name: str, size: tuple[int, int, int], fault: str) -> tuple[Made, Made]:
    """Pixels and latents if the division had this fault."""
    vae, strips = make_divided(mesh, name)
    FAULTS[fault](vae, strips)
    pixels = pixels_together(vae, strips, make_latents(name, *size))
    return made(mesh, pixels), made(mesh, encode_images(vae, strips, *size))


def decode_tiny(mesh: Mesh, name: str, height: int, width: int) -> tuple[bool, list[int], int]:
    """Whether latents and pixels are, bit for bit, those of one rank; how many frames are handed on; bytes sent."""
    vae, strips = make_divided(mesh, name)
    latents = make_latents(name, height, width, 2)
    mesh.meter.take()
    pixels = pixels_together(vae, strips, latents)
    frames = decode.frames(vae, latents, strips=strips, on_step=tiny.ignore)
    lengths = [len(pictures) for pictures in frames]
    encoded = encode_images(vae, strips, height, width, 2)
    is_equal = torch.equal(pixels, pixels_alone(name, height, width, 2)) and torch.equal(
        encoded, encode_images(make_vae(name), WHOLE, height, width, 2)
    )
    return is_equal, lengths, sum(traffic.sent_bytes for traffic in mesh.meter.take())


def break_off(mesh: Mesh, name: str, culprits: Sequence[int], *size: int) -> Made:
    """Some ranks fail within the second slice; then the same latents are decoded, with new links if some had waited."""
    vae, strips = make_divided(mesh, name)
    latents = make_latents(name, *size)
    calls = 0

    def fail(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        nonlocal calls
        calls += 1
        if calls == 2 and mesh.rank in culprits:
            raise ZeroDivisionError

    hook = vae.decoder.up_blocks[1].register_forward_pre_hook(fail)
    caught = None
    try:
        pixels_together(vae, strips, latents)
    except (ZeroDivisionError, ExchangeBrokenError) as error:
        caught = type(error)
    hook.remove()
    assert caught is (ZeroDivisionError if mesh.rank in culprits else ExchangeBrokenError)
    assert strips.strip is None
    if len(culprits) < mesh.topology.world_size:
        mesh.drop()
        mesh.agree(0)
        mesh.build()
    return made(mesh, pixels_together(vae, strips, latents))


def interleave(mesh: Mesh, name: str, *sizes: tuple[int, int, int]) -> list[Made]:
    """Videos slice by slice in turn, others begun and left in between, and at last one whole on each rank."""
    vae, strips = make_divided(mesh, name)
    begun = [(strips.of(*size[:2]), make_latents(name, *size)) for size in sizes]
    videos = [decode.slices(vae, strip.cut(latents), strip) for strip, latents in begun]
    parts: list[list[torch.Tensor]] = [[] for _ in sizes]
    for _ in range(sizes[0][2]):
        for (strip, _), video, joined in zip(begun, videos, parts, strict=True):
            joined.append(strip.join(next(video)))
        next(decode.frames(vae, begun[0][1], strips=strips, on_step=tiny.ignore))
    parts.append(list(decode.slices(vae, begun[0][1])))
    return [made(mesh, torch.cat(each, dim=2)) for each in parts]


def generate(mesh: Mesh) -> tuple[np.ndarray, dict[Stage, bool]]:
    """The frames of a video with an image that a rank hands on, and whether it sent something in each stage."""
    theirs = tiny_images.make_i2v()
    pipeline = tiny_images.ours(theirs)
    pipeline.strips = split_vae(pipeline.vae, mesh)
    sends: dict[Stage, bool] = {}

    def tell(step: Progress) -> None:
        sends[step.stage] = bool(mesh.meter.take()) or sends.get(step.stage, False)

    images = tiny_images.frames_of(tiny_images.picture(48, 32))
    mesh.meter.take()
    return torch.cat(list(pipeline.generate(tiny.VIDEO, frames=images, on_step=tell))).numpy(), sends


def count_bytes(mesh: Mesh, name: str, *size: int) -> tuple[list[int], list[int]]:
    """Of each slice, the bytes that this rank sent, and those that it keeps of its neighbours."""
    vae, strips = make_divided(mesh, name)
    strip = strips.of(*size[:2])
    assert isinstance(strip, Strip)
    mesh.meter.take()
    sent, kept = [], []
    for _ in decode.slices(vae, strip.cut(make_latents(name, *size)), strip):
        [traffic] = mesh.meter.take()
        assert traffic.kind is Exchange.VAE
        sent.append(traffic.sent_bytes)
        kept.append(sum(line.untyped_storage().nbytes() for line in strip.kept.values()))
    return sent, kept


def needed_bytes(name: str, size: tuple[int, int, int], dim: int, lines: Sequence[int]) -> list[tuple[int, int]]:
    """Of each slice of a whole video: bytes of one line of all that 3 x 3 convolutions see; of keys and values."""
    vae = copy.deepcopy(make_vae(name))
    borders, attended = 0, 0

    def see(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        nonlocal borders
        borders += inputs[0].numel() // inputs[0].shape[dim] * 4

    def attend(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        nonlocal attended
        attended += 2 * inputs[0].numel() // sum(lines) * max(lines) * 4

    for module in vae.decoder.modules():
        if _is_3x3(module):
            module.register_forward_pre_hook(see)
        elif isinstance(module, WanResample) and "upsample" in module.mode:
            module.resample.register_forward_pre_hook(see)
        elif isinstance(module, WanAttentionBlock):
            module.register_forward_pre_hook(attend)
    needed = []
    for _ in decode.slices(vae, make_latents(name, *size)):
        needed.append((borders, attended))
        borders = attended = 0
    return needed


# ---- the tests --------------------------------------------------------------------------------------------------


@cache
def latents_alone(name: str, *size: int, keeps_first: bool = False) -> torch.Tensor:
    return encode_images(make_vae(name), WHOLE, *size, keeps_first=keeps_first)


def error(told: Sequence[Made], expected: torch.Tensor) -> float:
    """Of what all ranks have, the worst value; infinite if they do not have the same."""
    if any(each.digest != told[0].digest for each in told):
        return float("inf")
    assert told[0].values is not None
    return worst(torch.from_numpy(told[0].values), expected)


def test_rows_or_columns(ranks: Crew) -> None:
    """Strips lie along the dim that gives the busiest rank less, rows if neither does; none if both are too short."""
    expected = DIVIDED[ranks.topology.world_size]
    for rank, told in enumerate(ranks.run(sizes_of_strips, list(expected))):
        assert told == [each and (each[0], each[1][rank]) for each in expected.values()]


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
@for_both
def test_decoding_is_that_of_one_rank(ranks: Crew, name: str, size: tuple[int, int, int]) -> None:
    """Pixels are within 1e-4, and the very same on all ranks."""
    assert error(ranks.run(decode_together, name, *size), pixels_alone(name, *size)) < BOUND


@for_both
def test_rank_0_hands_frames_on(ranks: Crew, name: str) -> None:
    """They are within one level of those of one rank; others hand on none and tell the same steps."""
    size = SIZES["odd"]
    (frames, _), *others = told = ranks.run(frames_together, name, *size)
    expected = decode.to_pictures(pixels_alone(name, *size))
    assert worst(torch.from_numpy(frames), expected) <= 1
    assert all(frames.shape == (0, *expected.shape[1:]) for frames, _ in others)
    assert all(steps == [(Stage.DECODE, step, 3, step > 0) for step in range(4)] for _, steps in told)


@pytest.mark.parametrize("size", [SIZES["landscape"], SIZES["few rows"], (1, 1, 2)])
@for_both
def test_rank_0_hands_previews_on(ranks: Crew, name: str, size: tuple[int, int, int]) -> None:
    """The picture of one rank within one level; others hand on none."""
    picture, *others = ranks.run(preview_together, name, *size)
    expected = preview.picture(make_vae(name), make_latents(name, *size))
    assert picture.shape == expected.shape and worst(torch.from_numpy(picture), expected) <= 1
    assert all(other.shape == (0, *expected.shape[1:]) for other in others)


@pytest.mark.parametrize("shape", ["landscape", "portrait", "odd"])
@for_both
def test_encoding_is_that_of_one_rank(ranks: Crew, name: str, shape: str) -> None:
    """Latents of a video with given ends are within 1e-4, and the very same on all ranks."""
    size = SIZES[shape]
    assert error(ranks.run(encode_together, name, size, False), latents_alone(name, *size)) < BOUND


def test_a_first_frame_alone_is_encoded(ranks: Crew) -> None:
    """The image that stands in the latents themselves, likewise."""
    size = SIZES["odd"]
    expected = latents_alone("5B", *size, keeps_first=True)
    assert error(ranks.run(encode_together, "5B", size, True), expected) < BOUND


@pytest.mark.parametrize("ranks", [3], indirect=True, ids=["3 ranks"])
@pytest.mark.parametrize("fault", FAULTS)
@for_both
def test_the_bound_finds_faults(ranks: Crew, name: str, fault: str) -> None:
    """A division with a fault is off by more than 20 of 255 levels, and latents by a thousand times the bound."""
    size = SIZES["landscape"]
    pixels, latents = zip(*ranks.run(make_with, name, size, fault), strict=True)
    assert 20 * 2 / 255 < error(pixels, pixels_alone(name, *size)) < float("inf")
    assert 1000 * BOUND < error(latents, latents_alone(name, *size)) < float("inf")


@for_both
def test_more_ranks_than_lines(ranks: Crew, name: str) -> None:
    """A tiny picture is computed whole on every rank, bit for bit as on one, handed on once, and nothing is sent."""
    [size] = [size for size, strips in DIVIDED[ranks.topology.world_size].items() if strips is None]
    told = ranks.run(decode_tiny, name, *size)
    assert told == [(True, [1, 4] if rank == 0 else [0, 0], 0) for rank in range(len(told))]


@for_both
def test_a_rank_alone(name: str) -> None:
    """It computes its one strip, which is the picture, with what strips save, bit for bit as whole; nothing is sent."""
    with crew(Topology()) as alone:
        assert alone.run(decode_tiny, name, *SIZES["odd"][:2]) == [(True, [1, 4], 0)]
        assert alone.run(sizes_of_strips, [(5, 7), (1, 1)]) == [[(-2, 5), (-2, 1)]]


@pytest.mark.parametrize("who", ["all ranks", "the last rank"])
def test_a_failure_leaves_nothing_behind(ranks: Crew, who: str) -> None:
    """After ranks failed in the middle of a slice the next video is right, with new links where others had waited."""
    everybody, size = list(range(ranks.topology.world_size)), SIZES["odd"]
    culprits = everybody if who == "all ranks" else everybody[-1:]
    assert error(ranks.run(break_off, "A14B", culprits, *size), pixels_alone("A14B", *size)) < BOUND


def test_videos_do_not_know_each_other(ranks: Crew) -> None:
    """Strips of different videos in turn, abandoned ones, and a whole video outside of strips are all right."""
    sizes = [SIZES["landscape"], SIZES["odd"]]
    told = zip(*ranks.run(interleave, "A14B", *sizes), strict=True)
    for each, size in zip(told, [*sizes, sizes[0]], strict=True):
        assert error(each, pixels_alone("A14B", *size)) < BOUND


def test_a_pipeline_divides_pictures(ranks: Crew) -> None:
    """Image and frames of one video are divided and nothing else; the frames are those of one rank."""
    (frames, _), *_ = told = ranks.run(generate)
    images = tiny_images.frames_of(tiny_images.picture(48, 32))
    alone = tiny_images.ours(tiny_images.make_i2v()).generate(tiny.VIDEO, frames=images, on_step=tiny.ignore)
    assert worst(torch.from_numpy(frames), torch.cat(list(alone))) <= 1
    expected = {Stage.TEXT: False, Stage.IMAGE: True, Stage.DENOISE: False, Stage.DECODE: True}
    assert all(sends == expected for _, sends in told)


@for_both
def test_only_new_lines_are_sent(ranks: Crew, name: str) -> None:
    """A line of each frame, once to each neighbour, and keys and values to all; what is kept does not grow."""
    size = (4, 6, 4)
    dim, lines = DIVIDED[ranks.topology.world_size][size[:2]]
    needed = needed_bytes(name, size, dim, lines)
    for rank, (sent, kept) in enumerate(ranks.run(count_bytes, name, *size)):
        num_neighbours = (rank > 0) + (rank + 1 < len(lines))
        assert sent == [borders * num_neighbours + attended * (len(lines) - 1) for borders, attended in needed]
        assert kept[1:] == [kept[1]] * 3
