"""The algorithm against independent oracles; numbers in brackets are those of "Ways to be wrong" in the README."""

import ast
import dataclasses
import gc
import inspect
import math
import weakref

import pytest
import torch

import data
import families
import models
import virft
from bench.flops import phases
from conftest import first_prompts
from data import Prompt
from families import alone, batch, gradients, prompts

NONE = torch.tensor([], dtype=torch.long)


@pytest.mark.parametrize("name", ["LLaVA", "Qwen2-VL"])
def test_sampling_frequencies_are_the_scored_probabilities(name):
    """[2] 6,000 samples of two tokens against exp(completion log-probabilities), with temperature and forbidden ids."""
    model, inputs, B, G, temperature = families.model(name), batch(prompts(name)), 2, 3000, 2.0
    vocabulary = model.config.get_text_config().vocab_size
    forbidden = torch.tensor([3, *range(12, vocabulary)])  # eleven tokens are left, so that pairs of them are frequent
    with torch.no_grad():
        noise = virft.sampling_noise([str(i) for i in range(B)], G, 2)
        ids = virft.sample(model, inputs, G, noise, 2, torch.tensor([95]), temperature, forbidden)
        logp = virft.CompletionLogps(model)(inputs, ids, G, temperature, forbidden)[0]
    for rows, scored in zip(ids.view(B, G, -1), logp.view(B, G, -1)):
        for length in (1, 2):
            pairs, index, counts = rows[:, :length].unique(dim=0, return_inverse=True, return_counts=True)
            p = torch.zeros(len(pairs)).scatter(0, index, scored[:, :length].sum(1).exp())
            common = counts >= 20
            error = (counts / G - p)[common].abs() / (p * (1 - p) / G).sqrt()[common]
            assert common.sum() >= 5 and error.max() < 4.5, "sampled tokens do not follow the scored distribution"
        assert not torch.isin(rows, forbidden).any()


def test_greedy_takes_the_most_probable_token_and_rows_end_at_eos():
    model, inputs = families.model("LLaVA"), prompts("LLaVA")[0]
    with torch.no_grad():
        ids = virft.sample(model, inputs, 2, None, 5, torch.tensor([-1]), 1.0, NONE)
        sequence = inputs["input_ids"]
        for t in range(5):
            token = (
                model(**(inputs | {"input_ids": sequence, "attention_mask": torch.ones_like(sequence)}))
                .logits[0, -1]
                .argmax()
            )
            assert ids[0, t] == ids[1, t] == token
            sequence = torch.cat([sequence, token.view(1, 1)], 1)
        stopped = virft.sample(model, inputs, 2, None, 5, ids[0, 1:2], 1.0, NONE)
    assert stopped.shape[1] == int((ids[0] == ids[0, 1]).nonzero()[0]) + 1


def test_sampling_does_not_depend_on_the_batch():
    """The noise is keyed by prompt and completion: alone or padded with others, the same tokens."""
    model, inputs, never = families.model("Qwen2-VL"), prompts("Qwen2-VL"), torch.tensor([-1])
    with torch.no_grad():
        together = virft.sample(model, batch(inputs), 3, virft.sampling_noise(["a", "b"], 3, 6), 6, never, 1.0, NONE)
        one = virft.sample(model, inputs[1], 3, virft.sampling_noise(["b"], 3, 6), 6, never, 1.0, NONE)
    assert torch.equal(together[3:], one)
    assert len({tuple(row.tolist()) for row in together}) == 6, "every completion has noise of its own"


def test_log_probabilities_after_sampling_are_fresh():
    """[9] Multi-axis position offsets that a sampler leaves behind must not reach the next forward."""
    model, inputs, ids = families.model("Qwen2-VL"), prompts("Qwen2-VL"), torch.arange(12).view(2, 6)
    score = virft.CompletionLogps(model)
    with torch.no_grad():
        fresh = score(batch(inputs), ids, 1, 1.0, NONE)[0]
        virft.sample(model, inputs[0], 2, None, 5, torch.tensor([-1]), 1.0, NONE)
        assert torch.equal(score(batch(inputs), ids, 1, 1.0, NONE)[0], fresh)


