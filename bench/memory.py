"""Compute by a formula how much GPU memory a run needs; no GPU is needed or used.

    python bench/memory.py                           # the README's table

Bytes at the peak of the training pass, with T trained and F frozen parameters on each of n processes:

    states        16 T (float32 weight, gradient, two moments) + 2 F (bf16; with --shard float32, 4 F)
                  + 2 R (reference, bf16); with --shard all of it / n
    casts         2 T, the bf16 copies of trained matrices that autocast makes and the backward pass keeps
    prompt        activations of P tokens and, if the vision tower is trained, of its patches, see below
    completions   m x C tokens, m = --micro_batch or all G x prompts_per_forward: activations, logits and their
                  gradient (4 V per token), and the forked cache, 4 k L per token of (2 P + C)
    log-softmax   a few float32 blocks of 2^25 numbers, whatever the length: 0.5 GB

Activations that autograd keeps, counted on Qwen2-VL layers under bf16 autocast (tests/test_scale.py checks the count):
37 h + 8 f bytes per token and text layer (h hidden size, f width of the MLP), 47 d per patch and vision block (d width
of the vision tower). A frozen vision tower keeps none. V is the vocabulary, k the key width over all heads and L the
number of text layers. With --shard, each process first loads the whole model and reads one prompt with it. For
sampling, each process gathers all weights of one model and their bf16 copies, 6 T.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from virft import FLOAT32_BLOCK  # noqa: E402

TEXT_H, TEXT_F, VISION_D = 37, 8, 47
LOG_SOFTMAX = 4 * 4 * FLOAT32_BLOCK
GB = 1e9


@dataclass(frozen=True)
class Shape:
    """Hold the sizes of a model that the formula needs: parameters, text sizes, vision sizes."""

    name: str
    parameters: float
    vision_parameters: float
    layers: int
    hidden: int
    mlp: int
    kv: int  # key width over all heads
    vocabulary: int
    blocks: int
    vision_width: int


SHAPES = (
    Shape("Qwen2-VL-2B", 2.21e9, 0.67e9, 28, 1536, 8960, 256, 151_936, 32, 1280),
    Shape("Qwen2.5-VL-3B", 3.75e9, 0.67e9, 36, 2048, 11_008, 256, 151_936, 32, 1280),
    Shape("Qwen2-VL-7B", 8.29e9, 0.68e9, 28, 3584, 18_944, 512, 152_064, 32, 1280),
)


def text_activations(shape: Shape, tokens: int) -> float:
    return tokens * shape.layers * (TEXT_H * shape.hidden + TEXT_F * shape.mlp)


def gigabytes(
    shape: Shape, G: int, C: int, micro_batch: int = 0, lora: float = 0.0, freeze_vision: bool = False,
    beta: float = 0.04, processes: int = 1, shard: bool = False, max_pixels: int = 401_408,
) -> float:  # fmt: skip
    """Return the peak of one training forward and backward with one prompt, in GB.

    lora: number of parameters of the adapters, 0 for none.
    """
    trained = lora or shape.parameters - (shape.vision_parameters if freeze_vision else 0)
    frozen = shape.parameters + lora - trained
    reference = shape.parameters if beta and not lora else 0
    n = processes if shard else 1
    states = (16 * trained + (4 if shard else 2) * frozen + 2 * reference) / n
    gathered = (4 + 2) * trained if shard else 0  # float32 weights and their bf16 copies
    patches = max_pixels // 14**2
    prompt_tokens = patches // 4 + 110  # our detection prompt has about 110 tokens of text
    prompt = text_activations(shape, prompt_tokens)
    if not (lora or freeze_vision):
        prompt += patches * shape.blocks * VISION_D * shape.vision_width
    rows = min(micro_batch or G, G)
    completions = rows * (
        text_activations(shape, C) + 4 * shape.vocabulary * C + 4 * shape.kv * shape.layers * (2 * prompt_tokens + C)
    )
    whole = 4 * (trained + frozen) + prompt if shard else 0  # loading, before the model is divided
    return (max(states + 2 * trained + prompt + completions, states + gathered, whole) + LOG_SOFTMAX) / GB


ROWS = (
    (0, 8, 256, {}, ""),
    (0, 8, 512, {}, ""),
    (0, 8, 512, {"micro_batch": 2}, "--micro_batch 2"),
    (
        0, 8, 512, {"micro_batch": 2, "freeze_vision": True, "beta": 0.0},
        "--micro_batch 2 --freeze_vision true --beta 0",
    ),
    (0, 8, 512, {"micro_batch": 2, "lora": 18e6}, "--micro_batch 2 --lora_rank 16"),
    (1, 8, 512, {"micro_batch": 2}, "--micro_batch 2"),
    (2, 4, 512, {"micro_batch": 1, "shard": True, "processes": 8}, "--micro_batch 1 --shard true, 8 processes"),
    (
        2, 8, 256, {"micro_batch": 1, "lora": 40e6, "max_pixels": 200_704},
        "--micro_batch 1 --lora_rank 16 --max_pixels 200704",
    ),
)  # fmt: skip


def main() -> None:
    print("| model | G | completion | flags | GB per GPU |\n|---|---|---|---|---|")
    for index, G, C, settings, flags in ROWS:
        shape = SHAPES[index]
        print(f"| {shape.name} | {G} | {C} | `{flags or '(defaults)'}` | {gigabytes(shape, G, C, **settings):.0f} |")


if __name__ == "__main__":
    main()
