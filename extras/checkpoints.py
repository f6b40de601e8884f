"""Interrupt and resume a run: checkpoints (--save_every, --resume) and signals.

A checkpoint holds everything that the next step depends on: the weights, the optimizer's moments and the step number.
Learning rate, order of examples and sampling noise are functions of step and seed and need not be saved.

  OUT/checkpoints/step_000050/model/                   float32, an ordinary model folder; with LoRA only the adapters
                             /optimizer.safetensors    KEY/NAME OF PARAMETER
                             /state.json               step, settings, fingerprint of the data, sizes of all files
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from data import few
from extras.adapters import learned
from extras.shards import whole_weights

KEEP = 2  # newest checkpoints to keep: if one is damaged, there is another
MAY_CHANGE = (  # settings that --resume may change: paths, logging and memory; the data is compared by its content
    "out", "data", "eval_data", "pairs", "resume", "save_every", "workers", "micro_batch", "shard", "eval_every",
    "eval_limit", "report_to", "skip_bad_images",
)  # fmt: skip


@dataclass(frozen=True)
class Checkpoint:
    """Describe a complete checkpoint, as returned by `find`."""

    folder: Path
    step: int
    settings: dict[str, Any]
    data: str  # fingerprint
    used: dict[str, list[int]]  # see `used_files`

    @property
    def model(self) -> str:
        return str(self.folder / "model")

    def restore(self, model: nn.Module, optimizer: torch.optim.Optimizer, main: bool) -> None:
        """Load the moments of the trained parameters, and drop the logged steps after this checkpoint.

        With --shard each process keeps its part of every moment.
        """
        tensors = load_file(self.folder / "optimizer.safetensors")
        names = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        for key_and_name, value in tensors.items():
            key, _, name = key_and_name.partition("/")
            parameter, value = names[name], value.to(names[name].device)
            if isinstance(parameter, DTensor) and value.dim():
                value = distribute_tensor(value, parameter.device_mesh, parameter.placements)
            # 8-bit AdamW counts its steps in a Python integer.
            optimizer.state[parameter][key] = value if value.dim() or value.is_floating_point() else int(value)
        for name in ("metrics.jsonl", "rollouts.jsonl") if main else ():
            drop_rows_after(self.folder.parents[1] / name, self.step)


def fingerprint(rows: Iterable) -> str:
    """Return a text that changes with the number, order or repr of the rows."""
    digest, count = hashlib.blake2b(digest_size=16), 0
    for count, row in enumerate(rows, 1):
        digest.update(repr(row).encode())
    return f"{count} examples, {digest.hexdigest()}"


def data_fingerprint(examples: Iterable) -> str:
    return fingerprint((e.id, e.category, e.solution, e.question) for e in examples)


def used_files(model: str, rewards: Sequence[str]) -> dict[str, list[int]]:
    """Return {name: [size, time of change in ns]} of the files of a model folder and of the user's rewards."""
    own = [Path(entry.rpartition(":")[0]) for entry in rewards if ".py:" in entry]
    files = [*(Path(model).iterdir() if Path(model).is_dir() else ()), *own]
    return {file.name: [file.stat().st_size, file.stat().st_mtime_ns] for file in files if file.is_file()}


def folders(out: Path) -> list[Path]:
    """Return the finished checkpoints, oldest first; a folder is renamed to step_N once everything is in it."""
    return sorted(f for f in (out / "checkpoints").glob("step_*") if re.fullmatch(r"step_\d+", f.name))


def save(run: Any) -> None:
    """Write a checkpoint after run.done steps to a temporary folder, rename it, then delete the oldest one.

    Every process must call this; the main one writes. If writing fails, raises a SystemExit that names the last good
    checkpoint.
    """
    out = Path(run.cfg.out)
    folder = out / "checkpoints" / f"step_{run.done:06d}"
    new = folder.with_suffix(".unfinished")
    try:
        if run.main:
            for left in folder.parent.glob("*.unfinished"):  # left by a save that was killed
                shutil.rmtree(left, ignore_errors=True)
            new.mkdir(parents=True)
        weights = None
        if run.adapters:
            weights = learned(run.adapters, run.main)
        elif run.cfg.shard:
            weights = whole_weights(run.model, run.main)
        if run.main:
            (run.adapters or run.model).save_pretrained(new / "model", state_dict=weights)
            if not run.adapters:
                run.prompts.processor.save_pretrained(new / "model")
        moments = gathered_moments(run)
        if run.main:
            save_file(moments, new / "optimizer.safetensors")
            files = {str(f.relative_to(new)): f.stat().st_size for f in sorted(new.rglob("*")) if f.is_file()}
            state = {"step": run.done, "settings": asdict(run.cfg), "data": data_fingerprint(run.prompts.examples)}
            state["used"] = used_files(run.cfg.model, getattr(run.cfg, "rewards", ()))
            (new / "state.json").write_text(json.dumps(state | {"files": files}, indent=2) + "\n")
            for name in (*files, "state.json"):
                with open(new / name, "rb") as file:
                    os.fsync(file.fileno())
            shutil.rmtree(folder, ignore_errors=True)  # a checkpoint of this step from before a resume
            new.rename(folder)
            for old in folders(out)[:-KEEP]:
                shutil.rmtree(old.rename(old.with_suffix(".unfinished")), ignore_errors=True)  # a file may be open
            print(f"{run.done} of {run.cfg.steps} steps done; --resume true continues from {folder}", flush=True)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(new, ignore_errors=True)
        good = folders(out)
        offer = f"The last good one is {good[-1]}: make room, then --resume true" if good else "There is none before it"
        raise SystemExit(f"checkpoint {folder} cannot be written: {error}. {offer}") from None


