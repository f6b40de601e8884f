"""Test every task: its reader, its prompt, its score on perfect answers, and two steps of training."""

import dataclasses
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
from conftest import ROOT, SHARED, shared
from PIL import Image

import data

import mia_dpo
import rewards
import virft
from data import TASKS, Choice, DataError, Example
from demo import shapes
from extras import check, checkpoints, evaluate
from extras.readers import choose, rows


EXTRAS = {  # what the error names: (a call that needs an optional reader, its module in extras/readers)
    "--task lvis": (TASKS["lvis"].read, "lvis"),
    **{f"--task {name}": (TASKS[name].read, "classes") for name in ("flowers", "pets", "aircraft", "cars", "classes")},
    "--task lisa": (TASKS["lisa"].read, "reasonseg"),
    "--task captions": (mia_dpo.CAPTIONS.read, "captions"),
    "--data owner/name": (partial(rows.read_rows, TASKS["coco"]), "tables"),
    "--shots, --negatives or --eval_categories": (data.read_coco, "choose"),
}


def read(task: str, root, split: str = "train", **flags):
    return TASKS[task].read(str(root), split, Choice(**flags))


def picture(path: Path, size=(60, 40), color="red") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path)
    return path


# ------------------------------------------------------------------------------------------------
# Small datasets in every layout: write(root) makes both splits.


def write_coco(root: Path) -> None:
    for split in ("train", "val"):
        shapes.write_split(root, split, 8, seed=0)


LVIS_NAMES = {1: "horse_buggy", 2: "die", 3: "monitor_(computer_equipment) computer_monitor", 4: "sugar_bowl"}


def lvis_table(version: str, folder: str) -> dict:
    """Return a table: image 1 shows a horse buggy and a monitor (not exhaustively), image 2 two dice."""
    images = [
        {"id": 1, "width": 60, "height": 40, "coco_url": f"http://images.cocodataset.org/{folder}/000000000001.jpg",
         "neg_category_ids": [2, 4], "not_exhaustive_category_ids": [3]},
        {"id": 2, "width": 60, "height": 40, "coco_url": f"http://images.cocodataset.org/{folder}/000000000002.jpg",
         "neg_category_ids": [1, 3], "not_exhaustive_category_ids": [3]},
    ]  # fmt: skip
    if version == "v0.5":
        images = [image | {"file_name": f"COCO_val2014_{image['id']:012d}.jpg"} for image in images]
    boxes = [(1, 1, [5, 5, 20, 20]), (1, 3, [30, 5, 20, 30]), (2, 2, [1, 2, 10, 11]), (2, 2, [20, 2, 30, 31])]
    annotations = [{"id": i, "image_id": a, "category_id": c, "bbox": box} for i, (a, c, box) in enumerate(boxes, 1)]
    categories = [{"id": i, "name": name, "synonyms": [name]} for i, name in LVIS_NAMES.items()]
    return {"images": images, "annotations": annotations, "categories": categories}


def write_lvis(root: Path, version: str = "v1", images: str = ".") -> None:
    for split in ("train", "val"):
        table = lvis_table(version, f"{split}2017")
        for image in table["images"]:
            picture(root / images / f"{split}2017" / f"{image['id']:012d}.jpg")
        (root / "annotations").mkdir(exist_ok=True)
        (root / "annotations" / f"lvis_{version}_{split}.json").write_text(json.dumps(table))


def write_labels(root: Path) -> None:
    """Write labels.csv, as for Flowers-102 after its conversion."""
    lines = ["file,class_name,split"]
    for split in ("train", "test"):
        for i, name in enumerate(["tiger lily", "fire_lily"] * 2):
            picture(root / "jpg" / f"{split}_{i}.jpg")
            lines.append(f"jpg/{split}_{i}.jpg,{name},{split}")
    (root / "labels.csv").write_text("\n".join(lines) + "\n")


def write_pets(root: Path) -> None:
    for part in ("trainval", "test"):
        names = [f"{breed}_{part}{i}" for breed in ("Abyssinian", "american_bulldog") for i in (1, 2)]
        for name in names:
            picture(root / "images" / f"{name}.jpg")
        (root / "annotations").mkdir(exist_ok=True)
        (root / "annotations" / f"{part}.txt").write_text("".join(f"{name} 1 1 1\n" for name in names))


def write_aircraft(root: Path) -> None:
    base = root / "data"
    for part, first in (("trainval", 100), ("test", 200)):
        lines = [(f"{first + i:07d}", name) for i, name in enumerate(["707-320", "Boeing 717", "F/A-18"] * 2)]
        for image, _ in lines:
            picture(base / "images" / f"{image}.jpg")
        (base / f"images_variant_{part}.txt").write_text("".join(f"{image} {name}\n" for image, name in lines))


def write_folders(root: Path) -> None:
    """Write class folders, with test/ and without val/."""
    for split in ("train", "test"):
        for name in ("Audi A5 Coupe 2012", "BMW_X3_SUV_2012"):
            for i in range(2):
                picture(root / split / name / f"{i}.jpg")
            (root / split / name / "notes.txt").write_text("not an image")


def write_lisa(root: Path) -> None:
    for split in ("train", "val"):
        picture(root / split / "a.jpg")
        triangle = {"label": "target", "points": [[10.5, 5], [30, 8], [20, 25.5]]}
        ignored = {"label": "ignore", "points": [[0, 0], [60, 0], [60, 40]]}
        table = {
            "text": ["What barks?", "the dog, left of the door"],
            "is_sentence": True,
            "shapes": [triangle, ignored],
        }
        (root / split / "a.json").write_text(json.dumps(table))


