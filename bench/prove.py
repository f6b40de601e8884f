"""Measure this project on your GPU with one command, in 30 minutes once the model is there; print a row.

    bash run.sh prove                                       # Qwen2-VL-2B from the hub
    bash run.sh prove --data COCO_DIR                       # and twenty steps of few-shot COCO
    bash run.sh prove --rehearse true                       # on a CPU with the demo's model: does the command work?

It prints the environment, seconds per phase and peak memory of training next to the forecast of extras/memory.py, the
same for TRL's GRPOTrainer if it is installed (pip install trl==1.16.0; with vLLM too if that is installed), the rewards
of twenty steps if --data is given, and a table row. Pictures, questions and loops are those of bench/vs_trl.py: prompts
of about 700 tokens, 256 tokens a completion, no EOS. It trains all weights, which needs a card of 80 GB for the 2B
model: 57 GB for the phases, 66 for few-shot COCO. A part that fails or takes too long is reported and left out.
"""

import importlib.metadata
import importlib.util
import json
import platform
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import transformers  # noqa: E402

import virft  # noqa: E402
from bench import gpu, vs_trl  # noqa: E402
from extras import memory  # noqa: E402
from virft import setting  # noqa: E402

LIMIT = 30 * 60  # seconds for everything
SIDES = {"virft.py": {}, "TRL": {}, "TRL, vLLM": {"use_vllm": True, "vllm_mode": "colocate"}}
PHASES = ("sample", "reference", "train")


@dataclass
class Config:
    model: str = setting("Qwen/Qwen2-VL-2B-Instruct", "model folder or name on the hub", "What is measured")
    data: str | None = setting(None, "folder with COCO's annotations and images, for twenty steps of training")
    case: str = setting("256,8,16", "completion tokens, G, prompts a step")
    steps: int = setting(3, "timed steps", least=1)
    rehearse: bool = setting(
        False, "try the command on a CPU with the demo's model, one timed step, and two few-shot steps with --data"
    )
    side: str = setting("", "measure this side only, in this process, in --folder", choices=("", *SIDES))
    folder: str | None = setting(None, "folder that the command has prepared")


class CpuMeter(vs_trl.Meter):
    """Stand in for gpu.Meter in a rehearsal."""

    def read(self) -> dict[str, float]:
        return super().read() | {"busy": 1.0}


def environment() -> str:
    packages = ("torch", "transformers", "accelerate", "flash-attn", "bitsandbytes", "peft", "trl", "vllm")
    found = []
    for name in packages:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            found.append(f"no {name}")
    return f"{card()}; {platform.system()}, Python {platform.python_version()}; {', '.join(found)}"


def card() -> str:
    if not torch.cuda.is_available():
        return "CPU"
    properties = torch.cuda.get_device_properties(0)
    return (
        f"{properties.name}, {properties.total_memory / 1e9:.0f} GB, capability {properties.major}.{properties.minor}"
    )


def prepare(folder: Path, cfg: Config) -> None:
    """Write pictures, and a link to the model, whose files come from the hub if it is not a folder."""
    if not Path(cfg.model).exists():
        from huggingface_hub import snapshot_download

        cfg.model = snapshot_download(cfg.model)
    (folder / "model").symlink_to(Path(cfg.model).resolve())
    if cfg.rehearse:
        vs_trl.shapes.write_split(folder / "data", "train", 40, seed=0)
    else:
        gpu.write_data(folder / "data", 40)


def measure(cfg: Config) -> dict:
    sizes, folder = [int(n) for n in cfg.case.split(",")], Path(cfg.folder)
    meter = CpuMeter if cfg.rehearse else gpu.Meter
    if cfg.side == "virft.py":
        return vs_trl.ours(folder, *sizes, cfg.steps, False, meter, max_pixels=gpu.SIDE**2)
    return vs_trl.theirs(folder, *sizes, cfg.steps, meter, **SIDES[cfg.side])


def missing(side: str) -> str | None:
    """Return the package that a side lacks."""
    needed = ["trl"] * ("TRL" in side) + ["vllm"] * ("vLLM" in side)
    return next((name for name in needed if not importlib.util.find_spec(name)), None)


