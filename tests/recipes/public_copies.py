"""Tiny copies of the public sets behind the text recipes: made-up rows with the fields that the hub's have."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from row_sets import SETS, PublicSet

Row = dict[str, Any]


def anli(number: int, split: str) -> Row:
    return {
        "uid": f"{split}-{number}",
        "premise": f"Passage {number} of {split}.",
        "hypothesis": f"Claim {number} of {split}.",
        "label": number % 3,
        "reason": "because",
    }


def qnli(number: int, split: str) -> Row:
    return {
        "question": f"Question {number} of {split}?",
        "sentence": f"Sentence {number} of {split}.",
        "label": -1 if split == "test" else number % 2,
        "idx": number,
    }


def wnli(number: int, split: str) -> Row:
    return {
        "sentence1": f"First {number} of {split}.",
        "sentence2": f"Second {number} of {split}.",
        "label": -1 if split == "test" else number % 2,
        "idx": number,
    }


def wmt(number: int, split: str, languages: tuple[str, ...]) -> Row:
    return {"translation": {language: f"{language} text {number} of {split}" for language in languages}}


def common_gen(number: int, split: str) -> Row:
    """Two sentences for each set of words; none in the test split."""
    target = "" if split == "test" else f"Sentence {number} of {split}."
    return {"concept_set_idx": number // 2, "concepts": [f"{split}{number // 2}", "ski", "hill"], "target": target}


def gem(number: int, split: str) -> Row:
    """What GEM's sets have in common: further references, outside the training split."""
    target = f"Sentence {number} of {split}."
    references = [] if split == "train" else [target, f"Other sentence {number} of {split}."]
    return {"gem_id": f"{split}-{number}", "gem_parent_id": f"{split}-{number}", "target": target} | {
        "references": references
    }


def dart(number: int, split: str) -> Row:
    facts = [[f"Club {number} of {split}", "FOUNDED", "1900"], ["[TABLECONTEXT]", "[TITLE]", "Clubs"]]
    return {"dart_id": number, "tripleset": facts, "subtree_was_extended": False, "target_sources": ["x"]} | gem(
        number, split
    )


def e2e(number: int, split: str) -> Row:
    """Two rows for each restaurant."""
    return {"meaning_representation": f"name[Inn {number // 2} of {split}], area[riverside]"} | gem(number, split)


def web_nlg(number: int, split: str) -> Row:
    facts = [f"Town_{number}_of_{split} | isPartOf | Old_Shire", 'Old_Shire | area | "12.0"']
    return {"input": facts, "category": "City", "webnlg_id": f"{split}/{number}"} | gem(number, split)


def arc(number: int, split: str) -> Row:
    labels = ["1", "2", "3", "4"] if number % 2 else ["A", "B", "C", "D"]
    return {
        "id": f"Mercury_{number}",
        "question": f"Question {number} of {split}?",
        "choices": {"text": [f"choice {letter} of {number}" for letter in "abcd"], "label": labels},
        "answerKey": labels[number % 4],
    }


def nq(number: int, split: str) -> Row:
    answers = [f"answer {number} of {split}", f"other answer {number} of {split}"]
    return {"question": f"who was number {number} of {split}", "answer": answers[: 1 + number % 2]}


def trivia(number: int, split: str) -> Row:
    value = f"Answer No. {number} of {split}"
    answer = {
        "aliases": [value, f"Alias {number} of {split}"],
        "normalized_aliases": [f"alias {number} of {split}", f"answer no {number} of {split}"],
        "matched_wiki_entity_name": "",
        "normalized_matched_wiki_entity_name": "",
        "normalized_value": f"answer no {number} of {split}",
        "type": "WikipediaEntity",
        "value": value,
    }
    return {"question": f"Question {number} of {split}?", "question_id": f"tc_{number}", "answer": answer}


def bbh(number: int, task: str) -> Row:
    return {"input": f"Task {task}, {number}: is it so?\nOptions:\n(A) yes\n(B) no", "target": f"({'AB'[number % 2]})"}


def row(name: str, number: int, split: str) -> Row:
    """Row ``number`` of a split of the set that a recipe calls ``name``."""
    chosen = SETS[name]
    if chosen.repo.startswith("wmt/"):
        return wmt(number, split, tuple((chosen.config or "").split("-")))
    if chosen.repo == "lukaemon/bbh":
        return bbh(number, name)
    makers = {
        "facebook/anli": anli,
        "nyu-mll/glue": qnli if name == "qnli" else wnli,
        "allenai/common_gen": common_gen,
        "GEM/dart": dart,
        "GEM/e2e_nlg": e2e,
        "GEM/web_nlg": web_nlg,
        "allenai/ai2_arc": arc,
        "google-research-datasets/nq_open": nq,
        "mandarjoshi/trivia_qa": trivia,
    }
    return makers[chosen.repo](number, split)


def rows(name: str, split: str, count: int = 12) -> list[Row]:
    """The first ``count`` rows."""
    return [row(name, number, split) for number in range(count)]


def copy_of(name: str, folder: Path, kind: str = ".jsonl", count: int = 12) -> None:
    """Write both splits of a set to ``folder``, in the form ``kind``."""
    chosen = SETS[name]
    for split in {chosen.train, chosen.test}:
        write_rows(place_of(chosen, split, folder).with_suffix(kind), rows(name, split, count))


def place_of(chosen: PublicSet, split: str, folder: Path) -> Path:
    """Where a copy of a split lies, with the suffix ``.jsonl``."""
    return folder / chosen.repo.split("/")[-1] / (chosen.config or "") / f"{split}.jsonl"


def write_rows(path: Path, found: list[Row], group: int | None = None) -> None:
    """As its suffix says; parquet in row groups of ``group``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(found), path, row_group_size=group)
    elif path.suffix == ".json":
        path.write_text(json.dumps({"canary": "not for training", "examples": found}), encoding="utf-8")
    elif path.suffix == ".csv":
        import csv

        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(found[0]))
            writer.writeheader()
            writer.writerows(found)
    else:
        path.write_text("".join(json.dumps(one) + "\n" for one in found), encoding="utf-8")
