"""Scores: perfect answers score 1, known flaws lose what they must, files have COCO's format."""

import json
import random
from pathlib import Path

import pytest
from PIL import Image

import data
import evaluate
from conftest import SHARED, shared
from data import TASKS, Example
from rewards import REWARDS, box_iou

COCO = TASKS["coco"]
REWARD_FUNCTIONS = {name: REWARDS[name] for name in COCO.rewards}


def record(example: Example, text: str, target=(1000, 1000)) -> dict:
    solution = data.model_solution(example, target)
    return evaluate.record(
        example, target, text, {name: reward(text, solution) for name, reward in REWARD_FUNCTIONS.items()}
    )


def exact_answer(example: Example, target) -> str:
    return f"<think>a</think><answer>{data.detection_answer(data.model_solution(example, target), digits=9)}</answer>"


def example(index: int, *boxes, category: str = "dog", size=(200, 100), **fields) -> Example:
    return Example(
        f"{index}/{category}",
        (Path("x"),),
        size,
        boxes,
        category,
        image_id=index,
        category_id={"dog": 7, "cat": 9}[category],
        **fields,
    )


ONE = [
    example(1, (10, 10, 60, 60), (100, 20, 180, 90)),
    example(2, (0, 0, 200, 100)),
    example(2, (50, 50, 90, 90), category="cat"),
]


@shared("coco_mini")
@pytest.mark.parametrize("coordinates", ["relative", "pixels"])
def test_ground_truth_as_answers_scores_one_on_real_coco(coordinates):
    """Unrounded: AP 1 and every reward 1. Rounded: at least what the rounding can cost, box by box."""
    fit = data.Fit(28, 3136, 401408)
    examples = data.read_coco(str(SHARED / "coco_mini"), "val")[0]
    targets = {e.id: data.model_size(coordinates, fit.size(*e.size)) for e in examples}
    exact = evaluate.scores([record(e, exact_answer(e, targets[e.id]), targets[e.id]) for e in examples], COCO)
    assert exact["AP"] == pytest.approx(1.0) and exact["iou"] == pytest.approx(1.0) and exact["parsed"] == 1.0
    rounded = evaluate.scores(
        [
            record(
                e, f"<think>a</think><answer>{data.model_answer(e, targets[e.id], False)[8:-9]}</answer>", targets[e.id]
            )
            for e in examples
        ],
        COCO,
    )
    ious = [
        box_iou(box, data.to_pixels(data.round_box(data.to_model(box, e.size, targets[e.id])), e.size, targets[e.id]))
        for e in examples
        for box in e.solution
    ]
    kept = sum(iou > 0.95 for iou in ious) / len(ious)
    assert (
        rounded["AP50"] >= sum(iou > 0.5 for iou in ious) / len(ious) - 0.02
        and rounded["AP"] > kept - 0.05
        and rounded["AP"] > 0.85
    )


def test_ap_of_known_flaws():
    """Against AP by hand: with recall sampled at 101 points, one of two boxes found is AP 51/101."""
    one = example(1, (10, 10, 60, 60), (100, 20, 180, 90))
    half = Example(**{**one.__dict__, "solution": one.solution[:1]})
    found = evaluate.coco_ap([evaluate.record(one, (1000, 1000), exact_answer(half, (1000, 1000)), {})])
    assert found["AP50"] == pytest.approx(51 / 101)
    nothing = evaluate.coco_ap([evaluate.record(one, (1000, 1000), "<answer>No Objects</answer>", {})])
    assert nothing == {"AP": 0.0, "AP50": 0.0, "AP75": 0.0}
    malformed = evaluate.coco_ap([evaluate.record(one, (1000, 1000), "two dogs", {})])
    assert malformed["AP"] == 0.0


def test_confidence_orders_detections():
    """A wrong box above the right one halves the precision; below it, it costs nothing."""
    for wrong, expected in ((0.9, 0.5), (0.1, 1.0)):
        text = data.detection_answer([(50, 100, 300, 600), (700, 700, 900, 900)], [0.5, wrong], digits=3)
        found = evaluate.coco_ap(
            [evaluate.record(example(1, (10, 10, 60, 60)), (1000, 1000), f"<answer>{text}</answer>", {})]
        )
        assert found["AP50"] == pytest.approx(expected)


