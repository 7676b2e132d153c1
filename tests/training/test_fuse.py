"""``lw.fuse``: Mix-of-Show's gradient fusion, against least squares on the stacked inputs."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import loraweave as lw
import tiny
from loraweave.evaluation.data import Example
from loraweave.text import encode_example

RIDGE = 1e-9
DATA = {
    "ant": [{"input": a, "target": b} for a in ("abc", "q w e", "zz") for b in ("xyz", "z")],
    "bee": [{"input": "123 4", "target": "9"}, {"input": "55", "target": "0 : 0"}],
    "cat": [{"input": "n=m", "target": "k"}],
}


def fuse(model: Any, experts: Any, data: Any = DATA, **options: Any) -> lw.Expert:
    ends = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
    settings = {"ridge": RIDGE, "progress": False, "batch_size": 3, "tokenizer": tiny.tokenizer(ends)}
    return lw.fuse(model, experts, data, **(settings | options))


def dense(f: lw.LoraFactors) -> Tensor:
    return f.scale * f.B.double() @ f.A.double().flatten(1)


def alone(architecture: str, name: str, experts: dict[str, lw.Expert], data: Any) -> dict[str, Tensor]:
    """Module -> every input it gets, ``[tokens, in]``, with one expert added by hand and one example at a time."""
    model = tiny.model(architecture, torch.float64)
    for path, f in experts[name].factors.items():
        module = model.get_submodule(path)
        delta = dense(f)
        module.weight.data += delta.T if type(module).__name__ == "Conv1D" else delta
    seen: dict[str, list[Tensor]] = {}
    paths = {path for one in experts.values() for path in one.factors}
    for path in paths:
        model.get_submodule(path).register_forward_pre_hook(
            lambda _, args, path=path: seen.setdefault(path, []).append(args[0].flatten(0, -2))
        )
    seq2seq = architecture == "t5"
    for row in data:
        encoded = encode_example(tiny.tokenizer(seq2seq), Example(**row), is_encoder_decoder=seq2seq)
        ids = torch.tensor([encoded["input_ids"]])
        more = {"decoder_input_ids": torch.tensor([[0, *encoded["labels"][:-1]]])} if seq2seq else {}
        with torch.no_grad():
            model(input_ids=ids, **more)
    return {path: torch.cat(xs) for path, xs in seen.items()}


@pytest.mark.parametrize("architecture", ["t5", "llama", "gpt2"])
def test_it_is_the_least_squares_solution(architecture: str) -> None:
    host = tiny.model(architecture, torch.float64)
    experts = tiny.experts(host, architecture, torch.float64)
    before = {name: value.clone() for name, value in host.state_dict().items()}
    fused = fuse(host, experts)
    assert {n: v.shape for n, v in host.state_dict().items()} == {n: v.shape for n, v in before.items()}
    assert all(torch.equal(v, before[n]) for n, v in host.state_dict().items())
    inputs = {name: alone(architecture, name, experts, DATA[name]) for name in experts}
    for path, f in fused.factors.items():
        X = torch.cat([inputs[name][path] for name in experts])
        none = torch.zeros_like(dense(f))
        deltas = {n: dense(e.factors[path]) if path in e.factors else none for n, e in experts.items()}
        Y = torch.cat([inputs[name][path] @ deltas[name].T for name in experts])
        # ridge as further rows: sqrt(r) I -> 0
        root = (RIDGE * float((X**2).sum()) / X.shape[1]) ** 0.5
        wide = torch.cat([X, root * torch.eye(X.shape[1], dtype=X.dtype)])
        tall = torch.cat([Y, torch.zeros(X.shape[1], Y.shape[1], dtype=Y.dtype)])
        expected = torch.linalg.lstsq(wide, tall, driver="gelsd").solution.T
        assert_close(X @ dense(f).T, X @ expected.T, atol=1e-6, rtol=1e-6)
        assert_close(dense(f), expected, atol=1e-5, rtol=1e-5)
    assert fused.factors.keys() == {path for one in experts.values() for path in one.factors}


def test_sets_of_kept_inputs_are_as_if_fused_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of any set, in any order, and without another pass over data that were seen."""
    host = tiny.model("llama", torch.float64)
    experts = tiny.experts(host, "llama", torch.float64)
    settings: dict[str, Any] = {"progress": False, "batch_size": 3, "tokenizer": tiny.tokenizer(False)}
    fusion = lw.GradientFusion(host, experts, DATA, weights={"bee": 0.5}, **settings)
    passes: list[int] = []
    host.register_forward_pre_hook(lambda *_: passes.append(1))
    for names, more in ((["bee", "ant"], 3), (["cat", "bee"], 1), (["ant"], 0), (None, 0), (["ant", "cat"], 0)):
        before = len(passes)
        fused = fusion.fuse(names, ridge=RIDGE)
        assert len(passes) - before == more  # ant's six examples are two passes
        chosen = {name: experts[name] for name in names or experts}
        weights = {"bee": 0.5} if "bee" in chosen else {}
        expected = fuse(tiny.model("llama", torch.float64), chosen, {n: DATA[n] for n in chosen}, weights=weights)
        assert fused.factors.keys() == expected.factors.keys()
        for path, f in fused.factors.items():
            assert_close(dense(f), dense(expected.factors[path]), atol=1e-8, rtol=1e-8)
    passes.clear()
    once = lw.GradientFusion(host, experts, DATA, keep=False, **settings)
    assert [len(passes) for _ in range(2) if once.fuse(["cat"])] == [1, 2]
    for names, said in (([], "expected at least one expert"), (["cow"], "unknown expert 'cow'")):
        with pytest.raises(lw.LoraweaveError, match=said):
            fusion.fuse(names)
    mixture = lw.attach(host, experts, lw.Sum())
    fusion.fuse(["ant", "bee"])  # needs no model any more
    with pytest.raises(lw.LoraweaveError, match="already"):
        once.fuse(["cat"])
    mixture.detach()


