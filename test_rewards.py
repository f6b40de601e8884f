"""The specification of the rewards, to be read as tables.

    python -m pytest test_rewards.py

First what each reward pays, then where and why we differ from the published Visual-RFT code, then what
holds for any text whatever, then counterexamples: what one might expect to hold, and does not.
"""

import json
import math
import re
import time
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import rewards
from rewards import REWARDS, box_giou, box_iou, format_reward, parse_detections, parse_grounding

A, B, C = (100, 100, 300, 300), (500, 500, 700, 900), (0, 0, 50, 50)
A_SHIFTED = (120, 100, 320, 300)  # IoU with A: 180 * 200 / (2 * 40000 - 36000) = 9/11
A_HALF = (100, 100, 300, 200)  # IoU with A: exactly 0.5, which is not above the threshold


def answer(*detections, think="<think>two shapes</think>") -> str:
    """Write a completion in the published format; detections are (box, confidence)."""
    listed = [{"Position": list(box), "Confidence": confidence} for box, confidence in detections]
    return f"{think}<answer>{listed if listed else 'No Objects'}</answer>"


def raw(text: str) -> str:
    return f"<think>ok</think><answer>{text}</answer>"


# ------------------------------------------------------------------------------------------------
# What earns what. Each row: what it shows, completion, targets, iou, confidence.

DETECTION = [
    ("exact box, sure", answer((A, 1.0)), [A], 1.0, 1.0),
    ("exact box, unsure", answer((A, 0.3)), [A], 1.0, 0.3),
    ("displaced box", answer((A_SHIFTED, 0.8)), [A], 9 / 11, 0.8),
    ("IoU of just the threshold is not above it", answer((A_HALF, 0.8)), [A], 0.0, 0.2),
    ("wrong place, sure", answer((C, 0.9)), [A], 0.0, 0.1),
    ("wrong place, unsure", answer((C, 0.2)), [A], 0.0, 0.8),
    ("two boxes, two targets, any order", answer((B, 0.9), (A, 0.7)), [A, B], 1.0, 0.8),
    ("one of two targets missed: sum / max(n)", answer((A, 0.9)), [A, B], 0.5, 0.9),
    ("one box too many: sum / max(n)", answer((A, 0.9), (C, 0.9)), [A], 0.5, 0.5),
    ("a target is matched once: the surer box gets it", answer((A, 0.9), (A_SHIFTED, 0.6)), [A], 0.5, (0.9 + 0.4) / 2),
    ("absent, and said so", answer(), [], 1.0, 1.0),
    ("absent, but boxes were given", answer((A, 0.7)), [], 0.0, 0.3),
    ("present, but No Objects", answer(), [A], 0.0, 0.0),
    ("empty list says No Objects", raw("[]"), [], 1.0, 1.0),
    ("double quotes", raw('[{"Position": [100, 100, 300, 300], "Confidence": 1}]'), [A], 1.0, 1.0),
    ("decimals", raw("[{'Position': [100.0, 1e2, 300.0, 300], 'Confidence': .5}]"), [A], 1.0, 0.5),
    ("spaces and line breaks", raw("\n[ {'Position' : [100,100 ,300,\n300] , 'Confidence':1} ]\n"), [A], 1.0, 1.0),
    ("code fence", raw("```json\n[{'Position': [100, 100, 300, 300], 'Confidence': 1}]\n```"), [A], 1.0, 1.0),
    ("nested list", raw("[[{'Position': [100, 100, 300, 300], 'Confidence': 1}]]"), [A], 1.0, 1.0),
    ("repeated box is dropped", answer((A, 0.9), (A, 0.9)), [A], 1.0, 0.9),
    ("no think block: boxes count, format is judged alone", answer((A, 1.0), think=""), [A], 1.0, 1.0),
]

