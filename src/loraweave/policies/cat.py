"""CAT: learned static weights, one vector a site, as in LoRA Soups."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from loraweave.errors import LoraweaveError
from loraweave.mixing.types import Evidence, Granularity, SitePlan, Weights
from loraweave.policies import checks
from loraweave.policies.precision import moved
from loraweave.policies.registry import register


@register
@dataclass(frozen=True)
class CAT:
    """``W^l + sum_i w_i^l dW_i^l``, with ``w^l`` learned from examples and the same for every input (LoRA Soups).

    Concatenating ``A`` and ``B`` with a learned weight each gives this sum: no cross terms, any ranks. As the paper
    writes it the weights are free: they need not sum to one, nor be positive. Its released code takes their softmax.
    They depend on nothing, so the trained mixture folds into the model's weights and exports as one LoRA.

    Args:
        granularity: which modules share a weight vector; the paper's is ``matrix``.
        start: weight of every expert before training; default: 1/N, the average.
        softmax: whether the weights are the softmax of what is learned, as in the released code. Then they sum to one,
            also among the experts that a mask leaves, and start at 1/N.
        balance: weight of MoLE's balance loss in training, on the weights' sizes.
    """

    granularity: Granularity = "matrix"
    start: float | None = None
    softmax: bool = False
    balance: float = 0.0

    name: ClassVar[str] = "cat"
    source: ClassVar[str] = "https://arxiv.org/abs/2410.13025"
    mix: ClassVar[Literal["deltas"]] = "deltas"

    def __post_init__(self) -> None:
        checks.choice(self.name, "granularity", self.granularity, Granularity)
        checks.finite(self.name, "balance", self.balance, above=-1e-30)
        if self.start is not None:
            checks.finite(self.name, "start", self.start)
            if self.softmax:
                raise LoraweaveError("cat start: with softmax every weight starts at 1/N; leave start or softmax out")

    @property
    def normalized(self) -> bool:
        return self.softmax

    def constant(self, site: SitePlan) -> None:
        """No site is constant while it learns; its gate tells the weights for folding."""

    def gate(self, site: SitePlan) -> nn.Module:
        start = 1.0 / len(site.experts) if self.start is None else self.start
        return StaticGate(site, 0.0 if self.softmax else start, self.softmax)


class StaticGate(nn.Module):
    """Learned weights that depend on nothing. Parameter: ``w`` ``[E]``, of which ``softmax`` makes shares."""

    reads_ranks = False

    def __init__(self, site: SitePlan, start: float, softmax: bool = False) -> None:
        super().__init__()
        self.normalized = softmax
        # A few dozen steps must be able to carry a weight from 1/N to nearly 1.
        self.suggested_learning_rate = 0.1 if softmax else 0.03
        self.w = nn.Parameter(torch.full((len(site.experts),), start, device=site.bank.device, dtype=torch.float32))
        self.kept: Tensor | None = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> StaticGate:
        super()._apply(moved(fn), recurse)
        self.kept = None if self.kept is None else self.kept.to(self.w.device)
        return self

    def keep(self, kept: Tensor | None) -> None:
        """Mask experts: ``kept`` is ``[E]`` bool; ``None`` lifts the mask."""
        # Offloaded parameters are nowhere between two calls.
        self.kept = None if kept is None else kept.to(kept.device if self.w.is_meta else self.w.device)

    def forward(self, evidence: Evidence) -> Weights:  # noqa: ARG002
        return Weights(self._weights().view(1, 1, -1))

    def constant(self) -> Tensor:
        """``[E]``: the weights as they are now, for folding and export."""
        return self._weights().detach().double().cpu()

    def _weights(self) -> Tensor:
        kept = None if self.kept is None else self.kept.to(self.w.device)
        if self.normalized:
            logits = self.w if kept is None else self.w.masked_fill(~kept, -torch.inf)
            return logits.softmax(-1)
        return self.w if kept is None else self.w * kept
