"""Tiny models and datasets, made once per test run; nothing here needs a hub, a GPU or the committed demo model."""

import json
import os
import signal
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import pytest  # noqa: E402
import torch  # noqa: E402

import virft  # noqa: E402
from demo import shapes, warm_start  # noqa: E402

SHARED = ROOT.parent / "shared" / "data"


def shared(name: str):
    """A mark that skips, with the reason, where real test data does not lie beside the project."""
    return pytest.mark.skipif(not (SHARED / name).exists(), reason=f"../shared/data/{name} is not beside the project")


@pytest.fixture
def real_lvis(tmp_path) -> dict:
    """The annotations of 100 real images of LVIS v0.5, in tmp_path as its readers want them; images are empty files."""
    table = json.loads((SHARED / "lvis_val_100" / "lvis_val_100.json").read_text())
    for image in table["images"]:
        path = tmp_path / Path(*image["coco_url"].split("/")[-2:])
        path.parent.mkdir(exist_ok=True)
        path.touch()
    (tmp_path / "lvis_v0.5_val.json").write_text(json.dumps(table))
    return table


@pytest.fixture(scope="session")
def llava_dir(tmp_path_factory) -> Path:
    """A LLaVA-class model of random, spread-out weights with the demo's processor."""
    folder = tmp_path_factory.mktemp("llava")
    processor = warm_start.make_processor()
    model = warm_start.make_model(processor, seed=0)
    spread(model)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def spread(model: torch.nn.Module, seed: int = 0) -> None:
    """Scale matrices up: near-zero weights would make every answer alike and hide a dropped image (pitfall 28)."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and "embed" not in name and "lm_head" not in name:
                parameter.normal_(0, 1.2 / parameter[0].numel() ** 0.5)
            elif "bias" in name:
                parameter.normal_(0, 0.1)
            elif not parameter.any():
                parameter.normal_(0, 0.5)  # gates that start closed would hide what lies behind them


@pytest.fixture(scope="session")
def shapes_dir(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("shapes")
    shapes.write_split(folder, "train", 24, seed=0)
    shapes.write_split(folder, "val", 10, seed=0)
    return folder


@pytest.fixture
def make_run(llava_dir, shapes_dir, tmp_path):
    """virft.start with small settings; keyword arguments are flags."""

    def make(**flags) -> virft.Run:
        settings = {
            "data": shapes_dir, "model": llava_dir, "out": tmp_path / "run", "max_completion_tokens": 12,
            "group_size": 4, "prompts_per_step": 4, "micro_batch": 16, "steps": 2, "workers": 0, "beta": 0.04,
            "lr": 1e-3,
        } | flags  # fmt: skip
        argv = [part for name, value in settings.items() for part in (f"--{name}", str(value))]
        return virft.start(virft.parse_config(["--task", "coco", *argv]))

    return make


def first_prompts(run: virft.Run, count: int) -> list:
    """The prompts of the first step, as training takes them."""
    return [run.prompts[slot, slot] for slot in range(count)]


@pytest.fixture
def signals():
    """Restore the signal handlers that training replaces."""
    kept = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in kept.items():
        signal.signal(number, handler)
