"""What chat templates, tokenizers and processors do to a prompt and to the text of an answer."""

import io
import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, LlamaConfig

import data
import virft
from data import TASKS, DataError, Example, Prompts
from demo.warm_start import make_tokenizer
from extras import processors, variants

ANSWER = "<answer>3</answer>"
TEMPLATE = (
    "{% for message in messages %}{{ message['role'] | upper }}: {% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}{% endfor %}TURN_END\n{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT: WRITTEN{% endif %}"
)


def with_template(folder: Path, out: Path, written: str = "", before: str = "", turn_end: str = "") -> Path:
    """Copy a model, with a template that begins prompts and answers and ends turns with these texts."""
    shutil.copytree(folder, out)
    processor = AutoProcessor.from_pretrained(out)
    processor.chat_template = before + TEMPLATE.replace("WRITTEN", written).replace("TURN_END", turn_end)
    processor.save_pretrained(out)
    return out


@pytest.fixture
def rows(tmp_path) -> Path:
    Image.new("RGB", (60, 40), "red").save(tmp_path / "a.png")
    rows = [{"image": "a.png", "problem": f"How many of {n}?", "solution": "3"} for n in range(4)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "rows.jsonl"


def flags(model: Path, rows: Path, out: Path, *more: str) -> list[str]:
    small = ["--max_completion_tokens", "8", "--group_size", "2", "--prompts_per_step", "2", "--steps", "1"]
    named = ["--task", "rows", "--data", str(rows), "--eval_data", str(rows), "--model", str(model), "--out", str(out)]
    return [*named, *small, "--workers", "0", "--beta", "0", "--rewards", "format", *more]


@pytest.mark.parametrize(
    "written, sampled, think, reward",
    [
        ("<think>\n", "one, two, three\n</think>\n" + ANSWER, "true", 1.0),
        ("<think>\n", ANSWER, "true", 0.0),  # it never closed its thoughts
        ("<think>\n\n</think>\n\n", ANSWER, "true", 1.0),
        ("<think>\n\n</think>\n\n", ANSWER, "false", 1.0),
        ("<think>\n\n</think>\n\n", "<think>all the same</think>" + ANSWER, "true", 1.0),
        ("<think>\n", "one</think>" + ANSWER, "false", 0.0),  # said at the start, with a remedy
        ("", ANSWER, "true", 0.0),
    ],
)
def test_what_the_template_opens_counts(
    written, sampled, think, reward, llava_dir, rows, tmp_path, monkeypatch, capsys, signals
):
    """In training, evaluation, --check and --ask an answer is judged and shown with the <think> that was opened."""
    model = with_template(llava_dir, tmp_path / "model", written)
    monkeypatch.setattr(virft.Run, "decode", lambda self, ids, mask: [sampled] * len(ids))
    closed = "</think>" in written
    whole = ("" if closed and (think == "false" or "<think>" in sampled) else written) + sampled

    def main(out: str, *more: str) -> str:
        virft.main(flags(model, rows, tmp_path / out, "--think", think, *more))
        return capsys.readouterr().out

    started = main("run")
    assert ("the chat template opens <think> and --think is false" in started) == (think == "false" and not closed)
    assert json.loads((tmp_path / "run" / "metrics.jsonl").read_text())["reward/format"] == reward
    main("eval", "--eval_only", "true")
    lines = (tmp_path / "eval" / "predictions.jsonl").read_text().splitlines()
    assert len(lines) == 4 and all(json.loads(line)["completion"] == whole for line in lines), lines[0]
    assert json.loads((tmp_path / "eval" / "scores.json").read_text())["format"] == reward
    assert repr(whole) in main("check", "--check", "true")
    assert whole in main("ask", "--ask", str(rows.parent / "a.png"), "--categories", "How many?")


def picture() -> io.BytesIO:
    file = io.BytesIO()
    Image.new("RGB", (60, 40), "red").save(file, "png")
    file.seek(0)
    return file


def encoder(processor, question: str = "What is this?", **settings) -> Prompts:
    example = Example("first", (picture,), None, "3", "", question=question)
    return Prompts(TASKS["rows"], [example], processor, "relative", **settings)


def test_options_reach_the_template_and_change_the_prompt(llava_dir, tmp_path):
    thinking = "{% if enable_thinking is defined and not enable_thinking %}{% else %}<think>{% endif %}"
    processor = AutoProcessor.from_pretrained(with_template(llava_dir, tmp_path / "model", thinking))
    assert encoder(processor)[0, 0].opening == "<think>"
    assert encoder(processor, template_options=["enable_thinking=false"])[0, 0].opening == ""


def test_options_are_json_or_strings():
    pairs = ["a=false", "b=2", 'c={"longest_edge": 5}', "d=words = words", "e=False", "f=falsehood"]
    found = processors.options("x", pairs)
    assert found == {
        "a": False, "b": 2, "c": {"longest_edge": 5}, "d": "words = words", "e": False, "f": "falsehood",
    }  # fmt: skip
    with pytest.raises(DataError, match="^--processor_options a: must be NAME=VALUE, each name once$"):
        processors.options("processor_options", ["a"])


def test_processor_options_are_set_saved_and_refused_by_name(llava_dir, rows, tmp_path, signals):
    virft.main(flags(llava_dir, rows, tmp_path / "run", "--processor_options", "image_mean=[0.1, 0.2, 0.3]"))
    saved = AutoProcessor.from_pretrained(tmp_path / "run" / "model")
    assert list(saved.image_processor.image_mean) == [0.1, 0.2, 0.3]
    with pytest.raises(SystemExit, match="^--processor_options max_patches: SiglipImageProcessorPil has no such"):
        virft.main(flags(llava_dir, rows, tmp_path / "other", "--processor_options", "max_patches=2"))
    with pytest.raises(SystemExit, match="^--processor_options resize: "):  # a method
        virft.main(flags(llava_dir, rows, tmp_path / "other", "--processor_options", "resize=2"))
    with pytest.raises(SystemExit, match="^--processor_options size=336: must be like"):
        virft.main(flags(llava_dir, rows, tmp_path / "other", "--processor_options", "size=336"))


@pytest.mark.parametrize("before", ["", "<bos>"])
def test_a_prompt_has_the_ids_of_the_template_and_one_bos(before, llava_dir, tmp_path):
    """Also where template and tokenizer both write a BOS."""
    from tokenizers.processors import TemplateProcessing

    processor = AutoProcessor.from_pretrained(with_template(llava_dir, tmp_path / "model", before=before))
    processor.tokenizer.add_special_tokens({"bos_token": "<bos>"})
    bos = processor.tokenizer.bos_token_id
    processor.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", bos)]
    )
    prompts = encoder(processor)
    ids = prompts[0, 0].inputs["input_ids"]
    (image,) = data.open_images(prompts.examples[0])
    content = [{"type": "image", "image": image}, {"type": "text", "text": "What is this?"}]
    own = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=True, return_dict=True,
        return_tensors="pt",
    )["input_ids"]  # fmt: skip
    assert torch.equal(ids, own) and (ids == bos).sum() == 1


