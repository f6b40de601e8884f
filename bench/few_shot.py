"""Compare a common starting model with supervised fine-tuning and with GRPO on few real photographs; print a table.

    python bench/real_weights.py --out DIR --side 112 --flowers FLOWERS_DIR
    python bench/few_shot.py --model DIR --flowers FLOWERS_DIR --out OUT

1. The start, by virft.py's --sft on two photographs of every class: the language model learns to read the image tokens
   of DIR, while tower and projector are frozen; then all weights are trained for a few steps.
2. Seed 0 has the first 30 classes, seed 1 the next 30, and so on, with four photographs of each class (the paper's
   number). From the start, GRPO takes --steps steps, and supervised fine-tuning as many as fit into the same seconds,
   by the median step of the start's second part, which trains as it does. Both train all weights.
3. The held-out photographs of a seed's classes are answered greedily by the start and by both. 95% intervals are
   bootstrapped over the photographs of all seeds: they say nothing about how a run varies when it is repeated.
4. The fine-tuned model of the first seed answers the same question about one of two held-out photographs, by the build
   of mia_dpo.py: how many answers name the other photograph, and whether the attention tells them from right ones.

Every part is a command of virft.py; OUT/commands.log has it with what it printed. OUT/table.md has the table,
OUT/curves.png the curves of GRPO. A part that is finished is not run again, and one that was interrupted continues at
its last checkpoint. Finished parts take 0.6 GB each, one that is training up to 4.4 GB more.
"""

import argparse
import json
import os
import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import data  # noqa: E402
from bench.first_contact import to_log  # noqa: E402
from demo.gates import auc, kind_of  # noqa: E402
from extras.draw import curves  # noqa: E402
from extras.report import rows_of, write_whole  # noqa: E402
from rewards import normalize_name  # noqa: E402

COMMON = "--task flowers --think false --max_completion_tokens 20 --workers 0"
# Another seed than the projector's, so that the language model also meets photographs that are new to the projector.
START = (
    "--shots 2 --seed 1 --sft true --freeze_vision true --lr 1e-4 --steps 75 --warmup_steps 5 --prompts_per_step 8 "
    "--micro_batch 8"
)
# Without these GRPO has nothing to begin with: where one answer in ten is right, nine groups in ten are all wrong.
THEN = "--shots 2 --seed 1 --sft true --lr 2e-5 --steps 30 --warmup_steps 2 --prompts_per_step 8 --micro_batch 8"
GRPO = "--group_size 8 --prompts_per_step 4 --micro_batch 32 --beta 0 --warmup_steps 2"
SFT = "--sft true --prompts_per_step 8 --micro_batch 8 --warmup_steps 2"
BUILD = (
    "build --task rows --layouts sequence2=1 --answers 4 --max_completion_tokens 20 --batch 8 --selection none "
    "--min_perplexity 1 --max_length_ratio 100 --min_edit_distance 0 --workers 0"
)
EVALUATION = "--eval_only true --prompts_per_step 30"


