"""Count the operations of every phase and compare them with the minimum for a group of G completions.

    python bench/flops.py                            # the model of bench/vs_trl.py, (prompt, completion, G) as there

The minimum is one prompt and G completions. With h hidden size, f width of the MLP, k key width, L layers and V
vocabulary, a completion token costs 2 [L (2 h^2 + 2 h k + 3 h f) + h V] operations in matrices (a multiplication and an
addition each) and 2 L x 2 h x (number of tokens it attends to) in attention. The prompt with its image is one counted
forward.
Training costs three forwards. Attention is eager, because torch's counter counts no attention under SDPA on CPUs.
"""

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import virft  # noqa: E402

NONE = torch.tensor([], dtype=torch.long)


def count(run: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def completion_operations(config, prompt_tokens: int, completion_tokens: int, eager: bool) -> float:
    """Return the operations of the forward of one completion, which feeds all its tokens except the last.

    eager: True for a whole completion at once, where eager attention also multiplies masked pairs; False for token by
    token.
    """
    h, L, P, fed = config.hidden_size, config.num_hidden_layers, prompt_tokens, completion_tokens - 1
    k = config.num_key_value_heads * (h // config.num_attention_heads)
    matrices = L * (2 * h**2 + 2 * h * k + 3 * h * config.intermediate_size) + h * config.vocab_size
    pairs = fed * (P + fed) if eager else fed * P + fed * (fed + 1) / 2
    return 2 * (fed * matrices + L * 2 * h * pairs)


def phases(model, inputs: dict, G: int, C: int) -> dict[str, tuple[int, float, float]]:
    """Return {phase: (counted, minimum, minimum if the prompt is repeated per completion)} for one prompt.

    Switches the model to eager attention.
    """
    model.set_attn_implementation("eager")
    config, P = model.config.get_text_config(), inputs["input_ids"].shape[1]
    ids, rows = torch.arange(G * C).view(G, C) % 80, [torch.arange(G)]
    sampling = {"temperature": 1.0, "forbidden": NONE}
    no_end = torch.tensor([config.vocab_size])  # EOS is an id that no token has, so completions have full length

    def prompt(backward: bool) -> None:
        logits = model(**inputs, logits_to_keep=1).logits
        if backward:
            logits.sum().backward()

    def train() -> None:
        virft.two_stage_backward(model, inputs, ids, rows, lambda rows, logp, entropy: logp.sum(), **sampling)

    with torch.no_grad():
        noise = torch.rand(G, C, dtype=torch.float64)
        sampled = count(lambda: virft.sample(model, inputs, G, noise, C, no_end, **sampling))
        scored = count(lambda: virft.chunked_logps(model, inputs, ids, rows, **sampling))
        once = count(lambda: prompt(False))
    trained, both = count(train), count(lambda: prompt(True))
    tokens, whole = (completion_operations(config, P, C, eager) for eager in (False, True))
    return {
        "sample": (sampled, once + G * tokens, G * (once + tokens)),
        "reference": (scored, once + G * whole, G * (once + whole)),
        "train": (trained, both + 3 * G * whole, G * (both + 3 * whole)),
    }


def main() -> None:
    from bench import vs_trl

    print("| prompt, completion, G | phase | counted, GFLOP | / the least | repeated prompt / counted |")
    print("|---|---|---|---|---|")
    for side, C, G in ((224, 48, 8), (336, 64, 8), (336, 256, 8), (336, 512, 8)):
        with tempfile.TemporaryDirectory() as folder:
            vs_trl.write_model(Path(folder), side)
            model = virft.load_model(folder, torch.float32, torch.device("cpu"))
        image_id = model.config.image_token_id
        ids = torch.tensor([[*range(8), *[image_id] * (side // vs_trl.PATCH) ** 2, *range(7)]])
        prompt = {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "pixel_values": torch.rand(1, 3, side, side),
        }
        for name, (counted, least, repeated) in phases(model, prompt, G, C).items():
            row = (
                f"{ids.shape[1]}, {C}, {G}",
                name,
                f"{counted / 1e9:.1f}",
                f"{counted / least:.3f}",
                f"{repeated / counted:.1f}",
            )
            print("| " + " | ".join(row) + " |", flush=True)


if __name__ == "__main__":
    main()
