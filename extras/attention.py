"""Attention on GPUs: keys read once by the heads that share them, and FlashAttention-2 where it is installed."""

import contextlib
import importlib.util
import inspect
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

NAME = "flash_attention_2"


def one_query(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, dropout: float = 0.0,
    scaling: float | None = None, **kwargs: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Compute transformers' "sdpa" attention; with one query per row, read keys that several heads share once.

    query [N, H, 1, D]; key, value [N, K, keys, D]. transformers copies keys and values from K to all H heads if there
    is a mask. When sampling 128 completions from Qwen2-VL-2B (H 12, K 2) on an H200, the copies were two thirds of the
    time. Instead, the H / K heads that share keys are passed as H / K queries of one head: all of them see the same
    keys, and queries do not see each other.
    """
    (N, H, n, D), K = query.shape, key.shape[1]
    if n > 1 or H == K or attention_mask is not None and attention_mask.shape[1] > 1:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    shared = query.reshape(N, K, H // K, D)
    out = F.scaled_dot_product_attention(shared, key, value, attention_mask, dropout_p=dropout, scale=scaling)
    return out.reshape(N, 1, H, D), None


def share_keys() -> None:
    """Let every model of this process that uses "sdpa" decode by `one_query`."""
    AttentionInterface.register("sdpa", one_query)


# FlashAttention-2 (`bash run.sh flash-attn` installs it) serves training and the reference pass. Sampling stays with
# SDPA: a decode step gives its mask as a tensor of rows and keys, which flash-attn does not take.


def usable(device: torch.device) -> bool:
    """Return whether flash-attn is installed and this GPU can run it: Ampere (capability 8.0) or newer."""
    installed = importlib.util.find_spec("flash_attn") is not None
    return installed and device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


def use(model: nn.Module, device: torch.device) -> None:
    """Switch a model to FlashAttention where GPU and family can.

    Families whose forward takes token_type_ids (Gemma 3, PaliGemma) let the tokens of an image see each other in both
    directions. flash-attn's masks cannot say so, and transformers would leave that out without a word.
    """
    both_ways = "token_type_ids" in inspect.signature(model.forward).parameters
    if usable(device) and getattr(model, "_supports_flash_attn", False) and not both_ways:
        model.set_attn_implementation(NAME)


@contextlib.contextmanager
def paused(model: nn.Module) -> Iterator[None]:
    """Use SDPA within this context."""
    if model.config._attn_implementation != NAME:
        yield
        return
    model.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        model.set_attn_implementation(NAME)
