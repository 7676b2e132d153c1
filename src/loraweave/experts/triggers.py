"""Words that call experts up, and prompts that forget them."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from loraweave.errors import LoraweaveWarning
from loraweave.experts.types import Expert


def warn_of_triggers(experts: Sequence[Expert], prompts: Sequence[str]) -> None:
    """Warn of every expert whose file names trigger words (in any case) none of which is in any prompt.

    Args:
        experts: as :attr:`loraweave.mixture.Mixture.sources` has them.
        prompts: what will be painted.
    """
    said = "\n".join(prompts).lower()
    where = "the prompt has none" if len(prompts) == 1 else "no prompt has any"
    for expert in experts:
        words = expert.report.triggers if expert.report is not None else []
        if words and not any(word.lower() in said for word in words):
            warnings.warn(
                f"expert {expert.name!r}: {where} of the words that call it up ({', '.join(words)})",
                LoraweaveWarning,
                stacklevel=3,
            )
