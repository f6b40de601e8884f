"""MIA-DPO: preference pairs from a model's own confusion of images, and DPO on them.

MIA-DPO (arXiv 2410.17637) teaches a vision-language model to answer about the right one of several images, without
new annotation. It takes questions about single images with known answers and puts each image among others. A wrong
answer that the model gave while it looked at another image becomes the answer to avoid.

  1. q          put a question's image among others (a sequence, a grid, a picture in a picture); say which is meant
  2. o          sample the model's answer
  3. a_k        measure the attention of o to image k, averaged over heads and tokens, in a middle layer
  4. select     if a_target / sum_k a_k is low and o is wrong: rejected = o, chosen = the known answer (attention-aware
                selection); drop outliers of perplexity, length and edit distance (post-selection)
  5. margin     beta (log pi_theta / pi_ref (chosen | q) - log pi_theta / pi_ref (rejected | q))
  6. loss       -log sigmoid(margin) + gamma * cross-entropy of chosen

`build` does items 1 to 4 (item 1 in extras/collages.py), `train` items 5 and 6:

    accelerate launch mia_dpo.py build --task rows --data rows.jsonl --model NAME --out pairs.jsonl
    accelerate launch mia_dpo.py train --pairs pairs.jsonl --model NAME --out runs/mia_dpo
    bash run.sh demo mia-dpo                                        # offline demo, no GPU

Sampling, scoring, the training loop and the letters of shapes come from virft.py; also K images or regions, T image
tokens of a prompt. The chosen and the rejected answer to a prompt are a group of two, so the prompt is encoded once.

What differs from the paper and its released code, and why:

  - Attention is read where the answer's tokens are chosen: at the positions that predict them, from the prompt's last
    token on. The attention of the answer's last token is not read: what it predicts is the end.
  - An attention share equal to the limit counts as low in every layout; the released code uses < for collages.
  - Right answers are told by the rules of the rewards (`is_right`); the released code compares strings.

The defaults differ from the released code in these points, which --published true undoes:

  - Answers are sampled, so that a question may have several (--answers 4), and have at most 128 tokens. The model sees
    collages without noise; the released code adds noise, which the paper does not mention.
  - The paper filters by length ratio and edit distance but states no limits. Ours are flags of BuildConfig; the
    released code does not filter so.
  - All weights train at lr 5e-6, for 3 epochs of 16 pairs a step with gamma 0.1 as in the paper. The released script
    trains adapters of rank 128 at lr 5e-5 for 1 epoch of 64 pairs a step, a tenth of them warm-up, with gamma 0.
"""

import functools
import hashlib
import json
import math
import os
import random
import shutil
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

import data
from data import TASKS, DataError, Example, Prompt, Prompts
from extras.adapters import language_model
from extras.collages import LAYOUTS, Question, Questions, image_parts, image_token, part_boxes, question_row
from extras.draw import draw_pair
from extras.checkpoints import used_files
from extras.evaluate import append_own, join_parts, parts_of, read_parts, write_rows
from extras.readers.choose import fewer
from extras.readers.pairs import read_pairs
from extras.report import write_whole
from extras.variants import answer_ids
from rewards import (
    box_iou, iou_reward, normalize_name, parse_answer, parse_detections, parse_grounding, reward_weights,
)  # fmt: skip
from virft import (  # of the algorithm
    MicroBatch, branch, completion_mask, fork, log_distribution, optimizer_step, prefill, sample, sampling_noise,
)  # fmt: skip
from virft import (  # of settings, loading and the loop
    Averages, Config, Run, build as build_run, connect, load_processor, obey, open_out, out_rule, parse, say, setting,
    train as train_run,
)  # fmt: skip


def as_in_virft(name: str, default: Any = None, heading: str | None = None) -> Any:
    """Declare a setting with the help and the bounds of virft.Config, and its default unless another is given."""
    (known,) = (f for f in fields(Config) if f.name == name)
    default = getattr(Config(), name) if default is None else default
    return setting(default, known.metadata["help"], heading, **known.metadata["rules"])


