"""What a person sees: boxes drawn where they are, outcomes named rightly, and a page that nothing can break out of."""

import http.server
import json
import re
import shutil
import subprocess
import sys
import threading
from html.parser import HTMLParser
from math import comb
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import data
from conftest import ROOT, SHARED, shared
from data import TASKS, Example, Prompt
from extras import draw, evaluate, outcomes, report
from rewards import REWARDS

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
GREEN, MAGENTA = (0, 128, 58), (214, 0, 109)
GROUND = (200, 200, 255)


def colors(picture: Image.Image) -> set:
    return {color for _, color in picture.getcolors(1 << 24)}


# ------------------------------------------------------------------------------------------------
# Pictures.


@pytest.mark.parametrize("size", [(200, 100), (64, 64), (4000, 3000), (30, 600), (1024, 448)])
def test_boxes_are_drawn_where_they_are_at_every_size(size):
    """A solid box and a dashed one; between the corners the picture stays as it was."""
    w, h = size
    answered = draw.Mark((0.6 * w, 0.2 * h, 0.9 * w, 0.8 * h), draw.ANSWERED, dashed=True)
    marks = [draw.Mark((0.1 * w, 0.1 * h, 0.45 * w, 0.9 * h)), answered]
    drawn = draw.draw_boxes(Image.new("RGB", size, GROUND), size, marks)
    assert draw.LONG_SIDE[0] <= max(drawn.size) <= draw.LONG_SIDE[1]
    assert drawn.width / drawn.height == pytest.approx(w / h, rel=0.06)
    at = np.asarray(drawn)

    def box_of(color) -> list[float]:
        y, x = np.nonzero((at == color).all(2))
        return [x.min() / drawn.width, y.min() / drawn.height, x.max() / drawn.width, y.max() / drawn.height]

    assert box_of(GREEN) == pytest.approx([0.1, 0.1, 0.45, 0.9], abs=2 / min(drawn.size))
    assert box_of(MAGENTA) == pytest.approx([0.6, 0.2, 0.9, 0.8], abs=2 / min(drawn.size))
    width = max(2, max(drawn.size) // 200)
    column = at[:, round(0.1 * drawn.width) + width // 2]
    dashed = at[:, round(0.6 * drawn.width) + width // 2]
    solid, gaps = (column == GREEN).all(1).sum() / drawn.height, (dashed == MAGENTA).all(1).sum() / drawn.height
    assert solid == pytest.approx(0.8, abs=0.02) and 0.2 < gaps < 0.5, "one in a piece, one with gaps"
    if drawn.width > 100:
        row = at[round(0.2 * drawn.height) + width // 2]
        assert 0.05 < (row == MAGENTA).all(1).sum() / drawn.width < 0.25, "and so the lines across"
    if drawn.width > 100:
        assert tuple(at[drawn.height // 2, round(0.3 * drawn.width)]) == GROUND


@pytest.mark.parametrize("far", [1e9, 1e30, -1e300])
def test_wild_numbers_are_drawn_at_the_edge(far):
    boxes = [(min(0.0, far), 0.0, max(1.0, far), 50.0), (far - 1, far - 1, far, far)]
    marks = [draw.Mark(box, label="IoU 0.00") for box in boxes]
    drawn = draw.draw_boxes(Image.new("RGB", (200, 100)), (200, 100), marks)
    assert GREEN in colors(drawn)


def test_labels_do_not_cover_each_other():
    """Twelve boxes at one place: twelve times as much white, up to the frames."""

    def white(*marks) -> int:
        drawn = draw.draw_boxes(Image.new("RGB", (400, 400), GROUND), (400, 400), marks)
        return (np.asarray(drawn) == 255).all(2).sum()

    mark = draw.Mark((50, 50, 60, 60), draw.BETTER, label="88")
    frame, one, twelve = white(mark._replace(label="")), white(mark), white(*[mark] * 12)
    assert twelve - frame > 11 * (one - frame) > 1000


def test_marks_say_how_well_a_box_fits():
    """IoU with the best true box; the confidence where no truth is known; nothing for names and numbers."""
    true = [(0, 0, 10, 10), (20, 0, 30, 10)]
    marks = draw.marks_of(true, "detection", [((20, 0, 30, 5), 0.9), ((50, 50, 60, 60), 0.1)])
    assert [(m.label, m.dashed) for m in marks] == [("", False), ("", False), ("IoU 0.50", True), ("IoU 0.00", True)]
    assert draw.marks_of((), "detection", [((0, 0, 1, 1), 0.25)])[0].label == "0.25"
    assert [m.label for m in draw.marks_of((0, 0, 10, 10), "grounding", (0, 0, 10, 10))] == ["", "IoU 1.00"]
    assert draw.marks_of((), "grounding", (0, 0, 10, 10))[0].label == ""
    assert draw.marks_of(true, "detection", None) == marks[:2] and draw.marks_of((), "grounding", None) == []
    assert draw.marks_of([10, 10, 60, 60], "rewards", "7") == [] == draw.marks_of("lily", "classification", "lily")


@pytest.mark.parametrize(
    "title", ["собака: 3 животных", "σκύλος", "x" * 300, "W" * 90, "a\nb", "", "a\x1db\u2029c\x85"]
)
def test_titles_are_whole(title):
    """No letter is the font's empty box, and long ones are broken into lines, of which the margin stays white."""
    picture = draw.titled(Image.new("RGB", (100, 50)), title, legend=False)
    margin = np.asarray(picture)[:-50, -3:]
    assert (margin == 255).all()
    font = draw.font(16)
    missing = font.getmask("\U0010ffff").getbbox(), bytes(font.getmask("\U0010ffff"))
    assert all((font.getmask(c).getbbox(), bytes(font.getmask(c))) != missing for c in set("".join(title.splitlines())))
    assert picture.height > 50 + 22 * len(title) / 36


def test_curves_keep_their_titles_and_short_runs_show():
    """Small numbers put no power of ten over a title; of one smoothed point nothing would be seen."""
    figure = draw.curves({"run": [{"step": s, "kl": 1e-5 * s} for s in (1, 2, 3)]}, ["kl"])
    (axis,) = figure.axes
    figure.canvas.draw()
    assert axis.yaxis.get_offset_text().get_text() == "" and axis.title.get_position()[1] == 1.0
    assert [line.get_alpha() for line in axis.lines] == [1.0, None] and all(t % 1 == 0 for t in axis.get_xticks())
    long = draw.curves({"run": [{"step": s, "kl": 1.0} for s in range(40)]}, ["kl"]).axes[0]
    assert [line.get_alpha() for line in long.lines] == [0.25, None]


@pytest.fixture
def two_pictures(tmp_path) -> Example:
    for name, color in (("red", (255, 0, 0)), ("blue", (0, 0, 255))):
        Image.new("RGB", (900, 600), color).save(tmp_path / f"{name}.png")
    return Example("e", (tmp_path / "red.png", tmp_path / "blue.png"), None, "blue", "which?")


def test_a_question_about_several_pictures_shows_all_of_them(two_pictures, tmp_path):
    prompt = Prompt(two_pictures, {}, (1, 1), "blue", 0)
    draw.draw_answer(TASKS["rows"], prompt, "<answer>blue</answer>", tmp_path / "new" / "a.png")
    with Image.open(tmp_path / "new" / "a.png") as picture:
        assert {(255, 0, 0), (0, 0, 255)} <= colors(picture) and max(picture.size) <= draw.LONG_SIDE[1]
    assert max(draw.thumbnail(two_pictures).size) <= 2 * 512


def test_answers_are_drawn_in_original_pixels(tmp_path):
    Image.new("RGB", (200, 100), GROUND).save(tmp_path / "a.png")
    example = Example("e", (tmp_path / "a.png",), (200, 100), ((10.0, 10.0, 60.0, 60.0),), "dog")
    text = "<answer>[{'Position': [500, 200, 900, 900], 'Confidence': 0.5}]</answer>"
    draw.draw_answer(TASKS["coco"], Prompt(example, {}, (1000, 1000), (), 0), text, tmp_path / "b.png")
    with Image.open(tmp_path / "b.png") as picture:
        y, x = np.nonzero((np.asarray(picture)[-224:] == MAGENTA).all(2))
    assert picture.size[0] == 448 and (x.min() / 448, x.max() / 448) == pytest.approx((0.5, 0.9), abs=0.01)


def test_curves_are_smoothed_by_means():
    assert draw.smoothed([1.0, 3.0]).tolist() == [2.0]
    means = draw.smoothed([float(i) for i in range(30)])
    assert len(means) == 11 and means[0] == pytest.approx(9.5) and means[-1] == pytest.approx(19.5)


def test_curves_draw_every_run_and_leave_out_what_was_not_logged():
    rows = [{"step": s, "reward": s / 50} for s in range(1, 51)]
    figure = draw.curves({"a": rows, "b": rows[:40] + [{"step": 41}], "c": []}, ["reward", "none"], columns=2)
    lines = [[list(line.get_xdata()) for line in axis.lines] for axis in figure.axes]
    assert [len(x) for x in lines[0]] == [50, 31, 40, 21] and lines[1] == []
    long = draw.curves({"a": [{"step": s, "reward": s} for s in range(1, 10_001)]}, ["reward"]).axes[0].lines
    assert all(len(line.get_xdata()) <= draw.POINTS and line.get_xdata()[-1] == 10_000 for line in long)
    assert lines[0][1][0] == 20 and "weighted sum" in figure.axes[0].get_title()


# ------------------------------------------------------------------------------------------------
# Outcomes.

# The box (10, 10, 60, 60) of a picture of 900 x 700 pixels, in thousandths, nearly.
FOUND = "<answer>[{'Position': [11, 14, 67, 86], 'Confidence': 1}]</answer>"


@pytest.mark.parametrize(
    "task, solution, answer, expected",
    [
        ("coco", ((0, 0, 10, 10),), "[{'Position': [0, 0, 10, 10], 'Confidence': 1}]", "found"),
        ("coco", ((0, 0, 10, 10),), "[{'Position': [0, 0, 10, 4], 'Confidence': 1}]", "missed"),
        ("coco", ((0, 0, 10, 10),), "No Objects", "missed"),
        ("coco", (), "No Objects", "found"),
        ("coco", (), "[{'Position': [0, 0, 10, 10], 'Confidence': 1}]", "invented"),
        ("coco", ((0, 0, 10, 10),), "[{'Position': [0, 0, 10, 10], 'Confidence': 1}, "
         "{'Position': [50, 50, 60, 60], 'Confidence': 1}]", "invented"),
        ("coco", ((0, 0, 10, 10),), "[{'Position': [0, 0, 0, 10], 'Confidence': 1}]", "not parsed"),
        ("lisa", (0, 0, 10, 10), "(0,0),(10,9)", "found"),
        ("lisa", (0, 0, 10, 10), "(0,0),(10,5)", "missed"),
        ("flowers", ("tiger lily",), "Tiger Lily", "right"),
        ("flowers", ("tiger lily",), "lily", "wrong"),
        ("rows", "3", "3", "right"),
        ("rows", "3", "4", "wrong"),
        ("rows", "3", "", "wrong"),
        ("rows", "3", None, "not parsed"),
    ],
)  # fmt: skip
def test_outcomes(task, solution, answer, expected):
    task, text = TASKS[task], "3" if answer is None else f"<think></think><answer>{answer}</answer>"
    e = Example("e", (Path("x"),), (1000, 1000) if task.boxes else None, solution, "asked")
    rewards = {name: REWARDS[name](text, solution) for name in task.rewards}
    row = json.loads(json.dumps(evaluate.record(task, e, (1000, 1000), text, rewards)))
    assert outcomes.outcome(row) == expected


@pytest.mark.parametrize("rewards, expected", [
    ({"accuracy": 0.0, "non_repeat": 1.0, "format": 1.0}, "wrong"), ({"closeness": 0.9, "format": 0.0}, "right"),
    ({"format": 1.0}, "wrong"),
])  # fmt: skip
def test_one_reward_that_is_nearly_always_earned_makes_no_answer_right(rewards, expected):
    assert outcomes.outcome({"answer": "3", "rewards": rewards}) == expected


def test_boxes_besides_are_no_error_where_not_all_objects_are_annotated():
    row = {"detections": [[[0, 0, 10, 10], 1.0], [[50, 50, 60, 60], 1.0]], "solution": [[0, 0, 10, 10]], "crowds": []}
    assert outcomes.outcome(row | {"exhaustive": True}) == "invented"
    assert outcomes.outcome(row | {"exhaustive": False}) == "found"
    assert outcomes.outcome(row | {"exhaustive": True, "crowds": [[40, 40, 90, 90]]}) == "found"
    assert outcomes.outcome(row | {"exhaustive": True, "crowds": [[400, 40, 490, 90]]}) == "invented", (
        "it lies elsewhere"
    )


def test_gains_are_counted_by_question():
    before, after = {"a": True, "b": False, "c": True, "d": False}, {"a": False, "b": True, "c": True, "e": True}
    assert outcomes.gains(before, after) == (1, 1, 1.0)


def test_the_sign_test_against_every_sequence_of_tosses():
    for gained, lost in [(0, 0), (1, 3), (5, 5), (9, 1), (12, 0)]:
        n = gained + lost
        tosses = [bin(i).count("1") for i in range(2**n)]
        uneven = sum(abs(2 * heads - n) >= abs(gained - lost) for heads in tosses) / 2**n
        assert outcomes.sign_test(gained, lost) == pytest.approx(uneven)
    exact = 2 * sum(comb(1100, k) for k in range(521)) / 2**1100
    assert outcomes.sign_test(580, 520) == pytest.approx(exact, rel=0.01), "many are taken as normally distributed"
    assert outcomes.sign_test(10**6, 10**6) == 1.0
    assert outcomes.sign_test(800, 400) < 1e-20 and comb(4, 2) == 6, "no overflow"


# ------------------------------------------------------------------------------------------------
# The page.

EVIL = (
    "</pre></figure><script>document.documentElement.dataset.broken='1';fetch('http://127.0.0.1:PORT/script')</script>"
    "<img src=http://127.0.0.1:PORT/x onerror=\"document.documentElement.dataset.broken='2'\"><style>body{display:none}"
    "</style><!-- \ud800 \x00 TITLE BODY <a href='javascript:1'>a</a>"
)


def evil_evaluation(folder: Path, port: int = 1, noise: bool = False, count: int = 40, rare: int | None = None) -> Path:
    """A finished evaluation whose categories and completions try to break out of the page.

    rare: the one row whose answer does not parse; by default every third.
    """
    text, rng = EVIL.replace("PORT", str(port)), np.random.default_rng(0)
    examples, records = [], []
    (folder / "images").mkdir(parents=True)
    for row in range(count):
        path = folder / "images" / f"{row}.png"
        pixels = rng.integers(0, 255, (700, 900, 3), dtype=np.uint8) if noise else np.full((70, 90, 3), 200, np.uint8)
        Image.fromarray(pixels).save(path)
        e = Example(f"{row}", (path,), (900, 700), ((10.0, 10.0, 60.0, 60.0),), text, image_id=row, category_id=1)
        answer = [FOUND, text, "<answer>No Objects</answer>"][row % 3 if rare is None else int(row == rare)]
        rewards = {"iou": 0.5, text: float(row % 3 == 0)}
        examples.append(e)
        records.append({"row": row} | evaluate.record(TASKS["coco"], e, (1000, 1000), answer, rewards))
    scores = evaluate.scores([r | {"completion": r["completion"]} for r in records], TASKS["coco"])
    (folder / "config.json").write_text(json.dumps({"task": "coco", "rewards": None}))
    (folder / "setup.txt").write_text(f"  data = 1\nsettings other than the defaults: {text}\n".replace("\ud800", "?"))
    evaluate.write_evaluation(folder, TASKS["coco"], text, records, *scores, examples)
    return folder


def evil_run(folder: Path, port: int = 1, noise: bool = False) -> Path:
    """A run of three steps with a group of each kind, whatever the model wrote."""
    folder.mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 255, (700, 900, 3), dtype=np.uint8)
    (Image.fromarray(pixels) if noise else Image.new("RGB", (90, 70), GROUND)).save(folder / "a.png")
    text = EVIL.replace("PORT", str(port))
    example = Example("e", (folder / "a.png",), (90, 70), ((10.0, 10.0, 60.0, 60.0),), text)
    prompts = [Prompt(example, {}, (1000, 1000), (), slot) for slot in range(3)]
    rewards = torch.tensor([[1.0, 1.0], [0.0, 0.0], [0.0, 1.0]])
    ro = SimpleNamespace(
        prompts=prompts, rewards=rewards, texts=[FOUND, text] * 3, parts={"iou": rewards, text: 0 * rewards},
        advantages=torch.tensor([0.0, 0.0, 0.0, 0.0, -0.7, 0.7]),
    )  # fmt: skip
    run = SimpleNamespace(cfg=SimpleNamespace(out=folder), prompts=SimpleNamespace(task=TASKS["coco"]))
    rows = [{"step": s, "reward": 0.1 * s, "reward/$a_$b": s, "kl": 0.0, "seconds/train": 1.5} for s in (1, 2, 3)]
    (folder / "config.json").write_text(json.dumps({"task": "coco", "rewards": ["iou=0.5"], "steps": 3}))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 4, "rew')
    report.follow(run, ro, 3)
    return folder


class Tags(HTMLParser):
    def __init__(self, page: str):
        super().__init__()
        self.found, self.addresses, self.handlers = set(), [], []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.found.add(tag)
        self.addresses += [value for name, value in attributes if name in ("src", "href", "data", "action")]
        self.handlers += [name for name, _ in attributes if name.startswith("on")]


def test_texts_of_anybody_stay_texts(tmp_path):
    """By a parser of its own: no element, no handler and no address but pictures in the page."""
    first, last = evil_evaluation(tmp_path / "<b>BODY"), evil_evaluation(tmp_path / "after")
    report.write_report([first, evil_run(tmp_path / "train"), last], tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    tags = Tags(page)
    assert not tags.found & {"script", "iframe", "a", "object", "link", "form"} and not tags.handlers
    kinds = {address.partition(";")[0] for address in tags.addresses}
    assert len(tags.addresses) > 20 and kinds == {"data:image/jpeg", "data:image/svg+xml"}
    assert "default-src 'none'" in page and "&lt;script&gt;" in page and page.count("<style>") == 1
    assert page.count("<h2>") == len(re.findall("<h2>[^<]", page)) >= 7


def test_the_page_shows_what_there_is(tmp_path):
    before, after = evil_evaluation(tmp_path / "before"), evil_evaluation(tmp_path / "after")
    records = report.rows_of(after / "predictions.jsonl")
    for r in records[1::3]:  # those that did not parse are right now, and one right answer is lost
        r["detections"] = [[[10, 10, 60, 60], 1.0]]
    records[0]["detections"] = []
    data.append_rows(after / "new.jsonl", records)
    (after / "new.jsonl").replace(after / "predictions.jsonl")
    report.write_report([before, evil_run(tmp_path / "train"), after], tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert (
        f"to {tmp_path.name}/after, {len(records)} questions in both: {len(records[1::3])} gained (✓ now only), 1 lost"
        in page
    )
    for heading in ("Held-out questions", "The same questions", "by outcome", "Curves", "Groups of step 3", "What ran"):
        assert heading in page, heading
    assert "Never changed: kl 0, seconds/train 1.5" in page and "3 of 3 steps, 4 s" in page
    assert page.count("<div class=pair>") == 8 and "Most different rewards" in page and "-0.70" in page
    assert "Highest rewards" in page and "Lowest rewards" in page
    assert all(words in page for words in (outcomes.OUTCOMES["missed"], outcomes.OUTCOMES["found"]))


def test_boxes_of_a_group_tell_the_sign_of_the_advantage(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(report, "draw_boxes", lambda picture, size, marks: drawn.append(marks) or picture)
    run = evil_run(tmp_path / "run")
    groups = json.loads((run / "groups.json").read_text())
    for completion, advantage in zip(groups[0]["completions"], (1.5, -1.5)):
        completion |= {"advantage": advantage, "boxes": [[1, 1, 9, 9]]}
    groups[0]["completions"].append(groups[0]["completions"][0] | {"advantage": 0.0})
    (run / "groups.json").write_text(json.dumps(groups[:1]))
    drawn.clear()
    report.write_report([run], run / "report.html")
    marks = {mark.label: (mark.color, mark.dashed) for mark in drawn[0]}
    better, worse, equal = (draw.BETTER, False), (draw.WORSE, True), (draw.EQUAL, False)
    assert marks == {"": (draw.TRUE, False), "1": better, "2": worse, "3": equal}


def test_a_rare_outcome_has_its_picture(tmp_path):
    """One answer of 100 does not parse, and it is none of the 24 evenly spaced ones."""
    folder = evil_evaluation(tmp_path / "a", count=100, rare=50)
    assert 50 not in draw.evenly(100, 24) and (folder / "thumbnails" / "000050.jpg").exists()
    assert outcomes.OUTCOMES["not parsed"] in (folder / "report.html").read_text()


def test_the_page_keeps_its_size_whatever_the_pictures(tmp_path):
    """Pictures of noise, which hardly compress, and three runs of 20,000 steps with 24 metrics."""
    first, rng = evil_evaluation(tmp_path / "a", noise=True, count=30), np.random.default_rng(0)
    shutil.copytree(first, tmp_path / "b")
    runs = [evil_run(tmp_path / name, noise=True) for name in ("t", "u", "v")]
    values = rng.random((20_000, 24)).round(6).tolist()
    for run in runs:
        rows = ({"step": step} | {f"m{i}": v for i, v in enumerate(row)} for step, row in enumerate(values))
        (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    report.write_report([first, *runs, tmp_path / "b"], tmp_path / "report.html")
    assert 3e6 < (tmp_path / "report.html").stat().st_size < 6_000_000


def test_seeds_share_their_panels_and_a_single_run_takes_its_evaluations(tmp_path):
    run = evil_run(tmp_path / "run")
    evil_evaluation(run / "eval_000002", count=4)
    evil_evaluation(run / "eval_000003", count=4)
    done = subprocess.run([sys.executable, "-m", "extras.report", run], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "report.html" in done.stdout, done.stderr
    page = (run / "report.html").read_text()
    assert re.search("From run/eval_000002 to run/eval_000003, [0-9]+ questions in both: 0 gained", page)
    report.main([str(run), str(evil_run(tmp_path / "again")), "--out", str(tmp_path / "seeds.html")])
    assert (tmp_path / "seeds.html").read_text().count("<img class=curve") == page.count("<img class=curve") == 2
    with pytest.raises(SystemExit):
        report.main([str(tmp_path)])


def test_runs_with_other_weights_and_a_solution_of_nothing_are_shown(tmp_path):
    """And without matplotlib all but the curves."""
    runs = [evil_run(tmp_path / name) for name in ("a", "b")]
    (runs[1] / "config.json").write_text(json.dumps({"task": "coco", "rewards": ["iou=2", "mine.py:own"]}))
    groups = json.loads((runs[1] / "groups.json").read_text())
    groups[0] |= {"solution": [], "boxes": []}
    groups[1] |= {"solution": 0, "boxes": []}
    (runs[1] / "groups.json").write_text(json.dumps(groups))
    report.write_report(runs, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert all(f"<td>iou</td><td>{weight}</td>" in page for weight in ("0.5", "2")) and "your own" in page
    assert "True: <b>No Objects</b>" in page and "True: <b>0</b>" in page
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(report, "PLOTS", False)
        report.write_report(runs, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "pip install matplotlib" in page and "image/svg" not in page and "Groups of step 3" in page


def test_of_many_evaluations_the_first_and_the_last_are_compared(tmp_path):
    run = evil_run(tmp_path / "run")
    for step in (1, 2, 3):
        evil_evaluation(run / f"eval_00000{step}", count=3)
    (run / "eval_000004").mkdir()  # not finished
    report.write_report([run], run / "report.html")
    page = (run / "report.html").read_text()
    assert "From run/eval_000001 to run/eval_000003" in page and "eval_000002" not in page


@shared("coco_mini")
def test_real_photographs_are_shown(tmp_path):
    examples = data.load_examples(TASKS["coco"], str(SHARED / "coco_mini"), "val")[0][:12]
    records = []
    for row, e in enumerate(examples):
        text = data.model_answer(TASKS["coco"], e, (1000, 1000))
        records.append({"row": row} | evaluate.record(TASKS["coco"], e, (1000, 1000), text, {"iou": 1.0}))
    (tmp_path / "config.json").write_text("{}")
    evaluate.write_evaluation(tmp_path, TASKS["coco"], "", records, *evaluate.scores(records, TASKS["coco"]), examples)
    page = (tmp_path / "report.html").read_text()
    assert "<b>12</b>" in page and len(Tags(page).addresses) >= 6 and "(12)" in page


# ------------------------------------------------------------------------------------------------
# In a browser.


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine: apt-get install chromium")
def test_in_a_browser_nothing_runs_and_nothing_is_loaded(tmp_path):
    """Chromium executes what it can: the page as it is, and, so that this test can fail, one that is not escaped."""
    asked = []

    class Listen(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_error(404)

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Listen)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    port = server.server_address[1]
    first, last = evil_evaluation(tmp_path / "before", port), evil_evaluation(tmp_path / "after", port)
    page = tmp_path / "report.html"
    report.write_report([first, evil_run(tmp_path / "train", port), last], page)

    def opened(file: Path) -> tuple[str, str]:
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--virtual-time-budget=3000"]
        flags += [f"--user-data-dir={tmp_path / 'profile'}", "--disable-background-networking", "--dump-dom"]
        done = subprocess.run([CHROMIUM, *flags, file.as_uri()], capture_output=True, text=True, timeout=120)
        return done.stdout, "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)

    dom, console = opened(page)
    assert "Held-out questions" in dom and "data-broken" not in dom and not asked and not console, console
    naked = tmp_path / "naked.html"
    naked.write_text(f"<!doctype html><pre>{EVIL.replace('PORT', str(port))}".replace("\ud800", ""))
    dom, _ = opened(naked)
    assert "data-broken" in dom and asked, "what is not escaped does run"
    server.shutdown()
