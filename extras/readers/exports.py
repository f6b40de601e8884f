"""Recognize what --data is, find the COCO file in the export of an annotation tool, and look at images' headers."""

import os
import random
import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from data import (
    COCO_LAYOUT,
    Choice,
    DataError,
    Example,
    Found,
    Task,
    few,
    image_size,
    leave_out,
    plain_name,
)
from extras.readers.choose import whole_file
from extras.readers.rows import ROW_LAYOUT, read_rows

SPLITS = {"train": (("train", "training"),), "val": (("val", "valid", "validation"), ("test", "testing"))}
SPLIT_WORDS = {word for groups in SPLITS.values() for group in groups for word in group}
TABLE_SIGNS = (
    "dataset_info.json", "dataset_dict.json", "*.parquet", "*/*.parquet",
    "metadata.jsonl", "metadata.csv", "*/metadata.jsonl", "*/metadata.csv",
)  # fmt: skip
FILES = (".json", ".jsonl", ".csv", ".tsv", ".parquet")
ARCHIVES = (".zip", ".tar", ".tgz", ".gz", ".bz2", ".xz", ".7z", ".rar")
MATLAB = ".mat files are MATLAB's: docs/tasks.md has a line that writes a labels.csv from those of Flowers-102 and Cars"


def reader_of(task: Task, source: str) -> Callable[[str, str, Choice], Found]:
    """Return the reader (source, split, choice) for what `source` is. Raises DataError, saying what to do instead."""
    path, rows = Path(source), partial(read_rows, task)
    kind = path.suffix.lower()
    if path.is_dir():
        if any(is_table_sign(file) for sign in TABLE_SIGNS for file in path.glob(sign)):
            return rows
        if task.read is None:
            files = [file for file in sorted(path.iterdir()) if file.suffix in FILES and not file.name.startswith(".")]
            if len(files) > 1 and all(split_word(Path(file.name)) for file in files):
                return partial(read_file_of_split, task, files)
            if len(files) != 1:
                choose = f"; --data must name one of {few([file.name for file in files])}" if files else ""
                reads = f"--task {task.name} reads rows, from {', '.join(FILES)}"
                raise DataError(f"{source}: {reads}{choose}. {ROW_LAYOUT}")
            return lambda source, split, choice: read_rows(task, str(files[0]), split, choice)
        return task.read
    if not path.exists():
        if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", source) and kind not in (*FILES, *ARCHIVES):
            return rows  # of a dataset on the hub
        if kind or task.read is None:
            raise DataError(f"{source}: no such file or folder")
        return task.read  # its error shows the layout
    if kind in ARCHIVES:
        raise DataError(f"{source}: an archive; unpack it and give the folder")
    if kind == ".json" and is_coco(path) and task.read is not None:
        return task.read
    if kind in FILES:
        return rows
    read = f"Folders are read, and {', '.join(FILES)}"
    raise DataError(f"{source}: not read as data. {MATLAB if kind == '.mat' else foreign(path) or read}")


def is_table_sign(file: Path) -> bool:
    """Return whether a file tells of a table; metadata must name files, or it is about something else."""
    if file.stem != "metadata":
        return True
    with file.open(encoding="utf-8-sig", errors="replace") as lines:
        return "file_name" in lines.readline()


def read_file_of_split(task: Task, files: list[Path], source: str, split: str, choice: Choice) -> Found:
    """Read the rows of the file that is named for a split, such as train.jsonl. Raises DataError unless it is one."""
    groups = [[file for file in files if split_word(Path(file.name)) in group] for group in SPLITS[split]]
    chosen, there = next((group for group in groups if group), []), few([file.name for file in files])
    if len(chosen) != 1:
        raise DataError(f"{source}: {len(chosen)} files for {split} among {there}; --data or --eval_data may name one")
    return read_rows(task, str(chosen[0]), split, replace(choice, one_split=True))


def coco_export(source: Path, split: str, choice: Choice) -> Path:
    """Return the COCO file that --data names, or the one of a split in a folder as it was exported and unpacked.

    A file belongs to a split if its path within the folder has a word such as `train` or `valid`; the last one counts.
    A file without such a word is used for training, or for evaluation if --eval_data names it or --eval_only is given.
    Raises DataError if there is no file, or several.
    """
    if source.is_file():
        return whole_file(source, split, choice)
    if not source.is_dir():
        raise DataError(f"{source}: no such folder. {COCO_LAYOUT}")
    files = islice((file for depth in ("", "*/", "*/*/") for file in sorted(source.glob(f"{depth}*.json"))), 100)
    found = [(file, split_word(file.relative_to(source))) for file in files if is_coco(file)]
    groups = [[file for file, word in found if word in group] for group in SPLITS[split]]
    if split == "train" or choice.one_split:
        groups.append([file for file, word in found if not word])
    chosen = next((group for group in groups if group), [])
    if len(chosen) == 1:
        return chosen[0]
    there = few([str(file.relative_to(source)) for file, _ in found])
    if chosen:
        raise DataError(f"{source}: several COCO files for {split} ({there}): --data may name one itself")
    if found and split == "val":
        raise DataError(f"{source}: no file for validation, only {there}: --eval_data names what to evaluate")
    only = f", only {there}" if found else ""
    raise DataError(f"{source}: no COCO file for {split}{only}. {not found and foreign(source) or COCO_LAYOUT}")


