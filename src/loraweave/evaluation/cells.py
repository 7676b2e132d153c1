"""Cells of a comparison on disk: one method with one seed each, written whole, found again, claimed by one process."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loraweave.errors import LoraweaveError
from loraweave.files import atomic_path, write_json_atomic

if TYPE_CHECKING:
    from torch import Tensor

    from loraweave.evaluation.bootstrap import Answers
    from loraweave.evaluation.data import Example
    from loraweave.experts.types import Expert

FORMAT = 2
"""Of a cell's file; belongs into every key, so that cells of an earlier format are made anew."""
CELLS = "cells"


@dataclass(frozen=True)
class Cost:
    """What a cell took.

    Attributes:
        train_seconds: learning, wall-clock; 0 where nothing is learned.
        evaluations: optimizer steps, or weightings that a search tried.
        examples_seen: training examples that passed through the model, repetitions included.
        score_seconds: answering all test items, wall-clock.
        peak_memory_gb: the most memory (10^9 bytes) the process held meanwhile; ``None`` where the system does not say.
        peak_gpu_memory_gb: the same of the GPU; ``None`` without one.
    """

    train_seconds: float = 0.0
    evaluations: int = 0
    examples_seen: int = 0
    score_seconds: float = 0.0
    peak_memory_gb: float | None = None
    peak_gpu_memory_gb: float | None = None


@dataclass(frozen=True)
class Cell:
    """One method with one seed, scored on every task.

    Attributes:
        method: its label in tables.
        seed: ``None`` for a method without chance, which runs once.
        key: all that its numbers hang on (base, experts, data, options ...); its hash is the cell's fingerprint.
        scores: task -> score, 0 to 100.
        items: task -> the score of each test item, in the order of the test set.
        cost: what it took.
        history: the training log, if it trained: losses, ``entropy/SITE``, ``load/EXPERT`` by step.
        counts: task -> for each test item, of what its metric's score is made, where that is not the mean of ``items``
            (:attr:`loraweave.evaluation.metrics.Metric.counts`).
        weights: task -> what a learned mixture gives to each expert, in the mean over gate sites and some inputs.
        process: rank of the process that made it, where several shared the work.
    """

    method: str
    seed: int | None
    key: Mapping[str, Any]
    scores: Mapping[str, float]
    items: Mapping[str, Sequence[float]]
    cost: Cost = Cost()
    history: Sequence[Mapping[str, float]] = field(default=(), repr=False)
    counts: Mapping[str, Sequence[Sequence[float]]] = field(default_factory=dict, repr=False)
    weights: Mapping[str, Mapping[str, float]] = field(default_factory=dict, repr=False)
    process: int = 0

    def answers(self) -> dict[str, Answers]:
        """Task -> what the task's score is computed from, item by item: for intervals by resampling."""
        return {task: self.counts.get(task, items) for task, items in self.items.items()}

    @property
    def seconds(self) -> float:
        """Training and scoring, wall-clock."""
        return self.cost.train_seconds + self.cost.score_seconds


