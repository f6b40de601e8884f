"""Evaluate a model: answer a split's examples greedily and compute AP, accuracy or IoU (--eval_only, --eval_every).

The parser of the rewards parses the answers, and boxes are compared in original pixels, as they were annotated. A score
depends on which questions were asked: `protocol_of` describes them and is printed with every score. So is the share of
answers that parsed; the others count as wrong. Each batch of answers is written as soon as it is complete, so an
interrupted evaluation can be continued (`unfinished`, `recover`).
"""

import contextlib
import io
import json
import shutil
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from accelerate.utils import broadcast_object_list, gather_object
from tqdm import tqdm

from data import DataError, Example, Prompt, Task, append_rows, sound
from extras.checkpoints import used_files
from extras.draw import evenly, thumbnail, thumbnail_of
from extras.outcomes import ANSWER_KEYS, outcome, parsed_answer
from extras.report import rows_of, write_report, write_whole
from rewards import REWARDS, Box, accuracy_reward, answer_shares, box_iou, published_accuracy

# ------------------------------------------------------------------------------------------------
# One answer.


def record(task: Task, example: Example, target: tuple[int, int], text: str, rewards: dict[str, float]) -> dict:
    """Return one answer as a row of predictions.jsonl, with boxes in original pixels.

    target: the image size that the answer's coordinates refer to. The parsed answer is stored under the key of the
    task's metric in ANSWER_KEYS; it is null if the answer does not parse.
    """
    answer = parsed_answer(task, example, target, text)
    return {
        "id": example.id,
        "image_id": example.image_id,
        "category": example.category,
        "category_id": example.category_id,
        "question": example.question,  # null where the task asks for the category
        "size": example.size,
        "solution": example.solution,
        "crowds": example.crowds,
        "exhaustive": example.exhaustive,
        "completion": text,
        ANSWER_KEYS[task.metric]: answer,
        "rewards": rewards,
    }


# ------------------------------------------------------------------------------------------------
# Scores, one function per kind of answer: score(records) -> (overall scores, {category: its scores}).

Scores = dict[str, float]


EVERYWHERE = (-1e6, -1e6, 1e6, 1e6)  # a crowd region that contains every box


def detection_scores(records: Sequence[dict]) -> tuple[Scores, dict[str, Scores]]:
    """Compute AP (IoU 0.50 to 0.95), AP50 and AP75 with pycocotools, overall and for each category that has targets.

    Scores are in [0, 1]. Matching a crowd region is not counted, and missing one is not an error. In records that are
    not `exhaustive`, boxes that match nothing are not counted either. This is the federated AP of LVIS (Gupta et al.
    2019, section 3), except that LVIS keeps 300 boxes per image and this keeps 100 per image and category. The package
    `lvis` is not used: its only release, 0.5.3, does not run with the NumPy version in requirements.txt.
    """
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    # Numbered in the order of their ids, by which pycocotools breaks ties: it cannot sort 1 and "b".
    ids = sorted({r["image_id"] for r in records}, key=lambda i: (isinstance(i, str), i))
    number = {i: k for k, i in enumerate(ids)}
    records = [r | {"image_id": number[r["image_id"]]} for r in records]
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
        "images": [{"id": i} for i in number.values()],
        "categories": [{"id": i, "name": name} for i, name in name_of.items()],
        "annotations": [{"id": i, **annotation} for i, annotation in enumerate(annotations, 1)],
    }
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
        found = coco_results(records)
        answered = truth.loadRes(found) if found else COCO()  # loadRes rejects an empty list
        evaluation = COCOeval(truth, answered, "bbox")
        evaluation.params.areaRng[0] = [0, 1e30]  # all areas: beyond the usual 1e10 a wrong box would not count
        evaluation.evaluate()
        evaluation.accumulate()
    # [IoU threshold, recall, category], for all areas and up to 100 detections; -1 if a category has no target
    precision = evaluation.eval["precision"][:, :, :, 0, -1]
    overall = average_precision(precision[:, :, (precision > -1).any((0, 1))])
    each = {name_of[id]: precision[:, :, k] for k, id in enumerate(evaluation.params.catIds)}
    return overall, {name: average_precision(values) for name, values in each.items() if (values > -1).any()}


