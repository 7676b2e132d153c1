"""Headers from strangers: a good one equals the safetensors library's view, a bad one is a one-line error of ours."""

from __future__ import annotations

import json
import pickle
import struct

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save, save_file

from loraweave.errors import LoraweaveError
from loraweave.experts.mapped import open_tensors
from loraweave.experts.weightfile import SIZES, read_header

TENSORS = {
    "b.lora_A.weight": torch.arange(12.0).reshape(3, 4),
    "a.lora_B.weight": torch.ones(5, 3, dtype=torch.bfloat16),
    "scalar": torch.tensor(7, dtype=torch.int64),
}
GOOD = save(TENSORS, metadata={"format": "pt", "note": "ünïcode"})


def written(tmp_path, content: bytes, name="file.safetensors"):
    path = tmp_path / name
    path.write_bytes(content)
    return path


def packed(header: object, data: bytes = b"", *, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def test_a_good_header_is_what_the_library_sees(tmp_path):
    path = written(tmp_path, GOOD)
    header = read_header(path)
    with safe_open(path, "pt") as file:
        assert sorted(header.tensors) == sorted(file.keys())
        assert header.metadata == file.metadata()
        assert all(list(info.shape) == file.get_slice(name).get_shape() for name, info in header.tensors.items())
        assert all(info.dtype == file.get_slice(name).get_dtype() for name, info in header.tensors.items())
    get = open_tensors(header)
    assert all(torch.equal(get(name), tensor) for name, tensor in TENSORS.items())


def test_sizes_agree_with_torch():
    names = {
        torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
        torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
        torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
    }  # fmt: skip
    for dtype, name in names.items():
        assert SIZES[name] == dtype.itemsize
        assert f'"dtype":"{name}"'.encode() in save({"x": torch.zeros(2, dtype=dtype)})


ENTRY = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"", r"file is truncated: its header says at least 8 bytes, file has 0"),
        (b"abc", r"file is truncated"),
        (GOOD[:40], r"file is truncated: its header says at least \d+ bytes, file has 40; fetch it again"),
        (GOOD[:-1], rf"file is truncated: header says {len(GOOD)} bytes, file has {len(GOOD) - 1}; fetch it again"),
        (GOOD + b"x", r"file has 1 bytes more than its header says"),
        (packed(b"{}", length=1 << 60), r"not a safetensors file \(a header of \d+ bytes is declared\)"),
        (packed(b"{" * 100_000), "header is not valid JSON"),
        (packed(b'{"a":' * 100_000), "header is not valid JSON"),
        (packed(b"[" * 100_000), "header is not valid JSON"),
        (packed(b"\xff\xfe{}"), "header is not valid JSON"),
        (packed([1]), "header is not a JSON object"),
        (packed(b' {"a":1}'), "header is not a JSON object"),
        (packed({"__metadata__": {"a": 1}}), "__metadata__ of the header must map strings to strings"),
        (packed({"__metadata__": []}), "__metadata__ of the header must map strings to strings"),
        (packed(b'{"a":1,"a":2}'), "a name occurs twice"),
        (packed({"a": 1}), "tensor 'a' has a malformed header entry"),
        (packed({"a": ENTRY | {"shape": [-2, -2]}}, bytes(16)), "malformed"),
        (packed({"a": ENTRY | {"shape": [2.0, 2]}}, bytes(16)), "malformed"),
        (packed({"a": ENTRY | {"shape": [True, 4]}}, bytes(16)), "malformed"),
        (packed({"a": ENTRY | {"shape": [1 << 70, 0]}}), "malformed"),
        (packed({"a": ENTRY | {"data_offsets": [16, 0]}}, bytes(16)), "malformed"),
        (packed({"a": ENTRY | {"data_offsets": [0]}}, bytes(16)), "malformed"),
        (packed({"a": ENTRY | {"dtype": 3}}, bytes(16)), "malformed"),
        (packed({"a": ENTRY | {"shape": [3, 2]}}, bytes(16)), r"declared as F32 \[3, 2\], 24 bytes, but occupies 16"),
        (packed({"a": ENTRY | {"shape": [1 << 40, 1 << 40]}}, bytes(16)), "but occupies 16"),
        (packed({"a": ENTRY, "b": ENTRY}, bytes(16)), "tensor 'b' overlaps its predecessor"),
        (packed({"a": ENTRY, "b": ENTRY | {"data_offsets": [20, 36]}}, bytes(36)), "'b' leaves a gap of 4 bytes"),
        (packed({"a": ENTRY | {"data_offsets": [1 << 40, (1 << 40) + 16]}}, bytes(16)), "leaves a gap"),
        (packed({"a" * 2000: ENTRY}, bytes(16)), "has 2000 characters, at most 1024 expected"),
        (packed({"a": ENTRY | {"dtype": "F31"}}, bytes(16)), "tensors of dtype F31 cannot be read"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "is a Git LFS pointer, not the weights"),
        (pickle.dumps({"a": 1}) + bytes(64), "pickled weights are refused, they can run code when loaded"),
    ],
    # The content's bytes differ from process to process (safetensors does not order metadata), so they name nothing.
    ids=lambda value: value if isinstance(value, str) else "bytes",
)  # fmt: skip
def test_bad_files(tmp_path, content, match):
    path = written(tmp_path, content)
    with pytest.raises(LoraweaveError, match=match) as caught:
        open_tensors(read_header(path))("a")
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    assert len(message) < 700


def test_a_pickle_by_another_name(tmp_path):
    torch.save({"a": torch.ones(2)}, tmp_path / "weights.safetensors")
    with pytest.raises(LoraweaveError, match=r"weights\.safetensors: pickled weights are refused.*weights_only=True"):
        read_header(tmp_path / "weights.safetensors")


def test_a_truncated_file_is_no_pickle_though_its_first_byte_is_that_of_one(tmp_path):
    (tmp_path / "a.safetensors").write_bytes((0x0280).to_bytes(8, "little") + b'{"a":')
    with pytest.raises(LoraweaveError, match="file is truncated: its header says at least 648 bytes, file has 13"):
        read_header(tmp_path / "a.safetensors")


def test_missing_file(tmp_path):
    with pytest.raises(LoraweaveError, match=r"none\.safetensors: cannot be read \(No such file"):
        read_header(tmp_path / "none.safetensors")


def test_an_empty_tensor_is_no_overlap(tmp_path):
    save_file({"a": torch.ones(2), "empty": torch.ones(0, 3), "z": torch.ones(3)}, tmp_path / "a.safetensors")
    assert read_header(tmp_path / "a.safetensors").tensors["empty"].count == 0


HEADER_END = 8 + int.from_bytes(GOOD[:8], "little")


@st.composite
def damaged(draw):
    """The good file with some header bytes replaced, cut off, or inserted."""
    content = bytearray(GOOD)
    for _ in range(draw(st.integers(0, 3))):
        content[draw(st.integers(0, HEADER_END - 1))] = draw(st.integers(0, 255))
    where = draw(st.integers(0, HEADER_END))
    content[where:where] = draw(st.binary(max_size=4))
    return bytes(content[: draw(st.just(len(content)) | st.integers(0, len(content)))])


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=damaged())
def test_damage_is_an_error_of_ours_or_does_no_harm(tmp_path, content):
    path = written(tmp_path, content)
    try:
        header = read_header(path)
        get = open_tensors(header)
        tensors = {name: get(name) for name in header.tensors}
    except LoraweaveError:
        return
    assert all(tuple(tensors[name].shape) == info.shape for name, info in header.tensors.items())
