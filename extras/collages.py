"""Put a question's image among others and say which is meant: item 1 of mia_dpo.py, and whose the image tokens are.

Example i of a dataset becomes a question about one of several images: a sequence of images, a grid (one image of
several, each labelled), or a picture in a picture.
"""

import functools
import io
import math
import os
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor
from torch.utils.data import Dataset

import data
from data import IMAGE_MARK, TASKS, DataError, Example, Prompt, Prompts, Task
from rewards import Box, parse_answer


class Layout(NamedTuple):
    """Describe how an image is put among others."""

    kind: str  # sequence, grid or pip
    images: int
    limit: float  # highest share of attention to the target at which a wrong answer is still a candidate


LAYOUTS = {
    **{f"sequence{n}": Layout("sequence", n, limit) for n, limit in ((2, 0.8), (3, 0.7), (4, 0.6), (5, 0.6))},
    **{f"grid{n}": Layout("grid", n, limit) for n, limit in ((2, 0.7), (3, 0.6), (4, 0.5), (6, 0.4), (9, 0.3))},
    "pip": Layout("pip", 2, 0.8),
}

GRIDS = {2: (1, 2), 3: (1, 3), 4: (2, 2), 6: (2, 3), 9: (3, 3)}  # images -> rows, columns
CENTER = (1 / 6, 1 / 6, 5 / 6, 5 / 6)  # the published 16 x 16 of 24 x 24 tokens, in fractions of width and height
NOISE = {"grid": 225.0, "pip": 49.0}  # of the released code: standard deviation in gray levels; none on sequences
PIP_SHARE = 0.7  # largest fraction of the background's width and height that the picture in it takes
PIP_PHRASES = (
    "In the picture at the center, ", "In the small picture in the middle, ",
    "In the picture that lies on the other one, ", "Looking only at the inner picture, ",
    "In the inset at the center of the image, ",
)  # fmt: skip


def paste(sheet: Image.Image, image: Image.Image, most: tuple[int, int], area: tuple[int, int, int, int]) -> Box:
    """Paste an image, scaled to fit `most` (width, height), at the center of `area` (xyxy); return its box."""
    small = ImageOps.contain(image, most, Image.Resampling.BICUBIC)
    if 0 in small.size:
        raise DataError(f"an image of {image.width} x {image.height} pixels vanishes in {most[0]} x {most[1]}")
    x, y = area[0] + (area[2] - area[0] - small.width) // 2, area[1] + (area[3] - area[1] - small.height) // 2
    sheet.paste(small, (x, y))
    return float(x), float(y), float(x + small.width), float(y + small.height)


