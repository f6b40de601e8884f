"""A tiny random model and prompts of every family that is tested: as its configuration and its processor make them.

`prompt(family, sizes, text, seed)` takes one size per image, in the units of the family: (height, width) in patches
where images keep their shape, in tiles where they are cut into tiles; families of one fixed size count the images only.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor

import data
import virft
from conftest import spread

IMAGE, VIDEO, START, END, EOS, BREAK = 90, 91, 92, 93, 94, 95
WORDS = 80  # ids below are words
PATCH, SIZE = 4, 16  # pixels; images of a fixed size and tiles are SIZE x SIZE, 16 patches
TEXT = {
    "vocab_size": 100, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "initializer_range": 0.1,
    "bos_token_id": 96, "eos_token_id": EOS, "pad_token_id": EOS,
}  # fmt: skip
VISION = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": SIZE,
    "patch_size": PATCH,
}  # fmt: skip
TOKENS = {"image_token_id": IMAGE, "video_token_id": VIDEO, "tie_word_embeddings": False}
TILES = {"image_grid_pinpoints": [[SIZE, 2 * SIZE], [2 * SIZE, SIZE], [2 * SIZE, 2 * SIZE]]}
Encoded = tuple[list[list[int]], dict[str, Tensor]]  # the tokens of each image, and the tensors beside the text


# ------------------------------------------------------------------------------------------------
# Models.


def rope(sections: list[int], **more) -> dict:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": sections, **more}}


def qwen2_vl():
    vision = {"depth": 2, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "mlp_ratio": 2, "patch_size": PATCH}
    return transformers.Qwen2VLConfig(text_config=TEXT | rope([2, 3, 3]), vision_config=vision, **TOKENS)


def qwen2_5_vl():
    # Windows of 2 x 2 merged patches, so that there are several in an image; full attention in the second block.
    vision = VISION | {
        "depth": 2, "num_heads": 2, "out_hidden_size": 64, "window_size": 4 * PATCH, "fullatt_block_indexes": [1],
    }  # fmt: skip
    return transformers.Qwen2_5_VLConfig(text_config=TEXT | rope([2, 3, 3]), vision_config=grid(vision), **TOKENS)


def qwen3_vl():
    vision = VISION | {
        "depth": 3, "num_heads": 2, "out_hidden_size": 64, "num_position_embeddings": 16,
        "deepstack_visual_indexes": [0, 1],
    }  # fmt: skip
    # A layer more than there are deep features: what is added to images behind the last layer reaches no completion.
    text = TEXT | {"head_dim": 16, "num_hidden_layers": 3} | rope([2, 3, 3], mrope_interleaved=True)
    return transformers.Qwen3VLConfig(text_config=text, vision_config=grid(vision), **TOKENS)


def qwen3_5():
    vision = VISION | {"depth": 2, "num_heads": 2, "out_hidden_size": 64, "num_position_embeddings": 16}
    text = TEXT | {
        "layer_types": ["linear_attention", "full_attention"], "head_dim": 16, "linear_key_head_dim": 8,
        "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    } | rope([2, 1, 1], mrope_interleaved=True, partial_rotary_factor=0.5)  # fmt: skip
    return transformers.Qwen3_5Config(text_config=text, vision_config=grid(vision), **TOKENS)


def glm4v():
    vision = VISION | {"depth": 2, "num_heads": 2, "out_hidden_size": 64}
    text = TEXT | rope([1, 1, 2], partial_rotary_factor=0.5)
    return transformers.Glm4vConfig(text_config=text, vision_config=vision, **TOKENS)


def grid(vision: dict) -> dict:
    """Without the names that a vision tower over grids of patches calls otherwise or does not have."""
    return {k: v for k, v in vision.items() if k not in ("image_size", "num_hidden_layers", "num_attention_heads")}


def towers(vision: str, text: str, **more) -> dict:
    """Vision tower and language model named by their own model types; `more` goes to the vision tower."""
    return {"vision_config": {"model_type": vision} | VISION | more, "text_config": {"model_type": text} | TEXT}


def llava():
    return transformers.LlavaConfig(**towers("clip_vision_model", "llama"), image_token_index=IMAGE)


def llava_next():
    return transformers.LlavaNextConfig(**towers("clip_vision_model", "mistral"), image_token_index=IMAGE, **TILES)


def llava_onevision():
    tokens = {"image_token_index": IMAGE, "video_token_index": VIDEO}
    return transformers.LlavaOnevisionConfig(
        **towers("siglip_vision_model", "qwen2", vision_use_head=False), **tokens, **TILES
    )


def pixtral():
    select = {"vision_feature_layer": -1, "vision_feature_select_strategy": "full"}
    return transformers.LlavaConfig(**towers("pixtral", "mistral"), image_token_index=IMAGE, **select)


def mistral3():
    sizes = {"spatial_merge_size": 2, "vision_feature_layer": -1, "image_token_index": IMAGE}
    return transformers.Mistral3Config(**towers("pixtral", "mistral"), **sizes)


def lfm2_vl():
    vision = {k: v for k, v in VISION.items() if k != "image_size"}
    vision |= {"model_type": "siglip2_vision_model", "num_patches": 16, "vision_use_head": False}
    text = TEXT | {"model_type": "lfm2", "layer_types": ["conv", "full_attention"], "conv_L_cache": 3}
    tokens = {"image_token_id": IMAGE, "tie_word_embeddings": False}
    return transformers.Lfm2VlConfig(text_config=text, vision_config=vision, projector_hidden_size=64, **tokens)


def internvl():
    return transformers.InternVLConfig(**towers("internvl_vision", "qwen2"), image_token_id=IMAGE)


def idefics3(config: type):
    return config(text_config={"model_type": "llama"} | TEXT, vision_config=VISION, image_token_id=IMAGE)


def gemma3():
    # A window shorter than the prompts, so that the cache has dropped tokens before the completions begin.
    text = TEXT | {"head_dim": 16, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
    tokens = {"image_token_index": IMAGE, "boi_token_index": START, "eoi_token_index": END}
    vision = {"model_type": "siglip_vision_model"} | VISION
    return transformers.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, **tokens)


def paligemma():
    text = {"model_type": "gemma", "head_dim": 16} | TEXT
    vision = {"model_type": "siglip_vision_model", "vision_use_head": False} | VISION
    return transformers.PaliGemmaConfig(
        text_config=text, vision_config=vision, image_token_index=IMAGE, projection_dim=64, hidden_size=64
    )


def mllama():
    vision = {k: v for k, v in VISION.items() if k != "num_attention_heads"} | {
        "attention_heads": 2, "num_global_layers": 1, "vision_output_dim": 64, "intermediate_layers_indices": [0],
        "max_num_tiles": 4,
    }  # fmt: skip
    text = TEXT | {"num_hidden_layers": 3, "cross_attention_layers": [1]}
    return transformers.MllamaConfig(text_config=text, vision_config=vision, image_token_index=TEXT["vocab_size"])


# ------------------------------------------------------------------------------------------------
# Prompts.


def pixels(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator)


def patch_grids(sizes, generator) -> Encoded:
    """Patches of all images in one list, merged 2 x 2 into a token each."""
    grids = torch.tensor([[1, h, w] for h, w in sizes])
    patches = pixels(generator, int(grids.prod(1).sum()), 3 * 2 * PATCH**2)
    runs = [[START] + [IMAGE] * (h * w // 4) + [END] for h, w in sizes]
    return runs, {"pixel_values": patches, "image_grid_thw": grids}


def fixed(sizes, generator, tokens: int) -> Encoded:
    runs = [[START] + [IMAGE] * tokens + [END] for _ in sizes]
    return runs, {"pixel_values": pixels(generator, len(sizes), 3, SIZE, SIZE)}


def tiled(sizes, generator) -> Encoded:
    """Tiles and an overview of each image, filled up to the largest number of tiles; a token ends a row of patches."""
    counts, side = [1 + rows * columns for rows, columns in sizes], SIZE // PATCH
    values = pixels(generator, len(sizes), max(counts), 3, SIZE, SIZE)
    for image, count in zip(values, counts):
        image[count:] = 0
    runs = [[IMAGE] * (side**2 + rows * side * (columns * side + 1)) for rows, columns in sizes]
    return runs, {"pixel_values": values, "image_sizes": SIZE * torch.tensor(sizes)}


def tiled_if_alone(sizes, generator) -> Encoded:
    """Several images are not cut into tiles; each is one overview and the token that ends it."""
    if len(sizes) == 1:
        runs, tensors = tiled(sizes, generator)
    else:
        runs = [[IMAGE] * ((SIZE // PATCH) ** 2 + 1) for _ in sizes]
        values = pixels(generator, len(sizes), 1, 3, SIZE, SIZE)
        tensors = {"pixel_values": values, "image_sizes": SIZE * torch.tensor(sizes)}
    return runs, tensors | {"batch_num_images": torch.tensor([len(sizes)])}


def split(sizes, generator) -> Encoded:
    """Tiles and an overview of each image, all in the one row of the prompt, with the pixels that are not padding."""
    counts = [1 + rows * columns for rows, columns in sizes]
    mask = torch.ones(1, sum(counts), SIZE, SIZE, dtype=torch.long)
    mask[0, 0, :, SIZE - PATCH :] = 0
    runs = [([START] + [IMAGE] * 4) * count + [START] for count in counts]
    return runs, {"pixel_values": pixels(generator, 1, sum(counts), 3, SIZE, SIZE), "pixel_attention_mask": mask}


def own_shapes(sizes, generator) -> Encoded:
    """Images of unequal shape, filled up to the largest; a token ends each row of patches."""
    runs = [((([IMAGE] * w + [BREAK]) * h)[:-1]) + [END] for h, w in sizes]
    height, width = (PATCH * max(side) for side in zip(*sizes))
    values = torch.zeros(len(sizes), 3, height, width)
    for image, (h, w) in zip(values, sizes):
        image[:, : h * PATCH, : w * PATCH] = pixels(generator, 3, h * PATCH, w * PATCH)
    return runs, {"pixel_values": values, "image_sizes": PATCH * torch.tensor(sizes)}


def merged_shapes(sizes, generator) -> Encoded:
    """As own_shapes, with 2 x 2 patches merged into a token."""
    _, tensors = own_shapes(sizes, generator)
    runs = [((([IMAGE] * (w // 2) + [BREAK]) * (h // 2))[:-1]) + [END] for h, w in sizes]
    return runs, tensors


def counted_patches(sizes, generator) -> Encoded:
    """Patches of each image in a row of its own, filled up to the largest number, merged 2 x 2 into a token each."""
    shapes = torch.tensor(sizes)
    mask = torch.arange(int(shapes.prod(1).max())) < shapes.prod(1)[:, None]
    values = pixels(generator, *mask.shape, 3 * PATCH**2) * mask[..., None]
    runs = [[START] + [IMAGE] * (h * w // 4) + [END] for h, w in sizes]
    return runs, {"pixel_values": values, "pixel_attention_mask": mask.int(), "spatial_shapes": shapes}


def cross_attended(sizes, generator) -> Encoded:
    """One token per image; its tiles, up to four, are attended to from beside the text."""
    shapes = [(1, 1), (1, 2), (1, 3), (1, 4), (2, 1), (2, 2), (3, 1), (4, 1)]
    values, mask = pixels(generator, 1, len(sizes), 4, 3, SIZE, SIZE), torch.zeros(1, len(sizes), 4, dtype=torch.long)
    for i, (rows, columns) in enumerate(sizes):
        values[0, i, rows * columns :], mask[0, i, : rows * columns] = 0, 1
    ids = torch.tensor([[1 + shapes.index(size) for size in sizes]])
    return [[TEXT["vocab_size"]] for _ in sizes], {
        "pixel_values": values,
        "aspect_ratio_ids": ids,
        "aspect_ratio_mask": mask,
    }


def image_types(name: str) -> Callable[[Tensor, dict], dict]:
    return lambda ids, tensors: {name: (ids == IMAGE).long()}


def prefix_types(ids: Tensor, tensors: dict) -> dict:
    return {"token_type_ids": torch.zeros_like(ids)}


def seen_tiles(ids: Tensor, tensors: dict) -> dict:
    """[1, P, images, 4]: a token sees the tiles of the image before it, up to the next image."""
    image = (ids == TEXT["vocab_size"]).cumsum(1) - 1  # [1, P], which image comes before
    shown = F.one_hot(image.clamp(min=0), image.max() + 1) * (image >= 0).long()[..., None]
    return {"cross_attention_mask": shown[..., None] * tensors["aspect_ratio_mask"][:, None]}


@dataclass(frozen=True)
class Family:
    """How one family is made and asked.

    config      its configuration, tiny
    images      (sizes, generator) -> the tokens of each image and the tensors beside the text
    one, two    sizes of the images of a prompt with one image and of a longer one, with several if it takes them
    beside      (ids, tensors) -> what its processor makes of the ids besides
    completion  value of such a tensor on the tokens of a completion, where it is not that of the prompt's last token
    shares      whether training encodes a prompt once
    """

    config: Callable[[], transformers.PreTrainedConfig]
    images: Callable[[list[tuple[int, int]], torch.Generator], Encoded]
    one: list[tuple[int, int]]
    two: list[tuple[int, int]]
    beside: Callable[[Tensor, dict], dict] = lambda ids, tensors: {}
    completion: dict[str, int] | None = None
    shares: bool = True


GRIDS = {"images": patch_grids, "one": [(4, 6)], "two": [(8, 4), (2, 4)], "beside": image_types("mm_token_type_ids")}
FAMILIES = {
    "Qwen2-VL": Family(qwen2_vl, **GRIDS),
    "Qwen2.5-VL": Family(qwen2_5_vl, **GRIDS),
    "Qwen3-VL": Family(qwen3_vl, **GRIDS),
    "Qwen3.5": Family(qwen3_5, **GRIDS, shares=False),
    "GLM-4V": Family(glm4v, **GRIDS),
    "LLaVA": Family(llava, partial(fixed, tokens=16), [(1, 1)], [(1, 1)] * 2),
    "LLaVA-NeXT": Family(llava_next, tiled, [(1, 2)], [(2, 2), (2, 1)]),
    "LLaVA-OneVision": Family(llava_onevision, tiled_if_alone, [(1, 2)], [(2, 2), (2, 1)]),
    "Pixtral": Family(pixtral, own_shapes, [(2, 3)], [(3, 2), (4, 4)]),
    "Mistral3": Family(mistral3, merged_shapes, [(2, 4)], [(4, 2), (4, 4)]),
    "LFM2-VL": Family(lfm2_vl, counted_patches, [(4, 6)], [(8, 4), (2, 4)], shares=False),
    "InternVL": Family(internvl, partial(fixed, tokens=4), [(1, 1)], [(1, 1)] * 3),
    "Idefics3": Family(partial(idefics3, transformers.Idefics3Config), split, [(1, 2)], [(2, 2), (1, 1)]),
    "SmolVLM": Family(partial(idefics3, transformers.SmolVLMConfig), split, [(1, 2)], [(2, 2), (1, 1)]),
    "Gemma3": Family(gemma3, partial(fixed, tokens=4), [(1, 1)], [(1, 1)] * 2, image_types("token_type_ids")),
    "PaliGemma": Family(
        paligemma, partial(fixed, tokens=16), [(1, 1)], [(1, 1)] * 2, prefix_types, {"token_type_ids": 1}
    ),
    "Mllama": Family(mllama, cross_attended, [(1, 2), (1, 1)], [(2, 2), (1, 3)], seen_tiles),
}


def model(name: str, seed: int = 0) -> torch.nn.Module:
    torch.manual_seed(seed)
    made = transformers.AutoModelForImageTextToText.from_config(FAMILIES[name].config()).eval()
    spread(made, seed)
    with torch.no_grad():
        for parameter in (p for parameter_name, p in made.named_parameters() if parameter_name.endswith("A_log")):
            parameter.uniform_(-4, -1)  # decay of linear attention: slow, so that its state holds the whole prompt
    return made


def prompt(name: str, sizes: list[tuple[int, int]], text: int, seed: int) -> dict[str, Tensor]:
    """A batch of one: `text` words, the images behind the first half of them, each followed by a word of its own."""
    family, generator = FAMILIES[name], torch.Generator().manual_seed(seed)
    runs, tensors = family.images(sizes, generator)
    words = torch.randint(0, WORDS, (text + len(runs),), generator=generator).tolist()
    between = [token for run in runs for token in [*run, words.pop()]]
    ids = torch.tensor([words[: text // 2] + between + words[text // 2 :]])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)} | tensors | family.beside(ids, tensors)


def prompts(name: str) -> list[dict[str, Tensor]]:
    """Two prompts of unequal length and, where the family takes several, with unequal numbers of images."""
    return [prompt(name, FAMILIES[name].one, 5, 1), prompt(name, FAMILIES[name].two, 14, 2)]


def batch(inputs: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Joined by data.collate, left-padded where they are several."""
    return data.collate([data.Prompt(None, each, (1, 1), [], 0) for each in inputs], 0)


