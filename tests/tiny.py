"""Tiny real models with random weights, experts for them, and the slow mixture that fast ones must equal.

Nothing is downloaded. Weights are large enough for outputs to depend on every part, and always the same.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import loraweave as lw
from loraweave.mixture import Mixture

VOCAB, WIDTH, HEADS, INNER = 48, 32, 4, 40
PAD, END = 0, 1
NAMES = ("ant", "bee", "cat")


@dataclass(frozen=True)
class Architecture:
    """A kind of model.

    Attributes:
        name: e.g. ``t5``.
        kind: ``seq2seq``, ``causal`` or ``encoder``.
        attention: endings of the paths of its attention projections.
        feed_forward: endings of the paths of its other projections.
    """

    name: str
    kind: str
    attention: tuple[str, ...]
    feed_forward: tuple[str, ...]
    build: Callable[..., Any] = field(repr=False)

    @property
    def targets(self) -> tuple[str, ...]:
        return self.attention + self.feed_forward


def _t5(**options: Any) -> Any:
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"vocab_size": VOCAB, "d_model": WIDTH, "d_kv": WIDTH // HEADS, "d_ff": INNER, "num_layers": 2}
    return T5ForConditionalGeneration(
        T5Config(**(sizes | {"num_heads": HEADS, "decoder_start_token_id": 0, "dropout_rate": 0.0} | options))
    )


def _bart(**options: Any) -> Any:
    from transformers import BartConfig, BartForConditionalGeneration

    sizes = _seq2seq_sizes() | {"max_position_embeddings": 64, "forced_eos_token_id": None}
    return BartForConditionalGeneration(BartConfig(**(sizes | options)))


def _whisper(**options: Any) -> Any:
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    sizes = _seq2seq_sizes() | {"num_mel_bins": 8, "max_source_positions": 10, "max_target_positions": 64}
    quiet = {"suppress_tokens": None, "begin_suppress_tokens": None}
    model = WhisperForConditionalGeneration(WhisperConfig(**(sizes | quiet | options)))
    model.generation_config.suppress_tokens = model.generation_config.begin_suppress_tokens = None
    return model


def _seq2seq_sizes() -> dict[str, Any]:
    sides = ("encoder", "decoder")
    return {
        "vocab_size": VOCAB,
        "d_model": WIDTH,
        **{f"{side}_layers": 2 for side in sides},
        **{f"{side}_attention_heads": HEADS for side in sides},
        **{f"{side}_ffn_dim": INNER for side in sides},
        **dict.fromkeys(("dropout", "attention_dropout", "activation_dropout"), 0.0),
        "pad_token_id": PAD,
        "bos_token_id": 2,
        "eos_token_id": END,
        "decoder_start_token_id": 2,
    }


def _decoder_sizes() -> dict[str, Any]:
    return {
        "vocab_size": VOCAB,
        "hidden_size": WIDTH,
        "intermediate_size": INNER,
        "num_hidden_layers": 2,
        "num_attention_heads": HEADS,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "pad_token_id": PAD,
        "bos_token_id": 2,
        "eos_token_id": END,
    }


def _llama(**options: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**(_decoder_sizes() | options)))


def _qwen3(**options: Any) -> Any:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    return Qwen3ForCausalLM(Qwen3Config(**(_decoder_sizes() | {"head_dim": 8} | options)))


def _gpt2(**options: Any) -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"vocab_size": VOCAB, "n_embd": WIDTH, "n_layer": 2, "n_head": HEADS, "n_inner": INNER, "n_positions": 64}
    tokens = {"pad_token_id": PAD, "bos_token_id": 2, "eos_token_id": END}
    return GPT2LMHeadModel(
        GPT2Config(**(sizes | tokens | {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0} | options))
    )


def _bert_sizes() -> dict[str, Any]:
    return {
        "vocab_size": VOCAB,
        "hidden_size": WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": HEADS,
        "intermediate_size": INNER,
        "max_position_embeddings": 64,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "pad_token_id": PAD,
    }


def _bert(**options: Any) -> Any:
    from transformers import BertConfig, BertForMaskedLM

    return BertForMaskedLM(BertConfig(**(_bert_sizes() | options)))


def _albert(**options: Any) -> Any:
    from transformers import AlbertConfig, AlbertForMaskedLM

    sizes = _bert_sizes() | {"embedding_size": 16, "num_hidden_layers": 3, "bos_token_id": 2, "eos_token_id": 3}
    return AlbertForMaskedLM(AlbertConfig(**(sizes | options)))


_PROJ = ("q_proj", "k_proj", "v_proj")
_GLU = ("gate_proj", "up_proj", "down_proj")
ARCHITECTURES = {
    a.name: a
    for a in (
        Architecture("t5", "seq2seq", ("q", "k", "v", "o"), ("wi", "wo"), _t5),
        Architecture("bart", "seq2seq", (*_PROJ, "out_proj"), ("fc1", "fc2"), _bart),
        Architecture("whisper", "seq2seq", (*_PROJ, "out_proj"), ("fc1", "fc2"), _whisper),
        Architecture("llama", "causal", (*_PROJ, "o_proj"), _GLU, _llama),
        Architecture("qwen3", "causal", (*_PROJ, "o_proj"), _GLU, _qwen3),
        Architecture("gpt2", "causal", ("c_attn", "attn.c_proj"), ("c_fc", "mlp.c_proj"), _gpt2),
        Architecture(
            "bert", "encoder", ("query", "key", "value"), ("attention.output.dense", "intermediate.dense"), _bert
        ),
        Architecture("albert", "encoder", ("query", "key", "value"), ("ffn", "ffn_output"), _albert),
    )
}
EVERY = tuple(ARCHITECTURES)


def model(name: str, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """A tiny model, always with the same weights; ``options`` go to its configuration."""
    torch.manual_seed(0)
    made = ARCHITECTURES[name].build(**options)
    generator = torch.Generator().manual_seed(7)
    for path, parameter in made.named_parameters():
        if parameter.dim() > 1:
            scale = 0.5 if re.search("embed|shared|wte|wpe|relative", path) else 0.8 * parameter.shape[-1] ** -0.5
            parameter.data = torch.randn(parameter.shape, generator=generator) * scale
    made.tie_weights()
    return made.to(dtype).eval()


# ---------------------------------------------------------------- experts


def features(module: nn.Module) -> tuple[int, int]:
    """Width of a module's input and output."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if isinstance(module, nn.Embedding):
        return module.num_embeddings, module.embedding_dim
    return int(module.nx), int(module.nf)  # GPT-2's Conv1D


