"""The closed lexicon that every generator draws from; short words, so that each becomes one token."""

from __future__ import annotations

ANIMALS = ("cat", "dog", "cow", "pig", "hen", "fox", "owl", "bee", "horse", "goat")
FRUITS = ("apple", "pear", "plum", "fig", "lemon", "grape", "melon", "peach", "mango", "kiwi")
TOOLS = ("hammer", "saw", "drill", "rake", "axe", "knife", "brush", "spade", "pliers", "nail")
CLOTHES = ("hat", "coat", "sock", "shirt", "scarf", "glove", "boot", "belt", "dress", "jacket")
VEHICLES = ("car", "bus", "train", "ship", "truck", "bike", "plane", "van", "tram", "sled")
GROUPS = {"animal": ANIMALS, "fruit": FRUITS, "tool": TOOLS, "garment": CLOTHES, "vehicle": VEHICLES}
PLURALS = {
    "animal": "animals",
    "fruit": "fruits",
    "tool": "tools",
    "garment": "garments",
    "vehicle": "vehicles",
}
THINGS = ANIMALS + FRUITS + TOOLS + CLOTHES + VEHICLES
GROUP_OF = {word: group for group, words in GROUPS.items() for word in words}
COLOURS = ("red", "blue", "green", "black", "white", "pink", "brown", "gold")
SIZES = ("big", "small", "old", "new", "heavy", "light")
NAMES = ("ana", "bob", "carl", "dora", "emil", "fay", "gus", "hana", "ivan", "june", "kim", "leo", "mia", "ned")
PLACES = ("park", "house", "shop", "lake", "school", "farm", "garden", "bridge")
DAYS = ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday")
MONTHS = (
    "january",
    "february",
    "march",
    "april",
    "may",
    "june",
    "july",
    "august",
    "september",
    "october",
    "november",
    "december",
)
SMALL = (
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
    "thirteen",
    "fourteen",
    "fifteen",
    "sixteen",
    "seventeen",
    "eighteen",
    "nineteen",
    "twenty",
)
TENS = ("", "", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")


def number_words(value: int) -> str:
    """English words for ``0 <= value <= 999``, e.g. ``347`` gives ``three hundred forty seven``."""
    if not 0 <= value <= 999:
        raise ValueError(f"expected a number from 0 to 999, got {value}")
    if value <= 20:
        return SMALL[value]
    if value < 100:
        tens, unit = divmod(value, 10)
        return TENS[tens] + (f" {SMALL[unit]}" if unit else "")
    hundreds, rest = divmod(value, 100)
    return f"{SMALL[hundreds]} hundred" + (f" {number_words(rest)}" if rest else "")


def yes_no(value: bool) -> str:
    """``yes`` or ``no``."""
    return "yes" if value else "no"


def truth(value: bool) -> str:
    """``true`` or ``false``."""
    return "true" if value else "false"
