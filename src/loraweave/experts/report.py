"""What is told of a LoRA file, and how it is written down."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import TypeVar

K = TypeVar("K")


@dataclass
class ExpertReport:
    """What :func:`inspect` found.

    Attributes:
        source: as the user wrote it.
        format: ``"peft"``, ``"diffusers"``, ``"kohya"``, ``"lycoris"`` or ``"unknown"``: whose names the tensors have.
        method: ``"LORA"``, or which other PEFT method it is; ``None`` where the file does not say.
        base: the base model its author named; ``base_class`` and ``task_type``: its class and task, where given.
        peft_version: of the PEFT that wrote it, where given.
        revision: the hub commit, if it came from the hub.
        ranks, alphas, scales: value -> number of modules that have it.
        targets: last part of the module path -> number of modules.
        modules: how many modules have a LoRA.
        parameters: how many numbers the LoRA has.
        dtypes: dtype -> number of tensors.
        size: of the weight file, in bytes.
        sha256: as in :class:`~loraweave.experts.types.Expert`; of the one file where there is no configuration.
        metadata: what the weight file's header says of itself, shortened.
        architecture: the kind of image model it was made for, guessed from names and shapes; ``None`` if unknown.
        triggers: words that call it up, as far as the header tells.
        text_encoder_share: part of its parameters that extends text encoders.
        matched, unmatched: how many tensors fitted the pipeline it was read for, and the names of the others.
        odd: what is unusual, one sentence each.
        mixable: whether a mixture can hold it.
        reason: why not.
    """

    source: str
    format: str
    method: str | None = None
    base: str | None = None
    base_class: str | None = None
    task_type: str | None = None
    peft_version: str | None = None
    revision: str | None = None
    ranks: dict[int, int] = field(default_factory=dict)
    alphas: dict[float, int] = field(default_factory=dict)
    scales: dict[float, int] = field(default_factory=dict)
    targets: dict[str, int] = field(default_factory=dict)
    modules: int = 0
    parameters: int = 0
    dtypes: dict[str, int] = field(default_factory=dict)
    size: int = 0
    sha256: str = ""
    metadata: dict[str, str] = field(default_factory=dict)
    architecture: str | None = None
    triggers: list[str] = field(default_factory=list)
    text_encoder_share: float | None = None
    matched: int | None = None
    unmatched: list[str] = field(default_factory=list)
    odd: list[str] = field(default_factory=list)
    mixable: bool = False
    reason: str | None = None

    def to_dict(self) -> dict[str, object]:
        """All fields, ready for JSON (whose keys are strings)."""
        content = asdict(self)
        for name in ("ranks", "alphas", "scales"):
            content[name] = {str(key): count for key, count in content[name].items()}
        return content


def counted(values: Iterable[K]) -> dict[K, int]:
    """How often each value occurs, the commonest first."""
    return dict(Counter(values).most_common())


def shortened(metadata: Mapping[str, str], entries: int = 40, characters: int = 200) -> dict[str, str]:
    """The first entries of a header's metadata; training tools put whole tag tables there."""
    return {
        key[:characters]: value if len(value) <= characters else value[:characters] + "..."
        for key, value in list(metadata.items())[:entries]
    }
