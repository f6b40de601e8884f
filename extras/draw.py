"""Draw boxes on pictures, and curves: for report.html, --check, --ask, the pairs of MIA-DPO and the demos.

True boxes have solid green lines, answers dashed magenta ones, so they also differ in gray and to the color-blind.
"""

import importlib.util
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from data import IMAGE_MARK, Example, Prompt, Size, Task, boxes_in, class_of, open_image, open_images
from extras.outcomes import answer_of, parsed_answer
from rewards import Box, box_iou

PLOTS = importlib.util.find_spec("matplotlib") is not None
LONG_SIDE = (448, 1024)  # bounds of a drawn picture's longer side, in pixels
WINDOW = 20  # curves are means over this many steps
POINTS = 400  # of the lines in a panel together
TRUE, ANSWERED, BETTER, WORSE, EQUAL = "#00803a", "#d6006d", "#0057d9", "#c25400", "#666666"


class Mark(NamedTuple):
    """A box to draw, in original pixels."""

    box: Box
    color: str = TRUE
    label: str = ""
    dashed: bool = False


def font(size: int) -> ImageFont.FreeTypeFont:
    """Return DejaVu, which has Latin, Greek, Cyrillic and Arabic letters; without matplotlib, Pillow's Latin font."""
    if not PLOTS:
        return ImageFont.load_default(size)
    import matplotlib

    return ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"), size)


def side_by_side(pictures: Sequence[Image.Image], gap: int = 0) -> Image.Image:
    """Return pictures in a row, all as high as the first."""
    height = pictures[0].height
    row = [p.resize((max(1, round(p.width * height / p.height)), height)) for p in pictures]
    sheet, x = Image.new("RGB", (sum(p.width + gap for p in row) - gap, height), "white"), 0
    for picture in row:
        sheet.paste(picture, (x, 0))
        x += picture.width + gap
    return sheet


def thumbnail(example: Example, side: int = 512) -> Image.Image:
    """Return the picture of an example, at most `side` pixels wide and high; n pictures in a row, n times as wide."""
    picture = side_by_side(open_images(example), gap=4) if len(example.images) > 1 else open_image(example.images[0])
    picture.thumbnail((side * len(example.images), side))
    return picture


def evenly(n: int, count: int) -> list[int]:
    """Return up to `count` of the indices 0 to n - 1, evenly spaced, with the first and the last."""
    return sorted(set(np.linspace(0, n - 1, min(count, n), dtype=int).tolist()))


def marks_of(solution: Any, metric: str, answer: Any) -> list[Mark]:
    """Return true boxes, and answered ones with their best IoU with a true box, or, if there is none, their confidence.

    metric: a task's. solution, answer: in original pixels; answer is None if it did not parse.
    """
    if metric not in ("detection", "grounding"):
        return []
    true, given = boxes_in(solution), answer if metric == "detection" else [(answer, None)]
    marks = [Mark(tuple(box)) for box in true]
    for box, confidence in given or []:
        if box is not None:
            label = "" if confidence is None else f"{confidence:.2f}"
            label = f"IoU {max(box_iou(box, other) for other in true):.2f}" if true else label
            marks.append(Mark(tuple(box), ANSWERED, label, dashed=True))
    return marks


def thumbnail_of(folder: Path, r: dict) -> Path:
    """Return where an evaluation keeps the picture of an answer, if it does; r: a row of predictions.jsonl."""
    return folder / "thumbnails" / f"{r['row']:06d}.jpg"


def answer_picture(folder: Path, r: dict) -> Image.Image:
    """Return the picture that an evaluation kept of an answer, with its boxes."""
    with Image.open(thumbnail_of(folder, r)) as picture:
        return draw_boxes(picture, r["size"], marks_of(r["solution"], *answer_of(r)))


