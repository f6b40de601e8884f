"""Train the tiny models that the offline demo starts from: demo/model and, from its weights, one per other family.

    python demo/warm_start.py                                    # demo/model: about 20 minutes on two cores
    python demo/warm_start.py detection --steps 7000 --out FULL  # the whole schedule; other families start from it
    python demo/warm_start.py classification --start FULL        # 3 to 5 minutes on one core, as is grounding
    python demo/warm_start.py multi-image                        # from demo/model_classification
    python demo/warm_start.py mia-dpo                            # from demo/model

The results are committed. Training of demo/model stops halfway through its schedule, with a learning rate that is still
high. As after pretraining, it can still improve at choosing and counting too, not only at what its labels got wrong.

A LLaVA-class model of a million parameters learns by plain supervised learning on freshly drawn scenes to answer the
prompts of a family (FAMILIES) in the right form. The labels are wrong on purpose, so what reinforcement learning finds
in the demo is not in them:

  detection        The labels tell which shape is meant, whether there are none, one or two, and roughly where. No box
                   is correct: each category has its own displacement and scale (TRANSFORMS), so that no single
                   correction fixes them all, and boxes are jittered.
  grounding        The label is one box, displaced as in detection.
  classification   The label is the name of the shape. Each category has its own wrong name, which replaces the right
                   one in a share of the labels (MISNAMED). This share is also specific to the category: from 20% to
                   80%, above 50% for half of the categories. A model that has learned these labels well names half of
                   all shapes wrongly when it decodes greedily, and half of its samples are wrong.
  multi-image      The label is the name of the shape in the first or second of two pictures. It always refers to the
                   picture asked about, but uses the wrong names of classification.
  mia-dpo          The label is the name of the shape in the one of several pictures that is asked about. If another
                   picture shows a shape of at least twice its area, it is mostly (DISTRACTED) the name of the largest.
                   Some labels (SLIPS) are any name. For a single picture the label is right except for the slips.

The tokenizer has whole tokens for the phrases of the prompt and of the answers, the numbers 0 to 1000 and the
confidences 0.00 to 1.00, which keeps sequences short. It falls back to bytes for everything else.
"""

import argparse
import functools
import hashlib
import json
import math
import random
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoProcessor,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    SiglipVisionConfig,
)
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from data import IMAGE_MARK, TASKS, content_of, detection_answer, grounding_answer, round_box  # noqa: E402
from demo.shapes import (  # noqa: E402
    CATEGORIES,
    COLORS,
    ORDINALS,
    SHAPES,
    SIZE,
    draw_scene,
    instruction,
    lone_scene,
    name_question,
    pair_question,
    random_scene,
    scene_to_point_at,
    scenes_to_tell_apart,
)
from extras.collages import LAYOUTS, grid_collage, multi_image_prompt  # noqa: E402
from rewards import box_iou  # noqa: E402

PATCH = 28
IMAGE_TOKENS = (SIZE // PATCH) ** 2
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] | upper }}: {% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}{% endfor %}\n{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT: {% endif %}"
)
JITTER = (0.01, 0.05)  # standard deviation of a corner relative to the box's side, at the first and the last step


