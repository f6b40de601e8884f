"""ViRFT: reinforcement fine-tuning of vision-language models with verifiable rewards, in one file.

Visual-RFT (arXiv 2503.01785) trains a vision-language model with GRPO (arXiv 2402.03300) on rewards that a
program can check: the IoU of boxes, their confidence, a class name, the answer's format. For every step:

  1. q      take prompts: an image and a question about it
  2. o_i    sample G completions of each prompt from the policy pi_theta
  3. r_i    score each completion's text: r_i = sum of weighted rewards (rewards.py)
  4. A_i    compare within the group: A_i = (r_i - mean(r)) / (std(r) + 1e-4)
  5. rho    = pi_theta(o_it) / pi_old(o_it), token by token; pi_old is the policy that sampled
  6. loss   = mean of -min(rho A, clip(rho, 1 - eps_low, 1 + eps_high) A) + beta KL(pi_theta || pi_ref)
  7. step   along its gradient, and go on with new samples

What differs from the paper and its released code, and why:

  - A prompt and its image are encoded once per group, not G times, in sampling, in the reference pass and in
    training: `prefill` runs the prompt, `fork` copies its cache, `branch` continues the copies, which carry gradients.
    Only where a model's cache cannot carry them (linear attention) scoring and training repeat the prompt.
  - We sample with our own loop, because `generate` inherits settings from checkpoints (Qwen-VL ships top_k=1,
    G identical answers), and sampler and scorer must be one distribution.
  - Coordinates, rewards and their edge cases are stated and tested: see data.py and rewards.py.

    accelerate launch virft.py --task coco                               # Qwen2-VL-2B on the released data
    accelerate launch virft.py --task coco --data DIR --model NAME       # COCO on disk
    accelerate launch virft.py --task coco --data DIR --model NAME --eval_only true
    bash run.sh                                                          # offline demo, no GPU

A new reward goes into rewards.py (REWARDS), a new task into data.py (TASKS), a score into evaluate.py; what families of
models differ in, loading, adapters, shards and checkpoints into models.py; a new setting into Config below, a new
metric of training into `rollout_metrics`.

Shapes in comments: B prompts, G completions per prompt, P prompt tokens, C completion tokens, V vocabulary, and
N = B * G rows, which are grouped: prompt 0 completion 0, prompt 0 completion 1, ...
"""

import contextlib
import copy
import difflib
import hashlib
import json
import math
import os
import random
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, DistributedType, broadcast_object_list, gather_object
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import AutoConfig, HfArgumentParser

import data
import evaluate
import models
from data import CATEGORY_SPLITS, DataError, Example, Prompt, Prompts
from models import Checkpoint, next_position, prompts_in_common, repeated_logits, shares_prompt, told_positions
from rewards import choose_rewards, reward_weights


def option(default: Any, help: str, heading: str | None = None) -> Any:
    """A Config field with its line of help, and the heading in --help that begins with it; lists get a factory."""
    usual = {"default_factory": lambda: list(default)} if isinstance(default, list) else {"default": default}
    return field(**usual, metadata={"help": help, "heading": heading})


class Parser(HfArgumentParser):
    """Flags from dataclasses of `option` fields, under their headings; each has one name, which may be cut short, and shows its type."""

    group = None

    def add_argument(self, *names, heading: str | None = None, **settings):
        if heading:
            self.group = self.add_argument_group(heading)
        if not self.group:  # --help itself
            return super().add_argument(*names, **settings)
        if settings.get("action") == "store_false":
            return None  # --no_x beside --x false: a second name, shown with a default that misleads
        if "type" in settings:
            settings["metavar"] = settings["type"].__name__.replace("string_to_bool", "bool").upper()
        return self.group.add_argument(names[0], **settings)

    def settings(self, argv: list[str] | None) -> Any:
        """The dataclass with what the command line sets; SystemExit at a flag that it does not have."""
        found, unknown = self.parse_args_into_dataclasses(argv, return_remaining_strings=True, look_for_args_file=False)
        if unknown:
            near = difflib.get_close_matches(unknown[0].lstrip("-"), vars(found), n=1)
            meant = f"did you mean --{near[0]}? " if near else ""
            raise SystemExit(f"{' '.join(unknown)}: there is no such flag; {meant}--help lists them")
        return found


LOSSES = ("grpo", "dr_grpo", "dapo")  # see token_weights
FLOAT32_BLOCK = 2**25  # logits that are float32 at once, 128 MiB
CHECKED = 16  # examples that --check looks at


@dataclass
class Config:
    """Every setting, documented here and nowhere else: `python virft.py --help` prints these lines."""

    task: str = option("coco", f"task of data.TASKS: {', '.join(data.TASKS)}", heading="What is trained on what")
    model: str = option("Qwen/Qwen2-VL-2B-Instruct", "model folder or hub name; also the reference of the KL term")
    revision: str | None = option(None, "branch, tag or commit of a model on the hub")
    data: str | None = option(None, "dataset folder, file or hub name; by default the task's released dataset")
    eval_data: str | None = option(None, "dataset to evaluate on; by default the validation split of --data")
    out: str = option("runs/virft", "run folder: metrics, rollouts, pictures and the trained model")
    overwrite: bool = option(False, "replace an existing run folder")

    categories: str | None = option(
        None,
        f"categories, separated by commas, or base65, {', '.join(CATEGORY_SPLITS)}; default all",
        heading="Examples",
    )
    shots: int | None = option(None, "few-shot: this many training images per category, chosen by seed")
    negatives: float = option(0.0, "share of examples that ask for an absent category (right answer: No Objects)")
    max_boxes: int | None = option(None, "leave out training examples with more boxes than this")
    skip_bad_images: bool = option(
        False, "leave out images that are missing, broken or wrongly annotated, and count them"
    )
    max_pixels: int = option(401408, "images are fitted to at most this many pixels (401408 = 512 patches of 28 x 28)")
    min_pixels: int = option(3136, "and to at least this many")
    coordinates: str = option(
        "auto", "what the model reads and writes: relative (0..1000), pixels, or auto by model family"
    )
    think: bool = option(True, "ask for <think> before <answer>; false: answer only, and format judged on it alone")
    system_prompt: str | None = option(None, "system message before each question")

    rewards: list[str] = option(
        [],
        "rewards and weights, such as iou=1 brier=0.5 my_rewards.py:my_reward=2; default: the task's",
        heading="The algorithm",
    )
    iou_threshold: float = option(0.5, "a box counts as found if its IoU is above this")
    group_size: int = option(8, "G, completions per prompt")
    max_completion_tokens: int = option(512, "a completion that has not ended by then is truncated")
    temperature: float = option(1.0, "of the sampler and of the scorer alike")
    loss: str = option("grpo", "normalization of the token losses: grpo, dr_grpo or dapo (see token_weights)")
    eps_low: float = option(0.2, "the ratio is clipped below 1 - eps_low")
    eps_high: float = option(0.2, "and above 1 + eps_high")
    beta: float = option(0.04, "weight of the KL to the reference model; 0 loads no reference")
    inner_epochs: int = option(1, "optimizer steps on the same completions; clipping acts from the second on")
    mask_truncated: bool = option(False, "leave truncated completions out of the loss; they stay in their group's mean")

    steps: int = option(200, "training steps (sample, score, update)", heading="Optimization")
    prompts_per_step: int = option(16, "prompts of one step over all processes and micro-batches")
    prompts_per_forward: int = option(1, "prompts of one training forward and backward on one process")
    lr: float = option(1e-6, "peak learning rate, decaying linearly to 0")
    warmup_steps: int = option(0, "steps of linear warm-up")
    beta2: float = option(0.999, "second-moment decay of AdamW (the first is 0.9)")
    weight_decay: float = option(0.0, "decoupled weight decay of AdamW")
    max_grad_norm: float = option(1.0, "gradients are clipped to this norm")
    seed: int = option(0, "decides the order of examples and every sampled token")

    lora_rank: int = option(
        0,
        "train adapters of this rank (peft, alpha = 2 x rank) on the language model; 0: the weights",
        heading="Memory and several GPUs",
    )
    freeze_vision: bool = option(False, "train the language model only; with --lora_rank it is so anyway")
    micro_batch: int = option(0, "completions scored at once, each chunk recomputed in the backward pass; 0: all")
    shard: bool = option(
        False, "share weights, gradients and optimizer out over the processes (FSDP2), not copy them (DDP)"
    )

    save_every: int = option(
        0, "write a checkpoint every so many steps; 0: only when interrupted", heading="Interruptions"
    )
    keep_last: int = option(2, "checkpoints that are kept, the newest ones")
    resume: bool = option(False, "go on with the run in --out from its newest checkpoint")

    workers: int = option(
        2, "processes per GPU that open and resize images ahead of the step", heading="Seeing what happens"
    )
    check: bool = option(False, f"sample answers to {CHECKED} examples, say what looks wrong, train nothing, and stop")
    eval_only: bool = option(False, "evaluate --model on the validation split and stop")
    eval_every: int = option(0, "evaluate every so many steps; 0: never")
    eval_limit: int | None = option(None, "evaluate on this many examples, chosen by seed, instead of all")
    eval_categories: str = option(
        "gt",
        "each image is asked for: gt, what it shows (and --negatives); all categories; listed: all of --categories",
    )
    eval_batch: int = option(16, "prompts decoded at once in evaluation")
    picture_every: int = option(50, "draw a training answer every so many steps; 0: never")
    report_to: list[str] = option([], "trackers besides metrics.jsonl: tensorboard, wandb, ...")
    ask: str | None = option(None, "path of one picture: answer for --categories, print, draw, and stop")


