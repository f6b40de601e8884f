"""Published rules that change a step: groups sampled again, each reward normalized, and supervised fine-tuning."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

import data
from data import Prompt


def resample(run: Any, ro: Any, step: int, sampled: Callable) -> Any:
    """Replace groups whose rewards are all equal, which teach nothing, by fresh prompts, in at most --resample rounds.

    After DAPO (arXiv 2503.14476), which samples until the batch is full. Every process takes part in every round,
    because a sharded model is gathered by all together. sampled: the function of virft.py.
    """
    cfg, thrown_away = run.cfg, 0
    for round in range(1, cfg.resample + 1):
        compared = torch.stack(list(ro.parts.values()) if cfg.normalize == "each" else [ro.rewards])  # [rewards, B, G]
        flat = (compared == compared[..., :1]).all(2).all(0).nonzero().flatten().tolist()
        count = torch.tensor(len(flat), device=run.device)
        if not run.accelerator.reduce(count, "sum"):
            break
        slots = [ro.prompts[i].slot for i in flat]
        drawn = data.draw_examples(cfg.seed, len(run.prompts.examples), cfg.prompts_per_step, step, round, slots)
        if flat:
            ro = replaced(ro, flat, sampled(run, data.sound([run.prompts[key] for key in drawn]), step, round))
        else:
            with run.gathered():
                pass
        thrown_away += len(flat)
    return ro._replace(thrown_away=thrown_away)


def replaced(ro: Any, groups: Sequence[int], new: Any) -> Any:
    """Return a rollout with these groups replaced by those of `new`, in order."""
    B, G = ro.rewards.shape
    source = list(range(B))  # of each group, among those of both rollouts
    for i, group in enumerate(groups):
        source[group] = B + i
    rows = [g * G + i for g in source for i in range(G)]
    C = max(ro.ids.shape[1], new.ids.shape[1])
    tokens = {
        name: torch.cat([F.pad(x, (0, C - x.shape[1])) for x in (getattr(ro, name), getattr(new, name))])[rows]
        for name in ("ids", "logp", "mask")  # what is padded is outside the mask
    }
    prompts, texts = ro.prompts + new.prompts, ro.texts + new.texts
    return ro._replace(
        prompts=[prompts[g] for g in source],
        texts=[texts[i] for i in rows],
        truncated=torch.cat([ro.truncated, new.truncated])[rows],
        parts={name: torch.cat([part, new.parts[name]])[source] for name, part in ro.parts.items()},
        rewards=torch.cat([ro.rewards, new.rewards])[source],
        **tokens,
    )


def normalize_each(run: Any, parts: dict[str, Tensor], scale: bool, group_advantages: Callable) -> Tensor:
    """Return advantages [B, G]: each reward is normalized in its group, then the weighted sum over the whole step.

    GDPO, arXiv 2601.05242: two rewards of different spread then count as their weights say. parts: each reward [B, G].
    group_advantages: the function of virft.py.
    """
    A = sum(weight * group_advantages(parts[name], scale) for name, (_, weight) in run.rewards.items())
    own = torch.tensor([A.numel(), A.sum(), A.square().sum()], dtype=torch.float64, device=run.device)
    n, total, squares = run.accelerator.reduce(own, "sum").tolist()
    std = (max(0.0, squares - total * total / n) / (n - 1)) ** 0.5
    return (A - total / n) / (std + 1e-4)


def supervised(run: Any, prompts: list[Prompt], step: int, judged: Callable) -> Any:
    """Return the right answers as a rollout with A = 1: rho is 1, so `update` follows their log-likelihood (--sft).

    judged: the function of virft.py.
    """
    texts = [data.model_answer(run.prompts.task, p.example, p.target, run.cfg.think) for p in prompts]
    # What the chat template has opened belongs to the prompt.
    ids, _ = answer_ids(run, [text.removeprefix("".join(p.opening.split())) for text, p in zip(texts, prompts)])
    ro = judged(run, prompts, ids, torch.zeros(ids.shape, device=run.device), step)
    return ro._replace(advantages=torch.ones(len(ids), device=run.device))


def answer_ids(run: Any, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Tokenize answers, each with the end of an assistant's turn; return ids and mask [n, C], padded with EOS."""
    tokenizer, end = run.prompts.processor.tokenizer, data.turn_end(run.prompts.processor)
    end = tokenizer.eos_token_id if end is None else end
    rows = [torch.tensor([*ids, end]) for ids in tokenizer(list(texts), add_special_tokens=False)["input_ids"]]
    ids = pad_sequence(rows, batch_first=True, padding_value=int(run.eos[0]))
    mask = torch.arange(ids.shape[1]) < torch.tensor([[len(row)] for row in rows])
    return ids.to(run.device), mask.to(run.device)