def test_strengths_are_as_if_the_loras_were_so_strong() -> None:
    """In the inputs that are gathered, and in what is kept; one at 0 keeps the bare model where its data go."""
    host = tiny.model("llama", torch.float64)
    experts = tiny.experts(host, "llama", torch.float64)
    scales = {"ant": 0.5, "bee": 0.0, "cat": 1.0}
    by_hand = {
        name: lw.Expert(name, {p: lw.LoraFactors(f.A, scales[name] * f.B, f.scale) for p, f in one.factors.items()})
        for name, one in experts.items()
    }
    fused, expected = fuse(host, experts, weights={"ant": 0.5, "bee": 0}), fuse(host, by_hand)
    assert fused.factors.keys() == expected.factors.keys()
    for path, f in fused.factors.items():
        assert_close(dense(f), dense(expected.factors[path]), atol=1e-8, rtol=1e-8)
    plain = fuse(host, experts)
    assert any((dense(f) - dense(plain.factors[path])).abs().max() > 1e-2 for path, f in fused.factors.items())


def test_one_expert_comes_back_where_its_data_went() -> None:
    host = tiny.model("llama", torch.float64)
    one = {"ant": tiny.expert(host, ("q_proj", "down_proj"), 2, 1.5, seed=1, dtype=torch.float64)}
    ids = torch.arange(4, tiny.VOCAB).repeat(6)[torch.randperm(6 * (tiny.VOCAB - 4))].view(6, -1)
    fused = fuse(host, one, {"ant": [{"input_ids": ids}]}, ridge=1e-12)
    for path, f in one["ant"].factors.items():
        assert_close(dense(fused.factors[path]), dense(f), atol=1e-5, rtol=1e-5)
        assert fused.factors[path].rank == f.rank
    assert fuse(host, one, {"ant": [{"input_ids": ids}]}, rank=1).factors[path].rank == 1


