"""Gates in two stages: the first gate chooses each row's experts, and the gates behind it decide among these."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import loraweave as lw
import tiny
from loraweave.mixing.site import Site
from loraweave.mixture import Mixture

NAMES = tuple(f"e{i}" for i in range(6))
OPTIONS: dict[str, dict[str, Any]] = {
    "token": {},
    "prompt": {"pooling": "prompt"},
    "outputs": {"evidence": "outputs", "gate_form": "full", "granularity": "layer"},
    "matrix": {"granularity": "matrix"},
    "network": {"granularity": "network", "normalization": "l2"},
    "sigmoid": {"activation": "sigmoid"},
    "linear": {"activation": "linear"},
    "topk": {"activation": "topk", "k": 2},
    "topk prompt": {"activation": "topk", "k": 2, "pooling": "prompt"},
    "top1": {"activation": "top1"},
    "scale": {"scale": 2.5},
}
BEHIND_ENCODER = ("prompt", "token", "network", "topk", "sigmoid")  # what needs none of a decoder's own tokens


def experts(host: Any, architecture: str) -> dict[str, lw.Expert]:
    """Six experts of different ranks; some do not touch some modules."""
    kind = tiny.ARCHITECTURES[architecture]
    targets = (kind.targets, kind.attention)
    return {n: tiny.expert(host, targets[i % 2], 1 + i % 3, 0.3 + 0.1 * i, seed=i) for i, n in enumerate(NAMES)}


@pytest.fixture(scope="module")
def hosts() -> dict[str, Mixture]:
    made = {}
    for architecture in ("llama", "gpt2", "t5", "bart", "bert"):
        host = tiny.model(architecture, torch.float64)
        made[architecture] = lw.attach(host, experts(host, architecture), lw.Sum())
    return made


def best(mixture: Mixture, stream: str, inputs: dict[str, Tensor], k: int, kept: set[int] | None = None) -> list[int]:
    """Eq. 9 and 10 by hand for one row: what the first gate of a stream says of the mean of its tokens."""
    site = next(site for site in mixture.sites if site.plan.stream == stream)
    seen: list[Tensor] = []
    hook = site.leader.base.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
    tiny.logits(mixture.model, inputs)
    hook.remove()
    gate: Any = site.gate
    x = seen[0][0].mean(0)
    if mixture.policy.evidence == "outputs":  # type: ignore[attr-defined]
        factors = [site.leader.bank.factors(i) for i in range(len(NAMES))]
        x = torch.cat(
            [torch.zeros(gate.e.shape[1]).double() if f is None else f.scale * f.B @ (f.A @ x) for f in factors]
        )
    v = x / (x.square().sum() if gate.policy.normalization == "l2" else x.square().mean()).sqrt()
    if gate.standard is not None:
        v = (v - gate.standard.center) / gate.standard.spread
    logits = v.double() @ gate.e.detach().double().reshape(-1, len(NAMES))
    if gate.bias is not None:
        logits = logits + gate.bias.detach() * len(gate.standard.center) ** 0.5
    order = [int(i) for i in logits.argsort(descending=True) if kept is None or int(i) in kept]
    return order[:k]


def mask_by_hand(mixture: Mixture, chosen: dict[str, list[int]]) -> None:
    for site in mixture.sites:
        kept = chosen.get(site.plan.stream)
        site.gate.keep(None if kept is None else torch.tensor([i in kept for i in range(len(NAMES))]))  # type: ignore[union-attr, operator]
        site.clear()


def choices(mixture: Mixture, inputs: dict[str, Tensor], k: int, kept: set[int] | None = None) -> dict[str, list[int]]:
    """Of one row: stream -> its experts; a decoder's depend on what the encoder did with its own."""
    chosen: dict[str, list[int]] = {}
    for stream in dict.fromkeys(site.plan.stream for site in mixture.sites):
        mask_by_hand(mixture, chosen)
        chosen[stream] = best(mixture, stream, inputs, k, kept)
    mask_by_hand(mixture, {})
    return chosen


def both(mixture: Mixture, options: dict[str, Any], k: int | None) -> None:
    """Set the policy with and without choosing first, always with the same gates, which tell rows apart."""
    mixture.policy = lw.MoLE(preselect=k, **options)
    tiny.randomize(mixture)
    with torch.no_grad():
        for name, parameter in mixture.gate_parameters():
            if name.endswith(("/standard.center", "/bias")):
                parameter.mul_(0.1)


