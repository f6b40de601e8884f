"""Compute how much GPU memory a run needs, and compare the formula with what PyTorch allocates; no GPU is needed.

    python bench/memory.py                  # the tables of docs/gpus.md, by the formula of extras/memory.py
    python bench/memory.py --measure        # the same flags on a small Qwen2-VL on the CPU, in a GPU's dtypes: formula
                                            # against the peak that torch.profiler's memory events show, in minutes
    MALLOC_MMAP_THRESHOLD_=32768 torchrun --nproc_per_node 2 bench/memory.py --measure
                                            # --shard, on a model 14 times as large, against resident memory (Linux)

Prompts have P = patches / 4 + 110 tokens: our detection prompt has about 110 tokens of text.
"""

import argparse
import os
import sys
import tempfile
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from types import SimpleNamespace

import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import virft  # noqa: E402
from bench import gpu  # noqa: E402
from extras import memory  # noqa: E402

PIXELS = 401_408  # --max_pixels' default: 2048 patches, P 622
FLAGS = (  # of virft.py, and processes
    ({}, 1),
    ({"max_completion_tokens": 256}, 1),
    ({"micro_batch": 2}, 1),
    ({"micro_batch": 2, "beta": 0.0}, 1),
    ({"micro_batch": 2, "adam_bits": 8}, 1),
    ({"micro_batch": 2, "freeze_vision": True, "beta": 0.0}, 1),
    ({"micro_batch": 2, "freeze_vision": True, "beta": 0.0, "adam_bits": 8}, 1),
    ({"micro_batch": 2, "lora_rank": 16}, 1),
    ({"micro_batch": 1, "lora_rank": 16, "max_pixels": 200_704}, 1),
    ({"micro_batch": 1, "shard": True}, 8),
)
CONFIGS = {"Qwen2-VL-2B": gpu.qwen2_vl_2b, "Qwen2.5-VL-3B": gpu.qwen2_5_vl_3b, "Qwen2-VL-7B": gpu.qwen2_vl_7b}
CARDS = (24, 48)  # GB


def needs(config: object, flags: dict, processes: int) -> dict[str, float]:
    cfg = replace(virft.Config(), **flags)
    patches = min(cfg.max_pixels, PIXELS) // 14**2
    return memory.needed(cfg, config, virft.cast_frozen, patches // 4 + 110, patches, True, processes)


def words(flags: dict, processes: int = 1) -> str:
    return f"`{memory.words(flags) or '(defaults)'}`" + (f", {processes} processes" if processes > 1 else "")


def print_tables() -> None:
    configs = {name: make() for name, make in CONFIGS.items()}
    print(f"| flags | {' | '.join(configs)} |\n|---|{'---|' * len(configs)}")
    for flags, processes in FLAGS:
        cells = [f"{max(needs(config, flags, processes).values()) / 1e9:.0f}" for config in configs.values()]
        print(f"| {words(flags, processes)} | {' | '.join(cells)} |")
    print(f"\n| card | {' | '.join(configs)} |\n|---|{'---|' * len(configs)}")
    for card in CARDS:
        cells = []
        for config in configs.values():
            fits = (
                (flags, max(needs(config, flags, 1).values()) / 1e9)
                for flags in memory.REMEDIES
                if "shard" not in flags
            )
            found = next(((flags, need) for flags, need in fits if need < 0.95 * card), None)
            cells.append(f"{words(found[0])}: {found[1]:.0f}" if found else "nothing")
        print(f"| {card} GB | {' | '.join(cells)} |")


# ------------------------------------------------------------------------------------------------
# The comparison with PyTorch's allocator.

SMALL = {"P": 140, "grid": (20, 20), "G": 8, "C": 48, "prompts": 2}  # 400 patches of 14 pixels, 100 tokens


def small_config(width: int) -> transformers.Qwen2VLConfig:
    """A Qwen2-VL of about the proportions of the 2B model; at width 1 it is 500 times smaller."""
    text = gpu.TEXT | {
        "vocab_size": 4096, "hidden_size": 192 * width, "intermediate_size": 1120 * width, "num_hidden_layers": 4,
        "num_attention_heads": 6, "num_key_value_heads": 1, "bos_token_id": None, "eos_token_id": 0,
    }  # fmt: skip
    text["rope_parameters"] = text["rope_parameters"] | {"mrope_section": [4 * width, 6 * width, 6 * width]}
    vision = {"depth": 5, "num_heads": 4, "embed_dim": 160 * width, "hidden_size": 192 * width, "mlp_ratio": 4}
    special = {"vision_start_token_id": 1, "vision_end_token_id": 2, "image_token_id": 3, "video_token_id": 4}
    return transformers.Qwen2VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True, **special)


