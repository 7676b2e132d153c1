"""The command that makes the text recipes' rows, run on tiny local copies of the sets."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import rows as command
from public_copies import bbh, copy_of, e2e, place_of, qnli, row, write_rows
from row_files import Numbers, Wanted, alone, chosen_rows, wanted_by
from row_sets import SETS
from row_sources import local_files

from loraweave.cli import main as loraweave
from loraweave.evaluation.data import read_examples
from loraweave.recipe import load_recipe

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "recipes" / "mole").glob("**/*.yaml"))
TEXT = [path for path in RECIPES if re.search(r"(train|test): (\.\./)?data/", path.read_text())]


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.fixture
def recipes(tmp_path: Path) -> Path:
    """A copy of the recipes, to make rows beside."""
    shutil.copytree(ROOT / "recipes" / "mole", tmp_path / "mole", ignore=shutil.ignore_patterns("data"))
    return tmp_path / "mole"


@pytest.fixture
def copies(tmp_path: Path) -> Path:
    return tmp_path / "copies"


def made(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def copy_bbh(copies: Path, *tasks: str, kind: str = ".json", count: int = 12) -> None:
    """As upstream has it, or another form of one file a task."""
    for task in tasks:
        write_rows(copies / "bbh" / f"{task}{kind}", [bbh(number, task) for number in range(count)])


def tasks_of(recipe: Path) -> list[str]:
    return list(load_recipe(recipe).data.tasks)


def test_all_text_recipes_are_looked_at() -> None:
    numbers = ("n008", "n024", "n048", "n128")
    table03 = ("bbh", "closed_book_qa", "nli", "struct_to_text", "translation")
    assert {name(path) for path in TEXT} == {
        *(f"recipes/mole/table03/{one}.yaml" for one in table03),
        *(f"recipes/mole/table06/{one}.yaml" for one in numbers),
        *(f"recipes/mole/{one}.yaml" for one in ("table04", "table05", "table07", "table08", "figure05", "figure07")),
    }


def test_every_file_of_every_text_recipe_can_be_made() -> None:
    """``wanted_by`` refuses any other; and no set is there that no recipe asks for."""
    wanted = wanted_by(TEXT)
    assert {one.path.parent.resolve() for one in wanted} == {ROOT / "recipes" / "mole" / "data"}
    assert {one.name for one in wanted} == set(SETS)
    assert len(wanted) == len({one.path for one in wanted})


@pytest.mark.parametrize("path", [path for path in RECIPES if path not in TEXT], ids=name)
def test_other_recipes_name_no_rows(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main([str(path)]) == 2
    assert "names no files of rows" in capsys.readouterr().err


@pytest.mark.parametrize("path", TEXT, ids=name)
def test_recipes_name_the_command(path: Path) -> None:
    """In the header, and as the origin of every file of rows: for this very recipe, with arguments that parse."""
    recipe, text = load_recipe(path), path.read_text()
    origins = [origin for pattern, origin in recipe.origins.items() if "data/" in pattern]
    assert len(origins) == 1
    for said in (re.search(r"^#   (python .*?)(?:  #.*)?$", text, re.MULTILINE), re.match(r"(.*?) \(", origins[0])):
        assert said is not None
        assert shlex.split(said[1]) == ["python", "scripts/recipes/rows.py", name(path)]
    for set_id in {one.set.repo for one in wanted_by([path])} - {"lukaemon/bbh"}:
        assert set_id in origins[0]


def test_rows_for_every_text_recipe(recipes: Path, copies: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All at once, from copies in every form; then nothing of data/ is missing, and everything can be read."""
    for number, one in enumerate(SETS):
        if SETS[one].repo == "lukaemon/bbh":
            copy_bbh(copies, one)
        elif SETS[one].repo.startswith("wmt/"):  # one copy, for both directions
            copy_of(one, copies, ".parquet")
        elif SETS[one].repo == "nyu-mll/glue":
            copy_of(one, copies, ".csv")
        else:
            copy_of(one, copies, ".jsonl" if number % 2 else ".parquet")
    paths = [recipes / path.relative_to(ROOT / "recipes" / "mole") for path in TEXT]
    assert command.main([*map(str, paths), "--from", str(copies)]) == 0
    said = capsys.readouterr().out
    assert "dyck_languages.test.jsonl: 7 rows of lukaemon/bbh (dyck_languages), test\n" in said
    assert "anli_r1.train.jsonl: 12 rows (all there are; 200 were asked for) of facebook/anli" in said
    for path in paths:
        loraweave(["validate", str(path)])
        assert "/data/" not in capsys.readouterr().out
    for one in wanted_by(paths):
        examples = read_examples(one.path)
        assert {example.input for example in examples} == {found["input"] for found in made(one.path)}
    count = {path.name: len(made(path)) for path in (recipes / "data").glob("*.jsonl")}
    assert count["boolean_expressions.train.jsonl"] == 5
    assert count["commongen.test.jsonl"] == count["e2enlg.test.jsonl"] == 6
    assert count["tqa.test.jsonl"] == 12
    assert {path.name for path in (recipes / "data").iterdir()} - set(count) == {"rows.json", ".rows.lock"}


