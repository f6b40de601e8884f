"""Take two updates on fixed completions in a GPU's dtypes and save gradients and weights, for test_memory.py.

    python tests/precision_worker.py OUT [virft.py flags]

A run with --resume true takes the second update only. Completions depend only on step and slot, because sampled
ones could differ between runs by rounding alone.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

import virft  # noqa: E402
from extras import checkpoints  # noqa: E402
from steps_worker import FLAGS, whole  # noqa: E402

C = 12


def given(run: virft.Run, prompts: list, step: int) -> virft.Rollout:
    G = run.cfg.group_size
    generators = [torch.Generator().manual_seed(100 * step + p.slot) for p in prompts]
    ids = torch.cat([torch.randint(300, 900, (G, C), generator=g) for g in generators])
    advantages = torch.cat([torch.randn(G, generator=g) for g in generators])
    ones = torch.ones(ids.shape)
    rewards = advantages.view(-1, G)
    return virft.Rollout(prompts, ids, ones, ones.bool(), ones[:, 0] < 0, [""] * len(ids), {}, rewards, advantages)


def main() -> None:
    out, flags = Path(sys.argv[1]), sys.argv[2:]
    virft.AUTOCAST, virft.MAX_GRAD_NORM = "cpu", 1e9
    run = virft.start(virft.parse_config([*FLAGS, "--steps", "2", "--group_size", "4", "--lr", "1e-4", *flags]))
    run.seconds["sample"], tensors = 1.0, {}
    for step, prompts in run.steps():
        run.seconds["sample"] = 1.0

        def note(optimizer, args, kwargs, step=step):
            tensors.update({f"{step}/gradient/{n}": t.float() for n, t in whole(run, True).items()})

        hook = run.optimizer.register_step_pre_hook(note)
        virft.update(run, given(run, prompts, step))
        hook.remove()
        run.done = step
        if step == 1:
            run.accelerator.wait_for_everyone()
            checkpoints.save(run)
        tensors |= {f"{step}/weight/{n}": t for n, t in whole(run, False).items()}
    virft.save_model(run)
    if run.accelerator.is_main_process:
        out.mkdir(parents=True, exist_ok=True)
        save_file({n: t.contiguous() for n, t in tensors.items()}, out / "tensors.safetensors")
    virft.finish(run)


if __name__ == "__main__":
    main()
