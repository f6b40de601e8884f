"""What README.md and the pages in docs/ say can be done, is done here; what they link to is there."""

import dataclasses
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import copied
import mia_dpo
import virft
from bench import memory
from conftest import ROOT
from demo import breakages, report, shapes
from rewards import REWARDS
from test_tasks import name_as

PAGES = {path: path.read_text() for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))}
LESSON = ROOT / "docs" / "lesson.ipynb"
PAGES[LESSON] = "\n\n".join(
    "".join(cell["source"]) for cell in json.loads(LESSON.read_text())["cells"] if cell["cell_type"] == "markdown"
)
README, ALL = PAGES[ROOT / "README.md"], "\n".join(PAGES.values())
# Lines of code blocks, indented or fenced, and code within a line, where they are commands.
COMMAND = (
    r"^(?: {4})?((?:accelerate|torchrun|python|bash) .*)$"
    r"|`((?:accelerate|torchrun|python|bash) [^`]*)`"
)  # fmt: skip
COMMANDS = sorted({
    line.strip() for line in re.findall(COMMAND, ALL, re.M)
    for line in line if line
})  # fmt: skip


def fenced(language: str, marker: str) -> str:
    """The one code block of a language, on any page, that holds the marker."""
    (found,) = (block for block in re.findall(rf"```{language}\n(.*?)```", ALL, re.S) if marker in block)
    return found


def prose(text: str) -> str:
    """A page without its fenced blocks, in which Python's brackets look like links."""
    return re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)


# ------------------------------------------------------------------------------------------------
# Links and commands.


def anchors(text: str) -> set[str]:
    """The anchors that GitHub gives to a page's headings."""
    titles = re.findall(r"^#+ (.*)$", prose(text), re.M)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


def test_links_lead_somewhere():
    """Links are relative to their page; a name in backticks is a function, class or constant of the linked file."""
    linked = set()
    for page, text in PAGES.items():
        for label, target in re.findall(r"\[([^]]*)\]\(([^)]*)\)", prose(text)):
            if target.startswith("http"):
                continue
            file, _, anchor = target.partition("#")
            path = (page.parent / file).resolve() if file else page
            assert path.exists(), f"{page.name}: {target}"
            if anchor:
                assert anchor in anchors(PAGES[path]), f"{page.name}: {target}"
            if re.fullmatch(r"`\w+`", label) and path.suffix == ".py":
                name = label.strip("`")
                source = copied.definitions(path).get(name, "")
                assert source.startswith(("def ", "class ")) or source and name.isupper(), (
                    f"{page.name}: {name} in {target}"
                )
            if page == ROOT / "README.md":
                linked.add(path)
    assert PAGES.keys() - {ROOT / "README.md"} <= linked, "every page of docs/ is linked to from the README"


def test_symbols_are_names_of_the_code():
    """Every name in the table of symbols is used in the function or constant that is said to make it."""
    defined = copied.definitions(ROOT / "virft.py")
    rows = re.findall(r"^\| .* \| ((?:`\w+`(?:, )?)+) \| .* \| (.*\(virft\.py\)) \|$", README, re.M)
    assert len(rows) == 10
    for names, functions in rows:
        text = "".join(defined[function] for function in re.findall(r"`(\w+)`", functions))
        assert all(re.search(rf"\b{name}\b", text) for name in re.findall(r"`(\w+)`", names)), names


def named_in(source: str, metric: str) -> bool:
    """Whether code logs a metric of this name: as a string, a keyword, or under reward/ or seconds/ by an f-string."""
    space, slash, name = metric.partition("/")
    if not slash:
        return bool(re.search(rf"[\"']{metric}[\"']|\b{metric}=", source))
    known = name == "NAME" or (name in REWARDS if space == "reward" else f'"{name}"' in source)
    return space in ("reward", "seconds") and f"{space}/{{" in source and known


