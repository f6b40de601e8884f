"""Tasks: how a dataset on disk becomes (images, prompt, solution).

    reader -> Example -> open_images(fit) -> pictures as the model sees them
                      -> task.question()   -> the question, stating the coordinates in force
                      -> model_solution()  -> what the rewards compare the answer with

There are three kinds of answers: boxes with confidences (detection), a name (classification), one box (grounding).
Readers, in this order: COCO and LVIS, class names, ReasonSeg, and rows of any task from JSON and `datasets`.

Ground truth has one canonical store: boxes as (x1, y1, x2, y2) floats in pixels of the original
image. What a model reads and writes is derived from it by one pair of functions, `to_model` and
`to_pixels`, and prompt, reward, evaluation and drawing all use that pair: mixed-up coordinates are
the most reported failure of this method (an IoU reward that stays near 0).

From there `Prompts` makes what a model reads, with its processor, and `collate` makes batches.

To add a task, write a reader and a prompt, and enter them in TASKS; nothing else knows a task by name. Rows of your own
need neither: see the task `rows`.
"""

import csv
import difflib
import functools
import io
import json
import math
import random
import re
from collections import defaultdict
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from rewards import REWARDS, Box, parse_answer, parse_detections, parse_grounding


class DataError(ValueError):
    """Data that cannot be used. The message names the file and row, and what would be right."""


# ------------------------------------------------------------------------------------------------
# Coordinates. A convention is only the size that the model takes an image to have: 1000 x 1000
# whatever the image ("relative"), or the pixels of the image as the model sees it ("pixels").

CONVENTIONS = ("relative", "pixels")

# By config.model_type, as the families' own documentation has it: model cards and cookbooks of Qwen, InternVL's "Chat Data
# Format", GLM-V's README. Not listed, and announced when such a model is loaded: families that document no convention
# (Gemma 3, Idefics3, SmolVLM, Pixtral, Mllama) or one that is neither (PaliGemma's location tokens, y first;
# decimals in 0..1 of LLaVA-NeXT and -OneVision).
COORDINATES_OF_FAMILY = {
    "qwen2_5_vl": "pixels",
    **dict.fromkeys(("qwen2_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe"), "relative"),
    **dict.fromkeys(("internvl", "glm4v", "glm4v_moe", "glm46v"), "relative"),
    "llava": "relative",  # LLaVA 1.5 learned decimals in 0..1: the same frame, in other units
}


def model_size(coordinates: str, seen_size: tuple[int, int]) -> tuple[int, int]:
    """(width, height) of the coordinate system that the model reads and writes; seen_size is the fitted image's."""
    return {"relative": (1000, 1000), "pixels": seen_size}[coordinates]


def to_model(box: Box, size: tuple[int, int], target: tuple[int, int]) -> Box:
    """Original pixels -> the model's coordinates, not rounded. size: original (width, height); target: model_size()."""
    return _scale(box, target[0] / size[0], target[1] / size[1])


def to_pixels(box: Box, size: tuple[int, int], target: tuple[int, int]) -> Box:
    """The model's coordinates -> original pixels: the inverse of to_model."""
    return _scale(box, size[0] / target[0], size[1] / target[1])


def _scale(box: Box, x: float, y: float) -> Box:
    return (box[0] * x, box[1] * y, box[2] * x, box[3] * y)


def map_boxes(value: Any, change: Callable[[Box], Any]) -> Any:
    """A solution or an answer with every box in it changed; names and confidences stay. Four numbers are a box."""
    if not isinstance(value, (list, tuple)):
        return value
    if len(value) == 4 and all(isinstance(v, (int, float)) for v in value):
        return change(value)
    return type(value)(map_boxes(part, change) for part in value)


def boxes_in(value: Any) -> list[Box]:
    """The boxes of a solution or an answer, in their order."""
    found: list[Box] = []
    map_boxes(value, found.append)
    return found


def box_inside(box: Box, size: tuple[int, int], overhang: float = 1.0) -> Box:
    """The box cut to 0..width and 0..height, as floats; DataError for one that is wrong.

    overhang: how far out is forgiven. Annotation tools round outward: a pixel is theirs, more is a wrong box.
    """
    x1, y1, x2, y2 = map(float, box)
    width, height = size
    if min(x1, y1) < -overhang or x2 > width + overhang or y2 > height + overhang:
        raise DataError("lies outside the image")
    x1, y1, x2, y2 = max(0.0, x1), max(0.0, y1), min(float(width), x2), min(float(height), y2)
    if not (x1 < x2 and y1 < y2):
        raise DataError("has no area")
    return (x1, y1, x2, y2)


def round_box(box: Box) -> tuple[int, int, int, int]:
    """The box in integers, as models write it; width and height stay at least 1, so that no small object vanishes."""
    x1, y1, x2, y2 = map(round, box)
    return (x1, y1, max(x2, x1 + 1), max(y2, y1 + 1))


# ------------------------------------------------------------------------------------------------
# Images.

MAX_ASPECT = 200  # Qwen's processors refuse more; a strip of pixels teaches nothing anyway

ImageSource = Path | Callable[[], io.BytesIO]  # a file, or bytes held by a table


