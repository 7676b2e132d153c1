"""LoRAHub's search: one weight per expert, found by trying weightings on a few examples, without gradients.

Huang et al. 2023, https://arxiv.org/abs/2307.13269. Their code divides the mean loss of a batch by the number of
examples before it adds the penalty; here the loss is the mean over all answer tokens, whatever the batches.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor
from tqdm.auto import tqdm

from loraweave.errors import LoraweaveError
from loraweave.evaluation.data import ExampleSource, read_examples
from loraweave.evaluation.scoring import evaluating
from loraweave.experts.types import Expert
from loraweave.mixing.layer import FixedTerm
from loraweave.mixture import Mixture
from loraweave.policies.lorahub import LoRAHub, Optimizer, Space
from loraweave.policies.sum import Sum
from loraweave.text import IGNORED, Collator, encode_example
from loraweave.training.train import load_tokenizer
from loraweave.transforms import factor_sum


@dataclass(frozen=True)
class SearchResult:
    """What a search found.

    Attributes:
        weights: expert -> its weight in the best weighting seen.
        objective: of that weighting: ``loss + l1 * mean |w|``.
        loss: of that weighting: mean cross-entropy per answer token (nats).
        history: by evaluation: ``weights``, ``loss`` and ``objective``; the first is the start.
        seconds: wall-clock time.
        expert: in the space of factors, the sum as one LoRA; else ``None``.
    """

    weights: dict[str, float]
    objective: float
    loss: float
    history: list[dict[str, Any]] = field(repr=False)
    seconds: float
    expert: Expert | None = None


class Searcher(Protocol):
    """An optimiser that is asked for a weighting, first of all the start, and then told how good that is."""

    def ask(self) -> list[float]: ...
    def tell(self, objective: float) -> None: ...


def search(
    mixture: Mixture,
    data: ExampleSource,
    *,
    evaluations: int = 40,
    space: Space = "delta",
    optimizer: Optimizer = "cmaes",
    l1: float = 0.05,
    bound: float = 1.5,
    start: float = 0.0,
    examples: int | None = None,
    seed: int = 0,
    batch_size: int = 24,
    tokenizer: Any = None,
    max_input_length: int | None = None,
    max_target_length: int | None = None,
    progress: bool = True,
) -> SearchResult:
    """Search one weight per expert on examples (LoRAHub); then ``mixture.policy`` is :class:`~loraweave.Sum` with them.

    An evaluation is one pass over the examples; nothing is loaded again. The policy before the search is gone after it,
    its learned gates included; if the search fails it is set again, with fresh gates.

    Args:
        mixture: an attached mixture, without masks.
        data: a file of JSON lines, rows of ``{"input", "target"}`` or a ``datasets`` object; LoRAHub uses five.
        evaluations: how many weightings are tried, the start included.
        space: ``delta`` adds the experts' updates, ``sum w_i B_i A_i``, as the paper writes, at any ranks; ``factors``
            adds their factors, ``(sum w_i B_i)(sum w_i A_i)``, as its code does. The latter is no weighting of updates:
            the result's ``expert`` holds it as one LoRA to attach, and the policy is set back.
        optimizer: ``cmaes``, or the published ``ngopt`` (nevergrad).
        l1: weight of the mean absolute weight in the objective.
        bound: weights stay within ``[-bound, bound]``.
        start: weight of every expert at the start; the published 0 is the bare model.
        examples: use only so many of the examples, drawn by ``seed``.
        seed: of that choice and of the optimiser.
        batch_size: examples per forward pass.
        tokenizer: default: the one beside the model's weights.
        max_input_length, max_target_length: in tokens; longer texts are cut.
        progress: show a progress bar.

    Raises:
        LoraweaveError: an option is out of range, the optimiser's package is missing, the data is empty or cannot be
            read, experts are masked or folded, the experts' factors cannot be added, or no weighting has a finite loss.
    """
    options = LoRAHub(evaluations, optimizer, l1, bound, start, examples, space)
    if batch_size < 1:
        raise LoraweaveError(f"batch_size: expected at least 1, got {batch_size}")
    if len(mixture.kept) < len(mixture.experts):
        raise LoraweaveError(
            f"search: experts are masked (kept: {', '.join(mixture.kept)}); search outside of the mask"
        )
    if space == "factors":
        factor_sum.check_alike(mixture.layers, mixture.experts)
    searcher = _searcher(options, len(mixture.experts), seed)
    rows = read_examples(data)
    if examples is not None and examples < len(rows):
        rows = random.Random(seed).sample(rows, examples)
    tokenizer = tokenizer or load_tokenizer(mixture.model)
    encoded = [
        encode_example(
            tokenizer,
            example,
            is_encoder_decoder=bool(getattr(mixture.model.config, "is_encoder_decoder", False)),
            max_input_length=max_input_length,
            max_target_length=max_target_length,
        )
        for example in rows
    ]
    batches = list(_batches(encoded, Collator(tokenizer), batch_size))
    started, before = time.perf_counter(), mixture.policy
    history: list[dict[str, Any]] = []
    try:
        with evaluating(mixture.model), torch.no_grad(), _bar(evaluations, progress) as bar:
            for _ in range(evaluations):
                weights = searcher.ask()
                _weigh(mixture, weights, space)
                loss = mean_loss(mixture.model, batches)
                objective = loss + l1 * sum(map(abs, weights)) / len(weights)
                searcher.tell(objective)
                history.append({"weights": weights, "loss": loss, "objective": objective})
                bar.set_postfix(best=f"{_best(history)['objective']:.3f}", refresh=False)
                bar.update()
        best = _best(history)
        if not torch.isfinite(torch.tensor(best["objective"])):
            raise LoraweaveError("search: the loss is not finite for any weighting tried; check the model and the data")
    except BaseException:  # an interruption too: the mixture must not stay at some weighting under trial
        mixture.policy = before
        raise
    named = dict(zip(mixture.experts, best["weights"], strict=True))
    expert = None
    if space == "factors":
        found = torch.tensor(best["weights"], dtype=torch.float64)
        expert = factor_sum.factor_sum(mixture.layers, found, "lorahub", getattr(mixture.model, "name_or_path", None))
    mixture.policy = Sum(0.0, named) if expert is None else before
    return SearchResult(named, best["objective"], best["loss"], history, time.perf_counter() - started, expert)


def check(mixture: Mixture, options: LoRAHub) -> None:
    """Raise now what a search would raise at its start.

    Raises:
        LoraweaveError: the optimiser's package is missing, or the experts' factors cannot be added.
    """
    if options.space == "factors":
        factor_sum.check_alike(mixture.layers, mixture.experts)
    _searcher(options, len(mixture.experts), 0)


@torch.no_grad()
def mean_loss(model: Any, batches: Sequence[dict[str, Tensor]]) -> float:
    """Mean cross-entropy per answer token over all batches (nats)."""
    total, tokens = 0.0, 0
    for batch in batches:
        # A decoder-only model predicts each token from those before it, so the first is no answer.
        labels = batch["labels"] if model.config.is_encoder_decoder else batch["labels"][:, 1:]
        count = int((labels != IGNORED).sum())
        loss = model(**{name: value.to(model.device) for name, value in batch.items()}).loss
        total, tokens = total + float(loss) * count, tokens + count
    return total / tokens


def _weigh(mixture: Mixture, weights: list[float], space: Space) -> None:
    if space == "delta":
        mixture.policy = Sum(0.0, dict(zip(mixture.experts, weights, strict=True)))
        return
    mixture.policy = Sum(0.0)
    for layer in mixture.layers.values():
        f = factor_sum.added(layer, torch.tensor(weights, dtype=torch.float64))
        scale = torch.full((f.rank,), f.scale, dtype=f.A.dtype, device=f.A.device)
        layer.fixed = FixedTerm(f.A, f.B.T.contiguous(), scale)


def _batches(rows: Sequence[Any], collate: Collator, size: int) -> Iterator[dict[str, Tensor]]:
    for first in range(0, len(rows), size):
        yield collate(rows[first : first + size])


def _best(history: Sequence[dict[str, Any]]) -> dict[str, Any]:
    def order(entry: dict[str, Any]) -> float:
        objective = float(entry["objective"])
        return objective if objective == objective else float("inf")  # NaN is worse than anything

    return min(history, key=order)


def _bar(evaluations: int, shown: bool) -> Any:
    return tqdm(total=evaluations, desc="searching weights", unit="evaluation", disable=not shown)


# ---------------------------------------------------------------- optimisers


def _searcher(options: LoRAHub, experts: int, seed: int) -> Searcher:
    """The optimiser that ``options`` names.

    Raises:
        LoraweaveError: its package is not installed.
    """
    makers: dict[str, Callable[[LoRAHub, int, int], Searcher]] = {"cmaes": _CMAES, "ngopt": _NGOpt}
    package = {"cmaes": "cmaes", "ngopt": "nevergrad"}[options.optimizer]
    try:
        return makers[options.optimizer](options, experts, seed)
    except ImportError as error:
        extra = {"cmaes": "search", "ngopt": "ngopt"}[options.optimizer]
        raise LoraweaveError(
            f"lorahub optimizer {options.optimizer!r} needs the package {package!r}: pip install 'loraweave[{extra}]'"
        ) from error


class _CMAES:
    """CMA-ES (Hansen): ``cmaes``. It is told a generation at a time."""

    def __init__(self, options: LoRAHub, experts: int, seed: int) -> None:
        import numpy as np
        from cmaes import CMA

        self.experts, self.start = experts, [float(options.start)] * experts
        # The strategy needs two dimensions; of a single expert the second has no effect.
        dimensions = max(experts, 2)
        self.strategy = CMA(
            mean=np.full(dimensions, options.start),
            sigma=options.bound / 3,
            bounds=np.array([[-options.bound, options.bound]] * dimensions),
            seed=seed,
        )
        self.asked: Any = None
        self.begun = False
        self.told: list[tuple[Any, float]] = []

    def ask(self) -> list[float]:
        if not self.begun:
            return self.start
        self.asked = self.strategy.ask()
        return [float(value) for value in self.asked[: self.experts]]

    def tell(self, objective: float) -> None:
        if not self.begun:  # the strategy knows its own draws only
            self.begun = True
            return
        self.told.append((self.asked, objective if objective == objective else float("inf")))
        if len(self.told) == self.strategy.population_size:
            self.strategy.tell(self.told)
            self.told = []


class _NGOpt:
    """Nevergrad's own choice of optimiser, as published: COBYLA at 40 evaluations, which starts at the start."""

    def __init__(self, options: LoRAHub, experts: int, seed: int) -> None:
        import nevergrad as ng
        import numpy as np

        space = ng.p.Array(init=np.full(experts, options.start)).set_bounds(-options.bound, options.bound)
        space.random_state.seed(seed)
        self.optimizer = ng.optimizers.NGOpt(parametrization=space, budget=options.evaluations)
        self.asked: Any = None

    def ask(self) -> list[float]:
        self.asked = self.optimizer.ask()
        return [float(value) for value in self.asked.value]

    def tell(self, objective: float) -> None:
        self.optimizer.tell(self.asked, objective if objective == objective else float("inf"))
