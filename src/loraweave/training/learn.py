"""Teaching a mixture's policy what it can learn, whatever way it learns: what recipes and comparisons call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from loraweave.evaluation.data import Example
from loraweave.mixture import Mixture
from loraweave.policies.lorahub import LoRAHub
from loraweave.training.search import search
from loraweave.training.train import train

# What a search takes of the training options; the others are about gradients.
_SEARCHED = ("seed", "batch_size", "max_input_length", "max_target_length")


def learns(mixture: Mixture) -> bool:
    """Whether the policy needs examples: it has gates that learn, or weights to be searched."""
    return isinstance(mixture.policy, LoRAHub) or any(True for _ in mixture.gate_parameters())


def learn(mixture: Mixture, data: Sequence[Example], *, tokenizer: Any, **options: Any) -> str:
    """Train gates (:func:`loraweave.train`), or search weights (:func:`loraweave.search`) as a LoRAHub policy says.

    Args:
        mixture: its policy learns (:func:`learns`); a LoRAHub policy makes room for the sum that was found.
        data: examples.
        tokenizer: of the model.
        **options: those of :func:`loraweave.train`; a search takes the seed, the batch size and the lengths.

    Returns:
        A line that says what was done.
    """
    policy = mixture.policy
    if isinstance(policy, LoRAHub):
        given: Mapping[str, Any] = {name: options[name] for name in _SEARCHED if name in options}
        used = min(policy.examples or len(data), len(data))
        found = search(
            mixture,
            data,
            evaluations=policy.evaluations,
            optimizer=policy.optimizer,
            l1=policy.l1,
            bound=policy.bound,
            start=policy.start,
            examples=policy.examples,
            tokenizer=tokenizer,
            **given,
        )
        return f"{policy.evaluations} evaluations on {used} examples in {found.seconds:.0f} s, loss {found.loss:.3f}"
    result = train(mixture, data, tokenizer=tokenizer, **options)
    return f"{result.steps} steps on {len(data)} examples in {result.seconds:.0f} s, mean loss {result.loss:.3f}"
