"""A process that accelerate started among others finds out which it is, and then works by itself."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

import loraweave as lw
from loraweave.cli import main
from loraweave.cli.processes import Process, alone

STARTED = {
    "RANK": "3",
    "LOCAL_RANK": "1",
    "WORLD_SIZE": "4",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "node0",
    "MASTER_PORT": "29500",
    "ACCELERATE_MIXED_PRECISION": "no",
    "TORCHELASTIC_RUN_ID": "none",
    "GROUP_RANK": "1",
}


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*STARTED, "CUDA_VISIBLE_DEVICES", "ACCELERATE_USE_CPU"):
        # Set and taken away, so that what the code does to it is undone.
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


def test_alone_nothing_changes(capsys: pytest.CaptureFixture[str]) -> None:
    before = dict(os.environ)
    process = alone()
    assert process == Process(0, 1)
    assert process.main
    assert os.environ == before
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("asked", "lines"), [(1, 0), (2, 1)])
def test_one_process_where_several_were_wanted_is_said(asked: int, lines: int) -> None:
    """By accelerate's own launcher, which starts one where there are no several GPUs."""
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", str(asked)]
    say = "from loraweave.cli.processes import alone; print(alone())"
    done = subprocess.run(
        [*launch, "--no_python", sys.executable, "-c", say],
        env=os.environ | {"PYTHONPATH": str(Path(lw.__file__).parents[1]), "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    assert done.stdout == "Process(rank=0, count=1)\n"
    assert done.stderr.count("accelerate was asked for several processes and started one") == lines


@pytest.mark.parametrize(
    ("visible", "cpu", "seen"), [("4,7", "", "7"), ("5", "", "5"), ("", "", ""), ("4,7", "true", "")]
)
def test_one_of_several_takes_its_gpu(monkeypatch: pytest.MonkeyPatch, visible: str, cpu: str, seen: str) -> None:
    for name, value in {**STARTED, "CUDA_VISIBLE_DEVICES": visible, "ACCELERATE_USE_CPU": cpu}.items():
        monkeypatch.setenv(name, value)
    process = alone()
    assert process == Process(3, 4)
    assert not process.main
    assert os.environ["CUDA_VISIBLE_DEVICES"] == seen
    assert not {*STARTED, "ACCELERATE_USE_CPU"} & set(os.environ)


def test_a_command_parts_from_those_it_trained_with() -> None:
    """Else gloo's threads, which outlive Python, abort the process now and then."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    assert main(["version"]) == 0
    assert not dist.is_initialized()
    assert main(["version"]) == 0
