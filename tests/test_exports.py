"""Data as people have it: every file is made here, small, in the form that its tool writes.

Each case of the tables says where such a file comes from, how it is written, what --data names, and what must come out:
the examples, or the words of the error.
"""

import csv
import json
import shutil
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import SHARED, shared
from PIL import Image

import data
import rewards
from data import TASKS, DataError
from extras import check

SIZE = (60, 40)
DOG, CAT = [5, 6, 20, 20], [30, 10, 25, 25]  # x, y, width, height
CORNERS = {"dog": (5, 6, 25, 26), "cat": (30, 10, 55, 35)}


def picture(path: Path, size=SIZE, mode="RGB") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size).save(path)
    return path


def table(names=("a.jpg", "b.jpg"), **changes) -> dict:
    """Return COCO's three lists: image 1 shows a dog and a cat, image 2 a dog."""
    images = [{"id": i, "file_name": name, "width": 60, "height": 40} for i, name in enumerate(names, 1)]
    shown = [(1, 1, DOG), (1, 2, CAT), (2, 1, DOG)]
    annotations = [
        {"id": i, "image_id": image, "category_id": category, "bbox": box, "iscrowd": 0, "area": 400}
        for i, (image, category, box) in enumerate(shown, 1)
    ]
    categories = [{"id": 1, "name": "dog", "supercategory": "none"}, {"id": 2, "name": "cat", "supercategory": "none"}]
    return {"images": images, "annotations": annotations, "categories": categories} | changes


def write(file: Path, content: dict, folder: Path | None = None) -> Path:
    """Write a COCO file; folder: where its images lie, under their names alone."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content))
    for image in content["images"]:
        name = str(image["file_name"]).replace("\\", "/")
        picture((folder or file.parent) / (Path(name).name if folder else name))
    return file


def read(source: Path, task="coco", split="train", **flags) -> tuple[list[data.Example], list[str]]:
    return data.load_examples(TASKS[task], str(source), split, **flags)


def found(examples) -> set[tuple]:
    return {(e.images[0].name, e.category, e.solution) for e in examples}


BOTH = {("a.jpg", "dog", (CORNERS["dog"],)), ("a.jpg", "cat", (CORNERS["cat"],)), ("b.jpg", "dog", (CORNERS["dog"],))}


# ------------------------------------------------------------------------------------------------
# Exports, as they were unpacked: each writer returns what --data names.


def a_file_itself(root):
    return write(root / "my.json", table(), root)


def a_file_beside_images(root):
    return write(root / "labels" / "my.json", table(), root / "images")


def roboflow(root):
    for split in ("train", "valid", "test"):
        content = table()
        content["categories"].insert(0, {"id": 0, "name": "pets", "supercategory": "none"})
        write(root / split / "_annotations.coco.json", content)
    (root / "README.roboflow.txt").write_text("provided by a user")
    return root


def cvat(root):
    write(root / "annotations" / "instances_default.json", table(), root / "images")
    return root


def cvat_with_subsets(root):
    for split in ("Train", "Validation"):
        write(root / "annotations" / f"instances_{split}.json", table(), root / "images" / split)
    return root


def cvat_with_folders(root):
    write(root / "annotations" / "instances_default.json", table(("cam1/a.jpg", "cam2/b.jpg")))
    shutil.move(root / "annotations" / "cam1", root / "images" / "cam1")
    shutil.move(root / "annotations" / "cam2", root / "images" / "cam2")
    return root


def label_studio(root):
    write(root / "result.json", table(("images/a.jpg", "images/b.jpg")))
    return root


def label_studio_on_windows(root):
    write(root / "result.json", table(("images\\a.jpg", "images\\b.jpg")))
    return root


def label_studio_with_local_files(root):
    """Its file_name keeps the path on the server."""
    write(root / "result.json", table(("../../data/upload/1/a.jpg", "../../data/upload/1/b.jpg")), root / "images")
    return root


def fiftyone(root):
    write(root / "labels.json", table(), root / "data")
    return root


def fiftyone_with_splits(root):
    for split in ("train", "validation"):
        write(root / split / "labels.json", table(), root / split / "data")
    return root


def ultralytics(root):
    for split in ("train2017", "val2017"):
        write(root / "annotations" / f"instances_{split}.json", table(), root / "images" / split)
    return root


def mmdetection(root):
    for split in ("train", "val"):
        write(root / "annotations" / f"{split}.json", table(), root / "images" / split)
    return root


def with_macos_files(root):
    write(root / "result.json", table(("images/a.jpg", "images/b.jpg")))
    (root / "._result.json").write_bytes(b"\0\5\x16\7")
    return root


SPLITS = {roboflow, cvat_with_subsets, fiftyone_with_splits, ultralytics, mmdetection}
EXPORTS = (
    a_file_itself, a_file_beside_images, roboflow, cvat, cvat_with_subsets, cvat_with_folders, label_studio,
    label_studio_on_windows, label_studio_with_local_files, fiftyone, fiftyone_with_splits, ultralytics, mmdetection,
    with_macos_files,
)  # fmt: skip


@pytest.mark.parametrize("export", EXPORTS)
def test_an_export_is_read_as_it_was_unpacked(tmp_path, export):
    source = export(tmp_path)
    examples, notes = read(source)
    assert found(examples) == BOTH
    assert any("3 boxes, 0 crowd regions, 0 images without any" in note for note in notes)
    if export in SPLITS:
        assert found(read(source, split="val", one_split=False)[0]) == BOTH
        if export is roboflow:
            assert {e.images[0].parent.name for e in read(source, split="val")[0]} == {"valid"}, "before test"
    else:
        with pytest.raises(DataError, match="--eval_data names what to evaluate"):
            read(source, split="val", one_split=False)
        assert found(read(source, split="val")[0]) == BOTH, "--eval_data or --eval_only names it"


def test_a_crowd_written_as_a_float_is_a_crowd(tmp_path):
    content = table()
    content["annotations"][0]["iscrowd"] = 1.0
    write(tmp_path / "my.json", content)
    (example,) = [e for e in read(tmp_path / "my.json", eval_categories="all")[0] if e.id == "train/1/dog"]
    assert example.solution == () and example.crowds == (CORNERS["dog"],)


def test_the_last_word_of_a_path_names_its_split(tmp_path):
    write(tmp_path / "crash-test" / "train" / "my.json", table())
    assert found(read(tmp_path)[0]) == BOTH
    with pytest.raises(DataError, match="no file for validation"):
        read(tmp_path, split="val", one_split=False)


def test_corners_in_a_coco_file_are_read_if_they_are_declared(tmp_path):
    content = table()
    every("annotations", "bbox", corners)(content)
    write(tmp_path / "my.json", content)
    assert found(read(tmp_path / "my.json", box_format="xyxy")[0]) == BOTH


def test_two_files_that_could_be_meant_are_named(tmp_path):
    write(tmp_path / "one.json", table(), tmp_path)
    write(tmp_path / "two.json", table(), tmp_path)
    with pytest.raises(DataError, match="several COCO files for train .one.json, two.json.: --data may name one"):
        read(tmp_path)
    assert found(read(tmp_path / "two.json")[0]) == BOTH


def test_a_category_that_is_not_annotated_is_never_asked(tmp_path):
    """Roboflow's root `pets` is the supercategory of all others, and no image lacks pets."""
    roboflow(tmp_path)
    examples, notes = read(tmp_path, negatives=0.4)
    assert {e.category for e in examples} == {"dog", "cat"} and any(not e.solution for e in examples)
    assert any("no image shows pets" in note for note in notes)
    assert {e.category for e in read(tmp_path, split="val", eval_categories="all")[0]} == {"dog", "cat"}


