"""The public sets behind the text recipes: where each is, how its rows are asked, which of them are tested.

The prompts are in the manner of FLAN's, in words of our own. The answers to classify with are FLAN's, because that is
what LoRAHub's LoRAs were trained to say.
"""

from __future__ import annotations

from dataclasses import dataclass

import row_prompts as read
from row_prompts import Reader

FEW = 200
CONVERTED = "refs/convert/parquet"
"""Where the hub keeps its own parquet copy of a set: taken where the set itself is a script, which is never run."""


@dataclass(frozen=True)
class PublicSet:
    """One public set, as one task asks it.

    Attributes:
        repo: hub id; the last part names the folder of a local copy.
        config: which of the set's subsets; also the subfolder of a local copy.
        train: split to learn from.
        test: split to test on: the official test, or validation where the test's answers are kept secret. The same as
            ``train`` where there is but one: then what is not learned from is tested.
        rows: rows of those splits, as the hub counts them; for the list alone.
        licence: what the hub's card says.
        reader: turns a row into fields and answers.
        prompt: the input, with a placeholder for each field.
        learn: rows to learn from, unless asked for more.
        several: what a further right answer is called in our files; ``None`` where rows of one input stay apart.
        parquet: files in the hub's parquet copy, by ``{split}``; ``None`` where the set itself is parquet.
    """

    repo: str
    config: str | None
    train: str
    test: str
    rows: tuple[int, int]
    licence: str
    reader: Reader
    prompt: str
    learn: int = FEW
    several: str | None = None
    parquet: str | None = None

    def split(self, part: str) -> str:
        """The split behind ``part``, which is ``train`` or ``test``."""
        return self.train if part == "train" else self.test

    @property
    def cut(self) -> bool:
        """Whether one split serves both."""
        return self.train == self.test

    @property
    def title(self) -> str:
        """As people say it."""
        return f"{self.repo} ({self.config})" if self.config else self.repo


def _anli(number: int, rows: tuple[int, int]) -> PublicSet:
    return PublicSet(
        repo="facebook/anli",
        config="plain_text",
        train=f"train_r{number}",
        test=f"test_r{number}",
        rows=rows,
        licence="CC BY-NC 4.0",
        reader=read.inference(
            "premise",
            "hypothesis",
            {"entailment": "Yes", "neutral": "It's impossible to say", "contradiction": "No"},
        ),
        prompt="Read the passage and decide whether the claim follows from it.\n\nPassage: {premise}\n\n"
        "Claim: {hypothesis}\n\nOPTIONS:\n- Yes\n- It's impossible to say\n- No",
    )


_QNLI = PublicSet(
    repo="nyu-mll/glue",
    config="qnli",
    train="train",
    test="validation",  # the official test has no labels
    rows=(104_743, 5_463),
    licence="none stated (GLUE)",
    reader=read.inference("question", "sentence", {"entailment": "yes", "not_entailment": "no"}),
    prompt="Can the question be answered from the sentence alone?\n\nQuestion: {question}\n\nSentence: {sentence}\n\n"
    "OPTIONS:\n- yes\n- no",
)
_WNLI = PublicSet(
    repo="nyu-mll/glue",
    config="wnli",
    train="train",
    test="validation",
    rows=(635, 71),
    licence="none stated (GLUE)",
    reader=read.inference("sentence1", "sentence2", {"not_entailment": "no", "entailment": "yes"}),
    prompt="Suppose that the first sentence is true. Is the second one true as well?\n\nFirst: {sentence1}\n\n"
    "Second: {sentence2}\n\nOPTIONS:\n- no\n- yes",
)

_LANGUAGES = {"en": "English", "fr": "French", "de": "German", "ro": "Romanian"}


def _wmt(year: int, pair: str, source: str, target: str, rows: tuple[int, int]) -> PublicSet:
    spoken, wanted = _LANGUAGES[source], _LANGUAGES[target]
    return PublicSet(
        repo=f"wmt/wmt{year}",
        config=pair,
        train="train",
        test="test",
        rows=rows,
        licence="none stated (research)",
        reader=read.translation(source, target),
        prompt=f"Translate this text from {spoken} into {wanted}.\n\n{spoken}: {{text}}\n\n{wanted}:",
    )


