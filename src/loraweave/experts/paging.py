"""Experts that wait outside of the model's device and come there when they are used, within a budget."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from loraweave.errors import LoraweaveError
from loraweave.experts.bank import Bank, Extent, Layout, arrange, layout
from loraweave.experts.types import LoraFactors


class ExpertMemory:
    """The memory that experts may take on the model's device. Who was used longest ago leaves first.

    A page is one expert at one module. Where several experts are used at once at a module, their rows are copied beside
    one another for the time of its two products; this counts, too.

    Attributes:
        budget: bytes that are there at most.
        hits: how often a page that was asked for was there.
        misses: how often it had to be fetched.
    """

    def __init__(self, budget: int | str) -> None:
        self.budget = _bytes(budget)
        self.hits = self.misses = 0
        self._forget()

    def _forget(self) -> None:
        self._pages: OrderedDict[tuple[PagedBank, int], tuple[Tensor, Tensor]] = OrderedDict()
        self._held = 0
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        """A copied model's experts come anew."""
        return {"budget": self.budget, "hits": 0, "misses": 0}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

    @property
    def held(self) -> int:
        """Bytes that are there now."""
        return self._held

    def check(self, banks: Sequence[PagedBank]) -> None:
        """Raises:
        LoraweaveError: the budget cannot hold the largest single page.
        """
        page, bank = max(((bank.largest, bank) for bank in banks), key=lambda each: each[0])
        if page > self.budget:
            raise self._too_small(bank, page, "one expert")

    def take(self, bank: PagedBank, experts: Sequence[int]) -> tuple[Tensor, Tensor]:
        """``A [R, in]`` and ``Bt [R, out]`` of these experts of a bank, on its device, below one another.

        Raises:
            LoraweaveError: they do not fit the budget together.
        """
        if not experts:
            return bank.read([])
        with self._lock:
            together = sum(bank.size(number) for number in experts)
            copied = together if len(experts) > 1 else 0
            if together + copied > self.budget:
                raise self._too_small(bank, together + copied, f"{len(experts)} experts at once")
            pages = []
            for number in experts:
                page = self._pages.pop((bank, number), None)
                if page is not None:
                    self._held -= bank.size(number)
                moved = page is not None and page[0].device != bank.device  # by accelerate, which does not say so
                pages.append(None if moved else page)
            self._make_room(together + copied)
            self.hits += sum(page is not None for page in pages)
            self.misses += sum(page is None for page in pages)
            with torch.inference_mode(False):  # what is first needed there must serve training later
                fetched = [bank.read([n]) if page is None else page for n, page in zip(experts, pages, strict=True)]
            for number, page in zip(experts, fetched, strict=True):
                self._pages[bank, number] = page
            self._held += together
        if len(fetched) == 1:
            return fetched[0]
        return torch.cat([A for A, _ in fetched]), torch.cat([Bt for _, Bt in fetched])

    def drop(self, bank: PagedBank) -> None:
        """Let go of a bank's pages."""
        with self._lock:
            for key in [key for key in self._pages if key[0] is bank]:
                del self._pages[key]
                self._held -= bank.size(key[1])

    def _make_room(self, size: int) -> None:
        while self._held + size > self.budget:
            (bank, number), _ = self._pages.popitem(last=False)
            self._held -= bank.size(number)

    def _too_small(self, bank: PagedBank, needed: int, what: str) -> LoraweaveError:
        return LoraweaveError(
            f"expert_memory: {what} at {bank.path!r} take {needed:,} bytes, but the budget is {self.budget:,}; give "
            "more, or use fewer experts at a time (a mask, or MoLE(activation='topk', pooling='prompt'))"
        )

    def __repr__(self) -> str:
        return f"ExpertMemory(budget={self.budget:,}, held={self.held:,}, hits={self.hits}, misses={self.misses})"


