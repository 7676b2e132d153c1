"""What gates read is measured before they learn: mean and spread of their evidence, for standard scores."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from loraweave.mixture import Mixture
from loraweave.policies.mole_standard import Standard

MEASURED_BATCHES = 8
"""How many batches tell gates the mean and spread of what they read."""


@torch.no_grad()
def measure(mixture: Mixture, passes: Callable[[], None], accelerator: Any) -> None:
    """Measure what is not measured yet; nothing happens if everything is.

    Args:
        mixture: whose gates read standard scores, or don't.
        passes: runs the model on :data:`MEASURED_BATCHES` batches, of this process.
        accelerator: adds up over processes.
    """
    standards = [standard for gate in mixture.gates.values() for standard in _unmeasured(gate)]
    if not standards:
        return
    try:
        for standard in standards:
            standard.start()
        passes()
        for standard in standards:
            standard.finish(accelerator.reduce(standard.sums(), "sum"))
    finally:
        for standard in standards:
            standard.stop()


def _unmeasured(gate: nn.Module) -> list[Standard]:
    standard = getattr(gate, "standard", None)
    return [standard] if isinstance(standard, Standard) and not standard.measured else []
