"""From answers to a score, with no model in it: AP, accuracy or IoU by task, means of rewards, pictures, curves.

Answers are parsed by the rewards' own parser and compared in original pixels, the frame of the annotations. What a
score means depends on what was asked (`protocol_of`), and it is printed beside it, as is the share of answers that parsed:
the others count as wrong.

An evaluation writes every answer as soon as it has it, so that an interrupted one goes on where it stopped: `unfinished`
and `recover`.
"""

import contextlib
import io
import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from data import DataError, Example, Fit, Prompt, Task, boxes_in, class_of, map_boxes, model_size, open_image, to_pixels
from rewards import Box, accuracy_reward, box_iou, published_accuracy

# ------------------------------------------------------------------------------------------------
# One answer.


def record(task: Task, example: Example, target: tuple[int, int], text: str, rewards: dict[str, float]) -> dict:
    """One answer as predictions.jsonl keeps it; boxes in original pixels.

    target: size of the coordinates the answer speaks. What the answer says is under the `key` of the task's metric, null
    where it does not parse.
    """
    answer = task.parse(text)
    if task.boxes:
        answer = map_boxes(answer, lambda box: to_pixels(box, example.size, target))
    return {
        "id": example.id,
        "image_id": example.image_id,
        "category": example.category,
        "category_id": example.category_id,
        "size": example.size,
        "solution": example.solution,
        "crowds": example.crowds,
        "exhaustive": example.exhaustive,
        "completion": text,
        METRICS[task.metric].key: answer,
        "rewards": rewards,
    }


def answer_shares(texts: Sequence[str], parse: Callable) -> dict[str, float]:
    """Shares of answers that parse, that say `No Objects`, and whose think block holds no word: signs of collapse."""
    parsed = [parse(text) for text in texts]
    thoughts = [text.partition("<think>")[2].partition("</think>")[0] for text in texts]
    n = max(1, len(texts))
    return {
        "parsed": sum(p is not None for p in parsed) / n,
        "no_objects": sum(p == [] for p in parsed) / n,
        "empty_think": sum(not any(c.isalnum() for c in thought) for thought in thoughts) / n,
    }


# ------------------------------------------------------------------------------------------------
# Scores of many answers, by kind of answer: score(records) -> (overall, {category: the same for it}).

Scores = dict[str, float]


EVERYWHERE = (-1e6, -1e6, 1e6, 1e6)  # a crowd region that any box lies in


def detection_scores(records: Sequence[dict]) -> tuple[Scores, dict[str, Scores]]:
    """AP (IoU 0.50 to 0.95), AP50 and AP75 by pycocotools, in [0, 1], overall and for each category that has targets.

    Crowd regions neither count nor are missed; where a record is not `exhaustive`, neither do boxes that match nothing.
    This is LVIS's federated AP (Gupta et al. 2019, section 3) but for its limit of 300 boxes an image, here 100 of each
    category; the only release of the package `lvis`, 0.5.3, does not run with the NumPy of requirements.txt.
    """
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    annotations = [
        coco_box(r, box) | {"area": (box[2] - box[0]) * (box[3] - box[1]), "iscrowd": crowd}
        for r in records
        for crowd, boxes in ((0, r["solution"]), (1, r["crowds"]), (1, () if r["exhaustive"] else (EVERYWHERE,)))
        for box in boxes
    ]
    name_of = {r["category_id"]: r["category"] for r in records}
    truth = COCO()
    truth.dataset = {
        "info": {},
        "images": [{"id": i} for i in dict.fromkeys(r["image_id"] for r in records)],
        "categories": [{"id": i, "name": name} for i, name in name_of.items()],
        "annotations": [{"id": i, **annotation} for i, annotation in enumerate(annotations, 1)],
    }
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
        found = coco_results(records)
        evaluation = COCOeval(truth, truth.loadRes(found) if found else COCO(), "bbox")  # loadRes takes no empty list
        evaluation.evaluate()
        evaluation.accumulate()
    # [IoU threshold, recall, category, all areas, 100 detections]; -1 where a category has no target
    precision = evaluation.eval["precision"][:, :, :, 0, -1]
    overall = average_precision(precision[:, :, (precision > -1).any((0, 1))])
    each = {name_of[id]: precision[:, :, k] for k, id in enumerate(evaluation.params.catIds)}
    return overall, {name: average_precision(values) for name, values in each.items() if (values > -1).any()}


