"""Processes that accelerate or torchrun started together, each of which works by itself."""

from __future__ import annotations

import gc
import os
import sys
from dataclasses import dataclass

# What tells libraries that this process is one of several; the trainer would share its batches out among them.
_SHARED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_PREFIXES = ("ACCELERATE_", "FSDP_", "TORCHELASTIC_", "GROUP_", "ROLE_")


@dataclass(frozen=True)
class Process:
    """One of ``count`` processes; the one of rank 0 writes what all of them found."""

    rank: int = 0
    count: int = 1

    @property
    def main(self) -> bool:
        return self.rank == 0


def alone() -> Process:
    """Which process this is. From here on it works alone, on a GPU of its own where there are several.

    Call it before anything uses a GPU.
    """
    process = Process(int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)))
    if process.count == 1:
        if _wanted_more():
            print(
                "accelerate was asked for several processes and started one, as it does without several GPUs; "
                "for more: torchrun --nproc-per-node N -m loraweave ..., or accelerate launch --multi_gpu",
                file=sys.stderr,
            )
        return process
    local = int(os.environ.get("LOCAL_RANK", 0))
    cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")
    visible = [] if cpu else _visible()
    os.environ["CUDA_VISIBLE_DEVICES"] = visible[local % len(visible)] if visible else ""
    for name in list(os.environ):
        if name in _SHARED or name.startswith(_PREFIXES):
            del os.environ[name]
    return process


def part() -> None:
    """Part from the processes that this one trained with, if there were any.

    Threads of gloo that still hold tensors while Python ends abort the process (pytorch/pytorch#179291).
    """
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()
        gc.collect()  # what is left of the training holds the group


def _wanted_more() -> bool:
    """Whether accelerate's launcher was asked for several processes and started this one alone, with no rank."""
    started = "ACCELERATE_MIXED_PRECISION" in os.environ and "WORLD_SIZE" not in os.environ
    # It sets the address where processes would meet only if there are to be several.
    return started and "MASTER_ADDR" in os.environ


def _visible() -> list[str]:
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is not None:
        return [device for device in given.split(",") if device]
    import torch

    return [str(number) for number in range(torch.cuda.device_count())]