@dataclass(frozen=True)
class Fit:
    """The size that a model's processor takes unchanged, so that the only resizing is ours, once.

    exact: (width, height) of processors with one input size; otherwise both sides become multiples of `multiple`
    with min_pixels <= width * height <= max_pixels, keeping the aspect as nearly as that allows.
    """

    multiple: int
    min_pixels: int
    max_pixels: int
    exact: tuple[int, int] | None = None

    def size(self, width: int, height: int) -> tuple[int, int]:
        """(width, height) of the fitted image."""
        if self.exact:
            return self.exact
        area, m = width * height, self.multiple
        scale, cell = 1.0, round
        if round(width / m) * round(height / m) * m * m > self.max_pixels:
            scale, cell = math.sqrt(self.max_pixels / area), math.floor
        elif round(width / m) * round(height / m) * m * m < self.min_pixels:
            scale, cell = math.sqrt(self.min_pixels / area), math.ceil
        fitted_width, fitted_height = (max(1, cell(side * scale / m)) * m for side in (width, height))
        # A side below one cell is raised to one: on thin strips that can pass the limit, so the long side pays.
        if fitted_width * fitted_height > self.max_pixels:
            longest = max(m, self.max_pixels // m // m * m)
            fitted_width, fitted_height = min(fitted_width, longest), min(fitted_height, longest)
        return fitted_width, fitted_height


def image_fit(image_processor, max_pixels: int, min_pixels: int) -> Fit:
    """Read from a Hugging Face image processor how images must be sized so that it neither resizes nor crops.

    Raises DataError for a processor whose sizes this cannot derive, because a second, hidden resizing or a crop
    would move the boxes.
    """
    size = dict(getattr(image_processor, "size", None) or {})
    if getattr(image_processor, "do_center_crop", False):
        size = dict(image_processor.crop_size)  # an image of just this size loses nothing to the crop
        if "height" not in size:
            raise DataError(
                f"{type(image_processor).__name__} crops to {size}; only a crop to one height and width is understood"
            )
    if "height" in size and "width" in size:
        return Fit(1, 1, size["height"] * size["width"], (size["width"], size["height"]))
    patch, merge = getattr(image_processor, "patch_size", None), getattr(image_processor, "merge_size", None)
    if isinstance(patch, int) and isinstance(merge, int) and {"shortest_edge", "longest_edge"} <= size.keys():
        # Qwen-VL style: these two "edges" are areas in pixels.
        return Fit(patch * merge, max(min_pixels, size["shortest_edge"]), min(max_pixels, size["longest_edge"]))
    raise DataError(
        f"{type(image_processor).__name__} with size {size} resizes images in a way that this project does not know; "
        "known are one fixed height and width (LLaVA, SigLIP, CLIP) and patch multiples within a pixel range (Qwen-VL)"
    )


def check_fit(image_processor, fit: Fit) -> None:
    """Show on one picture that the processor leaves fitted images as they are; raises DataError where it does not."""
    noise = Image.effect_noise((640, 427), 64).convert("RGB").resize(fit.size(640, 427))
    switches = {name: False for name in ("do_resize", "do_center_crop") if hasattr(image_processor, name)}
    processed, untouched = (
        image_processor(images=[noise], return_tensors="np", **kw)["pixel_values"] for kw in ({}, switches)
    )
    if processed.shape != untouched.shape or not (processed == untouched).all():
        raise DataError(
            f"{type(image_processor).__name__} resizes or crops an image that was fitted to {noise.size}: boxes would be displaced"
        )


@contextmanager
def opened(source: ImageSource) -> Iterator[Image.Image]:
    """The image file, not yet decoded. Raises DataError, naming it, if it is missing, cut off or not an image."""
    try:
        with Image.open(source if isinstance(source, Path) else source()) as image:
            yield image
    except FileNotFoundError:
        raise DataError(f"{source}: no such image") from None
    except (UnidentifiedImageError, OSError, SyntaxError, TypeError, ValueError) as error:
        raise DataError(f"{source}: not a whole image ({error})") from None


def open_image(source: ImageSource, expected_size: tuple[int, int] | None = None) -> Image.Image:
    """Decode one image: turned upright by its EXIF tag, RGB, transparency on white.

    expected_size: (width, height) that the annotations were made for. Raises DataError, naming the file, for an
    image that does not open, is a strip beyond MAX_ASPECT, or is of another size.
    """
    with opened(source) as file:
        image = ImageOps.exif_transpose(file)
        if "A" in image.getbands() or "transparency" in image.info:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        image = image.convert("RGB")
    if max(image.size) > MAX_ASPECT * min(image.size):
        raise DataError(f"{source}: the image is {image.size[0]}x{image.size[1]}, its sides' ratio above {MAX_ASPECT}")
    if expected_size and image.size != tuple(expected_size):
        raise DataError(
            f"{source}: the image is {image.size[0]}x{image.size[1]} once upright, its annotation says "
            f"{expected_size[0]}x{expected_size[1]}: the boxes would not fit it"
        )
    return image


def image_size(source: ImageSource) -> tuple[int, int]:
    """(width, height) once upright, from the header alone. Raises DataError as open_image does."""
    with opened(source) as image:
        width, height = image.size
        sideways = image.getexif().get(0x0112, 1) >= 5  # EXIF orientations 5 to 8 lie on their side
    return (height, width) if sideways else (width, height)


# ------------------------------------------------------------------------------------------------
# Examples.


@dataclass(frozen=True)
class Example:
    """One question about one or several images, with its ground truth.

    id           unique within the dataset and stable between runs: sampling noise is keyed by it
    images       where to find the images; nothing is decoded before open_images
    size         (width, height) of the first image in original pixels, the frame of all boxes; None: there are none
    solution     detection: boxes in original pixels, none if the category is absent; grounding: one box in original
                 pixels; classification: the class name, or all names that are accepted; `rows`: what the row says
    category     what is asked for, or the class: scores are also given by category
    crowds       regions that detection scores must ignore (COCO's iscrowd), original pixels
    exhaustive   `solution` is all that the image shows of the category; if not, boxes that match nothing prove nothing
    image_id     groups the examples of one image, for scores over images; category_id is COCO's
    question     a prompt that came with the data; None: the task writes it
    coordinates  the convention that `question` speaks; None: the model family's
    """

    id: str
    images: tuple[ImageSource, ...]
    size: tuple[int, int] | None
    solution: Any
    category: str
    crowds: tuple[Box, ...] = ()
    exhaustive: bool = True
    image_id: int = 0
    category_id: int = 0
    question: str | None = None
    coordinates: str | None = None


def open_images(example: Example, fit: Fit) -> list[Image.Image]:
    """The example's images as the model will see them: decoded, upright, RGB, resized once."""
    images = [open_image(example.images[0], example.size), *map(open_image, example.images[1:])]
    return [image.resize(fit.size(*image.size), Image.Resampling.BICUBIC) for image in images]


def model_solution(example: Example, target: tuple[int, int]) -> Any:
    """The ground truth in the model's coordinates, not rounded: what rewards compare an answer with."""
    if example.size is None:
        return example.solution
    return map_boxes(example.solution, lambda box: to_model(box, example.size, target))


# ------------------------------------------------------------------------------------------------
# What all readers share. A reader is read(data, split, choice) -> (examples, notes for the user), with split
# "train" or "val"; it raises DataError naming file and row, and what was expected.


@dataclass(frozen=True)
class Choice:
    """What to take of a dataset; the flags of virft.py with the same names.

    categories       names separated by commas, or one of CATEGORY_SPLITS or base65; None: all
    shots            this many images per category, chosen by seed
    negatives        share of all examples that ask for a category that the image does not show
    eval_categories  which categories each image is asked for in evaluation: gt, those that it shows (and negatives);
                     all that the file lists; listed, those of `categories`
    skip_bad_images  leave out, and count, what would be an error
    """

    categories: str | None = None
    shots: int | None = None
    negatives: float = 0.0
    eval_categories: str = "gt"
    seed: int = 0
    skip_bad_images: bool = False


CATEGORY_SPLITS = {  # Visual-RFT sections 4.2 to 4.4; base65 is what novel15 leaves of COCO's 80
    "novel15": "mouse, fork, hot dog, cat, airplane, suitcase, parking meter, sandwich, train, hair drier, toilet, "
    "toaster, snowboard, frisbee, bear",
    "fewshot8": "bus, train, fire hydrant, stop sign, cat, dog, bed, toilet",
    "lvis_fewshot6": "horse_buggy, die, kitchen_table, omelet, papaya, stepladder",
    "lvis_rare13": "casserole, die, egg_roll, futon, garbage, handsaw, hippopotamus, kitchen_table, mallet, omelet, "
    "shot_glass, stepladder, sugar_bowl",
}


def plain_name(name: str) -> str:
    """A category as a person writes it: LVIS and folders have underscores for spaces."""
    return name.replace("_", " ").strip()


def wanted_categories(where: object, known: Sequence[str], categories: str | None) -> list[str]:
    """Those of the known names that --categories asks for, underscores and spaces being the same."""
    if categories is None:
        return list(known)
    if categories == "base65":
        novel = CATEGORY_SPLITS["novel15"].split(", ")
        return [name for name in known if name not in novel]
    name_of = {plain_name(name): name for name in known}
    wanted = [plain_name(name) for name in CATEGORY_SPLITS.get(categories, categories).split(",")]
    for name in wanted:
        if name not in name_of:
            near = difflib.get_close_matches(name, list(name_of), 3) or list(name_of)[:5]
            raise DataError(f"--categories: '{name}' is not in {where}; near it: {', '.join(near)}")
    return [name_of[name] for name in dict.fromkeys(wanted)]


def take_shots(where: object, images: dict[str, list], choice: Choice, notes: list[str]) -> dict[str, list]:
    """{category: images}, all or --shots of them; a category's shots do not depend on which others are asked for."""
    if not choice.shots:
        return images
    few = [f"{name} ({len(found)})" for name, found in images.items() if len(found) < choice.shots]
    if few:
        notes.append(f"{where}: fewer than {choice.shots} images for {', '.join(few)}")
    return {
        name: random.Random(f"{choice.seed}/{name}").sample(found, min(choice.shots, len(found)))
        for name, found in images.items()
    }


def leave_out(where: object, flaws: Sequence[str], choice: Choice, notes: list[str], what: str = "images") -> None:
    """Stop at what is wrong with single images or rows, or count it if the user wants to go on without them."""
    if flaws and not choice.skip_bad_images:
        raise DataError(
            f"{flaws[0]}. Mend it, or pass --skip_bad_images true to leave out such {what} ({len(flaws)} here)"
        )
    if flaws:
        notes.append(f"{where}: {len(flaws)} {what} skipped; first: {flaws[0]}")


def refuse(choice: Choice, reason: str, *flags: str) -> None:
    """A flag that a reader cannot follow is an error, because silence would look like obedience."""
    for flag in flags:
        if getattr(choice, flag) != getattr(Choice, flag):
            raise DataError(f"--{flag} {getattr(choice, flag)}: {reason}")


def _read_text(file: Path, encodings: Sequence[str] = ("UTF-8",)) -> str:
    for encoding in encodings:
        try:
            return file.read_text(encoding=encoding)
        except FileNotFoundError:
            raise DataError(f"{file}: no such file") from None
        except UnicodeDecodeError as error:
            reason = error
    raise DataError(f"{file}: not {' or '.join(encodings)} text ({reason})")


def _read_json(file: Path, encodings: Sequence[str] = ("UTF-8",)) -> Any:
    try:
        return json.loads(_read_text(file, encodings))
    except json.JSONDecodeError as error:
        raise DataError(
            f"{file}: line {error.lineno}, column {error.colno}: not JSON ({error.msg}); is the file cut off?"
        ) from None


def _lines(file: Path) -> list[tuple[str, str]]:
    """The lines of a text file that are not empty, each after where it stands."""
    lines = enumerate(_read_text(file).split("\n"), 1)  # not splitlines, which also splits inside JSON strings
    return [(f"{file}: line {number}", line.strip()) for number, line in lines if line.strip()]


def file_rows(file: Path) -> list[tuple[str, Any]]:
    """The rows of a .json file (a list), a .jsonl file or a .csv file with a header, each after where it stands."""
    if file.suffix == ".json":
        table = _read_json(file)
        if not isinstance(table, list):
            raise DataError(f"{file}: a list of rows expected at the top level, found {str(table)[:100]}")
        return [(f"{file}: row {number}", row) for number, row in enumerate(table)]
    if file.suffix == ".csv":
        reader = csv.DictReader(_read_text(file).splitlines())
        return [(f"{file}: line {reader.line_num}", row) for row in reader]
    rows = []
    for where, line in _lines(file):
        try:
            rows.append((where, json.loads(line)))
        except json.JSONDecodeError as error:
            raise DataError(f"{where}: not JSON ({error.msg}): {line[:200]}") from None
    return rows


def _field(file: Path, part: str, row: int, record, key: str) -> Any:
    if not isinstance(record, dict) or key not in record:
        raise DataError(f"{file}: {part}[{row}] has no '{key}'; it is {str(record)[:200]}")
    return record[key]


def _names_in(folder: Path) -> set[str]:
    """What a folder holds. Readers ask once per folder: a look-up per image takes minutes on network disks."""
    return {entry.name for entry in folder.iterdir()} if folder.is_dir() else set()


def _first_folder(root: Path, names: Sequence[str], layout: str) -> Path:
    for name in names:
        if (root / name).is_dir():
            return root / name
    raise DataError(f"{root}: no folder {' or '.join(names)}. {layout}")


def _pick_split(where: object, split: str, there: Container[str], hint: str) -> str:
    """What the split is called among those that are there; training never sees val or test."""
    names = {"train": ("train",), "val": ("val", "validation", "test")}[split]
    for name in names:
        if name in there:
            return name
    raise DataError(f"{where}: no split {' or '.join(names)}. {hint}")


# ------------------------------------------------------------------------------------------------
# Detection: COCO and LVIS annotation files. One example per (image, category).

COCO_LAYOUT = """A COCO folder looks like this:
  DIR/annotations/instances_train2017.json    (or directly in DIR)
  DIR/annotations/instances_val2017.json      (only for evaluation)
  DIR/train2017/000000000009.jpg ...
  DIR/val2017/000000000139.jpg ...
To see the whole thing run without data of your own: bash run.sh"""

LVIS_LAYOUT = """An LVIS folder (v0.5 or v1) looks like this; its images are COCO's:
  DIR/annotations/lvis_v1_train.json          (or directly in DIR)
  DIR/annotations/lvis_v1_val.json            (only for evaluation)
  DIR/train2017/000000000009.jpg ...
  DIR/val2017/000000000139.jpg ..."""


def read_coco(data: str, split: str, choice: Choice = Choice()) -> tuple[list[Example], list[str]]:
    """Read a folder of COCO_LAYOUT, the annotation file and the image folder being those of the split."""
    file, table, paths = _coco_file(Path(data), "instances", split, DETECTION_KEYS)
    return detection_examples(file, table, paths, split, choice)


def read_captions(data: str, split: str, choice: Choice = Choice()) -> tuple[list[Example], list[str]]:
    """Read the captions_<split>*.json of a folder of COCO_LAYOUT: for each image its first caption, as text."""
    refuse(choice, "captions have no categories", "categories", "shots", "negatives", "eval_categories")
    file, table, paths = _coco_file(Path(data), "captions", split, ("images", "annotations"))
    path_of = {_field(file, "images", row, r, "id"): path for row, (r, path) in enumerate(zip(table["images"], paths))}
    first: dict[Any, str] = {}
    for row, record in enumerate(table["annotations"]):
        image_id, caption = (_field(file, "annotations", row, record, key) for key in ("image_id", "caption"))
        if image_id not in path_of:
            raise DataError(f"{file}: annotations[{row}] names image {image_id}, which the file does not list")
        if words := str(caption).split():
            first.setdefault(image_id, " ".join(words))
    question = "Describe the image in one sentence."
    return [
        Example(f"{split}/{i}", (path_of[i],), None, caption, "caption", image_id=i, question=question)
        for i, caption in first.items()
    ], []


def _coco_file(root: Path, kind: str, split: str, keys: Sequence[str]) -> tuple[Path, dict[str, list], list[Path]]:
    """An annotation file of COCO_LAYOUT, what is in it, and where each of its images lies."""
    file = _annotation_file(root, f"{kind}_{split}*.json", COCO_LAYOUT)
    table = _annotation_table(file, keys)
    name = file.stem.removeprefix(f"{kind}_")
    folder = _first_folder(root, (name, f"images/{name}"), COCO_LAYOUT)
    names = [_field(file, "images", row, record, "file_name") for row, record in enumerate(table["images"])]
    return file, table, [folder / Path(name).name for name in names]


def read_lvis(data: str, split: str, choice: Choice = Choice()) -> tuple[list[Example], list[str]]:
    """Read a folder of LVIS_LAYOUT.

    Names are asked for in plain words. LVIS is not annotated in full: what an image is known not to show are its
    `neg_category_ids`, and only these become negatives; `not_exhaustive_category_ids` never do, and neither they nor
    categories that nobody looked for count as `exhaustive`.
    """
    root = Path(data)
    file = _annotation_file(root, f"lvis*_{split}*.json", LVIS_LAYOUT)
    table = _annotation_table(file, DETECTION_KEYS)
    for row, record in enumerate(table["categories"]):
        record["name"] = plain_name(_field(file, "categories", row, record, "name"))
    base = _first_folder(root, ("train2017", "val2017", "images/train2017", "images/val2017"), LVIS_LAYOUT).parent
    # v0.5 names files as COCO did in 2014 and v1 not at all; the last two parts of the address serve both.
    addresses = [_field(file, "images", row, record, "coco_url") for row, record in enumerate(table["images"])]
    return detection_examples(file, table, [base.joinpath(*url.split("/")[-2:]) for url in addresses], split, choice)


def _annotation_file(root: Path, pattern: str, layout: str) -> Path:
    if not root.is_dir():
        raise DataError(f"{root}: no such folder. {layout}")
    found = [file for folder in (root / "annotations", root) for file in sorted(folder.glob(pattern))]
    if len(found) != 1:
        raise DataError(f"{root}: {len(found)} files {pattern}, one expected. {layout}")
    return found[0]


DETECTION_KEYS = ("images", "annotations", "categories")


def _annotation_table(file: Path, keys: Sequence[str]) -> dict[str, list]:
    table = _read_json(file)
    for key in keys:
        if not isinstance(table, dict) or not isinstance(table.get(key), list):
            raise DataError(f"{file}: no list '{key}' at the top level; such a file has {', '.join(keys)}")
    return table


def detection_examples(
    file: Path, table: dict[str, list], paths: Sequence[Path], split: str, choice: Choice
) -> tuple[list[Example], list[str]]:
    """The examples of an annotation file; paths: where each of table["images"] lies."""
    notes: list[str] = []
    name_of = {
        _field(file, "categories", row, c, "id"): _field(file, "categories", row, c, "name")
        for row, c in enumerate(table["categories"])
    }
    id_of = {name: category_id for category_id, name in name_of.items()}
    wanted = wanted_categories(file, list(id_of), choice.categories)
    images, flaws = annotated_images(file, table["images"], paths)
    boxes, crowds = annotated_boxes(file, table["annotations"], images, name_of, flaws)
    leave_out(file, list(flaws.values()), choice, notes)
    usable = [image_id for image_id in images if image_id not in flaws]
    known = {record["id"]: Verified.of(record, name_of) for record in table["images"] if "neg_category_ids" in record}
    if choice.eval_categories == "gt":
        shown = {name: [i for i in usable if (i, name) in boxes] for name in wanted}
        if empty := [name for name in wanted if not shown[name]]:
            notes.append(f"{file}: no image shows {', '.join(empty)}")
        pairs = [(i, name) for name, ids in take_shots(file, shown, choice, notes).items() for i in ids]
        absent = absent_categories(known, wanted, boxes.keys() | crowds.keys())
        pairs += negative_pairs(pairs, absent, choice, notes)
    else:
        pairs = every_pair(usable, wanted, choice)
    if not pairs:
        raise DataError(f"{file}: no example is left for the categories {', '.join(wanted)}")

    def example(image_id, name: str) -> Example:
        path, size = images[image_id]
        targets, ignored = (tuple(table.get((image_id, name), ())) for table in (boxes, crowds))
        exhaustive = image_id not in known or known[image_id].exhaustive(name, bool(targets))
        return Example(
            f"{split}/{image_id}/{name}", (path,), size, targets, name, ignored, exhaustive, image_id, id_of[name]
        )

    return [example(*pair) for pair in pairs], notes


def annotated_images(file: Path, rows: list, paths: Sequence[Path]) -> tuple[dict, dict]:
    """{image id: (path, (width, height))} and {image id: what is wrong with it}."""
    images, flaws, listed = {}, {}, functools.cache(_names_in)
    for row, (record, path) in enumerate(zip(rows, paths)):
        image_id, *size = (_field(file, "images", row, record, key) for key in ("id", "width", "height"))
        images[image_id] = (path, tuple(size))
        if path.name not in listed(path.parent):
            flaws[image_id] = f"{path}: no such image (images[{row}] of {file})"
        elif not all(isinstance(side, int) and side > 0 for side in size) or max(size) > MAX_ASPECT * min(size):
            flaws[image_id] = (
                f"{file}: images[{row}] {path.name} is {size[0]}x{size[1]}: sides must be positive, their ratio at most {MAX_ASPECT}"
            )
    return images, flaws


def annotated_boxes(file: Path, rows: list, images: dict, name_of: dict, flaws: dict) -> tuple[dict, dict]:
    """{(image id, category): [box, ...]} for targets and for crowd regions; what is wrong is entered in `flaws`."""
    boxes, crowds = defaultdict(list), defaultdict(list)
    for row, record in enumerate(rows):
        image_id, category_id, bbox = (
            _field(file, "annotations", row, record, key) for key in ("image_id", "category_id", "bbox")
        )
        if image_id not in images or category_id not in name_of:
            missing = f"image {image_id}" if image_id not in images else f"category {category_id}"
            raise DataError(f"{file}: annotations[{row}] belongs to {missing}, which the file does not list")
        try:
            x, y, w, h = map(float, bbox)
        except (TypeError, ValueError):
            raise DataError(
                f"{file}: annotations[{row}] has bbox {bbox}; [x, y, width, height] in pixels expected"
            ) from None
        width, height = images[image_id][1]
        try:
            box = box_inside((x, y, x + w, y + h), (width, height))
        except DataError as error:
            where = f"{file}: annotations[{row}] of image {image_id} ({width}x{height})"
            flaws.setdefault(image_id, f"{where} {error}: bbox {bbox}")
            continue
        (crowds if record.get("iscrowd") else boxes)[image_id, name_of[category_id]].append(box)
    return boxes, crowds


@dataclass(frozen=True)
class Verified:
    """What is known of one image of LVIS, of whose categories only a few were looked for; by name.

    absent    verified not to be shown (`neg_category_ids`)
    partial   shown, but not every instance is annotated (`not_exhaustive_category_ids`)
    """

    absent: frozenset[str]
    partial: frozenset[str]

    @classmethod
    def of(cls, record: dict, name_of: dict) -> "Verified":
        absent, partial = (
            frozenset(name_of[i] for i in record.get(key, ()) if i in name_of)
            for key in ("neg_category_ids", "not_exhaustive_category_ids")
        )
        return cls(absent - partial, partial)

    def exhaustive(self, name: str, shown: bool) -> bool:
        return name not in self.partial and (shown or name in self.absent)


def absent_categories(known: dict[Any, Verified], wanted: list[str], shown: Container) -> Callable[[Any], list[str]]:
    """absent(image id): which of the wanted categories the image is known not to show.

    COCO is annotated in full: all that are not in `shown`, which holds (image id, category). LVIS knows it of a few per
    image, those of `known`.
    """

    def absent(image_id) -> list[str]:
        candidates = known[image_id].absent if image_id in known else wanted
        return [name for name in wanted if name in candidates and (image_id, name) not in shown]

    return absent


def negative_pairs(pairs: Sequence[tuple], absent: Callable, choice: Choice, notes: list[str]) -> list[tuple]:
    """(image id, category) pairs whose right answer is `No Objects`: a share of all pairs, one per image at most."""
    if not 0.0 <= choice.negatives < 1.0:
        raise DataError(f"--negatives {choice.negatives}: a share of all examples, at least 0 and below 1")
    count = round(len(pairs) * choice.negatives / (1.0 - choice.negatives))
    rng = random.Random(f"{choice.seed}/negatives")
    # Few-shot training must not see other images, so negatives come from the images that are already in use.
    used = sorted({image_id for image_id, _ in pairs}, key=str)
    rng.shuffle(used)
    found = []
    for image_id in used:
        if len(found) < count and (names := absent(image_id)):
            found.append((image_id, rng.choice(names)))
    if len(found) < count:
        notes.append(f"--negatives {choice.negatives}: {len(found)} of {count} examples found, one per image at most")
    return found


def every_pair(images: Sequence, wanted: Sequence[str], choice: Choice) -> list[tuple]:
    """Each image with each category, whether it is known to be absent or not: --eval_categories all and listed."""
    refuse(choice, "only with --eval_categories gt; the others ask for what is absent anyway", "negatives")
    if choice.eval_categories == "listed" and choice.categories is None:
        raise DataError("--eval_categories listed: needs --categories, which lists them")
    if choice.eval_categories == "all" and choice.categories is not None:
        raise DataError("--eval_categories all: asks for all categories, so without --categories; to restrict: listed")
    return [(image_id, name) for image_id in images for name in wanted]


# ------------------------------------------------------------------------------------------------
# Classification: a labels file, the lists of the published datasets, or class folders.

CLASS_LAYOUT = """Images with class names are read from the first of these that is there:
  DIR/labels.csv, .json or .jsonl     rows with file (within DIR), class_name and split (train, val or test)
  DIR/annotations/trainval.txt        Oxford-IIIT Pet as published (task pets), with test.txt and DIR/images/
  DIR/data/images_variant_...txt      FGVC-Aircraft as published (task aircraft), with DIR/data/images/
  DIR/train/CLASS/*.jpg               class folders, with DIR/val/CLASS/ or DIR/test/CLASS/"""

Labeled = tuple[str, Path, Any]  # where it is said, for errors; the image; its class name, or all accepted names


def read_classes(
    data: str, split: str, choice: Choice = Choice(), published: Callable[[Path, str], list[Labeled]] | None = None
) -> tuple[list[Example], list[str]]:
    """Read images with class names, one example each; layout: CLASS_LAYOUT.

    published: reads the lists that the dataset came with, and returns nothing where they are not.
    """
    refuse(choice, "a question about the class names no category", "negatives", "eval_categories")
    root = Path(data)
    if not root.is_dir():
        raise DataError(f"{root}: no such folder. {CLASS_LAYOUT}")
    labeled = labels_file(root, split) or (published and published(root, split)) or class_folders(root, split)
    notes: list[str] = []
    images, flaws, listed = defaultdict(list), [], functools.cache(_names_in)
    for number, (where, path, name) in enumerate(labeled):
        try:
            solution = class_solution(name)
            if path.name not in listed(path.parent):
                raise DataError(f"{path}: no such image")
        except DataError as error:
            flaws.append(f"{where}: {error}")
            continue
        id = f"{split}/{str(path).removeprefix(f'{root}/')}"
        example = Example(id, (path,), None, solution, class_of(solution), image_id=number)
        images[example.category].append(example)
    leave_out(root, flaws, choice, notes)
    if images and all(name.isdecimal() for name in images):
        raise DataError(
            f"{root}: the classes are called {', '.join(list(images)[:3])} ...; a model can answer names only, "
            "so a labels file has to give them"
        )
    wanted = wanted_categories(root, list(images), choice.categories)
    taken = take_shots(root, {name: images[name] for name in wanted}, choice, notes)
    return [example for found in taken.values() for example in found], notes


def labels_file(root: Path, split: str) -> list[Labeled]:
    """The images of a split in DIR/labels.csv, .json or .jsonl."""
    files = [root / name for name in ("labels.csv", "labels.json", "labels.jsonl") if (root / name).is_file()]
    if not files:
        return []
    rows = file_rows(files[0])
    for where, row in rows:
        if not isinstance(row, dict) or not all(row.get(key) for key in ("file", "class_name", "split")):
            raise DataError(f"{where}: file, class_name and split expected, found {str(row)[:200]}")
    there = {row["split"] for _, row in rows}
    name = _pick_split(files[0], split, there, f"Its rows have split {', '.join(sorted(there))}")
    return [(where, root / row["file"], row["class_name"]) for where, row in rows if row["split"] == name]


def pets_lists(root: Path, split: str) -> list[Labeled]:
    """Oxford-IIIT Pet: annotations/{trainval,test}.txt, lines such as `Abyssinian_100 1 1 1`; the breed is in the name."""
    file = root / "annotations" / {"train": "trainval.txt", "val": "test.txt"}[split]
    names = [(where, line.split()[0]) for where, line in _lines(file)] if file.is_file() else []
    return [(where, root / "images" / f"{name}.jpg", name.rpartition("_")[0]) for where, name in names]


def aircraft_lists(root: Path, split: str) -> list[Labeled]:
    """FGVC-Aircraft: images_variant_{trainval,train,test}.txt, lines such as `1025794 707-320`."""
    parts = {"train": ("trainval", "train"), "val": ("test",)}[split]
    files = (base / f"images_variant_{part}.txt" for base in (root, root / "data") for part in parts)
    file = next((file for file in files if file.is_file()), None)
    split_lines = ((where, *line.partition(" ")) for where, line in (_lines(file) if file else ()))
    return [(where, file.parent / "images" / f"{image}.jpg", name) for where, image, _, name in split_lines]


def class_folders(root: Path, split: str) -> list[Labeled]:
    folder = root / _pick_split(root, split, _names_in(root), CLASS_LAYOUT)
    endings = Image.registered_extensions()
    return [
        (f"class folder {kind}", path, kind.name)
        for kind in sorted(folder.iterdir()) if kind.is_dir()
        for path in sorted(kind.iterdir()) if path.suffix.lower() in endings
    ]  # fmt: skip


# ------------------------------------------------------------------------------------------------
# Reasoning grounding: ReasonSeg, the data of LISA.

LISA_LAYOUT = """A ReasonSeg folder looks like this:
  DIR/train/NAME.jpg    DIR/train/NAME.json    {"text": ["..."], "shapes": [{"label": "target", "points": [[x, y], ...]}]}
  DIR/val/ (or test/)   the same, for evaluation"""


def read_lisa(data: str, split: str, choice: Choice = Choice()) -> tuple[list[Example], list[str]]:
    """Read ReasonSeg: one example per instruction in `text`; the box is the bounds of all `target` polygons.

    Other shapes (`ignore`, `flag`) do not count, as in LISA's own reader.
    """
    refuse(choice, "instructions have no categories", "categories", "shots", "negatives", "eval_categories")
    folder = Path(data) / _pick_split(data, split, _names_in(Path(data)), LISA_LAYOUT)
    files = sorted(folder.glob("*.json"))
    if not files:
        raise DataError(f"{folder}: no .json files. {LISA_LAYOUT}")
    examples, flaws, notes = [], [], []
    for number, file in enumerate(files):
        try:
            path, size, box, texts = reasonseg_image(file)
        except DataError as error:
            flaws.append(str(error))
            continue
        for i, text in enumerate(texts):
            examples.append(Example(f"{split}/{file.stem}/{i}", (path,), size, box, text, image_id=number))
    leave_out(folder, flaws, choice, notes)
    return examples, notes


def reasonseg_image(file: Path) -> tuple[Path, tuple[int, int], Box, list[str]]:
    """(image, its size, the box, instructions) of one ReasonSeg file."""
    table = _read_json(file, ("UTF-8", "cp1252"))  # both occur among the published files
    path = file.with_suffix(".jpg")
    size = image_size(path)
    texts, shapes = (_field(file, "the file", 0, table, key) for key in ("text", "shapes"))
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) and text.strip() for text in texts):
        raise DataError(f"{file}: 'text' is {str(texts)[:200]}; a list of instructions expected")
    try:
        points = [point for shape in shapes if shape["label"].lower() == "target" for point in shape["points"]]
        xs, ys = zip(*((float(x), float(y)) for x, y in points))
        # A polygon may leave the image, as LISA's masks cut it off too.
        box = box_inside((min(xs), min(ys), max(xs), max(ys)), size, overhang=math.inf)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"{file}: no polygon labeled 'target' with an area within the {size[0]}x{size[1]} image ({error})"
        ) from None
    return path, size, box, texts


