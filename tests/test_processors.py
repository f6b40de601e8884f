"""Families from the command line: the processor classes that transformers has for them, over a tiny tokenizer.

What processors need torchvision for, their video part, is a stand-in; everything about images is their own code. Models
are those of tests/families.py with larger pictures: patches of 28 x 28 pixels, images and tiles of 112 x 112.
"""

import importlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, processing_utils

import data
import families
import mia_dpo
import virft
from conftest import ROOT, spread
from extras import processors
from families import BREAK, END, EOS, IMAGE, START, VIDEO

T, PATCH, SIZE = transformers, 28, 112
TILES = {"image_grid_pinpoints": [[SIZE, 2 * SIZE], [2 * SIZE, SIZE], [2 * SIZE, 2 * SIZE]]}
SQUARE = {"height": SIZE, "width": SIZE}
AREAS = {"shortest_edge": 64, "longest_edge": 10**6}
VOCABULARY = 200
MARKS = (
    "<audio>", "<boa>", "<eoa>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>", "\n\n", "\n",
    "<slice>", "</slice>", "<image_id>", "</image_id>",
    *(f"<row_{i}_col_{j}>" for i in range(1, 5) for j in range(1, 5)),
)  # fmt: skip
TEMPLATE = (
    "<bos>{% for message in messages %}{% for part in message['content'] %}{% if part['type'] == 'image' %}MARK "
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endfor %}{% if add_generation_prompt %} w7{% endif %}"
)


class Video:
    """The video part of a processor."""

    model_input_names, size, merge_size, temporal_patch_size, slice_mode = [], {}, 2, 2, True
    downsample_mode, use_image_id, num_frames, fps = "16x", True, 2, 1


def tokenizer(image: str) -> PreTrainedTokenizerFast:
    """Words w0 to w79, everything else is unknown; special tokens have the ids of tests/families.py."""
    special = {
        image: IMAGE, "<|video|>": VIDEO, "<start>": START, "<end>": END, "<eos>": EOS, "[IMG_BREAK]": BREAK,
        "<bos>": 96, "<unk>": 97, "[IMG_END]": 98,
    }  # fmt: skip
    special |= {mark: 100 + i for i, mark in enumerate(MARKS)}
    made = Tokenizer(models.WordLevel({f"w{i}": i for i in range(80)} | special, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {
        "image_token": image, "video_token": "<|video|>", "vision_start_token": "<start>", "vision_end_token": "<end>",
        "boi_token": "<start>", "eoi_token": "<end>", "start_image_token": "<start>", "end_image_token": "<end>",
        "context_image_token": image, "image_break_token": "[IMG_BREAK]", "image_end_token": "[IMG_END]",
        "image_start_token": "<start>", "image_boundary_token": "<global-img>", "slice_start_token": "<slice>",
        "slice_end_token": "</slice>", "image_id_start_token": "<image_id>", "image_id_end_token": "</image_id>",
        "audio_token": "<audio>", "boa_token": "<boa>", "eoa_token": "<eoa>",
    }  # fmt: skip
    return PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<bos>", eos_token="<eos>", pad_token="<eos>", unk_token="<unk>",
        additional_special_tokens=list(special), extra_special_tokens=names,
    )  # fmt: skip


def images(name: str, **settings):
    return getattr(transformers, f"{name}ImageProcessorPil")(**settings)


def idefics2():
    perceiver = {"resampler_n_latents": 64, "resampler_depth": 1, "resampler_n_heads": 2, "resampler_head_dim": 16,
                 "num_key_value_heads": 2, "hidden_size": 64}  # fmt: skip
    text = {"model_type": "mistral"} | families.TEXT
    return T.Idefics2Config(
        vision_config=families.VISION, text_config=text, image_token_id=IMAGE, perceiver_config=perceiver
    )


def aria():
    return T.AriaConfig(
        vision_config={"model_type": "idefics3_vision"} | families.VISION | {"image_size": 980, "patch_size": 70},
        text_config=families.TEXT | {"moe_num_experts": 4, "moe_intermediate_size": 48}, image_token_index=IMAGE,
        projector_patch_to_query_dict={49: 128, 196: 256}, vision_feature_layer=-1,
    )  # fmt: skip


def gemma4():
    text = families.TEXT | {
        "head_dim": 16, "global_head_dim": 32, "hidden_size_per_layer_input": 8, "sliding_window": 64,
        "vocab_size_per_layer_input": VOCABULARY, "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_hidden_layers": 4, "num_kv_shared_layers": 2,
    }  # fmt: skip
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
              "num_key_value_heads": 2, "head_dim": 16, "patch_size": 16}  # fmt: skip
    marks = {"image_token_id": IMAGE, "video_token_id": VIDEO, "boi_token_id": START, "eoi_token_id": END}
    return T.Gemma4Config(text_config=text, vision_config=vision, audio_config=None, **marks)


