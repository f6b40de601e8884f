"""Take a model of bench/real_weights.py through the product, part by part, on real photographs; print a table.

    python bench/first_contact.py --model DIR --coco COCO_DIR --flowers FLOWERS_DIR --out OUT
    python bench/first_contact.py ... --only lora shard        # some parts

Each part runs one or more commands as a user would type them, in one process unless its title says two. The seconds
cover the whole part, program starts included; the peak is the largest resident memory of one process. Output goes to
OUT/PART.log.
"""

import argparse
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# The untrained projector leaves every verifiable reward at 0. `letters` varies within a group, so the weights change.
TRAIN = (
    "--steps 2 --group_size 4 --prompts_per_step 2 --max_completion_tokens 32 --lr 1e-5 --workers 1 "
    "--rewards accuracy=1 format=1 bench/first_contact.py:letters=1"
)


def letters(completion: str, solution: object) -> float:
    """Return the share of a completion's characters that are letters or spaces."""
    return sum(c.isalpha() or c == " " for c in completion) / max(1, len(completion))


def to_log(argv: list[str], log: Path, threads: int, kill: Path | None = None) -> tuple[int, float]:
    """Run a command to its end, or until the file `kill` exists and then SIGKILL; append what it prints to a log.

    Returns its exit status and the largest resident memory of one of its processes in GB.
    """
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    with log.open("a") as file:
        file.write(f"$ {shlex.join(argv[1:])}\n")
        file.flush()
        process = subprocess.Popen(argv, cwd=ROOT, env=environment, stdout=file, stderr=file)
        ended = partial(os.waitid, os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)  # leaves it to wait4
        while kill and not kill.exists() and not ended():
            time.sleep(0.05)
        if kill:
            process.send_signal(signal.SIGKILL)
        try:
            _, status, usage = os.wait4(process.pid, 0)
        except KeyboardInterrupt:  # virft.py has received it too: let it write its checkpoint
            process.wait()
            raise
    return os.waitstatus_to_exitcode(status), usage.ru_maxrss * 1024 / 1e9