@dataclass
class Bench:
    """Run parts, each once."""

    flowers: Path
    out: Path
    threads: int

    def virft(self, name: str, model: Path, flags: str, *more: str) -> Path:
        """Run virft.py unless it has finished; return its run folder.

        flags are separated at spaces; `more` are not, because names of classes contain some. Raises SystemExit if the
        folder was made by another command or from other weights.
        """
        out, log = self.out / name, self.out / "commands.log"
        file = out / "done.json"
        argv = ["virft.py", *COMMON.split(), "--data", str(self.flowers), "--model", str(model), "--out", str(out)]
        argv += [*flags.split(), *more]
        made = {"argv": argv, "weights": (model / "model.safetensors").stat().st_mtime_ns}
        if file.exists():
            if json.loads(file.read_text()).items() >= made.items():
                return out
            raise SystemExit(f"{out}: made by another command, or from other weights: remove it, or take another --out")
        checkpoints = [f for f in (out / "checkpoints").glob("*") if re.fullmatch(r"step_\d+", f.name)]
        if not checkpoints:
            shutil.rmtree(out, ignore_errors=True)
        resume = ["--resume", "true"] if checkpoints else []
        status, peak = to_log([sys.executable, *argv, *resume], log, self.threads)
        if status or not ((out / "model").exists() or (out / "scores.json").exists()):
            raise SystemExit(f"{name} did not finish; the end of {log}:\n{log.read_text()[-3000:]}")
        shutil.rmtree(out / "checkpoints", ignore_errors=True)
        write_whole(file, json.dumps(made | {"peak": peak}))
        return out

    def train(self, name: str, model: Path, flags: str, *more: str) -> Path:
        return self.virft(name, model, f"{flags} --save_every 20", *more)

    def answers(self, name: str, model: Path, *more: str) -> np.ndarray:
        """Return 1.0 for each held-out photograph that is named rightly by the most probable answer, else 0.0."""
        out = self.virft(name, model, EVALUATION, *more)
        return np.array([row["rewards"]["accuracy"] for row in rows_of(out / "predictions.jsonl")])


def two_pictures(bench: Bench, model: Path, examples: list[data.Example]) -> str:
    """Ask a model about one of two photographs, four answers each; return what came out."""
    questions, pairs = bench.out / "two_questions.jsonl", bench.out / "two.jsonl"
    if not pairs.exists():
        # As it was trained: without a thought; a question about names has no coordinates.
        question = data.TASKS["flowers"].prompt("", (1000, 1000), "relative", False)
        rows = [{"image": str(e.images[0]), "problem": question, "solution": e.solution} for e in examples]
        write_whole(questions, "".join(json.dumps(row) + "\n" for row in rows))
        shutil.rmtree(pairs.with_suffix(""), ignore_errors=True)
        argv = [sys.executable, "mia_dpo.py", *BUILD.split(), "--data", str(questions), "--model", str(model)]
        if to_log([*argv, "--out", str(pairs)], log := bench.out / "commands.log", bench.threads)[0]:
            raise SystemExit(f"the build failed; the end of {log}:\n{log.read_text()[-3000:]}")
    names = {e.images[0].name: normalize_name(e.solution) for e in examples}
    answers = rows_of(pairs.with_suffix("") / "candidates.jsonl")
    right, wrong = ([a for a in answers if (a["dropped"] == "right") == good] for good in (True, False))
    other = sum(kind_of(answer, names) == "confusions" for answer in wrong)
    told = f"AUC {auc(*([a['ratio'] for a in kind] for kind in (right, wrong))):.2f}" if right and wrong else "no AUC"
    return (
        f"two photographs: {len(right)} of {len(answers)} answers are right, {other} name the other photograph, "
        f"{len(wrong) - other} neither; {told} of the attention on the photograph that was asked about"
    )


def seconds(run: Path) -> list[float]:
    """Return the seconds of each training step, without those of loading images and of saving."""
    rows = rows_of(run / "metrics.jsonl")
    return [sum(value for name, value in row.items() if name.startswith("seconds/")) for row in rows]


def interval(values: np.ndarray) -> tuple[float, float]:
    """Return the 95% interval of a mean by bootstrapping, with 10,000 draws."""
    draws = np.random.default_rng(0).choice(values, (10_000, len(values))).mean(1)
    low, high = np.percentile(draws, [2.5, 97.5])
    return float(low), float(high)


