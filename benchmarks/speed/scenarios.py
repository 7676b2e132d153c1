"""What is timed: one table. A scenario names its shapes and its contenders, and makes their tasks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import CompileConfig

from speed.models import SIZES, Bench, Models, Size, inputs, token_ids
from speed.ours import FETCHED, GATES
from speed.rows import BATCH, ROWS
from speed.starting import attaching, importing, saving
from speed.timing import Task
from speed.training import STEPS

Tasks = Callable[[Bench, Models], dict[str, Task]]
CORE = (
    *("bare", "floor", "peft 1", "peft all", "peft X-LoRA"),
    *("sum", "mole block", "mole matrix", "mole top-2", "one expert", "folded"),
)
FEW = ("bare", "floor", "peft all", "sum", "mole block", "mole matrix", "mole top-2")


@dataclass(frozen=True)
class Scenario:
    """A set of tasks to be timed against one another.

    Attributes:
        group: what ``--group`` calls it.
        what: one line for the table; a format string of the size.
        baseline: the task that the others' ratios refer to.
        tasks: builds them, by name, from the contenders' models.
        contenders: of ``peers.PEERS``, ``ours.OURS``, ``ours.GATES`` and ``rows.ROWS``; none where tasks build
            their own.
        changes: what differs from the shapes that ``--size`` gives.
        rounds: at most this many, however many are asked for.
    """

    group: str
    what: str
    baseline: str
    tasks: Tasks
    contenders: tuple[str, ...] = ()
    changes: Mapping[str, Any] = field(default_factory=dict)
    rounds: int | None = None

    def size(self, name: str) -> Size:
        """Its shapes at a size of ``SIZES``; with "tiny", changes of number and rank are kept small."""
        changes = dict(self.changes)
        if name in ("small", "tiny"):
            least = {"experts": 4, "rank": 2, "length": 12, "width": 32, "intermediate": 64, "layers": 2, "heads": 2}
            changes = {key: min(value, least[key]) if key in least else value for key, value in changes.items()}
        return replace(SIZES[name], **changes)


def forward(bench: Bench, models: Models, *, rows: int | None = None, cache: bool = False) -> dict[str, Task]:
    batch = inputs(bench, rows or bench.size.batch, bench.size.length)

    def run(model: nn.Module, _: None) -> None:
        with torch.inference_mode():
            model(**batch, use_cache=cache)

    return {name: Task(partial(run, model)) for name, model in models.items()}


def generate(bench: Bench, models: Models, *, rows: int, slow_rounds: int = 1, **options: Any) -> dict[str, Task]:
    batch = token_ids(bench, rows, bench.size.prompt)
    tokens = bench.size.new_tokens

    def run(model: Any, _: None) -> None:
        # Greedy, with a key-value cache; X-LoRA switches the cache off by itself.
        ids = model.generate(**batch, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, **options)
        assert ids.shape[1] == tokens + (bench.size.prompt if bench.size.family == "llama" else 1)

    slow = {name: slow_rounds for name in models if name == "peft X-LoRA"}
    return {name: Task(partial(run, model), rounds=slow.get(name)) for name, model in models.items()}


def compiled(bench: Bench, models: Models) -> dict[str, Task]:
    """Generation with a static cache by compiled models: one graph for the prompt, one for the steps.

    On a GPU transformers compiles the steps by itself, and replays them as CUDA graphs; a prompt compiled by us would
    have the cache made within a graph, which then cannot be replayed.
    """
    torch._dynamo.config.recompile_limit = 8 * len(models)  # they share the code that is compiled
    if not bench.place.on_cpu:
        once = CompileConfig(fullgraph=True)
        return generate(bench, models, rows=1, cache_implementation="static", compile_config=once)
    backend = "inductor" if bench.size.layers >= 12 else "eager"  # of toys it is enough to see that they run
    for model in models.values():
        host: Any = model.get_base_model() if isinstance(model, PeftModel) else model
        host.forward = torch.compile(host.forward, fullgraph=True, dynamic=False, backend=backend)
    return generate(bench, models, rows=1, cache_implementation="static")


def train(bench: Bench, _: Models) -> dict[str, Task]:
    def run(step: Callable[[], None], _: None) -> None:
        step()

    return {name: Task(partial(run, build(bench))) for name, build in STEPS.items()}


def _table() -> dict[str, Scenario]:
    tokens = "{0.new_tokens} new tokens after a prompt of {0.prompt}"
    call = "{0.experts} experts, batch {0.batch} x {0.length}"
    table = {
        "forward": Scenario("core", "batch {0.batch} x {0.length}", "bare", forward, CORE),
        "generate, batch 1": Scenario("core", tokens, "bare", partial(generate, rows=1, slow_rounds=3), CORE),
        "generate, batch 1 x 256": Scenario(
            *("core", tokens, "bare", partial(generate, rows=1)),
            ("bare", "floor", "peft all", "peft X-LoRA", "sum", "mole block"),
            {"prompt": 256},
        ),
        "generate, batch 2 x 256": Scenario(
            *("core", tokens, "bare", partial(generate, rows=2)),
            ("bare", "floor", "peft all", "peft X-LoRA", "sum", "mole block"),
            {"prompt": 256},
            rounds=3,
        ),
        "train": Scenario("core", "forward, backward and AdamW, batch {0.batch} x {0.length}", "peft LoRA", train),
        "generate, batch 8": Scenario("decode", tokens, "bare", partial(generate, rows=8), CORE),
    }
    without = tuple(name for name in CORE if name != "peft X-LoRA")
    table |= {
        "generate, batch 32": Scenario(
            "decode", tokens, "bare", partial(generate, rows=32), without, {"new_tokens": 8}, rounds=3
        ),
        "prefill": Scenario(
            "decode", "batch 1 x {0.length}, into a cache", "bare", partial(forward, rows=1, cache=True), FEW
        ),
        "long prompt": Scenario(
            *("decode", "batch 1 x {0.length}, into a cache", "bare", partial(forward, rows=1, cache=True), FEW),
            {"length": 2048},
            rounds=3,
        ),
    }
    table["compiled, generate"] = Scenario(
        *("compiled", tokens + ", compiled, static cache", "bare", compiled, (*FEW, "pooled: prompt"))
    )
    for count in (1, 2, 4, 8, 16, 32, 64, 128):
        names = tuple(name for name in FEW if count > 1 or name != "mole top-2")
        changes = {"experts": count, "rank": 8, "alpha": 16}
        rounds = 3 if count > 32 else None
        table[f"N = {count}"] = Scenario("scale", call + ", rank 8", "bare", forward, names, changes, rounds)
    table["N = 32, rank 16"] = Scenario("scale", call, "bare", forward, FEW, {"experts": 32})
    for rank in (4, 16, 32, 64):
        changes = {"rank": rank, "alpha": 2 * rank}
        table[f"rank {rank}"] = Scenario("ranks", call, "bare", forward, FEW, changes)
    table["mixed ranks"] = Scenario("ranks", call + ", ranks 4 to 64", "bare", forward, FEW, {"mixed": True})
    more = tuple(contender.name for contender in GATES)
    table["gates"] = Scenario("gates", call, "bare", forward, ("bare", "floor", "mole block", "mole matrix", *more))
    cached = tuple(name for name in more if name != "pooled: mean")  # which refuses a cache
    table["gates, decoding"] = Scenario(
        *("gates", tokens, "bare", partial(generate, rows=1), ("bare", "floor", "mole block", "mole matrix", *cached)),
        rounds=3,
    )
    few = ("bare", "mole top-2", *(contender.name for contender in FETCHED))
    changes = {"experts": 128, "rank": 8, "alpha": 16}
    table |= {
        "paging, forward": Scenario("paging", call + ", rank 8", "bare", forward, few, changes, rounds=3),
        "paging, generate": Scenario("paging", tokens, "bare", partial(generate, rows=1), few, changes, rounds=3),
    }
    t5 = {"family": "t5", "layers": 6}
    wide = {"width": 2048, "intermediate": 5632, "heads": 16, "layers": 4}
    table |= {
        "T5, forward": Scenario("shapes", call, "bare", forward, FEW, t5),
        "T5, generate": Scenario("shapes", tokens, "bare", partial(generate, rows=1), FEW, t5),
        "wide, forward": Scenario("shapes", call + ", width 2048", "bare", forward, FEW, wide, rounds=3),
        "attach": Scenario("start", "{0.experts} experts from files", "peft all", attaching),
        "attach 128": Scenario(
            *("start", "{0.experts} rank-{0.rank} experts from files", "peft all", attaching, ()),
            {"experts": 128, "rank": 8, "alpha": 16},
            rounds=3,
        ),
        "save and load": Scenario("start", "{0.experts} experts, block gates", "save", saving),
        "import": Scenario("start", "a fresh interpreter", "torch", importing),
    }
    rows = ("bare", *(contender.name for contender in ROWS))
    many = {"batch": BATCH, "length": 64, "new_tokens": 8}
    table |= {
        "rows, forward": Scenario("rows", "batch {0.batch} x {0.length}", "one mixture", forward, rows, many),
        "rows, generate": Scenario("rows", tokens, "one mixture", partial(generate, rows=BATCH), rows, many, rounds=3),
    }
    return table


SCENARIOS = _table()
