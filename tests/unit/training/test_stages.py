"""All stages in small, one after the other, and what comes out of them."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import WanImageToVideoPipeline, WanPipeline
from PIL import Image

from training.__main__ import main
from training.assemble import EXPERTS
from training.experts import ROLES, make_expert
from training.generate import animator_of, generator_of
from training.judge import Verdict
from training.latents import SIZES, Clips, make_clips, read, statistics
from training.loop import finished
from training.score import Score, examine, questions, score
from training.sheet import sheet
from training.stages import Work, trained_expert, trained_text, trained_vae
from training.vae import make_vae
from training.world import Camera, Scene, is_held_out
from wan_grpc.domain.variants import Task
from wan_grpc.pipeline.checkpoint import locate
from wan_grpc.pipeline.load import load

SMALL = {"width": 32, "height": 32, "num_frames": 5, "num_inference_steps": 2, "guidance_scale": 4.0}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory in which every stage has taken a step or two."""
    directory = tmp_path_factory.mktemp("training")
    for stage in (
        "text --steps 2",
        "vae --steps 1 --num-clips 1 --scale 0.00002",
        "latents --counts 2 2 2",
        "expert --role base --steps 2 --num-tokens 300 --rate 0.01 --warm-up 1",
        "expert --role t2v-high --first base --steps 2 --num-tokens 300",
        "expert --role t2v-low --steps 1 --num-tokens 300",
        "expert --role ti2v --steps 1 --num-tokens 300",
        f"model --task t2v --out {directory}/made-t2v",
        f"model --task ti2v --out {directory}/made-ti2v",
    ):
        main([*stage.split(), "--run", str(directory), "--device", "cpu"])
    return directory


def test_a_text_to_video_model(run: Path) -> None:
    """Two experts with a boundary, which the server finds no fault with and diffusers loads; its weights are small."""
    made = run / "made-t2v"
    card = locate(str(made), load_format="auto")
    pipeline = load(card, device="cpu", dtype="float32", load_format="auto")
    assert len(pipeline.transformers) == 2
    clips = generator_of(made, torch.device("cpu"), **SMALL)(["a red star spins on grey", "zzz"], [1, 2])
    assert [clip.shape for clip in clips] == [(5, 32, 32, 3)] * 2
    assert not torch.equal(clips[0], clips[1])
    assert WanPipeline.from_pretrained(made).config.boundary_ratio == 0.875
    assert sum(file.stat().st_size for file in made.rglob("*.safetensors")) < 12.5e6


def test_a_model_that_takes_images(run: Path) -> None:
    """One expert in the layout of TI2V-5B, with the VAE and the text encoder of the other model."""
    made = run / "made-ti2v"
    card = locate(str(made), load_format="auto")
    assert load(card, device="cpu", dtype="float32", load_format="auto") is not None
    pipeline = WanImageToVideoPipeline.from_pretrained(made)
    assert pipeline.config.expand_timesteps and pipeline.transformer_2 is None
    animate = animator_of(made, torch.device("cpu"), **SMALL)
    assert animate(Image.new("RGB", (32, 32), "red"), "a red circle grows", 3).shape == (5, 32, 32, 3)
    for part in ("vae", "text_encoder"):
        [one], [other] = ((run / name / part).glob("*.safetensors") for name in ("made-t2v", "made-ti2v"))
        assert one.read_bytes() == other.read_bytes()


def test_a_package_is_what_models_have(run: Path, tmp_path: Path) -> None:
    """Shared parts once; unpacked, stages go on from them, but for their rounding to bf16."""
    packed, again = tmp_path / "packed", tmp_path / "run"
    main(["package", "--t2v", str(run / "made-t2v"), "--ti2v", str(run / "made-ti2v"), "--out", str(packed)])
    for name in ("t2v", "ti2v"):
        made = {path.relative_to(run / f"made-{name}"): path for path in (run / f"made-{name}").rglob("*.*")}
        found = {
            path.relative_to(packed / part): path for part in ("shared", name) for path in (packed / part).rglob("*.*")
        }
        assert {place: path.read_bytes() for place, path in found.items()} == {
            place: path.read_bytes() for place, path in made.items()
        }
    main(["unpack", "--run", str(again), "--packaged", str(packed), "--device", "cpu"])
    one, other = Work(directory=run, device=torch.device("cpu")), Work(directory=again, device=torch.device("cpu"))
    pairs = [(trained_text(one), trained_text(other)), (trained_vae(one), trained_vae(other))]
    pairs += [(trained_expert(one, role), trained_expert(other, role)) for role in ("t2v-high", "t2v-low", "ti2v")]
    for mine, its in pairs:
        for left, right in zip(mine.parameters(), its.parameters(), strict=True):
            assert torch.equal(left.bfloat16(), right.bfloat16())


