"""``loraweave merge``: several LoRAs become one ordinary LoRA."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from loraweave.cli.verb import Verb
from loraweave.errors import LoraweaveError

if TYPE_CHECKING:
    from loraweave.experts.types import Expert

_METHODS = """\
methods (all options with their defaults; weights are 1 unless --weight says otherwise):
  concat           the weighted sum, exactly; ranks add up
  linear           the same, or with space=factors as LoRAHub published it; negate=both
  svd              the best approximation of the weighted sum; rank=the largest
  magnitude_prune  of each LoRA only the largest numbers; density=0.2 space=delta rank=added up
  ties             largest numbers, elected signs, mean of those that agree; density=0.2 space=delta rank=added up
  dare_linear      random numbers dropped, the others rescaled; density=0.5 seed=0 space=delta rank=added up
  dare_ties        dare, then elected signs; density=0.5 seed=0 space=delta rank=added up
  knots            then=ties in a basis that the LoRAs' outputs share; density= seed=0
  core_space       then=ties in bases that their inputs and outputs share; density= seed=0"""


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "how", metavar="METHOD|EXPRESSION", help="one of the methods below, or arithmetic on names: 'a - 0.4*b'"
    )
    parser.add_argument("loras", metavar="LORA", nargs="*", help="PEFT folder, hub id, or zoo:NAME; called by its name")
    parser.add_argument(
        "--expert", metavar="NAME=LORA", action="append", default=[], help="a LoRA under a name of your choice"
    )
    parser.add_argument("-o", "--out", metavar="DIR", required=True, help="where the merged LoRA is written")
    parser.add_argument(
        "--set", metavar="OPTION=VALUE", action="append", default=[], help="an option of the method, e.g. density=0.3"
    )
    parser.add_argument(
        "--weight", metavar="NAME=NUMBER", action="append", default=[], help="strength of one LoRA (default: 1)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the LoRA in DIR; its other files stay")
    parser.epilog = f"{parser.epilog}\n\n{_METHODS}"


def _run(options: argparse.Namespace) -> None:
    from loraweave.experts.writer import check_folder, write_expert

    sources = _sources(options.loras, options.expert)
    check_folder(options.out, options.overwrite)
    settings = _settings(options.set)
    merged, said = _merged(options.how, sources, settings, weights_of(options.weight))
    place = write_expert(merged, options.out, overwrite=options.overwrite)
    ranks = sorted({factors.rank for factors in merged.factors.values()})
    rank = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
    print(f"{said}: {len(merged.factors)} modules, {rank}")
    print(f"written to {place}; try: loraweave inspect {place}")


def _merged(
    how: str, sources: Mapping[str, str], settings: Mapping[str, Any], weights: Mapping[str, float]
) -> tuple[Expert, str]:
    """The merged LoRA, and what was done in words."""
    from loraweave.transforms import registry
    from loraweave.transforms.merge import arithmetic, merge

    name = how.strip()
    if name in registry.names() or (re.fullmatch(r"\w+", name) and name not in sources):
        transform: Any = registry.build(name, settings)
        values = {option: getattr(transform, option) for option in registry.options(name)}
        chosen = ", ".join(f"{option}={value}" for option, value in values.items() if value is not None)
        merged = merge(sources, transform, weights=weights)
        return merged, f"{name} of {', '.join(sources)}{f' ({chosen})' if chosen else ''}"
    if weights:
        raise LoraweaveError(f"--weight goes with a method; write the weights into the expression {how!r} itself")
    for option in settings:
        if option != "space":
            raise LoraweaveError(f"--set {option}: an expression has the option 'space' alone (delta or factors)")
    merged = arithmetic(how, sources, **settings)
    return merged, f"{how} (space={settings.get('space', 'delta')})"


def _sources(loras: Sequence[str], named: Sequence[str]) -> dict[str, str]:
    """Name -> source, in the order given: plain LoRAs first, under their folders' names."""
    pairs = [(source.rstrip("/").split("/")[-1].split(":")[-1], source) for source in loras]
    pairs += [_pair(text, "--expert", "NAME=LORA") for text in named]
    sources: dict[str, str] = {}
    for name, source in pairs:
        if name in sources:
            raise LoraweaveError(f"two LoRAs would be called {name!r}; give names: --expert first={source}")
        sources[name] = source
    if not sources:
        raise LoraweaveError("no LoRA to merge; name some, e.g. loras/qa loras/nli, or --expert a=loras/qa")
    return sources


def _settings(assignments: Sequence[str]) -> dict[str, Any]:
    from loraweave.recipe import reading

    settings: dict[str, Any] = {}
    for assignment in assignments:
        option, _ = _pair(assignment, "--set", "OPTION=VALUE")
        if option in settings:
            raise LoraweaveError(f"--set {assignment}: {option!r} is set twice")
        reading.override(settings, assignment)
    return settings


def weights_of(assignments: Sequence[str]) -> dict[str, float]:
    """Expert -> number, of ``--weight NAME=NUMBER``."""
    found: dict[str, float] = {}
    for assignment in assignments:
        name, number = _pair(assignment, "--weight", "NAME=NUMBER")
        if name in found:
            raise LoraweaveError(f"--weight {assignment}: {name!r} is weighed twice")
        try:
            found[name] = float(number)
        except ValueError as error:
            raise LoraweaveError(f"--weight {assignment}: expected a number, got {number!r}") from error
    return found


def _pair(text: str, option: str, form: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not name.strip() or not value.strip():
        raise LoraweaveError(f"{option} {text}: expected {form}")
    return name.strip(), value.strip()


VERB = Verb(
    name="merge",
    summary="several LoRAs become one ordinary LoRA, by arithmetic, TIES, DARE, SVD ...",
    details="Merge LoRAs into one ordinary LoRA folder, which peft and everything else can load. No model is needed.\n"
    "A mixture with gates keeps more of what each LoRA could do; a merge costs nothing at all when it is used.",
    examples=[
        (
            "loraweave merge ties loras/qa loras/nli -o merged --set density=0.3 --weight qa=0.5",
            "a method and its options",
        ),
        ("loraweave merge 'qa - 0.4*nli' loras/qa loras/nli -o less", "arithmetic: add one, unlearn another"),
        (
            "loraweave merge '(a + b) / 2' --expert a=loras/qa --expert b=someone/flan-nli-lora -o mean",
            "the mean of a folder and a hub id, under names of your choice",
        ),
        ("loraweave merge svd loras/qa loras/nli -o small --set rank=8", "the sum of both in rank 8"),
    ],
    arguments=_arguments,
    run=_run,
)
