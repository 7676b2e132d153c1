"""Words that call experts up, and prompts that forget them."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from loraweave.errors import TriggerWarning
from loraweave.experts.types import Expert


def forgotten(expert: Expert, prompts: Sequence[str]) -> list[str]:
    """The trigger words in the expert's file, if none of them (in any case) is in any of the prompts."""
    words = expert.report.triggers if expert.report is not None else []
    said = "\n".join(prompts).lower()
    return [] if any(word.lower() in said for word in words) else words


def warn_of_triggers(experts: Sequence[Expert], prompts: Sequence[str], stacklevel: int = 2) -> None:
    """Warn (:class:`TriggerWarning`) of every expert with trigger words of which no prompt has any.

    Args:
        experts: as :attr:`loraweave.mixture.Mixture.sources` has them.
        prompts: what will be painted.
        stacklevel: as ``warnings.warn`` counts it: 1 is this function, 2 its caller.
    """
    where = "the prompt has none" if len(prompts) == 1 else "no prompt has any"
    for expert in experts:
        if words := forgotten(expert, prompts):
            warnings.warn(
                f"expert {expert.name!r}: {where} of the words that call it up ({', '.join(words)})",
                TriggerWarning,
                stacklevel=stacklevel,
            )
