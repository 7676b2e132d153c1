"""Who takes part in a comparison, and whether each of them can: said before the first cell is made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from loraweave.errors import LoraweaveError
from loraweave.evaluation.comparison import SINGLE
from loraweave.evaluation.yardsticks import YARDSTICKS, Ground
from loraweave.experts.types import Expert
from loraweave.mixture import Mixture
from loraweave.policies.lorahub import LoRAHub
from loraweave.recipe import Contender, Contestant, Recipe
from loraweave.training import learn

PLAIN = "sum"
"""What is kept where nothing that takes part is one mixture."""


def contenders_of(recipe: Recipe, reserved: Sequence[str]) -> dict[str, Contender]:
    """Label -> contender: the recipe's or, where it does not say, the sum, the average, and its own method.

    Args:
        recipe: what to compare.
        reserved: labels of rows that every comparison has, beside those of single experts.

    Raises:
        LoraweaveError: one is for pictures, or has the label of another row.
    """
    for label, contender in recipe.compare.items():
        if contender.saved is not None:
            raise LoraweaveError(
                f"compare.{label}.saved: is for pictures (loraweave testbed, loraweave image); a comparison trains "
                "every method itself, and 'loraweave evaluate' measures a saved mixture"
            )
        if contender.kind is not None:
            raise LoraweaveError(
                f"compare.{label}.{contender.kind}: is for pictures (loraweave testbed, loraweave image); remove it"
            )
        if label in reserved or label.startswith(SINGLE):
            raise LoraweaveError(f"compare.{label}: every comparison has such a row; choose another label")
        if label == PLAIN != contender.method.name and not is_one_mixture(contender):
            raise LoraweaveError(f"compare.{label}: this is what the plain sum is called; choose another label")
    if recipe.compare:
        return dict(recipe.compare)
    plain = {name: Contender(method=Contestant(name=name)) for name in ("sum", "linear")}
    return plain | {recipe.method.name: Contender(method=Contestant(**recipe.method.model_dump()))}


def takes_part(
    label: str, contender: Contender, mixture: Mixture, experts: Mapping[str, Expert], recipe: Recipe
) -> bool:
    """Check a contender; afterwards the mixture has its policy, unless it is a yardstick.

    Args:
        label: of the contender.
        contender: who wants to take part.
        mixture: the experts on the base.
        experts: the recipe's, by name.
        recipe: for its data.

    Returns:
        Whether it hangs on a seed: it learns from examples, or draws at random.

    Raises:
        LoraweaveError: it cannot take part: with these experts, on this model, without a package, or with this data.
    """
    try:
        method = contender.method.policy()
        if contender.method.name in YARDSTICKS:
            learning, seeded = method.check(Ground(mixture, experts)), True
        else:
            mixture.policy = method
            learn.check(mixture)
            learning = seeded = learn.learns(mixture)
    except LoraweaveError as error:
        raise LoraweaveError(f"compare.{label}: {error}") from error
    if contender.per_task:
        _check_tasks(label, contender.method.name, learning, recipe)
    return seeded


def is_one_mixture(contender: Contender) -> bool:
    """Whether what comes out is one mixture of the experts, to be kept and looked at."""
    if contender.per_task or contender.method.name in YARDSTICKS:
        return False
    method = contender.method.policy()
    return not (isinstance(method, LoRAHub) and method.space == "factors")


def _check_tasks(label: str, method: str, learning: bool, recipe: Recipe) -> None:
    if not learning:
        raise LoraweaveError(f"compare.{label}.per_task: {method!r} learns nothing, for one task or for all; remove it")
    for name, task in recipe.data.by_task().items():
        if task.test is not None and task.train is None:
            raise LoraweaveError(
                f"compare.{label}.per_task: nothing to learn task {name!r} from; give it 'train', or remove per_task"
            )
