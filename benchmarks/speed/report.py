"""From seconds to ratios, required bounds, JSON and tables."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from speed.place import HERE, Place
from speed.timing import Spread, ratios

FORMAT = 2


@dataclass(frozen=True)
class Bound:
    """What is required of ``of / to``, a ratio of times; without ``to``, of the seconds that ``of`` takes."""

    scenario: str
    of: str
    to: str | None
    at_most: float | None = None
    at_least: float | None = None

    @property
    def text(self) -> str:
        unit = "" if self.to else " s"
        return (f"<= {self.at_most}" if self.at_most is not None else f">= {self.at_least}") + unit

    def holds(self, measured: float) -> bool:
        least, most = self.at_least, self.at_most
        return (most is None or measured <= most) and (least is None or measured >= least)

    def measured(self, rows: Mapping[str, Any]) -> Spread | None:
        """From a scenario's contenders, if they took part."""
        if self.of not in rows or (self.to is not None and self.to not in rows):
            return None
        of: list[float] = rows[self.of]["seconds"]
        return Spread.of(of) if self.to is None else ratios(of, rows[self.to]["seconds"])


BOUNDS = (
    Bound("forward", "sum", "bare", at_most=1.30),
    Bound("forward", "mole block", "bare", at_most=1.34),
    Bound("forward", "mole top-2", "bare", at_most=1.15),
    Bound("forward", "peft all", "sum", at_least=1.35),
    Bound("generate, batch 1", "sum", "bare", at_most=1.45),
    Bound("generate, batch 1", "mole block", "bare", at_most=1.45),
    Bound("generate, batch 1", "peft all", "sum", at_least=1.35),
    Bound("generate, batch 1", "peft X-LoRA", "mole block", at_least=15),
    Bound("generate, batch 2 x 256", "mole block", "bare", at_most=1.45),
    Bound("generate, batch 2 x 256", "peft X-LoRA", "mole block", at_least=18),
    Bound("train", "mole block", "peft LoRA", at_most=1.25),
    Bound("forward", "mole block", "floor", at_most=1.06),
    Bound("forward", "mole matrix", "floor", at_most=1.10),
    Bound("forward", "mole top-2", "bare", at_most=1.12),
    Bound("generate, batch 1", "mole block", "bare", at_most=1.32),
    Bound("generate, batch 1", "peft X-LoRA", "mole block", at_least=18),
    Bound("generate, batch 1", "peft all", "mole block", at_least=1.8),
    Bound("generate, batch 1 x 256", "mole block", "bare", at_most=1.32),
    Bound("generate, batch 1 x 256", "peft X-LoRA", "mole block", at_least=18),
    Bound("forward", "one expert", "peft 1", at_most=1.02),
    Bound("forward", "folded", "bare", at_most=1.03),
    Bound("N = 32, rank 16", "mole block", "floor", at_most=1.06),
    Bound("N = 32, rank 16", "mole matrix", "floor", at_most=1.10),
    Bound("N = 32, rank 16", "peft all", "mole block", at_least=1.9),
    Bound("N = 32, rank 16", "mole top-2", "bare", at_most=1.2),
    Bound("N = 128", "mole top-2", "bare", at_most=1.3),
    Bound("rows, forward", "8 mixtures", "one mixture", at_most=1.2),
    Bound("rows, generate", "8 mixtures", "one mixture", at_most=1.2),
    Bound("attach 128", "sum", None, at_most=3),
    Bound("attach 128", "mole block", None, at_most=3),
    Bound("import", "loraweave", "torch", at_most=1.1),
    Bound("import", "loraweave --help", None, at_most=0.5),
    Bound("images", "switch", "peft 1", at_most=1.05),
    Bound("images", "composite", "three runs, peft 1", at_most=1.0),
    Bound("images", "composite, published", "composite", at_least=1.12),
    Bound("images", "merge, folded", "bare", at_most=1.02),
    Bound("images", "merge", "floor", at_most=1.06),
    Bound("images", "mole", "floor", at_most=1.06),
    Bound("images", "composite", "composite, floor", at_most=1.06),
    Bound("images, DiT", "switch", "peft 1", at_most=1.05),
    Bound("images, DiT", "composite", "three runs, peft 1", at_most=1.0),
    Bound("images, DiT", "merge, folded", "bare", at_most=1.02),
    Bound("images, DiT", "merge", "floor", at_most=1.06),
    Bound("images, DiT", "mole", "floor", at_most=1.06),
    Bound("images, DiT", "composite", "composite, floor", at_most=1.06),
)
# Of the shapes of a 7B decoder and of SDXL, in bf16 on an H200.
LARGE_BOUNDS = (
    Bound("prefill", "mole block", "bare", at_most=1.10),
    Bound("compiled, generate", "mole block", "bare", at_most=1.15),
    Bound("images", "composite, published", "composite", at_least=1.5),
)

