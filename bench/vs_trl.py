"""Measure time and memory per optimizer step against TRL's GRPOTrainer with its plain generation, on CPUs.

    pip install trl==1.16.0
    python bench/vs_trl.py                                # 224 px, 48 tokens; 336 px, 64; G 8; 1 and 16 prompts a step
    python bench/vs_trl.py --cases 336,256,8,1 336,512,8,1 --rounds 1
    python bench/vs_trl.py --sides virft.py --cases 336,64,4,1 336,64,16,1    # growth with G; needs no TRL
    python bench/vs_trl.py --losses                       # both losses on the same log-probabilities
    python bench/vs_trl.py --model DIR --cases 224,16,4,4                     # a model of yours, which sizes its images

A case is IMAGE_SIDE,COMPLETION_TOKENS,G,PROMPTS_A_STEP. Both sides train the same LLaVA-class model with random weights
(text of 6 layers, width 256, 4 heads, MLP 1024; SigLIP tower of the same depth and width, patch 14) on the same
pictures and questions: one prompt per forward, beta 0.04, float32, AdamW, and no EOS, so that all completions have the
same length.
"repeated" is our own loop with the prompt repeated for every completion. Sides alternate, each in a fresh process. Peak
memory is measured relative to what was resident before the first step. The first step is warm-up.
"""

import argparse
import importlib.util
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ["HF_HUB_OFFLINE"], os.environ["TOKENIZERS_PARALLELISM"] = "1", "false"

import torch  # noqa: E402
from transformers import (  # noqa: E402
    AutoProcessor,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    SiglipVisionConfig,
)
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil  # noqa: E402

import data  # noqa: E402
import virft  # noqa: E402
from demo import shapes, warm_start  # noqa: E402
from extras import flash  # noqa: E402

PATCH = 14
CASE = "IMAGE_SIDE,COMPLETION_TOKENS,G,PROMPTS_A_STEP"
SIDES = ("virft.py", "repeated", "TRL")


