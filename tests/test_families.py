"""Every family of vision-language models through the same code: shared prompts, sampling, training, saving.

Models are tiny and random, inputs are as the family's processor makes them; the oracle is the family's own plain
forward over one prompt and one completion. Numbers in brackets are those of "Ways to be wrong" in the README.
"""

import importlib.util
import json
from types import SimpleNamespace

import pytest
import torch
import transformers
from PIL import Image
from transformers import CONFIG_MAPPING, AutoModelForImageTextToText

import data
import families
import models
import virft
from conftest import SHARED, shared
from families import FAMILIES, alone, batch, gradients, prompts

FORBIDDEN = torch.tensor([5, 17, *range(families.WORDS, families.TEXT["vocab_size"])])  # with all placeholders
NEVER = torch.tensor([-1])  # as the EOS
G, C, TEMPERATURE = 3, 6, 0.7


def oracle(name: str, model, inputs: list[dict], ids: torch.Tensor) -> torch.Tensor:
    """Log-probabilities of the completions ids [B * G, C], each alone."""
    return torch.stack(
        [
            alone(model, inputs[i // G], row, TEMPERATURE, FORBIDDEN, FAMILIES[name].completion)
            .gather(1, row[:, None])
            .squeeze(1)
            for i, row in enumerate(ids)
        ]
    )


def completions(inputs: list[dict], seed: int = 3) -> torch.Tensor:
    ids = torch.randint(0, families.WORDS, (len(inputs) * G, C), generator=torch.Generator().manual_seed(seed))
    return ids.masked_fill(torch.isin(ids, FORBIDDEN), 1)


def score(model, inputs: list[dict], ids: torch.Tensor) -> torch.Tensor:
    return virft.CompletionLogps(model)(batch(inputs), ids, G, TEMPERATURE, FORBIDDEN)[0]


def check_against_the_repeated_prompt(name: str, inputs: list[dict]) -> None:
    model, ids = families.model(name), completions(inputs)
    weights = torch.randn(ids.shape)  # distinguishes every row and token: a swapped pair would show
    logp, entropy = virft.CompletionLogps(model)(batch(inputs), ids, G, TEMPERATURE, FORBIDDEN)
    (logp * weights).sum().backward()
    found = gradients(model)
    model.zero_grad()
    expected = oracle(name, model, inputs, ids)
    (expected * weights).sum().backward()
    assert (logp - expected).abs().max() < 1e-5
    assert logp.dtype == torch.float32 and (logp <= 0).all() and (entropy > 0).all()
    assert (found - gradients(model)).norm() / found.norm() < 1e-5


@pytest.mark.parametrize("name", FAMILIES)
def test_one_prompt_equals_the_repeated_prompt(name):
    """[1] Log-probabilities and gradients of a group, behind a prompt with several images."""
    check_against_the_repeated_prompt(name, prompts(name)[1:])


@pytest.mark.parametrize("name", FAMILIES)
def test_shared_prefix_equals_the_repeated_prompt(name):
    """[1, 10] The same for prompts of unequal length with unequal images, left-padded into one batch."""
    check_against_the_repeated_prompt(name, prompts(name))


@pytest.mark.parametrize("name", ["LLaVA-NeXT", "Idefics3", "GLM-4V"])
def test_repeating_prompts_gives_what_sharing_gives(name, monkeypatch):
    """The way of models that cannot share, also for such as are told their positions and have no image grids."""
    monkeypatch.setattr(virft, "shares_prompt", lambda model: False)
    check_against_the_repeated_prompt(name, prompts(name))


@pytest.mark.parametrize("name", FAMILIES)
def test_tokens_are_sampled_from_the_scored_distribution(name):
    """[2, 9] Each token is the one at which the oracle's cumulative distribution passes the noise that drew it.

    And scoring what was sampled gives what the oracle does: a sampler leaves nothing behind in the model.
    """
    model, inputs = families.model(name), prompts(name)
    noise = virft.sampling_noise(["a", "b"], G, C)
    with torch.no_grad():
        ids = virft.sample(model, batch(inputs), G, noise, C, NEVER, TEMPERATURE, FORBIDDEN)
        logp = score(model, inputs, ids)
        for i, row in enumerate(ids):
            p = alone(model, inputs[i // G], row, TEMPERATURE, FORBIDDEN, FAMILIES[name].completion).exp()
            above = p.cumsum(1).gather(1, row[:, None]).squeeze(1)  # of the token, with it
            drawn = p.gather(1, row[:, None]).squeeze(1)
            assert (noise[i] < above + 1e-5).all() and (noise[i] > above - drawn - 1e-5).all()
            assert (logp[i] - drawn.log()).abs().max() < 1e-5
    assert len({tuple(row.tolist()) for row in ids}) == len(ids)


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
    assert virft.shares_prompt(model) == FAMILIES[name].shares
    assert sum(embedded) == (P + G * (C - 1) if FAMILIES[name].shares else G * (P + C))


@pytest.mark.parametrize("name", FAMILIES)
def test_two_steps_change_every_parameter_that_has_a_path_to_the_loss(name):
    """Those without are found by walking the graph; the oracle is what backward leaves without a gradient."""
    model, inputs = families.model(name), prompts(name)[1:]
    ids, advantages = completions(inputs), torch.tensor([1.0, -0.5, -0.5])
    logp = score(model, inputs, ids)
    unreached = models.unreachable(model, logp)
    logp.sum().backward()
    assert set(unreached) == {name for name, p in model.named_parameters() if p.grad is None}
    model.zero_grad()
    for parameter in unreached.values():
        parameter.requires_grad_(False)
    before = {name: p.clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.0)
    gains = []
    for _ in range(2):
        logp = score(model, inputs, ids)
        weights = torch.full_like(logp, 1 / logp.numel())
        loss, _, _ = virft.grpo_loss(logp, logp.detach(), None, advantages, weights, 0.2, 0.2, 0.0)
        loss.backward()
        gains.append((weights * logp.detach() * advantages[:, None]).sum())
        optimizer.step()
        optimizer.zero_grad()
    assert {name for name, p in model.named_parameters() if torch.equal(p, before[name])} == set(unreached)
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
    processor = SimpleNamespace(tokenizer=SimpleNamespace(eos_token_id=families.EOS))
    eos, forbidden = models.special_tokens(model, processor)
    with torch.no_grad():
        logits = model(**inputs[0]).logits[0, -1]
    placeholders = set(torch.cat([each["input_ids"][0] for each in inputs]).tolist()) - set(range(families.WORDS))
    assert eos == [families.EOS]
    assert model.config.image_token_id in placeholders
    assert (model.config.image_token_id in forbidden) == (model.config.image_token_id < len(logits))
    assert virft.log_distribution(logits, 1.0, torch.tensor(forbidden, dtype=torch.long)).exp().sum().item() == (
        pytest.approx(1.0)
    )


def test_a_model_that_cannot_share_says_so_once(make_run, monkeypatch):
    run, line = make_run(), "repeated for each completion in scoring and training"
    assert line not in virft.describe(run)
    monkeypatch.setattr(virft, "shares_prompt", lambda model: False)
    assert virft.describe(run).count(line) == 1


# ------------------------------------------------------------------------------------------------
# Processors.

SQUARE = {"height": 336, "width": 336}
PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
IMAGE_PROCESSORS = {  # class and settings of released checkpoints, and the size that a 640 x 427 image gets
    "Qwen2-VL": ("Qwen2VL", {}, (644, 420)),
    "GLM-4V": ("Glm4v", {}, (644, 420)),
    "LLaVA": ("CLIP", {"size": {"shortest_edge": 336}, "crop_size": SQUARE}, (336, 336)),
    "LLaVA-NeXT": (
        "LlavaNext",
        {"size": {"shortest_edge": 336}, "crop_size": SQUARE, "image_grid_pinpoints": PINPOINTS},
        (336, 336),
    ),
    "LLaVA-OneVision": ("LlavaOnevision", {}, (384, 384)),
    "InternVL": ("GotOcr2", {"size": {"height": 448, "width": 448}, "crop_to_patches": True}, (448, 448)),
    "Gemma3": ("Gemma3", {"size": {"height": 896, "width": 896}}, (896, 896)),
    "PaliGemma": ("Siglip", {"size": {"height": 224, "width": 224}}, (224, 224)),
    "Mllama": ("Mllama", {"size": {"height": 560, "width": 560}}, (560, 560)),
}


@pytest.mark.parametrize("name", IMAGE_PROCESSORS)
def test_real_image_processors_leave_fitted_images_as_they_are(name):
    """With the classes that need no torchvision."""
    family, settings, size = IMAGE_PROCESSORS[name]
    processor = getattr(transformers, f"{family}ImageProcessorPil")(**settings)
    fit = data.image_fit(processor, 401408, 3136)
    data.check_fit(processor, fit)
    assert fit.size(640, 427) == size


MISSING = {  # what an ImportError of transformers says, remedy
    "\nQwen2VLVideoProcessor requires the Torchvision library but it was not found in your environment. Check\n": "pip install torchvision",
    "Package `num2words` is required to run SmolVLM processor. Install it with `pip install num2words`.": "pip install num2words",
    "\nX requires the OpenCV library but it was not found in your environment. You can install it with:\n"
    "```\npip install opencv-python\n```": "pip install opencv-python",
    "No module named 'timm'": "pip install timm",
    "X needs\n something else": "X needs something else",
}


@pytest.mark.parametrize("error, remedy", MISSING.items())
def test_a_missing_package_is_named_in_one_line(error, remedy):
    with pytest.raises(SystemExit) as stopped, models.loading("model", "name"):
        raise ImportError(error)
    assert str(stopped.value) == f"model name needs a package that is not installed: {remedy}"


@shared("qwen2_5_vl_processor")
@pytest.mark.parametrize("name, expected", [("LLaVA", "flash_attention_2"), ("Mllama", "sdpa")])
def test_flash_attention_is_asked_only_of_families_that_have_it(name, expected, tmp_path, monkeypatch):
    families.model(name).save_pretrained(tmp_path)
    asked = []

    def from_pretrained(*_, attn_implementation, **__):
        asked.append(attn_implementation)
        raise SystemExit

    monkeypatch.setattr(models, "is_flash_attn_2_available", lambda: True)
    monkeypatch.setattr(models.AutoModelForImageTextToText, "from_pretrained", from_pretrained)
    with pytest.raises(SystemExit):
        models.load_model(str(tmp_path), None, torch.bfloat16, torch.device("cuda"))
    assert asked == [expected]


@pytest.mark.skipif(importlib.util.find_spec("torchvision") is not None, reason="torchvision is installed")
def test_the_real_processor_without_torchvision_names_it():
    with pytest.raises(SystemExit, match=r"^model .+ needs a package that is not installed: pip install torchvision$"):
        models.load_processor(str(SHARED / "qwen2_5_vl_processor"), None, 401408, 3136)


@shared("qwen2_5_vl_processor")
def test_the_real_qwen2_5_vl_processor_and_configuration(tmp_path):
    """Its template, tokenizer, image processor and token ids, with a model of its vocabulary made tiny."""
    pytest.importorskip("torchvision", reason="transformers builds Qwen-VL's processors only with torchvision")
    folder = SHARED / "qwen2_5_vl_processor"
    processor, fit, coordinates = models.load_processor(str(folder), None, 401408, 3136)
    assert coordinates == "pixels"

    Image.effect_noise((640, 427), 64).convert("RGB").save(tmp_path / "noise.png")
    examples = data.questions(tmp_path / "noise.png", "dog, frisbee and its thrower")
    asked = data.Prompts(data.TASKS["coco"], examples, processor, fit, coordinates)
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
    eos, forbidden = map(torch.tensor, models.special_tokens(model, processor))
    assert processor.tokenizer.convert_ids_to_tokens(eos.tolist()) == ["<|im_end|>"]
    assert "<|image_pad|>" in processor.tokenizer.convert_ids_to_tokens(forbidden.tolist())
    with torch.no_grad():
        noise = virft.sampling_noise(["a", "b"], 2, C)
        ids = virft.sample(model, batch(inputs), 2, noise, C, eos, 1.0, forbidden)
        logp = virft.CompletionLogps(model)(batch(inputs), ids, 2, 1.0, forbidden)[0]
        for i, row in enumerate(ids):
            expected = alone(model, inputs[i // 2], row, 1.0, forbidden).gather(1, row[:, None]).squeeze(1)
            assert (logp[i] - expected).abs().max() < 1e-5
