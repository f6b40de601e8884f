"""Make the tiny model that the offline demo starts from: demo/model.

    python demo/warm_start.py                        # about 40 minutes on two cores; the result is committed

A LLaVA-class model of a million parameters is taught, by plain supervised learning on freshly drawn
scenes, to answer the detection prompt of data.py: which shape is meant, whether there are none, one or
two, and roughly where. Its boxes are rough on purpose. No label it ever saw was right: each category has
a displacement and a scale of its own (TRANSFORMS), so that no single correction mends all, plus jitter.
What reinforcement learning finds out in the demo is therefore not in these labels.

The tokenizer knows the phrases of the prompt and of the answers, the numbers 0 to 1000 and the confidences
0.00 to 1.00 as whole tokens, which keeps sequences short, and falls back to bytes for everything else.
"""

import argparse
import json
import math
import random
import sys
import time
from pathlib import Path

import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    SiglipVisionConfig,
)
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from data import detection_answer, detection_prompt, round_box  # noqa: E402
from demo.shapes import CATEGORIES, COLORS, SHAPES, SIZE, draw_scene, random_scene  # noqa: E402
from rewards import box_iou  # noqa: E402

PATCH = 28
IMAGE_TOKENS = (SIZE // PATCH) ** 2
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] | upper }}: {% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}{% endfor %}\n{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT: {% endif %}"
)
JITTER = (0.01, 0.05)  # standard deviation of a corner in parts of the box's side, at the first and the last step


def make_transforms(seed: int = 7) -> dict[str, tuple[float, float, float, float]]:
    """Per category (dx, dy, sx, sy): displacement of the center in parts of the side, and scale of the sides.

    Drawn so that a transformed box overlaps its original by an IoU between 0.40 and 0.60, in as many directions as
    there are categories.
    """
    rng, transforms = random.Random(seed), {}
    for category in CATEGORIES:
        while True:
            dx, dy = (rng.uniform(-0.3, 0.3) for _ in range(2))
            sx, sy = (math.exp(rng.uniform(-0.45, 0.45)) for _ in range(2))
            if 0.40 < box_iou((0, 0, 1, 1), transform_box((0, 0, 1, 1), (dx, dy, sx, sy))) < 0.60:
                transforms[category] = (dx, dy, sx, sy)
                break
    return transforms


def transform_box(box, transform):
    """Move the center by (dx, dy) sides, then scale the sides by (sx, sy)."""
    x1, y1, x2, y2 = box
    dx, dy, sx, sy = transform
    width, height = x2 - x1, y2 - y1
    x, y = (x1 + x2) / 2 + dx * width, (y1 + y2) / 2 + dy * height
    return (x - sx * width / 2, y - sy * height / 2, x + sx * width / 2, y + sy * height / 2)


TRANSFORMS = make_transforms()


def prompt(category: str) -> str:
    return detection_prompt(category, (1000, 1000), "relative", True)