# ------------------------------------------------------------------------------------------------
# The oracle.


def alone(model, inputs: dict, ids: Tensor, temperature: float, forbidden: Tensor, completion: dict | None = None):
    """log pi [C, V] behind each token of one completion, ids [C]: one plain forward, no cache, no batch, no padding.

    completion: Family.completion.
    """
    sequence = {}
    for name, value in inputs.items():
        if value.shape[:2] == inputs["input_ids"].shape:
            further = value[:, -1:].repeat_interleave(len(ids), 1)
            if name in (completion or {}):
                further.fill_(completion[name])
            value = torch.cat([value, ids[None] if name == "input_ids" else further], 1)
        sequence[name] = value
    logits = model(**sequence).logits[0, -len(ids) - 1 : -1] / temperature
    return logits.index_fill(-1, forbidden, -math.inf).double().log_softmax(-1)


def scored(model, inputs: dict, ids: Tensor, temperature: float = 1.0, forbidden: Tensor | None = None):
    """virft.completion_logps of completions ids [N, C] to B prompts, N / B of each in order, as one graph."""
    rows = torch.arange(len(ids)) // (len(ids) // len(inputs["input_ids"]))
    forbidden = torch.tensor([], dtype=torch.long) if forbidden is None else forbidden
    return virft.completion_logps(model, virft.encode(model, inputs), rows, ids, temperature, forbidden)


