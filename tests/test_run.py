"""virft.py as a user runs it: whole processes, from flags to files."""

import dataclasses
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

import data
import mia_dpo
import virft
from conftest import ROOT, SHARED, shared
from extras import checkpoints, report

SMALL = {
    "max_completion_tokens": 12,
    "group_size": 4,
    "prompts_per_step": 4,
    "micro_batch": 8,
    "steps": 3,
    "workers": 1,
    "lr": 0.001,
}


def command(**flags) -> list[str]:
    return [
        str(part)
        for name, value in flags.items()
        for part in (f"--{name}", *(value if isinstance(value, list) else [value]))
    ]


def virft_py(*launcher, env=None, check=True, **flags) -> subprocess.CompletedProcess:
    launcher = launcher or (sys.executable,)
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"} | (env or {})
    done = subprocess.run(
        [*launcher, "virft.py", *command(**flags)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
    )
    if check and done.returncode:
        raise AssertionError(done.stdout + done.stderr)
    return done


@pytest.fixture(scope="module")
def trained(llava_dir, shapes_dir, tmp_path_factory):
    """One short training by accelerate launch, looked at by several tests."""
    out = tmp_path_factory.mktemp("trained") / "run"
    accelerate = (sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--cpu", "--num_processes", "1")
    done = virft_py(
        *accelerate, **SMALL, task="coco", data=shapes_dir, model=llava_dir, out=out, eval_every=3, eval_limit=6,
        negatives=0.2, system_prompt="Look.", inner_epochs=2,
    )  # fmt: skip
    return out, done.stdout


def test_a_run_whose_steps_were_mostly_skipped_says_so_and_fails(llava_dir, shapes_dir, tmp_path, monkeypatch, signals):
    """Two of three gradients are not finite: the model is saved, and the exit status is not 0."""
    plain, norms = torch.nn.utils.clip_grad_norm_, iter([0.5, math.nan, math.inf])
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *args: plain(*args) * 0 + next(norms))
    settings = SMALL | {"workers": 0, "save_every": 3}
    flags = command(**settings, task="coco", data=shapes_dir, model=llava_dir, out=tmp_path / "run")
    for again in ((), ("--resume", "true")):  # resumed with no step left, it has not become a good run
        with pytest.raises(SystemExit, match="2 of 3 steps changed nothing: their gradients were not finite"):
            virft.main([*flags, *again])
    assert (tmp_path / "run" / "model" / "model.safetensors").exists()


def test_training_writes_what_it_promises(trained):
    out, printed = trained
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert [row["lr"] for row in rows] == pytest.approx([1e-3, 1e-3 * 2 / 3, 1e-3 / 3])
    promised = {
        "loss", "kl", "clip_fraction", "entropy", "grad_norm", "skipped_updates", "reward", "reward/iou",
        "reward/confidence", "reward/format", "reward_std", "zero_variance_groups", "completion_tokens", "truncated",
        "parsed", "no_objects", "empty_think", "seconds/sample", "seconds/reward", "seconds/reference", "seconds/train",
        "tokens_per_second",
    }  # fmt: skip
    assert promised <= rows[0].keys()
    rollouts = [json.loads(line) for line in (out / "rollouts.jsonl").read_text().splitlines()]
    assert (
        len(rollouts) == 3 * 4 * 4
        and {"id", "completion", "reward", "rewards", "advantage", "tokens"} <= rollouts[0].keys()
    )
    assert rollouts[0]["rewards"].keys() == {"iou", "confidence", "format"}
    assert rollouts[0]["reward"] == pytest.approx(sum(rollouts[0]["rewards"].values()))
    assert len({r["completion"] for r in rollouts[:4]}) > 1, "completions of a group differ"
    assert (out / "report.html").exists()
    assert json.loads((out / "config.json").read_text())["inner_epochs"] == 2
    assert json.loads((out / "eval_000003" / "scores.json").read_text())["answers"] == 6


def test_the_batch_arithmetic_and_the_prompt_are_printed(trained):
    """[22]"""
    _, printed = trained
    assert "4 prompts a step = 1 processes x 4, 2 encoded at once; x 4 completions = 16 a step" in printed
    assert "SYSTEM: Look." in printed and "Find every" in printed and "<image> x 16" in printed
    assert "boxes of the first image are asked for in 1000 x 1000 (relative)" in printed
    assert "--group_size 4" in printed and "--temperature" not in printed and "are trained" in printed
    described = printed[printed.index("settings other") : printed.index("ASSISTANT:")]
    assert described.count("\n") < 25
    setup = (trained[0] / "setup.txt").read_text()
    assert all(f"  {field.name} = " in setup for field in dataclasses.fields(virft.Config)) and "ASSISTANT:" in setup
    assert "have an answer that does not fit in --max_completion_tokens 12" in printed


def test_the_saved_model_loads_and_answers_alike(trained, llava_dir):
    """[14] The folder is an ordinary model folder: cache on, dtype kept, generate works, weights moved."""
    out, _ = trained
    model, processor = (
        AutoModelForImageTextToText.from_pretrained(out / "model"),
        AutoProcessor.from_pretrained(out / "model"),
    )
    assert model.config.get_text_config().use_cache is not False and model.generation_config.use_cache is not False
    before = AutoModelForImageTextToText.from_pretrained(llava_dir)
    assert model.dtype == before.dtype
    moved = [not torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters())]
    assert sum(moved) >= len(moved) - 2
    assert not list(out.glob("model.*")), "nothing half-written is left"
    inputs = processor(text="USER: <image>", images=Image.new("RGB", (112, 112)), return_tensors="pt")
    assert model.generate(**inputs, max_new_tokens=2, do_sample=False).shape[1] == inputs["input_ids"].shape[1] + 2


