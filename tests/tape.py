"""Stand in for a CUDA graph: note a step's operations and repeat them on the same memory, without the step's code."""

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def reachable(thing, seen: set) -> Iterator[Tensor]:
    """Every tensor that a step can reach, but for those of the model."""
    if id(thing) in seen or isinstance(thing, torch.nn.Module):
        return
    seen.add(id(thing))
    if isinstance(thing, Tensor):
        yield thing
    elif callable(thing) and hasattr(thing, "__closure__"):
        for cell in thing.__closure__ or ():
            yield from reachable(cell.cell_contents, seen)
    elif isinstance(thing, dict):
        for value in thing.values():
            yield from reachable(value, seen)
    elif isinstance(thing, (list, tuple)):
        for value in thing:
            yield from reachable(value, seen)
    elif hasattr(thing, "__dict__"):
        yield from reachable(vars(thing), seen)


class Tape(TorchDispatchMode):
    """Note each operation with the memory that it reads and writes; `replay` repeats them there."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out

    def replay(self) -> None:
        # Autocast came before the operations were noted: its casts are among them.
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            for func, args, kwargs, out in self.calls:
                for old, new in zip(tree_leaves(out), tree_leaves(func(*args, **kwargs))):
                    if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                        old.copy_(new)


def record(step, recording=contextlib.nullcontext) -> Callable[[], None]:
    """Run a step once under `recording()` to note it, then restore every tensor that it changed and can be reached.

    Recording a CUDA graph runs nothing.
    """
    before = [(tensor, tensor.clone()) for tensor in reachable(step, set())]
    try:
        with recording(), Tape() as tape:
            step()
    finally:
        for tensor, value in before:
            if not torch.equal(tensor, value):
                tensor.copy_(value)
    return tape.replay