def test_roboflow_root_may_have_the_name_of_the_only_class(tmp_path):
    content = table(categories=[{"id": 0, "name": "dog"}, {"id": 1, "name": "dog", "supercategory": "dog"}])
    content["annotations"] = [a for a in content["annotations"] if a["category_id"] == 1]
    write(tmp_path / "my.json", content)
    assert {e.category_id for e in read(tmp_path / "my.json")[0]} == {1}


def test_images_without_any_box_become_negatives(tmp_path):
    content = table(("a.jpg", "b.jpg", "empty.jpg"), categories=[{"id": 1, "name": "dog"}])
    content["annotations"] = [a for a in content["annotations"] if a["category_id"] == 1]
    write(tmp_path / "my.json", content)
    examples, _ = read(tmp_path / "my.json", negatives=0.34)
    assert [e.images[0].name for e in examples if not e.solution] == ["empty.jpg"]
    assert all(e.solution for e in read(tmp_path / "my.json", negatives=0.34, shots=1)[0]), "few-shot"


def test_images_of_other_categories_become_negatives(tmp_path):
    write(tmp_path / "my.json", table())
    examples, notes = read(tmp_path / "my.json", categories="cat", negatives=0.5)
    assert found(examples) == {("a.jpg", "cat", (CORNERS["cat"],)), ("b.jpg", "cat", ())}
    assert not any("examples found" in note for note in notes)


def test_categories_with_commas(tmp_path):
    content = table(categories=[{"id": 1, "name": "chair, folding"}, {"id": 2, "name": "cat"}])
    write(tmp_path / "my.json", content)
    examples, _ = read(tmp_path / "my.json", categories='"chair, folding", cat')
    assert {e.category for e in examples} == {"chair, folding", "cat"}
    assert {e.category for e in read(tmp_path / "my.json", categories='"chair, folding"')[0]} == {"chair, folding"}


# ------------------------------------------------------------------------------------------------
# COCO files with something odd in them: change(table), and what comes out: words of the error, or None for BOTH.


def in_first(part: str, **values):
    def change(content):
        content[part][0].update(values)

    return change


def every(part: str, field: str, convert):
    def change(content):
        for record in content[part]:
            record[field] = convert(record[field])

    return change


def corners(box):
    return [box[0], box[1], box[0] + box[2], box[1] + box[3]]


def outside(content):
    """Write corners, of which one lies outside when it is read as width and height."""
    every("annotations", "bbox", corners)(content)


def no_box_at_all(content):
    del content["annotations"][0]["bbox"]


ODD = {
    # VIA exports, sahi#98
    "one id, two images": (in_first("images", id=2), "two images share an id or a name: .*a.jpg.* and .*b.jpg"),
    "one id, two categories": (in_first("categories", id=2), "two categories share an id or a name"),
    "one name, two ids": (in_first("categories", name="cat"), "two categories share an id or a name"),
    "two spellings of one name": (in_first("categories", name="cat_"), "two categories share an id or a name"),
    "a box of an image that is not listed": (in_first("annotations", image_id=9), r"\[0\] belongs to image 9, which"),
    "a box of a category that is not listed": (in_first("annotations", category_id=9), "belongs to category 9, which"),
    "a box that is there twice": (lambda t: t["annotations"].append(t["annotations"][0] | {"id": 9}), None),
    "two categories but for case": (lambda t: t["categories"].append({"id": 3, "name": "CAT"}), None),
    "two records of one file": (in_first("images", file_name="b.jpg"), r"images\[0\] and images\[1\] are the same"),
    "all crowds (CVAT's masks)": (every("annotations", "iscrowd", lambda c: 1), None),
    "iscrowd as text": (in_first("annotations", iscrowd="0"), None),
    "iscrowd as float, and no other box": (every("annotations", "iscrowd", lambda c: 1.0), None),
    "NaN": (in_first("annotations", bbox=[5, float("nan"), 20, 20]), r"annotations\[0\] of image 1 .* is not finite"),
    "infinite": (in_first("annotations", bbox=[5, 6, float("inf"), 20]), "is not finite"),
    "null in a box": (in_first("annotations", bbox=[5, 6, None, 20]), "has no .x, y, width, height. in pixels"),
    "all in 0..1": (every("annotations", "bbox", lambda b: [v / 100 for v in b]), "most boxes lie in 0..1"),
    "x1, y1, x2, y2": (outside, r"lies outside its image; 3 of 3 look like \[x1, y1, x2, y2\]"),
    "width null": (in_first("images", width=None), r"images\[0\] is Nonex40: positive"),
    "no width": (lambda t: t["images"][0].pop("width"), r"images\[0\] is Nonex40"),
    "width as text": (every("images", "width", str), None),
    "width as float": (every("images", "width", float), None),
    "width not whole": (in_first("images", width=60.5), "is 60.5x40: positive"),
    "file_name null": (in_first("images", file_name=None), r"images\[0\] has no 'file_name'"),
    "file_name 7": (in_first("images", file_name=7), r"images\[0\] has no 'file_name'"),
    "category_id as text": (every("annotations", "category_id", str), None),
    "image_id as text": (every("annotations", "image_id", str), None),
    "image_id as float": (every("annotations", "image_id", float), None),
    "ids of images as text": (every("images", "id", str), None),
    "boxes as text": (every("annotations", "bbox", lambda b: list(map(str, b))), None),
    "no bbox": (no_box_at_all, r"annotations\[0\] of image 1 \(60x40\) has no .x, y, width, height. in pixels"),
    "negative width": (in_first("annotations", bbox=[25, 6, -20, 20]), "has no area"),
    "an image that is not there": (in_first("images", file_name="c.jpg"), r"c.jpg: no such image \(images\[0\]"),
    "images as a dict": (lambda t: t.update(images={"1": {}}), "no list 'images'"),
    "a category without a name": (lambda t: t["categories"][0].pop("name"), r"categories\[0\] has no 'name'"),
}
SKIPPABLE = (
    "NaN", "infinite", "null in a box", "width null", "no width", "width not whole", "file_name null", "file_name 7",
    "no bbox", "negative width", "an image that is not there", "a box of a category that is not listed",
)  # fmt: skip


@pytest.mark.parametrize("case", ODD)
def test_odd_coco_files(tmp_path, case):
    change, message = ODD[case]
    content = table()
    write(tmp_path / "my.json", content)  # pictures first: a changed name has none
    change(content)
    (tmp_path / "my.json").write_text(json.dumps(content))
    if message is None:
        return_value = read(tmp_path / "my.json")
        assert found(return_value[0]) == BOTH
        return
    with pytest.raises(DataError, match=message):
        read(tmp_path / "my.json")
    if case in SKIPPABLE:
        examples, notes = read(tmp_path / "my.json", skip_bad_images=True)
        assert found(examples) == {("b.jpg", "dog", (CORNERS["dog"],))}
        assert any("1 images skipped; first: " in note for note in notes)