def rough_answer(category: str, boxes, jitter: float, rng: random.Random) -> str:
    """The completion that the warm start is taught: right in number and place, never exact."""
    rough = []
    for box in sorted(boxes):
        x1, y1, x2, y2 = transform_box([v * 1000 / SIZE for v in box], TRANSFORMS[category])
        dx, dy = jitter * (x2 - x1), jitter * (y2 - y1)
        corners = (x1 + rng.gauss(0, dx), y1 + rng.gauss(0, dy), x2 + rng.gauss(0, dx), y2 + rng.gauss(0, dy))
        rough.append(round_box([min(1000.0, max(0.0, v)) for v in corners]))
    confidences = [round(rng.uniform(0.5, 0.95), 2) for _ in rough]
    return f"<think>I see {len(boxes)} {category}.</think><answer>{detection_answer(rough, confidences)}</answer>"


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Whole phrases, numbers and confidences over single bytes: everything encodes, and decodes unchanged."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({symbol: i for i, symbol in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    mark = "\0"
    phrases = ["USER: ", "\nASSISTANT: ", *prompt(mark).split(mark), *CATEGORIES]
    phrases += [
        "<think>I see ",
        ".</think><answer>",
        "</answer>",
        "[{'Position': [",
        ", ",
        "], 'Confidence': ",
        "}, {'Position': [",
        "}]",
        "No Objects",
    ]
    phrases += [str(n) for n in range(1001)] + [str(round(c / 100, 2)) for c in range(101)]
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in ("<pad>", "</s>", "<image>")])
    tokenizer.add_tokens([AddedToken(p, normalized=False) for p in dict.fromkeys(phrases)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", padding_side="left",
        clean_up_tokenization_spaces=False, extra_special_tokens={"image_token": "<image>"},
    )  # fmt: skip


def make_processor() -> LlavaProcessor:
    return LlavaProcessor(
        image_processor=SiglipImageProcessorPil(size={"height": SIZE, "width": SIZE}),
        tokenizer=make_tokenizer(), patch_size=PATCH, vision_feature_select_strategy="full", chat_template=CHAT_TEMPLATE,
    )  # fmt: skip


def make_model(processor: LlavaProcessor, seed: int) -> LlavaForConditionalGeneration:
    torch.manual_seed(seed)
    tokenizer = processor.tokenizer
    vision = SiglipVisionConfig(
        hidden_size=64, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4, image_size=SIZE, patch_size=PATCH, vision_use_head=False,
    )  # fmt: skip
    text = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=192, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=1024, initializer_range=0.06, tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id, bos_token_id=None,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_id=tokenizer.convert_tokens_to_ids("<image>"), image_seq_length=IMAGE_TOKENS,
        vision_feature_layer=-1, vision_feature_select_strategy="full", tie_word_embeddings=True,
    )  # fmt: skip
    model = LlavaForConditionalGeneration(config)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = (
        tokenizer.eos_token_id,
        tokenizer.pad_token_id,
    )
    with torch.no_grad():
        # Neighboring positions and numbers start alike; without this the model learns where things are far more slowly.
        grid = torch.arange(SIZE // PATCH).float()
        rows, columns = waves(grid, 32, 2 * len(grid)), waves(grid, 32, 2 * len(grid))
        table = torch.cat([rows[:, None].expand(-1, len(grid), -1), columns[None].expand(len(grid), -1, -1)], -1)
        dict(model.named_parameters())["model.vision_tower.embeddings.position_embedding.weight"].copy_(
            0.5 * table.flatten(0, 1)
        )
        embedding = model.get_input_embeddings().weight
        number_ids = tokenizer.convert_tokens_to_ids([str(n) for n in range(1001)])
        embedding[number_ids] = 0.08 * waves(torch.arange(1001).float(), 128, 2000) + 0.1 * embedding[number_ids]
        parts = {name: 0.06 * torch.randn(128) for name in (*COLORS, *SHAPES)}
        for category in CATEGORIES:
            embedding[tokenizer.convert_tokens_to_ids(category)] = sum(parts[word] for word in category.split())
    return model


def waves(values: torch.Tensor, width: int, longest: float) -> torch.Tensor:
    """Sines and cosines of `values` in width / 2 geometric wavelengths from 2 to `longest`; [len(values), width]."""
    wavelengths = torch.logspace(
        math.log10(longest), math.log10(min(2.0 * longest, max(4.0, longest / 100))), width // 2
    )
    phases = 2 * math.pi * values[:, None] / wavelengths
    return torch.cat([phases.sin(), phases.cos()], 1)


def make_batch(processor, prompt_ids, size: int, jitter: float, rng: random.Random) -> dict[str, torch.Tensor]:
    """`size` fresh scenes with rough answers, right-padded; labels are -100 outside the answers."""
    pixels, answers, asked = [], [], []
    for _ in range(size):
        scene = random_scene(rng)
        present = [c for c, _ in scene]
        absent = rng.random() < 0.2
        category = rng.choice([c for c in CATEGORIES if c not in present] if absent else sorted(set(present)))
        pixels.append(np.asarray(draw_scene(scene, rng)))
        answers.append(rough_answer(category, [box for c, box in scene if c == category], jitter, rng))
        asked.append(category)
    answer_ids = [ids + [processor.tokenizer.eos_token_id] for ids in processor.tokenizer(answers)["input_ids"]]
    length = max(len(prompt_ids[c]) + len(ids) for c, ids in zip(asked, answer_ids))
    input_ids = torch.full((size, length), processor.tokenizer.pad_token_id)
    labels = torch.full((size, length), -100)
    for row, (category, ids) in enumerate(zip(asked, answer_ids)):
        start = len(prompt_ids[category])
        input_ids[row, : start + len(ids)] = torch.tensor(prompt_ids[category] + ids)
        labels[row, start : start + len(ids)] = torch.tensor(ids)
    return {"input_ids": input_ids, "pixel_values": to_pixel_values(pixels), "labels": labels}


def to_pixel_values(pixels: list[np.ndarray]) -> torch.Tensor:
    """What the processor makes of pictures of just this size, without its detours."""
    return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float() / 127.5 - 1.0


def make_prompt_ids(processor) -> dict[str, list[int]]:
    def rendered(category: str) -> str:
        messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt(category)}]}]
        return processor.apply_chat_template(messages, add_generation_prompt=True)

    expand = "<image>" * IMAGE_TOKENS
    return {c: processor.tokenizer(rendered(c).replace("<image>", expand))["input_ids"] for c in CATEGORIES}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "model")
    parser.add_argument("--steps", type=int, default=7000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    processor = make_processor()
    model = make_model(processor, args.seed)
    prompt_ids = make_prompt_ids(processor)
    size = sum(p.numel() for p in model.parameters())
    print(
        f"{size:,} parameters, vocabulary {len(processor.tokenizer)}, prompts of {len(prompt_ids[CATEGORIES[0]])} tokens"
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.98), weight_decay=0.01)
    warm_up = 200
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda s: (
            min(1.0, (s + 1) / warm_up) * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, s / args.steps))))
        ),
    )
    rng, start, smooth = random.Random(f"warm start {args.seed}"), time.time(), None
    for step in range(1, args.steps + 1):
        # Noise in the labels slows learning down; it is only needed in the end, as spread for the sampler.
        jitter = JITTER[0] + (JITTER[1] - JITTER[0]) * step / args.steps
        batch = make_batch(processor, prompt_ids, args.batch, jitter, rng)
        labels = batch.pop("labels")
        keep = labels.shape[1] - min(len(ids) for ids in prompt_ids.values()) + 1  # no logits for the prompt
        logits = model(**batch, logits_to_keep=keep).logits
        loss = torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), labels[:, -keep + 1 :].flatten(), ignore_index=-100
        )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        smooth = loss.item() if smooth is None else 0.98 * smooth + 0.02 * loss.item()
        if step % 250 == 0 or step == 1:
            print(f"step {step:5d}  loss {smooth:.4f}  {time.time() - start:6.0f} s", flush=True)
            model.save_pretrained(args.out)
    model.eval().save_pretrained(args.out)
    processor.save_pretrained(args.out)
    record = {
        "prompt": prompt("{category}"),
        "transforms": TRANSFORMS,
        "jitter": JITTER,
        "steps": args.steps,
        "batch": args.batch,
        "lr": args.lr,
        "seed": args.seed,
    }
    (args.out / "warm_start.json").write_text(json.dumps(record, indent=2) + "\n")
    print(f"saved {args.out} after {time.time() - start:.0f} s")


if __name__ == "__main__":
    main()
