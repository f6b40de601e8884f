"""Divide a model among the processes (--shard): PyTorch's FSDP2, called directly.

accelerate's own FSDP2 plugin becomes DDP without a word where there is no GPU to test it on.
"""

import contextlib
from collections.abc import Iterator

from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard


def shard(*models: nn.Module | None) -> None:
    """Divide the weights of each model among the processes, block by block: a block is gathered when it is needed.

    Gradients are summed, as `exchange_gradients` sums them for copies; FSDP would average.
    """
    for model in filter(None, models):
        for blocks in [module for module in model.modules() if isinstance(module, nn.ModuleList)]:
            for block in blocks:
                fully_shard(block)
        fully_shard(model)
        for part in parts(model):
            part.set_gradient_divide_factor(1.0)
            part.set_force_sum_reduction_for_comms(True)  # gloo knows no other way


def parts(model: nn.Module) -> list[FSDPModule]:
    """Return the modules that `shard` divided; none if it was not called."""
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


@contextlib.contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Gather all weights once for everything inside, not at every token, and without waiting for other processes."""
    for part in parts(model):
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    yield
    for part in parts(model):
        part.set_reshard_after_forward(True, recurse=False)
        part.reshard()