@pytest.mark.parametrize("form", ["corners", "0..1"])
def test_one_odd_box_does_not_hide_what_the_others_are(tmp_path, form):
    """Else the error advises --skip_bad_images, which trains on the rest, misread."""
    names = [f"{number}.jpg" for number in range(24)]
    content = table(names)
    content["annotations"] = [
        {"id": i, "image_id": i, "category_id": 1, "bbox": corners(CAT) if form == "corners" else [0.1, 0.2, 0.3, 0.4]}
        for i in range(1, 25)
    ]
    content["annotations"][3]["bbox"] = [20, 20, 20, 40]  # without width if read as corners
    write(tmp_path / "my.json", content)
    looks = r"23 of 24 look like \[x1, y1, x2, y2\]" if form == "corners" else "most boxes lie in 0..1"
    with pytest.raises(DataError, match=looks):
        read(tmp_path / "my.json")


def test_a_few_boxes_outside_are_not_taken_for_corners(tmp_path):
    """xywh boxes may also be valid corners: here all are, and only one of them leaves its image."""
    content = table([f"{number}.jpg" for number in range(24)])
    content["annotations"] = [{"id": i, "image_id": i, "category_id": 1, "bbox": [5, 6, 20, 20]} for i in range(1, 25)]
    content["annotations"][3]["bbox"] = [50, 10, 55, 20]
    write(tmp_path / "my.json", content)
    with pytest.raises(DataError, match=r"annotations\[3\] of image 4 \(60x40\) lies outside the image"):
        read(tmp_path / "my.json")


def test_the_folder_of_a_split_goes_before_folders_of_all(tmp_path):
    for split in ("train", "val"):
        write(tmp_path / "annotations" / f"instances_{split}.json", table(), tmp_path / split)
        picture(tmp_path / "images" / "a.jpg")
    for split in ("train", "val"):
        assert {e.images[0].parent for e in read(tmp_path, split=split)[0]} == {tmp_path / split}


def test_one_picture_of_each_folder_is_found(tmp_path):
    """cam1/0001.jpg and cam2/0001.jpg are two pictures; without their folders they would be one."""
    write(tmp_path / "my.json", table(("cam1/0001.jpg", "cam2/0001.jpg")))
    examples, _ = read(tmp_path / "my.json")
    assert {e.images[0].parent.name for e in examples} == {"cam1", "cam2"}
    shutil.rmtree(tmp_path / "cam1")
    shutil.rmtree(tmp_path / "cam2")
    picture(tmp_path / "0001.jpg")
    with pytest.raises(DataError, match=r"images\[0\] and images\[1\] are the same file .*0001.jpg"):
        read(tmp_path / "my.json")


@pytest.mark.parametrize("bystander", [None, "0001.jpg", "images/0001.jpg"])
def test_a_missing_picture_is_never_another_one(tmp_path, bystander):
    """Neither the picture of that name in the next folder, nor one of that name which the file does not list."""
    write(tmp_path / "my.json", table(("cam1/0001.jpg", "cam2/0001.jpg")))
    assert f"2 images in {tmp_path}, " in " ".join(read(tmp_path / "my.json")[1])
    (tmp_path / "cam2" / "0001.jpg").unlink()
    if bystander:
        (tmp_path / bystander).parent.mkdir(exist_ok=True)
        picture(tmp_path / bystander)
    with pytest.raises(DataError, match=f"{tmp_path}/cam2/0001.jpg: no such image"):
        read(tmp_path / "my.json")
    examples, _ = read(tmp_path / "my.json", skip_bad_images=True)
    assert {e.images[0].parent.name for e in examples} == {"cam1"}


def test_when_everything_is_skipped_the_first_reason_is_said(tmp_path):
    content = table()
    every("annotations", "bbox", lambda box: [0, 0, 0, 0])(content)
    content["annotations"][0]["bbox"] = [500, 0, 10, 10]
    write(tmp_path / "my.json", content)
    with pytest.raises(DataError, match=r"no example is left: .*annotations\[0\] of image 1 .*lies outside"):
        read(tmp_path / "my.json", skip_bad_images=True)


def test_notes_name_a_few(tmp_path):
    names = [{"id": i, "name": f"thing {i}"} for i in range(3, 300)]
    content = table()
    content["categories"] += names
    write(tmp_path / "my.json", content)
    note = next(note for note in read(tmp_path / "my.json")[1] if "no image shows" in note)
    assert note.endswith("thing 3, thing 4, thing 5, thing 6, thing 7 and 292 more")


# ------------------------------------------------------------------------------------------------
# What is not read says what to do.


def voc(root):
    (root / "Annotations").mkdir()
    (root / "Annotations" / "a.xml").write_text("<annotation></annotation>")
    picture(root / "JPEGImages" / "a.jpg")
    return root


def yolo(root):
    (root / "labels").mkdir()
    (root / "labels" / "a.txt").write_text("0 0.5 0.5 0.1 0.1\n")
    picture(root / "images" / "a.jpg")
    return root


def yolo_of_roboflow(root):
    (root / "train" / "labels").mkdir(parents=True)
    (root / "data.yaml").write_text("names: [dog]\n")
    return root


def labelme(root):
    picture(root / "a.jpg")
    (root / "a.json").write_text(json.dumps({"shapes": [], "imagePath": "a.jpg"}))
    return root


def cvat_xml(root):
    (root / "annotations.xml").write_text("<annotations></annotations>")
    return root


def file(name):
    def writer(root):
        (root / name).write_bytes(b"x")
        return root / name

    writer.__name__ = name
    return writer


FOREIGN = {
    voc: r"This may be Pascal VOC. pip install globox.*globox convert DIR/Annotations DIR/train.json -f pascalvoc",
    yolo: "This may be YOLO.*globox convert DIR/labels DIR/train.json -f yolov5 -d DIR/images",
    yolo_of_roboflow: "This may be YOLO",
    labelme: "This may be LabelMe.*-f labelme -F coco",
    cvat_xml: "This may be CVAT's XML.*-f cvat",
    file("data.zip"): "an archive; unpack it and give the folder",
    file("data.tar.gz"): "an archive; unpack it",
    file("imagelabels.mat"): ".mat files are MATLAB's: docs/tasks.md has a line",
    file("a.xml"): "This may be",
    file("table.xlsx"): "not read as data. Folders are read, and .json, .jsonl",
    file("labels.pkl"): "not read as data",
}


@pytest.mark.parametrize("writer", FOREIGN, ids=lambda writer: writer.__name__)
def test_what_is_not_read_says_what_to_do(tmp_path, writer):
    with pytest.raises(DataError, match=f"(?s){FOREIGN[writer]}"):
        read(writer(tmp_path))


@pytest.mark.parametrize("source", ["nowhere", "nowhere/at/all", "no/file.jsonl", "no/file.zip"])
def test_what_is_not_there(source):
    with pytest.raises(DataError, match="no such file or folder" if "." in source else "no such folder. A COCO folder"):
        read(source)


def test_converted_voc_is_found_where_the_converter_wrote_it(tmp_path):
    """globox writes DIR/train.json with the bare names of the pictures in DIR/JPEGImages."""
    write(tmp_path / "train.json", table(), tmp_path / "JPEGImages")
    assert found(read(tmp_path)[0]) == BOTH


