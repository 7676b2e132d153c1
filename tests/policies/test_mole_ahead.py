"""Gates of a decoder that read the encoder's tokens, before the decoder runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import loraweave as lw
import tiny

SEQ2SEQ = ("t5", "bart", "whisper")


def mixture_of(architecture: str, **options: Any) -> lw.Mixture:
    return tiny.randomize(tiny.attached(architecture, lw.MoLE(**{"normalization": "l2", **options})))


def encoder_states(mixture: lw.Mixture, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        outputs = mixture.model(**inputs, return_dict=True)
    states: Tensor = outputs.encoder_last_hidden_state
    return states


@pytest.mark.parametrize("architecture", SEQ2SEQ)
@pytest.mark.parametrize("evidence", ["outputs", "hidden"])
def test_a_decoder_block_decides_by_the_encoders_tokens(architecture: str, evidence: Any) -> None:
    """A slow loop over rows and experts, from Eq. 9-11."""
    mixture = mixture_of(architecture, evidence=evidence, gate_form="full")
    inputs = tiny.batch(architecture)
    with mixture.record() as seen:
        tiny.logits(mixture.model, inputs)
    states = encoder_states(mixture, inputs)
    mask = inputs.get("attention_mask") if architecture != "whisper" else None
    sites = [site for site in mixture.sites if site.plan.ahead]
    assert len(sites) == 2
    for site in sites:
        leader = mixture.layers[site.plan.members[0]]
        gate: Any = site.gate
        e, tau = gate.e.detach(), gate.log_temperature.detach().exp()
        factors = [leader.bank.factors(i) for i in range(3)]
        for row in range(states.shape[0]):
            real = [t for t in range(states.shape[1]) if mask is None or mask[row, t]]
            x = states[row, real].mean(0)
            if evidence == "outputs":
                outputs = [torch.zeros(e.shape[1]) if f is None else f.scale * (f.B @ (f.A @ x)) for f in factors]
                x = torch.cat(outputs)
            v = x / x.norm()
            if gate.standard is not None:
                v = (v - gate.standard.center) / gate.standard.spread
            logits = v @ e.reshape(-1, 3)
            if gate.bias is not None:
                logits = logits + gate.bias.detach() * len(gate.standard.center) ** 0.5
            assert_close(seen.weights[site.name][row, 0], (logits / tau).softmax(-1), atol=2e-5, rtol=1e-4)


def test_the_first_token_already_knows_the_input() -> None:
    """The reason for all of this: its own first token is the same whatever the task is."""
    inputs = tiny.batch("t5")
    inputs["decoder_input_ids"] = torch.zeros(3, 1, dtype=torch.long)
    for pooling, differ in (("token", False), ("auto", True)):
        mixture = mixture_of("t5", pooling=pooling)
        with mixture.record() as seen:
            tiny.logits(mixture.model, inputs)
        g = seen.weights["decoder.block.0"][:, 0]
        assert bool((g[0] - g[1]).abs().max() > 1e-3) == differ


@pytest.mark.parametrize("activation", ["softmax", "topk", "top1", "sigmoid", "linear"])
def test_weights_are_kept_while_generating_and_no_longer(activation: Any) -> None:
    mixture = mixture_of("t5", activation=activation)
    model, inputs = mixture.model, tiny.batch("t5")
    gate = next(site.gate for site in mixture.sites if site.plan.ahead)
    calls = []
    assert gate is not None
    gate.register_forward_hook(lambda *_: calls.append(1))

    def generate() -> Tensor:
        found: Tensor = model.generate(
            input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], max_new_tokens=5, min_new_tokens=5
        )
        return found

    free = generate()
    assert len(calls) == 1
    assert torch.equal(generate(), free)
    assert len(calls) == 2
    states = model.get_encoder()(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
    before = len(calls)

    def decode() -> Tensor:
        with torch.no_grad():
            logits: Tensor = model(
                encoder_outputs=states,
                attention_mask=inputs["attention_mask"],
                decoder_input_ids=inputs["decoder_input_ids"],
            ).logits
        return logits

    plain = decode()
    assert torch.equal(decode(), plain)
    assert len(calls) == before + 1, "the same states: the same weights"
    with mixture.only("bee"):
        alone = decode()
    assert not torch.equal(alone, plain)
    assert torch.equal(decode(), plain)
    with torch.no_grad():
        for _, parameter in mixture.gate_parameters():
            parameter.add_(torch.randn_like(parameter))
    assert not torch.equal(decode(), plain), "changed gates decide afresh"


def test_a_decoder_called_alone_says_what_it_lacks() -> None:
    mixture = mixture_of("t5")
    with pytest.raises(
        lw.LoraweaveError, match=r"decoder.block.0: its gate reads the encoder's states.*pooling='token'"
    ):
        mixture.model.get_decoder()(input_ids=torch.zeros(1, 1, dtype=torch.long))


def test_detaching_takes_the_listeners_away() -> None:
    mixture = mixture_of("t5")
    streams = mixture._streams["cross"]
    assert len(streams.listeners) == 2
    mixture.policy = lw.MoLE(pooling="token")
    assert streams.listeners == []
    mixture.policy = lw.MoLE()
    model = mixture.detach()
    assert streams.listeners == []
    tiny.logits(model, tiny.batch("t5"))