# ------------------------------------------------------------------------------------------------
# Rows of any task: JSON and JSON lines files; parquet files, save_to_disk folders and hub names, as the released ViRFT
# sets are.

ROW_LAYOUT = """A row has image or image_path (a file, relative to the rows' folder) or images (a list), problem and solution.
The problem may say with <image> where each image belongs; otherwise they come first.
Boxes in JSON rows need coords too: "pixels" (of the original image), or 1000 if they are 0..1000 and the problem says so."""


def is_table(source: str) -> bool:
    """Whether `source` is for the datasets library: parquet, a save_to_disk folder, or owner/name on the hub."""
    path = Path(source)
    if path.is_dir():
        signs = ("dataset_info.json", "dataset_dict.json", "*.parquet", "data/*.parquet")
        return any(any(path.glob(sign)) for sign in signs)
    return path.suffix == ".parquet" or not path.exists() and bool(re.fullmatch(r"[\w.-]+/[\w.-]+", source))


def read_rows(task: "Task", source: str, split: str, choice: Choice) -> tuple[list[Example], list[str]]:
    """Read rows of ROW_LAYOUT for a task; their problems are the prompts.

    Released tables hold boxes in 0..1000 and say so in their problems: that convention is kept for every model. JSON
    rows have to declare theirs; boxes in pixels are converted to what the model speaks, and the prompt states that.
    """
    refuse(choice, f"the rows of {source} are chosen already", "shots", "negatives", "eval_categories")
    table = is_table(source)
    examples, flaws, notes = [], [], []
    for number, (where, row) in enumerate(table_rows(source, split) if table else file_rows(Path(source))):
        try:
            example = row_example(task, row, Path(source).parent, coords=1000 if table else None)
        except DataError as error:
            flaws.append(f"{where}: {error}; the row is {str(row)[:400]}")
            continue
        examples.append(replace(example, id=f"{source}/{number}", image_id=number))
    leave_out(source, flaws, choice, notes, "rows")
    if split == "val" and Path(source).is_file():
        notes.append(f"{source} has no splits: all its rows are evaluated")
    numbers = {name: i for i, name in enumerate(sorted({example.category for example in examples}), 1)}
    wanted = set(wanted_categories(source, list(numbers), choice.categories))
    return [replace(e, category_id=numbers[e.category]) for e in examples if e.category in wanted], notes


