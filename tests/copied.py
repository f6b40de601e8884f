"""The parts that the README says can be copied, copied: nothing of this project is imported, only what the table names.

    python tests/copied.py          # under any Python, torch and transformers; prints their versions when all agrees

test_readme.py runs it as it stands. Rewards come first, without torch; `--rewards` stops there.
"""

import ast
import functools
import importlib
import math
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
HEADER = """
import copy
from typing import Any, NamedTuple
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
"""
PARTS = {  # README's table: part -> names of virft.py, in an order in which they can be defined
    "advantages": ("group_advantages",),
    "loss": ("completion_mask", "NORMALIZATIONS", "kl_to_reference", "clipped_ratio", "RATIOS", "RATIO", "grpo_loss"),
    "shared prefix": (
        "Prefix", "prefill", "fork", "branch", "log_distribution",
        "FLOAT32_BLOCK", "token_logps",
    ),
}  # fmt: skip


@functools.cache
def definitions(file: Path) -> dict[str, str]:
    """Functions, classes and constants of a module: name -> source."""
    text = file.read_text(encoding="utf-8")
    found = {}
    for node in ast.parse(text).body:
        if isinstance(node, ast.Assign):
            found[ast.unparse(node.targets[0])] = ast.get_source_segment(text, node)
        elif isinstance(node, ast.AnnAssign):
            found[ast.unparse(node.target)] = ast.get_source_segment(text, node)
        elif hasattr(node, "name"):
            found[node.name] = ast.get_source_segment(text, node)
    return found


def copied(part: str, folder: Path):
    """A module of the part's lines and the header, and nothing else."""
    module, source = part.replace(" ", "_"), definitions(ROOT / "virft.py")
    text = "\n\n\n".join([HEADER.strip(), *(source[name] for name in PARTS[part])])
    (folder / f"{module}.py").write_text(text + "\n", encoding="utf-8")
    return importlib.import_module(module)


def check_rewards(rewards) -> None:
    box, text = (0.0, 0.0, 100.0, 50.0), "<think>a</think><answer>{}</answer>"
    half = text.format("[{'Position': [0, 0, 100, 40], 'Confidence': 0.75}]")
    assert rewards.iou_reward(half, [box]) == 0.8 and rewards.confidence_reward(half, [box]) == 0.75
    assert rewards.format_reward(half) == 1.0 and rewards.format_reward("<answer>a</answer>") == 0.0
    assert rewards.accuracy_reward(text.format("Tiger_Lily."), "tiger lily") == 1.0
    assert math.isclose(rewards.giou_reward(text.format("(0,0),(50,50)"), box), 1.5)


def check_advantages(part, torch) -> None:
    A = part.group_advantages(torch.tensor([[1.0, 2.0, 3.0], [0.5, 0.5, 0.5]]))
    assert torch.allclose(A, torch.tensor([[-1.0, 0.0, 1.0], [0.0, 0.0, 0.0]]), atol=2e-4)


def check_loss(part, torch) -> None:
    """Two completions of 2 and 1 tokens and an end, by the formula written out for numbers."""
    eos, ids = torch.tensor([9]), torch.tensor([[3, 4, 9, 9], [5, 9, 9, 9]])
    mask = part.completion_mask(ids, eos)
    assert mask.sum(1).tolist() == [3, 2]
    generator = torch.Generator().manual_seed(0)
    logp, old, ref = (-torch.rand(2, 4, generator=generator) * 2 for _ in range(3))
    A, low, high, beta, expected = [1.3, -0.7], 0.2, 0.3, 0.1, 0.0
    for i in range(2):
        terms = []
        for t in range(int(mask[i].sum())):
            p, o, r = (float(x[i, t]) for x in (logp, old, ref))
            rho = math.exp(p - o)
            surrogate = min(rho * A[i], max(min(rho, 1 + high), 1 - low) * A[i])
            terms.append(-surrogate + beta * (math.exp(r - p) - (r - p) - 1))
        expected += sum(terms) / len(terms) / 2
    weights, divisor = part.NORMALIZATIONS["grpo"](mask, 4)
    loss = part.grpo_loss(logp, old, ref, torch.tensor(A), mask, weights, (low, high), beta)[0] / divisor
    assert abs(float(loss) - expected) < 1e-5, (float(loss), expected)