def test_what_should_be_shared_must_be_the_same(run: Path, tmp_path: Path) -> None:
    """Checkpoints of two runs make no package."""
    other = shutil.copytree(run / "made-ti2v", tmp_path / "other")
    (other / "vae/config.json").write_text("{}")
    with pytest.raises(SystemExit, match=r"vae/config\.json of .*other is not that of the others"):
        main(["package", "--t2v", str(run / "made-t2v"), "--ti2v", str(other), "--out", str(tmp_path / "packed")])
    assert not (tmp_path / "packed").exists()
    with pytest.raises(SystemExit, match="is not empty"):
        main(["package", "--t2v", str(run / "made-t2v"), "--ti2v", str(other), "--out", str(other)])


def test_an_expert_goes_on_from_the_package(run: Path, tmp_path: Path) -> None:
    """A step after `unpack` it is near what was shipped. What a stage has left is not written over."""
    main(["unpack", "--run", str(tmp_path), "--device", "cpu"])
    shutil.copy(run / "latents.pt", tmp_path)
    work = Work(directory=tmp_path, device=torch.device("cpu"))
    shipped = trained_expert(work, "ti2v").proj_out.weight.clone()
    step = ["expert", "--role", "ti2v", "--first", "ti2v", "--steps", "1", "--num-tokens", "300", "--device", "cpu"]
    main([*step, "--run", str(tmp_path)])
    made = trained_expert(work, "ti2v").proj_out.weight
    assert shipped.norm() > 0.1
    assert 0 < (made - shipped).norm() < 0.1 * shipped.norm()
    with pytest.raises(SystemExit, match=r"has a (state|average)\.pt already"):
        main(["unpack", "--run", str(tmp_path), "--device", "cpu"])


def test_an_adapter_leaves_experts_alone(run: Path) -> None:
    """In the same directory."""
    before = {path: path.read_bytes() for path in run.glob("t2v-*/*.pt")}
    length = f"--steps 1 --count 2 --size {SIZES[0]} --num-tokens 200 --device cpu".split()
    main(["neon", "--run", str(run), "--model", str(run / "made-t2v"), *length])
    assert before == {path: path.read_bytes() for path in run.glob("t2v-*/*.pt")} != {}
    assert len(list(run.glob("neon-t2v-*.safetensors"))) == 4


