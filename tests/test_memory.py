"""What saves memory changes nothing else; what a GPU's dtypes change, rehearsed on a CPU; and the forecast."""

import copy
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForImageTextToText
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import families
import mia_dpo
import test_processors
import virft
from bench import memory as bench
from conftest import ROOT, first_prompts
from extras import flash, memory
from families import FAMILIES, batch, gradients, prompts
from test_families import FORBIDDEN, TEMPERATURE, G, completions
from test_scale import flat, launch

DISTRIBUTION = {"temperature": TEMPERATURE, "forbidden": FORBIDDEN}


@pytest.mark.parametrize("name", FAMILIES)
def test_the_kl_starts_at_zero_in_a_gpus_dtypes(name):
    """The policy in float32 and its reference as cast_frozen stores it, under bf16 autocast: equal to the last bit."""
    policy, inputs = families.model(name), batch(prompts(name))
    reference, ids, found = copy.deepcopy(policy).requires_grad_(False), completions(prompts(name)), []
    virft.cast_frozen(reference)
    chunks = torch.arange(len(ids)).split(G if virft.cache_is_differentiable(policy) else len(ids))
    with torch.autocast("cpu", torch.bfloat16):

        def loss_of(rows, logp, entropy):
            found.append(logp.detach())
            return logp.sum()

        virft.two_stage_backward(policy, inputs, ids, chunks, loss_of, **DISTRIBUTION)
        expected = virft.chunked_logps(reference, inputs, ids, chunks, **DISTRIBUTION)
    assert torch.equal(torch.cat(found), expected)
    halved = [n for n, p in reference.named_parameters() if p.dtype == torch.bfloat16]
    assert len(halved) > 10 and not any("norm" in n or "embed_tokens" in n for n in halved)


@pytest.mark.parametrize("name", ["qwen3_vl_moe", "glm4v_moe", "aria"])
@pytest.mark.parametrize("loaded", [torch.bfloat16, torch.float32])
def test_experts_stay_as_they_were_loaded(name, loaded):
    model = AutoModelForImageTextToText.from_config(getattr(test_processors, name)()).to(loaded).requires_grad_(False)
    virft.cast_frozen(model)
    experts = {n: p for n, p in model.named_parameters() if ".experts." in n and p.dim() == 3}
    assert len(experts) >= 2 and {p.dtype for p in experts.values()} == {loaded}
    assert all(p.dtype == torch.float32 for n, p in model.named_parameters() if "norm" in n)
    with torch.autocast("cpu", torch.bfloat16):
        assert model(input_ids=torch.arange(1, 9)[None]).logits.isfinite().all()


def test_a_step_in_a_gpus_dtypes_says_its_gaps(make_run, monkeypatch):
    """The metric kl is exactly 0; the sampler's log-probabilities may differ from the scorer's by rounding."""
    monkeypatch.setattr(virft, "AUTOCAST", "cpu")
    run = make_run()
    step, given = next(run.steps())
    metrics = virft.update(run, virft.rollout(run, given, step)).reduce(run.accelerator)
    assert metrics["kl"] == 0 and metrics["sampler_gap"] < 0.1


def test_the_gap_between_sampler_and_scorer_is_the_mean_over_tokens(make_run):
    """Against a loop over rows and tokens; in float32 it is rounding alone."""
    run = make_run()
    step, given = next(run.steps())
    ro = virft.rollout(run, given, step)
    lengths = torch.arange(len(ro.ids))[:, None] % 3 + 2  # padding does not count
    moved = ro._replace(
        logp=ro.logp + torch.linspace(-1, 1, ro.logp.numel()).view_as(ro.logp),
        mask=ro.mask & (torch.arange(ro.ids.shape[1]) < lengths),
    )
    scored = virft.chunked_logps(run.model, run.collate(given), ro.ids, [torch.arange(len(ro.ids))], **run.distribution)
    gaps = [
        abs(float(scored[i, t] - moved.logp[i, t])) for i in range(len(ro.ids)) for t in range(int(moved.mask[i].sum()))
    ]
    metrics = virft.update(run, moved).reduce(run.accelerator)
    assert metrics["sampler_gap"] == pytest.approx(sum(gaps) / len(gaps), rel=1e-4)


