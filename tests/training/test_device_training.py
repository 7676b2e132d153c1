"""Training on a device other than the CPU, as on a GPU: it takes its models and its data there, and learns the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import loraweave as lw
import methods
import tiny
from elsewhere import DEVICE, Elsewhere, accelerated, elsewhere, spread

DATA = [{"input": a, "target": b} for a in "abc" for b in ("xyz", "z")]
SETTINGS: dict[str, Any] = {"progress": False, "batch_size": 2}
QUICK, SLOW = ("mole",), ("cat", "mole-paper", "mole-token", "mole-topk", "mole-outputs", "mole-prompt", "lora_flow")


def both(monkeypatch: pytest.MonkeyPatch, run: Callable[[torch.device], Any]) -> None:
    here = run(torch.device("cpu"))
    with accelerated(monkeypatch):
        there = run(DEVICE)
    assert_close(there, here, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("architecture", ["llama", pytest.param("t5", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_gates_learn_the_same_elsewhere(architecture: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def learned(device: torch.device) -> list[Tensor]:
        mixture = tiny.attached(architecture, (methods.METHODS | methods.PROMPT)[name])
        lw.train(mixture, DATA, steps=3, tokenizer=tiny.tokenizer(architecture == "t5"), **SETTINGS)
        gates = [parameter for _, parameter in mixture.gate_parameters()]
        assert all(isinstance(gate, Elsewhere) == (device == DEVICE) for gate in gates)
        return [gate.detach().cpu() for gate in gates]

    both(monkeypatch, learned)


@pytest.mark.parametrize("architecture", ["llama", pytest.param("t5", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_a_model_on_two_devices_is_trained_as_a_whole_one(architecture: str, name: str) -> None:
    def learned(halves: bool) -> tuple[list[Tensor], dict[str, float]]:
        host = tiny.model(architecture)
        experts = tiny.experts(host, architecture)
        mixture = lw.attach(spread(host) if halves else host, experts, (methods.METHODS | methods.PROMPT)[name])
        log = lw.train(
            mixture, DATA, steps=3, balance=0.1, tokenizer=tiny.tokenizer(architecture == "t5"), **SETTINGS
        ).history[0]
        told = {key: value for key, value in log.items() if "loss" in key or "load" in key or "entropy" in key}
        return [gate.detach().cpu() for _, gate in mixture.gate_parameters()], told

    gates, told = learned(False)
    with elsewhere():
        gates_of_halves, told_of_halves = learned(True)
    assert_close(gates_of_halves, gates, atol=1e-5, rtol=1e-4)
    assert told_of_halves == pytest.approx(told, abs=1e-4)
    assert len(told) >= 2


@pytest.mark.slow
def test_what_is_searched_and_fused_is_the_same_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    def found(device: torch.device) -> Any:
        mixture = tiny.attached("t5", lw.Sum())
        mixture.model.to(device)
        searched = lw.search(mixture, DATA, tokenizer=tiny.tokenizer(), evaluations=6, **SETTINGS)
        host = tiny.model("t5")
        experts = tiny.experts(host, "t5")
        data = {name: DATA[2 * n : 2 * n + 2] for n, name in enumerate(experts)}
        fused = lw.fuse(host.to(device), experts, data, tokenizer=tiny.tokenizer(), **SETTINGS)
        return searched.weights, {path: f.scale * f.B.cpu() @ f.A.cpu() for path, f in fused.factors.items()}

    both(monkeypatch, found)