MALFORMED = [  # detection answers that earn nothing from IoU and confidence
    ("empty answer", raw("")),
    ("prose", raw("the dog is at [100, 100, 300, 300]")),
    ("prose before the list", raw("I see [{'Position': [100, 100, 300, 300], 'Confidence': 1}]")),
    ("three corners", raw("[{'Position': [100, 100, 300], 'Confidence': 1}]")),
    ("quoted corner", raw("[{'Position': ['100', 100, 300, 300], 'Confidence': 1}]")),
    ("no confidence", raw("[{'Position': [100, 100, 300, 300]}]")),
    ("no list", raw("{'Position': [100, 100, 300, 300], 'Confidence': 1}")),
    (
        "one good box and one bad one",
        raw("[{'Position': [100, 100, 300, 300], 'Confidence': 1}, {'Position': [1, 2], 'Confidence': 1}]"),
    ),
    ("two lists", raw("[{'Position': [100, 100, 300, 300], 'Confidence': 1}][]")),
    ("code instead of numbers", raw("[{'Position': [__import__('os'), 100, 300, 300], 'Confidence': 1}]")),
    ("nothing", ""),
]

FORMAT = [  # what it shows, completion, with thinking, without thinking
    ("think, then answer", "<think>a</think><answer>b</answer>", 1.0, 0.0),
    ("empty blocks are still blocks", "<think></think><answer></answer>", 1.0, 0.0),
    ("white space between and around", "\n <think>a</think>\n\n<answer>b</answer>  \n", 1.0, 0.0),
    ("line breaks inside", "<think>a\nb</think><answer>\nc\n</answer>", 1.0, 0.0),
    ("answer alone", "<answer>b</answer>", 0.0, 1.0),
    ("answer first", "<answer>b</answer><think>a</think>", 0.0, 0.0),
    ("text before", "Sure! <think>a</think><answer>b</answer>", 0.0, 0.0),
    ("text between", "<think>a</think> so <answer>b</answer>", 0.0, 0.0),
    ("text after", "<think>a</think><answer>b</answer> bye", 0.0, 0.0),
    ("answer inside think", "<think>a<answer>b</answer></think>", 0.0, 0.0),
    ("not closed", "<think>a</think><answer>b", 0.0, 0.0),
    ("capitals", "<Think>a</Think><Answer>b</Answer>", 0.0, 0.0),
    ("two answers", "<think>a</think><answer>b</answer><answer>c</answer>", 0.0, 0.0),
    ("two thoughts", "<think>a</think><think>b</think><answer>c</answer>", 0.0, 0.0),
    ("nothing", "", 0.0, 0.0),
]

ACCURACY = [  # what it shows, answer, accepted names, ours, published substring rule
    ("the name", "tiger lily", "tiger lily", 1.0, 1.0),
    ("case", "Tiger Lily", "tiger lily", 1.0, 1.0),
    ("underscore, hyphen and space are one", "tiger_lily", "tiger-lily", 1.0, 0.0),
    ("punctuation at the end", "tiger lily.", "tiger lily", 1.0, 1.0),
    ("line breaks around", "\ntiger lily\n", "tiger lily", 1.0, 1.0),
    ("a declared alias", "Lilium lancifolium", ["tiger lily", "lilium lancifolium"], 1.0, 1.0),
    ("another name", "rose", "tiger lily", 0.0, 0.0),
    ("part of the name", "tiger", "tiger lily", 0.0, 1.0),
    ("more than the name", "it is a tiger lily", "tiger lily", 0.0, 1.0),
    ("denial", "not a tiger lily", "tiger lily", 0.0, 1.0),
    ("a list of guesses", "rose or tiger lily or daisy", "tiger lily", 0.0, 1.0),
    ("one letter", "t", "tiger lily", 0.0, 1.0),
    ("nothing", "", "tiger lily", 0.0, 1.0),
    ("digits matter", "Boeing 737-700", "Boeing 737-800", 0.0, 0.0),
    ("inner punctuation matters", "F.150", "F-150", 0.0, 0.0),
    ("a sign matters", "-3", "3", 0.0, 1.0),
    ("a sign in bold", "**-3**", "3", 0.0, 1.0),
    ("a sign in bold, rightly", "**-3**", "-3", 1.0, 1.0),
    ("a typographic minus", "\N{MINUS SIGN}3", "-3", 1.0, 0.0),
    ("a sign within", "x = -3", "x = 3", 0.0, 0.0),
    ("a sign of a letter", "-x", "x", 0.0, 1.0),
    ("a sign before brackets", "-(3)", "3", 0.0, 1.0),
    ("a sign of a sum of money", "-$5", "$5", 0.0, 1.0),
    ("a sign in quotes", "'-3'", "3", 0.0, 1.0),
    ("a sign in quotes, rightly", '"-3"', "-3", 1.0, 1.0),
    ("no sign after quotes", '"well"-known', '"well" known', 1.0, 0.0),
    ("a unit may be written in two ways", "25 cm\N{SUPERSCRIPT TWO}", "25 cm2", 1.0, 0.0),
    ("no sign after a period", "U.S.-made", "U.S. made", 1.0, 0.0),
    ("a power is no digit", "10\N{SUPERSCRIPT FIVE}", "105", 0.0, 0.0),
    ("a power is written in two ways", "10\N{SUPERSCRIPT FIVE}", "10^5", 1.0, 0.0),
    ("typographic hyphens", "737\N{NON-BREAKING HYPHEN}800, 737\N{EN DASH}800", "737-800, 737-800", 1.0, 0.0),
    ("typographic apostrophes", "colt’s foot", "colt's foot", 1.0, 0.0),
    ("a name of punctuation is not nothing", "", "?", 0.0, 1.0),
    ("a name of punctuation is no other", "!", "?", 0.0, 0.0),
    ("a name of punctuation", "?", "?", 1.0, 1.0),
    ("a hyphen between numbers is no sign", "707 320", "707-320", 1.0, 0.0),
    ("a decimal point matters", ".5", "5", 0.0, 1.0),
    ("a zero before the point does not", "-.5", "-0.5", 1.0, 0.0),
    ("composed and decomposed letters are one", "caf\u00e9", "cafe\u0301", 1.0, 0.0),
    ("typographic quotes", "\u201ctiger lily\u201d", "tiger lily", 1.0, 1.0),
]

