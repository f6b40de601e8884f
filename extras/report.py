"""Write report.html: one page about runs and evaluations that opens from disk, without scripts, and loads nothing.

    python -m extras.report runs/virft                                          # with its first and last evaluation
    python -m extras.report runs/demo/{before,train,after} --out demo.html      # the last evaluation against the first
    python -m extras.report runs/seed0 runs/seed1 --out seeds.html              # curves of runs in the same panels

virft.py writes OUT/report.html every REPORT_EVERY steps, at evaluations and checkpoints and at the end, mia_dpo.py
train at the end, and an evaluation in its own folder. What a model or a dataset wrote is escaped. A page has at most
6 MB: groups of two runs, and answers as far as ANSWERS goes.
"""

import argparse
import base64
import html
import io
import json
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from data import TASKS, boxes_in
from extras.draw import (
    BETTER, EQUAL, PLOTS, WORSE, Mark, answer_picture, curves, draw_boxes, evenly, thumbnail, thumbnail_of,
)  # fmt: skip
from extras.outcomes import OUTCOMES, gains, outcome, parsed_answer
from rewards import REWARDS, reward_weights

ANSWERS = 1_800_000  # about as many characters (base64) for pictures of answers, of the 6 MB of a page
PER_OUTCOME = 6  # answers shown of each outcome; also pairs of MIA-DPO
SIDE_BY_SIDE = 8  # questions shown before and after

# ------------------------------------------------------------------------------------------------
# What a run keeps for its page.


def follow(run: Any, ro: Any, step: int) -> None:
    """Keep three groups of this process's step in OUT/groups.json, and write OUT/report.html anew.

    The groups: of the largest variance, the highest and the lowest mean of rewards; fewer if they are the same.
    """
    out, task, chosen, groups = Path(run.cfg.out), run.prompts.task, {}, []
    for kind in ("widest", "best", "worst") if ro.texts else ():  # mia_dpo.py samples nothing in training
        measured = ro.rewards.var(1, correction=0) if kind == "widest" else ro.rewards.mean(1)
        chosen.setdefault(int(measured.argmin() if kind == "worst" else measured.argmax()), kind)
    for i, kind in chosen.items():
        prompt, G = ro.prompts[i], ro.rewards.shape[1]
        example, completions = prompt.example, []
        for k, text in enumerate(ro.texts[i * G : (i + 1) * G]):
            answer = parsed_answer(task, example, prompt.target, text)
            completions.append({
                "text": text, "boxes": boxes_in(answer) if task.boxes else [], "reward": ro.rewards[i, k].item(),
                "advantage": ro.advantages[i * G + k].item(),
                "rewards": {name: part[i, k].item() for name, part in ro.parts.items()},
            })  # fmt: skip
        asked = {"category": example.category, "question": example.question, "size": example.size}
        true = {"solution": example.solution, "boxes": boxes_in(example.solution) if task.boxes else []}
        picture = embedded(thumbnail(example))
        groups.append({"kind": kind, "step": step, **asked, **true, "picture": picture, "completions": completions})
    if groups:
        write_whole(out / "groups.json", json.dumps(groups, ensure_ascii=False))
    write_report([out], out / "report.html")


def write_whole(file: Path, text: str) -> None:
    """Write a file beside its place, then rename it, so that no reader finds a part of it."""
    aside = file.with_name(f"{file.name}.unfinished")
    aside.write_text(text, encoding="utf-8", errors="replace")  # half a surrogate pair, as a model may write
    aside.replace(file)


def rows_of(file: Path) -> list[dict]:
    """Read a .jsonl file as far as it was written; nothing if there is none."""
    lines = file.read_text(encoding="utf-8").split("\n")[:-1] if file.exists() else []
    return [json.loads(line) for line in lines]


# ------------------------------------------------------------------------------------------------
# Pieces of HTML.