def test_answers_of_one_input_stand_together(recipes: Path, copies: Path) -> None:
    for one in ("commongen", "dart", "e2enlg", "webnlg"):
        copy_of(one, copies)
    assert command.main([str(recipes / "table03" / "struct_to_text.yaml"), "--from", str(copies)]) == 0
    (inn,) = [found for found in made(recipes / "data" / "e2enlg.test.jsonl") if "name[Inn 2 of" in found["input"]]
    assert inn["target"] == "Sentence 4 of test."
    assert inn["references"] == [
        "Sentence 4 of test.",
        "Other sentence 4 of test.",
        "Sentence 5 of test.",
        "Other sentence 5 of test.",
    ]
    (ski,) = [found for found in made(recipes / "data" / "commongen.train.jsonl") if "train3, ski" in found["input"]]
    assert ski["references"] == ["Sentence 6 of train.", "Sentence 7 of train."]
    assert all(set(found) == {"input", "target"} for found in made(recipes / "data" / "dart.train.jsonl"))


def test_rows_of_one_input_stay_apart_where_one_answer_is_right() -> None:
    """Two judgements of one input are two items of a classification set, not two right answers."""
    wanted = Wanted(Path("qnli.test.jsonl"), "qnli", "test")
    items = [SETS["qnli"].reader(qnli(1, "validation") | {"label": label}) for label in (0, 1, -1)]
    assert sorted(found["target"] for found in chosen_rows(wanted, items, Numbers())) == ["no", "yes"]