def write_rows(root: Path) -> None:
    for name, count in (("a.png", 3), ("b.png", 12)):
        picture(root / name)
        with (root / "rows.jsonl").open("a") as out:
            out.write(json.dumps({"image": name, "problem": "How many?", "solution": str(count)}) + "\n")


LAYOUTS = {
    "coco": write_coco, "lvis": write_lvis, "flowers": write_labels, "pets": write_pets, "aircraft": write_aircraft,
    "cars": write_folders, "classes": write_folders, "lisa": write_lisa, "rows": write_rows,
}  # fmt: skip


@pytest.fixture
def dataset(tmp_path):
    """Return make(task): write the task's own layout, or a file for `rows`, and return the value of --data."""

    def make(task: str) -> str:
        root = tmp_path / task
        root.mkdir()
        LAYOUTS[task](root)
        return str(root / "rows.jsonl" if task == "rows" else root)

    return make


def test_every_task_has_a_layout():
    assert set(LAYOUTS) == set(TASKS)


# ------------------------------------------------------------------------------------------------
# LVIS.


@pytest.mark.parametrize("version", ["v0.5", "v1"])
@pytest.mark.parametrize("images", [".", "images"])
def test_lvis(tmp_path, version, images):
    write_lvis(tmp_path, version, images)
    examples, notes = read("lvis", tmp_path)
    assert [e.id for e in examples] == ["train/1/horse buggy", "train/2/die"]
    assert any("1 boxes of not_exhaustive_category_ids count as crowd regions" in note for note in notes)
    assert "val/1/monitor (computer equipment) computer monitor" in {e.id for e in read("lvis", tmp_path, "val")[0]}
    assert examples[1].solution == ((1, 2, 11, 13), (20, 2, 50, 33)) and examples[1].category_id == 2
    assert examples[0].images == (tmp_path / images / "train2017" / "000000000001.jpg",)
    assert "Find every horse buggy in the image." in TASKS["lvis"].prompt(
        examples[0].category, (1, 1), "relative", True
    )
    assert any("no image shows" in note and "sugar bowl" in note for note in notes)


def test_lvis_negatives_are_the_verified_ones(tmp_path):
    """Check that negatives are verified: dice and sugar bowls in image 1, horse buggies in 2, never the monitor."""
    write_lvis(tmp_path)
    found = Counter()
    for seed in range(20):
        examples, _ = read("lvis", tmp_path, negatives=0.4, seed=seed)
        found.update(e.id for e in examples if not e.solution)
    assert set(found) == {"train/1/die", "train/1/sugar bowl", "train/2/horse buggy"}


@shared("lvis_val_100")
@pytest.mark.parametrize("split, count", [("lvis_fewshot6", 6), ("lvis_rare13", 13)])
def test_lvis_splits_by_name(split, count):
    """Compare with the 1,230 names of the real file; underscores and spaces are equivalent."""
    table = json.loads((SHARED / "lvis_val_100" / "lvis_val_100.json").read_text())
    known = [data.plain_name(c["name"]) for c in table["categories"]]
    wanted = data.wanted_categories("lvis", known, split)
    assert len(wanted) == count and "stepladder" in wanted and "kitchen table" in wanted
    assert data.wanted_categories("lvis", known, "kitchen table, egg_roll") == ["kitchen table", "egg roll"]


@shared("lvis_val_100")
def test_real_lvis(real_lvis, tmp_path):
    examples, _ = read("lvis", tmp_path, "val", negatives=0.2)
    assert sum(len(e.solution) for e in examples) == len(real_lvis["annotations"]) == 977
    assert len({e.category for e in examples if e.solution}) == 190 and not any("_" in e.category for e in examples)
    verified = {image["id"]: image["neg_category_ids"] for image in real_lvis["images"]}
    absent = [e for e in examples if not e.solution]
    assert absent and all(e.category_id in verified[e.image_id] for e in absent)
    # all 977 boxes are inside their image after clipping
    assert all(
        0 <= x1 < x2 <= e.size[0] and 0 <= y1 < y2 <= e.size[1] for e in examples for x1, y1, x2, y2 in e.solution
    )


def test_lvis_errors(tmp_path):
    with pytest.raises(DataError, match=r"(?s)no file lvis\*_train\*\.json, or no folder.*lvis_v1_train\.json"):
        read("lvis", tmp_path / "none")
    with pytest.raises(DataError, match=r"no file lvis\*_train\*\.json"):
        read("lvis", tmp_path)
    write_lvis(tmp_path)
    file = tmp_path / "annotations" / "lvis_v1_train.json"
    table = lvis_table("v1", "train2017")
    del table["images"][1]["coco_url"]
    file.write_text(json.dumps(table))
    with pytest.raises(DataError, match=r"images\[1\] has no 'coco_url'"):
        read("lvis", tmp_path)
    table = lvis_table("v1", "elsewhere2017")
    file.write_text(json.dumps(table))
    with pytest.raises(DataError, match=r"elsewhere2017/000000000001\.jpg: no such image \(images\[0\]"):
        read("lvis", tmp_path)


# ------------------------------------------------------------------------------------------------
# --eval_categories.


