"""The command line of training: one command a stage.

    python -m training text    --run DIR --seconds 300
    python -m training vae     --run DIR --seconds 300
    python -m training judge-vae --run DIR
    python -m training latents --run DIR
    python -m training expert  --run DIR --role base --seconds 400
    python -m training expert  --run DIR --role t2v-high --first base --seconds 150
    python -m training model   --run DIR --task t2v --out CHECKPOINT
    python -m training score   --model CHECKPOINT --sheet sheet.webp
    python -m training neon    --run DIR --model CHECKPOINT --seconds 60
    python -m training distil  --run DIR --model CHECKPOINT --seconds 200
    python -m training merge   --model CHECKPOINT --adapters FILE FILE --out CHECKPOINT
    python -m training package --t2v CHECKPOINT --ti2v CHECKPOINT --out wan_tiny

To go on from the weights of the package, in a new directory:

    python -m training unpack  --run DIR
    python -m training latents --run DIR
    python -m training expert  --run DIR --role ti2v --first ti2v --seconds 600

Text, VAE and experts learn on several GPUs of one host, each with batches of its own:

    torchrun --standalone --nproc-per-node 4 -m -- training vae --run DIR --seconds 450

A stage that was interrupted goes on where it stopped; one that is done does nothing.
"""

import argparse
import atexit
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import distributed

from training import adapters, assemble, distil, neon, stages
from training.experts import ROLES
from training.first_frames import going_on
from training.generate import generator_of, with_adapters
from training.latents import SIZES, Size
from training.loop import Plan
from training.score import Generate, Score, examine, questions
from training.served import animated_by, served_by
from training.sheet import sheet
from wan_grpc.config import CACHE_DIR
from wan_grpc.domain.variants import Task
from wan_grpc.pipeline import embedded
from wan_grpc.pipeline.checkpoint import locate, read_card

_RATES = {"text": 2e-3, "vae": 1e-3, "expert": 1.5e-3, "neon": 3e-3, "distil": 1e-3}
_WARM_UP = {"text": 100, "vae": 300, "expert": 100, "neon": 50, "distil": 50}


def main(arguments: list[str] | None = None) -> None:
    """Do what the command line says; what is wrong with its files ends the process with a sentence."""
    options = _read(arguments)
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = options.is_training
    try:
        with _beside_others(options):
            options.do(options)
    except (OSError, ValueError) as error:
        raise SystemExit(f"training: {error}") from error


@contextmanager
def _beside_others(options: argparse.Namespace) -> Iterator[None]:
    """Join the other processes of torchrun, if there are any."""
    if os.environ.get("WORLD_SIZE", "1") == "1":
        yield
        return
    if not options.is_parallel:
        raise ValueError(f"{options.command}: one process does it, not WORLD_SIZE={os.environ['WORLD_SIZE']}")
    backend = "gloo"
    if options.device.type == "cuda":
        options.device, backend = _own_gpu(options.device), "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(options.device)
    distributed.init_process_group(backend)
    try:
        yield
    except BaseException:
        # After what is said of it. By itself NCCL would first wait for the others, and they wait for this process.
        atexit.register(os._exit, 1)
        raise
    distributed.destroy_process_group()


def _own_gpu(device: torch.device) -> torch.device:
    if device != torch.device("cuda"):
        raise ValueError(f"--device: {device} is one GPU; each process takes its own of cuda")
    number, count = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if number >= count:
        raise ValueError(f"--nproc-per-node: there is no GPU for process {number}; this host has {count}")
    return torch.device("cuda", number)


class _Commands:
    """What the commands of one parser have in common."""

    def __init__(self, parser: argparse.ArgumentParser) -> None:
        self._commands = parser.add_subparsers(required=True)

    def tool(self, name: str, do: Callable[[argparse.Namespace], None]) -> argparse.ArgumentParser:
        """One that computes nothing."""
        each = self._commands.add_parser(name)
        each.set_defaults(command=name, do=do, is_training=False, is_parallel=False)
        return each

    def command(self, name: str, do: Callable[[argparse.Namespace], None]) -> argparse.ArgumentParser:
        each = self.tool(name, do)
        each.add_argument("--device", type=torch.device, default="cuda" if torch.cuda.is_available() else "cpu")
        return each

    def stage(self, name: str, do: Callable[[argparse.Namespace], None]) -> argparse.ArgumentParser:
        each = self.command(name, do)
        each.add_argument("--run", type=Path, required=True, help="directory in which all stages keep what they make")
        return each

    def trained(self, name: str, do: Callable[[argparse.Namespace], None]) -> argparse.ArgumentParser:
        each = self.stage(name, do)
        is_parallel, may_be_graphs = name in ("text", "vae", "expert"), name in ("vae", "expert")
        each.set_defaults(is_training=True, is_orthogonal=name == "expert", is_parallel=is_parallel, cuda_graphs=False)
        length = each.add_mutually_exclusive_group(required=True)
        length.add_argument("--steps", type=int)
        length.add_argument("--seconds", type=float, help="as many steps as fit, counted once and kept")
        each.add_argument("--rate", type=float, default=_RATES[name])
        each.add_argument("--warm-up", type=int, default=_WARM_UP[name], help="steps")
        each.add_argument("--average", type=float, default=0.999)
        if may_be_graphs:
            each.add_argument("--cuda-graphs", action="store_true", help="launch forward and backward pass as one")
        return each


