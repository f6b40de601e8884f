"""MIA-DPO: preference pairs from a model's own confusion of images, and DPO on them.

MIA-DPO (arXiv 2410.17637) teaches a vision-language model to answer about the right one of several images, without
annotation. Questions about single images, whose answers are known, are put among other images; what the model says
while it looks at the wrong image becomes the answer to avoid.

  1. q          put a question's image among others: a sequence, a grid, a picture in a picture; say which is meant
  2. o          sample the model's answer
  3. a_k        measure the attention of o to image k, averaged over heads and tokens, in a middle layer
  4. select     if a_target / sum_k a_k is low and o is wrong: rejected = o, chosen = the known answer (attention-aware
                selection); drop outliers of perplexity, length and edit distance (post-selection)
  5. margin     beta (log pi_theta / pi_ref (chosen | q) - log pi_theta / pi_ref (rejected | q))
  6. loss       -log sigmoid(margin) + gamma * cross-entropy of chosen

`build` does items 1 to 4, `train` items 5 and 6:

    accelerate launch mia_dpo.py build --task rows --data rows.jsonl --model NAME --out pairs.jsonl
    accelerate launch mia_dpo.py train --pairs pairs.jsonl --model NAME --out runs/mia_dpo
    bash run.sh demo mia-dpo                                        # offline demo, no GPU

The bricks and the loop are those of virft.py: the chosen and the rejected answer to one prompt are a group of two, and
the prompt is encoded once.

What differs from the paper and its released code, and why:

  - The attention is that of the positions which predict the answer's tokens (the first is the prompt's last token):
    there an answer is chosen. The attention of the answer's last token decides nothing.
  - No noise is put on the target image before the answer is sampled; the paper knows none, the released code does.
  - The paper names a length ratio and an edit distance without their limits; ours are flags of BuildConfig.
  - A share of attention equal to the limit counts as low in every layout; the released code says < for collages.
  - By default all weights are trained at lr 5e-6; the released script takes --lora_rank 128 --lr 5e-5 --gamma 0
    --epochs 1.

Shapes in comments as in virft.py; K images or regions, T image tokens of a prompt.
"""

import contextlib
import functools
import json
import math
import os
import random
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from accelerate.utils import broadcast_object_list, gather_object
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

import data
from data import IMAGE_MARK, TASKS, DataError, Example, Prompt, Prompts, Task, extra
from extras.adapters import language_model
from extras.evaluate import read_predictions
from extras.report import draw_pair, plot_curves
from rewards import Box, parse_answer, reward_weights
from virft import (  # of the algorithm
    MicroBatch, branch, completion_mask, fork, log_distribution, optimizer_step, prefill, sample, sampling_noise,
)  # fmt: skip
from virft import (  # of settings, loading and the loop
    Averages, Config, Run, build as build_run, connect, due, guarded, load_processor, obey, open_out, out_rule,
    parse, save_model, setting, write,
)  # fmt: skip


def as_in_virft(name: str, default: Any = None, heading: str | None = None) -> Any:
    """Declare a setting that virft.Config has too, with another default if one is given."""
    (known,) = (f for f in fields(Config) if f.name == name)
    default = getattr(Config(), name) if default is None else default
    return setting(default, known.metadata["help"], heading, **known.metadata["rules"])


class Layout(NamedTuple):
    """A way to put an image among others. `limit`: an answer that pays its image at most this share is a candidate."""

    kind: str  # sequence, grid or pip
    images: int
    limit: float


LAYOUTS = {
    **{f"sequence{n}": Layout("sequence", n, limit) for n, limit in ((2, 0.8), (3, 0.7), (4, 0.6), (5, 0.6))},
    **{f"grid{n}": Layout("grid", n, limit) for n, limit in ((2, 0.7), (3, 0.6), (4, 0.5), (6, 0.4), (9, 0.3))},
    "pip": Layout("pip", 2, 0.8),
}
# The published 15.1k, 9.3k and 4.5k pairs; sequences are mostly of two.
PUBLISHED_MIX = [
    "sequence2=9.1",
    *(f"sequence{n}=2" for n in (3, 4, 5)),
    *(f"grid{n}=1.86" for n in (2, 3, 4, 6, 9)),
    "pip=4.5",
]


@dataclass
class BuildConfig:
    """Hold every setting of `build`."""

    task: str = setting("captions", "COCO's captions, or a task of virft.py", "Questions", choices=("captions", *TASKS))
    data: str | None = setting(None, "dataset folder or file of questions about single images")
    categories: str | None = as_in_virft("categories")
    shots: int | None = as_in_virft("shots")
    limit: int | None = setting(None, "this many questions, chosen by seed; default: one about every example", least=1)
    skip_bad_images: bool = as_in_virft("skip_bad_images")
    layouts: list[str] = setting(PUBLISHED_MIX, f"layouts and weights, such as grid4=1; of {', '.join(LAYOUTS)}")
    cell: int = setting(448, "side of a grid's cells in pixels; their margin is 40/448 of it", least=1)
    out: str = setting("pairs.jsonl", "file for the pairs; the folder of this name gets everything else")

    model: str = as_in_virft("model", heading="The model and its answers")
    max_pixels: int = as_in_virft("max_pixels")
    coordinates: str = as_in_virft("coordinates")
    system_prompt: str | None = as_in_virft("system_prompt")
    answers: int = setting(1, "answers sampled to each question; 0: lay out the questions for virft.py only", least=0)
    max_completion_tokens: int = as_in_virft("max_completion_tokens", 128)
    temperature: float = as_in_virft("temperature")
    batch: int = setting(8, "questions answered at once on one process", least=1)
    workers: int = as_in_virft("workers")
    seed: int = setting(0, "seed of layouts, companions, places and every sampled token")

    selection: str = setting(
        "attention", "how pairs are chosen; random: as many as attention takes, by lot", "Selection",
        choices=("attention", "random", "none"),
    )  # fmt: skip
    layer: int | None = setting(None, "layer whose attention is read, counted from 0; default: the middle one", least=0)
    limits: list[str] = setting([], "share of attention above which an answer looked right, by layout: grid4=0.25")
    min_perplexity: float = setting(1.1, "drop answers of at most this perplexity: the model was sure of them")
    max_length_ratio: float = setting(4.0, "drop answers so many times longer or shorter, in words, than the right one")
    min_edit_distance: float = setting(0.1, "drop answers that differ from the right one in a smaller share of words")
    pictures: int = setting(12, "draw so many pairs with the attention on each image", least=0)


