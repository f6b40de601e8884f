"""Measure time, GPU utilization and memory of real model sizes on one GPU, against TRL's GRPOTrainer.

    pip install trl==1.16.0 torchvision                        # torchvision: Qwen-VL's processor
    python bench/gpu.py                                        # both shapes, 256 tokens, G 8, four prompts a step
    python bench/gpu.py --sides virft.py --cases 256,8,1 256,8,4 512,8,4        # needs no TRL

A case is COMPLETION_TOKENS,G,PROMPTS_A_STEP. The models have the sizes of Qwen2-VL-2B and Qwen2.5-VL-3B and random
weights, so nothing is downloaded; pictures are enlarged to 676 image tokens. Both sides use float32 weights under bf16
autocast, the same attention (flash-attn if it is installed, otherwise SDPA), beta 0.04, no EOS and one prompt per
forward. Sides alternate, and both loops are those of bench/vs_trl.py. "busy" is the share of time in which the GPU
computed anything, as measured by nvidia-smi. It is nan where nvidia-smi reports nothing (on a part of a GPU, or if
steps take less than half a second). "peak" is the maximum memory that torch had allocated.
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import torch
import transformers
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from bench import vs_trl  # noqa: E402
from demo import shapes, warm_start  # noqa: E402

SIDE = 728  # pixels of the pictures: 26 x 26 tokens of 28 x 28, with the question about 700
TEXT = {
    "vocab_size": 151_936, "num_key_value_heads": 2, "max_position_embeddings": 32_768,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
}  # fmt: skip
VISION = {"depth": 32, "num_heads": 16}
SPECIAL = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
CHAT_TEMPLATE = warm_start.CHAT_TEMPLATE.replace("<image>", "<|vision_start|><|image_pad|><|vision_end|>")


def qwen2_vl_2b(**special: int):
    text = TEXT | {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12}
    vision = VISION | {"embed_dim": 1280, "hidden_size": 1536, "mlp_ratio": 4}
    return transformers.Qwen2VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True, **special)


def qwen2_5_vl_3b(**special: int):
    text = TEXT | {"hidden_size": 2048, "intermediate_size": 11_008, "num_hidden_layers": 36, "num_attention_heads": 16}
    vision = VISION | {
        "hidden_size": 1280, "intermediate_size": 3420, "out_hidden_size": 2048, "window_size": 112,
        "fullatt_block_indexes": [7, 15, 23, 31],
    }  # fmt: skip
    return transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True, **special)


def qwen2_vl_7b(**special: int):
    """For bench/memory.py."""
    text = TEXT | {
        "vocab_size": 152_064, "hidden_size": 3584, "intermediate_size": 18_944, "num_hidden_layers": 28,
        "num_attention_heads": 28, "num_key_value_heads": 4,
    }  # fmt: skip
    vision = VISION | {"embed_dim": 1280, "hidden_size": 3584, "mlp_ratio": 4}
    return transformers.Qwen2VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=False, **special)


SHAPES = {"Qwen2-VL-2B": qwen2_vl_2b, "Qwen2.5-VL-3B": qwen2_5_vl_3b}
PROCESSORS = {"Qwen2-VL-2B": "Qwen2VLProcessor", "Qwen2.5-VL-3B": "Qwen2_5_VLProcessor"}


def make_tokenizer():
    """Return the demo's tokenizer with Qwen-VL's image tokens.

    Most ids of the model's vocabulary decode to nothing, which affects no phase.
    """
    tokenizer = warm_start.make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": list(SPECIAL)})
    tokenizer.image_token, tokenizer.video_token = SPECIAL[2:]
    return tokenizer


def special_ids(tokenizer) -> dict[str, int]:
    names = ("vision_start_token_id", "vision_end_token_id", "image_token_id", "video_token_id")
    return dict(zip(names, tokenizer.convert_tokens_to_ids(list(SPECIAL))))


def make_processor(shape: str, tokenizer):
    return getattr(transformers, PROCESSORS[shape])(
        image_processor=transformers.Qwen2VLImageProcessor(), tokenizer=tokenizer,
        video_processor=transformers.Qwen2VLVideoProcessor(), chat_template=CHAT_TEMPLATE,
    )  # fmt: skip


def write_model(shape: str, folder: Path) -> None:
    """Write a model folder like those on the hub: bf16 weights and a complete processor."""
    tokenizer = make_tokenizer()
    config = SHAPES[shape](**special_ids(tokenizer))
    text = config.get_text_config()
    text.bos_token_id, text.eos_token_id, text.pad_token_id = None, tokenizer.eos_token_id, tokenizer.pad_token_id
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):  # a CPU takes a minute to draw the weights
        model = transformers.AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    del model  # to free the GPU: each side is measured in a process of its own
    torch.cuda.empty_cache()
    make_processor(shape, tokenizer).save_pretrained(folder)


def write_data(folder: Path, pictures: int) -> None:
    """Write the demo's pictures, enlarged to SIDE, and scale their boxes."""
    shapes.write_split(folder, "train", pictures, seed=0)
    scale = SIDE / shapes.SIZE
    for path in (folder / "train").iterdir():
        with Image.open(path) as picture:
            enlarged = picture.resize((SIDE, SIDE))
        enlarged.save(path)
    file = folder / "annotations" / "instances_train.json"
    table = json.loads(file.read_text())
    for image in table["images"]:
        image["width"] = image["height"] = SIDE
    for record in table["annotations"]:
        record["bbox"] = [value * scale for value in record["bbox"]]
    file.write_text(json.dumps(table))