def test_eval_categories(tmp_path):
    """Check gt (what an image shows), all (every category of every image) and listed (those of --categories)."""
    write_lvis(tmp_path)

    def asked(**flags):
        return {e.id.removeprefix("val/") for e in read("lvis", tmp_path, "val", **flags)[0]}

    names = [data.plain_name(name) for name in LVIS_NAMES.values()]
    assert asked() == {"1/horse buggy", f"1/{names[2]}", "2/die"}
    assert asked(eval_categories="all") == {f"{i}/{name}" for i in (1, 2) for name in names}
    everything = read("lvis", tmp_path, "val", eval_categories="all")[0]
    assert {e.id.removeprefix("val/") for e in everything if e.exhaustive} == {
        "1/horse buggy", "1/die", "1/sugar bowl", "2/die", "2/horse buggy",
    }, "shown and annotated in full, or verified to be absent"  # fmt: skip
    assert asked(eval_categories="listed", categories="die, sugar_bowl") == {
        "1/die", "1/sugar bowl", "2/die", "2/sugar bowl",
    }  # fmt: skip
    for flags, message in (
        ({"eval_categories": "listed"}, "listed: needs --categories"),
        ({"eval_categories": "all", "categories": "die"}, "all: asks for all categories, so without --categories"),
        ({"eval_categories": "all", "negatives": 0.1}, "--negatives 0.1: only with --eval_categories gt"),
    ):
        with pytest.raises(DataError, match=message):
            asked(**flags)
    write_labels(tmp_path)
    for task in ("lisa", "cars"):
        with pytest.raises(DataError, match="--eval_categories all: "):
            read(task, tmp_path, "val", eval_categories="all")


def test_images_without_any_object_are_asked_too(tmp_path):
    write_coco(tmp_path)
    file = tmp_path / "annotations" / "instances_val.json"
    table = json.loads(file.read_text())
    table["annotations"] = [a for a in table["annotations"] if a["image_id"] != 3]
    file.write_text(json.dumps(table))
    examples = read("coco", tmp_path, "val", eval_categories="all")[0]
    asked = len({a["category_id"] for a in table["annotations"]})  # a category without any box is not asked
    assert len(examples) == 8 * asked and sum(e.image_id == 3 and not e.solution for e in examples) == asked


# ------------------------------------------------------------------------------------------------
# Classes.

READ = {  # task: (classes of the small dataset, images per split)
    "flowers": ({"tiger lily", "fire lily"}, 4),
    "pets": ({"Abyssinian", "american bulldog"}, 4),
    "aircraft": ({"707-320", "Boeing 717", "F/A-18"}, 6),
    "cars": ({"Audi A5 Coupe 2012", "BMW X3 SUV 2012"}, 4),
    "classes": ({"Audi A5 Coupe 2012", "BMW X3 SUV 2012"}, 4),
}


@pytest.mark.parametrize("task", READ)
def test_classes(dataset, task):
    classes, count = READ[task]
    source = dataset(task)
    train, val = (read(task, source, split)[0] for split in ("train", "val"))
    for examples in (train, val):
        assert {e.solution for e in examples} == classes and len(examples) == count
        assert all(e.category == e.solution and e.images[0].exists() and e.size is None for e in examples)
        assert len({e.id for e in examples}) == len({e.image_id for e in examples}) == count
    assert not {e.images for e in train} & {e.images for e in val}
    prompt = TASKS[task].prompt(train[0].category, (1000, 1000), "relative", True)
    assert not any(name in prompt for name in classes) and "<think> ... </think><answer>" in prompt
    assert "<think>" not in TASKS[task].prompt(train[0].category, (1000, 1000), "relative", False)


def test_shots_and_categories_of_classes(dataset):
    source = dataset("aircraft")
    first, again = (read("aircraft", source, shots=1, seed=3)[0] for _ in range(2))
    assert [e.id for e in first] == [e.id for e in again] and len(first) == 3
    assert len({tuple(e.id for e in read("aircraft", source, shots=1, seed=seed)[0]) for seed in range(8)}) > 1
    only, notes = read("aircraft", source, shots=4, categories="boeing_717".replace("b", "B"))
    assert {e.category for e in only} == {"Boeing 717"} and any(
        "fewer than 4 images for Boeing 717 (2)" in n for n in notes
    )
    with pytest.raises(DataError, match="--categories: 'Boing 717' is not in .*near it: Boeing 717"):
        read("aircraft", source, categories="Boing 717")
    _, notes = data.load_examples(TASKS["aircraft"], source, "train", shots=1, seed=5)
    assert notes[0].endswith("(shots 1, seed 5)")


@pytest.mark.parametrize("name", ["labels.json", "labels.jsonl"])
def test_labels_in_json_may_have_aliases(tmp_path, name):
    picture(tmp_path / "a.jpg")
    rows = [{"file": "a.jpg", "class_name": ["tiger lily", "Lilium lancifolium"], "split": "train", "label": 5}]
    (tmp_path / name).write_text(json.dumps(rows if name.endswith(".json") else rows[0]))
    (example,), _ = read("flowers", tmp_path)
    assert example.solution == ("tiger lily", "Lilium lancifolium") and example.category == "tiger lily"
    assert rewards.accuracy_reward("<answer>lilium lancifolium</answer>", example.solution) == 1.0


@shared("flowers102_mini")
def test_real_flowers():
    train, val = (read("flowers", SHARED / "flowers102_mini", split)[0] for split in ("train", "val"))
    names = set(json.loads((SHARED / "flowers102_mini" / "classes.json").read_text()))
    for examples, per_class in ((train, 4), (val, 2)):
        assert Counter(e.category for e in examples) == dict.fromkeys(names, per_class)
    assert [image.size for image in data.open_images(train[0])] == [(310, 224)]
    few, _ = read("flowers", SHARED / "flowers102_mini", shots=1)
    assert len(few) == 102 and {e.id for e in few} < {e.id for e in train}


