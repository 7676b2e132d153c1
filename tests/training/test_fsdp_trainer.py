"""``GateTrainer`` and ``lw.train`` under accelerate's FSDP2: two processes end where one does, resumed or not."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import lessons
import pytest
import torch
from accelerate.utils import FullyShardedDataParallelPlugin
from safetensors.torch import load_file
from torch import nn
from torch.testing import assert_close

import loraweave as lw
from loraweave.errors import LoraweaveError
from loraweave.training import sharded

WORKER = Path(__file__).parent / "fsdp_trainer_worker.py"
PAGE = Path(__file__).parents[2] / "docs" / "scale.md"


def run(out: Path, *launcher: str) -> None:
    out.mkdir()
    paths = os.pathsep.join([str(Path(lw.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, *launcher, str(WORKER), str(out)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def documented(folder: Path) -> Path:
    """The accelerate configuration that the documentation shows, as a file."""
    (shown,) = re.findall(r"```yaml\n( *compute_environment.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    file = folder / "fsdp.yaml"
    file.write_text(textwrap.dedent(shown))
    return file


@pytest.mark.slow
def test_two_processes_end_where_one_does(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    run(one)
    launcher = ("-m", "accelerate.commands.launch", "--config_file", str(documented(tmp_path)))
    run(two, *launcher, "--main_process_port", "0")
    alone = load_file(one / "rank0.safetensors")
    start = lessons.gates(lessons.mixture("llama"))
    for prefix in ("", "train "):
        changed = {name.rpartition("/")[2] for name, p in start.items() if not torch.equal(alone[prefix + name], p)}
        assert changed >= {"e", "standard.spread"}, "nothing was trained, or measured"
    assert alone["after"] < alone["before"]
    first, second = load_file(two / "rank0.safetensors"), load_file(two / "rank1.safetensors")
    for name, expected in alone.items():
        assert name.endswith("losses") or torch.equal(first[name], second[name]), name
        assert_close(first[name], expected, atol=1e-5, rtol=1e-3)
    for rank in range(2):
        resumed = load_file(two / f"resumed{rank}.safetensors")
        for name, expected in resumed.items():
            assert_close(first[name], expected, atol=1e-6, rtol=1e-5)
    checkpoint = {path.name for path in (two / "checkpoint-4").iterdir()}
    assert "gates.safetensors" in checkpoint
    assert not any("model" in name for name in checkpoint), "the base is not written"


class Plugged:
    """What :func:`keep_whole` asks of an accelerator."""

    def __init__(self, plugin: FullyShardedDataParallelPlugin) -> None:
        self.state, self.fsdp_plugin, self.device = self, plugin, torch.device("cpu")


def test_what_cannot_leave_gates_whole_says_so() -> None:
    gate = nn.Linear(1, 1)
    efficient = FullyShardedDataParallelPlugin(fsdp_version=2, cpu_ram_efficient_loading=True)
    with pytest.raises(LoraweaveError, match=r"cpu_ram_efficient_loading: expected False"):
        sharded.keep_whole(Plugged(efficient), [gate])  # type: ignore[arg-type]
    old = FullyShardedDataParallelPlugin(fsdp_version=1, cpu_ram_efficient_loading=False)
    with pytest.raises(LoraweaveError, match=r"version: expected 2 .*, got 1"):
        sharded.keep_whole(Plugged(old), [gate])  # type: ignore[arg-type]
    named = FullyShardedDataParallelPlugin(fsdp_version=2, cpu_ram_efficient_loading=False, ignored_modules="head")
    with pytest.raises(LoraweaveError, match=r"ignored_modules: expected modules, got the pattern 'head'"):
        sharded.keep_whole(Plugged(named), [gate])  # type: ignore[arg-type]
