"""Verifiable rewards of Visual-RFT (arXiv 2503.01785): text in, number out.

Every reward has the shape `reward(completion, solution, ...) -> float` and is

    pure     the same text and solution give the same number: no clock, no file, no model;
    total    any string whatever gets a finite number in the documented range, never an exception;
    linear   a completion of a megabyte costs what its length costs.

A completion is `<think> ... </think><answer> ... </answer>`. A detection answer is a list
`[{'Position': [x1, y1, x2, y2], 'Confidence': 0.87}, ...]` or the words `No Objects`; a classification
answer is a name; a grounding answer is `(x1,y1),(x2,y2)`. Boxes are (x1, y1, x2, y2) with x1 < x2 and
y1 < y2, completion and solution in the same coordinates; which ones does not matter here, because IoU
does not change under a scale per axis.

Where this differs from the published reward code, and why, is the second half of test_rewards.py.
To add a reward, write such a function and enter it in REWARDS, or leave this file alone and name yours on the command line:
`--rewards iou=1 my_rewards.py:my_reward=0.5`.
"""

import functools
import importlib.util
import inspect
import math
import re
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

Box = tuple[float, float, float, float]

# ------------------------------------------------------------------------------------------------
# Parsing. One grammar for reward, evaluation and drawing, so that none of them sees another answer.
# The patterns are anchored or start at a literal, and no two neighboring parts can match the same
# text, so no input makes them backtrack more than linearly. Digits are bounded because converting
# a number is not linear in its length.

_NUMBER = r"([-+]?(?:\d{1,32}(?:\.\d{0,32})?|\.\d{1,32})(?:[eE][-+]?\d{1,3})?)"
_POSITION = rf"""['"]Position['"]\s*:\s*\[\s*{_NUMBER}\s*,\s*{_NUMBER}\s*,\s*{_NUMBER}\s*,\s*{_NUMBER}\s*\]"""
_CONFIDENCE = rf"""['"]Confidence['"]\s*:\s*{_NUMBER}"""
_DETECTION = re.compile(rf"\{{\s*{_POSITION}\s*,\s*{_CONFIDENCE}\s*\}}")
_COMMA = re.compile(r"\s*,\s*")
_CORNERS = re.compile(rf"\(\s*{_NUMBER}\s*,\s*{_NUMBER}\s*\)\s*,\s*\(\s*{_NUMBER}\s*,\s*{_NUMBER}\s*\)")
_FENCE = re.compile(r"```[a-z]*\s(.*)```", re.DOTALL)
_THINK_ANSWER = re.compile(r"<think>(.*?)</think>\s*<answer>(.*?)</answer>", re.DOTALL)
_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)


def _blocks(completion: str) -> tuple[int, int]:
    """How many complete <think> and <answer> blocks the text has; -1 where opening and closing tags disagree."""
    counts = ((completion.count(f"<{tag}>"), completion.count(f"</{tag}>")) for tag in ("think", "answer"))
    return tuple(opened if opened == closed else -1 for opened, closed in counts)


def parse_answer(completion: str) -> str | None:
    """The text of the one answer block, stripped; None without it or with two blocks of a kind (which one counts?)."""
    think, answer = _blocks(completion)
    if answer != 1 or think > 1:
        return None
    found = _ANSWER.search(completion)
    return found.group(1).strip() if found else None


def parse_detections(completion: str) -> list[tuple[Box, float]] | None:
    """The (box, confidence) pairs of a detection answer, highest confidence first, a box repeated to the digit once.

    `No Objects` and `[]` are the empty list. None is a malformed answer: anything but a whole list, a box that is
    reversed or empty, a number that is not finite, a confidence outside [0, 1].
    """
    text = parse_answer(completion)
    if text is None:
        return None
    fenced = _FENCE.fullmatch(text)
    if fenced:
        text = fenced.group(1).strip()
    if text == "No Objects":
        return []
    if text.startswith("[[") and text.endswith("]]"):
        text = text[1:-1].strip()  # the published parser searches for the inner list, so it is paid
    if not (text.startswith("[") and text.endswith("]")):
        return None
    body = text[1:-1].strip()
    confidence_of: dict[Box, float] = {}
    at = 0
    while at < len(body):
        found = _DETECTION.match(body, at)
        if not found:
            return None
        *corners, confidence = map(float, found.groups())
        if not (_is_box(corners) and 0.0 <= confidence <= 1.0):
            return None
        # The highest confidence of a repeated box, not the first, so that the order of the text decides nothing.
        confidence_of[tuple(corners)] = max(confidence, confidence_of.get(tuple(corners), 0.0))
        at = found.end()
        comma = _COMMA.match(body, at)
        if comma:
            at = comma.end()
        elif at < len(body):
            return None
    return sorted(confidence_of.items(), key=lambda pair: (-pair[1], pair[0]))


def parse_grounding(completion: str) -> Box | None:
    """The one `(x1,y1),(x2,y2)` of a grounding answer; None without it, with two, or where it is reversed or empty."""
    found = _CORNERS.findall(parse_answer(completion) or "")
    if len(found) != 1:
        return None
    corners = tuple(map(float, found[0]))
    return corners if _is_box(corners) else None


