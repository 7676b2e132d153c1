"""Errors and warnings meant for the person at the keyboard.

Every message is one line that names the file or field, says what was expected, what came, and what to do. The command
line prints it and exits with code 2.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

_LISTED = 20


class LoraweaveError(ValueError):
    """Something the user gave cannot be used; the message says what to change."""


class LoraweaveWarning(UserWarning):
    """Something works, but not as the user may think."""


class TriggerWarning(LoraweaveWarning):
    """A prompt has none of the words by which an expert's author calls it up."""


def unknown(kind: str, name: str, known: Iterable[str]) -> LoraweaveError:
    """The error for a name that nobody knows: it suggests the nearest and lists the (first) known ones.

    Args:
        kind: what was asked for, e.g. ``"expert"`` or ``"method"``.
        name: what came.
        known: the valid names, in the order in which to list them.
    """
    names = list(known)
    near = difflib.get_close_matches(name, names, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    listed = ", ".join(names[:_LISTED]) if names else "none"
    if len(names) > _LISTED:
        listed += f" ... and {len(names) - _LISTED} more"
    return LoraweaveError(f"unknown {kind} {name!r}{hint} (known: {listed})")