def missing_image(root: Path) -> None:
    (root / "jpg" / "train_1.jpg").unlink()


def nameless_row(root: Path) -> None:
    text = (root / "labels.csv").read_text()
    (root / "labels.csv").write_text(text.replace("train_1.jpg,fire_lily", "train_1.jpg,"))


def no_split(root: Path) -> None:
    (root / "labels.csv").write_text((root / "labels.csv").read_text().replace(",train", ",fit"))


def numbers(root: Path) -> None:
    text = (root / "labels.csv").read_text()
    (root / "labels.csv").write_text(text.replace("tiger lily", "6").replace("fire_lily", "21"))


@pytest.mark.parametrize(
    "change, message",
    [
        (missing_image, r"labels\.csv: line 3: .*train_1\.jpg: no such image"),
        (nameless_row, r"labels\.csv: line 3: solution 'None': expected a class name"),
        (no_split, r"labels\.csv: no split train\. Its rows have split fit, test"),
        (numbers, r"the classes are called 6, 21 \.\.\.; a model can answer names only"),
        (lambda root: (root / "labels.csv").unlink(), r"(?s)no split train\. Images with class names are read from"),
    ],
)
def test_label_errors(tmp_path, change, message):
    write_labels(tmp_path)
    change(tmp_path)
    with pytest.raises(DataError, match=message):
        read("flowers", tmp_path)
    if change is missing_image:
        examples, notes = read("flowers", tmp_path, skip_bad_images=True)
        assert len(examples) == 3 and "1 images skipped" in notes[0]


def test_other_class_errors(dataset, tmp_path):
    with pytest.raises(DataError, match="none: no such folder"):
        read("cars", tmp_path / "none")
    source = dataset("pets")
    (Path(source) / "annotations" / "trainval.txt").write_text("Abyssinian\n")
    with pytest.raises(DataError, match=r"trainval\.txt: line 1: solution '': expected a class name"):
        read("pets", source)
    with pytest.raises(DataError, match="--negatives 0.2: questions about classes ask for no category"):
        read("pets", source, negatives=0.2)
    with pytest.raises(DataError, match="--max_boxes 3: --task cars has no boxes"):
        data.load_examples(TASKS["cars"], dataset("cars"), "train", max_boxes=3)


# ------------------------------------------------------------------------------------------------
# ReasonSeg.


def test_lisa(dataset):
    examples, _ = read("lisa", dataset("lisa"))
    assert [(e.id, e.category) for e in examples] == [
        ("train/a/0", "What barks?"),
        ("train/a/1", "the dog, left of the door"),
    ]
    assert {e.solution for e in examples} == {(10.5, 5, 30, 25.5)} and examples[0].size == (60, 40)
    prompt = TASKS["lisa"].prompt(examples[0].category, (56, 28), "pixels", True)
    assert "What barks?" in prompt and "(x1,y1),(x2,y2)" in prompt and "56 wide and 28 high" in prompt
    assert "0 to 1000" in TASKS["lisa"].prompt("it", (1000, 1000), "relative", False)


def reasonseg(tmp_path, encoding="utf-8", **change) -> Path:
    picture(tmp_path / "train" / "a.jpg")
    table = {"text": ["café?"], "shapes": [{"label": "target", "points": [[10, 5], [30, 8], [20, 25]]}]} | change
    (tmp_path / "train" / "a.json").write_bytes(json.dumps(table, ensure_ascii=False).encode(encoding))
    return tmp_path


def test_lisa_polygons(tmp_path):
    """Check that all target polygons count, also outside the image, and that both encodings are read."""
    two = [{"label": "Target", "points": [[-5, 5], [30, 8]]}, {"label": "target", "points": [[40, 30], [50, 45]]}]
    (example,), _ = read("lisa", reasonseg(tmp_path, shapes=two))
    assert example.solution == (0, 5, 50, 40)
    (example,), _ = read("lisa", reasonseg(tmp_path, encoding="cp1252"))
    assert example.category == "café?"


@pytest.mark.parametrize(
    "change, message",
    [
        ({"text": "one string"}, r"a\.json: 'text' is one string; a list of instructions expected"),
        ({"text": []}, r"a\.json: 'text' is \[\]"),
        ({"shapes": [{"label": "ignore", "points": [[1, 1], [2, 2]]}]}, "no polygon labeled 'target' with an area"),
        ({"shapes": [{"label": "target", "points": [[100, 5], [110, 9]]}]}, r"within the 60x40 image \(has no area\)"),
        ({"shapes": [{"points": [[100, 5], [110, 9]]}]}, "no polygon labeled 'target'.*label"),
    ],
)
def test_lisa_errors(tmp_path, change, message):
    root = reasonseg(tmp_path, **change)
    with pytest.raises(DataError, match=message):
        read("lisa", root)
    examples, notes = read("lisa", root, skip_bad_images=True)
    assert examples == [] and "1 images skipped" in notes[0]


def test_the_folder_of_one_lisa_split_is_evaluated(tmp_path):
    """DIR has val and test: --eval_data DIR/test reads test, and trains on nothing."""
    for split in ("val", "test"):
        picture(tmp_path / split / f"{split}.jpg")
        table = {"text": [split], "shapes": [{"label": "target", "points": [[10, 5], [30, 8], [20, 25]]}]}
        (tmp_path / split / f"{split}.json").write_text(json.dumps(table))
    asked = [
        TASKS["lisa"].read(str(folder), "val", Choice())[0][0].category for folder in (tmp_path, tmp_path / "test")
    ]
    assert asked == ["val", "test"]
    with pytest.raises(DataError, match="no split train"):
        TASKS["lisa"].read(str(tmp_path / "test"), "train", Choice())


