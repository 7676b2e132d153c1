"""The policies that the invariants run over: every registered one, and MoLE's options that change its shape."""

from __future__ import annotations

from typing import Any

import loraweave as lw

CONSTANT: dict[str, Any] = {
    "sum": lw.Sum(),
    "sum-weights": lw.Sum(0.5, {"bee": -1.25, "cat": 0.0}),
    "linear": lw.Linear(),
    "linear-weights": lw.Linear({"ant": 3.0, "cat": 1.0}),
    "lorahub": lw.LoRAHub(start=0.4),
    "linear-blocks": lw.Linear(blocks={"*.0.*": {"ant": 0.5, "bee": 1.0, "cat": 2.0}}),
}
GATED: dict[str, Any] = {
    "mole": lw.MoLE(),
    "mole-paper": lw.MoLE.paper(),
    "mole-matrix": lw.MoLE(granularity="matrix", evidence="outputs", normalization="rms"),
    "mole-layer": lw.MoLE(granularity="layer", evidence="outputs", normalization="layer"),
    "mole-network": lw.MoLE(granularity="network", evidence="outputs", normalization="layer", gate_form="full"),
    "mole-hidden": lw.MoLE(evidence="hidden", normalization="layer"),
    "mole-token": lw.MoLE(pooling="token", granularity="matrix", evidence="outputs", gate_form="full"),
    "mole-mean": lw.MoLE(pooling="mean", evidence="outputs", normalization="l2", scale="experts"),
    "mole-flatten": lw.MoLE(
        pooling="flatten", max_length=12, evidence="outputs", normalization="layer", gate_form="full"
    ),
    "mole-top1": lw.MoLE(activation="top1", evidence="outputs"),
    "mole-top1-mean": lw.MoLE(activation="top1", pooling="mean"),
    "mole-topk": lw.MoLE(activation="topk", k=2, evidence="outputs", normalization="l2"),
    "mole-topk-mean": lw.MoLE(activation="topk", k=2, pooling="mean", scale=1.5),
    "mole-sigmoid": lw.MoLE(activation="sigmoid", evidence="outputs", normalization="l2"),
    "mole-linear": lw.MoLE(activation="linear", granularity="matrix"),
    "mole-scale": lw.MoLE(scale=1.7, learn_scale=True, temperature=0.5, evidence="outputs"),
    "mole-outputs": lw.MoLE(mix="outputs", evidence="outputs", gate_form="full"),
    "lora_flow": lw.LoRAFlow(),
    "lora_flow-matrix": lw.LoRAFlow(granularity="matrix"),
}
# Learned, and the same for every input.
STATIC: dict[str, Any] = {
    "cat": lw.CAT(),
    "cat-softmax": lw.CAT(softmax=True),
    "cat-block": lw.CAT(granularity="block", start=0.8),
}
# They read the input and learn nothing.
ROUTED: dict[str, Any] = {
    "arrow": lw.Arrow(),
    "arrow-k2": lw.Arrow(k=2, temperature=0.5),
    "logo": lw.LoGo(),
    "logo-entropy": lw.LoGo(signal="entropy", k=2, pooling="mean"),
    "logo-block": lw.LoGo(granularity="block"),
}
METHODS = CONSTANT | GATED | STATIC | ROUTED
# These follow a denoising run; tests/images holds them to the same.
PICTURES = {"switch", "composite", "regional"}
# Decoder-only models alone have a prompt of their own.
PROMPT = {
    "mole-prompt": lw.MoLE(pooling="prompt", granularity="network"),
    "mole-preselect": lw.MoLE(preselect=2),
}
# Where a token's weights never depend on later tokens, or on tokens at all.
CAUSAL = [name for name, p in METHODS.items() if getattr(p, "pooling", "auto") in ("auto", "token")]
# They decide on the prompt: methods that a decoder-only model must tell what it is when it generates without a cache.
PROMPTED = [*PROMPT, *(name for name in ROUTED if name.startswith("logo"))]
