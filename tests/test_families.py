"""Every family of vision-language models through the same code: shared prompts, sampling, training, saving.

Models are tiny and random, inputs are as the family's processor makes them; the oracle is the family's own plain
forward over one prompt and one completion. Numbers in brackets are those of "Ways to be wrong" in the README.
"""

import contextlib
import importlib.util
import json
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
import transformers
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import CONFIG_MAPPING, AutoModelForImageTextToText, StaticLayer

import data
import families
import virft
from conftest import SHARED, shared
from extras import check, hub, processors
from families import FAMILIES, alone, batch, completions, prompts, scored

NEVER = torch.tensor([-1])  # as the EOS
G, C, TEMPERATURE, FORBIDDEN = families.G, families.C, families.TEMPERATURE, families.FORBIDDEN


def score(model, inputs: list[dict], ids: torch.Tensor) -> torch.Tensor:
    return scored(model, batch(inputs), ids, TEMPERATURE, FORBIDDEN)[0]


def check_against_the_repeated_prompt(name: str, inputs: list[dict], chunk: int, record=lambda name, value: None):
    """record: pytest's record_property, for bench/family_table.py."""
    model, beside = families.model(name), FAMILIES[name].completion
    logp, gradient = families.deviations(model, inputs, completions(inputs), chunk, beside)
    assert logp < 1e-5 and gradient < 1e-5
    for figure, value in (("logp", logp), ("gradient", gradient), ("shares", virft.cache_is_differentiable(model))):
        record(figure, value)


@pytest.mark.parametrize("chunk", [0, 1, 3])
@pytest.mark.parametrize("name", FAMILIES)
def test_one_prompt_equals_the_repeated_prompt(name, chunk, record_property):
    """[1] Log-probabilities and gradients of a group, after a prompt with several images."""
    check_against_the_repeated_prompt(name, prompts(name)[1:], chunk, record_property)


@pytest.mark.parametrize("chunk", [0, 1, 3])
@pytest.mark.parametrize("name", FAMILIES)
def test_shared_prefix_equals_the_repeated_prompt(name, chunk, record_property):
    """[1, 10] The same for prompts of unequal length with unequal images, left-padded into one batch."""
    check_against_the_repeated_prompt(name, prompts(name), chunk, record_property)


@pytest.mark.parametrize("name", ["LLaVA-NeXT", "Idefics3", "GLM-4V"])
def test_repeating_prompts_gives_what_sharing_gives(name, monkeypatch):
    """The way of models that cannot share, also for such as are told their positions and have no image grids."""
    monkeypatch.setattr(virft, "cache_is_differentiable", lambda model: False)
    check_against_the_repeated_prompt(name, prompts(name), 0)


