"""From what the command line names (a recipe, a mixture, data) to what the library works on; verbs share it."""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

import loraweave as lw
from loraweave import persistence, zoo
from loraweave.errors import LoraweaveError
from loraweave.evaluation.data import Example, read_examples
from loraweave.evaluation.scoring import predict
from loraweave.mixture import Mixture
from loraweave.recipe import ZOO, ZOO_PREFIX, Generation, Recipe, Task, load_recipe
from loraweave.training.train import load_tokenizer

MIXTURE_FILES = (persistence.MIXTURE, persistence.GATES, persistence.CARD, persistence.EXPERTS)
# Items of a generated task where the recipe does not say how many; files are read whole.
_DRAWN = {"train": 200, "test": 100}


@dataclass(frozen=True)
class Opened:
    """A mixture ready to answer, and the recipe if it came from one."""

    mixture: Mixture
    tokenizer: Any
    recipe: Recipe | None = None


@dataclass(frozen=True)
class TestSet:
    """The test data of one task."""

    examples: Sequence[Example]
    metric: str


def recipe_of(source: str) -> Recipe | None:
    """The recipe at ``source``, or None if that is a saved mixture."""
    return load_recipe(source) if source.endswith((".yaml", ".yml")) else None


def open_mixture(source: str, recipe: Recipe | None = None) -> Opened:
    """A saved mixture (folder or hub id), or one built from a recipe."""
    recipe = recipe or recipe_of(source)
    if recipe is not None:
        return Opened(*build(recipe), recipe)
    mixture = lw.load(source)
    _place(mixture.model)
    return Opened(mixture, load_tokenizer(mixture.model))


def build(recipe: Recipe) -> tuple[Mixture, Any]:
    """The recipe's mixture, with fresh gates, and the base's tokenizer."""
    policy = recipe.method.policy()
    model, tokenizer = load_base(recipe.base)
    return lw.attach(model, recipe.sources(), policy), tokenizer