def test_a_good_vae_lets_through(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """That of the package: everything of most clips."""
    main(["unpack", "--run", str(tmp_path), "--device", "cpu"])
    main(["judge-vae", "--run", str(tmp_path), "--count", "4", "--device", "cpu"])
    assert capsys.readouterr().out.startswith("of 4 captions colour 100%, motion 100%, ")


def test_latents_are_normalised(run: Path) -> None:
    """Over all sizes each channel has mean 0 and deviation 1, and the checkpoint says by what. Captions come along."""
    clips, mean, deviation = read(run / "latents.pt", device=torch.device("cpu"))
    assert list(clips) == [str(size) for size in SIZES]
    means, deviations = statistics(list(clips.values()))
    assert torch.tensor(means).abs().max() < 0.02
    assert (torch.tensor(deviations) - 1).abs().max() < 0.02
    config = json.loads((run / "made-t2v/vae/config.json").read_text())
    assert (config["latents_mean"], config["latents_std"]) == (mean, deviation)
    first = clips[str(SIZES[0])]
    assert first.latents.shape == (2, 16, 5, 12, 12) and first.tokens.shape == first.mask.shape == (2, 4, 48)


def test_clips_are_repeatable() -> None:
    vae = make_vae(seed=1).requires_grad_(False)
    one, other, third = (make_clips(vae, SIZES[0], 1, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(one.latents, other.latents) and torch.equal(one.tokens, other.tokens)
    assert not torch.equal(one.latents, third.latents)


def test_a_stage_that_is_done_stays_as_it_is(run: Path) -> None:
    before = {file: file.stat().st_mtime_ns for file in run.glob("*/*") if file.is_file()}
    before[run / "latents.pt"] = (run / "latents.pt").stat().st_mtime_ns
    for stage in ("vae --steps 1 --scale 0.00002", "latents", "expert --role t2v-high --steps 2", "text --steps 2"):
        main([*stage.split(), "--run", str(run), "--device", "cpu"])
    assert {file: file.stat().st_mtime_ns for file in before} == before


def test_an_expert_begins_as_another(run: Path) -> None:
    """After two small steps it is near the base, and one that began with nothing is not."""
    cpu = torch.device("cpu")
    base, high, other = (finished(make_expert(seed=0), run / name, device=cpu) for name in ("base", "t2v-high", "ti2v"))
    near, far = (
        max(float((one - two).abs().max()) for one, two in zip(base.parameters(), each.parameters(), strict=True))
        for each in (high, other)
    )
    assert 0 < near < 1e-3 < far


def test_what_the_vae_lets_through(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The score of held-out clips that only went through the VAE; one that has learned nothing shows nothing."""
    main(["judge-vae", "--run", str(run), "--count", "2", "--device", "cpu"])
    said = capsys.readouterr().out
    assert said.startswith("of 2 captions colour ") and said.endswith("everything 0%\n")


def test_a_channel_that_says_nothing() -> None:
    """Its deviation is a hundredth of the largest, and not 0, by which nothing can be divided."""
    latents = torch.randn(4, 3, 2, 4, 4, generator=torch.Generator().manual_seed(1))
    latents *= torch.tensor([4.0, 1.0, 0.0]).view(1, 3, 1, 1, 1)
    nothing = torch.zeros(4, 1, 48, dtype=torch.int16)
    _, deviation = statistics([Clips(latents=latents + 5.0, tokens=nothing, mask=nothing, near=nothing)])
    assert deviation[0] == pytest.approx(4.0, rel=0.1)
    assert deviation[2] == pytest.approx(deviation[0] / 100)


def test_questions() -> None:
    """Combinations that no training clip shows, one thing before a fixed camera, the same every time."""
    asked = questions(50, seed=3)
    assert asked == questions(50, seed=3) != questions(50, seed=4)
    assert asked[:7] == questions(7, seed=3)
    for scene, text in asked:
        [thing] = scene.things
        assert is_held_out(thing) and scene.camera is Camera.FIXED
        assert thing.colour in text and thing.shape in text


def test_the_score(tmp_path: Path) -> None:
    """Shares of what was right; every answer is of the caption and the seed that it was asked with."""
    verdicts = [
        Verdict(colour=True, shape=True, motion=True),
        Verdict(colour=True, shape=False, motion=True),
        Verdict(colour=True, shape=True, motion=False),
        Verdict(colour=False, shape=False, motion=False),
    ]
    total = score(verdicts)
    assert total == Score(count=4, colour=0.75, motion=0.5, shape=0.5, everything=0.25)
    assert str(total) == "of 4 captions colour 75%, motion 50%, shape 50%, everything 25%"
    calls: list[tuple[list[str], list[int]]] = []

    def generate(captions: list[str], seeds: list[int]) -> list[torch.Tensor]:
        calls.append((captions, seeds))
        return [torch.zeros(5, 24, 24, 3, dtype=torch.uint8) for _ in captions]

    total, answers = examine(generate, 5, seed=3, at_once=2)
    assert total.colour == 0.0
    assert [seeds for _, seeds in calls] == [[0, 1], [2, 3], [4]]
    asked: list[tuple[Scene, str]] = questions(5, seed=3)
    assert [text for captions, _ in calls for text in captions] == [text for _, text in asked]
    assert [(scene, text) for scene, text, _, _ in answers] == asked


def test_scoring_by_command(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The command says the score, and leaves a picture and every verdict."""
    out, picture = tmp_path / "score.json", tmp_path / "sheet.webp"
    settings = f"--count 1 --steps 1 --size {SIZES[0]} --device cpu".split()
    main(["score", "--model", str(run / "made-t2v"), "--out", str(out), "--sheet", str(picture), *settings])
    assert capsys.readouterr().out.startswith("of 1 captions colour ")
    written = json.loads(out.read_text())
    assert written["score"]["count"] == 1 and set(written["answers"][0]) == {"caption", "colour", "shape", "motion"}
    with Image.open(picture) as image:
        assert image.width > 6 * 96


def test_a_sheet_shows_the_first_and_the_last_frame() -> None:
    clip = torch.zeros(9, 10, 12, 3, dtype=torch.uint8)
    clip[0], clip[-1] = torch.tensor([255, 0, 0]), torch.tensor([0, 0, 255])
    image = sheet([("one", clip), ("two", clip)], num_frames=3)
    assert image.size == (3 * 12 + 2 * 4, 2 * (10 + 18))
    assert image.getpixel((6, 18)) == (255, 0, 0)
    assert image.getpixel((image.width - 6, 18)) == (0, 0, 255)
    assert image.getpixel((22, 18)) == (0, 0, 0)


def test_tasks_and_roles_belong_together() -> None:
    assert {role for roles in EXPERTS.values() for role in roles.values()} == set(ROLES) - {"base"}
    assert set(EXPERTS) == {Task.TEXT_TO_VIDEO, Task.TEXT_IMAGE_TO_VIDEO}


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("latents", "latents: one process does it, not WORLD_SIZE=2"),
        ("vae --steps 1 --device cuda:1", "--device: cuda:1 is one GPU; each process takes its own of cuda"),
        ("vae --steps 1 --device cuda", r"--nproc-per-node: there is no GPU for process 1; this host has 1"),
    ],
)
def test_what_processes_cannot_share(
    command: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of torchrun: what one process does alone, and more processes than GPUs."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(SystemExit, match=message):
        main([*command.split(), "--run", str(tmp_path)])
    assert list(tmp_path.iterdir()) == []


def test_graphs_need_a_gpu(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="--cuda-graphs: --device cpu is no GPU"):
        main(["vae", "--steps", "1", "--cuda-graphs", "--device", "cpu", "--run", str(tmp_path)])
    assert list(tmp_path.iterdir()) == []
