"""Verifiable rewards of Visual-RFT (arXiv 2503.01785): text in, number out.

Every reward is a function `reward(completion, solution, ...) -> float`, and is

    pure     the same text and solution give the same number: no clock, no file, no model;
    total    every string gets a finite number in the documented range, never an exception;
    linear   the time is proportional to the length of the text, up to megabytes.

A completion is `<think> ... </think><answer> ... </answer>`. The answer of detection is a list of boxes
`[{'Position': [x1, y1, x2, y2], 'Confidence': 0.87}, ...]` or the words `No Objects`, of classification a name, of
grounding `(x1,y1),(x2,y2)`. Boxes are (x1, y1, x2, y2) with x1 < x2 and y1 < y2, in the same coordinates in completion
and solution. Any coordinates will do: IoU does not change when an axis is scaled.

The second half of test_rewards.py lists the differences from the published reward code, with reasons. To add a reward,
write such a function and enter it in REWARDS, or leave this file alone and name yours on the command line:
`--rewards iou=1 my_rewards.py:my_reward=0.5`.
"""

import importlib.util
import inspect
import math
import re
import sys
import unicodedata
from collections.abc import Callable, Sequence
from functools import partial, wraps
from pathlib import Path

Box = tuple[float, float, float, float]

# ------------------------------------------------------------------------------------------------
# Parsing. Rewards, evaluation and drawing use the same parsers, so that all of them see the same answer. Patterns are
# anchored or start at a literal, and no two neighboring parts can match the same text: backtracking is at most linear.
# Digits are bounded, because converting a number is not linear in its length.

_NUMBER = r"([-+]?(?:\d{1,32}(?:\.\d{0,32})?|\.\d{1,32})(?:[eE][-+]?\d{1,3})?)"
_POSITION = rf"""['"]Position['"]\s*:\s*\[\s*{_NUMBER}\s*,\s*{_NUMBER}\s*,\s*{_NUMBER}\s*,\s*{_NUMBER}\s*\]"""
_CONFIDENCE = rf"""['"]Confidence['"]\s*:\s*{_NUMBER}"""
_DETECTION = re.compile(rf"\{{\s*{_POSITION}\s*,\s*{_CONFIDENCE}\s*\}}")
_COMMA = re.compile(r"\s*,\s*")
_CORNERS = re.compile(rf"\(\s*{_NUMBER}\s*,\s*{_NUMBER}\s*\)\s*,\s*\(\s*{_NUMBER}\s*,\s*{_NUMBER}\s*\)")
_FENCE = re.compile(r"```[a-z]*\s(.*)```", re.DOTALL)
_THINK_ANSWER = re.compile(r"<think>(.*?)</think>\s*<answer>(.*?)</answer>", re.DOTALL)
_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_PLAIN = str.maketrans("\N{MINUS SIGN}\N{HYPHEN}\N{EN DASH}\N{RIGHT SINGLE QUOTATION MARK}", "---'")  # typographic ones


def _blocks(completion: str) -> tuple[int, int]:
    """Count the complete <think> and <answer> blocks; -1 if the numbers of opening and closing tags differ."""
    counts = ((completion.count(f"<{tag}>"), completion.count(f"</{tag}>")) for tag in ("think", "answer"))
    return tuple(opened if opened == closed else -1 for opened, closed in counts)


def parse_answer(completion: str) -> str | None:
    """Return the stripped text of the answer block; None without one, and if there are two blocks of a kind."""
    think, answer = _blocks(completion)
    if answer != 1 or think > 1:
        return None
    found = _ANSWER.search(completion)
    return found.group(1).strip() if found else None


def parse_detections(completion: str) -> list[tuple[Box, float]] | None:
    """Return the (box, confidence) pairs of a detection answer, highest confidence first, each box once.

    A repeated box gets its highest confidence, not its first, so that the order of the text does not matter.
    None as `written_detections` does.
    """
    if (found := written_detections(completion)) is None:
        return None
    confidence_of: dict[Box, float] = {}
    for box, confidence in found:
        confidence_of[box] = max(confidence, confidence_of.get(box, 0.0))
    return sorted(confidence_of.items(), key=lambda pair: (-pair[1], pair[0]))