def average_precision(precision: np.ndarray) -> Scores:
    """AP, AP50 and AP75 of precisions at the 10 thresholds of COCO, [10, recall, ...]; 0 where nothing was to be found."""
    values = precision if precision.size else np.zeros((10, 1))
    return {"AP": float(values.mean()), "AP50": float(values[0].mean()), "AP75": float(values[5].mean())}


def coco_box(r: dict, box: Box) -> dict:
    """A box of a record as COCO's formats have it: bbox is x, y, width, height."""
    x1, y1, x2, y2 = box
    return {"image_id": r["image_id"], "category_id": r["category_id"], "bbox": [x1, y1, x2 - x1, y2 - y1]}


def coco_results(records: Sequence[dict]) -> list[dict]:
    """The detections in COCO's results format: image_id, category_id, bbox and score."""
    return [coco_box(r, box) | {"score": score} for r in records for box, score in r["detections"] or []]


def classification_scores(records: Sequence[dict]) -> tuple[Scores, dict[str, Scores]]:
    """The share of right names, by this project's rule and by the published one, overall and per class."""

    def shares(records: Sequence[dict]) -> Scores:
        return {
            name: float(np.mean([rule(r["completion"], r["solution"]) for r in records]))
            for name, rule in (("accuracy", accuracy_reward), ("published_accuracy", published_accuracy))
        }

    return shares(records), {name: shares(group) for name, group in by_category(records).items()}


def grounding_scores(records: Sequence[dict]) -> tuple[Scores, dict[str, Scores]]:
    """Mean IoU, cumulative IoU (all intersections / all unions, in pixels) and the share of IoUs above 0.5.

    An answer without a box has IoU 0. In the sums a box is cut to its image, or one wild answer would outweigh all.
    """
    ious, intersections, unions = [], 0.0, 0.0
    for r in records:
        box, target = r["box"], r["solution"]
        ious.append(box_iou(box, target) if box else 0.0)
        corners = [min(max(0.0, value), side) for value, side in zip(box or (0.0, 0.0, 0.0, 0.0), r["size"] * 2)]
        intersection = area((*map(max, corners[:2], target[:2]), *map(min, corners[2:], target[2:])))
        intersections += intersection
        unions += area(corners) + area(target) - intersection
    above = float(np.mean([iou > 0.5 for iou in ious]))
    return {"mean_iou": float(np.mean(ious)), "cumulative_iou": intersections / unions, "iou_above_0.5": above}, {}


def area(box: Sequence[float]) -> float:
    return max(0.0, box[2] - box[0]) * max(0.0, box[3] - box[1])


def no_scores(records: Sequence[dict]) -> tuple[Scores, dict[str, Scores]]:
    """For tasks of the user's own, whose rewards are their scores."""
    return {}, {}


def by_category(records: Sequence[dict]) -> dict[str, list[dict]]:
    groups = defaultdict(list)
    for r in records:
        groups[r["category"]].append(r)
    return dict(sorted(groups.items()))


@dataclass(frozen=True)
class Metric:
    """How the answers of one kind are kept, scored and drawn; a task chooses one by its name in METRICS.

    key     what the parsed answer is called in predictions.jsonl
    score   records -> (overall, by category)
    means   what the numbers are, for the protocol line
    drawn   parsed answer -> [(box, label), ...] in original pixels
    """

    key: str
    score: Callable[[Sequence[dict]], tuple[Scores, dict[str, Scores]]]
    means: str
    drawn: Callable[[object], list[tuple[Box, str]]] = lambda answer: []


METRICS = {
    "detection": Metric(
        "detections",
        detection_scores,
        "COCO's AP (pycocotools) in original pixels over the (image, category) pairs asked",
        lambda detections: [(box, f"{confidence:.2f}") for box, confidence in detections],
    ),
    "classification": Metric(
        "name",
        classification_scores,
        "accuracy: the class name or a declared alias; published_accuracy: the paper's substring rule, either way round, "
        "which also pays the empty answer",
    ),
    "grounding": Metric("box", grounding_scores, "IoU of one box in original pixels", lambda box: [(box, "")]),
    "rewards": Metric("answer", no_scores, "means of the rewards"),
}

ASKED = {  # --eval_categories
    "gt": "only for what it shows (and --negatives), or for what its row asks",
    "all": "for all categories of the file",
    "listed": "for all of --categories",
}