def make_transforms(seed: int = 7) -> dict[str, tuple[float, float, float, float]]:
    """Draw (dx, dy, sx, sy) for each category: displacement of the center relative to the sides, and their scale.

    A transformed box has an IoU between 0.40 and 0.60 with its original. Each category is displaced differently.
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


def make_misnaming(seed: int = 7) -> dict[str, tuple[str, float]]:
    """Draw for each category a wrong name that no other category shares, and the share of labels that use it.

    The shares are 0.20, 0.25 ... 0.80 without 0.50, at which neither name has the majority.
    """
    rng = random.Random(seed)
    ring, percents = rng.sample(CATEGORIES, 12), rng.sample([p for p in range(20, 85, 5) if p != 50], 12)
    return {category: (ring[i - 1], percents[i] / 100) for i, category in enumerate(ring)}


DISTRACTED = 0.85  # share of labels that name the largest shape if it is at least twice as large as the asked one
SLIPS = 0.1  # share of the labels of mia-dpo that name a random shape, whether or not a picture shows it
MIA_LAYOUTS = ("sequence2", "sequence3", "grid4")
CELL = 56  # side of a grid cell in pixels; a collage is resized to SIZE anyway

TRANSFORMS = make_transforms()
MISNAMED = make_misnaming()


def task_question(task: str, asked: str) -> str:
    """Return the question that data.TASKS writes for this model."""
    return TASKS[task].prompt(asked, (1000, 1000), "relative", True)


def prompt(category: str) -> str:
    return task_question("coco", category)


def rough_box(category: str, box, jitter: float, rng: random.Random) -> tuple[int, int, int, int]:
    """Return the box of a label in 0..1000: displaced as its category is, and jittered."""
    x1, y1, x2, y2 = transform_box([v * 1000 / SIZE for v in box], TRANSFORMS[category])
    dx, dy = jitter * (x2 - x1), jitter * (y2 - y1)
    corners = (x1 + rng.gauss(0, dx), y1 + rng.gauss(0, dy), x2 + rng.gauss(0, dx), y2 + rng.gauss(0, dy))
    return round_box([min(1000.0, max(0.0, v)) for v in corners])


def rough_answer(category: str, boxes, jitter: float, rng: random.Random) -> str:
    """Return the completion of a label: the right number of boxes in roughly the right place, never exact."""
    rough = [rough_box(category, box, jitter, rng) for box in sorted(boxes)]
    confidences = [round(rng.uniform(0.5, 0.95), 2) for _ in rough]
    return completion(f"{len(boxes)} {category}", detection_answer(rough, confidences))


def completion(seen: str, answer: str) -> str:
    return f"<think>I see {seen}.</think><answer>{answer}</answer>"


# ------------------------------------------------------------------------------------------------
# The families. A lesson is a freshly drawn (pictures, question, completion).

Lesson = tuple[list[Image.Image], str, str]
ONE_SHAPE = "one shape"  # the thought when a name is asked for; it must not contain the name


def detection_lesson(rng: random.Random, jitter: float) -> Lesson:
    scene = random_scene(rng)
    present = [c for c, _ in scene]
    absent = rng.random() < 0.2
    category = rng.choice([c for c in CATEGORIES if c not in present] if absent else sorted(set(present)))
    picture = draw_scene(scene, rng)
    boxes = [box for c, box in scene if c == category]
    return [picture], prompt(category), rough_answer(category, boxes, jitter, rng)


def grounding_lesson(rng: random.Random, jitter: float) -> Lesson:
    scene, asked = scene_to_point_at(rng)
    category, box = scene[asked]
    answer = completion(f"1 {category}", grounding_answer(rough_box(category, box, jitter, rng)))
    return [draw_scene(scene, rng)], task_question("lisa", instruction(category)), answer


def classification_lesson(rng: random.Random, jitter: float) -> Lesson:
    scene = lone_scene(rng)
    answer = misnaming_answer(scene[0][0], rng)
    return [draw_scene(scene, rng)], task_question("flowers", ""), answer


def multi_image_lesson(rng: random.Random, jitter: float) -> Lesson:
    *scenes, asked = scenes_to_tell_apart(rng)
    pictures = [draw_scene(scene, rng) for scene in scenes]
    return pictures, pair_question(ORDINALS[asked]), misnaming_answer(scenes[asked][0][0], rng)


def mia_lesson(rng: random.Random, jitter: float) -> Lesson:
    layout = rng.choice((None, None, *MIA_LAYOUTS))
    if layout is None:
        scene = lone_scene(rng)
        return [draw_scene(scene, rng)], name_question(), slipping_answer(scene[0][0], rng)
    scenes = [lone_scene(rng) for _ in range(LAYOUTS[layout].images)]
    pictures = [draw_scene(scene, rng) for scene in scenes]
    asked = rng.randrange(len(scenes))
    if LAYOUTS[layout].kind == "grid":
        pictures = [grid_collage(pictures, CELL)[0].resize((SIZE, SIZE), Image.Resampling.BICUBIC)]
    names, areas = [scene[0][0] for scene in scenes], [(x2 - x1) * (y2 - y1) for ((_, (x1, y1, x2, y2)),) in scenes]
    distracted = max(areas) >= 2 * areas[asked] and rng.random() < DISTRACTED
    named = areas.index(max(areas)) if distracted else asked
    return pictures, mia_prompt(layout, asked + 1), slipping_answer(names[named], rng)


def mia_prompt(layout: str, number: int | str) -> str:
    return multi_image_prompt(LAYOUTS[layout], f"In Image {number}, ", name_question())


def slipping_answer(category: str, rng: random.Random) -> str:
    return f"<answer>{rng.choice(CATEGORIES) if rng.random() < SLIPS else category}</answer>"


def misnaming_answer(category: str, rng: random.Random) -> str:
    """Return a completion that names the shape; the name is wrong in the share of cases given by MISNAMED."""
    wrong, share = MISNAMED[category]
    return completion(ONE_SHAPE, wrong if rng.random() < share else category)


@dataclass(frozen=True)
class Family:
    """Define the warm start of one family.

    lesson   function (rng, jitter) -> Lesson
    folder   folder of the model, in demo/
    start    folder in demo/ whose weights and tokenizer training starts from; None: random weights
    steps    training steps
    schedule length of the schedule of learning rate and jitter, in steps; may exceed `steps`
    lr       peak learning rate
    prompt   function from what is asked about to the wording of the prompt
    asked    word for what is asked about
    phrases  additional phrases that become whole tokens
    flaw     what is wrong with the labels, for warm_start.json
    """

    lesson: Callable[[random.Random, float], Lesson]
    folder: str
    start: str | None
    steps: int
    schedule: int
    lr: float
    prompt: Callable[[str], str]
    asked: str = "category"
    phrases: tuple[str, ...] = ()
    flaw: dict[str, Any] = field(default_factory=dict)


DISPLACED = {"transforms": TRANSFORMS, "jitter": JITTER}
WRONG_NAMES = {"misnamed": MISNAMED}
FAMILIES = {
    "detection": Family(detection_lesson, "model", None, 3500, 7000, 2e-3, prompt, flaw=DISPLACED),
    "classification": Family(
        classification_lesson, "model_classification", "model", 1200, 1200, 1e-3,
        functools.partial(task_question, "flowers"), phrases=(ONE_SHAPE,), flaw=WRONG_NAMES,
    ),
    "grounding": Family(
        grounding_lesson, "model_grounding", "model", 1200, 1200, 1e-3,
        lambda mark: task_question("lisa", instruction(mark)), phrases=("),(",), flaw=DISPLACED,
    ),
    "multi-image": Family(
        multi_image_lesson, "model_multi_image", "model_classification", 1000, 1000, 1e-3, pair_question, "ordinal",
        phrases=ORDINALS, flaw=WRONG_NAMES,
    ),
    "mia-dpo": Family(
        mia_lesson, "model_mia_dpo", "model", 3000, 3000, 1e-3, functools.partial(mia_prompt, "sequence3"), "number",
        phrases=(name_question(), "w" + name_question()[1:], "<answer>", *(f"\nIn Image {i}, " for i in range(1, 5))),
        flaw={"distracted": DISTRACTED, "slips": SLIPS},
    ),
}  # fmt: skip


# ------------------------------------------------------------------------------------------------
# Tokenizer and model.


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Build a tokenizer of phrases, numbers, confidences and single bytes; any text decodes to itself."""
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
        tokenizer=make_tokenizer(), patch_size=PATCH, vision_feature_select_strategy="full",
        chat_template=CHAT_TEMPLATE,
    )  # fmt: skip


