"""The benchmarks run, on CPU and small; their figures stand in the README and are not tested."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

import test_processors
import virft
from bench import family_table, gpu, smolvlm, vs_trl

ROOT = Path(__file__).resolve().parents[1]


class ImagesOnly(transformers.Qwen2VLProcessor):
    """Qwen2-VL's processor without its part for videos, which needs torchvision."""

    @classmethod
    def get_attributes(cls) -> list[str]:
        return ["image_processor", "tokenizer"]

    def __init__(self, tokenizer):
        super().__init__(Qwen2VLImageProcessorPil(), tokenizer, chat_template=gpu.CHAT_TEMPLATE)


def small(**special: int):
    """A configuration of Qwen2-VL with few layers and narrow ones."""
    text = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "vocab_size": 2000,
    }
    rope = {"rope_parameters": gpu.TEXT["rope_parameters"] | {"mrope_section": [4, 6, 6]}}
    vision = {"depth": 2, "num_heads": 2, "embed_dim": 32, "hidden_size": 64}
    return transformers.Qwen2VLConfig(text_config=gpu.TEXT | text | rope, vision_config=vision, **special)


@pytest.mark.slow
def test_the_table_of_operations_is_what_the_command_prints():
    done = subprocess.run([sys.executable, ROOT / "bench" / "flops.py"], capture_output=True, text=True)
    page = (ROOT / "docs" / "gpus.md").read_text()
    assert done.stdout.count("\n") == 14 and done.stdout in page, done.stdout + done.stderr


@pytest.mark.parametrize("name,parameters", [("Qwen2-VL-2B", 2_208_985_600), ("Qwen2.5-VL-3B", 3_754_622_976)])
def test_gpu_shapes_are_those_of_the_models(name, parameters):
    """As many parameters as the released checkpoints hold."""
    with torch.device("meta"):
        model = transformers.AutoModelForImageTextToText.from_config(
            gpu.SHAPES[name](**gpu.special_ids(gpu.make_tokenizer()))
        )
    assert sum(p.numel() for p in model.parameters()) == parameters


@pytest.mark.parametrize("side", ["virft.py", "repeated"])
def test_gpu_bench_measures_a_small_model(side, tmp_path, monkeypatch):
    """All but the GPU and TRL: a model is written, trained for a step and measured; the row of the table is whole."""
    monkeypatch.setitem(gpu.SHAPES, "Qwen2-VL-2B", small)
    monkeypatch.setattr(gpu, "SIDE", 112)
    monkeypatch.setattr(gpu, "make_processor", lambda shape, tokenizer: ImagesOnly(tokenizer))
    tokenizer = gpu.make_tokenizer()
    monkeypatch.setattr(transformers.AutoProcessor, "from_pretrained", lambda *_, **__: ImagesOnly(tokenizer))
    for changed in ("prefill", "fork"):  # the repeated side replaces them, in a process of its own
        monkeypatch.setattr(gpu.vs_trl.virft, changed, getattr(gpu.vs_trl.virft, changed))
    gpu.write_data(tmp_path / "data", 4)
    gpu.write_model("Qwen2-VL-2B", tmp_path / "model")

    class Meter(vs_trl.Meter):
        def read(self):
            return super().read() | {"busy": 0.5}

    result = gpu.measure(side, "6,2,2", 1, tmp_path, 0, Meter)
    assert result["prompt"] > 16 and result["phases"].keys() == {"sample", "reward", "reference", "train"}
    row = gpu.table_rows("Qwen2-VL-2B", "6,2,2", [{side: result, "TRL": result}]).splitlines()[0]
    assert row.startswith(f"| Qwen2-VL-2B | {result['prompt']}, 6, 2, 2 | {side} |") and row.endswith("| 1.0 |")
    assert "| 50% |" in row and len(row.split("|")) == 13
    result["phases"]["sample"] = 0.01
    row = gpu.table_rows("Qwen2-VL-2B", "6,2,2", [{side: result}])
    assert f" {6 * 2 * 2 / 0.01:,.0f} | 50% |" in row, "tokens a second: of all completions of all prompts"