# ------------------------------------------------------------------------------------------------
# Rows: (task, columns of one row, expected question, expected solution), or the words of the error.

BOX_TEXT = "<answer>(5,6),(25,26)</answer>"
ROWS = {
    "ours": ("rows", {"problem": "How many?", "solution": "3"}, "How many?", "3"),
    "R1-V and open-r1": ("rows", {"problem": "How many?", "solution": "<answer> 3 </answer>"}, "How many?", "3"),
    "TRL, text": ("rows", {"prompt": "How many?", "solution": "3"}, "How many?", "3"),
    "TRL, messages": (
        "rows", {"prompt": [{"role": "user", "content": "How many?"}], "solution": "3"}, "How many?", "3",
    ),
    "TRL, parts": (
        "rows",
        {"prompt": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "How many?"}]}],
         "answer": "3"},
        "<image>\nHow many?", "3",
    ),
    "messages with an answer": (
        "rows",
        {"messages": [{"role": "user", "content": "How many?"}, {"role": "assistant", "content": "3"}]},
        "How many?", "3",
    ),
    "ShareGPT": (
        "rows",
        {"conversations": [{"from": "human", "value": "<image>\nHow many?"}, {"from": "gpt", "value": "3"}]},
        "<image>\nHow many?", "3",
    ),
    "VLM-R1": (
        "lisa",
        {"conversations": [{"from": "human", "value": "<image>Where is the dog?"}, {"from": "gpt", "value": BOX_TEXT}],
         "coords": "pixels"},
        "<image>Where is the dog?", (5, 6, 25, 26),
    ),
    "VLM-R1, a list": (
        "lisa",
        {"conversations": [{"from": "human", "value": "Where?"}, {"from": "gpt", "value": [5, 6, 25, 26]}],
         "coords": "pixels"},
        "Where?", (5, 6, 25, 26),
    ),
    "question and answer": ("rows", {"question": "How many?", "answer": "3"}, "How many?", "3"),
    "several accepted answers": ("rows", {"question": "Who?", "answers": ["a", "b"]}, "Who?", ["a", "b"]),
    "zero": ("rows", {"question": "How many?", "answer": 0}, "How many?", 0),
    "a system message": (
        "rows",
        {"prompt": [{"role": "system", "content": "Think."}, {"role": "user", "content": "How many?"}],
         "solution": "3"},
        "How many?", "3",
    ),
    "boxes whose problem states 0..1000": (
        "coco", {"problem": "Detect all objects (between 0 and 1000, integer)",
                 "solution": "<answer>[{'Position': [0, 0, 500, 1000], 'Confidence': 1}]</answer>"},
        "Detect all objects (between 0 and 1000, integer)", ((0, 0, 30, 40),),
    ),
    "boxes without coords": ("coco", {"problem": "Dogs?", "solution": [[1, 2, 3, 4]]}, 'boxes need coords: "pixels"'),
    "two questions": (
        "rows",
        {"conversations": [{"from": "human", "value": "a?"}, {"from": "gpt", "value": "b"},
                           {"from": "human", "value": "c?"}, {"from": "gpt", "value": "d"}]},
        "one question and at most one answer expected, found 2 questions",
    ),
    "a tool's turn": ("rows", {"messages": [{"role": "tool", "content": "x"}]}, "role user, assistant or system"),
    "no question": ("rows", {"conversations": [{"from": "gpt", "value": "b"}]}, "found 0 questions and 1 answers"),
    "null": ("rows", {"problem": "How many?", "solution": None}, "no solution. A row has image"),
    "an open answer": ("rows", {"problem": "How many?", "solution": "<answer>3"}, "one <answer> block expected"),
    "a blank answer": ("rows", {"problem": "How many?", "solution": "<answer> </answer>"}, "is blank; a model that"),
    "a box twice": (
        "coco",
        {"problem": "Dogs?", "solution": [[1, 2, 3, 4], [1, 2, 3, 4]], "coords": "pixels"},
        "Dogs?", ((1.0, 2.0, 3.0, 4.0),),
    ),
    "base64": ("rows", {"image": "iVBOR" * 400, "problem": "a?", "solution": "b"}, "an image is the name of a file"),
    "two marks, one image": ("rows", {"problem": "<image><image>?", "solution": "3"}, "marks 2 images .* there are 1"),
    "a class as number": ("flowers", {"problem": "Which?", "solution": 3}, "expected a class name"),
}  # fmt: skip


@pytest.mark.parametrize("case", ROWS)
def test_rows(tmp_path, case):
    task, columns, *expected = ROWS[case]
    picture(tmp_path / "a.png")
    file = tmp_path / "rows.jsonl"
    file.write_text("\ufeff" + json.dumps({"image": "a.png"} | columns) + "\n", encoding="utf-8")
    if len(expected) == 1:
        with pytest.raises(DataError, match=f"line 1: .*{expected[0]}"):
            read(file, task)
        return
    (example,), notes = read(file, task)
    assert (example.question, example.solution) == tuple(expected)
    assert any("system messages" in note for note in notes) == (case == "a system message")


@pytest.mark.parametrize(
    "solution, answer, reward",
    [("-3", "3", 0.0), ("-3", "-3", 1.0), ("3", "-3", 0.0), (-3, "-3", 1.0), (3.0, "3", 1.0), (0.5, "0.5", 1.0)],
)
def test_a_minus_counts(solution, answer, reward):
    assert rewards.accuracy_reward(f"<answer>{answer}</answer>", solution) == reward


@pytest.mark.parametrize(
    "header, delimiter, name",
    [("file,class_name", ",", "labels.csv"), ("filename;label", ";", "labels.csv"), ("image\tcategory", "\t", "l.tsv")],
)
def test_labels(tmp_path, header, delimiter, name):
    """Labels files with a byte order mark, another delimiter and other names of columns, given themselves."""
    for image in ("a.jpg", "b.jpg"):
        picture(tmp_path / image)
    lines = [header, delimiter.join(("a.jpg", "tiger lily")), delimiter.join(("b.jpg", "fire_lily"))]
    (tmp_path / name).write_text("\ufeff" + "\r\n".join(lines), encoding="utf-8")
    examples, _ = read(tmp_path / name, "flowers")
    assert {(e.images[0].name, e.solution) for e in examples} == {("a.jpg", "tiger lily"), ("b.jpg", "fire lily")}
    if name == "labels.csv":
        assert len(read(tmp_path, "flowers")[0]) == 2, "the folder with it, without a column of splits"
        assert len(read(tmp_path, "flowers", split="val")[0]) == 2, "named by --eval_data"
        with pytest.raises(DataError, match="has no splits and is trained on: --eval_data names what to evaluate"):
            read(tmp_path, "flowers", split="val", one_split=False)


def test_labels_without_a_file_are_skipped_and_counted(tmp_path):
    """For a folder and for its labels file; the first column that is not empty has the image."""
    picture(tmp_path / "a.jpg")
    (tmp_path / "labels.csv").write_text("image,file,class_name\n,a.jpg,rose\n,,lily\n")
    for source in (tmp_path, tmp_path / "labels.csv"):
        with pytest.raises(DataError, match="line 3: one of image, .*, found none"):
            read(source, "flowers")
        examples, notes = read(source, "flowers", skip_bad_images=True)
        assert [(e.images[0].name, e.solution) for e in examples] == [("a.jpg", "rose")]
        assert any("1 images skipped" in note for note in notes)


