"""Published rules that change a step: threshold phases, groups sampled again, each reward normalized, SFT.

Oracles are loops over numbers, cross-entropy, and rewards that are made so that the outcome is known.
"""

import json
import math
import re
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from PIL import Image

import data
import rewards
import virft
from conftest import ROOT, first_prompts
from extras import variants

# ------------------------------------------------------------------------------------------------
# Threshold phases.


@pytest.mark.parametrize(
    "steps, phases, expected",
    [
        (6, [0.5, 0.75, 0.9], [0.5, 0.5, 0.75, 0.75, 0.9, 0.9]),
        (7, [0.5, 0.75, 0.9], [0.5, 0.5, 0.5, 0.75, 0.75, 0.9, 0.9]),
        (4, [0.5], [0.5] * 4),
        (2, [0.5, 0.75, 0.9], [0.5, 0.75]),
    ],
)
def test_phases_are_of_equal_length(steps, phases, expected):
    run = SimpleNamespace(cfg=SimpleNamespace(steps=steps, iou_threshold=phases))
    assert [virft.Run.threshold(run, step) for step in range(1, steps + 1)] == expected


def test_a_step_is_scored_by_its_phase_and_evaluation_by_the_last(make_run):
    run = make_run(steps=4)
    run.cfg.iou_threshold = [0.2, 0.8]
    prompt = next(p for p in first_prompts(run, 8) if len(p.solution) == 1)
    x1, y1, x2, y2 = prompt.solution[0]
    half = [x1, y1, x1 + (x2 - x1) / 2, y2]  # IoU 1/2
    text = f"<think></think><answer>[{{'Position': {half}, 'Confidence': 1}}]</answer>"
    assert run.score(prompt, [text], 2)["iou"] == [pytest.approx(0.5)]
    assert run.score(prompt, [text], 3)["iou"] == run.score(prompt, [text])["iou"] == [0.0]


# ------------------------------------------------------------------------------------------------
# What a reward may ask for, and abstaining.


def test_a_reward_asks_by_the_names_of_its_parameters(make_run):
    run = make_run()
    prompt = first_prompts(run, 1)[0]
    seen = []

    def judge(completion, solution, images, example, iou_threshold):
        seen.append((images[0].size, example.id, iou_threshold))
        return 0.5

    run.rewards = {"judge": (judge, 1.0), "format": (rewards.format_reward, 1.0)}
    assert run.score(prompt, ["a", "b"])["judge"] == [0.5, 0.5]
    assert seen == [(prompt.example.size, prompt.example.id, 0.5)] * 2


def test_images_are_not_opened_where_no_reward_asks(make_run, monkeypatch):
    run = make_run()
    prompt = first_prompts(run, 1)[0]
    monkeypatch.setattr(data, "open_images", lambda example: pytest.fail("opened"))
    run.score(prompt, ["a"])


@pytest.mark.parametrize(
    "values, expected",
    [([1.0, None, 0.0, 0.5], [1.0, 0.5, 0.0, 0.5]), ([None, None], [0.0, 0.0]), ([None, 2.0], [2.0, 2.0])],
)
def test_none_abstains(values, expected):
    given = iter(values)
    assert rewards.score_group(lambda completion, solution: next(given), ["x"] * len(values), None) == expected
    A = virft.group_advantages(torch.tensor([expected]), scale=False)[0]
    assert all(a == 0 for a, value in zip(A, values) if value is None)


def test_a_file_of_the_users_may_ask_and_abstain(tmp_path):
    (tmp_path / "mine.py").write_text(
        "def judge(completion, solution, images):\n    return None if not completion else len(images)\n"
    )
    (reward, _) = rewards.choose_rewards({f"{tmp_path}/mine.py:judge": 1.0})["judge"]
    image = Image.new("RGB", (4, 4))
    assert rewards.score_group(reward, ["", "a"], None, images=[image, image], example=None) == [2.0, 2.0]


def test_the_reward_of_the_docs_that_looks_at_the_picture(tmp_path):
    (code,) = re.findall(r"```python\n(def dark_enough.*?)```", (ROOT / "docs" / "tasks.md").read_text(), re.DOTALL)
    (tmp_path / "mine.py").write_text(code)
    (reward, _) = rewards.choose_rewards({f"{tmp_path}/mine.py:dark_enough": 1.0})["dark_enough"]
    for level, expected in ((0, [1.0, 1.0]), (200, [0.0, 0.0])):
        images = [Image.new("RGB", (8, 8), (level,) * 3)]
        assert rewards.score_group(reward, ["it is dark", "a cat"], None, images=images) == expected


