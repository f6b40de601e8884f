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
    training: `prefill` runs the prompt, `branch` continues it G times from the same cache, which carries gradients.
  - We sample with our own loop, because `generate` inherits settings from checkpoints (Qwen-VL ships top_k=1,
    G identical answers), and sampler and scorer must be one distribution.
  - Coordinates, rewards and their edge cases are stated and tested: see data.py and rewards.py.

    accelerate launch virft.py --task coco                               # Qwen2-VL-2B on the released data
    accelerate launch virft.py --task coco --data DIR --model NAME       # COCO on disk
    accelerate launch virft.py --task coco --data DIR --model NAME --eval_only true
    bash run.sh                                                          # offline demo, no GPU

A new reward goes into rewards.py (REWARDS), a new task into data.py (TASKS), a score into evaluate.py; a new setting
into Config below, a new metric of training into `rollout_metrics`.

Shapes in comments: B prompts, G completions per prompt, P prompt tokens, C completion tokens, V vocabulary, and
N = B * G rows, which are grouped: prompt 0 completion 0, prompt 0 completion 1, ...
"""

import contextlib
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
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, DistributedType, gather_object
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, HfArgumentParser
from transformers.utils import is_flash_attn_2_available

import data
import evaluate
from data import DataError, Example, Prompt, Prompts
from rewards import choose_rewards


def option(default: Any, help: str) -> Any:
    """A Config field with its line of help; lists get a factory, as dataclasses ask for."""
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": help})
    return field(default=default, metadata={"help": help})


@dataclass
class Config:
    """Every setting, documented here and nowhere else: `python virft.py --help` prints these lines."""

    # What is trained on what
    task: str = option("coco", f"task of data.TASKS: {', '.join(data.TASKS)}")
    model: str = option("Qwen/Qwen2-VL-2B-Instruct", "model folder or hub name; also the reference of the KL term")
    revision: str | None = option(None, "branch, tag or commit of a model on the hub")
    data: str | None = option(None, "dataset folder, file or hub name; by default the task's released dataset")
    eval_data: str | None = option(None, "dataset to evaluate on; by default the validation split of --data")
    out: str = option("runs/virft", "run folder: metrics, rollouts, pictures and the trained model")
    overwrite: bool = option(False, "replace an existing run folder")

    # Examples
    categories: str | None = option(None, "categories, separated by commas, or novel15, base65, fewshot8; default all")
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

    # The algorithm
    rewards: list[str] = option([], "rewards and weights, such as iou=1 brier=0.5 format=1; default: the task's")
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

    # Optimization
    steps: int = option(200, "training steps (sample, score, update)")
    prompts_per_step: int = option(16, "prompts of one step over all processes and micro-batches")
    prompts_per_forward: int = option(1, "prompts of one training forward and backward on one process")
    lr: float = option(1e-6, "peak learning rate, decaying linearly to 0")
    warmup_steps: int = option(0, "steps of linear warm-up")
    beta2: float = option(0.999, "second-moment decay of AdamW (the first is 0.9)")
    weight_decay: float = option(0.0, "decoupled weight decay of AdamW")
    max_grad_norm: float = option(1.0, "gradients are clipped to this norm")
    seed: int = option(0, "decides the order of examples and every sampled token")

    # Seeing what happens
    workers: int = option(2, "processes per GPU that open and resize images ahead of the step")
    eval_only: bool = option(False, "evaluate --model on the validation split and stop")
    eval_every: int = option(0, "evaluate every so many steps; 0: never")
    eval_limit: int | None = option(None, "evaluate on this many examples, chosen by seed, instead of all")
    eval_batch: int = option(16, "prompts decoded at once in evaluation")
    picture_every: int = option(50, "draw a training answer every so many steps; 0: never")
    report_to: list[str] = option([], "trackers besides metrics.jsonl: tensorboard, wandb, ...")
    ask: str | None = option(None, "path of one picture: answer for --categories, print, draw, and stop")


# ================================================================================================
# The algorithm, in the order in which it happens.


class Prefix(NamedTuple):
    """B prompts, encoded once, as the common beginning of B * G completions."""

    cache: Any  # keys and values of the prompts, repeated to B * G rows; it grows as `branch` feeds tokens
    logits: Tensor  # [B * G, V], predicting each completion's first token
    mask: Tensor  # [B * G, P], 0 on the left padding
    position: Tensor  # [B * G, 1] (or one such per rotary axis), position id of each completion's first token


def prefill(model: nn.Module, inputs: dict[str, Tensor], group_size: int) -> Prefix:
    """Run the B left-padded prompts and their images through the model once, and repeat the cache G times.

    Repeating keys and values costs a copy; repeating prompts would cost G vision towers and G * P tokens. Gradients
    flow from every completion through the cache into the one prompt, and on into the vision tower.
    """
    mask = inputs["attention_mask"]  # [B, P]
    position = mask.sum(1, keepdim=True)  # [B, 1], tokens before the completion, padding not counted
    # Models with several rotary axes (Qwen-VL) derive positions from the image grids themselves, and note by how much
    # the next position differs from the length; the others are told, because left padding would shift theirs.
    several_axes = next((m for m in model.modules() if hasattr(m, "rope_deltas")), None)
    told = {} if several_axes else {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    out = model(**inputs, **told, use_cache=True, logits_to_keep=1)
    if several_axes:
        position = (position + several_axes.rope_deltas).expand(3, -1, -1)  # text advances alike on all three
    out.past_key_values.batch_repeat_interleave(group_size)
    logits, mask = (x.repeat_interleave(group_size, 0) for x in (out.logits[:, -1], mask))
    return Prefix(out.past_key_values, logits, mask, position.repeat_interleave(group_size, -2))


def branch(model: nn.Module, prefix: Prefix, ids: Tensor) -> Tensor:
    """Feed n more tokens per completion, ids [B * G, n], after all that the cache holds; logits [B * G, n, V].

    The same call decodes (n = 1) and scores (n = C - 1). Positions are passed, not left to what a model remembers.
    """
    done = prefix.cache.get_seq_length() - prefix.mask.shape[1]  # completion tokens in the cache so far
    position = prefix.position + torch.arange(done, done + ids.shape[1], device=ids.device)
    mask = F.pad(prefix.mask, (0, done + ids.shape[1]), value=1)
    text = {"input_ids": ids, "attention_mask": mask, "position_ids": position}
    return model(**text, past_key_values=prefix.cache, use_cache=True).logits


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
    prefix = prefill(model, inputs, group_size)
    logits, columns = prefix.logits, []
    ended = torch.zeros(len(logits), dtype=torch.bool, device=logits.device)
    for t in range(max_tokens):
        logp = log_distribution(logits, temperature, forbidden)
        if noise is None:
            token = logp.argmax(-1)
        else:
            # The inverse of the cumulative distribution, in float64: float32 sums over 150,000 tokens lose the rare.
            cdf = logp.double().exp().cumsum(-1)
            token = torch.searchsorted(cdf, noise[:, t, None] * cdf[:, -1:], right=True).squeeze(1)  # never on p = 0
        token = torch.where(ended, eos[0], token)
        columns.append(token)
        ended = ended | torch.isin(token, eos)
        if t + 1 == max_tokens or ended.all():
            break
        logits = branch(model, prefix, token[:, None])[:, -1]
    return torch.stack(columns, 1)


def completion_mask(ids: Tensor, eos: Tensor) -> Tensor:
    """True up to and including the first EOS of each row, [B * G, C]: the EOS is trained, what follows is not."""
    # By position, not by token value: where pad == eos, a mask by value would leave the EOS untrained.
    is_eos = torch.isin(ids, eos)
    return (is_eos.cumsum(1) - is_eos.long()) == 0


def group_advantages(rewards: Tensor, scale: bool = True) -> Tensor:
    """A = (r - mean) / (std + 1e-4) within each group, std with ddof 1; rewards and result [B, G]. Visual-RFT eq. 2.

    A group whose rewards are all equal gets 0: nothing to learn from it. scale=False leaves out the division, which
    weighs very easy and very hard prompts up (Dr. GRPO, arXiv 2503.20783).
    """
    centered = rewards - rewards.mean(1, keepdim=True)
    return centered / (rewards.std(1, keepdim=True) + 1e-4) if scale else centered


def token_logps(logits: Tensor, ids: Tensor, temperature: float, forbidden: Tensor) -> tuple[Tensor, Tensor]:
    """log pi of the tokens that were chosen, and the entropy of what they were chosen from (no gradient).

    logits [N, C, V], ids [N, C]; both results [N, C] float32. Rows are done a few at a time, each recomputed in the
    backward pass, so that no float32 tensor of all logits ever exists.
    """

    def rows(logits: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        logp = log_distribution(logits, temperature, forbidden)
        with torch.no_grad():
            entropy = torch.special.entr(logp.exp()).sum(-1)  # entr(0) = 0, where p * log p would be 0 * inf
        return logp.gather(-1, ids[..., None]).squeeze(-1), entropy

    at_once = max(1, 2**25 // logits[0].numel())
    parts = [checkpoint(rows, a, b, use_reentrant=False) for a, b in zip(logits.split(at_once), ids.split(at_once))]
    logp, entropy = zip(*parts)
    return torch.cat(logp), torch.cat(entropy)


class CompletionLogps(nn.Module):
    """The log-probabilities of completions as one forward of one module, which is what DDP can wrap."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, inputs: dict, ids: Tensor, group_size: int, temperature: float, forbidden: Tensor):
        """inputs: B prompts; ids [B * G, C]. Returns log pi_theta(o_t | q, o_<t) and entropy, both [B * G, C]."""
        prefix = prefill(self.model, inputs, group_size)
        first = token_logps(prefix.logits[:, None], ids[:, :1], temperature, forbidden)  # predicted by the prompt
        if ids.shape[1] == 1:
            return first
        rest = token_logps(branch(self.model, prefix, ids[:, :-1]), ids[:, 1:], temperature, forbidden)
        return tuple(torch.cat(pair, 1) for pair in zip(first, rest))


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
    weight = {"grpo": 1.0 / tokens.clamp(min=1), "dr_grpo": 1.0 / max_completion_tokens, "dapo": 1.0}[loss]
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
    # Masked before exp: a wild value on padding would become inf, and inf * 0 is NaN.
    rho = torch.where(counted, logp - logp_old, 0.0).exp()
    A = advantages[:, None]
    unclipped, clipped = rho * A, rho.clamp(1 - eps_low, 1 + eps_high) * A
    # The minimum stops a change for the better at the edge, never one for the worse: with A < 0 and rho = 1.5 it is
    # 1.5 A, and the gradient pulls the token down; with A > 0 and rho = 1.5 it is the clipped constant.
    loss = -torch.minimum(unclipped, clipped)
    reference = logp if logp_ref is None else logp_ref  # KL 0 without a reference
    kl = kl_to_reference(torch.where(counted, logp, 0.0), torch.where(counted, reference, 0.0))
    return (weights * (loss + beta * kl)).sum(), kl.detach(), (clipped < unclipped).detach()


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