def test_labels_with_quoted_names_and_splits(tmp_path):
    with (tmp_path / "labels.csv").open("w", newline="") as out:
        writer = csv.writer(out)
        writer.writerow(("file", "class_name", "split"))
        for split in ("train", "valid"):
            picture(tmp_path / f"{split}.jpg")
            writer.writerow((f"{split}.jpg", 'orchid, "moth"', split))
    for split, name in (("train", "train.jpg"), ("val", "valid.jpg")):
        for source in (tmp_path, tmp_path / "labels.csv"):
            (example,), _ = read(source, "flowers", split=split, one_split=False)
            assert (example.images[0].name, example.solution) == (name, 'orchid, "moth"')


def test_class_folders_as_people_have_them(tmp_path):
    """valid/ is the validation split before test/; files of macOS and of other formats are no images."""
    for split in ("train", "valid", "test"):
        picture(tmp_path / split / "rose" / f"{split}.jpg")
        (tmp_path / split / "rose" / f"._{split}.jpg").write_bytes(b"\0\5")
        (tmp_path / split / "rose" / "IMG_1.HEIC").write_bytes(b"x")
    (tmp_path / "train" / ".ipynb_checkpoints").mkdir()
    (tmp_path / "valid" / "rose" / "more").mkdir()
    examples, notes = read(tmp_path, "flowers", split="val")
    assert [e.images[0].name for e in examples] == ["valid.jpg"]
    assert any("left out: 1 .heic, 1 folders; pip install pillow-heif" in note for note in notes)


# ------------------------------------------------------------------------------------------------
# Hugging Face's conventions.


def detection_table(datasets, boxes: dict[str, list], as_list=False, sizes=True, names=("dog", "cat")):
    category = datasets.ClassLabel(names=list(names))
    if as_list:
        objects = datasets.List({"bbox": datasets.List(datasets.Value("float32")), "category": category})
        cell = [{"bbox": box, "category": name} for name, box in boxes.items()]
    else:
        objects = {"bbox": datasets.List(datasets.List(datasets.Value("float32"))), "category": datasets.List(category)}
        cell = {"bbox": list(boxes.values()), "category": list(boxes)}
    features = {"image": datasets.Image(), "objects": objects}
    row = {"image": Image.new("RGB", SIZE), "objects": cell}
    if sizes:
        features |= {"width": datasets.Value("int32"), "height": datasets.Value("int32")}
        row |= {"width": 60, "height": 40}
    return datasets.Dataset.from_list([row], features=datasets.Features(features))


@pytest.mark.parametrize("form", ["xywh", "xyxy"])
@pytest.mark.parametrize("as_list, sizes", [(False, True), (True, False)])
def test_detection_tables(tmp_path, form, as_list, sizes):
    """Boxes that only one reading fits decide; the reading is printed."""
    datasets = pytest.importorskip("datasets")
    boxes = {"dog": DOG, "cat": CAT} if form == "xywh" else {name: list(box) for name, box in CORNERS.items()}
    detection_table(datasets, boxes, as_list, sizes).to_parquet(tmp_path / "data.parquet")
    examples, notes = read(tmp_path / "data.parquet")
    assert {(e.category, e.solution) for e in examples} == {(name, (box,)) for name, box in CORNERS.items()}
    assert any(f"boxes are {form}: as" in note for note in notes)
    assert [image.size for image in data.open_images(examples[0])] == [SIZE]
    assert len({e.category_id for e in examples}) == 2


def test_boxes_that_do_not_decide_are_asked_about(tmp_path):
    datasets = pytest.importorskip("datasets")
    detection_table(datasets, {"dog": [5, 6, 25, 26]}).to_parquet(tmp_path / "data.parquet")
    with pytest.raises(DataError, match="fit their images both as xywh and as xyxy: --box_format"):
        read(tmp_path / "data.parquet")
    for form, expected in (("xywh", (5, 6, 30, 32)), ("xyxy", (5, 6, 25, 26))):
        (example,), notes = read(tmp_path / "data.parquet", box_format=form)
        assert example.solution == (expected,) and any("by --box_format" in note for note in notes)
    detection_table(datasets, {"dog": [5, 6, 250, 26]}).to_parquet(tmp_path / "data.parquet")
    with pytest.raises(DataError, match="do not all fit their images, read either way"):
        read(tmp_path / "data.parquet")


def test_detection_tables_of_several_images_have_negatives_and_shots(tmp_path):
    datasets = pytest.importorskip("datasets")
    one = detection_table(datasets, {"dog": DOG, "cat": CAT})
    two = detection_table(datasets, {"dog": DOG})
    datasets.concatenate_datasets([one, two, two]).to_parquet(tmp_path / "data.parquet")
    assert sum(not e.solution for e in read(tmp_path / "data.parquet", negatives=0.2)[0]) == 1
    assert len(read(tmp_path / "data.parquet", shots=1)[0]) == 2
    with pytest.raises(DataError, match="objects with boxes, for --task coco, not flowers"):
        read(tmp_path / "data.parquet", "flowers")