def _is_box(corners: Sequence[float]) -> bool:
    x1, y1, x2, y2 = corners
    return all(map(math.isfinite, corners)) and x1 < x2 and y1 < y2


# ------------------------------------------------------------------------------------------------
# Geometry.


def _areas(a: Box, b: Box) -> tuple[float, float, float]:
    """Intersection, union and area of the smallest box around both. Corners are compared before anything is
    multiplied, and sizes are scaled by the enclosing box, so that no finite box overflows."""
    left, top, right, bottom = min(a[0], b[0]), min(a[1], b[1]), max(a[2], b[2]), max(a[3], b[3])
    width, height = right - left, bottom - top
    if not (0.0 < width < math.inf and 0.0 < height < math.inf):
        return 0.0, 1.0, 1.0
    wide = max(0.0, min(a[2], b[2]) - max(a[0], b[0])) / width
    high = max(0.0, min(a[3], b[3]) - max(a[1], b[1])) / height
    area_a = ((a[2] - a[0]) / width) * ((a[3] - a[1]) / height)
    area_b = ((b[2] - b[0]) / width) * ((b[3] - b[1]) / height)
    return wide * high, area_a + area_b - wide * high, 1.0


def box_iou(a: Box, b: Box) -> float:
    """Intersection over union of two (x1, y1, x2, y2) boxes, in [0, 1]."""
    intersection, union, _ = _areas(a, b)
    return min(1.0, intersection / union) if union > 0 else 0.0


def box_giou(a: Box, b: Box) -> float:
    """Generalized IoU (arXiv 1902.09630): IoU - (enclosing - union) / enclosing, in [-1, 1]."""
    _, union, enclosing = _areas(a, b)
    return max(-1.0, box_iou(a, b) - max(0.0, enclosing - union) / enclosing)


def match(detections: Sequence[tuple[Box, float]], targets: Sequence[Box], iou_threshold: float) -> list[float]:
    """One-to-one greedy matching (Visual-RFT section 3.2): the IoU of each detection's target, 0.0 where it has none.

    Detections choose in the order of confidence, each the free target that it overlaps most, if by more than
    `iou_threshold`. Among equal confidences the higher IoU is matched first; what is then still equal is settled
    by the coordinates, so that neither the order of the answer nor that of the solution changes anything.

    detections: (box, confidence) as parse_detections returns them; the result is in the same order.
    """
    matched = [0.0] * len(detections)
    free = set(range(len(targets)))
    start = 0
    while start < len(detections) and free:
        stop = start
        while stop < len(detections) and detections[stop][1] == detections[start][1]:
            stop += 1
        pairs = sorted(
            (-iou, detections[i][0], tuple(targets[j]), i, j)
            for i in range(start, stop)
            for j in free
            if (iou := box_iou(detections[i][0], targets[j])) > iou_threshold
        )
        for negative_iou, _, _, i, j in pairs:
            if matched[i] == 0.0 and j in free:
                matched[i] = -negative_iou
                free.remove(j)
        start = stop
    return matched


# ------------------------------------------------------------------------------------------------
# Rewards. `solution` is a list of boxes (detection), a name or a list of accepted names
# (classification), or one box (grounding).


def iou_reward(completion: str, solution: Sequence[Box], iou_threshold: float = 0.5) -> float:
    """Sum of matched IoU / max(number of targets, number of predictions), in [0, 1]; 1 for a right `No Objects`.

    The paper (eq. 3) divides by the predictions alone, which pays a single box in a crowd in full; the published
    code divides by the larger number, and so do we.
    """
    detections = parse_detections(completion)
    if detections is None:
        return 0.0
    if not detections and not solution:
        return 1.0
    return math.fsum(match(detections, solution, iou_threshold)) / max(len(detections), len(solution))


def confidence_reward(completion: str, solution: Sequence[Box], iou_threshold: float = 0.5) -> float:
    """Mean over predictions of c where matched and 1 - c where not (Visual-RFT eq. 4 and 5), in [0, 1].

    Linear in c, hence maximal at 0 or 1 whatever the odds: confidences drift to the ends, and a junk box at
    confidence 0 is paid in full. `brier_reward` is maximal at the true odds.
    """
    return _confidence(completion, solution, iou_threshold, lambda c, matched: c if matched else 1.0 - c)


def brier_reward(completion: str, solution: Sequence[Box], iou_threshold: float = 0.5) -> float:
    """Mean over predictions of 1 - (c - matched)^2 (Brier 1950, a proper score), in [0, 1]; not in the paper."""
    return _confidence(completion, solution, iou_threshold, lambda c, matched: 1.0 - (c - matched) ** 2)


def _confidence(completion, solution, iou_threshold, score) -> float:
    detections = parse_detections(completion)
    if detections is None:
        return 0.0
    if not detections:
        return 0.0 if solution else 1.0
    ious = match(detections, solution, iou_threshold)
    return math.fsum(score(c, iou > 0.0) for (_, c), iou in zip(detections, ious)) / len(detections)


