"""Print a JSON line per family: how the pretended GPU differs from the CPU; with `flash`, flash-attn from SDPA.

test_pretended_gpu.py runs it and sets the environment.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402

import families  # noqa: E402
import virft  # noqa: E402
from extras import flash, graph, memory  # noqa: E402
from families import FORBIDDEN, TEMPERATURE, G  # noqa: E402

EOS = torch.arange(8, 24)  # of the words 0 to 79, so that rows end at different times
TOKENS = 24


def sampled(model, inputs: dict, device: str, **more) -> tuple[torch.Tensor, torch.Tensor]:
    noise, eos, forbidden = (x.to(device) for x in (virft.sampling_noise(["a", "b"], G, TOKENS), EOS, FORBIDDEN))
    with torch.no_grad():
        return virft.sample(model, inputs, G, noise, TOKENS, eos, TEMPERATURE, forbidden, **more)


def gradient(model, inputs: dict, ids: torch.Tensor, bf16: bool = False) -> torch.Tensor:
    weights = torch.randn(ids.shape, generator=torch.Generator().manual_seed(1)).to(ids.device)
    rows = torch.arange(len(ids), device=ids.device)
    chunks = rows.split(2) if virft.cache_is_differentiable(model) else [rows]
    distribution = {"temperature": TEMPERATURE, "forbidden": FORBIDDEN.to(ids.device)}
    model.zero_grad()
    with (
        torch.autocast(ids.device.type, torch.bfloat16, enabled=bf16),
        torch.autograd.set_multithreading_enabled(False),  # as `Run.backward`
    ):
        virft.two_stage_backward(
            model, inputs, ids, chunks, lambda rows, logp, _: (logp * weights[rows]).sum(), **distribution
        )
    return families.gradients(model).cpu()


def compare(name: str) -> dict:
    inputs, on_cpu, on_gpu = families.batch(families.prompts(name)), families.model(name), families.model(name).cuda()
    moved = {key: value.cuda() for key, value in inputs.items()}
    expected = sampled(on_cpu, inputs, "cpu")
    graphs = graph.Graphs(), graph.Graphs()
    ids, logp = sampled(on_gpu, moved, "cuda", capture=graphs[0].capture)
    with torch.autocast("cuda", torch.bfloat16):
        sampled(on_gpu, moved, "cuda", capture=graphs[1].capture)
    exact, found = gradient(on_cpu, inputs, expected[0]), gradient(on_gpu, moved, ids)
    bf16 = gradient(on_gpu, moved, ids, bf16=True)
    memory.checkpoint_vision(on_gpu)
    again = gradient(on_gpu, moved, ids, bf16=True)
    return {
        "name": name, "same tokens": torch.equal(ids.cpu(), expected[0]), "recorded": [g.works for g in graphs],
        "logp": float((logp.cpu() - expected[1]).abs().max()),
        "gradient": float((found - exact).norm() / exact.norm()), "bf16": float((bf16 - exact).norm() / exact.norm()),
        "checkpointed": float((again - bf16).norm() / bf16.norm()),
    }  # fmt: skip


def compare_flash(name: str) -> dict:
    import flash_attn  # packages/flash_attn.py

    prompts, model = families.prompts(name), families.model(name).cuda()
    inputs = {key: value.cuda() for key, value in families.batch(prompts).items()}
    if name in ("Idefics3", "SmolVLM"):  # families.py pads within a tile; their processor does not, nor can flash-attn
        inputs["pixel_attention_mask"].fill_(1)
    ids = families.completions(prompts).cuda()
    expected = [gradient(model, inputs, ids, bf16) for bf16 in (False, True)]
    flash.use(model, ids.device)
    found = [gradient(model, inputs, ids, bf16) for bf16 in (False, True)]
    differences = [float((a - b).norm() / b.norm()) for a, b in zip(found, expected)]
    return {"name": name, "calls": flash_attn.calls, "gradient": differences[0], "bf16": differences[1]}


if __name__ == "__main__":
    virft.LOOK_EVERY = 6  # so that ended rows are dropped, and the step is recorded again
    for name in families.FAMILIES:
        print(json.dumps(compare_flash(name) if sys.argv[1:] == ["flash"] else compare(name)), flush=True)
