"""Before anything is timed: do the contenders compute what they say?"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from speed.models import Bench, inputs

# (contender, what it must equal)
EQUAL = (
    ("floor", "peft all"),
    ("sum", "peft all"),
    ("folded", "peft all"),
    ("one expert", "peft 1"),
    ("one-hot", "peft 1"),
    ("8 experts", "peft, 8 experts"),
)
# Of the largest change that the LoRAs make to the logits; rounding stays far below it.
TOLERANCE = {"float32": 1e-3, "float16": 0.05, "bfloat16": 0.2}


def check(models: Mapping[str, nn.Module], bench: Bench) -> dict[str, float]:
    """Compare the contenders' logits on one batch.

    Every contender must change what the bare model says, and those of ``EQUAL`` must say the same.

    Returns:
        ``"a = b"`` -> the largest difference, as a part of the largest change to the bare model's logits.

    Raises:
        AssertionError: a contender computes something else than it should.
    """
    batch = inputs(bench, bench.size.batch, bench.size.length, seed=5)
    with torch.inference_mode():
        logits: dict[str, Tensor] = {
            name: model(**batch, use_cache=False).logits.double() for name, model in models.items()
        }
    bare, tolerance = logits["bare"], TOLERANCE[bench.place.dtype]
    differences = {}
    for name, values in logits.items():
        if not bool(values.isfinite().all()):
            raise AssertionError(f"{name}: its logits are not finite")
        if name != "bare" and float((values - bare).abs().max()) < TOLERANCE["float32"]:
            raise AssertionError(f"{name}: says the same as the bare model; its LoRAs are not in use")
    for name, other in EQUAL:
        if name in logits and other in logits:
            change = (logits[other] - bare).abs().max()
            difference = float((logits[name] - logits[other]).abs().max() / change)
            if difference > tolerance:
                raise AssertionError(
                    f"{name} should equal {other}, but is off by {difference:.2g} of what LoRAs change"
                )
            differences[f"{name} = {other}"] = difference
    return differences