def paths(model: nn.Module, endings: Iterable[str]) -> list[str]:
    """Paths of the modules whose path ends so."""
    ends = tuple(f".{ending}" for ending in endings)
    return [name for name, _ in model.named_modules() if f".{name}".endswith(ends)]


def expert(
    model: nn.Module,
    targets: Iterable[str],
    rank: int = 2,
    scale: float = 1.0,
    *,
    seed: int = 0,
    name: str = "expert",
    strength: float = 0.6,
    dtype: torch.dtype = torch.float32,
) -> lw.Expert:
    """An expert with random factors for every module whose path ends in one of ``targets``."""
    generator = torch.Generator().manual_seed(1000 + seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    factors = {}
    for path in paths(model, targets):
        module = model.get_submodule(path)
        wide, out = features(module)
        looked_up = isinstance(module, nn.Embedding)
        A = normal(rank, wide) * (1.0 if looked_up else wide**-0.5)
        B = normal(out, rank) * strength * (rank**-0.5)
        factors[path] = lw.LoraFactors(A.to(dtype), B.to(dtype), scale, looked_up)
    assert factors, f"nothing ends in {tuple(targets)}"
    return lw.Expert(name, factors)


def experts(model: nn.Module, name: str, dtype: torch.dtype = torch.float32) -> dict[str, lw.Expert]:
    """Three experts of different ranks, scales and targets for an architecture."""
    kind = ARCHITECTURES[name]
    return {
        "ant": expert(model, kind.targets, 2, 1.5, seed=1, dtype=dtype),
        "bee": expert(model, kind.attention, 3, 0.7, seed=2, dtype=dtype),
        "cat": expert(model, (kind.attention[0], kind.feed_forward[-1]), 1, 1 / 3, seed=3, dtype=dtype),
    }


def attached(
    name: str,
    policy: Any = None,
    dtype: torch.dtype = torch.float32,
    *,
    seed_dtype: torch.dtype | None = None,
    **options: Any,
) -> Mixture:
    """Three experts on a fresh tiny model; the experts have ``seed_dtype``, by default the model's dtype."""
    host = model(name, dtype, **options)
    return lw.attach(host, experts(host, name, seed_dtype or dtype), policy)


def randomize(mixture: Mixture, seed: int = 0, strength: float = 1.5) -> Mixture:
    """Give gates random parameters, so that their decisions differ from token to token."""
    generator = torch.Generator().manual_seed(500 + seed)
    # Evidence of length 1, or of length sqrt(size): either way, logits of about this strength.
    unit = getattr(mixture.policy, "normalization", "l2") == "l2"
    with torch.no_grad():
        for name, parameter in mixture.gate_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith("/e"):
                parameter.copy_(noise * strength * (1.0 if unit else (parameter[..., 0].numel()) ** -0.5))
            elif name.endswith("/W"):
                parameter.copy_(noise * strength * parameter.shape[-1] ** -0.5)
            elif name.endswith(("/columns", "/w", "/b", "/log_temperature")):
                parameter.add_(0.3 * noise)
            elif name.endswith("/bias"):
                parameter.add_(0.1 * noise)
            elif name.endswith("/standard.center"):
                parameter.copy_(0.3 * noise / (parameter.numel() ** 0.5 if unit else 1.0))
            elif name.endswith("/standard.spread"):
                parameter.copy_(torch.exp(0.3 * noise))
    return mixture


@torch.no_grad()
def alike(known: Mixture, mixture: Mixture) -> Mixture:
    """Give a mixture the gates of another, wherever either is."""
    for (_, parameter), (_, gate) in zip(known.gate_parameters(), mixture.gate_parameters(), strict=True):
        gate.copy_(parameter)
    return mixture


# ---------------------------------------------------------------- inputs


def batch(name: str, lengths: Sequence[int] = (7, 5, 3), side: str = "right", seed: int = 0) -> dict[str, Tensor]:
    """Inputs of an architecture: rows of these lengths, padded at this side; decoders read 4 tokens."""
    generator = torch.Generator().manual_seed(seed)
    kind = ARCHITECTURES[name].kind
    made: dict[str, Tensor] = {}
    if kind == "seq2seq":
        made["decoder_input_ids"] = torch.randint(4, VOCAB, (len(lengths), 4), generator=generator)
    if name == "whisper":
        return {"input_features": torch.randn(len(lengths), 8, 20, generator=generator)} | made
    widest = max(lengths)
    ids = torch.full((len(lengths), widest), PAD)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        place = slice(0, length) if side == "right" else slice(widest - length, widest)
        ids[row, place] = torch.randint(4, VOCAB, (length,), generator=generator)
        mask[row, place] = 1
    made |= {"input_ids": ids, "attention_mask": mask}
    if kind == "causal" and side == "left":
        made["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    return made


def row_of(inputs: Mapping[str, Tensor], row: int) -> dict[str, Tensor]:
    """One row of a batch by itself, without its padding."""
    alone = {key: value[row : row + 1] for key, value in inputs.items()}
    if "attention_mask" in alone:
        real = alone["attention_mask"][0].bool()
        for key in ("input_ids", "attention_mask", "position_ids"):
            if key in alone:
                alone[key] = alone[key][:, real]
    return alone


@torch.no_grad()
def logits(model: Any, inputs: Mapping[str, Tensor]) -> Tensor:
    """The model's logits."""
    cast = {key: value.to(model.dtype) if value.is_floating_point() else value for key, value in inputs.items()}
    out: Tensor = model(**cast).logits
    return out


def real_logits(out: Tensor, inputs: Mapping[str, Tensor], row: int) -> Tensor:
    """One row of the logits, at real tokens only."""
    if "decoder_input_ids" in inputs or "attention_mask" not in inputs:
        return out[row]
    return out[row][inputs["attention_mask"][row].bool()]


# ---------------------------------------------------------------- the slow way


class SlowLayer(nn.Module):
    """``W x + sum_i g_i s_i B_i A_i x``, one expert after the other."""

    def __init__(self, base: nn.Module, terms: Sequence[tuple[int, lw.LoraFactors]], weights: Callable[[], Tensor]):
        super().__init__()
        self.base, self.terms, self.weights = base, terms, weights

    @property
    def weight(self) -> Tensor:  # T5 asks for its dtype
        return self.base.weight

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x)
        g = self.weights()
        for number, f in self.terms:
            A, B = f.A.to(y.dtype), f.B.to(y.dtype)
            term = A.T[x] @ B.T if f.embedding else x @ A.T @ B.T
            y = y + g[..., number, None].to(y.dtype) * f.scale * term
        return y


def slow_mixture(model: nn.Module, experts: Mapping[str, lw.Expert], weights: Callable[[str], Tensor]) -> nn.Module:
    """Change ``model`` in place into the mixture, by explicit loops.

    Args:
        model: a bare model.
        experts: in order.
        weights: module path -> its ``g`` ``[rows or 1, tokens or 1, E]``, asked at every call of the module.
    """
    terms: dict[str, list[tuple[int, lw.LoraFactors]]] = {}
    for number, one in enumerate(experts.values()):
        for path, f in one.factors.items():
            terms.setdefault(path, []).append((number, f))
    for path, here in terms.items():
        parent, _, leaf = path.rpartition(".")
        slow = SlowLayer(model.get_submodule(path), here, partial(weights, path))
        setattr(model.get_submodule(parent), leaf, slow)
    return model


class Decisions:
    """The weights a mixture used in one call of its model: ``decisions(module path)``, call after call."""

    def __init__(self, mixture: Mixture, inputs: Mapping[str, Tensor]) -> None:
        self.site_of = {path: site for site in mixture.sites for path in site.plan.members}
        self.made: dict[str, list[Tensor]] = {site.name: [] for site in mixture.sites}
        self.asked: dict[str, int] = {}
        for site in mixture.sites:
            site.observers.append(self._note)
        try:
            self.logits = logits(mixture.model, inputs)
        finally:
            for site in mixture.sites:
                site.observers.remove(self._note)

    def _note(self, site: Any) -> None:
        self.made[site.name].append(site.current.dense)

    def __call__(self, path: str) -> Tensor:
        site = self.site_of[path]
        if site.constant is not None:
            return site.constant.view(1, 1, -1)
        self.asked[path] = self.asked.get(path, 0) + 1
        return self.made[site.name][self.asked[path] - 1]


# ---------------------------------------------------------------- text


def tokenizer(ends: bool = True) -> Any:
    """A token per character; with ``ends`` every text gets an end token, as T5's do."""
    from tokenizers import Tokenizer, decoders, models, processors
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "</s>", "<s>", "<unk>"]
    vocabulary = {token: n for n, token in enumerate([*special, *"abcdefghijklmnopqrstuvwxyz0123456789 \n:="])}
    assert len(vocabulary) <= VOCAB
    raw = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    raw.decoder = decoders.Fuse()
    raw.add_special_tokens(special)
    if ends:
        raw.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", END)])
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", eos_token="</s>", bos_token="<s>", unk_token="<unk>"
    )