class Cells:
    """The cells in one folder. Any number of processes and machines that see the folder may share it."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def find(self, method: str, seed: int | None, key: Mapping[str, Any]) -> Cell | None:
        """The cell, if it has been written.

        Raises:
            LoraweaveError: its file cannot be read, or is no such cell.
        """
        path = self.path(method, seed, key)
        if not path.exists():
            return None
        found = _read(path)
        rest = {name: found[name] for name in ("scores", "items", "history", "counts", "weights", "process")}
        return Cell(method, seed, key, cost=Cost(**found["cost"]), **rest)

    def save(self, cell: Cell, gates: Mapping[str, Tensor] | None = None) -> None:
        """Write a cell, whole or not at all; its gates first, so that a cell that is there has them."""
        path = self.path(cell.method, cell.seed, cell.key)
        if gates:
            from safetensors.torch import save_file

            with atomic_path(path.with_suffix(".safetensors")) as temporary:
                mode = temporary.stat().st_mode
                save_file({n: p.detach().cpu().contiguous() for n, p in gates.items()}, temporary)
                # The safetensors library makes its files private; machines may share these.
                temporary.chmod(mode)
        content = {"format": FORMAT, "fingerprint": fingerprint(cell.key), **asdict(cell)}
        write_json_atomic(path, content)

    def gates(self, method: str, seed: int | None, key: Mapping[str, Any]) -> dict[str, Tensor]:
        """The gates saved with a cell; none if it has none."""
        path = self.path(method, seed, key).with_suffix(".safetensors")
        if not path.exists():
            return {}
        from safetensors.torch import load_file

        return dict(load_file(path))

    def path(self, method: str, seed: int | None, key: Mapping[str, Any]) -> Path:
        """Where the cell is or will be."""
        return self.folder / f"{self._stem(method, seed)}-{fingerprint(key)[:16]}.json"

    def differing(self, method: str, seed: int | None, key: Mapping[str, Any]) -> list[str]:
        """What the nearest other cell of this method and seed has otherwise in its key; nothing if there is none."""
        own = self.path(method, seed, key)
        stem = re.compile(re.escape(self._stem(method, seed)) + r"-[0-9a-f]{16}\.json")
        others = [path for path in sorted(self.folder.glob("*.json")) if stem.fullmatch(path.name) and path != own]
        return min((_differences(_read(path, of_any_format=True)["key"], key) for path in others), key=len, default=[])

    @contextmanager
    def claim(self, method: str, seed: int | None, key: Mapping[str, Any]) -> Iterator[bool]:
        """Whether this process may work on the cell: nobody else does, and it is not there yet.

        The system itself gives a claim back when its process ends, however it ends.

        Raises:
            LoraweaveError: the folder cannot be written to, or its file system has no locks.
        """
        path = self.path(method, seed, key)
        with self._lock(path.stem, wait=False) as ours:
            yield ours and not path.exists()

    @contextmanager
    def finishing(self) -> Iterator[None]:
        """Alone among all processes, to write what stands beside the cells. Raises as :meth:`claim`."""
        with self._lock("finish", wait=True):
            yield

    @contextmanager
    def _lock(self, name: str, wait: bool) -> Iterator[bool]:
        from filelock import FileLock, Timeout

        lock = FileLock(self.folder / ".claims" / f"{name}.lock", timeout=-1 if wait else 0)
        try:
            Path(lock.lock_file).parent.mkdir(parents=True, exist_ok=True)
            lock.acquire()
            ours = True
        except Timeout:
            ours = False
        except (OSError, NotImplementedError) as error:
            raise LoraweaveError(f"cannot claim a cell in {str(self.folder)!r}: {error}") from error
        try:
            yield ours
        finally:
            lock.release()

    def _stem(self, method: str, seed: int | None) -> str:
        readable = re.sub(r"[^A-Za-z0-9_.-]+", "-", method)[:60].strip(".-") or "method"
        # Two labels may read alike once they are file names.
        return f"{readable}-{_hash(method)[:6]}-{'once' if seed is None else seed}"


def fingerprint(key: Mapping[str, Any]) -> str:
    """Hash of everything a cell's numbers hang on, 64 hex digits."""
    return _hash(json.dumps(key, sort_keys=True, ensure_ascii=False, allow_nan=False))


def hash_examples(examples: Sequence[Example]) -> str:
    """Hash of a data set: every input, target and reference, in order."""
    return _hash(json.dumps([[e.input, e.target, list(e.references)] for e in examples], ensure_ascii=False))


def hash_expert(expert: Expert) -> str:
    """Hash of an expert: its files', or its factors' if it was made in memory."""
    if expert.sha256:
        return expert.sha256
    import torch

    digest = hashlib.sha256()
    for path, factor in expert.factors.items():
        digest.update(f"{path} {factor.scale!r} {factor.embedding}".encode())
        for tensor in (factor.A, factor.B):
            digest.update(f"{list(tensor.shape)} {tensor.dtype}".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def hash_base(model: Any) -> str:
    """Hash of a base model: its commit if it came from the hub, else of the files beside its configuration."""
    commit = getattr(model.config, "_commit_hash", None)
    if commit:
        return str(commit)
    digest = hashlib.sha256()
    for path in sorted(Path(model.name_or_path).glob("*")):
        if path.suffix in (".json", ".safetensors", ".bin", ".model") and path.is_file():
            digest.update(path.name.encode())
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _read(path: Path, *, of_any_format: bool = False) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise LoraweaveError(f"{path}: not a cell of a comparison ({error}); remove it and run again") from error
    needed = ["format", "fingerprint", "key"]
    if not of_any_format:
        needed += ["scores", "items", "cost", "history", "counts", "weights", "process"]
    lacking = [name for name in needed if not isinstance(found, dict) or name not in found]
    other = not lacking and not of_any_format and found["format"] != FORMAT
    if lacking or other or found["fingerprint"] != fingerprint(found["key"]):
        why = f"no {lacking[0]!r}" if lacking else "of another format, or changed by hand"
        raise LoraweaveError(f"{path}: not a cell of a comparison ({why}); remove it and run again")
    return dict(found)


def _differences(old: Mapping[str, Any], new: Mapping[str, Any], inside: str = "") -> list[str]:
    """Names of the fields that differ, down to the level where that says something."""
    names = []
    for name in {**old, **new}:
        a, b = old.get(name), new.get(name)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            names += _differences(a, b, f"{inside}{name}.")
        elif a != b:
            names.append(f"{inside}{name}")
    return names
