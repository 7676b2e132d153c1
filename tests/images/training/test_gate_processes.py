"""Two processes learn what one learns with the whole batch."""

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


def run(out: Path, processes: int, batch: int) -> Path:
    out.mkdir()
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    paths = os.pathsep.join([str(Path(lw.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [*(launch if processes > 1 else [sys.executable]), str(WORKER), str(batch), str(out)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


@pytest.mark.slow
def test_two_processes_share_a_batch(tmp_path: Path) -> None:
    alone, both = run(tmp_path / "one", 1, batch=2), run(tmp_path / "two", 2, batch=1)
    single = run(tmp_path / "half", 1, batch=1)
    for objective in ("clip", "masked", "denoising"):
        expected = load_file(alone / f"{objective}0.safetensors")
        first, second = (load_file(both / f"{objective}{rank}.safetensors") for rank in range(2))
        half = load_file(single / f"{objective}0.safetensors")
        for name, gate in expected.items():
            assert torch.equal(first[name], second[name]), name
            torch.testing.assert_close(first[name], gate, atol=1e-5, rtol=1e-4)
        assert any(not torch.allclose(half[name], gate, atol=1e-3) for name, gate in expected.items())
