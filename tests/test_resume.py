"""Checkpoints: whole or not at all, and a run that goes on from one is the run that was never interrupted."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

import virft
from conftest import ROOT
from extras import checkpoints, evaluate

FLAGS = {
    "task": "coco", "max_completion_tokens": 32, "group_size": 4, "prompts_per_step": 4, "micro_batch": 8, "workers": 0,
    "steps": 4, "save_every": 1, "lr": 1e-3, "warmup_steps": 2, "beta": 0.04, "model": ROOT / "demo" / "model",
}  # fmt: skip


def argv(**flags) -> list[str]:
    return [part for name, value in (FLAGS | flags).items() for part in (f"--{name}", str(value))]


@pytest.fixture(scope="module")
def uninterrupted(shapes_dir, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("uninterrupted") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoints, "KEEP", 10)
        virft.main(argv(data=shapes_dir, out=out))
    return out


@pytest.fixture(autouse=True)
def keep_all(monkeypatch):
    monkeypatch.setattr(checkpoints, "KEEP", 10)


@pytest.fixture
def stopped(uninterrupted, tmp_path) -> Path:
    """The same run as SIGKILL left it in the fourth step: two checkpoints, longer logs that are cut off."""
    out = shutil.copytree(uninterrupted, tmp_path / "run")
    shutil.rmtree(out / "model")
    for step in (3, 4):
        shutil.rmtree(out / "checkpoints" / f"step_{step:06d}")
    for step in (1, 3):  # 1: of an earlier kill
        (out / "checkpoints" / f"step_{step:06d}.unfinished").mkdir()
    with (out / "rollouts.jsonl").open("a") as log:
        log.write('{"step": 4, "id": "tra')
    return out


def assert_same_run(one: Path, two: Path, model: str = "model") -> None:
    """Bit for bit: weights, completions, rewards, and every metric that is not a time."""
    weights = [load_file(out / model / "model.safetensors") for out in (one, two)]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert (one / "rollouts.jsonl").read_text() == (two / "rollouts.jsonl").read_text()
    logs = [[json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()] for out in (one, two)]
    timeless = [[{n: v for n, v in row.items() if "second" not in n} for row in log] for log in logs]
    assert timeless[0] == timeless[1]


def resume(shapes_dir, out: Path, **flags) -> None:
    virft.main(argv(data=shapes_dir, out=out, resume="true", **flags))


def refused(shapes_dir, out: Path, **flags) -> str:
    kept = {file: file.read_bytes() for file in out.rglob("*") if file.is_file()}
    with pytest.raises(SystemExit) as error:
        resume(shapes_dir, out, **flags)
    assert kept == {file: file.read_bytes() for file in out.rglob("*") if file.is_file()}, "a refusal changes nothing"
    return str(error.value)


def test_a_resumed_run_is_the_uninterrupted_run(uninterrupted, stopped, shapes_dir):
    resume(shapes_dir, stopped)
    assert_same_run(uninterrupted, stopped)
    assert sorted(f.name for f in (stopped / "checkpoints").iterdir()) == [f"step_{i:06d}" for i in (1, 2, 3, 4)]


def test_a_resumed_run_may_be_chunked_otherwise(uninterrupted, stopped, shapes_dir, monkeypatch):
    """Settings of memory may change: the same numbers but for rounding. The newest two checkpoints stay."""
    monkeypatch.setattr(checkpoints, "KEEP", 2)
    resume(shapes_dir, stopped, micro_batch=3)
    rows = [(out / "metrics.jsonl").read_text().splitlines()[-1] for out in (uninterrupted, stopped)]
    assert json.loads(rows[0])["grad_norm"] == pytest.approx(json.loads(rows[1])["grad_norm"], rel=1e-3)
    assert sorted(f.name for f in (stopped / "checkpoints").iterdir()) == ["step_000003", "step_000004"]


def test_the_reference_stays_the_initial_model(stopped, shapes_dir):
    run = virft.start(virft.parse_config(argv(data=shapes_dir, out=stopped, resume="true")))
    initial = dict(AutoModelForImageTextToText.from_pretrained(FLAGS["model"], dtype=torch.float32).named_parameters())
    reference, policy = (dict(model.named_parameters()) for model in (run.reference, run.model))
    assert reference.keys() == initial.keys() and all(torch.equal(reference[n], initial[n]) for n in initial)
    assert run.done == 2 and sum(not torch.equal(policy[n], initial[n]) for n in initial) > 50


def test_adapters_resume_too(shapes_dir, tmp_path):
    flags = {"lora_rank": 2, "lr": 1e-2, "data": shapes_dir}
    virft.main(argv(out=tmp_path / "one", **flags))
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    for step in (3, 4):
        shutil.rmtree(tmp_path / "two" / "checkpoints" / f"step_{step:06d}")
    resume(shapes_dir, tmp_path / "two", lora_rank=2, lr=1e-2)
    assert_same_run(tmp_path / "one", tmp_path / "two")


CHANGES = {
    "lr": 1e-4, "steps": 8, "group_size": 8, "seed": 1, "beta": 0, "loss": "dapo", "prompts_per_step": 2,
    "temperature": 0.9, "negatives": 0.2, "rewards": "iou=1",
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_settings_that_cannot_change_are_refused_by_name(stopped, shapes_dir, name):
    message = refused(shapes_dir, stopped, **{name: CHANGES[name]})
    assert f"--{name}" in message and "keeps its settings" in message


def test_other_data_is_refused(stopped, shapes_dir, tmp_path):
    other = shutil.copytree(shapes_dir, tmp_path / "data")
    file = other / "annotations" / "instances_train.json"
    table = json.loads(file.read_text())
    table["annotations"][0]["bbox"][2] -= 8
    file.write_text(json.dumps(table))
    assert "the data has changed" in refused(other, stopped)
    shutil.copytree(shapes_dir, tmp_path / "moved")
    resume(tmp_path / "moved", stopped)  # the same data elsewhere is no change


def spoil(folder: Path, how: str) -> None:
    if how == "cut off":
        file = folder / "optimizer.safetensors"
        file.write_bytes(file.read_bytes()[:-1])
    elif how == "missing":
        (folder / "model" / "model.safetensors").unlink()
    elif how == "not JSON":
        (folder / "state.json").write_text("{")
    elif how == "foreign":
        (folder / "state.json").write_text('{"global_step": 2}')
    elif how == "empty":
        shutil.rmtree(folder)
        folder.mkdir()


@pytest.mark.parametrize("how", ["cut off", "missing", "not JSON", "foreign", "empty"])
def test_a_damaged_checkpoint_is_refused_and_the_good_one_offered(stopped, shapes_dir, how):
    newest = stopped / "checkpoints" / "step_000002"
    spoil(newest, how)
    message = refused(shapes_dir, stopped)
    assert str(newest) in message and f"continue from {stopped / 'checkpoints' / 'step_000001'}" in message
    shutil.rmtree(newest)
    assert checkpoints.read(checkpoints.folders(stopped)[-1]).step == 1
    spoil(stopped / "checkpoints" / "step_000001", how)
    assert "There is no other" in refused(shapes_dir, stopped)


def test_nothing_to_resume_is_said(shapes_dir, tmp_path):
    assert "holds no checkpoint" in refused(shapes_dir, tmp_path)
    (tmp_path / "model").mkdir()
    assert refused(shapes_dir, tmp_path).endswith("model is there, so this run is over")


def test_an_evaluation_that_was_cut_off_is_made_on_resume(shapes_dir, tmp_path):
    """A signal comes in the step before it, or a kill within: the checkpoint is there, the scores are not."""
    flags = {"steps": 2, "save_every": 1, "eval_every": 2, "eval_limit": 2, "beta": 0}
    virft.main(argv(data=shapes_dir, out=tmp_path / "run", **flags))
    shutil.rmtree(tmp_path / "run" / "eval_000002")
    resume(shapes_dir, tmp_path / "run", **flags)
    scores = tmp_path / "run" / "eval_000002" / "scores.json"
    made = scores.stat().st_mtime_ns
    resume(shapes_dir, tmp_path / "run", **flags)
    assert scores.stat().st_mtime_ns == made, "what is finished is not made again"


def test_a_signal_cuts_an_evaluation_off(shapes_dir, tmp_path, monkeypatch):
    """It stops after the batch and saves; resumed, it equals the whole run."""
    flags = {"steps": 3, "save_every": 0, "eval_every": 2, "eval_limit": 10}
    virft.main(argv(data=shapes_dir, out=tmp_path / "whole", **flags))

    def signaled(*args):
        written.append(args)
        os.kill(os.getpid(), signal.SIGTERM)

    written = []
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(evaluate, "append_own", signaled)
        virft.main(argv(data=shapes_dir, out=tmp_path / "run", **flags))
    assert stop.value.code == 128 + signal.SIGTERM and len(written) == 1
    assert [f.name for f in (tmp_path / "run" / "checkpoints").iterdir()] == ["step_000002"]
    assert not (tmp_path / "run" / "eval_000002" / "scores.json").exists()
    for _ in range(2):  # a signal during the evaluation that is made first
        with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
            patch.setattr(evaluate, "append_own", signaled)
            resume(shapes_dir, tmp_path / "run", **flags)
        assert stop.value.code == 128 + signal.SIGTERM
        assert [f.name for f in (tmp_path / "run" / "checkpoints").iterdir()] == ["step_000002"]
    resume(shapes_dir, tmp_path / "run", **flags)
    assert_same_run(tmp_path / "run", tmp_path / "whole")
    scores = [(tmp_path / name / "eval_000002" / "scores.json").read_text() for name in ("run", "whole")]
    assert scores[0] == scores[1] and json.loads(scores[0])["answers"] == 10


def test_a_reward_that_was_changed_is_named_and_accepted(shapes_dir, tmp_path, capsys):
    (mine := tmp_path / "mine.py").write_text("def one(completion, solution):\n    return len(completion) / 100\n")
    flags = {"rewards": f"{mine}:one", "steps": 2, "save_every": 1, "beta": 0}
    virft.main(argv(data=shapes_dir, out=tmp_path / "run", **flags))
    resume(shapes_dir, tmp_path / "run", **flags)
    assert "changed since" not in capsys.readouterr().out
    mine.write_text("def one(completion, solution):\n    return 1\n")
    resume(shapes_dir, tmp_path / "run", **flags)
    assert "step_000002 was written: mine.py" in capsys.readouterr().out


FULL_DISK = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a write past the limit fails, as on a full disk
sys.path.insert(0, ".")
import virft
from extras import checkpoints
plain = checkpoints.save
def save(run):
    if run.done == 2:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))
    plain(run)
checkpoints.save = save
virft.main(sys.argv[1:])
"""