def row_example(task: "Task", row: Any, folder: Path, coords: object) -> Example:
    """One row as an example; coords: what boxes without a declaration are in, None if they must have one."""
    if not isinstance(row, dict) or not isinstance(row.get("problem"), str) or "solution" not in row:
        raise DataError(ROW_LAYOUT)
    given = [row[key] for key in ("image", "image_path", "images") if row.get(key)]
    images = given[0] if len(given) == 1 else []
    images = tuple(folder / i if isinstance(i, str) else i for i in (images if isinstance(images, list) else [images]))
    if not images or not all(isinstance(image, (Path, CellImage)) for image in images):
        raise DataError(f"one of image, image_path and images expected. {ROW_LAYOUT}")
    sizes = [image_size(image) for image in images]  # of all: one that is missing is said now
    solution, coordinates = task.solution(row["solution"]), None
    if task.boxes:
        coords = str(row.get("coords") or coords)
        if coords not in ("pixels", "1000"):
            raise DataError(f'boxes need coords: "pixels" or coords: 1000, found {row.get("coords")!r}. {ROW_LAYOUT}')
        frame, coordinates = (sizes[0], None) if coords == "pixels" else ((1000, 1000), "relative")
        solution = map_boxes(solution, lambda box: to_pixels(box_inside(box, frame), sizes[0], frame))
    quoted = re.search(r"category ['\"]([^'\"]+)['\"]", row["problem"])
    category = str(row.get("category") or class_of(solution) or (quoted.group(1) if quoted else "object"))
    size = sizes[0] if task.boxes else None
    return Example("", images, size, solution, category, question=row["problem"], coordinates=coordinates)


