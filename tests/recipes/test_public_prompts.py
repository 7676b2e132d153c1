"""What a row of each public set becomes: the input as it is asked, and the right answers."""

from __future__ import annotations

from typing import Any

import pytest
from public_copies import Row, row, rows
from row_prompts import Item
from row_sets import SETS

from loraweave.errors import LoraweaveError


def asked(name: str, found: Row) -> tuple[str, tuple[str, ...]]:
    chosen = SETS[name]
    item = chosen.reader(found)
    return chosen.prompt.format(**item.fields), item.answers


EXPECTED: dict[str, tuple[str, tuple[str, ...]]] = {
    "anli_r2": (
        "Read the passage and decide whether the claim follows from it.\n\nPassage: Passage 1 of test_r2.\n\n"
        "Claim: Claim 1 of test_r2.\n\nOPTIONS:\n- Yes\n- It's impossible to say\n- No",
        ("It's impossible to say",),
    ),
    "qnli": (
        "Can the question be answered from the sentence alone?\n\nQuestion: Question 1 of validation?\n\n"
        "Sentence: Sentence 1 of validation.\n\nOPTIONS:\n- yes\n- no",
        ("no",),
    ),
    "wnli": (
        "Suppose that the first sentence is true. Is the second one true as well?\n\nFirst: First 1 of validation.\n\n"
        "Second: Second 1 of validation.\n\nOPTIONS:\n- no\n- yes",
        ("yes",),
    ),
    "wmt14_en_fr": (
        "Translate this text from English into French.\n\nEnglish: en text 1 of test\n\nFrench:",
        ("fr text 1 of test",),
    ),
    "wmt16_ro_en": (
        "Translate this text from Romanian into English.\n\nRomanian: ro text 1 of test\n\nEnglish:",
        ("en text 1 of test",),
    ),
    "commongen": (
        "Write one sentence about an everyday scene in which all of these words occur: validation0, ski, hill",
        ("Sentence 1 of validation.",),
    ),
    "dart": (
        "Each line below is a fact: who or what, a property, its value. Tell all of them in fluent English.\n\n"
        "Club 1 of test | FOUNDED | 1900\n[TABLECONTEXT] | [TITLE] | Clubs",
        ("Sentence 1 of test.", "Other sentence 1 of test."),
    ),
    "e2enlg": (
        "Describe this place to somebody who looks for somewhere to eat, without leaving anything out.\n\n"
        "name[Inn 0 of test], area[riverside]",
        ("Sentence 1 of test.", "Other sentence 1 of test."),
    ),
    "webnlg": (
        "Write a short text that states every one of these facts.\n\nTown 1 of test | isPartOf | Old Shire\n"
        'Old Shire | area | "12.0"',
        ("Sentence 1 of test.", "Other sentence 1 of test."),
    ),
    "arc_c": (
        "Choose the option that answers the question.\n\nQuestion: Question 1 of test?\n\nOPTIONS:\n- choice a of 1\n"
        "- choice b of 1\n- choice c of 1\n- choice d of 1",
        ("choice b of 1",),
    ),
    "nq": (
        "Answer the question in a few words.\n\nQuestion: who was number 1 of validation?",
        ("answer 1 of validation", "other answer 1 of validation"),
    ),
    "tqa": (
        "Here is a question from a quiz. Give the answer alone.\n\nQuestion: Question 1 of validation?",
        ("Answer No. 1 of validation", "Alias 1 of validation", "alias 1 of validation", "answer no 1 of validation"),
    ),
    "snarks": ("Task snarks, 1: is it so?\nOptions:\n(A) yes\n(B) no", ("(B)",)),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_row_becomes_a_question(name: str) -> None:
    assert asked(name, row(name, 1, SETS[name].test)) == EXPECTED[name]


def test_every_family_is_looked_at() -> None:
    assert {SETS[name].reader.__qualname__ for name in EXPECTED} == {one.reader.__qualname__ for one in SETS.values()}
    assert {SETS[name].repo for name in EXPECTED} == {one.repo for one in SETS.values()}


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("anli_r1", {"entailment": "Yes", "neutral": "It's impossible to say", "contradiction": "No"}),
        ("qnli", {"entailment": "yes", "not_entailment": "no"}),
        ("wnli", {"not_entailment": "no", "entailment": "yes"}),
    ],
)
def test_labels(name: str, words: dict[str, str]) -> None:
    """By number, in the hub's order, and by name. Without a label there is no answer; every answer is an option."""
    found = row(name, 0, SETS[name].test)
    for number, (label, word) in enumerate(words.items()):
        assert asked(name, found | {"label": number})[1] == (word,)
        assert asked(name, found | {"label": label})[1] == (word,)
        assert f"\n- {word}" in asked(name, found)[0]
    assert asked(name, found | {"label": -1})[1] == asked(name, found | {"label": None})[1] == ()
    for wrong in (len(words), -2, "e", True, 1.0):
        with pytest.raises(LoraweaveError, match=rf"'label': expected a number below {len(words)}, -1, or one of"):
            asked(name, found | {"label": wrong})


