"""Divide a model among the processes with PyTorch's FSDP2 (--shard).

`fully_shard` is called directly because accelerate's FSDP2 plugin silently falls back to DDP on CPUs, where it could
not be tested.
"""

import contextlib
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard


def shard(model: nn.Module, dtype: torch.dtype | None) -> None:
    """Divide the weights of a model among the processes, block by block; FSDP gathers a block when it is needed.

    Blocks are gathered and computed in `dtype` (None: float32), and gradients are reduced in float32. They are summed
    over processes, as `exchange_gradients` does without --shard; FSDP would average by default.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        raise SystemExit("--shard true: there is one process, and nothing to divide; launch several")
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32 if dtype else None)
    for blocks in [module for module in model.modules() if isinstance(module, nn.ModuleList)]:
        for block in blocks:
            fully_shard(block, mp_policy=policy)
    fully_shard(model, mp_policy=policy)
    for part in parts(model):
        part.set_gradient_divide_factor(1.0)
        part.set_force_sum_reduction_for_comms(True)  # gloo supports no other reduction
    # Let FSDP register now which parameters are trained. Otherwise it does so at the first forward, which may run with
    # the adapters switched off.
    fully_shard.state(model)._lazy_init()


def parts(model: nn.Module) -> list[FSDPModule]:
    """Return the modules that `shard` divided; an empty list without --shard."""
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def whole_weights(model: nn.Module, main: bool, only: str = "") -> dict[str, Tensor]:
    """Gather the weights on the main process, one tensor at a time; tied weights stay one tensor.

    Every process must call this. only: gather weights whose name contains this.
    """
    weights, written = {}, {}
    for name, tensor in model.state_dict().items():
        if only not in name:
            continue
        place = (tensor.to_local() if hasattr(tensor, "to_local") else tensor).data_ptr()
        whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
        if main:
            weights[name] = written.setdefault(place, whole.cpu())
    return weights


@contextlib.contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Gather all weights once for the whole block.

    Sampling then needs no gathering at every token, and processes do not wait for each other.
    """
    for part in parts(model):
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    yield
    for part in parts(model):
        part.set_reshard_after_forward(True, recurse=False)
        part.reshard()
