"""Gates trained on a base that FSDP2 shards over two processes equal those of one process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import loraweave as lw
import tiny

WORKER = Path(__file__).parent / "fsdp_worker.py"


def run(out: Path, processes: int) -> list[dict[str, torch.Tensor]]:
    out.mkdir()
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    paths = os.pathsep.join([str(Path(lw.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [*(launch if processes > 1 else [sys.executable]), str(WORKER), str(out)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return [load_file(out / f"rank{rank}.safetensors") for rank in range(processes)]


@pytest.mark.slow
def test_a_sharded_base_trains_the_same_gates(tmp_path: Path) -> None:
    (alone,) = run(tmp_path / "one", 1)
    first, second = run(tmp_path / "two", 2)
    start = dict(tiny.randomize(tiny.attached("llama", lw.MoLE())).gate_parameters())
    assert any(not torch.equal(alone[name.replace("/", ":")], p) for name, p in start.items()), "nothing was trained"
    for name, expected in alone.items():
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(first[name], expected, atol=1e-5, rtol=1e-4)
