"""Read rows: JSON, JSON lines and CSV files, and tables of the `datasets` library, in the forms that people have.

Each row is one example, or for `objects` one image with all its boxes. The columns that are read are in COLUMNS; a
class name that a table stores as a number (ClassLabel) has become its name before this file sees it.
"""

import csv
import io
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from data import (
    IMAGE_MARK,
    Choice,
    DataError,
    Example,
    Found,
    ImageSource,
    Task,
    box_inside,
    class_of,
    content_of,
    detection_examples,
    extra_reader,
    few,
    image_size,
    leave_out,
    map_boxes,
    plain_name,
    read_json,
    read_text,
    refuse,
    to_pixels,
    wanted_categories,
)
from extras.readers.choose import pick_split, whole_file
from rewards import Box, is_box, parse_answer, parse_detections, parse_grounding

SPLIT_NAMES = ("train", "val", "valid", "validation", "test")
# What a row holds -> the names of its column; the first that is there is read.
COLUMNS = {
    "images": ("image", "image_path", "images", "file_name", "filename", "file", "path", "img"),
    "problem": ("problem", "prompt", "conversations", "messages", "question"),
    "solution": ("solution", "answer", "answers", "ground_truth"),
    "class": ("class_name", "label", "class", "category", "species", "fine_label"),
    "split": ("split",),
}
ROW_LAYOUT = """A row has image (or image_path, or a list images), problem and solution.
Image files are relative to the folder of the rows; the problem may mark the place of each image with <image>.
Boxes in such rows need coords: "pixels" (of the original image) or 1000 if they are 0..1000 and the problem says so.
Other names of columns are in docs/tasks.md"""


def column(row: Any, kind: str) -> Any:
    """Return the value of the first column of COLUMNS[kind] that a row has; None if it has none, or if it is empty."""
    value = next((row[name] for name in COLUMNS[kind] if name in row), None) if isinstance(row, dict) else None
    return None if value == "" else value


def file_lines(file: Path) -> list[tuple[str, str]]:
    """Return the (place, text) of every line of a text file that is not empty."""
    lines = enumerate(read_text(file).split("\n"), 1)  # not splitlines, which also splits inside JSON strings
    return [(f"{file}: line {number}", line.strip()) for number, line in lines if line.strip()]


def file_rows(file: Path) -> list[tuple[str, Any]]:
    """Return the (place, row) of every row of a .json (a list), .jsonl or .csv file; a CSV begins with column names."""
    suffix = file.suffix.lower()
    if suffix == ".json":
        table = read_json(file)
        if not isinstance(table, list):
            expected = "a list of rows expected at the top level, or COCO's lists"
            raise DataError(f"{file}: {expected}; found {str(table)[:100]}")
        return [(f"{file}: row {number}", row) for number, row in enumerate(table)]
    if suffix in (".csv", ".tsv"):
        text = read_text(file)
        try:
            delimiter = csv.Sniffer().sniff(text.partition("\n")[0], delimiters=",;\t|").delimiter
        except csv.Error:  # a single column
            delimiter = ","
        try:  # strict only to find a quote that is never closed: it also refuses `"what" is it`
            for _ in csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True):
                pass
        except csv.Error as error:
            if "unexpected end of data" in str(error) or "field limit" in str(error):
                raise DataError(f"{file}: not CSV ({error}); is a quote not closed?") from None
        reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter)
        rows = [(f"{file}: line {reader.line_num}", row) for row in reader]
        if surplus := next((where for where, row in rows if any(row.pop(None, ()))), None):
            raise DataError(f"{surplus}: more cells than columns; a cell that holds {delimiter!r} needs quotes")
        return rows
    rows = []
    for where, line in file_lines(file):
        try:
            rows.append((where, json.loads(line)))
        except json.JSONDecodeError as error:
            raise DataError(f"{where}: not JSON ({error.msg}): {line[:200]}") from None
    return rows