@pytest.mark.parametrize("name", FAMILIES)
def test_tokens_are_sampled_from_the_scored_distribution(name):
    """[2, 9] Each token is the one at which the oracle's cumulative distribution passes the noise that drew it.

    And scoring what was sampled gives what the oracle does: a sampler leaves nothing behind in the model.
    """
    model, inputs = families.model(name), prompts(name)
    noise = virft.sampling_noise(["a", "b"], G, C)
    with torch.no_grad():
        ids, sampled = virft.sample(model, batch(inputs), G, noise, C, NEVER, TEMPERATURE, FORBIDDEN)
        logp = score(model, inputs, ids)
        assert (sampled - logp).abs().max() < 1e-5
        for i, row in enumerate(ids):
            p = alone(model, inputs[i // G], row, TEMPERATURE, FORBIDDEN, FAMILIES[name].completion).exp()
            above = p.cumsum(1).gather(1, row[:, None]).squeeze(1)  # of the token, with it
            drawn = p.gather(1, row[:, None]).squeeze(1)
            assert (noise[i] < above + 1e-5).all() and (noise[i] > above - drawn - 1e-5).all()
            assert (logp[i] - drawn.log()).abs().max() < 1e-5
    assert len({tuple(row.tolist()) for row in ids}) == len(ids)


def growing(model, inputs: dict, noise: torch.Tensor, tokens: int, eos: torch.Tensor) -> torch.Tensor:
    """The same tokens by a cache that grows: `branch` for one token after the other, no row ever leaves."""
    prefix = virft.fork(virft.prefill(model, inputs), torch.arange(len(noise)) // G)
    ids, logits = torch.full((len(noise), tokens), int(eos[0])), prefix.logits
    ended = torch.zeros(len(noise), dtype=torch.bool)
    for t in range(tokens):
        cdf = virft.log_distribution(logits, TEMPERATURE, FORBIDDEN).double().exp().cumsum(-1)
        token = torch.searchsorted(cdf, noise[:, t, None] * cdf[:, -1:], right=True).squeeze(1)
        ids[:, t] = torch.where(ended, ids[:, t], token)
        ended |= torch.isin(token, eos)
        logits = virft.branch(model, prefix, token[:, None])[:, -1]
        prefix = prefix._replace(mask=F.pad(prefix.mask, (0, 1), value=1), position=prefix.position + 1)
    return ids


@pytest.mark.parametrize("look", [2, 16])
@pytest.mark.parametrize("name", FAMILIES)
def test_fixed_shapes_sample_the_tokens_of_a_growing_cache(name, look, monkeypatch):
    """In float64, rows ending at different times, with and without halving the batch."""
    monkeypatch.setattr(virft, "LOOK_EVERY", look)
    model, inputs, eos = families.model(name).double(), batch(prompts(name)), torch.arange(8, 24)
    inputs = {n: x.double() if x.is_floating_point() else x for n, x in inputs.items()}
    noise = virft.sampling_noise(["a", "b"], G, 20)
    with torch.no_grad():
        ids, _ = virft.sample(model, inputs, G, noise, 20, eos, TEMPERATURE, FORBIDDEN)
        expected = growing(model, inputs, noise, 20, eos)
    lengths = virft.completion_mask(expected, eos).sum(1)
    assert len(set(lengths.tolist())) > 2 and ids.shape[1] == max(2, lengths.max())
    mask = virft.completion_mask(expected, eos)[:, : ids.shape[1]]
    assert torch.equal(ids, expected[:, : ids.shape[1]].where(mask, eos[0]))


@pytest.mark.parametrize("name", ["LLaVA", "Gemma3", "Qwen3.5"])
def test_eager_attention_samples_the_same(name):
    model, inputs, noise = families.model(name), batch(prompts(name)), virft.sampling_noise(["a", "b"], G, 8)
    sampled = []
    for attention in ("sdpa", "eager"):
        model.set_attn_implementation(attention)
        with torch.no_grad():
            sampled.append(virft.sample(model, inputs, G, noise, 8, NEVER, TEMPERATURE, FORBIDDEN))
    assert torch.equal(sampled[0][0], sampled[1][0]) and (sampled[0][1] - sampled[1][1]).abs().max() < 1e-4


class NoWaiting(TorchDispatchMode):
    """Raise at every operation that would make the CPU wait for a GPU, and note where storage lies."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().partition("::")[2].partition(".")[0]
        assert name not in ("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select"), name
        # A Python number that is assigned by index becomes a tensor on the CPU, which CUDA copies and waits for.
        assert name != "index_put_" or args[2].dim() > 0, name
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", FAMILIES)
def test_nothing_waits_and_no_memory_moves_between_two_looks(name, monkeypatch):
    """Tensor.item, tolist, cpu, numpy, bool and int raise while tokens are decoded; the cache keeps its storage."""
    model, inputs, places = families.model(name), batch(prompts(name)), set()
    noise, fork, ended = virft.sampling_noise(["a", "b"], G, 10), virft.fork, virft.completion_mask
    plain, watching, forks = model.forward, contextlib.ExitStack(), []

    def forbidden(*args, **kwargs):
        raise AssertionError("waits for the device")

    def watched(prefix, rows):  # from the first token ...
        forks.append(fork(prefix, rows))
        for method in ("item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__"):
            watching.enter_context(mock.patch.object(torch.Tensor, method, forbidden))
        watching.enter_context(NoWaiting())
        return forks[-1]

    def unwatched(*args):  # ... to the last, the draws and the masks included
        watching.close()
        return ended(*args)

    def forward(**more):
        out = plain(**more)
        if forks:
            growing = [layer for layer in forks[0].cache.layers if isinstance(layer, StaticLayer)]
            places.add(tuple(x.data_ptr() for layer in growing for x in (layer.keys, layer.values)))
            assert growing
        return out

    monkeypatch.setattr(model, "forward", forward)
    monkeypatch.setattr(virft, "fork", watched)
    monkeypatch.setattr(virft, "completion_mask", unwatched)
    with watching, torch.no_grad():
        virft.sample(model, inputs, G, noise, 10, NEVER, TEMPERATURE, FORBIDDEN)
    assert len(forks) == 1
    assert len(places) == 1


@pytest.mark.parametrize("name", FAMILIES)
def test_the_image_reaches_the_answer(name):
    """[28] The first and the last image of a prompt change its log-probabilities, and those of no other prompt."""
    model, inputs = families.model(name), prompts(name)
    ids = completions(inputs)
    with torch.no_grad():
        before = score(model, inputs, ids)
        for image in (0, -1):
            pixels = inputs[1]["pixel_values"].clone()
            pixels.squeeze(0)[image].neg_()  # one image of several, or one patch
            change = (score(model, [inputs[0], inputs[1] | {"pixel_values": pixels}], ids) - before).abs()
            assert change[G:].max() > 1e-3
            assert change[:G].max() < 1e-5


@pytest.mark.parametrize("name", FAMILIES)
def test_a_prompt_is_encoded_once(name):
    """Counted in tokens that are embedded: the prompt once for G completions, in scoring where the cache allows."""
    model, inputs = families.model(name), prompts(name)[1:]
    P, embedded = inputs[0]["input_ids"].shape[1], []
    model.get_input_embeddings().register_forward_hook(lambda module, args, out: embedded.append(args[0].numel()))
    with torch.no_grad():
        virft.sample(model, batch(inputs), G, None, C, NEVER, TEMPERATURE, FORBIDDEN)
        assert sum(embedded) == P + G * (C - 1)
        embedded.clear()
        score(model, inputs, completions(inputs))
    assert virft.cache_is_differentiable(model) == FAMILIES[name].shares
    assert sum(embedded) == (P + G * (C - 1) if FAMILIES[name].shares else G * (P + C))


@pytest.mark.parametrize("name", FAMILIES)
def test_two_steps_change_every_parameter_that_has_a_path_to_the_loss(name):
    """Those without one keep no gradient, and AdamW leaves them alone."""
    model, inputs = families.model(name), prompts(name)[1:]
    ids, advantages = completions(inputs), torch.tensor([1.0, -0.5, -0.5])
    logp = score(model, inputs, ids)
    logp.sum().backward()
    unreached = {name for name, p in model.named_parameters() if p.grad is None}
    model.zero_grad()
    before = {name: p.clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    gains = []
    for _ in range(2):
        logp = score(model, inputs, ids)
        weights, mask = torch.full_like(logp, 1 / logp.numel()), torch.ones_like(logp).bool()
        virft.grpo_loss(logp, logp.detach(), None, advantages, mask, weights, (0.2, 0.2), 0.0)[0].backward()
        gains.append((weights * logp.detach() * advantages[:, None]).sum())
        optimizer.step()
        optimizer.zero_grad()
    assert {name for name, p in model.named_parameters() if torch.equal(p, before[name])} == unreached
    assert gains[1] > gains[0], "what was good became likelier than what was bad"


@pytest.mark.parametrize("name", FAMILIES)
def test_a_saved_model_scores_alike(name, tmp_path):
    model, inputs = families.model(name), prompts(name)[1:]
    ids = completions(inputs)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path, dtype=torch.float32).eval()
    with torch.no_grad():  # equal but for rounding, which depends on where the weights lie in memory
        assert (score(loaded, inputs, ids) - score(model, inputs, ids)).abs().max() < 1e-6
    assert type(loaded) is type(model) and loaded.config.get_text_config().use_cache


@pytest.mark.parametrize("name", FAMILIES)
def test_placeholders_are_forbidden_where_the_model_could_say_them(name):
    """[20] A cross-attending family has an embedding for its placeholder, but no logit: nothing is to be left out."""
    model, inputs = families.model(name), prompts(name)
    tokenizer = SimpleNamespace(eos_token_id=families.EOS)
    processor = SimpleNamespace(tokenizer=tokenizer, apply_chat_template=lambda turns, tokenize: "")
    eos, forbidden = virft.special_tokens(model, processor)
    with torch.no_grad():
        logits = model(**inputs[0]).logits[0, -1]
    placeholders = set(torch.cat([each["input_ids"][0] for each in inputs]).tolist()) - set(range(families.WORDS))
    assert eos == [families.EOS]
    assert model.config.image_token_id in placeholders
    assert (model.config.image_token_id in forbidden) == (model.config.image_token_id < len(logits))
    assert virft.log_distribution(logits, 1.0, torch.tensor(forbidden, dtype=torch.long)).exp().sum().item() == (
        pytest.approx(1.0)
    )


# ------------------------------------------------------------------------------------------------
# Processors.

SQUARE = {"height": 336, "width": 336}
PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
# Class and settings of released checkpoints, and the size that a model sees of a 640 x 427 image; None: it sees tiles,
# or the processor does not tell.
IMAGE_PROCESSORS = {
    "Qwen2-VL": ("Qwen2VL", {}, (644, 420)),
    "GLM-4V": ("Glm4v", {}, (644, 420)),
    "LLaVA": ("CLIP", {"size": {"shortest_edge": 336}, "crop_size": SQUARE}, (336, 336)),
    "LLaVA-NeXT": (
        "LlavaNext",
        {"size": {"shortest_edge": 336}, "crop_size": SQUARE, "image_grid_pinpoints": PINPOINTS},
        None,
    ),
    "LLaVA-NeXT, class defaults": ("LlavaNext", {}, None),
    "LLaVA-OneVision": ("LlavaOnevision", {}, None),
    "InternVL": ("GotOcr2", {"size": {"height": 448, "width": 448}, "crop_to_patches": True}, None),
    "Gemma3": ("Gemma3", {"size": {"height": 896, "width": 896}}, (896, 896)),
    "PaliGemma": ("Siglip", {"size": {"height": 224, "width": 224}}, (224, 224)),
    "Mllama": ("Mllama", {"size": {"height": 560, "width": 560}}, None),
    "Qwen3-VL": ("Qwen2VL", {"patch_size": 16}, (640, 416)),
    "GLM-4.6V": ("Glm46V", {}, (644, 420)),
    "Gemma4": ("Gemma4", {}, None),
    "Idefics2": ("Idefics2", {}, None),
    "Idefics3": ("Idefics3", {}, None),
    "SmolVLM": ("SmolVLM", {}, None),
    "Pixtral": ("Pixtral", {}, None),
    "Aria": ("Aria", {}, None),
    "DeepSeek-VL": ("DeepseekVL", {}, None),
    "MiniCPM-V 4.6": ("MiniCPMV4_6", {}, None),
    "Chameleon": ("Chameleon", {}, (512, 512)),
}


@pytest.mark.parametrize("name", IMAGE_PROCESSORS)
def test_real_image_processors_show_whole_images(name):
    """With the classes that need no torchvision."""
    family, settings, size = IMAGE_PROCESSORS[name]
    processor = getattr(transformers, f"{family}ImageProcessorPil")(**settings)
    data.show_whole_images(processor, 401408)
    assert processors.lost_borders(processor) == []
    if size:
        assert data.seen_size(processor, (640, 427)) == size
    else:
        with pytest.raises(data.DataError, match="--coordinates relative"):
            data.seen_size(processor, (640, 427))


MISSING = {  # what an ImportError of transformers says, remedy
    "\nQwen2VLVideoProcessor requires the Torchvision library but it was not found in your environment. Check\n": (
        "pip install torchvision"
    ),
    "Package `num2words` is required to run SmolVLM processor. Install it with `pip install num2words`.": (
        "pip install num2words"
    ),
    "\nX requires the OpenCV library but it was not found in your environment. You can install it with:\n"
    "```\npip install opencv-python\n```": "pip install opencv-python",
    "No module named 'timm'": "pip install timm",
    "X needs\n something else": "X needs something else",
}


@pytest.mark.parametrize("error, remedy", MISSING.items())
def test_a_missing_package_is_named_in_one_line(error, remedy):
    with pytest.raises(SystemExit) as stopped, hub.loading("model", "name"):
        raise ImportError(error)
    assert str(stopped.value) == f"model name needs a package that is not installed: {remedy}"


@shared("qwen2_5_vl_processor")
@pytest.mark.skipif(importlib.util.find_spec("torchvision") is not None, reason="torchvision is installed")
def test_the_real_processor_without_torchvision_names_it():
    with pytest.raises(SystemExit, match=r"^model .+ needs a package that is not installed: pip install torchvision$"):
        settings = SimpleNamespace(model=str(SHARED / "qwen2_5_vl_processor"), task="coco")
        virft.load_processor(settings, "auto")


@shared("qwen2_5_vl_processor")
def test_the_real_qwen2_5_vl_processor_and_configuration(tmp_path):
    """Its template, tokenizer, image processor and token ids, with a model of its vocabulary made tiny."""
    pytest.importorskip("torchvision", reason="transformers builds Qwen-VL's processors only with torchvision")
    folder = SHARED / "qwen2_5_vl_processor"
    settings = SimpleNamespace(model=str(folder), task="coco", max_pixels=401408, processor_options=[])
    processor, coordinates, _ = virft.load_processor(settings, "auto")
    assert coordinates == "pixels"

    Image.effect_noise((640, 427), 64).convert("RGB").save(tmp_path / "noise.png")
    examples = check.questions(data.TASKS["coco"], tmp_path / "noise.png", "dog, frisbee and its thrower")
    asked = data.Prompts(data.TASKS["coco"], examples, processor, coordinates)
    inputs = [asked[0, i].inputs for i in range(2)]
    assert asked[0, 0].target == (644, 420) and "644" in processor.tokenizer.decode(inputs[0]["input_ids"][0])
    assert inputs[0]["image_grid_thw"].tolist() == [[1, 30, 46]]

    settings = json.loads((folder / "config.json").read_text())
    settings |= {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    settings |= {"num_key_value_heads": 2, "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}}
    settings["vision_config"] |= {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2}
    settings["vision_config"] |= {"out_hidden_size": 64, "fullatt_block_indexes": [1]}
    torch.manual_seed(0)
    config = CONFIG_MAPPING[settings["model_type"]].from_dict(settings)
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32).eval()
    eos, forbidden = map(torch.tensor, virft.special_tokens(model, processor))
    assert processor.tokenizer.convert_ids_to_tokens(eos.tolist()) == ["<|im_end|>"]
    assert "<|image_pad|>" in processor.tokenizer.convert_ids_to_tokens(forbidden.tolist())
    with torch.no_grad():
        noise = virft.sampling_noise(["a", "b"], 2, C)
        ids, _ = virft.sample(model, batch(inputs), 2, noise, C, eos, 1.0, forbidden)
        logp = scored(model, batch(inputs), ids, 1.0, forbidden)[0]
        for i, row in enumerate(ids):
            expected = alone(model, inputs[i // 2], row, 1.0, forbidden).gather(1, row[:, None]).squeeze(1)
            assert (logp[i] - expected).abs().max() < 1e-5
