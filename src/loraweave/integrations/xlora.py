"""X-LoRA by peft, as a contestant: what it cannot do is said before it is tried."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from loraweave.errors import LoraweaveError
from loraweave.experts.types import Expert
from loraweave.experts.writer import write_expert


def check(model: Any, experts: Mapping[str, Expert]) -> None:
    """Raise where peft's X-LoRA cannot hold these experts on this model.

    Ranks, scales and target modules may differ between experts.

    Raises:
        LoraweaveError: the model has an encoder (the classifier knows one row of hidden states, as long as the input),
            its body is not called ``model`` (the loader cuts every key down to that), or an expert has other layers
            than linear ones and embeddings.
    """
    kind = type(model).__name__
    if getattr(model.config, "is_encoder_decoder", False):
        raise LoraweaveError(f"xlora: peft's X-LoRA is for decoder-only models; {kind} has an encoder: leave xlora out")
    strangers = [path for expert in experts.values() for path in expert.factors if not path.startswith("model.")]
    if strangers:
        raise LoraweaveError(
            f"xlora: peft's X-LoRA finds modules under 'model.' alone, as in Llama, Qwen or Mistral; {kind} has "
            f"{strangers[0]!r}: leave xlora out"
        )
    for name, expert in experts.items():
        for path, factor in expert.factors.items():
            if factor.A.ndim != 2:
                raise LoraweaveError(f"xlora: expert {name!r} extends {path!r}, a convolution: leave xlora out")


@contextmanager
def wrapped(model: Any, experts: Mapping[str, Expert], seed: int, **options: Any) -> Iterator[Any]:
    """The model in peft's X-LoRA over the experts, its classifier fresh; afterwards the model is bare again.

    X-LoRA runs the bare model first, reads its last hidden states, and then runs it again with the experts weighed per
    token. It has no key-value cache.

    Args:
        model: decoder-only.
        experts: by name.
        seed: of the classifier's start.
        **options: further fields of ``peft.XLoraConfig``.

    Raises:
        LoraweaveError: as :func:`check`, or peft refuses.
    """
    import peft

    check(model, experts)
    flags, modes = [(p, p.requires_grad) for p in model.parameters()], [(m, m.training) for m in model.modules()]
    caches = [(settings, settings.use_cache) for settings in (model.config, model.generation_config)]
    before, generation = set(vars(model)), model.generation_config
    torch.manual_seed(seed)
    tuned: Any = None
    try:
        for settings, _ in caches:
            settings.use_cache = False
        with tempfile.TemporaryDirectory() as scratch, warnings.catch_warnings():
            # peft names the experts "0", "1" ... whatever they are called, and leaves out in silence what is not so.
            folders = {
                str(n): str(write_expert(replace(expert, base=None), Path(scratch, str(n)), task_type="CAUSAL_LM"))
                for n, expert in enumerate(experts.values())
            }
            config = peft.XLoraConfig(
                task_type="CAUSAL_LM", hidden_size=model.config.hidden_size, adapters=folders, **options
            )
            warnings.simplefilter("ignore")
            try:
                tuned = peft.get_peft_model(model, config)
            except (ValueError, RuntimeError, KeyError) as error:
                raise LoraweaveError(f"xlora: peft refuses: {error}") from error
        _check_loaded(tuned, experts)
        yield tuned
    finally:
        if tuned is not None:
            tuned.base_model.lora_model.unload()
        model.generation_config = generation  # peft puts there what was given to its own model
        for settings, cache in caches:
            settings.use_cache = cache
        for name in set(vars(model)) - before:
            delattr(model, name)
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        for module, mode in modes:
            module.training = mode


def _check_loaded(tuned: nn.Module, experts: Mapping[str, Expert]) -> None:
    """That every expert is where it should be, with its numbers: peft passes over in silence what it cannot place."""
    modules = dict(tuned.named_modules())
    for n, (name, expert) in enumerate(experts.items()):
        for path, factor in expert.factors.items():
            layer: Any = modules.get(f"base_model.lora_model.model.{path}")
            kept = getattr(layer, "lora_embedding_A" if factor.embedding else "lora_A", {})
            there = dict(kept).get(str(n))
            weight = getattr(there, "weight", there)
            if weight is None or not torch.equal(weight.detach().cpu().float(), factor.A.detach().cpu().float()):
                raise LoraweaveError(f"xlora: peft did not load expert {name!r} at {path!r}; leave xlora out")
