"""A small text-to-image pipeline and LoRAs for it, that come with the package: figures made of aligned parts.

>>> from loraweave.zoo import images
>>> pipe = images.pipeline()
>>> mixture = lw.attach(pipe, images.loras(["tengu", "faerie"]), lw.Composite())
>>> images.compositions(1, size=2)[0].prompt
'a morgul gargoyle in a sylva faerie mail, on sand'

In recipes the pipeline is ``zoo:images``, a LoRA ``zoo:images/tengu``, a CLIP ``zoo:images/clip-objective``,
SVDiff's shifts ``zoo:images/shifts/tengu``. Importing this module loads neither torch nor diffusers.
"""

from __future__ import annotations

from loraweave.zoo.images.bundled import (
    CLIPS,
    GUIDANCE,
    STEPS,
    base_path,
    card,
    clip_path,
    loras,
    pipeline,
    place,
    references,
    shifts,
    skills,
)
from loraweave.zoo.images.compositions import Composition, compositions
from loraweave.zoo.images.elements import BASE, HELD_OUT, LAYERS, STYLES, Element, caption

__all__ = [
    "BASE",
    "CLIPS",
    "GUIDANCE",
    "HELD_OUT",
    "LAYERS",
    "STEPS",
    "STYLES",
    "Composition",
    "Element",
    "base_path",
    "caption",
    "card",
    "clip_path",
    "compositions",
    "loras",
    "pipeline",
    "place",
    "references",
    "shifts",
    "skills",
]