def test_a_detection_in_a_crowd_is_not_an_error():
    """[25] The crowd region is neither a target nor background."""
    crowded = example(1, (10, 10, 60, 60), crowds=((100, 0, 200, 100),))
    text = data.detection_answer([(50, 100, 300, 600), (600, 100, 800, 900)], [0.5, 0.9], digits=3)
    found = evaluate.coco_ap([evaluate.record(crowded, (1000, 1000), f"<answer>{text}</answer>", {})])
    assert found["AP50"] == pytest.approx(1.0)
    open_field = evaluate.coco_ap(
        [evaluate.record(example(1, (10, 10, 60, 60)), (1000, 1000), f"<answer>{text}</answer>", {})]
    )
    assert open_field["AP50"] == pytest.approx(0.5)


def test_boxes_at_absent_categories_lower_ap():
    absent = example(2)
    box = "<answer>" + data.detection_answer([(50, 100, 300, 600)], [0.9]) + "</answer>"
    right = record(
        example(1, (10, 10, 60, 60)), exact_answer(example(1, (10, 10, 60, 60)), (1000, 1000)).replace("1}", "0.5}")
    )
    assert evaluate.coco_ap([right, record(absent, "<answer>No Objects</answer>")])["AP50"] == pytest.approx(1.0)
    assert evaluate.coco_ap([right, record(absent, box)])["AP50"] == pytest.approx(0.5)


def test_shares():
    texts = [
        "<think>a dog</think><answer>No Objects</answer>",
        "<think>...</think><answer>[]</answer>",
        "no",
        "<think></think><answer>x</answer>",
    ]
    assert evaluate.answer_shares(texts, COCO.parse) == {"parsed": 0.5, "no_objects": 0.5, "empty_think": 0.75}


def test_files(tmp_path):
    for e in ONE:
        Image.new("RGB", e.size, "white").save(tmp_path / f"{e.image_id}.png")
    examples = [Example(**{**e.__dict__, "images": (tmp_path / f"{e.image_id}.png",)}) for e in ONE]
    records = [{"row": row} | record(e, exact_answer(e, (1000, 1000))) for row, e in enumerate(examples)]
    evaluate.write_evaluation(tmp_path / "out", records, evaluate.scores(records, COCO), examples)
    results = json.loads((tmp_path / "out" / "detections.json").read_text())
    assert {frozenset(r) for r in results} == {frozenset({"image_id", "category_id", "bbox", "score"})} and len(
        results
    ) == 4
    assert results[0]["bbox"] == pytest.approx([10, 10, 50, 50]) and results[-1]["category_id"] == 9
    scores = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert scores["AP"] == pytest.approx(1.0) and "pairs asked" in scores["protocol"] and scores["answers"] == 3
    assert len((tmp_path / "out" / "predictions.jsonl").read_text().splitlines()) == 3
    assert len(list((tmp_path / "out" / "pictures").glob("*.png"))) == 3


def test_boxes_are_drawn_where_they_are(tmp_path):
    path = tmp_path / "drawn.png"
    answer = {"solution": [[10, 10, 60, 60]], "detections": [[[100, 20, 180, 90], 0.5]], "category": "dog"}
    evaluate.draw_boxes(Image.new("RGB", (200, 100), (0, 90, 0)), answer, path, least_side=100)
    with Image.open(path) as picture:
        assert picture.size == (200, 124)
        assert picture.getpixel((12, 24 + 40)) != (0, 90, 0) and picture.getpixel((101, 24 + 60)) == (255, 0, 255)
        assert picture.getpixel((80, 24 + 40)) == (0, 90, 0)


@pytest.mark.parametrize("far", [1e9, 1e30, -1e300])
def test_wild_numbers_are_drawn_at_the_edge(tmp_path, far):
    detections = [[[min(0.0, far), 0.0, max(1.0, far), 50.0], 0.5], [[far - 1, far - 1, far, far], 0.5]]
    answer = {"solution": [], "detections": detections, "category": "dog"}
    evaluate.draw_boxes(Image.new("RGB", (200, 100)), answer, tmp_path / "drawn.png")
    assert (tmp_path / "drawn.png").exists()


def test_nothing_to_evaluate_is_an_error():
    with pytest.raises(data.DataError, match="no image could be opened"):
        evaluate.scores([], COCO)


def test_curves_draw_whatever_was_logged(tmp_path):
    rng = random.Random(0)
    rows = [
        {"step": s, "reward": rng.random(), "reward_iou": s / 50, "kl": 0.1, "completion_tokens": 20}
        for s in range(1, 51)
    ]
    evaluate.append_rows(tmp_path / "metrics.jsonl", rows)
    evaluate.plot_curves(tmp_path / "metrics.jsonl", tmp_path / "curves.png")
    with Image.open(tmp_path / "curves.png") as picture:
        assert picture.width > 800
