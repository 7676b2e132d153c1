"""LoGo: one decision an input, from how strongly each expert answers it, without training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal, cast

import torch
from torch import Tensor, nn

from loraweave.experts.bank import Bank
from loraweave.mixing.numerics import masked_mean
from loraweave.mixing.stream import new_key
from loraweave.mixing.types import Evidence, Granularity, SitePlan, Weights
from loraweave.policies import checks
from loraweave.policies.precision import full_precision, moved
from loraweave.policies.registry import register

Signal = Literal["norm", "entropy"]
LogoPooling = Literal["last", "mean"]


@register
@dataclass(frozen=True)
class LoGo:
    """``g_i = s_i / sum over the k largest``, ``s_i`` a signal of the expert's output ``o_i = s B_i A_i x`` (LoGo).

    The paper reads the signal in a pass of its own and then merges. Here it is read by the site's first module in the
    pass that uses it, so it costs nothing more. An encoder and a prompt get one decision a row, which stays while the
    answer is generated; the decoder of an encoder-decoder has no prompt and decides for each token. An expert that does
    not extend the module that is read gets no weight at the site; where that holds for all, they share equally.

    Args:
        signal: ``norm``, ``||o_i||``; or ``entropy``, ``1 / H(softmax(o_i))``.
        k: how many experts an input gets.
        pooling: the token that is read: the ``last`` of the input, as in the paper, or the ``mean`` over it.
        granularity: which modules share a decision; the paper's is ``network``.
    """

    signal: Signal = "norm"
    k: int = 3
    pooling: LogoPooling = "last"
    granularity: Granularity = "network"

    name: ClassVar[str] = "logo"
    source: ClassVar[str] = "https://arxiv.org/abs/2511.07129"
    normalized: ClassVar[bool] = True
    mix: ClassVar[Literal["deltas"]] = "deltas"

    def __post_init__(self) -> None:
        checks.choice(self.name, "signal", self.signal, Signal)
        checks.whole(self.name, "k", self.k)
        checks.choice(self.name, "pooling", self.pooling, LogoPooling)
        checks.choice(self.name, "granularity", self.granularity, Granularity)

    def constant(self, site: SitePlan) -> None:
        """No site is constant."""

    def gate(self, site: SitePlan) -> nn.Module:
        return LogoRouter(self, site)


class LogoRouter(nn.Module):
    """Decides at one site.

    Attributes:
        B: ``[R, d]``, the experts' ``s_i B_i`` transposed, of the module that is read.
        owner: ``[E, R]``, 1 where a rank row is the expert's.
        absent: ``[E]``, the experts that do not extend that module.
        kept: ``[E]``, the experts that are not masked.
        unread: whether none of those extends it.
    """

    normalized = True
    B: Tensor
    owner: Tensor
    absent: Tensor
    kept: Tensor

    def __init__(self, policy: LoGo, site: SitePlan) -> None:
        super().__init__()
        self.policy = policy
        self.key = new_key()
        self.per_token = site.causal and not site.prompted
        bank: Bank = site.bank
        ranks = torch.tensor(bank.layout.ranks)
        owner = torch.eye(len(ranks)).repeat_interleave(ranks, dim=1)
        scales = bank.layout.row_weights(torch.ones(len(ranks))).to(bank.device)
        device = bank.device
        self.register_buffer("B", (scales.unsqueeze(1) * bank.Bt.double()).float(), persistent=False)
        self.register_buffer("owner", owner.to(device), persistent=False)
        self.register_buffer("absent", (ranks == 0).to(device), persistent=False)
        self.register_buffer("kept", torch.ones(len(ranks), dtype=torch.bool, device=device), persistent=False)
        self.unread = False

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LogoRouter:
        super()._apply(moved(fn), recurse)
        return self

    def keep(self, kept: Tensor | None) -> None:
        """Mask experts: ``kept`` is ``[E]`` bool; ``None`` lifts the mask."""
        self.kept = torch.ones_like(self.absent) if kept is None else kept.to(self.absent.device)
        self.unread = not bool((self.kept & ~self.absent).any())

    def forward(self, evidence: Evidence) -> Weights:
        assert evidence.ranks is not None
        if self.unread:
            return Weights((self.kept.float() / self.kept.sum()).view(1, 1, -1))
        stream = evidence.stream
        with full_precision(evidence.hidden):
            a = evidence.ranks.float()
            if self.per_token:
                return self.weigh(self.signals(a))
            if stream.spec.causal and stream.cached_tokens > 0:
                return self.weigh(cast(Tensor, stream.frozen(self.key)))
            signals = self.signals(self.pool(a, evidence))
            if stream.spec.causal:
                stream.freeze(self.key, signals)
            return self.weigh(signals)

    def pool(self, a: Tensor, evidence: Evidence) -> Tensor:
        """``[B, T, R]`` -> ``[B, 1, R]``: of the last real token of the input, or their mean."""
        stream, (rows, tokens) = evidence.stream, a.shape[:2]
        mask = stream.prompt_mask(rows, tokens) if stream.spec.prompted else stream.token_mask(tokens)
        if self.policy.pooling == "mean":
            return masked_mean(a, mask)
        if mask is None:
            return a[:, -1:]
        places = torch.arange(tokens, device=a.device)
        last = (mask.to(a.device).bool() * places).argmax(1)
        return a.gather(1, last.view(-1, 1, 1).expand(-1, 1, a.shape[-1]))

    def signals(self, a: Tensor) -> Tensor:
        """``[B, T, R]`` -> ``[B, T, E]``."""
        outputs = (a.unsqueeze(-2) * self.owner) @ self.B
        if self.policy.signal == "norm":
            norm: Tensor = torch.linalg.vector_norm(outputs, dim=-1)
            return norm
        entropy = -(outputs.softmax(-1) * outputs.log_softmax(-1)).sum(-1)
        # An output so peaked that its entropy rounds to 0 is as sure as can be, not infinitely so.
        return torch.reciprocal(entropy.clamp(min=1e-6))

    def weigh(self, signals: Tensor) -> Weights:
        """The ``k`` largest, divided by their sum."""
        best, index = signals.masked_fill(self.absent | ~self.kept, 0.0).topk(
            min(self.policy.k, signals.shape[-1]), dim=-1
        )
        values = best / best.sum(-1, keepdim=True).clamp(min=1e-30)
        return Weights(torch.zeros_like(signals).scatter(-1, index, values), index, values)