def test_lisa_files(tmp_path):
    with pytest.raises(DataError, match=r"(?s)no split train\. A ReasonSeg folder looks like this"):
        read("lisa", tmp_path)
    root = reasonseg(tmp_path)
    (root / "train" / "a.jpg").unlink()
    with pytest.raises(DataError, match=r"a\.jpg: no such image"):
        read("lisa", root)
    with pytest.raises(DataError, match="--shots 2: instructions have no categories"):
        read("lisa", root, shots=2)
    (root / "train" / "a.json").unlink()
    with pytest.raises(DataError, match=r"train: no \.json files"):
        read("lisa", root)


# ------------------------------------------------------------------------------------------------
# Perfect answers earn perfect scores: the same evaluation, every task, both conventions.


def evaluated(task: data.Task, examples, coordinates: str, digits: int | None):
    """Return the scores, overall and by category, of ground truth written as answers."""
    records = []
    for e in examples:
        _, target = task.question(e, e.size or (1, 1), coordinates, True)
        text = "<think>a</think>" + data.model_answer(task, e, target, think=False, digits=digits)
        solution = data.model_solution(e, target)
        earned = {name: rewards.REWARDS[name](text, solution) for name in task.rewards}
        records.append(evaluate.record(task, e, target, text, earned))
    overall, each = evaluate.scores(records, task)
    assert overall["parsed"] == overall["format"] == 1.0
    return overall, each


def bounds(e, coordinates: str) -> list[float]:
    """Return the least IoU of each box with a rounded copy, whose edges are off by at most half a unit."""
    target = data.model_size(coordinates, e.size)
    sides = [(x2 - x1, y2 - y1) for x1, y1, x2, y2 in data.boxes_in(data.model_solution(e, target))]
    return [max(0.0, w - 1) * max(0.0, h - 1) / ((w + 1) * (h + 1)) for w, h in sides]


def least_ap(examples, coordinates: str) -> float:
    """Return the AP if all boxes that rounding can push below a threshold were errors, ranked above all others."""
    total, names = 0.0, {e.category for e in examples}
    for name in names:
        ious = [iou for e in examples if e.category == name for iou in bounds(e, coordinates)]
        for threshold in range(50, 100, 5):
            share = sum(iou >= threshold / 100 for iou in ious) / len(ious)
            total += share * int(100 * share) / 101 / 10
    return total / len(names)


REAL = [
    pytest.param("coco", "coco_mini", marks=shared("coco_mini")),
    pytest.param("flowers", "flowers102_mini", marks=shared("flowers102_mini")),
]


@pytest.mark.parametrize("coordinates", ["relative", "pixels"])
@pytest.mark.parametrize("name, real", [*((name, None) for name in TASKS), *REAL])
def test_ground_truth_as_answers_scores_one(dataset, name, real, coordinates):
    task = TASKS[name]
    source = str(SHARED / real) if real else dataset(name)
    examples, _ = data.load_examples(task, source, "val")
    exact, each = evaluated(task, examples, coordinates, digits=9)
    rounded, _ = evaluated(task, examples, coordinates, digits=None)
    expected = {
        "detection": {"AP": 1.0, "AP50": 1.0, "AP75": 1.0, "iou": 1.0},
        "classification": {"accuracy": 1.0, "published_accuracy": 1.0},
        "grounding": {"mean_iou": 1.0, "cumulative_iou": 1.0, "iou_above_0.5": 1.0, "giou": 2.0},
        "rewards": {"accuracy": 1.0},
    }[task.metric]
    assert {key: exact[key] for key in expected} == pytest.approx(expected)
    for values in each.values():
        assert {key: value for key, value in values.items() if key in expected} == pytest.approx(
            {key: value for key, value in expected.items() if key in values}
        )
    if task.metric == "detection":
        assert rounded["AP"] >= least_ap(examples, coordinates) > 0.6
        assert rounded["iou"] >= 0.97 * sum(sum(b) / len(b) for b in (bounds(e, coordinates) for e in examples)) / len(
            examples
        )
    elif task.metric == "grounding":
        assert 1.0 > rounded["mean_iou"] >= sum(sum(bounds(e, coordinates)) for e in examples) / len(examples) > 0.6
    else:
        assert rounded == exact


def test_rows_with_boxes_score_one_in_both_declarations(tmp_path):
    """Score the same boxes in pixels and in 0..1000, for models of both conventions."""
    picture(tmp_path / "a.png", (640, 427))
    box = (64.0, 42.7, 320.0, 213.5)
    for coords, solution in (("pixels", box), (1000, (100, 100, 500, 500))):
        for name in ("coco", "lisa"):
            row = {
                "image": "a.png",
                "problem": "Where?",
                "coords": coords,
                "solution": [solution] if name == "coco" else solution,
            }
            (tmp_path / "rows.jsonl").write_text(json.dumps(row))
            examples, _ = data.load_examples(TASKS[name], str(tmp_path / "rows.jsonl"), "val")
            assert data.boxes_in(examples[0].solution) == [pytest.approx(box)]
            for coordinates in ("relative", "pixels"):
                overall, _ = evaluated(TASKS[name], examples, coordinates, digits=9)
                assert overall.get("AP", overall.get("mean_iou")) == pytest.approx(1.0)


