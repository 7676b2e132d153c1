"""Rows in, examples out; whatever is wrong is named by file and line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from loraweave.errors import LoraweaveError
from loraweave.evaluation.data import Example, read_examples


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return path


def test_reads_a_file_in_order(tmp_path: Path) -> None:
    rows = [{"input": f"q{n}", "target": f"ü{n}", "label": n} for n in range(5)]
    path = write(tmp_path / "a.jsonl", rows[0], "", rows[1], "   ", *rows[2:])
    expected = [Example(f"q{n}", f"ü{n}", (f"ü{n}",)) for n in range(5)]
    assert read_examples(path) == expected
    assert read_examples(str(path)) == expected
    assert read_examples(path, limit=2) == expected[:2]
    assert read_examples(rows) == expected
    assert read_examples(expected) == expected


@pytest.mark.parametrize("key", ["references", "answers"])
def test_references_begin_with_the_target_and_repeat_nothing(key: str) -> None:
    assert read_examples([{"input": "q", "target": "a", key: ["b", "a", "b"]}])[0].references == ("a", "b")
    assert read_examples([{"input": "q", "target": "a", key: []}])[0].references == ("a",)
    assert read_examples([{"input": "q", "target": "a", key: None}])[0].references == ("a",)


def test_answers_count_where_references_are_empty_by_schema() -> None:
    # A datasets.Dataset gives every row every column, with None where there is nothing.
    row = {"input": "q", "target": "a", "references": None, "answers": ["b"]}
    assert read_examples([row])[0].references == ("a", "b")


def test_reads_a_dataset() -> None:
    datasets = pytest.importorskip("datasets")
    rows = {"input": ["q1", "q2"], "target": ["a1", "a2"], "references": [["x"], None]}
    data = datasets.Dataset.from_dict(rows)
    assert read_examples(data) == [Example("q1", "a1", ("x",)), Example("q2", "a2")]
    with pytest.raises(LoraweaveError, match=r"keys train, test.*choose one split"):
        read_examples(datasets.DatasetDict({"train": data, "test": data}))


def test_reads_what_is_only_indexable() -> None:
    class Rows:
        def __getitem__(self, n: int) -> dict[str, str]:
            if n > 1:
                raise IndexError
            return {"input": f"q{n}", "target": "a"}

    assert [example.input for example in read_examples(Rows())] == ["q0", "q1"]  # type: ignore[arg-type]


def test_a_mark_at_the_start_is_not_data(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"input": "q", "target": "a"}\r\n')
    assert read_examples(path) == [Example("q", "a")]


def test_limit_reads_no_further(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {"input": "q", "target": "a"}, "broken")
    assert len(read_examples(path, limit=1)) == 1


GOOD = {"input": "q", "target": "a"}
BAD_ROWS = [
    ({"input": "q", "output": "a"}, r"no 'target'; the row has 'input', 'output'"),
    ({}, r"no 'input'; the row has no keys"),
    ({"input": "q", "target": 3}, r"'target' must be text, got int \(3\)"),
    ({"input": None, "target": "a"}, r"'input' must be text, got NoneType"),
    ({"input": " \n", "target": "a"}, r"'input' is blank"),
    ({**GOOD, "references": "a"}, r"'references' must be a list of texts, got 'a'"),
    ({**GOOD, "answers": ["a", 1]}, r"'answers' must be a list of texts"),
    (["q", "a"], r"expected an object with 'input' and 'target', got list"),
    (17, r"expected an object .* got int"),
]


@pytest.mark.parametrize(("row", "message"), BAD_ROWS)
def test_bad_rows_are_named_by_line_and_by_number(tmp_path: Path, row: Any, message: str) -> None:
    path = write(tmp_path / "a.jsonl", GOOD, "", row)
    with pytest.raises(LoraweaveError, match=r"a\.jsonl:3: " + message) as caught:
        read_examples(path)
    assert "\n" not in str(caught.value)
    with pytest.raises(LoraweaveError, match=r"^row 2: " + message):
        read_examples([GOOD, row])


@pytest.mark.parametrize("line", ["{'input': 1}", '{"input": "q", "target": "a"', "[" * 100_000, "input\ttarget"])
def test_bad_json_is_named_by_line(tmp_path: Path, line: str) -> None:
    with pytest.raises(LoraweaveError, match=r"a\.jsonl:2: not JSON .*expected one object a line") as caught:
        read_examples(write(tmp_path / "a.jsonl", GOOD, line))
    assert len(str(caught.value)) < 400


def test_bad_files(tmp_path: Path) -> None:
    with pytest.raises(LoraweaveError, match=r"no such data file: .*missing\.jsonl"):
        read_examples(tmp_path / "missing.jsonl")
    with pytest.raises(LoraweaveError, match="cannot read the data file"):
        read_examples(tmp_path)
    (tmp_path / "empty.jsonl").write_text("\n \n")
    with pytest.raises(LoraweaveError, match=r"empty\.jsonl' is empty"):
        read_examples(tmp_path / "empty.jsonl")
    (tmp_path / "latin.jsonl").write_bytes('{"input": "ü", "target": "a"}'.encode("latin-1"))
    with pytest.raises(LoraweaveError, match=r"latin\.jsonl: not UTF-8"):
        read_examples(tmp_path / "latin.jsonl")


def test_bad_sources() -> None:
    with pytest.raises(LoraweaveError, match="the data is empty"):
        read_examples([])
    with pytest.raises(LoraweaveError, match=r"expected a \.jsonl file or rows of data, got int"):
        read_examples(3)  # type: ignore[arg-type]
    with pytest.raises(LoraweaveError, match="limit"):
        read_examples([GOOD], limit=0)
