"""Tell how an answer went wrong, and whether one evaluation is better than another by more than chance."""

import math
from collections.abc import Sequence
from typing import Any

from data import Example, Size, Task, map_boxes, to_pixels
from rewards import accuracy_reward, box_iou, match

# {metric of a task: the key of the parsed answer in predictions.jsonl}
ANSWER_KEYS = {"detection": "detections", "classification": "name", "grounding": "box", "rewards": "answer"}

OUTCOMES = {  # marks differ, so that no color is needed
    "found": "✓ all found, nothing invented: each box with an IoU above 0.5",
    "right": "✓ right",
    "missed": "○ an object missed: no box of its own with an IoU above 0.5",
    "invented": "+ a box invented: nothing missed, but a box where nothing is",
    "wrong": "✗ wrong",
    "not parsed": "? not parsed: not in the form asked for, or an empty box",
}


def parsed_answer(task: Task, example: Example, target: Size, text: str) -> Any:
    """Parse an answer, with boxes in original pixels; target: the image size that the text's coordinates refer to."""
    answer = task.parse(text)
    return map_boxes(answer, lambda box: to_pixels(box, example.size, target)) if task.boxes else answer


def answer_of(r: dict) -> tuple[str, Any]:
    """Return the metric of a row of predictions.jsonl, and its parsed answer: None if it did not parse."""
    return next((metric, r[key]) for metric, key in ANSWER_KEYS.items() if key in r)


def outcome(r: dict) -> str:
    """Return a key of OUTCOMES for a row of predictions.jsonl."""
    metric, answer = answer_of(r)
    if answer is None:
        return "not parsed"
    if metric == "detection":
        matched = match([(tuple(box), confidence) for box, confidence in answer], r["solution"], 0.5)
        if sum(iou > 0 for iou in matched) < len(r["solution"]):
            return "missed"
        # As in scoring: a box that matches nothing is no error on a crowd, nor where not every instance is known.
        loose = [box for (box, _), iou in zip(answer, matched) if not iou]
        excused = not r["exhaustive"] or all(any(lies_on(box, crowd) for crowd in r["crowds"]) for box in loose)
        return "found" if excused else "invented"
    if metric == "grounding":
        return "found" if box_iou(answer, r["solution"]) > 0.5 else "missed"
    if metric == "classification":
        return "right" if accuracy_reward(r["completion"], r["solution"]) else "wrong"
    earned = [value for name, value in r["rewards"].items() if name != "format"]
    return "right" if min(earned, default=0) > 0.5 else "wrong"  # by all: non_repeat alone is nearly always 1


def lies_on(box: Sequence[float], region: Sequence[float]) -> bool:
    """Return whether more than half of a box lies on a region, COCO's rule for crowds."""
    left, top, right, bottom = (pick(a, b) for pick, a, b in zip((max, max, min, min), box, region))
    area = (box[2] - box[0]) * (box[3] - box[1])
    return max(0.0, right - left) * max(0.0, bottom - top) > 0.5 * area


def sign_test(gained: int, lost: int) -> float:
    """Return the two-sided p: how likely a split at least this uneven is if each change is a coin's toss."""
    n, fewer = gained + lost, min(gained, lost)
    if n > 1000:  # the sum below would take seconds; by the normal distribution, with continuity correction
        return min(1.0, math.erfc(max(0.0, n / 2 - fewer - 0.5) / math.sqrt(n / 2)))
    return min(1.0, 2 * sum(math.comb(n, k) for k in range(fewer + 1)) / 2**n)


def gains(before: dict[str, bool], after: dict[str, bool]) -> tuple[int, int, float]:
    """Return how many questions were gained and lost, and the sign test's p; {id of a question: good or not}."""
    both = before.keys() & after.keys()
    gained = sum(after[id] and not before[id] for id in both)
    lost = sum(before[id] and not after[id] for id in both)
    return gained, lost, sign_test(gained, lost)