def row(arm: str, seeds: list[np.ndarray], start: list[np.ndarray], took: list[float], peak: float) -> str:
    """Write a row of the table: accuracy of all photographs, of each seed's, gain over the start, seconds, memory."""
    right, before = np.concatenate(seeds), np.concatenate(start)
    low, high = interval(right)
    cells = [arm, f"{right.mean():.3f} ({low:.3f} to {high:.3f})", ", ".join(f"{one.mean():.3f}" for one in seeds)]
    low, high = interval(right - before)
    cells += [f"{(right - before).mean():+.3f} ({low:+.3f} to {high:+.3f})" if arm != "start" else ""]
    return f"| {' | '.join([*cells, ', '.join(f'{one:.0f}' for one in took), f'{peak:.1f}'])} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="a model of real_weights.py with a trained projector")
    parser.add_argument("--flowers", type=Path, required=True, help="a folder that --task flowers reads")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--classes", type=int, default=30, help="of each seed")
    parser.add_argument("--shots", type=int, default=4)
    parser.add_argument("--steps", type=int, default=25, help="of GRPO")
    parser.add_argument("--grpo_lr", default="1e-5")
    parser.add_argument("--sft_lr", default="2e-5")
    parser.add_argument("--start_flags", nargs=2, default=[START, THEN], help="of the two parts of the start")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    args = parser.parse_args()
    try:
        # one_split: without a column of splits the held-out photographs would be those of training.
        held_out, _ = data.load_examples(data.TASKS["flowers"], str(args.flowers), "val", one_split=False)
    except data.DataError as error:
        parser.error(f"--flowers: {error}")
    names = list(dict.fromkeys(example.category for example in held_out))
    possible = range(len(names) // args.classes)
    if len(set(args.seeds)) < len(args.seeds) or not set(args.seeds) <= set(possible):
        parser.error(f"--seeds {args.seeds}: different ones below {len(possible)} expected, for {len(names)} classes")
    args.out.mkdir(parents=True, exist_ok=True)
    bench = Bench(args.flowers.resolve(), args.out.resolve(), args.threads)
    reader = bench.train("start", args.model.resolve(), args.start_flags[0])
    start = bench.train("start_whole", reader / "model", args.start_flags[1])
    found, took, peak = ({arm: [] for arm in ("start", "SFT", "GRPO")} for _ in range(3))
    logged = {}
    for seed in args.seeds:
        classes = names[seed * args.classes : (seed + 1) * args.classes]
        which = ("--categories", ", ".join(f'"{name}"' for name in classes))
        few = (*which, "--shots", str(args.shots), "--seed", str(seed))
        grpo = bench.train(f"grpo_{seed}", start / "model", f"{GRPO} --steps {args.steps} --lr {args.grpo_lr}", *few)
        steps = round(sum(seconds(grpo)) / median(seconds(start)))
        sft = bench.train(f"sft_{seed}", start / "model", f"{SFT} --steps {steps} --lr {args.sft_lr}", *few)
        logged[f"GRPO, seed {seed}"] = rows_of(grpo / "metrics.jsonl")
        for arm, run in (("start", start), ("SFT", sft), ("GRPO", grpo)):
            found[arm].append(bench.answers(f"{arm.lower()}_{seed}_eval", run / "model", *which))
            took[arm].append(sum(seconds(run)))
            peak[arm].append(json.loads((run / "done.json").read_text())["peak"])
            print(f"seed {seed}, {arm}: {found[arm][-1].mean():.3f} of {len(found[arm][-1])}", flush=True)
        lines = [row(arm, answers, found["start"], took[arm], max(peak[arm])) for arm, answers in found.items()]
        head = "| arm | accuracy | of each seed | gain | s | peak RAM, GB |\n|---|---|---|---|---|---|"
        write_whole(bench.out / "table.md", "\n".join([head, *lines]) + "\n")
        shown = ("reward/accuracy", "entropy", "zero_variance_groups")
        curves(logged, shown, columns=3).savefig(bench.out / "curves.png", dpi=110)
    print((bench.out / "table.md").read_text(), end="")
    first = names[args.seeds[0] * args.classes :][: args.classes]
    tuned = bench.out / f"sft_{args.seeds[0]}" / "model"
    print(two_pictures(bench, tuned, [example for example in held_out if example.category in first]))


if __name__ == "__main__":
    main()
