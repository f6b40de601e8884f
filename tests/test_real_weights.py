"""The experiment on real photographs, in small: its projector learns, its parts continue, its intervals are right."""

import json
import random
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import LlavaConfig, LlavaForConditionalGeneration
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

import data
import virft
from bench import few_shot, real_weights
from demo import shapes

ROOT = Path(__file__).resolve().parents[1]


def small_llava() -> LlavaForConditionalGeneration:
    torch.manual_seed(0)
    size = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = {"model_type": "dinov2", "image_size": 28, "patch_size": 14} | size | {"hidden_size": 16}
    text = {"model_type": "llama", "vocab_size": 64} | size
    layers = {"vision_feature_layer": -1, "vision_feature_select_strategy": "default"}  # as real_weights.assemble says
    return LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text, **layers)).eval()


def test_features_are_what_the_projector_reads(tmp_path):
    model, read = small_llava(), []
    processor = SimpleNamespace(image_processor=CLIPImageProcessorPil(size={"height": 28, "width": 28}, crop_size=28))
    model.model.multi_modal_projector.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0]))
    noise = np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "a.png")
    example = data.Example("a", (tmp_path / "a.png",), None, "rose", "rose")
    found = real_weights.features(model, processor, [example, example], crops=2)
    assert found.shape == (2, 3, 4, 16)
    pixels = processor.image_processor(images=[Image.fromarray(noise)], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        model.get_image_features(pixels, vision_feature_layer=-1, vision_feature_select_strategy="default")
    torch.testing.assert_close(found[0, :1], read[0])
    assert not torch.equal(found[0, 1], found[0, 2]) and not torch.equal(found[0, 1], found[1, 1])  # other crops


def test_the_projector_learns_classes_that_carry_over():
    """Photographs are a direction of their class plus noise; unseen ones must come to lie nearest to its name."""
    model, draws = small_llava(), torch.Generator().manual_seed(1)
    centers, names = torch.randn(6, 16, generator=draws), torch.randn(6, 24, generator=draws)

    def photographs(n: int) -> tuple[torch.Tensor, torch.Tensor]:
        classes = torch.arange(n) % 6
        noise = torch.randn(n, 3, 4, 16, generator=draws)
        return 50 + 7 * (centers[classes][:, None, None] + 0.5 * noise), classes  # far from standardized

    held_out, few = photographs(60), photographs(18)
    before = real_weights.named_rightly(model, *held_out, names)
    real_weights.train_projector(model, *few, names, steps=200)
    assert before < 0.5 and real_weights.named_rightly(model, *held_out, names) > 0.95


def test_the_standardization_is_folded_into_the_projector():
    """With no step taken, the folded projector answers as the old one did on standardized features."""
    model = small_llava()
    seen, names = 5 + 3 * torch.randn(4, 2, 4, 16), torch.randn(4, 24)
    projector = model.model.multi_modal_projector
    with torch.no_grad():
        expected = projector((seen - seen.mean((0, 1, 2))) / seen.std((0, 1, 2)))
        real_weights.train_projector(model, seen, torch.arange(4), names, steps=0)
        torch.testing.assert_close(projector(seen), expected, rtol=1e-4, atol=1e-4)


def test_crops_stay_inside_and_keep_a_third():
    image, rng = Image.new("L", (310, 224), 255), random.Random(0)
    crops = [real_weights.random_crop(image, rng) for _ in range(500)]
    assert all(crop.getextrema() == (255, 255) for crop in crops)  # Pillow adds black beyond the border
    sizes = [crop.size for crop in crops]
    areas = [w * h / (310 * 224) for w, h in sizes]
    assert max(w for w, _ in sizes) <= 310 and max(h for _, h in sizes) <= 224
    assert min(areas) > 0.3 and max(areas) <= 1 and max(areas) - min(areas) > 0.5


def test_name_embeddings_double_the_distance_from_the_mean(llava_dir):
    model = virft.load_model(str(llava_dir), torch.float32, torch.device("cpu"))
    processor = virft.pretrained(virft.transformers.AutoProcessor, str(llava_dir))
    found = real_weights.name_embeddings(model, processor, ["red disk", "blue square"])
    table = model.get_input_embeddings().weight
    rows = [table[processor.tokenizer(f" {n}")["input_ids"]].mean(0) for n in ("red disk", "blue square")]
    middle = (rows[0] + rows[1]) / 2
    torch.testing.assert_close(found, torch.stack([middle + 2 * (r - middle) for r in rows]))


def test_intervals_are_those_of_a_binomial():
    """Of 180 answers of which 60% are right: p -+ 1.96 sqrt(p (1 - p) / n), which is 0.528 to 0.672."""
    low, high = few_shot.interval(np.array([1.0] * 108 + [0.0] * 72))
    assert low == pytest.approx(0.528, abs=0.01) and high == pytest.approx(0.672, abs=0.01)


def test_a_gain_is_paired_by_photograph():
    start = [np.array([1.0, 0.0, 0.0, 0.0]), np.array([0.0, 0.0])]
    after = [np.array([1.0, 1.0, 0.0, 0.0]), np.array([1.0, 0.0])]
    line = few_shot.row("GRPO", after, start, [10.0, 12.4], 3.24)
    assert line.startswith("| GRPO | 0.500 (") and "| 0.500, 0.500 | +0.333 (+0.000 to +" in line
    assert line.endswith("| 10, 12 | 3.2 |")


@pytest.fixture
def parts(tmp_path, monkeypatch):
    """A Bench whose commands write a model, or what `leave` says, and are recorded."""
    commands, leave = [], ["model"]

    def stand_in(argv, log, threads):
        commands.append(argv)
        for name in leave:
            (Path(argv[argv.index("--out") + 1]) / name).mkdir(parents=True, exist_ok=True)
        log.touch()
        return 0, 1.5

    monkeypatch.setattr(few_shot, "to_log", stand_in)
    (tmp_path / "given").mkdir()
    (tmp_path / "given" / "model.safetensors").touch()
    return few_shot.Bench(tmp_path, tmp_path, 1), tmp_path / "given", commands, leave


def test_a_part_runs_once_and_not_with_other_flags_or_weights(parts):
    bench, model, commands, _ = parts
    out = bench.train("sft_0", model, "--steps 3", "--categories", '"a b", c')
    assert bench.train("sft_0", model, "--steps 3", "--categories", '"a b", c') == out and len(commands) == 1
    assert commands[0][-6:] == ["--steps", "3", "--save_every", "20", "--categories", '"a b", c']
    with pytest.raises(SystemExit, match="another command, or from other weights"):
        bench.train("sft_0", model, "--steps 4", "--categories", '"a b", c')
    (model / "model.safetensors").touch()
    with pytest.raises(SystemExit, match="another command, or from other weights"):
        bench.train("sft_0", model, "--steps 3", "--categories", '"a b", c')


def test_an_interrupted_part_continues_at_a_whole_checkpoint_or_begins_anew(parts):
    bench, model, commands, leave = parts
    leave[:] = ["checkpoints/step_000020.unfinished"]  # killed while it saved its first
    for _ in range(2):
        with pytest.raises(SystemExit, match="grpo_0 did not finish"):
            bench.train("grpo_0", model, "--steps 40")
        assert "--resume" not in commands[-1]
    leave[:] = ["checkpoints/step_000020"]
    with pytest.raises(SystemExit, match="grpo_0 did not finish"):
        bench.train("grpo_0", model, "--steps 40")
    leave[:] = ["model"]
    out = bench.train("grpo_0", model, "--steps 40")
    assert commands[-1][-2:] == ["--resume", "true"] and not (out / "checkpoints").exists()


@pytest.mark.parametrize(
    "splits, seeds, says",
    [
        ([{}], ["0"], "labels.json"),
        ([{"split": "train"}, {"split": "test"}], ["0", "0"], "below 1 expected"),
        ([{"split": "train"}, {"split": "test"}], ["1"], "below 1 expected"),
    ],
)
def test_photographs_without_a_split_and_seeds_without_classes_are_refused(splits, seeds, says, tmp_path):
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    rows = [{"file": "a.png", "class_name": "rose"} | split for split in splits]
    (tmp_path / "labels.json").write_text(json.dumps(rows))
    command = [
        sys.executable, ROOT / "bench" / "few_shot.py", "--model", tmp_path, "--flowers", tmp_path, "--out",
        tmp_path / "out", "--classes", "1", "--seeds", *seeds,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and says in done.stderr and not (tmp_path / "out").exists(), done.stderr


def test_what_is_said_about_two_pictures(parts):
    """Two right answers, one that names the other photograph, one that names neither."""
    bench, model, _, _ = parts
    examples = [data.Example(n, (Path(f"{n}.png"),), None, n, n) for n in ("Rose", "Tulip")]
    rows = [("rose", "right", 0.9), ("tulip", None, 0.4), ("aster", "repeated", 0.9), ("rose", "right", 0.6)]
    (bench.out / "two").mkdir()
    (bench.out / "two.jsonl").touch()
    with (bench.out / "two" / "candidates.jsonl").open("w") as file:
        for answer, dropped, ratio in rows:
            row = {"rejected": f"<answer>{answer}</answer>", "dropped": dropped, "ratio": ratio, "target": 0}
            file.write(json.dumps(row | {"image": ["Rose.png", "Tulip.png"]}) + "\n")
    found = few_shot.two_pictures(bench, model, examples)
    assert "2 of 4 answers are right, 1 name the other photograph, 1 neither; AUC 0.62" in found  # 2.5 of 4 comparisons


@pytest.mark.slow
def test_few_shot_runs_continues_and_prints_a_table(llava_dir, tmp_path):
    """Its second run finds all parts finished and prints the same table."""
    rng, rows = random.Random(0), []
    for split, count in (("train", 2), ("test", 1)):
        for color in list(shapes.COLORS)[:4]:
            for i in range(count):
                name = f"{split}_{color}_{i}.png"
                Image.new("RGB", (64, 64), (rng.randrange(256), 9, 9)).save(tmp_path / name)
                rows.append({"file": name, "class_name": color, "split": split})
    (tmp_path / "labels.json").write_text(json.dumps(rows))
    command = [
        sys.executable, ROOT / "bench" / "few_shot.py", "--model", llava_dir, "--flowers", tmp_path, "--out",
        tmp_path / "out", "--seeds", "0", "1", "--classes", "2", "--shots", "2", "--steps", "2", "--threads", "1",
        "--start_flags", few_shot.START.replace("75", "2"), few_shot.THEN.replace("30", "2"),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    lines = done.stdout.strip().splitlines()
    assert (tmp_path / "out" / "curves.png").exists()
    assert lines.pop().startswith("two photographs: ")
    assert [line.split(" | ")[0] for line in lines[-3:]] == ["| start", "| SFT", "| GRPO"], done.stdout + done.stderr
    model = tmp_path / "out" / "start" / "model" / "model.safetensors"
    made, answered = model.stat().st_mtime_ns, (tmp_path / "out" / "sft_0_eval" / "predictions.jsonl").read_text()
    assert answered.count("\n") == 2  # the photographs of its two classes
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.stdout == done.stdout and model.stat().st_mtime_ns == made
