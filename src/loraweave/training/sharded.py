"""Gates on a base that accelerate shards with FSDP2: they stay whole on every process and average their gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import chain
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from torch import nn
from transformers import TrainerCallback

from loraweave.errors import LoraweaveError


@torch.no_grad()
def keep_whole(accelerator: Accelerator, gates: Iterable[nn.Module]) -> None:
    """Have FSDP2 shard the base alone: it takes no scalar parameters, which gates have, and gates are small.

    All processes start from the first one's gates, as under DDP.

    Raises:
        LoraweaveError: FSDP1, or a base of which only the first process holds the weights.
    """
    plugin: Any = accelerator.state.fsdp_plugin
    if plugin.fsdp_version != 2:
        raise LoraweaveError(
            f"fsdp_config version: expected 2 for gate training, got {plugin.fsdp_version}: FSDP1 cannot leave gates "
            "out; set fsdp_config={'version': 2}, or fsdp_version: 2 in accelerate's file"
        )
    if plugin.cpu_ram_efficient_loading:
        raise LoraweaveError(
            "fsdp_config cpu_ram_efficient_loading: expected False for gate training, got True: it empties the model, "
            "and the attached experts with it; load the base on every process"
        )
    if isinstance(plugin.ignored_modules, str):
        raise LoraweaveError(
            f"fsdp_config ignored_modules: expected modules, got the pattern {plugin.ignored_modules!r}; "
            "gate training must add the gates to them"
        )
    whole = [gate.to(accelerator.device) for gate in gates]
    for gate in whole:
        for tensor in chain(gate.parameters(), gate.buffers()):
            tensor.copy_(broadcast(tensor.clone()))
    plugin.ignored_modules = [*(plugin.ignored_modules or ()), *whole]


@torch.no_grad()
def average_gradients(accelerator: Accelerator, parameters: Iterable[nn.Parameter]) -> None:
    """Average gradients over all processes, in one message, as DDP does; those that no process has stay ``None``."""
    learning = [p for p in parameters if p.requires_grad]
    flat = [torch.zeros_like(p) if p.grad is None else p.grad for p in learning]
    present = torch.tensor([float(p.grad is not None) for p in learning], device=accelerator.device)
    mean: Any = accelerator.reduce(torch.cat([present, *(gradient.flatten() for gradient in flat)]), "mean")
    shared, *parts = mean.split([len(learning), *(p.numel() for p in learning)])
    for p, part, anyone in zip(learning, parts, shared.tolist(), strict=True):
        p.grad = part.view_as(p).to(p.dtype) if anyone else None


class OnceSharded(TrainerCallback):
    """Does something when the base is sharded, before the first step."""

    def __init__(self, task: Callable[[], None]) -> None:
        self.task = task

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.task()