@pytest.mark.parametrize("name", ["LLaVA", "Qwen2-VL", "Qwen2.5-VL", "Qwen3-VL", "Gemma3", "Mllama", "Idefics3"])
def test_checkpointed_vision_blocks_change_no_gradient(name):
    """Run every trained block again in the backward pass; recompute nothing without gradients or in a frozen tower."""
    model, inputs, ids = families.model(name), batch(prompts(name)), completions(prompts(name))
    weights, found, calls = torch.randn(ids.shape), [], []
    block = memory.vision_blocks(model)[0]
    memory.first_linear(block).register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))

    def grads():
        model.zero_grad()
        virft.two_stage_backward(
            model,
            inputs,
            ids,
            torch.arange(len(ids)).split(2),
            lambda r, logp, _: (logp * weights[r]).sum(),
            **DISTRIBUTION,
        )
        return gradients(model)

    found.append(grads())
    plain = len(calls)
    frozen = copy.deepcopy(model).requires_grad_(False)
    assert memory.checkpoint_vision(frozen) == 0
    assert memory.checkpoint_vision(model) == len(memory.vision_blocks(model)) > 1
    found.append(grads())
    assert (found[0] - found[1]).norm() / found[0].norm() < 1e-6
    assert len(calls) == 3 * plain, "the block ran again in the backward pass"
    with torch.no_grad():
        virft.prefill(model, inputs)
    assert len(calls) == 4 * plain


# ------------------------------------------------------------------------------------------------
# Several processes in a GPU's dtypes, adapters and 8-bit moments.

KINDS = {  # flags; the largest distance of two processes from one in the gradients of the first update and in weights
    "copies": ([], 1e-2, 5e-4),
    "shards": (["--shard", "true"], 6e-2, 5e-4),
    "adapters": (["--lora_rank", "4", "--lr", "1e-3"], 1e-2, 2e-2),
    "sharded adapters": (["--lora_rank", "4", "--lr", "1e-3", "--shard", "true"], 6e-2, 5e-2),
    "8 bits": (["--adam_bits", "8"], 1e-2, 5e-4),
}


@pytest.mark.parametrize(
    "kind", [kind if kind == "sharded adapters" else pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS]
)
def test_two_processes_equal_one_in_a_gpus_dtypes_and_resume(kind, shapes_dir, tmp_path):
    """As far as bf16 goes: gradients of two updates, weights, the saved model; and the second update after a resume."""
    if kind == "8 bits":
        pytest.importorskip("bitsandbytes")
    flags, close, near = KINDS[kind]
    common = ["--data", shapes_dir, "--model", ROOT / "demo" / "model"]
    single = [flag for flag in flags if flag not in ("--shard", "true")]
    launch("tests/precision_worker.py", 1, tmp_path / "one", *common, "--out", tmp_path / "one", *single)
    launch("tests/precision_worker.py", 2, tmp_path / "two", *common, "--out", tmp_path / "two", *flags)
    one, two = (load_file(tmp_path / name / "tensors.safetensors") for name in ("one", "two"))
    for number in (1, 2):
        pair = [flat(tensors, f"{number}/gradient/") for tensors in (one, two)]
        print(f"{kind}, {number}: gradients {(pair[0] - pair[1]).norm() / pair[0].norm():.1e}")
        assert pair[0].norm() > 0.01 and (pair[0] - pair[1]).norm() / pair[0].norm() < close * number**2
        pair = [flat(tensors, f"{number}/weight/") for tensors in (one, two)]
        print(f"{kind}, {number}: weights {(pair[0] - pair[1]).norm() / pair[0].norm():.1e}")
        assert (pair[0] - pair[1]).norm() / pair[0].norm() < near
    saved = [load_file(tmp_path / name / "model" / "model.safetensors") for name in ("one", "two")]
    assert saved[0].keys() == saved[1].keys()
    assert (flat(saved[0], "") - flat(saved[1], "")).norm() / flat(saved[0], "").norm() < near
    assert not any((tmp_path / name / "adapters").exists() != ("lora" in str(flags)) for name in ("one", "two"))
    launch(
        "tests/precision_worker.py",
        2,
        tmp_path / "again",
        *common,
        "--out",
        tmp_path / "two",
        *flags,
        "--resume",
        "true",
    )
    again = load_file(tmp_path / "again" / "tensors.safetensors")
    assert {name.partition("/")[0] for name in again} == {"2"}
    for name, tensor in again.items():
        torch.testing.assert_close(tensor, two[name], atol=1e-7, rtol=1e-6)


