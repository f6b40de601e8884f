"""mia_dpo.py against hand-computed tables, planted attention, pixels, and TRL where it is installed."""

import dataclasses
import hashlib
import importlib.util
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from transformers import AutoProcessor, DynamicCache
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

import data
import families
import mia_dpo
import virft
from conftest import ROOT, shared
from data import DataError, Example
from demo import shapes
from extras import collages, evaluate
from extras.collages import LAYOUTS, Question
from extras.readers.captions import read_captions
from extras.readers.pairs import read_pairs
from mia_dpo import BuildConfig
from rewards import reward_weights
from families import batch, prompts
from test_scale import launch

NONE = torch.tensor([], dtype=torch.long)

# ------------------------------------------------------------------------------------------------
# The loss.

LOSSES = [  # log pi(chosen), log pi(rejected), of the policy and of the reference; beta; margin; -log sigmoid(margin)
    ((-1.0, -2.0), (-1.0, -2.0), 0.1, 0.0, 0.6931472),  # the start: log 2
    ((-1.0, -3.0), (-1.5, -1.5), 0.1, 0.2, 0.5981389),
    ((-3.0, -1.0), (-1.5, -1.5), 0.1, -0.2, 0.7981389),
    ((-10.0, -60.0), (-20.0, -20.0), 0.5, 25.0, 1.3888e-11),
    ((-60.0, -10.0), (-20.0, -20.0), 0.5, -25.0, 25.0),
    ((-2.0, -2.0), (-4.0, -3.0), 1.0, 1.0, 0.3132617),
]


@pytest.mark.parametrize("policy, reference, beta, margin, loss", LOSSES)
def test_the_loss_is_the_hand_computed_one(policy, reference, beta, margin, loss):
    found, rewards = mia_dpo.dpo_loss(torch.tensor([policy]), torch.tensor([reference]), beta)
    assert float(rewards[0, 0] - rewards[0, 1]) == pytest.approx(margin, abs=1e-6)
    assert float(found) == pytest.approx(loss, rel=1e-4, abs=1e-12)


def test_the_gradient_raises_chosen_and_lowers_rejected_most_where_the_order_is_wrong():
    logp = torch.tensor([[-1.0, -3.0], [-3.0, -1.0]], requires_grad=True)
    mia_dpo.dpo_loss(logp, torch.full((2, 2), -2.0), 0.5)[0].sum().backward()
    weight = [0.5 / (1 + math.exp(m)) for m in (1.0, -1.0)]  # beta * sigmoid(-margin), DPO's gradient
    torch.testing.assert_close(logp.grad, torch.tensor([[-w, w] for w in weight]))


@pytest.mark.skipif(
    not importlib.util.find_spec("trl"), reason="trl is not installed: pip install --no-deps trl==1.16.0"
)
def test_the_loss_is_trls():
    """TRL's own loss function on the same log-probabilities; its trainer is a mock, whose model hands them out."""
    from trl import DPOTrainer

    torch.manual_seed(0)
    logp, logp_ref = (-10 * torch.rand(6, 2) for _ in range(2))
    accelerator = SimpleNamespace(device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x)
    trainer = mock.MagicMock(
        accelerator=accelerator, aux_loss_enabled=False, ld_alpha=None, precompute_ref_logps=True, beta=0.3,
        loss_types=["sigmoid"], loss_weights=[1.0], f_divergence_type="reverse_kl", use_weighting=False,
        label_smoothing=0.0,
    )  # fmt: skip
    ids = torch.ones(12, 2, dtype=torch.long)
    inputs = {
        "input_ids": ids, "attention_mask": ids, "completion_mask": torch.tensor([[0, 1]] * 12),
        "ref_chosen_logps": logp_ref[:, 0], "ref_rejected_logps": logp_ref[:, 1],
    }  # fmt: skip
    column = logp.T.reshape(12, 1)  # one token each: first all chosen, then all rejected

    def model(**inputs):
        zeros = torch.zeros(12, 1)
        return SimpleNamespace(
            log_probs=column,
            entropy=zeros,
            is_top1=zeros.bool(),
            sum_logits=zeros,
            mean_logits=zeros,
            logits=zeros[..., None],
        )

    theirs = DPOTrainer._compute_loss(trainer, model, inputs, False)
    assert float(theirs) == pytest.approx(float(mia_dpo.dpo_loss(logp, logp_ref, 0.3)[0].mean()), abs=1e-6)


# ------------------------------------------------------------------------------------------------
# Attention.


class PlantedAttention(nn.Module):
    """Returns the attention that it was told of, in one of its two heads thrice the other's, if attention is eager."""

    def __init__(self, config, layer_idx: int, plant: torch.Tensor):
        super().__init__()
        self.config, self.layer_idx, self.plant = config, layer_idx, plant

    def forward(self, rows: int, n: int, keys: int):
        if self.config._attn_implementation != "eager":  # fused kernels return none
            return None, None
        seen = torch.zeros(keys)
        seen[: len(self.plant)] = self.plant
        return None, torch.stack([1.5 * seen, 0.5 * seen])[None, :, None].expand(rows, -1, n, -1)


class Planted(nn.Module):
    """A model that answers `word` and EOS, each with probability 0.8, and attends to a prompt as it is told to.

    plant: the attention to each position of the prompt in layer 1, averaged over its two heads; other layers differ.
    """

    def __init__(self, plant: torch.Tensor, word: int, eos: int, vocabulary: int):
        super().__init__()
        self.word, self.eos, self.vocabulary = word, eos, vocabulary
        self.config, self.embedding = SimpleNamespace(_attn_implementation="sdpa"), nn.Embedding(1, 1)
        self.config.get_text_config = lambda: self.config
        plants = (torch.ones_like(plant), plant, torch.ones_like(plant))
        self.layers = nn.ModuleList(PlantedAttention(self.config, i, p) for i, p in enumerate(plants))

    def get_input_embeddings(self):
        return self.embedding

    def forward(self, input_ids, past_key_values=None, **other):
        rows, n = input_ids.shape
        cache = DynamicCache() if past_key_values is None else past_key_values
        cache.update(torch.zeros(rows, 1, n, 1), torch.zeros(rows, 1, n, 1), 0)
        follows = torch.where(input_ids == self.word, self.eos, self.word)
        probabilities = torch.full((rows, n, self.vocabulary), 0.2 / (self.vocabulary - 1))
        probabilities.scatter_(2, follows[..., None], 0.8)
        for layer in self.layers:
            layer(rows, n, cache.get_seq_length())
        return SimpleNamespace(logits=probabilities.log(), past_key_values=cache)


@pytest.fixture
def single(tmp_path):
    """A folder of single-image rows: rows.jsonl and pictures."""
    shapes.write_single(tmp_path / "single", "train", 12, seed=0)
    return tmp_path / "single" / "train.jsonl"


def build_command(single, model, out, *flags) -> list[str]:
    common = ["--max_completion_tokens", "6", "--workers", "0", "--cell", "56", "--batch", "4"]
    return ["--task", "rows", "--data", str(single), "--model", str(model), "--out", str(out), *common, *flags]


def answering_run(single, llava_dir, tmp_path, layout: str) -> virft.Run:
    cfg = mia_dpo.parse_build(build_command(single, llava_dir, tmp_path / "p.jsonl", "--layouts", layout))
    processor, coordinates, _ = virft.load_processor(cfg, "auto")
    examples, _ = data.load_examples(data.TASKS["rows"], str(single), "train")
    encoder = data.Prompts(data.TASKS["rows"], examples, processor, coordinates)
    return virft.build(cfg, virft.connect(cfg), encoder, {}, trains=False)


