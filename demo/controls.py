"""Compare the demo's gain with controls; needs a finished `bash run.sh` (about 4 minutes on two cores).

    bash run.sh controls                             # or: python demo/controls.py --out runs/demo --seed 0

  uniform resize   scale every box of the untrained model about its center by one factor, the best one
  per category     shift and scale its boxes by the best values for each category: more than a person would correct
  shuffled         train GRPO with the rewards of each group shuffled among its completions: same noise, no signal

Factors and shifts are fitted on the training pictures, then applied to the held-out answers.
"""

import argparse
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import virft  # noqa: E402
from demo.report import mean_iou_reward, measure, read_predictions  # noqa: E402
from demo.warm_start import transform_box  # noqa: E402
from rewards import box_iou  # noqa: E402


def climb(score: Callable[[tuple], float], start: tuple[float, ...], step: float = 0.16) -> tuple[float, ...]:
    """Maximize `score` by coordinate search: try +-step on each number, halve the step when nothing improves."""
    best, value = start, score(start)
    while step > 0.005:
        moves = [best[:i] + (best[i] + d,) + best[i + 1 :] for i in range(len(best)) for d in (step, -step)]
        reached, move = max((score(move), move) for move in moves)
        if reached > value:
            best, value = move, reached
        else:
            step /= 2
    return best


def best_uniform_resize(training: list[dict]) -> float:
    factors = [0.6 + 0.02 * i for i in range(46)]
    return max(factors, key=lambda s: mean_iou_reward(training, lambda p, box: transform_box(box, (0, 0, s, s))))


def best_per_category(training: list[dict]) -> dict[str, tuple]:
    """Fit (dx, dy, sx, sy) per category.

    Maximizes the mean IoU of each answered box with the true box that it overlaps most.
    """
    fitted = {}
    for category in sorted({p["category"] for p in training}):
        pairs = [
            (box, max(p["solution"], key=lambda target: box_iou(box, target)))
            for p in training
            if p["category"] == category and p["solution"]
            for box, _ in p["detections"] or []
        ]
        pairs = [(box, target) for box, target in pairs if box_iou(box, target) > 0.1]
        fitted[category] = climb(
            lambda t: sum(box_iou(transform_box(b, t), target) for b, target in pairs), (0.0, 0.0, 1.0, 1.0)
        )
    return fitted


def shuffled_training(arguments: list[str]) -> None:
    """Train with virft.py, but shuffle the rewards within each group before computing advantages."""
    import torch

    generator = torch.Generator().manual_seed(0)
    plain = virft.group_advantages

    def shuffled(rewards, scale=True):
        order = torch.stack([torch.randperm(rewards.shape[1], generator=generator) for _ in rewards])
        return plain(rewards.gather(1, order), scale)

    virft.group_advantages = shuffled
    virft.main(arguments)
    virft.group_advantages = plain


def run(settings: dict, **changes) -> None:
    """Train or evaluate as config.json says, with changes; delete the output folder of an earlier run."""
    shutil.rmtree(changes["out"], ignore_errors=True)
    virft.main(flags(settings, **changes))


def flags(settings: dict, **changes) -> list[str]:
    """Return the command line of a run's config.json with changes."""
    argv = []
    for name, value in (settings | changes).items():
        if value is not None and value != []:
            argv += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return argv


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/demo"))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    out = args.out
    if not (out / "train" / "config.json").exists():
        raise SystemExit(f"{out} holds no finished demo: run `bash run.sh` first")
    settings = json.loads((out / "train" / "config.json").read_text())

    # To get the untrained model's answers to the training pictures, name the training split as validation split.
    fit = out / "fit_data"
    (fit / "annotations").mkdir(parents=True, exist_ok=True)
    for link, target in (
        (fit / "val", out / "data" / "train"),
        (fit / "annotations" / "instances_val.json", out / "data/annotations/instances_train.json"),
    ):
        if not link.exists():
            link.symlink_to(os.path.relpath(target, link.parent))
    held_out_data = {"data": out / "data", "out": out / "shuffled/after", "model": out / "shuffled/model"}
    shutil.rmtree(out / "shuffled", ignore_errors=True)
    shuffled_training(flags(settings, out=out / "shuffled", seed=args.seed))
    # As in run.sh; an empty list stands for all rewards of the task.
    evaluation = {"eval_only": True, "prompts_per_step": 64, "negatives": 0.1, "rewards": []}
    run(settings, **held_out_data, **evaluation)
    run(settings, data=fit, out=out / "fit", eval_limit=600, **evaluation)
    training, held_out = read_predictions(out / "fit"), read_predictions(out / "before")
    factor, fitted = best_uniform_resize(training), best_per_category(training)

    rows = {
        "before": measure(out / "before")["iou"],
        f"uniform resize by {factor:.2f}": mean_iou_reward(
            held_out, lambda p, box: transform_box(box, (0, 0, factor, factor))
        ),
        "shift and scale per category": mean_iou_reward(
            held_out, lambda p, box: transform_box(box, fitted[p["category"]])
        ),
        "GRPO, rewards shuffled": measure(out / "shuffled" / "after")["iou"],
        "GRPO": measure(out / "after")["iou"],
    }
    print("\nheld-out IoU reward, mean")
    for name, value in rows.items():
        print(f"  {name:32s} {value:.3f}")
    (out / "controls.json").write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