@dataclass
class TrainConfig:
    """Hold every setting of `train`."""

    pairs: str = setting("pairs.jsonl", "rows {id, image, prompt, chosen, rejected}", "What is trained on what")
    model: str = as_in_virft("model")
    out: str = as_in_virft("out", "runs/mia_dpo")
    max_pixels: int = as_in_virft("max_pixels")
    system_prompt: str | None = as_in_virft("system_prompt")
    skip_bad_images: bool = as_in_virft("skip_bad_images")

    beta: float = setting(0.1, "DPO's beta: weight of a change against the reference", "The algorithm", above=0)
    gamma: float = setting(0.1, "weight of the cross-entropy of the chosen answers", least=0)

    epochs: float = setting(3.0, "passes over the pairs", "Optimization", above=0)
    steps: int = setting(0, "training steps; 0: as many as --epochs makes", least=0)
    prompts_per_step: int = setting(16, "pairs of one step over all processes", least=1)
    micro_batch: int = setting(2, "answers of a training pass, two a pair; several pairs are encoded at once", least=0)
    lr: float = as_in_virft("lr", 5e-6)
    warmup_steps: int = as_in_virft("warmup_steps")
    seed: int = setting(0, "seed of the order of the pairs")
    lora_rank: int = as_in_virft("lora_rank", heading="Memory and several GPUs")
    freeze_vision: bool = as_in_virft("freeze_vision")
    shard: bool = as_in_virft("shard")
    workers: int = as_in_virft("workers")
    save_every: int = as_in_virft("save_every", heading="Interruptions")
    resume: bool = as_in_virft("resume")
    report_to: list[str] = as_in_virft("report_to", heading="Seeing what happens")


# ================================================================================================
# The algorithm. First what is shown and asked.

GRIDS = {2: (1, 2), 3: (1, 3), 4: (2, 2), 6: (2, 3), 9: (3, 3)}  # images -> rows, columns
CENTER = (1 / 6, 1 / 6, 5 / 6, 5 / 6)  # the published 16 x 16 of 24 x 24 tokens, in parts of width and height
PIP_SHARE = 0.7  # of the background's width and height that the picture in it takes at most
PIP_PHRASES = (
    "In the picture at the center, ",
    "In the small picture in the middle, ",
    "In the picture that lies on the other one, ",
    "Looking only at the inner picture, ",
    "In the inset at the center of the image, ",
)