def test_a_full_disk_leaves_the_last_good_checkpoint(shapes_dir, tmp_path):
    out = tmp_path / "run"
    flags = argv(data=shapes_dir, out=out)
    done = subprocess.run([sys.executable, "-c", FULL_DISK, *flags], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "step_000002 cannot be written" in done.stderr and "step_000001: make room" in done.stderr
    assert [f.name for f in (out / "checkpoints").iterdir()] == ["step_000001"]
    checkpoints.read(out / "checkpoints" / "step_000001")


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_ten_kills_change_nothing(shapes_dir, tmp_path, processes):
    """SIGKILL at ten moments, four of them in parts of a save, six at random; the run ends as if nothing had been."""
    rng = random.Random(processes)
    moments = ["model", "optimizer", "rename", "prune"] + [f"{rng.uniform(0.0, 0.8):.2f}" for _ in range(6)]
    rng.shuffle(moments)
    ended = {}
    for name, ways in (("plain", ["never"]), ("killed", [*moments, "never"])):
        out = tmp_path / name
        for moment in ways:
            whole = out / "checkpoints"
            again = {"resume": "true"} if any(re.fullmatch(r"step_\d+", f.name) for f in whole.glob("*")) else {}
            if not again:
                shutil.rmtree(out, ignore_errors=True)
            flags = argv(data=shapes_dir, out=out, steps=40, **again)
            command = ["tests/killed.py", moment, *flags]
            if processes > 1:
                command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes), *command]
            environment = os.environ | {"OMP_NUM_THREADS": "1"}
            done = subprocess.run(
                [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280
            )
            if moment == "never":
                assert done.returncode == 0, done.stdout + done.stderr
            else:
                killed = done.returncode == -signal.SIGKILL or "Signal 9 (SIGKILL)" in done.stderr
                assert killed, f"{moment}: {done.stdout}{done.stderr}"
                ended[moment] = ended.get(moment, 0) + 1
    print(f"{processes} processes, killed at {ended}")
    assert sum(ended.values()) == 10
    assert_same_run(tmp_path / "plain", tmp_path / "killed")