def gradients(model: torch.nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


# ------------------------------------------------------------------------------------------------
# Sharing a prompt against repeating it.

FORBIDDEN = torch.tensor([5, 17, *range(WORDS, TEXT["vocab_size"])])  # with all placeholders
G, C, TEMPERATURE = 3, 6, 0.7


def completions(inputs: list[dict], seed: int = 3) -> Tensor:
    """G random completions of C words for each prompt: ids [B * G, C]."""
    ids = torch.randint(0, WORDS, (len(inputs) * G, C), generator=torch.Generator().manual_seed(seed))
    return ids.masked_fill(torch.isin(ids, FORBIDDEN), 1)


def oracle(model, inputs: list[dict], ids: Tensor, completion: dict | None) -> Tensor:
    """Log-probabilities of the completions ids [B * G, C], each alone."""
    logps = [alone(model, inputs[i // G], row, TEMPERATURE, FORBIDDEN, completion) for i, row in enumerate(ids)]
    return torch.stack([logp.gather(1, row[:, None]).squeeze(1) for logp, row in zip(logps, ids)])


def deviations(
    model, inputs: list[dict], ids: Tensor, chunk: int, completion: dict | None = None, rounding: float = 0.0
) -> tuple[float, float]:  # fmt: skip
    """Return how far two stages are from each completion alone in one plain forward: log-probabilities, gradients.

    chunk: completions at a time, 0: all. The gradients' deviation is relative. Asserts what must be equal, with and
    without gradients up to `rounding`.
    """
    weights = torch.randn(ids.shape, generator=torch.Generator().manual_seed(4))  # distinguishes every row and token
    logp, entropy = torch.zeros_like(weights), torch.zeros_like(weights)
    chunks = torch.arange(len(ids)).split(chunk if chunk and virft.cache_is_differentiable(model) else len(ids))

    def loss_of(rows, chunk_logp, chunk_entropy):
        logp[rows], entropy[rows] = chunk_logp.detach(), chunk_entropy
        assert chunk_logp.dtype == torch.float32
        return (chunk_logp * weights[rows]).sum()

    distribution = {"temperature": TEMPERATURE, "forbidden": FORBIDDEN}
    virft.two_stage_backward(model, batch(inputs), ids, chunks, loss_of, **distribution)
    found = gradients(model)
    model.zero_grad()
    expected = oracle(model, inputs, ids, completion)
    (expected * weights).sum().backward()
    assert (virft.chunked_logps(model, batch(inputs), ids, chunks, **distribution) - logp).abs().max() <= rounding
    assert (logp <= 0).all() and (entropy > 0).all()
    difference = (found - gradients(model)).norm() / found.norm()
    return float((logp - expected).abs().max()), float(difference)