GROUNDING = [  # what it shows, answer, GIoU + 1 with the target A
    ("exact", "(100,100),(300,300)", 2.0),
    ("spaces", " ( 100 , 100 ) , ( 300 , 300 ) ", 2.0),
    ("decimals", "(100.0,100.0),(300.0,300.0)", 2.0),
    ("with words around", "it is at (100,100),(300,300).", 2.0),
    ("a quarter of it, inside: IoU 1/4, nothing of the enclosing box is empty", "(100,100),(200,200)", 1.25),
    ("beside it, touching: IoU 0, enclosing box full", "(300,100),(500,300)", 1.0),
    ("one width away: IoU 0, a third of the enclosing box empty", "(500,100),(700,300)", 2 / 3),
    ("reversed", "(300,300),(100,100)", 0.0),
    ("empty box", "(100,100),(100,300)", 0.0),
    ("two boxes: which one counts?", "(100,100),(300,300) (0,0),(9,9)", 0.0),
    ("one corner", "(100,100)", 0.0),
    ("brackets of another kind", "[100,100,300,300]", 0.0),
    ("no box", "none", 0.0),
]


def ids(table):
    return [row[0] for row in table]


@pytest.mark.parametrize("name, completion, targets, iou, confidence", DETECTION, ids=ids(DETECTION))
def test_detection(name, completion, targets, iou, confidence):
    assert rewards.iou_reward(completion, targets) == pytest.approx(iou)
    assert rewards.confidence_reward(completion, targets) == pytest.approx(confidence)


@pytest.mark.parametrize("name, completion", MALFORMED, ids=ids(MALFORMED))
@pytest.mark.parametrize("targets", [[A], []], ids=["present", "absent"])
def test_malformed_detection_earns_nothing(name, completion, targets):
    assert parse_detections(completion) is None
    assert [REWARDS[r](completion, targets) for r in ("iou", "confidence", "brier")] == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("name, completion, with_thinking, without", FORMAT, ids=ids(FORMAT))
def test_format(name, completion, with_thinking, without):
    assert format_reward(completion) == with_thinking
    assert format_reward(completion, think=False) == without


@pytest.mark.parametrize("name, text, names, ours, published", ACCURACY, ids=ids(ACCURACY))
def test_accuracy(name, text, names, ours, published):
    assert rewards.accuracy_reward(raw(text), names) == ours
    assert rewards.published_accuracy(raw(text), names) == published


@pytest.mark.parametrize("name, text, expected", GROUNDING, ids=ids(GROUNDING))
def test_grounding(name, text, expected):
    assert rewards.giou_reward(raw(text), A) == pytest.approx(expected)


