"""Scores: perfect answers score 1, known flaws lose what they must, files have COCO's format."""

import json
import os
import random
import re
import sys
import types
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import data
from conftest import shared
from data import TASKS, DataError, Example
from extras import check, checkpoints, evaluate
from rewards import REWARDS, answer_shares

COCO = TASKS["coco"]


def record(example: Example, text: str, target=(1000, 1000), task=COCO) -> dict:
    """With the task's own rewards."""
    solution = data.model_solution(example, target)
    rewards = {name: REWARDS[name](text, solution) for name in task.rewards}
    return evaluate.record(task, example, target, text, rewards)


def exact_answer(example: Example, target=(1000, 1000), task=COCO) -> str:
    return data.model_answer(task, example, target, digits=9)


def ap(*records: dict) -> dict:
    return evaluate.detection_scores(records)[0]


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


def test_ap_of_known_flaws():
    """Against AP by hand: with recall sampled at 101 points, one of two boxes found is AP 51/101."""
    one = example(1, (10, 10, 60, 60), (100, 20, 180, 90))
    half = replace(one, solution=one.solution[:1])
    assert ap(record(one, exact_answer(half)))["AP50"] == pytest.approx(51 / 101)
    nothing = ap(record(one, "<answer>No Objects</answer>"))
    assert nothing == {"AP": 0.0, "AP50": 0.0, "AP75": 0.0}
    assert ap(record(one, "two dogs"))["AP"] == 0.0
    assert ap(record(example(2), "<answer>No Objects</answer>"))["AP"] == 0.0, "no target anywhere"


