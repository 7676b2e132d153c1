"""Reading and attaching many experts: each file is read once, checked whole, and does not stay in memory."""

from __future__ import annotations

import copy
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_adapters import edit_tensors, tiny

import loraweave as lw
from loraweave.errors import LoraweaveError
from loraweave.experts import scan
from loraweave.experts.mapped import open_tensors
from loraweave.experts.reader import fingerprint, read_expert
from loraweave.experts.scan import checked_hash
from loraweave.experts.weightfile import hash_files, read_header
from loraweave.mixing.layer import MixingLayer


def written(tmp_path, tensors):
    save_file(tensors, tmp_path / "a.safetensors")
    (tmp_path / "config.json").write_text("{}")
    return read_header(tmp_path / "a.safetensors")


MIXED = {
    "a": torch.randn(70, 30),
    "b": torch.randn(3, 5).bfloat16(),
    "c": torch.randn(7, 9).half(),
    "not a factor": torch.full((4,), torch.nan),
    "z": torch.randn(11),
}


@pytest.mark.parametrize("piece", [8, 256, 1 << 20])
def test_one_pass_gives_the_hash_and_sees_every_value(tmp_path, monkeypatch, piece):
    monkeypatch.setattr(scan, "PIECE", piece)
    names = MIXED.keys() - {"not a factor"}
    header = written(tmp_path, MIXED)
    config = tmp_path / "config.json"
    assert checked_hash(header, names, config) == hash_files([header.path, config])
    for name in names:
        for value in (torch.nan, torch.inf, -torch.inf):
            for place in (0, -1):
                damaged = {key: tensor.clone() for key, tensor in MIXED.items()}
                damaged[name].view(-1)[place] = value
                with pytest.raises(LoraweaveError, match=f"tensor '{name}' has NaN or infinite values"):
                    checked_hash(written(tmp_path, damaged), names, config)


def test_the_largest_finite_values_are_finite(tmp_path):
    big = {str(dtype): torch.full((9,), torch.finfo(dtype).max, dtype=dtype) for dtype in (torch.float16, torch.float)}
    header = written(tmp_path, big)
    assert checked_hash(header, big.keys(), tmp_path / "config.json")


def test_numbers_at_odd_places_are_read(tmp_path):
    """The format allows a tensor to begin at any byte."""
    values = torch.arange(5, dtype=torch.float32)
    entries = {
        "one": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
        "x": {"dtype": "F32", "shape": [5], "data_offsets": [1, 21]},
    }
    text = json.dumps(entries).encode()
    (tmp_path / "a").write_bytes(len(text).to_bytes(8, "little") + text + b"\x07" + values.numpy().tobytes())
    get = open_tensors(read_header(tmp_path / "a"))
    assert torch.equal(get("x"), values)
    assert get("one").item() == 7


def test_a_file_that_changed_since_its_header_was_read(tmp_path):
    header = written(tmp_path, {"a": torch.ones(100)})
    header.path.write_bytes(header.path.read_bytes()[:-4])
    with pytest.raises(LoraweaveError, match=r"a\.safetensors: has \d+ bytes now, \d+ when its header was read"):
        open_tensors(header)
    with pytest.raises(LoraweaveError, match=r"a\.safetensors: became shorter while it was read"):
        checked_hash(header, {"a"}, tmp_path / "config.json")


def test_an_expert_outlives_its_file_and_never_changes_it(make_adapter):
    folder = make_adapter()
    expert = read_expert(folder)
    path = folder / "adapter_model.safetensors"
    content, module = path.read_bytes(), "model.layers.0.self_attn.q_proj"
    before = load_file(path)[f"base_model.model.{module}.lora_A.weight"]
    for twin in (copy.deepcopy(expert), pickle.loads(pickle.dumps(expert))):
        assert twin.factors.keys() == expert.factors.keys()
        assert torch.equal(twin.factors[module].A, before)
        assert twin.factors[module].scale == expert.factors[module].scale
    expert.factors[module].A.mul_(2)
    assert path.read_bytes() == content
    path.unlink()
    assert torch.equal(expert.factors[module].A, 2 * before)


def test_a_bad_expert_among_many_is_named_and_nothing_is_attached(make_adapter):
    folders = {f"e{i}": make_adapter(name=f"e{i}") for i in range(9)}
    edit_tensors(folders["e7"], lambda tensors: next(iter(tensors.values())).view(-1)[3].fill_(torch.nan))
    model = tiny("llama")
    with pytest.raises(LoraweaveError, match=r"e7.*has NaN or infinite values"):
        lw.attach(model, folders)
    assert not any(isinstance(module, MixingLayer) for module in model.modules())
    assert all(p.requires_grad for p in model.parameters())
    del folders["e7"]
    mixture = lw.attach(model, folders, lw.Sum())
    assert mixture.experts == tuple(folders)
    assert [s.sha256 for s in mixture.sources] == [fingerprint(folder) for folder in folders.values()]
    for path, layer in mixture.layers.items():
        for number, folder in enumerate(folders.values()):
            expected, got = read_expert(folder).factors[path], layer.bank.factors(number)
            assert got is not None
            assert torch.equal(got.A, expected.A)
            assert torch.equal(got.B, expected.B)
            assert got.scale == expected.scale


MEASURE = """
import sys
from pathlib import Path
import torch
import loraweave as lw

def status(field):
    line = next(l for l in Path("/proc/self/status").read_text().splitlines() if l.startswith(field + ":"))
    return int(line.split()[1]) * 1024

torch.set_num_threads(1)
model = torch.nn.ModuleDict({f"m{i}": torch.nn.Linear(1024, 1024) for i in range(4)})
folders = sorted(Path(sys.argv[1]).iterdir())
lw.attach(model, folders[:1], lw.Sum()).detach()
before = status("VmRSS")
mixture = lw.attach(model, folders, lw.Sum())
print(status("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux' account of memory")
def test_files_are_not_held_in_memory_beside_the_bank(tmp_path):
    size = 0
    for i in range(24):
        factors = {f"m{m}": lw.LoraFactors(torch.randn(64, 1024), torch.randn(1024, 64), 1.0) for m in range(4)}
        folder = lw.write_expert(lw.Expert(f"e{i}", factors), tmp_path / f"e{i}")
        size += (folder / "adapter_model.safetensors").stat().st_size
    command = [sys.executable, "-c", MEASURE, str(tmp_path)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    grown = int(done.stdout) / size
    assert grown < 1.35, f"{grown:.2f} times the files; beside one copy, four files may be mapped at a time"
