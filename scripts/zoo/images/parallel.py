"""Two or more one-thread workers that average their weights every few steps, checkpoints, and the clock."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


def join(rank: int, workers: int, work: Path) -> None:
    """Makes this process one of the workers."""
    torch.set_num_threads(1)
    store = f"file://{(work / 'rendezvous').resolve()}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=workers)


@torch.no_grad()
def average(parameters: list[torch.nn.Parameter], spent: float) -> float:
    """Averages weights over the workers; returns the first worker's clock, so that all agree on it."""
    clock = torch.tensor([spent if dist.get_rank() == 0 else 0.0])
    flat = torch.cat([*(p.data.flatten() for p in parameters), clock])
    dist.all_reduce(flat)
    at = 0
    for parameter in parameters:
        parameter.data.copy_(flat[at : at + parameter.numel()].view_as(parameter) / dist.get_world_size())
        at += parameter.numel()
    return flat[-1].item()


def rate(step: int, spent: float, budget: float, warmup: int = 100) -> float:
    """The factor of the learning rate: warm-up by steps, then a cosine by the clock."""
    return min(1.0, (step + 1) / warmup) * max(0.02, 0.5 * (1 + math.cos(math.pi * min(1.0, spent / budget))))


def save(path: Path, state: dict[str, Any]) -> None:
    """Writes a checkpoint so that a kill in between leaves the old one."""
    torch.save(state, path.with_suffix(".tmp"))
    path.with_suffix(".tmp").replace(path)