def test_an_earlier_run_is_kept(trained, llava_dir, shapes_dir):
    out, _ = trained
    before = (out / "metrics.jsonl").read_bytes()
    done = virft_py(check=False, **SMALL, data=shapes_dir, model=llava_dir, out=out)
    assert done.returncode and "--resume true continues it" in done.stderr
    assert (out / "metrics.jsonl").read_bytes() == before


def test_ask(trained, shapes_dir, tmp_path):
    out, _ = trained
    picture = shapes_dir / "val" / "000001.png"
    done = virft_py(
        ask=picture, categories="red circle, blue square", model=out / "model", out=tmp_path, max_completion_tokens=8
    )
    assert "red circle:" in done.stdout and "blue square:" in done.stdout
    assert (tmp_path / "000001_red_circle.png").exists() and (tmp_path / "000001_blue_square.png").exists()


def test_the_same_seed_gives_the_same_run_and_another_does_not(llava_dir, shapes_dir, tmp_path):
    texts = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        virft_py(**SMALL | {"steps": 1}, data=shapes_dir, model=llava_dir, out=tmp_path / name, seed=seed, beta=0)
        texts.append((tmp_path / name / "rollouts.jsonl").read_text())
    assert texts[0] == texts[1] != texts[2]


def test_a_run_of_two_processes_writes_what_one_writes(shapes_dir, tmp_path):
    """[29] Files once, the same completions and metrics, and an evaluation that is shared out and gathered."""
    rows, norms = [], []
    flags = SMALL | {"steps": 2, "lr": 1e-3, "prompts_per_step": 8, "max_completion_tokens": 48}
    for n in (1, 2):
        out = tmp_path / str(n)
        launcher = (
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nproc_per_node",
            str(n),
            "--master_port",
            str(29511 + n),
        )
        virft_py(
            *launcher,
            **flags,
            data=shapes_dir,
            model=ROOT / "demo" / "model",
            out=out,
            eval_every=2,
            eval_limit=5,
            seed=4,
            negatives=0.5,
        )
        metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        rollouts = [json.loads(line) for line in (out / "rollouts.jsonl").read_text().splitlines()]
        rows.append(sorted((r["step"], r["id"], r["completion"], r["reward"], r["advantage"]) for r in rollouts))
        norms.append([row["grad_norm"] for row in metrics])
        assert metrics[0]["reward_std"] > 0.1
        assert metrics[0]["zero_variance_groups"] > 0
        assert json.loads((out / "eval_000002" / "scores.json").read_text())["answers"] == 5
    assert rows[0] == rows[1]
    assert norms[0][0] > 0.05 and norms[0] == pytest.approx(norms[1], rel=1e-4)


