"""ViRFT: reinforcement fine-tuning of vision-language models with verifiable rewards.

Train a vision-language model with GRPO (arXiv 2402.03300) on rewards that a program can check, as Visual-RFT
(arXiv 2503.01785) does: the IoU of boxes, their confidence, a class name, the answer's format. Every step:

  1. q      take B prompts: an image and a question about it
  2. o_i    sample G completions of each prompt from the policy pi_theta
  3. r_i    score the text of each completion: r_i = weighted sum of rewards (rewards.py)
  4. A_i    compare within the group: A_i = (r_i - mean(r)) / (std(r) + 1e-4)
  5. rho    compute pi_theta(o_it) / pi_old(o_it) for each token; pi_old is the policy that sampled
  6. loss   compute -min(rho A, clip(rho, 1 - eps, 1 + eps) A) + beta KL(pi_theta || pi_ref) for each token and
            take its mean, first over the tokens of a completion, then over completions
  7. step   follow the gradient; the next step samples anew

What differs from Visual-RFT's paper and its released code, and why:

  - A prompt and its image are encoded once per group, not G times, in sampling, in the reference pass and in
    training: `prefill` runs the prompt, `fork` copies its cache, `branch` continues the copies. Exception: models with
    linear attention or convolutions repeat the prompt per completion in the training and reference passes, because
    their cache is not differentiable.
  - The sampling loop is our own. `generate` inherits settings from checkpoints (Qwen-VL ships top_k=1, which gives
    G identical answers), and tokens must be drawn from the distribution whose log-probabilities are trained.

Commands, of which `python virft.py --help` lists the flags:

    accelerate launch virft.py --task coco                               # Qwen2-VL-2B on the released data
    accelerate launch virft.py --task coco --data DIR --model NAME       # COCO on disk
    bash run.sh                                                          # offline demo, no GPU

Training needs only this file, rewards.py and data.py. Optional features are in extras/, and `extra(name)` imports one.
Where that folder is missing it returns None, and a flag that needs it (`needs=` in Config) is refused at the start.

To add a reward: REWARDS in rewards.py. A task: TASKS in data.py. A normalization: NORMALIZATIONS. A ratio: RATIOS.
A metric: `rollout_metrics` or `update`. A setting: Config, and mia_dpo.TrainConfig if DPO reads it too.

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
import signal
import sys
import time
import typing
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from datetime import timedelta
from functools import partial
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
from data import CONVENTIONS, MIN_PIXELS, TASKS, DataError, Example, Prompt, Prompts, extra
from rewards import answer_shares, asked_for, choose_rewards, reward_weights, score_group


def setting(default: Any, help: str, heading: str | None = None, **rules) -> Any:
    """Declare a field of Config; heading: starts a group in --help.

    rules: bounds (least, above, below); choices; needs: the module of extras/ that any value but the default needs.
    """
    usual = {"default_factory": lambda: list(default)} if isinstance(default, list) else {"default": default}
    return field(**usual, metadata={"help": help, "heading": heading, "rules": rules})


@dataclass
class Config:
    """Hold every setting; `python virft.py --help` prints these lines."""

    task: str = setting("coco", "what is asked and rewarded", "What is trained on what", choices=TASKS)
    model: str = setting("Qwen/Qwen2-VL-2B-Instruct", "model folder, or NAME or NAME@REVISION on the hub")
    data: str | None = setting(None, "dataset folder, file or hub name; default: the task's released dataset")
    eval_data: str | None = setting(None, "dataset to evaluate on; default: the validation split of --data")
    out: str = setting("runs/virft", "run folder for metrics, rollouts, report.html and the trained model")

    categories: str | None = setting(None, "names with commas, or a published split: novel15, base65, ...", "Examples")
    shots: int | None = setting(None, "training images per category (few-shot), chosen by seed", least=1)
    negatives: float = setting(0.0, "share of examples that ask for an absent category", least=0, below=1)
    max_boxes: int | None = setting(None, "leave out training examples with more boxes than this")
    box_format: str = setting("auto", "form of boxes in tables and COCO files", choices=("auto", "xywh", "xyxy"))
    skip_bad_images: bool = setting(False, "leave out and count images that are missing, broken or wrongly annotated")
    max_pixels: int = setting(401408, "largest image in pixels (401408 = 512 patches of 28 x 28)", least=MIN_PIXELS)
    coordinates: str = setting("auto", "coordinates of the model; relative: 0..1000", choices=("auto", *CONVENTIONS))
    think: bool = setting(True, "ask for <think> before <answer>; false: answer alone, also in the format reward")
    system_prompt: str | None = setting(None, "system message before each question")
    template_options: list[str] = setting([], "chat template's settings, as enable_thinking=false", needs="processors")
    processor_options: list[str] = setting([], "image processor's settings, as max_patches=4", needs="processors")

    rewards: list[str] = setting([], "NAME=WEIGHT, as iou=1 my.py:my_reward=2; default: the task's", "The algorithm")
    iou_threshold: list[float] = setting([0.5], "a box is found above this; several: one per phase", least=0, below=1)
    normalize: str = setting("sum", "normalize the rewards' sum or each", choices=("sum", "each"), needs="variants")
    resample: int = setting(0, "rounds of replacing groups of equal rewards by new prompts", least=0, needs="variants")
    sft: bool = setting(False, "train on the right answers, supervised, to compare with GRPO", needs="variants")
    group_size: int = setting(8, "completions per prompt, G; they are compared with each other", least=2)
    max_completion_tokens: int = setting(512, "maximum tokens of a completion; longer ones are truncated", least=2)
    temperature: float = setting(1.0, "temperature of sampler and scorer alike", above=0)
    loss: str = setting("grpo", "how token losses are averaged", choices=lambda: NORMALIZATIONS)
    scale_advantages: str = setting("auto", "divide by std; auto: not in dr_grpo", choices=("auto", "true", "false"))
    clip: list[float] = setting([0.2, 0.2], "epsilon: how far the ratio may fall below and rise above 1", least=0)
    beta: float = setting(0.04, "weight of the KL to the reference model; 0 loads no reference", least=0)
    inner_epochs: int = setting(1, "optimizer steps on the same completions; clipping acts from the second on", least=1)
    mask_truncated: bool = setting(False, "exclude truncated completions from the loss, not from their group's mean")

    steps: int = setting(200, "training steps (sample, score, update)", "Optimization", least=1)
    prompts_per_step: int = setting(16, "prompts per step over all processes; evaluation: of each process", least=1)
    micro_batch: int = setting(0, "completions per training pass: part of a group, or k x G; 0: one group (G)", least=0)
    lr: float | None = setting(None, "learning rate, decaying to 0; default 1e-6, with --lora_rank 1e-5", above=0)
    warmup_steps: int = setting(0, "steps of linear warm-up", least=0)
    seed: int = setting(0, "seed of the order of examples and of every sampled token")

    lora_rank: int = setting(0, "rank of LoRA adapters; 0: none", "Memory and several GPUs", least=0, needs="adapters")
    freeze_vision: bool = setting(False, "train the language model only; --lora_rank does too", needs="adapters")
    adam_bits: int = setting(32, "bits of AdamW's moments; 8 needs bitsandbytes", choices=(32, 8), needs="memory")
    shard: bool = setting(False, "divide weights, gradients and optimizer among processes (FSDP2)", needs="shards")
    workers: int = setting(2, "processes per GPU that open and resize images ahead of the step", least=0)

    save_every: int = setting(
        0, "steps between checkpoints; 0: only when interrupted", "Interruptions", least=0, needs="checkpoints"
    )
    resume: bool = setting(False, "continue the run in --out from its newest checkpoint", needs="checkpoints")

    check: bool = setting(False, "sample 16 examples, say what looks wrong, stop", "Seeing what happens", needs="check")
    ask: str | None = setting(None, "picture to answer --categories about; print, draw, and stop", needs="check")
    eval_only: bool = setting(False, "evaluate --model on the validation split and stop", needs="evaluate")
    eval_every: int = setting(0, "steps between evaluations; 0: none", least=0, needs="evaluate")
    eval_limit: int | None = setting(None, "evaluate on this many examples, chosen by seed; default: all", least=1)
    eval_categories: str = setting("gt", "categories asked for (gt: its own)", choices=("gt", "all", "listed"))
    report_to: list[str] = setting([], "trackers besides metrics.jsonl: tensorboard, wandb, ...")


AUTOCAST = "cuda"  # devices that compute in bf16; tests rehearse a GPU's dtypes with "cpu"
FLOAT32_BLOCK = 2**22  # least logits that `token_logps` turns to float32 at once: 16 MiB
LOOK_EVERY = 16  # tokens after which the sampler checks which rows have ended; each check synchronizes with the GPU
MAX_GRAD_NORM = 1.0  # Visual-RFT's, as are AdamW's settings
ADAM = {"betas": (0.9, 0.999), "weight_decay": 0.0}
REPORT_EVERY = 50  # steps after which OUT/report.html is written anew, as it is at evaluations and checkpoints


# ================================================================================================
# The algorithm: first functions of tensors, by the numbers of the list at the top, then the step that calls them.
#
# Differences between model families are detected from attributes of the model and its cache, never from its name.


class Prefix(NamedTuple):
    """Encoded prompts that completions continue. Rows: B after `prefill`, N after `fork`."""

    cache: Any  # keys and values; `branch` and `sample` append to it
    logits: Tensor  # [N, V], predict the first completion token
    mask: Tensor  # [N, P], 0 on left padding; `sample` extends it to P + max_tokens
    position: Tensor  # [N, 1], or [3, N, 1] with several rotary axes: position id of the first completion token
    cross_masks: dict[str, Tensor]  # [N, 1, ...], which images a completion attends to; empty without cross attention


def prefill(model: nn.Module, inputs: dict[str, Tensor]) -> Prefix:
    """Run B left-padded prompts and their images through the model, once for all their completions."""
    mask = inputs["attention_mask"]  # [B, P]
    # Positions must not count padding. Models with three rotary axes (Qwen-VL, GLM-V) compute theirs from mask and
    # image grids, and keep rope_deltas = (next position) - (number of tokens), because an image has fewer positions
    # than tokens. Every prompt must contain an image: for text alone they would keep the rope_deltas of an earlier one.
    rope = next((part for part in model.modules() if hasattr(part, "rope_deltas")), None)
    positions = {} if rope else {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    out = model(**inputs, **positions, use_cache=True, logits_to_keep=1)
    position = mask.sum(1, keepdim=True)  # of the next token
    if rope:
        position = (position + rope.rope_deltas).expand(3, -1, -1)  # text has the same position on all axes
    # This selects Mllama's cross_attention_mask [B, P, images, tiles]: the only input [B, P, ...] with more dimensions.
    # A completion attends to the images that the last prompt token attends to.
    cross_masks = {name: x[:, -1:] for name, x in inputs.items() if x.dim() > 2 and x.shape[:2] == mask.shape}
    return Prefix(out.past_key_values, out.logits[:, -1], mask, position, cross_masks)


def fork(prefix: Prefix, rows: Tensor) -> Prefix:
    """Select rows of a prefix, with repetition: row i of the result is row rows[i].

    Copying keys and values once per completion is cheap; repeating prompts would cost G vision towers and G * P tokens.
    Indexing is differentiable: the gradients of all copies add up in the one prompt. Shallow copies of cache and layers
    suffice, because `reorder_cache` gives a copy its own keys and values. The token counter of a static layer and the
    states of a linear-attention layer remain shared, so a prefix with such layers may be forked only once; `sample`
    drops the original.
    """
    cache = copy.copy(prefix.cache)
    cache.layers = [copy.copy(layer) for layer in cache.layers]
    cache.reorder_cache(rows)
    cross_masks = {name: x[rows] for name, x in prefix.cross_masks.items()}
    return Prefix(cache, prefix.logits[rows], prefix.mask[rows], prefix.position[..., rows, :], cross_masks)


def branch(model: nn.Module, prefix: Prefix, ids: Tensor) -> Tensor:
    """Continue each row of a prefix by n tokens, ids [N, n], in one forward; return their logits [N, n, V].

    Padding after a completion needs no mask: attention is causal, so no token sees it, and the loss leaves it out.
    """
    n = ids.shape[1]
    text = {"input_ids": ids, "attention_mask": F.pad(prefix.mask, (0, n), value=1)}
    # Passed explicitly: otherwise Qwen-VL uses the rope_deltas of its latest prefill.
    text["position_ids"] = prefix.position + torch.arange(n, device=ids.device)
    cross_masks = {name: x.repeat_interleave(n, 1) for name, x in prefix.cross_masks.items()}
    return model(**text, **cross_masks, past_key_values=prefix.cache, use_cache=True).logits


def log_distribution(logits: Tensor, temperature: float, forbidden: Tensor) -> Tensor:
    """Return log pi(token | everything before), [..., V], in float32: the one distribution that is sampled and scored.

    No top-k, no top-p: the scorer would have to leave out the same tokens at every position. `forbidden` ids are image
    placeholders: a sampled one would be treated as an image. The scorer excludes them too, so that it scores the
    distribution that was sampled.
    """
    logits = logits.to(torch.float32, copy=True).div_(temperature)  # bf16 keeps only 2 to 3 digits
    # By index_fill_: assigning a Python number to logits[..., forbidden] copies it to the GPU and waits for that.
    return logits.index_fill_(-1, forbidden, -torch.inf).log_softmax(-1)


# 2. Sample ---------------------------------------------------------------------------------------


def sampling_noise(keys: list[str], group_size: int, max_tokens: int) -> Tensor:
    """Draw uniform numbers in [0, 1), [B * G, max_tokens] float64, from one generator per prompt.

    The numbers are drawn on the CPU from a seed per prompt, so they do not depend on batch, process or device; those of
    torch.multinomial would. What still can change a completion is how the logits are rounded.
    """
    seeds = [int.from_bytes(hashlib.blake2b(key.encode(), digest_size=7).digest(), "big") for key in keys]
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return torch.cat([torch.rand(group_size, max_tokens, dtype=torch.float64, generator=g) for g in generators])


class RoomLayer(StaticLayer):
    """A static layer that stores keys and values in the dtype that attention computes in.

    Under autocast, rotary embeddings return float32 keys, and attention rounds them to bf16 at every read. Rounding
    them once, when they are stored, gives the same result in half the memory.
    """

    def update(self, keys: Tensor, values: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        if torch.is_autocast_enabled(device := keys.device.type):
            keys, values = (x.to(torch.get_autocast_dtype(device)) for x in (keys, values))
        return super().update(keys, values, *args, **kwargs)


def reserve(model: nn.Module, cache: Any, tokens: int) -> None:
    """Replace each growing cache layer by a static one that has room for `tokens` more and never moves in memory."""
    # Layers of cross attention store images and do not grow. Sliding layers become plain ones, with the window in the
    # mask: transformers' own StaticSlidingWindowLayer counts tokens in a Python integer, and a step that `capture`
    # records (see `sample`) would keep its value.
    crossing = getattr(model.config.get_text_config(), "cross_attention_layers", None) or ()
    for i, layer in enumerate(cache.layers):
        if isinstance(layer, DynamicLayer) and i not in crossing:
            cache.layers[i] = RoomLayer(layer.keys.shape[-2] + tokens)
            cache.layers[i].update(layer.keys, layer.values)


def visible(model: nn.Module, cache: Any, mask: Tensor, column: Tensor) -> Tensor | dict[str, Tensor | None]:
    """Return which keys the token at `column` attends to, [N, 1, 1, keys]; a dict by layer type if there are several.

    mask [N, P + max_tokens]: True for prompt tokens that are not padding and for tokens sampled so far. transformers
    uses a 4D mask as it is. Given a 2D mask, it would build a 4D mask at every token, which synchronizes with the GPU.
    """
    text = model.config.get_text_config()
    kinds, window = set(getattr(text, "layer_types", None) or ()), getattr(text, "sliding_window", None) or 2**31
    # Sliding layers, which hold the fewest keys, cached the last ones only: their mask is cut on the left.
    keys = min(layer.keys.shape[-2] for layer in cache.layers if isinstance(layer, StaticLayer))
    near = (mask & (torch.arange(mask.shape[1], device=mask.device) > column - window))[:, -keys:]
    masks = {"full_attention": mask[:, None, None], "sliding_attention": near[:, None, None]}
    if text._attn_implementation == "eager":  # eager attention adds the mask to the scores, sdpa takes booleans
        masks = {kind: torch.where(m, 0.0, torch.finfo(model.dtype).min).to(model.dtype) for kind, m in masks.items()}
    # Layers with a state: `prefill` skipped the padding, so the state holds real tokens only.
    masks["linear_attention"] = masks["conv"] = None
    if unknown := kinds - masks.keys():
        raise SystemExit(f"{type(model).__name__} has layers of {', '.join(unknown)}, whose mask is not known here")
    # A config without layer types has one kind of layer, with a window if the config has one; else near equals mask.
    by_kind = {kind: masks[kind] for kind in kinds or {"sliding_attention"}}
    return by_kind if len(by_kind) > 1 else next(iter(by_kind.values()))


def draw(logp: Tensor, u: Tensor | None) -> Tensor:
    """Draw a token for each row of log-probabilities [N, V] by uniform numbers u [N]; None: take the most probable."""
    if u is None:
        return logp.argmax(-1)
    # Take the first token whose cumulative probability exceeds u. In float64: a float32 sum over 150,000 tokens rounds
    # rare ones away. u is scaled by the last sum (1 up to rounding), so the index is below V. Without right=True, u = 0
    # could draw a token of probability 0. If logp is NaN, searchsorted returns V, which would crash the process on a
    # GPU: hence the clamp. The loss is then NaN, and `optimizer_step` skips and counts the step.
    cdf = logp.double().exp().cumsum(-1)
    return torch.searchsorted(cdf, u[:, None] * cdf[:, -1:], right=True).squeeze(1).clamp(max=cdf.shape[-1] - 1)


def sample(
    model: nn.Module, inputs: dict[str, Tensor], group_size: int, noise: Tensor | None, max_tokens: int, eos: Tensor,
    temperature: float, forbidden: Tensor, capture: Callable = lambda step: step,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Sample G completions of each of B prompts; return their token ids and log-probabilities, both [B * G, C].

    noise: uniform numbers [B * G, max_tokens] that decide the tokens; None takes the most probable ones. After its
    first EOS a row is padded with EOS. Every LOOK_EVERY tokens, ended rows are dropped if they are half of the batch or
    more; fewer would not pay for the copy of the remaining cache. Between two such checks shapes are constant, nothing
    synchronizes with the GPU, and all changes are in place, so that `capture` may record the step and return a function
    that repeats it faster. extras/graph.py records a CUDA graph; if that fails or differs, it returns the step itself.
    """
    B, P = inputs["input_ids"].shape
    rows = torch.arange(B * group_size, device=eos.device)  # the rows that are decoded
    ids = eos[0].repeat(len(rows), max_tokens)
    logps = torch.zeros(ids.shape, device=eos.device)
    ended = torch.zeros_like(rows, dtype=torch.bool)
    t = torch.zeros(1, dtype=torch.long, device=eos.device)  # tokens sampled so far
    prompts = prefill(model, inputs)
    reserve(model, prompts.cache, max_tokens)  # copies keys, so before `fork` multiplies the rows
    prefix = fork(prompts._replace(mask=F.pad(prompts.mask.bool(), (0, max_tokens))), rows // group_size)
    del prompts  # and its B rows of cache

    def choose() -> Tensor:
        logp = log_distribution(prefix.logits, temperature, forbidden)
        token = torch.where(ended[rows], eos[0], draw(logp, None if noise is None else noise[rows, t]))
        ids[rows, t] = token
        logps[rows, t] = logp.gather(1, token[:, None])[:, 0].masked_fill(ended[rows], 0.0)
        ended[rows] = torch.isin(token, eos)
        return token

    def step() -> None:
        token = choose()
        prefix.mask.index_fill_(1, P + t, True)
        seen = visible(model, prefix.cache, prefix.mask, P + t)
        text = {"input_ids": token[:, None], "attention_mask": seen, "position_ids": prefix.position + t}
        out = model(**text, **prefix.cross_masks, past_key_values=prefix.cache, use_cache=True)
        prefix.logits.copy_(out.logits[:, -1])
        t.add_(1)

    advance = capture(step)
    for done in range(1, max_tokens):  # the last token is only drawn: nothing continues it
        advance()
        if done % LOOK_EVERY == 0:
            going = (~ended[rows]).nonzero().squeeze(1)
            if len(going) == 0:
                break
            if 2 * len(going) <= len(rows):
                prefix, rows = fork(prefix, going), rows[going]
                advance = capture(step)  # anew: other tensors, of another shape
    else:
        choose()
    # Keep at least two columns: `branch` gets all tokens but the last, so with one it would have nothing to run, and
    # with --shard a process that skips a forward pass makes the others wait forever.
    C = max(2, int(completion_mask(ids, eos).sum(1).max()))
    return ids[:, :C], logps[:, :C]


def completion_mask(ids: Tensor, eos: Tensor) -> Tensor:
    """Return True up to and including the first EOS of each row, [N, C]: the EOS is trained, the padding is not."""
    is_eos = torch.isin(ids, eos)
    return (is_eos.cumsum(1) - is_eos.long()) == 0  # by position, because the pad token may equal EOS


# 4. Compare --------------------------------------------------------------------------------------


def group_advantages(rewards: Tensor, scale: bool = True) -> Tensor:
    """Return A = (r - mean) / (std + 1e-4) within each group; rewards and result [B, G]. Visual-RFT eq. 2.

    The group is its own baseline, so there is no value network. ddof 1 (torch's default) and 1e-4 are the released
    code's; 1e-4 avoids 0 / 0 and shrinks A where rewards hardly differ. A group of equal rewards gets 0 and stays in
    the batch: its completions count in the loss's mean and have a KL term, and no process makes fewer passes.
    Dividing by std gives very easy and very hard prompts more weight; scale=False turns it off (arXiv 2503.20783).
    """
    rewards = rewards - rewards[:, :1]  # equal rewards become exactly 0, whatever the rounding of their mean
    centered = rewards - rewards.mean(1, keepdim=True)
    return centered / (rewards.std(1, keepdim=True) + 1e-4) if scale else centered


# 5. Log-probabilities and their gradients --------------------------------------------------------


def token_logps(logits: Tensor, ids: Tensor, temperature: float, forbidden: Tensor) -> tuple[Tensor, Tensor]:
    """Return log pi of the chosen tokens and the entropy of their distributions (no gradient), both [N, C] float32.

    logits [N, C, V] predict ids [N, C]. The float32 log-softmax is computed in blocks of FLOAT32_BLOCK logits, or of a
    32nd of all if that is more, and recomputed in the backward pass. If it were stored, it would take several times 4 V
    bytes a token (V = 150,000). More blocks would save little beside the logits, and a GPU would wait for Python.
    The language model's layers are not recomputed; chunks of completions (`two_stage_backward`) bound what they store.
    """

    def tokens(logits: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        logp = log_distribution(logits, temperature, forbidden)
        with torch.no_grad():
            entropy = -logp.exp().mul_(logp.clamp(min=-1e4)).sum(-1)  # clamped, because 0 * -inf would be NaN
        return logp.gather(-1, ids[..., None]).squeeze(-1), entropy

    at_once = max(1, max(FLOAT32_BLOCK, logits.numel() // 32) // logits.shape[-1])
    blocks = zip(logits.flatten(0, 1).split(at_once), ids.flatten().split(at_once))
    done = [checkpoint(tokens, *block, use_reentrant=False) for block in blocks]
    logps, entropies = zip(*done)
    return torch.cat(logps).view_as(ids), torch.cat(entropies).view_as(ids)


def completion_logps(
    model: nn.Module, prompts: Any, rows: Tensor, ids: Tensor, temperature: float, forbidden: Tensor
) -> tuple[Tensor, Tensor]:
    """Return log pi_theta(o_t | q, o_<t) and entropy, both [n, C], of ids [n, C]; row i continues prompt rows[i]."""
    if not isinstance(prompts, Prefix):  # linear attention: ids must be all completions, and `Run.chunks` sees to it
        return token_logps(prompts.logits(model, ids), ids, temperature, forbidden)
    prefix = fork(prompts, rows)
    first = token_logps(prefix.logits[:, None], ids[:, :1], temperature, forbidden)  # the prompt predicts it
    rest = token_logps(branch(model, prefix, ids[:, :-1]), ids[:, 1:], temperature, forbidden)
    return torch.cat([first[0], rest[0]], 1), torch.cat([first[1], rest[1]], 1)


def cache_is_differentiable(model: nn.Module) -> bool:
    """Return whether gradients pass through the cache: not if linear attention or convolutions overwrite a state."""
    return not any(hasattr(layer, "recurrent_states") for layer in DynamicCache(config=model.config).layers)


def encode(model: nn.Module, inputs: dict[str, Tensor]) -> Any:
    """Encode B prompts for scoring; with linear attention return an object that repeats the prompt per completion."""
    if cache_is_differentiable(model):
        return prefill(model, inputs)
    return extra("repeated", "a model with linear attention").Prompts(inputs)


def chunked_logps(
    model: nn.Module, inputs: dict[str, Tensor], ids: Tensor, chunks: Sequence[Tensor], **distribution
) -> Tensor:  # fmt: skip
    """Return log pi [N, C] of completions ids [N, C] to B prompts without gradients.

    Memory holds the logits and the copied keys of one chunk of rows at a time.
    """
    G = len(ids) // len(inputs["input_ids"])
    with torch.no_grad():
        prompts = encode(model, inputs)
        return torch.cat([completion_logps(model, prompts, rows // G, ids[rows], **distribution)[0] for rows in chunks])


def two_stage_backward(
    model: nn.Module, inputs: dict[str, Tensor], ids: Tensor, chunks: Sequence[Tensor],
    loss_of: Callable[[Tensor, Tensor, Tensor], Tensor], **distribution,
) -> None:  # fmt: skip
    """Backpropagate the sum over chunks of loss_of(rows, logp, entropy), encoding each prompt once.

    Stage 1 encodes the prompts and replaces their logits, keys and values by detached tensors (leaves of autograd).
    Each chunk of completions runs forward, then backward, before the next one starts; gradients add up in the leaves.
    Stage 2 backpropagates the leaves' gradients through the prompts and their images. The result is the gradient of one
    large graph, while memory holds the graphs of the prompts and of one chunk. The caller holds one autocast context
    around all of it, so chunks share the cached bf16 cast of each weight. Several backward passes can go through a cast
    without retain_graph, because it saves no tensors.
    The model is in eval mode here too: with dropout the scorer would not be the policy that sampled (`load_model`).

    ids [N, C]: completions to B prompts in order; chunks: tensors of row indices; logp, entropy: [len(rows), C].
    """
    G, prompts = len(ids) // len(inputs["input_ids"]), encode(model, inputs)
    outputs, leaves = [], []
    if isinstance(prompts, Prefix):
        layers = [layer for layer in prompts.cache.layers if layer.keys is not None]  # Gemma 4's last layers have none
        outputs = [prompts.logits, *(x for layer in layers for x in (layer.keys, layer.values))]
        # Frozen layers before the first trained one have no graph: their leaves need no gradient either.
        leaves = [x.detach().requires_grad_(x.requires_grad) for x in outputs]
        for layer, keys, values in zip(layers, leaves[1::2], leaves[2::2]):
            layer.keys, layer.values = keys, values
        prompts = prompts._replace(logits=leaves[0])
    for rows in chunks:
        logp, entropy = completion_logps(model, prompts, rows // G, ids[rows], **distribution)
        loss_of(rows, logp, entropy).backward()
    # A leaf has no gradient if it needs none, or if no completion depends on it.
    reached = [(x, leaf.grad) for x, leaf in zip(outputs, leaves) if leaf.grad is not None]
    if reached:
        tensors, gradients = zip(*reached)
        torch.autograd.backward(tensors, gradients)


# 6. The loss -------------------------------------------------------------------------------------


def kl_to_reference(logp: Tensor, logp_ref: Tensor) -> Tensor:
    """Estimate KL(pi_theta || pi_ref) per token: k3 = exp(d) - d - 1 with d = logp_ref - logp. GRPO eq. 4.

    Value: never negative, and unbiased if the tokens come from pi_theta, so only in the first inner epoch; like GRPO
    we do not correct the later ones by rho. expm1 keeps the digits near d = 0. Gradient: on average it equals the
    gradient of the swapped KL(pi_ref || pi_theta), which is also minimal at pi_theta = pi_ref. The term is
    added to the loss as in GRPO; inside the reward, the group's normalization would rescale it. pi_ref gets the same
    temperature and forbidden ids as pi_theta: a KL compares distributions over the same tokens.
    """
    d = logp_ref - logp
    return torch.expm1(d) - d


# Mean over what? (mask [N, C], C_max) -> weights [N, C] and divisor: loss = sum(weights * token loss) / divisor. The
# divisor counts this process only. `update` adds up those of all processes and divides each loss by the total;
# therefore gradients are summed, not averaged. A completion that is masked as a whole does not count.
NORMALIZATIONS = {
    # Mean over a completion's tokens, then over completions (the paper): a token of a short completion weighs more.
    "grpo": lambda mask, C_max: (mask / mask.sum(1, keepdim=True).clamp(min=1), mask.any(1).sum()),
    # Sum over tokens divided by max_completion_tokens, then mean over completions (arXiv 2503.20783): no length bias.
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
    unclipped, clipped = rho * A, rho.clamp(1 - eps[0], 1 + eps[-1]) * A  # eps may be one number for both sides
    # If A > 0 and rho > 1 + eps, or A < 0 and rho < 1 - eps, the minimum is the clipped constant: gradient 0. Otherwise
    # it is rho A, so a move in the bad direction is always corrected. Where both are equal, as at rho = 1, `minimum`
    # halves the gradient between its arguments; both depend on rho there, so it gets the whole.
    loss = -torch.minimum(unclipped, clipped)
    return loss, clipped < unclipped


RATIOS = {"token": clipped_ratio}  # (logp, logp_old, A, mask, eps) -> token loss, clipped
RATIO = "token"  # the entry that is used; a flag when there are two


def grpo_loss(
    logp: Tensor, logp_old: Tensor, logp_ref: Tensor | None, advantages: Tensor, mask: Tensor, weights: Tensor,
    eps: list[float], beta: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the sum over tokens of weight * (ratio loss + beta KL) and, per token [N, C], the KL and what was clipped.

    logp, logp_old, logp_ref [N, C]: of pi_theta, of pi_old (the policy that sampled, scored like pi_theta), of pi_ref
    (None: no KL term); advantages [N]; mask, weights [N, C]: the tokens that count and how much, see NORMALIZATIONS.
    """
    loss, clipped = RATIOS[RATIO](logp, logp_old, advantages[:, None], mask, eps)
    reference = logp if logp_ref is None else logp_ref  # no reference: KL 0, gradient 0
    kl = kl_to_reference(torch.where(mask, logp, 0.0), torch.where(mask, reference, 0.0))  # masked before exp, as rho
    return (weights * (loss + beta * kl)).sum(), kl.detach(), clipped


# One step ----------------------------------------------------------------------------------------


class Rollout(NamedTuple):
    """What one process sampled in a step, and how it was judged."""

    prompts: list[Prompt]
    ids: Tensor  # [N, C]
    logp: Tensor  # [N, C], log-probabilities at sampling, for the metric sampler_gap only
    mask: Tensor  # [N, C], completion_mask
    truncated: Tensor  # [N], True where no EOS came within the limit
    texts: list[str]  # N
    parts: dict[str, Tensor]  # each reward by name, [B, G]
    rewards: Tensor  # their weighted sum, [B, G]
    advantages: Tensor | None = None  # [N]
    thrown_away: int = 0  # groups of equal rewards that --resample has replaced

    def rows(self, step: int) -> list[dict]:
        """Return a line of rollouts.jsonl for each completion."""
        G, lengths, rows = self.rewards.shape[1], self.mask.sum(1).tolist(), []
        for i, text in enumerate(self.texts):
            row = {"step": step, "id": self.prompts[i // G].example.id, "completion": text}
            row |= {"reward": self.rewards.flatten()[i].item(), "advantage": self.advantages[i].item()}
            row |= {"tokens": lengths[i], "rewards": {name: r.flatten()[i].item() for name, r in self.parts.items()}}
            rows.append(row)
        return rows


class MicroBatch(NamedTuple):
    """Prompts that are encoded together in training, with their n completions. DPO leaves out what has a default."""

    prompts: list[Prompt]
    inputs: dict[str, Tensor]
    ids: Tensor  # [n, C], C the longest of these completions
    mask: Tensor  # [n, C], the tokens that are trained
    weights: Tensor | None = None  # [n, C]
    advantages: Tensor | None = None  # [n]
    logp_sampled: Tensor | None = None  # [n, C], the sampler's
    logp_old: Tensor | None = None  # [n, C], the scorer's, filled in the first inner epoch
    logp_ref: Tensor | None = None  # [n, C]; None without a KL term


def rollout(run: "Run", prompts: list[Prompt], step: int) -> Rollout:
    """Take items 2 to 4 of the list at the top: sample, reward, compare. A group is never split among processes."""
    cfg, ro = run.cfg, sampled(run, prompts, step)
    if cfg.resample:
        ro = extra("variants").resample(run, ro, step, sampled)
    scale = cfg.scale_advantages == "true" or cfg.scale_advantages == "auto" and cfg.loss != "dr_grpo"
    # Truncated completions stay in the group's mean. They usually earn little: without them the mean would rise, and
    # the advantage of completions that ended would fall.
    if cfg.normalize == "each":
        advantages = extra("variants").normalize_each(run, ro.parts, scale, group_advantages)
    else:
        advantages = group_advantages(ro.rewards, scale)
    run.lap("reward")
    return ro._replace(advantages=advantages.flatten().to(run.device))


def sampled(run: "Run", prompts: list[Prompt], step: int, round: int = 0) -> Rollout:
    """Sample G completions of each prompt and score them (items 2 and 3); round: 0, or the round of --resample."""
    cfg, G = run.cfg, run.cfg.group_size
    with run.sampling(), run.gathered():
        # The slot is in the key because with few examples one can come twice in a step, and the round because
        # --resample may draw an example again.
        keys = [f"{cfg.seed}/{step}/{round}/{p.slot}/{p.example.id}" for p in prompts]
        noise = sampling_noise(keys, G, cfg.max_completion_tokens).to(run.device)
        inputs, limit = run.collate(prompts), cfg.max_completion_tokens
        # The sampler's log-probabilities are not used as log pi_old: decoding rounds differently than scoring (bf16:
        # about 0.03 nats a token; metric sampler_gap), which rho would mistake for a change of the policy. `update`
        # uses the scorer's as log pi_old, so rho starts at exactly 1. That the tokens were drawn from a slightly
        # different distribution is not corrected.
        ids, logp = sample(run.model, inputs, G, noise, limit, run.eos, **run.distribution, capture=run.capture)
    run.lap("sample")
    return judged(run, prompts, ids, logp, step)


def judged(run: "Run", prompts: list[Prompt], ids: Tensor, logp: Tensor, step: int) -> Rollout:
    """Score completions (item 3). ids, logp [N, C]: G for each prompt, in order; with --sft G is 1."""
    mask, truncated = completion_mask(ids, run.eos), ~torch.isin(ids, run.eos).any(1)
    texts, G = run.decode(ids, mask), len(ids) // len(prompts)
    # For the rewards only: training uses the sampled ids, never text tokenized again.
    texts = [prompts[i // G].whole_answer(text) for i, text in enumerate(texts)]
    scores = [run.score(p, texts[i * G : (i + 1) * G], step) for i, p in enumerate(prompts)]
    parts = {name: torch.tensor([score[name] for score in scores]) for name in run.rewards}  # each [B, G]
    rewards = sum(weight * parts[name] for name, (_, weight) in run.rewards.items())
    run.lap("reward")
    return Rollout(prompts, ids, logp, mask, truncated, texts, parts, rewards)


def micro_batches(run: "Run", ro: Rollout) -> tuple[list[MicroBatch], Tensor]:
    """Divide a rollout into micro-batches of max(1, micro_batch // G) groups; return them and this process's divisor.

    The prompts of a micro-batch are encoded together. `Run.chunks` divides its completions further if --micro_batch is
    less than G; memory holds the graphs of one micro-batch's prompts and of one chunk. The reference scores each
    micro-batch here, once for all inner epochs. Completions that are masked as a whole go through all passes too, so
    that every process makes the same calls.
    """
    cfg, G, parts, lengths = run.cfg, ro.rewards.shape[1], [], ro.mask.sum(1).tolist()
    counted = ro.mask & ~ro.truncated[:, None] if cfg.mask_truncated else ro.mask
    weights, divisor = NORMALIZATIONS[cfg.loss](counted, cfg.max_completion_tokens)
    at_once = max(1, cfg.micro_batch // G)
    for start in range(0, len(ro.prompts), at_once):
        prompts, rows = ro.prompts[start : start + at_once], slice(start * G, (start + at_once) * G)
        C = max(2, *lengths[rows])  # at least two columns, as in `sample`
        ids, mask, w, logp = (x[rows, :C] for x in (ro.ids, counted, weights, ro.logp))
        A, inputs = ro.advantages[rows], run.collate(prompts)
        old = torch.zeros_like(logp)
        parts.append(MicroBatch(prompts, inputs, ids, mask, w, A, logp_sampled=logp, logp_old=old))
    # The reference runs after all inputs are copied to the GPU: a copy waits for the work that is queued there.
    return [batch._replace(logp_ref=run.reference_logps(batch)) for batch in parts], divisor


def update(run: "Run", ro: Rollout) -> "Averages":
    """Take `inner_epochs` optimizer steps on one rollout (5 to 7) and return the metrics of the step.

    One optimizer step uses the whole rollout, so that with one inner epoch every gradient is on-policy.
    The loss is a sum over tokens divided by a number that is known before the first forward pass, so each chunk can be
    backpropagated alone. Every process divides by the divisor of all, therefore gradients are summed, not averaged.
    """
    cfg, metrics = run.cfg, Averages()  # means over the tokens, inner epochs and processes of the step
    batches, own_divisor = micro_batches(run, ro)
    run.lap("reference")
    divisor = run.accelerator.reduce(own_divisor.float(), "sum").clamp(min=1)  # not 0 / 0 if all are masked
    for epoch in range(cfg.inner_epochs):
        for batch in batches:

            def loss_of(rows: Tensor, logp: Tensor, entropy: Tensor) -> Tensor:
                if epoch == 0:
                    # The policy has not moved since it sampled, so its detached logp is log pi_old: no second forward.
                    # Not the sampler's own log-probabilities, see `sampled`.
                    # rho is then 1, and the "grpo" loss about 0 (plus beta KL), because the advantages of a group add
                    # up to 0 if none is masked. Its gradient, the mean of -A grad log pi_theta, is not 0.
                    batch.logp_old[rows] = logp.detach()
                mask, logp_ref = batch.mask[rows], None if batch.logp_ref is None else batch.logp_ref[rows]
                old, A, w = batch.logp_old[rows], batch.advantages[rows], batch.weights[rows]
                gap = (old - batch.logp_sampled[rows]).abs()  # old, not logp, which moves after the first epoch
                loss, kl, clipped = grpo_loss(logp, old, logp_ref, A, mask, w, cfg.clip, cfg.beta)
                metrics.add("loss", loss.detach(), 0)  # count 0: the divisor is added below
                found = {"kl": kl, "clip_fraction": clipped, "entropy": entropy}
                found |= {"cross_entropy": -old} if cfg.sft else {"sampler_gap": gap}
                for name, values in found.items():
                    metrics.add(name, torch.where(mask, values, 0).sum(), mask.sum())
                return loss / divisor

            run.backward(batch, loss_of)
        metrics.add("loss", 0, own_divisor)
        optimizer_step(run, metrics)
    for name, value in rollout_metrics(run, ro).items():
        metrics.put(name, *value)
    return metrics


def rollout_metrics(run: "Run", ro: Rollout) -> "Averages":
    """Return the metrics of what was sampled; `update` adds those of the loss."""
    lengths, N = ro.mask.sum(1), len(ro.texts)
    same = (ro.rewards == ro.rewards[:, :1]).all(1)  # advantages 0 (but not by --normalize each): only the KL term acts
    values = [("reward", ro.rewards), *((f"reward/{name}", part) for name, part in ro.parts.items())]
    if not run.cfg.sft:
        values += [("reward_std", ro.rewards.std(1)), ("zero_variance_groups", same)]  # per group
    values += [("completion_tokens", lengths), ("truncated", ro.truncated)]
    metrics = Averages()
    if run.cfg.resample:  # a number over all processes; `reduce` averages, hence the factor here and below
        metrics.put("resampled_groups", ro.thrown_away * run.accelerator.num_processes)
    if len(run.cfg.iou_threshold) > 1:
        metrics.put("iou_threshold", run.threshold(run.done + 1))
    for name, value in values:
        metrics.put(name, value.sum(), value.numel())
    for name, share in answer_shares(ro.texts, run.prompts.task.parse).items():
        metrics.put(name, share * N, N)
    # Processes sample at the same time: their tokens add up, their seconds do not.
    metrics.put("tokens_per_second", lengths.sum() * run.accelerator.num_processes, run.seconds.get("sample", 0))
    return metrics


def optimizer_step(run: "Run", metrics: "Averages") -> None:
    """Sum the gradients over processes, clip and step (item 7).

    A norm that is not finite skips the step, because one bad batch must not ruin the weights, and is counted.
    """
    trained = [p for p in run.model.parameters() if p.requires_grad]
    if run.accelerator.num_processes > 1 and not run.cfg.shard:  # FSDP has summed: extras/shards.py
        exchange_gradients(trained)
    norm = nn.utils.clip_grad_norm_(trained, MAX_GRAD_NORM)  # after the exchange: of the whole gradient
    norm = float(norm.full_tensor() if run.cfg.shard else norm)
    finite = math.isfinite(norm)  # the norm of summed gradients: the same on every process, so all decide alike
    if finite:
        # From here until `write` the step is partly applied. A checkpoint holds whole steps, so an error in between
        # saves the model instead.
        run.whole = False
        run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)
    run.lap("train")
    metrics.add("grad_norm", norm if finite else 0.0, finite)
    metrics.add("skipped_updates", not finite)


def exchange_gradients(parameters: list[nn.Parameter]) -> None:
    """All-reduce the sum of every gradient, once per optimizer step. Beside the divisor, data parallelism is just this.

    DDP would average, exchange in every backward pass that `no_sync` does not exempt, and wrap the model. The processes
    load the same weights and take the same steps, so they stay equal. A gradient may exist on some processes only (of
    an expert that no token reached, for example), and a process that left out a call would make the others wait: so
    they first agree which exist. A gradient that is missing on some processes counts as 0 there; one that is missing on
    all stays missing. The calls are asynchronous and tensor by tensor: flattened into one tensor the gradients would be
    in memory twice.
    """
    has = torch.tensor([float(p.grad is not None) for p in parameters], device=parameters[0].device)
    dist.all_reduce(has, op=dist.ReduceOp.MAX)
    reached = [p for p, anywhere in zip(parameters, has.tolist()) if anywhere]
    for p in reached:
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
    for sum_ in [dist.all_reduce(p.grad, async_op=True) for p in reached]:
        sum_.wait()


def train(run: "Run", held_out: Sequence[Example] = (), rollout=rollout, update=update) -> None:
    """Train: sample, update, write; now and then evaluate, save and report; in the end `finish`.

    --sft and mia_dpo.py bring another rollout or update.
    """
    cfg, out, report, ro, stop = run.cfg, Path(run.cfg.out), extra("report"), None, 0

    def evaluate(step: int) -> None:
        extra("evaluate").evaluate(run, answer, held_out, out / f"eval_{step:06d}", stopping)

    with guarded(run) as stopping:
        if held_out and run.done and due(run.done, cfg.eval_every):  # the evaluation that an interruption cut off
            if not gather_object([(out / f"eval_{run.done:06d}" / "scores.json").exists()])[0]:
                evaluate(run.done)
                stop = stopping()
        for step, prompts in () if stop else run.steps():
            ro = rollout(run, prompts, step)
            metrics = update(run, ro)
            write(run, step, metrics, ro.rows(step))
            stop = stopping()
            saves = stop or due(step, cfg.save_every)
            evaluates = held_out and not stop and due(step, cfg.eval_every)
            if saves:  # before the evaluation, which may take longer than a scheduler waits
                extra("checkpoints").save(run)
            if evaluates:
                evaluate(step)
                stop = stopping()
                if stop and not saves:
                    extra("checkpoints").save(run)
            if stop:
                break
            if report and run.main and step < cfg.steps and (evaluates or saves or due(step, REPORT_EVERY)):
                report.follow(run, ro, step)
        else:
            if not stop:
                save_model(run)
    if report and run.main and ro:  # none if a resumed run had no step left
        report.follow(run, ro, run.done)
    finish(run)
    if stop:  # unfinished: exit with 128 + signal number, as shells report it
        raise SystemExit(128 + stop)
    if run.main and run.done:  # counted in the file, which also has the steps before a resume
        logged = list(map(json.loads, (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()))
        if all(row.get("zero_variance_groups") == 1 for row in logged):
            say("no step taught anything: within every group all rewards were equal (metric zero_variance_groups)")
        skipped = sum(row["skipped_updates"] for row in logged)
        if 2 * skipped > run.done:
            rest = "their gradients were not finite (metric skipped_updates)"
            raise SystemExit(f"{skipped:.0f} of {run.done} steps changed nothing: {rest}")


# ================================================================================================
# A run: what the functions above share, and how it is loaded.


class Averages(dict):
    """Sums and counts of metrics by name: means stay exact over micro-batches and processes of unequal size."""

    def add(self, name: str, total, count=1) -> None:
        """Add numbers or tensors of one number. Tensors stay where they are: reading one waits for the GPU."""
        sums = self.get(name, (0.0, 0.0))
        self[name] = sums[0] + total, sums[1] + count

    def put(self, name: str, total, count=1) -> None:
        """Add a metric that comes once a step; ValueError where its name is taken."""
        if name in self:
            raise ValueError(f"two metrics are called {name}: rename one")
        self.add(name, total, count)

    def reduce(self, accelerator: Accelerator) -> dict[str, float]:
        """Return the means over all processes, which must hold the same names in the same order."""
        own = [[float(total), float(count)] for total, count in self.values()]
        table = accelerator.reduce(torch.tensor(own, dtype=torch.float64, device=accelerator.device), "sum").tolist()
        return {name: total / count if count > 0 else 0.0 for name, (total, count) in zip(self, table)}


@dataclass
class Run:
    """What the functions of a run share."""

    cfg: Any
    accelerator: Accelerator
    prompts: Prompts  # the examples, and how they become what the model reads
    model: nn.Module  # the policy
    reference: nn.Module | None  # pi_ref; None if beta is 0, or with LoRA: then it is the policy with its adapters off
    adapters: Any  # peft's handle on LoRA adapters, or None
    optimizer: torch.optim.Optimizer | None  # None in evaluation
    rewards: dict[str, tuple[Callable, float]]  # by name: reward(completion, solution) and weight
    eos: Tensor  # ids that end a completion
    distribution: dict[str, Any]  # temperature and forbidden ids, the same for sampler and scorer
    capture: Callable  # see `sample`
    done: int  # steps that have been taken
    notes: list[str] = field(default_factory=list)  # what was found in the data
    bar: Any = None  # the progress bar of `steps`
    whole: bool = True  # False while a step is partly applied to weights and moments
    seconds: dict[str, float] = field(default_factory=dict)  # by phase, of the current step
    clock: float = field(default_factory=time.perf_counter)  # when the last phase ended

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    @property
    def main(self) -> bool:
        return self.accelerator.is_main_process

    def collate(self, prompts: list[Prompt]) -> dict[str, Tensor]:
        batch = data.collate(prompts, self.prompts.processor.tokenizer.pad_token_id or 0)
        return {name: tensor.to(self.device) for name, tensor in batch.items()}

    def threshold(self, step: int) -> float:
        """Return the --iou_threshold of a step: phases of equal length, so a resumed run needs no state."""
        phases = self.cfg.iou_threshold
        return phases[min(len(phases) - 1, (step - 1) * len(phases) // self.cfg.steps)]

    def score(self, prompt: Prompt, texts: Sequence[str], step: int | None = None) -> dict[str, list[float]]:
        """Score completions of one prompt by each reward; step: of training, None: the last phase, for evaluation."""
        context = {"example": prompt.example, "iou_threshold": self.threshold(step or self.cfg.steps)}
        if any("images" in asked_for(reward) for reward, _ in self.rewards.values()):
            context["images"] = data.open_images(prompt.example)  # a Prompt holds what the processor made of them
        try:
            return {name: score_group(r, texts, prompt.solution, **context) for name, (r, _) in self.rewards.items()}
        except Exception as error:
            error.add_note(f"while scoring the answers to example {prompt.example.id}: {texts}")
            raise

    def decode(self, ids: Tensor, mask: Tensor) -> list[str]:
        """Return the texts of completions, without the EOS and the padding after it.

        Other special tokens stay: <think> and <answer> are such tokens in some tokenizers.
        """
        rows = [row[keep].tolist() for row, keep in zip(ids, mask & ~torch.isin(ids, self.eos))]
        return self.prompts.processor.tokenizer.batch_decode(rows)

    def autocast(self):
        """Compute in bf16 on GPUs. Trained weights stay float32; bf16 copies are cached until the context ends."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == AUTOCAST)

    def gathered(self):
        """With --shard gather all weights once for everything inside, not at every token."""
        return extra("shards").gathered(self.model) if self.cfg.shard else contextlib.nullcontext()

    @contextlib.contextmanager
    def sampling(self):
        """Set the model up for `sample`: no gradients, bf16 on GPUs, and SDPA, which takes the masks of `visible`."""
        flash = extra("flash")  # flash-attn, where it is installed, serves training and the reference pass only
        with torch.no_grad(), self.autocast(), flash.paused(self.model) if flash else contextlib.nullcontext():
            yield

    def chunks(self, n: int, unit: int = 1) -> Sequence[Tensor]:
        """Divide n rows of a micro-batch into chunks of --micro_batch; `unit` rows (DPO's pairs) stay together.

        If --micro_batch is 0, and with linear attention, there is one chunk.
        """
        rows, size = torch.arange(n, device=self.device), max(unit, self.cfg.micro_batch // unit * unit)
        return rows.split(size) if self.cfg.micro_batch and cache_is_differentiable(self.model) else [rows]

    def backward(self, batch: MicroBatch, loss_of: Callable[..., Tensor], unit: int = 1) -> None:
        # Run backward in this thread, where autocast is on. In a thread of its own, each recomputed block would enter
        # and leave autocast, which clears the cache of casts: the next chunk would cast all weights again.
        with self.autocast(), torch.autograd.set_multithreading_enabled(False):
            chunks = self.chunks(len(batch.ids), unit)
            two_stage_backward(self.model, batch.inputs, batch.ids, chunks, loss_of, **self.distribution)

    def reference_logps(self, batch: MicroBatch) -> Tensor | None:
        """Return log pi_ref [n, C] of a micro-batch; None without a KL term."""
        if not self.cfg.beta:
            return None
        off = self.adapters.disable_adapter() if self.adapters else contextlib.nullcontext()
        with self.autocast(), off:
            model, chunks = self.reference or self.model, self.chunks(len(batch.ids))
            return chunked_logps(model, batch.inputs, batch.ids, chunks, **self.distribution)

    def lap(self, phase: str) -> None:
        """Count the seconds since the last call as those of a phase of the step."""
        if self.device.type == "cuda":  # a GPU computes asynchronously: wait before reading the clock
            torch.cuda.synchronize()
        last, self.clock = self.clock, time.perf_counter()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + self.clock - last

    def loader(self, prompts: Prompts, batches: Sequence[list[tuple[int, int]]]) -> DataLoader:
        """Return a loader of these batches, to be iterated before the next exchange between processes: see `settle`.

        Its workers ignore SIGTERM, which schedulers send to every process.
        """
        if self.cfg.workers:
            self.settle()
        return DataLoader(
            prompts, batch_sampler=batches, collate_fn=list, num_workers=self.cfg.workers, worker_init_fn=ignore_sigterm
        )  # fmt: skip

    def settle(self) -> None:
        """Wait until gloo's threads have released the tensors of the last exchange; call it before a fork and the end.

        For that they hold a lock of Python for some microseconds. A process that is forked meanwhile (seen with 3.11)
        inherits the lock and hangs; one that shuts down meanwhile may abort. Nothing tells that they are done: sleep.
        """
        if self.accelerator.num_processes > 1:
            time.sleep(0.5)

    def steps(self) -> Iterator[tuple[int, list[Prompt]]]:
        """Yield (step, this process's prompts) for the remaining steps; set the learning rate and show progress."""
        cfg, seen, todo = self.cfg, set(), range(self.done + 1, self.cfg.steps + 1)
        slots = range(self.accelerator.process_index, cfg.prompts_per_step, self.accelerator.num_processes)
        examples = len(self.prompts.examples)
        drawn = [data.draw_examples(cfg.seed, examples, cfg.prompts_per_step, step, 0, slots) for step in todo]
        loader = self.loader(self.prompts, drawn)
        self.bar = tqdm(loader, initial=self.done, total=cfg.steps, disable=not self.main, dynamic_ncols=True)
        for prompts, step in zip(self.bar, todo):  # the bar first: else zip stops at todo, and the bar never ends
            for flaw in {flaw for prompt in data.sound(prompts) for flaw in prompt.skipped} - seen:
                tqdm.write(f"skipped: {flaw}")
                seen.add(flaw)
            self.seconds.clear()
            self.clock = time.perf_counter()
            for group in self.optimizer.param_groups:  # linear warm-up, linear decay to 0 after the last step
                group["lr"] = cfg.lr * min(1.0, step / (cfg.warmup_steps + 1)) * (1.0 - (step - 1) / cfg.steps)
            yield step, prompts
        self.bar.close()


def say(text: str) -> None:
    """Print on the first process."""
    if os.environ.get("RANK", "0") == "0":
        print(text, flush=True)


def loading(what: str, name: str):
    """Replace loading errors by an explanation, if extras/ is there."""
    return extra("hub").loading(what, name) if extra("hub") else contextlib.nullcontext()


def pretrained(auto: Any, model: str, **settings) -> Any:
    """Call from_pretrained of one of transformers' Auto classes; model: a folder, or NAME[@REVISION] on the hub."""
    name, _, revision = (model, "", "") if Path(model).exists() else model.partition("@")
    if (Path(model) / "adapter_config.json").exists() and not (Path(model) / "config.json").exists():
        raise SystemExit(f"--model {model}: holds adapters, not a model; give OUT/model of that run")
    with loading("model", model):
        return auto.from_pretrained(name, revision=revision or None, trust_remote_code=False, **settings)


def load_model(name: str, dtype: Any, device: torch.device) -> nn.Module:
    """Load a model in eval mode, which it never leaves: dropout would make sampler and scorer two policies."""
    settings = {"dtype": dtype, "device_map": {"": device}, "attn_implementation": "sdpa"}
    return pretrained(transformers.AutoModelForImageTextToText, name, **settings).eval()


def cast_frozen(model: nn.Module) -> None:
    """Store frozen weights in bf16 where autocast rounds them to bf16 anyway (Linear, Conv), in float32 elsewhere.

    So pi_ref computes exactly what pi_theta computes before its first update, and the KL starts at exactly 0.
    Exception: the weights of a layer's experts, one 3D tensor that autocast leaves alone, stay as they were loaded:
    float32 in the reference of full training, as in the policy, and the checkpoint's dtype in evaluation and as the
    base of LoRA, where float32 would take twice the memory.
    """
    experts = {p for part in model.modules() if hasattr(part, "num_experts") for p in part.parameters(recurse=False)}
    exact = set()  # parameters that stay float32, among them an output layer that shares its weight with the embedding
    for part in model.modules():
        if not isinstance(part, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            exact.update(part.parameters(recurse=False))
        if isinstance(part, transformers.PreTrainedModel):
            # `PreTrainedModel.dtype` is that of the first parameter, and some families cast activations to it.
            exact.add(next(part.parameters()))
    for p in model.parameters():
        if not p.requires_grad and not (p in experts and p.dim() == 3):
            p.data = p.data.to(torch.float32 if p in exact else torch.bfloat16)


def load_processor(cfg: Any, coordinates: str) -> tuple[Any, str, int]:
    """Load a processor that shows whole images; return it, the coordinates, and how many positions the model has."""
    config = pretrained(transformers.AutoConfig, cfg.model)
    processor = pretrained(transformers.AutoProcessor, cfg.model)
    if getattr(processor, "chat_template", None) is None:
        raise SystemExit(f"model {cfg.model} has no chat template; an instruction-tuned model is expected")
    if not hasattr(processor, "image_processor"):
        raise SystemExit(f"model {cfg.model} has no image processor: it reads text only")
    images = processor.image_processor
    if cfg.processor_options:
        extra("processors").configure(images, cfg.processor_options)
    if not data.show_whole_images(images, cfg.max_pixels) and cfg.max_pixels != Config.max_pixels:
        say(f"{type(images).__name__} has no limit in pixels: --max_pixels changes nothing; see --processor_options")
    if look := extra("processors"):
        asks_boxes = coordinates == "auto" and cfg.task in TASKS and TASKS[cfg.task].boxes
        for note in look.inspect(images, config.model_type, asks_boxes):
            say(note)
    if coordinates == "auto":
        coordinates = data.COORDINATES_OF_FAMILY.get(kind := config.model_type)
        if coordinates is None:
            say(f"model type {kind} is not known: coordinates are 0..1000; see --coordinates")
    positions = getattr(config.get_text_config(), "max_position_embeddings", None) or sys.maxsize
    if coordinates == "pixels":
        data.seen_size(images, (640, 427))  # fails here, not at the first example, if the processor tells no sizes
    return processor, coordinates or "relative", positions


def special_tokens(model: nn.Module, processor: Any) -> tuple[list[int], list[int]]:
    """Return ids that end a completion (the model's and the template's), and placeholder ids, which are forbidden."""
    text, tokenizer = model.config.get_text_config(), processor.tokenizer
    configured = (model.generation_config.eos_token_id, text.eos_token_id, tokenizer.eos_token_id)
    configured += (data.turn_end(processor),)
    eos = {token for ids in configured if ids is not None for token in (ids if isinstance(ids, list) else [ids])}
    kinds = ("image_token_id", "image_token_index", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    forbidden = {token for kind in kinds if isinstance(token := getattr(model.config, kind, None), int)}
    predicted = range(model.get_output_embeddings().weight.shape[0])  # some placeholders have an embedding but no logit
    return sorted(eos), sorted(forbidden.intersection(predicted) - eos)


def load_examples(cfg: Config, split: str) -> data.Found:
    """Load the examples of a split, and notes of what was found and left out; print the notes."""
    task, bad = TASKS[cfg.task], cfg.skip_bad_images
    chosen = {"categories": cfg.categories, "negatives": cfg.negatives, "seed": cfg.seed, "skip_bad_images": bad}
    chosen["box_format"] = cfg.box_format
    if split == "train":
        source, chosen = cfg.data or task.hub_data, chosen | {"shots": cfg.shots, "max_boxes": cfg.max_boxes}
    else:
        chosen["one_split"] = bool(cfg.eval_data or cfg.eval_only)
        source = cfg.eval_data or cfg.data or task.hub_data
        chosen |= {"limit": cfg.eval_limit, "eval_categories": cfg.eval_categories}
    if split == "val" and cfg.eval_data and cfg.eval_data == cfg.data and Path(source).is_file():
        say(f"--eval_data {source} is --data too: unless it has a column of splits, nothing is held out")
    with loading("dataset", source):
        examples, notes = data.load_examples(task, source, split, **chosen)
    say("\n".join(notes))
    return examples, notes


def connect(cfg: Any) -> Accelerator:
    """Join the processes that were launched; SystemExit where they would not find each other."""
    patience = InitProcessGroupKwargs(timeout=timedelta(hours=2))  # others wait while process 0 saves
    cpu, trackers = not torch.cuda.is_available(), getattr(cfg, "report_to", None) or None
    accelerator = Accelerator(cpu=cpu, log_with=trackers, project_dir=cfg.out, kwargs_handlers=[patience])
    n, launched = accelerator.num_processes, int(os.environ.get("WORLD_SIZE", "1"))
    if n != launched:
        raise SystemExit(f"{launched} processes were launched, accelerate sees {n}: see `accelerate config`")
    here, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
    if accelerator.device.type == "cuda" and here > gpus:
        raise SystemExit(f"{here} processes were launched on this machine, which has {gpus} GPU(s): launch one per GPU")
    if hasattr(cfg, "steps") and cfg.prompts_per_step % n:
        raise SystemExit(f"--prompts_per_step {cfg.prompts_per_step}: must be a multiple of the {n} processes")
    if getattr(cfg, "shard", False) and cfg.adam_bits == 8:
        raise SystemExit("--adam_bits 8: must be 32 with --shard, which bitsandbytes does not know")
    if not accelerator.is_main_process:
        transformers.utils.logging.disable_progress_bar()  # one bar of "Loading weights" is enough
    # cuDNN's attention, PyTorch's first choice on Hopper and newer: under a mask, some lengths give NaN gradients
    # (PyTorch issue 196678), and every new shape is planned anew.
    torch.backends.cuda.enable_cudnn_sdp(False)
    torch.multiprocessing.set_sharing_strategy("file_system")  # the default can exceed the limit of open files
    return accelerator


def make_trainable(model: nn.Module, cfg: Any, adapters_at: str | None) -> Any:
    """Choose the parameters that are trained; return peft's handle on LoRA adapters, or None.

    adapters_at: folder of adapters to continue.
    """
    adapters = None
    if getattr(model, "hf_quantizer", None):
        raise SystemExit(f"model {cfg.model} is quantized: it cannot be trained and saved; take the original weights")
    if cfg.lora_rank:
        adapters = extra("adapters").add(model, cfg.lora_rank, cfg.seed, adapters_at)
    elif cfg.freeze_vision:
        extra("adapters").freeze_vision(model)
    # Where memory counts: on GPUs, or where --micro_batch says so.
    if (memory := extra("memory")) and (model.device.type == AUTOCAST or cfg.micro_batch):
        memory.checkpoint_vision(model)
    return adapters


def make_optimizer(cfg: Any, trained: list[nn.Parameter]) -> torch.optim.Optimizer:
    if cfg.adam_bits == 8:
        return extra("memory").adamw_8bit(trained, lr=cfg.lr, **ADAM)
    return torch.optim.AdamW(trained, lr=cfg.lr, **ADAM, fused=True)


def build(
    cfg: Any, accelerator: Accelerator, prompts: Prompts, rewards: dict, trains: bool, temperature: float = 1.0
) -> Run:  # fmt: skip
    """Load policy, reference and optimizer; prompts, rewards and temperature go into the Run as they are.

    Trained weights, among them LoRA's, are float32: bf16 would round away updates of size 1e-6. On GPUs autocast
    computes with them in bf16, and most frozen ones (reference, LoRA's base, evaluation) are stored in bf16, see
    `cast_frozen`. With --shard FSDP casts: extras/shards.py.
    """
    device, reference, adapters, optimizer, saved = accelerator.device, None, None, None, None
    bf16, shard, memory, graph = device.type == AUTOCAST, trains and cfg.shard, extra("memory"), extra("graph")
    flash = extra("flash")
    if trains and cfg.resume:
        saved = extra("checkpoints").find(cfg, prompts.examples)
    if device.type == "cuda" and memory:
        config, gpu = pretrained(transformers.AutoConfig, cfg.model), torch.cuda.get_device_properties(device)
        n = accelerator.num_processes
        say(memory.forecast(cfg, config, prompts, trains, n, cast_frozen=cast_frozen, has=gpu.total_memory))
        if gpu.major < 8:
            say(f"{gpu.name} has capability {gpu.major}.{gpu.minor}: below 8.0 bf16 is slow and attention takes more")

    def placed(model: nn.Module) -> nn.Module:
        """Store frozen weights compactly, choose the attention and, with --shard, divide the weights."""
        if bf16:
            cast_frozen(model)
        if flash and trains:
            flash.use(model, device)
        if shard:
            extra("shards").shard(model, torch.bfloat16 if bf16 else None)
        return model

    source = saved.model if saved and not cfg.lora_rank else cfg.model
    # On GPUs weights that stay as they are (evaluation, LoRA's base) are loaded in the dtype of the checkpoint: half of
    # the memory. A LoRA run's reference is the same model, so nothing is rounded differently in the two.
    dtype = "auto" if bf16 and (not trains or cfg.lora_rank) else torch.float32  # mia_dpo.py build has no lora_rank
    model = load_model(source, dtype, device).requires_grad_(trains)
    if trains:
        adapters = make_trainable(model, cfg, saved and saved.model)
    placed(model)
    if trains:
        if cfg.beta and not adapters:
            # Loaded in float32 like the policy, then cast: loaded in bf16, its buffers would differ from the policy's.
            reference = placed(load_model(cfg.model, torch.float32, device).requires_grad_(False))
        optimizer = make_optimizer(cfg, [p for p in model.parameters() if p.requires_grad])
        if saved:
            saved.restore(model, optimizer, accelerator.is_main_process)
    special = special_tokens(model, prompts.processor)
    eos, forbidden = (torch.tensor(ids, dtype=torch.long, device=device) for ids in special)
    distribution, done = {"temperature": temperature, "forbidden": forbidden}, saved.step if saved else 0
    # Not with --shard: FSDP's hooks run at every forward pass and may wait for the GPU.
    capture = graph.Graphs().capture if device.type == "cuda" and graph and not shard else lambda step: step
    loaded = (model, reference, adapters, optimizer, rewards, eos, distribution, capture)
    return Run(cfg, accelerator, prompts, *loaded, done)


def start(cfg: Config) -> Run:
    """Load everything that training, evaluation or a question needs. Nothing is written yet."""
    accelerator, task, trains = connect(cfg), TASKS[cfg.task], not (cfg.eval_only or cfg.ask)
    try:
        weights = reward_weights(cfg.rewards) or task.rewards
        rewards = choose_rewards(weights, think=cfg.think)
    except ValueError as error:
        raise SystemExit(f"--rewards {' '.join(cfg.rewards)}: {error}") from None
    processor, coordinates, positions = load_processor(cfg, cfg.coordinates)
    room = positions - cfg.max_completion_tokens
    if cfg.ask:
        examples, notes = extra("check").questions(task, Path(cfg.ask), cfg.categories), []
    else:
        examples, notes = load_examples(cfg, "train" if trains else "val")
    asked = (cfg.think, cfg.system_prompt, room, cfg.skip_bad_images)
    prompts = Prompts(task, examples, processor, coordinates, *asked, cfg.template_options)
    run = build(cfg, accelerator, prompts, rewards, trains, cfg.temperature if trains else 1.0)
    run.notes += notes
    return run


# ------------------------------------------------------------------------------------------------
# What a run writes.


def open_out(run: Run, per_prompt: int, what: str, notes: Sequence[str] = ()) -> None:
    """Make the run folder, once everything has loaded, and print what a person should check."""
    cfg, out, checks = run.cfg, Path(run.cfg.out), extra("check")
    if run.main:
        out.mkdir(parents=True, exist_ok=True)
        if not begun(out):
            (out / "config.unfinished").write_text(json.dumps(asdict(cfg), indent=2) + "\n")
            (out / "config.unfinished").replace(out / "config.json")
    if checks:
        checks.describe(run, per_prompt, what, notes)
    else:
        missing = "no description of the run, no report.html, no look at processors and images before training"
        say(f"extras/ is missing: {missing}; Ctrl-C saves OUT/model and no checkpoint")
    if cfg.report_to:
        run.accelerator.init_trackers("virft", config={name: str(value) for name, value in asdict(cfg).items()})
    run.accelerator.wait_for_everyone()


def ignore_sigterm(worker: int) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def finish(run: Run) -> None:
    """Wait for all processes, then close trackers and connections.

    When a process fails, the launcher kills the others, which may still be saving.
    """
    run.accelerator.wait_for_everyone()
    run.settle()
    run.accelerator.end_training()


def due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


# Beside the progress bar, where they are logged.
SHOWN = ("cross_entropy", "reward", "kl", "completion_tokens", "margin", "accuracy")


def write(run: Run, step: int, metrics: Averages, rows: list[dict]) -> None:
    """Append the step to metrics.jsonl, rollouts.jsonl and the trackers; from here on the step counts as done."""
    metrics.put("lr", run.optimizer.param_groups[0]["lr"])
    for phase, seconds in run.seconds.items():
        metrics.put(f"seconds/{phase}", seconds)
    rows, row = gather_object(rows), {"step": step} | metrics.reduce(run.accelerator)
    if run.main:
        data.append_rows(Path(run.cfg.out) / "rollouts.jsonl", rows)
        data.append_rows(Path(run.cfg.out) / "metrics.jsonl", [row])
        if step == 1 and row.get("zero_variance_groups") == 1:
            tqdm.write("the first step taught nothing: within every group all rewards are equal; try --check true")
    run.accelerator.log(row, step=step)
    run.bar.set_postfix({name: f"{row[name]:.3g}" for name in SHOWN if name in row})
    run.done, run.whole = step, True


@contextlib.contextmanager
def guarded(run: Run) -> Iterator[Callable[[], int]]:
    """Yield `stopping()`, the number of a signal that asked to stop, or 0; after an error save what was learned.

    With extras/ that is a checkpoint, or the model if a step is partly applied. Without, it is the model, also after
    Ctrl-C, which then stops at once.
    """
    if checkpoints := extra("checkpoints"):
        with checkpoints.interruptible(run, save_model) as stopping:
            yield stopping
        return
    try:
        yield lambda: 0
    except (Exception, KeyboardInterrupt) as stop:
        if run.main and (run.done or not run.whole):  # at least one update was applied
            save_model(run)
        if isinstance(stop, KeyboardInterrupt):
            raise SystemExit(128 + signal.SIGINT) from None
        raise


def save_model(run: Run) -> None:
    """Write OUT/model atomically: in the dtype of --model, with LoRA in float32, and then OUT/adapters (float32) too.

    Adapters are merged into a float32 copy of --model, because bf16 would round most of what they learned away. Call
    this last: it may cast the policy in place.
    """
    out, weights, model = Path(run.cfg.out), None, run.model
    if run.cfg.shard and not run.adapters:  # every process takes part, the main one gets the weights
        weights = extra("shards").whole_weights(model, run.main)
    dtype = pretrained(transformers.AutoConfig, run.cfg.model).dtype or torch.float32
    if run.adapters:
        learned = extra("adapters").learned(run.adapters, run.main)
        if run.main:
            replace_folder(out / "adapters", lambda new: run.adapters.save_pretrained(new, state_dict=learned))
            base = load_model(run.cfg.model, torch.float32, torch.device("cpu"))
            dtype, model = torch.float32, extra("adapters").merged(base, run.adapters, learned)
    elif run.main:
        rounded = [n for n, p in model.named_parameters() if not p.requires_grad and p.dtype == torch.bfloat16 != dtype]
        if rounded:  # by `cast_frozen`: reload the exact ones
            exact = load_model(run.cfg.model, dtype, torch.device("cpu")).state_dict()
            weights = (weights or model.state_dict(keep_vars=True)) | {name: exact[name] for name in rounded}

    def write_model(new: Path) -> None:
        cast = {id(w): w.detach().to(dtype) for w in (weights or {}).values()}  # by id: tied weights stay one tensor
        whole = weights and {name: cast[id(w)] for name, w in weights.items()}
        model.to(dtype).save_pretrained(new, state_dict=whole)
        run.prompts.processor.save_pretrained(new)

    if run.main:
        replace_folder(out / "model", write_model)
        more = "" if run.whole else " and the next one's update"
        print(f"the model after {run.done} of {run.cfg.steps} steps{more} is in {out / 'model'}", flush=True)


def replace_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """Write a folder beside its place, then rename it, so that readers never find a part of it."""
    new, old = (folder.with_name(f"{folder.name}.{state}") for state in ("unfinished", "old"))
    if old.exists() and not folder.exists():  # killed between the two renames below
        old.rename(folder)
    shutil.rmtree(new, ignore_errors=True)
    write(new)
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    new.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def answer(run: Run, prompts: list[Prompt]) -> list[str]:
    """Return the policy's most probable answers, one to each prompt, by the sampler of training.

    The caller holds `run.gathered()` around all its batches, because processes may have different numbers of them.
    """
    inputs, limit = run.collate(prompts), run.cfg.max_completion_tokens
    with run.sampling():
        ids, _ = sample(run.model, inputs, 1, None, limit, run.eos, **run.distribution, capture=run.capture)
    texts = run.decode(ids, completion_mask(ids, run.eos))
    return [prompt.whole_answer(text) for prompt, text in zip(prompts, texts)]


# ------------------------------------------------------------------------------------------------
# The command line.


def parse(kind: type, argv: Sequence[str] | None, **about) -> Any:
    """Read a dataclass of settings from the command line; SystemExit names a flag that is unknown or out of bounds."""
    group = parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter, **about)
    for f, default in zip(fields(kind), asdict(kind()).values()):
        of = next(t for t in (*typing.get_args(f.type), f.type) if t is not type(None))  # X of X, X | None, list[X]
        read, many = string_to_bool if of is bool else of, "*" if isinstance(default, list) else None
        if f.metadata["heading"]:
            group = parser.add_argument_group(f.metadata["heading"])
        choices = "|".join(map(str, choices_of(f) or ()))
        words = {"help": f.metadata["help"], "metavar": choices if 0 < len(choices) < 60 else of.__name__.upper()}
        group.add_argument(f"--{f.name}", type=read, nargs=many, default=default, **words)
    found, unknown = parser.parse_known_args(argv)
    if unknown:
        near = difflib.get_close_matches(unknown[0].lstrip("-"), vars(found), n=1)
        meant = f"did you mean --{near[0]}? " if near else ""
        raise SystemExit(f"{' '.join(unknown)}: there is no such flag; {meant}--help lists them")
    obey(found, [(f.name, *rule) for f in fields(kind) for rule in rules_of(f, getattr(found, f.name))])
    for f, default in zip(fields(kind), asdict(kind()).values()):
        if getattr(found, f.name) != default and "needs" in f.metadata["rules"]:
            extra(f.metadata["rules"]["needs"], f"--{f.name}")  # now, not at the step that needs it
    return kind(**vars(found))


def choices_of(f: Any) -> Any:
    """Return the valid values of a setting; None if they are not listed."""
    choices = f.metadata["rules"].get("choices")
    return choices() if callable(choices) else choices


def rules_of(f: Any, value: Any) -> list[tuple[bool, str]]:
    """Return a pair for each rule of a setting: (whether its value is valid, which values are)."""
    rules, values = f.metadata["rules"], value if isinstance(value, list) else [value]
    choices = choices_of(f) or values
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


def begun(out: Path) -> bool:
    """Return whether a folder holds a run with a step or an answer, not just what is written at its start."""
    names = set(os.listdir(out)) if out.is_dir() else set()
    started = {"config.json", "setup.txt", "used.json", "virft"}  # the last one is a tracker's folder
    return "config.json" in names and any(not name.endswith(".png") for name in names - started)  # PNGs: --check, --ask


def out_rule(cfg: Any, may_exist: bool) -> tuple[str, Any, str]:
    """Return the rule that --out is new."""
    taken = Path(cfg.out).is_file() or begun(Path(cfg.out))
    hint = " (--resume true continues it)" if extra("checkpoints") else ""
    return "out", may_exist or not taken, f"new: it holds an earlier run{hint} or a model"


def parse_config(argv: Sequence[str] | None = None) -> Config:
    """Read and check the command line; SystemExit names the flag that is wrong and what would be right."""
    usage = "accelerate launch virft.py --task TASK --data DIR --model NAME [flags]"
    cfg = parse(Config, argv, usage=usage, description="ViRFT: GRPO for vision-language models with verifiable rewards")
    # Adapters start as no change at all and are few: they need a higher rate than the weights themselves.
    cfg.lr = cfg.lr or (1e-5 if cfg.lora_rank else 1e-6)
    cfg.beta = 0.0 if cfg.sft and cfg.beta == Config.beta else cfg.beta  # the default is GRPO's
    evaluates = cfg.eval_only or cfg.ask
    unfinished = cfg.eval_only and extra("evaluate").unfinished(Path(cfg.out), asdict(cfg))
    obey(cfg, [
        ("clip", len(cfg.clip) in (1, 2) and cfg.clip[0] < 1, "one or two numbers, the first below 1"),
        ("iou_threshold", cfg.iou_threshold, "one or more numbers"),
        ("inner_epochs", not cfg.sft or cfg.inner_epochs == 1, "1 with --sft, whose rho is 1"),
        ("resample", not (cfg.sft and cfg.resample), "0 with --sft, which samples nothing"),
        ("normalize", not (cfg.sft and cfg.normalize == "each"), "sum with --sft, which compares nothing"),
        ("beta", not (cfg.sft and cfg.beta), "0 with --sft"),
        ("resume", not (cfg.resume and evaluates), "false with --eval_only and --ask"),
        ("check", not (cfg.check and evaluates), "false with --eval_only and --ask"),
        ("ask", cfg.categories or not (cfg.ask and TASKS[cfg.task].asks_for), "together with --categories"),
        out_rule(cfg, may_exist=cfg.ask or cfg.check or cfg.resume or unfinished),
    ])  # fmt: skip
    return cfg


def main(argv: Sequence[str] | None = None) -> None:
    cfg = parse_config(argv)
    try:
        held_out, _ = load_examples(cfg, "val") if cfg.eval_every and not cfg.eval_only and not cfg.check else ((), ())
        run = start(cfg)
        if not (cfg.ask or cfg.check):
            open_out(run, 1 if cfg.sft else cfg.group_size, "completions")
        if cfg.ask:
            extra("check").ask(run, answer)
        elif cfg.check:
            extra("check").check(run, rollout, micro_batches)
        elif cfg.eval_only:
            extra("evaluate").evaluate(run, answer, run.prompts.examples, Path(cfg.out))
        else:
            other = {"rollout": partial(extra("variants").supervised, judged=judged)} if cfg.sft else {}
            return train(run, held_out, **other)
        finish(run)
    except DataError as error:
        raise SystemExit(f"data: {error}") from None


if __name__ == "__main__":
    main()
