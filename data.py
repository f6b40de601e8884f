"""Tasks: how a dataset on disk becomes (images, prompt, solution).

    reader -> Example -> open_images(fit) -> pictures as the model sees them
                      -> task.prompt()     -> the question, stating the coordinates in force
                      -> model_solution()  -> what the rewards compare the answer with

Ground truth has one canonical store: boxes as (x1, y1, x2, y2) floats in pixels of the original
image. What a model reads and writes is derived from it by one pair of functions, `to_model` and
`to_pixels`, and prompt, reward, evaluation and drawing all use that pair: mixed-up coordinates are
the most reported failure of this method (an IoU reward that stays near 0).

From there `Prompts` makes what a model reads, with its processor, and `collate` makes batches.

To add a task, write a reader and a prompt, and enter them in TASKS; nothing else knows a task by name.
"""

import difflib
import io
import json
import math
import random
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from rewards import REWARDS, Box, parse_detections


class DataError(ValueError):
    """Data that cannot be used. The message names the file and row, and what would be right."""


# ------------------------------------------------------------------------------------------------
# Coordinates. A convention is only the size that the model takes an image to have: 1000 x 1000
# whatever the image ("relative"), or the pixels of the image as the model sees it ("pixels").

COORDINATES_OF_FAMILY = {
    "qwen2_5_vl": "pixels",
    **dict.fromkeys(("qwen2_vl", "qwen3_vl", "qwen3_vl_moe", "internvl", "glm4v", "llava"), "relative"),
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


def open_image(source: ImageSource, expected_size: tuple[int, int] | None = None) -> Image.Image:
    """Decode one image: turned upright by its EXIF tag, RGB, transparency on white.

    expected_size: (width, height) that the annotations were made for. Raises DataError, naming the file, for an
    image that is missing, cut off, not an image, or of another size.
    """
    name = getattr(source, "name_in_errors", source)
    try:
        with Image.open(source if isinstance(source, Path) else source()) as opened:
            image = ImageOps.exif_transpose(opened)
            if "A" in image.getbands() or "transparency" in image.info:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            image = image.convert("RGB")
    except FileNotFoundError:
        raise DataError(f"{name}: no such image") from None
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        raise DataError(f"{name}: not a whole image ({error})") from None
    if expected_size and image.size != tuple(expected_size):
        raise DataError(
            f"{name}: the image is {image.size[0]}x{image.size[1]} once upright, its annotation says "
            f"{expected_size[0]}x{expected_size[1]}: the boxes would not fit it"
        )
    return image


def image_size(source: ImageSource) -> tuple[int, int]:
    """(width, height) once upright, from the header alone."""
    with Image.open(source if isinstance(source, Path) else source()) as image:
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
    size         (width, height) of the first image in original pixels, the frame of all boxes
    solution     detection: list of boxes in original pixels, empty if the category is absent
    category     what is asked for; category_id is its number in COCO's results format
    crowds       regions that detection scores must ignore (COCO's iscrowd), original pixels
    image_id     groups the examples of one image, for scores over images
    question     a prompt that came with the data; None: the task writes it
    coordinates  the convention that `question` speaks; None: the model family's
    """

    id: str
    images: tuple[ImageSource, ...]
    size: tuple[int, int]
    solution: tuple[Box, ...]
    category: str
    crowds: tuple[Box, ...] = ()
    image_id: int = 0
    category_id: int = 0
    question: str | None = None
    coordinates: str | None = None


def open_images(example: Example, fit: Fit) -> list[Image.Image]:
    """The example's images as the model will see them: decoded, upright, RGB, resized once."""
    images = [open_image(example.images[0], example.size), *map(open_image, example.images[1:])]
    return [image.resize(fit.size(*image.size), Image.Resampling.BICUBIC) for image in images]


def model_solution(example: Example, target: tuple[int, int]) -> list[Box]:
    """The ground truth in the model's coordinates, not rounded: what rewards compare an answer with."""
    return [to_model(box, example.size, target) for box in example.solution]


def detection_answer(
    boxes: Sequence[Box], confidences: Sequence[float] | None = None, digits: int | None = None
) -> str:
    """What stands inside <answer> for these boxes in the model's coordinates: integers, or floats of `digits` decimals."""
    if not boxes:
        return "No Objects"
    confidences = confidences or [1] * len(boxes)
    corners = [round_box(box) if digits is None else [round(x, digits) for x in box] for box in boxes]
    return str([{"Position": list(box), "Confidence": c} for box, c in zip(corners, confidences)])


def model_answer(example: Example, target: tuple[int, int], think: bool = True) -> str:
    """A perfect completion without a thought, in the model's coordinates: to count its tokens, and to test with."""
    return f"{'<think></think>' if think else ''}<answer>{detection_answer(model_solution(example, target))}</answer>"


def questions(picture: Path, categories: str) -> list[Example]:
    """One example without ground truth per category, about a picture of the user's."""
    size = open_image(picture).size
    return [Example(f"{picture}/{name.strip()}", (picture,), size, (), name.strip()) for name in categories.split(",")]


# ------------------------------------------------------------------------------------------------
# COCO.

COCO_SPLITS = {
    "novel15": "mouse, fork, hot dog, cat, airplane, suitcase, parking meter, sandwich, train, hair drier, toilet, "
    "toaster, snowboard, frisbee, bear",
    "fewshot8": "bus, train, fire hydrant, stop sign, cat, dog, bed, toilet",
}

COCO_LAYOUT = """A COCO folder looks like this:
  DIR/annotations/instances_train2017.json    (or directly in DIR)
  DIR/annotations/instances_val2017.json      (only for evaluation)
  DIR/train2017/000000000009.jpg ...
  DIR/val2017/000000000139.jpg ...
To see the whole thing run without data of your own: bash run.sh"""


def read_coco(
    data: str,
    split: str,
    categories: str | None = None,
    shots: int | None = None,
    negatives: float = 0.0,
    seed: int = 0,
    skip_bad_images: bool = False,
) -> tuple[list[Example], list[str]]:
    """Read COCO-format detection data: one example per (image, category present in it).

    data        folder of COCO_LAYOUT
    split       train or val: selects instances_<split>*.json and the image folder of the same name
    categories  names separated by commas, or novel15, base65, fewshot8; None: all
    shots       this many images per category, chosen by seed
    negatives   share of all examples that ask for a category that the image does not show
    Returns the examples and notes for the user. Raises DataError naming file and row; with skip_bad_images an image
    with such a flaw is left out and counted in the notes.
    """
    file, folder = _coco_files(Path(data), split)
    table = _read_json(file)
    for key in ("images", "annotations", "categories"):
        if not isinstance(table, dict) or not isinstance(table.get(key), list):
            raise DataError(
                f"{file}: no list '{key}' at the top level; COCO instances files have images, annotations and categories"
            )
    name_of = {
        _field(file, "categories", row, c, "id"): _field(file, "categories", row, c, "name")
        for row, c in enumerate(table["categories"])
    }
    id_of = {name: category_id for category_id, name in name_of.items()}
    wanted = _wanted_categories(file, list(name_of.values()), categories)
    images, skipped = _coco_images(file, folder, table["images"])
    boxes, crowds = _coco_boxes(file, table["annotations"], images, name_of, skipped)
    if skipped and not skip_bad_images:
        raise DataError(
            f"{next(iter(skipped.values()))}. Mend it, or pass --skip_bad_images true to leave out such images ({len(skipped)} here)"
        )
    notes = [f"{file}: {len(skipped)} images skipped; first: {next(iter(skipped.values()))}"] if skipped else []

    def example(image_id, category: str) -> Example:
        path, size = images[image_id]
        key = (image_id, category)
        targets, ignored = (tuple(table.get(key, ())) for table in (boxes, crowds))
        return Example(
            f"{split}/{image_id}/{category}", (path,), size, targets, category, ignored, image_id, id_of[category]
        )

    shown = _images_showing(file, [i for i in images if i not in skipped], boxes, wanted, shots, seed, notes)
    examples = [example(image_id, category) for category, ids in shown.items() for image_id in ids]
    examples += [
        example(*pair)
        for pair in _absent_pairs(examples, images, skipped, boxes, crowds, wanted, negatives, seed, notes)
    ]
    if not examples:
        raise DataError(f"{file}: no example is left for the categories {', '.join(wanted)}")
    return examples, notes


def _images_showing(file: Path, usable: list, boxes, wanted, shots, seed, notes) -> dict[str, list]:
    """{category: ids of the images that show it}, all or `shots` of them; what is missing is noted."""
    shown = {category: [i for i in usable if (i, category) in boxes] for category in wanted}
    empty = [category for category in wanted if not shown[category]]
    if empty:
        notes.append(f"{file}: no image shows {', '.join(empty)}")
    if shots:
        shown = {c: random.Random(f"{seed}/{c}").sample(ids, min(shots, len(ids))) for c, ids in shown.items()}
        few = [f"{c} ({len(ids)})" for c, ids in shown.items() if len(ids) < shots]
        if few:
            notes.append(f"{file}: fewer than {shots} images for {', '.join(few)}")
    return shown


def _coco_files(root: Path, split: str) -> tuple[Path, Path]:
    if not root.is_dir():
        raise DataError(f"{root}: no such folder. {COCO_LAYOUT}")
    found = [f for folder in (root / "annotations", root) for f in sorted(folder.glob(f"instances_{split}*.json"))]
    if len(found) != 1:
        raise DataError(f"{root}: {len(found)} files instances_{split}*.json, one expected. {COCO_LAYOUT}")
    name = found[0].stem.removeprefix("instances_")
    for folder in (root / name, root / "images" / name):
        if folder.is_dir():
            return found[0], folder
    raise DataError(f"{root / name}: no such image folder for {found[0].name}. {COCO_LAYOUT}")


def _read_json(file: Path):
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: not UTF-8 text ({error})") from None
    except json.JSONDecodeError as error:
        raise DataError(
            f"{file}: line {error.lineno}, column {error.colno}: not JSON ({error.msg}); is the file cut off?"
        ) from None


def _field(file: Path, part: str, row: int, record, key: str):
    if not isinstance(record, dict) or key not in record:
        raise DataError(f"{file}: {part}[{row}] has no '{key}'; it is {str(record)[:200]}")
    return record[key]


def _wanted_categories(file: Path, known: list[str], categories: str | None) -> list[str]:
    if categories is None:
        return known
    names = COCO_SPLITS.get(categories, categories)
    if categories == "base65":
        novel = COCO_SPLITS["novel15"].split(", ")
        return [name for name in known if name not in novel]
    wanted = [name.strip() for name in names.split(",")]
    for name in wanted:
        if name not in known:
            near = difflib.get_close_matches(name, known, 3) or known[:5]
            raise DataError(f"--categories: '{name}' is not in {file}; near it: {', '.join(near)}")
    return list(dict.fromkeys(wanted))


def _coco_images(file: Path, folder: Path, rows: list) -> tuple[dict, dict]:
    """{image id: (path, (width, height))} and {image id: what is wrong with it}."""
    present = {entry.name for entry in folder.iterdir()}
    images, skipped = {}, {}
    for row, record in enumerate(rows):
        image_id, name, *size = (
            _field(file, "images", row, record, key) for key in ("id", "file_name", "width", "height")
        )
        path = folder / Path(name).name
        images[image_id] = (path, tuple(size))
        if path.name not in present:
            skipped[image_id] = f"{path}: no such image (images[{row}] of {file})"
        elif not all(isinstance(side, int) and side > 0 for side in size) or max(size) > MAX_ASPECT * min(size):
            skipped[image_id] = (
                f"{file}: images[{row}] {name} is {size[0]}x{size[1]}: sides must be positive, their ratio at most {MAX_ASPECT}"
            )
    return images, skipped


def _coco_boxes(file: Path, rows: list, images: dict, name_of: dict, skipped: dict) -> tuple[dict, dict]:
    """{(image id, category): [box, ...]} for targets and for crowd regions; flaws are entered in `skipped`."""
    boxes, crowds = defaultdict(list), defaultdict(list)
    for row, record in enumerate(rows):
        image_id, category_id, bbox = (
            _field(file, "annotations", row, record, key) for key in ("image_id", "category_id", "bbox")
        )
        if image_id not in images or category_id not in name_of:
            missing = f"image {image_id}" if image_id not in images else f"category {category_id}"
            raise DataError(f"{file}: annotations[{row}] belongs to {missing}, which the file does not list")
        width, height = images[image_id][1]
        try:
            x, y, w, h = map(float, bbox)
        except (TypeError, ValueError):
            raise DataError(
                f"{file}: annotations[{row}] has bbox {bbox}; [x, y, width, height] in pixels expected"
            ) from None
        # Annotation tools round outward: a pixel over the edge is theirs, more is a wrong box.
        inside = -1 <= x and -1 <= y and x + w <= width + 1 and y + h <= height + 1
        box = (max(0.0, x), max(0.0, y), min(float(width), x + w), min(float(height), y + h))
        if not (inside and box[0] < box[2] and box[1] < box[3]):
            flaw = "lies outside the image" if not inside else "has no area"
            skipped.setdefault(
                image_id, f"{file}: annotations[{row}] of image {image_id} ({width}x{height}) {flaw}: bbox {bbox}"
            )
            continue
        (crowds if record.get("iscrowd") else boxes)[image_id, name_of[category_id]].append(box)
    return boxes, crowds


def _absent_pairs(examples, images, skipped, boxes, crowds, wanted, share, seed, notes) -> list[tuple]:
    """(image id, category) pairs whose right answer is `No Objects`: `share` of all examples, one per image at most."""
    if not 0.0 <= share < 1.0:
        raise DataError(f"--negatives {share}: a share of all examples, at least 0 and below 1")
    count = round(len(examples) * share / (1.0 - share))
    rng = random.Random(f"{seed}/negatives")
    # Few-shot training must not see other images, so negatives come from the images that are already in use.
    used = sorted({e.image_id for e in examples}, key=str)
    rng.shuffle(used)
    pairs = []
    for image_id in used:
        absent = [c for c in wanted if (image_id, c) not in boxes and (image_id, c) not in crowds]
        if absent and len(pairs) < count:
            pairs.append((image_id, rng.choice(absent)))
    if len(pairs) < count:
        notes.append(f"--negatives {share}: {len(pairs)} of {count} examples found, one per image at most")
    return pairs


# ------------------------------------------------------------------------------------------------
# The released ViRFT sets: tables of (image, problem, solution), solutions in 0..1000.


def read_released(
    data: str,
    split: str,
    categories: str | None = None,
    shots: int | None = None,
    negatives: float = 0.0,
    seed: int = 0,
    skip_bad_images: bool = False,
) -> tuple[list[Example], list[str]]:
    """Read a table with the columns image, problem and solution, as the released ViRFT detection sets are.

    data: a hub name, a save_to_disk folder or a parquet file, read through `datasets`. Their prompts are kept, and
    so is the 0..1000 convention that they state, whatever the model family. The other arguments are read_coco's.
    """
    if shots or negatives:
        raise DataError(f"--shots and --negatives choose among annotated images; the rows of {data} are chosen already")
    table = _released_table(data, split)
    missing = {"image", "problem", "solution"} - set(table.column_names)
    if missing:
        raise DataError(f"{data}: no column {', '.join(sorted(missing))}; it has {', '.join(table.column_names)}")
    examples, skipped = [], []
    for row in range(len(table)):
        try:
            examples.append(_released_example(data, table, row))
        except DataError as error:
            if not skip_bad_images:
                raise
            skipped.append(str(error))
    known = sorted({e.category for e in examples})
    wanted = _wanted_categories(Path(data), known, categories)
    examples = [replace(e, category_id=known.index(e.category) + 1) for e in examples if e.category in wanted]
    return examples, [f"{data}: {len(skipped)} rows skipped; first: {skipped[0]}"] if skipped else []


def _released_table(data: str, split: str):
    import datasets  # imported here: COCO on disk needs none of it

    path = Path(data)
    if path.is_dir():
        table = datasets.load_from_disk(data)
        if isinstance(table, datasets.DatasetDict):
            table = _pick_split(data, table, split)
    elif path.is_file():
        table = datasets.load_dataset("parquet", data_files=data, split="train")
    else:
        table = _pick_split(data, datasets.load_dataset(data), split)
    return table.cast_column("image", datasets.Image(decode=False)) if "image" in table.column_names else table


def _pick_split(data: str, table, split: str):
    names = {"train": ("train",), "val": ("val", "validation", "test")}[split]
    for name in names:
        if name in table:
            return table[name]
    raise DataError(
        f"{data}: no split {' or '.join(names)}; it has {', '.join(table)}. For evaluation, --eval_data names other data"
    )


def _row_bytes(table, row: int) -> io.BytesIO:
    image = table[row]["image"]
    return io.BytesIO(image["bytes"] if image["bytes"] is not None else Path(image["path"]).read_bytes())


def _released_example(data: str, table, row: int) -> Example:
    record = table[row]
    boxes = parse_detections(str(record["solution"]))
    if boxes is None:
        raise DataError(
            f"{data}: row {row} has solution {str(record['solution'])[:200]!r}; expected "
            "<answer>[{'Position': [x1, y1, x2, y2], 'Confidence': 1}, ...]</answer> or <answer>No Objects</answer>"
        )
    source = partial(_row_bytes, table, row)
    source.name_in_errors = f"{data}: row {row}"
    try:
        size = image_size(source)
    except (OSError, TypeError, SyntaxError) as error:
        raise DataError(f"{data}: row {row} has no image that can be read ({error})") from None
    quoted = re.search(r"category ['\"]([^'\"]+)['\"]", record["problem"])
    solution = tuple(to_pixels(box, size, (1000, 1000)) for box, _ in boxes)
    category = quoted.group(1) if quoted else "object"
    return Example(
        f"{data}/{row}",
        (source,),
        size,
        solution,
        category,
        image_id=row,
        question=record["problem"],
        coordinates="relative",
    )


# ------------------------------------------------------------------------------------------------
# Tasks.


def detection_prompt(category: str, target: tuple[int, int], coordinates: str, think: bool) -> str:
    """The question of a detection example, in our words, with the published answer format and the range in force."""
    where = {
        "relative": "integers from 0 to 1000 relative to the width and height of the image",
        "pixels": f"integer pixels of the image, which is {target[0]} wide and {target[1]} high",
    }[coordinates]
    listing = "[{'Position': [x1, y1, x2, y2], 'Confidence': 0.87}, ...]"
    form, first = f"<answer>{listing}</answer>", ""
    if think:
        form, first = f"<think> ... </think>{form}", "First reason about what you see. "
    return (
        f"Find every {category} in the image. {first}Answer in exactly this form:\n{form}\n"
        f"A position is the left, top, right and bottom edge of a box, in {where}; a confidence is how sure you are of "
        f"that box, from 0 to 1 with two decimals. If the image shows none, write No Objects in place of the list."
    )


@dataclass(frozen=True)
class Task:
    """All that training and evaluation need to know of a task.

    read      (data, split, categories, shots, negatives, seed, skip_bad_images) -> examples, notes
    hub_data  the released dataset that is used without --data
    prompt    (category, target, coordinates, think) -> text
    rewards   default rewards and weights, names of rewards.REWARDS
    parse     completion -> answer, None where it is malformed: the rewards' own parser
    metric    which score of evaluate.py is the task's
    """

    name: str
    read: Callable[..., tuple[list[Example], list[str]]]
    hub_data: str
    prompt: Callable[[str, tuple[int, int], str, bool], str]
    rewards: dict[str, float]
    parse: Callable[[str], object | None]
    metric: str

    def question(
        self, example: Example, seen_size: tuple[int, int], coordinates: str, think: bool
    ) -> tuple[str, tuple[int, int]]:
        """The prompt of an example and the coordinate size that it speaks: its own question if it came with one."""
        target = model_size(example.coordinates or coordinates, seen_size)
        return example.question or self.prompt(example.category, target, coordinates, think), target


def read_detection(data: str, split: str, **options) -> tuple[list[Example], list[str]]:
    """A folder in COCO's layout, or a table of the released kind: recognized from what `data` points at."""
    path = Path(data)
    is_table = path.is_file() or (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file()
    is_hub_name = not path.exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", data)
    return (read_released if is_table or is_hub_name else read_coco)(data, split, **options)


TASKS = {
    "coco": Task(
        name="coco",
        read=read_detection,
        hub_data="laolao77/ViRFT_COCO",
        prompt=detection_prompt,
        rewards={"iou": 1.0, "confidence": 1.0, "format": 1.0},
        parse=parse_detections,
        metric="detection",
    ),
}

assert all(name in REWARDS for task in TASKS.values() for name in task.rewards)


def load_examples(
    task: Task,
    source: str,
    split: str,
    max_boxes: int | None = None,
    limit: int | None = None,
    seed: int = 0,
    **options,
):
    """The examples of a split and notes for the user; options are the reader's.

    max_boxes: leave out examples with more boxes. limit: this many examples, chosen by seed.
    """
    examples, notes = task.read(source, split, seed=seed, **options)
    if max_boxes is not None:
        kept = [e for e in examples if len(e.solution) <= max_boxes]
        notes.append(f"--max_boxes {max_boxes}: {len(examples) - len(kept)} examples left out")
        examples = kept
    if limit is not None and limit < len(examples):
        notes.append(f"{limit} of {len(examples)} examples, chosen by seed {seed}")
        examples = random.Random(seed).sample(examples, limit)
    if not examples:
        raise DataError(f"{source}: no example is left of the {split} split")
    return examples, [f"{len(examples)} {split} examples from {source}", *notes]


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
    solution: list
    slot: int
    skipped: tuple[str, ...] = ()


class Prompts(torch.utils.data.Dataset):
    """Examples -> Prompts, in a loader's workers, ahead of the step: open, resize, write the question, tokenize.

    Indexed by (slot, index of the example). max_length: tokens that a prompt may have; none is ever cut.
    replace_bad: let the next example stand in for one that cannot be opened, so that a step keeps its size.
    """

    def __init__(
        self, task, examples, processor, fit, coordinates, think=True, system_prompt=None, max_length=None, replace_bad=False
    ):  # fmt: skip
        self.task, self.examples, self.processor, self.fit, self.coordinates = (
            task,
            examples,
            processor,
            fit,
            coordinates,
        )
        self.think, self.system_prompt, self.max_length, self.replace_bad = (
            think,
            system_prompt,
            max_length,
            replace_bad,
        )

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
        settings = (self.processor, self.fit, self.coordinates, self.think, self.system_prompt, self.max_length)
        return Prompts(self.task, examples, *settings)

    def encode(self, example: Example, slot: int = 0) -> Prompt:
        """Raises DataError naming the image that cannot be opened or the example that is too long."""
        images = open_images(example, self.fit)
        question, target = self.task.question(example, images[0].size, self.coordinates, self.think)
        content = [*({"type": "image"} for _ in images), {"type": "text", "text": question}]
        messages = [{"role": "user", "content": content}]
        if self.system_prompt is not None:
            messages.insert(0, {"role": "system", "content": [{"type": "text", "text": self.system_prompt}]})
        text = self.processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        inputs = dict(self.processor(text=[text], images=images, return_tensors="pt"))
        length = inputs["input_ids"].shape[1]
        if self.max_length is not None and length > self.max_length:
            raise DataError(
                f"example {example.id}: its prompt has {length} tokens, and the model's positions leave {self.max_length} beside "
                "the completion; prompts are never cut: lower --max_pixels or --max_completion_tokens"
            )
        return Prompt(example, inputs, target, model_solution(example, target), slot)


def whole(prompts: list[Prompt | DataError]) -> list[Prompt]:
    """The prompts of one batch, in the main process; raises the error that stands in the place of one."""
    for prompt in prompts:
        if isinstance(prompt, DataError):
            raise prompt
    return prompts


def collate(prompts: Sequence[Prompt], pad_id: int) -> dict[str, Tensor]:
    """Join encoded prompts to one batch: sequences padded on the left, everything else joined along dimension 0.

    A tensor shaped like input_ids is a sequence. Others (pixels, grids, image sizes) have one row per image or patch,
    in the order of the prompts; their other dimensions are padded with zeros, as processors do.
    """
    length = max(p.inputs["input_ids"].shape[1] for p in prompts)
    batch = {}
    for name, first in prompts[0].inputs.items():
        tensors = [p.inputs[name] for p in prompts]
        if first.shape == prompts[0].inputs["input_ids"].shape:
            fill = pad_id if name == "input_ids" else 0
            tensors = [F.pad(t, (length - t.shape[1], 0), value=fill) for t in tensors]
        else:
            widest = [max(sizes) for sizes in zip(*(t.shape[1:] for t in tensors))]
            tensors = [_pad_to(t, widest) for t in tensors]
        batch[name] = torch.cat(tensors)
    return batch


def _pad_to(tensor: Tensor, sizes: Sequence[int]) -> Tensor:
    """Zeros behind every dimension but the first, up to `sizes`."""
    missing = [n for size, have in zip(reversed(sizes), reversed(tensor.shape[1:])) for n in (0, size - have)]
    return F.pad(tensor, missing)
