"""``lw.merge`` and ``lw.arithmetic``: several experts -> one ordinary expert."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from functools import reduce
from pathlib import Path
from typing import Any

import torch

from loraweave.errors import LoraweaveError, LoraweaveWarning, unknown
from loraweave.experts.resolve import resolve_experts
from loraweave.experts.types import Expert, LoraFactors
from loraweave.transforms import Linear, checks, registry
from loraweave.transforms.expression import read_expression
from loraweave.transforms.spaces import equal_ranks
from loraweave.transforms.types import Space, Term, Transform

Experts = Mapping[str, str | Path | Expert] | Sequence[str | Path | Expert]


def merge(
    experts: Experts,
    method: str | Transform = "ties",
    *,
    weights: float | Mapping[str, float] = 1.0,
    name: str = "merged",
    **options: Any,
) -> Expert:
    """Merge trained LoRAs into one ordinary LoRA; no model is needed.

    The result attaches alone (``lw.attach(model, {"merged": expert}, lw.Sum())``) and writes with
    :func:`~loraweave.write_expert`. It is computed in float64 and rounded once, to the widest dtype of the experts.

    Args:
        experts: name -> PEFT folder, hub id, or :class:`Expert`; of a plain sequence the folders' names are taken.
        method: ``concat``, ``linear``, ``svd``, ``magnitude_prune``, ``ties``, ``dare_linear``, ``dare_ties``,
            ``knots`` or ``core_space``; or a transform with its options.
        weights: strength of every expert, or of those it names (the others have 1); an expert at 0 is left out.
        name: of the result.
        options: of the method, e.g. ``density=0.3``; see ``docs/merging.md``.

    Raises:
        LoraweaveError: an unknown method, option or expert, an expert that cannot be read, experts of different base
            models, or nothing left.
    """
    if isinstance(method, str):
        transform = registry.build(method, options)
    elif options:
        raise LoraweaveError(f"merge: options ({', '.join(options)}) go with a method's name; this one has its own")
    else:
        transform = method
    read = resolve_experts(experts)
    return merge_experts(read, transform, _weights(weights, [expert.name for expert in read]), name)


def arithmetic(expression: str, experts: Experts, *, space: Space = "delta", name: str = "merged") -> Expert:
    """Merge by an expression on experts' names: ``(a + b) / 2``, ``a - 0.4*b``, ``king - man + woman``.

    PEM arithmetic (Zhang et al. 2023, https://arxiv.org/abs/2306.14870): addition, negation and what follows from them.

    Args:
        expression: ``+ - * /``, unary minus, numbers, parentheses, and names; a name with characters such as ``-`` or
            ``/`` stands in quotes or backticks.
        experts: as for :func:`merge`; those that the expression does not name are not used.
        space: ``delta`` adds ``B A``, exactly, for any ranks. ``factors`` adds ``A`` and ``B`` apart as in the authors'
            code, ``(sum_i w_i B_i)(sum_i |w_i| A_i)``: a minus turns one factor, so that the delta is negated.
        name: of the result.

    Raises:
        LoraweaveError: the expression is not one (the message shows where), or as :func:`merge`.
    """
    checks.choice("arithmetic", "space", space, Space)
    weights = read_expression(expression)
    if isinstance(experts, Mapping):
        _known(weights, list(experts), expression)
        experts = {expert: source for expert, source in experts.items() if expert in weights}
    read = resolve_experts(experts)
    _known(weights, [expert.name for expert in read], expression)
    vector = {expert.name: weights.get(expert.name, 0.0) for expert in read}
    return merge_experts(read, Linear(space=space, negate="one"), vector, name)


def check_merge(experts: Sequence[Expert], transform: Transform) -> None:
    """Raise now what merging these experts would raise, but for what only its numbers show.

    Raises:
        LoraweaveError: two of them do not fit each other, or the transform needs equal ranks.
    """
    for path, here in _modules(experts).items():
        _check_shapes(path, here)
        if getattr(transform, "space", "delta") == "factors":
            equal_ranks([Term(e.name, path, 1.0, f.A, f.B, f.scale) for e in here for f in [e.factors[path]]])


def merge_experts(experts: Sequence[Expert], transform: Transform, weights: Mapping[str, float], name: str) -> Expert:
    """Merge experts that have been read; ``weights`` has one entry for each.

    Raises:
        LoraweaveError: they do not fit each other, or nothing is left.
    """
    used = [expert for expert in experts if weights[expert.name] != 0]
    if not used:
        raise LoraweaveError("merge: every expert has weight 0, so there is nothing to merge")
    merged = {}
    for path, here in _modules(used).items():
        factors = _module(path, here, transform, weights)
        if factors.rank > 0:
            merged[path] = factors
    if not merged:
        raise LoraweaveError("merge: the experts cancel each other or hold only zeros, so there is no LoRA to make")
    return Expert(name, merged, base=_common_base(used))


def _modules(experts: Sequence[Expert]) -> dict[str, list[Expert]]:
    """Module path -> the experts that extend it."""
    modules: dict[str, list[Expert]] = {}
    for expert in experts:
        for path in expert.factors:
            modules.setdefault(path, []).append(expert)
    return modules


def _check_shapes(path: str, experts: Sequence[Expert]) -> None:
    first = experts[0].factors[path]
    for expert in experts:
        one = expert.factors[path]
        if (one.A.shape[1], one.B.shape[0], one.embedding) != (first.A.shape[1], first.B.shape[0], first.embedding):
            raise LoraweaveError(
                f"expert {expert.name!r}: {path!r} maps {_kind(one)}, but in expert {experts[0].name!r} it maps "
                f"{_kind(first)}; they belong to different base models"
            )


def _module(path: str, experts: Sequence[Expert], transform: Transform, weights: Mapping[str, float]) -> LoraFactors:
    _check_shapes(path, experts)
    factors = [expert.factors[path] for expert in experts]
    first = factors[0]
    device = first.A.device
    terms = [Term.of(e.name, path, weights[e.name], f, device) for e, f in zip(experts, factors, strict=True)]
    A, B = transform.module(terms)
    dtype = reduce(torch.promote_types, [tensor.dtype for one in factors for tensor in (one.A, one.B)])
    return LoraFactors(A.to(dtype).contiguous(), B.to(dtype).contiguous(), 1.0, first.embedding)


def _kind(factors: LoraFactors) -> str:
    what = "entries of an embedding" if factors.embedding else "features"
    return f"{factors.A.shape[1]} to {factors.B.shape[0]} {what}"


def _weights(weights: float | Mapping[str, float], experts: Sequence[str]) -> dict[str, float]:
    if not isinstance(weights, Mapping):
        checks.finite("merge", "weights", weights)
        return dict.fromkeys(experts, float(weights))
    _known(weights, experts)
    for name, value in weights.items():
        checks.finite("merge", f"weight of {name!r}", value)
    return {name: float(weights.get(name, 1.0)) for name in experts}


def _known(names: Mapping[str, float], experts: Sequence[str], expression: str = "") -> None:
    for name in names:
        if name not in experts:
            for expert in experts:
                if name in expert and expert in expression:
                    raise LoraweaveError(
                        f"unknown expert {name!r}; in expressions {expert!r} stands in quotes or backticks: `{expert}`"
                    )
            raise unknown("expert", name, experts)


def _common_base(experts: Sequence[Expert]) -> str | None:
    """The base that all who name one agree on."""
    bases = {expert.base: expert.name for expert in experts if expert.base is not None}
    if len(bases) > 1:
        said = ", ".join(f"{base!r} ({expert})" for base, expert in bases.items())
        warnings.warn(
            f"the merged experts name different base models: {said}; the result names none",
            LoraweaveWarning,
            stacklevel=4,
        )
        return None
    return next(iter(bases), None)