def written_detections(completion: str) -> list[tuple[Box, float]] | None:
    """Return the (box, confidence) pairs of a detection answer as they are written, repeated boxes too.

    `No Objects` and `[]` give the empty list. A malformed answer gives None: anything but a whole list, a box that is
    reversed or empty, a number that is not finite, a confidence outside [0, 1].
    """
    text = parse_answer(completion)
    if text is None:
        return None
    if fenced := _FENCE.fullmatch(text):
        text = fenced.group(1).strip()
    if text == "No Objects":
        return []
    if text.startswith("[[") and text.endswith("]]"):
        text = text[1:-1].strip()  # accepted, because the published parser finds the inner list
    if not (text.startswith("[") and text.endswith("]")):
        return None
    body = text[1:-1].strip()
    pairs, at = [], 0
    while at < len(body):
        found = _DETECTION.match(body, at)
        if not found:
            return None
        *corners, confidence = map(float, found.groups())
        if not (is_box(corners) and 0.0 <= confidence <= 1.0):
            return None
        pairs.append((tuple(corners), confidence))
        at = found.end()
        if comma := _COMMA.match(body, at):
            at = comma.end()
        elif at < len(body):
            return None
    return pairs


def parse_grounding(completion: str) -> Box | None:
    """Return the `(x1,y1),(x2,y2)` of a grounding answer; None unless it has exactly one, not reversed or empty."""
    found = _CORNERS.findall(parse_answer(completion) or "")
    if len(found) != 1:
        return None
    corners = tuple(map(float, found[0]))
    return corners if is_box(corners) else None


def is_box(value: object) -> bool:
    """Return whether a value is four finite numbers with x1 < x2 and y1 < y2."""
    numbers = isinstance(value, (list, tuple)) and all(isinstance(v, (int, float)) and math.isfinite(v) for v in value)
    return numbers and len(value) == 4 and value[0] < value[2] and value[1] < value[3]


# ------------------------------------------------------------------------------------------------
# Geometry.


def _areas(a: Box, b: Box) -> tuple[float, float]:
    """Return the areas of intersection and union as fractions of the smallest box around both.

    Corners are compared before anything is multiplied, and sizes are fractions, so that no finite box overflows.
    """
    left, top, right, bottom = min(a[0], b[0]), min(a[1], b[1]), max(a[2], b[2]), max(a[3], b[3])
    width, height = right - left, bottom - top
    if not (0.0 < width < math.inf and 0.0 < height < math.inf):
        return 0.0, 1.0
    wide = max(0.0, min(a[2], b[2]) - max(a[0], b[0])) / width
    high = max(0.0, min(a[3], b[3]) - max(a[1], b[1])) / height
    area_a = ((a[2] - a[0]) / width) * ((a[3] - a[1]) / height)
    area_b = ((b[2] - b[0]) / width) * ((b[3] - b[1]) / height)
    return wide * high, area_a + area_b - wide * high


def box_iou(a: Box, b: Box) -> float:
    """Compute the intersection over union of two (x1, y1, x2, y2) boxes, in [0, 1]."""
    intersection, union = _areas(a, b)
    return min(1.0, intersection / union) if union > 0 else 0.0


def box_giou(a: Box, b: Box) -> float:
    """Compute the generalized IoU (arXiv 1902.09630): IoU - (enclosing - union) / enclosing, in [-1, 1]."""
    _, union = _areas(a, b)
    return max(-1.0, box_iou(a, b) - max(0.0, 1.0 - union))


def match(detections: Sequence[tuple[Box, float]], targets: Sequence[Box], iou_threshold: float) -> list[float]:
    """Match detections to targets one to one (Visual-RFT section 3.2); return each detection's IoU, 0.0 unmatched.

    In order of confidence, each detection takes the free target that it overlaps most, if by more than
    `iou_threshold`. Among equal confidences the highest IoU is matched first, then coordinates decide: neither
    the order of the answer nor the order of the solution matters.
    detections: (box, confidence) pairs in any order; the result is in the same order.
    """
    pairs = sorted(
        (-confidence, -iou, box, tuple(target), i, j)
        for i, (box, confidence) in enumerate(detections)
        for j, target in enumerate(targets)
        if (iou := box_iou(box, target)) > iou_threshold
    )
    matched, free = [0.0] * len(detections), set(range(len(targets)))
    for _, negative_iou, _, _, i, j in pairs:
        if matched[i] == 0.0 and j in free:
            matched[i] = -negative_iou
            free.remove(j)
    return matched


# ------------------------------------------------------------------------------------------------
# Rewards. `solution` is a list of boxes (detection), a name or a list of accepted names (classification), or one box.


def iou_reward(completion: str, solution: Sequence[Box], iou_threshold: float = 0.5) -> float:
    """Return the sum of IoUs above iou_threshold / max(targets, predictions), in [0, 1]; 1 for a right `No Objects`.

    The paper (eq. 3) divides by the number of predictions, so that one box in a crowd earns the full reward; the
    published code divides by the larger number, and so do we.
    """
    detections = parse_detections(completion)
    if not detections:
        return float(detections == [] and not solution)
    return math.fsum(match(detections, solution, iou_threshold)) / max(len(detections), len(solution))


