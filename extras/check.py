"""Inspect a run before training: describe it, sample some answers (--check), ask about a picture (--ask)."""

import contextlib
import math
import random
import re
import resource
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

import data
from data import DataError, Example, Prompt, Prompts, Task, boxes_in, model_size, open_image, to_pixels
from extras.draw import draw_answer
from extras.readers.choose import published
from rewards import REWARDS, answer_shares, asked_for, box_iou, score_group

CHECKED = 16  # number of examples that --check samples answers for
PROMPT_LINES = 12  # lines of the first prompt that are printed at the start of a run


# ------------------------------------------------------------------------------------------------
# The description of a run.


def describe(run: Any, per_prompt: int, what: str, notes: Sequence[str] = ()) -> None:
    """Print what a person should check before the first step, in at most 25 lines; write everything to OUT/setup.txt.

    per_prompt: number of completions per prompt; what: the word for them; notes: lines to print after the first prompt.
    """
    (lines, prompt), say = description(run, per_prompt, what), run.accelerator.print
    more = [f"... {len(prompt) - PROMPT_LINES} lines more in setup.txt"] if len(prompt) > PROMPT_LINES else []
    say("\n".join([*lines, *prompt[:PROMPT_LINES], *more, *notes]))
    if run.main:
        settings = [f"  {name} = {value!r}" for name, value in asdict(run.cfg).items()]
        text = "\n".join([*settings, *run.notes, *lines, *prompt, *notes])
        (Path(run.cfg.out) / "setup.txt").write_text(text + "\n", encoding="utf-8")


def description(run: Any, per_prompt: int, what: str) -> tuple[list[str], list[str]]:
    """Return the lines that describe a run, and the lines of its first prompt."""
    cfg, default, (first,) = run.cfg, type(run.cfg)(), data.sound([run.prompts[0, 0]])
    settings = asdict(cfg)
    changed = [
        f"--{name} {' '.join(map(str, value)) if isinstance(value, list) else value}"
        for name, value in settings.items()
        if value != getattr(default, name)
    ]
    lines = [f"settings other than the defaults: {' '.join(changed)}"]
    if len(phases := getattr(cfg, "iou_threshold", ())) > 1:
        starts = [1 + math.ceil(i * cfg.steps / len(phases)) for i in range(len(phases))]
        lines.append("iou_threshold " + ", ".join(f"{t} from step {start}" for t, start in zip(phases, starts)))
    if run.optimizer:
        lines += [describe_steps(run, per_prompt, what), *answers_too_long(run, first), *unearnable(run)]
        lines += own_without_a_score(run, first)
    if first.opening and not run.prompts.think:
        remedy = "try --template_options enable_thinking=false"
        lines.append(f"the chat template opens <think> and --think is false: {remedy}")
    looked_for = [n for n in run.rewards or () if n in REWARDS and n not in ("non_repeat", "published_accuracy")]
    if looked_for and "<answer>" not in describe_prompt(run, first):
        where = "say the form in the problem, or in --system_prompt"
        lines.append(f"the prompt does not ask for <answer>, which {', '.join(looked_for)} look for: {where}")
    if run.prompts.task.boxes:
        convention = first.example.coordinates or run.prompts.coordinates
        lines.append(f"boxes of the first image are asked for in {first.target[0]} x {first.target[1]} ({convention})")
    return lines, describe_prompt(run, first).splitlines()


def describe_steps(run: Any, per_prompt: int, what: str) -> str:
    """Describe how many parameters are trained, and how a step's prompts are divided among processes and passes."""
    cfg, n, examples = run.cfg, run.accelerator.num_processes, len(run.prompts.examples)
    each, at_once = cfg.prompts_per_step // n, max(1, cfg.micro_batch // per_prompt)
    assert each * n == cfg.prompts_per_step
    trained, every = (
        sum(p.numel() for p in run.model.parameters() if p.requires_grad or not asked) for asked in (True, False)
    )
    chunks = run.chunks(per_prompt)
    chunk = f"in chunks of {len(chunks[0])} {what}" if len(chunks) > 1 else f"{at_once} encoded at once"
    return (
        f"{trained:,} of {every:,} parameters are trained\n"
        f"{cfg.prompts_per_step} prompts a step = {n} processes x {each}, {chunk}; x {per_prompt} {what} = "
        f"{cfg.prompts_per_step * per_prompt} a step; {cfg.steps} steps are "
        f"{cfg.steps * cfg.prompts_per_step / examples:.2f} epochs of {examples} examples"
    )


