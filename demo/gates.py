"""Ask whether the demo of mia_dpo.py could show that a choice of pairs matters: train on pairs of known kinds.

    python demo/gates.py                       # seeds 0 1 2; what is finished is not done again

The demo's questions about one of two or three pictures, four answers each. Every wrong answer is of a kind that the
pictures tell: a confusion names another picture that was shown, a slip names none. An arm trains on as many pairs of
its kind as the rarest kind has. Where even an oracle of confusions gains no more than a draw by lot, no selection can.
Prints accuracies on held-out questions, medians and ranges over the seeds, and what the attention knows: how often a
right answer has a larger share of attention on its image than a wrong one (AUC; 0.5 by chance), and how much of the
share's variance lies within a question, between its four answers, where a selection could use it.
"""

import argparse
import itertools
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from demo.compare import cell  # noqa: E402
from extras.report import rows_of  # noqa: E402
from rewards import normalize_name, parse_answer  # noqa: E402

MODEL = ROOT / "demo" / "model_mia_dpo"
QUESTIONS = "--task rows --max_completion_tokens 8 --layouts sequence2 sequence3 --workers 0"
EVALUATION = "--task rows --think false --max_completion_tokens 8 --eval_only true --prompts_per_step 64 --workers 0"
TRAINING = "--epochs 3 --lr 5e-5 --gamma 0.5 --micro_batch 32 --workers 0"
ARMS = ("confusions", "slips", "lot")


def run(script: str, *flags: str) -> None:
    command, environment = [sys.executable, script, *flags], os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")


def kind_of(pair: dict, names: dict[str, str]) -> str:
    """Return whether a wrong answer names another shown picture; names: of each picture's file."""
    others = {names[Path(image).name] for i, image in enumerate(pair["image"]) if i != pair["target"]}
    return "confusions" if normalize_name(parse_answer(pair["rejected"]) or "") in others else "slips"


def chosen_pairs(out: Path, seed: int) -> dict[str, list[dict]]:
    """Build the pairs of a seed, all wrong answers, and return equally many of each arm."""
    data, file = out.parent / "data" / "train.jsonl", out / "all.jsonl"
    names = {Path(row["image"]).name: normalize_name(row["solution"]) for row in rows_of(data)}
    if not file.exists():
        shutil.rmtree(out / "all", ignore_errors=True)
        how = f"--selection none --answers 4 --batch 32 --seed {seed}"
        run("mia_dpo.py", "build", *f"{QUESTIONS} {how} --data {data} --model {MODEL} --out {file}".split())
    pairs = [c for c in rows_of(out / "all" / "candidates.jsonl") if c["dropped"] is None]
    kinds = {arm: [p for p in pairs if kind_of(p, names) == arm] for arm in ARMS[:2]} | {"lot": pairs}
    count, lot = min(map(len, kinds.values())), random.Random(seed)
    return {arm: lot.sample(of_kind, count) for arm, of_kind in kinds.items()}


def auc(right: list[float], wrong: list[float]) -> float:
    """Return how often a number of `right` is larger than one of `wrong`; equal ones count half."""
    return float(np.mean([(r > w) + (r == w) / 2 for r in right for w in wrong]))


def of_the_attention(out: Path, layout: str) -> tuple[float, float]:
    """Return the AUC of the share of attention for right answers, and the share of its variance within questions."""
    rows = [c for c in rows_of(out / "all" / "candidates.jsonl") if c["layout"] == layout]
    right, wrong = ([c["ratio"] for c in rows if c["dropped"] == kind] for kind in ("right", None))
    questions = [[c["ratio"] for c in same] for _, same in itertools.groupby(rows, lambda c: c["number"])]
    return auc(right, wrong), float(np.mean(list(map(np.var, questions))) / np.var(np.concatenate(questions)))


def accuracy(model: Path, data: Path, out: Path) -> float:
    if not (out / "scores.json").exists():
        run("virft.py", *EVALUATION.split(), "--model", str(model), "--data", str(data), "--out", str(out))
    return json.loads((out / "scores.json").read_text())["accuracy"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    args = parser.parse_args()
    out = ROOT / "runs" / "gates"
    if not (out / "data" / "val.jsonl").exists():
        run("demo/shapes.py", "mia-dpo", "--out", str(out / "data"), "--val", "800")
    held_out = out / "held_out" / "questions.jsonl"
    if not held_out.exists():
        shutil.rmtree(out / "held_out", ignore_errors=True)
        asked = f"--data {out / 'data/val.jsonl'} --model {MODEL} --answers 0 --out {out / 'held_out.jsonl'}"
        run("mia_dpo.py", "build", *QUESTIONS.split(), *asked.split())
    found = {"before": [(accuracy(MODEL, held_out, out / "before"), 0)]}
    for seed in args.seeds:
        for arm, pairs in chosen_pairs(out / str(seed), seed).items():
            folder = out / str(seed) / arm
            if not (folder / "train" / "model").exists():
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir(parents=True)
                at = out / str(seed) / "all"  # what a build's paths are relative to
                kept = [p | {"image": [str((at / image).resolve()) for image in p["image"]]} for p in pairs]
                (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in kept))
                train = f"--pairs {folder / 'pairs.jsonl'} --model {MODEL} --out {folder / 'train'} --seed {seed}"
                run("mia_dpo.py", "train", *train.split(), *TRAINING.split())
            score = accuracy(folder / "train" / "model", held_out, folder / "after")
            found.setdefault(arm, []).append((score, len(pairs)))
    print("| trained on | accuracy, asked about one of several pictures | pairs |\n|---|---|---|")
    for arm, values in found.items():
        print(f"| {arm} | {cell([score for score, _ in values])} | {cell([count for _, count in values], 0)} |")
    for layout in ("sequence2", "sequence3"):
        auc, within = zip(*(of_the_attention(out / str(seed), layout) for seed in args.seeds))
        print(f"{layout}: AUC {cell(list(auc))}, variance within questions {cell([100 * x for x in within], 2)}%")


if __name__ == "__main__":
    main()