def run_part(what: str, command: list, started: float) -> str | None:
    """Run a part in a process of its own, for the time that is left; return its output, or None if it failed."""
    try:
        left = LIMIT - (time.time() - started)
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=max(1.0, left), cwd=ROOT)
    except subprocess.TimeoutExpired:
        print(f"{what}: left out, {LIMIT // 60} minutes are over")
        return None
    if done.returncode:
        print(f"{what}: failed\n{(done.stdout + done.stderr)[-2000:]}")
        return None
    return done.stdout


def forecast(cfg: Config, P: int) -> float:
    C, G, prompts = (int(n) for n in cfg.case.split(","))
    flags = virft.Config(group_size=G, max_completion_tokens=C, prompts_per_step=prompts)
    config = transformers.AutoConfig.from_pretrained(cfg.model)
    return max(memory.needed(flags, config, virft.cast_frozen, P, 4 * (gpu.SIDE // 28) ** 2).values())


def few_shot(cfg: Config, folder: Path, started: float) -> str:
    """Train twenty steps on few-shot COCO; return the mean reward of the first and the last five."""
    out, steps = folder / "run", 2 if cfg.rehearse else 20
    flags = {
        "task": "coco",
        "data": cfg.data,
        "model": cfg.model,
        "out": out,
        "steps": steps,
        "skip_bad_images": "true",
    }
    small = {"max_completion_tokens": 24, "group_size": 4, "prompts_per_step": 4}
    flags |= small if cfg.rehearse else {"categories": "fewshot8", "shots": 4}
    argv = [part for name, value in flags.items() for part in (f"--{name}", value)]
    if run_part("few-shot COCO", [sys.executable, "virft.py", *argv], started) is None:
        return "failed"
    rewards = [json.loads(line)["reward"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    first, last = rewards[:5], rewards[-5:]
    return f"{sum(first) / len(first):.2f} -> {sum(last) / len(last):.2f}"


def main(argv: list[str] | None = None) -> None:
    started, cfg = time.time(), virft.parse(Config, argv, prog="bench/prove.py")
    if cfg.rehearse:
        cfg.model, cfg.case, cfg.steps = str(ROOT / "demo" / "model"), "24,4,2", 1
    elif not torch.cuda.is_available():
        raise SystemExit("prove: torch sees no GPU here; --rehearse true tries the command on a CPU")
    if cfg.side:
        return print(json.dumps(measure(cfg)))
    print(environment())
    with tempfile.TemporaryDirectory() as name:
        folder, cells, ours = Path(name), {}, None
        prepare(folder, cfg)
        for side in SIDES:
            if lacks := missing(side):
                print(f"{side}: left out, {lacks} is not installed")
                continue
            more = ("--case", cfg.case, "--steps", cfg.steps, "--rehearse", str(cfg.rehearse).lower())
            argv = [sys.executable, __file__, "--side", side, "--folder", folder, "--model", cfg.model, *more]
            if (output := run_part(side, argv, started)) is None:
                continue
            found = json.loads(output.splitlines()[-1])
            seconds = sorted(found["seconds"])[len(found["seconds"]) // 2]
            phases = " + ".join(f"{found['phases'][phase]:.2f}" for phase in PHASES)
            cells[side] = f"{seconds:.2f} s ({phases}), {found['peak'] / 1e9:.1f} GB"
            print(f"{side}: {cells[side]}, GPU busy {found['busy']:.0%}", flush=True)
            if side == "virft.py":
                ours = found
        if ours:
            C, G, prompts = map(int, cfg.case.split(","))
            token = ours["phases"]["sample"] / C * 1000
            need = "no GPU" if cfg.rehearse else f"{forecast(cfg, ours['prompt']) / 1e9:.1f} GB"
            print(f"forecast: {need}; {token:.1f} ms per decode step of {G * prompts} rows")
        learned = few_shot(cfg, folder, started) if cfg.data else "not run"
        print("\nPlease send this row in as an issue:\n")
        print(f"| card | case | {' | '.join(SIDES)} | few-shot COCO, reward |\n|{'---|' * (len(SIDES) + 3)}")
        row = [card(), cfg.case, *(cells.get(side, "-") for side in SIDES), learned]
        print(f"| {' | '.join(row)} |")


if __name__ == "__main__":
    main()
