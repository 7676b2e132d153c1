"""What goes where: which generated tasks are skills, which are held out, and what the base learns from."""

from __future__ import annotations

from pathlib import Path

ZOO = Path(__file__).resolve().parents[2] / "src" / "loraweave" / "zoo"
BASE_DIR = ZOO / "weights" / "base"
LORA_DIR = ZOO / "weights" / "loras"
BASE_NAME = "loraweave-zoo-t5"

SKILLS = (
    "sort/z_to_a",
    "sort/last_letter",
    "count/not_animals",
    "count/animals_and_fruits",
    "translate/to_sul",
    "translate/to_mip",
    "record/notice",
    "dates/days_before",
    "number_words/to_swapped",
    "arrange/reverse",
    "lookup/owner",
    "relate/less",
    "record/rumour",
    "record/label",
    "record/wish",
    "record/warning",
    "record/polite",
    "extract/owner_and_thing",
    "extract/thing_and_place",
    "extract/colour_and_thing",
)
"""Tasks that are LoRAs (or were tried as such); the base never sees them."""

HELD_OUT = (
    "boolean/mixed",
    "cipher/encode_reversed",
    "compare/line_up",
    "count/more",
    "dates/two_steps",
    "letters/backwards",
    "lookup/least",
    "navigate/way_back",
    "number_words/from_swapped",
    "number_words/swap",
    "reorder/sov_last",
    "shuffle/three_twice",
    "sort/longest_first",
)
"""Tasks that nothing is trained on: they stay free for tests of composition."""