class PagedBank(Bank):
    """A bank whose experts wait where they were read: in CPU memory, or, if the model computes there, in their files.

    ``A`` and ``Bt`` are made anew whenever they are asked for; mixing asks :meth:`fetch` for what it uses.

    Attributes:
        path: the module's.
        memory: whose budget the experts share with those of all other modules.
    """

    like: Tensor

    def __init__(
        self,
        extents: Sequence[Extent | None],
        dtype: torch.dtype,
        device: torch.device,
        path: str,
        memory: ExpertMemory,
    ) -> None:
        nn.Module.__init__(self)
        self.layout, self._extent = arrange(extents)
        self.embedding = self._extent.embedding
        self.path, self.memory = path, memory
        self.register_buffer("like", torch.empty(0, dtype=dtype, device=device), persistent=False)
        self._home: list[LoraFactors | None] = [None] * len(extents)

    @property
    def device(self) -> torch.device:
        return self.like.device

    @property
    def dtype(self) -> torch.dtype:
        return self.like.dtype

    @property
    def A(self) -> Tensor:  # type: ignore[override]
        return self.read(range(len(self._home)))[0]

    @property
    def Bt(self) -> Tensor:  # type: ignore[override]
        return self.read(range(len(self._home)))[1]

    def put(self, expert: int, f: LoraFactors) -> None:
        """Keep expert number ``expert``: where it is if the model computes there, else in CPU memory."""
        if self.device.type != "cpu":
            # A file that stays mapped for as long as the mixture lives could be cut short by somebody meanwhile.
            f = LoraFactors(f.A.cpu().clone(), f.B.cpu().clone(), f.scale, f.embedding)
        self._home[expert] = f

    def size(self, expert: int) -> int:
        """Bytes that expert number ``expert`` takes on the device."""
        widths = torch.Size(self._extent.inputs).numel() + self._extent.outputs
        return self.layout.ranks[expert] * widths * self.dtype.itemsize

    @property
    def largest(self) -> int:
        """Bytes of the largest expert."""
        return max(self.size(number) for number in range(len(self._home)))

    def factors(self, expert: int) -> LoraFactors | None:
        """Expert number ``expert``, on the device; ``None`` if it does not touch this module."""
        if self._home[expert] is None:
            return None
        A, Bt = self.read([expert])
        return LoraFactors(A, Bt.T, self.layout.scales[expert], self.embedding)

    def read(self, experts: Sequence[int]) -> tuple[Tensor, Tensor]:
        """``A`` and ``Bt`` of these experts, copied to the device."""
        shape = self._extent.inputs, (self._extent.outputs,)
        rows = sum(self.layout.ranks[number] for number in experts)
        A, Bt = (torch.empty(rows, *each, dtype=self.dtype, device=self.device) for each in shape)
        start = 0
        for number in experts:
            f = self._home[number]
            if f is not None:
                A[start : start + f.rank].copy_(f.A)
                Bt[start : start + f.rank].copy_(f.B.T)
                start += f.rank
        return A, Bt

    def present(self, experts: Sequence[int]) -> tuple[int, ...]:
        """Those of the experts that touch this module."""
        return tuple(number for number in experts if self.layout.ranks[number])

    def fetch(self, experts: Sequence[int]) -> tuple[Tensor, Tensor]:
        """``A [R, in]`` and ``Bt [R, out]`` of these experts, from the device if they are there."""
        return self.memory.take(self, self.present(experts))

    def layout_of(self, experts: Sequence[int]) -> Layout:
        """How the rows that :meth:`fetch` gives lie; the others have rank 0."""
        used = frozenset(experts)
        ranks = tuple(rank if number in used else 0 for number, rank in enumerate(self.layout.ranks))
        return layout(ranks, self.layout.scales)

    def _apply(self, fn: Any, recurse: bool = True) -> PagedBank:
        self.memory.drop(self)
        super()._apply(fn, recurse)
        return self


def _bytes(budget: int | str) -> int:
    from accelerate.utils import convert_file_size_to_int

    refused = LoraweaveError(f"expert_memory: expected bytes or a text such as '2GB', got {budget!r}")
    if not isinstance(budget, int | str) or isinstance(budget, bool):
        raise refused
    try:
        size = int(convert_file_size_to_int(budget))
    except ValueError as error:
        raise refused from error
    if size <= 0:
        raise LoraweaveError(f"expert_memory: expected more than 0 bytes, got {budget!r}")
    return size
