"""Train a part of the model: LoRA adapters (--lora_rank) or the language model alone (--freeze_vision)."""

from typing import Any

import torch
from torch import nn

from extras.hub import loading


def language_model(model: nn.Module) -> nn.Module:
    """Return the part that reads tokens: the module that holds the token embedding."""
    embedding = model.get_input_embeddings()
    return next(module for module in model.modules() if embedding in module.children())


def freeze_vision(model: nn.Module, dtype: torch.dtype | None) -> None:
    """Freeze all that neither reads nor writes tokens, vision tower and projector, and keep it in `dtype` (None: as it is)."""
    kept = {id(p) for part in (language_model(model), model.get_output_embeddings()) for p in part.parameters()}
    for parameter in model.parameters():
        if id(parameter) not in kept:
            parameter.requires_grad_(False)
            parameter.data = parameter.data.to(dtype or parameter.dtype)


def add(model: nn.Module, rank: int, seed: int, saved: str | None) -> Any:
    """Put LoRA adapters (arXiv 2106.09685) on every linear layer of the language model; return peft's handle on them.

    Everything else is frozen. An adapter starts as no change at all, so the policy without its adapters is the
    reference. saved: folder of adapters to continue.
    """
    with loading("--lora_rank", str(rank)):
        import peft
    if saved:
        return peft.PeftModel.from_pretrained(model, saved, is_trainable=True)
    inside = set(language_model(model).modules())
    layers = [name for name, module in model.named_modules() if module in inside and isinstance(module, nn.Linear)]
    torch.manual_seed(seed)  # adapters are the only weights that start at random
    return peft.get_peft_model(model, peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=layers))