def rollout(run: "Run", prompts: list[Prompt], step: int) -> Rollout:
    """Items 2 to 4 of the method; a group lives on one process, so comparing needs no communication."""
    cfg, G = run.cfg, run.cfg.group_size
    with run.timer("sample"), torch.no_grad(), run.autocast():
        keys = [f"{cfg.seed}/{step}/{p.slot}/{p.example.id}" for p in prompts]
        noise = sampling_noise(keys, G, cfg.max_completion_tokens).to(run.device)
        ids = sample(run.model, run.collate(prompts), G, noise, cfg.max_completion_tokens, run.eos, **run.distribution)
    mask, truncated = completion_mask(ids, run.eos), ~torch.isin(ids, run.eos).any(1)
    texts = run.decode(ids, mask)  # for the rewards only: training uses the sampled ids, never text tokenized again
    parts = {
        name: torch.tensor([reward(text, prompts[i // G].solution) for i, text in enumerate(texts)]).view(-1, G)
        for name, (reward, _) in run.rewards.items()
    }
    rewards = sum(weight * parts[name] for name, (_, weight) in run.rewards.items())
    advantages = group_advantages(rewards, scale=cfg.loss != "dr_grpo").flatten().to(run.device)
    return Rollout(prompts, ids, mask, truncated, texts, parts, rewards, advantages)


def update(run: "Run", ro: Rollout, metrics: "Averages") -> None:
    """Items 5 to 7: `inner_epochs` optimizer steps on one rollout, each over micro-batches of whole groups."""
    cfg, G, processes = run.cfg, run.cfg.group_size, run.accelerator.num_processes
    counted = ro.mask & ~ro.truncated[:, None] if cfg.mask_truncated else ro.mask
    weights, share = token_weights(counted, cfg.loss, cfg.max_completion_tokens)
    divisor = run.accelerator.reduce(share.float(), "sum").clamp(min=1)
    batches = []
    for start in range(0, len(ro.prompts), cfg.prompts_per_forward):
        rows = slice(start * G, (start + cfg.prompts_per_forward) * G)
        C = int(ro.mask[rows].sum(1).max())  # a micro-batch is as long as its own longest completion
        at = (rows, slice(C))  # this micro-batch within the rollout's [N, C] tensors
        batches.append((run.collate(ro.prompts[start : start + cfg.prompts_per_forward]), at))
    logps_ref: list[Tensor | None] = [None] * len(batches)
    if run.reference is not None:
        with run.timer("reference"), torch.no_grad(), run.autocast():
            logps_ref = [run.reference(inputs, ro.ids[at], G, **run.distribution)[0] for inputs, at in batches]
    terms, logps_old = {"eps_low": cfg.eps_low, "eps_high": cfg.eps_high, "beta": cfg.beta}, []
    for epoch in range(cfg.inner_epochs):
        for i, (inputs, at) in enumerate(batches):
            with run.timer("train"), run.accumulate(last=i + 1 == len(batches)):
                with run.autocast():
                    logp, entropy = run.policy(inputs, ro.ids[at], G, **run.distribution)
                if epoch == 0:
                    # The policy has not moved since it sampled, so its own value is pi_old's: rho = 1. The "grpo" loss
                    # is then about 0, as advantages add up to 0; its gradient, mean of -A grad log pi_theta, is not.
                    logps_old.append(logp.detach())
                loss, kl, clipped = grpo_loss(
                    logp, logps_old[i], logps_ref[i], ro.advantages[at[0]], weights[at], **terms
                )
                loss = loss * processes / divisor  # DDP averages over processes; the divisor counts all of them
                run.accelerator.backward(loss)
            metrics.add("loss", loss.detach(), 1 / len(batches))
            for name, value in (("kl", kl), ("clip_fraction", clipped), ("entropy", entropy)):
                metrics.add(name, value[counted[at]].sum(), counted[at].sum())
        run.optimizer_step(metrics)


# ================================================================================================
# The machinery: from a command line to a run.


class Averages(dict):
    """Sums and counts by name, so that means stay exact over micro-batches and processes of unequal size."""

    def add(self, name: str, total, count=1) -> None:
        self[name] = self.get(name, 0.0) + torch.tensor([float(total), float(count)], dtype=torch.float64)

    def reduce(self, accelerator: Accelerator) -> dict[str, float]:
        """The means over all processes, which must hold the same names."""
        table = accelerator.reduce(torch.stack(list(self.values())).to(accelerator.device), "sum").tolist()
        return {name: total / count if count > 0 else 0.0 for name, (total, count) in zip(self, table)}


@dataclass
class Run:
    """What the functions of a run share."""

    cfg: Config
    accelerator: Accelerator
    processor: Any
    prompts: Prompts  # the training examples; with --eval_only those to evaluate, with --ask the questions
    model: nn.Module  # the policy itself: samples, and is saved
    policy: nn.Module  # CompletionLogps of it, in DDP where there are several processes: trains
    reference: nn.Module | None  # CompletionLogps of the initial model, frozen; None with beta 0
    optimizer: torch.optim.Optimizer | None
    rewards: dict[str, tuple[Any, float]]
    eos: Tensor
    distribution: dict[str, Any]  # temperature and forbidden ids, for sampler and scorer alike
    save_dtype: torch.dtype  # of the weights as they came
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

    def accumulate(self, last: bool):
        """Gradients are exchanged between processes only with the last micro-batch."""
        return contextlib.nullcontext() if last else self.accelerator.no_sync(self.policy)

    def collate(self, prompts: list[Prompt]) -> dict[str, Tensor]:
        batch = data.collate(prompts, self.processor.tokenizer.pad_token_id or 0)
        return {name: tensor.to(self.device) for name, tensor in batch.items()}

    def decode(self, ids: Tensor, mask: Tensor) -> list[str]:
        """The texts of completions, without the EOS and whatever follows it."""
        rows = [row[keep].tolist() for row, keep in zip(ids, mask & ~torch.isin(ids, self.eos))]
        return self.processor.tokenizer.batch_decode(rows, skip_special_tokens=True)

    def optimizer_step(self, metrics: Averages) -> None:
        """Clip and step. A gradient that is not finite updates nothing, on any process, and is counted."""
        with self.timer("train"):
            trained = [p for p in self.policy.parameters() if p.requires_grad]
            norm = float(self.accelerator.clip_grad_norm_(trained, self.cfg.max_grad_norm))
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


AT_LEAST_1 = ("steps", "inner_epochs", "max_completion_tokens", "prompts_per_step", "prompts_per_forward", "eval_batch")


def parse_config(argv: list[str] | None = None) -> Config:
    """Read and check the command line; SystemExit names the flag that is wrong and what would be right."""
    parser = HfArgumentParser(Config, description="ViRFT: GRPO for vision-language models with verifiable rewards")
    (cfg,) = parser.parse_args_into_dataclasses(argv)
    world, out = int(os.environ.get("WORLD_SIZE", 1)), Path(cfg.out).resolve()
    evaluates = cfg.eval_only or cfg.ask
    used = [Path(name).resolve() for name in (cfg.model, cfg.data, cfg.eval_data) if name]
    for flag, good, right in (
        ("task", cfg.task in data.TASKS, f"one of {', '.join(data.TASKS)}"),
        ("group_size", cfg.group_size >= 2, "at least 2: advantages compare completions of the same prompt"),
        ("loss", cfg.loss in ("grpo", "dr_grpo", "dapo"), "grpo, dr_grpo or dapo"),
        ("coordinates", cfg.coordinates in ("auto", "relative", "pixels"), "auto, relative or pixels"),
        ("temperature", cfg.temperature > 0, "above 0; evaluation is greedy anyway"),
        *((name, getattr(cfg, name) >= 1, "at least 1") for name in AT_LEAST_1),
        ("prompts_per_step", evaluates or cfg.prompts_per_step % world == 0, f"a multiple of the {world} processes"),
        ("beta", cfg.beta >= 0, "0 or more"),
        ("eps_low", 0 <= cfg.eps_low < 1, "at least 0 and below 1"),
        ("eps_high", cfg.eps_high >= 0, "0 or more"),
        ("lr", cfg.lr > 0, "above 0"),
        ("iou_threshold", 0 <= cfg.iou_threshold < 1, "at least 0 and below 1"),
        ("shots", cfg.shots is None or cfg.shots >= 1, "at least 1"),
        (
            "out",
            cfg.ask or cfg.overwrite or not (out / "config.json").exists(),
            "new: an earlier run is there; --overwrite true replaces it",
        ),
        ("out", cfg.ask or not any(out == path or out in path.parents for path in used), "outside --model and --data"),
        ("ask", cfg.ask is None or cfg.categories is not None, "together with --categories, what to look for"),
    ):
        if not good:
            raise SystemExit(f"--{flag} {getattr(cfg, flag)}: must be {right}")
    return cfg


def rewards_of(cfg: Config) -> dict[str, tuple[Any, float]]:
    """What --rewards asks for, or the task's own: {name: (reward(completion, solution), weight)}."""
    weights = data.TASKS[cfg.task].rewards
    try:
        if cfg.rewards:
            weights = {name: float(weight) for name, weight in (entry.split("=") for entry in cfg.rewards)}
        return choose_rewards(weights, iou_threshold=cfg.iou_threshold, think=cfg.think)
    except ValueError as error:
        raise SystemExit(f"--rewards {' '.join(cfg.rewards)}: name=weight expected, as in iou=1 ({error})") from None


@contextlib.contextmanager
def loading(what: str, name: str):
    """Turn what cannot be loaded into a message that says what to do; a hub that cannot be reached gets three lines."""
    try:
        yield
    except ImportError as error:
        missing = re.search(r"requires the (\w+) library|No module named '(\w+)'", str(error))
        package = next(filter(None, missing.groups())).lower() if missing else str(error).strip().splitlines()[0]
        raise SystemExit(f"{what} {name} needs a package that is not installed: pip install {package}") from None
    except DataError:  # says already what to do
        raise
    except (
        OSError,
        ValueError,
    ) as error:  # every error of a hub is an OSError; a folder that is no model, a ValueError
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        if Path(name).exists():
            raise SystemExit(f"{what} {name} cannot be loaded: {reason}") from None
        raise SystemExit(
            f"{what} {name} is not a folder here and cannot be had from the hub: {reason}\n"
            "With COCO and a model on disk:  accelerate launch virft.py --task coco --data COCO_DIR --model MODEL_DIR\n"
            "Offline, with what is in here:  bash run.sh"
        ) from None


def load_processor(cfg: Config) -> tuple[Any, data.Fit, str]:
    """The model's processor, how it wants its images, and the coordinates of its family."""
    with loading("model", cfg.model):
        family = AutoConfig.from_pretrained(cfg.model, revision=cfg.revision).model_type
        processor = AutoProcessor.from_pretrained(cfg.model, revision=cfg.revision)
    if getattr(processor, "chat_template", None) is None:
        raise SystemExit(
            f"model {cfg.model} has no chat template; an instruction-tuned vision-language model is expected"
        )
    fit = data.image_fit(processor.image_processor, cfg.max_pixels, cfg.min_pixels)
    data.check_fit(processor.image_processor, fit)
    if cfg.coordinates != "auto":
        return processor, fit, cfg.coordinates
    if family not in data.COORDINATES_OF_FAMILY:
        print(
            f"model type {family} is not known here: coordinates taken as 0..1000, relative; see --coordinates",
            file=sys.stderr,
        )
    return processor, fit, data.COORDINATES_OF_FAMILY.get(family, "relative")


def load_model(cfg: Config, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """The model in eval mode, which it never leaves: dropout would make sampler and scorer two policies."""
    attention = "flash_attention_2" if device.type == "cuda" and is_flash_attn_2_available() else "sdpa"
    with loading("model", cfg.model):
        model = AutoModelForImageTextToText.from_pretrained(
            cfg.model, revision=cfg.revision, dtype=dtype, attn_implementation=attention
        )
    return model.to(device).eval()


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
    chosen |= {"shots": cfg.shots, "max_boxes": cfg.max_boxes} if training else {"limit": cfg.eval_limit}
    with loading("dataset", source):
        examples, notes = data.load_examples(task, source, split, **chosen)
    if int(os.environ.get("RANK", 0)) == 0:
        print("\n".join(notes), flush=True)
    return examples


def special_tokens(model: nn.Module, processor) -> tuple[list[int], list[int]]:
    """Ids that end a completion (all EOS ids of the model) and ids that no completion may contain (placeholders)."""
    text, tokenizer = model.config.get_text_config(), processor.tokenizer
    configured = (model.generation_config.eos_token_id, text.eos_token_id, tokenizer.eos_token_id)
    eos = {token for ids in configured if ids is not None for token in (ids if isinstance(ids, list) else [ids])}
    kinds = ("image_token_id", "image_token_index", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    forbidden = {token for kind in kinds if isinstance(token := getattr(model.config, kind, None), int)}
    return sorted(eos), sorted(forbidden - eos)


def freeze_unreachable(run: Run) -> list[str]:
    """Freeze parameters that no completion's log-probability depends on, and return their names.

    DDP waits for a gradient of every trainable parameter and would stop at the second step. The graph of one forward
    is walked; nothing is computed backward.
    """
    first = run.collate(data.whole([run.prompts[0, 0]]))
    with run.autocast():
        logp, _ = run.policy(first, run.eos[:1].repeat(1, 2), 1, **run.distribution)
    nodes, seen, reached = [logp.grad_fn], set(), set()
    while nodes:
        node = nodes.pop()
        if node is not None and node not in seen:
            seen.add(node)
            reached.add(id(getattr(node, "variable", None)))
            nodes += [parent for parent, _ in node.next_functions]
    unreached = {name: p for name, p in run.model.named_parameters() if p.requires_grad and id(p) not in reached}
    for parameter in unreached.values():
        parameter.requires_grad_(False)
    return list(unreached)


def start(cfg: Config) -> Run:
    """Load everything that training, evaluation or a question needs."""
    ddp = DistributedDataParallelKwargs(gradient_as_bucket_view=True)  # no second copy of all gradients
    accelerator = Accelerator(
        cpu=not torch.cuda.is_available(), mixed_precision="no", log_with=cfg.report_to or None, project_dir=cfg.out,
        kwargs_handlers=[ddp],
    )  # fmt: skip
    launched = int(os.environ.get("WORLD_SIZE", 1))
    if accelerator.num_processes != launched:
        raise SystemExit(
            f"{launched} processes were launched, accelerate sees {accelerator.num_processes}: each would train alone"
        )
    if accelerator.distributed_type not in (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU):
        raise SystemExit(
            f"{accelerator.distributed_type.value} is not supported: launch without it, several GPUs use DDP"
        )
    rewards = rewards_of(cfg)  # before anything large is loaded
    gradients, task = not (cfg.eval_only or cfg.ask), data.TASKS[cfg.task]
    processor, fit, coordinates = load_processor(cfg)
    if cfg.ask:
        examples = data.questions(Path(cfg.ask), cfg.categories)
    else:
        examples = load_examples(cfg, "train" if gradients else "val")
    frozen_dtype = torch.bfloat16 if accelerator.device.type == "cuda" else torch.float32
    save_dtype = AutoConfig.from_pretrained(cfg.model, revision=cfg.revision).dtype or torch.float32
    model = load_model(cfg, torch.float32 if gradients else frozen_dtype, accelerator.device)
    eos, forbidden = (
        torch.tensor(ids, dtype=torch.long, device=accelerator.device) for ids in special_tokens(model, processor)
    )
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None) or sys.maxsize
    room = positions - cfg.max_completion_tokens
    prompts = Prompts(
        task, examples, processor, fit, coordinates, cfg.think, cfg.system_prompt, room, cfg.skip_bad_images
    )
    run = Run(
        cfg, accelerator, processor, prompts, model=model, policy=CompletionLogps(model), reference=None, optimizer=None,
        rewards=rewards, eos=eos, distribution={"temperature": cfg.temperature, "forbidden": forbidden},
        save_dtype=save_dtype, seconds={},
    )  # fmt: skip
    if gradients:
        if frozen := freeze_unreachable(run):
            run.say(f"frozen, because no completion depends on them: {', '.join(frozen)}")
        trained = [p for p in model.parameters() if p.requires_grad]
        run.say(
            f"{sum(p.numel() for p in trained):,} of {sum(p.numel() for p in model.parameters()):,} parameters are trained"
        )
        optimizer = torch.optim.AdamW(
            trained, lr=cfg.lr, betas=(0.9, cfg.beta2), weight_decay=cfg.weight_decay, fused=True
        )
        run.policy, run.optimizer = accelerator.prepare(run.policy, optimizer)
        if cfg.beta > 0:
            run.reference = (
                CompletionLogps(load_model(cfg, frozen_dtype, accelerator.device)).requires_grad_(False).eval()
            )
    return run


def describe(run: Run) -> str:
    """The resolved configuration, the batch arithmetic and the first prompt, as a person should check them."""
    cfg, n, examples = run.cfg, run.accelerator.num_processes, run.prompts.examples
    lines = [f"  {name} = {value!r}" for name, value in asdict(cfg).items()]
    (first,) = data.whole([run.prompts[0, 0]])
    ids = first.inputs["input_ids"][0]
    if run.optimizer is not None:
        each = cfg.prompts_per_step // n
        assert each * n == cfg.prompts_per_step
        lines.append(
            f"{cfg.prompts_per_step} prompts a step = {n} processes x {each}, in {math.ceil(each / cfg.prompts_per_forward)} micro-batches "
            f"of up to {cfg.prompts_per_forward}; x {cfg.group_size} completions = {cfg.prompts_per_step * cfg.group_size} a step; "
            f"{cfg.steps} steps are {cfg.steps * cfg.prompts_per_step / len(examples):.2f} epochs of {len(examples)} examples"
        )
        answers = [
            len(run.processor.tokenizer(data.model_answer(e, first.target, cfg.think))["input_ids"])
            for e in examples[:2000]
        ]
        if too_long := sum(tokens >= cfg.max_completion_tokens for tokens in answers):
            lines.append(
                f"{too_long} of {len(answers)} examples have an answer that does not fit in --max_completion_tokens "
                f"{cfg.max_completion_tokens} (the longest: {max(answers)} tokens); --max_boxes leaves them out"
            )
    shown = run.processor.tokenizer.decode(ids)
    for token in run.distribution["forbidden"].tolist():
        name, count = run.processor.tokenizer.decode([token]), int((ids == token).sum())
        shown = shown.replace(name * count, f"{name} x {count} ") if count > 1 else shown
    lines.append(
        f"coordinates of the first image: {first.target[0]} x {first.target[1]} ({first.example.coordinates or run.prompts.coordinates})"
    )
    return "\n".join([*lines, f"first prompt, {len(ids)} tokens:", shown])


# ------------------------------------------------------------------------------------------------
# Training.


def prompt_stream(run: Run) -> DataLoader:
    """For each step the list of this process's prompts; every epoch sees each example once, in an order of its own."""
    cfg, accelerator = run.cfg, run.accelerator
    order, epoch = [], 0
    while len(order) < cfg.steps * cfg.prompts_per_step:
        order += random.Random(f"{cfg.seed}/{epoch}").sample(
            range(len(run.prompts.examples)), len(run.prompts.examples)
        )
        epoch += 1
    mine = range(accelerator.process_index, cfg.prompts_per_step, accelerator.num_processes)
    steps = [[(slot, order[step * cfg.prompts_per_step + slot]) for slot in mine] for step in range(cfg.steps)]
    return DataLoader(run.prompts, batch_sampler=steps, collate_fn=list, num_workers=cfg.workers)


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
    for phase, seconds in run.seconds.items():
        metrics.add(f"seconds_{phase}", seconds)
    metrics.add("tokens_per_second", lengths.sum() * run.accelerator.num_processes, run.seconds["sample"])


def rollout_records(ro: Rollout, step: int) -> list[dict]:
    """One line of rollouts.jsonl per completion."""
    G, columns = (
        ro.rewards.shape[1],
        {"reward": ro.rewards, **ro.parts, "advantage": ro.advantages, "tokens": ro.mask.sum(1)},
    )
    numbers = {name: [round(value, 4) for value in values.flatten().tolist()] for name, values in columns.items()}
    return [
        {"step": step, "id": ro.prompts[i // G].example.id, "completion": text}
        | {name: values[i] for name, values in numbers.items()}
        for i, text in enumerate(ro.texts)
    ]


def train(run: Run) -> None:
    """`train_steps`, then save the model and draw the curves: also after Ctrl-C, and after an error that came later."""
    cfg, out = run.cfg, Path(run.cfg.out)
    try:
        step = train_steps(run)
    except Exception:
        if run.accelerator.is_main_process and (out / "metrics.jsonl").exists():
            save_model(run, out / "model")
            print(f"an error ended training; the model as it was is in {out / 'model'}", file=sys.stderr)
        raise
    save_model(run, out / "model")
    if run.accelerator.is_main_process:
        evaluate.plot_curves(out / "metrics.jsonl", out / "curves.png")
    run.say(f"{step} of {cfg.steps} steps done: model in {out / 'model'}, curves in {out / 'curves.png'}")
    run.accelerator.end_training()


def train_steps(run: Run) -> int:
    """The loop: `rollout`, `update`, write down; evaluate now and then. Returns the number of steps done."""
    cfg, accelerator, out = run.cfg, run.accelerator, Path(run.cfg.out)
    # Not prepared by accelerate, which would step it once per process.
    schedule = torch.optim.lr_scheduler.LambdaLR(
        run.optimizer, lambda step: min(1.0, (step + 1) / (cfg.warmup_steps + 1)) * (1.0 - step / cfg.steps)
    )
    if cfg.report_to:
        accelerator.init_trackers("virft", config={name: str(value) for name, value in asdict(cfg).items()})
    held_out = load_examples(cfg, "val") if cfg.eval_every else []
    shown = (*(f"reward_{name}" for name in run.rewards), "kl", "completion_tokens")
    skipped: set[str] = set()
    stop = StopAtSignal()
    bar = tqdm(prompt_stream(run), total=cfg.steps, disable=not accelerator.is_main_process, dynamic_ncols=True)
    for step, prompts in enumerate(bar, 1):
        for flaw in {flaw for prompt in data.whole(prompts) for flaw in prompt.skipped} - skipped:
            tqdm.write(f"skipped: {flaw}")
            skipped.add(flaw)
        metrics = Averages()
        run.seconds.clear()
        ro = rollout(run, prompts, step)
        update(run, ro, metrics)
        rollout_metrics(run, ro, metrics)
        metrics.add("stop", stop.requested)
        row = {"step": step, "lr": schedule.get_last_lr()[0], **metrics.reduce(accelerator)}
        interrupted = row.pop("stop") > 0  # agreed on by all processes
        schedule.step()
        records = gather_object(rollout_records(ro, step))
        if accelerator.is_main_process:
            evaluate.append_rows(out / "rollouts.jsonl", records)
            evaluate.append_rows(out / "metrics.jsonl", [row])
            bar.set_postfix({name: f"{row[name]:.3g}" for name in shown})
            if cfg.picture_every and step % cfg.picture_every == 0:
                evaluate.draw_answer(prompts[0], ro.texts[0], out / "pictures" / f"step_{step:06d}.png")
        accelerator.log({name: value for name, value in row.items() if name != "step"}, step=step)
        if cfg.eval_every and step % cfg.eval_every == 0:
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
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.request)

    def request(self, number: int, frame) -> None:
        if not self.requested and os.getpid() == self.process:
            print(f"\n{signal.Signals(number).name}: finishing this step, then saving", file=sys.stderr, flush=True)
        self.requested = True


def save_model(run: Run, folder: Path) -> None:
    """Write model and processor in Hugging Face format, whole or not at all, in the dtype that the model came in."""
    if run.accelerator.is_main_process:  # the others have nothing to wait for
        new, old = (folder.with_name(f"{folder.name}.{state}") for state in ("unfinished", "old"))
        for rest in (new, old):
            shutil.rmtree(rest, ignore_errors=True)
        run.model.to(run.save_dtype).save_pretrained(new)  # in place, which is why this is the last thing a run does
        run.processor.save_pretrained(new)
        if folder.exists():
            folder.rename(old)
        new.rename(folder)
        shutil.rmtree(old, ignore_errors=True)


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


def evaluate_model(run: Run, examples: list[Example], out: Path) -> dict[str, float]:
    """Greedy answers to all examples, shared out over the processes; scores, predictions and pictures go to `out`."""
    cfg, accelerator = run.cfg, run.accelerator
    mine = list(range(accelerator.process_index, len(examples), accelerator.num_processes))
    batches = [[(i, i) for i in mine[at : at + cfg.eval_batch]] for at in range(0, len(mine), cfg.eval_batch)]
    loader = DataLoader(run.prompts.of(examples), batch_sampler=batches, collate_fn=list, num_workers=cfg.workers)
    records = []
    for prompts in tqdm(loader, desc="evaluate", disable=not accelerator.is_main_process, dynamic_ncols=True):
        if cfg.skip_bad_images:
            prompts = [prompt for prompt in prompts if not isinstance(prompt, DataError)]
        for prompt, text in zip(prompts, answer(run, data.whole(prompts)) if prompts else []):
            parts = {name: reward(text, prompt.solution) for name, (reward, _) in run.rewards.items()}
            records.append({"row": prompt.slot} | evaluate.record(prompt.example, prompt.target, text, parts))
    records = sorted(gather_object(records), key=lambda record: record["row"])
    scores = evaluate.scores(records, data.TASKS[cfg.task])
    if accelerator.is_main_process:
        evaluate.write_evaluation(out, records, scores, examples)
    if len(records) < len(examples):
        run.say(f"{len(examples) - len(records)} examples were skipped: their images do not open")
    run.say(f"{evaluate.report(scores, len(records))}\npredictions, results and pictures in {out}")
    return scores


def ask(run: Run) -> None:
    """Answer --ask: print the completions and draw their boxes."""
    for example in run.prompts.examples:
        prompt = run.prompts.encode(example)
        (text,) = answer(run, [prompt])
        path = Path(run.cfg.out) / f"{Path(run.cfg.ask).stem}_{example.category.replace(' ', '_')}.png"
        evaluate.draw_answer(prompt, text, path)
        run.say(f"{example.category}: {text}\n  drawn in {path}")


def prepare_out(cfg: Config) -> None:
    """Make the run folder, once everything has loaded; parse_config let an earlier run through only with --overwrite."""
    out = Path(cfg.out)
    if (out / "config.json").exists():
        shutil.rmtree(out)
    out.mkdir(parents=True, exist_ok=True)
    (out / "config.json").write_text(json.dumps(asdict(cfg), indent=2) + "\n")


def main(argv: list[str] | None = None) -> None:
    cfg = parse_config(argv)
    try:
        run = start(cfg)
        if cfg.ask:
            return ask(run) if run.accelerator.is_main_process else None
        setup = describe(run)
        run.say(setup)
        if run.accelerator.is_main_process:
            prepare_out(cfg)
            (Path(cfg.out) / "setup.txt").write_text(setup + "\n")
        run.accelerator.wait_for_everyone()
        if cfg.eval_only:
            evaluate_model(run, run.prompts.examples, Path(cfg.out))
        else:
            train(run)
    except DataError as error:
        raise SystemExit(f"data: {error}") from None


if __name__ == "__main__":
    main()
