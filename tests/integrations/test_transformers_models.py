"""What the engine knows of transformers models: streams, causality, odd shapes of input."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.testing import assert_close

import loraweave as lw
import tiny
from loraweave.integrations.transformers import anatomy

SPECS: dict[str, list[tuple[str, str, str | None, bool, bool]]] = {
    # name, door, mask, causal, prompted
    "t5": [
        ("encoder", "encoder", "attention_mask", False, False),
        ("decoder", "decoder", "attention_mask", True, False),
        ("cross", "decoder", "encoder_attention_mask", False, False),
    ],
    "bart": [
        ("encoder", "model.encoder", "attention_mask", False, False),
        ("decoder", "model.decoder", "attention_mask", True, False),
        ("cross", "model.decoder", "encoder_attention_mask", False, False),
    ],
    "whisper": [
        ("encoder", "model.encoder", None, False, False),
        ("decoder", "model.decoder", "attention_mask", True, False),
        ("cross", "model.decoder", None, False, False),
    ],
    **{name: [("model", "", "attention_mask", True, True)] for name in ("llama", "qwen3", "gpt2")},
    **{name: [("model", "", "attention_mask", False, False)] for name in ("bert", "albert")},
}


@pytest.mark.parametrize("architecture", tiny.EVERY)
def test_streams(architecture: str) -> None:
    found = anatomy(tiny.model(architecture)).streams
    assert [(s.name, s.door, s.mask, s.causal, s.prompted) for s in found] == SPECS[architecture]


@pytest.mark.parametrize("architecture", ["t5", "bart", "whisper"])
def test_which_modules_read_the_encoder(architecture: str) -> None:
    host = tiny.model(architecture)
    body = anatomy(host)
    for path in tiny.paths(host, tiny.ARCHITECTURES[architecture].targets):
        stack = "encoder" if path.removeprefix("model.").startswith("encoder") else "decoder"
        crossed = any(f"{name}.{leaf}" in path for name, leaf in _CROSSED)
        assert body.stream_of(path) == ("cross" if crossed else stack), path


_CROSSED = [("EncDecAttention", "k"), ("EncDecAttention", "v"), ("encoder_attn", "k_proj"), ("encoder_attn", "v_proj")]


def others() -> dict[str, tuple[Any, bool]]:
    """Further models, and whether they look back only."""
    from transformers import BertModel, LlamaModel, T5EncoderModel

    return {
        "bare decoder": (LlamaModel(tiny.model("llama").config), True),
        "bare encoder": (BertModel(tiny.model("bert").config), False),
        "encoder of T5": (T5EncoderModel(tiny.model("t5").config), False),
        "decoder-only BERT": (tiny.model("bert", is_decoder=True), True),
    }


@pytest.mark.parametrize("name", others())
def test_causality_of_other_models(name: str) -> None:
    host, causal = others()[name]
    (stream,) = anatomy(host).streams
    assert stream.causal == causal


def test_encoder_alone_pools_over_real_tokens() -> None:
    from transformers import T5EncoderModel

    torch.manual_seed(0)
    host = T5EncoderModel(tiny.model("t5").config).eval()
    experts = {n: tiny.expert(host, ["q", "wo"], 2, seed=i) for i, n in enumerate(tiny.NAMES)}
    tiny.randomize(lw.attach(host, experts, lw.MoLE()))
    inputs = tiny.batch("bert")
    with torch.no_grad():
        together = host(**inputs).last_hidden_state
        for row in range(3):
            alone = host(**tiny.row_of(inputs, row)).last_hidden_state[0]
            assert_close(together[row, : len(alone)], alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "policy", [lw.MoLE(), lw.MoLE("matrix", evidence="hidden"), lw.MoLE(pooling="token"), lw.Sum()]
)
def test_pooled_states_have_one_vector_a_row(policy: Any) -> None:
    """BERT's pooler and classifier read ``[rows, width]``."""
    from transformers import BertForSequenceClassification

    torch.manual_seed(0)
    host = BertForSequenceClassification(tiny.model("bert").config).eval()
    experts = {n: tiny.expert(host, ["query", "pooler.dense", "classifier"], 2, seed=i) for i, n in enumerate("ab")}
    mixture = tiny.randomize(lw.attach(host, experts, policy))
    inputs = tiny.batch("bert")
    out = tiny.logits(host, inputs)
    for row in range(3):
        assert_close(tiny.logits(host, tiny.row_of(inputs, row))[0], out[row], atol=1e-5, rtol=1e-5)
    with mixture.only("a"):
        single = tiny.logits(host, inputs)
    mixture.policy = lw.Linear({"a": 1.0})
    assert_close(tiny.logits(host, inputs), single, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("granularity", ["matrix", "layer", "block", "network"])
@pytest.mark.parametrize("pooling", ["token", "mean", "prompt"])
def test_models_that_flatten_rows_and_tokens(granularity: Any, pooling: Any) -> None:
    """OPT's feed-forward reads ``[rows * tokens, width]``."""
    from transformers import OPTConfig, OPTForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 48, "hidden_size": 32, "ffn_dim": 40, "num_hidden_layers": 2, "num_attention_heads": 4}
    host = OPTForCausalLM(OPTConfig(**sizes, max_position_embeddings=64, word_embed_proj_dim=32, dropout=0.0)).eval()
    experts = {n: tiny.expert(host, ["q_proj", "fc1", "fc2"], 2, seed=i) for i, n in enumerate(tiny.NAMES)}
    mixture = tiny.randomize(lw.attach(host, experts, lw.MoLE(granularity, pooling=pooling)))
    inputs = tiny.batch("llama")
    with mixture.record() as seen:
        out = tiny.logits(host, inputs)
    for site, g in seen.weights.items():
        assert g.shape == (3, 7 if pooling == "token" else 1, 3), site
    for row in range(3):
        alone = tiny.logits(host, tiny.row_of(inputs, row))[0]
        assert_close(alone, tiny.real_logits(out, inputs, row), atol=1e-5, rtol=1e-4)