Results = dict[str, dict[str, Any]]


def summary(seconds: dict[str, list[float]], baseline: str) -> dict[str, Any]:
    """One scenario's figures: of each contender the spread of its seconds and of its ratio to the baseline."""
    rows = {}
    for name, sample in seconds.items():
        time, ratio = Spread.of(sample), ratios(sample, seconds[baseline])
        rows[name] = {
            "median": time.median,
            "quartiles": [time.low, time.high],
            "ratio": ratio.median,
            "ratio_quartiles": [ratio.low, ratio.high],
            "seconds": sample,
        }
    return {"baseline": baseline, "contenders": rows}


def bounds_of(size: str) -> tuple[Bound, ...]:
    """What is required at a size of ``models.SIZES``."""
    return LARGE_BOUNDS if size == "large" else BOUNDS


def judge(
    results: Results, memory: Mapping[str, Mapping[str, int]] | None = None, bounds: Iterable[Bound] = BOUNDS
) -> Iterator[dict[str, Any]]:
    """The bounds of times whose scenario was run, then those of memory, with what was measured."""
    for bound in bounds:
        measured = bound.measured(results.get(bound.scenario, {}).get("contenders", {}))
        if measured is not None:
            yield {
                "scenario": bound.scenario,
                "ratio": f"{bound.of} / {bound.to}" if bound.to else bound.of,
                "bound": bound.text,
                "measured": measured.median,
                "quartiles": [measured.low, measured.high],
                "holds": bound.holds(measured.median),
            }
    for ratio, most, value in _memory_ratios(memory or {}):
        yield {
            "scenario": "peak memory",
            "ratio": ratio,
            "bound": f"<= {most}",
            "measured": value,
            "quartiles": [value, value],
            "holds": value <= most,
        }


def _memory_ratios(memory: Mapping[str, Mapping[str, int]]) -> Iterator[tuple[str, float, float]]:
    """What is required of peak memory: what, at most how much, how much it is."""
    if {"mole block", "peft LoRA"} <= memory.keys():
        yield "train: mole block / peft LoRA", 1.0, memory["mole block"]["peak"] / memory["peft LoRA"]["peak"]
    if {"attach: sum", "attach: bare"} <= memory.keys() and "files" in memory["attach: sum"]:
        more = memory["attach: sum"]["peak"] - memory["attach: bare"]["peak"]
        yield "attach 128: (sum - bare) / LoRA files", 1.05, more / memory["attach: sum"]["files"]


def environment(threads: int, place: Place = HERE) -> dict[str, Any]:
    """What the figures depend on."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": threads,
        "load_before": os.getloadavg()[0],
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in ("torch", "transformers", "peft", "diffusers")},
        "instructions": torch.backends.cpu.get_cpu_capability(),
        **place.facts(),
    }


def merged(kept: dict[str, Any], new: dict[str, Any], file: Path) -> dict[str, Any]:
    """A report to add to: the one kept, if it was measured in the same surroundings and at the same size.

    Raises:
        ValueError: it was not; figures of two machines do not belong in one file.
    """
    same = {**dict.fromkeys(kept["environment"]), **new["environment"], "size": new["size"]}
    for key, value in same.items():
        if key in ("load_before", "processor"):
            continue
        before = kept.get(key) if key == "size" else kept["environment"].get(key)
        if before != value:
            raise ValueError(f"{file}: was measured with {key} {before!r}, this is {value!r}; choose another file")
    return {**kept, "environment": new["environment"]}


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    fields: dict[str, str] = {}
    if info.exists():
        for line in reversed(info.read_text().splitlines()):
            key, _, value = line.partition(":")
            fields[key.strip()] = value.strip()
    if "model name" not in fields:
        return platform.processor() or platform.machine()
    numbers = f"family {fields.get('cpu family')}, model {fields.get('model')}"
    return f"{fields['model name']} ({numbers}, {fields.get('cpu MHz', '?')} MHz)"


# ---------------------------------------------------------------- tables

Rows = list[list[str]]


def time_rows(scenario: dict[str, Any]) -> tuple[list[str], Rows]:
    """Head and rows of one scenario's table."""
    head = ["contender", "ms", "quartiles", f"x {scenario['baseline']}", "quartiles", "rounds"]
    rows = []
    contenders = scenario["contenders"]
    floor = contenders.get("floor")
    if floor:
        head.insert(5, "x floor")
    for name, figures in contenders.items():
        low, high = figures["quartiles"]
        ratio_low, ratio_high = figures["ratio_quartiles"]
        row = [name, f"{figures['median'] * 1e3:.1f}", f"{low * 1e3:.1f} - {high * 1e3:.1f}"]
        row += [f"{figures['ratio']:.2f}", f"{ratio_low:.2f} - {ratio_high:.2f}", str(len(figures["seconds"]))]
        if floor:
            row.insert(5, f"{ratios(figures['seconds'], floor['seconds']).median:.2f}")
        rows.append(row)
    return head, rows