# The released questions: 62,000 about sequences (mostly of two images), 90,000 about grids, 49,000 about pictures in
# pictures. Of the pairs that came out, 52% are about sequences.
PUBLISHED_MIX = ["sequence2=37.4", *(f"sequence{n}=8.2" for n in (3, 4, 5))]
PUBLISHED_MIX += [*(f"grid{n}=18" for n in (2, 3, 4, 6, 9)), "pip=49"]
# --published: what the released code does otherwise than our defaults. It also answers greedily, shows collages with
# noise (collages.NOISE), and makes no pair where the known answer has TRUTH characters or more.
PUBLISHED_BUILD = {
    "answers": 1, "temperature": 1.0, "max_completion_tokens": 512, "max_length_ratio": math.inf,
    "min_edit_distance": 0.0,
}  # fmt: skip
PUBLISHED_TRAIN = {"gamma": 0.0, "epochs": 1.0, "prompts_per_step": 64, "lr": 5e-5, "lora_rank": 128}
TRUTH = 512


@dataclass
class BuildConfig:
    """Hold every setting of `build`."""

    task: str = setting("captions", "COCO's captions, or a task of virft.py", "Questions", choices=("captions", *TASKS))
    data: str | None = setting(None, "dataset folder or file of questions about single images")
    categories: str | None = as_in_virft("categories")
    shots: int | None = as_in_virft("shots")
    limit: int | None = setting(None, "number of questions, chosen by seed; default: one per example", least=1)
    skip_bad_images: bool = as_in_virft("skip_bad_images")
    layouts: list[str] = setting(PUBLISHED_MIX, f"layouts and weights, such as grid4=1; of {', '.join(LAYOUTS)}")
    cell: int = setting(448, "side of a grid's cells in pixels; their margin is 40/448 of it", least=1)
    out: str = setting("pairs.jsonl", "file for the pairs; NAME.jsonl puts everything else into the folder NAME")
    published: bool = setting(False, "as the released code: greedy, 512 tokens, noise on collages (docs/mia_dpo.md)")

    model: str = as_in_virft("model", heading="The model and its answers")
    max_pixels: int = as_in_virft("max_pixels")
    coordinates: str = as_in_virft("coordinates")
    system_prompt: str | None = as_in_virft("system_prompt")
    template_options: list[str] = as_in_virft("template_options")
    processor_options: list[str] = as_in_virft("processor_options")
    answers: int = setting(1, "answers sampled per question; 0: only write the questions, for virft.py", least=0)
    max_completion_tokens: int = as_in_virft("max_completion_tokens", 128)
    temperature: float = as_in_virft("temperature")
    batch: int = setting(8, "questions answered at once per process", least=1)
    workers: int = as_in_virft("workers")
    seed: int = setting(0, "seed of layouts, companion images, target positions and sampled tokens")

    selection: str = setting(
        "attention", "how pairs are chosen; random: draw as many as attention takes; none: ignore attention",
        "Selection", choices=("attention", "random", "none"),
    )  # fmt: skip
    layer: int | None = setting(None, "layer whose attention is read, counted from 0; default: the middle one", least=0)
    limits: list[str] = setting([], "drop answers with a higher attention share than this, by layout: grid4=0.25")
    min_perplexity: float = setting(1.1, "drop answers of at most this perplexity: the model was sure of them")
    max_length_ratio: float = setting(4.0, "drop answers more than so many times longer or shorter, in words")
    min_edit_distance: float = setting(0.1, "drop answers in which a smaller share of words differs from the right one")
    pictures: int = setting(12, "number of pairs to draw with the attention on each image", least=0)


@dataclass
class TrainConfig:
    """Hold every setting of `train`."""

    pairs: str = setting("pairs.jsonl", "rows {id, image, prompt, chosen, rejected}", "What is trained on what")
    model: str = as_in_virft("model")
    out: str = as_in_virft("out", "runs/mia_dpo")
    max_pixels: int = as_in_virft("max_pixels")
    system_prompt: str | None = as_in_virft("system_prompt")
    template_options: list[str] = as_in_virft("template_options")
    processor_options: list[str] = as_in_virft("processor_options")
    skip_bad_images: bool = as_in_virft("skip_bad_images")

    published: bool = setting(False, "as the released script: rank 128, 64 pairs a step (docs/mia_dpo.md)")
    beta: float = setting(0.1, "DPO's beta: scale of the log-ratio to the reference", "The algorithm", above=0)
    gamma: float = setting(0.1, "weight of the cross-entropy of the chosen answers", least=0)

    epochs: float = setting(3.0, "passes over the pairs", "Optimization", above=0)
    steps: int = setting(0, "training steps; 0: as many as --epochs makes", least=0)
    prompts_per_step: int = setting(16, "pairs per step over all processes", least=1)
    micro_batch: int = setting(2, "answers per forward pass, two per pair", least=0)
    lr: float | None = setting(None, "learning rate, decaying to 0; default 5e-6, with --lora_rank 1e-5", above=0)
    warmup_steps: int = as_in_virft("warmup_steps")
    seed: int = setting(0, "seed of the order of the pairs")
    lora_rank: int = as_in_virft("lora_rank", heading="Memory and several GPUs")
    freeze_vision: bool = as_in_virft("freeze_vision")
    adam_bits: int = as_in_virft("adam_bits")
    shard: bool = as_in_virft("shard")
    workers: int = as_in_virft("workers")
    save_every: int = as_in_virft("save_every", heading="Interruptions")
    resume: bool = as_in_virft("resume")
    report_to: list[str] = as_in_virft("report_to", heading="Seeing what happens")