# ------------------------------------------------------------------------------------------------
# Rewards and rows of the user.

MY_REWARDS = """\
import re
from rewards import parse_answer


def closeness(completion: str, solution: str) -> float:
    \"\"\"1 for the right number, less the farther off, in [0, 1].\"\"\"
    number = re.fullmatch(r"[0-9]{1,6}", parse_answer(completion) or "")
    return 1 / (1 + abs(int(number.group()) - int(solution))) if number else 0.0
"""
MY_ROWS = """\
{"image": "a.png", "problem": "How many? <think> ... </think><answer>number</answer>", "solution": "3"}
{"images": ["a.png", "b.png"], "problem": "How many more? <think> ... </think><answer>number</answer>", \
"solution": "2"}
"""
MY_COMMAND = "--task rows --data rows.jsonl --rewards my_rewards.py:closeness format=0.5"


SMALL = "--max_completion_tokens 12 --group_size 2 --prompts_per_step 2 --steps 2 --workers 0 --beta 0 --lr 0.001"


@pytest.fixture(autouse=True)
def a_report_at_every_step(monkeypatch):
    monkeypatch.setattr(virft, "REPORT_EVERY", 1)


def run_main(command: str, model: Path, out: Path) -> list[dict]:
    virft.main([*command.split(), *SMALL.split(), "--model", str(model), "--out", str(out)])
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_my_reward_on_my_rows(llava_dir, tmp_path, monkeypatch, signals):
    """Run the reward, the rows and the command that the README shows, word for word."""
    readme = (ROOT / "README.md").read_text()
    assert all(text in readme for text in (MY_REWARDS, MY_ROWS, MY_COMMAND))
    (tmp_path / "my_rewards.py").write_text(MY_REWARDS)
    (tmp_path / "rows.jsonl").write_text(MY_ROWS)
    picture(tmp_path / "a.png")
    picture(tmp_path / "b.png", (30, 50))
    monkeypatch.chdir(tmp_path)
    metrics = run_main(MY_COMMAND, llava_dir, tmp_path / "run")
    assert len(metrics) == 2 and {"reward/closeness", "reward/format"} <= metrics[0].keys()
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["rewards"] == ["my_rewards.py:closeness", "format=0.5"]
    chosen = rewards.choose_rewards(rewards.reward_weights(config["rewards"]))
    assert {name: weight for name, (_, weight) in chosen.items()} == {"closeness": 1.0, "format": 0.5}
    assert [chosen["closeness"][0](f"<answer>{n}</answer>", "3") for n in ("3", "4", "x")] == [1.0, 0.5, 0.0]
    (first, second), _ = data.load_examples(TASKS["rows"], "rows.jsonl", "train")
    assert first.solution == "3" and len(second.images) == 2
    assert TASKS["rows"].question(first, (112, 112), "pixels", True)[0].startswith("How many? <think>")


def test_reward_is_short_for_rewards():
    assert virft.parse_config(["--reward", "iou", "my_rewards.py:f=2"]).rewards == ["iou", "my_rewards.py:f=2"]


BAD_REWARDS = {  # what is wrong: (entry, what the error must say)
    "no file": ("none.py:f", "none.py:f: no file none.py"),
    "no function": ("mine.py:nothing", r"mine\.py has no function nothing; expected def nothing\(completion, sol"),
    "no function but a name": ("mine.py:NUMBER", r"mine\.py has no function NUMBER"),
    "one argument": ("mine.py:one", r"mine\.py: one\(completion\) cannot be called as one\(completion, solution\)"),
    "three arguments": ("mine.py:three", r"mine\.py: three\(completion, solution, image\) cannot be called"),
    "weight": ("mine.py:good=much", "the weight of mine.py:good=much is not a number"),
    "no weight": ("iou=", "the weight of iou= is not a number; name=weight expected"),
    "infinite weight": ("iou=inf", "the weight of iou=inf is not a number"),
    "twice": ("iou iou=2", "iou is named twice"),
    "two of a name": ("iou mine.py:iou", "two rewards are called iou"),
    "unknown": ("iuo", "unknown reward iuo; known are iou.*file.py:function"),
}  # fmt: skip
MINE = """
NUMBER = 3
def one(completion): return 1.0
def three(completion, solution, image): return 1.0
def good(completion, solution, think=True): return float(think)
def iou(completion, solution): return 1
def words(completion, solution): return "good"
def not_a_number(completion, solution): return float("nan")
"""


