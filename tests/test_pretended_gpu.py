"""Whole runs on a pretended GPU (pretended_gpu/device.cpp): CUDA's rules about devices and about waiting, on a CPU.

What this cannot show: CUDA's own kernels, their rounding and speed, how much memory they take, and NCCL.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils import cpp_extension

from conftest import ROOT
from demo import shapes
from families import FAMILIES

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not shutil.which("g++"), reason="there is no g++ to build the pretended GPU"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
]
FOLDER = Path(__file__).resolve().parent / "pretended_gpu"
LAUNCH = ("-m", "accelerate.commands.launch", "--quiet")  # as on a machine with GPUs: all that are there
FEW = ("--prompts_per_step", 4, "--group_size", 4, "--max_completion_tokens", 24, "--steps", 3, "--lr", 1e-4)


@pytest.fixture(scope="module")
def pretended(tmp_path_factory):
    """A function that runs Python on pretended GPUs and returns what was printed."""
    library, torch_libraries = tmp_path_factory.mktemp("device") / "device.so", Path(torch.__file__).parent / "lib"
    build = ["g++", "-std=c++20", "-O1", "-w", "-shared", "-fPIC", f"-I{FOLDER}"]
    build += [f"-I{path}" for path in cpp_extension.include_paths()]
    build += [FOLDER / "device.cpp", f"-L{torch_libraries}", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{torch_libraries}"]
    subprocess.run([*build, "-o", library], check=True)

    def python(*argv, gpus: int = 1, packages: tuple[Path, ...] = ()) -> str:
        folders = map(str, (FOLDER, *packages))
        environment = os.environ | {
            "PRETENDED_GPU": str(library), "PRETENDED_GPUS": str(gpus), "PYTHONPATH": os.pathsep.join(folders),
            "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        command = [sys.executable, *map(str, argv)]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    return python


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    shapes.write_split(folder, "train", 24, seed=0)
    shapes.write_split(folder, "val", 8, seed=0)
    return folder


def flags(pictures: Path, out: Path, *more) -> list:
    model = ROOT / "demo" / "model"
    return ["virft.py", "--task", "coco", "--data", pictures, "--model", model, "--out", out, "--workers", 1, *more]


def metrics(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


RULES = """
import torch
t = torch.arange(6.0, device="cuda").view(2, 3)
assert t.device == torch.device("cuda:0") and (t.T @ t).sum().item() == 153 and t[t > 2].tolist() == [3, 4, 5]
def refused(words, call):
    try: call()
    except RuntimeError as error: assert words in str(error), error
    else: raise AssertionError(words)
refused("all tensors to be on the same device", lambda: t + torch.ones(3))
refused("all tensors to be on the same device", lambda: torch.cat([t, torch.ones(2, 3)]))
refused("belongs to another process", lambda: torch.ones(2, device="cuda:1"))
torch.distributed.init_process_group("nccl", store=torch.distributed.HashStore(), rank=0, world_size=1)
torch.distributed.all_reduce(t)
torch.distributed.all_gather_object([None], "text")
refused("No backend type associated with device type cpu", lambda: torch.distributed.all_reduce(torch.ones(2)))
first = torch.tensor([0], device="cuda")
torch.ops.pretended_gpu.record(True)
t.mul_(2)[:, first].sum()
calls = [lambda: t.sum().item(), lambda: t[t > 2], lambda: t.cpu(), lambda: torch.ones(3).cuda(), lambda: t.nonzero(),
         lambda: t[:, torch.tensor([0])], lambda: torch.equal(t, t)]
for call in calls:
    refused("not permitted when stream is capturing", call)
"""


def test_the_pretended_gpu_refuses_what_a_gpu_refuses(pretended):
    pretended("-c", RULES)


def test_every_family_samples_by_a_graph_and_learns_as_on_the_cpu(pretended):
    out = pretended(FOLDER / "families_worker.py")
    found = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
    assert [row["name"] for row in found] == list(FAMILIES)
    for row in found:
        assert row["same tokens"] and row["recorded"] == [True, True] and row["logp"] < 1e-4, row
        assert row["gradient"] < 1e-4 and row["bf16"] < 0.3 and row["checkpointed"] < 1e-6, row


def test_flash_attn_learns_as_sdpa(pretended, tmp_path):
    """By transformers' own use of the package, for which pretended_gpu/packages/flash_attn.py stands in."""
    information = tmp_path / "flash_attn-2.8.3.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: flash-attn\nVersion: 2.8.3\n")
    (information / "top_level.txt").write_text("flash_attn\n")
    out = pretended(FOLDER / "families_worker.py", "flash", packages=(FOLDER / "packages", tmp_path))
    calls = 0
    for row in (json.loads(line) for line in out.splitlines() if line.startswith("{")):
        assert row["gradient"] < 1e-5, row
        by_sdpa = row["name"] in ("Gemma3", "PaliGemma", "Mllama", "LFM2-VL")  # masks or towers that it does not know
        assert (row["calls"] > calls) != by_sdpa, row
        calls = row["calls"]
    assert calls


