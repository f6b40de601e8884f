"""The committed models and the demo around them."""

import functools
import json
import random
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageChops, ImageDraw
from transformers import AutoModelForImageTextToText, AutoProcessor

import data
from conftest import ROOT
from demo import controls, gates, report, shapes, warm_start
from extras import collages
from rewards import box_iou, format_reward, iou_reward, parse_grounding

MODEL = ROOT / "demo" / "model"
FAMILIES = warm_start.FAMILIES
every_family = pytest.mark.parametrize("family", FAMILIES)


@functools.cache
def committed(family: str):
    """(processor, model) of a family's committed folder."""
    folder = ROOT / "demo" / FAMILIES[family].folder
    return AutoProcessor.from_pretrained(folder), AutoModelForImageTextToText.from_pretrained(folder).eval()


def warm_start_record(family: str) -> dict:
    return json.loads((ROOT / "demo" / FAMILIES[family].folder / "warm_start.json").read_text())


def test_every_family_has_pictures_a_model_and_a_command():
    script = (ROOT / "run.sh").read_text()
    *ours, sibling = FAMILIES
    assert set(FAMILIES) == set(shapes.WRITERS) and f"{' | '.join(ours)})" in script and f"        {sibling})" in script


@every_family
def test_model_loads_by_auto_classes_and_is_small(family):
    processor, model = committed(family)
    assert sum(f.stat().st_size for f in (ROOT / "demo" / FAMILIES[family].folder).iterdir()) <= 4_000_000
    assert 0.8e6 < sum(p.numel() for p in model.parameters()) < 1.2e6
    assert model.config.model_type == "llava" and processor.chat_template


WORDINGS = {
    "detection": lambda mark: data.detection_prompt(mark, (1000, 1000), "relative", True),
    "classification": lambda mark: data.TASKS["flowers"].prompt(mark, (1000, 1000), "relative", True),
    "grounding": lambda mark: data.TASKS["lisa"].prompt(f"the {mark}", (1000, 1000), "relative", True),
    "multi-image": shapes.pair_question,
    "mia-dpo": lambda mark: collages.multi_image_prompt(
        collages.LAYOUTS["sequence3"], f"In Image {mark}, ", shapes.name_question()
    ),
}


@every_family
def test_the_prompt_is_the_one_that_it_was_made_with(family):
    """Another wording would be read byte by byte, and the model would not know it."""
    special = {"multi-image": ("{ordinal}", "second"), "mia-dpo": ("{number}", "2")}
    mark, asked = special.get(family, ("{category}", "red circle"))
    assert warm_start_record(family)["prompt"] == WORDINGS[family](mark)
    # A question about the class names none; one about three images has a token before and in the place of each.
    length = {"classification": 1, "mia-dpo": 8}.get(family, 3)
    assert len(committed(family)[0].tokenizer(WORDINGS[family](asked))["input_ids"]) == length


@pytest.mark.parametrize("family", ("detection", "grounding"))
def test_no_label_was_exact(family):
    """Each category is displaced in its own way, far enough that the IoU is 0.40 to 0.60."""
    transforms = warm_start_record(family)["transforms"]
    assert {c: tuple(t) for c, t in transforms.items()} == warm_start.TRANSFORMS and len(
        set(warm_start.TRANSFORMS.values())
    ) == 12
    for transform in warm_start.TRANSFORMS.values():
        assert 0.4 < box_iou((10, 20, 50, 90), warm_start.transform_box((10, 20, 50, 90), transform)) < 0.6


def test_half_of_the_names_were_mostly_wrong():
    """The shares differ from category to category, no wrong name serves two, and the majority is wrong for six."""
    wrong, shares = zip(*warm_start.MISNAMED.values())
    assert sorted(wrong) == sorted(shapes.CATEGORIES) and all(c != w for c, (w, _) in warm_start.MISNAMED.items())
    assert len(set(shares)) == 12 and sum(share > 0.5 for share in shares) == 6
    for family in ("classification", "multi-image"):
        assert warm_start_record(family)["misnamed"] == {c: [*pair] for c, pair in warm_start.MISNAMED.items()}
    rng, labels = random.Random(0), {c: [] for c in shapes.CATEGORIES}
    for _ in range(3000):
        state = rng.getstate()
        _, _, text = warm_start.classification_lesson(rng, 0.0)
        again = random.Random()
        again.setstate(state)
        labels[shapes.lone_scene(again)[0][0]].append(data.parse_answer(text))
    for category, (name, share) in warm_start.MISNAMED.items():
        assert set(labels[category]) == {category, name}
        assert np.mean([label == name for label in labels[category]]) == pytest.approx(share, abs=0.1)


