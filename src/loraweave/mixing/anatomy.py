"""What the engine must know of a host model: its streams, its blocks, and which module runs first."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from torch import nn

from loraweave.errors import LoraweaveError
from loraweave.mixing.denoiser import Staging
from loraweave.mixing.site import Place
from loraweave.mixing.stream import StreamSpec

# Names under which models call the projection that runs first in an attention, though it may be registered later;
# Flux's single blocks run proj_mlp before their attention.
LEADING = re.compile(
    r"(^|[._])(q|query|qkv|wqkv|c_attn|in_proj|query_key_value)(_proj|_lin)?$|(^|\.)(to_q|proj_mlp)$", re.IGNORECASE
)


@dataclass(frozen=True)
class Anatomy:
    """A host model, as the engine sees it.

    Attributes:
        streams: the token streams.
        stream_of: module path -> name of the stream it reads.
        blocks: paths of all blocks.
        width: of the hidden states between blocks, if it says so.
        staging: what a diffusion pipeline needs beyond that; ``None`` for other models.
        turn_of: module path -> when its part is called, for models that register their parts in another order.
    """

    streams: tuple[StreamSpec, ...]
    stream_of: Callable[[str], str]
    blocks: frozenset[str]
    width: int | None = None
    staging: Staging | None = None
    turn_of: Callable[[str], tuple[int, ...]] = lambda _: ()

    def place(self, path: str) -> Place:
        """Where the module at ``path`` stands."""
        block = next((prefix for prefix in _prefixes(path) if prefix in self.blocks), None)
        layer = None if block is None else f"{block}{_layer(path[len(block) :])}"
        stream = self.stream_of(path)
        stack = next((s.within for s in self.streams if s.name == stream), "") or stream
        return Place(path, stream, block, layer, bool(LEADING.search(path)), stack, self.turn_of(path))


def _prefixes(path: str) -> Iterable[str]:
    parts = path.split(".")
    return (".".join(parts[:n]) for n in range(1, len(parts)))


def _layer(inner: str) -> str:
    """``.layer.0.SelfAttention.q`` -> ``.layer.0``; ``.self_attn.q_proj`` -> ``.self_attn``; ``.fc1`` -> ````."""
    parts = inner.lstrip(".").split(".")[:-1]
    for n, part in enumerate(parts, start=1):
        if part.isdigit() or n == len(parts) or not parts[n].isdigit():
            return "." + ".".join(parts[:n])
    return ""


def find_blocks(model: nn.Module, classes: Iterable[str]) -> frozenset[str]:
    """Paths of the model's blocks: modules of the named classes that stand in a list.

    Where no class is named, the outermost numbered modules of a ``ModuleList`` are taken.

    Args:
        model: the host model.
        classes: names of block classes.
    """
    wanted = set(classes)
    lists = {name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    found: set[str] = set()
    for name, module in model.named_modules():
        parent = name.rpartition(".")[0]
        if parent not in lists or any(prefix in found for prefix in _prefixes(name)):
            continue
        if not wanted or type(module).__name__ in wanted:
            found.add(name)
    return frozenset(found) if found or not wanted else find_blocks(model, ())


def named_blocks(model: nn.Module, blocks: Iterable[str]) -> frozenset[str]:
    """Blocks that the user named, by class name or by path.

    Raises:
        LoraweaveError: a name fits no module.
    """
    found: set[str] = set()
    for wanted in blocks:
        hits = {n for n, m in model.named_modules() if n and (n == wanted or type(m).__name__ == wanted)}
        if not hits:
            raise LoraweaveError(
                f"blocks: {wanted!r} is neither a module path nor a module class of {type(model).__name__}"
            )
        found |= hits
    return frozenset(found)
