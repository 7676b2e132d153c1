"""LoRA-Flow: per layer and token, weights read from the hidden state."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from loraweave.mixing.types import Evidence, Granularity, SitePlan, Weights
from loraweave.policies import checks
from loraweave.policies.precision import full_precision, moved
from loraweave.policies.registry import register


@register
@dataclass(frozen=True)
class LoRAFlow:
    """``w_t^l = softmax(W^l x_t^l) + b^l``: the fusion gate of LoRA-Flow, one a layer, one decision a token.

    It starts as the average of the experts (``W`` and ``b`` are zero). The hidden state is what the site's first module
    reads: in a transformer block its input, after the norm. Masking shares the softmax's total of one out among the
    experts kept; their offsets ``b`` stay.

    Args:
        granularity: which modules share a gate; the paper's best is ``block``.
        balance: weight of MoLE's balance loss in training; the paper has none.
    """

    granularity: Granularity = "block"
    balance: float = 0.0

    name: ClassVar[str] = "lora_flow"
    source: ClassVar[str] = "https://arxiv.org/abs/2402.11455"
    normalized: ClassVar[bool] = False
    mix: ClassVar[Literal["deltas"]] = "deltas"

    def __post_init__(self) -> None:
        checks.choice(self.name, "granularity", self.granularity, Granularity)
        checks.finite(self.name, "balance", self.balance, above=-1e-30)

    def constant(self, site: SitePlan) -> None:
        """No site is constant."""

    def gate(self, site: SitePlan) -> nn.Module:
        return FlowGate(site)


class FlowGate(nn.Module):
    """The fusion gate of one site. Parameters: ``W`` ``[E, d]`` and ``b`` ``[E]``, zero at the start."""

    normalized = False
    reads_ranks = False

    def __init__(self, site: SitePlan) -> None:
        super().__init__()
        width, experts = site.features[1 if site.bank.embedding else 0], len(site.experts)
        device = site.bank.device
        self.W = nn.Parameter(torch.zeros(experts, width, device=device, dtype=torch.float32))
        self.b = nn.Parameter(torch.zeros(experts, device=device, dtype=torch.float32))
        self.kept: Tensor | None = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FlowGate:
        super()._apply(moved(fn), recurse)
        self.kept = None if self.kept is None else self.kept.to(self.b.device)
        return self

    def keep(self, kept: Tensor | None) -> None:
        """Mask experts: ``kept`` is ``[E]`` bool; ``None`` lifts the mask."""
        self.kept = None if kept is None else kept.to(self.b.device)

    def forward(self, evidence: Evidence) -> Weights:
        with full_precision(evidence.hidden):
            logits = evidence.hidden.float() @ self.W.T
            if self.kept is None:
                return Weights(logits.softmax(-1) + self.b)
            shares = logits.masked_fill(~self.kept, -torch.inf).softmax(-1)
            return Weights(shares + self.b * self.kept)
