"""``mix="outputs"``: run each block once bare and once per expert, and weigh what the experts changed.

``O = F_theta(x) + sum_i g_i (F_(theta + delta_i)(x) - F_theta(x))``: the closest sound reading of MoLE Eq. 12-13, at
the cost of N + 1 blocks. The block's rows are expanded on the way in and reduced on the way out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from loraweave.errors import LoraweaveError
from loraweave.mixing.site import Site
from loraweave.mixing.types import Evidence, Weights


class BlockMixer:
    """Expands and reduces one block.

    Args:
        block: the block's module.
        lead: the site whose gate weighs the block's outputs.
        followers: the other sites within the block (keys and values of cross-attention).
    """

    def __init__(self, block: nn.Module, lead: Site, followers: Sequence[Site]) -> None:
        self.lead = lead
        self.sites = [lead, *followers]
        self.copies = len(lead.plan.experts) + 1
        self.rows = 0
        for site in self.sites:
            site.driven = True
        self.handles: list[RemovableHandle] = [
            block.register_forward_pre_hook(self.expand, with_kwargs=True),
            block.register_forward_hook(self.reduce),
        ]

    def expand(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        hidden = args[0] if args else kwargs["hidden_states"]
        self.rows = hidden.shape[0]
        self._check(kwargs.get("past_key_values"))
        # Row-major copies [bare; expert 1; ...; expert N], each of all rows.
        one_hot = torch.zeros(self.copies, len(self.lead.plan.experts), device=hidden.device, dtype=torch.float32)
        one_hot[1:].fill_diagonal_(1.0)
        weights = Weights(one_hot.repeat_interleave(self.rows, dim=0).unsqueeze(1))
        for site in self.sites:
            site.drive(weights)
        return (
            tuple(self._repeat(value) for value in args),
            {name: self._repeat(value) for name, value in kwargs.items()},
        )

    def _check(self, cache: Any) -> None:
        """Keys and values are cached for all copies; whoever reorders the cache's rows (beam search) loses them."""
        layers = getattr(getattr(cache, "self_attention_cache", cache), "layers", None) or ()
        for layer in layers:
            keys = getattr(layer, "keys", None)
            if isinstance(keys, Tensor) and keys.numel() and keys.shape[0] != self.rows * self.copies:
                raise LoraweaveError(
                    f"{self.lead.name}: mix='outputs' keeps {self.copies} rows of keys and values a row, but the "
                    f"cache holds {keys.shape[0]} for {self.rows}; beam search with a cache is not possible here: pass "
                    "use_cache=False"
                )

    def _repeat(self, value: Any) -> Any:
        if isinstance(value, Tensor) and value.ndim >= 2 and value.shape[0] == self.rows:
            return value.repeat(self.copies, *[1] * (value.ndim - 1))
        if isinstance(value, tuple):
            return tuple(self._repeat(v) for v in value)
        return value

    def reduce(self, _: nn.Module, __: tuple[Any, ...], output: Any) -> Any:
        if isinstance(output, Tensor):
            return self._mix(output)
        if not isinstance(output, tuple):
            raise LoraweaveError(
                f"{self.lead.name}: mix='outputs' cannot read a block output of type {type(output).__name__}"
            )
        return (self._mix(output[0]), *(self._bare(value) for value in output[1:]))

    def _bare(self, value: Any) -> Any:
        """Everything but the hidden states (such as a position bias) as the bare block gave it."""
        expanded = self.rows * self.copies
        return value[: self.rows] if isinstance(value, Tensor) and value.ndim and value.shape[0] == expanded else value

    def _mix(self, output: Tensor) -> Tensor:
        copies = output.view(self.copies, self.rows, *output.shape[1:])
        bare, changes = copies[0], copies[1:] - copies[0]
        gate, lead = self.lead.gate, self.lead
        if lead.constant is not None:
            g = lead.constant.to(output).view(1, 1, -1)
        else:
            assert gate is not None
            lead.set(gate(Evidence(bare, None, lead.stream, changes.permute(1, 2, 0, 3))))
            assert lead.current is not None
            g = lead.current.dense.to(output.dtype)
        return bare + torch.einsum("ebtd,bte->btd", changes, g.expand(*bare.shape[:2], -1))

    def close(self) -> None:
        for handle in self.handles:
            handle.remove()
        for site in self.sites:
            site.drive(None)


def mix_blocks(model: nn.Module, sites: Sequence[Site]) -> list[BlockMixer]:
    """A mixer for each block that sites stand in, led by the block's first site."""
    by_block: dict[str, list[Site]] = {}
    for site in sites:
        if site.plan.block is not None:
            by_block.setdefault(site.plan.block, []).append(site)
    mixers = []
    for path, (lead, *followers) in by_block.items():
        # Keys and values of cross-attention follow the block's own gate.
        for follower in followers:
            follower.leader._modules.pop("gate", None)
            follower.gate = None
        mixers.append(BlockMixer(model.get_submodule(path), lead, followers))
    return mixers
