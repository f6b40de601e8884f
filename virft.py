"""ViRFT: reinforcement fine-tuning of vision-language models with verifiable rewards.

Train a vision-language model with GRPO (arXiv 2402.03300) on rewards that a program can check, as Visual-RFT
(arXiv 2503.01785) does: the IoU of boxes, their confidence, a class name, the answer's format. Every step:

  1. q      take B prompts: an image and a question about it
  2. o_i    sample G completions of each prompt from the policy pi_theta
  3. r_i    score the text of each completion: r_i = weighted sum of rewards (rewards.py)
  4. A_i    compare within the group: A_i = (r_i - mean(r)) / (std(r) + 1e-4)
  5. rho    compute pi_theta(o_it) / pi_old(o_it) for each token; pi_old is the policy that sampled
  6. loss   average -min(rho A, clip(rho, 1 - eps, 1 + eps) A) + beta KL(pi_theta || pi_ref)
            over the tokens of a completion, then over completions
  7. step   follow the gradient; the next step samples anew

What differs from the paper and its released code, and why:

  - A prompt and its image are encoded once per group, not G times, in sampling, in the reference pass and in
    training: `prefill` runs the prompt, `fork` copies its cache, `branch` continues the copies.
  - The sampling loop is our own. `generate` inherits settings from checkpoints (Qwen-VL ships top_k=1, which gives
    G identical answers), and sampler and scorer must be one distribution.

    accelerate launch virft.py --task coco                               # Qwen2-VL-2B on the released data
    accelerate launch virft.py --task coco --data DIR --model NAME       # COCO on disk
    bash run.sh                                                          # offline demo, no GPU

This file trains with rewards.py and data.py alone; extras/ holds what a run opts into. To change something: a reward is
a function in rewards.py (REWARDS), a task an entry of data.TASKS; here a normalization is an entry of NORMALIZATIONS, a
ratio one of RATIOS, a metric a line in `rollout_metrics` or `update`, a setting a line in Config.

Shapes in comments: B prompts, G completions per prompt, P prompt tokens, C completion tokens, V vocabulary, and
N = B * G rows in this order: prompt 0 completion 0, prompt 0 completion 1, ...
"""

import argparse
import contextlib
import copy
import difflib
import hashlib
import json
import math
import os
import shutil
import sys
import time
import typing
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from datetime import timedelta
from operator import ge, gt, lt
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers  # its Auto classes are loaded when they are first used, which keeps --help fast
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import DynamicCache, DynamicLayer, StaticLayer
from transformers.hf_argparser import string_to_bool

import data
from data import CATEGORY_SPLITS, CONVENTIONS, MIN_PIXELS, TASKS, DataError, Example, Prompt, Prompts, extra
from rewards import choose_rewards, reward_weights


def setting(default: Any, help: str, heading: str | None = None, **rules) -> Any:
    """Declare a field of Config; rules: least, above, below or choices of its values; heading: starts one in --help."""
    usual = {"default_factory": lambda: list(default)} if isinstance(default, list) else {"default": default}
    return field(**usual, metadata={"help": help, "heading": heading, "rules": rules})


@dataclass
class Config:
    """Hold every setting; `python virft.py --help` prints these lines."""

    task: str = setting("coco", "what is asked and rewarded", "What is trained on what", choices=TASKS)
    model: str = setting("Qwen/Qwen2-VL-2B-Instruct", "model folder, or NAME or NAME@REVISION on the hub")
    data: str | None = setting(None, "dataset folder, file or hub name; default: the task's released dataset")
    eval_data: str | None = setting(None, "dataset to evaluate on; default: the validation split of --data")
    out: str = setting("runs/virft", "run folder for metrics, rollouts, pictures and the trained model")

    categories: str | None = setting(None, f"names with commas, or base65, {', '.join(CATEGORY_SPLITS)}", "Examples")
    shots: int | None = setting(None, "training images per category (few-shot), chosen by seed", least=1)
    negatives: float = setting(0.0, "share of examples that ask for an absent category", least=0, below=1)
    max_boxes: int | None = setting(None, "leave out training examples with more boxes than this")
    skip_bad_images: bool = setting(False, "leave out and count images that are missing, broken or wrongly annotated")
    max_pixels: int = setting(401408, "largest image in pixels (401408 = 512 patches of 28 x 28)", least=MIN_PIXELS)
    coordinates: str = setting("auto", "what the model speaks; relative: 0..1000", choices=("auto", *CONVENTIONS))
    think: bool = setting(True, "ask for <think> before <answer>; false: answer alone, also in the format reward")
    system_prompt: str | None = setting(None, "system message before each question")

    rewards: list[str] = setting([], "such as iou=1 brier=0.5 my.py:my_reward=2; default: the task's", "The algorithm")
    iou_threshold: float = setting(0.5, "a box counts as found if its IoU is above this", least=0, below=1)
    group_size: int = setting(8, "completions per prompt, G; they are compared with each other", least=2)
    max_completion_tokens: int = setting(512, "completions that have not ended by then are truncated", least=1)
    temperature: float = setting(1.0, "temperature of sampler and scorer alike", above=0)
    loss: str = setting("grpo", "what token losses are averaged over", choices=lambda: NORMALIZATIONS)
    scale_advantages: str = setting("auto", "divide by std; auto: not in dr_grpo", choices=("auto", "true", "false"))
    clip: list[float] = setting([0.2, 0.2], "how far the ratio may fall below and rise above 1 (epsilon)", least=0)
    beta: float = setting(0.04, "weight of the KL to the reference model; 0 loads no reference", least=0)
    inner_epochs: int = setting(1, "optimizer steps on the same completions; clipping acts from the second on", least=1)
    mask_truncated: bool = setting(False, "leave truncated completions out of the loss, but in their group's mean")

    steps: int = setting(200, "training steps (sample, score, update)", "Optimization", least=1)
    prompts_per_step: int = setting(16, "prompts of one step over all processes; evaluation decodes as many", least=1)
    micro_batch: int = setting(0, "completions of a training pass: part of a group or several; 0: one group", least=0)
    lr: float = setting(1e-6, "peak learning rate, decaying linearly to 0", above=0)
    warmup_steps: int = setting(0, "steps of linear warm-up", least=0)
    seed: int = setting(0, "seed of the order of examples and of every sampled token")

    lora_rank: int = setting(0, "rank of adapters on the language model; 0: none", "Memory and several GPUs", least=0)
    freeze_vision: bool = setting(False, "train the language model only; with --lora_rank it is so anyway")
    shard: bool = setting(False, "divide weights, gradients and optimizer among the processes (FSDP2)")
    workers: int = setting(2, "processes per GPU that open and resize images ahead of the step", least=0)

    save_every: int = setting(0, "steps between checkpoints; 0: only when interrupted", "Interruptions", least=0)
    resume: bool = setting(False, "continue the run in --out from its newest checkpoint")

    check: bool = setting(False, "sample 16 examples, say what looks wrong, and stop", "Seeing what happens")
    ask: str | None = setting(None, "picture to answer --categories about; print, draw, and stop")
    eval_only: bool = setting(False, "evaluate --model on the validation split and stop")
    eval_every: int = setting(0, "steps between evaluations; 0: none", least=0)
    eval_limit: int | None = setting(None, "evaluate on this many examples, chosen by seed; default: all", least=1)
    eval_categories: str = setting("gt", "gt: what an image shows; listed: --categories", choices=("gt", "all", "listed"))
    report_to: list[str] = setting([], "trackers besides metrics.jsonl: tensorboard, wandb, ...")


