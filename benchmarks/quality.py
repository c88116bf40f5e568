"""What a setting costs in quality: clips of an embedded model with it, against those with the model's defaults.

For each case the share of held-out captions whose colour, motion and shape are right (training/judge.py), and how far
the clips are from those of the first case with the same seeds: PSNR and SSIM, means over all clips. Seconds are those
of generating alone, one video at a time.

    python benchmarks/quality.py --count 100
"""

import argparse
import json
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from training.adapters import COMPONENTS, merge
from training.likeness import psnr, ssim
from training.score import Score, examine
from training.served import served_by
from wan_grpc.pipeline import embedded

_UNGUIDED = {"guidance_scale": 1.0, "guidance_scale_2": 1.0}
_ADAPTER = "adapter"
"""How cases end for which examples/lora/wan-tiny-4-steps is merged into the model."""
CASES: dict[str, dict[str, Any]] = {
    "20 steps, guidance 4 (default)": {},
    "40 steps": {"num_inference_steps": 40},
    "12 steps": {"num_inference_steps": 12},
    "8 steps": {"num_inference_steps": 8},
    "4 steps": {"num_inference_steps": 4},
    "4 steps, guidance 1": {"num_inference_steps": 4, **_UNGUIDED},
    "4 steps, guidance 1, adapter": {"num_inference_steps": 4, **_UNGUIDED},
    "guidance 1": _UNGUIDED,
    "bfloat16": {"dtype": "bfloat16"},
}


@dataclass(kw_only=True)
class Result:
    """Of one case."""

    score: Score
    psnr_db: float
    ssim: float
    seconds_a_video: float


def measured(checkpoint: Path, reference: list[torch.Tensor], options: argparse.Namespace, case: str) -> Result:
    """Clips of `case` against those of `reference`, which become its clips if there are none yet."""
    if case.endswith(_ADAPTER):
        examples = Path(__file__).parents[1] / "examples/lora"
        names = zip(COMPONENTS, ("high", "low"), strict=True)
        files = {component: examples / f"wan-tiny-4-steps-{level}.safetensors" for component, level in names}
        plain, checkpoint = checkpoint, checkpoint.with_name("merged")
        merge(plain, files, checkpoint)
    generate = served_by(checkpoint, device=options.device, **CASES[case])
    generate(["a red star"], [0])  # warms up
    seconds = 0.0

    def timed(captions: list[str], seeds: list[int]) -> list[torch.Tensor]:
        nonlocal seconds
        began = time.perf_counter()
        clips = generate(captions, seeds)
        seconds += time.perf_counter() - began
        return clips

    score, answers = examine(timed, options.count)
    clips = [clip for *_, clip in answers]
    if not reference:
        reference.extend(clips)
    pairs = list(zip(clips, reference, strict=True))
    means = [sum(measure(*pair) for pair in pairs) / len(pairs) for measure in (psnr, ssim)]
    return Result(score=score, psnr_db=means[0], ssim=means[1], seconds_a_video=seconds / len(clips))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=embedded.NAMES, default=embedded.DEFAULT)
    parser.add_argument("--count", type=int, default=100, help="captions")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", nargs="+", choices=list(CASES), help="besides the first")
    parser.add_argument("--out", type=Path, help="JSON file")
    options = parser.parse_args()
    default, *others = CASES if options.model == embedded.DEFAULT else [case for case in CASES if _ADAPTER not in case]
    reference: list[torch.Tensor] = []
    results: dict[str, Result] = {}
    with tempfile.TemporaryDirectory() as directory:
        checkpoint = embedded.ensure_embedded(options.model, Path(directory))
        for case in [default, *(options.only or others)]:
            results[case] = measured(checkpoint, reference, options, case)
            print(f"{case}: {results[case].score}", flush=True)
    print("| case | colour | motion | shape | PSNR dB | SSIM | s a video |\n|---|---|---|---|---|---|---|")
    for case, result in results.items():
        score = result.score
        far = "- | -" if case == default else f"{result.psnr_db:.1f} | {result.ssim:.3f}"
        shares = " | ".join(f"{share:.0%}" for share in (score.colour, score.motion, score.shape))
        print(f"| {case} | {shares} | {far} | {result.seconds_a_video:.2f} |")
    if options.out is not None:
        told = {case: asdict(result) for case, result in results.items()}
        options.out.write_text(json.dumps(told, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