def average_precision(precision: np.ndarray) -> Scores:
    """Return AP, AP50 and AP75 of precisions [10 IoU thresholds of COCO, recall, ...]; 0 if there was no target."""
    values = precision if precision.size else np.zeros((10, 1))
    return {"AP": float(values.mean()), "AP50": float(values[0].mean()), "AP75": float(values[5].mean())}


def coco_box(r: dict, box: Box) -> dict:
    """Convert a box of a record to COCO's format, where bbox is x, y, width, height."""
    x1, y1, x2, y2 = box
    return {"image_id": r["image_id"], "category_id": r["category_id"], "bbox": [x1, y1, x2 - x1, y2 - y1]}


def coco_results(records: Sequence[dict]) -> list[dict]:
    """Return the detections in COCO's results format: image_id, category_id, bbox and score."""
    return [coco_box(r, box) | {"score": score} for r in records for box, score in r["detections"] or []]


def classification_scores(records: Sequence[dict]) -> tuple[Scores, dict[str, Scores]]:
    """Return the share of correct names by this project's rule and by the published one, overall and per class."""

    def shares(records: Sequence[dict]) -> Scores:
        return {
            name: float(np.mean([rule(r["completion"], r["solution"]) for r in records]))
            for name, rule in (("accuracy", accuracy_reward), ("published_accuracy", published_accuracy))
        }

    return shares(records), {name: shares(group) for name, group in by_category(records).items()}


def grounding_scores(records: Sequence[dict]) -> tuple[Scores, dict[str, Scores]]:
    """Compute mean IoU, cumulative IoU (all intersections / all unions, in pixels) and the share of IoUs above 0.5.

    An answer without a box has IoU 0. For the cumulative IoU, boxes are clipped to the image; otherwise one huge box
    would dominate the sum of unions.
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
    """Return no scores: a user-defined task is scored by its rewards alone."""
    return {}, {}


def by_category(records: Sequence[dict]) -> dict[str, list[dict]]:
    groups = defaultdict(list)
    for r in records:
        groups[r["category"]].append(r)
    return dict(sorted(groups.items()))


@dataclass(frozen=True)
class Metric:
    """Define how one kind of answer is scored; a task selects a metric by its name in METRICS.

    score   records -> (overall, by category)
    means   description of the numbers, for the protocol line
    """

    score: Callable[[Sequence[dict]], tuple[Scores, dict[str, Scores]]]
    means: str


METRICS = {
    "detection": Metric(
        detection_scores,
        "COCO's AP (pycocotools) in original pixels over the (image, category) pairs asked",
    ),
    "classification": Metric(
        classification_scores,
        "accuracy: the class name or a declared alias; published_accuracy: the paper's substring rule, either way "
        "round, which also pays the empty answer",
    ),
    "grounding": Metric(grounding_scores, "IoU of one box in original pixels"),
    "rewards": Metric(no_scores, "means of the rewards"),
}

ASKED = {  # --eval_categories
    "gt": "only for what it shows (and --negatives), or for what its row asks",
    "all": "for all categories of the file",
    "listed": "for all of --categories",
}


def protocol_of(task: Task, eval_categories: str) -> str:
    """Describe what was asked and how it is scored; print this with every score."""
    asked = f"each image asked {ASKED[eval_categories]} (--eval_categories {eval_categories})"
    parts = ["greedy answers", METRICS[task.metric].means, asked if task.asks_for == "categories" else "", task.caveat]
    return "; ".join(filter(None, parts))


def scores(records: Sequence[dict], task: Task) -> tuple[Scores, dict[str, Scores]]:
    """Return the overall scores and the scores of each category.

    Overall: the mean of every reward, the shares of `answer_shares` and the task's metric. By category: the metric.
    Both include the share of answers that parsed. Raises DataError if there are no records.
    """
    if not records:
        raise DataError("no image could be opened: there is nothing to evaluate")
    overall = {name: float(np.mean([r["rewards"][name] for r in records])) for name in records[0]["rewards"]}
    metric, each = METRICS[task.metric].score(records)
    measured = answer_shares([r["completion"] for r in records], task.parse) | metric
    taken = measured.keys() | {"protocol", "answers", "categories"}  # a reward of the user's may have such a name
    overall = {f"reward/{name}" if name in taken and name not in REWARDS else name: x for name, x in overall.items()}
    groups = by_category(records)
    for name, values in each.items():
        answers = [r[ANSWER_KEYS[task.metric]] for r in groups[name]]
        values |= {"parsed": sum(answer is not None for answer in answers) / len(answers), "answers": len(answers)}
    return overall | measured, each


def report(overall: Scores, each: dict[str, Scores], count: int, protocol: str, lines: int = 20) -> str:
    """Format scores for a person, with the protocol and the share of answers that parsed.

    At most `lines` categories are listed.
    """

    def line(values: Scores) -> str:
        return "   ".join(
            f"{name} {value:.4f}" if isinstance(value, float) else f"{name} {value}" for name, value in values.items()
        )

    text = [f"Protocol: {protocol}", f"{count} answers, {overall['parsed']:.1%} of them parsed", line(overall)]
    text += [f"  {name:24s} {line(values)}" for name, values in list(each.items())[:lines]]
    return "\n".join(text + [f"  and {len(each) - lines} categories more, in scores.json"] * (len(each) > lines))


# ------------------------------------------------------------------------------------------------
# Files.


def read_predictions(file: Path) -> list[dict]:
    """Read the records of a predictions file; drop a last line that an interruption cut off."""
    try:
        return rows_of(file)
    except json.JSONDecodeError as error:
        raise DataError(f"{file}: a line in the middle is not JSON ({error}); another --out starts over") from None


def append_own(out: Path, stem: str, process: int, rows: Sequence[dict]) -> None:
    """Append to STEM.N.jsonl, one process's part of STEM.jsonl until `join_parts`."""
    append_rows(out / f"{stem}.{process}.jsonl", rows)