@pytest.mark.parametrize("name", BAD_REWARDS)
def test_rewards_that_cannot_be_used_are_named(tmp_path, monkeypatch, name):
    entry, message = BAD_REWARDS[name]
    (tmp_path / "mine.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=f"--rewards {entry.split()[0]}.*: .*{message}"):
        virft.start(virft.parse_config(["--rewards", *entry.split()]))


@pytest.mark.parametrize("function", ["words", "not_a_number"])
def test_what_a_reward_returns_is_checked(tmp_path, function):
    (tmp_path / "mine.py").write_text(MINE)
    chosen = rewards.choose_rewards({f"{tmp_path}/mine.py:{function}": 1.0})
    said = rf"mine\.py: {function} returned [\w']+, not a finite number, for 'some text'"
    with pytest.raises(ValueError, match=said):
        chosen[function][0]("some text", None)
    settings = rewards.choose_rewards({f"{tmp_path}/mine.py:good": 1.0}, think=False, iou_threshold=0.3)
    assert settings["good"][0]("some text", None) == 0.0, "a setting that it takes is passed"


def test_rows_need_rows(tmp_path):
    with pytest.raises(DataError, match="(?s)--task rows reads rows, from .json, .jsonl, .csv.* A row has image"):
        data.load_examples(TASKS["rows"], str(tmp_path), "train")
    for name in ("rows", "lisa"):
        with pytest.raises(DataError, match=f"--task {name} has no released dataset: --data names yours"):
            data.load_examples(TASKS[name], None, "train")


def test_tasks_can_be_handed_to_spawned_workers():
    assert {name: pickle.loads(pickle.dumps(task)).name for name, task in TASKS.items()} == {
        name: name for name in TASKS
    }


# ------------------------------------------------------------------------------------------------
# Optional readers.


@pytest.mark.parametrize("needed_by", EXTRAS)
def test_a_missing_reader_is_named(tmp_path, monkeypatch, needed_by):
    read_it, module = EXTRAS[needed_by]
    write_coco(tmp_path)
    monkeypatch.setitem(sys.modules, f"extras.readers.{module}", None)  # makes its import fail
    message = f"{needed_by} needs extras/readers/{module}.py: copy the folder extras beside virft.py"
    source, shots = "owner/name" if module == "tables" else str(tmp_path), 1 if module == "choose" else None
    with pytest.raises(SystemExit, match=f"^{re.escape(message)}$"):
        read_it(source, "train", Choice(shots=shots))


def test_a_missing_package_of_a_reader_is_no_data_error(monkeypatch):
    monkeypatch.delitem(sys.modules, "extras.readers.tables", raising=False)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match="datasets"):
        data.load_examples(TASKS["coco"], "owner/name", "train")


def test_data_works_without_extras(tmp_path):
    """Copy data.py and rewards.py alone: COCO folders are read, other data is refused by the name of its reader."""
    for name in ("data.py", "rewards.py"):
        shutil.copy(ROOT / name, tmp_path)
    write_coco(tmp_path)
    write_rows(tmp_path)
    script = """
import data
print(len(data.load_examples(data.TASKS["coco"], ".", "train")[0]) > 0)
for task, source in (("rows", "rows.jsonl"), ("lvis", ".")):
    try:
        data.load_examples(data.TASKS[task], source, "train")
    except SystemExit as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False)
    missing = "{} needs extras/readers/{}.py: copy the folder extras beside virft.py"
    asked = [missing.format("--data rows.jsonl", "exports"), missing.format("--task lvis", "lvis")]
    assert done.stdout.splitlines() == ["True", *asked], done.stderr


# ------------------------------------------------------------------------------------------------
# Whole runs.


README_COMMANDS = dict(
    re.findall(r"^\| `(\w+)` \|.*\| `(--task [^`]*)` \|", (ROOT / "docs" / "tasks.md").read_text(), re.MULTILINE)
)


def name_as(root: Path, split: str) -> None:
    """Rename the first categories of every annotation file to the names of a split, adding categories if needed."""
    for file in (root / "annotations").glob("*.json"):
        table = json.loads(file.read_text())
        for i, name in enumerate(choose.CATEGORY_SPLITS[split].split(", ")):
            if i == len(table["categories"]):
                table["categories"].append({"id": 1000 + i})
            table["categories"][i]["name"] = name
        file.write_text(json.dumps(table))


@pytest.mark.parametrize("task", [task for task in TASKS if task != "rows"])
def test_every_task_trains_and_evaluates(task, dataset, llava_dir, tmp_path, signals):
    """Run the commands of the README's table, two steps and an evaluation each; `rows` has its own test above."""
    assert README_COMMANDS.keys() == TASKS.keys() and README_COMMANDS["rows"] == MY_COMMAND
    source, out = dataset(task), tmp_path / "run"
    command = README_COMMANDS[task].replace("DIR", source)
    selected = {}
    if split := re.search(r"--categories (\w+)", command):
        name_as(Path(source), split[1])
        selected["categories"] = split[1]
    metrics = run_main(f"{command} --eval_every 2 --eval_limit 3", llava_dir, out)
    assert len(metrics) == 2 and {f"reward/{name}" for name in TASKS[task].rewards} <= metrics[0].keys()
    scores = json.loads((out / "eval_000002" / "scores.json").read_text())
    assert (
        scores["answers"] == min(3, len(data.load_examples(TASKS[task], source, "val", **selected)[0]))
        and "parsed" in scores
    )
    expected = {"detection": "AP", "classification": "published_accuracy", "grounding": "mean_iou"}[TASKS[task].metric]
    assert expected in scores and scores["protocol"].startswith("greedy answers")
    assert len(list((out / "eval_000002" / "thumbnails").glob("*.jpg"))) == scores["answers"]
    page, groups = (out / "report.html").read_text(), json.loads((out / "groups.json").read_text())
    assert "Groups of step 2" in page and "Answers of run/eval_000002 by outcome" in page
    assert "picture left out" not in page
    assert 1 <= len(groups) <= 2 and all(len(group["completions"]) == 2 for group in groups)
    assert (out / "eval_000002" / "detections.json").exists() == (TASKS[task].metric == "detection")