def split_of(row: Any) -> str:
    """Return a row's split in lower case, with training as train and testing as test; an empty cell means train."""
    name = str(column(row, "split") or "train").strip().lower()
    return {"training": "train", "testing": "test"}.get(name, name)


def have_splits(rows: list) -> bool:
    """Return whether rows name their splits. DataError if none is one of SPLIT_NAMES; other rows are left out."""
    named = [(where, split_of(row)) for where, row in rows if column(row, "split") is not None]
    if named and not any(name in SPLIT_NAMES for _, name in named):
        (where, name), known = named[0], ", ".join(SPLIT_NAMES)
        raise DataError(f"{where}: split is {name!r}; one of {known} expected. Rename a column of another meaning")
    return bool(named)


def rows_of_split(source: object, rows: list, split: str) -> list:
    """Return the rows of a split by their column `split`, where an empty cell means train; all without such names."""
    if not have_splits(rows):
        return rows
    splits = [split_of(row) for _, row in rows]
    name = pick_split(source, split, splits, f"Its rows have split {', '.join(sorted(set(map(str, splits))))}")
    return [row for row, its in zip(rows, splits) if its == name]


def read_rows(task: Task, source: str, split: str, choice: Choice) -> Found:
    """Read the rows of a file or a table for a task, whatever form they have.

    Boxes of `objects` and class labels become the task's own examples. Other rows bring their prompts. The released
    sets hold boxes in 0..1000, which their problems state: every model is asked in that convention. Other rows declare
    theirs; boxes in pixels are converted to the model's convention, which the prompt then states.
    """
    path, folder = Path(source), Path(source).parent
    if path.is_file() and path.suffix.lower() != ".parquet":
        rows = file_rows(path)
        if not have_splits(rows):
            whole_file(path, split, choice)
    else:
        rows = list(extra_reader(f"--data {source}", "tables", "table_rows", source, split, choice))
        folder = path if path.is_dir() else folder
    rows = rows_of_split(source, rows, split)
    first = next((row for _, row in rows if isinstance(row, dict)), {})
    if "objects" in first:
        if task.metric != "detection":
            raise DataError(f"{source}: its rows hold objects with boxes, for --task coco, not {task.name}")
        return object_examples(source, rows, folder, split, choice)
    if task.metric == "classification" and all(column(row, "problem") is None for _, row in rows):
        labels = [(where, file_of(row, folder), column(row, "class")) for where, row in rows]
        return extra_reader(f"--data {source}", "classes", "class_examples", path, labels, split, choice)
    reason = f"all rows of {source} are asked: choose by --categories, or in the data"
    refuse(choice, reason, "shots", "negatives", "eval_categories")
    examples, flaws, notes = [], [], []
    for number, (where, row) in enumerate(rows):
        try:
            example = row_example(task, row, folder, notes)
        except DataError as error:
            flaws.append(f"{where}: {error}; the row is {str(row)[:400]}")
            continue
        # Without the folder: the id decides the sampled tokens, and the data may move.
        examples.append(replace(example, id=f"{path.name}/{number}", image_id=number))
    leave_out(source, flaws, choice, notes, "rows")
    read = {kind: next((n for n in COLUMNS[kind] if n in first), "-") for kind in ("images", "problem", "solution")}
    notes.append(f"{source}: columns read are {', '.join(read.values())}")
    if choice.categories and {example.category for example in examples} == {"object"}:
        remedy = "add a column `category`"
        raise DataError(f"--categories {choice.categories}: the rows of {source} name no categories: {remedy}")
    numbers = {name: i for i, name in enumerate(sorted({example.category for example in examples}), 1)}
    wanted = set(wanted_categories(source, list(numbers), choice.categories))
    return [replace(e, category_id=numbers[e.category]) for e in examples if e.category in wanted], notes


# ------------------------------------------------------------------------------------------------
# Rows with a problem.