@dataclass(frozen=True, repr=False)
class CellImage:
    """An image in a table, read when it is opened: a dataset need not fit into memory."""

    table: Any
    where: str
    row: int
    column: str
    number: int

    def __repr__(self) -> str:
        return f"{self.where}, {self.column}[{self.number}]"

    def __call__(self) -> io.BytesIO:
        cell = self.table[self.row][self.column]
        cell = cell[self.number] if isinstance(cell, list) else cell
        if isinstance(cell, dict) and cell.get("bytes") is None and cell.get("path"):
            return io.BytesIO(Path(cell["path"]).read_bytes())
        return io.BytesIO(cell["bytes"] if isinstance(cell, dict) else cell)


def table_rows(source: str, split: str) -> Iterator[tuple[str, dict]]:
    """The rows of what is_table says is one, each after where it stands; images become CellImages."""
    import datasets  # imported here: files on disk need none of it

    path = Path(source)
    if path.is_file():
        table = datasets.load_dataset("parquet", data_files=source, split="train")
    elif any((path / name).is_file() for name in ("dataset_info.json", "dataset_dict.json")):
        table = datasets.load_from_disk(source)
    else:
        table = datasets.load_dataset(source)
    if isinstance(table, dict):
        hint = f"It has {', '.join(table)}; for evaluation, --eval_data names other data"
        table = table[_pick_split(source, split, table, hint)]
    for column, feature in table.features.items():  # the bytes as they are, not decoded pictures
        if isinstance(feature, datasets.Image):
            table = table.cast_column(column, datasets.Image(decode=False))
        elif isinstance(getattr(feature, "feature", None), datasets.Image):
            table = table.cast_column(column, datasets.List(datasets.Image(decode=False)))
    for number in range(len(table)):
        where, row = f"{source}: row {number}", table[number]
        for column in row.keys() & {"image", "images"}:
            cells = row[column] if isinstance(row[column], list) else [row[column]]
            row[column] = [
                cell if isinstance(cell, str) else CellImage(table, where, number, column, i)
                for i, cell in enumerate(cells) if cell
            ]  # fmt: skip
        yield where, row