def esc(value: Any, most: int = 1500) -> str:
    """Escape a text (or any value, as JSON) for HTML; of a longer one only the first `most` characters are shown."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return html.escape(text if len(text) <= most else f"{text[:most]} … ({len(text)} characters)")


def as_svg(figure: Any) -> str:
    """Return a figure as the address of an image in the page."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    return f"data:image/svg+xml;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def embedded(picture: Image.Image) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=82)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def opened(address: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(address.partition(",")[2])))


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table of cells that are HTML already."""
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return f"<div class=wide><table><tr>{''.join(f'<th>{cell}</th>' for cell in head)}</tr>{body}</table></div>"


def bar(value: float, most: float = 1.0) -> str:
    """Return a number with a bar whose full length is `most`."""
    share = 100 * min(1.0, max(0.0, value / most)) if most > 0 and math.isfinite(value) else 0
    return f'<span class=bar><i style="width:{share:.0f}%"></i></span> {value:.3g}'


def name_of(folder: Path) -> str:
    """Return the last two parts of a path, such as demo/before."""
    return "/".join(folder.resolve().parts[-2:])


def config_of(folder: Path) -> dict:
    file = folder / "config.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}


# ------------------------------------------------------------------------------------------------
# The page, part by part. Each function returns HTML, empty where there is nothing to show.


def what_ran(folders: Sequence[Path]) -> str:
    """Return each folder's steps and seconds, and what its start printed."""
    rows = []
    for folder in folders:
        settings, logged = config_of(folder), rows_of(folder / "metrics.jsonl")
        setup = (folder / "setup.txt").read_text(encoding="utf-8") if (folder / "setup.txt").exists() else ""
        said = [line for line in setup.split("first prompt")[0].splitlines() if line and not line.startswith("  ")]
        seconds = sum(value for row in logged for name, value in row.items() if name.startswith("seconds/"))
        did = f"{logged[-1]['step']} of {settings.get('steps')} steps, {seconds:,.0f} s" if logged else "evaluation"
        about = "".join(f"<li>{esc(line, 600)}" for line in said)
        more = f"<details><summary>all settings and the first prompt</summary><pre>{esc(setup, 20_000)}</pre></details>"
        rows.append([f"<b>{esc(name_of(folder))}</b>", did, f"<ul>{about}</ul>{more}"])
    return f"<h2>What ran</h2>{table(['folder', 'what', 'how'], rows)}"


def what_is_rewarded(folders: Sequence[Path]) -> str:
    """Return rewards, weights and what each returns: the first line of a built-in reward's docstring."""
    rows = {}
    for config in map(config_of, folders):
        own = TASKS[config["task"]].rewards if config.get("task") in TASKS else {}
        for name, weight in (reward_weights(config.get("rewards") or []) or own).items():
            rule = (REWARDS[name].__doc__ or "").split("\n")[0] if name in REWARDS else "your own"
            rows[name, weight] = [esc(name), f"{weight:g}", esc(rule)]
    head = ["reward", "weight", "rule"]
    return f"<h2>What is rewarded</h2>{REWARDED}{table(head, rows.values())}" if rows else ""


