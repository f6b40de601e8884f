"""Write pictures of colored shapes to disk in the usual layout of each family of tasks.

    python demo/shapes.py --out demo/data                    # 2000 training and 400 held-out pictures, seconds
    python demo/shapes.py classification --out demo/data     # the same for another family

  detection        a COCO folder: one or two objects of an asked category among distractors
  classification   class folders: one object, its category the class
  grounding        a ReasonSeg folder: an instruction that fits one object among distractors, and its outline
  multi-image      JSON lines: two pictures of one object each, and a question about one of the two
  mia-dpo          JSON lines: one picture of one object, and its name; mia_dpo.py combines it with other pictures

The same seed gives the same pictures, byte for byte.
"""

import argparse
import json
import math
import random
from pathlib import Path

from PIL import Image, ImageDraw

SIZE = 112  # pixels, both sides
GRID = 8  # corners are multiples of this
SIDES = range(24, 65, GRID)
COLORS = {"red": (214, 50, 48), "green": (52, 158, 82), "blue": (56, 98, 214), "yellow": (236, 190, 40)}
SHAPES = ("circle", "square", "triangle")
CATEGORIES = [f"{color} {shape}" for color in COLORS for shape in SHAPES]

ORDINALS = ("first", "second")

Box = tuple[int, int, int, int]  # x1 y1 x2 y2
Scene = list[tuple[str, Box]]  # (category, box)


def random_scene(rng: random.Random) -> Scene:
    """Draw one or two objects of one category and up to two of others (none in a third of the scenes).

    Objects do not overlap.
    """
    asked = rng.choice(CATEGORIES)
    others = [c for c in CATEGORIES if c != asked]
    wanted = [asked] * rng.choice((1, 1, 2)) + rng.choices(others, k=rng.choice((0, 1, 2)))
    scene: Scene = []
    for category in wanted:
        for _ in range(50):
            width, height = rng.choice(SIDES), rng.choice(SIDES)
            x, y = rng.randrange(0, SIZE - width + 1, GRID), rng.randrange(0, SIZE - height + 1, GRID)
            box = (x, y, x + width, y + height)
            if all(box[2] <= b[0] or b[2] <= box[0] or box[3] <= b[1] or b[3] <= box[1] for _, b in scene):
                scene.append((category, box))
                break
    return scene


def lone_scene(rng: random.Random) -> Scene:
    """Draw a scene with one object."""
    return random_scene(rng)[:1]


def scene_to_point_at(rng: random.Random) -> tuple[Scene, int]:
    """Draw a scene and the index of an object in it that is the only one of its category."""
    while True:
        scene = random_scene(rng)
        categories = [category for category, _ in scene]
        alone = [i for i, category in enumerate(categories) if categories.count(category) == 1]
        if alone:
            return scene, rng.choice(alone)


def scenes_to_tell_apart(rng: random.Random) -> tuple[Scene, Scene, int]:
    """Draw two scenes with one object each, of different categories, and the index of the scene to ask about."""
    while True:
        first, second = lone_scene(rng), lone_scene(rng)
        if first[0][0] != second[0][0]:
            return first, second, rng.randrange(2)


def instruction(category: str) -> str:
    return f"the {category}"


def pair_question(ordinal: str) -> str:
    """Return the problem of a multi-image row: the whole prompt, including the form of the answer."""
    return (
        f"What is in the {ordinal} picture? First reason about what you see. Answer in exactly this form:\n"
        "<think> ... </think><answer>name</answer>\nWrite nothing but the name inside <answer>."
    )


def name_question() -> str:
    """Return the problem of a row with one picture; mia_dpo.py asks it about one of several pictures."""
    return (
        "What is in the picture? Answer in exactly this form:\n<answer>name</answer>\n"
        "Write nothing but the name inside <answer>."
    )


def outline(category: str, box: Box) -> list[tuple[float, float]]:
    """Return a polygon around the shape; its bounding box is `box`."""
    x1, y1, x2, y2 = box
    if category.endswith("square"):
        return [(x1, y1), (x2, y1), (x2, y2), (x1, y2)]
    if category.endswith("triangle"):
        return [((x1 + x2) / 2, y1), (x2, y2), (x1, y2)]
    angles = [math.pi * i / 16 for i in range(32)]
    width, height = x2 - x1, y2 - y1
    return [(x1 + width * (1 + math.cos(a)) / 2, y1 + height * (1 + math.sin(a)) / 2) for a in angles]