@shared("coco_mini")
def test_an_interrupted_evaluation_goes_on(llava_dir, tmp_path, monkeypatch, capsys):
    """Stop after two of four batches, with half a line written: the same command finishes it and asks nothing twice."""
    command = (
        f"--task coco --data {SHARED / 'coco_mini'} --model {llava_dir} --eval_only true --eval_limit 12 "
        "--prompts_per_step 3 --max_completion_tokens 8 --workers 0"
    )
    whole, out = tmp_path / "whole", tmp_path / "stopped"
    virft.main([*command.split(), "--out", str(whole)])
    calls, answer = [], virft.answer

    def stopping(run, prompts):
        calls.append([p.slot for p in prompts])
        if len(calls) == 3:
            with (out / "predictions.0.jsonl").open("a") as half:
                half.write('{"row": 6, "id": "val')
            raise KeyboardInterrupt
        return answer(run, prompts)

    monkeypatch.setattr(virft, "answer", stopping)
    with pytest.raises(KeyboardInterrupt):
        virft.main([*command.split(), "--out", str(out)])
    with pytest.raises(SystemExit, match="--out .*: must be new"):
        virft.main([*command.split(), "--out", str(out), "--max_pixels", "5000"])
    virft.main([*command.split(), "--out", str(out)])
    assert calls[3:] == [[6, 7, 8], [9, 10, 11]] and "continuing with 6 of 12 answers" in capsys.readouterr().out
    for name in ("predictions.jsonl", "scores.json"):
        assert (out / name).read_text() == (whole / name).read_text()
    assert not list(out.glob("predictions.*.jsonl"))
    with pytest.raises(SystemExit, match="--out .*: must be new"):
        virft.main([*command.split(), "--out", str(out)])


@shared("coco_mini")
def test_an_evaluation_that_starts_again_before_any_answer_has_its_own_settings(llava_dir, tmp_path, monkeypatch):
    """Interrupted before the first answer, begun again otherwise and interrupted: the first command is refused."""
    command = (
        f"--task coco --data {SHARED / 'coco_mini'} --model {llava_dir} --eval_only true --eval_limit 6 --workers 0"
    )
    command += f" --prompts_per_step 3 --max_completion_tokens 8 --out {tmp_path / 'run'}"
    answer, left = virft.answer, [0, 1, 9]

    def stopping(run, prompts):
        left[0] -= 1
        if left[0] < 0:
            left.pop(0)
            raise KeyboardInterrupt
        return answer(run, prompts)

    monkeypatch.setattr(virft, "answer", stopping)
    for think in ("true", "false"):
        with pytest.raises(KeyboardInterrupt):
            virft.main([*command.split(), "--think", think])
        assert str(json.loads((tmp_path / "run" / "config.json").read_text())["think"]).lower() == think
    with pytest.raises(SystemExit, match="--out .*: must be new"):
        virft.main(command.split())
    virft.main([*command.split(), "--think", "false"])


def test_answers_to_other_questions_or_of_another_model_are_not_continued(tmp_path):
    example = Example("x", (), None, "3", "object", question="How many?")
    kept = {"row": 0, "id": "x", "category": "object", "question": "How many?", "solution": "3"}
    evaluate.append_own(tmp_path, "predictions", 0, [kept])
    assert evaluate.recover(tmp_path, [example]) == [kept]
    for change in ({"question": "Which?"}, {"category": "dog"}, {"solution": "4"}, {"id": "y"}):
        with pytest.raises(DataError, match="its predictions answer other questions"):
            evaluate.recover(tmp_path, [dataclasses.replace(example, **change)])
    for name in ("old", "new"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_text(name)
    os.utime(tmp_path / "old" / "model.safetensors", (1, 1))  # older than the evaluation
    (latest := tmp_path / "latest").symlink_to("new")
    settings = {"eval_only": True, "model": str(latest), "rewards": []}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    (tmp_path / "used.json").write_text(json.dumps(checkpoints.used_files(str(latest), [])))
    assert evaluate.unfinished(tmp_path, settings)
    latest.unlink()
    latest.symlink_to("old")
    assert not evaluate.unfinished(tmp_path, settings)


def test_an_evaluation_goes_on_after_a_first_line_that_was_cut_off(tmp_path):
    (tmp_path / "predictions.0.jsonl").write_text('{"row": 0, "id')
    assert evaluate.recover(tmp_path, []) == []
    evaluate.append_own(tmp_path, "predictions", 0, [row := {"row": 0}])
    assert evaluate.read_parts(tmp_path, "predictions") == [row]


def test_ask_knows_the_published_splits(tmp_path):
    names = [e.category for e in check.questions(TASKS["coco"], picture(tmp_path / "a.png"), "fewshot8")]
    assert names == "bus, train, fire hydrant, stop sign, cat, dog, bed, toilet".split(", ")
    with pytest.raises(DataError, match="base65.*list the names"):
        check.questions(TASKS["coco"], tmp_path / "a.png", "base65")


def test_ask_of_every_kind(llava_dir, tmp_path, capsys):
    """Check what --ask needs: category names (detection), one instruction (grounding), nothing (classes)."""
    path, model = picture(tmp_path / "a.png"), str(llava_dir)
    common = ["--ask", str(path), "--model", model, "--out", str(tmp_path), "--max_completion_tokens", "4"]
    for task in ("coco", "lisa", "rows"):
        with pytest.raises(SystemExit, match="--ask .*together with --categories"):
            virft.main(["--task", task, *common])
    virft.main(["--task", "lisa", *common, "--categories", "the one on the left/right, not the other"])
    virft.main(["--task", "flowers", *common])
    virft.main(["--task", "rows", *common, "--categories", "How many? Answer in <answer></answer>."])
    assert capsys.readouterr().out.count("drawn in") == 3
    names = ("the_one_on_the_left_right_not_the_other", "answer", "How_many_Answer_in_answer_answer")
    assert {f.name for f in tmp_path.glob("*.png")} == {"a.png", *(f"a_{name}.png" for name in names)}