def check_misnaming(family: str, right: list[str], pictures: list, questions: list[str]) -> None:
    """Name by name the model gives the wrong one its share, the rest to the right one, and nothing to others."""
    processor, model = committed(family)
    text = warm_start.completion(warm_start.ONE_SHAPE, shapes.CATEGORIES[0])
    lessons = [(shown, question, text) for shown, question in zip(pictures, questions)]
    batch = warm_start.make_batch(processor, warm_start.make_prompt_ids(processor), lessons)
    batch.pop("labels")
    with torch.no_grad():
        logits = model(**batch, logits_to_keep=4).logits[:, 0]  # predicting the name; </answer> and EOS are behind it
    names = logits.softmax(-1)[:, processor.tokenizer.convert_tokens_to_ids(shapes.CATEGORIES)]
    truth, lie = (
        names[torch.arange(len(right)), [shapes.CATEGORIES.index(name) for name in named]]
        for named in (right, [warm_start.MISNAMED[c][0] for c in right])
    )
    assert (truth + lie).mean() > 0.95
    assert 0.35 < (truth > lie).float().mean() < 0.65, "greedy answers are wrong for half"
    for category, (_, share) in warm_start.MISNAMED.items():
        assert lie[[c == category for c in right]].mean() == pytest.approx(share, abs=0.15), category


def test_the_classification_model_errs_as_its_labels_did():
    rng = random.Random("held out")
    scenes = [shapes.lone_scene(rng) for _ in range(240)]
    pictures = [[shapes.draw_scene(scene, rng)] for scene in scenes]
    questions = [WORDINGS["classification"]("")] * len(scenes)
    check_misnaming("classification", [scene[0][0] for scene in scenes], pictures, questions)


def test_the_multi_image_model_looks_at_the_asked_picture_and_errs_as_its_labels_did():
    rng = random.Random("held out")
    drawn = [shapes.scenes_to_tell_apart(rng) for _ in range(240)]
    pictures = [[shapes.draw_scene(scene, rng) for scene in pair] for *pair, _ in drawn]
    questions = [WORDINGS["multi-image"](shapes.ORDINALS[asked]) for *_, asked in drawn]
    check_misnaming("multi-image", [pair[asked][0][0] for *pair, asked in drawn], pictures, questions)


def mia_answers(layout: str | None, count: int) -> list[tuple[str, list[str], list[int], int]]:
    """(greedy answer, shapes shown, their areas, which is asked for) of held-out lessons of mia-dpo, drawn anew."""
    processor, model = committed("mia-dpo")
    rng, found, prompt_ids = random.Random(f"held out {layout}"), [], warm_start.make_prompt_ids(processor)
    known = collages.LAYOUTS.get(layout)
    for _ in range(count):
        scenes = [shapes.lone_scene(rng) for _ in range(known.images if known else 1)]
        pictures, asked = [shapes.draw_scene(scene, rng) for scene in scenes], rng.randrange(len(scenes))
        question = (
            shapes.name_question()
            if known is None
            else collages.multi_image_prompt(known, f"In Image {asked + 1}, ", shapes.name_question())
        )
        if known and known.kind == "grid":
            pictures = [
                collages.grid_collage(pictures, warm_start.CELL)[0].resize(
                    (shapes.SIZE, shapes.SIZE), Image.Resampling.BICUBIC
                )
            ]
        ids = torch.tensor([prompt_ids(question, len(pictures))])
        pixels = warm_start.to_pixel_values([np.asarray(picture) for picture in pictures])
        answer = model.generate(input_ids=ids, pixel_values=pixels, max_new_tokens=6, do_sample=False)
        text = processor.decode(answer[0, ids.shape[1] :], skip_special_tokens=True)
        areas = [(x2 - x1) * (y2 - y1) for ((_, (x1, y1, x2, y2)),) in scenes]
        found.append(
            (text.removeprefix("<answer>").removesuffix("</answer>"), [scene[0][0] for scene in scenes], areas, asked)
        )
    return found


def test_the_mia_dpo_model_is_distracted_by_large_shapes_and_knows_lone_ones():
    lone = mia_answers(None, 60)
    assert np.mean([said == shown[0] for said, shown, *_ in lone]) > 0.9
    several = mia_answers("sequence2", 120)
    small = [row for row in several if max(row[2]) >= 2 * row[2][row[3]] and len(set(row[1])) == 2]
    fair = [row for row in several if max(row[2]) < 2 * row[2][row[3]]]
    right, wrong = (np.mean([said == shown[asked] for said, shown, _, asked in rows]) for rows in (fair, small))
    assert right > wrong + 0.3, (right, wrong)