def test_the_pages_name_what_is_there():
    """Tests, flags and metrics that the pages speak of exist."""
    written = "".join(file.read_text() for file in [*(ROOT / "tests").glob("*.py"), ROOT / "test_rewards.py"])
    assert set(re.findall(r"`(test_[a-z0-9_]+)`", ALL)) <= set(re.findall(r"def (test_[a-z0-9_]+)", written))
    configs = (virft.Config, mia_dpo.BuildConfig, mia_dpo.TrainConfig)
    flags = {field.name for config in configs for field in dataclasses.fields(config)} | {"help"}
    launchers = {"config_file", "num_processes", "nnodes", "nproc_per_node", "rdzv_backend", "rdzv_endpoint"}
    launchers.add("requirement")  # pip's
    scripts = "".join(file.read_text() for file in [*ROOT.glob("bench/*.py"), *ROOT.glob("demo/*.py")])
    benches = set(re.findall(r'add_argument\(\s*"--([a-z]+)"', scripts))
    assert set(re.findall(r"--([a-z]+(?:_[a-z0-9]+)*)", ALL)) <= flags | launchers | benches

    source = "".join(file.read_text() for file in (ROOT / "virft.py", ROOT / "data.py", *ROOT.glob("extras/*.py")))
    section = PAGES[ROOT / "docs" / "tasks.md"].partition("## Every metric")[2].partition("\n## ")[0]
    listed = {name for cell in re.findall(r"^\| (`.*?) \|", section, re.M) for name in re.findall(r"`([^`]+)`", cell)}
    assert len(listed) >= 20, "the table of metrics was found"
    mentioned = set(re.findall(r"`((?:reward|seconds)/\w+)`", ALL))
    assert not (invented := {name for name in listed | mentioned if not named_in(source, name)}), invented
    assert not named_in(source, "reward/iuo") and not named_in(source, "seconds/trian") and not named_in(source, "x/y")

    (logged,) = re.findall(r"`train` logs (`.*?)\.\n", PAGES[ROOT / "docs" / "mia_dpo.md"], re.S)
    assert all(f'"{name}"' in (ROOT / "mia_dpo.py").read_text() for name in re.findall(r"`([^`]+)`", logged))


def test_docs_have_the_memory_table(capsys):
    memory.print_tables()
    assert capsys.readouterr().out in PAGES[ROOT / "docs" / "gpus.md"]


DEMOS = ("classification", "grounding", "multi-image", "mia-dpo")


def parsed(command: str):
    """The settings of a command of virft.py or mia_dpo.py, or of run.sh where that passes its flags on."""
    words = [word for word in shlex.split(command, comments=True) if word not in ("...", "$again")]
    if "mia_dpo.py" in words:
        part, *flags = words[words.index("mia_dpo.py") + 1 :]
        return {"build": mia_dpo.parse_build, "train": mia_dpo.parse_train}[part](flags)
    flags = words[words.index("virft.py" if "virft.py" in words else "run.sh") + 1 :]
    return virft.parse_config([word for word in flags if word != "demo" and word not in DEMOS])


TRAINS = r"virft\.py --\w|mia_dpo\.py (build|train)|run\.sh --|run\.sh demo"
OURS = [command for command in COMMANDS if re.search(TRAINS, command)]
OURS = [command for command in OURS if "bench/" not in command and "--help" not in command]


