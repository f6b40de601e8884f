"""Explain what to do when a model, a dataset or a package cannot be loaded."""

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path

from data import DataError


@contextlib.contextmanager
def loading(what: str, name: str) -> Iterator[None]:
    """Turn errors of loading `name` into a SystemExit that says what to do.

    If the hub cannot be reached, the message has three lines.
    """
    try:
        yield
    except ImportError as error:
        says = (r"pip install ([\w-]+)", r"requires the (\w+) library", r"No module named '(\w+)'")
        package = next((found[1].lower() for pattern in says if (found := re.search(pattern, str(error)))), None)
        remedy = f"pip install {package}" if package else " ".join(str(error).split())
        raise SystemExit(f"{what} {name} needs a package that is not installed: {remedy}") from None
    except DataError:  # its message already says what to do
        raise
    except (OSError, ValueError) as error:  # the hub raises OSError, a folder without a model ValueError
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        if Path(name).exists():
            raise SystemExit(f"{what} {name} cannot be loaded: {reason}") from None
        raise SystemExit(
            f"{what} {name} is not a folder here and cannot be had from the hub: {reason}\n"
            "With COCO and a model on disk:  accelerate launch virft.py --task coco --data COCO_DIR --model MODEL_DIR\n"
            "Offline, with what is in here:  bash run.sh"
        ) from None
