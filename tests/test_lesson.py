"""docs/lesson.ipynb runs from top to bottom, and what it stores is what its cells print."""

import json
import os
import re
import subprocess
import sys

import pytest

from conftest import ROOT

NOTEBOOK = ROOT / "docs" / "lesson.ipynb"
CELLS = json.loads(NOTEBOOK.read_text())["cells"]
CODE = [cell for cell in CELLS if cell["cell_type"] == "code"]
BETWEEN = "\n-- next cell --\n"


def source(cell: dict) -> str:
    return "".join(cell["source"])


def stored(cell: dict) -> str:
    """What a cell printed when it was stored."""
    return "".join("".join(o["text"]) for o in cell["outputs"] if o.get("name") == "stdout")


def test_it_is_stored_with_its_outputs():
    """In order, without an error, at most 1 MB; nothing of the machine that ran it."""
    assert NOTEBOOK.stat().st_size < 1_000_000
    assert [cell["execution_count"] for cell in CODE] == list(range(1, len(CODE) + 1))
    kinds = [o["output_type"] for cell in CODE for o in cell["outputs"]]
    assert "error" not in kinds and kinds.count("execute_result") == 3  # the answers and two figures
    text = NOTEBOOK.read_text()
    assert str(ROOT) not in text and "/home/" not in text and "/tmp/" not in text


def test_its_code_is_no_wider_than_the_projects():
    assert max(len(line) for cell in CODE for line in source(cell).splitlines()) <= 120


@pytest.mark.slow
def test_its_cells_run_in_order():
    """In one process as plain Python: GRPO gains, shuffled rewards ruin; what is on paper prints what is stored."""
    cells = f"print({BETWEEN!r})\n".join(source(cell) + "\n" for cell in CODE)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", cells], cwd=ROOT / "docs", env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    printed = [text.strip("\n") for text in done.stdout.split(BETWEEN)]
    assert len(printed) == len(CODE)
    # Numbers of the model depend on the CPU's rounding; those on paper do not.
    on_paper = [i for i, cell in enumerate(CODE) if re.search("truth = |hardly apart|A_paper|def gspo", source(cell))]
    assert len(on_paper) == 5
    for i in on_paper:
        assert printed[i] == stored(CODE[i]).strip("\n")
    text = "\n".join(printed)
    for by_hand, by_code in re.findall(r"A ([+-][\d.]+) by hand, ([+-][\d.]+) by virft.py", text):
        assert float(by_hand) == pytest.approx(float(by_code), abs=2e-3)
    loss, norm = map(float, re.search(r"loss ([+-][\d.]+), norm of its gradient ([\d.]+)", text).groups())
    assert abs(loss) < 1e-5 and norm > 0.01
    first, last = map(float, re.search(r"([\d.]+) in the first ten steps, ([\d.]+) in the last", text).groups())
    ruined = float(re.search(r"IoU reward: ([\d.]+) in the last ten steps", text).group(1))
    assert last > first + 0.02 and ruined < first - 0.05
    assert float(re.search(r"difference of a log-probability: (\S+)", text).group(1)) < 1e-4
