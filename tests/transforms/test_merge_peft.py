"""Merges beside peft's ``add_weighted_adapter``, and merged files in plain peft."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import loraweave as lw
import tiny
from loraweave.transforms import registry

WEIGHTS = {"ant": 0.7, "bee": -1.2, "cat": 0.5}
LIKE = {"ant": (3, 6, False), "bee": (3, 2, True), "cat": (3, 3, False)}
UNLIKE = {"ant": (2, 6, False), "bee": (3, 2, True), "cat": (1, 3, False)}
TARGETS = {"ant": ["q_proj", "down_proj"], "bee": ["q_proj"], "cat": ["q_proj", "v_proj"]}


def in_peft(made: dict[str, tuple[int, int, bool]], folder: Path) -> tuple[Any, dict[str, Path]]:
    """A peft model with three adapters of random factors (rank, alpha, rsLoRA), and their folders."""
    torch.manual_seed(0)
    model: Any = None
    for name, (rank, alpha, stable) in made.items():
        config = peft.LoraConfig(
            r=rank, lora_alpha=alpha, use_rslora=stable, target_modules=TARGETS[name], init_lora_weights=False
        )
        if model is None:
            model = peft.get_peft_model(tiny.model("llama"), config, adapter_name=name)
        else:
            model.add_adapter(name, config)
    model.save_pretrained(folder)
    return model.eval(), {name: folder / name for name in made}


def merged_in_peft(model: Any, weights: dict[str, float], kind: str, **options: Any) -> dict[str, Tensor]:
    """Module -> dense delta of peft's merge. The first adapter's rsLoRA setting would pass to the result, and it has
    none."""
    model.add_weighted_adapter(list(weights), list(weights.values()), "both", combination_type=kind, **options)
    deltas = {}
    for path, module in model.base_model.model.named_modules():
        if hasattr(module, "lora_A") and "both" in module.lora_A:
            deltas[path] = module.get_delta_weight("both").detach()
    return deltas


CASES = {
    "cat": ("concat", {}, UNLIKE, WEIGHTS, {}),
    "svd": ("svd", {}, UNLIKE, WEIGHTS, {}),
    "svd-rank": ("svd", {"rank": 2}, UNLIKE, WEIGHTS, {"svd_rank": 2}),
    "magnitude_prune_svd": (
        "magnitude_prune",
        {"density": 0.3, "rank": 4},
        UNLIKE,
        WEIGHTS,
        {"density": 0.3, "svd_rank": 4},
    ),
    "ties_svd": (
        "ties",
        {"density": 0.3, "rank": 4},
        UNLIKE,
        dict.fromkeys(WEIGHTS, 0.8),
        {"density": 0.3, "svd_rank": 4},
    ),
    "magnitude_prune": ("magnitude_prune", {"density": 0.3, "space": "factors"}, LIKE, WEIGHTS, {"density": 0.3}),
    "linear": ("linear", {"space": "factors"}, LIKE, {n: abs(w) for n, w in WEIGHTS.items()}, {}),
}


@pytest.mark.parametrize("kind", CASES)
def test_peft_merges_the_same(kind: str, tmp_path: Path) -> None:
    method, options, made, weights, theirs = CASES[kind]
    model, folders = in_peft(made, tmp_path)
    expected = merged_in_peft(model, weights, kind.removesuffix("-rank"), **theirs)
    if kind == "linear":  # peft takes the square root of each weight; LoRAHub's w on A and on B makes it w squared
        weights = {name: weight**0.5 for name, weight in weights.items()}
    merged = lw.merge(folders, method, weights=weights, **options)
    assert merged.factors.keys() == expected.keys()
    for path, f in merged.factors.items():
        assert_close(f.scale * f.B @ f.A, expected[path], atol=1e-5, rtol=1e-4)


def test_peft_ties_in_factors(tmp_path: Path) -> None:
    """Signs are elected alike where weight times scale is the same for all."""
    made = dict.fromkeys(LIKE, (3, 6, False))
    model, folders = in_peft(made, tmp_path)
    expected = merged_in_peft(model, dict.fromkeys(made, 0.8), "ties", density=0.4)
    merged = lw.merge(folders, "ties", weights=0.8, density=0.4, space="factors")
    for path, f in merged.factors.items():
        assert_close(f.B @ f.A, expected[path], atol=1e-5, rtol=1e-4)


def test_pefts_linear_is_not_the_sum(tmp_path: Path) -> None:
    model, folders = in_peft(LIKE, tmp_path)
    crossed = merged_in_peft(model, {"ant": 1.0, "bee": 1.0}, "linear")
    exact = lw.merge({name: folders[name] for name in ("ant", "bee")}, "linear")
    path = "model.layers.0.self_attn.q_proj"
    difference = (exact.factors[path].B @ exact.factors[path].A - crossed[path]).norm()
    assert difference > 0.3 * crossed[path].norm()


# ---------------------------------------------------------------- attached and written


def logits(model: Any) -> Tensor:
    return tiny.logits(model, tiny.batch("llama"))


def in_plain_peft(folder: Path) -> Tensor:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(missing|unexpected|did not match).*")
        return logits(peft.PeftModel.from_pretrained(tiny.model("llama"), folder).eval())


@pytest.mark.parametrize("method", ["concat", "linear", "svd", "knots", "core_space"])
def test_an_exact_merge_is_the_mixture(method: str, tmp_path: Path) -> None:
    host = tiny.model("llama")
    experts = tiny.experts(host, "llama")
    options = {"svd": {"rank": 6}, "knots": {"then": "linear"}, "core_space": {"then": "linear"}}.get(method, {})
    merged = lw.merge(experts, method, weights=WEIGHTS, **options)
    bare = logits(host)
    mixture = lw.attach(host, experts, lw.Sum(weights=WEIGHTS))
    expected = logits(host)
    assert not torch.allclose(expected, bare, atol=1e-2)
    mixture.detach()
    lw.attach(host, {"merged": merged}, lw.Sum())
    assert_close(logits(host), expected, atol=2e-4, rtol=1e-4)
    assert_close(in_plain_peft(lw.write_expert(merged, tmp_path / "merged")), expected, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("method", registry.names())
def test_every_merge_is_an_ordinary_lora(method: str, tmp_path: Path) -> None:
    host = tiny.model("llama")
    merged = lw.merge(tiny.experts(host, "llama"), method)
    lw.write_expert(merged, tmp_path / "merged")
    assert lw.inspect(tmp_path / "merged").mixable
    read = lw.read_expert(tmp_path / "merged")
    assert all(torch.equal(f.B, merged.factors[path].B) for path, f in read.factors.items())
    lw.attach(host, {"merged": merged}, lw.Sum())
    assert_close(in_plain_peft(tmp_path / "merged"), logits(host), atol=2e-4, rtol=1e-4)


def test_embeddings_and_conv1d() -> None:
    host, inputs = tiny.model("gpt2"), tiny.batch("gpt2")
    targets = [("wte", "c_attn"), ("wte", "mlp.c_proj"), ("c_fc", "wpe")]
    experts = {f"e{n}": tiny.expert(host, names, 1 + n, 0.3 + n, seed=n) for n, names in enumerate(targets)}
    mixture = lw.attach(host, experts, lw.Sum(0.7))
    expected = tiny.logits(host, inputs)
    mixture.detach()
    for method, options in (("concat", {}), ("core_space", {"then": "linear"}), ("knots", {"then": "linear"})):
        merged = lw.merge(experts, method, weights=0.7, **options)
        assert [path for path, f in merged.factors.items() if f.embedding] == ["transformer.wte", "transformer.wpe"]
        mixture = lw.attach(host, {"merged": merged}, lw.Sum())
        assert_close(tiny.logits(host, inputs), expected, atol=2e-4, rtol=1e-4)
        mixture.detach()