def read_parts(out: Path, stem: str) -> list[dict]:
    """Read STEM.jsonl and what interrupted processes appended beside it."""
    files = [out / f"{stem}.jsonl", *parts_of(out, stem)]
    return [row for file in files if file.exists() for row in read_predictions(file)]


def parts_of(out: Path, stem: str) -> list[Path]:
    """Return the files of single processes, STEM.NUMBER.jsonl; others with such names are the user's."""
    return [file for file in sorted(out.glob(f"{stem}.*.jsonl")) if file.name.split(".")[-2].isdigit()]


def join_parts(out: Path, stem: str, rows: Sequence[dict]) -> None:
    """Write STEM.jsonl, then delete the files of the single processes."""
    write_rows(out / f"{stem}.jsonl", rows)
    for part in parts_of(out, stem):
        part.unlink()


def write_rows(file: Path, rows: Sequence[dict]) -> None:
    """Write JSON lines, all or none."""
    aside = file.with_name(f"{file.name}.unfinished")
    aside.unlink(missing_ok=True)
    append_rows(aside, rows)
    aside.replace(file)


INDIFFERENT = ("workers", "prompts_per_step", "report_to")  # settings that do not change the answers
USED = "used.json"  # the files of model and rewards as they were when the evaluation began


def unfinished(out: Path, settings: dict) -> bool:
    """Return whether `out` holds an interrupted evaluation with the same settings, model and rewards.

    Such an evaluation can be continued. settings: the configuration as in config.json; those in INDIFFERENT may differ.
    """
    files = [out / "config.json", out / USED]
    if (out / "scores.json").exists() or not settings.get("eval_only") or not all(file.is_file() for file in files):
        return False
    begun, used = (json.loads(file.read_text(encoding="utf-8")) for file in files)
    same = json.loads(json.dumps(settings)) | dict.fromkeys(INDIFFERENT) == begun | dict.fromkeys(INDIFFERENT)
    return same and used == used_files(settings["model"], settings["rewards"])


def recover(out: Path, examples: Sequence[Example]) -> list[dict]:
    """Collect the answers that an interrupted evaluation left in `out` into one predictions.jsonl, and return them.

    Returns an empty list if there are none. Raises DataError if they answer other questions than `examples`.
    """
    done = {r["row"]: r for r in read_parts(out, "predictions")}
    asked = {row: json.dumps([e.id, e.category, e.question, e.solution]) for row, e in enumerate(examples)}
    told = {row: json.dumps([r["id"], r["category"], r.get("question"), r["solution"]]) for row, r in done.items()}
    if not told.items() <= asked.items():
        raise DataError(f"{out}: its predictions answer other questions, the data changed; another --out starts over")
    records = [done[row] for row in sorted(done)]
    if records or parts_of(out, "predictions"):  # also of a part that holds only a line that was cut off
        join_parts(out, "predictions", records)
    return records