F1 = [  # name, completion, targets, F1
    ("exact", answer((A, 0.1)), [A], 1.0),
    ("the same box twice: P 1/2, R 1", answer((A, 0.9), (A, 0.9)), [A], 2 / 3),
    ("one of two targets: P 1, R 1/2", answer((A, 0.9)), [A, B], 2 / 3),
    ("one box too many", answer((A, 0.9), (C, 0.9)), [A], 2 / 3),
    ("IoU counts", answer((A_SHIFTED, 0.8)), [A], 9 / 11),
    ("the better box takes the target, whatever its confidence", answer((A_SHIFTED, 0.9), (A, 0.1)), [A], 2 / 3),
    ("wrong place", answer((C, 0.9)), [A], 0.0),
    ("absent, and said so", answer(), [], 1.0),
    ("absent, but a box was given", answer((A, 0.7)), [], 0.0),
    ("present, but No Objects", answer(), [A], 0.0),
    ("malformed", raw("[1, 2, 3, 4]"), [A], 0.0),
]


@pytest.mark.parametrize("name, completion, targets, expected", F1, ids=ids(F1))
def test_f1(name, completion, targets, expected):
    assert rewards.f1_reward(completion, targets) == pytest.approx(expected)


NON_REPEAT = [  # name, completion, reward
    ("different sentences", "<think>A cat. A dog.</think><answer>2</answer>", 1.0),
    ("a sentence twice", "<think>A cat. A dog. a  CAT!</think><answer>2</answer>", 0.0),
    ("lines are sentences", "<think>a cat\na cat</think><answer>2</answer>", 0.0),
    ("repeated words in one sentence", "<think>a cat, a cat</think><answer>2</answer>", 1.0),
    ("the answer may repeat the thought", "<think>two.</think><answer>two.</answer>", 1.0),
    ("no thought: invited", "<think></think><answer>2</answer>", 1.0),
    ("never ends", "<think>a cat. a cat. a cat", 0.0),
    ("decimal points end no sentence", "<think>x is 12.5. y is 7.5.</think><answer>2</answer>", 1.0),
    ("rules of Markdown are no sentences", "<think>One look.\n* * *\nA dog.\n* * *</think><answer>2</answer>", 1.0),
    ("no blank after a sentence", "<think>A cat.A dog.A cat.</think><answer>2</answer>", 0.0),
    ("Chinese", "<think>图中有猫。图中有猫。</think><answer>2</answer>", 0.0),
    ("Chinese, different", "<think>图中有猫。图中有狗。</think><answer>2</answer>", 1.0),
    ("single words, as after `e.g.`", "<think>e.g. a cat, e.g. a dog. Yes. Yes.</think><answer>2</answer>", 1.0),
]


@pytest.mark.parametrize("name, completion, expected", NON_REPEAT, ids=ids(NON_REPEAT))
def test_non_repeat(name, completion, expected):
    assert rewards.non_repeat_reward(completion) == expected


def test_threshold_is_a_setting():
    completion = answer((A_HALF, 0.8))
    assert rewards.iou_reward(completion, [A], iou_threshold=0.4) == pytest.approx(0.5)
    assert rewards.confidence_reward(completion, [A], iou_threshold=0.4) == pytest.approx(0.8)


def test_choose_binds_what_a_reward_takes_and_refuses_unknown_names():
    chosen = rewards.choose_rewards({"iou": 2.0, "format": 1.0}, iou_threshold=0.4, think=False)
    assert chosen["iou"][0](answer((A_HALF, 0.8)), [A]) == pytest.approx(0.5) and chosen["iou"][1] == 2.0
    assert chosen["format"][0]("<answer>b</answer>", [A]) == 1.0
    with pytest.raises(ValueError, match="iuo.*known are iou"):
        rewards.choose_rewards({"iuo": 1.0})


# ------------------------------------------------------------------------------------------------
# Where we differ from the published code, and why.