def write_model(folder: Path, side: int) -> None:
    torch.manual_seed(0)
    tokenizer = warm_start.make_tokenizer()
    width = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 6, "num_attention_heads": 4}
    image_id = tokenizer.convert_tokens_to_ids("<image>")
    config = LlavaConfig(
        vision_config=SiglipVisionConfig(**width, image_size=side, patch_size=PATCH, vision_use_head=False),
        text_config=LlamaConfig(
            **width, vocab_size=len(tokenizer), max_position_embeddings=2048, bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        ),
        image_token_id=image_id, image_seq_length=(side // PATCH) ** 2, vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )  # fmt: skip
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    LlavaProcessor(
        image_processor=SiglipImageProcessorPil(size={"height": side, "width": side}), tokenizer=tokenizer,
        patch_size=PATCH, vision_feature_select_strategy="full", chat_template=warm_start.CHAT_TEMPLATE,
    ).save_pretrained(folder)  # fmt: skip


def reward(text: str, *_, **__) -> float:
    """Return a number that differs within a group and costs almost no time."""
    return sum(map(ord, text[:200])) % 8


class Meter:
    """Measure the peak memory of this process above what it held at creation; `warm` is called after the first step."""

    def __init__(self):
        self.before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

    def warm(self) -> None:
        pass

    def read(self) -> dict[str, float]:
        return {"peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - self.before}


def repeat_prompts(G: int) -> None:
    """Switch prompt sharing off: encode a separate copy of the prompt for every completion."""
    plain = virft.prefill
    virft.prefill = lambda model, inputs: plain(model, {n: t.repeat_interleave(G, 0) for n, t in inputs.items()})
    virft.fork = lambda prefix, rows: prefix


def ours(folder: Path, C: int, G: int, prompts: int, steps: int, repeated: bool, meter: type[Meter], **more) -> dict:
    flags = more | {
        "data": folder / "data", "model": folder / "model", "out": Path(tempfile.mkdtemp()), "steps": steps + 1,
        "prompts_per_step": prompts, "group_size": G, "max_completion_tokens": C, "beta": 0.04, "lr": 1e-6,
        "workers": 0,
    }  # fmt: skip
    run = virft.start(virft.parse_config([part for n, v in flags.items() for part in (f"--{n}", str(v))]))
    run.distribution["forbidden"] = torch.cat([run.distribution["forbidden"], run.eos])
    run.rewards = {"any": (reward, 1.0)}
    if repeated:
        repeat_prompts(G)
    meter, seconds, phases = meter(), [], []
    for step, prompts_of_step in run.steps():
        start = time.perf_counter()
        ro = virft.rollout(run, prompts_of_step, step)
        virft.update(run, ro)
        seconds.append(time.perf_counter() - start)
        phases.append(dict(run.seconds))
        assert ro.ids.shape == (prompts * G, C)
        if step == 1:
            meter.warm()
    return {
        "seconds": seconds[1:], **meter.read(),
        "phases": {n: statistics.median(p[n] for p in phases[1:]) for n in phases[0]},
        "prompt": ro.prompts[0].inputs["input_ids"].shape[1],
    }  # fmt: skip


def make_trainer(folder: Path, C: int, G: int, prompts: int, steps: int, **settings):
    import datasets
    from trl import GRPOConfig, GRPOTrainer

    processor, gpu = AutoProcessor.from_pretrained(folder / "model"), torch.cuda.is_available()
    torch.backends.cuda.enable_cudnn_sdp(False)  # as virft.connect does
    model = virft.load_model(str(folder / "model"), torch.float32, torch.device("cuda" if gpu else "cpu"))
    flash.use(model, model.device)  # as our side does, where it is installed
    eos, forbidden = virft.special_tokens(model, processor)
    examples, _ = data.read_coco(str(folder / "data"), "train")
    rows = []
    for e in examples[: prompts * (steps + 1)]:
        content = [{"type": "image"}, {"type": "text", "text": warm_start.prompt(e.category)}]
        rows.append({"prompt": [{"role": "user", "content": content}], "image": data.open_image(e.images[0])})
    config = GRPOConfig(
        output_dir=str(folder / "trl"), use_cpu=not gpu, bf16=gpu, per_device_train_batch_size=G, num_generations=G,
        gradient_accumulation_steps=prompts, max_completion_length=C, beta=0.04, learning_rate=1e-6,
        max_steps=steps + 1, loss_type="grpo", temperature=1.0, gradient_checkpointing=False,
        optim="adamw_torch_fused", report_to=[], save_strategy="no", logging_strategy="no", disable_tqdm=True,
        # vLLM has another way to keep completions equally long.
        generation_kwargs={"ignore_eos": True} if "use_vllm" in settings else {"suppress_tokens": eos + forbidden},
        **settings,
    )  # fmt: skip

    def any_reward(completions, **_) -> list[float]:
        return [reward(str(completion)) for completion in completions]

    dataset = datasets.Dataset.from_list(rows)
    return GRPOTrainer(model, any_reward, args=config, train_dataset=dataset, processing_class=processor)


def theirs(folder: Path, C: int, G: int, prompts: int, steps: int, meter: type[Meter], **settings) -> dict:
    from transformers import TrainerCallback

    trainer = make_trainer(folder, C, G, prompts, steps, **settings)
    times, lengths, phases, widths = [], [], [], []

    def now() -> float:
        if torch.cuda.is_available():  # CUDA is asynchronous
            torch.cuda.synchronize()
        return time.perf_counter()

    class Clock(TrainerCallback):
        def on_train_begin(self, *_, **__):
            times.append(now())

        def on_step_end(self, *_, **__):
            times.append(now())
            if len(times) == 2:
                meter.warm()

    def timed(name: str) -> None:
        plain = getattr(trainer, name)

        def wrapped(*args, **kwargs):
            start = now()
            result = plain(*args, **kwargs)
            phases.append((name, now() - start))
            return result

        setattr(trainer, name, wrapped)

    for name in ("_generate", "_generate_and_score_completions"):
        timed(name)
    plain_loss = trainer._compute_loss

    def compute_loss(model, inputs):
        lengths.append(inputs["completion_mask"].sum(1).tolist())
        widths.append(inputs["prompt_ids"].shape[1])
        return plain_loss(model, inputs)

    trainer._compute_loss = compute_loss
    trainer.add_callback(Clock())
    meter = meter()
    trainer.train()
    assert lengths == [[C] * G] * (prompts * (steps + 1)), lengths
    seconds = [b - a for a, b in zip(times[1:], times[2:])]
    median = {name: statistics.median([s for n, s in phases if n == name][1:]) for name in dict(phases)}
    sampling, scoring = median["_generate"], median["_generate_and_score_completions"]
    return {
        "seconds": seconds, **meter.read(),
        "phases": {
            "sample": sampling, "reference": scoring - sampling, "train": statistics.median(seconds) - scoring,
        },
        "prompt": widths[0],
    }  # fmt: skip


def compare_losses(folder: Path) -> None:
    """Compare TRL's loss with ours on the same log-probabilities, with clipped ratios and a different reference."""
    G, C = 4, 16
    generator = torch.Generator().manual_seed(0)
    logp = -torch.rand(G, C, generator=generator)
    old, reference = (logp + 0.4 * torch.randn(G, C, generator=generator) for _ in range(2))
    mask = torch.arange(C) < torch.tensor([[16], [9], [1], [12]])
    advantages = virft.group_advantages(torch.rand(1, G, generator=generator)).flatten()
    for loss in virft.NORMALIZATIONS:
        trainer = make_trainer(folder, C, G, 1, 1, use_bias_correction_kl=False)
        trainer.loss_type = loss
        trainer.current_gradient_accumulation_steps = 1
        trainer.model.train()
        trainer._get_per_token_logps_and_entropies = lambda *_, **__: (logp, torch.zeros(G, C), None)
        inputs = {
            "prompt_ids": torch.zeros(G, 2, dtype=torch.long), "prompt_mask": torch.ones(G, 2, dtype=torch.long),
            "completion_ids": torch.zeros(G, C, dtype=torch.long), "completion_mask": mask.long(),
            "advantages": advantages, "old_per_token_logps": old, "ref_per_token_logps": reference,
            "num_items_in_batch": mask.sum(),
        }  # fmt: skip
        them = float(trainer._compute_loss(trainer.model, inputs))
        weights, divisor = virft.NORMALIZATIONS[loss](mask, C)
        us = float(virft.grpo_loss(logp, old, reference, advantages, mask, weights, (0.2, 0.2), 0.04)[0] / divisor)
        print(f"{loss:8s} TRL {them:.8f}   virft.py {us:.8f}   difference {abs(us - them):.1e}")
        assert abs(us - them) < 1e-5


def in_a_process(script: str, *argv, **environment: str) -> dict:
    """Run one side in a separate process and return its measurements."""
    command = [sys.executable, script, *map(str, argv)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | environment)
    if done.returncode:
        raise SystemExit(done.stdout + done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def need_trl(needed: bool) -> None:
    if needed and not importlib.util.find_spec("trl"):
        raise SystemExit("TRL is not installed: pip install trl==1.16.0, or --sides virft.py repeated")


def prepare(folder: Path, side: int, model: Path | None = None) -> Path:
    folder = folder / str(side)
    if not folder.exists():
        shapes.write_split(folder / "data", "train", 40, seed=0)
        if model:
            (folder / "model").symlink_to(model.resolve())
        else:
            write_model(folder / "model", side)
    return folder


def table_rows(rounds: list[dict], C: int, G: int, prompts: int) -> str:
    """Format medians over rounds of medians over steps; a ratio of times is the median of the ratios of all rounds."""
    lines = []
    seconds = {s: [statistics.median(r[s]["seconds"]) for r in rounds] for s in rounds[0]}
    peak = {s: statistics.median(r[s]["peak"] for r in rounds) for s in rounds[0]}
    for side in rounds[0]:
        phases = [statistics.median(r[side]["phases"][p] for r in rounds) for p in ("sample", "reference", "train")]
        cells = [
            f"{rounds[0][side]['prompt']}, {C}, {G}, {prompts}",
            side,
            *(f"{s:.2f}" for s in (statistics.median(seconds[side]), *phases, peak[side] / 1e9)),
        ]
        if "TRL" in seconds:
            ratio = statistics.median(t / s for t, s in zip(seconds["TRL"], seconds[side]))
            cells += [f"{ratio:.1f}", f"{peak[side] / peak['TRL']:.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--cases", nargs="+", default=["224,48,8,1", "224,48,8,16", "336,64,8,1", "336,64,8,16"], help=CASE
    )
    parser.add_argument("--rounds", type=int, default=3, help="alternations")
    parser.add_argument("--steps", type=int, default=3, help="timed steps of each process")
    parser.add_argument("--losses", action="store_true")
    parser.add_argument("--model", type=Path, help="model folder; default: one with random weights")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=SIDES)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        side, *sizes = map(int, args.cases[0].split(","))
        folder = prepare(args.folder, side)
        if args.side == "TRL":
            result = theirs(folder, *sizes, args.steps, Meter)
        else:
            result = ours(folder, *sizes, args.steps, args.side == "repeated", Meter)
        print(json.dumps(result))
        return
    need_trl("TRL" in args.sides or args.losses)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        if args.losses:
            return compare_losses(prepare(folder, 224))
        print(
            "| prompt, completion, G, prompts | | s / step | sample | reference | train | peak GB "
            "| TRL / this: time | this / TRL: memory |"
        )
        print("|---|---|---|---|---|---|---|---|---|")
        for case in args.cases:
            side, *sizes = map(int, case.split(","))
            prepare(folder, side, args.model)
            argv = ("--cases", case, "--steps", args.steps, "--folder", folder)
            rounds = [
                {side: in_a_process(__file__, "--side", side, *argv, CUDA_VISIBLE_DEVICES="") for side in args.sides}
                for _ in range(args.rounds)
            ]
            print(table_rows(rounds, *sizes), flush=True)


if __name__ == "__main__":
    main()
