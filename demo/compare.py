"""Compare what is rewarded, on the toy of the demo: no training, supervised fine-tuning, GRPO and its variants.

    python demo/compare.py                          # every arm, seeds 0 1 2; what is finished is not done again
    python demo/compare.py --arms f1 sft --seeds 0  # some of them
    python demo/compare.py --steps 340              # as many as `bash run.sh` takes; results go to another folder

All arms but `base` train the model of demo/model. Those of GRPO take the same number of steps and train on the same
number of completions (resampling samples more than it trains on). The supervised arm takes three times as many steps,
because they are shorter. The questions of the evaluation are those of `bash run.sh`. Prints medians and ranges. A
finished arm is not run again, whatever has changed since: remove its folder.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from demo.report import measure  # noqa: E402
from extras.report import write_whole  # noqa: E402

IOU = "--rewards iou=1 format=1"
ARMS = {  # name -> flags beside those of TRAINING; None: the model as it is
    "base": None,
    # The right answer begins with an empty thought, which the toy never saw; at TRAINING's 2.5e-4 it is not learned.
    "sft": "--sft true --lr 1e-3",
    "grpo": IOU,
    "grpo, threshold 0": f"{IOU} --iou_threshold 0",
    "grpo, threshold 0.5 0.75 0.9": f"{IOU} --iou_threshold 0.5 0.75 0.9",
    "f1": "--rewards f1=1 format=1",
    "f1, threshold 0": "--rewards f1=1 format=1 --iou_threshold 0",
    "iou + confidence": "--rewards iou=1 confidence=1 format=1",
    "iou + confidence, each": "--rewards iou=1 confidence=1 format=1 --normalize each",
    "resample 2": f"{IOU} --resample 2",
    "2 inner epochs": f"{IOU} --inner_epochs 2",
    "4 inner epochs": f"{IOU} --inner_epochs 4",
}
COMMON = "--task coco --max_completion_tokens 96 --workers 0"
TRAINING = (
    "--prompts_per_step 16 --micro_batch 64 --group_size 8 --beta 0 --warmup_steps 20 --lr 2.5e-4 --negatives 0.3"
)
EVALUATION = "--eval_only true --prompts_per_step 64 --negatives 0.1"
FIGURES = {"iou": "IoU", "AP": "AP", "choice": "choice", "count": "counting", "negatives": "No Objects"}


def virft(*flags: str) -> None:
    command, environment = [sys.executable, "virft.py", *flags], os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"virft.py {' '.join(flags)}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")


def run_arm(out: Path, data: Path, flags: str | None, seed: int, steps: int) -> dict:
    """Train and evaluate one arm with one seed, unless its result is there; return its figures."""
    result = out / "figures.json"
    if result.exists():
        return json.loads(result.read_text())
    shutil.rmtree(out, ignore_errors=True)
    common, model, seconds = [*COMMON.split(), "--data", str(data)], ROOT / "demo" / "model", 0.0
    if flags is not None:
        begun, steps = time.perf_counter(), 3 * steps if "--sft" in flags else steps
        train = f"{TRAINING} --steps {steps} --seed {seed} --model {model} --out {out / 'train'} {flags}"
        virft(*common, *train.split())
        seconds, model = time.perf_counter() - begun, out / "train" / "model"
    virft(*common, *EVALUATION.split(), "--model", str(model), "--out", str(out / "after"))
    figures = measure(out / "after") | {"seconds": seconds}
    write_whole(result, json.dumps(figures, indent=2) + "\n")
    return figures


def cell(values: list[float], digits: int = 3) -> str:
    """Write the median and, of several values, the range."""
    middle = f"{median(values):.{digits}f}"
    return middle if len(values) == 1 else f"{middle} ({min(values):.{digits}f}-{max(values):.{digits}f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS, metavar="ARM")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=170)
    args = parser.parse_args()
    out = ROOT / "runs" / f"compare_{args.steps}"
    if not ((data := out / "data") / "annotations" / "instances_val.json").exists():  # written last
        shapes = [sys.executable, "demo/shapes.py", "detection", "--out", str(data), "--val", "400"]
        subprocess.run(shapes, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    print(f"| {' | '.join(['arm', *FIGURES.values(), 's'])} |\n|{'---|' * (len(FIGURES) + 2)}")
    for arm in args.arms:
        seeds = args.seeds if ARMS[arm] is not None else args.seeds[:1]
        folder = out / arm.replace(", ", "_").replace(" ", "_")
        found = [run_arm(folder / str(seed), data, ARMS[arm], seed, args.steps) for seed in seeds]
        cells = [cell([figures[name] for figures in found]) for name in FIGURES]
        print(f"| {' | '.join([arm, *cells, cell([figures['seconds'] for figures in found], 0)])} |", flush=True)


if __name__ == "__main__":
    main()