DIFFERENCES = [  # why, reward, completion, solution, published, ours
    ("one NaN poisons a whole group's advantages", "confidence",
     raw("[{'Position': [100, 100, 300, 300], 'Confidence': nan}]"), [A], None, 0.0),
    ("a boast of 1e9 was clipped to 1.0 and paid", "iou",
     raw("[{'Position': [100, 100, 300, 300], 'Confidence': 1e9}]"), [A], 1.0, 0.0),
    ("a negative confidence", "iou", answer((A, -1)), [A], 1.0, 0.0),
    ("models often break the line inside the answer", "iou",
     raw(f"\n{[{'Position': list(A), 'Confidence': 1}]}\n"), [A], 1 - 1, 1.0),
    ("a right No Objects must pay, or boxes are always invented", "iou", answer(), [], 0.0, 1.0),
    ("an empty list says the same", "confidence", raw("[]"), [], 0.0, 1.0),
    ("areas of reversed boxes are meaningless, up to GIoU 26", "giou",
     raw("(815,833),(687,504)"), (762, 489, 835, 853), 2.5848, 0.0),
    ("a reversed box is no box for detection either", "confidence", answer(((300, 300, 100, 100), 0.1)), [A], 0.9, 0.0),
    ("without an answer block there is no answer", "iou", f"{[{'Position': list(A), 'Confidence': 1}]}", [A], 1.0, 0.0),
    ("two answers hedge", "format", raw("a") + "<answer>b</answer>", [A], 1.0, 0.0),
    ("two answers hedge, and the first was paid", "iou",
     answer((A, 1.0)) + "<answer>No Objects</answer>", [A], 1.0, 0.0),
    ("white space at the ends is nobody's fault", "format", " <think>a</think><answer>b</answer>\n", [A], 0.0, 1.0),
    ("a substring is not a name", "accuracy", raw("rose or lily or daisy"), "rose", 1.0, 0.0),
    ("the empty answer is a substring of every name", "accuracy", raw(""), "rose", 1.0, 0.0),
    ("a list cut off was repaired and paid", "iou",
     raw(f"[{{'Position': {list(A)}, 'Confidence': 1}}, {{'Posi"), [A], 1.0, 0.0),
    ("a code fence is how models quote", "iou",
     raw(f"```\n{[{'Position': list(A), 'Confidence': 1}]}\n```"), [A], 0.0, 1.0),
    ("decimals are numbers", "giou", raw("(100.0,100.0),(300.0,300.0)"), A, 0.0, 2.0),
    ("corners of two boxes were mixed into one", "giou",
     raw("(402,499),(914,951) (456,136),(594,614)"), (313, 577, 904, 983), 0.7703, 0.0),
]  # fmt: skip


@pytest.mark.parametrize("why, reward, completion, solution, published, ours", DIFFERENCES, ids=ids(DIFFERENCES))
def test_differences_from_the_published_code(why, reward, completion, solution, published, ours):
    value = REWARDS[reward](completion, solution)
    assert value == pytest.approx(ours) and value != published


def test_equal_confidences_are_settled_by_iou_not_by_the_order_of_the_text():
    for order in ([(A_SHIFTED, 0.5), (A, 0.5)], [(A, 0.5), (A_SHIFTED, 0.5)]):
        assert rewards.iou_reward(answer(*order), [A]) == pytest.approx(0.5)  # published: 9/22 for the first order


# Kinds of shared/data/reward_vectors in which our rewards differ on purpose. A reversed or empty box makes the
# whole answer malformed wherever it appears, and jittered boxes reverse by chance: such rows are recognized below.
DIFFERENT_KINDS = {
    "iou": {"newline", "notag", "twoans", "wild"},
    "confidence": {"newline", "notag", "twoans", "wild", "reversed"},
    "format": {"twoans"},
    "accuracy": {"blank", "contain", "contained", "empty", "list", "notag"},
    "published_accuracy": set(),
    "giou": {"float", "notag", "two", "reversed"},
}
VECTORS = Path(__file__).parent.parent / "shared" / "data" / "reward_vectors" / "vectors.json"


