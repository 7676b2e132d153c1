"""Gate sites: sets of modules that share one ``g``."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from loraweave.errors import LoraweaveError
from loraweave.experts.bank import Bank, Layout
from loraweave.experts.paging import PagedBank
from loraweave.mixing.layer import MixingLayer
from loraweave.mixing.stream import Stream
from loraweave.mixing.types import Evidence, Granularity, SitePlan, Weights


@dataclass(frozen=True)
class Place:
    """Where a target module stands.

    Attributes:
        path: its path in the model.
        stream: the token stream it reads.
        block: path of the block it lies in, ``None`` outside of all blocks.
        layer: path of the part of the block (attention, feed-forward) it lies in.
        leads: whether it is called before its neighbours although it may be registered after them (a query).
        stack: the stream of the block it stands in; another one than ``stream`` for keys and values of cross-attention.
        turn: when its part is called, for models that register their parts in another order.
    """

    path: str
    stream: str
    block: str | None
    layer: str | None
    leads: bool = False
    stack: str = ""
    turn: tuple[int, ...] = ()


def group(places: Iterable[Place], granularity: Granularity, ahead: bool = False) -> dict[str, list[Place]]:
    """Which modules share a gate: site name -> its places, the leader first.

    Modules outside of all blocks (embeddings, heads) stand in sites of their own, and so do modules that read another
    stream than their block's own (keys and values of cross-attention), unless ``ahead``: then they lead the site.
    """
    sites: dict[tuple[str, str], list[Place]] = {}
    for place in places:
        stream = place.stack if ahead else place.stream
        key = {"matrix": place.path, "layer": place.layer, "block": place.block, "network": stream}[granularity]
        if place.block is None or key is None:
            key = place.path
        sites.setdefault((key, stream), []).append(place)
    named: dict[str, list[Place]] = {}
    for (key, stream), members in sites.items():
        by_turn = sorted(members, key=lambda p: p.turn)
        turns = {block: n for n, block in enumerate(dict.fromkeys(p.block for p in by_turn))}
        named[key if key not in named else f"{key}:{stream}"] = sorted(
            members, key=lambda p: (p.stream == p.stack, turns[p.block], not p.leads)
        )
    return named


def first_of_streams(sites: Mapping[str, list[Place]]) -> set[str]:
    """Names of the sites that run before all others of their stream: the first one called, or a query beside it."""
    found: dict[str, tuple[str, Place]] = {}
    for name, (lead, *_) in sorted(sites.items(), key=lambda site: site[1][0].turn):
        known = found.get(lead.stream)
        beside = known is not None and lead.layer is not None and lead.layer == known[1].layer
        if known is None or (beside and lead.leads and not known[1].leads):
            found[lead.stream] = name, lead
    return {name for name, _ in found.values()}


class Site:
    """One gate site, attached.

    Attributes:
        name: as shown in logs and plots.
        current: the weights of the pass that runs now, or ran last.
        gate: the learned gate, ``None`` where ``g`` is constant.
        driven: whether ``g`` is set from outside (a block that is run once per expert) rather than by the gate.
    """

    def __init__(self, plan: SitePlan, members: Mapping[str, MixingLayer], stream: Stream) -> None:
        self.plan = plan
        self.name = plan.name
        self.layers = [members[path] for path in plan.members]
        self.leader = self.layers[0]
        self.stream = stream
        self.gate: nn.Module | None = None
        self.constant: Tensor | None = None
        self.current: Weights | None = None
        self.driven = False
        self._driving: Weights | None = None
        self.observers: list[Callable[[Site], None]] = []
        self._row_weights: dict[tuple[Layout, torch.device, torch.dtype], Tensor] = {}
        self._picked: dict[tuple[Layout, torch.device, torch.dtype], tuple[Tensor, Tensor]] = {}
        self._in_use: tuple[Weights, tuple[int, ...]] | None = None
        self._known: Weights | None = None
        self._fetched: dict[Bank, tuple[Tensor, Tensor]] | None = None
        self._tokens = 1
        self._read: tuple[weakref.ref[Tensor], int] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """A copy starts afresh; the last pass's weights may hang on a graph, which cannot be copied."""
        return self.__dict__ | {
            "current": None,
            "observers": [],
            "_row_weights": {},
            "_picked": {},
            "_in_use": None,
            "_known": None,
            "_fetched": None,
            "_read": None,
        }

    def bind(self) -> None:
        """Take over the layers: from here on they ask this site for their weights."""
        for layer in self.layers:
            layer.site = self
            layer.bank.layout.prepare(layer.bank.dtype, layer.bank.device)
        if self.gate is not None:
            self.leader.add_module("gate", self.gate.train(self.leader.training))
            if self.plan.ahead:
                self.stream.listeners.append(self.decide_ahead)

    @property
    def reads_ranks(self) -> bool:
        """Whether the gate wants to see the experts' outputs."""
        return getattr(self.gate, "reads_ranks", True)

    def release(self) -> None:
        """Let go of the layers."""
        self.leader._modules.pop("gate", None)
        if self.decide_ahead in self.stream.listeners:
            self.stream.listeners.remove(self.decide_ahead)
        for layer in self.layers:
            layer.site = None
            layer.fix(None)

    def decide(self, x: Tensor, a: Tensor | None, y: Tensor) -> None:
        """Let the gate read the leader's input ``x``, its rank outputs ``a`` if it wants them, and of ``y`` the shape.

        Of an embedding, ``y`` is the hidden state.
        """
        assert self.gate is not None
        hidden = y if self.leader.bank.embedding else x
        grid = None
        if hidden.ndim == 4:
            grid = (y.shape[2], y.shape[3])
            hidden, a = hidden.flatten(2).mT, None if a is None else a.flatten(2).mT
        pooled = hidden.ndim == 2
        if pooled:
            shape = self._rows_and_tokens(hidden.shape[0])
            hidden, a = hidden.view(*shape, -1), None if a is None else a.view(*shape, -1)
        self._tokens = hidden.shape[1]
        self.set(self.gate(Evidence(hidden, a, self.stream, grid=grid, pooled=pooled)))

    def decide_ahead(self) -> None:
        """Let the gate read the encoder's tokens, before the decoder runs.

        A decoder that generates is called with the same states again and again; the weights then stay.
        """
        if self.leader.rows is not None:
            return  # nobody asks this gate while rows have weights of their own
        states = self.stream.states
        assert self.gate is not None
        if states is None:
            raise LoraweaveError(
                f"gate site {self.name}: its gate reads the encoder's states, but the decoder was called without any; "
                "use pooling='token' to decide from the decoder's own tokens"
            )
        if self._read is not None and self._read[0]() is states and self._read[1] == self._version():
            return
        here = states.to(self.leader.bank.device)
        self._tokens = here.shape[1]
        ranks = self.leader.shrink(here, self.leader.bank.A) if self.reads_ranks else None
        self.set(self.gate(Evidence(here, ranks, self.stream)))
        lasting = not (torch.is_grad_enabled() or self.observers or torch.compiler.is_compiling())
        self._read = (weakref.ref(states), self._version()) if lasting else None

    def _version(self) -> int:
        """Changes whenever the gate's parameters do."""
        assert self.gate is not None
        return sum(p._version for p in self.gate.parameters())

    def _rows_and_tokens(self, vectors: int) -> tuple[int, int]:
        """What a 2-D input is: all rows' tokens in one list, or a vector per row (a pooled state)."""
        mask = self.stream.mask
        if mask is not None and mask.ndim == 2 and mask.shape[0] != vectors == mask.numel():
            return mask.shape[0], mask.shape[1]
        return vectors, 1

    def set(self, weights: Weights) -> None:
        """Use these weights from here on in this pass, and tell the observers."""
        if torch.compiler.is_compiling():
            self.current = weights  # whatever else is kept here would be a reason to compile again
        elif weights is self.current and not torch.is_grad_enabled():
            # They last while an answer is written, and so does what follows from them.
            self._fetched = {} if self._fetched is None else self._fetched
        else:
            self.current = weights
            self._forget()
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            # Now, rather than in the first module that asks: a checkpointed block must do the same when run again.
            for layer in self.layers:
                self._spread_over(layer.bank, layer.bank.device)
        for observe in self.observers:
            observe(self)

    def drive(self, weights: Weights | None) -> None:
        """Let the layers use these weights, whatever the gate decides for the block they stand in.

        They stay until others come: when a checkpointed block is computed again, its hooks do not run again.
        """
        self.driven, self._driving = weights is not None, weights
        self._forget()

    def row_weights(self, bank: Bank, a: Tensor) -> Tensor:
        """Weights of the bank's rank rows, shaped to multiply ``a`` ``[..., R]``."""
        w = self._spread_over(bank, a.device)
        if a.ndim == 3 and w.shape[1] in (1, a.shape[1]):
            return w
        tokens = {3: a.shape[1], 4: a.shape[2:].numel()}.get(a.ndim, max(1, a.shape[0] // w.shape[0]))
        if w.shape[1] not in (1, tokens):
            raise LoraweaveError(
                f"gate site {self.name}: weights of {w.shape[1]} tokens do not suit a module that reads {tokens}; "
                "the blocks of UNets change their resolution: take gates that pool (pooling='mean'), or at every matrix"
            )
        if a.ndim == 4:
            cells: Tensor = w.mT.unflatten(2, a.shape[2:] if w.shape[1] > 1 else (1, 1))
            return cells
        if a.ndim == 2:
            if w.shape[0] * w.shape[1] not in (1, a.shape[0]):
                w = w.expand(-1, a.shape[0] // w.shape[0], -1)
            return w.reshape(-1, w.shape[-1])
        raise LoraweaveError(f"{self.name}: cannot mix in a module whose input has {a.ndim} axes, expected 2, 3 or 4")

    def _spread_over(self, bank: Bank, device: torch.device) -> Tensor:
        """Weights of the bank's rank rows, ``[rows or 1, tokens or 1, R]``."""
        weights = self._weights()
        if torch.compiler.is_compiling():
            return self._spread(weights, bank, device)  # the compiler sees by itself what repeats
        key = self._layout(bank), device, bank.dtype  # a site may span devices
        w = self._row_weights.get(key)
        if w is None:
            w = self._row_weights[key] = self._spread(weights, bank, device)
        return w

    def _spread(self, weights: Weights, bank: Bank, device: torch.device) -> Tensor:
        dense = weights.dense
        dense = dense.to(device, torch.promote_types(dense.dtype, bank.dtype))
        return (dense @ self._layout(bank).spread(dense)).to(bank.dtype)

    def _layout(self, bank: Bank) -> Layout:
        return bank.layout_of(self.used()) if isinstance(bank, PagedBank) else bank.layout

    @property
    def sparse(self) -> bool:
        """Whether its gate names the experts that are not switched off."""
        return self._weights().index is not None

    def used(self) -> tuple[int, ...]:
        """The experts to which some token of this pass gives any weight."""
        weights = self._weights()
        if self._in_use is None or self._in_use[0] is not weights:
            used = weights.dense.detach().flatten(0, -2).any(0).nonzero().flatten()
            self._in_use = weights, tuple(used.tolist())
        return self._in_use[1]

    def few_rows(self, bank: Bank, x: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
        """``A, w, Bt`` of only the experts each batch row uses, where fetching them is cheaper than computing all."""
        index = self._weights().index
        if index is None or bank.embedding or x.ndim != 3 or index.shape[1] != 1:
            return None
        most = index.shape[-1] * max(bank.layout.ranks)
        if torch.is_autocast_enabled(x.device.type):
            return None
        kept = None if torch.compiler.is_compiling() else self._fetched
        if kept is not None and 2 * index.shape[0] * most <= bank.layout.rows:
            picked, w = self._picked_rows(bank)
            if bank not in kept:
                kept[bank] = bank.A[picked], bank.Bt[picked]
            A, Bt = kept[bank]
            return A, w, Bt
        if x.shape[1] * (bank.layout.rows - most) < 4 * most:
            return None
        if x.shape[1] == 1 and index.shape[0] * most >= bank.layout.rows:
            return None  # one token a row: the copies for all rows would be larger than the bank
        picked, w = self._picked_rows(bank)
        return bank.A[picked], w, bank.Bt[picked]

    def _picked_rows(self, bank: Bank) -> tuple[Tensor, Tensor]:
        """Which rank rows each batch row uses, ``[rows, S]``, and their weights, ``[rows, tokens or 1, S]``."""
        key = bank.layout, bank.device, bank.dtype
        compiling = torch.compiler.is_compiling()
        found = None if compiling else self._picked.get(key)
        if found is None:
            weights = self._weights()
            assert weights.index is not None
            assert weights.values is not None
            rows, scales = bank.layout.padded_rows(bank.A)
            index, values = weights.index[:, 0].to(rows.device), weights.values.to(rows.device, bank.dtype)
            w = (scales[index].unsqueeze(1) * values.unsqueeze(-1)).flatten(2)
            found = rows[index].flatten(1), w
            if not (
                torch.is_grad_enabled() or compiling
            ):  # a checkpointed block that runs again must find what it found before
                self._picked[key] = found
        return found

    def _weights(self) -> Weights:
        weights = self.current if self._driving is None else self._driving
        if not torch.compiler.is_compiling() and weights is not self._known:
            self._forget()  # a compiled gate may have decided, of whose graph these layers are left out
            self._known = weights
        if weights is None:
            raise LoraweaveError(
                f"gate site {self.name}: {self.plan.members[0]!r} decides the weights but has not run in this pass; "
                "this model calls its modules in another order than expected: use granularity='matrix'"
            )
        return weights

    def clear(self) -> None:
        """Forget the last pass."""
        self.current = self._read = None
        self._forget()

    def _forget(self) -> None:
        """What was made of weights that are no more."""
        self._row_weights.clear()
        self._picked.clear()
        self._fetched = None
