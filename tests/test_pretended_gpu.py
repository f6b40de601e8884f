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
from safetensors.torch import load_file
from torch.utils import cpp_extension

from conftest import ROOT
from demo import shapes
from families import FAMILIES

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not shutil.which("g++"), reason="there is no g++ to build the pretended GPU"),
    pytest.mark.skipif(
        bool(torch.version.cuda or torch.version.hip), reason="this build of torch has a GPU of its own"
    ),
]
FOLDER = Path(__file__).resolve().parent / "pretended_gpu"
LAUNCH = ("-m", "accelerate.commands.launch", "--quiet", "--main_process_port", "0")  # a process for each GPU
FEW = ("--prompts_per_step", 4, "--group_size", 4, "--max_completion_tokens", 24, "--steps", 3, "--lr", 1e-4)


@pytest.fixture(scope="module")
def pretended(tmp_path_factory):
    """A function that runs Python on pretended GPUs and returns what was printed."""
    library, torch_libraries = tmp_path_factory.mktemp("device") / "device.so", Path(torch.__file__).parent / "lib"
    build = ["g++", "-std=c++20", "-O1", "-w", "-shared", "-fPIC"]
    build += [f"-I{path}" for path in cpp_extension.include_paths()]
    build += [FOLDER / "device.cpp", f"-L{torch_libraries}", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{torch_libraries}"]
    subprocess.run([*build, "-o", library], check=True)

    def python(*argv, gpus: int = 1, packages: tuple[Path, ...] = ()) -> str:
        launched = (
            "ACCELERATE_",
            "LOCAL_",
            "MASTER_",
            "RANK",
            "WORLD_SIZE",
        )  # set if pytest itself is launched so
        environment = {name: value for name, value in os.environ.items() if not name.startswith(launched)}
        folders = os.pathsep.join(map(str, (FOLDER, *packages, *filter(None, [os.environ.get("PYTHONPATH")]))))
        environment |= {
            "PRETENDED_GPU": str(library), "PRETENDED_GPUS": str(gpus), "PYTHONPATH": folders,
            "HF_HUB_OFFLINE": "1", "HF_HOME": str(library.parent), "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        command = [sys.executable, *map(str, argv)]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
        printed = done.stdout + done.stderr
        assert done.returncode == 0 and "Error in sitecustomize" not in printed, printed
        return printed

    return python


def flags(shapes_dir: Path, out: Path, *more) -> list:
    model = ROOT / "demo" / "model"
    return ["virft.py", "--task", "coco", "--data", shapes_dir, "--model", model, "--out", out, "--workers", 1, *more]


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
before = t.tolist()
torch.distributed.all_reduce(t)
torch.distributed.all_gather_object([None], "text")
assert t.tolist() == before and t.is_cuda
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
    assert out.count("a step is recorded") >= 2 * len(FAMILIES)
    for row in found:
        assert row["same tokens"] and row["recorded"] == [True, True] and row["logp"] < 1e-4, row
        assert row["gradient"] < 1e-4 and row["bf16"] < 0.3 and row["checkpointed"] < 1e-6, row


def test_flash_attn_learns_as_sdpa(pretended, tmp_path):
    """pretended_gpu/packages/flash_attn.py takes the package's place; transformers also asks for its version."""
    information = tmp_path / "flash_attn-2.8.3.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: flash-attn\nVersion: 2.8.3\n")
    (information / "top_level.txt").write_text("flash_attn\n")
    out = pretended(FOLDER / "families_worker.py", "flash", packages=(FOLDER / "packages", tmp_path))
    calls, found = 0, [json.loads(line) for line in out.splitlines() if line.startswith("{")]
    assert [row["name"] for row in found] == list(FAMILIES)
    for row in found:
        assert row["gradient"] < 1e-5 and row["bf16"] < 0.3, row
        by_sdpa = row["name"] in ("Gemma3", "PaliGemma", "Mllama", "LFM2-VL")  # masks or towers that it does not know
        assert (row["calls"] > calls) != by_sdpa, row
        calls = row["calls"]
    assert calls


def change(out: Path) -> torch.Tensor:
    before, after = (load_file(folder / "model.safetensors") for folder in (ROOT / "demo" / "model", out / "model"))
    return torch.cat([(after[name] - before[name]).flatten() for name in before])


def test_one_gpu_two_copies_and_two_shards_take_the_same_steps(pretended, shapes_dir, tmp_path):
    runs = {"one": (1, ()), "copies": (2, ()), "shards": (2, ("--shard", "true"))}
    more = (*FEW, "--eval_every", 3, "--eval_limit", 4)
    texts = {
        name: pretended(*LAUNCH, *flags(shapes_dir, tmp_path / name, *more, *own), gpus=gpus)
        for name, (gpus, own) in runs.items()
    }
    recorded = [name for name, text in texts.items() if "a step is recorded" in text]
    assert recorded == ["one", "copies"] and "as a CUDA graph" not in "".join(texts.values())
    expected = metrics(tmp_path / "one")
    for name in runs:
        found, processes = metrics(tmp_path / name), "1 processes x 4" if name == "one" else "2 processes x 2"
        assert processes in texts[name] and "this GPU has 86" in texts[name]  # 80 GiB
        assert found[0]["kl"] == 0 and found[1]["kl"] > 0 and not any(row["skipped_updates"] for row in found)
        for key in ("reward", "entropy", "completion_tokens", "grad_norm"):
            assert found[0][key] == pytest.approx(expected[0][key], rel=0.2), (name, key)  # bf16 may change a token
        changes = change(tmp_path / name), change(tmp_path / "one")
        # AdamW's first steps have one size for every weight: rounding decides the sign of those with hardly a gradient.
        assert torch.cosine_similarity(*changes, dim=0) > 0.6
        assert (tmp_path / name / "eval_000003" / "scores.json").exists()


def test_adapters_on_shards_go_on_where_they_were_stopped(pretended, shapes_dir, tmp_path):
    out = tmp_path / "run"
    argv = flags(shapes_dir, out, *FEW, "--shard", "true", "--lora_rank", 4, "--micro_batch", 2, "--inner_epochs", 2)
    pretended(*LAUNCH, *argv, "--save_every", 2, gpus=2)
    whole = metrics(out)
    shutil.rmtree(out / "model")
    pretended(*LAUNCH, *argv, "--save_every", 2, "--resume", "true", gpus=2)
    again = metrics(out)[2]
    assert again["seconds/train"] != whole[2]["seconds/train"], "the step was taken again"
    for row in (whole[2], again):
        for key in [key for key in row if "second" in key]:
            del row[key]
    assert again == whole[2] and (out / "model" / "model.safetensors").exists()


@pytest.mark.parametrize("question", ["--check", "--ask", "--eval_only", "--sft", "--resample"])
def test_what_else_virft_does(question, pretended, shapes_dir, tmp_path):
    value = {"--ask": next((shapes_dir / "val").glob("*")), "--resample": 1}.get(question, "true")
    more = ("--categories", "red circle,blue square") if question == "--ask" else FEW
    out = pretended(*flags(shapes_dir, tmp_path / "run", question, value, *more))
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
    assert "a step is recorded" in pretended(*build) and pairs.read_text().count("\n") >= 2
    for gpus, own in ((1, ("--lora_rank", 4)), (2, ("--shard", "true"))):
        out = tmp_path / str(gpus)
        pretended(
            *LAUNCH, "mia_dpo.py", "train", "--pairs", pairs, "--model", model, "--out", out, "--steps", 2,
            "--prompts_per_step", 2, "--micro_batch", 2, "--lr", 1e-4, *own, gpus=gpus,
        )  # fmt: skip
        first, second = metrics(out)
        assert first["margin"] == 0 != second["margin"] and (out / "model" / "model.safetensors").exists()