def test_unlabelled_rows_are_left_out(recipes: Path, copies: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """GLUE's own test split is never opened; of another, rows with label -1 are left out and counted."""
    glue = copies / "glue" / "qnli"
    write_rows(glue / "test.jsonl", [qnli(number, "test") for number in range(3)])
    write_rows(glue / "validation.jsonl", [qnli(number, "validation") for number in range(3)] + [qnli(9, "test")])
    recipe = [str(recipes / "table05.yaml"), "--only", "qnli", "--from", str(copies)]
    assert command.main(recipe) == 0
    assert "qnli.test.jsonl: 3 rows of nyu-mll/glue (qnli), validation; 1 without a question or an answer left out" in (
        capsys.readouterr().out
    )
    (recipes / "data" / "qnli.test.jsonl").unlink()
    write_rows(glue / "validation.jsonl", [qnli(number, "test") for number in range(3)])
    assert command.main(recipe) == 2
    assert "none of 3 rows has a question and an answer" in capsys.readouterr().err


def test_one_split_is_cut_in_two(recipes: Path, copies: Path) -> None:
    """No tested input is learned from, though an input comes twice; all others are tested."""
    recipe = recipes / "table03" / "bbh.yaml"
    copy_bbh(copies, *tasks_of(recipe))
    twice = [bbh(number, "ruin_names") for number in range(12)] * 2
    write_rows(copies / "bbh" / "ruin_names.json", twice)
    assert command.main([str(recipe), "--from", str(copies)]) == 0
    for one in tasks_of(recipe):
        learned = [found["input"] for found in made(recipes / "data" / f"{one}.train.jsonl")]
        tested = [found["input"] for found in made(recipes / "data" / f"{one}.test.jsonl")]
        assert len(set(learned)) == len(learned) == 5
        assert len(tested) == (14 if one == "ruin_names" else 7)
        assert not set(learned) & set(tested)
        assert set(learned) | set(tested) == {bbh(number, one)["input"] for number in range(12)}


def test_what_is_drawn_hangs_on_the_seed(recipes: Path, copies: Path, tmp_path: Path) -> None:
    """And on nothing else: neither on what other recipes ask for, nor on the form of the copies."""
    recipe = recipes / "table08.yaml"
    for one in tasks_of(recipe):
        if SETS[one].repo != "lukaemon/bbh":
            copy_of(one, copies, count=30)
            copy_of(one, tmp_path / "others", ".parquet", count=30)
    copy_bbh(copies, *tasks_of(recipes / "table06" / "n008.yaml"))
    copy_bbh(tmp_path / "others", *tasks_of(recipe), kind=".jsonl")

    def rows_of(out: str, *arguments: str, paths: tuple[Path, ...] = (recipe,)) -> dict[str, bytes]:
        few = ["--train-rows", "4", "-o", str(tmp_path / out), *arguments]
        assert command.main([*map(str, paths), *few]) == 0
        return {path.name: path.read_bytes() for path in (tmp_path / out).glob("*.jsonl")}

    first = rows_of("first", "--from", str(copies))
    assert first == rows_of("again", "--from", str(tmp_path / "others"))
    more = rows_of("more", "--from", str(copies), paths=(recipes / "table06" / "n008.yaml", recipe))
    assert more.keys() > first.keys()
    assert all(more[one] == content for one, content in first.items())
    other = rows_of("other", "--from", str(copies), "--seed", "1")
    assert all(other[one] != content for one, content in first.items())
    both = rows_of("both", "--from", str(copies), "--both", "--only", "qnli", "wnli")
    assert {*both} == {"qnli.train.jsonl", "qnli.test.jsonl", "wnli.train.jsonl", "wnli.test.jsonl"}
    few = rows_of("few", "--from", str(copies), "--test-rows", "3")
    test = "boolean_expressions.test.jsonl"
    assert few[test].splitlines() == first[test].splitlines()[:3]


def test_large_splits_are_drawn_from_all_over(copies: Path, tmp_path: Path, recipes: Path) -> None:
    """Not read whole: of 400 row groups, 50 at random; the same ones every time."""
    for split, count in (("train", 4000), ("test", 5)):
        place = place_of(SETS["wmt14_en_fr"], split, copies).with_suffix(".parquet")
        write_rows(place, [row("wmt14_en_fr", number, split) for number in range(count)], group=10)
    recipe = str(recipes / "table03" / "translation.yaml")
    few = ["--only", "wmt14_en_fr", "--from", str(copies), "--train-rows", "60"]
    for out in ("one", "two"):
        assert command.main([recipe, *few, "-o", str(tmp_path / out)]) == 0
    train = "wmt14_en_fr.train.jsonl"
    assert (tmp_path / "one" / train).read_bytes() == (tmp_path / "two" / train).read_bytes()
    numbers = [int(found["target"].split()[2]) for found in made(tmp_path / "one" / train)]
    assert len(set(numbers)) == 60
    groups = {number // 10 for number in numbers}
    assert len(groups) > 25
    assert min(groups) < 40
    assert max(groups) >= 360
    assert numbers != sorted(numbers)


@pytest.fixture
def done(recipes: Path, copies: Path) -> list[str]:
    """Arguments whose rows are made already."""
    copy_of("qnli", copies, count=30)
    copy_of("wnli", copies, count=30)
    arguments = [str(recipes / "table07.yaml"), "--only", "?nli", "--from", str(copies), "--train-rows", "5"]
    assert command.main(arguments) == 0
    return arguments


def test_what_is_done_is_kept(done: list[str], recipes: Path, copies: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = recipes / "data"
    before = {path.name: (path.stat().st_ino, path.read_bytes()) for path in data.glob("*.jsonl")}
    (data / "wnli.train.jsonl").unlink()
    shutil.rmtree(copies / "glue" / "qnli")  # so that opening it would fail
    capsys.readouterr()
    assert command.main(done) == 0
    assert "1 files made, 3 were there" in capsys.readouterr().out
    after = {path.name: (path.stat().st_ino, path.read_bytes()) for path in data.glob("*.jsonl")}
    assert {one for one in before if before[one][0] != after[one][0]} <= {"wnli.train.jsonl"}
    assert {one: content for one, (_, content) in before.items()} == {
        one: content for one, (_, content) in after.items()
    }
    record = json.loads((data / "rows.json").read_text())
    assert record.keys() == before.keys()
    assert (
        record["qnli.test.jsonl"].items()
        >= {
            "set": "nyu-mll/glue",
            "config": "qnli",
            "split": "validation",
            "seed": 0,
            "rows": 30,
            "from": "local copy",
            "licence": "none stated (GLUE)",
        }.items()
    )


def test_rows_made_otherwise_are_not_mixed_up(
    done: list[str], recipes: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train, test = recipes / "data" / "qnli.train.jsonl", recipes / "data" / "qnli.test.jsonl"
    before = train.read_bytes()
    for changed, said in (
        ([*done, "--seed", "1"], "made with seed 0, not 1 (and 3 more)"),
        ([*done[:-1], "6"], "made with train_rows 5, not 6 (and 1 more)"),
        ([*done, "--test-rows", "2"], "made with test_rows None, not 2 (and 1 more)"),
    ):
        assert command.main(changed) == 2
        assert f"{said}; --overwrite replaces it, --out DIR leaves it alone" in capsys.readouterr().err
    test.write_text(test.read_text().replace("Sentence", "Word"))
    assert command.main(done) == 2
    assert f"{test}: changed since it was made" in capsys.readouterr().err
    assert command.main([*done, "--overwrite"]) == 0
    assert "Sentence" in test.read_text()
    assert train.read_bytes() == before
    record = recipes / "data" / "rows.json"
    record.write_text("{}")
    assert command.main(done) == 2
    assert "not made by this command" in capsys.readouterr().err
    record.write_text("{")
    assert command.main(done) == 2
    assert f"cannot read {str(record)!r}" in capsys.readouterr().err


def test_another_prompt_is_noticed(
    done: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SETS, "qnli", replace(SETS["qnli"], prompt="{question} {sentence}"))
    assert command.main(done) == 2
    assert "made with prompt another" in capsys.readouterr().err


def test_a_broken_copy_leaves_no_half_of_a_file(
    recipes: Path, copies: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy_of("qnli", copies)
    copy_of("wnli", copies)
    write_rows(copies / "glue" / "wnli" / "train.jsonl", [row("wnli", 0, "train"), {"sentence1": "Alone."}])
    arguments = [str(recipes / "table07.yaml"), "--only", "?nli", "--from", str(copies)]
    assert command.main(arguments) == 2
    said = capsys.readouterr().err
    assert "glue/wnli/train.jsonl, row 2: 'sentence2': expected text, got None" in said
    assert said.count("\n") == 1
    there = {path.name for path in (recipes / "data").glob("*")}
    assert there == {"qnli.train.jsonl", "qnli.test.jsonl", "rows.json", ".rows.lock"}
    (copies / "glue" / "wnli" / "train.jsonl").write_bytes(b"\xff\xfe{")
    assert command.main(arguments) == 2
    assert "glue/wnli/train.jsonl: cannot be read: " in capsys.readouterr().err
    copy_of("wnli", copies)
    assert command.main(arguments) == 0
    assert "2 files made, 2 were there" in capsys.readouterr().out


def test_copies_are_found_as_the_hub_names_them(recipes: Path, copies: Path) -> None:
    for part in (0, 1):
        write_rows(copies / f"glue/qnli/validation-0000{part}-of-00002.parquet", [qnli(part, "validation")])
    assert command.main([str(recipes / "table05.yaml"), "--only", "qnli", "--from", str(copies)]) == 0
    assert len(made(recipes / "data" / "qnli.test.jsonl")) == 2
    for split in ("test", "challenge_test_scramble"):
        write_rows(copies / "e2e_nlg" / "default" / split / "0000.parquet", [e2e(0, split)])
    assert local_files(SETS["e2enlg"], "test", copies) == [copies / "e2e_nlg/default/test/0000.parquet"]


def test_the_list_loads_nothing(recipes: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main([str(recipes / "table08.yaml"), "--list"]) == 0
    lines = [re.split(r"  +", line.strip()) for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == ["file", "set", "split", "licence", "rows", "state"]
    assert lines[1] == [
        str(recipes / "data" / "anli_r1.train.jsonl"),
        "facebook/anli (plain_text)",
        "train_r1",
        "CC BY-NC 4.0",
        "200 of 16,946",
        "missing",
    ]
    assert [cells[4] for cells in lines if "penguins" in cells[0]] == ["the other 141"]
    assert not (recipes / "data").exists()
    assert command.main(["--list", "--test-rows", "100", "--only", "snarks", "tqa", "--train-rows", "200"]) == 0
    said = capsys.readouterr().out
    assert "lukaemon/bbh (snarks) *" in said
    assert re.search(r"tqa.test.jsonl .* 100 of 17,944 +missing", said)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "expected at least one RECIPE, or --list"),
        (["{table05}", "--from", "{copies}"], "no copy of facebook/anli (plain_text) in"),
        (["{table05}", "--only", "snli"], "unknown set 'snli'; did you mean"),
        (["{table05}", "--seed", "-1"], "expected a whole number of at least 0, got '-1'"),
        (["{table05}", "--train-rows", "0"], "expected a whole number of at least 1, got '0'"),
        (["{other}"], "data.tasks.a.train: unknown set 'anli_r9'; did you mean 'anli_r3'?"),
        (["{strange}"], "data.tasks.a.test: unknown set 'qnli.jsonl'"),
        (["nowhere.yaml"], "no such recipe: 'nowhere.yaml'"),
    ],
)
def test_errors_say_what_to_do(
    arguments: list[str], said: str, recipes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for other, task in (("other", "train: data/anli_r9.train.jsonl"), ("strange", "test: data/qnli.jsonl")):
        (tmp_path / f"{other}.yaml").write_text(f"base: zoo\nexperts: [zoo:less]\ndata: {{tasks: {{a: {{{task}}}}}}}\n")
    places = {"table05": recipes / "table05.yaml", "copies": tmp_path / "copies"}
    places |= {one: tmp_path / f"{one}.yaml" for one in ("other", "strange")}
    assert command.main([one.format(**places) for one in arguments]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_two_copies_are_refused(recipes: Path, copies: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy_of("qnli", copies)
    copy_of("qnli", copies, ".parquet")
    assert command.main([str(recipes / "table05.yaml"), "--only", "qnli", "--from", str(copies)]) == 2
    assert "two copies of nyu-mll/glue (qnli), validation" in capsys.readouterr().err


def test_a_split_too_small_to_cut(recipes: Path, copies: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy_bbh(copies, "ruin_names", count=5)
    assert command.main([str(recipes / "table03" / "bbh.yaml"), "--only", "ruin_names", "--from", str(copies)]) == 2
    assert "5 rows to learn from leave none of 5 to test on; ask for fewer" in capsys.readouterr().err


def test_two_runs_do_not_write_to_one_folder(recipes: Path, copies: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy_of("qnli", copies)
    with alone([recipes / "data"]):
        assert command.main([str(recipes / "table05.yaml"), "--only", "qnli", "--from", str(copies)]) == 2
    assert "another run writes rows to" in capsys.readouterr().err
