"""The decoder that every contender runs on, and the LoRAs mixed into it; random weights, seeded."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Literal

import torch
from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, LlamaConfig, T5Config

from speed.place import HERE, Place

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
Models = Mapping[str, nn.Module]
T5_TARGETS = ("q", "k", "v", "o", "wi_0", "wi_1", "wo")
MIXED = (4, 8, 16, 32, 64)


@dataclass(frozen=True)
class Size:
    """Shapes of one run.

    Attributes:
        vocab: small, so that the language model head, which nothing is mixed into, does not hide what mixing costs.
        alpha: not the rank, so that the experts' scale ``alpha / rank`` is a number that has to be multiplied.
        batch, length: of the forward and the training scenario.
        prompt, new_tokens: of the generation scenarios.
        family: a Llama, or a T5 v1.1 with ``layers`` layers on either side.
        mixed: the experts' ranks go through ``MIXED`` in turn, all at the same scale, and ``rank`` is not used.
    """

    layers: int = 12
    width: int = 768
    intermediate: int = 2048
    heads: int = 12
    vocab: int = 8192
    experts: int = 8
    rank: int = 16
    alpha: int = 32
    batch: int = 2
    length: int = 256
    prompt: int = 64
    new_tokens: int = 32
    family: Literal["llama", "t5"] = "llama"
    mixed: bool = False

    @property
    def targets(self) -> tuple[str, ...]:
        return TARGETS if self.family == "llama" else T5_TARGETS

    @property
    def ranks(self) -> tuple[int, ...]:
        return tuple(MIXED[i % len(MIXED)] if self.mixed else self.rank for i in range(self.experts))

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(f"expert{i}" for i in range(self.experts))


SIZES = {
    "full": Size(),
    "large": Size(32, 4096, 11008, 32, length=512, prompt=512),
    "small": Size(layers=4, width=256, intermediate=688, heads=4, vocab=2048, length=128, prompt=32, new_tokens=8),
    "tiny": Size(2, 32, 64, 2, vocab=64, experts=4, rank=2, alpha=4, batch=2, length=12, prompt=5, new_tokens=3),
}


@dataclass(frozen=True)
class Bench:
    """What contenders are built from.

    Attributes:
        size: the shapes.
        base: the bare model; frozen, in evaluation mode. Contenders take :meth:`model`, never ``base`` itself.
        experts: expert name -> PEFT folder.
        place: where the models are.
        contexts: entered by contenders that live inside one (a mask); whoever makes a bench closes them.
    """

    size: Size
    base: nn.Module
    experts: dict[str, Path]
    place: Place = HERE
    contexts: ExitStack = field(default_factory=ExitStack)

    def model(self, own_weights: bool = False) -> nn.Module:
        """A copy of the bare model for one contender; its weights are shared, unless it is going to change them."""
        if own_weights:
            return copy.deepcopy(self.base)
        shared = {id(tensor): tensor for tensor in chain(self.base.parameters(), self.base.buffers())}
        return copy.deepcopy(self.base, shared)


def decoder(size: Size, place: Place = HERE, seed: int = 0) -> nn.Module:
    """The bare model: of the given size with random weights, frozen; made where it will be, for it may be large."""
    torch.manual_seed(seed)
    auto, config = AutoModelForCausalLM, _config(size)
    if size.family == "t5":
        auto = AutoModelForSeq2SeqLM
    with torch.device(place.device):
        model: nn.Module = auto.from_config(config, dtype=place.format)
    return model.requires_grad_(False).eval()


def _config(size: Size) -> T5Config | LlamaConfig:
    if size.family == "t5":
        return T5Config(
            vocab_size=size.vocab,
            d_model=size.width,
            d_kv=size.width // size.heads,
            d_ff=size.intermediate,
            num_layers=size.layers,
            num_heads=size.heads,
            feed_forward_proj="gated-gelu",
            decoder_start_token_id=0,
            eos_token_id=None,
            pad_token_id=0,
        )
    return LlamaConfig(
        vocab_size=size.vocab,
        hidden_size=size.width,
        intermediate_size=size.intermediate,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.heads,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=None,
        pad_token_id=0,
    )


def write_experts(size: Size, base: nn.Module, folder: Path, place: Place = HERE, seed: int = 1) -> dict[str, Path]:
    """Write ``size.experts`` LoRAs as PEFT folders, on every projection of every layer; no factor is zero.

    Returns:
        Expert name -> its folder.
    """
    generator = torch.Generator().manual_seed(seed)
    modules = {path: m for path, m in base.named_modules() if path.rpartition(".")[2] in size.targets}
    task = "CAUSAL_LM" if size.family == "llama" else "SEQ_2_SEQ_LM"
    folders = {}
    for name, rank in zip(size.names, size.ranks, strict=True):
        config = LoraConfig(
            r=rank, lora_alpha=round(size.scale * rank), target_modules=list(size.targets), task_type=task
        )
        config.inference_mode = True
        factors: dict[str, Tensor] = {}
        for path, module in modules.items():
            assert isinstance(module, nn.Linear)
            A = torch.randn(rank, module.in_features, generator=generator) / math.sqrt(module.in_features)
            B = torch.randn(module.out_features, rank, generator=generator) * 0.02
            factors[f"base_model.model.{path}.lora_A.weight"] = A.to(place.format)
            factors[f"base_model.model.{path}.lora_B.weight"] = B.to(place.format)
        folders[name] = folder / name
        folders[name].mkdir(parents=True)
        config.save_pretrained(str(folders[name]))
        save_file(factors, folders[name] / "adapter_model.safetensors", metadata={"format": "pt"})
    return folders


def make_bench(size: Size, folder: Path, place: Place = HERE) -> Bench:
    """The bare model and its experts; the experts are read from ``folder``, and written there first if it has none."""
    base = decoder(size, place)
    settings = folder / "size.json"
    if settings.exists():
        if json.loads(settings.read_text()) != repr(size):
            raise ValueError(f"{folder} holds experts of another size")
        return Bench(size, base, {name: folder / name for name in size.names}, place)
    experts = write_experts(size, base, folder, place)
    settings.write_text(json.dumps(repr(size)))
    return Bench(size, base, experts, place)


def token_ids(bench: Bench, batch: int, length: int, seed: int = 2) -> dict[str, Tensor]:
    """``input_ids`` and an all-ones ``attention_mask``, ``[batch, length]``, as a tokenizer would return them."""
    ids = torch.randint(1, bench.size.vocab, (batch, length), generator=torch.Generator().manual_seed(seed))
    return bench.place.take({"input_ids": ids, "attention_mask": torch.ones_like(ids)})


def inputs(bench: Bench, batch: int, length: int, seed: int = 2) -> dict[str, Tensor]:
    """What a call of the model takes; a T5's decoder reads a quarter of the encoder's length."""
    made = token_ids(bench, batch, length, seed)
    if bench.size.family == "t5":
        made["decoder_input_ids"] = made["input_ids"][:, : max(length // 4, 1)].clone()
    return made


def arithmetic(bench: Bench) -> dict[str, float]:
    """What a dense mixture cannot do without, from the shapes alone: attention and norms are not counted.

    Returns:
        ``base_gflop`` and ``lora_gflop`` of one token through every linear layer (a multiplication and an addition are
        two), ``base_mb`` and ``lora_mb`` of weights read for it, and ``ratio``: (base + LoRA) / base of either.
    """
    linear = [m for m in bench.base.modules() if isinstance(m, nn.Linear)]
    base = sum(m.weight.numel() for m in linear)
    targets = [m for p, m in bench.base.named_modules() if p.rpartition(".")[2] in bench.size.targets]
    widths = sum(m.in_features + m.out_features for m in targets if isinstance(m, nn.Linear))
    lora = widths * sum(bench.size.ranks)
    return {
        "base_gflop": 2e-9 * base,
        "lora_gflop": 2e-9 * lora,
        "base_mb": 1e-6 * bench.place.format.itemsize * base,
        "lora_mb": 1e-6 * bench.place.format.itemsize * lora,
        "ratio": 1 + lora / base,
    }
