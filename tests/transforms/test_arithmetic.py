"""Expressions to weights, weights to one LoRA, and what is refused."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from merging import alike, dense, paths, total, trio
from torch.testing import assert_close

import loraweave as lw
from loraweave.transforms.expression import read_expression


@pytest.mark.parametrize(
    ("text", "weights"),
    [
        ("a", {"a": 1.0}),
        ("(a + b) / 2", {"a": 0.5, "b": 0.5}),
        ("a - 0.4*b", {"a": 1.0, "b": -0.4}),
        ("king - man + woman", {"king": 1.0, "man": -1.0, "woman": 1.0}),
        ("-a + +b", {"a": -1.0, "b": 1.0}),
        ("-(a - 2*(b - a)/4)", {"a": -1.5, "b": 0.5}),
        ("a*0.5*2 + (1 - 3)*b", {"a": 1.0, "b": -2.0}),
        ("(a + b + c)/3", {"a": 1 / 3, "b": 1 / 3, "c": 1 / 3}),
        ("a - a + b", {"a": 0.0, "b": 1.0}),
        ("`my-lora` - 'some.one' * 1e-1", {"my-lora": 1.0, "some.one": -0.1}),
        ('"two words" + `a/b`', {"two words": 1.0, "a/b": 1.0}),
        ("  a\n\t+ b ", {"a": 1.0, "b": 1.0}),
        ("größe - ﬁt", {"größe": 1.0, "ﬁt": -1.0}),
    ],
)
def test_weights(text: str, weights: dict[str, float]) -> None:
    assert read_expression(text) == weights
    assert list(read_expression(text)) == list(weights)


NUMBERS = st.floats(-4, 4).map(lambda x: round(x, 3))


@given(
    st.recursive(
        st.sampled_from(["a", "b", "`c-1`"]),
        lambda inner: (
            st.tuples(inner, st.sampled_from(["+", "-"]), inner).map(lambda t: f"({t[0]} {t[1]} {t[2]})")
            | st.tuples(NUMBERS, inner).map(lambda t: f"({t[0]}) * {t[1]}")
            | st.tuples(inner, NUMBERS.filter(bool)).map(lambda t: f"{t[0]} / ({t[1]})")
            | inner.map(lambda e: f"-{e}")
        ),
        max_leaves=8,
    )
)
def test_weights_are_what_python_computes(text: str) -> None:
    """With unit vectors for the experts; only here, on text made here, is an expression evaluated."""
    units = dict(zip("abc", torch.eye(3, dtype=torch.float64), strict=True))
    expected = eval(text.replace("`c-1`", "c"), {"__builtins__": {}}, units)
    read = read_expression(text)
    found = torch.tensor([read.get(name, 0.0) for name in ("a", "b", "c-1")], dtype=torch.float64)
    assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "it is empty"),
        ("  ", "it is empty"),
        ("3", "it names no expert"),
        ("a +", "character 4: not an expression"),
        ("é + (b", "character 5: not an expression"),
        ("é + b*c", "character 7: experts cannot be multiplied"),
        ("  a + * b", "character 7: not an expression"),
        ("a b", "character 3: not an expression"),
        ("my-lora -", "names like 'my-lora' stand in quotes or backticks"),
        ("a * b", "character 5: experts cannot be multiplied"),
        ("a / b", "character 5: cannot divide by an expert"),
        ("a / (2 - 2)", "character 6: division by zero"),
        ("a + 1", "character 5: '1' is a number and cannot be added to an expert; use '*'"),
        ("2*3 - a", "character 1: '2*3' is a number"),
        ("a**2", "'a**2' cannot be used here"),
        ("a.b", "a name with dots stands in quotes or backticks"),
        ("__import__('os')", "cannot be used here"),
        ("[a for a in b]", "cannot be used here"),
        ("(lambda: a)()", "cannot be used here"),
        ("a if b else c", "cannot be used here"),
        ("a := b", "not an expression"),
        ("f'{a}'", "cannot be used here"),
        ("b'a'", "neither a finite number nor a name"),
        ("True * a", "'True' is neither a finite number nor a name"),
        ("1j * a", "neither a finite number nor a name"),
        ("1e999 * a", "'1e999' is neither a finite number nor a name"),
        ("1e308 * 10 * a", "comes to more than a number can hold"),
        ("a / 1e-308 / 1e-10", "comes to more than a number can hold"),
        ("a # + b", "character 3: '#' has no meaning here"),
        ("a \\\n+ b", "character 3:"),
        ("`a", "character 1: '`' has no meaning here"),
        ("\0a", "character 1:"),
        ("-" * 5000 + "a", "nested too deeply"),
        ("(" * 500 + "a" + ")" * 500, "not an expression"),
        ("a+" * 6000 + "a", "longer than 10,000 characters"),
    ],
)
def test_refused_in_one_line(text: str, said: str) -> None:
    with pytest.raises(lw.LoraweaveError) as caught:
        read_expression(text)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value).replace(repr(text), "")
    assert len(str(caught.value)) < 400


# ---------------------------------------------------------------- merging


@pytest.mark.parametrize("text", ["(ant + bee) / 2", "ant - 0.4*bee", "ant - bee + cat", "-cat"])
def test_in_deltas_it_is_the_weighted_sum(text: str) -> None:
    experts = trio()
    merged = lw.arithmetic(text, experts)
    weights = dict.fromkeys(experts, 0.0) | read_expression(text)
    for path in paths(experts):
        if path in merged.factors:
            assert_close(dense(merged, path), total(experts, path, weights))
        else:
            assert not total(experts, path, weights).any()


def test_in_factors_a_minus_turns_one_factor() -> None:
    """PEM's analogy: A is added as it is, B with its sign."""
    experts = alike(scales=(2.0, 2.0, 2.0))
    merged = lw.arithmetic("0.5*ant - 0.4*bee", experts, space="factors")
    for path in paths(experts):
        ant, bee = experts["ant"].factors[path], experts["bee"].factors[path]
        assert_close(dense(merged, path), 2.0 * (0.5 * ant.B - 0.4 * bee.B) @ (0.5 * ant.A + 0.4 * bee.A))
        assert merged.factors[path].rank == 2
    negated = lw.arithmetic("-ant", experts, space="factors")
    assert_close(dense(negated, "head"), -dense(experts["ant"], "head"))


def test_names_are_looked_up() -> None:
    experts = {"my-lora": alike()["ant"], "b": alike()["bee"]}
    assert_close(
        dense(lw.arithmetic("`my-lora`", experts), "head"),
        dense(experts["b"], "head") * 0 + dense(experts["my-lora"], "head"),
    )
    with pytest.raises(lw.LoraweaveError, match="in expressions 'my-lora' stands in quotes or backticks: `my-lora`"):
        lw.arithmetic("my-lora", experts)
    with pytest.raises(lw.LoraweaveError, match="unknown expert 'ants'; did you mean 'ant'"):
        lw.arithmetic("ants - bee", alike())
    with pytest.raises(lw.LoraweaveError, match="unknown expert 'c'"):
        lw.arithmetic("ant + c", list(alike().values()))


def test_experts_that_are_not_named_are_not_read() -> None:
    assert lw.arithmetic("ant", alike() | {"gone": "no/such/folder/at/all"}).factors


def test_no_weight_is_left() -> None:
    with pytest.raises(lw.LoraweaveError, match="every expert has weight 0"):
        lw.arithmetic("ant - ant", alike())
    with pytest.raises(lw.LoraweaveError, match="unknown arithmetic space 'factor'; did you mean 'factors'"):
        lw.arithmetic("ant", alike(), space="factor")  # type: ignore[arg-type]
