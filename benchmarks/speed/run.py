"""Time loraweave against its peers: ``python benchmarks/speed/run.py --help``."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from rich.console import Console
from torch import nn

from speed import memory, report
from speed.checks import check
from speed.models import SIZES, make_bench
from speed.ours import OURS
from speed.peers import PEERS
from speed.scenarios import SCENARIOS
from speed.timing import interleave
from speed.training import STEPS

GROUPS = tuple(dict.fromkeys(scenario.group for scenario in SCENARIOS.values()))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Time loraweave against its peers, interleaved, in one process.")
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each contender (default: 5)")
    parser.add_argument("--threads", type=int, default=2, help="threads of every contender (default: 2)")
    parser.add_argument("--only", default=",".join(GROUPS), help=f"comma-separated groups of: {', '.join(GROUPS)}")
    parser.add_argument("--contenders", help="comma-separated names; default: all (bare always takes part)")
    parser.add_argument("--quick", action="store_true", help="two rounds, and no slow contenders")
    parser.add_argument("--size", choices=SIZES, default="full", help="'full' is the one that counts")
    parser.add_argument("--seed", type=int, default=0, help="of the order within each round")
    parser.add_argument("-o", "--output", type=Path, help="write this JSON file, and the tables beside it as .md")
    options = parser.parse_args(arguments)
    options.only = options.only.split(",")
    for group in options.only:
        if group not in GROUPS:
            parser.error(f"--only: {group!r} is none of: {', '.join(GROUPS)}")
    known = [contender.name for contender in (*PEERS, *OURS)]
    options.contenders = options.contenders.split(",") if options.contenders else known
    for name in options.contenders:
        if name not in known:
            parser.error(f"--contenders: {name!r} is none of: {', '.join(known)}")
    return options


def measure(options: argparse.Namespace, folder: Path, console: Console) -> dict[str, Any]:
    """Run what was asked for; returns the report as it is written to JSON."""
    torch.set_num_threads(options.threads)
    size = SIZES[options.size]
    result: dict[str, Any] = {
        "format": report.FORMAT,
        "environment": report.environment(options.threads),
        "size": {"name": options.size, **dataclasses.asdict(size)},
        "scenarios": {},
        "memory": {},
    }
    bench = make_bench(size, folder)
    with bench.contexts, console.status("building the contenders") as status:
        models: dict[str, nn.Module] = {}
        if {"forward", "generate"} & set(options.only):
            wanted = [c for c in (*PEERS, *OURS) if c.name in options.contenders or c.name == "bare"]
            models = {c.name: c.build(bench) for c in wanted if not (c.slow and options.quick)}
            status.update("checking that they compute what they say")
            result["checks"] = check(models, bench)
        for name, scenario in SCENARIOS.items():
            if scenario.group not in options.only:
                continue
            seconds = interleave(
                scenario.tasks(bench, models),
                rounds=min(options.rounds, 2) if options.quick else options.rounds,
                calls=scenario.calls,
                seed=options.seed,
                progress=lambda what, name=name: status.update(f"{name}: {what}"),  # type: ignore[misc]
            )
            what = scenario.what.format(size)
            result["scenarios"][name] = {"what": what, **report.summary(seconds, scenario.baseline)}
        if "train" in options.only:
            for step in STEPS:
                status.update(f"peak memory of {step}")
                result["memory"][step] = memory.peak_of(step, options.size, folder, options.threads)
    result["bounds"] = list(report.judge(result["scenarios"]))
    return result


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    options = parse(arguments)
    console = Console() if sys.stdout.isatty() else Console(width=120)
    with tempfile.TemporaryDirectory() as folder:
        result = measure(options, Path(folder), console)
    report.show(result, console)
    if result["environment"]["load_before"] > 0.5:
        console.print(f"The machine was busy before (load {result['environment']['load_before']:.1f}); measure again.")
    if options.output is not None:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(result, indent=1) + "\n")
        options.output.with_suffix(".md").write_text(report.markdown(result))
        console.print(f"wrote {options.output} and {options.output.with_suffix('.md').name}")
    return result


if __name__ == "__main__":
    main()