def test_an_error_in_the_middle_leaves_a_checkpoint(llava_dir, shapes_dir, tmp_path):
    """Every step takes one picture of the epoch; one breaks late."""
    folder = shutil.copytree(shapes_dir, tmp_path / "data")
    table = json.loads((folder / "annotations" / "instances_train.json").read_text())
    order = random.Random("0/0/0").sample(range(51), 51)
    examples, _ = data.read_coco(str(folder), "train")
    taken = [examples[i].images[0] for i in order]
    first_of = next(i for i in range(20, 40) if taken[i] not in taken[:i])
    late = taken[first_of]
    assert len(table["images"]) == 24
    late.write_bytes(late.read_bytes()[:200])  # its header is whole: the start reads headers
    flags = SMALL | {
        "steps": 40,
        "prompts_per_step": 1,
        "max_completion_tokens": 4,
        "workers": 0,
    }
    done = virft_py(check=False, **flags, data=folder, model=llava_dir, out=tmp_path / "run", beta=0)
    assert done.returncode and late.name in done.stderr and "--resume true continues from" in done.stdout
    (step,) = checkpoints.folders(tmp_path / "run")
    AutoModelForImageTextToText.from_pretrained(step / "model")
    assert checkpoints.read(step).step == first_of, "all steps before the picture that broke"


def small_run(shapes_dir, llava_dir, out, **more) -> list[str]:
    flags = SMALL | {"steps": 1, "workers": 0, "max_completion_tokens": 4, "beta": 0} | more
    return command(**flags, data=shapes_dir, model=llava_dir, out=out)


def test_what_was_found_in_the_data_and_a_reward_without_return_are_written_down(
    llava_dir, shapes_dir, tmp_path, capsys
):
    (tmp_path / "mine.py").write_text("def noret(completion, solution):\n    float(len(completion))\n")
    flags = small_run(shapes_dir, llava_dir, tmp_path / "run", rewards=f"{tmp_path}/mine.py:noret")
    virft.main([*flags, "--rewards", f"{tmp_path}/mine.py:noret", "format=1"])
    said, setup = capsys.readouterr().out, (tmp_path / "run" / "setup.txt").read_text()
    for line in ("noret returns None for the right answer", "51 train examples from", "24 images in"):
        assert line in said and line in setup


def test_an_error_in_a_reward_names_the_example(llava_dir, shapes_dir, tmp_path):
    (tmp_path / "mine.py").write_text(
        "def odd(completion, solution):\n    return 1 / 0 if '<think></think>' not in completion else 1\n"
    )
    with pytest.raises(ZeroDivisionError) as error:
        virft.main(small_run(shapes_dir, llava_dir, tmp_path / "run", rewards=f"{tmp_path}/mine.py:odd"))
    assert re.search("while scoring the answers to example train/[0-9]+/", error.value.__notes__[0])


