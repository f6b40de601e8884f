"""The algorithm against independent oracles; numbers in brackets are those of "Ways to be wrong" in the README."""

import ast
import dataclasses
import math

import pytest
import torch

import data
import families
import virft
from bench.flops import phases
from conftest import ROOT, first_prompts
from data import Prompt
from families import alone, batch, gradients, prompts, scored

NONE = torch.tensor([], dtype=torch.long)
CLIP_GRAD_NORM = torch.nn.utils.clip_grad_norm_  # which capture_gradients replaces


@pytest.mark.parametrize("name", ["LLaVA", "Qwen2-VL"])
def test_sampling_frequencies_are_the_scored_probabilities(name):
    """[2] 6,000 samples of two tokens against exp(completion log-probabilities), with temperature and forbidden ids."""
    model, inputs, B, G, temperature = families.model(name), batch(prompts(name)), 2, 3000, 2.0
    vocabulary = model.config.get_text_config().vocab_size
    forbidden = torch.tensor([3, *range(12, vocabulary)])  # eleven tokens are left, so that pairs of them are frequent
    with torch.no_grad():
        noise = virft.sampling_noise([str(i) for i in range(B)], G, 2)
        ids, logp_sampled = virft.sample(model, inputs, G, noise, 2, torch.tensor([95]), temperature, forbidden)
        logp = scored(model, inputs, ids, temperature, forbidden)[0]
    assert (logp_sampled - logp).abs().max() < 1e-5
    for rows, logps in zip(ids.view(B, G, -1), logp.view(B, G, -1)):
        for length in (1, 2):
            pairs, index, counts = rows[:, :length].unique(dim=0, return_inverse=True, return_counts=True)
            p = torch.zeros(len(pairs)).scatter(0, index, logps[:, :length].sum(1).exp())
            common = counts >= 20
            error = (counts / G - p)[common].abs() / (p * (1 - p) / G).sqrt()[common]
            assert common.sum() >= 5 and error.max() < 4.5, "sampled tokens do not follow the scored distribution"
        assert not torch.isin(rows, forbidden).any()


def test_greedy_takes_the_most_probable_token_and_rows_end_at_eos():
    model, inputs = families.model("LLaVA"), prompts("LLaVA")[0]
    with torch.no_grad():
        ids, _ = virft.sample(model, inputs, 2, None, 5, torch.tensor([-1]), 1.0, NONE)
        sequence = inputs["input_ids"]
        for t in range(5):
            token = (
                model(**(inputs | {"input_ids": sequence, "attention_mask": torch.ones_like(sequence)}))
                .logits[0, -1]
                .argmax()
            )
            assert ids[0, t] == ids[1, t] == token
            sequence = torch.cat([sequence, token.view(1, 1)], 1)
        stopped, _ = virft.sample(model, inputs, 2, None, 5, ids[0, 1:2], 1.0, NONE)
    assert stopped.shape[1] == int((ids[0] == ids[0, 1]).nonzero()[0]) + 1


def test_sampling_does_not_depend_on_the_batch():
    """The noise is keyed by prompt and completion: alone or padded with others, the same tokens."""
    model, inputs, never = families.model("Qwen2-VL"), prompts("Qwen2-VL"), torch.tensor([-1])
    with torch.no_grad():
        together, _ = virft.sample(model, batch(inputs), 3, virft.sampling_noise(["a", "b"], 3, 6), 6, never, 1.0, NONE)
        one, _ = virft.sample(model, inputs[1], 3, virft.sampling_noise(["b"], 3, 6), 6, never, 1.0, NONE)
    assert torch.equal(together[3:], one)
    assert len({tuple(row.tolist()) for row in together}) == 6, "every completion has noise of its own"


def test_log_probabilities_after_sampling_are_fresh():
    """[9] Multi-axis position offsets that a sampler leaves behind must not reach the next forward."""
    model, inputs, ids = families.model("Qwen2-VL"), prompts("Qwen2-VL"), torch.arange(12).view(2, 6)
    with torch.no_grad():
        fresh = scored(model, batch(inputs), ids)[0]
        virft.sample(model, inputs[0], 2, None, 5, torch.tensor([-1]), 1.0, NONE)
        assert torch.equal(scored(model, batch(inputs), ids)[0], fresh)


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
        logp, torch.zeros(1, 1), None, torch.tensor([A]), torch.ones(1, 1).bool(), torch.ones(1, 1), (0.2, 0.3), 0.0
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


