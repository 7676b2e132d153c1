"""loraweave's contenders."""

from __future__ import annotations

import torch
from torch import nn

import loraweave as lw
from loraweave.mixing.types import Policy
from speed.models import Bench
from speed.peers import Contender


def attach(bench: Bench, policy: Policy, own_weights: bool = False) -> lw.Mixture:
    """A mixture of all experts, read from their folders; gates are moved off their start (see :func:`stir`)."""
    mixture = lw.attach(bench.model(own_weights), dict(bench.experts), policy)
    stir(mixture)
    return mixture


def stir(mixture: lw.Mixture, seed: int = 4, spread: float = 0.5) -> None:
    """Add seeded normal noise to the gates: as they start, a mixture would be timed whose weights are all the same."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in mixture.gate_parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=spread)


def ungated(bench: Bench) -> nn.Module:
    return attach(bench, lw.Sum()).model


def mole_block(bench: Bench) -> nn.Module:
    return attach(bench, lw.MoLE(granularity="block")).model


def mole_matrix(bench: Bench) -> nn.Module:
    return attach(bench, lw.MoLE(granularity="matrix", pooling="token")).model


def mole_top2(bench: Bench) -> nn.Module:
    return attach(bench, lw.MoLE(granularity="block", activation="topk", k=2, pooling="prompt")).model


def one_expert(bench: Bench) -> nn.Module:
    mixture = attach(bench, lw.Sum())
    bench.contexts.enter_context(mixture.only(bench.size.names[0]))
    return mixture.model


def folded(bench: Bench) -> nn.Module:
    mixture = attach(bench, lw.Sum(), own_weights=True)
    mixture.fold()
    return mixture.model


OURS = (
    Contender("sum", "loraweave, ungated sum", ungated),
    Contender("mole block", "loraweave, MoLE, one gate a block, a weight per token", mole_block),
    Contender("mole matrix", "loraweave, MoLE, one gate a matrix, a weight per token", mole_matrix),
    Contender("mole top-2", "loraweave, MoLE, the prompt chooses two experts a block", mole_top2),
    Contender("one expert", "loraweave, the sum masked to one expert", one_expert),
    Contender("folded", "loraweave, the sum folded into the weights", folded),
)
