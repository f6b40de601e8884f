"""Read LVIS (v0.5 and v1): COCO's images, 1,200 categories, of which only a few were checked in each image."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data import DETECTION_FIELDS, Choice, DataError, Found, annotation_file, detection_examples, plain_name, read_table
from extras.readers.choose import whole_file

LVIS_LAYOUT = """An LVIS folder (v0.5 or v1) looks like this; its images are COCO's:
  DIR/annotations/lvis_v1_train.json          (or directly in DIR)
  DIR/annotations/lvis_v1_val.json            (only for evaluation)
  DIR/train2017/000000000009.jpg ...
  DIR/val2017/000000000139.jpg ..."""

# v0.5 names files as COCO did in 2014 and v1 does not name them; the address is in both.
LVIS_FIELDS = DETECTION_FIELDS | {"images": ("id", "coco_url")}


def read_lvis(data: str, split: str, choice: Choice) -> Found:
    """Read a folder of LVIS_LAYOUT; categories are asked for in plain words.

    Only the categories in an image's `neg_category_ids` are known to be absent, so only these become negatives.
    Categories in `not_exhaustive_category_ids`, or not checked in an image, do not count as `exhaustive`. The former
    are evaluated, but not trained on: a reward would punish the true boxes that the file lacks.
    """
    root = Path(data)
    if not (file := root if root.is_file() else annotation_file(root, f"lvis*_{split}*.json")):
        raise DataError(f"{root}: no file lvis*_{split}*.json, or no folder. {LVIS_LAYOUT}")
    if root.is_file():
        whole_file(root, split, choice)
    table = read_table(file, LVIS_FIELDS)
    if lost := [row for row, record in enumerate(table["images"]) if not isinstance(record["coco_url"], str)]:
        raise DataError(f"{file}: images[{lost[0]}] has no coco_url; its end is the path of the image")
    for record in table["categories"]:
        record["name"] = plain_name(record["name"])
    name_of = {record["id"]: record["name"] for record in table["categories"]}
    checked = {r["id"]: Verified.of(r, name_of) for r in table["images"] if "neg_category_ids" in r}

    def verified(image_id: Any, name: str, shown: bool) -> bool:
        return image_id not in checked or checked[image_id].known(name, shown)

    places = [folder / part for folder in (file.parent, file.parent.parent) for part in ("", "images")]
    if not (base := next((p for p in places if (p / "train2017").is_dir() or (p / "val2017").is_dir()), None)):
        raise DataError(f"{root}: no folder train2017 or val2017. {LVIS_LAYOUT}")
    paths = [base.joinpath(*record["coco_url"].split("/")[-2:]) for record in table["images"]]
    notes: list[str] = []
    if split == "train":
        rows = [a for a in table["annotations"] if not verified(a["image_id"], name_of.get(a["category_id"]), True)]
        for record in rows:
            record["iscrowd"] = 1
        if rows:
            which = "boxes of not_exhaustive_category_ids"
            notes.append(f"{file}: {len(rows)} {which} count as crowd regions: other instances lack boxes")
    examples, more = detection_examples((file, table, paths), split, choice, verified)
    return examples, notes + more


@dataclass(frozen=True)
class Verified:
    """Hold what the annotators verified in one image, by category name."""

    absent: frozenset[str]  # not shown (`neg_category_ids`)
    partial: frozenset[str]  # shown, but not every instance is annotated (`not_exhaustive_category_ids`)

    @classmethod
    def of(cls, record: dict, name_of: dict) -> "Verified":
        """Read one record of the file's images."""
        absent, partial = (
            frozenset(name_of[i] for i in record.get(key) or () if i in name_of)
            for key in ("neg_category_ids", "not_exhaustive_category_ids")
        )
        return cls(absent, partial)

    def known(self, name: str, shown: bool) -> bool:
        """Return whether every instance of a category is annotated; shown: whether any instance is."""
        return name not in self.partial and (shown or name in self.absent)
