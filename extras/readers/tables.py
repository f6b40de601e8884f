"""Read tables with the `datasets` library: parquet files, save_to_disk folders and datasets on the hub."""

import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets

from data import Choice
from extras.readers.choose import pick_split, whole_file


@dataclass(frozen=True, repr=False)
class CellImage:
    """Open an image in a table when it is called, so that a dataset need not fit into memory."""

    table: Any
    where: str
    row: int
    column: str
    number: int

    def __repr__(self) -> str:
        return f"{self.where}, {self.column}[{self.number}]"

    def __call__(self) -> io.BytesIO:
        cell = self.table[self.row][self.column]
        cell = cell[self.number] if isinstance(cell, list) else cell
        return io.BytesIO(cell["bytes"] if isinstance(cell, dict) else cell)


def with_names(feature: Any, value: Any) -> Any:
    """Replace the numbers of a ClassLabel by its names, also within lists and records; -1 (no label) becomes None."""
    if isinstance(feature, datasets.ClassLabel):
        return None if value is None or value < 0 else feature.int2str(value)
    if isinstance(feature, dict) and isinstance(value, dict):
        return {name: with_names(feature[name], part) for name, part in value.items()}
    if isinstance(value, list) and (inner := getattr(feature, "feature", None)) is not None:
        return [with_names(inner, part) for part in value]
    return value


def path_of(cell: Any) -> str | None:
    """Return the path of an image that lies beside the table, None if the table holds the image itself."""
    if isinstance(cell, dict) and cell.get("bytes") is None:
        return cell.get("path")
    return cell if isinstance(cell, str) else None


def table_rows(source: str, split: str, choice: Choice) -> Iterator[tuple[str, dict]]:
    """Yield the (place, row) of every row of a table; images become CellImages, numbers of classes their names.

    source: a parquet file, a save_to_disk folder, a folder of images with metadata files, or a dataset on the hub.
    """
    path = Path(source)
    if path.is_file():
        table = datasets.load_dataset("parquet", data_files=source, split="train")
    elif any((path / name).is_file() for name in ("dataset_info.json", "dataset_dict.json")):
        table = datasets.load_from_disk(source)
    else:
        table = datasets.load_dataset(source)
    if not isinstance(table, dict):
        if "split" not in table.column_names:  # else read_rows takes the rows of the split
            whole_file(path, split, choice)
    elif len(table) == 1 and split != "train" and choice.one_split:
        (table,) = table.values()
    else:
        hint = f"It has {', '.join(table)}; for evaluation, --eval_data names other data"
        table = table[pick_split(source, split, table, hint)]
    pictures = {"image", "images"}  # in parquet files of other tools these are bytes without the type Image
    for column, feature in table.features.items():  # encoded bytes instead of decoded images
        inner, encoded = getattr(feature, "feature", None), datasets.Image(decode=False)
        if isinstance(feature, datasets.Image) or isinstance(inner, datasets.Image):
            table = table.cast_column(column, datasets.List(encoded) if inner else encoded)
            pictures.add(column)
    for number in range(len(table)):
        where = f"{source}: row {number}"
        row = {name: with_names(table.features[name], value) for name, value in table[number].items()}
        for column in row.keys() & pictures:
            cells = row[column] if isinstance(row[column], list) else [row[column]]
            row[column] = [
                path_of(cell) or CellImage(table, where, number, column, i) for i, cell in enumerate(cells) if cell
            ]
        yield where, row