# 3. Attention ------------------------------------------------------------------------------------


def attention_shares(attention: Tensor, parts: Tensor, mean: bool) -> Tensor:
    """Divide an answer's attention to image tokens, [T], among parts, bool [K, T]; return shares [K] that sum to 1."""
    mass = parts.to(attention.dtype) @ attention  # regions of a collage are compared by sums,
    mass = mass / parts.sum(1) if mean else mass  # images of a sequence, which may differ in size, by means per token
    return mass / mass.sum()


def attention_layers(model: nn.Module) -> list[nn.Module]:
    """Return the attention modules of the language model, in order; other kinds of layers have none to look at."""
    named = [m for m in language_model(model).modules() if type(m).__name__.endswith("Attention")]
    return [module for module in named if hasattr(module, "layer_idx")]


def branch_with_attention(model: nn.Module, prefix: Any, ids: Tensor, layer: nn.Module) -> tuple[Tensor, Tensor]:
    """Run `branch` and return its logits and the attention weights of one layer, [N, heads, C, keys].

    Attention is eager here, because fused kernels never form the weights. The hook keeps those of one layer; with
    output_attentions the model would keep all.
    """
    config, seen = language_model(model).config, []
    usual, config._attn_implementation = config._attn_implementation, "eager"
    hook = layer.register_forward_hook(lambda module, given, out: seen.append(out[1]))
    try:
        return branch(model, prefix, ids), seen[0]
    finally:
        hook.remove()
        config._attn_implementation = usual


def look(
    model: nn.Module, inputs: dict[str, Tensor], ids: Tensor, mask: Tensor, G: int, layer: int | None, forbidden: Tensor
) -> tuple[Tensor, Tensor]:
    """Measure the attention of answers to their prompts, and their perplexity.

    ids, mask [B * G, C]: answers to B prompts and their tokens that count; of an empty answer the first counts.
    Returns the attention to each prompt token, [B * G, P], averaged over heads and over the positions that predict the
    counted tokens, and the perplexity [B * G]: exp of the mean negative log-probability of the most probable token at
    those positions (the published definition).
    """
    prompt, rows = inputs["input_ids"], torch.arange(len(ids), device=ids.device) // G
    length = prompt.shape[1]
    # The prompt's last token predicts the answer's first, so it is left out of the prefix: its attention counts, too.
    before = {name: x[:, :-1] if x.shape[:2] == prompt.shape else x for name, x in inputs.items()}
    prefix, continuation = fork(prefill(model, before), rows), torch.cat([prompt[rows, -1:], ids[:, :-1]], 1)
    layers = attention_layers(model)
    layer = len(layers) // 2 if layer is None else layer
    if layer >= len(layers):
        raise SystemExit(f"--layer {layer}: {type(model).__name__} has {len(layers)} layers of attention, from 0 on")
    logits, seen = branch_with_attention(model, prefix, continuation, layers[layer])
    if seen.shape[-1] != length - 1 + ids.shape[1]:
        raise SystemExit(f"--layer {layer}: {type(model).__name__} sees a part of the prompt there; give another layer")
    counted = mask.clone()
    counted[:, 0] |= ~mask.any(1)
    weights = counted / counted.sum(1, keepdim=True)  # [N, C]
    # No matrix product: autocast would round it to bf16, and shares are compared with limits.
    attention = (seen.float().mean(1) * weights[..., None]).sum(1)
    surest = log_distribution(logits, 1.0, forbidden).max(-1).values
    perplexity = (-(surest * weights).sum(1)).exp()
    return F.pad(attention[:, : length - 1], (0, 1)), perplexity  # 0 for the prompt's last token, which is text