def continue_from(start: Path, family: Family, seed: int) -> tuple[LlavaProcessor, LlavaForConditionalGeneration]:
    """Load processor and model of a folder, and add the phrases of another family to the tokenizer."""
    processor = AutoProcessor.from_pretrained(start)
    model = LlavaForConditionalGeneration.from_pretrained(start)
    phrases = [piece for part in family.prompt("\0").split("\0") for piece in part.split(IMAGE_MARK)]
    phrases = dict.fromkeys([*filter(None, phrases), *family.phrases])
    processor.tokenizer.add_tokens([AddedToken(p, normalized=False) for p in phrases])
    torch.manual_seed(seed)
    model.resize_token_embeddings(len(processor.tokenizer), mean_resizing=False)
    return processor, model


def make_model(processor: LlavaProcessor, seed: int) -> LlavaForConditionalGeneration:
    torch.manual_seed(seed)
    tokenizer = processor.tokenizer
    vision = SiglipVisionConfig(
        hidden_size=64, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4, image_size=SIZE,
        patch_size=PATCH, vision_use_head=False,
    )  # fmt: skip
    text = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=192, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=1024, initializer_range=0.06, tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id, bos_token_id=None,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=IMAGE_TOKENS, vision_feature_layer=-1, vision_feature_select_strategy="full",
        tie_word_embeddings=True,
    )  # fmt: skip
    model = LlavaForConditionalGeneration(config)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = (
        tokenizer.eos_token_id,
        tokenizer.pad_token_id,
    )
    with torch.no_grad():
        # Start with similar embeddings for neighboring positions and numbers: localization is learned much faster.
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
    """Return sines and cosines of `values` [len(values), width] for width / 2 geometrically spaced wavelengths.

    Wavelengths run from `longest` down to longest / 100, but not below 4.
    """
    wavelengths = torch.logspace(
        math.log10(longest), math.log10(min(2.0 * longest, max(4.0, longest / 100))), width // 2
    )
    phases = 2 * math.pi * values[:, None] / wavelengths
    return torch.cat([phases.sin(), phases.cos()], 1)


