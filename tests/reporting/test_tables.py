"""Tables say what results.json says, mark the best, and fit the terminal."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from loraweave.errors import LoraweaveError
from loraweave.evaluation.comparison import Run, single, summarise
from loraweave.reporting.tables import results_table, summary_rows, to_markdown

OWN = {"qa": 80.0, "nli": 50.0}


def results() -> dict[str, Any]:
    return summarise(
        [
            Run("base", {"qa": 20.0, "nli": 10.0}),
            Run(single("qa"), {"qa": 80.0, "nli": 48.0}),
            Run("sum", {"qa": 60.04, "nli": 48.0}),
            Run("mole", {"qa": 60.0, "nli": 40.0}, seed=0),
            Run("mole", {"qa": 60.0, "nli": 44.0}, seed=1),
            Run(single("nli"), {"qa": 8.0, "nli": 50.0}),
        ],
        OWN,
    )


def lines(table: Any, width: int = 200) -> list[list[str]]:
    console = Console(file=io.StringIO(), width=width)
    console.print(table)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert max(map(len, text.splitlines())) <= width
    return [
        line.replace(" ± ", "±").replace("each expert alone", "own").split()
        for line in text.splitlines()
        if line.strip()
    ]


def test_methods_as_rows() -> None:
    rows = lines(results_table(results(), layout="methods"))
    assert rows[0] == ["method", "qa", "nli", "retention"]
    assert rows[2:] == [
        ["base", "20.0", "10.0", "0.225"],
        # 60.04 and 60.00 look the same, so both are marked.
        ["sum", "60.0*", "48.0*", "0.855*"],
        ["mole", "60.0*", "42.0", "0.795±0.028"],
        ["only:qa", "80.0", "48.0", "0.980"],
        ["only:nli", "8.0", "50.0", "0.550"],
        ["own", "80.0", "50.0", "1.000"],
    ]


def test_tasks_as_rows_for_narrow_terminals() -> None:
    rows = lines(results_table(results(), layout="tasks"))
    assert rows[0] == ["task", "base", "sum", "mole", "only:qa", "own"]
    assert rows[2:] == [
        ["qa", "20.0", "60.0*", "60.0*", "80.0", "80.0"],
        ["nli", "10.0", "48.0*", "42.0", "48.0", "50.0"],
        ["retention", "0.225", "0.855*", "0.795", "0.980", "1.000"],
        ["±over", "seeds", "0.028"],
    ]


def test_auto_takes_what_fits() -> None:
    many = {f"a_rather_long_task_name_{n}": 50.0 for n in range(12)}
    found = summarise([Run("sum", many), Run("mole", many, seed=0), *(Run(single(t), many) for t in many)], many)
    # One line a task, none of them broken.
    shown = lines(results_table(found, width=78), 78)
    assert [row[0] for row in shown if row[0] in many] == list(many)
    assert lines(results_table(found, width=1000), 1000)[0][0] == "method"
    assert lines(results_table(results(), width=78), 78)[0][0] == "method"


def test_markdown() -> None:
    assert to_markdown(results()).splitlines() == [
        "| method | qa | nli | retention |",
        "| --- | ---: | ---: | ---: |",
        "| base | 20.0 | 10.0 | 0.225 |",
        "| sum | **60.0** | **48.0** | **0.855** |",
        "| mole | **60.0 ± 0.0** | 42.0 ± 2.8 | 0.795 ± 0.028 |",
        "| only:qa | 80.0 | 48.0 | 0.980 |",
        "| only:nli | 8.0 | 50.0 | 0.550 |",
        "| each expert alone | 80.0 | 50.0 | 1.000 |",
    ]
    assert "| mole | **60.0** | 42.0 | 0.795 ± 0.028 |" in to_markdown(results(), deviations=False)


def test_nothing_to_beat_nothing_marked() -> None:
    alone = summarise([Run("sum", OWN), Run(single("qa"), OWN)], OWN)
    assert "**" not in to_markdown(alone)


def test_names_are_not_markup() -> None:
    odd = {"[red]task[/]": 5.0, "a|b": 5.0}
    found = summarise([Run("[bold]", odd), Run("sum", odd)], odd)
    rows = lines(results_table(found, layout="methods"))
    assert rows[0][1:3] == ["[red]task[/]", "a|b"]
    assert rows[2][0] == "[bold]"
    assert lines(results_table(found, layout="tasks"))[0][1] == "[bold]"
    assert "a\\|b" in to_markdown(found)


def costly(evaluations: int = 0, seconds: float = 0.0) -> dict[str, Any]:
    return {
        "train_seconds": seconds,
        "evaluations": evaluations,
        "examples_seen": 0,
        "seconds_per_item": 0.012,
        "peak_memory_gb": 0.5,
        "peak_gpu_memory_gb": None,
    }


def summarised(differences: dict[str, Any]) -> dict[str, Any]:
    return results() | {
        "costs": {"base": costly(), "sum": costly(), "mole": costly(100, 3.25)},
        "differences": differences,
    }


def against(low: float, high: float, **more: Any) -> dict[str, Any]:
    return {"rival": "sum", "difference": (low + high) / 2, "low": low, "high": high, **more}


def test_summary_has_the_best_first_and_what_each_took() -> None:
    rows = summary_rows(summarised({}))
    assert rows == [
        ["sum", "54.0", "0.855", "-", "-", "-", "12", "0.50"],
        ["mole", "51.0", "0.795 ± 0.028", "-", "3.2", "100", "12", "0.50"],
        ["base", "15.0", "0.225", "-", "-", "-", "12", "0.50"],
    ]


def test_a_star_is_for_what_is_clear_in_either_direction() -> None:
    """And not for what rests on too few items, or was made before that was known."""
    found = {
        "sum": against(0.1, 0.3, clear=True),
        "mole": against(-0.3, -0.1, clear=True),
        "base": against(0.2, 0.4, clear=False),
    }
    shown = {row[0]: row[3] for row in summary_rows(summarised(found))}
    assert shown == {"sum": "+0.20 [+0.10,+0.30]*", "mole": "-0.20 [-0.30,-0.10]*", "base": "+0.30 [+0.20,+0.40]"}
    assert summary_rows(summarised({"sum": against(0.1, 0.3)}))[0][3] == "+0.20 [+0.10,+0.30]"


def test_what_takes_time_but_no_evaluations_says_so() -> None:
    """Merging learns nothing at one strength, and yet it is not free."""
    found = summarised({})
    found["costs"]["sum"] = {**costly(), "train_seconds": 7.04}
    assert summary_rows(found)[0][4:6] == ["7.0", "-"]


def test_who_is_best_of_a_few_items_is_not_marked() -> None:
    found = results() | {"items": {"qa": 5, "nli": 6}}
    rows = {row[0]: row[1:] for row in lines(results_table(found, layout="methods"))}
    assert rows["sum"] == ["60.0", "48.0*", "0.855*"]
    assert "| sum | 60.0 | **48.0** | **0.855** |" in to_markdown(found)
    rows = {row[0]: row[1:] for row in lines(results_table(found | {"items": {"qa": 2, "nli": 3}}, layout="methods"))}
    assert rows["sum"] == ["60.0", "48.0", "0.855"]


def test_what_was_learned_per_task_is_told_below() -> None:
    said = "Learned anew for each task, from its examples alone: mole."
    assert to_markdown(results() | {"per_task": ["mole"]}).endswith(f"\n\n{said}\n")
    assert "Learned" not in to_markdown(results() | {"per_task": []})


@pytest.mark.parametrize("bad", [{}, {"scores": {}}, {"scores": {"sum": {"qa": {"mean": 1.0}}}}])
def test_other_files_are_refused(bad: dict[str, Any]) -> None:
    for call in (results_table, to_markdown):
        with pytest.raises(LoraweaveError, match=r"is this a results\.json"):
            call(bad)
