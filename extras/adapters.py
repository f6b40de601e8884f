"""Train a part of the model: LoRA adapters (--lora_rank) or only the language model (--freeze_vision)."""

from typing import Any

import torch
from torch import Tensor, nn

from extras.hub import loading
from extras.shards import whole_weights


def language_model(model: nn.Module) -> nn.Module:
    """Return the language model: the module that directly contains the token embedding."""
    embedding = model.get_input_embeddings()
    return next(module for module in model.modules() if embedding in module.children())


def freeze_vision(model: nn.Module) -> None:
    """Freeze everything outside the language model and the output embedding: the vision tower and the projector."""
    kept = {id(p) for part in (language_model(model), model.get_output_embeddings()) for p in part.parameters()}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in kept)


def add(model: nn.Module, rank: int, seed: int, saved: str | None) -> Any:
    """Add LoRA adapters (arXiv 2106.09685) to every linear layer of the language model; return the PeftModel.

    Everything else is frozen. A new adapter changes nothing, so the policy with its adapters switched off is the
    reference. saved: folder of adapters to continue training.
    """
    with loading("--lora_rank", str(rank)):
        import peft
    if saved:
        # Read on the CPU: by default every process would read them on the first GPU.
        return peft.PeftModel.from_pretrained(model, saved, is_trainable=True, torch_device="cpu")
    inside = set(language_model(model).modules())
    layers = [name for name, module in model.named_modules() if module in inside and isinstance(module, nn.Linear)]
    torch.manual_seed(seed)  # adapters are the only randomly initialized weights
    return peft.get_peft_model(model, peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=layers))


def learned(adapters: Any, main: bool) -> dict[str, Tensor]:
    """Return the adapters' weights on the main process; with --shard every process must call this."""
    return whole_weights(adapters, main, only="lora_")


def merged(base: nn.Module, adapters: Any, weights: dict[str, Tensor]) -> nn.Module:
    """Add adapters with these weights to another copy of the model that they were trained on; return it."""
    import peft

    copy = peft.get_peft_model(base, adapters.peft_config["default"])
    peft.set_peft_model_state_dict(copy, peft.get_peft_model_state_dict(adapters, state_dict=weights))
    return copy.merge_and_unload()
