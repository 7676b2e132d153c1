"""Families ``sort``, ``pick`` and ``arrange``: lists of words, put in order, picked from or moved about."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from loraweave.zoo.tasks.core import Draw, Task
from loraweave.zoo.tasks.words import GROUP_OF, GROUPS, SMALL, THINGS

Key = Callable[[str], object]


def _sorted_by(key: Callable[[str], int | str], low: int, high: int, reverse: bool = False) -> Draw:
    """Lists whose keys all differ, so that the order is never a matter of taste."""

    def draw(rng: random.Random) -> tuple[str, str]:
        wanted = rng.randint(low, high)
        words: list[str] = []
        keys: set[int | str] = set()
        while len(words) < wanted:
            word = rng.choice(THINGS)
            if key(word) not in keys:
                keys.add(key(word))
                words.append(word)
        return " ".join(words), " ".join(sorted(words, key=key, reverse=reverse))

    return draw


def _numbers(reverse: bool, words: bool) -> Draw:
    def draw(rng: random.Random) -> tuple[str, str]:
        values = rng.sample(range(21 if words else 100), rng.randint(3, 5))
        show = (lambda v: SMALL[v]) if words else str
        return " ".join(map(show, values)), " ".join(map(show, sorted(values, reverse=reverse)))

    return draw


def _on_list(change: Callable[[Sequence[str]], Sequence[str]], low: int = 4, high: int = 5) -> Draw:
    def draw(rng: random.Random) -> tuple[str, str]:
        words = rng.sample(THINGS, rng.randint(low, high))
        return " ".join(words), " ".join(change(words))

    return draw


def _relative(step: int) -> Draw:
    def draw(rng: random.Random) -> tuple[str, str]:
        words = rng.sample(THINGS, rng.randint(4, 6))
        at = rng.randrange(max(0, -step), len(words) - max(0, step))
        return f"{words[at]} in {' '.join(words)}", words[at + step]

    return draw


def _by_group(group: str) -> Draw:
    """One word of ``group`` among words of others."""

    def draw(rng: random.Random) -> tuple[str, str]:
        words = rng.sample([word for word in THINGS if GROUP_OF[word] != group], rng.randint(3, 5))
        answer = rng.choice(GROUPS[group])
        words.insert(rng.randint(0, len(words)), answer)
        return " ".join(words), answer

    return draw


def _extreme(longest: bool) -> Draw:
    def draw(rng: random.Random) -> tuple[str, str]:
        while True:
            words = rng.sample(THINGS, rng.randint(3, 5))
            lengths = sorted(len(word) for word in words)
            if lengths[-1] != lengths[-2] if longest else lengths[0] != lengths[1]:
                return " ".join(words), (max if longest else min)(words, key=len)

    return draw


def _swap_pairs(words: Sequence[str]) -> list[str]:
    out = list(words)
    for i in range(0, len(out) - 1, 2):
        out[i], out[i + 1] = out[i + 1], out[i]
    return out


TASKS = (
    Task("sort", "a_to_z", "sort words a to z", "Words in alphabetical order.", _sorted_by(str, 3, 5)),
    Task("sort", "z_to_a", "sort words z to a", "Words in reverse alphabetical order.", _sorted_by(str, 3, 5, True)),
    Task(
        "sort", "last_letter", "sort words by last letter", "Words by their last letter.",
        _sorted_by(lambda word: word[-1], 3, 4),
    ),
    Task(
        "sort", "second_letter", "sort words by second letter", "Words by their second letter.",
        _sorted_by(lambda word: word[1], 3, 4),
    ),
    Task("sort", "shortest_first", "sort words short to long", "Words by length.", _sorted_by(len, 3, 4)),
    Task("sort", "longest_first", "sort words long to short", "Words by length, down.", _sorted_by(len, 3, 4, True)),
    Task(
        "sort", "groups", "sort words by kind", "Words by the alphabetical order of their kinds.",
        _sorted_by(GROUP_OF.__getitem__, 3, 5),
    ),
    Task("sort", "numbers_up", "sort numbers up", "Numbers in digits, ascending.", _numbers(False, False)),
    Task("sort", "numbers_down", "sort numbers down", "Numbers in digits, descending.", _numbers(True, False)),
    Task("sort", "number_words_up", "sort number words up", "Number words, ascending.", _numbers(False, True)),
    Task("sort", "number_words_down", "sort number words down", "Number words, descending.", _numbers(True, True)),
    Task("pick", "first", "pick the first word", "The first word.", _on_list(lambda w: w[:1], 3, 6)),
    Task("pick", "second", "pick the second word", "The second word.", _on_list(lambda w: w[1:2], 3, 6)),
    Task("pick", "third", "pick the third word", "The third word.", _on_list(lambda w: w[2:3], 3, 6)),
    Task("pick", "last", "pick the last word", "The last word.", _on_list(lambda w: w[-1:], 3, 6)),
    Task("pick", "last_but_one", "pick the word before the last", "The last word but one.",
         _on_list(lambda w: w[-2:-1], 3, 6)),
    Task("pick", "middle", "pick the middle word", "The middle of five words.", _on_list(lambda w: w[2:3], 5, 5)),
    Task("pick", "ends", "pick both ends", "The first and the last word.", _on_list(lambda w: [w[0], w[-1]], 3, 6)),
    Task("pick", "after", "pick the word after", "The word after a given one.", _relative(1)),
    Task("pick", "before", "pick the word before", "The word before a given one.", _relative(-1)),
    Task("pick", "longest", "pick the longest word", "The longest word.", _extreme(True)),
    Task("pick", "shortest", "pick the shortest word", "The shortest word.", _extreme(False)),
    *(
        Task("pick", f"the_{group}", f"pick the {group}", f"The one {group} in the list.", _by_group(group))
        for group in GROUPS
    ),
    Task("arrange", "reverse", "arrange words in reverse", "The list backwards.", _on_list(lambda w: w[::-1])),
    Task("arrange", "rotate_left", "arrange words first to end", "The first word moves to the end.",
         _on_list(lambda w: [*w[1:], w[0]])),
    Task("arrange", "rotate_right", "arrange words last to front", "The last word moves to the front.",
         _on_list(lambda w: [w[-1], *w[:-1]])),
    Task("arrange", "swap_pairs", "arrange words in swapped pairs", "Neighbours change places.", _on_list(_swap_pairs)),
    Task("arrange", "swap_ends", "arrange words with ends swapped", "First and last change places.",
         _on_list(lambda w: [w[-1], *w[1:-1], w[0]])),
    Task("arrange", "drop_first", "arrange words without the first", "All but the first.", _on_list(lambda w: w[1:])),
    Task("arrange", "drop_last", "arrange words without the last", "All but the last.", _on_list(lambda w: w[:-1])),
    Task("arrange", "odd_places", "arrange words at odd places", "Words one, three and five.",
         _on_list(lambda w: w[::2])),
    Task("arrange", "even_places", "arrange words at even places", "Words two and four.", _on_list(lambda w: w[1::2])),
    Task("arrange", "copy", "arrange words as they are", "The same list.", _on_list(lambda w: w)),
)  # fmt: skip
