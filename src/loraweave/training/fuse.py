"""Gradient fusion (Mix-of-Show): one LoRA that does to each expert's own inputs what that expert did.

Gu et al. 2023, https://arxiv.org/abs/2305.18292, Eq. 5: ``W = argmin sum_i |(W0 + dW_i) X_i - W X_i|^2`` module by
module. The paper descends with L-BFGS; this is the minimum itself, in closed form.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from loraweave.errors import LoraweaveError, unknown
from loraweave.evaluation.data import read_examples
from loraweave.evaluation.scoring import evaluating
from loraweave.experts.resolve import resolve_experts
from loraweave.experts.types import Expert, LoraFactors
from loraweave.integrations.host import open_host
from loraweave.mixing.layer import MixingConv, MixingLayer
from loraweave.mixture import Mixture, attach_read
from loraweave.policies.checks import weight_vector
from loraweave.policies.sum import Sum
from loraweave.text import IGNORED, Collator, encode_example
from loraweave.training.train import load_tokenizer
from loraweave.transforms import checks
from loraweave.transforms.lowrank import best_of_product

Data = Mapping[str, Any]


def fuse(
    model: Any,
    experts: Mapping[str, str | Path | Expert] | Sequence[str | Path | Expert],
    data: Data,
    *,
    rank: int | None = None,
    ridge: float = 1e-6,
    name: str = "fused",
    **options: Any,
) -> Expert:
    """Fuse LoRAs into one ordinary LoRA that keeps what each does to its own data (Mix-of-Show's gradient fusion).

    For several sets of the same LoRAs take :class:`GradientFusion`, which looks at each LoRA's data once.

    Args:
        model, experts, data, options: as for :class:`GradientFusion`.
        rank, ridge, name: as for :meth:`GradientFusion.fuse`.

    Returns:
        An expert at scale 1, as from :func:`loraweave.merge`; of a pipeline, ``write_lora_file`` in
        ``loraweave.experts.filewriter`` writes it for diffusers.

    Raises:
        LoraweaveError: an expert without data, data that never reach a module which their expert extends, inputs that
            are not finite, or what :func:`loraweave.attach` raises.
    """
    checks.rank("fuse", rank)
    checks.finite("fuse", "ridge", ridge, above=0)
    return GradientFusion(model, experts, data, keep=False, **options).fuse(rank=rank, ridge=ridge, name=name)


class GradientFusion:
    """Fuses any of some LoRAs, as :func:`fuse` does all; what each LoRA's data show is gathered once, and kept.

    Each expert runs alone on its data, and the inputs of every extended module are gathered as ``C_i = sum X_i^T X_i``
    over its tokens (``[in, in]``, float64; of a convolution the unfolded patches). Then ``dW (sum_i C_i + r I) =
    sum_i dW_i C_i`` with ``r = ridge trace(sum_i C_i) / in``; an expert that does not extend a module has ``dW_i = 0``
    there. Data count by their tokens, so give every expert about as much. The model is left as it was.

    Args:
        model: as for :func:`loraweave.attach`; nothing may be attached to it while this gathers.
        experts: as for :func:`loraweave.attach`.
        data: expert -> what it was made for. For a pipeline: prompts, which are painted. Else examples, as
            :func:`loraweave.train` takes them, or ready batches (dicts of tensors) to call the model with.
        weights: strength of every expert that it names, in what is gathered and in what is kept; the others have 1.
        batch_size: examples per pass.
        tokenizer: for examples; default: the one beside the model's weights.
        max_input_length, max_target_length: of examples, in tokens; see :func:`loraweave.train`.
        call: further arguments of the pipeline's call, e.g. ``{"num_inference_steps": 30}``.
        seed: of the noise that painting starts from; the n-th prompt of each expert has ``seed + n``.
        keep: keep what was gathered, ``8 in^2`` bytes per module and expert (some 2 GB an expert for a UNet of SD1.5
            with LoRAs on all its attention and feed-forward layers), so that a second set need not gather it again.
        progress: show a progress bar.

    Raises:
        LoraweaveError: an expert without data, or what :func:`loraweave.attach` raises.
    """

    def __init__(
        self,
        model: Any,
        experts: Mapping[str, str | Path | Expert] | Sequence[str | Path | Expert],
        data: Data,
        *,
        weights: Mapping[str, float] | None = None,
        batch_size: int = 8,
        tokenizer: Any = None,
        max_input_length: int | None = None,
        max_target_length: int | None = None,
        call: Mapping[str, Any] | None = None,
        seed: int = 0,
        keep: bool = True,
        progress: bool = True,
    ) -> None:
        if batch_size < 1:
            raise LoraweaveError(f"fuse batch_size: expected at least 1, got {batch_size}")
        self._host = open_host(model)
        read = resolve_experts(experts, self._host.read)
        names = [expert.name for expert in read]
        _check_data(data, names)
        strengths = weight_vector("fuse", weights or {}, names, 1.0).tolist()
        scaled = [expert.scaled(strength) for expert, strength in zip(read, strengths, strict=True)]
        self._experts = {expert.name: expert for expert in scaled}
        self._seed, self._call, self._keep, self._progress = seed, call or {}, keep, progress
        self._kept: dict[str, Grams] = {}
        if self._host.pipeline is not None:
            if getattr(self._host.pipeline, "vae", None) is None:
                raise LoraweaveError(
                    f"fuse: {type(self._host.pipeline).__name__} has no VAE, which is not supported here"
                )
            self._inputs: dict[str, list[Any]] = {key: _prompts(key, items) for key, items in data.items()}
        else:
            lengths = {"max_input_length": max_input_length, "max_target_length": max_target_length}
            encode = _Encoding(self._host.module, tokenizer, batch_size, lengths)
            self._inputs = {key: encode(key, items) for key, items in data.items()}

    def fuse(
        self,
        names: Sequence[str] | None = None,
        *,
        rank: int | None = None,
        ridge: float = 1e-6,
        name: str = "fused",
    ) -> Expert:
        """One LoRA of some of the experts.

        Args:
            names: which of them; ``None`` for all.
            rank: of the result at most (Eckart and Young); ``None`` keeps everything, at most the sum of the ranks.
            ridge: what keeps the solution finite in directions no data go to; there the result changes nothing.
            name: of the result.

        Raises:
            LoraweaveError: an unknown expert, data that never reach a module which their expert extends, inputs that
                are not finite, or something is attached to the model.
        """
        checks.rank("fuse", rank)
        checks.finite("fuse", "ridge", ridge, above=0)
        chosen = list(self._experts) if names is None else list(dict.fromkeys(names))
        if not chosen:
            raise LoraweaveError("fuse: expected at least one expert, got none")
        for one in chosen:
            if one not in self._experts:
                raise unknown("expert", one, list(self._experts))
        parts: dict[str, Fused] = {}
        with closing(self._gathered([self._experts[one] for one in chosen])) as gathered:
            for expert, grams in gathered:
                for path, C in grams.items():
                    if any(path in self._experts[one].factors for one in chosen):
                        parts.setdefault(path, Fused()).add(expert.factors.get(path), C)
        factors = {path: part.solved(path, ridge, rank) for path, part in parts.items()}
        factors = {path: fused for path, fused in factors.items() if fused.rank > 0}
        if not factors:
            raise LoraweaveError("fuse: the experts change nothing on these data, so there is no LoRA to make")
        return Expert(name, factors, base=getattr(self._host.module, "name_or_path", None) or None)

    def _gathered(self, experts: Sequence[Expert]) -> Generator[tuple[Expert, Grams], None, None]:
        missing = [expert for expert in experts if expert.name not in self._kept]
        yield from ((expert, self._kept[expert.name]) for expert in experts if expert.name in self._kept)
        if not missing:
            return
        mixture = attach_read(self._host, list(self._experts.values()), Sum(), None)
        passes = sum(len(self._inputs[expert.name]) for expert in missing)
        try:
            _check_convolutions(mixture)
            with tqdm(total=passes, desc="fusing", unit="pass", disable=not self._progress) as bar:
                for expert in missing:
                    with _still(mixture), mixture.only(expert.name), _watching(mixture) as watched, torch.no_grad():
                        for number, item in enumerate(self._inputs[expert.name]):
                            _run(mixture, item, self._seed + number, self._call)
                            bar.update()
                    grams = {path: watch.C for path, watch in watched.items() if watch.C is not None}
                    _check_gathered(grams, expert)
                    if self._keep:
                        self._kept[expert.name] = grams
                    yield expert, grams
        finally:
            mixture.detach()


Grams = Mapping[str, Tensor]
"""Module -> ``C = sum X^T X`` of its inputs, ``[in, in]``; of an embedding the diagonal ``[in]``: how often each entry
was looked up."""


class _Watch:
    """Gathers what one module is given."""

    def __init__(self, layer: MixingLayer) -> None:
        self.layer = layer
        self.C: Tensor | None = None

    def add(self, _: nn.Module, args: tuple[Any, ...]) -> None:
        """A forward pre-hook."""
        for X in self._inputs(args[0]):
            new = X.bincount(minlength=self.layer.bank.A[0].numel()).double() if X.ndim == 1 else X.T @ X
            if len(X):
                self.C = new if self.C is None else self.C.add_(new)

    def _inputs(self, x: Tensor) -> Iterator[Tensor]:
        """``[tokens, in]`` in float64, of an embedding ``[tokens]``; padding left out."""
        layer = self.layer
        if layer.bank.embedding:
            yield x.flatten()  # padding has an entry of its own, on which no other depends
        elif isinstance(layer, MixingConv):
            base: Any = layer.base
            for row in x.split(1):  # the patches of a whole batch take much memory
                patches = nn.functional.unfold(row, base.kernel_size, base.dilation, base.padding, base.stride)
                yield patches[0].T.double()
        else:
            assert layer.site is not None
            stream = layer.site.stream
            mask = stream.token_mask(x.shape[1]) if x.ndim == 3 else stream.mask
            flat = x.flatten(0, -2)
            if mask is not None and mask.numel() == len(flat):
                flat = flat[mask.flatten().bool().to(flat.device)]
            yield flat.double()


class Fused:
    """The sums over experts from which one module's LoRA is solved."""

    def __init__(self) -> None:
        self.C: Tensor | None = None
        self.terms: list[tuple[LoraFactors, Tensor]] = []

    def add(self, factors: LoraFactors | None, C: Tensor) -> None:
        """An expert's inputs, and its factors if it extends the module: ``A_i C_i`` is ``[rank, in]``."""
        self.C = C if self.C is None else self.C + C
        if factors is not None:
            A = factors.A.detach().to(C.device).double().flatten(1)
            self.terms.append((factors, A * C if C.ndim == 1 else A @ C))

    def solved(self, path: str, ridge: float, rank: int | None) -> LoraFactors:
        """The fused LoRA: ``dW = sum_i s_i B_i (A_i C_i) (C + r I)^-1``, whose rank is at most the sum of ranks."""
        assert self.C is not None
        C, first = self.C, self.terms[0][0]
        device = C.device
        P = torch.cat([f.scale * AC for f, AC in self.terms])
        B = torch.cat([f.B.detach().to(device).double() for f, _ in self.terms], 1)
        r = ridge * float(C.sum() if C.ndim == 1 else C.trace()) / C.shape[0]
        if r == 0:  # nothing but zeros came in
            A = torch.zeros_like(P)
        elif C.ndim == 1:
            A = P / (C + r)
        else:
            root, failed = torch.linalg.cholesky_ex(C + r * torch.eye(len(C), dtype=C.dtype, device=device))
            if failed:
                raise LoraweaveError(f"fuse: the inputs of {path!r} are too alike for ridge={ridge}; make it larger")
            A = torch.cholesky_solve(P.T, root).T
        A, B = best_of_product(A, B, rank)
        dtype = reduce(torch.promote_types, [t.dtype for f, _ in self.terms for t in (f.A, f.B)])
        where = first.A.device
        A = A.view(-1, *first.A.shape[1:]).to(where, dtype)
        return LoraFactors(A.contiguous(), B.to(where, dtype).contiguous(), 1.0, first.embedding)


@contextmanager
def _watching(mixture: Mixture) -> Iterator[dict[str, _Watch]]:
    watched = {path: _Watch(layer) for path, layer in mixture.layers.items()}
    handles = [watch.layer.register_forward_pre_hook(watch.add) for watch in watched.values()]
    try:
        yield watched
    finally:
        for handle in handles:
            handle.remove()


def _check_gathered(grams: Grams, expert: Expert) -> None:
    for path in expert.factors:
        if path not in grams:
            raise LoraweaveError(
                f"fuse: the data of expert {expert.name!r} never reach {path!r}, which it extends, so nothing tells "
                "what to keep there; give data that do"
            )
    for path, C in grams.items():
        if not C.isfinite().all():
            raise LoraweaveError(
                f"fuse: on the data of expert {expert.name!r} the inputs of {path!r} are not finite; use another dtype "
                "or check the expert"
            )


def _check_data(data: Data, experts: Sequence[str]) -> None:
    if not isinstance(data, Mapping):
        raise LoraweaveError(f"data: expected expert -> its data, got {type(data).__name__}")
    for name in data:
        if name not in experts:
            raise unknown("expert", name, experts)
    for name in experts:
        if name not in data:
            raise LoraweaveError(f"data: none for expert {name!r}; fusion needs some of what each expert was made for")


def _check_convolutions(mixture: Mixture) -> None:
    named = [path for path, layer in mixture.layers.items() if isinstance(getattr(layer.base, "padding", None), str)]
    if named:
        raise LoraweaveError(f"fuse: convolutions with padding in words are not supported: {', '.join(named)}")


def _prompts(expert: str, items: Any) -> list[str]:
    prompts = [items] if isinstance(items, str) else list(items)
    if not prompts or not all(isinstance(p, str) and p.strip() for p in prompts):
        raise LoraweaveError(f"data of expert {expert!r}: expected prompts, at least one, none of them blank")
    return prompts


@dataclass(frozen=True)
class _Encoding:
    """Examples as batches for a model."""

    model: nn.Module
    tokenizer: Any
    size: int
    lengths: Mapping[str, Any]

    def __call__(self, expert: str, items: Any) -> list[dict[str, Any]]:
        if not isinstance(items, str | Path) and isinstance(items, Iterable) and not isinstance(items, Mapping):
            items = list(items)
            if not items:
                raise LoraweaveError(f"data of expert {expert!r}: empty; give examples or batches")
            if all(isinstance(b, Mapping) and b and all(isinstance(v, Tensor) for v in b.values()) for b in items):
                return [dict(batch) for batch in items]
        examples = read_examples(items)
        tokenizer = self.tokenizer or load_tokenizer(self.model)
        seq2seq = bool(getattr(getattr(self.model, "config", None), "is_encoder_decoder", False))
        rows = [encode_example(tokenizer, e, is_encoder_decoder=seq2seq, **self.lengths) for e in examples]
        collate = Collator(tokenizer)
        batches = [collate(rows[first : first + self.size]) for first in range(0, len(rows), self.size)]
        if seq2seq:  # a decoder reads the answer shifted by one, so the n-th input is real where the n-th label is
            for batch in batches:
                batch["decoder_attention_mask"] = (batch["labels"] != IGNORED).long()
        return batches


def _run(mixture: Mixture, item: Any, seed: int, call: Mapping[str, Any]) -> None:
    if mixture.pipeline is not None:
        generator = torch.Generator().manual_seed(seed)
        mixture.pipeline(item, **({"output_type": "latent", "generator": generator} | dict(call)))
        return
    device = next(mixture.model.parameters()).device
    mixture.model(**{key: value.to(device) for key, value in item.items()})


@contextmanager
def _still(mixture: Mixture) -> Iterator[None]:
    """Everything in evaluation mode, and a pipeline's own bar hidden."""
    with ExitStack() as stack:
        if mixture.pipeline is None:
            stack.enter_context(evaluating(mixture.model))
        else:
            from loraweave.integrations.diffusers_training import prepared

            stack.enter_context(prepared(mixture.pipeline, False))
        yield