# ------------------------------------------------------------------------------------------------
# Each reward normalized (GDPO), against loops over numbers.


def test_each_reward_is_normalized_in_its_group_and_the_sum_over_the_step():
    parts = {"iou": torch.rand(3, 4), "format": (torch.rand(3, 4) > 0.5).float()}
    weights = {"iou": 2.0, "format": 0.5}
    run = SimpleNamespace(
        accelerator=Accelerator(cpu=True), device=torch.device("cpu"),
        rewards={name: (None, weight) for name, weight in weights.items()},
    )  # fmt: skip
    found = variants.normalize_each(run, parts, True, virft.group_advantages)
    total = [[0.0] * 4 for _ in range(3)]
    for name, part in parts.items():
        for b, group in enumerate(part.tolist()):
            mean = sum(group) / 4
            std = math.sqrt(sum((r - mean) ** 2 for r in group) / 3)
            for i, r in enumerate(group):
                total[b][i] += weights[name] * (r - mean) / (std + 1e-4)
    flat = [value for group in total for value in group]
    mean = sum(flat) / 12
    std = math.sqrt(sum((value - mean) ** 2 for value in flat) / 11)
    for b in range(3):
        for i in range(4):
            assert found[b, i] == pytest.approx((total[b][i] - mean) / (std + 1e-4), abs=1e-5)


def test_rewards_of_unequal_spread_count_alike(make_run):
    """A reward a hundred times larger drowns the other in the sum, and does not if each is normalized."""
    run = make_run(normalize="each")
    large, small = torch.tensor([[0.0, 100.0, 0.0, 100.0]]), torch.tensor([[1.0, 0.0, 0.0, 0.0]])
    run.rewards = {"large": (None, 1.0), "small": (None, 1.0)}
    each = variants.normalize_each(run, {"large": large, "small": small}, True, virft.group_advantages)[0]
    summed = virft.group_advantages(large + small)[0]
    assert each[0] - each[2] > 1.0 > 0.1 > summed[0] - summed[2] > 0


# ------------------------------------------------------------------------------------------------
# Groups sampled again.


def by_first_letter(wanted):
    """A reward that is 1 or 0 by turns for prompts in `wanted`, and equal within every other group."""
    turn = iter(range(10**6))

    def reward(completion, solution, example):
        return float(next(turn) % 2) if wanted(example) else 0.25

    return reward


