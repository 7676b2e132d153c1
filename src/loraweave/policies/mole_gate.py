"""The MoLE gate: evidence -> logits (Eq. 9-10) -> weights (Eq. 11)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from loraweave.errors import LoraweaveError
from loraweave.mixing import numerics
from loraweave.mixing.stream import new_key
from loraweave.mixing.types import Evidence, Pooling, SitePlan, Weights
from loraweave.policies.mole_evidence import RankReader, WideReader
from loraweave.policies.mole_standard import Standard

if TYPE_CHECKING:
    from loraweave.policies.mole import MoLE


class Projection(NamedTuple):
    """A gate's parameters, made ready for the evidence's coordinates, divided by the temperature.

    Attributes:
        matrix: ``[N, C]``; of a flatten gate ``[L, N, C]``.
        columns: ``[N]``, see :func:`numerics.normalized_logits`.
        offset: ``[N]``, what standard scores and the bias add to the logits.
    """

    matrix: Tensor
    columns: Tensor | None
    offset: Tensor | None


SIGMOID_START = math.log(0.98 / 0.02)
LINEAR_SLOPE = 0.1
"""Weight by logit of linear gates: Adam's first steps move a logit by about 1.6, and a weight by a sixth."""


class MoLEGate(nn.Module):
    """Learned weights of one site.

    Parameters, with ``L`` = ``max_length`` of a flatten gate, else absent:

    - ``e``: ``[L, N, d, N]`` (full), ``[L, R, N]`` (compact) or ``[L, in, N]`` (hidden evidence), zero at the start;
    - ``columns``: ``[N]``, the column sums of ``e`` where it cannot tell them (compact, layer normalisation);
    - ``standard.center``, ``standard.spread``: frozen, see :class:`Standard`;
    - ``bias``: ``[N]``, of sigmoid and linear gates and of those that read standard scores, whose mean is zero, so that
      no ``e`` prefers an expert whatever the input. It weighs a coordinate that is always as large as the evidence is
      long, and so keeps up with ``e`` at any width;
    - ``log_temperature`` and ``scale``: scalars, learned if the policy says so.
    """

    def __init__(self, policy: MoLE, site: SitePlan) -> None:
        super().__init__()
        self.policy = policy
        self.key = new_key()
        self.site_name = site.name
        self.pooling = resolve_pooling(policy, site)
        self.first = site.first
        self.normalized = policy.normalized
        self.experts = N = len(site.experts)
        self.reader: WideReader | RankReader = _reader(policy, site)
        length = (cast(int, policy.max_length),) if self.pooling == "flatten" else ()
        like: dict[str, Any] = {"device": site.bank.device, "dtype": torch.float32}
        self.e = nn.Parameter(torch.zeros(*length, *self.reader.shape, N, **like))
        told = isinstance(self.reader, WideReader) or self.reader.full or policy.normalization != "layer"
        self.columns = None if told else nn.Parameter(torch.zeros(N, **like))
        self.standard = Standard(self.e[..., 0].numel(), **like) if standardizes(policy) else None
        self.sigmoid, self.linear = policy.activation == "sigmoid", policy.activation == "linear"
        biased = self.sigmoid or self.linear or self.standard is not None
        self.bias = nn.Parameter(torch.zeros(N, **like)) if biased else None
        start = torch.tensor(math.log(policy.temperature), **like)
        self.log_temperature = nn.Parameter(start, requires_grad=policy.learn_temperature)
        scale = 1.0 if policy.activation in ("top1", "sigmoid") else policy.scale
        total = torch.tensor(float(N if scale == "experts" else scale), **like)
        self.scale = nn.Parameter(total, requires_grad=policy.learn_scale)
        self.closed: Tensor | None = None
        self.kept = N
        self._packed: tuple[tuple[int, torch.device], Projection] | None = None
        self._lasting: tuple[Tensor, Tensor | None, tuple[int, torch.device], Weights] | None = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> MoLEGate:
        """Gates move with the model but stay in single precision when it is cast (``model.half()``)."""

        def moved(tensor: Tensor) -> Tensor:
            changed = fn(tensor)
            return changed if changed.dtype == tensor.dtype else tensor.to(changed.device)

        super()._apply(moved, recurse)
        self.closed = None if self.closed is None else moved(self.closed)
        self._packed = self._lasting = None
        return self

    def train(self, mode: bool = True) -> MoLEGate:
        """Also forgets what was computed from the parameters, however these were changed."""
        self._packed = self._lasting = None
        return super().train(mode)

    @property
    def reads_ranks(self) -> bool:
        return isinstance(self.reader, RankReader)

    def keep(self, kept: Tensor | None) -> None:
        """Mask experts: ``kept`` is ``[E]`` bool; ``None`` lifts the mask."""
        # Offloaded parameters are nowhere between two calls.
        self.closed = None if kept is None else ~kept.to(kept.device if self.e.is_meta else self.e.device)
        self.kept = self.experts if kept is None else int(kept.sum())

    @property
    def suggested_learning_rate(self) -> float:
        """With which Adam's first steps move a logit by about 1.6, however wide the evidence is.

        Adam moves each of the ``C`` coordinates of ``e`` by its learning rate, so a logit by that times the sum of
        the evidence's absolute values, about ``0.8 |v| sqrt(C)``.
        """
        return 2.0 / (self.evidence_length * math.sqrt(self.e[..., 0].numel()))

    @property
    def evidence_length(self) -> float:
        """``|v|`` of what meets ``e``; of standard scores its root mean square."""
        if self.standard is not None:
            return math.sqrt(self.e[..., 0].numel())
        return 1.0 if self.policy.normalization == "l2" else math.sqrt(self.reader.size)

    def forward(self, evidence: Evidence) -> Weights:
        device = evidence.hidden.device.type
        if torch.is_autocast_enabled(device):
            # Squares of evidence overflow half precision, and small differences between experts drown in it.
            with torch.autocast(device, enabled=False):
                return self.decide(evidence)
        return self.decide(evidence)

    def decide(self, evidence: Evidence) -> Weights:
        """Weights from evidence, in single precision."""
        stream = evidence.stream
        if self.pooling == "token":
            return self.activate(self.logits(evidence), self._chosen(evidence))
        if stream.spec.causal and stream.cached_tokens > 0:
            if self.pooling == "prompt":
                return self._decided(cast(Tensor, stream.frozen(self.key)), evidence)
            raise LoraweaveError(
                f"gate site {self.site_name}: {self.pooling!r} pooling reads the whole sequence, so generating with a "
                "key-value cache would differ from generating without; use pooling='token' or 'prompt', or "
                "use_cache=False"
            )
        logits = self.logits(evidence)
        if self.pooling == "prompt":
            stream.freeze(self.key, logits)
        return self.activate(logits, self._chosen(evidence, logits))

    def _decided(self, logits: Tensor, evidence: Evidence) -> Weights:
        """Weights from logits that stay while an answer is written: the very same, as long as nothing else changes."""
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or self.policy.preselect is not None:
            return self.activate(logits, self._chosen(evidence, logits))
        version = self._changes()
        known = self._lasting
        if known is None or known[0] is not logits or known[1] is not self.closed or known[2] != version:
            self._lasting = known = logits, self.closed, version, self.activate(logits)
        return known[3]

    def _changes(self) -> tuple[int, torch.device]:
        """Differs whenever a parameter has changed, or was brought elsewhere (accelerate does, for each call)."""
        own = self._parameters
        found = sum([p._version for p in own.values() if p is not None])
        standard = self._modules.get("standard")
        if standard is not None:
            found += sum([p._version for p in standard._parameters.values() if p is not None])
        return found, own["e"].device  # type: ignore[union-attr]

    def _chosen(self, evidence: Evidence, logits: Tensor | None = None) -> Tensor | None:
        """``[rows, 1, k]``: the experts that the stream's first gate chose; ``None`` if it chose none.

        Args:
            evidence: what is read here.
            logits: ``[rows, 1, N]`` from it, if it was pooled.
        """
        k, stream = self.policy.preselect, evidence.stream
        if k is None or k >= self.kept or self.training or (self.standard is not None and self.standard.measuring):
            return None
        if self.first:
            with torch.no_grad():
                rank = self._prompt_logits(evidence) if logits is None else logits
                if self.closed is not None:
                    rank = rank.masked_fill(self.closed.to(rank.device), -torch.inf)
                stream.chosen = rank.topk(k, dim=-1).indices
        chosen, rows = stream.chosen, evidence.hidden.shape[0]
        if chosen is None or chosen.shape[0] != rows:
            what = "none was asked before" if chosen is None else f"it read {chosen.shape[0]} rows and this one {rows}"
            raise LoraweaveError(
                f"gate site {self.site_name}: preselect lets the first gate choose each row's experts, but {what}; "
                "use preselect=None with this model"
            )
        return chosen.to(evidence.hidden.device)

    def _prompt_logits(self, evidence: Evidence) -> Tensor:
        """``[rows, 1, N]`` on the mean of the prompt, which stays while the answer is written."""
        stream, (rows, tokens) = evidence.stream, evidence.hidden.shape[:2]
        if stream.spec.causal and stream.cached_tokens > 0:
            return cast(Tensor, stream.frozen(self.key))
        v = numerics.masked_mean(self.reader.raw(evidence), stream.prompt_mask(rows, tokens))
        logits = self._project(v, evidence)
        if stream.spec.causal:
            stream.freeze(self.key, logits)
        return logits

    def logits(self, evidence: Evidence) -> Tensor:
        """``eps / tau`` of Eq. 10 and 11, ``[rows, tokens or 1, N]``."""
        return self._project(self.pool(self.reader.raw(evidence), evidence), evidence)

    def _project(self, v: Tensor, evidence: Evidence) -> Tensor:
        reader, normalization = self.reader, self.policy.normalization
        coordinates, length, total = reader.measure(v, total=normalization == "layer")
        standard = self.standard
        if standard is not None and standard.measuring:
            self._measure(standard, coordinates, length, total, evidence)
        matrix, columns, offset = self._projection(v.shape[1])
        size = reader.size
        if self.pooling == "flatten":
            projected = torch.einsum("blc,lnc->bn", coordinates, matrix).unsqueeze(1)
            length = torch.linalg.vector_norm(length, dim=1, keepdim=True)
            total = None if total is None else total.sum(1, keepdim=True)
            size = size * self.e.shape[0]
        else:
            # Some BLAS are twice as slow on a matrix with so few columns as on its transpose.
            projected = F.linear(coordinates, matrix)
        return numerics.normalized_logits(
            projected, length, size, normalization, total=total, columns=columns, offset=offset
        )

    def _projection(self, tokens: int) -> Projection:
        """What the parameters amount to; kept as long as they stay, where no gradient has to reach them."""
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or self.pooling == "flatten":
            self._packed = None
            return self._pack(tokens)
        version = self._changes()
        if self._packed is None or self._packed[0] != version:
            self._packed = version, self._pack(tokens)
        return self._packed[1]

    def _pack(self, tokens: int) -> Projection:
        e: Tensor = self.e
        center, spread = (None, None) if self.standard is None else self.standard()
        if spread is not None:
            e = e / spread.unsqueeze(-1)
        columns = self.reader.columns(e)
        matrix = self.reader.matrix(e[:tokens] if self.pooling == "flatten" else e)
        offset = None if center is None else -(center @ matrix)
        if self.bias is not None:
            offset = (0.0 if offset is None else offset) + self.bias * self.evidence_length
        columns = self.columns if columns is None else columns
        sharpness = torch.exp(-self.log_temperature)
        return Projection(
            (matrix * sharpness).mT.contiguous(),
            None if columns is None else columns * sharpness,
            None if offset is None else offset * sharpness,
        )

    def _measure(
        self, standard: Standard, coordinates: Tensor, length: Tensor, total: Tensor | None, evidence: Evidence
    ) -> None:
        # The identity in place of the gate's matrix gives the normalised coordinates themselves.
        ones = torch.ones if isinstance(self.reader, WideReader) else torch.zeros
        columns = ones(coordinates.shape[-1], device=coordinates.device)
        normalized = numerics.normalized_logits(
            coordinates, length, self.reader.size, self.policy.normalization, total=total, columns=columns
        )
        mask = evidence.stream.token_mask(coordinates.shape[1]) if self.pooling == "token" else None
        standard.note(normalized, mask)

    def pool(self, v: Tensor, evidence: Evidence) -> Tensor:
        """``[B, T, C]`` -> ``[B, T or 1, C]``."""
        stream, (rows, tokens) = evidence.stream, v.shape[:2]
        if self.pooling == "token":
            return v
        if self.pooling == "mean":
            return numerics.masked_mean(v, stream.token_mask(tokens))
        if self.pooling == "prompt":
            return numerics.masked_mean(v, stream.prompt_mask(rows, tokens))
        if tokens > self.e.shape[0]:
            raise LoraweaveError(
                f"gate site {self.site_name}: this flatten gate reads at most max_length={self.e.shape[0]} tokens, "
                f"got {tokens}; shorten the input, or train a gate with a larger max_length or another pooling"
            )
        mask = stream.token_mask(tokens)
        if mask is None:
            return v
        # Real tokens go to the front, so that left padding does not change which parameters read them.
        mask = mask.to(v)
        order = mask.argsort(dim=1, descending=True, stable=True).unsqueeze(-1)
        return (v * mask.unsqueeze(-1)).gather(1, order.expand_as(v))

    def activate(self, logits: Tensor, chosen: Tensor | None = None) -> Weights:
        """Eq. 11 and its relatives: ``eps / tau`` -> weights; masked experts, and those not chosen, are left out."""
        if self.sigmoid:
            logits = logits + SIGMOID_START
        if chosen is None:
            if self.closed is not None:
                logits = logits.masked_fill(self.closed.to(logits.device), -torch.inf)
            return self._weigh(logits, self.kept)
        few = chosen.expand(-1, logits.shape[1], -1)
        among = self._weigh(logits.gather(-1, few), chosen.shape[-1])
        dense = torch.zeros_like(logits).scatter(-1, few, among.dense)
        if among.index is None or among.values is None or among.index.shape[1] > 1:
            return Weights(dense, chosen, among.dense)
        return Weights(dense, chosen.gather(-1, among.index), among.values)

    def _weigh(self, logits: Tensor, kept: int) -> Weights:
        """The activation of logits of which ``kept`` are finite."""
        if self.sigmoid:
            return Weights(torch.sigmoid(logits))
        if self.linear:
            weights = self.scale / self.experts + LINEAR_SLOPE * logits
            return Weights(weights.masked_fill(logits.isneginf(), 0.0))
        total = numerics.masked_total(self.scale, kept, self.experts)
        if self.policy.activation == "topk":
            best, index = logits.topk(min(self.policy.k, kept), dim=-1)
            values = total * best.softmax(-1)
            hard = torch.zeros_like(logits).scatter(-1, index, values)
            if torch.is_grad_enabled() and logits.requires_grad:
                # Who was not chosen must be heard, too: the first choice is a tie, and would stay for ever.
                p = total * logits.softmax(-1)
                return Weights(hard.detach() + p - p.detach())
            return Weights(hard, index, values)
        p = logits.softmax(-1)
        if self.policy.activation == "softmax":
            return Weights(total * p)
        index = p.argmax(-1, keepdim=True)
        hard = torch.zeros_like(p).scatter(-1, index, 1.0)
        if torch.is_grad_enabled() and p.requires_grad:
            return Weights(hard + p - p.detach())
        return Weights(hard, index, torch.ones_like(index, dtype=p.dtype))