def gathered_moments(run: Any) -> dict[str, Tensor]:
    """Return the optimizer's state as {KEY/NAME: tensor} on the main process.

    Every process must call this, because shards are gathered from all of them.
    """
    moments = {}
    for name, parameter in run.model.named_parameters():
        for key, value in run.optimizer.state.get(parameter, {}).items():
            value = value.full_tensor() if isinstance(value, DTensor) else torch.as_tensor(value)
            if run.main:
                moments[f"{key}/{name}"] = value.to("cpu", copy=True)  # 8-bit moments share a table, as no file may
    return moments


def read(folder: Path) -> Checkpoint:
    """Read a checkpoint; raise a ValueError that names the file if one is missing, cut off or not ours."""
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        used = dict(state.get("used", {}))
        checkpoint = Checkpoint(folder, int(state["step"]), dict(state["settings"]), str(state["data"]), used)
        sizes = dict(state["files"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / 'state.json'} was not written by this project ({error!r})") from None
    for name, size in sizes.items():
        found = (folder / name).stat().st_size if (folder / name).is_file() else "no"
        if found != size:
            raise ValueError(f"{folder / name} has {found} bytes, {size} were written")
    return checkpoint


def find(cfg: Any, examples: Iterable) -> Checkpoint:
    """Return the newest checkpoint in cfg.out; raise SystemExit if it is damaged or its settings or data differ."""
    out, complete, flaws = Path(cfg.out), [], {}
    for folder in folders(out):
        try:
            complete.append(read(folder))
        except ValueError as error:
            flaws[folder] = error
    if not complete and not flaws:
        over = f"; {out / 'model'} is there, so this run is over" if (out / "model").exists() else ""
        raise SystemExit(f"--resume true: {out / 'checkpoints'} holds no checkpoint, see --save_every{over}")
    newest = folders(out)[-1]
    if newest in flaws:
        offer = f"Move that folder away to continue from {complete[-1].folder}" if complete else "There is no other"
        raise SystemExit(f"--resume true: {flaws[newest]}. {offer}")
    settings, before = asdict(cfg), asdict(type(cfg)()) | complete[-1].settings
    if changed := [name for name in settings if name not in MAY_CHANGE and settings[name] != before[name]]:
        right = " ".join(f"--{name} {before[name]}" for name in changed)
        anew = (
            f"; to continue from its model: --model {out / 'model'} --out ANOTHER" if (out / "model").exists() else ""
        )
        raise SystemExit(f"--resume true: {newest} was made with {right}, and a run keeps its settings{anew}")
    if complete[-1].data != (found := data_fingerprint(examples)):
        raise SystemExit(f"--resume true: the data has changed: {complete[-1].data} before, {found} now")
    used, before = used_files(cfg.model, getattr(cfg, "rewards", ())), complete[-1].used
    if before and used != before and os.environ.get("RANK", "0") == "0":  # not refused: a reward may have been mended
        changed = sorted(name for name in used.keys() | before.keys() if used.get(name) != before.get(name))
        print(f"--resume true: changed since {newest} was written: {few(changed)}")
    return complete[-1]


def drop_rows_after(file: Path, step: int) -> None:
    """Drop the JSON lines of steps after `step`, and a last line that an interruption cut off."""
    if not file.exists():
        return
    aside = file.with_suffix(".unfinished")
    with file.open(encoding="utf-8") as rows, aside.open("w", encoding="utf-8") as kept:
        for line in rows:
            if line.endswith("\n") and json.loads(line)["step"] <= step:
                kept.write(line)
    aside.replace(file)


class StopAtSignal:
    """Record Ctrl-C and SIGTERM, so that the current step can finish; ignore further signals.

    requested: the number of the first signal that this process received, or 0. Calling the object returns the
    largest over all processes, which must all call it.

    Not every launcher forwards signals. torchrun does, and kills after 30 s (set TORCH_ELASTIC_SHUTDOWN_TIMEOUT to
    change this). `accelerate launch` with one process does not: send SIGTERM to the process of virft.py itself.
    """

    def __init__(self, run: Any):
        self.run, self.requested = run, 0
        self.process = os.getpid()  # DataLoader workers inherit the handler and must not print the message
        self.before = {number: signal.signal(number, self.request) for number in (signal.SIGINT, signal.SIGTERM)}

    def __call__(self) -> int:
        return int(self.run.accelerator.gather(torch.tensor([self.requested], device=self.run.device)).max())

    def restore(self) -> None:
        """Restore the previous signal handlers."""
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def request(self, number: int, frame) -> None:
        if not self.requested and os.getpid() == self.process:
            print(f"\n{signal.Signals(number).name}: finishing this step, then saving", file=sys.stderr, flush=True)
        self.requested = self.requested or number


@contextlib.contextmanager
def interruptible(run: Any, save_model: Callable[[Any], None]) -> Iterator[StopAtSignal]:
    """Let a signal end the loop after the current step, and save after an error.

    Yields a StopAtSignal. After an error of the main process this saves a checkpoint if no optimizer step was cut short
    (run.whole), otherwise only the model. With --shard it saves nothing: gathering shards needs all processes, and
    those that did not fail do not take part. If another process fails, the launcher ends the main one: only what
    --save_every saved remains.
    """
    signals = StopAtSignal(run)
    try:
        yield signals
    except Exception:
        if run.main and not run.cfg.shard and (run.done or not run.whole):
            if run.whole:
                save(run)
            else:
                save_model(run)
        raise
    finally:
        signals.restore()