def test_nan_draws_a_token_that_exists():
    """On a GPU an index outside the vocabulary would end the CUDA context."""
    logp, u = torch.full((3, 5), torch.nan), torch.tensor([0.0, 0.5, 0.999], dtype=torch.float64)
    assert (virft.draw(logp, u) < 5).all() and (virft.draw(logp, None) < 5).all()


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
    for reward in (1 / 3, 77.7, 1000.1):  # the mean of such equal numbers is another number
        assert all((virft.group_advantages(torch.full((1, G), reward)) == 0).all() for G in range(2, 17))
    with pytest.raises(SystemExit, match="--group_size 1: must be at least 2"):
        virft.parse_config(["--group_size", "1"])


@pytest.mark.parametrize("loss", virft.NORMALIZATIONS)
def test_token_weights(loss):
    """Against loops: mean of means, sum over the limit, mean over all tokens; a masked completion leaves both sides."""
    lengths, limit = [1, 4, 0, 3], 5
    mask = torch.arange(limit) < torch.tensor(lengths)[:, None]
    values = torch.randn(4, limit)
    weights, divisor = virft.NORMALIZATIONS[loss](mask, limit)
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
    weights, divisor = virft.NORMALIZATIONS["grpo"](mask, 3)
    results = []
    for fill in (0.0, wild):
        logp, old, ref = (
            torch.randn(2, 3, generator=torch.Generator().manual_seed(i)).masked_fill(~mask, fill * (-1) ** i)
            for i in range(3)
        )
        logp.requires_grad_()
        loss, kl, _ = virft.grpo_loss(logp, old, ref, torch.tensor([1.0, -1.0]), mask, weights, (0.2, 0.2), 0.04)
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
    twice = [scored(run.model, inputs, ids, **run.distribution)[0] for _ in range(2)]
    assert torch.equal(*twice)


# ------------------------------------------------------------------------------------------------
# One training step of the real thing.


def step(run, number: int = 1):
    ro = virft.rollout(run, first_prompts(run, run.cfg.prompts_per_step), number)
    return ro, virft.update(run, ro)


def spread_rewards(run) -> None:
    """Random weights never earn a reward: replace it by one that differs within groups and is exact in float32."""
    run.rewards = {"digits": (lambda completion, solution: float(sum(map(ord, completion)) % 8), 1.0)}


def capture_gradients(run, monkeypatch) -> list[torch.Tensor]:
    """The gradients of each optimizer step, before they are clipped."""
    taken = []

    def clip(parameters, limit):
        taken.append(gradients(run.model).clone())
        return CLIP_GRAD_NORM(parameters, limit)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clip)
    return taken


def test_on_policy_the_loss_is_zero_and_the_gradient_is_not(make_run, monkeypatch):
    """[5] beta 0: the loss of the first step is the mean advantage, which is 0."""
    run = make_run(beta=0)
    spread_rewards(run)
    taken = capture_gradients(run, monkeypatch)
    ro, metrics = step(run)
    values = metrics.reduce(run.accelerator)
    assert run.reference is None
    assert abs(values["loss"]) < 1e-6 and values["clip_fraction"] == 0 and taken[0].norm() > 1e-3
    assert ro.advantages.abs().max() > 0.5


@pytest.mark.parametrize("loss", virft.NORMALIZATIONS)
def test_gradients_do_not_depend_on_micro_batches(make_run, loss, monkeypatch):
    """[7] 1 x 4, 2 x 2 and 4 x 1 prompts, completions of unequal length, one group masked away by truncation."""
    results = []
    for per_forward in (4, 2, 1):
        run = make_run(loss=loss, micro_batch=4 * per_forward, mask_truncated=True, max_completion_tokens=24)
        run.eos = torch.cat([run.eos, torch.arange(40, 80)])  # random weights seldom end: let many tokens do it
        spread_rewards(run)
        taken = capture_gradients(run, monkeypatch)
        ro, _ = step(run)
        results.append(taken[0])
        assert len(set(ro.mask.sum(1).tolist())) > 2 and ro.truncated.any()
    for other in results[1:]:
        assert (other - results[0]).norm() / results[0].norm() < 1e-5