def images_of(row: Any, folder: Path) -> tuple[ImageSource, ...]:
    """Return the images of a row, files relative to `folder`. Raises DataError unless one column names them."""
    names = [name for name in COLUMNS["images"] if isinstance(row, dict) and row.get(name)]
    images = row[names[0]] if names else []
    images = images if isinstance(images, list) else [images]
    if len({"image", "image_path", "images"} & set(names)) > 1 or not images:
        found = f"several: {', '.join(names)}" if names else "none"
        raise DataError(f"one of image, image_path and images expected, found {found}. {ROW_LAYOUT}")
    if not all(isinstance(image, str) and len(image) < 1000 or callable(image) for image in images):
        raise DataError(f"an image is the name of a file, found {str(images)[:100]}. {ROW_LAYOUT}")
    return tuple(folder / image if isinstance(image, str) else image for image in images)


def file_of(row: Any, folder: Path) -> ImageSource | DataError:
    """Return the image of a row with a label; or the error, for the reader of class names to count."""
    try:
        (image, *others) = images_of(row, folder)
    except DataError as error:
        return error
    return DataError(f"{len(others) + 1} images and one label; one image expected") if others else image


def messages_of(problem: Any, notes: list[str]) -> tuple[str, Any]:
    """Read the (question, answer or None) of a conversation: `role` and `content`, or `from` and `value`.

    Raises DataError for a conversation of several questions. System messages are left out and noted.
    """
    if isinstance(problem, str):
        return problem, None
    said: dict[str, list] = {"user": [], "assistant": [], "system": []}
    names = {"human": "user", "gpt": "assistant"}
    for turn in problem if isinstance(problem, list) else ():
        role = turn.get("role", turn.get("from")) if isinstance(turn, dict) else None
        if (role := names.get(role, role)) not in said:
            raise DataError(f"a turn of a conversation is {str(turn)[:100]}; role user, assistant or system expected")
        words = turn.get("content", turn.get("value"))
        if isinstance(words, list) and words and all(isinstance(part, dict) for part in words):
            parts = [part.get("text") or "" if part.get("type") == "text" else IMAGE_MARK for part in words]
            words = "\n".join(parts) if IMAGE_MARK in parts else "".join(parts)
        said[role].append(words)
    if len(said["user"]) != 1 or len(said["assistant"]) > 1 or not isinstance(said["user"][0], str):
        counts = f"{len(said['user'])} questions and {len(said['assistant'])} answers"
        raise DataError(f"one question and at most one answer expected, found {counts}")
    if said["system"] and (note := "system messages of rows are left out: --system_prompt sets one") not in notes:
        notes.append(note)
    return said["user"][0], next(iter(said["assistant"]), None)


def row_example(task: Task, row: Any, folder: Path, notes: list[str]) -> Example:
    """Convert one row to an example. Raises DataError for a row that is not of ROW_LAYOUT."""
    if column(row, "problem") is None:
        raise DataError(f"no problem. {ROW_LAYOUT}")
    images = images_of(row, folder)
    problem, said = messages_of(column(row, "problem"), notes)
    content_of(problem, len(images))  # raises DataError where marks and images differ
    given = column(row, "solution")
    if given is None and said is None:
        raise DataError(f"no solution. {ROW_LAYOUT}")
    solution, coordinates = SOLUTIONS[task.metric](said if given is None else given), None
    sizes = [image_size(image) for image in images]  # of all images, to report a missing one now
    if task.boxes:
        # The released sets have no column for it: their problems state the range.
        stated = 1000 if re.search(r"\b0\s*(?:to|-|and|,)\s*1000\b", problem) else None
        coords = str(row.get("coords") or stated)
        if coords not in ("pixels", "1000"):
            raise DataError(f'boxes need coords: "pixels" or coords: 1000, found {row.get("coords")!r}. {ROW_LAYOUT}')
        frame, coordinates = (sizes[0], None) if coords == "pixels" else ((1000, 1000), "relative")
        solution = map_boxes(solution, lambda box: to_pixels(box_inside(box, frame), sizes[0], frame))
    quoted = re.search(r"category ['\"]([^'\"]+)['\"]", problem)
    category = str(row.get("category") or class_of(solution) or (quoted.group(1) if quoted else "object"))
    size = sizes[0] if task.boxes else None
    return Example("", images, size, solution, category, question=problem, coordinates=coordinates)


