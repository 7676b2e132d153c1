"""loraweave's contenders."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import loraweave as lw
from loraweave.mixing.types import Policy
from speed.models import Bench
from speed.peers import Contender


def attach(bench: Bench, policy: Policy, own_weights: bool = False, memory: str | None = None) -> lw.Mixture:
    """A mixture of all experts, read from their folders; gates are moved off their start (see :func:`stir`)."""
    mixture = lw.attach(bench.model(own_weights), dict(bench.experts), policy, expert_memory=memory)
    stir(mixture)
    return mixture


def stir(mixture: lw.Mixture, seed: int = 4, spread: float = 0.5) -> None:
    """Add seeded normal noise to the gates: as they start, a mixture would be timed whose weights are all the same."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in mixture.gate_parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter), alpha=spread)


def mixed_by(**options: Any) -> Callable[[Bench], nn.Module]:
    """Builds a MoLE with these options."""
    return lambda bench: attach(bench, lw.MoLE(**options)).model


def fetched(memory: str) -> Callable[[Bench], nn.Module]:
    """Builds the top-2 MoLE whose experts are fetched into this much memory."""
    policy = lw.MoLE(granularity="block", activation="topk", k=2, pooling="prompt")
    return lambda bench: attach(bench, policy, memory=memory).model


def ungated(bench: Bench) -> nn.Module:
    return attach(bench, lw.Sum()).model


def one_hot(bench: Bench) -> nn.Module:
    first = bench.size.names[0]
    return attach(bench, lw.Sum(0.0, {first: 1.0})).model


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
    Contender("mole block", "loraweave, MoLE, one gate a block, a weight per token", mixed_by(granularity="block")),
    Contender(
        "mole matrix",
        "loraweave, MoLE, one gate a matrix, a weight per token",
        mixed_by(granularity="matrix", pooling="token"),
    ),
    Contender(
        "mole top-2",
        "loraweave, MoLE, the prompt chooses two experts a block",
        mixed_by(granularity="block", activation="topk", k=2, pooling="prompt"),
    ),
    Contender("one expert", "loraweave, the sum masked to one expert", one_expert),
    Contender("folded", "loraweave, the sum folded into the weights", folded),
)

# What else a gate can be; each differs from "mole block" in what its name says.
GATES = (
    Contender("mole layer", "one gate an attention or feed-forward part", mixed_by(granularity="layer")),
    Contender("mole network", "one gate for all", mixed_by(granularity="network")),
    Contender("outputs", "evidence: the experts' outputs, compact gates", mixed_by(evidence="outputs")),
    Contender("outputs, full", "the paper's full gates", mixed_by(evidence="outputs", gate_form="full")),
    Contender("pooled: prompt", "one decision a row", mixed_by(pooling="prompt")),
    Contender("pooled: mean", "one decision a row and call", mixed_by(pooling="mean")),
    Contender("top-2 a token", "every token chooses two", mixed_by(activation="topk", k=2, pooling="token")),
    Contender("top-1 a prompt", "the prompt chooses one", mixed_by(activation="top1", pooling="prompt")),
    Contender("sigmoid", "independent gates", mixed_by(activation="sigmoid")),
    Contender("one-hot", "constant weights, all but one of them 0", one_hot),
)

# The same as "mole top-2" with experts that are not all in memory.
FETCHED = (
    Contender("top-2, kept", "fetched into 100 MB, where those in use stay", fetched("100MB")),
    Contender("top-2, fetched", "fetched into 2 MB, where none stays until it is used again", fetched("2MB")),
)