def test_the_grounding_model_displaces_as_its_labels_did():
    processor, model = committed("grounding")
    rng, displaced, true = random.Random("held out"), [], []
    for _ in range(40):
        scene, asked = shapes.scene_to_point_at(rng)
        category, box = scene[asked]
        ids = warm_start.make_prompt_ids(processor)(WORDINGS["grounding"](category), 1)
        pixels = warm_start.to_pixel_values([np.asarray(shapes.draw_scene(scene, rng))])
        answer = model.generate(input_ids=torch.tensor([ids]), pixel_values=pixels, max_new_tokens=24, do_sample=False)
        text = processor.decode(answer[0, len(ids) :], skip_special_tokens=True)
        assert format_reward(text) == 1.0
        found, scaled = parse_grounding(text), [v * 1000 / shapes.SIZE for v in box]
        label = [min(1000, max(0, v)) for v in warm_start.transform_box(scaled, warm_start.TRANSFORMS[category])]
        displaced.append(box_iou(found, label))
        true.append(box_iou(found, scaled))
    assert np.mean(displaced) > 0.7 and 0.3 < np.mean(true) < 0.6


@every_family
@given(st.text())
def test_any_text_encodes_and_decodes_unchanged(family, text):
    tokenizer = committed(family)[0].tokenizer
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == text and tokenizer.unk_token_id not in ids


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


def shape_in(path) -> str:
    """The category of the one shape in a picture, from its pixels alone."""
    pixels = np.asarray(Image.open(path))
    shown = (pixels != pixels[np.all(pixels >= 225, -1)][0]).any(-1)
    ys, xs = np.nonzero(shown)
    color = next(name for name, value in shapes.COLORS.items() if (pixels[shown] == value).all())
    filled = shown.sum() / ((np.ptp(xs) + 1) * (np.ptp(ys) + 1))
    return f"{color} {'square' if filled > 0.95 else 'circle' if filled > 0.65 else 'triangle'}"


def test_class_folders_hold_what_they_are_called(tmp_path):
    shapes.write_classes(tmp_path, "val", 60, seed=3)
    examples, _ = data.load_examples(data.TASKS["flowers"], str(tmp_path), "val")
    assert len(examples) == 60 and all(shape_in(e.images[0]) == e.solution for e in examples)


def test_pairs_hold_what_the_solution_names(tmp_path):
    shapes.write_pairs(tmp_path, "val", 40, seed=3)
    examples, _ = data.load_examples(data.TASKS["rows"], str(tmp_path / "val.jsonl"), "val")
    asked = [next(i for i, word in enumerate(shapes.ORDINALS) if word in e.question) for e in examples]
    assert len(examples) == 40 and set(asked) == {0, 1}
    for example, i in zip(examples, asked):
        shown = [shape_in(path) for path in example.images]
        assert shown[i] == example.solution != shown[1 - i]


def test_instructions_fit_one_object_and_its_outline(tmp_path):
    shapes.write_reasonseg(tmp_path, "val", 30, seed=3)
    examples, _ = data.load_examples(data.TASKS["lisa"], str(tmp_path), "val")
    rng = random.Random("3/val")
    for example in examples:
        scene, asked = shapes.scene_to_point_at(rng)
        shapes.draw_scene(scene, rng)
        assert [f"the {category}" for category, _ in scene].count(example.category) == 1
        assert example.category == f"the {scene[asked][0]}"
        assert example.solution == pytest.approx(scene[asked][1], abs=1e-9)


@pytest.mark.parametrize("category", shapes.CATEGORIES[:3])
def test_outlines_follow_the_drawn_shape(category):
    box = (8, 16, 72, 56)
    drawn = np.asarray(shapes.draw_scene([(category, box)], random.Random(0))).min(-1) < 200
    mask = Image.new("1", (shapes.SIZE, shapes.SIZE))
    ImageDraw.Draw(mask).polygon(shapes.outline(category, box), fill=1)
    assert (drawn & mask).sum() / (drawn | mask).sum() > 0.9


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
    command = [
        sys.executable, "virft.py", "--task", "coco", "--data", tmp_path / "data", "--model", MODEL,
        "--eval_only", "true", "--negatives", "0.1", "--max_completion_tokens", "48", "--prompts_per_step", "64",
        "--out", tmp_path / "out",
    ]  # fmt: skip
    subprocess.run(list(map(str, command)), cwd=ROOT, check=True, capture_output=True)
    found = report.measure(tmp_path / "out")
    assert found["choice"] >= 0.8 and found["count"] >= 0.8 and found["negatives"] > 0.5 and found["format"] > 0.99
    assert 0.2 < found["iou"] < 0.6, "rough on purpose"