ANSWERS: dict[str, dict[str, Any]] = {
    "facebook/anli": {"label": 2, "reason": "zebra"},
    "nyu-mll/glue": {"label": 0},
    "allenai/common_gen": {"target": "A zebra."},
    "GEM/dart": {"target": "A zebra.", "references": ["Zebras."], "target_sources": ["zebra"]},
    "GEM/e2e_nlg": {"target": "A zebra.", "references": ["Zebras."]},
    "GEM/web_nlg": {"target": "A zebra.", "references": ["Zebras."], "category": "zebra"},
    "allenai/ai2_arc": {"answerKey": "3"},
    "google-research-datasets/nq_open": {"answer": ["zebra"]},
    "lukaemon/bbh": {"target": "zebra"},
}


@pytest.mark.parametrize("name", SETS)
def test_input_is_the_same_whatever_is_right(name: str) -> None:
    """So no answer is in an input; one may be among options that are there in any case."""
    chosen = SETS[name]
    found = row(name, 1, chosen.test)
    if chosen.repo.startswith("wmt/"):
        spoken = name.split("_")[1]
        pair = {key: text if key == spoken else "zebra" for key, text in found["translation"].items()}
        changed = {"translation": pair}
    elif chosen.repo == "mandarjoshi/trivia_qa":
        changed = {"answer": found["answer"] | {"value": "zebra", "aliases": [], "normalized_aliases": []}}
    else:
        changed = ANSWERS[chosen.repo]
    (before, answers), (after, others) = asked(name, found), asked(name, found | changed)
    assert before == after
    assert not set(answers) & set(others)
    assert "zebra" not in after
    if "OPTIONS" not in before and "Options" not in before:
        assert not any(answer.lower() in before.lower() for answer in answers)


@pytest.mark.parametrize("name", SETS)
def test_inputs_of_different_rows_differ(name: str) -> None:
    """Every field that matters reaches the input."""
    split = SETS[name].test
    assert len({asked(name, one)[0] for one in rows(name, split)}) == (6 if name in ("commongen", "e2enlg") else 12)


def test_choices_with_any_labels() -> None:
    offered = {"text": ["one", "two"], "label": ["1", "2"]}
    assert SETS["arc_e"].reader({"question": "Which?", "choices": offered, "answerKey": "2"}) == Item(
        {"question": "Which?", "options": "- one\n- two"}, ("two",)
    )
    assert SETS["arc_e"].reader({"question": "Which?", "choices": offered, "answerKey": ""}).answers == ()
    with pytest.raises(LoraweaveError, match="one of them the answer's \\('B'\\)"):
        SETS["arc_e"].reader({"question": "Which?", "choices": offered, "answerKey": "B"})


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("anli_r1", {"label": -1}),
        ("qnli", {"sentence": " "}),
        ("wmt14_en_fr", {"translation": {"en": "", "fr": "une phrase"}}),
        ("wmt14_en_fr", {"translation": {"en": "a sentence", "fr": " "}}),
        ("commongen", {"target": ""}),
        ("dart", {"tripleset": []}),
        ("webnlg", {"input": []}),
        ("nq", {"answer": []}),
        ("arc_c", {"answerKey": ""}),
        ("snarks", {"target": ""}),
    ],
)
def test_blank_rows_are_incomplete(name: str, changed: Row) -> None:
    """The sets have such rows; they are left out, not asked."""
    found = row(name, 1, SETS[name].test)
    assert SETS[name].reader(found).complete
    assert not SETS[name].reader(found | changed).complete


@pytest.mark.parametrize(
    ("name", "changed", "said"),
    [
        ("anli_r1", {"premise": None}, "'premise': expected text, got None"),
        ("wmt14_en_fr", {"translation": "{'en': 'a'}"}, "'translation': expected an object, got"),
        ("wmt14_en_fr", {"translation": {"en": "a"}}, "'fr': expected text, got None"),
        ("commongen", {"concepts": "ski hill"}, "'concepts': expected a list of texts, got 'ski hill'"),
        ("dart", {"tripleset": "a"}, "'tripleset': expected a list of facts"),
        ("dart", {"tripleset": [["a", 1]]}, "'tripleset': expected a list of texts"),
        ("nq", {"answer": "a"}, "'answer': expected a list of texts, got 'a'"),
        ("tqa", {"answer": {"value": "a", "aliases": [1]}}, "'aliases': expected a list of texts, got \\[1\\]"),
        ("snarks", {"target": 3}, "'target': expected text, got 3"),
    ],
)
def test_rows_that_are_not_the_sets_are_refused(name: str, changed: Row, said: str) -> None:
    with pytest.raises(LoraweaveError, match=said):
        asked(name, row(name, 1, SETS[name].test) | changed)