def test_an_error_after_an_update_saves_the_model_and_says_so(llava_dir, shapes_dir, tmp_path, monkeypatch, capsys):
    def no_space(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(virft, "write", no_space)
    with pytest.raises(OSError, match="No space"):
        virft.main(small_run(shapes_dir, llava_dir, tmp_path / "run"))
    assert "the model after 0 of 1 steps and the next one's update is in" in capsys.readouterr().out
    assert (tmp_path / "run" / "model" / "model.safetensors").exists() and not checkpoints.folders(tmp_path / "run")


@pytest.mark.parametrize("differentiable, said", [(True, "in chunks of 2 completions"), (False, "1 encoded at once")])
def test_the_chunks_that_are_announced_are_those_that_are_made(
    llava_dir, shapes_dir, tmp_path, monkeypatch, capsys, differentiable, said
):  # fmt: skip
    monkeypatch.setattr(virft, "cache_is_differentiable", lambda model: differentiable)
    virft.main(small_run(shapes_dir, llava_dir, tmp_path / "run", micro_batch=2))
    assert said in capsys.readouterr().out


def test_the_model_is_saved_before_anything_is_drawn(llava_dir, shapes_dir, tmp_path, monkeypatch):
    """And once the steps are done, Ctrl-C means what it meant before."""
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)

    def no_space(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(report, "write_report", no_space)
    with pytest.raises(OSError, match="No space"):
        virft.main(small_run(shapes_dir, llava_dir, tmp_path / "run"))
    assert (tmp_path / "run" / "model" / "model.safetensors").exists()
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers


def test_a_model_that_was_being_replaced_is_not_lost(llava_dir, tmp_path):
    """Killed between its two renames, save_model had moved the earlier model aside; then the next save fails."""
    shutil.copytree(llava_dir, tmp_path / "model.old")
    settings = SimpleNamespace(out=tmp_path, model=str(llava_dir), shard=False)
    run = SimpleNamespace(cfg=settings, main=True, adapters=None, model=torch.nn.Linear(1, 1))
    with pytest.raises(AttributeError, match="save_pretrained"):
        virft.save_model(run)
    AutoModelForImageTextToText.from_pretrained(tmp_path / "model")


def test_what_stands_in_out_is_never_overwritten(llava_dir, shapes_dir, tmp_path):
    """A model folder has a config.json, too. Only a run that took no step may be begun again."""
    folder = shutil.copytree(llava_dir, tmp_path / "precious")
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    for out in (folder, folder / "config.json"):
        with pytest.raises(SystemExit, match="--out .*: must be new"):
            virft.main(small_run(shapes_dir, llava_dir, out))
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    (tmp_path / "run").mkdir()
    for name in ("config.json", "setup.txt", "check.png"):
        (tmp_path / "run" / name).write_text("{}")
    (tmp_path / "run" / "virft").mkdir()  # tensorboard's
    virft.main(small_run(shapes_dir, llava_dir, tmp_path / "run"))
    assert (tmp_path / "run" / "model" / "model.safetensors").exists()
    with pytest.raises(SystemExit, match="--out .*: must be new"):
        virft.main(small_run(shapes_dir, llava_dir, tmp_path / "run"))


def test_tied_bf16_models_are_saved_as_they_came(llava_dir, shapes_dir, tmp_path):
    """Trained in float32, saved in bf16, the tied matrix once, and the configuration says so."""
    model = AutoModelForImageTextToText.from_pretrained(llava_dir, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "bf16")
    AutoProcessor.from_pretrained(llava_dir).save_pretrained(tmp_path / "bf16")
    virft_py(**SMALL | {"steps": 1}, data=shapes_dir, model=tmp_path / "bf16", out=tmp_path / "run", beta=0)
    saved = AutoModelForImageTextToText.from_pretrained(tmp_path / "run" / "model")
    assert (
        saved.dtype == torch.bfloat16
        and json.loads((tmp_path / "run/model/config.json").read_text())["dtype"] == "bfloat16"
    )
    sizes = [
        (folder / "model.safetensors").stat().st_size for folder in (tmp_path / "bf16", tmp_path / "run" / "model")
    ]
    assert abs(sizes[1] - sizes[0]) < 1000


def test_a_quantized_model_is_refused_before_it_is_trained(llava_dir, make_run, tmp_path):
    """transformers would train its weights and refuse to save them."""
    folder = shutil.copytree(llava_dir, tmp_path / "quantized")
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["quantization_config"] = {"quant_method": "gguf", "gguf_file": "x.gguf", "dequantize": False}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(SystemExit, match="quantized: it cannot be trained and saved"):
        make_run(model=folder)
    assert make_run(model=folder, eval_only="true").optimizer is None


def test_a_first_step_that_teaches_nothing_says_so(llava_dir, shapes_dir, tmp_path, capsys):
    """Random weights never earn the format reward, so no group has a reward that differs; the box reward is as flat."""
    flags = SMALL | {"task": "coco", "data": shapes_dir, "model": llava_dir, "steps": 1, "rewards": "format=1"}
    virft.main(command(**flags, out=tmp_path / "flat"))
    assert "the first step taught nothing" in capsys.readouterr().out
    (tmp_path / "any.py").write_text("def length(completion, solution):\n    return len(completion)\n")
    virft.main(command(**flags | {"rewards": f"{tmp_path / 'any.py'}:length=1"}, out=tmp_path / "any"))
    assert "taught nothing" not in capsys.readouterr().out


def test_the_run_folder_may_not_be_the_model_it_starts_from(llava_dir, shapes_dir, tmp_path):
    model = shutil.copytree(llava_dir, tmp_path / "run" / "model")
    done = virft_py(check=False, model=model, data=shapes_dir, out=model)
    assert done.returncode and "must be new" in done.stderr and (model / "config.json").exists()


@pytest.mark.parametrize("number, workers", [(signal.SIGINT, 0), (signal.SIGTERM, 0), (signal.SIGTERM, 2)])
def test_an_interruption_leaves_a_checkpoint(llava_dir, shapes_dir, tmp_path, number, workers):
    """With workers, every process gets the signal, as schedulers do it."""
    out = tmp_path / "run"
    flags = command(**SMALL | {"steps": 10_000, "workers": workers}, data=shapes_dir, model=llava_dir, out=out, beta=0)
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "virft.py", *flags],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    deadline = time.time() + 120
    while not (out / "metrics.jsonl").exists() and time.time() < deadline:
        time.sleep(0.2)
    if workers:
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    printed, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + number and "finishing this step" in errors
    done = int(re.search(r"(\d+) of 10000 steps done; --resume true continues", printed).group(1))
    assert (out / "report.html").exists() and not (out / "model").exists()
    AutoModelForImageTextToText.from_pretrained(out / "checkpoints" / f"step_{done:06d}" / "model")