def test_one_gpu_two_copies_and_two_shards_take_the_same_steps(pretended, pictures, tmp_path):
    runs = {"one": (1, ()), "copies": (2, ()), "shards": (2, ("--shard", "true"))}
    more = (*FEW, "--eval_every", 3, "--eval_limit", 4)
    texts = {
        name: pretended(*LAUNCH, *flags(pictures, tmp_path / name, *more, *own), gpus=gpus)
        for name, (gpus, own) in runs.items()
    }
    assert "a step is recorded" in texts["one"] and "as a CUDA graph" not in "".join(texts.values())
    assert "this GPU has 86" in texts["one"]
    expected = metrics(tmp_path / "one")
    for name in runs:
        found = metrics(tmp_path / name)
        assert found[0]["kl"] == 0 and found[1]["kl"] > 0 and not any(row["skipped_updates"] for row in found)
        for key in ("reward", "entropy", "completion_tokens", "grad_norm"):
            assert found[0][key] == pytest.approx(expected[0][key], rel=0.02), (name, key)  # bf16
        assert (tmp_path / name / "eval_000003" / "scores.json").exists()
        assert (tmp_path / name / "model" / "model.safetensors").exists()


def test_adapters_on_shards_go_on_where_they_were_stopped(pretended, pictures, tmp_path):
    out = tmp_path / "run"
    argv = flags(pictures, out, *FEW, "--shard", "true", "--lora_rank", 4, "--micro_batch", 2, "--inner_epochs", 2)
    pretended(*LAUNCH, *argv, "--save_every", 2, gpus=2)
    whole = metrics(out)
    shutil.rmtree(out / "model")
    pretended(*LAUNCH, *argv, "--save_every", 2, "--resume", "true", gpus=2)
    for row in (whole[2], again := metrics(out)[2]):
        for key in [key for key in row if "second" in key]:
            del row[key]
    assert again == whole[2] and (out / "model" / "model.safetensors").exists()


@pytest.mark.parametrize("question", ["--check", "--ask", "--eval_only", "--sft", "--resample"])
def test_what_else_virft_does(question, pretended, pictures, tmp_path):
    value = {"--ask": next((pictures / "val").glob("*")), "--resample": 1}.get(question, "true")
    more = ("--categories", "red circle,blue square") if question == "--ask" else FEW[:-2]
    out = pretended(*flags(pictures, tmp_path / "run", question, value, *more))
    assert "as a CUDA graph" not in out and ("a step is recorded" in out) == (question != "--sft"), out


def test_mia_dpo_builds_pairs_and_trains(pretended, tmp_path):
    shapes.write_single(tmp_path / "data", "train", 16, seed=0)
    model, pairs = ROOT / "demo" / "model_mia_dpo", tmp_path / "pairs.jsonl"
    build = ["mia_dpo.py", "build", "--task", "rows", "--data", tmp_path / "data" / "train.jsonl", "--model", model]
    build += [
        "--out",
        pairs,
        "--max_completion_tokens",
        8,
        "--layouts",
        "sequence2",
        "grid4",
        "--cell",
        56,
        "--batch",
        8,
    ]
    build += ["--limits", "sequence2=0.6", "grid4=0.3", "--layer", 1, "--min_perplexity", 1, "--answers", 4]
    pretended(*build)
    for gpus, own in ((1, ("--lora_rank", 4)), (2, ("--shard", "true"))):
        out = tmp_path / str(gpus)
        pretended(
            *LAUNCH, "mia_dpo.py", "train", "--pairs", pairs, "--model", model, "--out", out, "--epochs", 1,
            "--prompts_per_step", 2, "--micro_batch", 2, "--lr", 1e-4, *own, gpus=gpus,
        )  # fmt: skip
        assert metrics(out)[0]["margin"] == 0 and (out / "model" / "model.safetensors").exists()
