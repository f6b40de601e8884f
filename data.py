"""Tasks: how a dataset on disk becomes images, prompts and solutions.

    reader -> Example -> open_images()     -> images, for the model's own processor
                      -> task.question()   -> the question, which states its coordinate convention
                      -> model_solution()  -> the ground truth that the rewards compare the answer with

There are three kinds of answers: boxes with confidences (detection), a name (classification), one box (grounding).
This file reads COCO folders; all other readers are in extras/readers/. `Prompts` encodes examples
with the model's processor, and `collate` joins them into batches.

Ground-truth boxes are stored in one form only: (x1, y1, x2, y2) floats in pixels of the original image. `to_model` and
`to_pixels` convert between that form and the model's coordinates; prompts, rewards, evaluation and drawing all use this
pair, because mixed-up coordinates are the most reported failure of this method (an IoU reward that stays near 0).

To add a task, write a reader and a prompt and enter them in TASKS. Your own rows need neither: use the task `rows`.
"""

import copy
import csv
import difflib
import importlib
import json
import math
import random
import re
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from rewards import REWARDS, Box, parse_answer, parse_detections, parse_grounding

Size = tuple[int, int]  # (width, height)


class DataError(ValueError):
    """Report data that cannot be used; the message names the file, the row and what was expected."""


# ------------------------------------------------------------------------------------------------
# Coordinates. A convention is just the image size that the model assumes: 1000 x 1000 for every
# image ("relative"), or the size of the image as the model sees it ("pixels").

CONVENTIONS = ("relative", "pixels")

# By config.model_type, from each family's documentation; docs/models.md names the sources. For the others 0..1000 is
# taken, and the start says so.
COORDINATES_OF_FAMILY = {
    "qwen2_5_vl": "pixels",
    **dict.fromkeys(("qwen2_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe"), "relative"),
    **dict.fromkeys(("internvl", "glm4v", "glm4v_moe", "glm46v", "minicpmv4_6"), "relative"),
    **dict.fromkeys(("llava", "llava_next", "llava_onevision"), "relative"),  # they write decimals
}


def model_size(coordinates: str, seen_size: Size) -> Size:
    """Return the size that the model's coordinates refer to; seen_size is the size that the model sees."""
    return {"relative": (1000, 1000), "pixels": seen_size}[coordinates]


def to_model(box: Box, size: Size, target: Size) -> Box:
    """Convert a box from original pixels to the model's coordinates, without rounding; target: see model_size."""
    x, y = target[0] / size[0], target[1] / size[1]
    return (box[0] * x, box[1] * y, box[2] * x, box[3] * y)


def to_pixels(box: Box, size: Size, target: Size) -> Box:
    """Convert a box from the model's coordinates to original pixels; the inverse of to_model."""
    return to_model(box, target, size)


def map_boxes(value: Any, change: Callable[[Box], Any]) -> Any:
    """Apply `change` to every box of a solution or an answer; names and confidences stay. Four numbers are a box."""
    if not isinstance(value, (list, tuple)):
        return value
    if len(value) == 4 and all(isinstance(v, (int, float)) for v in value):
        return change(value)
    return type(value)(map_boxes(part, change) for part in value)


def boxes_in(value: Any) -> list[Box]:
    """Return the boxes of a solution or an answer, in order."""
    found: list[Box] = []
    map_boxes(value, found.append)
    return found


def box_inside(box: Box, size: Size, overhang: float = 1.0) -> Box:
    """Clip a box to the image, as floats. Raises DataError if it is empty or more than `overhang` pixels outside.

    Annotation tools round outward, by at most one pixel.
    """
    x1, y1, x2, y2 = map(float, box)
    width, height = size
    if not all(map(math.isfinite, (x1, y1, x2, y2))):
        raise DataError("is not finite")
    if min(x1, y1) < -overhang or x2 > width + overhang or y2 > height + overhang:
        raise DataError("lies outside the image")
    x1, y1, x2, y2 = max(0.0, x1), max(0.0, y1), min(float(width), x2), min(float(height), y2)
    if not (x1 < x2 and y1 < y2):
        raise DataError("has no area")
    return (x1, y1, x2, y2)


def round_box(box: Box) -> tuple[int, int, int, int]:
    """Round a box to integers; width and height stay at least 1, so that no small object vanishes."""
    x1, y1, x2, y2 = map(round, box)
    return (x1, y1, max(x2, x1 + 1), max(y2, y1 + 1))


# ------------------------------------------------------------------------------------------------
# Images.

Image.MAX_IMAGE_PIXELS = None  # open_image has its own limit, with a message that says what to do
MOST_PIXELS = 178_956_970  # PIL's limit for an error; decoded, such an image takes 0.7 GB
MIN_PIXELS = 3136  # 56 x 56, the published value (Qwen2-VL); smaller images are scaled up
MAX_ASPECT = 200  # Qwen's processors refuse longer images, and there is nothing to learn from such a strip

ImageSource = Path | Callable[[], BinaryIO]  # a file, or a function that opens one (an image in a table)