def test_check_says_what_looks_wrong_and_trains_nothing(shapes_dir, tmp_path, capsys, monkeypatch):
    flags = {
        "task": "coco",
        "data": shapes_dir,
        "model": ROOT / "demo" / "model",
        "check": "true",
        "beta": 0,
        "workers": 0,
    }
    virft.main(command(**flags, max_completion_tokens=48, out=tmp_path / "good"))
    printed = capsys.readouterr().out
    assert "USER: <image> x 16" in printed and "coordinates in force: relative" in printed
    assert "nothing looks wrong" in printed and "LOOKS WRONG" not in printed
    virft.main(command(**flags, max_completion_tokens=48, think="false", out=tmp_path / "thoughtless"))
    assert "empty_think" not in (said := capsys.readouterr().out) and "thoughts are empty" not in said
    assert [f.name for f in (tmp_path / "good").iterdir()] == ["check.png"]

    def as_learned(task, example, seen_size, coordinates, think):
        return task.prompt(example.category, (1000, 1000), "relative", think), data.model_size(coordinates, seen_size)

    monkeypatch.setattr(data.Task, "question", as_learned)  # a model that speaks 0..1000 whatever is in force
    virft.main(command(**flags, max_completion_tokens=48, coordinates="pixels", out=tmp_path / "bad"))
    printed = capsys.readouterr().out
    assert "LOOKS WRONG: the boxes fit better as relative" in printed


def test_bad_images_stop_or_are_skipped_by_choice(llava_dir, shapes_dir, tmp_path):
    folder = shutil.copytree(shapes_dir, tmp_path / "data")
    for name in ("000001.png", "000003.png"):  # the very first example is among them
        victim = folder / "train" / name
        victim.write_bytes(victim.read_bytes()[:200])
    flags = SMALL | {"steps": 10, "prompts_per_step": 8, "micro_batch": 32, "beta": 0}
    stopped = virft_py(check=False, **flags, data=folder, model=llava_dir, out=tmp_path / "a")
    assert stopped.returncode and "png: not a whole image" in stopped.stderr and "Traceback" not in stopped.stderr
    done = virft_py(**flags, data=folder, model=llava_dir, out=tmp_path / "b", skip_bad_images="true")
    assert "after 10 of 10 steps" in done.stdout and "000003.png: not a whole image" in done.stdout + done.stderr
    for name in ("000001.png", "000002.png"):
        (folder / "val" / name).write_bytes((folder / "val" / name).read_bytes()[:200])
    done = virft_py(
        data=folder,
        model=llava_dir,
        out=tmp_path / "c",
        skip_bad_images="true",
        eval_only="true",
        max_completion_tokens=4,
    )
    assert "examples were skipped" in done.stdout


def test_an_overlong_prompt_names_the_example(llava_dir, shapes_dir, tmp_path):
    """[11]"""
    done = virft_py(
        check=False, **SMALL | {"max_completion_tokens": 1000}, data=shapes_dir, model=llava_dir, out=tmp_path / "a"
    )
    assert (
        done.returncode
        and "example train/" in done.stderr
        and "prompts are never cut" in done.stderr
        and "Traceback" not in done.stderr
    )


def test_what_is_missing_is_said(llava_dir, shapes_dir, tmp_path):
    """No hub: three lines; no data folder: the layout and the demo; no traceback anywhere."""
    offline = virft_py(check=False, task="coco", out=tmp_path / "a").stderr.strip().splitlines()[-3:]
    assert "Qwen/Qwen2-VL-2B-Instruct" in offline[0] and "connection failed" in offline[0]
    assert "the same command" in offline[1].lower() and "--data COCO_DIR" in offline[2] and "bash run.sh" in offline[2]
    dataset = virft_py(check=False, task="coco", model=llava_dir, out=tmp_path / "a").stderr
    assert "laolao77/ViRFT_COCO" in dataset and "bash run.sh" in dataset and "Traceback" not in dataset
    missing = virft_py(
        check=False, model=llava_dir, data=tmp_path / "no" / "such" / "folder", out=tmp_path / "a"
    ).stderr
    assert (
        "no such folder" in missing and "annotations/instances_train2017.json" in missing and "Traceback" not in missing
    )
    model = virft_py(check=False, model=tmp_path, data=shapes_dir, out=tmp_path / "a").stderr
    assert str(tmp_path) in model and "Traceback" not in model


