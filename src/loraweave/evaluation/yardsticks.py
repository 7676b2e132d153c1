"""Contestants of a comparison that are no policies: other LoRAs in the place of the experts, or another library.

Each lends, for one seed, a model that is ready to answer, and says what that took.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch
from torch import Tensor

from loraweave.errors import LoraweaveError
from loraweave.evaluation.data import Example
from loraweave.evaluation.fitting import fit, train_lora
from loraweave.experts.types import Expert, LoraFactors
from loraweave.mixing.types import Policy
from loraweave.policies import Sum, checks, registry
from loraweave.text import Collator, encode_example
from loraweave.training.learn import Learned
from loraweave.training.train import BATCH_SIZE

if TYPE_CHECKING:
    from loraweave.mixture import Mixture
    from loraweave.transforms.types import Transform


@dataclass(frozen=True)
class Setting:
    """What a yardstick may use.

    Attributes:
        model: the bare base model; it must be left as it was.
        tokenizer: its tokenizer.
        experts: the recipe's, by name.
        examples: the training examples that methods learn from.
        options: of :func:`loraweave.train`, as the recipe sets them for this contestant.
        seed: of everything.
    """

    model: Any
    tokenizer: Any
    experts: Mapping[str, Expert]
    examples: Sequence[Example]
    options: Mapping[str, Any]
    seed: int

    def batches(self, size: int) -> list[dict[str, Tensor]]:
        """The examples, encoded, in batches."""
        rows, collate = self.encoded(), Collator(self.tokenizer)
        return [collate(rows[first : first + size]) for first in range(0, len(rows), size)]

    def taught(self) -> Learned:
        """What training by gradients takes with these options."""
        steps, rows = int(self.options.get("steps", 100)), int(self.options.get("batch_size", BATCH_SIZE))
        rows *= int(self.options.get("gradient_accumulation_steps", 1))
        return Learned("", steps, steps * rows)

    def encoded(self) -> list[dict[str, list[int]]]:
        lengths: dict[str, Any] = {name: self.options.get(name) for name in ("max_input_length", "max_target_length")}
        seq2seq = bool(self.model.config.is_encoder_decoder)
        return [encode_example(self.tokenizer, e, is_encoder_decoder=seq2seq, **lengths) for e in self.examples]


@dataclass(frozen=True)
class Ground:
    """What a yardstick may look at before anything is learned.

    Attributes:
        mixture: the experts on the base; its policy may be changed.
        experts: the same, by name.
    """

    mixture: Mixture
    experts: Mapping[str, Expert]


@dataclass(frozen=True)
class Ready:
    """A model that answers, and what learning was done for it."""

    model: Any
    learned: Learned


class Yardstick(Protocol):
    """A contestant of a comparison that is no policy."""

    @property
    def name(self) -> str: ...

    def check(self, ground: Ground, /) -> bool:
        """Whether it learns from examples; a :class:`LoraweaveError` now where :meth:`contest` would raise it, whatever
        the data."""

    def contest(self, setting: Setting) -> AbstractContextManager[Ready]:
        """Make ready; when the block ends, the setting's model is bare again."""


@contextmanager
def standing_in(setting: Setting, stand_ins: tuple[dict[str, Expert], Policy], spent: Learned) -> Iterator[Ready]:
    """Other experts on the model, under a policy that learns if it can; ``spent`` is what finding them took."""
    from loraweave.mixture import attach
    from loraweave.training.learn import learn, learns, settled

    mixture = attach(setting.model, *stand_ins)
    try:
        if learns(mixture):
            options = {"progress": False, **setting.options, "seed": setting.seed}
            spent = learn(mixture, setting.examples, tokenizer=setting.tokenizer, **options)
            mixture = settled(mixture, spent)
        yield Ready(setting.model, spent)
    finally:
        mixture.detach()