def test_gradient_of_the_whole_step_against_an_independent_loop(make_run, monkeypatch):
    """The oracle: one prompt and one completion at a time in plain PyTorch, the formulas of the paper written out."""
    run = make_run(loss="grpo", micro_batch=8, beta=0.5)
    spread_rewards(run)
    with torch.no_grad():
        for parameter in run.reference.parameters():
            parameter.mul_(1.01)  # a reference that differs, so that the KL has a gradient
    taken = capture_gradients(run, monkeypatch)
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
            for model in (run.model, run.reference)
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
    assert any(not torch.equal(p, before[name]) for name, p in run.model.named_parameters())


def test_every_parameter_with_a_path_to_the_loss_changes_and_the_others_do_not(make_run):
    run = make_run(lr=0.01)
    spread_rewards(run)
    before = {name: p.clone() for name, p in run.model.named_parameters()}
    step(run)
    unchanged = {name for name, p in run.model.named_parameters() if torch.equal(p, before[name])}
    assert unchanged == {"model.vision_tower.post_layernorm.weight", "model.vision_tower.post_layernorm.bias"}


@pytest.mark.parametrize("name", ["reward", "reward_std", "parsed", "kl", "loss"])
def test_a_metric_whose_name_is_taken_is_an_error(make_run, monkeypatch, name):
    """A new metric must not be added into another one: neither among those of the rollout nor those of the loss."""
    run, plain = make_run(), virft.rollout_metrics

    def more(run, ro):
        metrics = plain(run, ro)
        metrics.put(name, 1.0)
        return metrics

    monkeypatch.setattr(virft, "rollout_metrics", more)
    with pytest.raises(ValueError, match=f"two metrics are called {name}"):
        step(run)


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
        assert text == run.prompts.processor.tokenizer.decode(trained, skip_special_tokens=True)
    records = ro.rows(1)
    assert [r["completion"] for r in records] == ro.texts and records[5]["id"] == ro.prompts[1].example.id


def test_image_placeholders_are_never_sampled(make_run):
    """[20] Even by a policy that prefers them; KL and entropy stay finite."""
    run = make_run()
    (image_id,) = run.distribution["forbidden"].tolist()
    assert run.prompts.processor.tokenizer.decode([image_id]) == "<image>"
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
    sources = [ROOT / "virft.py", *(ROOT / "extras").rglob("*.py")]
    nodes = [node for file in sources for node in ast.walk(ast.parse(file.read_text()))]
    loads = [n for n in nodes if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Load)]
    read = {n.attr for n in loads if "cfg" in (getattr(n.value, "id", None), getattr(n.value, "attr", None))}
    for field in dataclasses.fields(virft.Config):
        assert field.name in read, f"--{field.name} is read nowhere"
        assert field.metadata["help"].strip()


WRONG = {
    "--task moon": "one of coco",
    "--loss ppo": "one of grpo, dr_grpo, dapo",
    "--temperature 0": "above 0",
    "--steps 0": "at least 1",
    "--beta -1": "at least 0",
    "--coordinates inches": "one of auto, relative, pixels",
    "--eval_only true --lr -1": "above 0",
    "--ask x.png": "--categories",
    "--warmup_steps -1": "at least 0",
    "--clip 0.2 -1": "at least 0",
    "--clip 1": "the first below 1",
    "--clip": "one or two numbers",
    "--negatives 1": "below 1",
    "--workers -1": "at least 0",
    "--eval_every -5": "at least 0",
    "--max_pixels 100": "at least 3136",
    "--check true --eval_only true": "false with --eval_only",
}


@pytest.mark.parametrize("argv, right", WRONG.items())
def test_wrong_settings_are_named(argv, right):
    with pytest.raises(SystemExit, match=right):
        virft.parse_config(argv.split())


@pytest.mark.parametrize("entry", ["iou=", "iou=x", "iuo=1"])
def test_wrong_rewards_are_named(make_run, entry):
    with pytest.raises(SystemExit, match="--rewards"):
        make_run(rewards=entry)


def test_evaluation_asks_as_training_does(make_run):
    """[27] The same example gives the same tokens and pixels in both."""
    run = make_run()
    example = run.prompts.examples[0]
    trained, evaluated = run.prompts.encode(example), run.prompts.of([example])[0, 0]
    assert trained.inputs.keys() == evaluated.inputs.keys()
    assert all(torch.equal(trained.inputs[name], evaluated.inputs[name]) for name in trained.inputs)
    assert isinstance(data.sound([trained])[0], Prompt)


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
