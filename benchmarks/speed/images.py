"""Three LoRAs on the attention of a denoiser of random weights, and the ways to compose them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

import loraweave as lw
from loraweave.mixing.types import Policy
from speed import image_floors
from speed.denoisers import NAMES, ImageBench, StandIn
from speed.ours import stir
from speed.timing import Task


class Published(StandIn):
    """The published Composite: one pass after another, each after ``set_adapters``, and the estimates' mean."""

    def __init__(self, inner: Any, names: Sequence[str]) -> None:
        super().__init__(inner)
        self.names = names

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor]:
        estimates = []
        for name in self.names:
            self.inner.set_adapters([name])
            estimates.append(self.inner(*args, **(kwargs | {"return_dict": False}))[0])
        return (torch.stack(estimates).mean(dim=0),)


def call(pipe: Any, bench: ImageBench, **options: Any) -> Tensor:
    """The latents of one run with guidance: two rows a step."""
    size = bench.size
    generator = torch.Generator().manual_seed(2)
    with torch.inference_mode():
        latents: Tensor = pipe(
            **bench.place.take(size.embeddings(generator)),
            num_inference_steps=size.steps,
            height=size.latent * 8,
            width=size.latent * 8,
            output_type="latent",
            generator=generator,
            **options,
        ).images
    return latents


def loaded(bench: ImageBench, names: Sequence[str]) -> Any:
    """The pipeline with LoRAs loaded by diffusers, through peft; all of them active."""
    pipe = bench.pipe()
    for name in names:
        pipe.load_lora_weights(bench.files[name], adapter_name=name)
    pipe.set_adapters(list(names))
    return pipe


def composed(bench: ImageBench, policy: Policy, fold: bool = False) -> Any:
    """The pipeline with loraweave; gates are moved off their start."""
    pipe = bench.pipe(own_targets=fold)
    mixture = lw.attach(pipe, dict(bench.files), policy)
    stir(mixture)
    if fold:
        mixture.fold()
    return pipe


def pictures(bench: ImageBench, only: Sequence[str] | None = None) -> dict[str, Callable[[], Tensor]]:
    """Every contender, ready to be called; built when first called."""

    def swap(pipe: Any, step: int, _: Any, values: dict[str, Any]) -> dict[str, Any]:
        pipe.set_adapters([NAMES[(step + 1) % len(NAMES)]])
        return values

    def switched(pipe: Any) -> Tensor:
        pipe.set_adapters([NAMES[0]])
        return call(pipe, bench, callback_on_step_end=swap)

    def published() -> Any:
        pipe = loaded(bench, NAMES)
        setattr(pipe, bench.size.part, Published(getattr(pipe, bench.size.part), NAMES))
        return pipe

    def in_turn(pipe: Any) -> Tensor:
        results = []
        for name in NAMES:
            pipe.set_adapters([name])
            results.append(call(pipe, bench))
        return torch.stack(results)

    simple = partial(call, bench=bench)
    table: dict[str, tuple[Callable[[], Any], Callable[[Any], Tensor]]] = {
        "bare": (bench.pipe, simple),
        "floor": (lambda: image_floors.dense(bench), simple),
        "peft 1": (lambda: loaded(bench, NAMES[:1]), simple),
        "peft all": (lambda: loaded(bench, NAMES), simple),
        "switch": (lambda: composed(bench, lw.Switch(every=1)), simple),
        "switch, published": (lambda: loaded(bench, NAMES), switched),
        "composite, floor": (lambda: image_floors.composite(bench), simple),
        "composite": (lambda: composed(bench, lw.Composite()), simple),
        "composite, chunk 1": (lambda: composed(bench, lw.Composite(chunk=1)), simple),
        "composite, published": (published, simple),
        "three runs, peft 1": (lambda: loaded(bench, NAMES), in_turn),
        "merge": (lambda: composed(bench, lw.Sum()), simple),
        "merge, folded": (lambda: composed(bench, lw.Sum(), fold=True), simple),
        "mole": (lambda: composed(bench, lw.MoLE()), simple),
    }

    def ready(build: Callable[[], Any], run: Callable[[Any], Tensor]) -> Callable[[], Tensor]:
        made: list[Any] = []

        def picture() -> Tensor:
            if not made:
                made.append(build())
            return run(made[0])

        return picture

    return {name: ready(*entry) for name, entry in table.items() if only is None or name in only}


EQUAL = (
    ("floor", "peft all"),
    ("composite, floor", "composite, published"),
    ("switch", "switch, published"),
    ("composite", "composite, published"),
    ("composite, chunk 1", "composite, published"),
    ("merge", "peft all"),
    ("merge, folded", "peft all"),
)


def check(made: dict[str, Callable[[], Tensor]]) -> dict[str, float]:
    """Compare latents: every contender must change the bare model's, and those of ``EQUAL`` must agree.

    In single precision only: rounding to half of it changes latents about as much as these LoRAs do.

    Raises:
        AssertionError: a contender computes something else than it should.
    """
    latents = {name: picture().double() for name, picture in made.items()}
    for name, value in latents.items():
        if not bool(value.isfinite().all()):
            raise AssertionError(f"{name}: its latents are not finite")
        if name != "bare" and torch.allclose(value, latents["bare"], rtol=1e-6, atol=1e-7):
            raise AssertionError(f"{name}: says the same as the bare model; its LoRAs are not in use")
    differences = {}
    for name, other in EQUAL:
        change = (latents[other] - latents["bare"]).abs().max()
        difference = float((latents[name] - latents[other]).abs().max() / change)
        if difference > 1e-2:
            raise AssertionError(f"{name} should equal {other}, but is off by {difference:.2g} of what LoRAs change")
        differences[f"{name} = {other}"] = difference
    return differences


def tasks(made: dict[str, Callable[[], Tensor]]) -> dict[str, Task]:
    def run(picture: Callable[[], Tensor], _: None) -> None:
        picture()

    return {name: Task(partial(run, picture)) for name, picture in made.items()}
