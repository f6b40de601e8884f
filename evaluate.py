"""From answers to a score, with no model in it: AP through pycocotools, means of rewards, pictures, curves.

Answers are parsed by the rewards' own parser and compared in original pixels, the frame of the annotations. AP
is COCO's, over the (image, category) pairs that were asked: an image is scored only for the categories that it was
asked about, so this is not the COCO leaderboard's protocol, where every image is searched for all 80. `report`
prints that beside the number.
"""

import contextlib
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from data import DataError, Example, Prompt, Task, open_image, to_pixels
from rewards import parse_detections

PROTOCOL = "greedy answers; COCO AP in original pixels over the (image, category) pairs asked, others not searched"


def record(example: Example, target: tuple[int, int], text: str, rewards: dict[str, float]) -> dict:
    """One answer as predictions.jsonl keeps it; boxes in original pixels.

    target: size of the coordinates the answer speaks. `detections` is null where the answer does not parse.
    """
    detections = parse_detections(text)
    if detections is not None:
        detections = [[list(to_pixels(box, example.size, target)), confidence] for box, confidence in detections]
    return {
        "id": example.id,
        "image_id": example.image_id,
        "category": example.category,
        "category_id": example.category_id,
        "size": list(example.size),
        "solution": [list(box) for box in example.solution],
        "crowds": [list(box) for box in example.crowds],
        "completion": text,
        "detections": detections,
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


def scores(records: Sequence[dict], task: Task) -> dict[str, float]:
    """The mean of every reward, the shares of answer_shares, and for detection AP, AP50 and AP75."""
    if not records:
        raise DataError("no image could be opened: there is nothing to evaluate")
    result = {name: float(np.mean([r["rewards"][name] for r in records])) for name in records[0]["rewards"]}
    result |= answer_shares([r["completion"] for r in records], task.parse)
    if task.metric == "detection":
        result |= coco_ap(records)
    return result


def coco_results(records: Sequence[dict]) -> list[dict]:
    """The detections in COCO's results format: image_id, category_id, bbox as x, y, width, height, score."""
    return [
        {
            "image_id": r["image_id"],
            "category_id": r["category_id"],
            "bbox": [x1, y1, x2 - x1, y2 - y1],
            "score": confidence,
        }
        for r in records
        for (x1, y1, x2, y2), confidence in r["detections"] or []
    ]


def coco_ap(records: Sequence[dict]) -> dict[str, float]:
    """AP (IoU 0.50 to 0.95), AP50 and AP75 by pycocotools, in [0, 1]; crowd regions neither count nor are missed."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    annotations = [
        {
            "image_id": r["image_id"],
            "category_id": r["category_id"],
            "bbox": [x1, y1, x2 - x1, y2 - y1],
            "area": (x2 - x1) * (y2 - y1),
            "iscrowd": crowd,
        }
        for r in records
        for crowd, boxes in ((0, r["solution"]), (1, r["crowds"]))
        for x1, y1, x2, y2 in boxes
    ]
    truth = COCO()
    truth.dataset = {
        "info": {},
        "images": [{"id": i} for i in dict.fromkeys(r["image_id"] for r in records)],
        "categories": [
            {"id": i, "name": name} for i, name in {r["category_id"]: r["category"] for r in records}.items()
        ],
        "annotations": [{"id": i, **annotation} for i, annotation in enumerate(annotations, 1)],
    }
    found = coco_results(records)
    if not found:  # pycocotools cannot load an empty list
        return {"AP": 0.0, "AP50": 0.0, "AP75": 0.0}
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(found), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    # pycocotools says -1 where no target exists at all
    return {name: max(0.0, float(evaluation.stats[i])) for i, name in enumerate(("AP", "AP50", "AP75"))}


def report(values: dict[str, float], count: int) -> str:
    """Scores as a person reads them, with the protocol beside them."""
    return f"{count} answers. Protocol: {PROTOCOL}\n" + "   ".join(
        f"{name} {value:.4f}" for name, value in values.items()
    )


def append_rows(file: Path, rows: Sequence[dict]) -> None:
    """Add JSON lines, one write, so that an interruption leaves at most one unfinished line at the end."""
    with file.open("a", encoding="utf-8") as out:
        out.write("".join(json.dumps(row) + "\n" for row in rows))


def write_evaluation(
    out: Path, records: Sequence[dict], values: dict[str, float], examples: Sequence[Example], pictures: int = 12
) -> None:
    """scores.json, predictions.jsonl, detections.json (COCO's results format) and the first pictures."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "scores.json").write_text(
        json.dumps({"protocol": PROTOCOL, "answers": len(records), **values}, indent=2) + "\n"
    )
    (out / "predictions.jsonl").unlink(missing_ok=True)
    append_rows(out / "predictions.jsonl", records)
    (out / "detections.json").write_text(json.dumps(coco_results(records)) + "\n")
    for index in np.linspace(0, len(records) - 1, min(pictures, len(records)), dtype=int):
        row = records[index]["row"]
        draw_boxes(open_image(examples[row].images[0]), records[index], out / "pictures" / f"{row:06d}.png")


def draw_boxes(image: Image.Image, answer: dict, path: Path, least_side: int = 448) -> None:
    """Save the picture with true boxes (black) and answered boxes (magenta, with confidence) on it."""
    scale = max(1, round(least_side / min(image.size)))
    canvas = image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(16)
    for box in answer["solution"]:
        corners = [value * scale for value in box]
        draw.rectangle(corners, outline="black", width=5)
        draw.rectangle(corners, outline="white", width=2)
    for box, confidence in answer["detections"] or []:
        # An answer may name any number; what lies far outside is drawn at the edge.
        x1, y1, x2, y2 = (min(max(value, 0.0), limit) * scale for value, limit in zip(box, image.size * 2))
        draw.rectangle((x1, y1, max(x1, x2), max(y1, y2)), outline="magenta", width=3)
        draw.text((x1 + 5, y1 + 3), f"{confidence:.2f}", "magenta", font, stroke_width=1, stroke_fill="white")
    said = "" if answer["detections"] else " - No Objects" if answer["detections"] == [] else " - not parsed"
    framed = Image.new("RGB", (canvas.width, canvas.height + 24), "white")
    framed.paste(canvas, (0, 24))
    ImageDraw.Draw(framed).text((4, 2), f"{answer['category']}{said}", "black", font)
    path.parent.mkdir(parents=True, exist_ok=True)
    framed.save(path)


def draw_answer(prompt: Prompt, text: str, path: Path) -> None:
    """draw_boxes for an answer as it came from the model, on the original picture."""
    draw_boxes(open_image(prompt.example.images[0]), record(prompt.example, prompt.target, text, {}), path)


def plot_curves(metrics: Path, path: Path, window: int = 20) -> None:
    """curves.png from metrics.jsonl: rewards, completion length, KL and gradient norm over the steps, smoothed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    panels = [[n for n in rows[0] if n == "reward" or n.startswith("reward_") and n != "reward_std"]]
    panels += [
        ["reward_std", "zero_variance_groups", "parsed", "no_objects"],
        ["completion_tokens"],
        ["kl", "clip_fraction", "grad_norm"],
    ]
    figure, axes = pyplot.subplots(2, 2, figsize=(11, 7), constrained_layout=True)
    for axis, names in zip(axes.flat, panels):
        for name in names:
            steps = [row["step"] for row in rows if name in row]
            values = np.array([row[name] for row in rows if name in row])
            if len(values):
                width = min(window, len(values))
                axis.plot(steps[width - 1 :], np.convolve(values, np.ones(width) / width, "valid"), label=name)
        axis.set_xlabel(f"step (mean of {window})")
        axis.legend(fontsize=8)
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
