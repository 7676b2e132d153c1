"""Contenders for one batch with many mixtures: each of 16 rows has its own, as servers of many LoRAs have it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import loraweave as lw
from speed.models import Bench
from speed.ours import attach
from speed.peers import Contender, peft_all

BATCH, MIXTURES = 16, 8


def mixtures(bench: Bench) -> list[dict[str, float]]:
    """Two experts a row; after ``MIXTURES`` rows the mixtures come again."""
    names = bench.size.names
    pairs = [(names[i % len(names)], names[(i + 1) % len(names)]) for i in range(MIXTURES)]
    return [{pairs[row % MIXTURES][0]: 0.75, pairs[row % MIXTURES][1]: 0.5} for row in range(BATCH)]


def experts(bench: Bench) -> list[str]:
    """One expert a row."""
    return [bench.size.names[row % MIXTURES % len(bench.size.names)] for row in range(BATCH)]


def one_mixture(bench: Bench) -> nn.Module:
    return attach(bench, lw.Sum(0.0, mixtures(bench)[0])).model


def many_mixtures(bench: Bench) -> nn.Module:
    mixture = attach(bench, lw.Sum())
    bench.contexts.enter_context(mixture.rows(mixtures(bench)))
    return mixture.model


def many_experts(bench: Bench) -> nn.Module:
    mixture = attach(bench, lw.Sum())
    bench.contexts.enter_context(mixture.rows([{name: 1.0} for name in experts(bench)]))
    return mixture.model


class AdapterARow(nn.Module):
    """peft's batches of several adapters: it is told the adapter of every row with every call."""

    def __init__(self, model: Any, names: list[str]) -> None:
        super().__init__()
        self.model = model
        self.names = names

    def forward(self, **inputs: Any) -> Any:
        return self.model(**inputs, adapter_names=self.names)

    def generate(self, **inputs: Any) -> torch.Tensor:
        ids: torch.Tensor = self.model.generate(**inputs, adapter_names=self.names)
        return ids


def peft_rows(bench: Bench) -> nn.Module:
    return AdapterARow(peft_all(bench), experts(bench)).eval()


ROWS = (
    Contender("one mixture", "loraweave, the same two experts in all rows", one_mixture),
    Contender("8 mixtures", "loraweave, two experts a row, 8 different pairs", many_mixtures),
    Contender("8 experts", "loraweave, one expert a row, 8 different ones", many_experts),
    Contender("peft, 8 experts", "peft, one adapter a row (adapter_names)", peft_rows),
)