def test_tags_that_are_special_tokens_are_kept(make_run, llava_dir, tmp_path):
    """Only EOS, padding and placeholders are left out of a decoded answer."""
    folder = tmp_path / "model"
    shutil.copytree(llava_dir, folder)
    processor = AutoProcessor.from_pretrained(folder)
    tags = ["<think>", "</think>", "<answer>", "</answer>"]
    processor.tokenizer.add_special_tokens({"additional_special_tokens": tags})
    run = make_run()
    run.prompts.processor = processor
    text = "<think>one</think><answer>3</answer>"
    ids = torch.tensor([processor.tokenizer(text, add_special_tokens=False)["input_ids"] + run.eos.tolist()])
    assert set(processor.tokenizer.convert_tokens_to_ids(tags)) <= set(ids[0].tolist())
    assert run.decode(ids, torch.ones_like(ids).bool()) == [text]


def test_a_placeholder_in_a_text_is_named_at_the_start(llava_dir):
    """A row's own <image> is a mark of ours; the model's mark is not."""
    processor = AutoProcessor.from_pretrained(llava_dir)
    processor.image_token = "<|image_pad|>"
    with pytest.raises(DataError, match=r"^example first: its text holds <\|image_pad\|>, which stands for an image"):
        encoder(processor, "What does <|image_pad|> mean?")
    skipping = encoder(processor, "What does <|image_pad|> mean?", replace_bad=True)
    assert isinstance(skipping[0, 0], DataError), "left out where bad examples are"
    assert isinstance(skipping.of(skipping.examples)[0, 0], DataError), "evaluation leaves it out too"
    encoder(processor, "What is <image>?")