@pytest.mark.skipif(
    not VECTORS.exists(), reason="the 2,300 published scores are not beside the project (../shared/data/reward_vectors)"
)
def test_published_vectors():
    seen = Counter()
    for row in json.loads(VECTORS.read_text()):
        solution = row.get("boxes") or row.get("label") or row.get("box")
        expected = dict(row["official"])
        if "accuracy" in expected:
            expected["published_accuracy"] = expected["accuracy"]
        for name, published in expected.items():
            value = REWARDS[name](row["completion"], solution)
            same = published is not None and value == pytest.approx(published, abs=1e-9)
            if not same and row["kind"] not in DIFFERENT_KINDS[name]:
                parsed = parse_detections if row["task"] == "detection" else parse_grounding
                assert value == 0.0 and parsed(row["completion"]) is None and has_reversed_box(row["completion"]), (
                    row,
                    name,
                    value,
                )
            seen[name, "same" if same else "different"] += 1
    assert sum(seen.values()) == 1500 * 3 + 300 * 3 + 500 * 2
    assert seen["published_accuracy", "different"] == 0 and seen["iou", "same"] > 1300 and seen["format", "same"] > 2200


def has_reversed_box(completion: str) -> bool:
    text = re.sub(r"'Confidence': [-\d.e+]+", "", completion.partition("<answer>")[2])
    numbers = [float(n) for n in re.findall(r"-?\d+(?:\.\d+)?", text)]
    return any(x2 <= x1 or y2 <= y1 for x1, y1, x2, y2 in zip(*(numbers[i::4] for i in range(4))))


# ------------------------------------------------------------------------------------------------
# What holds for any text.

RANGES = dict.fromkeys(REWARDS, 1) | {"giou": 2}
SOLUTIONS = {"accuracy": ["rose"], "published_accuracy": ["rose"], "giou": [A]}

PIECES = (
    "<think> </think> <answer> </answer> [ ] { } ( ) , : ' \" 'Position': 'Confidence': No Objects [[ ]] ``` 0 1 100 "
    "300 1e400 -1e400 nan inf - . 0.5 1e308 -1e308 1e-320 99999999999999999999 \n \0 é 🙂 "
    "{'Position':[1,2,3,4],'Confidence':1}"
)
pieces = st.sampled_from(PIECES.split(" "))
near_misses = st.lists(pieces, max_size=40).map("".join)
answers = st.one_of(st.text(), near_misses, near_misses.map(raw), near_misses.map(lambda s: raw(f"[{s}]")))
coordinates = st.integers(0, 1000) | st.floats(-1e4, 1e4, allow_nan=False)


@st.composite
def boxes(draw):
    x1, x2, y1, y2 = (draw(coordinates) for _ in range(4))
    assume(x1 != x2 and y1 != y2)
    return (min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2))


detections = st.lists(st.tuples(boxes(), st.integers(0, 100).map(lambda c: c / 100)), min_size=1, max_size=5)


@pytest.mark.parametrize("name", REWARDS)
@settings(max_examples=300, deadline=None)
@given(completion=answers)
def test_any_text_gets_a_finite_number_in_range(name, completion):
    for solution in SOLUTIONS.get(name, [[], [A, B]]):
        value = REWARDS[name](completion, solution)
        assert isinstance(value, float) and math.isfinite(value) and 0.0 <= value <= RANGES[name]
        assert REWARDS[name](completion, solution) == value


@settings(deadline=None)
@given(found=detections, targets=st.lists(boxes(), max_size=5), data=st.data())
def test_order_of_boxes_changes_nothing(found, targets, data):
    shuffled, moved = data.draw(st.permutations(found)), data.draw(st.permutations(targets))
    for name in ("iou", "confidence", "brier"):
        assert REWARDS[name](answer(*found), targets) == REWARDS[name](answer(*shuffled), moved)


@settings(deadline=None)
@given(target=boxes(), one=boxes(), other=boxes(), confidence=st.integers(0, 100).map(lambda c: c / 100))
def test_with_one_box_and_one_target_a_better_box_never_earns_less_iou(target, one, other, confidence):
    worse, better = sorted((one, other), key=lambda box: box_iou(box, target))
    assert rewards.iou_reward(answer((worse, confidence)), [target]) <= rewards.iou_reward(
        answer((better, confidence)), [target]
    )


@given(a=boxes(), b=boxes())
def test_iou_and_giou_are_symmetric_ordered_and_in_range(a, b):
    assert 0.0 <= box_iou(a, b) <= 1.0 and -1.0 <= box_giou(a, b) <= box_iou(a, b)
    assert box_iou(a, b) == pytest.approx(box_iou(b, a)) and box_iou(a, a) == pytest.approx(1.0)


