"""Families ``number_words``, ``arithmetic`` and ``sequence``."""

from __future__ import annotations

import random
from collections.abc import Callable

from loraweave.zoo.tasks.core import Draw, Task
from loraweave.zoo.tasks.words import DAYS, SMALL, TENS, THINGS, number_words


def swapped_words(value: int) -> str:
    """Number words with the unit before the tens, e.g. ``347`` gives ``three hundred seven and forty``."""
    hundreds, rest = divmod(value, 100)
    tens, unit = divmod(rest, 10)
    words = f"{SMALL[unit]} and {TENS[tens]}" if rest > 20 and unit else number_words(rest) if rest else ""
    head = f"{SMALL[hundreds]} hundred" if hundreds else ""
    return " ".join(part for part in (head, words) if part) or "zero"


def _convert(show: Callable[[int], str], answer: Callable[[int], str], high: int = 999) -> Draw:
    def draw(rng: random.Random) -> tuple[str, str]:
        value = rng.randint(0, high)
        return show(value), answer(value)

    return draw


def _spaced(value: int) -> str:
    return " ".join(str(value))


def _of_pair(answer: Callable[[int, int], int], word: str, high: int) -> Draw:
    def draw(rng: random.Random) -> tuple[str, str]:
        one, two = rng.randint(0, high), rng.randint(0, high)
        one, two = (one, two) if word == "plus" else (max(one, two), min(one, two))
        thing = rng.choice(THINGS)
        return f"{SMALL[one]} {thing} {word} {SMALL[two]} {thing}", number_words(answer(one, two))

    return draw


def _of_list(answer: Callable[[list[int]], str], high: int, low_length: int = 3, high_length: int = 5) -> Draw:
    def draw(rng: random.Random) -> tuple[str, str]:
        values = [rng.randint(0, high) for _ in range(rng.randint(low_length, high_length))]
        return " ".join(SMALL[v] for v in values), answer(values)

    return draw


def _steps(sizes: tuple[int, ...], down: bool = False) -> Draw:
    def draw(rng: random.Random) -> tuple[str, str]:
        step, start, length = rng.choice(sizes), rng.randint(0, 60), rng.randint(3, 4)
        values = [start + step * i for i in range(length + 1)]
        values = values[::-1] if down else values
        return " ".join(map(str, values[:-1])), str(values[-1])

    return draw


def _cycle(period: int) -> Draw:
    def draw(rng: random.Random) -> tuple[str, str]:
        words, shown = rng.sample(THINGS, period), rng.randint(period + 1, 2 * period + 1)
        return " ".join(words[i % period] for i in range(shown)), words[shown % period]

    return draw


def _days(rng: random.Random) -> tuple[str, str]:
    start, step, thing = rng.randrange(7), rng.randint(1, 3), rng.choice(THINGS)
    days = [DAYS[(start + step * i) % 7] for i in range(4)]
    return f"{thing} {' '.join(days[:3])}", days[3]


TASKS = (
    Task("number_words", "to_words", "number to words", "Digits to words.", _convert(str, number_words)),
    Task("number_words", "to_digits", "number to digits", "Words to digits.", _convert(number_words, str)),
    Task("number_words", "to_swapped", "number to swapped words", "Digits to words, the unit before the tens.",
         _convert(str, swapped_words)),
    Task("number_words", "from_swapped", "number from swapped words", "Swapped words to digits.",
         _convert(swapped_words, str)),
    Task("number_words", "swap", "number words swapped", "Words to swapped words.",
         _convert(number_words, swapped_words)),
    Task("number_words", "next", "number next", "The next number, in words.",
         _convert(number_words, lambda v: number_words(v + 1), 998)),
    Task("number_words", "digit_names", "number digit names", "Each digit as a word.",
         _convert(str, lambda v: " ".join(SMALL[int(d)] for d in str(v)))),
    Task("number_words", "reversed", "number backwards", "The digits in reverse.",
         _convert(_spaced, lambda v: " ".join(reversed(str(v))))),
    Task("arithmetic", "plus", "arithmetic plus", "A sum up to twenty and twenty.", _of_pair(int.__add__, "plus", 12)),
    Task("arithmetic", "minus", "arithmetic minus", "A difference.", _of_pair(int.__sub__, "minus", 20)),
    Task("arithmetic", "largest", "arithmetic largest", "The largest number.", _of_list(lambda v: SMALL[max(v)], 20)),
    Task("arithmetic", "smallest", "arithmetic smallest", "The smallest number.",
         _of_list(lambda v: SMALL[min(v)], 20)),
    Task("arithmetic", "sum_of_three", "arithmetic sum of three", "The sum of three numbers to nine.",
         _of_list(lambda v: number_words(sum(v)), 9, 3, 3)),
    Task("arithmetic", "parity", "arithmetic even or odd", "Each number's parity.",
         _of_list(lambda v: " ".join("odd" if x % 2 else "even" for x in v), 20)),
    Task("arithmetic", "count_even", "arithmetic count even", "How many numbers are even.",
         _of_list(lambda v: SMALL[sum(x % 2 == 0 for x in v)], 20, 3, 6)),
    Task("arithmetic", "add_one", "arithmetic add one", "Each number and one.",
         _of_list(lambda v: " ".join(SMALL[x + 1] for x in v), 19)),
    Task("arithmetic", "take_one", "arithmetic take one", "Each number less one.",
         _of_list(lambda v: " ".join(SMALL[x - 1] if x else "none" for x in v), 20)),
    Task("arithmetic", "double", "arithmetic double", "Each number doubled.",
         _of_list(lambda v: " ".join(SMALL[2 * x] for x in v), 10)),
    Task("sequence", "up", "sequence up", "The next number of a rising sequence.", _steps((1, 2, 3, 5, 10))),
    Task("sequence", "down", "sequence down", "The next number of a falling sequence.", _steps((1, 2, 3, 5, 10), True)),
    Task("sequence", "cycle_two", "sequence of two", "The next word of a pattern of two.", _cycle(2)),
    Task("sequence", "cycle_three", "sequence of three", "The next word of a pattern of three.", _cycle(3)),
    Task("sequence", "days", "sequence of days", "The next weekday of a pattern.", _days),
)  # fmt: skip
