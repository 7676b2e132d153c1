"""Tensors of a checked safetensors file, mapped into memory: a page is read when something looks at it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from loraweave.errors import LoraweaveError
from loraweave.experts.types import LoraFactors
from loraweave.experts.weightfile import Header, TensorInfo

DTYPES = {
    "F64": torch.float64, "I64": torch.int64, "C64": torch.complex64,
    "F32": torch.float32, "I32": torch.int32, "F16": torch.float16, "BF16": torch.bfloat16, "I16": torch.int16,
    "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
"""The dtypes that are read, by their names in a header."""


class MappedFile:
    """The bytes of a file behind its header. Writing into its tensors changes this process's copy, never the file.

    Raises:
        LoraweaveError: the file cannot be mapped, or changed since its header was read.
    """

    def __init__(self, header: Header) -> None:
        self.path = header.path
        self.start = header.start
        try:
            size = self.path.stat().st_size
            if size != header.size:
                raise LoraweaveError(f"{self.path}: has {size} bytes now, {header.size} when its header was read")
            storage = torch.UntypedStorage.from_file(str(self.path), False, size)
        except (OSError, RuntimeError) as error:
            raise LoraweaveError(f"{self.path}: cannot be mapped into memory ({error})") from error
        self.bytes = torch.empty(0, dtype=torch.uint8).set_(storage)  # type: ignore[arg-type]

    def tensor(self, info: TensorInfo) -> Tensor:
        """One tensor of the header."""
        dtype = DTYPES.get(info.dtype)
        if dtype is None:
            raise LoraweaveError(f"{self.path}: tensors of dtype {info.dtype} cannot be read")
        flat = self.bytes[self.start + info.start : self.start + info.end]
        if (self.start + info.start) % dtype.itemsize:
            flat = flat.clone()  # the format does not promise that numbers lie where processors like them
        return flat.view(dtype).view(info.shape)


def open_tensors(header: Header) -> Callable[[str], Tensor]:
    """A function from a tensor's name to the tensor, mapped from the file; see :class:`MappedFile`."""
    file = MappedFile(header)
    return lambda name: file.tensor(header.tensors[name])


@dataclass(frozen=True, slots=True)
class Entry:
    """One module's LoRA in a file; see :class:`LoraFactors`."""

    A: TensorInfo
    B: TensorInfo
    scale: float
    embedding: bool


class MappedFactors(Mapping[str, LoraFactors]):
    """An expert's LoRAs in its file; their tensors are made when asked for, since thousands of them weigh something.

    Args:
        file: the weight file.
        entries: module path -> where its LoRA is.
    """

    def __init__(self, file: MappedFile, entries: Mapping[str, Entry]) -> None:
        self._file = file
        self._entries = entries

    def __getitem__(self, module: str) -> LoraFactors:
        entry = self._entries[module]
        A, B = self._file.tensor(entry.A), self._file.tensor(entry.B)
        return LoraFactors(A, B.flatten(1), entry.scale, entry.embedding)

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)