def memory_rows(memory: dict[str, dict[str, int]]) -> tuple[list[str], Rows]:
    head = ["process", "peak MB", "of it before the first step"]
    return head, [[n, f"{m['peak'] / 1e6:.0f}", f"{m['before'] / 1e6:.0f}"] for n, m in memory.items()]


def arithmetic_rows(scenarios: Results) -> tuple[list[str], Rows]:
    """What models and the LoRAs in them compute and read, and the ratio that follows: of text, the linear layers for
    one token; of pictures, all of a denoiser for one step."""
    head = ["scenario", "base GFLOP", "LoRA GFLOP", "base MB", "LoRA MB", "x bare"]
    found = {name: row["arithmetic"] for name, row in scenarios.items() if row.get("arithmetic")}
    keys = ("base_gflop", "lora_gflop", "base_mb", "lora_mb", "ratio")
    return head, [
        [name, *(format(a[key], form) for key, form in zip(keys, (".3f", ".3f", ".0f", ".0f", ".2f"), strict=True))]
        for name, a in found.items()
    ]


def bound_rows(bounds: Sequence[dict[str, Any]]) -> tuple[list[str], Rows]:
    head = ["scenario", "ratio", "required", "measured", "quartiles", "holds"]
    return head, [
        [
            b["scenario"],
            b["ratio"],
            b["bound"],
            f"{b['measured']:.2f}",
            f"{b['quartiles'][0]:.2f} - {b['quartiles'][1]:.2f}",
            "yes" if b["holds"] else "NO",
        ]
        for b in bounds
    ]


def tables(report: dict[str, Any]) -> Iterator[tuple[str, list[str], Rows]]:
    """Title, head and rows of every table of a report."""
    for name, scenario in report["scenarios"].items():
        yield f"{name} ({scenario['what']})", *time_rows(scenario)
    if report.get("memory"):
        yield "peak memory", *memory_rows(report["memory"])
    if any(row.get("arithmetic") for row in report["scenarios"].values()):
        yield "floor by arithmetic", *arithmetic_rows(report["scenarios"])
    if report["bounds"]:
        yield "required", *bound_rows(report["bounds"])


def show(report: dict[str, Any], console: Console) -> None:
    for title, head, rows in tables(report):
        table = Table(title=title, title_justify="left")
        for i, column in enumerate(head):
            table.add_column(column, justify="left" if i == 0 else "right")
        for row in rows:
            table.add_row(*row, style="red" if row[-1] == "NO" else None)
        console.print(table)


def markdown(report: dict[str, Any]) -> str:
    """The same tables, to be committed next to the JSON."""
    parts = [f"{key}: {value}" for key, value in report["environment"].items()]
    text = ["# Speed", "", "; ".join(parts), ""]
    for title, head, rows in tables(report):
        text += [f"## {title}", "", markdown_table(head, rows)]
    return "\n".join(text)


def markdown_table(head: Sequence[str], rows: Rows) -> str:
    """A table in Markdown, with the line's end."""
    return "\n".join([_line(head), _line(["---"] + ["--:"] * (len(head) - 1)), *map(_line, rows), ""])


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
