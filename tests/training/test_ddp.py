"""Two processes that share a batch end where one process ends."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import loraweave as lw

WORKER = Path(__file__).parent / "ddp_worker.py"


def run(out: Path, architecture: str, processes: int, batch: int, balance: float) -> list[dict[str, torch.Tensor]]:
    out.mkdir()
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    python = launch if processes > 1 else [sys.executable]
    command = [*python, str(WORKER), architecture, str(batch), str(balance), str(out)]
    paths = os.pathsep.join([str(Path(lw.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return [load_file(out / f"rank{rank}.safetensors") for rank in range(processes)]


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["t5", "llama"])
def test_two_processes_equal_one(architecture: str, tmp_path: Path) -> None:
    (alone,) = run(tmp_path / "one", architecture, 1, 8, 0.0)
    first, second = run(tmp_path / "two", architecture, 2, 4, 0.0)
    for name, gate in alone.items():
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(first[name], gate, atol=1e-5, rtol=1e-4)
    assert (tmp_path / "two" / "checkpoint-4" / "gates.safetensors").is_file()


@pytest.mark.slow
def test_processes_agree_with_a_balance_loss(tmp_path: Path) -> None:
    first, second = run(tmp_path / "two", "t5", 2, 4, 0.5)
    assert all(torch.equal(gate, second[name]) for name, gate in first.items())