def grid_collage(images: Sequence[Image.Image], cell: int = 448) -> tuple[Image.Image, list[Box]]:
    """Images in cells on white, aspect kept, "Image i" above each; the collage and where each image lies in it.

    A margin of 40 pixels at 448 surrounds every cell; it holds the label.
    """
    (rows, columns), margin = GRIDS[len(images)], round(cell * 40 / 448)
    pitch = cell + margin
    sheet, placed = Image.new("RGB", (columns * pitch + margin, rows * pitch + margin), "white"), []
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(max(1.0, 0.7 * margin))
    for i, image in enumerate(images):
        left, top = margin + i % columns * pitch, margin + i // columns * pitch
        small = ImageOps.contain(image, (cell, cell), Image.Resampling.BICUBIC)
        x, y = left + (cell - small.width) // 2, top + (cell - small.height) // 2
        sheet.paste(small, (x, y))
        draw.text((left + cell // 2, top - margin // 2), f"Image {i + 1}", "black", font, anchor="mm")
        placed.append((float(x), float(y), float(x + small.width), float(y + small.height)))
    return sheet, placed


def picture_in_picture(target: Image.Image, background: Image.Image) -> tuple[Image.Image, Box]:
    """Paste the target at the background's center, as large as PIP_SHARE of its sides allows; return it and its box."""
    width, height = background.size
    most = max(1, int(PIP_SHARE * width)), max(1, int(PIP_SHARE * height))
    small = ImageOps.contain(target, most, Image.Resampling.BICUBIC)
    x, y = (width - small.width) // 2, (height - small.height) // 2
    sheet = background.copy()
    sheet.paste(small, (x, y))
    return sheet, (float(x), float(y), float(x + small.width), float(y + small.height))


def place_box(box: Box, size: tuple[int, int], placed: Box) -> Box:
    """A box in an image of `size`, where it lies once the image lies at `placed`."""
    x, y = (placed[2] - placed[0]) / size[0], (placed[3] - placed[1]) / size[1]
    return (placed[0] + box[0] * x, placed[1] + box[1] * y, placed[0] + box[2] * x, placed[1] + box[3] * y)


def pointing(layout: Layout, target: int, rng: random.Random) -> str:
    """The words that say which image is meant; target counts from 0."""
    return rng.choice(PIP_PHRASES) if layout.kind == "pip" else f"In Image {target + 1}, "


def multi_image_prompt(layout: Layout, words: str, question: str) -> str:
    """The question with its images marked by IMAGE_MARK, one for each that the model is given."""
    if layout.kind == "sequence":
        marks = "".join(f"Image {i + 1}: {IMAGE_MARK}\n" for i in range(layout.images))
    else:
        marks = f"{IMAGE_MARK}\n"
    question = question.replace(IMAGE_MARK, "").strip()
    return marks + words + question[:1].lower() + question[1:]


def drawn_parts(layout: Layout) -> list[Box] | None:
    """Return the parts of a collage as boxes in fractions of it; None for a sequence, whose images are its parts."""
    if layout.kind == "pip":
        return [CENTER]
    rows, columns = GRIDS.get(layout.images, (1, 1))
    cells = [(c / columns, r / rows, (c + 1) / columns, (r + 1) / rows) for r in range(rows) for c in range(columns)]
    return cells if layout.kind == "grid" else None


# Then where the model looks.


def regions(layout: Layout, rows: int, columns: int) -> Tensor:
    """Which of a collage's rows x columns tokens belong to which part, bool [K, T], by the tokens' centers.

    grid: its cells, which share the whole picture out, margins included; pip: the center and what surrounds it.
    """
    y, x = torch.meshgrid((torch.arange(rows) + 0.5) / rows, (torch.arange(columns) + 0.5) / columns, indexing="ij")
    if layout.kind == "pip":
        left, top, right, bottom = CENTER
        center = (left <= x) & (x < right) & (top <= y) & (y < bottom)
        return torch.stack([center, ~center]).flatten(1)
    down, across = GRIDS[layout.images]
    cell = (y * down).long() * across + (x * across).long()
    return torch.stack([cell == i for i in range(layout.images)]).flatten(1)


def attention_shares(attention: Tensor, parts: Tensor, mean: bool) -> Tensor:
    """Divide an answer's attention to image tokens, [T], among the parts, bool [K, T]; the shares add up to 1.

    mean: compare means per token (images of a sequence, which may differ in size), not sums (regions of a collage).
    """
    mass = parts.to(attention.dtype) @ attention
    if mean:
        mass = mass / parts.sum(1)
    return mass / mass.sum()


@contextlib.contextmanager
def attending(model: nn.Module) -> Iterator[Any]:
    """Yield the model as a function that notes the attention weights of its last call in `.attentions`.

    The language model attends eagerly inside: by matrices that can be looked at, which fused kernels never form.
    """
    config = language_model(model).config
    usual, config._attn_implementation = config._attn_implementation, "eager"

    def forward(**inputs):
        out = model(**inputs, output_attentions=True)
        forward.attentions = out.attentions or ()
        return out

    try:
        yield forward
    finally:
        config._attn_implementation = usual


def look(
    model: nn.Module, inputs: dict[str, Tensor], ids: Tensor, mask: Tensor, group_size: int, layer: int | None,
    forbidden: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Measure where the model looks while it gives its answers, and how sure it is of them.

    ids [B * G, C]: answers to B prompts; mask: the tokens that count (of an empty answer the first). Returns the
    attention to each token of the prompt, [B * G, P], averaged over heads and over the positions that predict the
    answer, and the perplexity [B * G]: exp of the mean negative log-probability of the most probable token at each of
    them, the published definition.
    """
    length = inputs["input_ids"].shape[1]
    sequences = {name: x for name, x in inputs.items() if x.shape[:2] == inputs["input_ids"].shape}
    rows = torch.arange(len(ids), device=ids.device) // group_size
    # The prompt's last token predicts the first of the answer, so it belongs to what is looked at.
    prefix = fork(prefill(model, inputs | {name: x[:, :-1] for name, x in sequences.items()}), rows)
    with attending(model) as forward:
        logits = branch(forward, prefix, torch.cat([inputs["input_ids"][rows, -1:], ids[:, :-1]], 1))
    layer = len(forward.attentions) // 2 if layer is None else layer
    seen = forward.attentions[layer] if layer < len(forward.attentions) else None
    if seen is None or seen.shape[-1] != length - 1 + ids.shape[1]:
        raise SystemExit(
            f"--layer {layer}: {type(model).__name__} gives no attention to the whole prompt there; it has "
            f"{len(forward.attentions)} layers that give one, counted from 0 (those that slide see a window only)"
        )
    first = torch.arange(mask.shape[1], device=mask.device) == 0
    counted = (mask | ~mask.any(1, keepdim=True) & first).float()
    counted = counted / counted.sum(1, keepdim=True)  # [N, C]
    # No matrix product, which autocast would round to bf16: shares are compared with limits.
    attention = (seen.float().mean(1) * counted[..., None]).sum(1)
    surest = log_distribution(logits, 1.0, forbidden).max(-1).values
    perplexity = (-(surest * counted).sum(1)).exp()
    return F.pad(attention[:, : length - 1], (0, 1)), perplexity  # the last token is text, not an image


# Then which answers are worth learning from.


def edit_distance(a: Sequence, b: Sequence) -> int:
    """Insertions, deletions and substitutions that lead from a to b (Levenshtein)."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        above, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            above, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, above + (x != y))
    return row[-1]


FILTERS = ("unfinished", "right", "sure", "length", "alike", "looked right")  # in the order in which they are asked


def limits_of(cfg: BuildConfig) -> dict[str, float]:
    """By layout, the share of attention that an answer may pay its image and still be taken for confused."""
    return {name: layout.limit for name, layout in LAYOUTS.items()} | reward_weights(cfg.limits)


def flaw(candidate: dict, cfg: BuildConfig, limits: dict[str, float]) -> str | None:
    """The first of FILTERS that an answer fails, or None if it is to be avoided.

    unfinished    it has no end, or no word
    right         it is the right answer
    sure          its perplexity is too low
    length        it is far longer or shorter than the right answer
    alike         it is almost the right answer, by edit distance in words
    looked right  the share of attention that its image got is above the layout's limit
    """
    answer, truth = (candidate[key].casefold().split() for key in ("rejected", "chosen"))
    longer, shorter = max(len(answer), len(truth)), max(1, min(len(answer), len(truth)))
    failed = {
        "unfinished": candidate["truncated"] or not answer,
        "right": answer == truth,
        "sure": candidate["perplexity"] <= cfg.min_perplexity,
        "length": longer / shorter > cfg.max_length_ratio,
        "alike": edit_distance(answer, truth) / max(1, longer) < cfg.min_edit_distance,
        "looked right": candidate["ratio"] > limits[candidate["layout"]],
    }
    return next((name for name in FILTERS if failed[name]), None)


def select(candidates: Sequence[dict], cfg: BuildConfig) -> list[dict]:
    """The candidates with `dropped`: the filter that dropped each, None for those that become pairs.

    An answer that was sampled twice to one question is "repeated" the second time.
    The control, random, keeps as many of every layout as attention, by lot among those that only attention can drop.
    """
    limits, seen = limits_of(cfg), set()
    judged = [candidate | {"dropped": flaw(candidate, cfg, limits)} for candidate in candidates]
    for c in judged:
        said = (c["number"], *c["rejected"].casefold().split())
        if said in seen and c["dropped"] in (None, "looked right"):  # as other selections would take it, too
            c["dropped"] = "repeated"
        seen.add(said)
    eligible = [c for c in judged if c["dropped"] in (None, "looked right")]
    if cfg.selection != "attention":
        taken = Counter(c["layout"] for c in eligible if c["dropped"] is None)
        for layout in dict.fromkeys(c["layout"] for c in eligible):
            same = [c for c in eligible if c["layout"] == layout]
            lot = random.Random(f"{cfg.seed}/select/{layout}").sample(range(len(same)), taken[layout])
            for i, c in enumerate(same):
                c["dropped"] = None if cfg.selection == "none" or i in lot else "not drawn"
    return judged


# Then the loss.


def dpo_loss(logp: Tensor, logp_ref: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """-log sigmoid(margin) of each pair, and its implicit rewards beta (logp - logp_ref). DPO (arXiv 2305.18290) eq. 7.

    logp, logp_ref [B, 2]: log-probabilities of whole answers, (chosen, rejected), of pi_theta and of the reference.
    Returns loss [B] and rewards [B, 2]; the margin is the difference of the rewards.
    """
    rewards = beta * (logp - logp_ref)
    return -F.logsigmoid(rewards[:, 0] - rewards[:, 1]), rewards


def pair_ids(run: Run, prompts: Sequence[Prompt]) -> tuple[Tensor, Tensor]:
    """Chosen and rejected answers of B pairs with their EOS, ids and mask [B * 2, C]: groups of two."""
    tokenizer = run.prompts.processor.tokenizer
    answers = [text for prompt in prompts for text in prompt.solution]
    rows = [ids + [tokenizer.eos_token_id] for ids in tokenizer(answers, add_special_tokens=False)["input_ids"]]
    ids = torch.full((len(rows), max(map(len, rows))), tokenizer.eos_token_id)
    mask = torch.zeros_like(ids, dtype=torch.bool)
    for i, row in enumerate(rows):
        ids[i, : len(row)], mask[i, : len(row)] = torch.tensor(row), True
    return ids.to(run.device), mask.to(run.device)


def dpo_update(run: Run, prompts: list[Prompt], step: int) -> tuple[Averages, list[dict]]:
    """Take one optimizer step on the pairs of a step; return its metrics and a row of rollouts.jsonl for each pair."""
    cfg, metrics, rows_of_step = run.cfg, Averages(), []
    at_once = max(1, cfg.micro_batch // 2)
    for start in range(0, len(prompts), at_once):
        pairs = prompts[start : start + at_once]
        batch = MicroBatch(pairs, run.collate(pairs), *pair_ids(run, pairs))
        logp_ref = (run.reference_logps(batch) * batch.mask).sum(1)  # [n], of whole answers

        def loss_of(rows: Tensor, token_logp: Tensor, entropy: Tensor) -> Tensor:
            mask = batch.mask[rows]
            logp, ref = (token_logp * mask).sum(1).view(-1, 2), logp_ref[rows].view(-1, 2)
            dpo, rewards = dpo_loss(logp, ref, cfg.beta)
            cross_entropy = -logp[:, 0] / mask.sum(1).view(-1, 2)[:, 0]  # per token: long answers count no more
            loss, margin = dpo + cfg.gamma * cross_entropy, rewards[:, 0] - rewards[:, 1]
            columns = {
                "loss": loss, "dpo_loss": dpo, "cross_entropy": cross_entropy, "margin": margin,
                "accuracy": (margin > 0).float(), "reward_chosen": rewards[:, 0], "reward_rejected": rewards[:, 1],
                "logp_chosen": logp[:, 0], "logp_rejected": logp[:, 1],
            }  # fmt: skip
            columns = {name: values.detach() for name, values in columns.items()}
            for name, values in columns.items():
                metrics.add(name, values.sum(), len(values))
            for i, pair in enumerate(rows[::2].tolist()):
                numbers = {name: round(values[i].item(), 4) for name, values in columns.items()}
                rows_of_step.append({"step": step, "id": batch.prompts[pair // 2].example.id} | numbers)
            return loss.sum() / cfg.prompts_per_step  # of all processes: their gradients are added up

        run.backward(batch, loss_of, unit=2)
    optimizer_step(run, metrics)
    return metrics, rows_of_step


# ================================================================================================
# The machinery of `build`.


read_captions = functools.partial(data.extra_reader, "--task captions", "captions", "read_captions")
CAPTIONS = replace(TASKS["rows"], name="captions", read=read_captions)


def single_image_question(
    task: Task, example: Example, seen_size: tuple[int, int], coordinates: str
) -> tuple[str, str]:
    """What is asked about an example and the right answer, as text, in the form that the question asks for.

    seen_size: (width, height) of the picture as the model sees it.
    """
    question, target = task.question(example, seen_size, coordinates, think=False)
    if "<answer>" in question:
        return question, data.model_answer(task, example, target, think="<think>" in question)
    return question, task.answer(data.model_solution(example, target))


class Question(NamedTuple):
    """A question about one of several images; `example.solution` is the right answer as text."""

    example: Example
    layout: str
    target: int  # which image is meant, or which part of the collage


@dataclass(eq=False)
class Questions(Dataset):
    """Compose and encode one question about each example in a loader's workers; a DataError if an image does not open."""

    prompts: Prompts
    mix: dict[str, float]
    folder: Path  # where collages go
    cell: int
    seed: int

    def __len__(self) -> int:
        return len(self.prompts.examples)

    def __getitem__(self, i: int) -> tuple[int, Question, Prompt] | tuple[int, DataError, None]:
        try:
            question = self.compose(i)
            return i, question, replace(self.prompts, task=TASKS["rows"]).encode(question.example)
        except DataError as error:
            return i, error, None

    def compose(self, i: int) -> Question:
        """Example i among others, all decided by the seed; a collage is written to `folder`."""
        examples, rng = self.prompts.examples, random.Random(f"{self.seed}/{i}")
        (name,) = rng.choices(list(self.mix), list(self.mix.values()))
        layout, example = LAYOUTS[name], examples[i]
        companions = self.companions(example, layout.images - 1, rng)
        target = 0 if layout.kind == "pip" else rng.randrange(layout.images)
        shown = [other.images[0] for other in companions]
        shown.insert(target, example.images[0])
        picture = data.open_image(example.images[0], example.size)  # of the size that its boxes were drawn in
        size = picture.size
        placed, frame = (0.0, 0.0, *map(float, size)), size
        if layout.kind == "sequence":
            images = tuple(self.as_file(source, f"{i}_{k}") for k, source in enumerate(shown))
        else:
            pictures = [picture if k == target else data.open_image(source) for k, source in enumerate(shown)]
            if layout.kind == "grid":
                sheet, places = grid_collage(pictures, self.cell)
                placed = places[target]
            else:
                sheet, placed = picture_in_picture(*pictures)
            images, frame = (self.write(sheet, str(i)),), sheet.size
        task, fit, coordinates = (getattr(self.prompts, part) for part in ("task", "fit", "coordinates"))
        if task.boxes:
            boxes = data.map_boxes(example.solution, lambda box: place_box(box, size, placed))
            example = replace(example, solution=boxes, size=frame)
        asked, answer = single_image_question(task, example, fit.size(*frame), coordinates)
        prompt = multi_image_prompt(layout, pointing(layout, target, rng), asked)
        composed = Example(f"{name}/{i}", images, None, answer, example.category, question=prompt)
        return Question(composed, name, target)

    def companions(self, example: Example, count: int, rng: random.Random) -> list[Example]:
        """Examples of other images, all different."""
        found: dict[str, Example] = {}
        for _ in range(100 * count):
            other = rng.choice(self.prompts.examples)
            if repr(other.images[0]) != repr(example.images[0]):
                found.setdefault(repr(other.images[0]), other)
            if len(found) == count:
                return list(found.values())
        raise DataError(f"example {example.id}: there are not {count} other images to put it among")

    def as_file(self, source: data.ImageSource, name: str) -> Path:
        return source if isinstance(source, Path) else self.write(data.open_image(source), name)

    def write(self, image: Image.Image, name: str) -> Path:
        path = self.folder / f"{name}.png"
        aside = path.with_name(f"{name}.{os.getpid()}.unfinished")
        image.save(aside, "png")
        aside.replace(path)
        return path


def image_parts(prompts: Prompts, question: Question, prompt: Prompt, tokens: int) -> tuple[Tensor, bool]:
    """Which of a prompt's image tokens belong to which part, bool [K, T], and whether means per token are compared."""
    layout = LAYOUTS[question.layout]
    if layout.kind == "sequence":
        sizes = [prompts.fit.size(*data.image_size(image)) for image in question.example.images]
        counts = [image_tokens(prompts, size, len(sizes)) for size in sizes] if len(set(sizes)) > 1 else None
        counts = counts or [tokens // len(sizes)] * len(sizes)
        if sum(counts) != tokens:
            raise SystemExit(
                f"{type(prompts.processor).__name__}: {tokens} image tokens in a prompt whose images have {counts}: "
                "attention cannot be told apart by image"
            )
        return torch.eye(len(sizes), dtype=torch.bool).repeat_interleave(torch.tensor(counts), 1), True
    return regions(layout, *token_grid(prompts.processor, prompt.inputs, tokens)), False


@functools.lru_cache(maxsize=4096)
def image_tokens(prompts: Prompts, size: tuple[int, int], images: int) -> int:
    """Tokens of one image of this size among so many: counted by showing the processor so many of the same."""
    content = [{"type": "image"}] * images
    text = prompts.processor.apply_chat_template([{"role": "user", "content": content}], tokenize=False)
    found = prompts.processor(text=[text], images=[Image.new("RGB", size)] * images, return_tensors="pt")
    return int((found["input_ids"] == image_token(prompts.processor)).sum()) // images


def image_token(processor: Any) -> int:
    token = getattr(processor, "image_token_id", None)
    if token is None:
        raise SystemExit(f"{type(processor).__name__} has no image token: its prompts hold no images to look at")
    return token


def token_grid(processor: Any, inputs: dict[str, Tensor], tokens: int) -> tuple[int, int]:
    """(rows, columns) of the one image's tokens. SystemExit where they are no such grid (tiles, thumbnails)."""
    if "image_grid_thw" in inputs:
        _, rows, columns = inputs["image_grid_thw"][0].tolist()
        merge = math.isqrt(rows * columns // tokens)
        return rows // merge, columns // merge
    pixels = inputs["pixel_values"]
    if pixels.dim() == 4 and len(pixels) == 1:
        rows = round(math.sqrt(tokens * pixels.shape[2] / pixels.shape[3]))
        if tokens % rows == 0 and abs(tokens // rows * pixels.shape[2] - rows * pixels.shape[3]) < max(
            pixels.shape[2:]
        ):
            return rows, tokens // rows
    raise SystemExit(
        f"{type(processor).__name__} cuts images into tiles, whose tokens are no map of the image: "
        "--layouts without grids and pip"
    )


@torch.no_grad()
def answer_questions(
    run: Run, questions: Sequence[Question], numbers: Sequence[int], prompts: list[Prompt]
) -> list[dict]:
    """Sample answers and look where they come from; one candidate record for each answer."""
    cfg, G = run.cfg, run.cfg.answers
    with run.autocast():
        inputs = run.collate(prompts)
        noise = sampling_noise([f"{cfg.seed}/{i}" for i in numbers], G, cfg.max_completion_tokens).to(run.device)
        ids, _ = sample(run.model, inputs, G, noise, cfg.max_completion_tokens, run.eos, **run.distribution)
        mask = completion_mask(ids, run.eos) & ~torch.isin(ids, run.eos)
        attention, perplexity = look(run.model, inputs, ids, mask, G, cfg.layer, run.distribution["forbidden"])
    texts, truncated = run.decode(ids, mask), ~torch.isin(ids, run.eos).any(1)
    is_image = inputs["input_ids"] == image_token(run.prompts.processor)
    records = []
    for row, text in enumerate(texts):
        question, prompt = questions[row // G], prompts[row // G]
        looked = attention[row][is_image[row // G]].cpu()
        shares = attention_shares(looked, *image_parts(run.prompts, question, prompt, len(looked))).tolist()
        records.append(
            {
                "number": numbers[row // G],
                "id": question.example.id + (f"/{row % G}" if G > 1 else ""),
                "image": [str(path.resolve()) for path in question.example.images],
                "prompt": question.example.question,
                "chosen": question.example.solution,
                "rejected": text.strip(),
                "gt": question.example.solution,
                "layout": question.layout,
                "target": question.target,
                "ratio": round(shares[question.target], 4),
                "shares": [round(share, 4) for share in shares],
                "perplexity": round(float(perplexity[row]), 4),
                "truncated": bool(truncated[row]),
            }
        )
    return records


def report_selection(judged: Sequence[dict], cfg: BuildConfig) -> str:
    """The table of what was dropped by which filter, by layout."""
    columns = [*FILTERS, "repeated", *(["not drawn"] if cfg.selection == "random" else [])]
    lines = [
        f"{'layout':10s}{'answers':>9s}" + "".join(f"{name:>14s}" for name in columns) + f"{'pairs':>9s}{'ratio':>8s}"
    ]
    for layout in [*(name for name in LAYOUTS if any(c["layout"] == name for c in judged)), "all"]:
        rows = [c for c in judged if layout in (c["layout"], "all")]
        dropped, ratio = Counter(c["dropped"] for c in rows), sum(c["ratio"] for c in rows) / max(1, len(rows))
        counts = "".join(f"{dropped[name]:14d}" for name in columns)
        lines.append(f"{layout:10s}{len(rows):9d}{counts}{dropped[None]:9d}{ratio:8.3f}")
    return "\n".join([*lines, "ratio: the mean share of attention that the right image got, over all answers"])


def write_rows(file: Path, rows: Sequence[dict], images: str) -> None:
    """JSON lines, whole or not at all; images relative to the file's folder, so that both can be moved together."""
    aside = file.with_name(file.name + ".unfinished")
    aside.unlink(missing_ok=True)
    folder = file.parent.resolve()
    relative = [[os.path.relpath(Path(path).resolve(), folder) for path in row[images]] for row in rows]
    data.append_rows(aside, [row | {images: paths} for row, paths in zip(rows, relative)])
    aside.replace(file)


def parse_build(argv: Sequence[str]) -> BuildConfig:
    usage = "%(prog)s --task TASK --data DIR --model NAME [flags]"
    cfg = parse(BuildConfig, argv, prog="mia_dpo.py build", usage=usage)
    try:
        mix, limits = reward_weights(cfg.layouts), reward_weights(cfg.limits)
    except ValueError as error:
        raise SystemExit(f"--layouts {' '.join(cfg.layouts)} --limits {' '.join(cfg.limits)}: {error}") from None
    folder = Path(cfg.out).with_suffix("").resolve()
    used = [Path(path).resolve() for path in (cfg.data, cfg.model) if path]
    good = mix and mix.keys() <= LAYOUTS.keys() and min(mix.values()) > 0
    inside = any(folder == path or folder in path.parents for path in used)
    obey(cfg, [
        ("data", cfg.data, "given: the folder or file of questions about single images"),
        ("layouts", good, f"weights above 0 of {', '.join(LAYOUTS)}"),
        ("limits", limits.keys() <= LAYOUTS.keys(), f"shares, of {', '.join(LAYOUTS)}"),
        ("out", cfg.out.endswith(".jsonl"), "a file NAME.jsonl"),
        ("out", not inside, "outside --data and --model: its folder is NAME"),
        ("out", Path(cfg.out).resolve() not in used, "another file than --data"),
    ])  # fmt: skip
    return cfg


# Settings of a build that change no candidate: an interrupted build goes on with others of them.
MAY_DIFFER = (
    "workers", "batch", "pictures", "selection", "limits", "min_perplexity", "max_length_ratio", "min_edit_distance",
)  # fmt: skip


def open_folder(cfg: BuildConfig, folder: Path) -> list[dict]:
    """Make the folder beside the pairs; returns the answers that a build of the same settings left in it.

    Those of an interrupted build, or of a finished one whose pairs were removed to select anew.
    """
    settings, file = asdict(cfg) | dict.fromkeys(MAY_DIFFER), folder / "config.json"
    before = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    if folder.exists() and any(folder.iterdir()) and "layouts" not in before:
        raise SystemExit(f"--out {cfg.out}: must be another: {folder} was not made by a build, and will not be touched")
    finished = Path(cfg.out).exists() or (folder / "questions.jsonl").exists()
    if finished or before not in ({}, settings):
        raise SystemExit(f"--out {cfg.out}: must be new: an earlier build is there; give another or remove it")
    (folder / "images").mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(settings, indent=2) + "\n")
    parts = sorted(folder.glob("candidates*.jsonl"))
    found = {(row["number"], row["id"]): row for part in parts for row in read_predictions(part)}
    answered = Counter(number for number, _ in found)
    kept = [row for (number, _), row in found.items() if answered[number] == cfg.answers]  # of a question all or none
    for row in kept:
        row["image"] = [str((folder / image).resolve()) for image in row["image"]]
        row.pop("dropped", None)
    write_rows(folder / "candidates.jsonl", kept, "image")  # whole, before parts are added to and removed
    for part in parts:
        if part.name != "candidates.jsonl":
            part.unlink()
    return kept


def build(argv: list[str]) -> None:
    """Do items 1 to 4: write candidates as they come, a file per process, then select among all of them."""
    cfg = parse_build(argv)
    accelerator, out = connect(cfg), Path(cfg.out)
    folder, main = out.with_suffix(""), accelerator.is_main_process
    task = {**TASKS, "captions": CAPTIONS}[cfg.task]
    chosen = {name: getattr(cfg, name) for name in ("categories", "shots", "limit", "seed", "skip_bad_images")}
    examples, notes = data.load_examples(task, cfg.data, "train", **chosen)
    if several := [e.id for e in examples if len(e.images) != 1]:
        raise DataError(f"example {several[0]} has several images; a build starts from questions about one")
    processor, fit, coordinates, positions = load_processor(cfg, cfg.coordinates)
    if task.boxes and coordinates != "relative" and not cfg.answers:
        raise SystemExit("--answers 0: rows hold boxes in 0..1000; --coordinates relative")
    room = positions - cfg.max_completion_tokens
    prompts = Prompts(task, examples, processor, fit, coordinates, False, cfg.system_prompt, room)
    questions = Questions(prompts, reward_weights(cfg.layouts), folder / "images", cfg.cell, cfg.seed)
    run = build_run(cfg, accelerator, prompts, {}, trains=False, temperature=cfg.temperature)
    run.say("\n".join(notes))
    (kept,) = broadcast_object_list([open_folder(cfg, folder) if main else []])
    if kept:
        run.say(f"going on with {len(kept)} answers from {folder}")
    done = {candidate["number"] for candidate in kept}
    mine = range(len(examples))[accelerator.process_index :: accelerator.num_processes]
    loader = DataLoader(
        questions, cfg.batch, sampler=[i for i in mine if i not in done], collate_fn=list, num_workers=cfg.workers
    )
    own = folder / f"candidates.{accelerator.process_index}.jsonl"
    candidates, rows, skipped = kept if main else [], [], []
    for batch in tqdm(loader, desc="build", disable=not main, dynamic_ncols=True):
        flaws = [question for _, question, _ in batch if isinstance(question, DataError)]
        if flaws and not cfg.skip_bad_images:
            raise flaws[0]
        skipped += map(str, flaws)
        if good := [part for part in batch if part[2] is not None]:
            numbers, asked, encoded = zip(*good)
            if cfg.answers:
                records = answer_questions(run, asked, numbers, list(encoded))
                data.append_rows(own, records)
                candidates += records
            else:
                rows += [question_row(task, number, question) for number, question in zip(numbers, asked)]
    candidates, rows, skipped = (gather_object(found) for found in (candidates, rows, skipped))
    if main:
        if skipped:
            print(f"{len(skipped)} questions skipped; first: {skipped[0]}")
        if cfg.answers:
            finish_build(cfg, sorted(candidates, key=lambda c: (c["number"], c["id"])), folder)
        else:
            rows = [row for _, row in sorted(rows, key=lambda numbered: numbered[0])]
            write_rows(folder / "questions.jsonl", rows, "images")
            print(f"{len(rows)} questions in {folder / 'questions.jsonl'}")
    accelerator.end_training()


def finish_build(cfg: BuildConfig, candidates: list[dict], folder: Path) -> None:
    """Select, and write what a build leaves: pairs, candidates with the reason of each, pictures, a table."""
    judged = select(candidates, cfg)
    pairs = [c for c in judged if c["dropped"] is None]
    write_rows(folder / "candidates.jsonl", judged, "image")
    for part in folder.glob("candidates.*.jsonl"):
        part.unlink()
    for number, pair in enumerate(random.Random(cfg.seed).sample(pairs, min(cfg.pictures, len(pairs)))):
        draw_pair(pair, drawn_parts(LAYOUTS[pair["layout"]]), folder / "pictures" / f"{number:03d}.png")
    table = report_selection(judged, cfg)
    (folder / "selection.txt").write_text(table + "\n")
    published = ("id", "image", "prompt", "chosen", "rejected", "gt", "layout", "ratio")
    write_rows(Path(cfg.out), [{name: pair[name] for name in published} for pair in pairs], "image")
    print(
        f"{table}\n{len(pairs)} pairs in {cfg.out}; all answers in {folder / 'candidates.jsonl'}, "
        f"pictures in {folder / 'pictures'}"
    )


def question_row(task: Task, number: int, question: Question) -> tuple[int, dict]:
    """A question as a row for virft.py: to evaluate a model on, or to train it on by GRPO."""
    example = question.example
    solution = example.solution if task.boxes else parse_answer(example.solution) or example.solution
    row = {"images": [str(path) for path in example.images], "problem": example.question, "solution": solution}
    return number, row | {"category": example.category} | ({"coords": 1000} if task.boxes else {})


# ================================================================================================
# The machinery of `train`.


def read_pairs(file: Path, skip_bad_images: bool = False) -> list[Example]:
    """Pairs as examples whose solution is (chosen, rejected). DataError names the line, and what was expected."""
    examples = []
    for where, row in data.file_rows(file):
        names = ("id", "image", "prompt", "chosen", "rejected")
        missing = [name for name in names if not isinstance(row, dict) or row.get(name) in (None, "", [])]
        if missing or not all(isinstance(row[name], str) for name in ("prompt", "chosen", "rejected")):
            raise DataError(f"{where}: a pair has {', '.join(names)}, none of them empty; this one is {str(row)[:300]}")
        images = row["image"] if isinstance(row["image"], list) else [row["image"]]
        paths = tuple(file.parent / image for image in images)
        if lost := [path for path in paths if not path.is_file() and not skip_bad_images]:
            raise DataError(f"{where}: {lost[0]}: no such image")
        content = (row["chosen"], row["rejected"])
        examples.append(Example(str(row["id"]), paths, None, content, "pair", question=row["prompt"]))
    if not examples:
        raise DataError(f"{file}: no pairs; the table of `build` says which filter dropped them")
    return examples


def parse_train(argv: Sequence[str]) -> TrainConfig:
    cfg = parse(TrainConfig, argv, prog="mia_dpo.py train", usage="%(prog)s --pairs FILE --model NAME [flags]")
    obey(cfg, [out_rule(cfg, may_exist=cfg.resume)])
    return cfg


def train(argv: Sequence[str]) -> None:
    """Items 5 and 6 of the method."""
    cfg = parse_train(argv)
    accelerator, pairs = connect(cfg), read_pairs(Path(cfg.pairs), cfg.skip_bad_images)
    cfg.steps = cfg.steps or max(1, round(cfg.epochs * len(pairs) / cfg.prompts_per_step))
    processor, fit, coordinates, positions = load_processor(cfg, "relative")
    longest = max(len(ids) for ids in processor.tokenizer([text for e in pairs for text in e.solution])["input_ids"])
    task = replace(TASKS["rows"], name="pairs")
    sizes = (False, cfg.system_prompt, positions - longest - 1, cfg.skip_bad_images)
    run = build_run(cfg, accelerator, Prompts(task, pairs, processor, fit, coordinates, *sizes), {}, trains=True)
    first = pairs[0].solution
    open_out(run, 2, "answers", [f"{name}: {text}" for name, text in zip(("chosen", "rejected"), first)])
    with guarded(run) as stopping:
        for step, prompts in run.steps():
            metrics, rows = dpo_update(run, prompts, step)
            write(run, step, metrics, rows, shown=("margin", "accuracy", "logp_chosen"))
            stop = stopping()
            if stop or due(step, cfg.save_every):
                extra("checkpoints", "--save_every").save(run)
            if stop:
                break
        else:
            save_model(run)
    if run.main:
        plot_curves([Path(cfg.out) / "metrics.jsonl"], Path(cfg.out) / "curves.png")
    accelerator.end_training()


def main(argv: list[str] | None = None) -> None:
    command, *rest = sys.argv[1:] if argv is None else argv or [""]
    if command not in ("build", "train"):
        raise SystemExit(
            "mia_dpo.py build ... makes preference pairs, mia_dpo.py train ... learns from them; each has --help"
        )
    try:
        {"build": build, "train": train}[command](rest)
    except DataError as error:
        raise SystemExit(f"data: {error}") from None


if __name__ == "__main__":
    main()