def scores_of(evaluations: Sequence[Path]) -> str:
    """Return outcomes and scores, what the last evaluation gained and lost against the first, and categories."""
    scores = [json.loads((folder / "scores.json").read_text(encoding="utf-8")) for folder in evaluations]
    records = [rows_of(folder / "predictions.jsonl") for folder in evaluations]
    head = ["", *(esc(name_of(folder)) for folder in evaluations)]
    counts = [Counter(map(outcome, each)) for each in records]
    rows = [["<b>questions</b>", *(f"<b>{len(each)}</b>" for each in records)]]
    for kind in (kind for kind in OUTCOMES if any(c[kind] for c in counts)):
        rows.append([OUTCOMES[kind], *(f"{bar(c[kind] / c.total())} ({c[kind]})" for c in counts)])
    for name in (name for name, value in scores[-1].items() if isinstance(value, float)):
        most = max(1.0, *(s.get(name, 0.0) for s in scores))
        told = f"{esc(name)} <small>{MEANS.get(name, 'reward, mean')}</small>"
        rows.append([told, *(bar(s[name], most) if name in s else "" for s in scores)])
    text = f"<h2>Held-out questions</h2>{table(head, rows)}<p>{esc(scores[-1]['protocol'])}</p>"
    if len(records) > 1:
        good = [{r["id"]: outcome(r) in GOOD for r in each} for each in (records[0], records[-1])]
        (gained, lost, p), common = gains(*good), len(good[0].keys() & good[1].keys())
        changed = f"From {head[1]} to {head[-1]}, {common} questions in both: {gained} gained (✓ now only), {lost} lost"
        chance = f"p {p:.2g}" if p >= 0.001 else "p below 0.001"
        text += f"<p><b>{changed}</b>; {chance} if each change were a coin's toss (sign test).</p>"
    each = [s.get("categories", {}) for s in scores]
    score = next((name for name in ("AP", "accuracy") if each[-1] and name in next(iter(each[-1].values()))), None)
    if score:
        by = [[esc(name), *(bar(e[name][score]) if name in e else "" for e in each)] for name in sorted(each[-1])[:100]]
        more = f" (100 of {len(each[-1])})" if len(each[-1]) > 100 else ""
        text += f"<details open><summary>{score} by category{more}</summary>{table(head, by)}</details>"
    return text


def answers(evaluations: Sequence[Path]) -> str:
    """Return answers with their pictures: the same questions in the first and last evaluation, the last by outcome."""
    first, last, left = evaluations[0], evaluations[-1], ANSWERS
    shown = {folder: [r for r in rows_of(folder / "predictions.jsonl") if thumbnail_of(folder, r).exists()]
             for folder in (first, last)}  # fmt: skip

    def card(folder: Path, r: dict) -> str:
        nonlocal left
        image = embedded(answer_picture(folder, r)) if left > 0 else ""
        left -= len(image)
        image = f'<img src="{image}" alt="">' if image else "<i>picture left out: the page would grow too large</i>"
        earned = ", ".join(f"{esc(name)} {value:.2f}" for name, value in r["rewards"].items())
        true = "No Objects" if r["solution"] == [] else "" if r["size"] else esc(r["solution"], 200)
        asked = r["question"] if r["category"] == "object" and r.get("question") else r["category"]
        head = f"<b>{esc(asked, 200)}</b> · {OUTCOMES[outcome(r)].partition(':')[0]} · {esc(name_of(folder))}"
        told = f"{head}<br>{earned}{'<br>true: ' * bool(true)}{true}<pre>{esc(r['completion'], 600)}</pre>"
        return f"<figure>{image}<figcaption>{told}</figcaption></figure>"

    text, now = "", {r["id"]: r for r in shown[last]}
    both = [r for r in shown[first] if r["id"] in now] if first != last else []
    if both:
        chosen = [both[i] for i in evenly(len(both), SIDE_BY_SIDE)]
        pairs = "".join(f"<div class=pair>{card(first, r)}{card(last, now[r['id']])}</div>" for r in chosen)
        text = f"<h2>The same questions: {esc(name_of(first))} (left), {esc(name_of(last))} (right)</h2>{LEGEND}"
        text += f"<p>Evenly spaced among those whose pictures were kept.</p><div class=row>{pairs}</div>"
    text += f"<h2>Answers of {esc(name_of(last))} by outcome</h2>{LEGEND}" if shown[last] else ""
    for kind, told in OUTCOMES.items():
        if of := [r for r in shown[last] if outcome(r) == kind]:
            cards = [card(last, of[i]) for i in evenly(len(of), PER_OUTCOME)]
            text += f"<h3>{told}</h3><div class=row>{''.join(cards)}</div>"
    return text


