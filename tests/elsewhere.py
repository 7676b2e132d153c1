"""A second device that every machine has, to see here what would fail on a GPU.

Its tensors lie in the CPU's memory and are computed there, exactly as the CPU's are. But as on a GPU no operation takes
tensors of both, but for single numbers where it goes by elements, and whoever reads a value waits until all that was
asked for is computed.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.utils import _pytree as tree
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

_aten = torch.ops.aten
_COPIES = (_aten._to_copy.default, _aten.copy_.default)
_INDEXING = (_aten.index.Tensor, _aten.index_put.default, _aten.index_put_.default)
_PLAIN = {"device": torch.device("cpu"), "pin_memory": False}
_open = False


class _Device:
    """What torch asks of a device. Other tests know its name alone: it is there only within :func:`elsewhere`."""

    def is_available(self) -> bool:
        return _open

    def is_initialized(self) -> bool:
        return True

    def device_count(self) -> int:
        return int(_open)

    def current_device(self) -> int:
        return 0

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    def manual_seed_all(self, _: int) -> None: ...

    def _is_in_bad_fork(self) -> bool:
        return False


class _Hooks(torch._C._acc.PrivateUse1Hooks):
    """The same, asked from below."""

    def is_available(self) -> bool:
        return _open

    def has_primary_context(self, _: int) -> bool:
        return True

    def is_built(self) -> bool:
        return True


_setup_privateuseone_for_python_backend("elsewhere", _Device(), _Hooks())
DEVICE = torch.device("elsewhere", 0)


class MixedDevicesError(RuntimeError):
    """An operation got tensors of two devices."""


class Elsewhere(Tensor):
    """A tensor on the device; ``here`` is the CPU's that stands for it."""

    here: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, here: Tensor, requires_grad: bool = False) -> Any:
        if here.device.type != "cpu":  # accelerate makes parameters anew by their class, wherever they shall be
            return nn.Parameter(here, requires_grad)
        made = Tensor._make_wrapper_subclass(
            cls,
            here.shape,
            strides=here.stride(),
            storage_offset=here.storage_offset(),
            dtype=here.dtype,
            device=DEVICE,
        )
        made.here = here
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def __repr__(self, **_: Any) -> str:
        return f"Elsewhere({self.here!r})"


@dataclass
class Seen:
    """What the device was asked to do, by operation.

    Attributes:
        waits: how often the CPU waited for it.
        kernels: what it had to compute; each costs the CPU about as long to start, however small it is.
    """

    waits: Counter[str] = field(default_factory=Counter)
    kernels: Counter[str] = field(default_factory=Counter)


