#!/usr/bin/env bash
# Sets everything up in .venv the first time, then runs:
#
#   bash run.sh                          the offline demo: evaluate, train with GRPO, evaluate again
#   bash run.sh demo --seed 1            the same, its training with other flags of virft.py
#   bash run.sh demo FAMILY [flags]      the demo of detection (the default), classification, grounding or multi-image
#   bash run.sh demo mia-dpo [flags]     the demo of mia_dpo.py; flags that its build and train both know, such as --seed
#   bash run.sh controls                 what the demo's gain is compared with
#   bash run.sh breakages                the demo, broken in four ways: what each does to the curve
#   bash run.sh reproduce --data DIR     few-shot COCO as in the paper: evaluate, train 200 steps, evaluate; a row each
#   bash run.sh prove [--data DIR]       on a GPU: seconds, memory and TRL beside it in 30 minutes; a table row to send in
#   bash run.sh flash-attn               compile flash-attn for this GPU (it may take an hour); used where it is installed
#   bash run.sh test [pytest arguments]  the tests; -m slow runs the long ones
#   bash run.sh --task coco --data DIR --model NAME ...     your own training: accelerate launch virft.py ...
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

setup() {
    local gpu=none python=""
    if command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; then gpu=nvidia; fi
    local stamp=".venv/ready-$gpu-$(cksum <requirements.txt | tr -d ' ')"
    [ -e "$stamp" ] && return
    for name in python3 python3.11 python3.12 python3.13; do
        if "$name" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then python=$name; break; fi
    done
    [ -n "$python" ] || { echo "run.sh: Python 3.11 or newer with venv is needed" >&2; exit 1; }
    echo "Setting up .venv with $("$python" --version), once ..."
    "$python" -m venv --clear .venv
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --requirement requirements.txt
    if [ "$gpu" = nvidia ]; then
        .venv/bin/python -m pip install --quiet --disable-pip-version-check "$(pinned torchvision)"
    fi
    touch "$stamp"
}

# Print the version of a package that requirements.txt holds as a comment, because only NVIDIA machines get it.
pinned() { sed -n "s/^# \($1==.*\)/\1/p" requirements.txt; }

launch() {
    if nvidia-smi -L >/dev/null 2>&1; then accelerate launch --quiet "$@"; else
        # Told its defaults, or the launcher lists them at every start.
        accelerate launch --quiet --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no --cpu "$@"
    fi
}

demo() {
    local family=detection
    case "${1:-}" in
        detection | classification | grounding | multi-image) family=$1; shift ;;
        mia-dpo) shift; demo_mia_dpo "$@"; return ;;
        "" | --*) ;;
        *) echo "run.sh: no demo $1; there are detection, classification, grounding, multi-image and mia-dpo" >&2; exit 2 ;;
    esac
    local out=runs/demo model=demo/model pictures=(--val 400) evaluation=() task source training
    if [ "$family" != detection ]; then out+=_${family/-/_} model+=_${family/-/_}; fi
    source=(--data "$out/data")
    case $family in
        detection)
            task=coco evaluation=(--negatives 0.1)
            training=(--steps 340 --warmup_steps 20 --lr 6e-4 --negatives 0.3 --rewards iou=1 format=1) ;;
        classification)
            task=flowers training=(--steps 120 --lr 2.5e-4) ;;
        grounding)
            task=lisa training=(--steps 200 --lr 2.5e-4) ;;
        multi-image)
            task=rows source=(--data "$out/data/train.jsonl" --eval_data "$out/data/val.jsonl")
            training=(--steps 120 --lr 2.5e-4) ;;
    esac
    local common=(--num_processes 1 virft.py --task "$task" "${source[@]}" --max_completion_tokens 48)
    evaluation+=(--eval_only true --prompts_per_step 64)
    rm -rf "$out/before" "$out/train" "$out/after"
    python demo/shapes.py "$family" --out "$out/data" "${pictures[@]}"
    echo "1/3  before: the tiny model of $model answers held-out pictures"
    launch "${common[@]}" --model "$model" "${evaluation[@]}" --out "$out/before"
    echo "2/3  GRPO"
    launch "${common[@]}" --model "$model" --out "$out/train" \
        --prompts_per_step 16 --micro_batch 64 --group_size 8 --beta 0 "${training[@]}" "$@"
    echo "3/3  after"
    launch "${common[@]}" --model "$out/train/model" "${evaluation[@]}" --out "$out/after"
    python demo/report.py "$out"
}

