"""Run every family of models through its own processor and write the table of docs/models.md.

    python bench/family_table.py            # a minute on two cores; rewrites the table in docs/models.md
    python bench/family_table.py --print    # prints it instead

tests/test_processors.py does the work: two steps of training and an evaluation by `virft.main`, token ids against the
processor's own chat template, boxes in what the processor returns, and log-probabilities and gradients against the
repeated prompt. Families whose processors cannot be built here get their figures from tests/test_families.py, with
inputs made by hand. A row is written only if all tests of its family pass.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "models.md"
BEGIN, END = "<!-- made by bench/family_table.py -->", "<!-- end of the table -->"
TESTS = "trains_and_answers or is_what_the_processor_makes or exact or in_0_to_1000"
BY_HAND = {  # name in tests/families.py -> model_type, why not by its own processor
    "Pixtral": ("llava", "Pixtral's image processor imports torchvision"),
    "Mistral3": ("mistral3", "its processor imports torchvision"),
    "LFM2-VL": ("lfm2_vl", "its image processor exists for torchvision only"),
}
SOURCES = {  # model_type -> where its convention is documented
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl"), "model cards and cookbooks"),
    **dict.fromkeys(("qwen3_vl", "qwen3_vl_moe"), "its maintainers, QwenLM/Qwen3-VL#1427"),
    "qwen3_5": "QwenLM/Qwen3.8-Flash-Next#4",
    "internvl": "its Chat Data Format; OpenGVLab/InternVL#285",
    **dict.fromkeys(("glm4v", "glm4v_moe", "glm46v"), "GLM-V's README"),
    "minicpmv4_6": "its maintainers, OpenBMB/MiniCPM-V#982",
    **dict.fromkeys(("llava", "llava_next", "llava_onevision"), "they learned decimals in 0..1: said at the start"),
    "paligemma": "location tokens, y first: refused, unless `--coordinates relative`",
}


def run_families() -> list[tuple[str, bool, dict[str, str]]]:
    """Run the tests; return (its id, whether it passed, what it recorded) for each."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        by_hand = " or ".join(f"equals_the_repeated_prompt and {name}" for name in BY_HAND)
        command = [sys.executable, *"-m pytest -q -n 2 -m".split(), "slow or not slow", "-k", f"{TESTS} or {by_hand}"]
        files = ["tests/test_processors.py", "tests/test_families.py", f"--junitxml={report}"]
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        subprocess.run([*command, *files], cwd=ROOT, env=environment, check=False)
        cases = ElementTree.parse(report).iter("testcase")
        return [
            (case.get("name"), case.find("failure") is None and case.find("error") is None,
             {p.get("name"): p.get("value") for p in case.iter("property")})
            for case in cases
        ]  # fmt: skip


def table(cases: list[tuple[str, bool, dict[str, str]]]) -> list[str]:
    """Return the lines of the table; families of which a test failed are named on standard error instead."""
    sys.path.insert(0, str(ROOT))
    from data import COORDINATES_OF_FAMILY

    passed, figures = defaultdict(list), defaultdict(dict)
    for name, ok, recorded in cases:
        family = re.search(r"\[(?:\d-)?([^\]]+?)(?:-\d)?\]", name)[1]
        passed[family].append(ok)
        for figure, value in recorded.items():
            if figure in ("logp", "gradient"):
                value = max(float(value), figures[family].get(figure, 0.0))
            figures[family][figure] = value
    lines = [
        "| `model_type` | image processor | prompt shared | log-probs | gradients | coordinates | source or remark |",
        "|---|---|---|---|---|---|---|",
    ]
    for family, results in passed.items():
        found = figures[family]
        if not all(results) or "logp" not in found:
            print(f"{family}: {results.count(False)} of {len(results)} tests failed: no row", file=sys.stderr)
            continue
        kind, why = BY_HAND.get(family, (found.get("model_type"), None))
        frame = COORDINATES_OF_FAMILY.get(kind)
        named = kind in SOURCES and frame is None
        coordinates = "other" if named else {"relative": "0..1000", None: "0..1000, not known"}.get(frame, frame)
        processor = f"none: {why}" if why else f"`{found['processor'].removesuffix('Pil')}`"
        shares = "yes" if found["shares"] == "True" else "in sampling"
        deviations = [f"{found[name]:.1e}".replace("e-0", "e-") for name in ("logp", "gradient")]
        cells = (f"`{kind}`", processor, shares, *deviations, coordinates)
        lines.append(f"| {' | '.join(cells)} | {SOURCES.get(kind, 'none was found')} |")
    return [*lines[:2], *sorted(lines[2:])]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--print", action="store_true", help="print the table instead of writing docs/models.md")
    only_print = parser.parse_args().print
    lines = "\n".join(table(run_families()))
    if only_print:
        print(lines)
        return
    text = PAGE.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n{lines}\n{END}{rest.partition(END)[2]}", encoding="utf-8")


if __name__ == "__main__":
    main()