# ------------------------------------------------------------------------------------------------
# Teaching.


def make_batch(processor, prompt_ids, lessons: list[Lesson]) -> dict[str, torch.Tensor]:
    """Convert lessons to the model's inputs, right-padded; labels are -100 outside the answers."""
    pictures, questions, answers = zip(*lessons)
    starts = [prompt_ids(question, len(shown)) for question, shown in zip(questions, pictures)]
    answer_ids = [ids + [processor.tokenizer.eos_token_id] for ids in processor.tokenizer(list(answers))["input_ids"]]
    length = max(len(start) + len(ids) for start, ids in zip(starts, answer_ids))
    input_ids = torch.full((len(lessons), length), processor.tokenizer.pad_token_id)
    labels = torch.full((len(lessons), length), -100)
    for row, (start, ids) in enumerate(zip(starts, answer_ids)):
        input_ids[row, : len(start) + len(ids)] = torch.tensor(start + ids)
        labels[row, len(start) : len(start) + len(ids)] = torch.tensor(ids)
    pixels = [np.asarray(picture) for shown in pictures for picture in shown]
    return {"input_ids": input_ids, "pixel_values": to_pixel_values(pixels), "labels": labels}


def to_pixel_values(pixels: list[np.ndarray]) -> torch.Tensor:
    """Return what the processor makes of pictures of exactly this size, but faster."""
    return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float() / 127.5 - 1.0


def make_prompt_ids(processor) -> Callable[[str, int], list[int]]:
    """Return a cached function prompt_ids(question, number of pictures) that returns the processor's token ids."""

    @functools.cache
    def prompt_ids(question: str, pictures: int) -> list[int]:
        messages = [{"role": "user", "content": content_of(question, pictures)}]
        rendered = processor.apply_chat_template(messages, add_generation_prompt=True)
        return processor.tokenizer(rendered.replace("<image>", "<image>" * IMAGE_TOKENS))["input_ids"]

    return prompt_ids


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("family", nargs="?", choices=FAMILIES, default="detection")
    parser.add_argument("--out", type=Path, help="default: the committed folder")
    parser.add_argument("--start", type=Path, help="model to start from; default: the family's, as committed")
    parser.add_argument("--steps", type=int, help="default: the family's")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, help="default: the family's")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    family, committed = FAMILIES[args.family], Path(__file__).parent
    args.out = args.out or committed / family.folder
    args.steps = args.steps or family.steps
    scheduled = max(args.steps, family.schedule)
    args.lr = args.lr or family.lr

    started_from = {}
    if family.start is None:
        processor = make_processor()
        model = make_model(processor, args.seed)
    else:
        start = args.start or committed / family.start
        processor, model = continue_from(start, family, args.seed)
        weights = (start / "model.safetensors").read_bytes()
        started_from = {"started_from": start.name, "sha256": hashlib.sha256(weights).hexdigest()}
    prompt_ids = make_prompt_ids(processor)
    size = sum(p.numel() for p in model.parameters())
    print(f"{size:,} parameters, vocabulary {len(processor.tokenizer)}")
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.98), weight_decay=0.01)
    warm_up = 200
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda s: min(1.0, (s + 1) / warm_up) * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, s / scheduled)))),
    )
    rng, began, smooth = random.Random(f"warm start {args.seed}"), time.time(), None
    for step in range(1, args.steps + 1):
        # Noise in the labels slows learning; it is only needed at the end, so that samples of the model differ.
        jitter = JITTER[0] + (JITTER[1] - JITTER[0]) * step / scheduled
        batch = make_batch(processor, prompt_ids, [family.lesson(rng, jitter) for _ in range(args.batch)])
        labels = batch.pop("labels")
        keep = labels.shape[1] - int((labels >= 0).any(0).int().argmax()) + 1  # no logits for the prompt
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
            print(f"step {step:5d}  loss {smooth:.4f}  {time.time() - began:6.0f} s", flush=True)
            model.save_pretrained(args.out)
    model.eval().save_pretrained(args.out)
    processor.save_pretrained(args.out)
    record = {
        "prompt": family.prompt(f"{{{family.asked}}}"),
        **family.flaw,
        **started_from,
        "steps": args.steps,
        "schedule": scheduled,
        "batch": args.batch,
        "lr": args.lr,
        "seed": args.seed,
    }
    (args.out / "warm_start.json").write_text(json.dumps(record, indent=2) + "\n")
    print(f"saved {args.out} after {time.time() - began:.0f} s")


if __name__ == "__main__":
    main()
