"""Read ReasonSeg, the data of LISA (reasoning grounding)."""

import math
from pathlib import Path

from data import (
    Choice,
    DataError,
    Example,
    Found,
    Size,
    box_inside,
    image_size,
    leave_out,
    names_in,
    read_json,
    refuse,
)
from extras.readers.choose import pick_split
from rewards import Box

LISA_LAYOUT = """A ReasonSeg folder looks like this:
  DIR/train/NAME.jpg
  DIR/train/NAME.json   {"text": ["..."], "shapes": [{"label": "target", "points": [[x, y], ...]}]}
  DIR/val/ (or test/)   the same, for evaluation; where both are there, --eval_data DIR/test reads test"""


def read_lisa(data: str, split: str, choice: Choice) -> Found:
    """Read ReasonSeg: one example per instruction in `text`; the box is the bounds of all `target` polygons.

    Other shapes (`ignore`, `flag`) do not count, as in LISA's own reader.
    """
    refuse(choice, "instructions have no categories", "categories", "shots", "negatives", "eval_categories")
    folder = Path(data)
    if split == "train" or not any(folder.glob("*.json")):  # --eval_data may name the folder of one split
        folder /= pick_split(data, split, names_in(folder), LISA_LAYOUT)
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


def reasonseg_image(file: Path) -> tuple[Path, Size, Box, list[str]]:
    """Read one ReasonSeg file: (image, its size, the box, instructions)."""
    table = read_json(file, encoding_of(file))
    path = file.with_suffix(".jpg")
    size = image_size(path)
    for key in ("text", "shapes"):
        if not isinstance(table, dict) or key not in table:
            raise DataError(f"{file}: no '{key}'; it is {str(table)[:200]}")
    texts = table["text"]
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) and text.strip() for text in texts):
        raise DataError(f"{file}: 'text' is {str(texts)[:200]}; a list of instructions expected")
    try:
        targets = [shape["points"] for shape in table["shapes"] if shape["label"].lower() == "target"]
        xs, ys = zip(*((float(x), float(y)) for points in targets for x, y in points))
        if not all(map(math.isfinite, (*xs, *ys))):
            raise ValueError("a point is not finite")
        # A polygon may leave the image: LISA's masks cut it off too.
        box = box_inside((min(xs), min(ys), max(xs), max(ys)), size, overhang=math.inf)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"{file}: no polygon labeled 'target' with an area within the {size[0]}x{size[1]} image ({error})"
        ) from None
    return path, size, box, texts


def encoding_of(file: Path) -> str:
    """Return the encoding of a text file: the published files are partly UTF-8, partly cp1252."""
    try:
        file.read_text(encoding="UTF-8")
    except UnicodeDecodeError:
        return "cp1252"
    return "UTF-8-SIG"