# ------------------------------------------------------------------------------------------------
# Solutions.


def as_answer(text: str) -> str:
    return text if "<answer>" in text else f"<answer>{text}</answer>"


def detection_solution(value: Any) -> tuple[Box, ...]:
    """Read the boxes of a row's solution: the answer format, or a list of boxes. Raises DataError."""
    found = parse_detections(as_answer(value)) if isinstance(value, str) else None
    boxes = value if found is None else [box for box, _ in found]
    if not isinstance(boxes, list) or not all(map(is_box, boxes)):
        raise DataError(
            f"solution {str(value)[:200]!r}: expected <answer>[{{'Position': [x1, y1, x2, y2], 'Confidence': 1}}, ...]"
            "</answer>, <answer>No Objects</answer>, or a list of [x1, y1, x2, y2]"
        )
    return tuple(dict.fromkeys(tuple(map(float, box)) for box in boxes))  # a box that is there twice counts once


def grounding_solution(value: Any) -> Box:
    """Read the box of a row's solution: the answer format, or four numbers. Raises DataError."""
    box = parse_grounding(as_answer(value)) if isinstance(value, str) else value
    if not is_box(box):
        raise DataError(f"solution {str(value)[:200]!r}: expected <answer>(x1,y1),(x2,y2)</answer> or [x1, y1, x2, y2]")
    return tuple(map(float, box))


def class_solution(value: Any) -> str | tuple[str, ...]:
    """Read the class name of a row's solution, or all accepted names, in plain words. Raises DataError."""
    names = [parse_answer(as_answer(value))] if isinstance(value, str) else value
    if not isinstance(names, list) or not names or not all(isinstance(n, str) and plain_name(n) for n in names):
        expected = "a class name, <answer>it</answer>, or a list of accepted names"
        raise DataError(f"solution {str(value)[:200]!r}: expected {expected}")
    return plain_name(names[0]) if len(names) == 1 else tuple(map(plain_name, names))


def any_solution(value: Any) -> Any:
    """Return the solution of task `rows` unchanged, but without <answer> tags, for the user's own rewards."""
    wrapped = isinstance(value, str) and "<answer>" in value
    if (solution := parse_answer(value) if wrapped else value) is None or solution != solution:  # NaN
        raise DataError(f"solution {str(value)[:200]!r}: one <answer> block expected, or a value")
    if isinstance(solution, str) and not solution.strip():
        raise DataError(f"solution {str(value)[:200]!r} is blank; a model that writes nothing would be right")
    return solution


SOLUTIONS: dict[str, Callable[[Any], Any]] = {  # by Task.metric
    "detection": detection_solution, "grounding": grounding_solution, "classification": class_solution,
    "rewards": any_solution,
}  # fmt: skip


# ------------------------------------------------------------------------------------------------
# Detection tables: one row per image, `objects` with its boxes.