def test_kl_estimate_is_the_exact_kl():
    """[3] Over an enumerated distribution the mean of k3 under pi is KL(pi || ref), not KL(ref || pi)."""
    torch.manual_seed(0)
    logp, logp_ref = (torch.randn(5).log_softmax(0).requires_grad_() for _ in range(2))
    k3 = virft.kl_to_reference(logp, logp_ref)
    exact, reverse = (logp.exp() * (logp - logp_ref)).sum(), (logp_ref.exp() * (logp_ref - logp)).sum()
    assert (logp.exp() * k3).sum().item() == pytest.approx(exact.item(), rel=1e-5)
    assert exact.item() != pytest.approx(reverse.item(), rel=1e-2)
    assert (k3 >= 0).all() and k3.requires_grad
    assert (virft.kl_to_reference(logp, logp.detach()) == 0).all()
    assert virft.kl_to_reference(torch.tensor(-1.0), torch.tensor(-1.001)).item() == pytest.approx(5e-7, rel=1e-2)


CLIP = [  # rho, A, objective, does the gradient flow?
    (0.5, 1.0, 0.5, True),  # became unlikely though good: pull it back
    (1.0, 1.0, 1.0, True),
    (1.1, 1.0, 1.1, True),
    (1.5, 1.0, 1.3, False),  # likely enough: clipped at 1 + eps_high
    (0.5, -1.0, -0.8, False),  # unlikely enough: clipped at 1 - eps_low
    (0.9, -1.0, -0.9, True),
    (1.0, -1.0, -1.0, True),
    (1.5, -1.0, -1.5, True),  # became likely though bad: push it down, unclipped
]


@pytest.mark.parametrize("rho, A, objective, flows", CLIP)
def test_clip(rho, A, objective, flows):
    """[4] For both signs of the advantage; eps_low 0.2 and eps_high 0.3."""
    logp = torch.tensor([[math.log(rho)]], requires_grad=True)
    loss, _, clipped = virft.grpo_loss(
        logp, torch.zeros(1, 1), None, torch.tensor([A]), torch.ones(1, 1), 0.2, 0.3, 0.0
    )
    loss.backward()
    assert loss.item() == pytest.approx(-objective, rel=1e-5)
    assert (logp.grad.item() != 0) == flows == (not clipped.item())


EOS_A, EOS_B = 7, 9
MASKS = [  # ids, mask
    ([1, 7, 2, 3], [1, 1, 0, 0]),  # EOS in the middle is trained, what follows is not
    ([1, 2, 3, 4], [1, 1, 1, 1]),  # none: truncated
    ([7, 1, 2, 3], [1, 0, 0, 0]),  # first: an empty completion still trains its EOS
    ([1, 9, 7, 2], [1, 1, 0, 0]),  # the first of two kinds
    ([1, 7, 7, 7], [1, 1, 0, 0]),  # pad == eos: by position, not by value
    ([1, 2, 3, 7], [1, 1, 1, 1]),
]


@pytest.mark.parametrize("ids, mask", MASKS)
def test_completion_mask(ids, mask):
    """[6]"""
    assert virft.completion_mask(torch.tensor([ids]), torch.tensor([EOS_A, EOS_B])).int().tolist() == [mask]


def test_group_advantages():
    """[21] Against statistics by hand; a group without variance gets zeros."""
    rewards = torch.tensor([[0.0, 1.0, 1.0, 2.0], [0.5, 0.5, 0.5, 0.5]])
    std = math.sqrt((1 + 0 + 0 + 1) / 3)
    expected = torch.tensor([[-1.0, 0.0, 0.0, 1.0]]) / (std + 1e-4)
    assert (
        torch.allclose(virft.group_advantages(rewards)[:1], expected)
        and (virft.group_advantages(rewards)[1] == 0).all()
    )
    assert torch.equal(virft.group_advantages(rewards, scale=False)[0], torch.tensor([-1.0, 0.0, 0.0, 1.0]))
    with pytest.raises(SystemExit, match="--group_size 1: must be at least 2"):
        virft.parse_config(["--group_size", "1"])


@pytest.mark.parametrize("loss", ["grpo", "dr_grpo", "dapo"])
def test_token_weights(loss):
    """Against loops: mean of means, sum over the limit, mean over all tokens; a masked completion leaves both sides."""
    lengths, limit = [1, 4, 0, 3], 5
    mask = torch.arange(limit) < torch.tensor(lengths)[:, None]
    values = torch.randn(4, limit)
    weights, divisor = virft.token_weights(mask, loss, limit)
    kept = [values[i, :n].tolist() for i, n in enumerate(lengths) if n]
    expected = {
        "grpo": sum(sum(v) / len(v) for v in kept) / len(kept),
        "dr_grpo": sum(sum(v) / limit for v in kept) / len(kept),
        "dapo": sum(sum(v) for v in kept) / sum(lengths),
    }[loss]
    assert ((weights * values).sum() / divisor).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("wild", [1e4, -1e4, math.inf])
