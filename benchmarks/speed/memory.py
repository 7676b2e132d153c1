"""Peak memory of a training step, measured in a process of its own: ``python -m speed.memory STEP SIZE EXPERTS``."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path


def peak_of(step: str, size: str, experts: Path, threads: int) -> dict[str, int]:
    """Run one kind of training step in a child process.

    Args:
        step: key of ``training.STEPS``.
        size: key of ``models.SIZES``.
        experts: the folder that holds the experts' folders.
        threads: of the child.

    Returns:
        ``peak`` and ``before`` (model and experts loaded, no step run yet): resident bytes.
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])}
    environment["OMP_NUM_THREADS"] = str(threads)
    command = [sys.executable, "-m", f"{__package__}.memory", step, size, str(experts)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the child that measures {step!r} failed:\n{done.stderr}")
    report: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return report


def _status(field: str) -> int:
    """A field of ``/proc/self/status`` in bytes.

    Not ``resource.ru_maxrss``: Linux hands that down from the parent through fork and exec, and ours is large.
    """
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def _main(step: str, size: str, experts: str) -> None:
    from speed.models import SIZES, make_bench
    from speed.training import STEPS

    run = STEPS[step](make_bench(SIZES[size], Path(experts)))
    before = _status("VmRSS")
    for _ in range(3):
        run()
    print(json.dumps({"peak": _status("VmHWM"), "before": before}))


if __name__ == "__main__":
    _main(*sys.argv[1:])
