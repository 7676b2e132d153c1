"""Answers of the generated tasks against solvers written anew, which read the input text and nothing else."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable

import pytest

from loraweave.zoo import tasks
from loraweave.zoo.tasks.records import ALL_STYLES

N = 60
WORDS = [
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"),
    *("eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen", "twenty"),
]
WEEK = ["monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday"]
ANIMALS = {"cat", "dog", "cow", "pig", "hen", "fox", "owl", "bee", "horse", "goat"}
FRUITS = {"apple", "pear", "plum", "fig", "lemon", "grape", "melon", "peach", "mango", "kiwi"}


def _permutation(good: Callable[[str, str], bool]) -> Callable[[str], str]:
    """The permutation of the words in which every neighbour pair is right, by trying them all."""

    def solve(body: str) -> str:
        for order in itertools.permutations(body.split()):
            if all(good(a, b) for a, b in itertools.pairwise(order)):
                return " ".join(order)
        raise AssertionError(body)

    return solve


def _count(kind: Callable[[str], bool]) -> Callable[[str], str]:
    return lambda body: WORDS[len([word for word in body.split() if kind(word)])]


def _both(body: str) -> str:
    words = body.split()
    animals, fruits = (len([word for word in words if word in kind]) for kind in (ANIMALS, FRUITS))
    return f"{WORDS[animals]} animals {WORDS[fruits]} fruits"


def _python_boolean(body: str) -> str:
    """Left to right: each operator is applied to all before it, which brackets make plain to Python."""
    parts = re.findall(r"(?:(and|or|xor|nand|nor) )?((?:not )?(?:true|false))", body)
    code = ""
    for operator, operand in parts:
        value = f"({operand.replace('true', 'True').replace('false', 'False')})"
        code = {
            "": value,
            "and": f"({code} and {value})",
            "or": f"({code} or {value})",
            "xor": f"({code} != {value})",
            "nand": f"(not ({code} and {value}))",
            "nor": f"(not ({code} or {value}))",
        }[operator]
    return str(eval(code)).lower()


def _brackets_boolean(body: str) -> str:
    return str(eval(body.replace("true", "True").replace("false", "False"))).lower()


def _weekday(sign: int) -> Callable[[str], str]:
    def solve(body: str) -> str:
        step, day = re.search(r" (\w+) days? (?:after|before) (\w+)$", body).groups()  # type: ignore[union-attr]
        at = WEEK.index(day)
        for _ in range(WORDS.index(step)):
            at = (at + sign) % 7
        return WEEK[at]

    return solve


def _walk(body: str) -> str:
    words = body.split()
    x = y = 0
    for way, far in zip(words[::2], words[1::2], strict=True):
        n = WORDS.index(far)
        x += n * (way == "right") - n * (way == "left")
        y += n * (way == "up") - n * (way == "down")
    across = [f"{WORDS[abs(x)]} {'right' if x > 0 else 'left'}"] if x else []
    along = [f"{WORDS[abs(y)]} {'up' if y > 0 else 'down'}"] if y else []
    return " ".join(across + along) or "start"


def _truth_teller(body: str) -> str:
    """Tries every assignment of honesty and keeps the only one that fits."""
    *lines, asked = [line.strip() for line in body.split(" . ")]
    asked = asked.removesuffix(" ?")
    people = [line.split()[0] for line in lines]
    fits = []
    for values in itertools.product((True, False), repeat=len(people)):
        honest = dict(zip(people, values, strict=True))
        first = honest[people[0]] == lines[0].endswith("is honest")
        rest = []
        for line in lines[1:]:
            speaker, _, other, *claim = line.split()
            rest.append(honest[speaker] == (honest[other] == (claim == ["is", "honest"])))
        if first and all(rest):
            fits.append(honest)
    assert len(fits) == 1
    return "honest" if fits[0][asked] else "liar"


def _swaps(body: str) -> str:
    *lines, asked = body.split(" . ")
    words = lines[0].split()
    names, things = words[::2], words[1::2]
    for line in lines[1:]:
        one, _, two = line.split()
        i, j = names.index(one), names.index(two)
        things[i], things[j] = things[j], things[i]
    return things[names.index(asked.removesuffix(" ?"))]


def _close(body: str) -> str:
    """Removes matched pairs until nothing changes; what is left is open."""
    text = body.replace(" ", "")
    while (shorter := re.sub(r"\(\)|\[\]|\{\}|<>", "", text)) != text:
        text = shorter
    return " ".join({"(": ")", "[": "]", "{": "}", "<": ">"}[sign] for sign in reversed(text))


def _say(value: int, swapped: bool) -> str:
    """Number words by the rules of long division, apart from the package's own."""
    names = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
    tens = dict(zip(range(20, 100, 10), names, strict=True))
    parts = []
    if value >= 100:
        parts += [WORDS[value // 100], "hundred"]
    rest = value % 100
    if 0 < rest <= 20 or value == 0:
        parts.append(WORDS[rest])
    elif rest:
        ten, unit = rest // 10 * 10, rest % 10
        if unit and swapped:
            parts += [WORDS[unit], "and", tens[ten]]
        else:
            parts += [tens[ten]] + ([WORDS[unit]] if unit else [])
    return " ".join(parts)


def _record(style: str) -> Callable[[str], str]:
    def solve(body: str) -> str:
        fields = dict(part.split(" ", 1) for part in body.split(" ; "))
        return re.sub(r"\{(\w+)\}", lambda m: fields[m[1]], ALL_STYLES[style])

    return solve


def _cipher(body: str) -> str:
    key, message = body.split(" . ")
    words = message
    for pair in key.split(" ; "):
        plain, secret = pair.split(" is ")
        words = re.sub(rf"\b{plain}\b", secret.upper(), words)
    return words.lower()


def _tallest(body: str) -> str:
    facts = [fact.split() for fact in body.split(" . ")]
    above = [(a, b) if word == "taller" else (b, a) for a, word, _, b in facts]
    people = {person for pair in above for person in pair}
    return next(person for person in people if all(person != low for _, low in above))


def _owner(body: str) -> str:
    table, asked = body.split(" . ")
    return {n: name for name, n in (line.split() for line in table.split(" ; "))}[asked.removesuffix(" ?")]


def _sov(body: str) -> str:
    verb = next(word for word in body.split() if word in {"sees", "likes", "finds", "wants", "takes", "paints"})
    before, after = (part.strip() for part in body.split(verb))
    return f"{before} {after} {verb}"


SOLVERS: dict[str, Callable[[str], str]] = {
    "sort/a_to_z": _permutation(lambda a, b: a <= b),
    "sort/z_to_a": _permutation(lambda a, b: a >= b),
    "sort/last_letter": _permutation(lambda a, b: a[-1] < b[-1]),
    "sort/second_letter": _permutation(lambda a, b: a[1] < b[1]),
    "sort/shortest_first": _permutation(lambda a, b: len(a) < len(b)),
    "sort/numbers_up": _permutation(lambda a, b: int(a) < int(b)),
    "sort/number_words_down": _permutation(lambda a, b: WORDS.index(a) > WORDS.index(b)),
    "count/animals": _count(ANIMALS.__contains__),
    "count/fruits": _count(FRUITS.__contains__),
    "count/not_animals": _count(lambda word: word not in ANIMALS),
    "count/words": _count(bool),
    "count/animals_and_fruits": _both,
    "boolean/and": _python_boolean,
    "boolean/and_or": _python_boolean,
    "boolean/xor": _python_boolean,
    "boolean/nand": _python_boolean,
    "boolean/nor": _python_boolean,
    "boolean/mixed": _python_boolean,
    "boolean/brackets": _brackets_boolean,
    "dates/days_after": _weekday(1),
    "dates/days_before": _weekday(-1),
    "navigate/grid": _walk,
    "navigate/line": _walk,
    "lies/two": _truth_teller,
    "lies/three": _truth_teller,
    "lies/four": _truth_teller,
    "shuffle/two_twice": _swaps,
    "shuffle/three_once": _swaps,
    "shuffle/three_twice": _swaps,
    "brackets/close": _close,
    "number_words/to_words": lambda body: _say(int(body), False),
    "number_words/to_swapped": lambda body: _say(int(body), True),
    "cipher/encode": _cipher,
    "compare/tallest": _tallest,
    "lookup/owner": _owner,
    "reorder/sov": _sov,
    "arrange/reverse": lambda body: " ".join(reversed(body.split())),
    "arrange/rotate_left": lambda body: re.sub(r"^(\w+) (.*)$", r"\2 \1", body),
    "arrange/swap_pairs": lambda body: re.sub(r"(\w+) (\w+)", r"\2 \1", body),
    "letters/last": lambda body: " ".join(re.findall(r"(\w)\b", body)),
    "letters/spell": lambda body: re.sub(r"(?<=\w)(?=\w)", " ", body),
    "cipher/remove": lambda body: " ".join(w for w in body.split(" in ")[1].split() if w != body.split()[0]),
    "pick/second": lambda body: body.split()[1],
    "pick/longest": lambda body: max(body.split(), key=len),
    **{f"record/{style}": _record(style) for style in ALL_STYLES},
}


@pytest.mark.parametrize("name", SOLVERS)
def test_answers_agree_with_an_independent_solver(name: str) -> None:
    task = tasks.get(name)
    for row in task.sample(N, seed=11):
        assert SOLVERS[name](row["input"].removeprefix(f"{task.phrase}: ")) == row["target"], row


@pytest.mark.parametrize("language", ["zog", "mip", "sul"])
def test_translation_is_a_word_for_word_code(language: str) -> None:
    """One English word always gives one foreign word, and lengths agree, whatever the order."""
    task = tasks.get(f"translate/to_{language}")
    code: dict[str, set[str]] = {}
    for row in task.sample(800):
        source, target = row["input"].split(": ")[1].split(), row["target"].split()
        assert len(source) == len(target)
        for word in source:
            code[word] = code.get(word, set(target)) & set(target)
    assert all(len(words) == 1 for words in code.values())
    assert len(set.union(*code.values())) == len(code)