def show_whole_images(images: Any, max_pixels: int) -> bool:
    """Let an image processor show whole images, of at most max_pixels; return whether it has such a limit.

    The processor keeps these settings when it is saved, so whoever loads it sees the same pixels.
    """
    if getattr(images, "do_center_crop", False):  # squash an image to the size of the crop instead
        images.size, images.do_center_crop = images.crop_size, False
    size = {edge: value for edge, value in dict(images.size or {}).items() if value}
    if not size.keys() >= {"shortest_edge", "longest_edge"} or not hasattr(images, "merge_size"):
        return False
    times = 2 if type(images).__name__.startswith("Glm") else 1  # GLM-V counts each image as two frames
    most = min(max_pixels, size["longest_edge"] // times)  # areas, not edges
    least = min(max(MIN_PIXELS, size["shortest_edge"] // times), most)
    images.size = {"shortest_edge": least * times, "longest_edge": most * times}
    return True


PLAIN = {"do_normalize": False, "do_rescale": False, "return_tensors": "pt"}  # numbers stay gray levels


@cache
def seen_size(images: Any, size: Size) -> Size:
    """Return the (width, height) in pixels at which a model sees an image of `size`, by what its processor returns.

    images: the image processor. Raises DataError where it does not tell: it makes tiles or adds padding.
    """
    try:
        inputs = images(images=[Image.new("RGB", size, "white")], **PLAIN)
    except ValueError as error:  # such as a strip that is too long for a processor
        raise DataError(f"{type(images).__name__} refuses an image of {size[0]}x{size[1]}: {error}") from None
    fixed, pixels = dict(images.size or {}), inputs["pixel_values"]
    if (pixels > 254).all():  # no padding
        if "image_grid_thw" in inputs:
            _, rows, columns = inputs["image_grid_thw"][0].tolist()
            return columns * images.patch_size, rows * images.patch_size
        if pixels.dim() == 4 and (len(pixels), *pixels.shape[2:]) == (1, fixed.get("height"), fixed.get("width")):
            return fixed["width"], fixed["height"]
    name = type(images).__name__
    raise DataError(f"{name} does not tell the size that the model sees, which pixels need: --coordinates relative")


@contextmanager
def opened(source: ImageSource) -> Iterator[Image.Image]:
    """Open an image without decoding it. Raises DataError, naming it, if it is missing, cut off or not an image."""
    try:
        # Given a path, Pillow may map the file, and read a turned TIFF's rows at its upright width.
        with source.open("rb") if isinstance(source, Path) else source() as file, Image.open(file) as image:
            yield image
    except Exception as error:  # PIL's plugins raise what they like
        what = "no format that Pillow reads" if isinstance(error, UnidentifiedImageError) else error
        why = "no such image" if isinstance(error, FileNotFoundError) else f"not a whole image ({what})"
        raise error if isinstance(error, DataError) else DataError(f"{source}: {why}") from None


def open_image(source: ImageSource, expected_size: Size | None = None) -> Image.Image:
    """Decode an image to RGB: turned upright by its EXIF tag, transparency on white.

    expected_size: (width, height) according to the annotations. Raises DataError, naming the file, for an image that
    does not open, has another size, is a strip beyond MAX_ASPECT, or has more pixels than MOST_PIXELS; JPEGs of
    that size are decoded at a fraction of it. Gray levels of more than 8 bits are stretched to their range.
    """
    with opened(source) as file:
        width, height = upright_size(source, file, expected_size)
        if width * height > MOST_PIXELS:
            shrink = 2 ** math.ceil(math.log(width * height / MOST_PIXELS, 4))
            file.draft("RGB", (file.width // shrink, file.height // shrink))
        if math.prod(file.size) > MOST_PIXELS:
            raise DataError(f"{source}: the image is {width}x{height}, above {MOST_PIXELS:,} pixels: make it smaller")
        image = ImageOps.exif_transpose(file)
        if image.mode.startswith(("I", "F")):  # converting these would clip them to 0..255
            warnings.warn("images with more than 8 bits of gray are stretched to their range", stacklevel=2)
            gray = np.ma.masked_invalid(np.asarray(image, float))  # what is not finite becomes black
            low, high = gray.min(), gray.max()
            image = Image.fromarray(np.uint8((gray.filled(low) - low) * 255 / max(high - low, 1e-9)))
        if "A" in image.getbands() or "transparency" in image.info:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")


def image_size(source: ImageSource, expected_size: Size | None = None) -> Size:
    """Read the (width, height) of the upright image from the file's header. Raises DataError as open_image does."""
    with opened(source) as image:
        return upright_size(source, image, expected_size)


def upright_size(source: ImageSource, image: Image.Image, expected_size: Size | None) -> Size:
    """Return the (width, height) of an open image, turned by its EXIF tag. Raises DataError as open_image does."""
    # Orientations 5 to 8 swap width and height; PIL already swaps them for TIFF. A PNG's own getexif would decode it.
    sideways = image.format != "TIFF" and Image.Image.getexif(image).get(0x0112) in (5, 6, 7, 8)
    width, height = size = image.size[::-1] if sideways else image.size
    if max(size) > MAX_ASPECT * min(size):
        raise DataError(f"{source}: the image is {width}x{height}, an aspect ratio above {MAX_ASPECT}")
    if expected_size and size != tuple(expected_size):
        told = "x".join(map(str, expected_size))
        raise DataError(f"{source}: the image is {width}x{height} once upright, its annotation says {told}")
    return size


# ------------------------------------------------------------------------------------------------
# Examples.


@dataclass(frozen=True)
class Example:
    """Hold one question about one or several images, with its ground truth."""

    id: str  # unique within the dataset and the same in every run: it seeds the sampling noise
    images: tuple[ImageSource, ...]  # nothing is decoded before open_images
    size: Size | None  # of the first image in original pixels, the frame of all boxes; None without boxes
    # Detection: boxes in original pixels, () if the category is absent. Grounding: one box in original pixels.
    # Classification: the class name, or all accepted names. Task `rows`: what the row says.
    solution: Any
    category: str  # the category or instruction asked for, or the class; scores are also reported by category
    crowds: tuple[Box, ...] = ()  # regions that detection scores ignore (COCO's iscrowd), in original pixels
    exhaustive: bool = True  # the solution holds every instance; if not, scores ignore boxes that match nothing
    image_id: int = 0  # groups the examples of one image, for scores over images
    category_id: int = 0  # COCO's
    question: str | None = None  # a prompt that came with the data; None: the task writes it
    coordinates: str | None = None  # the convention that `question` uses; None: that of the model family


def open_images(example: Example) -> list[Image.Image]:
    """Load the images of an example: decoded, upright, RGB. The model's processor resizes them."""
    return [open_image(example.images[0], example.size), *map(open_image, example.images[1:])]


def model_solution(example: Example, target: Size) -> Any:
    """Return the ground truth in the model's coordinates, not rounded: what rewards compare an answer with."""
    if example.size is None:
        return example.solution
    return map_boxes(example.solution, lambda box: to_model(box, example.size, target))


# ------------------------------------------------------------------------------------------------
# Parts of all readers. A reader is a function (data, split, choice) -> Found, with split "train" or
# "val". It raises DataError naming file, row and what was expected.

Found = tuple[list[Example], list[str]]  # examples, and notes for the user


@dataclass(frozen=True)
class Choice:
    """Select the part of a dataset to use; virft.py has a flag for each field."""

    categories: str | None = None  # names separated by commas, or a split of extras/readers/choose.py; None: all
    shots: int | None = None  # images per category, chosen by seed; None: all
    negatives: float = 0.0  # share of examples that ask for a category that the image does not show
    eval_categories: str = "gt"  # asked of each image: those it shows and negatives; all; listed, those of `categories`
    seed: int = 0
    skip_bad_images: bool = False  # leave out and count bad images or rows, which are otherwise an error
    box_format: str = "auto"  # of the boxes in tables with a column `objects`, and in COCO files
    one_split: bool = True  # data that has no splits may be read for this one


def plain_name(name: str) -> str:
    """Write a category in plain words: LVIS and class folders use underscores for spaces."""
    return name.replace("_", " ").strip()


def plain_names(text: str) -> list[str]:
    """Read names separated by commas, in plain words; a name with a comma stands in double quotes."""
    return [plain_name(name) for name in next(csv.reader([text], skipinitialspace=True))]


def wanted_categories(where: object, known: Sequence[str], categories: str | None) -> list[str]:
    """Return the known names that --categories asks for; underscores and spaces are equivalent."""
    if categories is None:
        return list(known)
    categories = choose.published(categories, known) if (choose := extra("readers.choose")) else categories
    name_of = {plain_name(name): name for name in known}
    wanted = plain_names(categories)
    for name in wanted:
        if name not in name_of:
            near = difflib.get_close_matches(name, list(name_of), 3) or list(name_of)[:5]
            raise DataError(f"--categories: '{name}' is not in {where}; near it: {', '.join(near)}")
    return [name_of[name] for name in dict.fromkeys(wanted)]


def leave_out(where: object, flaws: Sequence[str], choice: Choice, notes: list[str], what: str = "images") -> None:
    """Raise DataError for the first of the bad images or rows; with --skip_bad_images, add their count to the notes."""
    if flaws and not choice.skip_bad_images:
        raise DataError(f"{flaws[0]}. Fix it, or leave out {len(flaws)} such {what}: --skip_bad_images true")
    if flaws:
        notes.append(f"{where}: {len(flaws)} {what} skipped; first: {flaws[0]}")


def refuse(choice: Choice, reason: str, *flags: str) -> None:
    """Raise DataError if one of these flags is set, for readers that do not support them."""
    for flag in flags:
        if getattr(choice, flag) != getattr(Choice, flag):
            raise DataError(f"--{flag} {getattr(choice, flag)}: {reason}")


def extra(name: str, asked_by: str | None = None) -> Any:
    """Import extras/NAME.py. Without the folder: SystemExit that names what asked for it; None if nothing did."""
    try:
        return importlib.import_module(f"extras.{name}")
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith("extras"):
            raise  # a package that it needs
        if asked_by:
            file = f"extras/{name.replace('.', '/')}.py"
            raise SystemExit(f"{asked_by} needs {file}: copy the folder extras beside virft.py") from None


def extra_reader(asked_by: str, module: str, function: str, *args) -> Any:
    """Call a function of extras/readers/MODULE.py. A named function, because tasks are pickled for loaders' workers."""
    return getattr(extra(f"readers.{module}", asked_by), function)(*args)


def read_text(file: Path, encoding: str = "UTF-8-SIG") -> str:
    """Read a text file, with or without a byte order mark. Raises DataError if it is missing or not such text."""
    try:
        return file.read_text(encoding=encoding)
    except FileNotFoundError:
        raise DataError(f"{file}: no such file") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: not {encoding} text ({error})") from None


def read_json(file: Path, encoding: str = "UTF-8-SIG") -> Any:
    """Read a JSON file. Raises DataError, naming line and column, if it is not JSON."""
    try:
        return json.loads(read_text(file, encoding))
    except json.JSONDecodeError as error:
        why = "one row a line belongs in a .jsonl file" if error.msg == "Extra data" else "is the file cut off?"
        raise DataError(f"{file}: line {error.lineno}, column {error.colno}: not JSON ({error.msg}); {why}") from None


def append_rows(file: Path, rows: Sequence[dict]) -> None:
    """Append JSON lines in one write, so that an interruption leaves at most one unfinished line at the end."""
    with file.open("a", encoding="utf-8") as out:
        out.write("".join(json.dumps(row) + "\n" for row in rows))


def names_in(folder: Path) -> set[str]:
    """List a folder. Readers list each folder once: looking up every image takes minutes on network disks."""
    return {entry.name for entry in folder.iterdir()} if folder.is_dir() else set()


def few(names: Sequence[str]) -> str:
    """List the first names, and how many there are."""
    return ", ".join(map(str, names[:5])) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


# ------------------------------------------------------------------------------------------------
# Detection: COCO's annotation files. One example per (image, category).

COCO_LAYOUT = """A COCO folder looks like this:
  DIR/annotations/instances_train2017.json    (or directly in DIR)
  DIR/annotations/instances_val2017.json      (only for evaluation)
  DIR/train2017/000000000009.jpg ...
  DIR/val2017/000000000139.jpg ...
To see the whole thing run without data of your own: bash run.sh"""

DETECTION_FIELDS = {  # the lists of an annotation file, and what every record in them must have
    "images": ("id",),
    "annotations": ("image_id", "category_id"),
    "categories": ("id", "name"),
}

Annotations = tuple[Path, dict[str, list], list[ImageSource | None]]  # a file, its content, each of its images


def read_coco(data: str, split: str, choice: Choice = Choice()) -> Found:
    """Read the annotation file of a split and its images: COCO_LAYOUT, or an export that extras/readers/ knows."""
    root = Path(data)
    if not (file := annotation_file(root, f"instances_{split}*.json")) and (others := extra("readers.exports")):
        file = others.coco_export(root, split, choice)
    if not file:
        raise DataError(f"{root}: no file instances_{split}*.json, or no folder (exports need extras/). {COCO_LAYOUT}")
    table = read_table(file, DETECTION_FIELDS)
    return detection_examples((file, table, image_paths(file, table["images"])), split, choice)


def annotation_file(root: Path, pattern: str) -> Path | None:
    """Return the one file of a pattern in DIR/annotations or DIR, None without one. Raises DataError for several."""
    found = [file for folder in (root / "annotations", root) for file in sorted(folder.glob(pattern))]
    if len(found) > 1:
        raise DataError(f"{root}: {len(found)} files {pattern}, one expected")
    return found[0] if found else None


def read_table(file: Path, needed: dict[str, tuple]) -> dict[str, list]:
    """Read an annotation file; needed: its lists and the fields of their records, as DETECTION_FIELDS."""
    table = read_json(file)
    for part, keys in needed.items():
        if not isinstance(table, dict) or not isinstance(table.get(part), list):
            raise DataError(f"{file}: no list '{part}' at the top level; such a file has {', '.join(needed)}")
        for row, record in enumerate(table[part]):
            for key in keys:
                if not isinstance(record, dict) or key not in record:
                    raise DataError(f"{file}: {part}[{row}] has no '{key}'; it is {str(record)[:200]}")
    return table


def image_paths(file: Path, records: list[dict]) -> list[Path | None]:
    """Find the images of records in the folders around `file`: by file_name; if none is found so, by base name.

    An image that is missing gets the path at which it was expected. Raises DataError if two records find the same file.
    """
    name, around = re.sub("^(instances|captions)_", "", file.stem), (file.parent, file.parent.parent)
    folders = [p / part for p in around for part in (name, f"images/{name}", "", "images", "data", "JPEGImages")]
    names = [n.replace("\\", "/") if isinstance(n := r.get("file_name"), str) else "" for r in records]
    listed, users = cache(names_in), {}
    for parts in (names, [Path(name).name for name in names]):
        places = [[folder / part for folder in folders if part] for part in parts]
        if any(found := [next((p for p in row if p.name in listed(p.parent)), None) for row in places]):
            break
    if any(names) and not any(found):
        sought = (
            f"{next(filter(None, names))} in {around[0]} and {around[1]}, and in their {name}, images, data, JPEGImages"
        )
        raise DataError(f"{file}: none of its images is there. Sought: {sought}. Link their folder as `images`")
    for row, path in enumerate(found):
        if path and users.setdefault(path, row) != row:
            raise DataError(f"{file}: images[{users[path]}] and images[{row}] are the same file {path}")
    root = next((row.index(path) for row, path in zip(places, found) if path), 0)
    return [path or (row[root] if row else None) for row, path in zip(places, found)]


def detection_examples(
    annotations: Annotations, split: str, choice: Choice, verified: Callable[[Any, str, bool], bool] | None = None
) -> Found:
    """Make an example of each image and category.

    verified(image id, name, shown): whether the file is known to hold every instance of the category in the
    image; shown: whether it holds any. None: every image is annotated in full, as COCO's are.
    """
    file, table, paths = annotations
    known, notes = verified or (lambda image_id, name, shown: True), []
    if others := extra("readers.exports"):
        table = others.tidy(file, table, paths, choice, notes)
    name_of = {record["id"]: record["name"] for record in table["categories"]}
    id_of = {name: category_id for category_id, name in name_of.items()}
    images, flaws = annotated_images(file, table["images"], paths)
    boxes, crowds = annotated_boxes(file, table["annotations"], images, name_of, flaws)
    leave_out(file, list(flaws.values()), choice, notes)
    usable, seen = [image_id for image_id in images if image_id not in flaws], boxes.keys() | crowds.keys()
    annotated = {name for _, name in seen}
    wanted = wanted_categories(file, list(id_of), choice.categories)
    if unused := [name for name in wanted if name not in annotated]:
        notes.append(f"{file}: no image shows {few(unused)}")
        if choice.categories is None and not verified:  # such as Roboflow's root: images may show it, unannotated
            wanted = [name for name in wanted if name not in unused]
    shown = {name: [i for i in usable if (i, name) in boxes] for name in wanted}
    pairs = [(image_id, name) for name, ids in shown.items() for image_id in ids]
    if choice.shots or choice.negatives or choice.eval_categories != "gt":
        asked = "--shots, --negatives or --eval_categories"
        pairs = extra_reader(asked, "choose", "choose_pairs", file, usable, shown, seen, known, choice, notes)
    if not pairs:
        why = next(iter(flaws.values()), f"no usable image shows {few(wanted)}")
        raise DataError(f"{file}: no example is left: {why}")
    examples = []
    for image_id, name in pairs:
        path, size = images[image_id]
        targets, ignored = (tuple(found.get((image_id, name), ())) for found in (boxes, crowds))
        exhaustive, id = known(image_id, name, bool(targets)), f"{split}/{image_id}/{name}"
        examples.append(Example(id, (path,), size, targets, name, ignored, exhaustive, image_id, id_of[name]))
    return examples, notes


def annotated_images(file: Path, rows: list, paths: Sequence[ImageSource | None]) -> tuple[dict, dict]:
    """Return {image id: (source, size)} and {image id: what is wrong with it}."""
    images, flaws, listed = {}, {}, cache(names_in)
    for row, (record, path) in enumerate(zip(rows, paths)):
        image_id, size = record["id"], (record.get("width"), record.get("height"))
        images[image_id], where = (path, size), f"{file}: images[{row}]"
        if path is None:
            flaws[image_id] = f"{where} has no 'file_name': {str(record)[:200]}"
        elif isinstance(path, Path) and path.name not in listed(path.parent):
            flaws[image_id] = f"{path}: no such image (images[{row}] of {file})"
        elif not all(isinstance(side, int) and side > 0 for side in size) or max(size) > MAX_ASPECT * min(size):
            flaws[image_id] = f"{where} is {size[0]}x{size[1]}: positive, of a ratio up to {MAX_ASPECT}, expected"
    return images, flaws


def annotated_boxes(file: Path, rows: list, images: dict, name_of: dict, flaws: dict) -> tuple[dict, dict]:
    """Return {(image id, category): boxes} of targets and of crowd regions; adds what is wrong to `flaws`."""
    boxes, crowds, broken = defaultdict(dict), defaultdict(dict), set(flaws)  # dict: duplicates count once
    for row, record in enumerate(rows):
        image_id, category_id, bbox = record["image_id"], record["category_id"], record.get("bbox")
        where = f"{file}: annotations[{row}]"
        if image_id not in images or category_id not in name_of:
            missing = f"image {image_id}" if image_id not in images else f"category {category_id}"
            flaws.setdefault(image_id, f"{where} belongs to {missing}, which the file does not list")
            continue
        if image_id in broken:  # its size may be missing
            continue
        width, height = images[image_id][1]
        try:
            x, y, w, h = map(float, bbox)
            box = box_inside((x, y, x + w, y + h), (width, height))
        except (TypeError, ValueError) as error:  # a DataError is a ValueError
            why = error if isinstance(error, DataError) else "has no [x, y, width, height] in pixels"
            flaws.setdefault(image_id, f"{where} of image {image_id} ({width}x{height}) {why}: bbox {bbox}")
            continue
        (crowds if record.get("iscrowd") else boxes)[image_id, name_of[category_id]][box] = None
    return boxes, crowds


# ------------------------------------------------------------------------------------------------
# Answers as models write them.


def class_of(solution: Any) -> str | None:
    """Return the class that a solution names, the first of several accepted names; None if it names none."""
    first = solution[0] if isinstance(solution, (list, tuple)) and solution else solution
    return first if isinstance(first, str) else None


def detection_answer(
    boxes: Sequence[Box], confidences: Sequence[float] | None = None, digits: int | None = None
) -> str:
    """Write boxes in the model's coordinates as the text inside <answer>: integers, or floats of `digits` decimals."""
    if not boxes:
        return "No Objects"
    confidences = confidences or [1] * len(boxes)
    return str([{"Position": _corners(box, digits), "Confidence": c} for box, c in zip(boxes, confidences)])


def grounding_answer(box: Box, digits: int | None = None) -> str:
    """Write one box as the text inside <answer>, with numbers as in detection_answer."""
    x1, y1, x2, y2 = _corners(box, digits)
    return f"({x1},{y1}),({x2},{y2})"


def _corners(box: Box, digits: int | None) -> list[float]:
    return list(round_box(box)) if digits is None else [round(x, digits) for x in box]


def text_answer(solution: Any, digits: int | None = None) -> str:
    """Write a class name, or any other solution of a row, as text, numbers as `accuracy_reward` reads them."""
    return class_of(solution) or (f"{solution:.15g}" if isinstance(solution, float) else str(solution))


# ------------------------------------------------------------------------------------------------
# Prompts, in our words, with the published answer formats and the coordinate range in force.


def range_in_words(target: Size, coordinates: str) -> str:
    """Describe the coordinates that a prompt asks for."""
    return {
        "relative": "integers from 0 to 1000 relative to the width and height of the image",
        "pixels": f"integer pixels of the image, which is {target[0]} wide and {target[1]} high",
    }[coordinates]


def answer_form(inside: str, think: bool) -> str:
    """Describe the form of an answer; `inside` is a placeholder for the text of the answer block."""
    form, first = f"<answer>{inside}</answer>", ""
    if think:
        form, first = f"<think> ... </think>{form}", "First reason about what you see. "
    return f"{first}Answer in exactly this form:\n{form}\n"


def detection_prompt(category: str, target: Size, coordinates: str, think: bool) -> str:
    """Write the question of a detection example."""
    form = answer_form("[{'Position': [x1, y1, x2, y2], 'Confidence': 0.87}, ...]", think)
    return (
        f"Find every {category} in the image. {form}"
        f"A position is the left, top, right and bottom edge of a box, in {range_in_words(target, coordinates)}; "
        "a confidence is how sure you are of that box, from 0 to 1 with two decimals. If the image shows none, write "
        "No Objects in place of the list."
    )


def grounding_prompt(instruction: str, target: Size, coordinates: str, think: bool) -> str:
    """Write the question of a grounding example; the instruction may be a question, a command or a description."""
    return (
        f"Find the one region of the image that is meant here: {instruction}\n{answer_form('(x1,y1),(x2,y2)', think)}"
        f"The points are the top left and the bottom right corner of its box, in {range_in_words(target, coordinates)}."
    )


def class_prompt(what: str, thing: str, category: str, target: Size, coordinates: str, think: bool) -> str:
    """Write the question of a classification example. It lists no classes; `category`, the answer, is not used."""
    form = answer_form(what, think)
    return f"Which {what} is the {thing} in the image? {form}Write nothing but the {what} inside <answer>."


# ------------------------------------------------------------------------------------------------
# Tasks.


@dataclass(frozen=True)
class Task:
    """Describe a task to training and evaluation."""

    name: str
    read: Callable[[str, str, Choice], Found] | None  # reader of the dataset's own layout; None: only rows are read
    # (category, target, coordinates, think) -> the question; None: every row brings its own.
    prompt: Callable[[str, Size, str, bool], str] | None
    parse: Callable[[str], Any]  # completion -> answer, None if malformed: the rewards' own parser
    answer: Callable[..., str]  # (solution in the model's coordinates, digits) -> the text inside <answer>
    boxes: bool  # whether solutions and answers hold boxes
    rewards: dict[str, float]  # default rewards, by their names in rewards.REWARDS, and weights
    metric: str  # which of evaluation's METRICS is reported
    asks_for: str | None = None  # what --ask needs from --categories; None: nothing
    hub_data: str | None = None  # the released dataset that is used without --data
    caveat: str = ""  # a remark to print with the score

    def question(self, example: Example, seen_size: Size, coordinates: str, think: bool) -> tuple[str, Size]:
        """Return the prompt of an example, its own if it came with one, and the size that its coordinates refer to."""
        target = model_size(example.coordinates or coordinates, seen_size)
        if example.question is None:
            return self.prompt(example.category, target, coordinates, think), target
        if self.boxes and example.coordinates is None:  # boxes in pixels: the row's own prompt cannot state the range
            return f"{example.question}\nCoordinates are {range_in_words(target, coordinates)}.", target
        return example.question, target


detection = partial(
    Task, prompt=detection_prompt, parse=parse_detections, answer=detection_answer,
    boxes=True, rewards={"iou": 1.0, "confidence": 1.0, "format": 1.0}, metric="detection", asks_for="categories",
)  # fmt: skip
classification = partial(
    Task, parse=parse_answer, answer=text_answer, boxes=False,
    rewards={"accuracy": 1.0, "format": 1.0}, metric="classification",
)  # fmt: skip

HUB = "laolao77/ViRFT_"  # where the paper's authors released their training sets

TASKS = {
    task.name: task
    for task in (
        detection("coco", read_coco, hub_data=f"{HUB}COCO"),
        detection("lvis", partial(extra_reader, "--task lvis", "lvis", "read_lvis"), hub_data=f"{HUB}LVIS_few_shot",
                  caveat="by LVIS's federated rule: boxes of categories that nobody verified in an image are ignored, "
                  "and so are unmatched ones where not every instance is annotated"),
        classification("flowers", partial(extra_reader, "--task flowers", "classes", "read_classes"),
                       partial(class_prompt, "species", "flower"), hub_data=f"{HUB}CLS_flower_4_shot"),
        classification("pets", partial(extra_reader, "--task pets", "classes", "read_pets"),
                       partial(class_prompt, "breed", "cat or dog"), hub_data=f"{HUB}CLS_pets37_4shot"),
        classification("aircraft", partial(extra_reader, "--task aircraft", "classes", "read_aircraft"),
                       partial(class_prompt, "model", "aircraft"), hub_data=f"{HUB}CLS_fgvc_aircraft_4_shot"),
        classification("cars", partial(extra_reader, "--task cars", "classes", "read_classes"),
                       partial(class_prompt, "make, model and year", "car"), hub_data=f"{HUB}CLS_car196_4shot"),
        classification("classes", partial(extra_reader, "--task classes", "classes", "read_classes"),
                       partial(class_prompt, "kind of thing", "main object")),
        Task("lisa", partial(extra_reader, "--task lisa", "reasonseg", "read_lisa"), grounding_prompt, parse_grounding,
              grounding_answer, boxes=True, rewards={"giou": 1.0, "format": 1.0},
             metric="grounding", asks_for="an instruction", caveat="IoUs of boxes; LISA's published ones are of masks"),
        # Your own rows with your own rewards: problem and solution are used unchanged.
        classification("rows", None, None, metric="rewards", asks_for="a question"),
    )
}  # fmt: skip

assert all(name in REWARDS for task in TASKS.values() for name in task.rewards)


def model_answer(task: Task, example: Example, target: Size, think: bool = True, digits: int | None = None) -> str:
    """Write the right completion, with an empty thought: to count its tokens, to score it, and for --sft."""
    answer = task.answer(model_solution(example, target), digits=digits)
    return f"{'<think></think>' if think else ''}<answer>{answer}</answer>"


def load_examples(
    task: Task, source: str | None, split: str, max_boxes: int | None = None, limit: int | None = None, **flags
) -> Found:
    """Read the examples of a split, and notes for the user; the kind of `source` decides how it is read.

    max_boxes: leave out examples with more boxes. limit: at most this many examples, chosen by seed. flags: Choice's.
    """
    choice = Choice(**flags)
    if source is None:
        raise DataError(f"--task {task.name} has no released dataset: --data names yours")
    others = extra("readers.exports", None if task.read and Path(source).is_dir() else f"--data {source}")
    examples, notes = (others.reader_of(task, source) if others else task.read)(source, split, choice)
    if others:
        examples = others.whole_images(examples, choice, notes)
    if max_boxes is not None or limit is not None:
        asked = "--max_boxes or --eval_limit"
        examples = extra_reader(asked, "choose", "fewer", task, examples, max_boxes, limit, choice, notes)
    if not examples:
        raise DataError(f"{source}: no example is left of the {split} split")
    settings = {name: value for name, value in asdict(choice).items() if name != "one_split"}.items()
    chosen = [f"{name} {value}" for name, value in settings if value != getattr(Choice, name) or name == "seed"]
    return examples, [f"{len(examples)} {split} examples from {source} ({', '.join(chosen)})", *notes]


# ------------------------------------------------------------------------------------------------
# From examples to the model's inputs.


@dataclass(frozen=True)
class Prompt:
    """Hold an example in the form that the model reads."""

    example: Example
    inputs: dict[str, Tensor]  # the processor's output, a batch of one
    target: Size  # what the coordinates of the question refer to
    solution: Any  # ground truth in those coordinates, for the rewards
    slot: int  # index among the prompts of a step, over all processes
    skipped: tuple[str, ...] = ()  # errors of the examples that this one replaces
    opening: str = ""  # the <think> with which the chat template starts the answer

    def whole_answer(self, text: str) -> str:
        """Return a sampled text with what the chat template opened for it, as it is judged and shown."""
        again = "</think>" in self.opening and text.lstrip().startswith("<think>")  # it thought all the same
        return text if again else self.opening + text


@dataclass(eq=False)
class Prompts(torch.utils.data.Dataset):
    """Encode examples in DataLoader workers, ahead of the step. Indexed by (slot, index of the example)."""

    task: Task
    examples: list[Example]
    processor: Any
    coordinates: str
    think: bool = True
    system_prompt: str | None = None
    max_length: int | None = None  # in tokens; longer prompts are refused, never cut
    replace_bad: bool = False  # replace an example that cannot be encoded by the next: a step keeps its size
    template_options: Sequence[str] = ()  # NAME=VALUE

    def __post_init__(self):
        given, flag, look = self.template_options, "template_options", extra("processors")
        self.template = extra("processors", f"--{flag}").options(flag, given) if given else {}
        for example in self.examples if look and not self.replace_bad else ():  # now, not at the step that meets it
            look.refuse_placeholders(self.processor, example, example.question or "")

    def __getitem__(self, key: tuple[int, int]) -> Prompt | DataError:
        slot, index = key
        skipped: list[DataError] = []
        while len(skipped) < (len(self.examples) if self.replace_bad else 1):
            try:
                prompt = self.encode(self.examples[(index + len(skipped)) % len(self.examples)], slot)
                return replace(prompt, skipped=tuple(map(str, skipped)))
            except DataError as error:
                skipped.append(error)
        return skipped[0]  # returned for `whole` to raise: raised in a worker, it would arrive wrapped in a traceback

    def of(self, examples: list[Example]) -> "Prompts":
        """Return the same encoding for other examples, none of which may be replaced."""
        other = copy.copy(self)  # skips __post_init__: evaluation leaves out what cannot be encoded
        other.examples, other.replace_bad = examples, False
        return other

    def encode(self, example: Example, slot: int = 0) -> Prompt:
        """Encode one example. Raises DataError for an image that does not open and a prompt that is too long."""
        images = open_images(example)
        frame = self.frame(images[0].size, example.coordinates)
        question, target = self.task.question(example, frame, self.coordinates, self.think)
        if look := extra("processors"):
            look.refuse_placeholders(self.processor, example, question)
        content = content_of(question, len(images))
        messages = [{"role": "user", "content": content}]
        if self.system_prompt is not None:
            messages.insert(0, {"role": "system", "content": [{"type": "text", "text": self.system_prompt}]})
        text = self.processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False, **self.template)
        if any(part["type"] == "text" and part["text"].strip() not in text for part in content):
            raise DataError(f"example {example.id}: the model's chat template leaves out the question")
        bos = self.processor.tokenizer.bos_token
        once = {"add_special_tokens": False} if bos and text.startswith(bos) else {}  # the template has written it
        try:
            inputs = dict(self.processor(text=[text], images=images, return_tensors="pt", **once))
        except Exception as error:  # such as a strip that is too long for a processor
            raise DataError(f"example {example.id}: {type(self.processor).__name__} refuses it: {error}") from None
        inputs.pop("labels", None)  # PaliGemma's processor adds labels, for supervised training
        length = inputs["input_ids"].shape[1]
        if self.max_length is not None and length > self.max_length:
            raise DataError(
                f"example {example.id}: its prompt has {length} tokens, and the model has room for {self.max_length} "
                "next to the answer; prompts are never cut: lower --max_pixels, or ask for shorter answers"
            )
        opened = re.search(r"<think>(\s*</think>)?\s*$", text)
        # If the template writes an empty <think></think> itself, it is part of the answer only with --think.
        closed = opened and opened[1]
        opening = opened[0] if opened and (self.think or not closed) else ""
        return Prompt(example, inputs, target, model_solution(example, target), slot, opening=opening)

    def frame(self, size: Size, coordinates: str | None = None) -> Size:
        """Return the size that pixel coordinates refer to, of an image of `size`; with other coordinates `size`."""
        pixels = self.task.boxes and (coordinates or self.coordinates) == "pixels"
        return seen_size(self.processor.image_processor, size) if pixels else size


def turn_end(processor: Any) -> int | None:
    """Return the token with which the chat template ends an assistant's turn, or None if it writes none."""
    asked = {"role": "user", "content": [{"type": "text", "text": "question"}]}
    for answer in ([{"type": "text", "text": "words"}], "words"):  # some templates take a string only
        with suppress(TypeError):
            text = processor.apply_chat_template([asked, {"role": "assistant", "content": answer}], tokenize=False)
            break
    after = text.partition("words")[2].lstrip()
    ids = processor.tokenizer(after, add_special_tokens=False)["input_ids"] if after else []
    return ids[0] if ids and ids[0] in processor.tokenizer.get_added_vocab().values() else None


IMAGE_MARK = "<image>"  # marks the place of an image in a question


def content_of(question: str, images: int) -> list[dict[str, str]]:
    """Split a question into message parts, images at their marks or first. Raises DataError if the counts differ."""
    texts = question.split(IMAGE_MARK)
    if len(texts) == 1:
        return [*[{"type": "image"}] * images, {"type": "text", "text": question}]
    if (marks := len(texts) - 1) != images:
        raise DataError(f"question {question[:200]!r} marks {marks} images with {IMAGE_MARK}, there are {images}")
    content = [{"type": "text", "text": texts[0]}]
    for text in texts[1:]:
        content += [{"type": "image"}, {"type": "text", "text": text}]
    return [part for part in content if part != {"type": "text", "text": ""}]


def draw_examples(
    seed: int, examples: int, prompts_per_step: int, step: int, round: int, slots: Sequence[int]
) -> list[tuple[int, int]]:
    """Return the example of each slot of a step, (slot, index): a function of the seed, so there is no state to save.

    An epoch sees every example once, in its own order. Rounds after 0 use another order.
    """
    places = [divmod((step - 1) * prompts_per_step + slot, examples) for slot in slots]
    return [(slot, epoch_order(seed, round, epoch, examples)[i]) for slot, (epoch, i) in zip(slots, places)]


@cache
def epoch_order(seed: int, round: int, epoch: int, examples: int) -> list[int]:
    return random.Random(f"{seed}/{round}/{epoch}").sample(range(examples), examples)


def sound(prompts: list[Prompt | DataError]) -> list[Prompt]:
    """Return the prompts of a batch, in the main process. Raises the first error among them."""
    if bad := next((prompt for prompt in prompts if isinstance(prompt, DataError)), None):
        raise DataError(f"{bad}. --skip_bad_images true leaves such examples out")
    return prompts


def collate(prompts: Sequence[Prompt], pad_id: int) -> dict[str, Tensor]:
    """Join encoded prompts to a batch: sequences are padded on the left, all tensors joined along dimension 0.

    A tensor is a sequence if its first two dimensions are those of input_ids. Others (pixels, grids, image sizes) have
    one row per image or patch, in the order of the prompts. Other dimensions are padded with zeros, as processors do.
    One exception: MiniCPM-V's pixels [1, 3, 14, patches * 14] are joined along the last dimension.
    """
    length = max(p.inputs["input_ids"].shape[1] for p in prompts)
    batch = {}
    for name, first in prompts[0].inputs.items():
        tensors = [p.inputs[name] for p in prompts]
        if first.shape[:2] == prompts[0].inputs["input_ids"].shape:
            fill = pad_id if name == "input_ids" else 0
            tensors = [F.pad(t, (0, 0) * (t.dim() - 2) + (length - t.shape[1], 0), value=fill) for t in tensors]
        if name == "pixel_values" and "target_sizes" in prompts[0].inputs:
            batch[name] = torch.cat(tensors, -1)
            continue
        widest = [max(sizes) for sizes in zip(*(t.shape[1:] for t in tensors))]
        missing = [[n for most, have in zip(widest[::-1], t.shape[:0:-1]) for n in (0, most - have)] for t in tensors]
        batch[name] = torch.cat([F.pad(t, zeros) for t, zeros in zip(tensors, missing)])
    return batch