def draw_boxes(picture: Image.Image, size: Size | None, marks: Sequence[Mark]) -> Image.Image:
    """Return the picture with its boxes, scaled until LONG_SIDE holds its longer side.

    size: the picture that the boxes refer to, in pixels; of pictures in a row, the first. Lines and letters grow with
    the picture, and labels do not cover each other while there is room.
    """
    longest = max(picture.size)
    factor = min(max(longest, LONG_SIDE[0]), LONG_SIDE[1]) / longest
    how = Image.Resampling.NEAREST if factor >= 2 else Image.Resampling.LANCZOS
    canvas = picture.convert("RGB").resize([max(1, round(side * factor)) for side in picture.size], how)
    draw, longest = ImageDraw.Draw(canvas), max(canvas.size)
    width, letters, labels, taken = max(2, longest // 200), font(max(14, longest // 36)), [], []
    for mark in marks:
        scale = canvas.height / size[1]
        limits = (round(size[0] * scale) - 1, canvas.height - 1)
        # An answer may contain any number: clamp the box to the picture.
        x1, y1, x2, y2 = (round(min(max(value * scale, 0.0), limit)) for value, limit in zip(mark.box, limits * 2))
        outline(draw, (x1, y1, max(x1, x2), max(y1, y2)), mark.color, mark.dashed, width)
        labels += [(x1, y1, y2, mark)] if mark.label else []
    for left, top, bottom, mark in labels:
        x1, y1, x2, y2 = draw.textbbox((0, 0), mark.label, letters)
        w, h = round(x2) + 6, round(y2) + 4
        x = max(0, min(left, canvas.width - w))
        # Above the box, inside, below; then wherever there is room.
        places = (top - h, top + width, bottom + 1, *range(0, canvas.height, h))
        places = [y for y in places if 0 <= y <= canvas.height - h]
        free = [y for y in places if all(abs(y - y0) >= h or x >= x0 + w0 or x0 >= x + w for x0, w0, y0 in taken)]
        y = (free or places or [0])[0]
        taken.append((x, w, y))
        draw.rectangle((x, y, x + w, y + h), fill="white")
        draw.text((x + 3, y + 1), mark.label, mark.color, letters)
    return canvas


def outline(draw: ImageDraw.ImageDraw, corners: tuple[int, int, int, int], color: str, dashed: bool, width: int):
    """Draw a rectangle on a white one, so that it shows on any ground."""
    x1, y1, x2, y2 = corners
    draw.rectangle((x1 - 1, y1 - 1, x2 + 1, y2 + 1), outline="white", width=width + 2)
    if not dashed:
        return draw.rectangle(corners, outline=color, width=width)
    dash = 5 * width
    for x in range(x1, x2 + 1, 2 * dash):
        for y in (y1, max(y1, y2 - width + 1)):
            draw.rectangle((x, y, min(x + dash, x2), min(y + width - 1, y2)), fill=color)
    for y in range(y1, y2 + 1, 2 * dash):
        for x in (x1, max(x1, x2 - width + 1)):
            draw.rectangle((x, y, min(x + width - 1, x2), min(y + dash, y2)), fill=color)


def titled(picture: Image.Image, title: str, legend: bool = True) -> Image.Image:
    """Return the picture below its title, broken into lines, and a legend of the boxes."""
    letters, width = font(16), max(picture.width, 360)
    lines = title.splitlines()  # at each of Unicode's breaks, whose width no font tells
    most = int((width - 8) / max((letters.getlength(c) for c in set("".join(lines))), default=1))
    lines = [row for line in lines for row in textwrap.wrap(line, most) or [""]]
    at = 6 + 22 * len(lines)
    sheet = Image.new("RGB", (width, at + 26 * legend + picture.height), "white")
    sheet.paste(picture, (0, at + 26 * legend))
    draw = ImageDraw.Draw(sheet)
    draw.text((4, 2), "\n".join(lines), "black", letters, spacing=4)
    for x, text, color in [(6, "true", TRUE), (140, "answer", ANSWERED)] if legend else []:
        outline(draw, (x, at + 4, x + 34, at + 19), color, color == ANSWERED, 3)
        draw.text((x + 42, at), text, color, letters)
    return sheet


def draw_answer(task: Task, prompt: Prompt, text: str, path: Path) -> None:
    """Parse an answer of the model and draw it on the picture of its prompt."""
    example, answer = prompt.example, parsed_answer(task, prompt.example, prompt.target, text)
    said = "not parsed" if answer is None else "No Objects" if answer == [] else class_of(answer) or ""
    marks = marks_of(example.solution, task.metric, answer)
    picture = draw_boxes(thumbnail(example, LONG_SIDE[1]), example.size, marks)
    path.parent.mkdir(parents=True, exist_ok=True)
    titled(picture, ": ".join(filter(None, [example.category, said])), legend=bool(marks)).save(path)


def draw_pair(pair: dict, parts: Sequence[Box] | None, path: Path, height: int = 300) -> None:
    """Save the images of a preference pair with the share of attention on each part, and the texts above.

    The part that was asked about has the solid green frame, the others dashed orange ones. parts: boxes in fractions of
    the single image; None means that every image is a part.
    """
    pictures = [open_image(Path(image)) for image in pair["image"]]
    pictures = [p.resize((max(1, round(p.width * height / p.height)), height)) for p in pictures]
    sheet, frames, x = side_by_side(pictures, gap=8), [], 0
    for picture in pictures:
        for x1, y1, x2, y2 in parts or [(0, 0, 1, 1)]:
            frames.append((x + x1 * picture.width, y1 * height, x + x2 * picture.width, y2 * height))
        x += picture.width + 8
    marks = [
        Mark(frame, TRUE if i == pair["target"] else WORSE, f"{share:.2f}", dashed=i != pair["target"])
        for i, (frame, share) in enumerate(zip(frames, pair["shares"]))
    ]
    text = f"{pair['prompt'].replace(IMAGE_MARK, '').strip()}\nchosen: {pair['chosen']}\nrejected: {pair['rejected']}"
    path.parent.mkdir(parents=True, exist_ok=True)
    titled(draw_boxes(sheet, sheet.size, marks), text, legend=False).save(path)


# ------------------------------------------------------------------------------------------------
# Curves.

UNITS = {  # in the titles of curves; see also draw_curve
    "reward": "weighted sum, mean", "kl": "distance from the untrained model, nats a token",
    "reward_std": "within groups, mean", "zero_variance_groups": "share of groups that teach nothing",
    "clip_fraction": "share of tokens", "entropy": "nats a token", "sampler_gap": "nats a token",
    "cross_entropy": "nats a token", "grad_norm": "before clipping", "completion_tokens": "tokens, mean",
    "truncated": "share of answers cut off", "parsed": "share of answers", "no_objects": "share of answers",
    "empty_think": "share of answers", "tokens_per_second": "sampled", "lr": "learning rate",
    "skipped_updates": "share of updates", "margin": "chosen over rejected, times beta", "accuracy": "share of pairs",
    "reward_chosen": "beta log(pi / pi_ref)", "reward_rejected": "beta log(pi / pi_ref)",
    "logp_chosen": "nats an answer", "logp_rejected": "nats an answer",
}  # fmt: skip


def smoothed(values: Sequence[float]) -> np.ndarray:
    """Return running means of WINDOW values, or of all if there are fewer; plot each at the last value it covers."""
    width = min(WINDOW, len(values))
    return np.convolve(values, np.ones(width) / width, "valid")


def curves(runs: dict[str, list[dict]], names: Sequence[str], columns: int = 1) -> Any:
    """Return a matplotlib figure with a panel per metric: raw values faint, running means bold, a color per run."""
    from matplotlib.figure import Figure

    rows = -(-len(names) // columns)
    figure = Figure(figsize=(3.7 * columns, 2.3 * rows))
    # Fixed, because matplotlib's layouts take three times as long; left, bottom, right, top, in shares of the figure.
    figure.subplots_adjust(0.15 / columns, 0.2 / rows, 1 - 0.03 / columns, 1 - 0.12 / rows, hspace=0.5)
    lines = [(label, logged, f"C{i}") for i, (label, logged) in enumerate(runs.items())]
    for axis, name in zip(figure.subplots(rows, columns, squeeze=False).flat, names):
        draw_curve(axis, lines, name)
    return figure


def draw_curve(axis: Any, lines: Sequence[tuple[str | None, list[dict], str]], name: str) -> None:
    """Draw a metric of runs; lines: label, rows of metrics.jsonl and color of each."""
    for i, (label, logged, color) in enumerate(lines):
        steps, values = [row["step"] for row in logged if name in row], [row[name] for row in logged if name in row]
        if steps:
            means, style, most = smoothed(values), ("-", "--", "-.", ":")[i % 4], POINTS // (2 * len(lines))
            for at, y, look in (
                (steps, values, {"alpha": 0.25 if len(means) > 1 else 1.0, "linewidth": 0.7}),
                (steps[-len(means) :], means, {"linestyle": style, "linewidth": 1.5, "label": label}),
            ):
                drawn = evenly(len(y), max(20, most))
                axis.plot([at[k] for k in drawn], [y[k] for k in drawn], color=color, **look)
    unit = "mean" if name.startswith("reward/") else "seconds" if name.startswith("seconds/") else UNITS.get(name)
    axis.set_title(f"{name} ({unit})" if unit else name, fontsize=8, parse_math=False)
    axis.set_xlabel(f"step (bold: mean of {WINDOW})", fontsize=7)
    axis.tick_params(labelsize=7)
    axis.yaxis.set_major_formatter("{x:.4g}")  # the default writes a common power of ten over the title
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.grid(alpha=0.3)
    if len(axis.lines) > 2:
        for text in axis.legend(fontsize=6).get_texts():
            text.set_parse_math(False)  # a folder may be called $a
