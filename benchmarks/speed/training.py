"""One training step: a LoRA with peft, and a mixture's gates with loraweave."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

import loraweave as lw
from loraweave.training import objective
from speed.models import Bench, token_ids
from speed.ours import attach
from speed.peers import peft_with

Step = Callable[[], None]


def _step(loss: Callable[[], Tensor], parameters: Iterable[nn.Parameter]) -> Step:
    """Forward, backward and an AdamW update."""
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)

    def step() -> None:
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()

    return step


def peft_lora(bench: Bench) -> Step:
    """Train one LoRA of the experts' rank."""
    model = peft_with(bench, bench.size.names[:1], trainable=True).train()
    batch = token_ids(bench, bench.size.batch, bench.size.length)

    def loss() -> Tensor:
        value: Tensor = model(**batch, labels=batch["input_ids"], use_cache=False).loss
        return value

    return _step(loss, [p for p in model.parameters() if p.requires_grad])


def mole_block(bench: Bench) -> Step:
    """Train the gates of a block-wise MoLE over all experts; what :class:`loraweave.GateTrainer` does in a step."""
    policy = lw.MoLE(granularity="block")
    mixture = attach(bench, policy)
    mixture.model.train()
    batch = token_ids(bench, bench.size.batch, bench.size.length)

    def loss() -> Tensor:
        task: Tensor = mixture.model(**batch, labels=batch["input_ids"], use_cache=False).loss
        return task + policy.balance * objective.balance(mixture.sites)

    return _step(loss, [p for _, p in mixture.gate_parameters() if p.requires_grad])


STEPS: dict[str, Callable[[Bench], Step]] = {"peft LoRA": peft_lora, "mole block": mole_block}