def test_ap_is_what_pycocotools_prints(capsys):
    """Our reading of its precisions against its own summary, on answers of every quality."""
    from pycocotools.cocoeval import COCOeval

    rng, seen = random.Random(0), []
    summarize = COCOeval.accumulate
    records = []
    for index in range(30):
        boxes = [(x, 10, x + 30, 60) for x in (0, 50, 100)[: rng.randrange(4)]]
        e = example(index, *boxes, category=rng.choice(("dog", "cat")))
        moved = [tuple(v + rng.gauss(0, 12) for v in box) for box in data.model_solution(e, (1000, 1000))]
        moved += [(600, 600, 900, 900)] * (index % 3 == 0)
        text = data.detection_answer(moved, [rng.random() for _ in moved], digits=3)
        records.append(record(e, f"<answer>{text}</answer>"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(COCOeval, "accumulate", lambda self: (summarize(self), self.summarize(), seen.append(self.stats)))
        overall, each = evaluate.detection_scores(records)
    assert 0.05 < overall["AP"] < 0.95
    assert [overall[name] for name in ("AP", "AP50", "AP75")] == pytest.approx(seen[0][:3].tolist())
    for name in ("dog", "cat"):  # a category's AP is the AP of its records alone
        assert each[name] == pytest.approx(ap(*(r for r in records if r["category"] == name)))
    assert overall["AP"] == pytest.approx((each["dog"]["AP"] + each["cat"]["AP"]) / 2)


def test_confidence_orders_detections():
    """A wrong box above the right one halves the precision; below it, it costs nothing."""
    for wrong, expected in ((0.9, 0.5), (0.1, 1.0)):
        text = data.detection_answer([(50, 100, 300, 600), (700, 700, 900, 900)], [0.5, wrong], digits=3)
        assert ap(record(example(1, (10, 10, 60, 60)), f"<answer>{text}</answer>"))["AP50"] == pytest.approx(expected)


def test_a_detection_in_a_crowd_is_not_an_error():
    """[25] The crowd region is neither a target nor background."""
    crowded = example(1, (10, 10, 60, 60), crowds=((100, 0, 200, 100),))
    text = (
        f"<answer>{data.detection_answer([(50, 100, 300, 600), (600, 100, 800, 900)], [0.5, 0.9], digits=3)}</answer>"
    )
    assert ap(record(crowded, text))["AP50"] == pytest.approx(1.0)
    assert ap(record(example(1, (10, 10, 60, 60)), text))["AP50"] == pytest.approx(0.5)


def test_a_huge_wrong_box_counts_and_ids_may_be_of_two_kinds():
    right = exact_answer(example(1, (10, 10, 60, 60))).replace("1}", "0.5}")
    huge = right.replace("[{", "[{'Position': [-10000000, -10000000, 20000000, 20000000], 'Confidence': 0.9}, {")
    one = record(example(1, (10, 10, 60, 60)), huge)
    assert len(one["detections"]) == 2 and ap(one)["AP50"] == pytest.approx(0.5)
    assert ap(record(example(1, (10, 10, 60, 60)), right), record(example("b", (1, 1, 9, 9)), "no"))["AP50"] < 0.6


def test_ap_does_not_depend_on_the_order_of_the_records():
    answers = [
        record(example(i, (10, 10, 60, 60)), exact_answer(example(i, (10, 10, 60, 60 + 40 * (i % 2)))))
        for i in (3, 1, 2, 10)
    ]
    assert 0 < ap(*answers)["AP"] < 1 and ap(*answers) == ap(*answers[::-1]) == ap(*sorted(answers, key=str))


def test_a_reward_with_the_name_of_a_score_keeps_its_own():
    records = [record(example(1, (10, 10, 60, 60)), "no")]
    records[0]["rewards"] |= {"parsed": 0.25, "answers": 0.5, "mine": 0.75}
    overall, _ = evaluate.scores(records, COCO)
    assert (overall["parsed"], overall["reward/parsed"]) == (0.0, 0.25)
    assert (overall["reward/answers"], overall["mine"]) == (0.5, 0.75) and "answers" not in overall


def test_boxes_at_absent_categories_lower_ap():
    box = f"<answer>{data.detection_answer([(50, 100, 300, 600)], [0.9])}</answer>"
    shown, absent = example(1, (10, 10, 60, 60)), example(2)
    right = record(shown, exact_answer(shown).replace("1}", "0.5}"))
    assert ap(right, record(absent, "<answer>No Objects</answer>"))["AP50"] == pytest.approx(1.0)
    assert ap(right, record(absent, box))["AP50"] == pytest.approx(0.5)


def test_boxes_where_nobody_looked_are_ignored():
    """LVIS's rule: a box that matches nothing is an error only where all there is was annotated."""
    text = (
        f"<answer>{data.detection_answer([(50, 100, 300, 600), (600, 100, 800, 900)], [0.5, 0.9], digits=3)}</answer>"
    )
    shown = example(1, (10, 10, 60, 60))
    assert ap(record(shown, text))["AP50"] == pytest.approx(0.5)
    assert ap(record(replace(shown, exhaustive=False), text))["AP50"] == pytest.approx(1.0)
    right, elsewhere = record(shown, exact_answer(shown).replace("1}", "0.5}")), example(2)
    assert ap(right, record(elsewhere, text))["AP50"] == pytest.approx(0.5), "verified to be absent"
    assert ap(right, record(replace(elsewhere, exhaustive=False), text))["AP50"] == pytest.approx(1.0)


@shared("lvis_val_100")
def test_federated_ap_is_that_of_the_lvis_package(real_lvis, tmp_path, monkeypatch):
    """Random boxes about the real annotations of 100 images, in verified pairs and others.

    Needs `pip install --no-deps lvis`.
    """
    monkeypatch.setitem(sys.modules, "cv2", types.ModuleType("cv2"))  # the package imports it to draw
    lvis = pytest.importorskip("lvis", reason="the package lvis is not installed: pip install --no-deps lvis")
    monkeypatch.setattr(np, "float", float, raising=False)  # gone since NumPy 1.24, and the package still asks for it
    examples, _ = data.load_examples(TASKS["lvis"], str(tmp_path), "val", eval_categories="all")
    rng = random.Random(0)
    asked = [e for e in examples if e.solution or e.exhaustive or rng.random() < 0.02]
    kinds = Counter((bool(e.solution), e.exhaustive) for e in asked)
    assert min(kinds[kind] for kind in ((True, True), (True, False), (False, True), (False, False))) > 10
    records = []
    for e in asked:
        width, height = e.size
        boxes = [tuple(v + rng.uniform(-4, 4) for v in box) for box in e.solution if rng.random() < 0.8]
        for _ in range(rng.randrange(3)):
            x, y = rng.uniform(0, width / 2), rng.uniform(0, height / 2)
            boxes.append((x, y, x + rng.uniform(9, width / 2), y + rng.uniform(9, height / 2)))
        r = record(e, "<answer>No Objects</answer>", task=TASKS["lvis"])
        r["detections"] = [(box, rng.random()) for box in boxes if box[2] > box[0] and box[3] > box[1]]
        records.append(r)
    theirs = lvis.LVISEval(lvis.LVIS(str(tmp_path / "lvis_v0.5_val.json")), evaluate.coco_results(records), "bbox")
    theirs.evaluate()
    theirs.accumulate()
    precision = theirs.eval["precision"][:, :, :, 0]
    overall, _ = evaluate.detection_scores(records)
    assert 0.02 < overall["AP"] < 0.98
    assert overall["AP"] == pytest.approx(precision[precision > -1].mean())
    assert overall["AP50"] == pytest.approx(precision[0][precision[0] > -1].mean())


def flower(solution, text, index=0) -> dict:
    name = data.class_of(solution)
    return record(Example(str(index), (Path("x"),), None, solution, name), text, task=TASKS["flowers"])


def test_classification_by_both_rules():
    """The published substring rule pays what ours does not; per class by the first of the accepted names."""
    records = [
        flower("tiger lily", "<think>a</think><answer>Tiger_Lily.</answer>"),
        flower("tiger lily", "<think>a</think><answer>lily</answer>"),
        flower("tiger lily", "lily"),
        flower(("rose", "dog rose"), "<think>a</think><answer>dog rose</answer>"),
    ]
    overall, each = evaluate.scores(records, TASKS["flowers"])
    assert overall["accuracy"] == 0.5 and overall["published_accuracy"] == 1.0 and overall["parsed"] == 0.75
    assert each["tiger lily"] == {
        "accuracy": pytest.approx(1 / 3), "published_accuracy": 1.0, "parsed": pytest.approx(2 / 3), "answers": 3,
    }  # fmt: skip
    assert each["rose"]["accuracy"] == 1.0 and [r["name"] for r in records] == ["Tiger_Lily.", "lily", None, "dog rose"]


def test_grounding_iou():
    """Three answers by hand, in an image of 200 x 100: exact, half as wide, not parsed; then a wild one."""
    e = Example("a", (Path("x"),), (200, 100), (0.0, 0.0, 100.0, 50.0), "the left one")

    def answered(text):
        return record(e, f"<think>a</think><answer>{text}</answer>", task=TASKS["lisa"])

    records = [answered("(0,0),(500,500)"), answered("(0,0),(250,500)"), answered("left")]
    overall, each = evaluate.scores(records, TASKS["lisa"])
    assert each == {} and overall["parsed"] == pytest.approx(2 / 3) and records[1]["box"] == (0, 0, 50, 50)
    assert overall["mean_iou"] == pytest.approx((1 + 0.5 + 0) / 3)
    assert overall["cumulative_iou"] == pytest.approx((5000 + 2500 + 0) / (5000 + 5000 + 5000))
    assert overall["iou_above_0.5"] == pytest.approx(1 / 3), "0.5 is not above it"
    wild, _ = evaluate.scores([*records, answered("(-1e300,0),(1e300,1000)")], TASKS["lisa"])
    assert wild["cumulative_iou"] == pytest.approx((5000 + 2500 + 0 + 5000) / (5000 * 3 + 20000))


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_the_protocol_stands_beside_every_score(task):
    for asked in evaluate.ASKED:
        stated = evaluate.protocol_of(task, asked)
        assert ("--eval_categories" in stated) == (task.asks_for == "categories") and task.caveat in stated
        assert f"--eval_categories {asked}" in stated or task.asks_for != "categories"
    overall = {"accuracy": 0.5, "parsed": 0.25}
    each = {f"class {i}": {"accuracy": 0.125, "parsed": 0.5, "answers": 2} for i in range(30)}
    text = evaluate.report(overall, each, 60, stated)
    assert stated in text and "60 answers, 25.0% of them parsed" in text and "accuracy 0.5000" in text
    assert "class 19" in text and "class 20" not in text and "10 categories more, in scores.json" in text
    assert re.search(r"class 0 +accuracy 0.1250   parsed 0.5000   answers 2", text)
    assert "federated" in evaluate.protocol_of(TASKS["lvis"], "gt")


def test_shares():
    texts = [
        "<think>a dog</think><answer>No Objects</answer>",
        "<think>...</think><answer>[]</answer>",
        "no",
        "<think></think><answer>x</answer>",
    ]
    assert answer_shares(texts, COCO.parse) == {"parsed": 0.5, "no_objects": 0.5, "empty_think": 0.5}


def test_files(tmp_path):
    for e in ONE:
        Image.new("RGB", e.size, "white").save(tmp_path / f"{e.image_id}.png")
    examples = [Example(**{**e.__dict__, "images": (tmp_path / f"{e.image_id}.png",)}) for e in ONE]
    records = [{"row": row} | record(e, exact_answer(e)) for row, e in enumerate(examples)]
    evaluate.write_evaluation(tmp_path / "out", COCO, "as asked", records, *evaluate.scores(records, COCO), examples)
    results = json.loads((tmp_path / "out" / "detections.json").read_text())
    assert {frozenset(r) for r in results} == {frozenset({"image_id", "category_id", "bbox", "score"})} and len(
        results
    ) == 4
    assert results[0]["bbox"] == pytest.approx([10, 10, 50, 50]) and results[-1]["category_id"] == 9
    scores = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert scores["AP"] == pytest.approx(1.0) and scores["protocol"] == "as asked" and scores["answers"] == 3
    assert scores["categories"]["dog"]["answers"] == 2 and scores["categories"]["cat"]["parsed"] == 1.0
    assert len((tmp_path / "out" / "predictions.jsonl").read_text().splitlines()) == 3
    assert len(list((tmp_path / "out" / "thumbnails").glob("*.jpg"))) == 3
    assert (tmp_path / "out" / "report.html").exists()


def test_nothing_to_evaluate_is_an_error():
    with pytest.raises(data.DataError, match="no image could be opened"):
        evaluate.scores([], COCO)


# ------------------------------------------------------------------------------------------------
# Interrupted evaluations.


@pytest.fixture
def interrupted(tmp_path):
    """A folder with the answers to rows 0 to 4 of 6 in a file and two shards, one of them ending in half a line."""
    examples = [example(i, (10, 10, 60, 60)) for i in range(6)]
    records = [{"row": i} | record(e, exact_answer(e)) for i, e in enumerate(examples)]
    data.append_rows(tmp_path / "predictions.jsonl", records[:2])
    evaluate.append_own(tmp_path, "predictions", 0, records[2:4])
    evaluate.append_own(tmp_path, "predictions", 1, [records[4]])
    with (tmp_path / "predictions.1.jsonl").open("a") as half:
        half.write(json.dumps(records[5])[:100])
    return tmp_path, examples, records


def test_answers_of_all_processes_are_recovered(interrupted):
    out, examples, records = interrupted
    found = evaluate.recover(out, examples)
    assert [r["row"] for r in found] == [0, 1, 2, 3, 4] and found == json.loads(json.dumps(records[:5]))
    assert [p.name for p in out.glob("predictions*")] == ["predictions.jsonl"]
    assert evaluate.recover(out, examples) == found, "and again from the one file"
    assert evaluate.scores(found, COCO)[0]["AP"] == pytest.approx(1.0), "as good as fresh ones"


def test_answers_to_other_questions_are_not(interrupted):
    out, examples, _ = interrupted
    other = [*examples[:3], example(3, (10, 10, 61, 60)), *examples[4:]]
    for changed in (other, examples[:4]):
        with pytest.raises(DataError, match="answer other questions, the data changed; another --out starts over"):
            evaluate.recover(out, changed)


def test_a_broken_line_in_the_middle_is_named(interrupted):
    out, examples, _ = interrupted
    evaluate.append_own(out, "predictions", 1, [{"row": 5}])
    with pytest.raises(DataError, match=r"predictions\.1\.jsonl: a line in the middle is not JSON"):
        evaluate.recover(out, examples)


def test_only_the_same_settings_and_model_go_on(tmp_path):
    model, out = tmp_path / "model", tmp_path / "out"
    for folder in (model, out):
        folder.mkdir()
    mine = tmp_path / "mine.py"
    for file in (mine, model / "weights"):
        file.write_text("1")
        os.utime(file, (1, 1))
    settings = {"model": str(model), "eval_only": True, "max_pixels": 100, "workers": 2, "rewards": [f"{mine}:f=1"]}
    assert not evaluate.unfinished(out, settings), "nothing there"
    (out / "config.json").write_text(json.dumps(settings))
    (out / evaluate.USED).write_text(json.dumps(checkpoints.used_files(str(model), settings["rewards"])))
    assert evaluate.unfinished(out, settings)
    assert evaluate.unfinished(out, settings | {"workers": 0, "prompts_per_step": 3})
    for change in ({"max_pixels": 200}, {"rewards": []}, {"eval_only": False}, {"model": "another"}):
        assert not evaluate.unfinished(out, settings | change), change
    (out / "config.json").write_text(json.dumps(settings | {"eval_only": False}))
    assert not evaluate.unfinished(out, settings | {"eval_only": False}), "a training is not an evaluation"
    (out / "config.json").write_text(json.dumps(settings))
    for file in (mine, model / "weights"):
        os.utime(file, (2**33, 2**33))
        assert not evaluate.unfinished(out, settings), "a model trained since is another model, and so with a reward"
        os.utime(file, (1, 1))
    assert evaluate.unfinished(out, settings)
    (out / "scores.json").write_text("{}")
    assert not evaluate.unfinished(out, settings), "it is finished"


def test_every_doubt_can_be_raised_and_none_without_reason():
    good = {
        "parsed": 1.0, "truncated": 0.0, "empty_think": 0.0, "no_objects": 0.1, "true_no_objects": 0.1,
        "zero_variance_groups": 0.2, "iou as relative": 0.5, "iou as pixels": 0.1,
    }  # fmt: skip
    assert check.doubts(good, "relative") == []
    for change, says in (
        ({"parsed": 0.4}, "do not parse"), ({"truncated": 0.3}, "--max_completion_tokens"),
        ({"empty_think": 1.0}, "--think false"), ({"no_objects": 0.5}, "collapse"),
        ({"zero_variance_groups": 0.9}, "--group_size"), ({"iou as pixels": 0.7}, "--coordinates pixels"),
        ({"iou as relative": 0.05, "iou as pixels": 0.05}, "neither"),
    ):  # fmt: skip
        (doubt,) = check.doubts(good | change, "relative")
        assert says in doubt
    assert "--coordinates relative" in check.doubts(good, "pixels")[0]
    (doubt,) = check.doubts(good | {"parsed": 0.0, "iou as relative": 0.0, "iou as pixels": 0.0}, "relative")
    assert "do not parse" in doubt, "boxes of answers without boxes are not doubted too"
    assert check.doubts({name: value for name, value in good.items() if "iou" not in name}, "relative") == []


def test_box_fit_tells_the_conventions_apart(monkeypatch):
    """A perfect answer in 0..1000 about a 200 x 100 picture seen as 200 x 100, and one half as wide in pixels."""
    (x1, y1, x2, y2), seen = (20.0, 10.0, 120.0, 60.0), types.SimpleNamespace(image_processor=None)
    monkeypatch.setattr(data, "seen_size", lambda images, size: size)
    encoder = data.Prompts(TASKS["coco"], [], seen, "relative")
    prompt = data.Prompt(example(0, (x1, y1, x2, y2)), {}, (1000, 1000), [], 0)

    def text(*box):
        return f"<think>a</think><answer>[{{'Position': {list(box)}, 'Confidence': 1}}]</answer>"

    relative, pixels = text(100, 100, 600, 600), text(20, 10, 70, 60)
    assert check.box_fit([prompt], [relative], encoder, "relative") == pytest.approx(1.0)
    assert check.box_fit([prompt], [relative], encoder, "pixels") == 0.0
    assert check.box_fit([prompt], [pixels, "no boxes"], encoder, "pixels") == pytest.approx(0.25)
