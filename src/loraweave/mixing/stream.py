"""A token stream: what a gate must know about the tokens it pools (mask, prompt, cache), read at a module's door."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from loraweave.errors import LoraweaveError

_DECISIONS = "_loraweave_decisions"
"""Attribute of a key-value cache: what gates decided on the prompt that fills it."""

new_key = count().__next__
"""A number under which no other gate keeps its decisions."""


@dataclass(frozen=True)
class StreamSpec:
    """Where a stream enters the model.

    Attributes:
        name: e.g. ``encoder``.
        door: path of the module through whose call its tokens enter; empty for the model itself.
        mask: name of the door's argument that holds the ``[rows, tokens]`` attention mask, if it has one.
        causal: whether a token may only see what came before it.
        prompted: whether the tokens begin with a prompt and go on with an answer (decoder-only models).
        body: path of a module behind the door that users also call by itself (a model without its head), if any.
        states: name of the door's argument that holds the tokens' states ``[rows, tokens, width]``, where they are
            ready before the door opens (the encoder's output, in a decoder).
        within: name of the stream in whose blocks the modules stand that read this one; empty for its own.
        spatial: whether its tokens are places in a picture.
    """

    name: str
    door: str = ""
    mask: str | None = "attention_mask"
    causal: bool = False
    prompted: bool = False
    body: str = ""
    states: str = ""
    within: str = ""
    spatial: bool = False


@dataclass(frozen=True)
class Canvas:
    """How a picture's tokens are laid out in one call of a denoiser.

    Attributes:
        height, width: cells of the largest grid (latent pixels of a UNet, patches of a transformer).
        text: how many text tokens stand before them where both are in one sequence.
    """

    height: int
    width: int
    text: int = 0


class Stream:
    """State of one stream during one forward pass.

    Attributes:
        listeners: called at the beginning of each pass.
        chosen: ``[rows, 1, k]``, the experts that the first gate chose for each row, where it does.
    """

    def __init__(self, spec: StreamSpec) -> None:
        self.spec = spec
        self.mask: Tensor | None = None
        self.labels: Tensor | None = None
        self.cache: object | None = None
        self.stated_prompt: Tensor | None = None
        self.states: Tensor | None = None
        self.listeners: list[Callable[[], None]] = []
        self.expected = False
        self.chosen: Tensor | None = None
        self.canvas: Canvas | None = None
        self._cached: int | Tensor = 0
        self._homeless: dict[int, Any] = {}

    def __getstate__(self) -> dict[str, Any]:
        """A copy starts afresh: what one model has seen is not the other's."""
        return {"spec": self.spec, "stated_prompt": self.stated_prompt, "listeners": self.listeners}

    def __setstate__(self, state: dict[str, Any]) -> None:
        Stream.__init__(self, state["spec"])
        self.stated_prompt = state["stated_prompt"]
        self.listeners = state["listeners"]

    def enter(
        self, mask: Tensor | Mapping[str, Tensor] | None, cache: object | None, states: Tensor | None = None
    ) -> None:
        """A pass begins. The cache's length is read now: the first block's attention makes it longer."""
        if isinstance(mask, Mapping):  # one for each kind of attention; every one tells which tokens are real
            mask = next((one for one in mask.values() if one is not None), None)
        self.mask, self.cache, self.states = mask, cache, states
        length = getattr(cache, "get_seq_length", None) if self.spec.causal else None
        cached = 0 if length is None else length()
        # A static cache counts in place.
        self._cached = cached.clone() if isinstance(cached, Tensor) else cached
        self._homeless = {}
        if not self.listeners:  # gates that decide ahead keep to what they read before while it stays
            self.chosen = None
        for listener in self.listeners:
            listener()

    def leave(self, cache: object | None) -> None:
        """A pass ends; ``cache`` is the one that the model made itself, if it was given none."""
        if self._homeless and cache is not None:
            setattr(cache, _DECISIONS, self._homeless)
        self._homeless = {}
        # Kept any longer they would hold keys, values and a whole graph in memory.
        self.cache = self.states = None

    @property
    def cached_tokens(self) -> int:
        """How many tokens the cache held when the pass began."""
        cached = int(self._cached)
        if not torch.compiler.is_compiling():
            self._cached = cached  # a static cache's length lies on its device: it is read once a pass
        return cached

    def token_mask(self, tokens: int) -> Tensor | None:
        """``[rows, tokens]``: which tokens are real; ``None`` if all are."""
        mask = self.mask
        if mask is None:
            return None
        shape = tuple(mask.shape) if isinstance(mask, Tensor) else ()
        if len(shape) == 2 and tokens == 1:
            return None  # one vector a row, such as a pooled state, is all there is to read
        if len(shape) == 2 and shape[1] == tokens:
            return mask
        if self.spec.causal and len(shape) == 4 and shape[1] == 1 and shape[2] == tokens < shape[3]:
            return real_tokens(mask)
        raise LoraweaveError(
            f"{self.spec.name}: pooling over tokens needs an attention mask of shape [rows, {tokens}], got "
            f"{list(shape) or type(mask).__name__}; pass the 2-D mask the tokenizer made"
        )

    def prompt_mask(self, rows: int, tokens: int) -> Tensor | None:
        """``[rows, tokens]``: the prompt's tokens: what precedes the first label, or all there is without labels."""
        mask = self.token_mask(tokens)
        if self.stated_prompt is not None:
            prompt = self.stated_prompt
            prompt = prompt.repeat_interleave(max(rows // prompt.shape[0], 1), dim=0)[:, :tokens]
            return torch.nn.functional.pad(prompt, (0, tokens - prompt.shape[1]))
        if self.labels is None:
            return mask
        before = (self.labels != -100).long().cumsum(1) == 0
        return before if mask is None else before & mask.bool()

    def frozen(self, key: int) -> Any:
        """What was decided under ``key`` when this cache was filled with the prompt."""
        decided = getattr(self.cache, _DECISIONS, {}).get(key)
        if decided is None:
            raise LoraweaveError(
                f"{self.spec.name}: the gates read the prompt, but this key-value cache was filled outside of this "
                "mixture; pass the prompt through the attached model first"
            )
        return decided

    def freeze(self, key: int, decided: Any) -> None:
        """Keep it with the cache: it lasts as long, copies have it, and a compiled model finds it in one place."""
        if self.cache is None:
            self._homeless[key] = decided
            return
        if not hasattr(self.cache, _DECISIONS):
            setattr(self.cache, _DECISIONS, {})
        getattr(self.cache, _DECISIONS)[key] = decided


def real_tokens(mask: Tensor) -> Tensor:
    """``[rows, tokens]`` bool: which tokens are real, of the mask that transformers makes for an empty static cache.

    A token is real if some real one sees it. Padding may see anything, as far as the cache is long, lest its attention
    have nothing to attend to; real tokens never see what comes after them.

    Args:
        mask: ``[rows, 1, tokens, slots]`` of a causal model, ``slots > tokens``: what is seen is True, or 0.
    """
    sees = (mask if mask.dtype == torch.bool else mask == 0)[:, 0]
    tokens = sees.shape[1]
    ahead = torch.ones(tokens, sees.shape[2], dtype=torch.bool, device=sees.device).triu(1)
    real = ~(sees & ahead).any(-1, keepdim=True)
    return (sees & real).any(1)[:, :tokens]


class Arguments:
    """Reads named arguments of a module's call, however they were passed."""

    def __init__(self, module: nn.Module) -> None:
        names = inspect.signature(type(module).forward).parameters
        self._position = {name: i - 1 for i, name in enumerate(names)}

    def names(self) -> tuple[str, ...]:
        """The parameters' names in order, without ``self``."""
        return tuple(name for name in self._position if self._position[name] >= 0)

    def get(self, name: str | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if name is None:
            return None
        if name in kwargs:
            return kwargs[name]
        position = self._position.get(name, len(args))
        return args[position] if position < len(args) else None


class Door:
    """Watches a module's calls. Its methods are the hooks, so that a copied model's doors tell the copied streams."""

    def __init__(self, module: nn.Module, streams: list[Stream]) -> None:
        self.arguments = Arguments(module)
        self.streams = streams

    def enter(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for stream in self.streams:
            mask = self.arguments.get(stream.spec.mask, args, kwargs)
            states = self.arguments.get(stream.spec.states or None, args, kwargs)
            stream.enter(mask, self.arguments.get("past_key_values", args, kwargs), states)
            stream.expected = bool(stream.spec.body)

    def enter_body(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Behind the door: nothing new for who came through it, a door of its own for who did not."""
        if not any(stream.expected for stream in self.streams):
            self.enter(module, args, kwargs)
            for stream in self.streams:
                stream.labels = None
        for stream in self.streams:
            stream.expected = False

    def leave(self, _: nn.Module, __: tuple[Any, ...], output: Any) -> None:
        for stream in self.streams:
            stream.leave(getattr(output, "past_key_values", None))

    def see_labels(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for stream in self.streams:
            stream.labels = self.arguments.get("labels", args, kwargs)


def open_doors(model: nn.Module, streams: dict[str, Stream]) -> list[RemovableHandle]:
    """Watch the doors of all streams; the handles close them again."""
    handles = []
    doors: dict[str, list[Stream]] = {}
    for stream in streams.values():
        doors.setdefault(stream.spec.door, []).append(stream)
    for path, here in doors.items():
        module = model.get_submodule(path)
        door = Door(module, here)
        handles.append(module.register_forward_pre_hook(door.enter, with_kwargs=True))
        handles.append(module.register_forward_hook(door.leave))
    for stream in streams.values():
        if stream.spec.body:
            body = model.get_submodule(stream.spec.body)
            handles.append(body.register_forward_pre_hook(Door(body, [stream]).enter_body, with_kwargs=True))
    prompted = [stream for stream in streams.values() if stream.spec.prompted]
    if prompted:
        handles.append(model.register_forward_pre_hook(Door(model, prompted).see_labels, with_kwargs=True))
    return handles