def minicpm():
    vision = families.VISION | {"insert_layer_id": 0, "image_size": 980, "patch_size": 14}
    text = {"model_type": "qwen2"} | families.TEXT
    marks = {"image_token_id": IMAGE, "video_token_id": VIDEO}
    return T.MiniCPMV4_6Config(vision_config=vision, text_config=text, insert_layer_id=0, image_size=448, **marks)


def qwen3_vl_moe():
    text = families.qwen3_vl().text_config.to_dict() | {
        "model_type": "qwen3_vl_moe_text", "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48,
    }  # fmt: skip
    vision = families.qwen3_vl().vision_config.to_dict() | {"model_type": "qwen3_vl_moe_vision"}
    return T.Qwen3VLMoeConfig(text_config=text, vision_config=vision, **families.TOKENS)


def glm4v_moe():
    text = families.glm4v().text_config.to_dict() | {
        "model_type": "glm4v_moe_text", "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48,
        "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1,
    }  # fmt: skip
    vision = families.glm4v().vision_config.to_dict() | {"model_type": "glm4v_moe_vision"}
    return T.Glm4vMoeConfig(text_config=text, vision_config=vision, **families.TOKENS)


def deepseek_vl():
    vision = {"model_type": "siglip_vision_model", "vision_use_head": False} | families.VISION
    vision |= {"image_size": 384, "patch_size": 16}
    return T.DeepseekVLConfig(
        text_config={"model_type": "llama"} | families.TEXT, vision_config=vision, image_token_id=IMAGE
    )


def deepseek_vl_hybrid():
    high = {"model_type": "sam_vision_model", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
            "output_channels": 32, "image_size": 1024, "global_attn_indexes": [1]}  # fmt: skip
    low = deepseek_vl()
    return T.DeepseekVLHybridConfig(
        text_config=low.text_config, vision_config=low.vision_config, high_res_vision_config=high, image_token_id=IMAGE
    )


def vipllava():
    return T.VipLlavaConfig(
        **families.towers("clip_vision_model", "llama"), image_token_index=IMAGE, vision_feature_layers=[-1, -2]
    )


def glm46v():
    vision = families.grid(families.VISION) | {"depth": 2, "num_heads": 2, "out_hidden_size": 64, "image_size": SIZE}
    text = {"model_type": "glm4v_text"} | families.TEXT | families.rope([1, 1, 2], partial_rotary_factor=0.5)
    return transformers.Glm46VConfig(text_config=text, vision_config=vision, **families.TOKENS)


