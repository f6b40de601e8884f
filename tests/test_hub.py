"""`accelerate launch virft.py --task coco`, unchanged, with a small server on 127.0.0.1 as the hub (hub.py).

Qwen-VL's processor needs torchvision, which does not exist for the CPU build of torch; under the name of the default
model the server offers a tiny LLaVA of random weights.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from transformers import AutoConfig, AutoModelForImageTextToText

import data
from conftest import ROOT
from demo import shapes
from hub import serving

MODEL, DATASET = "Qwen/Qwen2-VL-2B-Instruct", "laolao77/ViRFT_COCO"
SMALL = ("--steps", "2", "--max_completion_tokens", "16")
LAUNCH = (sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--cpu", "--num_processes", "1")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> Path:
    """A parquet as the paper's authors published theirs: columns image, problem, solution; boxes in 0..1000."""
    datasets = pytest.importorskip("datasets")
    pictures, folder = tmp_path_factory.mktemp("pictures"), tmp_path_factory.mktemp("ViRFT_COCO")
    shapes.write_split(pictures, "train", 20, seed=0)
    examples, _ = data.read_coco(str(pictures), "train")
    rows = [
        {
            "image": data.open_image(e.images[0]),
            "problem": data.detection_prompt(e.category, (1000, 1000), "relative", think=True),
            "solution": data.model_answer(data.TASKS["coco"], e, (1000, 1000), think=False),
        }
        for e in examples
    ]
    (folder / "data").mkdir()
    datasets.Dataset.from_list(rows).to_parquet(str(folder / "data" / "train-00000-of-00001.parquet"))
    return folder


@pytest.fixture(scope="module")
def small_model(llava_dir, tmp_path_factory) -> Path:
    """The tiny LLaVA with one layer, to be fast: with default flags a step samples 128 answers of up to 512 tokens."""
    folder = shutil.copytree(llava_dir, tmp_path_factory.mktemp("model") / "small")
    config = AutoConfig.from_pretrained(folder)
    config.text_config.num_hidden_layers = 1
    AutoModelForImageTextToText.from_config(config).save_pretrained(folder)
    return folder


@pytest.fixture
def hub(small_model, published):
    """Serve the default model and the released dataset, and three models that cannot be had."""
    folders = {f"models/{name}": small_model for name in (MODEL, "owner/gated", "owner/new", "owner/breaks")}
    folders[f"datasets/{DATASET}"] = published
    renamed = {"models/owner/old": "owner/new"}
    with serving(folders, gated=["models/owner/gated"], breaks=["models/owner/breaks"], renamed=renamed) as server:
        yield server


def start(hub, folder: Path, *flags: str, launch=(*LAUNCH, "virft.py", "--task", "coco")) -> subprocess.Popen:
    """Start `accelerate launch virft.py --task coco FLAGS` as a new user would: nothing is cached yet."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")} | {
        "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}", "HF_HOME": str(folder / "home"), "OMP_NUM_THREADS": "1",
        "NO_PROXY": "127.0.0.1",
    }  # fmt: skip
    for script in ("virft.py", "rewards.py", "data.py", "extras"):  # so that runs/virft, the default, is in `folder`
        if not (folder / script).exists():
            (folder / script).symlink_to(ROOT / script)
    how = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "start_new_session": True}
    return subprocess.Popen([*launch, *flags], cwd=folder, env=environment, **how)


def finish(process: subprocess.Popen) -> str:
    said, _ = process.communicate(timeout=400)
    return said


def test_the_bare_command_reaches_its_first_step(hub, tmp_path):
    process = start(hub, tmp_path)
    metrics = tmp_path / "runs" / "virft" / "metrics.jsonl"
    deadline = time.monotonic() + 400
    while not metrics.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.2)
    os.killpg(process.pid, signal.SIGKILL)  # the launcher and the script: 199 steps would follow
    said = finish(process)
    assert metrics.exists(), said
    row = json.loads(metrics.read_text().splitlines()[0])
    assert row["step"] == 1 and row["completion_tokens"] > 1, said


def test_with_fewer_steps_and_tokens_it_reaches_its_end(hub, tmp_path):
    process = start(hub, tmp_path, *SMALL)
    said = finish(process)
    assert process.returncode == 0 and "the model after 2 of 2 steps" in said, said
    assert (tmp_path / "runs" / "virft" / "model" / "model.safetensors").exists()
    assert f"train examples from {DATASET}" in said, said


EXPLAIN = """
import sys, virft
for name in sys.argv[1:]:
    try:
        flags = f"--task coco --model {name} --out runs/{name} --steps 1 --max_completion_tokens 2 --prompts_per_step 1"
        virft.main(flags.split())
        print("===", name, "trained")
    except SystemExit as stopped:
        print("===", name, stopped)
"""


def test_what_the_hub_refuses_is_explained_in_three_lines_and_a_renamed_model_is_followed(hub, tmp_path):
    names = ("owner/gated", "owner/missing", "owner/breaks", "owner/old")
    process = start(hub, tmp_path, launch=(sys.executable, "-c", EXPLAIN, *names))
    said = finish(process)
    assert process.returncode == 0, said
    gated, missing, breaks, renamed = (part.strip() for part in said.split("===")[1:])
    assert renamed == "owner/old trained"
    reasons = ((gated, "must accept its owners' terms"), (missing, "no such repository"), (breaks, "broke off"))
    for told, words in reasons:
        first, second, third = told.split("\n")[:3]
        assert words in first and "bash run.sh" in third, told
    assert "huggingface.co/owner/gated" in gated and "hf auth login" in missing and "the same command" in breaks.lower()
