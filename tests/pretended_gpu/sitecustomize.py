"""Give a Python process a pretended GPU: PYTHONPATH has this folder, PRETENDED_GPU the library made of device.cpp.

Python imports a module of this name when it starts. The library must be loaded before torch asks which devices there
are; then functions of torch.cuda that would need CUDA, and collectives that would need NCCL, are replaced.
"""

import contextlib
import ctypes
import os
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

ctypes.CDLL(os.environ["PRETENDED_GPU"], ctypes.RTLD_GLOBAL)

import torch  # noqa: E402
import torch._dynamo.trace_rules  # noqa: E402
import torch.cuda.amp.common  # noqa: E402
import torch.distributed as dist  # noqa: E402
import torch.distributed._functional_collectives  # noqa: E402
import torch.distributed.tensor  # noqa: E402

torch._dynamo.trace_rules.get_torch_obj_rule_map()  # its table lists the original functions
sys.path[1:1] = [str(Path(__file__).resolve().parents[n]) for n in (1, 2)]  # for extras and tape
from extras import graph  # noqa: E402
from tape import record  # noqa: E402

GPU = torch.ops.pretended_gpu
BYTES = 80 * 2**30


def nothing(*args, **kwargs) -> None:
    pass


def constant(value):
    return lambda *args, **kwargs: value


class Stream:
    priority = stream_id = 0
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    wait_stream = wait_event = synchronize = record_event = __exit__ = nothing

    def __init__(self, *args, **kwargs):
        pass

    def __enter__(self):
        return self


class Event:
    record = wait = synchronize = nothing

    def __init__(self, *args, **kwargs):
        pass


properties = SimpleNamespace(total_memory=BYTES, name="a pretended GPU", major=9, minor=0, uuid="0")
nothings = (
    "_lazy_init set_device synchronize empty_cache manual_seed manual_seed_all set_rng_state set_rng_state_all"
    " set_stream reset_peak_memory_stats"
)
replaced = dict.fromkeys(nothings.split(), nothing) | {
    "is_available": constant(True),
    "is_initialized": constant(True),
    "is_bf16_supported": constant(True),
    "is_current_stream_capturing": constant(False),
    "_is_in_bad_fork": constant(False),
    "device_count": constant(int(os.environ.get("PRETENDED_GPUS", "1"))),
    "current_device": constant(Stream.device.index),
    "get_device_properties": constant(properties),
    "get_device_capability": constant((properties.major, properties.minor)),
    "get_device_name": constant(properties.name),
    "mem_get_info": constant((BYTES, BYTES)),
    "max_memory_allocated": constant(2**30),
    "memory_allocated": constant(2**30),
    "get_rng_state": constant(torch.zeros(8, dtype=torch.uint8)),
    "get_rng_state_all": constant([]),
    "Stream": Stream,
    "Event": Event,
    "current_stream": Stream,
    "default_stream": Stream,
    "stream": constant(contextlib.nullcontext()),
}
for name, value in replaced.items():
    setattr(torch.cuda, name, value)
torch.cuda.amp.common.amp_definitely_not_available = constant(False)
torch.Tensor.record_stream = nothing
torch._C._cuda_getCurrentRawStream = constant(0)  # for bitsandbytes, which peft imports


def resize_(storage, bytes: int, original=torch.UntypedStorage.resize_):
    if storage.device.type == "cpu":
        return original(storage, bytes)
    GPU.resize_storage(torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage, 0, (0,), (1,)), bytes)
    return storage


torch.UntypedStorage.resize_ = resize_


# A CUDA graph: operations that would wait for the GPU are refused while it is recorded.


@contextlib.contextmanager
def recording():
    GPU.record(True)
    try:
        yield
    finally:
        GPU.record(False)


def recorded(step):
    print("a step is recorded", file=sys.stderr)
    return record(step, recording)


graph.Graphs.__init__.__defaults__ = (recorded,)  # in place of torch.cuda.graph

# Collectives run by gloo on the CPU's view of the same memory. Like NCCL they refuse the CPU's tensors, but not within
# the collectives of objects, where torch itself would move the pickled bytes to the GPU.

depth = 0  # how many collectives are running, one calling the other; above 0 the CPU's tensors are allowed


def on_cpu(value):
    if isinstance(value, torch.Tensor):
        if not value.is_cuda and not depth:
            raise RuntimeError("No backend type associated with device type cpu")
        return GPU.on_cpu(value.detach()) if value.is_cuda else value
    return [on_cpu(x) for x in value] if isinstance(value, list) else value


def collective(function, *args, device_ids=None, **kwargs):  # device_ids: a barrier's, which gloo refuses
    return nested(function, *map(on_cpu, args), **{name: on_cpu(value) for name, value in kwargs.items()})


def nested(function, *args, **kwargs):
    global depth
    depth += 1
    try:
        return function(*args, **kwargs)
    finally:
        depth -= 1


def by_gloo(function, *args, backend=None, device_id=None, **kwargs):
    return function("gloo", **kwargs)


names = ("all_reduce", "all_gather", "all_gather_into_tensor", "all_gather_single", "reduce_scatter_tensor",
         "reduce_scatter_single", "broadcast", "reduce", "scatter", "gather", "barrier")  # fmt: skip
wrapped = {getattr(dist, name): partial(collective, getattr(dist, name)) for name in names}
names = ("all_gather_object", "broadcast_object_list", "gather_object", "scatter_object_list")
wrapped |= {getattr(dist, name): partial(nested, getattr(dist, name)) for name in names}
wrapped[dist.init_process_group] = partial(by_gloo, dist.init_process_group)
for module in [m for name, m in sys.modules.items() if name.startswith("torch.distributed")]:
    for name, value in list(vars(module).items()):
        if callable(value) and value.__hash__ and value in wrapped:
            setattr(module, name, wrapped[value])
dist.is_nccl_available = constant(True)

functional = torch.ops._c10d_functional
library = torch.library.Library("_c10d_functional", "IMPL")


def functional_collective(name: str, tensor: torch.Tensor, *rest) -> torch.Tensor:
    return functional.wait_tensor(getattr(functional, name)(on_cpu(tensor.contiguous()), *rest)).to(tensor.device)


for name in ("all_reduce", "all_gather_into_tensor", "reduce_scatter_tensor"):
    library.impl(name, partial(functional_collective, name), "CUDA", allow_override=True)
library.impl("wait_tensor", torch.clone, "CUDA", allow_override=True)