# ------------------------------------------------------------------------------------------------
# Solutions as rows give them, and answers as models write them.


def _as_answer(text: str) -> str:
    return text if "<answer>" in text else f"<answer>{text}</answer>"


def is_box(value: Any) -> bool:
    """Four finite numbers with x1 < x2 and y1 < y2."""
    numbers = isinstance(value, (list, tuple)) and all(isinstance(v, (int, float)) and math.isfinite(v) for v in value)
    return numbers and len(value) == 4 and value[0] < value[2] and value[1] < value[3]


def detection_solution(value: Any) -> tuple[Box, ...]:
    """The boxes of a row's solution: the answer format, or a list of boxes. Raises DataError."""
    found = parse_detections(_as_answer(value)) if isinstance(value, str) else None
    boxes = value if found is None else [box for box, _ in found]
    if not isinstance(boxes, list) or not all(map(is_box, boxes)):
        raise DataError(
            f"solution {str(value)[:200]!r}: expected <answer>[{{'Position': [x1, y1, x2, y2], 'Confidence': 1}}, ...]"
            "</answer>, <answer>No Objects</answer>, or a list of [x1, y1, x2, y2]"
        )
    return tuple(tuple(map(float, box)) for box in boxes)


def grounding_solution(value: Any) -> Box:
    """The box of a row's solution: the answer format, or four numbers. Raises DataError."""
    box = parse_grounding(_as_answer(value)) if isinstance(value, str) else value
    if not is_box(box):
        raise DataError(f"solution {str(value)[:200]!r}: expected <answer>(x1,y1),(x2,y2)</answer> or [x1, y1, x2, y2]")
    return tuple(map(float, box))


def class_solution(value: Any) -> str | tuple[str, ...]:
    """The class name of a row's solution, or all names that are accepted, in plain words. Raises DataError."""
    names = [parse_answer(_as_answer(value))] if isinstance(value, str) else value
    if not isinstance(names, list) or not names or not all(isinstance(n, str) and plain_name(n) for n in names):
        raise DataError(
            f"solution {str(value)[:200]!r}: expected a class name, <answer>it</answer>, or a list of accepted names"
        )
    return plain_name(names[0]) if len(names) == 1 else tuple(map(plain_name, names))