def f1_reward(completion: str, solution: Sequence[Box], iou_threshold: float = 0.5) -> float:
    """Return F1 of P = sum of matched IoU / predictions and R = the same sum / targets, in [0, 1] (arXiv 2510.12798).

    Boxes are matched one to one whatever their confidence, and a repeated box counts: one target and its box twice
    earn 2/3. 1 for a right `No Objects`. With iou_threshold 0, a box around the whole image earns a little.
    """
    found = written_detections(completion)
    if found is None:
        return 0.0
    matched = match([(box, 1.0) for box, _ in found], solution, iou_threshold)
    return 2.0 * math.fsum(matched) / (len(found) + len(solution)) if found or solution else 1.0


def confidence_reward(completion: str, solution: Sequence[Box], iou_threshold: float = 0.5) -> float:
    """Return the mean over predictions of c if matched, 1 - c if not (Visual-RFT eq. 4 and 5), in [0, 1].

    It is linear in c, hence maximal at 0 or 1 whatever the odds: confidences drift to the ends, and a junk box with
    confidence 0 earns the full reward. `brier_reward` is maximal at the true odds.
    """
    return _confidence(completion, solution, iou_threshold, lambda c, matched: c if matched else 1.0 - c)


def brier_reward(completion: str, solution: Sequence[Box], iou_threshold: float = 0.5) -> float:
    """Return the mean over predictions of 1 - (c - matched)^2 (Brier 1950, a proper score), in [0, 1]; our addition."""
    return _confidence(completion, solution, iou_threshold, lambda c, matched: 1.0 - (c - matched) ** 2)


def _confidence(completion, solution, iou_threshold, score) -> float:
    """Return the mean of score(confidence, matched) over predictions; 1 for a right `No Objects`."""
    detections = parse_detections(completion)
    if not detections:
        return float(detections == [] and not solution)
    ious = match(detections, solution, iou_threshold)
    return math.fsum(score(c, iou > 0.0) for (_, c), iou in zip(detections, ious)) / len(detections)


def format_reward(completion: str, solution: object = None, think: bool = True) -> float:
    """Return 1 if the completion is a think block (unless think=False), an answer block and white space; else 0."""
    pattern, blocks = (_THINK_ANSWER, (1, 1)) if think else (_ANSWER, (0, 1))
    return float(_blocks(completion) == blocks and pattern.fullmatch(completion.strip()) is not None)


def accuracy_reward(completion: str, solution: str | float | Sequence[str]) -> float:
    """Return 1 if the answer is the class name or one of its aliases, after `normalize_name`; otherwise 0."""
    answer = parse_answer(completion)
    names = [solution] if isinstance(solution, (str, int, float)) else solution
    # 3 and 3.0 are the text "3": rows often hold numbers.
    accepted = [f"{name:.15g}" if isinstance(name, float) else str(name) for name in names]
    return float(answer is not None and normalize_name(answer) in set(map(normalize_name, accepted)))


def non_repeat_reward(completion: str, solution: object = None) -> float:
    """Return 0 if a sentence before <answer> is repeated, 1 otherwise (after VisionReasoner, arXiv 2505.12081).

    Sentences with two words, or 4 CJK letters in a row, count, after `normalize_name`. It invites empty thoughts: 1.
    """
    thought = re.sub("</?think>", " ", completion.partition("<answer>")[0])
    parts = map(normalize_name, re.split(r"[.!?;](?!\d)|[。！？；\n]", thought))
    sentences = [words for words in parts if re.search(r"\w \w|[\u3040-\u9fff]{4}", words)]
    return float(len(set(sentences)) == len(sentences))


def normalize_name(name: str) -> str:
    """Remove the differences between spellings: Unicode form, case, white space, `_`, `-`, punctuation at the ends."""
    text = re.sub(r"(?<=\d)[⁰¹²³⁴-⁹⁺⁻]+", r"^\g<0>", name)  # NFKC would make 105 of 10⁵
    text = unicodedata.normalize("NFKC", text).casefold().translate(_PLAIN)
    text = re.sub(r"(?<![\w.)\]])(?<![\w.)\]]['\"])-(?=[^\s_-])", "\0", text)  # a sign stays, a hyphen does not
    text = re.sub(r"(?<![\w.])\.(?=\d)", "0.", text)
    plain = " ".join(re.sub(r"[\s_-]", " ", text).strip(" .,;:!?'\"`*()[]“”‘„«»。").split()).replace("\0", "-")
    return plain or text.strip()  # a name of punctuation is not the empty answer


