"""Makes the rows that the text recipes of the MoLE paper train and test on, from public sets.

    python scripts/recipes/rows.py recipes/mole/table04.yaml
    python scripts/recipes/rows.py recipes/mole/table03/*.yaml recipes/mole/table06/*.yaml
    python scripts/recipes/rows.py recipes/mole/table03/bbh.yaml --from BIG-Bench-Hard   # a clone; or other copies
    python scripts/recipes/rows.py --list                                  # what there is; loads nothing

The files go where the recipes look for them. Files that are done are kept, so an interrupted run goes on. Sets come
from the Hugging Face hub through ``datasets`` (pip install 'datasets>=5'), streamed; none of their code is run. With
``--from FOLDER`` nothing is looked up: FOLDER has a copy of each set, as SET/CONFIG/SPLIT.parquet, .jsonl, .json or
.csv with the hub's fields (SET is the last part of the hub id), or with its files as the hub names them; of BIG-Bench
Hard also as upstream has it, bbh/TASK.json.
"""

from __future__ import annotations

import argparse
import fnmatch
import sys
from collections.abc import Sequence
from pathlib import Path

from row_files import Numbers, Wanted, alone, chosen_rows, drawing, state, wanted_by, write
from row_sets import CONVERTED, SETS
from row_sources import hub_source, local_source, read

from loraweave.cli.verb import Parser, positive
from loraweave.errors import LoraweaveError, unknown

FOLDER = Path("recipes/mole/data")


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    whole = Parser(
        prog="rows.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    whole.add_argument("recipes", metavar="RECIPE", nargs="*", type=Path, help="YAML files whose rows to make")
    whole.add_argument("-o", "--out", type=Path, metavar="DIR", help="put the rows here, not where the recipes look")
    whole.add_argument("--from", dest="copies", type=Path, metavar="FOLDER", help="local copies of the sets")
    whole.add_argument("--only", metavar="NAME", nargs="+", help="only these, e.g. anli_r1 or 'anli_*'")
    whole.add_argument(
        "--train-rows", type=positive, metavar="N", help="rows to learn from, of each set (default: 200; BBH: 5)"
    )
    whole.add_argument(
        "--test-rows", type=positive, metavar="N", help="most rows to test on, drawn at random (default: all)"
    )
    whole.add_argument("--seed", type=_seed, default=0, metavar="N", help="which rows are drawn (default: 0)")
    whole.add_argument("--both", action="store_true", help="train and test rows of each set, though a recipe names one")
    whole.add_argument("--overwrite", action="store_true", help="replace rows that were made otherwise or changed")
    whole.add_argument("--list", action="store_true", help="say which sets, licences and splits; load nothing")
    return whole


def run(options: argparse.Namespace) -> None:
    """Does it. Raises :class:`LoraweaveError` for whatever the user can mend."""
    numbers = Numbers(options.train_rows, options.test_rows, options.seed)
    wanted = _wanted(options)
    states = {one.path: state(one, numbers) for one in wanted}
    if options.list:
        print("\n".join(listed(wanted, numbers, states)))
        return
    strange = [(path, why) for path, why in states.items() if why not in ("missing", "made")]
    if strange and not options.overwrite:
        (path, why), more = strange[0], f" (and {len(strange) - 1} more)" if len(strange) > 1 else ""
        raise LoraweaveError(f"{path}: {why}{more}; --overwrite replaces it, --out DIR leaves it alone")
    todo = [one for one in wanted if states[one.path] != "made"]
    with alone(one.path.parent for one in todo):
        for one in todo:
            make(one, numbers, options.copies)
    again = " ".join(map(str, options.recipes))
    print(f"{len(todo)} files made, {len(wanted) - len(todo)} were there; see: loraweave validate {again}")


def make(wanted: Wanted, numbers: Numbers, copies: Path | None) -> None:
    """Makes one file. Raises as the sources do."""
    chosen, split = wanted.set, wanted.set.split(wanted.part)
    source = hub_source(chosen, split) if copies is None else local_source(chosen, split, copies)
    enough = numbers.learn(chosen) if wanted.part == "train" and not chosen.cut else None
    bar = wanted.title if sys.stderr.isatty() else ""
    items = read(chosen, source, enough, drawing(wanted, numbers), progress=bar)
    rows = chosen_rows(wanted, items, numbers)
    write(wanted, rows, numbers, source.origin)
    asked = numbers.learn(chosen) if wanted.part == "train" else numbers.test
    fewer = f" (all there are; {asked:,} were asked for)" if asked and len(rows) < asked else ""
    blank = sum(not item.complete for item in items)
    left_out = f"; {blank:,} without a question or an answer left out" if blank else ""
    print(f"{wanted.path}: {len(rows):,} rows{fewer} of {chosen.title}, {split}{left_out}")


def listed(wanted: Sequence[Wanted], numbers: Numbers, states: dict[Path, str]) -> list[str]:
    """A table of files, without loading anything."""
    rows = [("file", "set", "split", "licence", "rows", "state")]
    for one in wanted:
        chosen = one.set
        of = chosen.rows[0] if one.part == "train" else chosen.rows[1]
        learn = numbers.learn(chosen)
        if one.part == "train":
            count = f"{min(learn, of):,} of {of:,}"
        else:
            left = of - learn if chosen.cut else of
            count = f"the other {left:,}" if chosen.cut and not numbers.test else f"{min(numbers.test or of, left):,}"
            count += f" of {of:,}" if numbers.test else ""
        place = chosen.title + (" *" if chosen.parquet else "")
        rows.append((str(one.path), place, chosen.split(one.part), chosen.licence, count, states[one.path]))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    table = ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return [
        *table,
        f"* in the hub's own parquet copy ({CONVERTED}), as the set itself is a script.",
        "Rows as the hub counts them; rows of one input become one where several answers are right.",
    ]


def _wanted(options: argparse.Namespace) -> list[Wanted]:
    if options.recipes:
        found = wanted_by(options.recipes, options.out, both=options.both)
    elif options.list:
        folder = options.out or FOLDER
        found = [Wanted(folder / f"{name}.{part}.jsonl", name, part) for name in SETS for part in ("train", "test")]
    else:
        raise LoraweaveError("expected at least one RECIPE, or --list; see rows.py --help")
    for pattern in options.only or ():
        if not any(fnmatch.fnmatchcase(one.name, pattern) for one in found):
            raise unknown("set", pattern, dict.fromkeys(one.name for one in found))
    return [
        one for one in found if not options.only or any(fnmatch.fnmatchcase(one.name, only) for only in options.only)
    ]


def _seed(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 0, got {text!r}")
    return int(text)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs it; returns the exit code: 0, 2 for what the user can mend, 130 when interrupted."""
    try:
        run(parser().parse_args(argv))
    except LoraweaveError as error:
        for line in str(error).splitlines():
            print(f"error: {line}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the files made so far are kept", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