def draw_scene(scene: Scene, rng: random.Random) -> Image.Image:
    """Draw the scene on a light background of random shade; a shape fills its box to the pixel."""
    image = Image.new("RGB", (SIZE, SIZE), tuple(rng.randrange(225, 256) for _ in range(3)))
    draw = ImageDraw.Draw(image)
    for category, (x1, y1, x2, y2) in scene:
        color, shape = category.split()
        inside = (x1, y1, x2 - 1, y2 - 1)
        if shape == "circle":
            draw.ellipse(inside, COLORS[color])
        elif shape == "square":
            draw.rectangle(inside, COLORS[color])
        else:
            draw.polygon([((x1 + x2 - 1) / 2, y1), (x2 - 1, y2 - 1), (x1, y2 - 1)], COLORS[color])
    return image


def write_split(root: Path, split: str, count: int, seed: int) -> None:
    """Write root/annotations/instances_<split>.json and root/<split>/*.png."""
    rng = random.Random(f"{seed}/{split}")
    ids = {category: i for i, category in enumerate(CATEGORIES, 1)}
    images, annotations = [], []
    (root / split).mkdir(parents=True, exist_ok=True)
    for image_id in range(1, count + 1):
        scene = random_scene(rng)
        name = f"{image_id:06d}.png"
        draw_scene(scene, rng).save(root / split / name)
        images.append({"id": image_id, "file_name": name, "width": SIZE, "height": SIZE})
        for category, (x1, y1, x2, y2) in scene:
            box = [x1, y1, x2 - x1, y2 - y1]
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": ids[category],
                    "bbox": box,
                    "area": box[2] * box[3],
                    "iscrowd": 0,
                }
            )
    categories = [{"id": i, "name": category} for category, i in ids.items()]
    (root / "annotations").mkdir(exist_ok=True)
    table = {"images": images, "annotations": annotations, "categories": categories}
    (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(table))


def write_classes(root: Path, split: str, count: int, seed: int) -> None:
    """Write root/<split>/<category>/*.png."""
    rng = random.Random(f"{seed}/{split}")
    for number in range(1, count + 1):
        scene = lone_scene(rng)
        folder = root / split / scene[0][0]
        folder.mkdir(parents=True, exist_ok=True)
        draw_scene(scene, rng).save(folder / f"{number:06d}.png")


def write_reasonseg(root: Path, split: str, count: int, seed: int) -> None:
    """Write root/<split>/*.jpg and, for each, a .json of the same name."""
    rng = random.Random(f"{seed}/{split}")
    (root / split).mkdir(parents=True, exist_ok=True)
    for number in range(1, count + 1):
        scene, asked = scene_to_point_at(rng)
        category, box = scene[asked]
        file = root / split / f"{number:06d}.jpg"
        draw_scene(scene, rng).save(file, quality=95, subsampling=0)  # full color resolution keeps the edges sharp
        target = {"label": "target", "points": outline(category, box)}
        file.with_suffix(".json").write_text(json.dumps({"text": [instruction(category)], "shapes": [target]}))


def write_pairs(root: Path, split: str, count: int, seed: int) -> None:
    """Write root/<split>.jsonl and root/<split>/*.png, two pictures per row."""
    rng, rows = random.Random(f"{seed}/{split}"), []
    (root / split).mkdir(parents=True, exist_ok=True)
    for number in range(1, count + 1):
        *scenes, asked = scenes_to_tell_apart(rng)
        names = [f"{split}/{number:06d}_{ordinal}.png" for ordinal in ORDINALS]
        for scene, name in zip(scenes, names):
            draw_scene(scene, rng).save(root / name)
        solution = scenes[asked][0][0]
        rows.append({"images": names, "problem": pair_question(ORDINALS[asked]), "solution": solution})
    (root / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_single(root: Path, split: str, count: int, seed: int) -> None:
    """Write root/<split>.jsonl and root/<split>/*.png, one picture per row."""
    rng, rows = random.Random(f"{seed}/{split}"), []
    (root / split).mkdir(parents=True, exist_ok=True)
    for number in range(1, count + 1):
        scene, name = lone_scene(rng), f"{split}/{number:06d}.png"
        draw_scene(scene, rng).save(root / name)
        rows.append({"image": name, "problem": name_question(), "solution": scene[0][0]})
    (root / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


WRITERS = {
    "detection": write_split,
    "classification": write_classes,
    "grounding": write_reasonseg,
    "multi-image": write_pairs,
    "mia-dpo": write_single,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("family", nargs="?", choices=WRITERS, default="detection")
    parser.add_argument("--out", type=Path, default=Path("demo/data"))
    parser.add_argument("--train", type=int, default=2000, help="training pictures (multi-image: pairs of them)")
    parser.add_argument("--val", type=int, default=400, help="held-out pictures")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    for split, count in (("train", args.train), ("val", args.val)):
        WRITERS[args.family](args.out, split, count, args.seed)
    print(f"{args.train} training and {args.val} held-out pictures of {len(CATEGORIES)} categories in {args.out}")


if __name__ == "__main__":
    main()