def split_word(path: Path) -> str | None:
    """Return the last word of a path that names a split, None without one."""
    return next((word for word in re.findall("[a-z]+", str(path).lower())[::-1] if word in SPLIT_WORDS), None)


def is_coco(file: Path) -> bool:
    """Return whether a file has the lists of COCO's annotations, without parsing it."""
    if file.name.startswith("."):
        return False
    text = file.read_text(encoding="utf-8", errors="replace")
    return all(f'"{part}"' in text for part in ("images", "annotations", "categories", "bbox"))


def tidy(file: Path, table: dict[str, list], paths: list, choice: Choice, notes: list[str]) -> dict[str, list]:
    """Return the lists of a COCO file as COCO itself writes them; add to the notes what the file holds.

    Widths and heights written as text or as 64.0 become integers; image_id and category_id take the form of the ids
    that they refer to. Raises DataError for what would be read wrongly: shared ids, boxes that are not
    [x, y, width, height] in pixels, or with --box_format xyxy [x1, y1, x2, y2]. paths: the file of each image.
    """
    used = {id_key(a["category_id"]) for a in table["annotations"]}
    categories, category_of = unique(file, "categories", table["categories"], used)
    names = [category["name"] for category in categories if id_key(category["id"]) in used]
    if odd := [repr(name) for name in names if not isinstance(name, str) or not name.strip()]:
        raise DataError(f"{file}: categories called {few(odd)}: a model can only be asked for names")
    if names and all(map(str.isdecimal, names)):
        notes.append(f"{file}: its categories are called {few(names)}, and so the model is asked for them")
    images, image_of = unique(file, "images", table["images"], None)
    images = [image | {side: whole_number(image.get(side)) for side in ("width", "height")} for image in images]
    size_of = {image["id"]: (image["width"], image["height"]) for image in images}
    annotations = [
        a | {
            "image_id": image_of.get(id_key(a["image_id"]), a["image_id"]),
            "category_id": category_of.get(id_key(a["category_id"]), a["category_id"]),
            "iscrowd": int(id_key(a.get("iscrowd")) in ("1", "True")),
            "bbox": a["bbox"] if isinstance(a.get("bbox"), (list, tuple)) else None,  # four letters would pass
        }
        for a in table["annotations"]
    ]  # fmt: skip
    if choice.box_format == "xyxy":
        annotations = [a | {"bbox": sides_of(a.get("bbox"))} for a in annotations]
    look_at_boxes(file, annotations, size_of)
    once = {(a["image_id"], a["category_id"], a["iscrowd"], str(a["bbox"])) for a in annotations}
    if len(once) < len(annotations):
        notes.append(f"{file}: {len(annotations) - len(once)} duplicate boxes count once")
    crowds = sum(a["iscrowd"] for a in annotations)
    if crowds and crowds == len(annotations):  # CVAT writes iscrowd 1 for every mask
        notes.append(f"{file}: all annotations have iscrowd 1: they are taken as single objects")
        annotations, crowds = [a | {"iscrowd": 0} for a in annotations], 0
    empty = len(size_of.keys() - {a["image_id"] for a in annotations})
    parents = {path.parent for path in paths if isinstance(path, Path)}
    folder = f" in {os.path.commonpath(parents)}" if parents else ""
    counts = f"{len(annotations) - crowds} boxes, {crowds} crowd regions, {empty} images without any"
    notes.append(f"{file}: {len(images)} images{folder}, {counts}; an example asks for one category of an image")
    return {"images": images, "annotations": annotations, "categories": categories}


def sides_of(box: Any) -> Any:
    """Return [x, y, width, height] for [x1, y1, x2, y2]; what is no box stays, to be reported with its image."""
    try:
        x1, y1, x2, y2 = map(float, box)
    except (TypeError, ValueError):
        return box
    return [x1, y1, x2 - x1, y2 - y1]


