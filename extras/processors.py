"""Look at what an image processor shows the model, before training, and change its settings: --processor_options."""

import json
from collections.abc import Sequence
from typing import Any

from PIL import Image

from data import IMAGE_MARK, PLAIN, DataError, Example

# Model types whose processors pad images to a canvas (read in their code, some of them measured).
PADDED = ("mllama", "deepseek_vl", "deepseek_vl_hybrid", "deepseek_ocr2", "janus", "aria", "glm5_next", "kimi_k25")
# Families that learned to write boxes in another form, by their papers: decimals are the same frame in other units.
OTHER_FORMS = {
    **dict.fromkeys(("llava", "llava_next", "llava_onevision"), "decimals in 0..1"),
    **dict.fromkeys(("paligemma", "paligemma2"), "location tokens, y first"),
}
BORDERS = {"left": 200, "right": 225, "top": 250, "bottom": 175}  # gray levels


def lost_borders(images: Any) -> list[str]:
    """Return the borders that an image processor cuts off: those whose gray level is not in what it returns.

    Each border is a tenth of a side, which resizing to 56 x 28 pixels still shows. A narrower cut is not found.
    """
    picture = Image.new("L", (640, 430), 100)
    boxes = ((0, 43, 64, 387), (576, 43, 640, 387), (0, 0, 640, 43), (0, 387, 640, 430))
    for box, level in zip(boxes, BORDERS.values()):
        picture.paste(level, box)
    seen = images(images=[picture.convert("RGB")], **PLAIN)
    if "pixel_values" not in seen:
        raise DataError(f"{type(images).__name__} returns {', '.join(seen)}, not pixel_values: it is not supported")
    pixels = seen["pixel_values"].float()
    # A border covers 8 or 10% of the picture. Blurred edges of other borders have a few such pixels: hence 1%.
    return [name for name, level in BORDERS.items() if ((pixels - level).abs() < 9).float().mean() < 0.01]


def inspect(images: Any, model_type: str, asks_boxes: bool) -> list[str]:
    """Return notes on what an image processor does to images, and on the form of a family's boxes.

    asks_boxes: boxes are asked for and --coordinates does not say how. SystemExit if the processor cuts off a border,
    or a family writes boxes in another frame.
    """
    if lost := lost_borders(images):
        raise SystemExit(f"{type(images).__name__} cuts off the {', '.join(lost)} of images: boxes would be displaced")
    notes, form = [], OTHER_FORMS.get(model_type)
    if form and asks_boxes and "y first" in form:
        learn = "--coordinates relative has it learn x first in 0..1000"
        raise SystemExit(f"{model_type} writes boxes as {form}, which is not supported: {learn}")
    if form and asks_boxes:
        notes.append(f"released {model_type} models write boxes as {form}; here they are asked for in 0..1000")
    if model_type in PADDED:
        notes.append(f"{model_type} shows images on a padded canvas: its own 0..1000 may refer to that; see --check")
    return notes


def refuse_placeholders(processor: Any, example: Example, text: str, marks: Sequence[str] = ()) -> None:
    """Raise DataError for a text that holds the processor's own mark of an image or a video, or one of `marks`.

    In a question, data.IMAGE_MARK is an image's place. In an answer no mark is right.
    """
    own = {getattr(processor, f"{kind}_token", None) for kind in ("image", "video")} - {None, IMAGE_MARK}
    if found := [mark for mark in (*own, *marks) if isinstance(mark, str) and mark in text]:
        where = "take it out" if marks else f"write {IMAGE_MARK} where an image belongs, or take it out"
        raise DataError(f"example {example.id}: its text holds {found[0]}, which stands for an image: {where}")


def configure(images: Any, pairs: Sequence[str]) -> None:
    """Set the NAME=VALUE pairs of --processor_options on an image processor, which must have such settings."""
    for name, value in options("processor_options", pairs).items():
        if not hasattr(images, name) or callable(getattr(images, name)):
            raise SystemExit(f"--processor_options {name}: {type(images).__name__} has no such setting")
        if name == "size" and not isinstance(value, dict):
            raise SystemExit(f'--processor_options size={value}: must be like {{"height": 336, "width": 336}}')
        setattr(images, name, value)


def options(flag: str, pairs: Sequence[str]) -> dict[str, Any]:
    """Read NAME=VALUE pairs; a value is JSON (false, 2, {...}), Python's True, False or None, or else a string.

    Raises DataError for another form, and for a name that is given twice.
    """
    found = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not (name and equals) or name in found:
            raise DataError(f"--{flag} {pair}: must be NAME=VALUE, each name once")
        try:
            found[name] = json.loads(value)
        except ValueError:
            found[name] = {"True": True, "False": False, "None": None}.get(value, value)
    return found