def test_padding_changes_nothing(wild):
    """[8] Extreme values on masked tokens reach neither the loss nor the gradient."""
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]]).bool()
    weights, divisor = virft.token_weights(mask, "grpo", 3)
    results = []
    for fill in (0.0, wild):
        logp, old, ref = (
            torch.randn(2, 3, generator=torch.Generator().manual_seed(i)).masked_fill(~mask, fill * (-1) ** i)
            for i in range(3)
        )
        logp.requires_grad_()
        loss, kl, _ = virft.grpo_loss(logp, old, ref, torch.tensor([1.0, -1.0]), weights, 0.2, 0.2, 0.04)
        (loss / divisor).backward()
        results.append((loss.item(), logp.grad, kl[mask]))
    assert (
        results[0][0] == results[1][0]
        and torch.equal(results[0][1], results[1][1])
        and torch.equal(results[0][2], results[1][2])
    )


def test_log_probabilities_are_float32_over_bf16_logits():
    """[13] And in rows small enough that no float32 tensor of all logits exists."""
    logits = torch.randn(6, 4, 1000).bfloat16()
    ids = torch.randint(0, 1000, (6, 4))
    logp, entropy = virft.token_logps(logits, ids, 1.0, NONE)
    oracle = torch.distributions.Categorical(logits=logits.double())
    assert logp.dtype == torch.float32 and torch.allclose(logp.double(), oracle.log_prob(ids), atol=1e-5)
    assert torch.allclose(entropy.double(), oracle.entropy(), atol=1e-4)


