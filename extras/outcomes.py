"""Tell how an answer went wrong, and whether one evaluation is better than another by more than chance."""

import math
from collections.abc import Sequence
from typing import Any

from rewards import accuracy_reward, box_iou, match

# Where a row of predictions.jsonl has the parsed answer, and the metric of its task.
ANSWER_KEYS = {"detections": "detection", "box": "grounding", "name": "classification", "answer": "rewards"}

OUTCOMES = {  # marks differ, so that no color is needed
    "found": "✓ everything found, nothing invented",
    "right": "✓ right",
    "missed": "○ an object missed (IoU with each is 0.5 or less)",
    "invented": "+ all found, and a box invented",
    "wrong": "✗ wrong",
    "not parsed": "? not parsed: another form than asked for, or an empty box",
}


def answer_of(r: dict) -> tuple[str, Any]:
    """Return the metric and the parsed answer of a row of predictions.jsonl; None if it did not parse."""
    return next((metric, r[key]) for key, metric in ANSWER_KEYS.items() if key in r)


def outcome(r: dict) -> str:
    """Return a key of OUTCOMES for a row of predictions.jsonl."""
    metric, answer = answer_of(r)
    if answer is None:
        return "not parsed"
    if metric == "detection":
        matched = match([(tuple(box), confidence) for box, confidence in answer], r["solution"], 0.5)
        if sum(iou > 0 for iou in matched) < len(r["solution"]):
            return "missed"
        return "found" if all(matched) or not r["exhaustive"] or r["crowds"] else "invented"
    if metric == "grounding":
        return "found" if box_iou(answer, r["solution"]) > 0.5 else "missed"
    earned = [value for name, value in r["rewards"].items() if name != "format"]
    by_name = metric == "classification"
    good = accuracy_reward(r["completion"], r["solution"]) if by_name else max(earned, default=0) > 0.5
    return "right" if good else "wrong"


def sign_test(gained: int, lost: int) -> float:
    """Return the two-sided p: how likely a split at least this uneven is if each change is a coin's toss."""
    n, fewer = gained + lost, min(gained, lost)
    return min(1.0, 2 * sum(math.comb(n, k) for k in range(fewer + 1)) / 2**n)


def compared(before: Sequence[dict], after: Sequence[dict]) -> tuple[int, int, float]:
    """Return how many questions were gained and lost (found or right, by id), and the sign test's p."""
    good = [{r["id"]: outcome(r) in ("found", "right") for r in records} for records in (before, after)]
    both = good[0].keys() & good[1].keys()
    gained = sum(good[1][id] and not good[0][id] for id in both)
    lost = sum(good[0][id] and not good[1][id] for id in both)
    return gained, lost, sign_test(gained, lost)