def test_what_adapters_learned_survives_saving(make_run, llava_dir, tmp_path):
    """A bf16 model with LoRA at its default rate: at least 95% of the change of the logits is in OUT/model."""
    base = tmp_path / "bf16"
    model = AutoModelForImageTextToText.from_pretrained(llava_dir, dtype=torch.bfloat16)
    model.save_pretrained(base)
    for file in llava_dir.iterdir():
        if not (base / file.name).exists():
            (base / file.name).write_bytes(file.read_bytes())
    run = make_run(model=base, lora_rank=4, lr=1e-5, steps=6)
    assert virft.parse_config(["--lora_rank", "4"]).lr == 1e-5 and virft.parse_config([]).lr == 1e-6
    for step, given in run.steps():
        ro = virft.rollout(run, given, step)
        virft.update(run, ro._replace(advantages=torch.randn(len(ro.ids))))
    inputs = run.collate(first_prompts(run, 2))

    def logits(model) -> torch.Tensor:
        with torch.no_grad():
            return model(**inputs).logits[inputs["attention_mask"].bool()].float()

    trained = logits(run.model)
    with run.adapters.disable_adapter():
        before = logits(run.model)
    virft.save_model(run)
    saved = AutoModelForImageTextToText.from_pretrained(Path(run.cfg.out) / "model").eval()
    assert saved.dtype == torch.float32
    change, kept = trained - before, logits(saved) - before
    share = float((change * kept).sum() / (change * change).sum())  # of the change, in its own direction
    rounded = logits(saved.to(torch.bfloat16).float()) - before
    in_bf16 = float((change * rounded).sum() / (change * change).sum())
    print(f"share of the change that survives: {share:.4f}; if OUT/model were bf16: {in_bf16:.4f}")
    assert 0.95 < share < 1.05 and (change - kept).norm() < 0.05 * change.norm()
    import peft

    again = AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32).eval()
    again = peft.PeftModel.from_pretrained(again, Path(run.cfg.out) / "adapters")
    assert (logits(again) - trained).norm() < 0.01 * change.norm()


# ------------------------------------------------------------------------------------------------
# The forecast.


def test_the_forecast_names_flags_that_fit(make_run, monkeypatch):
    run, config = make_run(), bench.gpu.qwen2_vl_2b()
    run.prompts.processor.image_processor.merge_size = 2  # as processors have it that --max_pixels limits
    monkeypatch.setattr(memory, "patches_of", lambda pixels, config: 2048)

    def said(has: float, processes: int = 1, **flags) -> str:
        cfg = replace(virft.Config(), **flags)
        return memory.forecast(cfg, config, run.prompts, True, processes, virft.cast_frozen, has)

    assert said(71e9).startswith("memory: needs about ") and "--" not in said(71e9)
    assert "this GPU has 96; --micro_batch 16 takes less time and about 8" in said(96e9)
    assert "--micro_batch 32 takes less time and about 1" in said(150e9)
    assert "--" not in said(150e9, prompts_per_step=1) and "--micro_batch 16" in said(150e9, prompts_per_step=2)
    assert "--" not in said(150e9, micro_batch=32) and "--micro_batch 16" in said(150e9, 8, micro_batch=8)
    assert "this GPU has 48; with --micro_batch 2 --adam_bits 8 about " in said(48e9)
    assert "with --micro_batch 2 --lora_rank 16 about" in said(24e9)
    assert "with --micro_batch 2 --shard true about" in said(30e9, processes=8)
    assert "with --micro_batch 1 --lora_rank 16 --max_pixels 200704 about" in said(11.8e9)
    assert "adam_bits" not in said(20e9, processes=2, shard=True), "the command line would refuse it"
    frugal = said(11.8e9, micro_batch=1, max_pixels=100_000)
    assert frugal.endswith("GB, this GPU has 12") or "micro_batch" not in frugal and "max_pixels" not in frugal
    assert "with --freeze_vision true --beta 0.0 --adam_bits 8 about" in said(25e9, micro_batch=1), "1 stays 1"
    assert "--" not in said(2e9), "nothing fits, nothing is advised"
    del run.prompts.processor.image_processor.merge_size
    assert "max_pixels" not in said(11.8e9)
    assert memory.FLOAT32_BLOCK == virft.FLOAT32_BLOCK
    for config_of_dpo in (mia_dpo.TrainConfig(), mia_dpo.BuildConfig()):
        trains = hasattr(config_of_dpo, "lora_rank")
        line = memory.forecast(config_of_dpo, config, run.prompts, trains, 1, virft.cast_frozen, 30e9)
        assert line.startswith("memory: needs about") and "--beta" not in line


