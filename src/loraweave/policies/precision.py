"""Gates decide in single precision, whatever the model around them computes in; several policies share this."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def full_precision(like: Tensor) -> AbstractContextManager[object]:
    """Switch autocast off: small differences between experts drown in half precision."""
    device = like.device.type
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


def moved(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """``fn`` of ``nn.Module._apply``, without its cast: gates move with a model but stay in single precision."""

    def move(tensor: Tensor) -> Tensor:
        changed = fn(tensor)
        return changed if changed.dtype == tensor.dtype else tensor.to(changed.device)

    return move
