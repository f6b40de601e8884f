"""Read preference pairs: those that `mia_dpo.py build` wrote, and published ones."""

from pathlib import Path
from typing import Any

from data import IMAGE_MARK, Choice, DataError, Example, Found, content_of, leave_out
from extras.processors import refuse_placeholders
from extras.readers.rows import file_rows, images_of, messages_of
from rewards import normalize_name

PUBLISHED_MARK = "<image-placeholder>"  # in the released pairs of MIA-DPO
PAIR_LAYOUT = """A pair has image (a file or a list of files, relative to the folder of the pairs), prompt, chosen and
rejected, and may have an id. The prompt may mark the place of each image with <image>. Prompt and answers are texts, or
messages with role and content."""


def read_pairs(file: Path, processor: Any, longest: int, skip_bad: bool = False) -> Found:
    """Read pairs as examples whose solution is (chosen, rejected); also return notes.

    longest: limit of an answer in tokens. Pairs that teach nothing are left out and counted: an answer is empty, or
    both are the same to `normalize_name`. DataError names the line of a pair that cannot be read; with skip_bad such
    pairs are left out and counted, too.
    """
    if not file.is_file():
        raise DataError(f"--pairs {file}: must be a file of pairs, .jsonl, .json or .csv")
    examples, flaws, notes, same = [], [], [], 0
    for where, row in file_rows(file):
        try:
            example = pair(row, file.parent, len(examples), notes)
            if lost := [path for path in example.images if not path.is_file()]:
                raise DataError(f"{lost[0]}: no such image")
            for text in example.solution:
                refuse_placeholders(processor, example, text, (IMAGE_MARK, PUBLISHED_MARK))
                if (tokens := len(processor.tokenizer(text)["input_ids"])) > longest:
                    raise DataError(f"an answer has {tokens} tokens; half of the model's positions are {longest}")
        except DataError as error:
            flaws.append(f"{where}: {error}; the pair is {str(row)[:300]}")
            continue
        chosen, rejected = map(normalize_name, example.solution)
        if chosen and rejected and chosen != rejected:
            examples.append(example)
        else:
            same += 1
    leave_out(file, flaws, Choice(skip_bad_images=skip_bad), notes, "pairs")
    if same:
        notes.append(f"{file}: {same} pairs left out, whose answers are the same or one is empty")
    if not examples:
        raise DataError(f"{file}: no pairs; the table of `build` says which filter dropped them")
    return examples, notes


def pair(row: Any, folder: Path, number: int, notes: list[str]) -> Example:
    """Convert one row to an example. Raises DataError for a row that is not of PAIR_LAYOUT."""
    if not isinstance(row, dict) or not all(isinstance(row.get(name), str | list) for name in ("chosen", "rejected")):
        raise DataError(f"chosen and rejected expected. {PAIR_LAYOUT}")
    images, asked = images_of(row, folder), row.get("prompt") or row.get("question")
    asked = asked if isinstance(asked, list) else [{"role": "user", "content": asked}] if asked else []
    questions, answers = [], []
    for name in ("chosen", "rejected"):
        said = row[name] if isinstance(row[name], list) else [{"role": "assistant", "content": row[name]}]
        question, answer = messages_of([*asked, *said], notes)
        questions.append(question.replace(PUBLISHED_MARK, IMAGE_MARK))
        answers.append(answer)
    if questions[0] != questions[1] or not all(isinstance(answer, str) for answer in answers):
        raise DataError(f"one question and an answer in words to it expected twice. {PAIR_LAYOUT}")
    content_of(questions[0], len(images))  # raises DataError where marks and images differ
    return Example(str(row.get("id", number)), images, None, tuple(answers), "pair", question=questions[0])