def answers_too_long(run: Any, first: Prompt) -> list[str]:
    """Report how many examples have an answer that does not fit in --max_completion_tokens."""
    if not run.rewards:  # preference pairs: their answers are given, not sampled
        return []
    limit, task, tokenizer = run.cfg.max_completion_tokens, run.prompts.task, run.prompts.processor.tokenizer
    answers = [data.model_answer(task, e, first.target, run.cfg.think) for e in run.prompts.examples[:2000]]
    lengths = [len(tokenizer(answer)["input_ids"]) for answer in answers]
    if not (too_long := sum(length >= limit for length in lengths)):
        return []
    remedy = "raise it, or leave them out by --max_boxes" if task.boxes else "raise it"
    return [
        f"{too_long} of {len(lengths)} examples have an answer that does not fit in --max_completion_tokens {limit} "
        f"(the longest: {max(lengths)} tokens): {remedy}"
    ]


def unearnable(run: Any) -> list[str]:
    """Report examples whose own right answer earns nothing from a built-in reward, such as boxes that vanish.

    Tries at most 20,000 examples, drawn by seed (3 s); 256 with pixels, because the processor is asked for each size.
    Raises DataError for a solution that such a reward cannot read.
    """
    prompts, rewards = run.prompts, {name: run.rewards[name][0] for name in run.rewards or () if name in REWARDS}
    poor, tiny, every = defaultdict(list), defaultdict(int), prompts.examples
    most = 256 if prompts.task.boxes and prompts.coordinates == "pixels" else 20_000
    examples = random.Random(run.cfg.seed).sample(every, min(most, len(every)))
    for example in examples if rewards else ():
        frame = prompts.frame(example.size, example.coordinates)
        target = model_size(example.coordinates or prompts.coordinates, frame)
        answer = data.model_answer(prompts.task, example, target, prompts.think)
        solution = data.model_solution(example, target)
        for name, reward in rewards.items():
            try:
                if score_group(reward, [answer], solution, iou_threshold=run.cfg.iou_threshold[-1])[0]:
                    continue
            except Exception as error:
                kind = type(solution).__name__
                raise DataError(
                    f"example {example.id}: the reward {name} cannot read its solution {str(solution)[:100]}, "
                    f"of type {kind}: {error}"
                ) from None
            poor[name].append(example.id)
            tiny[name] += any(x2 - x1 < 1 or y2 - y1 < 1 for x1, y1, x2, y2 in boxes_in(solution))
    return [
        f"the right answer of {len(ids)} of {len(examples)} examples earns 0 from the reward {name}"
        f"{f' ({tiny[name]} have boxes under one unit)' if tiny[name] else ''}: {data.few(ids)}"
        for name, ids in poor.items()
    ]


def own_without_a_score(run: Any, first: Prompt) -> list[str]:
    """Report the user's rewards that return None for the first question's right answer.

    None abstains, and is also what a function without `return` gives.
    """
    answer = data.model_answer(run.prompts.task, first.example, first.target, run.prompts.think)
    own = {name: reward for name, (reward, _) in (run.rewards or {}).items() if name not in REWARDS}
    return [
        f"{name} returns None for the right answer to the first question: it abstains, or is a `return` missing?"
        for name, reward in own.items()
        if not asked_for(reward) and reward(answer, first.solution) is None
    ]


def describe_prompt(run: Any, first: Prompt) -> str:
    """Return a prompt as the model reads it; write a run of image tokens as one token and its count."""
    tokenizer, ids = run.prompts.processor.tokenizer, first.inputs["input_ids"][0]
    shown = tokenizer.decode(ids)
    for name in filter(None, map(tokenizer.decode, run.distribution["forbidden"].tolist())):
        shown = re.sub(f"(?:{re.escape(name)}){{2,}}", lambda run: f"{name} x {len(run[0]) // len(name)} ", shown)
    return f"first prompt, {len(ids)} tokens:\n{shown}"