def protocol_of(task: Task, eval_categories: str) -> str:
    """What the scores mean: it belongs beside every one of them."""
    asked = f"each image asked {ASKED[eval_categories]} (--eval_categories {eval_categories})"
    parts = ["greedy answers", METRICS[task.metric].means, asked if task.asks_for == "categories" else "", task.caveat]
    return "; ".join(filter(None, parts))


def scores(records: Sequence[dict], task: Task) -> tuple[Scores, dict[str, Scores]]:
    """Overall: the mean of every reward, the shares of answer_shares and the task's metric. By category: the metric.

    The share of answers that parsed stands in both. Raises DataError if there are no records.
    """
    if not records:
        raise DataError("no image could be opened: there is nothing to evaluate")
    overall = {name: float(np.mean([r["rewards"][name] for r in records])) for name in records[0]["rewards"]}
    overall |= answer_shares([r["completion"] for r in records], task.parse)
    metric, each = METRICS[task.metric].score(records)
    groups = by_category(records)
    for name, values in each.items():
        answers = [r[METRICS[task.metric].key] for r in groups[name]]
        values |= {"parsed": sum(answer is not None for answer in answers) / len(answers), "answers": len(answers)}
    return overall | metric, each


def report(overall: Scores, each: dict[str, Scores], count: int, protocol: str, lines: int = 20) -> str:
    """Scores as a person reads them, with the protocol and the parsed share beside them; `lines` categories at most."""

    def line(values: Scores) -> str:
        return "   ".join(
            f"{name} {value:.4f}" if isinstance(value, float) else f"{name} {value}" for name, value in values.items()
        )

    text = [f"Protocol: {protocol}", f"{count} answers, {overall['parsed']:.1%} of them parsed", line(overall)]
    text += [f"  {name:24s} {line(values)}" for name, values in list(each.items())[:lines]]
    return "\n".join(text + [f"  and {len(each) - lines} categories more, in scores.json"] * (len(each) > lines))


# ------------------------------------------------------------------------------------------------
# A first look, before anything is trained: --check.


