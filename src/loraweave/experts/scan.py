"""One pass over a weight file: its hash, and whether its values can be mixed."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from loraweave.errors import LoraweaveError
from loraweave.experts.checks import value_problem
from loraweave.experts.mapped import DTYPES, open_tensors
from loraweave.experts.weightfile import Header

PIECE = 1 << 20
"""Bytes read at a time: a multiple of every element's size, and little enough to stay in the processor's cache."""


@dataclass
class _Run:
    """Neighbouring tensors that are checked together; ``dtype`` is ``None`` where values are not looked at."""

    dtype: str | None
    size: int
    names: list[str]


def checked_hash(header: Header, factors: Collection[str], config: Path) -> str:
    """The SHA-256 of a weight file followed by its configuration, as :func:`weightfile.hash_files` computes it.

    The file is read, not mapped, so that checking many files leaves none of them in memory.

    Args:
        header: of the weight file.
        factors: names of the tensors whose values must be finite.
        config: the file hashed after it.

    Raises:
        LoraweaveError: a factor holds NaN or infinite values, or a file cannot be read or changes meanwhile.
    """
    digest = hashlib.sha256()
    path, buffer = header.path, memoryview(bytearray(PIECE))
    try:
        with path.open("rb") as file:
            digest.update(file.read(header.start))
            for run in _runs(header, factors):
                finite = True
                for start in range(0, run.size, PIECE):
                    piece = buffer[: run.size - start]
                    if file.readinto(piece) < len(piece):
                        raise LoraweaveError(f"{path}: became shorter while it was read; fetch it again")
                    digest.update(piece)
                    finite = finite and (run.dtype is None or _finite(piece, DTYPES[run.dtype]))
                if not finite:
                    raise LoraweaveError(_first_problem(header, run.names))
        path = config
        digest.update(path.read_bytes())
    except OSError as error:
        raise LoraweaveError(f"{path}: cannot be read ({error.strerror or error})") from error
    return digest.hexdigest()


def _runs(header: Header, factors: Collection[str]) -> Iterator[_Run]:
    """All bytes after the header, in order, as few runs as there are changes of what to check."""
    run = _Run(None, 0, [])
    for name, info in sorted(header.tensors.items(), key=lambda item: (item[1].start, item[1].end)):
        dtype = info.dtype if name in factors else None
        if dtype != run.dtype:
            yield run
            run = _Run(dtype, 0, [])
        run.size += info.end - info.start
        run.names.append(name)
    yield run


def _finite(piece: memoryview, dtype: torch.dtype) -> bool:
    # Minimum and maximum keep NaN and infinity, and unlike isfinite() they need no second tensor.
    low, high = torch.aminmax(torch.frombuffer(piece, dtype=dtype))
    return bool(low.isfinite()) and bool(high.isfinite())


def _first_problem(header: Header, names: list[str]) -> str:
    get = open_tensors(header)
    problems = (value_problem(header, name, get(name)) for name in names)
    return (
        next((problem for problem in problems if problem), None)
        or f"{header.path}: changed while it was read; read it again"
    )
