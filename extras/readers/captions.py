"""Read COCO's captions: questions about whole images, for mia_dpo.py."""

from pathlib import Path
from typing import Any

from data import Choice, DataError, Example, Found, coco_file, refuse

CAPTION_FIELDS = {"images": ("id", "file_name"), "annotations": ("image_id", "caption")}


def read_captions(data: str, split: str, choice: Choice) -> Found:
    """Read the captions_<split>*.json of a folder of data.COCO_LAYOUT: the first caption of each image, as text."""
    refuse(choice, "captions have no categories", "categories", "shots", "negatives", "eval_categories")
    file, table, paths = coco_file(Path(data), "captions", split, CAPTION_FIELDS)
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
