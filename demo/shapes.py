"""Pictures of colored shapes, written to disk as an ordinary COCO dataset.

    python demo/shapes.py --out demo/data            # 2000 training and 240 held-out pictures, seconds

Each picture shows one or two objects of an asked category among distractors. The same seed gives the
same pictures, byte for byte.
"""

import argparse
import json
import random
from pathlib import Path

from PIL import Image, ImageDraw

SIZE = 112  # pixels, both sides
GRID = 8  # corners stand on this grid
SIDES = range(24, 65, GRID)
COLORS = {"red": (214, 50, 48), "green": (52, 158, 82), "blue": (56, 98, 214), "yellow": (236, 190, 40)}
SHAPES = ("circle", "square", "triangle")
CATEGORIES = [f"{color} {shape}" for color in COLORS for shape in SHAPES]

Scene = list[tuple[str, tuple[int, int, int, int]]]  # (category, x1 y1 x2 y2)


def random_scene(rng: random.Random) -> Scene:
    """One or two objects of one category and up to two of others (none in a third of the scenes), not touching."""
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


def draw_scene(scene: Scene, rng: random.Random) -> Image.Image:
    """The scene on a light background whose shade the seed chooses; a shape fills its box to the pixel."""
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
    """root/annotations/instances_<split>.json and root/<split>/*.png."""
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("demo/data"))
    parser.add_argument("--train", type=int, default=2000, help="training pictures")
    parser.add_argument("--val", type=int, default=240, help="held-out pictures")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    write_split(args.out, "train", args.train, args.seed)
    write_split(args.out, "val", args.val, args.seed)
    print(f"{args.train} training and {args.val} held-out pictures of {len(CATEGORIES)} categories in {args.out}")


if __name__ == "__main__":
    main()
