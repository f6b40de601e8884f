"""Train a part of the model: LoRA adapters (--lora_rank) or only the language model (--freeze_vision)."""

from typing import Any

import torch
from torch import nn

from extras.hub import loading


def language_model(model: nn.Module) -> nn.Module:
    """Return the language model: the module that directly contains the token embedding."""
    embedding = model.get_input_embeddings()
    return next(module for module in model.modules() if embedding in module.children())


def freeze_vision(model: nn.Module, dtype: torch.dtype | None) -> None:
    """Freeze the vision tower and the projector, and convert them to `dtype` (None: leave the dtype as it is).

    Everything outside the language model and the output embedding is frozen.
    """
    kept = {id(p) for part in (language_model(model), model.get_output_embeddings()) for p in part.parameters()}
    for parameter in model.parameters():
        if id(parameter) not in kept:
            parameter.requires_grad_(False)
            parameter.data = parameter.data.to(dtype or parameter.dtype)


def add(model: nn.Module, rank: int, seed: int, saved: str | None) -> Any:
    """Add LoRA adapters (arXiv 2106.09685) to every linear layer of the language model; return the PeftModel.

    Everything else is frozen. A new adapter changes nothing, so the policy with its adapters switched off is the
    reference. saved: folder of adapters to continue training.
    """
    with loading("--lora_rank", str(rank)):
        import peft
    if saved:
        return peft.PeftModel.from_pretrained(model, saved, is_trainable=True)
    inside = set(language_model(model).modules())
    layers = [name for name, module in model.named_modules() if module in inside and isinstance(module, nn.Linear)]
    torch.manual_seed(seed)  # adapters are the only randomly initialized weights
    return peft.get_peft_model(model, peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=layers))
