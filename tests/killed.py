"""virft.py that kills itself with SIGKILL at a moment given: what test_resume.py launches again and again.

    python tests/killed.py MOMENT [virft.py flags]

MOMENT  never | model | optimizer | rename | prune (in that part of the first checkpoint that is saved), or seconds
after the first step began
"""

import os
import shutil
import signal
import sys
import threading
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import virft  # noqa: E402
from extras import checkpoints  # noqa: E402


def die(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)


def main() -> None:
    moment, argv = sys.argv[1], sys.argv[2:]
    if moment == "model":

        def gathered_moments(run):  # comes after the model is written
            (folder,) = (Path(run.cfg.out) / "checkpoints").glob("*.unfinished")
            whole = folder / "model" / "model.safetensors"
            if whole.exists():
                whole.write_bytes(whole.read_bytes()[:5000])  # as in the middle of this file
            die()

        checkpoints.gathered_moments = gathered_moments
    elif moment == "optimizer":
        checkpoints.save_file = die
    elif moment == "rename":
        checkpoints.os.fsync = die
    elif moment == "prune":
        plain_remove = shutil.rmtree

        def remove(path, **how):
            written = sorted(Path(path).rglob("*.json")) if "step_" in str(path) else []
            if written:  # not the empty folder that an earlier kill may have left
                written[0].unlink()
                die()
            plain_remove(path, **how)

        checkpoints.shutil.rmtree = remove
    elif moment != "never":
        plain, started = virft.sampled, []

        def sampled(*args):
            if not started:
                started.append(True)
                threading.Timer(float(moment), die).start()
            return plain(*args)

        virft.sampled = sampled  # `train` holds `rollout` as a default
    virft.main(argv)


if __name__ == "__main__":
    main()
