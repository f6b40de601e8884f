"""Record the sampler's decode step as a CUDA graph.

A decode step launches more than a thousand small kernels. Launched one by one they take longer than they compute; a
graph launches all at once. It repeats the same kernels on the same memory, so a step can be recorded only if its
shapes are fixed, its changes are in place, and it never waits for the GPU. virft.sample is written that way.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from tqdm import tqdm

EAGER_STEPS = 3  # before recording: libraries allocate memory, and autocast casts the weights
# Largest distance of a replayed step from the step itself, relative to the norm. The same kernels differ by nothing; a
# number or an address that the recording froze changes logits altogether.
CLOSE = 1e-2

Step = Callable[[], None]


def record(step: Step) -> Step:
    """Record a step as a CUDA graph, without running it; return the function that runs the graph."""
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    try:
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # other threads may copy images to the GPU
            step()
    except RuntimeError as error:
        torch.cuda.set_stream(stream)  # a failed capture does not leave its own
        raise RuntimeError(str(error.__context__ or error)) from None  # the context says which operation failed
    return graph.replay


class Written(TorchDispatchMode):
    """Collect the state that a step hands to the next one: tensors that existed before it and that it changes in place.

    Keys and values need no restoring and are left out: index_copy_ writes them, and a step that is taken again
    overwrites the same place.
    """

    def __init__(self):
        super().__init__()
        self.tensors: list[Tensor] = []
        self.made: set[int] = set()  # addresses of the memory that the step allocated itself

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        given = memory((args, kwargs))
        out = func(*args, **(kwargs or {}))
        for argument, value in zip(func._schema.arguments, args):
            if argument.alias_info is not None and argument.alias_info.is_write:
                new = memory(value).isdisjoint(self.made) and all(value is not x for x in self.tensors)
                if new and func is not torch.ops.aten.index_copy_.default:
                    self.tensors.append(value)
        self.made |= memory(out) - given  # a view of what was given is not new
        return out


def memory(values: Any) -> set[int]:
    """Return the addresses of the memory of all tensors in nested tuples, lists and dicts."""
    return {x.untyped_storage().data_ptr() for x in tree_leaves(values) if isinstance(x, Tensor)}


class Graphs:
    """Hand out recorded steps. The first replay of each is compared with the step itself; if one differs or cannot be
    recorded, say so once and stay eager.
    """

    def __init__(self, record: Callable[[Step], Step] = record):
        self.record, self.works = record, True

    def capture(self, step: Step) -> Step:
        """Return a function that runs the step itself EAGER_STEPS + 1 times and replays the recording from then on."""
        taken, replay, written = 0, None, Written()

        def advance() -> None:
            nonlocal taken, replay
            taken += 1
            if replay:
                replay()
            elif taken == EAGER_STEPS and self.works:
                with written:
                    step()
            elif taken > EAGER_STEPS and self.works:
                replay = self.compared(step, written.tensors)
            else:
                step()

        return advance

    def compared(self, step: Step, state: list[Tensor]) -> Step | None:
        """Take one step by replay, undo it, and take it again eagerly; return the replay if both agree.

        The result of the eager step is kept. Recording and the eager step each run the step's Python code once, so a
        Python number that changes with every run differs between the two, and the comparison finds it.
        """
        try:
            replay = self.record(step)
        except RuntimeError as error:  # nothing has been computed
            step()
            return self.stay_eager(f"cannot be recorded: {str(error).splitlines()[0]}")
        before = [x.clone() for x in state]
        replay()
        replayed = [x.clone() for x in state]
        for x, value in zip(state, before):
            x.copy_(value)
        step()
        return replay if all(map(agree, replayed, state)) else self.stay_eager("differs from the step itself")

    def stay_eager(self, flaw: str) -> None:
        self.works = False
        tqdm.write(f"the decode step as a CUDA graph {flaw}; sampling goes on step by step, which is slower")


def agree(replayed: Tensor, eager: Tensor) -> bool:
    """Compare integers exactly, because both drew the token from the same logits, and other numbers within CLOSE."""
    if not eager.is_floating_point():
        return torch.equal(replayed, eager)
    return bool((replayed - eager).float().norm() <= CLOSE * eager.float().norm())