def test_the_family_is_read_from_the_configuration_not_from_the_path(llava_dir, tmp_path, capsys):
    """[23]"""
    folder = shutil.copytree(llava_dir, tmp_path / "Qwen2.5-VL-7B-Instruct")
    settings = SimpleNamespace(model=str(folder), task="coco", max_pixels=401408, processor_options=[])
    assert virft.load_processor(settings, "auto")[1] == "relative"
    assert virft.load_processor(settings, "pixels")[1] == "pixels"
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == "llava" and not capsys.readouterr().err


@shared("coco_mini")
def test_real_photographs(tmp_path):
    """The demo's model on real COCO: rewards vary within groups, every parameter moves, evaluation ends with AP."""
    model = ROOT / "demo" / "model"
    common = {"data": SHARED / "coco_mini", "max_completion_tokens": 64}
    flags = {
        "group_size": 8,
        "prompts_per_step": 8,
        "micro_batch": 64,
        "steps": 20,
        "lr": 2e-4,
        "temperature": 1.2,
    }
    accelerate = (sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--cpu", "--num_processes", "1")
    virft_py(*accelerate, **common, **flags, task="coco", model=model, out=tmp_path / "run")
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 20 and max(row["reward_std"] for row in rows) > 0.05
    before, after = (
        dict(AutoModelForImageTextToText.from_pretrained(m).named_parameters())
        for m in (model, tmp_path / "run" / "model")
    )
    unmoved = {name for name in before if torch.equal(before[name], after[name])}
    assert unmoved == {"model.vision_tower.post_layernorm.weight", "model.vision_tower.post_layernorm.bias"}
    virft_py(
        **common,
        task="coco",
        model=tmp_path / "run" / "model",
        eval_only="true",
        eval_limit=100,
        prompts_per_step=50,
        out=tmp_path / "eval",
    )
    scores = json.loads((tmp_path / "eval" / "scores.json").read_text())
    assert 0 <= scores["AP"] <= 1 and scores["answers"] == 100


def test_run_sh_explains_itself():
    done = subprocess.run(["bash", "-n", "run.sh"], cwd=ROOT)
    assert done.returncode == 0
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert all("==" in pin for pin in pins) and {pin.split("==")[0] for pin in pins} >= {
        "torch",
        "transformers",
        "accelerate",
        "pillow",
        "numpy",
    }
    assert any(line.startswith("# torchvision==") for line in lines) and any(
        line.startswith("# flash-attn==") for line in lines
    )
    assert Path(ROOT / ".ci" / "run").exists()


def test_help_lists_every_flag_once_under_its_heading(capsys):
    for main, config, headings in (
        (virft.main, virft.Config, 7), (mia_dpo.parse_build, mia_dpo.BuildConfig, 3),
        (mia_dpo.parse_train, mia_dpo.TrainConfig, 6),
    ):  # fmt: skip
        with pytest.raises(SystemExit):
            main(["--help"])
        printed = capsys.readouterr().out
        listed = re.findall(r"^  --(\w+)", printed, re.M)
        assert listed == [field.name for field in dataclasses.fields(config)]
        assert len(re.findall(r"^[A-Z][a-z ]+(?:GPUs|\w):$", printed, re.M)) == headings, printed


def test_a_flag_that_does_not_exist_is_named_with_the_one_that_was_meant():
    with pytest.raises(SystemExit, match=r"--group_sise 4: there is no such flag; did you mean --group_size\?"):
        virft.parse_config(["--task", "coco", "--group_sise", "4"])
    with pytest.raises(SystemExit, match="--zzz: there is no such flag; --help"):
        mia_dpo.parse_train(["--zzz"])


def test_adapters_given_as_a_model_are_named(shapes_dir, tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(SystemExit, match="--model .*: holds adapters, not a model; give OUT/model of that run"):
        virft.main(
            ["--task", "coco", "--data", str(shapes_dir), "--model", str(tmp_path), "--out", str(tmp_path / "run")]
        )


def test_a_run_that_taught_nothing_says_so_at_its_end(llava_dir, shapes_dir, tmp_path, capsys):
    (tmp_path / "flat.py").write_text("def flat(completion, solution):\n    return 0.3\n")
    flags = SMALL | {"steps": 2, "rewards": f"{tmp_path / 'flat.py'}:flat=1"}
    virft.main(command(**flags, data=shapes_dir, model=llava_dir, out=tmp_path / "run", beta=0))
    assert "no step taught anything" in capsys.readouterr().out