class Meter:
    """Measure the peak memory allocated by torch, and the GPU's utilization after the first step.

    Has the interface of vs_trl.Meter.
    """

    def warm(self) -> None:
        self.over, self.seen = threading.Event(), []
        self.watcher = threading.Thread(target=self.watch, daemon=True)
        self.watcher.start()

    def watch(self) -> None:
        gpu = f"--id=GPU-{torch.cuda.get_device_properties(0).uuid}"
        query = ("nvidia-smi", gpu, "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits")
        while not self.over.wait(0.5):
            share = subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()
            if share.isdigit():  # no number on parts of a GPU (MIG)
                self.seen.append(float(share))

    def read(self) -> dict[str, float]:
        self.over.set()
        self.watcher.join()
        busy = statistics.mean(self.seen) / 100 if self.seen else math.nan
        return {"peak": torch.cuda.max_memory_allocated(), "busy": busy}


def measure(side: str, case: str, steps: int, folder: Path, micro_batch: int, meter: type = Meter) -> dict:
    sizes = [int(n) for n in case.split(",")]
    if side == "TRL":
        return vs_trl.theirs(folder, *sizes, steps, meter)
    more = {"max_pixels": SIDE**2, "micro_batch": micro_batch}
    return vs_trl.ours(folder, *sizes, steps, side == "repeated", meter, **more)


def table_rows(shape: str, case: str, rounds: list[dict]) -> str:
    """Format medians over rounds; a ratio of times is the median of the ratios of all rounds."""
    lines, (C, G, prompts) = [], map(int, case.split(","))
    for side in rounds[0]:

        def median(value) -> float:
            return statistics.median(value(sides[side]) for sides in rounds)

        phases = [median(lambda s: s["phases"][name]) for name in ("sample", "reference", "train")]
        seconds = [median(lambda s: statistics.median(s["seconds"])), *phases]
        cells = [shape, f"{rounds[0][side]['prompt']}, {C}, {G}, {prompts}", side, *(f"{s:.2f}" for s in seconds)]
        busy, peak = median(lambda s: s["busy"]), median(lambda s: s["peak"])
        cells += [f"{prompts * G * C / phases[0]:,.0f}", f"{busy:.0%}", f"{peak / 1e9:.1f}"]
        if "TRL" in rounds[0]:
            ratio = [statistics.median(r["TRL"]["seconds"]) / statistics.median(r[side]["seconds"]) for r in rounds]
            cells.append(f"{statistics.median(ratio):.1f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--cases", nargs="+", default=["256,8,4"], help="COMPLETION_TOKENS,G,PROMPTS_A_STEP")
    parser.add_argument("--micro_batch", type=int, default=0, help="of virft.py")
    parser.add_argument("--rounds", type=int, default=2, help="alternations")
    parser.add_argument("--steps", type=int, default=3, help="timed steps of each process")
    parser.add_argument("--sides", nargs="+", choices=vs_trl.SIDES, default=vs_trl.SIDES)
    parser.add_argument("--side", choices=vs_trl.SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("bench/gpu.py: torch sees no GPU here; bench/vs_trl.py compares on CPUs")
    if args.side:
        print(json.dumps(measure(args.side, args.cases[0], args.steps, args.folder, args.micro_batch)))
        return
    vs_trl.need_trl("TRL" in args.sides)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, transformers {transformers.__version__}\n")
    print(
        "| model | prompt, completion, G, prompts | | s / step | sample | reference | train "
        "| sampled tokens / s | busy | peak GB | TRL / this: time |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    for shape in args.shapes:
        with tempfile.TemporaryDirectory() as folder:
            write_data(Path(folder) / "data", 40)
            write_model(shape, Path(folder) / "model")
            for case in args.cases:
                argv = ("--cases", case, "--steps", args.steps, "--folder", folder, "--micro_batch", args.micro_batch)
                rounds = [
                    {side: vs_trl.in_a_process(__file__, "--side", side, *argv) for side in args.sides}
                    for _ in range(args.rounds)
                ]
                print(table_rows(shape, case, rounds), flush=True)


if __name__ == "__main__":
    main()
