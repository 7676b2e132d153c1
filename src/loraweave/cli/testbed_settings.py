"""What ``loraweave testbed`` notes beside its pictures, so that pictures made otherwise are never mixed with them."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from loraweave import persistence
from loraweave.cli.painting import Way
from loraweave.errors import LoraweaveError
from loraweave.files import write_json_atomic
from loraweave.policies import registry
from loraweave.recipe import Recipe
from loraweave.recipe.testbeds import Testbed

SETTINGS = "testbed.json"
GATES = "gates"
"""Folder of the gates that the test bed trains."""
Noted = Mapping[str, Any]


def folders(labels: Iterable[str]) -> dict[str, str]:
    """Label -> name of the folder of its pictures.

    Raises:
        LoraweaveError: a label makes no name, two would share one, or one has the name of the gates' folder.
    """
    found: dict[str, str] = {}
    for label in labels:
        name = re.sub(r"[^A-Za-z0-9_.-]+", "-", label)
        if not name.strip("."):
            raise LoraweaveError(f"compare: the label {label!r} makes no name of a folder; choose another")
        if name == GATES:
            raise LoraweaveError(f"compare.{label}: the folder {GATES!r} is for gates; choose another label")
        if name in found.values():
            other = next(one for one, own in found.items() if own == name)
            raise LoraweaveError(
                f"compare.{label}: its pictures would go into the folder of {other!r}; choose another label"
            )
        found[label] = name
    return found


def noted(out: Path) -> dict[str, Any] | None:
    """What stands beside the pictures in ``out``, ``None`` if there are none.

    Raises:
        LoraweaveError: it cannot be read.
    """
    path = out / SETTINGS
    # What failed before its first picture binds nobody.
    if not path.exists() or not any(out.glob("*/*.png")):
        return None
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        dict(found["methods"])
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise LoraweaveError(f"cannot read {str(path)!r} ({error}); choose another folder") from error
    return found


def note(
    out: Path,
    recipe: Recipe,
    testbed: Testbed,
    ways: Mapping[str, Way],
    trained: Mapping[str, Noted],
    before: Mapping[str, Any] | None,
) -> None:
    """Note how the pictures are painted; pictures with other settings must not be mixed with them.

    Other methods, and sets that more pictures are made of, are no other settings.

    Args:
        out: where they are.
        recipe: whose they are.
        testbed: its section.
        ways: the methods.
        trained: label -> by what its gates are trained here.
        before: what :func:`noted` found.

    Raises:
        LoraweaveError: it was something else.
    """
    described = testbed.model_dump(mode="json", exclude={"sizes", "always", "seeds"})
    settings = {
        "base": recipe.base,
        "experts": dict(recipe.experts),
        "testbed": described,
        "methods": {
            label: _described(way) | ({"trained": trained[label]} if label in trained else {})
            for label, way in ways.items()
        },
    }
    settings = json.loads(json.dumps(settings))
    if before is not None:
        methods, now = before["methods"], settings["methods"]
        others = [{**one, "methods": None} for one in (before, settings)]
        if others[0] != others[1] or any(methods.get(label, method) != method for label, method in now.items()):
            raise LoraweaveError(f"{out}: its pictures were painted with other settings; choose another folder")
        settings["methods"] = methods | now
    write_json_atomic(out / SETTINGS, settings)


def _described(way: Way) -> dict[str, Any]:
    """A method, with what tells one training of its gates from another."""
    if way.rival is not None:
        return way.rival.described()
    described: dict[str, Any] = registry.to_dict(way.policy)
    if way.saved is None:
        return described
    gates = way.saved / persistence.GATES
    digest = hashlib.sha256(gates.read_bytes()).hexdigest() if gates.is_file() else None
    return described | {"saved": {"experts": persistence.saved_experts(way.saved), "gates": digest}}