def test_what_ends_a_turn_ends_answers_everywhere(llava_dir, tmp_path):
    folder = with_template(llava_dir, tmp_path / "model", turn_end="<|im_end|>")
    processor = AutoProcessor.from_pretrained(folder)
    processor.tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    end = processor.tokenizer.convert_tokens_to_ids("<|im_end|>")
    model = virft.load_model(str(folder), torch.float32, torch.device("cpu"))
    assert data.turn_end(processor) == end != processor.tokenizer.eos_token_id
    assert end in virft.special_tokens(model, processor)[0]

    class Run:
        prompts, device = encoder(processor), "cpu"

        eos = torch.tensor([processor.tokenizer.eos_token_id])

    ids, mask = variants.answer_ids(Run, ["yes", "no"])
    assert [row[keep][-1] for row, keep in zip(ids, mask)] == [end, end]
    assert data.turn_end(AutoProcessor.from_pretrained(llava_dir)) is None, "its template writes no such token"


def test_templates_that_take_strings_only(llava_dir):
    """An assistant's words may have to be a string; a question that a template leaves out is an error."""
    processor = AutoProcessor.from_pretrained(llava_dir)
    processor.tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    processor.chat_template = (
        "{% for message in messages %}{% if message['role'] == 'assistant' %}{{ message['content'] + '<|im_end|>' }}"
        "{% else %}{% for part in message['content'] %}{{ part['content'] }}{% endfor %}{% endif %}{% endfor %}"
    )
    assert data.turn_end(processor) == processor.tokenizer.convert_tokens_to_ids("<|im_end|>")
    (error,) = (encoder(processor)[0, 0],)
    assert str(error) == "example first: the model's chat template leaves out the question"


def test_a_model_that_reads_text_only_is_refused(tmp_path):
    folder = tmp_path / "model"
    LlamaConfig().save_pretrained(folder)
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    settings = virft.parse_config(["--model", str(folder), "--out", str(tmp_path / "run")])
    with pytest.raises(SystemExit, match="has no image processor: it reads text only"):
        virft.load_processor(settings, "auto")


def test_an_example_that_the_processor_refuses_is_named(llava_dir):
    class Refusing:
        tokenizer, image_token = AutoProcessor.from_pretrained(llava_dir).tokenizer, None

        def apply_chat_template(self, *args, **kwargs):
            return "What is this?"

        def __call__(self, **kwargs):
            raise ValueError("absolute aspect ratio must be smaller than 200")

    with pytest.raises(DataError, match="^example first: Refusing refuses it: absolute aspect ratio"):
        encoder(Refusing()).encode(encoder(Refusing()).examples[0])


def test_a_model_with_its_own_code_is_refused_in_one_line(tmp_path):
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "their_vl", "auto_map": {"AutoConfig": "configuration_their.TheirConfig"}})
    )
    (tmp_path / "configuration_their.py").write_text("raise RuntimeError('this code ran')")
    with pytest.raises(SystemExit, match="brings code of its own, which is not run here: take a conversion") as stopped:
        virft.pretrained(virft.transformers.AutoConfig, str(tmp_path))
    assert "\n" not in str(stopped.value)
