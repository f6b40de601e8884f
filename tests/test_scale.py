"""Several processes, adapters, freezing and chunks: each must compute what one plain process computes."""

import json
import os
import subprocess
import sys
from itertools import accumulate
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

import families
import virft
from extras.memory import TEXT_F, TEXT_H, VISION_D
from conftest import ROOT, first_prompts
from demo import warm_start
from extras.adapters import language_model
from test_algorithm import capture_gradients, spread_rewards, step

LOSSES = tuple(virft.NORMALIZATIONS)


def launch(script: str, processes: int, *argv, timeout: int = 280) -> subprocess.CompletedProcess:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    done = subprocess.run(
        [sys.executable, *launcher, script, *map(str, argv)], cwd=ROOT, capture_output=True, text=True, timeout=timeout,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def steps(shapes_dir, tmp_path_factory):
    """{"one", "copies", "shards"}: tensors and facts of steps_worker.py, on the demo's model, whose rewards vary."""
    found = {}
    for name, processes, flags in (("one", 1, []), ("copies", 2, []), ("shards", 2, ["--shard", "true"])):
        out = tmp_path_factory.mktemp(name)
        argv = ["--data", shapes_dir, "--model", ROOT / "demo" / "model", "--out", out / "run", *flags]
        launch("tests/steps_worker.py", processes, out, *argv)
        found[name] = load_file(out / "tensors.safetensors"), json.loads((out / "facts.json").read_text())
    return found


def flat(tensors: dict, beginning: str) -> torch.Tensor:
    return torch.cat([t.flatten() for name, t in sorted(tensors.items()) if name.startswith(beginning)])


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("engine", ["copies", "shards"])
def test_two_processes_sample_and_learn_as_one(steps, engine, loss):
    """[7, 17, 29] The same completions, gradients and weights, in the first step and in the second."""
    (one, facts_one), (two, facts_two) = steps["one"], steps[engine]
    assert facts_one[loss] == facts_two[loss] and len({r["completion"] for r in facts_one[loss]}) > 20
    for number in (1, 2):
        gradients = [flat(tensors, f"{loss}/{number}/gradient/") for tensors in (one, two)]
        assert gradients[0].norm() > 0.01
        assert (gradients[0] - gradients[1]).norm() / gradients[0].norm() < 1e-5
        weights = [flat(tensors, f"{loss}/{number}/weight/") for tensors in (one, two)]
        assert (weights[0] - weights[1]).norm() / weights[0].norm() < 1e-6
    before, after = (flat(one, f"{loss}/{number}/weight/") for number in (1, 2))
    assert (before - after).norm() > 1e-4, "the second step changes nothing"


@pytest.mark.parametrize("engine", ["copies", "shards"])
def test_two_processes_resample_and_normalize_as_one(steps, engine):
    """The same groups are thrown away, the same fresh prompts take their place, advantages are over all processes."""
    (_, one), (_, two) = steps["one"], steps[engine]
    assert one["resampled"] == two["resampled"] and one["thrown away"] == two["thrown away"] > 0


@pytest.mark.parametrize("engine", ["copies", "shards"])
def test_what_one_process_meets_alone_neither_hangs_nor_splits_the_others(steps, engine):
    """[17, 18] A group without variance, all truncated, only empty completions, a gradient that is not finite."""
    facts = steps[engine][1]
    assert facts["skipped"].pop("not finite") == 1.0
    assert len(facts["skipped"]) == 7 and not any(facts["skipped"].values())
    assert facts["finite"] and len(set(facts.get("copies", [0]))) == 1


def test_shards_are_gathered_once_per_rollout(steps):
    """Not at every token: as many gathers as there are sharded parts, all of them before the first token."""
    facts = steps["shards"][1]
    assert facts["units"] == facts["gathers in a rollout"] == 7  # 2 vision blocks, 4 text blocks, the rest
    assert steps["one"][1]["units"] == 0


def test_adapters_alone_change_and_the_merged_model_answers_as_the_adapted_one(make_run, tmp_path):
    run = make_run(lora_rank=2, beta=0.1, lr=1e-2)
    spread_rewards(run)
    before = {name: p.detach().clone() for name, p in run.model.named_parameters()}
    language = {name for name, _ in language_model(run.model).named_parameters(prefix="model.language_model")}
    _, metrics = step(run, 1)
    assert metrics.reduce(run.accelerator)["kl"] == pytest.approx(0, abs=1e-9)  # adapters start as no change
    _, metrics = step(run, 2)
    assert metrics.reduce(run.accelerator)["kl"] > 1e-6
    changed = {name for name, p in run.model.named_parameters() if not torch.equal(p, before[name])}
    adapters = {name for name in before if "lora_" in name}
    assert changed == adapters and adapters < language and len(adapters) == 2 * 4 * 7
    inputs, ids = run.collate(first_prompts(run, 2)), torch.randint(300, 900, (4, 6))
    rows, batch = [torch.arange(4)], virft.MicroBatch([], inputs, ids, torch.ones_like(ids))
    adapted = virft.chunked_logps(run.model, inputs, ids, rows, **run.distribution)
    initial = run.reference_logps(batch)
    again = virft.chunked_logps(run.model, inputs, ids, rows, **run.distribution)
    assert torch.equal(adapted, again) and (adapted - initial).abs().max() > 1e-3
    for model, logps in ((Path(run.cfg.out) / "model", adapted), (run.cfg.model, initial)):
        if model == Path(run.cfg.out) / "model":
            virft.save_model(run)
        loaded = AutoModelForImageTextToText.from_pretrained(model).eval()
        found = virft.chunked_logps(loaded, inputs, ids, rows, **run.distribution)
        torch.testing.assert_close(found, logps, atol=2e-5, rtol=0)


def test_freezing_the_vision_part_trains_the_language_model_alone(make_run):
    run = make_run(freeze_vision="true")
    spread_rewards(run)
    before = {name: p.detach().clone() for name, p in run.model.named_parameters()}
    step(run)
    changed = {name for name, p in run.model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {name for name in before if "language_model" in name or "lm_head" in name}


@pytest.mark.parametrize("micro_batch", [1, 3, 8, 100])
def test_chunks_of_completions_change_no_gradient(make_run, micro_batch, monkeypatch):
    taken = []
    for size in (0, micro_batch):
        run = make_run(micro_batch=size, max_completion_tokens=24)
        run.eos = torch.cat([run.eos, torch.arange(40, 80)])  # unequal lengths
        spread_rewards(run)
        taken.append(capture_gradients(run, monkeypatch))
        _, metrics = step(run, 1)
        assert metrics.reduce(run.accelerator)["kl"] == pytest.approx(0, abs=1e-9)
    assert (taken[1][0] - taken[0][0]).norm() / taken[0][0].norm() < 1e-5


def peak_bytes(work) -> int:
    """The most bytes that tensors held at once while `work` ran, over what they held before: counted, not sampled."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    changes = [event.nbytes() for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(accumulate(changes))


def test_peak_memory_falls_with_the_chunk():
    """32 completions of 400 tokens: all at once against 4 at a time."""
    processor = warm_start.make_processor()
    model = warm_start.make_model(processor, seed=0).eval()
    prompt = torch.tensor([[processor.image_token_id] * warm_start.IMAGE_TOKENS + list(range(100, 140))])
    pixels = torch.randn(1, 3, warm_start.SIZE, warm_start.SIZE)
    inputs = {"input_ids": prompt, "attention_mask": torch.ones_like(prompt), "pixel_values": pixels}
    ids = torch.randint(5, 300, (32, 400))

    def train(micro_batch):
        chunks, nothing = torch.arange(32).split(micro_batch), torch.tensor([], dtype=torch.long)
        sampling = {"temperature": 1.0, "forbidden": nothing}
        virft.two_stage_backward(model, inputs, ids, chunks, lambda rows, logp, _: logp.mean(), **sampling)

    train(32)  # the gradients stay
    at_once, in_chunks = peak_bytes(lambda: train(32)), peak_bytes(lambda: train(4))
    print(f"peak: {at_once / 2**20:.0f} MB at once, {in_chunks / 2**20:.0f} MB in chunks of 4")
    assert in_chunks < 0.25 * at_once  # an eighth, and what the prompt takes


def kept_bytes(model, inputs: dict, ids: torch.Tensor) -> int:
    """Bytes that autograd keeps of one scoring pass under bf16 autocast, beside the parameters."""
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autocast("cpu", torch.bfloat16), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logps, _ = families.scored(model, inputs, ids)
    for p in model.parameters():
        kept.pop(p.untyped_storage().data_ptr(), None)
    assert logps.requires_grad
    return sum(kept.values())


@pytest.mark.parametrize("what", ["text", "vision"])
def test_the_memory_formula_counts_what_autograd_keeps(what):
    """bench/memory.py: growth with tokens, per layer and block, within 5% of the count."""
    growth = []
    for depth in (1, 3):
        config = families.FAMILIES["Qwen2-VL"].config()
        config.vision_config.mlp_ratio = 4  # as in the released models
        part = config.text_config if what == "text" else config.vision_config
        part.num_hidden_layers = part.depth = depth
        config.text_config.layer_types = ["full_attention"] * config.text_config.num_hidden_layers
        model, sizes = AutoModelForImageTextToText.from_config(config).eval(), []
        for scale in (1, 3):
            image, rows, C = ((8, 8), 4, 16 * scale) if what == "text" else ((8, 8 * scale), 1, 2)
            ids = torch.randint(0, families.WORDS, (rows, C))
            sizes.append(kept_bytes(model, families.prompt("Qwen2-VL", [image], 8, 1), ids))
        growth.append((sizes[1] - sizes[0]) / (4 * 32 if what == "text" else 8 * 16))  # bytes of a token, of a patch
    text, vision = model.config.text_config, model.config.vision_config
    formula = (
        TEXT_H * text.hidden_size + TEXT_F * text.intermediate_size if what == "text" else VISION_D * vision.embed_dim
    )
    assert (growth[1] - growth[0]) / 2 == pytest.approx(formula, rel=0.05)


@pytest.mark.parametrize("shard", [False, True])
def test_the_configuration_launches(shapes_dir, tmp_path, shard):
    """configs/gpus.yaml as the README has it, with two processes: on CPUs where there is no GPU."""
    accelerate = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]
    flags = dict(
        task="coco", data=shapes_dir, model=ROOT / "demo" / "model", out=tmp_path / "run", steps=2, workers=0,
        shard=shard, prompts_per_step=4, group_size=4, max_completion_tokens=24, lr=1e-3,
    )  # fmt: skip
    argv = [str(part) for name, value in flags.items() for part in (f"--{name}", value)]
    done = subprocess.run(
        [*accelerate, "--config_file", "configs/gpus.yaml", "--num_processes", "2", "virft.py", *argv], cwd=ROOT,
        capture_output=True, text=True, timeout=280, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 2 and "2 processes x 2" in done.stdout
    weights = [
        load_file(folder / "model.safetensors") for folder in (ROOT / "demo" / "model", tmp_path / "run" / "model")
    ]
    assert any((weights[1][name] != tensor).any() for name, tensor in weights[0].items())


def test_more_processes_than_gpus_are_refused(monkeypatch):
    """NCCL would name a duplicate GPU, after the model has been loaded twice on it."""
    accelerator = SimpleNamespace(num_processes=8, device=torch.device("cuda"))
    monkeypatch.setattr(virft, "Accelerator", lambda **_: accelerator)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    monkeypatch.setenv("WORLD_SIZE", "8")
    with pytest.raises(SystemExit, match=r"8 processes were launched .* has 4 GPU\(s\)"):
        virft.connect(virft.Config())


def test_workers_are_forked_after_gloos_threads_have_settled(make_run, monkeypatch):
    """A worker that is forked while a thread of gloo enters Python never starts, and the run waits for it."""
    events, run, fork = [], make_run(workers=1), os.fork
    monkeypatch.setattr(run, "accelerator", SimpleNamespace(num_processes=2))
    monkeypatch.setattr(virft.time, "sleep", lambda seconds: events.append(seconds) if seconds == 0.5 else None)
    monkeypatch.setattr(os, "fork", lambda: events.append("fork") or fork())
    assert [len(prompts) for prompts in run.loader(run.prompts, [[(0, 0)]])] == [1]
    assert events == [0.5, "fork"]


def test_cudnn_attention_is_off():
    """PyTorch issue 196678: gradients of NaN under a mask."""
    torch.backends.cuda.enable_cudnn_sdp(True)
    virft.connect(virft.Config())
    assert not torch.backends.cuda.cudnn_sdp_enabled() and torch.backends.cuda.mem_efficient_sdp_enabled()


LEAVES = """
import atexit, os, time
from pathlib import Path
import virft
folder, replaced = Path(os.environ["OUT"]), virft.replace_folder
def slowly(*args):
    time.sleep(2)
    replaced(*args)
virft.replace_folder = slowly
atexit.register(lambda: (folder / f"left_{os.environ['RANK']}").write_text(str((folder / "model").exists())))
virft.main()
"""


def test_no_process_leaves_while_another_saves(shapes_dir, tmp_path, monkeypatch):
    """One that ends while gloo's threads hold its tensors may abort; the launcher then kills the one that saves.

    atexit counts as leaving: Python's shutdown begins there.
    """
    out = tmp_path / "run"
    (tmp_path / "leaves.py").write_text(LEAVES)
    monkeypatch.setenv("OUT", str(out))
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    argv = ["--task", "coco", "--data", shapes_dir, "--model", ROOT / "demo" / "model", "--out", out, "--steps", "1"]
    argv += ["--workers", "0", "--prompts_per_step", "2", "--group_size", "2", "--max_completion_tokens", "8"]
    launch(tmp_path / "leaves.py", 2, *argv, "--shard", "true")
    assert [(out / f"left_{rank}").read_text() for rank in (0, 1)] == ["True", "True"]