demo_mia_dpo() {
    local out=runs/demo_mia_dpo model=demo/model_mia_dpo selection
    local questions=(--task rows --max_completion_tokens 8 --layouts sequence2 sequence3 grid4 --cell 56)
    evaluate_both() {  # MODEL FOLDER: asked about one of several pictures, and about the only one
        local common=(--task rows --model "$1" --think false --max_completion_tokens 8 --eval_only true --prompts_per_step 64)
        launch virft.py "${common[@]}" --data "$out/held_out/questions.jsonl" --out "$out/$2/several"
        launch virft.py "${common[@]}" --data "$out/data/val.jsonl" --out "$out/$2/single"
    }
    rm -rf "$out"
    python demo/shapes.py mia-dpo --out "$out/data" --val 800
    launch mia_dpo.py build "${questions[@]}" --data "$out/data/val.jsonl" --model "$model" --answers 0 --out "$out/held_out.jsonl"
    echo "before: the tiny model of $model answers held-out questions"
    evaluate_both "$model" before
    for selection in attention random; do
        echo "selection: $selection"
        launch mia_dpo.py build "${questions[@]}" --data "$out/data/train.jsonl" --model "$model" --out "$out/$selection.jsonl" \
            --selection "$selection" --limits sequence2=0.5 sequence3=0.333 grid4=0.25 --layer 1 --min_perplexity 1 --answers 4 --batch 32 "$@"
        launch mia_dpo.py train --pairs "$out/$selection.jsonl" --model "$model" --out "$out/$selection/train" \
            --epochs 3 --lr 5e-5 --gamma 0.5 --micro_batch 32 "$@"
        evaluate_both "$out/$selection/train/model" "$selection"
    done
    python demo/report.py "$out"
}

# Few-shot COCO with the paper's settings, which are the defaults of virft.py. More flags (--model, --eval_limit, ...) go to
# every part. The same command goes on where an earlier one was interrupted. Real COCO has a few boxes without area.
reproduce() {
    local out=runs/reproduce common=(virft.py --task coco --categories fewshot8 --skip_bad_images true) again=()
    case " $* " in *" --data "*) ;; *) echo "run.sh: reproduce needs --data DIR, a folder with COCO's annotations and images" >&2; exit 2 ;; esac
    if [ -e "$out/flags" ] && [ "$(cat "$out/flags")" != "$*" ]; then
        echo "run.sh: $out was begun with $(cat "$out/flags"): move it away, or give the same flags" >&2
        echo "        (flags that change no result, such as --micro_batch or --workers: remove $out/flags and go on)" >&2; exit 2
    fi
    echo "1/3  before"
    [ -e "$out/before/scores.json" ] || launch "${common[@]}" "$@" --eval_only true --out "$out/before"
    echo "$*" >"$out/flags"
    echo "2/3  GRPO"
    if [ ! -e "$out/train/finished" ]; then
        if compgen -G "$out/train/checkpoints/step_??????" >/dev/null; then again=(--resume true); else rm -rf "$out/train"; fi
        rm -rf "$out/train/model" "$out/after"  # what a training that failed may have left
        launch "${common[@]}" --shots 4 --steps 200 --save_every 50 "$@" --out "$out/train" "${again[@]}" ||
            { echo "run.sh: training did not finish; the same command goes on" >&2; exit 1; }
        touch "$out/train/finished"
    fi
    echo "3/3  after"
    [ -e "$out/after/scores.json" ] || launch "${common[@]}" "$@" --model "$out/train/model" --eval_only true --out "$out/after"
    python demo/report.py "$out" --paper
}

setup
export PATH="$PWD/.venv/bin:$PATH" VIRTUAL_ENV="$PWD/.venv" TOKENIZERS_PARALLELISM=false
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$(nproc 2>/dev/null || echo 4)}"
case "${1:-demo}" in
    demo) shift || true; export HF_HUB_OFFLINE=1; demo "$@" ;;
    controls | breakages) export HF_HUB_OFFLINE=1; python "demo/$1.py" "${@:2}" ;;
    reproduce) shift; reproduce "$@" ;;
    prove) shift; python bench/prove.py "$@" ;;
    flash-attn) python -m pip install ninja wheel && python -m pip install --no-build-isolation "$(pinned flash-attn)" ;;
    # Two workers, each with whole files, whose fixtures are made once; -n 0 runs everything in one process.
    test) shift; OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 python -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@" ;;
    --*) launch virft.py "$@" ;;
    *) sed -n '2,14p' run.sh | cut -c3-; exit 2 ;;
esac
