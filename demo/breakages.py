"""Break GRPO in four ways on the demo and plot what each does to the curve; needs a finished `bash run.sh`.

    bash run.sh breakages                            # or: python demo/breakages.py --out runs/demo --seeds 0 1

A breakage is one edited line in a copy of virft.py, or one flag, as listed in docs/lesson.ipynb. Every copy is trained
like the demo, for fewer steps. OUT/breakages.png compares the IoU reward of each with the unbroken run, and
OUT/breakages/NAME/SEED holds the complete runs. Finished runs are kept as long as the code and the flags stay the same,
so an interrupted command can be repeated.
"""

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from demo.controls import flags  # noqa: E402
from extras.draw import WINDOW, draw_curve, smoothed  # noqa: E402
from extras.report import rows_of  # noqa: E402

FILES = ("virft.py", "rewards.py", "data.py")
FILES += tuple(str(file.relative_to(ROOT)) for file in sorted((ROOT / "extras").rglob("*.py")))


class Breakage(NamedTuple):
    """Define what is changed: a line of virft.py (old and new text), flags, or both.

    against: name of the run to compare with.
    """

    flags: dict
    against: str = ""
    old: str = ""
    new: str = ""


DEMO = {"group_size": 8, "inner_epochs": 1, "beta": 0.0}  # the demo's values of what breakages change
BREAKAGES = {
    "unbroken": Breakage({}),
    "unbroken, 4 inner epochs": Breakage({"inner_epochs": 4}),
    "rewards shuffled": Breakage(
        {},
        against="unbroken",
        old="centered = rewards - rewards.mean(1, keepdim=True)",
        new="rewards = rewards[:, torch.randperm(rewards.shape[1])]; "
        "centered = rewards - rewards.mean(1, keepdim=True)",
    ),
    "clip inverted": Breakage(
        {"inner_epochs": 4},
        against="unbroken, 4 inner epochs",
        old="loss = -torch.minimum(unclipped, clipped)",
        new="loss = -torch.maximum(unclipped, clipped)",
    ),
    "G 2": Breakage({"group_size": 2}, against="unbroken"),
    "beta far too large": Breakage({"beta": 10}, against="unbroken"),
}


def broken_copy(breakage: Breakage, folder: Path) -> Path:
    """Copy the project's files to `folder`, edit one line of virft.py, and return the path of that copy."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    text = (folder / "virft.py").read_text()
    if breakage.old:
        if text.count(breakage.old) != 1:
            raise SystemExit(f"demo/breakages.py: virft.py does not have one line `{breakage.old}`")
        (folder / "virft.py").write_text(text.replace(breakage.old, breakage.new))
    return folder / "virft.py"


def train(settings: dict, breakage: Breakage, folder: Path, seed: int) -> Path:
    """Train, unless the same code and flags were trained before; return the path of the run's metrics.jsonl."""
    run, script = folder / str(seed), broken_copy(breakage, folder / "code")
    argv = flags(settings, out=run, seed=seed, **breakage.flags)
    trained = {
        "flags": argv,
        "files": {n: hashlib.sha256((folder / "code" / n).read_bytes()).hexdigest() for n in FILES},
    }
    record = run / "trained.json"
    if not record.exists() or json.loads(record.read_text()) != trained:
        shutil.rmtree(run, ignore_errors=True)
        subprocess.run([sys.executable, script, *argv], check=True)
        if not (run / "model").exists():
            raise SystemExit(f"{run}: training was stopped; the same command trains it again")
        record.write_text(json.dumps(trained, indent=2) + "\n")
    return run / "metrics.jsonl"


def curve(metrics: Path) -> np.ndarray:
    return smoothed([row["reward/iou"] for row in rows_of(metrics)])


def plot(runs: dict[str, list[Path]], path: Path) -> None:
    """Draw one panel per breakage: the broken runs on top of those that they are compared with."""
    from matplotlib.figure import Figure

    broken = [name for name in runs if BREAKAGES[name].against]
    figure = Figure(figsize=(3.6 * len(broken), 3.4), layout="constrained")
    for axis, name in zip(figure.subplots(1, len(broken), sharey=True, squeeze=False).flat, broken):
        lines = [
            (None if i else which, rows_of(metrics), color)
            for which, color in ((BREAKAGES[name].against, "tab:gray"), (name, "tab:red"))
            for i, metrics in enumerate(runs[which])
        ]
        draw_curve(axis, lines, "reward/iou")
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/demo"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--only", nargs="+", choices=BREAKAGES, default=list(BREAKAGES))
    args = parser.parse_args()
    config = args.out / "train" / "config.json"
    if not config.exists():
        raise SystemExit(f"{args.out} holds no finished demo: run `bash run.sh` first")
    settings, runs = json.loads(config.read_text()) | {"steps": args.steps}, {}
    changed = {name: settings[name] for name, value in DEMO.items() if settings[name] != value}
    if changed:
        raise SystemExit(f"{args.out} was trained with {changed}, which is no longer the demo: run `bash run.sh` again")
    names = dict.fromkeys(n for name in args.only for n in (BREAKAGES[name].against or name, name))
    for name in names:
        folder = args.out / "breakages" / name.replace(", ", "_").replace(" ", "_")
        runs[name] = [train(settings, BREAKAGES[name], folder, seed) for seed in args.seeds]
    print(f"\nIoU reward, mean of the first and of the last {WINDOW} steps")
    for name in names:
        ends = [curve(metrics)[[0, -1]] for metrics in runs[name]]
        print(f"  {name:26s} " + "   ".join(f"{first:.3f} -> {last:.3f}" for first, last in ends))
    if any(BREAKAGES[name].against for name in names):
        plot(runs, args.out / "breakages.png")
        print(f"broken and unbroken curves  {args.out / 'breakages.png'}")


if __name__ == "__main__":
    main()