def test_embeddings_that_scale_what_they_look_up() -> None:
    """BART (and Gemma) multiply embeddings by the square root of their width; peft scales the LoRA's share too."""
    import peft

    inputs = tiny.batch("bart")
    config = peft.LoraConfig(r=2, target_modules=["embed_tokens"], init_lora_weights=False)
    torch.manual_seed(0)
    tuned = peft.get_peft_model(tiny.model("bart", scale_embedding=True, tie_word_embeddings=False), config).eval()
    layers = {n: m for n, m in tuned.base_model.model.named_modules() if hasattr(m, "lora_embedding_A")}
    factors = {
        n: lw.LoraFactors(
            m.lora_embedding_A["default"].detach(), m.lora_embedding_B["default"].detach(), m.scaling["default"], True
        )
        for n, m in layers.items()
    }
    host = tiny.model("bart", scale_embedding=True, tie_word_embeddings=False)
    mixture = lw.attach(host, {"a": lw.Expert("a", factors)}, lw.Sum())
    out = tiny.logits(host, inputs)
    assert_close(out, tiny.logits(tuned, inputs), atol=1e-4, rtol=1e-4)
    mixture.fold()
    assert_close(tiny.logits(host, inputs), out, atol=1e-4, rtol=1e-4)


def test_the_mixture_reaches_an_encoder_called_by_itself() -> None:
    """As ``generate`` does, and as users do for sentence embeddings."""
    mixture = tiny.randomize(tiny.attached("t5", lw.MoLE()))
    inputs = tiny.batch("t5")
    whole = mixture.model(**inputs).encoder_last_hidden_state
    alone = mixture.model.get_encoder()(inputs["input_ids"], inputs["attention_mask"]).last_hidden_state
    assert torch.equal(whole, alone)


def test_a_decoders_body_called_by_itself() -> None:
    """``model.model(...)``: its own mask counts, not the one of an earlier call of the whole model."""
    mixture = tiny.randomize(tiny.attached("llama", lw.MoLE(pooling="mean")))
    inputs, other = tiny.batch("llama"), tiny.batch("llama", (7, 7, 2), seed=3)
    expected = mixture.model(**inputs, output_hidden_states=True).hidden_states[-1]
    mixture.model(**other)
    got = mixture.model.model(**inputs).last_hidden_state
    assert_close(got, expected, atol=1e-6, rtol=1e-6)


def test_layer_dropout_skips_whole_blocks() -> None:
    from loraweave.training import objective

    mixture = tiny.attached("bart", lw.MoLE(), encoder_layerdrop=1.0)
    inputs = tiny.batch("bart")
    mixture.model.train()
    mixture.model(**inputs)
    ran = {site.name for site in mixture.sites if site.current is not None}
    assert not any("encoder.layers" in name for name in ran)
    assert objective.balance([s for s in mixture.sites if s.current is not None]).requires_grad


def test_torchs_own_attention_would_pass_experts_by() -> None:
    """It reads its projections' weights without calling them."""
    for host, path in (
        (torch.nn.Sequential(torch.nn.MultiheadAttention(8, 2)), "0.out_proj"),
        (torch.nn.Sequential(torch.nn.TransformerEncoderLayer(8, 2, 8)), "0.linear1"),
    ):
        factors = lw.LoraFactors(torch.ones(1, 8), torch.ones(8, 1), 1.0)
        with pytest.raises(lw.LoraweaveError, match=rf"{path}.*without calling them"):
            lw.attach(host, {"a": lw.Expert("a", {path: factors})}, lw.Sum())
