"""Choose what is asked of a dataset: --shots, --negatives and --eval_categories, and which split is read."""

import random
from collections.abc import Callable, Collection, Container, Sequence
from pathlib import Path
from typing import Any

from data import Choice, DataError, Example, Task, boxes_in, refuse

Pair = tuple[Any, str]  # (image id, category): one example


def pick_split(where: object, split: str, there: Container[str], hint: str) -> str:
    """Return the name that a split has among those in `there`; training never sees val or test."""
    names = {"train": ("train",), "val": ("val", "valid", "validation", "test")}[split]
    for name in names:
        if name in there:
            return name
    raise DataError(f"{where}: no split {' or '.join(names)}. {hint}")


CATEGORY_SPLITS = {  # Visual-RFT sections 4.2 to 4.4; base65 is COCO's 80 categories without novel15
    "novel15": "mouse, fork, hot dog, cat, airplane, suitcase, parking meter, sandwich, train, hair drier, toilet, "
    "toaster, snowboard, frisbee, bear",
    "fewshot8": "bus, train, fire hydrant, stop sign, cat, dog, bed, toilet",
    "lvis_fewshot6": "horse_buggy, die, kitchen_table, omelet, papaya, stepladder",
    "lvis_rare13": "casserole, die, egg_roll, futon, garbage, handsaw, hippopotamus, kitchen_table, mallet, omelet, "
    "shot_glass, stepladder, sugar_bowl",
}


def published(categories: str, known: Sequence[str]) -> str:
    """Return the names of a published split, or `categories` as it is; known: the names of a dataset."""
    if categories == "base65":
        novel = CATEGORY_SPLITS["novel15"].split(", ")
        return ", ".join(name for name in known if name not in novel)
    return CATEGORY_SPLITS.get(categories, categories)


def fewer(
    task: Task, examples: list[Example], max_boxes: int | None, limit: int | None, choice: Choice, notes: list[str]
) -> list[Example]:
    """Return at most `limit` of the examples that have at most max_boxes boxes, drawn by seed; None: no limit."""
    if max_boxes is not None:
        if not task.boxes:
            raise DataError(f"--max_boxes {max_boxes}: --task {task.name} has no boxes")
        kept = [e for e in examples if len(boxes_in(e.solution)) <= max_boxes]
        notes.append(f"--max_boxes {max_boxes}: {len(examples) - len(kept)} examples left out")
        examples = kept
    if limit is not None and limit < len(examples):
        notes.append(f"{limit} of {len(examples)} examples, chosen by seed {choice.seed}")
        examples = random.Random(choice.seed).sample(examples, limit)
    return examples


def whole_file(file: Path, split: str, choice: Choice) -> Path:
    """Return a file without splits. Raises DataError if it was named for training only and `split` is another."""
    if split != "train" and not choice.one_split:
        raise DataError(f"{file} has no splits and is trained on: --eval_data names what to evaluate")
    return file


def take_shots(where: object, images: dict[str, list], choice: Choice, notes: list[str]) -> dict[str, list]:
    """Draw --shots images of each category from {category: images}.

    The images drawn for a category do not depend on which other categories are asked for.
    """
    if not choice.shots:
        return images
    few = [f"{name} ({len(found)})" for name, found in images.items() if len(found) < choice.shots]
    if few:
        notes.append(f"{where}: fewer than {choice.shots} images for {', '.join(few)}")
    return {
        name: random.Random(f"{choice.seed}/{name}").sample(found, min(choice.shots, len(found)))
        for name, found in images.items()
    }


def choose_pairs(
    where: object,
    images: Sequence,
    shown: dict[str, list],
    seen: Collection[Pair],
    known: Callable[[Any, str, bool], bool],
    choice: Choice,
    notes: list[str],
) -> list[Pair]:
    """Return the pairs to ask for, as --shots, --negatives and --eval_categories say.

    images: keys of the images that can be used. shown: {category: the images with a box of it}. seen: pairs with a box
    or a crowd. known: as `verified` of data.detection_examples.
    """
    if choice.eval_categories != "gt":
        return every_pair(images, list(shown), choice)

    def absent(image_id) -> list[str]:
        unseen = [name for name in shown if (image_id, name) not in seen]
        return [name for name in unseen if known(image_id, name, False)]

    pairs = [(image_id, name) for name, ids in take_shots(where, shown, choice, notes).items() for image_id in ids]
    shows_something = {image_id for image_id, name in seen if name in shown}
    # Few-shot training must not see other images.
    empty = [] if choice.shots else [image_id for image_id in images if image_id not in shows_something]
    return pairs + negative_pairs(pairs, empty, absent, choice, notes)


def negative_pairs(
    pairs: Sequence[Pair], empty: Sequence, absent: Callable[[Any], list[str]], choice: Choice, notes: list[str]
) -> list[Pair]:
    """Draw pairs whose right answer is `No Objects`: a share of all pairs, at most one per image.

    They come from the images of `pairs` and from `empty`, images without a box or crowd of these categories.
    absent(image id): the categories that the image is known not to show.
    """
    if not 0.0 <= choice.negatives < 1.0:
        raise DataError(f"--negatives {choice.negatives}: a share of all examples, at least 0 and below 1")
    count = round(len(pairs) * choice.negatives / (1.0 - choice.negatives))
    rng = random.Random(f"{choice.seed}/negatives")
    used = sorted({image_id for image_id, _ in pairs} | set(empty), key=str)
    rng.shuffle(used)
    found = []
    for image_id in used:
        if len(found) < count and (names := absent(image_id)):
            found.append((image_id, rng.choice(names)))
    if len(found) < count:
        notes.append(f"--negatives {choice.negatives}: {len(found)} of {count} examples found, one per image at most")
    return found


def every_pair(images: Sequence, categories: Sequence[str], choice: Choice) -> list[Pair]:
    """Pair each image with each category, shown or not: --eval_categories all and listed."""
    refuse(choice, "only with --eval_categories gt; the others ask for what is absent anyway", "negatives")
    if choice.eval_categories == "listed" and choice.categories is None:
        raise DataError("--eval_categories listed: needs --categories, which lists them")
    if choice.eval_categories == "all" and choice.categories is not None:
        raise DataError("--eval_categories all: asks for all categories, so without --categories; to restrict: listed")
    return [(image_id, name) for image_id in images for name in categories]