def batch_of(prompts: int) -> dict[str, torch.Tensor]:
    rows, columns = SMALL["grid"]
    image = [1, *[3] * (rows * columns // 4), 2]
    ids = torch.tensor([[*image, *range(100, 100 + SMALL["P"] - len(image))]] * prompts)
    return {
        "input_ids": ids, "attention_mask": torch.ones_like(ids), "mm_token_type_ids": (ids == 3).long(),
        "pixel_values": torch.randn(prompts * rows * columns, 3 * 2 * 14 * 14),
        "image_grid_thw": torch.tensor([[1, rows, columns]] * prompts),
    }  # fmt: skip


def peak(work: object) -> int:
    """Return the most bytes that PyTorch held at once while `work` ran, beyond those held before."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    changes = [event.nbytes() for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(accumulate(changes))


def resident(work: object) -> int:
    """Return how far the memory of this process rose while `work` ran.

    FSDP frees memory by resizing storages, and the profiler does not count those allocated before it started.
    MALLOC_MMAP_THRESHOLD_ makes malloc return what is freed to the system.
    """

    def status(name: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))

    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM, the most that was resident
    before = status("VmRSS")
    work()
    return status("VmHWM") - before


def measured(folder: Path, flags: dict, width: int) -> tuple[dict[str, float], dict[str, float]]:
    """Return bytes at the peak of sampling and of the second update: by the formula, and as allocated."""
    virft.AUTOCAST = "cpu"
    virft.rollout_metrics = lambda run, ro: {}
    G, C, B, processes = SMALL["G"], SMALL["C"], SMALL["prompts"], int(os.environ.get("WORLD_SIZE", "1"))
    argv = [part for name, value in flags.items() for part in (f"--{name}", str(value).lower())]
    cfg = virft.parse_config(
        ["--model", str(folder), "--max_completion_tokens", str(C), "--prompts_per_step", str(B * processes), *argv]
    )
    tokenizer = SimpleNamespace(eos_token_id=0, pad_token_id=0)
    processor = SimpleNamespace(tokenizer=tokenizer, apply_chat_template=lambda turns, tokenize: "")
    prompts = SimpleNamespace(processor=processor)
    run = virft.build(cfg, virft.connect(cfg), prompts, {}, trains=True)
    run.collate = lambda prompts: batch_of(len(prompts))
    ids, ones = torch.randint(100, 4000, (B * G, C)), torch.ones(B * G, C)
    judged = ([], {}, ones[:, :1].view(B, G), torch.randn(B * G))
    ro = virft.Rollout([None] * B, ids, ones, ones.bool(), torch.zeros(B * G).bool(), *judged)
    virft.update(run, ro)  # the moments exist from now on
    held = [p for model in (run.model, run.reference) if model for p in model.parameters()]
    held += [x for state in run.optimizer.state.values() for x in state.values() if isinstance(x, torch.Tensor)]
    held = [x.to_local() if hasattr(x, "to_local") else x for x in held]
    base = sum({x.data_ptr(): x.numel() * x.element_size() for x in held}.values())

    def sample() -> None:
        with run.sampling(), run.gathered():
            noise = torch.rand(B * G, C, dtype=torch.float64)
            virft.sample(run.model, batch_of(B), G, noise, C, torch.tensor([-1]), **run.distribution)

    rise = resident if cfg.shard else peak
    found = {"train": base + rise(lambda: virft.update(run, ro)), "sample": base + rise(sample)}
    patches = SMALL["grid"][0] * SMALL["grid"][1]
    config = small_config(width)
    return memory.needed(cfg, config, virft.cast_frozen, SMALL["P"], patches, True, processes), found


def print_measured() -> None:
    rows = [flags for flags, processes in FLAGS if processes == 1 and "max_completion_tokens" not in flags]
    width, main = 1, os.environ.get("RANK", "0") == "0"
    if "RANK" in os.environ:
        rows, width = [{"micro_batch": 1, "shard": True}, {"micro_batch": 8, "shard": True}], 4
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        model = transformers.AutoModelForImageTextToText.from_config(small_config(width), dtype=torch.bfloat16)
        model.save_pretrained(folder)
        if main:
            print(f"Qwen2-VL of {sum(p.numel() for p in model.parameters()):,} parameters, {SMALL}, MB\n")
            print("| flags | train: formula / allocated | ratio | sample | ratio |\n|---|---|---|---|---|")
        for flags in rows:
            kept = {name: value for name, value in flags.items() if name != "max_pixels"}  # pictures are below it
            formula, found = measured(Path(folder), kept, width)
            cells = [
                f"{formula[phase] / 1e6:.0f} / {found[phase] / 1e6:.0f} | {formula[phase] / found[phase]:.2f}"
                for phase in ("train", "sample")
            ]
            if main:
                print(f"| {words(flags)} | {' | '.join(cells)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", action="store_true", help="compare the formula with PyTorch's allocator")
    print_measured() if parser.parse_args().measure else print_tables()


if __name__ == "__main__":
    main()
