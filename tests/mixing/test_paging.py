"""Experts that are fetched when they are used: the same answers, never more memory than stated."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import toy
from torch import Tensor
from torch.testing import assert_close

import loraweave as lw
import tiny
from loraweave.errors import LoraweaveError
from loraweave.experts.paging import ExpertMemory, PagedBank
from loraweave.experts.writer import write_expert
from loraweave.mixture import Mixture
from methods import METHODS

EXACT = {"atol": 1e-12, "rtol": 1e-12}
BITS = {"atol": 0, "rtol": 0}


def banks(mixture: Mixture) -> list[PagedBank]:
    found = [layer.bank for layer in mixture.layers.values()]
    assert all(isinstance(bank, PagedBank) for bank in found)
    return found  # type: ignore[return-value]


def smallest(architecture: str, dtype: torch.dtype = torch.float64) -> int:
    """The least with which all experts can work at once at every module, one module at a time."""
    host = tiny.model(architecture, dtype)
    mixture = lw.attach(host, tiny.experts(host, architecture, dtype), lw.Sum(), expert_memory="1GB")
    return max(2 * sum(bank.size(number) for number in range(3)) for bank in banks(mixture))


@pytest.fixture(scope="module")
def pairs() -> Any:
    """Architecture -> a mixture whose experts stand beside the model, and one that fetches them module by module."""
    made: dict[str, tuple[Mixture, Mixture]] = {}

    def pair(architecture: str) -> tuple[Mixture, Mixture]:
        if architecture not in made:
            host = tiny.model(architecture, torch.float64)
            paged = lw.attach(
                host, tiny.experts(host, architecture, torch.float64), lw.Sum(), expert_memory=smallest(architecture)
            )
            made[architecture] = tiny.attached(architecture, lw.Sum(), torch.float64), paged
        return made[architecture]

    return pair


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("architecture", ["t5", "llama"])
def test_same_as_without(pairs: Any, architecture: str, method: str) -> None:
    standing, paged = pairs(architecture)
    inputs = tiny.batch(architecture)
    for mixture in (standing, paged):
        mixture.policy = METHODS[method]
        tiny.randomize(mixture)
    for _ in range(2):
        assert_close(tiny.logits(paged.model, inputs), tiny.logits(standing.model, inputs), **EXACT)
        assert 0 < paged.expert_memory.held <= paged.expert_memory.budget
    with standing.without("bee"), paged.without("bee"):
        assert_close(tiny.logits(paged.model, inputs), tiny.logits(standing.model, inputs), **EXACT)


@pytest.mark.parametrize("architecture", ["gpt2", "bart"])
def test_embeddings_and_transposed_layers(pairs: Any, architecture: str) -> None:
    test_same_as_without(pairs, architecture, "mole-topk-mean")
    test_same_as_without(pairs, architecture, "sum")


def test_rows_generation_fold_and_export(pairs: Any, tmp_path: Path) -> None:
    standing, paged = pairs("llama")
    prompt = tiny.batch("llama", (6, 4), side="left")
    asked = {key: prompt[key] for key in ("input_ids", "attention_mask")}

    def answers(mixture: Mixture) -> list[Tensor]:
        mixture.policy = lw.MoLE(activation="topk", k=2, pooling="prompt")
        tiny.randomize(mixture)
        call = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": tiny.PAD}
        made = [mixture.model.generate(**asked, **call)]
        for rows in ([{"ant": 2.0}, {"cat": -2.0, "bee": 1.0}], [None, {"bee": 0.5}], [None, None]):
            with mixture.rows(rows):
                made.append(tiny.logits(mixture.model, prompt))
        mixture.policy = lw.Linear({"ant": 3.0, "cat": 1.0})
        mixture.fold()
        made.append(tiny.logits(mixture.model, prompt))
        mixture.unfold()
        merged = mixture.merged_expert()
        return made + [f.B @ f.A for f in merged.factors.values()]

    for got, expected in zip(answers(paged), answers(standing), strict=True):
        assert_close(got, expected, **EXACT)
    assert len(paged.merged_expert().factors) == len(standing.layers)


def test_gradients_and_checkpointing(pairs: Any) -> None:
    found = []
    for mixture in pairs("llama"):
        mixture.policy = lw.MoLE(activation="topk", k=2, pooling="mean")
        tiny.randomize(mixture)
        with torch.inference_mode():
            mixture.model(**tiny.batch("llama"))
        mixture.model.train()
        for checkpointed in (False, True):
            if checkpointed:
                mixture.model.gradient_checkpointing_enable({"use_reentrant": False})
            mixture.model.zero_grad(set_to_none=True)
            (mixture.model(**tiny.batch("llama"), use_cache=False).logits ** 2).mean().backward()
            found.append([p.grad for _, p in mixture.gate_parameters() if p.grad is not None])
        mixture.model.gradient_checkpointing_disable()
        mixture.model.eval()
    assert found[0]
    for other in found[1:]:
        for got, expected in zip(other, found[0], strict=True):
            assert_close(got, expected, **EXACT)


def test_who_was_used_longest_ago_leaves() -> None:
    """By hand: three experts of rank 1 on one 6 x 5 module, 11 numbers of 8 bytes each, and room for two of them."""
    experts = toy.experts({"up": (1, 1, 1)}, (1.0, 1.0, 1.0))
    mixture = lw.attach(toy.Toy().double(), experts, lw.Sum(), expert_memory=2 * 88)
    memory, ids = mixture.expert_memory, torch.tensor([[1, 2]])
    assert memory is not None
    seen = []
    for name in ("e0", "e0", "e1", "e0", "e2", "e0", "e1"):
        with mixture.only(name):
            mixture.model(ids)
        seen.append((memory.hits, memory.misses, memory.held))
    assert seen == [(0, 1, 88), (1, 1, 88), (1, 2, 176), (2, 2, 176), (2, 3, 176), (3, 3, 176), (3, 4, 176)]
    with mixture.only("e0"), pytest.raises(LoraweaveError, match="keep at least one"), mixture.only("e1"):
        pass
    with pytest.raises(LoraweaveError, match=r"3 experts at once at 'up' take 528 bytes, but the budget is 176"):
        mixture.model(ids)
    assert (memory.hits, memory.misses, memory.held) == seen[-1]


def test_budgets() -> None:
    experts = toy.experts({"up": (1, 2)}, (1.0, 1.0))
    for budget in ("2 apples", "", -1, 0, True, 1.5, "0GB"):
        with pytest.raises(LoraweaveError, match="expert_memory: expected"):
            lw.attach(toy.Toy(), experts, lw.Sum(), expert_memory=budget)  # type: ignore[arg-type]
    with pytest.raises(LoraweaveError, match=r"one expert at 'up' take 88 bytes, but the budget is 87"):
        lw.attach(toy.Toy(), experts, lw.Sum(), expert_memory=87)
    model = toy.Toy()
    assert lw.attach(model, experts, lw.Sum(), expert_memory="1KB").expert_memory.budget == 1000  # type: ignore[union-attr]
    assert lw.attach(toy.Toy(), experts, lw.Sum()).expert_memory is None


def test_experts_stay_in_their_files(tmp_path: Path) -> None:
    """On a processor nothing is copied until it is used, and loading a saved mixture takes a budget, too."""
    host = tiny.model("llama")
    folders = {name: write_expert(one, tmp_path / name) for name, one in tiny.experts(host, "llama").items()}
    mixture = lw.attach(host, folders, lw.MoLE(evidence="hidden"), expert_memory="1MB")
    assert mixture.expert_memory is not None
    assert mixture.expert_memory.held == 0
    per_file = {f.A.untyped_storage().data_ptr() for bank in banks(mixture) for f in bank._home if f is not None}
    assert len(per_file) == 3
    expected = tiny.logits(tiny.randomize(mixture).model, tiny.batch("llama"))
    saved = mixture.save_pretrained(tmp_path / "saved", copy_experts=True)
    loaded = lw.load(saved, tiny.model("llama"), expert_memory="64KB")
    assert_close(tiny.logits(loaded.model, tiny.batch("llama")), expected, **BITS)
    assert loaded.expert_memory is not None
    assert loaded.expert_memory.budget == 64_000


def test_casting_copying_and_detaching(pairs: Any) -> None:
    standing, paged = (copy.deepcopy(mixture) for mixture in pairs("llama"))
    inputs = tiny.batch("llama")
    for mixture in (standing, paged):
        mixture.policy = lw.Linear()
        mixture.model.float()
    assert_close(tiny.logits(paged.model, inputs), tiny.logits(standing.model, inputs), atol=1e-6, rtol=1e-6)
    memory = paged.expert_memory
    assert memory is not None
    assert {page.dtype for pages in memory._pages.values() for page in pages} == {torch.float32}
    assert memory is not pairs("llama")[1].expert_memory
    paged.detach()
    assert_close(tiny.logits(paged.model, inputs), tiny.logits(standing.detach(), inputs), **BITS)


def test_threads(pairs: Any) -> None:
    _, paged = pairs("llama")
    paged.policy = lw.MoLE(activation="top1", pooling="token")
    tiny.randomize(paged)
    some = [tiny.batch("llama", seed=seed) for seed in range(4)]
    expected = [tiny.logits(paged.model, inputs) for inputs in some]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            for got, wanted in zip(pool.map(lambda each: tiny.logits(paged.model, each), some), expected, strict=True):
                assert_close(got, wanted, **BITS)
    memory: ExpertMemory = paged.expert_memory  # type: ignore[assignment]
    assert memory.held == sum(bank.size(number) for bank, number in memory._pages) <= memory.budget


@pytest.mark.slow
def test_compiled(pairs: Any) -> None:
    _, paged = pairs("llama")
    paged.policy = lw.MoLE(activation="topk", k=1, pooling="mean")
    tiny.randomize(paged)
    some = [tiny.batch("llama", seed=seed) for seed in range(3)]
    expected = [tiny.logits(paged.model, inputs) for inputs in some]
    torch._dynamo.reset()
    compiled, graphs = torch.compile(paged.model, backend="eager"), []
    for inputs, wanted in zip(some, expected, strict=True):
        with torch.no_grad():
            assert_close(compiled(**inputs).logits, wanted, **EXACT)
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    torch._dynamo.reset()
    assert len(set(graphs)) == 1, "other experts are compiled anew"
