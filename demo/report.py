"""Report the demo before and after training: a table, report.html, a picture of boxes and summary.json.

python demo/report.py runs/demo                  # reads before/, train/ and after/, and writes them there
python demo/report.py runs/reproduce --paper     # adds a row per model in the paper's shape
python demo/report.py runs/seed0 runs/seed1 runs/seed2   # the demo with several seeds: the README's table, curves.png
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from data import TASKS, detection_answer  # noqa: E402
from extras.draw import answer_picture, curves, evenly, side_by_side, thumbnail_of, titled  # noqa: E402
from extras.outcomes import gains  # noqa: E402
from extras.report import rows_of, write_report  # noqa: E402
from rewards import box_iou, iou_reward  # noqa: E402

FORMAT = {"format": "format reward, mean"}
ROWS = {  # for each metric: {name in summary.json: description}
    "detection": {
        "iou": "IoU reward, mean",
        "AP": "COCO AP",
        "AP50": "COCO AP50",
        **FORMAT,
        "confidence": "confidence reward, mean",
        "choice": "first box on an object of the asked category, others being there too",
        "count": "right number of boxes",
        "negatives": "No Objects said where there are none",
    },
    "classification": {"accuracy": "accuracy", "worst_class": "accuracy of the worst class", **FORMAT},
    "grounding": {
        "giou": "GIoU reward (0 to 2), mean",
        "mean_iou": "mean IoU",
        "iou_above_0.5": "share of IoUs above 0.5",
        **FORMAT,
    },
    "rewards": {"accuracy": "accuracy reward, mean", **FORMAT},
}


def read_predictions(folder: Path) -> list[dict]:
    return rows_of(folder / "predictions.jsonl")


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def mean_iou_reward(predictions: Sequence[dict], change: Callable[[dict, list], list] = lambda p, box: box) -> float:
    """Return the mean IoU reward after changing every box by change(prediction, box)."""

    def reward(p: dict) -> float:
        found = p["detections"]
        if found is None:
            return 0.0
        changed = [change(p, box) for box, _ in found]
        return iou_reward(
            f"<answer>{detection_answer(changed, [c for _, c in found], digits=6)}</answer>", p["solution"]
        )

    return mean([reward(p) for p in predictions])


def measure(folder: Path) -> dict[str, float]:
    """Return the numbers of scores.json and compute those of ROWS that it does not contain."""
    metric = metric_of(folder)
    scores = json.loads((folder / "scores.json").read_text())
    if metric == "detection":
        scores |= detection_skills(read_predictions(folder))
    if metric == "classification":
        scores["worst_class"] = min(values["accuracy"] for values in scores["categories"].values())
    return {name: value for name, value in scores.items() if isinstance(value, (int, float))}


def metric_of(folder: Path) -> str:
    return TASKS[json.loads((folder / "config.json").read_text())["task"]].metric


def detection_skills(predictions: Sequence[dict]) -> dict[str, float]:
    """Return how well the model chooses, counts and says No Objects: the share of True per skill of `skilled`."""
    skills = {name: mean(list(answers.values())) for name, answers in skilled(predictions).items() if answers}
    return skills | {"mixed_pictures": len(skilled(predictions)["choice"])}


def skilled(predictions: Sequence[dict]) -> dict[str, dict[str, bool]]:
    """Return {skill: {id of a question that tests it: whether the answer shows it}}.

    choice: asked about pictures with several categories; True if the object that the first box overlaps most is of the
    asked category.
    """
    objects: dict[int, list] = {}
    for p in predictions:
        objects.setdefault(p["image_id"], []).extend((p["category"], box) for box in p["solution"])
    positives = [p for p in predictions if p["solution"]]
    mixed = [p for p in positives if len({category for category, _ in objects[p["image_id"]]}) > 1]

    def chosen(p: dict) -> bool:
        overlaps = (
            [(box_iou(p["detections"][0][0], box), category) for category, box in objects[p["image_id"]]]
            if p["detections"]
            else []
        )
        return max(overlaps, default=(0.0, None))[1] == p["category"] and max(overlaps)[0] > 0

    return {
        "choice": {p["id"]: chosen(p) for p in mixed},
        "count": {p["id"]: len(p["detections"] or []) == len(p["solution"]) for p in positives},
        "negatives": {p["id"]: p["detections"] == [] for p in predictions if not p["solution"]},
    }


def changes(before: Path, after: Path) -> dict[str, tuple[int, int, float]]:
    """Return {skill: (questions gained, questions lost, p)}.

    See `gains`.
    """
    then, now = (skilled(read_predictions(folder)) for folder in (before, after))
    return {name: gains(then[name], now[name]) for name in then}


def before_after(before: Path, after: Path, path: Path, count: int = 5) -> None:
    """Draw the answers to the same questions before and after training, one row below the other.

    Which questions: `count` of those that both evaluations pictured and that have objects, evenly spaced.
    """
    then, now = ({r["row"]: r for r in read_predictions(folder)} for folder in (before, after))
    both = [r for row, r in then.items() if all(thumbnail_of(f, r).exists() for f in (before, after)) and r["solution"]]
    rows, sheets = [both[i]["row"] for i in evenly(len(both), count)], []
    for folder, of, label in ((before, then, "before"), (after, now, "after GRPO")):
        pictures = [titled(answer_picture(folder, of[row]), f"{label}: {of[row]['category']}") for row in rows]
        sheets.append(side_by_side(pictures, gap=8))
    sheet = Image.new("RGB", (sheets[0].width, 8 + sum(s.height for s in sheets)), "white")
    sheet.paste(sheets[0], (0, 0))
    sheet.paste(sheets[1], (0, sheets[0].height + 8))
    sheet.save(path)


CURVES = ["reward/iou", "reward_std", "zero_variance_groups", "entropy", "completion_tokens", "grad_norm"]


def several(folders: Sequence[Path]) -> None:
    """Print the demo's figures before and after training with several seeds, and draw their curves."""
    before, after = measure(folders[0] / "before"), [measure(folder / "after") for folder in folders]
    head = ["", "before", *(folder.name for folder in folders), "median gain"]
    print(f"| {' | '.join(head)} |\n|{'---|' * len(head)}")
    for name, meaning in ROWS[metric_of(folders[0] / "before")].items():
        if name in before:
            values = [figures[name] for figures in after]
            cells = [f"{value:.3f}" for value in (before[name], *values)] + [f"{median(values) - before[name]:+.3f}"]
            print(f"| {' | '.join([meaning, *cells])} |")
    logged = {folder.name: rows_of(folder / "train" / "metrics.jsonl") for folder in folders}
    curves(logged, CURVES, columns=3).savefig(folders[0] / "curves.png", dpi=110)
    print(f"\ncurves  {folders[0] / 'curves.png'}")


