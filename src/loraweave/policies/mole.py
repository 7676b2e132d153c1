"""Mixture of LoRA Experts (MoLE): gates learned over frozen LoRAs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import nn

from loraweave.errors import LoraweaveError
from loraweave.mixing.numerics import Normalization
from loraweave.mixing.types import Granularity, SitePlan
from loraweave.policies import checks
from loraweave.policies.registry import register

Activation = Literal["softmax", "top1", "topk", "sigmoid", "linear"]


@register
@dataclass(frozen=True)
class MoLE:
    """Gates that read what the experts say, or what they hear, and weigh them (MoLE Eq. 9-16).

    At initialisation every expert has the weight ``scale / N``: ``scale=1`` starts from normalised linear arithmetic,
    as the paper does; ``scale="experts"`` (``N``) starts from the plain sum. The defaults are what kept most skills in
    the fewest steps (docs/mole.md); :meth:`paper` is the published form.

    Args:
        granularity: which modules share a gate.
        evidence: ``outputs`` reads the experts' outputs at the site's first module (Eq. 9); ``hidden`` reads that
            module's input, as the authors' released image code does.
        pooling: ``mean`` over the sequence, ``token`` (one decision per token), ``prompt`` (mean over the prompt, then
            frozen), ``flatten`` (the paper's; the sequence has a fixed largest length), or ``auto``: ``mean`` where
            tokens see both ways, ``token`` where they only look back. With ``auto`` and ``prompt``, a decoder behind an
            encoder decides once a row, from the encoder's tokens: they are its prompt, and its own first token says
            nothing of the task. That needs an expert in the cross-attention's keys or values; else it is ``token``.
        normalization: of the concatenated evidence (Eq. 9 leaves it open).
        standardize: whether training first measures, in a few batches, the mean and spread of what each gate reads, and
            the gate then reads standard scores (``mole_standard.py``). Not with ``full`` gates on outputs, ``flatten``
            and ``mix="outputs"``, which stay as published.
        gate_form: ``full`` has the paper's ``[N d, N]`` parameters; ``compact`` expresses the same functions in the
            experts' rank space, ``[R, N]``.
        activation: ``softmax`` (Eq. 11); ``top1``, one expert at weight 1; ``topk``, softmax over the ``k`` best;
            ``sigmoid``, independent gates that start at 0.98; ``linear``, weights that start at ``scale / N`` and may
            take any value, below zero too, as LoRA Soups' static ones: for tasks that none of the experts was made for.
            ``top1`` and ``topk`` choose hard and learn straight-through, by the softmax over all, so that experts that
            are not chosen are heard, too.
        k: how many experts ``topk`` keeps.
        preselect: of many experts, how many a row gets at all. The first gate that reads a row ranks them once, by its
            logits on the pooled prompt (of an encoder: all tokens); the gates behind it then decide among these as
            under a mask, and only these are computed, in the cached steps too. Gates learn among all experts: it acts
            in evaluation mode (``model.eval()``) alone. Default: all.
        scale: what softmax weights sum to (linear ones: at the start): a number, or ``experts`` for ``N``.
        learn_scale: whether each gate learns its own scale from there.
        temperature: ``tau`` of Eq. 11 at the start.
        learn_temperature: whether each gate learns its own.
        mix: ``deltas`` weighs each module's low-rank term; ``outputs`` runs each block once per expert and weighs the
            changes of the block's output (Eq. 12-13 without adding the residual stream twice; costs N+1 blocks).
        max_length: longest sequence of a ``flatten`` gate.
        balance: weight ``alpha`` of the balance loss in training (Eq. 16). Off by default: it kept experts at work that
            nothing called for (docs/mole.md); the paper has 0.5.
    """

    granularity: Granularity = "block"
    evidence: Literal["outputs", "hidden"] = "hidden"
    pooling: Literal["auto", "mean", "prompt", "token", "flatten"] = "auto"
    normalization: Normalization = "rms"
    standardize: bool = True
    gate_form: Literal["compact", "full"] = "compact"
    activation: Activation = "softmax"
    k: int = 2
    preselect: int | None = None
    scale: float | Literal["experts"] = 1.0
    learn_scale: bool = False
    temperature: float = 1.0
    learn_temperature: bool = True
    mix: Literal["deltas", "outputs"] = "deltas"
    max_length: int | None = None
    balance: float = 0.0

    name: ClassVar[str] = "mole"
    source: ClassVar[str] = "https://arxiv.org/abs/2404.13628"

    def __post_init__(self) -> None:
        for option in ("granularity", "evidence", "pooling", "normalization", "gate_form", "activation", "mix"):
            kind = _CHOICES[option]
            checks.choice(self.name, option, getattr(self, option), kind)
        checks.finite(self.name, "temperature", self.temperature, above=0)
        checks.finite(self.name, "balance", self.balance, above=-1e-30)
        if self.scale != "experts":
            checks.finite(self.name, "scale", self.scale, above=0)
        if not isinstance(self.k, int) or self.k < 1:
            raise LoraweaveError(f"mole k: expected a whole number of at least 1, got {self.k!r}")
        if self.preselect is not None:
            checks.whole(self.name, "preselect", self.preselect)
            if self.mix == "outputs":
                raise LoraweaveError("mole preselect: mix='outputs' runs each block once per expert; use mix='deltas'")
        if self.pooling == "flatten" and (not isinstance(self.max_length, int) or self.max_length < 1):
            raise LoraweaveError(
                f"mole max_length: a flatten gate needs the longest sequence it shall read (a whole number), "
                f"got {self.max_length!r}"
            )
        if self.mix == "outputs" and (self.granularity != "block" or self.gate_form != "full"):
            raise LoraweaveError(
                "mole mix='outputs' weighs whole blocks by their outputs: it needs granularity='block' and "
                f"gate_form='full', got {self.granularity!r} and {self.gate_form!r}"
            )
        if self.mix == "outputs" and self.evidence != "outputs":
            raise LoraweaveError("mole mix='outputs' reads the blocks' outputs: it needs evidence='outputs'")

    @classmethod
    def paper(cls, **options: Any) -> MoLE:
        """The form of the paper: full gates that read the experts' outputs, and the balance loss.

        Train it with ``**loraweave.training.train.PAPER`` (learning rate 1e-5, 800 steps, batch 12).
        """
        published = {"evidence": "outputs", "normalization": "l2", "gate_form": "full", "scale": 1.0, "balance": 0.5}
        return cls(**{**published, **options})

    @property
    def normalized(self) -> bool:
        return self.activation not in ("sigmoid", "linear")

    @property
    def reads_ahead(self) -> bool:
        """Whether gates of a decoder behind an encoder read the encoder's tokens, where a site's modules do."""
        return self.mix == "deltas" and self.pooling in ("auto", "prompt")

    def constant(self, site: SitePlan) -> None:
        """No site is constant."""

    def check(self, sites: Sequence[SitePlan]) -> None:
        """Refuse to choose experts by row where a site's tokens do not tell what the row is.

        Raises:
            LoraweaveError: the decoder's own tokens behind an encoder, or a picture's.
        """
        if self.preselect is None:
            return
        for site in sites:
            if site.spatial:
                raise LoraweaveError(f"mole preselect: chooses by a text's tokens, but {site.name} reads a picture's")
            if site.causal and not site.prompted:
                raise LoraweaveError(
                    f"mole preselect: {site.name} reads the decoder's own tokens, which do not tell what the input is; "
                    "use pooling='auto' with granularity='block' or 'network' and experts in the cross-attention's "
                    "keys or values"
                )

    def gate(self, site: SitePlan) -> nn.Module:
        from loraweave.policies.mole_gate import MoLEGate

        return MoLEGate(self, site)


_CHOICES: dict[str, Any] = {
    "granularity": Granularity,
    "evidence": Literal["outputs", "hidden"],
    "pooling": Literal["auto", "mean", "prompt", "token", "flatten"],
    "normalization": Normalization,
    "gate_form": Literal["compact", "full"],
    "activation": Activation,
    "mix": Literal["deltas", "outputs"],
}