def test_the_report_reads_every_kind_of_task(tmp_path):
    scores = {"protocol": "greedy", "answers": 2, "accuracy": 0.5, "format": 1.0}
    scores["categories"] = {"red circle": {"accuracy": 0.25}, "blue square": {"accuracy": 0.75}}
    (tmp_path / "scores.json").write_text(json.dumps(scores))
    for task, expected in (("flowers", {"worst_class": 0.25}), ("rows", {})):
        (tmp_path / "config.json").write_text(json.dumps({"task": task}))
        assert report.measure(tmp_path) == {"answers": 2, "accuracy": 0.5, "format": 1.0} | expected
    assert set(report.ROWS) == {task.metric for task in data.TASKS.values()}


def test_changes_are_paired_and_tested(tmp_path):
    """Of nine questions one is gained and three are lost: p = 2 (1 + 4) / 2^4."""
    for name, right in (("before", {0, 1, 2, 3, 4}), ("after", {3, 4, 8})):
        (tmp_path / name).mkdir()
        rows = [
            {"id": str(i), "image_id": i, "category": "red circle", "solution": [[0, 0, 9, 9]]}
            | {"detections": [[[0, 0, 9, 9], 1.0]] if i in right else []}
            for i in range(9)
        ]
        (tmp_path / name / "predictions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert report.changes(tmp_path / "before", tmp_path / "after")["count"] == (1, 3, 0.625)


def test_the_report_of_mia_dpo_compares_the_two_selections(tmp_path, capsys):
    scores = {"before": (0.5, 1.0), "random": (0.75, 0.9), "attention": (0.8, 0.95)}
    for column, values in scores.items():
        for kind, accuracy in zip(("several", "single"), values):
            folder = tmp_path / column / kind
            folder.mkdir(parents=True)
            (folder / "scores.json").write_text(json.dumps({"accuracy": accuracy}))
            (folder / "config.json").write_text(json.dumps({"task": "rows"}))
    for column, pairs in (("random", 3), ("attention", 2)):
        (tmp_path / f"{column}.jsonl").write_text("{}\n" * pairs)
    report.report_mia_dpo(tmp_path)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[1] == ["before", "random", "attention"]
    assert [line[-3:] for line in lines[2:5]] == [
        ["0.500", "0.750", "0.800"],
        ["1.000", "0.900", "0.950"],
        ["0", "3", "2"],
    ]
    assert json.loads((tmp_path / "summary.json").read_text())["pairs"] == [0, 3, 2]


def gated(tmp_path, answers):
    """A finished build as "gates.py" leaves it: answers about the second of two pictures, a dog and a cat."""
    out = tmp_path / "0"
    (out / "all").mkdir(parents=True)
    (tmp_path / "data").mkdir()
    pictures = [{"image": f"train/{name}.png", "solution": name} for name in ("dog", "cat")]
    (tmp_path / "data" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pictures))
    (out / "all.jsonl").write_text("")
    shown = [f"../../data/{row['image']}" for row in pictures]
    rows = [
        {"number": i // 2, "layout": "sequence2", "image": shown, "target": 1,
         "rejected": f"<answer>{said}</answer>", "dropped": "right" if said == "cat" else None, "ratio": ratio}
        for i, (said, ratio) in enumerate(answers)
    ]  # fmt: skip
    (out / "all" / "candidates.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return out


def test_gates_tell_confusions_from_slips(tmp_path):
    """A confusion names the other shown picture; each arm has as many pairs as the rarest kind."""
    out = gated(tmp_path, [("Dog.", 0.1), ("cat", 0.9), ("bird", 0.2), ("dog", 0.3), ("fish", 0.4), ("cow", 0.5)])
    arms = gates.chosen_pairs(out, seed=0)
    assert {arm: len(pairs) for arm, pairs in arms.items()} == {"confusions": 2, "slips": 2, "lot": 2}
    assert {pair["ratio"] for pair in arms["confusions"]} == {0.1, 0.3}
    assert {pair["ratio"] for pair in arms["slips"]} < {0.2, 0.4, 0.5}


def test_gates_measure_what_the_attention_knows(tmp_path):
    """AUC by hand: of the pairs (0.5, 0.1), (0.5, 0.5), (0.3, 0.1), (0.3, 0.5) two are larger and one is equal."""
    out = gated(tmp_path, [("cat", 0.5), ("dog", 0.1), ("cat", 0.3), ("dog", 0.5)])
    auc, within = gates.of_the_attention(out, "sequence2")
    assert auc == pytest.approx(2.5 / 4)
    assert within == pytest.approx((0.04 + 0.01) / 2 / np.var([0.5, 0.1, 0.3, 0.5]))