def as_it_is(solution: Any) -> Any:
    """A solution that only the user's reward understands. By name: loaders' processes may have to be told it."""
    return solution


def class_of(solution: Any) -> str | None:
    """The class that a solution names, the first if several names are accepted; None if it names none."""
    first = solution[0] if isinstance(solution, (list, tuple)) and solution else solution
    return first if isinstance(first, str) else None


def detection_answer(
    boxes: Sequence[Box], confidences: Sequence[float] | None = None, digits: int | None = None
) -> str:
    """What stands inside <answer> for these boxes in the model's coordinates: integers, or floats of `digits` decimals."""
    if not boxes:
        return "No Objects"
    confidences = confidences or [1] * len(boxes)
    return str([{"Position": _corners(box, digits), "Confidence": c} for box, c in zip(boxes, confidences)])


def grounding_answer(box: Box, digits: int | None = None) -> str:
    """The same for the one box of a grounding answer."""
    x1, y1, x2, y2 = _corners(box, digits)
    return f"({x1},{y1}),({x2},{y2})"


def _corners(box: Box, digits: int | None) -> list[float]:
    return list(round_box(box)) if digits is None else [round(x, digits) for x in box]


def text_answer(solution: Any, digits: int | None = None) -> str:
    """A class name, or whatever else a row's solution is, as text."""
    return class_of(solution) or str(solution)


# ------------------------------------------------------------------------------------------------
# Prompts, in our words, with the published answer formats and the range in force.


def range_in_words(target: tuple[int, int], coordinates: str) -> str:
    return {
        "relative": "integers from 0 to 1000 relative to the width and height of the image",
        "pixels": f"integer pixels of the image, which is {target[0]} wide and {target[1]} high",
    }[coordinates]


def answer_form(inside: str, think: bool) -> str:
    """How to answer, as all prompts say it; `inside` stands for what belongs into the answer block."""
    form, first = f"<answer>{inside}</answer>", ""
    if think:
        form, first = f"<think> ... </think>{form}", "First reason about what you see. "
    return f"{first}Answer in exactly this form:\n{form}\n"


def detection_prompt(category: str, target: tuple[int, int], coordinates: str, think: bool) -> str:
    """The question of a detection example."""
    form = answer_form("[{'Position': [x1, y1, x2, y2], 'Confidence': 0.87}, ...]", think)
    return (
        f"Find every {category} in the image. {form}"
        f"A position is the left, top, right and bottom edge of a box, in {range_in_words(target, coordinates)}; "
        "a confidence is how sure you are of that box, from 0 to 1 with two decimals. If the image shows none, write No "
        "Objects in place of the list."
    )


def grounding_prompt(instruction: str, target: tuple[int, int], coordinates: str, think: bool) -> str:
    """The question of a grounding example: the instruction may be a question, a command or a description."""
    return (
        f"Find the one region of the image that is meant here: {instruction}\n{answer_form('(x1,y1),(x2,y2)', think)}"
        f"The points are the top left and the bottom right corner of its box, in {range_in_words(target, coordinates)}."
    )


def class_prompt(what: str, thing: str, category: str, target: tuple[int, int], coordinates: str, think: bool) -> str:
    """The question of a classification example, which lists no classes; `category` is the answer, so it is not used."""
    form = answer_form(what, think)
    return f"Which {what} is the {thing} in the image? {form}Write nothing but the {what} inside <answer>."


# ------------------------------------------------------------------------------------------------
# Tasks.


@dataclass(frozen=True)
class Task:
    """All that training and evaluation need to know of a task.

    read      reads the dataset's own layout: (data, split, choice) -> examples, notes; None: the task is rows only
    prompt    (category, target, coordinates, think) -> text; None: every row brings its problem
    solution  a row's `solution` -> Example.solution; raises DataError with what was expected
    parse     completion -> answer, None where it is malformed: the rewards' own parser
    answer    (solution in the model's coordinates, digits) -> what stands inside <answer>
    boxes     whether solutions and answers hold boxes
    rewards   default rewards and weights, names of rewards.REWARDS
    metric    which of evaluate.METRICS is the task's
    asks_for  what --ask has to be told with --categories; None: nothing
    hub_data  the released dataset that is used without --data
    caveat    what has to be said beside the score
    """

    name: str
    read: Callable[[str, str, Choice], tuple[list[Example], list[str]]] | None
    prompt: Callable[[str, tuple[int, int], str, bool], str] | None
    solution: Callable[[Any], Any]
    parse: Callable[[str], Any]
    answer: Callable[..., str]
    boxes: bool
    rewards: dict[str, float]
    metric: str
    asks_for: str | None = None
    hub_data: str | None = None
    caveat: str = ""

    def question(
        self, example: Example, seen_size: tuple[int, int], coordinates: str, think: bool
    ) -> tuple[str, tuple[int, int]]:
        """The prompt of an example and the coordinate size that it speaks: its own question if it came with one."""
        target = model_size(example.coordinates or coordinates, seen_size)
        if example.question is None:
            return self.prompt(example.category, target, coordinates, think), target
        if self.boxes and example.coordinates is None:  # the row's boxes are pixels, which no prompt of it can know
            return f"{example.question}\nCoordinates are {range_in_words(target, coordinates)}.", target
        return example.question, target


detection = partial(
    Task, prompt=detection_prompt, solution=detection_solution, parse=parse_detections, answer=detection_answer, boxes=True,
    rewards={"iou": 1.0, "confidence": 1.0, "format": 1.0}, metric="detection", asks_for="categories",
)  # fmt: skip
classification = partial(
    Task, solution=class_solution, parse=parse_answer, answer=text_answer, boxes=False,
    rewards={"accuracy": 1.0, "format": 1.0}, metric="classification",
)  # fmt: skip
grounding = partial(
    Task, prompt=grounding_prompt, solution=grounding_solution, parse=parse_grounding, answer=grounding_answer, boxes=True,
    rewards={"giou": 1.0, "format": 1.0}, metric="grounding", asks_for="an instruction",
)  # fmt: skip

HUB = "laolao77/ViRFT_"  # where the paper's authors released their training sets

TASKS = {
    task.name: task
    for task in (
        detection("coco", read_coco, hub_data=f"{HUB}COCO"),
        detection("lvis", read_lvis, hub_data=f"{HUB}LVIS_few_shot",
                  caveat="by LVIS's federated rule: boxes of categories that nobody verified in an image are ignored, and so "
                  "are unmatched ones where not every instance is annotated"),
        classification("flowers", read_classes, partial(class_prompt, "species", "flower"),
                       hub_data=f"{HUB}CLS_flower_4_shot"),
        classification("pets", partial(read_classes, published=pets_lists), partial(class_prompt, "breed", "cat or dog"),
                       hub_data=f"{HUB}CLS_pets37_4shot"),
        classification("aircraft", partial(read_classes, published=aircraft_lists),
                       partial(class_prompt, "model", "aircraft"), hub_data=f"{HUB}CLS_fgvc_aircraft_4_shot"),
        classification("cars", read_classes, partial(class_prompt, "make, model and year", "car"),
                       hub_data=f"{HUB}CLS_car196_4shot"),
        grounding("lisa", read_lisa),
        # Rows of your own, with rewards of your own: problem and solution are taken as they are.
        classification("rows", None, None, solution=as_it_is, metric="rewards", asks_for="a question"),
    )
}  # fmt: skip

assert all(name in REWARDS for task in TASKS.values() for name in task.rewards)


