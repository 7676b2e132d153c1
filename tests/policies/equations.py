"""MoLE, slowly: written from the equations of the paper with every expert output formed in full."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import loraweave as lw

Factors = Sequence[lw.LoraFactors | None]


def outputs(factors: Factors, x: Tensor, width: int) -> Tensor:
    """``E_i = s_i B_i A_i x`` of all experts, concatenated: ``[in]`` -> ``[N d]`` (zeros where an expert has none)."""
    parts = []
    for f in factors:
        if f is None:
            parts.append(torch.zeros(width, dtype=torch.float64))
        else:
            A, B = f.A.double(), f.B.double()
            a = A[:, int(x)] if f.embedding else A @ x
            parts.append(f.scale * B @ a)
    return torch.cat(parts)


def normalised(v: Tensor, normalization: str) -> Tensor:
    """Eq. 9, which leaves the kind open."""
    if normalization == "l2":
        return v / v.norm()
    if normalization == "rms":
        return v / v.square().mean().sqrt()
    return (v - v.mean()) / v.var(correction=0).sqrt()


def full_parameters(gate: Any, factors: Factors, width: int) -> Tensor:
    """The paper's ``e`` ``[L?, N d, N]`` of a gate, whatever form it has.

    A compact gate multiplies ``s_i (B_i^T B_i)^(1/2) a_i`` by ``c_i``. With the polar factor ``U V^T`` of ``B_i`` that
    is ``E_i . (U V^T c_i)``.
    """
    e = scores(gate)
    policy = gate.policy
    if policy.evidence == "hidden":
        return e
    if policy.gate_form == "full":
        return e.flatten(-3, -2)
    parts, start = [], 0
    for f in factors:
        if f is None:
            parts.append(torch.zeros(*e.shape[:-2], width, e.shape[-1], dtype=torch.float64))
            continue
        U, _, Vh = torch.linalg.svd(f.B.double(), full_matrices=False)
        parts.append((U @ Vh) @ e[..., start : start + f.rank, :])
        start += f.rank
    return torch.cat(parts, dim=-2)


def scores(gate: Any) -> Tensor:
    """``e`` on the evidence itself, where the gate's own multiplies standard scores of it."""
    e: Tensor = gate.e.detach().double()
    return e if gate.standard is None else e / gate.standard.spread.double()[:, None]


def gate_weights(
    gate: Any, factors: Factors, x: Tensor, hidden: Tensor, width: int, mask: Tensor, pooling: str, kept: Sequence[int]
) -> Tensor:
    """Weights ``[rows, tokens or 1, N]`` from the leader's input ``x`` ``[rows, tokens, ...]``.

    Args:
        gate: a MoLE gate.
        factors: the leader's experts.
        x: what the leader was called with.
        hidden: what ``evidence="hidden"`` reads.
        width: of the leader's output.
        mask: ``[rows, tokens]``, the tokens to pool.
        pooling: as resolved.
        kept: experts that are not masked.
    """
    policy = gate.policy
    e = full_parameters(gate, factors, width)
    rows, tokens = x.shape[:2]
    decided = []
    for row in range(rows):
        evidence = [
            hidden[row, t].double() if policy.evidence == "hidden" else outputs(factors, x[row, t], width)
            for t in range(tokens)
        ]
        real = [v for t, v in enumerate(evidence) if mask[row, t]]
        if pooling == "token":
            groups = evidence
        elif pooling == "flatten":
            empty = [torch.zeros_like(evidence[0])] * (e.shape[0] - len(real))
            groups = [torch.cat(real + empty)]
        else:
            groups = [torch.stack(real).mean(0)]
        matrix = e.flatten(0, 1) if pooling == "flatten" else e
        common = 0.0 if gate.standard is None else gate.standard.center.double() @ scores(gate)
        common = common - preference(gate, len(evidence[0]))
        decided.append([activated(logits(gate, v, matrix) - common, gate, kept) for v in groups])
    return torch.stack([torch.stack(row) for row in decided])


def preference(gate: Any, size: int) -> Tensor | float:
    """The bias, the weight of a coordinate as large as the evidence is long."""
    if gate.bias is None:
        return 0.0
    longest = size if gate.standard is None else gate.standard.center.numel()
    length = 1.0 if gate.policy.normalization == "l2" and gate.standard is None else math.sqrt(longest)
    bias: Tensor = gate.bias.detach().double() * length
    return bias


def logits(gate: Any, v: Tensor, e: Tensor) -> Tensor:
    """Eq. 10 over Eq. 9."""
    if gate.columns is None:
        return normalised(v, gate.policy.normalization) @ e
    # A compact gate cannot know the column sums of e, so they are parameters of its own.
    deviation = v.var(correction=0).sqrt()
    return (v @ e - v.mean() * gate.columns.detach().double()) / deviation


def activated(eps: Tensor, gate: Any, kept: Sequence[int]) -> Tensor:
    """Eq. 11 and its relatives, among the experts kept."""
    policy, n = gate.policy, len(eps)
    eps = eps / math.exp(float(gate.log_temperature))
    g = torch.zeros(n, dtype=torch.float64)
    if policy.activation == "sigmoid":
        for i in kept:
            g[i] = 1 / (1 + math.exp(-float(eps[i] + math.log(49))))
        return g
    if policy.activation == "linear":
        start = float(gate.scale) if policy.learn_scale else float(n if policy.scale == "experts" else policy.scale)
        for i in kept:
            g[i] = start / n + 0.1 * eps[i]
        return g
    if policy.activation == "top1":
        g[max(kept, key=lambda i: float(eps[i]))] = 1.0
        return g
    scale = float(n if policy.scale == "experts" else policy.scale) if not policy.learn_scale else float(gate.scale)
    total = 1 + (scale - 1) * (len(kept) - 1) / (n - 1)
    chosen = sorted(kept, key=lambda i: -float(eps[i]))
    if policy.activation == "topk":
        chosen = chosen[: policy.k]
    exponentials = {i: math.exp(float(eps[i])) for i in chosen}
    for i in chosen:
        g[i] = total * exponentials[i] / sum(exponentials.values())
    return g
