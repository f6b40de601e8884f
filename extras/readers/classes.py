"""Read images with class names: a labels file, the lists of the published datasets, or class folders."""

from collections import Counter, defaultdict
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

from PIL import Image

from data import (
    Choice,
    DataError,
    Example,
    Found,
    ImageSource,
    class_of,
    leave_out,
    names_in,
    refuse,
    wanted_categories,
)
from extras.readers.choose import pick_split, take_shots, whole_file
from extras.readers.rows import (
    COLUMNS,
    class_solution,
    column,
    file_lines,
    file_of,
    file_rows,
    have_splits,
    rows_of_split,
)

CLASS_LAYOUT = """Images with class names are read from the first of these that is there:
  DIR/labels.csv, .json or .jsonl     rows with file (within DIR), class_name and split (train, val or test);
                                      without split, all rows are for training
  DIR/annotations/trainval.txt        Oxford-IIIT Pet as published (task pets), with test.txt and DIR/images/
  DIR/data/images_variant_...txt      FGVC-Aircraft as published (task aircraft), with DIR/data/images/
  DIR/train/CLASS/*.jpg               class folders, with DIR/val/CLASS/ or DIR/test/CLASS/"""

# (place of the label, for errors; the image, or what is wrong with it; its class name or all accepted names)
Labeled = tuple[str, ImageSource | DataError, Any]


def read_classes(
    data: str, split: str, choice: Choice, published: Callable[[Path, str], list[Labeled]] | None = None
) -> Found:
    """Read images with class names, one example each; layout: CLASS_LAYOUT.

    published: reads the lists that came with a dataset, and returns an empty list if they are missing.
    """
    root, notes = Path(data), []
    if not root.is_dir():
        raise DataError(f"{root}: no such folder. {CLASS_LAYOUT}")
    labeled = labels_file(root, split, choice) or (published and published(root, split))
    labeled = labeled or class_folders(root, split, notes)
    examples, more = class_examples(root, labeled, split, choice)
    return examples, notes + more


def class_examples(root: Path, labeled: list[Labeled], split: str, choice: Choice) -> Found:
    """Make an example of each labeled image; root: the folder or file of the labels, left out of the examples' ids."""
    refuse(choice, "questions about classes ask for no category", "negatives", "eval_categories")
    notes: list[str] = []
    images, flaws, listed, class_of_image = defaultdict(list), [], cache(names_in), {}
    folder = root if root.is_dir() else root.parent
    for number, (where, path, name) in enumerate(labeled):
        try:
            if isinstance(path, DataError):
                raise path
            solution = class_solution(name)
            if isinstance(path, Path) and path.name not in listed(path.parent):
                raise DataError(f"{path}: no such image")
            if class_of_image.setdefault(str(path), solution) != solution:
                raise DataError(f"{path} is {class_of_image[str(path)]} in another row and {solution} here")
        except DataError as error:
            flaws.append(f"{where}: {error}")
            continue
        id = f"{split}/{str(path).removeprefix(f'{folder}/') if isinstance(path, Path) else f'{root.name}/{number}'}"
        example = Example(id, (path,), None, solution, class_of(solution), image_id=number)
        images[example.category].append(example)
    leave_out(root, flaws, choice, notes)
    if images and all(name.isdecimal() for name in images):
        raise DataError(
            f"{root}: the classes are called {', '.join(list(images)[:3])} ...; a model can answer names only, "
            "so a labels file has to give them"
        )
    wanted = wanted_categories(root, list(images), choice.categories)
    taken = take_shots(root, {name: images[name] for name in wanted}, choice, notes)
    return [example for found in taken.values() for example in found], notes


def labels_file(root: Path, split: str, choice: Choice) -> list[Labeled]:
    """Read the images of a split from DIR/labels.csv, .json or .jsonl; an empty list without such a file."""
    files = [root / name for name in ("labels.csv", "labels.json", "labels.jsonl") if (root / name).is_file()]
    if not files:
        return []
    rows = file_rows(files[0])
    if not have_splits(rows):
        whole_file(files[0], split, choice)
    chosen = rows_of_split(files[0], rows, split)
    labeled = [(where, file_of(row, root), column(row, "class")) for where, row in chosen]
    if labeled and not any(row.get(name) for _, row in chosen if isinstance(row, dict) for name in COLUMNS["images"]):
        where, row = chosen[0]
        raise DataError(f"{where}: file and class_name expected, and split if it has more than one; found {row}")
    return labeled


def pets_lists(root: Path, split: str) -> list[Labeled]:
    """Read Oxford-IIIT Pet's annotations/{trainval,test}.txt.

    A line is `Abyssinian_100 1 1 1`: the image name, which begins with the breed, and numbers.
    """
    file = root / "annotations" / {"train": "trainval.txt", "val": "test.txt"}[split]
    names = [(where, line.split()[0]) for where, line in file_lines(file)] if file.is_file() else []
    return [(where, root / "images" / f"{name}.jpg", name.rpartition("_")[0]) for where, name in names]


def aircraft_lists(root: Path, split: str) -> list[Labeled]:
    """Read FGVC-Aircraft's images_variant_{trainval,train,test}.txt, with lines such as `1025794 707-320`."""
    parts = {"train": ("trainval", "train"), "val": ("test",)}[split]
    files = (base / f"images_variant_{part}.txt" for base in (root, root / "data") for part in parts)
    file = next((file for file in files if file.is_file()), None)
    split_lines = ((where, *line.partition(" ")) for where, line in (file_lines(file) if file else ()))
    return [(where, file.parent / "images" / f"{image}.jpg", name) for where, image, _, name in split_lines]


def class_folders(root: Path, split: str, notes: list[str]) -> list[Labeled]:
    """List the images in the class folders of a split; note how many files cannot be opened as images."""
    folder = root / pick_split(root, split, names_in(root), CLASS_LAYOUT)
    kinds = [kind for kind in sorted(folder.iterdir()) if kind.is_dir() and not kind.name.startswith(".")]
    files = [(kind, path) for kind in kinds for path in sorted(kind.iterdir()) if not path.name.startswith(".")]
    endings = Image.registered_extensions()
    kind_of = [path.is_dir() and "folders" or path.suffix.lower() or "without an ending" for _, path in files]
    if others := Counter(kind for kind in kind_of if kind not in endings):
        heif = "; pip install pillow-heif, and convert them" if others.keys() & {".heic", ".heif"} else ""
        counts = ", ".join(f"{n} {kind}" for kind, n in others.items())
        notes.append(f"{folder}: no images for Pillow, and left out: {counts}{heif}")
    return [
        (f"class folder {kind}", path, kind.name)
        for kind, path in files
        if path.suffix.lower() in endings and path.is_file()
    ]


read_pets = partial(read_classes, published=pets_lists)
read_aircraft = partial(read_classes, published=aircraft_lists)