def write_evaluation(
    out: Path,
    task: Task,
    protocol: str,
    records: Sequence[dict],
    overall: Scores,
    each: dict[str, Scores],
    examples: Sequence[Example],
    spaced: int = 24,
    of_each: int = 6,
) -> None:
    """Write predictions.jsonl, detections.json (COCO's results; detection only), thumbnails, scores.json, report.html.

    spaced, of_each: how many answers have a thumbnail: evenly spaced ones, and the first of each outcome.
    """
    out.mkdir(parents=True, exist_ok=True)
    join_parts(out, "predictions", records)
    if task.metric == "detection":
        (out / "detections.json").write_text(json.dumps(coco_results(records)) + "\n")
    kinds, pictured = [outcome(r) for r in records], set(evenly(len(records), spaced))
    for kind in set(kinds):
        pictured |= set([i for i, other in enumerate(kinds) if other == kind][:of_each])
    for r in (records[i] for i in sorted(pictured)):
        thumbnail_of(out, r).parent.mkdir(exist_ok=True)
        thumbnail(examples[r["row"]]).save(thumbnail_of(out, r), quality=92, subsampling=0)
    summary = {"protocol": protocol, "answers": len(records), **overall, "categories": each}
    write_whole(out / "scores.json", json.dumps(summary, indent=2) + "\n")  # last: it marks a finished evaluation
    write_report([out], out / "report.html")


# ------------------------------------------------------------------------------------------------
# The evaluation.


def evaluate(
    run: Any, answer: Callable[[Any, list[Prompt]], list[str]], examples: Sequence[Example], out: Path,
    stopping: Any = None,
) -> dict[str, float] | None:  # fmt: skip
    """Answer all examples, divided among the processes; write scores, predictions and report.html to `out`.

    With --eval_only, keep the answers that an interrupted evaluation left in `out`. stopping: training's
    StopAtSignal; a signal ends the evaluation without scores (None), and --resume repeats it.
    """
    cfg, accelerator, task, say = run.cfg, run.accelerator, run.prompts.task, run.accelerator.print
    kept = []
    if run.main:
        if not cfg.eval_only:
            shutil.rmtree(out, ignore_errors=True)  # an evaluation of this step from before a resume: other weights
        kept = recover(out, examples)
    (kept,) = broadcast_object_list([kept])
    out.mkdir(parents=True, exist_ok=True)
    if run.main and not kept:
        write_whole(out / USED, json.dumps(used_files(cfg.model, cfg.rewards)))
    if kept:
        say(f"continuing with {len(kept)} of {len(examples)} answers from {out}")
    left = sorted(set(range(len(examples))) - {record["row"] for record in kept})
    mine, size = left[accelerator.process_index :: accelerator.num_processes], cfg.prompts_per_step
    batches = [[(i, i) for i in mine[at : at + size]] for at in range(0, len(mine), size)]
    records = []
    # Gather once, because processes may have unequal numbers of batches; make the loader after this exchange.
    with run.gathered():
        loader = run.loader(run.prompts.of(examples), batches)
        for prompts in tqdm(loader, desc="evaluate", disable=not run.main, dynamic_ncols=True):
            if stopping and stopping.requested:  # local, no exchange: batch counts may differ
                break
            if cfg.skip_bad_images:
                prompts = [prompt for prompt in prompts if not isinstance(prompt, DataError)]
            batch = []
            for prompt, text in zip(prompts, answer(run, sound(prompts)) if prompts else []):
                parts = {name: values[0] for name, values in run.score(prompt, [text]).items()}
                batch.append({"row": prompt.slot} | record(task, prompt.example, prompt.target, text, parts))
            append_own(out, "predictions", accelerator.process_index, batch)
            records += batch
    if stopping and stopping():
        return say("the evaluation was interrupted; --resume true repeats it")
    records = sorted([*kept, *gather_object(records)], key=lambda record: record["row"])
    overall, each = scores(records, task)
    protocol = protocol_of(task, cfg.eval_categories)
    if run.main:
        write_evaluation(out, task, protocol, records, overall, each, examples)
    if len(records) < len(examples):
        say(f"{len(examples) - len(records)} examples were skipped: their images do not open")
    say(f"{report(overall, each, len(records), protocol)}\npredictions, results and report.html in {out}")
    return overall