class Parts:
    """Run the commands of each part.

    Each method except run, train, steps and scores is a part: its docstring is the title in the table, its return value
    ends with the line for the last column.
    """

    def __init__(self, args: argparse.Namespace):
        self.model, self.out = args.model.resolve(), args.out.resolve()
        self.flowers = f"--task flowers --data {args.flowers.resolve()}"
        self.coco = f"--task coco --data {args.coco.resolve()}"
        self.peak = 0.0

    def run(self, part: str, flags: str, script: str = "virft.py", processes: int = 1, kill: Path | None = None) -> str:
        """Run a command to its end, or until `kill` exists and then SIGKILL; return what it printed."""
        argv = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes)]
        argv = [*(argv if processes > 1 else [sys.executable]), script, *flags.split()]
        # With several threads PyTorch adds up gradients in an order that changes from run to run: see `resume`.
        threads = 1 if part.startswith("resume") else max(1, os.cpu_count() // processes)
        log = self.out / f"{part}.log"
        start = log.stat().st_size if log.exists() else 0
        status, peak = to_log(argv, log, threads, kill)
        self.peak = max(self.peak, peak)
        said = log.read_text()[start:]
        if status and not kill:
            raise SystemExit(f"{part} failed:\n{said}")
        return said

    def train(self, part: str, data: str, more: str = "", kill: Path | None = None, processes: int = 1) -> str:
        """Train for a few steps; return the rewards of each step."""
        flags = f"{data} --model {self.model} --out {self.out / part} {TRAIN} {more}"
        self.run(part, flags, processes=processes, kill=kill)
        return "" if kill else self.steps(part)

    def steps(self, part: str) -> str:
        rows = [json.loads(line) for line in (self.out / part / "metrics.jsonl").read_text().splitlines()]
        seconds = {name: sum(row[f"seconds/{name}"] for row in rows) / len(rows) for name in ("sample", "train")}
        rewards = " ".join(f"{row['reward']:.2f}" for row in rows)
        return f"reward {rewards}; a step samples {seconds['sample']:.1f} s, trains {seconds['train']:.1f} s"

    @staticmethod
    def scores(folder: Path) -> str:
        scores = json.loads((folder / "scores.json").read_text())
        return ", ".join(f"{name} {value:g}" for name, value in scores.items() if isinstance(value, (int, float)))

    def check(self) -> str:
        """--check"""
        flags = f"{self.coco} --model {self.model} --out {self.out / 'check'} {TRAIN} --rewards iou=1 format=1"
        return self.run("check", f"{flags} --check true")

    def flowers_grpo(self) -> str:
        """GRPO, classification"""
        return self.train("flowers_grpo", self.flowers, "--steps 5 --prompts_per_step 4")

    def coco_grpo(self) -> str:
        """GRPO, detection"""
        rewards = "--rewards iou=1 confidence=1 format=1 bench/first_contact.py:letters=1"
        return self.train("coco_grpo", self.coco, f"--steps 5 --max_completion_tokens 64 {rewards}")

    def lora(self) -> str:
        """GRPO with --lora_rank 16"""
        return self.train("lora", self.flowers, "--lora_rank 16 --lr 1e-4")

    def resume(self) -> str:
        """SIGKILL after a checkpoint, then --resume, against a run that nothing disturbed; one thread"""
        self.train("resume_whole", self.flowers, "--steps 3 --save_every 1")
        self.train("resume", self.flowers, "--steps 3 --save_every 1", kill=self.out / "resume/checkpoints/step_000001")
        self.train("resume", self.flowers, "--steps 3 --save_every 1 --resume true")
        whole, killed = ((self.out / f / "rollouts.jsonl").read_text() for f in ("resume_whole", "resume"))
        return f"rollouts.jsonl equal: {whole == killed}; {self.steps('resume')}"

    def two(self) -> str:
        """two processes"""
        return self.train("two", self.flowers, processes=2)

    def shard(self) -> str:
        """two processes, --shard"""
        return self.train("shard", self.flowers, "--shard true", processes=2)

    def evaluate(self) -> str:
        """--eval_only, classification and detection"""
        found = []
        for name, data in (("flowers", self.flowers), ("coco", self.coco)):
            out = self.out / f"evaluate_{name}"
            limits = "--eval_limit 16 --max_completion_tokens 48"
            self.run("evaluate", f"{data} --model {self.model} --out {out} --eval_only true {limits}")
            found.append(self.scores(out))
        return "; ".join(found)

    def ask(self) -> str:
        """--ask"""
        picture = sorted(Path(self.coco.split()[-1]).glob("val2017/*"))[0]
        out = f"--out {self.out / 'ask'} --max_completion_tokens 48"
        return self.run("ask", f"{self.coco} --model {self.model} --ask {picture} --categories person {out}")

    def save(self) -> str:
        """evaluated in training and from OUT/model: the same answers"""
        limits = "--eval_limit 8 --max_completion_tokens 24"
        self.train("save", self.flowers, f"--eval_every 2 {limits}")
        limits += f" {TRAIN[TRAIN.index('--rewards') :]}"
        again = f"--model {self.out / 'save' / 'model'} --out {self.out / 'save_again'} --eval_only true {limits}"
        self.run("save", f"{self.flowers} {again}")
        files = [self.out / "save" / "eval_000002", self.out / "save_again"]
        kept, loaded = ((f / "predictions.jsonl").read_text() for f in files)
        return f"answers equal: {kept == loaded}; {self.scores(files[1])}"

    def mia_dpo(self) -> str:
        """mia_dpo.py build and train"""
        pairs, rows = self.out / "mia_dpo_pairs.jsonl", self.out / "mia_dpo_rows.jsonl"
        flowers = Path(self.flowers.split()[-1])
        labels = json.loads((flowers / "labels.json").read_text())
        questions = [
            {"image": str(flowers / r["file"]), "problem": "Name the flower in a word.", "solution": r["class_name"]}
            for r in labels[:24]
        ]
        rows.write_text("".join(json.dumps(row) + "\n" for row in questions))
        build = "--layouts sequence2 grid4 --max_completion_tokens 64 --cell 112 --batch 4 --min_perplexity 1"
        said = self.run(
            "mia_dpo", f"build --task rows --data {rows} --model {self.model} --out {pairs} {build}", "mia_dpo.py"
        )
        if pairs.exists() and pairs.read_text():
            train = f"train --pairs {pairs} --model {self.model} --out {self.out / 'mia_dpo'} --micro_batch 4"
            said += self.run("mia_dpo", train, "mia_dpo.py")
        return said


def main() -> None:
    parts = [name for name in vars(Parts) if name not in ("run", "train", "steps", "scores") and name[0] != "_"]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--coco", type=Path, required=True, help="a COCO folder")
    parser.add_argument("--flowers", type=Path, required=True, help="a folder that --task flowers reads")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", nargs="+", choices=parts, default=parts)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    print("| part | seconds | peak GB | what came out |\n|---|---|---|---|")
    for name in args.only:
        for old in args.out.glob(f"{name}*"):
            shutil.rmtree(old) if old.is_dir() else old.unlink()
        run = Parts(args)
        start = time.perf_counter()
        came_out = getattr(run, name)().strip().splitlines()[-1]
        seconds = time.perf_counter() - start
        print(f"| {getattr(Parts, name).__doc__} | {seconds:.0f} | {run.peak:.1f} | {came_out} |", flush=True)


if __name__ == "__main__":
    main()
