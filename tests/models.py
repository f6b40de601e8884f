"""Inputs for two model classes, LLaVA (fixed image size) and Qwen2-VL (image grids, multi-axis positions)."""

import torch
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

from conftest import spread
from demo import warm_start

IMAGE, VIDEO, START, END, EOS = 90, 91, 92, 93, 94


def qwen2_vl(seed: int = 0):
    torch.manual_seed(seed)
    config = Qwen2VLConfig(
        text_config={
            "vocab_size": 100, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
            "num_key_value_heads": 2, "max_position_embeddings": 512, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]},
            "bos_token_id": None, "eos_token_id": EOS, "pad_token_id": EOS,
        },
        vision_config={"depth": 2, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "mlp_ratio": 2, "patch_size": 14},
        image_token_id=IMAGE, video_token_id=VIDEO, vision_start_token_id=START, vision_end_token_id=END,
    )  # fmt: skip
    model = Qwen2VLForConditionalGeneration(config).eval()
    spread(model, seed)
    return model


def qwen2_vl_prompt(grids: list[tuple[int, int]], text: int, seed: int) -> dict[str, torch.Tensor]:
    """One prompt with an image per (height, width) grid of patches and `text` text tokens around them."""
    generator = torch.Generator().manual_seed(seed)
    ids = []
    for height, width in grids:
        ids += [START] + [IMAGE] * (height * width // 4) + [END]
    words = torch.randint(0, 80, (text,), generator=generator).tolist()
    ids = words[: text // 2] + ids + words[text // 2 :]
    return {
        "input_ids": torch.tensor([ids]),
        "attention_mask": torch.ones(1, len(ids), dtype=torch.long),
        "mm_token_type_ids": torch.tensor([[int(i == IMAGE) for i in ids]]),
        "pixel_values": torch.randn(sum(h * w for h, w in grids), 3 * 2 * 14 * 14, generator=generator),
        "image_grid_thw": torch.tensor([[1, h, w] for h, w in grids]),
    }


def llava(seed: int = 0):
    model = warm_start.make_model(warm_start.make_processor(), seed).eval()
    spread(model, seed)
    return model


def llava_prompt(images: int, text: int, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    image_id = warm_start.make_tokenizer().convert_tokens_to_ids("<image>")
    words = torch.randint(0, 200, (text,), generator=generator).tolist()
    ids = words[: text // 2] + [image_id] * (warm_start.IMAGE_TOKENS * images) + words[text // 2 :]
    return {
        "input_ids": torch.tensor([ids]),
        "attention_mask": torch.ones(1, len(ids), dtype=torch.long),
        "pixel_values": torch.randn(images, 3, warm_start.SIZE, warm_start.SIZE, generator=generator),
    }


# name -> (model, one prompt, prompts of unequal length and image count that are padded into one batch)
CASES = {
    "llava single": (llava, [llava_prompt(1, 9, 1)]),
    "llava padded": (llava, [llava_prompt(1, 5, 1), llava_prompt(2, 12, 2)]),
    "qwen2-vl single": (qwen2_vl, [qwen2_vl_prompt([(4, 6)], 7, 1)]),
    "qwen2-vl padded": (qwen2_vl, [qwen2_vl_prompt([(4, 6)], 5, 1), qwen2_vl_prompt([(8, 4), (2, 4)], 14, 2)]),
}