# ------------------------------------------------------------------------------------------------
# --check.


def box_fit(prompts: Sequence[Prompt], texts: Sequence[str], encoder: Prompts, coordinates: str) -> float:
    """Return how well the boxes of the answers fit if read in these coordinates, in [0, 1].

    This is the best IoU of a true box with any answered box, averaged over all true boxes, without threshold or
    matching. texts: G answers per prompt, in the order of the prompts. An answer without boxes counts 0.
    Raises DataError for pixels if the processor does not tell what they refer to.
    """
    ious, G = [], len(texts) // len(prompts)
    for i, text in enumerate(texts):
        example = prompts[i // G].example
        target = model_size(coordinates, encoder.frame(example.size, coordinates))
        found = [to_pixels(box, example.size, target) for box in boxes_in(encoder.task.parse(text) or [])]
        ious += [max((box_iou(box, true) for box in found), default=0.0) for true in boxes_in(example.solution)]
    return float(np.mean(ious)) if ious else 0.0


def doubts(facts: dict[str, float], in_force: str) -> list[str]:
    """Return what looks wrong in the facts of a check, each problem with its remedy.

    facts: parsed, truncated, empty_think (if thoughts are asked for), no_objects, true_no_objects and
    zero_variance_groups in [0, 1]; for tasks with boxes also "iou as relative" and "iou as pixels" (see `box_fit`).
    in_force: the coordinates that the prompts state, "relative" or "pixels".
    """
    found, parses = [], facts["parsed"] >= 0.5  # what does not parse has no box that could fit
    if not parses:
        advice = "compare those above with the form that the prompt asks for; a model that never writes it cannot learn"
        found.append(f"most answers do not parse: {advice}")
    if facts["truncated"] > 0.2:
        crowded = ", or leave out crowded images by --max_boxes" if "iou as relative" in facts else ""
        remedy = f"raise --max_completion_tokens{crowded}"
        found.append(f"many answers are cut off: {remedy}")
    if parses and (here := facts.get(f"iou as {in_force}")) is not None:
        other = {"relative": "pixels", "pixels": "relative"}[in_force]
        if facts.get(f"iou as {other}", 0) > here + 0.1:
            found.append(f"the boxes fit better as {other} than as {in_force}: try --coordinates {other}")
        elif max(here, facts.get(f"iou as {other}", 0)) < 0.1:
            found.append("the boxes fit in neither convention: look at the picture; an IoU reward will stay near 0")
    if facts["no_objects"] > facts["true_no_objects"] + 0.3:
        found.append("No Objects is said far more often than it is true: training can collapse into it")
    if parses and facts["zero_variance_groups"] > 0.7:
        remedy = "raise --group_size, or take harder or easier data"
        found.append(f"most groups have equal rewards and teach nothing: {remedy}")
    if facts.get("empty_think", 0) > 0.9:
        found.append("thoughts are empty: --think false costs less and may score as well")
    return found


def check_facts(run: Any, chosen: list[Prompt], rollouts: list) -> dict[str, float]:
    """Compute the facts that --check prints and `doubts` judges, over all answers to the chosen examples."""
    prompts, task = run.prompts, run.prompts.task
    texts, lengths = [text for ro in rollouts for text in ro.texts], torch.cat([ro.mask.sum(1) for ro in rollouts])
    rewards = torch.cat([ro.rewards for ro in rollouts])
    facts = answer_shares(texts, task.parse)
    if not run.cfg.think:
        del facts["empty_think"]
    facts["truncated"] = float(torch.cat([ro.truncated for ro in rollouts]).float().mean())
    facts["zero_variance_groups"] = float((rewards == rewards[:, :1]).all(1).float().mean())
    facts["true_no_objects"] = sum(p.example.solution == () for p in chosen) / len(chosen)
    if task.boxes:
        for convention in data.CONVENTIONS:
            with contextlib.suppress(DataError):  # then pixels are no choice either
                facts[f"iou as {convention}"] = box_fit(chosen, texts, prompts, convention)
        facts["boxes per answer"] = sum(len(boxes_in(task.parse(text) or [])) for text in texts) / len(texts)
        facts["true boxes"] = sum(len(boxes_in(p.example.solution)) for p in chosen) / len(chosen)
    facts |= {f"reward {name}": float(torch.cat([ro.parts[name] for ro in rollouts]).mean()) for name in run.rewards}
    facts |= {"tokens, mean": float(lengths.float().mean()), "tokens, most": float(lengths.max())}
    return facts


def peak_memory(device: torch.device) -> int:
    """Return this process's peak memory in bytes: of the GPU if there is one, otherwise of main memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    usage = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return usage if sys.platform == "darwin" else usage * 1024  # ru_maxrss is in bytes on macOS, in KiB on Linux


def check(run: Any, rollout: Callable, micro_batches: Callable) -> None:
    """Sample answers as training does, run one backward pass, and print what was found (--check).

    rollout, micro_batches: the functions of virft.py.
    """
    cfg, prompts, task, say = run.cfg, run.prompts, run.prompts.task, run.accelerator.print
    cfg.resample = 0  # the chosen examples are looked at, whatever they earn
    for line in unearnable(run):
        say(line)
    order = random.Random(cfg.seed).sample(range(len(prompts.examples)), min(CHECKED, len(prompts.examples)))
    chosen = data.sound([prompts[slot, index] for slot, index in enumerate(order)])
    size = max(1, cfg.prompts_per_step // run.accelerator.num_processes)
    if run.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()  # exclude loading, which holds the whole model before it is sharded
    # The last step, whose --iou_threshold is evaluation's too.
    rollouts = [rollout(run, chosen[at : at + size], cfg.steps) for at in range(0, len(chosen), size)]
    first = rollouts[0]
    run.backward(micro_batches(run, first)[0][0], lambda rows, logp, entropy: logp.sum())
    run.optimizer.zero_grad(set_to_none=True)

    facts = check_facts(run, chosen, rollouts)
    trained = [p for p in run.model.parameters() if p.requires_grad]
    moments = 8 * sum((p.to_local() if hasattr(p, "to_local") else p).numel() for p in trained)
    facts["peak memory, GB, with the optimizer's moments"] = (peak_memory(run.device) + moments) / 1e9
    coordinates = chosen[0].example.coordinates or prompts.coordinates
    picture = Path(cfg.out) / "check.png"
    if run.main:
        draw_answer(task, chosen[0], first.texts[0], picture)
    found = doubts(facts, coordinates)
    lines, first_prompt = description(run, cfg.group_size, "completions")
    say("\n".join([*lines, *first_prompt]))
    say(f"\n{len(chosen)} examples, {cfg.group_size} answers to each; coordinates in force: {coordinates}")
    say("\n".join(f"  {name:46s} {value:8.3f}" for name, value in facts.items()))
    answers = "\n".join(f"  {text!r}" for text in first.texts[: cfg.group_size])
    say(f"answers to the first question:\n{answers}")
    say("\n".join(f"LOOKS WRONG: {doubt}" for doubt in found) or "nothing looks wrong")
    say(f"the first answer is drawn in {picture}; nothing was trained")


# ------------------------------------------------------------------------------------------------
# --ask.


def questions(task: Task, picture: Path, asked: str | None) -> list[Example]:
    """Return questions without ground truth about the user's picture: one per category, or a single one."""
    size = open_image(picture).size
    if asked == "base65":
        raise DataError("--categories base65 needs the categories of a dataset, and --ask has none: list the names")
    names = data.plain_names(published(asked, ())) if task.asks_for == "categories" else [asked or ""]
    question = None if task.prompt else asked
    return [Example(f"{picture}/{name}", (picture,), size, (), name, question=question) for name in names]


def ask(run: Any, answer: Callable[[Any, list[Prompt]], list[str]]) -> None:
    """Print the answers to --ask and draw their boxes."""
    for example in run.prompts.examples:
        prompt = run.prompts.encode(example)
        (text,) = answer(run, [prompt])
        asked = re.sub(r"\W+", "_", example.category)[:40].strip("_") or "answer"
        path = Path(run.cfg.out) / f"{Path(run.cfg.ask).stem}_{asked}.png"
        draw_answer(run.prompts.task, prompt, text, path)
        run.accelerator.print(f"{example.category}: {text}".removeprefix(": ") + f"\n  drawn in {path}")