class _Watched(TorchDispatchMode):
    """Sees every operation, also those without a tensor of the device at hand (``torch.zeros(3, device=DEVICE)``)."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = Seen()

    def __torch_dispatch__(self, func: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        if _waits(func, args, kwargs or {}):
            self.seen.waits[str(func)] += 1
        out = _run(func, args, kwargs or {})
        if not _is_view(func) and any(isinstance(leaf, Elsewhere) for leaf in tree.tree_leaves(out)):
            self.seen.kernels[str(func)] += 1
        return out


@contextmanager
def elsewhere() -> Iterator[Seen]:
    """Within it the device works; gives what it was asked to do so far.

    Tensors made by Python cannot be inference tensors: ``torch.inference_mode`` is ``torch.no_grad`` meanwhile. Folding
    takes none but plain tensors, which here are those of the device.
    """
    global _open
    # A parameter that moves stays the same object; ``data`` of another class could not be put into it.
    swaps = torch.__future__.get_swap_module_params_on_conversion()
    lifts = torch._C._only_lift_cpu_tensors()
    torch.__future__.set_swap_module_params_on_conversion(True)
    torch._C._set_only_lift_cpu_tensors(True)
    _open = True
    try:
        with (
            patch("torch.inference_mode", lambda mode=True: torch.no_grad() if mode else torch.enable_grad()),
            patch("loraweave.transforms.fold.Tensor", Elsewhere),
            _Watched() as mode,
        ):
            yield mode.seen
    finally:
        _open = False
        torch.__future__.set_swap_module_params_on_conversion(swaps)
        torch._C._set_only_lift_cpu_tensors(lifts)


@contextmanager
def accelerated(monkeypatch: Any) -> Iterator[None]:
    """Within it accelerate, and so every training, takes the device for its own."""
    from accelerate.state import AcceleratorState

    monkeypatch.setenv("ACCELERATE_TORCH_DEVICE", str(DEVICE))
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        with elsewhere():
            yield
    finally:
        monkeypatch.undo()
        AcceleratorState._reset_state(reset_partial_state=True)


def spread(host: Any) -> Any:
    """The model's later half on the device, with the hooks by which accelerate moves what modules are given."""
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    class Hook(AlignDevicesHook):
        def init_hook(self, module: nn.Module) -> nn.Module:
            return module  # its tensors are where they shall be

    host.hf_device_map = {}
    later = re.compile(r"decoder|lm_head|model\.norm|model\.layers\.1")
    for path, module in host.named_modules():
        where = DEVICE if later.match(path) else torch.device("cpu")
        for name, parameter in list(module.named_parameters(recurse=False)):  # tied ones part
            setattr(module, name, nn.Parameter(parameter.detach().to(where), parameter.requires_grad))
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, buffer.to(where))
        add_hook_to_module(module, Hook(execution_device=where, io_same_device=module is host))
        host.hf_device_map[path] = str(where)
    return host


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    tensors = [leaf for leaf in tree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    away = any(isinstance(tensor, Elsewhere) for tensor in tensors)
    asked = kwargs.get("device")
    to = away if asked is None else torch.device(asked).type == DEVICE.type
    if not away and not to:
        return func(*args, **kwargs)
    _refuse_mixed(func, args, kwargs, tensors if away else [], to)
    if torch.Tag.inplace_view in func.tags:
        with no_dispatch():
            func(*args, **kwargs)
        args[0].here = args[0].here.as_strided(args[0].shape, args[0].stride(), args[0].storage_offset())
        return args[0]
    plain = kwargs | {key: value for key, value in _PLAIN.items() if kwargs.get(key) and to}
    args_here, kwargs_here = tree.tree_map_only(Elsewhere, lambda tensor: tensor.here, (args, plain))
    out = func(*args_here, **kwargs_here)
    written = {id(tensor.here): tensor for tensor in tensors if isinstance(tensor, Elsewhere)}

    def back(tensor: Tensor) -> Tensor:
        known = written.get(id(tensor))
        return known if known is not None else Elsewhere(tensor) if to else tensor

    return tree.tree_map_only(Tensor, back, out)


def _refuse_mixed(func: Any, args: Any, kwargs: dict[str, Any], tensors: list[Tensor], to: bool) -> None:
    numbers = torch.Tag.pointwise in func.tags
    stray = [one for one in tensors if not isinstance(one, Elsewhere) and (one.ndim or not numbers)]
    if func in _INDEXING:  # by places that the CPU knows
        stray = [tensor for tensor in (args[0], *args[2:3]) if not isinstance(tensor, Elsewhere)]
    if stray and func not in _COPIES:
        raise MixedDevicesError(f"{func}: tensors of shapes {[tuple(t.shape) for t in stray]} are on the CPU")
    generator = kwargs.get("generator")
    if to and generator is not None and generator.device.type == "cpu":
        raise MixedDevicesError(f"{func}: a CPU generator draws on another device")


def _is_view(func: Any) -> bool:
    kind = func._schema.name
    shares = any(out.alias_info is not None and not out.alias_info.is_write for out in func._schema.returns)
    return shares or kind in ("aten::_unsafe_view", "aten::detach") or kind.startswith("aten::empty")


def _waits(func: Any, args: Any, kwargs: dict[str, Any]) -> bool:
    tensors = [leaf for leaf in tree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    if not any(isinstance(tensor, Elsewhere) for tensor in tensors):
        return False
    if func is _aten._to_copy.default:
        asked = kwargs.get("device")
        return asked is not None and torch.device(asked).type == "cpu"
    if func is _aten.copy_.default:
        return not isinstance(args[0], Elsewhere)
    if func in _INDEXING:
        return any(isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8) for index in args[1])
    return torch.Tag.data_dependent_output in func.tags or torch.Tag.dynamic_output_shape in func.tags