class Split(nn.Module):
    """One linear module and one embedding whose inputs are the batch's own."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.head = nn.Linear(6, 4).double()
        self.words = nn.Embedding(5, 6).double()
        self.head.weight.data = torch.randn(4, 6, generator=generator, dtype=torch.float64)

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        return self.head(x) + self.head(self.words(ids))


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_experts_of_orthogonal_inputs_keep_all_they_do() -> None:
    host = nn.Sequential(nn.Linear(6, 4)).double()
    experts = {n: lw.Expert(n, {"0": lw.LoraFactors(random(2, 6, seed=s), random(4, 2, seed=s + 9), 0.7)})
               for s, n in enumerate(("a", "b"))}  # fmt: skip
    x = random(5, 6, seed=3)
    rotation = torch.linalg.qr(random(6, 6, seed=4))[0]
    left, right = x[:, :3] @ rotation[:3], x[:, 3:] @ rotation[3:]
    data = {"a": [{"input": left}], "b": [{"input": right}]}
    fused = dense(fuse(host, experts, data, ridge=1e-12).factors["0"])
    assert_close(left @ fused.T, left @ dense(experts["a"].factors["0"]).T, atol=1e-8, rtol=1e-8)
    assert_close(right @ fused.T, right @ dense(experts["b"].factors["0"]).T, atol=1e-8, rtol=1e-8)


def test_embeddings_are_averaged_by_how_often_each_word_comes() -> None:
    host = Split()
    made = {n: lw.LoraFactors(random(2, 5, seed=s), random(6, 2, seed=s + 9), 0.7, True)
            for s, n in enumerate(("a", "b"))}  # fmt: skip
    experts = {n: lw.Expert(n, {"words": f}) for n, f in made.items()}
    x = random(1, 4, 6)
    data = {"a": [{"x": x, "ids": torch.tensor([[0, 0, 1, 0]])}], "b": [{"x": x, "ids": torch.tensor([[0, 2, 2, 2]])}]}
    f = fuse(host, experts, data).factors["words"]
    assert f.embedding
    a, b = dense(made["a"]), dense(made["b"])
    expected = torch.stack([0.75 * a[:, 0] + 0.25 * b[:, 0], a[:, 1], b[:, 2], 0 * a[:, 3], 0 * a[:, 4]], 1)
    assert_close(dense(f), expected, atol=1e-6, rtol=1e-6)


def test_convolutions_are_linear_in_their_patches() -> None:
    host = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2, padding=1)).double()
    experts = {n: lw.Expert(n, {"0": lw.LoraFactors(random(2, 3, 3, 3, seed=s), random(4, 2, seed=s + 9), 0.7)})
               for s, n in enumerate(("a", "b"))}  # fmt: skip
    data = {n: [{"input": random(2, 3, 6, 6, seed=s)}] for s, n in enumerate(("a", "b"))}
    fused = fuse(host, experts, data)
    X, Y = [], []
    for name, (batch,) in data.items():
        padded = nn.functional.pad(batch["input"], (1, 1, 1, 1))
        for row in padded:
            for top in range(0, 6, 2):
                for left in range(0, 6, 2):
                    X.append(row[:, top : top + 3, left : left + 3].flatten())
                    Y.append(dense(experts[name].factors["0"]) @ X[-1])
    expected = torch.linalg.lstsq(torch.stack(X), torch.stack(Y), driver="gelsd").solution.T
    assert fused.factors["0"].A.shape[1:] == (3, 3, 3)
    assert_close(dense(fused.factors["0"]), expected, atol=1e-5, rtol=1e-5)


def test_the_result_loads_in_peft(tmp_path: Any) -> None:
    host = tiny.model("llama")
    lw.write_expert(fuse(host, tiny.experts(host, "llama"), rank=3, ridge=1e-6), tmp_path / "fused")
    inputs = tiny.batch("llama")
    bare = tiny.logits(host, inputs)
    plain = tiny.logits(peft.PeftModel.from_pretrained(tiny.model("llama"), tmp_path / "fused").eval(), inputs)
    lw.attach(host, {"fused": tmp_path / "fused"}, lw.Sum())
    assert_close(plain, tiny.logits(host, inputs), atol=2e-4, rtol=1e-4)
    assert not torch.allclose(plain, bare, atol=1e-2)


@pytest.mark.parametrize(
    ("data", "options", "said"),
    [
        ({"ant": DATA["ant"], "bee": DATA["bee"]}, {}, "data: none for expert 'cat'"),
        (DATA | {"cow": []}, {}, "unknown expert 'cow'"),
        (DATA | {"cat": []}, {}, "data of expert 'cat': empty"),
        (DATA["ant"], {}, "data: expected expert -> its data, got list"),
        (DATA, {"ridge": 0.0}, "fuse ridge: expected a finite number larger than 0"),
        (DATA, {"rank": 0}, "fuse rank: expected a whole number"),
        (DATA, {"batch_size": 0}, "fuse batch_size: expected at least 1"),
        (DATA, {"weights": {"cow": 1.0}}, "unknown expert 'cow'"),
        (DATA, {"weights": {"cat": float("nan")}}, "fuse weight of 'cat': expected a finite number"),
    ],
)
def test_refusals(data: Any, options: dict[str, Any], said: str) -> None:
    host = tiny.model("llama")
    with pytest.raises(lw.LoraweaveError, match=f"^{said}"):
        fuse(host, tiny.experts(host, "llama"), data, **options)
    lw.attach(host, tiny.experts(host, "llama"), lw.Sum()).detach()  # nothing was left behind


def test_bad_inputs_and_modules_without_any_are_named() -> None:
    host = Split()
    head = lw.LoraFactors(random(2, 6), random(4, 2), 1.0)
    words = lw.LoraFactors(random(2, 5), random(6, 2), 1.0, True)
    ids = torch.tensor([[0, 1]])
    nan = {"a": [{"x": torch.full((1, 2, 6), float("nan"), dtype=torch.float64), "ids": ids}]}
    with pytest.raises(lw.LoraweaveError, match="'a' the inputs of 'head' are not finite"):
        fuse(host, {"a": lw.Expert("a", {"head": head, "words": words})}, nan)
    idle = nn.ModuleDict({"used": Split(), "idle": nn.Linear(6, 4).double()})
    idle.forward = idle["used"].forward
    batch = {"a": [{"x": random(1, 2, 6), "ids": ids}]}
    with pytest.raises(lw.LoraweaveError, match="'a' never reach 'idle'"):
        fuse(idle, {"a": lw.Expert("a", {"used.head": head, "idle": head})}, batch)
