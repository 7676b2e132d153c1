"""How well the painted pictures of a test bed show what they should: text and image alignment, and distinctness."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loraweave import zoo
from loraweave.errors import LoraweaveError
from loraweave.evaluation.data import read_rows
from loraweave.evaluation.image_metrics import Clip, Looks, distinctness
from loraweave.recipe.testbeds import Testbed

_KINDS = (".png", ".jpg", ".jpeg", ".webp")
_AT_ONCE = 64
_METRICS = "clip-metrics"


def alignment(pictures: Path, testbed: Testbed, clip: Clip, dino: Looks | None = None) -> dict[str, Any]:
    """Score every method's pictures.

    Args:
        pictures: ``pictures.jsonl``, as ``loraweave testbed`` writes it.
        testbed: whose pictures they are.
        clip: for text and image alignment, and for distinctness.
        dino: for image alignment in its space too.

    Returns:
        ``scores``: method -> ``text_alignment`` (mean cosine of picture and prompt) and, for elements with references,
        ``image_alignment_EXPERT`` and their mean ``image_alignment`` (with ``dino`` also ``dino_...``);
        ``distinctness``: method -> what :func:`~loraweave.evaluation.image_metrics.distinctness` says, each picture's
        elements against all of the test bed, by the elements' names (only sets that are not the whole test bed);
        ``pictures``: number per method.

    Raises:
        LoraweaveError: a file cannot be read, there are no pictures, or see :func:`check_references`.
    """
    check_references(testbed, clip.source, None if dino is None else getattr(dino, "source", type(dino).__name__))
    folder, rows = pictures.parent, [row for _, row in read_rows(pictures)]
    methods = list(rows[0]["pictures"]) if rows else []
    if not methods:
        raise LoraweaveError(f"{pictures}: no pictures; paint some first")
    spaces: dict[str, Looks] = {"": clip} | ({} if dino is None else {"dino_": dino})
    references = {
        (space, name): _references(looks, element.references)
        for space, looks in spaces.items()
        for name, element in testbed.elements.items()
        if element.references is not None
    }
    prompts = [str(row["prompt"]) for row in rows]
    texts = dict(zip(dict.fromkeys(prompts), clip.texts(list(dict.fromkeys(prompts))), strict=True))
    names = list(testbed.elements)
    phrases = clip.texts([element.name or name for name, element in testbed.elements.items()])
    experts = [str(row["set"]).split("+") for row in rows]
    scores: dict[str, dict[str, float]] = {}
    distinct: dict[str, Any] = {}
    for method in methods:
        paths = [folder / row["pictures"][method] for row in rows]
        features = {space: _features(looks, paths) for space, looks in spaces.items()}
        found = {"text_alignment": _mean(float(f @ texts[p]) for f, p in zip(features[""], prompts, strict=True))}
        for space, of_space in features.items():
            found |= _image_alignment(space, of_space, experts, references)
        scores[method] = found
        partial = [n for n, wanted in enumerate(experts) if len(wanted) < len(names)]
        if partial:
            distinct[method] = distinctness(features[""][partial] @ phrases.T, names, [experts[n] for n in partial])
    return {"scores": scores, "distinctness": distinct, "pictures": len(rows)}


def check_references(testbed: Testbed, clip: str, dino: str | None = None) -> None:
    """Raise :class:`LoraweaveError` if elements have bundled references, which one CLIP has seen, and another model
    scores.

    Args:
        testbed: whose elements.
        clip: the CLIP model, by folder, hub id or bundled name.
        dino: the DINO model, if there is one.
    """
    for name, element in testbed.elements.items():
        if not zoo.is_bundled(element.references):
            continue
        known = Path(zoo.local(clip)).resolve() == zoo.images.clip_path(_METRICS).resolve()
        for option, model in (("--clip", None if known else clip), ("--dino", dino)):
            if model is not None:
                raise LoraweaveError(
                    f"testbed.elements.{name}.references: {element.references} is what zoo:images/{_METRICS} saw and "
                    f"says nothing in the space of {option} {model}; score with --clip zoo:images/{_METRICS} alone, or "
                    "name a folder of pictures"
                )


def _references(looks: Looks, source: str) -> Tensor:
    """``[n, d]``: of a folder's pictures; ``[1, d]`` of a bundled reference, the mean of ``n`` such vectors."""
    if zoo.is_bundled(source):
        return zoo.images.references()[source.rpartition("/")[2]][None]
    return _features(looks, _files(Path(source)))


def _image_alignment(
    space: str, features: Tensor, experts: Sequence[Sequence[str]], references: Mapping[tuple[str, str], Tensor]
) -> dict[str, float]:
    """Per element: mean over the pictures that should show it of the mean cosine with its references."""
    found = {}
    for (of_space, name), of_element in references.items():
        showing = [n for n, wanted in enumerate(experts) if name in wanted]
        if of_space == space and showing:
            found[f"{space}image_alignment_{name}"] = float((features[showing] @ of_element.T).double().mean())
    return found | ({f"{space}image_alignment": _mean(found.values())} if found else {})


def _features(looks: Looks, paths: Sequence[Path]) -> Tensor:
    """``[n, d]``; pictures are read a few at a time."""
    from PIL import Image, UnidentifiedImageError

    parts = []
    for start in range(0, len(paths), _AT_ONCE):
        batch = []
        for path in paths[start : start + _AT_ONCE]:
            try:
                with Image.open(path) as picture:
                    batch.append(picture.convert("RGB"))
            except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
                raise LoraweaveError(f"cannot read the picture {str(path)!r}: {error}") from error
        parts.append(looks.pictures(batch))
    return torch.cat(parts)


def _files(folder: Path) -> list[Path]:
    try:
        found = sorted(path for path in folder.iterdir() if path.suffix.lower() in _KINDS)
    except OSError as error:
        raise LoraweaveError(f"references {str(folder)!r}: cannot be read ({error.strerror or error})") from error
    if not found:
        raise LoraweaveError(f"references {str(folder)!r}: no picture; expected some of {', '.join(_KINDS)}")
    return found


def _mean(values: Iterable[float]) -> float:
    return statistics.fmean(values)
