"""Attaching: mixing layers take the places of target modules, and give them back exactly."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import nn

from loraweave.errors import LoraweaveError
from loraweave.experts.bank import Bank, Extent
from loraweave.experts.paging import ExpertMemory, PagedBank
from loraweave.experts.types import Expert, LoraFactors
from loraweave.mixing.layer import MixingConv, MixingEmbedding, MixingLayer

THREADS = 4
"""Experts that are copied at a time, at most: each has its file in memory meanwhile."""


@dataclass
class Attachment:
    """The mixing layers in a model, and how to take them out again."""

    layers: dict[str, MixingLayer]
    replaced: list[tuple[nn.Module, str, nn.Module]]
    frozen: list[nn.Parameter]
    memory: ExpertMemory | None = None

    def detach(self) -> None:
        for parent, name, original in self.replaced:
            parent._modules[name] = original
        for parameter in self.frozen:
            parameter.requires_grad_(True)


def attach_layers(model: nn.Module, experts: list[Expert], memory: ExpertMemory | None = None) -> Attachment:
    """Replace every module that an expert touches by a mixing layer, and freeze the model.

    Nothing is changed unless everything fits.

    Args:
        model: the host.
        experts: emptied on the way: an expert that nobody else holds is let go of as soon as its rows are copied, so
            that files mapped into memory do not stay there beside the copy.
        memory: what they may take on the model's device, if they are not all to stand there.

    Raises:
        LoraweaveError: a mixture or peft adapter is attached already, an expert's module does not exist, a shape does
            not fit, or the memory cannot hold a single expert.
    """
    _refuse_attached(model)
    modules = dict(model.named_modules(remove_duplicate=False))
    by_path: dict[str, list[Extent | None]] = {}
    for number, expert in enumerate(experts):
        _refuse_stranger(expert, model, modules)
        for path, factors in expert.factors.items():
            _refuse_uncalled(expert, path, modules)
            _check_shape(expert, path, modules[path], factors)
            by_path.setdefault(path, [None] * len(experts))[number] = Extent.of(factors)
    order = {path: n for n, path in enumerate(modules)}
    paths = sorted(by_path, key=order.__getitem__)
    twice = _shared(paths, modules)
    if twice:
        raise LoraweaveError(f"{twice[0]!r} and {twice[1]!r} are one module; the experts must name it alike")
    layers = {path: _mixing_layer(modules[path], by_path[path], path, model, memory) for path in paths}
    if memory is not None:
        memory.check([layer.bank for layer in layers.values() if isinstance(layer.bank, PagedBank)])
    _fill({path: layer.bank for path, layer in layers.items()}, experts)
    replaced = _replace(model, {id(layer.base): layer for layer in layers.values()})
    frozen = [p for p in model.parameters() if p.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(False)
    return Attachment(layers, replaced, frozen, memory)


def features(module: nn.Module) -> tuple[int, int] | None:
    """``(in, out)`` of a module that a LoRA can extend; ``None`` if it is of another kind."""
    if isinstance(module, nn.Conv2d):
        return module.in_channels, module.out_channels
    for names in (("in_features", "out_features"), ("num_embeddings", "embedding_dim"), ("nx", "nf")):
        width = tuple(getattr(module, name, None) for name in names)
        if all(isinstance(w, int) for w in width):
            return width  # type: ignore[return-value]
    return None


def _refuse_attached(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, MixingLayer):
            raise LoraweaveError(
                f"a mixture is attached to this model already (at {name!r}); call its detach() first, or set its policy"
            )
        if type(module).__module__.startswith("peft."):
            raise LoraweaveError(
                f"this model carries peft's own adapters (at {name or 'its root'!r}); pass the bare model "
                "(peft_model.unload()) and let loraweave read the adapters from their folders"
            )


def _refuse_stranger(expert: Expert, model: nn.Module, modules: Mapping[str, nn.Module]) -> None:
    if not expert.factors:
        raise LoraweaveError(f"expert {expert.name!r} ({expert.source or 'from memory'}) has no LoRA in any module")
    missing = [path for path in expert.factors if path not in modules]
    if missing:
        made_for = f"; it says it was made for {expert.base!r}" if expert.base else ""
        raise LoraweaveError(
            f"expert {expert.name!r} ({expert.source}) does not fit {type(model).__name__}: {len(missing)} of its "
            f"{len(expert.factors)} modules do not exist there, the first is {missing[0]!r}{made_for}"
        )


def _refuse_uncalled(expert: Expert, path: str, modules: Mapping[str, nn.Module]) -> None:
    parent = modules[path.rpartition(".")[0]]
    if isinstance(parent, nn.MultiheadAttention | nn.TransformerEncoderLayer):
        raise LoraweaveError(
            f"expert {expert.name!r}: {path!r} stands in torch's own {type(parent).__name__}, which reads its parts' "
            "weights without calling them, so that an expert would have no effect there"
        )


def _check_shape(expert: Expert, path: str, module: nn.Module, factors: LoraFactors) -> None:
    width = features(module)
    if width is None:
        raise LoraweaveError(
            f"expert {expert.name!r}: {path!r} is a {type(module).__name__}; experts can extend linear layers, "
            "GPT-2's Conv1D, two-dimensional convolutions and embeddings"
        )
    if isinstance(module, nn.Embedding) != factors.embedding:
        raise LoraweaveError(
            f"expert {expert.name!r}: {path!r} is a {type(module).__name__}, but its LoRA is for another kind"
        )
    _check_kernel(expert, path, module, factors)
    came = (factors.A.shape[1], factors.B.shape[0])
    if came != width:
        made_for = f" (it says it was made for {expert.base!r})" if expert.base else ""
        raise LoraweaveError(
            f"expert {expert.name!r}{made_for}: {path!r} maps {width[0]} to {width[1]} features in this model, "
            f"the expert expects {came[0]} to {came[1]}; it belongs to another base model"
        )


def _check_kernel(expert: Expert, path: str, module: nn.Module, factors: LoraFactors) -> None:
    expected = tuple(module.kernel_size) if isinstance(module, nn.Conv2d) else ()
    came = tuple(factors.A.shape[2:])
    if came != expected:
        raise LoraweaveError(
            f"expert {expert.name!r}: {path!r} is a {type(module).__name__} with a kernel of {list(expected)}, but the "
            f"LoRA's is {list(came)}; it belongs to another base model"
        )
    if isinstance(module, nn.Conv2d) and (module.groups != 1 or module.padding_mode != "zeros"):
        raise LoraweaveError(
            f"expert {expert.name!r}: {path!r} is a grouped convolution, or pads with other than zeros; experts "
            "cannot extend these"
        )


def _shared(paths: Sequence[str], modules: Mapping[str, nn.Module]) -> tuple[str, str] | None:
    seen: dict[int, str] = {}
    for path in paths:
        first = seen.setdefault(id(modules[path]), path)
        if first != path:
            return first, path
    return None


def _mixing_layer(
    base: nn.Module, extents: Sequence[Extent | None], path: str, model: nn.Module, memory: ExpertMemory | None
) -> MixingLayer:
    weight = getattr(base, "weight", None)
    plain = isinstance(weight, torch.Tensor) and weight.dtype in (
        torch.float32,
        torch.bfloat16,
        torch.float16,
        torch.float64,
    )
    dtype = weight.dtype if plain else getattr(model, "dtype", torch.get_default_dtype())  # type: ignore[union-attr]
    device = _device(base, weight if isinstance(weight, torch.Tensor) else next(model.parameters()))
    kind = MixingLayer
    if isinstance(base, nn.Embedding | nn.Conv2d):
        kind = MixingEmbedding if isinstance(base, nn.Embedding) else MixingConv
    if memory is None:
        return kind(base, Bank.room_for(extents, dtype, device), path)
    return kind(base, PagedBank(extents, dtype, device, path, memory), path)


def _device(base: nn.Module, weight: torch.Tensor) -> torch.device:
    """Where a module computes: accelerate keeps offloaded weights elsewhere and brings them in for each call."""
    hook = getattr(base, "_hf_hook", None)
    places = [getattr(one, "execution_device", None) for one in getattr(hook, "hooks", (hook,))]
    known = [place for place in places if place is not None]
    return torch.device(known[0]) if weight.is_meta and known else weight.device


def _fill(banks: Mapping[str, Bank], experts: list[Expert]) -> None:
    """Copy the experts' factors into the banks, several experts at a time."""
    waiting = list(enumerate(experts))
    experts.clear()

    def copy_one(_: int) -> None:
        number, expert = waiting.pop()
        for path, factors in expert.factors.items():
            banks[path].put(number, factors)

    with ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1)) as pool:
        list(pool.map(copy_one, range(len(waiting))))


def _replace(model: nn.Module, layers: Mapping[int, MixingLayer]) -> list[tuple[nn.Module, str, nn.Module]]:
    spots = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent._modules.items()
        if child is not None and id(child) in layers
    ]
    for parent, name, child in spots:
        if not isinstance(parent, MixingLayer):
            parent._modules[name] = layers[id(child)]
    return [spot for spot in spots if not isinstance(spot[0], MixingLayer)]
