"""Write a model folder of SmolVLM-256M's shape with random weights, to measure a step without a GPU.

    python bench/smolvlm.py DIR                             # a picture is one square of 512 x 512: 64 tokens
    python bench/smolvlm.py DIR --tiles                     # and tiles, as released: up to 1088 tokens
    python bench/vs_trl.py --model DIR --cases 512,64,8,1 --sides virft.py --rounds 1

SmolVLM is an Idefics3 with a processor that needs torchvision for videos. Idefics3's does the same with images and
needs nothing, so the folder has the latter's classes.
"""

import argparse
import sys
from pathlib import Path

import torch
import transformers
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from demo import warm_start  # noqa: E402

MARKS = ["<fake_token_around_image>", "<global-img>", "<end_of_utterance>"]
MARKS += [f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)]


def write(folder: Path, tiles: bool, layers: tuple[int, int] = (30, 12)) -> None:
    """Write the folder; layers: of the language model and of the vision tower."""
    tokenizer = warm_start.make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>", *MARKS]})
    text = {
        "model_type": "llama", "vocab_size": 49_280, "hidden_size": 576, "intermediate_size": 1536,
        "num_hidden_layers": layers[0], "num_attention_heads": 9, "num_key_value_heads": 3,
        "max_position_embeddings": 8192, "bos_token_id": None, "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }  # fmt: skip
    vision = {
        "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": layers[1], "num_attention_heads": 12,
        "image_size": 512, "patch_size": 16,
    }  # fmt: skip
    config = transformers.Idefics3Config(
        text_config=text, vision_config=vision, scale_factor=4, tie_word_embeddings=False,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"), pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.AutoModelForImageTextToText.from_config(config)
    model.save_pretrained(folder)
    images = Idefics3ImageProcessorPil(
        size={"longest_edge": 2048 if tiles else 512}, max_image_size={"longest_edge": 512}, do_image_splitting=tiles
    )
    transformers.Idefics3Processor(
        images, tokenizer, image_seq_len=64, chat_template=warm_start.CHAT_TEMPLATE
    ).save_pretrained(folder)
    print(f"{folder}: {sum(p.numel() for p in model.parameters()):,} parameters")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tiles", action="store_true", help="cut pictures into tiles")
    args = parser.parse_args()
    write(args.folder, args.tiles)


if __name__ == "__main__":
    main()