def tiny_models(torch, transformers):
    """(name, model, inputs of two prompts, the first padded by three tokens): LLaVA and Qwen2-VL, random weights."""
    torch.manual_seed(0)
    text = {
        "vocab_size": 100, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 256, "initializer_range": 0.1,
    }  # fmt: skip
    vision = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16,
        "patch_size": 4,
    }  # fmt: skip
    llava = transformers.LlavaConfig(
        vision_config={"model_type": "clip_vision_model", **vision}, text_config={"model_type": "llama", **text},
        image_token_index=90,
    )  # fmt: skip
    words = torch.tensor([[0, 0, 0, 1, 2, 3], [4, 5, 6, 7, 8, 9]])
    mask = torch.tensor([[0, 0, 0, 1, 1, 1], [1, 1, 1, 1, 1, 1]])

    def prompts(image_tokens: int, **more) -> dict:
        ids = torch.cat([words, torch.full((2, image_tokens), 90), torch.tensor([[11, 12], [13, 14]])], 1)
        return {"input_ids": ids, "attention_mask": torch.cat([mask, torch.ones_like(ids[:, 6:])], 1), **more}

    yield "LLaVA", transformers.LlavaForConditionalGeneration(llava), prompts(16, pixel_values=torch.rand(2, 3, 16, 16))
    qwen = transformers.Qwen2VLConfig(
        **({} if "text_config" in transformers.Qwen2VLConfig.sub_configs else text),
        text_config=text, image_token_id=90, video_token_id=91, vision_start_token_id=92, vision_end_token_id=93,
        vision_config={"depth": 2, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "mlp_ratio": 2, "patch_size": 4},
    )  # fmt: skip
    text_config = qwen.get_text_config()
    name = "rope_parameters" if hasattr(text_config, "rope_parameters") else "rope_scaling"  # its older name
    setattr(
        text_config, name, {"type": "default", "rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4}
    )
    grids = torch.tensor([[1, 4, 4], [1, 4, 4]])
    inputs = prompts(4, pixel_values=torch.rand(32, 3 * 2 * 16), image_grid_thw=grids)
    inputs["mm_token_type_ids"] = (inputs["input_ids"] == 90).long()
    model = transformers.Qwen2VLForConditionalGeneration(qwen)
    yield "Qwen2-VL", model, inputs


def check_shared_prefix(part, torch, transformers) -> None:
    """Log-probabilities of two completions per prompt, and a gradient, as from the prompts repeated in one forward."""
    import inspect

    for name, model, inputs in tiny_models(torch, transformers):
        model.eval()
        if "mm_token_type_ids" not in inspect.signature(model.forward).parameters:
            inputs.pop("mm_token_type_ids", None)
        B, G, C, temperature, forbidden = 2, 2, 5, 1.0, torch.tensor([], dtype=torch.long)
        ids, rows = torch.arange(20, 20 + B * G * C).view(B * G, C), torch.arange(B).repeat_interleave(G)
        prefill, fork, branch, token_logps = part.prefill, part.fork, part.branch, part.token_logps
        # As the README has it:
        prefix = fork(prefill(model, inputs), torch.arange(B).repeat_interleave(G))
        first, _ = token_logps(prefix.logits[:, None], ids[:, :1], temperature, forbidden)
        rest, _ = token_logps(branch(model, prefix, ids[:, :-1]), ids[:, 1:], temperature, forbidden)
        logp = torch.cat([first, rest], 1)
        logp.sum().backward()
        gradient = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        whole = {}
        for key, x in inputs.items():
            whole[key] = x.view(2, -1, *x.shape[1:])[rows].flatten(0, 1)  # rows or patches of each prompt, repeated
        for key, more in (("input_ids", ids), ("attention_mask", ids > 0), ("mm_token_type_ids", ids < 0)):
            if key in whole:
                whole[key] = torch.cat([whole[key], more.long()], 1)
        plain = (
            model(**whole, use_cache=False).logits[:, -C - 1 : -1].log_softmax(-1).gather(-1, ids[..., None])[..., 0]
        )
        plain.sum().backward()
        assert (logp - plain).abs().max() < 1e-4, (name, (logp - plain).abs().max())
        for n, p in model.named_parameters():
            if p.grad is not None:
                scale = p.grad.abs().max() + 1e-3
                assert (p.grad - gradient[n]).abs().max() / scale < 1e-3, (name, n)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        sys.path[0] = folder  # not tests/, and nothing of the project
        (Path(folder) / "rewards.py").write_text((ROOT / "rewards.py").read_text(encoding="utf-8"), encoding="utf-8")
        check_rewards(importlib.import_module("rewards"))
        version = "Python %d.%d" % sys.version_info[:2]
        if "--rewards" in sys.argv:
            return print(f"{version}: rewards")
        import torch

        check_advantages(copied("advantages", Path(folder)), torch)
        check_loss(copied("loss", Path(folder)), torch)
        assert "transformers" not in sys.modules
        import transformers

        check_shared_prefix(copied("shared prefix", Path(folder)), torch, transformers)
        ours = {"virft", "data", "mia_dpo", "extras"} & sys.modules.keys()
        assert not ours, f"imported: {ours}"
        versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
        print(f"{version}, {versions}: rewards, {', '.join(PARTS)}")


if __name__ == "__main__":
    main()