FLOAT32_BLOCK = 2**25  # logits that are float32 at once: 128 MiB
LOOK_EVERY = 16  # tokens between two looks of the sampler at which rows have ended: looking waits for the GPU
MAX_GRAD_NORM = 1.0  # the paper's; rewards are bounded, so a larger gradient is an outlier
ADAM = {"betas": (0.9, 0.999), "weight_decay": 0.0}  # the paper's
PICTURE_EVERY = 50  # steps between two pictures of a training answer


# ================================================================================================
# The algorithm, in the order in which it happens.
#
# Each prompt is encoded once. What models differ in is asked of the model and its cache; no family is known by name.


class Prefix(NamedTuple):
    """Encoded prompts that completions continue: B rows from `prefill`, N rows from `fork`."""

    cache: Any  # keys and values; `branch` and `sample` append to it
    logits: Tensor  # [N, V], of the first completion token
    mask: Tensor  # [N, P], 0 on left padding
    position: Tensor  # [N, 1], or [3, N, 1] with several rotary axes: position of the first completion token
    sight: dict[str, Tensor]  # with cross attention, [N, 1, ...]: which images a completion attends to


def prefill(model: nn.Module, inputs: dict[str, Tensor]) -> Prefix:
    """Run B left-padded prompts and their images through the model, once for all their completions."""
    mask = inputs["attention_mask"]  # [B, P]
    # Positions must not count padding. Models with several rotary axes (Qwen-VL, GLM-V) derive theirs from mask and
    # image grids, and note in rope_deltas how far they lag behind the length: an image has fewer positions than tokens.
    axes = next((part for part in model.modules() if hasattr(part, "rope_deltas")), None)
    told = {} if axes else {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    out = model(**inputs, **told, use_cache=True, logits_to_keep=1)
    position = mask.sum(1, keepdim=True)  # of the next token
    if axes:
        position = (position + axes.rope_deltas).expand(3, -1, -1)  # text advances alike on all axes
    # Mllama's cross_attention_mask [B, P, images, tiles]: completions attend to the images that the last token does.
    sight = {name: x[:, -1:] for name, x in inputs.items() if x.dim() > 2 and x.shape[:2] == mask.shape}
    return Prefix(out.past_key_values, out.logits[:, -1], mask, position, sight)


def fork(prefix: Prefix, rows: Tensor) -> Prefix:
    """Copy the prefix once per completion: completion i continues row rows[i].

    Copying keys and values is cheap; repeating prompts would cost G vision towers and G * P tokens. Indexing is
    differentiable: the gradients of all copies add up in the one prompt. Cache and layers are copied shallowly, because
    `reorder_cache` replaces their tensors and changes none in place.
    """
    cache = copy.copy(prefix.cache)
    cache.layers = [copy.copy(layer) for layer in cache.layers]
    cache.reorder_cache(rows)
    sight = {name: x[rows] for name, x in prefix.sight.items()}
    return Prefix(cache, prefix.logits[rows], prefix.mask[rows], prefix.position[..., rows, :], sight)


def branch(model: nn.Module, prefix: Prefix, ids: Tensor) -> Tensor:
    """Continue each row of a prefix by n tokens, ids [N, n], in one forward; return their logits [N, n, V]."""
    n = ids.shape[1]
    text = {"input_ids": ids, "attention_mask": F.pad(prefix.mask, (0, n), value=1)}
    text["position_ids"] = prefix.position + torch.arange(n, device=ids.device)  # Qwen-VL would use its last offset
    sight = {name: x.repeat_interleave(n, 1) for name, x in prefix.sight.items()}
    return model(**text, **sight, past_key_values=prefix.cache, use_cache=True).logits


def log_distribution(logits: Tensor, temperature: float, forbidden: Tensor) -> Tensor:
    """Return log pi(token | everything before), [..., V], in float32: the one distribution that is sampled and scored.

    No top-k, no top-p. `forbidden` ids are image placeholders: one in a completion would pass for an image. The scorer
    leaves them out too, or it would not score what was sampled.
    """
    logits = logits.float() / temperature  # a copy; a log-softmax in bf16 is wrong in its second digit
    logits[..., forbidden] = -torch.inf
    return logits.log_softmax(-1)


# 2. Sample ---------------------------------------------------------------------------------------


def sampling_noise(keys: list[str], group_size: int, max_tokens: int) -> Tensor:
    """Draw uniform numbers in [0, 1), [B * G, max_tokens] float64, from one generator per prompt.

    A prompt's completions are then the same in any batch and on any process, unlike those of torch.multinomial.
    """
    seeds = [int.from_bytes(hashlib.blake2b(key.encode(), digest_size=7).digest(), "big") for key in keys]
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return torch.cat([torch.rand(group_size, max_tokens, dtype=torch.float64, generator=g) for g in generators])


def reserve(model: nn.Module, cache: Any, tokens: int) -> None:
    """Give the growing layers of a cache room for `tokens` more: decoding then changes no shape and moves no memory."""
    crossing = getattr(model.config.get_text_config(), "cross_attention_layers", None) or ()  # hold images, do not grow
    for i, layer in enumerate(cache.layers):
        if isinstance(layer, DynamicLayer) and i not in crossing:
            cache.layers[i] = StaticLayer(layer.keys.shape[-2] + tokens)
            cache.layers[i].update(layer.keys, layer.values)


def visible(model: nn.Module, cache: Any, mask: Tensor, column: Tensor) -> Tensor | dict[str, Tensor | None]:
    """Return which keys the token at `column` attends to, [N, 1, 1, keys], per kind of layer if there are several.

    mask [N, P + max_tokens]: True on tokens that exist and are no padding. transformers uses a mask of four dimensions
    as it is; of two it would build one per token and wait for the GPU. Sliding layers have kept the last keys only.
    """
    text = model.config.get_text_config()
    kinds, window = set(getattr(text, "layer_types", None) or ()), getattr(text, "sliding_window", None) or 2**31
    keys = min(layer.keys.shape[-2] for layer in cache.layers if isinstance(layer, StaticLayer))
    near = (mask & (torch.arange(mask.shape[1], device=mask.device) > column - window))[:, -keys:]
    seen = {"full_attention": mask[:, None, None], "sliding_attention": near[:, None, None]}
    if text._attn_implementation == "eager":  # adds the mask to its scores, where fused kernels take booleans
        seen = {kind: torch.where(m, 0.0, torch.finfo(model.dtype).min).to(model.dtype) for kind, m in seen.items()}
    return {kind: seen.get(kind) for kind in kinds} if len(kinds) > 1 else seen["sliding_attention"]


def sample(
    model: nn.Module, inputs: dict[str, Tensor], group_size: int, noise: Tensor | None, max_tokens: int, eos: Tensor,
    temperature: float, forbidden: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Sample G completions of each of B prompts; return token ids and their log-probabilities, both [B * G, C].

    noise: uniform numbers [B * G, max_tokens] that decide the tokens; None takes the most probable ones. After its
    first EOS a row is padded with EOS. Between two looks no shape changes and the CPU does not wait for the GPU, so
    rows that have ended are decoded further until half of the rows have.
    """
    B, P = inputs["input_ids"].shape
    rows = torch.arange(B * group_size, device=eos.device)  # the rows that are decoded
    ids, logps = eos[0].repeat(len(rows), max_tokens), torch.zeros(len(rows), max_tokens, device=eos.device)
    ended, t = torch.zeros_like(rows, dtype=torch.bool), torch.zeros(1, dtype=torch.long, device=eos.device)
    prompts = prefill(model, inputs)
    reserve(model, prompts.cache, max_tokens)
    prefix = fork(prompts._replace(mask=F.pad(prompts.mask.bool(), (0, max_tokens))), rows // group_size)

    def draw() -> Tensor:
        logp = log_distribution(prefix.logits, temperature, forbidden)
        if noise is None:
            token = logp.argmax(-1)
        else:
            # Invert the cumulative distribution: the first token at which it exceeds the noise. In float64, because a
            # float32 sum over 150,000 tokens rounds rare ones away; right=True, or noise 0 could draw probability 0.
            cdf = logp.double().exp().cumsum(-1)
            token = torch.searchsorted(cdf, noise[rows, t, None] * cdf[:, -1:], right=True).squeeze(1)
        token = torch.where(ended[rows], eos[0], token)
        ids[rows, t], logps[rows, t] = token, logp.gather(1, token[:, None])[:, 0].masked_fill(ended[rows], 0.0)
        ended[rows] = torch.isin(token, eos)
        return token

    def step() -> None:
        token = draw()
        prefix.mask.index_fill_(1, P + t, True)
        seen = visible(model, prefix.cache, prefix.mask, P + t)
        text = {"input_ids": token[:, None], "attention_mask": seen, "position_ids": prefix.position + t}
        out = model(**text, **prefix.sight, past_key_values=prefix.cache, use_cache=True)
        prefix.logits.copy_(out.logits[:, -1])
        t.add_(1)

    for done in range(1, max_tokens):
        step()
        if done % LOOK_EVERY == 0:
            going = (~ended[rows]).nonzero().squeeze(1)
            if len(going) == 0:
                break
            if 2 * len(going) <= len(rows):
                prefix, rows = fork(prefix, going), rows[going]
    else:
        draw()
    C = max(2, int(completion_mask(ids, eos).sum(1).max()))  # at least two, so that scoring always has a `branch`
    return ids[:, :C], logps[:, :C]


def completion_mask(ids: Tensor, eos: Tensor) -> Tensor:
    """Return True up to and including the first EOS of each row, [N, C]: the EOS is trained, the padding is not."""
    is_eos = torch.isin(ids, eos)
    return (is_eos.cumsum(1) - is_eos.long()) == 0  # by position: where pad == eos, a mask by value would drop the EOS


# 4. Compare --------------------------------------------------------------------------------------


def group_advantages(rewards: Tensor, scale: bool = True) -> Tensor:
    """Return A = (r - mean) / (std + 1e-4) within each group; rewards and result [B, G]. Visual-RFT eq. 2.

    The group is its own baseline, so there is no value network. ddof 1 and 1e-4 are the released code's; 1e-4 bounds A
    where rewards hardly differ. Equal rewards give 0 and stay in the batch: processes must take the same steps.
    scale=False leaves out the division, which weighs very easy and very hard prompts up (arXiv 2503.20783).
    """
    centered = rewards - rewards.mean(1, keepdim=True)
    return centered / (rewards.std(1, keepdim=True) + 1e-4) if scale else centered


# 5. Log-probabilities and their gradients --------------------------------------------------------


def token_logps(logits: Tensor, ids: Tensor, temperature: float, forbidden: Tensor) -> tuple[Tensor, Tensor]:
    """Return log pi of the chosen tokens and the entropy they were chosen from (no gradient), both [N, C] float32.

    logits [N, C, V] predict ids [N, C]. Blocks of FLOAT32_BLOCK logits are recomputed in the backward pass: float32
    logits of a whole group, at a vocabulary of 150,000, would be larger than the rest of the graph.
    """

    def tokens(logits: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        logp = log_distribution(logits, temperature, forbidden)
        with torch.no_grad():
            entropy = torch.special.entr(logp.exp()).sum(-1)  # entr(0) = 0, where p * log p would be 0 * inf
        return logp.gather(-1, ids[..., None]).squeeze(-1), entropy

    at_once = max(1, FLOAT32_BLOCK // logits.shape[-1])
    blocks = zip(logits.flatten(0, 1).split(at_once), ids.flatten().split(at_once))
    logps, entropies = zip(*(checkpoint(tokens, *block, use_reentrant=False) for block in blocks))
    return torch.cat(logps).view_as(ids), torch.cat(entropies).view_as(ids)


def completion_logps(
    model: nn.Module, prompts: Prefix, rows: Tensor, ids: Tensor, temperature: float, forbidden: Tensor
) -> tuple[Tensor, Tensor]:
    """Return log pi_theta(o_t | q, o_<t) and entropy, both [n, C], of ids [n, C]; row i continues prompt rows[i]."""
    if not isinstance(prompts, Prefix):  # linear attention: see `encode`
        return token_logps(prompts.logits(model, ids), ids, temperature, forbidden)
    prefix = fork(prompts, rows)
    first = token_logps(prefix.logits[:, None], ids[:, :1], temperature, forbidden)  # the prompt predicts it
    rest = token_logps(branch(model, prefix, ids[:, :-1]), ids[:, 1:], temperature, forbidden)
    return torch.cat([first[0], rest[0]], 1), torch.cat([first[1], rest[1]], 1)


def shares_prompt(model: nn.Module) -> bool:
    """Return whether gradients pass through the model's cache: linear attention overwrites its state, they cannot."""
    return not any(hasattr(layer, "recurrent_states") for layer in DynamicCache(config=model.config).layers)


def encode(model: nn.Module, inputs: dict[str, Tensor]) -> Any:
    """Encode B prompts for scoring: a Prefix, or for models with linear attention their prompts to be repeated."""
    return prefill(model, inputs) if shares_prompt(model) else extra("repeated", "linear attention").Prompts(inputs)


def score(model: nn.Module, inputs: dict[str, Tensor], ids: Tensor, chunks: Sequence[Tensor], **distribution) -> Tensor:
    """Return log pi [N, C] of completions ids [N, C] to B prompts, chunk by chunk of rows, without gradients."""
    G = len(ids) // len(inputs["input_ids"])
    with torch.no_grad():
        prompts = encode(model, inputs)
        return torch.cat([completion_logps(model, prompts, rows // G, ids[rows], **distribution)[0] for rows in chunks])


def backward(
    model: nn.Module, inputs: dict[str, Tensor], ids: Tensor, chunks: Sequence[Tensor],
    loss_of: Callable[[Tensor, Tensor, Tensor], Tensor], **distribution,
) -> None:  # fmt: skip
    """Backpropagate the sum over chunks of loss_of(rows, logp, entropy), encoding each prompt once.

    Stage 1 encodes the prompts and detaches their logits, keys and values into leaves. Each chunk of completions goes
    forward and backward at once and adds its gradients to the leaves: memory holds the graph of one chunk. Stage 2
    backpropagates those sums through the prompts and their images. The gradient is that of one large graph.

    ids [N, C]: completions to B prompts in order; chunks: tensors of row indices; logp, entropy: [len(rows), C].
    """
    G, prompts, ends, leaves = len(ids) // len(inputs["input_ids"]), encode(model, inputs), [], []
    if isinstance(prompts, Prefix):
        cache = copy.copy(prompts.cache)
        cache.layers = [copy.copy(layer) for layer in cache.layers]
        ends = [prompts.logits, *(x for layer in cache.layers for x in (layer.keys, layer.values))]
        leaves = [end.detach().requires_grad_(end.requires_grad) for end in ends]
        for layer, keys, values in zip(cache.layers, leaves[1::2], leaves[2::2]):
            layer.keys, layer.values = keys, values
        prompts = prompts._replace(cache=cache, logits=leaves[0])
    for rows in chunks:
        logp, entropy = completion_logps(model, prompts, rows // G, ids[rows], **distribution)
        loss_of(rows, logp, entropy).backward()
    reached = [(end, leaf.grad) for end, leaf in zip(ends, leaves) if leaf.grad is not None]
    if reached:
        torch.autograd.backward(*zip(*reached))


# 6. The loss -------------------------------------------------------------------------------------


def kl_to_reference(logp: Tensor, logp_ref: Tensor) -> Tensor:
    """Estimate KL(pi_theta || pi_ref) per token: k3 = exp(d) - d - 1 with d = logp_ref - logp. GRPO eq. 4.

    It is unbiased for tokens of pi_theta and never negative; expm1 keeps the digits near d = 0. Its gradient is on
    average that of KL(pi_ref || pi_theta), which has the same minimum: GRPO trains with that, and so do we. It is part
    of the loss and not of the reward, where the group's mean and deviation would change its weight.
    """
    d = logp_ref - logp
    return torch.expm1(d) - d


# Mean over what? (mask [N, C], C_max) -> weights [N, C] and divisor: loss = sum(weights * token loss) / divisor. The
# divisor counts one process; `update` adds up those of all processes.
NORMALIZATIONS = {
    # Mean over a completion's tokens, then over completions (the paper): a token of a short completion weighs more.
    "grpo": lambda mask, C_max: (mask / mask.sum(1, keepdim=True).clamp(min=1), mask.any(1).sum()),
    # Sum over tokens / max_completion_tokens, then mean over completions (arXiv 2503.20783): no bias by length.
    "dr_grpo": lambda mask, C_max: (mask / C_max, mask.any(1).sum()),
    # Mean over all tokens of the optimizer step (DAPO, arXiv 2503.14476): every token weighs the same.
    "dapo": lambda mask, C_max: (mask.float(), mask.sum()),
}


def clipped_ratio(
    logp: Tensor, logp_old: Tensor, A: Tensor, mask: Tensor, eps: list[float]
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return -min(rho A, clip(rho) A) per token and whether the clip removed its gradient, both [N, C]. GRPO eq. 3.

    logp, logp_old, mask [N, C]; A [N, 1]; eps: how far rho may fall below and rise above 1.
    """
    rho = torch.where(mask, logp - logp_old, 0.0).exp()  # masked before exp: on padding, inf * 0 would be NaN
    unclipped, clipped = rho * A, rho.clamp(1 - eps[0], 1 + eps[-1]) * A
    # min() removes the gradient of tokens that moved far enough in the good direction: A > 0 and rho = 1.5 gives the
    # clipped constant. A move in the bad direction is always corrected: A < 0 and rho = 1.5 gives 1.5 A.
    loss = -torch.minimum(unclipped, clipped)
    return loss, clipped < unclipped


RATIOS = {"token": clipped_ratio}  # (logp, logp_old, A, mask, eps) -> token loss, clipped
RATIO = "token"  # the entry that trains; a setting once there are two


def grpo_loss(
    logp: Tensor, logp_old: Tensor, logp_ref: Tensor | None, advantages: Tensor, mask: Tensor, weights: Tensor,
    eps: list[float], beta: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the sum over tokens of weight * (ratio loss + beta KL) and, per token [N, C], the KL and what was clipped.

    logp, logp_old, logp_ref [N, C]: of pi_theta, of the policy that sampled, of the reference (None: no KL term);
    advantages [N]; mask, weights [N, C]: the tokens that count and how much, see NORMALIZATIONS.
    """
    loss, clipped = RATIOS[RATIO](logp, logp_old, advantages[:, None], mask, eps)
    reference = logp if logp_ref is None else logp_ref  # without a reference the KL of pi_theta to itself: 0
    kl = kl_to_reference(torch.where(mask, logp, 0.0), torch.where(mask, reference, 0.0))
    return (weights * (loss + beta * kl)).sum(), kl.detach(), clipped


# One step ----------------------------------------------------------------------------------------


class Rollout(NamedTuple):
    """What one process sampled in a step, and how it was judged."""

    prompts: list[Prompt]
    ids: Tensor  # [N, C]
    mask: Tensor  # [N, C], completion_mask
    truncated: Tensor  # [N], True where no EOS came within the limit
    texts: list[str]  # N
    parts: dict[str, Tensor]  # each reward by name, [B, G]
    rewards: Tensor  # their weighted sum, [B, G]
    advantages: Tensor  # [N]

    def rows(self, step: int) -> list[dict]:
        """Return a line of rollouts.jsonl for each completion."""
        names = ("reward", "advantage", "tokens")
        numbers = zip(self.rewards.flatten().tolist(), self.advantages.tolist(), self.mask.sum(1).tolist())
        return [
            {"step": step, "id": self.prompts[i // self.rewards.shape[1]].example.id, "completion": self.texts[i]}
            | dict(zip(names, row)) | {"rewards": {name: part.flatten()[i].item() for name, part in self.parts.items()}}
            for i, row in enumerate(numbers)
        ]  # fmt: skip


class MicroBatch(NamedTuple):
    """Some prompts of a step with their n completions: what one pass of training encodes. DPO needs the first four."""

    prompts: list[Prompt]
    inputs: dict[str, Tensor]
    ids: Tensor  # [n, C], C the longest of these completions
    mask: Tensor  # [n, C], the tokens that are trained
    weights: Tensor | None = None  # [n, C]
    advantages: Tensor | None = None  # [n]
    logp_old: Tensor | None = None  # [n, C], filled in the first inner epoch
    logp_ref: Tensor | None = None  # [n, C]; None without a KL term


def rollout(run: "Run", prompts: list[Prompt], step: int) -> Rollout:
    """Sample, score and compare (2 to 4). A group lives on one process, so comparing needs no communication."""
    cfg, G = run.cfg, run.cfg.group_size
    with run.timer("sample"), torch.no_grad(), run.autocast(), run.gathered():
        keys = [f"{cfg.seed}/{step}/0/{p.slot}/{p.example.id}" for p in prompts]  # 0: the round, as in draw_examples
        noise = sampling_noise(keys, G, cfg.max_completion_tokens).to(run.device)
        inputs, limit = run.collate(prompts), cfg.max_completion_tokens
        ids, _ = sample(run.model, inputs, G, noise, limit, run.eos, **run.distribution)
    mask, truncated = completion_mask(ids, run.eos), ~torch.isin(ids, run.eos).any(1)
    texts = run.decode(ids, mask)  # for the rewards only: training uses the sampled ids, never text tokenized again
    parts = {
        name: torch.tensor([reward(text, prompts[i // G].solution) for i, text in enumerate(texts)]).view(-1, G)
        for name, (reward, _) in run.rewards.items()
    }
    rewards = sum(weight * parts[name] for name, (_, weight) in run.rewards.items())
    scale = cfg.loss != "dr_grpo" if cfg.scale_advantages == "auto" else cfg.scale_advantages == "true"
    # Truncated completions stay in the group's mean: without them an answer that ends would look worse than it is.
    advantages = group_advantages(rewards, scale).flatten().to(run.device)
    return Rollout(prompts, ids, mask, truncated, texts, parts, rewards, advantages)


def micro_batches(run: "Run", ro: Rollout) -> tuple[list[MicroBatch], Tensor]:
    """Divide a rollout into parts that go through the model one after the other; return the loss's divisor too.

    A part is as many groups as --micro_batch holds, at least one. The reference scores each part once.
    """
    cfg, G, parts = run.cfg, run.cfg.group_size, []
    counted = ro.mask & ~ro.truncated[:, None] if cfg.mask_truncated else ro.mask
    weights, divisor = NORMALIZATIONS[cfg.loss](counted, cfg.max_completion_tokens)
    at_once = max(1, cfg.micro_batch // G)
    for start in range(0, len(ro.prompts), at_once):
        prompts, rows = ro.prompts[start : start + at_once], slice(start * G, (start + at_once) * G)
        C = max(2, int(ro.mask[rows].sum(1).max()))
        ids, mask, w = ro.ids[rows, :C], counted[rows, :C], weights[rows, :C]
        batch = MicroBatch(prompts, run.collate(prompts), ids, mask, w, ro.advantages[rows], torch.zeros_like(w))
        parts.append(batch._replace(logp_ref=run.reference_logps(batch)))
    return parts, divisor


def update(run: "Run", ro: Rollout) -> "Averages":
    """Take `inner_epochs` optimizer steps on one rollout (5 to 7) and return the metrics of the step.

    The loss is a sum over tokens, divided by a number that is known beforehand: so it can go backward in parts.
    """
    cfg, metrics, (batches, share) = run.cfg, rollout_metrics(run, ro), micro_batches(run, ro)
    divisor = run.accelerator.reduce(share.float(), "sum").clamp(min=1)  # 0 where every completion is masked
    for epoch in range(cfg.inner_epochs):
        for batch in batches:

            def loss_of(rows: Tensor, logp: Tensor, entropy: Tensor) -> Tensor:
                if epoch == 0:
                    # The policy has not moved since it sampled, so its own value is pi_old's: no second forward, and
                    # rho = 1. The "grpo" loss is then about 0, because the advantages of a group add up to 0; its
                    # gradient, the mean of -A grad log pi_theta, is not.
                    batch.logp_old[rows] = logp.detach()
                mask, logp_ref = batch.mask[rows], None if batch.logp_ref is None else batch.logp_ref[rows]
                old, A, w = batch.logp_old[rows], batch.advantages[rows], batch.weights[rows]
                loss, kl, clipped = grpo_loss(logp, old, logp_ref, A, mask, w, cfg.clip, cfg.beta)
                metrics.add("loss", loss.detach(), 0)
                for name, values in {"kl": kl, "clip_fraction": clipped, "entropy": entropy}.items():
                    metrics.add(name, values[mask].sum(), mask.sum())
                return loss / divisor

            run.backward(batch, loss_of)
        metrics.add("loss", 0, share)
        optimizer_step(run, metrics)
    return metrics


def rollout_metrics(run: "Run", ro: Rollout) -> "Averages":
    """Return the metrics of what was sampled; `update` adds those of the loss."""
    lengths, (B, G) = ro.mask.sum(1), ro.rewards.shape
    per_completion = {"reward": ro.rewards, "completion_tokens": lengths, "truncated": ro.truncated}
    per_completion |= {f"reward/{name}": values for name, values in ro.parts.items()}
    same = (ro.rewards == ro.rewards[:, :1]).all(1)  # such groups teach nothing
    metrics = Averages()
    for name, values in (per_completion | {"reward_std": ro.rewards.std(1), "zero_variance_groups": same}).items():
        metrics.put(name, values.sum(), values.numel())
    for name, share in data.answer_shares(ro.texts, run.prompts.task.parse).items():
        metrics.put(name, share * B * G, B * G)
    metrics.put("tokens_per_second", lengths.sum() * run.accelerator.num_processes, run.seconds["sample"])
    return metrics


def optimizer_step(run: "Run", metrics: "Averages") -> None:
    """Add up the gradients of all processes, clip and step (7). A gradient that is not finite changes nothing."""
    with run.timer("train"):
        trained = [p for p in run.model.parameters() if p.requires_grad]
        if run.accelerator.num_processes > 1 and not run.cfg.shard:  # shards are exchanged as they go backward
            exchange_gradients(trained)
        norm = nn.utils.clip_grad_norm_(trained, MAX_GRAD_NORM)
        norm = float(norm.full_tensor() if run.cfg.shard else norm)
        finite = math.isfinite(norm)  # of summed gradients: every process sees the same norm and decides alike
        if finite:
            run.whole = False  # until `write`: an error in between must leave no checkpoint of half a step
            run.optimizer.step()
        run.optimizer.zero_grad(set_to_none=True)
    metrics.add("grad_norm", norm if finite else 0.0, finite)
    metrics.add("skipped_updates", not finite)


def exchange_gradients(parameters: list[nn.Parameter]) -> None:
    """Sum every gradient over the processes: all that data parallelism is, once per optimizer step.

    A gradient that is missing on some processes counts as 0 there; one that is missing on all stays missing. The calls
    are asynchronous and tensor by tensor: flattened into one tensor the gradients would be in memory twice.
    """
    has = torch.tensor([float(p.grad is not None) for p in parameters], device=parameters[0].device)
    dist.all_reduce(has, op=dist.ReduceOp.MAX)
    reached = [p for p, anywhere in zip(parameters, has.tolist()) if anywhere]
    for p in reached:
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
    for sum_ in [dist.all_reduce(p.grad, async_op=True) for p in reached]:
        sum_.wait()


def train(run: "Run", held_out: Sequence[Example] = ()) -> None:
    """The loop: sample, update, write; now and then draw, evaluate and save."""
    cfg, out, report = run.cfg, Path(run.cfg.out), extra("report")
    with guarded(run) as stopping:
        for step, prompts in run.steps():
            ro = rollout(run, prompts, step)
            metrics = update(run, ro)
            write(run, step, metrics, ro.rows(step), shown=("reward", "kl", "completion_tokens"))
            if report and run.main and due(step, PICTURE_EVERY):
                picture = out / "pictures" / f"step_{step:06d}.png"
                report.draw_answer(run.prompts.task, prompts[0], ro.texts[0], picture)
            if held_out and due(step, cfg.eval_every):
                extra("evaluate", "--eval_every").evaluate(run, answer, held_out, out / f"eval_{step:06d}")
            stop = stopping()
            if stop or due(step, cfg.save_every):
                extra("checkpoints", "--save_every").save(run)
            if stop:
                break
        else:
            save_model(run)
    if report and run.main:
        report.plot_curves([out / "metrics.jsonl"], out / "curves.png")


# ================================================================================================
# A run: what the functions above share, and how it is loaded.


class Averages(dict):
    """Metrics as sums and counts by name: means stay exact over micro-batches and processes of unequal size."""

    def add(self, name: str, total, count=1) -> None:
        self[name] = self.get(name, 0.0) + torch.tensor([float(total), float(count)], dtype=torch.float64)

    def put(self, name: str, total, count=1) -> None:
        """Add a metric that comes once a step; ValueError where its name is taken."""
        if name in self:
            raise ValueError(f"two metrics are called {name}: rename one")
        self.add(name, total, count)

    def reduce(self, accelerator: Accelerator) -> dict[str, float]:
        """Return the means over all processes, which must hold the same names."""
        table = accelerator.reduce(torch.stack(list(self.values())).to(accelerator.device), "sum").tolist()
        return {name: total / count if count > 0 else 0.0 for name, (total, count) in zip(self, table)}


@dataclass
class Run:
    """What the functions of a run share; complete once it is built."""

    cfg: Any
    accelerator: Accelerator
    prompts: Prompts  # the examples, and how they become what the model reads
    model: nn.Module  # the policy
    reference: nn.Module | None  # pi_ref; None without a KL term, and where pi_ref is the policy without its adapters
    adapters: Any  # peft's handle on LoRA adapters, or None
    optimizer: torch.optim.Optimizer | None  # None in evaluation
    rewards: dict[str, tuple[Callable, float]]  # by name: reward(completion, solution) and weight
    eos: Tensor  # ids that end a completion
    distribution: dict[str, Any]  # temperature and forbidden ids, the same for sampler and scorer
    done: int  # steps that have been taken
    whole: bool = True  # whether weights and moments are those after `done` steps
    seconds: dict[str, float] = field(default_factory=dict)  # by phase, of the current step

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    @property
    def main(self) -> bool:
        return self.accelerator.is_main_process

    def say(self, text: str) -> None:
        self.accelerator.print(text, flush=True)

    def collate(self, prompts: list[Prompt]) -> dict[str, Tensor]:
        batch = data.collate(prompts, self.prompts.processor.tokenizer.pad_token_id or 0)
        return {name: tensor.to(self.device) for name, tensor in batch.items()}

    def decode(self, ids: Tensor, mask: Tensor) -> list[str]:
        """Return the texts of completions, without the EOS and the padding after it."""
        rows = [row[keep].tolist() for row, keep in zip(ids, mask & ~torch.isin(ids, self.eos))]
        return self.prompts.processor.tokenizer.batch_decode(rows, skip_special_tokens=True)

    def autocast(self):
        """Compute in bf16 on GPUs, over float32 weights; one context around a phase casts every weight once."""
        return torch.autocast("cuda", torch.bfloat16, enabled=self.device.type == "cuda")

    def gathered(self):
        """Gather shards once for everything inside, not at every token."""
        return extra("shards", "--shard").gathered(self.model) if self.cfg.shard else contextlib.nullcontext()

    def chunks(self, batch: MicroBatch, unit: int = 1) -> Sequence[Tensor]:
        """Return the rows of a micro-batch in chunks of --micro_batch completions, in whole units (DPO's is a pair)."""
        rows, size = torch.arange(len(batch.ids), device=self.device), max(unit, self.cfg.micro_batch // unit * unit)
        return rows.split(size) if self.cfg.micro_batch and shares_prompt(self.model) else [rows]

    def backward(self, batch: MicroBatch, loss_of: Callable[..., Tensor], unit: int = 1) -> None:
        with self.timer("train"), self.autocast():
            backward(self.model, batch.inputs, batch.ids, self.chunks(batch, unit), loss_of, **self.distribution)

    def reference_logps(self, batch: MicroBatch) -> Tensor | None:
        """Return log pi_ref [n, C] of a micro-batch; None without a KL term."""
        if not self.cfg.beta:
            return None
        off = self.adapters.disable_adapter() if self.adapters else contextlib.nullcontext()
        with self.timer("reference"), self.autocast(), off:
            return score(self.reference or self.model, batch.inputs, batch.ids, self.chunks(batch), **self.distribution)

    @contextlib.contextmanager
    def timer(self, phase: str):
        """Add the seconds of a phase to self.seconds. CUDA is asynchronous: synchronize before reading the clock."""
        wait = torch.cuda.synchronize if self.device.type == "cuda" else lambda: None
        wait()
        start = time.perf_counter()
        yield
        wait()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start

    def steps(self) -> Iterator[tuple[int, list[Prompt]]]:
        """Yield each step that is left with this process's prompts; set its learning rate and show progress."""
        cfg, seen, todo = self.cfg, set(), range(self.done + 1, self.cfg.steps + 1)
        slots = range(self.accelerator.process_index, cfg.prompts_per_step, self.accelerator.num_processes)
        examples = len(self.prompts.examples)
        drawn = [data.draw_examples(cfg.seed, examples, cfg.prompts_per_step, step, 0, slots) for step in todo]
        loader = DataLoader(self.prompts, batch_sampler=drawn, collate_fn=list, num_workers=cfg.workers)
        self.bar = tqdm(loader, initial=self.done, total=cfg.steps, disable=not self.main, dynamic_ncols=True)
        for step, prompts in zip(todo, self.bar):
            for flaw in {flaw for prompt in data.whole(prompts) for flaw in prompt.skipped} - seen:
                tqdm.write(f"skipped: {flaw}")
                seen.add(flaw)
            self.seconds.clear()
            for group in self.optimizer.param_groups:  # linear warm-up, linear decay to 0 after the last step
                group["lr"] = cfg.lr * min(1.0, step / (cfg.warmup_steps + 1)) * (1.0 - (step - 1) / cfg.steps)
            yield step, prompts
        self.bar.close()


def loading(what: str, name: str):
    """Explain what cannot be loaded, where extras/ is there to do it."""
    return extra("hub").loading(what, name) if extra("hub") else contextlib.nullcontext()


def pretrained(auto: Any, model: str, **settings) -> Any:
    """Call from_pretrained of one of transformers' Auto classes; model: a folder, or NAME[@REVISION] on the hub."""
    name, _, revision = (model, "", "") if Path(model).exists() else model.partition("@")
    with loading("model", model):
        return auto.from_pretrained(name, revision=revision or None, **settings)


def load_model(name: str, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """Load a model in eval mode, which it never leaves: dropout would make sampler and scorer two policies."""
    model = pretrained(transformers.AutoModelForImageTextToText, name, dtype=dtype, attn_implementation="sdpa")
    return model.to(device).eval()


def load_processor(cfg: Any, coordinates: str) -> tuple[Any, data.Fit, str, int]:
    """Load a processor; return it, how it sizes images, the coordinates, and how many positions the model has."""
    config = pretrained(transformers.AutoConfig, cfg.model)
    processor = pretrained(transformers.AutoProcessor, cfg.model)
    if getattr(processor, "chat_template", None) is None:
        raise SystemExit(f"model {cfg.model} has no chat template; an instruction-tuned model is expected")
    fit = data.image_fit(processor.image_processor, cfg.max_pixels)
    data.check_fit(processor.image_processor, fit)
    if coordinates == "auto":
        coordinates = data.COORDINATES_OF_FAMILY.get(kind := config.model_type)
        if coordinates is None:
            print(f"model type {kind} is not known: coordinates are 0..1000; see --coordinates", file=sys.stderr)
    positions = getattr(config.get_text_config(), "max_position_embeddings", None) or sys.maxsize
    return processor, fit, coordinates or "relative", positions


def special_tokens(model: nn.Module, processor: Any) -> tuple[list[int], list[int]]:
    """Return the ids that end a completion (all EOS ids of the model) and those it may not contain (placeholders)."""
    text, tokenizer = model.config.get_text_config(), processor.tokenizer
    configured = (model.generation_config.eos_token_id, text.eos_token_id, tokenizer.eos_token_id)
    eos = {token for ids in configured if ids is not None for token in (ids if isinstance(ids, list) else [ids])}
    kinds = ("image_token_id", "image_token_index", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    forbidden = {token for kind in kinds if isinstance(token := getattr(model.config, kind, None), int)}
    predicted = range(model.get_output_embeddings().weight.shape[0])  # some placeholders have an embedding but no logit
    return sorted(eos), sorted(forbidden.intersection(predicted) - eos)


def load_examples(cfg: Config, split: str) -> list[Example]:
    """Load the examples of a split and print what was left out and why."""
    task, bad = TASKS[cfg.task], cfg.skip_bad_images
    chosen = {"categories": cfg.categories, "negatives": cfg.negatives, "seed": cfg.seed, "skip_bad_images": bad}
    if split == "train":
        source, chosen = cfg.data or task.hub_data, chosen | {"shots": cfg.shots, "max_boxes": cfg.max_boxes}
    else:
        source = cfg.eval_data or cfg.data or task.hub_data
        chosen |= {"limit": cfg.eval_limit, "eval_categories": cfg.eval_categories}
    with loading("dataset", source):
        examples, notes = data.load_examples(task, source, split, **chosen)
    if os.environ.get("RANK", "0") == "0":
        print("\n".join(notes), flush=True)
    return examples


def connect(cfg: Any) -> Accelerator:
    """Join the processes that were launched; SystemExit where they would not find each other."""
    patience = InitProcessGroupKwargs(timeout=timedelta(hours=2))  # the others wait while one process writes 100 GB
    cpu, trackers = not torch.cuda.is_available(), getattr(cfg, "report_to", None) or None
    accelerator = Accelerator(cpu=cpu, log_with=trackers, project_dir=cfg.out, kwargs_handlers=[patience])
    n, launched = accelerator.num_processes, int(os.environ.get("WORLD_SIZE", "1"))
    if n != launched:
        raise SystemExit(f"{launched} processes were launched, accelerate sees {n}: each would train alone")
    if getattr(cfg, "steps", 0) and cfg.prompts_per_step % n:
        raise SystemExit(f"--prompts_per_step {cfg.prompts_per_step}: must be a multiple of the {n} processes")
    torch.multiprocessing.set_sharing_strategy("file_system")  # 64 prompts a batch need more files than may be open
    return accelerator


def build(
    cfg: Any, accelerator: Accelerator, prompts: Prompts, rewards: dict, trains: bool, temperature: float = 1.0
) -> Run:  # fmt: skip
    """Load policy, reference and optimizer. On GPUs what is trained is float32, or it would lose updates of 1e-6."""
    device, reference, adapters, optimizer, saved = accelerator.device, None, None, None, None
    if trains and cfg.resume:
        saved = extra("checkpoints", "--resume").find(cfg, prompts.examples)
    frozen = torch.bfloat16 if device.type == "cuda" else torch.float32
    source = saved.model if saved and not cfg.lora_rank else cfg.model
    model = load_model(source, torch.float32 if trains and not cfg.lora_rank else frozen, device)
    if trains:
        if cfg.lora_rank:
            adapters = extra("adapters", "--lora_rank").add(model, cfg.lora_rank, cfg.seed, saved and saved.model)
        elif cfg.freeze_vision:
            extra("adapters", "--freeze_vision").freeze_vision(model, None if cfg.shard else frozen)
        if cfg.beta and not adapters:
            reference = load_model(cfg.model, frozen, device).requires_grad_(False)
        if cfg.shard:
            extra("shards", "--shard").shard(model, reference, adapters)
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=cfg.lr, **ADAM, fused=True)
        if saved:
            saved.restore(model, optimizer, accelerator.is_main_process)
    special = special_tokens(model, prompts.processor)
    eos, forbidden = (torch.tensor(ids, dtype=torch.long, device=device) for ids in special)
    distribution, done = {"temperature": temperature, "forbidden": forbidden}, saved.step if saved else 0
    return Run(cfg, accelerator, prompts, model, reference, adapters, optimizer, rewards, eos, distribution, done)


def start(cfg: Config) -> Run:
    """Load everything that training, evaluation or a question needs. Nothing is written yet."""
    accelerator, task, trains = connect(cfg), TASKS[cfg.task], not (cfg.eval_only or cfg.ask)
    try:
        weights = reward_weights(cfg.rewards) or task.rewards
        rewards = choose_rewards(weights, iou_threshold=cfg.iou_threshold, think=cfg.think)
    except ValueError as error:
        raise SystemExit(f"--rewards {' '.join(cfg.rewards)}: {error}") from None
    processor, fit, coordinates, positions = load_processor(cfg, cfg.coordinates)
    room = positions - cfg.max_completion_tokens
    if cfg.ask:
        examples = extra("check", "--ask").questions(task, Path(cfg.ask), cfg.categories)
    else:
        examples = load_examples(cfg, "train" if trains else "val")
    asked = (cfg.think, cfg.system_prompt, room, cfg.skip_bad_images)
    prompts = Prompts(task, examples, processor, fit, coordinates, *asked)
    return build(cfg, accelerator, prompts, rewards, trains, cfg.temperature if trains else 1.0)


# ------------------------------------------------------------------------------------------------
# What a run writes.


def open_out(run: Run, per_prompt: int, what: str, notes: Sequence[str] = ()) -> None:
    """Make the run folder, once everything has loaded, and print what a person should check."""
    cfg, out, checks = run.cfg, Path(run.cfg.out), extra("check")
    if run.main:
        out.mkdir(parents=True, exist_ok=True)
        if not (out / "config.json").exists():  # its time is when an evaluation began
            (out / "config.json").write_text(json.dumps(asdict(cfg), indent=2) + "\n")
    if checks:
        checks.describe(run, per_prompt, what, notes)
    else:
        run.say("extras/ is missing: no description of the run, no pictures; Ctrl-C saves OUT/model and no checkpoint")
    if cfg.report_to:
        run.accelerator.init_trackers("virft", config={name: str(value) for name, value in asdict(cfg).items()})
    run.accelerator.wait_for_everyone()


def due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def write(run: Run, step: int, metrics: Averages, rows: list[dict], shown: Sequence[str]) -> None:
    """Append the step to metrics.jsonl, rollouts.jsonl and the trackers; from here on it is taken."""
    for phase, seconds in run.seconds.items():
        metrics.put(f"seconds/{phase}", seconds)
    row = {"lr": run.optimizer.param_groups[0]["lr"], **metrics.reduce(run.accelerator)}
    rows = gather_object(rows)
    if run.main:
        data.append_rows(Path(run.cfg.out) / "rollouts.jsonl", rows)
        data.append_rows(Path(run.cfg.out) / "metrics.jsonl", [{"step": step} | row])
    run.accelerator.log(row, step=step)
    run.bar.set_postfix({name: f"{row[name]:.3g}" for name in shown})
    run.done, run.whole = step, True


@contextlib.contextmanager
def guarded(run: Run) -> Iterator[Callable[[], bool]]:
    """Yield `stopping()`, whether a signal asked to stop; after an error or Ctrl-C save what was learned.

    With extras/ that is a checkpoint after the last whole step. Without, no signal is caught, and OUT/model is saved.
    """
    if checkpoints := extra("checkpoints"):
        with checkpoints.interruptible(run, save_model) as stopping:
            yield stopping
        return
    try:
        yield lambda: False
    except (Exception, KeyboardInterrupt):
        if run.main and not run.cfg.shard and (run.done or not run.whole):  # shards need processes that may be gone
            save_model(run)
        raise


def save_model(run: Run) -> None:
    """Write OUT/model, whole or not at all, in the dtype the model came in. This comes last: adapters are merged."""
    folder, weights = Path(run.cfg.out) / "model", None
    new, old = folder.with_name("model.unfinished"), folder.with_name("model.old")
    dtype = pretrained(transformers.AutoConfig, run.cfg.model).dtype or torch.float32
    if run.adapters:
        run.adapters.merge_and_unload()
    if run.cfg.shard:  # every process takes part, the main one gets the weights
        weights = extra("shards", "--shard").whole_weights(run.model, run.main)
    if run.main:
        if old.exists() and not folder.exists():  # killed between the two renames below
            old.rename(folder)
        shutil.rmtree(new, ignore_errors=True)
        run.model.to(dtype).save_pretrained(new, state_dict=weights and {n: w.to(dtype) for n, w in weights.items()})
        run.prompts.processor.save_pretrained(new)
        shutil.rmtree(old, ignore_errors=True)
        if folder.exists():
            folder.rename(old)
        new.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
        print(f"the model after {run.done} of {run.cfg.steps} steps is in {folder}", flush=True)


def answer(run: Run, prompts: list[Prompt]) -> list[str]:
    """Return the policy's most probable answers, one to each prompt, by the sampler of training."""
    inputs, limit = run.collate(prompts), run.cfg.max_completion_tokens
    with torch.no_grad(), run.autocast():
        ids, _ = sample(run.model, inputs, 1, None, limit, run.eos, **run.distribution)
    return run.decode(ids, completion_mask(ids, run.eos))


# ------------------------------------------------------------------------------------------------
# The command line.


def parse(kind: type, argv: Sequence[str] | None, **about) -> Any:
    """Read a dataclass of settings from the command line; SystemExit names a flag that is unknown or out of bounds."""
    group = parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter, **about)
    for f, default in zip(fields(kind), asdict(kind()).values()):
        of = next(t for t in (*typing.get_args(f.type), f.type) if t is not type(None))
        read, many = string_to_bool if of is bool else of, "*" if isinstance(default, list) else None
        if f.metadata["heading"]:
            group = parser.add_argument_group(f.metadata["heading"])
        words = {"help": f.metadata["help"], "metavar": of.__name__.upper()}
        group.add_argument(f"--{f.name}", type=read, nargs=many, default=default, **words)
    found, unknown = parser.parse_known_args(argv)
    if unknown:
        near = difflib.get_close_matches(unknown[0].lstrip("-"), vars(found), n=1)
        meant = f"did you mean --{near[0]}? " if near else ""
        raise SystemExit(f"{' '.join(unknown)}: there is no such flag; {meant}--help lists them")
    obey(found, [(f.name, *rule) for f in fields(kind) for rule in rules_of(f, getattr(found, f.name))])
    return kind(**vars(found))


def rules_of(f: Any, value: Any) -> list[tuple[bool, str]]:
    """Return what the declaration of a setting asks of its value: (whether it is so, what would be right)."""
    rules, values = f.metadata["rules"], value if isinstance(value, list) else [value]
    choices = rules.get("choices", values)
    choices = choices() if callable(choices) else choices
    found = [(all(one in choices for one in values), f"one of {', '.join(map(str, choices))}")]
    if value is not None:
        for name, words, holds in (("least", "at least", ge), ("above", "above", gt), ("below", "below", lt)):
            if name in rules:
                found.append((all(holds(one, rules[name]) for one in values), f"{words} {rules[name]}"))
    return found


def obey(cfg: Any, rules: Sequence[tuple[str, Any, str]]) -> None:
    """Raise SystemExit at the first broken rule: (flag, whether it is kept, what would be right)."""
    for flag, good, right in rules:
        if not good:
            raise SystemExit(f"--{flag} {getattr(cfg, flag)}: must be {right}")


def out_rule(cfg: Any, may_exist: bool) -> tuple[str, Any, str]:
    """Return the rule that nothing of an earlier run or of anything else is lost: what stands in --out stays."""
    out = Path(cfg.out)
    there = {file.name for file in out.iterdir()} - {"config.json", "setup.txt"} if out.is_dir() else set()
    taken = out.is_file() or "config.json" in os.listdir(out) and there if out.exists() else False
    return "out", may_exist or not taken, "new: it holds an earlier run (--resume true continues it) or something else"


def parse_config(argv: Sequence[str] | None = None) -> Config:
    """Read and check the command line; SystemExit names the flag that is wrong and what would be right."""
    usage = "accelerate launch virft.py --task TASK --data DIR --model NAME [flags]"
    cfg = parse(Config, argv, usage=usage, description="ViRFT: GRPO for vision-language models with verifiable rewards")
    evaluates = cfg.eval_only or cfg.ask
    unfinished = cfg.eval_only and extra("evaluate", "--eval_only").unfinished(Path(cfg.out), asdict(cfg))
    obey(cfg, [
        ("clip", len(cfg.clip) in (1, 2) and cfg.clip[0] < 1, "one or two numbers, the first below 1"),
        ("resume", not (cfg.resume and evaluates), "false with --eval_only and --ask"),
        ("check", not (cfg.check and evaluates), "false with --eval_only and --ask"),
        ("ask", cfg.categories or not (cfg.ask and TASKS[cfg.task].asks_for), "together with --categories"),
        out_rule(cfg, may_exist=cfg.ask or cfg.check or cfg.resume or unfinished),
    ])  # fmt: skip
    return cfg


def main(argv: Sequence[str] | None = None) -> None:
    cfg = parse_config(argv)
    try:
        run = start(cfg)
        if cfg.ask:
            return extra("check", "--ask").ask(run, answer)
        if cfg.check:
            return extra("check", "--check").check(run, rollout, micro_batches)
        held_out = load_examples(cfg, "val") if cfg.eval_every and not cfg.eval_only else ()
        open_out(run, cfg.group_size, "completions")
        if cfg.eval_only:
            extra("evaluate", "--eval_only").evaluate(run, answer, run.prompts.examples, Path(cfg.out))
        else:
            train(run, held_out)
        run.accelerator.end_training()
    except DataError as error:
        raise SystemExit(f"data: {error}") from None


if __name__ == "__main__":
    main()