CASES = [(a, o) for a in ("llama", "gpt2") for o in OPTIONS] + [
    *((a, o) for a in ("t5", "bart") for o in BEHIND_ENCODER),
    *(("bert", o) for o in ("token", "outputs", "matrix")),
]


@pytest.mark.parametrize(("architecture", "option"), CASES)
@pytest.mark.parametrize("lengths", [(7, 5, 3), (30, 25, 24)])  # the longer ones fetch only the rank rows chosen
def test_equals_masks_by_hand(hosts: Any, architecture: str, option: str, lengths: tuple[int, ...]) -> None:
    mixture, inputs = hosts[architecture], tiny.batch(architecture, lengths)
    both(mixture, OPTIONS[option], 3)
    together = tiny.logits(mixture.model, inputs)
    both(mixture, OPTIONS[option], None)
    dense, found = tiny.logits(mixture.model, inputs), set()
    for row in range(3):
        alone = tiny.row_of(inputs, row)
        chosen = choices(mixture, alone, 3)
        found.add(str(sorted(sorted(c) for c in chosen.values())))
        mask_by_hand(mixture, chosen)
        expected = tiny.logits(mixture.model, alone)[0]
        mask_by_hand(mixture, {})
        assert_close(tiny.real_logits(together, inputs, row), expected, atol=2e-5, rtol=1e-5)
    assert len(found) > 1 or architecture == "bert", "rows must choose differently for this to test anything"
    assert (dense - together).abs().max() > 1e-3


@pytest.mark.parametrize("option", ["token", "prompt", "topk"])
@pytest.mark.parametrize("search", [{}, {"num_beams": 2}, {"num_return_sequences": 2, "num_beams": 2}])
def test_generation_keeps_each_rows_choice(hosts: Any, option: str, search: dict[str, Any]) -> None:
    mixture, inputs = hosts["llama"], tiny.batch("llama", (9, 4, 6), "left")
    inputs.pop("position_ids")
    both(mixture, OPTIONS[option], 2)
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, **search}
    together = mixture.model.generate(**inputs, **settings)
    with mixture.prompt(inputs["attention_mask"]):
        assert torch.equal(mixture.model.generate(**inputs, use_cache=False, **settings), together)
    both(mixture, OPTIONS[option], None)
    n = len(together) // 3
    for row in range(3):
        alone = tiny.row_of(inputs, row)
        with mixture.only(*(NAMES[i] for i in choices(mixture, alone, 2)["model"])):
            expected = mixture.model.generate(**alone, **settings)
        assert torch.equal(together[row * n : row * n + n, -6:], expected[:, -6:])


@pytest.mark.parametrize("architecture", ["t5", "bart"])
def test_generation_behind_an_encoder(hosts: Any, architecture: str) -> None:
    mixture, inputs = hosts[architecture], tiny.batch(architecture)
    decoder_ids = inputs.pop("decoder_input_ids")
    settings = {"max_new_tokens": 5, "min_new_tokens": 5, "num_beams": 2}
    both(mixture, {}, 2)
    together = mixture.model.generate(**inputs, **settings)
    both(mixture, {}, None)
    for row in range(3):
        alone = tiny.row_of(inputs, row)
        chosen = choices(mixture, alone | {"decoder_input_ids": decoder_ids[:1]}, 2)
        assert len(chosen) == 2
        mask_by_hand(mixture, chosen)
        expected = mixture.model.generate(**alone, **settings)
        mask_by_hand(mixture, {})
        assert torch.equal(together[row], expected[0])


@pytest.mark.parametrize("option", ["token", "prompt", "sigmoid"])
def test_among_the_experts_that_are_not_masked(hosts: Any, option: str) -> None:
    mixture, inputs = hosts["llama"], tiny.batch("llama")
    kept = {0, 2, 3, 5}
    names = [NAMES[i] for i in kept]
    both(mixture, OPTIONS[option], 2)
    with mixture.only(*names):
        together = tiny.logits(mixture.model, inputs)
        with mixture.only("e2", "e5"):  # no more than may be chosen
            two = tiny.logits(mixture.model, inputs)
    both(mixture, OPTIONS[option], None)
    for row in range(3):
        alone = tiny.row_of(inputs, row)
        chosen = choices(mixture, alone, 2, kept)["model"]
        assert set(chosen) <= kept
        with mixture.only(*(NAMES[i] for i in chosen)):
            expected = tiny.logits(mixture.model, alone)[0]
        assert_close(tiny.real_logits(together, inputs, row), expected, atol=2e-5, rtol=1e-5)
    with mixture.only("e2", "e5"):
        assert torch.equal(two, tiny.logits(mixture.model, inputs))