def object_examples(source: str, rows: list, folder: Path, split: str, choice: Choice) -> Found:
    """Make detection examples of rows with `objects`: {bbox: [...], category: [...]} or a list of such records."""
    images, annotations, paths, flaws = [], [], [], []
    for number, (where, row) in enumerate(rows):
        try:
            found, (path, *_) = objects_of(row), images_of(row, folder)
            if isinstance(path, Path) and not path.is_file():
                raise DataError(f"{path}: no such image; the table holds its path only")
            sides = (row.get("width"), row.get("height"))
            size = sides if all(isinstance(side, int) and side > 0 for side in sides) else image_size(path)
        except DataError as error:
            flaws.append(f"{where}: {error}")
            continue
        paths.append(path)
        images.append({"id": number, "file_name": where, "width": size[0], "height": size[1]})
        annotations += [
            {"image_id": number, "bbox": box, "category_id": name, "iscrowd": crowd} for box, name, crowd in found
        ]
    notes: list[str] = []
    leave_out(source, flaws, choice, notes, "rows")
    sizes = {image["id"]: (image["width"], image["height"]) for image in images}
    boxes = [(tuple(map(float, a["bbox"])), sizes[a["image_id"]]) for a in annotations]
    form, why = box_format(source, boxes, choice.box_format)
    for annotation, (box, _) in zip(annotations, boxes):
        x1, y1, x2, y2 = box
        annotation["bbox"] = (x1, y1, x2 - x1, y2 - y1) if form == "xyxy" else box
    names = sorted({a["category_id"] for a in annotations})
    if names and all(str(name).isdecimal() for name in names):
        remedy = "a model can only be asked for names: use ClassLabel, or text"
        raise DataError(f"{source}: its categories are numbers, {few(names)}; {remedy}")
    table = {"images": images, "annotations": annotations, "categories": [{"id": n, "name": n} for n in names]}
    examples, more = detection_examples((Path(source), table, paths), split, replace(choice, box_format="auto"))
    number_of = {name: i for i, name in enumerate(names, 1)}
    return [replace(e, category_id=number_of[e.category_id]) for e in examples], [*notes, f"{source}: {why}", *more]


def objects_of(row: Any) -> list[tuple[list[float], str, Any]]:
    """Return (box, category, whether it is a crowd region) of each object of a row. Raises DataError."""
    objects = row.get("objects") if isinstance(row, dict) else None
    if isinstance(objects, list) and all(isinstance(o, dict) for o in objects):
        keys = {key for o in objects for key in o} or {"bbox", "category"}
        objects = {key: [o.get(key) for o in objects] for key in keys}
    if not isinstance(objects, dict):
        raise DataError(f"objects expected, {{bbox, category}} or a list of such records; found {str(objects)[:200]}")
    boxes, names = (
        next((objects[key] for key in keys if key in objects), None)
        for keys in (("bbox", "bboxes", "boxes"), ("category", "categories", "label", "labels", "name"))
    )
    four = boxes is not None and all(
        isinstance(b, (list, tuple)) and len(b) == 4 and all(isinstance(x, (int, float)) for x in b) for b in boxes
    )
    crowds = objects.get("iscrowd") or objects.get("is_crowd") or [0] * len(boxes or ())
    if not four or names is None or not len(boxes) == len(names) == len(crowds) or None in names:
        raise DataError(f"objects need bbox (four numbers each) and category; found {str(objects)[:200]}")
    names = [int(name) if isinstance(name, float) and name.is_integer() else name for name in names]
    return [(box, plain_name(str(name)), crowd) for box, name, crowd in zip(boxes, names, crowds)]


def box_format(source: str, boxes: list, asked: str) -> tuple[str, str]:
    """Return xywh or xyxy, and why: as --box_format says, or the only one in which every box lies in its image.

    boxes: (four numbers, size of the image). Raises DataError where the boxes fit both or neither.
    """
    if asked != "auto":
        return asked, f"boxes are {asked}, by --box_format"

    def fits(box: Box, size: tuple) -> bool:
        try:
            box_inside(box, size)
        except DataError:
            return False
        return True

    corners = all(fits(box, size) for box, size in boxes)
    sides = all(fits((x, y, x + w, y + h), size) for (x, y, w, h), size in boxes)
    if corners == sides:
        fit = "fit their images both as xywh and as xyxy" if corners else "do not all fit their images, read either way"
        raise DataError(f"{source}: its boxes {fit}: --box_format xywh or xyxy says which they are")
    form, other = ("xyxy", "xywh") if corners else ("xywh", "xyxy")
    return form, f"boxes are {form}: as {other} some would not fit their images (--box_format)"
