"""Standard scores: what training measures, against means and deviations worked out from recorded evidence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.testing import assert_close

import loraweave as lw
import tiny
from loraweave.policies.mole_standard import FLOOR, Standard
from loraweave.training import objective
from loraweave.training.standards import MEASURED_BATCHES


def test_mean_and_spread_of_vectors_that_the_mask_keeps() -> None:
    standard = Standard(2)
    standard.start()
    v = torch.tensor([[[1.0, 10.0], [3.0, 10.0], [99.0, 99.0]]])
    standard.note(v, torch.tensor([[1, 1, 0]]))
    standard.finish(standard.sums())
    assert_close(standard.center.data, torch.tensor([2.0, 10.0]))
    # The second coordinate never varies: it gets a tenth of the root mean square of (1, 0).
    assert_close(standard.spread.data, torch.tensor([1.0, FLOOR * 0.5**0.5]))
    assert standard.measured
    assert not standard.measuring


@pytest.mark.parametrize("vectors", [torch.zeros(0, 1, 2), torch.ones(1, 1, 2), torch.ones(4, 1, 2)])
def test_what_does_not_vary_is_left_as_it_is(vectors: Tensor) -> None:
    standard = Standard(2)
    standard.start()
    standard.note(vectors, None)
    standard.finish(standard.sums())
    assert not standard.measured
    assert not standard.measuring


DATA = [{"input": f"{a} and {b}", "target": b} for a in "abcd" for b in ("xy", "zz", "k9")]


def train(mixture: lw.Mixture, data: list[dict[str, str]] = DATA) -> None:
    lw.train(mixture, data, steps=1, batch_size=3, tokenizer=tiny.tokenizer(True), progress=False, use_cpu=True)


POLICIES = {
    "hidden": lw.MoLE(pooling="mean"),
    "hidden, layer": lw.MoLE(pooling="mean", normalization="layer"),
    "outputs": lw.MoLE(pooling="mean", evidence="outputs", normalization="l2"),
    "outputs, token": lw.MoLE(pooling="token", evidence="outputs"),
    "token": lw.MoLE(pooling="token"),
}


@pytest.mark.parametrize("name", POLICIES)
def test_training_measures_what_the_gates_read(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mixture = tiny.attached("t5", POLICIES[name])
    seen: dict[int, list[Tensor]] = {}
    note = Standard.note

    def watch(self: Standard, v: Tensor, mask: Tensor | None) -> None:
        seen.setdefault(id(self), []).append(v.flatten(0, 1) if mask is None else v[mask.bool()])
        note(self, v, mask)

    monkeypatch.setattr(Standard, "note", watch)
    train(mixture)
    gates = [gate for gate in mixture.gates.values() if gate.standard is not None]
    assert gates
    for gate in gates:
        vectors = torch.cat(seen[id(gate.standard)]).double()
        assert len(seen[id(gate.standard)]) == min(MEASURED_BATCHES, -(-len(DATA) // 3))
        spread = vectors.std(0, correction=0)
        floor = FLOOR * spread.square().mean().sqrt()
        assert_close(gate.standard.center.double(), vectors.mean(0), atol=1e-6, rtol=1e-5)
        assert_close(gate.standard.spread.double(), spread.clamp(min=floor), atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("activation", ["softmax", "sigmoid", "linear"])
def test_one_expert_can_be_preferred_whatever_the_input(activation: Any) -> None:
    """Standard scores sum to zero over the data, and so do logits linear in them: the bias has to tell."""
    mixture = tiny.attached("t5", lw.MoLE(activation=activation))
    train(mixture)
    inputs = tiny.batch("t5")
    optimizer = torch.optim.Adam([p for _, p in mixture.gate_parameters() if p.requires_grad], lr=0.02)
    for _ in range(60):
        mixture.model(**inputs)
        shares = torch.stack([objective.site_shares(site) for site in mixture.sites])
        loss = -shares[:, 1].log().mean()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    assert shares[:, 1].min() > 0.8


def test_measured_once_and_saved(tmp_path: Path) -> None:
    mixture = tiny.attached("t5", lw.MoLE())
    train(mixture)
    before = {name: p.clone() for name, p in mixture.gate_parameters() if "/standard." in name}
    assert any(bool((p != 1).any()) for name, p in before.items() if name.endswith("spread"))
    mixture.save_pretrained(tmp_path / "saved")
    train(mixture, DATA[:2])
    after = dict(mixture.gate_parameters())
    for name, p in before.items():
        assert torch.equal(after[name], p), name
    saved = dict(load_file(tmp_path / "saved" / "gates.safetensors"))
    assert all(torch.equal(saved[name], p) for name, p in before.items())


def test_not_in_the_papers_form() -> None:
    for policy in (lw.MoLE.paper(), lw.MoLE(standardize=False), lw.MoLE(pooling="flatten", max_length=40)):
        mixture = tiny.attached("t5", policy)
        assert not any("standard" in name for name, _ in mixture.gate_parameters())


def test_packed_parameters_follow_every_change() -> None:
    mixture = tiny.randomize(tiny.attached("llama", lw.MoLE(pooling="token")))
    inputs = tiny.batch("llama")

    def logits() -> Tensor:
        with torch.no_grad():
            return tiny.logits(mixture.model, inputs)

    first = logits()
    assert torch.equal(logits(), first)
    gate: Any = next(iter(mixture.gates.values()))
    with torch.no_grad():
        gate.e.mul_(-1)
    changed = logits()
    assert not torch.equal(changed, first)
    gate.e.data.mul_(-1)  # unseen by version counters, as some optimizers write
    mixture.model.train()
    mixture.model.eval()
    assert torch.equal(logits(), first)


def test_a_failure_while_measuring_leaves_nothing_behind() -> None:
    mixture = tiny.attached("t5", lw.MoLE())
    mixture.model.register_forward_hook(lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        train(mixture)
    gates: list[Any] = [gate for gate in mixture.gates.values() if gate.standard is not None]
    assert gates
    assert not any(gate.standard.measuring or gate.standard.measured for gate in gates)