# 4. Select ---------------------------------------------------------------------------------------


def edit_distance(a: Sequence, b: Sequence) -> int:
    """Count the insertions, deletions and substitutions that turn a into b (Levenshtein)."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        above, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            above, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, above + (x != y))
    return row[-1]


def is_right(answer: str, truth: str) -> bool:
    """Return whether an answer is the known one by the rules of the rewards: boxes by a mean IoU above 0.5, else words.

    Two of three boxes may do: such an answer is too good to be rejected.
    """
    if (boxes := parse_detections(truth)) is not None:
        return iou_reward(answer, [box for box, _ in boxes]) > 0.5
    if box := parse_grounding(truth):
        found = parse_grounding(answer)
        return found is not None and box_iou(found, box) > 0.5
    inside = [parse_answer(text) or text for text in (answer, truth)]  # captions have no answer block
    return normalize_name(inside[0]) == normalize_name(inside[1])


FILTERS = ("unfinished", "long truth", "right", "sure", "length", "alike", "looked right")  # in this order


def limits_of(cfg: BuildConfig) -> dict[str, float]:
    """Return the limit of every layout: Layout.limit unless --limits sets another."""
    return {name: layout.limit for name, layout in LAYOUTS.items()} | reward_weights(cfg.limits)


def flaw(candidate: dict, cfg: BuildConfig, limits: dict[str, float]) -> str | None:
    """Return the first of FILTERS that an answer fails, or None if it can be a rejected answer."""
    answer, truth = (candidate[key].casefold().split() for key in ("rejected", "chosen"))
    longer, shorter = max(len(answer), len(truth)), max(1, min(len(answer), len(truth)))
    failed = {
        "unfinished": candidate["truncated"] or not answer,
        "long truth": cfg.published and len(candidate["chosen"]) >= TRUTH,
        "right": any(is_right(candidate["rejected"], one) for one in (candidate["chosen"], *candidate["also_right"])),
        "sure": candidate["perplexity"] <= cfg.min_perplexity,
        "length": longer / shorter > cfg.max_length_ratio,  # far longer or shorter than the right answer
        "alike": edit_distance(answer, truth) / max(1, longer) < cfg.min_edit_distance,  # almost the right answer
        "looked right": candidate["ratio"] > limits[candidate["layout"]],  # paid the target enough attention
    }
    return next((name for name in FILTERS if failed[name]), None)


def select(candidates: Sequence[dict], cfg: BuildConfig) -> list[dict]:
    """Return the candidates with `dropped`: the filter that dropped each, None for those that become pairs.

    The second of two equal answers to a question is "repeated". The control, --selection random, draws as many of each
    layout as attention would take, from the answers that pass all filters but attention's.
    """
    limits, seen = limits_of(cfg), set()
    judged = [candidate | {"dropped": flaw(candidate, cfg, limits)} for candidate in candidates]
    for c in sorted(judged, key=lambda c: c["dropped"] is not None):  # the one that makes a pair stays
        said = (c["number"], *c["rejected"].casefold().split())
        if said in seen and c["dropped"] in (None, "looked right"):  # other selections would take a "looked right"
            c["dropped"] = "repeated"
        seen.add(said)
    if cfg.selection != "attention":
        for layout in LAYOUTS:
            same = [c for c in judged if c["layout"] == layout and c["dropped"] in (None, "looked right")]
            taken = sum(c["dropped"] is None for c in same)
            lot = set(random.Random(f"{cfg.seed}/select/{layout}").sample(range(len(same)), taken))
            for i, c in enumerate(same):
                c["dropped"] = None if cfg.selection == "none" or i in lot else "not drawn"
    return judged


# 5 and 6. Margin and loss ------------------------------------------------------------------------


def dpo_loss(logp: Tensor, logp_ref: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """Compute -log sigmoid(margin) and the implicit rewards of pairs, eq. 7 of DPO (arXiv 2305.18290).

    logp, logp_ref [B, 2]: log-probabilities of whole answers, (chosen, rejected), under pi_theta and the reference.
    Returns loss [B] and rewards beta (logp - logp_ref), [B, 2]; the margin is rewards[:, 0] - rewards[:, 1].
    """
    rewards = beta * (logp - logp_ref)
    return -F.logsigmoid(rewards[:, 0] - rewards[:, 1]), rewards


class Pairs(NamedTuple):
    """What `virft.train` has instead of a rollout: the pairs of a step, whose answers are known before."""

    prompts: list[Prompt]
    told: list[dict]  # by pair: its numbers, once `dpo_update` has computed them
    texts = ()  # nothing was sampled

    def rows(self, step: int) -> list[dict]:
        """Return a line of rollouts.jsonl for each pair."""
        return [{"step": step} | numbers for numbers in self.told]


def dpo_update(run: Run, pairs: Pairs) -> Averages:
    """Take one optimizer step on the pairs of a step; return its metrics."""
    cfg, metrics = run.cfg, Averages()
    at_once = max(1, cfg.micro_batch // 2)
    for start in range(0, len(pairs.prompts), at_once):
        prompts = pairs.prompts[start : start + at_once]
        ids, mask = answer_ids(run, [text for p in prompts for text in p.solution])  # [n * 2, C]
        batch = MicroBatch(prompts, run.collate(prompts), ids, mask)
        logp_ref = (run.reference_logps(batch) * batch.mask).sum(1)  # [n * 2], of whole answers
        run.lap("reference")

        def loss_of(rows: Tensor, token_logp: Tensor, entropy: Tensor) -> Tensor:
            mask = batch.mask[rows]
            logp, ref = (token_logp * mask).sum(1).view(-1, 2), logp_ref[rows].view(-1, 2)
            dpo, rewards = dpo_loss(logp, ref, cfg.beta)
            cross_entropy = -logp[:, 0] / mask.sum(1).view(-1, 2)[:, 0]  # per token, so that length does not matter
            loss, margin = dpo + cfg.gamma * cross_entropy, rewards[:, 0] - rewards[:, 1]
            columns = {
                "loss": loss, "dpo_loss": dpo, "cross_entropy": cross_entropy, "margin": margin,
                "accuracy": (margin > 0).float(), "reward_chosen": rewards[:, 0], "reward_rejected": rewards[:, 1],
                "logp_chosen": logp[:, 0], "logp_rejected": logp[:, 1],
            }  # fmt: skip
            for name, values in columns.items():
                metrics.add(name, values.detach().sum(), len(values))
            for i, pair in enumerate(rows[::2].tolist()):
                numbers = {name: round(values[i].item(), 4) for name, values in columns.items()}
                pairs.told.append({"id": batch.prompts[pair // 2].example.id} | numbers)
            return loss.sum() / cfg.prompts_per_step  # of all processes: their gradients are added up

        run.backward(batch, loss_of, unit=2)
        run.lap("train")
    optimizer_step(run, metrics)
    return metrics


# ================================================================================================
# The machinery of `build`.

READ_CAPTIONS = functools.partial(data.extra_reader, "--task captions", "captions", "read_captions")
CAPTIONS = replace(TASKS["rows"], name="captions", read=READ_CAPTIONS)


@torch.no_grad()
def answer_questions(run: Run, questions: list[Question], numbers: list[int], prompts: list[Prompt]) -> list[dict]:
    """Sample answers and measure their attention; return one candidate record per answer."""
    cfg, G = run.cfg, run.cfg.answers
    if prompts[0].opening:
        remedy = "pairs have none; try --template_options enable_thinking=false"
        raise SystemExit(f"the chat template opens <think> in front of every answer: {remedy}")
    with run.autocast():
        inputs = run.collate(prompts)
        limit = cfg.max_completion_tokens
        noise = sampling_noise([f"{cfg.seed}/{i}" for i in numbers], G, limit).to(run.device)
        noise = None if cfg.published else noise  # None: greedy
        ids, _ = sample(run.model, inputs, G, noise, limit, run.eos, **run.distribution, capture=run.capture)
        ends = torch.isin(ids, run.eos)
        mask = completion_mask(ids, run.eos) & ~ends
        attention, perplexity = look(run.model, inputs, ids, mask, G, cfg.layer, run.distribution["forbidden"])
    is_image = inputs["input_ids"] == image_token(run.prompts.processor)
    records = []
    for row, text in enumerate(run.decode(ids, mask)):
        i, question = row // G, questions[row // G]
        example, looked = question.example, attention[row][is_image[i]].cpu()
        shares = attention_shares(looked, *image_parts(run.prompts, question, prompts[i], len(looked))).tolist()
        records.append({
            "number": numbers[i], "id": example.id + (f"/{row % G}" if G > 1 else ""),
            "image": [str(path.resolve()) for path in example.images], "prompt": example.question,
            "chosen": example.solution, "rejected": text.strip(), "gt": example.solution,
            "also_right": list(question.also_right),
            "layout": question.layout, "target": question.target,
            "ratio": round(shares[question.target], 4), "shares": [round(share, 4) for share in shares],
            "perplexity": round(float(perplexity[row]), 4), "truncated": not bool(ends[row].any()),
        })  # fmt: skip
    return records


def report_selection(judged: Sequence[dict], cfg: BuildConfig) -> str:
    """Return a table of how many answers each filter dropped, by layout."""
    columns = [*FILTERS, "repeated", *(["not drawn"] if cfg.selection == "random" else [])]
    lines = [f"{'layout':10s}{'answers':>9s}{''.join(f'{name:>14s}' for name in columns)}{'pairs':>9s}{'ratio':>8s}"]
    for layout in [*(name for name in LAYOUTS if any(c["layout"] == name for c in judged)), "all"]:
        rows = [c for c in judged if layout in (c["layout"], "all")]
        dropped, ratio = Counter(c["dropped"] for c in rows), sum(c["ratio"] for c in rows) / max(1, len(rows))
        counts = "".join(f"{dropped[name]:14d}" for name in columns)
        lines.append(f"{layout:10s}{len(rows):9d}{counts}{dropped[None]:9d}{ratio:8.3f}")
    return "\n".join([*lines, "ratio: the right image's share of attention, averaged over all answers"])


def relative(rows: Sequence[dict], images: str, folder: Path) -> list[dict]:
    """Return rows whose image paths are relative to a folder, so that both can be moved."""
    return [row | {images: [os.path.relpath(Path(p).resolve(), folder.resolve()) for p in row[images]]} for row in rows]


def as_published(cfg: Any, values: dict[str, Any]) -> Any:
    """With --published set these settings; SystemExit where one of them was given otherwise."""
    for name, value in values.items() if cfg.published else ():
        obey(cfg, [(name, getattr(cfg, name) in (getattr(type(cfg)(), name), value), f"{value} with --published")])
        setattr(cfg, name, value)
    return cfg


def parse_build(argv: Sequence[str]) -> BuildConfig:
    usage = "%(prog)s --task TASK --data DIR --model NAME [flags]"
    cfg = as_published(parse(BuildConfig, argv, prog="mia_dpo.py build", usage=usage), PUBLISHED_BUILD)
    try:
        mix, limits = reward_weights(cfg.layouts), reward_weights(cfg.limits)
    except ValueError as error:
        raise SystemExit(f"--layouts {' '.join(cfg.layouts)} --limits {' '.join(cfg.limits)}: {error}") from None
    folder = Path(cfg.out).with_suffix("").resolve()
    used = [Path(path).resolve() for path in (cfg.data, cfg.model) if path]
    good = mix and mix.keys() <= LAYOUTS.keys() and min(mix.values()) > 0
    obey(cfg, [
        ("data", cfg.data, "given: the folder or file of questions about single images"),
        ("layouts", good, f"weights above 0 of {', '.join(LAYOUTS)}"),
        ("limits", limits.keys() <= LAYOUTS.keys(), f"shares, of {', '.join(LAYOUTS)}"),
        ("limits", all("=" in limit for limit in cfg.limits), "LAYOUT=SHARE, as grid4=0.25"),
        ("out", cfg.out.endswith(".jsonl") and not folder.is_file(), "a file NAME.jsonl, with no file called NAME"),
        ("out", not any(p.is_relative_to(folder) for p in used), "outside --data and --model: its folder is NAME"),
        ("out", Path(cfg.out).resolve() not in used, "another file than --data"),
    ])  # fmt: skip
    check_folder(cfg, folder)  # before data and model are loaded
    return cfg


# Settings that do not change the answers: an interrupted build may be continued with other values of them.
MAY_DIFFER = "out workers batch pictures selection limits min_perplexity max_length_ratio min_edit_distance".split()


def check_folder(cfg: BuildConfig, folder: Path) -> None:
    """Raise SystemExit if the folder of a build holds something else, or a build that this one cannot continue."""
    settings = asdict(cfg) | dict.fromkeys(MAY_DIFFER) | {"used": used_files(cfg.model, ())}
    before = begun(folder)
    before.pop("asked", None)
    if folder.exists() and any(folder.iterdir()) and "layouts" not in before:
        raise SystemExit(f"--out {cfg.out}: must be another: {folder} was not made by a build, and will not be touched")
    finished = Path(cfg.out).exists() or (folder / "questions.jsonl").exists()
    answered = bool(read_parts(folder, "candidates"))  # without answers nothing is lost by other settings
    if finished or answered and before != settings:
        raise SystemExit(f"--out {cfg.out}: must be new: an earlier build is there; give another or remove it")


def begun(folder: Path) -> dict:
    """Return the settings of the build that has begun in a folder; none: {}."""
    file = folder / "config.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def open_folder(cfg: BuildConfig, folder: Path, examples: Sequence[Example]) -> list[dict]:
    """Make the folder of a build; return the answers of an interrupted build, or of one whose pairs were removed."""
    told = json.dumps([[e.id, e.question, e.solution, list(map(str, e.images))] for e in examples])
    asked, before = hashlib.sha256(told.encode()).hexdigest(), begun(folder)
    rows = read_parts(folder, "candidates")
    if rows and before.get("asked", asked) != asked:
        raise DataError(f"{folder}: its answers are to other questions, the data changed; another --out starts over")
    folder.mkdir(parents=True, exist_ok=True)
    settings = asdict(cfg) | dict.fromkeys(MAY_DIFFER) | {"asked": asked, "used": used_files(cfg.model, ())}
    write_whole(folder / "config.json", json.dumps(settings, indent=2) + "\n")  # first: it marks the folder as ours
    (folder / "images").mkdir(exist_ok=True)
    found = {(row["number"], row["id"]): row for row in rows}
    answered = Counter(number for number, _ in found)
    kept = [row for (number, _), row in found.items() if answered[number] == cfg.answers]  # only complete questions
    for row in kept:
        row["image"] = [str((folder / image).resolve()) for image in row["image"]]
        row.pop("dropped", None)
    if rows or parts_of(folder, "candidates"):  # also of a part that holds only a line that was cut off
        join_parts(folder, "candidates", relative(kept, "image", folder))
    return kept


def build(argv: list[str]) -> None:
    """Do items 1 to 4: each process appends its candidates to a file of its own, then one process selects."""
    cfg = parse_build(argv)
    accelerator, out = connect(cfg), Path(cfg.out)
    folder, main = out.with_suffix(""), accelerator.is_main_process
    task = {**TASKS, "captions": CAPTIONS}[cfg.task]
    chosen = {name: getattr(cfg, name) for name in ("categories", "shots", "seed", "skip_bad_images")}
    pool, notes = data.load_examples(task, cfg.data, "train", **chosen)  # an image is put among any of these
    examples = fewer(task, pool, None, cfg.limit, data.Choice(seed=cfg.seed), notes)
    if several := [e.id for e in examples if len(e.images) != 1]:
        raise DataError(f"example {several[0]} has several images; a build starts from questions about one")
    processor, coordinates, positions = load_processor(cfg, cfg.coordinates)
    if task.boxes and coordinates != "relative" and not cfg.answers:
        raise SystemExit("--answers 0: rows hold boxes in 0..1000; --coordinates relative")
    room = positions - cfg.max_completion_tokens
    asked = (False, cfg.system_prompt, room, cfg.skip_bad_images, cfg.template_options)
    prompts = Prompts(task, examples, processor, coordinates, *asked)
    shown = (reward_weights(cfg.layouts), folder / "images", cfg.cell, cfg.seed, cfg.published)
    questions = Questions(prompts, *shown, pool=pool)
    run = build_run(cfg, accelerator, prompts, {}, trains=False, temperature=cfg.temperature)
    say("\n".join(notes))
    (kept,) = broadcast_object_list([open_folder(cfg, folder, [*examples, *pool]) if main else []])
    if kept:
        say(f"continuing with {len(kept)} answers from {folder}")
    done = {candidate["number"] for candidate in kept}
    left = [i for i in range(accelerator.process_index, len(examples), accelerator.num_processes) if i not in done]
    if cfg.workers:
        run.settle()
    loader = DataLoader(questions, cfg.batch, sampler=left, collate_fn=list, num_workers=cfg.workers)
    records, skipped = kept if main else [], []
    for batch in tqdm(loader, desc="build", disable=not main, dynamic_ncols=True):
        if not cfg.skip_bad_images:
            data.sound([question for _, question, _ in batch])
        skipped += [str(question) for _, question, encoded in batch if encoded is None]
        if good := [part for part in batch if part[2] is not None]:
            numbers, asked, encoded = map(list, zip(*good))
            if cfg.answers:
                found = answer_questions(run, asked, numbers, encoded)
                append_own(folder, "candidates", accelerator.process_index, found)
            else:
                found = [{"number": number, "row": question_row(task, q)} for number, q in zip(numbers, asked)]
            records += found
    records, skipped = gather_object(records), gather_object(skipped)
    if skipped:
        say(f"{len(skipped)} questions skipped; first: {skipped[0]}")
    if main:
        finish_build(cfg, sorted(records, key=lambda record: (record["number"], record.get("id"))), folder)
    accelerator.end_training()


def finish_build(cfg: BuildConfig, records: list[dict], folder: Path) -> None:
    """Write pairs, all candidates with the filter that dropped each, pictures and a table; or the questions alone."""
    if not cfg.answers:
        write_rows(folder / "questions.jsonl", relative([record["row"] for record in records], "images", folder))
        return print(f"{len(records)} questions in {folder / 'questions.jsonl'}")
    judged = select(records, cfg)
    pairs = [c for c in judged if c["dropped"] is None]
    join_parts(folder, "candidates", relative(judged, "image", folder))
    shutil.rmtree(folder / "pictures", ignore_errors=True)
    for number, pair in enumerate(random.Random(cfg.seed).sample(pairs, min(cfg.pictures, len(pairs)))):
        draw_pair(pair, part_boxes(LAYOUTS[pair["layout"]]), folder / "pictures" / f"{number:03d}.png")
    table = report_selection(judged, cfg)
    write_whole(folder / "selection.txt", table + "\n")
    published = ("id", "image", "prompt", "chosen", "rejected", "gt", "layout", "ratio")
    out, kept = Path(cfg.out), [{name: pair[name] for name in published} for pair in pairs]
    write_rows(out, relative(kept, "image", out.parent))
    print(f"{table}\n{len(pairs)} pairs in {cfg.out}; all answers and pictures in {folder}")


# ================================================================================================
# The machinery of `train`.


def parse_train(argv: Sequence[str]) -> TrainConfig:
    cfg = parse(TrainConfig, argv, prog="mia_dpo.py train", usage="%(prog)s --pairs FILE --model NAME [flags]")
    cfg = as_published(cfg, PUBLISHED_TRAIN)
    cfg.lr = cfg.lr or (1e-5 if cfg.lora_rank else 5e-6)
    obey(cfg, [out_rule(cfg, may_exist=cfg.resume)])
    return cfg


def train(argv: Sequence[str]) -> None:
    """Do items 5 and 6, by the loop of virft.py."""
    cfg = parse_train(argv)
    accelerator, (processor, coordinates, positions) = connect(cfg), load_processor(cfg, "relative")
    pairs, notes = read_pairs(Path(cfg.pairs), processor, positions // 2, cfg.skip_bad_images)
    cfg.steps = cfg.steps or max(1, round(cfg.epochs * len(pairs) / cfg.prompts_per_step))
    cfg.warmup_steps = cfg.warmup_steps or (cfg.steps // 10 if cfg.published else 0)
    longest = max(len(ids) for ids in processor.tokenizer([text for e in pairs for text in e.solution])["input_ids"])
    task, room = replace(TASKS["rows"], name="pairs"), positions - longest - 1
    shown = (processor, coordinates, False, cfg.system_prompt, room, cfg.skip_bad_images, cfg.template_options)
    run = build_run(cfg, accelerator, Prompts(task, pairs, *shown), {}, trains=True)
    notes += [f"{name}: {text}" for name, text in zip(("chosen", "rejected"), pairs[0].solution)]
    open_out(run, 2, "answers", notes)
    train_run(run, rollout=lambda run, prompts, step: Pairs(prompts, []), update=dpo_update)


def main(argv: list[str] | None = None) -> None:
    command, *rest = sys.argv[1:] if argv is None else argv or [""]
    if command not in ("build", "train"):
        usage = "mia_dpo.py build ... makes preference pairs, mia_dpo.py train ... learns from them; each has --help"
        raise SystemExit(usage)
    try:
        {"build": build, "train": train}[command](rest)
    except DataError as error:
        raise SystemExit(f"data: {error}") from None


if __name__ == "__main__":
    main()
