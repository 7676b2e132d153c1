"""Threads share a mixture by turns: what one thread sets holds for its own passes and for no other's."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Concatenate, ParamSpec, TypeVar, cast

import torch
from torch import nn

from loraweave.errors import LoraweaveError

P = ParamSpec("P")
R = TypeVar("R")


class Exclusion:
    """One thread at a time.

    A pass of the model has the mixture to itself from its door to its end, since gates keep their decisions in it. A
    context (a mask, weights of rows, a stated prompt) has it for as long as it is open: contexts of other threads wait,
    passes of other threads are an error, since whether they were meant to see the context nobody can know.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._holder: tuple[int, str] | None = None
        self._passing = 0
        self._inside: list[str] = []

    def __reduce__(self) -> Any:
        return Exclusion, ()  # a copied model has threads of its own

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Have the mixture for this thread alone; wait until the one that has it now leaves."""
        with self._lock:
            before = self._holder
            self._holder = threading.get_ident(), threading.current_thread().name
            try:
                yield
            finally:
                self._holder = before

    def enter(self, door: str) -> None:
        """A pass begins at this door.

        Raises:
            LoraweaveError: another thread is in a context.
        """
        me, holder = threading.get_ident(), self._holder
        if holder is not None and holder[0] != me:
            raise LoraweaveError(
                f"thread {threading.current_thread().name!r} calls the model while thread {holder[1]!r} has it to "
                "itself (a mask, rows, a prompt, a record): open that context in the thread that calls the model, or "
                "let threads take turns with mixture.exclusive()"
            )
        self._lock.acquire()
        if door in self._inside:  # an interrupt (Ctrl-C) broke off an earlier pass of this thread
            self._drop(self._inside.index(door))
        self._passing = me
        self._inside.append(door)

    def leave(self, door: str) -> None:
        """The pass that entered at this door ends; nothing happens to a thread that was not let in."""
        if self._passing == threading.get_ident() and door in self._inside:
            self._drop(self._inside.index(door))

    def _drop(self, keep: int) -> None:
        ended = len(self._inside) - keep
        del self._inside[keep:]
        if not self._inside:
            self._passing = 0
        for _ in range(ended):  # last: from here on it is another thread's pass
            self._lock.release()


def exclusively(method: Callable[Concatenate[Any, P], R]) -> Callable[Concatenate[Any, P], R]:
    """Run a mixture's method while no other thread uses the mixture."""

    @functools.wraps(method)
    def run(self: Any, *args: P.args, **kwargs: P.kwargs) -> R:
        with self._exclusion.hold():
            return method(self, *args, **kwargs)

    return cast(Callable[Concatenate[Any, P], R], run)


class Turnstile:
    """Hooks of one door."""

    def __init__(self, exclusion: Exclusion, door: str) -> None:
        self.exclusion = exclusion
        self.door = door

    def enter(self, *_: Any) -> None:
        if not torch.compiler.is_compiling():
            self.exclusion.enter(self.door)

    def leave(self, *_: Any) -> None:
        if not torch.compiler.is_compiling():
            self.exclusion.leave(self.door)


def guard(model: nn.Module, doors: set[str], exclusion: Exclusion) -> list[Any]:
    """Let one thread at a time through these doors; the handles take the guards away."""
    handles: list[Any] = []
    for path in sorted(doors):
        module, turnstile = model.get_submodule(path), Turnstile(exclusion, path)
        # First in and last out, so that everything that is kept during a pass is kept for one thread alone.
        handles.append(module.register_forward_pre_hook(turnstile.enter, prepend=True))
        handles.append(module.register_forward_hook(turnstile.leave, always_call=True))
    return handles
