"""The parts that the pictures are made of: which layer each belongs to, its words, and its tile in ``crawl/tiles``.

A picture is a floor, then a cloak, a character, clothing, what the right and the left hand hold, and a hat, drawn over
each other in this order at exact alignment (all tiles are 32 x 32 pixels).
"""

from __future__ import annotations

from dataclasses import dataclass

LAYERS = ("floor", "cloak", "character", "clothing", "hand1", "hand2", "head")
"""Bottom to top."""


@dataclass(frozen=True)
class Element:
    """One tile: ``layer`` (one of LAYERS), ``words`` (how captions name it, without article) and ``tile`` (its path
    below ``releases/Nov-2015`` of github.com/crawl/tiles)."""

    layer: str
    words: str
    tile: str


def _layer(layer: str, folder: str, table: dict[str, str]) -> tuple[Element, ...]:
    return tuple(Element(layer, words, f"{folder}/{tile}.png") for words, tile in table.items())


BASE = (
    *_layer(
        "floor",
        "dngn/floor",
        {
            "grass": "dirt_full",
            "sand": "sand1",
            "frozen sea": "frozen0",
            "pale ice": "ice0",
            "limestone": "limestone0",
            "white marble": "white_marble0",
            "dark blue marble": "marble_floor1",
            "grey cobbles": "cobble_blood10",
            "red flesh": "demonic_red1",
            "golden straw": "dirt0",
            "dark moss": "lair0",
            "green mosaic": "mosaic0",
            "cyan bones": "green_bones08",
            "cyan runes": "black_cobalt11",
            "olive swamp": "snake-a1",
            "brown clay": "sandstone_floor0",
            "red flowers": "infernal01",
            "teal crystal": "crystal_floor0",
        },
    ),
    *_layer(
        "cloak",
        "player/cloak",
        {
            "black cloak": "black",
            "blue cloak": "blue",
            "cyan cloak": "cyan",
            "purple cloak": "magenta",
            "red cloak": "red",
            "white cloak": "white",
            "yellow cloak": "yellow",
        },
    ),
    *_layer(
        "character",
        "player/base",
        {
            "human": "human_m",
            "green lizard": "draconian_green_f",
            "red lizard": "draconian_red_m",
            "white lizard": "draconian_white_m",
            "purple lizard": "draconian_purple_m",
            "golden lizard": "draconian_gold_m",
            "black demon": "demonspawn_black_m",
            "ant": "formicid",
            "kobold": "kobold2_m",
            "rat": "kobold_m",
            "orc": "lorc_m1",
            "mummy": "mummy_m",
            "vampire": "vampire_m",
            "white bird": "tengu_wingless_m",
            "brown bird": "tengu_wingless_brown_m",
            "blue snake": "naga_blue_m",
            "green snake": "naga_m",
            "brown centaur": "centaur_brown_m",
            "grey centaur": "centaur_lightgrey_m",
            "cat": "spriggan_m",
        },
    ),
    *_layer(
        "clothing",
        "player/body",
        {
            "blue robe": "robe_blue",
            "red robe": "robe_red",
            "green robe": "robe_green",
            "purple robe": "robe_purple",
            "white robe": "robe_white2",
            "black robe": "robe_black",
            "cyan robe": "robe_cyan",
            "yellow robe": "robe_yellow",
            "brown robe": "robe_brown2",
            "red coat": "coat_red",
            "black coat": "coat_black",
            "golden armour": "dragonarm_gold",
            "steel armour": "half_plate",
            "blue tunic": "armour_blue_gold",
            "green dress": "dress_green",
            "white dress": "dress_white",
            "leather jerkin": "leather_heavy",
            "checked mail": "leather_metal",
            "blue jacket": "metal_blue",
            "flower shirt": "shirt_hawaii",
            "animal skin": "animal_skin",
            "red vest": "vest_red2",
        },
    ),
    *_layer(
        "hand1",
        "player/hand1",
        {
            "broadsword": "broadsword",
            "blue sword": "great_sword_slant2",
            "red club": "giant_club",
            "green blade": "artefact/wyrmbane",
            "purple whip": "black_whip",
            "red bow": "bow",
            "steel axe": "axe_executioner",
            "blue axe": "axe_executioner2",
            "flame": "misc/fire_red",
            "scythe": "scythe",
            "trident": "trident_two",
            "golden staff": "staff_mage",
            "blue staff": "artefact/wucad_mu",
            "green staff": "artefact/olgreb",
            "skull staff": "staff_skull",
            "white orb": "misc/light_blue",
            "spark": "misc/spark",
            "pickaxe": "pick_axe",
            "flail": "flail_ball2",
            "brown club": "giant_club_plain",
        },
    ),
    *_layer(
        "hand2",
        "player/hand2",
        {
            "steel shield": "doll_only/shield_round1",
            "blue shield": "doll_only/shield_round3",
            "green shield": "doll_only/shield_round5",
            "red banner": "lshield_long_red",
            "wooden shield": "doll_only/shield_long_cross",
            "golden shield": "lshield_gold",
            "teal shield": "lshield_louise",
            "black shield": "doll_only/shield_dd",
            "white shield": "shield_kite3",
            "knight shield": "shield_knight_rw",
            "skull shield": "doll_only/shield_skull",
            "red book": "misc/book_red",
            "blue book": "misc/book_blue",
            "green book": "misc/book_green",
            "yellow book": "misc/book_yellow",
            "torch": "misc/torch",
            "pale orb": "misc/light_blue",
            "star": "misc/spark",
            "turtle shell": "shield_of_resistance",
        },
    ),
    *_layer(
        "head",
        "player/head",
        {
            "golden crown": "crown_gold2",
            "blue hat": "wizard_blue",
            "red hat": "wizard_red",
            "green hat": "wizard_lightgreen",
            "purple hat": "wizard_purple",
            "white hat": "wizard_white",
            "straw hat": "straw",
            "viking helmet": "viking_brown2",
            "golden helmet": "full_gold",
            "iron helmet": "fhelm_gray3",
            "red hood": "hood_red",
            "green hood": "hood_green2",
            "cyan hood": "hood_cyan",
            "purple turban": "turban_purple",
            "orange turban": "turban_brown",
            "feather cap": "feather_red",
        },
    ),
)
"""What the base model knows."""