def test_a_group_without_variance_is_replaced_by_a_fresh_prompt(make_run):
    run = make_run(resample=3, prompts_per_step=4)
    prompts = first_prompts(run, 4)
    flat = prompts[1].example.id
    run.rewards = {"turns": (by_first_letter(lambda example: example.id != flat), 1.0)}
    ro = virft.rollout(run, prompts, 1)
    assert ro.thrown_away == 1
    assert all(ro.prompts[i] is prompts[i] for i in (0, 2, 3))
    ((slot, index),) = data.draw_examples(run.cfg.seed, len(run.prompts.examples), 4, 1, 1, [prompts[1].slot])
    assert ro.prompts[1].example is run.prompts.examples[index] and ro.prompts[1].slot == slot
    assert not (ro.rewards == ro.rewards[:, :1]).all(1).any() and (ro.advantages.view(4, -1).std(1) > 0).all()
    G = run.cfg.group_size
    alone = run.decode(ro.ids, ro.mask)
    assert [ro.prompts[i // G].whole_answer(text) for i, text in enumerate(alone)] == ro.texts
    metrics = virft.update(run, ro).reduce(run.accelerator)
    assert metrics["resampled_groups"] == 1 and metrics["zero_variance_groups"] == 0


def test_several_groups_are_replaced_each_by_its_own(make_run):
    """Slots 1 and 3 get the examples that are drawn for them, with texts, ids and rewards of their own."""
    run = make_run(resample=1, prompts_per_step=4)
    prompts = first_prompts(run, 4)
    flat = {prompts[1].example.id, prompts[3].example.id}
    run.rewards = {"turns": (by_first_letter(lambda example: example.id not in flat), 1.0)}
    ro = virft.rollout(run, prompts, 1)
    drawn = data.draw_examples(run.cfg.seed, len(run.prompts.examples), 4, 1, 1, [1, 3])
    assert [(p.slot, p.example.id) for p in (ro.prompts[1], ro.prompts[3])] == [
        (slot, run.prompts.examples[index].id) for slot, index in drawn
    ]
    alone = virft.sampled(run, [run.prompts[key] for key in drawn], 1, 1)
    G = run.cfg.group_size
    assert ro.texts[G : 2 * G] + ro.texts[3 * G :] == alone.texts and ro.thrown_away == 2


def test_a_group_that_only_its_sum_makes_flat_is_kept_where_each_reward_counts(make_run):
    turn = [iter(range(100)), iter(range(100))]
    for normalize, thrown_away in (("each", 0), ("sum", 4)):
        run = make_run(resample=1, prompts_per_step=4, normalize=normalize)
        run.rewards = {
            "odd": (lambda completion, solution: float(next(turn[0]) % 2), 1.0),
            "even": (lambda completion, solution: 1.0 - next(turn[1]) % 2, 1.0),
        }
        assert virft.rollout(run, first_prompts(run, 4), 1).thrown_away == thrown_away


def test_resampling_ends_after_its_rounds_where_nothing_varies(make_run):
    run = make_run(resample=2, prompts_per_step=4)
    run.rewards = {"same": (lambda completion, solution: 1.0, 1.0)}
    ro = virft.rollout(run, first_prompts(run, 4), 1)
    assert ro.thrown_away == 8 and (ro.advantages == 0).all()


def test_without_flat_groups_nothing_changes(make_run):
    turns = [make_run(resample=resample, prompts_per_step=4) for resample in (0, 2)]
    for run in turns:
        run.rewards = {"turns": (by_first_letter(lambda example: True), 1.0)}
    one, two = (virft.rollout(run, first_prompts(run, 4), 1) for run in turns)
    assert torch.equal(one.ids, two.ids) and torch.equal(one.advantages, two.advantages) and two.thrown_away == 0


# ------------------------------------------------------------------------------------------------
# The exercise of docs/lesson.ipynb: GSPO and CISPO as entries of RATIOS, against loops over numbers.


def solved() -> dict:
    cells = json.loads((ROOT / "docs" / "lesson.ipynb").read_text())["cells"]
    (code,) = (code for cell in cells if (code := "".join(cell["source"])).startswith("def gspo"))
    names = {"torch": torch, "virft": SimpleNamespace(RATIOS=dict(virft.RATIOS))}
    exec(code, names)
    return names["virft"].RATIOS


def numbers():
    generator = torch.Generator().manual_seed(0)
    logp = (-torch.rand(3, 4, generator=generator).double() * 2).requires_grad_()
    old = -torch.rand(3, 4, generator=generator).double() * 2
    A, mask = torch.tensor([[1.2], [-0.7], [0.4]]).double(), torch.arange(4) < torch.tensor([[3], [4], [1]])
    return logp, old, A, mask


@pytest.mark.parametrize("name", ["gspo", "cispo"])
def test_the_exercise_is_solved(name):
    logp, old, A, mask = numbers()
    eps, weights = (0.2, 0.3), mask / mask.sum(1, keepdim=True)
    loss, clipped = solved()[name](logp, old, A, mask, eps)
    (torch.where(mask, loss, 0) * weights).sum().backward()
    for i in range(3):
        tokens = range(int(mask[i].sum()))
        ratios = [math.exp(logp[i, t].item() - old[i, t].item()) for t in tokens]
        if name == "gspo":
            s = math.prod(ratios) ** (1 / len(ratios))
            flat = A[i].item() * s > A[i].item() * min(max(s, 0.8), 1.3)
            expected = [-min(s * A[i].item(), min(max(s, 0.8), 1.3) * A[i].item())] * len(ratios)
            # d/dlogp_t of -s A, s = exp(mean): -s A / T for each of T tokens
            gradient = [0.0 if flat else -s * A[i].item() / len(ratios)] * len(ratios)
            assert bool(clipped[i, 0]) == flat
        else:
            held = [min(max(rho, 0.8), 1.3) for rho in ratios]
            expected = [-w * A[i].item() * logp[i, t].item() for t, w in zip(tokens, held)]
            gradient = [-w * A[i].item() / len(ratios) for w in held]
        assert loss[i, : len(ratios)].tolist() == pytest.approx(expected)
        assert logp.grad[i, : len(ratios)].tolist() == pytest.approx(gradient)


@pytest.mark.parametrize("name", ["gspo", "cispo"])
def test_on_policy_the_exercise_has_the_gradient_of_grpo(name):
    grads = []
    for ratio in (virft.RATIOS["token"], solved()[name]):
        logp, _, A, mask = numbers()
        loss, _ = ratio(logp, logp.detach(), A, mask, (0.2, 0.2))
        (torch.where(mask, loss, 0) / mask.sum(1, keepdim=True)).sum().backward()
        grads.append(logp.grad)
    assert torch.allclose(*grads)


# ------------------------------------------------------------------------------------------------
# Supervised fine-tuning by the same loop.


def test_the_gradient_of_sft_is_that_of_cross_entropy(make_run):
    run = make_run(sft=True, prompts_per_step=4, micro_batch=2)
    assert run.cfg.beta == 0 and run.reference is None
    prompts = first_prompts(run, 4)
    ro = variants.supervised(run, prompts, 1, virft.judged)
    tokenizer = run.prompts.processor.tokenizer
    answers = [data.model_answer(run.prompts.task, p.example, p.target) for p in prompts]
    assert ro.texts == answers and all(value == 1 for value in ro.parts["format"].flatten())
    grads = {}
    run.optimizer.register_step_pre_hook(
        lambda *args: grads.update({n: p.grad.clone() for n, p in run.model.named_parameters() if p.grad is not None})
    )
    virft.MAX_GRAD_NORM, plain = 1e9, virft.MAX_GRAD_NORM
    weights = {n: p.detach().clone() for n, p in run.model.named_parameters()}
    metrics = virft.update(run, ro).reduce(run.accelerator)
    virft.MAX_GRAD_NORM = plain
    run.model.load_state_dict(weights, strict=False)
    run.model.zero_grad()
    losses = []
    forbidden = run.distribution["forbidden"]
    for prompt, text in zip(prompts, answers):
        inputs = run.collate([prompt])
        ids = torch.tensor([*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id])
        whole = inputs | {
            "input_ids": torch.cat([inputs["input_ids"], ids[None]], 1),
            "attention_mask": F.pad(inputs["attention_mask"], (0, len(ids)), value=1),
        }
        logits = run.model(**whole).logits[0, -len(ids) - 1 : -1].index_fill(1, forbidden, -math.inf)
        losses.append(F.cross_entropy(logits, ids))
    (sum(losses) / len(losses)).backward()  # the mean over tokens, then over answers
    for name, parameter in run.model.named_parameters():
        if parameter.grad is not None and parameter.grad.norm() > 1e-6:
            assert (grads[name] - parameter.grad).norm() / parameter.grad.norm() < 1e-4, name
    assert metrics["reward/format"] == 1 and "sampler_gap" not in metrics and "reward_std" not in metrics
    per_token = sum(loss.item() * n for loss, n in zip(losses, ro.mask.sum(1).tolist())) / ro.mask.sum().item()
    assert metrics["cross_entropy"] == pytest.approx(per_token, rel=1e-4)


def test_sft_lowers_the_cross_entropy_and_saves_a_model(shapes_dir, tmp_path, capfd):
    argv = f"--task coco --data {shapes_dir} --model {ROOT / 'demo' / 'model'} --out {tmp_path / 'run'} --sft true"
    virft.main([*argv.split(), *"--steps 8 --prompts_per_step 4 --lr 1e-3 --workers 0".split()])
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["cross_entropy"] < 0.7 * rows[0]["cross_entropy"] and rows[0]["loss"] == pytest.approx(-1)
    assert f"cross_entropy={rows[-1]['cross_entropy']:.3g}" in capfd.readouterr().err  # beside the progress bar
    assert (tmp_path / "run" / "model" / "model.safetensors").exists()


@pytest.mark.parametrize(
    "flags, right",
    [
        ("--inner_epochs 2", "--inner_epochs 2: must be 1 with"),
        ("--resample 1", "--resample 1: must be 0 with --sft"),
        ("--normalize each", "--normalize each: must be sum with --sft"),
        ("--beta 0.1", "--beta 0.1: must be 0 with --sft"),
    ],
)
def test_settings_that_do_not_go_with_sft(flags, right, tmp_path):
    with pytest.raises(SystemExit, match=right):
        virft.parse_config(["--sft", "true", *flags.split(), "--out", str(tmp_path / "run")])


def test_what_the_template_opens_belongs_to_the_prompt(make_run):
    run = make_run(sft=True, prompts_per_step=2)
    prompts = [p.__class__(**(vars(p) | {"opening": "<think>\n"})) for p in first_prompts(run, 2)]
    ro = variants.supervised(run, prompts, 1, virft.judged)
    assert all(text.startswith("<think>\n</think><answer>") for text in ro.texts)
    assert all(value == 1 for value in ro.parts["format"].flatten())
