"""Forecast the memory of a run before its weights are loaded; save some by checkpointed vision blocks, 8-bit moments.

Bytes of one process at the peak of a training pass, for T trained parameters:

    states        4 T weights, 4 T gradients, 8 T moments (2 T with --adam_bits 8); frozen weights and the reference as
                  virft.cast_frozen stores them. With --shard all of it is divided by the processes
    casts         2 for each trained weight of Linear and Conv layers, made by autocast once per phase
    prompts       what autograd keeps of P tokens per prompt. If the vision tower is trained, also the inputs of all its
                  blocks and what autograd keeps in one
    completions   what autograd keeps of a chunk's tokens; each completion's copy of the prompt's keys and values, which
                  SDPA expands to all heads; the logits and their gradient
    log-softmax   a few float32 copies of a block of logits, see virft.token_logps

While sampling: weights, moments, casts (with --shard of all weights, which are gathered for the whole rollout), and a
static cache of P + C tokens for every completion of the step, 1.5 times that while the batch is halved. The
constants were counted on Qwen2-VL's layers, and `python bench/memory.py --measure` compares the sum with PyTorch's
allocator. For other families, and for mixtures of experts, the forecast is rougher.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import data
from extras.adapters import freeze_vision, language_model
from extras.hub import loading

GB = 1e9
# Bytes that autograd keeps of a token in a text layer: TEXT_H x hidden size + TEXT_F x width of the MLP.
TEXT_H, TEXT_F = 37, 8
VISION_D = 47  # of a patch in a vision block: VISION_D x width. A checkpointed block keeps its float32 input, 4 x width
FLOAT32_BLOCK = 2**22  # virft's
PREFILL_D = 36  # of a patch in a vision block without gradients, x width
PATCH_PIXELS = 4704  # bytes of the input of a Qwen-VL patch: 2 x 3 x 14 x 14 float32 numbers
DRAW = 30  # of a logit while a token is drawn: 2 (bf16) + 4 (float32) + 3 x 8 (float64)
MOMENTS = {32: 8, 8: 2}  # of both moments of a parameter


def vision_blocks(model: nn.Module) -> list[nn.Module]:
    """Return the blocks of the vision tower: in module lists outside the language model, those that hold a Linear."""
    inside = set(language_model(model).modules())
    lists = [part for part in model.modules() if isinstance(part, nn.ModuleList) and part not in inside]
    return [block for blocks in lists for block in blocks if first_linear(block)]


def first_linear(block: nn.Module) -> nn.Linear | None:
    return next((part for part in block.modules() if isinstance(part, nn.Linear)), None)


def checkpoint_vision(model: nn.Module) -> int:
    """Recompute trained vision blocks in the backward pass instead of storing what they compute; return how many.

    Done by hand, because transformers' gradient_checkpointing_enable() does nothing in eval mode.
    """

    def forward(plain: Callable, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return plain(*args, **kwargs)
        return checkpoint(plain, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

    trained = [block for block in vision_blocks(model) if any(p.requires_grad for p in block.parameters())]
    for block in trained:
        block.forward = partial(forward, block.forward)
    return len(trained)


def adamw_8bit(parameters: Sequence[nn.Parameter], **settings: Any) -> torch.optim.Optimizer:
    """Return AdamW with 8-bit moments (arXiv 2110.02861); those of small tensors stay float32."""
    with loading("--adam_bits", "8"):
        from bitsandbytes.optim import AdamW8bit
    return AdamW8bit(parameters, **settings)


def needed(
    cfg: Any, config: Any, cast_frozen: Callable, P: int, patches: int, trains: bool = True, processes: int = 1
) -> dict[str, float]:  # fmt: skip
    """Return the bytes that each process needs in training ("train") and in sampling ("sample").

    cfg: settings of virft.py or mia_dpo.py; config: the model's; prompts of P tokens and `patches` vision patches.
    """
    with torch.device("meta"):  # parameters without memory
        model = transformers.AutoModelForImageTextToText.from_config(config)
    cast_frozen(model.requires_grad_(False))
    stored, adapters, rank = {p: p.element_size() for p in model.parameters()}, 0, trains and cfg.lora_rank
    if rank:
        linear = [part for part in language_model(model).modules() if isinstance(part, nn.Linear)]
        adapters = sum(rank * (part.in_features + part.out_features) for part in linear)
    elif trains:
        model.requires_grad_(True)
        if cfg.freeze_vision:
            freeze_vision(model)
    text, head = config.get_text_config(), model.get_output_embeddings().weight
    h, layers, V = text.hidden_size, text.num_hidden_layers, text.vocab_size
    views = getattr(text, "per_layer_config", None)  # Gemma 4's layers have heads of two sizes
    each = [text] * layers if views is None else [views[layer] for layer in range(layers)]
    kv = sum(one.num_key_value_heads * (getattr(one, "head_dim", None) or h // one.num_attention_heads) for one in each)
    trained = {p for p in model.parameters() if p.requires_grad}
    T = sum(p.numel() for p in trained) + adapters
    reference = sum(p.numel() * size for p, size in stored.items()) if trains and cfg.beta and not rank else 0
    weights = sum(p.numel() * (4 if p in trained else size) for p, size in stored.items()) + 4 * adapters + reference
    casts = 2 * (sum(p.numel() for p in trained if stored[p] == 2 or p is head) + adapters)
    # A frozen output layer that is also the embedding is float32, and autocast casts it at every use.
    head_cast = 2 * head.numel() if stored[head] == 4 and head not in trained else 0
    C, cache = getattr(cfg, "max_completion_tokens", 512), 4 * kv
    if hasattr(cfg, "answers"):  # mia_dpo.py build
        G, prompts = max(1, cfg.answers), cfg.batch
    else:
        G = answers_per_prompt(cfg) if trains else 1
        prompts = max(1, cfg.prompts_per_step // processes) if trains else cfg.prompts_per_step
    rows = G * prompts
    widths = [first_linear(block).in_features for block in vision_blocks(model)]
    prefill = prompts * patches * (PREFILL_D * max(widths, default=0) + PATCH_PIXELS)
    decode = 1.5 * rows * (P + C) * cache + DRAW * rows * V + head_cast
    if not trains:
        return {"sample": weights + max(prefill, decode)}
    shards = processes if cfg.shard else 1
    states = (weights + MOMENTS[cfg.adam_bits] * T) / shards
    chunk, encoded = cfg.micro_batch or G, max(1, cfg.micro_batch // G)
    if "linear_attention" in (getattr(text, "layer_types", None) or ()):  # repeats the prompt, no chunks
        chunk = encoded = max(G, cfg.micro_batch)
    width = getattr(text, "intermediate_size", None) or text.moe_intermediate_size * text.num_experts_per_tok
    token = layers * (TEXT_H * h + TEXT_F * width)
    expanded = 4 * h * layers  # where a mask is needed, SDPA expands keys and values to all heads
    patch = 0 if cfg.freeze_vision or rank else 4 * sum(widths) + VISION_D * max(widths, default=0)
    logits = chunk * C * V
    training = {
        "gradients": 4 * T / shards, "casts": casts + 2 * head_cast,  # the prompt's and the chunk's
        "prompts": encoded * (P * (token - expanded) + patches * patch),
        "completions": chunk * (C * token + P * expanded + (2 * P + C) * cache) + 4 * logits,
        "log-softmax": 12 * min(logits, max(FLOAT32_BLOCK, logits // 32)),
    }  # fmt: skip
    gathered = 2 * (sum(p.numel() for p in stored) + adapters) if cfg.shard else casts
    return {"train": states + sum(training.values()), "sample": states + gathered + max(prefill, decode)}


def answers_per_prompt(cfg: Any) -> int:
    """Return G in training: --group_size, one with --sft, two in DPO."""
    return 1 if getattr(cfg, "sft", False) else getattr(cfg, "group_size", 2)


def patches_of(pixels: Tensor, config: Any) -> int:
    """Return how many vision patches `pixel_values` hold: [patches, x], [images, patches, x] or [..., H, W]."""
    if pixels.dim() < 4:
        return pixels.shape[0] if pixels.dim() == 2 else pixels.shape[0] * pixels.shape[1]
    size = getattr(config.vision_config, "patch_size", 14)
    size = size if isinstance(size, int) else size[0]  # InternVL has one for each axis
    return pixels[..., 0, 0].numel() // 3 * (pixels.shape[-2] // size) * (pixels.shape[-1] // size)


REMEDIES = (  # in this order: first those that change least of what is learned
    {"micro_batch": 2},
    {"micro_batch": 2, "adam_bits": 8},
    {"micro_batch": 2, "shard": True},
    {"micro_batch": 2, "freeze_vision": True, "beta": 0.0},
    {"micro_batch": 2, "freeze_vision": True, "beta": 0.0, "adam_bits": 8},
    {"micro_batch": 2, "lora_rank": 16},
    {"micro_batch": 1, "lora_rank": 16, "max_pixels": 200704},
)


def forecast(
    cfg: Any, config: Any, prompts: Any, trains: bool, processes: int, cast_frozen: Callable, has: float
) -> str:  # fmt: skip
    """Describe what a run needs, and flags with which it would fit or, if there is room, take less time.

    prompts: data.Prompts, whose first example is taken as typical; has: the GPU's memory in bytes.
    """
    prompt = prompts[0, 0]
    if isinstance(prompt, data.DataError):  # to be reported, or skipped, where its turn comes
        return "memory: no forecast, because the first example cannot be read"
    first = prompt.inputs
    P, patches = first["input_ids"].shape[1], patches_of(first["pixel_values"], config)
    need = max(needed(cfg, config, cast_frozen, P, patches, trains, processes).values())
    line = f"memory: needs about {need / GB:.0f} GB, this GPU has {has / GB:.0f}"
    limited = hasattr(prompts.processor.image_processor, "merge_size")  # by --max_pixels: data.show_whole_images
    # The rest is for CUDA itself, what the allocator cannot use, and the forecast's error: the ratios in docs/gpus.md.
    room, is_dpo = 0.9 * has, not hasattr(cfg, "group_size")
    G = answers_per_prompt(cfg)
    for remedy in REMEDIES if trains and need > room else ():
        now = {name: getattr(cfg, name) for name in remedy} | {"micro_batch": cfg.micro_batch or G}
        flags = {name: value for name, value in remedy.items() if not saves_as_much(name, now[name], value)}
        changed = replace(cfg, **flags)
        if changed.shard and (processes == 1 or changed.adam_bits == 8) or is_dpo and "beta" in flags:
            continue
        if "max_pixels" in flags and not limited:
            continue
        share = min(1.0, changed.max_pixels / cfg.max_pixels)
        sizes = round(P * share), round(patches * share)
        less = max(needed(changed, config, cast_frozen, *sizes, trains, processes).values())
        if less < room:
            return f"{line}; with {words(flags)} about {less / GB:.0f}"
    # A pass over one group is so short that a GPU waits for Python.
    for groups in (4, 2) if trains and need < room and not is_dpo else ():
        rows = groups * G
        if max(cfg.micro_batch, G) < rows <= G * cfg.prompts_per_step // processes:
            changed = replace(cfg, micro_batch=rows)
            more = max(needed(changed, config, cast_frozen, P, patches, trains, processes).values())
            if more < room:
                return f"{line}; --micro_batch {rows} takes less time and about {more / GB:.0f} GB"
    return line


def saves_as_much(name: str, now: Any, advised: Any) -> bool:
    """Return whether a setting takes no more memory than the advised value."""
    if name in ("shard", "freeze_vision"):
        return now
    return 0 < now <= advised or now == advised  # 0 switches --lora_rank off


def words(flags: dict[str, Any]) -> str:
    """Write settings as they are typed."""
    return " ".join(f"--{name} {str(value).lower()}" for name, value in flags.items())
