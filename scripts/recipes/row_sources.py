"""Rows of a public set: from the hub, or from a folder of local copies. Code that comes with a set is never run.

Everything is streamed: of WMT's tens of millions of pairs a few hundred are wanted, and no copy of the rest.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from row_prompts import Item
from row_sets import CONVERTED, PublicSet
from tqdm import tqdm

from loraweave.errors import LoraweaveError

PARTS = 50
"""Row groups of a large training split that are read at least, spread at random over all of it."""
SPARE = 4
"""Rows to choose from, for each row wanted of a large training split."""
_LOADERS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".csv": "csv"}


@dataclass(frozen=True)
class Source:
    """One split of a set, ready to be read.

    Attributes:
        title: how messages call it.
        rows: a ``datasets.IterableDataset``.
        origin: where it lies: the hub's commit, or ``local copy``.
    """

    title: str
    rows: Any
    origin: str

    def items(self, chosen: PublicSet, enough: int | None, rng: random.Random) -> Iterator[Item]:
        """Every row, or of a large split some parts of it, with ``enough`` complete rows to draw from, if it has them.

        Raises:
            LoraweaveError: a row cannot be read, or is not as the set's rows should be.
        """
        parts = self.rows if enough is None else self._parts()
        if enough is None or parts.num_shards <= PARTS:
            yield from self._read(chosen, self.rows, "")
            return
        order = rng.sample(range(parts.num_shards), parts.num_shards)
        found = 0
        for count, index in enumerate(order):
            if count >= PARTS and found >= SPARE * enough:
                return
            for item in self._read(chosen, parts.shard(parts.num_shards, index), f" of part {index + 1}"):
                found += item.complete
                yield item

    def _parts(self) -> Any:
        try:
            return self.rows.reshard()
        except Exception as error:  # whatever a file system or a format raises means the same to the user
            raise self._unreadable(error) from error

    def _read(self, chosen: PublicSet, rows: Any, where: str) -> Iterator[Item]:
        number = 0
        try:
            for number, row in enumerate(rows, start=1):  # noqa: B007
                yield chosen.reader(row)
        except LoraweaveError as error:
            raise LoraweaveError(f"{self.title}, row {number}{where}: {error}") from error
        except Exception as error:
            raise self._unreadable(error) from error

    def _unreadable(self, error: Exception) -> LoraweaveError:
        return LoraweaveError(f"{self.title}: cannot be read: {_one_line(error)}")


def hub_source(chosen: PublicSet, split: str) -> Source:
    """``split`` of a set on the hub.

    Raises:
        LoraweaveError: ``datasets`` is missing or old, or the hub or the set cannot be reached.
    """
    datasets = _datasets()
    title = f"{chosen.title}, {split}"
    found: dict[str, Any] = {"name": chosen.config}
    if chosen.parquet is not None:
        found = {"revision": CONVERTED, "data_files": {split: chosen.parquet.format(split=split)}}
    try:
        builder = datasets.load_dataset_builder(chosen.repo, **found)
        rows = builder.as_streaming_dataset(split=split)
    except Exception as error:  # the network, the hub's client and the library raise what they please
        raise LoraweaveError(
            f"{title}: cannot be loaded from the hub: {_one_line(error)}; "
            f"a copy as FOLDER/{_place(chosen, split)}.parquet (or .jsonl, .csv) is read with --from FOLDER"
        ) from error
    files = [str(file) for file in builder.config.data_files[split]]
    commit = re.search(r"@([0-9a-f]{40})/", files[0]) if files else None
    return Source(title, rows, f"hub, commit {commit[1]}" if commit else "hub")


def local_source(chosen: PublicSet, split: str, folder: Path) -> Source:
    """``split`` of a set from ``folder``, see :func:`local_files`. Raises as :func:`local_files` and when reading."""
    files = local_files(chosen, split, folder)
    datasets = _datasets()
    kind = files[0].suffix
    # Upstream's own files of BIG-Bench Hard hold the rows in one field, beside a canary.
    options = {"field": "examples"} if chosen.cut and kind == ".json" else {}
    title = f"{chosen.title}, {files[0]}" + (f" and {len(files) - 1} more" if len(files) > 1 else "")
    try:
        rows = datasets.load_dataset(
            _LOADERS[kind], data_files={split: list(map(str, files))}, split=split, streaming=True, **options
        )
    except Exception as error:
        raise LoraweaveError(f"{title}: cannot be read: {_one_line(error)}") from error
    return Source(title, rows, "local copy")


def local_files(chosen: PublicSet, split: str, folder: Path) -> list[Path]:
    """The files of one split: ``SET/CONFIG/SPLIT.EXT``, or ``SPLIT-*.EXT`` or ``SPLIT/*.EXT`` as the hub has them.

    ``SET`` is the last part of the hub id. A set without subsets lies in ``SET`` itself, or in ``data``, ``default`` or
    ``SET`` in there; one with a single split may lie in ``SET/CONFIG.EXT``.

    Raises:
        LoraweaveError: there are none, or in more than one place or format.
    """
    home = folder / chosen.repo.split("/")[-1]
    inner = [chosen.config] if chosen.config else ["", "data", "default", home.name]
    forms = (f"{split}{{}}", f"{split}-*{{}}", f"{split}/*{{}}")
    patterns = [(home / name, form) for name in inner for form in forms]
    if chosen.cut:
        patterns.append((home, f"{chosen.config}{{}}"))
    found = {
        (place, pattern, kind): files
        for place, pattern in patterns
        for kind in _LOADERS
        if (files := sorted(place.glob(pattern.format(kind))))
    }
    if not found:
        raise LoraweaveError(
            f"no copy of {chosen.title} in {str(folder)!r}: expected {_place(chosen, split)}.parquet, .jsonl, .json or "
            f".csv there; leave --from out to load it from the hub"
        )
    if len(found) > 1:
        first, second = [files[0] for files in found.values()][:2]
        raise LoraweaveError(f"two copies of {chosen.title}, {split}: {first} and {second}; leave one of them there")
    return next(iter(found.values()))


def read(chosen: PublicSet, source: Source, enough: int | None, rng: random.Random, *, progress: str) -> list[Item]:
    """The items of a split, with a progress bar called ``progress`` (none when it is blank)."""
    items = source.items(chosen, enough, rng)
    return list(tqdm(items, desc=progress, unit="row", leave=False, disable=not progress))


def _place(chosen: PublicSet, split: str) -> str:
    return "/".join(part for part in (chosen.repo.split("/")[-1], chosen.config, split) if part)


def _datasets() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise LoraweaveError("this needs the library datasets: pip install 'datasets>=5'") from error
    # Older ones run a set's code when told to, and cannot take a large parquet file apart.
    if int(datasets.__version__.split(".")[0]) < 5:
        raise LoraweaveError(f"this needs datasets 5 or later, got {datasets.__version__}: pip install -U datasets")
    return datasets


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split()).rstrip(".") or type(error).__name__
    return text if len(text) <= 300 else text[:297] + "..."