# name -> (configuration, image mark, its processor over a tokenizer)
FAMILIES: dict[str, tuple[Callable, str, Callable]] = {
    "llava": (families.llava, "<image>", lambda t: T.LlavaProcessor(
        images("CLIP", size={"shortest_edge": SIZE}, crop_size=SQUARE), t, patch_size=PATCH,
        vision_feature_select_strategy="default", num_additional_image_tokens=1)),
    "llava_next": (families.llava_next, "<image>", lambda t: T.LlavaNextProcessor(
        images("LlavaNext", size={"shortest_edge": SIZE}, crop_size=SQUARE, **TILES), t, patch_size=PATCH,
        vision_feature_select_strategy="default", num_additional_image_tokens=1)),
    "llava_onevision": (families.llava_onevision, "<image>", lambda t: T.LlavaOnevisionProcessor(
        images("LlavaOnevision", size=SQUARE, **TILES), t, Video(), num_image_tokens=16,
        vision_feature_select_strategy="full")),
    "internvl": (families.internvl, "<IMG_CONTEXT>", lambda t: T.InternVLProcessor(
        images("GotOcr2", size=SQUARE, crop_to_patches=True, max_patches=4), t, Video(), image_seq_length=4)),
    "idefics3": (lambda: families.idefics3(T.Idefics3Config), "<image>", lambda t: T.Idefics3Processor(
        images("Idefics3", size={"longest_edge": 2 * SIZE}, max_image_size={"longest_edge": SIZE}), t,
        image_seq_len=4)),
    "smolvlm": (lambda: families.idefics3(T.SmolVLMConfig), "<image>", lambda t: T.SmolVLMProcessor(
        images("SmolVLM", size={"longest_edge": 2 * SIZE}, max_image_size={"longest_edge": SIZE}), t, Video(),
        image_seq_len=4)),
    "gemma3": (families.gemma3, "<img>", lambda t: T.Gemma3Processor(
        images("Gemma3", size=SQUARE), t, image_seq_length=4)),
    "paligemma": (families.paligemma, "<image>", lambda t: T.PaliGemmaProcessor(
        images("Siglip", size=SQUARE, image_seq_length=16), t)),
    "mllama": (families.mllama, "<|image|>", lambda t: T.MllamaProcessor(images("Mllama", size=SQUARE), t)),
    "qwen2_vl": (families.qwen2_vl, "<|image_pad|>", lambda t: T.Qwen2VLProcessor(
        images("Qwen2VL", patch_size=PATCH, size=AREAS), t, Video())),
    "qwen2_5_vl": (families.qwen2_5_vl, "<|image_pad|>", lambda t: T.Qwen2_5_VLProcessor(
        images("Qwen2VL", patch_size=PATCH, size=AREAS), t, Video())),
    "qwen3_vl": (families.qwen3_vl, "<|image_pad|>", lambda t: T.Qwen3VLProcessor(
        images("Qwen2VL", patch_size=PATCH, size=AREAS), t, Video())),
    "qwen3_5": (families.qwen3_5, "<|image_pad|>", lambda t: T.Qwen3VLProcessor(
        images("Qwen2VL", patch_size=PATCH, size=AREAS), t, Video())),
    "glm4v": (families.glm4v, "<|image|>", lambda t: T.Glm4vProcessor(
        images("Glm4v", patch_size=PATCH, size=AREAS), t, Video())),
    "vipllava": (vipllava, "<image>", lambda t: T.LlavaProcessor(
        images("CLIP", size={"shortest_edge": SIZE}, crop_size=SQUARE), t, patch_size=PATCH,
        vision_feature_select_strategy="default", num_additional_image_tokens=1)),
    "idefics2": (idefics2, "<image>", lambda t: T.Idefics2Processor(
        images("Idefics2", size={"shortest_edge": SIZE, "longest_edge": 2 * SIZE}), t)),
    "aria": (aria, "<|img|>", lambda t: T.AriaProcessor(images("Aria"), t)),
    "gemma4": (gemma4, "<|image|>", lambda t: T.Gemma4Processor(
        feature_extractor=None, image_processor=images("Gemma4", max_soft_tokens=70), tokenizer=t,
        video_processor=Video())),
    "minicpmv4_6": (minicpm, "<|image_pad|>", lambda t: T.MiniCPMV4_6Processor(
        images("MiniCPMV4_6", max_slice_nums=1), Video(), t)),
    "qwen3_vl_moe": (qwen3_vl_moe, "<|image_pad|>", lambda t: T.Qwen3VLProcessor(
        images("Qwen2VL", patch_size=PATCH, size=AREAS), t, Video())),
    "glm4v_moe": (glm4v_moe, "<|image|>", lambda t: T.Glm4vProcessor(
        images("Glm4v", patch_size=PATCH, size=AREAS), t, Video())),
    "deepseek_vl": (deepseek_vl, "<image_placeholder>", lambda t: T.DeepseekVLProcessor(
        images("DeepseekVL"), t, num_image_tokens=576)),
    "deepseek_vl_hybrid": (deepseek_vl_hybrid, "<image_placeholder>", lambda t: T.DeepseekVLHybridProcessor(
        images("DeepseekVLHybrid"), t, num_image_tokens=576)),
    "glm46v": (glm46v, "<|image|>", lambda t: T.Glm46VProcessor(
        images("Glm46V", patch_size=PATCH, size=AREAS), t, Video())),
}  # fmt: skip


