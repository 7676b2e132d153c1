"""Safetensors files from strangers: the header is checked before anything is mapped into memory.

The format (https://github.com/huggingface/safetensors#format): eight bytes of header length, a JSON header with dtype,
shape and byte range of every tensor, then the bytes.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from loraweave.errors import LoraweaveError

HEADER_LIMIT = 100_000_000
"""Bytes; the limit of the safetensors library itself."""
KEY_LIMIT = 1024
"""Characters of a tensor's name."""
SIZES = {
    "F64": 8, "I64": 8, "U64": 8, "C64": 8,
    "F32": 4, "I32": 4, "U32": 4,
    "F16": 2, "BF16": 2, "I16": 2, "U16": 2,
    "I8": 1, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "F8_E4M3FNUZ": 1, "F8_E5M2FNUZ": 1,
}  # fmt: skip
"""Bytes an element, by the dtype's name in the header."""
MIXABLE_DTYPES = ("F64", "F32", "F16", "BF16")
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """What the header says of one tensor; ``start`` and ``end`` count bytes from the end of the header."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def count(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Header:
    """A checked header.

    Attributes:
        path: the file.
        tensors: name -> what the header says of it, in the file's order.
        metadata: the header's free strings (``__metadata__``).
        size: of the file, in bytes.
        start: where the tensors' bytes begin.
    """

    path: Path
    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]
    size: int
    start: int


def read_header(path: Path) -> Header:
    """Read and check the header of a safetensors file; no tensor is touched.

    Raises:
        LoraweaveError: the file is missing, a pickle, truncated, or its header contradicts itself or the file.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or not 2 <= length <= min(HEADER_LIMIT, size - 8):
                raise _not_safetensors(path, size, length)
            text = file.read(length)
    except OSError as error:
        raise LoraweaveError(f"{path}: cannot be read ({error.strerror or error})") from error
    try:
        content = json.loads(text, object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise LoraweaveError(f"{path}: not a safetensors file, its header is not valid JSON ({error})") from error
    if not isinstance(content, dict) or not text.startswith(b"{"):
        raise LoraweaveError(f"{path}: not a safetensors file, its header is not a JSON object")
    metadata = content.pop("__metadata__", None)
    metadata = {} if metadata is None else metadata
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise LoraweaveError(f"{path}: field __metadata__ of the header must map strings to strings")
    tensors = {name: _tensor_info(path, name, entry) for name, entry in content.items()}
    _check_ranges(path, tensors, size, 8 + length)
    return Header(path, tensors, metadata, size, 8 + length)


def hash_files(paths: Iterable[Path]) -> str:
    """The SHA-256 of the files' bytes one after the other, in hexadecimal."""
    digest = hashlib.sha256()
    for path in paths:
        try:
            with path.open("rb") as file:
                while chunk := file.read(1 << 20):
                    digest.update(chunk)
        except OSError as error:
            raise LoraweaveError(f"{path}: cannot be read ({error.strerror or error})") from error
    return digest.hexdigest()


def pickle_refused(path: Path, fetch: str = "") -> LoraweaveError:
    """The error for a pickled weight file; it says how to convert one.

    Args:
        path: the file.
        fetch: the command that brings it here first, if it is not.
    """
    first = f"fetch it with `{fetch}`, then " if fetch else ""
    return LoraweaveError(
        f"{path}: pickled weights are refused, they can run code when loaded; {first}convert them once, in their "
        f"folder: `import torch; from safetensors.torch import save_file` and "
        f"`save_file({{k: v.contiguous() for k, v in torch.load('{path.name}', map_location='cpu', "
        f"weights_only=True).items()}}, '{path.with_suffix('.safetensors').name}')`"
    )


def _not_safetensors(path: Path, size: int, length: int) -> LoraweaveError:
    if path.suffix in PICKLES:
        return pickle_refused(path)
    with path.open("rb") as file:
        start = file.read(64)
    # A pickle begins with 0x80, and so may a header's length, which then is a small number.
    if (start[:1] == b"\x80" and length > HEADER_LIMIT) or start[:4] == b"PK\x03\x04":
        return pickle_refused(path)
    if start.startswith(b"version https://git-lfs"):
        return LoraweaveError(f"{path}: is a Git LFS pointer, not the weights; run `git lfs pull` in its folder")
    if size < 8 or size < 8 + length <= 8 + HEADER_LIMIT:
        declared = 8 + length if size >= 8 else 8
        return LoraweaveError(
            f"{path}: file is truncated: its header says at least {declared} bytes, file has {size}; fetch it again"
        )
    return LoraweaveError(f"{path}: not a safetensors file (a header of {length} bytes is declared)")


def _no_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    content = dict(pairs)
    if len(content) < len(pairs):
        raise ValueError("a name occurs twice")
    return content


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 62


def _tensor_info(path: Path, name: str, entry: object) -> TensorInfo:
    shown = name if len(name) <= 120 else name[:120] + "..."
    if len(name) > KEY_LIMIT:
        raise LoraweaveError(f"{path}: tensor name {shown!r} has {len(name)} characters, at most {KEY_LIMIT} expected")
    match entry:
        case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [start, end]} if (
            len(shape) <= 16 and all(_is_count(value) for value in [*shape, start, end]) and start <= end
        ):
            info = TensorInfo(dtype, tuple(shape), start, end)
        case _:
            raise LoraweaveError(f"{path}: tensor {shown!r} has a malformed header entry")
    if dtype in SIZES and info.count * SIZES[dtype] != end - start:
        raise LoraweaveError(
            f"{path}: tensor {shown!r} is declared as {dtype} {list(info.shape)}, "
            f"{info.count * SIZES[dtype]} bytes, but occupies {end - start}"
        )
    return info


def _check_ranges(path: Path, tensors: Mapping[str, TensorInfo], size: int, start: int) -> None:
    """The byte ranges must cover the rest of the file exactly, with no overlap and no hole."""
    at = 0
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)):
        if info.start != at:
            what = (
                "overlaps its predecessor" if info.start < at else f"leaves a gap of {info.start - at} bytes before it"
            )
            raise LoraweaveError(f"{path}: corrupt header: tensor {name[:120]!r} {what}")
        at = info.end
    if start + at > size:
        raise LoraweaveError(
            f"{path}: file is truncated: header says {start + at} bytes, file has {size}; fetch it again"
        )
    if start + at < size:
        raise LoraweaveError(f"{path}: file has {size - start - at} bytes more than its header says ({start + at})")
