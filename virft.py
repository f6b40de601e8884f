"""ViRFT: reinforcement fine-tuning of vision-language models with verifiable rewards, in one file.

Visual-RFT (arXiv 2503.01785) trains a vision-language model with GRPO (arXiv 2402.03300) on rewards that a
program can check: the IoU of boxes, their confidence, a class name, the answer's format. For every step:

  1. q      take prompts: an image and a question about it
  2. o_i    sample G completions of each prompt from the policy pi_theta
  3. r_i    score each completion's text: r_i = sum of weighted rewards (rewards.py)
  4. A_i    compare within the group: A_i = (r_i - mean(r)) / (std(r) + 1e-4)
  5. rho    = pi_theta(o_it) / pi_old(o_it), token by token
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

Shapes in comments: B prompts, G completions per prompt, P prompt tokens, C completion tokens, V vocabulary.
Rows of a [B * G, ...] tensor are grouped: prompt 0 completion 0, prompt 0 completion 1, ...
"""

import contextlib
import hashlib
import inspect
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
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, HfArgumentParser
from transformers.utils import is_flash_attn_2_available

import data
import evaluate
from data import DataError, Example
from rewards import REWARDS


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
    skip_bad_images: bool = option(False, "leave out images that are missing, broken or wrongly annotated, and count them")
    max_pixels: int = option(401408, "images are fitted to at most this many pixels (401408 = 512 patches of 28 x 28)")
    min_pixels: int = option(3136, "and to at least this many")
    coordinates: str = option("auto", "what the model reads and writes: relative (0..1000), pixels, or auto by model family")
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
    prompts_per_forward: int = option(1, "prompts of one forward and backward on one process: lower is less memory")
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
    position: Tensor  # [B * G], position id of each completion's first token


