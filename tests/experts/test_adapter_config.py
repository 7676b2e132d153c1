"""``adapter_config.json``: types, patterns and paths."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from peft.utils.other import get_pattern_key
from tiny_adapters import edit_config

from loraweave.errors import LoraweaveError
from loraweave.experts.config import Pattern, parse_config, read_config
from loraweave.experts.reader import read_expert

PATH = Path("adapter_config.json")
MINIMAL = {"peft_type": "LORA", "r": 4, "lora_alpha": 8}


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"r": "4"}, "field r must be a finite number, got '4'"),
        ({"r": True}, "field r must be a finite number"),
        ({"r": 0}, "field r must be a positive integer, got '0'"),
        ({"r": -4}, "field r must be a positive integer"),
        ({"r": 2.5}, "field r must be a positive integer"),
        ({"lora_alpha": float("inf")}, "field lora_alpha must be a finite number"),
        ({"lora_alpha": float("nan")}, "field lora_alpha must be a finite number"),
        ({"lora_alpha": []}, "field lora_alpha must be a finite number"),
        ({"use_rslora": "yes"}, "field use_rslora must be true or false, got 'yes'"),
        ({"rank_pattern": ["q"]}, "field rank_pattern must be an object"),
        ({"rank_pattern": {"q": "4"}}, r"field rank_pattern\['q'\] must be a finite number"),
        ({"rank_pattern": {"q": 0}}, "field rank_pattern must be a positive integer"),
        ({"alpha_pattern": {"q(": 4}}, r"field alpha_pattern: pattern 'q\(' is not a regular expression"),
        ({"alpha_pattern": {"(a+)+b": 4}}, r"field alpha_pattern: pattern '\(a\+\)\+b' is too complex; name"),
        ({"alpha_pattern": {"a*" * 5: 4}}, "is too complex"),
        ({"alpha_pattern": {"a" * 600: 4}}, "is too complex"),
        ({"base_model_name_or_path": 3}, "field base_model_name_or_path must be a string"),
        ({"task_type": {}}, "field task_type must be a string"),
        ({"auto_mapping": "x"}, "field auto_mapping must be an object"),
        ({"peft_type": None}, "field peft_type is missing"),
        ({"corda_config": {"cache_file": "/etc/passwd"}}, r"field corda_config\.cache_file names a file outside"),
        ({"corda_config": {"covariance_file": "../../x"}}, r"field corda_config\.covariance_file names a file outside"),
        ({"weights_path": "C:\\x"}, "field weights_path names a file outside"),
        ({"extra_dir": "~/x"}, "field extra_dir names a file outside"),
    ],
)  # fmt: skip
def test_wrong_fields(make_adapter, fields, match):
    folder = make_adapter()
    edit_config(folder, **fields)
    with pytest.raises(LoraweaveError, match=match) as caught:
        read_expert(folder)
    assert str(caught.value).startswith(str(folder / "adapter_config.json"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"\xff", "not valid JSON"),
        (b"[" * 200_000, "not valid JSON"),
        (b"[]", "expected a JSON object, got list"),
        (b"3", "expected a JSON object, got int"),
        (b" " * 10_000_001, "has 10000001 bytes; an adapter's configuration has at most"),
    ],
)
def test_not_a_configuration(tmp_path, content, match):
    path = tmp_path / "adapter_config.json"
    path.write_bytes(content)
    with pytest.raises(LoraweaveError, match=match):
        read_config(path)


def test_a_local_base_is_no_file_of_the_folder():
    assert parse_config(PATH, MINIMAL | {"base_model_name_or_path": "/models/llama"}).base == "/models/llama"


def test_everything_peft_writes_is_known():
    """A new field of the installed peft must be judged: does it change what the LoRA computes?"""
    content = LoraConfig().to_dict()
    known = parse_config(PATH, MINIMAL | {name: "set" for name in content if name.endswith("_config")})
    assert known.unknown_fields() == []
    fields = {name: ["set"] for name in content}
    config = parse_config(PATH, MINIMAL)
    assert type(config)(**vars(config) | {"fields": fields}).unknown_fields() == []


NAME = st.sampled_from(["model", "layers", "0", "1", "self_attn", "q_proj", "q", "mlp-x", "kq_proj", "xq"])
MODULE = st.lists(NAME, min_size=1, max_size=6).map(".".join)
PATTERN = st.one_of(
    MODULE,
    MODULE.map(lambda name: name.replace(".", r"\.").replace("-", r"\-")),
    MODULE.map(lambda name: "^" + name.replace(".", r"\.")),
    MODULE.map(lambda name: name + "$"),
    MODULE.map(lambda name: ".*" + name),
    MODULE.map(lambda name: name.replace("0", r"\d+").replace("q", "(q|k)")),
    MODULE.map(lambda name: name + "|q"),
)


@settings(max_examples=300, deadline=None)
@given(patterns=st.dictionaries(PATTERN, st.integers(1, 99), max_size=5), module=MODULE)
def test_patterns_match_as_in_peft(patterns, module):
    config = parse_config(PATH, MINIMAL | {"rank_pattern": patterns, "alpha_pattern": patterns})
    expected = patterns.get(get_pattern_key(patterns.keys(), module))
    assert config.rank_of(module) == (expected or 4)
    assert config.alpha_of(module) == (expected or 8)


@pytest.mark.parametrize("module", ["q", "a.q", "xq", "a.xq", "q.a", "qx"])
@pytest.mark.parametrize("text", ["q", "^q", r"a\.q", r"^a\.q", "a.q", "(q)", "q$"])
def test_a_pattern_ends_at_a_whole_name(text, module):
    assert Pattern.parse(text).matches(module) == (get_pattern_key([text], module) == text != module or text == module)


def test_thousands_of_patterns_are_quick():
    modules = [f"model.layers.{i}.mlp.experts.{j}.down_proj" for i in range(30) for j in range(40)]
    config = parse_config(PATH, MINIMAL | {"rank_pattern": {"^" + name.replace(".", r"\."): 2 for name in modules}})
    start = time.process_time()
    assert {config.rank_of(module) for module in modules} == {2}
    assert time.process_time() - start < 5


def test_the_worst_pattern_allowed_ends_soon():
    pattern = Pattern.parse("a*" * 4 + "b")
    start = time.process_time()
    assert not pattern.matches("a" * 60 + "." + "a" * 60)
    assert time.process_time() - start < 5


def test_deep_nesting_is_not_our_crash(tmp_path):
    path = tmp_path / "adapter_config.json"
    for depth in (100, 900, 5000):
        path.write_text(json.dumps(MINIMAL)[:-1] + ', "x": ' + '{"a": ' * depth + "1" + "}" * depth + "}")
        try:
            outcome = str(read_config(path).rank)
        except LoraweaveError as error:
            outcome = str(error)
        assert outcome == "4" or "not valid JSON" in outcome
