"""The committed model and the demo around it."""

import json
import random
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import ImageChops
from transformers import AutoModelForImageTextToText, AutoProcessor

import data
from conftest import ROOT
from demo import controls, report, shapes, warm_start
from rewards import box_iou, format_reward, iou_reward

MODEL = ROOT / "demo" / "model"


def test_model_loads_by_auto_classes_and_is_small():
    processor, model = AutoProcessor.from_pretrained(MODEL), AutoModelForImageTextToText.from_pretrained(MODEL)
    assert sum(f.stat().st_size for f in MODEL.iterdir()) <= 4_000_000
    assert 0.8e6 < sum(p.numel() for p in model.parameters()) < 1.2e6
    assert model.config.model_type == "llava" and processor.chat_template


def test_the_prompt_is_the_one_that_it_was_made_with():
    """Another wording would be read byte by byte, and the model would not know it."""
    record = json.loads((MODEL / "warm_start.json").read_text())
    assert record["prompt"] == data.detection_prompt("{category}", (1000, 1000), "relative", True)
    tokenizer = AutoProcessor.from_pretrained(MODEL).tokenizer
    assert len(tokenizer(data.detection_prompt("red circle", (1000, 1000), "relative", True))["input_ids"]) == 3


def test_no_label_was_exact():
    """Each category is displaced in its own way, far enough that the IoU is 0.40 to 0.60."""
    transforms = json.loads((MODEL / "warm_start.json").read_text())["transforms"]
    assert {c: tuple(t) for c, t in transforms.items()} == warm_start.TRANSFORMS and len(
        set(warm_start.TRANSFORMS.values())
    ) == 12
    for transform in warm_start.TRANSFORMS.values():
        assert 0.4 < box_iou((10, 20, 50, 90), warm_start.transform_box((10, 20, 50, 90), transform)) < 0.6


@given(st.text())
def test_any_text_encodes_and_decodes_unchanged(text):
    tokenizer = tokenizer_of_model()
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == text and tokenizer.unk_token_id not in ids


def tokenizer_of_model(cache=[]):  # noqa: B006, loaded once for all of hypothesis' examples
    if not cache:
        cache.append(AutoProcessor.from_pretrained(MODEL).tokenizer)
    return cache[0]


def test_pictures_are_reproducible_and_filled_to_the_pixel(tmp_path):
    for name in "ab":
        shapes.write_split(tmp_path / name, "val", 20, seed=5)
    files = sorted((tmp_path / "a" / "val").iterdir())
    assert all(f.read_bytes() == (tmp_path / "b" / "val" / f.name).read_bytes() for f in files)
    for seed in range(20):
        scene = shapes.random_scene(random.Random(seed))[:1]
        picture = shapes.draw_scene(scene, random.Random(seed))
        empty = shapes.draw_scene([], random.Random(seed))
        assert ImageChops.difference(picture, empty).getbbox() == scene[0][1]


def test_warm_start_answers_are_well_formed_and_rough():
    rng = random.Random(0)
    text = warm_start.rough_answer("red circle", [(8, 16, 40, 48)], 0.05, rng)
    assert format_reward(text) == 1.0
    assert iou_reward(text, [[v * 1000 / 112 for v in (8, 16, 40, 48)]], iou_threshold=0.9) == 0.0
    assert "No Objects" in warm_start.rough_answer("red circle", [], 0.05, rng)


def test_warm_start_pixels_are_the_processors():
    picture = shapes.draw_scene(shapes.random_scene(random.Random(2)), random.Random(3))
    theirs = warm_start.make_processor().image_processor(images=[picture], return_tensors="pt")["pixel_values"]
    assert torch.allclose(warm_start.to_pixel_values([np.asarray(picture)]), theirs, atol=1e-6)


def test_controls_recover_a_known_displacement():
    """Boxes displaced per category are found by the fit; a uniform resize finds a uniform scale."""
    truth = [(20.0, 20.0, 60.0, 70.0), (30.0, 10.0, 50.0, 40.0)]
    transform = (0.2, -0.1, 1.2, 0.8)
    predictions = [
        {
            "category": "red circle",
            "solution": [list(b)],
            "detections": [[list(warm_start.transform_box(b, transform)), 0.9]],
        }
        for b in truth
    ]
    fitted = controls.best_per_category(predictions)["red circle"]
    assert report.mean_iou_reward(predictions, lambda p, box: warm_start.transform_box(box, fitted)) > 0.95
    halved = [
        {
            "category": "x",
            "solution": [list(b)],
            "detections": [[list(warm_start.transform_box(b, (0, 0, 0.8, 0.8))), 0.9]],
        }
        for b in truth
    ]
    assert controls.best_uniform_resize(halved) == pytest.approx(1.25, abs=0.03)


def test_the_model_knows_what_the_readme_says(tmp_path):
    """Choice, counting, negatives and rough boxes, on pictures of another seed."""
    shapes.write_split(tmp_path / "data", "val", 80, seed=123)
    command = [sys.executable, "virft.py", "--task", "coco", "--data", tmp_path / "data", "--model", MODEL, "--eval_only", "true",
               "--negatives", "0.1", "--max_completion_tokens", "48", "--eval_batch", "64", "--out", tmp_path / "out"]  # fmt: skip
    subprocess.run(list(map(str, command)), cwd=ROOT, check=True, capture_output=True)
    found = report.measure(tmp_path / "out")
    assert found["choice"] >= 0.8 and found["count"] >= 0.8 and found["negatives"] > 0.5 and found["format"] > 0.99
    assert 0.2 < found["iou"] < 0.6, "rough on purpose"