def load_base(name: str) -> tuple[Any, Any]:
    """Model (in evaluation mode, on the GPU if there is one) and tokenizer, by folder, hub id or ``zoo``.

    Raises:
        LoraweaveError: there is no such model, or it has no tokenizer.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer
    from transformers.utils import logging

    if name == ZOO or not sys.stderr.isatty():
        # A bar for each file that is read is worth it for large models, and for people.
        logging.disable_progress_bar()
    place = zoo.local(name)
    if Path(place).is_dir():
        # A saved mixture remembers where its base is, and may be loaded from elsewhere.
        place = str(Path(place).resolve())
    elif Path(place).is_absolute():
        raise LoraweaveError(f"base model {name!r}: no such folder; expected a transformers model, or a hub id")
    try:
        config = AutoConfig.from_pretrained(place)
    except (OSError, ValueError) as error:
        raise LoraweaveError(
            f"base model {name!r}: not found, or not a transformers model ({_first(error)})"
        ) from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(place)
    except (OSError, ValueError) as error:
        raise LoraweaveError(f"base model {name!r}: it has no tokenizer ({_first(error)})") from error
    model = persistence.load_model(place, AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM)
    return _place(model), tokenizer


# ---------------------------------------------------------------- data


def names_training_data(recipe: Recipe) -> bool:
    """Whether any task of the recipe has something to train on."""
    return any(task.train is not None for task in recipe.data.by_task().values())


def training_data(recipe: Recipe, seed: int) -> list[Example]:
    """The examples of all tasks, see :func:`training_by_task`."""
    return [example for rows in training_by_task(recipe, seed).values() for example in rows]


def training_by_task(recipe: Recipe, seed: int) -> dict[str, list[Example]]:
    """Task -> its examples, if it has any; ``seed`` chooses which, where the recipe wants fewer than there are.

    Raises:
        LoraweaveError: no task has any, or a file cannot be read.
    """
    tasks = {name: task.train for name, task in recipe.data.by_task().items() if task.train is not None}
    if not tasks:
        raise LoraweaveError("data.train: the recipe names no training data; add data: {train: train.jsonl}")
    limit = recipe.data.train_items
    return {name: examples(source, "train", limit, seed) for name, source in tasks.items()}


def held_out(
    recipe: Recipe | None, data: str | None = None, metric: str | None = None, limit: int | None = None
) -> dict[str, TestSet]:
    """Task -> what to score, from ``data`` (a file, a generated task, another recipe) or else from ``recipe``.

    Raises:
        LoraweaveError: no test data, an unknown metric, or a file that cannot be read.
    """
    if data is not None and data.endswith((".yaml", ".yml")):
        recipe, data = load_recipe(data), None
    if data is not None:
        tasks, default = {Path(data).stem: Task(test=data)}, None
    elif recipe is not None:
        tasks, default = recipe.data.by_task(), recipe.data.metric
        limit = limit or recipe.data.test_items
    else:
        raise LoraweaveError("no test data: give --data FILE, a .jsonl with 'input' and 'target' in each row")
    found = {
        name: TestSet(examples(task.test, "test", limit, 0), metric or task.metric or default or _own_metric(task.test))
        for name, task in tasks.items()
        if task.test is not None
    }
    if not found:
        raise LoraweaveError("data.test: the recipe names no test data; add data: {test: test.jsonl} or give --data")
    return found


def examples(source: str, split: Literal["train", "test"], limit: int | None, seed: int) -> list[Example]:
    """Of a file all rows, or ``limit`` of them chosen by ``seed``; of a generated task that many fresh items."""
    if source.startswith(ZOO_PREFIX):
        task = zoo.tasks.get(source.removeprefix(ZOO_PREFIX))
        return read_examples(task.sample(limit or _DRAWN[split], seed, split))
    rows = read_examples(source)
    return rows if limit is None or limit >= len(rows) else random.Random(seed).sample(rows, limit)


def read_inputs(path: str | None) -> list[str]:
    """Texts from a .jsonl file (``input`` of each row), a plain one or, without a path, standard input.

    Raises:
        LoraweaveError: the file cannot be read, holds nothing, or a row has no ``input``.
    """
    name = path or "standard input"
    if path is None and sys.stdin.isatty():
        print("one input a line, end with Ctrl-D:", file=sys.stderr)
    try:
        text = sys.stdin.read() if path is None else Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise LoraweaveError(f"cannot read the inputs in {name!r}: {reason}") from error
    lines = [(number, line) for number, line in enumerate(text.splitlines(), start=1) if line.strip()]
    if not lines:
        raise LoraweaveError(f"{name}: no input; expected one a line, or --input TEXT")
    return (
        [_input(line, f"{name}:{n}") for n, line in lines] if name.endswith(".jsonl") else [line for _, line in lines]
    )


# ---------------------------------------------------------------- running


@contextmanager
def masked(mixture: Mixture, options: argparse.Namespace) -> Iterator[None]:
    """Mask experts as ``--only`` and ``--without`` say."""
    if options.only:
        with mixture.only(*options.only):
            yield
    elif options.without:
        with mixture.without(*options.without):
            yield
    else:
        yield


def generation(recipe: Recipe | None, options: argparse.Namespace) -> dict[str, Any]:
    """Generation settings: the command line's, else the recipe's, else the defaults."""
    settings = (recipe.generation if recipe is not None else Generation()).model_dump()
    given = {name: value for name in settings if (value := getattr(options, name, None)) is not None}
    return settings | given


def average_weights(
    mixture: Mixture, tokenizer: Any, inputs: Mapping[str, Sequence[str]], **settings: Any
) -> dict[str, dict[str, list[float]]]:
    """Panel -> site -> each expert's mean weight while the mixture answers that panel's inputs.

    Without inputs there is one panel, of the weights that hang on nothing.
    """
    panels = {}
    for name, texts in (inputs or {"": []}).items():
        with mixture.record() as seen:
            if texts:
                predict(mixture.model, tokenizer, texts, description=f"weights {name}".strip(), **settings)
        averages = seen.average()
        for site in mixture.sites:
            if site.name not in averages and hasattr(site.gate, "constant"):
                averages[site.name] = site.gate.constant().tolist()  # type: ignore[operator, union-attr]  # of no input
        panels[name] = {site.name: averages[site.name] for site in mixture.sites if site.name in averages}
    return panels


def _own_metric(source: str) -> str:
    if source.startswith(ZOO_PREFIX):
        return zoo.tasks.get(source.removeprefix(ZOO_PREFIX)).metric
    return "exact_match"


def _input(line: str, where: str) -> str:
    try:
        row = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        raise LoraweaveError(f"{where}: not JSON; expected an object with 'input', one a line") from error
    if not isinstance(row, dict) or not isinstance(row.get("input"), str):
        raise LoraweaveError(f"{where}: expected an object with the text 'input'")
    return str(row["input"])


def _place(model: Any) -> Any:
    return model.to("cuda") if torch.cuda.is_available() else model


def _first(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
