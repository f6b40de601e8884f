"""Draw what a run did: answers on their pictures, and curves of the metrics."""

import importlib.util
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from data import IMAGE_MARK, Prompt, Task, boxes_in, class_of, map_boxes, open_image, to_pixels
from rewards import Box

WINDOW = 20  # steps over which curves are smoothed

DRAWN: dict[str, Callable[[Any], list[tuple[Box, str]]]] = {  # by metric of a task: answer -> boxes and their labels
    "detection": lambda detections: [(box, f"{confidence:.2f}") for box, confidence in detections],
    "grounding": lambda box: [(box, "")],
}


def draw_record(
    task: Task, image: Image.Image, category: str, solution: Any, answer: Any, path: Path, least_side: int = 448
) -> None:
    """Save the picture with true boxes (black) and answered boxes (magenta, labeled) on it, and the names above it.

    solution, answer: boxes in original pixels; answer None was not parsed. Small pictures are enlarged to least_side.
    """
    scale = max(1, round(least_side / min(image.size)))
    canvas = image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(16)
    for box in boxes_in(solution) if task.boxes else []:
        corners = [value * scale for value in box]
        draw.rectangle(corners, outline="black", width=5)
        draw.rectangle(corners, outline="white", width=2)
    for box, label in [] if answer is None else DRAWN.get(task.metric, lambda answer: [])(answer):
        # An answer may name any number; what lies far outside is drawn at the edge.
        x1, y1, x2, y2 = (min(max(value, 0.0), limit) * scale for value, limit in zip(box, image.size * 2))
        draw.rectangle((x1, y1, max(x1, x2), max(y1, y2)), outline="magenta", width=3)
        draw.text((x1 + 5, y1 + 3), label, "magenta", font, stroke_width=1, stroke_fill="white")
    said = " - not parsed" if answer is None else " - No Objects" if answer == [] else f" - {class_of(answer) or ''}"
    framed = Image.new("RGB", (canvas.width, canvas.height + 24), "white")
    framed.paste(canvas, (0, 24))
    ImageDraw.Draw(framed).text((4, 2), f"{category}{said}".rstrip(" -"), "black", font)
    path.parent.mkdir(parents=True, exist_ok=True)
    framed.save(path)


def draw_answer(task: Task, prompt: Prompt, text: str, path: Path) -> None:
    """Save the original picture of a prompt with an answer, as it came from the model, on it."""
    example, answer = prompt.example, task.parse(text)
    if task.boxes:
        answer = map_boxes(answer, lambda box: to_pixels(box, example.size, prompt.target))
    draw_record(task, open_image(example.images[0]), example.category, example.solution, answer, path)


def smoothed(values: Sequence[float]) -> np.ndarray:
    """Return means of WINDOW values, or of all where there are fewer; the first belongs to the last of its values."""
    width = min(WINDOW, len(values))
    return np.convolve(values, np.ones(width) / width, "valid")


def plot_curves(runs: Sequence[Path], path: Path) -> None:
    """Draw the metrics.jsonl of one run, or of several that differ in their seed: a line each, smoothed."""
    if not importlib.util.find_spec("matplotlib"):
        return print(f"{path} is not drawn: pip install matplotlib")
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    runs = [[json.loads(line) for line in run.read_text(encoding="utf-8").splitlines()] for run in runs]
    panels = [
        [name for name in runs[0][0] if name == "reward" or name.startswith("reward/")],
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


def draw_pair(pair: dict, parts: Sequence[Box] | None, path: Path, height: int = 300) -> None:
    """Save the images of a preference pair with the share of attention on each part, the right one framed in green.

    parts: boxes in fractions of the one image; None: every image is a part. Both answers are written below.
    """
    font, frames, x = ImageFont.load_default(18), [], 8
    pictures = [open_image(Path(image)) for image in pair["image"]]
    pictures = [p.resize((max(1, round(p.width * height / p.height)), height)) for p in pictures]
    text = f"{pair['prompt'].replace(IMAGE_MARK, '').strip()}\nchosen: {pair['chosen']}\nrejected: {pair['rejected']}"
    lines = [line[at : at + 110] for line in text.splitlines() for at in range(0, max(1, len(line)), 110)]
    width = max(sum(p.width + 8 for p in pictures) + 8, 900)
    sheet = Image.new("RGB", (width, height + 24 + 24 * len(lines)), "white")
    draw = ImageDraw.Draw(sheet)
    for picture in pictures:
        sheet.paste(picture, (x, 8))
        for left, top, right, bottom in parts or [(0, 0, 1, 1)]:
            frames.append((x + left * picture.width, 8 + top * height, x + right * picture.width, 8 + bottom * height))
        x += picture.width + 8
    for i, (frame, share) in enumerate(zip(frames, pair["shares"])):
        draw.rectangle(frame, outline="green" if i == pair["target"] else "magenta", width=3)
        draw.text((frame[0] + 6, frame[1] + 4), f"{share:.2f}", "black", font, stroke_width=3, stroke_fill="white")
    for i, line in enumerate(lines):
        draw.text((8, height + 16 + 24 * i), line, "black", font)
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)
