"""The policies that the invariants run over: every registered one, and MoLE's options that change its shape."""

from __future__ import annotations

from typing import Any

import loraweave as lw

CONSTANT: dict[str, Any] = {
    "sum": lw.Sum(),
    "sum-weights": lw.Sum(0.5, {"bee": -1.25, "cat": 0.0}),
    "linear": lw.Linear(),
    "linear-weights": lw.Linear({"ant": 3.0, "cat": 1.0}),
    "linear-blocks": lw.Linear(blocks={"*.0.*": {"ant": 0.5, "bee": 1.0, "cat": 2.0}}),
}
GATED: dict[str, Any] = {
    "mole": lw.MoLE(),
    "mole-paper": lw.MoLE.paper(),
    "mole-matrix": lw.MoLE(granularity="matrix", normalization="rms"),
    "mole-layer": lw.MoLE(granularity="layer", normalization="layer"),
    "mole-network": lw.MoLE(granularity="network", normalization="layer", gate_form="full"),
    "mole-hidden": lw.MoLE(evidence="hidden", normalization="layer"),
    "mole-token": lw.MoLE(pooling="token", granularity="matrix", gate_form="full"),
    "mole-mean": lw.MoLE(pooling="mean"),
    "mole-flatten": lw.MoLE(pooling="flatten", max_length=12, normalization="layer", gate_form="full"),
    "mole-top1": lw.MoLE(activation="top1"),
    "mole-top1-mean": lw.MoLE(activation="top1", pooling="mean"),
    "mole-topk": lw.MoLE(activation="topk", k=2, scale=1.0),
    "mole-topk-mean": lw.MoLE(activation="topk", k=2, pooling="mean", scale=1.5),
    "mole-sigmoid": lw.MoLE(activation="sigmoid"),
    "mole-scale": lw.MoLE(scale=1.7, learn_scale=True, temperature=0.5),
    "mole-outputs": lw.MoLE(mix="outputs", gate_form="full"),
}
METHODS = CONSTANT | GATED
# These follow a denoising run; tests/images holds them to the same.
PICTURES = {"switch", "composite", "regional"}
# Decoder-only models alone have a prompt of their own.
PROMPT = {"mole-prompt": lw.MoLE(pooling="prompt", granularity="network")}
# Where a token's weights never depend on later tokens, or on tokens at all.
CAUSAL = [name for name, p in METHODS.items() if name in CONSTANT or p.pooling in ("auto", "token")]