def groups_of(folder: Path) -> str:
    """Return the kept groups of a run: the picture with all boxes, and every completion with its rewards as bars."""
    file, text = folder / "groups.json", ""
    for group in json.loads(file.read_text(encoding="utf-8")) if file.exists() else []:
        best_first = sorted(enumerate(group["completions"], 1), key=lambda pair: -pair[1]["advantage"])
        marks = [Mark(tuple(box)) for box in group["boxes"]]
        for number, c in reversed(best_first):
            color = BETTER if c["advantage"] > 0 else WORSE if c["advantage"] < 0 else EQUAL
            marks += [Mark(tuple(box), color, f"{number}", dashed=c["advantage"] < 0) for box in c["boxes"]]
        image = embedded(draw_boxes(opened(group["picture"]), group["size"], marks))
        parts = list(group["completions"][0]["rewards"])
        most = {name: max(1.0, *(c["rewards"][name] for c in group["completions"])) for name in parts}
        rows = [
            [f"{number}", f"{c['advantage']:+.2f}", *(bar(c["rewards"][name], most[name]) for name in parts),
             f"<pre>{esc(c['text'], 600)}</pre>"]
            for number, c in best_first
        ]  # fmt: skip
        mean = sum(c["reward"] for c in group["completions"]) / len(best_first)
        asked = esc(group["question"] or group["category"], 400)
        true = esc("No Objects" if group["solution"] == [] else group["solution"], 200)
        told = table(["#", "advantage", *map(esc, parts), "completion"], rows)
        text += (f"<h3>{KINDS[group['kind']]}: mean reward {mean:.2f}</h3><p>Asked: <b>{asked}</b> True: <b>{true}</b>"
                 f'</p><div class=group><figure><img src="{image}" alt=""></figure>{told}</div>')  # fmt: skip
    return f"<h2>Groups of step {group['step']} of {esc(name_of(folder))}</h2>{GROUPS}{text}" if text else ""


def all_curves(runs: Sequence[Path]) -> str:
    """Return a small figure per logged metric; those that never change are listed by name."""
    if not PLOTS:
        return "<p>The curves need matplotlib: pip install matplotlib</p>" if runs else ""
    logged = {str(folder): rows_of(folder / "metrics.jsonl") for folder in runs}
    names = dict.fromkeys(name for rows in logged.values() for row in rows for name in row if name != "step")
    values = {name: {row[name] for rows in logged.values() for row in rows if name in row} for name in names}
    changing = [name for name in names if len(values[name]) > 1]
    changing.sort(key=lambda name: (not name.startswith("reward"), name == "lr" or "seconds" in name))
    images = "".join(f'<img class=curve src="{as_svg(curves(logged, [n]))}" alt="{esc(n)}">' for n in changing)
    constant = ", ".join(f"{esc(name)} {min(values[name]):g}" for name in names if name not in changing)
    never = f"<p>Never changed: {constant}.</p>" if constant else ""
    return f"<h2>Curves</h2><div class=row>{images}</div>{never}" if changing else never


def pairs_of(folder: Path) -> str:
    """Return the pictures of preference pairs that mia_dpo.py build drew for the pairs of a run."""
    source = config_of(folder).get("pairs")
    found = sorted((Path(source).with_suffix("") / "pictures").glob("*.png"))[:PER_OUTCOME] if source else []
    text = ""
    for file in found:
        with Image.open(file) as picture:
            picture.thumbnail((900, 900))
            text += f'<figure><img src="{embedded(picture.convert("RGB"))}" alt=""></figure>'
    return f"<h2>Preference pairs</h2>{PAIRS}{text}" if text else ""


def write_report(folders: Sequence[Path], file: Path) -> None:
    """Write a page about runs and evaluations; with a single run, about its first and its last evaluation too."""
    runs = [folder for folder in folders if (folder / "metrics.jsonl").exists()]
    inside = sorted(file.parent for file in folders[0].glob("eval_*/scores.json")) if len(folders) == 1 else []
    evaluations = [folder for folder in folders if (folder / "scores.json").exists()]
    evaluations += inside if len(inside) < 3 else [inside[0], inside[-1]]  # those between have their own pages
    parts = [what_is_rewarded(runs or folders)]
    parts += [scores_of(evaluations), answers(evaluations)] if evaluations else []
    parts += [all_curves(runs), *map(groups_of, runs[:2]), *map(pairs_of, runs[:1]), what_ran(folders)]
    title = "ViRFT: " + ", ".join(map(name_of, folders))
    head, foot = PAGE.split("BODY")
    write_whole(file, "\n".join([head.replace("TITLE", html.escape(title)), *filter(None, parts), foot]))


