"""Mixtures on a device other than the CPU, as on a GPU: nothing stays behind, and nothing waits for a value."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.testing import assert_close
from transformers import StaticCache

import loraweave as lw
import methods
import tiny
from elsewhere import DEVICE, Elsewhere, MixedDevicesError, elsewhere
from loraweave.mixture import Mixture
from loraweave.training import objective

POLICIES = methods.METHODS | methods.PROMPT
QUICK = ("sum", "mole", "mole-topk", "mole-prompt", "cat")
NAMES = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in POLICIES]
CASES = [
    *(("llama", name) for name in QUICK),
    *(pytest.param("llama", name, marks=pytest.mark.slow) for name in POLICIES if name not in QUICK),
    *(pytest.param("t5", name, marks=pytest.mark.slow) for name in POLICIES),
    *(pytest.param(other, name, marks=pytest.mark.slow) for other in ("gpt2", "bert") for name in QUICK),
]


@pytest.fixture
def waits() -> Iterator[Counter[str]]:
    with elsewhere() as seen:
        yield seen.waits


def moved(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value.to(DEVICE) for key, value in inputs.items()}


def pair(architecture: str, policy: Any, memory: str | None = None) -> tuple[Mixture, Mixture]:
    """The same mixture on the CPU, and of a model that was elsewhere when it was attached."""
    host = tiny.model(architecture, torch.float64)
    experts = tiny.experts(host, architecture, torch.float64)
    try:
        here = tiny.randomize(lw.attach(tiny.model(architecture, torch.float64), experts, policy))
    except lw.LoraweaveError as error:
        pytest.skip(str(error))
    there = tiny.alike(here, lw.attach(host.to(DEVICE), experts, policy, expert_memory=memory))
    assert all(isinstance(tensor, Elsewhere) for tensor in there.model.state_dict().values())
    return here, there


def same(here: Mixture, there: Mixture, inputs: dict[str, Tensor]) -> None:
    assert_close(tiny.logits(there.model, moved(inputs)).cpu(), tiny.logits(here.model, inputs))


def gradients(mixture: Mixture, inputs: dict[str, Tensor]) -> list[Tensor]:
    mixture.model(**inputs).logits.sin().sum().backward()
    return [p.grad.cpu() for _, p in mixture.gate_parameters() if p.grad is not None]


@pytest.mark.parametrize(("architecture", "name"), CASES)
def test_it_says_the_same_elsewhere(architecture: str, name: str, waits: Counter[str]) -> None:
    here, there = pair(architecture, POLICIES[name])
    inputs = tiny.batch(architecture)
    same(here, there, inputs)
    with here.only("ant", "cat"), there.only("ant", "cat"):
        same(here, there, inputs)
    if here.policy.mix == "deltas":
        rows = [{"ant": 1.0}, {"bee": 0.5, "cat": -1.0}, {}]
        with here.rows(rows), there.rows(rows):
            same(here, there, inputs)
    if any(p.requires_grad for _, p in here.gate_parameters()):
        learned = gradients(here, inputs)
        assert learned
        assert_close(gradients(there, moved(inputs)), learned)
    for mixture in (here, there):
        mixture.policy = lw.Sum(0.5)
    same(here, there, inputs)


@pytest.mark.parametrize("name", NAMES)
def test_decisions_wait_for_nothing(name: str, waits: Counter[str]) -> None:
    _, there = pair("llama", POLICIES[name])
    inputs = moved(tiny.batch("llama"))
    tiny.logits(there.model, inputs)

    def counted(act: Callable[[], object]) -> Counter[str]:
        waits.clear()
        act()
        return Counter(waits)

    @torch.no_grad()
    def steps() -> None:
        cached = name in (*methods.CAUSAL, *methods.PROMPT)
        cache = there.model(**inputs, use_cache=cached).past_key_values
        if cached:
            there.model(input_ids=inputs["input_ids"][:, :1], past_key_values=cache, use_cache=True)

    def learn(balanced: bool) -> None:
        loss = there.model(**inputs, labels=inputs["input_ids"], use_cache=False).loss
        (loss + objective.balance(there.sites) if balanced else loss).backward()

    learns = any(p.requires_grad for _, p in there.gate_parameters())
    mixed = counted(steps), counted(partial(learn, isinstance(there.policy, lw.MoLE))) if learns else None
    there.detach()
    assert mixed == (counted(steps), counted(partial(learn, False)) if learns else None)


@pytest.mark.parametrize("name", ["sum", "mole-topk", "mole-prompt"])
def test_it_generates_the_same_elsewhere(name: str, waits: Counter[str]) -> None:
    here, there = pair("llama", POLICIES[name])
    inputs = tiny.batch("llama", side="left")
    inputs.pop("position_ids")
    expected = here.model.generate(**inputs, max_new_tokens=5, do_sample=False)
    assert torch.equal(there.model.generate(**moved(inputs), max_new_tokens=5, do_sample=False).cpu(), expected)


@pytest.mark.parametrize("name", ["linear-blocks", "mole", "arrow"])
def test_a_mixture_may_be_moved_after_it_was_attached(name: str, waits: Counter[str]) -> None:
    here, there = (tiny.randomize(tiny.attached("llama", POLICIES[name], torch.float64)) for _ in range(2))
    inputs = tiny.batch("llama")
    tiny.logits(there.model, inputs)
    there.model.to(DEVICE)
    same(here, there, inputs)
    there.model.to("cpu")
    assert torch.equal(tiny.logits(there.model, inputs), tiny.logits(here.model, inputs))


@pytest.mark.parametrize("name", ["mole-prompt", "mole-preselect"])
def test_the_length_of_a_static_cache_is_read_once_a_step(name: str, waits: Counter[str]) -> None:
    _, there = pair("llama", POLICIES[name])
    ids = torch.full((1, 3), 5, device=DEVICE)
    cache = StaticCache(there.model.config, max_cache_len=8)
    with torch.no_grad():
        there.model(input_ids=ids, past_key_values=cache)
        waits.clear()
        there.model(input_ids=ids[:, :1], past_key_values=cache)
        assert waits.total() == 1
        there.detach()
        waits.clear()
        there.model(input_ids=ids[:, :1], past_key_values=cache)
        assert not waits


@pytest.mark.parametrize(("dtype", "gate"), [(torch.float32, 7), (torch.bfloat16, 9)])
def test_kernels_of_a_decoding_step(dtype: torch.dtype, gate: int) -> None:
    """Each costs a GPU's processor as long to start as the next, and of one row that is most of the time."""
    targets = tiny.ARCHITECTURES["llama"].targets
    experts = {name: tiny.expert(tiny.model("llama"), targets, 2, 0.5, seed=n) for n, name in enumerate(tiny.NAMES)}
    modules = len(experts["ant"].factors)

    def started(policy: Any) -> int:
        with elsewhere() as seen, torch.no_grad():
            host = tiny.model("llama", dtype).to(DEVICE)
            if policy == "peft":
                config = LoraConfig(r=2, target_modules=list(targets))
                host = get_peft_model(host, config, autocast_adapter_dtype=False).to(DEVICE)
            elif policy is not None:
                lw.attach(host, experts, policy)
            ids = torch.full((1, 1), 5, device=DEVICE)
            cache = host(input_ids=ids, use_cache=True).past_key_values
            host(input_ids=ids, past_key_values=cache, use_cache=True)
            seen.kernels.clear()
            host(input_ids=ids, past_key_values=cache, use_cache=True)
            return seen.kernels.total()

    bare = started(None)
    assert started("peft") - bare == 4 * modules  # with one adapter
    assert started(lw.Sum(0.5)) - bare == 3 * modules
    assert started(lw.MoLE(granularity="block")) - bare == 3 * modules + gate * 2
    assert started(lw.MoLE(granularity="matrix", pooling="token")) - bare == (3 + gate) * modules
    assert started(lw.MoLE(granularity="block", pooling="prompt")) - bare == 3 * modules


