"""Small pictures of figures made of aligned parts: the elements, what asks for them, and compositions to test with.

>>> from loraweave.zoo import images
>>> images.compositions(1, size=2)[0].prompt
'a morgul gargoyle in a sylva faerie mail, on sand'

Importing this module loads neither torch nor diffusers.
"""

from __future__ import annotations

from loraweave.zoo.images.compositions import Composition, compositions
from loraweave.zoo.images.elements import BASE, HELD_OUT, LAYERS, STYLES, Element, caption

__all__ = ["BASE", "HELD_OUT", "LAYERS", "STYLES", "Composition", "Element", "caption", "compositions"]