# ================================================================================================
# The algorithm, in the order in which it happens.


class Prefix(NamedTuple):
    """Encoded prompts, as the beginnings of completions: B rows from `prefill`, then N from `fork`."""

    cache: Any  # keys and values; grows as `branch` feeds tokens
    logits: Tensor  # [N, V], predicting the next token
    mask: Tensor  # [N, P], 0 on the left padding
    position: Tensor  # [N, 1] (or one such per rotary axis), position id of the completion's first token
    sight: dict[str, Tensor]  # with cross attention, [N, 1, ...]: which of the images a completion sees


def prefill(model: nn.Module, inputs: dict[str, Tensor]) -> Prefix:
    """Run the B left-padded prompts and their images through the model, once for all their completions."""
    mask = inputs["attention_mask"]  # [B, P]
    out = model(**inputs, **told_positions(model, mask), use_cache=True, logits_to_keep=1)
    # With cross attention the inputs say of each token which images it sees: a completion sees what the prompt's end sees.
    sight = {name: x[:, -1:] for name, x in inputs.items() if x.dim() > 2 and x.shape[:2] == mask.shape}
    return Prefix(out.past_key_values, out.logits[:, -1], mask, next_position(model, mask), sight)


def fork(prefix: Prefix, rows: Tensor) -> Prefix:
    """A prefix of its own for every completion: that of completion i is row rows[i].

    Copying keys and values is cheap; repeating prompts would cost G vision towers and G * P tokens. Gradients flow
    from every completion through its copy into the one prompt, and on into the vision tower.
    """
    cache = copy.copy(prefix.cache)
    cache.layers = [copy.copy(layer) for layer in cache.layers]
    cache.reorder_cache(rows)  # batch_select_indices would do it too, by an indexing that is 50 times slower
    sight = {name: x[rows] for name, x in prefix.sight.items()}
    return Prefix(cache, prefix.logits[rows], prefix.mask[rows], prefix.position[..., rows, :], sight)


def branch(model: nn.Module, prefix: Prefix, ids: Tensor) -> Tensor:
    """Feed n more tokens per completion, ids [N, n], after all that the cache holds; logits [N, n, V].

    The same call decodes (n = 1) and scores (n = C - 1). Positions are passed, not left to what a model remembers.
    """
    done = prefix.cache.get_seq_length() - prefix.mask.shape[1]  # completion tokens in the cache so far
    position = prefix.position + torch.arange(done, done + ids.shape[1], device=ids.device)
    mask = F.pad(prefix.mask, (0, done + ids.shape[1]), value=1)
    text = {"input_ids": ids, "attention_mask": mask, "position_ids": position}
    sight = {name: x.repeat_interleave(ids.shape[1], 1) for name, x in prefix.sight.items()}
    return model(**text, **sight, past_key_values=prefix.cache, use_cache=True).logits


def log_distribution(logits: Tensor, temperature: float, forbidden: Tensor) -> Tensor:
    """log pi(token | what came before), [..., V], in float32: the one distribution that is sampled and scored.

    No top-k, no top-p. `forbidden` ids are image placeholders: one in a completion would pass for an image.
    """
    logits = logits.float() / temperature  # whatever precision they come in, the softmax adds no error of its own
    logits[..., forbidden] = -torch.inf
    return logits.log_softmax(-1)


