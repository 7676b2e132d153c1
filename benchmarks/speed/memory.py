"""Peak memory, each figure in a process of its own: ``python -m speed.memory KIND SIZE EXPERTS``."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from speed.models import Size
    from speed.place import Place

ATTACHING = ("attach: bare", "attach: peft all", "attach: sum")
IMAGES = ("image: peft 1", "image: composite", "image: composite, chunk 1")


def peak_of(kind: str, size: Size, experts: Path, threads: int, place: Place, shapes: str) -> dict[str, int]:
    """Run one kind of work in a child process.

    Args:
        kind: key of ``training.STEPS``, or of ``ATTACHING`` or ``IMAGES``.
        size: the decoder's shapes.
        experts: the folder that holds the experts' folders or files.
        threads: of the child.
        place: where its models are.
        shapes: by which name of ``denoisers.IMAGE_SIZES`` a denoiser is made.

    Returns:
        ``peak`` and ``before`` (all is loaded, no step run yet): resident bytes, or those taken of a GPU's memory; of
        attaching also ``files``, the size of what is attached.
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])}
    environment["OMP_NUM_THREADS"] = str(threads)
    command = [sys.executable, "-m", f"{__package__}.memory", kind, json.dumps(asdict(size)), str(experts)]
    command += [place.device, place.dtype, shapes]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the child that measures {kind!r} failed:\n{done.stderr}")
    report: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    if kind in ATTACHING:
        report["files"] = sum(file.stat().st_size for file in experts.rglob("*.safetensors"))
    return report


def _status(field: str) -> int:
    """A field of ``/proc/self/status`` in bytes.

    Not ``resource.ru_maxrss``: Linux hands that down from the parent through fork and exec, and ours is large.
    """
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def _work(kind: str, size: Size, experts: Path, place: Place, shapes: str) -> Callable[[], object]:
    if kind in IMAGES:
        from speed.denoisers import IMAGE_SIZES, make_image_bench
        from speed.images import pictures

        bench = make_image_bench(IMAGE_SIZES["images"][shapes], experts, place)
        return pictures(bench)[kind.removeprefix("image: ")]
    from speed.models import make_bench
    from speed.ours import ungated
    from speed.peers import peft_all
    from speed.training import STEPS

    made = make_bench(size, experts, place)
    if kind in STEPS:
        return STEPS[kind](made)
    attach = {"attach: bare": lambda _: made.base, "attach: peft all": peft_all, "attach: sum": ungated}[kind]
    kept: list[object] = []
    return lambda: kept or kept.append(attach(made))


def _main(kind: str, size: str, experts: str, device: str, dtype: str, shapes: str) -> None:
    from speed.models import Size
    from speed.place import Place

    place = Place(device, dtype)
    run = _work(kind, Size(**json.loads(size)), Path(experts), place, shapes)
    before = _taken(place)[0]
    for _ in range(1 if kind in IMAGES else 3):
        run()
    print(json.dumps({"peak": _taken(place)[1], "before": before}))


def _taken(place: Place) -> tuple[int, int]:
    """Bytes that are taken now, and the most there were."""
    if place.on_cpu:
        return _status("VmRSS"), _status("VmHWM")
    import torch

    return torch.cuda.memory_allocated(place.device), torch.cuda.max_memory_allocated(place.device)


if __name__ == "__main__":
    _main(*sys.argv[1:])