def standardizes(policy: MoLE) -> bool:
    """Whether gates of this policy read standard scores: the paper's forms (flatten, full) do not."""
    wide = policy.evidence == "hidden" or policy.gate_form == "compact"
    return policy.standardize and policy.pooling != "flatten" and policy.mix == "deltas" and wide


def resolve_pooling(policy: MoLE, site: SitePlan) -> Pooling:
    """What ``auto`` means at this site, and whether the chosen pooling is possible there.

    Raises:
        LoraweaveError: ``prompt`` in the decoder of an encoder-decoder, whose prompt is not its own.
    """
    if policy.pooling == "auto":
        return "token" if site.causal else "mean"
    if policy.pooling == "prompt" and not site.prompted:
        if not site.causal:
            return "mean"
        raise LoraweaveError(
            f"gate site {site.name}: pooling='prompt' needs to see the prompt; this decoder's is in the encoder, and "
            "no expert extends a module here that reads it (keys or values of cross-attention): use pooling='auto'"
        )
    return policy.pooling


def _reader(policy: MoLE, site: SitePlan) -> WideReader | RankReader:
    N = len(site.experts)
    if policy.mix == "outputs" and site.block is not None:
        width = site.width or site.features[0]
        return WideReader(N * width, (N, width))
    if policy.evidence == "hidden":
        width = site.features[1 if site.bank.embedding else 0]
        return WideReader(width, (width,))
    return RankReader(site.bank, full=policy.gate_form == "full")