def paper_table(folders: dict[str, Path]) -> str:
    """Format AP in percent, overall and per category, like the paper's detection tables; one row per folder."""
    scores = {name: json.loads((folder / "scores.json").read_text()) for name, folder in folders.items()}
    categories = list(next(iter(scores.values()))["categories"])
    lines = [["", "mAP", *categories], ["---"] * (len(categories) + 2)]
    for name, result in scores.items():
        values = [result["AP"], *(result["categories"][category]["AP"] for category in categories)]
        lines.append([name, *(f"{100 * value:.1f}" for value in values)])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def report_mia_dpo(folder: Path) -> None:
    """Report accuracy on questions about one of several pictures and about a single picture.

    Compares the untrained model with training on randomly chosen pairs and on pairs chosen by attention.
    """
    columns, rows = ("before", "random", "attention"), {}
    for name, meaning in (
        ("several", "asked about one of several pictures"),
        ("single", "asked about the only picture"),
    ):
        rows[f"accuracy, {meaning}"] = [measure(folder / column / name)["accuracy"] for column in columns]
    pairs = [0, *(len((folder / f"{column}.jsonl").read_text().splitlines()) for column in columns[1:])]
    print(f"\n{'':48s}" + "".join(f"{column:>12s}" for column in columns))
    for meaning, values in rows.items():
        print(f"  {meaning:46s}" + "".join(f"{value:12.3f}" for value in values))
    print(f"  {'preference pairs':46s}" + "".join(f"{count:12d}" for count in pairs))
    (folder / "summary.json").write_text(json.dumps({"columns": columns, **rows, "pairs": pairs}, indent=2) + "\n")
    print(f"\npairs with the attention on each image   {folder / 'attention' / 'pictures'}")
    print(f"numbers                                  {folder / 'summary.json'}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+", metavar="FOLDER")
    parser.add_argument("--paper", action="store_true", help="print the scores of detection as the paper's tables do")
    args = parser.parse_args()
    if len(args.folders) > 1:
        return several(args.folders)
    (folder,) = args.folders
    if (folder / "attention.jsonl").exists():
        return report_mia_dpo(folder)
    before, after = measure(folder / "before"), measure(folder / "after")
    print(f"\n{before['answers']} held-out questions{'':49s} before   after")
    metric = metric_of(folder / "before")
    for name, meaning in ROWS[metric].items():
        if name not in before:  # no question asks for it
            continue
        print(f"  {meaning:72s} {before[name]:6.3f}  {after[name]:6.3f}")
    summary = {"before": before, "after": after}
    if metric == "detection":
        print("\nquestions gained and lost; p by the sign test, if each change were a coin's toss")
        summary["changes"] = changes(folder / "before", folder / "after")
        for name, (gained, lost, p) in summary["changes"].items():
            print(f"  {ROWS[metric][name]:72s} {gained:6d}  {lost:6d}   p {p:.2f}")
    if args.paper:
        print(f"\n{paper_table({'before': folder / 'before', 'GRPO': folder / 'after'})}")
        print(json.loads((folder / "after" / "scores.json").read_text())["protocol"])
    (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    write_report([folder / name for name in ("before", "train", "after")], folder / "report.html")
    print(f"\neverything to look at        {folder / 'report.html'}")
    if metric in ("detection", "grounding"):
        before_after(folder / "before", folder / "after", folder / "before_after.png")
        print(f"answers before and after     {folder / 'before_after.png'}")
    print(f"numbers                      {folder / 'summary.json'}")
    print(f"every answer while training  {folder / 'train' / 'rollouts.jsonl'}")


if __name__ == "__main__":
    main()