_COMMONGEN = PublicSet(
    repo="allenai/common_gen",
    config=None,
    train="train",
    test="validation",  # the official test has no sentences
    rows=(67_389, 4_018),
    licence="MIT",
    reader=read.concepts,
    prompt="Write one sentence about an everyday scene in which all of these words occur: {words}",
    several="references",
)
_DART = PublicSet(
    repo="GEM/dart",
    config=None,
    train="train",
    test="test",
    rows=(62_659, 5_097),
    licence="MIT",
    reader=read.triples,
    prompt="Each line below is a fact: who or what, a property, its value. Tell all of them in fluent English.\n\n"
    "{facts}",
    several="references",
    parquet="*/{split}/*.parquet",
)
_E2E = PublicSet(
    repo="GEM/e2e_nlg",
    config=None,
    train="train",
    test="test",
    rows=(33_525, 1_847),
    licence="CC BY-SA 4.0",
    reader=read.description,
    prompt="Describe this place to somebody who looks for somewhere to eat, without leaving anything out.\n\n{record}",
    several="references",
    parquet="*/{split}/*.parquet",
)
_WEBNLG = PublicSet(
    repo="GEM/web_nlg",
    config="en",
    train="train",
    test="test",
    rows=(35_426, 1_779),
    licence="CC BY-NC 4.0",
    reader=read.facts,
    prompt="Write a short text that states every one of these facts.\n\n{facts}",
    several="references",
    parquet="en/{split}/*.parquet",
)


def _arc(config: str, rows: tuple[int, int]) -> PublicSet:
    return PublicSet(
        repo="allenai/ai2_arc",
        config=config,
        train="train",
        test="test",
        rows=rows,
        licence="CC BY-SA 4.0",
        reader=read.choice,
        prompt="Choose the option that answers the question.\n\nQuestion: {question}\n\nOPTIONS:\n{options}",
    )


_NQ = PublicSet(
    repo="google-research-datasets/nq_open",
    config=None,
    train="train",
    test="validation",  # there is no other
    rows=(87_925, 3_610),
    licence="CC BY-SA 3.0",
    reader=read.question,
    prompt="Answer the question in a few words.\n\nQuestion: {question}?",
    several="answers",
)
_TRIVIA = PublicSet(
    repo="mandarjoshi/trivia_qa",
    config="rc.nocontext",
    train="train",
    test="validation",  # the official test has no answers
    rows=(138_384, 17_944),
    licence="none stated",
    reader=read.trivia,
    prompt="Here is a question from a quiz. Give the answer alone.\n\nQuestion: {question}",
    several="answers",
)

_BBH_SIZES = {"causal_judgement": 187, "penguins_in_a_table": 146, "snarks": 178}
_BBH = (
    "boolean_expressions",
    "causal_judgement",
    "date_understanding",
    "disambiguation_qa",
    "dyck_languages",
    "formal_fallacies",
    "geometric_shapes",
    "hyperbaton",
    "logical_deduction_five_objects",
    "logical_deduction_seven_objects",
    "logical_deduction_three_objects",
    "movie_recommendation",
    "multistep_arithmetic_two",
    "navigate",
    "object_counting",
    "penguins_in_a_table",
    "reasoning_about_colored_objects",
    "ruin_names",
    "salient_translation_error_detection",
    "snarks",
    "sports_understanding",
    "temporal_sequences",
    "tracking_shuffled_objects_five_objects",
    "tracking_shuffled_objects_seven_objects",
    "tracking_shuffled_objects_three_objects",
    "web_of_lies",
    "word_sorting",
)


def _bbh(task: str) -> PublicSet:
    rows = _BBH_SIZES.get(task, 250)
    return PublicSet(
        repo="lukaemon/bbh",
        config=task,
        train="test",
        test="test",
        rows=(rows, rows),
        licence="MIT",
        reader=read.as_it_stands,
        prompt="{question}",
        learn=5,
        parquet=f"{task}/{{split}}/*.parquet",
    )


SETS: dict[str, PublicSet] = {
    "anli_r1": _anli(1, (16_946, 1_000)),
    "anli_r2": _anli(2, (45_460, 1_000)),
    "anli_r3": _anli(3, (100_459, 1_200)),
    "qnli": _QNLI,
    "wnli": _WNLI,
    "wmt14_en_fr": _wmt(14, "fr-en", "en", "fr", (40_836_715, 3_003)),
    "wmt14_fr_en": _wmt(14, "fr-en", "fr", "en", (40_836_715, 3_003)),
    "wmt16_en_de": _wmt(16, "de-en", "en", "de", (4_548_885, 2_999)),
    "wmt16_de_en": _wmt(16, "de-en", "de", "en", (4_548_885, 2_999)),
    "wmt16_en_ro": _wmt(16, "ro-en", "en", "ro", (610_320, 1_999)),
    "wmt16_ro_en": _wmt(16, "ro-en", "ro", "en", (610_320, 1_999)),
    "commongen": _COMMONGEN,
    "dart": _DART,
    "e2enlg": _E2E,
    "webnlg": _WEBNLG,
    "arc_c": _arc("ARC-Challenge", (1_119, 1_172)),
    "arc_e": _arc("ARC-Easy", (2_251, 2_376)),
    "nq": _NQ,
    "tqa": _TRIVIA,
    **{task: _bbh(task) for task in _BBH},
}
"""Name of a recipe's file, before ``.train.jsonl`` and ``.test.jsonl`` -> the set its rows come from."""
