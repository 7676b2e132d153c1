"""The mixing layer: stands where a target module stood, calls it, and adds the mixture's low-rank term."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from loraweave.errors import LoraweaveError
from loraweave.experts.bank import Bank
from loraweave.experts.paging import PagedBank
from loraweave.mixing import numerics
from loraweave.mixing.rows import RowsTerm

if TYPE_CHECKING:
    from loraweave.mixing.site import Site


@dataclass(slots=True)
class FixedTerm:
    """The low-rank term where ``g`` is constant: only the rank rows that count, and their weights.

    ``A`` and ``Bt`` are ``None`` where nothing is added, ``w`` where all weights are one.
    """

    A: Tensor | None
    Bt: Tensor | None
    w: Tensor | None


@dataclass(slots=True)
class PagedTerm:
    """The same where experts are fetched when they are used."""

    bank: PagedBank
    used: tuple[int, ...]
    w: Tensor | None

    def fetched(self) -> FixedTerm:
        A, Bt = self.bank.fetch(self.used)
        return FixedTerm(A, Bt, None if self.w is None else self.w.to(A.device))


Term = FixedTerm | PagedTerm


def _elsewhere(term: Term, x: Tensor) -> bool:
    """Whether a layer was moved since its term was cut from the bank, by somebody who did not say so."""
    return isinstance(term, FixedTerm) and term.A is not None and term.A.device != x.device


class MixingLayer(nn.Module):
    """``y = base(x) + sum_i g_i s_i B_i A_i x``.

    The base module is only ever called, never read, so it may be quantised or sharded. Attributes that this class lacks
    are looked up there, since some models ask a projection for its ``weight``.

    Attributes:
        path: where the base module stood in the model.
        site: the gate site this layer belongs to.
        fixed: the whole low-rank term if ``g`` is constant, ``None`` if it is gated.
        copies: one such term for each of several equal parts of the rows, where rows are run once per expert.
        rows: the term where each row has its own weights; it goes before all others.
        whole: whether ``fixed`` holds experts of weight zero, too.
    """

    def __init__(self, base: nn.Module, bank: Bank, path: str) -> None:
        super().__init__()
        self.base = base
        self.bank = bank
        self.path = path
        self.site: Site | None = None
        self.fixed: Term | None = None
        self.copies: tuple[Term, ...] | None = None
        self.rows: RowsTerm | None = None
        self.whole = False
        self._constant: Tensor | None = None
        self._of_copies: tuple[Tensor, ...] | None = None
        if isinstance(bank, PagedBank):
            _keep_out_of_graphs()
        self.train(base.training)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_"):  # such as the hook by which accelerate knows what it offloads: the base's alone
                raise
            return getattr(super().__getattr__("base"), name)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        y: Tensor = self._modules["base"](x, *args, **kwargs)  # type: ignore[misc]
        if isinstance(self._modules["bank"], PagedBank) and torch.compiler.is_compiling():
            fetched: Tensor = self._mixed_untraced(x, y)
            return fetched
        return self._mixed(x, y)

    def _mixed(self, x: Tensor, y: Tensor) -> Tensor:
        if self.rows is not None:
            return self.rows.add(self, x, y)
        if self.copies is not None:
            return self._copied(x, y, self.copies)
        if self.fixed is None:
            return self._gated(x, y)
        if _elsewhere(self.fixed, x):
            self._cut_again()
        return self._add(x, y, self.fixed)

    _mixed_untraced: ClassVar[Callable[..., Any]] = _mixed

    def _add(self, x: Tensor, y: Tensor, term: Term) -> Tensor:
        if isinstance(term, PagedTerm):
            term = term.fetched()
        if term.A is None or term.Bt is None:
            return y
        return self.expand(self.shrink(x, term.A), term.w, term.Bt, y)

    def _copied(self, x: Tensor, y: Tensor, terms: tuple[Term, ...]) -> Tensor:
        if self.copies is not None and any(_elsewhere(term, x) for term in terms):
            self._cut_again()
            terms = self.copies
        rows = x.shape[0] // len(terms)
        if rows * len(terms) != x.shape[0]:
            raise LoraweaveError(
                f"{self.path}: got {x.shape[0]} rows, expected a multiple of {len(terms)}, one part per expert; call "
                "the pipeline's whole model, not a part of it"
            )
        parts = list(zip(x.split(rows), y.split(rows), terms, strict=True))
        mixed = [self._add(x_part, y_part, term) for x_part, y_part, term in parts]
        if all(new is old for new, (_, old, _) in zip(mixed, parts, strict=True)):
            return y  # each part was added in place
        return torch.cat(mixed)

    def _gated(self, x: Tensor, y: Tensor) -> Tensor:
        site = self.site
        bank: Bank = self._modules["bank"]  # type: ignore[assignment]
        assert site is not None
        a: Tensor | None = None
        if site.leader is self and not site.driven and not site.plan.ahead:
            a = self.shrink(x, bank.A) if site.reads_ranks else None
            site.decide(x, a, y)
        if isinstance(bank, PagedBank):
            A, Bt = bank.fetch(site.used())
            if len(A) == 0:
                return y
            a = self.shrink(x, A)
            return self.expand(a, site.row_weights(bank, a), Bt, y)
        if site.sparse and (rows := site.few_rows(bank, x)) is not None:
            return numerics.low_rank_rows(x, *rows, y)
        if a is None:
            a = self.shrink(x, bank.A)
        return self.expand(a, site.row_weights(bank, a), bank.Bt, y)

    def shrink(self, x: Tensor, A: Tensor) -> Tensor:
        return numerics.shrink(x, A)

    def expand(self, a: Tensor, w: Tensor | None, Bt: Tensor, y: Tensor) -> Tensor:
        return numerics.expand(a, w, Bt, y)

    @property
    def constant(self) -> Tensor | None:
        """The constant weights ``[E]``, ``None`` if ``g`` is gated or differs between copies of the rows."""
        return self._constant

    def fix(self, weights: Tensor | None, whole: bool = False) -> None:
        """Make ``g`` constant, ``[E]``. ``None``: gated again.

        Only the rank rows of experts that count are kept; ``whole`` keeps all, so that a compiled model finds tensors
        of the same shapes whatever the weights.
        """
        self._constant, self._of_copies, self.copies, self.whole = weights, None, None, whole
        if weights is not None and whole and not isinstance(self.bank, PagedBank):
            self.fixed = FixedTerm(self.bank.A, self.bank.Bt, self.bank.layout.row_weights(weights).to(self.bank.A))
        else:
            self.fixed = None if weights is None else self._fixed_term(weights)

    def fix_copies(self, weights: Sequence[Tensor]) -> None:
        """Make ``g`` constant in each of ``len(weights)`` equal parts of the rows: ``[E]`` for each."""
        self._constant, self._of_copies, self.fixed = None, tuple(weights), None
        self.copies = tuple(self._fixed_term(one) for one in weights)

    def fix_rows(self, weights: Tensor | None) -> None:
        """Give each row of the batch its own ``g``, ``[rows, E]``, whatever the policy says; ``None``: no more."""
        self.rows = None if weights is None else RowsTerm(self.bank, weights, type(self) is MixingLayer)

    def _fixed_term(self, weights: Tensor) -> Term:
        bank: Bank = self.bank
        starts, ranks = bank.layout.offsets, bank.layout.ranks
        spans = [(starts[i], starts[i] + ranks[i]) for i in range(len(ranks)) if ranks[i] and weights[i] != 0]
        if not spans:
            return FixedTerm(None, None, None)
        rank_weights = bank.layout.row_weights(weights)
        if isinstance(bank, PagedBank):
            used = tuple(i for i in range(len(ranks)) if ranks[i] and weights[i] != 0)
            w = torch.cat([rank_weights[start:stop] for start, stop in spans])
            return PagedTerm(bank, used, None if bool((w == 1).all()) else w.to(bank.device, bank.dtype))
        first, last = spans[0][0], spans[-1][1]
        if sum(stop - start for start, stop in spans) == last - first:
            A, Bt, w = bank.A[first:last], bank.Bt[first:last], rank_weights[first:last]
        else:
            rows = torch.cat([torch.arange(*span) for span in spans])
            A, Bt, w = bank.A[rows.to(bank.A.device)], bank.Bt[rows.to(bank.A.device)], rank_weights[rows]
        return FixedTerm(A, Bt, None if bool((w == 1).all()) else w.to(A))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> MixingLayer:
        super()._apply(fn, recurse)
        self._cut_again()
        return self

    def _cut_again(self) -> None:
        """Make anew what is kept of the bank, which has moved: accelerate moves buffers without a word."""
        if self._of_copies is not None:
            self.fix_copies(self._of_copies)
        else:
            self.fix(self._constant, self.whole)
        if self.rows is not None:
            self.fix_rows(self.rows.weights)


def _keep_out_of_graphs() -> None:
    """Keep fetching experts out of compiled graphs: what has to be fetched is known when the gate has spoken.

    Not when this module is imported: that brings in the compiler, and doubles the time to start.
    """
    if MixingLayer._mixed_untraced is MixingLayer._mixed:
        MixingLayer._mixed_untraced = torch.compiler.disable(MixingLayer._mixed)


class MixingEmbedding(MixingLayer):
    """The same over an embedding: ``A x`` is a look-up, scaled as the base scales its own (BART, Gemma)."""

    def shrink(self, x: Tensor, A: Tensor) -> Tensor:
        a = nn.functional.embedding(x, A.T)
        scale = getattr(self.base, "embed_scale", None)
        return a if scale is None else (a * scale).to(A.dtype)


class MixingConv(MixingLayer):
    """The same over a two-dimensional convolution: ``A`` has the base's kernel and stride, ``B`` is 1 x 1."""

    def shrink(self, x: Tensor, A: Tensor) -> Tensor:
        base = self.base
        return numerics.shrink_conv(x, A, stride=base.stride, padding=base.padding, dilation=base.dilation)

    def expand(self, a: Tensor, w: Tensor | None, Bt: Tensor, y: Tensor) -> Tensor:
        return numerics.expand_conv(a, w, Bt, y)