@pytest.mark.parametrize("k", [6, 9])
def test_as_many_as_there_are_is_the_plain_gate(hosts: Any, k: int) -> None:
    mixture, inputs = hosts["llama"], tiny.batch("llama")
    both(mixture, {}, k)
    chosen = tiny.logits(mixture.model, inputs)
    both(mixture, {}, None)
    assert torch.equal(chosen, tiny.logits(mixture.model, inputs))


def test_gates_learn_among_all(hosts: Any) -> None:
    mixture, inputs = hosts["llama"], tiny.batch("llama")
    outputs = []
    for k in (2, None):
        both(mixture, {}, k)
        mixture.model.train()
        outputs.append(tiny.logits(mixture.model, inputs))
        mixture.model.eval()
    assert torch.equal(*outputs)


def test_labels_say_where_the_prompt_ends(hosts: Any) -> None:
    """The choice, and so the answer's loss, reads the prompt alone."""
    mixture, inputs = hosts["llama"], tiny.batch("llama", (8,))
    both(mixture, {}, 2)
    labels = inputs["input_ids"].clone()
    labels[:, :5] = -100
    with torch.no_grad():
        got = mixture.model(**inputs, labels=labels).logits
    both(mixture, {}, None)
    start = {key: value[:, :5] for key, value in inputs.items()}
    with mixture.only(*(NAMES[i] for i in choices(mixture, start, 2)["model"])):
        assert_close(got, tiny.logits(mixture.model, inputs), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("option", ["token", "outputs"])
def test_only_what_is_chosen_is_computed(hosts: Any, monkeypatch: Any, option: str) -> None:
    mixture, inputs = hosts["llama"], tiny.batch("llama", (40, 33))
    both(mixture, OPTIONS[option], 2)
    real, used = Site.few_rows, []
    monkeypatch.setattr(Site, "few_rows", lambda self, *args: (used.append(real(self, *args)), used[-1])[1])
    tiny.logits(mixture.model, inputs)
    assert len(used) == len(mixture.layers)
    fetched = [rows[0].shape[1] for rows in used if rows is not None]
    assert len(fetched) == 2 * 4, "every attention projection; only three experts extend the others"
    assert set(fetched) == {2 * 3}


def test_it_is_saved(tmp_path: Path) -> None:
    host = tiny.model("llama")
    mixture = tiny.randomize(lw.attach(host, experts(host, "llama"), lw.MoLE(preselect=2)))
    inputs = tiny.batch("llama")
    expected = tiny.logits(mixture.model, inputs)
    mixture.save_pretrained(tmp_path / "mixture", copy_experts=True)
    again = lw.load(tmp_path / "mixture", tiny.model("llama"))
    assert again.policy == lw.MoLE(preselect=2)
    assert_close(tiny.logits(again.model, inputs), expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("bad", [0, -1, 1.5, True, "2"])
def test_it_is_a_whole_number(bad: Any) -> None:
    with pytest.raises(lw.LoraweaveError, match="mole preselect: expected a whole number of at least 1"):
        lw.MoLE(preselect=bad)


def test_what_it_does_not_go_with(hosts: Any) -> None:
    with pytest.raises(lw.LoraweaveError, match=r"preselect: mix='outputs'.*use mix='deltas'"):
        lw.MoLE(preselect=2, mix="outputs", evidence="outputs", gate_form="full")
    before = hosts["t5"].policy
    for options in ({"granularity": "matrix"}, {"pooling": "token"}):
        with pytest.raises(lw.LoraweaveError, match=r"preselect: decoder.*decoder's own tokens.*granularity='block'"):
            hosts["t5"].policy = lw.MoLE(preselect=2, **options)
    assert hosts["t5"].policy is before
