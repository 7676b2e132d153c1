"""Time loraweave against its peers: ``python benchmarks/speed/run.py --help``."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from rich.console import Console

from speed import memory, report
from speed.checks import check
from speed.models import SIZES, Bench, Size, arithmetic, make_bench
from speed.ours import FETCHED, GATES, OURS
from speed.peers import PEERS, Contender
from speed.place import DTYPES, Place
from speed.rows import ROWS
from speed.scenarios import SCENARIOS, Scenario
from speed.timing import interleave
from speed.training import STEPS

CONTENDERS: dict[str, Contender] = {contender.name: contender for contender in (*PEERS, *OURS, *GATES, *FETCHED, *ROWS)}
IMAGES = "images"
IMAGE_SCENARIOS = (IMAGES, "images, DiT")  # of denoisers.IMAGE_SIZES, which takes diffusers to import
GROUPS = (*dict.fromkeys(scenario.group for scenario in SCENARIOS.values()), IMAGES)
MOST_IMAGE_ROUNDS = 3


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Time loraweave against its peers, interleaved, in one process.")
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each contender (default: 5)")
    parser.add_argument("--threads", type=int, default=2, help="threads of every contender (default: 2)")
    parser.add_argument("--group", default=",".join(GROUPS), help=f"comma-separated, of: {', '.join(GROUPS)}")
    parser.add_argument("--contenders", help="comma-separated names; default: all (bare always takes part)")
    parser.add_argument("--quick", action="store_true", help="toy shapes, two rounds, no slow contenders: does it run?")
    parser.add_argument(
        "--size", choices=SIZES, default="full", help="'full' is the one that counts; 'large': for GPUs"
    )
    parser.add_argument("--device", default="cpu", help="where models run, e.g. cuda (default: cpu)")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of models and LoRAs (default: float32)")
    parser.add_argument("--seed", type=int, default=0, help="of the order within each round")
    parser.add_argument("--resume", action="store_true", help="skip what the output holds with as many rounds")
    parser.add_argument("-o", "--output", type=Path, help="add to this JSON file, and write tables beside it as .md")
    options = parser.parse_args(arguments)
    options.group = options.group.split(",")
    for group in options.group:
        if group not in GROUPS:
            parser.error(f"--group: {group!r} is none of: {', '.join(GROUPS)}")
    options.contenders = options.contenders.split(",") if options.contenders else list(CONTENDERS)
    for name in options.contenders:
        if name not in CONTENDERS:
            parser.error(f"--contenders: {name!r} is none of: {', '.join(CONTENDERS)}")
    try:
        torch.empty(0, device=options.device)
    except (RuntimeError, AssertionError) as error:  # torch's own ways to say that it is unknown or not there
        parser.error(f"--device: {options.device!r} cannot be used: {str(error).splitlines()[0]}")
    if options.resume and options.output is None:
        parser.error("--resume: needs the output (-o) to resume")
    if options.quick:
        options.size, options.rounds = "tiny", min(options.rounds, 2)
    return options


class Run:
    """One run of the suite: what is measured is in ``result``, and in the output file, as soon as it is there."""

    def __init__(self, options: argparse.Namespace, folder: Path, console: Console) -> None:
        self.options, self.folder, self.console = options, folder, console
        self.start = time.perf_counter()
        self.place = Place(options.device, options.dtype)
        torch.set_num_threads(options.threads)
        self.result: dict[str, Any] = {
            "format": report.FORMAT,
            "environment": report.environment(options.threads, self.place),
            "size": {"name": options.size, **dataclasses.asdict(SIZES[options.size])},
            "scenarios": {},
            "memory": {},
            "checks": {},
        }
        if options.output is not None and options.output.exists():
            self.result = report.merged(json.loads(options.output.read_text()), self.result, options.output)

    def say(self, what: str) -> None:
        self.console.print(f"{time.perf_counter() - self.start:6.0f} s  {what}", highlight=False)

    def all(self) -> dict[str, Any]:
        """Every scenario of the chosen groups; those of one group with the same shapes share their models."""
        batches: dict[tuple[str, Size], dict[str, Scenario]] = {}
        for name, scenario in SCENARIOS.items():
            if scenario.group in self.options.group and not self._done(name, scenario.rounds):
                key = scenario.group, scenario.size(self.options.size)
                batches.setdefault(key, {})[name] = scenario
        for number, ((_, size), scenarios) in enumerate(batches.items()):
            experts = self.folder / str(number)
            self._batch(size, scenarios, experts)
            shutil.rmtree(experts, ignore_errors=True)  # 128 experts take most of a gigabyte
        if IMAGES in self.options.group:
            for name in (name for name in IMAGE_SCENARIOS if not self._done(name, MOST_IMAGE_ROUNDS)):
                self._images(name)
        self._keep()
        return self.result

    def _rounds(self, most: int | None) -> int:
        return min(self.options.rounds, most or self.options.rounds)

    def _done(self, name: str, most: int | None) -> bool:
        known = self.result["scenarios"].get(name)
        done = self.options.resume and known is not None and known.get("rounds", 0) >= self._rounds(most)
        if done:
            self.say(f"{name}: done before")
        return done

    def _batch(self, size: Size, scenarios: dict[str, Scenario], folder: Path) -> None:
        self.say(f"{', '.join(scenarios)}: building")
        bench = make_bench(size, folder, self.place)
        used = {name for scenario in scenarios.values() for name in scenario.contenders}
        wanted = [c for c in CONTENDERS.values() if c.name in used and c.name in (*self.options.contenders, "bare")]
        with bench.contexts:
            models = {c.name: c.build(bench) for c in wanted if not (c.slow and self.options.quick)}
            checks = check(models, bench) if models else {}
            for name, scenario in scenarios.items():
                mine = {contender: models[contender] for contender in scenario.contenders if contender in models}
                self._time(name, scenario, bench, mine)
                self.result["checks"] |= {f"{name}: {key}": value for key, value in checks.items()}
                self._keep()
        if "train" in scenarios:
            self._memory(tuple(STEPS), size, folder, self._rounds(None))
        if "attach 128" in scenarios:
            self._memory(memory.ATTACHING, size, folder)

    def _time(self, name: str, scenario: Scenario, bench: Bench, models: dict[str, Any]) -> None:
        rounds = self._rounds(scenario.rounds)
        seconds = interleave(
            scenario.tasks(bench, models),
            rounds=rounds,
            seed=self.options.seed,
            progress=lambda what: self.say(f"{name}: {what}"),
            wait=self.place.wait,
        )
        self._record(name, scenario.what.format(bench.size), scenario.group, rounds, seconds, scenario.baseline)
        if models:
            self.result["scenarios"][name]["arithmetic"] = arithmetic(bench)

    def _record(
        self, name: str, what: str, group: str, rounds: int, seconds: dict[str, list[float]], baseline: str
    ) -> None:
        facts = {"what": what, "group": group, "rounds": rounds, "load": os.getloadavg()[0]}
        self.result["scenarios"][name] = {**facts, **report.summary(seconds, baseline)}

    def _memory(self, kinds: Sequence[str], size: Size, folder: Path, rounds: int = 1) -> None:
        """Children that take turns; the one with the median peak stands for its kind, as allocators have moods."""
        made: dict[str, list[dict[str, Any]]] = {kind: [] for kind in kinds}
        for _ in range(rounds):
            for kind, runs in made.items():
                self.say(f"peak memory of {kind}")
                runs.append(memory.peak_of(kind, size, folder, self.options.threads, self.place, self.options.size))
        for kind, runs in made.items():
            middle = sorted(runs, key=lambda run: run["peak"])[len(runs) // 2]
            self.result["memory"][kind] = middle | {"peaks": [run["peak"] for run in runs]}
        self._keep()

    def _images(self, name: str) -> None:
        from speed import denoisers, image_floors, images

        self.say(f"{name}: building and checking")
        size = denoisers.IMAGE_SIZES[name][self.options.size]
        folder = self.folder / name
        single = Place(self.place.device)
        bench = denoisers.make_image_bench(size, folder, single)
        made = images.pictures(bench)
        self.result["checks"] |= {f"{name}: {key}": value for key, value in images.check(made).items()}
        warm = self.place != single
        if warm:
            folder /= self.place.dtype
            bench = denoisers.make_image_bench(size, folder, self.place)
            made = images.pictures(bench)
        rounds = self._rounds(MOST_IMAGE_ROUNDS)
        told = partial(interleave, rounds=rounds, seed=self.options.seed, warm=warm, wait=self.place.wait)
        seconds = told(images.tasks(made), progress=lambda what: self.say(f"{name}: {what}"))
        what = f"{size.what}, latent {size.latent}, {size.steps} steps with guidance, 3 rank-{size.rank} LoRAs"
        self._record(name, what, IMAGES, rounds, seconds, "bare")
        self.result["scenarios"][name]["arithmetic"] = image_floors.arithmetic(bench, images.call)
        self._keep()
        del made, bench
        if name == IMAGES:
            self._memory(memory.IMAGES, SIZES[self.options.size], folder)

    def _keep(self) -> None:
        bounds = report.bounds_of(self.result["size"]["name"])
        self.result["bounds"] = list(report.judge(self.result["scenarios"], self.result["memory"], bounds))
        output = self.options.output
        if output is not None:
            output.parent.mkdir(parents=True, exist_ok=True)
            partial_file = output.with_suffix(".partial")
            partial_file.write_text(json.dumps(self.result, indent=1) + "\n")
            partial_file.replace(output)
            output.with_suffix(".md").write_text(report.markdown(self.result))


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    options = parse(arguments)
    console = Console() if sys.stdout.isatty() else Console(width=120)
    with tempfile.TemporaryDirectory() as folder:
        try:
            suite = Run(options, Path(folder), console)
        except ValueError as error:
            raise SystemExit(str(error)) from error
        result = suite.all()
    report.show(result, console)
    if result["environment"]["load_before"] > 0.5:
        console.print(f"The machine was busy before (load {result['environment']['load_before']:.1f}); measure again.")
    if options.output is not None:
        console.print(f"wrote {options.output} and {options.output.with_suffix('.md').name}")
    return result


if __name__ == "__main__":
    main()