def prefill(model: nn.Module, inputs: dict[str, Tensor], group_size: int) -> Prefix:
    """Run the B left-padded prompts and their images through the model once, and repeat the cache G times.

    Repeating cached keys and values costs a copy; repeating prompts would cost G vision towers and G * P tokens.
    Gradients flow from every completion through the cache into the one prompt, and on into the vision tower.
    """
    mask = inputs["attention_mask"]  # [B, P]
    length = mask.sum(1)  # [B]
    # Models with multi-axis rotary positions (Qwen-VL) derive them from the image grids and remember by how much a
    # prompt's last position differs from its length; others get the positions that left padding would shift.
    rotary = next((m for m in model.modules() if hasattr(m, "rope_deltas")), None)
    positions = {} if rotary else {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    out = model(**inputs, **positions, use_cache=True, logits_to_keep=1)
    position = length + rotary.rope_deltas.view(-1) if rotary else length
    out.past_key_values.batch_repeat_interleave(group_size)
    logits, mask, position = (x.repeat_interleave(group_size, 0) for x in (out.logits[:, -1], mask, position))
    return Prefix(out.past_key_values, logits, mask, position)


def branch(model: nn.Module, prefix: Prefix, ids: Tensor) -> Tensor:
    """Feed n more tokens per completion, ids [B * G, n], after all that the cache holds; logits [B * G, n, V].

    The same call decodes (n = 1) and scores (n = C - 1). Positions are passed, not left to the model: what a model
    remembers of an earlier forward must not reach this one.
    """
    past, prompt = prefix.cache.get_seq_length(), prefix.mask.shape[1]
    total = past + ids.shape[1]
    position = prefix.position[:, None] + torch.arange(past - prompt, total - prompt, device=ids.device)
    if any(hasattr(m, "rope_deltas") for m in model.modules()):
        position = position.expand(3, -1, -1)  # text advances on the time, height and width axes alike
    mask = F.pad(prefix.mask, (0, total - prompt), value=1)
    return model(input_ids=ids, attention_mask=mask, position_ids=position, past_key_values=prefix.cache, use_cache=True).logits


def log_distribution(logits: Tensor, temperature: float, forbidden: Tensor) -> Tensor:
    """log pi(token | what came before), [..., V], in float32: the one distribution that is sampled and scored.

    No top-k, no top-p. `forbidden` ids (image placeholders) have probability 0 in sampler and scorer alike: one of
    them in a completion would be taken for an image at the next forward.
    """
    logits = logits.float() / temperature  # bf16 holds 8 bits: its log-probabilities would be wrong by percents
    logits[..., forbidden] = -torch.inf
    return logits.log_softmax(-1)


def sample(
    model: nn.Module, inputs: dict[str, Tensor], noise: Tensor | None, group_size: int, max_tokens: int,
    eos: Tensor, forbidden: Tensor, temperature: float,
) -> Tensor:  # fmt: skip
    """Sample G completions for each of B prompts; token ids [B * G, C], C <= max_tokens.

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
            # Inverse of the cumulative distribution; in float64, because float32 sums over 150,000 tokens lose the rare.
            cdf = logp.double().exp().cumsum(-1)
            token = torch.searchsorted(cdf, noise[:, t, None] * cdf[:, -1:], right=True).squeeze(1)
        token = torch.where(ended, eos[0], token)
        columns.append(token)
        ended = ended | torch.isin(token, eos)
        if t + 1 == max_tokens or ended.all():
            break
        logits = branch(model, prefix, token[:, None])[:, -1]
    return torch.stack(columns, 1)


def completion_mask(ids: Tensor, eos: Tensor) -> Tensor:
    """True up to and including the first EOS of each row, [B * G, C]; the EOS is trained, what follows is not.

    By position, never by token value: with pad == eos a mask by value would drop the EOS from training, and models
    trained so forget to stop.
    """
    is_eos = torch.isin(ids, eos)
    return (is_eos.cumsum(1) - is_eos.long()) == 0


def group_advantages(rewards: Tensor, scale: bool = True) -> Tensor:
    """A = (r - mean) / (std + 1e-4) within each group; rewards and result [B, G]. GRPO eq. 1 of section 4.1.2.

    std with ddof 1. A group whose rewards are all equal gets 0: nothing to learn from it. scale=False leaves the
    division out (Dr. GRPO, arXiv 2503.20783), which would weigh very easy and very hard prompts up.
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
    """Log-probabilities of completions as the forward of a module, so that DDP and FSDP see one call per backward."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(
        self, inputs: dict[str, Tensor], ids: Tensor, group_size: int, temperature: float, forbidden: Tensor
    ) -> tuple[Tensor, Tensor]:
        """inputs: B prompts; ids [B * G, C]. Returns log pi_theta(o_t | q, o_<t) and entropy, both [B * G, C]."""
        prefix = prefill(self.model, inputs, group_size)
        first = token_logps(prefix.logits[:, None], ids[:, :1], temperature, forbidden)  # predicted by the prompt
        if ids.shape[1] == 1:
            return first
        rest = token_logps(branch(self.model, prefix, ids[:, :-1]), ids[:, 1:], temperature, forbidden)
        return tuple(torch.cat(pair, 1) for pair in zip(first, rest))


def kl_to_reference(logp: Tensor, logp_ref: Tensor) -> Tensor:
    """The k3 estimate of KL(pi_theta || pi_ref) per token: exp(d) - d - 1 with d = logp_ref - logp. GRPO eq. 4.

    Never negative, and unbiased for tokens sampled from pi_theta. expm1 keeps its digits where d is near 0.
    """
    d = logp_ref - logp
    return torch.expm1(d) - d


def token_weights(mask: Tensor, loss: str, max_completion_tokens: int) -> tuple[Tensor, Tensor]:
    """What each token's loss counts, [N, C], and what the sum is to be divided by: mean over what?

    grpo     mean over a completion's tokens, then over completions (the paper): each completion weighs the same,
             so a token of a short completion weighs more
    dr_grpo  sum over tokens / max_completion_tokens, then mean over completions: no length bias
    dapo     mean over all tokens of the optimizer step (arXiv 2503.14476): each token weighs the same

    The divisor is this mask's share; the caller adds up the shares of the step's micro-batches and processes.
    """
    tokens = mask.sum(1, keepdim=True)
    weight = {"grpo": 1.0 / tokens.clamp(min=1), "dr_grpo": 1.0 / max_completion_tokens, "dapo": 1.0}[loss]
    divisor = tokens.sum() if loss == "dapo" else (tokens > 0).sum()
    return mask * weight, divisor


def grpo_loss(
    logp: Tensor, logp_old: Tensor, logp_ref: Tensor | None, advantages: Tensor, weights: Tensor,
    eps_low: float, eps_high: float, beta: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Sum over tokens of weight * (-min(rho A, clip(rho) A) + beta KL). GRPO eq. 3, Visual-RFT eq. 2.

    logp, logp_old, logp_ref [N, C]: of pi_theta, of the policy that sampled, of the reference (None: no KL term);
    advantages [N]; weights [N, C], 0 on tokens that do not count. Returns the loss and, per token, the KL and
    whether the clip stopped the gradient.
    """
    counted = weights > 0
    # Masked before exp: a wild value on padding would become inf, and inf * 0 is NaN.
    rho = torch.where(counted, logp - logp_old, 0.0).exp()
    A = advantages[:, None]
    unclipped, clipped = rho * A, rho.clamp(1 - eps_low, 1 + eps_high) * A
    # The minimum is the pessimist's choice for both signs of A: a change for the worse is never clipped away.
    loss = -torch.minimum(unclipped, clipped)
    kl = torch.zeros_like(logp)
    if logp_ref is not None:
        kl = kl_to_reference(torch.where(counted, logp, 0.0), torch.where(counted, logp_ref, 0.0))
    return (weights * (loss + beta * kl)).sum(), kl.detach(), (clipped < unclipped).detach()


class Rollout(NamedTuple):
    """What one step of one process sampled and how it was judged."""

    prompts: list["Prompt"]
    ids: Tensor  # [B * G, C]
    mask: Tensor  # [B * G, C], completion_mask
    truncated: Tensor  # [B * G], no EOS within the limit
    texts: list[str]  # B * G
    parts: dict[str, Tensor]  # every reward by name, [B, G]
    rewards: Tensor  # their weighted sum, [B, G]
    advantages: Tensor  # [B * G]


@torch.no_grad()
def rollout(run: "Run", prompts: list["Prompt"], step: int) -> Rollout:
    """Items 2 to 4 of the method: sample G completions of each prompt, score the texts, compare within each group."""
    cfg, G = run.cfg, run.cfg.group_size
    with run.timer("sample"), run.autocast():
        noise = torch.cat([p.noise(cfg.seed, step, G, cfg.max_completion_tokens) for p in prompts]).to(run.device)
        ids = sample(run.model, run.collate(prompts), noise, G, cfg.max_completion_tokens, run.eos, **run.distribution)
    mask, truncated = completion_mask(ids, run.eos), ~torch.isin(ids, run.eos).any(1)
    texts = run.decode(ids, mask)  # for the rewards only: training uses the sampled ids, never text tokenized again
    parts = {
        name: torch.tensor([reward(text, prompts[i // G].solution) for i, text in enumerate(texts)]).view(-1, G)
        for name, (reward, _) in run.rewards.items()
    }
    rewards = sum(weight * parts[name] for name, (_, weight) in run.rewards.items())
    # A group lives on one process, so this needs no communication.
    advantages = group_advantages(rewards, scale=cfg.loss != "dr_grpo").flatten().to(run.device)
    return Rollout(prompts, ids, mask, truncated, texts, parts, rewards, advantages)


def update(run: "Run", ro: Rollout, metrics: "Averages") -> None:
    """Items 5 to 7: `inner_epochs` optimizer steps on one rollout, each over micro-batches of whole groups."""
    cfg, G, processes = run.cfg, run.cfg.group_size, run.accelerator.num_processes
    counted = ro.mask & ~ro.truncated[:, None] if cfg.mask_truncated else ro.mask
    weights, divisor = token_weights(counted, cfg.loss, cfg.max_completion_tokens)
    divisor = run.accelerator.reduce(divisor.float(), "sum").clamp(min=1)
    batches = []
    for start in range(0, len(ro.prompts), cfg.prompts_per_forward):
        rows = slice(start * G, (start + cfg.prompts_per_forward) * G)
        C = int(ro.mask[rows].sum(1).max())  # a micro-batch is as long as its own longest completion
        batches.append((run.collate(ro.prompts[start : start + cfg.prompts_per_forward]), (rows, slice(C))))
    logps_ref: list[Tensor | None] = [None] * len(batches)
    if run.reference is not None:
        with run.timer("reference"), torch.no_grad(), run.autocast():
            logps_ref = [run.reference(inputs, ro.ids[at], G, **run.distribution)[0] for inputs, at in batches]
    logps_old: list[Tensor] = []
    for epoch in range(cfg.inner_epochs):
        for i, (inputs, at) in enumerate(batches):
            with run.timer("train"), run.accumulate(last=i + 1 == len(batches)):
                with run.autocast():
                    logp, entropy = run.policy(inputs, ro.ids[at], G, **run.distribution)
                if epoch == 0:
                    # The policy has not moved since it sampled, so its own value is pi_old's, with no second forward.
                    # rho is then exactly 1 and the loss about 0, because the advantages of a group sum to 0; the
                    # gradient is not 0, because d rho = d logp.
                    logps_old.append(logp.detach())
                loss, kl, clipped = grpo_loss(
                    logp, logps_old[i], logps_ref[i], ro.advantages[at[0]], weights[at], cfg.eps_low, cfg.eps_high, cfg.beta
                )
                # DDP averages gradients over processes, and the divisor counts all of them already.
                loss = loss * processes / divisor
                run.accelerator.backward(loss)
            metrics.add("loss", loss, 1 / len(batches))
            for name, value in (("kl", kl), ("clip_fraction", clipped), ("entropy", entropy)):
                metrics.add(name, value[ro.mask[at]].sum(), ro.mask[at].sum())
        run.optimizer_step(metrics)


# ================================================================================================
# The machinery: from files to prompts, from a command line to a run.
# ================================================================================================
# The machinery: from files to prompts, from a command line to a run.


@dataclass
class Prompt:
    """An example as the model meets it."""

    example: Example
    inputs: dict[str, Tensor]  # what the processor made of it, a batch of one
    target: tuple[int, int]  # (width, height) of the coordinates that the prompt speaks
    solution: list  # ground truth in those coordinates, for the rewards
    slot: int  # its place among the prompts of the step, over all processes

    def noise(self, seed: int, step: int, group_size: int, max_tokens: int) -> Tensor:
        """Uniform numbers [G, max_tokens] for `sample`, the same on any number of processes and in any batch."""
        key = hashlib.blake2b(f"{seed}/{step}/{self.slot}/{self.example.id}".encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(key, "big") >> 1)
        return torch.rand(group_size, max_tokens, dtype=torch.float64, generator=generator)


class Prompts(Dataset):
    """Encodes examples in the loader's workers, ahead of the step: open, resize, write the question, tokenize."""

    def __init__(self, cfg: Config, examples: list[Example], processor, fit: data.Fit, coordinates: str, max_length: int):
        self.cfg, self.examples, self.processor = cfg, examples, processor
        self.fit, self.coordinates, self.max_length = fit, coordinates, max_length

    def __getitem__(self, key: tuple[int, int]) -> Prompt | DataError:
        slot, index = key
        try:
            return self.encode(self.examples[index], slot)
        except DataError as error:
            return error  # raised by the main process: through a worker it would arrive as a traceback in a string

    def encode(self, example: Example, slot: int = 0) -> Prompt:
        images = data.open_images(example, self.fit)
        task = data.TASKS[self.cfg.task]
        question, target = task.question(example, images[0].size, self.coordinates, self.cfg.think)
        content = [*({"type": "image"} for _ in images), {"type": "text", "text": question}]
        messages = [{"role": "user", "content": content}]
        if self.cfg.system_prompt is not None:
            messages.insert(0, {"role": "system", "content": [{"type": "text", "text": self.cfg.system_prompt}]})
        text = self.processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        inputs = dict(self.processor(text=[text], images=images, return_tensors="pt"))
        length = inputs["input_ids"].shape[1]
        if length + self.cfg.max_completion_tokens > self.max_length:
            raise DataError(
                f"example {example.id}: {length} prompt tokens and --max_completion_tokens {self.cfg.max_completion_tokens} "
                f"exceed the model's {self.max_length} positions; prompts are never cut: lower --max_pixels or that limit"
            )
        return Prompt(example, inputs, target, data.model_solution(example, target), slot)


def collate(prompts: list[Prompt], pad_id: int) -> dict[str, Tensor]:
    """Join encoded prompts to one batch: sequences padded on the left, everything else joined along dimension 0.

    A tensor shaped like input_ids is a sequence. Others (pixels, grids, image sizes) have one row per image or patch,
    in the order of the prompts; their other dimensions are padded with zeros, as processors do.
    """
    length = max(p.inputs["input_ids"].shape[1] for p in prompts)
    batch = {}
    for name, first in prompts[0].inputs.items():
        tensors = [p.inputs[name] for p in prompts]
        if first.shape == prompts[0].inputs["input_ids"].shape:
            fill = pad_id if name == "input_ids" else 0
            tensors = [F.pad(t, (length - t.shape[1], 0), value=fill) for t in tensors]
        else:
            shape = [max(sizes) for sizes in zip(*(t.shape[1:] for t in tensors))]
            tensors = [F.pad(t, [n for full, size in zip(shape[::-1], t.shape[:0:-1]) for n in (0, full - size)]) for t in tensors]
        batch[name] = torch.cat(tensors)
    return batch


class Averages(dict):
    """Sums and counts by name, so that means stay exact over micro-batches and processes of unequal size."""

    def add(self, name: str, total, count=1) -> None:
        before = self.get(name, (0.0, 0.0))
        self[name] = (before[0] + torch.as_tensor(total, dtype=torch.float64), before[1] + torch.as_tensor(count, dtype=torch.float64))

    def reduce(self, accelerator: Accelerator) -> dict[str, float]:
        """The means over all processes, which must hold the same names."""
        table = torch.stack([torch.stack([torch.as_tensor(x).cpu() for x in pair]) for pair in self.values()])
        table = accelerator.reduce(table.float().to(accelerator.device), "sum").cpu()
        return {name: float(total / count) if count > 0 else 0.0 for name, (total, count) in zip(self, table)}


@dataclass
class Run:
    """What the functions of a run share."""

    cfg: Config
    accelerator: Accelerator
    processor: Any
    prompts: Prompts  # encodes; its examples are the training examples, or those to evaluate with --eval_only
    model: nn.Module  # the policy itself: samples, and is saved
    policy: nn.Module  # CompletionLogps of it, wrapped by the engine: trains
    reference: nn.Module | None
    optimizer: torch.optim.Optimizer | None
    rewards: dict[str, tuple[Any, float]]
    eos: Tensor
    distribution: dict[str, Any]  # temperature and forbidden ids, the same for sampler and scorer
    seconds: dict[str, float]

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    def autocast(self):
        """bf16 on GPUs over float32 weights. One context around a whole rollout, so that weights are cast once."""
        return torch.autocast("cuda", torch.bfloat16, enabled=self.device.type == "cuda")

    def accumulate(self, last: bool):
        """Gradients are exchanged between processes only with the last micro-batch."""
        return contextlib.nullcontext() if last else self.accelerator.no_sync(self.policy)

    def collate(self, prompts: list[Prompt]) -> dict[str, Tensor]:
        batch = collate(prompts, self.processor.tokenizer.pad_token_id or 0)
        return {name: tensor.to(self.device) for name, tensor in batch.items()}

    def decode(self, ids: Tensor, mask: Tensor) -> list[str]:
        """The texts of completions, without the EOS and whatever follows it."""
        kept = mask & ~torch.isin(ids, self.eos)
        return self.processor.tokenizer.batch_decode([row[keep].tolist() for row, keep in zip(ids, kept)], skip_special_tokens=True)

    def optimizer_step(self, metrics: Averages) -> None:
        """Clip and step. A gradient that is not finite updates nothing, on any process, and is counted."""
        parameters = [p for p in self.policy.parameters() if p.requires_grad]
        norm = float(self.accelerator.clip_grad_norm_(parameters, self.cfg.max_grad_norm))
        if math.isfinite(norm):  # the norm of exchanged gradients: every process sees the same number
            self.optimizer.step()
            metrics.add("grad_norm", norm)
        metrics.add("skipped_updates", float(not math.isfinite(norm)))
        self.optimizer.zero_grad(set_to_none=True)

    @contextlib.contextmanager
    def timer(self, phase: str):
        """Add the seconds of a phase to self.seconds; GPUs work behind the clock, hence the synchronization."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start


# ------------------------------------------------------------------------------------------------
# Settings.


def parse_config(argv: list[str] | None = None) -> Config:
    """Read and check the command line; SystemExit names the flag that is wrong and what would be right."""
    (cfg,) = HfArgumentParser(Config, description="ViRFT: GRPO for vision-language models with verifiable rewards").parse_args_into_dataclasses(argv)
    world = int(os.environ.get("WORLD_SIZE", 1))
    for flag, good, right in (
        ("task", cfg.task in data.TASKS, f"one of {', '.join(data.TASKS)}"),
        ("group_size", cfg.group_size >= 2, "at least 2: advantages compare completions of the same prompt"),
        ("loss", cfg.loss in ("grpo", "dr_grpo", "dapo"), "grpo, dr_grpo or dapo"),
        ("coordinates", cfg.coordinates in ("auto", "relative", "pixels"), "auto, relative or pixels"),
        ("temperature", cfg.temperature > 0, "above 0; evaluation is greedy anyway"),
        ("steps", cfg.steps >= 1, "at least 1"),
        ("inner_epochs", cfg.inner_epochs >= 1, "at least 1"),
        ("max_completion_tokens", cfg.max_completion_tokens >= 1, "at least 1"),
        ("prompts_per_forward", cfg.prompts_per_forward >= 1, "at least 1"),
        ("prompts_per_step", cfg.prompts_per_step % world == 0, f"a multiple of the {world} processes: whole groups stay on one"),
        ("beta", cfg.beta >= 0, "0 or more"),
        ("eps_low", 0 <= cfg.eps_low < 1, "at least 0 and below 1"),
        ("ask", cfg.ask is None or cfg.categories is not None, "together with --categories, what to look for"),
    ):
        if not good:
            raise SystemExit(f"--{flag} {getattr(cfg, flag)}: must be {right}")
    return cfg


def choose_rewards(cfg: Config) -> dict[str, tuple[Any, float]]:
    """{name: (reward(completion, solution), weight)} from --rewards; settings that a reward takes are bound to it."""
    weights = dict(data.TASKS[cfg.task].rewards)
    if cfg.rewards:
        try:
            weights = {name: float(weight) for name, weight in (entry.split("=") for entry in cfg.rewards)}
            if unknown := weights.keys() - REWARDS.keys():
                raise ValueError(f"unknown: {', '.join(unknown)}")
        except ValueError as error:
            raise SystemExit(f"--rewards {' '.join(cfg.rewards)}: name=weight expected, names of {', '.join(REWARDS)} ({error})") from None
    settings = {"iou_threshold": cfg.iou_threshold, "think": cfg.think}
    chosen = {}
    for name, weight in weights.items():
        takes = inspect.signature(REWARDS[name]).parameters.keys() & settings.keys()
        chosen[name] = (partial(REWARDS[name], **{key: settings[key] for key in takes}), weight)
    return chosen


def describe(run: Run, gradients: bool) -> str:
    """The resolved configuration, the batch arithmetic and the first prompt, as a person should check them."""
    cfg, n = run.cfg, run.accelerator.num_processes
    lines = [f"  {name} = {value!r}" for name, value in asdict(cfg).items()]
    if gradients:
        per_process = cfg.prompts_per_step // n
        micro = math.ceil(per_process / cfg.prompts_per_forward)
        assert per_process * n == cfg.prompts_per_step
        lines.append(
            f"{cfg.prompts_per_step} prompts a step = {n} processes x {per_process}, in {micro} micro-batches of up to "
            f"{cfg.prompts_per_forward}; x {cfg.group_size} completions = {cfg.prompts_per_step * cfg.group_size} a step; "
            f"{len(run.prompts.examples)} examples, {cfg.steps * cfg.prompts_per_step / len(run.prompts.examples):.2f} epochs in {cfg.steps} steps"
        )
    first = run.prompts.encode(run.prompts.examples[0])
    ids, mask = first.inputs["input_ids"], first.inputs["attention_mask"]
    shown = run.processor.tokenizer.decode(ids[0])
    for token in run.distribution["forbidden"].tolist():
        name = run.processor.tokenizer.decode([token])
        count = int((ids == token).sum())
        shown = shown.replace(name * count, f"{name} x {count} ") if count > 1 else shown
    lines.append(f"coordinates: {first.example.coordinates or run.prompts.coordinates}, {first.target[0]} x {first.target[1]} for the first image")
    lines.append(f"first prompt, {int(mask.sum())} tokens:\n{shown}")
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------
# Loading and saving.


@contextlib.contextmanager
def loading(what: str, name: str):
    """Turn what cannot be loaded into a message that says what to do; a hub that cannot be reached gets three lines."""
    try:
        yield
    except ImportError as error:
        missing = re.search(r"requires the (\w+) library|No module named '(\w+)'", str(error))
        package = next(filter(None, missing.groups())) if missing else str(error).strip().splitlines()[0]
        raise SystemExit(f"{what} {name} needs a package that is not installed: pip install {package.lower()}") from None
    except (OSError, ConnectionError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
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
        processor = AutoProcessor.from_pretrained(cfg.model, revision=cfg.revision)
        family = AutoConfig.from_pretrained(cfg.model, revision=cfg.revision).model_type
    if getattr(processor, "chat_template", None) is None:
        raise SystemExit(f"model {cfg.model} has no chat template; an instruction-tuned vision-language model is expected")
    fit = data.image_fit(processor.image_processor, cfg.max_pixels, cfg.min_pixels)
    data.check_fit(processor.image_processor, fit)
    coordinates = cfg.coordinates
    if coordinates == "auto":
        coordinates = data.COORDINATES_OF_FAMILY.get(family, "relative")
        if family not in data.COORDINATES_OF_FAMILY:
            print(f"model type {family}: coordinates unknown, taken as 0..1000 relative; --coordinates says otherwise", file=sys.stderr)
    return processor, fit, coordinates


def load_model(cfg: Config, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """The model in eval mode, which it never leaves: dropout would make sampler and scorer two policies."""
    attention = "flash_attention_2" if device.type == "cuda" and is_flash_attn_2_available() else "sdpa"
    with loading("model", cfg.model):
        model = AutoModelForImageTextToText.from_pretrained(cfg.model, revision=cfg.revision, dtype=dtype, attn_implementation=attention)
    return model.to(device).eval()


def special_tokens(model: nn.Module, processor) -> tuple[list[int], list[int]]:
    """Ids that end a completion (all of the model's EOS ids) and ids that no completion may contain (placeholders)."""
    configured = (model.generation_config.eos_token_id, model.config.get_text_config().eos_token_id, processor.tokenizer.eos_token_id)
    eos = [token for ids in configured if ids is not None for token in (ids if isinstance(ids, list) else [ids])]
    names = ("image_token_id", "image_token_index", "video_token_id", "video_token_index", "vision_start_token_id", "vision_end_token_id")
    forbidden = {token for name in names if isinstance(token := getattr(model.config, name, None), int)}
    return list(dict.fromkeys(eos)), sorted(forbidden - set(eos))


def freeze_unreachable(run: Run) -> list[str]:
    """Freeze parameters that no completion's log-probability depends on, and return their names.

    DDP waits for a gradient from every trainable parameter and would stop at the second step. The graph of one
    forward is walked; nothing is computed backward.
    """
    first = run.collate([run.prompts.encode(run.prompts.examples[0])])
    ids = run.eos[:1].repeat(1, 2)
    reached, seen = set(), set()
    nodes = [run.policy(first, ids, 1, **run.distribution)[0].grad_fn]
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            reached.add(id(node.variable))
        nodes += [parent for parent, _ in node.next_functions]
    unreached = [(name, p) for name, p in run.model.named_parameters() if p.requires_grad and id(p) not in reached]
    for _, parameter in unreached:
        parameter.requires_grad_(False)
    return [name for name, _ in unreached]


def save_model(run: Run, folder: Path) -> None:
    """Write model and processor in Hugging Face format, whole or not at all, in the dtype that the model came in."""
    if run.accelerator.is_main_process:
        aside = folder.with_name(folder.name + ".unfinished")
        shutil.rmtree(aside, ignore_errors=True)
        dtype = AutoConfig.from_pretrained(run.cfg.model, revision=run.cfg.revision).dtype or torch.float32
        state = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in run.model.state_dict().items()}
        trained, run.model.config.dtype = run.model.config.dtype, dtype
        run.model.save_pretrained(aside, state_dict=state)
        run.model.config.dtype = trained
        run.processor.save_pretrained(aside)
        replace_folder(aside, folder)
    run.accelerator.wait_for_everyone()


def replace_folder(new: Path, folder: Path) -> None:
    """Put `new` in the place of `folder`; at every moment one of them is there whole."""
    old = folder.with_name(folder.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    new.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def load_examples(cfg: Config, split: str) -> list[Example]:
    """The task's examples of a split, after --categories, --shots, --negatives, --max_boxes and --eval_limit."""
    task, source = data.TASKS[cfg.task], cfg.data or data.TASKS[cfg.task].hub_data
    options = {"categories": cfg.categories, "negatives": cfg.negatives, "seed": cfg.seed, "skip_bad_images": cfg.skip_bad_images}
    if split == "train":
        options["shots"] = cfg.shots
    elif cfg.eval_data:
        source = cfg.eval_data
    with loading("dataset", source):
        examples, notes = task.read(source, split, **options)
    if split == "train" and cfg.max_boxes is not None:
        kept = [e for e in examples if len(e.solution) <= cfg.max_boxes]
        notes.append(f"--max_boxes {cfg.max_boxes}: {len(examples) - len(kept)} examples left out")
        examples = kept
    if split == "val" and cfg.eval_limit and cfg.eval_limit < len(examples):
        examples = random.Random(cfg.seed).sample(examples, cfg.eval_limit)
    if not examples:
        raise DataError(f"{source}: no example is left of the {split} split")
    if int(os.environ.get("RANK", 0)) == 0:
        print("\n".join([f"{len(examples)} {split} examples from {source}", *notes]), flush=True)
    return examples


def start(cfg: Config) -> Run:
    """Load everything that training, evaluation or a question needs."""
    on_gpu = torch.cuda.is_available()
    accelerator = Accelerator(cpu=not on_gpu, mixed_precision="no", log_with=cfg.report_to or None, project_dir=cfg.out)
    world = int(os.environ.get("WORLD_SIZE", 1))
    if accelerator.num_processes != world:
        raise SystemExit(f"{world} processes were launched but accelerate sees {accelerator.num_processes}: each would train alone")
    processor, fit, coordinates = load_processor(cfg)
    gradients = not (cfg.eval_only or cfg.ask)
    if cfg.ask:
        size = data.image_size(Path(cfg.ask)) if Path(cfg.ask).is_file() else (1, 1)
        examples = [Example(f"{cfg.ask}/{c.strip()}", (Path(cfg.ask),), size, (), c.strip()) for c in cfg.categories.split(",")]
    else:
        examples = load_examples(cfg, "train" if gradients else "val")
    frozen_dtype = torch.bfloat16 if on_gpu else torch.float32
    model = load_model(cfg, torch.float32 if gradients else frozen_dtype, accelerator.device)
    eos, forbidden = special_tokens(model, processor)
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None) or sys.maxsize
    run = Run(
        cfg, accelerator, processor, Prompts(cfg, examples, processor, fit, coordinates, positions),
        model=model, policy=CompletionLogps(model), reference=None, optimizer=None, rewards=choose_rewards(cfg),
        eos=torch.tensor(eos, device=accelerator.device),
        distribution={"temperature": cfg.temperature, "forbidden": torch.tensor(forbidden, dtype=torch.long, device=accelerator.device)},
        seconds={},
    )  # fmt: skip
    if not gradients:
        return run
    frozen = freeze_unreachable(run)
    if frozen and accelerator.is_main_process:
        print(f"frozen, because no completion depends on them: {', '.join(frozen)}")
    trainable = [p for p in model.parameters() if p.requires_grad]
    if accelerator.is_main_process:
        print(f"{sum(p.numel() for p in trainable):,} of {sum(p.numel() for p in model.parameters()):,} parameters are trained")
    optimizer = torch.optim.AdamW(trainable, lr=cfg.lr, betas=(0.9, cfg.beta2), weight_decay=cfg.weight_decay, fused=True)
    run.policy, run.optimizer = accelerator.prepare(run.policy, optimizer)
    if cfg.beta > 0:
        run.reference = CompletionLogps(load_model(cfg, frozen_dtype, accelerator.device)).requires_grad_(False)
    return run


# ------------------------------------------------------------------------------------------------
# Training.


def prompt_stream(run: Run) -> DataLoader:
    """For each step the list of this process's prompts; every epoch sees each example once, in an order of its own."""
    cfg, accelerator = run.cfg, run.accelerator
    order, epoch, total = [], 0, cfg.steps * cfg.prompts_per_step
    while len(order) < total:
        indices = list(range(len(run.prompts.examples)))
        random.Random(f"{cfg.seed}/{epoch}").shuffle(indices)
        order, epoch = order + indices, epoch + 1
    mine = range(accelerator.process_index, cfg.prompts_per_step, accelerator.num_processes)
    steps = [[(slot, order[step * cfg.prompts_per_step + slot]) for slot in mine] for step in range(cfg.steps)]
    return DataLoader(run.prompts, batch_sampler=steps, collate_fn=list, num_workers=cfg.workers)


def whole(prompts: list[Prompt | DataError]) -> list[Prompt]:
    for prompt in prompts:
        if isinstance(prompt, DataError):
            raise prompt
    return prompts


def rollout_metrics(run: Run, ro: Rollout, metrics: Averages) -> None:
    """Everything about the samples; `update` adds what it alone knows."""
    lengths, n = ro.mask.sum(1), len(ro.texts)
    metrics.add("reward", ro.rewards.sum(), ro.rewards.numel())
    for name, values in ro.parts.items():
        metrics.add(f"reward_{name}", values.sum(), values.numel())
    metrics.add("reward_std", ro.rewards.std(1).sum(), len(ro.rewards))
    metrics.add("zero_variance_groups", (ro.rewards == ro.rewards[:, :1]).all(1).sum(), len(ro.rewards))
    metrics.add("completion_tokens", lengths.sum(), n)
    metrics.add("truncated", ro.truncated.sum(), n)
    for name, share in evaluate.answer_shares(ro.texts, data.TASKS[run.cfg.task].parse).items():
        metrics.add(name, share * n, n)
    for phase, seconds in run.seconds.items():
        metrics.add(f"seconds_{phase}", seconds)
    metrics.add("tokens_per_second", lengths.sum() * run.accelerator.num_processes, run.seconds["sample"])


def rollout_records(ro: Rollout, step: int, group_size: int) -> list[dict]:
    """One line of rollouts.jsonl per completion."""
    return [
        {
            "step": step,
            "id": ro.prompts[i // group_size].example.id,
            "completion": text,
            "reward": round(float(ro.rewards.flatten()[i]), 4),
            **{name: round(float(values.flatten()[i]), 4) for name, values in ro.parts.items()},
            "advantage": round(float(ro.advantages[i]), 4),
            "tokens": int(ro.mask[i].sum()),
        }
        for i, text in enumerate(ro.texts)
    ]


def draw_answer(run: Run, prompt: Prompt, text: str, path: Path) -> None:
    """The original picture with true and answered boxes."""
    record = evaluate.record(prompt.example, prompt.target, text, {})
    evaluate.draw_boxes(data.open_image(prompt.example.images[0]), record, path)


def train(run: Run) -> None:
    """The loop: `rollout`, `update`, write down; evaluate now and then; save at the end or when interrupted."""
    cfg, accelerator, out = run.cfg, run.accelerator, Path(run.cfg.out)
    # Not prepared by accelerate, which would step it once per process.
    decay = torch.optim.lr_scheduler.LambdaLR(run.optimizer, lambda s: min(1.0, (s + 1) / (cfg.warmup_steps + 1)) * (1.0 - s / cfg.steps))
    if cfg.report_to:
        accelerator.init_trackers("virft", config={name: str(value) for name, value in asdict(cfg).items()})
    stop = StopAtSignal()
    bar = tqdm(prompt_stream(run), total=cfg.steps, disable=not accelerator.is_main_process, dynamic_ncols=True)
    for step, prompts in enumerate(bar, 1):
        metrics = Averages()
        run.seconds.clear()
        ro = rollout(run, whole(prompts), step)
        update(run, ro, metrics)
        rollout_metrics(run, ro, metrics)
        metrics.add("stop", float(stop.requested))
        row = {"step": step, "lr": decay.get_last_lr()[0], **metrics.reduce(accelerator)}
        decay.step()
        records = gather_object(rollout_records(ro, step, cfg.group_size))
        interrupted = row.pop("stop") > 0
        if accelerator.is_main_process:
            evaluate.append_rows(out / "rollouts.jsonl", records)
            evaluate.append_rows(out / "metrics.jsonl", [row])
            bar.set_postfix({name: f"{row[name]:.3g}" for name in ("reward", *(f"reward_{r}" for r in run.rewards), "kl", "completion_tokens")})
            if cfg.picture_every and step % cfg.picture_every == 0:
                draw_answer(run, prompts[0], ro.texts[0], out / "pictures" / f"step_{step:06d}.png")
        accelerator.log({name: value for name, value in row.items() if name != "step"}, step=step)
        if cfg.eval_every and step % cfg.eval_every == 0:
            examples = load_examples(cfg, "val")
            scores = evaluate_model(run, examples, out / f"eval_{step:06d}")
            accelerator.log({f"eval_{name}": value for name, value in scores.items()}, step=step)
        if interrupted:
            break
    bar.close()
    save_model(run, out / "model")
    if accelerator.is_main_process:
        evaluate.plot_curves(out / "metrics.jsonl", out / "curves.png")
        done = f"stopped after step {step} of {cfg.steps}" if interrupted else f"{cfg.steps} steps done"
        print(f"{done}: model in {out / 'model'}, curves in {out / 'curves.png'}, metrics and rollouts in {out}")
    accelerator.end_training()


class StopAtSignal:
    """Ctrl-C and SIGTERM finish the step, save and stop; a second one changes nothing."""

    def __init__(self):
        self.requested = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.request)

    def request(self, number: int, frame) -> None:
        if not self.requested:
            print(f"\n{signal.Signals(number).name}: finishing this step, then saving", file=sys.stderr, flush=True)
        self.requested = True


# ------------------------------------------------------------------------------------------------
# Evaluation and questions.


@torch.no_grad()
def answer(run: Run, prompts: list[Prompt]) -> list[str]:
    """The policy's most probable answers: the sampler of training, greedy."""
    with run.autocast():
        ids = sample(run.model, run.collate(prompts), None, 1, run.cfg.max_completion_tokens, run.eos, **run.distribution)
    return run.decode(ids, completion_mask(ids, run.eos))


def evaluate_model(run: Run, examples: list[Example], out: Path) -> dict[str, float]:
    """Greedy answers to all examples, shared out over the processes; scores, predictions and pictures in `out`."""
    cfg, accelerator = run.cfg, run.accelerator
    prompts = Prompts(cfg, examples, run.processor, run.prompts.fit, run.prompts.coordinates, run.prompts.max_length)
    mine = list(range(accelerator.process_index, len(examples), accelerator.num_processes))
    batches = [[(i, i) for i in mine[at : at + cfg.eval_batch]] for at in range(0, len(mine), cfg.eval_batch)]
    loader = DataLoader(prompts, batch_sampler=batches, collate_fn=list, num_workers=cfg.workers)
    records = []
    for batch in tqdm(loader, desc="evaluate", disable=not accelerator.is_main_process, dynamic_ncols=True):
        for prompt, text in zip(whole(batch), answer(run, batch)):
            parts = {name: reward(text, prompt.solution) for name, (reward, _) in run.rewards.items()}
            records.append({"row": prompt.slot} | evaluate.record(prompt.example, prompt.target, text, parts))
    records = sorted(gather_object(records), key=lambda record: record["row"])
    scores = evaluate.scores(records, data.TASKS[cfg.task])
    if accelerator.is_main_process:
        evaluate.write_evaluation(out, records, scores, examples)
        print(evaluate.report(scores, len(records)))
        print(f"predictions, results and pictures in {out}")
    return scores


def ask(run: Run) -> None:
    """Answer --ask: print the completions and draw their boxes."""
    out = Path(run.cfg.out)
    for index, example in enumerate(run.prompts.examples):
        prompt = run.prompts.encode(example)
        (text,) = answer(run, [prompt])
        path = out / f"{Path(run.cfg.ask).stem}_{example.category.replace(' ', '_')}.png"
        draw_answer(run, prompt, text, path)
        print(f"{example.category}: {text}\n  drawn in {path}")


def prepare_out(cfg: Config) -> None:
    """Make the run folder; what an earlier run left there is kept unless --overwrite."""
    out = Path(cfg.out)
    if not cfg.ask and (out / "config.json").exists() and not cfg.overwrite:
        raise SystemExit(f"--out {out} holds an earlier run; name another folder, or pass --overwrite true to replace it")
    if cfg.overwrite and (out / "config.json").exists():
        shutil.rmtree(out)
    out.mkdir(parents=True, exist_ok=True)
    if not cfg.ask:
        (out / "config.json").write_text(json.dumps(asdict(cfg), indent=2) + "\n")


def main(argv: list[str] | None = None) -> None:
    cfg = parse_config(argv)
    try:
        run = start(cfg)
        if run.accelerator.is_main_process:
            prepare_out(cfg)
            if not cfg.ask:
                print(describe(run, gradients=not cfg.eval_only), flush=True)
        run.accelerator.wait_for_everyone()
        if cfg.ask:
            ask(run)
        elif cfg.eval_only:
            evaluate_model(run, run.prompts.examples, Path(cfg.out))
        else:
            train(run)
    except DataError as error:
        raise SystemExit(f"data: {error}") from None


if __name__ == "__main__":
    main()