def test_dropout_never_acts(make_run, llava_dir, tmp_path):
    """[12] With dropout in the configuration, two forwards agree and the first ratio is exactly 1."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(llava_dir)
    config.text_config.attention_dropout = config.vision_config.attention_dropout = 0.5
    (tmp_path / "m").mkdir()
    for file in llava_dir.iterdir():
        (tmp_path / "m" / file.name).write_bytes(file.read_bytes())
    config.save_pretrained(tmp_path / "m")
    run = make_run(model=tmp_path / "m")
    assert run.model.config.text_config.attention_dropout == 0.5
    assert not any(m.training for m in [*run.model.modules(), *run.reference.modules()])
    inputs, ids = run.collate(first_prompts(run, 2)), torch.arange(16).view(8, 2)
    assert torch.equal(
        run.policy(inputs, ids, 4, **run.distribution)[0], run.policy(inputs, ids, 4, **run.distribution)[0]
    )


# ------------------------------------------------------------------------------------------------
# One training step of the real thing.


def step(run, number: int = 1):
    metrics = virft.Averages()
    ro = virft.rollout(run, first_prompts(run, run.cfg.prompts_per_step), number)
    virft.update(run, ro, metrics)
    return ro, metrics


def spread_rewards(run) -> None:
    """Random weights never earn a reward: replace it by one that differs within groups and is exact in float32."""
    run.rewards = {"digits": (lambda completion, solution: float(sum(map(ord, completion)) % 8), 1.0)}


def capture_gradients(run) -> list[torch.Tensor]:
    taken = []
    plain = run.optimizer_step
    run.optimizer_step = lambda metrics: (taken.append(gradients(run.model).clone()), plain(metrics))
    return taken


def test_on_policy_the_loss_is_zero_and_the_gradient_is_not(make_run):
    """[5] beta 0: the loss of the first step is the mean advantage, which is 0."""
    run = make_run(beta=0)
    spread_rewards(run)
    taken = capture_gradients(run)
    ro, metrics = step(run)
    values = metrics.reduce(run.accelerator)
    assert run.reference is None
    assert abs(values["loss"]) < 1e-6 and values["clip_fraction"] == 0 and taken[0].norm() > 1e-3
    assert ro.advantages.abs().max() > 0.5


@pytest.mark.parametrize("loss", ["grpo", "dr_grpo", "dapo"])
def test_gradients_do_not_depend_on_micro_batches(make_run, loss):
    """[7] 1 x 4, 2 x 2 and 4 x 1 prompts, completions of unequal length, one group masked away by truncation."""
    results = []
    for per_forward in (4, 2, 1):
        run = make_run(loss=loss, prompts_per_forward=per_forward, mask_truncated=True, max_completion_tokens=24)
        run.eos = torch.cat([run.eos, torch.arange(40, 80)])  # random weights seldom end: let many tokens do it
        spread_rewards(run)
        taken = capture_gradients(run)
        ro, _ = step(run)
        results.append(taken[0])
        assert len(set(ro.mask.sum(1).tolist())) > 2 and ro.truncated.any()
    for other in results[1:]:
        assert (other - results[0]).norm() / results[0].norm() < 1e-5


def test_gradient_of_the_whole_step_against_an_independent_loop(make_run):
    """The oracle: one prompt and one completion at a time in plain PyTorch, with the formulas of the paper written out."""
    run = make_run(loss="grpo", prompts_per_forward=2, beta=0.5)
    spread_rewards(run)
    with torch.no_grad():
        for parameter in run.reference.parameters():
            parameter.mul_(1.01)  # a reference that differs, so that the KL has a gradient
    taken = capture_gradients(run)
    run.optimizer.param_groups[0]["lr"] = 0.0
    ro, _ = step(run)
    run.model.zero_grad()
    total, G = 0.0, run.cfg.group_size
    for i, (ids, mask) in enumerate(zip(ro.ids, ro.mask)):
        inputs, completion = ro.prompts[i // G].inputs, ids[mask]
        group = torch.stack([ro.rewards[i // G, g] for g in range(G)])
        advantage = (ro.rewards[i // G, i % G] - group.mean()) / (group.std() + 1e-4)
        logp, ref = (
            alone(model, inputs, completion, 1.0, run.distribution["forbidden"])[range(len(completion)), completion]
            for model in (run.model, run.reference.model)
        )
        ratio = torch.exp(logp - logp.detach())
        kl = torch.exp(ref - logp) - (ref - logp) - 1
        total = total + (-(ratio * advantage) + 0.5 * kl).mean() / len(ro.ids)
    total.backward()
    assert (gradients(run.model) - taken[0]).norm() / taken[0].norm() < 1e-5


def test_clip_and_kl_act_from_the_second_inner_epoch_on(make_run):
    run = make_run(inner_epochs=3, lr=0.02)
    spread_rewards(run)
    _, metrics = step(run)
    values = metrics.reduce(run.accelerator)
    assert values["clip_fraction"] > 0.01 and values["kl"] > 1e-4


def test_the_reference_stays_and_is_not_optimized(make_run):
    """[15]"""
    run = make_run(lr=0.01)
    spread_rewards(run)
    before = {name: p.clone() for name, p in run.reference.named_parameters()}
    step(run)
    optimized = {id(p) for group in run.optimizer.param_groups for p in group["params"]}
    for name, parameter in run.reference.named_parameters():
        assert torch.equal(parameter, before[name]) and id(parameter) not in optimized and not parameter.requires_grad
    assert any(not torch.equal(p, before[f"model.{name}"]) for name, p in run.model.named_parameters())


def test_every_parameter_with_a_path_to_the_loss_changes_and_the_others_are_frozen(make_run, capsys):
    run = make_run(lr=0.01)
    spread_rewards(run)
    frozen = {name for name, p in run.model.named_parameters() if not p.requires_grad}
    assert frozen == {"model.vision_tower.post_layernorm.weight", "model.vision_tower.post_layernorm.bias"}
    printed = capsys.readouterr().out
    assert all(name in printed for name in frozen)
    before = {name: p.clone() for name, p in run.model.named_parameters()}
    step(run)
    unchanged = {name for name, p in run.model.named_parameters() if torch.equal(p, before[name])}
    assert unchanged == frozen


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_updates_nothing_and_is_counted(make_run, poison):
    """[18]"""
    run = make_run()
    spread_rewards(run)
    before = [p.clone() for p in run.model.parameters()]
    hook = run.model.get_input_embeddings().weight.register_hook(lambda grad: grad * poison)
    _, metrics = step(run)
    assert metrics.reduce(run.accelerator)["skipped_updates"] == 1
    assert all(torch.equal(p, b) for p, b in zip(run.model.parameters(), before))
    hook.remove()
    _, metrics = step(run, 2)
    assert metrics.reduce(run.accelerator)["skipped_updates"] == 0
    assert not all(torch.equal(p, b) for p, b in zip(run.model.parameters(), before))


def test_scored_texts_are_the_sampled_ids(make_run):
    """[19] What the rewards read is the decoding of just the tokens that are trained, without the EOS."""
    run = make_run()
    run.eos = torch.cat([run.eos, torch.arange(40, 80)])
    ro, _ = step(run)
    for ids, mask, text in zip(ro.ids, ro.mask, ro.texts):
        trained = [token for token in ids[mask].tolist() if token not in run.eos.tolist()]
        assert text == run.processor.tokenizer.decode(trained, skip_special_tokens=True)
    records = virft.rollout_records(ro, 1)
    assert [r["completion"] for r in records] == ro.texts and records[5]["id"] == ro.prompts[1].example.id


def test_image_placeholders_are_never_sampled(make_run):
    """[20] Even by a policy that prefers them; KL and entropy stay finite."""
    run = make_run()
    (image_id,) = run.distribution["forbidden"].tolist()
    assert run.processor.tokenizer.decode([image_id]) == "<image>"
    head = run.model.get_output_embeddings()
    head.bias = torch.nn.Parameter(torch.zeros(head.weight.shape[0]))
    head.bias.data[image_id] = 1e4
    spread_rewards(run)
    ro, metrics = step(run)
    values = metrics.reduce(run.accelerator)
    assert not (ro.ids == image_id).any() and math.isfinite(values["kl"]) and math.isfinite(values["entropy"])


@pytest.mark.parametrize("phase", ["sample", "reference", "train"])
def test_operations_are_those_of_one_prompt_and_its_completions(phase):
    """Within 5% of prompt + G x completion, written out in bench/flops.py; far below G x (prompt + completion)."""
    torch.manual_seed(0)
    counted, least, repeated = phases(
        families.model("LLaVA"), families.prompt("LLaVA", [(1, 1)] * 4, 60, 1), G=8, C=20
    )[phase]
    assert abs(counted / least - 1) < 0.05
    assert repeated / counted > 2


# ------------------------------------------------------------------------------------------------
# Settings.


def test_every_setting_is_read():
    """[22] Each Config field is used outside of Config, and documented."""
    tree = ast.parse(inspect.getsource(virft))
    loads = [n for n in ast.walk(tree) if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Load)]
    read = {n.attr for n in loads if "cfg" in (getattr(n.value, "id", None), getattr(n.value, "attr", None))}
    for field in dataclasses.fields(virft.Config):
        assert field.name in read, f"--{field.name} is read nowhere"
        assert field.metadata["help"].strip()


WRONG = {
    "--task moon": "one of coco",
    "--loss ppo": "one of grpo, dr_grpo, dapo",
    "--temperature 0": "above 0",
    "--steps 0": "at least 1",
    "--beta -1": "0 or more",
    "--coordinates inches": "auto, relative or pixels",
    "--eval_only true --lr -1": "above 0",
    "--ask x.png": "--categories",
    "--warmup_steps -1": "0 or a number",
    "--max_grad_norm 0": "above 0",
    "--beta2 1": "below 1",
    "--weight_decay -1": "0 or more",
    "--workers -1": "0 .none of its own.",
    "--eval_every -5": "0 .never.",
    "--picture_every -5": "0 .never.",
    "--max_pixels 100": "at most --max_pixels",
    "--check true --eval_only true": "without --eval_only",
}


@pytest.mark.parametrize("argv, right", WRONG.items())
def test_wrong_settings_are_named(argv, right):
    with pytest.raises(SystemExit, match=right):
        virft.parse_config(argv.split())


@pytest.mark.parametrize("entry", ["iou=", "iou=x", "iuo=1"])
def test_wrong_rewards_are_named(make_run, entry):
    with pytest.raises(SystemExit, match="--rewards"):
        virft.rewards_of(virft.parse_config(["--rewards", entry]))


def test_evaluation_asks_as_training_does(make_run):
    """[27] The same example gives the same tokens and pixels in both."""
    run = make_run()
    example = run.prompts.examples[0]
    trained, evaluated = run.prompts.encode(example), run.prompts.of([example])[0, 0]
    assert trained.inputs.keys() == evaluated.inputs.keys()
    assert all(torch.equal(trained.inputs[name], evaluated.inputs[name]) for name in trained.inputs)
    assert isinstance(data.whole([trained])[0], Prompt)


@pytest.mark.parametrize("name", ["LLaVA", "Qwen2-VL", "SmolVLM"])
def test_prompts_in_common_give_the_logits_of_copies(name, monkeypatch):
    """Each step's logits to 1e-5, while memory runs out and rows leave, of one prompt more than of the other."""
    monkeypatch.setattr(models.CommonPromptLayer, "ROOM", 2)
    model, inputs = families.model(name), batch(prompts(name))
    kept = {4: [0, 1, 2, 5, 6, 7], 6: [0, 3, 4], 7: [1, 2]}  # of the rows of before

    def logits(common: bool) -> list[torch.Tensor]:
        torch.manual_seed(0)
        prefix, found = virft.prefill(model, inputs), []
        with models.prompts_in_common(model, prefix.cache, crosses=not common):
            assert (model.config.get_text_config()._attn_implementation == "common_prompt") == common
            prefix = virft.fork(prefix, torch.arange(8) // 4)
            for t in range(10):
                if t in kept:
                    prefix = virft.fork(prefix, torch.tensor(kept[t]))
                ids = torch.randint(0, families.WORDS, (8, 1))[: len(prefix.mask)]
                found.append(virft.branch(model, prefix, ids))
                assert prefix.cache.get_seq_length() == prefix.mask.shape[1] + t + 1
        if common:
            layer = prefix.cache.layers[0]
            assert type(layer) is models.CommonPromptLayer and len(layer.prompts[0]) == len(inputs["input_ids"])
        return found

    with torch.no_grad():
        for one, other in zip(logits(True), logits(False), strict=True):
            torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)
    assert model.config.get_text_config()._attn_implementation == "sdpa", "and is put back"


