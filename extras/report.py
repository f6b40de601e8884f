"""Draw the results of a run: answers on their pictures, and curves of the metrics."""

import importlib.util
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from data import IMAGE_MARK, Prompt, Task, boxes_in, class_of, map_boxes, open_image, to_pixels
from rewards import Box

WINDOW = 20  # curves are means over this many steps

DRAWN: dict[str, Callable[[Any], list[tuple[Box, str]]]] = {  # metric of a task: function from answer to labeled boxes
    "detection": lambda detections: [(box, f"{confidence:.2f}") for box, confidence in detections],
    "grounding": lambda box: [(box, "")],
}


def draw_record(
    task: Task, image: Image.Image, category: str, solution: Any, answer: Any, path: Path, least_side: int = 448
) -> None:
    """Save a picture with its true boxes (black) and answered boxes (magenta, labeled), and the names above it.

    solution, answer: boxes in original pixels; answer is None if it did not parse. Small pictures are enlarged so that
    their shorter side has about `least_side` pixels.
    """
    scale = max(1, round(least_side / min(image.size)))
    canvas = image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(16)
    for box in boxes_in(solution) if task.boxes else []:
        corners = [value * scale for value in box]
        draw.rectangle(corners, outline="black", width=5)
        draw.rectangle(corners, outline="white", width=2)
    for box, label in [] if answer is None else DRAWN.get(task.metric, lambda answer: [])(answer):
        # An answer may contain any number: clamp the box to the image.
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
    """Parse an answer of the model and draw it on the original picture of its prompt."""
    example, answer = prompt.example, task.parse(text)
    if task.boxes:
        answer = map_boxes(answer, lambda box: to_pixels(box, example.size, prompt.target))
    draw_record(task, open_image(example.images[0]), example.category, example.solution, answer, path)


def smoothed(values: Sequence[float]) -> np.ndarray:
    """Return running means of WINDOW values, or of all if there are fewer; plot each at the last value it covers."""
    width = min(WINDOW, len(values))
    return np.convolve(values, np.ones(width) / width, "valid")


def plot_curves(runs: Sequence[Path], path: Path) -> None:
    """Draw smoothed curves from the metrics.jsonl of one run, or of several runs with different seeds, a line each."""
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
                    label = None  # one legend entry per metric, not one per run
        axis.set_xlabel(f"step (mean of {WINDOW})")
        if axis.lines:
            axis.legend(fontsize=8)
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def draw_pair(pair: dict, parts: Sequence[Box] | None, path: Path, height: int = 300) -> None:
    """Save the images of a preference pair with the share of attention on each part and both answers below.

    The part that was asked about is framed in green. parts: boxes in fractions of the single image; None means that
    every image is a part.
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
