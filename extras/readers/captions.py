"""Read COCO's captions: questions about whole images, for mia_dpo.py."""

from pathlib import Path
from typing import Any

from data import COCO_LAYOUT, Choice, DataError, Example, Found, annotation_file, image_paths, read_table, refuse

CAPTION_FIELDS = {"images": ("id", "file_name"), "annotations": ("image_id", "caption")}


def read_captions(data: str, split: str, choice: Choice) -> Found:
    """Read the captions_<split>*.json of a folder of data.COCO_LAYOUT: the first caption of each image, as text."""
    refuse(choice, "captions have no categories", "categories", "shots", "negatives", "eval_categories")
    if not (file := annotation_file(Path(data), f"captions_{split}*.json")):
        raise DataError(f"{data}: no file captions_{split}*.json, or no folder. {COCO_LAYOUT}")
    table = read_table(file, CAPTION_FIELDS)
    paths = image_paths(file, table["images"])
    path_of = {record["id"]: path for record, path in zip(table["images"], paths)}
    first: dict[Any, str] = {}
    for row, record in enumerate(table["annotations"]):
        if record["image_id"] not in path_of:
            image = f"image {record['image_id']}"
            raise DataError(f"{file}: annotations[{row}] names {image}, which the file does not list")
        if words := str(record["caption"]).split():
            first.setdefault(record["image_id"], " ".join(words))
    question = "Describe the image in one sentence."
    examples = [
        Example(f"{split}/{i}", (path_of[i],), None, caption, "caption", image_id=i, question=question)
        for i, caption in first.items()
    ]
    return examples, []
