"""Prompts given to a pipeline that forget the words by which its experts are called up."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.hooks import RemovableHandle

from loraweave.experts.triggers import forgotten, warn_of_triggers
from loraweave.mixing.types import Copies, Turns

if TYPE_CHECKING:
    from loraweave.mixture import Mixture

_PROMPT = re.compile(r"prompt(_\d+)?")
_REMEMBERED = 10_000


class PromptWatch:
    """Warns, once for each prompt, of experts at work whose trigger words it lacks.

    A text encoder is shown tokens, and those of negative prompts like all others. So its door looks up the call of the
    pipeline that it is part of, and takes the prompts from there, as they were given. Encodings that were made before
    the call, or elsewhere, are not asked for words. Nothing is looked for while ``torch.compile`` traces an encoder.
    """

    def __init__(self, mixture: Mixture) -> None:
        self.mixture = mixture
        self.warned: set[tuple[str, str]] = set()

    def open(self, encoders: Iterable[str]) -> list[RemovableHandle]:
        """Stand at these text encoders' doors, which are paths in the mixture's model."""
        modules = [self.mixture.model.get_submodule(path) for path in encoders]
        return [module.register_forward_pre_hook(self.look) for module in modules]

    def look(self, *_: Any) -> None:
        """The hook."""
        if torch.compiler.is_compiling() or not any(e.report and e.report.triggers for e in self.mixture.sources):
            return
        found = _call(sys._getframe(1))
        if found is None:
            return
        prompts, depth = found
        active = at_work(self.mixture)
        experts = [expert for expert in self.mixture.sources if expert.name in active]
        for prompt in prompts:
            lacking = [e for e in experts if (e.name, prompt) not in self.warned and forgotten(e, [prompt])]
            if len(self.warned) > _REMEMBERED:
                self.warned.clear()
            self.warned.update((expert.name, prompt) for expert in lacking)
            warn_of_triggers(lacking, [prompt], stacklevel=depth + 3)


def at_work(mixture: Mixture) -> set[str]:
    """Names of the experts that are neither masked nor at weight 0 throughout."""
    policy, names = mixture.policy, mixture.experts
    if isinstance(policy, Turns):
        return set(policy.order_of(mixture.kept))
    if isinstance(policy, Copies):
        shares = policy.shares(names)
        return {name for name, share in zip(names, shares.tolist(), strict=True) if share and name in mixture.kept}
    return {names[i] for site in mixture.sites for i in _weighed(site, policy) if names[i] in mixture.kept}


def _weighed(site: Any, policy: Any) -> Iterator[int]:
    """Numbers of the experts that extend a module of the site and are not off there for ever."""
    weights = site.constant
    if weights is None and hasattr(site.gate, "constant"):  # learned, but of no input
        offloaded = any(parameter.is_meta for parameter in site.gate.parameters())
        weights = None if offloaded else site.gate.constant()
    elif weights is None and site.gate is None:
        weights = policy.at(site.plan, None)  # a schedule's value farthest from zero
    elif weights is None and hasattr(policy, "peaks"):
        weights = policy.peaks(site.plan.experts)
    for i in range(len(site.plan.experts)):
        if (weights is None or weights[i] != 0) and any(layer.bank.layout.ranks[i] for layer in site.layers):
            yield i


def _call(frame: FrameType | None) -> tuple[list[str], int] | None:
    """The prompts of the pipeline's call that this frame is part of, and how far up its caller is, if there is one."""
    from diffusers import DiffusionPipeline

    depth = 1
    while frame is not None:
        if frame.f_code.co_name == "__call__" and isinstance(frame.f_locals.get("self"), DiffusionPipeline):
            given = [value for name, value in frame.f_locals.items() if _PROMPT.fullmatch(name)]
            while frame.f_back is not None and frame.f_back.f_code.co_name == "decorate_context":  # torch.no_grad
                frame, depth = frame.f_back, depth + 1
            return _rows(given), depth
        frame, depth = frame.f_back, depth + 1
    return None


def _rows(given: Iterable[Any]) -> list[str]:
    """One text for each picture: what its several text encoders are told, together."""
    texts = [[value] if isinstance(value, str) else value for value in given]
    lists = [text for text in texts if isinstance(text, list) and all(isinstance(one, str) for one in text)]
    rows = max(map(len, lists), default=0)
    return ["\n".join(dict.fromkeys(text[n] for text in lists if n < len(text))) for n in range(rows)]
