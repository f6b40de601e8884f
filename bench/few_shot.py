"""Compare the start, supervised fine-tuning and GRPO on few real photographs of flowers; print a table.

    python bench/real_weights.py --out DIR --side 112 --flowers FLOWERS_DIR
    python bench/few_shot.py --model DIR --flowers FLOWERS_DIR --out OUT

1. start: the language model learns to read the image tokens of DIR, by virft.py's --sft on two photographs of every
   class; tower and projector are frozen. All arms begin with this model.
2. Each seed has its own 30 classes, in the order of the labels, and four photographs of each, as in the paper. GRPO
   takes its steps; supervised fine-tuning takes as many as fit into the same seconds.
3. All answer the same held-out photographs. 95% intervals are bootstrapped over photographs.

Every part is a command of virft.py; OUT/commands.log has it with what it printed, OUT/curves.png the curves of GRPO. A
part that is finished is not run again, and one that was interrupted continues at its last checkpoint.
"""

import argparse
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import data  # noqa: E402
from bench.first_contact import to_log  # noqa: E402
from extras.draw import curves  # noqa: E402
from extras.report import rows_of  # noqa: E402

COMMON = "--task flowers --think false --max_completion_tokens 20 --workers 0"
# Another seed than the projector's: half of these photographs are new to it, as held-out ones are.
START = (
    "--shots 2 --seed 1 --sft true --freeze_vision true --lr 1e-4 --steps 75 --warmup_steps 5 --prompts_per_step 8 "
    "--micro_batch 8"
)
GRPO = "--group_size 8 --prompts_per_step 4 --micro_batch 32 --beta 0 --warmup_steps 2"
SFT = "--sft true --prompts_per_step 8 --micro_batch 8 --warmup_steps 2"
EVALUATION = "--eval_only true --prompts_per_step 30"


@dataclass
class Bench:
    """Run parts, each once."""

    flowers: Path
    out: Path
    threads: int

    def virft(self, name: str, model: Path, flags: str, *more: str) -> Path:
        """Run virft.py unless it has finished; return its run folder."""
        out = self.out / name
        common = [*COMMON.split(), "--data", str(self.flowers), "--model", str(model), "--out", str(out)]
        done, begun = out / "done.json", (out / "checkpoints").exists()
        if not done.exists():
            argv = [sys.executable, "virft.py", *common, *flags.split(), *more, *["--resume", "true"][: 2 * begun]]
            status, peak = to_log(argv, log := self.out / "commands.log", self.threads)
            if status:
                raise SystemExit(f"{name} failed; the end of {log}:\n{log.read_text()[-3000:]}")
            done.write_text(json.dumps({"peak": peak}))
        return out

    def train(self, name: str, model: Path, flags: str, *more: str) -> Path:
        return self.virft(name, model, f"{flags} --save_every 20", *more)

    def answers(self, name: str, model: Path, *more: str) -> np.ndarray:
        """Return, of each held-out photograph, whether the most probable answer is right."""
        out = self.virft(name, model, EVALUATION, *more)
        return np.array([row["rewards"]["accuracy"] for row in rows_of(out / "predictions.jsonl")])


def seconds(run: Path) -> list[float]:
    """Return the seconds of each training step."""
    rows = rows_of(run / "metrics.jsonl")
    return [sum(value for name, value in row.items() if name.startswith("seconds/")) for row in rows]


def interval(values: np.ndarray) -> tuple[float, float]:
    """Return the 95% interval of a mean by bootstrapping, with 10,000 draws."""
    draws = np.random.default_rng(0).choice(values, (10_000, len(values))).mean(1)
    low, high = np.percentile(draws, [2.5, 97.5])
    return float(low), float(high)


def row(arm: str, seeds: list[np.ndarray], start: list[np.ndarray], took: list[float], peak: float) -> str:
    """Write a row of the table: accuracy over all seeds and of each, what it gained over the start, seconds, memory."""
    right, before = np.concatenate(seeds), np.concatenate(start)
    low, high = interval(right)
    cells = [arm, f"{right.mean():.3f} ({low:.3f} to {high:.3f})", ", ".join(f"{one.mean():.3f}" for one in seeds)]
    if seeds is start:
        return f"| {' | '.join(cells)} | | | |"
    low, high = interval(right - before)
    cells += [f"{(right - before).mean():+.3f} ({low:+.3f} to {high:+.3f})"]
    return f"| {' | '.join([*cells, ', '.join(f'{one:.0f}' for one in took), f'{peak:.1f}'])} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="a model of real_weights.py with a trained projector")
    parser.add_argument("--flowers", type=Path, required=True, help="a folder that --task flowers reads")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--classes", type=int, default=30, help="of each seed")
    parser.add_argument("--shots", type=int, default=4)
    parser.add_argument("--steps", type=int, default=40, help="of GRPO")
    parser.add_argument("--grpo_lr", default="2e-5")
    parser.add_argument("--sft_lr", default="2e-5")
    parser.add_argument("--start_flags", default=START)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    bench = Bench(args.flowers.resolve(), args.out.resolve(), args.threads)
    names = list(dict.fromkeys(e.category for e in data.load_examples(data.TASKS["flowers"], args.flowers, "val")[0]))
    if (max(args.seeds) + 1) * args.classes > len(names):
        parser.error(f"--seeds {max(args.seeds)}: each seed has {args.classes} of the {len(names)} classes")
    started = bench.train("start", args.model.resolve(), args.start_flags)
    found, took, peak = ({arm: [] for arm in ("start", "SFT", "GRPO")} for _ in range(3))
    logged = {}
    for seed in args.seeds:
        chosen = names[seed * args.classes : (seed + 1) * args.classes]
        which = ("--categories", ", ".join(f'"{name}"' for name in chosen))
        few = (*which, "--shots", str(args.shots), "--seed", str(seed))
        grpo = bench.train(f"grpo_{seed}", started / "model", f"{GRPO} --steps {args.steps} --lr {args.grpo_lr}", *few)
        logged[f"GRPO, seed {seed}"] = rows_of(grpo / "metrics.jsonl")
        steps = round(sum(seconds(grpo)) / mean(seconds(started)))
        sft = bench.train(f"sft_{seed}", started / "model", f"{SFT} --steps {steps} --lr {args.sft_lr}", *few)
        for arm, run in (("start", started), ("SFT", sft), ("GRPO", grpo)):
            found[arm].append(bench.answers(f"{arm.lower()}_{seed}_eval", run / "model", *which))
            took[arm].append(sum(seconds(run)))
            peak[arm].append(json.loads((run / "done.json").read_text())["peak"])
            print(f"seed {seed}, {arm}: {found[arm][-1].mean():.3f} of {len(found[arm][-1])}", flush=True)
    curves(logged, ("reward/accuracy", "entropy", "zero_variance_groups"), columns=3).savefig(bench.out / "curves.png")
    print("\n| arm | accuracy | of each seed | gain | s | peak GB |\n|---|---|---|---|---|---|")
    for arm, answers in found.items():
        print(row(arm, answers, found["start"], took[arm], max(peak[arm])))


if __name__ == "__main__":
    main()