@dataclass(frozen=True)
class FreshLoRA:
    """One new LoRA, trained by peft on the very examples that methods learn from, on all modules that experts extend.

    Args:
        rank: default: the largest of the experts'.
        learning_rate: at its highest; it falls linearly to zero. (The recipe's is for gates.)
    """

    rank: int | None = None
    learning_rate: float = 1e-3

    name: ClassVar[str] = "fresh_lora"

    def __post_init__(self) -> None:
        if self.rank is not None:
            checks.whole(self.name, "rank", self.rank)
        checks.finite(self.name, "learning_rate", self.learning_rate, above=0)

    def check(self, _: Ground, /) -> bool:
        """It learns, and any experts will do."""
        return True

    def stand_ins(self, setting: Setting) -> tuple[dict[str, Expert], Policy]:
        targets = list(dict.fromkeys(path for expert in setting.experts.values() for path in expert.factors))
        ranks = [f.rank for expert in setting.experts.values() for f in expert.factors.values()]
        return {"fresh": train_lora(setting, targets, self.rank or max(ranks), self.learning_rate)}, Sum()

    def contest(self, setting: Setting) -> AbstractContextManager[Ready]:
        return standing_in(setting, self.stand_ins(setting), setting.taught())


@dataclass(frozen=True)
class RandomLoRAs:
    """Random LoRAs of the experts' shapes and norms: what a method makes of nothing.

    Args:
        method: the policy that mixes them, by name and options; default: the sum.
    """

    method: Mapping[str, Any] = dataclasses.field(default_factory=lambda: {"name": "sum"})

    name: ClassVar[str] = "random"

    def __post_init__(self) -> None:
        registry.from_dict(self.method)

    def check(self, ground: Ground, /) -> bool:
        """Random LoRAs have the shapes of the experts, so what can mix these can mix those."""
        from loraweave.training import learn

        ground.mixture.policy = registry.from_dict(self.method)
        learn.check(ground.mixture)
        return learn.learns(ground.mixture)

    def stand_ins(self, setting: Setting) -> tuple[dict[str, Expert], Policy]:
        generator = torch.Generator().manual_seed(setting.seed)
        return {n: scrambled(e, generator) for n, e in setting.experts.items()}, registry.from_dict(self.method)

    def contest(self, setting: Setting) -> AbstractContextManager[Ready]:
        return standing_in(setting, self.stand_ins(setting), Learned("", 0, 0))


@dataclass(frozen=True)
class BestSingle:
    """The one expert that answers the training examples best (by mean loss), on every task."""

    name: ClassVar[str] = "best_single"

    def check(self, _: Ground, /) -> bool:
        """It learns, and any experts will do."""
        return True

    def stand_ins(self, setting: Setting) -> tuple[dict[str, Expert], Policy]:
        from loraweave.evaluation.scoring import evaluating
        from loraweave.mixture import attach
        from loraweave.training.search import mean_loss

        batches = setting.batches(24)
        mixture = attach(setting.model, setting.experts, Sum())
        losses: dict[str, float] = {}
        try:
            with evaluating(setting.model):
                for name in mixture.experts:
                    with mixture.only(name):
                        losses[name] = mean_loss(setting.model, batches)
        finally:
            mixture.detach()
        best = min(losses, key=losses.__getitem__)
        return {best: setting.experts[best]}, Sum()

    def contest(self, setting: Setting) -> AbstractContextManager[Ready]:
        tried = len(setting.experts)
        return standing_in(setting, self.stand_ins(setting), Learned("", tried, tried * len(setting.examples)))