@pytest.fixture
def built(request, tmp_path, monkeypatch) -> tuple[object, Path]:
    """The processor of a family and a folder with its model; AutoProcessor finds the processor there."""
    monkeypatch.setattr(
        processing_utils.ProcessorMixin, "check_argument_for_proper_class", lambda self, name, value: type(value)
    )
    monkeypatch.setattr(families, "PATCH", PATCH)
    monkeypatch.setattr(families, "SIZE", SIZE)
    monkeypatch.setitem(families.TEXT, "max_position_embeddings", 4096)
    monkeypatch.setitem(families.VISION, "patch_size", PATCH)
    monkeypatch.setitem(families.VISION, "image_size", SIZE)
    monkeypatch.setitem(families.TILES, "image_grid_pinpoints", TILES["image_grid_pinpoints"])
    if request.param == "smolvlm":
        smolvlm = importlib.import_module("transformers.models.smolvlm.processing_smolvlm")
        monkeypatch.setattr(smolvlm, "num2words", lambda number: "two")  # it spells out the frames of videos
    make, mark, processor_of = FAMILIES[request.param]
    processor = processor_of(tokenizer(mark))
    shown = processor.boi_token if request.param == "gemma3" else mark
    template = TEMPLATE.removeprefix("<bos>") if request.param == "paligemma" else TEMPLATE  # the processor writes it
    processor.chat_template = template.replace("MARK", shown)
    if isinstance(getattr(processor, "video_processor", None), Video):
        parts = (processor.image_processor, processor.tokenizer)
        processor.save_pretrained = lambda folder: [part.save_pretrained(folder) for part in parts]
    config = make()
    for part in (config, config.get_text_config()):
        if hasattr(part, "vocab_size"):
            part.vocab_size = VOCABULARY
    torch.manual_seed(0)
    model = transformers.AutoModelForImageTextToText.from_config(config).eval()
    spread(model)
    model.save_pretrained(tmp_path / "model")
    plain, auto = virft.pretrained, transformers.AutoProcessor
    monkeypatch.setattr(virft, "pretrained", lambda kind, *a, **k: processor if kind is auto else plain(kind, *a, **k))
    return processor, tmp_path / "model"


def write_rows(folder: Path) -> Path:
    """Four pictures of different sizes, each with one bright square and a box around it."""
    rows = []
    for i, size in enumerate([(640, 427), (200, 300), (250, 250), (450, 200)]):
        picture, box = Image.new("RGB", size, (20, 20, 20)), (size[0] // 4, size[1] // 4, size[0] // 2, size[1] // 2)
        picture.paste("white", box)
        picture.save(folder / f"{i}.png")
        relative = [round(1000 * value / side) for value, side in zip(box, size * 2)]
        answer = f"<answer>[{{'Position': {relative}, 'Confidence': 1}}]</answer>"
        rows.append({"image": f"{i}.png", "problem": f"w1 w{i} w3", "solution": answer, "coords": 1000})
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "rows.jsonl"


def small_flags(model: Path, rows: Path) -> str:
    return (
        "--task coco --steps 2 --prompts_per_step 2 --group_size 2 --max_completion_tokens 6 --workers 0 --lr 1e-3 "
        f"--max_pixels 50176 --coordinates relative --model {model} --data {rows} --eval_data {rows}"
    )


COMPLETION = {"paligemma": families.FAMILIES["PaliGemma"].completion}
SLOW = {"deepseek_vl_hybrid"}  # its pictures of 1024 x 1024 pixels take 25 seconds


@pytest.mark.parametrize(
    "built", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in FAMILIES], indirect=True
)
def test_a_family_trains_and_answers_by_its_own_processor(built, tmp_path, signals):
    processor, model = built
    small = small_flags(model, write_rows(tmp_path))
    virft.main([*small.split(), "--out", str(tmp_path / "run")])
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2] and lines[0]["kl"] == pytest.approx(0, abs=1e-9)
    assert all(line["grad_norm"] > 0 or line["zero_variance_groups"] == 1 for line in lines)
    assert lines[0]["sampler_gap"] < 1e-4
    virft.main([*small.split(), "--out", str(tmp_path / "eval"), "--eval_only", "true"])
    answers = (tmp_path / "eval" / "predictions.jsonl").read_text().splitlines()
    assert len(answers) == 4


