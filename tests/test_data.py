"""Test readers, images and coordinates, and the errors that they raise."""

import json
import random
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import SHARED, shared
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps

import data
from data import DataError, Example
from extras import processors
from extras.readers import exports
from rewards import box_iou, iou_reward

COCO = data.TASKS["coco"]


@pytest.fixture
def coco(tmp_path):
    """Write three images: dogs in 1 and 2, a cat in 2, a crowd of dogs in 3; no image shows the third category."""
    table = {
        "images": [{"id": i, "file_name": f"{i}.png", "width": 60, "height": 40} for i in (1, 2, 3)],
        "annotations": [
            {"id": 1, "image_id": 1, "category_id": 7, "bbox": [10, 5, 20, 30], "iscrowd": 0},
            {"id": 2, "image_id": 1, "category_id": 7, "bbox": [40, 5, 20.4, 10], "iscrowd": 0},
            {"id": 3, "image_id": 2, "category_id": 7, "bbox": [0, 0, 60, 40], "iscrowd": 0},
            {"id": 4, "image_id": 2, "category_id": 9, "bbox": [1.5, 2.5, 3, 4], "iscrowd": 0},
            {"id": 5, "image_id": 3, "category_id": 7, "bbox": [0, 0, 50, 40], "iscrowd": 1},
        ],
        "categories": [{"id": 7, "name": "dog"}, {"id": 9, "name": "cat"}, {"id": 11, "name": "unicorn"}],
    }
    (tmp_path / "annotations").mkdir()
    (tmp_path / "train2017").mkdir()
    for i in (1, 2, 3):
        Image.new("RGB", (60, 40), (i * 50, 0, 0)).save(tmp_path / "train2017" / f"{i}.png")
    file = tmp_path / "annotations" / "instances_train2017.json"

    def write(change=lambda table: None) -> str:
        change(table)
        file.write_text(json.dumps(table))
        return str(tmp_path)

    write()
    return SimpleNamespace(root=tmp_path, file=file, write=write, images=tmp_path / "train2017")


def read(root, split: str = "train", **flags):
    return data.read_coco(str(root), split, data.Choice(**flags))


def by_id(examples):
    return {e.id: e for e in examples}


def test_one_example_per_image_and_category(coco):
    """[25] Check that crowds are kept apart from targets, and that categories without an image are named."""
    examples, notes = read(coco.root)
    found = by_id(examples)
    assert set(found) == {"train/1/dog", "train/2/dog", "train/2/cat"}
    dog = found["train/1/dog"]
    assert dog.solution == ((10, 5, 30, 35), (40, 5, 60, 15)), "xywh -> xyxy; a fraction over the edge is cut"
    assert (
        dog.images == (coco.images / "1.png",) and dog.size == (60, 40) and dog.category_id == 7 and dog.image_id == 1
    )
    assert any("unicorn" in note for note in notes)


def test_files_may_lie_directly_in_the_folder(coco):
    coco.file.rename(coco.root / coco.file.name)
    assert len(read(coco.root)[0]) == 3


def test_categories(coco):
    assert set(by_id(read(coco.root, categories="cat")[0])) == {"train/2/cat"}
    with pytest.raises(DataError, match="--categories: 'cats'.*cat"):
        read(coco.root, categories="dog, cats")


@shared("coco_mini")
def test_named_splits():
    """Compare the published splits with the 80 names of real COCO."""
    known = [
        c["name"] for c in json.loads((SHARED / "coco_mini" / "instances_train2017.json").read_text())["categories"]
    ]
    novel, base, few = (data.wanted_categories("x", known, name) for name in ("novel15", "base65", "fewshot8"))
    assert len(novel) == 15 and len(base) == 65 and len(few) == 8 and set(novel) | set(base) == set(known)


def test_shots_are_seeded_and_counted(tmp_path):
    from demo.shapes import write_split

    write_split(tmp_path, "train", 200, 0)
    first, again, other = (read(tmp_path, shots=3, seed=seed)[0] for seed in (1, 1, 2))
    per_category = {c: sum(e.category == c for e in first) for c in {e.category for e in first}}
    assert set(per_category.values()) == {3} and len(per_category) == 12
    assert [e.id for e in first] == [e.id for e in again] != [e.id for e in other]
    one = read(tmp_path, categories="red circle", shots=3, seed=1)[0]
    assert {e.id for e in one} == {e.id for e in first if e.category == "red circle"}, (
        "a category's shots do not depend on the others asked"
    )