def grid_collage(images: Sequence[Image.Image], cell: int = 448) -> tuple[Image.Image, list[Box]]:
    """Paste images into the cells of a white grid, "Image i" above each; return the collage and the box of each image.

    Aspect ratios are kept. A margin of 40 pixels at cell 448 surrounds every cell and holds its label.
    """
    (rows, columns), margin = GRIDS[len(images)], round(cell * 40 / 448)
    pitch = cell + margin
    sheet, placed = Image.new("RGB", (columns * pitch + margin, rows * pitch + margin), "white"), []
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(max(1.0, 0.7 * margin))
    for i, image in enumerate(images):
        left, top = margin + i % columns * pitch, margin + i // columns * pitch
        placed.append(paste(sheet, image, (cell, cell), (left, top, left + cell, top + cell)))
        draw.text((left + cell // 2, top - margin // 2), f"Image {i + 1}", "black", font, anchor="mm")
    return sheet, placed


def picture_in_picture(target: Image.Image, background: Image.Image) -> tuple[Image.Image, Box]:
    """Paste the target at the background's center, as large as PIP_SHARE allows; return the picture and its box."""
    sheet, (width, height) = background.copy(), background.size
    most = max(1, int(PIP_SHARE * width)), max(1, int(PIP_SHARE * height))
    return sheet, paste(sheet, target, most, (0, 0, width, height))


def noisy(file: Path, deviation: float, seed: int) -> io.BytesIO:
    """Return an image as a file with Gaussian noise on every pixel, cut off at 0 and 255: an ImageSource once bound."""
    pixels, changed = np.asarray(data.open_image(file), float), io.BytesIO()
    pixels += np.random.default_rng(seed).normal(0, deviation, pixels.shape)
    Image.fromarray(pixels.clip(0, 255).astype("uint8")).save(changed, "png")
    changed.seek(0)
    return changed


def place_box(box: Box, size: tuple[int, int], placed: Box) -> Box:
    """Map a box in an image of `size` (width, height) to the collage in which the image fills the box `placed`."""
    x, y = (placed[2] - placed[0]) / size[0], (placed[3] - placed[1]) / size[1]
    return (placed[0] + box[0] * x, placed[1] + box[1] * y, placed[0] + box[2] * x, placed[1] + box[3] * y)


def multi_image_prompt(layout: Layout, words: str, question: str) -> str:
    """Return the question with one IMAGE_MARK per image that the model gets; `words` say which image is meant."""
    labels = [f"Image {i + 1}: " for i in range(layout.images)] if layout.kind == "sequence" else [""]
    marks = "".join(f"{label}{IMAGE_MARK}\n" for label in labels)
    question = question.replace(IMAGE_MARK, "").strip()
    return marks + words + question[:1].lower() + question[1:]


def part_boxes(layout: Layout) -> list[Box] | None:
    """Return a grid's cells or a pip's center as boxes in fractions of the collage; None for a sequence."""
    if layout.kind != "grid":
        return [CENTER] if layout.kind == "pip" else None
    rows, columns = GRIDS[layout.images]
    return [(c / columns, r / rows, (c + 1) / columns, (r + 1) / rows) for r in range(rows) for c in range(columns)]


def regions(layout: Layout, rows: int, columns: int) -> Tensor:
    """Assign the rows x columns tokens of a collage to its parts by the tokens' centers; return bool [K, T]."""
    y, x = torch.meshgrid((torch.arange(rows) + 0.5) / rows, (torch.arange(columns) + 0.5) / columns, indexing="ij")
    parts = [(x1 <= x) & (x < x2) & (y1 <= y) & (y < y2) for x1, y1, x2, y2 in part_boxes(layout)]
    if layout.kind == "pip":
        parts.append(~parts[0])  # what surrounds the center; a grid's cells, with margins, leave nothing over
    return torch.stack(parts).flatten(1)


# ------------------------------------------------------------------------------------------------
# Questions.


def single_image_question(
    task: Task, example: Example, seen: tuple[int, int], coordinates: str, system_prompt: str | None = None
) -> tuple[str, list[str]]:
    """Return an example's question and its right answers as texts, one for each accepted name.

    seen: (width, height) of the picture the model gets.
    """
    question, target = task.question(example, seen, coordinates, think=False)
    names = example.solution if isinstance(example.solution, (list, tuple)) else [example.solution]
    named = names and all(isinstance(name, str) for name in names)  # an empty list is the solution `No Objects`
    names = names if named else [example.solution]
    accepted = [replace(example, solution=name) for name in names]
    asked = f"{system_prompt or ''} {question}"
    if "<answer>" in asked:  # then the answer has the tags that are asked for
        return question, [data.model_answer(task, e, target, think="<think>" in asked) for e in accepted]
    return question, [task.answer(data.model_solution(e, target)) for e in accepted]


class Question(NamedTuple):
    """Hold a question about one of several images; `example.solution` is the right answer as text."""

    example: Example
    layout: str
    target: int  # index of the image that is meant, or of its part of the collage
    also_right: Sequence[str] = ()  # answers with the other accepted names


@dataclass(eq=False)
class Questions(Dataset):
    """Compose and encode one question per example, in a loader's workers; a DataError if an image does not open."""

    prompts: Prompts
    mix: dict[str, float]
    folder: Path  # for the collages
    cell: int
    seed: int
    noise: bool = False  # show the model collages with NOISE; the files stay clean
    pool: Sequence[Example] | None = None  # examples that supply the other images; None: those of the questions

    def __len__(self) -> int:
        return len(self.prompts.examples)

    def __getitem__(self, i: int) -> tuple[int, Question, Prompt] | tuple[int, DataError, None]:
        try:
            question = self.compose(i)
            example, deviation = question.example, NOISE.get(LAYOUTS[question.layout].kind)
            if self.noise and deviation:
                shown = functools.partial(noisy, example.images[0], deviation, self.seed + i)
                example = replace(example, images=(shown,))
            encoder = self.prompts.of([])  # shallow: a new Prompts would look through all examples again
            encoder.task = TASKS["rows"]
            return i, question, encoder.encode(example)
        except DataError as error:
            return i, error, None

    def compose(self, i: int) -> Question:
        """Put example i among others and write a collage to `folder`; the seed decides every choice."""
        examples, rng = self.prompts.examples, random.Random(f"{self.seed}/{i}")
        (name,) = rng.choices(list(self.mix), list(self.mix.values()))
        layout, example = LAYOUTS[name], examples[i]
        shown = [other.images[0] for other in self.companions(example, layout.images - 1, rng)]
        target = 0 if layout.kind == "pip" else rng.randrange(layout.images)
        shown.insert(target, example.images[0])
        picture = data.open_image(example.images[0], example.size)  # checks the size that its boxes refer to
        size = frame = picture.size
        placed = (0.0, 0.0, *map(float, size))
        if layout.kind == "sequence":
            files = [
                source if isinstance(source, Path) else self.write(data.open_image(source), f"{i}_{k}")
                for k, source in enumerate(shown)
            ]
        else:
            pictures = [picture if k == target else data.open_image(source) for k, source in enumerate(shown)]
            if layout.kind == "grid":
                sheet, places = grid_collage(pictures, self.cell)
                placed = places[target]
            else:
                sheet, placed = picture_in_picture(*pictures)
            files, frame = [self.write(sheet, str(i))], sheet.size
        task, coordinates = self.prompts.task, self.prompts.coordinates
        if task.boxes:
            boxes = data.map_boxes(example.solution, lambda box: place_box(box, size, placed))
            example = replace(example, solution=boxes, size=frame)
        system = self.prompts.system_prompt
        asked, (answer, *others) = single_image_question(task, example, self.prompts.frame(frame), coordinates, system)
        words = rng.choice(PIP_PHRASES) if layout.kind == "pip" else f"In Image {target + 1}, "
        prompt = multi_image_prompt(layout, words, asked)
        composed = Example(f"{name}/{i}", tuple(files), None, answer, example.category, question=prompt)
        return Question(composed, name, target, others)

    def companions(self, example: Example, count: int, rng: random.Random) -> list[Example]:
        """Draw `count` examples of different images, none of them the example's own."""
        found = {repr(example.images[0]): example}
        for _ in range(100 * count):
            other = rng.choice(self.pool or self.prompts.examples)
            found.setdefault(repr(other.images[0]), other)
            if len(found) > count:
                return list(found.values())[1:]
        remedy = "more data, or --layouts of fewer images"
        raise DataError(f"example {example.id}: there are not {count} other images to put it among; {remedy}")

    def write(self, image: Image.Image, name: str) -> Path:
        path = self.folder / f"{name}.png"
        aside = path.with_name(f"{name}.{os.getpid()}.unfinished")
        image.save(aside, "png")
        aside.replace(path)
        return path


def question_row(task: Task, question: Question) -> dict:
    """Return a question as a row for virft.py, which can evaluate a model on it or train a model on it by GRPO."""
    example = question.example
    names = [parse_answer(text) or text for text in (example.solution, *question.also_right)]
    solution = example.solution if task.boxes else names if question.also_right else names[0]
    row = {"images": [str(path) for path in example.images], "problem": example.question, "solution": solution}
    return row | {"category": example.category} | ({"coords": 1000} if task.boxes else {})


# ------------------------------------------------------------------------------------------------
# Which of a prompt's image tokens belong to which image.


def image_parts(prompts: Prompts, question: Question, prompt: Prompt, tokens: int) -> tuple[Tensor, bool]:
    """Assign a prompt's image tokens to the parts, bool [K, T]; also return whether to compare means per token."""
    layout = LAYOUTS[question.layout]
    if layout.kind != "sequence":
        return regions(layout, *token_grid(prompts.processor, prompt.inputs, tokens)), False
    sizes = [data.image_size(image) for image in question.example.images]
    counts = [tokens // len(sizes)] * len(sizes)
    if len(set(sizes)) > 1:
        counts = [image_tokens(prompts, size, len(sizes)) for size in sizes]
    if sum(counts) != tokens:
        kind = type(prompts.processor).__name__
        raise SystemExit(f"{kind}: {tokens} image tokens are not {counts} by image: attention cannot be told apart")
    return torch.eye(len(sizes), dtype=torch.bool).repeat_interleave(torch.tensor(counts), 1), True


@functools.lru_cache(maxsize=4096)
def image_tokens(prompts: Prompts, size: tuple[int, int], images: int) -> int:
    """Count the tokens of one image of this size in a prompt with so many images, by running the processor on them."""
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
    """Return (rows, columns) of the only image's tokens. Raises SystemExit if they form no grid (tiles, thumbnails)."""
    if "image_grid_thw" in inputs:
        _, rows, columns = inputs["image_grid_thw"][0].tolist()
        merge = math.isqrt(rows * columns // tokens)
        return rows // merge, columns // merge
    pixels = inputs["pixel_values"]
    if pixels.dim() == 4 and len(pixels) == 1:
        height, width = pixels.shape[2:]
        rows = round(math.sqrt(tokens * height / width))
        if tokens % rows == 0 and abs(tokens // rows * height - rows * width) < max(height, width):
            return rows, tokens // rows
    kind = type(processor).__name__
    raise SystemExit(f"{kind} cuts images into tiles, which are no map of the image: --layouts without grids and pip")
