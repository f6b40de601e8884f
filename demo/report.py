"""Before and after: the table, the pictures and the numbers of the demo.

python demo/report.py runs/demo                  # reads before/, train/ and after/, writes summary.json and pictures
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from data import detection_answer  # noqa: E402
from rewards import box_iou, iou_reward  # noqa: E402

ROWS = {  # name in summary.json -> what it is
    "iou": "IoU reward, mean",
    "AP": "COCO AP",
    "AP50": "COCO AP50",
    "format": "format reward, mean",
    "confidence": "confidence reward, mean",
    "choice": "first box on an object of the asked category, others being there too",
    "count": "right number of boxes",
    "negatives": "No Objects said where there are none",
}


def read_predictions(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def mean_iou_reward(predictions: Sequence[dict], change: Callable[[dict, list], list] = lambda p, box: box) -> float:
    """The mean IoU reward after every box has been changed by change(prediction, box)."""

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
    """What scores.json holds, and how well the model chooses, counts and says No Objects.

    choice: of the pictures with several categories, the share in which the first box overlaps no object more than one
    of the asked category.
    """
    predictions = read_predictions(folder)
    scores = json.loads((folder / "scores.json").read_text())
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

    return {name: scores[name] for name in ("iou", "confidence", "format", "AP", "AP50", "AP75")} | {
        "choice": mean([chosen(p) for p in mixed]),
        "count": mean([len(p["detections"] or []) == len(p["solution"]) for p in positives]),
        "negatives": mean([p["detections"] == [] for p in predictions if not p["solution"]]),
        "answers": len(predictions),
        "mixed_pictures": len(mixed),
    }


def side_by_side(before: Path, after: Path, path: Path, count: int = 4) -> None:
    """Pictures of the same questions before and after, one under the other."""
    names = sorted(p.name for p in (before / "pictures").glob("*.png"))[:count]
    rows = [[Image.open(folder / "pictures" / name) for name in names] for folder in (before, after)]
    width, height = rows[0][0].size
    sheet = Image.new("RGB", (len(names) * (width + 8) + 90, 2 * (height + 8)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(22)
    for y, (label, row) in enumerate(zip(("before", "after"), rows)):
        draw.text((6, y * (height + 8) + height // 2), label, "black", font)
        for x, picture in enumerate(row):
            sheet.paste(picture, (90 + x * (width + 8), y * (height + 8)))
    sheet.save(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    before, after = measure(folder / "before"), measure(folder / "after")
    print(f"\n{before['answers']} held-out questions{'':49s} before   after")
    for name, meaning in ROWS.items():
        print(f"  {meaning:72s} {before[name]:6.3f}  {after[name]:6.3f}")
    (folder / "summary.json").write_text(json.dumps({"before": before, "after": after}, indent=2) + "\n")
    side_by_side(folder / "before", folder / "after", folder / "before_after.png")
    print(f"\ncurves                       {folder / 'train' / 'curves.png'}")
    print(f"boxes before and after       {folder / 'before_after.png'}")
    print(f"numbers                      {folder / 'summary.json'}")
    print(f"every answer while training  {folder / 'train' / 'rollouts.jsonl'}")


if __name__ == "__main__":
    main()