def test_the_model_that_answers_takes_a_gpus_dtypes(single, llava_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(virft, "AUTOCAST", "cpu")
    dtypes = {p.dtype for p in answering_run(single, llava_dir, tmp_path, "sequence3").model.parameters()}
    assert dtypes == {torch.bfloat16, torch.float32}


def planted_run(single, llava_dir, tmp_path, layout: str, plant_of) -> tuple[virft.Run, Question, data.Prompt]:
    """A run whose model attends as plant_of(indices of image tokens, P, target) says, and one question of a layout."""
    run = answering_run(single, llava_dir, tmp_path, layout)
    processor = run.prompts.processor
    (tmp_path / "images").mkdir()
    questions = collages.Questions(run.prompts, {layout: 1.0}, tmp_path / "images", run.cfg.cell, 0)
    _, question, prompt = questions[3]
    ids = prompt.inputs["input_ids"][0]
    places = (ids == processor.image_token_id).nonzero().squeeze(1)
    word = processor.tokenizer.convert_tokens_to_ids("red circle")
    run.model = Planted(plant_of(places, len(ids), question.target), word, int(run.eos[0]), len(processor.tokenizer))
    return run, question, prompt


def plant(places, length, weights) -> torch.Tensor:
    """Weights on the image tokens, and as much again on all text together."""
    attention = torch.full((length,), float(sum(weights)) / (length - len(places)))
    attention[places] = torch.tensor(weights)
    return attention


def test_the_ratio_of_a_sequence_is_the_planted_one(single, llava_dir, tmp_path):
    """Three images of 16 tokens: 0.01, 0.02 and 0.05 on each token; the ratio is that of the image asked about."""
    run, question, prompt = planted_run(
        single, llava_dir, tmp_path, "sequence3", lambda at, n, t: plant(at, n, [0.01] * 16 + [0.02] * 16 + [0.05] * 16)
    )
    (record,) = mia_dpo.answer_questions(run, [question], [3], [prompt])
    assert record["shares"] == pytest.approx([0.125, 0.25, 0.625], abs=1e-4)
    assert record["ratio"] == record["shares"][question.target]
    assert record["rejected"] == "red circle" and not record["truncated"]
    assert record["perplexity"] == pytest.approx(1.25, abs=1e-3)  # exp(-log 0.8) at the one position that counts


def test_the_ratio_of_a_grid_is_the_planted_one(single, llava_dir, tmp_path):
    """4 x 4 tokens in 2 x 2 cells: 1, 2, 3 and 4 hundredths on each token of cell 1 to 4."""
    weights = [0.01 * (1 + c // 2 + r // 2 * 2) for r in range(4) for c in range(4)]
    run, question, prompt = planted_run(single, llava_dir, tmp_path, "grid4", lambda at, n, t: plant(at, n, weights))
    (record,) = mia_dpo.answer_questions(run, [question], [3], [prompt])
    assert record["shares"] == pytest.approx([0.1, 0.2, 0.3, 0.4], abs=1e-4)
    assert record["ratio"] == record["shares"][question.target]


def test_the_ratio_of_a_picture_in_picture_is_the_planted_one(single, llava_dir, tmp_path):
    """4 x 4 tokens, of which the inner 2 x 2 have their centers in the center region: 0.03 there, 0.01 elsewhere."""
    weights = [0.03 if r in (1, 2) and c in (1, 2) else 0.01 for r in range(4) for c in range(4)]
    run, question, prompt = planted_run(single, llava_dir, tmp_path, "pip", lambda at, n, t: plant(at, n, weights))
    (record,) = mia_dpo.answer_questions(run, [question], [3], [prompt])
    assert record["shares"] == pytest.approx([0.5, 0.5], abs=1e-4) and record["target"] == 0


@pytest.mark.parametrize("side", [24, 30])
def test_the_center_is_the_published_16_of_24_tokens(side):
    center, around = collages.regions(LAYOUTS["pip"], side, side)
    expected = torch.zeros(side, side, dtype=torch.bool)
    expected[side // 6 : side * 5 // 6, side // 6 : side * 5 // 6] = True
    assert torch.equal(center.view(side, side), expected) and torch.equal(around, ~center)


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name.startswith("grid")])
@pytest.mark.parametrize("rows, columns", [(24, 24), (11, 17), (4, 4)])
def test_cells_share_the_whole_map_out_row_by_row(layout, rows, columns):
    cells = collages.regions(LAYOUTS[layout], rows, columns)
    assert torch.equal(cells.sum(0), torch.ones(rows * columns, dtype=torch.long))
    down, across = collages.GRIDS[LAYOUTS[layout].images]
    assert cells[0].view(rows, columns)[0, 0] and cells[-1].view(rows, columns)[-1, -1]
    assert cells[across - 1].view(rows, columns)[0, -1] and cells[-across].view(rows, columns)[-1, 0]
    if rows % down == columns % across == 0:
        assert set(cells.sum(1).tolist()) == {rows * columns // down // across}


@pytest.mark.parametrize(
    "name", ["LLaVA", "Qwen2-VL", "Qwen2.5-VL", "InternVL", "SmolVLM", "Idefics3", "Pixtral", "GLM-4V"]
)
def test_what_is_looked_at_is_what_one_whole_forward_shows(name):
    """Attention and perplexity from the shared, padded prompt against prompt and answer in one eager forward, alone."""
    model, inputs, G, C = families.model(name), prompts(name), 2, 5
    torch.manual_seed(0)
    ids = torch.randint(0, families.WORDS, (len(inputs) * G, C))
    mask = torch.arange(C) < torch.tensor([[3], [5], [1], [4]])
    with torch.no_grad():
        usual = model.config._attn_implementation
        found, perplexity = mia_dpo.look(model, batch(inputs), ids, mask, G, 1, NONE)
        assert model.config._attn_implementation == usual
        model.set_attn_implementation("eager")
        for row, answer in enumerate(ids):
            alone = dict(inputs[row // G])
            P, n = alone["input_ids"].shape[1], int(mask[row].sum())
            for key, x in alone.items():
                if x.shape[:2] == alone["input_ids"].shape and key != "input_ids":
                    fill = 1 if key == "attention_mask" else 0
                    alone[key] = torch.cat([x, torch.full((1, n), fill, dtype=x.dtype)], 1)
            alone["input_ids"] = torch.cat([alone["input_ids"], answer[None, :n]], 1)
            out = model(**alone, use_cache=False, output_attentions=True)
            expected = out.attentions[1][0, :, P - 1 : P - 1 + n, : P - 1].mean((0, 1))
            torch.testing.assert_close(found[row, -P:-1], expected, atol=1e-5, rtol=1e-4)
            top = (out.logits[0, P - 1 : P - 1 + n]).log_softmax(-1).max(-1).values
            assert float(perplexity[row]) == pytest.approx(math.exp(-float(top.mean())), rel=1e-4)
        model.set_attn_implementation(usual)


def test_a_layer_that_shows_nothing_is_an_error():
    model, inputs = families.model("LLaVA"), batch(prompts("LLaVA"))
    ids, mask = torch.ones(2, 2, dtype=torch.long), torch.ones(2, 2, dtype=torch.bool)
    with torch.no_grad(), pytest.raises(SystemExit, match="--layer 7: .* has 2 layers of attention"):
        mia_dpo.look(model, inputs, ids, mask, 1, 7, NONE)


class Patchwork:
    """A processor whose images have one token per 28 x 28 pixels."""

    image_token_id = 7

    def apply_chat_template(self, messages, tokenize):
        return "<image>" * len(messages[0]["content"])

    def __call__(self, text, images, return_tensors):
        return {"input_ids": torch.full((1, sum(w * h // 784 for w, h in (image.size for image in images))), 7)}


def test_images_are_compared_by_token_and_regions_by_sum():
    """Four tokens of 0.1 and two of 0.3: their means are as 1 to 3, their sums as 2 to 3."""
    attention, parts = (
        torch.tensor([0.1] * 4 + [0.3] * 2),
        torch.tensor([[True] * 4 + [False] * 2, [False] * 4 + [True] * 2]),
    )
    assert mia_dpo.attention_shares(attention, parts, mean=True).tolist() == pytest.approx([0.25, 0.75])
    assert mia_dpo.attention_shares(attention, parts, mean=False).tolist() == pytest.approx([0.4, 0.6])


def test_images_of_different_sizes_are_told_apart(tmp_path):
    sizes = [(280, 140), (56, 56), (140, 280)]
    for i, size in enumerate(sizes):
        Image.new("RGB", size).save(tmp_path / f"{i}.png")
    example = Example("x", tuple(tmp_path / f"{i}.png" for i in range(3)), None, "", "")
    encoder = data.Prompts(data.TASKS["rows"], [example], Patchwork(), "relative")
    parts, mean = collages.image_parts(encoder, Question(example, "sequence3", 1), None, 104)
    assert mean and parts.sum(1).tolist() == [50, 4, 50] and parts[1].nonzero().squeeze().tolist() == [50, 51, 52, 53]
    with pytest.raises(SystemExit, match="cannot be told apart"):
        collages.image_parts(encoder, Question(example, "sequence3", 1), None, 105)


def test_the_map_of_tokens_comes_from_the_grid_or_the_pixels_and_tiles_have_none():
    grid = collages.token_grid
    assert grid(None, {"image_grid_thw": torch.tensor([[1, 12, 20]])}, 60) == (6, 10)  # 2 x 2 patches a token
    assert grid(None, {"pixel_values": torch.zeros(1, 3, 336, 336)}, 576) == (24, 24)
    assert grid(None, {"pixel_values": torch.zeros(1, 3, 64, 128)}, 32) == (4, 8)
    for pixels, tokens in (
        (torch.zeros(1, 5, 3, 64, 64), 80),
        (torch.zeros(3, 3, 64, 64), 48),
        (torch.zeros(1, 3, 64, 64), 15),
    ):
        with pytest.raises(SystemExit, match="no map of the image"):
            grid(None, {"pixel_values": pixels}, tokens)


# ------------------------------------------------------------------------------------------------
# Collages.


def colored(size, color) -> Image.Image:
    return Image.new("RGB", size, color)


@pytest.mark.parametrize("count", collages.GRIDS)
def test_a_grid_has_its_cells_labels_and_margins(count):
    """448-pixel cells, margins of 40, aspect kept and centered, white between, a label above each cell only."""
    rows, columns = collages.GRIDS[count]
    colors = [(10 + 20 * i, 100, 200 - 20 * i) for i in range(count)]
    sizes = [(300, 150), (150, 300), (200, 200)] * 3
    sheet, placed = collages.grid_collage([colored(s, c) for s, c in zip(sizes, colors)])
    assert sheet.size == (columns * 488 + 40, rows * 488 + 40)
    pixels = np.asarray(sheet)
    rest = np.ones(pixels.shape[:2], dtype=bool)
    for i, (box, color, (w, h)) in enumerate(zip(placed, colors, sizes)):
        left, top = 40 + i % columns * 488, 40 + i // columns * 488
        width, height = round(448 * w / max(w, h)), round(448 * h / max(w, h))
        assert box == (
            left + (448 - width) // 2,
            top + (448 - height) // 2,
            left + (448 + width) // 2,
            top + (448 + height) // 2,
        )
        x1, y1, x2, y2 = map(int, box)
        assert (pixels[y1:y2, x1:x2] == color).all()
        label = pixels[top - 40 : top, left : left + 448]
        assert (label < 128).any(), "a label above the cell"
        assert (label[:, :100] == 255).all() and (label[:, -100:] == 255).all(), "in the middle"
        rest[y1:y2, x1:x2] = rest[top - 40 : top, left : left + 448] = False
    assert (pixels[rest] == 255).all()


def test_labels_differ_and_count_from_one():
    sheet, _ = collages.grid_collage([colored((448, 448), "white")] * 4)
    labels = [np.asarray(sheet.crop((x, y, x + 448, y + 40))) for y in (0, 488) for x in (40, 528)]
    assert len({label.tobytes() for label in labels}) == 4
    same, _ = collages.grid_collage([colored((448, 448), "white")] * 2)
    assert np.array_equal(np.asarray(same.crop((40, 0, 488, 40))), labels[0]), "Image 1 is Image 1 in every grid"


@pytest.mark.parametrize("target, background, inside", [
    ((100, 100), (400, 200), (140, 140)),  # as high as 0.7 allows
    ((1000, 100), (400, 200), (280, 28)),  # as wide
    ((10, 10), (300, 300), (210, 210)),  # a small one grows
])  # fmt: skip
def test_a_picture_in_a_picture_lies_at_the_center(target, background, inside):
    sheet, box = collages.picture_in_picture(colored(target, "red"), colored(background, "blue"))
    (w, h), (W, H) = inside, background
    x, y = (W - w) // 2, (H - h) // 2
    assert sheet.size == background and box == (x, y, x + w, y + h)
    pixels, red = np.asarray(sheet), np.zeros((H, W), dtype=bool)
    red[y : y + h, x : x + w] = True
    assert (pixels[red] == (255, 0, 0)).all() and (pixels[~red] == (0, 0, 255)).all()


def test_boxes_follow_their_image_into_the_collage():
    """A marked rectangle is found again where place_box says, to a pixel of the resizing."""
    image = colored((200, 100), "white")
    image.paste("black", (40, 20, 120, 80))
    for sheet, placed in (
        (lambda s, p: (s, p[2]))(*collages.grid_collage([colored((9, 9), "white")] * 2 + [image])),
        collages.picture_in_picture(image, colored((640, 480), "white")),
    ):
        x1, y1, x2, y2 = map(int, placed)
        dark = np.asarray(sheet.convert("L"))[y1:y2, x1:x2] < 128
        ys, xs = dark.nonzero()
        found = (x1 + xs.min(), y1 + ys.min(), x1 + xs.max() + 1, y1 + ys.max() + 1)
        assert found == pytest.approx(collages.place_box((40, 20, 120, 80), (200, 100), placed), abs=1.5)


# ------------------------------------------------------------------------------------------------
# Questions.


def test_prompts_say_which_image_is_meant():
    ask = collages.multi_image_prompt
    assert (
        ask(LAYOUTS["sequence2"], "In Image 2, ", "What is it?")
        == "Image 1: <image>\nImage 2: <image>\nIn Image 2, what is it?"
    )
    assert ask(LAYOUTS["grid9"], "In Image 9, ", "<image>\nIs it red?") == "<image>\nIn Image 9, is it red?"


def test_marks_put_images_where_they_belong():
    image, text = {"type": "image"}, lambda words: {"type": "text", "text": words}
    assert data.content_of("Image 1: <image>\nwhat?", 1) == [text("Image 1: "), image, text("\nwhat?")]
    assert data.content_of("<image><image>what?", 2) == [image, image, text("what?")]
    assert data.content_of("what?", 2) == [image, image, text("what?")]
    with pytest.raises(DataError, match="marks 1 images with <image>, there are 2"):
        data.content_of("<image>what?", 2)


def questions_of(single, tmp_path, mix, seed=0, task="rows", examples=None, coordinates="relative"):
    known = data.TASKS[task]
    examples = examples or data.load_examples(known, str(single), "train")[0]
    folder = tmp_path / f"images_{seed}"
    folder.mkdir(exist_ok=True)
    images = Qwen2VLImageProcessorPil(size={"shortest_edge": 784, "longest_edge": 10**6})
    encoder = data.Prompts(known, examples, SimpleNamespace(image_processor=images), coordinates, think=False)
    return collages.Questions(encoder, mix, folder, 56, seed)


def test_seeds_reproduce_questions_byte_for_byte(single, tmp_path):
    def made(seed, folder):
        questions = questions_of(single, folder, {name: 1.0 for name in LAYOUTS}, seed)
        composed = [questions.compose(i) for i in range(12)]
        texts = [(q.layout, q.target, q.example.question, q.example.solution) for q in composed]
        files = {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in sorted(questions.folder.iterdir())}
        return texts, files

    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
    first, again, other = made(0, tmp_path / "a"), made(0, tmp_path / "b"), made(1, tmp_path / "a")
    assert first == again and first != other and first[1], "and there were collages"
    assert not [name for name in first[1] if "unfinished" in name]


def test_the_named_image_is_the_one_the_answer_is_about(single, tmp_path):
    """In sequences the file itself; in grids its pixels, in the cell that the question names."""
    examples = data.load_examples(data.TASKS["rows"], str(single), "train")[0]
    for layout in ("sequence3", "grid4", "grid6"):
        questions = questions_of(single, tmp_path, {layout: 1.0})
        targets = set()
        for i, example in enumerate(examples):
            question = questions.compose(i)
            targets.add(question.target)
            assert f"In Image {question.target + 1}, what is" in question.example.question
            assert question.example.solution == f"<answer>{example.solution}</answer>"
            if layout == "sequence3":
                assert (
                    question.example.images[question.target] == example.images[0]
                    and len(set(question.example.images)) == 3
                )
                continue
            sheet = Image.open(question.example.images[0])
            row, column = divmod(question.target, collages.GRIDS[LAYOUTS[layout].images][1])
            x, y = 5 + column * 61, 5 + row * 61
            original = data.open_image(example.images[0]).resize((56, 56), Image.Resampling.BICUBIC)
            assert np.array_equal(np.asarray(sheet.crop((x, y + 3, x + 56, y + 56))), np.asarray(original)[3:])
        assert len(targets) > 1


def test_boxes_are_asked_for_in_the_coordinates_of_what_is_shown(shapes_dir, tmp_path):
    """A detection example in a grid: its answer's boxes lie on its shapes in the collage; no sequence moves any."""
    examples, _ = data.load_examples(data.TASKS["coco"], str(shapes_dir), "train")
    for layout in ("grid4", "pip", "sequence2"):
        questions = questions_of(None, tmp_path, {layout: 1.0}, task="coco", examples=examples)
        for i in range(4):
            question, example = questions.compose(i), examples[i]
            boxes = [box for box, _ in mia_dpo.TASKS["coco"].parse(question.example.solution)]
            target = question.target if layout == "sequence2" else 0
            sheet = data.open_image(question.example.images[target])
            assert len(boxes) == len(example.solution)
            color = np.array(shapes.COLORS[example.category.split()[0]])
            for box in boxes:
                x1, y1, x2, y2 = data.to_pixels(box, sheet.size, (1000, 1000))
                middle = np.asarray(sheet)[int(y1 + 0.7 * (y2 - y1)), int((x1 + x2) / 2)]
                assert np.abs(middle - color).max() < 40, (layout, box, middle, color)


def test_the_form_of_the_answer_is_the_one_that_the_question_asks_for(single):
    ask = collages.single_image_question
    example = Example("x", (), None, "cat", "cat", question="What animal?")
    assert ask(data.TASKS["rows"], example, (100, 100), "relative")[1] == ["cat"]
    system = "Answer as <answer>a name</answer>."
    assert ask(data.TASKS["rows"], example, (100, 100), "relative", system)[1] == ["<answer>cat</answer>"]
    known = dataclasses.replace(example, solution=["cat", "kitty"])
    assert ask(data.TASKS["rows"], known, (100, 100), "relative")[1] == ["cat", "kitty"]
    nothing = Example("x", (), (100, 100), (), "cat", question="Cats?")
    assert ask(data.TASKS["coco"], nothing, (100, 100), "relative")[1] == ["No Objects"]
    formal = dataclasses.replace(example, question="What animal? <answer>it</answer>")
    assert ask(data.TASKS["rows"], formal, (100, 100), "relative")[1] == ["<answer>cat</answer>"]
    thinking = dataclasses.replace(example, question="<think>...</think><answer>it</answer>")
    assert ask(data.TASKS["rows"], thinking, (100, 100), "relative")[1] == ["<think></think><answer>cat</answer>"]


@shared("coco_mini")
def test_real_captions_become_questions(tmp_path):
    """Real photographs of different sizes with captions made up here, as COCO lays them out."""
    real = ROOT.parent / "shared" / "data" / "coco_mini"
    instances = next(real.rglob("instances_*.json"))
    table = json.loads(instances.read_text())
    split = instances.stem.removeprefix("instances_")
    (tmp_path / "annotations").mkdir()
    (tmp_path / split).symlink_to(next(f for f in real.rglob(split) if f.is_dir()))
    captions = [
        {"id": i, "image_id": r["id"], "caption": f"Photograph {r['id']}."} for i, r in enumerate(table["images"])
    ]
    (tmp_path / "annotations" / f"captions_{split}.json").write_text(
        json.dumps({"images": table["images"], "annotations": captions})
    )
    examples, _ = read_captions(str(tmp_path), "val" if "val" in split else "train", data.Choice())
    assert len(examples) == len(table["images"])
    questions = questions_of(None, tmp_path, {"grid9": 1.0, "pip": 1.0, "sequence5": 1.0}, examples=examples)
    for i in range(6):
        question = questions.compose(i)
        assert question.example.solution == f"Photograph {examples[i].image_id}."
        assert "escribe the image in one sentence." in question.example.question
        for image in question.example.images:
            data.open_image(image)


# ------------------------------------------------------------------------------------------------
# Selection.

GOOD = {"layout": "sequence2", "ratio": 0.5, "chosen": "a red circle", "rejected": "a blue square", "perplexity": 1.5,
        "truncated": False, "number": 0, "also_right": []}  # fmt: skip


@pytest.mark.parametrize("change, dropped", [
    ({}, None),
    ({"truncated": True}, "unfinished"),
    ({"rejected": " "}, "unfinished"),
    ({"rejected": "A  Red circle"}, "right"),  # but for case and spaces
    ({"rejected": "a round red thing", "also_right": ["crimson", "A round red thing."]}, "right"),
    ({"perplexity": 1.1}, "sure"),
    ({"rejected": "a blue square " * 5}, "length"),  # 15 words for 3
    ({"rejected": "a blue square " * 4}, None),  # 4 times as long is the limit
    ({"chosen": "w " * 20, "rejected": "w " * 19 + "v"}, "alike"),  # one of 20 words
    ({"chosen": "w " * 10, "rejected": "w " * 9 + "v"}, None),  # one of ten is the limit
    ({"ratio": 0.81}, "looked right"),
    ({"ratio": 0.8}, None),
    ({"layout": "sequence3", "ratio": 0.71}, "looked right"),
    ({"layout": "sequence5", "ratio": 0.61}, "looked right"),
    ({"layout": "grid2", "ratio": 0.71}, "looked right"),
    ({"layout": "grid9", "ratio": 0.31}, "looked right"),
    ({"layout": "grid9", "ratio": 0.29}, None),
    ({"layout": "pip", "ratio": 0.81}, "looked right"),
])  # fmt: skip
def test_each_filter_drops_what_it_is_for(change, dropped):
    cfg = BuildConfig()
    assert mia_dpo.flaw(GOOD | change, cfg, mia_dpo.limits_of(cfg)) == dropped


@pytest.mark.parametrize("answer, truth, right", [
    ("A dog.", "a dog", True), ("a cat", "a dog", False),
    ("<answer>Yes.</answer>", "<answer>yes</answer>", True),
    ("It is <answer>cat</answer>", "<answer>cat</answer>", True),
    ("cat", "<answer>cat</answer>", True), ("<answer>cat</answer>", "<answer>dog</answer>", False),
    ("<answer>[{'Position': [0, 0, 100, 90], 'Confidence': 0.9}]</answer>",
     "<answer>[{'Position': [0, 0, 100, 100], 'Confidence': 1}]</answer>", True),
    ("<answer>[{'Position': [0, 0, 100, 40], 'Confidence': 1}]</answer>",
     "<answer>[{'Position': [0, 0, 100, 100], 'Confidence': 1}]</answer>", False),
    ("<answer>(0,0),(100,90)</answer>", "<answer>(0,0),(100,100)</answer>", True),
    ("<answer>(0,0),(100,40)</answer>", "<answer>(0,0),(100,100)</answer>", False),
    ("<answer>nothing</answer>", "<answer>(0,0),(100,100)</answer>", False),
    ("<answer>No Objects</answer>", "<answer>No Objects</answer>", True),
    ("<answer>[]</answer>", "<answer>No Objects</answer>", True),
    ("<answer>[{'Position': [0, 0, 9, 9], 'Confidence': 1}]</answer>", "<answer>No Objects</answer>", False),
])  # fmt: skip
def test_right_answers_are_told_as_the_rewards_tell_them(answer, truth, right):
    assert mia_dpo.is_right(answer, truth) is right


def test_limits_can_be_set_by_layout():
    cfg = BuildConfig(limits=["grid4=0.25"])
    judged = mia_dpo.select(
        [GOOD | {"layout": name, "ratio": 0.3, "number": i} for i, name in enumerate(("grid4", "grid9"))], cfg
    )
    assert [c["dropped"] for c in judged] == ["looked right", None]


@pytest.mark.parametrize("a, b, distance", [
    ("", "", 0), ("abc", "", 3), ("", "abc", 3), ("kitten", "sitting", 3), ("flaw", "lawn", 2), ("same", "same", 0),
    ("a b c".split(), "a x c d".split(), 2),
])  # fmt: skip
def test_edit_distance(a, b, distance):
    assert mia_dpo.edit_distance(a, b) == mia_dpo.edit_distance(b, a) == distance


def test_selection_by_lot_takes_as_many_of_each_layout_among_the_same_answers():
    random = np.random.default_rng(0)
    candidates = [
        GOOD
        | {
            "number": i,
            "layout": ("sequence2", "grid4", "pip")[i % 3],
            "ratio": random.random(),
            "rejected": f"a blue thing{i}",
        }
        for i in range(300)
    ]
    candidates += [GOOD | {"number": 300 + i, "rejected": "a red circle"} for i in range(50)]
    by = {how: mia_dpo.select(candidates, BuildConfig(selection=how)) for how in ("attention", "random", "none")}
    kept = {how: [c for c in rows if c["dropped"] is None] for how, rows in by.items()}
    counts = {how: {name: sum(c["layout"] == name for c in rows) for name in LAYOUTS} for how, rows in kept.items()}
    assert counts["attention"] == counts["random"] and 0 < len(kept["random"]) < len(kept["none"]) == 300
    ratios = {how: np.mean([c["ratio"] for c in rows]) for how, rows in kept.items()}
    assert ratios["attention"] < ratios["random"] - 0.05, "the lot does not look at attention"
    assert kept["random"] == [
        c for c in mia_dpo.select(candidates, BuildConfig(selection="random")) if c["dropped"] is None
    ]
    table = mia_dpo.report_selection(by["attention"], BuildConfig())
    assert table.splitlines()[-2].split()[:2] == ["all", "350"] and "looked right" in table


def test_an_answer_that_is_sampled_twice_becomes_one_pair():
    twice = [GOOD, GOOD | {"rejected": "A blue  square"}, GOOD | {"number": 1}]
    assert [c["dropped"] for c in mia_dpo.select(twice, BuildConfig())] == [None, "repeated", None]
    looked = [c | {"ratio": 0.99} for c in twice]
    assert [c["dropped"] for c in mia_dpo.select(looked, BuildConfig(selection="none"))] == [None, "repeated", None]


# ------------------------------------------------------------------------------------------------
# The commands.


def test_pairs_never_replace_the_questions(tmp_path):
    (tmp_path / "rows.jsonl").write_text("{}")
    argv = ["--data", tmp_path / "rows.jsonl", "--out", tmp_path / "rows.jsonl"]
    with pytest.raises(SystemExit, match="--out .*: must be another file than --data"):
        mia_dpo.parse_build(list(map(str, argv)))


def rows_of(file) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


ALL_PASS = ["--min_perplexity", "0", "--max_length_ratio", "1e9", "--min_edit_distance", "0", "--selection", "none"]


@pytest.fixture
def built(single, llava_dir, tmp_path):
    """Pairs of a random model, whose answers are rubbish, and therefore wrong; truncated ones too."""
    out = tmp_path / "built" / "pairs.jsonl"
    with mock.patch.dict(mia_dpo.flaw.__globals__, {"FILTERS": ("right", "looked right")}):
        mia_dpo.main(["build", *build_command(single, llava_dir, out, *ALL_PASS, "--answers", "2")])
    return out


def test_build_writes_what_it_promises(built, single):
    pairs, folder = rows_of(built), built.with_suffix("")
    assert len(pairs) == 24 and set(pairs[0]) == {
        "id",
        "image",
        "prompt",
        "chosen",
        "rejected",
        "gt",
        "layout",
        "ratio",
    }
    for pair in pairs:
        assert pair["chosen"] == pair["gt"] != pair["rejected"]
        assert all((built.parent / image).is_file() for image in pair["image"]), "relative to the file"
        assert pair["prompt"].count("<image>") == len(pair["image"]) and 0 <= pair["ratio"] <= 1
    assert len({pair["id"] for pair in pairs}) == 24
    candidates = rows_of(folder / "candidates.jsonl")
    assert len(candidates) == 24 and all(sum(c["shares"]) == pytest.approx(1, abs=1e-3) for c in candidates)
    assert "looked right" in (folder / "selection.txt").read_text()
    assert len(list((folder / "pictures").glob("*.png"))) == 12
    assert not list(built.parent.rglob("*.unfinished")) and not list(folder.glob("candidates.*.jsonl"))


def test_a_build_is_not_replaced_by_accident_and_goes_on_after_an_interruption(built, single, llava_dir, tmp_path):
    command = build_command(single, llava_dir, built, *ALL_PASS, "--answers", "2")
    with pytest.raises(SystemExit, match="must be new"):
        mia_dpo.main(["build", *command])
    folder, whole = built.with_suffix(""), rows_of(built.with_suffix("") / "candidates.jsonl")
    # As a kill leaves it: a process's own file with a line cut off, no pairs.
    for candidate in whole:
        candidate["image"] = [str(folder / image) for image in candidate["image"]]
    lines = [json.dumps({k: v for k, v in c.items() if k != "dropped"}) for c in whole[:9]]
    (folder / "candidates.0.jsonl").write_text("\n".join(lines) + '\n{"number": 4, "id": "cut o')
    (folder / "candidates.jsonl").unlink()
    built.unlink()
    answered = []
    plain = mia_dpo.answer_questions
    with mock.patch.object(mia_dpo, "answer_questions", lambda run, q, n, p: answered.extend(n) or plain(run, q, n, p)):
        mia_dpo.main(["build", *command])
    assert answered == list(range(4, 12)), "the question whose second answer was lost is asked again, none before it"
    again = rows_of(folder / "candidates.jsonl")
    assert [(c["id"], c["rejected"]) for c in again] == [(c["id"], c["rejected"]) for c in whole]
    built.unlink()
    with pytest.raises(SystemExit, match="must be new"):
        mia_dpo.main(["build", *command, "--seed", "3"])
    answered.clear()
    with mock.patch.object(mia_dpo, "answer_questions", lambda *arguments: answered.append(1)):
        mia_dpo.main(["build", *command[:-2], "--answers", "2", "--min_perplexity", "99"])  # pairs removed: select anew
    assert (
        not answered
        and rows_of(built) == []
        and {c["id"] for c in rows_of(folder / "candidates.jsonl")} == {c["id"] for c in whole}
    )
    for candidate in rows_of(folder / "candidates.jsonl"):
        assert all((folder / image).is_file() for image in candidate["image"])


def test_a_line_that_was_cut_off_is_gone_before_others_follow(tmp_path):
    """Interrupted twice: what the first left unfinished does not stand in the middle of what the second adds."""
    cfg, folder = BuildConfig(out=str(tmp_path / "p.jsonl"), answers=2), tmp_path / "p"
    assert mia_dpo.open_folder(cfg, folder, []) == []
    rows = [{"number": 0, "id": f"a/{i}", "image": [str(tmp_path / "a.png")]} for i in range(2)]
    rows.append({"number": 1, "id": "b/0", "image": []})
    for _ in range(3):
        with (folder / "candidates.0.jsonl").open("a") as file:
            file.write("".join(json.dumps(row) + "\n" for row in rows) + '{"number": 2, "id')
        assert mia_dpo.open_folder(cfg, folder, []) == rows[:2]


def test_a_first_line_that_was_cut_off_is_gone_too(tmp_path):
    cfg, folder = BuildConfig(out=str(tmp_path / "p.jsonl")), tmp_path / "p"
    mia_dpo.open_folder(cfg, folder, [])
    (folder / "candidates.0.jsonl").write_text('{"number": 0, "id')
    assert mia_dpo.open_folder(cfg, folder, []) == []
    evaluate.append_own(folder, "candidates", 0, [row := {"number": 0, "id": "a", "image": []}])
    assert evaluate.read_parts(folder, "candidates") == [row]


def test_every_accepted_name_is_right(single, tmp_path):
    examples, _ = data.load_examples(data.TASKS["rows"], str(single), "train")
    known = [dataclasses.replace(e, solution=[e.solution, "shape"]) for e in examples]
    question = questions_of(single, tmp_path, {"sequence2": 1.0}, examples=known).compose(0)
    tagged = [f"<answer>{name}</answer>" for name in known[0].solution]  # as the question asks for
    assert [question.example.solution, *question.also_right] == tagged
    assert mia_dpo.question_row(data.TASKS["rows"], question)["solution"] == [examples[0].solution, "shape"]


def test_a_limit_of_questions_is_none_of_companions(single, llava_dir, tmp_path):
    flags = ("--limit", "1", "--answers", "0", "--layouts", "grid9=1")
    mia_dpo.main(["build", *build_command(single, llava_dir, tmp_path / "p.jsonl", *flags)])
    assert len(rows_of(tmp_path / "p" / "questions.jsonl")) == 1


def test_a_template_that_opens_a_thought_is_refused():
    run = SimpleNamespace(cfg=SimpleNamespace(answers=1))
    with pytest.raises(SystemExit, match="opens <think>.*enable_thinking=false"):
        mia_dpo.answer_questions(run, [], [], [SimpleNamespace(opening="<think>")])


def test_of_two_equal_answers_the_one_that_makes_a_pair_stays():
    twins = [GOOD | {"rejected": "a cat", "ratio": 0.9}, GOOD | {"rejected": "A cat", "ratio": 0.1}]
    assert [c["dropped"] for c in mia_dpo.select(twins, BuildConfig())] == ["repeated", None]


def test_an_image_that_would_vanish_in_a_collage_is_an_error():
    with pytest.raises(DataError, match="10 x 800 pixels vanishes"):
        collages.picture_in_picture(Image.new("RGB", (10, 800)), Image.new("RGB", (800, 10)))


def test_files_of_the_user_are_neither_read_nor_deleted(tmp_path):
    evaluate.append_own(tmp_path, "candidates", 0, [{"number": 0}])
    (tmp_path / "candidates.backup.jsonl").write_text('{"number": 1}\n')
    assert evaluate.read_parts(tmp_path, "candidates") == [{"number": 0}]
    evaluate.join_parts(tmp_path, "candidates", [{"number": 0}])
    assert sorted(file.name for file in tmp_path.iterdir()) == ["candidates.backup.jsonl", "candidates.jsonl"]


def test_a_build_without_answers_may_be_corrected_and_one_of_an_older_model_not_continued(tmp_path):
    """Refused flags cost nothing; answers of a model that was trained since are not mixed with the new one's."""
    (model := tmp_path / "model").mkdir()
    (model / "model.safetensors").write_text("old")
    cfg = BuildConfig(out=str(tmp_path / "p.jsonl"), model=str(model), layer=99)
    folder, other = tmp_path / "p", dataclasses.replace(cfg, layer=1)
    mia_dpo.open_folder(cfg, folder, [])
    mia_dpo.check_folder(other, folder)
    mia_dpo.open_folder(other, folder, [])
    evaluate.append_own(folder, "candidates", 0, [{"number": 0, "id": "a", "image": []}])
    mia_dpo.check_folder(other, folder)
    with pytest.raises(SystemExit, match="must be new: an earlier build is there"):
        mia_dpo.check_folder(cfg, folder)
    os.utime(model / "model.safetensors", (begun := (folder / "config.json").stat().st_mtime + 5, begun))
    with pytest.raises(SystemExit, match="must be new: an earlier build is there"):
        mia_dpo.check_folder(other, folder)


def test_answers_to_questions_that_have_changed_are_not_continued(tmp_path):
    """A truth of rows.jsonl was corrected between two parts of a build."""
    cfg, folder = BuildConfig(out=str(tmp_path / "p.jsonl")), tmp_path / "p"
    examples = [Example(f"{i}", (tmp_path / f"{i}.png",), None, "a dog", "", question="what?") for i in range(2)]
    mia_dpo.open_folder(cfg, folder, examples)
    evaluate.append_own(folder, "candidates", 0, [{"number": 0, "id": "a", "image": []}])
    mia_dpo.open_folder(cfg, folder, examples)
    for changed in ({"solution": "a cat"}, {"question": "who?"}, {"images": (tmp_path / "2.png",)}):
        with pytest.raises(DataError, match="answers are to other questions, the data changed; another --out"):
            mia_dpo.open_folder(cfg, folder, [examples[0], dataclasses.replace(examples[1], **changed)])


# ------------------------------------------------------------------------------------------------
# --published.


def test_the_published_mix_is_that_of_the_questions():
    """31, 45 and 24 percent are about sequences, grids and pictures in pictures."""
    mix = reward_weights(mia_dpo.PUBLISHED_MIX)
    shares = dict.fromkeys(("sequence", "grid", "pip"), 0.0)
    for name, weight in mix.items():
        shares[LAYOUTS[name].kind] += 100 * weight / sum(mix.values())
    assert {kind: round(share) for kind, share in shares.items()} == {"sequence": 31, "grid": 45, "pip": 24}


def test_one_flag_sets_what_the_released_code_does(built, llava_dir, tmp_path, monkeypatch):
    cfg = mia_dpo.parse_build(["--data", "x", "--published", "true", "--out", str(tmp_path / "p.jsonl")])
    assert (cfg.max_completion_tokens, cfg.min_edit_distance, cfg.max_length_ratio) == (512, 0, math.inf)
    with pytest.raises(SystemExit, match="--max_completion_tokens 64: must be 512 with --published"):
        mia_dpo.parse_build("--data x --published true --max_completion_tokens 64 --out p.jsonl".split())
    pytest.importorskip("peft")
    command = train_command(built, llava_dir, tmp_path / "dpo", "--published", "true", "--steps", "20")
    for flag in ("--lr", "--prompts_per_step"):
        del command[(at := command.index(flag)) : at + 2]
    told = []
    monkeypatch.setattr(mia_dpo, "train_run", lambda run, **more: told.append(run.cfg))
    mia_dpo.main(command)
    assert (told[0].lora_rank, told[0].lr, told[0].gamma, told[0].prompts_per_step) == (128, 5e-5, 0.0, 64)
    assert told[0].warmup_steps == 2  # a tenth of the steps


def test_published_answers_are_greedy_to_noisy_collages(single, llava_dir, tmp_path, monkeypatch):
    """The files stay clean, the same noise comes again, and a sequence has none."""
    given = []
    monkeypatch.setattr(mia_dpo, "sample", lambda *args, **more: given.append(args[3]) or virft.sample(*args, **more))
    command = build_command(single, llava_dir, tmp_path / "p.jsonl", "--layouts", "grid4=1", "sequence2=1", "pip=1")
    del command[(at := command.index("--max_completion_tokens")) : at + 2]
    monkeypatch.setitem(mia_dpo.PUBLISHED_BUILD, "max_completion_tokens", 6)
    mia_dpo.main(["build", *command, "--published", "true"])
    assert given and all(noise is None for noise in given)
    cfg = mia_dpo.parse_build([*command, "--out", str(tmp_path / "q.jsonl")])
    processor, coordinates, _ = virft.load_processor(cfg, "auto")
    examples, _ = data.load_examples(data.TASKS["rows"], str(single), "train")
    encoder = data.Prompts(data.TASKS["rows"], examples, processor, coordinates)
    (tmp_path / "images").mkdir()
    shown = ({"grid4": 1.0, "sequence2": 1.0, "pip": 1.0}, tmp_path / "images", 56, 0)
    clean, noisy, again = (collages.Questions(encoder, *shown, noise=noise) for noise in (False, True, True))
    spread = {}
    for i in range(len(examples)):
        (_, question, a), (_, _, b), (_, _, c) = clean[i], noisy[i], again[i]
        a, b, c = (prompt.inputs["pixel_values"] for prompt in (a, b, c))
        assert torch.equal(b, c)
        spread[LAYOUTS[question.layout].kind] = float((a - b).abs().mean())
    assert spread["sequence"] == 0 and spread["grid"] > spread["pip"] > 0.05


def test_long_truths_are_dropped_as_published(tmp_path):
    cfg = BuildConfig(published=True)
    long = {"number": 0, "rejected": "a cat", "chosen": "a dog " * 86, "perplexity": 2.0, "truncated": False,
            "layout": "sequence2", "ratio": 0.1, "also_right": []}  # fmt: skip
    limits = mia_dpo.limits_of(cfg)
    assert mia_dpo.flaw(long, cfg, limits) == "long truth"
    assert mia_dpo.flaw(long | {"chosen": "a dog"}, cfg, limits) is None


def test_a_folder_that_no_build_made_is_not_touched(tmp_path):
    (tmp_path / "coco").mkdir()
    for name, text in (("photo.jpg", "x"), ("config.json", '{"model_type": "llava"}')):
        (tmp_path / "coco" / name).write_text(text)
    with pytest.raises(SystemExit, match="was not made by a build, and will not be touched"):
        mia_dpo.check_folder(BuildConfig(out=str(tmp_path / "coco.jsonl")), tmp_path / "coco")
    with pytest.raises(SystemExit, match="was not made by a build"):  # before anything is loaded
        mia_dpo.parse_build(["--data", "rows.jsonl", "--out", str(tmp_path / "coco.jsonl")])
    with pytest.raises(SystemExit, match="outside --data and --model"):
        mia_dpo.parse_build(["--data", str(tmp_path / "coco"), "--out", str(tmp_path / "coco.jsonl")])
    with pytest.raises(SystemExit, match="no file called NAME"):
        mia_dpo.parse_build(["--data", "rows.jsonl", "--out", str(tmp_path / "coco" / "photo.jpg.jsonl")])
    assert (tmp_path / "coco" / "photo.jpg").read_text() == "x"


def test_an_empty_answer_has_a_ratio_too():
    model, inputs = families.model("LLaVA"), batch(prompts("LLaVA"))
    ids, mask = torch.ones(2, 3, dtype=torch.long), torch.tensor([[False] * 3, [True, False, False]])
    with torch.no_grad():
        attention, perplexity = mia_dpo.look(model, inputs, ids, mask, 1, 1, NONE)
        first, _ = mia_dpo.look(model, inputs, ids, torch.tensor([[True, False, False]] * 2), 1, 1, NONE)
    assert torch.equal(attention, first) and perplexity.isfinite().all() and (attention.sum(1) > 0).all()


def test_two_processes_build_what_one_builds(built, single, llava_dir, tmp_path):
    out = tmp_path / "two" / "pairs.jsonl"
    launch("mia_dpo.py", 2, "build", *build_command(single, llava_dir, out, *ALL_PASS, "--answers", "2"))
    one, two = (rows_of(file.with_suffix("") / "candidates.jsonl") for file in (built, out))
    assert [(c["id"], c["rejected"], c["ratio"]) for c in one] == [
        (c["id"], c["rejected"], pytest.approx(c["ratio"], abs=2e-4)) for c in two
    ]


def train_command(pairs, model, out, *flags) -> list[str]:
    common = ["--prompts_per_step", "4", "--micro_batch", "4", "--lr", "1e-3", "--workers", "0", "--steps", "4"]
    return ["train", "--pairs", str(pairs), "--model", str(model), "--out", str(out), *common, *flags]


def test_training_raises_the_margin_and_writes_what_it_promises(built, llava_dir, tmp_path):
    out = tmp_path / "dpo"
    mia_dpo.main(train_command(built, llava_dir, out, "--steps", "12"))
    rows = rows_of(out / "metrics.jsonl")
    assert (
        len(rows) == 12
        and rows[0]["margin"] == pytest.approx(0, abs=1e-4)
        and rows[0]["dpo_loss"] == pytest.approx(math.log(2))
    )
    assert rows[-1]["margin"] > 0.05 and rows[-1]["accuracy"] > rows[0]["accuracy"]
    assert rows[-1]["cross_entropy"] < rows[0]["cross_entropy"]
    assert {"seconds/train", "seconds/reference", "grad_norm", "logp_chosen", "logp_rejected"} <= set(rows[0])
    details = rows_of(out / "rollouts.jsonl")
    assert len(details) == 48 and {"id", "margin", "logp_rejected"} <= set(details[0])
    assert (out / "report.html").exists() and "chosen: <answer>" in (out / "setup.txt").read_text()
    before, after = (load_file(folder / "model.safetensors") for folder in (llava_dir, out / "model"))
    assert any(not torch.equal(before[name], after[name]) for name in after)


def test_the_logged_numbers_are_those_of_each_answer_alone(built, llava_dir, tmp_path):
    """log pi of chosen and rejected against prompt and answer in one forward, without padding or sharing."""
    out = tmp_path / "dpo"
    mia_dpo.main(train_command(built, llava_dir, out, "--steps", "1", "--gamma", "0.5"))
    model = virft.load_model(str(llava_dir), torch.float32, torch.device("cpu"))
    processor = AutoProcessor.from_pretrained(llava_dir)
    examples = {e.id: e for e in read_pairs(built, processor, 512)[0]}
    encoder = data.Prompts(data.TASKS["rows"], [], processor, "relative")
    _, forbidden = virft.special_tokens(model, processor)
    for row in rows_of(out / "rollouts.jsonl"):
        prompt, logps = encoder.encode(examples[row["id"]]), []
        for answer in prompt.solution:
            ids = torch.tensor([processor.tokenizer(answer)["input_ids"] + [processor.tokenizer.eos_token_id]])
            with torch.no_grad():
                logp = families.alone(model, prompt.inputs, ids[0], 1.0, torch.tensor(forbidden))
            logps.append(logp.gather(1, ids.T).sum().item())
        assert [row["logp_chosen"], row["logp_rejected"]] == pytest.approx(logps, abs=1e-3)
        chosen = len(processor.tokenizer(prompt.solution[0])["input_ids"]) + 1
        assert row["loss"] == pytest.approx(math.log(2) + 0.5 * -logps[0] / chosen, abs=1e-3)


def test_gradients_do_not_depend_on_micro_batches_of_pairs(built, llava_dir, tmp_path):
    norms = []
    for size in ("1", "2", "6", "8"):
        mia_dpo.main(train_command(built, llava_dir, tmp_path / size, "--steps", "1", "--micro_batch", size))
        norms.append(rows_of(tmp_path / size / "metrics.jsonl")[0]["grad_norm"])
    assert norms == pytest.approx([norms[0]] * 4, rel=1e-4)


def weights_of(out) -> dict[str, torch.Tensor]:
    return load_file(out / "model" / "model.safetensors")


def test_a_resumed_training_is_the_uninterrupted_one(built, llava_dir, tmp_path):
    mia_dpo.main(train_command(built, llava_dir, tmp_path / "whole", "--save_every", "2"))
    checkpoint = tmp_path / "whole" / "checkpoints" / "step_000004"
    whole = weights_of(tmp_path / "whole")
    (tmp_path / "part").mkdir()
    for name in ("config.json", "metrics.jsonl", "rollouts.jsonl"):
        (tmp_path / "part" / name).write_bytes((tmp_path / "whole" / name).read_bytes())
    (tmp_path / "part" / "checkpoints").mkdir()
    checkpoint.with_name("step_000002").rename(tmp_path / "part" / "checkpoints" / "step_000002")
    mia_dpo.main(train_command(built, llava_dir, tmp_path / "part", "--save_every", "2", "--resume", "true"))
    resumed = weights_of(tmp_path / "part")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    strip = [
        {k: v for k, v in row.items() if "seconds" not in k} for row in rows_of(tmp_path / "part" / "metrics.jsonl")
    ]
    assert strip == [
        {k: v for k, v in row.items() if "seconds" not in k} for row in rows_of(tmp_path / "whole" / "metrics.jsonl")
    ]


def test_two_processes_train_as_one(built, llava_dir, tmp_path):
    flags = ("--steps", "2", "--lr", "1e-4", "--micro_batch", "2")
    mia_dpo.main(train_command(built, llava_dir, tmp_path / "one", *flags))
    launch("mia_dpo.py", 2, *train_command(built, llava_dir, tmp_path / "two", *flags))
    first, second = (rows_of(tmp_path / name / "metrics.jsonl") for name in ("one", "two"))
    for name in ("loss", "grad_norm", "margin", "logp_chosen"):
        assert [row[name] for row in first] == pytest.approx([row[name] for row in second], rel=1e-3, abs=1e-4)


def test_adapters_train_against_the_model_without_them(built, llava_dir, tmp_path):
    pytest.importorskip("peft")
    mia_dpo.main(train_command(built, llava_dir, tmp_path / "lora", "--lora_rank", "4", "--steps", "6"))
    rows = rows_of(tmp_path / "lora" / "metrics.jsonl")
    assert rows[0]["margin"] == pytest.approx(0, abs=1e-4) and rows[-1]["margin"] > rows[0]["margin"]
    assert weights_of(tmp_path / "lora").keys() == load_file(llava_dir / "model.safetensors").keys(), "merged"


# What a reader of pairs needs of a processor: the mark of an image, and how many tokens a text has.
READER = SimpleNamespace(image_token="<img_pad>", tokenizer=lambda text: {"input_ids": text.split()})


def write_pairs(folder, *rows) -> Path:
    """Pairs of one picture, which is there; what a row does not say is usual."""
    Image.new("RGB", (8, 8)).save(folder / "a.png")
    usual = {"id": "x", "image": ["a.png"], "prompt": "<image>what?", "chosen": "a dog", "rejected": "a cat"}
    lines = [row if isinstance(row, str) else json.dumps(usual | row) for row in rows]
    (folder / "pairs.jsonl").write_text("".join(line + "\n" for line in lines))
    return folder / "pairs.jsonl"


WRONG_PAIRS = [
    ("{", "not JSON"),
    ('{"id": "x"}', "chosen and rejected expected"),
    ("[1, 2]", "chosen and rejected expected"),
    ({"chosen": 3}, "chosen and rejected expected"),
    ({"image": ["gone.png"]}, "gone.png: no such image"),
    ({"image": {"bytes": "aGk="}}, "an image is the name of a file"),
    ({"image": [["a.png"]]}, "an image is the name of a file"),
    ({"image": 3}, "an image is the name of a file"),
    ({"image": []}, "one of image, image_path and images expected, found none"),
    ({"prompt": "<image> and <image>: what?"}, "marks 2 images"),
    ({"rejected": "the <image> shows a cat"}, "holds <image>, which stands for an image: take it out"),
    ({"rejected": "the <img_pad> shows a cat"}, "holds <img_pad>, which stands for an image"),
    ({"chosen": "<image-placeholder> is a dog"}, "holds <image-placeholder>"),
    ({"rejected": "word " * 1200}, "an answer has 1200 tokens; half of the model's positions are 512"),
    ({"prompt": ""}, "0 questions"),
    ({"prompt": [{"role": "user", "content": "one?"}, {"role": "user", "content": "two?"}]}, "2 questions"),
    ({"chosen": [{"role": "assistant", "content": [{"type": "image"}]}]}, "holds <image>"),
]


@pytest.mark.parametrize("row, said", WRONG_PAIRS)
def test_bad_pairs_are_named_and_left_out_where_that_is_asked_for(row, said, tmp_path):
    file = write_pairs(tmp_path, {}, row)
    with pytest.raises(DataError, match="line 2") as error:
        read_pairs(file, READER, 512)
    assert said in str(error.value)
    if row != "{":
        (example,), (note,) = read_pairs(file, READER, 512, skip_bad=True)
        assert example.id == "x" and "1 pairs skipped; first: " in note and said in note


USER, ANSWER = {"role": "user", "content": "<image>what?"}, {"role": "assistant", "content": "a dog"}


@pytest.mark.parametrize("row, question", [
    ({}, "<image>what?"),
    ({"image": "a.png", "prompt": "what?"}, "what?"),
    ({"image": "a.png", "prompt": None, "question": "what?"}, "what?"),
    ({"prompt": "<image-placeholder>\nwhat?"}, "<image>\nwhat?"),  # as published
    ({"prompt": [USER], "chosen": [ANSWER]}, "<image>what?"),
    ({"prompt": [{"from": "human", "value": "<image>what?"}]}, "<image>what?"),
    ({"prompt": None, "chosen": [USER, ANSWER], "rejected": [USER, ANSWER | {"content": "a cat"}]}, "<image>what?"),
    ({"prompt": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what?"}]}],
      "chosen": [{"role": "assistant", "content": [{"type": "text", "text": "a dog"}]}]}, "<image>\nwhat?"),
])  # fmt: skip
def test_pairs_are_read_in_the_forms_that_are_published(row, question, tmp_path):
    (example,), notes = read_pairs(write_pairs(tmp_path, row), READER, 512)
    assert (example.question, example.solution) == (question, ("a dog", "a cat")) and notes == []
    assert example.images == (tmp_path / "a.png",) and example.id == "x"


def test_published_pairs_train_as_ours_do(built, llava_dir, tmp_path):
    """The same pairs with <image-placeholder>, and as messages: the same first step, number for number."""
    rows = [row | {"image": [str((built.parent / i).resolve()) for i in row["image"]]} for row in rows_of(built)]
    as_published = [row | {"prompt": row["prompt"].replace("<image>", "<image-placeholder>")} for row in rows]
    as_messages = [
        row | {"prompt": [{"role": "user", "content": row["prompt"]}]}
        | {name: [{"role": "assistant", "content": row[name]}] for name in ("chosen", "rejected")}
        for row in rows
    ]  # fmt: skip
    steps = []
    for name, form in (("ours", rows), ("published", as_published), ("messages", as_messages)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in form))
        mia_dpo.main(train_command(tmp_path / f"{name}.jsonl", llava_dir, tmp_path / name, "--steps", "1"))
        (row,) = rows_of(tmp_path / name / "metrics.jsonl")
        steps.append({key: value for key, value in row.items() if "seconds" not in key})
    assert steps[0] == steps[1] == steps[2] and steps[0]["grad_norm"] > 0


def test_pairs_that_teach_nothing_are_left_out_and_counted(tmp_path):
    """The same answer twice but for case and marks, or an empty one."""
    same = [{"rejected": "a dog"}, {"rejected": "A dog."}, {"rejected": " "}, {"chosen": ""}, {"rejected": ""}]
    examples, (note,) = read_pairs(write_pairs(tmp_path, *same, {"id": 0}), READER, 512)
    assert [e.id for e in examples] == ["0"] and "5 pairs left out, whose answers are the same or one is empty" in note


@pytest.mark.parametrize("name", ["", "pairs.parquet"])
def test_pairs_are_a_file(name, tmp_path):
    with pytest.raises(DataError, match="must be a file of pairs, .jsonl, .json or .csv"):
        read_pairs(tmp_path / name, READER, 512)


def test_an_empty_file_of_pairs_says_why(llava_dir, tmp_path):
    (tmp_path / "pairs.jsonl").write_text("")
    with pytest.raises(SystemExit, match="no pairs; the table of `build` says"):
        mia_dpo.main(["train", "--pairs", str(tmp_path / "pairs.jsonl"), "--model", str(llava_dir)])


@pytest.mark.parametrize("flags, said", [
    ("--data x --layouts sequence7", "--layouts .* weights above 0 of sequence2"),
    ("--data x --layouts pip=-1", "--layouts .* weights above 0"),
    ("--data x --layouts pip=much", "not a number"),
    ("--task coco", "--data None: must be given"),
    ("--data x --limits grid5=0.2", "--limits .* shares, of sequence2"),
    ("--data x --task nonsense", "--task nonsense: must be one of .*captions"),
    ("--data x --selection best", "--selection best: must be one of attention, random, none"),
    ("--data x --out pairs", "--out pairs: must be a file NAME.jsonl"),
])  # fmt: skip
def test_wrong_flags_of_build_are_named(flags, said):
    with pytest.raises(SystemExit, match=said):
        mia_dpo.main(["build", *flags.split()])


@pytest.mark.parametrize("flags, said", [
    ("--beta 0", "--beta 0.0: must be above 0"), ("--gamma -1", "--gamma -1.0: must be at least 0"),
    ("--epochs 0", "--epochs 0.0: must be above 0"), ("--lr 0", "--lr 0.0: must be above 0"),
])  # fmt: skip
def test_wrong_flags_of_train_are_named(flags, said):
    with pytest.raises(SystemExit, match=said):
        mia_dpo.main(["train", *flags.split()])


def test_without_a_command_both_are_named():
    with pytest.raises(SystemExit, match="build ... makes .* train ... learns"):
        mia_dpo.main([])


def test_help_documents_every_flag():
    for command, config in (("build", mia_dpo.BuildConfig), ("train", mia_dpo.TrainConfig)):
        done = subprocess.run(
            [sys.executable, "mia_dpo.py", command, "--help"], cwd=ROOT, capture_output=True, text=True, check=True
        )
        assert all(f"--{field.name}" in done.stdout and field.metadata["help"] for field in dataclasses.fields(config))


def test_every_setting_is_read():
    """As cfg.NAME here or in what virft.py does for any method, or by its name where several go to the reader."""
    ours = (ROOT / "mia_dpo.py").read_text()
    theirs = "".join(file.read_text() for file in [ROOT / "virft.py", *(ROOT / "extras").rglob("*.py")])
    reader = re.search(r"getattr\(cfg, name\) for name in \(([^)]*)\)", ours)[1]
    for config, source in ((mia_dpo.BuildConfig, ours + theirs), (mia_dpo.TrainConfig, ours + theirs)):
        for field in dataclasses.fields(config):
            assert re.search(rf"\bcfg\.{field.name}\b", source) or f'"{field.name}"' in reader, field.name


def test_multi_image_prompts_train_under_virft(single, llava_dir, tmp_path):
    """The questions of a build as rows: images at their marks, several in one prompt, through GRPO and evaluation."""
    out = tmp_path / "q" / "pairs.jsonl"
    layouts = ["--layouts", "sequence2", "sequence3", "grid4"]
    mia_dpo.main(["build", *build_command(single, llava_dir, out, "--answers", "0", *layouts)])
    file = out.with_suffix("") / "questions.jsonl"
    examples, _ = data.load_examples(data.TASKS["rows"], str(file), "train")
    assert {len(e.images) for e in examples} == {1, 2, 3} and len(examples) == 12
    processor = AutoProcessor.from_pretrained(llava_dir)
    encoder = data.Prompts(data.TASKS["rows"], examples, processor, "relative")
    three = next(e for e in examples if len(e.images) == 3)
    shown = processor.tokenizer.decode(encoder.encode(three).inputs["input_ids"][0])
    marked = "".join(f"Image {i}: {'<image>' * 16}\n" for i in (1, 2, 3))
    assert marked + "In Image" in shown
    flags = f"--task rows --data {file} --model {llava_dir} --max_completion_tokens 6 --workers 0 --think false"
    training = "--steps 2 --prompts_per_step 4 --micro_batch 8 --group_size 4 --lr 1e-3"
    # Any rubbish earns something, so that rewards vary within groups.
    (tmp_path / "my.py").write_text("def length(completion, solution):\n    return len(completion) % 7 / 7\n")
    virft.main(
        [
            *flags.split(),
            *training.split(),
            "--rewards",
            f"{tmp_path / 'my.py'}:length",
            "--out",
            str(tmp_path / "grpo"),
        ]
    )
    before, after = load_file(llava_dir / "model.safetensors"), weights_of(tmp_path / "grpo")
    assert any(not torch.equal(before[name], after[name]) for name in after if "vision" in name), "through the images"
    virft.main([*flags.split(), "--eval_only", "true", "--out", str(tmp_path / "eval")])
    assert len(rows_of(tmp_path / "eval" / "predictions.jsonl")) == 12
