"""The mixture: model + bank + policy, attached. This is what a user holds, saves and loads."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from loraweave.errors import LoraweaveError, unknown
from loraweave.experts.paging import ExpertMemory
from loraweave.experts.resolve import resolve_experts
from loraweave.experts.types import Expert
from loraweave.integrations.host import Host, open_host
from loraweave.mixing.anatomy import Anatomy
from loraweave.mixing.attach import Attachment, attach_layers
from loraweave.mixing.blocks import BlockMixer, mix_blocks
from loraweave.mixing.denoiser import Stage
from loraweave.mixing.exclusion import Exclusion, exclusively, guard
from loraweave.mixing.layer import MixingLayer
from loraweave.mixing.record import Record
from loraweave.mixing.site import Site
from loraweave.mixing.sites import build_sites, constant_weights
from loraweave.mixing.stream import Stream, open_doors
from loraweave.mixing.types import Policy
from loraweave.transforms import fold as folding

Source = str | Path | Expert
M = TypeVar("M", bound=nn.Module)


def attach(
    model: Any,
    experts: Mapping[str, Source] | Sequence[Source],
    policy: Policy | None = None,
    *,
    blocks: Iterable[str] | None = None,
    expert_memory: int | str | None = None,
) -> Mixture:
    """Attach trained LoRAs to a frozen model and mix them.

    The model itself stays the interface: call it, ``generate`` with it, pass it to a pipeline. Its parameters stop
    requiring gradients until :meth:`Mixture.detach`, which restores it exactly.

    Args:
        model: any transformers model (other modules work where their parts are called in the order of registration), or
            a diffusers pipeline, whose denoiser and text encoders are extended.
        experts: name -> PEFT folder, hub id, or :class:`Expert`, in the order in which the mixture keeps them; of a
            plain sequence the folders' names are taken. For a pipeline also ``.safetensors`` files as they circulate.
        policy: how to mix; default: ``MoLE()`` with fresh gates, for a pipeline ``Sum()``.
        blocks: class names or module paths to take as blocks, where the model's own division does not suit.
        expert_memory: how much memory experts may take on the model's device, in bytes or as ``"2GB"``: they are
            fetched when they are used, and wait in CPU memory otherwise (in their files, if the model itself computes
            on the CPU; these must stay as they are). Default: all of them stand on the device.

    Raises:
        LoraweaveError: an expert cannot be read or does not fit this model, something is attached already, or the
            memory cannot hold even one expert.
    """
    named = None if blocks is None else tuple(blocks)
    host = open_host(model, named)
    memory = None if expert_memory is None else ExpertMemory(expert_memory)
    return attach_read(host, resolve_experts(experts, host.read), policy, named, memory)


def attach_read(
    host: Host,
    experts: list[Expert],
    policy: Policy | None,
    blocks: tuple[str, ...] | None,
    memory: ExpertMemory | None = None,
) -> Mixture:
    """:func:`attach` experts that are read already; the list is emptied, so that their files can leave memory."""
    if policy is None:
        from loraweave.policies import MoLE, Sum

        policy = MoLE() if host.pipeline is None else Sum()
    sources = [dataclasses.replace(expert, factors={}) for expert in experts]
    mixture = Mixture(host.module, sources, attach_layers(host.module, experts, memory), host.anatomy, policy)
    mixture.blocks, mixture.pipeline = blocks, host.pipeline
    if host.watch is not None:
        mixture._doors += host.watch(mixture)
    return mixture


class Mixture:
    """Trained LoRAs attached to one model and mixed by a policy.

    Attributes:
        model: the model they are attached to, which stays the interface; of a pipeline, its models by their names.
        pipeline: the diffusers pipeline they are attached to, if it is one.
        sources: the experts, without their weights, in order.
        sites: the gate sites of the current policy.
        blocks: what was given as blocks; ``None`` for the model's own division.
    """

    blocks: tuple[str, ...] | None = None
    pipeline: Any = None

    def __init__(
        self, model: nn.Module, experts: Sequence[Expert], attachment: Attachment, anatomy: Anatomy, policy: Policy
    ) -> None:
        self.model = model
        self.sources = tuple(dataclasses.replace(e, factors={}) for e in experts)
        self.sites: tuple[Site, ...] = ()
        self._attachment: Attachment | None = attachment
        self._anatomy = anatomy
        self._streams = {spec.name: Stream(spec) for spec in anatomy.streams}
        self._mixers: list[BlockMixer] = []
        self._kept: Tensor | None = None
        self._in_rows = False
        self._exclusion = Exclusion()
        self._folded: folding.Folded | None = None
        self._doors: list[RemovableHandle] = []
        self._stage = Stage(model, anatomy.staging)
        try:
            self._doors = open_doors(model, self._streams)
            self._doors += guard(model, {"", *(d for s in anatomy.streams for d in (s.door, s.body))}, self._exclusion)
            self._install(policy)
        except BaseException:  # whatever it is, the model must not stay half attached
            self.detach()
            raise

    # ---------------------------------------------------------------- what it is made of

    @property
    def experts(self) -> tuple[str, ...]:
        """Names of the experts, in order."""
        return tuple(expert.name for expert in self.sources)

    @property
    def layers(self) -> dict[str, MixingLayer]:
        """Module path -> the mixing layer that stands there."""
        return self._attached().layers

    @property
    def policy(self) -> Policy:
        """How the experts are mixed. Assign another to change it in place; learned gates of the old one are dropped."""
        return self._policy

    @policy.setter
    @exclusively
    def policy(self, policy: Policy) -> None:
        self._attached()
        self._refuse_folded("change the policy")
        self._install(policy)

    @property
    def gates(self) -> dict[str, nn.Module]:
        """Site name -> the module that decides its weights; empty where they are constant."""
        return {site.name: site.gate for site in self.sites if site.gate is not None}

    def gate_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """All parameters of all gates, named ``site/parameter``."""
        for name, gate in self.gates.items():
            for key, parameter in gate.named_parameters():
                yield f"{name}/{key}", parameter

    @property
    def kept(self) -> tuple[str, ...]:
        """Names of the experts that are not masked."""
        return tuple(n for i, n in enumerate(self.experts) if self._kept is None or bool(self._kept[i]))

    @property
    def expert_memory(self) -> ExpertMemory | None:
        """What the experts take on the model's device, where they are fetched when they are used."""
        return self._attached().memory

    @property
    def folded(self) -> bool:
        """Whether the mixture stands in the model's own weights now."""
        return self._folded is not None

    # ---------------------------------------------------------------- masking

    @contextmanager
    def only(self, *names: str) -> Iterator[Mixture]:
        """Mask all experts but these, without retraining (MoLE's second inference mode).

        Where weights sum to one, the masked experts' share goes to the others; where they do not, they drop out. With a
        scale ``s``, ``K`` experts of ``N`` share ``1 + (s-1)(K-1)/(N-1)``, so one left alone has weight 1.
        """
        wanted = self._checked(names)
        with self._masked(torch.tensor([expert in wanted for expert in self.experts])):
            yield self

    @contextmanager
    def without(self, *names: str) -> Iterator[Mixture]:
        """Mask these experts; see :meth:`only`."""
        dropped = self._checked(names)
        with self._masked(torch.tensor([expert not in dropped for expert in self.experts])):
            yield self

    def _checked(self, names: Sequence[str]) -> set[str]:
        for name in names:
            if name not in self.experts:
                raise unknown("expert", name, self.experts)
        return set(names)

    @contextmanager
    def _masked(self, kept: Tensor) -> Iterator[None]:
        with self._exclusion.hold():
            before = self._kept
            kept = kept if before is None else kept & before
            if not kept.any():
                raise LoraweaveError(f"every expert is masked; keep at least one of: {', '.join(self.experts)}")
            self._refuse_folded("mask experts")
            self._mask(kept)
            try:
                yield
            finally:
                self._mask(before)

    def _mask(self, kept: Tensor | None) -> None:
        before, self._kept = self._kept, kept
        try:
            constants = [constant_weights(self._policy, site.plan, self._kept) for site in self.sites]
            self._stage.check(self._policy, self.experts, kept)
        except LoraweaveError:
            self._kept = before
            raise
        self._apply_mask(constants)

    def _apply_mask(self, constants: Sequence[Tensor | None]) -> None:
        """Hand the mask to the gates, and constant weights (mask applied) to the layers."""
        for site, weights in zip(self.sites, constants, strict=True):
            if site.gate is not None:
                site.gate.keep(self._kept)  # type: ignore[operator]
                site.clear()
            site.constant = weights
            for layer in site.layers:
                layer.fix(None if site.driven else weights)
        self._stage.set(self._policy, self.sites, self._kept)

    # ---------------------------------------------------------------- batches and threads

    @contextmanager
    def rows(self, rows: Sequence[Mapping[str, float] | None]) -> Iterator[Mixture]:
        """Give each row of the batches inside its own mixture, whatever the policy: ``[{"qa": 1.0}, None, ...]``.

        A row's weights are those of a plain sum; ``None`` is the bare model. Gates are not asked, and only the experts
        that some row names are computed. Beams and several answers a row (``num_return_sequences``) are counted by
        themselves: a batch of ``n`` times as many rows takes each mixture for ``n`` rows that follow each other.

        Args:
            rows: one entry per row: expert -> weight, or ``None``.

        Raises:
            LoraweaveError: an unknown expert, a weight that is no number; a mask, a fold, ``mix="outputs"`` or a
                pipeline, none of which this goes together with.
        """
        from loraweave.policies.checks import row_vectors

        weights = row_vectors(rows, self.experts)
        with self._exclusion.hold():
            self._refuse_folded("give rows their own mixtures")
            if self.pipeline is not None or self._mixers or self._kept is not None:
                what = (
                    "a mask" if self._kept is not None else "mix='outputs'" if self._mixers else "a diffusion pipeline"
                )
                raise LoraweaveError(f"rows: cannot give rows their own mixtures together with {what}")
            layers = list(self.layers.values())
            self._in_rows = True
            try:
                for layer in layers:
                    layer.fix_rows(weights)
                yield self
            finally:
                self._in_rows = False
                for layer in layers:
                    layer.fix_rows(None)

    @contextmanager
    def exclusive(self) -> Iterator[Mixture]:
        """Have the mixture for this thread alone, to change the policy for one's own answer; other threads wait here.

        Masks, :meth:`rows`, :meth:`prompt` and :meth:`record` do this by themselves. A thread that calls the model in
        none of these while another thread is in one gets an error, since nobody can tell whether it was meant to see
        the other's mask. Not for models compiled by ``torch.compile``, whose calls do not look out for other threads.
        """
        with self._exclusion.hold():
            yield self

    # ---------------------------------------------------------------- looking inside

    @contextmanager
    def record(self) -> Iterator[Record]:
        """Keep the mixing weights of the calls inside: ``with mixture.record() as seen: model(**batch)``."""
        with self._exclusion.hold():
            sites = self.sites
            seen = Record(sites)
            for site in sites:
                site.observers.append(seen.note)
            try:
                yield seen
            finally:
                for site in sites:
                    site.observers.remove(seen.note)

    @contextmanager
    def prompt(self, mask: Tensor) -> Iterator[Mixture]:
        """Say which tokens are the prompt (``[rows, prompt tokens]``) in calls that cannot tell.

        Gates with ``pooling="prompt"`` learn it from the labels in training and from the first call when a key-value
        cache is used. Generating without a cache needs this.
        """
        with self._exclusion.hold():
            before = {name: stream.stated_prompt for name, stream in self._streams.items()}
            for stream in self._streams.values():
                stream.stated_prompt = mask.bool()
            try:
                yield self
            finally:
                for name, stream in self._streams.items():
                    stream.stated_prompt = before[name]

    # ---------------------------------------------------------------- leaving

    @exclusively
    def fold(self) -> None:
        """Write constant weights into the model's own: the mixture then costs nothing. :meth:`unfold` undoes it.

        Raises:
            LoraweaveError: the weights depend on the input, experts are masked, or a base module is quantised.
        """
        self._refuse_folded("fold")
        if self._kept is not None:
            raise LoraweaveError(
                "cannot fold while experts are masked: the mask would outlive its context; "
                "give the policy these weights instead, e.g. lw.Sum(0.0, {'one': 1.0})"
            )
        self._folded = folding.fold(self.layers, self._constants("fold into the weights"))

    @exclusively
    def unfold(self) -> None:
        """Give the model its own weights back, bit by bit, and mix beside them again."""
        if self._folded is None:
            raise LoraweaveError("this mixture is not folded")
        self._folded.restore()
        self._folded = None
        self._mask(self._kept)

    def merged_expert(self, name: str = "mixture") -> Expert:
        """The mixture as one ordinary LoRA (ranks add up), for policies whose weights depend on nothing."""
        return folding.one_expert(self.layers, self._constants("become one LoRA"), name, self._base_name())

    def export_lora(self, folder: str | Path, *, overwrite: bool = False) -> Path:
        """Write the mixture as one ordinary PEFT folder that needs no loraweave; see :meth:`merged_expert`."""
        from loraweave.experts.writer import write_expert

        return write_expert(self.merged_expert(), folder, base=self._base_name(), overwrite=overwrite)

    def save_pretrained(self, folder: str | Path, *, copy_experts: bool = False, results: Any = None) -> Path:
        """Write ``mixture.json``, ``gates.safetensors`` and a README card; :func:`load` reads them back."""
        from loraweave import persistence

        return persistence.save(self, folder, copy_experts=copy_experts, results=results)

    def push_to_hub(self, repo_id: str, *, copy_experts: bool = True, private: bool = False, api: Any = None) -> str:
        """Upload what :meth:`save_pretrained` writes; ``api``: a ``huggingface_hub.HfApi`` to use."""
        from loraweave import persistence

        return persistence.push(self, repo_id, copy_experts=copy_experts, private=private, api=api)

    @exclusively
    def detach(self) -> Any:
        """Take the mixture out; the model or pipeline is exactly what it was before. Returns it."""
        if self._attachment is None:
            raise LoraweaveError("this mixture is detached already")
        if self._folded is not None:
            self._folded.restore()
            self._folded = None
        self._uninstall()
        for door in self._doors:
            door.remove()
        self._attachment.detach()
        self._attachment = None
        self._stage.close()
        return self.model if self.pipeline is None else self.pipeline

    # ---------------------------------------------------------------- the policy's sites

    def _install(self, policy: Policy) -> None:
        """Put a policy's sites in the place of the present ones; whatever may fail is done first."""
        sites = build_sites(self._attached().layers, self._anatomy, self._streams, self.experts, policy)
        constants = [constant_weights(policy, site.plan, self._kept) for site in sites]
        self._stage.check(policy, self.experts, self._kept)
        self._uninstall()
        self._policy, self.sites = policy, sites
        for site in sites:
            site.bind()
        if policy.mix == "outputs":
            self._mixers = mix_blocks(self.model, sites)
        self._apply_mask(constants)

    def _uninstall(self) -> None:
        for mixer in self._mixers:
            mixer.close()
        self._mixers = []
        for site in self.sites:
            site.release()
        self.sites = ()

    # ---------------------------------------------------------------- helpers

    def _attached(self) -> Attachment:
        if self._attachment is None:
            raise LoraweaveError("this mixture is detached; attach the experts again")
        return self._attachment

    def _refuse_folded(self, doing: str) -> None:
        if self._folded is not None:
            raise LoraweaveError(f"cannot {doing} while the mixture is folded into the weights; call unfold() first")
        if self._in_rows:
            raise LoraweaveError(f"cannot {doing} while rows have mixtures of their own; leave rows(...) first")

    def _constants(self, doing: str) -> dict[str, Tensor]:
        weights: dict[str, Tensor] = {}
        for site in self.sites:
            constant = site.constant
            if constant is None and hasattr(site.gate, "constant"):
                constant = site.gate.constant()  # type: ignore[operator, union-attr]  # learned, but of no input
            if constant is None:
                raise LoraweaveError(
                    f"a {self._policy.name!r} mixture cannot {doing}: its weights depend on the input ({site.name})"
                )
            weights |= {layer.path: constant for layer in site.layers}
        return weights

    def _base_name(self) -> str | None:
        name = getattr(self.model, "name_or_path", None)
        return name or None

    def __repr__(self) -> str:
        return (
            f"Mixture({type(self.pipeline or self.model).__name__}, experts=[{', '.join(self.experts)}], "
            f"policy={self._policy!r}, sites={len(self.sites)})"
        )