def id_key(value: Any) -> str:
    """Return one form of 7, 7.0 and "7": exports write an id in one list as a number, in another as text."""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def whole_number(value: Any) -> Any:
    """Return 64 for 64, 64.0 and "64", and anything else as it is."""
    return int(key) if (key := id_key(value)).isdecimal() else value


def unique(file: Path, part: str, rows: list[dict], used: set[str] | None) -> tuple[list[dict], dict[str, Any]]:
    """Return the records, and {id_key: id}. Raises DataError if two share an id, or two categories a name.

    used: the id_keys that annotations use. An unused category that shares an id or a name is dropped: Roboflow's root
    often has the name of the only class. None: all count as used. Names are compared in plain words.
    """
    kept, first, ids = [], {}, {}
    for record in sorted(rows, key=lambda record: used is not None and id_key(record["id"]) not in used):
        key, name = id_key(record["id"]), record.get("name") if used is not None else None
        name = plain_name(name) if isinstance(name, str) else name  # "hot dog" and "hot_dog" are asked for as one
        shared = first.get(("id", key)) or (name is not None and first.get(("name", name)))
        if shared and (used is None or key in used):
            raise DataError(f"{file}: two {part} share an id or a name: {str(shared)[:200]} and {str(record)[:200]}")
        if not shared:
            kept.append(record)
            first |= {("id", key): record, ("name", name): record}
            ids[key] = record["id"]
    return kept, ids


def look_at_boxes(file: Path, annotations: list[dict], size_of: dict[Any, tuple]) -> None:
    """Raise DataError if the boxes of a file look like [x1, y1, x2, y2], or lie in 0..1."""
    boxes = []
    for annotation in annotations:
        try:
            (x, y, w, h), (width, height) = map(float, annotation["bbox"]), size_of[annotation["image_id"]]
            boxes.append((x, y, w, h, width + 1, height + 1))  # tools round outward
        except (KeyError, TypeError, ValueError):  # is reported with its image
            continue
    tolerated = len(boxes) // 20  # so many odd boxes do not change the verdict
    outside = [box[:4] for box in boxes if box[0] + box[2] > box[4] or box[1] + box[3] > box[5]]
    corners = sum(x1 < x2 <= width and y1 < y2 <= height for x1, y1, x2, y2, width, height in boxes)
    if len(outside) > tolerated and corners >= len(boxes) - tolerated:
        looks = f"{corners} of {len(boxes)} look like [x1, y1, x2, y2]: --box_format xyxy"
        raise DataError(f"{file}: bbox {list(outside[0])} lies outside its image; {looks}")
    if boxes and sum(max(box[:4]) <= 1 for box in boxes) >= len(boxes) - tolerated:
        raise DataError(f"{file}: most boxes lie in 0..1; [x, y, width, height] in pixels expected")


# What marks a folder, or the ending of a file -> the tool, and what `globox convert` is told.
FOREIGN = {
    "annotations.xml": ("CVAT's XML", "DIR/annotations.xml DIR/train.json -f cvat"),
    "**/*.xml": ("Pascal VOC", "DIR/Annotations DIR/train.json -f pascalvoc"),
    "data.yaml": ("YOLO", "DIR/labels DIR/train.json -f yolov5 -d DIR/images -m NAMES.txt"),
    "labels/**/*.txt": ("YOLO", "DIR/labels DIR/train.json -f yolov5 -d DIR/images -m NAMES.txt"),
    "**/*.json": ("LabelMe", "DIR DIR/train.json -f labelme"),
}


def foreign(path: Path) -> str:
    """Say how to convert the annotations of another tool in a folder or file; empty if none is recognized."""
    for sign, (tool, told) in FOREIGN.items():
        ending = "." + sign.rpartition(".")[2]
        if next(path.glob(sign), None) if path.is_dir() else path.suffix.lower() == ending:
            command = f"globox convert {told} -F coco --coco_auto_ids"
            return f"This may be {tool}. pip install globox, and for each split: {command}"
    return ""


def whole_images(examples: list[Example], choice: Choice, notes: list[str], most: int = 2000) -> list[Example]:
    """Read the headers of at most `most` image files, drawn by seed; return the examples without those found bad.

    Other images are checked when a step opens them. Raises DataError for a bad one, unless --skip_bad_images leaves it
    out.
    """
    sizes = {image: None for e in examples for image in e.images if isinstance(image, Path)}
    sizes |= {e.images[0]: e.size for e in examples if e.images[0] in sizes}
    flaws: dict[Path, str] = {}
    for image in random.Random(choice.seed).sample(sorted(sizes), min(most, len(sizes))):
        try:
            image_size(image, sizes[image])
        except DataError as error:
            flaws[image] = str(error)
    leave_out("images", list(flaws.values()), choice, notes)
    return [e for e in examples if not flaws.keys() & set(e.images)]