def test_a_run_on_a_gpu_starts_with_its_forecast(make_run, monkeypatch):
    """As far as that goes without one: up to the loading of weights."""

    class Loads(Exception):
        pass

    def load_model(*_):
        raise Loads

    run, said = make_run(), []
    gpu = SimpleNamespace(device=torch.device("cuda"), num_processes=1, is_main_process=True)
    card = SimpleNamespace(total_memory=80e9, name="a card", major=8, minor=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    monkeypatch.setattr(virft, "load_model", load_model)
    monkeypatch.setattr(virft, "say", said.append)
    for trains in (True, False):
        with pytest.raises(Loads):
            virft.build(run.cfg, gpu, run.prompts, {}, trains)
    assert len(said) == 2 and all("GB, this GPU has 80" in line for line in said)
    card.major = 7
    with pytest.raises(Loads):
        virft.build(run.cfg, gpu, run.prompts, {}, True)
    assert said[-1] == "a card has capability 7.0: below 8.0 bf16 is slow and attention takes more"


def test_supervised_training_is_forecast_with_one_answer_to_a_prompt(make_run, monkeypatch):
    run, config = make_run(), bench.gpu.qwen2_vl_2b()
    monkeypatch.setattr(memory, "patches_of", lambda pixels, config: 2048)
    cfg = replace(virft.Config(), sft=True, beta=0.0)
    need = memory.needed(cfg, config, virft.cast_frozen, 622, 2048)["train"]
    one = memory.needed(replace(cfg, sft=False, group_size=1), config, virft.cast_frozen, 622, 2048)["train"]
    assert need == one < 46e9
    line = memory.forecast(cfg, config, run.prompts, True, 1, virft.cast_frozen, 40e9)
    assert "with --adam_bits 8 about" in line and "micro_batch" not in line
    assert "; --micro_batch 4 takes less time" in memory.forecast(
        cfg, config, run.prompts, True, 1, virft.cast_frozen, 96e9
    )


def test_an_evaluation_holds_all_prompts_of_a_batch_on_every_process():
    config = bench.gpu.qwen2_vl_2b()
    needs = [memory.needed(virft.Config(), config, virft.cast_frozen, 622, 2048, False, n) for n in (1, 8)]
    assert needs[0] == needs[1]


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_has_a_forecast(name):
    inputs = prompts(name)[0]
    patches = memory.patches_of(inputs["pixel_values"], FAMILIES[name].config())
    if "image_grid_thw" in inputs:
        assert patches == int(inputs["image_grid_thw"].prod(1).sum())
    assert patches >= 4
    config, settings = FAMILIES[name].config(), replace(virft.Config(), micro_batch=2)
    found = memory.needed(settings, config, virft.cast_frozen, inputs["input_ids"].shape[1], patches)
    assert 1e6 < found["sample"] < 1e9 and 1e6 < found["train"] < 1e9


def test_flash_attention_is_left_to_families_whose_masks_it_can_express(monkeypatch):
    monkeypatch.setattr(flash, "usable", lambda device: True)
    for name in ("Gemma3", "PaliGemma", "LFM2-VL"):
        model = families.model(name)
        flash.use(model, torch.device("cpu"))
        assert model.config._attn_implementation == "sdpa"
    config, chosen = test_processors.gemma4(), []
    for both_ways in ("vision", None):
        config.text_config.use_bidirectional_attention = both_ways
        model = AutoModelForImageTextToText.from_config(config)
        monkeypatch.setattr(model, "set_attn_implementation", chosen.append)
        flash.use(model, torch.device("cpu"))
        assert chosen == ([] if both_ways else [flash.NAME])


def test_layers_with_heads_of_two_sizes_have_a_forecast():
    """Gemma 4: two layers with heads of 16 numbers, two with heads of 32."""
    sizes = [
        memory.needed(
            replace(virft.Config(), max_completion_tokens=C), test_processors.gemma4(), virft.cast_frozen, 30, 9
        )
        for C in (500, 600)
    ]
    rows = virft.Config().group_size * virft.Config().prompts_per_step
    kv = families.TEXT["num_key_value_heads"] * (2 * 16 + 2 * 32)
    assert sizes[1]["sample"] - sizes[0]["sample"] == 1.5 * rows * 100 * 4 * kv


def test_frozen_weights_of_a_float32_model_are_saved_as_they_came(shapes_dir, tmp_path, monkeypatch):
    """On a GPU they are stored in bf16 while the rest is trained."""
    monkeypatch.setattr(virft, "AUTOCAST", "cpu")
    flags = {
        "task": "coco", "data": shapes_dir, "model": ROOT / "demo" / "model", "out": tmp_path / "run", "steps": 1,
        "workers": 0, "prompts_per_step": 2, "sft": "true", "lr": 1e-3, "freeze_vision": "true",
    }  # fmt: skip
    virft.main([part for name, value in flags.items() for part in (f"--{name}", str(value))])
    before, after = (load_file(f / "model.safetensors") for f in (ROOT / "demo" / "model", tmp_path / "run" / "model"))
    tower = [name for name in before if "vision" in name]
    assert len(tower) > 10 and all(torch.equal(before[name], after[name]) for name in tower)
    assert any((before[name] != after[name]).any() for name in before.keys() - tower)


def test_a_gpu_that_can_uses_flash_attention_and_samples_with_sdpa(make_run, monkeypatch):
    """With a stand-in of flash-attn's interface (a 2D mask): the same log-probabilities, the same tokens."""
    seen = []

    def stand_in(module, query, key, value, attention_mask, scaling=None, **kwargs):
        seen.append(None if attention_mask is None else attention_mask.dim())
        n, keys = query.shape[2], key.shape[2]
        mask = torch.ones(n, keys, dtype=torch.bool).tril(keys - n) if module.is_causal else torch.ones(n, keys) > 0
        if attention_mask is not None:
            mask = mask & attention_mask.bool()[:, None, None, -keys:]
        mask = mask | ~mask.any(-1, keepdim=True)  # padding attends to something
        groups = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
        out = nn.functional.scaled_dot_product_attention(query, key, value, mask, scale=scaling)
        return out.transpose(1, 2).contiguous(), None

    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register("mask_in_two_dimensions", stand_in)
    ALL_MASK_ATTENTION_FUNCTIONS.register("mask_in_two_dimensions", ALL_MASK_ATTENTION_FUNCTIONS["flash_attention_2"])
    monkeypatch.setattr(flash, "NAME", "mask_in_two_dimensions")
    results = []
    for usable in (False, True):
        monkeypatch.setattr(flash, "usable", lambda device, usable=usable: usable)
        run = make_run()
        step, given = next(run.steps())
        seen.clear()
        ro = virft.rollout(run, given, step)
        ro = ro._replace(advantages=torch.linspace(-1, 1, len(ro.ids)))
        assert not seen, "sampling uses SDPA"
        metrics = virft.update(run, ro).reduce(run.accelerator)
        results.append((ro.ids, metrics["grad_norm"], metrics["kl"]))
        assert bool(seen) == usable and 4 not in seen
    assert torch.equal(results[0][0], results[1][0])
    assert results[1][1] == pytest.approx(results[0][1], rel=1e-4) and results[1][2] == pytest.approx(0, abs=1e-9)


@pytest.mark.slow
def test_the_forecast_is_what_the_allocator_holds():
    """Eight rows of docs/gpus.md within 10%, on a small Qwen2-VL in a GPU's dtypes on a CPU."""
    import re
    import subprocess

    done = subprocess.run(
        [sys.executable, "bench/memory.py", "--measure"], cwd=ROOT, capture_output=True, text=True, timeout=2400
    )
    assert done.returncode == 0, done.stderr
    ratios = [float(number) for number in re.findall(r"\| ([0-9]\.[0-9]{2})", done.stdout)]
    assert len(ratios) >= 14 and all(0.9 < ratio < 1.1 for ratio in ratios), done.stdout


def test_8_bit_moments_are_refused_with_shards(tmp_path):
    with pytest.raises(SystemExit, match="--adam_bits 8: must be 32 with --shard"):
        virft.connect(virft.parse_config(["--adam_bits", "8", "--shard", "true", "--out", str(tmp_path / "run")]))