@dataclass(frozen=True)
class Merged:
    """All experts merged into one LoRA (:func:`loraweave.merge`), at the strength that answers the examples best.

    Args:
        transform: the merge by name, with its options: ``{"name": "ties", "density": 0.2}``. What DARE draws at random
            hangs on the seed of the comparison, unless it has a ``seed`` of its own.
        strengths: the factors on the merged LoRA that are tried; of several, the one with the lowest mean loss on the
            training examples is taken.
    """

    transform: Mapping[str, Any] = dataclasses.field(default_factory=lambda: {"name": "ties"})
    strengths: Sequence[float] = (1.0,)

    name: ClassVar[str] = "merged"

    def __post_init__(self) -> None:
        self._built()
        if not self.strengths:
            raise LoraweaveError("merged strengths: expected at least one number, got none")
        for strength in self.strengths:
            checks.finite(self.name, "strengths", strength)

    def _built(self) -> Transform:
        from loraweave.transforms import registry as transforms

        given = dict(self.transform)
        return transforms.build(str(given.pop("name", None)), given)

    def check(self, ground: Ground, /) -> bool:
        """Of one strength there is nothing to learn."""
        from loraweave.transforms.merge import check_merge

        check_merge(list(ground.experts.values()), self._built())
        return len(self.strengths) > 1

    def stand_ins(self, setting: Setting) -> tuple[dict[str, Expert], Policy]:
        from loraweave.evaluation.scoring import evaluating
        from loraweave.mixture import attach
        from loraweave.training.search import mean_loss
        from loraweave.transforms import registry as transforms
        from loraweave.transforms.merge import merge

        options = dict(self.transform)
        kind = str(options.pop("name"))
        if "seed" in transforms.options(kind):
            options = {"seed": setting.seed, **options}
        merged = {"merged": merge(dict(setting.experts), kind, **options)}
        if len(self.strengths) == 1:
            return merged, Sum(self.strengths[0])
        batches = setting.batches(24)
        mixture = attach(setting.model, merged, Sum())
        losses: dict[float, float] = {}
        try:
            with evaluating(setting.model):
                for strength in self.strengths:
                    mixture.policy = Sum(strength)
                    losses[strength] = mean_loss(setting.model, batches)
        finally:
            mixture.detach()
        return merged, Sum(min(losses, key=losses.__getitem__))

    def contest(self, setting: Setting) -> AbstractContextManager[Ready]:
        tried = len(self.strengths) if len(self.strengths) > 1 else 0
        return standing_in(setting, self.stand_ins(setting), Learned("", tried, tried * len(setting.examples)))


@dataclass(frozen=True)
class XLoRA:
    """X-LoRA as peft has it (Buehler & Buehler 2024), trained on the very examples and steps that methods have.

    A classifier reads the bare model's last hidden states and gives each expert a weight per token. Decoder-only models
    whose body is called ``model`` (Llama, Qwen, Mistral ...); other ones are refused.

    Args:
        learning_rate: of the classifier, at its highest; it falls linearly to zero.
        depth: layers of the classifier.
        layerwise: weights of their own for every module, instead of one for all.
        softmax: weights share a total of one; else they are the classifier's bare outputs.
        scale: multiplies every expert.
    """

    learning_rate: float = 1e-3
    depth: int = 1
    layerwise: bool = False
    softmax: bool = True
    scale: float = 1.0

    name: ClassVar[str] = "xlora"
    source: ClassVar[str] = "https://arxiv.org/abs/2402.07148"

    def __post_init__(self) -> None:
        checks.finite(self.name, "learning_rate", self.learning_rate, above=0)
        checks.whole(self.name, "depth", self.depth)
        checks.finite(self.name, "scale", self.scale)

    def check(self, ground: Ground, /) -> bool:
        """It learns."""
        from loraweave.integrations.xlora import check

        check(ground.mixture.model, ground.experts)
        return True

    @contextmanager
    def contest(self, setting: Setting) -> Iterator[Ready]:
        """As :class:`Yardstick` has it.

        Raises:
            LoraweaveError: see :func:`loraweave.integrations.xlora.check`.
        """
        from loraweave.integrations.xlora import wrapped

        options = {
            "xlora_depth": self.depth,
            "layerwise_scalings": self.layerwise,
            "enable_softmax": self.softmax,
            "global_scaling_weight": self.scale,
        }
        with wrapped(setting.model, setting.experts, setting.seed, **options) as model:
            fit(model, setting, self.learning_rate)
            yield Ready(model, setting.taught())


YARDSTICKS: dict[str, type[Any]] = {kind.name: kind for kind in (FreshLoRA, RandomLoRAs, BestSingle, Merged, XLoRA)}


def scrambled(expert: Expert, generator: torch.Generator) -> Expert:
    """Random factors of the expert's shapes, scales and Frobenius norms."""

    def like(tensor: Tensor) -> Tensor:
        noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
        scaled: Tensor = noise * (tensor.double().norm().cpu() / noise.norm())
        return scaled.to(tensor)

    factors = {path: LoraFactors(like(f.A), like(f.B), f.scale, f.embedding) for path, f in expert.factors.items()}
    return Expert(expert.name, factors, base=expert.base)