@pytest.mark.parametrize(
    "objects, message",
    [
        (None, "objects expected"),
        ({"bbox": [DOG], "category": [None]}, "objects need bbox"),
        ({"bbox": [DOG], "category": []}, "objects need bbox"),
        ({"bbox": [["a", 0, 1, 1]], "category": ["dog"]}, "objects need bbox"),
        ("dog", "objects expected"),
    ],
)
def test_objects_with_missing_values_are_named(tmp_path, objects, message):
    picture(tmp_path / "a.png")
    whole = {"image": "a.png", "objects": {"bbox": [DOG, CAT], "category": ["dog", "cat"]}}
    lines = [whole, {"image": "a.png", "objects": objects}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(DataError, match=f"line 2: {message}"):
        read(tmp_path / "rows.jsonl")
    examples, notes = read(tmp_path / "rows.jsonl", skip_bad_images=True)
    assert {e.category for e in examples} == {"dog", "cat"} and any("1 rows skipped" in note for note in notes)


def test_a_table_without_splits_is_trained_on_only(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = [{"image": Image.new("RGB", SIZE), "question": "?", "answer": str(i)} for i in range(3)]
    table = datasets.Dataset.from_list(rows).cast_column("image", datasets.Image())
    table.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": table}).save_to_disk(tmp_path / "dict")
    for name in ("one", "dict"):
        assert len(read(tmp_path / name, "rows")[0]) == len(read(tmp_path / name, "rows", split="val")[0]) == 3
        with pytest.raises(DataError, match="--eval_data"):
            read(tmp_path / name, "rows", split="val", one_split=False)


def test_a_column_of_splits_divides_a_table_too(tmp_path):
    datasets = pytest.importorskip("datasets")
    image, splits = Image.new("RGB", SIZE), ("train", "test", "train", None)
    rows = [{"image": image, "question": "?", "answer": str(i), "split": s} for i, s in enumerate(splits)]
    datasets.Dataset.from_list(rows).cast_column("image", datasets.Image()).to_parquet(tmp_path / "data.parquet")
    assert [e.solution for e in read(tmp_path / "data.parquet", "rows")[0]] == ["0", "2", "3"]
    assert [e.solution for e in read(tmp_path / "data.parquet", "rows", split="val")[0]] == ["1"]


@pytest.mark.parametrize("train, test", [("Train", "Test"), ("training", "testing"), ("TRAIN ", "Validation")])
def test_splits_are_known_in_any_spelling(tmp_path, train, test):
    picture(tmp_path / "a.jpg")
    (tmp_path / "labels.csv").write_text(f"file,label,split\na.jpg,cat,{train}\na.jpg,dog,{test}\n")
    for split, name in (("train", "cat"), ("val", "dog")):
        assert [e.solution for e in read(tmp_path / "labels.csv", "classes", split=split, one_split=False)[0]] == [name]


def test_crowd_regions_of_a_table_are_no_targets(tmp_path):
    picture(tmp_path / "a.png")
    objects = {"bbox": [DOG, CAT], "category": ["dog", "dog"], "iscrowd": [0, 1]}
    (tmp_path / "rows.jsonl").write_text(json.dumps({"image": "a.png", "objects": objects}))
    ((one,), _) = read(tmp_path / "rows.jsonl", box_format="xywh")
    assert len(one.solution) == len(one.crowds) == 1 and one.solution != one.crowds
    (tmp_path / "rows.jsonl").write_text(json.dumps({"image": "a.png", "objects": objects | {"iscrowd": [1]}}))
    with pytest.raises(DataError, match="objects need bbox"):
        read(tmp_path / "rows.jsonl", box_format="xywh")


def test_ids_of_rows_do_not_depend_on_how_the_file_is_named(tmp_path, monkeypatch):
    """They decide the sampled tokens, and which questions two evaluations have in common."""
    picture(tmp_path / "a.png")
    file = tmp_path / "Rows.JSONL"
    file.write_text(json.dumps({"image": "a.png", "problem": "?", "solution": "a"}))
    monkeypatch.chdir(tmp_path)
    assert {read(name, "rows")[0][0].id for name in (file, "Rows.JSONL", "./Rows.JSONL")} == {"Rows.JSONL/0"}


def test_empty_cells_at_the_end_and_quotes_within_shift_nothing(tmp_path):
    picture(tmp_path / "a.png")
    (tmp_path / "rows.csv").write_text('image,problem,solution\na.png,"what" is it,a,\na.png,?,b,,\n')
    assert [(e.question, e.solution) for e in read(tmp_path / "rows.csv", "rows")[0]] == [
        ("what is it", "a"),
        ("?", "b"),
    ]


def test_rows_of_other_splits_are_not_read(tmp_path):
    picture(tmp_path / "a.jpg")
    text = "file,label,split\n" + "".join(f"a.jpg,cat,{split}\n" for split in ("train", "testA", "val", "unlabeled"))
    (tmp_path / "labels.csv").write_text(text)
    for split in ("train", "val"):
        assert len(read(tmp_path / "labels.csv", "classes", split=split, one_split=False)[0]) == 1


@pytest.mark.parametrize("text, message", [
    ("image,problem,solution\na.png,Is it red, or blue?,red\n", "line 2: more cells than columns"),
    ('image,problem,solution\na.png,"Say ""hi"",x\na.png,?,y\n', "not CSV .*is a quote not closed"),
])  # fmt: skip
def test_commas_and_quotes_that_would_shift_cells_are_named(tmp_path, text, message):
    picture(tmp_path / "a.png")
    (tmp_path / "rows.csv").write_text(text)
    with pytest.raises(DataError, match=message):
        read(tmp_path / "rows.csv", "rows")


def test_an_image_has_one_class_and_a_class_one_image(tmp_path):
    for name in "ab":
        picture(tmp_path / f"{name}.png")
    file = tmp_path / "rows.jsonl"
    for rows, message in (
        ([{"images": ["a.png", "b.png"], "label": "dog"}], "2 images and one label"),
        ([{"image": "a.png", "label": name} for name in ("dog", "cat")], "a.png is dog in another row and cat here"),
    ):
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        with pytest.raises(DataError, match=message):
            read(file, "classes")
    file.write_text(json.dumps({"image": "a.png", "label": "dog"}))
    assert read(file, "classes")[0][0].id == "train/a.png", "without the folder"


def test_categories_may_be_called_by_digits_and_an_unused_one_nothing(tmp_path):
    content = table()
    for category, name in zip(content["categories"], ("0", "1")):
        category["name"] = name
    content["categories"].append({"id": 9, "name": ""})
    write(tmp_path / "my.json", content)
    examples, notes = read(tmp_path / "my.json")
    assert {e.category for e in examples} == {"0", "1"} and any("categories are called 0, 1" in note for note in notes)


@pytest.mark.parametrize("names", [(None, "cat"), (5, "cat"), ("dog", " ")])
def test_categories_have_names(tmp_path, names):
    content = table()
    for category, name in zip(content["categories"], names):
        category["name"] = name
    write(tmp_path / "my.json", content)
    with pytest.raises(DataError, match="a model can only be asked for names"):
        read(tmp_path / "my.json")


@pytest.mark.parametrize("box", ["1234", {"1": 0, "2": 0, "3": 0, "4": 0}])
def test_a_box_is_a_list(tmp_path, box):
    content = table()
    content["annotations"][0]["bbox"] = box
    write(tmp_path / "my.json", content)
    with pytest.raises(DataError, match="has no .x, y, width, height. in pixels"):
        read(tmp_path / "my.json")


def test_metadata_about_something_else_is_no_table(tmp_path):
    picture(tmp_path / "train" / "dog" / "a.png")
    (tmp_path / "metadata.csv").write_text("license,year\nCC,2026\n")
    assert read(tmp_path, "classes")[0][0].solution == "dog"


def test_a_parquet_file_is_divided_by_its_column_of_splits_in_evaluation_too(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = [{"image": Image.new("RGB", SIZE), "question": "?", "answer": s, "split": s} for s in ("train", "val")]
    datasets.Dataset.from_list(rows).cast_column("image", datasets.Image()).to_parquet(tmp_path / "data.parquet")
    assert [e.solution for e in read(tmp_path / "data.parquet", "rows", split="val", one_split=False)[0]] == ["val"]


def test_files_named_for_their_splits_are_read_from_a_folder(tmp_path):
    picture(tmp_path / "a.png")
    for name in ("train", "val"):
        row = {"image": "a.png", "problem": "?", "solution": name}
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row))
    for split in ("train", "val"):
        assert [e.solution for e in read(tmp_path, "rows", split=split, one_split=False)[0]] == [split]
    shutil.copy(tmp_path / "train.jsonl", tmp_path / "train_2.jsonl")
    with pytest.raises(DataError, match="2 files for train among train.jsonl, train_2.jsonl, val.jsonl"):
        read(tmp_path, "rows")
    shutil.copy(tmp_path / "train.jsonl", tmp_path / "more.jsonl")
    with pytest.raises(DataError, match="--data must name one of more.jsonl, train.jsonl"):
        read(tmp_path, "rows")


def test_an_empty_class_is_not_taken_from_another_column(tmp_path):
    picture(tmp_path / "a.jpg")
    (tmp_path / "labels.csv").write_text("file,label,species\na.jpg,beagle,dog\na.jpg,,cat\n")
    with pytest.raises(DataError, match="line 3: solution 'None': expected a class name"):
        read(tmp_path / "labels.csv", "classes")


def test_objects_without_names(tmp_path):
    datasets = pytest.importorskip("datasets")
    objects = {"bbox": [DOG], "category": [7]}
    table = datasets.Dataset.from_list([{"image": Image.new("RGB", SIZE), "objects": objects}])
    table.cast_column("image", datasets.Image()).to_parquet(tmp_path / "data.parquet")
    with pytest.raises(DataError, match="its categories are numbers, 7; a model can only be asked for names"):
        read(tmp_path / "data.parquet", box_format="xywh")


@pytest.mark.parametrize("column, picture_column", [("label", "image"), ("fine_label", "img")])
def test_classification_tables(tmp_path, column, picture_column):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({picture_column: datasets.Image(), column: datasets.ClassLabel(names=["rose", "ivy"])})
    images = [{picture_column: Image.new("RGB", SIZE), column: i % 2} for i in range(4)]
    table = datasets.Dataset.from_list(images, features=features)
    datasets.DatasetDict({"train": table, "test": table.select([0])}).save_to_disk(tmp_path / "data")
    examples, _ = read(tmp_path / "data", "flowers")
    assert sorted(e.solution for e in examples) == ["ivy", "ivy", "rose", "rose"]
    assert len(read(tmp_path / "data", "flowers", shots=1)[0]) == 2
    assert [e.solution for e in read(tmp_path / "data", "flowers", split="val")[0]] == ["rose"]
    assert [image.size for image in data.open_images(examples[0])] == [SIZE]


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv"])
def test_image_folders_with_metadata(tmp_path, name):
    """Hugging Face's imagefolder: file_name and any columns, here a question and its answer."""
    pytest.importorskip("datasets")
    for split in ("train", "test"):
        picture(tmp_path / split / "a.png")
        row = {"file_name": "a.png", "question": f"How many in {split}?", "answer": "three"}
        with (tmp_path / split / name).open("w", newline="") as out:
            if name.endswith("csv"):
                writer = csv.DictWriter(out, row)
                writer.writeheader()
                writer.writerow(row)
            else:
                out.write(json.dumps(row) + "\n")
    (example,), _ = read(tmp_path, "rows")
    assert (example.question, example.solution) == ("How many in train?", "three")
    assert [image.size for image in data.open_images(example)] == [SIZE]
    (example,), _ = read(tmp_path, "rows", split="val")
    assert example.question == "How many in test?"


def test_image_folder_with_objects(tmp_path):
    pytest.importorskip("datasets")
    picture(tmp_path / "train" / "a.png")
    row = {"file_name": "a.png", "objects": {"bbox": [DOG, CAT], "categories": ["dog", "cat"]}}
    (tmp_path / "train" / "metadata.jsonl").write_text(json.dumps(row) + "\n")
    examples, _ = read(tmp_path)
    assert {(e.category, e.solution) for e in examples} == {(name, (box,)) for name, box in CORNERS.items()}


def test_parquet_with_paths_looks_beside_the_file(tmp_path, monkeypatch):
    datasets, pa, pq = map(pytest.importorskip, ("datasets", "pyarrow", "pyarrow.parquet"))
    picture(tmp_path / "set" / "pictures" / "a.png")
    table = datasets.Dataset.from_list([{"image": "pictures/a.png", "problem": "?", "solution": "3"}])
    table.to_parquet(tmp_path / "set" / "text.parquet")
    struct = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    cell = pa.array([{"path": "pictures/a.png", "bytes": None}], struct)
    cells = {"image": cell, "problem": ["?"], "solution": ["3"]}
    pq.write_table(pa.table(cells), tmp_path / "set" / "typed.parquet")
    monkeypatch.chdir(tmp_path)
    for name in ("text", "typed"):
        (example,), _ = read(Path("set") / f"{name}.parquet", "rows")
        assert [image.size for image in data.open_images(example)] == [SIZE]


# ------------------------------------------------------------------------------------------------
# Images.


@pytest.mark.parametrize("mode, kind, top", [("I;16", "uint16", 4095), ("I", "int32", 70_000), ("F", "float32", 0.5)])
def test_gray_levels_beyond_8_bits_are_stretched(tmp_path, mode, kind, top):
    levels = np.linspace(0, top, 60 * 40).reshape(40, 60).astype(kind)
    Image.fromarray(levels).save(tmp_path / "a.tiff")
    with Image.open(tmp_path / "a.tiff") as saved:
        assert saved.mode == mode
    with pytest.warns(UserWarning, match="stretched to their range"):
        image = data.open_image(tmp_path / "a.tiff")
    shown = np.asarray(image)[..., 0].astype(float)
    assert image.mode == "RGB" and shown.min() == 0 and shown.max() == 255
    assert np.abs(shown - levels.astype(float) * 255 / top).max() <= 1


def test_a_flat_gray_image_of_16_bits(tmp_path):
    Image.fromarray(np.full((4, 6), 9, "uint16")).save(tmp_path / "a.png")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert data.open_image(tmp_path / "a.png").getpixel((0, 0)) == (0, 0, 0)


@pytest.mark.parametrize("mode, ending", [("CMYK", "jpg"), ("LA", "png"), ("P", "gif"), ("1", "png")])
def test_other_modes_become_rgb(tmp_path, mode, ending):
    assert data.open_image(picture(tmp_path / f"a.{ending}", mode=mode)).mode == "RGB"


def test_very_large_images(tmp_path, monkeypatch):
    """A JPEG is decoded at a fraction of its size, with the frame of its annotation; another format is refused."""
    monkeypatch.setattr(data, "MOST_PIXELS", 4096 * 4096 + 1)
    picture(tmp_path / "a.jpg", (9000, 4000))
    image = data.open_image(tmp_path / "a.jpg", (9000, 4000))
    assert image.size == (4500, 2000)
    with pytest.raises(DataError, match="its annotation says 4500x2000"):
        data.open_image(tmp_path / "a.jpg", (4500, 2000))
    picture(tmp_path / "a.png", (9000, 4000))
    with pytest.raises(DataError, match="a.png: the image is 9000x4000, above 16,777,217 pixels: make it smaller"):
        data.open_image(tmp_path / "a.png")


def test_headers_are_read_at_the_start(tmp_path):
    write(tmp_path / "my.json", table())
    (tmp_path / "b.jpg").write_bytes((tmp_path / "b.jpg").read_bytes()[:10])
    with pytest.raises(DataError, match="b.jpg: not a whole image"):
        read(tmp_path / "my.json")
    examples, notes = read(tmp_path / "my.json", skip_bad_images=True)
    assert {e.images[0].name for e in examples} == {"a.jpg"} and any("1 images skipped" in note for note in notes)
    picture(tmp_path / "b.jpg", (40, 60))
    with pytest.raises(DataError, match="b.jpg: the image is 40x60 once upright, its annotation says 60x40"):
        read(tmp_path / "my.json")


def test_whatever_a_processor_raises_names_the_example(llava_dir, tmp_path):
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(llava_dir)
    examples, _ = read(write(tmp_path / "my.json", table()))

    class Raises(type(processor)):
        def __call__(self, **inputs):
            raise ZeroDivisionError("division by zero")

    processor.__class__ = Raises
    prompts = data.Prompts(TASKS["coco"], examples, processor, "relative")
    error = prompts[0, 0]
    assert isinstance(error, DataError) and "example train/1/dog: " in str(error) and "division by zero" in str(error)


# ------------------------------------------------------------------------------------------------
# Examples whose own right answer earns nothing.


def unearnable(task: str, examples, names, coordinates="relative", **settings):
    encoder = SimpleNamespace(task=TASKS[task], examples=examples, coordinates=coordinates, think=True)
    encoder.frame = lambda size, convention=None: size
    chosen = rewards.choose_rewards(names, **settings)
    cfg = SimpleNamespace(seed=0, iou_threshold=[0.5])
    return check.unearnable(SimpleNamespace(prompts=encoder, rewards=chosen, cfg=cfg))


def test_examples_that_cannot_earn_are_counted(tmp_path):
    content = table()
    content["images"][0] |= {"width": 6000, "height": 4000}
    content["annotations"][0]["bbox"] = [5, 6, 1, 1]  # a sixth of a unit
    write(tmp_path / "my.json", content)
    picture(tmp_path / "a.jpg", (6000, 4000))
    examples, _ = read(tmp_path / "my.json")
    (line,) = unearnable("coco", examples, {"iou": 1.0, "format": 1.0}, iou_threshold=0.5)
    assert line == (
        "the right answer of 1 of 3 examples earns 0 from the reward iou (1 have boxes under one unit): train/1/dog"
    )
    content["annotations"][0]["bbox"] = [5, 6, 100, 100]
    (tmp_path / "my.json").write_text(json.dumps(content))
    assert unearnable("coco", read(tmp_path / "my.json")[0], TASKS["coco"].rewards, iou_threshold=0.5) == []


def test_a_solution_that_a_reward_cannot_read_is_named_at_the_start(tmp_path):
    picture(tmp_path / "a.png")
    (tmp_path / "rows.jsonl").write_text(json.dumps({"image": "a.png", "problem": "How many?", "solution": 3}))
    examples, _ = read(tmp_path / "rows.jsonl", "rows")
    assert unearnable("rows", examples, {"accuracy": 1.0}) == [], "numbers are read as text"
    assert unearnable("rows", examples, {"iou": 1.0}) == [
        "the right answer of 1 of 1 examples earns 0 from the reward iou: rows.jsonl/0"
    ]
    with pytest.raises(DataError, match="/0: the reward published_accuracy cannot read its solution 3, of type int"):
        unearnable("rows", examples, {"published_accuracy": 1.0})
    (tmp_path / "rows.jsonl").write_text(json.dumps({"image": "a.png", "problem": "?", "solution": {"count": 3}}))
    (line,) = unearnable("rows", read(tmp_path / "rows.jsonl", "rows")[0], {"accuracy": 1.0})
    assert "the right answer of 1 of 1 examples earns 0 from the reward accuracy" in line
    assert unearnable("rows", examples, {"format": 1.0}) == []


def test_only_some_are_tried_where_the_frame_is_asked_of_the_processor(tmp_path):
    write(tmp_path / "my.json", table())
    examples = read(tmp_path / "my.json")[0] * 200
    tried = []

    class Task:
        boxes = True

    asked = SimpleNamespace(task=TASKS["coco"], examples=examples, coordinates="pixels", think=True)
    asked.frame = lambda size, convention=None: tried.append(size) or size
    cfg = SimpleNamespace(seed=0, iou_threshold=[0.5])
    run = SimpleNamespace(prompts=asked, rewards=rewards.choose_rewards({"iou": 1.0}), cfg=cfg)
    assert check.unearnable(run) == [] and len(tried) == 256


# ------------------------------------------------------------------------------------------------
# Real samples, and the command line.


@shared("coco_mini")
def test_the_coco_sample_is_read_by_its_file():
    source = SHARED / "coco_mini"
    folder, _ = read(source)
    examples, notes = read(source / "instances_train2017.json")
    assert [replace_id(e) for e in examples] == [replace_id(e) for e in folder] and len(examples) == 566
    assert any("178 images in" in note and "1394 boxes, 5 crowd regions, 3 images without" in note for note in notes)


def replace_id(example):
    return example.id, example.solution, example.category


@pytest.mark.slow
@pytest.mark.parametrize("export", [roboflow, cvat, label_studio, fiftyone, a_file_itself], ids=lambda e: e.__name__)
def test_exports_train_by_the_command_line(tmp_path, llava_dir, export):
    from test_run import SMALL, virft_py

    source = export(tmp_path / "data")
    done = virft_py(**SMALL | {"steps": 2}, task="coco", data=source, model=llava_dir, out=tmp_path / "run")
    assert "3 train examples from" in done.stdout and (tmp_path / "run" / "model").is_dir()


@pytest.mark.slow
@pytest.mark.parametrize("form", ["detection", "classification", "ShareGPT", "TRL, parts", "labels.csv"])
def test_rows_train_by_the_command_line(tmp_path, llava_dir, form):
    from test_run import SMALL, virft_py

    datasets = pytest.importorskip("datasets")
    picture(tmp_path / "a.png")
    task, source = "rows", tmp_path / "rows.jsonl"
    if form == "detection":
        task, source = "coco", tmp_path / "data.parquet"
        detection_table(datasets, {"dog": DOG, "cat": CAT}).to_parquet(source)
    elif form == "classification":
        task, source = "flowers", tmp_path / "data.parquet"
        features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["rose", "ivy"])})
        images = [{"image": Image.new("RGB", SIZE), "label": i} for i in (0, 1)]
        datasets.Dataset.from_list(images, features=features).to_parquet(source)
    elif form == "labels.csv":
        task, source = "flowers", tmp_path / form
        source.write_text("filename;label\na.png;rose\n")
    else:
        source.write_text(json.dumps({"image": "a.png"} | ROWS[form][1]) + "\n")
    virft_py(**SMALL | {"steps": 2}, task=task, data=source, model=llava_dir, out=tmp_path / "run")
    assert (tmp_path / "run" / "model").is_dir()


def test_a_folder_with_one_file_of_rows_is_that_file(tmp_path):
    picture(tmp_path / "pics" / "a.png")
    (tmp_path / "questions.jsonl").write_text(json.dumps({"file_name": "pics/a.png", "question": "?", "answer": 3}))
    (example,), notes = read(tmp_path, "rows")
    assert example.solution == 3 and any("columns read are file_name, question, answer" in note for note in notes)
    with pytest.raises(DataError, match="the rows of .* name no categories"):
        read(tmp_path, "rows", categories="dog")
    (tmp_path / "more.jsonl").write_text("")
    with pytest.raises(DataError, match="reads rows, from .*--data must name one of more.jsonl, questions.jsonl"):
        read(tmp_path, "rows")


def test_a_table_that_holds_paths_of_lost_images_says_so(tmp_path):
    datasets = pytest.importorskip("datasets")
    objects = {"bbox": [DOG, CAT], "category": ["dog", "cat"]}
    row = {"image": "/gone/a.png", "width": 60, "height": 40, "objects": objects}
    datasets.Dataset.from_list([row]).to_parquet(tmp_path / "data.parquet")
    with pytest.raises(DataError, match="/gone/a.png: no such image; the table holds its path only"):
        read(tmp_path / "data.parquet")
