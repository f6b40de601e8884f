"""Explain what to do when a model, a dataset or a package cannot be loaded."""

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path

from data import DataError

# Class name of an error, or of one of its causes or base classes -> what went wrong, what to do. The first match is
# used. Names instead of classes, so that no library has to be imported here.
REASONS = {
    "GatedRepoError": (
        "you must accept its owners' terms first", "Accept them at https://huggingface.co/{name}, then: hf auth login"
    ),
    "RevisionNotFoundError": ("the repository has no such revision", "Check the part after @"),
    "RepositoryNotFoundError": ("no such repository, or a private one", "Check the name; if private: hf auth login"),
    "TransportError": ("the connection failed or broke off", "Run the same command again: what was downloaded is kept"),
}  # fmt: skip
REASONS["DatasetNotFoundError"] = REASONS["RepositoryNotFoundError"]
REASONS["LocalEntryNotFoundError"] = REASONS["ConnectionError"] = REASONS["TransportError"]


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error and those that it was raised from."""
    while error:
        yield error
        error = error.__cause__ or error.__context__


@contextlib.contextmanager
def loading(what: str, name: str) -> Iterator[None]:
    """Turn an error raised while loading `name` into a SystemExit that says what to do.

    If `name` is not a path on disk, the message has three lines.
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
    except Exception as error:
        if "trust_remote_code" in str(error):
            raise SystemExit(
                f"{what} {name} brings code of its own, which is not run here: take a conversion for transformers' own "
                "classes (their names often end in -hf), or another family of docs/models.md"
            ) from None
        kinds = {kind.__name__ for cause in causes(error) for kind in type(cause).__mro__}
        known = next((words for kind, words in REASONS.items() if kind in kinds), None)
        if known is None and not isinstance(error, (OSError, ValueError)):  # these a folder without a model raises
            raise
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        if Path(name).exists():
            raise SystemExit(f"{what} {name} cannot be loaded: {reason}") from None
        reason, remedy = known or (reason, "Check the name: a folder here, or NAME or NAME@REVISION on the hub")
        raise SystemExit(
            f"{what} {name} is not a folder here and cannot be had from the hub: {reason}\n"
            f"{remedy.format(name=name.partition('@')[0])}.\n"
            "Without the hub: --data COCO_DIR --model MODEL_DIR, both on disk; or the demo: bash run.sh"
        ) from None