@pytest.mark.parametrize("built, layouts", [
    ("llava", ["sequence2", "grid4", "pip"]), ("qwen2_vl", ["sequence2", "grid4", "pip"]),
    ("internvl", ["sequence2"]), ("smolvlm", ["sequence2"]),  # these cut a collage into tiles
], indirect=["built"])  # fmt: skip
def test_a_family_builds_pairs_and_trains_on_them(built, layouts, tmp_path, signals):
    _, model = built
    write_rows(tmp_path)
    asked = [{"image": f"{i}.png", "problem": "w1 w2", "solution": f"w{i + 3}"} for i in range(4)]
    (tmp_path / "asked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
    shown = f"--model {model} --max_pixels 50176 --workers 0"
    for layout in layouts:
        flags = f"--task rows --data {tmp_path / 'asked.jsonl'} --layouts {layout} --max_completion_tokens 4 --batch 2"
        mia_dpo.main(["build", *f"{shown} {flags} --cell 112 --out {tmp_path / layout}.jsonl".split()])
        candidates = [json.loads(row) for row in (tmp_path / layout / "candidates.jsonl").read_text().splitlines()]
        assert len(candidates) == 4 and all(0 < c["ratio"] < 1 for c in candidates)
        assert all(sum(c["shares"]) == pytest.approx(1, abs=1e-3) for c in candidates)
    # Answers of random weights never end, so none becomes a pair: the second answer of each question is made up.
    made = [c | {"image": [f"{layouts[-1]}/{i}" for i in c["image"]], "rejected": "w9 w8"} for c in candidates]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in made))
    flags = f"--pairs {tmp_path / 'pairs.jsonl'} --steps 2 --prompts_per_step 2 --lr 1e-3 --out {tmp_path / 'dpo'}"
    mia_dpo.main(["train", *f"{shown} {flags}".split()])
    first, last = (json.loads(row) for row in (tmp_path / "dpo" / "metrics.jsonl").read_text().splitlines())
    assert first["margin"] == pytest.approx(0, abs=1e-4) and first["grad_norm"] > 0 and last["step"] == 2


@pytest.mark.slow
@pytest.mark.parametrize("built", ["idefics3", "gemma3", "llava_next", "paligemma", "mllama"], indirect=True)
def test_a_family_trains_from_the_command_line(built, tmp_path):
    """With the processor that is saved beside the model, in a process of its own."""
    processor, model = built
    processor.save_pretrained(model)
    command = f"virft.py {small_flags(model, write_rows(tmp_path))} --out {tmp_path / 'run'}"
    done = subprocess.run([sys.executable, *command.split()], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 2
    saved = transformers.AutoProcessor.from_pretrained(tmp_path / "run" / "model")
    assert type(saved) is type(processor)


@pytest.mark.parametrize("built", FAMILIES, indirect=True)
def test_a_prompt_is_what_the_processor_makes_of_its_template(built, tmp_path):
    processor, _ = built
    examples, _ = data.load_examples(data.TASKS["coco"], str(write_rows(tmp_path)), "train")
    encoder = data.Prompts(data.TASKS["coco"], examples, processor, "relative")
    for i in range(4):
        (picture,) = data.open_images(examples[i])
        content = [{"type": "image", "image": picture}, {"type": "text", "text": examples[i].question}]
        own = processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=True, return_dict=True,
            return_tensors="pt",
        )  # fmt: skip
        ids = encoder[0, i].inputs["input_ids"]
        assert torch.equal(ids, own["input_ids"]) and (ids == 96).sum() == 1
        assert torch.equal(encoder[0, i].inputs["pixel_values"], own["pixel_values"])


@pytest.mark.parametrize(
    "built", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in FAMILIES], indirect=True
)
def test_shared_prompts_are_exact(built, tmp_path, request, record_property):
    """Log-probabilities and gradients as of the repeated prompt, single and padded, for what the processor returns."""
    name, (processor, folder) = request.node.callspec.params["built"], built
    model = transformers.AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    examples, _ = data.load_examples(data.TASKS["coco"], str(write_rows(tmp_path)), "train")
    encoder = data.Prompts(data.TASKS["coco"], examples, processor, "relative")
    inputs = [encoder[0, i].inputs for i in (0, 1)]
    found = []
    for asked, chunk in ((inputs[:1], 1), (inputs, 3)):
        ids, rounding = families.completions(asked), 1e-5 if name in SLOW else 0.0
        found.append(families.deviations(model, asked, ids, chunk, COMPLETION.get(name), rounding))
        model.zero_grad()
    logp, gradient = map(max, zip(*found))
    assert logp < 1e-5 and gradient < 1e-5
    for figure, value in (
        ("model_type", model.config.model_type), ("logp", logp), ("gradient", gradient),
        ("shares", virft.cache_is_differentiable(model)), ("processor", type(processor.image_processor).__name__),
    ):  # fmt: skip
        record_property(figure, value)