MEANS = {  # of scores; any other is the mean of a reward
    "parsed": "share of answers that could be read", "no_objects": "share of answers that say No Objects",
    "empty_think": "share of thoughts without a word", "AP": "average precision over IoUs of 0.5 to 0.95, 1 is perfect",
    "AP50": "a box counts from IoU 0.5", "AP75": "a box counts from IoU 0.75", "accuracy": "share of right answers",
    "published_accuracy": "by the paper's rule", "mean_iou": "of boxes",
    "cumulative_iou": "all intersections / all unions, of boxes", "iou_above_0.5": "share of answers",
}  # fmt: skip
GOOD = ("found", "right")
KINDS = {"widest": "Most different rewards", "best": "Highest rewards", "worst": "Lowest rewards"}
REWARDED = (
    "<p>Rules, not people, score every answer. GRPO samples several answers to a question, compares their scores, "
    "and makes the better ones likelier. Other scores on this page were measured, not rewarded.</p>"
)
LEGEND = (
    "<p class=legend><b class=t>solid green: true box</b> <b class=a>dashed magenta: answered box</b> with its best "
    "IoU (intersection / union, 1 if equal) or, where nothing is true, its confidence. Texts have boxes in the model's "
    "coordinates, often 0 to 1000.</p>"
)
GROUPS = (
    "<p class=legend>All answers to one question, the largest advantage first; a box has the # of its answer. An "
    "advantage tells how far a reward is above those of the group. <b class=t>green: true</b> <b class=g>solid blue: "
    "positive, made likelier</b> <b class=w>dashed orange: negative, made less likely</b> gray: 0.</p>"
)
PAIRS = "<p>Green: the part that was asked about. Numbers: shares of the attention on the pictures.</p>"
PAGE = """<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content="width=device-width">
<meta http-equiv=Content-Security-Policy content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>TITLE</title><style>
body{font:15px/1.5 system-ui,sans-serif;margin:0 auto;max-width:1300px;padding:0 12px;color:#222}
h1,h2,h3{line-height:1.2}h2{border-top:2px solid #ccc;padding-top:12px}img{max-width:100%;height:auto}
table{border-collapse:collapse;font-size:13px}ul{margin:0;padding-left:16px}
td,th{padding:3px 8px;border-bottom:1px solid #ddd;text-align:left;vertical-align:top}
pre{white-space:pre-wrap;overflow-wrap:anywhere;font-size:12px;margin:2px 0;max-height:15em;overflow:auto}
.wide{overflow-x:auto}.row,.pair,.group{display:flex;flex-wrap:wrap;gap:10px;margin:8px 0}
figure{margin:0;flex:0 1 300px;font-size:13px}.pair{border:1px solid #ddd;padding:6px}
.group figure{flex:0 1 460px}.group .wide{flex:1 1 500px}
.curve{flex:0 1 300px;max-width:300px}
.bar{display:inline-block;width:60px;height:9px;background:#eee;border:1px solid #999}
.bar i{display:block;height:100%;background:#0057d9}
.t{color:#00803a}.a{color:#d6006d}.g{color:#0057d9}.w{color:#c25400}.legend b{margin-right:14px}
</style><h1>TITLE</h1>
<p>A model answers questions about pictures: scores, answers and curves of the folders named above.</p>
BODY</html>
"""


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, metavar="RUN")
    parser.add_argument("--out", type=Path, help="the file to write; by default report.html in the first folder")
    args = parser.parse_args(argv)
    for folder in args.folders:
        if not any((folder / name).exists() for name in ("metrics.jsonl", "scores.json")):
            parser.error(f"{folder} holds no run (metrics.jsonl) and no finished evaluation (scores.json)")
    file = args.out or args.folders[0] / "report.html"
    file.parent.mkdir(parents=True, exist_ok=True)
    write_report(args.folders, file)
    print(f"{file}, {file.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
