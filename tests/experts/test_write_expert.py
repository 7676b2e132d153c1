"""What is written is an ordinary PEFT folder: peft computes the same with it as with the original."""

from __future__ import annotations

import dataclasses
import json
import warnings

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_adapters import tiny

import loraweave as lw
from loraweave.errors import LoraweaveError
from loraweave.experts.inspection import inspect
from loraweave.experts.reader import read_expert
from loraweave.experts.types import LoraFactors
from loraweave.experts.writer import peft_config, write_expert

IDS = torch.tensor([[3, 7, 1, 30, 22], [5, 5, 9, 2, 11]])


def outputs(kind, folder):
    with warnings.catch_warnings():
        # peft warns, and does not raise, where tensors or patterns match nothing
        warnings.filterwarnings("error", message=".*(missing|unexpected|did not match).*")
        model = peft.PeftModel.from_pretrained(tiny(kind), folder).eval()
    with torch.no_grad():
        return model(input_ids=IDS, **({"decoder_input_ids": IDS} if kind == "t5" else {})).logits


def test_double_precision_is_written_and_read_as_peft_reads_it(make_adapter, tmp_path):
    original = read_expert(make_adapter("llama"))
    doubled = {path: dataclasses.replace(f, A=f.A.double() / 3, B=f.B.double()) for path, f in original.factors.items()}
    folder = write_expert(doubled, tmp_path / "double")
    read = read_expert(folder)
    for path, factor in doubled.items():
        assert read.factors[path].A.dtype == torch.float64
        assert torch.equal(read.factors[path].A, factor.A)
    # In the model's own precision, as peft.
    mixture = lw.attach(tiny("llama").eval(), {"one": str(folder)}, lw.Sum())
    with torch.no_grad():
        torch.testing.assert_close(mixture.model(input_ids=IDS).logits, outputs("llama", folder))


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("llama", {}),
        ("llama", {"use_rslora": True, "r": 3, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.1.*": 5}}),
        ("llama", {"rank_pattern": {"layers.0.self_attn.q_proj": 1}, "alpha_pattern": {"v_proj": 31}}),
        ("t5", {"target_modules": ["q", "wo", "shared"], "rank_pattern": {"wo": 6}}),
        ("gpt2", {"alpha_pattern": {"c_proj": 1}}),
    ],
)
def test_peft_computes_the_same(make_adapter, tmp_path, kind, options):
    original = make_adapter(kind, **options)
    with torch.no_grad():
        bare = tiny(kind)(input_ids=IDS, **({"decoder_input_ids": IDS} if kind == "t5" else {})).logits
    written = write_expert(read_expert(original), tmp_path / "written")
    expected = outputs(kind, original)
    assert not torch.allclose(expected, bare, atol=1e-3)
    torch.testing.assert_close(outputs(kind, written), expected, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip_is_exact(make_adapter, tmp_path, dtype):
    first = read_expert(make_adapter(dtype=dtype, use_rslora=True, r=3, alpha_pattern={"q_proj": 7}))
    first = dataclasses.replace(first, base="someone/base")
    again = read_expert(write_expert(first, tmp_path / "new", task_type="CAUSAL_LM"))
    assert again.base == "someone/base"
    assert again.factors.keys() == first.factors.keys()
    for module, factor in first.factors.items():
        assert torch.equal(again.factors[module].A, factor.A)
        assert torch.equal(again.factors[module].B, factor.B)
        assert again.factors[module].scale == factor.scale
    assert inspect(tmp_path / "new").task_type == "CAUSAL_LM"
    assert write_expert(first, tmp_path / "other", base="another/base")
    assert read_expert(tmp_path / "other").base == "another/base"


def test_modules_whose_names_end_alike(tmp_path):
    """``a.q`` must not lend its rank and alpha to ``b.a.q``, nor ``axq`` be matched by the dot of ``a.q``."""
    factors = {
        name: LoraFactors(torch.ones(rank, 4), torch.ones(4, rank), scale)
        for name, rank, scale in [
            ("a.q", 2, 3.0),
            ("b.a.q", 1, 1.0),
            ("b.axq", 3, 0.3),
            ("a-q", 4, 1 / 3),
            ("z", 1, 1.0),
        ]
    }
    again = read_expert(write_expert(factors, tmp_path / "new")).factors
    assert {name: (factor.rank, factor.scale) for name, factor in again.items()} == {
        name: (factor.rank, factor.scale) for name, factor in factors.items()
    }


@settings(deadline=None)
@given(alpha=st.floats(1e-6, 1e6) | st.integers(1, 4096), scale=st.floats(1e-6, 1e6), rank=st.integers(1, 512))
def test_every_scale_survives(alpha, scale, rank):
    """Exactly where some alpha has it, to the last bit otherwise."""

    def written(scale):
        config = peft_config({"a": LoraFactors(torch.zeros(rank, 1), torch.zeros(1, rank), scale)})
        assert config["r"] == rank
        return config["lora_alpha"] / rank

    assert written(alpha / rank) == alpha / rank
    assert abs(written(scale) - scale) <= 2.0**-52 * scale


def test_views_shared_memory_and_gradients(tmp_path):
    wide = torch.randn(8, 6, requires_grad=True)
    factors = {
        "a": LoraFactors(wide[:2], wide.t()[:, :2], 1.0),
        "b": LoraFactors(wide[:2], wide.t()[:, 2:4], 1.0),
    }
    again = read_expert(write_expert(factors, tmp_path / "new")).factors
    assert torch.equal(again["b"].B, wide.t()[:, 2:4])


def test_a_folder_in_use_is_left_alone(make_adapter, tmp_path):
    expert = read_expert(make_adapter())
    folder = tmp_path / "taken"
    folder.mkdir()
    write_expert(expert, folder)  # empty: fine
    (folder / "notes.txt").write_text("mine")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(LoraweaveError, match=r"taken: is not empty; choose another folder, or pass overwrite=True"):
        write_expert(expert, folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    halved = {module: dataclasses.replace(factor, scale=0.5) for module, factor in expert.factors.items()}
    write_expert(halved, folder, overwrite=True)
    assert (folder / "notes.txt").read_text() == "mine"
    assert {factor.scale for factor in read_expert(folder).factors.values()} == {0.5}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "taken"]


def test_overwriting_what_is_mapped(make_adapter):
    """An expert whose tensors are mapped from the folder survives that its files are replaced."""
    folder = make_adapter()
    expert = read_expert(folder)
    before = {module: factor.A.clone() for module, factor in expert.factors.items()}
    doubled = {module: dataclasses.replace(factor, A=factor.A * 2) for module, factor in expert.factors.items()}
    write_expert(doubled, folder, overwrite=True)
    assert all(torch.equal(expert.factors[module].A, tensor) for module, tensor in before.items())
    assert all(torch.equal(factor.A, before[module] * 2) for module, factor in read_expert(folder).factors.items())


def test_nothing_is_left_behind_by_a_failure(tmp_path):
    good = LoraFactors(torch.ones(2, 4), torch.ones(4, 2), 1.0)
    broken = {
        "no LoRA in any module": {},
        r"'a': factors \[2, 4\] and \[4, 3\] do not fit": {"a": LoraFactors(torch.ones(2, 4), torch.ones(4, 3), 1.0)},
        "'a': scale is nan; expected a finite number": {"a": dataclasses.replace(good, scale=float("nan"))},
    }
    for message, factors in broken.items():
        with pytest.raises(LoraweaveError, match=message):
            write_expert(factors, tmp_path / "new")
    (tmp_path / "file").write_text("x")
    with pytest.raises(LoraweaveError, match="file: is a file; expected a folder"):
        write_expert({"a": good}, tmp_path / "file", overwrite=True)
    with pytest.raises(LoraweaveError, match="cannot be written"):
        write_expert({"a": good}, tmp_path / "file" / "below")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_the_files_are_readable_by_others(make_adapter, tmp_path):
    folder = write_expert(read_expert(make_adapter()), tmp_path / "new")
    modes = {path.stat().st_mode for path in folder.iterdir()}
    assert len(modes) == 1
    assert json.loads((folder / "adapter_config.json").read_text())["target_modules"] == sorted(
        read_expert(folder).factors
    )