corner_and_sides = st.tuples(st.integers(0, 6), st.integers(0, 6), st.integers(1, 6), st.integers(1, 6))
small_boxes = corner_and_sides.map(lambda b: (b[0], b[1], b[0] + b[2], b[1] + b[3]))


@given(a=small_boxes, b=small_boxes)
def test_iou_counts_pixels(a, b):
    """Compute IoU by counting the unit cells of a grid, as the oracle."""
    cells = [{(x, y) for x in range(box[0], box[2]) for y in range(box[1], box[3])} for box in (a, b)]
    union = len(cells[0] | cells[1])
    enclosing = (max(a[2], b[2]) - min(a[0], b[0])) * (max(a[3], b[3]) - min(a[1], b[1]))
    iou = len(cells[0] & cells[1]) / union
    assert box_iou(a, b) == pytest.approx(iou) and box_giou(a, b) == pytest.approx(
        iou - (enclosing - union) / enclosing
    )


MEGABYTE = 2**20
LONG = {
    "letters": "a",
    "digits": "9",
    "spaces": " ",
    "opened tags": "<answer>",
    "opened thoughts": "<think>",
    "opened brackets": "[",
    "opened parentheses": "(",
    "braces": "{'Position': [",
    "boxes": "{'Position': [1, 2, 3, 4], 'Confidence': 0.5}, ",
    "corners": "(1,2),(",
    "backticks": "```",
    "commas": " ,",
}


@pytest.mark.parametrize("unit", LONG.values(), ids=LONG.keys())
@pytest.mark.parametrize(
    "frame",
    ["{}", "<think>{}", "<think>a</think><answer>{}</answer>", "<think>a</think><answer>[{}]</answer>", "<answer>[[{}"],
)
def test_a_megabyte_costs_what_its_length_costs(unit, frame):
    def seconds(length: int) -> float:
        completion = frame.format(unit * (length // len(unit)))
        start = time.process_time()
        for name, reward in REWARDS.items():
            reward(completion, SOLUTIONS.get(name, [[A, B]])[0])
        return time.process_time() - start

    short = seconds(MEGABYTE // 16)
    if short < 0.3:  # quadratic would be 256 times that, linear is 16 times
        assert seconds(MEGABYTE) < 16 * 4 * max(short, 0.02)
    else:
        pytest.fail(f"{short:.1f} s for 64 KiB")


# ------------------------------------------------------------------------------------------------
# What does not hold, known and kept because it is the paper's rule.


def test_a_junk_box_without_confidence_earns_the_confidence_reward_in_full():
    assert rewards.confidence_reward(answer((C, 0.0)), [A]) == 1.0


def test_the_linear_score_drives_confidences_to_the_ends_and_brier_does_not():
    """Check a box that is right 7 times in 10: the linear score is best at 1, the Brier score at 0.7."""

    def expected(reward, confidence):
        return 0.7 * reward(answer((A, confidence)), [A]) + 0.3 * reward(answer((A, confidence)), [C])

    grid = [c / 10 for c in range(11)]
    assert max(grid, key=lambda c: expected(rewards.confidence_reward, c)) == 1.0
    assert max(grid, key=lambda c: expected(rewards.brier_reward, c)) == 0.7


def test_a_better_box_can_earn_less_in_total():
    """Cross the threshold at low confidence: 1 - c turns into c, and confidence loses what IoU gains."""
    worse, better = answer(((100, 100, 300, 199), 0.1)), answer(((100, 100, 300, 202), 0.1))
    total = [rewards.iou_reward(c, [A]) + rewards.confidence_reward(c, [A]) for c in (worse, better)]
    assert total[0] == pytest.approx(0.9) and total[1] == pytest.approx(0.51 + 0.1)


def test_a_greedy_match_can_take_another_boxs_target():
    """Check that a better box can earn less with more targets: it takes a target that another box needed."""
    targets = [(0, 0, 100, 100), (0, 30, 100, 130)]
    needs_first = ((0, 0, 100, 92), 0.5)
    modest = answer(((0, 36, 100, 136), 0.9), needs_first)  # takes the second target, leaves the first
    greedy = answer(((0, 8, 100, 108), 0.9), needs_first)  # overlaps the first more, and takes it
    assert rewards.iou_reward(modest, targets) > rewards.iou_reward(greedy, targets)
