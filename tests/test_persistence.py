"""Saved mixtures: what the files hold, where they may lie, and what is wrong with bad ones."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import loraweave as lw
import tiny
from loraweave.mixture import Mixture


@pytest.fixture(scope="module")
def place(tmp_path_factory: Any) -> Path:
    """A base model and three experts in folders."""
    folder = tmp_path_factory.mktemp("place")
    host = tiny.model("llama")
    host.save_pretrained(folder / "base")
    for name, expert in tiny.experts(host, "llama").items():
        lw.write_expert(expert, folder / "experts" / name, base="tiny/llama")
    return folder


@pytest.fixture
def mixture(place: Path) -> Mixture:
    from transformers import LlamaForCausalLM

    host = LlamaForCausalLM.from_pretrained(place / "base").eval()
    return tiny.randomize(lw.attach(host, {n: place / "experts" / n for n in tiny.NAMES}, lw.MoLE("layer", "outputs")))


def test_what_is_written(mixture: Mixture, place: Path, tmp_path: Path) -> None:
    out = mixture.save_pretrained(tmp_path / "saved")
    assert {p.name for p in out.iterdir()} == {"mixture.json", "gates.safetensors", "README.md"}
    said = json.loads((out / "mixture.json").read_text())
    assert said["format"] == 1
    assert said["base"] == {"id": str(place / "base"), "class": "LlamaForCausalLM"}
    assert said["method"]["name"] == "mole"
    assert said["method"]["granularity"] == "layer"
    assert [e["name"] for e in said["experts"]] == list(tiny.NAMES)
    for entry, source in zip(said["experts"], mixture.sources, strict=True):
        assert entry["source"] == str(place / "experts" / entry["name"])
        assert entry["sha256"] == source.sha256
        assert len(entry["sha256"]) == 64
        assert entry["base"] == "tiny/llama"
    saved = load_file(out / "gates.safetensors")
    assert all(torch.equal(saved[name], p) for name, p in mixture.gate_parameters())
    assert "ant" in (out / "README.md").read_text()


def test_policies_without_gates_write_none(mixture: Mixture, tmp_path: Path) -> None:
    mixture.policy = lw.Linear({"ant": 1.0, "bee": 2.0})
    out = mixture.save_pretrained(tmp_path / "saved")
    assert {p.name for p in out.iterdir()} == {"mixture.json", "README.md"}


def test_the_base_is_found_where_it_was(mixture: Mixture, tmp_path: Path) -> None:
    expected = tiny.logits(mixture.model, tiny.batch("llama"))
    loaded = lw.load(mixture.save_pretrained(tmp_path / "saved"))
    assert loaded.model is not mixture.model
    assert torch.equal(tiny.logits(loaded.model, tiny.batch("llama")), expected)
    loaded.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "mixture.json").read_text() == (tmp_path / "saved" / "mixture.json").read_text()


def test_copies_make_a_folder_that_can_be_moved(place: Path, mixture: Mixture, tmp_path: Path) -> None:
    expected = tiny.logits(mixture.model, tiny.batch("llama"))
    out = mixture.save_pretrained(tmp_path / "saved", copy_experts=True)
    moved = shutil.move(out, tmp_path / "elsewhere")
    loaded = lw.load(moved, tiny.model("llama"))
    assert torch.equal(tiny.logits(loaded.model, tiny.batch("llama")), expected)
    again = loaded.save_pretrained(tmp_path / "third", copy_experts=True)
    loaded.detach()
    assert torch.equal(tiny.logits(lw.load(again, tiny.model("llama")).model, tiny.batch("llama")), expected)


def test_saving_again_replaces_what_was_saved(mixture: Mixture, tmp_path: Path) -> None:
    out = mixture.save_pretrained(tmp_path / "saved", copy_experts=True)
    mixture.policy = lw.Sum()
    mixture.save_pretrained(out)
    assert {p.name for p in out.iterdir()} == {"mixture.json", "README.md"}
    assert lw.load(out, tiny.model("llama")).policy == lw.Sum()


def test_other_files_are_never_overwritten(mixture: Mixture, tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("precious")
    with pytest.raises(lw.LoraweaveError, match=r"notes"):
        mixture.save_pretrained(tmp_path / "notes")
    assert [p.name for p in (tmp_path / "notes").iterdir()] == ["mine.txt"]
    (tmp_path / "file").write_text("x")
    with pytest.raises(lw.LoraweaveError, match="file"):
        mixture.save_pretrained(tmp_path / "file")


def test_a_failed_save_leaves_nothing(mixture: Mixture, tmp_path: Path, monkeypatch: Any) -> None:
    out = mixture.save_pretrained(tmp_path / "saved")
    good = (out / "mixture.json").read_bytes()

    def broken(*_: Any, **__: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("loraweave.persistence.write_json_atomic", broken)
    with pytest.raises((OSError, lw.LoraweaveError)):
        mixture.save_pretrained(out)
    with pytest.raises((OSError, lw.LoraweaveError)):
        mixture.save_pretrained(tmp_path / "new")
    assert (out / "mixture.json").read_bytes() == good
    assert [p.name for p in tmp_path.iterdir()] == ["saved"]


def test_experts_from_memory_must_be_copied(tmp_path: Path) -> None:
    host = tiny.model("llama")
    mixture = lw.attach(host, tiny.experts(host, "llama"), lw.Sum())
    out = mixture.save_pretrained(tmp_path / "saved")
    with pytest.raises(lw.LoraweaveError, match=r"expert 'ant' was attached from memory .* copy_experts=True"):
        lw.load(out, tiny.model("llama"))
    lw.load(mixture.save_pretrained(tmp_path / "copied", copy_experts=True), tiny.model("llama"))


def test_a_base_without_a_place_must_be_given(tmp_path: Path) -> None:
    host = tiny.model("llama")
    out = lw.attach(host, tiny.experts(host, "llama"), lw.Sum()).save_pretrained(tmp_path / "saved", copy_experts=True)
    with pytest.raises(lw.LoraweaveError, match="does not say where its base model is; pass model="):
        lw.load(out)


Change = Callable[[dict[str, Any]], Any]
DAMAGE: dict[str, tuple[Change, str]] = {
    "other format": (lambda m: m.update(format=99), r"format 99, this version reads 1"),
    "no format": (lambda m: m.pop("format"), "format None"),
    "no method": (lambda m: m.pop("method"), "method: expected dict, got NoneType"),
    "unknown method": (lambda m: m["method"].update(name="moles"), "unknown method 'moles'; did you mean 'mole'"),
    "unknown option": (lambda m: m["method"].update(granulrity="x"), "unknown option of method 'mole' 'granulrity'"),
    "bad option": (lambda m: m["method"].update(granularity="x"), "unknown mole granularity 'x'"),
    "experts a text": (lambda m: m.update(experts="ant"), "experts: expected list, got str"),
    "no experts": (lambda m: m.update(experts=[]), "at least one"),
    "an expert a text": (lambda m: m["experts"].__setitem__(0, "ant"), "expected objects with the texts"),
    "no hash": (lambda m: m["experts"][0].pop("sha256"), "expected objects with the texts name, source and sha256"),
    "other hash": (lambda m: m["experts"][1].update(sha256="0" * 64), r"expert 'bee' .* has changed"),
    "expert gone": (lambda m: m["experts"][1].update(source="/nowhere/bee"), "nowhere/bee"),
    "outside": (lambda m: m["experts"][1].update(source="experts/../../../etc"), "outside of the mixture's own"),
    "other granularity": (lambda m: m["method"].update(granularity="matrix"), "these gates are not for this mixture"),
    "other form": (lambda m: m["method"].update(gate_form="full"), "these gates are not for this mixture"),
    "other evidence": (
        lambda m: m["method"].update(evidence="hidden"),
        r"has the shape \[\d+, 3\], this mixture needs",
    ),
    "blocks a text": (lambda m: m.update(blocks="x"), "blocks: expected list, got str"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_description(mixture: Mixture, tmp_path: Path, case: str) -> None:
    change, message = DAMAGE[case]
    out = mixture.save_pretrained(tmp_path / "saved")
    mixture.detach()
    said = json.loads((out / "mixture.json").read_text())
    change(said)
    (out / "mixture.json").write_text(json.dumps(said))
    bare = tiny.logits(mixture.model, tiny.batch("llama"))
    with pytest.raises(lw.LoraweaveError, match=message) as error:
        lw.load(out, mixture.model)
    assert "\n" not in str(error.value)
    assert torch.equal(tiny.logits(mixture.model, tiny.batch("llama")), bare)
    lw.attach(mixture.model, tiny.experts(mixture.model, "llama"), lw.Sum()).detach()


NONE = [("{", "not JSON"), ("[1]", "expected a JSON object, got list"), ("", "not JSON"), ("[" * 10**5, "not JSON")]


@pytest.mark.parametrize(("text", "message"), NONE)
def test_a_description_that_is_none(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "mixture.json").write_text(text)
    with pytest.raises(lw.LoraweaveError, match=message):
        lw.load(tmp_path, tiny.model("llama"))


def change_gates(path: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


GATES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "gone": (lambda p: p.unlink(), "gates.safetensors: missing"),
    "cut off": (lambda p: p.write_bytes(p.read_bytes()[:-7]), "damaged or not a safetensors file"),
    "a pickle": (lambda p: torch.save({"a": torch.ones(1)}, p), "damaged or not a safetensors file"),
    "empty": (lambda p: p.write_bytes(b""), "damaged or not a safetensors file"),
    "a gate too few": (lambda p: change_gates(p, lambda t: t.pop(sorted(t)[0])), "is in one of them alone"),
    "a gate too many": (lambda p: change_gates(p, lambda t: t.update(x=torch.ones(1))), "'x' is in one of them alone"),
    "another shape": (
        lambda p: change_gates(p, lambda t: t.update({"model.layers.0.mlp/e": torch.ones(2, 3)})),
        r"'model.layers.0.mlp/e' has the shape \[2, 3\], this mixture needs \[2, 3\]|has the shape",
    ),
    "not a number": (
        lambda p: change_gates(p, lambda t: t["model.layers.1.mlp/e"].view(-1)[0].fill_(float("nan"))),
        "'model.layers.1.mlp/e' has values that are not finite",
    ),
}


@pytest.mark.parametrize("case", GATES)
def test_damaged_gates(mixture: Mixture, tmp_path: Path, case: str) -> None:
    change, message = GATES[case]
    out = mixture.save_pretrained(tmp_path / "saved")
    mixture.detach()
    change(out / "gates.safetensors")
    if case == "another shape":
        change_gates(out / "gates.safetensors", lambda t: t.update({"model.layers.0.mlp/e": torch.ones(7, 3)}))
    bare = tiny.logits(mixture.model, tiny.batch("llama"))
    with pytest.raises(lw.LoraweaveError, match=message) as error:
        lw.load(out, mixture.model)
    assert "\n" not in str(error.value)
    assert torch.equal(tiny.logits(mixture.model, tiny.batch("llama")), bare)
    lw.attach(mixture.model, tiny.experts(mixture.model, "llama"), lw.Sum()).detach()


def test_not_a_saved_mixture(tmp_path: Path) -> None:
    for missing in ("nowhere", tmp_path / "nowhere", "./a/b"):
        with pytest.raises(lw.LoraweaveError, match=r"no mixture at '.*': expected a folder that holds mixture.json"):
            lw.load(missing)
    with pytest.raises(lw.LoraweaveError, match=r"not a saved mixture, it holds no mixture.json"):
        lw.load(tmp_path)
    with pytest.raises(lw.LoraweaveError, match=r"no mixture 'someone/nothing': no such folder here"):
        lw.load("someone/nothing")


def test_experts_for_another_base(mixture: Mixture, tmp_path: Path) -> None:
    out = mixture.save_pretrained(tmp_path / "saved")
    other = tiny.model("llama", intermediate_size=24)
    with pytest.raises(lw.LoraweaveError, match=r"made for 'tiny/llama'.*belongs to another base model"):
        lw.load(out, other)
    assert not any("base" in name for name, _ in other.named_modules())


class LocalHub:
    """Keeps what is uploaded in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.created: dict[str, Any] = {}

    def create_repo(self, repo_id: str, **options: Any) -> str:
        self.created[repo_id] = options
        return f"https://hub.example/{repo_id}"

    def upload_folder(self, *, repo_id: str, folder_path: str, commit_message: str) -> None:
        shutil.copytree(folder_path, self.folder / repo_id)


def test_push_to_hub(mixture: Mixture, tmp_path: Path) -> None:
    hub = LocalHub(tmp_path)
    expected = tiny.logits(mixture.model, tiny.batch("llama"))
    assert mixture.push_to_hub("me/mine", private=True, api=hub) == "https://hub.example/me/mine"
    assert hub.created == {"me/mine": {"private": True, "exist_ok": True}}
    loaded = lw.load(tmp_path / "me" / "mine", tiny.model("llama"))
    assert torch.equal(tiny.logits(loaded.model, tiny.batch("llama")), expected)
    said = "".join((tmp_path / "me" / "mine" / name).read_text() for name in ("mixture.json", "README.md"))
    assert str(tmp_path.parent) not in said, "a path of this machine went to the hub"


def test_saving_a_folded_mixture(mixture: Mixture, tmp_path: Path) -> None:
    mixture.policy = lw.Linear()
    expected = tiny.logits(mixture.model, tiny.batch("llama"))
    mixture.fold()
    out = mixture.save_pretrained(tmp_path / "saved", copy_experts=True)
    assert torch.equal(tiny.logits(lw.load(out, tiny.model("llama")).model, tiny.batch("llama")), expected)