def published_accuracy(completion: str, solution: str | Sequence[str]) -> float:
    """Return 1 if answer or name contains the other: the published rule, for comparison with papers.

    The empty answer earns 1, so never train on it. As published, the whole text counts if there is no answer block.
    """
    _, opened, rest = completion.partition("<answer>")
    inside, closed, _ = rest.partition("</answer>")
    answer = (inside if opened and closed else completion).strip().replace("_", " ").lower()
    names = [solution] if isinstance(solution, str) else solution
    return float(any(answer in (plain := name.replace("_", " ").lower()) or plain in answer for name in names))


def giou_reward(completion: str, solution: Box) -> float:
    """Return GIoU + 1 of the answer's box (reasoning grounding), in [0, 2]; 0 without a box."""
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
    "f1": f1_reward,
    "non_repeat": non_repeat_reward,
}


def reward_weights(entries: Sequence[str]) -> dict[str, float]:
    """Parse entries such as `iou`, `iou=0.5` or `my_rewards.py:my_reward=2` to {reward: weight}; the default is 1.

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


def answer_shares(texts: Sequence[str], parse: Callable) -> dict[str, float]:
    """Return signs of collapse: the shares of answers that parse, say `No Objects`, or have a wordless think block."""
    parsed = [parse(text) for text in texts]
    thoughts = [text.partition("<think>")[2].partition("</think>")[0] if "<think>" in text else None for text in texts]
    signs = {
        "parsed": [p is not None for p in parsed],
        "no_objects": [p == [] for p in parsed],
        "empty_think": [thought is not None and not any(map(str.isalnum, thought)) for thought in thoughts],
    }
    return {name: sum(found) / max(1, len(texts)) for name, found in signs.items()}


def score_group(reward: Callable, completions: Sequence[str], solution: object, **context) -> list[float]:
    """Score the completions of one prompt; `context` goes to a reward that has a parameter of such a name.

    A reward that returns None abstains: the mean of the others stands in; 0 if all abstain.
    """
    given = {name: context[name] for name in asked_for(reward) & context.keys()}
    values = [reward(completion, solution, **given) for completion in completions]
    known = [value for value in values if value is not None]
    mean = math.fsum(known) / len(known) if known else 0.0
    return [float(mean if value is None else value) for value in values]


def asked_for(reward: Callable) -> set[str]:
    """Return the names of a reward's parameters after completion and solution."""
    return set(list(inspect.signature(reward).parameters)[2:])


def choose_rewards(weights: dict[str, float], **settings) -> dict[str, tuple[Callable[[str, object], float], float]]:
    """Look up rewards by name: {name: (reward(completion, solution), weight)}.

    weights: {name in REWARDS or `file.py:function`: weight}. settings: passed to rewards that have such a parameter.
    A reward may also have the parameters `example`, `images` and `iou_threshold`, which `score_group` gives.
    Raises ValueError for an unknown name, and as load_reward does.
    """
    chosen = {}
    for name, weight in weights.items():
        reward = load_reward(name) if ".py:" in name else REWARDS.get(name)
        if reward is None:
            raise ValueError(f"unknown reward {name}; known are {', '.join(REWARDS)}, file.py:function for yours")
        name = name.rpartition(":")[2]
        if name in chosen:
            raise ValueError(f"two rewards are called {name}, the name of their column in metrics.jsonl: rename yours")
        given = {key: settings[key] for key in asked_for(reward) & settings.keys()}
        chosen[name] = (partial(reward, **given), weight)
    return chosen


def load_reward(name: str) -> Callable[..., float]:
    """Load a user's `path/to/file.py:function` and check its results. Raises ValueError, naming file and function."""
    file, _, function = name.rpartition(":")
    if not (path := Path(file)).is_file():
        raise ValueError(f"{name}: no file {file}")
    spec = importlib.util.spec_from_file_location(f"reward_file_{path.stem}", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)  # errors in the file keep Python's own traceback
    reward = getattr(module, function, None)
    if not inspect.isfunction(reward):
        raise ValueError(f"{file} has no function {function}; expected def {function}(completion, solution) -> float")
    signature = inspect.signature(reward)
    try:
        given = {"example", "images", "iou_threshold"} & signature.parameters.keys()
        signature.bind("completion", "solution", **dict.fromkeys(given))
    except TypeError as error:
        call = f"{function}(completion, solution)"
        raise ValueError(f"{file}: {function}{signature} cannot be called as {call} ({error})") from None

    @wraps(reward)
    def checked(completion: str, solution: object, **settings) -> float | None:
        if (value := reward(completion, solution, **settings)) is None:
            return None
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            raise ValueError(f"{file}: {function} returned {value!r}, not a finite number, for {completion[:200]!r}")
        return number

    return checked