def sample(
    model: nn.Module, inputs: dict[str, Tensor], group_size: int, noise: Tensor | None, max_tokens: int, eos: Tensor,
    temperature: float, forbidden: Tensor,
) -> Tensor:  # fmt: skip
    """Sample G completions of each of B prompts: token ids [B * G, C], C <= max_tokens.

    noise: uniform numbers in [0, 1), [B * G, max_tokens] float64, which decide the tokens; None takes the most
    probable token instead. Behind its first EOS a row is filled with EOS, which completion_mask leaves out.
    """
    rows = torch.arange(len(inputs["input_ids"]) * group_size, device=eos.device)
    prompts, ids = prefill(model, inputs), eos[0].repeat(len(rows), max_tokens)
    with prompts_in_common(model, prompts.cache, crosses=bool(prompts.sight)):  # read in one place: fork copies nothing
        prefix, going = fork(prompts, rows // group_size), rows  # going: the rows that have not ended
        logits = prefix.logits
        for t in range(max_tokens):
            logp = log_distribution(logits, temperature, forbidden)
            if noise is None:
                token = logp.argmax(-1)
            else:
                # The inverse of the cumulative distribution, in float64: float32 sums over 150,000 tokens lose the rare.
                # right=True, or noise that is 0 would take a first token of probability 0.
                cdf = logp.double().exp().cumsum(-1)
                token = torch.searchsorted(cdf, noise[going, t, None] * cdf[:, -1:], right=True).squeeze(1)
            ids[going, t] = token
            on = (~torch.isin(token, eos)).nonzero().squeeze(1)
            if t + 1 == max_tokens or len(on) == 0:
                break
            if len(on) < len(going):  # finished rows leave, so that the longest answer does not cost for all
                prefix, going, token = fork(prefix, on), going[on], token[on]
            logits = branch(model, prefix, token[:, None])[:, -1]
    return ids[:, : max(t + 1, 2)]  # two columns at least, so that all processes make the same calls when scoring


def completion_mask(ids: Tensor, eos: Tensor) -> Tensor:
    """True up to and including the first EOS of each row, [B * G, C]: the EOS is trained, what follows is not."""
    is_eos = torch.isin(ids, eos)
    return (is_eos.cumsum(1) - is_eos.long()) == 0  # by position: where pad == eos, a mask by value would drop the EOS


def group_advantages(rewards: Tensor, scale: bool = True) -> Tensor:
    """A = (r - mean) / (std + 1e-4) within each group, std with ddof 1; rewards and result [B, G]. Visual-RFT eq. 2.

    A group whose rewards are all equal gets 0: nothing to learn from it. scale=False leaves out the division, which
    weighs very easy and very hard prompts up (Dr. GRPO, arXiv 2503.20783).
    """
    centered = rewards - rewards.mean(1, keepdim=True)
    return centered / (rewards.std(1, keepdim=True) + 1e-4) if scale else centered


def token_logps(logits: Tensor, ids: Tensor, temperature: float, forbidden: Tensor) -> tuple[Tensor, Tensor]:
    """log pi of the tokens that were chosen, and the entropy of what they were chosen from (no gradient).

    logits [N, C, V], ids [N, C]; both results [N, C] float32. Tokens are done FLOAT32_BLOCK numbers at a time, each block
    recomputed in the backward pass, so that no float32 tensor of all logits ever exists.
    """

    def tokens(logits: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        logp = log_distribution(logits, temperature, forbidden)
        with torch.no_grad():
            entropy = torch.special.entr(logp.exp()).sum(-1)  # entr(0) = 0, where p * log p would be 0 * inf
        return logp.gather(-1, ids[..., None]).squeeze(-1), entropy

    at_once = max(1, FLOAT32_BLOCK // logits.shape[-1])
    blocks = zip(logits.flatten(0, 1).split(at_once), ids.flatten().split(at_once))
    parts = [checkpoint(tokens, *block, use_reentrant=False) for block in blocks]
    return tuple(torch.cat(part).view_as(ids) for part in zip(*parts))


class CompletionLogps(nn.Module):
    """The log-probabilities of completions as one forward of one module, which is what DDP can wrap.

    micro_batch: completions at once, 0 for all; chunks are recomputed in the backward pass, so memory holds one of them.
    """

    def __init__(self, model: nn.Module, micro_batch: int = 0):
        super().__init__()
        self.model, self.micro_batch = model, micro_batch

    def forward(self, inputs: dict, ids: Tensor, group_size: int, temperature: float, forbidden: Tensor):
        """inputs: B prompts; ids [B * G, C]. Returns log pi_theta(o_t | q, o_<t) and entropy, both [B * G, C]."""
        if not shares_prompt(self.model):
            return token_logps(repeated_logits(self.model, inputs, ids, group_size), ids, temperature, forbidden)
        prompts = prefill(self.model, inputs)

        def score(rows: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
            prefix = fork(prompts, rows)
            first = token_logps(prefix.logits[:, None], ids[:, :1], temperature, forbidden)  # predicted by the prompt
            if ids.shape[1] == 1:
                return first
            rest = token_logps(branch(self.model, prefix, ids[:, :-1]), ids[:, 1:], temperature, forbidden)
            return tuple(torch.cat(pair, 1) for pair in zip(first, rest))

        rows = torch.arange(len(ids), device=ids.device) // group_size
        if not 0 < self.micro_batch < len(ids):
            return score(rows, ids)
        chunks = zip(*(x.split(self.micro_batch) for x in (rows, ids)))
        return tuple(map(torch.cat, zip(*(checkpoint(score, *chunk, use_reentrant=False) for chunk in chunks))))


def kl_to_reference(logp: Tensor, logp_ref: Tensor) -> Tensor:
    """The k3 estimate of KL(pi_theta || pi_ref) per token: exp(d) - d - 1 with d = logp_ref - logp. GRPO eq. 4."""
    d = logp_ref - logp
    return torch.expm1(d) - d  # never negative, unbiased for tokens of pi_theta; expm1 keeps the digits near d = 0


def token_weights(mask: Tensor, loss: str, max_completion_tokens: int) -> tuple[Tensor, Tensor]:
    """What each token's loss counts, [N, C], and what the sum is to be divided by: mean over what?

    grpo     mean over a completion's tokens, then over completions (the paper): each completion weighs the same,
             so a token of a short completion weighs more
    dr_grpo  sum over tokens / max_completion_tokens, then mean over completions: no length bias
    dapo     mean over all tokens of the optimizer step (arXiv 2503.14476): each token weighs the same

    The divisor is this mask's share of it; the caller adds up the shares of all processes.
    """
    tokens = mask.sum(1, keepdim=True)
    weight = dict(zip(LOSSES, (1.0 / tokens.clamp(min=1), 1.0 / max_completion_tokens, 1.0)))[loss]
    divisor = tokens.sum() if loss == "dapo" else (tokens > 0).sum()
    return mask * weight, divisor


def grpo_loss(
    logp: Tensor, logp_old: Tensor, logp_ref: Tensor | None, advantages: Tensor, weights: Tensor,
    eps_low: float, eps_high: float, beta: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Sum over tokens of weight * (-min(rho A, clip(rho) A) + beta KL). GRPO eq. 3.

    logp, logp_old, logp_ref [N, C]: of pi_theta, of the policy that sampled, of the reference (None: no KL term);
    advantages [N]; weights [N, C], 0 on tokens that do not count. Returns the loss and, per token [N, C], the KL
    and whether the clip stopped the advantage's gradient.
    """
    counted = weights > 0
    rho = torch.where(counted, logp - logp_old, 0.0).exp()  # masked before exp: on padding, inf * 0 would be NaN
    A = advantages[:, None]
    unclipped, clipped = rho * A, rho.clamp(1 - eps_low, 1 + eps_high) * A
    # The minimum stops a change for the better at the edge, never one for the worse: with A < 0 and rho = 1.5 it is
    # 1.5 A, and the gradient pulls the token down; with A > 0 and rho = 1.5 it is the clipped constant.
    loss = -torch.minimum(unclipped, clipped)
    reference = logp if logp_ref is None else logp_ref  # KL 0 without a reference
    kl = kl_to_reference(torch.where(counted, logp, 0.0), torch.where(counted, reference, 0.0))
    return (weights * (loss + beta * kl)).sum(), kl.detach(), (clipped < unclipped).detach()


def rollout(run: "Run", prompts: list[Prompt], step: int) -> "Rollout":
    """Items 2 to 4 of the method; a group lives on one process, so comparing needs no communication."""
    cfg, G = run.cfg, run.cfg.group_size
    with run.timer("sample"), torch.no_grad(), run.autocast(), run.gathered():
        noise, inputs = run.noise(prompts, step), run.collate(prompts)
        ids = sample(run.model, inputs, G, noise, cfg.max_completion_tokens, run.eos, **run.distribution)
    mask, truncated = completion_mask(ids, run.eos), ~torch.isin(ids, run.eos).any(1)
    texts = run.decode(ids, mask)  # for the rewards only: training uses the sampled ids, never text tokenized again
    parts = {
        name: torch.tensor([reward(text, prompts[i // G].solution) for i, text in enumerate(texts)]).view(-1, G)
        for name, (reward, _) in run.rewards.items()
    }
    rewards = sum(weight * parts[name] for name, (_, weight) in run.rewards.items())
    advantages = group_advantages(rewards, scale=cfg.loss != "dr_grpo").flatten().to(run.device)
    return Rollout(prompts, ids, mask, truncated, texts, parts, rewards, advantages)


def update(run: "Run", ro: "Rollout", metrics: "Averages") -> None:
    """Items 5 to 7: `inner_epochs` optimizer steps on one rollout, each over micro-batches of whole groups."""
    cfg, G, processes = run.cfg, run.cfg.group_size, run.accelerator.num_processes
    counted = ro.mask & ~ro.truncated[:, None] if cfg.mask_truncated else ro.mask
    weights, share = token_weights(counted, cfg.loss, cfg.max_completion_tokens)
    divisor = run.accelerator.reduce(share.float(), "sum").clamp(min=1)
    batches = []
    for start in range(0, len(ro.prompts), cfg.prompts_per_forward):
        rows = slice(start * G, (start + cfg.prompts_per_forward) * G)
        C = max(2, int(ro.mask[rows].sum(1).max()))  # as long as the longest completion in it
        at = (rows, slice(C))  # this micro-batch within the rollout's [N, C] tensors
        batches.append((run.collate(ro.prompts[start : start + cfg.prompts_per_forward]), at))
    logps_ref: list[Tensor | None] = [None] * len(batches)
    if run.reference is not None:
        with run.timer("reference"), torch.no_grad(), run.autocast():
            logps_ref = [run.reference(inputs, ro.ids[at], G, **run.distribution)[0] for inputs, at in batches]
    terms, logps_old = (cfg.eps_low, cfg.eps_high, cfg.beta), []
    for epoch in range(cfg.inner_epochs):
        for i, (inputs, at) in enumerate(batches):
            with run.timer("train"), run.accumulate(last=i + 1 == len(batches)):
                with run.autocast():
                    logp, entropy = run.policy(inputs, ro.ids[at], G, **run.distribution)
                if epoch == 0:
                    # The policy has not moved since it sampled, so its own value is pi_old's: rho = 1. The "grpo" loss
                    # is then about 0, as advantages add up to 0; its gradient, mean of -A grad log pi_theta, is not.
                    logps_old.append(logp.detach())
                A, w = ro.advantages[at[0]], weights[at]
                loss, kl, clipped = grpo_loss(logp, logps_old[i], logps_ref[i], A, w, *terms)
                loss = loss * processes / divisor  # DDP averages over processes; the divisor counts all of them
                loss.backward()
            metrics.add("loss", loss.detach(), 1 / len(batches))
            metrics.add_tokens(counted[at], kl=kl, clip_fraction=clipped, entropy=entropy)
        run.optimizer_step(metrics)


# ================================================================================================
# The machinery: from a command line to a run.


class Averages(dict):
    """Sums and counts by name, so that means stay exact over micro-batches and processes of unequal size."""

    def add(self, name: str, total, count=1) -> None:
        self[name] = self.get(name, 0.0) + torch.tensor([float(total), float(count)], dtype=torch.float64)

    def add_tokens(self, counted: Tensor, **values: Tensor) -> None:
        """Values per token, of which the counted ones count."""
        for name, value in values.items():
            self.add(name, value[counted].sum(), counted.sum())

    def reduce(self, accelerator: Accelerator) -> dict[str, float]:
        """The means over all processes, which must hold the same names."""
        table = accelerator.reduce(torch.stack(list(self.values())).to(accelerator.device), "sum").tolist()
        return {name: total / count if count > 0 else 0.0 for name, (total, count) in zip(self, table)}


class Rollout(NamedTuple):
    """What one step of one process sampled and how it was judged."""

    prompts: list[Prompt]
    ids: Tensor  # [B * G, C]
    mask: Tensor  # [B * G, C], completion_mask
    truncated: Tensor  # [B * G], no EOS within the limit
    texts: list[str]  # B * G
    parts: dict[str, Tensor]  # every reward by name, [B, G]
    rewards: Tensor  # their weighted sum, [B, G]
    advantages: Tensor  # [B * G]


@dataclass
class Run:
    """What the functions of a run share."""

    cfg: Config
    accelerator: Accelerator
    processor: Any
    prompts: Prompts  # the training examples; with --eval_only those to evaluate, with --ask the questions
    model: nn.Module  # the policy itself: samples, and is saved
    policy: nn.Module | None  # CompletionLogps of it, in DDP where processes hold copies: trains
    reference: Callable | None  # CompletionLogps of the initial model, frozen; None with beta 0
    adapters: Any  # peft's handle on the model's adapters; None without --lora_rank
    optimizer: torch.optim.Optimizer | None
    rewards: dict[str, tuple[Any, float]]  # of GRPO: by name, reward(completion, solution) and weight
    eos: Tensor
    distribution: dict[str, Any]  # temperature and forbidden ids, for sampler and scorer alike
    save_dtype: torch.dtype  # of the weights as they came
    checkpoint: Checkpoint | None  # what --resume goes on from
    seconds: dict[str, float]

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    def say(self, text: str) -> None:
        if self.accelerator.is_main_process:
            print(text, flush=True)

    def autocast(self):
        """bf16 on GPUs over float32 weights; one context around a whole rollout, so that weights are cast once."""
        return torch.autocast("cuda", torch.bfloat16, enabled=self.device.type == "cuda")

    @contextlib.contextmanager
    def gathered(self):
        """Sharded weights are gathered once for everything inside, not at every token, and without waiting for others."""
        shards = [module for module in self.model.modules() if isinstance(module, FSDPModule)]
        for module in shards:
            module.set_reshard_after_forward(False, recurse=False)
            module.unshard()
        yield
        for module in shards:
            module.set_reshard_after_forward(True, recurse=False)
            module.reshard()

    def accumulate(self, last: bool):
        """DDP exchanges gradients only with the last micro-batch; shards take their part of each, which costs no memory."""
        return contextlib.nullcontext() if last or self.cfg.shard else self.accelerator.no_sync(self.policy)

    def collate(self, prompts: list[Prompt]) -> dict[str, Tensor]:
        batch = data.collate(prompts, self.processor.tokenizer.pad_token_id or 0)
        return {name: tensor.to(self.device) for name, tensor in batch.items()}

    def noise(self, prompts: list[Prompt], step: int) -> Tensor:
        """sampling_noise of these prompts in this step: whatever the batch and the number of processes."""
        keys = [f"{self.cfg.seed}/{step}/{p.slot}/{p.example.id}" for p in prompts]
        return sampling_noise(keys, self.cfg.group_size, self.cfg.max_completion_tokens).to(self.device)

    def decode(self, ids: Tensor, mask: Tensor) -> list[str]:
        """The texts of completions, without the EOS and whatever follows it."""
        rows = [row[keep].tolist() for row, keep in zip(ids, mask & ~torch.isin(ids, self.eos))]
        return self.processor.tokenizer.batch_decode(rows, skip_special_tokens=True)

    def optimizer_step(self, metrics: Averages) -> None:
        """Clip and step. A gradient that is not finite updates nothing, on any process, and is counted."""
        with self.timer("train"):
            trained = [p for p in self.policy.parameters() if p.requires_grad]
            norm = float(models.whole_tensor(nn.utils.clip_grad_norm_(trained, self.cfg.max_grad_norm)))
            finite = math.isfinite(norm)  # of gradients that were exchanged: every process sees the same norm
            if finite:
                self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        metrics.add("grad_norm", norm if finite else 0.0, finite)
        metrics.add("skipped_updates", not finite)

    @contextlib.contextmanager
    def timer(self, phase: str):
        """Add the seconds of a phase to self.seconds; GPUs work behind the clock, hence the synchronization."""
        wait = torch.cuda.synchronize if self.device.type == "cuda" else lambda: None
        wait()
        start = time.perf_counter()
        yield
        wait()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start


def sampling_noise(keys: list[str], group_size: int, max_tokens: int) -> Tensor:
    """Uniform numbers [B * G, max_tokens] in [0, 1), one generator per prompt: the same in any batch, on any process."""
    seeds = [int.from_bytes(hashlib.blake2b(key.encode(), digest_size=7).digest(), "big") for key in keys]
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return torch.cat([torch.rand(group_size, max_tokens, dtype=torch.float64, generator=g) for g in generators])


# ------------------------------------------------------------------------------------------------
# From a command line to what a run needs.

RESUME_MAY_CHANGE = (  # where things lie, what is shown and how memory is used; the data is compared by its content
    "out", "data", "eval_data", "overwrite", "resume", "save_every", "keep_last", "workers", "prompts_per_forward",
    "micro_batch", "shard", "eval_every", "eval_limit", "eval_batch", "picture_every", "report_to",
)  # fmt: skip

Rule = tuple[str, Any, str]  # flag, whether its value is good, what would be right


def obey(cfg: Any, rules: Iterable[Rule]) -> None:
    """SystemExit at the first rule that the command line breaks."""
    for flag, good, right in rules:
        if not good:
            raise SystemExit(f"--{flag} {getattr(cfg, flag)}: must be {right}")


def launched() -> int:
    """How many processes the launcher started."""
    return int(os.environ.get("WORLD_SIZE", 1))


def at_least_1(cfg: Any, *flags: str) -> list[Rule]:
    return [(flag, getattr(cfg, flag) >= 1, "at least 1") for flag in flags]


def out_rules(cfg: Any, *used: str, may_exist: bool) -> list[Rule]:
    """A run folder is its own, and an earlier run in it is not lost by accident; used: flags of what it must not hold."""
    out, paths = Path(cfg.out).resolve(), [Path(path).resolve() for flag in used if (path := getattr(cfg, flag))]
    right = "new: an earlier run is there; --resume true goes on with it, --overwrite true replaces it"
    return [
        (
            "out",
            evaluate.is_run_or_new(out),
            "another folder: config.json in it is not a run's, and will not be touched",
        ),
        ("out", may_exist or not (out / "config.json").exists(), right),
        ("out", not any(out == path or out in path.parents for path in paths), f"outside --{', --'.join(used)}"),
    ]


def training_rules(cfg: Any, processes: int) -> list[Rule]:
    """What any method of training asks of its flags, on so many processes."""
    return [
        *at_least_1(cfg, "prompts_per_step", "prompts_per_forward", "keep_last"),
        ("prompts_per_step", cfg.prompts_per_step % processes == 0, f"a multiple of the {processes} processes"),
        ("lr", cfg.lr > 0, "above 0"),
        ("warmup_steps", cfg.warmup_steps >= 0, "0 or a number of steps"),
        ("beta2", 0 <= cfg.beta2 < 1, "at least 0 and below 1"),
        ("weight_decay", cfg.weight_decay >= 0, "0 or more"),
        ("max_grad_norm", cfg.max_grad_norm > 0, "above 0"),
        ("workers", cfg.workers >= 0, "0 (none of its own) or a number of processes"),
        ("min_pixels", 1 <= cfg.min_pixels <= cfg.max_pixels, "at least 1 and at most --max_pixels"),
        ("lora_rank", cfg.lora_rank >= 0, "0 (all weights) or a rank"),
        ("lora_rank", not (cfg.lora_rank and cfg.shard), "0 with --shard: adapters are small enough to be copied"),
        ("micro_batch", cfg.micro_batch >= 0, "0 (all at once) or a number of completions"),
        ("save_every", cfg.save_every >= 0, "0 (only when interrupted) or a number of steps"),
        ("resume", not (cfg.resume and cfg.overwrite), "without --overwrite"),
    ]


def parse_config(argv: list[str] | None = None) -> Config:
    """Read and check the command line; SystemExit names the flag that is wrong and what would be right."""
    cfg = Parser(
        Config, usage="accelerate launch virft.py --task TASK --data DIR --model NAME [flags]",
        description="ViRFT: GRPO for vision-language models with verifiable rewards",
    ).settings(argv)  # fmt: skip
    evaluates = cfg.eval_only or cfg.ask
    obey(cfg, [
        ("task", cfg.task in data.TASKS, f"one of {', '.join(data.TASKS)}"),
        ("group_size", cfg.group_size >= 2, "at least 2: advantages compare completions of the same prompt"),
        ("loss", cfg.loss in LOSSES, f"one of {', '.join(LOSSES)}"),
        ("eval_categories", cfg.eval_categories in evaluate.ASKED, f"one of {', '.join(evaluate.ASKED)}"),
        ("coordinates", cfg.coordinates in ("auto", *data.CONVENTIONS), f"auto, {' or '.join(data.CONVENTIONS)}"),
        ("temperature", cfg.temperature > 0, "above 0; evaluation is greedy anyway"),
        *at_least_1(cfg, "steps", "inner_epochs", "max_completion_tokens", "eval_batch"),
        ("beta", cfg.beta >= 0, "0 or more"),
        ("eps_low", 0 <= cfg.eps_low < 1, "at least 0 and below 1"),
        ("eps_high", cfg.eps_high >= 0, "0 or more"),
        ("iou_threshold", 0 <= cfg.iou_threshold < 1, "at least 0 and below 1"),
        ("shots", cfg.shots is None or cfg.shots >= 1, "at least 1"),
        ("eval_every", cfg.eval_every >= 0, "0 (never) or a number of steps"),
        ("picture_every", cfg.picture_every >= 0, "0 (never) or a number of steps"),
        ("resume", not (cfg.resume and evaluates), "without --eval_only and --ask"),
        ("check", not (cfg.check and evaluates), "without --eval_only and --ask"),
        *training_rules(cfg, 1 if evaluates else launched()),  # an evaluation shares out whatever there is
    ])  # fmt: skip
    if not cfg.ask:
        may_exist = cfg.check or cfg.overwrite or cfg.resume or evaluate.unfinished(Path(cfg.out), asdict(cfg))
        obey(cfg, out_rules(cfg, "model", "data", "eval_data", may_exist=may_exist))
    elif data.TASKS[cfg.task].asks_for:
        obey(cfg, [("ask", cfg.categories, "together with --categories, what to look for")])
    return cfg


def rewards_of(cfg: Config) -> dict[str, tuple[Any, float]]:
    """What --rewards asks for, or the task's own: {name: (reward(completion, solution), weight)}."""
    try:
        weights = reward_weights(cfg.rewards) or data.TASKS[cfg.task].rewards
        chosen = choose_rewards(weights, iou_threshold=cfg.iou_threshold, think=cfg.think)
        if taken := chosen.keys() & {"step", "id", "completion", "reward", "advantage", "tokens", "std"}:
            raise ValueError(
                f"a column of rollouts.jsonl or metrics.jsonl has the name {', '.join(taken)}: rename yours"
            )
        return chosen
    except ValueError as error:
        raise SystemExit(f"--rewards {' '.join(cfg.rewards)}: {error}") from None


def load_examples(cfg: Config, split: str) -> list[Example]:
    """The task's examples of a split; what was left out and why is printed."""
    training, task = split == "train", data.TASKS[cfg.task]
    source = (not training and cfg.eval_data) or cfg.data or task.hub_data
    chosen = {
        "categories": cfg.categories,
        "negatives": cfg.negatives,
        "seed": cfg.seed,
        "skip_bad_images": cfg.skip_bad_images,
    }
    if training:
        chosen |= {"shots": cfg.shots, "max_boxes": cfg.max_boxes}
    else:
        chosen |= {"limit": cfg.eval_limit, "eval_categories": cfg.eval_categories}
    with models.loading("dataset", source):
        examples, notes = data.load_examples(task, source, split, **chosen)
    if int(os.environ.get("RANK", 0)) == 0:
        print("\n".join(notes), flush=True)
    return examples


def freeze_unreachable(run: Run) -> list[str]:
    """Freeze parameters that no completion's log-probability depends on, and return their names.

    DDP waits for a gradient of every trainable parameter and would stop at the second step.
    """
    first = run.collate(data.whole([run.prompts[0, 0]]))
    with run.autocast():
        logp, _ = run.policy(first, run.eos[:1].repeat(1, 2), 1, **run.distribution)
    unreached = models.unreachable(run.model, logp)
    for parameter in unreached.values():
        parameter.requires_grad_(False)
    return list(unreached)


def start(cfg: Config) -> Run:
    """Load everything that training, evaluation or a question needs."""
    accelerator = make_accelerator(cfg.out, cfg.report_to, cfg.shard)
    task, training = data.TASKS[cfg.task], not (cfg.eval_only or cfg.ask)
    rewards = rewards_of(cfg)  # before anything large is loaded
    saved = find_checkpoint(cfg) if cfg.resume else None
    processor, fit, coordinates = models.load_processor(
        cfg.model, cfg.revision, cfg.max_pixels, cfg.min_pixels, cfg.coordinates
    )
    if cfg.ask:
        examples = data.questions(task, Path(cfg.ask), cfg.categories)
    else:
        examples = load_examples(cfg, "train" if training else "val")
    room = models.max_positions(cfg.model, cfg.revision) - cfg.max_completion_tokens
    prompts = Prompts(
        task, examples, processor, fit, coordinates, cfg.think, cfg.system_prompt, room, cfg.skip_bad_images
    )
    if training:
        run = load_trained(cfg, accelerator, prompts, saved)
        run.distribution["temperature"] = cfg.temperature
        make_trainable(run, reference=cfg.beta > 0)
    else:
        run = load_frozen(cfg, accelerator, prompts)
    run.rewards = rewards
    return run


def find_checkpoint(cfg: Any, may_change: Sequence[str] = RESUME_MAY_CHANGE) -> Checkpoint:
    """What --resume goes on from."""
    return models.find_checkpoint(Path(cfg.out), asdict(cfg), asdict(type(cfg)()), may_change)


def load_frozen(cfg: Any, accelerator: Accelerator, prompts: Prompts) -> Run:
    """A run that only samples."""
    device = accelerator.device
    return make_run(
        cfg, accelerator, prompts, models.load_model(cfg.model, cfg.revision, models.frozen_dtype(device), device)
    )


def load_trained(cfg: Any, accelerator: Accelerator, prompts: Prompts, saved: Checkpoint | None) -> Run:
    """A run whose model `make_trainable` can train: float32 where it is trained, with the adapters of --lora_rank."""
    if saved and saved.data != (found := data_fingerprint(prompts.examples)):
        raise SystemExit(f"--resume true: the data has changed: {saved.data} before, {found} now")
    device, adapters = accelerator.device, None
    if saved and not cfg.lora_rank:
        model = models.load_model(saved.model, None, torch.float32, device)
    else:
        dtype = models.frozen_dtype(device) if cfg.lora_rank else torch.float32
        model = models.load_model(cfg.model, cfg.revision, dtype, device)
    if cfg.lora_rank:
        torch.manual_seed(cfg.seed)  # adapters are the one thing that starts at random
        adapters = models.add_adapters(model, cfg.lora_rank, saved and Path(saved.model))
    return make_run(cfg, accelerator, prompts, model, adapters, saved)


def make_run(
    cfg: Any, accelerator: Accelerator, prompts: Prompts, model: nn.Module, adapters: Any = None, saved: Checkpoint | None = None
) -> Run:  # fmt: skip
    """Put together what was loaded."""
    special = models.special_tokens(model, prompts.processor)
    eos, forbidden = (torch.tensor(ids, dtype=torch.long, device=accelerator.device) for ids in special)
    return Run(
        cfg, accelerator, prompts.processor, prompts, model, policy=None, reference=None, adapters=adapters, optimizer=None,
        rewards={}, eos=eos, distribution={"temperature": 1.0, "forbidden": forbidden},
        save_dtype=AutoConfig.from_pretrained(cfg.model, revision=cfg.revision).dtype or torch.float32,
        checkpoint=saved, seconds={},
    )  # fmt: skip


def data_fingerprint(examples: list[Example]) -> str:
    return models.fingerprint((e.id, e.category, e.solution, e.question) for e in examples)


def make_accelerator(out: str, report_to: Sequence[str] = (), shard: bool = False) -> Accelerator:
    """What accelerate knows of the launch; SystemExit where processes would not find each other."""
    ddp = DistributedDataParallelKwargs(gradient_as_bucket_view=True)  # no second copy of all gradients
    accelerator = Accelerator(
        cpu=not torch.cuda.is_available(), mixed_precision="no", log_with=report_to or None, project_dir=out,
        kwargs_handlers=[ddp],
    )  # fmt: skip
    if accelerator.num_processes != launched():
        raise SystemExit(
            f"{launched()} processes were launched, accelerate sees {accelerator.num_processes}: each would train alone"
        )
    if accelerator.distributed_type not in (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU):
        raise SystemExit(f"{accelerator.distributed_type.value} is not supported: launch without it; see --shard")
    if shard and accelerator.num_processes == 1:
        raise SystemExit("--shard true: there is one process, and nothing to share out; launch several")
    return accelerator


def make_trainable(run: Run, reference: bool) -> None:
    """Decide what is trained, spread it over the processes, and make the optimizer and, if wanted, the reference."""
    cfg, model, frozen_dtype = run.cfg, run.model, models.frozen_dtype(run.device)
    run.policy = CompletionLogps(model, cfg.micro_batch)
    if cfg.freeze_vision:
        models.freeze_vision(model)
        run.say("frozen by --freeze_vision: everything outside the language model")
    if frozen := freeze_unreachable(run):
        run.say(f"frozen, because no completion depends on them: {', '.join(frozen)}")
    counts = [p.numel() for p in model.parameters() if p.requires_grad], [p.numel() for p in model.parameters()]
    run.say(f"{sum(counts[0]):,} of {sum(counts[1]):,} parameters are trained")
    if cfg.shard:
        models.shard(model)
    else:
        for parameter in model.parameters():
            if not parameter.requires_grad:
                parameter.data = parameter.data.to(frozen_dtype)
        run.policy = run.accelerator.prepare(run.policy)  # DDP, where there are several processes
    trained = [p for p in model.parameters() if p.requires_grad]
    run.optimizer = torch.optim.AdamW(
        trained, lr=cfg.lr, betas=(0.9, cfg.beta2), weight_decay=cfg.weight_decay, fused=True
    )
    if run.checkpoint:
        run.checkpoint.load_optimizer(model, run.optimizer)
    if reference and run.adapters:
        run.reference = adapters_off(run)
    elif reference:
        initial = models.load_model(cfg.model, cfg.revision, frozen_dtype, run.device).requires_grad_(False)
        if cfg.shard:
            models.shard(initial)
        run.reference = CompletionLogps(initial, cfg.micro_batch).eval()


def adapters_off(run: Run) -> Callable:
    """The initial model's log-probabilities: the policy's, with its adapters switched off."""
    logps = CompletionLogps(run.model, run.cfg.micro_batch)

    def reference(*inputs, **settings):
        with run.adapters.disable_adapter():
            return logps(*inputs, **settings)

    return reference


def describe(run: Run) -> str:
    """The resolved configuration, the batch arithmetic and the first prompt, as a person should check them."""
    cfg, examples, lines = run.cfg, run.prompts.examples, []
    (first,) = data.whole([run.prompts[0, 0]])
    if run.optimizer is not None:
        lines.append(describe_steps(run, cfg.group_size, "completions"))
        answers = [
            len(run.processor.tokenizer(data.model_answer(run.prompts.task, e, first.target, cfg.think))["input_ids"])
            for e in examples[:2000]
        ]
        if too_long := sum(tokens >= cfg.max_completion_tokens for tokens in answers):
            lines.append(
                f"{too_long} of {len(answers)} examples have an answer that does not fit in --max_completion_tokens "
                f"{cfg.max_completion_tokens} (the longest: {max(answers)} tokens): raise it"
                + (", or leave them out by --max_boxes" if run.prompts.task.boxes else "")
            )
    lines.append(
        f"coordinates of the first image: {first.target[0]} x {first.target[1]} ({first.example.coordinates or run.prompts.coordinates})"
    )
    return "\n".join([describe_settings(cfg), *lines, describe_prompt(run, first)])


def describe_settings(cfg: Any) -> str:
    return "\n".join(f"  {name} = {value!r}" for name, value in asdict(cfg).items())


def describe_steps(run: Run, group_size: int, what: str) -> str:
    """How the prompts of a step are shared out; the same command means the same training on any number of processes."""
    cfg, n, examples = run.cfg, run.accelerator.num_processes, len(run.prompts.examples)
    each = cfg.prompts_per_step // n
    assert each * n == cfg.prompts_per_step
    return (
        f"{cfg.prompts_per_step} prompts a step = {n} processes x {each}, in {math.ceil(each / cfg.prompts_per_forward)} "
        f"micro-batches of up to {cfg.prompts_per_forward}; x {group_size} {what} = {cfg.prompts_per_step * group_size} a step; "
        f"{cfg.steps} steps are {cfg.steps * cfg.prompts_per_step / examples:.2f} epochs of {examples} examples"
    )


def describe_prompt(run: Run, first: Prompt) -> str:
    """A prompt as the model reads it, runs of image tokens counted."""
    lines, ids = [], first.inputs["input_ids"][0]
    if not shares_prompt(run.model):
        lines.append(
            "linear attention: prompts are shared in sampling, but repeated for each completion in scoring and training, "
            "all completions at once whatever --micro_batch says"
        )
    shown = run.processor.tokenizer.decode(ids)
    for token in run.distribution["forbidden"].tolist():
        name, count = run.processor.tokenizer.decode([token]), int((ids == token).sum())
        shown = shown.replace(name * count, f"{name} x {count} ") if count > 1 else shown
    return "\n".join([*lines, f"first prompt, {len(ids)} tokens:", shown])


# ------------------------------------------------------------------------------------------------
# Training.


def prompt_stream(run: Run, done: int) -> DataLoader:
    """For each step after the first `done` the list of this process's prompts.

    Every epoch sees each example once, in an order of its own that the seed decides: there is no state to be saved.
    """
    cfg, accelerator = run.cfg, run.accelerator
    order, epoch = [], 0
    while len(order) < cfg.steps * cfg.prompts_per_step:
        order += random.Random(f"{cfg.seed}/{epoch}").sample(
            range(len(run.prompts.examples)), len(run.prompts.examples)
        )
        epoch += 1
    mine = range(accelerator.process_index, cfg.prompts_per_step, accelerator.num_processes)
    steps = [[(slot, order[step * cfg.prompts_per_step + slot]) for slot in mine] for step in range(done, cfg.steps)]
    return DataLoader(run.prompts, batch_sampler=steps, collate_fn=list, num_workers=cfg.workers)


def grpo_step(run: Run, prompts: list[Prompt], step: int, metrics: Averages) -> list[dict]:
    """One step of the method, and now and then a picture of its first answer; returns the rows of rollouts.jsonl."""
    ro = rollout(run, prompts, step)
    update(run, ro, metrics)
    rollout_metrics(run, ro, metrics)
    if run.accelerator.is_main_process and run.cfg.picture_every and step % run.cfg.picture_every == 0:
        picture = Path(run.cfg.out) / "pictures" / f"step_{step:06d}.png"
        evaluate.draw_answer(run.prompts.task, ro.prompts[0], ro.texts[0], picture)
    return rollout_records(ro, step)


def rollout_metrics(run: Run, ro: Rollout, metrics: Averages) -> None:
    """Everything about the samples; `update` adds what it alone knows."""
    lengths, n = ro.mask.sum(1), len(ro.texts)
    metrics.add("reward", ro.rewards.sum(), n)
    for name, values in ro.parts.items():
        metrics.add(f"reward_{name}", values.sum(), n)
    metrics.add("reward_std", ro.rewards.std(1).sum(), len(ro.rewards))
    metrics.add("zero_variance_groups", (ro.rewards == ro.rewards[:, :1]).all(1).sum(), len(ro.rewards))
    metrics.add("completion_tokens", lengths.sum(), n)
    metrics.add("truncated", ro.truncated.sum(), n)
    for name, share in evaluate.answer_shares(ro.texts, data.TASKS[run.cfg.task].parse).items():
        metrics.add(name, share * n, n)
    metrics.add("tokens_per_second", lengths.sum() * run.accelerator.num_processes, run.seconds["sample"])


def rollout_records(ro: Rollout, step: int) -> list[dict]:
    """One line of rollouts.jsonl per completion."""
    G = ro.rewards.shape[1]
    columns = {"reward": ro.rewards, **ro.parts, "advantage": ro.advantages, "tokens": ro.mask.sum(1)}
    numbers = {name: [round(value, 4) for value in values.flatten().tolist()] for name, values in columns.items()}
    return [
        {"step": step, "id": ro.prompts[i // G].example.id, "completion": text}
        | {name: values[i] for name, values in numbers.items()}
        for i, text in enumerate(ro.texts)
    ]


def train(
    run: Run, take_step: Callable[..., list[dict]], shown: Sequence[str], held_out: Sequence[Example] = ()
) -> None:
    """`train_steps`, then save the model and draw the curves; after Ctrl-C there is a checkpoint to go on from."""
    cfg, out, stop = run.cfg, Path(run.cfg.out), StopAtSignal()
    try:
        step = train_steps(run, take_step, shown, held_out, stop)
    except Exception:
        # Shards cannot be gathered here: the other processes may not have failed.
        if run.accelerator.is_main_process and (out / "metrics.jsonl").exists() and not cfg.shard:
            save_result(run)
            print(f"an error ended training; the model as it was is in {out / 'model'}", file=sys.stderr)
        raise
    if step < cfg.steps:
        run.say(f"{step} of {cfg.steps} steps done; --resume true goes on from {models.checkpoint_folder(out, step)}")
    else:
        save_result(run)  # before anything that may fail
        run.say(f"{step} of {cfg.steps} steps done: model in {out / 'model'}, curves in {out / 'curves.png'}")
    stop.over()
    if run.accelerator.is_main_process:
        evaluate.plot_curves([out / "metrics.jsonl"], out / "curves.png")


def save_result(run: Run) -> None:
    """OUT/model, in the dtype that the model came in; adapters are merged into it for good, so this comes last."""
    if run.adapters:
        run.adapters.merge_and_unload()
    folder = Path(run.cfg.out) / "model"
    models.save_model(run.model, run.processor, folder, run.save_dtype, run.accelerator.is_main_process)


def learning_rate(cfg: Any, step: int) -> float:
    """Of step 1, 2, ...: linear warm-up, times a linear decay that would reach 0 behind the last step."""
    return cfg.lr * min(1.0, step / (cfg.warmup_steps + 1)) * (1.0 - (step - 1) / cfg.steps)


def write_step(run: Run, records: list[dict], row: dict) -> None:
    """A step's line of metrics.jsonl, and what each process has to tell of it, to rollouts.jsonl."""
    out, records = Path(run.cfg.out), gather_object(records)
    if run.accelerator.is_main_process:
        evaluate.append_rows(out / "rollouts.jsonl", records)
        evaluate.append_rows(out / "metrics.jsonl", [row])
    run.accelerator.log({name: value for name, value in row.items() if name != "step"}, step=row["step"])


def save_state(run: Run, step: int) -> None:
    """A checkpoint to resume from: what models.save_checkpoint writes, and what must not have changed by then."""
    state = {"step": step, "settings": asdict(run.cfg), "data": data_fingerprint(run.prompts.examples)}
    models.save_checkpoint(
        run.model, run.optimizer, run.processor, run.adapters, models.checkpoint_folder(Path(run.cfg.out), step), state,
        run.cfg.keep_last, run.accelerator.is_main_process,
    )  # fmt: skip


def train_steps(
    run: Run, take_step: Callable[..., list[dict]], shown: Sequence[str], held_out: Sequence[Example], stop: "StopAtSignal"
) -> int:  # fmt: skip
    """The loop of any method: take a step, write it down; evaluate and save now and then. Returns the last step's number.

    take_step(run, prompts, step, metrics) -> rows for rollouts.jsonl; shown: metrics beside the progress bar; held_out:
    examples for --eval_every.
    """
    cfg, accelerator, out = run.cfg, run.accelerator, Path(run.cfg.out)
    if cfg.report_to:
        accelerator.init_trackers("virft", config={name: str(value) for name, value in asdict(cfg).items()})
    skipped: set[str] = set()
    step = run.checkpoint.step if run.checkpoint else 0
    bar = tqdm(
        prompt_stream(run, step), initial=step, total=cfg.steps, disable=not accelerator.is_main_process, dynamic_ncols=True
    )  # fmt: skip
    for step, prompts in enumerate(bar, step + 1):
        for flaw in {flaw for prompt in data.whole(prompts) for flaw in prompt.skipped} - skipped:
            tqdm.write(f"skipped: {flaw}")
            skipped.add(flaw)
        metrics = Averages()
        run.seconds.clear()
        lr = learning_rate(cfg, step)
        for group in run.optimizer.param_groups:
            group["lr"] = lr
        records = take_step(run, prompts, step, metrics)
        for phase, seconds in run.seconds.items():
            metrics.add(f"seconds_{phase}", seconds)
        metrics.add("stop", stop.requested)
        row = {"step": step, "lr": lr, **metrics.reduce(accelerator)}
        interrupted = row.pop("stop") > 0  # agreed on by all processes
        write_step(run, records, row)
        bar.set_postfix({name: f"{row[name]:.3g}" for name in shown})
        if interrupted or cfg.save_every and step % cfg.save_every == 0:
            save_state(run, step)
        if held_out and step % cfg.eval_every == 0:
            scores = evaluate_model(run, held_out, out / f"eval_{step:06d}")
            accelerator.log({f"eval_{name}": value for name, value in scores.items()}, step=step)
        if interrupted:
            break
    bar.close()
    return step


class StopAtSignal:
    """Ctrl-C and SIGTERM let the step finish, then save and stop; a second one changes nothing.

    Launchers do not all pass signals on: torchrun does, and kills after 30 s (TORCH_ELASTIC_SHUTDOWN_TIMEOUT sets
    another limit); `accelerate launch` of one process does not, so SIGTERM belongs to the process of virft.py itself.
    """

    def __init__(self):
        self.requested = False
        self.process = os.getpid()  # workers of the loader inherit the handler, and leave the signal to us
        self.before = {number: signal.signal(number, self.request) for number in (signal.SIGINT, signal.SIGTERM)}

    def over(self) -> None:
        """Everything is saved: what comes now is interrupted as ever."""
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def request(self, number: int, frame) -> None:
        if not self.requested and os.getpid() == self.process:
            print(f"\n{signal.Signals(number).name}: finishing this step, then saving", file=sys.stderr, flush=True)
        self.requested = True


# ------------------------------------------------------------------------------------------------
# Evaluation and questions.


@torch.no_grad()
def answer(run: Run, prompts: list[Prompt]) -> list[str]:
    """The policy's most probable answers: the sampler of training, greedy."""
    with run.autocast():
        ids = sample(
            run.model, run.collate(prompts), 1, None, run.cfg.max_completion_tokens, run.eos, **run.distribution
        )
    return run.decode(ids, completion_mask(ids, run.eos))


def evaluate_model(run: Run, examples: Sequence[Example], out: Path) -> dict[str, float]:
    """Greedy answers to all examples, shared out over the processes; scores, predictions and pictures go to `out`.

    With --eval_only, answers that an interruption left in `out` are kept.
    """
    cfg, accelerator, task = run.cfg, run.accelerator, run.prompts.task
    kept = []
    if accelerator.is_main_process:
        if not cfg.eval_only:
            shutil.rmtree(out, ignore_errors=True)  # of an earlier training: other weights
        kept = evaluate.recover(out, examples)
    (kept,) = broadcast_object_list([kept])
    out.mkdir(parents=True, exist_ok=True)
    if kept:
        run.say(f"going on with {len(kept)} of {len(examples)} answers from {out}")
    left = sorted(set(range(len(examples))) - {record["row"] for record in kept})
    mine = left[accelerator.process_index :: accelerator.num_processes]
    batches = [[(i, i) for i in mine[at : at + cfg.eval_batch]] for at in range(0, len(mine), cfg.eval_batch)]
    loader = DataLoader(run.prompts.of(examples), batch_sampler=batches, collate_fn=list, num_workers=cfg.workers)
    records, bar = [], tqdm(loader, desc="evaluate", disable=not accelerator.is_main_process, dynamic_ncols=True)
    with run.gathered():
        for prompts in bar:
            if cfg.skip_bad_images:
                prompts = [prompt for prompt in prompts if not isinstance(prompt, DataError)]
            batch = []
            for prompt, text in zip(prompts, answer(run, data.whole(prompts)) if prompts else []):
                parts = {name: reward(text, prompt.solution) for name, (reward, _) in run.rewards.items()}
                batch.append({"row": prompt.slot} | evaluate.record(task, prompt.example, prompt.target, text, parts))
            evaluate.append_rows(evaluate.own_predictions(out, accelerator.process_index), batch)
            records += batch
    records = sorted([*kept, *gather_object(records)], key=lambda record: record["row"])
    scores, by_category = evaluate.scores(records, task)
    protocol = evaluate.protocol_of(task, cfg.eval_categories)
    if accelerator.is_main_process:
        evaluate.write_evaluation(out, task, protocol, records, scores, by_category, examples)
    if len(records) < len(examples):
        run.say(f"{len(examples) - len(records)} examples were skipped: their images do not open")
    run.say(
        f"{evaluate.report(scores, by_category, len(records), protocol)}\npredictions, results and pictures in {out}"
    )
    return scores


def ask(run: Run) -> None:
    """Answer --ask: print the completions and draw their boxes."""
    for example in run.prompts.examples:
        prompt = run.prompts.encode(example)
        (text,) = answer(run, [prompt])
        asked = re.sub(r"\W+", "_", example.category)[:40]
        path = Path(run.cfg.out) / f"{Path(run.cfg.ask).stem}_{asked}.png"
        evaluate.draw_answer(run.prompts.task, prompt, text, path)
        run.say(f"{example.category}: {text}\n  drawn in {path}")


def check_facts(run: Run, chosen: list[Prompt], rollouts: list[Rollout]) -> dict[str, float]:
    """What --check prints and evaluate.doubts judges, over all answers to the chosen examples."""
    prompts, task = run.prompts, run.prompts.task
    texts, lengths = [text for ro in rollouts for text in ro.texts], torch.cat([ro.mask.sum(1) for ro in rollouts])
    rewards = torch.cat([ro.rewards for ro in rollouts])
    facts = evaluate.answer_shares(texts, task.parse)
    if not run.cfg.think:
        del facts["empty_think"]
    facts["truncated"] = float(torch.cat([ro.truncated for ro in rollouts]).float().mean())
    facts["zero_variance_groups"] = float((rewards == rewards[:, :1]).all(1).float().mean())
    facts["true_no_objects"] = sum(p.example.solution == () for p in chosen) / len(chosen)
    if task.boxes:
        for convention in data.CONVENTIONS:
            facts[f"iou as {convention}"] = evaluate.box_fit(chosen, texts, task, prompts.fit, convention)
        facts["boxes per answer"] = sum(len(data.boxes_in(task.parse(text) or [])) for text in texts) / len(texts)
        facts["true boxes"] = sum(len(data.boxes_in(p.example.solution)) for p in chosen) / len(chosen)
    facts |= {f"reward {name}": float(torch.cat([ro.parts[name] for ro in rollouts]).mean()) for name in run.rewards}
    facts |= {"tokens, mean": float(lengths.float().mean()), "tokens, most": float(lengths.max())}
    trained = [p for p in run.policy.parameters() if p.requires_grad]
    moments = 8 * sum((p.to_local() if isinstance(p, DTensor) else p).numel() for p in trained)
    facts["peak memory, GB, with the optimizer's moments"] = (models.peak_memory(run.device) + moments) / 1e9
    return facts


def check(run: Run) -> None:
    """--check: sample as training does, go through one backward pass, and print what a run would meet."""
    cfg, prompts, task = run.cfg, run.prompts, run.prompts.task
    order = random.Random(cfg.seed).sample(range(len(prompts.examples)), min(CHECKED, len(prompts.examples)))
    chosen = data.whole([prompts[slot, index] for slot, index in enumerate(order)])
    size = max(1, cfg.prompts_per_step // run.accelerator.num_processes)
    if run.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()  # of loading, before shards were shared out
    rollouts = [rollout(run, chosen[at : at + size], 1) for at in range(0, len(chosen), size)]
    first = rollouts[0]
    B = min(cfg.prompts_per_forward, len(first.prompts))
    with run.autocast():
        logp, _ = run.policy(
            run.collate(first.prompts[:B]), first.ids[: B * cfg.group_size], cfg.group_size, **run.distribution
        )
    logp.sum().backward()
    run.optimizer.zero_grad(set_to_none=True)

    facts = check_facts(run, chosen, rollouts)
    coordinates = chosen[0].example.coordinates or prompts.coordinates
    picture = Path(cfg.out) / "check.png"
    if run.accelerator.is_main_process:
        evaluate.draw_answer(task, chosen[0], first.texts[0], picture)
    found = evaluate.doubts(facts, coordinates)
    run.say(f"\n{len(chosen)} examples, {cfg.group_size} answers to each; coordinates in force: {coordinates}")
    run.say("\n".join(f"  {name:46s} {value:8.3f}" for name, value in facts.items()))
    run.say("answers to the first question:\n" + "\n".join(f"  {text!r}" for text in first.texts[: cfg.group_size]))
    run.say("\n".join(f"LOOKS WRONG: {doubt}" for doubt in found) or "nothing looks wrong")
    run.say(f"the first answer is drawn in {picture}; nothing was trained")


def open_out(run: Run, setup: str) -> None:
    """Make the run folder, once everything has loaded; parse_config let an earlier run through only with leave."""
    cfg, out = run.cfg, Path(run.cfg.out)
    if run.accelerator.is_main_process:
        if run.checkpoint:  # what came after it will come again
            for name in ("metrics.jsonl", "rollouts.jsonl"):
                evaluate.drop_rows_after(out / name, run.checkpoint.step)
        elif (out / "config.json").exists() and (cfg.overwrite or not evaluate.unfinished(out, asdict(cfg))):
            shutil.rmtree(out)
        out.mkdir(parents=True, exist_ok=True)
        if not (out / "config.json").exists():  # its time is when an evaluation began
            (out / "config.json").write_text(json.dumps(asdict(cfg), indent=2) + "\n")
        (out / "setup.txt").write_text(setup + "\n")
    run.accelerator.wait_for_everyone()


def finish(run: Run) -> None:
    """Close the trackers and the process group, after everything that uses it.

    DDP first: were it the last to hold the group, it would wait for the group's threads while holding Python's lock,
    and they sometimes wait for that lock (a hang at the end of one run in five, with gloo and torch 2.13).
    """
    run.policy = None
    run.accelerator.free_memory()
    run.accelerator.end_training()


def main(argv: list[str] | None = None) -> None:
    cfg = parse_config(argv)
    try:
        run = start(cfg)
        if cfg.ask:
            return ask(run) if run.accelerator.is_main_process else None
        setup = describe(run)
        run.say(setup)
        if cfg.check:
            check(run)
            return finish(run)
        held_out = load_examples(cfg, "val") if cfg.eval_every and not cfg.eval_only else ()
        open_out(run, setup)
        if cfg.eval_only:
            evaluate_model(run, run.prompts.examples, Path(cfg.out))
        else:
            train(run, grpo_step, (*(f"reward_{name}" for name in run.rewards), "kl", "completion_tokens"), held_out)
        finish(run)
    except DataError as error:
        raise SystemExit(f"data: {error}") from None


if __name__ == "__main__":
    main()