def _read(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m training", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = _Commands(parser)
    _add_stages(commands)
    _add_uses(commands)
    return parser.parse_args(arguments)


def _add_stages(commands: _Commands) -> None:
    commands.trained("text", lambda options: stages.train_text(_work(options), _plan(options)))
    vae = commands.trained("vae", lambda o: stages.train_vae(_work(o), _plan(o), num_clips=o.num_clips, scale=o.scale))
    vae.add_argument("--num-clips", type=int, default=16, help="of a batch, of the smallest size")
    vae.add_argument("--scale", type=float, default=1.0, help="of the number of clips that are drawn")
    judged = commands.stage("judge-vae", lambda o: _say(stages.judge_vae(_work(o), count=o.count)))
    judged.add_argument("--count", type=int, default=100)
    latents = commands.stage("latents", lambda o: stages.make_latents(_work(o), counts=tuple(o.counts)))
    latents.add_argument("--counts", type=int, nargs=len(SIZES), default=[32768, 24576, 8192])
    expert = commands.trained("expert", _train_expert)
    expert.add_argument("--role", choices=sorted(ROLES), required=True)
    expert.add_argument("--first", choices=sorted(ROLES), help="the role whose expert it begins as")
    expert.add_argument("--num-tokens", type=int, default=46080, help="of a batch")
    expert.add_argument("--compile", action="store_true", help="its blocks, which takes a minute and then saves time")


def _add_adapter(command: argparse.ArgumentParser, *, count: int) -> None:
    command.add_argument("--model", required=True, help="checkpoint of --task t2v, or wan-tiny-t2v")
    command.add_argument("--size", choices=[str(size) for size in SIZES], default=str(SIZES[1]))
    command.add_argument("--count", type=int, default=count, help="clips that it learns from")


def _add_adapters(command: argparse.ArgumentParser, *, is_required: bool) -> None:
    told = "LoRA files, of the first and of the second expert"
    command.add_argument("--adapters", type=Path, nargs=2, required=is_required, help=told)


def _add_uses(commands: _Commands) -> None:
    model = commands.stage("model", lambda o: assemble.assemble(_work(o), Task(o.task), o.out))
    model.add_argument("--task", choices=[task.value for task in assemble.EXPERTS], required=True)
    model.add_argument("--out", type=Path, required=True)
    styled = commands.trained("neon", _train_neon)
    _add_adapter(styled, count=2048)
    styled.add_argument("--num-tokens", type=int, default=23040, help="of a batch")
    distilled = commands.trained("distil", _train_distil)
    _add_adapter(distilled, count=8192)
    distilled.add_argument("--few", type=int, default=4, help="steps that are to be enough")
    distilled.add_argument("--num-clips", type=int, default=128, help="of a batch")
    distilled.add_argument("--compile", action="store_true", help="blocks, which takes a minute and then saves time")
    merged = commands.tool("merge", _merge)
    merged.add_argument("--model", required=True, help="checkpoint, or the name of an embedded one")
    _add_adapters(merged, is_required=True)
    merged.add_argument("--steps", type=int, help="default of its requests")
    merged.add_argument("--guidance-scale", type=float, help="likewise; 1 for none")
    merged.add_argument("--out", type=Path, required=True, help="a new directory")
    package = commands.tool("package", _package)
    for task in assemble.EXPERTS:
        package.add_argument(f"--{task.value}", type=Path, required=True, help="its checkpoint")
    package.add_argument("--out", type=Path, required=True, help="an empty or new directory")
    unpacked = commands.stage("unpack", lambda o: assemble.unpack(o.packaged, _work(o)))
    unpacked.add_argument("--packaged", type=Path, default=embedded.FILES, help="what `package` has written")
    scored = commands.command("score", _score)
    scored.add_argument("--model", required=True, help="checkpoint, or the name of an embedded one")
    scored.add_argument("--served", action="store_true", help="by the server's own pipeline, one at a time")
    scored.add_argument("--count", type=int, default=100)
    scored.add_argument("--at-once", type=int, default=50)
    scored.add_argument("--from-images", action="store_true", help="served, from first frames of drawn clips")
    _add_adapters(scored, is_required=False)
    scored.add_argument("--steps", type=int, default=20)
    scored.add_argument("--guidance-scale", type=float, default=4.0)
    scored.add_argument("--size", choices=[str(size) for size in SIZES], default=str(SIZES[1]))
    scored.add_argument("--sheet", type=Path, help="picture of the first answers")
    scored.add_argument("--out", type=Path, help="JSON file with every verdict")


def _work(options: argparse.Namespace) -> stages.Work:
    return stages.Work(directory=options.run, device=options.device)


def _plan(options: argparse.Namespace) -> Plan:
    if options.cuda_graphs and options.device.type != "cuda":
        raise ValueError(f"--cuda-graphs: --device {options.device} is no GPU")
    return Plan(
        steps=options.steps,
        seconds=options.seconds,
        rate=options.rate,
        warm_up=options.warm_up,
        average=options.average,
        is_orthogonal=options.is_orthogonal,
        is_captured=options.cuda_graphs,
    )


def _train_expert(options: argparse.Namespace) -> None:
    stages.train_expert(
        _work(options),
        options.role,
        _plan(options),
        num_tokens=options.num_tokens,
        first=options.first,
        is_compiled=options.compile,
    )


def _train_neon(options: argparse.Namespace) -> None:
    neon.train(
        _checkpoint(options.model),
        options.run,
        _plan(options),
        size=_size(options.size),
        count=options.count,
        num_tokens=options.num_tokens,
        device=options.device,
    )


def _train_distil(options: argparse.Namespace) -> None:
    distil.train(
        _checkpoint(options.model),
        options.run,
        _plan(options),
        size=_size(options.size),
        count=options.count,
        num_steps=options.few,
        num_clips=options.num_clips,
        device=options.device,
        is_compiled=options.compile,
    )


def _merge(options: argparse.Namespace) -> None:
    files = dict(zip(adapters.COMPONENTS, options.adapters, strict=True))
    defaults: dict[str, Any] = {}
    if options.steps is not None:
        defaults["num_inference_steps"] = options.steps
    if options.guidance_scale is not None:
        defaults |= dict.fromkeys(("guidance_scale", "guidance_scale_2"), options.guidance_scale)
    adapters.merge(_checkpoint(options.model), files, options.out, **defaults)


def _package(options: argparse.Namespace) -> None:
    assemble.package({task: getattr(options, task.value) for task in assemble.EXPERTS}, options.out)


def _checkpoint(model: str) -> Path:
    return Path(embedded.resolved(model, CACHE_DIR.expanduser()))


def _size(name: str) -> Size:
    return next(size for size in SIZES if str(size) == name)


def _say(score: Score) -> None:
    sys.stdout.write(f"{score}\n")


def _score(options: argparse.Namespace) -> None:
    size = _size(options.size)
    settings = {
        "width": size.width,
        "height": size.height,
        "num_frames": size.num_frames,
        "num_inference_steps": options.steps,
        "guidance_scale": options.guidance_scale,
    }
    ratios: list[float] = []
    generate = _generating(options, settings, ratios)
    total, answers = examine(generate, options.count, at_once=options.at_once)
    _say(total)
    if ratios:
        mean = sum(ratios) / len(ratios)
        sys.stdout.write(f"first frames: {mean:.1f} dB on average, {min(ratios):.1f} to {max(ratios):.1f}\n")
    if options.sheet is not None:
        rows = [(text, clip) for _, text, _, clip in answers[:16]]
        sheet(rows).save(options.sheet)
    if options.out is not None:
        verdicts = [{"caption": text, **asdict(verdict)} for _, text, verdict, _ in answers]
        options.out.write_text(json.dumps({"score": asdict(total), "answers": verdicts}, indent=1), encoding="utf-8")


def _generating(options: argparse.Namespace, settings: dict[str, Any], ratios: list[float]) -> Generate:
    checkpoint, device = _checkpoint(options.model), str(options.device)
    if options.adapters and (options.served or options.from_images):
        raise ValueError("--adapters: the server's own pipeline takes none yet; merge them into the checkpoint")
    if options.from_images:
        if not read_card(locate(str(checkpoint), load_format="auto"), model_id=options.model).takes_image:
            raise ValueError(f"--from-images: {options.model} makes videos from text alone")
        scenes = [scene for scene, _ in questions(options.count, seed=0)]
        return going_on(animated_by(checkpoint, device=device, **settings), scenes, _size(options.size), ratios)
    if options.served:
        return served_by(checkpoint, device=device, **settings)
    prepare = with_adapters(*options.adapters) if options.adapters else None
    return generator_of(checkpoint, options.device, prepare=prepare, **settings)


if __name__ == "__main__":
    main()
