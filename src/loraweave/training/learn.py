"""Teaching a mixture's policy what it can learn, whatever way it learns: what recipes and comparisons call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from loraweave.evaluation.data import Example
from loraweave.experts.types import Expert
from loraweave.mixture import Mixture, attach
from loraweave.policies.lorahub import LoRAHub
from loraweave.policies.sum import Sum
from loraweave.training import search as searching
from loraweave.training.search import search
from loraweave.training.train import BATCH_SIZE, train

# What a search takes of the training options; the others are about gradients.
_SEARCHED = ("seed", "batch_size", "max_input_length", "max_target_length")


@dataclass(frozen=True)
class Learned:
    """What learning did.

    Attributes:
        summary: one line about it.
        evaluations: optimizer steps, or weightings tried.
        examples_seen: examples that passed through the model, repetitions included.
        history: the log of training by step; a search leaves none.
        expert: what a search in the space of factors found: one LoRA that takes the experts' place (:func:`settled`).
    """

    summary: str
    evaluations: int
    examples_seen: int
    history: Sequence[Mapping[str, float]] = field(default=(), repr=False)
    expert: Expert | None = field(default=None, repr=False)


def learns(mixture: Mixture) -> bool:
    """Whether the policy needs examples: it has gates that learn, or weights to be searched."""
    return isinstance(mixture.policy, LoRAHub) or any(True for _ in mixture.gate_parameters())


def check(mixture: Mixture) -> None:
    """Raise now what :func:`learn` would raise at its start, whatever the data."""
    if isinstance(mixture.policy, LoRAHub):
        searching.check(mixture, mixture.policy)


def learn(mixture: Mixture, data: Sequence[Example], *, tokenizer: Any, **options: Any) -> Learned:
    """Train gates (:func:`loraweave.train`), or search weights (:func:`loraweave.search`) as a LoRAHub policy says.

    Args:
        mixture: its policy learns (:func:`learns`); a LoRAHub policy makes room for the sum that was found.
        data: examples.
        tokenizer: of the model.
        **options: those of :func:`loraweave.train`; a search takes the seed, the batch size and the lengths.
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
            space=policy.space,
            tokenizer=tokenizer,
            **given,
        )
        said = f"{policy.evaluations} evaluations on {used} examples in {found.seconds:.0f} s, loss {found.loss:.3f}"
        return Learned(said, policy.evaluations, policy.evaluations * used, expert=found.expert)
    result = train(mixture, data, tokenizer=tokenizer, **options)
    said = f"{result.steps} steps on {len(data)} examples in {result.seconds:.0f} s, mean loss {result.loss:.3f}"
    rows = int(options.get("batch_size", BATCH_SIZE)) * int(options.get("gradient_accumulation_steps", 1))
    return Learned(said, result.steps, result.steps * rows, result.history)


def settled(mixture: Mixture, learned: Learned) -> Mixture:
    """The mixture that answers with what was learned: the same or, where a search found a LoRA, one of that alone; the
    other is detached then."""
    if learned.expert is None:
        return mixture
    model = mixture.model
    mixture.detach()
    return attach(model, {learned.expert.name: learned.expert}, Sum())