@pytest.mark.parametrize("command", OURS)
def test_the_flags_of_a_command_are_good(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert parsed(command)


def test_every_command_is_run_or_read_by_a_test():
    """A command of the pages that no test knows is one that nobody has tried."""
    tests = "".join(file.read_text() for file in (ROOT / "tests").glob("*.py"))
    # Named in passing; this; needs scipy; argparse's.
    by_hand = ("accelerate launch", "bash run.sh test", "python -c ", "python virft.py --help")
    for command in sorted(set(COMMANDS) - set(OURS)):
        if not command.startswith(by_hand):
            script, part = re.fullmatch(r"(?:python|bash) (-m \S+|\S+) ?([a-z-]*).*", command).groups()
            stem = Path(script).stem
            if script.startswith("-m "):
                known = rf'sys\.executable, "-m", "{re.escape(script[3:])}"'
            elif stem == "run":
                known = rf'run_sh\(house, "{part or "demo"}"'
            else:
                known = rf'"{stem}\.py"|^from bench import .*\b{stem}\b'
            assert re.search(known, tests, re.M), command


# ------------------------------------------------------------------------------------------------
# Copy this.


def test_the_parts_to_copy_stand_alone():
    """In a process that sees these lines, what they are said to need, and nothing else of this project."""
    done = subprocess.run([sys.executable, ROOT / "tests" / "copied.py"], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip().endswith("rewards, advantages, loss, shared prefix"), (
        done.stderr
    )
    alone = [sys.executable, "-I", "-S", ROOT / "tests" / "copied.py", "--rewards"]
    bare = subprocess.run(alone, capture_output=True, text=True)
    assert bare.returncode == 0, bare.stderr


def test_the_table_of_parts_is_the_one_that_is_tried():
    section = README.partition("## Copy this")[2].partition("\n## ")[0]
    rows = dict(re.findall(r"^\| (advantages|loss|shared prefix) \| (.*?) \|", section, re.M))
    assert fenced("python", "from typing import Any, NamedTuple").split() == copied.HEADER.split()
    listed = {name: set(re.findall(r"`(\w+)`", row)) for name, row in rows.items()}
    assert listed == {name: set(ours) for name, ours in copied.PARTS.items()}


def test_the_lines_that_use_a_shared_prefix_are_the_ones_that_are_tried():
    tried = (ROOT / "tests" / "copied.py").read_text()
    lines = [line.partition("  #")[0] for line in fenced("python", "fork(prefill").splitlines()]
    assert len(lines) == 4 and all(f"        {line}\n" in tried for line in lines)


def adapter(tmp_path: Path, marker: str, call: str):
    """What an adapter of docs/models.md returns, with rewards.py beside it and nothing else of this project."""
    (tmp_path / "rewards.py").write_text((ROOT / "rewards.py").read_text())
    (tmp_path / "adapter.py").write_text(fenced("python", marker) + f"\nimport json\nprint(json.dumps({call}))\n")
    done = subprocess.run([sys.executable, "adapter.py"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


HALF = "<think>a</think><answer>[{'Position': [0, 0, 100, 40], 'Confidence': 0.75}]</answer>"


def test_the_adapter_to_trl(tmp_path):
    """TRL calls with prompts, completions and the columns of the dataset by name; chats or texts."""
    chats, texts = [[{"role": "assistant", "content": HALF}]], [HALF, "nothing"]
    boxes = [[0, 0, 100, 50]]
    call = (
        f"[boxes_in_the_image(prompts=None, completions={chats!r}, solution=[{boxes}], trainer_state=None), "
        f"boxes_in_the_image(completions={texts!r}, solution=[{boxes}, []])]"
    )
    assert adapter(tmp_path, "GRPOTrainer", call) == [[pytest.approx(0.8 + 0.75 + 1)], [pytest.approx(2.55), 0.0]]


def test_the_adapter_to_verl(tmp_path):
    call = (
        f"compute_score(data_source='coco', solution_str={HALF!r}, ground_truth='[[0, 0, 100, 50]]', extra_info={{}})"
    )
    assert adapter(tmp_path, "compute_score", call) == pytest.approx(2.55)


# ------------------------------------------------------------------------------------------------
# The lesson and the drawing of a step.


def test_the_drawing_of_a_step_has_the_codes_names():
    drawing = (ROOT / "docs" / "step.svg").read_text()
    names = re.findall(r'class="code">(\w+)<', drawing)
    assert {"prefill", "fork", "sample", "judged", "branch", "grpo_loss", "two_stage_backward", "update"} <= set(names)
    assert all(hasattr(virft, name) for name in [*names, *re.findall(r'class="shape">(group_\w+)', drawing)])
    # The numbers beside the bars are the advantages of the rewards.
    shown = [float(a.replace("−", "-")) for a in re.findall(r">([+−]\d\.\d\d)<", drawing)]
    rewards = torch.tensor([[float(r) for r in re.findall(r">(\d\.\d\d)<", drawing)]])
    assert shown == pytest.approx(virft.group_advantages(rewards).flatten().tolist(), abs=0.005)


@pytest.mark.parametrize("name", breakages.BREAKAGES)
def test_a_breakage_is_the_one_that_the_lesson_tells(name, tmp_path):
    """Its line is in virft.py once, the lesson shows the line in its place, and the copy is virft.py but for that."""
    broken = breakages.BREAKAGES[name]
    copy = breakages.broken_copy(broken, tmp_path).read_text()
    lines = [(a, b) for a, b in zip((ROOT / "virft.py").read_text().splitlines(), copy.splitlines()) if a != b]
    assert len(lines) == bool(broken.old) and len(copy.splitlines()) == len(
        (ROOT / "virft.py").read_text().splitlines()
    )
    compile(copy, name, "exec")
    if broken.against:
        (row,) = re.findall(rf"^\| {name} \|.*$", PAGES[LESSON], re.M)
        assert broken.new in row and all(f"--{flag} {value}" in row for flag, value in broken.flags.items())


@pytest.mark.slow
def test_breakages_train_and_draw(llava_dir, shapes_dir, tmp_path):
    """The inverted clip and what it is compared with, two steps each; the same command trains nothing twice."""
    out = tmp_path / "demo"
    flags = {
        "task": "coco", "data": shapes_dir, "model": llava_dir, "out": out / "train", "max_completion_tokens": 8,
        "group_size": 8, "prompts_per_step": 2, "steps": 2, "workers": 0, "beta": 0, "lr": 1e-3,
        "rewards": ["iou=1", "format=1"],
    }  # fmt: skip
    virft_flags = [str(p) for n, v in flags.items() for p in (f"--{n}", *(v if isinstance(v, list) else [v]))]
    (out / "train").mkdir(parents=True)
    settings = dataclasses.asdict(virft.parse_config(virft_flags))
    (out / "train" / "config.json").write_text(json.dumps(settings))
    command = [sys.executable, ROOT / "demo" / "breakages.py", "--out", out, "--seeds", "3", "--steps", "2"]
    command += ["--only", "clip inverted"]
    for _ in range(2):
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        assert done.returncode == 0, done.stderr
    assert "clip inverted" in done.stdout and "%|" not in done.stderr, "the second time there is nothing left to train"
    assert (out / "breakages.png").exists()
    record = out / "breakages" / "clip_inverted" / "3" / "trained.json"
    record.write_text(record.read_text().replace('"0.001"', '"0.002"'))
    assert "%|" in subprocess.run(command, capture_output=True, text=True).stderr, "of other flags: trained again"
    assert '"0.002"' not in record.read_text()
    for name in ("clip_inverted", "unbroken_4_inner_epochs"):
        config = json.loads((out / "breakages" / name / "3" / "config.json").read_text())
        assert config["inner_epochs"] == 4 and config["seed"] == 3


# ------------------------------------------------------------------------------------------------
# run.sh.


@pytest.fixture
def house(tmp_path) -> Path:
    """The project in a folder of its own, its .venv being the environment of this test: what run.sh would have made."""
    folder = tmp_path / "house"
    (folder / ".venv").mkdir(parents=True)
    for name in ("bin", "lib", "lib64", "pyvenv.cfg"):
        if (Path(sys.prefix) / name).exists():
            (folder / ".venv" / name).symlink_to(Path(sys.prefix) / name)
    folders = ("demo", "bench", "tests", "extras")
    for name in ("run.sh", "requirements.txt", *folders, *(path.name for path in ROOT.glob("*.py"))):
        (folder / name).symlink_to(ROOT / name)
    summed = subprocess.run(["cksum"], stdin=(ROOT / "requirements.txt").open(), capture_output=True, text=True).stdout
    for gpu in ("none", "nvidia"):
        (folder / ".venv" / f"ready-{gpu}-{summed.strip().replace(' ', '')}").touch()
    return folder


def run_sh(house: Path, *argv, check: bool = True) -> subprocess.CompletedProcess:
    done = subprocess.run(["bash", "run.sh", *map(str, argv)], cwd=house, capture_output=True, text=True)
    assert not check or done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done


@pytest.mark.slow
def test_reproduce_evaluates_trains_evaluates_and_goes_on(house, llava_dir, tmp_path):
    """The command of docs/tested.md on a small folder in COCO's layout with a tiny model.

    What was finished is not done twice.
    """
    assert "bash run.sh reproduce --data DIR" in COMMANDS
    assert "--data DIR" in run_sh(house, "reproduce", "--model", "x", check=False).stderr
    root = tmp_path / "coco"
    for split in ("train", "val"):
        shapes.write_split(root, split, 12, seed=0)
    name_as(root, "fewshot8")
    flags = [
        "--data", root, "--model", llava_dir, "--steps", "2", "--prompts_per_step", "2",
        "--max_completion_tokens", "8", "--workers", "0", "--lr", "1e-3", "--save_every", "1",
    ]  # fmt: skip
    first = run_sh(house, "reproduce", *flags).stdout
    header, row, trained = (line for line in first.splitlines() if line.startswith("| ") and "---" not in line)
    assert header.startswith("|  | mAP | ") and {"cat", "bed"} < set(header.split(" | "))
    assert re.fullmatch(r"\| before( \| -?\d+\.\d)+ \|", row) and trained.startswith("| GRPO | ")
    run = house / "runs" / "reproduce"
    config = json.loads((run / "train" / "config.json").read_text())
    paper = {
        "group_size": 8,
        "beta": 0.04,
        "shots": 4,
        "categories": "fewshot8",
        "temperature": 1.0,
        "max_pixels": 401408,
    }
    assert {name: config[name] for name in paper} == paper
    defaults = virft.Config()
    assert (virft.parse_config([]).lr, defaults.prompts_per_step, defaults.steps) == (1e-6, 16, 200)
    assert json.loads((run / "after" / "config.json").read_text())["model"] == "runs/reproduce/train/model"
    # As if training had failed in the second step, which leaves a model: finished from the checkpoint of the first.
    (run / "train" / "finished").unlink()
    shutil.rmtree(run / "train" / "checkpoints" / "step_000002")
    evaluated_at = (run / "before" / "scores.json").stat().st_mtime_ns
    first_step = (
        (run / "train" / "metrics.jsonl").read_text().splitlines()[0]
    )  # with its seconds: it is not taken again
    again = run_sh(house, "reproduce", *flags)
    assert again.stdout.splitlines()[-6:] == first.splitlines()[-6:] and "2 of 2 steps done" in again.stdout
    assert (run / "before" / "scores.json").stat().st_mtime_ns == evaluated_at
    metrics = (run / "train" / "metrics.jsonl").read_text().splitlines()
    assert metrics[0] == first_step and [json.loads(line)["step"] for line in metrics] == [1, 2]
    trained_at = (run / "train" / "metrics.jsonl").stat().st_mtime_ns
    run_sh(house, "reproduce", *flags)
    assert (run / "train" / "metrics.jsonl").stat().st_mtime_ns == trained_at
    assert "was begun with" in run_sh(house, "reproduce", *flags, "--seed", "1", check=False).stderr


def test_the_row_of_the_paper_is_in_percent(tmp_path):
    for name, ap in (("before", 0.1964), ("after", 0.5)):
        (tmp_path / name).mkdir()
        scores = {"AP": ap, "categories": {"bus": {"AP": ap / 2}, "stop sign": {"AP": 0.7}}}
        (tmp_path / name / "scores.json").write_text(json.dumps(scores))
    table = report.paper_table({"base": tmp_path / "before", "GRPO": tmp_path / "after"}).splitlines()
    assert table[0] == "|  | mAP | bus | stop sign |"
    assert table[2:] == ["| base | 19.6 | 9.8 | 70.0 |", "| GRPO | 50.0 | 25.0 | 70.0 |"]


def test_run_sh_says_what_there_is(house):
    """An unknown word prints the lines at the top of run.sh, all of them."""
    done = run_sh(house, "dmeo", check=False)
    words = ("controls", "breakages", "reproduce", "your own training")
    assert done.returncode == 2 and all(word in done.stdout for word in words)
    assert "no demo detction" in run_sh(house, "demo", "detction", check=False).stderr


def test_flash_attn_is_compiled_on_request_in_the_version_that_is_pinned(house):
    (house / ".venv" / "bin").unlink()
    (house / ".venv" / "bin").mkdir()
    python = house / ".venv" / "bin" / "python"
    python.write_text('#!/bin/sh\necho "$@"\n')
    python.chmod(0o755)
    said = run_sh(house, "flash-attn").stdout.splitlines()
    (pinned,) = re.findall(r"^# (flash-attn==\S+)", (ROOT / "requirements.txt").read_text(), re.M)
    assert said == ["-m pip install ninja wheel", f"-m pip install --no-build-isolation {pinned}"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_prove_asks_for_a_gpu(house):
    assert "--rehearse true" in run_sh(house, "prove", check=False).stderr


@pytest.mark.slow
def test_prove_ends_in_a_row_to_send_in(house, shapes_dir):
    """Rehearsed on a CPU with the demo's model, two steps of training included."""
    said = run_sh(house, "prove", "--rehearse", "true", "--data", shapes_dir).stdout
    row = said.splitlines()[-1]
    assert re.match(r"\| .* \| 24,4,2 \| [0-9.]+ s \(.*GB \| .* \| [0-9.]+ -> [0-9.]+ \|$", row), said


@pytest.mark.slow
@pytest.mark.parametrize("family", ["", "classification", "grounding", "multi-image"])
def test_the_demos_run(house, family):
    """Their commands, three steps long; what the figures are is for the pages to say.

    Controls and breakages go on from the first.
    """
    run_sh(house, "demo", *family.split(), "--steps", "3")
    out = house / "runs" / ("demo" + (f"_{family.replace('-', '_')}" if family else ""))
    assert json.loads((out / "summary.json").read_text()).keys() >= {"before", "after"}
    if not family:
        assert (out / "before_after.png").exists() and (out / "report.html").exists()
        assert "uniform resize" in run_sh(house, "controls").stdout
        assert "G 2" in run_sh(house, "breakages", "--seeds", "0", "--steps", "3", "--only", "G 2").stdout
        assert (out / "breakages.png").exists()
        shutil.copytree(out, again := out.with_name("again"))
        report = [sys.executable, ROOT / "demo" / "report.py", again, out]
        told = subprocess.run(report, capture_output=True, text=True, check=True).stdout
        assert re.search(r"\| COCO AP \| (\S+) \| (\S+) \| \2 \| [+-]", told) and (again / "curves.png").exists()


@pytest.mark.slow
def test_the_mia_dpo_demo_runs_and_gains(house):
    """As docs/mia_dpo.md tells it: more right answers about one of several pictures, none lost about the only one."""
    run_sh(house, "demo", "mia-dpo", "--seed", "0")
    summary = json.loads((house / "runs" / "demo_mia_dpo" / "summary.json").read_text())
    several = summary["accuracy, asked about one of several pictures"]
    single = summary["accuracy, asked about the only picture"]
    assert several[2] > several[0] + 0.04 and single[2] > single[0] - 0.01