def model_answer(
    task: Task, example: Example, target: tuple[int, int], think: bool = True, digits: int | None = None
) -> str:
    """A perfect completion without a thought, in the model's coordinates: to count its tokens, and to test with.

    digits: boxes with so many decimals instead of integers.
    """
    answer = task.answer(model_solution(example, target), digits=digits)
    return f"{'<think></think>' if think else ''}<answer>{answer}</answer>"


def questions(task: Task, picture: Path, asked: str | None) -> list[Example]:
    """Questions without ground truth about a picture of the user's: one per category, or one in all."""
    size = open_image(picture).size
    names = [name.strip() for name in asked.split(",")] if task.asks_for == "categories" else [asked or ""]
    question = None if task.prompt else asked
    return [Example(f"{picture}/{name}", (picture,), size, (), name, question=question) for name in names]


def load_examples(
    task: Task, source: str | None, split: str, max_boxes: int | None = None, limit: int | None = None, **flags
) -> tuple[list[Example], list[str]]:
    """The examples of a split and notes for the user; what `source` points at decides how it is read.

    max_boxes: leave out examples with more boxes. limit: this many examples, chosen by seed. flags: those of Choice.
    """
    choice = Choice(**flags)
    if source is None:
        raise DataError(f"--task {task.name} has no released dataset: --data names yours")
    if Path(source).suffix in (".json", ".jsonl") or is_table(source):
        examples, notes = read_rows(task, source, split, choice)
    elif task.read is None:
        raise DataError(f"--data {source}: --task {task.name} reads rows, from .json, .jsonl or parquet. {ROW_LAYOUT}")
    else:
        examples, notes = task.read(source, split, choice)
    if max_boxes is not None:
        if not task.boxes:
            raise DataError(f"--max_boxes {max_boxes}: --task {task.name} has no boxes")
        kept = [e for e in examples if len(boxes_in(e.solution)) <= max_boxes]
        notes.append(f"--max_boxes {max_boxes}: {len(examples) - len(kept)} examples left out")
        examples = kept
    if limit is not None and limit < len(examples):
        notes.append(f"{limit} of {len(examples)} examples, chosen by seed {choice.seed}")
        examples = random.Random(choice.seed).sample(examples, limit)
    if not examples:
        raise DataError(f"{source}: no example is left of the {split} split")
    chosen = [
        f"{f.name} {value}"
        for f in fields(choice)
        if (value := getattr(choice, f.name)) != f.default or f.name == "seed"
    ]
    return examples, [f"{len(examples)} {split} examples from {source} ({', '.join(chosen)})", *notes]


# ------------------------------------------------------------------------------------------------
# From examples to what a model reads.


@dataclass(frozen=True)
class Prompt:
    """An example as the model meets it.

    inputs    what the processor made of it, a batch of one
    target    (width, height) of the coordinates that the question speaks
    solution  ground truth in those coordinates, for the rewards
    slot      its place among the prompts of a step, over all processes
    skipped   what was wrong with the examples in whose place it stands
    """

    example: Example
    inputs: dict[str, Tensor]
    target: tuple[int, int]
    solution: Any
    slot: int
    skipped: tuple[str, ...] = ()


@dataclass(eq=False)
class Prompts(torch.utils.data.Dataset):
    """Examples -> Prompts, in a loader's workers, ahead of the step: open, resize, write the question, tokenize.

    Indexed by (slot, index of the example). max_length: tokens that a prompt may have; none is ever cut.
    replace_bad: let the next example stand in for one that cannot be opened, so that a step keeps its size.
    """

    task: Task
    examples: list[Example]
    processor: Any
    fit: Fit
    coordinates: str
    think: bool = True
    system_prompt: str | None = None
    max_length: int | None = None
    replace_bad: bool = False

    def __getitem__(self, key: tuple[int, int]) -> Prompt | DataError:
        slot, index = key
        skipped: list[DataError] = []
        while len(skipped) < (len(self.examples) if self.replace_bad else 1):
            try:
                prompt = self.encode(self.examples[(index + len(skipped)) % len(self.examples)], slot)
                return replace(prompt, skipped=tuple(map(str, skipped)))
            except DataError as error:
                skipped.append(error)
        return skipped[0]  # for `whole` to raise: out of a worker it would arrive as a traceback in a string

    def of(self, examples: list[Example]) -> "Prompts":
        """The same encoding of other examples, each of which is wanted for itself."""
        return replace(self, examples=examples, replace_bad=False)

    def encode(self, example: Example, slot: int = 0) -> Prompt:
        """Raises DataError naming the image that cannot be opened or the example that is too long."""
        images = open_images(example, self.fit)
        question, target = self.task.question(example, images[0].size, self.coordinates, self.think)
        messages = [{"role": "user", "content": content_of(question, len(images))}]
        if self.system_prompt is not None:
            messages.insert(0, {"role": "system", "content": [{"type": "text", "text": self.system_prompt}]})
        text = self.processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        inputs = dict(self.processor(text=[text], images=images, return_tensors="pt"))
        inputs.pop("labels", None)  # PaliGemma's processor makes some, for supervised training
        length = inputs["input_ids"].shape[1]
        if self.max_length is not None and length > self.max_length:
            raise DataError(
                f"example {example.id}: its prompt has {length} tokens, and the model's positions leave {self.max_length} beside "
                "the completion; prompts are never cut: lower --max_pixels or --max_completion_tokens"
            )
        return Prompt(example, inputs, target, model_solution(example, target), slot)


IMAGE_MARK = "<image>"  # in a question, where one of its images belongs


def content_of(question: str, images: int) -> list[dict[str, str]]:
    """The message's parts: images where the question marks them, otherwise before it. DataError for a wrong number of marks."""
    texts = question.split(IMAGE_MARK)
    if len(texts) == 1:
        return [*[{"type": "image"}] * images, {"type": "text", "text": question}]
    if len(texts) != images + 1:
        raise DataError(
            f"question {question[:200]!r} marks {len(texts) - 1} images with {IMAGE_MARK}, there are {images}"
        )
    content = [{"type": "text", "text": texts[0]}]
    for text in texts[1:]:
        content += [{"type": "image"}, {"type": "text", "text": text}]
    return [part for part in content if part != {"type": "text", "text": ""}]


def whole(prompts: list[Prompt | DataError]) -> list[Prompt]:
    """The prompts of one batch, in the main process; raises the error that stands in the place of one."""
    for prompt in prompts:
        if isinstance(prompt, DataError):
            raise prompt
    return prompts


def collate(prompts: Sequence[Prompt], pad_id: int) -> dict[str, Tensor]:
    """Join encoded prompts to one batch: sequences padded on the left, everything else joined along dimension 0.

    A tensor whose first two dimensions are those of input_ids is a sequence. Others (pixels, grids, image sizes) have one
    row per image or patch, in the order of the prompts. All other dimensions are padded with zeros, as processors do.
    """
    length = max(p.inputs["input_ids"].shape[1] for p in prompts)
    batch = {}
    for name, first in prompts[0].inputs.items():
        tensors = [p.inputs[name] for p in prompts]
        if first.shape[:2] == prompts[0].inputs["input_ids"].shape:
            fill = pad_id if name == "input_ids" else 0
            tensors = [F.pad(t, (0, 0) * (t.dim() - 2) + (length - t.shape[1], 0), value=fill) for t in tensors]
        widest = [max(sizes) for sizes in zip(*(t.shape[1:] for t in tensors))]
        batch[name] = torch.cat([_pad_to(t, widest) for t in tensors])
    return batch


def _pad_to(tensor: Tensor, sizes: Sequence[int]) -> Tensor:
    """Zeros behind every dimension but the first, up to `sizes`."""
    missing = [n for size, have in zip(reversed(sizes), reversed(tensor.shape[1:])) for n in (0, size - have)]
    return F.pad(tensor, missing)