@pytest.mark.parametrize("share", [0.1, 0.3])
def test_negatives(tmp_path, share):
    from demo.shapes import write_split

    write_split(tmp_path, "train", 100, 0)
    examples, _ = read(tmp_path, negatives=share, seed=3)
    absent = [e for e in examples if not e.solution]
    assert len(absent) / len(examples) == pytest.approx(share, abs=0.01)
    shown = {(e.image_id, e.category) for e in examples if e.solution}
    assert not any((e.image_id, e.category) in shown for e in absent)
    assert [e.id for e in read(tmp_path, negatives=share, seed=3)[0]] == [e.id for e in examples]


def test_a_crowd_is_not_an_absence(coco):
    def one_category(table):
        table["categories"] = table["categories"][:2]
        table["annotations"].append({"id": 6, "image_id": 3, "category_id": 9, "bbox": [0, 0, 5, 5], "iscrowd": 0})

    examples, _ = read(coco.write(one_category), negatives=0.4)
    assert {e.id for e in examples if not e.solution} == {"train/1/cat"}, "picture 3 shows a crowd of dogs"
    assert by_id(examples)["train/3/cat"].solution == ((0, 0, 5, 5),)


def annotation(row, **fields):
    return lambda table: table["annotations"][row].update(fields)


BAD = {  # what is wrong: (change, what the error must name); the first five concern single images
    "box outside the image": (
        annotation(1, bbox=[50, 5, 20, 10]),
        r"annotations\[1\] of image 1 \(60x40\) lies outside",
    ),
    "box of zero width": (annotation(0, bbox=[10, 5, 0, 30]), r"annotations\[0\].*has no area"),
    "box of negative height": (annotation(0, bbox=[10, 35, 5, -30]), r"annotations\[0\].*has no area"),
    "missing image": (lambda t: t["images"][1].update(file_name="9.png"), r"9\.png: no such image \(images\[1\]"),
    "aspect over 200": (lambda t: t["images"][2].update(width=9000), r"images\[2\] is 9000x40.*200"),
    "no annotations": (lambda t: t.pop("annotations"), "no list 'annotations'"),
    "image without file name": (lambda t: t["images"][1].pop("file_name"), r"images\[1\] has no 'file_name'"),
    "annotation without box": (
        lambda t: t["annotations"][2].pop("bbox"),
        r"annotations\[2\] of image .* has no \[x, y, width, height\]",
    ),
    "box of three numbers": (annotation(3, bbox=[1, 2, 3]), r"annotations\[3\] of image .*: bbox \[1, 2, 3\]"),
    "unknown category": (annotation(0, category_id=99), r"annotations\[0\] belongs to category 99"),
    "unknown image": (annotation(0, image_id=99), r"annotations\[0\] belongs to image 99"),
    "category without name": (lambda t: t["categories"][0].pop("name"), r"categories\[0\] has no 'name'"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_annotations_are_named(coco, name):
    change, message = BAD[name]
    with pytest.raises(DataError, match=message):
        read(coco.write(change))


@pytest.mark.parametrize("name", list(BAD)[:5])
def test_bad_images_can_be_skipped_and_are_counted(coco, name):
    change, _ = BAD[name]
    everything = len(read(coco.root)[0])
    examples, notes = read(coco.write(change), skip_bad_images=True)
    assert len(examples) <= everything and any("1 images skipped" in note for note in notes)


def test_bad_files_are_named(coco):
    with pytest.raises(DataError, match=r"no such folder(.|\n)*annotations/instances_train2017.json"):
        read(coco.root / "nowhere")
    with pytest.raises(DataError, match="no file for validation, only annotations/instances_train2017.json"):
        read(coco.root, "val")
    text = coco.file.read_text()
    coco.file.write_text(text[: len(text) // 2])
    with pytest.raises(DataError, match=r"instances_train2017.json: line 1, column \d+: not JSON"):
        read(coco.root)
    coco.file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="not UTF-8"):
        read(coco.root)
    coco.file.write_text(text)
    coco.images.rename(coco.root / "elsewhere")
    with pytest.raises(
        DataError,
        match=r"none of its images is there. Sought: 1\.png in .*annotations and .*, and in their train2017, images",
    ):
        read(coco.root)


# ------------------------------------------------------------------------------------------------
# Images [24].


@pytest.mark.parametrize("orientation", [1, 3, 5, 6, 7, 8, 9])
@pytest.mark.parametrize("kind", ["jpg", "png", "tiff", "webp"])
def test_the_size_in_the_header_is_that_of_the_upright_image(tmp_path, kind, orientation):
    """PIL turns a TIFF's size itself, and an orientation beyond 8 means nothing."""
    tag = Image.Exif()
    tag[0x0112] = orientation
    Image.new("RGB", (64, 48)).save(tmp_path / f"a.{kind}", exif=tag)
    size = data.open_image(tmp_path / f"a.{kind}").size
    assert data.image_size(tmp_path / f"a.{kind}") == size == ((48, 64) if orientation in (5, 6, 7, 8) else (64, 48))


@pytest.mark.parametrize("orientation", [6, 8])
@pytest.mark.parametrize("mode", ["L", "I;16", "RGB"])
def test_what_lies_in_a_turned_tiff_lies_where_its_size_says(tmp_path, mode, orientation):
    """Pillow maps uncompressed files into memory, and reads the stored rows with the upright size."""
    stored = np.zeros((48, 64), dtype="uint16" if mode == "I;16" else "uint8")
    stored[10:20, 5:15] = 60_000 if mode == "I;16" else 255
    image = Image.fromarray(stored).convert("RGB") if mode == "RGB" else Image.fromarray(stored)
    image.save(tmp_path / "a.tiff", tiffinfo={0x0112: orientation})
    expected = np.rot90(stored, {6: -1, 8: 1}[orientation]) > 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        upright = data.open_image(tmp_path / "a.tiff", (48, 64))
    assert (np.asarray(upright)[..., 0] == 255 * expected).all()


def test_gray_images_with_holes_and_of_the_other_endian_are_stretched(tmp_path):
    ramp = np.linspace(0, 1, 48 * 64, dtype="float32").reshape(48, 64)
    for hole in (np.nan, np.inf, -np.inf):
        (holed := ramp.copy())[0, 0] = hole
        Image.fromarray(holed).save(tmp_path / "a.tiff")
        gray = np.asarray(data.open_image(tmp_path / "a.tiff"))[..., 0]
        assert gray[0, 0] == 0 and gray[-1, -1] == 255 and 120 < gray.mean() < 135
    big = Image.frombytes("I;16B", (64, 48), (ramp * 60_000).astype(">u2").tobytes())
    big.save(tmp_path / "b.tiff")
    assert np.ptp(np.asarray(data.open_image(tmp_path / "b.tiff"))) == 255


def test_images_of_every_kind_load_upright_in_rgb(tmp_path):
    upright = Image.new("RGB", (30, 20), "blue")
    upright.paste("red", (0, 0, 10, 20))  # a red band on the left
    kinds = {
        "rgb.png": upright,
        "palette.png": upright.quantize(4),
        "cmyk.jpg": upright.convert("CMYK"),
        "gray.png": upright.convert("L"),
    }
    sideways = upright.transpose(Image.Transpose.ROTATE_90)
    for name, image in kinds.items():
        image.save(tmp_path / name)
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees clockwise to display
    sideways.save(tmp_path / "exif.png", exif=exif)
    clear = Image.new("RGBA", (30, 20), (0, 0, 0, 0))
    clear.paste((255, 0, 0, 255), (0, 0, 10, 20))
    clear.save(tmp_path / "clear.png")
    for name in (*kinds, "exif.png", "clear.png"):
        image = data.open_image(tmp_path / name)
        assert image.mode == "RGB" and image.size == (30, 20) == data.image_size(tmp_path / name), name
        if name != "gray.png":
            assert image.getpixel((4, 10))[0] > 200 and image.getpixel((4, 10))[2] < 60, name
    assert data.open_image(tmp_path / "clear.png").getpixel((25, 10)) == (255, 255, 255)


def test_images_that_do_not_open_are_named(tmp_path):
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(tmp_path / "cut.jpg")
    whole = (tmp_path / "cut.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.jpg").write_text("<html>not found</html>")
    (tmp_path / "empty.jpg").write_bytes(b"")
    reasons = {"cut": "Truncated File Read|image file is truncated", "text": "no format", "empty": "no format"}
    for name, reason in reasons.items():
        with pytest.raises(DataError, match=rf"{name}.jpg: not a whole image \(({reason})"):
            data.open_image(tmp_path / f"{name}.jpg")
    with pytest.raises(DataError, match="none.jpg: no such image"):
        data.open_image(tmp_path / "none.jpg")
    Image.new("RGB", (30, 20)).save(tmp_path / "other.png")
    with pytest.raises(DataError, match="30x20.*annotation says 20x30"):
        data.open_image(tmp_path / "other.png", (20, 30))


# ------------------------------------------------------------------------------------------------
# Fitting and coordinates.


def siglip(side: int):
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    return SiglipImageProcessorPil(size={"height": side, "width": side})


def clip(**settings):
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    return CLIPImageProcessorPil(**settings)


def test_a_center_crop_is_found_and_becomes_a_squash():
    processor = clip()
    assert processors.lost_borders(processor) == ["left", "right"]
    data.show_whole_images(processor, 401408)
    assert processors.lost_borders(processor) == [] and data.seen_size(processor, (640, 427)) == (224, 224)


def test_any_lost_border_is_found():
    for side, box in {"left": (70, 0, 640, 430), "top": (0, 50, 640, 430), "bottom": (0, 0, 640, 380)}.items():

        def cutting(images, box=box, **settings):
            return siglip(336)(images=[image.crop(box) for image in images], **settings)

        assert processors.lost_borders(cutting) == [side]
    for whole in (siglip(28), siglip(112), siglip(980)):
        assert processors.lost_borders(whole) == []
    with pytest.raises(DataError, match="returns flattened_patches, not pixel_values: it is not supported"):
        processors.lost_borders(lambda images, **settings: {"flattened_patches": []})


@pytest.mark.parametrize("most, bounds", [(401408, (3136, 401408)), (2000, (2000, 2000)), (10**8, (3136, 10**6))])
def test_max_pixels_is_written_into_processors_that_have_it(most, bounds):
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    processor = Qwen2VLImageProcessorPil(size={"shortest_edge": 100, "longest_edge": 10**6})
    assert data.show_whole_images(processor, most)
    saved = processor.to_dict()["size"]
    assert (saved["shortest_edge"], saved["longest_edge"]) == bounds
    assert not data.show_whole_images(siglip(112), most), "the start says that --max_pixels changes nothing"


def test_the_smallest_images_are_whole():
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    for most in (3136, 6272, 12544):
        processor = Qwen2VLImageProcessorPil()
        data.show_whole_images(processor, most)
        assert processors.lost_borders(processor) == []


def test_padding_that_a_model_sees_is_found():
    """Coordinates in pixels of a padded canvas would be displaced."""

    class Letterbox:
        size = {"height": 336, "width": 336}

        def __call__(self, images, **settings):
            return siglip(336)(images=[ImageOps.pad(image, (640, 640)) for image in images], **settings)

    assert data.seen_size(siglip(336), (640, 427)) == (336, 336)
    with pytest.raises(DataError, match="--coordinates relative"):
        data.seen_size(Letterbox(), (640, 427))


def test_what_pixels_refer_to_is_refused_where_a_processor_does_not_tell():
    from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

    with pytest.raises(DataError, match="does not tell the size that the model sees.*--coordinates relative"):
        data.seen_size(Idefics3ImageProcessorPil(), (640, 427))


boxes = st.tuples(*[st.floats(0, 1)] * 4).map(
    lambda b: (min(b[0], b[2]) * 640, min(b[1], b[3]) * 427, max(b[0], b[2]) * 640, max(b[1], b[3]) * 427)
)


@given(box=boxes, coordinates=st.sampled_from(["relative", "pixels"]))
def test_coordinates_round_trip(box, coordinates):
    """Convert to the model and back: exact without rounding, within half a unit of the model's coordinates with it."""
    size, seen = (640, 427), (616, 420)
    target = data.model_size(coordinates, seen)
    assert target == ((1000, 1000) if coordinates == "relative" else seen)
    inside = data.to_model(box, size, target)
    assert data.to_pixels(inside, size, target) == pytest.approx(box, abs=1e-9)
    rounded = data.round_box(inside)
    assert rounded[0] < rounded[2] and rounded[1] < rounded[3]
    if inside[2] - inside[0] > 2 and inside[3] - inside[1] > 2:
        for value, original, units, pixels in zip(data.to_pixels(rounded, size, target), box, target * 2, size * 2):
            assert abs(value - original) <= 0.5 * pixels / units + 1e-9


def test_the_prompt_states_the_range_in_force():
    assert "from 0 to 1000" in data.detection_prompt("dog", (1000, 1000), "relative", True)
    pixels = data.detection_prompt("dog", (616, 420), "pixels", True)
    assert "616 wide and 420 high" in pixels and "1000" not in pixels
    assert "<think>" in pixels and "<think>" not in data.detection_prompt("dog", (616, 420), "pixels", False)


@pytest.mark.parametrize("coordinates", ["relative", "pixels"])
def test_ground_truth_written_as_an_answer_earns_everything(coordinates):
    example = Example("a", (Path("x"),), (640, 427), ((10.3, 20.7, 200.2, 300.9), (400, 5, 630.5, 420)), "dog")
    target = data.model_size(coordinates, (616, 420))
    assert iou_reward(data.model_answer(COCO, example, target), data.model_solution(example, target)) > 0.98
    nothing = Example("a", (Path("x"),), (640, 427), (), "dog")
    assert data.model_answer(COCO, nothing, target) == "<think></think><answer>No Objects</answer>"


SIZES = [
    (640, 427), (427, 640), (1920, 1080), (3000, 4000), (56, 56), (101, 997), (2000, 60), (30, 1500),
    (777, 778), (1, 150),
]  # fmt: skip


@shared("qwen2_5_vl_processor")
@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
def test_qwen2_5_vl_coordinates_are_pixels_of_what_the_processor_passes_on(size, tmp_path):
    """Draw a white rectangle, and find it in the real processor's output at to_model(box); to_pixels leads back."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    settings = json.loads((SHARED / "qwen2_5_vl_processor" / "preprocessor_config.json").read_text())
    processor = Qwen2VLImageProcessorPil(**{k: v for k, v in settings.items() if not k.endswith(("type", "class"))})
    assert processors.lost_borders(processor) == [] and data.show_whole_images(processor, 401408)
    family = json.loads((SHARED / "qwen2_5_vl_processor" / "config.json").read_text())["model_type"]
    width, height = size
    box = (width // 4, height // 3, max(width // 4 + 1, 3 * width // 4), max(height // 3 + 1, 7 * height // 8))
    picture = Image.new("RGB", size)
    picture.paste("white", box)
    picture.save(tmp_path / "a.png")
    example = Example("a", (tmp_path / "a.png",), size, (box,), "rectangle")
    made = processor(images=data.open_images(example), return_tensors="np")
    _, rows, columns = made["image_grid_thw"][0].tolist()
    seen = data.seen_size(processor, size)
    assert seen == (columns * 14, rows * 14)
    target = data.model_size(data.COORDINATES_OF_FAMILY[family], seen)
    assert target == seen
    # [rows/2, columns/2, 2, 2, channel, frame, 14, 14]: patches in merged blocks of 2 x 2
    patches = made["pixel_values"].reshape(rows // 2, columns // 2, 2, 2, 3, 2, 14, 14)[:, :, :, :, 0, 0]
    gray = patches.transpose(0, 2, 4, 1, 3, 5).reshape(rows * 14, columns * 14)
    found = Image.fromarray(gray > (gray.min() + gray.max()) / 2).getbbox()
    (expected,) = data.model_solution(example, target)
    assert found == pytest.approx(expected, abs=1.0), "half a pixel, and the edge that resizing blurs"
    assert data.to_pixels(expected, size, target) == pytest.approx(box)
    assert COCO.question(example, seen, "pixels", True)[0].count(f"{seen[0]} wide and {seen[1]} high") == 1


def test_coordinates_of_families_that_exist():
    """Compare with the model types of transformers: a misspelled one would never be found."""
    from transformers import CONFIG_MAPPING

    assert set(data.COORDINATES_OF_FAMILY) <= set(CONFIG_MAPPING.keys())
    assert {f for f, convention in data.COORDINATES_OF_FAMILY.items() if convention == "pixels"} == {"qwen2_5_vl"}


# ------------------------------------------------------------------------------------------------
# Rows: released tables, JSON and JSON lines.

PROBLEM = "Detect all objects belonging to the category 'dog' in the image, with boxes between 0 and 1000."
BOXES = "<answer>[{'Position': [100, 200, 500, 800], 'Confidence': 1}]</answer>"


@pytest.fixture(params=["parquet", "folder of parquet", "save_to_disk"])
def released(request, tmp_path):
    """Return write(**change): write a table of a good row and a changed copy, return the value of --data."""
    datasets = pytest.importorskip("datasets")

    def write(**change) -> str:
        row = {"image": Image.new("RGB", (200, 100), "white"), "problem": PROBLEM, "solution": BOXES}
        rows = [row, {**row, "solution": "<answer>No Objects</answer>"} | change]
        rows = [{k: v for k, v in row.items() if v != "remove"} for row in rows]
        table = datasets.Dataset.from_list(rows)
        if request.param == "parquet":
            table.to_parquet(str(tmp_path / "data.parquet"))
            return str(tmp_path / "data.parquet")
        if request.param == "folder of parquet":
            (tmp_path / "repository" / "data").mkdir(parents=True)
            table.to_parquet(str(tmp_path / "repository" / "data" / "train-00000-of-00001.parquet"))
            return str(tmp_path / "repository")
        datasets.DatasetDict({"train": table}).save_to_disk(str(tmp_path / "data"))
        return str(tmp_path / "data")

    return write


def rows(source, task="coco", split="train", **flags):
    return data.load_examples(data.TASKS[task], str(source), split, **flags)


def test_released_rows(released):
    """Check that released rows keep their prompts and their 0..1000, also for a model family that uses pixels."""
    (first, second), _ = rows(released())
    assert first.solution == ((20, 20, 100, 80),) and first.size == (200, 100)
    assert first.category == "dog" and second.solution == ()
    question, target = COCO.question(first, (196, 112), "pixels", True)
    assert question == PROBLEM and target == (1000, 1000)
    assert data.model_solution(first, target) == (pytest.approx((100, 200, 500, 800)),)
    assert data.open_images(first)[0].size == (200, 100)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"solution": "a dog"}, r"row 1: solution 'a dog': expected <answer>\[.*No Objects.*the row is.*'problem'"),
        ({"solution": BOXES.replace("500", "1200")}, "row 1: lies outside the image"),
        ({"image": None}, "row 1: one of image, image_path and images expected"),
        ({"problem": None}, "row 1: no problem. A row has image"),
    ],
)
def test_released_rows_that_do_not_fit_are_shown_and_can_be_skipped(released, change, message):
    source = released(**change)
    with pytest.raises(DataError, match=message):
        rows(source)
    examples, notes = rows(source, skip_bad_images=True)
    assert len(examples) == 1 and any("1 rows skipped" in note for note in notes)


def test_a_table_without_the_split_says_what_it_has(released):
    source = released()
    if Path(source).is_file():
        assert len(rows(source, split="val")[0]) == len(rows(source)[0])
        with pytest.raises(DataError, match="has no splits and is trained on: --eval_data names what to evaluate"):
            rows(source, split="val", one_split=False)
    else:
        assert len(rows(source, split="val")[0]) == len(rows(source)[0]), "its only split, where it is named for this"
        with pytest.raises(DataError, match="no split val or valid or validation or test. It has train.*--eval_data"):
            rows(source, split="val", one_split=False)


def test_a_hub_name_is_read_as_a_table_is(monkeypatch):
    """Check, without the hub, that a source of the form owner/name that is not a path is loaded from the hub."""
    datasets = pytest.importorskip("datasets")
    row = {"image": Image.new("RGB", (200, 100)), "problem": PROBLEM, "solution": BOXES}
    table = datasets.DatasetDict({"train": datasets.Dataset.from_list([row])})
    monkeypatch.setattr(datasets, "load_dataset", lambda name: {"laolao77/ViRFT_COCO": table}[name])
    (example,), _ = rows(COCO.hub_data)
    assert example.id == "ViRFT_COCO/0" and example.solution == ((20, 20, 100, 80),)
    assert exports.reader_of(COCO, "a/b/c") is COCO.read, "not of the form owner/name"
    for source in ("rows.jsonl", "a/rows.jsonl", "pictures.zip"):
        with pytest.raises(DataError, match="no such file or folder"):
            exports.reader_of(COCO, source)


def test_tables_of_several_images_and_of_classes(tmp_path):
    datasets = pytest.importorskip("datasets")
    pictures = [Image.new("RGB", (30 + i, 20), "white") for i in range(3)]
    table = datasets.Dataset.from_list(
        [{"images": pictures, "problem": "Which?", "solution": "<answer>tiger lily</answer>"}]
    )
    table = table.cast_column("images", datasets.List(datasets.Image()))
    table.to_parquet(str(tmp_path / "t.parquet"))
    (example,), _ = rows(tmp_path / "t.parquet", "flowers")
    assert example.solution == "tiger lily" == example.category
    assert [image.size for image in data.open_images(example)] == [(30, 20), (31, 20), (32, 20)]
    assert "t.parquet: row 0, images[2]" in str(example.images[2])


@pytest.fixture
def lines(tmp_path):
    """Return write(*changes): write JSON rows, each a changed good row, next to 200 x 100 images a.png and b.png."""
    for name in "ab":
        Image.new("RGB", (200, 100), "white").save(tmp_path / f"{name}.png")

    def write(*changes, name="rows.jsonl") -> Path:
        good = {"image": "a.png", "problem": "Find the dogs.", "solution": [[20, 20, 100, 80]], "coords": "pixels"}
        table = [{k: v for k, v in (good | change).items() if v != "remove"} for change in changes]
        text = json.dumps(table) if name.endswith(".json") else "\n".join(map(json.dumps, table))
        (tmp_path / name).write_text(text)
        return tmp_path / name

    return write


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json"])
def test_json_rows_declare_their_coordinates(lines, name):
    """Check that pixels follow the model's convention, which the prompt then states; 0..1000 and its prompt stay."""
    source = lines({}, {"coords": 1000}, {"coords": "1000", "solution": "No Objects"}, {"category": "cat"}, name=name)
    (pixels, thousand, none, named), _ = rows(source)
    assert pixels.solution == ((20, 20, 100, 80),) and thousand.solution == ((4, 2, 20, 8),) and none.solution == ()
    assert named.category == "cat" and pixels.category == "object"
    for coordinates, seen, expected in (("relative", (196, 112), (1000, 1000)), ("pixels", (196, 112), (196, 112))):
        question, target = COCO.question(pixels, seen, coordinates, True)
        assert question.startswith("Find the dogs.\nCoordinates are integer") and target == expected
        assert ("196 wide and 112 high" in question) == (coordinates == "pixels")
        assert COCO.question(thousand, seen, coordinates, True) == ("Find the dogs.", (1000, 1000))
    assert data.model_solution(pixels, (196, 112)) == (pytest.approx((19.6, 22.4, 98, 89.6)),)


def test_rows_of_several_images(lines):
    (example,), _ = rows(lines({"image": "remove", "images": ["a.png", "b.png"]}))
    assert [path.name for path in example.images] == ["a.png", "b.png"]
    assert len(data.open_images(example)) == 2


BAD_ROWS = {  # what is wrong: (task, changes of the second row, what the error must say)
    "no coordinates": ("coco", {"coords": "remove"}, 'line 2: boxes need coords: "pixels" or coords: 1000, found None'),
    "other coordinates": ("coco", {"coords": "xywh"}, "line 2: boxes need coords.*found 'xywh'"),
    "boxes of three": ("coco", {"solution": [[1, 2, 3]]}, r"line 2: solution '\[\[1, 2, 3\]\]': expected <answer>"),
    "reversed box": ("coco", {"solution": [[100, 20, 20, 80]]}, "line 2: solution .*expected <answer>"),
    "box outside": ("coco", {"solution": [[20, 20, 300, 80]]}, "line 2: lies outside the image"),
    "no solution": ("coco", {"solution": "remove"}, "line 2: no solution. A row has image.*problem and solution"),
    "no problem": ("coco", {"problem": "remove"}, "line 2: no problem. A row has image.*problem and solution"),
    "no image": ("coco", {"image": "remove"}, "line 2: one of image, image_path and images expected"),
    "two images": ("coco", {"image_path": "b.png"}, "line 2: one of image, image_path and images expected"),
    "image not there": ("coco", {"image": "c.png"}, r"line 2: .*c\.png: no such image"),
    "images not files": ("coco", {"image": "remove", "images": [1]}, "line 2: an image is the name of a file, found"),
    "two boxes": ("lisa", {"solution": [[1, 2, 3, 4]] * 2}, r"line 2: solution .*expected <answer>\(x1,y1\)"),
    "no class": ("cars", {"solution": ["", "a"]}, "line 2: solution .*expected a class name"),
    "not a row": ("coco", None, r"line 2: no problem. A row has image.*the row is \[1\]"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_ROWS)
def test_rows_that_do_not_fit_are_shown_and_can_be_skipped(lines, name):
    task, change, message = BAD_ROWS[name]
    good = {"lisa": {"solution": [1, 2, 3, 4]}, "cars": {"solution": "a car"}}.get(task, {})
    source = lines(good, good | (change or {}))
    if change is None:
        source.write_text(source.read_text().splitlines()[0] + "\n[1]")
    with pytest.raises(DataError, match=f"(?s){message}"):
        rows(source, task)
    examples, notes = rows(source, task, skip_bad_images=True)
    assert len(examples) == 1 and any("1 rows skipped" in note for note in notes)


def test_files_of_rows_that_do_not_read_are_named(lines, tmp_path):
    source = lines({}, {})
    source.write_text(source.read_text()[:-20])
    with pytest.raises(DataError, match=r"rows\.jsonl: line 2: not JSON"):
        rows(source)
    (tmp_path / "rows.json").write_text('{"image": "a.png"}')
    with pytest.raises(DataError, match=r"rows\.json: a list of rows expected"):
        rows(tmp_path / "rows.json")
    with pytest.raises(DataError, match=r"none\.jsonl: no such file"):
        rows(tmp_path / "none.jsonl")
    for flags in ({"shots": 2}, {"negatives": 0.1}):
        asked = "are asked: choose by --categories, or in the data"
        with pytest.raises(DataError, match=f"--{next(iter(flags))} .*{asked}"):
            rows(lines({}), **flags)
    with pytest.raises(DataError, match="--eval_categories all: all rows of .* are asked: choose by --categories"):
        rows(lines({}), split="val", eval_categories="all")


# ------------------------------------------------------------------------------------------------
# Real data.


@shared("coco_mini")
@pytest.mark.parametrize("split", ["train", "val"])
def test_real_coco(split):
    examples, _ = read(SHARED / "coco_mini", split)
    table = json.loads((SHARED / "coco_mini" / f"instances_{split}2017.json").read_text())
    targets = {(a["image_id"], a["category_id"]) for a in table["annotations"] if not a.get("iscrowd")}
    assert {(e.image_id, e.category_id) for e in examples} == targets
    assert sum(len(e.solution) for e in examples) == sum(not a.get("iscrowd") for a in table["annotations"])
    for example in random.Random(0).sample(examples, 10):
        (image,) = data.open_images(example)
        assert image.size == example.size
        for box, original in zip(data.model_solution(example, image.size), example.solution):
            assert box_iou(data.to_pixels(box, example.size, image.size), original) == pytest.approx(1)