def test_families_that_write_boxes_in_another_frame():
    """PaliGemma is refused by name, and taken when the convention is given; decimals in 0..1 are said."""
    siglip = images("Siglip", size=SQUARE)
    with pytest.raises(SystemExit, match="paligemma writes boxes as location tokens, y first.*--coordinates relative"):
        processors.inspect(siglip, "paligemma", True)
    assert processors.inspect(siglip, "paligemma", False) == []
    (note,) = processors.inspect(siglip, "llava_next", True)
    assert note.startswith("released llava_next models write boxes as decimals in 0..1")


def seen_by_the_model(images, picture: Image.Image) -> np.ndarray:
    """The red channel, [height, width], of what a processor makes of a whole picture: of tiles, the overview."""
    made = images(images=[picture], **data.PLAIN)
    pixels = np.asarray(made["pixel_values"], dtype=float)
    if "image_grid_thw" in made:  # merged blocks of 2 x 2 patches, each [channel, frame, patch, patch]
        _, rows, columns = made["image_grid_thw"][0].tolist()
        blocks = pixels.reshape(rows // 2, columns // 2, 2, 2, 3, 2, PATCH, PATCH)[:, :, :, :, 0, 0]
        return blocks.transpose(0, 2, 4, 1, 3, 5).reshape(rows * PATCH, columns * PATCH)
    if "image_position_ids" in made:  # Gemma 4: patches [patch, patch, channel] with their (column, row)
        places = made["image_position_ids"][0].tolist()
        whole = np.zeros((16 * (1 + max(y for _, y in places)), 16 * (1 + max(x for x, _ in places))))
        for patch, (x, y) in zip(pixels[0].reshape(-1, 16, 16, 3)[..., 0], places):
            if x >= 0:
                whole[16 * y : 16 * y + 16, 16 * x : 16 * x + 16] = patch
        return whole
    if "target_sizes" in made:  # MiniCPM-V: patches side by side
        rows, columns = made["target_sizes"][0].tolist()
        return pixels[0, 0].reshape(14, rows, columns, 14).transpose(1, 0, 2, 3).reshape(14 * rows, 14 * columns)
    if "aspect_ratio_ids" in made:  # Mllama: a canvas of tiles
        from transformers.models.mllama.image_processing_pil_mllama import get_all_supported_aspect_ratios

        across, down = get_all_supported_aspect_ratios(images.max_image_tiles)[int(made["aspect_ratio_ids"][0, 0]) - 1]
        tiles = pixels[0, 0, : across * down, 0].reshape(down, across, SIZE, SIZE)
        return tiles.transpose(0, 2, 1, 3).reshape(down * SIZE, across * SIZE)
    overviews = pixels[0] if pixels.ndim == 5 else pixels
    return overviews[0 if "image_sizes" in made else -1, 0]


def bright(seen: np.ndarray) -> tuple[int, int, int, int]:
    return Image.fromarray(seen > 127).getbbox()


@pytest.mark.parametrize("built", FAMILIES, indirect=True)
def test_boxes_in_0_to_1000_are_where_the_model_sees_them(built):
    """Within half a unit and half a seen pixel of the box that is asked for, in the part that shows the picture."""
    processor, _ = built
    images, size, box = processor.image_processor, (640, 427), (160, 107, 400, 300)
    data.show_whole_images(images, 50176)
    picture = Image.new("RGB", size)
    picture.paste("white", box)
    left, top, right, bottom = bright(seen_by_the_model(images, Image.new("RGB", size, "white")))
    asked = data.round_box(data.to_model(box, size, (1000, 1000)))
    x1, y1, x2, y2 = bright(seen_by_the_model(images, picture))
    across, down = 1000 / (right - left), 1000 / (bottom - top)
    found = ((x1 - left) * across, (y1 - top) * down, (x2 - left) * across, (y2 - top) * down)
    for value, wanted, unit in zip(found, asked, (across, down) * 2):
        assert abs(value - wanted) <= 0.5 + unit / 2, (found, asked)