@pytest.mark.parametrize("name", ["mole", pytest.param("cat-block", marks=pytest.mark.slow)])
def test_it_is_saved_from_and_loaded_to_another_device(name: str, waits: Counter[str], tmp_path: Path) -> None:
    here, there = pair("llama", POLICIES[name])
    there.save_pretrained(tmp_path / "mixture", copy_experts=True)
    for model in (tiny.model("llama", torch.float64), tiny.model("llama", torch.float64).to(DEVICE)):
        loaded = lw.load(tmp_path / "mixture", model)
        assert {parameter.device for _, parameter in loaded.gate_parameters()} == {model.device}
        inputs = {key: value.to(model.device) for key, value in tiny.batch("llama").items()}
        expected = tiny.logits(here.model, tiny.batch("llama"))
        assert_close(tiny.logits(model, inputs).cpu(), expected, atol=1e-5, rtol=1e-5)


def test_it_folds_into_weights_elsewhere(waits: Counter[str]) -> None:
    here, there = pair("llama", lw.Sum(0.5, {"ant": -1.0, "cat": 0.0}))
    bare = tiny.logits(there.model, moved(tiny.batch("llama")))
    there.fold()
    assert all(isinstance(tensor, Elsewhere) for tensor in there.model.state_dict().values())
    same(here, there, tiny.batch("llama"))
    there.unfold()
    assert torch.equal(tiny.logits(there.model, moved(tiny.batch("llama"))).cpu(), bare.cpu())


@pytest.mark.parametrize("name", NAMES)
def test_experts_are_fetched_from_the_cpu(name: str, waits: Counter[str]) -> None:
    here, there = pair("llama", POLICIES[name], memory="60KB")  # not for all modules at once
    inputs = tiny.batch("llama")
    same(here, there, inputs)
    with here.only("ant"), there.only("ant"):
        same(here, there, inputs)
    memory = next(iter(there.layers.values())).bank.memory
    assert memory.misses > len(there.layers)
    assert memory.held <= memory.budget


def test_the_device_refuses_what_a_gpu_refuses(waits: Counter[str]) -> None:
    x = torch.ones(2, 3, device=DEVICE)
    for mixed in (
        lambda: x + torch.ones(2, 3),
        lambda: torch.ones(3)[torch.tensor([1], device=DEVICE)],
        lambda: x.add_(torch.ones(3)),
        lambda: torch.stack([x.sum(), torch.tensor(1.0)]),
        lambda: torch.randn(2, device=DEVICE, generator=torch.Generator()),
    ):
        with pytest.raises(MixedDevicesError):
            mixed()
    assert not waits
    assert float((x * 2 + torch.tensor(1.0)).sum()) == 18
    assert x[torch.tensor([True, False]).to(DEVICE)].shape == (1, 3)
    assert torch.equal(x.cpu(), torch.ones(2, 3))
    assert sum(waits.values()) == 3
