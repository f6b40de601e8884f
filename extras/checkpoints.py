"""Interrupt and resume a run: checkpoints (--save_every, --resume) and signals.

A checkpoint is all that the next step depends on: weights, moments of the optimizer and the number of the step. Learning
rate, order of examples and sampling noise are functions of step and seed, so there is no other state to save.

  OUT/checkpoints/step_000050/model/                   float32, an ordinary model folder; with LoRA the adapters alone
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
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

KEEP = 2  # checkpoints, the newest ones: if one turns out to be damaged, there is another
MAY_CHANGE = (  # between interruption and resume: places, displays and memory; the data is compared by its content
    "out", "data", "eval_data", "pairs", "resume", "save_every", "workers", "micro_batch", "shard", "eval_every", "eval_limit",
    "report_to",
)  # fmt: skip


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint, as `find` found it."""

    folder: Path
    step: int
    settings: dict[str, Any]
    data: str  # fingerprint

    @property
    def model(self) -> str:
        return str(self.folder / "model")

    def restore(self, model: nn.Module, optimizer: torch.optim.Optimizer, main: bool) -> None:
        """Give trained parameters their moments back, of shards each process its part; drop the logged steps after this one."""
        tensors = load_file(self.folder / "optimizer.safetensors")
        names = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        for key_and_name, value in tensors.items():
            key, _, name = key_and_name.partition("/")
            parameter, value = names[name], value.to(names[name].device)
            if isinstance(parameter, DTensor) and value.dim():
                value = distribute_tensor(value, parameter.device_mesh, parameter.placements)
            optimizer.state[parameter][key] = value
        for name in ("metrics.jsonl", "rollouts.jsonl") if main else ():
            drop_rows_after(self.folder.parents[1] / name, self.step)


def fingerprint(rows: Iterable) -> str:
    """Return a text that changes with the rows, their order, or anything that their repr shows."""
    digest, count = hashlib.blake2b(digest_size=16), 0
    for count, row in enumerate(rows, 1):
        digest.update(repr(row).encode())
    return f"{count} examples, {digest.hexdigest()}"


def data_fingerprint(examples: Iterable) -> str:
    return fingerprint((e.id, e.category, e.solution, e.question) for e in examples)


def folders(out: Path) -> list[Path]:
    """Return the checkpoints that were finished, oldest first: a folder is renamed to step_N once everything is in it."""
    return sorted(f for f in (out / "checkpoints").glob("step_*") if re.fullmatch(r"step_\d+", f.name))


def save(run: Any, write_model: Callable[[Any, Path, torch.dtype], None]) -> None:
    """Write a checkpoint after run.done steps aside and rename it; only then the oldest goes.

    Every process calls it, the main one writes. SystemExit, naming the last good checkpoint, where it cannot be written.
    """
    out = Path(run.cfg.out)
    folder = out / "checkpoints" / f"step_{run.done:06d}"
    new = folder.with_suffix(".unfinished")
    try:
        if run.main:
            shutil.rmtree(new, ignore_errors=True)
            new.mkdir(parents=True)
        if not run.adapters:
            write_model(run, new / "model", torch.float32)
        elif run.main:
            run.adapters.save_pretrained(new / "model")
        moments = gathered_moments(run)
        if run.main:
            save_file(moments, new / "optimizer.safetensors")
            files = {str(f.relative_to(new)): f.stat().st_size for f in sorted(new.rglob("*")) if f.is_file()}
            state = {"step": run.done, "settings": asdict(run.cfg), "data": data_fingerprint(run.prompts.examples)}
            (new / "state.json").write_text(json.dumps(state | {"files": files}, indent=2) + "\n")
            for name in (*files, "state.json"):
                with open(new / name, "rb") as file:
                    os.fsync(file.fileno())
            shutil.rmtree(folder, ignore_errors=True)  # of this step, from before it was resumed
            new.rename(folder)
            for old in folders(out)[:-KEEP]:
                shutil.rmtree(old.rename(old.with_suffix(".unfinished")))
            print(f"{run.done} of {run.cfg.steps} steps done; --resume true continues from {folder}", flush=True)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(new, ignore_errors=True)
        good = folders(out)
        offer = f"The last good one is {good[-1]}: make room, then --resume true" if good else "There is none before it"
        raise SystemExit(f"checkpoint {folder} cannot be written: {error}. {offer}") from None