def format_reward(completion: str, solution: object = None, think: bool = True) -> float:
    """1 if the completion is one think block, then one answer block, and nothing else but white space; otherwise 0.

    With think=False: the answer block alone. What is inside the blocks is judged by the other rewards.
    """
    pattern, blocks = (_THINK_ANSWER, (1, 1)) if think else (_ANSWER, (0, 1))
    return float(_blocks(completion) == blocks and pattern.fullmatch(completion.strip()) is not None)


def accuracy_reward(completion: str, solution: str | Sequence[str]) -> float:
    """1 if the answer is the class name, or one of its declared aliases, after `normalize_name`; otherwise 0."""
    answer = parse_answer(completion)
    names = [solution] if isinstance(solution, str) else solution
    return float(answer is not None and normalize_name(answer) in {normalize_name(name) for name in names})


def normalize_name(name: str) -> str:
    """Case, white space, `_`, `-` and punctuation at the ends do not make another name."""
    return " ".join(re.sub(r"[\s_-]", " ", name.casefold()).strip(" .,;:!?'\"`*()[]").split())


def published_accuracy(completion: str, solution: str | Sequence[str]) -> float:
    """The published substring rule, either way round, to compare with papers; 1 for the empty answer, so never train on it.

    As published, the whole text is searched where there is no answer block.
    """
    _, opened, rest = completion.partition("<answer>")
    inside, closed, _ = rest.partition("</answer>")
    answer = (inside if opened and closed else completion).strip().replace("_", " ").lower()
    names = [solution] if isinstance(solution, str) else solution
    return float(any(answer in (plain := name.replace("_", " ").lower()) or plain in answer for name in names))


def giou_reward(completion: str, solution: Box) -> float:
    """GIoU + 1 of the answer's box (reasoning grounding), in [0, 2]; 0 where there is no box."""
    box = parse_grounding(completion)
    return 0.0 if box is None else box_giou(box, solution) + 1.0


REWARDS = {
    "iou": iou_reward,
    "confidence": confidence_reward,
    "brier": brier_reward,
    "format": format_reward,
    "accuracy": accuracy_reward,
    "published_accuracy": published_accuracy,
    "giou": giou_reward,
}


def reward_weights(entries: Sequence[str]) -> dict[str, float]:
    """{reward: weight} of entries such as `iou`, `iou=0.5` or `my_rewards.py:my_reward=2`; without a weight it is 1.

    Raises ValueError for a weight that is not a number, and for a reward that is named twice.
    """
    weights: dict[str, float] = {}
    for entry in entries:
        name, weight = entry.rsplit("=", 1) if "=" in entry else (entry, "1")
        try:
            value = float(weight)
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise ValueError(f"the weight of {entry} is not a number; name=weight expected, as in iou=1")
        if name in weights:
            raise ValueError(f"{name} is named twice")
        weights[name] = value
    return weights


def choose_rewards(weights: dict[str, float], **settings) -> dict[str, tuple[Callable[[str, object], float], float]]:
    """{name: (reward(completion, solution), weight)}; each reward gets those of the settings that it takes.

    weights: names of REWARDS, or `file.py:function` for one of the user's, and their weights. Raises ValueError for a
    name that is not known and a function that cannot be had or called.
    """
    chosen = {}
    for name, weight in weights.items():
        if ".py:" in name:
            reward = load_reward(name)
            name = reward.__name__
        elif name in REWARDS:
            reward = REWARDS[name]
        else:
            raise ValueError(
                f"unknown reward {name}; known are {', '.join(REWARDS)}, and file.py:function for your own"
            )
        if name in chosen:
            raise ValueError(f"two rewards are called {name}, the name of their column in metrics.jsonl: rename yours")
        takes = list(inspect.signature(reward).parameters)[2:]
        chosen[name] = (partial(reward, **{key: settings[key] for key in takes if key in settings}), weight)
    return chosen


def load_reward(name: str) -> Callable[..., float]:
    """The reward `path/to/file.py:function` of the user's, with its results checked; ValueError names file and function."""
    file, _, function = name.rpartition(":")
    path = Path(file)
    if not path.is_file():
        raise ValueError(f"{name}: no file {file}")
    spec = importlib.util.spec_from_file_location(f"reward_file_{path.stem}", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)  # what is wrong in there is best said by Python's own traceback
    reward = getattr(module, function, None)
    if not inspect.isfunction(reward):
        raise ValueError(
            f"{file} has no function {function}; expected def {function}(completion: str, solution) -> float"
        )
    try:
        inspect.signature(reward).bind("completion", "solution")
    except TypeError as error:
        raise ValueError(
            f"{file}: {function}{inspect.signature(reward)} cannot be called as {function}(completion, solution) ({error})"
        ) from None

    @functools.wraps(reward)
    def checked(completion: str, solution: object, **settings) -> float:
        value = reward(completion, solution, **settings)
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            raise ValueError(f"{file}: {function} returned {value!r}, not a finite number, for {completion[:200]!r}")
        return number

    return checked
