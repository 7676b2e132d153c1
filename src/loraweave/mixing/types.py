"""The words shared by the mixing engine and the policies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol, runtime_checkable

from torch import Tensor, nn

if TYPE_CHECKING:
    from loraweave.experts.bank import Bank
    from loraweave.mixing.stream import Stream

Granularity = Literal["matrix", "layer", "block", "network"]
Pooling = Literal["mean", "prompt", "token", "flatten"]


@dataclass(slots=True)
class Weights:
    """The mixing weights of one gate site in one forward pass.

    Attributes:
        dense: ``[rows or 1, tokens or 1, E]``; size 1 broadcasts.
        index: ``[rows, tokens or 1, k]``, the experts that are not switched off, where the gate is sparse by design.
        values: ``[rows, tokens or 1, k]``, their weights; may differ between tokens where the experts do not.
    """

    dense: Tensor
    index: Tensor | None = None
    values: Tensor | None = None


@dataclass(slots=True)
class Evidence:
    """What a gate may read at its site.

    Attributes:
        hidden: ``[rows, tokens, in]``, the input of the site's leading module (an embedding's output).
        ranks: ``[rows, tokens, R]``, ``A x`` of the leading module: the experts' outputs in rank space, unscaled;
            ``None`` for a gate that does not read them.
        outputs: ``[rows, tokens, E, d]``, the experts' outputs themselves, where a block was run once per expert.
        stream: the tokens' attention mask, prompt and cache.
        grid: height and width of the leader's output, where it is a convolution; its tokens are the picture's cells.
        pooled: whether the leader reads one vector a row (a time embedding) rather than tokens.
    """

    hidden: Tensor
    ranks: Tensor | None
    stream: Stream
    outputs: Tensor | None = None
    grid: tuple[int, int] | None = None
    pooled: bool = False


@dataclass(frozen=True)
class SitePlan:
    """A gate site before it is built: a set of modules that share one ``g``.

    Attributes:
        name: path of what it covers, e.g. ``model.layers.0``.
        stream: name of the token stream that its modules read.
        members: module paths; the first is the leader, which runs first and whose input the gate reads.
        block: path of the block it lies in, if any.
        bank: the leader's experts.
        ahead: whether the members stand in a decoder and the leader reads the encoder's tokens, so that the gate
            decides before the decoder runs.
        causal: whether a token may only see what came before it.
        prompted: whether the tokens begin with a prompt and go on with an answer.
        features: width of the leader's input and output.
        width: of the hidden states between blocks, where the host model says it.
        experts: names of the mixture's experts, in order.
        spatial: whether its tokens are places in a picture.
        first: whether its gate runs before all others that read this stream.
    """

    name: str
    stream: str
    members: tuple[str, ...]
    block: str | None
    bank: Bank = field(repr=False)
    causal: bool
    prompted: bool
    features: tuple[int, int]
    experts: tuple[str, ...]
    width: int | None = None
    ahead: bool = False
    spatial: bool = False
    first: bool = False


class Gate(Protocol):
    """Weights decided at one site: an ``nn.Module`` that also answers these.

    A gate whose weights depend on no input also has ``constant() -> Tensor`` (``[E]``), so that they can be folded. It
    may have a ``suggested_learning_rate``, which ``train`` uses where it is given none, and ``reads_ranks = False`` if
    it never looks at :attr:`Evidence.ranks`, which then need not be computed to decide; ``reads_canvas = True`` if it
    looks at how the picture's tokens are laid out (``evidence.stream.canvas``), which else is not found out.
    """

    normalized: bool

    def __call__(self, evidence: Evidence) -> Weights: ...

    def keep(self, kept: Tensor | None) -> None:
        """Mask experts: ``kept`` is ``[E]`` bool; ``None`` lifts the mask."""


class Policy(Protocol):
    """Produces ``g`` for every site.

    Attributes:
        name: as written in a recipe.
        granularity: how many modules share one ``g``.
        normalized: whether the weights sum to one, so that masking must share out what the masked experts had.
        mix: ``"deltas"`` scales each module's low-rank term; ``"outputs"`` runs a block once per expert.
    """

    @property
    def name(self) -> str: ...
    @property
    def granularity(self) -> Granularity: ...
    @property
    def normalized(self) -> bool: ...
    @property
    def mix(self) -> Literal["deltas", "outputs"]: ...

    def constant(self, site: SitePlan) -> Tensor | None:
        """``[E]`` if ``g`` depends on nothing at this site, else ``None``."""

    def gate(self, site: SitePlan) -> nn.Module | None:
        """A fresh :class:`Gate` for this site if ``g`` is learned or depends on the input, else ``None``."""


@dataclass(frozen=True, slots=True)
class Moment:
    """Where in a denoising run a call of the denoiser is.

    Attributes:
        step: number of the step, from 1; a step of a solver that calls the denoiser twice is one.
        steps: how many there will be.
    """

    step: int
    steps: int

    @property
    def fraction(self) -> float:
        """From 0 at the first step to 1 at the last."""
        return (self.step - 1) / (self.steps - 1) if self.steps > 1 else 0.0


@runtime_checkable
class Scheduled(Policy, Protocol):
    """A policy whose weights depend on the denoising step."""

    def at(self, site: SitePlan, moment: Moment | None) -> Tensor:
        """``[E]`` at one step; ``None`` asks what a text encoder shall use, which runs before the first."""


@runtime_checkable
class Turns(Policy, Protocol):
    """A policy under which one expert at a time is at work, as if it were the only LoRA."""

    @property
    def pauses(self) -> bool:
        """Whether there are steps at which no expert is."""

    def order_of(self, experts: Sequence[str]) -> Sequence[str]:
        """Those of the experts that have a turn, in order."""

    def turn(self, experts: Sequence[str], moment: Moment) -> str | None:
        """Whose turn it is at a step, of the experts that are not masked; ``None`` for nobody's."""


@runtime_checkable
class Copies(Policy, Protocol):
    """A policy that runs every row once per expert and averages the estimates.

    Attributes:
        chunk: how many experts to run at a time; ``None`` for all.
    """

    @property
    def chunk(self) -> int | None: ...

    def shares(self, experts: Sequence[str]) -> Tensor:
        """``[E]``: what each expert's estimate counts; need not sum to one."""