def gathered_moments(run: Any) -> dict[str, Tensor]:
    """Return the optimizer's state as KEY/NAME on the main process; the others take part in gathering shards."""
    moments = {}
    for name, parameter in run.model.named_parameters():
        for key, value in run.optimizer.state.get(parameter, {}).items():
            value = value.full_tensor() if isinstance(value, DTensor) else value
            if run.main:
                moments[f"{key}/{name}"] = value.to("cpu")
    return moments


def read(folder: Path) -> Checkpoint:
    """Read a checkpoint; ValueError, saying what, where something is missing, cut off or not ours."""
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        checkpoint = Checkpoint(folder, int(state["step"]), dict(state["settings"]), str(state["data"]))
        sizes = dict(state["files"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / 'state.json'} was not written by this project ({error!r})") from None
    for name, size in sizes.items():
        found = (folder / name).stat().st_size if (folder / name).is_file() else "no"
        if found != size:
            raise ValueError(f"{folder / name} has {found} bytes, {size} were written")
    return checkpoint


def find(cfg: Any, examples: Iterable) -> Checkpoint:
    """Return the newest checkpoint of cfg.out; SystemExit if it is damaged or of other settings or data than cfg's."""
    out, whole, flaws = Path(cfg.out), [], {}
    for folder in folders(out):
        try:
            whole.append(read(folder))
        except ValueError as error:
            flaws[folder] = error
    if not whole and not flaws:
        raise SystemExit(f"--resume true: {out / 'checkpoints'} holds no checkpoint; see --save_every")
    newest = folders(out)[-1]
    if newest in flaws:
        offer = f"Move that folder away to continue from {whole[-1].folder}" if whole else "There is no other"
        raise SystemExit(f"--resume true: {flaws[newest]}. {offer}")
    settings, before = asdict(cfg), asdict(type(cfg)()) | whole[-1].settings
    if changed := [name for name in settings if name not in MAY_CHANGE and settings[name] != before[name]]:
        right = " ".join(f"--{name} {before[name]}" for name in changed)
        raise SystemExit(f"--resume true: {newest} was made with {right}, and a run keeps its settings")
    if whole[-1].data != (found := data_fingerprint(examples)):
        raise SystemExit(f"--resume true: the data has changed: {whole[-1].data} before, {found} now")
    return whole[-1]


def drop_rows_after(file: Path, step: int) -> None:
    """Keep the JSON lines up to a step; a last line that an interruption cut off is dropped too."""
    if not file.exists():
        return
    aside = file.with_suffix(".unfinished")
    with file.open(encoding="utf-8") as rows, aside.open("w", encoding="utf-8") as kept:
        for line in rows:
            if line.endswith("\n") and json.loads(line)["step"] <= step:
                kept.write(line)
    aside.replace(file)


class StopAtSignal:
    """Note Ctrl-C and SIGTERM, so that the step can finish; a second one changes nothing.

    Launchers do not all pass signals on: torchrun does, and kills after 30 s (TORCH_ELASTIC_SHUTDOWN_TIMEOUT sets
    another limit); `accelerate launch` of one process does not, so SIGTERM must go to the process of virft.py itself.
    """

    def __init__(self):
        self.requested = False
        self.process = os.getpid()  # workers of the loader inherit the handler, and leave the signal to us
        self.before = {number: signal.signal(number, self.request) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore(self) -> None:
        """Put the handlers of before back."""
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def request(self, number: int, frame) -> None:
        if not self.requested and os.getpid() == self.process:
            print(f"\n{signal.Signals(number).name}: finishing this step, then saving", file=sys.stderr, flush=True)
        self.requested = True


@contextlib.contextmanager
def interruptible(run: Any, write_model: Callable, save_model: Callable[[Any], None]) -> Iterator[Callable[[], bool]]:
    """Let a signal end the loop after its step, and save what was learned after an error.

    Yields `stopping()`: whether any process got a signal, the same on all of them. After an error a checkpoint is saved
    if weights and moments are those of a whole step, otherwise the model. Shards cannot be gathered then: the other
    processes may not have failed.
    """
    signals = StopAtSignal()

    def stopping() -> bool:
        asked = torch.tensor(float(signals.requested), device=run.device)
        return bool(run.accelerator.reduce(asked, "sum") > 0)

    try:
        yield stopping
    except Exception:
        if run.main and not run.cfg.shard and (Path(run.cfg.out) / "metrics.jsonl").exists():
            if run.whole:
                save(run, write_model)
            else:
                save_model(run)
        raise
    finally:
        signals.restore()
