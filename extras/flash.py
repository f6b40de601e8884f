"""Use FlashAttention-2 in training and in the reference pass (`bash run.sh flash-attn` installs it).

Sampling stays with SDPA: a decode step gives its mask as a tensor of rows and keys, which flash-attn does not take.
"""

import contextlib
import importlib.util
import inspect
from collections.abc import Iterator

import torch
from torch import nn
from transformers import PreTrainedModel

NAME = "flash_attention_2"


def usable(device: torch.device) -> bool:
    """Return whether flash-attn is installed and this GPU can run it: Ampere (capability 8.0) or newer."""
    installed = importlib.util.find_spec("flash_attn") is not None
    return installed and device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


def use(model: nn.Module, device: torch.device) -> None:
    """Switch a model to FlashAttention where GPU and family can.

    Every part of the model must support it: LFM2-VL's vision tower does not, and transformers would raise an error.
    Families whose forward takes token_type_ids (Gemma 3, PaliGemma), and Gemma 4 if so configured, let the tokens of an
    image see each other in both directions. flash-attn's masks cannot say so, and transformers would leave that out
    without a word.
    """
    both_ways = "token_type_ids" in inspect.signature(model.forward).parameters
    both_ways = both_ways or getattr(model.config.get_text_config(), "use_bidirectional_attention", None)
    parts = [part for part in model.modules() if isinstance(part, PreTrainedModel)]
    supported = all(getattr(part, "_supports_flash_attn", False) for part in parts)
    if usable(device) and supported and not both_ways:
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