@pytest.mark.parametrize("largest", [5.0, 30.0])
def test_attention_in_sampling_is_not_rounded_under_autocast(largest):
    """Scores as large as trained models have them, against float64: as exact as the values' own rounding to bf16."""
    generator = torch.Generator().manual_seed(0)

    def tensor(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    from transformers.cache_utils import DynamicCache

    cache, (N, H, heads, P, D) = DynamicCache(), (4, 4, 2, 30, 16)
    cache.update(tensor(2, heads, P, D), tensor(2, heads, P, D).bfloat16(), 0)
    (layer,) = cache.layers
    prompt_keys, prompt_values, rows = layer.keys, layer.values, torch.arange(N) // 2
    query = tensor(N, H, 1, D)
    models.CommonPromptLayer.take_over(layer)
    layer.reorder_cache(rows)
    new_keys, new_values = tensor(N, heads, 1, D), tensor(N, heads, 1, D).bfloat16()
    keys, values = (torch.cat([a[rows], b], 2).repeat_interleave(H // heads, 1).double() for a, b in ((prompt_keys, new_keys), (prompt_values, new_values)))  # fmt: skip
    scores = query.double() @ keys.mT
    scaling = largest / float(scores.abs().max())
    exact = ((scores * scaling).softmax(-1) @ values).transpose(1, 2)
    with torch.autocast("cpu", torch.bfloat16):
        out, _ = models.attend(None, query, *layer.update(new_keys, new_values), None, scaling)
    assert (out - exact).abs().max() / exact.abs().max() < 1e-5


def test_log_probabilities_do_not_depend_on_blocks(monkeypatch):
    """[13] However few numbers are float32 at once, also where one completion alone has more."""
    logits, ids = torch.randn(3, 7, 40, requires_grad=True), torch.randint(0, 40, (3, 7))
    forbidden = torch.tensor([5])
    whole, entropy = virft.token_logps(logits, ids, 1.3, forbidden)
    (gradient,) = torch.autograd.grad(whole.sum(), logits)
    sizes, plain = [], virft.log_distribution
    monkeypatch.setattr(virft, "log_distribution", lambda x, *settings: sizes.append(x.numel()) or plain(x, *settings))
    monkeypatch.setattr(virft, "FLOAT32_BLOCK", 100)
    parts, entropies = virft.token_logps(logits, ids, 1.3, forbidden)
    assert torch.equal(parts, whole) and torch.equal(entropies, entropy) and max(sizes) == 80
    assert torch.equal(torch.autograd.grad(parts.sum(), logits)[0], gradient)


def test_the_cache_of_a_rollout_is_freed_without_the_cycle_collector():
    model, inputs = families.model("LLaVA"), batch(prompts("LLaVA"))
    gc.disable()
    try:
        with torch.no_grad():
            prefix = virft.prefill(model, inputs)
            with models.prompts_in_common(model, prefix.cache, crosses=False):
                forked = virft.fork(prefix, torch.arange(4) // 2)
                virft.branch(model, forked, torch.ones(4, 1, dtype=torch.long))
                left = [weakref.ref(layer) for cache in (prefix.cache, forked.cache) for layer in cache.layers]
                del prefix, forked
        assert left and not any(ref() for ref in left)
    finally:
        gc.enable()
