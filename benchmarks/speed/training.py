"""One training step: a LoRA with peft, and a mixture's gates with loraweave."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from speed.models import Bench, token_ids
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
    batch = token_ids(bench.size, bench.size.batch, bench.size.length)

    def loss() -> Tensor:
        value: Tensor = model(**batch, labels=batch["input_ids"], use_cache=False).loss
        return value

    return _step(loss, [p for p in model.parameters() if p.requires_grad])


STEPS: dict[str, Callable[[Bench], Step]] = {"peft LoRA": peft_lora}