def box_fit(prompts: Sequence[Prompt], texts: Sequence[str], task: Task, fit: Fit, coordinates: str) -> float:
    """How well the boxes of the answers lie if they are meant in these coordinates, in [0, 1].

    The mean over all true boxes of their best IoU with any answered box: no threshold, no matching. G answers per
    prompt, in order; an answer without boxes counts 0.
    """
    ious, G = [], len(texts) // len(prompts)
    for i, text in enumerate(texts):
        example = prompts[i // G].example
        target = model_size(coordinates, fit.size(*example.size))
        found = [to_pixels(box, example.size, target) for box in boxes_in(task.parse(text) or [])]
        ious += [max((box_iou(box, true) for box in found), default=0.0) for true in boxes_in(example.solution)]
    return float(np.mean(ious)) if ious else 0.0


def doubts(facts: dict[str, float], in_force: str) -> list[str]:
    """What looks wrong in the facts of a check, each with what to do about it; an empty list if nothing does.

    facts: parsed, truncated, empty_think (where thoughts are asked for), no_objects, true_no_objects, zero_variance_groups in
    [0, 1], and for tasks with boxes "iou as relative" and "iou as pixels" (box_fit); in_force: which of the two the prompts state.
    """
    found = []
    if facts["parsed"] < 0.5:
        found.append("most answers do not parse: compare the answers below with the form that the prompt asks for")
    if facts["truncated"] > 0.2:
        found.append(
            "many answers are cut off: raise --max_completion_tokens, or leave out crowded images by --max_boxes"
        )
    if (here := facts.get(f"iou as {in_force}")) is not None:
        other = {"relative": "pixels", "pixels": "relative"}[in_force]
        if facts[f"iou as {other}"] > here + 0.1:
            found.append(f"the boxes fit better as {other} than as {in_force}: try --coordinates {other}")
        elif max(here, facts[f"iou as {other}"]) < 0.1:
            found.append("the boxes fit in neither convention: look at the picture; an IoU reward will stay near 0")
    if facts["no_objects"] > facts["true_no_objects"] + 0.3:
        found.append("No Objects is said far more often than it is true: training can collapse into it")
    if facts["zero_variance_groups"] > 0.7:
        found.append(
            "most groups have equal rewards, and teach nothing: raise --group_size, or take harder or easier data"
        )
    if facts.get("empty_think", 0) > 0.9:
        found.append("thoughts are empty: --think false costs less and may score as well")
    return found


# ------------------------------------------------------------------------------------------------
# Files.


def append_rows(file: Path, rows: Sequence[dict]) -> None:
    """Add JSON lines, one write, so that an interruption leaves at most one unfinished line at the end."""
    with file.open("a", encoding="utf-8") as out:
        out.write("".join(json.dumps(row) + "\n" for row in rows))


def drop_rows_after(file: Path, step: int) -> None:
    """Keep the JSON lines up to a step; a last line that an interruption cut off goes too."""
    if not file.exists():
        return
    aside = file.with_suffix(".unfinished")
    with file.open(encoding="utf-8") as rows, aside.open("w", encoding="utf-8") as kept:
        for line in rows:
            if line.endswith("\n") and json.loads(line)["step"] <= step:
                kept.write(line)
    aside.replace(file)


def read_predictions(file: Path) -> list[dict]:
    """The records of a predictions file; a last line that an interruption left unfinished is dropped."""
    whole = file.read_text(encoding="utf-8").split("\n")[:-1]  # not what is behind the last line break
    try:
        return [json.loads(line) for line in whole]
    except json.JSONDecodeError as error:
        raise DataError(f"{file}: a line in the middle is not JSON ({error}); --overwrite true starts over") from None


def own_predictions(out: Path, process: int) -> Path:
    """Where a process of an evaluation adds its answers until all are there."""
    return out / f"predictions.{process}.jsonl"


INDIFFERENT = ("overwrite", "workers", "eval_batch", "report_to")  # settings that change no answer


def is_run_or_new(out: Path) -> bool:
    """Whether `out` holds no config.json, or that of a run: model folders have one too, and must not be replaced by a run."""
    try:
        settings = json.loads((out / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return True
    except (NotADirectoryError, ValueError):
        return False
    return isinstance(settings, dict) and "out" in settings


def unfinished(out: Path, settings: dict) -> bool:
    """Whether `out` holds an interrupted evaluation of the same settings, model and rewards, which can go on.

    settings: the configuration as config.json keeps it; what does not change an answer may differ.
    """
    file, model = out / "config.json", Path(settings["model"])
    if not file.is_file() or (out / "scores.json").exists() or not settings.get("eval_only"):
        return False
    own_rewards = [Path(entry.rpartition(":")[0]) for entry in settings["rewards"] if ".py:" in entry]
    used = [part for part in (*(model.iterdir() if model.is_dir() else ()), *own_rewards) if part.exists()]
    if any(part.stat().st_mtime > file.stat().st_mtime for part in used):
        return False  # changed since the evaluation began
    same = json.loads(json.dumps(settings)) | dict.fromkeys(INDIFFERENT)
    return same == json.loads(file.read_text(encoding="utf-8")) | dict.fromkeys(INDIFFERENT)


def recover(out: Path, examples: Sequence[Example]) -> list[dict]:
    """The answers that an interrupted evaluation left in `out`, joined to one predictions.jsonl; none is no error.

    Raises DataError for answers to other questions than `examples`.
    """
    files = [out / "predictions.jsonl", *sorted(out.glob("predictions.*.jsonl"))]
    done = {r["row"]: r for file in files if file.exists() for r in read_predictions(file)}
    asked = {row: json.dumps([e.id, e.solution]) for row, e in enumerate(examples)}
    if any(asked.get(row) != json.dumps([r["id"], r["solution"]]) for row, r in done.items()):
        raise DataError(
            f"{out}: its predictions answer other questions, the data changed; --overwrite true starts over"
        )
    records = [done[row] for row in sorted(done)]
    if records:
        write_predictions(out, records)
    return records


def write_predictions(out: Path, records: Sequence[dict]) -> None:
    """predictions.jsonl, whole or not at all; it replaces the shards."""
    new = out / "predictions.jsonl.unfinished"
    new.unlink(missing_ok=True)
    append_rows(new, records)
    new.replace(out / "predictions.jsonl")
    for part in out.glob("predictions.*.jsonl"):
        part.unlink()


def write_evaluation(
    out: Path,
    task: Task,
    protocol: str,
    records: Sequence[dict],
    overall: Scores,
    each: dict[str, Scores],
    examples: Sequence[Example],
    pictures: int = 12,
) -> None:
    """predictions.jsonl, pictures, for detection detections.json (COCO's results format), and last scores.json."""
    out.mkdir(parents=True, exist_ok=True)
    write_predictions(out, records)
    if task.metric == "detection":
        (out / "detections.json").write_text(json.dumps(coco_results(records)) + "\n")
    for index in np.linspace(0, len(records) - 1, min(pictures, len(records)), dtype=int):
        row = records[index]["row"]
        draw_record(task, open_image(examples[row].images[0]), records[index], out / "pictures" / f"{row:06d}.png")
    summary = {"protocol": protocol, "answers": len(records), **overall, "categories": each}
    aside = out / "scores.json.unfinished"  # scores.json says that the evaluation is finished
    aside.write_text(json.dumps(summary, indent=2) + "\n")
    aside.replace(out / "scores.json")


# ------------------------------------------------------------------------------------------------
# Pictures and curves.


def draw_record(task: Task, image: Image.Image, r: dict, path: Path, least_side: int = 448) -> None:
    """Save the picture with true boxes (black) and answered boxes (magenta, labeled) on it, and the names above it."""
    metric = METRICS[task.metric]
    answer = r[metric.key]
    scale = max(1, round(least_side / min(image.size)))
    canvas = image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(16)
    for box in boxes_in(r["solution"]) if task.boxes else []:
        corners = [value * scale for value in box]
        draw.rectangle(corners, outline="black", width=5)
        draw.rectangle(corners, outline="white", width=2)
    for box, label in [] if answer is None else metric.drawn(answer):
        # An answer may name any number; what lies far outside is drawn at the edge.
        x1, y1, x2, y2 = (min(max(value, 0.0), limit) * scale for value, limit in zip(box, image.size * 2))
        draw.rectangle((x1, y1, max(x1, x2), max(y1, y2)), outline="magenta", width=3)
        draw.text((x1 + 5, y1 + 3), label, "magenta", font, stroke_width=1, stroke_fill="white")
    said = " - not parsed" if answer is None else " - No Objects" if answer == [] else f" - {class_of(answer) or ''}"
    framed = Image.new("RGB", (canvas.width, canvas.height + 24), "white")
    framed.paste(canvas, (0, 24))
    ImageDraw.Draw(framed).text((4, 2), f"{r['category']}{said}".rstrip(" -"), "black", font)
    path.parent.mkdir(parents=True, exist_ok=True)
    framed.save(path)


def draw_answer(task: Task, prompt: Prompt, text: str, path: Path) -> None:
    """draw_record for an answer as it came from the model, on the original picture."""
    r = record(task, prompt.example, prompt.target, text, {})
    draw_record(task, open_image(prompt.example.images[0]), r, path)


WINDOW = 20  # steps over which curves are smoothed


def smoothed(values: Sequence[float]) -> np.ndarray:
    """Means of WINDOW values, or of all where there are fewer; the first belongs to the last of its values."""
    width = min(WINDOW, len(values))
    return np.convolve(values, np.ones(width) / width, "valid")


def plot_curves(runs: Sequence[Path], path: Path) -> None:
    """curves.png from the metrics.jsonl of one run, or of several that differ in their seed: a line each, smoothed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    runs = [[json.loads(line) for line in run.read_text(encoding="utf-8").splitlines()] for run in runs]
    panels = [[n for n in runs[0][0] if n == "reward" or n.startswith("reward_") and n != "reward_std"]]
    panels += [
        ["reward_std", "zero_variance_groups", "parsed", "no_objects"],
        ["completion_tokens"],
        ["kl", "clip_fraction", "grad_norm"],
    ]
    figure, axes = pyplot.subplots(2, 2, figsize=(11, 7), constrained_layout=True)
    for axis, names in zip(axes.flat, panels):
        for color, name in enumerate(names):
            label = name
            for rows in runs:
                steps = [row["step"] for row in rows if name in row]
                if steps:
                    means = smoothed([row[name] for row in rows if name in row])
                    axis.plot(steps[-len(means) :], means, color=f"C{color}", label=label, linewidth=1.3)
                    label = None  # once, however many runs there are
        axis.set_xlabel(f"step (mean of {WINDOW})")
        if axis.lines:
            axis.legend(fontsize=8)
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