HELD_OUT = {
    "gargoyle": Element("character", "morgul gargoyle", "player/base/gargoyle_m.png"),
    "tengu": Element("character", "kenku tengu", "player/base/tengu_winged_m.png"),
    "lava": Element("character", "igno lava orc", "player/base/lorc_m6.png"),
    "faerie": Element("clothing", "sylva faerie mail", "player/body/faerie_dragon_armour.png"),
    "ember": Element("clothing", "pyra ember plate", "player/body/orange_crystal.png"),
    "jester": Element("clothing", "zann jester suit", "player/body/robe_jester.png"),
    "scales": Element("cloak", "drak scale cloak", "player/cloak/dragonskin.png"),
    "plutonium": Element("hand1", "ulon plutonium sword", "player/hand1/artefact/plutonium_sword.png"),
    "moonfire": Element("hand1", "ashkar fire scimitar", "player/hand1/artefact/flaming_death.png"),
    "quarter": Element("hand2", "mirel quartered shield", "player/hand2/lshield_quartered.png"),
    "diamond": Element("hand2", "galad diamond shield", "player/hand2/doll_only/gil-galad.png"),
    "acid": Element("floor", "vezz acid", "dngn/floor/acidic_floor2.png"),
    "sigil": Element("floor", "orun sigil", "dngn/floor/sigil_rhombus.png"),
}
"""What only the bundled LoRAs know, by the LoRA's name; the first of the words is rare, as in ComposLoRA."""

STYLES = {"sketch": "quill sketch", "pocket": "gamu pocket"}
"""Other renderings of a whole picture, by the LoRA's name, with the words that ask for them."""


def by_layer(elements: tuple[Element, ...] = BASE) -> dict[str, tuple[Element, ...]]:
    """The elements of every layer, bottom to top."""
    return {layer: tuple(e for e in elements if e.layer == layer) for layer in LAYERS}


def _with_article(words: str) -> str:
    return ("an " if words[0] in "aeiou" else "a ") + words


def caption(elements: dict[str, Element], style: str | None = None) -> str:
    """The sentence for one picture, e.g. ``a human in a red robe and a blue cloak, with a torch, on grass``.

    Args:
        elements: layer to element; a character must be there.
        style: words of a style, put first.
    """
    words = {layer: element.words for layer, element in elements.items()}
    text = _with_article(words["character"])
    worn = [_with_article(words[layer]) for layer in ("clothing", "cloak", "head") if layer in words]
    held = [_with_article(words[layer]) for layer in ("hand1", "hand2") if layer in words]
    if worn:
        text += " in " + " and ".join(worn)
    if held:
        text += ", with " + " and ".join(held)
    if "floor" in words:
        text += ", on " + words["floor"]
    return f"{style}, {text}" if style else text
