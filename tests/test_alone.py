"""virft.py, rewards.py and data.py without the rest: no extras/ folder, none of the packages that only extras need."""

import ast
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from conftest import ROOT

FILES = ("virft.py", "rewards.py", "data.py")
EXTRAS_NEED = ("datasets", "pycocotools", "matplotlib", "peft", "pytest", "hypothesis")
# Runs a script as `python SCRIPT` would, in an environment in which those packages are not installed.
WITHOUT = f"""
import runpy, sys
from importlib.machinery import PathFinder

class Without(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in {EXTRAS_NEED} else super().find_spec(name, path, target)

sys.meta_path = [Without if finder is PathFinder else finder for finder in sys.meta_path]
sys.path.insert(0, ".")
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
SMALL = {
    "max_completion_tokens": 24, "group_size": 4, "prompts_per_step": 4, "steps": 2, "workers": 0, "lr": 1e-3,
    "out": "run",
}  # fmt: skip


@pytest.fixture
def alone(tmp_path) -> Path:
    """An empty folder with the three files."""
    for name in FILES:
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


def command(shapes_dir, **flags) -> list[str]:
    settings = SMALL | {"task": "coco", "data": shapes_dir, "model": ROOT / "demo" / "model"} | flags
    return [str(part) for name, value in settings.items() for part in (f"--{name}", value)]


def environment() -> dict[str, str]:
    return {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": ""}


def run(folder: Path, *argv: str) -> subprocess.CompletedProcess:
    script = [sys.executable, "-c", WITHOUT, "virft.py", *argv]
    return subprocess.run(script, cwd=folder, env=environment(), capture_output=True, text=True, timeout=280)


def check_what_a_run_leaves(out: Path, steps: int = 2) -> None:
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, steps + 1)) and rows[0]["grad_norm"] > 0
    assert len((out / "rollouts.jsonl").read_text().splitlines()) == steps * 4 * 4
    model, before = (AutoModelForImageTextToText.from_pretrained(f) for f in (out / "model", ROOT / "demo" / "model"))
    assert any(not torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters()))
    assert AutoProcessor.from_pretrained(out / "model").chat_template


def test_three_files_train(alone, shapes_dir):
    done = run(alone, *command(shapes_dir))
    assert done.returncode == 0, done.stderr
    assert "extras/ is missing" in done.stdout
    check_what_a_run_leaves(alone / "run")


def test_ctrl_c_saves_the_model(alone, shapes_dir):
    script = [sys.executable, "-c", WITHOUT, "virft.py", *command(shapes_dir, steps=1000)]
    with (alone / "log").open("w") as log:
        # A shell that starts pytest in the background has it ignore SIGINT, which processes inherit.
        heard = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}
        process = subprocess.Popen(script, cwd=alone, env=environment(), stdout=log, stderr=log, **heard)
        deadline = time.time() + 120
        while not (alone / "run" / "metrics.jsonl").exists() and time.time() < deadline:
            time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        process.wait(60)
    assert process.returncode and "steps is in run/model" in (alone / "log").read_text()
    AutoModelForImageTextToText.from_pretrained(alone / "run" / "model")


NEEDS = {
    "--resume true": "--resume needs extras/checkpoints.py",
    "--eval_only true": "--eval_only needs extras/evaluate.py",
    "--ask x.png --categories dog": "--ask needs extras/check.py",
    "--lora_rank 4": "--lora_rank needs extras/adapters.py",
    "--shard true": "--shard needs extras/shards.py",
    "--normalize each": "--normalize needs extras/variants.py",
    "--negatives 0.2": "--shots, --negatives or --eval_categories needs extras/readers/choose.py",
}


@pytest.mark.parametrize("flags", NEEDS)
def test_a_flag_that_needs_extras_says_so(alone, shapes_dir, flags):
    done = run(alone, *command(shapes_dir), *flags.split())
    assert done.returncode and done.stderr.strip().splitlines()[-1].startswith(NEEDS[flags]), done.stderr


def imported(file: Path, everywhere: bool = True) -> set[str]:
    """Names of modules that a file imports, at its top or everywhere; `from virft import x` counts as virft.x too."""
    tree = ast.parse(file.read_text())
    nodes = ast.walk(tree) if everywhere else tree.body
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def test_arrows_point_one_way():
    """rewards <- data <- virft <- mia_dpo; extras import data, rewards and each other, never virft."""
    ours = {file.stem for file in ROOT.glob("*.py")} | {"extras"}
    top = {
        name: {m.partition(".")[0] for m in imported(ROOT / f"{name}.py", False)} & ours
        for name in ("rewards", "data")
    }  # fmt: skip
    assert top == {"rewards": set(), "data": {"rewards"}}
    assert {m.partition(".")[0] for m in imported(ROOT / "virft.py", False)} & ours == {"data", "rewards"}
    for file in (ROOT / "extras").rglob("*.py"):
        assert not {m.partition(".")[0] for m in imported(file)} & {"virft", "mia_dpo"}, file
    assert (ROOT / "extras" / "__init__.py").read_text() == ""
    algorithm = {
        "MicroBatch", "branch", "completion_mask", "fork", "log_distribution", "optimizer_step", "prefill", "sample",
        "sampling_noise",
    }  # fmt: skip
    loop = {
        "Averages", "Config", "Run", "build", "connect", "load_processor", "obey", "open_out", "out_rule",
        "parse", "say", "setting", "train",
    }  # fmt: skip
    taken = {m.removeprefix("virft.") for m in imported(ROOT / "mia_dpo.py") if m.startswith("virft.")}
    assert taken == algorithm | loop and len(algorithm) <= 10


@pytest.mark.slow
def test_three_files_train_in_an_environment_of_five_packages(alone, shapes_dir):
    """A fresh environment, one process and two by accelerate launch, and a model folder that loads."""
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    pins = {line.partition("==")[0]: line for line in lines if "==" in line}
    subprocess.run([sys.executable, "-m", "venv", alone / "env"], check=True)
    five = [pins[name] for name in ("torch", "transformers", "accelerate", "pillow", "numpy")]
    subprocess.run([alone / "env/bin/pip", "install", "--quiet", *five], check=True)
    for package in ("datasets", "pycocotools", "matplotlib", "peft"):
        assert subprocess.run([alone / "env/bin/python", "-c", f"import {package}"], capture_output=True).returncode
    for processes in (1, 2):
        launcher = [alone / "env/bin/accelerate", "launch", "--cpu", "--num_processes", str(processes)]
        argv = [*launcher, "virft.py", *command(shapes_dir, out=f"run{processes}")]
        done = subprocess.run(argv, cwd=alone, env=environment(), capture_output=True, text=True, timeout=280)
        assert done.returncode == 0, done.stdout + done.stderr
        check_what_a_run_leaves(alone / f"run{processes}")