def test_gpu_bench_says_what_it_needs():
    command, env = [sys.executable, ROOT / "bench" / "gpu.py"], {"CUDA_VISIBLE_DEVICES": "", "PATH": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode and "torch sees no GPU" in done.stderr


@pytest.mark.slow
def test_vs_trl_measures_our_sides():
    """The least case of our two sides, by command; TRL is not installed for tests, and asked for at once where it is
    needed.
    """
    command = [
        sys.executable, ROOT / "bench" / "vs_trl.py", "--sides", "virft.py", "repeated", "--cases", "28,4,2,2",
        "--rounds", "1", "--steps", "1",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    rows = [line for line in done.stdout.splitlines() if line.startswith("| ")]
    assert done.returncode == 0 and len(rows) == 3, done.stderr
    assert [row.split(" | ")[1] for row in rows[1:]] == ["virft.py", "repeated"]
    if not importlib.util.find_spec("trl"):
        assert "pip install trl==1.16.0" in subprocess.run(command[:2], capture_output=True, text=True).stderr


@pytest.mark.slow
def test_first_contact_takes_a_model_through_a_part(llava_dir, shapes_dir, tmp_path):
    command = [
        sys.executable, ROOT / "bench" / "first_contact.py", "--model", llava_dir, "--coco", shapes_dir,
        "--flowers", shapes_dir, "--out", tmp_path, "--only", "coco_grpo",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    row = done.stdout.strip().splitlines()[-1]
    assert row.startswith("| GRPO, detection | ") and row.count("0.") >= 5, done.stdout + done.stderr
    assert (tmp_path / "coco_grpo" / "model" / "model.safetensors").exists()


def test_real_weights_stay_out_of_the_repository():
    command = [sys.executable, ROOT / "bench" / "real_weights.py", "--out", ROOT / "runs" / "llava"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "do not belong in the repository" in done.stderr


@pytest.mark.parametrize("tiles, image_tokens", [(False, 64), (True, 17 * 64)])
def test_smolvlm_has_the_image_tokens_of_the_released_model(tiles, image_tokens, tmp_path):
    """A picture is one square, or 16 tiles and an overview, of 64 tokens each; training takes it."""
    smolvlm.write(tmp_path / "model", tiles, layers=(1, 1))
    vs_trl.shapes.write_split(tmp_path / "data", "train", 4, seed=0)
    settings = ["--model", tmp_path / "model", "--data", tmp_path / "data", "--out", tmp_path / "run", "--workers", "0"]
    run = virft.start(virft.parse_config(list(map(str, settings))))
    ids = run.prompts[0, 0].inputs["input_ids"]
    assert (ids == run.model.config.image_token_id).sum() == image_tokens


def test_the_table_of_families_has_a_row_for_each_that_passed():
    """Families of which a test failed, or which recorded no figures, have none; the worst figure of several counts."""
    recorded = {"logp": "1e-6", "gradient": "2e-6", "shares": "True", "processor": "XImageProcessorPil"}
    cases = [
        ("test_shared_prompts_are_exact[qwen2_vl]", True, recorded | {"model_type": "qwen2_vl"}),
        ("test_boxes[qwen2_vl]", True, {}),
        ("test_shared_prompts_are_exact[aria]", True, recorded | {"model_type": "aria"}),
        ("test_boxes[aria]", False, {}),
        ("test_one_prompt_equals_the_repeated_prompt[LFM2-VL-0]", True, recorded | {"shares": "False"}),
        ("test_one_prompt_equals_the_repeated_prompt[LFM2-VL-3]", True, recorded | {"logp": "3e-6", "shares": "False"}),
        ("test_boxes[gemma3]", True, {}),
    ]
    rows = family_table.table(cases)[2:]
    assert rows == [
        "| `lfm2_vl` | none: its image processor exists for torchvision only | in sampling | 3.0e-6 | 2.0e-6 | "
        "0..1000, not known | none was found |",
        "| `qwen2_vl` | `XImageProcessor` | yes | 1.0e-6 | 2.0e-6 | 0..1000 | model cards and cookbooks |",
    ]


def test_the_table_in_the_docs_has_every_family():
    page = (ROOT / "docs" / "models.md").read_text()
    lines = page.partition(family_table.BEGIN)[2].partition(family_table.END)[0].strip().splitlines()[2:]
    assert len(lines) == len(test_processors.FAMILIES) + len(family_table.BY_HAND) == 27


def test_arms_of_the_comparison_are_good_settings(tmp_path):
    spec = importlib.util.spec_from_file_location("compare", ROOT / "demo" / "compare.py")
    compare = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(compare)
    shared = f"{compare.COMMON} {compare.TRAINING} --steps 3 --out {tmp_path / 'run'}"
    parsed = {name: virft.parse_config(f"{shared} {flags}".split()) for name, flags in compare.ARMS.items() if flags}
    assert len({repr(cfg) for cfg in parsed.values()}) == len(compare.ARMS) - 1, "no two arms are the same"
    sft = parsed.pop("sft")
    assert (sft.sft, sft.steps, sft.lr) == (True, 3, 1e-3)
    assert all((cfg.steps, cfg.group_size, cfg.lr) == (3, 8, 2.5e-4) for cfg in parsed.values())
    assert compare.cell([0.5]) == "0.500" and compare.cell([0.1, 0.3, 0.2]) == "0.200 (0.100-0.300)"


def test_a_finished_arm_is_not_run_again(tmp_path):
    spec = importlib.util.spec_from_file_location("compare", ROOT / "demo" / "compare.py")
    compare = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(compare)
    (tmp_path / "figures.json").write_text('{"iou": 0.25}')
    assert compare.run_arm(tmp_path, tmp_path / "no_data", "", 0, 3) == {"iou": 0.25}
