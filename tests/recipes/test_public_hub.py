"""The command that makes rows, on a hub on this machine: configurations, parquet copies, and no code of a set."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hub_server import commit, hub
from public_copies import rows, write_rows

ROOT = Path(__file__).parents[2]
CONVERTED = "refs_convert_parquet"
CARD = "---\nconfigs:\n- config_name: plain_text\n  data_files:\n{splits}---\n"


def run(*arguments: str, address: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """In a process of its own: the hub's address is read when its client is imported."""
    environment = os.environ | {"HF_ENDPOINT": address, "HF_HOME": str(folder / "cache"), "HF_HUB_OFFLINE": "0"}
    command = [sys.executable, str(ROOT / "scripts" / "recipes" / "rows.py"), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def serve_anli(root: Path) -> None:
    """Parquet, with a card that says where each split is."""
    home = root / "facebook" / "anli" / "main"
    splits = [f"{part}_r{number}" for number in (1, 2, 3) for part in ("train", "dev", "test")]
    for split in splits:
        name = f"anli_r{split[-1]}"
        write_rows(home / "plain_text" / f"{split}-00000-of-00001.parquet", rows(name, split))
    listed = "".join(f"  - split: {split}\n    path: plain_text/{split}-*\n" for split in splits)
    (home / "README.md").write_text(CARD.format(splits=listed))


def serve_e2e(root: Path) -> None:
    """A script, and the hub's own parquet copy, in which the names of other splits contain those that are wanted."""
    script = root / "GEM" / "e2e_nlg" / "main" / "e2e_nlg.py"
    script.parent.mkdir(parents=True)
    script.write_text("raise SystemExit('this was run')")
    home = script.parents[1] / CONVERTED / "e2e_nlg"
    for split in ("train", "validation", "test", "challenge_train_sample", "challenge_test_scramble"):
        write_rows(home / split / "0000.parquet", rows("e2enlg", split))


@pytest.mark.slow
def test_rows_from_the_hub(tmp_path: Path) -> None:
    serve_anli(tmp_path / "hub")
    serve_e2e(tmp_path / "hub")
    out = tmp_path / "rows"
    recipes = [str(ROOT / "recipes" / "mole" / one) for one in ("figure07.yaml", "table03/struct_to_text.yaml")]
    arguments = [*recipes, "-o", str(out), "--train-rows", "4", "--only"]
    with hub(tmp_path / "hub") as (address, asked):
        done = run(*arguments, "anli_r2", "e2enlg", address=address, folder=tmp_path)
        assert done.returncode == 0, done.stderr
        seen = len(asked)
        again = run(*arguments, "anli_r2", "e2enlg", address=address, folder=tmp_path)
        assert "0 files made, 4 were there" in again.stdout
        assert len(asked) == seen
        gone = run(*arguments, "qnli", address=address, folder=tmp_path)
    assert gone.returncode == 2
    assert gone.stderr.startswith("error: nyu-mll/glue (qnli), train: cannot be loaded from the hub: ")
    assert "a copy as FOLDER/glue/qnli/train.parquet (or .jsonl, .csv) is read with --from FOLDER" in gone.stderr
    wanted = {"anli_r2.train": ("train_r2", 4), "anli_r2.test": ("test_r2", 12)}
    wanted |= {"e2enlg.train": ("of train", 4), "e2enlg.test": ("of test", 6)}
    for name, (split, count) in wanted.items():
        made = [json.loads(line) for line in (out / f"{name}.jsonl").read_text().splitlines()]
        assert len(made) == count
        assert all(split in row["input"] for row in made)
    record = json.loads((out / "rows.json").read_text())
    assert record["anli_r2.test.jsonl"]["from"] == f"hub, commit {commit('main')}"
    assert record["e2enlg.test.jsonl"]["from"] == f"hub, commit {commit(CONVERTED)}"
    assert not any("challenge" in path and "resolve" in path for path in asked)


def test_the_list_imports_neither_torch_nor_datasets() -> None:
    code = (
        "import sys, rows; assert rows.main(['--list']) == 0; "
        "assert not {'torch', 'datasets', 'huggingface_hub'} & sys.modules.keys()"
    )
    path = os.pathsep.join([str(ROOT / "scripts" / "recipes"), str(ROOT / "src")])
    subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": path}, check=True, capture_output=True)
