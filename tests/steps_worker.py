"""Two optimizer steps of every loss, written down: what test_scale.py launches in one process and in several.

    python tests/steps_worker.py OUT [virft.py flags]

With plain SGD, so that weights after a step show the gradient itself, and with gradients as they are (no clipping).
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402
from accelerate.utils import gather_object  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from torch.distributed.fsdp._fully_shard import _fsdp_param_group  # noqa: E402

import virft  # noqa: E402
from extras import shards  # noqa: E402

FLAGS = [
    "--task", "coco", "--prompts_per_step", "8", "--micro_batch", "16", "--max_completion_tokens", "32",
    "--workers", "0", "--negatives", "0.3", "--seed", "4", "--steps", "3", "--lr", "0.05",
]  # fmt: skip


def make_run(flags: list[str]) -> virft.Run:
    virft.MAX_GRAD_NORM = 1e9
    run = virft.start(virft.parse_config([*FLAGS, *flags]))
    run.optimizer = torch.optim.SGD([p for p in run.model.parameters() if p.requires_grad], lr=0.05)
    return run


def whole(run: virft.Run, gradients: bool) -> dict[str, torch.Tensor]:
    tensors = {n: p.grad if gradients else p for n, p in run.model.named_parameters() if p.requires_grad}
    reached = {n: t for n, t in tensors.items() if t is not None}  # the tower's last norm has no path to the loss
    return {n: (t.full_tensor() if hasattr(t, "full_tensor") else t).detach().clone() for n, t in reached.items()}


def two_steps(run: virft.Run) -> tuple[dict[str, torch.Tensor], list]:
    """Gradients and weights of two steps, and what was sampled."""
    tensors, sampled = {}, []
    for step, prompts in run.steps():
        if step == 3:
            return tensors, sampled

        def note(optimizer, args, kwargs, step=step):
            tensors.update({f"{step}/gradient/{n}": t for n, t in whole(run, True).items()})

        hook = run.optimizer.register_step_pre_hook(note)
        ro = virft.rollout(run, prompts, step)
        virft.update(run, ro)
        hook.remove()
        tensors |= {f"{step}/weight/{n}": t for n, t in whole(run, False).items()}
        sampled += gather_object(ro.rows(step))


def odd_rollouts(run: virft.Run) -> dict[str, float]:
    """Steps in which only the last process meets something odd, each followed by an ordinary one; shares of skipped
    updates.
    """
    odd = {
        "no variance": lambda ro: ro._replace(advantages=torch.zeros_like(ro.advantages)),
        "all truncated": lambda ro: ro._replace(truncated=torch.ones_like(ro.truncated)),
        "empty completions": lambda ro: ro._replace(
            ids=run.eos[:1].expand(ro.ids.shape).clone(), mask=torch.arange(ro.ids.shape[1]).expand(ro.ids.shape) < 1
        ),
        "not finite": lambda ro: ro._replace(advantages=ro.advantages * float("nan")),
    }
    skipped, stream = {}, [prompts for _, prompts in run.steps()]
    last = run.accelerator.process_index == run.accelerator.num_processes - 1
    for step, (name, change) in enumerate(odd.items(), 1):
        for prompts, spoil in zip(stream, (last, False)):
            ro = virft.rollout(run, prompts, step)
            values = virft.update(run, change(ro) if spoil else ro).reduce(run.accelerator)
            skipped[name if name not in skipped else f"after {name}"] = values["skipped_updates"]
    return skipped


def resampled(run: virft.Run) -> tuple[list, int]:
    """A rollout with --resample and --normalize each whose rewards are equal in some groups, on unequal processes."""
    rewards, run.cfg.resample, run.cfg.normalize = run.rewards, 2, "each"
    long = lambda completion, solution: float(len(completion) > 75)  # noqa: E731
    run.rewards = {"long": (long, 1.0), "vowels": (lambda completion, solution: completion.count("1") // 4, 0.5)}
    ro = virft.rollout(run, next(run.steps())[1], 1)
    run.rewards, run.cfg.resample, run.cfg.normalize = rewards, 0, "sum"
    rows = [record | {"advantage": round(record["advantage"], 4)} for record in gather_object(ro.rows(1))]
    return sorted(rows, key=lambda record: json.dumps(record)), sum(gather_object([ro.thrown_away]))


def main() -> None:
    out, flags = Path(sys.argv[1]), sys.argv[2:]
    gathers = 0
    plain = _fsdp_param_group.foreach_all_gather

    def counted(*args, **kwargs):
        nonlocal gathers
        gathers += 1
        return plain(*args, **kwargs)

    _fsdp_param_group.foreach_all_gather = counted
    tensors, facts = {}, {}
    for loss in virft.NORMALIZATIONS:
        run = make_run([*flags, "--loss", loss])
        found, sampled = two_steps(run)
        tensors |= {f"{loss}/{name}": tensor for name, tensor in found.items()}
        facts[loss] = sorted(sampled, key=lambda record: json.dumps(record))
    facts["units"] = len(shards.parts(run.model))
    gathers = 0
    virft.rollout(run, next(run.steps())[1], 1)
    facts["gathers in a rollout"] = gathers
    facts["resampled"], facts["thrown away"] = resampled(run)
    run.cfg.mask_truncated = True
    facts["skipped"] = odd_rollouts(run)
    weights = torch.cat([t.flatten() for t in whole(run, False).values()])
    if not run.cfg.shard:  # copies must stay equal; shards are one model by nature
        facts["copies"] = gather_object([weights.double().sum().item()])
    facts["finite"] = bool(weights.isfinite().all())
    if run.accelerator.is_main_process:
        save_file(tensors, out / "tensors.safetensors")
        (out / "facts.json").write_text(json.dumps(facts))
    virft.finish(run)


if __name__ == "__main__":
    main()
